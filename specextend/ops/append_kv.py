import torch
from torch import Tensor

_append_kv = torch.ops.specextend.append_kv.default


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> None:
    """Write new keys and values at the device-side length, in place.

    Args:
        k_cache, v_cache: [B, S, Hkv, D], fp32, fp16 or bf16, any strides with a unit last one; rows
            [lens_b, lens_b + M) of sequence b are written. The two may differ in Hkv and D.
        k, v: [B, M, Hkv, D], the dtype of the caches, any strides with a unit last one.
        lens: [B] int32, contiguous, first row to write. Rows outside of [0, S) are not written.

    Equivalent to ``specextend.reference.append_kv``. Does not synchronise.
    """
    _append_kv(k_cache, v_cache, k, v, lens)


@torch.library.register_fake("specextend::append_kv")
def _(k_cache, v_cache, k, v, lens):
    return None
