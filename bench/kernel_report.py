"""Reports what the compiler made of every CUDA kernel: registers, shared memory, stack, spills.

    python bench/kernel_report.py [--build build/on] [--filter attention] [--json out.json]

The figures are what ptxas said when the extension was built (`*.ptxas` beside the object files,
see cmake/compile_kernels.sh); no GPU is needed. Shared memory is the static kind: what a launch
asks for besides is not in the object. The exit status is 1 if a kernel spills registers.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Kernel:
    """Describes a kernel for one architecture; sizes are bytes, per thread but for ``shared``."""

    source: str
    arch: str
    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def parse(source: str, text: str) -> list[Kernel]:
    """Return the kernels that one compilation reported on, their names still mangled."""
    kernels: list[Kernel] = []
    own = False  # whether what follows is said of the entry, not of a function that it calls
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernels.append(Kernel(source, entry[2], entry[1]))
        elif function := re.search(r"Function properties for (\S+)", line):
            own = bool(kernels) and function[1] == kernels[-1].name
        elif own and "bytes stack frame" in line:
            numbers = [int(n) for n in re.findall(r"(\d+) bytes", line)]
            kernels[-1].stack, kernels[-1].spill_stores, kernels[-1].spill_loads = numbers
        elif used := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(used[1])
            kernels[-1].shared = sum(int(n) for n in re.findall(r"(\d+) bytes smem", line))
    return kernels


def remarks(text: str) -> list[str]:
    """Return warnings and notes on speed, such as that wgmma instructions are serialised."""
    return [
        line for line in text.splitlines() if re.match(r"ptxas (warning|info\s*: \(C\d+\))", line)
    ]


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Return readable names, where a tool for it is on PATH."""
    names = sorted(set(names))
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not names or tool is None:
        return {name: name for name in names}
    ran = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, ran.stdout.splitlines(), strict=True))


def build_folder() -> Path | None:
    """Find the folder of the last build with CUDA kernels, None if there is none."""
    named = os.environ.get("SPECEXTEND_BUILD_DIR")
    if named and any(Path(named).rglob("*.ptxas")):
        return Path(named)
    reports = sorted((ROOT / "build").rglob("*.ptxas"), key=lambda p: p.stat().st_mtime)
    return ROOT / "build" / reports[-1].relative_to(ROOT / "build").parts[0] if reports else None


def collect(folder: Path) -> list[Kernel]:
    """Return all kernels of a build, by source, name and architecture."""
    kernels = []
    for path in folder.rglob("*.ptxas"):
        kernels += parse(path.name.removesuffix(".ptxas").removesuffix(".o"), path.read_text())
    names = demangle(k.name for k in kernels)
    for kernel in kernels:
        kernel.name = re.sub(r"^void |\(.*\)$", "", names[kernel.name].replace("(int)", ""))
    return sorted(kernels, key=lambda k: (k.source, k.name, k.arch))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, help="build folder (default: the last one with CUDA)")
    parser.add_argument("--filter", default="", help="only kernels whose name contains this text")
    parser.add_argument("--json", type=Path, help="write the report to this file, too")
    arguments = parser.parse_args()
    folder = arguments.build or build_folder()
    if folder is None:
        print("no build with CUDA kernels under build/: SPECEXTEND_CUDA=ON make build")
        return 2
    kernels = [k for k in collect(folder) if arguments.filter in k.name]
    print("regs | shared | stack | spill st/ld | arch    | kernel")
    for k in kernels:
        spills = f"{k.spill_stores}/{k.spill_loads}" if k.spills else "-"
        print(
            f"{k.registers:4} | {k.shared:6} | {k.stack:5} | {spills:>11} | {k.arch:7} | {k.name}"
        )
    for path in sorted(folder.rglob("*.ptxas")):
        for line in remarks(path.read_text()):
            print(f"{path.name}: {line}")
    spilling = sum(k.spills for k in kernels)
    print(f"{len(kernels)} kernels in {folder}, {spilling} with spills")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
