"""Says which families of `transformers` are served, and makes the table of `docs/models.md`.

    python tools/models_page.py record   tries every family of the installed version; minutes
    python tools/models_page.py table    makes the table of all that is recorded

A record says of each family "served" and what it needs, "refused" and why, or why it was not tried.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench/results"
PAGE = ROOT / "docs/models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"


def try_family(family: str) -> tuple[str, str]:
    """Return what became of a family, and what is to be said of it."""
    from drafts import SMALL, Oracle
    from families import NotInMiniature, miniature
    from models import prompt

    from specextend import SpecExtend, UnsupportedModelError

    ids, how = prompt(90), dict(max_new_tokens=24, do_sample=False)
    try:
        model = miniature(family)
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


def record() -> None:
    """Try every family, and write down what became of it."""
    import transformers
    from families import FAMILIES

    found = {family: try_family(family) for family in FAMILIES}
    path = RECORDS / f"families_{transformers.__version__}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path.name}: {sum(state == 'served' for state, _ in found.values())} served")


def table(records: dict[str, dict[str, list[str]]]) -> str:
    """Make the table of records by version."""
    versions = sorted(records, key=lambda v: tuple(map(int, v.split("."))))
    newest = records[versions[-1]]
    rows = ["| family | needs | served with |", "|---|---|---|"]
    for family, (state, text) in newest.items():
        if state == "served":
            by = [v for v in versions if records[v].get(family, ("",))[0] == "served"]
            rows.append(f"| {family} | {text} | {', '.join(by)} |")
    count = len(rows) - 2
    refused = [family for family, (state, _) in newest.items() if state == "refused"]
    rest = [family for family, (state, _) in newest.items() if state == "not tried"]
    head = f"With `transformers` {versions[-1]} {count} families are served:\n\n"
    tail = f"\n\nRefused are {', '.join(refused)}.\n\nNot tried in miniature: {', '.join(rest)}.\n"
    return head + "\n".join(rows) + tail


def page(text: str) -> str:
    """Return the page with the table of what is recorded."""
    paths = RECORDS.glob("families_*.json")
    made = table({p.stem.split("_")[1]: json.loads(p.read_text()) for p in paths})
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
