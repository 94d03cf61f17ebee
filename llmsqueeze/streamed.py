"""A checkpoint that is being pruned while it is read: the next step calibrates on blocks as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor

import torch
from torch import Tensor

from llmsqueeze.checkpoint import ChangingCheckpoint
from llmsqueeze.compress import BlockDone, Pruning, Share
from llmsqueeze.shards import hash_file


class StreamedCheckpoint(ChangingCheckpoint):
    """What `pruning` makes of its checkpoint, without a file of it.

    Blocks can be read in their order, each once; what lies outside them, at any time. hashing: hashes the
    source's files beside. on_block: told of every block that was pruned.
    """

    def __init__(
        self,
        pruning: Pruning,
        source_name: str,
        hashing: Executor,
        on_block: Callable[[BlockDone], None],
    ) -> None:
        self.__dict__.update(pruning.checkpoint.__dict__)
        self._pruning, self._source_name, self._on_block = pruning, source_name, on_block
        self._hashes = {f.name: hashing.submit(hash_file, f) for f in pruning.checkpoint.identity}
        self._blocks = pruning.blocks()
        self._reports: dict[str, dict[str, float]] = {}
        self._share = Share()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        if not any(name.startswith(self.blocks_path + ".") for name in wanted):
            return super().read(wanted)
        with torch.enable_grad():  # masks may be trained, whatever the reader does
            block = next(self._blocks)
        if set(wanted) != set(block.tensors):
            raise RuntimeError(f"block {block.index} was pruned, {wanted[0]} was asked for")
        self._reports |= block.reports
        for site in block.reports:
            weight = block.tensors[f"{site}.weight"]
            zeros = weight.numel() - int(torch.count_nonzero(weight))
            self._share += Share(zeros, weight.numel())
        self._on_block(BlockDone(block.index, self.block_count, block.seconds))
        return block.tensors

    @property
    def site_reports(self) -> dict[str, dict[str, float]]:
        return self._reports

    @property
    def steps(self) -> list[dict[str, object]]:
        """Those before, and this one; once every block was read."""
        sha256 = {name: hashed.result() for name, hashed in self._hashes.items()}
        step = self._pruning.step(self._source_name, sha256, self._share.sparsity)
        return [*super().steps, step]
