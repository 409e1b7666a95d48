"""Tests the embedded pair of models in the loop."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specextend import SpecConfig, SpecExtend, assets

CONFIG = SpecConfig(budget=512, recent_chunks=4, gate="off", seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.target_path())


@pytest.fixture(scope="module")
def pair():
    return [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (assets.target_path(), assets.draft_path())
    ]


def test_same_text_as_generate(pair, tokenizer):
    target, draft = pair
    _, ids = assets.demo_prompt(tokenizer, 3000)
    ids = torch.tensor([ids])
    kwargs = dict(max_new_tokens=60, do_sample=False)
    expected = target.generate(ids, **kwargs)
    for draft_cache in ("full", "window", "retrieval"):
        spec = SpecExtend(
            target, draft, CONFIG, draft_cache=draft_cache, tokenizer=tokenizer,
            draft_tokenizer=AutoTokenizer.from_pretrained(assets.draft_path()),
        )  # fmt: skip
        assert torch.equal(spec.generate(ids, **kwargs), expected)
        assert spec.stats.mean_acceptance_length > 1


def planted(tokenizer, module: str, first: int) -> tuple[torch.Tensor, int]:
    """Make a document of 7,000 tokens whose last lines begin a passage that stands near its start.

    Returns:
        The document [1, L], and the chunk of 32 tokens where the passage goes on.
    """
    documents = dict(assets.held_out_documents())
    text = documents[module]
    start = text.index("\n    def ", first)
    passage = tokenizer(text[start : start + 1800]).input_ids
    filler = tokenizer(documents["inspect.py"][:14_000]).input_ids
    ids = filler[:1000] + passage + filler[1000:] + passage[:64]
    return torch.tensor([ids]), (1000 + 64) // 32


def test_retrieval_finds_a_planted_passage(pair, tokenizer):
    """The chunk that the text goes on with is selected, and the draft gains by it (O20)."""
    found, accepted = 0, {"window": 0.0, "retrieval": 0.0}
    places = {"argparse.py": 20_000, "tarfile.py": 30_000, "statistics.py": 9_000}
    for module, first in places.items():
        ids, chunk = planted(tokenizer, module, first)
        for draft_cache in accepted:
            spec = SpecExtend(*pair, CONFIG, draft_cache=draft_cache)
            spec.generate(ids, max_new_tokens=48, do_sample=False)
            accepted[draft_cache] += spec.stats.mean_acceptance_length / len(places)
        found += chunk in spec.stats.retrieved_chunks[0]
    assert found == len(places)
    assert accepted["retrieval"] > accepted["window"]


def test_document_is_long_enough(tokenizer):
    name, text = assets.demo_document()
    assert name and len(tokenizer(text).input_ids) >= 16_000
    name, ids = assets.demo_prompt(tokenizer, 16_000)
    assert len(ids) == 16_000


def test_size():
    """16 MiB or less in all."""
    files = [f for p in (assets.target_path(), assets.draft_path()) for f in p.iterdir()]
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20
