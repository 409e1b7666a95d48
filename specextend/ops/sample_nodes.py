import torch
from torch import Tensor

_sample_nodes = torch.ops.specextend.sample_nodes.default


def sample_nodes(logits: Tensor, uniforms: Tensor | None = None) -> Tensor:
    """The target's token at every node: the most probable one, or a draw.

    With ``uniforms`` the token is the first, in order of ids, whose cumulative probability under
    ``softmax(logits)`` exceeds the node's uniform number. The exponentials are fp32, their sums
    fp64 in fixed order (``csrc/vocab.h``): a row and a uniform number give the same token in any
    batch, on any number of threads, on any instruction set and on any GPU, and a change of the
    logits by rounding changes it only where the uniform number is as close as that to the boundary
    between two tokens. With noise
    that belongs to the position, sampled speculative output therefore equals sampled plain output
    token by token.

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
    """
    return _sample_nodes(logits, uniforms)


@torch.library.register_fake("specextend::sample_nodes")
def _(logits, uniforms=None):
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)
