"""Tests the report on what the compiler made of the CUDA kernels."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from specextend import _C

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("kernel_report", ROOT / "bench/kernel_report.py")
kernel_report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernel_report)

# Two kernels as ptxas reports them, the first with a function that it calls.
REPORT = """\
ptxas info    : 0 bytes gmem, 16 bytes cmem[4]
ptxas info    : Compiling entry function '_Z4leanIfEvPT_' for 'sm_80'
ptxas info    : Function properties for helper
    64 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z4leanIfEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 21.1 ms
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function '_Z3fatv' for 'sm_90a'
ptxas info    : Function properties for _Z3fatv
    232 bytes stack frame, 592 bytes spill stores, 640 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 232 bytes cumulative stack size
"""


def test_reads_what_ptxas_says(tmp_path):
    (tmp_path / "file.cu.o.ptxas").write_text(REPORT)
    fat, lean = kernel_report.collect(tmp_path)
    assert (lean.source, lean.arch, lean.registers, lean.shared) == ("file.cu", "sm_80", 40, 1024)
    assert lean.name in ("lean<float>", "_Z4leanIfEvPT_") and not lean.spills and lean.stack == 0
    assert (fat.arch, fat.registers, fat.stack) == ("sm_90a", 255, 232)
    assert fat.spills and (fat.spill_stores, fat.spill_loads) == (592, 640)
    (remark,) = kernel_report.remarks(REPORT)
    assert "C7510" in remark


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_spill_is_seen(tmp_path):
    """This machine's own compiler makes one, through the script that the build uses."""
    source, target = tmp_path / "spill.cu", tmp_path / "spill.o"
    source.write_text(
        "__global__ void spilling(float* x) {\n"
        "  float a[40];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 40; ++i) a[i] = x[i];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 40; ++i) x[i] = a[i] * a[39 - i];\n"
        "}\n"
    )
    options = [
        "-arch=sm_80",
        "-maxrregcount=24",
        "-Xptxas=-v",
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    command = ["sh", str(ROOT / "cmake/compile_kernels.sh"), str(target), "nvcc", *options]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "") and target.exists()
    (kernel,) = kernel_report.collect(tmp_path)
    assert kernel.spills and kernel.arch == "sm_80" and kernel.registers == 24


@pytest.mark.skipif(not _C.has_cuda, reason="built without CUDA kernels")
def test_no_attention_kernel_spills():
    folder = kernel_report.build_folder()
    if folder is None:
        pytest.skip("the build folder, where ptxas reported, is not here")
    kernels = kernel_report.collect(folder)
    assert kernels
    attention = [k for k in kernels if "attention" in k.name]
    assert attention
    assert not [f"{k.name} ({k.arch})" for k in attention if k.spills]


@pytest.mark.skipif(not _C.has_sm90a, reason="built without the Hopper kernels")
def test_hopper_kernels_can_hand_over_registers():
    """setmaxnreg wants 168 registers of each thread at entry, 384 x 168 = 128 x 72 + 256 x 216,
    and waits for ever for what is not there; ptxas says where it will not hand over, or puts
    wgmma instructions in a row."""
    folder = kernel_report.build_folder()
    if folder is None:
        pytest.skip("the build folder, where ptxas reported, is not here")
    kernels = [k for k in kernel_report.collect(folder) if "tree_attention_sm90_kernel" in k.name]
    assert len(kernels) >= 12
    assert {(k.arch, k.registers) for k in kernels} == {("sm_90a", 168)}
    said = [r for file in folder.rglob("*_sm90.cu*.ptxas") for r in
            kernel_report.remarks(file.read_text())]  # fmt: skip
    assert [
        line for line in said if "C7508" in line or "C7510" in line or "setmaxnreg" in line
    ] == []


def test_every_kernel_is_accounted_for():
    """docs/limits.md says of each whether a GPU has run it."""
    table = (ROOT / "docs/limits.md").read_text().split("## The CUDA kernels on a GPU")[1]
    ops = sorted((path.stem for path in (ROOT / "csrc/ops").glob("*.cpp")), key=len, reverse=True)
    for source in (ROOT / "csrc/cuda").rglob("*.cu"):
        name = "tree_attention" if source.parent.name == "attention" else source.stem
        op = next((op for op in ops if name.startswith(op)), name)
        assert f"| `{op}`" in table or f", `{op}`" in table, source.name
