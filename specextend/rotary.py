"""Rotates by position, and finds out how a model's keys are rotated.

Retrieval moves keys to other positions (``gather_chunks``), which is exact for rotary embeddings
(RoFormer, arXiv 2104.09864) once their frequencies and layout are known. Names of buffers and
layouts differ between model families; two forwards at shifted positions show which fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import PatchedModel
from .cache import Pass
from .longrope import frequencies, longrope_edge

_SHIFT = 64  # positions; far enough that a wrong frequency shows
_TOKENS = 6


@dataclass
class Rotary:
    """Holds the rotary position embedding of every layer's keys.

    Attributes:
        inv_freq: [L, R / 2] fp32, angle per position of each pair of the first R dimensions.
        interleaved: pairs are neighbours (GPT-J) instead of halves (Llama).
        edge: length of a text beyond which the angles are others; None: they stay.
        long_inv_freq: those others.
    """

    inv_freq: Tensor
    interleaved: bool
    edge: int | None = None
    long_inv_freq: Tensor | None = None

    def at(self, length: int) -> Tensor:
        """Return the angles in a text of ``length`` tokens."""
        beyond = self.edge is not None and length > self.edge
        return self.long_inv_freq if beyond else self.inv_freq


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the pairs of the first R of D dimensions; the others stay as they are.

    Args:
        x: [..., D] floating point.
        cos, sin: [..., R / 2] of each pair's angle, broadcast against ``x``. The products are
            formed in the wider of their dtype and that of ``x``.
        interleaved: pairs are neighbours (GPT-J) instead of halves (Llama).

    Returns:
        [..., D] in the dtype of ``x``.
    """
    half = cos.shape[-1]
    turned, rest = x.split([2 * half, x.shape[-1] - 2 * half], -1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        parts = [torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)]
    else:
        a, b = turned.chunk(2, -1)
        parts = [a * cos - b * sin, b * cos + a * sin]
    return torch.cat([*parts, rest], -1).to(x.dtype)


def rotate(keys: Tensor, shift: int, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """Move keys [..., D] by ``shift`` positions; computed, and returned, in fp64."""
    angle = inv_freq.double() * shift
    return turn(keys.double(), angle.cos(), angle.sin(), interleaved)


def probe_rotary(model: PreTrainedModel) -> Rotary:
    """Find frequencies and layout of a model's rotary embedding.

    Two forwards over a few tokens at positions 0.. and 64..: in every layer, keys of the second
    must be those of the first, rotated.

    Raises:
        ValueError: positions are not rotary, or not in a way that fits any layout known here.
    """
    edge = longrope_edge(model)
    if edge is None:
        return _probe(model, _SHIFT, 0)
    short = _probe(model, max(min(_SHIFT, edge - _TOKENS), 1), edge)
    beyond = _probe(model, _SHIFT, edge + 1)
    return replace(short, edge=edge, long_inv_freq=beyond.inv_freq)


def _probe(model: PreTrainedModel, shift: int, length: int) -> Rotary:
    """Find the angles in a text of ``length`` tokens; 0: they do not depend on it."""
    known = frequencies(model, length)
    # Without any, positions may come from a table that ends before those that are tried.
    patched = PatchedModel(model)
    near, far = (_keys(patched, first, length) if known else [] for first in (0, shift))
    tolerance = 1e-3 if model.dtype == torch.float32 else 6e-2
    for interleaved in (False, True):
        chosen = []
        for a, b in zip(near, far, strict=True):
            fits = [
                f
                for f in known
                if 2 * f.shape[0] <= a.shape[-1]
                and (rotate(a, shift, f, interleaved) - b).norm() <= tolerance * b.double().norm()
            ]
            if not fits:
                break
            chosen.append(fits[0])
        else:
            if len({f.shape for f in chosen}) == 1 and not patched.chunks:
                return Rotary(torch.stack(chosen), interleaved)
    raise ValueError(
        f"the draft {type(model).__name__} does not carry positions as rotary embeddings that "
        'could be moved, which draft_cache="window" and "retrieval" need; use draft_cache="full"'
    )


@torch.inference_mode()
def _keys(patched: PatchedModel, first: int, length: int) -> list[Tensor]:
    """Return every layer's keys [1, _TOKENS, Hkv, D] of a few tokens at ``first`` and behind, in a
    text of ``length`` tokens."""
    config = patched.model.config.get_text_config()
    device = patched.device
    cache = patched.make_cache(_TOKENS)
    cache.rotary_length = length
    tokens = torch.arange(1, _TOKENS + 1, device=device)[None] * 7919 % config.vocab_size
    positions = torch.arange(first, first + _TOKENS, device=device)[None]
    patched.read(tokens, positions, Pass(cache, [(cache, cache.lens)], _TOKENS))
    return [layer.k for layer in cache.kv_layers]
