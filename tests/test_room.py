"""A run that has no room is told so before it is compiled, with what would give it room; one that has goes on."""

import dataclasses
import pathlib
import re
import resource
import subprocess
import sys

import jax
import pytest

import tiny
from lm_jax import devices, parallel, plan
from lm_jax.config import Config, ConfigError, DataConfig, MeshConfig, TrainConfig
from lm_jax.devices import GIB, host_memory
from lm_jax.preflight import memory, room, topology
from lm_jax.preflight.cures import cures, fewest_devices
from lm_jax.preflight.forecast import Forecast

ROOT = pathlib.Path(__file__).parent.parent


def limits(root: pathlib.Path, group: str, **files: int | str) -> pathlib.Path:
    """A folder that stands for /: the control group of this process, and limits of groups ("__" is a folder)."""
    texts = {"proc/self/cgroup": group} | {name.replace("__", "/"): str(limit) for name, limit in files.items()}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def settings(batch: int, **changes) -> Config:
    return Config(model=tiny.settings(**changes.pop("model", {})), data=DataConfig(length=64, vocab=64),
                  train=TrainConfig(batch=batch, **changes.pop("train", {})), mesh=MeshConfig(**changes))


@pytest.mark.parametrize("group, files, found", [
    ("0::/", {}, None), ("0::/", {"sys__fs__cgroup__memory.max": "max"}, None),
    ("0::/", {"sys__fs__cgroup__memory.max": 3 * 2**20}, 3 * 2**20),
    ("0::/user/job", {"sys__fs__cgroup__user__memory.max": 5 * 2**20, "sys__fs__cgroup__user__job__memory.max": "max"},
     5 * 2**20),
    ("0::/of/the/host", {"sys__fs__cgroup__memory.max": 7 * 2**20}, 7 * 2**20),  # as a container sees its own
    ("4:memory:/job\n0::/", {"sys__fs__cgroup__memory__job__memory.limit_in_bytes": 9 * 2**20}, 9 * 2**20),
], ids=str)
def test_the_tightest_limit_of_a_host_counts(group, files, found, tmp_path):
    everything = host_memory(tmp_path / "nothing")
    assert everything > GIB / 4
    assert host_memory(limits(tmp_path, group, **files)) == (found or everything)


def test_a_limit_of_the_shell_counts_and_a_run_beyond_it_is_refused_before_it_begins(tmp_path):
    """A real process under a real limit: bytes by part, three cures, code 2, and no folder was claimed."""
    flags = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", f"--config.data.root={tmp_path / 'data'}",
             "--config.train.batch=4096", "--config.data.tokenizer=byte"]
    done = subprocess.run([sys.executable, "-m", "lm_jax.train", *flags], capture_output=True, text=True, cwd=ROOT,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (64 * GIB, 64 * GIB)))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    memory = min(64 * GIB, host_memory())
    assert f"has {memory / 8 / GIB:.2f} (this host's {memory / GIB:.2f} for 8 devices)" in done.stderr
    assert re.search(r"weights \d.*optimizer \d.*gradients \d.*activations \d.*workspace \d", done.stderr)
    assert len(re.findall(r"^  ", done.stderr, re.M)) == 3 and "--config.train.microbatches=" in done.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


def test_every_cure_that_is_named_cures(tmp_path, monkeypatch):
    c = settings(512, data=8, fsdp=1)
    with jax.sharding.set_mesh(parallel.make_mesh(c.mesh)):
        need = Forecast(c, room.present()).bytes["total"]
        group = limits(tmp_path, "0::/", **{"sys__fs__cgroup__memory.max": int(8 * need / 1.3)})
        monkeypatch.setattr(devices, "host_memory", lambda: host_memory(group))
        with pytest.raises(ConfigError, match="it would fit with any of") as error:
            room.refuse(c)
        flags = re.findall(r"--config\.(\w+)\.(\w+)=(\S+)", str(error.value))
        assert len(flags) >= 2
        for section, key, value in flags:
            old, kind = getattr(c, section), type(getattr(getattr(c, section), key))
            cured = dataclasses.replace(c, **{section: dataclasses.replace(old, **{key: kind(value)})})
            assert Forecast(cured, room.present()).fits, (section, key, value)
            room.refuse(cured)


def test_what_is_a_little_too_large_by_the_estimate_is_let_through(tmp_path, monkeypatch):
    c = settings(64)
    with jax.sharding.set_mesh(parallel.make_mesh(c.mesh)):
        need = Forecast(c, room.present()).bytes["total"]
        for share, refused in ((1.02 / room.MARGIN, False), (0.97 / room.MARGIN, True)):
            group = limits(tmp_path, "0::/", **{"sys__fs__cgroup__memory.max": int(8 * need * share)})
            monkeypatch.setattr(devices, "host_memory", lambda: host_memory(group))
            if refused:
                with pytest.raises(ConfigError):
                    room.refuse(c)
            else:
                room.refuse(c)


def test_what_nothing_cures_is_told_how_many_devices_would():
    wide = settings(8, model=dict(width=512, depth=8, hidden=2048))
    hardware = topology.parse("h100-1")
    small = dataclasses.replace(hardware, device=dataclasses.replace(hardware.device, memory=2**26))
    assert cures(Forecast(wide, small)) == []
    assert fewest_devices(Forecast(wide, small)) > 5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_rough_count_that_spares_a_trace_is_no_less_than_an_eighth(family):
    """Else a run that does not fit would be let through unseen."""
    c = Config(model=tiny.settings(family, max_length=128), data=DataConfig(length=128, objective={
        "encoder": "masked_pairs", "encoder_decoder": "span"}.get(family, "causal")), train=TrainConfig(batch=64))
    f = Forecast(c, topology.parse("h100-1"))
    assert memory.estimate(c, f.mesh)["total"] <= room.SURE * room._roughly(f)


def test_8b_on_four_small_chips_is_refused_with_what_it_needs_what_there_is_and_a_hint(capsys):
    assert plan.main(["plan", f"--config={ROOT}/configs/8b.py", "--topology=v5e-4"]) == 2
    last = capsys.readouterr().out.strip().splitlines()[-1]
    need, have = map(float, re.search(r"does not fit: ([\d.]+) of ([\d.]+) GiB a device", last).groups())
    assert need > 1.5 * have > 15 and last.endswith("--search or more chips")
