"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path


def test_python_blocks(capsys):
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) > 1  # mean acceptance length
