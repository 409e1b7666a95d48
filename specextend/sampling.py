"""Makes the target's choice at every node: argmax, or a draw with the position's own noise.

Noise is keyed by (seed, sequence, absolute position). Whatever tree a position is verified in, its
token is drawn with the same uniform from the same distribution, so that sampled speculative output
equals sampled plain output token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from . import ops
from .stopping import Stop

#: Processors of `transformers` that look at a row of scores alone and keep nothing from call to
#: call: one call serves all nodes of a tree. True: they also leave the host alone, that is, they
#: ask no tensor for its value. Their heirs are not meant, as these may do anything.
STATELESS = {
    hf.TemperatureLogitsWarper: True,
    hf.TopKLogitsWarper: True,
    hf.TopPLogitsWarper: True,
    hf.MinPLogitsWarper: True,
    hf.TypicalLogitsWarper: True,
    hf.EpsilonLogitsWarper: True,
    hf.LogitNormalization: True,
    hf.InfNanRemoveLogitsProcessor: True,
    hf.EtaLogitsWarper: False,
    hf.SuppressTokensLogitsProcessor: False,
}

_MASK64 = (1 << 64) - 1


def _signed(x: int) -> int:
    """Return the int64 that holds a 64-bit pattern."""
    x &= _MASK64
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically, where torch's own shift of int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Mix int64 bit patterns as splitmix64 does last (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def keyed_uniforms(seed: int, positions: Tensor) -> Tensor:
    """Draw uniform numbers in [0, 1) that depend on their key alone.

    Args:
        seed: any integer; its low 64 bits count.
        positions: [B, N] int64, absolute positions; row b is sequence b.

    Returns:
        [B, N] float64 on the device of ``positions``, multiples of 2**-53. Does not synchronise.
    """
    golden = _signed(0x9E3779B97F4A7C15)
    sequence = torch.arange(positions.shape[0], device=positions.device)[:, None]
    state = _mix(sequence * golden + _signed(seed))
    bits = _mix(_mix(state + (positions.long() + 1) * golden) ^ state)
    return _shift_right(bits, 11).double() * 2.0**-53


class TokenChooser:
    """Chooses the target's token after each node of a tree.

    There are two ways. Where all processors are :data:`STATELESS`, every node's scores are made in
    one call and the walk is the device's (:func:`ops.verify_tree`). All other processors, be they
    automata, counters or a model of their own, get what ``generate`` would give them: one call per
    token of the text, in order, with the text before it, and none for a node that the text does not
    reach (:meth:`walk`).

    Args:
        processors: as prepared by ``generate``.
        do_sample: draw, instead of taking the most probable.
        seed: key of the noise.
        stop: the text so far, and where it ends.

    Attributes:
        walks: tokens are chosen by :meth:`walk`, one after the other.
        needs_host: a processor works on the host, so that the round cannot go on without it.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, seed: int, stop: Stop):
        self.processors = processors
        self.do_sample = do_sample
        self.seed = seed
        self.walks = any(type(p) not in STATELESS for p in processors)
        self.needs_host = any(not STATELESS.get(type(p), False) for p in processors)
        self.stop = stop

    def decide(
        self, logits: Tensor, positions: Tensor, tokens: Tensor, parents: Tensor
    ) -> tuple[Tensor, ...]:
        """Find the path that the target's choices take through a tree.

        Args:
            logits: [1, M, V].
            positions: [1, M] int64 of the nodes.
            tokens, parents: [1, M], the root first with parent -1.

        Returns:
            Processed scores [1, M, V] (where processors walk: of the nodes on the path), and what
            :func:`ops.verify_tree` returns. The device is read where :attr:`walks` alone.
        """
        if self.walks:
            return self.walk(logits, positions, tokens, parents)
        scores = self.scores(logits)
        return scores, *ops.verify_tree(tokens, parents, self.choose(scores, positions))

    def scores(self, logits: Tensor) -> Tensor:
        """Process the logits of every node in one call.

        Args:
            logits: [1, M, V].

        Returns:
            [1, M, V] fp32 (``logits`` themselves where there is no processor).
        """
        if not self.processors:
            return logits
        rows = logits[0].to(torch.float32, copy=True)
        nothing = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        return self.processors(nothing, rows)[None]

    def choose(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Choose tokens from processed scores.

        Args:
            scores: [B, M, V].
            positions: [B, M] int64 of the nodes; the token drawn after a node belongs to the
                position behind it.

        Returns:
            [B, M] int64; -1 where there is no choice: a NaN, or nothing but -inf.
        """
        if not self.do_sample:
            return ops.sample_nodes(scores, None)
        return ops.sample_nodes(scores, keyed_uniforms(self.seed, positions + 1))

    def walk(
        self, logits: Tensor, positions: Tensor, tokens: Tensor, parents: Tensor
    ) -> tuple[Tensor, ...]:
        """Choose token by token along the path that the choices take, up to the end of the text.

        Args and returns as of :meth:`decide`. Reads the device once per token.
        """
        pairs = enumerate(zip(parents[0].tolist(), tokens[0].tolist(), strict=True))
        children: dict[tuple[int, int], int] = {}
        for node, key in pairs:
            children.setdefault(key, node)  # of siblings with one token, the first
        # Outside of inference mode, as in `transformers`: what a processor keeps it may change.
        with torch.inference_mode(False), torch.no_grad():
            scores = logits.to(torch.float32, copy=True)
            path, emitted, node, token, ended = [], [], 0, 0, False
            while node is not None and not ended:
                history = self.stop.ids.to(scores.device)
                row = self.processors(history, scores[:, node].clone())
                scores[:, node] = row
                token = int(self.choose(row[:, None], positions[:, node : node + 1]))
                path.append(node)
                emitted.append(token)
                ended = token < 0 or self.stop.add(token, row)
                node = children.get((node, token))
        tail = [-1] * (tokens.shape[1] - len(path))
        to = dict(device=tokens.device)
        return (
            scores,
            torch.tensor([path + tail], dtype=torch.int32, **to),
            torch.tensor([len(path) - 1], dtype=torch.int32, **to),
            torch.tensor([emitted + tail], **to),
            torch.tensor([token], **to),
        )
