"""Writes a text, for ``specextend generate`` and ``chat``: options, prompt, summary."""

from __future__ import annotations

import argparse

import torch

from ..errors import UsageError


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the options of how a text is written."""
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="[256]")
    group.add_argument(
        "--temperature", type=float, metavar="X",
        help="0: greedy; above: sample [0; 1 with another option of sampling]",
    )  # fmt: skip
    group.add_argument("--top-k", type=int, metavar="N", help="sample from the N likeliest tokens")
    group.add_argument(
        "--top-p", type=float, metavar="X", help="sample from the likeliest tokens of this mass"
    )
    group.add_argument(
        "--min-p", type=float, metavar="X",
        help="sample from the tokens at least X times as likely as the likeliest",
    )  # fmt: skip
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end after this text; may be repeated"
    )
    group.add_argument(
        "--highlight", action="store_true",
        help="on a terminal with colours, tell accepted tokens from the target's own",
    )  # fmt: skip


def generation_options(args: argparse.Namespace, tokenizer) -> dict:
    """Return the keyword arguments of ``SpecExtend.stream`` that the options ask for.

    Raises:
        UsageError: options that do not go together, or out of range.
    """
    filters = {k: getattr(args, k) for k in ("top_k", "top_p", "min_p")}
    filters = {k: v for k, v in filters.items() if v is not None}
    temperature = args.temperature
    if temperature is None:
        temperature = 1.0 if filters else 0.0
    if temperature < 0:
        raise UsageError(f"--temperature must not be negative, got {temperature}")
    if filters and not temperature:
        option = next(iter(filters)).replace("_", "-")
        raise UsageError(f"--{option} has no meaning with --temperature 0, which is greedy")
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    options: dict = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": temperature > 0,
        "tokenizer": tokenizer,  # for stop strings, the checkpoint's own too
    }
    if temperature > 0:
        options.update(temperature=temperature, **filters)
    if args.repetition_penalty is not None:
        options["repetition_penalty"] = args.repetition_penalty
    if args.stop:
        options["stop_strings"] = args.stop
    return options


def template(tokenizer, messages: list[dict]) -> torch.Tensor:
    """Put messages into the tokenizer's chat template: [1, L] int64.

    Raises:
        ValueError: the template, which is a program, refuses them or fails.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
    except Exception as error:  # of any type
        raise ValueError(f"the tokenizer's chat template: {error}") from error


def encode(tokenizer, text: str) -> torch.Tensor:
    """Return the tokens of a text, [1, L] int64; ValueError if there are none."""
    ids = tokenizer(text).input_ids
    if not ids:
        raise ValueError("the prompt is empty")
    return torch.tensor([ids])


def summary(stats) -> str:
    """Return one line about a generation."""
    seconds = stats.seconds
    parts = [f"{stats.num_emitted_tokens} tokens", f"{stats.tokens_per_second:.1f} tokens/s"]
    if stats.num_draft_tokens:
        parts.append(f"mean acceptance length {stats.mean_acceptance_length:.2f}")
    prefill = f"prefill of {stats.num_prompt_tokens:,} tokens"
    if stats.num_cached_tokens:
        prefill += f" ({stats.num_cached_tokens:,} cached)"
    prefill += f" {seconds['prefill']:.1f} s"
    if "draft_prefill" in seconds:
        prefill += f" + draft {seconds['draft_prefill']:.1f} s"
    return " | ".join([*parts, prefill])


def run(spec, ids: torch.Tensor, options: dict, live, meter) -> list[int]:
    """Generate behind ``ids`` [1, L] int64, show what comes, and return the new token ids."""
    tokens: list[int] = []
    try:
        for step in spec.stream(ids, **options):
            meter.close()
            live.add(step.tokens, step.num_accepted)
            tokens += step.tokens
    finally:
        meter.close()
        live.end()
    return tokens
