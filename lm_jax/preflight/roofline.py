"""How long a step takes on hardware that nobody has yet: compute, memory, links and network, and the slowest of them.

The model. A chip does its products and its passes over memory one after the other, as XLA's operations come. Weights
and gradients travel meanwhile (compilers send them ahead) and count only where they take longer than both; what one
product makes and the next one needs (tensor parallel sums, keys and values, the loss) is waited for.

    seconds = max(compute + memory, weights and gradients on links and network) + the rest on links and network

Nominal peaks are never reached: `REACHED` is the share that long products, streams and collectives do reach. Large
bfloat16 products reach 80 to 90 % of a TPU's peak and 65 to 75 % of a Hopper's, which lowers its clock under them;
memory and links, some 80 to 90 %. A step has latencies besides, which no roofline knows: small ones take longer.

What is computed is more than the FLOPs of the model: what remat does again, what the backward pass of a fused attention
kernel does again by itself (its scores; splash has two such kernels, of dq and of dk and dv), what several devices do
alike, and Muon's Newton-Schulz iterations, as if they were divided as the matrices are.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm_jax import losses, parallel
from lm_jax.config import Config
from lm_jax.models import flops, kernels
from lm_jax.preflight import traffic
from lm_jax.preflight.topology import Topology
from lm_jax.preflight.wiring import Wiring
from lm_jax.recipes.pretrain import row_lengths

REACHED = {"tpu": 0.85, "gpu": 0.70, "memory": 0.85, "links": 0.80, "network": 0.80}
AHEAD = ("weights", "gradients")  # what is moved while others compute
STATE_BYTES = {"adamw": 16, "lion": 8, "muon": 8, "adafactor": 0}  # read and written a weight: its moments
# products, forward + backward
SCORES = {"xla": 2 + 4, "blocked": 2 + 5, "cudnn": 2 + 5, "ring": 2 + 5, "splash": 2 + 3 + 4}
KEPT = ("blocked", "ring", "splash")  # kernels whose outputs remat="dots" keeps
ITERATIONS = 5  # of Newton-Schulz


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step on each resource, what of links and network is waited for, and the step's own."""

    compute: float
    memory: float
    links: float
    network: float
    waited: float

    @property
    def seconds(self) -> float:
        return max(self.compute + self.memory, self.links + self.network - self.waited) + self.waited

    @property
    def bound_by(self) -> str:
        return max(("compute", "memory", "links", "network"), key=lambda name: getattr(self, name))


def of(config: Config, mesh, topology: Topology) -> Roofline:
    """The roofline of one step of `config`, whose model knows its vocabulary, on a mesh over the topology."""
    device, wires = topology.device, Wiring(dict(mesh.shape), topology)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        products, stream = computed(config), _stream(config, mesh)
        update = orthogonalized(config)
    peak = device.flops32 if config.model.dtype == "float32" else device.flops
    share = REACHED[device.platform] / device.per_chip
    links = network = waited = 0.0
    for move in traffic.step(config, mesh):
        near, far = (move.times * seconds for seconds in wires.seconds(move))
        near, far = near / REACHED["links"], far / REACHED["network"]
        links, network = links + near, network + far
        waited += 0.0 if move.what in AHEAD else near + far
    return Roofline(products / (peak * share) + update / (device.flops32 * share),
                    stream / (device.memory_rate / device.per_chip * REACHED["memory"]), links, network, waited)


def computed(config: Config) -> float:
    """FLOPs that one device of the mesh in use really computes in a step: what remat does again too, and what letters
    that do not divide their axis have several devices do."""
    cfg, (T, S), rows = config.model, row_lengths(config), config.train.batch
    total = 0.0
    for w in flops.weights(cfg):
        again = cfg.remat == "full" and "blocks" in w.path
        axes = _over(zip(w.kind.letters.removeprefix("L"), w.shape[w.kind.letters.startswith("L"):]))
        met = flops.tokens_met(w, cfg, T, S)
        total += 2 * (3 + again) * flops.active(w, cfg) * met / parallel.devices_along(axes + _over([("T", met)]))
    kernel = kernels.choose(cfg, T)
    again = cfg.remat == "full" or (cfg.remat == "dots" and kernel not in KEPT)
    scores = flops.scores(cfg, T, S, causal=kernel != "xla") * (SCORES[kernel] / 2 + again)
    total += scores / parallel.devices_along(_over([("N", cfg.heads), ("T", T)]))
    return total * parallel.local_size("B", (rows,))


def orthogonalized(config: Config) -> float:
    """FLOPs that one device computes in the float32 products of Muon: x x', its square, and their sum by x, where x is
    a matrix (of a layer, of an expert) with its longer side last."""
    if config.optim.name != "muon":
        return 0.0
    total = 0.0
    for w in flops.weights(config.model):
        if w.kind.role == "matrix":
            stacked = len(w.kind.letters) - len(w.kind.letters.lstrip("LE"))
            ins = math.prod(n for a, n in zip(w.kind.letters, w.shape) if a in w.kind.fan_in)
            m, n = sorted((ins, math.prod(w.shape[stacked:]) // ins))
            products = ITERATIONS * math.prod(w.shape[:stacked]) * (4 * m * m * n + 2 * m**3)
            total += products / parallel.devices_along(sum(parallel.weight_axes(w.kind.letters, w.shape), ()))
    return total


def state_bytes(config: Config) -> int:
    """Bytes of optimizer state that an update reads and writes for each weight: moments, and an average of weights."""
    return STATE_BYTES[config.optim.name] + (8 if config.optim.ema else 0)


def _over(sizes) -> tuple[str, ...]:
    """The axes that divide an activation along these letters."""
    return tuple(axis for a, n in sizes for axis in parallel.activation_axes(a, n))


def _stream(config: Config, mesh) -> float:
    """Bytes of memory that a device reads and writes in a step: weights, state, activations, scores, logits."""
    cfg, (T, S), micro = config.model, row_lengths(config), config.train.microbatches
    size, rows = jnp.dtype(cfg.dtype).itemsize, config.train.batch // micro
    passes = 3 + (cfg.remat == "full")  # forward, two products backward, and again
    parts = losses.parts_of(rows, T, cfg.vocab)  # each reads the output table twice, and reads and writes its gradient
    total = 0.0
    for w in flops.weights(cfg):
        stacked = w.kind.letters.startswith("L")
        letters, shape, layers = w.kind.letters[stacked:], w.shape[stacked:], w.shape[0] if stacked else 1
        gathered, kept = parallel.weight_axes(letters, shape)
        mine = w.size / math.prod(mesh.shape[axis] for axis in gathered + kept)
        used = w.size / math.prod(mesh.shape[axis] for axis in kept)
        total += mine * (4 * 3 + state_bytes(config))  # the update reads weight and gradient, writes one
        if w.kind.role == "head" or (cfg.tied and w.path[0] == "embed"):
            total += micro * used * parts * (2 * size + 8)
        else:
            total += micro * used * (passes * size + 4)
        if w.kind.fan_in:
            visits = cfg.moe.top_k if letters.startswith("E") else 1
            ends = {a: n for a, n in zip(letters, shape) if a != "E"}
            met = flops.tokens_met(w, cfg, T, S)
            local = sum(parallel.local_size("BT" + "".join(side), (rows, met, *side.values()))
                        for side in _sides(ends, w.kind.fan_in))
            total += micro * layers * passes * visits * size * local
    if kernels.choose(cfg, T) == "xla":  # float32 scores are written and read by softmax, forward, backward and again
        pairs = parallel.local_size("BNTS", (rows, cfg.heads, T, T)) * cfg.depth
        pairs += parallel.local_size("BNTS", (rows, cfg.heads, S, S)) * cfg.encoder_depth if S else 0
        total += micro * pairs * 4 * 2 * passes
    return total + micro * parallel.local_size("BTV", (rows, T, cfg.vocab)) * 4 * 2 * 3


def _sides(ends: dict[str, int], fan_in: str) -> tuple[dict, dict]:
    return tuple({a: n for a, n in ends.items() if (a in fan_in) is side} for side in (True, False))
