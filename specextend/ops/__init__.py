"""Wraps the operators as Python functions; a module each has wrapper, documentation, fake kernel.

Each function calls ``torch.ops.specextend.<name>``, which ``import specextend._C`` alone registers.
None reads a device-side length on the host, none synchronises, and all work under CUDA graph
capture. The examples in their documentation stand behind ``import torch`` and ``from specextend
import ops``.
"""

from . import cuda_missing
from .append_kv import append_kv
from .chunk_scores import chunk_scores, chunk_scores_keys
from .compact_kv import compact_kv
from .expand_tree import expand_tree
from .finalize_tree import finalize_tree
from .gather_chunks import gather_chunks
from .invariant_linear import invariant_linear
from .merge_states import merge_states
from .rms_norm import add_rms_norm, rms_norm
from .rotary_append import rotary_append
from .sample_nodes import sample_nodes
from .select_chunks import select_chunks
from .silu_mul import silu_mul
from .tree_attention import tree_attention
from .verify_tree import verify_tree

__all__ = [
    "add_rms_norm",
    "append_kv",
    "chunk_scores",
    "chunk_scores_keys",
    "compact_kv",
    "expand_tree",
    "finalize_tree",
    "gather_chunks",
    "invariant_linear",
    "merge_states",
    "rms_norm",
    "rotary_append",
    "sample_nodes",
    "select_chunks",
    "silu_mul",
    "tree_attention",
    "verify_tree",
]

cuda_missing.register()
