"""Drafts whose vocabulary is the target's but for added tokens: served, and the same text."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, prompt, tiny_model
from tape import Tapes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from specextend import SpecConfig, SpecExtend
from specextend.tokenizers import differing_ids

CONFIG = SpecConfig(
    chunk_size=8, budget=32, recent_chunks=1, gate="off", seed=7, tree_shape="top_k", tree_depth=3,
    prefill_chunk=20,
)  # fmt: skip
WAYS = [dict(do_sample=False), dict(do_sample=True, temperature=1.5)]
EOS = 2


def tokenizer(*added: str, words: int = VOCAB, name: str = "w") -> PreTrainedTokenizerFast:
    """Make one of ``words`` words and, behind them, the tokens ``added``."""
    table = {f"{name}{i}": i for i in range(words)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(table)))
    made.add_tokens(list(added))
    return made


def model_of(vocab: int, seed: int = 0, **changes):
    return tiny_model("llama", seed=seed, vocab_size=vocab, eos_token_id=EOS, **changes)


def text_with(token: int, length: int = 40) -> torch.Tensor:
    """Draw a prompt that has ``token`` at its start, at its end, twice in a row, and elsewhere."""
    ids = prompt(length)
    ids[0, [0, 5, 6, 19, 20, 30, length - 1]] = token
    return ids


# What the target and the draft have behind their common words, and the entries of their heads.
PAIRS = {
    "target has one more": (["<a>"], [], 98, 97),
    "draft has one more": ([], ["<a>"], 97, 98),
    "several, heads padded": (["<a>", "<b>", "<c>"], ["<a>"], 104, 112),
    "draft has one more, target's head padded": ([], ["<a>"], 104, 98),
    "another one": (["<a>"], ["<b>"], 98, 98),
    "another one, and the same behind it": (["<a>", "<e>"], ["<b>", "<e>"], 99, 99),
    "draft's head is smaller than its tokenizer": (["<a>"], ["<a>"], 98, 97),
}


class Spied:
    """Watches what a draft is fed and what it proposes."""

    def __init__(self, spec: SpecExtend):
        self.fed, self.proposed = set(), set()
        embedding = spec.draft.causal_lm.get_input_embeddings()
        embedding.register_forward_pre_hook(
            lambda module, args: self.fed.update(args[0].flatten().tolist())
        )
        propose = spec.draft.propose

        def proposing(decided, depth, price):
            tree = propose(decided, depth, price)
            self.proposed.update(tree.tokens[0, 1:].tolist())
            return tree

        spec.draft.propose = proposing


@pytest.mark.sweep(3)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("options", WAYS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft_cache", ["full", "retrieval"])
def test_same_text(pair, options, draft_cache):
    """With each id that differs all over the prompt, and in the output."""
    ours, theirs, size, draft_size = PAIRS[pair]
    tokenizers = tokenizer(*ours), tokenizer(*theirs)
    differ = differing_ids(*tokenizers)
    target, draft = model_of(size), model_of(draft_size, seed=1)
    config = CONFIG.replace(draft_cache=draft_cache)
    given = dict(tokenizer=tokenizers[0], draft_tokenizer=tokenizers[1])
    for token in {VOCAB, *differ} & set(range(size)):
        ids = text_with(token)
        # Written often, but never twice in a row.
        written = dict(sequence_bias={(token,): 8.0, (token, token): -99.0})
        options = dict(options, max_new_tokens=40, no_repeat_ngram_size=3, **written)
        plain = SpecExtend(target, None, config).generate(ids, **options)
        assert 5 < plain[0, 40:].tolist().count(token) < 25
        spec = SpecExtend(target, draft, config, **given)
        seen = Spied(spec)
        assert torch.equal(spec.generate(ids, **options), plain)
        assert spec.stats.num_draft_tokens > 0
        both = set(range(min(size, draft_size))) - set(differ)
        assert seen.proposed <= both and seen.fed <= both


def test_acceptance_suffers_there_only():
    """A draft of the target's own weights but for the added token's."""
    target, draft = model_of(98), model_of(97)
    weights = target.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:97]
    draft.load_state_dict(weights)
    with torch.no_grad():
        target.lm_head.weight[97] = 0  # never written
    spec = SpecExtend(
        target, draft, CONFIG, draft_cache="full", tree_nodes=3, tree_width=1, tree_top_k=1,
        tokenizer=tokenizer("<a>"), draft_tokenizer=tokenizer(),
    )  # fmt: skip
    spec.generate(prompt(30), max_new_tokens=41, do_sample=False)
    assert spec.stats.acceptance_histogram == {3: 10}
    spec.generate(text_with(97), max_new_tokens=41, do_sample=False)
    assert spec.stats.mean_acceptance_length < 4


def test_it_reads_its_own_end_in_the_place_of_what_it_does_not_know():
    for end, expected in ((EOS, EOS), ([97, EOS], EOS), (None, 0)):
        target, draft = model_of(98), model_of(97, seed=1)
        draft.config.eos_token_id = end
        spec = SpecExtend(target, draft, CONFIG, tokenizer=tokenizer("<a>"),
                          draft_tokenizer=tokenizer())  # fmt: skip
        seen = Spied(spec)
        ids = torch.full((1, 12), 97)
        out = spec.generate(ids, max_new_tokens=3, do_sample=False)
        assert seen.fed - set(out[0, 12:].tolist()) == {expected}


def test_captured():
    target, draft, texts = model_of(99), model_of(99, seed=1), []
    for tapes in (None, Tapes()):
        spec = SpecExtend(target, draft, CONFIG, recorder=tapes, tokenizer=tokenizer("<a>", "<e>"),
                          draft_tokenizer=tokenizer("<b>", "<e>"))  # fmt: skip
        out = spec.generate(text_with(97), max_new_tokens=60, do_sample=True, temperature=1.5)
        texts.append(out.tolist())
    assert texts[0] == texts[1] and all(recorder.replays > 5 for recorder in tapes)


class TestTokenizers:
    def test_the_same(self):
        assert differing_ids(tokenizer(), tokenizer()) == []
        assert differing_ids(tokenizer("<a>"), tokenizer("<a>")) == []

    @pytest.mark.parametrize("pair", PAIRS)
    def test_differing(self, pair):
        ours, theirs = PAIRS[pair][:2]
        longest = max(len(ours), len(theirs))
        a, b = (names + [None] * (longest - len(names)) for names in (ours, theirs))
        expected = [VOCAB + i for i in range(longest) if a[i] != b[i]]
        assert differing_ids(tokenizer(*ours), tokenizer(*theirs)) == expected

    @pytest.mark.parametrize(
        "ours, theirs, what",
        [
            (dict(), dict(name="v"), "id 0 is 'w0' for the target and 'v0' for the draft"),
            (dict(), dict(words=90), "id 90 is 'w90' for the target and None for the draft"),
            (dict(words=90), dict(), "id 90 is None for the target and 'w90' for the draft"),
        ],
    )
    def test_words_that_differ(self, ours, theirs, what):
        """What is no added token is another vocabulary, whichever of them is the smaller one."""
        with pytest.raises(ValueError, match=what):
            differing_ids(tokenizer(**ours), tokenizer(**theirs))
        target, draft = model_of(VOCAB), model_of(VOCAB, seed=1)
        with pytest.raises(ValueError, match="must have the same tokenizer: .* added tokens"):
            SpecExtend(target, draft, tokenizer=tokenizer(**ours),
                       draft_tokenizer=tokenizer(**theirs))  # fmt: skip

    def test_an_added_token_in_a_words_place(self):
        with pytest.raises(ValueError, match="id 90 is '<a>' for the target and 'w90' for the"):
            differing_ids(tokenizer("<a>", words=90), tokenizer(words=91))

    def test_sizes_that_differ_without_tokenizers(self):
        with pytest.raises(ValueError, match="98 entries, the draft's 97: .* pass tokenizer="):
            SpecExtend(model_of(98), model_of(97))
