"""What a run goes on from, in a file that is replaced whole: after a kill it is the old or the new one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from llmsqueeze.errors import CheckpointError, ResourceError
from llmsqueeze.shards import NO_ROOM


def write_state(path: Path, state: Any) -> None:
    """Write beside the old file, wait for the disk, then put it in its place.

    state: tensors, numbers, text and None, in dictionaries, lists and tuples. ResourceError where there is no
    room; the old file is then as it was, as it is when a signal ends this.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        # torch ends its archive after a failed write, and fails again: what stopped that is behind it.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise cause from None  # a signal
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise ResourceError(
                f"no space left for {path} ({cause.strerror}); make room and run the same command again"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def read_state(path: Path) -> Any:
    """What was written. Tensors are on the CPU and mapped: pages come when they are used.

    CheckpointError when the file is anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a state to go on from, or damaged ({type(error).__name__}); delete it to start "
            "again"
        ) from error


def sync_file(path: Path) -> None:
    """Wait until the disk has what was written to a file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
