"""The costliest operations of a compiled program: what each took in a profile, and would take at the limit."""

import collections
import glob
import math
import re
import statistics
import tempfile
from dataclasses import dataclass

import jax
from jax.profiler import ProfileData

from lm_jax.measure.figures import Figure
from lm_jax.measure.limits import Limits

CALLS = 3  # that are profiled
HOLDERS = ("while", "conditional", "call")  # whose times are those of what they hold
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # the names of others end in theirs
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[\{\[]"?([\d",]*)[\}\]]')
_SOURCE = re.compile(r'op_name="([^"]*)"')


def costliest(compiled, run, limits: Limits, *, dtype: str, most: int = 5) -> list[Figure]:
    """The operations of a compiled program that take most of `run()`, which runs it once: milliseconds a step, those
    that are alike (of one line of the model, in each layer) together."""
    known, alike = instructions(compiled.as_text()), collections.defaultdict(list)
    for name, seconds in profiled(run).items():
        if name in known and known[name].kind not in HOLDERS:
            alike[known[name]].append(seconds)
    total, figures = sum(map(sum, alike.values())), []
    for op in sorted(alike, key=lambda op: sum(alike[op]), reverse=True)[:most]:
        took, count = sum(alike[op]), len(alike[op])
        least = count * limits.seconds(op.flops, op.moved, dtype)
        figures.append(Figure(
            f"op {op.source}" + f" × {count}" * (count > 1), 1e3 * took, "ms", f"{took / total:.1%} of the profile; at "
            f"the limit {1e3 * least:.3g} ms ({op.flops:.3g} FLOPs, {op.moved:.3g} bytes each); {op.kind}"))
    return figures


@dataclass(frozen=True)
class Instruction:
    """One operation of a compiled program."""

    kind: str
    flops: int  # of its products
    moved: int  # bytes of what it reads and writes
    source: str  # the operation of the model that it was made of


def profiled(run) -> dict[str, float]:
    """Seconds that each operation took in a call of `run`, over all threads or streams; the median of `CALLS` calls, of
    which one may have had memory to fetch from the system."""
    run()
    calls = [_traced(run) for _ in range(CALLS)]
    return {name: statistics.median(call[name] for call in calls) for name in set().union(*calls)}


def instructions(text: str) -> dict[str, Instruction]:
    """Every operation of a program's text by its name."""
    computations = _computations(text)
    products = {name: sum(_product(*line, lines) for line in lines.values()) for name, lines in computations.items()}
    found = {}
    for lines in computations.values():
        for name, (shape, kind, rest) in lines.items():
            if kind in FREE:
                continue
            called = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)
            flops = _product(shape, kind, rest, lines) + sum(products.get(one, 0) for one in called)
            read = sum(_bytes(lines[one][0]) for one in _operands(rest) if one in lines)
            source = _SOURCE.search(rest)
            found[name] = Instruction(kind, flops, _bytes(shape) + read, _short(source[1]) if source else kind)
    return found


def _traced(run) -> collections.Counter:
    """Seconds of each operation in one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        data = [ProfileData.from_file(path) for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)]
        total = collections.Counter()
        for event in (event for one in data for plane in one.planes for line in plane.lines for event in line.events):
            name = next((value for key, value in event.stats if key == "hlo_op"), None)
            if name is not None:
                total[str(name)] += event.duration_ns * 1e-9
    return total


def _computations(text: str) -> dict[str, dict[str, tuple[str, str, str]]]:
    """Computation -> operation -> its shape, kind and the rest of its line."""
    found, lines = {}, {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = found.setdefault(head[1], {})
        elif part := _LINE.match(line):
            lines[part[1]] = part[2], part[3], part[4]
    return found


def _product(shape: str, kind: str, rest: str, lines: dict) -> int:
    """FLOPs of an operation that is a product: two for each number of the result and each that it sums over."""
    contracted = _CONTRACTED.search(rest) if kind in ("dot", "custom-call") else None
    first = next((one for one in _operands(rest) if one in lines), None)
    if contracted is None or first is None:
        return 0
    dims = _dims(lines[first][0])
    axes = [int(axis) for axis in contracted[1].replace('"', "").split(",") if axis]
    return 2 * math.prod(_dims(shape)) * math.prod(dims[axis] for axis in axes)


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _dims(shape: str) -> list[int]:
    """Of an array, or the first of several."""
    match = _SHAPE.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def _bytes(shape: str) -> int:
    bits = lambda name: BITS.get(name) or int(re.sub(r"\D*(\d+).*", r"\1", name) or 8)
    return sum(bits(name) * math.prod(int(n) for n in dims.split(",") if n) // 8
               for name, dims in _SHAPE.findall(shape) if name != "token")


def _short(source: str) -> str:
    """The end of a path of operations, which says most."""
    return "/".join(source.split("/")[-3:])
