"""Drafts with fewer positions than the target: plain rounds beyond them, and the same text."""

from __future__ import annotations

import pytest
import torch
from generations import scripted
from models import VOCAB, prompt, tiny_model
from tape import Tapes
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gptj import modeling_gptj

from specextend import SpecConfig, SpecExtend
from specextend.draft import Decided, Draft
from specextend.tree import Tree

LIMIT = 24  # positions of the drafts
CONFIG = SpecConfig(
    draft_cache="full", gate="off", seed=7, tree_shape="top_k", tree_nodes=6, tree_depth=4,
    tree_width=2, tree_top_k=2, prefill_chunk=10,
)  # fmt: skip
CHAIN = dict(tree_nodes=4, tree_width=1, tree_top_k=1)
SAMPLED = dict(do_sample=True, temperature=0.8, top_p=0.9)
_GPT = dict(vocab_size=VOCAB, n_embd=32, n_head=4, n_layer=2, n_inner=48, n_positions=LIMIT)
_OPT = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=LIMIT,
)  # fmt: skip
# Tables of positions, learned ones and (GPT-J) of the angles to rotate by.
TABLES = {
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": dict(rotary_dim=8, **_GPT),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, **_OPT),
    "biogpt": dict(intermediate_size=48, **_OPT),
}
NANOCHAT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
# The border itself, what a tree reaches from below it, and prompts that leave nothing to propose.
LENGTHS = [1, 2, *range(LIMIT - 7, LIMIT + 3), 2 * LIMIT]


@pytest.fixture(scope="module")
def target():
    return tiny_model("llama")


def draft_of(family: str):
    if family == "gptj" and not hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this version of transformers has an attention of GPT-J's own")
    torch.manual_seed(1)
    config = CONFIG_MAPPING[family](
        initializer_range=0.3, pad_token_id=0, **TABLES.get(family, NANOCHAT)
    )
    return AutoModelForCausalLM.from_config(config).eval()


def shortened():
    """Make an OPT, and one of the same weights with LIMIT positions."""
    models = [tiny_model("opt", max_position_embeddings=n) for n in (512, LIMIT)]
    weights, name = models[0].state_dict(), "model.decoder.embed_positions.weight"
    models[1].load_state_dict({**weights, name: weights[name][: LIMIT + 2]})
    return models


def ways(spec: SpecExtend, ids, **options):
    """Give the text by each of the ways in."""
    yield spec.generate(ids, **options)
    yield spec.model.generate(ids, custom_generate=spec, **options)
    steps = [token for step in spec.stream(ids, **options) for token in step.tokens]
    yield torch.cat([ids, torch.tensor([steps], dtype=ids.dtype)], 1)


@pytest.mark.parametrize("family", TABLES)
def test_the_limit_is_known(target, family):
    """And is that of the model's own table: a forward of so many tokens, and of no more."""
    model = draft_of(family)
    assert SpecExtend(target, model, CONFIG).draft.max_length == LIMIT
    model(prompt(LIMIT))
    with pytest.raises(IndexError):
        model(prompt(LIMIT + 1))


@pytest.mark.parametrize("family", ["llama", "phi", "cohere2", "gpt_neox", "gemma3_text"])
def test_rotary_drafts_have_none(target, family):
    assert SpecExtend(target, tiny_model(family), CONFIG).draft.max_length is None


@pytest.mark.sweep(3)
@pytest.mark.parametrize("family", TABLES)
def test_prompts_around_the_border(target, family):
    spec = SpecExtend(target, draft_of(family), CONFIG)
    for length in LENGTHS:
        ids, options = prompt(length), dict(max_new_tokens=12, do_sample=False)
        expected = target.generate(ids, **options)
        assert torch.equal(spec.generate(ids, **options), expected), length
        assert (spec.stats.num_draft_tokens > 0) == (length < LIMIT), length


@pytest.mark.sweep(4)
@pytest.mark.parametrize("options", [dict(do_sample=False), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [5, LIMIT - 2, LIMIT, LIMIT + 9])
def test_every_way_in(target, options, length):
    ids, options = prompt(length), dict(max_new_tokens=30, **options)
    plain = SpecExtend(target, None, CONFIG).generate(ids, **options)
    spec = SpecExtend(target, draft_of("gpt2"), CONFIG)
    for text in ways(spec, ids, **options):
        assert torch.equal(text, plain)
    mask = torch.tensor([[0] * 3 + [1] * length])
    padded = torch.nn.functional.pad(ids, (3, 0))
    text = spec.generate(padded, attention_mask=mask, **options)
    assert torch.equal(text[:, 3:], plain)


@pytest.mark.sweep(5)
@pytest.mark.parametrize(
    "change",
    [dict(tree_shape="opt"), dict(tree_shape="fixed", tree_widths=(2, 3, 2)), dict(gate="auto"),
     dict(tree_attention=False), dict(prefill_chunk=None), dict(prefill_chunk=1)], ids=str,
)  # fmt: skip
def test_trees_and_options(target, change):
    spec = SpecExtend(target, draft_of("opt"), CONFIG, **change)
    for length in (3, LIMIT - 1):
        ids, options = prompt(length), dict(max_new_tokens=40, do_sample=False)
        assert torch.equal(spec.generate(ids, **options), target.generate(ids, **options))


@pytest.mark.long  # two minutes
@pytest.mark.parametrize("recorder", [None, Tapes], ids=["called", "captured"])
@pytest.mark.parametrize(
    "change",
    [dict(), dict(tree_shape="fixed", tree_widths=(2, 3)), dict(tree_depth=9), dict(gate="auto")],
    ids=str,
)
def test_every_length_and_what_is_written_behind_it(target, change, recorder):
    spec = SpecExtend(target, draft_of("opt"), CONFIG, recorder=recorder and recorder(), **change)
    plain = SpecExtend(target, None, CONFIG)
    for length in range(1, LIMIT + 4):
        for new in {1, 2, 3, LIMIT - length + 1, LIMIT - length + 2, 40}:
            for options in (dict(do_sample=False), SAMPLED):
                given = dict(max_new_tokens=max(new, 1), **options)
                text = plain.generate(prompt(length, seed=length), **given)
                assert torch.equal(spec.generate(prompt(length, seed=length), **given), text)


@pytest.mark.parametrize("recorder", [None, Tapes], ids=["called", "captured"])
def test_proposes_up_to_its_last_position(recorder):
    """A draft of the target's own weights: every proposal up to the border is accepted, the last
    one behind its last position, and none is made beyond."""
    model, draft = shortened()
    spec = SpecExtend(model, draft, CONFIG, recorder=recorder and recorder(), **CHAIN)
    ids, index, last = prompt(5), 5, 0
    text = []
    for step in spec.stream(ids, max_new_tokens=40, do_sample=False):
        text += step.tokens
        index += len(step.tokens)
        if step.num_accepted:
            last = index - 2  # the last token is the target's own
    assert last == LIMIT
    assert text == model.generate(ids, max_new_tokens=40, do_sample=False)[0, 5:].tolist()
    assert spec.stats.num_accepted_tokens == spec.stats.num_draft_tokens


@pytest.mark.parametrize(
    "depths", ["4" * 99, "200304" * 20, "0" * 30 + "4" * 60], ids=["deep", "rests", "waits"]
)
def test_captured(target, depths):
    """Also where the gate rests over the border."""
    for length in (5, LIMIT - 3, LIMIT):
        ids, tapes, gate = prompt(length), Tapes(), map(int, depths)
        spec = SpecExtend(
            target, draft_of("opt"), CONFIG, recorder=tapes, generation=scripted(gate)
        )
        out = spec.generate(ids, max_new_tokens=50, do_sample=False)
        assert torch.equal(out, target.generate(ids, max_new_tokens=50, do_sample=False))
        assert len(tapes) == 1 + (length < LIMIT) and tapes[0].replays


class Limited(Draft):
    """Proposes the root again, and keeps what it was asked."""

    kind, wants_scores, max_length, feature_layers = "limited", True, LIMIT, (1,)

    def __init__(self):
        self.asked, self.longest, self.retrieved = [], 0, []

    def begin(self, prompt, max_length, cache, graphs):
        self.asked.append("begin")
        self._length, self._cache = 0, cache

    def _take(self, decided: Decided):
        self._length += len(decided)
        self.longest = max(self.longest, self._length)
        assert decided.features.shape[:2] == decided.tokens.shape

    def prefill(self, decided):
        self._take(decided)

    def retrieve(self, scores):
        self.retrieved.append(self._cache.length)

    def propose(self, decided, depth, price):
        self._take(decided)
        self.longest = max(self.longest, self._length + depth - 1)
        nodes = torch.arange(depth + 1, dtype=torch.int32)[None]
        mask = (2 ** (nodes.long() + 1) - 1)[..., None]
        tokens = decided.tokens[:, -1:].repeat(1, depth + 1)
        return Tree(tokens, nodes - 1, nodes, mask, None, depth)


def test_what_a_draft_of_any_kind_is_asked(target):
    """It is run up to its limit and not beyond, and not asked to retrieve there."""
    config = CONFIG.replace(draft_cache="retrieval", chunk_size=4, budget=8, recent_chunks=1,
                            retrieve_every=1)  # fmt: skip
    for length in LENGTHS:
        draft = Limited()
        ids, options = prompt(length), dict(max_new_tokens=30, do_sample=False)
        spec = SpecExtend(target, draft, config)
        assert torch.equal(spec.generate(ids, **options), target.generate(ids, **options))
        assert draft.longest == (LIMIT if length < LIMIT else 0)
        assert draft.asked == ["begin"] * (length < LIMIT)
        assert all(at <= LIMIT for at in draft.retrieved)


def test_rotary_drafts_go_on_beyond_their_positions(target):
    """What is known of positions beyond those of training is the draft's to lose."""
    model = tiny_model("llama", max_position_embeddings=LIMIT)
    for cache in ("full", "window", "retrieval"):
        spec = SpecExtend(target, model, CONFIG, draft_cache=cache, budget=32, chunk_size=8,
                          recent_chunks=1, **CHAIN)  # fmt: skip
        for length in (LIMIT - 2, 3 * LIMIT):
            ids, options = prompt(length), dict(max_new_tokens=20, do_sample=False)
            assert torch.equal(spec.generate(ids, **options), target.generate(ids, **options))
            assert spec.stats.num_plain_rounds <= 2


# ---- keys that cannot be moved -------------------------------------------------------------------


def unmovable(family: str):
    """Make a draft: of a table, rotated the other way round, or in some of its layers alone."""
    if family == "cohere2":
        return tiny_model(family, seed=1)
    return draft_of(family)


class TestUnmovableKeys:
    """By default a draft retrieves; one that cannot attends to all of its context, and says so."""

    @pytest.mark.sweep(4)
    @pytest.mark.parametrize("family", [*TABLES, "nanochat", "cohere2"])
    @pytest.mark.parametrize("options", [dict(do_sample=False), SAMPLED], ids=["greedy", "sampled"])
    def test_serve_with_the_default_options(self, target, family, options, tmp_path, recwarn):
        model, given = unmovable(family), dict(max_new_tokens=16, **options)
        model.save_pretrained(tmp_path)
        for draft in (model, tmp_path):
            with pytest.warns(RuntimeWarning) as told:
                spec = SpecExtend(target, draft, seed=3)
            assert len(told) == 1 and type(model).__name__ in str(told[0].message)
            assert 'draft_cache="full"' in str(told[0].message)
            assert spec.draft.config.draft_cache == "full"
            assert spec.draft.cache_kinds == ("full",) and not spec.draft.wants_scores
            for length in (1, 14):
                plain = SpecExtend(target, None, seed=3).generate(prompt(length), **given)
                assert torch.equal(spec.generate(prompt(length), **given), plain)
                assert spec.stats.num_draft_tokens > 0 and spec.stats.num_retrievals == 0
            assert not [w for w in recwarn.list if w.category is RuntimeWarning]

    @pytest.mark.parametrize("family", ["gpt2", "nanochat"])
    def test_what_was_wished_for_is_refused(self, target, family):
        with pytest.raises(ValueError, match='use draft_cache="full"'):
            SpecExtend(target, unmovable(family), draft_cache="window")
        draft = SpecExtend(target, unmovable(family), draft_cache="full").draft
        for cache in ("window", "retrieval"):
            with pytest.raises(ValueError, match='use draft_cache="full"'):
                draft.with_config(SpecConfig(draft_cache=cache))
        assert draft.with_config(SpecConfig(draft_cache="full")).cache_kinds == ("full",)

    @pytest.mark.parametrize("cache", ["full", "window", "retrieval"])
    def test_keys_that_can_are_moved(self, target, cache, recwarn):
        draft = SpecExtend(target, tiny_model("phi"), draft_cache=cache).draft
        assert draft.config.draft_cache == cache and not recwarn.list
        assert draft.cache_kinds == ("full", "window", "retrieval")
