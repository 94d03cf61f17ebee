"""Keep masks of every pattern, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmsqueeze.methods.base import Target
from llmsqueeze.methods.select import choose


def scores(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


@pytest.mark.parametrize("pattern", ["2:4-out", "4:8-out", "1:4-out"])
def test_out_keeps_n_of_every_m_outputs(pattern: str) -> None:
    target = Target.parse(None, pattern)
    nm = target.pattern
    score = scores(24, 10)
    keep = choose(score, target)
    for column in range(10):
        for start in range(0, 24, nm.m):
            group = score[start : start + nm.m, column]
            kept = set(keep[start : start + nm.m, column].nonzero().flatten().tolist())
            assert kept == set(group.argsort(descending=True)[: nm.n].tolist())


def test_channel_budget_moves_whole_inputs_and_no_bytes() -> None:
    target = Target.parse(None, "2:4-out", budget=0.1)
    score = scores(16, 40) * torch.arange(1, 41)
    keep = choose(score, target)
    per_input = keep.sum(dim=0)
    assert (per_input == 16).nonzero().flatten().tolist() == [36, 37, 38, 39]
    assert (per_input == 0).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert int(keep.sum()) == 16 * 40 // 2


@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (17, 20), (5, 12)])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.4, 0.5])
def test_tiles_are_dense_or_two_of_four(rows: int, columns: int, sparsity: float) -> None:
    target = Target.parse(sparsity, "tile", tile=8)
    score = scores(rows, columns)
    keep = choose(score, target)
    benefits, dense = [], []
    for top in range(0, rows, 8):
        for left in range(0, columns, 8):
            tile, part = keep[top : top + 8, left : left + 8], score[top : top + 8, left : left + 8]
            groups, values = tile.reshape(-1, 4), part.reshape(-1, 4)
            lost = values.sort(dim=1).values[:, :2].square().sum() / values.numel()
            benefits.append(float(lost))
            dense.append(bool(tile.all()))
            if not dense[-1]:
                assert (groups.sum(dim=1) == 2).all()
                best = values.argsort(dim=1, descending=True)[:, :2]
                assert groups.gather(1, best).all()
    assert sum(dense) == round(len(dense) * (1 - 2 * sparsity))
    if any(dense) and not all(dense):
        assert min(b for b, d in zip(benefits, dense, strict=True) if d) >= max(
            b for b, d in zip(benefits, dense, strict=True) if not d
        )
