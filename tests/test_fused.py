"""Our operators between a model's products: the bits stay, and it is known where they are."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections import Counter

import pytest
import torch
from models import FAMILIES, prompt, tiny_model
from tape import Tapes, launches

from specextend import SpecConfig, SpecExtend, fused
from specextend.attention import PatchedModel
from specextend.cache import KVCache, Pass, current_pass
from specextend.fused import Fusion, unfused

PREFIX = 9
PARENTS = (-1, 0, 0, 1, 1)
DEPTHS = (0, 1, 1, 2, 2)
MASKS = (0b00001, 0b00011, 0b00101, 0b01011, 0b10011)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read(model, num_caches: int = 1) -> list[torch.Tensor]:
    """Read a text and verify a tree behind it: the logits of both, keys and values."""
    patched, tree = PatchedModel(model), len(PARENTS)
    caches = [
        KVCache(patched.num_layers, PREFIX + tree, 1, model.device) for _ in range(num_caches)
    ]
    writes = [(cache, cache.lens) for cache in caches]
    ids = prompt(PREFIX + tree).to(model.device)
    depths = torch.tensor([DEPTHS], dtype=torch.int32, device=model.device)
    shape = dict(
        mask=torch.tensor([MASKS], device=model.device)[..., None],
        q_depths=depths,
        k_depths=depths,
    )
    with torch.inference_mode():
        positions = torch.arange(PREFIX, device=model.device)[None]
        first = patched.forward(ids[:, :PREFIX], positions, Pass(caches[0], writes, PREFIX))
        for cache in caches:
            cache.advance(PREFIX)
        state = Pass(caches[0], writes, tree, **shape)
        second = patched.forward(ids[:, PREFIX:], PREFIX + depths.long(), state)
    rows = [t for cache in caches for layer in cache.layers for t in (layer.keys, layer.values)]
    return [first, second, *rows]


def assert_same_bits(model, num_caches: int = 1) -> None:
    got = read(model, num_caches)
    with unfused():
        expected = read(model, num_caches)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def fusions(model) -> Counter:
    """Count what is computed by our operators, by kind."""
    patched = PatchedModel(model)
    patched.find_windows()
    return Counter(f.kind for f in patched.find_fusions())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_the_models_own(family, dtype):
    assert_same_bits(tiny_model(family, dtype=dtype))


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_at_real_widths(family, dtype, threads):
    """Where torch shares rows and elements out among threads in its own way."""
    model = tiny_model(
        family, dtype=dtype, hidden_size=896, intermediate_size=4864, num_attention_heads=14,
        head_dim=64, max_position_embeddings=1024,
    )  # fmt: skip
    assert fusions(model)["layer"] == 2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 7, 300, 1000):
            got = prefill(model, rows)
            with unfused():
                assert torch.equal(got, prefill(model, rows))
    finally:
        torch.set_num_threads(before)


def prefill(model, rows: int) -> torch.Tensor:
    """Return the logits of a text."""
    cache = KVCache(2, rows, 1, model.device)
    with torch.inference_mode():
        return PatchedModel(model).forward(
            prompt(rows), torch.arange(rows)[None], Pass(cache, [(cache, cache.lens)], rows)
        )


ALL = dict(norm=5, gated=2, attention=2, layer=2)  # of two layers and the last norm


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", ALL),
        ("qwen2", ALL),
        ("qwen3", ALL | dict(norm=9)),  # queries and keys have norms
        ("mistral", ALL),
        ("phi3", ALL),  # merged projections
        ("smollm3", ALL),
        ("granite", ALL),
        ("gemma", dict(norm=5, attention=2, layer=2)),  # GELU
        ("gemma3_text", dict(norm=13, attention=2, layer=2)),  # four norms to a layer
        ("mixtral", dict(norm=5, attention=2, layer=2)),  # experts
        ("qwen3_moe", dict(norm=9, attention=2, layer=2)),
        ("gpt_oss", dict(norm=5, layer=2)),  # cosines of half a head
        ("olmo2", dict(norm=9, gated=2)),  # cosines in fp32; norms behind
        ("glm4", dict(norm=9, gated=2, layer=2)),  # neighbours are rotated
        ("cohere", dict(gated=2)),  # the same; LayerNorm
        ("starcoder2", dict(attention=2)),  # LayerNorm, GELU
        ("gpt2", {}),
        ("opt", {}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_is_known(family, expected, dtype):
    assert fusions(tiny_model(family, dtype=dtype)) == expected


class TestPasses:
    def test_two_caches(self):
        """A draft writes to two at once; their rows may be at other places."""
        assert_same_bits(tiny_model("llama", dtype=torch.bfloat16), num_caches=2)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_padded_rows(self, batch):
        """Positions, and with them cosines, are those of each row."""
        model = tiny_model("llama")
        patched, ids = PatchedModel(model), prompt(6 * batch).view(batch, 6)
        positions = torch.arange(6) + torch.arange(batch)[:, None]

        def run() -> torch.Tensor:
            cache = KVCache(2, 8, batch, model.device)
            with torch.inference_mode():
                return patched.forward(ids, positions, Pass(cache, [(cache, cache.lens)], 6))

        got = run()
        with unfused():
            assert torch.equal(got, run())

    def test_ablation_without_our_attention(self):
        model = tiny_model("llama")
        got = []
        for own in (False, True):
            cache = KVCache(2, 8, 1, model.device)
            state = Pass(cache, [(cache, cache.lens)], 6, fused=False)
            with torch.inference_mode(), unfused() if own else contextlib.nullcontext():
                got.append(PatchedModel(model).forward(prompt(6), torch.arange(6)[None], state))
        assert torch.equal(*got)

    def test_what_a_layer_does_not_keep_to_is_an_error(self):
        """A forward that does otherwise than in the trial must not go on with wrong keys."""
        cache = KVCache(1, 8, 1, torch.device("cpu"))
        q, k = torch.randn(2, 1, 2, 3, 8).unbind()
        cos, sin = torch.randn(2, 1, 3, 8).unbind()

        def state() -> Pass:
            made = Pass(cache, [(cache, cache.lens)], 3)
            made.leave_rotation(q, k, cos, sin)
            return made

        with pytest.raises(RuntimeError, match="stores other keys"):
            state().write(0, k.clone(), k)
        with pytest.raises(RuntimeError, match="has not stored"):
            state().queries(q)
        with pytest.raises(RuntimeError, match="rotates twice"):
            state().leave_rotation(q, k, cos, sin)
        good = state()
        good.write(0, k, k)
        with pytest.raises(RuntimeError, match="other queries"):
            good.queries(q.clone())

    def test_other_forwards_are_the_models_own(self):
        """Outside of passes, and in another thread while one is under way."""
        model, seen = tiny_model("llama"), []
        norm, x = model.model.norm, torch.randn(1, 3, 32)
        expected = norm(x)
        ran = []
        forward = type(norm).forward
        here = threading.current_thread()

        def noting(self, x):
            ran.append(threading.current_thread() is here)
            return forward(self, x)

        def beside(module, args) -> None:
            assert type(norm.forward) is Fusion
            thread = threading.Thread(target=lambda: seen.append(norm(x)))
            thread.start()
            thread.join()

        PatchedModel(model).find_windows()
        type(norm).forward = noting
        try:
            patched = PatchedModel(model)
            patched.find_fusions()
            ran.clear()
            with model.model.layers[1].register_forward_pre_hook(beside):
                read(model)
        finally:
            type(norm).forward = forward
        assert len(seen) == 2 and all(torch.equal(t, expected) for t in seen)
        assert ran == [False, False]
        assert not any("forward" in vars(m) for m in model.modules())

    def test_everything_is_put_back_when_a_forward_fails(self):
        model = tiny_model("llama")

        def fail(module, args) -> None:
            raise ZeroDivisionError

        read(model)
        with model.model.layers[1].mlp.register_forward_pre_hook(fail):
            with pytest.raises(ZeroDivisionError):
                read(model)
        assert not any("forward" in vars(m) for m in model.modules())


class TestTrial:
    @pytest.mark.parametrize("spoilt", [None, "keys", "values", "out", "error"])
    def test_what_is_written_counts(self, monkeypatch, spoilt):
        """Also the last bit of what no other row has read by then."""

        def attentions(module, known):
            def forward(*args, **kwargs):
                out, weights = own(*args, **kwargs)
                if spoilt == "error":
                    raise TypeError
                layer = current_pass().cache.layers[module.layer_idx]
                wrong = dict(keys=layer.keys, values=layer.values, out=out).get(spoilt)
                if wrong is not None:
                    last = wrong.view(-1)[-1:]
                    last.copy_(torch.nextafter(last, last + 1))
                return out, weights

            own = module.forward
            if hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
                yield Fusion("attention", module, own, forward)

        monkeypatch.setattr(fused, "_KINDS", (attentions,))
        assert fusions(tiny_model("llama")) == ({} if spoilt else dict(attention=2))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [32, 4096])
    def test_norms_on_a_gpu(self, width, dtype):
        """The order of a sum is told from another form: a sum with its last bits moved stands in
        for it."""
        x, weight = torch.randn(fused.TOKENS, width).to(dtype), torch.randn(width).to(dtype)

        def norm(offset: float, round_first: bool, moved: float = 0.0) -> torch.Tensor:
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) * (1 + moved) + 1e-6)
            if round_first:
                return weight * h.to(dtype)
            return ((offset + weight.float()) * h).to(dtype)

        forms = [(0.0, True), (1.0, False), (0.0, False)]
        for ours in forms:
            for theirs in forms:
                alike = ours == theirs or (dtype == torch.float32 and ours[0] == theirs[0])
                for moved in (-3e-7, 0.0, 3e-7):
                    got = fused._same_but_for_order(norm(*ours, moved), norm(*theirs))
                    assert got == alike

    def test_each_form_is_tried_once(self, monkeypatch):
        tried = []
        passes = fused._Trial.passes
        monkeypatch.setattr(
            fused._Trial, "passes", lambda *a: (tried.append(a[1].kind), passes(*a))[1]
        )
        assert fusions(tiny_model("llama", num_hidden_layers=6))["layer"] == 6
        assert tried == ["norm", "gated", "attention", "layer"]
        tried.clear()
        model = tiny_model("gemma3_text")  # of two kinds of layers
        assert fusions(model)["layer"] == 2
        assert Counter(tried) == dict(norm=2 * 2, gated=1, attention=2, layer=2)

    def test_a_model_is_tried_once(self, monkeypatch):
        """And again where it computes otherwise."""
        model, tried = tiny_model("llama"), []
        find = PatchedModel.find_fusions
        monkeypatch.setattr(
            PatchedModel, "find_fusions", lambda self: (tried.append(1), find(self))[1]
        )
        for _ in range(2):
            read(model)
        assert len(tried) == 1
        read(model.to(torch.bfloat16))
        assert len(tried) == 2
        SpecExtend(model)
        assert len(tried) == 3

    def test_models_are_let_go(self):
        model = tiny_model("llama")
        read(model)
        left = weakref.ref(model), weakref.ref(model.model.layers[0])
        del model
        gc.collect()
        assert [reference() for reference in left] == [None, None]


class TestWhatOthersChange:
    """What is not the model's own any more is left alone, before the trial and behind it."""

    @pytest.mark.parametrize("after", [False, True])
    def test_a_forward_in_the_instance(self, after):
        model, called = tiny_model("llama"), []
        if after:
            assert fusions(model) == ALL
        for module in (model.model.norm, model.model.layers[0].mlp, model.model.layers[0]):
            own = module.forward
            module.forward = lambda *a, own=own, **k: (called.append(own), own(*a, **k))[1]
        if not after:
            assert fusions(model) == ALL | dict(norm=4, gated=1, layer=1)
        called.clear()
        assert_same_bits(model)
        assert len(called) == 4 * 3  # two forwards, with our operators and without

    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("part", ["post_attention_layernorm", "mlp.act_fn"])
    def test_a_forward_in_what_is_skipped(self, part, after):
        model = tiny_model("llama")
        if after:
            assert fusions(model) == ALL
        module = model.model.layers[0].get_submodule(part)
        own = module.forward
        module.forward = lambda x: own(x) * 2
        assert_same_bits(model)
        module.forward = lambda x: own(x) * 3  # the trial of the one before does not count
        assert_same_bits(model)

    def test_a_class_of_ones_own(self):
        """It has the attributes, but computes something else."""

        class HalfRMSNorm(type(tiny_model("llama").model.norm)):
            def forward(self, x):
                return super().forward(x) * 0.5

        class SquaredMLP(type(tiny_model("llama").model.layers[0].mlp)):
            def forward(self, x):
                return super().forward(x) ** 2

        model = tiny_model("llama")
        model.model.norm.__class__ = HalfRMSNorm
        model.model.layers[0].mlp.__class__ = SquaredMLP
        assert fusions(model) == ALL | dict(norm=4, gated=1)
        assert_same_bits(model)

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_weights_that_hide_the_form(self, dtype):
        """With weights of ones, to round before them or behind them is the same."""
        model = tiny_model("olmo2", dtype=dtype)
        assert fusions(model)["norm"] == 9  # of ones
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.data.normal_()
        assert_same_bits(model)

    def test_another_dtype_behind_the_trial(self):
        """In fp32, where nothing is rounded, a norm does not show where it would be."""
        model = tiny_model("olmo2")
        assert fusions(model)["norm"] == 9
        model.to(torch.bfloat16)
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.data.normal_()
        assert_same_bits(model)

    @pytest.mark.parametrize("after", [False, True])
    def test_hooks_run(self, after):
        """Also those of modules that our forwards would pass over."""
        model, calls = tiny_model("llama"), []
        if after:
            assert fusions(model) == ALL
        layer = model.model.layers[0]
        modules = (layer, layer.self_attn, layer.post_attention_layernorm, layer.mlp.act_fn)
        for module in modules:
            module.register_forward_hook(lambda m, args, out: calls.append(type(m)))
        read(model)
        calls.clear()
        read(model)
        assert Counter(calls) == Counter([type(m) for m in modules] * 2)

    def test_a_hook_that_changes_what_is_skipped(self):
        model = tiny_model("llama")
        assert fusions(model) == ALL
        norm = model.model.layers[0].post_attention_layernorm
        norm.register_forward_hook(lambda module, args, out: out * 2)
        assert_same_bits(model)

    def test_compiled_models_stay_as_they_are(self):
        model = tiny_model("llama")
        model.model.layers[0].compile(backend="eager")
        assert not fusions(model)

    def test_two_models_share_layers(self):
        """Both at once, the one's forward within the other's."""
        model, other = tiny_model("llama"), tiny_model("llama", seed=1)
        other.model.layers = model.model.layers
        expected = read(other)

        def beside(module, args) -> None:
            if not got:
                got.append(None)
                got[0] = read(other)

        got: list = []
        read(model)
        with model.model.layers[0].register_forward_pre_hook(beside):
            read(model)
        assert all(torch.equal(a, b) for a, b in zip(got[0], expected, strict=True))
        assert not any("forward" in vars(m) for m in [*model.modules(), *other.modules()])


CONFIG = SpecConfig(
    chunk_size=8, budget=32, sink_chunks=1, recent_chunks=1, retrieve_every=2, prefill_chunk=40,
    draft_prefill_window=16, gate="off", tree_nodes=9, tree_depth=4, seed=7,
)  # fmt: skip


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("draft", [None, "ngram", "self", "model"])
def test_exact_text(draft, dtype):
    """Where a row's bits must be its own, ours are among the operators whose are."""
    model = tiny_model("llama", dtype=dtype)
    source = tiny_model("llama", seed=1, dtype=dtype) if draft == "model" else draft
    config = CONFIG.replace(exact=True, draft_cache="retrieval")
    options = dict(max_new_tokens=24, do_sample=False)
    got = SpecExtend(model, source, config).generate(prompt(50), **options)
    with unfused():
        expected = SpecExtend(model, None, config).generate(prompt(50), **options)
    assert torch.equal(got, expected)


LAYER = {
    "aten.linear": 7, "specextend.rms_norm": 1, "specextend.rotary_append": 1,
    "specextend.tree_attention": 2, "specextend.add_rms_norm": 1, "specextend.silu_mul": 1,
    "aten.add": 1,
}  # fmt: skip


class TestKernels:
    """What is launched for a layer, in the captured rounds of target and draft."""

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize(
        "family, expected",
        [
            ("llama", LAYER),
            ("qwen2", LAYER),
            ("mistral", LAYER),
            ("qwen3", LAYER | {"specextend.rms_norm": 3}),
            ("phi3", LAYER | {"aten.linear": 4}),
        ],
    )
    def test_of_a_layer(self, family, expected):
        counts = []
        for layers in (2, 4):
            tapes = Tapes()
            target = tiny_model(family, num_hidden_layers=layers)
            draft = tiny_model("llama", seed=1)
            spec = SpecExtend(target, draft, CONFIG, recorder=tapes)
            spec.generate(prompt(40), max_new_tokens=30, do_sample=False)
            counts.append([Counter(launches(tape)) for tape in tapes[0].tapes])
        for less, more in zip(*counts, strict=False):  # as many as the gain asks for
            added = {name: (n - less[name]) / 2 for name, n in more.items() if n != less[name]}
            assert added == expected
            assert sum(added.values()) <= 14 + (family == "qwen3") * 2

    def test_of_a_drafts_rounds(self):
        counts = []
        for layers in (2, 4):
            tapes = Tapes()
            draft = tiny_model("llama", num_hidden_layers=layers)
            spec = SpecExtend(tiny_model("llama"), draft, CONFIG, recorder=tapes)
            spec.generate(prompt(40), max_new_tokens=30, do_sample=False)
            counts.append([Counter(launches(tape)) for tape in tapes[1].tapes])
        for less, more in zip(*counts, strict=False):
            added = {name: (n - less[name]) / 2 for name, n in more.items() if n != less[name]}
            forwards = added.get("aten.linear", 0) // 7  # none where a cache is filled again
            expected = {name: n * forwards for name, n in LAYER.items() if forwards}
            if forwards:  # what was decided goes to two caches
                expected["specextend.rotary_append"] += 1
            assert added == expected
