"""The tables of methods: adding one is its file, its line here, and its test.

Method modules import torch only inside their functions, so that the command line can read every
``Config`` (names, defaults, help) without paying for torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.base import AllocationMethod, RefitMethod, WeightMethod
from llmsqueeze.methods.gating import ActivationMethod


@dataclass(frozen=True)
class Entry:
    """module: dotted path; empty when the choice is to do nothing."""

    module: str
    summary: str


WEIGHT_METHODS: dict[str, Entry] = {
    "magnitude": Entry("llmsqueeze.methods.magnitude", "smallest |W| of the matrix; needs no data"),
    "wanda": Entry("llmsqueeze.methods.wanda", "smallest |W|·‖x‖ of each output row"),
    "sparsegpt": Entry("llmsqueeze.methods.sparsegpt", "second-order, with weight update"),
    "dsnot": Entry("llmsqueeze.methods.dsnot", "another method's mask, edited by swaps"),
    "admm": Entry("llmsqueeze.methods.admm", "mask and weights together, by gradual masking"),
}

REFITS: dict[str, Entry] = {
    "none": Entry("", "weights stay as the method left them"),
    "pcg": Entry("llmsqueeze.methods.refit", "least squares on what stays, by conjugate gradient"),
}

ALLOCATIONS: dict[str, Entry] = {
    "uniform": Entry("", "the same sparsity everywhere"),
    "owl": Entry("llmsqueeze.methods.owl", "less from blocks with more outlying scores"),
    "alpha": Entry(
        "llmsqueeze.methods.alpha", "less from blocks with heavier-tailed spectra; no data"
    ),
    "benefit": Entry("llmsqueeze.methods.tile_benefit", "dense tiles where 2:4 would cost most"),
}

# How --pattern tile decides which tiles stay dense.
TILE_MODES: dict[str, Entry] = {
    "score": Entry("", "by the error that 2:4 would cost; no training"),
    "tile": Entry(
        "llmsqueeze.methods.patch", "learns which tiles stay dense, over a fixed 2:4 mask"
    ),
    "joint": Entry(
        "llmsqueeze.methods.patch", "learns tiles and 2:4 patterns; MaskLLM at sparsity 0.5"
    ),
}

ACTIVATION_METHODS: dict[str, Entry] = {
    "teal": Entry("llmsqueeze.methods.teal", "smallest |x| of every linear's input"),
    "wina": Entry("llmsqueeze.methods.wina", "smallest |x|·‖W‖ by column"),
    "chess": Entry(
        "llmsqueeze.methods.chess", "by channel after the MLP's activation; inputs of q and o"
    ),
    "rsparse": Entry(
        "llmsqueeze.methods.rsparse", "as wina, what is dropped goes through low-rank weights"
    ),
}

KV_METHODS: dict[str, Entry] = {
    "kvquant": Entry(
        "llmsqueeze.methods.kvquant", "calibrated codebooks, keys before the rotary embedding"
    ),
    "rotate": Entry("", "Hadamard and the best codes of a normal distribution; no calibration"),
    "fp8": Entry("", "e4m3 with a scale for every token and head; no calibration"),
}

# The bits that each of them comes in, and the one that is calibrated.
KV_BITS: dict[str, tuple[int, ...]] = {"kvquant": (2, 3, 4), "rotate": (2, 3, 4), "fp8": (8,)}
CALIBRATED_KV = "kvquant"

# What `prune` does when no method is named: the best of these tables in README, for every pattern.
DEFAULT_METHOD = "admm"
DEFAULT_REFIT = "pcg"
DEFAULT_TILE_ALLOCATION = "benefit"


def weight_method(name: str) -> WeightMethod:
    """The module of one weight pruning method; RecipeError names the choices when there is none."""
    return cast(WeightMethod, load_entry(WEIGHT_METHODS, name))


def refit_method(name: str) -> RefitMethod | None:
    """The module of one refit; None for "none"."""
    return cast("RefitMethod | None", load_entry(REFITS, name))


def allocation_method(name: str) -> AllocationMethod | None:
    """The module of one allocation; None for "uniform"."""
    return cast("AllocationMethod | None", load_entry(ALLOCATIONS, name))


def activation_method(name: str) -> ActivationMethod:
    """The module of one activation sparsity method."""
    return cast(ActivationMethod, load_entry(ACTIVATION_METHODS, name))


def load_entry(table: dict[str, Entry], name: str) -> Any:
    """The module behind one line of a table; None where there is nothing to do."""
    if name not in table:
        raise RecipeError(f"unknown method {name!r}; choose from {', '.join(table)}")
    return importlib.import_module(table[name].module) if table[name].module else None
