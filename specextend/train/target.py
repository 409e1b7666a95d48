"""Reads the frozen target for the training of a draft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import PatchedModel
from ..cache import KVCache, Pass
from ..guard import self_check


@dataclass
class Reading:
    """Holds what the target makes of a batch of windows.

    Attributes:
        keys, values: [B, L, Hkv, D] of the last layer, keys with their rotation.
        logits: [B, L, V], when asked for.
        features: [B, L, F], the hidden states of the layers asked for, side by side.
    """

    keys: Tensor
    values: Tensor
    logits: Tensor | None
    features: Tensor | None


class FrozenTarget:
    """Reads windows without gradients, on our cache and kernel, which take any positions."""

    def __init__(self, model: PreTrainedModel):
        model.requires_grad_(False)
        self.model = model
        self.patched = PatchedModel(model)
        self_check(self.patched)
        self.embedding = model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.num_layers, self.vocab = config.num_hidden_layers, config.vocab_size
        self.max_positions = getattr(config, "max_position_embeddings", None)
        self._cache: KVCache | None = None

    def autocast(self) -> torch.autocast:
        """Multiply the draft's float32 weights in bfloat16 where the target has 16 bits."""
        dtype = self.model.dtype
        return torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=dtype != torch.float32
        )

    @torch.no_grad()
    def read(
        self, ids: Tensor, positions: Tensor, logits: bool, layers: tuple[int, ...] = ()
    ) -> Reading:
        """Read ``ids`` [B, L] at ``positions`` [B, L].

        Args:
            ids, positions: int64.
            logits: whether the target's logits are wanted.
            layers: whose hidden states are wanted, as `transformers` counts them.

        Returns:
            What was asked for; keys and values are overwritten by the next call.
        """
        batch, length = ids.shape
        cache = self._cache
        if cache is None or cache.capacity != length or cache.lens.shape[0] != batch:
            cache = self._cache = self.patched.make_cache(length, batch)
        state = Pass(cache, [(cache, cache.lens)], length, feature_layers=layers)
        out = self.patched.forward(ids, positions, state, last_only=not logits)
        last = cache.kv_layers[-1]
        return Reading(last.k, last.v, out[..., : self.vocab] if logits else None, state.features)


def check_norm(norm: torch.nn.Module) -> None:
    """Refuse norms whose weights mean something else than Llama's, such as Gemma's, which add 1.

    Raises:
        AttributeError: as for any part of a Llama that a target does not have.
    """
    weight = norm.weight
    probe = torch.randn(4, weight.shape[0]).to(weight)
    plain = torch.nn.functional.rms_norm(probe, weight.shape, weight)
    if not torch.allclose(norm(probe), plain, rtol=0.02, atol=0.02):
        raise AttributeError("its norms are of another kind")
