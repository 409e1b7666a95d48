"""Makes the environment of the Makefile: a virtual environment with the pins of constraints.txt.

A torch that the running Python has already is used where it lies: the new environment is laid over
that Python's packages, nothing of which is changed, and pins then count only for what is missing.
Needs the standard library alone; may run again over a half-made environment.
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
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's torch for x86-64 brings CUDA: gigabytes


def fail(text):
    sys.exit("make: " + text)


def say(text):
    print(text, flush=True)


def numbers(version):
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


# ---- what the machine must have ------------------------------------------------------------------


def check_machine():
    """Name what is missing before anything is made."""
    here = "%d.%d" % sys.version_info[:2]
    if sys.version_info < (3, 10):
        fail("Python >= 3.10 is wanted, %s is %s; name another: make PYTHON=python3.12"
             % (sys.executable, here))  # fmt: skip
    for module in ("venv", "ensurepip"):
        try:
            __import__(module)
        except ImportError:
            fail("%s has no %s module: install it (Debian and Ubuntu: apt install python%s-venv)"
                 % (sys.executable, module, here))  # fmt: skip
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        fail("%s is missing: install Python's headers (Debian and Ubuntu: apt install python%s-dev;"
             " Fedora: dnf install python3-devel)" % (header, here))  # fmt: skip
    check_compiler()


def check_compiler():
    named = os.environ.get("CXX")
    compilers = [named] if named else ["c++", "g++", "clang++"]
    found = [c for c in compilers if shutil.which(c.split()[0])]
    if not found:
        fail("no C++ compiler (%s): install one (Debian and Ubuntu: apt install g++; Fedora: dnf "
             "install gcc-c++)" % ", ".join(compilers))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a.cpp")
        source.write_text("#include <optional>\nint main() { return *std::optional<int>(0); }\n")
        command = found[0].split() + ["-std=c++17", str(source), "-o", str(Path(folder, "a"))]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        fail("%s does not build a C++17 program:\n%s" % (found[0], ran.stderr.strip()))


# ---- packages ------------------------------------------------------------------------------------


def pins():
    """{name: requirement line} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return {line.partition("==")[0]: line for line in lines if line}


def minima():
    """{name: version} that the package itself asks for. (tomllib is not in Python 3.10.)"""
    return dict(re.findall(r'"([\w.-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))


def is_installed(name, minimum):
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return not minimum or numbers(version) >= numbers(minimum)


def own_torch(minimum):
    """Version of the torch that the running Python imports, None if there is none to be kept."""
    probe = [sys.executable, "-c", "import torch; print(torch.__version__)"]
    ran = subprocess.run(probe, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if ran.returncode:
        return None
    version = ran.stdout.split()[-1]
    if numbers(version) < numbers(minimum):
        say("torch %s of %s is older than %s: not used" % (version, sys.executable, minimum))
        return None
    return version


def torch_options(index):
    """pip's options for torch: `index`, a URL, "" for none, or "auto"."""
    if index != "auto":
        return ["--extra-index-url", index] if index else []
    if (
        shutil.which("nvidia-smi")
        and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode
    ):
        return []
    try:
        urllib.request.urlopen(CPU_INDEX + "/torch/", timeout=5).close()
    except OSError:
        return []
    return ["--extra-index-url", CPU_INDEX]


# ---- the environment -----------------------------------------------------------------------------


def make_venv(folder, over_own_packages):
    python = folder / "bin" / "python"
    works = [
        str(python),
        "-c",
        "import pip, sys; assert sys.version_info[:2] == %r" % (sys.version_info[:2],),
    ]
    if python.exists() and not subprocess.run(works, capture_output=True).returncode:
        return python
    options = ["--system-site-packages"] if over_own_packages else []
    ran = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", *options, str(folder)],
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        fail(
            "%s -m venv %s failed:\n%s"
            % (sys.executable, folder, (ran.stdout + ran.stderr).strip())
        )
    if over_own_packages and sys.prefix != sys.base_prefix:
        # The running Python is a virtual environment, which --system-site-packages looks through.
        packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        lines = ["import site; site.addsitedir(%r)\n" % p for p in sorted(packages)]
        ours = subprocess.check_output(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        Path(ours.strip(), "_beneath.pth").write_text("".join(lines))
    return python


def pip(python, *arguments):
    quiet = [] if sys.stdout.isatty() else ["-q"]
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        *quiet,
        *arguments,
    ]
    if subprocess.run(command).returncode:
        fail("pip could not install %s" % " ".join(a for a in arguments if not a.startswith("-")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch-index", default="auto")
    parser.add_argument("--stamp", type=Path, required=True)
    options = parser.parse_args()
    folder = options.folder.resolve()
    check_machine()

    wanted, least = pins(), minima()
    inside = Path(sys.prefix).resolve() == folder  # `make` from within its own environment
    stamp = json.loads(options.stamp.read_text()) if options.stamp.exists() else {}
    torch = stamp.get("kept_torch") if inside else own_torch(least["torch"])
    python = Path(sys.executable) if inside else make_venv(folder, over_own_packages=bool(torch))
    if torch:
        say("environment: %s, over the torch %s of %s" % (options.folder, torch, sys.executable))
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as keep:
            keep.write("torch==%s\n" % torch)
            keep.flush()
            missing = [
                line for name, line in wanted.items() if not is_installed(name, least.get(name))
            ]
            if missing:
                pip(python, "-c", keep.name, *missing)
    else:
        say(
            "environment: %s, Python %d.%d, packages of constraints.txt"
            % (options.folder, *sys.version_info[:2])
        )
        pip(python, wanted["torch"], *torch_options(options.torch_index))
        pip(python, "-r", str(ROOT / "constraints.txt"))

    found = subprocess.check_output(
        [str(python), "-c", "import torch; print(torch.__version__)"], text=True
    ).strip()
    if torch and found != torch:
        fail("%s imports torch %s in place of %s" % (python, found, torch))
    options.stamp.write_text(json.dumps({"python": sys.executable, "kept_torch": torch}) + "\n")


if __name__ == "__main__":
    main()
