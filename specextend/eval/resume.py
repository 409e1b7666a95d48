"""Finds out whether a folder's results are of the same evaluation, by its header."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from .. import machine
from ..config import SpecConfig
from ..terminal import dtype_name
from .models import Models
from .plan import Plan
from .records import FILE, Header, Results, Run

# What two parts of one evaluation must have in common in their headers.
_SAME = ("version", "target", "drafts", "dtype", "device", "threads", "seed", "settings")
_SAME_MACHINE = ("processor", "isa", "gpu")


def header_of(plan: Plan, models: Models, config: SpecConfig, peak_memory: str | None) -> Header:
    """Return the header of the results.

    Args:
        config: of the first draft.
        peak_memory: see ``records.Header``.
    """
    options, defaults = plan.options, SpecConfig()
    settings = {
        "preset": options.preset,
        "stages": [dataclasses.asdict(stage) for stage in plan.stages],
        "new_tokens": plan.new_tokens,
        "warmup": options.warmup,
        "temperature": options.temperature,
        "documents": None if options.prompts is None else options.prompts.name,
        "config": {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(SpecConfig)
            if getattr(config, field.name) != getattr(defaults, field.name)
        },
        "synthetic": plan.synthetic,
        "read_once": options.read_once or None,  # as of results from before there was a choice
    }
    return Header(
        **machine.header(models.target.device.type),
        target=options.target or "the embedded target",
        drafts=models.names,
        dtype=dtype_name(models.target),
        seed=options.seed,
        settings=json.loads(json.dumps(settings)),  # as it will be read
        peak_memory=peak_memory,
    )


def _what_differs(before: Header, now: Header) -> str | None:
    """Tell of the first thing that two headers do not have in common; None if there is none."""
    pairs = [(name, getattr(before, name), getattr(now, name)) for name in _SAME[:-1]]
    pairs += [(name, before.machine.get(name), now.machine.get(name)) for name in _SAME_MACHINE]
    keys = sorted({*before.settings, *now.settings})
    pairs += [(key, before.settings.get(key), now.settings.get(key)) for key in keys]
    for name, was, wanted in pairs:
        if was != wanted:
            return f"{name}={json.dumps(was)}, but {name}={json.dumps(wanted)} is asked for"
    return None


def resume(folder: Path, header: Header) -> list[Run]:
    """Return the runs that the folder has already.

    Raises:
        ValueError: they are another evaluation's.
    """
    if not (folder / FILE).exists() or not (folder / FILE).stat().st_size:
        return []
    results = Results.read(folder)
    if difference := _what_differs(results.header, header):
        raise ValueError(
            f"the results in {folder} were made with {difference}: name another folder with "
            "--output, or the same options to go on"
        )
    return results.runs
