"""Makes an option for every field of :class:`SpecConfig`, whose docstring has their texts."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import types
import typing

from ..config import SpecConfig

PREFIX = "config_"  # of the names that these options have in what is parsed


def field_texts() -> dict[str, tuple[str, str]]:
    """Return section and text of each field, by its name.

    The docstring has sections at the margin, fields below them, one or several before a colon, and
    further lines of a text below the first.
    """
    found: dict[str, tuple[str, str]] = {}
    section, names = "", []
    for line in inspect.cleandoc(SpecConfig.__doc__ or "").splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if indent == 0:  # a section, or prose, below which there are no fields
            section = text.removesuffix(":")
        elif indent == 4:
            fields, _, text = text.partition(": ")
            names = fields.split(", ")
            found.update(dict.fromkeys(names, (section, text)))
        else:
            found.update({name: (section, f"{found[name][1]} {text}") for name in names})
    return found


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _integer_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


_integers.__name__, _integer_or_none.__name__ = "comma-separated integers", "integer or none"


def _reading(hint: object) -> dict:
    """Return arguments of ``add_argument`` for a field of this type."""
    if typing.get_origin(hint) is typing.Literal:
        return dict(choices=typing.get_args(hint))
    if hint is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if typing.get_origin(hint) is tuple:
        return dict(type=_integers, metavar="N,N")
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return dict(type=_integer_or_none, metavar="N")
    return dict(type=hint, metavar="N" if hint is int else "X")


def add_config_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Add an option for every field but some; what is parsed has those alone that were given."""
    texts, hints = field_texts(), typing.get_type_hints(SpecConfig)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(SpecConfig):
        if field.name in without:
            continue
        section, text = texts.get(field.name, ("options", ""))
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        text = text.replace("``", "").replace("%", "%%")
        groups[section].add_argument(
            f"--{field.name.replace('_', '-')}", dest=PREFIX + field.name,
            default=argparse.SUPPRESS, help=f"{text} [{default}]", **_reading(hints[field.name]),
        )  # fmt: skip


def given_fields(args: argparse.Namespace) -> dict[str, object]:
    """Return the fields that were given, and their values."""
    return {
        name.removeprefix(PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(PREFIX)
    }
