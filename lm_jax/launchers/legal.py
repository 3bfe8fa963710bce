"""What may stand in a file that a cluster reads: known settings, names it accepts, commands without secrets."""

import difflib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from lm_jax import credentials
from lm_jax.errors import ConfigError
from lm_jax.launchers.job import Job

STOPPED = 75  # exit code of a run that was stopped and has saved: the same command goes on
LATE = 124  # of `timeout`, when the time was up
FINAL = (74, 77, 78, 79, LATE)  # of ends that the same command meets again: no room, damaged, diverged, too slow
REFUSED = 2  # the config cannot run; also, of several processes, that the others did not come in time, which may pass
GRACE = 300  # seconds that a run may take to save, where the machine has them: Spot gives 25 whatever is asked
# Each start of a point has its time limit, is then told to save, and ends as LATE. In the foreground, since otherwise
# GNU timeout passes on each signal twice, and a run that is told twice stops without saving.
TIMEOUT = ("timeout", "--foreground", f"--kill-after={GRACE}")
PORT = 8476  # of process 0, where the run's processes meet; as JAX does elsewhere

FORMS = {  # of a setting's text: what it must match, in words
    "word": (r"[^\s'\"\\$`;&|<>#]+", "one word without quotes or shell signs"),
    "name": (r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "small letters, digits, - and ."),
    "names": (r"[A-Za-z_]\w*(,[A-Za-z_]\w*)*", "names of environment variables, with commas"),
    "number": (r"\d{1,6}", "a whole number"),
    "switch": ("true|false", "true or false"),
    "path": (r"/[\w./-]+", "an absolute path of letters, digits, . _ and -"),
    "bucket": (r"([a-z][a-z0-9]*://)?[a-z0-9][-a-z0-9._/]*", "a bucket's name, or its URL as in gs://name"),
    "clock": (r"(\d+-)?\d+(:\d\d){0,2}", "Slurm's days-hours:minutes:seconds, or minutes"),
    "line": (r"[^\x00-\x1f]+", "one line"),
}
READ = {"number": int, "switch": lambda text: text == "true"}


@dataclass(frozen=True)
class Setting:
    """One thing that a launcher may be told; a `default` of None must be."""

    about: str
    form: str = "word"
    default: str | None = ""


def read(given: Mapping[str, str], known: Mapping[str, Setting], launcher: str) -> dict:
    """All settings of a launcher: text, "" where there is none; numbers and switches as what they are."""
    for key in given.keys() - known.keys():
        near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
        raise ConfigError(f"{launcher} has no setting {key!r}, did you mean {near!r}? There are {', '.join(known)}")
    found = {}
    for key, setting in known.items():
        text = given.get(key, setting.default)
        pattern, words = FORMS[setting.form]
        if text is None:
            raise ConfigError(f"{launcher} needs {key}: {setting.about} ({words})")
        if text and not re.fullmatch(pattern, text):
            raise ConfigError(f"{launcher}: {key}={text!r}: {setting.about}, wanted {words}")
        no_credential(f"{key}=", text)
        found[key] = READ[setting.form](text or "0") if setting.form in READ else text
    return found


def name(text: str, *, longest: int) -> str:
    """A sweep's name as clusters accept it (DNS-1123 that begins with a letter): `Chin_1` is chin-1."""
    legal = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not re.fullmatch(r"[a-z][-a-z0-9]*", legal):
        raise ConfigError(f"the sweep's name {text!r} must begin with a letter, to be the name of a cluster's job")
    if len(legal) > longest:
        raise ConfigError(f"the sweep's name {legal!r} has {len(legal)} letters, {longest} are allowed: shorten it")
    return legal


def checked(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, if each can be told from the others and none shows a credential."""
    if not jobs:
        raise ConfigError("no point is left to submit")
    for job in jobs:
        for point in {job.id, *job.points}:
            if not re.fullmatch(r"[0-9a-f]{12}", point):
                raise ConfigError(f"a point's id is twelve hex digits, not {point!r}")
        if any("\0" in word for word in job.argv):
            raise ConfigError(f"point {job.id}: a command cannot hold a zero byte")
        for word in job.argv:
            no_credential(f"point {job.id}: ", word)
    points = [point for job in jobs for point in job.points]
    if len(set(points)) < len(points):
        raise ConfigError("two points have the same id: their configs are equal")
    return list(jobs)


def no_credential(where: str, text: str):
    if found := credentials.shown(text):
        raise ConfigError(f"{where}{found[:3]}... looks like a credential, and files are no place for one: "
                          "keep it in the environment, or in the launcher's setting `secret`")


def seconds(job: Job) -> int:
    """Its time limit, as `timeout` takes it: 0 is none."""
    return math.ceil(60 * job.minutes)


def choice(jobs: Sequence[Job], variable: str) -> list[str]:
    """Lines of bash that make "$@" the command of the point whose number a variable holds, and "$limit" its seconds."""
    lines = [f'case "${variable}" in']
    lines += [f"{number}) point={job.id}; limit={seconds(job)}; set -- {shlex.join(job.argv)} ;;"
              for number, job in enumerate(jobs)]
    return [*lines, f'*) echo "no point ${variable} here" >&2; exit {REFUSED} ;;', "esac", 'echo "point $point"']


def on_bucket(jobs: Sequence[Job], mount: str, home: str):
    """Raise ConfigError unless what the jobs write survives their machines, which keep nothing but the bucket."""
    for result in (result for job in jobs for result in job.results):
        path = result if result.startswith("/") else f"{home}/{result}"
        if not path.startswith(f"{mount.rstrip('/')}/") or ".." in path.split("/"):
            raise ConfigError(f"{result} is not on the bucket, which the cluster sees at {mount}: begin --out with "
                              f"{mount}, or set mount to where it is")


def dump(documents: Sequence[dict]) -> str:
    """YAML that every parser reads as the same strings."""
    return yaml.dump_all(documents, Dumper=_Quoting, sort_keys=False, width=2**20, explicit_start=True)


class _Quoting(yaml.SafeDumper):
    """Quotes more than PyYAML would: to Go, which reads for Kubernetes, the id 123456e78901 is a number."""

    def ignore_aliases(self, data):
        return True


def _text(dumper: yaml.Dumper, text: str):
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9./-]*", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None if plain else '"')


_Quoting.add_representer(str, _text)
