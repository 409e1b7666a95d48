"""Lists faults for ``tools/mutate.py``, by the area that they are planted in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """Describes a fault: one change of one file, which some test must notice.

    Attributes:
        name: what is wrong.
        file: its path below the root.
        old, new: ``old``, which is in the file once, becomes ``new``.
        tests: files of tests or ids of tests in them, as pytest takes them; run until one fails,
            the files last.
        sources: what has to be compiled again for a fault in C++, as paths below the root.
        why_it_survives: why no test can notice. It counts as not found all the same.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    sources: tuple[str, ...] = ()
    why_it_survives: str = ""

    def planted(self) -> str:
        """Return the text of the file with the fault in it."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: in {self.file} {count} times, not once: {self.old!r}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Area:
    """Holds faults that are planted and run in one way.

    Attributes:
        name: what tables call it.
        mutants: the faults.
        keyword: what pytest's -k chooses by, among the tests that they name.
        environment: variables that choose what the tests run on.
    """

    name: str
    mutants: list[Mutant]
    keyword: str
    environment: dict[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        return {**os.environ, "COLUMNS": "200", **self.environment}


def areas() -> list[Area]:
    """Return all faults there are."""
    from . import cpu, cuda, python

    on_the_cpu = "not emulated and not cuda"
    return [
        Area("python", python.MUTANTS, on_the_cpu),
        Area("partition", cpu.PARTITION, "emulated or partition"),
        Area("cpu", cpu.MUTANTS, on_the_cpu, {"SPECEXTEND_EMULATED_ISA": "own"}),
        Area("amx", cpu.AMX, on_the_cpu, {"SPECEXTEND_EMULATED_ISA": "amx"}),
        Area("cuda", cuda.MUTANTS, "emulat or hopper or bulk_copies"),
    ]
