"""Folders of published families for tests: tests/golden has what `transformers` gave for each."""

import json
import pathlib
import zlib

import numpy as np

from lm_jax.hub import folder, tensors

HERE = pathlib.Path(__file__).parent / "golden"
TOKENS = np.random.default_rng(0).integers(3, 99, 30).tolist()
PROMPT = 12  # of them, from which a model goes on
SHOWN = (0, 17, 29)  # tokens whose outputs are kept


def numbers(name: str, shape: list[int]) -> np.ndarray:
    """The tensor of this name: scales near 1, other vectors near 0, weights that keep the size of what they meet."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return drawn / np.float32(shape[-1]) ** np.float32(0.5)
    return drawn * np.float32(0.1) + np.float32(name.endswith("weight"))


def checkpoint(golden: dict, place: pathlib.Path) -> pathlib.Path:
    """The folder that a golden file was made from."""
    entries = {name: (np.dtype(np.float32), tuple(shape)) for name, shape in golden["tensors"].items()}
    arrays = (numbers(name, shape) for name, shape in golden["tensors"].items())
    tensors.write(place / "model.safetensors", entries, arrays)
    (place / "config.json").write_text(json.dumps(golden["config"]))
    return place


def close(ours, expected, tolerance: float = 1e-4):
    """Equal to a share of the largest number."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


def same_tensors(a: pathlib.Path, b: pathlib.Path):
    """The same names, types, shapes and bytes."""
    a, b = folder.read(a), folder.read(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].rows().tobytes() == b[name].rows().tobytes(), name


GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))}
