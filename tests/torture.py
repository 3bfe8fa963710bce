"""Do to real training runs what must not harm them, again and again, and count what was lost.

    python tests/torture.py --runs=200

    kills       kill -9 at random moments after a start: while it restores, compiles, trains, evaluates, saves
    saves       kill -9 within a save: at its begin, amid its arrays, before its manifest, its name, the old one's end
    signals     SIGTERM at random moments
    schedules   three random faults, one a start: killed, stopped, stalled, an error, a full disk, in whatever phase
    flips       a random bit of a random file of the newest checkpoint
    damage      each file of the newest checkpoint deleted, cut, emptied, filled with zeros, a folder
    nothing     every checkpoint damaged: a start must end with code 79 and change nothing

After each of them the newest checkpoint must be no older than before, and bit for bit that of a run that was never
harmed, as must each step's loss up to there: so every batch was learned once and in order. A start must go on from it.
A run that was harmed and ended must equal the whole one. Lives are forked from a process that has imported everything
and started no device: they begin at once. Exit code 1 if anything was lost; the same --seed draws the same faults.
"""

import argparse
import atexit
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np

from lm_jax import errors, faults, seal, train
from lm_jax.checkpoint import Checkpoints

STEPS, EVERY = 24, 3  # steps of a run, and between its checkpoints
KILLS = 5  # of one run
SETTINGS = ["--config=configs/tiny.py", "--config.model.width=16", "--config.model.depth=1", "--config.data.length=64",
            "--config.data.sources=markov:documents=300,length=63", "--config.data.tokenizer=byte",
            f"--config.train.steps={STEPS}", "--config.train.batch=8", "--config.train.eval_every=8",
            "--config.train.log_every=1", "--config.optim.name=adamw",
            "--config.model.dropout=0.1", "--config.optim.ema=0.9"]
LIMIT = 300  # seconds after which a life has hung
FORKS = multiprocessing.get_context("forkserver")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="runs killed, bits flipped; of other faults a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, with commas between")
    args = parser.parse_args(argv[1:])
    if unknown := set(args.faults.split(",")) - FAULTS.keys():
        parser.error(f"--faults: no {unknown.pop()!r}; there are {', '.join(FAULTS)}")
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.pop("XLA_FLAGS", None)
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        FORKS.set_forkserver_preload(["lm_jax.train", "lm_jax.preflight.room", "lm_jax.recipes.run",
                                      "orbax.checkpoint", "tensorstore", "matplotlib.pyplot"])
        box = Box(Path(folder), args.jobs)
        print(f"{'':24} {'tried':>6} {'survived':>9} {'lost':>5} {'seconds':>8}", flush=True)
        for name in args.faults.split(","):
            begun, found = time.monotonic(), FAULTS[name](box, args.runs, random.Random(f"{args.seed} {name}"))
            for what in dict.fromkeys(what for what, _ in found):
                losses = [loss for told, loss in found if told == what]
                bad = list(filter(None, losses))
                print(f"{what:24} {len(losses):6} {len(losses) - len(bad):9} {len(bad):5} "
                      f"{time.monotonic() - begun:8.0f}", *(f"\n    {loss}" for loss in bad), flush=True)
                lost += len(bad)
    return int(lost > 0)


class Box:
    """A folder of runs; one of them, `whole`, was never harmed and has a checkpoint of each step.

    What harms a run is a generator of what was done and what it lost, "" for nothing.
    """

    def __init__(self, folder: Path, jobs: int):
        self.folder, self._pool, self._lock, self._made = folder, ThreadPoolExecutor(jobs), threading.Lock(), 0
        self.whole = folder / "whole"
        process = self.start(self.whole, keep=STEPS, every=1)  # which fills the cache of programs, too
        assert code(process) == 0, log(self.whole)
        self.steps = sorted(saved(self.whole))
        self.like = like(self.whole / "checkpoints" / str(self.steps[0]))
        self.states = {step: state(self, self.whole, step) for step in self.steps}
        begun, again = time.monotonic(), self.new()
        assert not (loss := ended(self, again)), loss
        self.life = time.monotonic() - begun  # seconds
        self.newest = self.whole / "checkpoints" / str(STEPS)

    def each(self, harm, tasks) -> list[tuple[str, str]]:
        """What `harm(box, run, task)` did to a run for each task, and what that lost."""

        def one(task):
            run, done = self.new(), []
            try:
                for what, loss in harm(self, run, task):
                    done.append((what, loss and f"{task}: {loss}"))
            except Exception as e:
                done.append(("not judged", f"{task}: {type(e).__name__}: {e}"))
            finally:
                shutil.rmtree(run, ignore_errors=True)
            return done

        return [done for all in self._pool.map(one, tasks) for done in all]

    def new(self) -> Path:
        with self._lock:
            self._made += 1
            return self.folder / f"run-{self._made}"

    def start(self, run: Path, faults: str = "", keep: int = 2, every: int = EVERY):
        """A start of the run, which goes on if there is something to go on from; what it says is in <run>.log."""
        argv = ["train", *SETTINGS, f"--config.train.keep={keep}", f"--config.train.checkpoint_every={every}",
                f"--config.data.root={self.folder / 'data'}", f"--workdir={run}"]
        Path(f"{run}.log").write_text("")
        process = FORKS.Process(target=live, args=(argv, f"{run}.log", faults))
        process.start()
        return process


def code(process) -> int:
    """The exit code of a life, which has so long."""
    process.join(LIMIT)
    process.kill()
    process.join()
    return process.exitcode


def live(argv, log, planned):
    """In a process of its own: `python -m lm_jax.train`."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ[faults.VARIABLE] = planned
    sys.argv = argv
    try:
        errors.run(train.main)
    finally:
        atexit._run_exitfuncs()  # a fork of multiprocessing leaves them out


def kills(box: Box, runs: int, rng):
    kill = partial(struck, by=signal.SIGKILL, kills=min(KILLS, runs))
    return box.each(kill, [rng.random() for _ in range(math.ceil(runs / KILLS))])


def signals(box: Box, runs: int, rng):
    return box.each(partial(struck, by=signal.SIGTERM), [rng.random() for _ in range(math.ceil(runs / KILLS / 5))])


def struck(box: Box, run: Path, seed: float, by, kills: int = KILLS):
    """Send a run a signal at random moments of its starts, then let it end."""
    rng, tried = random.Random(seed), 0
    while tried < kills:
        before, process = saved(run), box.start(run)
        process.join(rng.uniform(0, box.life))
        if hit := process.exitcode is None:
            os.kill(process.pid, by)
            tried += 1
        ended_with = code(process)
        loss = kept(box, run, before)
        if ended_with == -signal.SIGTERM and "attention by" in log(run):
            loss = "it was training, and did not save"
        if ended_with not in (0, -by, 75) or (ended_with == 75 and by == signal.SIGKILL):
            loss = f"code {ended_with}: {said(run)}"
        if hit:
            yield by.name, loss
        if ended_with == 0:
            shutil.rmtree(run)
    yield f"ended after {by.name}", ended(box, run)


def saves(box: Box, runs: int, rng):
    return box.each(crashed, [rng.random() for _ in range(math.ceil(runs / 10))])


def crashed(box: Box, run: Path, seed: float):
    """Kill a run in each part of a save, a start for each, then let it end."""
    parts = [place for place in faults.PLACES if place.startswith("save/")]
    for part in random.Random(seed).sample(parts, len(parts)):
        before = saved(run)
        ended_with = code(box.start(run, f"kill@{part}"))
        new, loss = saved(run) - before, kept(box, run, before)
        if ended_with != -signal.SIGKILL:
            loss = f"code {ended_with}: {said(run)}"
        elif bool(new) != (part == "save/collect"):
            loss = f"new checkpoints: {sorted(new)}"
        yield f"SIGKILL at {part}", loss
    yield "ended after these", ended(box, run)


def schedules(box: Box, runs: int, rng):
    kinds = ("kill", "segv", "exit", "error", "enospc", "term", "stall")
    places = lambda: rng.choice((*faults.PLACES, *["step"] * 4))
    fault = lambda: f"{rng.choice(kinds)}@{places()}=1..8:seed={rng.randrange(1000)}:seconds=0.5"
    return box.each(scheduled, [(fault(), fault(), fault()) for _ in range(math.ceil(runs / 10))])


def scheduled(box: Box, run: Path, schedule):
    """Start a run with one fault after another, then let it end."""
    for fault in schedule:
        before, ended_with = saved(run), code(box.start(run, fault))
        hung = f"it hung: {said(run)}" if ended_with == -signal.SIGKILL and "kill@" not in fault else ""
        yield "scheduled faults", hung or kept(box, run, before)
    yield "ended after schedules", ended(box, run)


def flips(box: Box, runs: int, rng) -> list[str]:
    def flip(path, seed):
        data, at = bytearray(path.read_bytes()), random.Random(seed).randrange(path.stat().st_size * 8)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)

    files = [file for file in contents(box) if (box.newest / file).stat().st_size]
    return box.each(partial(damaged, harm=flip), [(rng.choice(files), rng.random()) for _ in range(runs)])


def damage(box: Box, runs: int, rng) -> list[str]:
    harms = {"delete": lambda path, _: path.unlink(),
             "cut": lambda path, _: os.truncate(path, rng.randrange(path.stat().st_size or 1)),
             "empty": lambda path, _: os.truncate(path, 0),
             "zeros": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
             "folder": lambda path, _: (path.unlink(), path.mkdir())}
    found = []
    for name, harm in harms.items():
        hit = [file for file in contents(box) if (box.newest / file).stat().st_size or name in ("delete", "folder")]
        found += box.each(partial(damaged, harm=harm), [(file, name) for file in hit])
    return found


def damaged(box: Box, run: Path, task, harm):
    """Harm one file of the newest checkpoint: its restore must take the one before."""
    (file, how), older = task, box.steps[-2]
    for step in (older, STEPS):
        shutil.copytree(box.whole / "checkpoints" / str(step), run / "checkpoints" / str(step))
    folder = run / "checkpoints"
    harm(folder / str(STEPS) / file, how)
    step, tree, _ = Checkpoints(folder, keep=2, say=lambda line: None).restore(box.like)
    loss = "" if digest(tree) == box.states[older][0] else "what was restored is not what was saved"
    if step != older or not (folder / f"{STEPS}.bad").is_dir():
        loss = f"step {step} was restored"
    yield how if isinstance(how, str) else "flipped bits", loss


def nothing(box: Box, runs: int, rng):
    return box.each(hopeless, range(math.ceil(runs / 100)))


def hopeless(box: Box, run: Path, task):
    """Damage all checkpoints of a run: a start, and one more, must refuse."""
    shutil.copytree(box.whole, run)
    for step in saved(run):
        os.truncate(run / "checkpoints" / str(step) / seal.NAME, 5)
    rows = (run / "metrics.jsonl").read_bytes()
    codes = [code(box.start(run, keep=STEPS, every=1)) for _ in range(2)]
    same = rows == (run / "metrics.jsonl").read_bytes()
    yield "no checkpoint intact", "" if codes == [79, 79] and same else f"codes {codes}: {said(run)}"


def ended(box: Box, run: Path) -> str:
    """Let a run end: it must go on from all that was saved, and be what a whole one is."""
    before, ended_with = saved(run), code(box.start(run))
    if ended_with or (loss := kept(box, run, before)):
        return f"code {ended_with}: {said(run)}" if ended_with else loss
    if left := [path.name for path in (run / "checkpoints").iterdir() if not path.name.isdecimal()]:
        return f"left in its checkpoints: {left}"
    return "" if max(saved(run)) == STEPS else f"it ended with {sorted(saved(run))}"


def kept(box: Box, run: Path, before: set[int]) -> str:
    """After a start: whether it went on from the newest of what had been saved, and has now what it must have."""
    resumed = re.search(r"resumed at step (\d+)", text := log(run))
    if int(resumed[1]) != max(before, default=0) if resumed else before and "attention by" in text:
        return f"it began {resumed[0] if resumed else 'afresh'} where {sorted(before)} were saved"
    now = saved(run)
    if max(now, default=0) < max(before, default=0):
        return f"{sorted(before)} were saved, and {sorted(now)} are left"
    others = [path.name for path in (run / "checkpoints").glob("*") if not path.name.isdecimal()]
    if len(others) > 1 or ".bad" in " ".join(others):
        return f"left in its checkpoints: {others}"
    for step in now:
        if state(box, run, step) != box.states[step]:
            return f"checkpoint {step} or the rows up to it are not those of a run that was not harmed"
    return ""


def saved(run: Path) -> set[int]:
    """Steps of the checkpoints that are committed."""
    return set(Checkpoints(run / "checkpoints").steps())


def state(box: Box, run: Path, step: int) -> tuple:
    """What a run had learned at a checkpoint: a digest of its arrays, its data position, and the row of each step."""
    found, tree, extra = Checkpoints(run / "checkpoints").restore(box.like, most=step)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            if line.endswith("\n")]  # what a kill cut off goes at the next start
    return digest(tree), found, extra["batches"], [
        (row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in rows
        if "tag" not in row and row["step"] <= step]


def digest(tree) -> str:
    """Of every bit of a dict of arrays."""
    parts = (f"{name} {np.asarray(leaf).tobytes().hex()}" for name, leaf in sorted(tree.items()))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def like(folder: Path) -> dict:
    """Shapes and dtypes of a checkpoint's leaves, from its manifest."""
    return {name: jax.ShapeDtypeStruct(json.loads(text[text.index("["):]), np.dtype(text[:text.index("[")]))
            for name, text in seal.read(folder)["leaves"].items()}


def contents(box: Box) -> list[Path]:
    return sorted(path.relative_to(box.newest) for path in box.newest.rglob("*") if path.is_file())


def log(run: Path) -> str:
    """What the last start of a run said."""
    file = Path(f"{run}.log")
    return file.read_text() if file.exists() else ""


def said(run: Path) -> str:
    return log(run)[-600:]


FAULTS = {"kills": kills, "saves": saves, "signals": signals, "schedules": schedules, "flips": flips, "damage": damage,
          "nothing": nothing}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
