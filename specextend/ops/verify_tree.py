"""Wraps and documents `verify_tree`; the fake kernel is here too."""

import torch
from torch import Tensor

_verify_tree = torch.ops.specextend.verify_tree.default


def verify_tree(
    tokens: Tensor, parents: Tensor, target_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accept the longest path of a draft tree that follows the target's own choices.

    From the root, the walk goes to the child that carries the target's token, as long as there is
    one. With argmax choices this is greedy verification; with one draw per node from the target's
    distribution (:func:`sample_nodes`) the text is distributed exactly as the target's, for any
    tree that does not depend on those draws (SpecExtend section 4.1, SpecInfer's naive sampling).

    Args:
        tokens: [B, N] int64, contiguous, the root first.
        parents: [B, N] int32, contiguous. Index of each node's parent; node 0 is the root whatever
            it says. Parents need not precede their children. A node whose parent is out of range
            is never reached.
        target_tokens: [B, N] int64, contiguous. What the target chose after each node; a negative
            one (a row of NaN) matches no child.

    Returns:
        path: [B, N] int32. The accepted nodes, ``path[:, 0] == 0``, tail -1. Of siblings with the
            same token the lowest index is taken.
        num_accepted: [B] int32. Accepted nodes besides the root.
        emitted: [B, N] int64. The accepted tokens, then the target's choice after the last of
            them: ``num_accepted + 1`` tokens, tail -1.
        next_root: [B] int64. The last token emitted.

    Nothing is read on the host.

    Example:
        >>> tokens = torch.tensor([[7, 11, 12, 13]])  # [B, N], the root first
        >>> parents = torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32)
        >>> choices = torch.tensor([[11, 13, 5, 9]])  # the target's, after each node
        >>> path, num_accepted, emitted, next_root = ops.verify_tree(tokens, parents, choices)
        >>> path, num_accepted
        (tensor([[ 0,  1,  3, -1]], dtype=torch.int32), tensor([2], dtype=torch.int32))
        >>> emitted, next_root
        (tensor([[11, 13,  9, -1]]), tensor([9]))
    """
    return _verify_tree(tokens, parents, target_tokens)


@torch.library.register_fake("specextend::verify_tree")
def _(tokens, parents, target_tokens):
    batch, num_nodes = tokens.shape
    return (
        tokens.new_empty(batch, num_nodes, dtype=torch.int32),
        tokens.new_empty(batch, dtype=torch.int32),
        tokens.new_empty(batch, num_nodes),
        tokens.new_empty(batch),
    )
