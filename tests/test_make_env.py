"""Tests what `make` says where something is missing."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "tools" / "make_env.py"


@pytest.fixture
def make_env():
    if not SOURCE.exists():
        pytest.skip("tools/ is not part of this installation")
    spec = importlib.util.spec_from_file_location("make_env", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_missing_module(make_env, monkeypatch, module):
    ask = make_env.ask
    monkeypatch.setattr(
        make_env, "ask", lambda py, code: None if code == f"import {module}" else ask(py, code)
    )
    with pytest.raises(SystemExit, match=rf"has no module {module}: install it .*-venv\)"):
        make_env.check_machine()


def test_missing_header(make_env, monkeypatch, tmp_path):
    monkeypatch.setattr(make_env.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"Python\.h is missing: install Python's headers"):
        make_env.check_machine()


def test_old_python(make_env, monkeypatch):
    monkeypatch.setattr(make_env.sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"Python >= 3\.10 is wanted, .* is 3\.9"):
        make_env.check_machine()


def test_compiler(make_env, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"there is no C\+\+ compiler \(no-such-compiler\)"):
        make_env.check_compiler()
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho unknown option -std=c++17 >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(SystemExit, match=r"does not build a C\+\+17 program:\nunknown option"):
        make_env.check_compiler()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not there")
def test_python_that_is_not_there():
    command = ["make", "env", "PYTHON=no-such-python", "VENV=build/no-such-environment"]
    ran = subprocess.run(command, cwd=SOURCE.parents[1], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "no-such-python is not there: install Python >= 3.10" in ran.stderr


def test_ranges_are_those_of_the_project(make_env):
    project = (SOURCE.parents[1] / "pyproject.toml").read_text()
    ranges = make_env.ranges()
    assert {"numpy", "torch", "transformers", "rich", "pytest"} & ranges.keys() == (
        {"torch", "transformers", "rich", "pytest"}  # numpy may be of any version
    )
    assert all(f'"{name}{allowed}"' in project for name, allowed in ranges.items())


@pytest.mark.parametrize(
    "version, inside",
    [("2.10.0+cu128", True), ("2.15.1", True), ("2.9.1", False), ("2.16.0", False), ("3.0", False)],
)
def test_a_torch_outside_the_range_is_not_used(make_env, monkeypatch, capsys, version, inside):
    monkeypatch.setattr(make_env, "ask", lambda python, code: version)
    assert make_env.own_torch(">=2.10,<2.16") == (version if inside else None)
    assert ("is not >=2.10,<2.16: not used" in capsys.readouterr().out) is not inside
    assert make_env.is_installed("python", "torch", "") and make_env.is_in(version, "")
