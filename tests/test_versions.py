"""Tests which versions of torch and `transformers` are taken, refused, and tried."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from specextend import compat, versions

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"


@pytest.fixture
def project() -> str:
    return (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def smoke(monkeypatch):
    if not TOOLS.exists():
        pytest.skip("tools/ is not part of this installation")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("smoke")


class TestRanges:
    @pytest.mark.parametrize("name", ["torch", "transformers"])
    def test_are_those_of_the_project(self, project, name):
        line = re.search(rf'^  "({name}[<>=].*)",$', project, re.MULTILINE)[1]
        allowed = versions.supported(name)
        assert allowed == Requirement(line).specifier
        assert {clause.operator for clause in allowed} == {">=", "<"}

    def test_hold_what_is_pinned_and_what_is_here(self):
        for line in (ROOT / "constraints.txt").read_text().splitlines():
            name, _, version = line.partition("==")
            if name in ("torch", "transformers"):
                assert versions.supported(name).contains(version)
        versions.check("torch", torch.__version__)
        versions.check("transformers", transformers.__version__)

    def test_the_oldest_that_are_tried_are_the_lower_ends(self, smoke):
        for name, version in smoke.OLDEST.items():
            allowed = versions.supported(name)
            least = next(Version(c.version) for c in allowed if c.operator == ">=")
            assert allowed.contains(version) and Version(version).release[:2] == least.release[:2]

    @pytest.mark.parametrize("version", ["2.9.1+cpu", "2.16.0", "2.16.0.dev20260101", "3.0"])
    def test_outside(self, monkeypatch, version):
        lines = ["numpy", "torch<2.16,>=2.10", 'torchvision>=1; extra == "x"']
        monkeypatch.setattr(versions.metadata, "requires", lambda name: lines)
        with pytest.raises(ImportError) as error:
            versions.check("torch", version)
        assert str(error.value) == (
            f"specextend works with torch >=2.10, <2.16, found torch {version}; install one of "
            "these: pip install 'torch>=2.10,<2.16'"
        )
        versions.check("torch", "2.10.0+cu128")
        versions.check("torch", "2.15.1")
        versions.check("torch", "2.15.0a0+git12")

    def test_not_installed(self, monkeypatch):
        def missing(name):
            raise versions.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(versions.metadata, "requires", missing)
        versions.check("torch", "1.0")


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "package, code",
    [
        ("torch", "import specextend._C"),
        ("transformers", "from specextend import SpecExtend"),
        ("transformers", "from specextend import cli; sys.exit(cli.main(['generate']))"),
    ],
)
def test_what_a_user_sees(package, code, tmp_path):
    """The error is the range, not an argument that is unknown or a name that is not there."""
    change = f"import sys, {package}; {package}.__version__ = '99.0'; {code}"
    command = [sys.executable, "-c", change]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, input="")
    assert ran.returncode != 0
    last = ran.stderr.splitlines()[-1]
    assert f"specextend works with {package} >=" in last and f"found {package} 99.0" in last


def test_the_kernels_alone_ask_for_no_transformers(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; import specextend; specextend.ops"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "version, name",
    [("5.10.4", "past_key_values"), ("5.23.0", "past_key_values"), ("5.24.0", "cache")],
)
def test_the_name_of_the_cache(monkeypatch, version, name):
    try:
        with monkeypatch.context() as patch:
            # Not the name above: transformers may put another module in its place.
            patch.setattr(sys.modules["transformers"], "__version__", version)
            assert importlib.reload(compat).CACHE == name
    finally:
        importlib.reload(compat)


INSIDE = {"torch": "2.15.0", "transformers": "5.24.0"}
AFTER = {"torch": "2.15.0", "transformers": "5.25.0"}
BETWEEN = {"torch": "2.14.1", "transformers": "5.23.0"}
LATER = {"torch": "2.16.0", "transformers": "5.26.0"}


class TestNewest:
    """Tests what `make test-newest` tries, and what fails it."""

    @pytest.mark.parametrize(
        "there, two_weeks_ago, failing, passes, tried",
        [
            (INSIDE, None, [], True, [INSIDE]),
            (INSIDE, None, [INSIDE], False, [INSIDE]),
            (AFTER, None, [], True, [INSIDE, AFTER]),
            (AFTER, None, [INSIDE], False, [INSIDE, AFTER]),
            # It fails, and is old, or of an age that nobody knows.
            (AFTER, AFTER, [AFTER], False, [INSIDE, AFTER]),
            (AFTER, None, [AFTER], False, [INSIDE, AFTER]),
            # It fails, and is young; what is old enough is within the range.
            (AFTER, INSIDE, [AFTER], True, [INSIDE, AFTER]),
            (AFTER, BETWEEN, [AFTER], True, [INSIDE, AFTER]),
            (AFTER, BETWEEN, [AFTER, INSIDE], False, [INSIDE, AFTER]),
            # Releases follow each other: the one before the last is old enough to count.
            (LATER, AFTER, [LATER], True, [INSIDE, LATER, AFTER]),
            (LATER, AFTER, [LATER, AFTER], False, [INSIDE, LATER, AFTER]),
        ],
    )
    def test_decisions(
        self, smoke, monkeypatch, capsys, there, two_weeks_ago, failing, passes, tried
    ):
        ranges = {"torch": ">=2.10,<2.16", "transformers": ">=5.10,<5.25"}
        seen = []

        def resolve(python, requirements, index, before=None):
            if before is not None:
                return two_weeks_ago
            return there if requirements == smoke.PACKAGES else INSIDE

        def run(name, versions, index):
            assert (name == "newest") == (versions == INSIDE)
            seen.append(versions)
            return versions not in failing

        monkeypatch.setattr(smoke, "environment", lambda name: "python")
        monkeypatch.setattr(smoke, "ranges", lambda: ranges)
        monkeypatch.setattr(smoke, "resolve", resolve)
        monkeypatch.setattr(smoke, "smoke", run)
        assert smoke.newest("auto") is passes
        assert seen == tried
        assert "smoke: the newest that there are" in capsys.readouterr().out

    def test_ranges_without_an_end(self, smoke, project, tmp_path):
        copy = tmp_path / "pyproject.toml"
        copy.write_text(project)
        smoke.lift_upper_ends(copy)
        changed = set(copy.read_text().splitlines()) - set(project.splitlines())
        assert {re.sub(r"[\d.]+", "N", line.strip()) for line in changed} == {
            '"torch>=N",', '"transformers>=N",',
        }  # fmt: skip
