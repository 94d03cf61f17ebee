"""Activation sparsity as it lies in a checkpoint: a record in the manifest, tensors in a file beside.

llmsqueeze.safetensors holds for every gate G
G.scale   [in] fp32, what magnitudes are multiplied by before they are compared; 0 shuts a channel
G.curve   [CURVE_POINTS] fp32, the threshold of every share of dropped inputs, so that the sparsity can
          be changed without calibrating again
G.down    [rank, in], and for every member M of G, M.up [out, rank]: the low-rank branch, if any.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.numerics.histogram import CURVE_POINTS
from llmsqueeze.policy import Policy
from llmsqueeze.shards import SIDE_NAME, ShardRecord, StoredTensor
from llmsqueeze.side_files import open_side_file, read_side_file

KINDS = ("input", "output")
# Gaps between the share of inputs that gates drop and the one they were calibrated for, worth a warning.
MEAN_DRIFT, SITE_DRIFT = 0.01, 0.03


@dataclass(frozen=True)
class GateRecord:
    """One gate. kind, members, rows: see methods.gating.GateSpec, names in full; width: its inputs.

    sparsity: share of inputs meant to be dropped; threshold: of |x|·scale. zeros: share of
    these products that were exactly 0 on the calibration tokens. ratio: R-Sparse's α; rank: of the
    branch, 0 for none.
    """

    kind: str
    members: tuple[str, ...]
    rows: tuple[str, ...]
    width: int
    sparsity: float
    threshold: float
    zeros: float
    ratio: float = 1.0
    rank: int = 0


@dataclass(frozen=True)
class ActivationRecord:
    """method; prefill: which prompt tokens are gated, as Policy writes it; gates by the
    full name of where they stand; file: of the side tensors."""

    method: str
    prefill: str
    gates: dict[str, GateRecord]
    file: ShardRecord

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> ActivationRecord:
        """Strict inverse of asdict; ValueError, TypeError or KeyError on anything else."""
        raw = dict(raw)
        gates = {name: _gate(name, gate) for name, gate in raw.pop("gates").items()}
        file = ShardRecord(**raw.pop("file"))
        if set(raw) != {"method", "prefill"} or not all(isinstance(v, str) for v in raw.values()):
            raise ValueError("activation")
        try:
            Policy.parse(raw["prefill"])
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return cls(gates=gates, file=file, **raw)


def _gate(name: str, raw: dict[str, Any]) -> GateRecord:
    known = {f.name for f in fields(GateRecord)}
    if set(raw) != known:
        raise ValueError(f"gate {name}")
    gate = GateRecord(**{**raw, "members": tuple(raw["members"]), "rows": tuple(raw["rows"])})
    numbers = (gate.sparsity, gate.threshold, gate.zeros, gate.ratio)
    fine = (
        gate.kind in KINDS
        and all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers)
        and gate.sparsity < 1
        and isinstance(gate.width, int)
        and isinstance(gate.rank, int)
        and gate.width > 0
        and gate.rank >= 0
        and bool(gate.members)
        and all(isinstance(member, str) for member in (*gate.members, *gate.rows))
    )
    if not fine:
        raise ValueError(f"gate {name}")
    return gate


def side_tensors(directory: Path, record: ActivationRecord) -> dict[str, StoredTensor]:
    """Headers of the side file, checked against the record. CheckpointError on any mismatch."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, gate in record.gates.items():
        expected[f"{name}.scale"] = (gate.width,)
        expected[f"{name}.curve"] = (CURVE_POINTS,)
        if gate.rank:
            expected[f"{name}.down"] = (gate.rank, gate.width)
            expected |= {f"{member}.up": (-1, gate.rank) for member in gate.members}
    return open_side_file(directory, SIDE_NAME, record.file, expected)


def read_side_tensors(stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """The side tensors; CheckpointError on values that cannot be."""
    tensors = read_side_file(stored)
    for name, tensor in tensors.items():
        if name.endswith((".scale", ".curve")) and bool((tensor < 0).any()):
            raise CheckpointError(f"{name} holds negative values; the thresholds are damaged")
    return tensors


def thresholds(threshold: float, scale: Tensor) -> Tensor:
    """[in] fp32: τ_j = threshold / scale_j, inf where the scale is 0."""
    return torch.where(scale > 0, threshold / scale, torch.inf).float()


def to_raw(record: ActivationRecord) -> dict[str, Any]:
    """Plain JSON types."""
    return asdict(record)


def drifts(measured: dict[str, Any]) -> list[str]:
    """What is worth a warning where gates dropped another share of a text than they were calibrated for.

    measured: the section `activation` of what eval reports.
    """
    gaps = {
        name: gate["measured"] - gate["target"]
        for name, gate in measured["gates"].items()
        if gate["measured"] is not None
    }
    if not gaps:
        return []
    mean = sum(gaps.values()) / len(gaps)
    far = {name: gap for name, gap in gaps.items() if abs(gap) > SITE_DRIFT}
    messages = []
    if abs(mean) > MEAN_DRIFT:
        messages.append(
            f"on this text the gates drop {mean:+.1%} against their calibration on average; "
            "calibrate on text like it (sparsify --calib)"
        )
    if far:
        worst = max(far, key=lambda name: abs(far[name]))
        messages.append(
            f"{len(far)} of {len(gaps)} gates are off by more than {SITE_DRIFT:.0%}, most "
            f"{worst}: {far[worst]:+.1%}"
        )
    return messages
