"""The ops as Python functions, one module each: wrapper, fake kernel, documentation.

Each calls ``torch.ops.specextend.<name>``, which ``import specextend._C`` alone registers. None reads
a device-side length on the host, none synchronises, and all work under CUDA graph capture.
"""

from .expand_tree import expand_tree
from .finalize_tree import finalize_tree
from .merge_states import merge_states
from .sample_nodes import sample_nodes
from .tree_attention import tree_attention
from .verify_tree import verify_tree

__all__ = [
    "expand_tree",
    "finalize_tree",
    "merge_states",
    "sample_nodes",
    "tree_attention",
    "verify_tree",
]
