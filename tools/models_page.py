"""Says which families of `transformers` are served, and makes the tables of `docs/models.md`.

    python tools/models_page.py record   tries every family of the installed version; minutes
    python tools/models_page.py table    makes the tables of all that is recorded

The record says of each family and version "served", "refused", "not tried" or "wrong"; of the
newest version that it has of a family also what the family needs, or why not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench/results/families.json"
PAGE = ROOT / "docs/models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"
#: the class of `transformers` that loads a family, and what is said of those that it loads
CLASSES = {
    "AutoModelForCausalLM": "",
    "AutoModelForImageTextToText": ", given text alone, by `AutoModelForImageTextToText`",
}


def try_family(family: str, loads: str) -> tuple[str, str]:
    """Return what became of a family, and what is to be said of it.

    Args:
        loads: one of ``CLASSES``.
    """
    import transformers
    from drafts import SMALL, Oracle
    from families import NotInMiniature, miniature
    from models import prompt

    from specextend import SpecExtend, UnsupportedModelError

    ids, how = prompt(90), dict(max_new_tokens=24, do_sample=False)
    try:
        model = miniature(family, auto=getattr(transformers, loads))
        want = model.generate(ids, **how)[0].tolist()
    except NotInMiniature as reason:
        return "not tried", str(reason)
    except Exception as error:
        return "not tried", f"its own generate fails: {error}"
    try:
        spec = SpecExtend(model, Oracle(want, SMALL), SMALL)
        same = spec.generate(ids, **how)[0].tolist() == want
    except (UnsupportedModelError, ValueError) as reason:
        return "refused", str(reason)
    return ("served", needs(spec.target)) if same else ("wrong", "")


def needs(target) -> str:
    """Name what a target's layers want besides keys and values of one size."""
    cache = target.make_cache(1)
    found = {
        "states": any(kind.states for kind in target.kinds),
        "no attention": not any(kind.rows for kind in target.kinds),
        "windows": any(target.find_windows().values()),
        "chunks": bool(target.chunks),
        "own cache": type(cache).__mro__[1].__name__ == "_OneState",
    }
    config = target.model.config.get_text_config()
    found["latents"] = getattr(config, "kv_lora_rank", None) is not None
    found["shared keys"] = bool(getattr(config, "num_kv_shared_layers", 0))
    return ", ".join(name for name, there in found.items() if there)


def order(version: str) -> tuple[int, ...]:
    """Return what versions are sorted by."""
    return tuple(int(part) for part in version.split("."))


def record() -> None:
    """Try every family of every class, and write down what became of it."""
    import transformers
    from families import FAMILIES, SEEING

    version = transformers.__version__
    found = {
        loads: {family: try_family(family, loads) for family in families}
        for loads, families in zip(CLASSES, (FAMILIES, SEEING), strict=True)
    }
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for loads, outcomes in found.items():
        entries = known.setdefault(loads, {})
        for family, (state, text) in outcomes.items():
            entry = entries.setdefault(family, {"versions": {}, "text": ""})
            entry["versions"][version] = state
            if version == max(entry["versions"], key=order):
                entry["text"] = text
        known[loads] = dict(sorted(entries.items()))
        count = sum(state == "served" for state, _ in outcomes.values())
        print(f"transformers {version}, {loads}: {count} served")
    RECORD.write_text(json.dumps(known, indent=1) + "\n")


def since(versions: dict[str, str]) -> str:
    """Return the first version from which on a family is served in all that were tried."""
    first = ""
    for version in sorted(versions, key=order, reverse=True):
        if versions[version] != "served":
            break
        first = version
    return first


def table(loads: str, entries: dict[str, dict]) -> str:
    """Make the table of the families of a class."""
    tried = sorted({v for entry in entries.values() for v in entry["versions"]}, key=order)
    newest = tried[-1]
    states = {family: entry["versions"].get(newest) for family, entry in entries.items()}

    def named(wanted: str) -> str:
        return ", ".join(family for family, state in states.items() if state == wanted)

    rows = [
        f"| {family} | {entries[family]['text']} | {since(entries[family]['versions'])} |"
        for family, state in states.items()
        if state == "served"
    ]
    head = f"With `transformers` {newest} {len(rows)} families are served{CLASSES[loads]}"
    return "\n".join(
        [
            f"{head}; tried were {', '.join(tried)}:\n",
            "| family | needs | since |",
            "|---|---|---|",
            *rows,
            f"\nRefused are {named('refused')}.",
            f"\nNot tried in miniature: {named('not tried')}.\n",
        ]
    )


def page(text: str) -> str:
    """Return the page with the tables of what is recorded."""
    known = json.loads(RECORD.read_text())
    made = "\n".join(table(loads, known[loads]) for loads in CLASSES)
    before, rest = text.split(BEGIN)
    return before + BEGIN + made + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "table"])
    sys.path.insert(0, str(ROOT / "tests"))
    if parser.parse_args().what == "record":
        record()
    else:
        PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
