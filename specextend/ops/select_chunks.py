"""Wraps and documents `select_chunks`; the fake kernel is here too."""

import torch
from torch import Tensor

_select_chunks = torch.ops.specextend.select_chunks.default


def select_chunks(
    scores: Tensor,
    lens: Tensor,
    *,
    chunk_size: int,
    budget: int,
    num_sinks: int = 0,
    num_recent: int = 0,
) -> tuple[Tensor, Tensor]:
    """Choose the chunks of the context that the draft is to see (SpecExtend section 4.2).

    Chunk c holds the keys [c * chunk_size, (c + 1) * chunk_size); the newest may be partial. The
    first ``num_sinks`` and the newest ``num_recent`` chunks are always chosen and count inside the
    budget, the rest goes to the highest scores.

    Args:
        scores: [B, C] fp32, contiguous (:func:`chunk_scores`). Equal scores go to the lower id; NaN
            comes after -inf.
        lens: [B] int32, contiguous. Keys of each sequence: its chunks are the first
            ``ceil(len / chunk_size)``, at most C.
        chunk_size: keys per chunk.
        budget: chunks to choose; a sequence of no more keeps all of them.
        num_sinks, num_recent: together at most ``budget``.

    Returns:
        ids: [B, budget] int32, ascending, tail -1.
        counts: [B] int32. Chunks chosen.

    Nothing is read on the host.

    Example:
        >>> scores = torch.tensor([[0.1, 0.05, 0.3, 0.05, 0.4, 0.1]])  # [B, C]
        >>> lens = torch.tensor([180], dtype=torch.int32)  # six chunks, the last one partial
        >>> ops.select_chunks(scores, lens, chunk_size=32, budget=4, num_sinks=1, num_recent=1)
        (tensor([[0, 2, 4, 5]], dtype=torch.int32), tensor([4], dtype=torch.int32))
    """
    return _select_chunks(
        scores,
        lens,
        chunk_size=chunk_size,
        budget=budget,
        num_sinks=num_sinks,
        num_recent=num_recent,
    )


@torch.library.register_fake("specextend::select_chunks")
def _(scores, lens, *, chunk_size, budget, num_sinks=0, num_recent=0):
    return lens.new_empty(scores.shape[0], budget), torch.empty_like(lens)
