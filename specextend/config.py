"""Holds every knob of the draft-verify loop, in one dataclass."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

_CHOICES = {
    "tree_shape": ("opt", "top_k", "fixed"),
    "draft_cache": ("full", "window", "retrieval"),
    "score_reduce": ("mean", "max"),
    "gate": ("auto", "off"),
    "graphs": ("auto", "off"),
}


@dataclass(frozen=True)
class SpecConfig:
    """Holds the options of :class:`specextend.SpecExtend`. The defaults suit most inputs.

    Each technique of the paper has its own switch, so that an ablation is one field:
    ``tree_attention`` (split-prefix tree attention, SpecExtend section 3.2), ``draft_cache``
    (``"retrieval"``: cross-model retrieval, section 3.3; ``"window"``: StreamingLLM; ``"full"``),
    ``prefill_chunk`` (flash prefill in chunks), ``gate``.

    Tree:
        tree_nodes: proposed tokens per round, the root not counted.
        tree_depth: levels of the tree at most; look-up may go deeper, as far as ``tree_nodes`` go.
        tree_top_k: children that a node of the beam may have.
        tree_width: nodes of each level that the draft expands (the beam).
        tree_shape: ``"opt"``: the best ``tree_nodes`` of all expanded nodes (OPT-Tree,
            arXiv 2406.17276), as deep as levels add enough expected tokens; ``"top_k"``: the same
            with the depth fixed (EAGLE-2, arXiv 2406.16858); ``"fixed"``: the widths of
            ``tree_widths`` (LongSpec, arXiv 2502.17421), every node of them proposed.
        tree_threshold: expected tokens that a further level must add (delta of OPT-Tree), where
            ``gate`` does not measure that.
        tree_widths: nodes per level of the ``"fixed"`` shape.
        tree_attention: verify through the split-prefix tree kernel. False: torch's SDPA over the
            whole cache with a dense mask, the standard way.

    N-gram look-up:
        ngram_size: tokens of the longest match; shorter ones count less. Trees as above: the
            likeliest continuations of several matches, ``tree_width`` nodes per level at most, one
            behind the other where one match is long.

    Draft's context:
        draft_cache: what the draft attends to: all of the context, a recent window (with sinks),
            or chunks retrieved by the target's attention (with sinks and recent chunks).
        chunk_size: tokens per chunk.
        budget: tokens in the draft's working cache, a multiple of ``chunk_size``.
        retrieve_every: rounds between retrievals.
        sink_chunks, recent_chunks: chunks always kept, the first and the last, inside the budget.
        score_layers: target layers whose attention is scored; negative ones count from the end,
            among those that attend to all of the text. Scores of several layers are averaged.
        score_reduce: heads of a layer are averaged (``"mean"``) or the largest counts (``"max"``).
        draft_prefill_window: tokens that each token sees in the draft's prefill; None: all before
            it that are read. A draft trained on short inputs makes better keys from a window.
            Without effect on ``draft_cache="full"``, which is the standard way throughout.

    Running:
        prefill_chunk: tokens per forward in prefill; None: the whole prompt at once.
        gate: ``"auto"`` measures what rounds cost and proposes no level and, but for ``"fixed"``,
            no node that brings less than is written in its time; where speculation loses all the
            same it decodes plainly for a while. ``"off"`` always speculates, with whole trees.
        graphs: ``"auto"``: on a GPU the round runs from CUDA graphs, where the models can be
            captured; ``"off"``: never.
        exact: the target computes a row by itself and the same row in a tree with the same bits,
            so that text equals that of plain decoding with this option always, in bf16 and fp16
            too, greedy or sampled with the same seed. On a CPU plain rounds take from half as long
            to a quarter longer, and trees more (docs/measured.md). It does not promise the text of
            ``model.generate`` in bf16 and fp16, whose attention rounds in another way.
        seed: key of the sampling noise; None: drawn from torch's default generator.
    """

    tree_nodes: int = 8
    tree_depth: int = 8
    tree_top_k: int = 4
    tree_width: int = 3
    tree_shape: Literal["opt", "top_k", "fixed"] = "opt"
    tree_threshold: float = 0.2
    tree_widths: tuple[int, ...] = (4, 16, 16, 16, 16)
    tree_attention: bool = True

    ngram_size: int = 4

    draft_cache: Literal["full", "window", "retrieval"] = "retrieval"
    chunk_size: int = 32
    budget: int = 1024
    retrieve_every: int = 4
    sink_chunks: int = 1
    recent_chunks: int = 4
    score_layers: tuple[int, ...] = (-1,)
    score_reduce: Literal["mean", "max"] = "mean"
    draft_prefill_window: int | None = 512

    prefill_chunk: int | None = 1024
    gate: Literal["auto", "off"] = "auto"
    graphs: Literal["auto", "off"] = "auto"
    exact: bool = False
    seed: int | None = None

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        at_least_one = (
            "tree_nodes", "tree_depth", "tree_top_k", "tree_width", "chunk_size", "retrieve_every",
            "draft_prefill_window", "prefill_chunk", "ngram_size",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("sink_chunks", "recent_chunks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.draft_cache != "full":
            if self.budget < 1 or self.budget % self.chunk_size:
                raise ValueError(
                    f"budget must be a positive multiple of chunk_size={self.chunk_size}, "
                    f"got {self.budget}"
                )
            forced = self.sink_chunks + max(1, self.recent_chunks)
            if forced > self.budget_chunks:
                raise ValueError(
                    f"sink_chunks + recent_chunks (at least 1) must fit the budget of "
                    f"{self.budget_chunks} chunks, got {forced}"
                )
        if self.exact and not self.tree_attention:
            raise ValueError(
                "exact=True needs tree_attention=True: torch's SDPA rounds a row by those beside it"
            )
        if not self.score_layers:
            raise ValueError("score_layers must name at least one layer, got none")
        if self.tree_shape == "fixed" and (not self.tree_widths or min(self.tree_widths) < 1):
            raise ValueError(f"tree_widths must be positive, got {self.tree_widths}")

    @property
    def budget_chunks(self) -> int:
        """Count the chunks in the draft's working cache."""
        return self.budget // self.chunk_size

    @property
    def max_depth(self) -> int:
        """Give the levels of a tree at most."""
        return len(self.tree_widths) if self.tree_shape == "fixed" else self.tree_depth

    @property
    def max_nodes(self) -> int:
        """Give the proposed nodes of a tree at most."""
        return sum(self.tree_widths) if self.tree_shape == "fixed" else self.tree_nodes

    def nodes_within(self, depth: int) -> int:
        """Count the proposed nodes at most of a tree of so many levels, at least 1."""
        if self.tree_shape == "fixed":
            return sum(self.tree_widths[:depth])
        return min(self.tree_nodes, self.tree_top_k * (1 + (depth - 1) * self.tree_width))

    @property
    def tree_keys(self) -> int:
        """Count the rows behind the committed ones that a growing tree of a draft takes at most."""
        if self.tree_shape == "fixed":
            return sum(self.tree_widths)
        return self.tree_width * self.tree_depth

    def replace(self, **changes) -> SpecConfig:
        """Copy with other values; an unknown name is an error that lists the known ones."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; the options are {sorted(known)}")
        return replace(self, **changes)
