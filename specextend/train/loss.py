"""Computes next-token losses, and what they are measured in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Batch

ROWS = 1024  # logits of so many rows exist at once
IGNORED = -100


@dataclass
class Wanted:
    """Says what each row should predict.

    Attributes:
        tokens: [B, L] int64, ``IGNORED`` where nothing is asked.
        teacher: [B, L, V] logits whose distribution is wanted in place of the token; or None.
    """

    tokens: Tensor
    teacher: Tensor | None

    @staticmethod
    def of(batch: Batch, teacher: Tensor | None) -> Wanted:
        """Let row t predict token t + 1, or what the teacher predicts there."""
        tokens = torch.full_like(batch.ids, IGNORED)
        tokens[:, :-1] = batch.ids[:, 1:].masked_fill(~batch.counts[:, 1:], IGNORED)
        return Wanted(tokens, teacher)


@dataclass
class Measured:
    """Holds sums over rows that count: of loss, of right first choices, of rows."""

    loss: float = 0.0
    right: float = 0.0
    rows: int = 0

    def __add__(self, other: Measured) -> Measured:
        return Measured(self.loss + other.loss, self.right + other.right, self.rows + other.rows)


def row_loss(logits: Tensor, tokens: Tensor, teacher: Tensor | None) -> tuple[Tensor, Measured]:
    """Return the summed cross-entropy of rows that count, and its figures.

    Args:
        logits: [N, V].
        tokens: [N] int64, ``IGNORED`` for rows that do not count.
        teacher: [N, V] logits of the wanted distribution; None: the token is wanted.
    """
    logits, counted = logits.float(), tokens != IGNORED
    if teacher is None:
        choice = tokens
        loss = F.cross_entropy(logits, tokens, ignore_index=IGNORED, reduction="sum")
    else:
        wanted = teacher.float().softmax(-1)
        choice = wanted.argmax(-1)
        loss = -((wanted * logits.log_softmax(-1)).sum(-1) * counted).sum()
    right = ((logits.argmax(-1) == choice) & counted).sum()
    return loss, Measured(loss.item(), right.item(), int(counted.sum()))


def backward_by_rows(
    hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int
) -> float:
    """Back-propagate a loss some rows at a time, so that logits with gradients never exist for all.

    Args:
        hidden: [B, L, h], part of a graph.
        loss_of: from some rows of ``hidden`` [N, h], and which of the B * L they are, to their
            share of the loss, a scalar.
        rows: how many at a time.

    Returns:
        The loss: the sum of the shares.
    """
    flat, total = hidden.detach().flatten(0, 1).requires_grad_(), 0.0
    for start in range(0, len(flat), rows):
        part = slice(start, min(start + rows, len(flat)))
        loss = loss_of(flat[part], part)
        loss.backward()
        total += loss.item()
    hidden.backward(flat.grad.view_as(hidden))
    return total


def backward_in_blocks(
    hidden: Tensor, head: Callable[[Tensor], Tensor], wanted: Wanted, scale: float
) -> Measured:
    """Back-propagate ``scale`` times the mean loss of ``head(hidden)``, ``ROWS`` rows at a time.

    Args:
        hidden: [B, L, h], part of a graph.
        head: hidden rows to logits; frozen.
        wanted: what the rows should predict.
        scale: factor of the gradients.
    """
    tokens, measured = wanted.tokens.flatten(), []
    teacher = None if wanted.teacher is None else wanted.teacher.flatten(0, 1)
    rows = max(1, int((tokens != IGNORED).sum()))

    def loss_of(hidden: Tensor, part: slice) -> Tensor:
        loss, figures = row_loss(
            head(hidden), tokens[part], None if teacher is None else teacher[part]
        )
        measured.append(figures)
        return loss * (scale / rows)

    backward_by_rows(hidden, loss_of, ROWS)
    return sum(measured, Measured())
