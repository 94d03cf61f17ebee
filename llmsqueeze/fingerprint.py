"""Which files a result was made of: hashed beside the work, and watched until the result is published."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from functools import cached_property
from pathlib import Path

from llmsqueeze.errors import CheckpointError, SourceChanged
from llmsqueeze.shards import hash_file


class Fingerprint:
    """Of files that must stay as they are from now on. hashing: where they are hashed."""

    def __init__(self, files: Iterable[Path], hashing: Executor) -> None:
        self._seen = {file: _seen(file) for file in files}
        self._hashes = {file.name: hashing.submit(hash_file, file) for file in self._seen}

    @cached_property
    def sha256(self) -> dict[str, str]:
        """By name, hex; waits until the files are hashed. CheckpointError if one is gone by then."""
        try:
            return {name: hashed.result() for name, hashed in self._hashes.items()}
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error

    def check(self) -> None:
        """SourceChanged if any file is not the one it was: what was read of it may be of both."""
        for file, seen in self._seen.items():
            try:
                changed = _seen(file) != seen
            except CheckpointError:
                changed = True
            if changed:
                raise SourceChanged(
                    f"{file} was changed while it was being read; nothing was published: start again when it "
                    "stays as it is"
                )


def _seen(file: Path) -> tuple[int, int]:
    """Size and time of the last change; CheckpointError if it is not there."""
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns
