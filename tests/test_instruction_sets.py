"""The vectorised ops give the same bits by every instruction set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import isa_bits
import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_same_bits():
    found = {}
    for isa in isa_bits.runnable()[:-1]:
        run = subprocess.run(
            [sys.executable, isa_bits.__file__],
            env={**os.environ, "SPECEXTEND_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        found[isa] = json.loads(run.stdout)
    assert found == dict.fromkeys(found, {op: isa_bits.digest(op) for op in isa_bits.OPS})


def test_kernels_see_no_std_containers():
    """Inline code that others share must not be compiled for one machine alone."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    run = subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-Icsrc",
            "-DSPECEXTEND_ISA=baseline",
            "-M",
            "csrc/cpu/isa/baseline.cpp",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = {Path(name).name for name in run.stdout.split()}
    assert "row_block.h" in seen
    containers = {"array", "functional", "map", "memory", "optional", "string", "vector"}
    assert not seen & containers
