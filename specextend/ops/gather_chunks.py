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
    """Copy selected chunks of the full caches into the working caches, all layers at once.

    The working cache of cross-model retrieval (SpecExtend, section 3.3). Chunk ``ids[i]`` goes to
    rows i * chunk_size on, and its keys are rotated by (new position - old position), so that a
    model trained on short inputs sees distances it knows. A chunk that keeps its position is copied
    bit for bit. Gather from the full cache each time: rounding does not pile up.

    Args:
        k_full, v_full: per layer [B, S, Hkv, D], fp32, fp16 or bf16, any strides with a unit last
            one; keys are rotary embedded at their own index. Layers may differ in Hkv and D.
        k_work, v_work: per layer [B, Sw, Hkv, D], written in place. Rows beyond Sw are dropped.
        ids: [B, budget] int32, contiguous, ascending, -1 tail (``select_chunks``).
        counts: [B] int32, contiguous, number of ids.
        lens: [B] int32, contiguous, tokens in the full caches; the newest chunk may be partial, and
            is then the last one if it is selected.
        inv_freq: [L, R / 2] fp32, contiguous, angle per position of each pair of the first R
            dimensions; None: keys are copied as they are.
        chunk_size: tokens per chunk.
        interleaved: pairs are neighbours (GPT-J) instead of halves (Llama).
        right_aligned: new positions end where the last selected chunk ends, instead of starting at
            0: it and what is contiguous with it stay, older chunks move up to close the gaps.

    Returns:
        [B] int32, rows of the working caches.

    Equivalent to ``specextend.reference.gather_chunks``. Does not synchronise.
    """
    return _gather_chunks(
        k_full, v_full, k_work, v_work, ids, counts, lens, inv_freq,
        chunk_size=chunk_size, interleaved=interleaved, right_aligned=right_aligned,
    )  # fmt: skip


@torch.library.register_fake("specextend::gather_chunks")
def _(k_full, v_full, k_work, v_work, ids, counts, lens, inv_freq, **options):
    return torch.empty_like(counts)
