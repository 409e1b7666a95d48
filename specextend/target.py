"""Describes the model whose text is written."""

from __future__ import annotations

from transformers import PreTrainedModel

from .attention import PatchedModel


class Target(PatchedModel):
    """Gives the engine and the drafts what they know of a target.

    Args:
        model: a decoder-only causal LM of `transformers`, used where it lies.
        score_layers: layers whose attention is scored for retrieval; negative ones count from the
            end.

    Attributes:
        score_layers: the same, counted from 0.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: a layer that it does not have.
    """

    def __init__(self, model: PreTrainedModel, score_layers: tuple[int, ...] = (-1,)):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        super().__init__(model)
        n = self.num_layers
        wrong = [i for i in score_layers if not -n <= i < n]
        if wrong:
            raise ValueError(f"score_layers must be in [{-n}, {n}) for this model, got {wrong[0]}")
        self.score_layers = frozenset(i % n for i in score_layers)

    @property
    def group(self) -> int:
        """Count the query heads of a KV head."""
        config = self.model.config.get_text_config()
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return config.num_attention_heads // kv_heads
