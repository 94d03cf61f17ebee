"""The table of methods: adding one is its file, its line here, and its test.

Method modules import torch only inside their functions, so that the command line can read every
``Config`` (names, defaults, help) without paying for torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.base import WeightMethod


@dataclass(frozen=True)
class Entry:
    module: str
    summary: str


WEIGHT_METHODS: dict[str, Entry] = {
    "magnitude": Entry("llmsqueeze.methods.magnitude", "smallest |W| of the matrix; needs no data"),
    "wanda": Entry("llmsqueeze.methods.wanda", "smallest |W|·‖x‖ of each output row"),
    "sparsegpt": Entry("llmsqueeze.methods.sparsegpt", "second-order, with weight update"),
}


def weight_method(name: str) -> WeightMethod:
    """The module of one weight pruning method; RecipeError names the choices when there is none."""
    if name not in WEIGHT_METHODS:
        raise RecipeError(f"unknown method {name!r}; choose from {', '.join(WEIGHT_METHODS)}")
    return cast(WeightMethod, importlib.import_module(WEIGHT_METHODS[name].module))
