"""EAGLE heads: dialects against a reference from the papers, losslessness, caches, features."""

from __future__ import annotations

import pytest
import torch
from eagle_heads import DIALECTS, LAYERS, make, reference
from generations import Kept, scripted
from host_reads import reads_per_round
from models import FAMILIES, VOCAB, prompt, tiny_model
from tape import Tapes
from torch.nn import functional as F

from specextend import SpecConfig, SpecExtend
from specextend.attention import PatchedModel
from specextend.cache import KVCache, Pass
from specextend.draft import Decided, load_draft
from specextend.draft.checkpoint import Checkpoint
from specextend.draft.eagle import EagleDraft, attend
from specextend.draft.eagle_checkpoint import load_head, read_config, save_head
from specextend.draft.eagle_head import EagleHead
from specextend.draft.working_cache import WorkingCache
from specextend.graphs import Graphs
from specextend.target import Target
from specextend.train.eagle3 import unroll

# What one of the dialects leaves open; test_what_norm_output_means looks at it.
pytestmark = pytest.mark.filterwarnings("ignore:specextend. norm_output:RuntimeWarning")

SMALL = SpecConfig(
    chunk_size=8, budget=32, sink_chunks=1, recent_chunks=1, retrieve_every=2, prefill_chunk=40,
    draft_prefill_window=16, gate="off", tree_nodes=9, tree_depth=4, tree_threshold=0.0, seed=7,
)  # fmt: skip
CHAIN = dict(tree_shape="top_k", tree_nodes=4, tree_width=1, tree_top_k=1)


def big_enough(family: str = "llama", **changes):
    """Make a tiny target with enough layers for EAGLE-3."""
    if "layer_types" in FAMILIES[family]:
        changes["layer_types"] = ["sliding_attention"] + ["full_attention"] * (LAYERS - 1)
    return tiny_model(family, num_hidden_layers=LAYERS, **changes)


@pytest.fixture(scope="module")
def target():
    return big_enough()


@pytest.fixture(scope="module")
def exact_target():
    return big_enough(dtype=torch.float64)


def greedy(model, ids, n=30):
    return model.generate(ids, max_new_tokens=n, do_sample=False)


def features_of(model, ids: torch.Tensor, layers) -> torch.Tensor:
    """Compute features [1, L, F] by the model itself."""
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
    return torch.cat([states[i] for i in layers], -1)


class TestDialects:
    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_against_the_reference(self, exact_target, dialect, tmp_path):
        """Loaded from its file, in fp64: three steps behind each of eight positions."""
        made, ids = make(dialect), prompt(9)
        head = load_head(Checkpoint.open(made.write(tmp_path)), exact_target)
        assert head.config.feature_layers == made.features
        features = features_of(exact_target, ids, made.features)
        with torch.inference_mode():
            steps = unroll(head, ids, features, 3)
            expected = reference(made, exact_target, ids[0], features[0], 3)
        assert len(expected) == sum(logits.shape[1] for logits, _ in steps) == 8 + 7 + 6
        for (row, step), (logits, hidden) in expected.items():
            torch.testing.assert_close(steps[step][0][0, row], logits, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(steps[step][1][0, row], hidden, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_a_tree_has_the_logits_of_the_training_form(self, target, dialect, tmp_path):
        """Every node, on our kernels and caches, is as a row of its own chain (full cache)."""
        made, ids = make(dialect), prompt(12)
        config = SMALL.replace(draft_cache="full", tree_shape="top_k")
        draft = load_draft(made.write(tmp_path), Target(target), config)
        head, seen = draft.head, []
        logits_of = head.logits
        head.logits = lambda out: seen.append(logits_of(out)) or seen[-1]
        features = features_of(target, ids, made.features)
        decided = Decided(ids, F.pad(features, (0, 0, 1, -1)))
        with torch.inference_mode():
            draft.begin(ids[:, :10], 40, None, Graphs())
            draft.prefill(decided[:6])
            draft.prefill(decided[6:9])
            levels: list[list[list[int]]] = [[[]]]  # tokens below the root, by level and node
            step = draft.step

            def stepping(tokens, level, mask, num_keys, parents):
                before = levels[-1]
                levels.append(
                    [
                        [*before[p], t]
                        for t, p in zip(tokens[0].tolist(), parents[0].tolist(), strict=True)
                    ]
                )
                return step(tokens, level, mask, num_keys, parents)

            draft.step = stepping
            tree = draft.propose(decided[9:], 4)
            assert tree.depth == 4 and len(levels) == len(seen) == 4
            head.logits = logits_of
            for level, (logits, paths) in enumerate(zip(seen, levels, strict=True)):
                for node, path in enumerate(paths):
                    text = torch.cat([ids, torch.tensor([path], dtype=torch.long)], 1)
                    unknown = features.new_zeros(1, text.shape[1] - 11, features.shape[-1])
                    chain = torch.cat([features[:, :11], unknown], 1)
                    expected = unroll(head, text, chain, level + 1)[level][0]
                    torch.testing.assert_close(
                        logits[0, node], expected[0, 10], rtol=1e-4, atol=1e-4
                    )

    def test_tokens_are_the_targets(self, target, tmp_path):
        """A reduced vocabulary: proposed ids are among those that d2t leads to."""
        made, ids = make("eagle3"), prompt(12)
        draft = load_draft(made.write(tmp_path), Target(target), SMALL)
        known = set((made.tensors["d2t"] + torch.arange(40)).tolist())
        features = features_of(target, ids, made.features)
        decided = Decided(ids, F.pad(features, (0, 0, 1, -1)))
        with torch.inference_mode():
            draft.begin(ids, 40, None, Graphs())
            draft.prefill(decided[:9])
            tree = draft.propose(decided[9:], 3)
        assert set(tree.tokens[0, 1:].tolist()) <= known and max(known) > 40

    def test_rope_kinds_and_sizes(self):
        """The head's own configuration says, whatever the names; Llama's first if it is silent."""
        target = big_enough(rope_parameters=dict(rope_type="default", rope_theta=77.0))
        said = make("eagle3").config

        def inv_freq(**changes):
            config = read_config({**said, **changes}, target.config, 3)
            head = EagleHead(config, target, frozenset({"lm_head.weight", "d2t"}))
            return head.rope(torch.device("cpu")).inv_freq

        def plain(theta):
            return 1 / theta ** (torch.arange(0, 8, 2).float() / 8)

        torch.testing.assert_close(inv_freq(), plain(10000.0))
        torch.testing.assert_close(inv_freq(rope_theta=500.0), plain(500.0))
        torch.testing.assert_close(inv_freq(rope_parameters=dict(rope_theta=9.0)), plain(9.0))
        linear = inv_freq(rope_scaling=dict(type="linear", factor=4.0))
        torch.testing.assert_close(linear, plain(10000.0) / 4)
        llama3 = dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=2048,
        )  # fmt: skip
        assert not torch.equal(inv_freq(rope_scaling=llama3), plain(10000.0))

    def test_saved_and_loaded_again(self, target, tmp_path, recwarn):
        """A file in the official format gives the same forward."""
        ids = prompt(9)
        for dialect in (
            "eagle3",
            "eagle3-specforge",
            "eagle3.1",
            "eagle3.1-modelopt",
            "eagle3-tied",
        ):
            made = make(dialect)
            head = load_head(Checkpoint.open(made.write(tmp_path / dialect)), target)
            save_head(head, tmp_path / f"{dialect}-again")
            checkpoint = Checkpoint.open(tmp_path / f"{dialect}-again")
            assert "midlayer.self_attn.q_proj.weight" in checkpoint.files
            again = load_head(checkpoint, target)
            assert not recwarn.list
            assert again.config == head.config
            features = features_of(target, ids, made.features)
            with torch.inference_mode():
                for a, b in zip(
                    unroll(head, ids, features, 2), unroll(again, ids, features, 2), strict=True
                ):
                    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

    def test_the_training_form_learns(self):
        """Gradients reach every parameter; the loss over three steps falls."""
        torch.manual_seed(0)
        target = big_enough().requires_grad_(False)
        config = read_config(make("eagle3-vllm").config, target.config, 3)
        head = EagleHead(config, target, frozenset({"lm_head.weight"}))
        ids = prompt(40)
        features = features_of(target, ids, config.feature_layers).clone()
        optimizer = torch.optim.Adam(head.parameters(), 3e-3)
        losses = []
        for _ in range(30):
            loss = 0.0
            for step, (logits, _) in enumerate(unroll(head, ids, features, 3)):
                wanted = ids[0, 2 + step :]
                loss = loss + torch.nn.functional.cross_entropy(logits[0, : len(wanted)], wanted)
            optimizer.zero_grad()
            loss.backward()
            still = [n for n, p in head.named_parameters() if not p.grad.abs().sum() > 0]
            assert not still
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]


class TestLossless:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt_oss", "opt"])
    def test_greedy_families(self, family, tmp_path):
        model, ids = big_enough(family), prompt(90)
        expected = greedy(model, ids, 12)
        for dialect in ("eagle1", "eagle3"):
            path = make(dialect).write(tmp_path / dialect)
            spec = SpecExtend(model, path, SMALL)
            assert torch.equal(spec.generate(ids, max_new_tokens=12, do_sample=False), expected)
            assert spec.stats.num_draft_tokens > 0 and spec.stats.num_retrievals > 0

    @pytest.mark.parametrize(
        "dialect, draft_cache, shape",
        [
            ("eagle1", "full", "opt"),
            ("eagle1", "retrieval", "fixed"),
            ("eagle3-vllm-two-layers", "window", "eagle2"),
            ("eagle3-vllm-two-layers", "retrieval", "opt"),
            ("eagle3.1", "retrieval", "fixed"),
        ],
    )
    def test_caches_trees_lengths(self, target, dialect, draft_cache, shape, tmp_path):
        options = dict(tree_shape=shape, tree_widths=(3, 4, 2))
        if shape == "eagle2":  # its own parameters: 60 tokens, the root among them
            options = dict(
                tree_shape="top_k", tree_nodes=59, tree_depth=8, tree_width=10, tree_top_k=10
            )
        spec = SpecExtend(
            target, make(dialect).write(tmp_path), SMALL, draft_cache=draft_cache, **options
        )
        for length in (1, 2, 120):
            ids = prompt(length)
            out = spec.generate(ids, max_new_tokens=12, do_sample=False)
            assert torch.equal(out, greedy(target, ids, 12))

    @pytest.mark.parametrize("change", [dict(prefill_chunk=None), dict(prefill_chunk=1)], ids=str)
    def test_prefill(self, target, change, tmp_path):
        path, ids = make("eagle3").write(tmp_path), prompt(50)
        runs = [
            [
                (s.tokens, s.num_accepted)
                for s in SpecExtend(target, path, SMALL, draft_cache="full", **c).stream(
                    ids, max_new_tokens=20, do_sample=False
                )
            ]
            for c in (dict(), change)
        ]
        assert runs[0] == runs[1]

    @pytest.mark.parametrize("dialect", ["eagle1", "eagle3"])
    def test_sampled(self, target, dialect, tmp_path):
        path, ids = make(dialect).write(tmp_path), prompt(70)
        options = dict(max_new_tokens=16, do_sample=True, temperature=0.7, top_p=0.9)
        options["repetition_penalty"] = 1.2
        plain = SpecExtend(target, None, SMALL).generate(ids, **options)
        assert torch.equal(SpecExtend(target, path, SMALL).generate(ids, **options), plain)

    def test_rests_of_the_gate(self, target, tmp_path):
        gate = scripted([2] * 3 + [0] * 70 + [2] * 3 + [0] * 3 + [2] * 500)
        path, ids = make("eagle3").write(tmp_path), prompt(60)
        spec = SpecExtend(target, path, SMALL, generation=gate)
        out = spec.generate(ids, max_new_tokens=120, do_sample=False)
        assert torch.equal(out, greedy(target, ids, 120))
        assert spec.stats.num_plain_rounds > 70


def teacher_forced(draft: EagleDraft, model, text: torch.Tensor) -> KVCache:
    """Compute the head's keys and values of ``text`` by one pass over the target's own features."""
    head = draft.head
    features = features_of(model, text, head.config.feature_layers)[:, :-1]
    count = text.shape[1] - 1
    cache = KVCache(head.config.num_layers, count, 1, text.device)
    with torch.inference_mode():
        state = Pass(cache, [(cache, cache.lens)], count)
        head(text[:, 1:], head.fuse(features), torch.arange(count)[None], attend(state, (0,)))
    return cache


@pytest.mark.parametrize("dialect", ["eagle1", "eagle3", "eagle3.1"])
def test_keys_from_guessed_features_are_overwritten(target, dialect, tmp_path):
    """After many rounds the head's cache is that of one pass over the text with true features."""
    spec = SpecExtend(
        target, make(dialect).write(tmp_path), SMALL, draft_cache="full", tree_widths=(60, 40),
        tree_shape="fixed",
    )  # fmt: skip
    ids, kept = prompt(60), []
    end = spec.draft.end
    spec.draft.end = lambda: kept.append(spec.draft.caches.full) or end()
    out = spec.generate(ids, max_new_tokens=60, do_sample=False)
    assert spec.stats.num_accepted_tokens > 10  # the tree is wide, or nothing would be shown
    cache, expected = kept[0], teacher_forced(spec.draft, target, out)
    length = min(cache.length, out.shape[1] - 1)
    assert length > out.shape[1] - 6
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, :, :length], b[:, :, :length], rtol=1e-3, atol=1e-4)


class TestFullDepth:
    def test_eagle1_of_identical_weights(self, tmp_path):
        """A target of one layer, and a head that is that layer, over the same window: all but the
        prompt's first token, which no head sees."""
        model = tiny_model("mistral", num_hidden_layers=1, sliding_window=24)
        size = model.config.hidden_size
        tensors = {
            k.removeprefix("model."): v.clone()
            for k, v in model.state_dict().items()
            if ".layers." in k or k == "model.norm.weight"
        }
        tensors["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
        head = make("eagle1")
        head.tensors = tensors
        head.config = dict(
            hidden_size=size, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
            intermediate_size=48, rms_norm_eps=1e-6, sliding_window=24, use_sliding_window=True,
        )  # fmt: skip
        spec = SpecExtend(
            model, head.write(tmp_path), SMALL, draft_cache="full", **CHAIN,
            draft_prefill_window=None,
        )  # fmt: skip
        spec.generate(prompt(60), max_new_tokens=41, do_sample=False)
        assert spec.stats.acceptance_histogram == {4: 8}

    @pytest.mark.parametrize("draft_cache", ["full", "window", "retrieval"])
    def test_eagle3_that_knows_the_next_token(self, target, draft_cache, tmp_path):
        """A target that walks a cycle, and a head that attends to its own token."""
        model, period = big_enough(), 7
        with torch.no_grad():
            for p in model.model.layers.parameters():
                p.zero_()
            table = torch.eye(VOCAB, 32)[torch.arange(VOCAB) % 32]
            model.model.embed_tokens.weight.copy_(table)
            walk = torch.zeros(VOCAB, 32)
            for t in range(period):
                walk[10 + (t + 1) % period] += table[10 + t]
            model.lm_head.weight.copy_(walk)
        made = make("eagle3-vllm")
        made.config["norm_before_residual"] = True
        w = {k.removeprefix("model."): t for k, t in made.tensors.items()}
        for name in w:
            if "input_layernorm" not in name and name != "norm.weight":
                w[name].zero_()  # hidden_norm too: nothing but attention's output goes on
        layer = "layers.0.self_attn."
        w["layers.0.input_layernorm.weight"].fill_(1)
        # Keys of one size: a token's query is nearest to its own key.
        keys = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
        keys = 4 * keys / keys.norm(dim=1, keepdim=True)
        w[layer + "k_proj.weight"][:, :32] = keys.flatten(0, 1)
        w[layer + "q_proj.weight"][:, :32] = keys.repeat_interleave(2, 0).flatten(0, 1)
        for i in range(period):
            w[layer + "v_proj.weight"][i, 10 + i] = 1
            w[layer + "o_proj.weight"][10 + i, i] = 1
        w["lm_head.weight"].copy_(walk)
        spec = SpecExtend(
            model, made.write(tmp_path), SMALL, draft_cache=draft_cache, **CHAIN, prefill_chunk=7
        )
        ids = torch.arange(60)[None] % period + 10
        out = spec.generate(ids, max_new_tokens=41, do_sample=False)
        assert out[0].tolist() == [10 + i % period for i in range(101)]
        assert spec.stats.acceptance_histogram == {4: 8}


class TestWorkingCache:
    def test_a_cache_that_holds_everything_changes_nothing(self, target, tmp_path):
        path, ids, runs = make("eagle3").write(tmp_path), prompt(70), []
        for kind in ("full", "window", "retrieval"):
            spec = SpecExtend(
                target, path, SMALL, draft_cache=kind, budget=160, draft_prefill_window=None,
                tree_shape="top_k", tree_nodes=40, tree_width=8, tree_top_k=8,
            )  # fmt: skip
            runs.append([s.tokens for s in spec.stream(ids, max_new_tokens=20, do_sample=False)])
        assert runs[0] == runs[1] == runs[2]

    def test_retrieval_is_on_the_heads_own_keys(self, target, tmp_path, monkeypatch):
        """Selected chunks: values bit for bit, keys of recent ones too; older ones rotated."""
        spec = SpecExtend(target, make("eagle3").write(tmp_path), SMALL)
        refill, checked = WorkingCache.refill, []

        def checking(self, scores=None):
            ids, full, work = refill(self, scores), self.full, self.work
            assert full is spec.draft.caches.full and len(full.layers) == 1
            chosen = [i for i in ids[0].tolist() if i >= 0]
            rows = torch.cat([torch.arange(8 * i, min(8 * i + 8, full.length)) for i in chosen])
            assert len(rows) == work.length == int(work.lens) <= 32
            ours, theirs = work.layers[0], full.layers[0]
            assert torch.equal(ours.values[:, :, : len(rows)], theirs.values[:, :, rows])
            shift = torch.arange(full.length - len(rows), full.length) - rows
            inv_freq = spec.draft.head.rope(torch.device("cpu")).inv_freq
            angle = (shift[:, None] * inv_freq).double()
            a, b = theirs.keys[:, :, rows].double().chunk(2, -1)
            c, s = angle.cos(), angle.sin()
            moved = torch.cat([a * c - b * s, b * c + a * s], -1)
            torch.testing.assert_close(
                ours.keys[:, :, : len(rows)].double(), moved, rtol=1e-5, atol=1e-5
            )
            checked.append(int(shift.max()))
            return ids

        monkeypatch.setattr(WorkingCache, "refill", checking)
        spec.generate(prompt(150), max_new_tokens=30, do_sample=False)
        assert len(checked) > 5 and max(checked) > 50

    def test_generations_do_not_know_each_other(self, target, tmp_path):
        path = make("eagle3").write(tmp_path)
        spec = SpecExtend(target, path, SMALL)

        def steps(spec, ids):
            return [
                (s.tokens, s.num_accepted)
                for s in spec.stream(ids, max_new_tokens=12, do_sample=False)
            ]

        first = steps(spec, prompt(200))
        short = steps(spec, prompt(20, seed=1))
        assert steps(spec, prompt(200)) == first
        assert steps(SpecExtend(target, path, SMALL), prompt(20, seed=1)) == short


class TestFeatures:
    @pytest.mark.parametrize(
        "family", ["llama", "gemma2", "gpt2", "opt", "gpt_neox", "mixtral", "phi", "gemma3_text"]
    )
    def test_hooks_give_what_the_model_calls_hidden_states(self, family):
        changes = dict(n_layer=4) if family == "gpt2" else dict(num_hidden_layers=4)
        if family == "gemma3_text":
            changes["layer_types"] = ["full_attention"] * 4
        model, ids = tiny_model(family, **changes), prompt(12)
        layers = (0, 1, 3, 4)
        cache = KVCache(4, 12, 1, torch.device("cpu"))
        state = Pass(cache, [(cache, cache.lens)], 12, feature_layers=layers)
        with torch.inference_mode():
            PatchedModel(model).forward(ids, torch.arange(12)[None], state, last_only=True)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        expected = features_of(model, ids, layers)
        torch.testing.assert_close(state.features, expected, rtol=1e-4, atol=1e-4)

    def test_hooks_are_gone_after_an_error(self, tmp_path):
        target = big_enough()
        spec = SpecExtend(target, make("eagle3").write(tmp_path), SMALL)
        handle = target.model.layers[3].register_forward_pre_hook(lambda *a: 1 / 0)
        try:
            with pytest.raises(ZeroDivisionError):
                spec.generate(prompt(40), max_new_tokens=3)
        finally:
            handle.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.modules())
        stream = spec.stream(prompt(30), max_new_tokens=20, do_sample=False)
        next(stream), next(stream)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.modules())
        stream.close()

    def test_the_prompts_features_are_not_kept(self, target, tmp_path):
        """Behind each part of the prompt one row waits, and nothing it is a part of."""
        generations, waiting = Kept(), []

        def watching(*progress):
            (kept,) = generations[0].backlog.features
            waiting.append((kept.shape[1], kept.untyped_storage().nbytes() // 4))

        spec = SpecExtend(
            target, make("eagle3").write(tmp_path), SMALL, prefill_chunk=64, progress=watching,
            generation=generations,
        )  # fmt: skip
        spec.generate(prompt(200), max_new_tokens=3, do_sample=False)
        assert waiting == [(1, 3 * 32)] * 4

    def test_at_most_one_host_read_per_round(self, target, tmp_path, monkeypatch):
        spec = SpecExtend(target, make("eagle3").write(tmp_path), SMALL)
        stream = spec.stream(prompt(100), max_new_tokens=30, do_sample=False)
        rounds = reads_per_round(stream, monkeypatch)
        assert rounds and max(map(len, rounds)) <= 1, rounds


class TestCaptured:
    """The draft's work is recorded once and replayed, with counts that only the device knows."""

    def test_the_host_follows(self, target, tmp_path):
        """Its lengths are those of the device; also where the gate rests."""
        tapes, path, ids, out = Tapes(), make("eagle3").write(tmp_path), prompt(40), []
        gate = scripted([2, 0, 0, 0, 3, 0, 2, 2] * 20)
        spec = SpecExtend(target, path, SMALL, recorder=tapes, generation=gate)
        for step in spec.stream(ids, max_new_tokens=50, do_sample=False):
            out += step.tokens
            caches = (spec.draft.caches.full, spec.draft.caches.work)
            assert all(cache.length == int(cache.lens) for cache in caches)
        assert out == greedy(target, ids, 50)[0, 40:].tolist()
        assert len(tapes) == 2 and all(recorder.replays for recorder in tapes)
