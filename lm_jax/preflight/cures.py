"""What would make a step fit that does not, the cheapest first; each is held against the estimate before it is said."""

import bisect
import math
from collections.abc import Iterator
from dataclasses import replace

from lm_jax.config import Config
from lm_jax.preflight import search
from lm_jax.preflight.forecast import Forecast

LEAN = ("lion", "adafactor")  # optimizers that keep half of AdamW's moments, and hardly any


def cures(f: Forecast) -> list[str]:
    """Flags that make it fit: more microbatches, more remat or no copies of the weights by themselves, else remat and
    microbatches together, else those and another optimizer, which learns other numbers; the last are why it is last.
    None where none of these does: that wants more devices (`fewest_devices`), or a smaller model."""
    alone = [*_cuts(f), *_remats(f), *_sharded(f)]
    if alone:
        return alone
    full = _with(f, model=replace(f.config.model, remat="full"))
    both = [f"--config.model.remat=full {flag}" for flag in _cuts(full)]
    return both or [f"--config.optim.name={name}{more}" for name in LEAN for more in _leaner(f, full, name)][:2]


def fewest_devices(f: Forecast) -> int:
    """How many of its devices hold a step at least, when weights and optimizer are divided among all."""
    every = f.topology.devices
    least = _with(f, model=replace(f.config.model, remat="full"), mesh=replace(f.config.mesh, data=1, fsdp=-1))
    return max(every + 1, math.ceil(every * search.at_least(least) / f.limit))


def _cuts(f: Forecast) -> Iterator[str]:
    """The fewest microbatches that fit. More of them never need more."""
    t, rows = f.config.train, f.mesh_rows
    cuts = [t.microbatches * n for n in range(2, rows + 1) if rows % n == 0]
    fits = lambda n: _fits(_with(f, train=replace(t, microbatches=n)))
    if cuts and (at := bisect.bisect_left(cuts, True, key=fits)) < len(cuts):
        yield f"--config.train.microbatches={cuts[at]}"


def _remats(f: Forecast) -> Iterator[str]:
    """The next remat that fits."""
    model = f.config.model
    for remat in search.REMAT[search.REMAT.index(model.remat) + 1:]:
        if _fits(_with(f, model=replace(model, remat=remat))):
            yield f"--config.model.remat={remat}"
            return


def _sharded(f: Forecast) -> Iterator[str]:
    """Weights divided over the axis that holds copies of them."""
    if f.mesh.shape["data"] > 1 and _fits(_with(f, mesh=replace(f.config.mesh, data=1, fsdp=-1))):
        yield "--config.mesh.data=1 --config.mesh.fsdp=-1"


def _leaner(f: Forecast, full: Forecast, name: str) -> Iterator[str]:
    """What goes with an optimizer so that it fits: nothing, full remat, or that and microbatches."""
    lean = [_with(one, optim=replace(one.config.optim, name=name)) for one in (f, full)]
    if _fits(lean[0]):
        yield ""
    elif _fits(lean[1]):
        yield " --config.model.remat=full"
    else:
        yield from (f" --config.model.remat=full {flag}" for flag in _cuts(lean[1]))


def _with(f: Forecast, **sections) -> Forecast:
    changed: Config = replace(f.config, **sections)
    return Forecast(changed, f.topology)


def _fits(f: Forecast) -> bool:
    """Whether it does, which takes a trace; what is too large for certain is known without."""
    return search.at_least(f) <= f.limit and f.fits
