import torch
from torch import Tensor

_compact_kv = torch.ops.specextend.compact_kv.default


def compact_kv(caches: list[Tensor], prefix_lens: Tensor, path: Tensor, num_accepted: Tensor) -> None:
    """Move the rows of the accepted path to the front, in every cache, in place.

    Row P + path[i] goes to row P + i for i in [0, num_accepted], in K and V of all layers at once.

    Args:
        caches: tensors [B, S, Hkv, D], fp32, fp16 or bf16, any strides with a unit last one; they
            may differ in Hkv and D. Rows that no path names keep their bits.
        prefix_lens: [B] int32, contiguous: P.
        path: [B, L] int32, contiguous, tree slots; path[0] = 0, strictly increasing, so that
            path[i] >= i and no row is overwritten before it is read. What follows
            ``num_accepted`` is not read.
        num_accepted: [B] int32, contiguous, nodes besides the root; at most L - 1 counts.

    Equivalent to ``specextend.reference.compact_kv``. Does not synchronise.
    """
    _compact_kv(caches, prefix_lens, path, num_accepted)


@torch.library.register_fake("specextend::compact_kv")
def _(caches, prefix_lens, path, num_accepted):
    return None
