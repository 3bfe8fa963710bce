"""Huge pages for a benchmark's process: without them a GEMM whose operands are new to it waits for the kernel.

glibc reads its tunables before a program begins, so a program that wants them begins again. Both sides of a comparison
live in the one process and have the same setting.
"""

import os
import platform
import sys

TUNABLES = "GLIBC_TUNABLES"
HUGE = ("glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:"  # one arena: what other threads free is kept as well
        "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=68719476736")
KINDS = ("huge", "plain")


def begin_again(module: str, argv: list[str], kind: str):
    """Replace this process by itself under the asked kind of pages, where it is under another; else return."""
    wanted = environment(kind)
    if wanted.get(TUNABLES) != os.environ.get(TUNABLES):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", module, *argv[1:]], wanted)


def environment(kind: str) -> dict[str, str]:
    """The environment of a process under such pages; other tunables of the user's are kept."""
    kept = [each for each in os.environ.get(TUNABLES, "").split(":") if each and each not in HUGE.split(":")]
    wanted = kept + (HUGE.split(":") if kind == "huge" and platform.libc_ver()[0] == "glibc" else [])
    rest = {key: value for key, value in os.environ.items() if key != TUNABLES}
    return rest | ({TUNABLES: ":".join(wanted)} if wanted else {})


def in_use() -> str:
    """Which kind this process has."""
    return "huge" if HUGE in os.environ.get(TUNABLES, "") else "plain"
