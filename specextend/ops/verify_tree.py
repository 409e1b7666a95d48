import torch
from torch import Tensor

_verify_tree = torch.ops.specextend.verify_tree.default
_verify_tree_rejection = torch.ops.specextend.verify_tree.rejection


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


def verify_tree_rejection(
    tokens: Tensor,
    parents: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    uniforms: Tensor,
    final_uniforms: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accept a path of a sampled draft tree by multi-round rejection.

    SpecInfer's multi-step speculative sampling (arXiv 2305.09781, section 4.3). At a node, a child
    with token x is accepted with probability ``min(1, p(x) / q(x))``, q being the draft's law and p
    the target's; each rejection turns p into the normalised positive part of ``p - q`` before the
    next child is tried. Where all are rejected, the last token is drawn from what p has become, so
    the text is distributed exactly as the target's, whatever q is.

    That takes siblings drawn independently from their parent's ``draft_probs``, repetitions kept,
    and shapes that do not depend on what was drawn. For any other tree use :func:`verify_tree`.

    Args:
        tokens, parents: as for :func:`verify_tree`. Children are tried in the order of their
            indices; one that its parent's ``draft_probs`` cannot give is passed over.
        target_probs: [B, N, V] fp32, any strides with a unit last one. The target's law after each
            node.
        draft_probs: [B, N, V] fp32, any strides with a unit last one. The law that each node's
            children were drawn from; not read at nodes without children.
        uniforms: [B, N], fp32 or fp64, contiguous, in [0, 1): for the acceptance of each node.
        final_uniforms: [B, N] of the same dtype, contiguous: for the last token, read at the node
            where the walk ends. Tokens are drawn as in :func:`sample_nodes`, with fp64 sums.

    Returns:
        path, num_accepted, emitted, next_root: as from :func:`verify_tree`. ``next_root`` is -1
        where the law to draw it from holds a NaN or no probability.

    Nothing is read on the host.
    """
    return _verify_tree_rejection(
        tokens, parents, target_probs, draft_probs, uniforms, final_uniforms
    )


def _results(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_nodes = tokens.shape
    return (
        tokens.new_empty(batch, num_nodes, dtype=torch.int32),
        tokens.new_empty(batch, dtype=torch.int32),
        tokens.new_empty(batch, num_nodes),
        tokens.new_empty(batch),
    )


@torch.library.register_fake("specextend::verify_tree")
def _(tokens, parents, target_tokens):
    return _results(tokens)


@torch.library.register_fake("specextend::verify_tree.rejection")
def _(tokens, parents, target_probs, draft_probs, uniforms, final_uniforms):
    return _results(tokens)
