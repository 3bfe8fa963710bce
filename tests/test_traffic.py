"""What a step moves, by formula, is what the compiled program moves; and it never brings whole logits together."""

import functools
import math

import jax
import pytest

import tiny
from lm_jax import losses, parallel
from lm_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from lm_jax.models import flops
from lm_jax.preflight import hlo, program, traffic

T, V = 16, 4 * 67  # a vocabulary that no other size is a multiple of
LAYOUTS = 512  # bytes: positions and segments that go round with the keys
SCALARS = 800  # bytes: losses, norms of gradients and counts, each a number or two; under 1 % of any case
GATES = 2 * 3 * 256  # of experts, which are summed over the model's axis: left out of the formula, being so small

# name -> family, mesh, changes of the model, microbatches
CASES = {
    "fsdp 8": ("decoder", dict(fsdp=8), dict(remat="full"), 1),
    "fsdp 2, model 4": ("decoder", dict(fsdp=2, model=4), dict(remat="full", vocab=V), 1),
    "fsdp 2, sequence 4": ("decoder", dict(fsdp=2, sequence=4), dict(remat="dots"), 1),
    "fsdp 2, sequence 4, ring": ("decoder", dict(fsdp=2, sequence=4), dict(remat="dots", attention="ring"), 1),
    "replica 2, fsdp 2, model 2": ("decoder", dict(replica=2, fsdp=2, model=2), {}, 1),
    "data 2, fsdp 2, model 2": ("decoder", dict(data=2, fsdp=2, model=2), dict(tied=False), 2),
    "fsdp 2, expert 2, model 2": ("experts", dict(fsdp=2, expert=2, model=2), {}, 1),
    "encoder, fsdp 4, model 2": ("encoder", dict(fsdp=4, model=2), {}, 1),
    "both, fsdp 2, sequence 2, model 2": ("encoder_decoder", dict(fsdp=2, sequence=2, model=2), {}, 1),
}


@pytest.fixture(autouse=True)
def scanned(monkeypatch):
    """Keep the scan over layers, as accelerators do: a third of the time to compile."""
    monkeypatch.setattr(parallel, "on_cpu", lambda: False)


@pytest.mark.parametrize("name", CASES)
def test_the_formula_says_what_the_compiled_program_moves(name):
    """Gathers are equal to the byte and sums up to scalars. A CPU sums whole what others scatter as they sum it, but for
    the output table; and it gathers what lies outside the layers once for all microbatches."""
    c = case(name)
    moved, said = hlo.totals(text(name)), traffic.totals(traffic.step(c, abstract(c)))
    tables = 4 * 2 * 64 * 32 // 2 if c.train.microbatches > 1 else 0
    assert said.get("all-gather", 0) - moved.get("all-gather", 0) in (0, tables)
    sums = summed(moved) - summed(said)
    assert 0 <= sums <= SCALARS + (GATES if c.model.moe.experts else 0)
    passed = moved.get("collective-permute", 0) - said.get("collective-permute", 0)
    assert passed == (LAYOUTS if c.model.attention == "ring" else 0)


def summed(totals: dict[str, int]) -> int:
    return totals["all-reduce"] + totals.get("reduce-scatter", 0)


def test_fsdp_by_hand():
    """Two layers of 4 D^2 + 3 D F numbers and a table that is looked up and read backwards, four bytes each."""
    c = settings("decoder", dict(fsdp=8))
    layer, table, norms = 4 * 32 * 32 + 3 * 32 * 64, 64 * 32, 5 * 32
    assert traffic.totals(traffic.step(c, abstract(c))) == {
        "all-gather": 4 * (2 * 2 * layer + table), "reduce-scatter": 4 * (2 * layer + table),
        "all-reduce": 4 * (table + norms)}


def test_tensor_parallel_by_hand():
    """A layer sums x_BTD after attention and after the MLP, and dx before each; a CPU sums q, k, v, up, gate apart."""
    c = settings("decoder", dict(data=2, fsdp=1, model=4))
    x = 4 * (8 // 2) * T * 32
    activations = {kind: traffic.totals(traffic.step(c, mesh), "what")["activations"] // x
                   for kind, mesh in (("cpu", abstract(c)), ("tpu", abstract(c, "tpu")))}
    assert activations == {"cpu": 2 * (2 + 5) + 2, "tpu": 2 * (2 + 2) + 2}, "and the lookup, and dx of the logits"


def test_fsdp_holds_an_nth_of_weights_and_of_optimizer_state():
    c = case("fsdp 8")
    step = program.abstract(c, parallel.make_mesh(c.mesh))
    whole = [x for x in jax.tree.leaves((step.state.model, step.state.opt)) if x.ndim > 1]
    held = [math.prod(x.sharding.shard_shape(x.shape)) for x in whole]
    matrices = sum(w.size for w in flops.weights(c.model) if w.kind.role != "vector")
    vectors = sum(w.size for w in flops.weights(c.model) if w.kind.role == "vector")
    assert 8 * sum(held) - sum(x.size for x in whole) <= 7 * 3 * vectors and sum(held) >= 3 * matrices // 8
    arguments = program_of("fsdp 8").memory_analysis().argument_size_in_bytes  # of one device
    batch = sum(x.size * 4 for x in jax.tree.leaves(step.batch)) // 8
    assert 0 <= arguments - 4 * (3 * matrices // 8 + 3 * vectors) - batch <= 2048, "the rest: 128 losses, counts, a key"


def test_no_logits_of_the_whole_vocabulary_are_ever_made():
    """With the vocabulary divided nothing but a list of its ids has all of it, the table neither."""
    shapes = hlo.buffers(text("fsdp 2, model 4"))
    assert (4, T, V // 4) in shapes and not [shape for shape in shapes if V in shape and len(shape) > 1]


@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(data=2, fsdp=2, model=2)], ids=str)
def test_parts_of_the_logits_move_the_table_once(mesh, monkeypatch):
    """No logits of a whole row are held; the table is gathered and its gradient scattered once, not for each part."""
    c = settings("decoder", mesh, vocab=V, tied=False)
    shards = mesh.get("model", 1)
    rows = 8 * shards // math.prod(mesh.values())
    monkeypatch.setattr(losses, "CHUNK", rows * T * V // shards // 2)
    text = compiled(c).as_text()
    assert (rows, T // 2, V // shards) in hlo.buffers(text) and (rows, T, V // shards) not in hlo.buffers(text)
    said, moved = traffic.totals(traffic.step(c, abstract(c))), hlo.totals(text)
    assert moved["all-gather"] == said["all-gather"]
    assert 0 <= summed(moved) - summed(said) <= SCALARS


def test_what_the_tpu_compiler_writes_is_read():
    """Parts of one collective in several fusions, a scattered sum, a loop without a count of trips."""
    assert hlo.totals(TPU) == {"all-gather": 3 * 2 * 512 * 8, "reduce-scatter": 4 * 64, "all-reduce": 4 * 10}
    with pytest.raises(ValueError, match="trips nobody knows"):
        hlo.totals(TPU.replace("direction=LT", "direction=NE"))
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.totals("module")


@pytest.mark.parametrize("branches", ["branch_computations={%small, %large}",
                                      "true_computation=%large, false_computation=%small"])
def test_of_branches_the_dearest_counts(branches):
    """A step takes one: what it may move at most."""
    branch = """%{} (p: f32[{}]) -> f32[{}] {{
      %sum = f32[{}]{{0}} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
    }}
    """
    program = f"""ENTRY %main (x: f32[8]) -> f32[8] {{
      %one = f32[8] conditional(%i, %x, %x), {branches}, metadata={{op_name="cond"}}
    }}
    """
    text = "\n".join([branch.format("small", *[10] * 3), branch.format("large", *[20] * 3), program])
    assert hlo.totals("\n".join(map(str.strip, text.splitlines()))) == {"all-reduce": 4 * 20}


TPU = """HloModule jit_step

%all-reduce-scatter.1 (input: f32[64]) -> f32[8] {
  %input = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0:T(128)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%part.1 (p: bf16[64,8]) -> bf16[512,8] {
  %all-gather.1 = bf16[512,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=mesh['a'=8,'b'=1] {'a'}, \
frontend_attributes={chain_id="3"}
}

%part.2 (p: bf16[64,8]) -> bf16[512,8] {
  %all-gather.2 = bf16[512,8]{1,0} all-gather(%p), replica_groups=mesh['a'=8,'b'=1] {'a'}, \
frontend_attributes={chain_id="3"}
}

%cond (c: (s32[])) -> pred[] {
  %three = s32[]{:T(128)} constant(3), metadata={op_name="lt"}
  ROOT %lt = pred[] compare(%i, %three), direction=LT
}

%body (c: (s32[])) -> (s32[]) {
  %f = bf16[512,8]{1,0} fusion(%x), kind=kCustom, calls=%part.1
  %g = bf16[512,8]{1,0} fusion(%f), kind=kCustom, calls=%part.2
}

ENTRY %main (x: f32[64]) -> f32[8] {
  %loop = (s32[]) while(%init), condition=%cond, body=%body
  %s = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %start = f32[10]{0} all-reduce-start(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %done = f32[10]{0} all-reduce-done(%start)
  %alone = f32[10]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
}
"""


def settings(family: str, mesh: dict, *, microbatches: int = 1, **changes) -> Config:
    objectives = {"encoder": "masked_pairs", "encoder_decoder": "span"}
    data = DataConfig(length=T, objective=objectives.get(family, "causal"), noise=0.25)
    return Config(model=tiny.settings(family, **changes), data=data, mesh=MeshConfig(**mesh),
                  train=TrainConfig(batch=8 * microbatches, microbatches=microbatches))


def abstract(c: Config, platform: str = "cpu"):
    return parallel.abstract_mesh(c.mesh, 8, platform=platform)


def case(name: str) -> Config:
    family, mesh, changes, microbatches = CASES[name]
    return settings(family, mesh, microbatches=microbatches, **changes)


@functools.cache
def program_of(name: str):
    return compiled(case(name))


@functools.cache
def text(name: str) -> str:
    return program_of(name).as_text()


def compiled(c: Config):
    mesh = parallel.make_mesh(c.mesh)
    step = program.abstract(c, mesh)
    with jax.sharding.set_mesh(mesh):
        return jax.jit(step.step, donate_argnums=0).lower(step.state, step.batch, step.key).compile(tiny.QUICK)
