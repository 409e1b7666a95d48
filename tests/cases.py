"""Holds the shapes that tests and benchmarks share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Counts query heads, KV heads and head dimension of one attention layer."""

    q: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.q}/{self.kv}/{self.dim}"


# They are of Llama-3 8B, Llama-2 7B (no groups), Qwen2.5 7B (groups of seven), the embedded target.
LAYERS = [Heads(32, 8, 128), Heads(32, 32, 128), Heads(28, 4, 128), Heads(8, 8, 64)]
BENCH_PREFIXES = [2048, 16384, 65536]
# They are rows, the root included: 32 and 64 are it and 31 or 63 nodes; with a node more, the
# kernels compute half as much again or twice as much.
BENCH_TREES = [1, 8, 16, 32, 33, 64, 65]

# They lie at and around the borders of words, tiles, blocks of keys and segments.
PREFIXES = [0, 1, 15, 63, 64, 65, 127, 1000, 4097]
TREES = [1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128]
GROUPS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]
