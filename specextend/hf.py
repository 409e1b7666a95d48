"""Serves what only `transformers` asks for: its ``generate``, its options, its classes.

``model.generate`` prepares configuration, processors and criteria; here is what it prepared checked
and made a :class:`specextend.generation.Request`, and what it wants back put together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .compat import CACHE
from .draft import Draft
from .generation import Request, Step
from .guard import check_length
from .sampling import TokenChooser
from .target import Target

# ---- the way in ----------------------------------------------------------------------------------


def through_generate(
    model: PreTrainedModel,
    run: Callable,
    inputs: Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    kwargs: dict,
):
    """Have ``model.generate`` prepare configuration, processors and criteria for ``run``.

    Args:
        run: called as ``run(model, input_ids, **prepared)``; what it returns is returned.
        inputs: [1, L] int64 prompt, or in ``kwargs``.
        tokenizer: for ``stop_strings``.
        kwargs: the user's arguments to ``generate``.
    """
    if inputs is not None:
        kwargs["inputs"] = inputs
    check_prompt(kwargs.get("inputs", kwargs.get("input_ids")))
    config = kwargs.get("generation_config") or model.generation_config
    stop = kwargs.pop("stop_strings", None) or config.stop_strings
    if stop is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop))
        kwargs["stopping_criteria"] = criteria
        if config.stop_strings is not None:  # generate would build the criterion once more
            kwargs["generation_config"] = GenerationConfig(
                **{**config.to_dict(), "stop_strings": None}
            )
    return model.generate(custom_generate=run, **kwargs)


def streamer_of_generate() -> BaseStreamer | None:
    """Return the streamer that the ``generate`` two calls above was given.

    ``generate`` drops it on the way to a callable ``custom_generate``, after having given it the
    prompt, and ignoring it would leave its reader waiting. This can go once `transformers` hands
    its ``streamer`` on to callables, as it does to the decoding methods of its own.
    """
    return sys._getframe(2).f_locals.get("streamer")


# ---- what is asked for ---------------------------------------------------------------------------


def read_request(
    target: Target,
    draft: Draft | None,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    seed: int | None,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    **model_kwargs,
) -> Request:
    """Check what ``generate`` has prepared.

    Args:
        target, draft: that are to write it.
        input_ids: [1, L] int64, perhaps padded on the left.
        logits_processor, generation_config: as prepared.
        seed: of the sampling noise; None: drawn from ``generator``, or torch's default one.
        attention_mask: [1, L], 0 at padding.
        **model_kwargs: what else ``generate`` would give to the forward.

    Raises:
        ValueError: an option or an input that the loop cannot honour.
    """
    _refuse_modes(generation_config)
    check_prompt(input_ids)
    prompt = _strip_padding(input_ids, attention_mask).to(target.device)
    _refuse_model_inputs(model_kwargs, prompt.shape[1])
    low, high = torch.stack([prompt.amin(), prompt.amax()]).tolist()
    if low < 0 or high >= target.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"token ids must be in [0, {target.vocab_size}), got {bad}")
    max_length = generation_config.max_length - (input_ids.shape[1] - prompt.shape[1])
    check_length(target.model, prompt.shape[1], max_length)
    if draft is not None:
        draft.check_length(prompt.shape[1], max_length)
    if seed is None:
        seed = int(torch.randint(1 << 62, (), generator=generator))
    chooser = TokenChooser(logits_processor, bool(generation_config.do_sample), seed)
    keep = (bool(generation_config.output_scores), bool(generation_config.output_logits))
    padding = input_ids.shape[1] - prompt.shape[1]
    return Request(prompt, max_length, chooser, *keep, padding=padding)


def check_prompt(ids) -> None:
    """Refuse what is no prompt of one sequence.

    Raises:
        ValueError: with what was given instead of a [1, L] int64 tensor.
    """
    if ids is None:
        raise ValueError("a prompt is wanted: generate(input_ids), a [1, L] int64 tensor; got none")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"the prompt must be a [1, L] int64 tensor, got {got}")
    if ids.is_floating_point() or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"the prompt must hold int64 token ids, got {ids.dtype}")
    if ids.shape[0] != 1:
        raise ValueError(f"one prompt at a time: the prompt must be [1, L], got {list(ids.shape)}")
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: at least one token is wanted")


def _refuse_modes(config: GenerationConfig) -> None:
    """Refuse what the loop cannot honour."""
    for name, neutral in (("num_beams", 1), ("num_return_sequences", 1), ("num_beam_groups", 1)):
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"specextend generates one sequence: {name} must be {neutral}, got {value}"
            )
    for name in ("output_attentions", "output_hidden_states", "token_healing"):
        if getattr(config, name, None):
            raise ValueError(f"{name}=True is not available with speculative decoding")
    if getattr(config, "penalty_alpha", None) and getattr(config, "top_k", 0):
        raise ValueError("contrastive search (penalty_alpha) is not available; leave it unset")
    if getattr(config, "use_cache", True) is False:
        raise ValueError("use_cache=False is not available: the loop is its cache")


def _refuse_model_inputs(model_kwargs: dict, prompt_length: int) -> None:
    """Refuse inputs to the forward besides the prompt; pass what ``generate`` itself adds."""
    cache = model_kwargs.pop(CACHE, None)
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError(f"{CACHE} is not taken over: pass the whole text as the prompt")
    positions = model_kwargs.pop("position_ids", None)
    if positions is not None:
        positions = positions[..., -prompt_length:].flatten()
        if not torch.equal(positions, torch.arange(prompt_length, device=positions.device)):
            raise ValueError("position_ids must count from 0 at the prompt's first token")
    ours = {"streamer", "use_cache", "logits_to_keep", "cache_position", "synced_gpus"}
    unknown = sorted(k for k, v in model_kwargs.items() if k not in ours and v is not None)
    if unknown:
        raise ValueError(f"generate's argument {unknown[0]!r} is not available with specextend")


def _strip_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the prompt without padding on its left."""
    if attention_mask is None:
        return input_ids
    seen = attention_mask[0].bool()
    count = int(seen.sum())
    if count == 0 or not bool(seen[-count:].all()):
        raise ValueError("attention_mask may hide padding on the left only, got other zeros")
    return input_ids[:, -count:]


# ---- where it ends, and what comes back ----------------------------------------------------------


class Stop:
    """Ends a generation exactly: inside a path, at the token that a criterion stops at.

    Args:
        criteria: as prepared by ``generate``.
        max_length: tokens of ``input_ids`` and output at most.
        input_ids: [1, L] int64, with its padding, as criteria want it.

    Attributes:
        done: nothing more is to be written.
    """

    def __init__(self, criteria: StoppingCriteriaList, max_length: int, input_ids: Tensor):
        self.remaining = max_length - input_ids.shape[1]
        self.done = self.remaining <= 0
        self.eos: set[int] = set()
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.eos.update(criterion.eos_token_id.flatten().tolist())
            elif not isinstance(criterion, MaxLengthCriteria):
                self.others.append(criterion)
        self.ids = input_ids
        self.scores: tuple[Tensor, ...] = ()

    def truncate(self, step: Step) -> Step:
        """Cut what comes after the first token that ends the generation."""
        for i, token in enumerate(step.tokens):
            self.remaining -= 1
            self.done = self.remaining <= 0 or token in self.eos
            if self.others:
                self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], 1)
                self.scores += step.scores[i : i + 1]
                self.done |= bool(self.others(self.ids, self.scores or None).all())
            if self.done:
                n = i + 1
                return Step(
                    step.tokens[:n], min(step.num_accepted, n), step.scores[:n], step.logits[:n]
                )
        return step


def collect(
    make_steps: Callable[[], Iterable[Step]],
    input_ids: Tensor,
    config: GenerationConfig,
    streamers: list[BaseStreamer],
) -> Tensor | GenerateDecoderOnlyOutput:
    """Have all steps made, and put together what ``generate`` returns.

    Args:
        make_steps: begins the generation.
        input_ids: [1, L] int64, with its padding.
        config: what of the steps is wanted.
        streamers: receive every token, and the end in any case.
    """
    new, scores, logits = [], (), ()
    try:
        for step in make_steps():
            new += step.tokens
            scores += step.scores
            logits += step.logits
            for token in step.tokens:
                for streamer in streamers:
                    streamer.put(torch.tensor([token]))
    finally:
        for streamer in streamers:
            streamer.end()
    tail = torch.tensor([new], dtype=input_ids.dtype, device=input_ids.device).reshape(1, -1)
    sequences = torch.cat([input_ids, tail], 1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=scores if config.output_scores else None,
        logits=logits if config.output_logits else None,
    )
