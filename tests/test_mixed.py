"""Tests drafts of a model and look-up in one tree: merging, taking in late, choosing."""

from __future__ import annotations

import copy
import random
from itertools import cycle, pairwise
from types import SimpleNamespace

import pytest
import torch
from drafts import SMALL, WAYS, Scripted, draft, mixed, target, write
from generations import scripted
from models import prompt, tiny_model
from tape import Tapes
from test_ngram import cycling_model

from specextend import SpecConfig, SpecExtend
from specextend.draft import MixedDraft, NGramDraft, beside_lookup, load_draft
from specextend.draft import mixed as mixed_module
from specextend.draft.choice import Choice, Plan, Trees
from specextend.draft.lookup import LookUp, Node
from specextend.draft.mixed import _merge
from specextend.pace import Round
from specextend.target import Target

GREEDY = dict(do_sample=False)
SAMPLED = dict(do_sample=True, temperature=0.7)
MODELS = ("model", "self", "eagle", "longspec")


def repeating(length: int) -> torch.Tensor:
    """Make a prompt with much to find in it."""
    return prompt(13).repeat(1, -(-length // 13))[:, :length]


def scripts(*turns):
    """Make choices that take these turns."""
    return type("Turns", (Scripted,), {"turns": turns})


def knowing(monkeypatch, text: list[int], wrong_at: int = 99) -> None:
    """Have look-up propose the ``text`` to come, but for every so manieth place of it."""

    def grow(self, depth, num_nodes):
        rest = text[self.length :][: min(depth, num_nodes)]
        places = range(self.length, self.length + len(rest))
        return [
            Node(i, (token + (place % wrong_at == 0)) % 97, i + 1, 1.0)
            for i, (place, token) in enumerate(zip(places, rest, strict=True))
        ]

    monkeypatch.setattr(LookUp, "grow", grow)


# ---- how it is made ------------------------------------------------------------------------------


class TestMaking:
    @pytest.mark.parametrize("kind", MODELS)
    def test_of_every_kind_with_a_model(self, kind, tmp_path):
        own = draft(kind, folder=tmp_path)
        alone = SpecExtend(target(), own, SMALL).draft
        for made in ([own, "ngram"], ("ngram", own)):
            both = SpecExtend(target(), made, SMALL).draft
            assert isinstance(both, MixedDraft) and both.kind == f"{alone.kind}+ngram"
            for name in ("wants_scores", "feature_layers", "cache_kinds", "num_parameters"):
                assert getattr(both, name) == getattr(alone, name)
            assert both.causal_lm is alone.causal_lm and both.obstacle() == alone.obstacle()
        other = both.with_config(SMALL.replace(tree_nodes=5))
        assert other.model.config.tree_nodes == 5 and other.max_nodes == 10

    @pytest.mark.parametrize(
        "wrong",
        [[], ["ngram"], ["ngram", "ngram"], ["self", "self"], ["self", "ngram", "ngram"],
         ["ngram", None], [["self", "ngram"], "ngram"]], ids=str,
    )  # fmt: skip
    def test_anything_else_is_refused(self, wrong):
        with pytest.raises(ValueError, match=r"'ngram'.*got \["):
            SpecExtend(target(), wrong, SMALL)

    def test_a_draft_without_a_model_is_refused(self):
        with pytest.raises(ValueError, match="a draft that has a model, got one of kind 'ngram'"):
            SpecExtend(target(), [NGramDraft(SMALL), "ngram"], SMALL)
        both = load_draft(["self", "ngram"], Target(target()), SMALL)
        with pytest.raises(ValueError, match="'ngram' is mixed with one draft"):
            SpecExtend(target(), [both, "ngram"], SMALL)

    def test_names(self):
        assert beside_lookup("model+ngram") == "model" and beside_lookup("a+b/c+ngram") == "a+b/c"
        for name in ("model", "ngram", "model+self", "modelngram", "+ngrams", "+ngram"):
            assert not beside_lookup(name)

    def test_the_models_errors_are_its_own(self):
        class Short(type(load_draft("self", Target(target()), SMALL))):
            def check_length(self, prompt, total):
                raise ValueError(f"{total} are too many")

        made = MixedDraft(Short(target(), SMALL, 97), SMALL)
        with pytest.raises(ValueError, match="18 are too many"):
            SpecExtend(target(), made, SMALL).generate(prompt(8), max_new_tokens=10, **GREEDY)


# ---- merging -------------------------------------------------------------------------------------


def paths(nodes) -> set[tuple[int, ...]]:
    """Return the tokens down to each node."""
    down = [()]
    for parent, token in nodes:
        down.append((*down[parent], token))
    return set(down[1:])


def test_merging_against_sets_of_paths():
    draw = random.Random(3)

    def tree(size):
        nodes = []
        for _ in range(size):
            node = draw.randrange(len(nodes) + 1), draw.randrange(3)
            if node not in nodes:
                nodes.append(node)
        return nodes

    for _ in range(300):
        own, others, most = tree(6), tree(6), draw.randrange(6, 14)
        merged = _merge(own, others, most)
        assert merged[: len(own)] == own and len(merged) <= most
        assert len(set(merged)) == len(merged)
        assert all(parent <= i for i, (parent, _) in enumerate(merged))
        both = paths(own) | paths(others)
        assert paths(merged) <= both
        if len(both) <= most:
            assert paths(merged) == both


def test_a_model_may_propose_a_token_twice():
    """As a re-ranked tree of two ids for one token would: the first of them is gone on from."""
    assert _merge([(0, 5), (0, 5)], [(0, 5), (1, 6)], 9) == [(0, 5), (0, 5), (1, 6)]


# ---- the same text -------------------------------------------------------------------------------


@pytest.mark.sweep(3)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", MODELS)
def test_lossless(kind, options, tmp_path, monkeypatch):
    """Prompts of one token to beyond the budget; in each way in; with paths of every length."""
    spec = SpecExtend(target(), mixed(draft(kind, folder=tmp_path)), SMALL)
    plain = SpecExtend(target(), None, SMALL)
    for length in (1, 2, 33, 90):
        ids, given = prompt(length), dict(max_new_tokens=40, **options)
        expected = write(plain, "generate", ids, **given)
        for way, wrong_at in zip(WAYS, (99, 7, 4), strict=True):
            knowing(monkeypatch, [*ids[0].tolist(), *expected], wrong_at)
            assert write(spec, way, ids, **given) == expected, (length, way)
            assert sum(spec.draft.accepted.values()) == spec.stats.num_accepted_tokens > 0


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "change",
    [dict(tree_shape="fixed", tree_widths=(2, 3, 2)), dict(tree_shape="top_k"), dict(tree_depth=1),
     dict(tree_nodes=2), dict(draft_cache="full"), dict(draft_cache="window"),
     dict(tree_attention=False), dict(gate="auto"), dict(tree_nodes=40, tree_width=9)], ids=str,
)  # fmt: skip
def test_shapes_and_options(change):
    """Also with the choices of its own, which depend on time."""
    config = SMALL.replace(**change)
    for choose in (Scripted, Choice):
        spec = SpecExtend(target(), mixed(draft("model"), config, choose), config)
        for length in (1, 60):
            ids, given = repeating(length), dict(max_new_tokens=50, **GREEDY)
            assert write(spec, "generate", ids, **given) == write(
                SpecExtend(target(), None, config), "generate", ids, **given
            )


def test_scores_follow_the_path():
    """What is returned of a round is that of the merged tree's nodes."""
    options = dict(
        max_new_tokens=40, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    spec = SpecExtend(target(), mixed(draft("model")), SMALL)
    got = spec.generate(repeating(50), **GREEDY, **options)
    expected = SpecExtend(target(), None, SMALL).generate(repeating(50), **GREEDY, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [5, 20, 23, 24, 40])
def test_look_up_goes_on_where_the_model_ends(length):
    writer, config = cycling_model(), SMALL.replace(draft_cache="full")
    model = tiny_model("opt", max_position_embeddings=24)
    spec = SpecExtend(writer, mixed(model, config, model=writer), config)
    ids, given = torch.arange(length)[None] % 7 + 10, dict(max_new_tokens=60, **GREEDY)
    assert torch.equal(spec.generate(ids, **given), writer.generate(ids, **given))
    assert spec.draft.max_length is None and spec.draft.accepted["ngram"] > 30


# ---- what the model takes in ---------------------------------------------------------------------


@pytest.mark.sweep(2)
@pytest.mark.parametrize("cache", ["full", "window", "retrieval"])
@pytest.mark.parametrize("kind", MODELS)
def test_taking_in_late_is_taking_in(kind, cache, tmp_path):
    """A model that rests while look-up has nothing proposes as one that rests by the gate."""
    if kind == "self" and cache == "full":
        pytest.skip("the target's full cache is no draft")
    config = SMALL.replace(draft_cache=cache, tree_shape="top_k")
    rests = (4, 0, 4, 4, 0, 0, 0, 3, 0, 4)
    own = draft(kind, config, tmp_path)
    turns = scripts(*((levels, 0) for levels in rests))
    for length in (1, 20, 70):
        both = SpecExtend(target(), mixed(own, config, turns), config)
        alone = SpecExtend(target(), own, config, generation=scripted(rests * 20))
        given = dict(max_new_tokens=60, **GREEDY)
        got, expected = (
            [(s.tokens, s.num_accepted) for s in spec.stream(prompt(length), **given)]
            for spec in (both, alone)
        )
        assert got == expected
    assert both.stats.num_accepted_tokens > 0 or kind in ("eagle", "longspec")


@pytest.mark.sweep(3)
@pytest.mark.parametrize("cache", ["full", "window", "retrieval"])
@pytest.mark.parametrize("wait", [0, 1, 2, 3, 100])
def test_a_model_reads_when_it_is_worth_it(cache, wait):
    """From then on it proposes as if it had read at once, with the latest scores."""

    class Later(Scripted):
        asked = 0

        def worth(self, nodes, depth, seconds, tokens):
            assert depth == config.max_depth and seconds > 0 and 0 < tokens <= 60
            self.asked += 1
            return self.asked > wait

    config, ids = SMALL.replace(draft_cache=cache), prompt(70)
    spec, given = SpecExtend(target(), mixed(draft("model"), config, Later), config), []
    read = spec.draft.model.finish_prefill
    spec.draft.model.finish_prefill = lambda scores: given.append(scores) or read(scores)
    steps = list(spec.stream(ids, max_new_tokens=60, **GREEDY))
    text = [token for step in steps for token in step.tokens]
    assert text == target().generate(ids, max_new_tokens=60, **GREEDY)[0, 70:].tolist()
    assert (spec.draft.accepted["model"] > 0) == (wait < 100)
    retrieves = cache == "retrieval" and wait < 100
    assert [scores is not None for scores in given] == [retrieves] * (wait < 100)
    assert (spec.stats.num_retrievals > 0) == retrieves


def test_what_makes_reading_worth_it():
    choice = Choice(SMALL)
    assert not choice.worth([], 4, 0.0, 1000)  # nothing is known of the cost of rounds
    for _ in range(8):
        choice.count(Round(0, 0, 1, 1.0))
        verdicts = [choice.worth([], 4, seconds, 100) for seconds in (1.0, 1000.0)]
    assert verdicts == [True, False]
    few = [choice.worth([], 4, 10.0, tokens) for tokens in (1, 1000)]
    assert few == [False, True]
    chain = [Node(i, i, i + 1, 0.99) for i in range(8)]  # look-up that is right all the time
    for _ in range(40):
        last = choice.worth(chain, 4, 10.0, 100)
    assert not last


@pytest.mark.parametrize("kind", ["model", "self"])
def test_what_a_model_is_expected_to_take(kind, monkeypatch):
    """Its share of weights of what the target takes, and of its reading the part of the prompt that
    it reads; one without weights of its own takes what the target takes."""
    seen = []

    class Asked(Scripted):
        def worth(self, nodes, depth, seconds, tokens):
            seen.append((self.pace.drafting(1) / self.pace.plain, seconds))
            return True

    config = SMALL.replace(draft_cache="retrieval")
    both = load_draft([draft(kind), "ngram"], Target(target()), config)
    both._choose = Asked
    spec = SpecExtend(target(), both, config)
    share = 1.0 if kind == "self" else both.num_parameters / target().num_parameters()
    for length, part in ((30, 1.0), (300, 0.25 * 1.75)):
        seen.clear()
        clock = SimpleNamespace(perf_counter=iter(range(0, 99, 8)).__next__)
        monkeypatch.setattr(mixed_module, "time", clock)
        spec.generate(prompt(length), max_new_tokens=4, **GREEDY)
        if kind == "self":
            assert not seen  # there is nothing that it has to read
        else:
            (forward, seconds), *_ = seen
            assert forward == pytest.approx(share)
            assert seconds == pytest.approx(8 * share * part, rel=0.1)


def test_an_identical_model_is_accepted_behind_look_up(monkeypatch):
    """What look-up decided is where the model expects it, however much there was."""
    config = SMALL.replace(
        draft_cache="full", tree_shape="top_k", tree_width=1, tree_top_k=1, tree_nodes=4
    )
    ids = prompt(40)
    knowing(monkeypatch, target().generate(ids, max_new_tokens=140, **GREEDY)[0].tolist())
    turns = scripts((0, 8), (0, 5), (4, 0), (0, 1), (4, 0), (4, 0), (4, 8))
    spec = SpecExtend(target(), mixed(copy.deepcopy(target()), config, turns), config)
    steps = list(spec.stream(ids, max_new_tokens=121, **GREEDY))[1:-2]
    assert len(steps) > 14
    for step, (levels, nodes) in zip(steps, cycle(turns.turns), strict=False):
        assert step.num_accepted == max(levels, nodes)
    assert min(spec.draft.accepted[source] for source in ("model", "ngram")) > 40


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", ["model", "eagle", "self"])
def test_captured(kind, tmp_path):
    """The model's part runs from graphs; it is never asked before the host has read a round."""
    config, given = SMALL.replace(tree_shape="top_k"), dict(max_new_tokens=110, **GREEDY)
    turns = scripts((4, 0), (4, 9), (4, 0), (0, 9), (4, 9))
    tapes, made = Tapes(), mixed(draft(kind, config, tmp_path), config, turns)
    spec = SpecExtend(target(), made, config, recorder=tapes)
    texts = [[s.tokens for s in spec.stream(repeating(60), **given)]]
    assert len(tapes) == 2 and all(tape.replays > 4 for tape in tapes)
    texts.append(
        [s.tokens for s in SpecExtend(target(), made, config).stream(repeating(60), **given)]
    )
    flat = [[token for step in steps for token in step] for steps in texts]
    assert (
        flat[0]
        == flat[1]
        == write(SpecExtend(target(), None, config), "generate", repeating(60), **given)
    )


def test_look_up_alone_captures_nothing_of_its_own():
    tapes = Tapes()
    spec = SpecExtend(target(), "ngram", SMALL, recorder=tapes)
    spec.generate(repeating(60), max_new_tokens=40, **GREEDY)
    assert tapes[0].records and not any(tape.records for tape in tapes[1:])


# ---- the choice ----------------------------------------------------------------------------------


def chain(*chances: float) -> list[Node]:
    nodes, chance = [], 1.0
    for level, share in enumerate(chances, 1):
        chance *= share
        nodes.append(Node(level - 1, level, level, chance))
    return nodes


class Costs:
    """Runs a choice against rounds of known costs, the root's pass being 1."""

    def __init__(self, forward: float, right: float, node: float = 0.02, seed: int = 0):
        self.choice = Choice(SpecConfig())
        self.forward, self.right, self.node = forward, right, node
        self.draw = random.Random(seed)
        self.choice.count(Round(0, 0, 1, 1.0))

    def round(self, nodes=()) -> Plan:
        plan = self.choice.plan(list(nodes), 5)
        accepted = 0
        while accepted < plan.levels and self.draw.random() < self.right:
            accepted += 1
        own = 8 * (plan.levels > 0)
        drafting = plan.levels * self.forward
        seconds = 1 + self.node * (plan.num_nodes + own) + drafting
        disturbed = 5 if self.draw.random() < 0.1 else 1
        took = Round(
            plan.levels, plan.num_nodes + own, accepted + 1, disturbed * seconds,
            disturbed * drafting, accepted,
        )  # fmt: skip
        self.choice.count(took, plan.levels, own)
        return plan

    def rounds(self, count: int, nodes=()) -> list[Plan]:
        return [self.round(nodes) for _ in range(count)]


class TestChoice:
    def test_a_long_match_is_verified_alone(self):
        plans = Costs(0.3, 0.8).rounds(40, chain(*[0.95] * 16))
        assert all(plan.num_nodes > 9 for plan in plans)
        assert sum(plan.levels > 0 for plan in plans) <= 2

    def test_without_a_match_the_model_runs_where_it_pays(self):
        plans = Costs(0.2, 0.8).rounds(60)[20:]
        assert sum(plan.levels > 1 for plan in plans) > 36

    def test_and_is_left_out_where_it_does_not(self):
        for right, forward in ((0.1, 0.3), (0.8, 1.2)):
            plans = Costs(forward, right).rounds(200)[20:]
            assert 0 < sum(plan.levels > 0 for plan in plans) < 30

    def test_a_cheap_model_goes_deeper(self):
        def levels(forward):
            plans = Costs(forward, 0.85).rounds(120)[40:]
            return sum(plan.levels for plan in plans) / len(plans)

        assert levels(0.02) > 4 > levels(0.3) > levels(0.6)

    def test_a_model_that_stops_early_costs_less(self):
        """What its trees have cost counts, not what they might have."""

        def value(forwards):
            """Of a tree of at most five levels, where one and three are confirmed in turn."""
            choice = Choice(SpecConfig())
            choice.count(Round(0, 0, 1, 1.0))
            for i in range(60):
                drafting, accepted = 0.3 * forwards[i % 2], (1, 3)[i % 2]
                took = Round(forwards[i % 2], 8, accepted + 1, 1.2 + drafting, drafting, accepted)
                choice.count(took, 5, 8)
            return choice._values([], 5)[5, 0]

        assert value((5, 5)) == pytest.approx(3 / 2.7, rel=0.1)
        assert value((1, 3)) == pytest.approx(3 / 1.8, rel=0.1)

    def test_unlikely_nodes_are_not_verified(self):
        nodes = chain(0.5, 0.3, 0.1, 0.1)
        dear, cheap = (Costs(3.0, 0.1, node).rounds(60, nodes)[-1] for node in (0.09, 0.0))
        assert dear.num_nodes < cheap.num_nodes

    def test_a_doubtful_match_goes_beside_a_good_model(self):
        plans = Costs(0.05, 0.8).rounds(60, chain(0.2, *[0.98] * 7))[20:]
        assert sum(plan.levels > 0 and plan.num_nodes > 5 for plan in plans) > 30

    def test_a_model_that_cannot_run_does_not(self):
        assert Choice(SpecConfig()).plan([], 0) == Plan(0, 0)

    def test_the_model_is_tried_again_ever_less(self):
        """Also where what it costs was measured wrongly."""
        costs = Costs(50.0, 0.9)
        tried = [i for i, plan in enumerate(costs.rounds(900, chain(*[0.95] * 16))) if plan.levels]
        assert 2 < len(tried) < 9
        gaps = [b - a for a, b in pairwise(tried[-4:])]
        assert gaps == sorted(gaps)


def test_levels_that_were_confirmed():
    trees = Trees(4)
    before, most = trees.chances(), trees.forwards()
    assert most.tolist() == [1, 2, 3, 4]
    for _ in range(100):
        trees.count(2, 2, 1)
    first, second, third, fourth = trees.chances()
    assert first > 0.95 and second < 0.2 and third < second and fourth < third
    assert trees.forwards() == pytest.approx(most)
    for _ in range(200):
        trees.forget(1 / 16)
    assert trees.chances() == pytest.approx(before, abs=1e-3)


def test_where_trees_end_nothing_is_confirmed():
    """Half of them after one level, confirmed; the others after four, all of them confirmed."""
    trees = Trees(4)
    for _ in range(100):
        trees.count(4, 1, 1)
        trees.count(4, 4, 4)
    assert trees.chances() == pytest.approx([1.0, 0.5, 0.5, 0.5], abs=0.15)
    assert trees.forwards() == pytest.approx([1.0, 1.5, 2.0, 2.5], abs=0.2)


def test_a_match_is_worth_what_it_was_worth():
    """Learnt along the text, by the match's length; of longer ones little more is expected."""
    doubtful, certain = LookUp(SpecConfig(), 999), LookUp(SpecConfig(), 999)
    doubtful.begin([7])
    certain.begin([1, 2, 3, 4, 5, 6])
    for i in range(60):
        doubtful.follow([100 + i, 7])
        certain.follow([1, 2, 3, 4, 5, 6])
    assert doubtful.grow(1, 1)[0].chance < 0.15
    chances = [doubtful.reliability[length] for length in range(1, 20)]
    assert chances == sorted(chances) and chances[1] < 0.3 and chances[-1] > 0.7
    nodes = certain.grow(12, 12)
    assert [n.token for n in nodes] == [1, 2, 3, 4, 5, 6] * 2 and nodes[-1].chance > 0.5
