"""Knows the versions of torch and `transformers` that specextend was tested with.

pyproject.toml has the ranges and pip keeps to them. They are read back here from what pip wrote
down, so that a package that was changed afterwards is found out by its name and its range.
"""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def supported(name: str) -> SpecifierSet:
    """Return the versions of a package that pip may choose.

    Empty, which allows every version, where specextend was not installed but is run from its
    folder.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires("specextend") or ()]
    except metadata.PackageNotFoundError:
        return SpecifierSet()
    return next((r.specifier for r in requirements if r.name == name), SpecifierSet())


def check(name: str, version: str) -> None:
    """Refuse a version outside the range.

    Raises:
        ImportError: with the range and the version.
    """
    allowed = supported(name)
    if not allowed.contains(version, prereleases=True):
        # As people write it: the lower end first.
        text = ", ".join(sorted(map(str, allowed), reverse=True))
        raise ImportError(
            f"specextend works with {name} {text}, found {name} {version}; install one of these: "
            f"pip install '{name}{text.replace(' ', '')}'"
        )
