"""Wraps and documents `expand_tree`; the fake kernel is here too."""

import torch
from torch import Tensor

_expand_tree = torch.ops.specextend.expand_tree.default


def expand_tree(
    logits: Tensor, beam_logp: Tensor, *, top_k: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expand a beam by one level: find each frontier node's best children, and the best of all.

    OPT-Tree (SpecExtend's draft tree) and EAGLE-2 expand like this, in log space. A node's row
    gives the same bits alone and among others, on any number of threads and any instruction set.

    Args:
        logits: [B, F, V] at the F frontier nodes, fp32, fp16 or bf16, any strides with a unit last
            one. NaN counts as -inf; logits of +inf share all the probability.
        beam_logp: [B, F] fp32, contiguous. Log probability of each frontier node given the root,
            which is the sum along its path; 0 for the root itself.
        top_k: children per node, at most V.
        width: size of the next frontier, at most F * top_k.

    Returns:
        cand_tokens: [B, F, top_k] int64. Per node the tokens of the largest logits, in descending
            order; of equal logits the lower id first.
        cand_logp: [B, F, top_k] fp32. ``beam_logp + log_softmax(logits)`` of them.
        beam: [B, width] int32. Indices into the F * top_k candidates of the largest ``cand_logp``,
            in descending order; of equal ones the lower index first.
        beam_logp_out: [B, width] fp32. Their ``cand_logp``.

    Nothing is read on the host.

    Example:
        >>> probs = torch.tensor([[[0.1, 0.6, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]]])  # [B, F, V]
        >>> frontier = torch.tensor([[0.5, 0.5]]).log()  # [B, F]
        >>> tokens, logp, beam, beam_logp = ops.expand_tree(probs.log(), frontier, top_k=2, width=3)
        >>> tokens, logp.shape
        (tensor([[[1, 2],
                 [0, 1]]]), torch.Size([1, 2, 2]))
        >>> beam, beam_logp.exp()
        (tensor([[2, 0, 1]], dtype=torch.int32), tensor([[0.3500, 0.3000, 0.1000]]))
    """
    return _expand_tree(logits, beam_logp, top_k=top_k, width=width)


@torch.library.register_fake("specextend::expand_tree")
def _(logits, beam_logp, *, top_k, width):
    batch, frontier, _ = logits.shape
    return (
        logits.new_empty(batch, frontier, top_k, dtype=torch.int64),
        logits.new_empty(batch, frontier, top_k, dtype=torch.float32),
        logits.new_empty(batch, width, dtype=torch.int32),
        logits.new_empty(batch, width, dtype=torch.float32),
    )
