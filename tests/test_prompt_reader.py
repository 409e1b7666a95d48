"""Tests what a draft reads of a prompt, and when."""

from __future__ import annotations

import pytest
import torch
from models import prompt, tiny_model
from transformers.cache_utils import DynamicCache

from specextend import SpecConfig, SpecExtend
from specextend.attention import PatchedModel
from specextend.cache import KVCache
from specextend.compat import CACHE
from specextend.draft import prompt_reader
from specextend.draft.prompt_reader import choose_chunks, read_chunks

CONFIG = SpecConfig(
    gate="off", tree_nodes=9, tree_depth=4, prefill_chunk=32, seed=0, chunk_size=8, budget=32,
    recent_chunks=1, retrieve_every=2, draft_prefill_window=16,
)  # fmt: skip


CPU = torch.device("cpu")


class TestChoice:
    def test_all_where_all_may_be_held(self):
        scores = torch.rand(1, 20)
        assert choose_chunks(scores, 150, CONFIG.replace(draft_cache="full"), CPU) is None
        assert choose_chunks(None, 32, CONFIG, CPU) is None
        assert choose_chunks(scores, 32, CONFIG, CPU) is None

    def test_the_window(self):
        chosen = choose_chunks(None, 100, CONFIG.replace(draft_cache="window"), CPU)
        assert chosen.nonzero()[:, 0].tolist() == [0, 10, 11, 12]

    @pytest.mark.parametrize("draft_cache", ["window", "retrieval"])
    def test_on_the_drafts_device(self, draft_cache):
        meta = torch.device("meta")
        scores = torch.rand(1, 20, device=meta) if draft_cache == "retrieval" else None
        config = CONFIG.replace(draft_cache=draft_cache)
        assert choose_chunks(scores, 100, config, meta).device == meta

    @pytest.mark.parametrize("length", [33, 100, 161, 1000])
    def test_the_best_of_retrieval(self, length):
        count = -(-length // 8)
        scores = torch.rand(1, count + 3)
        chosen = choose_chunks(scores, length, CONFIG, CPU)
        number = max(4, round(prompt_reader.SHARE * count))
        assert chosen.shape == (count,) and chosen.sum() == number
        assert chosen[0] and chosen[-1]
        others = scores[0, 1 : count - 1].topk(number - 2).indices + 1
        assert chosen[others].all()


class TestReading:
    @pytest.mark.sweep(22)
    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
    @pytest.mark.parametrize("window", [None, 1, 5, 16, 200])
    @pytest.mark.parametrize("width", [None, 1, 7, 32])
    def test_keys_are_those_of_what_was_read(self, family, window, width):
        """The model's own forward over these tokens, with positions and a mask by hand."""
        model = tiny_model(family, attn_implementation="eager")
        ids, config = prompt(101), CONFIG.replace(draft_prefill_window=window, prefill_chunk=width)
        chosen = torch.zeros(13, dtype=torch.bool)
        chosen[[0, 1, 4, 8, 9, 12]] = True
        full = KVCache(2, 120, 1, ids.device)
        patched = PatchedModel(model)
        with torch.inference_mode():
            assert torch.equal(read_chunks(ids, chosen, full, config, patched.read), chosen)

        chunks = [0, 1, 3, 4, 7, 8, 9, 11, 12]
        rows = torch.cat([torch.arange(8 * c, min(8 * c + 8, 101)) for c in chunks])
        distance = rows[:, None] - rows
        own = patched.find_windows()
        layers = []
        for layer in range(2):
            far = min(w for w in (window, own[layer], 1000) if w)
            layers.append((distance >= 0) & (distance < far))
        expected = by_hand(model, ids[:, rows], rows, layers)
        for ours, theirs in zip(full.layers, expected.layers, strict=True):
            for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                torch.testing.assert_close(a[:, :, rows], b, rtol=1e-4, atol=1e-4)

    def test_nothing_else_is_written(self):
        ids, chosen = prompt(64), torch.tensor([True, *[False] * 6, True])
        full = KVCache(2, 70, 1, ids.device)
        with torch.inference_mode():
            read_chunks(ids, chosen, full, CONFIG, PatchedModel(tiny_model("llama")).read)
        for layer in full.layers:
            assert not layer.keys[:, :, 8:48].any() and layer.keys[:, :, 48:64].any()

    @pytest.mark.parametrize("window", [None, 5, 16])
    def test_what_is_read_later_is_as_if_it_were_read_then(self, window):
        """And what was there before stays, bit by bit; also the chunk before one of the new."""
        ids, config = prompt(101), CONFIG.replace(draft_prefill_window=window)
        patched = PatchedModel(tiny_model("llama"))
        first, later = torch.zeros(2, 13, dtype=torch.bool)
        first[[0, 5, 12]] = True
        later[[6, 9]] = True
        full, alone = (KVCache(2, 120, 1, ids.device) for _ in range(2))
        with torch.inference_mode():
            known = read_chunks(ids, first, full, config, patched.read)
            before = [(layer.keys.clone(), layer.values.clone()) for layer in full.layers]
            both = read_chunks(ids, later, full, config, patched.read, known)
            read_chunks(ids, later, alone, config, patched.read)
        assert torch.equal(both, first | later)

        def rows(chunks):
            return torch.cat([torch.arange(8 * c, min(8 * c + 8, 101)) for c in chunks])

        for ours, theirs, (keys, values) in zip(full.layers, alone.layers, before, strict=True):
            for a, b, c in ((ours.keys, theirs.keys, keys), (ours.values, theirs.values, values)):
                assert torch.equal(a[:, :, rows([0, 5, 12])], c[:, :, rows([0, 5, 12])])
                assert torch.equal(a[:, :, rows([6, 9, 8])], b[:, :, rows([6, 9, 8])])
        # The chunk before a new one was read again, which is not what is kept.
        again, kept = (x[:, :, rows([5])] for x in (alone.layers[-1].keys, full.layers[-1].keys))
        assert not torch.equal(again, kept)


def by_hand(model, tokens, positions, seen):
    """Return the cache of the model's own forward, layers seeing what ``seen`` says."""
    cache, masks = DynamicCache(), iter(seen)  # without a configuration it forgets nothing
    handles = []

    def with_mask(module, args, kwargs):
        mask = torch.where(next(masks), 0.0, -torch.inf)[None, None]
        return args, {**kwargs, "attention_mask": mask}

    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        handles.append(attention.register_forward_pre_hook(with_mask, with_kwargs=True))
    try:
        with torch.inference_mode():
            model(input_ids=tokens, position_ids=positions[None], **{CACHE: cache})
    finally:
        for handle in handles:
            handle.remove()
    return cache


class TestGeneration:
    @pytest.mark.parametrize("draft_cache", ["full", "window", "retrieval"])
    def test_the_first_token_does_not_wait(self, draft_cache):
        """It comes before the draft has run; a text of one token is written without it."""
        target, draft = tiny_model("llama"), tiny_model("llama", seed=1)
        spec = SpecExtend(target, draft, CONFIG.replace(draft_cache=draft_cache))
        runs = []
        handle = draft.model.layers[0].register_forward_hook(lambda *a: runs.append(1))
        spec.generate(prompt(150), max_new_tokens=1, do_sample=False)
        assert not runs
        stream = spec.stream(prompt(150), max_new_tokens=9, do_sample=False)
        next(stream)
        assert not runs
        next(stream)
        assert runs and spec.stats.seconds["draft_prefill"] > 0
        stream.close()
        handle.remove()

    @pytest.mark.sweep(2)
    @pytest.mark.parametrize(
        "draft_cache, later", [("window", True), ("retrieval", False), ("retrieval", True)]
    )
    @pytest.mark.parametrize("seed", range(3))
    def test_what_was_not_read_is_not_used(self, draft_cache, later, seed, monkeypatch):
        """With NaN in its place: the same rounds. Where nobody waits, later retrievals choose among
        the chunks that were read at first; else these are read when they are wanted."""
        target, draft = tiny_model("llama"), tiny_model("llama", seed=1)
        config, ids = CONFIG.replace(draft_cache=draft_cache), prompt(300, seed=seed)
        monkeypatch.setattr("specextend.draft.causal_lm.follows", lambda *given: later)
        spec = SpecExtend(target, draft, config, keep_contexts=0)
        expected = spec.generate(ids, max_new_tokens=60, do_sample=False)
        accepted = spec.stats.num_accepted_tokens
        assert torch.equal(expected, target.generate(ids, max_new_tokens=60, do_sample=False))
        chosen = []

        def poisoned(tokens, which, full, *rest):
            known = read_chunks(tokens, which, full, *rest)
            lost = ~known.repeat_interleave(8)[: tokens.shape[1]]
            assert chosen or lost.sum() > 150
            chosen.append(known)
            for layer in full.layers:
                layer.keys[:, :, : len(lost)][:, :, lost] = torch.nan
                layer.values[:, :, : len(lost)][:, :, lost] = torch.nan
            return known

        monkeypatch.setattr("specextend.draft.causal_lm.read_chunks", poisoned)
        assert torch.equal(spec.generate(ids, max_new_tokens=60, do_sample=False), expected)
        assert spec.stats.num_accepted_tokens == accepted
        of_prompt = {c for ids in spec.stats.retrieved_chunks for c in ids if c < len(chosen[0])}
        assert all(chosen[-1][c] for c in of_prompt)
        assert (len(chosen) > 1) == (later and draft_cache == "retrieval")
        if len(chosen) > 1:
            assert any(not chosen[0][c] for c in of_prompt)
            assert chosen[-1].sum() == chosen[0].sum() + len(
                [c for c in of_prompt if not chosen[0][c]]
            )
        assert (draft_cache == "window") == (not of_prompt)

    def test_the_last_layer_is_run_for_its_keys_alone(self):
        target, draft = tiny_model("llama"), tiny_model("llama", seed=1)
        rows = {"target": [], "draft": []}
        for name, model in (("target", target), ("draft", draft)):
            model.model.layers[-1].mlp.register_forward_hook(
                lambda module, args, out, name=name: rows[name].append(out.shape[1])
            )
        spec = SpecExtend(target, draft, CONFIG.replace(draft_cache="full"))
        rows["target"].clear(), rows["draft"].clear()
        spec.generate(prompt(150), max_new_tokens=20, do_sample=False)
        assert max(rows["target"]) <= 10 and max(rows["draft"]) <= 10
