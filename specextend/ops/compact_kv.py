"""Wraps and documents `compact_kv`; the fake kernel is here too."""

import torch
from torch import Tensor

_compact_kv = torch.ops.specextend.compact_kv.default


def compact_kv(
    caches: list[Tensor], prefix_lens: Tensor, path: Tensor, num_accepted: Tensor
) -> None:
    """Move the rows of the accepted path behind the committed ones, in place.

    Row P + path[i] goes to row P + i, for i in [0, num_accepted], in all caches; no other row is
    touched. This is the step between two rounds of tree verification (SpecExtend section 3.2).

    Args:
        caches: at least one; keys and values of all layers, [B, S, Hkv, D] each, of any dtype and
            any strides with a unit last one; written in place. They may differ in Hkv, D, dtype and
            strides; all that agree in these are served at once. No two share memory: where values
            are columns of the keys, give the keys alone.
        prefix_lens: [B] int32, contiguous: P, the committed rows.
        path: [B, N] int32, contiguous: the tree slots of the path as ``verify_tree`` gives them.
            They start with 0 and increase strictly up to ``num_accepted``, so that path[i] >= i;
            what follows is not read.
        num_accepted: [B] int32, contiguous, < N: nodes accepted besides the root; negative: none
            and not even the root.

    ``prefix_lens`` is not changed. A row outside of [0, S) is neither read nor written. The host
    does not wait for the device.

    Example:
        >>> keys = torch.arange(8.0).view(1, 8, 1, 1).repeat(1, 1, 2, 16)  # row j of S = 8 holds j
        >>> prefix_lens, num_accepted = torch.tensor([[3], [2]], dtype=torch.int32)
        >>> path = torch.tensor([[0, 2, 4, -1, -1]], dtype=torch.int32)  # [B, N]
        >>> ops.compact_kv([keys], prefix_lens, path, num_accepted)  # 3 stays, 5 and 7 move up
        >>> keys[0, :, 0, 0].tolist()
        [0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 6.0, 7.0]
    """
    _compact_kv(caches, prefix_lens, path, num_accepted)


@torch.library.register_fake("specextend::compact_kv")
def _(caches, prefix_lens, path, num_accepted):
    return None
