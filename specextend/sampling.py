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

# Processors that look at a row of scores alone: one call serves all nodes.
_ROW_WISE = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.LogitNormalization,
    hf.InfNanRemoveLogitsProcessor,
    hf.SuppressTokensLogitsProcessor,
)
# Of these, those that also leave the host alone: they ask no tensor for its value.
_ON_DEVICE = tuple(
    p for p in _ROW_WISE if p not in (hf.EtaLogitsWarper, hf.SuppressTokensLogitsProcessor)
)
# Processors that keep state from call to call, or run the model: a tree cannot be given to them.
_REFUSED = tuple(
    getattr(hf, name)
    for name in (
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
    )
    if hasattr(hf, name)
)

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

    Args:
        processors: as prepared by ``generate``; applied to every node with the tokens before it.
        do_sample: draw, instead of taking the most probable.
        seed: key of the noise.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, seed: int):
        for processor in processors:
            if isinstance(processor, _REFUSED):
                raise ValueError(
                    f"{type(processor).__name__} keeps state between calls or runs the model "
                    "itself, so it cannot be applied to the nodes of a tree; generate without it"
                )
        self.processors = processors
        self.do_sample = do_sample
        self.seed = seed
        #: a processor wants the tokens before a node, so the tree must be read by the host
        self.needs_history = any(not isinstance(p, _ROW_WISE) for p in processors)
        #: a processor works on the host, so that the round cannot go on without it
        self.needs_host = any(not isinstance(p, _ON_DEVICE) for p in processors)

    def scores(
        self, logits: Tensor, committed: Tensor, tree_tokens: Tensor, parents: Tensor
    ) -> Tensor:
        """Process the logits of every node.

        Args:
            logits: [1, M, V].
            committed: [1, L] int64, tokens before the root.
            tree_tokens, parents: [1, M], the root first with parent -1.

        Returns:
            [1, M, V] fp32 (``logits`` themselves where there is no processor).
        """
        if not self.processors:
            return logits
        rows = logits[0].to(torch.float32, copy=True)
        if not self.needs_history:
            return self.processors(tree_tokens[0][:, None], rows)[None]
        by_depth: dict[int, list[int]] = {}
        paths: list[list[int]] = []
        for node, parent in enumerate(parents[0].tolist()):
            paths.append((paths[parent] if parent >= 0 else []) + [node])
            by_depth.setdefault(len(paths[node]), []).append(node)
        out = torch.empty_like(rows)
        for nodes in by_depth.values():
            own = tree_tokens[0][torch.tensor([paths[n] for n in nodes], device=rows.device)]
            history = torch.cat([committed.expand(len(nodes), -1), own], -1)
            out[nodes] = self.processors(history, rows[nodes])
        return out[None]

    def choose(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Choose tokens from processed scores.

        Args:
            scores: [B, M, V].
            positions: [B, M] int64 of the nodes; the token drawn after a node belongs to the
                position behind it.

        Returns:
            [B, M] int64; -1 where the scores are NaN.
        """
        if not self.do_sample:
            return ops.sample_nodes(scores, None)
        return ops.sample_nodes(scores, keyed_uniforms(self.seed, positions + 1))
