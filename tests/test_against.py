"""Both sides of a comparison do the same work: the same parameters, losses and training steps."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from lm_jax import update
from lm_jax.measure import against_torch, against_transformers, torch_reference
from lm_jax.measure.torch_reference import Case
from lm_jax.models import flops, transformer

TINY = Case("tiny", depth=2, width=32, heads=4, vocab=96, length=16, batch=3)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def drawn():
    """A model whose biases and scales are drawn too: no parameter is where the other side would have it by chance."""
    rng = np.random.default_rng(0)
    model = transformer.make(TINY.config("float32"), seed=0)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), model)


@pytest.mark.parametrize("case", [TINY, *against_torch.CASES.values()], ids=lambda case: case.name)
def test_both_sides_have_as_many_parameters(torch, case):
    with torch.device("meta"):
        theirs = sum(p.numel() for p in torch_reference.model(case).parameters())
    assert theirs == flops.parameters(case.config("float32"))["total"]


def test_case_a_has_ten_million_parameters_and_case_b_is_gpt2_small():
    count = {key: flops.parameters(case.config("float32")) for key, case in against_torch.CASES.items()}
    assert 10e6 < count["a"]["non_embedding"] < 11e6 and count["b"]["non_embedding"] == 85_056_000


def test_steps_on_the_same_weights_have_the_same_losses(torch, drawn):
    ours = against_torch.ours(TINY, "float32", drawn)
    theirs = torch_reference.step(TINY, dtype="float32", compiled=False, device="cpu",
                                  params=jax.device_get(update.parameters(drawn)))
    losses = np.array([[ours(), theirs()] for _ in range(5)])  # the fifth follows four updates
    np.testing.assert_allclose(*losses.T, rtol=1e-4)
    assert losses[-1, 0] < losses[0, 0]


def test_bfloat16_is_the_same_work_to_its_rounding(torch, drawn):
    ours = against_torch.ours(TINY, "bfloat16", transformer.make(TINY.config("bfloat16"), seed=0))
    params = jax.device_get(update.parameters(transformer.make(TINY.config("bfloat16"), seed=0)))
    theirs = torch_reference.step(TINY, dtype="bfloat16", compiled=False, device="cpu", params=params)
    np.testing.assert_allclose(ours(), theirs(), rtol=5e-3)


def test_a_comparison_gives_each_side_and_their_ratio(torch):
    said = []
    found = against_torch.measured(TINY, "float32", turns=1, sides=("lm_jax", "torch eager"), say=said.append)
    assert [line.split(",")[0].split(":")[0] for line in said] == ["first step", "first step", "turn 1 of 1"]
    by_name = {figure.name: figure for figure in found}
    ratio = by_name["lm_jax is as fast as torch eager, times"]
    assert ratio.unit == "x" and ratio.low == ratio.value == ratio.high and ratio.times == 1
    assert all(by_name[side].unit == "tokens/s" and by_name[side].value > 0 for side in ("lm_jax", "torch eager"))


def test_a_side_ends_whoever_still_holds_its_pipes():
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    program = f"""
import subprocess, sys
print(*(subprocess.Popen({sleeper}, start_new_session=apart).pid for apart in (True, False)), flush=True)
sys.stdin.read()"""
    side = subprocess.Popen([sys.executable, "-c", program], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            start_new_session=True)
    left, forked = map(int, side.stdout.readline().split())
    try:
        print("a line that nobody reads", file=side.stdin)
        against_torch.end(side)
        assert side.returncode == -signal.SIGKILL and side.stdin.closed and side.stdout.closed
        os.kill(left, 0)  # it holds both pipes, and was not waited for
        assert any(not alive(forked) for _ in range(100)), "nothing of the side's own goes on"
    finally:
        os.kill(left, signal.SIGKILL)


def alive(process: int) -> bool:
    """Whether a process runs; one that was killed may not have been waited for yet."""
    told = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return bool(told) and not told.startswith("Z")


def test_without_pytorch_there_is_a_word_about_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)  # as if it were not installed
    with pytest.raises(torch_reference.ConfigError, match=r"needs torch.*\.\[bench\]"):
        against_torch.measured(TINY, "float32")


def test_generation_writes_the_same_tokens_on_both_sides(torch):
    pytest.importorskip("transformers")
    shape = dict(depth=2, width=32, heads=4, hidden=128, vocab=96, max_length=32)
    found = against_transformers.generation(2, "float32", turns=1, prompt=5, new=7, **shape)
    by_name = {figure.name: figure for figure in found}
    assert by_name["tokens that both wrote"].value == 100 and by_name["transformers"].unit == "tokens/s"
    assert by_name["lm_jax is as fast, times"].times == 1


def test_classification_scores_a_sentence_the_same_on_both_sides(torch):
    pytest.importorskip("transformers")
    found = against_transformers.classification(turns=1, dim=32, hidden_dim=64, n_layers=1, n_heads=4, vocab_size=64)
    assert found[-1].value < 1e-5 and [f.name for f in found[:2]] == ["lm_jax", "transformers"]
