"""Files of tensors beside the weights of a checkpoint: what calibration found out.

Their hashes stand in the manifest, which is what makes them part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmsqueeze.errors import CheckpointError
from llmsqueeze.ranks import ALONE, Team
from llmsqueeze.shards import (
    ShardRecord,
    StoredTensor,
    hash_file,
    hash_header,
    load,
    read_header,
)

_FLOATS = ("F32", "F16", "BF16")


def write_side_file(
    directory: Path, name: str, tensors: Mapping[str, Tensor], team: Team = ALONE
) -> ShardRecord:
    """Write tensors into a checkpoint that is being made. team: ranks that have the same ones; the first one
    writes them."""
    path = directory / name
    found: list[Any] = []
    if team.leads:
        save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, path)
        found = [path.stat().st_size, hash_file(path), hash_header(path)]
    return ShardRecord(*team.gather(found)[0])


def open_side_file(
    directory: Path, name: str, record: ShardRecord, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """Headers of the tensors. expected: their names and shapes, -1 for any extent.

    CheckpointError when the file is missing, changed, or holds anything else.
    """
    path = directory / name
    if not path.exists():
        raise CheckpointError(f"{path}: missing; it holds what calibration found")
    if hash_header(path) != record.header_sha256:
        raise CheckpointError(f"{path}: header differs from the manifest; the file is damaged")
    stored = {tensor.name: tensor for tensor in read_header(path)}
    for key in sorted(set(expected) ^ set(stored)):
        raise CheckpointError(f"{path}: {key} does not fit the manifest")
    for key, shape in expected.items():
        if stored[key].dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: {key} is {stored[key].dtype}, not {' or '.join(_FLOATS)}"
            )
        found = stored[key].shape
        if len(found) != len(shape) or any(
            w not in (-1, f) for w, f in zip(shape, found, strict=True)
        ):
            raise CheckpointError(f"{path}: {key} has shape {found}, the manifest needs {shape}")
    return stored


def read_side_file(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; CheckpointError on NaN or Inf."""
    tensors = load(stored.values())
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{name} holds NaN or Inf; the calibration is damaged")
    return tensors
