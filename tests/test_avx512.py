"""Tests the CPU's AVX-512 and AMX kernels on processors with AVX2 alone: intrinsics are emulated.

What tests/emulation/avx512/immintrin.h and tests/emulation/amx/tiles.h stand in for is the
instructions, so that the kernels' sources run unchanged. What a compiler makes of them shows on a
processor that has them only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import emulation
import isa_bits
import pytest
import test_invariant_linear
import test_tree_attention
import torch
from backends import Scheduler, build_or_skip, emulated
from emulation import Library, Schedule

ISAS = emulation.EMULATED_ISAS
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def native():
    """Return what the kernels of this machine give."""
    return {op: isa_bits.digest(op) for op in isa_bits.OPS}


@pytest.fixture(scope="module", params=ISAS)
def isa(request, avx512_library, native):
    """Ops run by its kernels, on memory that ends where it must not be touched."""
    with by(avx512_library, request.param):
        yield request.param


def by(library: Library, isa: str):
    library.use_isa(isa)
    return emulated(library, Schedule())


@pytest.mark.parametrize("op", isa_bits.OPS)
def test_same_bits(op, native, isa):
    assert isa_bits.digest(op) == native[op]


def test_attention_fuzz(isa):
    test_tree_attention.test_fuzz("cpu", 40)


@pytest.mark.sweep(17)
@pytest.mark.parametrize("dim", [8, 40, 72, 120, 128, 192, 256, 264, 512, 576])
def test_attention_head_dims(dim, isa):
    test_tree_attention.test_head_dims(dim, "cpu", Scheduler())


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dims", [(192, 128), (64, 96), (24, 8), (576, 512)])
def test_attention_values_of_another_size(dims, isa):
    for dtype in test_tree_attention.DTYPES:
        test_tree_attention.test_few_rows(dims, dtype)
    test_tree_attention.test_values_of_another_size(dims, torch.bfloat16, "cpu", Scheduler())
    test_tree_attention.test_row_invariance((2, 1), dims, torch.bfloat16)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", test_tree_attention.DTYPES)
def test_attention_rows(dtype, isa):
    """The order of sums is the same alone and among others, by parts, in a tree and in a chain."""
    for dim in (64, 72, 192, 256):
        test_tree_attention.test_few_rows(dim, dtype)
    test_tree_attention.test_row_invariance((2, 2), 64, dtype)
    test_tree_attention.test_masked_keys_may_hold_anything(dtype, "cpu")


def test_attention_of_a_prefill(avx512_library):
    with by(avx512_library, "amx"):
        test_tree_attention.test_prefill_row_invariance(torch.bfloat16)


def test_attention_unrolled(isa):
    """The last keys of a line are put together for each row of a tree where tiles are used."""
    test_tree_attention.test_path_unrolling(torch.bfloat16, "cpu", Scheduler())
    test_tree_attention.test_window_row_invariance(torch.bfloat16)
    test_tree_attention.test_attention_chunk_row_invariance(torch.bfloat16)
    for group in (1, 7, 20):  # query heads of one row in one tile and in two
        test_tree_attention.test_groups(group, "cpu")


def test_attention_extremes(isa):
    test_tree_attention.test_chunk_lse_of_chunks_without_weight("cpu")
    test_tree_attention.test_large_logits("cpu")
    test_tree_attention.test_softcap(0.5, torch.bfloat16, "cpu")
    test_tree_attention.test_nan_stays_in_its_row("cpu")
    test_tree_attention.test_pairs_of_elements_are_no_numbers(torch.bfloat16)


def test_invariant_products(isa):
    test_invariant_linear.check_instruction_set()


@pytest.mark.long
@pytest.mark.parametrize("name", ISAS)
def test_long_all_tests_of_the_ops(name, avx512_library):
    files = [TESTS / f"test_{op}.py" for op in emulation.PER_INSTRUCTION_SET]
    skipped = "emulated or cuda or instruction_set"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-k", f"not ({skipped})", *files],
        env={**os.environ, "SPECEXTEND_EMULATED_ISA": name},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


@dataclass(frozen=True)
class Fault:
    """Changes ``csrc/cpu/isa/<header>`` so that a test above notices: ``old`` is there once."""

    header: str
    old: str
    new: str

    def library(self) -> Library:
        name = f"specextend_avx512_fault_{FAULTS.index(self)}"
        text = (emulation.ROOT / "csrc/cpu/isa" / self.header).read_text()
        assert text.count(self.old) == 1, f"{self.header}: {self.old!r} is not there once"
        overlay = emulation.BUILD / name / "overlay"
        shutil.rmtree(overlay, ignore_errors=True)  # of another fault, if the list has changed
        changed = overlay / "cpu/isa" / self.header
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text(text.replace(self.old, self.new))
        return build_or_skip(name, [f"-I{overlay}"], build=emulation.build_avx512)


FAULTS = [
    # Words of keys end up in other places.
    Fault("simd.h", "_mm512_set_epi64(13, 12, 5, 4, 9,", "_mm512_set_epi64(13, 12, 4, 5, 9,"),
    Fault("simd.h", "return load_tile(p + i * kTileWords);", "return load_tile(p);"),
    # Sums of chunks go to each other's places.
    Fault("simd.h", "0, 2, 1, 3, 8, 10, 9, 11, 4,", "0, 1, 2, 3, 8, 10, 9, 11, 4,"),
    # The later of two keys is added first: as exact, but not in the order of the line.
    Fault(
        "attention/math_bf16.h",
        "_mm512_rol_epi32(reinterpret_cast<__m512i>(pairs), 16)",
        "reinterpret_cast<__m512i>(pairs)",
    ),
    Fault("attention/math_bf16.h", "15, 47, 14, 46,", "14, 47, 15, 46,"),
    # The rest of a head dimension is lost.
    Fault(
        "attention/math.h", "dim - begin - d > i * kTileWords", "dim - begin - d > 2 * kTileWords"
    ),
    # A product of tiles less; tiles that nobody releases.
    Fault(
        "attention/tiles.h",
        "    _tile_dpbf16ps(2, 5, 6);\n    if constexpr (Q == 2) {",
        "    if constexpr (Q == 2) {",
    ),
    Fault("attention/tile_blocks.h", "void end() { _tile_release(); }", "void end() {}"),
    Fault("attention/math_bf16.h", "some >= 32 ? ~0u : (1u << some) - 1", "some >= 32 ? ~0u : 0u"),
    # Half of the lanes count twice.
    Fault("vocab.h", "_mm512_extractf32x8_ps(x, 1)", "_mm512_extractf32x8_ps(x, 0)"),
]


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.new)
def test_faults_are_found(fault, native):
    def notices(isa: str) -> bool:
        try:
            with by(library, isa):
                for op in native:
                    test_same_bits(op, native, isa)
                test_attention_fuzz(isa)
                test_attention_head_dims(72, isa)
                test_attention_rows(torch.bfloat16, isa)
        except (AssertionError, RuntimeError):  # the latter by the emulation
            return True
        return False

    library = fault.library()
    assert any(map(notices, ISAS))
