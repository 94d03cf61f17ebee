"""What tasks gave on the dense model, kept: it is the same every time.

A file's name is a hash of all that the result depends on: the checkpoint's files, the tasks' requests and
scoring, how both were run, and the versions of what computed it. Only whole suites are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmsqueeze import __version__, untrusted
from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.shards import hash_file

# Raised whenever entries change, so that a result of older code is not taken.
TASK_RESULTS = 2
_PACKAGES = ("lm_eval", "torch", "transformers")
# Files of a checkpoint that a result may depend on.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt")


def checkpoint_sha256(directory: Path) -> str:
    """Of weights, config, tokenizer and side files, by content and name."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.suffix in _SUFFIXES:
            digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Before anything is measured: EnvironmentFault when the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write the cache {folder} ({error.strerror}); set --cache-dir"
        ) from error


def _sha256(tasks: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TaskCache:
    """What one checkpoint gave, run one way. key: plain JSON types that say which and how; note: told when
    nothing had to be measured."""

    folder: Path
    key: dict[str, Any]
    note: Callable[[str], None] = lambda message: None

    @classmethod
    def of(
        cls, folder: Path, checkpoint: Path, way: dict[str, Any], note: Callable[[str], None]
    ) -> TaskCache:
        """folder: of make_folder; way: all settings that are not part of the requests.

        Reads every file of the checkpoint.
        """
        return cls(folder, {"checkpoint": checkpoint_sha256(checkpoint), **way}, note)

    def get(
        self, name: str, requests: dict[str, str], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What measure() returns, or did for the same requests, by their hashes."""
        versions = {package: version(package) for package in _PACKAGES}
        versions |= {"llmsqueeze": __version__, "format": str(TASK_RESULTS)}
        key = {**self.key, "requests": requests, "versions": versions}
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        # What cannot be read as it was written is damaged: measure again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = untrusted.read_json(path, untrusted.LARGE)
            if known["key"] == key and known["sha256"] == _sha256(known["tasks"]):
                self.note(f"{name}: the dense model's scores are known (kept in {self.folder})")
                return dict(known["tasks"])
        found = measure()
        descriptor, work = tempfile.mkstemp(prefix="partial-", dir=self.folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"key": key, "tasks": found, "sha256": _sha256(found)}, file)
            Path(work).replace(path)
        except OSError as error:
            # What took long to measure is worth more than being kept.
            self.note(f"warning: {name}: scores are not kept in {self.folder} ({error.strerror})")
            Path(work).unlink(missing_ok=True)
        return found
