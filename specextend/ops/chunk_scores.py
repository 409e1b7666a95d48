"""Wraps and documents `chunk_scores` and `chunk_scores_keys`; the fake kernel is here too."""

import torch
from torch import Tensor

_chunk_scores = torch.ops.specextend.chunk_scores.default
_chunk_scores_keys = torch.ops.specextend.chunk_scores.keys


def chunk_scores(
    chunk_lse: Tensor,
    lse: Tensor,
    rows: Tensor,
    prefix_lens: Tensor,
    *,
    chunk_size: int,
    reduce: str = "mean",
) -> Tensor:
    """Score each chunk of the context by the attention that one query row pays to it.

    These are the scores of SpecExtend's cross-model retrieval (section 4.2), exact and as a
    by-product of the verify pass: the softmax mass of chunk c under head h is
    ``exp(chunk_lse - lse)``. What is left of a head's mass is that of the tree's keys, and goes to
    the chunk that the first of them falls into once it is committed. Sums are fp64.

    Args:
        chunk_lse: [B, M, Hq, C] fp32, any strides with a unit last one (``tree_attention`` with
            ``chunk_size``; or some of its heads). Not read behind the chunk of the first tree key.
        lse: [B, M, Hq] fp32, any strides with a unit last one. A head with -inf, +inf or NaN sees
            nothing and adds nothing.
        rows: [B] int32, contiguous. The row to read of each sequence, for instance that of the last
            accepted node; clamped to [0, M).
        prefix_lens: [B] int32, contiguous. As in ``tree_attention``.
        chunk_size: keys per chunk, as in ``tree_attention``.
        reduce: "mean" or "max" over the heads.

    Returns:
        scores: [B, C] fp32; 0 behind the chunk of the first tree key. With "mean" a row sums to 1,
        if that chunk is below C.

    Nothing is read on the host.

    Example:
        >>> chunk_lse = torch.tensor([0.5, 0.3, 0.0]).log().view(1, 1, 1, 3)  # [B, M, Hq, C]
        >>> lse = torch.zeros(1, 1, 1)  # [B, M, Hq]: chunks have 0.8 of 1, the tree has the rest
        >>> rows, prefix_lens = torch.tensor([[0], [64]], dtype=torch.int32)
        >>> ops.chunk_scores(chunk_lse, lse, rows, prefix_lens, chunk_size=32)
        tensor([[0.5000, 0.3000, 0.2000]])
    """
    return _chunk_scores(chunk_lse, lse, rows, prefix_lens, chunk_size=chunk_size, reduce=reduce)


@torch.library.register_fake("specextend::chunk_scores")
def _(chunk_lse, lse, rows, prefix_lens, *, chunk_size, reduce="mean"):
    batch, _, _, num_chunks = chunk_lse.shape
    return chunk_lse.new_empty(batch, num_chunks)


def chunk_scores_keys(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    lens: Tensor,
    *,
    chunk_size: int,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    reduce: str = "mean",
) -> Tensor:
    """Make the scores of :func:`chunk_scores` by a pass of its own over the keys.

    This serves layers whose attention did not give the log-sum-exp of its chunks. The row sees all
    keys of its sequence, among them, after compaction, those of the accepted path.

    Args:
        q: [B, M, Hq, D], fp32, fp16 or bf16, any strides with a unit last one.
        k: [B, S, Hkv, D] of the same dtype, any strides with a unit last one. Hq is a multiple of
            Hkv; D a multiple of 8 up to 576.
        rows: [B] int32, contiguous. The row of ``q`` to score for; clamped to [0, M).
        lens: [B] int32, contiguous. Keys of each sequence, clamped to [0, S].
        chunk_size: keys per chunk.
        scale: factor of the logits; None: 1 / sqrt(D).
        softcap: c > 0 makes a logit s into c * tanh(s / c).
        window: w > 0 leaves only the newest w keys visible, the row standing at ``len - 1``.
        reduce: "mean" or "max" over the heads.

    Returns:
        scores: [B, ceil(S / chunk_size)] fp32; 0 behind the last key, and everywhere if there is
        none. With "mean" a row with keys sums to 1.

    Nothing is read on the host.

    Example:
        >>> q, k = torch.zeros(1, 1, 4, 16), torch.randn(1, 96, 2, 16)  # every key counts alike
        >>> rows, lens = torch.tensor([[0], [80]], dtype=torch.int32)
        >>> ops.chunk_scores_keys(q, k, rows, lens, chunk_size=32)
        tensor([[0.4000, 0.4000, 0.2000]])
    """
    return _chunk_scores_keys(
        q,
        k,
        rows,
        lens,
        chunk_size=chunk_size,
        scale=scale,
        softcap=softcap,
        window=window,
        reduce=reduce,
    )


@torch.library.register_fake("specextend::chunk_scores.keys")
def _(q, k, rows, lens, *, chunk_size, scale=None, softcap=0.0, window=0, reduce="mean"):
    num_chunks = (k.shape[1] + chunk_size - 1) // chunk_size
    return q.new_empty(q.shape[0], num_chunks, dtype=torch.float32)
