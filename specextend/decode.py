"""The draft-verify loop: SpecExtend as a drop-in on Hugging Face models.

State of a generation: committed tokens, all of them in the target's cache, and one pending root,
which is decided but not yet there. A round verifies the root and the draft's tree behind it in one
target forward, keeps the path that agrees, and leaves the target's own next token as the new root
(SpecExtend, arXiv 2505.20776, section 3; docs/design.md has the state machine).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
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
from .compat import CACHE
from .config import SpecConfig
from .draft import CausalLMDraft, Draft, load_draft
from .gate import Gate
from .graphs import CudaRecorder, Graphs, Mailbox, Stopwatch, bucket, obstacle, warn_uncaptured
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
        self._told: set[str] = set()  # what was said to run without graphs

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

    def _graphs(self, name: str, reason: str | None) -> Graphs:
        """Graphs for one of the two models: eager on a CPU, or for a ``reason``, said once."""
        if self.model.device.type != "cuda" or self.config.graphs == "off":
            return Graphs()
        if reason is None:
            return Graphs(CudaRecorder(self.model.device), name)
        if name not in self._told:
            self._told.add(name)
            warn_uncaptured(name, reason)
        return Graphs()

    def _target_graphs(self) -> Graphs:
        reason = obstacle(self.model)
        if not self.config.tree_attention:
            reason = "tree_attention=False masks by the host's count of tokens"
        return self._graphs(f"the target {type(self.model).__name__}", reason)

    def _draft_graphs(self) -> Graphs:
        return self._graphs(f"the draft {type(self.draft).__name__}", self.draft.obstacle())

    def _generation(self, prompt, max_length, chooser, stop, keep) -> Iterator[Step]:
        self.stats = SpecStats(num_prompt_tokens=prompt.shape[1])
        self._running = True
        generation = None
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
            if generation is not None:
                generation.close()
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


@dataclass
class _Outcome:
    """What a verify pass and its acceptance leave on the device.

    Attributes:
        numbers: [2 W + 2] fp64, what the host reads: accepted tokens, W emitted ones, W nodes of
            the path, the tree's gain; W is the longest path with its root, tails are -1.
        logits, scores: [1, M, V], raw and processed.
        chunk_scores: [1, C] fp32, for retrieval; None where none is due.
    """

    numbers: Tensor
    logits: Tensor
    scores: Tensor
    chunk_scores: Tensor | None


class _Generation:
    """One generation's state, from prefill to the last round. Batch 1.

    What a round computes, it computes from tensors: the functions between the graphs' ``call`` and
    the ops never ask the host, which only launches them, and reads one block of numbers per round.
    """

    def __init__(
        self, spec: SpecExtend, prompt: Tensor, max_length: int, chooser: TokenChooser, keep
    ):
        self.spec, self.config, self.stats = spec, spec.config, spec.stats
        self.chooser = chooser
        self.keep_scores, self.keep_logits = keep
        self.max_length = max_length
        self.device = prompt.device
        config, draft = self.config, spec.draft
        self.graphs = spec._target_graphs()
        if draft is not None:
            draft.graphs = spec._draft_graphs()
        heads = spec.model.config.get_text_config()
        kv_heads = getattr(heads, "num_key_value_heads", None) or heads.num_attention_heads
        self.group = heads.num_attention_heads // kv_heads
        self.width = config.max_depth + 1  # tokens that a round emits at most
        nodes = max(config.max_nodes, self.width)
        self.cache = KVCache(spec._num_layers, max_length + 1 + nodes, batch=1, device=self.device)
        # Committed tokens and the root behind them; room for a path beyond the last token.
        size = max_length + 1 + self.width
        self.ids = torch.zeros(1, size, dtype=torch.int64, device=self.device)
        self.ids[:, : prompt.shape[1]] = prompt
        self.prompt = prompt
        self.root = prompt[:, -1:].clone()
        # What the last round emitted, where the draft finds it without the host: tokens, how many
        # of them count, and their features.
        self.emitted = torch.zeros(1, self.width, dtype=torch.int64, device=self.device)
        self.count = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.emitted_features: Tensor | None = None
        self.steps = torch.arange(self.width, device=self.device)
        self.no_gain = torch.zeros(1, device=self.device)
        self.mailbox = Mailbox(2 * self.width + 2, self.device)

        self.num_emitted = 0  # by the last round that the host has read
        self.drafted = prompt.shape[1] - 1  # tokens that the draft has seen
        self.unseen: list[Tensor] = []  # features of the others, without the root's
        self.feature_layers = () if draft is None else draft.feature_layers
        self.tree: Tree | None = None  # of the next round, if it is under way
        self.from_draft = False  # that tree, or the last one, is the draft's
        self.before: list[Stopwatch] = []  # of what was done for the next round
        self.unsettled = False  # the draft took in tokens by a count that it has yet to learn
        self.depth = config.max_depth
        self.gate = Gate(config.max_depth, config.gate == "auto" and draft is not None)
        self.prepared = 0  # graphs, when the last verify pass was over
        self.first = True

    def close(self) -> None:
        """Drop the graphs; they hold the caches."""
        self.graphs.close()
        if self.spec.draft is not None:
            self.spec.draft.graphs.close()

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

    # ---- a round, as the host sees it ------------------------------------------------------------

    def round(self) -> Step:
        """One target forward, and what follows from it.

        On a GPU the next tree is launched before the host reads what this round emitted, wherever
        it cannot run beyond the last token: while the host attends to stopping rules, streamers and
        the caller, the device works on. A tree launched in vain is dropped.
        """
        stats, first, draft = self.stats, self.first, self.spec.draft
        if self.tree is None:
            self._next_tree(self.cache.length)
            self._settle_draft()
        tree, before, self.tree, self.before = self.tree, self.before, None, []
        self.first = False
        scoring = self._scores_now(draft, first)
        with Stopwatch(self.device) as verifying:
            outcome = self._verify(tree, scoring, "prefill" if first else "verify")
        self.mailbox.send(outcome.numbers)  # behind the watch, which is read once this arrives

        prepared, self.prepared = self.prepared, self._preparations()

        # Without graphs the host may as well read now: drafts may want to know where they are.
        ahead = self.from_draft and draft.takes_count and draft.graphs.enabled
        longest = self.cache.length + tree.depth + 1
        ahead = ahead and self.max_length - longest - 2 >= self.config.max_depth
        if ahead:
            if scoring:
                self._retrieve(outcome.chunk_scores)
            self._next_tree(longest)
        with stats.phase("accept"):
            step = self._receive(tree, outcome)
        if ahead:
            self._settle_draft()
            if self.from_draft:
                self.drafted, self.unseen = self.cache.length + 1, []
        elif scoring:
            self._retrieve(outcome.chunk_scores)
        if not first:
            stats.count_round(tree.num_nodes - 1, step.num_accepted)
        if prepared == self.prepared:  # else it took longer for once
            seconds = sum(watch.seconds for watch in (*before, verifying))
            self.gate.count(tree.depth, len(step.tokens), seconds)
        return step

    def _preparations(self) -> int:
        """Calls so far that warmed up or recorded a graph."""
        draft = self.spec.draft
        return self.graphs.preparations + (0 if draft is None else draft.graphs.preparations)

    def _next_tree(self, length: int) -> None:
        """Have a tree made below the root behind ``length`` committed tokens, or at most as many
        where the host does not know yet."""
        draft, before = self.spec.draft, self.from_draft
        room = self.max_length - length - 2  # proposed tokens that can still be emitted
        depth = 0
        if draft is not None and not self.first and room > 0:
            depth = min(self.gate.next_depth(), self.depth, room)
        self.from_draft = depth > 0
        if not depth:
            self.tree = Tree.root_only(self.root)
            return
        if before and draft.takes_count and draft.graphs.enabled:
            given = (self.emitted, depth, self.emitted_features, self.count)
            self.unsettled = True
        else:
            tokens = self.ids[:, self.drafted : length + 1]
            given = (tokens, depth, torch.cat(self.unseen, 1) if self.unseen else None)
        with self.stats.phase("draft"), self._watched():
            self.tree = draft.propose(*given)
        self.drafted, self.unseen = length + 1, []

    def _watched(self) -> Stopwatch:
        """Time that counts with the next round."""
        self.before.append(Stopwatch(self.device))
        return self.before[-1]

    def _settle_draft(self) -> None:
        if self.unsettled:
            self.spec.draft.settle(self.num_emitted)
            self.unsettled = False

    def _scores_now(self, draft: Draft | None, first: bool) -> bool:
        if draft is None or not draft.wants_scores or self.cache.length + 1 <= self.config.budget:
            return False
        return first or self.stats.num_rounds % self.config.retrieve_every == 0

    def _verify(self, tree: Tree, scoring: bool, phase: str) -> _Outcome:
        """The verify pass and the acceptance: one graph, or two parts around what the host does."""
        drafted = tree.depth > 0
        if drafted and self.graphs.enabled:
            tree = tree.padded(1 + bucket(tree.num_nodes - 1, self.config.max_nodes, self.group))
        key = (tree.num_nodes, drafted, scoring)
        given = (tree.tokens, tree.parents, tree.depths, tree.mask if drafted else None)
        if self.graphs.enabled and not self.chooser.needs_host:
            with self.stats.phase(phase):
                return self.graphs.call(
                    ("round", *key),
                    lambda *given: self._accept(*self._forward(scoring, *given[:-1]), *given),
                    *given,
                    tree.gain,
                )
        with self.stats.phase(phase):
            passed = self.graphs.call(
                ("verify", *key), lambda *given: self._forward(scoring, *given), *given
            )
        with self.stats.phase("accept"):
            return self._accept(*passed, *given, tree.gain)

    def _retrieve(self, chunk_scores: Tensor) -> None:
        with self.stats.phase("retrieve"), self._watched():
            self.stats.num_retrievals += 1
            ids = self.spec.draft.retrieve(chunk_scores.clone())
            if ids is not None:
                self.stats.retrieved_ids.append(ids.clone())

    def _receive(self, tree: Tree, outcome: _Outcome) -> Step:
        """The one read of a round, and what the host draws from it."""
        width, length = self.width, self.cache.length
        read = self.mailbox.receive()
        accepted = int(read[0])
        tokens = [int(t) for t in read[1 : accepted + 2]]
        if tokens[-1] < 0:
            raise ValueError(
                f"the target's logits at position {length + accepted} are NaN: no token can be "
                "chosen"
            )
        if tree.gain is not None:
            self._adapt_depth(tree.depth, read[2 * width + 1])
        self.num_emitted = accepted + 1
        self.cache.settle(accepted + 1)
        if self.spec.draft is not None:
            self.spec.draft.observe(tokens)
        if self.emitted_features is not None:
            self.unseen.append(self.emitted_features[:, : accepted + 1].clone())
        nodes = [int(n) for n in read[1 + width : 2 + width + accepted]]

        def rows(source: Tensor) -> tuple[Tensor, ...]:
            return tuple(source[:, n].to(torch.float32, copy=True) for n in nodes)

        return Step(
            tokens,
            accepted,
            rows(outcome.scores) if self.keep_scores else (),
            rows(outcome.logits) if self.keep_logits else (),
        )

    def _adapt_depth(self, depth: int, gain: float) -> None:
        """OPT-Tree's rule, one level per round: the tree grows while its last level pays."""
        if self.config.tree_shape == "opt" and depth == self.depth:
            wanted = depth + 1 if gain > self.config.tree_threshold else depth - 1
            self.depth = min(max(wanted, 1), self.config.max_depth)

    # ---- a round, as the device sees it ----------------------------------------------------------

    def _forward(
        self, scoring: bool, tokens: Tensor, parents: Tensor, depths: Tensor, mask: Tensor | None
    ) -> tuple[Pass, Tensor]:
        """The target over root and nodes; ``mask`` is None for a root alone."""
        state = Pass(
            self.cache,
            [(self.cache, self.cache.lens)],
            tokens.shape[1],
            mask=mask,
            q_depths=None if mask is None else depths,
            k_depths=None if mask is None else depths,
            score_layers=self.spec._score_layers if scoring else frozenset(),
            chunk_size=self.config.chunk_size,
            fused=self.config.tree_attention,
            feature_layers=self.feature_layers,
        )
        positions = self.cache.lens[:, None].long() + depths
        logits = self.spec._target.forward(tokens, positions, state)
        return state, logits[..., : self.spec._vocab]

    def _accept(
        self,
        state: Pass,
        logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        depths: Tensor,
        mask: Tensor | None,
        gain: Tensor | None,
    ) -> _Outcome:
        """Choose at every node, walk, compact, commit."""
        lens, width = self.cache.lens, self.width
        # A processor that wants the tokens before works on the host, which knows their number.
        length = self.cache.length if self.chooser.needs_history else 0
        scores = self.chooser.scores(logits, self.ids[:, :length], tokens, parents)
        choice = self.chooser.choose(scores, lens[:, None].long() + depths)
        path, num_accepted, emitted, root = ops.verify_tree(tokens, parents, choice)
        # No path is longer than the deepest tree.
        path, emitted = path[:, :width], emitted[:, :width]
        self.cache.compact(path, num_accepted)
        chunk_scores = self._chunk_scores(state, path, num_accepted)

        padding = (0, width - path.shape[1])
        path, emitted = (F.pad(x, padding, value=-1) for x in (path, emitted))
        self.emitted.copy_(emitted)
        self.root.copy_(root[:, None])
        self.count.copy_(num_accepted + 1)
        # Behind what counts come places that the next rounds write again.
        self.ids.scatter_(1, lens[:, None] + 1 + self.steps, emitted)
        if state.features is not None:
            kept = path.clamp(min=0).long()[..., None].expand(-1, -1, state.features.shape[-1])
            kept = state.features.gather(1, kept)
            if self.emitted_features is None:
                self.emitted_features = torch.empty_like(kept)
            self.emitted_features.copy_(kept)
        self.cache.commit(self.count)
        parts = [num_accepted, emitted[0], path[0], self.no_gain if gain is None else gain]
        return _Outcome(torch.cat([p.double() for p in parts]), logits, scores, chunk_scores)

    def _chunk_scores(self, state: Pass, path: Tensor, num_accepted: Tensor) -> Tensor | None:
        """Score chunks by the attention of the last accepted node; the accepted rows are in place,
        but not counted in ``cache.lens`` yet."""
        config, total = self.config, None
        row = path.gather(1, num_accepted[:, None].long())[:, 0]
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
        return total
