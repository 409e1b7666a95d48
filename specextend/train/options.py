"""Holds the options of ``specextend train``, apart from what takes long to import."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ..machine import DTYPES

KINDS = ("longspec", "eagle3")


@dataclass(frozen=True)
class StagePreset:
    """Says what a stage of training sets, unless an option says otherwise."""

    length: int
    batch: int
    lr: float
    anchor_offset: bool = False


# LongSpec's stages (arXiv 2502.17421, appendix D): short texts at shifted positions, long texts,
# long texts with an answer. EAGLE-3's one stage.
PRESETS = {
    ("longspec", 1): StagePreset(1024, 2048, 5e-4, anchor_offset=True),
    ("longspec", 2): StagePreset(32768, 256, 5e-6),
    ("longspec", 3): StagePreset(32768, 256, 5e-6),
    ("eagle3", 1): StagePreset(2048, 16, 5e-5),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options, without those of what it computes with."""
    group = parser.add_argument_group("what is trained")
    group.add_argument("--kind", choices=KINDS, required=True, help="LongSpec block, EAGLE-3 head")
    group.add_argument(
        "--target", metavar="MODEL", help="folder, hub id or GGUF file [the embedded target]"
    )
    group.add_argument(
        "--data", metavar="FILE", required=True,
        help='plain text, or JSON Lines with "text", or with "prompt" and "response"',
    )  # fmt: skip
    group.add_argument("--output", metavar="FOLDER", required=True)
    group.add_argument("--init", metavar="DRAFT", help="begin from a trained draft of this kind")
    group.add_argument(
        "--start", choices=("random", "target"), default="random",
        help="a new draft begins with random weights, or with layers of the target, which a Llama "
        "or one of its kin has [random]",
    )  # fmt: skip
    group.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")

    group = parser.add_argument_group("training")
    group.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=1,
        help="LongSpec's: 1 short windows at shifted positions, 2 long ones, 3 long ones with a "
        "prompt and a response; sets the next four [1]",
    )  # fmt: skip
    group.add_argument("--length", type=int, metavar="N", help="tokens per window")
    group.add_argument("--batch", type=int, metavar="N", help="windows per step")
    group.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    group.add_argument(
        "--anchor-offset", action=argparse.BooleanOptionalAction, default=None,
        help="longspec: shift positions at random, behind a few anchors",
    )  # fmt: skip
    group.add_argument(
        "--micro-batch", type=int, metavar="N",
        help="windows at a time; what is learnt does not depend on it [as many as fit in memory]",
    )  # fmt: skip
    group.add_argument("--steps", type=int, metavar="N", help="[once through the data]")
    group.add_argument("--warmup", type=int, metavar="N", help="steps [a tenth]")
    group.add_argument(
        "--schedule", choices=("cosine", "linear"), default="cosine",
        help="linear: constant, then falling over the last 30 %% [cosine]",
    )  # fmt: skip
    group.add_argument(
        "--labels", choices=("data", "target"),
        help="learn the text's tokens, or the target's distribution [longspec: data, eagle3: "
        "target]",
    )  # fmt: skip
    group.add_argument(
        "--max-lag", type=int, default=4, metavar="N",
        help="longspec: the target's keys end 1 to N tokens before a query; 1: no noise [4]",
    )  # fmt: skip
    group.add_argument(
        "--ttt-steps", type=int, default=7, metavar="N",
        help="eagle3: steps on the head's own output [7]",
    )  # fmt: skip
    group.add_argument(
        "--draft-vocab", type=int, metavar="N",
        help="eagle3: a head of its own for the N most frequent tokens [the target's]",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto",
        help="of the target; the draft is trained in float32 [as its checkpoint]",
    )  # fmt: skip

    group = parser.add_argument_group("validation and logs")
    group.add_argument(
        "--validation-data", metavar="FILE", help="text that the draft is tried on [none]"
    )
    group.add_argument("--validate-every", type=int, default=500, metavar="N", help="steps [500]")
    group.add_argument("--validation-prompts", type=int, default=4, metavar="N", help="[4]")
    group.add_argument("--validation-length", type=int, default=1024, metavar="N", help="[1024]")
    group.add_argument("--validation-tokens", type=int, default=64, metavar="N", help="[64]")
    group.add_argument("--save-every", type=int, default=100, metavar="N", help="steps [100]")
    group.add_argument("--log-every", type=int, default=10, metavar="N", help="steps [10]")
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, default=None,
        help="event files in the output folder [if tensorboard is installed]",
    )  # fmt: skip
