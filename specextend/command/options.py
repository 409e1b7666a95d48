"""Makes the options that commands share, and the configuration that they ask for.

Nothing here takes long to import: the parser is made before it is known what will run.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing

from .. import assets
from ..config import SpecConfig
from ..errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def config_docs() -> tuple[dict[str, str], dict[str, str]]:
    """Return section and text of each field of :class:`SpecConfig`.

    They are read from its docstring, so that they stand in one place.
    """
    sections, texts, section, names = {}, {}, "", []
    for line in inspect.cleandoc(SpecConfig.__doc__ or "").splitlines():
        if re.fullmatch(r"\S.*:", line):
            section, names = line[:-1], []
        elif entry := re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            sections.update(dict.fromkeys(names, section))
            texts.update(dict.fromkeys(names, entry[2]))
        elif line.startswith("        "):
            texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    clean = {name: text.replace("``", "").replace("%", "%%") for name, text in texts.items()}
    return sections, clean


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _integer_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


_integers.__name__, _integer_or_none.__name__ = "comma-separated integers", "integer or none"


def add_config_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Add an option for every field of :class:`SpecConfig` but some."""
    sections, texts = config_docs()
    hints = typing.get_type_hints(SpecConfig)
    groups = {}
    for field in dataclasses.fields(SpecConfig):
        if field.name in without:
            continue
        section = sections.get(field.name, "options")
        group = groups.setdefault(section, None) or parser.add_argument_group(section)
        groups[section] = group
        hint = hints[field.name]
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        how: dict = {"help": f"{texts.get(field.name, '')} [{default}]"}
        if typing.get_origin(hint) is typing.Literal:
            how["choices"] = typing.get_args(hint)
        elif hint is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            how.update(type=_integers, metavar="N,N")
        elif typing.get_origin(hint) in (typing.Union, types.UnionType):
            how.update(type=_integer_or_none, metavar="N")
        else:
            how.update(type=hint, metavar="N" if hint is int else "X")
        group.add_argument(
            f"--{field.name.replace('_', '-')}", dest=f"config_{field.name}",
            default=argparse.SUPPRESS, **how,
        )  # fmt: skip


def config_from(
    args: argparse.Namespace, target: str | None, draft: str | None, **defaults
) -> SpecConfig:
    """Return the configuration that the options ask for."""
    from ..draft import WORDS  # with transformers, which takes seconds

    given = {k[len("config_") :]: v for k, v in vars(args).items() if k.startswith("config_")}
    if target is None and draft in (None, *WORDS, *assets.DRAFTS):
        defaults = {**assets.SETTINGS, **defaults}
    try:
        return SpecConfig(**{**defaults, **given})
    except ValueError as error:
        raise UsageError(error) from error


def _words(names) -> str:
    return ", ".join(f'"{name}"' for name in names)


def add_models(parser: argparse.ArgumentParser, dtype: str | None, several: bool = False) -> None:
    """Add the options of the models, and of what they run on.

    Args:
        dtype: the default; None: it depends on the device.
        several: ``--draft`` may be repeated.
    """
    group = parser.add_argument_group("models")
    group.add_argument(
        "--target", metavar="MODEL", help="folder or hub id of a causal LM [the embedded target]"
    )
    group.add_argument(
        "--draft", metavar="DRAFT", action="append" if several else "store",
        help="folder or hub id of a causal LM with the same tokenizer or of a trained head (EAGLE, "
        'LongSpec); "ngram": look-up in the text; "self": the target on a part of its cache; '
        f'"none": plain decoding; {_words(assets.DRAFTS)}: embedded ones [model]'
        + "; may be repeated, for drafts of other kinds" * several,
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES, default=dtype,
        help='"auto": as the checkpoint is '
        f"[{dtype or 'float32; on a GPU as the preset or the checkpoint is'}]",
    )  # fmt: skip
    add_device(group)


def add_device(group) -> None:
    """Add the options of what is computed with."""
    group.add_argument("--device", help='[a GPU if there is one, else "cpu"]')
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute with")
