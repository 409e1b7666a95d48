"""Measures whether a draft itself finds what stands far above (SpecExtend's Table 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..config import SpecConfig
from ..decode import SpecExtend
from ..draft.causal_lm import CausalLMDraft
from ..pace import FREE
from ..tree import Tree
from .records import Needle


class _Probe(CausalLMDraft):
    """Takes part in every round as the draft would, but proposes nothing, and keeps what it thinks
    of the next token. So the loop writes token by token, with the working cache that it makes."""

    def begin(self, prompt, max_length, cache, graphs) -> None:
        super().begin(prompt, max_length, cache, graphs)
        self.thoughts: list[Tensor] = []  # [V] of each round

    def propose(self, decided, depth, price=FREE) -> Tree:
        tree = super().propose(decided, 1, price)
        self.thoughts.append(self._last)
        return Tree.root_only(tree.tokens[:, :1])

    def logits(self, *args, **kwargs) -> Tensor:
        logits = super().logits(*args, **kwargs)
        self._last = logits[0, -1].float().log_softmax(-1)
        return logits


class _Dictate(LogitsProcessor):
    """Makes the target write given tokens."""

    def __init__(self, start: int, tokens: list[int]):
        self._start, self._tokens = start, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._tokens[input_ids.shape[1] - self._start]
        return torch.full_like(scores, -torch.inf).index_fill_(
            1, torch.tensor([token], device=scores.device), 0.0
        )


def needle(
    model: PreTrainedModel, draft: CausalLMDraft, config: SpecConfig, ids: list[int], answer: list
) -> Needle:
    """Measure accuracy and perplexity of the draft along an answer.

    The loop runs as always, with the draft's cache as ``config`` says and chunks retrieved by the
    target's attention; the answer is dictated to the target, one token a round. The draft is asked
    for each of its tokens behind the true ones before.

    Args:
        model: the target.
        draft: the draft as the loop would use it.
        ids: the prompt, which ends before the answer; at least 2 tokens.
    """
    vocab = model.config.get_text_config().vocab_size
    probe = _Probe(draft.causal_lm, config, vocab, draft.rotary)
    config = config.replace(gate="off", graphs="off", tree_shape="opt", tree_nodes=1)
    spec = SpecExtend(model, probe, config)
    # The first token, which nobody proposes, is the prompt's last. One more than the answer is
    # written, for nothing is proposed for the last.
    dictated = [ids[-1], *answer, answer[-1]]
    prompt = torch.tensor([ids[:-1]], device=model.device)
    processors = LogitsProcessorList([_Dictate(prompt.shape[1], dictated)])
    spec.generate(
        prompt, max_new_tokens=len(dictated), do_sample=False, logits_processor=processors
    )
    thoughts = torch.stack(probe.thoughts).cpu()
    wanted = torch.tensor(answer)
    right = thoughts.argmax(-1) == wanted
    loss = -thoughts.gather(1, wanted[:, None]).mean().item()
    return Needle(right.double().mean().item(), math.exp(loss))
