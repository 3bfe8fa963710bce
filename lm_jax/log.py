"""Where a run's numbers go: metrics.jsonl always, TensorBoard and W&B on demand, a bar or lines for whoever watches."""

import importlib
import json
import resource
import secrets
import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm_jax.config import ConfigError
from lm_jax.workdir import Workdir, plain

def peak_memory() -> dict[str, int]:
    """Most bytes ever in use: of this process, and of its fullest device where the backend tells."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host_memory_peak": host} | ({"device_memory_peak": device} if device else {})


class Log:
    """The records of a run that goes to `steps`, and goes on after `start`.

    `row` takes the numbers of a training step (`loss`, `tokens`, ...), `evaluation` those of a validation set
    (`val_loss`, `val_loss_stderr`, `tokens`, ...); either is one flat row of metrics.jsonl. The bar shows these keys
    where a row has them: loss, tokens_per_second, mfu and data_wait_fraction. `loggers` as in the config; a missing
    package is a ConfigError at once. Of several processes only the one that writes the workdir records and speaks;
    `quiet` records without a bar.
    """

    def __init__(self, workdir: Workdir, *, steps: int, start: int = 0, loggers: str = "", config: dict | None = None,
                 quiet: bool = False):
        names = [name for name in loggers.split(",") if name] if workdir.writes else []
        self._loggers = [LOGGERS[name](workdir, start, config or {}) for name in names]
        self._quiet = not workdir.writes
        self._file = None if self._quiet else open(workdir.metrics, "a", buffering=1)
        self._progress = None if self._quiet else (_Silent if quiet else _watched())(steps, start)

    def row(self, step: int, values: dict):
        """Record a training step."""
        if self._record({"step": step, **values}, "train/"):
            self._progress.update(step, values)

    def evaluation(self, step: int, tag: str, values: dict):
        """Record a validation set's results, in a row of its own that says `tag`."""
        if self._record({"step": step, "tag": tag, **values}, f"{tag}/"):
            numbers = (f"{key} {value:.4f}" for key, value in plain(values).items() if isinstance(value, float))
            self.say(" · ".join([f"step {step}", tag, *numbers]))

    def say(self, text: str):
        """Print a line, above the bar if there is one."""
        if not self._quiet:
            self._progress.say(text)

    def close(self):
        """Finish the bar and flush every logger."""
        if self._quiet:
            return
        self._progress.close()
        for logger in self._loggers:
            logger.close()
        self._file.close()

    def _record(self, row, prefix) -> bool:
        if self._quiet:
            return False
        row = plain(row)
        try:
            self._file.write(json.dumps(row) + "\n")  # one write a row: a kill can cut the last one only
        except OSError as e:
            e.filename = self._file.name
            raise
        for logger in self._loggers:
            logger.write(row["step"], {prefix + key: value for key, value in row.items()
                                       if isinstance(value, (int, float)) and key != "step"})
        return True


class _TensorBoard:
    def __init__(self, workdir, start, config):
        package = _package("tensorboardX", "tensorboard")
        self._writer = package.SummaryWriter(str(workdir.path / "tensorboard"), purge_step=start + 1)

    def write(self, step, values):
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self):
        self._writer.close()


class _Wandb:
    def __init__(self, workdir, start, config):
        package = _package("wandb", "wandb")
        record = workdir.read_json("wandb.json") or {"id": secrets.token_hex(4)}  # a run that goes on is one run there
        workdir.write_json("wandb.json", record)
        self._run = package.init(project="lm_jax", name=workdir.path.name, dir=str(workdir.path), config=config,
                                 id=record["id"], resume="allow")

    def write(self, step, values):
        self._run.log(values, step=step)

    def close(self):
        self._run.finish()


LOGGERS = {"tensorboard": _TensorBoard, "wandb": _Wandb}


class _Bar:
    """A progress bar on a terminal."""

    def __init__(self, steps, start):
        self._progress = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=12), TextColumn("{task.fields[status]}"), TextColumn("left"),
            TimeRemainingColumn(compact=True), refresh_per_second=4, speed_estimate_period=60)
        self._task = self._progress.add_task("", total=steps, completed=start, status="")
        self._progress.start()

    def update(self, step, values):
        self._progress.update(self._task, completed=step, status=_status(values))

    def say(self, text):
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self):
        self._progress.stop()


class _Lines:
    """Where no terminal is: a line for the first and the last step, and one every ten seconds."""

    def __init__(self, steps, start):
        self._steps, self._start = steps, start
        self._begun = time.monotonic()
        self._last = -1e9

    def update(self, step, values):
        now = time.monotonic()
        if now - self._last < 10 and step < self._steps:
            return
        left = (now - self._begun) / max(1, step - self._start) * (self._steps - step)
        self._last = now
        self.say(f"step {step}/{self._steps} · {_status(values)} · left {int(left // 60)}:{int(left % 60):02d}")

    def say(self, text):
        print(text, flush=True)

    def close(self):
        pass


class _Silent(_Lines):
    """Of a run among others, which are watched together."""

    def update(self, step, values):
        pass

    def say(self, text):
        pass


def _watched():
    """The bar for a terminal that can redraw a line, else lines."""
    return _Bar if sys.stdout.isatty() and not Console().is_dumb_terminal else _Lines


def _status(values) -> str:
    """What a watcher wants to know of a step, in 60 columns."""
    parts = {"loss": "loss {:.3f}".format, "tokens_per_second": lambda rate: f"{_amount(rate)} tokens/s",
             "mfu": "MFU {:.0%}".format, "data_wait_fraction": "wait {:.0%}".format}
    return " · ".join(text(float(values[key])) for key, text in parts.items() if values.get(key) is not None)


def _amount(n: float) -> str:
    """A rate as 950.0 or 1.2M."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if n >= unit), (1, ""))
    return f"{n / unit:.1f}{name}"


def _package(name, extra):
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(f"train.loggers has {extra!r}, which needs {name}: pip install 'lm_jax[{extra}]', or leave "
                          "it out of train.loggers") from e
