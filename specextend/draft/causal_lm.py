"""Drafts with any causal LM of `transformers`: full cache, a recent window, or retrieval."""

from __future__ import annotations

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..attention import PatchedModel, device_of
from ..cache import Pass
from ..config import SpecConfig
from ..graphs import obstacle
from ..guard import check_length, self_check
from ..rotary import Rotary, probe_rotary
from ..target import Target
from ..tokenizers import check_same_tokenizer
from .base import Decided, Source, Tokenizers
from .cached import CachedDraft
from .checkpoint import Checkpoint


class CausalLMDraft(CachedDraft):
    """Drafts with a small causal LM that shares the target's tokenizer.

    Args:
        model: the draft; batch 1.
        config: tree and cache options.
        vocab: entries of the target's vocabulary; either head may be padded.
        rotary: how its keys carry positions; None: to be found out, unless the draft cache is
            "full", which need not know.
    """

    kind = "model"

    def __init__(
        self, model: PreTrainedModel, config: SpecConfig, vocab: int, rotary: Rotary | None = None
    ):
        super().__init__(config)
        if rotary is None and config.draft_cache != "full":
            rotary = probe_rotary(model)
        self.patched = PatchedModel(model)
        self.rotary = rotary
        self._target_vocab = vocab
        self._vocab = min(vocab, self.patched.vocab_size)

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
        _check_vocabulary(model, target.vocab_size, tokenizers)
        self_check(PatchedModel(model))
        return cls(model, config, target.vocab_size)

    def with_config(self, config: SpecConfig) -> CausalLMDraft:
        return type(self)(self.patched.model, config, self._target_vocab, self.rotary)

    @property
    def causal_lm(self) -> PreTrainedModel | None:
        return self.patched.model

    @property
    def num_parameters(self) -> int:
        return self.patched.model.num_parameters()

    def check_length(self, prompt: int, total: int) -> None:
        check_length(self.patched.model, prompt, total, role="draft")

    def obstacle(self) -> str | None:
        return obstacle(self.patched.model)

    def begin(self, prompt, max_length, cache, graphs) -> None:
        self._begin(self.patched.num_layers, max_length, prompt.device, self.rotary, graphs)
        self._last_position = max_length - 1

    def prefill(self, decided) -> None:
        self._fill(decided)

    def _fill(self, decided: Decided) -> None:
        """Run tokens into the full cache alone, without logits that anybody reads."""
        full, count = self.caches.full, len(decided)
        state = self.caches.fill(count)
        self.logits(decided.tokens, self._positions(count), state, last_only=True)
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
        return self.logits(tokens, positions, self.caches.grow(level, mask, num_keys))

    def logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        state: Pass,
        last_only: bool = False,
        row: Tensor | None = None,
    ) -> Tensor:
        """Run the model in a pass; arguments and result as of :meth:`PatchedModel.forward`."""
        # An id beyond the draft's vocabulary is of the target's padding, one below 0 of a row that
        # does not count; any embedding will do.
        tokens = tokens.clamp(0, self._vocab - 1)
        return self.patched.forward(tokens, positions, state, last_only, row)[..., : self._vocab]


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


def _check_vocabulary(draft: PreTrainedModel, vocab: int, tokenizers: Tokenizers) -> None:
    """Refuse a draft whose tokens are not the target's."""
    size = draft.config.get_text_config().vocab_size
    if None not in tokenizers:
        check_same_tokenizer(*tokenizers)
    elif size != vocab:
        raise ValueError(
            f"the target's vocabulary has {vocab} entries, the draft's {size}: either "
            "their tokenizers differ, or a head is padded; pass tokenizer= and "
            "draft_tokenizer= to have them compared"
        )
