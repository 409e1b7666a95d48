"""Reads of a prompt what a draft with a bounded cache can come to hold.

A draft attends to ``budget`` tokens, whatever the length of the text. Of a long prompt it reads the
chunks that the target's attention points at behind the prompt, more than it holds at a time, each
with the chunk before it, whose keys its first tokens see. Chunks that a later retrieval points at
are read then, or left out where nobody waits to see which they are.
Positions are those of the prompt; what was left out is neither read nor attended to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..cache import KVCache, Pass
from ..config import SpecConfig

#: of a long prompt's chunks, those that later retrievals can choose from
SHARE = 0.25

#: runs a draft's model over tokens and positions [1, n], in a pass
Read = Callable[[Tensor, Tensor, Pass], None]


def choose_chunks(
    scores: Tensor | None, length: int, config: SpecConfig, device: torch.device
) -> Tensor | None:
    """Choose the chunks of a prompt that a draft's cache is likely to hold at some time.

    Args:
        scores: [1, C] fp32, the target's attention mass per chunk; None: the last ones are wanted.
        length: tokens of the prompt.
        config: of the draft's cache.
        device: of the draft, and of ``scores``.

    Returns:
        [ceil(length / chunk_size)] bool; None: all. Does not synchronise; :func:`read_chunks` does.
    """
    count, wanted = _chunks(length, config, scores is not None)
    recent = max(1, config.recent_chunks)
    if wanted == count:
        return None
    if scores is None:
        scores, recent = torch.zeros(1, count, device=device), wanted - config.sink_chunks
    else:
        scores = scores[:, :count].contiguous()
    ids, _ = ops.select_chunks(
        scores,
        torch.full((1,), length, dtype=torch.int32, device=device),
        chunk_size=config.chunk_size,
        budget=wanted,
        num_sinks=config.sink_chunks,
        num_recent=recent,
    )
    chosen = torch.zeros(count, dtype=torch.bool, device=device)
    chosen[ids[0].long()] = True
    return chosen


def _chunks(length: int, config: SpecConfig, scored: bool) -> tuple[int, int]:
    """Return the chunks of a prompt, and how many of them a draft's cache may come to hold."""
    count, held = -(-length // config.chunk_size), config.budget_chunks
    if config.draft_cache == "full" or count <= held:
        return count, count
    return count, max(held, round(SHARE * count)) if scored else held


def part_read(length: int, config: SpecConfig) -> float:
    """Return about how much is read of a prompt: the chunks that may be wanted, and as many before
    them as are not wanted themselves."""
    count, wanted = _chunks(length, config, config.draft_cache == "retrieval")
    share = wanted / max(count, 1)
    return share * (2 - share) if wanted else 0.0


def read_chunks(
    tokens: Tensor,
    chosen: Tensor,
    full: KVCache,
    config: SpecConfig,
    read: Read,
    known: Tensor | None = None,
) -> Tensor:
    """Read some chunks of a prompt, and the one before each, to their rows of a draft's full cache.

    A token sees ``draft_prefill_window`` positions, as far as they are read here.

    Args:
        tokens: [1, L] int64, the prompt.
        chosen: [C] bool, which chunks.
        full: the draft's cache. Nothing is committed.
        config: of chunks and windows.
        read: runs the draft's model.
        known: [C] bool, chunks that were read before, whose rows stay as they are.

    Returns:
        [C] bool, the chunks that have been asked for by now.
    """
    length, window = tokens.shape[1], config.draft_prefill_window
    with_before = chosen.clone()
    with_before[:-1] |= chosen[1:]
    known = torch.zeros_like(chosen) if known is None else known
    rows = with_before.repeat_interleave(config.chunk_size)[:length].nonzero()[:, 0]
    new_rows = ~known.repeat_interleave(config.chunk_size)[rows]
    positions = rows.to(torch.int32)[None]
    width = config.prefill_chunk or len(rows)
    memory = len(rows) if window is None else min(window - 1, len(rows))
    if full.is_shared and bool(new_rows.any()):  # forks may have these rows, too
        full.own(int(rows[new_rows][0]))
    # What is read stands side by side here, the last `memory` rows of it first; only the window
    # knows that there are gaps between them.
    beside = full.another(memory + width)
    for start in range(0, len(rows), width):
        part = rows[start : start + width]
        kept, end = min(start, memory), start + len(part)
        wanted = new_rows[start:end].nonzero()[:, 0]
        state = Pass(
            beside,
            [(beside, beside.lens + kept)],
            kept + len(part),
            window=window or 0,
            q_depths=positions[:, start:end].contiguous(),
            k_depths=positions[:, start - kept : end].contiguous(),
        )
        read(tokens[:, part], part[None], state)
        full.allocate_as(beside)
        for ours, theirs in zip(full.kv_layers, beside.kv_layers, strict=True):
            for to, new in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                to.index_copy_(2, part[wanted], new[:, :, kept + wanted])
                first = max(0, kept + len(part) - memory)
                new[:, :, : kept + len(part) - first] = new[:, :, first : kept + len(part)].clone()
    return known | chosen
