"""Generations beside each other on one model, in threads: each writes what it writes alone."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations

import pytest
import torch
from models import prompt, tiny_model
from transformers import PreTrainedModel

from specextend import SpecExtend
from specextend.attention import PatchedModel
from specextend.cache import KVCache, Pass

NEW = 5


class Runner(threading.Thread):
    """Runs a function, and can be held inside a forward of the model."""

    def __init__(self, function: Callable[[], object], forwards: int):
        super().__init__(daemon=True)
        self.function, self.forwards = function, forwards
        self.inside, self.go = threading.Event(), threading.Event()
        self.result: object = None

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.result = error
        self.inside.set()

    def enter(self) -> None:
        """Run up to the middle of the forward that was asked for."""
        self.start()
        assert self.inside.wait(60)

    def leave(self) -> object:
        """Run to the end."""
        self.go.set()
        self.join(60)
        assert not self.is_alive()
        return self.result


@contextmanager
def holding(model: PreTrainedModel) -> Iterator[type[Runner]]:
    """Hold runners in their forwards, before the last layer."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)][0]

    def hold(*_):
        runner = threading.current_thread()
        if isinstance(runner, Runner):
            runner.forwards -= 1
            if runner.forwards == 0:
                runner.inside.set()
                assert runner.go.wait(60)

    handle = layers[-1].register_forward_pre_hook(hold)
    try:
        yield Runner
    finally:
        handle.remove()


def padded(ids: torch.Tensor) -> dict:
    """Give the prompt with padding on its left."""
    filled = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    return dict(input_ids=filled, attention_mask=(torch.arange(filled.shape[1]) > 2).long()[None])


def jobs(model: PreTrainedModel) -> dict[str, Callable[[], torch.Tensor]]:
    """Make two generations of ours and a plain one, all different."""
    draft = tiny_model("llama", seed=1)
    options = dict(max_new_tokens=NEW, do_sample=False)
    first = SpecExtend(model, draft, tree_nodes=6, prefill_chunk=16, gate="off", seed=0)
    second = SpecExtend(model, None, prefill_chunk=16, seed=0)

    return dict(
        first=lambda: first.generate(prompt(40, seed=1), **options),
        second=lambda: second.generate(prompt(45, seed=2), **options),
        plain=lambda: model.generate(**padded(prompt(37, seed=3)), **options),
    )


MODELS = {
    "llama": dict(family="llama"),
    "sliding, eager": dict(family="mistral", attn_implementation="eager"),
    "softcap, eager": dict(family="gemma2"),
    "sinks": dict(family="gpt_oss"),
    "attention chosen by name": dict(
        family="gpt2", attn_implementation="eager", reorder_and_upcast_attn=True
    ),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", MODELS)
def test_any_order(name):
    """Each enters a forward, and leaves it, in every order."""
    model = tiny_model(**MODELS[name])
    made, before = jobs(model), model.config._attn_implementation
    alone = {name: job() for name, job in made.items()}
    orders = list(permutations(made))
    for entering in orders if name == "llama" else orders[::2]:
        for leaving in orders if name == "llama" else orders[1::2]:
            with holding(model) as runner:
                runners = {name: runner(made[name], 2) for name in entering}
                for name_ in entering:
                    runners[name_].enter()
                    assert model.config._attn_implementation == before
                for name_ in leaving:
                    assert torch.equal(runners[name_].leave(), alone[name_]), (entering, leaving)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("held", ["first", "second", "plain"])
@pytest.mark.parametrize("forward", [1, 2, 4])
def test_whole_generations_inside_one_forward(held, forward):
    model = tiny_model("mistral")
    made = jobs(model)
    alone = {name: job() for name, job in made.items()}
    with holding(model) as runner:
        waiting = runner(made.pop(held), forward)
        waiting.enter()
        for name, job in made.items():
            assert torch.equal(job(), alone[name])
        assert torch.equal(waiting.leave(), alone[held])


def test_side_by_side():
    model = tiny_model("mistral")
    made = jobs(model)
    alone = {name: job() for name, job in made.items()}
    wrong = []

    def repeat(name):
        for _ in range(6):
            if not torch.equal(made[name](), alone[name]):
                wrong.append(name)

    threads = [threading.Thread(target=repeat, args=(name,)) for name in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_dropout_stays_off_in_both():
    """Until the last of them has left; and the model trains on behind them."""
    target = tiny_model("llama", attention_dropout=0.5)
    made = jobs(target)
    del made["plain"]
    alone = {name: job() for name, job in made.items()}
    target.train()
    for leaving in permutations(made):
        with holding(target) as runner:
            runners = {name: runner(job, 2) for name, job in made.items()}
            for name in made:
                runners[name].enter()
            assert not target.training
            for name in leaving:
                assert torch.equal(runners[name].leave(), alone[name])
        assert all(m.training for m in target.modules())


@pytest.mark.parametrize("leaving", list(permutations(("failing", "first", "plain"))), ids=str)
def test_a_forward_that_raises(leaving):
    """It leaves the others as they were."""
    model = tiny_model("gemma2")
    made, own, before = jobs(model), type(model.config), model.config._attn_implementation
    alone = {name: job() for name, job in made.items()}

    def failing():
        if getattr(threading.current_thread(), "fails", False):
            raise OSError("wanted")

    handle = model.lm_head.register_forward_pre_hook(lambda *_: failing())
    made["failing"] = made.pop("second")
    with holding(model) as runner:
        runners = {name: runner(job, 2) for name, job in made.items()}
        runners["failing"].fails = False
        for name in runners:
            runners[name].enter()
        runners["failing"].fails = True
        for name in leaving:
            result = runners[name].leave()
            if name == "failing":
                assert isinstance(result, OSError)
            else:
                assert torch.equal(result, alone[name])
    handle.remove()
    assert type(model.config) is own and model.config._attn_implementation == before
    assert torch.equal(made["failing"](), alone["second"])


def test_features_are_those_of_their_own_pass():
    model, layers = tiny_model("llama"), (0, 1, 2)

    def read(patched: PatchedModel, ids: torch.Tensor) -> torch.Tensor:
        cache = KVCache(2, ids.shape[1], 1, model.device)
        state = Pass(cache, [(cache, cache.lens)], ids.shape[1], feature_layers=layers)
        with torch.inference_mode():
            patched.forward(ids, torch.arange(ids.shape[1])[None], state, last_only=True)
        return state.features

    def plain(ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(ids).logits

    made = {
        "a": lambda: read(PatchedModel(model), prompt(9, seed=1)),
        "b": lambda: read(PatchedModel(model), prompt(12, seed=2)),
        "plain": lambda: plain(prompt(15, seed=3)),
    }
    alone = {name: job() for name, job in made.items()}
    for entering in permutations(made):
        for leaving in permutations(made):
            with holding(model) as runner:
                runners = {name: runner(made[name], 1) for name in entering}
                for name in entering:
                    runners[name].enter()
                for name in leaving:
                    assert torch.equal(runners[name].leave(), alone[name])
    assert not model.model.layers[0]._forward_pre_hooks and not model.model._forward_hooks


def test_what_others_do_with_the_configuration_meanwhile():
    """They may copy it, store it, ask it for its attention and give it another one."""
    model = tiny_model("llama")
    made = jobs(model)
    alone, own = {name: job() for name, job in made.items()}, type(model.config)
    options = dict(max_new_tokens=NEW, do_sample=False)
    before, written = copy.deepcopy(model.config), model.generate(prompt(40, seed=1), **options)
    with holding(model) as runner:
        waiting = runner(made["first"], 2)
        waiting.enter()
        assert type(model.config) is not own
        for copied in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
            assert type(copied) is own and copied == before
        assert isinstance(model.config, own) and type(model.config).__name__ == own.__name__
        assert model.config.to_dict() == before.to_dict()
        assert repr(model.config) == repr(before)
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        other = SpecExtend(model, "ngram")
        assert torch.equal(other.generate(prompt(40, seed=1), **options), written)
        assert torch.equal(waiting.leave(), alone["first"])
    assert type(model.config) is own and model.config._attn_implementation == "eager"


def test_two_models_on_one_configuration():
    target = tiny_model("llama")
    other = type(target)(target.config).eval()
    made, before = jobs(target), target.config._attn_implementation
    alone, spec = made["first"](), SpecExtend(other, None)
    ids = prompt(20)
    theirs = other.generate(ids, max_new_tokens=NEW, do_sample=False)
    with holding(target) as runner:
        waiting = runner(made["first"], 2)
        waiting.enter()
        assert torch.equal(spec.generate(ids, max_new_tokens=NEW, do_sample=False), theirs)
        assert torch.equal(waiting.leave(), alone)
    assert target.config._attn_implementation == before


def test_compiled_forwards():
    """They are traced anew where our attention is named, and once more where it is not."""
    model, other = tiny_model("llama"), tiny_model("llama")
    torch.compiler.reset()
    model.model.layers[1].self_attn.compile(backend="eager", dynamic=True)
    made, expected = jobs(model), jobs(other)
    for name in ("plain", "first", "plain", "first"):
        assert torch.equal(made[name](), expected[name]())
    torch.compiler.reset()
