"""The draft-verify loop: SpecExtend as a drop-in on Hugging Face models.

State of a generation: committed tokens, all of them in the target's cache, and one pending root,
which is decided but not yet there. A round verifies the root and the draft's tree behind it in one
target forward, keeps the path that agrees, and leaves the target's own next token as the new root
(SpecExtend, arXiv 2505.20776, section 3; docs/design.md has the state machine).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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

from . import ops
from .attention import Pass, PatchedModel
from .cache import KVCache
from .config import SpecConfig
from .draft import CausalLMDraft, Draft, load_draft
from .gate import Gate
from .guard import check_length, self_check
from .sampling import TokenChooser
from .stats import SpecStats
from .tree import Tree

Progress = Callable[[str, int, int], None]


@dataclass
class Step:
    """What one round brought.

    Attributes:
        tokens: token ids in order; the last one is the target's own, those before it were proposed
            by the draft and accepted.
        num_accepted: of ``tokens``, proposed by the draft.
        scores, logits: one [1, V] fp32 row per token, processed and raw, when asked for.
    """

    tokens: list[int]
    num_accepted: int
    scores: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()


class SpecExtend:
    """Lossless speculative decoding for long inputs.

    The output is the target's: greedy output equals ``model.generate(do_sample=False)``, sampled
    output equals sampled output without a draft, token by token, for the same seed. In fp32
    exactly; in bf16 and fp16 a near-tie between two tokens may fall differently in kernels that
    round differently.

    Args:
        model: the target, a decoder-only causal LM of `transformers`, used where it lies and left
            as it came. It is tried on a few tokens first.
        draft: a causal LM with the same tokenizer; a folder or hub id of one, or of a trained head
            (EAGLE-1/2/3); ``"ngram"``: look-up in prompt and output; ``"self"``: the target on a
            part of its own cache; or None for plain decoding on the same kernels.
        config: options; a :class:`SpecConfig` or a dict of its fields.
        tokenizer, draft_tokenizer: if both are given they are compared, and must agree; needed when
            the heads have different sizes.
        streamer: receives the tokens of every generation, besides one given to ``generate``.
        progress: called as ``progress("prefill", done, total)`` behind each part of the prompt.
        **options: fields of the configuration to change.

    Attributes:
        stats: :class:`SpecStats` of the last generation.
        config: the options.

    Example:
        >>> spec = specextend.SpecExtend(model, draft)
        >>> out = spec.generate(**inputs, max_new_tokens=512)
        >>> out = model.generate(**inputs, custom_generate=spec)
        >>> for step in spec.stream(**inputs): print(step.tokens)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft: PreTrainedModel | Draft | str | Path | None = None,
        config: SpecConfig | dict | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress | None = None,
        **options,
    ):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        base = config if isinstance(config, SpecConfig) else SpecConfig().replace(**(config or {}))
        self.config = base.replace(**options)
        self.model = model
        self.streamer = streamer
        self.progress = progress
        self.stats = SpecStats()
        self._target = PatchedModel(model)
        self._num_layers = model.config.get_text_config().num_hidden_layers
        self._score_layers = self._resolve_layers(self.config.score_layers)
        self_check(self._target)
        self._vocab = model.config.get_text_config().vocab_size
        self.draft = load_draft(draft, self._target, self.config, (tokenizer, draft_tokenizer))
        self._running = False

    def _resolve_layers(self, layers: tuple[int, ...]) -> frozenset[int]:
        n = self._num_layers
        wrong = [i for i in layers if not -n <= i < n]
        if wrong:
            raise ValueError(f"score_layers must be in [{-n}, {n}) for this model, got {wrong[0]}")
        return frozenset(i % n for i in layers)

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
        """Like ``model.generate``, with its arguments and its output classes.

        Args:
            inputs: [1, L] int64 prompt (also as ``input_ids=``).
            streamer: receives the prompt, then every token, as from ``model.generate``.
            tokenizer: for ``stop_strings``.
            generator: seeds the sampling noise, if the configuration has no seed.
            **kwargs: as for ``model.generate``. Beams, several sequences, attentions and hidden
                states are refused.

        Returns:
            [1, L + new] int64, or a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``.
            Reads the device once per round.
        """
        return self._through_hf(self._run, inputs, streamer, tokenizer, generator, kwargs)

    def stream(
        self,
        inputs: Tensor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> Iterator[Step]:
        """Like :meth:`generate`, as a generator of :class:`Step`, one per round."""
        return self._through_hf(self._steps, inputs, None, tokenizer, generator, kwargs)

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, **kwargs):
        """The contract of ``model.generate(custom_generate=spec)``.

        ``generate`` drops its ``streamer`` on the way to a callable, after having given it the
        prompt; it is picked up from there, as ignoring it would leave its reader waiting.
        """
        streamer = sys._getframe(1).f_locals.get("streamer")
        return self._run(model, input_ids, streamer=streamer, prompt_streamed=True, **kwargs)

    def _through_hf(self, run, inputs, streamer, tokenizer, generator, kwargs):
        """Have ``model.generate`` prepare configuration, processors and criteria for ``run``."""
        if inputs is not None:
            kwargs["inputs"] = inputs
        self._check_prompt(kwargs.get("inputs", kwargs.get("input_ids")))
        config = kwargs.get("generation_config") or self.model.generation_config
        stop = kwargs.pop("stop_strings", None) or config.stop_strings
        if stop is not None:
            if tokenizer is None:
                raise ValueError(
                    "stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)"
                )
            criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop))
            kwargs["stopping_criteria"] = criteria
            if config.stop_strings is not None:  # generate would build the criterion once more
                kwargs["generation_config"] = GenerationConfig(
                    **{**config.to_dict(), "stop_strings": None}
                )

        def prepared(model, input_ids, **rest):
            return run(model, input_ids, streamer=streamer, generator=generator, **rest)

        return self.model.generate(custom_generate=prepared, **kwargs)

    @staticmethod
    def _check_prompt(ids) -> None:
        if ids is None:
            raise ValueError(
                "a prompt is wanted: generate(input_ids), a [1, L] int64 tensor; got none"
            )
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"the prompt must be a [1, L] int64 tensor, got {got}")
        if ids.is_floating_point() or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"the prompt must hold int64 token ids, got {ids.dtype}")
        if ids.shape[0] != 1:
            raise ValueError(
                f"one prompt at a time: the prompt must be [1, L], got {list(ids.shape)}"
            )
        if ids.shape[1] == 0:
            raise ValueError("the prompt is empty: at least one token is wanted")

    # ---- a generation ----------------------------------------------------------------------------

    def _run(self, model, input_ids, *, streamer=None, prompt_streamed=False, **kwargs):
        config: GenerationConfig = kwargs["generation_config"]
        streamers = [s for s in (self.streamer, streamer) if s is not None]
        for s in streamers:
            if not (prompt_streamed and s is streamer):
                s.put(input_ids.cpu())
        new, scores, logits = [], (), ()
        try:
            for step in self._steps(model, input_ids, **kwargs):
                new += step.tokens
                scores += step.scores
                logits += step.logits
                for token in step.tokens:
                    for s in streamers:
                        s.put(torch.tensor([token]))
        finally:
            for s in streamers:
                s.end()
        tail = torch.tensor([new], dtype=input_ids.dtype, device=input_ids.device).reshape(1, -1)
        sequences = torch.cat([input_ids, tail], 1)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=scores if config.output_scores else None,
            logits=logits if config.output_logits else None,
        )

    def _steps(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
        **model_kwargs,
    ) -> Iterator[Step]:
        """Check, then return the generator: errors in the arguments come at the call."""
        if model is not self.model:
            raise ValueError("this SpecExtend was made for another model object")
        if self._running:
            raise RuntimeError(
                "this SpecExtend is in the middle of a generation; finish or close that stream "
                "first, or use a second SpecExtend"
            )
        _refuse_modes(generation_config)
        self._check_prompt(input_ids)
        prompt = _strip_padding(input_ids, attention_mask).to(model.device)
        _refuse_model_inputs(model_kwargs, prompt.shape[1])
        low, high = torch.stack([prompt.amin(), prompt.amax()]).tolist()
        if low < 0 or high >= self._vocab:
            bad = low if low < 0 else high
            raise ValueError(f"token ids must be in [0, {self._vocab}), got {bad}")
        max_length = generation_config.max_length - (input_ids.shape[1] - prompt.shape[1])
        check_length(model, prompt.shape[1], max_length)
        if isinstance(self.draft, CausalLMDraft):
            check_length(self.draft.model.model, prompt.shape[1], max_length, role="draft")
        seed = self.config.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, (), generator=generator))
        chooser = TokenChooser(logits_processor, bool(generation_config.do_sample), seed)
        stop = _Stop(stopping_criteria, generation_config.max_length, input_ids)
        keep = (bool(generation_config.output_scores), bool(generation_config.output_logits))
        return self._generation(prompt, max_length, chooser, stop, keep)

    def _generation(self, prompt, max_length, chooser, stop, keep) -> Iterator[Step]:
        self.stats = SpecStats(num_prompt_tokens=prompt.shape[1])
        self._running = True
        try:
            with torch.inference_mode():
                generation = _Generation(self, prompt, max_length, chooser, keep)
                generation.prefill()
            while not stop.done:
                with torch.inference_mode():
                    step = stop.truncate(generation.round(), generation)
                self.stats.num_emitted_tokens += len(step.tokens)
                yield step
        finally:
            self._running = False
            if self.draft is not None:
                self.draft.end()


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
    cache = model_kwargs.pop("past_key_values", None)
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError("past_key_values is not taken over: pass the whole text as the prompt")
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
    """The prompt without padding on its left."""
    if attention_mask is None:
        return input_ids
    seen = attention_mask[0].bool()
    count = int(seen.sum())
    if count == 0 or not bool(seen[-count:].all()):
        raise ValueError("attention_mask may hide padding on the left only, got other zeros")
    return input_ids[:, -count:]


class _Stop:
    """Ends a generation exactly: inside a path, at the token that a criterion stops at."""

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

    def truncate(self, step: Step, generation: _Generation) -> Step:
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


class _Generation:
    """One generation's state, from prefill to the last round. Batch 1."""

    def __init__(
        self, spec: SpecExtend, prompt: Tensor, max_length: int, chooser: TokenChooser, keep
    ):
        self.spec, self.config, self.stats = spec, spec.config, spec.stats
        self.chooser = chooser
        self.keep_scores, self.keep_logits = keep
        self.max_length = max_length
        self.device = prompt.device
        config = self.config
        self.max_depth = (
            len(config.tree_widths) if config.tree_shape == "fixed" else config.tree_depth
        )
        nodes = sum(config.tree_widths) if config.tree_shape == "fixed" else config.tree_nodes
        self.cache = KVCache(spec._num_layers, max_length + 1 + nodes, batch=1, device=self.device)
        # Committed tokens and the root behind them.
        self.ids = torch.zeros(1, max_length + 1, dtype=torch.int64, device=self.device)
        self.ids[:, : prompt.shape[1]] = prompt
        self.prompt = prompt
        self.root = prompt[:, -1:]
        self.undrafted = [self.root]  # decided tokens that the draft has not seen
        self.features: list[Tensor] = []  # of committed tokens, that the draft has not seen
        self.feature_layers = () if spec.draft is None else spec.draft.feature_layers
        self.depth = self.max_depth
        self.gate = Gate(self.max_depth, config.gate == "auto" and spec.draft is not None)
        self.first = True

    def prefill(self) -> None:
        """All of the prompt but its last token, which is the first root."""
        spec, stats, tokens = self.spec, self.stats, self.prompt[:, :-1]
        total = tokens.shape[1]
        chunk = self.config.prefill_chunk or max(total, 1)
        if spec.draft is not None:
            spec.draft.begin(self.prompt, self.max_length, self.cache)
        for start in range(0, total, chunk):
            part = tokens[:, start : start + chunk]
            positions = torch.arange(start, start + part.shape[1], device=self.device)[None]
            with stats.phase("prefill"):
                state = Pass(
                    self.cache,
                    [(self.cache, self.cache.lens)],
                    part.shape[1],
                    feature_layers=self.feature_layers,
                )
                spec._target.forward(part, positions, state, last_only=True)
                self.cache.advance(part.shape[1])
            if spec.draft is not None:
                with stats.phase("draft_prefill"):
                    spec.draft.prefill(part, state.features)
            if spec.progress is not None:
                spec.progress("prefill", start + part.shape[1], total)

    def round(self) -> Step:
        """One target forward, and what follows from it."""
        start = time.perf_counter()
        draft, stats, first = self.spec.draft, self.stats, self.first
        room = self.max_length - self.cache.length - 2  # proposed tokens that can still be emitted
        depth = 0
        if draft is not None and not first and room > 0:
            depth = min(self.gate.next_depth(), self.depth, room)
        if depth:
            with stats.phase("draft"):
                features = torch.cat(self.features, 1) if self.features else None
                tree = draft.propose(torch.cat(self.undrafted, 1), depth, features)
            self.undrafted, self.features = [], []
        else:
            tree = Tree.root_only(self.root)
        self.first = False

        scoring = self._scores_now(draft, first)
        phase = "prefill" if first else "verify"
        with stats.phase(phase):
            state = Pass(
                self.cache,
                [(self.cache, self.cache.lens)],
                tree.num_nodes,
                mask=tree.mask if tree.depth else None,
                q_depths=tree.depths if tree.depth else None,
                k_depths=tree.depths if tree.depth else None,
                score_layers=self.spec._score_layers if scoring else frozenset(),
                chunk_size=self.config.chunk_size,
                fused=self.config.tree_attention,
                feature_layers=self.feature_layers,
            )
            positions = self.cache.lens[:, None].long() + tree.depths
            logits = self.spec._target.forward(tree.tokens, positions, state)
            logits = logits[..., : self.spec._vocab]
        with stats.phase("accept"):
            step, num_accepted, row = self._accept(tree, logits, positions, state.features)
        if scoring:
            with stats.phase("retrieve"):
                self._retrieve(state, row, num_accepted)
        accepted = step.num_accepted
        self.cache.advance(accepted + 1)
        if not first:
            stats.count_round(tree.num_nodes - 1, accepted)
        self.gate.count(tree.depth, accepted + 1, time.perf_counter() - start)
        return step

    def _scores_now(self, draft: Draft | None, first: bool) -> bool:
        if draft is None or not draft.wants_scores or self.cache.length + 1 <= self.config.budget:
            return False
        return first or self.stats.num_rounds % self.config.retrieve_every == 0

    def _accept(
        self, tree: Tree, logits: Tensor, positions: Tensor, features: Tensor | None
    ) -> tuple[Step, Tensor, Tensor]:
        """Choose at every node, walk, compact; the one host read of a round."""
        length = self.cache.length
        history = self.ids[:, :length] if self.chooser.needs_history else self.ids[:, :0]
        scores = self.chooser.scores(logits, history, tree.tokens, tree.parents)
        choice = self.chooser.choose(scores, positions)
        path, num_accepted, emitted, root = ops.verify_tree(tree.tokens, tree.parents, choice)
        self.cache.compact(path, num_accepted, tree.depth)

        width = tree.depth + 1
        parts = [num_accepted.double(), emitted[0, :width].double(), path[0, :width].double()]
        if tree.gain is not None:
            parts.append(tree.gain.double())
        read = torch.cat(parts).tolist()
        accepted = int(read[0])
        tokens = [int(t) for t in read[1 : accepted + 2]]
        if tokens[-1] < 0:
            raise ValueError(
                f"the target's logits at position {length + accepted} are NaN: no token can be "
                "chosen"
            )
        if tree.gain is not None:
            self._adapt_depth(tree.depth, read[-1])

        new = emitted[:, : accepted + 1]
        self.ids[:, length + 1 : length + 1 + new.shape[1]] = new[
            :, : self.ids.shape[1] - length - 1
        ]
        self.root = root[:, None]
        self.undrafted.append(new)
        if self.spec.draft is not None:
            self.spec.draft.observe(tokens)
        if features is not None:
            self.features.append(features[:, path[0, : accepted + 1].long()])
        row = path.gather(1, num_accepted[:, None].long())[:, 0]
        nodes = [int(n) for n in read[1 + width : 2 + width + accepted]]
        step = Step(
            tokens,
            accepted,
            tuple(scores[:, n].float() for n in nodes) if self.keep_scores else (),
            tuple(logits[:, n].float() for n in nodes) if self.keep_logits else (),
        )
        return step, num_accepted, row

    def _adapt_depth(self, depth: int, gain: float) -> None:
        """OPT-Tree's rule, one level per round: the tree grows while its last level pays."""
        if self.config.tree_shape == "opt" and depth == self.depth:
            wanted = depth + 1 if gain > self.config.tree_threshold else depth - 1
            self.depth = min(max(wanted, 1), self.max_depth)

    def _retrieve(self, state: Pass, row: Tensor, num_accepted: Tensor) -> None:
        """Score chunks by the attention of the last accepted node; the accepted rows are in place,
        but not counted in ``cache.lens`` yet."""
        config, total = self.config, None
        for layer, (first, second) in sorted(state.recorded.items()):
            if config.tree_attention:
                scores = ops.chunk_scores(
                    first, second, row, self.cache.lens,
                    chunk_size=config.chunk_size, reduce=config.score_reduce,
                )  # fmt: skip
            else:
                scores = ops.chunk_scores_keys(
                    first, self.cache.layers[layer].k, row, self.cache.lens + num_accepted + 1,
                    chunk_size=config.chunk_size, scale=second, reduce=config.score_reduce,
                )  # fmt: skip
            total = scores if total is None else total + scores
        self.stats.num_retrievals += 1
        ids = self.spec.draft.retrieve(total)
        if ids is not None:
            self.stats.retrieved_ids.append(ids)
