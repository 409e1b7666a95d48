"""Knows what differs between the versions of `transformers`: only here is one asked for."""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers import GenerationConfig
from transformers.cache_utils import CacheLayerMixin

from . import versions

versions.check("transformers", transformers.__version__)

#: The name of the KV cache in the arguments of models and of ``generate``.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"

#: What ``generate`` takes for options that neither the call nor the checkpoint sets.
GENERATION_DEFAULTS: dict[str, object] = GenerationConfig._get_default_generation_params()


class CacheLayer(CacheLayerMixin):
    """Answers, as a layer of a cache, by the names that each version asks for."""

    def get_max_cache_shape(self) -> int:  # get_max_length from transformers 5.13 on
        return self.get_max_length()
