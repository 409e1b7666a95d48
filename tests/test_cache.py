"""Tests what lies in the caches after many rounds."""

from __future__ import annotations

import pytest
import torch
from generations import Kept
from models import prompt, tiny_model

from specextend import SpecConfig, SpecExtend
from specextend.attention import PatchedModel
from specextend.cache import KVCache, Pass
from specextend.draft.working_cache import WorkingCache
from specextend.rotary import Rotary

CONFIG = SpecConfig(
    draft_cache="full", gate="off", tree_nodes=9, tree_depth=4, prefill_chunk=32, seed=0,
    chunk_size=8, budget=32, recent_chunks=1, retrieve_every=2, draft_prefill_window=16,
)  # fmt: skip


def fresh_cache(model, ids: torch.Tensor) -> KVCache:
    """Keys and values of one forward over ``ids``."""
    cache = KVCache(model.config.num_hidden_layers, ids.shape[1], 1, model.device)
    positions = torch.arange(ids.shape[1])[None]
    with torch.inference_mode():
        PatchedModel(model).forward(
            ids, positions, Pass(cache, [(cache, cache.lens)], ids.shape[1])
        )
    cache.advance(ids.shape[1])
    return cache


def assert_same(cache: KVCache, expected: KVCache, length: int) -> None:
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, :, :length], b[:, :, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(do_sample=False), dict(do_sample=True, top_k=0)], ids=str)
def test_rounds_keep_the_caches_right(options):
    """After a thousand tokens of trees: the keys of one forward over the text (O15)."""
    size = dict(max_position_embeddings=2048)
    target, draft = tiny_model("llama", **size), tiny_model("llama", seed=1, **size)
    drafts, generations = [], Kept()
    spec = SpecExtend(target, draft, CONFIG, generation=generations)
    spec.draft.end = lambda: drafts.append(spec.draft.caches.full)
    out = spec.generate(prompt(60), max_new_tokens=1000, **options)
    cache = generations[0].cache
    # All but the last token, which is decided but was not run, and what was cut.
    length = out.shape[1] - 1
    assert int(cache.lens) == cache.length >= length
    assert_same(cache, fresh_cache(target, out[:, :length]), length)
    seen = min(drafts[0].length, length)
    assert seen > length - 20
    assert_same(drafts[0], fresh_cache(draft, out[:, :seen]), seen)
    assert torch.equal(generations[0].decisions.ids[:, : length + 1], out)


def test_working_cache_holds_the_selected_chunks(monkeypatch):
    """Values bit for bit; keys of recent chunks too; older keys rotated to compact positions."""
    draft, target = tiny_model("llama", seed=1), tiny_model("llama")
    config = CONFIG.replace(draft_cache="retrieval")
    spec = SpecExtend(target, draft, config)
    checked = []
    refill = WorkingCache.refill

    def checking(self, scores=None):
        ids, full, work = refill(self, scores), self.full, self.work
        chosen = [i for i in ids[0].tolist() if i >= 0]
        rows = torch.cat([torch.arange(8 * i, min(8 * i + 8, full.length)) for i in chosen])
        assert len(rows) == work.length == int(work.lens) <= 32
        for ours, theirs in zip(work.layers, full.layers, strict=True):
            assert torch.equal(ours.values[:, :, : len(rows)], theirs.values[:, :, rows])
            stay = [j for j, row in enumerate(rows.tolist()) if full.length - row == len(rows) - j]
            assert stay and torch.equal(ours.keys[:, :, stay], theirs.keys[:, :, rows[stay]])
        checked.append(chosen)
        return ids

    monkeypatch.setattr(WorkingCache, "refill", checking)
    spec.generate(prompt(150), max_new_tokens=40, do_sample=False)
    assert len(checked) > 5 and all(c[0] == 0 and len(c) == 4 for c in checked)


@pytest.mark.parametrize("own", [None, 8, 24])
def test_prefill_of_a_draft_stays_in_its_window(own):
    """As if its model had sliding windows, or shorter ones than its own."""
    target, draft = tiny_model("llama"), tiny_model("mistral", seed=1, sliding_window=own)
    ids, kept = prompt(100), []
    spec = SpecExtend(target, draft, CONFIG.replace(draft_cache="window", budget=128))
    spec.draft.end = lambda: kept.append(spec.draft.caches.full)
    spec.generate(ids, max_new_tokens=3, do_sample=False)
    window = min(own or 16, CONFIG.draft_prefill_window)
    sliding = tiny_model("mistral", seed=1, sliding_window=window)
    assert kept[0].length > 99
    assert_same(kept[0], fresh_cache(sliding, ids), 99)


def working_cache(config: SpecConfig, length: int) -> WorkingCache:
    """Make one of a full cache of random rows."""
    full = KVCache(2, length + 5, 1, torch.device("cpu"))
    for layer in full.layers:
        layer.lazy_initialization(torch.zeros(1, 2, 1, 8))
        layer.keys.normal_(), layer.values.normal_()
    full.advance(length)
    return WorkingCache(full, config, Rotary(torch.ones(2, 4), False))


def test_the_newest_chunk_is_selected_whatever_its_score():
    """On it positions rest, and what the host knows of the length."""
    for length in (61, 64, 65):
        cache = working_cache(CONFIG.replace(draft_cache="retrieval", recent_chunks=0), length)
        newest = (length - 1) // 8
        ids = cache.refill(-torch.arange(9.0)[None])
        assert ids.tolist() == [[0, 1, 2, newest]]
        assert cache.work.length == int(cache.work.lens) == 24 + length - 8 * newest


def test_a_working_cache_keeps_room_for_a_tree():
    cache = working_cache(CONFIG.replace(draft_cache="window"), 100)
    cache.refill()
    room = cache.work.capacity - cache.work.length - CONFIG.tree_keys
    assert room > 0 and cache.fits(room) and not cache.fits(room + 1)


def test_layers_may_be_asked_in_any_order():
    cache = KVCache(3, 4, 1, torch.device("cpu"))
    state = Pass(cache, [(cache, cache.lens)], 2)
    for index in (2, 0, 1):
        rows = torch.full((1, 2, 2, 8), 1.0 + index)
        state.write(index, rows, -rows)
    for index, layer in enumerate(cache.layers):
        assert (layer.keys[:, :, :2] == 1 + index).all()
        assert (layer.values[:, :, :2] == -1 - index).all()


def test_overflow_is_an_error():
    cache = KVCache(1, 4, 1, torch.device("cpu"))
    cache.advance(4)
    with pytest.raises(RuntimeError, match="holds 4 tokens, but 5 are needed"):
        cache.advance(1)
    assert cache.length == 4 and int(cache.lens) == 4


def test_bytes():
    cache = KVCache(2, 10, 1, torch.device("cpu"))
    assert cache.num_bytes == 0
    for layer in cache.layers:
        layer.lazy_initialization(torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, 1, 16))
    assert cache.num_bytes == 2 * 10 * 3 * (8 + 16) * 4
