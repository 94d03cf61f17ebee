"""What is said to be held, against a count of the tensors that are really alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmsqueeze import footprint
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.compress import Pruning
from llmsqueeze.plan import choose_sites, held_out_samples
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.work import Work

Tiny = Callable[..., Path]


class Live(TorchDispatchMode):
    """Bytes of storages that operators made and that are still there, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(reference: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


RECIPES: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda"},
    "wanda, order block": {"method": "wanda", "order": "block"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt, order block": {"method": "sparsegpt", "order": "block"},
    "refit": {"method": "wanda", "refit": "pcg", "dense_share": 0.0},
    "default": {},
    "default, order block": {"order": "block"},
    "default, no down_proj": {"ignore": ["down_proj"]},
}


CASES = [("llama", name) for name in RECIPES] + [
    (family, name) for family in ("opt", "gpt_neox", "phi3") for name in ("wanda", "default")
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_pruning_holds_what_is_said(
    tiny: Tiny, text_file: Path, tmp_path: Path, family: str, name: str
) -> None:
    # Wide enough that matrices, and not what every tensor takes at least, are counted.
    wide = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1}
    if family == "opt":
        wide |= {"ffn_dim": 384, "word_embed_proj_dim": 128}
    checkpoint = Checkpoint(tiny(family, **wide))
    raw = {**RECIPES[name], "dtype": "float32",
           "calibration": {"text": str(text_file), "samples": 64, "seqlen": 40}}  # fmt: skip
    recipe = PruneRecipe.from_dict(raw)
    device = torch.device("cpu")
    pruning = Pruning(checkpoint, recipe, device, Work(tmp_path / "out", device))
    pruning.prepare()
    with Live() as live:
        for block in pruning.blocks(pruning.batch):
            del block
    followed = 2 if "product" in recipe.needs and recipe.dense_share else 1
    walk = footprint.Walk.of(64, 40, 0, torch.float32, device, followed)
    said = footprint.prune_bytes(checkpoint, recipe, walk, held_out_samples(recipe))
    assert said == pytest.approx(live.most, rel=0.2)


def test_all_of_the_first_block_may_be_ignored(tiny: Tiny) -> None:
    """Where another has linears of other names: here one block's MLP is no mixture."""
    checkpoint = Checkpoint(tiny("qwen3_moe"))
    recipe = PruneRecipe.from_dict({"ignore": ["re:experts", "re:self_attn"]})
    assert choose_sites(checkpoint, recipe) == {
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    walk = footprint.Walk.of(4, 8, 0, torch.float32, torch.device("cpu"))
    assert footprint.prune_bytes(checkpoint, recipe, walk, 0) > 0
