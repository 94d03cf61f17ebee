"""A checkpoint that is being pruned while it is read: the next step calibrates on blocks as they come."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.blocks import Boundary
from llmsqueeze.checkpoint import ChangingCheckpoint
from llmsqueeze.compress import BlockDone, PrunedBlock, Pruning, Share
from llmsqueeze.fingerprint import Fingerprint


class StreamedCheckpoint(ChangingCheckpoint):
    """What `pruning` makes of its checkpoint, without a file of it.

    Blocks can be read in their order, each once, after rewind(); what lies outside them, at any time.
    hashing: hashes the source's files beside. on_block: told of every block that was pruned.
    """

    # What rewind() sets.
    _blocks: Iterator[PrunedBlock]
    _last: dict[str, Tensor]
    _after: Boundary
    _reports: dict[str, dict[str, float]]
    _share: Share

    def __init__(
        self,
        pruning: Pruning,
        source_name: str,
        hashing: Executor,
        on_block: Callable[[BlockDone], None],
    ) -> None:
        self.__dict__.update(pruning.checkpoint.__dict__)
        self._pruning, self._source_name, self._on_block = pruning, source_name, on_block
        self._source = Fingerprint(pruning.checkpoint.identity, hashing)
        self._reading = (
            threading.Lock()
        )  # the next block may be read while the state of this one is taken

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        if not any(name.startswith(self.blocks_path + ".") for name in wanted):
            return super().read(wanted)
        with self._reading:
            if set(wanted) == set(self._last):  # it had been read when the run was cut off
                return dict(self._last)
            with torch.enable_grad():  # masks may be trained, whatever the reader does
                block = next(self._blocks)
            if set(wanted) != set(block.tensors):
                raise RuntimeError(f"block {block.index} was pruned, {wanted[0]} was asked for")
            self._last, self._after = block.tensors, block.after
            self._reports |= block.reports
            for site in block.reports:
                weight = block.tensors[f"{site}.weight"]
                zeros = weight.numel() - int(torch.count_nonzero(weight))
                self._share += Share(zeros, weight.numel())
            self._on_block(BlockDone(block.index, self.block_count, block.seconds))
            return dict(block.tensors)

    @property
    def changes(self) -> dict[str, Any]:
        return {"prune": self._pruning.identity()}

    def progress(self) -> dict[str, Any]:
        with self._reading:
            return {
                "done": self._after.done,
                "activations": [tensor.cpu() for tensor in self._after.activations],
                "last": self._last,
                "reports": dict(self._reports),
                "share": dataclasses.asdict(self._share),
            }

    def rewind(self, found: dict[str, Any], batch: int) -> None:
        self._after = Boundary(found.get("done", 0), tuple(found.get("activations", ())))
        self._last = dict(found.get("last", {}))
        self._reports = dict(found.get("reports", {}))
        self._share = Share(**found.get("share", {}))
        self._blocks = self._pruning.blocks(min(batch, self._pruning.batch), self._after)

    @property
    def site_reports(self) -> dict[str, dict[str, float]]:
        return self._reports

    @property
    def steps(self) -> list[dict[str, object]]:
        """Those before, and this one; once every block was read."""
        sha256 = self._source.sha256
        step = self._pruning.step(self._source_name, sha256, self._share.sparsity)
        return [*super().steps, step]
