"""Tests that with ``exact=True`` a row's bits do not depend on the rows beside it, and text follows
plain decoding in every dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from kv_cases import run_with_threads, same_bits
from models import FAMILIES, VOCAB, prompt, tiny_model
from tape import Tapes
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from specextend import SpecConfig, SpecExtend, assets, ops
from specextend.cache import KVCache, Pass
from specextend.exact import RowInvariant, refusal
from specextend.target import Target
from specextend.testing import ancestor_mask, pack_mask

BF16 = torch.bfloat16
SMALL = SpecConfig(
    chunk_size=8, budget=32, sink_chunks=1, recent_chunks=1, retrieve_every=2, prefill_chunk=40,
    draft_prefill_window=16, gate="off", tree_nodes=9, tree_depth=4, tree_threshold=0.0, seed=7,
    exact=True,
)  # fmt: skip
# Wide and flat: near-ties are everywhere, and torch's own products differ even in bf16.
NEAR_TIES = dict(hidden_size=512, intermediate_size=3072, initializer_range=0.02)


class Prefilled:
    """Holds a model behind a prompt, for passes over trees that leave no trace."""

    def __init__(self, model, length: int):
        self.target = Target(model)
        ids = prompt(length)
        self.cache = KVCache(self.target.num_layers, length + 80, batch=1, device=ids.device)
        state = Pass(self.cache, [(self.cache, self.cache.lens)], length)
        self.target.forward(ids, torch.arange(length)[None], state, last_only=True)
        self.cache.advance(length)

    def logits(self, tokens, parents):
        """Return [M, V] of a tree; the root alone has no mask, as in the loop."""
        depths = torch.zeros(1, len(parents), dtype=torch.int32)
        for node, parent in enumerate(parents[1:], 1):
            depths[0, node] = depths[0, parent] + 1
        mask = None
        if len(parents) > 1:
            mask = pack_mask(ancestor_mask(torch.tensor(parents)))[None]
        shape = dict(mask=mask)
        if mask is not None:
            shape |= dict(q_depths=depths, k_depths=depths)
        state = Pass(self.cache, [(self.cache, self.cache.lens)], len(parents), **shape)
        with RowInvariant():
            return self.target.forward(tokens, self.cache.lens[:, None].long() + depths, state)[0]

    def agree(self) -> bool:
        """Compare the root alone with the root of trees of many sizes."""
        same = True
        for nodes in (2, 3, 9, 16, 33, 64):
            generator = torch.Generator().manual_seed(nodes)
            tokens = torch.randint(3, VOCAB, (1, nodes), generator=generator)
            parents = [-1]
            for node in range(1, nodes):
                parents.append(int(torch.randint(0, node, (1,), generator=generator)))
            alone, tree = self.logits(tokens[:, :1], [-1]), self.logits(tokens, parents)
            same &= same_bits(alone[0], tree[0])
        return same


@pytest.mark.sweep(21)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_families(family):
    """In fp32, where a model's own products nearly always differ, and in bf16."""
    for dtype in (torch.float32, BF16):
        assert Prefilled(tiny_model(family, dtype=dtype), 50).agree(), dtype


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.inference_mode()
def test_experts(family, experts):
    for dtype in (torch.float32, BF16):
        model = tiny_model(family, dtype=dtype, experts_implementation=experts)
        assert Prefilled(model, 50).agree(), dtype


def test_other_numbers_of_threads():
    """Outside inference mode, too, where operators arrive in their parts."""
    for threads in (1, 3):
        with torch.no_grad():
            behind = Prefilled(tiny_model(intermediate_size=3072), 50)
            assert run_with_threads(threads, behind.agree)


# ---- operators -----------------------------------------------------------------------------------

D = 200
WEIGHT = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
CONV = Conv1D(D, D)


def heads(x):
    """View rows [M, D] as five heads [M, 5, 40]."""
    return x.view(-1, 5, 40)


def per_head(x, w):
    """Multiply heads before rows, as attention has them: [1, 5, M, 40]."""
    return (heads(x)[None].transpose(1, 2) @ w[:40]).transpose(1, 2)[0]


def our_norms(x, w):
    total = ops.add_rms_norm(x, x, w[1], eps=1e-6, offset=1.0, round_first=False)[0]
    return total + ops.rms_norm(x, w[0], eps=1e-6)


def our_rotation(x, w):
    q, cache = heads(x)[None], x.new_zeros(2, 1, len(x), 5, 40)
    factors = w[:2, :40].unsqueeze(1).expand(2, len(x), 40)
    given = (q, q, q, *factors[:, None], *cache, torch.zeros(1, dtype=torch.int32))
    return ops.rotary_append(*given)[0] + cache[0, 0]


FUNCTIONS = {
    "linear": lambda x, w: F.linear(x, w, w[0]),
    "matmul": lambda x, w: x @ w,
    "conv1d": lambda x, w: copy.deepcopy(CONV).to(x.dtype)(x),
    "addmm": lambda x, w: torch.addmm(x, x, w, beta=0.5, alpha=2.0),
    "lora": lambda x, w: F.linear(x, w) + F.linear(F.linear(x, w[:8]), w[:, :8]) * 0.3,
    "einsum": lambda x, w: torch.einsum("md,de->me", x, w),
    "einsum, swapped": lambda x, w: torch.einsum("de,me->md", w, x),
    "einsum, heads": lambda x, w: torch.einsum("mhd,hde->mhe", heads(x), w.view(5, 40, -1)),
    "bmm": lambda x, w: torch.bmm(x[:, None], w.expand(len(x), -1, -1))[:, 0],
    "matmul of heads": per_head,
    "outer": lambda x, w: (w[:, :1] @ x[None, :, 0]).mT,
    "mv": lambda x, w: x @ w[0],
    "silu": lambda x, w: F.silu(x),
    "silu in place": lambda x, w: F.silu(x.clone(), inplace=True),
    "gelu": lambda x, w: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "tanh, exp, sin": lambda x, w: x.tanh() + (x / 9).exp() + x.sin() * x.cos(),
    "powers": lambda x, w: x.pow(3) + x.square() + x.abs().pow(0.7) + 1.5**x,
    "softplus": lambda x, w: F.softplus(x) + F.mish(x) + F.hardswish(x) + F.relu(x).square(),
    "a slice": lambda x, w: F.silu(x[:, 3:110]),
    "norms": lambda x, w: F.layer_norm(x, (D,), w[0]) + F.rms_norm(x, (D,), w[1]),
    "lengths": lambda x, w: x / x.norm(dim=-1, keepdim=True) + x.var(-1, keepdim=True),
    "rsqrt": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "softmax": lambda x, w: x.softmax(-1) + x.log_softmax(1) + x.logsumexp(-1, keepdim=True),
    "router": lambda x, w: torch.topk(x.float().softmax(-1), 4).values.to(x.dtype),
    "sums": lambda x, w: heads(x).sum(1) + x.view(-1, 40, 5).mean(-1) + heads(x).mean(1),
    "add": lambda x, w: torch.add(x, w[0], alpha=0.3) - torch.sub(x, w[1], alpha=0.7),
    "moves": lambda x, w: torch.cat([x[:, 7:], x.flip(-1)], -1).clamp(-2, 2),
    "our norms": our_norms,
    "our silu": lambda x, w: ops.silu_mul(x, w[0].expand_as(x)),
    "our rotation": our_rotation,
    "masks": lambda x, w: x.masked_fill(x > 1, 0).where(x > -1, x.argsort(-1) << 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
@torch.inference_mode()
def test_functions(name, dtype):
    """A row has the bits that it has alone, and the value that torch gives it."""
    function, w = FUNCTIONS[name], WEIGHT.to(dtype) / 14
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    for decomposed in (False, True):
        with torch.inference_mode(not decomposed), torch.no_grad(), RowInvariant():
            alone = torch.cat([function(x[i : i + 1], w) for i in range(40)])
            for rows in (2, 5, 17, 40):
                assert same_bits(function(x[:rows], w).contiguous(), alone[:rows]), rows
    tolerance = dict(rtol=4 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps)
    torch.testing.assert_close(alone, function(x, w), **tolerance)


@torch.inference_mode()
def test_long_rows():
    """Of a single row of so many elements torch makes parts for its threads."""
    x = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(0))
    for function in (
        lambda x: x.sum(-1, keepdim=True),
        lambda x: x.mean(-1, keepdim=True),
        lambda x: F.layer_norm(x, (70_000,)),
        lambda x: x.tanh().logsumexp(-1, keepdim=True),
    ):

        def compare(function=function):
            with RowInvariant():
                alone = torch.cat([function(x[i : i + 1]) for i in range(3)])
                together = function(x)
            assert same_bits(together, alone)
            torch.testing.assert_close(together, function(x))

        run_with_threads(2, compare)


UNKNOWN = {
    "aten.view_as_complex.default": lambda x: torch.view_as_complex(x.view(3, 4, 2)),
    "aten.mm.out": lambda x: torch.mm(x, x.mT, out=torch.empty(3, 3)),
    "aten.var.* over other dimensions": lambda x: x.var(True),
    "aten.index_put.* where terms are added up": lambda x: x.index_put(
        (torch.zeros(2, dtype=torch.int64),), x[:2], accumulate=True
    ),
    "aten.scatter.reduce is computed where terms": lambda x: x.scatter(
        0, torch.zeros(1, 8, dtype=torch.int64), x[:1], reduce="add"
    ),
    "aten.cumprod.default": lambda x: x.cumprod(0),
    "aten.sum.dim_IntList .* over the dimensions": lambda x: x.sum((0, 1)),
    "aten._softmax.default .* over other dimensions": lambda x: x.softmax(0),
    "aten.sum.dim_IntList .* over 65 terms in dimension 0": lambda x: x.expand(65, -1, -1).sum(0),
    "aten.pow.Tensor_Tensor .* of 2 tensors": lambda x: x.abs() ** x,
    "aten.mm.default .* in float64": lambda x: x.double() @ x.double().mT,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(name):
    x = torch.randn(3, 8)
    with RowInvariant():
        with pytest.raises(NotImplementedError, match=f"exact=True does not know how {name}"):
            UNKNOWN[name](x)
        assert torch.equal(x + x, 2 * x)  # and it goes on
    assert x.cumprod(0).shape == x.shape


# ---- text ----------------------------------------------------------------------------------------


def texts(model, draft, config, ids, count, **kwargs):
    """Return what is written plainly and with a draft, and the loop of the latter."""
    spec = SpecExtend(model, draft, config)
    plain = SpecExtend(model, None, config)
    kwargs = dict(max_new_tokens=count, do_sample=False) | kwargs
    return plain.generate(ids, **kwargs), spec.generate(ids, **kwargs), spec


@pytest.fixture(scope="module")
def flat():
    return tiny_model(dtype=BF16, **NEAR_TIES)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["model", "ngram", "self", "identical"])
def test_text(flat, kind, sampled):
    draft = {
        "model": tiny_model(seed=1, dtype=BF16), "identical": copy.deepcopy(flat)
    }.get(kind, kind)  # fmt: skip
    how = dict(do_sample=True, temperature=0.3, top_p=0.9) if sampled else {}
    for length in (1, 70):
        plain, spec, _ = texts(flat, draft, SMALL, prompt(length), 40, **how)
        assert torch.equal(plain, spec), length


def test_the_option_reaches_the_forward():
    """And no other forward: neither the prefill nor a draft's own."""
    seen = []
    target, draft = tiny_model(), tiny_model(seed=1)
    for model in (target, draft):

        def note(*arguments, model=model, **_):
            mode = torch.utils._python_dispatch._get_current_dispatch_mode()
            seen.append((model is target, arguments[1].shape[1], isinstance(mode, RowInvariant)))

        model.model.embed_tokens.register_forward_hook(lambda m, a, out, n=note: n(m, out))
    for exact in (True, False):
        spec = SpecExtend(target, draft, SMALL.replace(exact=exact))
        seen.clear()
        spec.generate(prompt(60), max_new_tokens=12, do_sample=False)
        prefill = [on for is_target, rows, on in seen if is_target and rows in (40, 19)]
        verify = [on for is_target, rows, on in seen if is_target and rows not in (40, 19)]
        assert prefill == [False] * 2 and len(verify) > 3 and set(verify) == {exact}
        assert not any(on for is_target, _, on in seen if not is_target)


@pytest.fixture(scope="module")
def embedded():
    paths = assets.target_path(), assets.draft_path()
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=BF16).eval() for p in paths]
    return *models, AutoTokenizer.from_pretrained(paths[0], model_max_length=10**9)


def documents(tokenizer, length: int) -> list[torch.Tensor]:
    """Return parts [1, length] of the documents that the pair never saw."""
    found = []
    for _, text in assets.held_out_documents():
        ids = torch.tensor([tokenizer(text).input_ids])
        found += [part for part in ids.split(length, 1) if part.shape[1] == length]
    return found


def of_kind(kind, draft):
    if kind == "model":
        return draft
    return assets.draft_path(kind) if kind in assets.DRAFTS else kind


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", [*assets.DRAFTS, "ngram", "self"])
def test_embedded(embedded, kind):
    target, draft, tokenizer = embedded
    config = SpecConfig(exact=True, gate="off", seed=3, **assets.SETTINGS)
    for i, ids in enumerate(documents(tokenizer, 600)[:2]):
        how = dict(do_sample=True) if i else {}
        plain, spec, loop = texts(target, of_kind(kind, draft), config, ids, 30, **how)
        assert torch.equal(plain, spec)
    assert loop.stats.num_draft_tokens > 0


@pytest.mark.long
def test_long_text_of_100_000_tokens(embedded):
    """Greedy and sampled by turns, with all kinds of drafts, by trees of several shapes."""
    target, draft, tokenizer = embedded
    settings = dict(exact=True, gate="off", seed=3, prefill_chunk=256, **assets.SETTINGS)
    shapes = {}, dict(tree_nodes=20, tree_depth=6), dict(tree_shape="fixed", tree_widths=(4, 6, 4))
    kinds = [*assets.DRAFTS, "ngram", "self"]
    total, parts = 0, documents(tokenizer, 300)
    for i, ids in enumerate(parts * 2):
        config = SpecConfig(**settings | shapes[i % 3])
        how = dict(do_sample=True, top_p=0.95) if i % 4 == 3 else {}
        kind = of_kind(kinds[i % 5], draft)
        plain, spec, _ = texts(target, kind, config, ids, 600, **how)
        assert torch.equal(plain, spec), (i, kinds[i % 5])
        total += spec.shape[1] - ids.shape[1]
        if total >= 100_000:
            return
    raise AssertionError(f"too few documents: {total} tokens")


def test_captured(flat):
    """The operators of a recorded round are those that make it exact."""
    draft, tapes, ids = tiny_model(seed=1, dtype=BF16), Tapes(), prompt(60)
    captured = SpecExtend(flat, draft, SMALL, recorder=tapes)
    got = captured.generate(ids, max_new_tokens=40, do_sample=False)
    plain = SpecExtend(flat, None, SMALL).generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(got, plain)
    assert sum(tape.replays for tape in tapes) > 5


# ---- refusals ------------------------------------------------------------------------------------


class Doubled(torch.nn.Parameter):
    """Stands in for a weight of a library that quantises."""


def test_refusals():
    model = tiny_model()
    assert refusal(model) is None
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.__class__ = Doubled
    message = "exact=True does not serve LlamaForCausalLM: its weight model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=f"^{message}.weight is a Doubled"):
        SpecExtend(model, None, SMALL).generate(prompt(5), max_new_tokens=3)
    model = tiny_model()
    model.is_quantized = True
    assert "quantised" in refusal(model)
    with pytest.raises(ValueError, match="exact=True needs tree_attention=True"):
        SpecConfig(exact=True, tree_attention=False)


def test_compiled_models_are_refused():
    whole, part, forward = tiny_model(), tiny_model(), tiny_model()
    whole.compile(backend="eager")
    part.model.layers[0] = torch.compile(part.model.layers[0], backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    for model in (whole, part, forward):
        assert "compiled by torch.compile" in refusal(model)
