"""Wraps and documents `rotary_append`; the fake kernel is here too."""

import torch
from torch import Tensor

_rotary_append = torch.ops.specextend.rotary_append.default


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lens: Tensor,
) -> Tensor:
    """Rotate queries and keys by their positions, and write keys and values to their caches.

    These are the rotary embedding (Su et al. 2021) as the models of `transformers` apply it and
    :func:`append_kv` in one pass. With x the first R dimensions of a row of a head, and h the same
    with the halves exchanged and the new first one negated, they become ``x * cos + h * sin``,
    each product and the sum rounded to the dtype; the others stay. On a CPU the bits are those of
    ``apply_rotary_pos_emb``.

    Args:
        q: [B, M, Hq, D], fp32, fp16 or bf16, any strides with a unit last one.
        k, v: [B, M, Hkv, D], of q's dtype, any strides with a unit last one; not in the rows that
            are written. ``v`` may have another D.
        cos, sin: [B or 1, M, R], of q's dtype, any strides with a unit last one; R is even, and no
            more than D. Both halves of the columns are read as they are.
        k_cache, v_cache: [B, S, Hkv, D], of q's dtype, any strides with a unit last one; written
            in place.
        lens: [B] int32, contiguous. Row i of ``k`` and ``v`` goes to row ``lens[b] + i``; what does
            not fit below S, or behind a negative length, is not written.

    Returns:
        [B, M, Hq, D]: all queries, rotated, contiguous.

    ``lens`` is not changed. The host does not wait for the device.

    Example:
        >>> q, k, v = torch.ones(3, 1, 1, 2, 4).unbind()  # [B, M, H, D]
        >>> cos, sin = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)  # a quarter turn
        >>> k_cache, v_cache = torch.zeros(2, 1, 8, 2, 4).unbind()  # [B, S, Hkv, D]
        >>> lens = torch.tensor([5], dtype=torch.int32)
        >>> ops.rotary_append(q, k, v, cos, sin, k_cache, v_cache, lens)[0, 0, 0]
        tensor([-1., -1.,  1.,  1.])
        >>> k_cache[0, 4:7, 0, 0].tolist(), v_cache[0, 4:7, 0, 0].tolist()
        ([0.0, -1.0, 0.0], [0.0, 1.0, 0.0])
    """
    return _rotary_append(q, k, v, cos, sin, k_cache, v_cache, lens)


@torch.library.register_fake("specextend::rotary_append")
def _(q, k, v, cos, sin, k_cache, v_cache, lens):
    return q.new_empty(q.shape)
