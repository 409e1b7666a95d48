"""Every op in plain PyTorch: the specification that the compiled kernels are tested against.

Written to be read. Names, arguments and results are those of :mod:`specextend.ops`; floating-point
work is done in the dtype of the arguments, so that float64 inputs give the reference values. Slow,
free of any compiled code, and free to read device tensors on the host.
"""

import torch
from torch import Tensor


def verify_tree(
    tokens: Tensor, parents: Tensor, target_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk from the root to the child that carries the target's token, while there is one."""
    batch, num_nodes = tokens.shape
    path = torch.full_like(parents, -1)
    emitted = torch.full_like(tokens, -1)
    num_accepted = parents.new_zeros(batch)
    for b in range(batch):
        node, walked = 0, [0]
        while True:
            choice = int(target_tokens[b, node])
            children = [
                child
                for child in range(1, num_nodes)
                if parents[b, child] == node and tokens[b, child] == choice >= 0
            ]
            emitted[b, len(walked) - 1] = choice
            if not children:
                break
            node = children[0]
            walked.append(node)
        path[b, : len(walked)] = torch.tensor(walked)
        num_accepted[b] = len(walked) - 1
    next_root = emitted.gather(1, num_accepted[:, None].long())[:, 0]
    return path, num_accepted, emitted, next_root
