"""Least squares: some of the outputs choose the damping, all are fitted with it."""

from __future__ import annotations

import torch

from llmsparse.calibration.least_squares import fit, solve


def test_one_output_in_four_chooses_the_damping_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(96, 24, generator=generator)
    start, true = torch.randn(16, 24, generator=generator), torch.randn(16, 24, generator=generator)
    y = h @ true.T + 4 * torch.randn(96, 16, generator=generator)
    judge = (h[64:], y[64:])
    gram, along = h[:64].T @ h[:64], h[:64].T @ y[:64]
    found = fit(gram, along, start, [judge], share=4)
    some = fit(gram, along[:, ::4], start[::4], [(judge[0], judge[1][:, ::4])])
    assert found.damp == some.damp and found.damp is not None
    wanted = solve(gram, along, start, found.damp)
    assert wanted is not None and torch.equal(found.weight, wanted)
    torch.testing.assert_close(found.weight[::4], some.weight)


def test_where_no_damping_helps_those_outputs_nothing_is_fitted() -> None:
    h = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    start = torch.eye(8)
    found = fit(h.T @ h, -h.T @ h, start, [(h, h @ start.T)], share=2)
    assert found.damp is None and found.weight is start
