"""Finds out whether two models speak the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def check_same_tokenizer(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Compare vocabularies by token, not by size: heads are often padded.

    Raises:
        ValueError: with the first id that means different things.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    by_id = {i: t for t, i in theirs.items()}
    for token, i in sorted(ours.items(), key=lambda item: item[1]):
        if by_id.get(i) != token:
            raise ValueError(
                "target and draft must have the same tokenizer: id "
                f"{i} is {token!r} for the target and {by_id.get(i)!r} for the draft"
            )
    extra = sorted(set(theirs) - set(ours))[0]
    raise ValueError(
        f"target and draft must have the same tokenizer: only the draft knows {extra!r}"
    )
