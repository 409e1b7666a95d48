"""Trains EAGLE-3 heads: hidden states of three depths, several steps on the head's own output.

Training-time test (arXiv 2503.01840): the head is unrolled, each step reads the hidden states that
the step before it made, as it will have to when it drafts; the loss of every step counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention import decoder_of
from ..config import SpecConfig
from ..draft.eagle import EagleDraft
from ..draft.eagle_checkpoint import read_config, save_head
from ..draft.eagle_head import EagleHead, HeadConfig
from .data import Batch, TokenStream
from .loss import Measured, Wanted, gradient_in_blocks
from .memory import layer_bytes, product_bytes, reading_bytes, training_bytes
from .target import FrozenTarget, check_norm

# A head may begin with pieces of the target. Then the residual has so much of the feature, and the
# first layer's heads are so much stronger, as the embedding itself is not there.
RESIDUAL, NEAR = 0.3, 2.0
DECAY = 0.8  # weight of a step's loss against that of the step before it


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """Choose the hidden states that a new head reads: EAGLE-3's, or in shallow targets, where these
    would fall together, the first layer's output, the last layer's input and its output."""
    usual = (2, num_layers // 2, num_layers - 3)
    return usual if sorted(set(usual)) == list(usual) else (1, num_layers - 1, num_layers)


def frequent_tokens(stream: TokenStream, vocab: int, count: int) -> Tensor:
    """Return a text's most frequent tokens, [count] int64 ascending, ties to the lower id."""
    frequency = np.bincount(stream.ids, minlength=vocab)
    order = np.lexsort((np.arange(vocab), -frequency))[:count]
    return torch.from_numpy(np.sort(order))


def new_head(
    target: FrozenTarget, tokens: Tensor | None = None, from_target: bool = False
) -> EagleHead:
    """Make an untrained head with the target's sizes and rotary base.

    Args:
        target: the target.
        tokens: [draft vocabulary] int64 ids, ascending, that the head will propose, with a matrix
            of its own that begins as the target's rows; None: the target's head, for all of them.
        from_target: begin with pieces of the target (:func:`_target_pieces`) instead of random
            weights; the head then has twice the target's attention heads.

    Raises:
        ValueError: the target has no such pieces.
    """
    model, config = target.model, target.model.config.get_text_config()
    heads, times = config.num_attention_heads, 2 if from_target else 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    rope = getattr(config, "rope_parameters", None) or {}
    said = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": times * heads,
        "num_key_value_heads": times * kv_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": None if tokens is None else len(tokens),
        "rms_norm_eps": getattr(config, "rms_norm_eps", None),
        "rope_theta": rope.get("rope_theta"),
        "max_position_embeddings": target.max_positions,
        "eagle_aux_hidden_state_layer_ids": feature_layers(config.num_hidden_layers),
    }
    names = set() if tokens is None else {"lm_head.weight", "d2t"}
    head = EagleHead(read_config(said, config, 3), model, frozenset(names))
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        for layer in head.layers:  # at first the layer only passes on what fc makes
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        if tokens is not None:
            head.d2t.copy_(tokens - torch.arange(len(tokens)))
            head.lm_head.weight.copy_(target.head.weight[tokens.to(target.head.weight.device)])
        if from_target:
            try:
                head.load_state_dict(_target_pieces(target, head.config), strict=False)
            except (AttributeError, RuntimeError) as error:
                raise ValueError(
                    f"{type(model).__name__} has no pieces that a head could begin with ({error}); "
                    "begin with random weights"
                ) from error
    return head.to(model.device)


def _target_pieces(target: FrozenTarget, config: HeadConfig) -> dict[str, Tensor]:
    """Return parameters of a Llama under the head's names.

    Half of the attention heads are its first layer's and look at the embeddings. The other half are
    those of a deep layer whose input is one of the features: they ask with the embedding, and look
    at that feature. The MLP is that layer's.
    """
    decoder = decoder_of(target.model)
    check_norm(decoder.norm)
    depth, size = len(decoder.layers), config.hidden_size
    place = max(i for i, index in enumerate(config.feature_layers) if index < depth)
    first, deep = decoder.layers[0], decoder.layers[config.feature_layers[place]]
    near, far = first.self_attn, deep.self_attn
    fc = torch.zeros(size, len(config.feature_layers) * size)
    fc[:, place * size : (place + 1) * size] = RESIDUAL * torch.eye(size)
    # The embedding comes through the first layer's norm; the far queries want the deep one's.
    norms = deep.input_layernorm.weight / first.input_layernorm.weight
    none = {p: torch.zeros_like(getattr(near, f"{p}_proj").weight) for p in "qkv"}
    pieces = {
        "fc.weight": fc,
        "norm.weight": decoder.norm.weight,
        "layers.0.input_layernorm.weight": first.input_layernorm.weight,
        "layers.0.hidden_norm.weight": deep.input_layernorm.weight,
        "layers.0.post_attention_layernorm.weight": deep.post_attention_layernorm.weight,
        "layers.0.self_attn.o_proj.weight": torch.cat(
            [near.o_proj.weight * NEAR, far.o_proj.weight], 1
        ),
    }
    for p in "qkv":
        ours = torch.cat([getattr(near, f"{p}_proj").weight, none[p]], 1)
        theirs = getattr(far, f"{p}_proj").weight
        halves = [theirs * norms, none[p]] if p == "q" else [none[p], theirs]
        pieces[f"layers.0.self_attn.{p}_proj.weight"] = torch.cat([ours, torch.cat(halves, 1)])
    for p in ("gate", "up", "down"):
        pieces[f"layers.0.mlp.{p}_proj.weight"] = getattr(deep.mlp, f"{p}_proj").weight
    return pieces


def unroll(
    head: EagleHead,
    tokens: Tensor,
    features: Tensor,
    steps: int,
    read_out: Callable[[Tensor], Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Propose ``steps`` tokens behind every position, in plain PyTorch.

    EAGLE-3's training-time test. The first step runs over true features; each further one takes
    the output of the one before it for its feature, and sees the true features up to where
    its chain began and the chain itself. Inputs are the text's tokens throughout.

    Args:
        head: the head.
        tokens: [B, L] int64.
        features: [B, L, F] of the same positions.
        steps: at most L - 1.
        read_out: makes of a step's output what is returned; None: its logits.

    Returns:
        Per step s = 0 ..: logits [B, L - 1 - s, draft vocabulary] and hidden states [B, .., H].
        Row t predicts token t + 2 + s, having been given features up to t. Differentiable.
    """
    attention = _ChainAttention(head.config.windows)
    read_out = read_out or head.logits
    hidden, results = head.fuse(features[:, :-1]), []
    for step in range(steps):
        inputs = tokens[:, 1 + step :]
        rows = inputs.shape[1]
        positions = torch.arange(step, step + rows, device=tokens.device)[None]
        out, hidden = head(inputs, hidden[:, :rows], positions, attention)
        results.append((read_out(out), hidden))
    return results


class _ChainAttention:
    """Attends to the first step's keys under a causal mask, and of each further step to the key of
    the same row."""

    def __init__(self, windows: tuple[int, ...]):
        self.windows = windows
        self.keys: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group, rows = q.shape[2] // k.shape[2], q.shape[1]
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        steps = self.keys.setdefault(index, [])
        steps.append((k, v))
        q = q / q.shape[-1] ** 0.5
        first = torch.einsum("bthd,bshd->bhts", q, steps[0][0])
        # Row t of step s is at position t + s, which is what windows are measured in.
        step, window = len(steps) - 1, self.windows[index] or first.shape[-1] + len(steps)
        seen = torch.ones(first.shape[-2:], dtype=torch.bool, device=q.device).tril()
        seen = seen.triu(step + 1 - window)
        logits = [first.masked_fill(~seen, -torch.inf)]
        for i, (later, _) in enumerate(steps[1:], 1):
            own = torch.einsum("bthd,bthd->bht", q, later[:, :rows])[..., None]
            logits.append(own if step - i < window else torch.full_like(own, -torch.inf))
        weights = torch.cat(logits, -1).softmax(-1)
        count = first.shape[-1]
        out = torch.einsum("bhts,bshd->bthd", weights[..., :count], steps[0][1])
        for i, (_, later) in enumerate(steps[1:]):
            out = out + weights[..., count + i].transpose(1, 2)[..., None] * later[:, :rows]
        return out


class Eagle3Recipe:
    """Does what is special to training an EAGLE-3 head.

    Args:
        target: the frozen target.
        head: the head to train.
        steps: proposed tokens that it is unrolled for.
        labels: ``"target"``: the target's distribution over the head's vocabulary (the paper's);
            ``"data"``: the text's tokens.
    """

    remedies = "a smaller --length or --ttt-steps, or --labels data"

    def __init__(self, target: FrozenTarget, head: EagleHead, steps: int, labels: str):
        self.target, self.module, self.steps, self.labels = target, head, steps, labels
        ids = head.vocabulary
        self._draft_ids: Tensor | None = None  # the head's id of each of the target's, or -1
        if ids is not None:
            self._draft_ids = torch.full((target.vocab,), -1, device=ids.device)
            self._draft_ids[ids] = torch.arange(len(ids), device=ids.device)

    def backward(self, batch: Batch, generators: list[torch.Generator]) -> Measured:
        """Add the gradients of the rows' summed losses, weighted over steps."""
        ids, head = batch.ids, self.module
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
        reading = self.target.read(
            ids, positions, logits=self.labels == "target", layers=head.config.feature_layers
        )
        wanted, total = Wanted.of(batch, reading.logits), Measured()
        with self.target.autocast():
            features = reading.features.to(head.norm.weight.dtype)
            outputs = [out for out, _ in unroll(head, ids, features, self.steps, lambda out: out)]
            gradients = []
            for step, out in enumerate(outputs):
                gradient, measured = gradient_in_blocks(
                    out, head.logits, lambda part, s=step: self._rows(wanted, s, part),
                    self.target.vocab, DECAY**step,
                )  # fmt: skip
                gradients.append(gradient)
                total = total + measured
        torch.autograd.backward(outputs, gradients)
        return total

    def memory(self, windows: int, length: int) -> int:
        """Return about how many bytes a step holds at most, besides the weights."""
        config, number = self.module.config, product_bytes(self.target)
        rows, heads, size = windows * length, config.num_heads, config.hidden_size
        wide = 9.0 * heads * config.head_dim + 4.2 * config.intermediate_size
        each = self.steps * (44 * size + number * wide) + 36 * size
        # Attention has a weight for each pair of rows; on a GPU they are made in float32, whatever
        # they are multiplied in.
        weight = 6 if number == 2 and self.target.model.device.type == "cuda" else number
        pairs = weight * heads * (1.25 * self.steps + 2.5) * windows * length**2
        reading = reading_bytes(
            self.target, rows, self.labels == "target", len(config.feature_layers),
            config.draft_vocab_size,
        )  # fmt: skip
        step = max(int(rows * each + pairs), layer_bytes(self.target, rows))
        return training_bytes(self.module) + reading + step

    def _rows(self, wanted: Wanted, step: int, part: slice) -> tuple[Tensor, Tensor | None]:
        """Return tokens and teacher of some of a step's rows, in the head's vocabulary; a row whose
        answer it cannot give does not count."""
        batch, length = wanted.tokens.shape
        count = length - 1 - step  # of a window
        rows = torch.arange(batch * count, device=wanted.tokens.device)[part]
        place = rows // count, 1 + step + rows % count
        tokens = wanted.tokens[place]
        teacher = None if wanted.teacher is None else wanted.teacher[place]
        if self._draft_ids is not None:
            answer = tokens if teacher is None else teacher.argmax(-1)
            known = self._draft_ids[answer.clamp(min=0)]
            tokens = torch.where((tokens >= 0) & (known >= 0), known, -100)
            teacher = None if teacher is None else teacher[:, self.module.vocabulary]
        return tokens, teacher

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the head in the official format."""
        save_head(self._copy(dtype), folder)

    def draft(self, config: SpecConfig) -> EagleDraft:
        """Make a draft of the head as it is."""
        return EagleDraft(self._copy(self.target.model.dtype), config)

    def _copy(self, dtype: torch.dtype) -> EagleHead:
        state = self.module.state_dict()
        head = EagleHead(self.module.config, self.target.model, frozenset(state))
        head.load_state_dict(state)
        return head.to(self.target.model.device, dtype).requires_grad_(False)
