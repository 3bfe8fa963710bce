"""What a run will need, take and cost on hardware that nobody has yet: parameters, bytes, seconds, dollars.

    python -m lm_jax.plan --config=configs/8b.py --topology=v5p-128
    python -m lm_jax.plan --config=configs/8b.py --topology=v5e-256 --search

Topologies: v5e-256, v6e-64 and v7x-64 count chips; v5p-128 and v4-32 TensorCores, two a chip; v5p:4x4x8 is a torus,
4xv5e-256 four slices, h100-64 or 8xh100 GPUs. Nothing is run and no accelerator is touched: every layout is checked and
measured by types. Exit codes: 0 it fits, 2 it does not, or cannot be.
"""

import dataclasses
import json
import os

import rich.console

from lm_jax import command, devices, errors
from lm_jax.errors import ConfigError


def main(argv):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whatever this machine has is not what is asked about
    c, values = command.parse(
        argv, doc=__doc__, topology="the hardware, such as v5p-128, 4xv5e-256 or h100-64",
        prices='JSON file of dollars a chip-hour that replace the list prices: {"v5p": 4.2}',
        switches={"json": "print one JSON object", "search": "find the mesh, remat and microbatches",
                  "compile": "ask the TPU compiler for its own peak of memory: minutes, needs the tpu extra"})
    from lm_jax.preflight import aot, forecast, search, show, topology  # JAX reads its environment when it is imported
    from lm_jax.recipes import pretrain

    if not values.topology:
        raise ConfigError(f"which hardware? Pass --topology={topology.FORMS}")
    c, hardware = pretrain.planned(c), priced(topology.parse(values.topology), values.prices)
    best = search.search(c, hardware) if values.search else []
    plan = best[0] if best else forecast.Forecast(c, hardware)
    compiled = aot.compile(plan.config, hardware) if values.compile else None
    fits = not compiled.refusal if compiled else plan.fits  # the compiler knows best
    if values.json:
        print(json.dumps(plan.record() | {"fits": fits, "compiled": compiled and compiled.total}))
    else:
        console = rich.console.Console()
        show.say(show.page(plan, compiled), console)
        if best:
            show.say(show.found(best, c), console)
    return 0 if fits else 2


def priced(hardware, path: str | None):
    """The topology at the prices of a file, if there is one."""
    if not path:
        return hardware
    try:
        with open(path, encoding="utf-8") as file:
            prices = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prices={path}: {error}: a JSON object of dollars a chip-hour, as in "
                                 '{"v5p": 4.2}') from error
    numbers = isinstance(prices, dict) and all(type(price) in (int, float) and price >= 0 for price in prices.values())
    if not numbers or prices.keys() - devices.DEVICES.keys():
        raise ConfigError(f"--prices={path}: wanted dollars a chip-hour of {', '.join(devices.DEVICES)}, as in "
                                 '{"v5p": 4.2}')
    return dataclasses.replace(hardware, device=devices.priced(hardware.device, prices))


if __name__ == "__main__":
    errors.run(main)
