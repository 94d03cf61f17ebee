"""Where activations wait between two blocks: on the compute device, or where there is more room.

They are the only memory of a walk that grows with the number of samples, but for what `--order group` holds
inside a block. Parked ones come to the device a batch at a time.
"""

from __future__ import annotations

import copy
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze.errors import ResourceError
from llmsqueeze.shards import NO_ROOM


class Parked:
    """Numbers of `shape` that lie in a file without a name, or in memory of the host; indexed by samples,
    they come to `device` as copies. The file is gone with the process, however that ends.

    ResourceError where there is no room for the file.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path | None
    ) -> None:
        self.shape, self.dtype, self.device, self._folder = torch.Size(shape), dtype, device, folder
        self._file: int | None = None
        if folder is None:
            # Not pinned: of that a system may have little, and torch takes powers of two.
            self._held = torch.empty(shape, dtype=dtype)
        else:
            self._keep(_unnamed(folder, self.nbytes))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """A copy on the compute device."""
        if self._file is None:
            held = self._held[rows]
            return held.clone() if self.device.type == "cpu" else held.to(self.device)
        begin, end, _ = rows.indices(len(self))
        found = torch.empty((max(end - begin, 0), *self.shape[1:]), dtype=self.dtype)
        _read(self._file, found, begin * self._row)
        return found.to(self.device)

    def __setitem__(self, rows: slice | int, x: Tensor) -> None:
        if isinstance(rows, int):
            rows, x = slice(rows, rows + 1), x.unsqueeze(0)
        if self._file is None:
            self._held[rows] = x.to("cpu", self.dtype)
        else:
            _write(
                self._file,
                x.to("cpu", self.dtype).contiguous(),
                rows.indices(len(self))[0] * self._row,
            )

    def clone(self) -> Parked:
        twin = copy.copy(self)
        if self._file is None:
            twin._held = self._held.clone()
        else:
            twin._keep(self._copied())
        return twin

    def cpu(self) -> Tensor:
        """All of it as it is now, whatever is put here later; of a file mapped."""
        if self._file is None:
            return self._held.clone()
        file = self._copied()
        try:
            mapped = mmap.mmap(file, self.nbytes, access=mmap.ACCESS_COPY)
        finally:
            os.close(file)
        return torch.frombuffer(mapped, dtype=self.dtype).view(self.shape)

    def _keep(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)

    @property
    def _row(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    def _copied(self) -> int:
        assert self._file is not None and self._folder is not None
        file = _unnamed(self._folder, self.nbytes)
        try:
            for row in range(len(self)):
                part = torch.empty(self.shape[1:], dtype=self.dtype)
                _read(self._file, part, row * self._row)
                _write(file, part, row * self._row)
        except BaseException:
            os.close(file)
            raise
        return file


@dataclass(frozen=True)
class Parking:
    """place: "device", "host" or "disk"; folder: of files, for the last."""

    place: str = "device"
    folder: Path | None = None

    def elsewhere(self, device: torch.device) -> bool:
        """Than in the memory of the device that computes."""
        return self.place == "disk" or (self.place == "host" and device.type != "cpu")

    def new(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor | Parked:
        if not self.elsewhere(device):
            return torch.empty(shape, dtype=dtype, device=device)
        return Parked(shape, dtype, device, self.folder if self.place == "disk" else None)


ON_DEVICE = Parking()


def _unnamed(folder: Path, size: int) -> int:
    try:
        file, name = tempfile.mkstemp(dir=folder)
    except OSError as error:
        raise _refused(error, f" in {folder}") from error
    try:
        os.unlink(name)
        if hasattr(os, "posix_fallocate"):  # there is room for all of it, or it is known now
            os.posix_fallocate(file, 0, max(size, 1))
    except OSError as error:
        os.close(file)
        raise _refused(error, f" in {folder}") from error
    return file


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.view(-1).view(torch.uint8).numpy())


def _read(file: int, into: Tensor, at: int) -> None:
    left = _bytes(into)
    while left:
        count = os.preadv(file, [left], at)
        if not count:
            raise ResourceError("activations on disk: the file ends early")
        left, at = left[count:], at + count


def _write(file: int, x: Tensor, at: int) -> None:
    left = _bytes(x)
    while left:
        try:
            count = os.pwrite(file, left, at)
        except OSError as error:
            raise _refused(error) from error
        left, at = left[count:], at + count


def _refused(error: OSError, where: str = "") -> Exception:
    if error.errno not in NO_ROOM:
        return error
    return ResourceError(
        f"no space left for activations{where} ({error.strerror}); make room, or use fewer --samples"
    )
