"""Drafts with any causal LM of `transformers`: full cache, a recent window, or retrieval."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..attention import PatchedModel, device_of
from ..cache import KVCache, Pass
from ..config import SpecConfig
from ..graphs import obstacle
from ..guard import check_length, position_limit, self_check
from ..longrope import changing_modules, frequencies
from ..rotary import Rotary, probe_rotary
from ..target import Target, identity
from ..tokenizers import differing_ids
from .base import Decided, Source, Tokenizers, follows
from .cached import CachedDraft, KeptCache
from .checkpoint import Checkpoint
from .prompt_reader import choose_chunks, part_read, read_chunks


class CausalLMDraft(CachedDraft):
    """Drafts with a small causal LM that shares the target's tokenizer, but for added tokens.

    It never proposes a token that means something else to the target, or nothing; in the place of
    one that means something else to itself it reads its own end of text.

    Args:
        model: the draft; batch 1.
        config: tree and cache options.
        vocab: entries of the target's vocabulary; either head may be padded.
        rotary: how its keys carry positions; None: to be found out.
        differing: ids below ``vocab``, or below that of the draft, that do not mean the same token
            to both.

    Raises:
        ValueError: the keys cannot be moved, which a draft cache other than "full" asks for.
    """

    kind = "model"

    def __init__(
        self,
        model: PreTrainedModel,
        config: SpecConfig,
        vocab: int,
        rotary: Rotary | None = None,
        differing: Sequence[int] = (),
    ):
        super().__init__(config)
        self.patched = PatchedModel(model)
        try:
            self.rotary = rotary or probe_rotary(model)
        except ValueError:
            if config.draft_cache != "full":
                raise
            self.rotary, self.cache_kinds = None, ("full",)
        self._target_vocab = vocab
        self._vocab = min(vocab, self.patched.vocab_size)
        self._differing = tuple(i for i in differing if i < self._vocab)
        self._stand_in = _stand_in(model, self._vocab, self._differing)
        # A table of positions ends; angles of rotation can be computed for any.
        self.max_length = None if frequencies(model, 0) else position_limit(model)

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if isinstance(source, Checkpoint):
            return source.config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return isinstance(source, PreTrainedModel)

    @classmethod
    def load(
        cls, source: Source, target: Target, config: SpecConfig, tokenizers: Tokenizers
    ) -> CausalLMDraft:
        model = _read(source, target) if isinstance(source, Checkpoint) else source
        device = device_of(model)
        if device != target.device:
            raise ValueError(
                f"the draft must be on the target's device {target.device}, got {device}"
            )
        differing = _differing_ids(model, target.vocab_size, tokenizers)
        patched = PatchedModel(model)
        self_check(patched)
        full = config.replace(draft_cache="full")
        draft = cls(model, full, target.vocab_size, differing=differing)
        wanted = config.draft_cache
        if wanted == SpecConfig.draft_cache and wanted not in draft.cache_kinds:
            # The default, which need not be what somebody wished for.
            warnings.warn(
                f"specextend: the draft {type(model).__name__} attends to all of its context, as "
                f'with draft_cache="full": {wanted!r} moves keys, and its own do not carry '
                "positions as rotary embeddings that could be moved",
                RuntimeWarning,
                stacklevel=4,
            )
            return draft
        return draft.with_config(config)

    def with_config(self, config: SpecConfig) -> CausalLMDraft:
        return type(self)(
            self.patched.model, config, self._target_vocab, self.rotary, self._differing
        )

    @property
    def causal_lm(self) -> PreTrainedModel | None:
        return self.patched.model

    @property
    def num_parameters(self) -> int:
        return self.patched.model.num_parameters()

    def identity(self) -> dict:
        return {"kind": self.kind, **identity(self.patched.model), "options": self._options()}

    def check_length(self, prompt: int, total: int) -> None:
        check_length(self.patched.model, prompt, total, role="draft")

    def obstacle(self) -> str | None:
        if self.patched.keeps_states:
            return "its layers with a state are run by the host"
        return obstacle(self.patched.model)

    def late_part(self, length: int) -> float:
        part = 1.0 if self.patched.keeps_states else part_read(length, self.config)
        return part * max(0.0, 1 - self.caches.full.length / max(length, 1))

    def begin(self, prompt, max_length, cache, graphs) -> None:
        max_length = min(max_length, self.max_length or max_length)
        self._begin(max_length, self.rotary, graphs)
        self._last_position = max_length - 1
        self._prompt = prompt[:, :-1]
        foreign = torch.zeros(self._vocab, dtype=torch.bool)
        foreign[list(self._differing)] = True
        self._foreign = foreign.to(prompt.device)

    def _make_cache(self, capacity: int) -> KVCache:
        return self.patched.make_cache(capacity)

    def resume(self, kept, length, start) -> None:
        if kept is not None:
            self._go_on(kept, length)

    def keep(self, decided) -> KeptCache | None:
        # Keys of another length of text may be turned in another way.
        return None if changing_modules(self.patched.model) else super().keep(decided)

    def finish_prefill(self, scores) -> bool:
        tokens, config, caches = self._prompt, self.config, self.caches
        full, total = caches.full, tokens.shape[1]
        chosen = None
        if not self.patched.keeps_states:  # a state is of all that is before it
            chosen = choose_chunks(scores, total, config, tokens.device)
        if chosen is not None or caches.chosen is not None:
            known = self._known_chunks(-(-total // config.chunk_size))
            missing = ~known if chosen is None else chosen & ~known
            caches.chosen = read_chunks(tokens, missing, full, config, self._keys, known)
            full.advance(total - full.length)
            return True
        width = config.prefill_chunk or max(total, 1)
        for start in range(full.length, total, width):
            self._fill(Decided(tokens[:, start : start + width]))
        full.mark()
        return True

    def _known_chunks(self, count: int) -> Tensor:
        """Return [count] bool, the chunks all of whose rows the full cache has."""
        full, chosen = self.caches.full, self.caches.chosen
        whole = full.length // self.config.chunk_size
        known = torch.arange(count, device=full.lens.device) < whole
        if chosen is not None:
            some = min(len(chosen), count)
            known[:some] &= chosen[:some]
        return known

    def retrieve(self, scores) -> Tensor:
        caches = self.caches
        if caches.chosen is not None and follows(scores.device, self._graphs):
            missing = caches.missing(scores)
            if bool(missing.any()):
                caches.chosen = read_chunks(
                    self._prompt, missing, caches.full, self.config, self._keys, caches.chosen
                )
        return super().retrieve(scores)

    def _keys(self, tokens: Tensor, positions: Tensor, state: Pass) -> None:
        """Run tokens for their keys alone."""
        self.patched.read(self._known(tokens), positions, state)

    def _fill(self, decided: Decided) -> None:
        """Run tokens into the full cache alone, without logits that anybody reads."""
        full, count = self.caches.full, len(decided)
        state = self.caches.fill(count)
        self._keys(decided.tokens, self._positions(count), state)
        full.advance(count)

    def _take_in(self, tokens, features, last) -> Tensor:
        count = tokens.shape[1]
        positions, state = self._positions(count), self.caches.extend(count)
        if last is None:
            return self.logits(tokens, positions, state, last_only=True)
        positions = positions.clamp(max=self._last_position)  # of rows that do not count
        return self.logits(tokens, positions, state, row=last)

    def step(self, tokens, level, mask, num_keys, parents) -> Tensor:
        positions = self._positions(1, level).expand_as(tokens)
        return self.logits(tokens, positions, self.caches.grow(level, mask, num_keys, parents))

    def logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        state: Pass,
        last_only: bool = False,
        row: Tensor | None = None,
    ) -> Tensor:
        """Run the model in a pass; arguments and result as of :meth:`PatchedModel.forward`."""
        logits = self.patched.forward(self._known(tokens), positions, state, last_only, row)
        logits = logits[..., : self._vocab]
        return logits.masked_fill(self._foreign, -torch.inf) if self._differing else logits

    def _known(self, tokens: Tensor) -> Tensor:
        """Put the stand-in in the place of tokens that the draft does not know."""
        # An id below 0 is of a row that does not count, one beyond the draft's vocabulary of an
        # added token or the target's padding.
        unknown = (tokens < 0) | (tokens >= self._vocab)
        if self._differing:
            unknown |= self._foreign[tokens.clamp(0, self._vocab - 1)]
        return tokens.masked_fill(unknown, self._stand_in)


def _read(checkpoint: Checkpoint, target: Target) -> PreTrainedModel:
    """Load a causal LM in the target's dtype, on its device."""
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=target.model.dtype, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):  # they would be random
        raise ValueError(
            f"no causal LM in {checkpoint.describe()}: missing {', '.join(missing[:8])}"
        )
    return model.to(target.device).eval()


def _differing_ids(draft: PreTrainedModel, vocab: int, tokenizers: Tokenizers) -> list[int]:
    """Refuse a draft whose tokens are not the target's, but for added ones; return their ids."""
    size = draft.config.get_text_config().vocab_size
    if None not in tokenizers:
        return differing_ids(*tokenizers)
    if size != vocab:
        raise ValueError(
            f"the target's vocabulary has {vocab} entries, the draft's {size}: either "
            "their tokenizers differ, or a head is padded; pass tokenizer= and "
            "draft_tokenizer= to have them compared"
        )
    return []


def _stand_in(model: PreTrainedModel, vocab: int, differing: tuple[int, ...]) -> int:
    """Return the id below ``vocab`` that a draft reads in the place of a token it does not know."""
    ends = model.config.get_text_config().eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    known = (i for i in ends if i is not None and 0 <= i < vocab and i not in differing)
    return next(known, 0)
