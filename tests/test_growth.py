"""How cost grows is told by counts, times and their exponents."""

import numpy as np
import pytest

from lm_jax.measure import growth

SMALL = dict(params=5e4, tokens=64, length=32)


def test_growth_finds_the_exponent_of_a_power():
    x = np.array([1.0, 3.0, 10.0])
    assert growth.exponent(x, 5 * x**1.7) == pytest.approx(1.7)


def test_growth_over_sizes_tells_counts_times_and_exponents():
    found = {f.name.strip(): f for f in growth.measured("vocab", (64, 128), turns=1, **SMALL)}
    assert {"exponent of FLOPs", "exponent of seconds a step", "left unexplained"} <= found.keys()
    assert 0 < found["exponent of FLOPs"].value < 1 and found["64 ids"].unit == "ms"


def test_growth_over_devices_asks_a_process_of_each_number():
    found = growth.measured("devices", (1, 2), turns=1, **SMALL, vocab=64)
    assert [f.unit for f in found[:2]] == ["ms", "ms"] and found[1].name == "2 devices"


def test_what_is_too_large_is_counted_and_not_timed(monkeypatch):
    monkeypatch.setattr(growth, "PATIENCE", 1.0)
    big = growth.measured("vocab", (64,), turns=1, **SMALL)[0]
    assert "counted alone" in big.how and big.unit == "FLOP a step"
