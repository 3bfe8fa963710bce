"""What the processes of a run tell each other beside the devices: words under names, in a store that process 0 keeps.

A wait has a name and a limit, and where it ends in vain it says who did not come. No device takes part, so that a wait
may last for hours, and a process whose devices wait for another can still be told why.
"""

import itertools
import json
import os
import sys
import threading
import time

import jax
from jax._src import distributed  # its key-value store

from lm_jax import credentials, lease
from lm_jax.errors import Failure

BRIEF = 600.0  # seconds for what all processes do alike, on machines of which one may be slow
LONG = 5400.0  # for what moves the bytes of a whole model
ENDLESS = 7 * 86_400.0  # for what one process does while the others wait, such as preparing data
PARTING = 5.0  # for an answer of processes that are to end; less than what JAX takes to miss one
SLICE = 1.0  # of a wait, after which signals are heard
_asked = itertools.count()  # questions so far: the same on all processes, which ask the same in the same order
PAGE = 64  # questions; when all have come to the first of a page, what was said on the one before it is thrown away


class LostError(Failure):
    """A process of the run is gone, or does not come to where the others wait for it. The same command goes on."""

    code = 76


def number() -> int:
    """Of this process; no device is started for it."""
    return distributed.global_state.process_id


def count() -> int:
    """Processes of the run."""
    return distributed.global_state.num_processes if distributed.global_state.client else 1


def exchange(name: str, text: str, *, limit: float = BRIEF) -> list[str]:
    """What each process has to say under a name; all ask in the same order, and go on when all have said it.

    LostError names those that have not come in `limit` seconds.
    """
    return [text] if count() == 1 else _gathered(next(_asked), name, text, limit)


def told(name: str, value, *, limit: float = BRIEF):
    """What process 0 has to say under a name, as JSON has it: it says so and goes on, and the others wait for it."""
    text = json.dumps(value)
    if count() > 1 and (asked := next(_asked)) % PAGE == 0:
        text = _gathered(asked, name, text, limit)[0]
    elif count() > 1 and number() == 0:
        put(f"{_place(asked)}/answer", text)
    elif count() > 1 and (text := get(f"{_place(asked)}/answer", limit)) is None:
        raise _lost("0", name, limit)
    return json.loads(text)


def put(key: str, text: str):
    """Say a word under a key, in place of an older one."""
    _store().key_value_set(f"lm_jax/{key}", text, allow_overwrite=True)


def get(key: str, seconds: float) -> str | None:
    """The word under a key, when it is said; None if it is not in so many seconds."""
    end = time.monotonic() + seconds
    while True:
        part = max(0.001, min(SLICE, end - time.monotonic()))
        try:
            return _store().blocking_key_value_get(f"lm_jax/{key}", int(1000 * part) or 1)
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                raise
        if time.monotonic() >= end:
            return None


def found(key: str) -> dict[str, str]:
    """What there is under `key/`."""
    return {name.rpartition("/")[2]: word for name, word in _store().key_value_dir_get(f"lm_jax/{key}/")}


def take_back(key: str):
    """Unsay the word under a key."""
    _store().key_value_delete(f"lm_jax/{key}")


def tell(code: int, why: str):
    """News for all processes: that this one ends with a code, which they do too, and why. `news` reads them."""
    for n in itertools.count() if count() > 1 else ():
        try:
            text = json.dumps({"process": number(), "code": code, "why": why})
            return _store().key_value_set(f"lm_jax/news/{n}", text)
        except jax.errors.JaxRuntimeError as e:
            if "ALREADY_EXISTS" not in str(e):
                raise


def news(over: threading.Event):
    """All news as they come, until `over`: {"process", "code", "why"}."""
    for n in itertools.count():
        while (text := get(f"news/{n}", SLICE)) is None:
            if over.is_set():
                return
        yield json.loads(text)


def depart(code: int, message: str, *, limit: float = PARTING):
    """End this process now, whatever its threads do, and not before the others can do without it.

    Process 0, whose store the others need, is the last; those that do not answer are named, and make of an unexplained
    end (code 1) that of one which hangs.
    """
    sys.stdout.flush()
    print(f"error: {credentials.masked(message)}", file=sys.stderr, flush=True)
    letting = threading.Thread(target=lease.let_go, daemon=True)
    letting.start()
    if count() > 1 and (missing := _parted(limit)):
        print(f"error: process {missing} does not answer: it was killed, or its host or network is lost; the same "
              "command goes on from what was saved", file=sys.stderr, flush=True)
        code = LostError.code if code == 1 else code
    letting.join(2.0)  # a disk that is away is not waited for
    os._exit(code)


def _parted(limit: float) -> str:
    """Who is missing, when all others have come here."""
    try:
        put(f"left/{number()}", "")
        if number():
            missing = get("all left", limit + PARTING)
            return "0" if missing is None else missing
        put("all left", missing := _missing("left", range(1, count()), limit))
        time.sleep(SLICE)  # in which the others read that
        return missing
    except jax.errors.JaxRuntimeError:
        return "0"


def _gathered(asked: int, name: str, text: str, limit: float) -> list[str]:
    """The words of all, which process 0 gathers: each of the others asks the store once, however many there are."""
    place = _place(asked)
    put(f"{place}/said/{number()}", text)
    if number() == 0:
        missing, words = _missing(f"{place}/said", range(1, count()), limit), found(f"{place}/said")
        put(f"{place}/answer", json.dumps([missing, words]))
        if asked % PAGE == 0 and not missing:
            take_back(_place(asked - 1).rpartition("/")[0])
    else:
        missing, words = json.loads(get(f"{place}/answer", limit + PARTING) or '["0", {}]')
    if missing:
        raise _lost(missing, name, limit)
    return [words[str(n)] for n in range(count())]


def _place(asked: int) -> str:
    return f"asked/{asked // PAGE}/{asked}"


def _lost(missing: str, name: str, limit: float) -> LostError:
    return LostError(f"process {missing} did not come to {name!r} in {limit:g} s, where others wait: look for what "
                     "keeps it; the same command goes on from what was saved")


def _missing(name: str, numbers, limit: float) -> str:
    """Those of the processes that have not said their word in so many seconds, with commas between."""
    end = time.monotonic() + limit
    for n in numbers:
        if get(f"{name}/{n}", max(0.0, end - time.monotonic())) is None:
            break
    else:
        return ""
    words = found(name)
    return ", ".join(str(n) for n in numbers if str(n) not in words)


def _store():
    return distributed.global_state.client
