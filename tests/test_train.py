"""Training of drafts: what is drawn, what is learnt, resuming, processes, the command."""

from __future__ import annotations

import json
import sys
import threading
import types

import numpy as np
import pytest
import torch
from models import VOCAB, prompt, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from specextend import SpecConfig, SpecExtend, assets, cli
from specextend.attention import PatchedModel
from specextend.draft import EagleDraft, LongSpecDraft
from specextend.train import continuations
from specextend.train.continuations import write_continuations
from specextend.train.data import Batch, TokenStream
from specextend.train.eagle3 import (
    Eagle3Recipe,
    feature_layers,
    frequent_tokens,
    new_head,
    unroll,
)
from specextend.train.longspec import (
    LongSpecRecipe,
    anchor_offset_positions,
    lagged_attention,
    new_block,
    windowed_attention,
)
from specextend.train.loop import Processes, TrainConfig, Trainer
from specextend.train.loss import Measured, Wanted, gradient_in_blocks, row_loss
from specextend.train.target import FrozenTarget
from specextend.train.validation import Continuation, count_rounds

CONFIG = SpecConfig(tree_shape="fixed", tree_widths=(2, 3, 2), draft_cache="full", gate="off")
RUN = TrainConfig(steps=6, batch=4, micro_batch=2, length=24, lr=5e-3, warmup=1, save_every=3)


def words(count: int, seed: int = 0) -> list[str]:
    """Make a text with a pattern that can be learnt: each word has two likely successors."""
    rng, at, out = np.random.default_rng(seed), 3, []
    for _ in range(count):
        at = 3 + (at * 7 + int(rng.integers(2)) * 11) % (VOCAB - 3)
        out.append(f"w{at}")
    return out


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def stream(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    (folder / "text.txt").write_text(" ".join(words(1500)))
    return TokenStream(folder / "text.txt", tokenizer, folder)


def recipe_of(kind: str, model, stream, **options):
    torch.manual_seed(0)
    target = FrozenTarget(model)
    if kind == "eagle3":
        tokens = frequent_tokens(stream, VOCAB, 60) if options.pop("small", False) else None
        return Eagle3Recipe(target, new_head(target, tokens), options.get("steps", 3), "target")
    options = {"anchor_offset": True, "max_lag": 4, "labels": "target"} | options
    return LongSpecRecipe(target, new_block(target), **options)


# ---- what is drawn -------------------------------------------------------------------------------


class TestAnchorOffset:
    def test_anchors_stay_and_the_rest_moves_as_one(self):
        generator, offsets, anchors = torch.Generator().manual_seed(0), set(), set()
        for _ in range(50):
            rows = anchor_offset_positions(8, 20, 100, generator)
            assert rows.shape == (8, 20) and rows.max() < 100
            for row in rows:
                first = int((row == torch.arange(20)).long().cumprod(0).sum())
                offset = int(row[-1]) - 19
                if offset:
                    assert first <= 4
                    assert torch.equal(row[first:], torch.arange(first, 20) + offset)
                    anchors.add(first)
                offsets.add(offset)
        assert anchors == {0, 1, 2, 3, 4} and min(offsets) == 0 and max(offsets) == 80

    def test_windows_that_do_not_fit(self):
        with pytest.raises(ValueError, match="windows of 101 tokens do not fit the 100 positions"):
            anchor_offset_positions(1, 101, 100, torch.Generator())


def dense_attention(q, k, v, seen):
    """Attend [B, L, H, D] under a mask [L, L]; a row that sees nothing is 0."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v)


class TestAttention:
    @pytest.mark.parametrize("lag", [1, 3])
    @pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
    def test_lagged(self, lag, heads):
        q = torch.randn(2, 11, heads[0], 8, dtype=torch.float64)
        k, v = torch.randn(2, 2, 11, heads[1], 8, dtype=torch.float64)
        seen = torch.ones(11, 11, dtype=torch.bool).tril(-lag)
        out = lagged_attention(q, k, v, lag)
        torch.testing.assert_close(out, dense_attention(q, k, v, seen))
        assert not out[:, :lag].any()

    @pytest.mark.parametrize("window", [1, 3, 10, 11, 12])
    def test_windowed(self, window):
        q, k, v = torch.randn(3, 2, 11, 2, 8, dtype=torch.float64)
        seen = torch.ones(11, 11, dtype=torch.bool).tril().triu(1 - window)
        torch.testing.assert_close(
            windowed_attention(q, k, v, window), dense_attention(q, k, v, seen)
        )


class TestData:
    def test_every_window_once_an_epoch(self, stream):
        per_epoch = (len(stream) - 23) // 24
        for epoch in range(2):
            starts = []
            for index in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                ids = stream.batch(index, 1, 24, seed=5).ids[0].numpy()
                found = np.lib.stride_tricks.sliding_window_view(stream.ids, 24)
                starts.append(int(np.flatnonzero((found == ids).all(1))[0]))
            assert len(set(starts)) == per_epoch and np.diff(sorted(starts)).min() == 24
            assert sorted(starts) != starts
        again = stream.batch(3, 2, 24, seed=5)
        assert torch.equal(again.ids[0], stream.batch(6, 1, 24, seed=5).ids[0])

    def test_only_responses_count(self, tokenizer, tmp_path):
        lines = [
            {"prompt": "w5 w6 w7", "response": "w8 w9"},
            {"text": "w3 w4"},
        ]
        (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(x) for x in lines))
        stream = TokenStream(tmp_path / "d.jsonl", tokenizer, tmp_path)
        assert stream.ids.tolist() == [5, 6, 7, 8, 9, 2, 3, 4, 2]
        assert stream.counts.tolist() == [False] * 3 + [True] * 6
        batch = Batch(
            torch.tensor(stream.ids[None].astype("int64")), torch.tensor(stream.counts)[None]
        )
        wanted = Wanted.of(batch, None).tokens[0].tolist()
        assert wanted == [-100, -100, 8, 9, 2, 3, 4, 2, -100]

    def test_tokenized_once(self, tokenizer, tmp_path):
        (tmp_path / "t.txt").write_text("w3 w4 w5")
        first = TokenStream(tmp_path / "t.txt", tokenizer, tmp_path)
        assert len(list(tmp_path.glob("tokens-*"))) == 2

        def refuse(*args):
            raise AssertionError("tokenized again")

        monkey = pytest.MonkeyPatch()
        monkey.setattr("specextend.train.data._tokenize", refuse)
        assert TokenStream(tmp_path / "t.txt", tokenizer, tmp_path).name == first.name
        (tmp_path / "t.txt").write_text("w3 w4 w6")
        with pytest.raises(AssertionError, match="tokenized again"):
            TokenStream(tmp_path / "t.txt", tokenizer, tmp_path)
        monkey.undo()

    @pytest.mark.parametrize(
        "line, text",
        [
            ("{", "line 2: not JSON"),
            ('{"txt": 1}', r"line 2: .text., or .prompt. and .response., are wanted, got \['txt'"),
            ('{"prompt": "a"}', "line 2: .* got .*prompt"),
            ("[1]", "line 2: .* got list"),
        ],
    )  # fmt: skip
    def test_broken_lines(self, tokenizer, tmp_path, line, text):
        (tmp_path / "d.jsonl").write_text('{"text": "w3"}\n' + line)
        with pytest.raises(ValueError, match=text):
            TokenStream(tmp_path / "d.jsonl", tokenizer, tmp_path)

    @pytest.mark.parametrize(
        "option, text",
        [
            ("--device gpu", "--device must be cpu, cuda or cuda:N, got gpu"),
            ("--target /nowhere/model", "there is no folder /nowhere/model"),
        ],
    )
    def test_continuations_of_what_is_not_there(self, capsys, option, text):
        with pytest.raises(SystemExit):
            continuations.main(["--data", "x", "--output", "y", *option.split()])
        assert capsys.readouterr().err.rstrip().endswith(f"error: {text}")

    def test_continuations_are_the_targets(self, tokenizer, stream, tmp_path):
        model, file = tiny_model("llama", eos_token_id=None), tmp_path / "continued.jsonl"
        write_continuations(SpecExtend(model, "ngram"), tokenizer, stream, file, 3, 20, 9)
        lines = file.read_text().splitlines()
        places = np.random.default_rng(0).integers(len(stream) - 19, size=3)
        for line, place in zip(lines, places, strict=True):
            ids = torch.from_numpy(stream.ids[place : place + 20].astype("int64"))[None]
            want = model.generate(ids, max_new_tokens=9, do_sample=False)[0]
            want = tokenizer.decode(want, skip_special_tokens=True)
            assert json.loads(line)["text"] == want
        with pytest.raises(ValueError, match="has 1501 tokens, passages of 2000 are wanted"):
            write_continuations(SpecExtend(model), tokenizer, stream, file, 1, 2000, 1)
        assert file.read_text().splitlines() == lines

    def test_too_short(self, tokenizer, tmp_path):
        (tmp_path / "t.txt").write_text("w3 w4")
        stream = TokenStream(tmp_path / "t.txt", tokenizer, tmp_path)
        with pytest.raises(ValueError, match="has 3 tokens, fewer than a window"):
            stream.batch(0, 1, 8, 0)


# ---- losses --------------------------------------------------------------------------------------


class TestLoss:
    @pytest.mark.parametrize("soft", [False, True])
    def test_blocks_change_nothing(self, monkeypatch, soft):
        head = torch.nn.Linear(8, 13)
        hidden = torch.randn(2, 9, 8, requires_grad=True)
        tokens = torch.randint(0, 13, (2, 9))
        tokens[0, :4] = -100
        teacher = torch.randn(2, 9, 13) if soft else None
        wanted, got = Wanted(tokens, teacher), []
        for rows in (3, 1000):
            monkeypatch.setattr("specextend.train.loss.BLOCK", rows * 13)
            gradient, measured = gradient_in_blocks(hidden, head, wanted.rows, 13, 0.5)
            got.append((measured, gradient))
        assert (
            got[0][0].rows == 14
            and got[0][0].weight == 7.0
            and got[0][0].loss == pytest.approx(got[1][0].loss)
        )
        torch.testing.assert_close(got[0][1], got[1][1])
        logits = head(hidden).log_softmax(-1)
        probs = torch.nn.functional.one_hot(tokens.clamp(min=0), 13).float()
        probs = teacher.softmax(-1) if soft else probs
        loss = (-(probs * logits).sum(-1) * (tokens >= 0)).sum()
        assert got[0][0].loss == pytest.approx(loss.item(), rel=1e-5)
        expected = torch.autograd.grad(loss * 0.5, hidden)[0]
        torch.testing.assert_close(got[0][1], expected)

    @pytest.mark.parametrize("small", [False, True])
    def test_eagle_steps(self, stream, small):
        """Step s, row t: the distribution behind token t + 1 + s, in the head's vocabulary."""
        recipe = recipe_of("eagle3", tiny_model("llama"), stream, small=small)
        batch = stream.batch(0, 2, 24, 0)
        measured = recipe.backward(batch, [torch.Generator()] * 2)
        positions = torch.arange(24).expand(2, -1)
        head, target = recipe.module, recipe.target
        reading = target.read(batch.ids, positions, True, head.config.feature_layers)
        ids = torch.arange(VOCAB) if head.vocabulary is None else head.vocabulary
        total, rows = 0.0, 0
        for step, (logits, _) in enumerate(unroll(head, batch.ids, reading.features, 3)):
            for b in range(2):
                for t in range(logits.shape[1]):
                    teacher = reading.logits[b, t + 1 + step]
                    if t + 2 + step >= 24 or int(teacher.argmax()) not in ids.tolist():
                        continue
                    probs = teacher[ids].softmax(0)
                    total -= (probs * logits[b, t].log_softmax(0)).sum().item()
                    rows += 1
        assert measured.rows == rows and measured.loss == pytest.approx(total, rel=1e-4)
        assert small == (rows < 2 * (22 + 21 + 20))


# ---- runs ----------------------------------------------------------------------------------------


class TestRuns:
    @pytest.mark.parametrize("kind", ["longspec", "eagle3"])
    @pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
    def test_learns_and_loads(self, kind, family, stream, tmp_path):
        """The loss falls, the target stays, the file loads as a lossless draft."""
        model = tiny_model(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        options = {"labels": "data"} if kind == "longspec" else {}
        recipe, reports = recipe_of(kind, model, stream, **options), []
        config = TrainConfig(steps=25, batch=4, micro_batch=4, length=24, lr=1e-2, warmup=2,
                             log_every=5)  # fmt: skip
        Trainer(recipe, config, stream, tmp_path, report=reports.append).run()
        assert reports[-1].loss < 0.95 * reports[0].loss
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        spec = SpecExtend(model, tmp_path, CONFIG)
        assert isinstance(spec.draft, LongSpecDraft if kind == "longspec" else EagleDraft)
        plain = model.generate(prompt(40), max_new_tokens=20, do_sample=False)
        assert torch.equal(spec.generate(prompt(40), max_new_tokens=20, do_sample=False), plain)

    @pytest.mark.parametrize("kind", ["longspec", "eagle3"])
    def test_half_precision_target(self, kind, stream, tmp_path):
        model = tiny_model("llama", dtype=torch.bfloat16)
        recipe = recipe_of(kind, model, stream)
        Trainer(recipe, RUN, stream, tmp_path).run()
        assert {p.dtype for p in recipe.module.parameters()} == {torch.float32}
        draft = recipe.draft(CONFIG)
        plain = SpecExtend(model, None, CONFIG).generate(prompt(40), max_new_tokens=20)
        spec = SpecExtend(model, draft, CONFIG)
        assert torch.equal(spec.generate(prompt(40), max_new_tokens=20), plain)

    @pytest.mark.parametrize("kind", ["longspec", "eagle3"])
    def test_resumes_exactly(self, kind, stream, tmp_path):
        """Stopped and gone on: the bits of a run in one go."""
        model = tiny_model("llama")
        whole = recipe_of(kind, model, stream)
        Trainer(whole, RUN, stream, tmp_path / "whole").run()

        class Interrupted(Exception):
            pass

        def interrupt(report):
            raise Interrupted

        stopped = recipe_of(kind, model, stream)
        config = TrainConfig(**{**vars(RUN), "log_every": 5})
        with pytest.raises(Interrupted):
            Trainer(stopped, config, stream, tmp_path / "parts", report=interrupt).run()
        again = Trainer(recipe_of(kind, model, stream), RUN, stream, tmp_path / "parts")
        again.resume()
        assert again.step == 3
        again.run()
        for name, tensor in whole.module.state_dict().items():
            assert torch.equal(again.recipe.module.state_dict()[name], tensor), name

    def test_processes_make_the_same_step(self, stream, tmp_path):
        """Two that sum their gradients step as one does that has all windows."""
        model = tiny_model("llama")
        alone = recipe_of("longspec", model, stream)
        Trainer(alone, RUN, stream, tmp_path / "alone").run()
        barrier, slots = threading.Barrier(2), [None, None]

        class Accelerator:
            num_processes = 2

            def __init__(self, index):
                self.process_index = index

            def reduce(self, tensor, reduction):
                slots[self.process_index] = tensor.clone()
                barrier.wait(30)
                total = slots[0] + slots[1]
                barrier.wait(30)
                return total

            def wait_for_everyone(self):
                barrier.wait(30)

        recipes = [recipe_of("longspec", tiny_model("llama"), stream) for _ in range(2)]
        threads = [
            threading.Thread(
                target=Trainer(
                    recipe, RUN, stream, tmp_path / "two", Processes(Accelerator(index))
                ).run
            )
            for index, recipe in enumerate(recipes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, tensor in alone.module.state_dict().items():
            ours = [recipe.module.state_dict()[name] for recipe in recipes]
            assert torch.equal(*ours)
            torch.testing.assert_close(ours[0], tensor, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("kind", ["longspec", "eagle3", "small"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nothing_depends_on_the_micro_batch(self, kind, dtype, masked, stream, tmp_path):
        """Windows taken together as one likes: the same loss, the same gradients, also where rows
        count in some windows and not in others."""
        model, got = tiny_model("llama", dtype=dtype), []

        def batch(*args):
            made = TokenStream.batch(stream, *args)
            if masked:
                made.counts &= made.ids % 3 > 0
                made.counts[:, :12] &= made.ids[:, :1] % 2 > 0
            return made

        masking = types.SimpleNamespace(batch=batch, name="masked")
        for micro in (1, 2, 4):
            small = {"small": True} if kind == "small" else {}
            recipe = recipe_of("eagle3" if small else kind, model, stream, **small)
            config = TrainConfig(**{**vars(RUN), "micro_batch": micro, "lr": 1e-9})
            trainer = Trainer(recipe, config, masking, tmp_path)
            before = torch.random.get_rng_state()
            measured = trainer._update(torch.device("cpu"))
            assert torch.equal(torch.random.get_rng_state(), before)
            got.append((measured, [p.grad for p in trainer.parameters]))
        (first, ours), *others = got
        all_rows = 4 * (23 if kind == "longspec" else 22 + 21 + 20)
        assert 0 < first.rows and (first.rows < all_rows) == (masked or kind == "small")
        for measured, gradients in others:
            assert measured.rows == first.rows
            assert measured.weight == pytest.approx(first.weight)
            close = 1e-5 if dtype == torch.float32 else 3e-2
            assert measured.loss == pytest.approx(first.loss, rel=close)
            for a, b in zip(ours, gradients, strict=True):
                assert (a - b).norm() <= close * (b.norm() + 1e-3)

    def test_each_window_has_its_own_draws(self, stream, tmp_path):
        """Never the same twice, whatever the step, and the same however they are taken."""
        drawn = []
        for micro in (1, 4):
            recipe, seen = recipe_of("longspec", tiny_model("llama"), stream), []

            def draw(batch, generators, recipe=recipe, seen=seen):
                seen.extend(int(torch.randint(1 << 40, (), generator=g)) for g in generators)
                return type(recipe).backward(recipe, batch, generators)

            recipe.backward = draw
            config = TrainConfig(**{**vars(RUN), "steps": 2, "micro_batch": micro, "warmup": 0})
            Trainer(recipe, config, stream, tmp_path / str(micro)).run()
            drawn.append(seen)
        assert drawn[0] == drawn[1] and len(set(drawn[0])) == 8

    def test_refuses_another_runs_checkpoint(self, stream, tokenizer, tmp_path):
        model = tiny_model("llama")
        Trainer(recipe_of("longspec", model, stream), RUN, stream, tmp_path).run()
        config = TrainConfig(**{**vars(RUN), "lr": 1.0})
        with pytest.raises(ValueError, match="made with lr=0.005, but lr=1.0 is asked for"):
            Trainer(recipe_of("longspec", model, stream), config, stream, tmp_path).resume()
        (tmp_path / "o.txt").write_text(" ".join(words(200, seed=1)))
        other = TokenStream(tmp_path / "o.txt", tokenizer, tmp_path)
        with pytest.raises(ValueError, match="another training text"):
            Trainer(recipe_of("longspec", model, stream), RUN, other, tmp_path).resume()
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            Trainer(recipe_of("longspec", model, stream), RUN, stream, tmp_path / "x").resume()

    def test_schedules(self):
        base = dict(steps=100, batch=1, micro_batch=1, length=8, lr=1.0, warmup=10)
        cosine = [TrainConfig(**base).rate(i) for i in range(100)]
        linear = [TrainConfig(**base, schedule="linear").rate(i) for i in range(100)]
        longer = TrainConfig(**{**base, "steps": 1000}, schedule="linear")
        assert cosine[0] == linear[0] == pytest.approx(1 / 11) and max(cosine) == 1.0
        assert cosine[55] == pytest.approx(0.5) and min(cosine[10:]) == cosine[-1] == 0.02
        assert linear[10:70] == [1.0] * 60 and linear[85] == pytest.approx(0.5)
        assert [longer.rate(i) for i in range(70)] == linear[:70]

    @pytest.mark.parametrize(
        "change, text",
        [
            (dict(steps=0), "steps must be at least 1, got 0"),
            (dict(length=4), "length must be at least 8, got 4"),
            (dict(batch=3), "batch must be a multiple of micro_batch=2, got 3"),
            (dict(lr=0.0), "lr must be positive, got 0.0"),
            (dict(warmup=7), r"warmup must be in \[0, 6\], got 7"),
        ],
        ids=str,
    )
    def test_bad_options(self, change, text):
        with pytest.raises(ValueError, match=text):
            TrainConfig(**{**vars(RUN), **change})


class TestValidation:
    @pytest.mark.parametrize("kind", ["longspec", "eagle3", "ngram"])
    @pytest.mark.parametrize("shape", ["fixed", "top_k"])
    def test_counts_as_the_loop_does(self, kind, shape, stream):
        """The same drafts along the same text give the loop's rounds, without its verify passes."""
        model, config = tiny_model("llama"), CONFIG.replace(tree_shape=shape, tree_depth=3)
        made = "ngram" if kind == "ngram" else recipe_of(kind, model, stream).draft(config)
        spec = SpecExtend(model, made, config)
        ids = torch.cat([prompt(30), prompt(30)], 1)
        spec.generate(ids, max_new_tokens=50, do_sample=False)
        layers = spec.draft.feature_layers
        continuation = Continuation(PatchedModel(model), ids, 50, layers)
        for _ in range(2):  # a continuation serves many times
            emitted, rounds = count_rounds(spec.draft, continuation, config)
            assert (emitted, rounds) == (49, spec.stats.num_rounds)

    def test_drafts_that_retrieve(self, stream):
        model, config = tiny_model("llama"), CONFIG.replace(draft_cache="retrieval")
        draft = recipe_of("eagle3", model, stream).draft(config)
        continuation = Continuation(PatchedModel(model), prompt(30), 5, draft.feature_layers)
        with pytest.raises(ValueError, match="measured by the loop alone"):
            count_rounds(draft, continuation, config)


class TestBeginnings:
    def test_a_block_begins_with_pieces_of_the_target(self, stream):
        model = tiny_model("qwen2", num_hidden_layers=3)
        block = new_block(FrozenTarget(model), stream.batch(0, 1, 24, 0).ids)
        first, last = model.model.layers[0], model.model.layers[2]
        assert torch.equal(block.cross_q.weight, last.self_attn.q_proj.weight)
        assert torch.equal(block.self_norm.weight, first.input_layernorm.weight)
        ratio = block.down.weight / last.mlp.down_proj.weight
        assert ratio.std() < 1e-3 * ratio.mean().abs()  # the norm's weights are all 1

    def test_a_head_begins_with_pieces_of_the_target(self):
        """Its near heads attend as the target's first layer, its far heads find its keys."""
        model = tiny_model("llama", num_hidden_layers=4)
        target = FrozenTarget(model)
        head = new_head(target, from_target=True)
        ids = prompt(12)
        positions = torch.arange(12)[None]
        features = target.read(ids, positions, False, head.config.feature_layers).features
        seen = {}

        def attend(index, q, k, v):
            seen["k"] = k
            return torch.zeros_like(q)

        head(ids[:, 1:], head.fuse(features[:, :-1]), positions[:, :-1], attend)
        cache = target._cache.layers  # of the reading above: keys per layer
        torch.testing.assert_close(seen["k"][:, :, 2:], cache[3].k[:, :-1], rtol=1e-3, atol=1e-4)
        near = target.model.model.layers[0].self_attn
        expected = near.v_proj(target.model.model.layers[0].input_layernorm(
            target.embedding(ids[:, 1:])))  # fmt: skip
        weight = head.layers[0].self_attn.v_proj.weight[: expected.shape[-1]]
        embeds = head.layers[0].input_layernorm(target.embedding(ids[:, 1:]))
        torch.testing.assert_close(embeds @ weight[:, :32].T, expected)

    @pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
    def test_random_beginnings_add_nothing(self, family, stream):
        target = FrozenTarget(tiny_model(family))
        block = new_block(target)
        x = torch.randn(1, 5, 32)
        out = block(x, lambda q, k, v: torch.randn_like(q), lambda q: torch.randn_like(q))
        assert torch.equal(out, x)
        for begin in (lambda: new_block(target, prompt(20)), lambda: new_head(target, None, True)):
            with pytest.raises(ValueError, match="has no pieces .*; begin with random weights"):
                begin()

    def test_layers_that_a_head_reads(self):
        assert feature_layers(32) == (2, 16, 29)
        assert feature_layers(4) == (1, 3, 4) and feature_layers(2) == (1, 1, 2)

    def test_frequent_tokens(self, stream):
        tokens = frequent_tokens(stream, VOCAB, 10)
        counts = np.bincount(stream.ids, minlength=VOCAB)
        assert counts[tokens].min() >= np.sort(counts)[-10] and tokens.tolist() == sorted(tokens)


# ---- the command ---------------------------------------------------------------------------------


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path, tokenizer):
        tiny_model("llama").save_pretrained(tmp_path / "target")
        tokenizer.save_pretrained(tmp_path / "target")
        (tmp_path / "text.txt").write_text(" ".join(words(800)))
        (tmp_path / "held.txt").write_text(" ".join(words(200, seed=1)))
        return tmp_path

    def run(self, folder, *more):
        return cli.main(
            ["train", "--target", str(folder / "target"), "--data", str(folder / "text.txt"),
             "--output", str(folder / "out"), "--length", "24", "--batch", "2", "--lr", "1e-3",
             *more]
        )  # fmt: skip

    @pytest.mark.parametrize("kind", ["longspec", "eagle3"])
    def test_trains_validates_resumes(self, folder, kind, capsys):
        options = ("--kind", kind, "--steps", "4", "--log-every", "2", "--no-tensorboard",
                   "--start", "target",
                   "--validation-data", str(folder / "held.txt"), "--validation-length", "40",
                   "--validation-tokens", "8", "--validate-every", "2")  # fmt: skip
        assert self.run(folder, *options) == 0
        shown = capsys.readouterr().err
        assert "step 2 of 4: loss" in shown and "acceptance length" in shown
        lines = [json.loads(x) for x in (folder / "out/log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4]
        assert all(1 <= line["acceptance"] <= 6 for line in lines)
        model = tiny_model("llama")
        SpecExtend(model, folder / "out").generate(prompt(20), max_new_tokens=4)

        assert self.run(folder, *options) == 1
        assert "has a checkpoint: --resume goes on" in capsys.readouterr().err
        assert self.run(folder, *options, "--resume") == 0
        more = ("--kind", kind, "--steps", "1", "--init", str(folder / "out"))
        (folder / "out").rename(folder / "first")
        more = ("--kind", kind, "--steps", "1", "--init", str(folder / "first"))
        assert self.run(folder, *more) == 0

    def test_stages(self, folder, capsys):
        record = json.dumps({"prompt": "w3 " * 30, "response": "w4 " * 30})
        (folder / "text.jsonl").write_text("\n".join([record] * 5))
        options = ("--kind", "longspec", "--stage", "3", "--steps", "1", "--data",
                   str(folder / "text.jsonl"))  # fmt: skip
        assert self.run(folder, *options) == 0
        assert self.run(folder, "--kind", "eagle3", "--stage", "2") == 1
        assert "--kind eagle3 has no stage 2" in capsys.readouterr().err

    def test_missing_packages_are_named(self, folder, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert self.run(folder, "--kind", "longspec", "--steps", "1", "--tensorboard") == 1
        assert "--tensorboard needs tensorboard: pip install" in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "accelerate", None)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert self.run(folder, "--kind", "longspec", "--steps", "1") == 1
        assert "needs accelerate: pip install accelerate" in capsys.readouterr().err

    def test_tensorboard_lines(self, folder, monkeypatch):
        seen = []

        class SummaryWriter:
            def __init__(self, folder):
                pass

            def add_scalar(self, name, value, step):
                seen.append((name, step))

            def close(self):
                seen.append("closed")

        module = type(sys)("torch.utils.tensorboard")
        module.SummaryWriter = SummaryWriter
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
        assert self.run(folder, "--kind", "longspec", "--steps", "2", "--log-every", "1") == 0
        assert ("loss", 1) in seen and ("lr", 2) in seen and seen[-1] == "closed"


def test_measured_adds():
    assert Measured(1.0, 2.0, 3, 4.0) + Measured(0.5, 1.0, 2, 1) == Measured(1.5, 3.0, 5, 5.0)
    loss, measured = row_loss(torch.zeros(2, 4), torch.tensor([1, -100]), None)
    assert measured.rows == 1 and loss.item() == pytest.approx(np.log(4))


class TestEmbeddedHeads:
    @pytest.mark.parametrize("kind", ["longspec", "eagle3"])
    def test_writes_the_targets_text(self, kind):
        model = AutoModelForCausalLM.from_pretrained(assets.target_path(), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(assets.target_path())
        text = assets.held_out_documents()[0][1][:3000]
        ids = tokenizer(text, return_tensors="pt").input_ids
        config = SpecConfig(tree_shape="fixed", draft_cache="full", gate="off")
        spec = SpecExtend(model, assets.draft_path(kind), config)
        plain = model.generate(ids, max_new_tokens=24, do_sample=False)
        assert torch.equal(spec.generate(ids, max_new_tokens=24, do_sample=False), plain)
        assert spec.stats.mean_acceptance_length > 1.2

    def test_size(self):
        files = [f for kind in ("longspec", "eagle3") for f in assets.draft_path(kind).iterdir()]
        assert sum(file.stat().st_size for file in files) <= 8 * 2**20
