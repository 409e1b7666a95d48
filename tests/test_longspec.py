"""LongSpec's draft: the block against the paper, its ring, its tree, its files; losslessness."""

from __future__ import annotations

import json

import pytest
import torch
from models import prompt, tiny_model
from safetensors.torch import load_file, save_file

from specextend import SpecConfig, SpecExtend
from specextend.draft import Decided
from specextend.draft.longspec import WINDOW, LongSpecDraft, RingCache
from specextend.draft.longspec_block import BlockShape, LongSpecBlock, Rotation
from specextend.draft.longspec_checkpoint import load_block, published_shapes, save_block
from specextend.graphs import Graphs
from specextend.train.longspec import training_form
from specextend.train.target import FrozenTarget

CONFIG = SpecConfig(
    tree_shape="fixed", tree_widths=(2, 4, 3, 3), prefill_chunk=40, gate="off", seed=7
)
DEAD = {f"cross_attn.{p}_proj.{kind}" for p in "kv" for kind in ("weight", "bias")}
# Shapes of longspec's published drafts, their parameters, and those of them that nothing uses.
PUBLISHED = {
    "vicuna-7b": (BlockShape(4096, 32, 32, 128, 11008), 269.5e6, 33.6e6),
    "vicuna-13b": (BlockShape(5120, 40, 40, 128, 13824), 422.1e6, 52.4e6),
    "llama-3-8b": (BlockShape(4096, 32, 8, 128, 14336), 260.1e6, 8.4e6),
    "qwq-32b": (BlockShape(5120, 40, 8, 128, 27648), 550.5e6, 10.5e6),
}


def random_block(model, seed: int = 0, scale: float = 0.3) -> LongSpecBlock:
    """Make a block with every weight random, in the model's dtype."""
    torch.manual_seed(seed)
    block = LongSpecBlock(BlockShape.of_target(model))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, scale)
    return block.to(model.dtype).requires_grad_(False)


def make(model, window: int = WINDOW, config: SpecConfig = CONFIG, **kwargs) -> LongSpecDraft:
    return LongSpecDraft(random_block(model, **kwargs), model, config, window)


def greedy(model, ids, n=40):
    return model.generate(ids, max_new_tokens=n, do_sample=False)


@pytest.fixture(scope="module")
def target():
    return tiny_model("llama")


# ---- the formula ---------------------------------------------------------------------------------


def paper_block(state, x, cos, sin, keys, values, lag, window, eps):
    """Run the block over a whole text as the paper has it, row by row, with the published weights.

    x [L, h]; cos, sin [L, D]; keys, values [L, Hkv, D], already turned.
    """

    def linear(name, t):
        out = t @ state[f"{name}.weight"].T
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out

    def norm(name, t):
        return t / (t.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]

    def turn(t):  # [L, H, D]
        a, b = t.chunk(2, -1)
        return t * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    def attend(q, k, v, first, last):
        out = torch.zeros_like(q)
        group = q.shape[1] // k.shape[1]
        for t in range(len(q)):
            begin, end = max(0, first(t)), last(t) + 1
            for head in range(q.shape[1]):
                if end > begin:
                    scores = k[begin:end, head // group] @ q[t, head] / q.shape[-1] ** 0.5
                    out[t, head] = scores.softmax(0) @ v[begin:end, head // group]
        return out.flatten(1)

    dim = keys.shape[-1]
    y = norm("input_layernorm", x)
    q, k, v = (linear(f"self_attn.{p}_proj", y).unflatten(-1, (-1, dim)) for p in "qkv")
    out = attend(turn(q), turn(k), v, lambda t: t - window + 1, lambda t: t)
    x = x + linear("self_attn.o_proj", out)
    q = linear("cross_attn.q_proj", norm("post_self_attention_layernorm", x))
    out = attend(turn(q.unflatten(-1, (-1, dim))), keys, values, lambda t: 0, lambda t: t - lag)
    x = x + linear("cross_attn.o_proj", out)
    y = norm("post_cross_attention_layernorm", x)
    gate = torch.nn.functional.silu(linear("mlp.gate_proj", y))
    return x + linear("mlp.down_proj", gate * linear("mlp.up_proj", y))


class TestAgainstThePaper:
    @pytest.mark.sweep(19)
    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    @pytest.mark.parametrize("lag", [1, 2, 4])
    @pytest.mark.parametrize("window", [1, 7, 16, 40])
    def test_training_form(self, family, lag, window, tmp_path):
        """It agrees in fp64, through a file in the published format, at positions with a gap."""
        model = tiny_model(family)
        block = random_block(model).double()
        save_block(block, model, tmp_path / "b.pth", dtype=torch.float64)
        state = torch.load(tmp_path / "b.pth")
        length, shape = 37, block.shape
        generator = torch.Generator().manual_seed(lag)
        x, keys, values = (
            torch.randn(2, length, *size, generator=generator, dtype=torch.float64)
            for size in ((shape.hidden,), *[(shape.kv_heads, shape.head_dim)] * 2)
        )
        positions = torch.arange(length).expand(2, -1).clone()
        positions[1, 3:] += 100
        lags = (lag, lag + 2)  # each window has its own
        ours = training_form(
            block, Rotation(model), x, positions, keys, values, lags, window=window
        )
        for row in range(2):
            cos, sin = model.model.rotary_emb(x, positions[row : row + 1])
            theirs = paper_block(
                state, x[row], cos[0], sin[0], keys[row], values[row], lags[row], window,
                model.config.rms_norm_eps,
            )  # fmt: skip
            torch.testing.assert_close(ours[row], theirs, rtol=1e-9, atol=1e-9)


class Recorder(LongSpecDraft):
    """Keeps what the block was asked and what it said."""

    def begin(self, *args):
        super().begin(*args)
        self.roots, self.nodes = [], []

    def logits(self, tokens, positions, slots, tree):
        logits = super().logits(tokens, positions, slots, tree)
        if slots[0] >= 64 * self.ring.tree_words:
            self.roots.append((int(positions), logits[0, 0]))
            self.tree = []
        else:
            for i in range(tokens.shape[1]):
                self.tree.append(int(tokens[0, i]))
                path = [t for j, t in enumerate(self.tree) if int(tree[0, i, 0]) >> j & 1]
                self.nodes.append((int(self.roots[-1][0]), path, logits[0, i]))
        return logits


class TestTreeEqualsTrainingForm:
    """Rows of the tree step are those of the training form, lag = depth + 1 (positions, what is
    visible, windows, the ring, keys and values alone for all but the root)."""

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize("family", ["llama", "cohere", "glm4"])
    @pytest.mark.parametrize("window", [5, 24, 200])  # shorter than the prompt, and longer
    def test_rows(self, family, window):
        model = tiny_model(family)
        draft = Recorder(random_block(model), model, CONFIG, window)
        spec = SpecExtend(model, draft, CONFIG)
        kept = []
        draft.end = lambda: kept.extend([draft.roots, draft.nodes])
        text = spec.generate(prompt(61), max_new_tokens=20, do_sample=False)
        roots, nodes = kept
        assert len(roots) > 5 and {len(path) for _, path, _ in nodes} == {1, 2, 3}
        reader = FrozenTarget(model)
        for position, logits in roots[::3]:
            self.check(reader, draft, text[:, : position + 1], 1, logits)
        for position, path, logits in nodes[:: len(nodes) // 16]:
            whole = torch.cat([text[:, : position + 1], torch.tensor([path])], 1)
            self.check(reader, draft, whole, len(path) + 1, logits)

    def check(self, target, draft, ids, lag, logits):
        positions = torch.arange(ids.shape[1])[None]
        reading = target.read(ids, positions, logits=False)
        hidden = training_form(
            draft.block, draft.rotation, draft.embedding(ids), positions,
            reading.keys, reading.values, [lag], draft.window,
        )  # fmt: skip
        expected = draft.head(hidden[0, -1])
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


# ---- in the loop ---------------------------------------------------------------------------------


class TestLossless:
    @pytest.mark.sweep(3)
    @pytest.mark.parametrize(
        "family",
        ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "olmo3", "cohere",
         "glm4", "gpt_neox", "gpt_oss", "stablelm", "mixtral"],
    )  # fmt: skip
    def test_greedy(self, family):
        model, ids = tiny_model(family), prompt(90)
        spec = SpecExtend(model, make(model, window=24), CONFIG)
        assert torch.equal(
            spec.generate(ids, max_new_tokens=40, do_sample=False), greedy(model, ids)
        )

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize("length", [1, 24, 25, 120])
    @pytest.mark.parametrize("change", [{}, dict(tree_shape="opt"), dict(gate="auto")], ids=str)
    def test_lengths_and_trees(self, target, length, change):
        config, ids = CONFIG.replace(**change), prompt(length)
        spec = SpecExtend(target, make(target, window=24, config=config), config)
        assert torch.equal(spec.generate(ids, max_new_tokens=50, do_sample=False),
                           greedy(target, ids, 50))  # fmt: skip

    @pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, top_p=0.9)], ids=str)
    def test_sampled(self, target, options):
        kwargs = dict(max_new_tokens=40, do_sample=True, **options)
        plain = SpecExtend(target, None, CONFIG).generate(prompt(70), **kwargs)
        spec = SpecExtend(target, make(target, window=24), CONFIG)
        assert torch.equal(spec.generate(prompt(70), **kwargs), plain)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        """The same kernels with a draft and without give the same bits."""
        model = tiny_model("llama", dtype=dtype)
        plain = SpecExtend(model, None, CONFIG).generate(prompt(70), max_new_tokens=30)
        spec = SpecExtend(model, make(model, window=24), CONFIG)
        assert torch.equal(spec.generate(prompt(70), max_new_tokens=30), plain)

    def test_generations_do_not_see_each_other(self, target):
        def steps(spec, ids):
            return [s.tokens for s in spec.stream(ids, max_new_tokens=40, do_sample=False)]

        used = SpecExtend(target, make(target, window=24), CONFIG)
        steps(used, prompt(90, seed=1))
        fresh = SpecExtend(target, make(target, window=24), CONFIG)
        assert steps(used, prompt(33)) == steps(fresh, prompt(33))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("length", [20, 70])
def test_identical_weights_accept_to_full_depth(family, length, tmp_path):
    """A one-layer target whose last norm only scales is a block without cross-attention."""
    model = tiny_model(family, num_hidden_layers=1)
    layer = model.model.layers[0]
    model.model.norm.weight.data.fill_(1.0)
    state = {name: torch.zeros(size) for name, size in published_shapes(
        BlockShape.of_target(model)).items()}  # fmt: skip
    for name, tensor in layer.state_dict().items():
        name = name.replace("post_attention_", "post_cross_attention_")
        state[name] = tensor
    torch.save(state, tmp_path / "block.pth")
    config = CONFIG.replace(tree_widths=(1, 1, 1, 1))
    draft = LongSpecDraft(load_block(tmp_path / "block.pth", model), model, config)
    spec = SpecExtend(model, draft, config)
    spec.generate(prompt(length), max_new_tokens=41, do_sample=False)
    assert spec.stats.acceptance_histogram == {4: 8}


# ---- constant memory, constant prefill -----------------------------------------------------------


class TestConstantSize:
    def test_bytes_do_not_depend_on_the_context(self, target):
        draft = make(target)
        sizes = set()
        for length in (2_048, 131_072):
            ids = torch.zeros(1, length - 1, dtype=torch.int64)
            draft.begin(ids, length, None, Graphs())
            draft.prefill(Decided(ids))
            sizes.add(draft.ring.num_bytes)
        assert len(sizes) == 1

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_bytes_at_published_shapes(self, name):
        shape = PUBLISHED[name][0]
        widths = SpecConfig().tree_widths
        ring = RingCache(shape, WINDOW, sum(widths[:-1]), torch.float16, "meta")
        assert 2 * 2**20 < ring.num_bytes < 12 * 2**20
        assert ring.k.shape[1] == 64 + 513

    @pytest.mark.parametrize("length", [10, 50, 400])
    def test_prefill_stays_in_the_window(self, target, length):
        """Tokens that the block looks at up to the first tree's root."""
        window, seen = 32, []
        config = CONFIG.replace(tree_widths=(1,))  # one level, which is not run through the block
        draft = make(target, window, config)
        take = draft.embedding

        def counted(tokens):
            seen.append(tokens.shape[1])
            return take(tokens)

        draft.embedding = counted
        spec = SpecExtend(target, draft, config)
        spec.generate(prompt(length), max_new_tokens=12, do_sample=False)
        # the prompt and the first new token, which is the root; then rounds of one or two
        assert seen[:2] == [min(length + 1, window) - 1, 1]
        assert max(seen[2:]) <= 2


# ---- checkpoints ---------------------------------------------------------------------------------


class TestCheckpoints:
    @pytest.fixture
    def folder(self, target, tmp_path):
        save_block(random_block(target), target, tmp_path / "block", dtype=torch.float32)
        return tmp_path / "block"

    def rewrite(self, folder, change):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
    @pytest.mark.parametrize("name", ["block", "block.pth"])
    def test_round_trip(self, family, name, tmp_path):
        model = tiny_model(family)
        block = random_block(model)
        save_block(block, model, tmp_path / name, dtype=torch.float32)
        loaded = load_block(tmp_path / name, model)
        for key, tensor in block.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key
        assert loaded.shape.eps == block.shape.eps
        assert isinstance(SpecExtend(model, tmp_path / name, CONFIG).draft, LongSpecDraft)

    @pytest.mark.parametrize("layout", ["safetensors", "bin", "prefix", "pth", "no dead", "sharp"])
    def test_layouts(self, target, folder, layout):
        """Everything that writers of published drafts left behind loads to the same block."""
        expected = load_block(folder, target).state_dict()
        state = load_file(folder / "model.safetensors")
        path = folder
        if layout == "prefix":
            state = {f"draft_model.{name}": t for name, t in state.items()}
        if layout in ("bin", "pth", "prefix"):
            (folder / "model.safetensors").unlink()
            path = folder / "draft_model_weights.pth" if layout != "bin" else folder
            torch.save(state, folder / "pytorch_model.bin" if layout == "bin" else path)
        if layout == "no dead":
            self.rewrite(folder, lambda s: [s.pop(n) for n in list(s) if n in DEAD])
        if layout == "sharp":  # dead weights that would show
            self.rewrite(folder, lambda s: [s[n].fill_(torch.nan) for n in s if n in DEAD])
        loaded = load_block(path, target).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published_counts(self, name):
        """Parameters of longspec's six drafts, with the weights that nothing uses and without."""
        shape, total, dead = PUBLISHED[name]
        sizes = {n: torch.Size(s).numel() for n, s in published_shapes(shape).items()}
        assert len(sizes) == 20
        assert sum(sizes.values()) == pytest.approx(total, abs=0.06e6)
        assert sum(sizes[n] for n in DEAD) == pytest.approx(dead, abs=0.06e6)
        with torch.device("meta"):
            live = sum(p.numel() for p in LongSpecBlock(shape).parameters())
        assert live == sum(sizes.values()) - sum(sizes[n] for n in DEAD)

    @pytest.mark.parametrize(
        "change, text",
        [
            (lambda s: s.pop("self_attn.k_proj.bias"), "it has no self_attn.k_proj.bias"),
            (lambda s: s.update({"norm.weight": torch.ones(32)}), "it has norm.weight, which is"),
            (
                lambda s: s.update({"self_attn.k_proj.weight": torch.ones(32, 32)}),
                r"self_attn.k_proj.weight must be \[16, 32\], got \[32, 32\]",
            ),
            (
                lambda s: s.update({"mlp.down_proj.weight": torch.ones(32, 40)}),
                r"mlp.down_proj.weight must be \[32, 48\], got \[32, 40\]",
            ),
        ],
        ids=["missing", "unknown", "heads", "intermediate"],
    )
    def test_broken_weights(self, target, folder, change, text):
        self.rewrite(folder, change)
        with pytest.raises(ValueError, match=text):
            load_block(folder, target)

    @pytest.mark.parametrize(
        "change, text",
        [
            (dict(hidden_size=64), "hidden_size must be 32, got 64"),
            (dict(num_key_value_heads=4), "num_key_value_heads must be 2, got 4"),
            (dict(vocab_size=98), "vocab_size must be 97, got 98"),
            (dict(rope_theta=5e5), "rope_theta must be 10000.0, got 500000.0"),
            (dict(rope_scaling={"type": "linear", "factor": 4.0}), "rope_type must be default"),
        ],
        ids=str,
    )
    def test_for_another_target(self, target, folder, change, text):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ValueError, match=text):
            load_block(folder, target)

    def test_rope_scaling_of_the_target(self, tmp_path):
        """Vicuna-16k's and LongChat's kind, said the old way in the file."""
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        model = tiny_model("llama", rope_parameters=rope)
        block = random_block(model)
        save_block(block, model, tmp_path / "block")
        file = tmp_path / "block" / "config.json"
        config = json.loads(file.read_text())
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
        config["rope_scaling"] = {"type": "linear", "factor": 4.0}
        file.write_text(json.dumps(config))
        load_block(tmp_path / "block", model)

    def test_not_a_dict(self, target, tmp_path):
        torch.save([torch.ones(1)], tmp_path / "list.pth")
        with pytest.raises(ValueError, match="a dict of tensors is wanted, got list"):
            load_block(tmp_path / "list.pth", target)


class TestTargets:
    def test_without_rotary_positions(self):
        model = tiny_model("gpt2")
        with pytest.raises(
            ValueError, match="rotary positions, in every layer; those of GPT2LMHead"
        ):
            make(model)

    def test_with_changing_rotary_positions(self):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        with pytest.raises(ValueError, match="'dynamic' rotary embeddings of LlamaForCausalLM"):
            make(tiny_model("llama", rope_parameters=rope))

    def test_yarn_scales_its_cosines(self):
        """The factor that YaRN puts on cosines is part of the target's rotation."""
        rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                "original_max_position_embeddings": 128}  # fmt: skip
        model = tiny_model("llama", rope_parameters=rope)
        positions = torch.arange(9)[None]
        cos, sin = model.model.rotary_emb(torch.ones(1), positions)
        ours = Rotation(model).angles(positions)
        assert cos.abs().max() > 1.1
        for own, theirs in zip(ours, (cos, sin), strict=True):
            torch.testing.assert_close(own[0, :, 0], theirs[0, :, : own.shape[-1]])
