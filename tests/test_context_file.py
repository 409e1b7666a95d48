"""Contexts in files: text that goes on from one is as without; what is of another is refused."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drafts import KINDS, SMALL, draft, target
from families import miniature
from models import prompt, tiny_model
from safetensors.torch import load_file, save_file
from test_arena import memory_used
from test_cli import SMALL as OPTIONS
from test_cli import byte_tokenizer
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from specextend import SpecExtend, cli, context_file, terminal
from specextend.compat import CACHE
from specextend.context import Context
from specextend.draft.base import Draft
from specextend.target import identity, weights_identity
from specextend.tree import Tree

HOW = dict(max_new_tokens=12, do_sample=False)
WINDOW = SMALL.replace(draft_cache="window")


def again(context: Context, spec: SpecExtend, folder: Path) -> Context:
    """Return a context as another SpecExtend finds it in a file."""
    context.save(folder / "context")
    return spec.load_context(folder / "context")


def text(model, ids: torch.Tensor) -> list[int]:
    return model.generate(ids, **HOW)[0].tolist()


def behind(ids: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Add tokens to a prompt."""
    return torch.cat([ids, prompt(count, seed)], 1)


class TestText:
    @pytest.mark.sweep(6)
    @pytest.mark.parametrize(
        "kind, config",
        [
            *((kind, SMALL) for kind in KINDS),
            ("model", WINDOW),
            ("self", WINDOW),
            ("eagle", WINDOW),
        ],
    )
    def test_kinds_of_drafts(self, kind, config, tmp_path):
        """Text is as without a context, and proposals are as from one that stayed in memory."""
        specs = [
            SpecExtend(target(), draft(kind, config, tmp_path / "head"), config) for _ in range(2)
        ]
        ids, late = prompt(90), kind.startswith("eagle")
        stayed = specs[0].read(ids)
        found = again(stayed, specs[1], tmp_path)
        assert torch.equal(found.ids, ids)
        longer, counts = behind(ids, 10, 1), []
        for spec, context in zip(specs, (stayed, found), strict=True):
            out = spec.generate(longer, past_key_values=context, **HOW)
            assert out[0].tolist() == text(target(), longer)
            assert spec.stats.num_cached_tokens == 90 - late
            counts.append((spec.stats.acceptance_histogram, spec.stats.retrieved_chunks))
        assert counts[0] == counts[1]
        # Behind what was written, and in the middle of what was read.
        for on, cached in ((behind(out, 5, 2), 111), (behind(ids[:, :40], 9, 3), 40)):
            found = again(found, specs[0], tmp_path)
            want = text(target(), on)
            assert specs[0].generate(on, past_key_values=found, **HOW)[0].tolist() == want
            assert specs[0].stats.num_cached_tokens == cached - late

    def test_what_a_generation_returns(self, tmp_path):
        ids, spec = prompt(60), SpecExtend(target(), "ngram", SMALL)
        out = spec.generate(ids, return_dict_in_generate=True, **HOW)
        found = again(getattr(out, CACHE), spec, tmp_path)
        assert torch.equal(found.ids, out.sequences[:, :-1])

    @pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
    def test_layers_that_keep_a_state(self, family, tmp_path):
        """Of target and draft, with the places that can be gone back to."""
        config, ids = SMALL.replace(draft_cache="full"), prompt(40)
        model = miniature(family)
        spec = SpecExtend(model, miniature(family, 1), config)
        stayed = spec.read(ids)
        found = again(stayed, spec, tmp_path)
        for place in (40, 26):  # which is behind two parts of the prompt
            longer, counts = behind(ids[:, :place], 7, place), []
            want = text(model, longer)
            for context in (stayed, found):
                out = spec.generate(longer, past_key_values=context.fork(), **HOW)
                assert out[0].tolist() == want and spec.stats.num_cached_tokens == place
                counts.append(spec.stats.acceptance_histogram)
            assert counts[0] == counts[1]

    def test_another_dtype(self, tmp_path):
        spec, ids = SpecExtend(tiny_model(dtype=torch.bfloat16), "ngram", SMALL), prompt(30)
        context = spec.read(ids)
        found = again(context, spec, tmp_path)
        for ours, theirs in zip(context.cache.layers, found.cache.layers, strict=True):
            assert torch.equal(ours.keys[:, :, :30], theirs.keys[:, :, :30])
            assert torch.equal(ours.values[:, :, :30], theirs.values[:, :, :30])

    def test_exact_text(self, tmp_path):
        config, ids = SMALL.replace(exact=True), prompt(60)
        spec = SpecExtend(target(), "ngram", config)
        found = again(spec.read(ids), SpecExtend(target(), "ngram", config), tmp_path)
        assert spec.generate(ids, past_key_values=found, **HOW)[0].tolist() == text(target(), ids)
        assert spec.stats.num_cached_tokens == 52  # four parts of 13

    def test_exact_text_behind_one_that_was_not_read_exactly(self):
        ids, exact = prompt(60), SMALL.replace(exact=True)
        spec = SpecExtend(target(), "ngram", exact)
        for other, cached in ((SMALL, 0), (exact.replace(prefill_chunk=7), 0), (exact, 52)):
            context = SpecExtend(target(), "ngram", other).read(ids)
            out = spec.generate(ids, past_key_values=context, **HOW)
            assert out[0].tolist() == text(target(), ids)
            assert spec.stats.num_cached_tokens == cached

    def test_in_another_process(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "target")
        tiny_model(seed=1).save_pretrained(tmp_path / "draft")
        script = (
            "import sys, torch\n"
            "sys.path[:0] = sys.argv[2:]\n"
            "from transformers import AutoModelForCausalLM\n"
            "from drafts import SMALL\n"
            "from models import prompt\n"
            "from specextend import SpecExtend\n"
            "names = (f'{sys.argv[1]}/{name}' for name in ('target', 'draft'))\n"
            "pair = map(AutoModelForCausalLM.from_pretrained, names)\n"
            "SpecExtend(*pair, SMALL).read(prompt(90)).save(f'{sys.argv[1]}/context')\n"
        )
        places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        subprocess.run([sys.executable, "-c", script, str(tmp_path), *places], check=True)
        spec = SpecExtend(tiny_model(), str(tmp_path / "draft"), SMALL)
        found, longer = spec.load_context(tmp_path / "context"), behind(prompt(90), 10, 1)
        want = text(target(), longer)
        assert spec.generate(longer, past_key_values=found, **HOW)[0].tolist() == want
        assert spec.stats.num_cached_tokens == 90

    def test_a_draft_that_says_nothing_of_files(self, tmp_path):
        """Drafts of other makers are saved without what they keep."""

        class Idle(Draft):
            kind = "idle"
            on_host = True

            def begin(self, prompt, max_length, cache, graphs):
                pass

            def propose(self, decided, depth, price=0):
                return Tree.of(decided.tokens[:, -1:], [])

        spec, ids = SpecExtend(target(), Idle(), SMALL), prompt(30)
        found = again(spec.read(ids), SpecExtend(target(), Idle(), SMALL), tmp_path)
        assert spec.generate(ids, past_key_values=found, **HOW)[0].tolist() == text(target(), ids)
        assert spec.stats.num_cached_tokens == 29


class TestMapping:
    """Rows stay in the file, and what is written to them does not get there."""

    def test_the_file_stays_as_it_is(self, tmp_path):
        spec, ids, file = SpecExtend(target(), "ngram", SMALL), prompt(60), tmp_path / "context"
        spec.read(ids).save(file)
        content = file.read_bytes()
        found = spec.load_context(file)
        for on in (behind(ids, 5, 1), behind(ids[:, :20], 9, 2), behind(ids[:, :7], 70, 3)):
            assert spec.generate(on, past_key_values=found, **HOW)[0].tolist() == text(target(), on)
        assert file.read_bytes() == content

    def test_a_file_that_is_replaced_or_removed(self, tmp_path):
        spec, ids, file = SpecExtend(target(), "ngram", SMALL), prompt(60), tmp_path / "context"
        spec.read(ids).save(file)
        found = spec.load_context(file)
        spec.read(prompt(60, 9)).save(file)
        file.unlink()
        on = behind(ids, 5, 1)
        assert spec.generate(on, past_key_values=found, **HOW)[0].tolist() == text(target(), on)
        assert spec.stats.num_cached_tokens == 60

    @pytest.mark.parametrize("kind", ["model", "ngram"])
    def test_forks(self, kind, tmp_path):
        """Each goes on by itself from what the file has, and from what was written behind that."""
        spec = SpecExtend(target(), draft(kind, SMALL, tmp_path / "head"), SMALL)
        ids = prompt(60)
        found = again(spec.read(ids), spec, tmp_path)
        early = [found.fork() for _ in range(2)]
        out = spec.generate(ids, past_key_values=found, **HOW)
        late = [found.fork().fork() for _ in range(2)]
        for seed, fork in enumerate((*early, *late)):
            on = behind(out if fork in late else ids, 4, seed)
            assert spec.generate(on, past_key_values=fork, **HOW)[0].tolist() == text(target(), on)
            assert spec.stats.num_cached_tokens == (71 if fork in late else 60)

    def test_pages_that_are_larger_here(self, tmp_path, monkeypatch):
        """Rows are read then."""
        spec, ids = SpecExtend(target(), "ngram", SMALL), prompt(60)
        monkeypatch.setattr(mmap, "PAGESIZE", 1 << 16)
        found, on = again(spec.read(ids), spec, tmp_path), behind(ids, 5, 1)
        assert found.cache.capacity == 60
        assert spec.generate(on, past_key_values=found, **HOW)[0].tolist() == text(target(), on)
        assert spec.stats.num_cached_tokens == 60

    def test_what_is_not_read_takes_no_memory(self, tmp_path):
        spec, file = SpecExtend(target(), None, SMALL), tmp_path / "context"
        context = spec.read(prompt(30))
        context.cache.reserve(100_000)
        with torch.inference_mode():
            context.cache.advance(99_000)  # of zeros
        context._text = torch.zeros(99_031, dtype=torch.int64)
        context.save(file)
        size, before = file.stat().st_size, memory_used()
        found = spec.load_context(file)
        forks = [found.fork() for _ in range(3)]
        assert forks[-1].get_seq_length() == 99_030 and size > 20e6
        assert memory_used() - before < 0.1 * size


# ---- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """What is in a file of a text of 30 tokens."""
    file = tmp_path_factory.mktemp("contexts") / "context"
    SpecExtend(tiny_model(), tiny_model(seed=1), SMALL).read(prompt(30)).save(file)
    return file.read_bytes()


class TestOthers:
    """A file of other models, or of another layout, is refused with what differs."""

    @pytest.fixture
    def saved(self, content, tmp_path) -> Path:
        (tmp_path / "context").write_bytes(content)
        return tmp_path / "context"

    @pytest.mark.parametrize(
        "change, words",
        [
            (dict(seed=2), "another target: weights is"),
            (dict(dtype=torch.bfloat16), "another target: dtype is 'float32' there and 'bfloat16'"),
            (
                dict(rms_norm_eps=1e-3),
                "another target: config.rms_norm_eps is 1e-06 there and 0.00",
            ),
            (
                dict(num_hidden_layers=3),
                "another target: config.num_hidden_layers is 2 there and 3",
            ),
            (dict(family="qwen2"), "another target: class is 'LlamaForCausalLM' there and 'Qwen2"),
        ],
    )
    def test_target(self, saved, change, words):
        model = tiny_model(**change)
        spec = SpecExtend(model, tiny_model(seed=1, dtype=model.dtype), SMALL)
        with pytest.raises(ValueError, match=f"{saved} is of {words}"):
            spec.load_context(saved)

    @pytest.mark.parametrize(
        "other, words",
        [
            (lambda: "ngram", "kind is 'model' there and 'ngram' here"),
            (lambda: tiny_model(seed=2), "weights is"),
            (lambda: [tiny_model(seed=1), "ngram"], "kind is 'model' there and 'model.ngram' here"),
        ],
    )
    def test_draft(self, saved, other, words):
        spec = SpecExtend(tiny_model(), other(), SMALL)
        with pytest.raises(ValueError, match=f"{saved} is of another draft: {words}"):
            spec.load_context(saved)

    @pytest.mark.parametrize(
        "change, words",
        [
            (dict(draft_cache="window"), "options.draft_cache is 'retrieval' there and 'window'"),
            (dict(chunk_size=16), "options.chunk_size is 8 there and 16 here"),
            (dict(exact=True), "was read in another way: exact is False there and True here"),
        ],
    )
    def test_options(self, saved, change, words):
        spec = SpecExtend(tiny_model(), tiny_model(seed=1), SMALL.replace(**change))
        with pytest.raises(ValueError, match=words):
            spec.load_context(saved)

    def test_options_that_do_not_matter(self, saved):
        config = SMALL.replace(prefill_chunk=7, tree_nodes=5, seed=1, retrieve_every=3)
        spec = SpecExtend(tiny_model(), tiny_model(seed=1), config)
        assert spec.load_context(saved).get_seq_length() == 30

    def test_layout(self, tmp_path, monkeypatch):
        spec, file = SpecExtend(tiny_model(), "ngram", SMALL), tmp_path / "context"
        context = spec.read(prompt(30))
        with monkeypatch.context() as changed:
            changed.setattr(context_file, "LAYOUT", 1)
            context.save(file)
        with pytest.raises(ValueError, match=f"{file} is a context of layout 1, and layout 2 is"):
            spec.load_context(file)

    def test_files_that_are_none(self, saved, tmp_path):
        spec = SpecExtend(tiny_model(), tiny_model(seed=1), SMALL)
        whole = saved.read_bytes()
        for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
            saved.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"{saved} is no context .* not the whole of one"):
                spec.load_context(saved)
        saved.write_text("some text that is longer than a header")
        with pytest.raises(ValueError, match=f"{saved} is no context"):
            spec.load_context(saved)
        save_file({"weight": torch.zeros(3)}, saved)
        with pytest.raises(ValueError, match=f"{saved} holds tensors, but is no context"):
            spec.load_context(saved)
        with pytest.raises(FileNotFoundError, match="nothing"):
            spec.load_context(tmp_path / "nothing")
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            spec.load_context(tmp_path)

    def test_a_file_that_is_replaced_meanwhile(self, saved):
        spec = SpecExtend(tiny_model(), "ngram", SMALL)
        _, read_parts = context_file.read(saved, torch.device("cpu"))
        spec.read(prompt(20)).save(saved)
        with pytest.raises(ValueError, match="replaced while it was read"):
            read_parts()


# ---- writing -------------------------------------------------------------------------------------


class TestSave:
    @pytest.fixture
    def spec(self) -> SpecExtend:
        return SpecExtend(tiny_model(), "ngram", SMALL)

    @pytest.mark.parametrize("fails", ["fsync", "replace"])
    def test_the_old_file_stays_whole(self, spec, tmp_path, monkeypatch, fails):
        def full(*args):
            raise OSError(errno.ENOSPC, "no space left")

        file, context = tmp_path / "context", spec.read(prompt(30))
        for before in (None, context):
            if before is not None:
                before.save(file)
            with monkeypatch.context() as changed, pytest.raises(OSError, match="no space left"):
                changed.setattr(os, fails, full)
                spec.read(prompt(40)).save(file)
            assert list(tmp_path.iterdir()) == [file] * (before is not None)
        assert spec.load_context(file).get_seq_length() == 30
        spec.read(prompt(40)).save(file)
        assert spec.load_context(file).get_seq_length() == 40
        assert list(tmp_path.iterdir()) == [file]

    def test_in_the_place_of_a_link(self, spec, tmp_path):
        file, link = tmp_path / "context", tmp_path / "link"
        link.symlink_to(file)
        spec.read(prompt(30)).save(link)
        assert link.is_symlink() and spec.load_context(file).get_seq_length() == 30

    def test_committed_rows_alone(self, spec, tmp_path):
        """Whatever room there is, and what was proposed, is not written."""
        context = spec.read(prompt(30))
        context.cache.reserve(500)
        context.save(tmp_path / "context")
        tensors = load_file(tmp_path / "context")
        shapes = sorted(list(t.shape) for t in tensors.values())
        assert shapes == [*[[1, 2, 128, 8]] * 4, [31]]  # 4 KiB for each head
        rows = [t for t in tensors.values() if t.dim() == 4]
        assert all(t[:, :, :30].all() and not t[:, :, 30:].any() for t in rows)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert (tmp_path / "context").stat().st_size <= size + 2 * 4096

    def test_during_a_generation(self, spec, tmp_path):
        context = spec.read(prompt(30))
        steps = spec.stream(prompt(30), past_key_values=context, **HOW)
        next(steps)
        with pytest.raises(RuntimeError, match="in the middle of a generation"):
            context.save(tmp_path / "context")
        steps.close()
        context.save(tmp_path / "context")
        assert spec.load_context(tmp_path / "context").get_seq_length() == context.get_seq_length()

    def test_nothing(self, spec, tmp_path):
        context = spec.read(prompt(30))
        context.clear()
        for empty in (context, Context()):
            with pytest.raises(ValueError, match="no text yet"):
                empty.save(tmp_path / "context")

    def test_weights_that_have_changed(self, spec, tmp_path):
        context = spec.read(prompt(30))
        with torch.no_grad():
            spec.model.lm_head.weight.mul_(2)
        with pytest.raises(ValueError, match="weights have changed"):
            context.save(tmp_path / "context")
        assert list(tmp_path.iterdir()) == []

    def test_of_the_last_one_that_used_it(self, spec, tmp_path):
        other = SpecExtend(spec.model, None, SMALL)
        context = other.read(prompt(40), past_key_values=spec.read(prompt(30)))
        context.fork().save(tmp_path / "context")
        assert other.load_context(tmp_path / "context").get_seq_length() == 40
        with pytest.raises(ValueError, match="kind is 'none' there and 'ngram' here"):
            spec.load_context(tmp_path / "context")


class TestIdentity:
    def test_the_same_for_the_same_model(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        loaded.config.eos_token_id, loaded.config.use_cache = 5, False
        assert identity(model) == identity(loaded)
        compiled = nn.Module()
        compiled._orig_mod = model  # as torch.compile of a part does
        assert weights_identity(compiled) == weights_identity(model)

    def test_one_element(self):
        model = nn.Linear(16, 16)
        before = weights_identity(model)
        assert before == weights_identity(model)
        model.weight.data[3, 5] += 1
        assert weights_identity(model) != before

    def test_large_tensors_are_looked_at_everywhere(self):
        model = nn.Linear(4096, 64, bias=False)
        seen = [weights_identity(model)]
        for rows, columns in (
            (7, slice(None)),
            (slice(None), slice(9, 49)),
            (63, slice(3500, None)),
        ):
            model.weight.data[rows, columns] += 1
            seen.append(weights_identity(model))
        assert len({one["weights"] for one in seen}) == 4

    def test_how_adapters_count(self):
        model = nn.Linear(4, 4)
        seen = [weights_identity(model)]
        for scale in (1.0, 2.0):
            model.scaling = {"default": scale}
            seen.append(weights_identity(model))
        assert len({json.dumps(one) for one in seen}) == 3

    def test_weights_of_other_kinds(self):
        """Tensors that are made of others, sparse ones, and ones that have no bytes here."""
        ones, twos = torch.ones(4, 4), torch.full((4, 4), 2.0)
        kinds = [
            TwoTensor(ones, ones), TwoTensor(ones, twos), ones.to_sparse(),
            torch.empty(4, 4, device="meta"), torch.empty(0, 4), ones.t(), torch.tensor(1.0),
        ]  # fmt: skip
        seen = set()
        for tensor in kinds:
            module = nn.Module()
            module.register_buffer("weight", tensor)
            seen.add(weights_identity(module)["weights"])
        assert len(seen) == len(kinds) - 1  # "meta" and sparse have nothing but their shape


# ---- the command ---------------------------------------------------------------------------------


TEXT = "def area(width, height):\n    return width * height\n\n\ndef volume("


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path, capsys):
        """Runs the command on a tiny pair; returns exit status, standard output, standard error."""
        for name, seed in (("target", 0), ("draft", 1)):
            tiny_model(vocab_size=257, seed=seed).save_pretrained(tmp_path / name)
            byte_tokenizer().save_pretrained(tmp_path / name)
        capsys.readouterr()

        def call(words, *arguments, draft="draft"):
            models = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / draft)]
            options = [*models, *OPTIONS, "--json", "--max-new-tokens", "8", *map(str, arguments)]
            code = cli.main(["generate", "--prompt", words, *options])
            return code, *capsys.readouterr()

        return call

    def test_goes_on(self, run, tmp_path):
        file = tmp_path / "context"
        for words, cached, arguments in (
            (TEXT, 0, []),
            (TEXT, len(TEXT) - 1, []),
            (TEXT + "length", len(TEXT), ["--compare"]),
            (TEXT[:40] + "-", 40, []),
        ):
            code, out, err = run(words, "--context", file, *arguments)
            result = json.loads(out)
            assert (code, err) == (0, "")
            assert result["stats"]["num_cached_tokens"] == cached
            plain = result.get("plain") or json.loads(run(words)[1])
            assert plain["tokens"] == result["tokens"]
            assert plain["stats"]["num_cached_tokens"] == 0
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_interrupted(self, run, tmp_path, monkeypatch):
        def interrupt(self, tokens, num_accepted=0):
            raise KeyboardInterrupt

        with monkeypatch.context() as changed:
            changed.setattr(terminal.LiveText, "add", interrupt)
            assert run(TEXT, "--context", tmp_path / "context")[0] == 130
        out = run(TEXT, "--context", tmp_path / "context")[1]
        assert json.loads(out)["stats"]["num_cached_tokens"] == len(TEXT) - 1

    def test_errors(self, run, tmp_path):
        file = tmp_path / "context"
        with pytest.raises(SystemExit):
            run(TEXT, "--context", tmp_path / "nowhere" / "context")
        assert run(TEXT, "--context", file)[0] == 0
        before = file.read_bytes()
        code, out, err = run(TEXT, "--context", file, draft="target")
        assert (code, out) == (1, "") and err.count("\n") == 1
        assert err.startswith(f"specextend: error: the context in {file} is of another draft: ")
        code, out, err = run("a" * 600, "--context", file)  # more than the target holds
        assert code == 1 and "512 positions" in err
        assert file.read_bytes() == before
        file.write_text("something else")
        code, out, err = run(TEXT, "--context", file)
        assert code == 1 and "is no context" in err and file.read_text() == "something else"
