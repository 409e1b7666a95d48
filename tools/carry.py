"""Builds the module for a machine with a Hopper GPU on which nothing can be built or downloaded.

    python tools/carry.py [--python python3.12] [--torch 2.11.0]

It is built in a clean environment of that Python and torch (build/carry/venv), for sm_90 and sm_90a
alone. The script says what to carry along with the source tree: the module, which
`bench/gpu/a_right.py` puts in its place there, and those of CUTLASS's headers that it is built
with, should it have to be built there.

No GPU is needed here, but nvcc is. What can be tried without a GPU is tried: that the module loads,
`specextend info`, the operators on the CPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from make_env import HEADERS, ROOT, ask, fail, pins, ranges, torch_options

FOLDER = ROOT / "build" / "carry"
MODULE, CUTLASS = FOLDER / "module", FOLDER / "cutlass"
BUILD_PACKAGES = ("setuptools", "cmake", "ninja", "pybind11")
MOST_BYTES = 60 << 20


def run(*command, cwd=ROOT, **variables):
    command = [str(word) for word in command]
    print("carry:", " ".join(command), flush=True)
    if subprocess.run(command, cwd=cwd, env={**os.environ, **variables}).returncode:
        fail(f"{' '.join(command)} failed")


def environment(python, torch, index):
    """Make a clean environment, unless it is there, and return its Python."""
    version = ask(python, "import sys; print('%d.%d' % sys.version_info[:2])")
    if version is None:
        fail(f"{python} is not there: name another with --python")
    made = FOLDER / "venv" / "bin" / "python"
    if ask(made, "import torch; print(torch.__version__.split('+')[0])") != torch:
        run(python, "-m", "venv", "--clear", FOLDER / "venv")
        pip = (made, "-m", "pip", "install", "-q", "--no-compile")
        run(*pip, f"torch=={torch}", *torch_options(index))
        wanted = pins()
        run(*pip, *(wanted[name] for name in BUILD_PACKAGES), "numpy", "packaging", "rich",
            "transformers" + ranges()["transformers"])  # fmt: skip
    return made


def headers(python):
    """Fetch CUTLASS by the pinned package, and return its folder."""
    wheel = FOLDER / "wheel"
    if not wheel.exists():
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--target", wheel, pins()[HEADERS])
    return wheel / "cutlass_library" / "source"


def build(python, cutlass):
    """Build the module and return it; lay those of CUTLASS's headers beside it that it used."""
    shutil.rmtree(MODULE, ignore_errors=True)
    options = [
        "-DSPECEXTEND_CUDA_ARCHS=90-real", "-DSPECEXTEND_SM90A=ON",
        f"-DSPECEXTEND_CUTLASS_DIR={cutlass}",
    ]  # fmt: skip
    run(
        python, "setup.py", "-q", "build_ext", "--build-lib", MODULE,
        SPECEXTEND_CUDA="ON", SPECEXTEND_BUILD_DIR=str(FOLDER / "build"),
        CMAKE_ARGS=" ".join(options),
    )  # fmt: skip
    (module,) = MODULE.rglob("_C.*.so")
    module = module.rename(MODULE / module.name)
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout
    (MODULE / "commit").write_text(commit)  # for records, since that machine may have no git

    ninja = [str(python.with_name("ninja")), "-C", str(FOLDER / "build"), "-t", "deps"]
    read = subprocess.run(ninja, capture_output=True, text=True, check=True).stdout.split()
    used = {Path(file) for file in read if file.startswith(f"{cutlass}/include/")}
    shutil.rmtree(CUTLASS, ignore_errors=True)
    for file in used | {cutlass / "include/cutlass/version.h"}:
        to = CUTLASS / file.relative_to(cutlass)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    return module


def try_it(python, module):
    """Try what goes without a GPU, in a copy of the package with the module in its place."""
    place = FOLDER / "tried"
    shutil.rmtree(place, ignore_errors=True)
    ignored = shutil.ignore_patterns("_C.*.so", "__pycache__")
    shutil.copytree(ROOT / "specextend", place / "specextend", ignore=ignored)
    shutil.copy(module, place / "specextend")
    here = dict(PYTHONPATH=str(place), cwd=place)
    run(python, "-c", "from specextend import _C; assert _C.has_cuda and _C.has_sm90a", **here)
    run(python, "-m", "specextend", "info", **here)
    run(python, ROOT / "bench/small_cases.py", "--device", "cpu", **here)
    shutil.rmtree(place)


def size(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="python3.12", help="of that machine (%(default)s)")
    parser.add_argument("--torch", default="2.11.0", help="of that machine (%(default)s)")
    parser.add_argument("--torch-index", default="", help="index to take torch from")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    python = environment(options.python, options.torch, options.torch_index)
    module = build(python, headers(python))
    try_it(python, module)
    total = 0
    print("carry: along with the tree, and nothing else:")
    for path in (MODULE, CUTLASS):
        total += size(path)
        print(f"  {path.relative_to(ROOT)}  {size(path) / 1e6:.1f} MB")
    print(f"  {total / 1e6:.1f} MB; {module.name}")
    if total > MOST_BYTES:
        fail(f"that is more than {MOST_BYTES >> 20} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
