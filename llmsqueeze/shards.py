"""A directory of safetensors shards: read with suspicion, written one tensor at a time.

Headers are validated by the safetensors library (sizes, offsets, coverage of the file); what it
cannot know is checked here: that the index and the shards agree and that nothing points elsewhere. A
shard may be a link to anywhere, as in the hub's cache: all that is taken from it is tensors of the names and
shapes that are expected.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmsqueeze import untrusted
from llmsqueeze.errors import CheckpointError, ResourceError
from llmsqueeze.ranks import ALONE, Team

# Tensors beside the weights, which are no shard of the model: of activation gates, of the KV cache.
SIDE_NAME = "llmsqueeze.safetensors"
KV_NAME = "llmsqueeze-kv.safetensors"

# Of the only shard. transformers looks for it before it looks for an index.
STANDARD_NAME = "model.safetensors"

# Shards close at this size: it bounds the memory that finished but unwritten tensors take.
SHARD_BYTES = 512 * 2**20

# The library would take 100 MB, and several times that of memory. Tens of thousands of tensors need less.
MOST_HEADER = 32 * 2**20

# What the system says when nothing more can be written: disk full, quota, file size limit.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}


@dataclass(frozen=True)
class Within:
    """Rows begin to end of matrix `index` of the 3-D tensor `name`."""

    name: str
    index: int
    begin: int
    end: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. dtype is safetensors' own name for it, such as "BF16".

    within: what it is a part of, if it is one; its name and shape are then its own.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    within: Within | None = None

    def part(self, index: int, begin: int, end: int) -> StoredTensor:
        """Rows begin to end of one matrix of this 3-D tensor."""
        within = Within(self.name, index, begin, end)
        name = f"{self.name}[{index}, {begin}:{end}]"
        return StoredTensor(self.file, name, self.dtype, (end - begin, self.shape[2]), within)


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard. header_sha256 is cheap enough to check at every load."""

    bytes: int
    sha256: str
    header_sha256: str


def list_shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the only one there is."""
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        names = ", ".join(path.name for path in indexes)
        raise CheckpointError(f"{directory}: several weight indexes ({names}); keep one")
    if indexes:
        listed = sorted(set(_weight_map(indexes[0]).values()))
        if STANDARD_NAME not in listed and (directory / STANDARD_NAME).exists():
            raise CheckpointError(
                f"{directory}: {indexes[0].name} does not list {STANDARD_NAME}, which transformers would "
                "read instead of what it lists; keep one of the two"
            )
        return [directory / name for name in listed]
    files = sorted(
        file for file in directory.glob("*.safetensors") if file.name not in (SIDE_NAME, KV_NAME)
    )
    if not files:
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
            raise CheckpointError(
                f"{directory}: only pickle weights (.bin); loading them runs code from the file. "
                "Convert them with transformers' save_pretrained, which writes safetensors"
            )
        raise CheckpointError(f"{directory}: no safetensors weights found")
    if len(files) > 1:
        raise CheckpointError(
            f"{directory}: {len(files)} safetensors files and no *.safetensors.index.json that "
            "says which belong to the model"
        )
    return files


def entry_name(directory: Path) -> str:
    """The file that transformers is to begin with: the index, or the only shard."""
    shards = list_shards(directory)
    for index in directory.glob("*.safetensors.index.json"):
        if not isinstance(_index(index).get("metadata"), dict):
            raise CheckpointError(
                f"{index}: has no metadata, which transformers does not load without"
            )
        return index.name
    return shards[0].name


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, after checking shards against each other and the index."""
    tensors: dict[str, StoredTensor] = {}
    for file in list_shards(directory):
        for tensor in read_header(file):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise CheckpointError(f"{tensor.name} is in both {other} and {file.name}")
            tensors[tensor.name] = tensor
    for index in directory.glob("*.safetensors.index.json"):
        for name, file_name in _weight_map(index).items():
            found = tensors.get(name)
            if found is None or found.file.name != file_name:
                raise CheckpointError(f"{index.name} places {name} in {file_name}; it is not there")
        extra = sorted(set(tensors) - set(_weight_map(index)))
        if extra:
            raise CheckpointError(f"{index.name} does not list {extra[0]}, which the shards hold")
    return tensors


def load(tensors: Iterable[StoredTensor]) -> dict[str, Tensor]:
    """Read tensors by name to the CPU; each shard is opened once and closed again."""
    loaded: dict[str, Tensor] = {}
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for file, wanted in by_file.items():
        with _open(file) as handle:
            for tensor in wanted:
                try:
                    value = _value(handle, tensor)
                except SafetensorError as error:
                    raise CheckpointError(f"{file}: {tensor.name}: {error}") from error
                if value.dtype != DTYPES.get(tensor.dtype) or tuple(value.shape) != tensor.shape:
                    raise CheckpointError(f"{file}: {tensor.name} changed while it was being read")
                loaded[tensor.name] = value
    return loaded


def _value(handle: Any, tensor: StoredTensor) -> Tensor:
    where = tensor.within
    value: Tensor = (
        handle.get_tensor(tensor.name)
        if where is None
        else handle.get_slice(where.name)[where.index, where.begin : where.end]
    )
    return value


def hash_file(file: Path) -> str:
    """sha256 of the whole file, hex."""
    # One buffer again and again: fresh ones would be cleared by the system first, all 8 GB of a large file.
    chunk = memoryview(bytearray(2**20))
    with _readable(file) as stream:
        digest = hashlib.sha256()
        while size := stream.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


def hash_header(file: Path) -> str:
    """sha256 of a safetensors file's length word and JSON header, hex."""
    with _readable(file) as stream:
        size = _header_size(file, stream)
        stream.seek(0)
        return hashlib.sha256(stream.read(8 + size)).hexdigest()


class ShardWriter:
    """Writes tensors into a directory as a standard sharded checkpoint.

    Tensors are buffered until SHARD_BYTES and written in the order they were added, and hashed beside;
    finish() gives the shards their final names and writes the index. After a failure, close() ends the
    hashing.

    team: ranks that add the same tensors. They write the shards in turns, and hold of the others' no data.
    """

    def __init__(self, directory: Path, team: Team = ALONE) -> None:
        self._directory, self._team = directory, team
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._parts: list[list[str]] = []
        self._names: set[str] = set()
        self._synced = 0  # parts that the disk is known to have
        self._hashing = ThreadPoolExecutor(max_workers=1)
        self._hashes: dict[int, Future[str]] = {}
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor, make: Callable[[], Tensor] | None = None) -> None:
        """Queue one tensor; a copy on the CPU is what will be written.

        make: gives the tensor where it is to be written, if `tensor` only shows its shape and dtype.
        """
        if name in self._names:
            raise ValueError(f"{name} was added twice")
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > SHARD_BYTES:
            self._flush()
        if self._owns(len(self._parts) + 1):
            self._pending[name] = (make() if make else tensor).detach().cpu().contiguous()
        else:
            self._pending[name] = torch.empty_like(tensor, device="meta")
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> dict[str, ShardRecord]:
        """Write what is left and the index; returns what the manifest needs of each shard."""
        self._flush()
        count = len(self._parts)
        finals = [
            f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
        ]
        if count == 1:
            finals = [STANDARD_NAME]
        # Before any is renamed: they are hashed under the names that they have now.
        hashes = {number: hashed.result() for number, hashed in self._hashes.items()}
        self.close()
        own: dict[str, Any] = {}
        for number, final in enumerate(finals, start=1):
            if self._owns(number):
                path = self._part(number).rename(self._directory / final)
                own[final] = [path.stat().st_size, hashes[number], hash_header(path)]
        found = {name: raw for each in self._team.gather(own) for name, raw in each.items()}
        if count > 1 and self._team.leads:
            named = zip(finals, self._parts, strict=True)
            weight_map = {name: final for final, names in named for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._directory / "model.safetensors.index.json").write_text(text)
        return {final: ShardRecord(*found[final]) for final in finals}

    def close(self) -> None:
        """Hash no more."""
        self._hashing.shutdown(cancel_futures=True)

    def snapshot(self) -> dict[str, Any]:
        """What restore() goes on from. "pending": tensors that no file has yet; others are on the disk. On
        all but one rank they have no data."""
        for number in range(self._synced + 1, len(self._parts) + 1):
            if self._owns(number):
                with self._part(number).open("rb") as stream:
                    os.fsync(stream.fileno())
        self._synced = len(self._parts)
        return {
            "parts": [list(names) for names in self._parts],
            "total_bytes": self.total_bytes,
            "pending": dict(self._pending),
        }

    def restore(self, found: dict[str, Any] | None) -> None:
        """Go back to a snapshot, None for the beginning; the directory then has its files and no others.

        CheckpointError when a file is not there any more.
        """
        self._parts = [list(names) for names in found["parts"]] if found else []
        self._pending = dict(found["pending"]) if found else {}
        self._pending_bytes = sum(t.numel() * t.element_size() for t in self._pending.values())
        if not self._owns(len(self._parts) + 1):
            for name, tensor in self._pending.items():
                self._pending[name] = torch.empty_like(tensor, device="meta")
        self._names = {name for names in self._parts for name in names} | set(self._pending)
        self.total_bytes = found["total_bytes"] if found else 0
        self._synced = len(self._parts)
        self._team.lead(self._tidy)
        for number in [n for n in self._hashes if n > self._synced]:
            self._hashes.pop(number).cancel()
        for number in range(1, len(self._parts) + 1):
            if number not in self._hashes:  # the others stay what they are
                self._hash(number)

    def _tidy(self) -> None:
        """Leave the parts that are known in the directory, and nothing else."""
        for number in range(1, len(self._parts) + 1):
            part = self._part(number)
            # A run that was killed while it published may have given the parts their final names.
            final = [*self._directory.glob(f"model-{number:05d}-of-*.safetensors"),
                     *self._directory.glob("model.safetensors")]  # fmt: skip
            if not part.exists() and final:
                final[0].rename(part)
            if not part.exists():
                raise CheckpointError(f"{part}: missing; pass --resume never to start anew")
        kept = {self._part(number).name for number in range(1, len(self._parts) + 1)}
        for path in self._directory.iterdir():
            if path.name not in kept:
                path.unlink()

    def _owns(self, number: int) -> bool:
        """Whether this rank writes the part; the first one the first, which every model has."""
        return (number - 1) % self._team.size == self._team.rank

    def _hash(self, number: int) -> None:
        if self._owns(number):
            self._hashes[number] = self._hashing.submit(hash_file, self._part(number))

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        if not self._pending:
            return
        self._parts.append(list(self._pending))
        number = len(self._parts)
        try:
            if self._owns(number):
                save_file(self._pending, self._part(number), metadata={"format": "pt"})
        except SafetensorError as error:  # wraps the system's error, number in the text
            if not any(f"(os error {number})" in str(error) for number in NO_ROOM):
                raise
            raise ResourceError(
                f"no space left to write {self._directory.parent} ({error}); nothing was published"
            ) from error
        self._hash(number)
        self._pending = {}
        self._pending_bytes = 0


def _open(file: Path) -> safe_open:
    with _readable(file) as stream:
        _header_size(file, stream)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a valid safetensors file ({error})") from error


def _readable(file: Path) -> BufferedReader:
    try:
        untrusted.check_file(file)
        return file.open("rb")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; the download or copy is incomplete") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} {untrusted.reason(error)}") from error


def _header_size(file: Path, stream: BinaryIO) -> int:
    """Bytes of a safetensors file's JSON header, from its length word."""
    prefix = stream.read(8)
    size = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or size > file.stat().st_size - 8:
        raise CheckpointError(f"{file}: not a safetensors file, or cut short")
    if size > MOST_HEADER:
        raise CheckpointError(
            f"{file}: its header has {size:,} bytes, of which at most {MOST_HEADER:,} are read"
        )
    return size


def read_header(file: Path) -> Iterator[StoredTensor]:
    with _open(file) as handle:
        for name in handle.keys():  # noqa: SIM118  a safe_open is no mapping
            part = handle.get_slice(name)
            yield StoredTensor(file, name, str(part.get_dtype()), tuple(part.get_shape()))


def _index(index: Path) -> dict[str, Any]:
    try:
        document = untrusted.read_json(index, untrusted.LARGE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} {untrusted.reason(error)}") from error
    return document if isinstance(document, dict) else {}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _index(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty or not a mapping")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain(file_name):
            raise CheckpointError(f"{index}: {name} points outside the directory ({file_name!r})")
        if not file_name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name} is in {file_name!r}, not in safetensors")
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether it names a file in the directory, and one that a file system can have."""
    return Path(name).name == name and name.isprintable() and len(name.encode()) <= 255
