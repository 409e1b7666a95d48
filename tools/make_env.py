"""Makes the environment of the Makefile: a virtual environment with the pins of constraints.txt.

A torch that the running Python has already is used where it lies: the new environment is laid over
that Python's packages, nothing of which is changed, and pins then count only for what is missing.
It needs the standard library alone, and may run again over a half-made environment.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADERS = "nvidia-cutlass"  # nothing is imported from it: its dependencies are left out
GRAMMARS = "xgrammar"  # asks for triton, which is large and for GPUs
LINTERS = ("ruff", "clang-format")  # `make lint` installs them
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's torch for x86-64 brings CUDA: gigabytes


def fail(text):
    sys.exit(f"make: {text}")


def ask(python, code):
    """Return what a line of Python prints in another interpreter; None if it fails there."""
    command = [str(python), "-c", code]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    except OSError:
        return None
    return None if ran.returncode else ran.stdout.strip()


def numbers(version):
    """Turn "2.13.0+cpu" into (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


# ---- what the machine must have ------------------------------------------------------------------


def check_machine():
    """Name what is missing before anything is made."""
    me, here = sys.executable, f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info < (3, 10):  # noqa: UP036  this file alone runs on older ones
        fail(f"Python >= 3.10 is wanted, {me} is {here}; name another: make PYTHON=python3.12")
    for module in ("venv", "ensurepip"):
        if ask(me, f"import {module}") is None:
            fail(
                f"{me} has no module {module}: install it (Debian, Ubuntu: apt install "
                f"python{here}-venv) or name another Python: make PYTHON=python3.12"
            )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        fail(
            f"{header} is missing: install Python's headers (Debian, Ubuntu: apt install "
            f"python{here}-dev; Fedora: dnf install python3-devel)"
        )
    check_compiler()


def check_compiler():
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [c for c in compilers if shutil.which(c.split()[0])]
    if not found:
        fail(
            f"there is no C++ compiler ({', '.join(compilers)}): install one (Debian, Ubuntu: apt "
            "install g++; Fedora: dnf install gcc-c++) or set CXX"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a.cpp")
        source.write_text("#include <optional>\nint main() { return *std::optional<int>(0); }\n")
        command = [*found[0].split(), "-std=c++17", str(source), "-o", str(Path(folder, "a"))]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        fail(f"{found[0]} does not build a C++17 program:\n{ran.stderr.strip()}")


# ---- packages ------------------------------------------------------------------------------------


def pins():
    """Read {name: requirement line} from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return {line.partition("==")[0]: line for line in lines if line}


def ranges():
    """Read {name: ">=2.10,<2.16"}, what the package asks for. (Python 3.10 has no tomllib.)"""
    text = (ROOT / "pyproject.toml").read_text()
    return dict(re.findall(r'"([\w.-]+)(>=[\d.]+(?:,<[\d.]+)?)"', text))


def is_in(version, allowed):
    """Say whether a version is within a range like ">=2.10,<2.16"; all are within ""."""
    least, _, end = allowed.partition(",")
    at = numbers(version)
    return at >= numbers(least) and (not end or at < numbers(end))


def is_installed(python, name, allowed):
    version = ask(python, f"from importlib.metadata import version; print(version({name!r}))")
    return version is not None and is_in(version, allowed)


def own_torch(allowed):
    """Return the version of the running Python's torch, None if there is none to be kept."""
    version = ask(sys.executable, "import torch; print(torch.__version__)")
    if version and not is_in(version, allowed):
        print(f"environment: torch {version} of {sys.executable} is not {allowed}: not used")
        return None
    return version


def has_gpu():
    if not shutil.which("nvidia-smi"):
        return False
    ran = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return ran.stdout.startswith("GPU")


def torch_options(index):
    """Return pip's options for torch; ``index`` is a URL, "" for none, or "auto"."""
    if index != "auto":
        return ["--extra-index-url", index] if index else []
    if has_gpu():
        return []
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
    except OSError:
        return []
    return ["--extra-index-url", CPU_INDEX]


def pip_install(python, *arguments):
    # Compiling all of torch and transformers to bytecode takes longer than a run of them.
    options = ["--no-compile", *([] if sys.stdout.isatty() else ["-qq"])]
    if subprocess.run([str(python), "-m", "pip", "install", *options, *arguments]).returncode:
        fail(f"pip could not install {' '.join(a for a in arguments if not a.startswith('-'))}")


# ---- the environment -----------------------------------------------------------------------------


def make_venv(folder, over_own_packages):
    """Make ``folder``, unless it is such an environment already, and return its Python."""
    python, settings = folder / "bin" / "python", folder / "pyvenv.cfg"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = ask(python, "import pip, sys; print('%d.%d' % sys.version_info[:2])")
    over = f"include-system-site-packages = {str(over_own_packages).lower()}"
    if found == version and over in settings.read_text():
        return python
    options = ["--clear", *(["--system-site-packages"] if over_own_packages else [])]
    command = [sys.executable, "-m", "venv", *options, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        fail(f"{' '.join(command)} failed:\n{(ran.stdout + ran.stderr).strip()}")
    if over_own_packages and sys.prefix != sys.base_prefix:
        # The running Python is a virtual environment's, which --system-site-packages looks past.
        theirs = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        ours = ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
        lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in theirs)
        Path(ours, "_beneath.pth").write_text(lines)
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the virtual environment")
    parser.add_argument("--torch-index", default="auto", help="index to take torch from")
    parser.add_argument("--stamp", type=Path, required=True, help="file to write when done")
    options = parser.parse_args()
    folder = options.folder.resolve()
    check_machine()

    wanted, allowed = pins(), ranges()
    headers, grammars = wanted.pop(HEADERS), wanted.pop(GRAMMARS)
    for name in LINTERS:
        wanted.pop(name)
    if Path(sys.prefix).resolve() == folder:  # run from within the environment itself
        python = Path(sys.executable)
        torch = json.loads(options.stamp.read_text())["torch"] if options.stamp.exists() else None
    else:
        torch = own_torch(allowed["torch"])
        python = make_venv(folder, over_own_packages=bool(torch))
    if torch:
        print(f"environment: {options.folder}, over torch {torch} of {sys.executable}", flush=True)
        missing = [
            line
            for name, line in wanted.items()
            if not is_installed(python, name, allowed.get(name, ""))
        ]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as keep:
            print(f"torch=={torch}", file=keep, flush=True)
            if missing:
                pip_install(python, "-c", keep.name, *missing)
    else:
        print(f"environment: {options.folder}, with the packages of constraints.txt", flush=True)
        pip_install(python, wanted["torch"], *torch_options(options.torch_index))
        pip_install(python, *wanted.values())
    if not is_installed(python, GRAMMARS, ""):
        pip_install(python, "--no-deps", grammars)
    if os.environ.get("SPECEXTEND_CUDA", "AUTO").upper() != "OFF":
        if not is_installed(python, HEADERS, headers.replace("==", ">=").removeprefix(HEADERS)):
            pip_install(python, "--no-deps", headers)

    found = ask(python, "import torch; print(torch.__version__)")
    if found is None or torch not in (None, found):
        fail(f"{python} imports torch {found}, wanted {torch or wanted['torch']}")
    options.stamp.write_text(json.dumps({"torch": torch}) + "\n")


if __name__ == "__main__":
    main()
