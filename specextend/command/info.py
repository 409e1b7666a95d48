"""``specextend info``: says what was built, and what it runs on."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata

import torch

from .. import _C, __version__, assets

SUMMARY = "say what was built, and what it runs on"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def facts() -> dict:
    """Say what was built, and what it runs on."""
    archs = [arch.removesuffix("-real") for arch in _C.cuda_archs.split(",") if arch]
    if _C.has_sm90a:
        archs.append("90a")
    return {
        "specextend": __version__,
        "cuda_archs": archs,
        "cpu_isas": _C.cpu_isas(),
        "cpu_isa": _C.cpu_isa(),
        "torch_built_with": _C.torch_version,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "embedded_models": (assets.target_path() / "config.json").exists(),
    }


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    found = facts()
    if args.json:
        print(json.dumps(found))
        return 0
    archs = ", ".join(f"sm_{arch}" for arch in found["cuda_archs"])
    rows = {
        "specextend": found["specextend"],
        "CUDA kernels": archs or "not built",
        "CPU kernels": f"{', '.join(found['cpu_isas'])}; in use: {found['cpu_isa']}",
        "torch": f"{found['torch']} (built with {found['torch_built_with']})",
        "transformers": found["transformers"],
        "Python": found["python"],
        "threads": found["threads"],
        "embedded models": "yes" if found["embedded_models"] else "no",
    }
    for name, value in rows.items():
        print(f"{name:<16} {value}")
    return 0
