"""Computes next-token losses, and what they are measured in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Batch

BLOCK = 1 << 24  # so many logits exist at once
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

    def rows(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """Return tokens [N] and teacher [N, V] of some of the B * L rows."""
        teacher = None if self.teacher is None else self.teacher.flatten(0, 1)[part]
        return self.tokens.flatten()[part], teacher

    @staticmethod
    def of(batch: Batch, teacher: Tensor | None) -> Wanted:
        """Let row t predict token t + 1, or what the teacher predicts there."""
        tokens = torch.full_like(batch.ids, IGNORED)
        tokens[:, :-1] = batch.ids[:, 1:].masked_fill(~batch.counts[:, 1:], IGNORED)
        return Wanted(tokens, teacher)


@dataclass
class Measured:
    """Holds sums over rows that count: of loss, of right first choices, of rows, of weights.

    The gradients of a step are those of the weighted sum of its rows' losses, divided by the sum of
    their weights. Both are sums over windows, however these are taken together.
    """

    loss: float = 0.0
    right: float = 0.0
    rows: int = 0
    weight: float = 0.0

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.loss + other.loss, self.right + other.right, self.rows + other.rows,
            self.weight + other.weight,
        )  # fmt: skip


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
    rows = int(counted.sum())
    return loss, Measured(loss.item(), right.item(), rows, rows)


def gradient_by_rows(
    hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int
) -> tuple[Tensor, float]:
    """Back-propagate a loss to ``hidden`` and no further, some rows at a time, so that logits with
    gradients never exist for all.

    Args:
        hidden: [B, L, h].
        loss_of: from some rows of ``hidden`` [N, h], and which of the B * L they are, to their
            share of the loss, a scalar. Parameters that it uses receive their gradients.
        rows: how many at a time.

    Returns:
        The gradient [B, L, h], and the loss: the sum of the shares.
    """
    flat, total = hidden.detach().flatten(0, 1).requires_grad_(), 0.0
    for start in range(0, len(flat), rows):
        part = slice(start, min(start + rows, len(flat)))
        loss = loss_of(flat[part], part)
        loss.backward()
        total += loss.item()
    return flat.grad.view_as(hidden), total


def backward_by_rows(
    hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int
) -> float:
    """Back-propagate a loss as :func:`gradient_by_rows` does, and on through the graph that
    ``hidden`` is part of; return the loss."""
    gradient, total = gradient_by_rows(hidden, loss_of, rows)
    hidden.backward(gradient)
    return total


def gradient_in_blocks(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    wanted: Callable[[slice], tuple[Tensor, Tensor | None]],
    vocab: int,
    weight: float = 1.0,
) -> tuple[Tensor, Measured]:
    """Return the gradient of the summed loss of ``head(hidden)``, ``BLOCK`` logits at a time.

    Args:
        hidden: [B, L, h].
        head: rows of it to logits.
        wanted: from a slice of the B * L rows to tokens and teacher, as :func:`row_loss` takes
            them.
        vocab: logits of a row.
        weight: of these rows.
    """
    measured = []

    def loss_of(hidden: Tensor, part: slice) -> Tensor:
        loss, figures = row_loss(head(hidden), *wanted(part))
        figures.weight *= weight
        measured.append(figures)
        return loss * weight

    gradient, _ = gradient_by_rows(hidden, loss_of, block_rows(vocab))
    return gradient, sum(measured, Measured())


def block_rows(vocab: int) -> int:
    """Return how many rows of logits exist at once."""
    return max(1, BLOCK // vocab)
