"""The vectorised ops give the same bits by every instruction set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import isa_bits
import pytest

from specextend import _C

ROOT = Path(__file__).resolve().parents[1]
FORCED = [*_C.cpu_isas(), "sse9"]


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


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", FORCED[len(isa_bits.runnable()) :])
def test_error_text_where_it_does_not_run(name):
    run = subprocess.run(
        [sys.executable, "-c", "from specextend import _C; _C.cpu_isa()"],
        env={**os.environ, "SPECEXTEND_CPU_ISA": name},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    runnable = ", ".join(isa_bits.runnable())
    said = f"SPECEXTEND_CPU_ISA must be one of {runnable} on this machine, got {name}"
    if name in _C.cpu_isas():
        said += ": the (processor lacks|operating system)"
    assert re.search(said, run.stderr), run.stderr
