"""What every test starts from: eight CPU devices and a cache of compiled programs, set before JAX is imported.

Subprocesses inherit both. The cache makes a second run of the suite much faster; its folder may be deleted at will.
"""

import gc
import os
import pathlib
import sys
import tempfile

import numpy as np
import pytest


def _cache() -> str:
    """The first folder of the user's that can be written."""
    parents = [os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache"), tempfile.gettempdir()]
    for parent in filter(None, parents):
        folder = pathlib.Path(parent, "lm_jax", "xla")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return str(folder)
    raise RuntimeError(f"no place for the compilation cache in any of {parents}: set JAX_COMPILATION_CACHE_DIR")


os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tests compile much and compute little: 2.5 times faster
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")  # below, reading is no faster than compiling


@pytest.fixture
def rng() -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> a folder of the family's tiny model in tests/golden, as transformers would save it."""
    from checkpoints import GOLDEN, checkpoint

    made = {}

    def get(name):
        if name not in made:
            made[name] = checkpoint(GOLDEN[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A process may map so much memory in 65,530 pieces, of which each compiled program takes some: the suite's are
    let go of file by file, or the compiler aborts in the middle of it."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()
