"""Builds the CUDA branch of the ops for a machine without a GPU.

The CUDA sources are compiled for the host, unchanged, against the headers of ``include/``. A
library built so registers ``torch.ops.<namespace>.<op>`` with the schemas of the real ops, for CPU
tensors: checks, allocation, launch and kernel are those of a GPU. The threads of a block are fibers
(``block.cpp``), and a schedule draws their order.

``build_avx512`` does the same for the CPU branch by AVX-512 and AMX on a processor without them,
``build_cpu`` with this processor's own kernels.
``build_device_memory`` has what maps a GPU's memory, against a driver of this machine's memory.

``tools/mutate.py`` plants faults in these libraries: SPECEXTEND_MUTANT names a folder with changed
files (``overlay/csrc/...``) and a list of what has to be compiled with them (``sources``).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]  # also from a tree of links to it
HERE = ROOT / "tests/emulation"
BUILD = ROOT / "build/emulation"
PER_INSTRUCTION_SET = [  # these ops have kernels for each, on the CPU
    "chunk_scores",
    "expand_tree",
    "gather_chunks",
    "invariant_linear",
    "rms_norm",
    "rotary_append",
    "sample_nodes",
    "silu_mul",
    "tree_attention",
]
EMULATED_ISAS = ["avx512", "avx512_bf16", "amx"]  # instruction sets of the CPU
RUNTIME = sorted(set(HERE.glob("*.cpp")) - {HERE / "namespace.cpp"})


class ToolMissing(Exception):
    """Says that there is no compiler, or no ninja."""


@dataclass(frozen=True)
class Schedule:
    """Says how the threads of a launch, and its blocks, take turns.

    Attributes:
        seed: decides all that is drawn: the order of threads and blocks, when copies land.
        kind: ``"random"``; ``"ahead"`` or ``"behind"``: one warp, and one lane of each, is always
            as far ahead or behind as barriers allow, and copies land as late as they may.
        multiprocessors: how many the device has, which decides the size of many grids.
        capability: the device's, ten times major plus minor.
    """

    seed: int = 0
    kind: str = "random"
    multiprocessors: int = 4
    capability: int = 80


KINDS = ["random", "ahead", "behind"]


class Library:
    """Holds a compiled emulation, loaded, and sets how it runs."""

    def __init__(self, path: Path, namespace: str | None = None):
        self.namespace = namespace
        self.handle = ctypes.CDLL(str(path))
        self._set = self.handle.specextend_emulation_set
        self._set.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        self._guard = self.handle.specextend_emulation_guard
        self._guard.argtypes = [ctypes.c_int]
        self._schedules = [Schedule()]

    @contextlib.contextmanager
    def schedule(self, schedule: Schedule) -> Iterator[None]:
        """Have the launches inside follow a schedule."""
        self._schedules.append(schedule)
        self._apply()
        try:
            yield
        finally:
            self._schedules.pop()
            self._apply()

    def _apply(self) -> None:
        s = self._schedules[-1]
        self._set(s.seed, KINDS.index(s.kind), s.multiprocessors, s.capability)

    @property
    def early_launches(self) -> int:
        """Count the launches so far that may begin before the kernel in front has ended."""
        return self.handle.specextend_emulation_early_launches()

    def use_isa(self, name: str) -> None:
        """Use an instruction set of EMULATED_ISAS from now on, in what ``build_avx512`` built."""
        choose = self.handle.specextend_emulation_isa
        choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_bool
        if not choose(name.encode()):
            raise ValueError(f"one of {EMULATED_ISAS} is wanted, got {name!r}")

    @contextlib.contextmanager
    def guarded_memory(self) -> Iterator[None]:
        """Poison CPU tensors made inside, and end them where memory must not be touched."""
        self._guard(1)
        try:
            yield
        finally:
            self._guard(0)


def _tool(*names: str) -> str | None:
    beside = os.path.dirname(sys.executable)  # a venv's programs need not be on PATH
    path = os.pathsep.join([beside, os.environ.get("PATH", "")])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def build(
    name: str, shared: Sequence[Path], own: Sequence[Path] = (), options: Sequence[str] = ()
) -> Path:
    """Compile what has changed since the last time, and link it.

    Args:
        name: the library's.
        shared: C++ and CUDA files whose objects libraries share.
        own: files whose objects are this library's alone, and come first.
        options: the compiler's, for ``own``; what they include comes before ``csrc/``.

    Raises:
        ToolMissing: There is no C++ compiler, or no ninja.
        RuntimeError: The compiler fails; the message has its words.
    """
    ninja, compiler = _tool("ninja"), os.environ.get("CXX") or _tool("g++", "c++", "clang++")
    if not (ninja and compiler):
        raise ToolMissing(f"emulation: no {'ninja' if compiler else 'C++ compiler'} on PATH")
    torch_folder = Path(torch.__file__).parent
    rules = [
        f"cxx = {_tool('ccache', 'sccache') or ''} {compiler}",
        "rule compile",
        "  command = $cxx -std=c++17 -O2 -fPIC -w -fno-gnu-unique -ffp-contract=off "
        "-Itests/emulation/include -DSPECEXTEND_HAS_CUDA $options -Itests/emulation -Icsrc "
        f"-isystem {torch_folder}/include -DTORCH_TARGET_VERSION=0x020a000000000000 "
        "-MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        "  command = $cxx -shared -Wl,-Bsymbolic,--no-undefined -o $out $in "
        f"-L{torch_folder}/lib -ltorch_cpu -lc10 -ldl -lpthread",
        "  description = $out",
    ]
    units = []
    for sources, folder, chosen in ((own, name, options), (shared, "shared", ())):
        for source in sources:
            more = [*chosen]
            if source.suffix == ".cu":  # the kernels are seen, so that errors name them
                more.append(
                    "-fsanitize=alignment,bounds,shift-exponent,thread -fno-sanitize-recover=all"
                )
            else:
                more.append("-fvisibility=hidden")
            if source.name == "guarded_memory.cpp":  # it alone needs torch's unstable headers
                more.append("-std=c++20")
            source = source.relative_to(ROOT)
            built = BUILD / folder / source.parent.name / f"{source.stem}.o"
            units.append(Unit(str(source), built, more))

    def run(folder: Path, units: list[Unit], kept: Sequence[Path] = ()) -> Path:
        target = folder / f"{name}.so"
        lines = [f"builddir = {folder}", *rules]
        for unit in units:
            lines += [f"build {unit.built}: compile {unit.source}"]
            lines += [f"  options = {' '.join(unit.options)}"]
        objects = " ".join(map(str, [*(unit.built for unit in units), *kept]))
        lines += [f"build {target}: link {objects}", f"default {target}", ""]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{name}.ninja").write_text("\n".join(lines))
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            command = [ninja, "-f", str(folder / f"{name}.ninja"), *jobs]
            # In the root: errors of kernels name files as the compiler is called with them.
            ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if ran.returncode != 0:
            raise RuntimeError(f"emulation: {name} does not compile\n{ran.stdout}{ran.stderr}")
        return target

    target = run(BUILD, units)
    if planted := mutant():
        sources = (planted / "sources").read_text().split()
        changed = [unit.planted(planted) for unit in units if unit.source in sources]
        if changed:
            kept = [unit.built for unit in units if unit.source not in sources]
            return run(planted / "build", changed, kept)
    return target


def mutant() -> Path | None:
    """Return the folder of the fault that is planted, if one is."""
    folder = os.environ.get("SPECEXTEND_MUTANT")
    return Path(folder) if folder else None


def headers() -> list[str]:
    """Return the options for the headers of ``csrc/``, those with a planted fault first."""
    planted = mutant()
    return [*([f"-I{planted}/overlay/csrc"] if planted else []), f"-I{ROOT}/csrc"]


@dataclass(frozen=True)
class Unit:
    """Names a source below the root, what is built of it, and the compiler's options for it."""

    source: str
    built: Path
    options: list[str]

    def planted(self, folder: Path) -> Unit:
        """Return the same unit with the files that a fault has changed."""
        own = folder / "overlay" / self.source
        return Unit(
            str(own) if own.exists() else self.source,
            folder / "build" / self.built.relative_to(BUILD),
            [f"-I{folder}/overlay/csrc", *self.options],
        )


INSTANTIATIONS = BUILD / "instantiations"


def instantiations() -> list[Path]:
    """Write the instantiations of the attention kernels below INSTANTIATIONS; return the files."""
    script = str(ROOT / "csrc/cuda/attention/instantiate.py")
    command = [sys.executable, script, str(INSTANTIATIONS)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return [Path(line) for line in ran.stdout.splitlines()]


def ops_sources() -> list[Path]:
    """List the host side of every op, and every CUDA file that a host can run."""
    kernels = [*(ROOT / "csrc/cuda").rglob("*.cu"), *instantiations()]
    kernels = [path for path in kernels if not path.stem.endswith("_sm90")]
    return sorted([*(ROOT / "csrc/ops").glob("*.cpp"), *kernels])


def build_ops(namespace: str, own: Sequence[Path] = (), options: Sequence[str] = ()) -> Library:
    """Build all ops, as ``torch.ops.<namespace>.*``.

    Args:
        own, options: as for ``build``: sources that take the place of those of the same name.
    """
    replaced = {path.name for path in own}
    shared = [path for path in ops_sources() if path.name not in replaced]
    path = build(
        namespace,
        [*RUNTIME, *shared],
        [*own, HERE / "namespace.cpp"],
        [*options, f'-DSPECEXTEND_EMULATION_NAMESPACE=\\"{namespace}\\"'],
    )
    return Library(path, namespace)


def build_avx512(namespace: str, options: Sequence[str] = ()) -> Library:
    """Build the CPU branch of the ops that have kernels per instruction set, with EMULATED_ISAS'.

    Their intrinsics are those of ``avx512/immintrin.h`` and ``amx/tiles.h``. They
    are not optimised, which would take minutes.

    Args:
        namespace, options: as for ``build_ops``.

    Raises:
        ToolMissing: There is no compiler, or the processor has no AVX2.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        raise ToolMissing("emulation: AVX-512 is emulated by AVX2, which this processor lacks")
    folders = [HERE / "avx512", HERE / "amx"]
    own = sorted(path for folder in folders for path in folder.glob("*.cpp"))
    branches = [
        ROOT / "csrc" / b / f"{op}.cpp" for op in PER_INSTRUCTION_SET for b in ("ops", "cpu")
    ]
    path = build(
        namespace,
        RUNTIME,
        [*own, *branches, HERE / "namespace.cpp"],
        [
            *options,
            f"-I{folders[0]} -mavx2 -mfma -mf16c -O0 -Wno-psabi -USPECEXTEND_HAS_CUDA",
            f'-DSPECEXTEND_EMULATION_NAMESPACE=\\"{namespace}\\"',
        ],
    )
    return Library(path, namespace)


def build_cpu(namespace: str) -> Library:
    """Build the CPU branch of all ops, by AVX2 where the processor has it, else by its least.

    It is optimised little, as faults are planted in it.
    """
    csrc = ROOT / "csrc"
    sources = [path for branch in ("ops", "cpu") for path in sorted((csrc / branch).glob("*.cpp"))]
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    path = build(
        namespace,
        RUNTIME,
        # The baseline is always there, whatever it is compiled for.
        [*sources, csrc / "cpu/isa/baseline.cpp", HERE / "namespace.cpp"],
        [
            f"-O1 -Wno-psabi -USPECEXTEND_HAS_CUDA {'-mavx2 -mfma -mf16c' if wide else ''}",
            "-DSPECEXTEND_ISA=baseline",
            f'-DSPECEXTEND_EMULATION_NAMESPACE=\\"{namespace}\\"',
        ],
    )
    return Library(path, namespace)


def build_device_memory() -> Path:
    """Build csrc/device_memory.cpp with an emulated driver, for ctypes."""
    own = [ROOT / "csrc/device_memory.cpp", *sorted((HERE / "memory").glob("*.cpp"))]
    return build("device_memory", [], own)
