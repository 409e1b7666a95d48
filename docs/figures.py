"""Draws the figures of how_it_works.md: ``python docs/figures.py`` writes ``docs/images/*.svg``."""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, GREY, PALE = "#24292f", "#6e7781", "#eef0f2"
TARGET, TARGET_PALE = "#1f5fa8", "#d6e6f7"
DRAFT, DRAFT_PALE = "#b45309", "#fde9cf"
GOOD, GOOD_PALE = "#1a7f37", "#d5f0dc"


class Figure:
    """An SVG on a white card, legible on light and dark pages. Coordinates are pixels."""

    def __init__(self, width: int, height: int, title: str):
        self.size, self.title, self.parts = (width, height), title, []

    def box(self, x, y, width, height, fill="none", line=INK, radius=0, weight=1.0):
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'fill="{fill}" stroke="{line}" stroke-width="{weight:g}"/>'
        )

    def dot(self, x, y, text="", fill=PALE, line=INK, radius=13, colour=INK):
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius}" fill="{fill}" stroke="{line}" '
            'stroke-width="1.5"/>'
        )
        self.text(x, y + 4, text, size=12, anchor="middle", colour=colour)

    def text(self, x, y, text, size=13, anchor="start", colour=INK, bold=False, mono=False):
        family = ' font-family="Menlo, Consolas, DejaVu Sans Mono, monospace"' if mono else ""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}"{family}{weight}>{escape(text)}</text>'
        )

    def lines(self, x, y, *texts, step=18, **how):
        for i, text in enumerate(texts):
            self.text(x, y + i * step, text, **how)

    def path(self, d, colour=INK, weight=1.5, dashed=False, arrow=False):
        head = f' marker-end="url(#{colour[1:]})"' if arrow else ""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{weight:g}"{dash}{head}/>'
        )

    def arrow(self, x1, y1, x2, y2, colour=INK, **how):
        self.path(f"M{x1:g} {y1:g} L{x2:g} {y2:g}", colour, arrow=True, **how)

    def svg(self) -> str:
        width, height = self.size
        heads = "".join(
            f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{c}"/></marker>'
            for c in (INK, GREY, TARGET, DRAFT, GOOD)
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n<defs>{heads}</defs>\n"
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" '
            f'fill="#ffffff" stroke="#d0d7de"/>\n{body}\n</svg>\n'
        )


# The tree of the first two figures: parents, and places of the nodes.
PARENTS = (-1, 0, 0, 1, 1, 2)
PLACES = ((0, 45), (62, 20), (62, 70), (124, 4), (124, 38), (124, 70))
PATH = (0, 1, 4)  # what the target confirms


def round_() -> Figure:
    f = Figure(800, 330, "A round: draft, verify, accept, and now and then retrieve")
    panels = ((24, "1  Draft", DRAFT), (290, "2  Verify", TARGET), (556, "3  Accept", GOOD))
    for x, name, colour in panels:
        f.box(x, 20, 220, 190, line=colour, radius=8, weight=1.5)
        f.text(x + 14, 44, name, size=15, bold=True, colour=colour)
    f.arrow(246, 115, 286, 115)
    f.arrow(512, 115, 552, 115)

    def tree(x, y, style):
        for node, parent in enumerate(PARENTS[1:], 1):
            (x1, y1), (x2, y2) = PLACES[parent], PLACES[node]
            on_path = style == "verified" and node in PATH
            f.path(
                f"M{x + x1 + 13:g} {y + y1:g} L{x + x2 - 13:g} {y + y2:g}",
                GOOD if on_path else GREY,
                2.5 if on_path else 1.2,
            )
        for node, (dx, dy) in enumerate(PLACES):
            if node == 0:
                fill, line = TARGET_PALE, TARGET
            elif style == "verified" and node in PATH:
                fill, line = GOOD_PALE, GOOD
            else:
                fill, line = (DRAFT_PALE, DRAFT) if style == "proposed" else (PALE, GREY)
            f.dot(x + dx, y + dy, str(node), fill, line)

    tree(72, 72, "proposed")
    tree(338, 72, "verified")
    f.lines(38, 178, "grows a tree below the root,", "the last token decided", size=12)
    f.lines(304, 178, "the target chooses a token at", "every node, in one forward", size=12)
    for x, name in ((592, "1"), (634, "4")):
        f.dot(x, 94, name, GOOD_PALE, GOOD)
    f.dot(712, 94, "", TARGET_PALE, TARGET)
    f.arrow(605, 94, 619, 94, GREY)
    f.arrow(647, 94, 697, 94, GREY)
    f.text(613, 72, "accepted", size=12, anchor="middle", colour=GOOD)
    f.text(712, 72, "the target's own", size=12, anchor="middle", colour=TARGET)
    f.lines(
        570, 142, "three tokens from one forward;", "keys of the path move to the front,",
        "the others are dropped; the last", "token is the root of the next round", size=12,
    )  # fmt: skip

    f.box(290, 250, 220, 60, line=GREY, radius=8)
    f.text(304, 274, "4  Retrieve", size=15, bold=True, colour=GREY)
    f.text(304, 296, "every n-th round, long inputs", size=12)
    f.path("M676 210 L676 280 L514 280", GREY, arrow=True)
    f.text(530, 302, "scores of the chunks", 12, colour=GREY)
    f.path("M290 280 L134 280 L134 214", GREY, arrow=True)
    f.text(146, 302, "the draft's cache", 12, colour=GREY)
    return f


def tree_attention() -> Figure:
    f = Figure(800, 400, "Split-prefix tree attention")
    left, top, cell, prefix = 118, 70, 26, 330
    tree_left = left + prefix + 10
    f.text(left + prefix / 2, 34, "prefix: P keys, no mask", anchor="middle", bold=True)
    f.text(tree_left + 78, 34, "tree: N keys", anchor="middle", bold=True)
    f.text(tree_left + 176, 34, "mask, packed", bold=True)
    f.text(24, 34, "query rows", bold=True)
    for chunk in range(1, 6):
        x = left + chunk * prefix / 6
        f.path(f"M{x:g} {top - 8} L{x:g} {top + 6 * cell}", "#9db8d6", 1, dashed=True)
    f.parts.insert(0, "")  # the prefix lies behind the lines between its chunks
    f.parts[0] = (
        f'<rect x="{left}" y="{top}" width="{prefix}" height="{6 * cell}" fill="{TARGET_PALE}" '
        f'stroke="{TARGET}"/>'
    )
    for chunk in range(6):
        x = left + (chunk + 0.5) * prefix / 6
        f.text(x, top - 10, f"chunk {chunk}", size=11, anchor="middle", colour=GREY)
    for row in range(6):
        y = top + row * cell
        seen, at = set(), row
        while at >= 0:
            seen.add(at)
            at = PARENTS[at]
        name = "root" if row == 0 else f"node {row}"
        f.text(left - 10, y + 18, name, anchor="end", size=12)
        for key in range(6):
            f.box(
                tree_left + key * cell, y, cell, cell, DRAFT_PALE if key in seen else "#ffffff",
                "#d0a36a",
            )  # fmt: skip
            if row == 0:
                f.text(
                    tree_left + (key + 0.5) * cell, top - 10, str(key), 11, "middle", GREY
                )  # fmt: skip
        word = sum(1 << key for key in seen)
        f.text(tree_left + 176, y + 18, f"0b{word:06b} = {word}", size=12, mono=True)
    under = top + 6 * cell
    f.arrow(left + prefix / 2, under + 4, left + prefix / 2, under + 36, TARGET)
    f.text(left + prefix / 2, under + 54, "o_p, lse_p", anchor="middle", colour=TARGET)
    f.arrow(tree_left + 78, under + 4, tree_left + 78, under + 36, DRAFT)
    f.text(tree_left + 78, under + 54, "o_t, lse_t", anchor="middle", colour=DRAFT)
    f.box(250, 300, 400, 74, fill="#ffffff", line=INK, radius=8, weight=1.5)
    f.text(450, 324, "lse = log(exp(lse_p) + exp(lse_t))", size=13, anchor="middle", mono=True)
    f.text(
        450, 346, "o = exp(lse_p - lse) o_p + exp(lse_t - lse) o_t", 12, "middle", INK, mono=True
    )
    f.text(450, 366, "one kernel, nothing of size rows x prefix", 11, "middle", GREY)
    f.arrow(left + prefix / 2 + 30, under + 60, 340, 296, TARGET)
    f.arrow(tree_left + 78, under + 60, 520, 296, DRAFT)
    f.path(f"M{left + 30} {under + 4} L{left + 30} 318", GREY, arrow=True)
    f.lines(30, 336, "by-product: the log-sum-exp", "of every chunk, for retrieval", size=12)
    return f


MASS = (30, 6, 9, 44, 5, 12, 7, 20, 26)  # attention mass of nine chunks, for show
CHOSEN = (0, 3, 7, 8)


def retrieval() -> Figure:
    f = Figure(800, 330, "Cross-model retrieval")
    left, width, base = 40, 60, 150
    f.text(left, 32, "Target: attention of the last accepted token, summed per chunk", bold=True)
    f.text(left, 50, "mean over the heads of the last layer; the sum over all chunks is 1", size=12)
    names = {0: "sink", 3: "highest", 7: "recent", 8: "recent"}
    for chunk, mass in enumerate(MASS):
        x, chosen = left + chunk * width, chunk in CHOSEN
        f.box(
            x + 12, base - 1.6 * mass, width - 24, 1.6 * mass, TARGET if chosen else "#b9c3ce",
            "none",
        )  # fmt: skip
        f.box(x, base, width, 30, TARGET_PALE if chosen else "#ffffff", TARGET)
        f.text(x + width / 2, base + 20, f"chunk {chunk}", size=12, anchor="middle")
        if chosen:
            f.text(x + width / 2, base - 1.6 * mass - 6, names[chunk], 11, "middle", TARGET)
    f.lines(596, 160, "the whole context, in", "chunks of 32 tokens", size=12)

    for slot, chunk in enumerate(CHOSEN):
        x = left + slot * width
        f.box(x, 260, width, 30, DRAFT_PALE, DRAFT)
        f.text(x + width / 2, 280, f"chunk {chunk}", size=12, anchor="middle")
        start = left + (chunk + 0.5) * width
        f.path(f"M{start:g} 182 L{x + width / 2:g} 256", DRAFT, 1.2, arrow=True)
    f.box(left + 4 * width, 260, 110, 30, "#ffffff", DRAFT)
    f.text(left + 4 * width + 55, 280, "new tokens, tree", size=12, anchor="middle")
    f.text(446, 250, "Draft: working cache of a fixed size", bold=True, colour=DRAFT)
    f.lines(
        446, 270, "its own keys, from its full cache: a draft that", "was trained on short inputs"
        " sees a short input", size=12,
    )  # fmt: skip
    f.text(left, 314, "select_chunks, then gather_chunks: all layers at once", 12, colour=GREY)
    return f


def working_cache() -> Figure:
    f = Figure(800, 300, "Positions in the working cache")
    left, width = 60, 62
    f.text(left, 32, "Full cache: 288 tokens at their own positions", bold=True)
    for chunk in range(9):
        x, chosen = left + chunk * width, chunk in CHOSEN
        f.box(x, 48, width, 30, DRAFT_PALE if chosen else "#ffffff", DRAFT)
        f.text(x + width / 2, 68, f"chunk {chunk}", size=12, anchor="middle")
        f.text(x, 96, str(32 * chunk), size=11, anchor="middle", colour=GREY)
    f.text(left + 9 * width, 96, "288", size=11, anchor="middle", colour=GREY)
    f.text(left, 272, "Working cache: 128 tokens at the positions 160 to 287", bold=True)
    for slot, chunk in enumerate(CHOSEN):
        x = left + (5 + slot) * width
        f.box(x, 196, width, 30, DRAFT_PALE, DRAFT)
        f.text(x + width / 2, 216, f"chunk {chunk}", size=12, anchor="middle")
        f.text(x, 244, str(160 + 32 * slot), size=11, anchor="middle", colour=GREY)
        moved = 32 * (5 + slot - chunk)
        start, end = left + (chunk + 0.5) * width, x + width / 2
        f.path(f"M{start:g} 104 L{end:g} 192", DRAFT if moved else GOOD, 1.5, arrow=True)
        if moved:
            label = f"keys turned by {moved} positions"
            if chunk == 0:
                f.text(start + 112, 172, label, 11, "end", DRAFT)
            else:
                f.text(start + 66, 128, label, 11, "start", DRAFT)
    f.text(left + 9 * width, 244, "288", size=11, anchor="middle", colour=GREY)
    f.text(left + 8.5 * width + 10, 152, "kept bit by bit", size=11, colour=GOOD)
    f.box(left + 9 * width, 196, 92, 30, "#ffffff", GREY)
    f.text(left + 9 * width + 46, 216, "next tokens", size=12, anchor="middle")
    f.text(left + 9 * width + 104, 272, "at 288, in both caches", 12, "end", GREY)
    return f


def longspec() -> Figure:
    f = Figure(800, 320, "What a LongSpec block sees")
    rows = (("root", 0), ("depth 1", 1), ("depth 2", 2), ("depth 3", 3))
    top, cell, left, right = 92, 34, 100, 460
    f.text(left, 32, "Cross-attention", bold=True, colour=TARGET)
    f.text(left + 112, 32, "keys of the target's last layer", size=12)
    f.text(right, 32, "Self-attention", bold=True, colour=DRAFT)
    f.text(right + 102, 32, "keys of the block itself", size=12)
    f.text(left + 105, 76, "committed: 0 ... L-1", 12, "middle", GREY)
    f.text(left + 258, 76, "L ... L+2", 12, "middle", GREY)
    f.text(right + 90, 76, "committed, the newest 512", 12, "middle", GREY)
    f.text(right + 248, 76, "root and tree", 12, "middle", GREY)
    for row, (name, depth) in enumerate(rows):
        y = top + row * cell
        f.text(left - 12, y + 13, name, anchor="end", size=12)
        f.text(left - 12, y + 26, "position L" + (f"+{depth}" if depth else ""), 9, "end", GREY)
        f.box(left, y, 210, cell - 6, TARGET_PALE, TARGET)
        for key in range(3):
            x = left + 216 + key * 28
            f.box(x, y, 26, cell - 6, "#ffffff", "#c8d3df")
            f.path(f"M{x + 8} {y + 9} l10 10 m0 -10 l-10 10", GREY, 1.2)
        gone = 13 * depth
        f.box(right, y, 180, cell - 6, "#ffffff", "#d0a36a")
        f.box(right + gone, y, 180 - gone, cell - 6, DRAFT_PALE, DRAFT)
        for key in range(4):
            fill = DRAFT_PALE if key <= depth else "#ffffff"
            x = right + 188 + key * 30
            f.box(x, y, 28, cell - 6, fill, DRAFT if key <= depth else "#d0a36a")
    f.lines(
        left, 256, "The target has keys of committed tokens alone.", "A row at any depth sees the"
        " same ones, and no", "key of the root or of the tree.", size=12,
    )  # fmt: skip
    f.lines(
        right, 256, "513 positions that end at the row's own: itself,", "its ancestors in the tree,"
        " and committed tokens", "for the rest. A ring of constant size holds them.", size=12,
    )  # fmt: skip
    return f


FIGURES = {
    "round": round_,
    "tree_attention": tree_attention,
    "retrieval": retrieval,
    "working_cache": working_cache,
    "longspec": longspec,
}


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        Path(__file__).with_name("images").joinpath(f"{name}.svg").write_text(draw().svg())
