"""Wraps and documents `tree_attention`; the fake kernel is here too."""

import torch
from torch import Tensor

_tree_attention = torch.ops.specextend.tree_attention.default


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_lens: Tensor,
    tree_mask: Tensor | None = None,
    *,
    num_tree_keys: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    attention_chunk: int = 0,
    q_depths: Tensor | None = None,
    k_depths: Tensor | None = None,
    sinks: Tensor | None = None,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from tree nodes to a long prefix and to their own ancestors, in one pass.

    This is split-prefix tree attention (SpecExtend section 3.2, LongSpec's hybrid tree attention):
    the prefix needs no mask, the tree's own keys need a packed one, and nothing of size rows x
    prefix exists. With M = 1 it is plain decoding. The log-sum-exp of each chunk of the prefix,
    which cross-model retrieval scores chunks with (SpecExtend section 3.3), is a by-product.

    Args:
        q: [B, M, Hq, D], fp32, fp16 or bf16; D a multiple of 8 up to 576. Any strides with a unit
            last one, as for ``k`` and ``v``.
        k: [B, S, Hkv, D], the cache, Hq a multiple of Hkv. Rows [0, P) are the prefix, rows
            [P, P + N) the tree's own; the others are not read.
        v: [B, S, Hkv, Dv], likewise; Dv a multiple of 8 up to 512. It may share memory with ``k``,
            as where values are the first columns of latent keys (``v = k[..., :512]``, multi-head
            latent attention, DeepSeek-V2, arXiv 2405.04434, section 2.1).
        prefix_lens: [B] int32. P of each sequence, clamped to [0, S - N]; never read by the host.
        tree_mask: [B, M, ceil(N / 64)] int64, contiguous. Bit j % 64 of word j / 64 says that a row
            sees tree key j. None: a chain, row i sees the tree keys j <= i + N - M.
        num_tree_keys: N; None: M. With 0, the prefix alone.
        scale: factor of the logits; None: 1 / sqrt(D).
        softcap: above 0, logits become ``softcap * tanh(logit / softcap)``.
        window: above 0, a key is seen only at positions > position of the row - window. A prefix
            key's position is its row, that of tree key j is ``P + k_depths[j]``, that of row i
            ``P + q_depths[i]``.
        attention_chunk: c > 0 cuts positions into chunks of c; a row at position p sees a key only
            at positions >= p // c * c, the start of its own chunk (Llama 4's chunked attention).
            Not together with ``window``.
        q_depths, k_depths: [B, M] and [B, N] int32, contiguous, read with ``window`` or
            ``attention_chunk`` only. None: those of a chain, ``i + N - M`` and ``j``.
        sinks: [Hq] fp32. One more logit per head, which takes part in the softmax with no value.
        chunk_size: above 0, ``chunk_lse`` is returned.

    Returns:
        out: [B, M, Hq, Dv], contiguous, dtype of ``q``. 0 for a row that sees no key.
        lse: [B, M, Hq] fp32, natural log-sum-exp over the keys (without the sink); -inf for none.
        chunk_lse: [B, M, Hq, ceil(S / chunk_size)] fp32. The part of each chunk of the prefix in
            ``lse``: chunk c holds the keys [c * chunk_size, (c + 1) * chunk_size) below P; -inf
            where a row sees none of them. Without ``chunk_size`` an empty tensor.

    On the CPU a row's bits depend on its query and the keys that it sees, in their order, and on
    nothing else: not on threads, on other rows and sequences, on the strides, or on the slots
    between its tree keys. So a node of a tree gets the bits of plain decoding.

    Example:
        >>> q = torch.randn(1, 3, 4, 16)  # [B, M, Hq, D]: a root and two children
        >>> k, v = torch.randn(2, 1, 64, 2, 16).unbind()  # [B, S, Hkv, D]
        >>> prefix_lens = torch.tensor([40], dtype=torch.int32)
        >>> mask = torch.tensor([[[0b001], [0b011], [0b101]]])  # [B, M, 1]
        >>> out, lse, chunk_lse = ops.tree_attention(q, k, v, prefix_lens, mask, chunk_size=32)
        >>> out.shape, lse.shape, chunk_lse.shape
        (torch.Size([1, 3, 4, 16]), torch.Size([1, 3, 4]), torch.Size([1, 3, 4, 2]))
        >>> seen = [*range(41), 42]  # by the second child: the prefix, the root, itself
        >>> row, keys, values = (x.transpose(1, 2) for x in (q[:, 2:], k[:, seen], v[:, seen]))
        >>> attend = torch.nn.functional.scaled_dot_product_attention
        >>> dense = attend(row, keys, values, enable_gqa=True).transpose(1, 2)
        >>> torch.testing.assert_close(out[:, 2:], dense)
    """
    return _tree_attention(
        q,
        k,
        v,
        prefix_lens,
        tree_mask,
        num_tree_keys=num_tree_keys,
        scale=scale,
        softcap=softcap,
        window=window,
        attention_chunk=attention_chunk,
        q_depths=q_depths,
        k_depths=k_depths,
        sinks=sinks,
        chunk_size=chunk_size,
    )


@torch.library.register_fake("specextend::tree_attention")
def _(q, k, v, prefix_lens, tree_mask=None, *, chunk_size=0, **_options):
    batch, rows, heads, _ = q.shape
    chunks = (k.shape[1] + chunk_size - 1) // chunk_size if chunk_size else 0
    return (
        q.new_empty(batch, rows, heads, v.shape[-1]),
        q.new_empty(batch, rows, heads, dtype=torch.float32),
        q.new_empty((batch, rows, heads, chunks) if chunk_size else (0,), dtype=torch.float32),
    )
