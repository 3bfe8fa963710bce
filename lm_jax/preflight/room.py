"""Whether a run has room on the devices where it is about to begin: what has none for certain is refused before it is
compiled, and before a host without memory kills it without a word."""

import jax

from lm_jax import devices, parallel
from lm_jax.config import Config
from lm_jax.devices import GIB
from lm_jax.errors import ConfigError
from lm_jax.models import flops
from lm_jax.preflight.cures import cures, fewest_devices
from lm_jax.preflight.forecast import Forecast
from lm_jax.preflight.topology import Topology
from lm_jax.recipes import pretrain

MARGIN = 1.25  # an estimate is believed where it is so many times what there is (docs/reliability.md)
SURE = 8  # times a rough count, which no step was seen to reach: what is below it needs no trace, which takes seconds


def refuse(config: Config):
    """Raise ConfigError where a step of `config` needs `MARGIN` times the memory of the devices in use: with its bytes
    by part, and the cheapest changes with which it would fit. Devices of unknown memory take everything."""
    parallel.rows_divide(config.train.batch, config.train.microbatches)
    here = present()
    if here is None:
        return
    f = Forecast(pretrain.planned(config), here)
    if SURE * _roughly(f) <= f.limit or f.bytes["total"] <= MARGIN * f.limit:
        return
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in f.bytes.items() if part != "total")
    found = cures(f)
    what = "it would fit with any of" if found else "no cut of the batch, remat or optimizer makes it fit, but"
    more = f"{fewest_devices(f)} such devices or more, or a smaller model"
    raise ConfigError(f"this config needs {_gib(f.bytes['total'])} GiB on each device, which has {_gib(f.limit)} "
                      f"({here.name}): {parts}; {what}\n  " + "\n  ".join([*found, more][:3]))


def present() -> Topology | None:
    """The devices in use as a topology; None where their memory is not known. CPU devices share their host's."""
    first, count = jax.devices()[0], jax.device_count()
    if first.platform == "cpu":
        host, here = devices.host_memory(), jax.local_device_count()
        shared = f" for {here} devices" if here > 1 else ""
        return Topology(f"this host's {_gib(host)}{shared}", devices.cpu(first.device_kind, host // here), (count,))
    device = devices.of_kind(first.device_kind)
    slices = len({getattr(one, "slice_index", 0) for one in jax.devices()}) if first.platform == "tpu" else 1
    if device is None or count % (slices * device.per_chip):
        return None
    return Topology(first.device_kind, device, (count // slices // device.per_chip,), slices)


def _roughly(f: Forecast) -> float:
    """Bytes a device, counted without a trace: the state, undivided, what layers and the head make of the rows, and the
    scores of every pair of tokens."""
    cfg, (tokens, source) = f.config.model, pretrain.row_lengths(f.config)
    rows, met = f.mesh_rows, max(tokens, source)
    layers, sizes = cfg.depth + cfg.encoder_depth, cfg.sizes
    wide = layers * (8 * cfg.width + 3 * sizes["F"] * max(1, cfg.moe.top_k * bool(cfg.moe.experts))) + cfg.vocab
    return 4 * (4 * flops.parameters(cfg)["total"] + rows * met * (wide + layers * cfg.heads * met))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
