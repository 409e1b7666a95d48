"""Trains LongSpec blocks: anchor-offset indices, flash noisy training (arXiv 2502.17421, 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import decoder_of
from ..config import SpecConfig
from ..draft.longspec import WINDOW, LongSpecDraft
from ..draft.longspec_block import BlockShape, LongSpecBlock, Rotation
from ..draft.longspec_checkpoint import save_block
from .data import Batch
from .loss import Measured, Wanted, gradient_in_blocks
from .memory import layer_bytes, product_bytes, reading_bytes, training_bytes
from .target import FrozenTarget, check_norm

ANCHORS = 4  # tokens at the beginning that may keep their positions


def anchor_offset_positions(
    batch: int, length: int, max_positions: int, generator: torch.Generator
) -> Tensor:
    """Draw positions [B, L] int64: a few anchors at 0, 1, .., the rest at one random offset a row.

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
    """Attend causally to the last ``window`` keys; [B, L, H, D] each, grouped heads or not.

    Blocks of ``window`` rows meet twice as many keys, so that the work is linear in L.
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
    """Attend with row t to the keys [0, t - lag]; [B, L, H, D]. The first ``lag`` rows are 0.

    This is flash noisy training: queries are shifted against keys, so no mask is needed, and the
    draft learns to do without the keys that the target has not made yet.
    """
    q, k, v = _same_heads(q, k, v)
    length = q.shape[2]
    out = F.scaled_dot_product_attention(
        q[:, :, lag:], k[:, :, : length - lag], v[:, :, : length - lag], is_causal=True
    )
    return F.pad(out, (0, 0, lag, 0)).transpose(1, 2)


def _same_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return [B, H, L, D] of all three, heads of keys and values repeated for their groups."""
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
    lags: Sequence[int],
    window: int = WINDOW,
) -> Tensor:
    """Run the block over whole windows [B, L, h], the target's keys some tokens behind.

    Args:
        block: the block.
        rotation: the target's.
        embeddings: [B, L, h] of the tokens.
        positions: [B, L] int64.
        keys, values: [B, L, Hkv, D], the target's last layer at the same positions.
        lags: for each window, tokens by which the last visible key is behind the query; a tree
            node of depth d has d + 1.
        window: keys that self-attention sees.
    """
    angles = rotation.angles(positions)

    def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return windowed_attention(rotation(q, angles), rotation(k, angles), v, window)

    def cross_attention(q: Tensor) -> Tensor:
        rows = zip(rotation(q, angles).split(1), keys.split(1), values.split(1), lags, strict=True)
        return torch.cat([lagged_attention(*row) for row in rows])

    return block(embeddings, self_attention, cross_attention)


def new_block(target: FrozenTarget, sample: Tensor | None = None) -> LongSpecBlock:
    """Make an untrained block.

    Without a sample it is random, and adds nothing at first. With one it begins as the pieces of
    the target that it resembles: its self-attention reads what the target's first layer reads, its
    cross-attention looks into the last layer's keys, so it starts with the projections of these
    two, and with the last layer's MLP. What they add to the residual stream is scaled by what the
    target's last norm would do, on average, to the sample, since no norm follows the block.

    Args:
        target: the target.
        sample: [B, L] int64 tokens of the training text.

    Raises:
        ValueError: the target has no such pieces.
    """
    block = LongSpecBlock(BlockShape.of_target(target.model)).to(target.model.device)
    matrices = [p for p in block.parameters() if p.dim() > 1]
    with torch.no_grad():
        for matrix in matrices:
            matrix.normal_(0, matrix.shape[1] ** -0.5)
        for module in (block.self_qkv, block.cross_q):
            module.bias.zero_()
        for module in (block.self_out, block.cross_out, block.down):
            module.weight.zero_()
        if sample is not None:
            try:
                block.load_state_dict(_target_pieces(target, sample), strict=False)
            except (AttributeError, RuntimeError) as error:
                raise ValueError(
                    f"{type(target.model).__name__} has no pieces that a block could begin with "
                    f"({error}); begin with random weights"
                ) from error
    return block


def _target_pieces(target: FrozenTarget, sample: Tensor) -> dict[str, Tensor]:
    """Return parameters of Llama's first and last layer under the block's names."""
    decoder = decoder_of(target.model)
    first, last, norm = decoder.layers[0], decoder.layers[-1], decoder.norm
    near, far, mlp = first.self_attn, last.self_attn, last.mlp
    check_norm(norm)
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        positions = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
        target.read(sample, positions, logits=False)
    finally:
        hook.remove()
    rms = seen[0].float().square().mean(-1).sqrt().mean()
    scale = (norm.weight.float() / rms)[:, None]
    pieces = {
        "self_norm.weight": first.input_layernorm.weight,
        "self_qkv.weight": torch.cat([getattr(near, f"{p}_proj").weight for p in "qkv"]),
        "self_out.weight": near.o_proj.weight * scale,
        "cross_norm.weight": last.input_layernorm.weight,
        "cross_q.weight": far.q_proj.weight,
        "cross_out.weight": far.o_proj.weight * scale,
        "mlp_norm.weight": last.post_attention_layernorm.weight,
        "gate_up.weight": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        "down.weight": mlp.down_proj.weight * scale,
    }
    if near.q_proj.bias is not None:
        pieces["self_qkv.bias"] = torch.cat([getattr(near, f"{p}_proj").bias for p in "qkv"])
        pieces["cross_q.bias"] = far.q_proj.bias
    return pieces


class LongSpecRecipe:
    """Does what is special to training a LongSpec block.

    Args:
        target: the frozen target.
        block: the block to train.
        anchor_offset: draw positions by :func:`anchor_offset_positions`, else 0, 1, ..
        max_lag: lags are drawn from 1 to this; 1: no noise.
        labels: ``"data"``: the text's next token (the paper's); ``"target"``: the target's
            distribution.
    """

    remedies = "a smaller --length"

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

    def backward(self, batch: Batch, generators: list[torch.Generator]) -> Measured:
        """Add the gradients of the rows' summed losses."""
        rows, length = batch.ids.shape
        if self.anchor_offset:
            limit = self.target.max_positions
            positions = [anchor_offset_positions(1, length, limit, g) for g in generators]
            positions = torch.cat(positions).to(batch.ids.device)
        else:
            positions = torch.arange(length, device=batch.ids.device).expand(rows, -1)
        lags = [int(torch.randint(1, self.max_lag + 1, (), generator=g)) for g in generators]
        reading = self.target.read(batch.ids, positions, logits=self.labels == "target")
        embeddings = self.target.embedding(batch.ids).detach()
        wanted = Wanted.of(batch, reading.logits)
        with self.target.autocast():
            hidden = training_form(
                self.module, self.rotation, embeddings, positions, reading.keys, reading.values,
                lags,
            )  # fmt: skip
            gradient, measured = gradient_in_blocks(
                hidden, self.target.head, wanted.rows, self.target.vocab
            )
        hidden.backward(gradient)
        return measured

    def memory(self, windows: int, length: int) -> int:
        """Return about how many bytes a step holds at most, besides the weights."""
        shape, rows = self.module.shape, windows * length
        wide = 12.6 * shape.heads * shape.head_dim + 5.9 * shape.intermediate
        each = 54 * shape.hidden + product_bytes(self.target) * wide
        if length > WINDOW:  # masks, a byte and a float32 for each pair
            each += 5 * 2 * WINDOW
        reading = reading_bytes(self.target, rows, self.labels == "target", 0, self.target.vocab)
        step = max(int(rows * each), layer_bytes(self.target, rows))
        return training_bytes(self.module) + reading + step

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the block in the published format."""
        save_block(self.module, self.target.model, folder, dtype)

    def draft(self, config: SpecConfig) -> LongSpecDraft:
        """Make a draft of the block as it is."""
        model = self.target.model
        return LongSpecDraft(copy.deepcopy(self.module).to(model.dtype), model, config)
