"""Runs a generation as the host sees it: its rounds, and what the draft has yet to take in.

State of a generation: committed tokens, all of them in the target's cache, and one pending root,
which is decided but not yet there. A round verifies the root and the draft's tree behind it in one
target forward, keeps the path that agrees, and leaves the target's own next token as the new root
(SpecExtend, arXiv 2505.20776, section 3; docs/design.md has the state machine).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backlog import Backlog
from .cache import Pass
from .config import SpecConfig
from .context import Context
from .draft import Decided, Draft
from .gate import Gate
from .graphs import Capture, Graphs, Mailbox, RoundCost, bucket, obstacle
from .longrope import drops_cache, longrope_edge
from .pace import Round
from .sampling import TokenChooser
from .stats import SpecStats
from .stopping import Stop
from .target import Target
from .tree import Tree
from .verify import Decisions, Outcome, Verifier

#: called as ``progress("prefill", done, total)`` behind each part of the prompt
Progress = Callable[[str, int, int], None]


@dataclass
class Step:
    """Holds what one round brought.

    Attributes:
        tokens: token ids in order; the last one is the target's own, those before it were proposed
            by the draft and accepted.
        num_accepted: of ``tokens``, proposed by the draft. The last one counts as the target's own,
            also where it ends the text and a draft had proposed it.
        scores, logits: one [1, V] fp32 row per token, processed and raw, when asked for.
    """

    tokens: list[int]
    num_accepted: int
    scores: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Request:
    """Says what is to be written.

    Attributes:
        prompt: [1, L] int64, without padding, on the target's device.
        max_length: tokens of prompt and output at most.
        chooser: the target's choice at a node.
        stop: where the text ends.
        keep_scores, keep_logits: whether steps bring them.
        padding: tokens that were before the prompt.
        context: what is gone on from, where the prompt begins like it, and is left in the end;
            None: the prompt is read from its beginning, and nothing is kept.
    """

    prompt: Tensor
    max_length: int
    chooser: TokenChooser
    stop: Stop
    keep_scores: bool = False
    keep_logits: bool = False
    padding: int = 0
    context: Context | None = None


class Generation:
    """Holds one generation's state, from prefill to the last round. Batch 1.

    The host launches what :class:`Verifier` and the draft do on the device, and reads one block of
    numbers per round.

    Args:
        target: writes the text.
        draft: proposes it, or None.
        config: options.
        request: what is to be written.
        stats: what to count in.
        capture: gives the graphs that the round runs from, where it can.
        progress: is told of the prefill.
        gate: chooses the depth of trees; None: as ``config.gate`` says.

    Attributes:
        cache: the target's.
        decisions: the text so far, on the device.
        backlog: what the draft has yet to take in.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        config: SpecConfig,
        request: Request,
        stats: SpecStats,
        capture: Capture,
        progress: Progress | None = None,
        gate: Gate | None = None,
    ):
        self.target, self.draft, self.config = target, draft, config
        self.request, self.stats, self.progress = request, stats, progress
        prompt = request.prompt
        # Tokens that the draft can take in.
        self._limit = getattr(draft, "max_length", None) or request.max_length
        if prompt.shape[1] >= self._limit:
            self.draft = draft = None  # there is nothing that it could propose
        self.device = prompt.device
        # Of trees at most; width: tokens of a round.
        self._max_depth = max(config.max_depth, getattr(draft, "max_depth", 0))
        self._max_nodes = max(config.max_nodes, getattr(draft, "max_nodes", 0))
        width = self._max_depth + 1
        rows = request.max_length + 1 + max(self._max_nodes, width)
        self._context = request.context or Context()
        self.cache, start, self._common = self._context.open(target, draft, config, prompt, rows)
        self._num_read = stats.num_cached_tokens = start  # tokens of the prompt
        self._begun: Draft | None = None  # the draft, once it has a part in this
        self._sound = True  # no call was broken off
        self._alike = True  # all keys were turned as in one text of this length
        # No pass straddles a length at which the target's keys become others.
        self._edge = longrope_edge(target.model)
        self.decisions = Decisions(prompt, request.max_length, width)
        self.backlog = Backlog(self.decisions, prompt.shape[1] - 1)
        features = () if draft is None else draft.feature_layers
        self._verifier = Verifier(
            target, config, self.cache, self.decisions, request.chooser, features
        )
        self._graphs, self._draft_graphs = self._capture(capture)
        # The next tree is launched before the host has read the round.
        self._leads = self._draft_graphs.enabled and not draft.on_host
        self._cost = RoundCost(self.device, (self._graphs, self._draft_graphs))
        self._mailbox = Mailbox(2 * width + 3, self.device)
        self._branches = target.branches
        self._gate = gate or Gate(config, self._max_depth, self._draft_follows(), self._branches)
        self._first = True  # the round to come is the prompt's last token alone
        self._outcome: Outcome | None = None  # of the last round
        self._reading = draft is not None  # it has yet to finish with the prompt
        self._scores: Tensor | None = None  # of chunks, the last ones, until then
        self._ahead: Tree | None = None  # of the round to come, launched in the last one
        self._from_draft = False  # the draft made the last tree
        self._unsettled = False  # the draft took in tokens by a count that it has yet to learn
        self._num_emitted = 0  # by the last round that the host has read

    def _capture(self, capture: Capture) -> tuple[Graphs, Graphs]:
        """Return what the target's work and the draft's is captured in."""
        target, draft = self.target, self.draft
        reason = obstacle(target.model)
        if not self.config.tree_attention:
            reason = "tree_attention=False masks by the host's count of tokens"
        if target.keeps_states:
            reason = "its layers with a state follow the host's count of accepted tokens"
        graphs = capture.graphs(self.device, f"the target {type(target.model).__name__}", reason)
        if draft is None:
            return graphs, Graphs()
        name = f"the draft {type(draft).__name__}"
        return graphs, capture.graphs(self.device, name, draft.obstacle())

    def _draft_follows(self) -> bool:
        """Tell whether the draft can be told what pays: it works where it can see what it does."""
        on_host = self.device.type == "cpu" or getattr(self.draft, "on_host", False)
        return on_host and not self._leads

    def close(self) -> None:
        """Leave in the request's context what has been read and written, and drop the graphs, which
        hold the caches."""
        try:
            if self.request.context is not None:
                self._leave(self.request.context)
        finally:
            self._graphs.close()
            self._draft_graphs.close()

    def _leave(self, context: Context) -> None:
        if not self._alike:
            context.clear()
            return
        draft, length = self._begun, self.cache.length
        drafted = draft and draft.keep(self.backlog.upto(length) if self._sound else None)
        ids = self.decisions.ids[0, : length + 1]
        context.leave(self.target, draft, ids, self._num_read, drafted, self._sound)

    # ---- the prompt ------------------------------------------------------------------------------

    def prefill(self) -> None:
        """Take in all of the prompt that is not there but its last token, which is the first
        root."""
        self._sound = False
        request, draft, tokens = self.request, self.draft, self.request.prompt[:, :-1]
        total, first = tokens.shape[1], self.cache.length
        chunk = self.config.prefill_chunk or max(total, 1)
        if draft is not None:
            draft.begin(request.prompt, request.max_length, self.cache, self._draft_graphs)
            self._begun = draft
            if first:
                draft.resume(self._context.drafted, self._common, first)
        for start in range(first, total, chunk):
            part = tokens[:, start : start + chunk]
            features = self._read(part, start)
            self._num_read = self.cache.length
            if draft is not None:
                decided = Decided(part, self.backlog.shift(features))
                with self.stats.phase("draft_prefill"):
                    draft.prefill(decided)
            if request.context is not None:
                self.cache.mark()
            if self.progress is not None:
                self.progress("prefill", start + part.shape[1], total)
        self._sound = True

    def _read(self, part: Tensor, start: int) -> Tensor | None:
        """Run the target over a part of the prompt that begins at ``start``."""
        count = part.shape[1]
        positions = torch.arange(start, start + count, device=self.device)[None]
        with self.stats.phase("prefill"):
            layers = self._verifier.feature_layers
            state = Pass(self.cache, [(self.cache, self.cache.lens)], count, feature_layers=layers)
            self.target.read(part, positions, state)
            self.cache.advance(count)
        return state.features

    def _pass_edge(self) -> None:
        """Grow beyond the length at which rotary factors become long, as ``generate`` does: it
        reads all of the text anew, or lets the keys as they are. With padding it would have read it
        anew when the padded text was as long, to no effect."""
        length = self.cache.length
        self.cache.rotary_length = length + 1
        if self.request.padding or not drops_cache(self.target.model, length):
            self._alike = False
            return
        self.cache.restart()
        for part in self.decisions.ids[:, :length].split(self.config.prefill_chunk or length, 1):
            self._read(part, self.cache.length)

    # ---- a round ---------------------------------------------------------------------------------

    def round(self) -> Step:
        """Propose, verify, accept, retrieve: one target forward, and what follows from it.

        On a GPU the next tree is launched before the host reads what this round emitted, wherever
        it cannot run beyond the last token: while the host attends to stopping rules, streamers and
        the caller, the device works on. A tree launched in vain is dropped.
        """
        self._sound = False
        if self.cache.length == self._edge and self.cache.rotary_length <= self._edge:
            self._pass_edge()
        tree, self._ahead = self._ahead or self._propose(), None
        self._outcome = outcome = self._verify(tree)
        self._launch_ahead(tree, outcome)
        step = self._accept(tree, outcome)
        self._sound = True
        return step

    def _propose(self) -> Tree:
        """Have a tree made below the root, whose length the host knows."""
        outcome = self._outcome
        if self._first and outcome is not None:
            self._first = False
            if self._edge is None and self._room(self.cache.length) <= 0:
                self.draft = None  # no tree will follow
        if self.draft is not None and outcome is not None:
            if self._reading:
                self._finish_prefill(outcome)
            if not self._reading:
                self._retrieve(outcome)
        tree = self._next_tree(self.cache.length)
        self._settle_draft(self._num_emitted)
        return tree

    def _verify(self, tree: Tree) -> Outcome:
        """Run the verify pass and the acceptance: one graph, or two parts around what the host
        does. The host may read the outcome with :meth:`_accept`."""
        verifier, graphs, stats = self._verifier, self._graphs, self.stats
        drafted, scoring = tree.depth > 0, self._scores_now()
        if drafted and graphs.enabled:
            nodes = bucket(tree.num_nodes - 1, self._max_nodes, self.target.group)
            tree = tree.padded(1 + nodes)
        key = (tree.num_nodes, drafted, scoring)
        given = (tree.tokens, tree.parents, tree.depths, tree.mask if drafted else None)
        phase = "prefill" if self._first else "verify"

        def forward(*given):
            return verifier.forward(scoring, *given)

        def both(*given):
            return verifier.accept(*forward(*given[:-1]), *given)

        with self._cost.verify():
            if graphs.enabled and not self.request.chooser.needs_host:
                with stats.phase(phase):
                    outcome = graphs.call(("round", *key), both, *given, tree.promise)
            else:
                with stats.phase(phase):
                    passed = graphs.call(("verify", *key), forward, *given)
                with stats.phase("accept"):
                    outcome = verifier.accept(*passed, *given, tree.promise)
        self._mailbox.send(outcome.numbers)  # behind the watch, which is read once this arrives
        return replace(outcome)  # a graph returns the same one again

    def _accept(self, tree: Tree, outcome: Outcome) -> Step:
        """Read what was decided, once per round, and draw from it what the host has to know."""
        with self.stats.phase("accept"):
            step, promise = self._receive(tree, outcome)
        if self._ahead is not None:
            self._settle_draft(len(step.tokens))
            if self._from_draft:
                self.backlog.clear(self.cache.length)
        if not self._first:
            self.stats.count_round(tree.num_nodes - 1, step.num_accepted)
        seconds, drafting = self._cost.seconds()
        if self.draft is not None:
            self.draft.observe([step.tokens], seconds)
            took = Round(
                tree.depth, tree.size(self._branches), len(step.tokens), seconds, drafting,
                step.num_accepted, *promise,
            )  # fmt: skip
            self._gate.count(took)
        return step

    def finish_reading(self) -> None:
        """Have the draft read what it leaves for later, behind the first round."""
        if self.draft is not None and self._reading:
            self._finish_prefill(self._outcome)

    def _finish_prefill(self, outcome: Outcome) -> None:
        """Let the draft read of the prompt what could wait for the first token, if it will now."""
        if outcome.chunk_scores is None:
            outcome.chunk_scores = self._scores
        with self.stats.phase("draft_prefill"):
            self._reading = not self.draft.finish_prefill(outcome.chunk_scores)
        waits = self._reading and outcome.chunk_scores is not None
        self._scores = outcome.chunk_scores.clone() if waits else None

    def _retrieve(self, outcome: Outcome) -> None:
        """Let the draft choose what it attends to by the target's attention, where it was scored
        in this round; once."""
        scores, outcome.chunk_scores = outcome.chunk_scores, None
        if scores is None:
            return
        with self.stats.phase("retrieve"), self._cost.work():
            self.stats.num_retrievals += 1
            ids = self.draft.retrieve(scores.clone())
            if ids is not None:
                with torch.inference_mode(False):  # the caller may do with them what it likes
                    self.stats.retrieved_ids.append(ids.clone())

    # ---- behind the round ------------------------------------------------------------------------

    def _launch_ahead(self, tree: Tree, outcome: Outcome) -> None:
        """Launch the next tree before this round is read, where the draft can be captured; without
        graphs the host may as well read now, as drafts may want to know where they are."""
        longest = self.cache.length + tree.depth + 1
        fits = self._room(longest) >= self.config.max_depth
        if self._from_draft and self._leads and fits:
            self._retrieve(outcome)
            self._ahead = self._next_tree(longest)

    def _next_tree(self, length: int) -> Tree:
        """Have a tree made below the root behind ``length`` committed tokens, or at most as many
        where the host does not know yet."""
        draft, before, room = self.draft, self._from_draft, self._room(length)
        depth = 0
        if draft is not None and not self._first and room > 0:
            depth = min(self._gate.next_depth(), room)
        self._from_draft = depth > 0
        if not depth:
            return Tree.root_only(self.decisions.root)
        # What the last round emitted is all that is new, and lies where a graph finds it.
        self._unsettled = before and self._leads
        decided = self.backlog.emitted() if self._unsettled else self.backlog.upto(length)
        with self.stats.phase("draft"), self._cost.draft():
            tree = draft.propose(decided, depth, self._gate.price())
        self.backlog.clear(length)
        return tree

    def _room(self, length: int) -> int:
        """Return the levels that a tree behind ``length`` committed tokens can have: proposed
        tokens that can still be emitted, by a draft that can take in those before them, before the
        target's keys become others."""
        room = min(self.request.max_length - length - 2, self._limit - length)
        if self._edge is not None and self.cache.rotary_length <= self._edge:
            room = min(room, self._edge - 1 - length)
        return room

    def _settle_draft(self, num_emitted: int) -> None:
        if self._unsettled:
            self.draft.settle([num_emitted])
            self._unsettled = False

    def _scores_now(self) -> bool:
        """Tell whether this round's attention is scored for retrieval."""
        draft, config = self.draft, self.config
        if draft is None or not draft.wants_scores or self.cache.length + 1 <= config.budget:
            return False
        if self.cache.length + 1 >= self._limit:
            return False  # no tree will follow
        return self._first or self.stats.num_rounds % config.retrieve_every == 0

    def _receive(self, tree: Tree, outcome: Outcome) -> tuple[Step, list[float]]:
        """Wait for the outcome's numbers and follow them.

        Returns:
            What the round brought, and what its tree promised, if anything.
        """
        width, length = self.decisions.width, self.cache.length
        read = self._mailbox.receive()
        accepted = int(read[0])
        tokens = [int(t) for t in read[1 : accepted + 2]]
        nodes = [int(n) for n in read[1 + width : 2 + width + accepted]]

        def rows(source: Tensor, wanted: bool) -> tuple[Tensor, ...]:
            return tuple(_own_row(source, n) for n in nodes) if wanted else ()

        request = self.request
        scores = rows(outcome.scores, request.keep_scores)
        logits = rows(outcome.logits, request.keep_logits)
        count = len(tokens)
        if not request.chooser.walks:  # which ends the text itself
            count = request.stop.take([t for t in tokens if t >= 0], scores)
        if not request.stop.done and tokens[-1] < 0:
            raise ValueError(
                f"the target's scores at position {length + accepted} are NaN, or -inf for every "
                "token: none can be chosen"
            )
        self._num_emitted = accepted + 1
        self.cache.settle(accepted + 1)
        self.cache.follow(nodes)
        self.backlog.add(accepted + 1)
        self.stats.num_emitted_tokens += count
        promise = [] if tree.promise is None else [float(x) for x in read[-2:]]
        return Step(tokens[:count], count - 1, scores[:count], logits[:count]), promise


def _own_row(source: Tensor, node: int) -> Tensor:
    """Copy a row of [1, M, V] to [1, V] fp32 that the caller may change, and learn from."""
    with torch.inference_mode(False):
        return source[:, node].detach().to(torch.float32, copy=True)
