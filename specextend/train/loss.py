"""Next-token losses, a block of rows at a time: no tensor of all logits with gradients exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Batch

ROWS = 1024  # rows whose logits exist at once


@dataclass
class Wanted:
    """What each row should predict.

    Attributes:
        tokens: [B, L] int64, -100 where nothing is asked.
        teacher: [B, L, V] logits whose distribution is wanted in place of the token; or None.
    """

    tokens: Tensor
    teacher: Tensor | None

    @staticmethod
    def of(batch: Batch, teacher: Tensor | None) -> Wanted:
        """Row t is to predict token t + 1, or what the teacher predicts there."""
        tokens = torch.full_like(batch.ids, -100)
        tokens[:, :-1] = batch.ids[:, 1:].masked_fill(~batch.counts[:, 1:], -100)
        return Wanted(tokens, teacher)


@dataclass
class Measured:
    """Sums over the rows of a batch that count: of loss, of right first choices, of rows."""

    loss: float
    right: float
    rows: int


def backward_in_blocks(
    hidden: Tensor, head: Callable[[Tensor], Tensor], wanted: Wanted, scale: float
) -> Measured:
    """Back-propagate ``scale`` times the mean loss of ``head(hidden)``.

    Args:
        hidden: [B, L, h], part of a graph.
        head: hidden rows to logits; its own parameters, if trainable, get their gradients too.
        wanted: what the rows should predict.
        scale: factor of the gradients.
    """
    flat = hidden.detach().flatten(0, 1).requires_grad_()
    tokens = wanted.tokens.flatten()
    teacher = None if wanted.teacher is None else wanted.teacher.flatten(0, 1)
    rows = int((tokens >= 0).sum())
    loss_sum = right = 0.0
    for start in range(0, len(flat), ROWS):
        part = slice(start, start + ROWS)
        counted = tokens[part] >= 0
        logits = head(flat[part]).float()
        if teacher is None:
            choice = tokens[part]
            loss = F.cross_entropy(logits, choice, ignore_index=-100, reduction="sum")
        else:
            probs = teacher[part].float().softmax(-1)
            choice = probs.argmax(-1)
            loss = -((probs * logits.log_softmax(-1)).sum(-1) * counted).sum()
        (loss * (scale / max(rows, 1))).backward()
        loss_sum += loss.item()
        right += ((logits.argmax(-1) == choice) & counted).sum().item()
    hidden.backward(flat.grad.view_as(hidden))
    return Measured(loss_sum, right, rows)
