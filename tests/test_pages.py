"""A program that trains on a CPU begins again with memory pages that are large and kept, unless its user says."""

import os
import subprocess
import sys

import pytest

from lm_jax import pages

OF_TRAIN = """
import os, runpy, sys
sys.argv = ["train", "--help"]
try:
    runpy.run_module("lm_jax.train", run_name="__main__")
finally:
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES", ""))
"""
SETTLED = """
import os
from lm_jax import pages
pages.settle()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES", ""))
"""


def tunables(program: str, **env) -> str:
    """What a program ends under; it is the process that was begun."""
    kept = {key: value for key, value in os.environ.items() if key not in (pages.TUNABLES, "JAX_PLATFORMS")}
    process = subprocess.Popen([sys.executable, "-c", program], env=kept | env, stdout=subprocess.PIPE, text=True)
    pid, _, found = process.communicate(timeout=120)[0].splitlines()[-1].partition(" ")
    assert int(pid) == process.pid
    return found


@pytest.mark.skipif(pages.platform.libc_ver()[0] != "glibc", reason="tunables are glibc's")
def test_train_begins_again_with_large_pages_as_the_same_process():
    assert tunables(OF_TRAIN, JAX_PLATFORMS="cpu") == pages.HUGE
    assert tunables(OF_TRAIN, GLIBC_TUNABLES="glibc.malloc.check=0") == "glibc.malloc.check=0", "the user's own stay"


@pytest.mark.skipif(pages.platform.libc_ver()[0] != "glibc", reason="tunables are glibc's")
def test_where_arrays_are_an_accelerators_malloc_stays_as_it_is():
    assert tunables(SETTLED, CUDA_VISIBLE_DEVICES="3") == ""
    assert tunables(SETTLED, TPU_VISIBLE_CHIPS="0") == ""
    assert tunables(SETTLED, CUDA_VISIBLE_DEVICES="3", JAX_PLATFORMS="cpu") == pages.HUGE


def test_pages_keep_the_users_other_tunables(monkeypatch):
    monkeypatch.setenv(pages.TUNABLES, f"glibc.malloc.check=1:{pages.HUGE}")
    assert pages.environment("plain")[pages.TUNABLES] == "glibc.malloc.check=1"
    assert pages.in_use() == "huge"
