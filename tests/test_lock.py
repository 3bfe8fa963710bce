"""What is installed is what was tested: each dependency at one version, each file of it known by its digest."""

import pathlib
import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "requirements.lock").read_text("utf-8")
PIN = re.compile(r"^(\S+)==(\S+?)(?: ; ([^\\]+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
PINS = {canonicalize_name(found[1]): found[2] for found in PIN.finditer(TEXT)}


def test_every_line_is_a_pin_with_digests_and_no_place_to_get_it_from():
    left = [line for line in PIN.sub("", TEXT).splitlines() if line and not line.startswith("#")]
    assert not left, left[:3]
    assert len(PINS) == len(PIN.findall(TEXT)) > 80, "each once"
    assert not re.search(r"https?:|--index|--find-links|file:|@ ", TEXT)


def test_it_holds_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        wanted = Requirement(line)
        pinned = PINS[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(pinned, prereleases=True), f"{line}: {pinned} is locked"
