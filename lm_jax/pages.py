"""Memory pages of a process: on a CPU, training waits for the kernel wherever its arrays lie on pages new to it.

glibc gives back what a step has freed, and the next step takes it anew, page by page; with large pages that are kept, a
step of ten million parameters takes four fifths of the time (docs/performance.md). glibc reads its tunables before a
program begins, so a program that wants others begins again.
"""

import os
import platform
import sys

from lm_jax import devices

TUNABLES = "GLIBC_TUNABLES"
HUGE = ("glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:"  # one arena: what other threads free is kept as well
        "glibc.malloc.mmap_threshold=1099511627776:glibc.malloc.trim_threshold=1099511627776")  # more than any step has


def settle():
    """Large pages for a program that trains, where arrays are the host's and the user has not set malloc himself."""
    if TUNABLES not in os.environ and devices.accelerators()[0] == "cpu":
        begin_again("huge")


def begin_again(kind: str):
    """Replace this process by itself under the asked kind of pages, where it is under another; else return."""
    wanted = environment(kind)
    if wanted.get(TUNABLES) != os.environ.get(TUNABLES):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def environment(kind: str) -> dict[str, str]:
    """The environment of a process under such pages; other tunables of the user's are kept."""
    kept = [each for each in os.environ.get(TUNABLES, "").split(":") if each and each not in HUGE.split(":")]
    wanted = kept + (HUGE.split(":") if kind == "huge" and platform.libc_ver()[0] == "glibc" else [])
    rest = {key: value for key, value in os.environ.items() if key != TUNABLES}
    return rest | ({TUNABLES: ":".join(wanted)} if wanted else {})


def in_use() -> str:
    """Which kind this process has."""
    return "huge" if HUGE in os.environ.get(TUNABLES, "") else "plain"
