"""Wraps and documents `append_kv`; the fake kernel is here too."""

import torch
from torch import Tensor

_append_kv = torch.ops.specextend.append_kv.default


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> None:
    """Write new keys and values behind the rows that a cache holds, in place.

    The rows of a tree get to [P, P + N) this way before the target verifies it (SpecExtend section
    3.2), and those of a prompt to their places.

    Args:
        k_cache, v_cache: [B, S, Hkv, D], any strides with a unit last one; written in place. The
            two may differ in dtype and D.
        k, v: [B, M, Hkv, D], of the dtypes of the caches, any strides with a unit last one; not in
            the rows that are written.
        lens: [B] int32, contiguous. Row i of ``k`` and ``v`` goes to row ``lens[b] + i``; what does
            not fit below S, or behind a negative length, is not written.

    ``lens`` is not changed. The host does not wait for the device.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 1, 8, 2, 16).unbind()  # [B, S, Hkv, D]
        >>> k, v = torch.ones(2, 1, 3, 2, 16).unbind()  # [B, M, Hkv, D]
        >>> ops.append_kv(k_cache, v_cache, k, v, torch.tensor([4], dtype=torch.int32))
        >>> k_cache[0, :, 0, 0].tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    """
    _append_kv(k_cache, v_cache, k, v, lens)


@torch.library.register_fake("specextend::append_kv")
def _(k_cache, v_cache, k, v, lens):
    return None
