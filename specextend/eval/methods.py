"""Lists the rows of the tables: ways to continue a prompt, each with its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """Describes a way to continue a prompt.

    Attributes:
        key: its name on the command line and in the results.
        title: its name in tables.
        changes: fields of the configuration that make it what it is.
        draft: what proposes: ``"first"``, the first draft that was named, of any kind; a kind, the
            draft of this kind; None, nothing of ours.
        hugging_face: whether it is ``generate`` of `transformers`.
    """

    key: str
    title: str
    changes: dict = field(default_factory=dict)
    draft: str | None = None
    hugging_face: bool = False


_STANDARD = dict(tree_attention=False, draft_cache="full", prefill_chunk=None)
_FLASH = dict(tree_attention=False, draft_cache="full")
_TREE = dict(tree_attention=True, draft_cache="full")

#: Methods stand in the order of the tables. ``standard`` to ``retrieval`` are the rows of
#: SpecExtend's Table 4, each adding one technique to the one before. The paper's standard way
#: materialises the attention of the prefill; ours never does, on our own kernel. The first two rows
#: differ in that the standard one takes the prompt in one pass and not in chunks.
METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        Method("hf", "Hugging Face generate", hugging_face=True),
        Method("hf_assisted", "Hugging Face, assisted", draft="model", hugging_face=True),
        Method("hf_lookup", "Hugging Face, prompt look-up", hugging_face=True),
        Method("plain", "plain decoding"),
        Method("plain_eager", "plain decoding, no graphs", dict(graphs="off")),
        Method("standard", "tree speculation", _STANDARD, "first"),
        Method("flash_prefill", "+ prefill in chunks", _FLASH, "first"),
        Method("tree_attention", "+ tree attention", _TREE, "first"),
        Method("streaming", "+ streaming cache", dict(draft_cache="window"), "first"),
        Method("retrieval", "+ cross-model retrieval", dict(draft_cache="retrieval"), "first"),
        Method("eagle1", "EAGLE head", dict(draft_cache="retrieval"), "eagle1"),
        Method("eagle3", "EAGLE-3 head", dict(draft_cache="retrieval"), "eagle3"),
        Method("longspec", "LongSpec block", draft="longspec"),
        Method("ngram", "n-gram look-up", draft="ngram"),
        Method("self", "the target itself", dict(draft_cache="retrieval"), "self"),
    )
}

#: every other run of a prompt has to equal this method's
REFERENCE = "plain"
