"""Finds out how far each layer of a model sees, by asking the masks that it makes for itself.

Most families tell their window to the attention function. Some have it in their masks alone, of
which there are none here, as all have chunks of attention; a few tokens do not show it either. So
the model runs once under the name of an attention that notes, for every layer, with which of its
masks it came.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from .cache import KVCache, Pass, current_pass

#: the name that the attention which asks has in `transformers`
ASKING = "specextend_asking"

#: that the forward which is asked has
TOKENS = 2

# Marks masks, as no mask of `transformers` would; with their numbers exact in every dtype. An
# attention that does not go through the interface may add them, and is found out by the trial.
_FIRST = 64


@dataclass
class Question(Pass):
    """Holds what a forward is asked, and what it answers.

    Attributes:
        farthest: the position to look back from.
        flash: the model's own attention is one that takes its window from what it is told.
        masks: how far each mask that was made shows: its window and its chunk, see :func:`_reach`;
            None: it cannot be told.
        windows: of each layer, of its mask or as its attention is told: keys that a token sees, the
            own one included; 0: all.
        chunks: of layers in which a token sees from the start of its own chunk on: its length.
    """

    farthest: int = 0
    flash: bool = False
    masks: list[tuple[int, int] | None] = field(default_factory=list)
    windows: dict[int, int] = field(default_factory=dict)
    chunks: dict[int, int] = field(default_factory=dict)


def question(model: PreTrainedModel, device: torch.device) -> Question:
    """Make what a forward of ``model`` is asked."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    flash = "flash" in (config._attn_implementation or "")
    empty = KVCache(0, 0, 1, device)
    return Question(empty, [], 0, attention=ASKING, farthest=limit - 1, flash=flash)


def cache_windows(model: PreTrainedModel) -> dict[int, int]:
    """Return how many keys each layer keeps in the cache that ``generate`` makes, where these are
    not all of a text."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    kept = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        window = getattr(layer, "sliding_window", None)
        if window and (limit is None or window < limit):
            kept[index] = window
    return kept


def _make_mask(*args, mask_function, dtype: torch.dtype = torch.float32, **kwargs) -> Tensor:
    state, device = current_pass(), current_pass().cache.lens.device
    state.masks.append(_reach(mask_function, state.farthest, device))
    mark = float(_FIRST + len(state.masks) - 1)
    return torch.full((1, 1, TOKENS, TOKENS), mark, dtype=dtype, device=device)


def _reach(mask_function, position: int, device: torch.device) -> tuple[int, int] | None:
    """Find out what a mask shows to ``position`` and to tokens before it.

    Returns:
        Its window, and the length of its chunks of attention; 0: none. None if it cannot be told.
    """
    zero = torch.tensor(0, device=device)

    def seen(position: int) -> int:
        """Count the keys that are seen from a position, by halving."""

        def sees(distance: int) -> bool:
            key = torch.tensor(position - distance, device=device)
            return bool(mask_function(zero, zero, torch.tensor(position, device=device), key))

        if sees(position):
            return position + 1
        near, far = 0, position  # distances
        while far - near > 1:
            middle = (near + far) // 2
            near, far = (middle, far) if sees(middle) else (near, middle)
        return near + 1

    try:
        count = seen(position)
        if count == position + 1:
            return 0, 0
        begin = position + 1 - count
        # A window shows as much from one position before, a chunk one key less; and from before
        # its begin all of the chunk before.
        if count == seen(position - 1):
            return count, 0
        chunk = seen(begin - 1)
        return (0, chunk) if begin % chunk == 0 else None
    except (IndexError, RuntimeError):  # it looks into tensors of the tokens that it was made for
        return None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Note which mask a layer came with; what it would see of it does not matter."""
    state, known = current_pass(), None
    if attention_mask is not None and not state.flash:
        index = int(attention_mask.flatten()[0]) - _FIRST
        known = state.masks[index] if 0 <= index < len(state.masks) else None
    window, chunk = known or (sliding_window or 0, 0)
    state.windows[module.layer_idx] = window
    if chunk:
        state.chunks[module.layer_idx] = chunk
    batch, heads, rows, _ = query.shape
    return query.new_zeros(batch, rows, heads, value.shape[-1]), None


AttentionInterface.register(ASKING, _attend)
AttentionMaskInterface.register(ASKING, _make_mask)
