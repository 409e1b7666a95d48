"""Tests how attention on a GPU treats heads by size: keys and values apart, and wide ones divided.

What holds for all sizes is in test_tree_attention.py. Here are the kernels for keys and values of
different sizes, whose warps stream both through one ring, and the kernel for heads above 256, whose
warps share rows and divide dimensions. fp32 has one kernel for all sizes, and takes longest on the
emulation: it gets fewer cases.
"""

from __future__ import annotations

import pytest
import torch
from backends import for_each
from emulation import KINDS
from test_tree_attention import (
    DTYPES,
    LAYOUTS,
    Case,
    assert_close,
    check_masked_keys,
    one_thread,
    same_bits,
)

__all__ = ["one_thread"]  # a fixture
NAN = torch.nan
FP32 = torch.float32
# The sizes that kernels are made for, and some that are padded in them.
APART = [(192, 128), (136, 72), (64, 96), (96, 64), (80, 200)]
WIDE = [(512, 512), (576, 512), (264, 8), (8, 512), (520, 264)]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", DTYPES)
@for_each(dims=APART, rows=[3, 13, 35], layout=LAYOUTS)
def test_sizes_apart(dims, rows, layout, dtype, device):
    """Blocks of 16, 32 and 64 rows; memory that is aligned to vectors, and that is not."""
    if dtype == FP32 and rows > 3:
        return
    case = Case((90, 3), rows, heads=(2, 1), dim=dims, dtype=dtype, layout=layout, seed=rows)
    case.check(device)
    case.check(device, chunk_size=32 if rows < 30 else 50, window=60, **case.depths())


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
@for_each(dims=WIDE, layout=LAYOUTS)
def test_wide_layouts(dims, layout, dtype, device):
    case = Case((40, 3), 5, heads=(4, 2), dim=dims, dtype=dtype, layout=layout)
    case.check(device, chunk_size=16)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads(dtype, device, schedule):
    """Blocks of 16 and 32 rows, whole and not, one and several; units whole and in parts."""
    for rows, heads in [(1, (1, 1)), (16, (1, 1)), (17, (1, 1)), (8, (4, 1)), (11, (6, 2))]:
        case = Case((130, 20), rows, heads=heads, dim=(512, 264), dtype=dtype, seed=rows)
        for multiprocessors in (1, 3, 20) if schedule.emulated and dtype != FP32 else (3,):
            with schedule(multiprocessors=multiprocessors):
                sinks = torch.linspace(-2.0, 2.0, heads[0])
                case.check(device, chunk_size=24, sinks=sinks)
                case.check(device)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_options(dtype, device):
    case = Case((70, 5), 9, heads=(4, 2), dim=(320, 384), dtype=dtype)
    for scale in (0.0, -0.2):
        case.check(device, scale=scale)
    case.check(device, softcap=2.0, scale=-0.3, chunk_size=7)
    case.check(device, window=30, chunk_size=1000, **case.depths())
    Case((60,), 4, 20, heads=(2, 1), dim=(320, 384), dtype=dtype).check(device)
    Case((60,), 9, 4, heads=(2, 1), dim=(320, 384), dtype=dtype).check(device, chunk_size=16)
    Case((100,), 3, heads=(2, 1), dim=(320, 384), dtype=dtype, scale=40.0).check(device)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
@for_each(dims=[(512, 512), (192, 128)], size=[1, 16, 37, 50, 64])
def test_attention_chunks(dims, size, dtype, device):
    """Their borders lie in the prefix, at its end (50), in the tree, and between groups of keys."""
    case = Case((50, 2), 14, heads=(2, 1), dim=dims, dtype=dtype, seed=size)
    case.check(device, attention_chunk=size, chunk_size=16, **case.depths())
    chain = Case((50, 47), 14, heads=(2, 1), dim=dims, dtype=dtype, tree=False)
    chain.check(device, attention_chunk=size)
    # A row's position may lie before the text: nothing is hidden from it then.
    case.check(device, attention_chunk=size, q_depths=case.depths()["q_depths"] - 5)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(512, 512), (576, 512), (192, 128), (96, 64)])
def test_schedules_do_not_change_bits(dims, dtype, device, schedule):
    if dtype == FP32 and dims != (512, 512):
        pytest.skip("there is one kernel")
    for rows, chunk_size in [(3, 0), (9, 32)]:
        case = Case((150, 30), rows, heads=(4, 2), dim=dims, dtype=dtype)
        first = case.run(device, chunk_size=chunk_size)
        for seed, kind in enumerate(KINDS):
            with schedule(seed=seed, kind=kind):
                assert same_bits(case.run(device, chunk_size=chunk_size), first)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(512, 512), (64, 96)])
def test_masked_keys_may_hold_anything(dims, dtype, device):
    for rows, heads in [(1, (4, 2)), (20, (4, 2))]:
        case = Case((37, 0), rows, 40, heads=heads, dim=dims, dtype=dtype)
        check_masked_keys(case, device)


@pytest.mark.parametrize("dims", [(576, 512), (192, 128)])
def test_nan_stays_in_its_row(dims, device):
    case = Case((60,), 11, heads=(4, 2), dim=dims, dtype=torch.bfloat16)
    clean = case.run(device)
    case.q[0, 7, 1] = NAN
    out, lse, _ = case.run(device)
    assert out[0, 7, 1].isnan().all() and lse[0, 7, 1].isnan()
    out[0, 7, 1], lse[0, 7, 1] = clean[0][0, 7, 1], clean[1][0, 7, 1]
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_does_not_count(dtype, device):
    """Heads with zeros behind them, for which there is another kernel, give the same."""
    for dims, padded in [
        ((64, 64), (192, 128)),
        ((192, 128), (576, 512)),
        ((256, 256), (512, 512)),
    ]:
        case = Case((70,), 9, dim=dims, dtype=dtype)
        want = case.check(device, scale=0.1)
        for name, dim in zip("qkv", (padded[0], padded[0], padded[1]), strict=True):
            t = getattr(case, name)
            setattr(case, name, torch.nn.functional.pad(t, (0, dim - t.shape[-1])))
        out, lse, _ = case.run(device, scale=0.1)
        assert (out[..., dims[1] :] == 0).all()
        assert_close((out[..., : dims[1]], lse), want[:2])
