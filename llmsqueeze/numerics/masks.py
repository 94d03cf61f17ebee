"""Keep masks (True = stays) chosen from scores, with exact counts and reproducible ties."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from llmsqueeze.numerics.packing import INT_OF_SIZE


def keep_highest(score: Tensor, removed: int) -> Tensor:
    """Keep all but the `removed` lowest scores of each row; among equals the leftmost goes first.

    score: [rows, columns], finite, any float dtype. Returns bool of the same shape.
    """
    if removed == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _kth_lowest(score, removed)
    drop = score <= threshold
    # Equal scores at the threshold take more than asked; only those rows pay for a ranking.
    tied = (drop.sum(dim=1) != removed).nonzero().squeeze(1)
    if tied.numel():
        below = score[tied] < threshold[tied]
        equal = score[tied] == threshold[tied]
        wanted = removed - below.sum(dim=1, keepdim=True)
        drop[tied] = below | (equal & (equal.cumsum(dim=1) <= wanted))
    return ~drop


def keep_nm(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest of every m consecutive columns; among equals the leftmost goes first.

    score: [rows, columns] with columns divisible by m. Returns bool of the same shape.
    """
    rows, columns = score.shape
    if columns % m:
        raise ValueError(f"{columns} columns do not divide into groups of {m}")
    # Rank by counting who lies below, on m contiguous planes: far cheaper than sorting tiny rows.
    planes = score.reshape(rows, columns // m, m).permute(2, 0, 1).contiguous()
    rank = torch.zeros(planes.shape, dtype=torch.int8, device=score.device)
    for i in range(m):
        for j in range(m):
            if j != i:
                rank[i] += planes[j] < planes[i] if j > i else planes[j] <= planes[i]
    return (rank >= m - n).permute(1, 2, 0).reshape(rows, columns)


def keep_nm_out(score: Tensor, n: int, m: int, budget: float) -> Tensor:
    """n:m along the outputs of each input, with a channel budget.

    score: [rows, columns], rows divisible by m; its square is the error of removing a weight.
    budget: of the columns, so many with the highest summed error stay whole, and as many with the
    lowest are dropped whole. Returns bool of the same shape.
    """
    keep = keep_nm(score.t().contiguous(), n, m).t().contiguous()
    hot = int(budget * score.shape[1])
    if hot:
        order = score.square().sum(dim=0).argsort(descending=True)
        keep[:, order[:hot]] = True
        keep[:, order[-hot:]] = False
    return keep


def tile_sums(values: Tensor, size: int) -> Tensor:
    """[tile rows, tile columns]: sums over size × size tiles of a matrix; edge tiles are ragged."""
    rows, columns = values.shape
    down, across = -(-rows // size), -(-columns // size)
    padded = torch.nn.functional.pad(values, (0, across * size - columns, 0, down * size - rows))
    return padded.reshape(down, size, across, size).sum(dim=(1, 3))


def expand_tiles(tiles: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """[rows, columns]: every weight gets the value of its tile."""
    spread = tiles.repeat_interleave(size, dim=0)[:rows]
    return spread.repeat_interleave(size, dim=1)[:, :columns]


def tile_benefit(score: Tensor, size: int) -> Tensor:
    """[tile rows, tile columns]: error per weight that keeping a tile dense avoids, against 2:4."""
    lost = score.square().masked_fill(keep_nm(score, 2, 4), 0)
    return tile_sums(lost, size) / tile_sums(torch.ones_like(lost), size)


def keep_tiles(score: Tensor, size: int, dense: int) -> Tensor:
    """2:4 along inputs, except in the `dense` tiles that gain most from being left alone.

    score: [rows, columns], columns divisible by 4; its square is the error of removing a weight.
    Returns bool of the same shape.
    """
    benefit = tile_benefit(score, size)
    whole = keep_highest(benefit.reshape(1, -1), benefit.numel() - dense).reshape(benefit.shape)
    return keep_nm(score, 2, 4) | expand_tiles(whole, size, *score.shape)


def zero_removed(weight: Tensor, keep: Tensor) -> Tensor:
    """weight with +0.0 where `keep` is False; what stays keeps every bit.

    On the bits, since a product of floats would leave -0.0 (and is ten times slower than this).
    """
    bits = weight.contiguous().view(INT_OF_SIZE[weight.element_size()])
    return (bits * keep).view(weight.dtype)


def _kth_lowest(score: Tensor, k: int) -> Tensor:
    """[rows, 1]: the k-th lowest score of each row, counted from 1."""
    if score.is_cuda:
        return score.kthvalue(k, dim=1, keepdim=True).values
    # numpy's vectorised quickselect takes a quarter of the time of torch's on a CPU, but one thread.
    values = score.float().numpy()
    selected = np.empty((values.shape[0], 1), dtype=values.dtype)

    def select(rows: slice) -> None:
        selected[rows, 0] = np.partition(values[rows], k - 1, axis=1)[:, k - 1]

    threads = max(1, min(torch.get_num_threads(), values.shape[0]))
    each = -(-values.shape[0] // threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(select, [slice(i * each, (i + 1) * each) for i in range(threads)]))
    return torch.from_numpy(selected).to(score.dtype)
