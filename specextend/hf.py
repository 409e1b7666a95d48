"""Serves what only `transformers` asks for: its ``generate``, its options, its classes.

``model.generate`` prepares configuration, processors and criteria; here is what it prepared checked
and made a :class:`specextend.generation.Request`, and what it wants back put together.
"""

from __future__ import annotations

import copy
import inspect
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
)
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from .compat import CACHE, CACHE_NAMES, GENERATION_DEFAULTS, num_cached
from .context import Context
from .draft import Draft
from .generation import Request, Step
from .guard import check_length
from .sampling import TokenChooser
from .stopping import Stop
from .target import Target, check_adapters

# ---- the way in ----------------------------------------------------------------------------------


def streamer_of_generate() -> BaseStreamer | None:
    """Return the streamer that the ``generate`` two calls above was given.

    ``generate`` drops it on the way to a callable ``custom_generate``, after having given it the
    prompt, and ignoring it would leave its reader waiting. This can go once `transformers` hands
    its ``streamer`` on to callables, as it does to the decoding methods of its own.
    """
    return sys._getframe(2).f_locals.get("streamer")


class HandedOn:
    """Describes a callable ``custom_generate`` to ``generate``, and gets it what that drops.

    A descriptor, for ``__signature__``. ``generate`` takes ``tokenizer`` and ``assistant_model``
    out of its arguments, asks for the signature of a callable, and forgets them, though stop
    strings need the one, and the other must not be ignored. While it asks they are put back; as the
    signature names them, they are handed on. This can go once `transformers` does so itself.

    The callable has an attribute ``tokenizer``, which serves where none is given.
    """

    def __get__(self, method, owner=None) -> inspect.Signature:
        if method is None:
            raise AttributeError("__signature__")
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_extract_generation_mode_kwargs":
            frame = frame.f_back
        if frame is not None:
            dropped = frame.f_locals["generation_mode_kwargs"]
            given = {"tokenizer": method.tokenizer, **dropped}
            for name in ("tokenizer", "assistant_model"):
                if given.get(name) is not None:
                    frame.f_locals["kwargs"][name] = given[name]
        return inspect.signature(method.__call__)


class DecodingMethod:
    """Has ``model.generate`` prepare configuration, processors and criteria for a function.

    Args:
        run: called as ``run(model, input_ids, **prepared)``.
        tokenizer: for stop strings.
    """

    __signature__ = HandedOn()

    def __init__(self, run: Callable, tokenizer: PreTrainedTokenizerBase | None):
        self.tokenizer = tokenizer
        self._run = run
        self._past: dict = {}

    def __call__(self, model, input_ids, *, tokenizer=None, assistant_model=None, **prepared):
        prepared |= self._past
        return self._run(model, input_ids, assistant_model=assistant_model, **prepared)

    def through(self, model: PreTrainedModel, inputs: Tensor | None, kwargs: dict):
        """Call ``model.generate``, and return what the function returns.

        Args:
            inputs: [1, L] int64 prompt, or in ``kwargs``.
            kwargs: the user's arguments to ``generate``.
        """
        if inputs is not None:
            kwargs["inputs"] = inputs
        past = [kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None]
        if len(past) > 1:
            raise ValueError(f"{' and '.join(CACHE_NAMES)} are two names of one argument, got both")
        self._past = {CACHE: past[0]} if past else {}
        check_prompt(kwargs.get("inputs", kwargs.get("input_ids")))
        return model.generate(custom_generate=self, **kwargs)


# ---- what is asked for ---------------------------------------------------------------------------


# Options of `generate` by what becomes of them. What is in none of these is refused where set.
#: made a processor or a criterion by ``generate``, or followed here
HONOURED = frozenset(
    """max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample
    temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    guidance_scale watermarking_config output_scores output_logits return_dict_in_generate
    pad_token_id bos_token_id eos_token_id""".split()
)
#: without a meaning outside of the modes that :func:`_refuse_options` refuses, or for encoders
IDLE = frozenset(
    """num_beams num_beam_groups early_stopping length_penalty diversity_penalty low_memory
    constraints force_words_ids penalty_alpha dola_layers use_mtp prompt_lookup_num_tokens
    max_matching_ngram_size assistant_early_exit is_assistant num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind assistant_ensemble_weight speculation_type decoder_start_token_id
    disable_compile transformers_version""".split()
)
#: how `generate` would compute: what a checkpoint says of it does not matter to the text
COMPUTING = frozenset(
    """use_cache cache_implementation cache_config max_cache_len prefill_chunk_size
    compile_config""".split()
)


def read_request(
    target: Target,
    draft: Draft | None,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    seed: int | None,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    assistant_model: PreTrainedModel | None = None,
    **model_kwargs,
) -> Request:
    """Check what ``generate`` has prepared.

    Args:
        target, draft: that are to write it.
        input_ids: [1, L] int64 or int32, perhaps padded on the left.
        logits_processor, stopping_criteria, generation_config: as prepared.
        seed: of the sampling noise; None: drawn from ``generator``, or torch's default one.
        attention_mask: [1, L], 0 at padding.
        assistant_model: must be None.
        **model_kwargs: what else ``generate`` would give to the forward.

    Raises:
        ValueError: an option or an input that the loop cannot honour.
    """
    if assistant_model is not None:
        raise ValueError("assistant_model is not available: a draft is given to SpecExtend(draft=)")
    check_adapters(target.model)
    _refuse_options(generation_config, target.model.generation_config)
    check_prompt(input_ids)
    input_ids = input_ids.long()
    prompt = _strip_padding(input_ids, attention_mask, generation_config.pad_token_id)
    prompt = prompt.to(target.device)
    padding = input_ids.shape[1] - prompt.shape[1]
    context = _past(model_kwargs.pop(CACHE, None), target, prompt, padding)
    _refuse_model_inputs(model_kwargs, prompt.shape[1])
    low, high = torch.stack([prompt.amin(), prompt.amax()]).tolist()
    if low < 0 or high >= target.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"token ids must be in [0, {target.vocab_size}), got {bad}")
    stop = Stop(stopping_criteria, generation_config.max_length, input_ids)
    max_length = stop.max_length - padding
    check_length(target.model, prompt.shape[1], max_length)
    if draft is not None:
        draft.check_length(prompt.shape[1], max_length)
    do_sample = bool(generation_config.do_sample)
    if seed is None:  # a greedy run draws nothing
        seed = int(torch.randint(1 << 62, (), generator=generator)) if do_sample else 0
    chooser = TokenChooser(logits_processor, do_sample, seed, stop)
    keep = (bool(generation_config.output_scores), bool(generation_config.output_logits))
    return Request(prompt, max_length, chooser, stop, *keep, padding=padding, context=context)


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


def _refuse_options(config: GenerationConfig, own: GenerationConfig) -> None:
    """Refuse what the loop cannot honour.

    Args:
        config: of the call, as prepared.
        own: the model's, as its checkpoint has it.
    """
    plain = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    known = vars(GenerationConfig())
    mode = config.get_generation_mode()
    if mode not in plain:
        changed = [n for n in known if n in IDLE and _is_set(config, n)]
        names = [n for n in changed if _without(config, n).get_generation_mode() != mode] or changed
        values = ", ".join(f"{n}={getattr(config, n)!r}" for n in names)
        raise ValueError(
            f"{values} asks for {mode.value.replace('_', ' ')}: specextend generates one sequence, "
            "greedily or by sampling"
        )
    for name in known:
        if name.startswith("_") or name in HONOURED | IDLE or not _is_set(config, name):
            continue
        value = getattr(config, name)
        if name in COMPUTING and value == getattr(own, name, None):
            continue
        raise ValueError(f"generate's option {name}={value!r} is not available with specextend")


def _is_set(config: GenerationConfig, name: str) -> bool:
    value = getattr(config, name, None)
    if name in GENERATION_DEFAULTS:
        return value is not None and value != GENERATION_DEFAULTS[name]
    return value is not None and value is not False


def _without(config: GenerationConfig, name: str) -> GenerationConfig:
    """Copy a configuration with one option as if it had not been given."""
    changed = copy.copy(config)
    setattr(changed, name, GENERATION_DEFAULTS.get(name))
    return changed


def _past(
    cache: Context | Cache | None, target: Target, prompt: Tensor, padding: int
) -> Context | None:
    """Return the context that a user goes on from; None: none was given."""
    if cache is None or isinstance(cache, Context):
        return cache
    if not isinstance(cache, Cache):
        raise ValueError(
            f"{CACHE} must be a Context of specextend or a DynamicCache of transformers, got "
            f"{type(cache).__name__}"
        )
    length = num_cached(cache)
    if length is None:
        raise ValueError(
            f"{CACHE} of layers that keep a state alone does not say how many tokens it has taken "
            "in: pass the whole text without it, or a Context of specextend"
        )
    if not length:
        return None  # generate makes one for every call
    if padding:
        raise ValueError(
            f"{CACHE} of transformers is not taken over with padding on the left, whose rows it has"
        )
    return Context.of(cache, target, prompt)


def _refuse_model_inputs(model_kwargs: dict, prompt_length: int) -> None:
    """Refuse inputs to the forward besides the prompt; pass what ``generate`` itself adds."""
    positions = model_kwargs.pop("position_ids", None)
    if positions is not None:
        # A vision-language model has several rows, which are the same for text.
        positions = positions[..., -prompt_length:].reshape(-1, prompt_length)
        counted = torch.arange(prompt_length, device=positions.device)
        if not (positions == counted).all():
            raise ValueError("position_ids must count from 0 at the prompt's first token")
    ours = {"streamer", "use_cache", "logits_to_keep", "cache_position", "synced_gpus"}
    given = {k: v for k, v in model_kwargs.items() if v is not None and v != {}}
    unknown = sorted(given.keys() - ours)
    if unknown:
        raise ValueError(f"generate's argument {unknown[0]!r} is not available with specextend")


def _strip_padding(
    input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None
) -> Tensor:
    """Return the prompt without padding on its left."""
    if attention_mask is None:
        return input_ids
    seen = attention_mask[0].bool()
    count = int(seen.sum())
    if count and bool(seen[-count:].all()):
        return input_ids[:, -count:]
    if torch.equal(~seen, input_ids[0] == pad_token_id):
        raise ValueError(
            f"the prompt has the pad token {pad_token_id} elsewhere than on its left; give an "
            "attention_mask: 1 where such a token belongs to the text, 0 for padding on the left"
        )
    raise ValueError("attention_mask may hide padding on the left only, got other zeros")


# ---- what comes back -----------------------------------------------------------------------------


def collect(
    make_steps: Callable[[], Iterable[Step]],
    input_ids: Tensor,
    config: GenerationConfig,
    streamers: list[BaseStreamer],
    past: list[Context] | None = None,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Have all steps made, and put together what ``generate`` returns.

    Args:
        make_steps: begins the generation.
        input_ids: [1, L] int64, with its padding.
        config: what of the steps is wanted.
        streamers: receive every token, and the end in any case.
        past: gets the context that is left, once the steps have been made.
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
    tail = torch.tensor([new], dtype=torch.int64, device=input_ids.device).reshape(1, -1)
    sequences = torch.cat([input_ids, tail], 1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=scores if config.output_scores else None,
        logits=logits if config.output_logits else None,
        **({CACHE: past[0]} if past else {}),
    )
