"""Ends a text exactly: at the token that a criterion, an end token or a length stops at."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria


class Stop:
    """Holds the text as `transformers` shows it to processors and criteria, and ends it.

    Each token is told once, in order, and none after the last: criteria may count.

    Args:
        criteria: as prepared by ``generate``.
        max_length: tokens of ``input_ids`` and output at most, if no criterion says another number.
        input_ids: [1, L] int64, with its padding, if it has any.

    Attributes:
        max_length: tokens of ``input_ids`` and output at most. One is written in any case.
        done: nothing more is to be written.
    """

    def __init__(self, criteria: StoppingCriteriaList, max_length: int, input_ids: Tensor):
        self._input_ids = input_ids
        self._new: list[int] = []
        self._scores: tuple[Tensor, ...] = ()
        self._eos: set[int] = set()
        self._others = StoppingCriteriaList()
        lengths = []
        for criterion in criteria:
            # An heir of these may do anything: it is asked.
            if type(criterion) is EosTokenCriteria:
                self._eos.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria:
                lengths.append(criterion.max_length)
            else:
                self._others.append(criterion)
        self.max_length = max(min(lengths, default=max_length), input_ids.shape[1] + 1)
        self.done = False

    @property
    def ids(self) -> Tensor:
        """Join prompt, padding included, and output: [1, L + new] int64."""
        return torch.cat([self._input_ids, self._input_ids.new_tensor([self._new])], 1)

    def add(self, token: int, scores: Tensor | None = None) -> bool:
        """Take the next token in.

        Args:
            token: its id.
            scores: [1, V] that it was chosen by, where criteria are to see them.

        Returns:
            Whether it is the last one.
        """
        self._new.append(token)
        length = self._input_ids.shape[1] + len(self._new)
        self.done = length >= self.max_length or token in self._eos
        if self._others:
            if scores is not None:
                self._scores += (scores,)
            # As in `transformers`: a criterion may keep and change what it is given.
            with torch.inference_mode(False), torch.no_grad():
                self.done |= bool(self._others(self.ids, self._scores or None).all())
        return self.done

    def take(self, tokens: list[int], scores: tuple[Tensor, ...] = ()) -> int:
        """Take the next tokens in, up to the last one of the text.

        Args:
            tokens: their ids.
            scores: [1, V] of each, or none, as for :meth:`add`.

        Returns:
            How many of the tokens belong to the text.
        """
        for i, token in enumerate(tokens):
            if self.add(token, scores[i] if scores else None):
                return i + 1
        return len(tokens)
