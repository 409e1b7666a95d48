"""Wraps and documents `merge_states`; the fake kernel is here too."""

import torch
from torch import Tensor

_merge_states = torch.ops.specextend.merge_states.default


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attentions of the same queries over two disjoint key sets.

    This is the log-sum-exp merge of split-prefix tree attention (SpecExtend section 3, LongSpec's
    hybrid tree attention), with fp32 weights.

    Args:
        o_a, o_b: [..., D], fp32, fp16 or bf16, contiguous: output of each part.
        lse_a, lse_b: [...], fp32, contiguous: natural log of the softmax denominators, scale
            included. -inf (or +inf, as some libraries write it) says that the part saw no key, and
            its output is then not read.

    Returns:
        o: like ``o_a``, the attention over the union; 0 where both parts are empty.
        lse: like ``lse_a``; -inf where both are empty.

    Example:
        >>> o_a, o_b = torch.zeros(3, 16), torch.ones(3, 16)  # [..., D]
        >>> lse_a, lse_b = torch.tensor([[0.25] * 3, [0.75] * 3]).log()  # [...]
        >>> o, lse = ops.merge_states(o_a, lse_a, o_b, lse_b)
        >>> o.shape, o[:, 0], lse.exp()
        (torch.Size([3, 16]), tensor([0.7500, 0.7500, 0.7500]), tensor([1., 1., 1.]))
    """
    return _merge_states(o_a, lse_a, o_b, lse_b)


@torch.library.register_fake("specextend::merge_states")
def _(o_a, lse_a, o_b, lse_b):
    return torch.empty_like(o_a), torch.empty_like(lse_a)
