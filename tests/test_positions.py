"""Rotary angles, sinusoids, T5's buckets and ALiBi against the papers' formulas, one number at a time in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from lm_jax.config import CHOICES, RopeConfig
from lm_jax.models import positions

LENGTH, HEAD, THETA = 64, 16, 10_000.0


def reference(scaling: str, factor: float, size: int, seen: int) -> tuple[list[float], float]:
    """Frequencies of the `size`/2 pairs, and the factor on cos and sin; `seen` is the longest position plus one."""
    freqs = [THETA ** (-2 * i / size) for i in range(size // 2)]
    if scaling == "none":
        return freqs, 1.0
    if scaling == "linear":
        return [f / factor for f in freqs], 1.0
    if scaling in ("ntk", "dynamic"):
        stretch = factor if scaling == "ntk" else factor * max(seen, LENGTH) / LENGTH - (factor - 1)
        theta = THETA * stretch ** (size / (size - 2))
        return [theta ** (-2 * i / size) for i in range(size // 2)], 1.0
    if scaling == "llama3":
        return [llama3(f, factor) for f in freqs], 1.0
    dimension = lambda turns: size * math.log(LENGTH / (turns * 2 * math.pi)) / (2 * math.log(THETA))  # yarn
    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), size - 1)
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(size // 2)]
    return [f / factor * r + f * (1 - r) for f, r in zip(freqs, ramp)], 0.1 * math.log(factor) + 1


def llama3(freq: float, factor: float) -> float:
    wave = 2 * math.pi / freq
    if wave < LENGTH / 4:
        return freq
    if wave > LENGTH / 1:
        return freq / factor
    smooth = (LENGTH / wave - 1) / (4 - 1)
    return (1 - smooth) * freq / factor + smooth * freq


def turned(x_TH, scaling, factor, size, interleaved) -> np.ndarray:
    """Each pair of sizes as a complex number, times e^(i angle)."""
    freqs, gain = reference(scaling, factor, size, len(x_TH))
    y_TH = x_TH.copy()
    for t in range(len(x_TH)):
        for i, freq in enumerate(freqs):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + size // 2)
            z = complex(x_TH[t, a], x_TH[t, b]) * gain * complex(math.cos(t * freq), math.sin(t * freq))
            y_TH[t, a], y_TH[t, b] = z.real, z.imag
    return y_TH


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("scaling", CHOICES["model.rope.scaling"])
def test_rotary_is_its_formula(scaling, fraction, interleaved, rng):
    rope = RopeConfig(theta=THETA, fraction=fraction, interleaved=interleaved, scaling=scaling, factor=4.0)
    cfg = tiny.settings(head_size=HEAD, max_length=LENGTH, rope=rope)
    x_TH = rng.standard_normal((200, HEAD))  # past max_length, so that dynamic stretches
    angles = positions.rotary(cfg, jnp.arange(200)[None])
    y_TH = positions.rotate(jnp.asarray(x_TH[None, :, None], jnp.float32), *angles, cfg)[0, :, 0]
    expected = turned(x_TH, scaling, 4.0, int(HEAD * fraction), interleaved)
    np.testing.assert_allclose(y_TH, expected, atol=1e-4)  # 200 radians in float32 are good to 1e-5
    np.testing.assert_array_equal(y_TH[:, int(HEAD * fraction):], x_TH[:, int(HEAD * fraction):].astype(np.float32))


@pytest.mark.parametrize("scaling", CHOICES["model.rope.scaling"])
def test_scaled_rotary_moves_what_it_should(scaling):
    """Every scaling but "none" lengthens the longest wave, and all but linear leave the shortest alone."""
    def angle(name, factor):
        """What one step turns each pair by."""
        cfg = tiny.settings(head_size=HEAD, max_length=LENGTH, rope=RopeConfig(scaling=name, factor=factor))
        cos, sin = positions.rotary(cfg, jnp.arange(4 * LENGTH)[None])
        return np.arctan2(sin[0, 1], cos[0, 1])

    plain, scaled = angle("none", 1.0), angle(scaling, 4.0)
    assert (scaled[-1] < 0.6 * plain[-1]) == (scaling != "none")
    assert (scaled[0] == pytest.approx(plain[0], rel=1e-5)) == (scaling != "linear")


def test_dynamic_scaling_is_none_within_max_length():
    ropes = [RopeConfig(scaling=name, factor=4.0) for name in ("none", "dynamic")]
    angles = [positions.rotary(tiny.settings(max_length=LENGTH, rope=rope), jnp.arange(LENGTH)[None]) for rope in ropes]
    np.testing.assert_allclose(angles[0], angles[1], atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_products_depend_on_the_distance_alone(interleaved, rng):
    cfg = tiny.settings(head_size=HEAD, rope=RopeConfig(interleaved=interleaved))
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, HEAD)), jnp.float32) for _ in range(2))
    at = lambda x, place: positions.rotate(x, *positions.rotary(cfg, jnp.full((1, 1), place)), cfg)
    product = lambda a, b: float((at(q, a) * at(k, b)).sum())
    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [8, 32])
def test_relative_buckets_are_t5s(causal, count):
    distances = np.arange(-300, 301)
    got = positions.buckets(jnp.asarray(distances), causal=causal, count=count)
    np.testing.assert_array_equal(got, [bucket(int(d), causal, count) for d in distances])
    assert set(np.asarray(got)) <= set(range(count))


def bucket(ahead: int, causal: bool, count: int) -> int:
    """Raffel et al. 2020's bucket of a key `ahead` places after its query, in integers: no rounding of logarithms."""
    offset = 0
    if not causal:
        count //= 2
        offset = count if ahead > 0 else 0
    away = abs(ahead) if not causal else max(-ahead, 0)
    exact = count // 2
    if away < exact:
        return offset + away
    far = count - exact  # as many buckets from `exact` to 128, each (128 / exact)^(1 / far) times as far as the last
    begun = sum((away / exact) ** far * (1 + 1e-12) >= (128 / exact) ** step for step in range(1, far))
    return offset + exact + begun


def test_alibi_is_its_slopes_times_the_distance():
    for heads, slopes in ((8, [2.0**-i for i in range(1, 9)]), (4, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]),
                          (6, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])):  # the authors' rule for 6
        distance = np.arange(5)[:, None] - np.arange(5)[None]
        bias = positions.alibi(jnp.asarray(distance)[None], heads)
        np.testing.assert_allclose(bias[0], -np.abs(distance) * np.asarray(slopes)[:, None, None], rtol=1e-6)


def test_sinusoids_are_sines_then_cosines_of_geometric_waves():
    got = positions.sinusoids(jnp.arange(50)[None], 8)[0]
    for t in (0, 1, 49):
        for i in range(4):
            wave = 10_000.0 ** (i / 3)  # from 2 pi to 10000 * 2 pi
            np.testing.assert_allclose(got[t, [i, i + 4]], [math.sin(t / wave), math.cos(t / wave)], atol=1e-5)
