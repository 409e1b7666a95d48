"""Tests what was built, and that every op has all of its parts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import specextend
from specextend import _C, ops, reference

ROOT = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "csrc/ops").glob("*.cpp"))


def python(code: str, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


class TestModule:
    def test_versions(self):
        project = (ROOT / "pyproject.toml").read_text()
        version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1]
        assert _C.version == specextend.__version__ == version
        assert re.match(r"\d+\.\d+", _C.torch_version)

    def test_cuda(self):
        assert isinstance(_C.has_cuda, bool) and isinstance(_C.has_sm90a, bool)
        archs = _C.cuda_archs.split(",") if _C.cuda_archs else []
        assert all(re.fullmatch(r"\d+a?(-real|-virtual)?", arch) for arch in archs)
        assert bool(archs) == _C.has_cuda
        assert _C.has_cuda or not _C.has_sm90a

    def test_cpu_isas(self):
        assert _C.cpu_isas()[0] == "baseline"
        assert _C.cpu_isa() in _C.cpu_isas()

    def test_alone_it_registers_the_ops(self):
        """Without the loop, and without transformers, which takes seconds to import."""
        names = sorted(OPS)
        ran = python(
            "import specextend._C, sys, torch\n"
            f"for name in {names}: getattr(torch.ops.specextend, name)\n"
            "print(*(m for m in ('transformers', 'specextend.decode') if m in sys.modules))"
        )
        assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr

    def test_it_names_no_place_of_the_machine_that_built_it(self):
        content = Path(_C.__file__).read_bytes()
        assert b"csrc/ops/" in content  # where an error came from, within the project
        places = [f"{place}/" for place in (ROOT, Path(torch.__file__).parent)]
        assert [place for place in places if place.encode() in content] == []


# Stands for CMake: what was built once is kept, and installing keeps its time. Then builds one
# flavour after another, and prints what lies there afterwards.
BUILD_FLAVOURS = """
import os, runpy, shutil, subprocess, sys
from pathlib import Path

def cmake(command, env):
    if "-S" in command:
        folder = Path(command[command.index("-B") + 1])
        flavour = next(c for c in command if c.startswith("-DSPECEXTEND_CUDA="))
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "module").write_text(flavour.split("=")[1])
            os.utime(folder / "module", times=(len(built), len(built)))
            built.append(folder)
    elif "--install" in command:
        installed = Path(command[-1]) / "specextend" / suffix
        installed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(command[2]) / "module", installed)

built, suffix = [], "_C" + __import__("sysconfig").get_config_var("EXT_SUFFIX")
subprocess.check_call = cmake
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
for flavour in sys.stdin.read().split():
    os.environ["SPECEXTEND_CUDA"] = flavour
    os.environ["SPECEXTEND_BUILD_DIR"] = "build/" + flavour
    runpy.run_path("setup.py", run_name="__main__")
    print(Path("specextend", suffix).read_text())
"""


class TestSetup:
    def test_another_flavour_replaces_what_is_there(self, tmp_path):
        """Setuptools copies by time: going back to a flavour that was built earlier did nothing."""
        for name in ("setup.py", "pyproject.toml", "README.md", "specextend/__init__.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        flavours = "OFF ON OFF AUTO ON\n"
        ran = subprocess.run(
            [sys.executable, "-c", BUILD_FLAVOURS], input=flavours, cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "CMAKE_ARGS"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == flavours.split()

    def test_source_distribution_is_complete(self, tmp_path):
        command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        packed = set((tmp_path / "specextend.egg-info/SOURCES.txt").read_text().splitlines())
        folders = ("bench", "cmake", "csrc", "docs", "specextend", "tests", "tools")
        files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
        wanted = {"CMakeLists.txt", "LICENSE", "Makefile", "constraints.txt", "setup.py"}
        wanted |= {
            str(path.relative_to(ROOT))
            for path in files
            if path.is_file() and path.suffix not in (".pyc", ".so")
        }
        assert wanted - packed == set()


class TestCutlass:
    """CMake finds CUTLASS's headers where it should."""

    @staticmethod
    def found(tmp_path: Path, **variables: str) -> str:
        script = tmp_path / "find.cmake"
        script.write_text(
            f'include("{ROOT}/cmake/cutlass.cmake")\n'
            'specextend_find_cutlass_wheel(dir)\nmessage("dir=${dir}")\n'
        )
        cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        command = [cmake, f"-DPython_EXECUTABLE={sys.executable}", "-P", str(script)]
        ran = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, **variables}
        )
        return ran.stderr.partition("dir=")[2].strip()

    def test_a_wheel_in_a_folder_of_its_own(self, tmp_path):
        """Found by PYTHONPATH, where none is installed, which comes first."""
        (tmp_path / "cutlass_library").mkdir()
        (tmp_path / "cutlass_library/__init__.py").touch()
        installed = self.found(tmp_path)
        own = self.found(tmp_path, PYTHONPATH=str(tmp_path))
        assert own == (installed or f"{tmp_path}/cutlass_library/source")
        assert not installed or installed.startswith(sys.prefix)


class TestImportErrors:
    @pytest.fixture
    def package(self, tmp_path):
        """Lay out the package's first files alone, without a compiled module; they have another
        name, so that nothing installed takes their place."""
        folder = tmp_path / "bare"
        folder.mkdir()
        for name in ("__init__.py", "versions.py"):
            shutil.copy(ROOT / "specextend" / name, folder / name)
        return folder

    def import_it(self, package: Path) -> str:
        ran = python("import bare", cwd=package.parent)
        assert ran.returncode == 1
        return ran.stderr.splitlines()[-1]

    def test_missing(self, package):
        text = self.import_it(package)
        assert text.startswith("ImportError: specextend's compiled module is missing")
        assert "pip install ." in text

    def test_stale(self, package):
        (package / "_C.py").write_text("version = '0.0.9'\n")
        text = self.import_it(package)
        assert text.startswith(
            "ImportError: specextend's compiled module is stale: it was built for"
        )
        assert "0.0.9" in text and specextend.__version__ in text


@pytest.mark.parametrize("name", OPS)
class TestParts:
    """The same word names an op in all of its places."""

    def test_function(self, name):
        function = getattr(ops, name)
        assert name in ops.__all__
        assert function.__module__ == f"specextend.ops.{name}"
        assert "Args:" in function.__doc__

    def test_reference(self, name):
        assert callable(getattr(reference, name))

    def test_tests(self, name):
        assert (ROOT / f"tests/test_{name}.py").exists()

    def test_cpu_kernel_and_fake(self, name):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key
        overloads = [f"specextend::{name}"]
        overloads += [
            f"specextend::{name}.{overload}"
            for overload in getattr(torch.ops.specextend, name).overloads()
            if overload != "default"
        ]
        for overload in overloads:
            assert registered(overload, "CPU"), overload
            assert (
                registered(overload, "Meta")
                or torch._library.simple_registry.singleton.find(overload).fake_impl.kernel
            ), overload
