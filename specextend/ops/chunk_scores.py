import torch
from torch import Tensor

_chunk_scores = torch.ops.specextend.chunk_scores.default


def chunk_scores(
    chunk_lse: Tensor,
    lse: Tensor,
    rows: Tensor,
    prefix_lens: Tensor,
    *,
    chunk_size: int,
    reduce: str = "mean",
) -> Tensor:
    """How much attention one query row pays to each chunk of the context.

    The scores of SpecExtend's cross-model retrieval (section 4.2), exact and as a by-product of the
    verify pass: the softmax mass of chunk c under head h is ``exp(chunk_lse - lse)``. What is left
    of a head's mass is that of the tree's keys, and goes to the chunk that the first of them falls
    into once it is committed. Sums are fp64.

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
    """
    return _chunk_scores(
        chunk_lse, lse, rows, prefix_lens, chunk_size=chunk_size, reduce=reduce
    )


@torch.library.register_fake("specextend::chunk_scores")
def _(chunk_lse, lse, rows, prefix_lens, *, chunk_size, reduce="mean"):
    batch, _, _, num_chunks = chunk_lse.shape
    return chunk_lse.new_empty(batch, num_chunks)
