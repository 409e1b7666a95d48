"""Finds the embedded models, and the document that the demonstration continues."""

from __future__ import annotations

import sysconfig
from pathlib import Path

# The pair never saw these modules of the standard library in training. The first that this Python
# has gives the demonstration's document its name; the ones after it lengthen a short document.
HELD_OUT = (
    "ipaddress.py",
    "tarfile.py",
    "argparse.py",
    "_pydatetime.py",
    "datetime.py",
    "inspect.py",
    "_pydecimal.py",
    "typing.py",
    "unittest/mock.py",
    "email/_header_value_parser.py",
    "smtplib.py",
    "pickletools.py",
    "statistics.py",
)
# These options suit the pair: the draft has seen 512 tokens at most, and on a CPU every node costs.
SETTINGS = {"budget": 512, "tree_nodes": 6}
# The command line's names of drafts for the embedded target lead to their folders.
DRAFTS = {"model": "draft", "eagle3": "eagle3", "longspec": "longspec"}
MIN_CHARS = 72_000  # about 18,000 tokens of the embedded tokenizer
# In ipaddress.py the IPv6 classes repeat the IPv4 ones, 7,000 tokens after them. A prompt that ends
# here has both to look back at.
DEMO_END = "class IPv6Interface(IPv6Address):\n\n    def __init__(self, address):"


def target_path() -> Path:
    """Return the folder of the embedded target model and its tokenizer."""
    return Path(__file__).parent / "target"


def draft_path(kind: str = "model") -> Path:
    """Return the folder of an embedded draft; that of the model has its tokenizer too.

    Raises:
        ValueError: there is none of this kind.
    """
    path = Path(__file__).parent / DRAFTS[kind]
    if not (path / "config.json").exists():
        raise ValueError(f"the embedded draft {kind!r} is not in {path}")
    return path


def held_out_documents() -> list[tuple[str, str]]:
    """Return name and text of every held-out module that the running Python has, in order."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = []
    for name in HELD_OUT:
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except OSError:
            continue
        if len(text) > 2_000:  # a module that moved leaves a stub of a few lines
            texts.append((name, text))
    return texts


def demo_document(min_chars: int = MIN_CHARS) -> tuple[str, str]:
    """Join a long document of modules of the running Python that were held out of training.

    Args:
        min_chars: modules are joined until the text is at least this long.

    Returns:
        The names of the modules joined by " + ", and the text.
    """
    names: list[str] = []
    text = ""
    for name, source in held_out_documents():
        names.append(name)
        text += source
        if len(text) >= min_chars:
            return " + ".join(names), text
    if not text:
        raise FileNotFoundError(
            f"demo_document: none of {', '.join(HELD_OUT)} is in {sysconfig.get_path('stdlib')}"
        )
    return " + ".join(names), text


def demo_prompt(tokenizer, tokens: int = 16_000) -> tuple[str, list[int]]:
    """Make the demonstration's prompt: `tokens` tokens up to where copying from afar helps.

    Where this Python's module does not have that place, or has too little text before it, the
    prompt is the beginning of `demo_document` instead.

    Returns:
        The name of the document, and token ids.
    """
    name, text = demo_document()
    ids = tokenizer(text[: text.find(DEMO_END) + len(DEMO_END)])["input_ids"]
    if DEMO_END in text and len(ids) >= tokens:
        return name, ids[-tokens:]
    name, text = demo_document(max(MIN_CHARS, 5 * tokens))
    ids = tokenizer(text)["input_ids"]
    if len(ids) < tokens:
        raise ValueError(f"demo_prompt: {name} has {len(ids)} tokens, {tokens} are wanted")
    return name, ids[:tokens]
