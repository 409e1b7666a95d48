"""The vectorised ops give the same bits by every instruction set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import isa_bits

from specextend import _C

ROOT = Path(__file__).resolve().parents[1]


def test_same_bits():
    found = {}
    for isa in _C.cpu_isas():
        run = subprocess.run(
            [sys.executable, isa_bits.__file__],
            env={**os.environ, "SPECEXTEND_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if run.returncode == 0:
            found[isa] = json.loads(run.stdout)
        else:  # this machine does not run it
            assert "SPECEXTEND_CPU_ISA must be one of" in run.stderr, run.stderr
    assert _C.cpu_isas()[0] in found  # the plainest runs everywhere
    assert found == dict.fromkeys(found, {op: isa_bits.digest(op) for op in isa_bits.OPS})
