"""Wraps and documents `finalize_tree`; the fake kernel is here too."""

import torch
from torch import Tensor

_finalize_tree = torch.ops.specextend.finalize_tree.default


def finalize_tree(
    logp: Tensor, parents: Tensor, *, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the best nodes of all expanded levels, as the tree to verify.

    This is OPT-Tree's selection: the ``num_nodes`` candidates most probable given the root maximise
    the expected number of accepted tokens. A candidate counts with the least log probability on its
    path and ties go to the smaller depth, so the chosen set holds every chosen node's ancestors
    also where probabilities of 1 or 0 make ties.

    Args:
        logp: [B, T] fp32, contiguous. Log probability of each candidate given the root; NaN counts
            as -inf.
        parents: [B, T] int32, contiguous. Index of each candidate's parent, below its own; -1, or
            anything out of range, for a child of the root.
        num_nodes: nodes to choose, at most T.

    Returns:
        nodes: [B, num_nodes] int32. Indices of the chosen candidates, ascending, so that parents
            come before their children. Ranked by (logp descending, depth ascending, index
            ascending).
        tree_parents: [B, 1 + num_nodes] int32. Parents in the tree whose node 0 is the root (-1)
            and whose node 1 + i is ``nodes[:, i]``.
        depths: [B, 1 + num_nodes] int32. 0 for the root.
        mask: [B, 1 + num_nodes, ceil((1 + num_nodes) / 64)] int64 holding uint64 words. Bit j % 64
            of word j / 64 of row i: node j is i or an ancestor of i.

    Nothing is read on the host.

    Example:
        >>> logp = torch.tensor([[0.6, 0.3, 0.5, 0.1]]).log()  # [B, T]
        >>> parents = torch.tensor([[-1, -1, 0, 2]], dtype=torch.int32)
        >>> nodes, tree_parents, depths, mask = ops.finalize_tree(logp, parents, num_nodes=2)
        >>> nodes, tree_parents
        (tensor([[0, 2]], dtype=torch.int32), tensor([[-1,  0,  1]], dtype=torch.int32))
        >>> depths[0].tolist(), mask[0, :, 0].tolist()
        ([0, 1, 2], [1, 3, 7])
    """
    return _finalize_tree(logp, parents, num_nodes=num_nodes)


@torch.library.register_fake("specextend::finalize_tree")
def _(logp, parents, *, num_nodes):
    batch = logp.shape[0]
    slots = 1 + num_nodes
    return (
        parents.new_empty(batch, num_nodes),
        parents.new_empty(batch, slots),
        parents.new_empty(batch, slots),
        parents.new_empty(batch, slots, (slots + 63) // 64, dtype=torch.int64),
    )
