"""Has a minute's look at everything, for versions of torch and `transformers` that are not pinned.

`tools/smoke.py` runs it against the package as a user installs it; `make test` leaves it out.

Deprecation warnings are errors there, as in all tests: conftest.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small_cases
import torch
from eagle_heads import LAYERS, make
from markdown_it import MarkdownIt
from models import prompt, tiny_model
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from specextend import SpecConfig, SpecExtend, assets, ops

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox",
    "gpt_oss",
)  # fmt: skip
CONFIG = SpecConfig(
    chunk_size=8, budget=32, sink_chunks=1, recent_chunks=1, retrieve_every=2, prefill_chunk=40,
    draft_prefill_window=16, gate="off", tree_nodes=9, tree_depth=4, tree_threshold=0.0, seed=7,
)  # fmt: skip
GREEDY = dict(max_new_tokens=24, do_sample=False)


def run(*command) -> str:
    """Return what a command prints; it must succeed without a word of deprecation."""
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "deprecat" not in (ran.stdout + ran.stderr).lower(), ran.stderr
    return ran.stdout


def test_the_example_of_the_readme():
    tokens = MarkdownIt().parse((ROOT / "README.md").read_text(encoding="utf-8"))
    code = [t.content for t in tokens if t.type == "fence" and t.info == "python"]
    printed = run(sys.executable, "-W", "always", "-c", "\n".join(code))
    assert float(printed.split()[-1]) > 1.5  # its mean acceptance length


def test_the_command_line(tmp_path):
    document = tmp_path / "report.txt"
    document.write_text(assets.demo_document()[1][:4000], encoding="utf-8")
    specextend = Path(sys.executable).with_name("specextend")
    options = ("--prompt-file", document, "--max-new-tokens", 32, "--dtype", "float32")
    result = json.loads(run(specextend, "generate", *options, "--compare", "--json"))
    assert result["plain"]["identical"] and result["stats"]["mean_acceptance_length"] > 1
    assert json.loads(run(specextend, "info", "--json"))["torch"] == torch.__version__


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model, ids = tiny_model(family), prompt(90)
    draft = tiny_model("llama", seed=1, hidden_size=16, head_dim=8)
    expected = model.generate(ids, **GREEDY)
    for kind in (None, draft):
        assert torch.equal(SpecExtend(model, kind, CONFIG).generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("kind", ["folder", "eagle1", "eagle3", "ngram", "self"])
def test_drafts(kind, tmp_path):
    model, ids = tiny_model("llama", num_hidden_layers=LAYERS), prompt(90)
    draft = kind
    if kind == "folder":
        tiny_model("llama", seed=1).save_pretrained(tmp_path)
        draft = tmp_path
    elif kind.startswith("eagle"):
        draft = make(kind).write(tmp_path / kind)
    spec = SpecExtend(model, draft, CONFIG)
    assert torch.equal(spec.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert spec.stats.num_draft_tokens > 0


@pytest.mark.parametrize("kind", sorted(assets.DRAFTS))
def test_embedded_drafts(kind):
    model = AutoModelForCausalLM.from_pretrained(assets.target_path(), dtype=torch.float32)
    ids = torch.randint(3, model.config.vocab_size, (1, 300), generator=torch.manual_seed(0))
    spec = SpecExtend(model, assets.draft_path(kind), CONFIG)
    assert torch.equal(spec.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_inside_their_generate():
    """It runs by ``custom_generate``, with a streamer and all that their output can hold."""
    model, ids = tiny_model("llama"), prompt(50)
    options = dict(
        **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True,
        repetition_penalty=1.3,
    )  # fmt: skip
    expected = model.generate(ids, **options)
    streamer = Collector()
    spec = SpecExtend(model, tiny_model("llama", seed=1), CONFIG)
    output = model.generate(ids, custom_generate=spec, streamer=streamer, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert streamer.tokens == expected.sequences[0].tolist() and streamer.ended
    for name in ("scores", "logits"):
        torch.testing.assert_close(
            torch.stack(getattr(output, name)), torch.stack(getattr(expected, name)),
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip


def test_sampled():
    model, ids = tiny_model("llama"), prompt(60)
    options = dict(max_new_tokens=24, do_sample=True, temperature=0.8, top_k=20, top_p=0.95)
    plain, tree = (
        SpecExtend(model, draft, CONFIG).generate(ids, **options)
        for draft in (None, tiny_model("llama", seed=1))
    )
    assert torch.equal(plain, tree)


def test_ops():
    """Every op agrees with its reference."""
    cases = list(small_cases.cases(few=True))
    assert {case.op.__name__ for case in cases} == set(ops.__all__)
    assert [case.name for case in cases if not small_cases.agrees(case, "cpu")] == []
