"""Makes the options that commands share, and the configuration that they ask for.

Nothing here takes long to import: the parser is made before it is known what will run.
"""

from __future__ import annotations

import argparse

from .. import assets
from ..config import SpecConfig
from ..errors import UsageError
from ..machine import DEVICE_HELP, DTYPES
from .config_options import given_fields


def own_settings(target: str | None, draft: str | None) -> dict[str, object]:
    """Return the settings of the embedded models, where these are the ones that are named."""
    from ..draft import WORDS, beside_lookup  # with transformers, which takes seconds

    model = draft and (beside_lookup(draft) or draft)
    return assets.SETTINGS if target is None and model in (None, *WORDS, *assets.DRAFTS) else {}


def config_from(args: argparse.Namespace, **defaults) -> SpecConfig:
    """Return the configuration: what was given, before ``defaults``, before the models' own.

    Raises:
        UsageError: fields that do not go together, or out of range.
    """
    own = own_settings(args.target, args.draft)
    try:
        return SpecConfig(**{**own, **defaults, **given_fields(args)})
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
        "--target", metavar="MODEL",
        help="folder or hub id of a causal LM, or a GGUF file [the embedded target]",
    )  # fmt: skip
    group.add_argument(
        "--draft", metavar="DRAFT", action="append" if several else "store",
        help="folder or hub id of a causal LM with the same tokenizer or of a trained head (EAGLE, "
        'LongSpec), or a GGUF file; "ngram": look-up in the text; "self": the target on a part of '
        f'its cache; "none": plain decoding; {_words(assets.DRAFTS)}: embedded ones [model]; '
        '"DRAFT+ngram": one with a model, and look-up, in one tree'
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
    group.add_argument("--device", help=DEVICE_HELP)
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute with")
