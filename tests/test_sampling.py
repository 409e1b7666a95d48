"""Keyed noise, and processors applied per node."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from specextend.sampling import TokenChooser, keyed_uniforms


class TestKeyedUniforms:
    def test_depends_on_the_key_alone(self):
        positions = torch.tensor([[5, 6, 7, 5], [5, 6, 7, 9]])
        u = keyed_uniforms(3, positions)
        assert u[0, 0] == u[0, 3] and u[0, 0] != u[1, 0]  # same position; another sequence
        assert torch.equal(keyed_uniforms(3, positions[:1, 1:2]), u[:1, 1:2])
        assert not torch.equal(keyed_uniforms(4, positions), u)
        assert torch.equal(keyed_uniforms(3 + 2**64, positions), u)

    def test_range_and_uniformity(self):
        u = keyed_uniforms(0, torch.arange(200_000)[None])[0]
        assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
        counts = torch.histc(u, 100, 0, 1)
        chi2 = ((counts - 2000) ** 2 / 2000).sum()
        assert 50 < chi2 < 170  # 99 degrees of freedom; p = 1e-5 at either end

    def test_neighbours_and_seeds_are_independent(self):
        streams = [
            keyed_uniforms(seed, torch.arange(50_000)[None])[0] for seed in (0, 1, 2, 1 << 40)
        ]
        rows = torch.stack([*streams, streams[0].roll(1), streams[0].roll(2)])
        correlation = torch.corrcoef(rows) - torch.eye(len(rows), dtype=torch.float64)
        assert correlation.abs().max() < 5 / 50_000**0.5

    def test_known_values(self):
        """Pinned: a change would silently change every sampled text."""
        pinned = [0.09038077510704967, 0.7925855950027666, 0.43695686321047866]
        got = keyed_uniforms(1234, torch.tensor([[0, 1, 100_000]]))
        again = keyed_uniforms(1234, torch.tensor([[0, 1, 100_000]], dtype=torch.int32))
        assert torch.equal(got, again)
        torch.testing.assert_close(got, torch.tensor([pinned], dtype=torch.float64), rtol=0, atol=0)


def tree():
    """Root, two children, a grandchild below each."""
    tokens = torch.tensor([[4, 5, 6, 7, 5]])
    parents = torch.tensor([[-1, 0, 0, 1, 2]], dtype=torch.int32)
    histories = [[4], [4, 5], [4, 6], [4, 5, 7], [4, 6, 5]]
    return tokens, parents, histories


@pytest.mark.parametrize(
    "processors",
    [
        [hf.RepetitionPenaltyLogitsProcessor(1.7)],
        [hf.NoRepeatNGramLogitsProcessor(2)],
        [hf.TemperatureLogitsWarper(0.5), hf.TopKLogitsWarper(3)],
        [hf.RepetitionPenaltyLogitsProcessor(1.3), hf.TopPLogitsWarper(0.8)],
        [hf.MinPLogitsWarper(0.1), hf.TypicalLogitsWarper(0.9)],
        [hf.MinLengthLogitsProcessor(6, torch.tensor([1]))],
        [],
    ],
    ids=lambda ps: "+".join(type(p).__name__ for p in ps),
)
def test_every_node_is_processed_with_its_own_history(processors):
    tokens, parents, histories = tree()
    committed = torch.tensor([[9, 8, 5]])
    logits = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    chooser = TokenChooser(LogitsProcessorList(processors), False, 0)
    got = chooser.scores(logits, committed, tokens, parents)
    assert torch.equal(logits, before)
    for node, history in enumerate(histories):
        ids = torch.cat([committed, torch.tensor([history])], 1)
        row = LogitsProcessorList(processors)(ids, before[:, node].clone())
        torch.testing.assert_close(got[:, node], row)


def test_nodes_at_one_depth_share_their_noise():
    logits = torch.randn(1, 1, 50).expand(1, 4, 50)
    chooser = TokenChooser(LogitsProcessorList(), True, 5)
    drawn = chooser.choose(logits, torch.tensor([[10, 11, 11, 12]]))[0]
    assert drawn[1] == drawn[2]


def test_stateful_processors_are_refused():
    class Cfg(hf.UnbatchedClassifierFreeGuidanceLogitsProcessor):
        def __init__(self):
            pass

    with pytest.raises(ValueError, match="Cfg keeps state between calls"):
        TokenChooser(LogitsProcessorList([Cfg()]), False, 0)
