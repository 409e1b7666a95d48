"""Tests the n-gram draft: what it finds, its trees, losslessness, no host reads of its own."""

from __future__ import annotations

import pytest
import torch
from backends import for_each
from host_reads import reads_per_round
from models import FAMILIES, prompt, tiny_model

from specextend import SpecConfig, SpecExtend
from specextend.draft import Decided, NGramDraft
from specextend.graphs import Graphs
from specextend.pace import FREE, Price

CONFIG = SpecConfig(
    prefill_chunk=40, gate="off", tree_nodes=9, tree_depth=4, seed=7, tree_width=3, ngram_size=3
)


def tree_of(ids: list[int], depth: int = 4, config: SpecConfig = CONFIG, written=None, price=FREE):
    """Return the tree below the last of ``ids``, half of them, or so many, from the output."""
    draft = NGramDraft(config)
    prompt = len(ids) - (len(ids) // 2 if written is None else written)
    draft.begin(torch.tensor([ids[:prompt]]), len(ids) + 10, None, Graphs())
    draft.observe([ids[prompt:]])
    return draft.propose(Decided(torch.tensor([ids[-1:]])), depth, price)


def chains(tree) -> list[list[int]]:
    """Tokens from below the root to each leaf."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    found = []
    for leaf in sorted(set(range(1, len(tokens))) - set(parents)):
        path, node = [], leaf
        while node > 0:
            path.append(tokens[node])
            node = parents[node]
        found.append(path[::-1])
    return found


def brute_force(ids: list[int], depth: int, size: int) -> list[list[int]]:
    """Continuations by (length of match, recency), by plain search."""
    found = []
    for end in range(len(ids) - 1):
        length = 0
        while length < min(size, end + 1) and ids[end - length] == ids[len(ids) - 1 - length]:
            length += 1
        if length:
            text = list(ids)
            for i in range(depth):
                text.append(text[end + 1 + i])
            found.append((length, end, text[len(ids) :]))
    return [chain for _, _, chain in sorted(found, key=lambda f: (-f[0], -f[1]))]


class TestTree:
    def test_what_does_not_pay_is_not_proposed(self):
        """Of the whole tree the likeliest nodes are left, and promised; none of them at last."""
        ids = [1, 2, 3, 40, 41, 9, 2, 3, 50, 51, 3, 60, 61, 8, 1, 2, 3]
        whole = tree_of(ids)
        sizes = []
        for node in (0.0, 0.05, 0.1, 0.2, 0.4, 0.99):
            tree = tree_of(ids, price=Price(9.0, node))
            count = tree.num_nodes
            assert torch.equal(tree.tokens, whole.tokens[:, :count])
            assert torch.equal(tree.parents, whole.parents[:, :count])
            if count > 1:
                expected, gain = tree.promise[0].tolist()
                assert gain == 0 and node * (count - 1) < expected <= tree.depth
            sizes.append(count)
        assert sizes[0] == whole.num_nodes and sizes[-1] == 1
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 3

    def test_longest_match_first_then_most_recent(self):
        ids = [1, 2, 3, 40, 41, 9, 2, 3, 50, 51, 3, 60, 61, 8, 1, 2, 3]
        chain = CONFIG.replace(tree_width=1)
        assert chains(tree_of(ids, 2, chain)) == [[40, 41]]
        assert chains(tree_of(ids, 2, chain.replace(ngram_size=2))) == [[50, 51]]
        assert chains(tree_of(ids, 2, chain.replace(ngram_size=1))) == [[60, 61]]
        assert chains(tree_of(ids, 2)) == [[40, 41], [50, 51], [60, 61]]

    def test_chains_share_their_beginning(self):
        tree = tree_of([3, 5, 6, 1, 3, 5, 7, 2, 3], 3)
        assert chains(tree) == [[5, 7, 2], [5, 6, 1]]
        assert tree.num_nodes == 6 and tree.depth == 3
        assert tree.tokens[0].tolist() == [3, 5, 7, 2, 6, 1]  # the likelier first
        assert tree.depths[0].tolist() == [0, 1, 2, 3, 2, 3]
        assert [int(m) for m in tree.mask[0, :, 0]] == [1, 3, 7, 15, 19, 51]

    def test_an_occurrence_that_runs_into_the_present_repeats(self):
        assert chains(tree_of([4, 7, 8, 7, 8], 4, CONFIG.replace(tree_width=1))) == [[7, 8, 7, 8]]

    def test_no_match_no_tree(self):
        for ids in ([5], [5, 6], [1, 2, 3, 4]):
            tree = tree_of(ids)
            assert tree.num_nodes == 1 and tree.depth == 0

    @for_each(seed=range(20))
    def test_against_plain_search(self, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 5, (60,), generator=generator).tolist()
        config = CONFIG.replace(tree_nodes=70, tree_width=70, ngram_size=1 + seed % 5)
        expected = brute_force(ids, 3, config.ngram_size)[:32]
        tree = tree_of(ids, 3, config)
        assert sorted(map(tuple, chains(tree))) == sorted(set(map(tuple, expected)))
        best = tree_of(ids, 3, config.replace(tree_width=1), written=0)
        assert chains(best) == expected[:1]

    def test_limits(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 4, (200,), generator=generator).tolist()
        tree = tree_of(ids, 4, CONFIG.replace(tree_nodes=7, tree_width=2))
        assert tree.num_nodes == 8
        assert all(int((tree.depths == d).sum()) <= 2 for d in range(1, 5))
        fixed = CONFIG.replace(tree_shape="fixed", tree_widths=(3, 2, 1))
        tree = tree_of(ids, 3, fixed)
        assert [int((tree.depths == d).sum()) for d in (1, 2, 3)] == [3, 2, 1]

    def test_more_than_one_word_of_mask(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 9, (400,), generator=generator).tolist()
        tree = tree_of(ids, 4, CONFIG.replace(tree_nodes=100, tree_width=40))
        assert tree.num_nodes > 65 and tree.mask.shape[-1] == 2
        bits = (tree.mask[0, :, :, None] >> torch.arange(64)) & 1
        for node, row in enumerate(bits.flatten(1).tolist()):
            seen, at = set(), node
            while at >= 0:
                seen.add(at)
                at = int(tree.parents[0, at])
            assert {j for j, bit in enumerate(row) if bit} == seen


def repeating(length: int) -> torch.Tensor:
    """Make a prompt with much to find in it."""
    return prompt(13).repeat(1, -(-length // 13))[:, :length]


class TestLossless:
    @pytest.mark.sweep(3)
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss", "gpt2"])
    def test_greedy(self, family):
        assert family in FAMILIES
        model = tiny_model(family)
        for ids in (repeating(90), prompt(1)):
            expected = model.generate(ids, max_new_tokens=60, do_sample=False)
            for change in (dict(), dict(tree_width=1)):
                spec = SpecExtend(model, "ngram", CONFIG, **change)
                assert torch.equal(spec.generate(ids, max_new_tokens=60, do_sample=False), expected)

    def test_sampled(self):
        model, ids = tiny_model("llama"), repeating(90)
        options = dict(max_new_tokens=80, do_sample=True, temperature=0.4, repetition_penalty=1.1)
        plain = SpecExtend(model, None, CONFIG).generate(ids, **options)
        spec = SpecExtend(model, "ngram", CONFIG)
        assert torch.equal(spec.generate(ids, **options), plain)
        assert spec.stats.num_draft_tokens > 0


def cycling_model(period: int = 7):
    """Make a model whose greedy output is the cycle 10, 11, ..., whatever its attention does."""
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.zero_()
        embedding = torch.eye(97, 32)[torch.arange(97) % 32]
        model.model.embed_tokens.weight.copy_(embedding)
        head = torch.zeros(97, 32)
        for t in range(period):
            head[10 + (t + 1) % period] += embedding[10 + t]
        model.lm_head.weight.copy_(head)
    return model


def test_a_cycle_is_accepted_to_full_depth():
    spec = SpecExtend(cycling_model(), "ngram", CONFIG, tree_width=1)
    ids = torch.arange(9)[None] % 7 + 10
    out = spec.generate(ids, max_new_tokens=41, do_sample=False)
    assert out[0].tolist() == [10 + i % 7 for i in range(50)]
    assert spec.stats.acceptance_histogram == {9: 4}  # one chain of all nodes


def test_generations_do_not_know_each_other():
    model = tiny_model("llama")
    spec = SpecExtend(model, "ngram", CONFIG)

    def steps(spec, ids):
        return [
            (s.tokens, s.num_accepted) for s in spec.stream(ids, max_new_tokens=40, do_sample=False)
        ]

    first = steps(spec, repeating(200))
    short = steps(spec, prompt(20))
    assert steps(spec, repeating(200)) == first
    assert steps(SpecExtend(model, "ngram", CONFIG), prompt(20)) == short


def test_no_host_read_of_its_own(monkeypatch):
    spec = SpecExtend(cycling_model(), "ngram", CONFIG)
    stream = spec.stream(repeating(60), max_new_tokens=60, do_sample=False)
    rounds = reads_per_round(stream, monkeypatch)
    assert max(map(len, rounds)) <= 1, rounds
    assert spec.stats.num_draft_tokens > 20
