"""Tests what the loop must not do: large tensors, waits of the host, growth."""

from __future__ import annotations

import gc

import pytest
import torch
from host_reads import reads_per_round
from models import VOCAB, prompt, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from specextend import SpecConfig, SpecExtend
from specextend.generation import Generation

CONFIG = SpecConfig(
    chunk_size=16, budget=128, recent_chunks=2, retrieve_every=2, prefill_chunk=128, gate="off",
    draft_prefill_window=64, tree_nodes=9, tree_depth=4, seed=0,
)  # fmt: skip
LENGTH = 1200


@pytest.fixture(scope="module")
def models():
    options = dict(max_position_embeddings=2048, num_hidden_layers=3)
    return tiny_model("llama", **options), tiny_model("llama", seed=1, **options)


class LargestTensor(TorchDispatchMode):
    """Watches the outputs of every op."""

    def __init__(self):
        super().__init__()
        self.numel, self.logit_rows, self.shape = 0, 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(t, torch.Tensor):
                continue
            if t.numel() > self.numel:
                self.numel, self.shape = t.numel(), tuple(t.shape)
            if t.dim() >= 2 and t.shape[-1] == VOCAB:
                self.logit_rows = max(self.logit_rows, t.numel() // VOCAB)
        return out


@pytest.mark.parametrize("tree_attention", [True, False])
def test_no_tensor_grows_with_the_square_of_the_prompt(models, tree_attention):
    """O18: nothing of L^2 elements, no logits beyond the tree's rows."""
    spec = SpecExtend(*models, CONFIG, tree_attention=tree_attention)
    with LargestTensor() as largest:
        spec.generate(prompt(LENGTH), max_new_tokens=24, do_sample=False)
    # A layer of the cache: 2 heads x (1200 + ...) x 8. A chunk of prefill: 128 rows.
    assert largest.numel < LENGTH * 150, largest.shape
    assert largest.logit_rows <= max(1 + CONFIG.tree_nodes, CONFIG.tree_width)


def test_at_most_one_host_read_per_round(models, monkeypatch):
    """O19, where the host does not follow the draft as on a CPU: everything that turns a tensor
    into a Python value is counted, the model's own too."""
    monkeypatch.setattr(Generation, "_draft_follows", lambda self: False)
    monkeypatch.setattr("specextend.draft.causal_lm.follows", lambda *given: False)
    for options in (dict(do_sample=False), dict(do_sample=True, temperature=0.8, top_p=0.9)):
        spec = SpecExtend(*models, CONFIG)
        stream = spec.stream(prompt(300), max_new_tokens=60, **options)
        with monkeypatch.context() as patch:
            rounds = reads_per_round(stream, patch)
        assert max(map(len, rounds)) <= 1, rounds
        assert len(rounds) == spec.stats.num_rounds > 10


@pytest.mark.parametrize("draft", ["model", "ngram", "self"])
def test_a_round_copies_no_cache(models, draft):
    """No op allocates, itself or inside, what a layer of the cache takes, as torch's index_select
    does of what is not contiguous."""
    spec = SpecExtend(models[0], models[1] if draft == "model" else draft, CONFIG)
    stream = spec.stream(prompt(LENGTH), max_new_tokens=60, do_sample=False)
    next(stream), next(stream)  # the working cache is allocated in the first round
    with torch.profiler.profile(profile_memory=True) as profile:
        next(stream), next(stream), next(stream)
    stream.close()
    largest = max(profile.events(), key=lambda event: event.self_cpu_memory_usage)
    config = models[0].config
    layer = 4 * LENGTH * config.num_key_value_heads * config.head_dim
    assert 0 < largest.self_cpu_memory_usage < layer / 2, largest.name


def test_nothing_is_kept_after_a_generation(models):
    """Caches are freed; a thousand rounds leave no tensors behind."""
    spec = SpecExtend(*models, CONFIG, keep_contexts=0)
    ids = prompt(200)

    def live() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor)

    spec.generate(ids, max_new_tokens=5, do_sample=False)
    spec.stats.retrieved_ids.clear()
    before = live()
    for _ in range(3):
        spec.generate(ids, max_new_tokens=200, do_sample=False)
    spec.stats.retrieved_ids.clear()
    assert live() - before < 1000


def test_rounds_do_not_allocate_more_as_they_go(models):
    spec = SpecExtend(*models, CONFIG)
    sizes = []
    for step in spec.stream(prompt(200), max_new_tokens=450, do_sample=False):
        del step
        if spec.stats.num_rounds % 100 == 50:
            gc.collect()
            sizes.append(sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor))
    # Chunk ids of past retrievals are kept for the statistics: 8 numbers each.
    assert max(sizes) - min(sizes) < 8 * (spec.stats.num_retrievals + 2) + 1000
