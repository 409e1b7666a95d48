"""Shares what target and draft are both trained with: pieces of a layer, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from specextend.train.loss import backward_by_rows

from .corpus import VOCAB


def frequencies(head_dim: int, theta: float) -> Tensor:
    """Return the angle per position [head_dim / 2] of each pair of dimensions."""
    half = head_dim // 2
    return theta ** -(torch.arange(half) / half)


def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    """Apply an RMSNorm in one pass."""
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def project(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Make queries, keys and values [..., H, n, D] of [..., n, hidden], not rotated."""
    a, h = layer.self_attn, norm(x, layer.input_layernorm)
    return [
        p(h).unflatten(-1, (-1, a.head_dim)).transpose(-2, -3)
        for p in (a.q_proj, a.k_proj, a.v_proj)
    ]


def finish(layer: torch.nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Run the rest of a layer: out [..., H, n, D] is what attention gave."""
    x = x + layer.self_attn.o_proj(out.transpose(-2, -3).flatten(-2))
    return x + layer.mlp(norm(x, layer.post_attention_layernorm))


class Optimizer:
    """Updates inner matrices by Muon, embedding and norms by Adam; weights have fp32 masters."""

    def __init__(self, model: torch.nn.Module, muon_lr: float, adam_lr: float) -> None:
        self.params = list(model.parameters())
        self.master = [p.detach().float() for p in self.params]
        self.first = [torch.zeros_like(m) for m in self.master]
        self.second = [torch.zeros_like(m) for m in self.master]
        self.inner = [p.ndim == 2 and p.shape[0] != VOCAB for p in self.params]
        self.muon_lr, self.adam_lr, self.steps = muon_lr, adam_lr, 0

    @staticmethod
    def orthogonal(g: torch.Tensor) -> torch.Tensor:
        """Iterate (Newton-Schulz) towards the nearest orthogonal matrices of g [N, rows, cols]."""
        flip = g.shape[1] > g.shape[2]
        x = (g.transpose(1, 2) if flip else g).to(torch.bfloat16)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.transpose(1, 2)
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.transpose(1, 2) if flip else x).float()

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update all weights; `scale` is the schedule's factor."""
        self.steps += 1
        shapes: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(self.params):
            g = p.grad.float()
            if self.inner[i]:
                self.first[i].mul_(0.95).add_(g)
                shapes.setdefault(p.shape, []).append(i)
                continue
            m = self.first[i].lerp_(g, 0.1) / (1 - 0.9**self.steps)
            v = self.second[i].lerp_(g * g, 0.02) / (1 - 0.98**self.steps)
            self.master[i].sub_(self.adam_lr * scale * m / (v.sqrt() + 1e-10))
        for shape, group in shapes.items():
            g = torch.stack([self.params[i].grad + 0.95 * self.first[i] for i in group])
            lr = self.muon_lr * scale * max(1, shape[0] / shape[1]) ** 0.5
            for i, update in zip(group, self.orthogonal(g), strict=True):
                self.master[i].mul_(1 - 0.05 * self.muon_lr * scale).sub_(lr * update)
        for p, m in zip(self.params, self.master, strict=True):
            p.copy_(m)
            p.grad = None


def backward(
    model: LlamaForCausalLM,
    hidden: Tensor,
    loss_of: Callable[[Tensor, slice], Tensor],
    rows: int = 2048,
) -> float:
    """Back-propagate `loss_of(logits, rows)`, summed over blocks of rows, and return the sum.

    Args:
        model: its embedding is its head, and learns as both.
        hidden: [B, L, hidden], part of a graph.
        loss_of: from logits [N, V] and the rows of B * L that they are of.
        rows: of a block.
    """
    weight = model.model.embed_tokens.weight
    return backward_by_rows(hidden, lambda x, part: loss_of(F.linear(x, weight), part), rows)


def schedule(step: int, progress: float, flat: float, warm_up: int = 60) -> float:
    """Return the factor of the rates: it rises for some steps, is constant, then falls in a line.

    Args:
        step: counted from 0.
        progress: share of the time that is over.
        flat: share of the time from which on it falls.
        warm_up: steps in which it rises.
    """
    return min(1.0, (step + 1) / warm_up) * min(1.0, max(0.02, (1 - progress) / (1 - flat)))
