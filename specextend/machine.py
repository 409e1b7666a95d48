"""Knows the machine: what a measurement was made on, and what a command runs on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from . import _C, __version__
from .errors import UsageError

#: values of ``--dtype``; "auto": as the checkpoint is
DTYPES = ("auto", "float32", "bfloat16", "float16")

#: what options say of ``--device``
DEVICE_HELP = '[a GPU if there is one, else "cpu"]'

CGROUPS = Path("/sys/fs/cgroup")
ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    """Return the processor's name as it gives it, or the kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def choose_device(name: str | None) -> torch.device:
    """Return the device of ``--device``, once it is known that models can run there.

    Args:
        name: "cpu", "cuda" or "cuda:N"; None: a GPU that the compiled module has kernels for, if
            there is one, else the CPU.

    Raises:
        UsageError: it is another name, or there is no such GPU.
    """
    if name is None:
        return torch.device("cuda" if _C.has_cuda and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda":
        if not _C.has_cuda:
            raise UsageError(
                f"--device {name}: specextend was built without CUDA kernels; install it with "
                "nvcc and SPECEXTEND_CUDA=ON"
            )
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: torch sees {count} GPUs")
    return device


def device_text(device: torch.device) -> str:
    """Describe a device for a person: the GPU, or the processor and its threads."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads != 1)}"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on a device, None where nobody says.

    On a GPU what the driver has, and what torch holds in reserve; in main memory, on Linux, what
    can be had without swapping, and within the limits of control groups (cgroups(7)).
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        text = Path("/proc/meminfo").read_text()
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    left = [int(found[1]) * 1024] if found else []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.strip("/")
        # Every group above has a limit of its own. Inside a container the path may not be there.
        folders = [folder, *folder.parents]
        for above in folders[: folders.index(root) + 1]:
            left += _left_in_group(above, *names)
    return max(min(left), 0) if left else None


def _left_in_group(folder: Path, limit: str, usage: str, cache: str) -> list[int]:
    """Return how many bytes a control group may still take, nothing where it has no limit."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        found = re.search(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return []
    if not most.isdecimal():  # "max"
        return []
    # Pages of files count as used, and are given back when memory is wanted.
    return [int(most) - used + (int(found[1]) if found else 0)]


def num_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """Name the commit of the checkout that this package is in, "-dirty" if files were changed."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _program() -> str:
    """Name what was started: the command, or a file of this checkout, without the folders above."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return path.parent.name
    if path.is_file() and path.resolve().is_relative_to(ROOT):
        return str(path.resolve().relative_to(ROOT))
    return path.name


def header(device: str = "cpu") -> dict:
    """Return machine, versions, commit, command line and time, as plain data.

    Args:
        device: "cpu" or "cuda"; a GPU is described where it is what is measured.
    """
    machine = {
        "processor": processor(),
        "cores": num_cores(),
        "isa": _C.cpu_isa(),
        "system": platform.platform(),
        "gpu": None,
    }
    if torch.device(device).type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
        machine |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": driver[0] if driver else None,
            "cuda": torch.version.cuda,
        }
    return {
        "version": __version__,
        "machine": machine,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),  # without importing it, which takes long
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "device": device,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
