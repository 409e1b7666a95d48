"""Makes the embedded models, and runs them with an attention that one core trains quickly."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from specextend.rotary import turn

from .corpus import MAX_CONTEXT, VOCAB
from .training import finish, frequencies, norm, project


class CausalAttention(torch.autograd.Function):
    """Attends causally in bf16, by blocks of rows: several times as fast as torch on one core.

    q (scaled), k, v: [B, H, L, D]. Probabilities are kept for short windows, else recomputed.
    """

    BLOCK = 256

    @staticmethod
    def probabilities(q, k, i, e):
        s = torch.bmm(q[:, i:e], k[:, :e].transpose(1, 2))
        corner = torch.ones(e - i, e - i, dtype=torch.bool).triu_(1)
        s[:, :, i:].masked_fill_(corner, -math.inf)
        return torch.softmax(s, -1)

    @staticmethod
    def forward(ctx, q, k, v):
        out, kept = torch.empty_like(q), []
        for b in range(q.shape[0]):
            for i in range(0, q.shape[2], CausalAttention.BLOCK):
                e = min(i + CausalAttention.BLOCK, q.shape[2])
                p = CausalAttention.probabilities(q[b], k[b], i, e)
                out[b, :, i:e] = torch.bmm(p, v[b, :, :e])
                kept.append(p if ctx.needs_input_grad[0] and q.shape[2] <= 4096 else None)
        ctx.save_for_backward(q, k, v)
        ctx.kept = kept
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        kept = iter(ctx.kept)
        for b in range(q.shape[0]):
            for i in range(0, q.shape[2], CausalAttention.BLOCK):
                e = min(i + CausalAttention.BLOCK, q.shape[2])
                p = next(kept)
                if p is None:
                    p = CausalAttention.probabilities(q[b], k[b], i, e)
                g = grad[b, :, i:e]
                dv[b, :, :e] += torch.bmm(p.transpose(1, 2), g)
                ds = torch.bmm(g, v[b, :, :e].transpose(1, 2))
                ds = torch._softmax_backward_data(ds, p, -1, p.dtype)
                dq[b, :, i:e] = torch.bmm(ds, k[b, :, :e])
                dk[b, :, :e] += torch.bmm(ds.transpose(1, 2), q[b, :, i:e])
        ctx.kept = None
        return dq, dk, dv


def new_model(role: str) -> LlamaForCausalLM:
    """Make the target (heavy in KV, light in weights) or the draft, in bf16, untrained."""
    big = role == "target"
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256 if big else 128,
            intermediate_size=704 if big else 352,
            num_hidden_layers=4 if big else 2,
            num_attention_heads=8 if big else 4,
            num_key_value_heads=8 if big else 4,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=MAX_CONTEXT + 1024 if big else 1024,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0 if big else 10000.0},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
            dtype="bfloat16",
        )
    ).to(torch.bfloat16)


@torch.no_grad()
def copying_start(
    model: LlamaForCausalLM, seed: int, teacher: LlamaForCausalLM | None = None
) -> None:
    """Start some heads as an induction circuit, and a draft with its teacher's embeddings.

    Heads 0 and 1 of the first layer look one and two tokens back (all embeddings share a
    direction that drives them) and write what they see into subspaces of their own. Heads 0 and
    1 of the second and of the last layer compare those with the present token and the one before
    it, and pass on the token that followed. Training is free to change all of it.
    """
    c, generator = model.config, torch.Generator().manual_seed(seed)
    d, n, half = c.head_dim, c.hidden_size, c.head_dim // 2

    def frame(d=d):  # d orthonormal rows are orthogonal to the common direction
        g = torch.randn(n, d + 1, generator=generator)
        g[:, 0] = 1.0
        return torch.linalg.qr(g).Q[:, 1:].T

    common = torch.full((n,), n**-0.5)
    embedding = model.model.embed_tokens.weight
    rows = torch.randn(embedding.shape, generator=generator) * 0.02
    if teacher is not None:  # its principal components come in a random frame
        rows = teacher.model.embed_tokens.weight.float()
        u, scale, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        rows = (u * scale)[:, : n - 1] @ frame(n - 1)
        model.model.norm.weight.fill_(0.3)
    size = rows.norm(dim=1).mean()
    embedding.copy_(rows + common * size / 2)
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in model.model.layers:  # everything else is silent at first
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    see, write = frame(), (frame(), frame())
    fast, match = torch.arange(half) < 8, 2.0 * (256 / n) ** 0.5
    freq = frequencies(d, c.rope_parameters["rope_theta"])
    for head in (0, 1):
        rows, a = slice(head * d, head * d + d), layers[0]
        back = freq * (head + 1)
        ask = torch.cat((fast.float(), torch.zeros(half)))
        key = torch.cat((fast * back.cos(), fast * back.sin()))
        gain = 1.6 * (256 / n) ** 0.5
        a.q_proj.weight[rows] = gain * ask[:, None] * common
        a.k_proj.weight[rows] = gain * key[:, None] * common
        a.v_proj.weight[rows] = see
        a.o_proj.weight[:, rows] = 0.15 * size * write[head].T
        slow = (torch.arange(d) % half >= 10).float()[:, None]  # these pairs turn little in 16K
        for a in {layers[1], layers[-1]}:
            out = frame()
            a.q_proj.weight[rows] = match * slow * (see, write[0])[head]
            a.k_proj.weight[rows] = match * slow * write[head]
            a.v_proj.weight[rows] = out
            a.o_proj.weight[:, rows] = 0.45 * size * out.T


def hidden_states(
    model: LlamaForCausalLM, ids: torch.Tensor, at: torch.Tensor, last_qk: list | None = None
) -> torch.Tensor:
    """Compute what LlamaModel does, with the attention above.

    Args:
        model: in bf16.
        ids, at: [B, L] int64, tokens and their positions.
        last_qk: receives the rotated queries (scaled) and keys of the last layer, [B, H, L, D].

    Returns:
        [B, L, hidden] behind the last norm.
    """
    c = model.config
    angle = at[:, None, :, None] * frequencies(c.head_dim, c.rope_parameters["rope_theta"])
    cos, sin = angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)
    x = F.embedding(ids, model.model.embed_tokens.weight)
    for layer in model.model.layers:
        q, k, v = project(layer, x)
        q, k = turn(q * c.head_dim**-0.5, cos, sin), turn(k, cos, sin)
        x = finish(layer, x, CausalAttention.apply(q, k, v.contiguous()))
    if last_qk is not None:
        last_qk[:] = [q, k]
    return norm(x, model.model.norm)
