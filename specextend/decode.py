"""Offers SpecExtend as a drop-in on Hugging Face models."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from . import hf
from .config import SpecConfig
from .context import Context, Shelf
from .draft import Draft, load_draft
from .generation import Generation, Progress, Request, Step
from .graphs import Capture, CudaRecorder
from .guard import self_check
from .stats import SpecStats
from .target import Target


class SpecExtend:
    """Decodes long inputs speculatively, without loss.

    The output is the target's: greedy output equals ``model.generate(do_sample=False)``, sampled
    output equals sampled output without a draft, token by token, for the same seed. In fp32
    exactly; in bf16 and fp16 a near-tie between two tokens may fall differently in kernels that
    round differently, unless ``exact=True``, with which text equals that without a draft always.

    Args:
        model: the target, a decoder-only causal LM of `transformers`, or a ``PeftModel`` or
            ``torch.compile`` of one, used where it lies and left as it came. It is tried on a few
            tokens first.
        draft: a causal LM with the same tokenizer; a folder or hub id of one, or of a trained head
            (EAGLE-1/2/3); ``"ngram"``: look-up in prompt and output; ``"self"``: the target on a
            part of its own cache; ``[draft, "ngram"]``: one with a model, and look-up, in one tree;
            or None for plain decoding on the same kernels.
        config: options; a :class:`SpecConfig` or a dict of its fields.
        tokenizer, draft_tokenizer: if both are given they are compared, and must agree; needed when
            the heads have different sizes. The first serves for ``stop_strings`` too.
        streamer: receives the tokens of every generation, besides one given to ``generate``.
        progress: called as ``progress("prefill", done, total)`` behind each part of the prompt.
        generation: makes the state of each generation, with the arguments of :class:`Generation`;
            for measurements that change what a round does.
        recorder: makes what captures a round on a device, in place of CUDA graphs.
        keep_contexts: how many of the last generations' texts are kept, with all that was computed
            of them: a prompt that begins as one of them is read from there on. The one that was
            used least recently leaves first. 0: none.
        keep_bytes: that these take at most; None: any number.
        **options: fields of the configuration to change.

    Attributes:
        stats: :class:`SpecStats` of the last generation.
        config: the options.
        target: the model as the engine knows it.
        draft: the draft that was given or loaded.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from specextend import SpecExtend, assets
        >>> paths = assets.target_path(), assets.draft_path()
        >>> model, draft = map(AutoModelForCausalLM.from_pretrained, paths)
        >>> tokenizer = AutoTokenizer.from_pretrained(paths[0])
        >>> inputs = tokenizer("def area(width, height):", return_tensors="pt")
        >>> spec, options = SpecExtend(model, draft), dict(max_new_tokens=16, do_sample=False)
        >>> out = spec.generate(**inputs, **options)
        >>> torch.equal(out, model.generate(**inputs, custom_generate=spec, **options))
        True
        >>> sum(len(step.tokens) for step in spec.stream(**inputs, **options))
        16
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft: PreTrainedModel | Draft | str | Path | Sequence | None = None,
        config: SpecConfig | dict | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress | None = None,
        generation: Callable[..., Generation] = Generation,
        recorder: Callable[[torch.device], CudaRecorder] | None = None,
        keep_contexts: int = 1,
        keep_bytes: int | None = None,
        **options,
    ):
        base = config if isinstance(config, SpecConfig) else SpecConfig().replace(**(config or {}))
        self.config = base.replace(**options)
        self._shelf = Shelf(keep_contexts, keep_bytes)
        self.target = Target(model, self.config.score_layers)
        self.tokenizer = tokenizer
        self.streamer = streamer
        self.progress = progress
        self.stats = SpecStats()
        self_check(self.target)
        self.draft = load_draft(draft, self.target, self.config, (tokenizer, draft_tokenizer))
        if self.draft is not None and self.draft.wants_scores:
            _ = self.target.score_layers  # an error comes here, and not in a generation
        self._make_generation = generation
        self._capture = Capture(recorder, enabled=self.config.graphs != "off")
        self._running = threading.Lock()

    @property
    def model(self) -> PreTrainedModel:
        """Return the target's model."""
        return self.target.model

    # ---- the three ways in -----------------------------------------------------------------------

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Write on, with the arguments and the output classes of ``model.generate``.

        Args:
            inputs: [1, L] int64 prompt (also as ``input_ids=``).
            streamer: receives the prompt, then every token, as from ``model.generate``.
            tokenizer: for ``stop_strings``, in place of the constructor's.
            generator: seeds the sampling noise, if the configuration has no seed.
            **kwargs: as for ``model.generate``. ``past_key_values`` (or ``cache``) is a
                :class:`~specextend.context.Context`, which goes along with what is written, or a
                ``DynamicCache``, which is copied. Beams, several sequences, attentions and hidden
                states are refused.

        Returns:
            [1, L + new] int64, or a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``.
            Reads the device once per round.
        """

        def run(model, input_ids, **rest):
            return self._run(model, input_ids, streamer=streamer, generator=generator, **rest)

        method = hf.DecodingMethod(run, tokenizer or self.tokenizer)
        return method.through(self.model, inputs, kwargs)

    def stream(
        self,
        inputs: Tensor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> Iterator[Step]:
        """Write on as :meth:`generate` does, as a generator of :class:`Step`, one per round."""

        def run(model, input_ids, **rest):
            return self._steps(model, input_ids, generator=generator, **rest)

        method = hf.DecodingMethod(run, tokenizer or self.tokenizer)
        return method.through(self.model, inputs, kwargs)

    __signature__ = hf.HandedOn()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_model: PreTrainedModel | None = None,
        **kwargs,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Serve as ``model.generate(custom_generate=spec)``."""
        streamer = hf.streamer_of_generate()
        return self._run(
            model, input_ids, streamer=streamer, prompt_streamed=True,
            assistant_model=assistant_model, **kwargs,
        )  # fmt: skip

    # ---- what is kept ----------------------------------------------------------------------------

    def read(self, inputs: Tensor | None = None, **kwargs) -> Context:
        """Read a text without writing, for ``generate(..., past_key_values=)``.

        Args:
            inputs: [1, L] int64 (also as ``input_ids=``).
            **kwargs: ``attention_mask``; ``past_key_values``, a context to go on from, which is
                returned.

        Returns:
            A context of all L tokens, which is the caller's: it is not among those that are kept.
        """

        def run(model, input_ids, **rest):
            request = self._request(model, input_ids, **rest)
            request = request if request.context else replace(request, context=Context())
            steps = self._rounds(request, reading=True)
            next(steps)
            steps.close()
            with torch.inference_mode():
                request.context.share()
            return request.context

        how = dict(max_new_tokens=1, do_sample=False, return_dict_in_generate=False)
        return hf.DecodingMethod(run, None).through(self.model, inputs, kwargs | how)

    def load_context(self, path: str | os.PathLike) -> Context:
        """Read a context that :meth:`Context.save` has written, here or in another process.

        Args:
            path: the file. Target and draft are to be the ones that it was read with.

        Returns:
            The context, which is the caller's, as one of :meth:`read`.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is none, or cut, or models or options are others; with what differs.
        """
        with torch.inference_mode():
            return Context.load(path, self.target, self.draft, self.config)

    def forget(self) -> None:
        """Free the contexts that are kept; those in the caller's hands stay."""
        self._shelf.clear()

    # ---- a generation ----------------------------------------------------------------------------

    def _run(self, model, input_ids, *, streamer=None, prompt_streamed=False, **kwargs):
        """Write all of it."""
        streamers = [s for s in (self.streamer, streamer) if s is not None]
        for s in streamers:
            if not (prompt_streamed and s is streamer):
                s.put(input_ids.cpu())
        config = kwargs["generation_config"]
        past = [] if config.return_dict_in_generate else None

        def steps():
            return self._rounds(self._request(model, input_ids, **kwargs), past)

        return hf.collect(steps, input_ids, config, streamers, past)

    def _steps(self, model, input_ids, **prepared) -> Iterator[Step]:
        """Check, then return the generator: errors in the arguments come at the call."""
        return self._rounds(self._request(model, input_ids, **prepared))

    def _request(self, model, input_ids, **prepared) -> Request:
        """Check what is asked for."""
        if model is not self.model:
            raise ValueError("this SpecExtend was made for another model object")
        if self._running.locked():
            raise _busy()
        seed = self.config.seed
        return hf.read_request(self.target, self.draft, input_ids, seed=seed, **prepared)

    def _rounds(
        self, request: Request, past: list[Context] | None = None, reading: bool = False
    ) -> Iterator[Step]:
        """Run the generation, and keep or free what belongs to it when it ends or is given up.

        Args:
            past: gets the context that will be left, one that is made if none is kept.
            reading: the draft is to have read the prompt by the first step.
        """
        with self._context_for(request, past) as request:
            self.stats = SpecStats(num_prompt_tokens=request.prompt.shape[1])
            generation = None
            try:
                with torch.inference_mode():
                    generation = self._make_generation(
                        self.target, self.draft, self.config, request, self.stats, self._capture,
                        self.progress,
                    )  # fmt: skip
                    if request.context is not None:
                        request.context.belong_to(self.target, self.draft, self.config)
                    generation.prefill()
                while not request.stop.done:
                    with torch.inference_mode():
                        step = generation.round()
                        if reading:
                            generation.finish_reading()
                    yield step
            finally:
                if generation is not None:
                    with torch.inference_mode():
                        generation.close()
                if self.draft is not None:
                    self.draft.end()

    @contextlib.contextmanager
    def _context_for(self, request: Request, past: list[Context] | None) -> Iterator[Request]:
        """Let nothing else be generated in a ``with`` block; yield the request with a context."""
        if not self._running.acquire(blocking=False):
            raise _busy()
        context, kept = request.context, False
        try:
            if context is None and self._shelf.count:
                context, kept = self._shelf.take(request.prompt), True
            elif context is None and past is not None:
                context = Context()
            if past is not None:
                past.append(context)
            with contextlib.nullcontext() if context is None else context.in_use():
                yield replace(request, context=context)
        finally:
            if kept:
                self._shelf.put(context)
            self._running.release()


def _busy() -> RuntimeError:
    return RuntimeError(
        "this SpecExtend is in the middle of a generation; finish or close that stream first, or "
        "use a second SpecExtend"
    )
