"""Holds trees of proposed tokens, and grows them by a draft.

The work is in the ops ``expand_tree`` and ``finalize_tree``; here are the loop over levels and the
rules of how many levels and which nodes (OPT-Tree, EAGLE-2, fixed widths, what pays).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .config import SpecConfig
from .pace import FREE, Price


@dataclass
class Tree:
    """Holds a root, which is decided, and proposed nodes behind it. Node 0 is the root.

    Attributes:
        tokens: [B, M] int64.
        parents: [B, M] int32; -1 for the root; a parent comes before its children.
        depths: [B, M] int32; 0 for the root.
        mask: [B, M, ceil(M / 64)] int64, packed: the ancestors of a node and itself.
        promise: [B, 2] fp32, tokens that the draft expects to be accepted, and how many of them the
            last level adds; None where nothing is proposed, or the draft does not say.
        depth: levels below the root.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    mask: Tensor
    promise: Tensor | None
    depth: int

    @property
    def num_nodes(self) -> int:
        """Count the rows of the verify pass: the root and the proposed nodes."""
        return self.tokens.shape[1]

    def size(self, branches: float) -> float:
        """Return what a verify pass has to do for the proposed nodes, in rows of all its weights.

        Args:
            branches: the share of the weights that paths pass one by one; if any, this reads the
                device.
        """
        count = self.num_nodes - 1
        if not branches or not count:
            return count
        return (1 - branches) * count + branches * paths(self.parents)[0].numel()

    def padded(self, num_nodes: int) -> Tree:
        """Return the same tree with ``num_nodes`` rows, of which no path reaches the new ones."""
        more = num_nodes - self.num_nodes
        if more <= 0:
            return self
        rows = torch.arange(self.num_nodes, num_nodes, device=self.tokens.device)[:, None]
        words = torch.arange((num_nodes + 63) // 64, device=rows.device)
        itself = torch.where(rows // 64 == words, 1 << rows % 64, 0)
        mask = F.pad(self.mask, (0, len(words) - self.mask.shape[-1]))
        return Tree(
            F.pad(self.tokens, (0, more)),
            F.pad(self.parents, (0, more), value=-1),
            F.pad(self.depths, (0, more)),
            torch.cat([mask, itself.expand(mask.shape[0], -1, -1)], 1),
            self.promise,
            self.depth,
        )

    @staticmethod
    def root_only(root: Tensor) -> Tree:
        """Return the tree of plain decoding: [B, 1] ``root`` and nothing proposed."""
        zeros = torch.zeros_like(root, dtype=torch.int32)
        return Tree(root, zeros - 1, zeros, torch.ones_like(root)[..., None], None, 0)

    @staticmethod
    def of(
        root: Tensor, nodes: list[tuple[int, int]], promise: tuple[float, float] | None = None
    ) -> Tree:
        """Return the tree below [1, 1] ``root`` whose nodes the host knows.

        Args:
            nodes: parent and token of each, counted from 1; the root is 0. Parents come first.
            promise: as the tree's.
        """
        if not nodes:
            return Tree.root_only(root)
        words, to = (len(nodes) + 64) // 64, dict(device=root.device)
        seen, depths = [1], [0]  # ancestors of each node and itself, as bits
        for node, (parent, _) in enumerate(nodes, 1):
            seen.append(seen[parent] | 1 << node)
            depths.append(depths[parent] + 1)
        mask = np.array(
            [[bits >> (64 * w) & (2**64 - 1) for w in range(words)] for bits in seen],
            dtype=np.uint64,
        )
        return Tree(
            torch.cat([root, torch.tensor([[token for _, token in nodes]], **to)], 1),
            torch.tensor([[-1, *(parent for parent, _ in nodes)]], dtype=torch.int32, **to),
            torch.tensor([depths], dtype=torch.int32, **to),
            torch.from_numpy(mask.view(np.int64))[None].to(root.device),
            None if promise is None else torch.tensor([promise], **to),
            max(depths),
        )


@lru_cache(maxsize=64)
def paths(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the paths from below the root to every leaf. Reads the device.

    Args:
        parents: [1, M] int32, of a tree with nodes below the root.

    Returns:
        rows: [P, L] int64, the nodes of each path, filled up with its last one.
        places: [M - 1] int64, where each node but the root is in these, read row by row.
    """
    above = parents[0].tolist()
    inner = set(above)
    found = []
    for leaf in (node for node in range(1, len(above)) if node not in inner):
        path = [leaf]
        while above[path[-1]] > 0:
            path.append(above[path[-1]])
        found.append(path[::-1])
    length = max(map(len, found))
    rows = [path + path[-1:] * (length - len(path)) for path in found]
    at = {node: i for i, node in reversed(list(enumerate(n for path in rows for n in path)))}
    places = [at[node] for node in range(1, len(above))]
    to = dict(device=parents.device)
    return torch.tensor(rows, **to), torch.tensor(places, **to)


def _bits(first: int, count: int, words: int, device: torch.device) -> Tensor:
    """Return [count, words] int64 with bit ``first + i`` set in row i."""
    rows = torch.zeros(count, words, dtype=torch.int64)
    for i in range(count):
        bit = first + i
        rows[i, bit // 64] = (1 << (bit % 64)) - ((1 << 64) if bit % 64 == 63 else 0)
    return rows.to(device)


def sizes(parents: Sequence[int], levels: Sequence[int], branches: float) -> np.ndarray:
    """Return [n] float64: what the first 1, 2, ... of a tree's nodes have a verify pass do, as
    :meth:`Tree.size` counts it. A node that goes on from another adds a row to every path, and one
    that branches off a path of them.

    Args:
        parents: [n], by any numbers that are the same for the same parent; 0 or less: the root.
        levels: [n], from 1 on.
    """
    counts = np.arange(1, len(parents) + 1, dtype=np.float64)
    inner = np.zeros_like(counts)
    found, first = np.unique(parents, return_index=True)
    inner[first[found > 0]] = 1
    leaves = counts - inner.cumsum()
    deepest = np.maximum.accumulate(np.asarray(levels, dtype=np.float64))
    return (1 - branches) * counts + branches * leaves * deepest


def num_paying(
    chances: Sequence[float], parents: Sequence[int], levels: Sequence[int], price: Price
) -> int:
    """Return how many of a tree's nodes bring most beyond their price.

    Args:
        chances: [n] that a node is accepted, the largest first.
        parents, levels: as for :func:`sizes`.
    """
    cost = price.node * sizes(parents, levels, price.branches)
    gain = np.concatenate([[0.0], np.cumsum(chances, dtype=np.float64) - cost])
    return int(gain.argmax())


# One level of the draft: (tokens [B, W], level, mask [B, W, words], number of tree keys so far,
# these included, parents [B, W]: rows of the level before) -> logits [B, W, V] of the children.
Step = Callable[[Tensor, int, Tensor, int, Tensor], Tensor]


def grow_tree(
    root: Tensor,
    logits: Tensor,
    step: Step,
    config: SpecConfig,
    depth: int,
    vocabulary: Tensor | None = None,
    price: Price = FREE,
) -> Tree:
    """Grow a tree below ``root`` level by level, in log space.

    ``tree_shape`` "opt" and "top_k": every node of the beam offers its ``tree_top_k`` best
    children, the best ``tree_width`` of them are the next beam, and the best ``tree_nodes`` of all
    offered become the tree (OPT-Tree's greedy maximisation of expected acceptance; EAGLE-2's
    re-ranking). "fixed": level widths of the configuration, every node of them proposed (LongSpec).

    Args:
        root: [B, 1] int64.
        logits: [B, 1, V] of the draft at the root.
        step: runs the draft on a level; called ``depth - 1`` times, or until it does not pay.
        depth: levels at most, at least 1.
        vocabulary: [V] int64, the target's id of each entry of ``logits``; None: the same ids.
        price: what a further level, and a further node, must be expected to add. A further level:
            what the likeliest node of the last one has, if the path to it goes on with the
            probability that its steps had on average. Read back from the device, once per level;
            nothing is where all is free. A tree has one node at least.
    """
    fixed = config.tree_shape == "fixed"
    vocab = logits.shape[-1]
    beam_logp = torch.zeros(root.shape, dtype=torch.float32, device=root.device)
    pool_tokens, pool_logp, pool_parents = [], [], []
    pool_size = 0  # candidates of the levels before
    beam_pool: Tensor | None = None  # [B, W] pool indices of the beam's nodes; None: the root
    mask: Tensor | None = None
    num_keys = 0
    widths = config.tree_widths if fixed else (config.tree_width,) * depth
    words = (sum(widths[:depth]) + 63) // 64

    for level in range(depth):
        beam_size = logits.shape[1]
        top_k = min(vocab, widths[level] if fixed else config.tree_top_k)
        width = min(widths[level], beam_size * top_k)
        tokens, logp, beam, beam_logp = ops.expand_tree(logits, beam_logp, top_k=top_k, width=width)
        flat = tokens.flatten(1) if vocabulary is None else vocabulary[tokens.flatten(1)]
        parent_slot = beam.long() // top_k
        beam_tokens = flat.gather(1, beam.long())
        if fixed:  # only the beam is proposed
            pool_tokens.append(beam_tokens)
            pool_logp.append(beam_logp)
            origin = parent_slot
            next_pool = torch.arange(width, device=root.device)[None] + pool_size
        else:
            pool_tokens.append(flat)
            pool_logp.append(logp.flatten(1))
            origin = torch.arange(beam_size, device=root.device).repeat_interleave(top_k)[None]
            next_pool = beam.long() + pool_size
        origin = origin.expand(root.shape[0], -1)
        pool_parents.append(
            torch.full_like(origin, -1) if beam_pool is None else beam_pool.gather(1, origin)
        )
        pool_size += pool_tokens[-1].shape[1]
        beam_pool = next_pool.expand(root.shape[0], -1)
        if level + 1 == depth or not _goes_on(beam_logp, level, price):
            break
        own = _bits(num_keys, width, words, root.device)
        if mask is None:
            mask = own.expand(root.shape[0], -1, -1)
        else:
            mask = mask.gather(1, parent_slot[..., None].expand(-1, -1, words)) | own
        num_keys += width
        key_words = (num_keys + 63) // 64
        logits = step(beam_tokens, level, mask[..., :key_words].contiguous(), num_keys, parent_slot)

    logp = torch.cat(pool_logp, 1)
    num_nodes = pool_size if fixed else min(config.tree_nodes, pool_size)
    if price.node and not fixed:
        best = logp.topk(num_nodes, 1)
        levels = torch.cat([torch.full((t.shape[1],), i) for i, t in enumerate(pool_tokens, 1)])
        above = torch.cat(pool_parents, 1).gather(1, best.indices) + 1
        found = best.values.exp().numpy(force=True), above.numpy(force=True), levels[best.indices]
        paying = (num_paying(*row, price) for row in zip(*found, strict=True))
        num_nodes = max(1, *paying)
    nodes, parents, depths, packed = ops.finalize_tree(
        logp, torch.cat(pool_parents, 1).int(), num_nodes=num_nodes
    )
    tokens = torch.cat([root, torch.cat(pool_tokens, 1).gather(1, nodes.long())], 1)
    promise = _promise(logp, pool_size - pool_tokens[-1].shape[1], num_nodes)
    return Tree(tokens, parents, depths, packed, promise, len(pool_tokens))


def _goes_on(beam_logp: Tensor, level: int, price: Price) -> bool:
    """Tell whether the level behind ``level``, of which the beam is, is expected to pay."""
    if not price.level:
        return True
    steps = level + 1
    return bool((beam_logp[:, 0] * (1 + 1 / steps)).exp().max() > price.level)


def _promise(logp: Tensor, before: int, num_nodes: int) -> Tensor:
    """Return the accepted tokens that the best nodes of a pool are expected to bring, and that its
    last level is expected to add, [B, 2]: E_d and E_d - E_(d-1) of OPT-Tree.

    Args:
        before: candidates of the levels before the last one.
    """
    gain = expected = logp.topk(num_nodes, 1).values.exp().sum(1)
    if before:
        gain = expected - logp[:, :before].topk(min(num_nodes, before), 1).values.exp().sum(1)
    return torch.stack([expected, gain], 1)
