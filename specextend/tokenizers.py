"""Finds out whether two models speak the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def differing_ids(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> list[int]:
    """Compare vocabularies by token, not by size: heads are often padded.

    Returns:
        The ids, ascending, that mean an added token to one of them and another one, or nothing, to
        the other.

    Raises:
        ValueError: with the first id that differs and is no added token.
    """
    by_id = [{i: token for token, i in t.get_vocab().items()} for t in (target, draft)]
    added = [set(t.get_added_vocab()) for t in (target, draft)]
    differing = []
    for i in sorted(by_id[0].keys() | by_id[1].keys()):
        tokens = [known.get(i) for known in by_id]
        if tokens[0] == tokens[1]:
            continue
        if any(t is not None and t not in own for t, own in zip(tokens, added, strict=True)):
            raise ValueError(
                f"target and draft must have the same tokenizer: id {i} is {tokens[0]!r} for the "
                f"target and {tokens[1]!r} for the draft; they may differ in added tokens alone"
            )
        differing.append(i)
    return differing
