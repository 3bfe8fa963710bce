"""The shape of the house, from its syntax trees: imports point down, importing does nothing, files stay readable."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "lm_jax").rglob("*.py"))

# From the bottom up. A module may import what is below it and the rest of its own package.
LAYERS = (
    ("credentials",),
    ("errors",),
    ("checks", "disk", "devices"),
    ("config", "lease", "faults", "cluster", "pages"),
    ("peers",),
    ("parallel", "batch", "seal", "workdir", "signals", "clock", "fingerprint", "command"),
    ("data", "models", "hosts"),
    ("losses", "surgery", "optim", "checkpoint", "log", "plots", "hub"),
    ("meter", "update"),
    ("trainer", "inference"),
    ("recipes", "pipelines"),
    ("preflight",),
    ("launchers",),
    ("scaling",),
    ("measure",),
    ("prepare", "train", "together", "plan", "sweep", "fit", "bench", "evaluate", "generate", "convert", "serve"),
    ("",),  # lm_jax itself, which nothing imports
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
LONGEST: dict[str, int] = {}  # lines, where more than 300 are good
AXES = {"replica", "fsdp"}  # the other axes' names are also words
SHARDING = {"PartitionSpec", "AxisType", "Mesh", "with_sharding_constraint"}


def name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module: str) -> str:
    """`lm_jax.data.pack` -> `data`: the unit that layers are made of."""
    return (module.split(".") + [""])[1]


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names that a file imports, at its top or inside a function; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}: write `from lm_jax...`, not a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: pathlib.Path) -> set[str]:
    """Modules of the house that a file imports."""
    return imports(path) & {name(file) for file in FILES} - {"lm_jax", name(path)}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    here = part(name(path))
    assert not here or here in LEVEL, f"say in LAYERS where lm_jax.{here} belongs"
    for other in map(part, ours(path)):
        down = other == here or LEVEL[other] < LEVEL[here]
        assert down, f"{name(path)} imports lm_jax.{other}, which is not below it"


def test_no_module_imports_itself_through_others():
    graph = {name(path): ours(path) for path in FILES}
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"imports in a circle: {sorted(graph)}"


def test_data_knows_nothing_of_jax():
    for path in FILES:
        if part(name(path)) == "data":
            used = {module.split(".")[0] for module in imports(path)}
            assert not used & {"jax", "flax", "optax", "orbax"}, name(path)


def test_only_parallel_names_mesh_axes():
    for path in FILES:
        if part(name(path)) in ("parallel", "config"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            said = {getattr(node, field, None) for field in ("attr", "id")} & SHARDING
            said |= {node.value} & AXES if isinstance(node, ast.Constant) else set()
            assert not said, f"{name(path)}:{node.lineno} names {said.pop()}"


def test_the_module_that_breaks_protobuf_is_never_imported():
    for path in FILES:
        assert not [module for module in imports(path) if "sentencepiece_model_pb2" in module], name(path)


def test_importing_does_nothing():
    """No flag, device or print; the data side loads neither JAX nor a tokenizer; nothing loads TensorFlow or torch."""
    data = [name(path) for path in FILES if part(name(path)) in ("data", "config", "checks", "disk", "errors")]
    rest = [name(path) for path in FILES if name(path) not in data]
    program = f"""
import importlib, sys
for module in {data}: importlib.import_module(module)
heavy = {{"jax", "sentencepiece", "tokenizers"}} & sys.modules.keys()
assert not heavy, f"lm_jax.data loads {{heavy}}"
for module in {rest}: importlib.import_module(module)
unwanted = {{"tensorflow", "torch", "sentencepiece_model_pb2"}} & sys.modules.keys()
assert not unwanted, f"lm_jax loads {{unwanted}}"
from absl import flags
defined = [module for module in flags.FLAGS.flags_by_module_dict() if "lm_jax" in module]
assert not defined, f"flags defined by importing {{defined}}"
import jax
assert not jax._src.xla_bridge.backends_are_initialized(), "importing started a device"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def texts() -> list[pathlib.Path]:
    """Files that people wrote."""
    folders = ("lm_jax", "configs", "experiments", "tests")
    patterns = ["*.md", "*.toml", "*.txt", "*.py", ".ci/run"] + [f"{folder}/**/*.py" for folder in folders]
    return [path for pattern in patterns for path in ROOT.glob(pattern)]


def test_files_stay_readable():
    for path in FILES:
        lines = path.read_text("utf-8").count("\n")
        assert lines <= LONGEST.get(name(path), 300), f"{name(path)} has {lines} lines: read in one sitting? Split it"


def test_no_file_names_a_folder_of_one_machine():
    places = re.compile(r"""(?:^|[\s"'`=:(])/(?:work|root|tmp|home)(?=[/\s"'`]|$)""", re.MULTILINE)
    for path in texts():
        found = places.search(path.read_text("utf-8"))
        assert not found, f"{path.relative_to(ROOT)} names {found.group().strip()}"
