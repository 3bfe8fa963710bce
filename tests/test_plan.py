"""Preflight: known counts, times worked by hand, memory that behaves, a search that never returns what does not fit."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import optax
import pytest

import tiny
from lm_jax import optim, parallel, plan
from lm_jax.config import Config, ConfigError, DataConfig, MeshConfig, OptimConfig, TrainConfig
from lm_jax.devices import GIB
from lm_jax.models import flops
from lm_jax.preflight import aot, memory, roofline, search, topology, traffic
from lm_jax.preflight.forecast import Forecast
from lm_jax.preflight.wiring import Wiring
from lm_jax.recipes import pretrain

KEYS = {"fits", "params", "params_non_embedding", "params_active", "flops_per_token", "flops_per_step",
        "tokens_per_step", "bytes_per_device", "step_seconds", "bound_by", "mfu", "chip_hours", "dollars", "mesh",
        "topology", "replicated", "compiled"}


def test_a_plan_of_8b_for_programs(capsys):
    assert run("--config=configs/8b.py", "--topology=v5p-128", "--json") == 0
    p = json.loads(capsys.readouterr().out)
    assert KEYS <= p.keys() and p["fits"] is True and p["compiled"] is None
    assert p["params"] == p["params_active"] == 8_030_261_248 and p["params_non_embedding"] == 6_979_588_096
    assert p["tokens_per_step"] == 1024 * 4096 and p["mesh"]["fsdp"] == p["chips"] == 64
    assert p["flops_per_step"] == p["flops_per_token"] * p["tokens_per_step"]
    assert p["bytes_per_device"]["total"] < p["bytes_per_device"]["limit"] == int(95.74 * GIB)
    assert p["bound_by"] == "compute" and 0.5 < p["mfu"] < 0.65 and 9 < p["step_seconds"] < 14
    assert p["chip_hours"] == pytest.approx(64 * 38_000 * p["step_seconds"] / 3600)
    assert p["dollars"] == pytest.approx(4.2 * p["chip_hours"])


def test_a_plan_for_people_says_what_does_not_fit_and_what_would_help(capsys):
    """A cure that is offered cures: full remat alone would not here."""
    flags = ("--config=configs/8b.py", "--topology=v5e-64", "--config.mesh.model=16", "--config.model.remat=dots",
             "--config.train.batch=64")
    assert run(*flags) == 2
    page = capsys.readouterr().out
    assert "K (8 key heads) over model 16: replicated" in page and "8.03B, 6.98B without embeddings" in page
    assert "does not fit" in page and "a device: --config.train.microbatches=8 or --search or more chips" in page
    assert max(map(len, page.splitlines())) <= 130
    assert run(*flags, "--config.train.microbatches=8") == 0


WORD = """ENTRY %main (x: f32[250000000]) -> f32[250000000] {
  %sum = f32[250000000]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}
"""


@pytest.mark.parametrize("word, code, verdict", [
    (aot.Compiled(3 * GIB, 60.0, WORD), 0, "fits, says the compiler: 3.00 of 15.75 GiB a device"),
    (aot.Compiled(None, 60.0, refusal="Used 17.3G of 15.75G hbm"), 2, "the compiler refuses: Used 17.3G of 15.75G hbm"),
])
def test_the_compiler_has_the_last_word_and_the_only_one(word, code, verdict, monkeypatch, capsys):
    monkeypatch.setattr(aot, "compile", lambda config, topology: word)
    flags = ("--config=configs/tiny.py", "--topology=v5e-8", "--compile")
    assert run(*flags) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line[:len(verdict)] for line in lines if "fits" in line or "refuses" in line] == [verdict]
    beside = [line.split()[:6] for line in lines if line.startswith(("peak", "summed"))]
    assert [row[-2] for row in beside] == (["3.00", "1.00"] if code == 0 else [])
    assert run(*flags, "--json") == code
    record = json.loads(capsys.readouterr().out)
    assert (record["fits"], record["compiled"]) == (code == 0, word.total)


def test_what_the_numbers_do_not_say_is_said(capsys):
    run("--config=configs/tiny.py", "--topology=h100-8", "--config.optim.name=muon")
    page = capsys.readouterr().out
    assert "programs may use 75% of the card's 79.1 GiB (XLA_PYTHON_CLIENT_MEM_FRACTION)" in page
    assert "fitted to the TPU compiler" in page and "Newton-Schulz moves between devices is not counted" in page
    assert Forecast(settings(fsdp=8), topology.parse("v5e-8")).record()["remarks"] == []


def test_prices_of_ones_own(tmp_path, capsys):
    mine = tmp_path / "prices.json"
    mine.write_text('{"v5e": 0.6}')
    for more in ([], [f"--prices={mine}"]):
        run("--config=configs/tiny.py", "--topology=v5e-8", "--json", *more)
    listed, own = (json.loads(line)["dollars"] for line in capsys.readouterr().out.splitlines())
    assert own == pytest.approx(listed / 2)


@pytest.mark.parametrize("flags, message", [
    ((), "which hardware. Pass --topology="),
    (("--topology=v5q-8",), "did you mean 'v5p'"),
    (("--topology=v5p-100",), "nearest is v5p-128"),
    (("--topology=v5p:4x4",), "3 dimensions"),
    (("--topology=v5e-512",), "use slices, as in 2xv5e-256"),
    (("--topology=h100-12",), "multiple"),
    (("--topology=2xv5e-8",), "mesh.replica=2"),
    (("--topology=v5e-8", "--config.mesh.model=3"), "model=3 does not divide 8 devices: use 1, 2, 4, 8"),
    (("--topology=v5e-8", "--config.train.batch=12"), "multiple of 8"),
    (("--topology=v5e-8", "--prices=nowhere.json"), "nowhere.json.*JSON object"),
    (("--topology=h100-8", "--compile"), "only TPUs"),
])
def test_what_cannot_be_is_said_with_its_cure(flags, message):
    with pytest.raises(ConfigError, match=message):
        run("--config=configs/tiny.py", *flags)


def test_prices_that_are_none_are_an_error(tmp_path):
    bad = tmp_path / "prices.json"
    for text in ("[1]", '{"v5e": "cheap"}', '{"v9": 1}'):
        bad.write_text(text)
        with pytest.raises(ConfigError, match="wanted dollars a chip-hour of v2, "):
            run("--config=configs/tiny.py", "--topology=v5e-8", f"--prices={bad}")


def test_help_loads_no_jax():
    code = ("import atexit, sys; from lm_jax import plan; atexit.register(lambda: print('jax' in sys.modules)); "
            "plan.main(['plan', '--help'])")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--topology" in done.stdout and "--search" in done.stdout.replace("[no]", "")
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name, chips, shape, devices, jax_name", [
    ("v5e-256", 256, (16, 16), 256, "v5e:16x16"), ("v5p-128", 64, (4, 4, 4), 64, "v5p:4x4x4"),
    ("v4-32", 16, (2, 2, 4), 16, "v4:2x2x4"), ("v3-32", 16, (4, 4), 32, "v3:4x4"),
    ("tpu7x-64", 64, (4, 4, 4), 128, "tpu7x:4x4x4"), ("v5p:4x4x8", 128, (4, 4, 8), 128, "v5p:4x4x8"),
    ("4xv5e-256", 1024, (16, 16), 1024, "v5e:16x16"), ("v5p-12288", 6144, (16, 16, 24), 6144, "v5p:16x16x24"),
    ("8xh100", 8, (8,), 8, None), ("a100-40-16", 16, (16,), 16, None), ("v5litepod-16", 16, (4, 4), 16, "v5e:4x4"),
])
def test_names_of_hardware(name, chips, shape, devices, jax_name):
    t = topology.parse(name)
    assert (t.chips, t.shape, t.devices) == (chips, shape, devices)
    assert jax_name is None or t.jax_name == jax_name


def test_axes_lie_on_the_wires_of_the_torus():
    def rate(name, axes, **sizes):
        wires = Wiring(sizes, topology.parse(name))
        near, far = wires.seconds(traffic.Move("all-gather", 10**9, axes, 1, ""))
        return near and (1 - 1 / wires.near[axes[0]]) / near, far

    link = 1 / 6 * 600  # of v5p, GB/s one way
    assert rate("v5p-128", ("a",), a=64) == (pytest.approx(6 * link), 0)
    assert rate("v5p-128", ("b",), a=16, b=4) == (pytest.approx(2 * link), 0)
    assert rate("v5p-128", ("a",), a=16, b=4) == (pytest.approx(4 * link), 0)
    assert rate("v5p-128", ("b",), a=32, b=2) == (pytest.approx(1 * link), 0), "half of a ring is a line"
    assert rate("v5e-256", ("b",), a=16, b=16) == (pytest.approx(2 * 50), 0)
    assert rate("v5e-64", ("b",), a=8, b=8) == (pytest.approx(1 * 50), 0), "rings close on whole pods of v5e alone"
    assert rate("v5p-32", ("a",), a=16) == (pytest.approx(3 * link), 0), "no cube, no wires that close"
    assert rate("v5e-128", ("b",), a=8, b=16) == (pytest.approx(2 * 50), 0), "the long side is a pod's"
    assert rate("v3-2048", ("b",), a=32, b=64)[0] > rate("v3-512", ("b",), a=16, b=32)[0]
    assert rate("h100-64", ("b",), a=8, b=8) == (pytest.approx(450), 0)
    assert rate("h100-64", ("a",), a=8, b=8) == (0, pytest.approx(7 / 8 / 50))


@pytest.mark.parametrize("name, sizes, near, far", [
    ("v5p-32", dict(a=16), 10, 0), ("v5p-128", dict(a=64), 10, 0),  # milliseconds: 100 GB/s, however many dimensions
    ("v5e-256", dict(a=16, b=16), 20, 0), ("h100-8", dict(b=8), 1000 / 450, 0), ("v3-8", dict(b=4), 1000 / 41, 0),
    ("2xv3-8", dict(a=2, b=8), 0, 2 * 1000 / 3.125),
])
def test_what_is_passed_on_takes_one_wire(name, sizes, near, far):
    wires = Wiring(sizes, topology.parse(name))
    axis = next(iter(sizes))
    seconds = wires.seconds(traffic.Move("collective-permute", 10**9, (axis,), 1, ""))
    assert seconds == (pytest.approx(near / 1000), pytest.approx(far / 1000))


def test_a_step_by_hand():
    """Two layers, fsdp on a 2x4 corner of v5e: no rings, one link each way of each dimension, 50 GB/s."""
    c = settings(fsdp=8)
    f = Forecast(c, topology.parse("v5e-8"))
    layer, table, norms, tokens = 4 * 32 * 32 + 3 * 32 * 64, 64 * 32, 5 * 32, 16
    scores = 2 * 2 * 2 * 4 * 8 * 16 * 16  # both layers', of every pair: rows of 16 tokens are none for splash
    assert f.roofline.compute == pytest.approx((6 * tokens * (2 * layer + table) + 3 * scores) / (197e12 * 0.85))
    moved = 4 * (2 * 2 * layer + table) + 4 * (2 * layer + table) + 2 * 4 * (table + norms)
    assert f.roofline.links == pytest.approx(moved * 7 / 8 / 100e9 / 0.80)
    assert f.roofline.network == f.roofline.waited == 0
    assert f.roofline.seconds == max(f.roofline.compute + f.roofline.memory, f.roofline.links)


@pytest.mark.parametrize("remat, again", [("none", 0), ("dots", 0), ("full", 1)])
def test_a_fused_kernel_computes_its_scores_again(remat, again):
    """Splash multiplies twice forward, and backward three times for dq, four for dk and dv; XLA's writes scores out."""
    splash, xla = (roofline_of(settings(fsdp=8, length=256, remat=remat, attention=name), "v5e-8").compute * 197e12 * 0.85
                   for name in ("splash", "xla"))
    shown, every = (flops.scores(tiny.settings(), 256, causal=causal) for causal in (True, False))
    products = (4.5 + again) * shown, (3 + (remat != "none")) * every
    assert splash - xla == pytest.approx(products[0] - products[1])


def test_muons_iterations_and_an_average_of_weights_are_counted():
    plain, muon, ema = (Forecast(settings(fsdp=8, optim=OptimConfig(**o)), topology.parse("v5e-8"))
                        for o in ({}, dict(name="muon"), dict(ema=0.99)))
    square, long = (4 * 32 * 32 * n + 2 * 32**3 for n in (32, 64))
    products = (muon.roofline.compute - plain.roofline.compute) * 197e12 * 0.85
    assert products == pytest.approx(2 * 5 * (4 * square + 3 * long) / 8)
    size = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 64 * 32
    moved = (ema.roofline.memory - plain.roofline.memory) * 819e9 * 0.85
    assert moved == pytest.approx(size, rel=0.01), "and norms"


@pytest.mark.parametrize("broken", ["microbatches", "update"])
def test_the_whole_step_is_checked(broken, monkeypatch):
    """A layout that only the cut of a batch, or the update, has wrong."""
    if broken == "microbatches":  # of neighbouring rows, which are on one device
        monkeypatch.setattr(parallel, "split", lambda x, parts, *, axis: x.reshape(parts, -1, *x.shape[1:]))
    else:
        last = lambda u: parallel.constrain(u, "H" * (u.ndim - 1) + "B")  # divided along another dimension
        moved = optax.stateless(lambda updates, params: jax.tree.map(last, updates))
        monkeypatch.setitem(optim.DIRECTIONS, "adamw", lambda o, kinds: moved)
    c = settings(fsdp=8, batch=16)
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, microbatches=2))
    f = Forecast(c, topology.parse("v5e-8"))
    assert memory.estimate(c, f.mesh)["total"] > 0
    with pytest.raises(Exception, match="shard"):
        f.bytes


def test_what_several_devices_do_alike_costs_all_of_them():
    one, same = (roofline_of(c, "v5e-8").compute for c in (settings(fsdp=8), settings(fsdp=8, heads=4)))
    assert one == same
    odd = settings(fsdp=4, model=2, heads=1, head_size=32)
    assert roofline_of(odd, "v5e-8").compute > 1.2 * one and Forecast(odd, topology.parse("v5e-8")).replicated


def test_more_chips_never_hold_more_and_remat_never_keeps_more():
    by_chips = [Forecast(settings(batch=64), topology.parse(name)).bytes["total"] for name in ("v5e-8", "v5e-32")]
    assert by_chips[0] > by_chips[1]
    by_remat = [Forecast(settings(batch=64, remat=remat), topology.parse("v5e-8")).bytes["activations"]
                for remat in ("full", "dots", "none")]
    assert by_remat == sorted(by_remat) and by_remat[0] < by_remat[2]


def test_a_search_returns_what_fits_and_is_no_slower_than_the_config():
    c, t = settings(batch=64, length=128, remat="none"), topology.parse("v5e-8")
    whole = Forecast(c, t)
    assert search.search(c, t, best=1)[0].roofline.seconds <= whole.roofline.seconds
    small = dataclasses.replace(t, device=dataclasses.replace(t.device, memory=0.7 * whole.bytes["total"]))
    best = search.search(c, small, best=2)
    assert all(f.fits for f in best) and not Forecast(c, small).fits
    assert best[0].roofline.seconds <= best[1].roofline.seconds
    assert "--config." in search.flags(best[0], c) and search.flags(whole, c) == ""
    none = dataclasses.replace(t, device=dataclasses.replace(t.device, memory=1000))
    with pytest.raises(ConfigError, match="nothing that was tried fits .* are too large for certain, 0 of the others"):
        search.search(c, none)


def test_a_search_whose_fastest_do_not_fit_goes_on_from_the_smallest(monkeypatch):
    c, t = settings(batch=64, length=128), topology.parse("v5e-8")
    cuts = [dataclasses.replace(c, train=TrainConfig(batch=64, microbatches=n)) for n in (1, 2, 4, 8)]
    monkeypatch.setattr(search, "candidates", lambda c, t: (Forecast(cut, t) for cut in cuts))
    monkeypatch.setattr(search, "ASKED", 1)
    every = sorted(search.candidates(c, t), key=search.at_least)
    tight = dataclasses.replace(t, device=dataclasses.replace(t.device, memory=every[0].bytes["total"]))
    fastest = min((f for f in every if search.at_least(f) <= tight.device.memory), key=lambda f: f.roofline.seconds)
    assert fastest.bytes["total"] > tight.device.memory, "or there is nothing to go on from"
    assert [f.fits for f in search.search(c, tight)] == [True]
    less = dataclasses.replace(t, device=dataclasses.replace(t.device, memory=0.9 * every[0].bytes["total"]))
    with pytest.raises(ConfigError, match="of 4 ways .* of the others were tried"):
        search.search(c, less)


def test_chips_that_no_power_of_two_is_want_rows_to_match():
    with pytest.raises(ConfigError, match="batch=64 divides on no mesh of 192 .* a multiple of 3, or another number"):
        search.search(settings(batch=64), topology.parse("v5p:4x4x12"))


def test_the_numbers_of_the_run_are_not_searched():
    c = settings(batch=64)
    for f in search.candidates(c, topology.parse("v5e-8")):
        model = dataclasses.replace(f.config.model, remat="none")
        train = dataclasses.replace(f.config.train, microbatches=1)
        assert dataclasses.replace(f.config, model=model, train=train, mesh=c.mesh) == c
        assert math.prod(f.mesh.shape.values()) == 8


def test_a_vocabulary_is_known_before_any_text_is_read():
    base = Config(data=DataConfig(vocab=5000))
    assert pretrain.planned(base).model.vocab == 5000
    assert pretrain.planned(dataclasses.replace(base, data=DataConfig(tokenizer="byte"))).model.vocab > 256
    with pytest.raises(ConfigError, match="set model.vocab"):
        pretrain.planned(dataclasses.replace(base, data=DataConfig(tokenizer="nowhere.model")))


def run(*flags: str) -> int:
    return plan.main(["plan", *flags])


def settings(*, batch: int = 8, length: int = 16, mesh: dict | None = None, **changes) -> Config:
    sizes = {axis: changes.pop(axis) for axis in parallel.AXES if axis in changes}
    return Config(optim=changes.pop("optim", OptimConfig()), model=tiny.settings(**changes), mesh=MeshConfig(**sizes),
                  data=DataConfig(length=length), train=TrainConfig(batch=batch))


def roofline_of(c: Config, name: str) -> roofline.Roofline:
    return Forecast(c, topology.parse(name)).roofline
