"""Knows what differs between the versions of `transformers`: only here is one asked for."""

from __future__ import annotations

from typing import NamedTuple

import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from . import versions

versions.check("transformers", transformers.__version__)

#: The name of the KV cache in the arguments of models and of ``generate``.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"

#: All names that it has had; a user may use each.
CACHE_NAMES = ("past_key_values", "cache")

#: What ``generate`` takes for options that neither the call nor the checkpoint sets.
GENERATION_DEFAULTS: dict[str, object] = GenerationConfig._get_default_generation_params()


class CacheLayer(CacheLayerMixin):
    """Answers, as a layer of a cache, by the names that each version asks for."""

    def get_max_cache_shape(self) -> int:  # get_max_length from transformers 5.13 on
        return self.get_max_length()


class Kind(NamedTuple):
    """Says what a layer keeps of a text.

    Attributes:
        rows: whether it keeps keys and values.
        states: how many states, each with what a convolution and a recurrence keep.
    """

    rows: bool
    states: int

    @property
    def keeps(self) -> bool:
        """Tell whether it keeps anything."""
        return self.rows or self.states > 0


def layer_kinds(config: PreTrainedConfig) -> tuple[Kind | str, ...]:
    """Return what each layer keeps in the cache that `transformers` makes for it.

    Returns:
        A kind; of a class of layers that we do not know, its name.
    """
    known = {DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer}
    known |= {*LinearAttentionLayer.__subclasses__()}
    kinds: list[Kind | str] = []
    for layer in DynamicCache(config=config).layers:
        states = 0
        if isinstance(layer, LinearAttentionLayer):
            states = getattr(layer, "number_of_states", 1)
        if type(layer).__name__ == "DummyLayer":
            kinds.append(Kind(False, 0))
        elif type(layer) in known:
            kinds.append(Kind(isinstance(layer, DynamicLayer), states))
        else:
            kinds.append(type(layer).__name__)
    # Older versions make none for a layer that shares another's.
    count = config.get_text_config(decoder=True).num_hidden_layers
    return tuple(kinds + [Kind(False, 0)] * (count - len(kinds)))


def num_cached(cache: Cache) -> int | None:
    """Count the tokens that a cache of `transformers` has taken in; None: it does not say how many,
    as all of its layers keep a state."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None if cache.has_previous_state() else 0
