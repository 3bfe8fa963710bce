"""The table of accelerators: what JAX calls a device finds its row, and what is not known is not guessed."""

import os
import subprocess
import sys

import pytest
from test_room import limits

from lm_jax.devices import DEVICES, GIB, TABLE, cores, of_kind, peak_flops, priced


def test_a_device_that_is_not_in_the_table_has_no_peak():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12 and peak_flops("TPU7x") == 1153.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA GB200") == 2500e12
    for kind in ("cpu", "TPU v9", "TPU v4 lite", "NVIDIA RTX A1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):
        assert peak_flops(kind) is None


@pytest.mark.parametrize("device", TABLE, ids=lambda device: device.name)
def test_every_row_is_found_by_the_names_jax_gives_it(device):
    assert all(of_kind(kind if device.platform == "tpu" else f"NVIDIA {kind} 80GB") is device for kind in device.kinds)
    assert device.name in DEVICES and device.dollars > 0 and device.flops >= device.flops32 > 1e13
    assert GIB < device.memory < 1e12 and device.memory_rate > device.link > device.network


def test_a_chip_of_two_devices_is_counted_once():
    v7x = DEVICES["v7x"]
    assert v7x.per_chip == 2 and peak_flops("TPU7x") == v7x.flops / 2
    assert DEVICES["v5p"].per_chip == 1 and DEVICES["v5p"].cores == 2, "two cores that JAX sees as one"


def test_a_price_of_ones_own_replaces_the_list_price():
    assert priced(DEVICES["v5p"], {"v5p": 2.0}).dollars == 2.0
    assert priced(DEVICES["v5e"], {"v5p": 2.0}) == DEVICES["v5e"]


@pytest.mark.parametrize("group, files, found", [
    ("0::/", {}, 4), ("0::/", {"sys__fs__cgroup__cpu.max": "max 100000"}, 4),
    ("0::/", {"sys__fs__cgroup__cpu.max": "150000 100000"}, 2),
    ("0::/user/job", {"sys__fs__cgroup__user__cpu.max": "9 100", "sys__fs__cgroup__user__job__cpu.max": "max 100"}, 1),
    ("0::/of/the/host", {"sys__fs__cgroup__cpu.max": "300000 100000"}, 3),  # as a container sees its own
    ("2:cpuset:/\n1:cpuacct,cpu:/job\n0::/", {"sys__fs__cgroup__cpu__job__cpu.cfs_quota_us": 250000,
                                             "sys__fs__cgroup__cpu__job__cpu.cfs_period_us": 100000}, 3),
    ("1:cpu:/", {"sys__fs__cgroup__cpu__cpu.cfs_quota_us": -1, "sys__fs__cgroup__cpu__cpu.cfs_period_us": 100000}, 4),
], ids=str)
def test_the_tightest_quota_of_cores_counts(group, files, found, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    assert cores(limits(tmp_path, group, **files), env={}) == found


def test_a_system_without_affinity_or_groups_has_the_cores_that_it_counts(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert cores(tmp_path / "nothing", env={}) == 10 and cores(tmp_path / "nothing", env={"NPROC": "3"}) == 3


def test_xla_has_as_many_threads_as_nproc_says():
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in /proc")
    program = ("import jax, pathlib; jax.devices(); tasks = pathlib.Path('/proc/self/task').glob('*/comm');"
               "print(sum('XLAEigen' in task.read_text() for task in tasks))")
    for nproc in ("1", "3"):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "NPROC": nproc}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == nproc, done.stderr
