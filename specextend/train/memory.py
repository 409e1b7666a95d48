"""Knows how much memory a step of training takes, and how many windows at a time fit into it.

What a step holds follows from shapes. The factors here were found by counting the bytes that
torch's operations hold in runs of many shapes, and are rounded up.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from ..terminal import bytes_text
from .loss import block_rows
from .target import FrozenTarget

SHARE = 0.8  # of what is free; the rest is for what operations take within themselves
# Bytes for each of the draft's logits that exist at once, with what their loss is made of: towards
# the target's distribution, or towards a token.
SOFT, HARD = 20, 12


class Sized(Protocol):
    """Says how much memory it takes."""

    #: options that make it less
    remedies: str

    def memory(self, windows: int, length: int) -> int:
        """Return about how many bytes a step holds at most, besides the weights.

        Args:
            windows: taken together.
            length: tokens of each.
        """


def product_bytes(target: FrozenTarget) -> int:
    """Return the bytes of a number that goes into the draft's matrix products."""
    return 4 if target.model.dtype.itemsize == 4 else 2


def training_bytes(module: nn.Module) -> int:
    """Return the bytes of gradients, the optimizer's two moments, and a product's gradient before
    it is added."""
    sizes = [p.numel() * 4 for p in module.parameters() if p.requires_grad]
    return 3 * sum(sizes) + 2 * max(sizes)


def reading_bytes(target: FrozenTarget, rows: int, logits: bool, features: int, vocab: int) -> int:
    """Return the bytes of what the target makes of so many tokens, and of a block of logits.

    Args:
        logits: those of the target are kept.
        features: hidden states that are kept of each token.
        vocab: of the draft.
    """
    config, item = target.model.config.get_text_config(), target.model.dtype.itemsize
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    each = 2 * target.num_layers * kv_heads * head_dim + features * config.hidden_size
    logit = HARD * vocab
    if logits:
        each += target.vocab
        logit = SOFT * vocab + item * target.vocab
    return rows * each * item + min(rows, block_rows(target.vocab)) * logit


def layer_bytes(target: FrozenTarget, rows: int) -> int:
    """Return the bytes that a layer of the target holds while it reads so many tokens."""
    config = target.model.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return rows * (4 * wide + 8 * config.hidden_size) * target.model.dtype.itemsize


def fitting_micro_batch(recipe: Sized, windows: int, length: int, free: int) -> tuple[int, int]:
    """Return how many windows to take at a time, and about how many bytes that needs.

    Args:
        recipe: what is trained.
        windows: of a step, in this process; what is returned divides it.
        length: tokens of each.
        free: bytes.

    Raises:
        ValueError: not even one fits.
    """
    for count in range(windows, 0, -1):
        needed = recipe.memory(count, length)
        if windows % count == 0 and needed <= SHARE * free:
            return count, needed
    raise ValueError(
        f"training on one window of {length:,} tokens at a time needs about "
        f"{bytes_text(needed / SHARE)} of memory, and {bytes_text(free)} are free: choose "
        f"{recipe.remedies}; --micro-batch 1 tries it all the same"
    )
