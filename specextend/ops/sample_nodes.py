"""Wraps and documents `sample_nodes`; the fake kernel is here too."""

import torch
from torch import Tensor

_sample_nodes = torch.ops.specextend.sample_nodes.default


def sample_nodes(logits: Tensor, uniforms: Tensor | None = None) -> Tensor:
    """Choose the target's token at every node: the most probable one, or a draw.

    With ``uniforms`` the token is the first, in order of ids, whose cumulative probability under
    ``softmax(logits)`` exceeds the node's uniform number. The exponentials are fp32, their sums
    fp64 in fixed order (``csrc/vocab.h``): a row and a uniform number give the same token in any
    batch, on any number of threads, on any instruction set and on any GPU. Logits that are rounded
    differently change it only where the uniform number is as close as that to the boundary between
    two tokens. With noise that belongs to the position, sampled speculative output therefore equals
    sampled plain output token by token.

    Args:
        logits: [B, N, V], fp32, fp16 or bf16, any strides with a unit last one. Already processed
            (temperature, top-k, ...); -inf marks an impossible token.
        uniforms: [B, N], fp32 or fp64, contiguous, in [0, 1); None: the largest logit, of equal
            ones the lowest id.

    Returns:
        tokens: [B, N] int64. Never one of probability 0, which with ``uniforms`` includes those
        87 or more below the largest logit of their block of 512. -1 where there is no choice: a
        row with a NaN, or all -inf; with ``uniforms`` also a row with +inf, or a NaN in its place
        in ``uniforms``.

    Nothing is read on the host.

    Example:
        >>> logits = torch.tensor([[[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]]).log()  # [B, N, V]
        >>> ops.sample_nodes(logits)
        tensor([[1, 0]])
        >>> ops.sample_nodes(logits, torch.tensor([[0.8, 0.6]]))  # 0.7 < 0.8, and 0.5 < 0.6 < 0.7
        tensor([[2, 1]])
    """
    return _sample_nodes(logits, uniforms)


@torch.library.register_fake("specextend::sample_nodes")
def _(logits, uniforms=None):
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)
