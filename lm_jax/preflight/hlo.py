"""The collectives of a compiled program, read off its text (`compiled.as_text()`), and how often each runs.

A compiled step is the only witness of what is really moved: the tests hold the formula of traffic.py against it.
"""

import math
import re
from dataclasses import dataclass

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}  # others end in their bits
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_NAME = r"%?([\w.\-]+)"
_HEAD = re.compile(rf"^(ENTRY )?{_NAME} \(.*\{{$")
_LINE = re.compile(rf"^\s*(?:ROOT )?{_NAME} = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLS = re.compile(rf"(body|condition|calls|to_apply)={_NAME}")
_BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=|false_computation=)([^}=]*)(?:\}|, |$)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_INTEGER = re.compile(r"(\d+)\)")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective: `bytes` of the whole array that a group brings together, sums or scatters; `times` a step."""

    kind: str
    bytes: int
    group: int  # devices that take part together
    times: int
    source: str  # the operation of the model that asked for it


def collectives(text: str) -> list[Collective]:
    """Every collective that a program runs, asynchronous parts counted once, loops as often as they go round, and of
    branches the one that moves most."""
    computations, entry = _computations(text)
    chains: set[str] = set()  # the TPU compiler spreads a collective over several fusions, which share a chain

    def run(name: str, times: int) -> list[Collective]:
        found = []
        for shape, op, rest in computations[name]:
            kind = op.removesuffix("-start")
            if kind in KINDS:
                chain = _CHAIN.search(rest)
                if chain is None or chain[1] not in chains:
                    kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind  # the TPU's way
                    found.append(Collective(kind, _bytes(op, shape, rest), _group(rest), times, _source(rest)))
                chains.update([chain[1]] if chain else [])
            elif not op.endswith(("-done", "-update")):  # whose body is that of the start
                for called, trips in _called(op, rest, computations):
                    found += run(called, times * trips)
                found += max((run(branch, times) for branch in _branches(rest)), key=_moved, default=[])
        return found

    return [c for c in run(entry, 1) if c.group > 1]


def totals(text: str) -> dict[str, int]:
    """Bytes a step by kind of collective."""
    sums: dict[str, int] = {}
    for c in collectives(text):
        sums[c.kind] = sums.get(c.kind, 0) + c.bytes * c.times
    return sums


def buffers(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays that a program makes, as one device sees them."""
    return {tuple(int(n) for n in dims.split(",") if n) for _, dims in _SHAPE.findall(text)}


def _computations(text: str) -> tuple[dict[str, list], str]:
    """Name -> lines (shape, operation, rest) of each computation, and the name of the first to run."""
    computations: dict[str, list] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            lines.append(match.groups()[1:])
    if not entry:
        raise ValueError("no ENTRY in this text: pass compiled.as_text()")
    return computations, entry


def _called(op: str, rest: str, computations: dict):
    """Computations that a line runs, and how often; a sum's adder runs no collective."""
    roles = dict(_CALLS.findall(rest))
    for role, name in roles.items():
        if role != "to_apply" or op == "call":
            yield name, _trips(rest, computations[roles["condition"]]) if role == "body" else 1


def _branches(rest: str) -> list[str]:
    """Computations of which a line runs one."""
    return [name.strip().lstrip("%") for names in _BRANCHES.findall(rest) for name in names.split(",")]


def _moved(found: list[Collective]) -> int:
    return sum(c.bytes * c.times for c in found if c.group > 1)


def _trips(rest: str, condition: list) -> int:
    """How often a loop goes round: what the compiler says, or the bound of the counter of a scan."""
    if known := _TRIPS.search(rest):
        return int(known[1])
    bounds = [_INTEGER.match(rest) for _, op, rest in condition if op == "constant"]
    if len(bounds) != 1 or bounds[0] is None or not any("direction=LT" in rest for _, _, rest in condition):
        raise ValueError(f"a loop whose trips nobody knows, so that collectives cannot be counted: {rest[:200]}")
    return int(bounds[0][1])


def _bytes(op: str, shape: str, rest: str) -> int:
    """Bytes of a collective's whole array: what is gathered, summed or, before it is scattered, was summed."""
    sizes = [_size(*each) for each in _SHAPE.findall(shape)]
    if op == "collective-permute-start":
        sizes = sizes[1:2]  # operand, result, and counters
    elif op.endswith("-start") and op != "all-reduce-start":
        sizes = sizes[len(sizes) // 2:]  # operands, then results
    return sum(sizes) * (_group(rest) if op.startswith("reduce-scatter") else 1)


def _size(dtype: str, dims: str) -> int:
    bits = BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def _group(rest: str) -> int:
    """Devices in a replica group, in each of the ways that XLA writes them."""
    if "source_target_pairs=" in rest:
        return 2
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):  # named, perhaps a part of one
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    raise ValueError(f"replica groups that are written in a way not known here: {rest[:300]}")


def _source(rest: str) -> str:
    name = re.search(r'op_name="([^"]*)"', rest)
    return name[1] if name else ""
