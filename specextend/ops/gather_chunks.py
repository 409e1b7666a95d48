"""Wraps and documents `gather_chunks`; the fake kernel is here too."""

import torch
from torch import Tensor

_gather_chunks = torch.ops.specextend.gather_chunks.default


def gather_chunks(
    k_full: list[Tensor],
    v_full: list[Tensor],
    k_work: list[Tensor],
    v_work: list[Tensor],
    ids: Tensor,
    counts: Tensor,
    lens: Tensor,
    inv_freq: Tensor | None,
    *,
    chunk_size: int,
    interleaved: bool = False,
    right_aligned: bool = False,
) -> Tensor:
    """Copy the selected chunks of a draft's full cache to its working cache, in all layers.

    This fills the cache of cross-model retrieval (SpecExtend section 3.3). Chunk ``ids[i]`` goes to
    rows [i * chunk_size, ...), and its keys are rotated by (new position - old position), so that a
    draft trained on short inputs sees positions it knows. A chunk that keeps its position is copied
    bit by bit. Gather from the full cache each time: rounding does not pile up.

    Args:
        k_full, v_full: one [B, S, Hkv, D] per layer, fp32, fp16 or bf16, any strides with a unit
            last one. Row j holds the key of position j. Layers, and keys and values, may differ in
            Hkv and D.
        k_work, v_work: one [B, Sw, Hkv, D] per layer, any strides with a unit last one, with memory
            of their own; written in place. Rows at Sw and beyond are dropped.
        ids: [B, budget] int32, contiguous: ascending chunks, as ``select_chunks`` gives them.
        counts: [B] int32, contiguous: how many of ``ids`` count; the rest is not read.
        lens: [B] int32, contiguous: tokens in the full caches. Only the newest chunk may be
            partial; if selected it is the last.
        inv_freq: [L, R / 2] fp32, contiguous: radians per position of each pair of the first R <= D
            dimensions, in every layer; R is at most 8192. None: keys are copied as they are.
        chunk_size: rows of a chunk.
        interleaved: pair i is the dimensions 2 i and 2 i + 1 (GPT-J), not i and R / 2 + i (Llama).
        right_aligned: the last selected chunk keeps its position, as do the chunks contiguous with
            it, and older ones move up to it. Otherwise row j of the working cache gets position j.

    Returns:
        [B] int32: rows of the working caches in use; what follows them is left as it was.

    Angles are computed in fp64 and reduced, rotations in fp32, rounded once. The host does not wait
    for the device. On CUDA one launch serves up to 24 layers.

    Example:
        >>> full = torch.arange(12.0).view(1, 12, 1, 1).repeat(1, 1, 2, 16)  # row j of S = 12: j
        >>> k_work, v_work = torch.zeros(2, 1, 8, 2, 16).unbind()  # [B, Sw, Hkv, D]
        >>> ids = torch.tensor([[0, 2]], dtype=torch.int32)  # [B, budget]
        >>> counts, lens = torch.tensor([[2], [12]], dtype=torch.int32)
        >>> caches = [full], [full], [k_work], [v_work]
        >>> ops.gather_chunks(*caches, ids, counts, lens, None, chunk_size=4)
        tensor([8], dtype=torch.int32)
        >>> v_work[0, :, 0, 0].tolist()
        [0.0, 1.0, 2.0, 3.0, 8.0, 9.0, 10.0, 11.0]
    """
    return _gather_chunks(
        k_full,
        v_full,
        k_work,
        v_work,
        ids,
        counts,
        lens,
        inv_freq,
        chunk_size=chunk_size,
        interleaved=interleaved,
        right_aligned=right_aligned,
    )


@torch.library.register_fake("specextend::gather_chunks")
def _(k_full, v_full, k_work, v_work, ids, counts, lens, inv_freq, **options):
    return torch.empty_like(counts)
