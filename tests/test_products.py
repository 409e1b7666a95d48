"""Tests which products of models are ours, and that they are right."""

from __future__ import annotations

import math
import threading
from contextlib import ExitStack

import pytest
import torch
from drafts import KINDS, SMALL, draft, target
from models import prompt, tiny_model
from torch import nn
from torch.nn import functional as F

from specextend import SpecExtend, ops, products
from specextend.products import OwnProducts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def ours(monkeypatch):
    """Count the rows of our products."""
    rows = []

    class Ops:
        @staticmethod
        def invariant_linear(x, *rest):
            rows.append(x.numel() // x.shape[-1])
            return ops.invariant_linear(x, *rest)

    monkeypatch.setattr(products, "ops", Ops)
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("most", [16, math.inf])
def test_values(dtype, bias, most, ours, monkeypatch):
    monkeypatch.setitem(products._MOST, dtype, most)
    layer = nn.Linear(70, 33, bias=bias).to(dtype)
    few = OwnProducts(nn.Sequential(layer))
    for shape in ((1, 1), (1, 2), (3,), (2, 6), (16,), (1, 17), (300,), (0,), ()):
        x = torch.randn(*shape, 70).to(dtype)
        with torch.inference_mode(), few.active():
            got = layer(x)
        rows = x.numel() // 70
        assert ours == ([rows] if rows <= most else [])
        ours.clear()
        exact = F.linear(x.double(), *(p.double() for p in layer.parameters()))
        assert got.dtype == dtype and got.shape == exact.shape
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_what_torch_has_no_products_of_is_always_ours(ours):
    """In such a dtype torch's own take plain loops."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
        assert (products._MOST[dtype] == math.inf) == (not supported)
    assert products._MOST[torch.float32] < 100


def test_only_while_active(ours):
    layer = nn.Linear(8, 8)
    few, x = OwnProducts(layer), torch.randn(1, 8)
    layer(x)
    with torch.inference_mode(), few.active():
        thread = threading.Thread(target=torch.inference_mode()(lambda: layer(x)))
        thread.start(), thread.join()
        assert not ours
        layer(x)
        assert ours == [1]
    with pytest.raises(ZeroDivisionError), few.active():
        1 / 0  # noqa: B018
    layer(x)
    assert ours == [1] and "forward" not in vars(layer)


def test_what_somebody_changed_stays(ours):
    class Other(nn.Linear):
        pass

    other, hooked = Other(8, 8), nn.Linear(8, 8)
    hooked.forward = lambda x: x + 1
    few, x = OwnProducts(nn.ModuleList([other, hooked])), torch.randn(1, 8)
    with torch.inference_mode(), few.active():
        other(x)
        assert torch.equal(hooked(x), x + 1)
    assert not ours and torch.equal(hooked(x), x + 1)


def test_gradients_and_other_weights_are_torchs(ours):
    layer, x = nn.Linear(8, 8), torch.randn(1, 8)
    with OwnProducts(layer).active():
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.weight = nn.Parameter(layer.weight.bfloat16())
    with torch.inference_mode(), OwnProducts(layer).active(), pytest.raises(RuntimeError):
        layer(x)  # torch's own error
    assert not ours


def test_two_drafts_of_one_model(ours):
    layer = nn.Linear(8, 8)
    one, two = OwnProducts(layer), OwnProducts(layer)
    with torch.inference_mode(), ExitStack() as both:
        both.enter_context(one.active())
        with two.active():
            layer(torch.randn(1, 8))
        layer(torch.randn(1, 8))
    assert ours == [1, 1] and "forward" not in vars(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_use_them(kind, ours, tmp_path):
    """The target's and those of every draft with layers of its own."""
    ids, model = prompt(60), target()
    config = SMALL.replace(prefill_chunk=32)  # no part of the prompt has few rows
    spec = SpecExtend(model, draft(kind, config, tmp_path), config)
    ours.clear()
    out = spec.generate(ids, max_new_tokens=20, do_sample=False)
    of_target = sum(type(m) is nn.Linear for m in model.modules()) * (1 + spec.stats.num_rounds)
    assert len(ours) == of_target if kind in ("none", "ngram") else len(ours) > of_target
    ours.clear()
    assert torch.equal(out, model.generate(ids, max_new_tokens=20, do_sample=False))
    assert not ours


def test_a_model_of_its_own():
    """Not the layers of another model."""
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    assert {id(m) for m in OwnProducts(one)._layers}.isdisjoint(other.modules())
