"""Where and under what load a figure was measured: it stands at the head of every benchmark."""

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path

import jax

from lm_jax import devices, pages

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")


def record() -> dict:
    """The machine, the versions, the load as it is now."""
    device = jax.devices()[0]
    return {"time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "device": device.device_kind,
            "platform": device.platform, "devices": jax.device_count(), "cpu": cpu(), "cores": devices.cores(),
            "load": load(), "pages": pages.in_use(), "python": platform.python_version(), "versions": versions()}


def told(record: dict) -> str:
    """The same in two lines."""
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    load = ", ".join(f"{x:.1f}" for x in record["load"])
    return (f"{record['devices']} × {record['device']} ({record['platform']}); {record['cpu']}, {record['cores']} cores"
            f", load {load} over 1, 5, 15 minutes; {record['pages']} pages\n{record['time']}; Python "
            f"{record['python']}, {packages}")


def load() -> list[float]:
    """Processes that wanted a core, over the last 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()]


def cpu() -> str:
    """The processor's name, where the system tells."""
    try:
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the packages that are here, which are not imported for it."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
