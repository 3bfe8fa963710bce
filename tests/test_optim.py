"""Optimizers against formulas written out in float64, and the promises of the guard around them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax import optim, parallel
from lm_jax.config import CHOICES, ConfigError, MeshConfig, OptimConfig
from lm_jax.models.layers import Kind

KINDS = {
    "attention": {"query": Kind("LDNH", "D", "matrix"), "out": Kind("LNHD", "NH", "matrix")},
    "embedding": Kind("VD", "", "embedding"),
    "experts": Kind("LEDF", "D", "matrix"),
    "head": Kind("DV", "D", "head"),
    "norm": Kind("LD", "", "vector"),
}
SIZES = dict(L=2, D=6, N=2, H=4, V=5, E=2, F=3)
FLAT = dict(lr=0.1, schedule="constant", warmup=0, clip=0.0)  # a plain rate, so that formulas stay short


def test_the_schedules_meet_their_corners():
    o = OptimConfig(lr=2.0, warmup=10, floor=0.1, decay=0.25)
    rates = {name: [float(optim.schedule(dataclasses.replace(o, schedule=name), 50)(i)) for i in range(50)]
             for name in optim.SCHEDULES}
    for name, rate in rates.items():
        np.testing.assert_allclose(rate[:10], np.linspace(0.2, 2.0, 10), rtol=1e-6, err_msg=name)
    for name in ("cosine", "wsd", "linear"):
        np.testing.assert_allclose(rates[name][-1], 0.2, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(rates["linear"][29], 2.0 * (1 - 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(rates["cosine"][29], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(rates["wsd"][9:40], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates["wsd"][44], 2.0 * (1 - 0.9 * 0.5**0.5), rtol=1e-5)
    np.testing.assert_allclose(rates["rsqrt"][39], 2.0 * (10 / 40) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(rates["constant"][9:], 2.0, rtol=1e-6)


def test_every_choice_of_the_config_exists():
    assert set(optim.SCHEDULES) == set(CHOICES["optim.schedule"])
    assert set(optim.DIRECTIONS) == set(optim.TRANSFER) == set(CHOICES["optim.name"])


def test_adamw_is_its_formula_and_spares_norms_biases_and_embeddings():
    o = OptimConfig(**FLAT, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3)
    weights, gradients = _weights(), [_weights(seed) for seed in (1, 2, 3)]

    def formula(kind, w, *gs):
        m, v = np.zeros_like(w), np.zeros_like(w)
        for t, g in enumerate(gs, 1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            direction = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            w = w - 0.1 * (direction + (0.3 * w if kind.role in ("matrix", "head") else 0))
        return w

    _close(_trained(o, weights, gradients), _each(formula, KINDS, weights, *gradients))


def test_lion_is_its_formula():
    o = OptimConfig(**FLAT, name="lion", weight_decay=0.3, betas=(0.8, 0.9))
    weights, gradients = _weights(), [_weights(seed) for seed in (1, 2, 3)]

    def formula(kind, w, *gs):
        m = np.zeros_like(w)
        for g in gs:
            w = w - 0.1 * (np.sign(0.8 * m + 0.2 * g) + (0.3 * w if kind.role in ("matrix", "head") else 0))
            m = 0.9 * m + 0.1 * g
        return w

    _close(_trained(o, weights, gradients), _each(formula, KINDS, weights, *gradients))


def test_adafactor_is_its_formula_matrix_by_matrix():
    o = OptimConfig(**FLAT, name="adafactor", weight_decay=0.0)
    weights, gradients = _weights(), [_weights(seed) for seed in (1, 2, 3)]

    def formula(kind, w, *gs):
        return _by_matrix(kind, matrix if kind.role != "vector" else vector, w, *gs)

    def matrix(w, *gs):
        row, col = np.zeros(w.shape[0]), np.zeros(w.shape[1])
        for t, g in enumerate(gs, 1):
            b = 1 - t**-0.8
            row, col = b * row + (1 - b) * (g**2).mean(1), b * col + (1 - b) * (g**2).mean(0)
            w = w - 0.1 * scaled(g / np.sqrt(np.outer(row, col) / row.mean()), w)
        return w

    def vector(w, *gs):
        v = np.zeros_like(w)
        for t, g in enumerate(gs, 1):
            v = (1 - t**-0.8) * v + t**-0.8 * g**2
            w = w - 0.1 * scaled(g / np.sqrt(v), w)
        return w

    def scaled(u, w):
        return u / max(1, np.sqrt((u**2).mean())) * max(1e-3, np.sqrt((w**2).mean()))

    _close(_trained(o, weights, gradients), _each(formula, KINDS, weights, *gradients), rtol=1e-4)


def test_adafactor_keeps_a_row_and_a_column_for_a_matrix():
    state = _make(OptimConfig(name="adafactor")).init(_weights())
    sizes = {x.size for x in jax.tree.leaves(state.inner)} & {2 * 6 * 2 * 4, 2 * 2 * 6 * 3}
    assert not sizes, f"second moments as large as a matrix: {sizes}"


def test_muon_is_its_formula_matrix_by_matrix_and_adam_elsewhere():
    o = OptimConfig(**FLAT, name="muon", weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3)
    weights, gradients = _weights(), [_weights(seed) for seed in (1, 2, 3)]

    def formula(kind, w, *gs):
        return _by_matrix(kind, matrix, w, *gs)

    def matrix(w, *gs):
        m = np.zeros_like(w)
        for t, g in enumerate(gs, 1):
            m = 0.95 * m + 0.05 * g
            nesterov = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
            w = w - 0.1 * (0.2 * max(w.shape) ** 0.5 * newton_schulz(nesterov) + 0.3 * w)
        return w

    def newton_schulz(x):
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x

    moved, adam = _trained(o, weights, gradients), _trained(dataclasses.replace(o, name="adamw"), weights, gradients)
    expected = _each(lambda k, w, a, *gs: formula(k, w, *gs) if k.role == "matrix" else a,
                     KINDS, weights, adam, *gradients)
    _close(moved, expected, rtol=2e-4)


def test_mup_ratios_act_as_the_papers_table_says():
    weights, grads = _weights(), _weights(1)
    small = lambda c: jax.tree.map(lambda g: g * c, grads)  # gradients shrink with width and depth, and so must eps

    o = OptimConfig(**FLAT, weight_decay=0.0, eps=0.5)
    base, scaled = _trained(o, weights, [grads]), _trained(o, weights, [small(1 / 8)], width=4.0, depth=2.0)
    ratio = _each(lambda k, w, b, s: ((s - w) / (b - w)).mean(), KINDS, weights, base, scaled)
    _close(ratio, _each(lambda k: 1 / 4 if k.role == "matrix" else 1.0, KINDS), rtol=1e-4)

    decay = OptimConfig(**FLAT, weight_decay=0.5)  # rate / m_N times decay * m_N: what is decayed in a step stays
    for name in optim.DIRECTIONS:
        none = jax.tree.map(np.zeros_like, grads)
        _close(_trained(dataclasses.replace(decay, name=name), weights, [none], width=4.0, depth=2.0),
               _each(lambda k, w: w * (0.95 if k.role in ("matrix", "head") else 1.0), KINDS, weights), rtol=1e-4)


def test_ratios_of_one_are_plain_adamw_bit_for_bit():
    o = OptimConfig(clip=0.0, schedule="constant", warmup=0)
    mask = _each(lambda k: k.role in ("matrix", "head"), KINDS)
    plain = optax.adamw(o.lr, *o.betas, o.eps, weight_decay=o.weight_decay, mask=mask)
    weights, grads = _float32(_weights()), _float32(_weights(1))
    ours = jax.jit(_make(o).update)(grads, _make(o).init(weights), weights, loss=jnp.float32(1))[0]
    theirs = jax.jit(plain.update)(grads, plain.init(weights), weights)[0]
    assert _same(ours, theirs)


def test_clipping_bounds_the_global_norm_and_leaves_small_gradients_alone():
    o = OptimConfig(**FLAT | dict(clip=1.0), weight_decay=0.0, eps=1.0)  # so large an eps that size shows
    weights, grads = _weights(), _weights(1)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    unit = jax.tree.map(lambda g: g / norm, grads)
    assert norm > 3
    _close(_trained(o, weights, [grads]), _trained(o, weights, [unit]))
    small = jax.tree.map(lambda g: g * 0.3, unit)
    _close(_trained(o, weights, [small]), _trained(dataclasses.replace(o, clip=0.0), weights, [small]))


@pytest.mark.parametrize("name", optim.DIRECTIONS)
def test_a_refused_update_leaves_everything_as_if_it_had_never_been(name):
    o = OptimConfig(name=name, ema=0.9, spike=6.0)
    weights, gradients = _float32(_weights()), [_float32(_weights(seed)) for seed in (1, 2, 3)]
    poisons = [(jnp.nan, 1.0), (jnp.inf, 1.0), (0.0, jnp.nan)]  # one entry of a gradient, the loss
    step = _step(o)
    clean = dirty = (weights, _make(o).init(weights))
    for g, (entry, loss) in zip(gradients, poisons):
        clean = step(*clean, g, jnp.float32(1.0))
        poison = g | {"norm": g["norm"].at[0, 0].set(entry)}
        skipped = step(*dirty, poison, jnp.float32(loss))
        assert _same(skipped[0], dirty[0]) and _same(_memory(skipped[1]), _memory(dirty[1]))
        dirty = step(*skipped, g, jnp.float32(1.0))
    assert _same(dirty[0], clean[0]) and _same(_memory(dirty[1]), _memory(clean[1]))
    assert (int(dirty[1].accepted), int(dirty[1].skipped)) == (3, 3) and list(dirty[1].refused) == [0, 2, 4, -1]
    assert list(optim.burst(dirty[1].refused)) == [-1, -1]


def test_a_spike_is_told_from_the_last_128_accepted_losses():
    o = OptimConfig(name="lion", spike=6.0)
    step, tx = _step(o), _make(o)
    weights, grads = _float32(_weights()), _float32(_weights(1))
    state = (weights, tx.init(weights))
    losses = np.random.default_rng(0).normal(3.0, 0.1, 300)
    for i in range(128):
        state = step(*state, grads, jnp.float32(losses[i] if i else 50.0))  # no verdict before the window is full
    assert int(state[1].skipped) == 0
    window = np.append(losses[1:128], 50.0)  # one early outlier moves a median by next to nothing
    edge = np.median(window) + 6.0 * 1.4826 * np.median(abs(window - np.median(window)))
    assert int(step(*state, grads, jnp.float32(edge - 1e-3))[1].skipped) == 0
    assert int(step(*state, grads, jnp.float32(edge + 1e-3))[1].skipped) == 1
    state = step(*state, grads, jnp.float32(jnp.nan))
    for loss in losses[128:]:  # a NaN costs one update, and leaves no mark on the window
        state = step(*state, grads, jnp.float32(loss))
    assert int(state[1].skipped) == 1 and int(state[1].accepted) == 300
    np.testing.assert_allclose(np.sort(state[1].window), np.sort(losses[-128:]), rtol=1e-6)


@pytest.mark.parametrize("refused, found", [((0, 1, 2, 3), (0, 3)), ((5, 7, 30, 54), (5, 54)), ((3, 60, 61), (-1, -1)),
                                            ((5, 7, 30, 55), (-1, -1)), ((3, 60, 61, 62, 80), (60, 80))])
def test_a_burst_is_four_refusals_among_fifty_updates(refused, found):
    step, weights = _step(OptimConfig(name="lion")), _float32(_weights())
    state = (weights, _make(OptimConfig(name="lion")).init(weights))
    for at in range(max(refused) + 1):
        state = step(*state, weights, jnp.float32(jnp.nan if at in refused else 1.0))
    assert optim.burst(np.asarray(state[1].refused)) == found


def test_the_average_of_the_weights_has_no_memory_of_the_start():
    o = OptimConfig(**FLAT, ema=0.9)
    step, weights = _step(o), _float32(_weights())
    state, seen = _make(o).init(weights), []
    assert _same(optim.ema_params(state), weights)
    for seed in (1, 2, 3):
        weights, state = step(weights, state, _float32(_weights(seed)), jnp.float32(1))
        seen.append(weights)
    parts = np.array([0.9**2, 0.9, 1]) / (0.9**2 + 0.9 + 1)
    _close(optim.ema_params(state), jax.tree.map(lambda *w: sum(c * x for c, x in zip(parts, w)), *seen))
    with pytest.raises(ValueError, match="optim.ema"):
        optim.ema_params(_make(OptimConfig()).init(weights))
    with pytest.raises(ConfigError, match="below 1"):
        _make(OptimConfig(ema=1.0))


@pytest.mark.parametrize("name", ["adafactor", "muon"])  # the others touch each entry alone
def test_an_update_on_a_mesh_is_the_same_and_keeps_every_layout(name):
    o = OptimConfig(name=name)
    even = dict(L=2, D=4, N=2, H=4, V=4, E=2, F=4)
    weights, grads = _float32(_weights(0, even)), _float32(_weights(1, even))
    tx = _make(o)
    here = jax.jit(tx.update)(grads, tx.init(weights), weights, loss=jnp.float32(1))[0]
    mesh = parallel.make_mesh(MeshConfig(fsdp=2, model=2, expert=2))
    with jax.set_mesh(mesh):
        layouts = _each(lambda k, w: jax.NamedSharding(mesh, parallel.weight(k.letters, w.shape)), KINDS, weights)
        weights, grads = jax.device_put((weights, grads), (layouts, layouts))
        state = jax.jit(tx.init)(weights)
        there, after = jax.jit(tx.update)(grads, state, weights, loss=jnp.float32(1))
    _close(here, jax.device_get(there))
    for a, b in zip(jax.tree.leaves((weights, state)), jax.tree.leaves((there, after)), strict=True):
        assert a.sharding == b.sharding


def _make(o, width=1.0, depth=1.0):
    kinds = _each(lambda k: dataclasses.replace(k, width_ratio=width, depth_ratio=depth), KINDS)
    return optim.make(o, 100, kinds)


@functools.cache
def _step(o, width=1.0, depth=1.0):
    tx = _make(o, width, depth)

    @jax.jit
    def step(weights, state, grads, loss):
        updates, state = tx.update(grads, state, weights, loss=loss)
        return optax.apply_updates(weights, updates), state

    return step


def _trained(o, weights, gradients, width=1.0, depth=1.0):
    """Weights after an update with each of `gradients`, all float64 trees."""
    step, weights = _step(o, width, depth), _float32(weights)
    state = _make(o).init(weights)
    for grads in gradients:
        weights, state = step(weights, state, _float32(grads), jnp.float32(1))
    return weights


def _weights(seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return _each(lambda k: rng.normal(size=[sizes[a] for a in k.letters]), KINDS)


def _by_matrix(kind, function, *arrays):
    """function(each matrix [in, out]) of stacked arrays, or of each layer's vector."""
    batch = len(kind.letters) - len(kind.letters.lstrip("LE"))
    ins = sum(a in kind.fan_in for a in kind.letters) or 1
    shape = arrays[0].shape
    lead, rows = shape[:batch], int(np.prod(shape[batch:batch + ins]))
    flat = [a.reshape(-1, rows) if kind.role == "vector" else a.reshape(int(np.prod(lead)), rows, -1) for a in arrays]
    return np.stack([function(*parts) for parts in zip(*flat)]).reshape(shape)


def _each(function, kinds, *trees):
    return jax.tree.map(function, kinds, *trees)


def _memory(state):
    """All of the state but the counters of skips."""
    return state._replace(skipped=0, refused=0)


def _float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)
