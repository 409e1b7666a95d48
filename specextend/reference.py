"""Specifies every operator in plain PyTorch; the compiled kernels are tested against this.

The functions are written to be read. Names, arguments and results are those of
:mod:`specextend.ops`. Floating-point work is done in the dtype of the arguments, so that float64
inputs give the reference values. Nothing here is compiled or quick, and device tensors may be read
on the host.
"""

import torch
from torch import Tensor


def verify_tree(
    tokens: Tensor, parents: Tensor, target_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk from the root to the child that carries the target's token, while there is one."""
    batch, num_nodes = tokens.shape
    path = torch.full_like(parents, -1)
    emitted = torch.full_like(tokens, -1)
    num_accepted = parents.new_zeros(batch)
    for b in range(batch):
        node, walked = 0, [0]
        while True:
            choice = int(target_tokens[b, node])
            children = [
                child
                for child in range(1, num_nodes)
                if parents[b, child] == node and tokens[b, child] == choice >= 0
            ]
            emitted[b, len(walked) - 1] = choice
            if not children:
                break
            node = children[0]
            walked.append(node)
        path[b, : len(walked)] = torch.tensor(walked)
        num_accepted[b] = len(walked) - 1
    next_root = emitted.gather(1, num_accepted[:, None].long())[:, 0]
    return path, num_accepted, emitted, next_root


def sample_nodes(logits: Tensor, uniforms: Tensor | None = None) -> Tensor:
    """Take the largest logit, or the first token with a cumulative probability above uniform."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    undefined = logits.isnan().any(-1) | (logits == -torch.inf).all(-1)
    if uniforms is None:
        is_largest = logits == logits.amax(-1, keepdim=True)
        tokens = torch.where(is_largest, ids, ids[-1]).amin(-1)
    else:
        undefined |= (logits == torch.inf).any(-1) | uniforms.isnan()
        probs = logits.softmax(-1)
        cumulative = probs.cumsum(-1)
        threshold = uniforms[..., None].clamp(min=0) * cumulative[..., -1:]
        last = torch.where(probs > 0, ids, 0).amax(-1, keepdim=True)
        above = (cumulative > threshold) & (probs > 0)
        tokens = torch.where(above, ids, last).amin(-1)
    return torch.where(undefined, -1, tokens)


def expand_tree(
    logits: Tensor, beam_logp: Tensor, *, top_k: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the node's log probability to ``log_softmax``; take the top k per node, then of all."""
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    infinite = logits == torch.inf
    share = torch.where(infinite, -infinite.sum(-1, keepdim=True).to(logits).log(), -torch.inf)
    logp = torch.where(infinite.any(-1, keepdim=True), share, logits.log_softmax(-1))
    logp = logp + beam_logp[..., None]
    logp = torch.where(logp.isnan(), -torch.inf, logp)
    tokens = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    cand_logp = logp.gather(-1, tokens)
    ranked = cand_logp.flatten(1).sort(dim=-1, descending=True, stable=True)
    return tokens, cand_logp, ranked.indices[:, :width].int(), ranked.values[:, :width]


def finalize_tree(
    logp: Tensor, parents: Tensor, *, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank candidates by the least log probability on their path, then depth, then index."""
    all_nodes, all_parents, all_depths, all_masks = [], [], [], []
    words = (1 + num_nodes + 63) // 64
    for logp_b, parents_b in zip(logp.tolist(), parents.tolist(), strict=True):
        bounds: list[float] = []
        depths: list[int] = []
        for i, (value, parent) in enumerate(zip(logp_b, parents_b, strict=True)):
            inner = 0 <= parent < i
            value = -float("inf") if value != value else value
            bounds.append(min(value, bounds[parent]) if inner else value)
            depths.append(1 + depths[parent] if inner else 1)
        ranked = sorted(range(len(bounds)), key=lambda i: (-bounds[i], depths[i], i))
        nodes = sorted(ranked[:num_nodes])
        slots = {node: 1 + i for i, node in enumerate(nodes)}
        tree_parents = [-1] + [
            slots[parents_b[node]] if 0 <= parents_b[node] < node else 0 for node in nodes
        ]
        masks = [1]
        for slot in range(1, 1 + num_nodes):
            masks.append(masks[tree_parents[slot]] | 1 << slot)
        all_nodes.append(nodes)
        all_parents.append(tree_parents)
        all_depths.append([0] + [depths[node] for node in nodes])
        all_masks.append([[_signed(m >> 64 * w) for w in range(words)] for m in masks])
    batch, device = logp.shape[0], logp.device
    return (
        torch.tensor(all_nodes, dtype=torch.int32, device=device).view(batch, num_nodes),
        torch.tensor(all_parents, dtype=torch.int32, device=device).view(batch, 1 + num_nodes),
        torch.tensor(all_depths, dtype=torch.int32, device=device).view(batch, 1 + num_nodes),
        torch.tensor(all_masks, device=device).view(batch, 1 + num_nodes, words).long(),
    )


def chunk_scores(
    chunk_lse: Tensor,
    lse: Tensor,
    rows: Tensor,
    prefix_lens: Tensor,
    *,
    chunk_size: int,
    reduce: str = "mean",
) -> Tensor:
    """Take the softmax mass per chunk; the chunk of the first tree key gets what is left of it."""
    batch, num_rows, _, num_chunks = chunk_lse.shape
    scores = []
    for b in range(batch):
        row = min(max(int(rows[b]), 0), num_rows - 1)
        sees = lse[b, row].isfinite()
        mass = (chunk_lse[b, row] - lse[b, row, :, None]).exp()
        mass = torch.where(chunk_lse[b, row].isfinite() & sees[:, None], mass, 0.0)
        first_tree_chunk = max(int(prefix_lens[b]), 0) // chunk_size
        mass[:, first_tree_chunk + 1 :] = 0.0
        if first_tree_chunk < num_chunks:
            rest = (1.0 - mass.sum(-1)).clamp(min=0.0)
            mass[:, first_tree_chunk] += torch.where(sees, rest, 0.0)
        scores.append(mass.mean(0) if reduce == "mean" else mass.amax(0))
    return torch.stack(scores)


def chunk_scores_keys(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    lens: Tensor,
    *,
    chunk_size: int,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    reduce: str = "mean",
) -> Tensor:
    """Sum the dense softmax of one row over all keys, per chunk."""
    batch, num_rows, heads, dim = q.shape
    capacity, kv_heads = k.shape[1:3]
    num_chunks = -(-capacity // chunk_size)
    scores = q.new_zeros(batch, num_chunks)
    for b in range(batch):
        row = min(max(int(rows[b]), 0), num_rows - 1)
        length = min(max(int(lens[b]), 0), capacity)
        first = max(length - window, 0) if window else 0
        if length == 0:
            continue
        keys = k[b, first:length].repeat_interleave(heads // kv_heads, 1)
        logits = (q[b, row] * keys).sum(-1) * (dim**-0.5 if scale is None else scale)
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        mass = q.new_zeros(heads, num_chunks * chunk_size)
        mass[:, first:length] = logits.softmax(0).mT
        mass = mass.view(heads, num_chunks, chunk_size).sum(-1)
        scores[b] = mass.mean(0) if reduce == "mean" else mass.amax(0)
    return scores


def select_chunks(
    scores: Tensor,
    lens: Tensor,
    *,
    chunk_size: int,
    budget: int,
    num_sinks: int = 0,
    num_recent: int = 0,
) -> tuple[Tensor, Tensor]:
    """Take the newest chunks, the first ones, then the highest scores, while the budget lasts."""
    batch, num_chunks = scores.shape
    ids = torch.full((batch, budget), -1, dtype=torch.int32, device=scores.device)
    counts = torch.zeros(batch, dtype=torch.int32, device=scores.device)
    for b in range(batch):
        valid = min(-(-max(int(lens[b]), 0) // chunk_size), num_chunks)
        forced = [*range(valid - 1, -1, -1)][:num_recent] + [*range(valid)][:num_sinks]

        def rank(c: int, b: int = b) -> tuple[bool, float, int]:
            score = float(scores[b, c])
            return (score != score, -score if score == score else 0.0, c)

        order = list(dict.fromkeys(forced + sorted(range(valid), key=rank)))
        chosen = sorted(order[:budget])
        ids[b, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        counts[b] = len(chosen)
    return ids, counts


def _signed(word: int) -> int:
    """Return the low 64 bits as the int64 that holds them."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _unpack(mask: Tensor, num_keys: int) -> Tensor:
    """Unpack the bits of [..., words] into [..., num_keys] bool."""
    bits = torch.arange(64, device=mask.device)
    return ((mask.unsqueeze(-1) >> bits) & 1).flatten(-2)[..., :num_keys].bool()


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_lens: Tensor,
    tree_mask: Tensor | None = None,
    *,
    num_tree_keys: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    attention_chunk: int = 0,
    q_depths: Tensor | None = None,
    k_depths: Tensor | None = None,
    sinks: Tensor | None = None,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend densely under a mask. ``lse`` and ``chunk_lse`` are float64 for float64 inputs."""
    batch, rows, heads, dim = q.shape
    capacity, group = k.shape[1], heads // k.shape[2]
    keys = rows if num_tree_keys is None else num_tree_keys
    scale = dim**-0.5 if scale is None else scale
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(batch, rows, heads, v.shape[-1])
    lse = q.new_empty(batch, rows, heads, dtype=stat)
    chunks = -(-capacity // chunk_size) if chunk_size else 0
    chunk_lse = q.new_full((batch, rows, heads, chunks), -torch.inf, dtype=stat)
    slot = torch.arange(keys, device=q.device)
    row = torch.arange(rows, device=q.device)
    for b in range(batch):
        prefix = min(max(int(prefix_lens[b]), 0), capacity - keys)
        if tree_mask is None:
            tree = slot <= row[:, None] + keys - rows
        else:
            tree = _unpack(tree_mask[b], keys)
        visible = torch.cat([tree.new_ones(rows, prefix), tree], 1)
        if window or attention_chunk:
            q_pos = prefix + (row + keys - rows if q_depths is None else q_depths[b])
            tree_pos = prefix + (slot if k_depths is None else k_depths[b])
            k_pos = torch.cat([torch.arange(prefix, device=q.device), tree_pos])
            first = q_pos - window + 1 if window else q_pos // attention_chunk * attention_chunk
            visible = visible & (k_pos >= first[:, None])
        # Keys that nobody sees may hold anything.
        read = visible.any(0)[:, None, None]
        kb = torch.where(read, k[b, : prefix + keys], 0).repeat_interleave(group, 1)
        vb = torch.where(read, v[b, : prefix + keys], 0).repeat_interleave(group, 1)
        logits = torch.einsum("mhd,shd->mhs", q[b], kb) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
        lse[b] = logits.to(stat).logsumexp(-1)
        if sinks is None:
            weights = logits.softmax(-1)
        else:
            sink = sinks.to(logits.dtype)[:, None].expand(rows, heads, 1)
            weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        # A row without keys has given 0 / 0.
        weights = weights.masked_fill(~visible.any(1)[:, None, None], 0)
        out[b] = torch.einsum("mhs,shd->mhd", weights, vb)
        for c in range(-(-prefix // chunk_size) if chunk_size else 0):
            chunk = logits[..., c * chunk_size : min((c + 1) * chunk_size, prefix)]
            chunk_lse[b, ..., c] = chunk.to(stat).logsumexp(-1)
    return out, lse, chunk_lse if chunk_size else chunk_lse.flatten()[:0]


def invariant_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by the transposed weight, batch by batch."""
    y = x @ w.mT
    return y if bias is None else y + bias


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join the softmaxes of two key sets: each has the weight of its share of the denominator."""
    lse_a, lse_b = (x.masked_fill(x == torch.inf, -torch.inf) for x in (lse_a, lse_b))
    lse = torch.logaddexp(lse_a, lse_b)

    def share(o: Tensor, part: Tensor) -> Tensor:
        empty = (part == -torch.inf).unsqueeze(-1)
        weight = (part - lse).exp().to(o.dtype).unsqueeze(-1)
        return torch.where(empty, 0, weight * o)  # what an empty part holds is not read

    return share(o_a, lse_a) + share(o_b, lse_b), lse


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> None:
    """Assign slices, as far as they fit."""
    for b, length in enumerate(lens.tolist()):
        if length < 0:
            continue
        count = min(k.shape[1], max(k_cache.shape[1] - length, 0))
        k_cache[b, length : length + count] = k[b, :count]
        v_cache[b, length : length + count] = v[b, :count]


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, round_first: bool = True
) -> Tensor:
    """Normalise in fp32; round before the product with the weight, or after it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        return weight * h.to(x.dtype)
    scale = offset + weight.to(wide) if offset else weight.to(wide)  # a weight of -0 stays -0
    return (scale * h).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, **options: float
) -> tuple[Tensor, Tensor]:
    """Add, then normalise."""
    total = residual + x
    return rms_norm(total, weight, **options), total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Apply silu, then multiply."""
    return torch.nn.functional.silu(gate) * up


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lens: Tensor,
) -> Tensor:
    """Turn the first columns of every head, and append what that makes of the keys."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        a, b = turned.chunk(2, -1) if turned.shape[-1] else (turned, turned)
        return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)

    append_kv(k_cache, v_cache, rotate(k), v, lens)
    return rotate(q)


def compact_kv(
    caches: list[Tensor], prefix_lens: Tensor, path: Tensor, num_accepted: Tensor
) -> None:
    """Read all rows, then write them."""
    for b, prefix in enumerate(prefix_lens.tolist()):
        nodes = path[b, : max(int(num_accepted[b]) + 1, 0)].tolist()
        for cache in caches:
            moves = [
                (prefix + i, cache[b, prefix + node].clone())
                for i, node in enumerate(nodes)
                if prefix >= 0 and node > i and prefix + node < cache.shape[1]
            ]
            for row, value in moves:
                cache[b, row] = value


def gather_chunks(
    k_full: list[Tensor],
    v_full: list[Tensor],
    k_work: list[Tensor],
    v_work: list[Tensor],
    ids: Tensor,
    counts: Tensor,
    lens: Tensor,
    inv_freq: Tensor | None,
    *,
    chunk_size: int,
    interleaved: bool = False,
    right_aligned: bool = False,
) -> Tensor:
    """Copy the values of one chunk after the other, and turn its keys by one angle per pair."""
    capacity, room = k_full[0].shape[1], k_work[0].shape[1]
    work_lens = torch.zeros_like(counts)
    for b in range(ids.shape[0]):
        length = min(int(lens[b]), capacity)
        chosen = ids[b, : max(int(counts[b]), 0)].tolist()
        gap = chosen[-1] - (len(chosen) - 1) if chosen and right_aligned else 0
        for slot, chunk in enumerate(chosen):
            first, rows = slot * chunk_size, 0
            if chunk >= 0:
                rows = min(chunk_size, max(length - chunk * chunk_size, 0))
            work_lens[b] = min(first + rows, room)
            rows = min(rows, max(room - first, 0))
            new = slice(first, first + rows)
            old = slice(chunk * chunk_size, chunk * chunk_size + rows)
            shift = (slot - chunk + gap) * chunk_size
            for layer in range(len(k_full) if rows else 0):
                keys = k_full[layer][b, old]
                if inv_freq is not None and shift:
                    keys = _rotate(keys, shift * inv_freq[layer].double(), interleaved)
                k_work[layer][b, new] = keys
                v_work[layer][b, new] = v_full[layer][b, old]
    return work_lens


def _rotate(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Turn pair i of the first 2 * len(angles) elements by ``angles[i]``; the rest stays."""
    pairs = angles.shape[0]
    first = 2 * torch.arange(pairs, device=x.device) if interleaved else slice(0, pairs)
    second = first + 1 if interleaved else slice(pairs, 2 * pairs)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned = x.clone()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned
