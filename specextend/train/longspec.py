"""LongSpec's training form: anchor-offset indices, flash noisy training (arXiv 2502.17421, 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..draft.longspec import WINDOW, LongSpecBlock, Rotation
from .data import Batch
from .loss import Measured, Wanted, backward_in_blocks
from .target import FrozenTarget

ANCHORS = 4  # tokens at the beginning that may keep their positions
MAX_LAG = 4  # tokens of the target's keys that a query may miss


def anchor_offset_positions(
    batch: int, length: int, max_positions: int, generator: torch.Generator
) -> Tensor:
    """[B, L] int64: a few anchors at 0, 1, .., the rest shifted by one random offset a row.

    The paper keeps 4 anchors, the code that trained the published blocks 0 to 4; so here.

    Raises:
        ValueError: the windows are longer than the target's positions.
    """
    if length > max_positions:
        raise ValueError(f"windows of {length} tokens do not fit the {max_positions} positions")
    anchors = torch.randint(0, ANCHORS + 1, (batch, 1), generator=generator)
    offsets = torch.randint(0, max_positions - length + 1, (batch, 1), generator=generator)
    at = torch.arange(length).expand(batch, -1)
    return at + offsets * (at >= anchors)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention over the last ``window`` keys; [B, L, H, D] each, grouped heads or not.

    In blocks of ``window`` rows against twice as many keys: linear in L.
    """
    q, k, v = _same_heads(q, k, v)
    length = q.shape[2]
    if length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    parts = []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(0, start - window + 1)
        rows = torch.arange(start, end, device=q.device)[:, None]
        keys = torch.arange(first, end, device=q.device)
        seen = (keys <= rows) & (keys > rows - window)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], attn_mask=seen
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


def lagged_attention(q: Tensor, k: Tensor, v: Tensor, lag: int) -> Tensor:
    """Attention of row t to the keys [0, t - lag]; [B, L, H, D]. The first ``lag`` rows are 0.

    Flash noisy training: a shift of the queries against the keys, so no mask is needed, and the
    draft learns to do without the keys that the target has not made yet.
    """
    q, k, v = _same_heads(q, k, v)
    length = q.shape[2]
    out = F.scaled_dot_product_attention(
        q[:, :, lag:], k[:, :, : length - lag], v[:, :, : length - lag], is_causal=True
    )
    return F.pad(out, (0, 0, lag, 0)).transpose(1, 2)


def _same_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, L, D] of all three, the heads of keys and values repeated for their groups."""
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def training_form(
    block: LongSpecBlock,
    rotation: Rotation,
    embeddings: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    lag: int,
    window: int = WINDOW,
) -> Tensor:
    """The block over whole windows [B, L, h], the target's keys ``lag`` tokens behind.

    Args:
        block: the block.
        rotation: the target's.
        embeddings: [B, L, h] of the tokens.
        positions: [B, L] int64.
        keys, values: [B, L, Hkv, D], the target's last layer at the same positions.
        lag: tokens by which the last visible key is behind the query; a tree node of depth d has
            d + 1.
        window: keys that self-attention sees.
    """
    angles = rotation.angles(positions)

    def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return windowed_attention(rotation(q, angles), rotation(k, angles), v, window)

    def cross_attention(q: Tensor) -> Tensor:
        return lagged_attention(rotation(q, angles), keys, values, lag)

    return block(embeddings, self_attention, cross_attention)


class LongSpecRecipe:
    """What is special to training a LongSpec block.

    Args:
        target: the frozen target.
        block: the block to train.
        anchor_offset: draw positions by :func:`anchor_offset_positions`, else 0, 1, ..
        max_lag: lags are drawn from 1 to this; 1: no noise.
        labels: ``"data"``: the text's next token (the paper's); ``"target"``: the target's
            distribution.
    """

    def __init__(
        self,
        target: FrozenTarget,
        block: LongSpecBlock,
        anchor_offset: bool,
        max_lag: int,
        labels: str,
    ):
        self.target, self.module = target, block
        self.rotation = Rotation(target.model)
        self.anchor_offset, self.max_lag, self.labels = anchor_offset, max_lag, labels
        if anchor_offset and target.max_positions is None:
            raise ValueError(
                "anchor-offset indices need a target that says how many positions it has "
                "(max_position_embeddings)"
            )

    def backward(self, batch: Batch, generator: torch.Generator, scale: float) -> Measured:
        """Add the gradients of ``scale`` times the batch's mean loss."""
        rows, length = batch.ids.shape
        if self.anchor_offset:
            limit = self.target.max_positions
            positions = anchor_offset_positions(rows, length, limit, generator)
        else:
            positions = torch.arange(length).expand(rows, -1)
        positions = positions.to(batch.ids.device)
        lag = int(torch.randint(1, self.max_lag + 1, (), generator=generator))
        reading = self.target.read(batch.ids, positions, logits=self.labels == "target")
        embeddings = self.target.embedding(batch.ids).detach()
        hidden = training_form(
            self.module, self.rotation, embeddings, positions, reading.keys, reading.values, lag
        )
        wanted = Wanted.of(batch, reading.logits)
        return backward_in_blocks(hidden, self.target.head, wanted, scale)
