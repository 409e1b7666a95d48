"""Finds out how far each layer of a model sees, by asking the masks that it makes for itself.

Most families tell their window to the attention function. Some have it in their masks alone, of
which there are none here; a few tokens do not show it either. So the model runs once under the name
of an attention that notes, for every layer, with which of its masks it came.
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
        masks: how far each mask that was made shows: keys, the own one included; 0: all; None: it
            cannot be told.
        windows: the same of each layer: of its mask, or what its attention is told.
    """

    farthest: int = 0
    flash: bool = False
    masks: list[int | None] = field(default_factory=list)
    windows: dict[int, int] = field(default_factory=dict)


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


def _reach(mask_function, position: int, device: torch.device) -> int | None:
    """Count the keys that a mask shows to ``position``: 0 for all, None if it cannot be told."""
    zero = torch.tensor(0, device=device)

    def sees(distance: int) -> bool:
        key = torch.tensor(position - distance, device=device)
        return bool(mask_function(zero, zero, torch.tensor(position, device=device), key))

    try:
        if sees(position):
            return 0
        seen, unseen = 0, position  # distances
        while unseen - seen > 1:
            middle = (seen + unseen) // 2
            seen, unseen = (middle, unseen) if sees(middle) else (seen, middle)
    except (IndexError, RuntimeError):  # it looks into tensors of the tokens that it was made for
        return None
    return seen + 1


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
    state.windows[module.layer_idx] = (sliding_window or 0) if known is None else known
    batch, heads, rows, _ = query.shape
    return query.new_zeros(batch, rows, heads, value.shape[-1]), None


AttentionInterface.register(ASKING, _attend)
AttentionMaskInterface.register(ASKING, _make_mask)
