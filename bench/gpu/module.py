"""Puts the compiled module in its place and loads it: the carried one, or else one built here.

python bench/gpu/module.py [--device cuda]
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "build" / "carry"  # tools/carry.py writes there
NAME = "_C" + sysconfig.get_config_var("EXT_SUFFIX")

LOADS = """
import torch
from specextend import _C
print(f"specextend {_C.version}, built with torch {_C.torch_version}, here {torch.__version__}")
print(f"kernels for {_C.cuda_archs or 'no GPU'}, sm_90a: {_C.has_sm90a}")
"""
HAS_KERNELS = LOADS + 'assert _C.has_cuda, "the module has no CUDA kernels"'
GPU_ANSWERS = """
import torch
x = torch.ones(4, device="cuda")
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), float(x.sum()))
"""


def runs(code: str) -> bool:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def build() -> bool:
    """Build for the GPUs that are here, with the headers that were carried."""
    cutlass = CARRIED / "cutlass"
    options = f"-DSPECEXTEND_CUTLASS_DIR={cutlass}" if cutlass.exists() else ""
    folder = str(ROOT / "build" / "gpu")
    env = {**os.environ, "SPECEXTEND_CUDA": "ON", "SPECEXTEND_BUILD_DIR": folder}
    env["CMAKE_ARGS"] = " ".join([os.environ.get("CMAKE_ARGS", ""), options]).strip()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env=env).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    carried = CARRIED / "module" / NAME
    if device == "cuda" and carried.exists():
        print(f"carried: {carried.name}", flush=True)
        shutil.copy(carried, ROOT / "specextend" / NAME)
    wanted = HAS_KERNELS if device == "cuda" else LOADS
    if not runs(wanted):
        print("that is not what is wanted: building", flush=True)
        if not build() or not runs(wanted):
            return 1
    return 0 if device == "cpu" or runs(GPU_ANSWERS) else 1


if __name__ == "__main__":
    sys.exit(main())
