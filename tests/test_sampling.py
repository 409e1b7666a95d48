"""Keyed noise."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList

from specextend.sampling import TokenChooser, keyed_uniforms
from specextend.stopping import Stop


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


def test_nodes_at_one_depth_share_their_noise():
    logits = torch.randn(1, 1, 50).expand(1, 4, 50)
    chooser = TokenChooser(LogitsProcessorList(), True, 5, Stop([], 9, torch.ones(1, 3)))
    drawn = chooser.choose(logits, torch.tensor([[10, 11, 11, 12]]))[0]
    assert drawn[1] == drawn[2]
