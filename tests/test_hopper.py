"""Tests the Hopper family of tree_attention: emulated, and against CuTe's own layouts.

Which calls it takes is seen by what fails: the library here has no portable kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import emulation
import pytest
import torch
from emulation import HERE, KINDS, ROOT, RUNTIME, Schedule
from test_tree_attention import Case, assert_close, same_bits
from virtual_memory import spread

from specextend import _C
from specextend.testing import in_layout, pack_mask

FP16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def library() -> emulation.Library:
    csrc, namespace = ROOT / "csrc", "specextend_emulated_hopper"
    own = [
        csrc / "ops/tree_attention.cpp",
        csrc / "cuda/attention/hopper_sm90.cu",
        *(path for path in emulation.instantiations() if path.stem.endswith("_sm90")),
        ROOT / "tests/no_portable_attention.cpp",
        HERE / "namespace.cpp",
    ]
    options = ["-DSPECEXTEND_HAS_SM90A", f'-DSPECEXTEND_EMULATION_NAMESPACE=\\"{namespace}\\"']
    shared = [*RUNTIME, csrc / "cuda/attention/combine.cu"]
    try:
        return emulation.Library(emulation.build(namespace, shared, own, options), namespace)
    except emulation.ToolMissing as missing:
        pytest.skip(str(missing))


@contextlib.contextmanager
def emulated(library: emulation.Library, schedule: Schedule):
    """Inside, ops.tree_attention is the library's, on guarded memory."""
    op = getattr(torch.ops, library.namespace).tree_attention.default
    module = importlib.import_module("specextend.ops.tree_attention")
    replaced = mock.patch.object(module, "_tree_attention", op)
    with library.guarded_memory(), library.schedule(schedule), replaced:
        yield


@pytest.fixture(params=KINDS)
def on_hopper(request, library):
    """Runs cases on the emulated Hopper kernels: with on_hopper(seed, multiprocessors): ..."""

    def schedule(seed: int = 0, multiprocessors: int = 4):
        return emulated(library, Schedule(seed, request.param, multiprocessors, 90))

    return schedule


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("rows", "heads"), [(17, (8, 2)), (33, (2, 1)), (65, (1, 1)), (10, (14, 2)), (32, (4, 1))]
)
def test_one_block(rows, heads, on_hopper):
    """65 to 128 rows of a KV head."""
    for i, prefixes in enumerate([(0, 5), (127, 128), (300, 700, 1)]):
        with on_hopper(i, 1 + 2 * i):
            Case(prefixes, rows, heads=heads, dtype=(FP16, BF16)[i % 2], seed=i).check()


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("rows", "heads"), [(33, (4, 1)), (64, (8, 2)), (100, (4, 1))])
def test_clusters(rows, heads, on_hopper):
    """More than 128 rows: the second block with a row and more; two clusters to a KV head."""
    for i, prefixes in enumerate([(200,), (3, 600)]):
        with on_hopper(i, 2 + 4 * i):
            Case(prefixes, rows, heads=heads, dtype=(FP16, BF16)[i % 2], seed=i).check(
                chunk_size=32 * i, window=150 * i
            )


@pytest.mark.sweep(6)
@pytest.mark.parametrize("dim", [8, 72, 80, 96, 128, 192, 200, 256])
def test_head_dims(dim, on_hopper):
    with on_hopper():
        Case((260,), 18, heads=(4, 1), dim=dim, dtype=FP16).check(
            chunk_size=32 if dim <= 192 else 0
        )


@pytest.mark.sweep(3)
@pytest.mark.parametrize("window", [1, 7, 100, 300])
def test_windows(window, on_hopper):
    case = Case((400, 20), 35, heads=(2, 1), dtype=FP16)
    with on_hopper():
        case.check(window=window, chunk_size=32)
        case.check(window=window, **case.depths())
        Case((400,), 35, heads=(4, 1), dtype=FP16, tree=False).check(window=window)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("size", [1, 100, 400, 410, 1000])
def test_attention_chunks(size, on_hopper):
    """Their borders lie in the prefix, at its end, in the tree, and nowhere."""
    case = Case((400, 20), 35, heads=(2, 1), dtype=FP16)
    with on_hopper():
        case.check(attention_chunk=size, chunk_size=32)
        case.check(attention_chunk=size, **case.depths())
        Case((400,), 35, heads=(4, 1), dtype=FP16, tree=False).check(attention_chunk=size)


def test_sinks(on_hopper):
    for i, (prefixes, rows, heads) in enumerate([((150, 0), 40, (4, 2)), ((700,), 40, (4, 1))]):
        with on_hopper(i, 1 + 3 * i):
            case = Case(prefixes, rows, heads=heads, dtype=(FP16, BF16)[i])
            case.check(sinks=torch.linspace(-1.0, 4.0, 4))
            case.check(sinks=torch.tensor([-torch.inf, 0.0, 1.0, 8.0]), chunk_size=32)


def test_options(on_hopper):
    with on_hopper():
        case = Case((150,), 20, keys=75, heads=(4, 1), dtype=FP16)
        case.check(sinks=torch.randn(4), chunk_size=32)
        case.check(scale=-0.3)
        case.check(scale=0.0)
        Case((150,), 70, keys=3, heads=(1, 1), dtype=BF16, layout="bhsd").check()
        Case((150, 0), 70, keys=0, heads=(1, 1), dtype=BF16, spare=0).check()


def test_masked_values_may_be_anything(on_hopper):
    """Tree keys that nobody sees; what is behind the tree is NaN in every case."""
    with on_hopper():
        case = Case((100,), 70, keys=90, heads=(1, 1), dtype=FP16, tree=False)
        case.visible = torch.rand(1, 70, 90) < 0.3
        case.visible[:, :, [0, 5, 63, 64, 89]] = False
        case.mask = pack_mask(case.visible)
        for key in (0, 5, 63, 64, 89):
            case.k[:, 100 + key] = case.v[:, 100 + key] = torch.nan
        case.check()


def test_keys_and_values_differ_in_layout(on_hopper):
    case = Case((150, 40), 35, heads=(4, 2), dtype=FP16)
    with on_hopper():
        expected = case.run()
        for layouts in (("bshd", "bhsd"), ("bhsd", "bshd")):
            case.k, case.v = map(in_layout, (case.k, case.v), layouts)
            assert same_bits(case.run(), expected)


@pytest.mark.parametrize("prefix", [32, 96, 128, 160, 256])
def test_the_last_chunk_is_full(prefix, on_hopper):
    """The prefix ends with a chunk, and the cache with the prefix: nothing is behind either."""
    with on_hopper():
        case = Case((prefix,) * 2, 65, 0, heads=(1, 1), dtype=FP16, spare=0, tree=False)
        assert case.check(chunk_size=32)[2].isfinite().all()


@pytest.mark.sweep(4)
@pytest.mark.parametrize("prefix", [127, 255])
def test_one_key_from_a_whole_tile(prefix, on_hopper):
    """The key that is missing does not count: there is none, or some rows do not see it."""
    with on_hopper():
        for spare in (0, 1):
            case = Case((prefix,), 65, 0, heads=(1, 1), dtype=FP16, spare=spare, tree=False)
            case.check()
            case.check(chunk_size=32)
        case = Case((prefix,), 65, 3, heads=(1, 1), dtype=FP16)
        case.visible = torch.rand(1, 65, 3, generator=case.generator) < 0.5
        case.visible[:, 0] = False
        case.mask = pack_mask(case.visible)
        case.check()


class TestSwitches:
    """The environment has switches. Portable kernels show as chosen in that there are none."""

    CASE = dict(prefixes=(50,), rows=65, heads=(1, 1), dtype=FP16)

    def run(self, library, **changed) -> None:
        with emulated(library, Schedule(capability=90)):
            Case(**{**self.CASE, **changed}).run()

    def test_family(self, library, monkeypatch):
        for family in ("hopper", ""):
            monkeypatch.setenv("SPECEXTEND_ATTENTION", family)
            self.run(library)
        with pytest.raises(
            RuntimeError, match="tree_attention: .*hopper, but .* do not serve this"
        ):
            monkeypatch.setenv("SPECEXTEND_ATTENTION", "hopper")
            self.run(library, rows=64)
        with pytest.raises(RuntimeError, match="launch failed"):
            monkeypatch.setenv("SPECEXTEND_ATTENTION", "portable")
            self.run(library)
        with pytest.raises(RuntimeError, match="must be portable or hopper, got wgmma"):
            monkeypatch.setenv("SPECEXTEND_ATTENTION", "wgmma")
            self.run(library)

    def test_programmatic_launch(self, library, monkeypatch):
        for value, count in (("", 1), ("1", 1), ("0", 0)):
            monkeypatch.setenv("SPECEXTEND_PDL", value)
            before = library.early_launches
            self.run(library)
            assert library.early_launches == before + count
        with pytest.raises(RuntimeError, match="SPECEXTEND_PDL must be 0 or 1, got yes"):
            monkeypatch.setenv("SPECEXTEND_PDL", "yes")
            self.run(library)


def test_same_bits(library):
    """Whoever is ahead or behind: sums are made in one order."""
    case, results = Case((500, 130), 40, heads=(8, 2), dtype=FP16), []
    for seed in range(3):
        for kind in KINDS:
            with emulated(library, Schedule(seed, kind, 6, 90)):
                results.append([t.clone() for t in case.run(chunk_size=32)])
    assert all(same_bits(results[0], other) for other in results[1:])


LEFT = "no kernel image is available"  # what the portable family says here


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ({"rows": 64}, {}),
        ({"dtype": torch.float32}, {}),
        ({"layout": "sliced"}, {}),
        ({}, {"softcap": 2.0}),
        ({}, {"chunk_size": 16}),
        ({"dim": 200}, {"chunk_size": 32}),
        ({"dim": (128, 64)}, {}),
        ({"dim": (64, 128)}, {}),
        ({"dim": 264}, {}),
    ],
    ids=str,
)
def test_what_is_left_to_the_portable_family(case, options, library):
    case = Case((50,), **{"rows": 65, "heads": (1, 1), "dtype": FP16, **case})
    with emulated(library, Schedule(capability=90)), pytest.raises(RuntimeError, match=LEFT):
        case.run(**options)


def test_only_on_hopper(library):
    case = Case((50,), 65, heads=(1, 1), dtype=FP16)
    for capability in (80, 100, 120):
        with emulated(library, Schedule(capability=capability)):
            with pytest.raises(RuntimeError, match=LEFT):
                case.run()


def placed(t: torch.Tensor, begin: int = 0, odd: int | None = None) -> torch.Tensor:
    """Copy to so many elements behind a multiple of 16 bytes. All strides but the last
    are multiples of 8 elements, but that of dimension ``odd``, which is 4 more.
    """
    strides, stride = [0, 0, 0, 1], t.shape[-1]
    for dim in (2, 1, 0):
        strides[dim] = stride + 4 * (dim == odd)
        stride = (strides[dim] * t.shape[dim] + 7) // 8 * 8
    memory = t.new_empty(begin + stride)
    return memory[begin:].as_strided(t.shape, strides).copy_(t)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_memory_that_tensor_copies_do_not_take(name, library):
    """Each stride and the begin alone is of 8 bytes, not of 16; or rows are far too far apart."""
    case = Case((50, 20), 65, heads=(4, 2), dtype=FP16)
    with emulated(library, Schedule(capability=90)):
        expected, t = case.run(), getattr(case, name)
        taken = [placed(t), placed(t, begin=8), *(spread(t, dim) for dim in range(3))]
        others = [placed(t, begin=4), *(placed(t, odd=dim) for dim in range(3))]
        if name != "q":  # which is not copied as a tensor
            others += [spread(t, 0, far=2**39), t[:1].expand(2, -1, -1, -1)]
        for other in taken:
            setattr(case, name, other)
            assert same_bits(case.run(), expected)
        for other in others:
            setattr(case, name, other)
            with pytest.raises(RuntimeError, match=LEFT):
                case.run()


# --- maps of tensors, which the emulated driver takes under the real one's conditions -------------


def maps_made(library) -> list[list[int]]:
    """Since the last call: address; columns, rows, heads, batch; strides in bytes; a box's rows."""
    most = 64
    made = torch.zeros(most, 9, dtype=torch.int64)
    count = library.handle.specextend_emulation_maps(ctypes.c_void_p(made.data_ptr()), most)
    return made[:count].tolist()


LAYOUTS = {
    "bshd": lambda t: t,
    "bhsd": lambda t: in_layout(t, "bhsd"),
    "keys beside values": lambda t: torch.stack([t, t], 2)[:, :, 0],
    "some heads of more": lambda t: torch.cat([t, t, t], 2)[:, :, : t.shape[2]],
    "some rows of more": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "some columns of more": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "padded heads": lambda t: torch.nn.functional.pad(t, (0, 8))[..., : t.shape[3]],
    "head first": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("batch", "rows", "heads", "dim"),
    [(2, 40, (4, 2), 64), (1, 100, (4, 1), 128), (2, 66, (2, 2), 200), (1, 65, (1, 1), 8)],
)
def test_maps(layout, batch, rows, heads, dim, library):
    """One map is of the keys, one of the values, each with its own strides."""
    case = Case((20,) * batch, rows, heads=heads, dim=dim, dtype=FP16)
    expected = case.check()
    case.k = LAYOUTS[layout](case.k)
    others = [LAYOUTS[other](case.v) for other in ("bshd", layout)]
    for case.v in others:
        maps_made(library)
        with emulated(library, Schedule(capability=90)):
            assert_close(case.run(), expected)
        boxes = (128 if dim <= 128 else 64) // (2 if rows * heads[0] // heads[1] > 128 else 1)
        for t, (address, *sizes_and_strides, box) in zip(
            (case.k, case.v), maps_made(library), strict=True
        ):
            sizes, strides = sizes_and_strides[:4], sizes_and_strides[4:]
            assert address == t.data_ptr() and box == boxes
            assert sizes == [dim, t.shape[1], t.shape[2], t.shape[0]]
            for dimension, stride in zip((1, 2, 0), strides, strict=True):
                if t.shape[dimension] > 1:
                    assert stride == 2 * t.stride(dimension)


# --- what the emulation has to take on trust: layouts of products and boxes -----------------------

PROGRAM = r"""
#include <cute/tensor.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cstdio>

#include "hopper_tiles.h"

using namespace cute;
using namespace specextend;
using Half = half_t;

template <int kRows, int kDim>
int wrong_places() {
  auto keys = as_position_independent_swizzle_layout(
      tile_to_shape(GMMA::Layout_K_SW128_Atom<Half>{}, Shape<Int<kRows>, Int<kDim>>{}));
  auto values = as_position_independent_swizzle_layout(tile_to_shape(
      GMMA::Layout_MN_SW128_Atom<Half>{}, Shape<Int<kDim>, Int<kRows>>{}, Step<_2, _1>{}));
  int wrong = 0;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kDim; ++column) {
      const int place = shared_index(kRows, row, column);
      wrong += int(keys(row, column)) != place || int(values(column, row)) != place;
    }
  }
  return wrong;
}

template <typename Layout>
int wrong_elements(Layout layout, int count) {
  int wrong = 0;
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < count; ++i) {
      const int at = layout(thread, i);  // row + 64 column
      wrong += at % 64 != fragment_row(thread, i) || at / 64 != fragment_column(thread, i);
    }
  }
  return wrong;
}

int main() {
  using Logits = MMA_Traits<SM90_64x128x16_F32F16F16_SS<GMMA::Major::K, GMMA::Major::K>>;
  using Values = MMA_Traits<SM90_64x256x16_F32F16F16_RS<GMMA::Major::K, GMMA::Major::MN>>;
  printf("%d %d %d %d %d %d\n", wrong_places<64, 64>(), wrong_places<128, 128>(),
         wrong_places<64, 256>(), wrong_elements(Logits::CLayout{}, 64),
         wrong_elements(Values::CLayout{}, 128), wrong_elements(Values::ALayout{}, 8));
}
"""


def cutlass_headers() -> Path | None:
    found = importlib.util.find_spec("cutlass_library")
    return Path(found.submodule_search_locations[0], "source/include") if found else None


@pytest.mark.long  # nvcc and CuTe: 20 s
def test_places_are_those_of_cute(tmp_path):
    """hopper_tiles.h says where CuTe's swizzled tiles and fragments have their elements."""
    nvcc, headers = shutil.which("nvcc"), cutlass_headers()
    if not nvcc or not headers:
        pytest.skip("no nvcc" if not nvcc else "no CUTLASS headers: the wheel nvidia-cutlass")
    (tmp_path / "places.cu").write_text(PROGRAM)
    options = ["-std=c++17", "-O0", "-arch=sm_90a", "--expt-relaxed-constexpr", "-w"]
    command = [nvcc, *options, f"-I{headers}", f"-I{ROOT}/csrc", "places.cu", "-o", "places"]
    subprocess.run(command, check=True, cwd=tmp_path)
    ran = subprocess.run([tmp_path / "places"], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["0"] * 6


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (_C.has_sm90a and torch.cuda.is_available())
    or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper GPU, or no kernels for it in this build",
)
@pytest.mark.parametrize("layout", ["bshd", "sliced"])
@pytest.mark.parametrize("rows", [17, 32, 33, 64, 100, 128])
def test_cuda_families(rows, layout, monkeypatch):
    """Memory that tensor copies do not take goes to the portable family."""
    for dtype, dim in ((FP16, 64), (BF16, 128), (FP16, 256)):
        case = Case((5000, 321), rows, heads=(8, 2), dim=dim, dtype=dtype, layout=layout)
        chunk_size = 32 if dim <= 192 else 0
        for family in ("", "portable", *(["hopper"] if layout == "bshd" else [])):
            monkeypatch.setenv("SPECEXTEND_ATTENTION", family)
            case.check("cuda", chunk_size=chunk_size)
