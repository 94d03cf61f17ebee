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
