"""Names the papers' settings, for ``specextend eval --preset``, each with its table's figures.

A preset says what to run; the prompts are the user's own (``--prompts``), as are the models. The
papers' figures stand beside ours only where target and draft are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .options import Stage
from .papers import LENGTHS, LONGSPEC, LONGSPEC_5_LENGTHS, MODELS, SPECEXTEND, PaperRow
from .records import Header


@dataclass(frozen=True)
class Preset:
    """Describes the setting of a paper's table.

    Attributes:
        name: its name on the command line.
        about: what it is, in one line.
        stage: what runs.
        rows: the table.
        config: fields of ``SpecConfig``.
        by_kind: other values of these fields, by the draft's kind.
        new_tokens: how many are written for each prompt.
        dtype: that of the models, on a GPU.
        baseline: the method that the paper's speed-ups are over.
        with_prefill: whether the paper's tokens per second count the prefill's time.
        notes: what to know before comparing.
    """

    name: str
    about: str
    stage: Stage
    rows: tuple[PaperRow, ...]
    config: dict
    by_kind: dict[str, dict] = field(default_factory=dict)
    new_tokens: int = 256
    dtype: str = "float16"
    baseline: str = "hf"
    with_prefill: bool = True
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> str:
        """Return which table of the paper the rows are from."""
        return self.rows[0].table

    def config_for(self, kind: str | None) -> dict:
        """Return the fields of ``SpecConfig`` for a draft of this kind."""
        return {**self.config, **self.by_kind.get(kind or "", {})}

    def rows_for(self, header: Header) -> list[PaperRow]:
        """Return the rows whose target and draft are those of these results, by the last component
        of their names. Synthetic runs have nobody's models."""
        if header.settings.get("synthetic"):
            return []
        target, drafts = (
            last_name(header.target),
            {last_name(name) for name in header.drafts.values()},
        )
        return [
            row
            for row in self.rows
            if target in MODELS[row.target]
            and (row.draft is None or drafts.intersection(MODELS[row.draft]))
        ]


def last_name(name: str) -> str:
    """Return the last component of a hub id or a folder, in lower case."""
    return name.rstrip("/").rpartition("/")[2].lower()


def find(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        ValueError: there is none; the names are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"a preset is one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


# The papers' text and published code have an OPT-Tree of 50 nodes, 10 levels, threshold 0.7, over
# beams of 50; chunks of 32, no forced ones, scored by the last layer's heads on average; a window
# of 512 for a draft's prefill. Speculation is never turned off.
_CONFIG = dict(
    tree_shape="opt", tree_nodes=50, tree_depth=10, tree_threshold=0.7, tree_top_k=50,
    tree_width=50, chunk_size=32, budget=1024, retrieve_every=4, sink_chunks=0, recent_chunks=0,
    score_layers=(-1,), score_reduce="mean", draft_prefill_window=512, gate="off",
)  # fmt: skip
_HEADS = {kind: dict(budget=2048, retrieve_every=8) for kind in ("eagle1", "eagle3")}
_TREE = dict(tree_shape="fixed", tree_widths=(4, 16, 16, 16, 16), gate="off")

_METHODS = ("hf", "plain", "standard", "retrieval")
_POWERS = tuple(2**i for i in range(8))  # 1 to 128

_SAME_SETTING = (
    "Tables 2, 3 and 4 measure one setting and differ: Vicuna-7B / Vicuna-68M on GovReport at 16K "
    "is 2.82 times Hugging Face in Table 2 and 2.65 in Table 3; without SpecExtend at 1K its "
    "acceptance length is 2.73 in Table 2 and 3.75 in Table 4."
)


def _files(lengths, methods, runs=2, count=20, sweep=None) -> Stage:
    return Stage(lengths, methods, ("prompts",), count, runs, sweep or {})


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper-table1", "SpecExtend: what the draft makes of a needle, by its cache",
            Stage(
                LENGTHS, ("plain", "tree_attention", "streaming", "retrieval", "self"),
                ("needle",), 20, 1,
            ),
            tuple(SPECEXTEND["1"]), _CONFIG,
            notes=(
                "The lengths are those of Table 2, and the needle is our own; accuracy is the "
                "share of the answer's tokens that are the draft's first choice.",
            ),
        ),
        Preset(
            "paper-table2", "SpecExtend: speed and acceptance with it and without",
            _files(LENGTHS, _METHODS), tuple(SPECEXTEND["2"]), _CONFIG, _HEADS,
            notes=(
                "The rows LC-7B / LC-68M without SpecExtend repeat acceptance lengths and tokens "
                "per second of V-7B / V-68M digit for digit, on all three data sets.",
                _SAME_SETTING,
            ),
        ),
        Preset(
            "paper-table3", "SpecExtend: against other methods",
            _files(LENGTHS, (*_METHODS, "self")), tuple(SPECEXTEND["3"]), _CONFIG,
            notes=(
                "TriForce and MagicDec are not here as they are; the target as its own draft, on a "
                "retrieved cache, is their nearest kin.",
                _SAME_SETTING,
            ),
        ),
        Preset(
            "paper-table4", "SpecExtend: one technique after the other",
            _files(
                LENGTHS,
                ("hf", "plain", "standard", "flash_prefill", "tree_attention", "streaming",
                 "retrieval"),
            ),
            tuple(SPECEXTEND["4"]), _CONFIG, baseline="standard", notes=(_SAME_SETTING,),
        ),
        Preset(
            "paper-table5", "SpecExtend: Llama-3.1 with EAGLE and EAGLE-3",
            _files(LENGTHS, _METHODS), tuple(SPECEXTEND["5"]), _CONFIG, _HEADS, dtype="bfloat16",
            notes=(
                "The authors' published logs of this setting differ in some cells and have 4 to "
                "14 runs of 40 in cells with SpecExtend from 2K on: with EAGLE-3 at 16K, 40.33 "
                "tokens per second over 4 runs; 53.18 in the table.",
                "The table's EAGLE heads have no published name; the public ones for this target "
                "are taken for them.",
            ),
        ),
        Preset(
            "paper-table6", "SpecExtend: Llama-3.1 with EAGLE at 32K to 128K",
            _files((32768, 65536, 131072), _METHODS), tuple(SPECEXTEND["6"]), _CONFIG, _HEADS,
            dtype="bfloat16",
            notes=(
                "The figures for 64K and 128K are not independent of those for 32K: the published "
                "script runs the prompts of one file for all three.",
            ),
        ),
        Preset(
            "paper-table8", "SpecExtend: options of the retrieval at 8K",
            _files(
                (8192,), ("hf", "plain", "retrieval"),
                sweep={
                    "budget": tuple(64 * value for value in _POWERS),
                    "chunk_size": _POWERS,
                    "retrieve_every": _POWERS,
                },
            ),
            tuple(SPECEXTEND["8"]), _CONFIG, _HEADS,
            notes=(
                "The table sweeps the working cache and the top-k of chunks of 32 apart; both are "
                "the budget here, the same number of tokens.",
                "Its best value with Vicuna-68M is 33.69 tokens per second; Table 2 has 55.16 for "
                "the same models at 8K.",
            ),
        ),
        Preset(
            "longspec-table1", "LongSpec: its block against other methods",
            _files((4096, 8192, 12288), ("hf", "hf_lookup", "plain", "longspec")),
            tuple(LONGSPEC["1"]), _TREE, new_tokens=1024, baseline="plain", with_prefill=False,
            notes=(
                "The columns are data sets of LongBench, with prompts of their own lengths.",
                "The rows of Vanilla HF have the same figure for GovReport and LCC with four of "
                "five models.",
                'The table calls its last target "LLaMA-3.1-8B"; code and checkpoint are '
                "Llama-3-8B-Instruct-262k.",
                "LongChat-7B on GovReport has 3.59 here; Table 5 has 3.97 and more at all lengths.",
            ),
        ),
        Preset(
            "longspec-table2", "LongSpec: what anchor-offset indices in training bring",
            _files((4096, 8192, 12288), ("plain", "longspec")), tuple(LONGSPEC["2"]), _TREE,
            new_tokens=1024, baseline="plain", with_prefill=False,
            notes=(
                "The table does not name its model; its second row is that of the 8B model in "
                "Table 1.",
            ),
        ),
        Preset(
            "longspec-table5", "LongSpec: against the length of the prompt",
            _files(LONGSPEC_5_LENGTHS, ("plain", "longspec")), tuple(LONGSPEC["5"]), _TREE,
            new_tokens=1024, baseline="plain", with_prefill=False,
            notes=(
                "The table's columns are ranges of lengths (0-5K, 5-10K, 10-15K, 15-20K, 20-25K, "
                "25-32K); beside each of ours stands the one that it lies in.",
                "All of its acceptance lengths are above the 3.59 of Table 1.",
            ),
        ),
    )
}  # fmt: skip
