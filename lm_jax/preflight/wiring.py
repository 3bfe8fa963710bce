"""Where the axes of a mesh lie on the wires of a topology, and how long a collective along some of them takes.

The last axes of a mesh are neighbours: they fill the torus of a slice (or a host of GPUs) first, and what is left of
the others goes over the network. An axis that covers a dimension of the torus which closes is a ring and sends both
ways; one on several dimensions uses the wires of all. What is passed to the next device alone takes one wire, one way.
That axes share wires at the same time is not modelled.
"""

import math

from lm_jax.preflight.topology import Topology
from lm_jax.preflight.traffic import Move


class Wiring:
    """The axes of a mesh (sizes, slowest first) on a topology."""

    def __init__(self, sizes: dict[str, int], topology: Topology):
        self.sizes, self.topology = sizes, topology
        self.near: dict[str, int] = {}  # axis -> devices along it that fast links join
        self.on: dict[str, dict[int, int]] = {}  # axis -> dimension of the torus -> devices of the axis along it
        left = topology.domain
        self.dims = [*topology.shape, topology.device.per_chip] if topology.device.torus else [topology.domain]
        free = list(self.dims)
        for axis in reversed(sizes):
            self.near[axis] = math.gcd(sizes[axis], left)
            left //= self.near[axis]
            self.on[axis] = _placed(self.near[axis], free, self.dims)

    def seconds(self, move: Move) -> tuple[float, float]:
        """Seconds of one collective at nominal rates: on links, and on the network.

        n devices that gather, or sum and scatter, P bytes send (n - 1) / n P each; to sum and keep is to do both. Over
        the network each sends the part of P that is its own among those it shares fast links with.
        """
        near = math.prod(self.near[axis] for axis in move.axes)
        far = math.prod(self.sizes[axis] for axis in move.axes) // near
        abroad = self.topology.device.network / self.topology.device.per_chip
        if move.kind == "collective-permute":
            return move.bytes / self._wire() * (near > 1), move.bytes / abroad * (far > 1)
        twice = 2 if move.kind == "all-reduce" else 1
        links = twice * move.bytes * (near - 1) / near / self._rate(move.axes) if near > 1 else 0.0
        return links, twice * move.bytes / near * (far - 1) / far / abroad

    def _wire(self) -> float:
        """Bytes a second that a device sends to one neighbour: a wire of the torus, or all that it has to a switch."""
        device = self.topology.device
        return device.link / (2 * device.torus or 1) / device.per_chip

    def _rate(self, axes: tuple[str, ...]) -> float:
        """Bytes a second that a device sends one way on the links along these axes."""
        if not self.topology.device.torus:
            return self._wire()
        along: dict[int, int] = {}
        for axis in axes:
            for dim, part in self.on[axis].items():
                along[dim] = along.get(dim, 1) * part
        ways = sum(2 if self._closes(dim, part) else 1 for dim, part in along.items())
        return ways * self._wire()

    def _closes(self, dim: int, part: int) -> bool:
        """Whether so many devices along a dimension are a ring: all of it, and the slice has wires that close it. Those
        of three dimensions have, where they are made of whole cubes of 4x4x4; of two, along a whole side of the pod."""
        device, shape = self.topology.device, self.topology.shape
        if dim >= device.torus or part < shape[dim]:
            return False
        return all(n % 4 == 0 for n in shape) if device.torus == 3 else shape[dim] == math.isqrt(device.domain)


def _placed(n: int, free: list[int], dims: list[int]) -> dict[int, int]:
    """Whole dimensions whose product is n, the fewest, else parts of them as they come; taken from `free`."""
    subsets = sorted(range(1, 2 ** len(free)), key=int.bit_count)
    whole = [[d for d in range(len(free)) if s >> d & 1] for s in subsets]
    exact = (s for s in whole if all(free[d] == dims[d] > 1 for d in s) and math.prod(free[d] for d in s) == n)
    on = {d: free[d] for d in next(exact, [])} if n > 1 else {}
    for d in reversed(range(len(free))):
        if math.prod(on.values()) < n and d not in on:
            part = math.gcd(n // math.prod(on.values()), free[d])
            on |= {d: part} if part > 1 else {}
    for d, part in on.items():
        free[d] //= part
    return on
