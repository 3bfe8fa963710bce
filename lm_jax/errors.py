"""How a program ends when something other than its code is wrong: errors with a message for people and an exit code."""

import errno
import os
import select
import sys
import threading
import traceback

from lm_jax import credentials

AGAIN = "interrupted; the same command goes on from what was saved"
MEMORY = "lower train.batch or data.length, raise train.microbatches, or set model.remat='full'"


def run(main, *, again: str = AGAIN, memory: str = MEMORY):
    """Call `main(argv)` as a program: what a user can cure is one readable message and an exit code, never a traceback.
    `again` is what an interruption is answered with, `memory` what cures too little of it. What takes seconds to import
    a main imports when its flags are read: neither --help nor a misspelt flag waits for it.

    Codes are an interface: 0 done, 2 the config cannot run, 74 no room on a disk, 75 stopped and saved, 76 hung, 77
    data are damaged, 78 diverged, 79 no intact checkpoint, 130 interrupted, 141 nobody reads standard output any more,
    as after `| head`: in silence. What is left, a bug, is a traceback and 1.
    """
    try:
        code = main(sys.argv)
        sys.stdout.flush()
        sys.exit(code)
    except (Exception, Stopped, KeyboardInterrupt) as e:
        if isinstance(e, BrokenPipeError) and _unread():
            sys.exit(141)
        if (found := told(e, again=again, memory=memory)) is None:
            raise
    message, code = found
    print(f"error: {credentials.masked(message)}", file=sys.stderr)
    sys.exit(code)


def told(error: BaseException, *, again: str = AGAIN, memory: str = MEMORY) -> tuple[str, int] | None:
    """What people are told of an error, and the exit code; None for a bug."""
    if isinstance(error, (Failure, Stopped)):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return again, 130
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error}: make room, and run the same command to go on from what was saved", 74
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # as JAX raises it
        return f"{str(error).splitlines()[0][:200]}: {memory}", 2
    return None


def stacks() -> str:
    """Where each thread is, the innermost call first; nothing is read or written for it, and so nothing waited for."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    where = lambda frame: "\n".join(f'  File "{inner.f_code.co_filename}", line {line}, in {inner.f_code.co_name}'
                                    for inner, line in traceback.walk_stack(frame))
    return "\n\n".join(f"Thread {names.get(number, number)}:\n{where(frame)}"
                       for number, frame in sys._current_frames().items())


class Failure(Exception):
    """An end that is no bug: the message names what is wrong and the cure, `run` prints it and exits with `code`."""

    code = 1


class ConfigError(Failure, ValueError):
    """A configuration that cannot run; the message names the key and the cure. Retrying cannot help."""

    code = 2


class DataError(ConfigError):
    """Files that are damaged, or are not what was written; the message names the file."""

    code = 77


class Stopped(BaseException):
    """A signal came where nothing is changed that is not on the disk. No Exception: nobody who deals with what failed
    keeps it from the program's end."""

    code = 75


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: a disk, a quota, a limit of the shell
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)  # no file can be made there


def _unread() -> bool:
    """Whether nobody reads standard output any more; if so, what it still holds is dropped."""
    out = sys.stdout.fileno()
    poll = select.poll()
    poll.register(out, 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return gone
