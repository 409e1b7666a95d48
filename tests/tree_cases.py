"""Draws random draft trees for the tests of the ops that build and walk them."""

import random

import torch


def random_parents(rng: random.Random, num_nodes: int, shuffle: bool = False) -> list[int]:
    """Draw the parents of a random tree, node 0 the root; shuffled, they may follow children."""
    shape = rng.choice(["wide", "deep", "any"])
    parents = [-1]
    for node in range(1, num_nodes):
        low = max(0, node - 3) if shape == "deep" else 0
        high = min(node - 1, 3) if shape == "wide" else node - 1
        parents.append(rng.randint(low, max(low, high)))
    if shuffle:
        slots = [0, *rng.sample(range(1, num_nodes), num_nodes - 1)]
        shuffled = [-1] * num_nodes
        for node in range(1, num_nodes):
            shuffled[slots[node]] = slots[parents[node]]
        parents = shuffled
    return parents


def ancestors(parents: list[int], node: int) -> list[int]:
    """Return the path from the root to ``node``, both included."""
    path = [node]
    while path[-1] > 0:
        path.append(parents[path[-1]])
    return path[::-1]


def unpack_mask(mask: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Unpack [..., words] int64 to bool [..., num_keys]."""
    keys = torch.arange(num_keys)
    return (mask[..., keys // 64] >> (keys % 64)) & 1 == 1
