"""Tests what embedded models are trained with: their forward, gradients, optimizer, schedule."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from specextend.assets import held_out_documents, target_path

TOOLS = Path(__file__).resolve().parents[1] / "tools"
if not TOOLS.is_dir():
    pytest.skip("tools/ is not part of this installation", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

from embedded.corpus import VOCAB  # noqa: E402
from embedded.model import copying_start, hidden_states, new_model  # noqa: E402
from embedded.training import Optimizer, backward, schedule  # noqa: E402


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def test_forward_and_gradients_are_those_of_llama():
    """Positions with a gap, more rows than a block of the attention, blocks of the loss."""
    narrow, wide = (
        LlamaForCausalLM.from_pretrained(target_path(), dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    tokenizer = AutoTokenizer.from_pretrained(target_path())
    texts = [text[3000:9000] for _, text in held_out_documents()[:2]]
    ids = torch.tensor([tokenizer(text).input_ids[:300] for text in texts])
    at = torch.arange(300).repeat(2, 1)
    at[:, 100:] += 77
    hidden, labels = hidden_states(narrow, ids, at), ids.roll(-1, 1).flatten()

    def loss_of(logits, rows):
        return F.cross_entropy(logits.float(), labels[rows], reduction="sum") / len(labels)

    loss = backward(narrow, hidden, loss_of, rows=128)
    want = wide(input_ids=ids, position_ids=at, output_hidden_states=True)
    expected = F.cross_entropy(want.logits.flatten(0, 1), labels)
    expected.backward()
    assert off(hidden, want.hidden_states[-1]) < 0.02  # without the gap 0.1
    assert loss == pytest.approx(expected.item(), rel=0.002)
    for (name, p), q in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert off(p.grad, q.grad) < 0.08, name


def test_updates_lower_the_loss():
    torch.manual_seed(0)
    draft = new_model("draft")
    copying_start(draft, 0)
    ids, at = torch.randint(0, VOCAB, (1, 64)), torch.arange(64)[None]
    optimizer, losses, labels = Optimizer(draft, 0.02, 4e-3), [], ids.flatten()
    for _ in range(12):
        hidden = hidden_states(draft, ids, at)
        losses.append(
            backward(draft, hidden, lambda logits, rows: F.cross_entropy(logits, labels[rows]))
        )
        optimizer.step(1.0)
    assert losses[-1] < 0.5 * losses[0]


def test_schedule():
    assert [schedule(step, 0.1, 0.5, warm_up=4) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1, 1]
    assert [schedule(99, p, 0.5) for p in (0.5, 0.75, 1.0)] == [1, 0.5, 0.02]
