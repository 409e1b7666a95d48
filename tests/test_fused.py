"""Our operators between a model's matrix products: the bits stay, and it is known where they are."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from models import FAMILIES, prompt, tiny_model
from torch import nn

from specextend import SpecConfig, SpecExtend, ops
from specextend.attention import PatchedModel
from specextend.cache import KVCache, Pass
from specextend.fused import unfused

PREFIX = 9
PARENTS = (-1, 0, 0, 1, 1)
DEPTHS = (0, 1, 1, 2, 2)
MASKS = (0b00001, 0b00011, 0b00101, 0b01011, 0b10011)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read(model, num_caches: int = 1) -> list[torch.Tensor]:
    """Read a text and verify a tree behind it: the logits of both, keys and values."""
    patched, tree = PatchedModel(model), len(PARENTS)
    caches = [
        KVCache(patched.num_layers, PREFIX + tree, 1, model.device) for _ in range(num_caches)
    ]
    writes = [(cache, cache.lens) for cache in caches]
    ids = prompt(PREFIX + tree).to(model.device)
    depths = torch.tensor([DEPTHS], dtype=torch.int32, device=model.device)
    shape = dict(
        mask=torch.tensor([MASKS], device=model.device)[..., None],
        q_depths=depths,
        k_depths=depths,
    )
    with torch.inference_mode():
        positions = torch.arange(PREFIX, device=model.device)[None]
        first = patched.forward(ids[:, :PREFIX], positions, Pass(caches[0], writes, PREFIX))
        for cache in caches:
            cache.advance(PREFIX)
        state = Pass(caches[0], writes, tree, **shape)
        second = patched.forward(ids[:, PREFIX:], PREFIX + depths.long(), state)
    rows = [t for cache in caches for layer in cache.layers for t in (layer.keys, layer.values)]
    return [first, second, *rows]


def assert_same_bits(model, num_caches: int = 1) -> None:
    got = read(model, num_caches)
    with unfused():
        expected = read(model, num_caches)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def fusions(model) -> Counter:
    """Count what is computed by our operators, by kind."""
    patched = PatchedModel(model)
    patched.find_windows()
    return Counter(f.kind for f in patched.find_fusions())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_the_models_own(family, dtype):
    assert_same_bits(tiny_model(family, dtype=dtype))


ALL = dict(norm=5, gated=2, attention=2, layer=2)  # of two layers and the last norm


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", ALL),
        ("qwen2", ALL),
        ("qwen3", ALL | dict(norm=9)),  # queries and keys have norms
        ("mistral", ALL),
        ("phi3", ALL),  # merged projections
        ("smollm3", ALL),
        ("granite", ALL),
        ("gemma", dict(norm=5, attention=2, layer=2)),  # GELU
        ("gemma3_text", dict(norm=13, attention=2, layer=2)),  # four norms to a layer
        ("mixtral", dict(norm=5, attention=2, layer=2)),  # experts
        ("qwen3_moe", dict(norm=9, attention=2, layer=2)),
        ("gpt_oss", dict(norm=5, layer=2)),  # cosines of half a head
        ("olmo2", dict(norm=9, gated=2)),  # cosines in fp32; norms behind
        ("glm4", dict(norm=9, gated=2, layer=2)),  # neighbours are rotated
        ("cohere", dict(gated=2)),  # the same; LayerNorm
        ("starcoder2", dict(attention=2)),  # LayerNorm, GELU
        ("gpt2", {}),
        ("opt", {}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_is_known(family, expected, dtype):
    assert fusions(tiny_model(family, dtype=dtype)) == expected
