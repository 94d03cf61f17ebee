"""A checkpoint whose linears are rounded while it is read: what comes after works on the rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import card
from llmsqueeze.artifact import ArtifactWriter, Manifest, check_output
from llmsqueeze.checkpoint import ChangingCheckpoint, Checkpoint
from llmsqueeze.compress import (
    BlockDone,
    check_not_inside,
    copy_weights,
    note_losses,
)
from llmsqueeze.computing import versions
from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.numerics import int8
from llmsqueeze.shards import hash_file
from llmsqueeze.work import Work


class EncodedCheckpoint(ChangingCheckpoint):
    """`inner`, with its linears as `recipe` leaves them. Files on disk stay what they are."""

    def __init__(self, inner: Checkpoint, source_name: str, recipe: EncodeRecipe) -> None:
        self.__dict__.update(inner.__dict__)
        self._inner, self._source_name, self._recipe = inner, source_name, recipe
        self._weights = {
            f"{name}.weight" for index in range(inner.block_count) for name in inner.linears(index)
        }
        self._reports: dict[str, dict[str, float]] = {}

    @property
    def changes(self) -> dict[str, Any]:
        return {**self._inner.changes, "encode": self._recipe.to_dict()}

    def progress(self) -> dict[str, Any]:
        return {"inner": self._inner.progress(), "rounded": dict(self._reports)}

    def rewind(self, found: dict[str, Any], batch: int) -> None:
        self._inner.rewind(found.get("inner", {}), batch)
        self._reports = dict(found.get("rounded", {}))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = self._inner.read(names)
        known = self._inner.site_reports
        for name, weight in list(tensors.items()):
            if name not in self._weights:
                continue
            tensors[name] = rounded = int8.round_weight(weight)
            error = float(
                (rounded - weight).float().norm() / weight.float().norm().clamp_min(1e-30)
            )
            site = name.removesuffix(".weight")
            self._reports[site] = {**known.get(site, {}), "rounding_error": error}
        return tensors

    @property
    def site_reports(self) -> dict[str, dict[str, float]]:
        """Of the sites read so far."""
        return self._reports

    @property
    def rounding_error(self) -> float:
        """The mean of ‖rounded - weight‖ / ‖weight‖ over the linears read so far."""
        errors = [report["rounding_error"] for report in self._reports.values()]
        return sum(errors) / max(len(errors), 1)

    @cached_property
    def steps(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those before, and this one; once every block was read."""
        step = {
            "command": "encode",
            "recipe": self._recipe.to_dict(),
            "source": {
                "name": self._source_name,
                "sha256": {file.name: hash_file(file) for file in self.identity},
            },
            "versions": versions(),
            "rounding_error": self.rounding_error,
        }
        return [*self._inner.steps, step]


@torch.no_grad()
def encode(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    recipe: EncodeRecipe,
    *,
    overwrite: bool = False,
    work: Work | None = None,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
) -> Manifest:
    """Write a checkpoint with rounded linears to `out`. Raises RecipeError if `out` cannot be written."""
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    note_losses(checkpoint, note)
    encoded = EncodedCheckpoint(checkpoint, source_name, recipe)
    with (
        work or Work(out, torch.device("cpu")) as work,
        ArtifactWriter(out, overwrite=overwrite, directory=work.fresh()) as writer,
    ):
        copy_weights(writer, encoded, on_block)
        error = encoded.rounding_error
        writer.write_text("README.md", card.encoded_card(checkpoint, source_name, recipe.to, error))
        return writer.publish(
            checkpoint.config, checkpoint.path, encoded.steps, checkpoint.stored_bytes
        )
