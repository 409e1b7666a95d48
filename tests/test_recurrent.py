"""Layers that keep a state: it follows what is decided, whatever was proposed."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import pytest
import torch
from drafts import SMALL, Oracle, mixed, write
from families import miniature
from generations import ScriptedGate, scripted
from models import prompt, tiny_model
from tape import Tapes

from specextend import SpecExtend, UnsupportedModelError
from specextend.attention import _keepers
from specextend.cache import KVCache
from specextend.cache_layers import StateLayer
from specextend.compat import Kind
from specextend.draft import CausalLMDraft
from specextend.generation import Generation
from specextend.guard import self_check
from specextend.pace import FREE
from specextend.target import Target
from specextend.tree import paths

HOW = dict(max_new_tokens=24, do_sample=False)
#: families with layers that keep a state
STATES = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba2", "minimax",
    "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_next", "zamba",
)  # fmt: skip


def text(model, ids) -> list[int]:
    return model.generate(ids, **HOW)[0].tolist()


@pytest.mark.parametrize(
    ("above", "rows", "places"),
    [
        ([-1, 0], [[1]], [0]),
        ([-1, 0, 1, 2], [[1, 2, 3]], [0, 1, 2]),
        ([-1, 0, 0, 0], [[1], [2], [3]], [0, 1, 2]),
        ([-1, 0, 0, 1, 1, 3], [[2, 2, 2], [1, 4, 4], [1, 3, 5]], [3, 0, 7, 4, 8]),
    ],
)
def test_paths(above, rows, places):
    """Every node is where its place says, behind its ancestors."""
    found, at = paths(torch.tensor([above], dtype=torch.int32))
    assert found.tolist() == rows
    assert found.flatten()[at].tolist() == list(range(1, len(above)))
    assert at.tolist() == places


class TestStateLayer:
    def layer(self) -> StateLayer:
        layer = StateLayer()
        layer.update_conv_state(torch.randn(1, 6, 4))
        layer.update_recurrent_state(torch.randn(1, 2, 3, 3))
        return layer

    def test_copies_leave_the_state(self):
        layer = self.layer()
        before = [t.clone() for t in layer.states]
        with layer.branched(3):
            assert [len(t) for t in layer.states] == [3, 3]
            for copied, own in zip(layer.states, before, strict=True):
                assert torch.equal(copied, own.expand_as(copied))
                copied.fill_(7)
        assert all(map(torch.equal, layer.states, before))

    def test_copies_are_dropped_behind_an_error(self):
        layer = self.layer()
        with pytest.raises(RuntimeError, match="inside"), layer.branched(2):
            raise RuntimeError("inside")
        assert [len(t) for t in layer.states] == [1, 1]

    def test_follow(self):
        layer = self.layer()
        layer.proposed = torch.arange(5.0)[None, :, None]
        layer.follow([1, 3])
        assert layer.pending.flatten().tolist() == [1, 3] and layer.proposed is None
        layer.proposed, layer.pending = layer.pending, None
        layer.follow([])
        assert layer.pending is None

    def test_forget(self):
        cache = KVCache([Kind(False, 1), Kind(True, 0), Kind(True, 1)], 4, 1, torch.device("cpu"))
        for layer in cache.state_layers:
            layer.update_recurrent_state(torch.ones(1, 2))
        assert cache.num_bytes == 16
        cache.restart()
        assert cache.num_bytes == 0 and not any(la.states for la in cache.state_layers)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("family", "goes_on"),
    [("jamba", False), ("qwen3_next", True), ("lfm2", True), ("zamba", False)],
)
def test_forwards_that_begin_anew_are_known(family, goes_on):
    """Some read no state in a forward over several tokens; they are run token by token."""
    model = miniature(family)
    ids = prompt(40)
    spec = SpecExtend(model, Oracle(text(model, ids)), SMALL)
    seen = []
    for step in spec.stream(ids, **HOW):
        if step.num_accepted and not seen:
            seen = [keeper.reads_state for keeper in _keepers[model]]
    assert set(seen) == {goes_on}


class TestBetweenRounds:
    """While a stream is open the model is as it came."""

    @pytest.mark.sweep(2)
    @pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "lfm2"])
    def test_the_model_writes_itself(self, family):
        model, ids, other = miniature(family), prompt(40), prompt(17, 5)
        want, also = text(model, ids), text(model, other)
        spec, tokens = SpecExtend(model, Oracle(want), SMALL), []
        for step in spec.stream(ids, **HOW):
            tokens += step.tokens
            assert text(model, other) == also
        assert tokens == want[40:]

    def test_in_another_thread(self):
        model, ids, other = miniature("qwen3_next"), prompt(40), prompt(17, 5)
        want, also = text(model, ids), text(model, other)
        spec, found, stop = SpecExtend(model, Oracle(want), SMALL), [], threading.Event()

        def write() -> None:
            while not stop.is_set():
                found.append(text(model, other))

        beside = threading.Thread(target=write)
        beside.start()
        try:
            for _ in range(5):
                assert spec.generate(ids, **HOW)[0].tolist() == want
        finally:
            stop.set()
            beside.join()
        assert found and all(x == also for x in found)

    def test_behind_an_error_inside_a_round(self, monkeypatch):
        model, ids = miniature("bamba"), prompt(40)
        want = text(model, ids)
        spec = SpecExtend(model, Oracle(want), SMALL)
        layer = model.model.layers[2]
        calls, own = [], type(layer.mamba).forward

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 9:
                raise RuntimeError("in the middle")
            return own(layer.mamba, *args, **kwargs)

        layer.mamba.forward = failing
        with pytest.raises(RuntimeError, match="in the middle"):
            spec.generate(ids, **HOW)
        assert layer.mamba.forward is failing  # what somebody has put there stays
        del layer.mamba.forward
        assert spec.generate(ids, **HOW)[0].tolist() == want


def test_scored_layers():
    """Scores are of the last layer that attends to all of the text."""
    for family, layer in (
        ("qwen3_next", 3), ("nemotron_h", 2), ("bamba", 3), ("gemma4_text", 5), ("llama4_text", 3),
    ):  # fmt: skip
        assert Target(miniature(family)).score_layers == {layer}, family
    for kinds, layer in (("full", "sliding"), 2), (("sliding", "sliding"), 3):
        types = [f"{kind}_attention" for kind in kinds] * 2
        assert Target(miniature("gemma3_text", layer_types=types)).score_layers == {layer}
    assert Target(miniature("qwen3_next"), (1,)).score_layers == {1}
    for wanted, why in (((0,), "layer 0 of this model does not attend"), ((-3,), "before the 2")):
        with pytest.raises(ValueError, match=why):
            _ = Target(miniature("qwen3_next"), wanted).score_layers
    with pytest.raises(ValueError, match="does not attend: there are no scores"):
        _ = Target(miniature("mamba2")).score_layers


class TestDrafts:
    def test_a_draft_that_attends(self):
        """It retrieves by what the target's attention layers say."""
        model, ids = miniature("qwen3_next"), prompt(90)
        spec = SpecExtend(model, tiny_model("llama"), SMALL)
        assert spec.generate(ids, **HOW)[0].tolist() == text(model, ids)
        assert spec.stats.num_retrievals > 3

    @pytest.mark.sweep(5)
    @pytest.mark.parametrize("family", STATES)
    def test_levels_of_trees_with_states(self, family, monkeypatch):
        """Every node of a level has the logits of the model's own forward over its path."""
        draft, ids = miniature(family), prompt(40)
        text, levels, checked = ids[0, :-1].tolist(), {}, []
        propose, step = CausalLMDraft.propose, CausalLMDraft.step

        def proposing(self, decided, depth, price=FREE):
            text.extend(decided.tokens[0].tolist())
            return propose(self, decided, depth, price)

        def stepping(self, tokens, level, mask, num_keys, parents):
            logits = step(self, tokens, level, mask, num_keys, parents)
            before = levels[level - 1] if level else [[]]
            levels[level] = [
                [*before[parent], token]
                for parent, token in zip(parents[0].tolist(), tokens[0].tolist(), strict=True)
            ]
            for path, row in zip(levels[level], logits[0], strict=True):
                with torch.inference_mode():
                    own = draft(torch.tensor([text + path])).logits[0, -1]
                assert (row - own).norm() < 1e-4 * own.norm(), (family, level)
                checked.append(level)
            return logits

        monkeypatch.setattr(CausalLMDraft, "propose", proposing)
        monkeypatch.setattr(CausalLMDraft, "step", stepping)
        target = tiny_model("llama")
        config = SMALL.replace(draft_cache="full", gate="off")
        spec = SpecExtend(target, draft, config)
        want = target.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(spec.generate(ids, max_new_tokens=8, do_sample=False), want)
        assert len(checked) > len(set(checked)) > 1  # levels of several nodes

    @pytest.mark.sweep(3)
    @pytest.mark.filterwarnings("ignore:specextend")  # that it has its full cache
    @pytest.mark.parametrize("length", [1, 40])
    @pytest.mark.parametrize("kind", ["full", "window", "retrieval"])
    @pytest.mark.parametrize("family", STATES)
    def test_a_draft_with_states_and_the_weights_of_its_target(self, family, kind, length):
        """It proposes what the target writes, where its cache holds the text."""
        model, ids = miniature(family), prompt(length)
        config = SMALL.replace(
            draft_cache=kind,
            budget=256,
            tree_width=1,
            tree_top_k=1,
            draft_prefill_window=None,
        )
        try:
            spec = SpecExtend(model, miniature(family), config)
        except ValueError as reason:
            assert "positions" in str(reason) and kind != "full"
            return
        want = text(model, ids)
        assert write(spec, "generate", ids, **HOW) == want[length:]
        rounds = spec.stats.acceptance_histogram
        assert max(rounds) == config.max_depth and sum(rounds.values()) <= 8, rounds

    @pytest.mark.sweep(2)
    @pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "lfm2"])
    def test_rests_and_look_up_beside_a_draft_with_states(self, family):
        """What was decided without it is taken in when it is run next, however much that is."""
        target, ids = tiny_model("llama"), prompt(90)
        want, small = text(target, ids), SMALL.replace(budget=32, gate="off")
        gaps = [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 0, 3, *[3] * 40]
        spec = SpecExtend(target, miniature(family), small, generation=scripted(gaps))
        assert spec.generate(ids, **HOW)[0].tolist() == want
        spec = SpecExtend(target, mixed(miniature(family), small, model=target), small)
        assert spec.generate(ids, **HOW)[0].tolist() == want

    def test_the_target_itself_with_states(self):
        model = miniature("qwen3_next")
        with pytest.raises(ValueError, match='draft="self" does not serve Qwen3Next'):
            SpecExtend(model, "self", SMALL)

    @pytest.mark.sweep(2)
    @pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text", "llama4_text", "phimoe"])
    def test_drafts_of_today(self, family):
        """Latent keys, shared ones, chunks of attention: with the cache that the draft can have."""
        draft, target, ids = miniature(family), tiny_model("llama"), prompt(90)
        want = text(target, ids)
        for kind in ("full", "retrieval"):
            try:
                spec = SpecExtend(target, draft, SMALL.replace(draft_cache=kind))
            except ValueError as refusal:
                assert kind == "retrieval" and "rotary embeddings that could be moved" in str(
                    refusal
                )
                continue
            assert spec.generate(ids, **HOW)[0].tolist() == want


def test_refusals():
    model = miniature("qwen3_next")
    with pytest.raises(ValueError, match="one way for a token and another for several"):
        SpecExtend(model, "ngram", exact=True).generate(prompt(9), **HOW)
    with pytest.raises(UnsupportedModelError, match="its own class of caches does not know"):
        self_check(Target(miniature("minimax", sliding_window=16)))


def test_nothing_is_captured():
    """The host chooses what the state takes in."""
    model, ids, tapes = miniature("qwen3_next"), prompt(40), Tapes()
    want = text(model, ids)
    spec = SpecExtend(model, Oracle(want), SMALL, recorder=tapes)
    assert spec.generate(ids, **HOW)[0].tolist() == want
    assert spec.stats.mean_acceptance_length > 1.5


def test_a_tree_without_attention_of_ours():
    """The ablation by torch's SDPA serves chunks of attention, and layers that keep a state."""
    for family in ("llama4_text", "qwen3_next"):
        model, ids = miniature(family), prompt(61)
        want = text(model, ids)
        spec = SpecExtend(model, Oracle(want), SMALL, tree_attention=False)
        assert spec.generate(ids, **HOW)[0].tolist() == want


def test_the_share_of_weights_that_trees_pass_path_by_path():
    model = miniature("qwen3_next")
    layers = [layer for layer in model.model.layers if layer.block_type == "linear_attention"]
    kept = sum(p.numel() for layer in layers for p in layer.linear_attn.parameters())
    own = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    target = SpecExtend(model, None, SMALL).target
    assert len(layers) == 2 and target.branches == pytest.approx(kept / own)
    assert SpecExtend(tiny_model("llama"), None, SMALL).target.branches == 0


def test_the_gate_hears_what_branches_cost():
    """Every row of every path, for the share of the weights that it passes."""
    model, ids, gate = miniature("qwen3_next"), prompt(30), ScriptedGate(itertools.repeat(4))
    trees = []

    class Watched(Oracle):
        def propose(self, decided, depth, price=FREE):
            trees.append(super().propose(decided, depth, price))
            return trees[-1]

    spec = SpecExtend(
        model, Watched(text(model, ids), SMALL), SMALL, generation=partial(Generation, gate=gate)
    )
    spec.generate(ids, **HOW)
    share = spec.target.branches
    heard = [took.nodes for took in gate.counted if took.nodes]
    assert heard == [tree.size(share) for tree in trees if tree.depth]
    assert any(size > tree.num_nodes - 1 for size, tree in zip(heard, trees, strict=False))
