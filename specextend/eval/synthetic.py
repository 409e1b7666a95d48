"""Measures real latency at any model's shape: random weights, and an acceptance that is set.

What a round costs depends on shapes and lengths; what it brings, on how often the target agrees
with the draft, which models with random weights do not. Here both run as always: the draft makes
its proposals, the target verifies the whole tree, accepted rows are compacted, chunks are scored
and retrieved. Only the target's choice at a node is drawn, so that proposals are accepted as often
as was asked for. The text is noise, and no figure made this way says anything about a draft's
quality: :func:`label` is on every table and plot.

    target, draft = random_pair("llama-3.1-8b", "llama-3.2-1b", 0.7, positions=20_000)
    spec = SyntheticSpecExtend(target, draft, acceptance=0.7)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..decode import SpecExtend
from ..generation import Generation, Request
from ..sampling import TokenChooser


def _llama(hidden, intermediate, layers, heads, kv_heads, vocab, head_dim=128) -> dict:
    return dict(
        model_type="llama", hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=vocab, head_dim=head_dim,
    )  # fmt: skip


#: fields of configurations by name, from the models' own
SHAPES = {
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64),
    "vicuna-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "vicuna-68m": _llama(768, 3072, 2, 12, 12, 32000, head_dim=64),
    "small": _llama(512, 1536, 4, 4, 2, 8192),
    # DeepSeek V3 in the size of V2-Lite, as Moonlight 16B-A3B is.
    "deepseek-v3-lite": dict(
        model_type="deepseek_v3", hidden_size=2048, intermediate_size=11264, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=163840, kv_lora_rank=512,
        q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    ),
    "qwen3.5-9b": dict(
        model_type="qwen3_5_text", hidden_size=4096, intermediate_size=12288, num_hidden_layers=32,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=248320, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128,
    ),
    # Heads and windows as Gemma 4 has them, in the size of Gemma 3 12B.
    "gemma-4-12b": dict(
        model_type="gemma4_unified_text", hidden_size=3840, intermediate_size=15360,
        num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8, vocab_size=262144,
        head_dim=256, global_head_dim=512, num_global_key_value_heads=4, attention_k_eq_v=True,
        sliding_window=1024,
    ),
}  # fmt: skip


def _configuration(shape: str | os.PathLike, changes: dict) -> PreTrainedConfig:
    if shape in SHAPES:
        return AutoConfig.for_model(**{**SHAPES[shape], **changes})
    try:
        return AutoConfig.from_pretrained(shape, **changes)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a shape is one of {', '.join(SHAPES)}, or a model's configuration (a file, a "
            f"folder or a hub id); got {str(shape)!r}: {error}"
        ) from error


def one_layer(shape: str | os.PathLike) -> dict:
    """Return the changes of a shape that leave one layer, which attends to all that is before it.

    Args:
        shape: as for :func:`random_model`.
    """
    changes: dict = {"num_hidden_layers": 1}
    if getattr(_configuration(shape, {}).get_text_config(), "layer_types", None):
        changes["layer_types"] = ["full_attention"]
    return changes


def random_model(
    shape: str | os.PathLike,
    positions: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **changes,
) -> PreTrainedModel:
    """Make a model of random weights, drawn from torch's default generator; nothing ends its text.

    Args:
        shape: a name of ``SHAPES``; a ``config.json``, a folder that has one, or a hub id, of which
            the configuration alone is read.
        positions: prompt and output together, at most.
        **changes: fields of the configuration.
    """
    config = _configuration(shape, {"eos_token_id": None, **changes})
    text = config.get_text_config()
    text.max_position_embeddings = max(text.max_position_embeddings or 0, positions)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def random_pair(
    shape: str | os.PathLike,
    draft_shape: str | os.PathLike,
    acceptance: float | Sequence[float],
    positions: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Make a target and a draft with one vocabulary, as :func:`random_model` makes them.

    The draft believes in its first choice as often as it will be right (:func:`sharpen`). Its head
    is apart from its embeddings, whatever the shape says, since only the head is scaled.

    Args:
        shape, draft_shape: of target and draft; ``"one-layer"`` is a draft of one of the target's
            layers.
        acceptance: see :class:`SyntheticSpecExtend`.
    """
    target = random_model(shape, positions, device, dtype)
    changes = {
        "vocab_size": target.config.get_text_config().vocab_size,
        "tie_word_embeddings": False,
    }
    if draft_shape == "one-layer":
        draft_shape = shape
        changes |= one_layer(shape)
    draft = random_model(draft_shape, positions, device, dtype, **changes)
    sharpen(draft, _per_position(acceptance)[0])
    return target, draft


def sharpen(model: PreTrainedModel, probability: float) -> None:
    """Scale a model's head until its first choices have this probability, on average over a random
    text. Trees grow along a draft's probabilities: those of random weights are flat, and so would
    the tree be, which no acceptance could make deep. Synchronises.
    """
    weight = model.get_output_embeddings().weight
    vocab = weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, 64), generator=generator).to(weight.device)
    with torch.inference_mode():
        logits = model(ids).logits[0].float()
        low, high = 0.0, 1.0
        while _confidence(high * logits) < probability and high < 2**16:
            high *= 2
        for _ in range(24):
            middle = (low + high) / 2
            if _confidence(middle * logits) < probability:
                low = middle
            else:
                high = middle
    with torch.no_grad():
        weight.mul_(high)


def _confidence(logits: Tensor) -> float:
    return float(logits.softmax(-1).amax(-1).mean())


def _per_position(acceptance: float | Sequence[float]) -> list[float]:
    rates = [acceptance] if isinstance(acceptance, (int, float)) else list(acceptance)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(
            f"acceptance must be a probability in [0, 1], or one per position, got {acceptance!r}"
        )
    return [float(rate) for rate in rates]


def label(acceptance: float | Sequence[float]) -> str:
    """Return what is written on everything that was measured this way."""
    return f"synthetic acceptance {', '.join(f'{rate:g}' for rate in _per_position(acceptance))}"


class SyntheticSpecExtend(SpecExtend):
    """Speculates with drafts that are right as often as is asked for; else a :class:`SpecExtend`.

    Args:
        acceptance: the probability that a proposed token is accepted where the ones before it were:
            one for all positions of a tree, or one per position, of which the last serves all
            deeper ones. The proposals in question are those on the path to the tree's deepest node
            (the first such node, which is the likeliest); no others are accepted.
        *args, **kwargs: as for :class:`SpecExtend`. ``seed`` decides about acceptance, too: the
            same prompt and seed give the same.
    """

    def __init__(self, *args, acceptance: float | Sequence[float], **kwargs):
        super().__init__(*args, generation=self._generation, **kwargs)
        self.acceptance = _per_position(acceptance)
        # A token that nobody proposed is wanted.
        if self.config.max_nodes + 2 > self.target.vocab_size:
            raise ValueError(
                f"trees of {self.config.max_nodes} nodes are too large for a vocabulary of "
                f"{self.target.vocab_size}"
            )

    def _generation(self, target, draft, config, request: Request, *rest) -> Generation:
        """Make a generation whose choices are drawn."""
        prompt, chooser, width = request.prompt, request.chooser, config.max_depth + 1
        seed = (chooser.seed + int(prompt.sum())) % 2**63
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(request.max_length + width, generator=generator)
        rates = (self.acceptance + self.acceptance[-1:] * width)[:width]
        drawn = _DrawnChoice(
            chooser, uniforms.to(prompt.device), torch.tensor(rates, device=prompt.device)
        )
        return Generation(target, draft, config, replace(request, chooser=drawn), *rest)


class _DrawnChoice(TokenChooser):
    """Chooses a proposal or another token, by numbers drawn before the generation.

    On the device alone, and as part of the round's graph, like the choice that it stands for: the
    target's own is made, too, and is what is emitted where proposals are rejected.

    Args:
        chooser: of the generation.
        uniforms: [positions] in [0, 1), one per position: each is asked about once on the paths
            that the rounds take, so that acceptances are independent.
        rates: [W] probabilities by depth of the node whose child is in question.
    """

    def __init__(self, chooser: TokenChooser, uniforms: Tensor, rates: Tensor):
        super().__init__(chooser.processors, chooser.do_sample, chooser.seed, chooser.stop)
        self.uniforms, self.rates = uniforms, rates

    def decide(self, logits, positions, tokens, parents):
        self.tokens, self.parents = tokens[0], parents[0].long()
        return super().decide(logits, positions, tokens, parents)

    def choose(self, scores: Tensor, positions: Tensor) -> Tensor:
        own = super().choose(scores, positions)[0]
        tokens, parents, positions = self.tokens, self.parents, positions[0]
        # Not proposed anywhere: the target's own token, or the first id that is free.
        count = len(tokens)
        ids = torch.arange(count + 1, device=tokens.device)
        free = (ids[:, None] == tokens).any(1).int().argmin()
        choice = torch.where((own[:, None] == tokens).any(1), free, own)
        if count == 1:
            return choice[None]
        # The path to the deepest node, upwards, and on from the root to a row behind the last one.
        depths = positions - positions[0]
        path = [depths.argmax(0, keepdim=True)]
        for _ in range(len(self.rates) - 1):
            above = parents[path[-1].clamp(max=count - 1)]
            path.append(torch.where((above < 0) | (path[-1] == count), count, above))
        child, node = torch.cat(path[:-1]), torch.cat(path[1:])
        at = node.clamp(max=count - 1)
        accepted = self.uniforms[positions[at]] < self.rates[depths[at]]
        wanted = torch.where(accepted, tokens[child.clamp(max=count - 1)], choice[at])
        return F.pad(choice, (0, 1)).scatter(0, node, wanted)[None, :count]
