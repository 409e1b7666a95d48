import torch
from torch import Tensor

_compact_kv = torch.ops.specextend.compact_kv.default


def compact_kv(
    caches: list[Tensor], prefix_lens: Tensor, path: Tensor, num_accepted: Tensor
) -> None:
    """Move the rows of the accepted path behind the committed ones, in place.

    Row P + path[i] goes to row P + i, for i in [0, num_accepted], in all caches; no other row is
    touched. The step between two rounds of tree verification (SpecExtend section 3.2).

    Args:
        caches: at least one; keys and values of all layers, [B, S, Hkv, D] each, of any dtype and
            any strides with a unit last one; written in place. They may differ in Hkv, D, dtype and
            strides; all that agree in these are served at once.
        prefix_lens: [B] int32, contiguous: P, the committed rows.
        path: [B, N] int32, contiguous: the tree slots of the path as ``verify_tree`` gives them.
            path[0] = 0 and strictly increasing, so that path[i] >= i, up to ``num_accepted``; what
            follows is not read.
        num_accepted: [B] int32, contiguous, < N: nodes accepted besides the root; negative: none
            and not even the root.

    ``prefix_lens`` is not changed. A row outside of [0, S) is neither read nor written. The host
    does not wait for the device.
    """
    _compact_kv(caches, prefix_lens, path, num_accepted)


@torch.library.register_fake("specextend::compact_kv")
def _(caches, prefix_lens, path, num_accepted):
    return None
