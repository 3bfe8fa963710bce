"""What a run will need, take and cost on a topology: everything that `plan` says, in numbers."""

from dataclasses import dataclass
from functools import cached_property

import jax

from lm_jax import parallel
from lm_jax.config import Config
from lm_jax.devices import GIB
from lm_jax.models import flops
from lm_jax.preflight import memory, program, roofline
from lm_jax.preflight.topology import Topology
from lm_jax.recipes import pretrain
from lm_jax.recipes.pretrain import row_lengths


@dataclass(frozen=True)
class Forecast:
    """A config, whose model knows its vocabulary, on a topology. What takes time is found out when it is asked for.

    ConfigError if the mesh or the batch cannot be laid on the topology's devices.
    """

    config: Config
    topology: Topology

    def __post_init__(self):
        with jax.sharding.use_abstract_mesh(self.mesh):
            parallel.rows_divide(self.config.train.batch, self.config.train.microbatches)

    @cached_property
    def mesh(self) -> jax.sharding.AbstractMesh:
        device = self.topology.device
        return parallel.abstract_mesh(self.config.mesh, self.topology.devices, platform=device.platform,
                                      kind=device.kinds[0], slices=self.topology.slices)

    @cached_property
    def bytes(self) -> dict[str, int]:
        """Of each device, by part, and their total; the whole step is traced for it, and every layout checked."""
        program.check(self.config, self.mesh)
        return memory.estimate(self.config, self.mesh)

    @property
    def limit(self) -> int:
        """Bytes that a program may use on each device."""
        return int(self.topology.device.usable / self.topology.device.per_chip)

    @property
    def fits(self) -> bool:
        return self.bytes["total"] <= self.limit

    @property
    def mesh_rows(self) -> int:
        """Rows of a microbatch on each device."""
        with jax.sharding.use_abstract_mesh(self.mesh):
            return parallel.local_size("B", (self.config.train.batch // self.config.train.microbatches,))

    @cached_property
    def roofline(self) -> roofline.Roofline:
        return roofline.of(self.config, self.mesh, self.topology)

    @property
    def params(self) -> dict[str, int]:
        return flops.parameters(self.config.model)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch * sum(row_lengths(self.config))

    @property
    def flops_per_step(self) -> int:
        return self.config.train.batch * flops.train(self.config.model, *row_lengths(self.config))

    @property
    def mfu(self) -> float:
        return self.flops_per_step / (self.roofline.seconds * self.topology.chips * self.topology.device.flops)

    @property
    def hours(self) -> float:
        """Of the whole run, steps alone."""
        return self.config.train.steps * self.roofline.seconds / 3600

    @property
    def chip_hours(self) -> float:
        return self.hours * self.topology.chips

    @property
    def dollars(self) -> float:
        return self.chip_hours * self.topology.device.dollars

    @cached_property
    def replicated(self) -> list[str]:
        """What does not divide its axis, so that devices along it hold or do the same, for people."""
        with jax.sharding.use_abstract_mesh(self.mesh):
            return pretrain.replicated(self.config)

    @property
    def remarks(self) -> list[str]:
        """What the numbers do not say of themselves, for people."""
        device, said = self.topology.device, []
        if device.platform == "gpu":
            share, card = device.usable / device.memory, device.memory / GIB
            said += [f"programs may use {share:.0%} of the card's {card:.1f} GiB (XLA_PYTHON_CLIENT_MEM_FRACTION)",
                     "the workspace is fitted to the TPU compiler: a GPU's may be another"]
        if self.config.optim.name == "muon" and self.topology.devices > 1:
            said += ["what Muon's Newton-Schulz moves between devices is not counted: a step takes longer"]
        return said

    def record(self) -> dict:
        """All of it, for programs."""
        r, n = self.roofline, self.params
        return {
            "config": self.config.name, "topology": self.topology.name, "chips": self.topology.chips,
            "mesh": dict(self.mesh.shape), "replicated": self.replicated, "remat": self.config.model.remat,
            "microbatches": self.config.train.microbatches, "fits": self.fits,
            "params": n["total"], "params_non_embedding": n["non_embedding"], "params_active": n["active"],
            "flops_per_token": self.flops_per_step / self.tokens_per_step, "flops_per_step": self.flops_per_step,
            "tokens_per_step": self.tokens_per_step, "steps": self.config.train.steps,
            "bytes_per_device": self.bytes | {"limit": self.limit},
            "step_seconds": r.seconds, "bound_by": r.bound_by,
            "seconds_by": {name: getattr(r, name) for name in ("compute", "memory", "links", "network", "waited")},
            "mfu": self.mfu, "tokens_per_second": self.tokens_per_step / r.seconds,
            "chip_hours": self.chip_hours, "dollars": self.dollars, "remarks": self.remarks,
        }


def shares(mesh) -> str:
    """The axes of a mesh that are longer than 1, as people write them: `fsdp 16 x model 4`."""
    return " × ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
