"""Gives results of the vectorised ops as digests, to compare the instruction sets bit by bit.

Run as a program with SPECEXTEND_CPU_ISA set, it prints {op: digest}.
"""

import hashlib
import json

import torch

from specextend import _C, ops


def runnable() -> list[str]:
    """Return the instruction sets that this machine runs, up to the one in use, plainest first."""
    isas = _C.cpu_isas()
    return isas[: isas.index(_C.cpu_isa()) + 1]


def hard_logits(dtype: torch.dtype, vocab: int) -> torch.Tensor:
    """Return logits [2, 3, vocab] with rows where roundings, ties and underflow show."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(2, 3, vocab, generator=generator) * 4
    logits[0, 0, :: max(2, vocab // 5)] = -torch.inf
    logits[0, 1, vocab // 2 :] += 30  # the running maximum grows
    logits[1, 0] -= torch.arange(vocab) * 0.05  # far below the largest, down to underflow
    logits[1, 1] = (logits[1, 1] / 4).round()  # ties
    logits[1, 2] *= 1e-3
    return logits.to(dtype)


def _sample_nodes():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for vocab in (1, 5, 16, 100, 512, 1500, 5003):
            logits = hard_logits(dtype, vocab)
            yield ops.sample_nodes(logits)
            generator = torch.Generator().manual_seed(1)
            for _ in range(8):
                yield ops.sample_nodes(logits, torch.rand(2, 3, generator=generator))


def _expand_tree():
    beam_logp = -torch.arange(6).view(2, 3) / 3
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for vocab in (1, 5, 16, 100, 512, 1500, 5003):
            logits = hard_logits(dtype, vocab)
            for top_k in {1, min(vocab, 10), vocab}:
                yield from ops.expand_tree(logits, beam_logp, top_k=top_k, width=top_k)


def _chunk_scores():
    for chunks in (1, 15, 16, 17, 600):
        chunk_lse = hard_logits(torch.float32, chunks)[:, :, None, :].expand(-1, -1, 2, -1)
        lse = chunk_lse.logsumexp(-1) + 0.5
        for reduce in ("mean", "max"):
            yield ops.chunk_scores(
                chunk_lse,
                lse,
                torch.tensor([1, 2], dtype=torch.int32),
                torch.tensor([4 * chunks - 1, 2 * chunks], dtype=torch.int32),
                chunk_size=4,
                reduce=reduce,
            )


def _gather_chunks():
    ids = torch.tensor([[0, 2, 3, 7]], dtype=torch.int32)
    counts, lens = (torch.tensor([n], dtype=torch.int32) for n in (4, 31))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for pairs in (1, 7, 16, 33):
            generator = torch.Generator().manual_seed(pairs)
            full = torch.randn(1, 32, 2, 2 * pairs + 1, generator=generator).to(dtype)
            full *= 10.0 ** torch.arange(-20, 12)[:, None, None]  # subnormal to infinite in fp16
            inv_freq = torch.rand(1, pairs, generator=generator)
            for interleaved in (False, True):
                work = [torch.zeros(1, 16, *full.shape[2:], dtype=dtype) for _ in range(2)]
                caches = [full], [full], work[:1], work[1:]
                yield ops.gather_chunks(
                    *caches, ids, counts, lens, inv_freq, chunk_size=4, interleaved=interleaved
                )
                yield work[0].view(torch.int32 if dtype == torch.float32 else torch.int16)


def _bits(t):
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def _rms_norm():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for length in (1, 5, 8, 31, 100, 600, 9001):
            generator = torch.Generator().manual_seed(length)
            x, residual = torch.randn(2, 4, length, generator=generator).to(dtype)
            x[1] *= 1e-4
            x[2, length // 2] = torch.inf
            for offset, first in ((0.0, True), (0.0, False), (1.0, False)):
                options = dict(eps=1e-6, offset=offset, round_first=first)
                yield _bits(ops.rms_norm(x, residual[0], **options))
                yield from map(_bits, ops.add_rms_norm(x, residual, residual[0], **options))


def _rotary_append():
    lens = torch.tensor([3], dtype=torch.int32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim in (2, 14, 64, 66):
            generator = torch.Generator().manual_seed(dim)
            q = torch.randn(1, 9, 3, dim + 1, generator=generator).to(dtype)
            q *= 10.0 ** torch.arange(-5, 4)[:, None, None]  # subnormal to infinite in fp16
            cos, sin = torch.randn(2, 1, 9, dim, generator=generator).to(dtype)
            caches = torch.zeros(2, 1, 20, 3, dim + 1, dtype=dtype)
            yield _bits(ops.rotary_append(q, q, q, cos, sin, *caches, lens))
            yield _bits(caches)


def _silu_mul():
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        gate = numbers.view(dtype)
        gate = gate[~gate.isnan()]
        for up in (1.0, -0.3):
            yield _bits(ops.silu_mul(gate, torch.full_like(gate, up)).nan_to_num(7.0))


OPS = {
    "gather_chunks": _gather_chunks,
    "sample_nodes": _sample_nodes,
    "expand_tree": _expand_tree,
    "chunk_scores": _chunk_scores,
    "rms_norm": _rms_norm,
    "rotary_append": _rotary_append,
    "silu_mul": _silu_mul,
}


def digest(op: str) -> str:
    """Digest the op's results under the instruction set of this process."""
    bits = hashlib.sha256()
    for tensor in OPS[op]():
        bits.update(tensor.contiguous().numpy().tobytes())
    return bits.hexdigest()


if __name__ == "__main__":
    print(json.dumps({op: digest(op) for op in OPS}))
