"""The llmsqueeze checkpoint: how a compressed model lies on disk.

A Hugging Face directory whose sites are stored in the smallest of the encodings that give them back, plus
`llmsqueeze.json`, the manifest. Trust runs along a chain: config.json carries the manifest's sha256, the
manifest those of every shard and shard header. Headers are checked at every load, contents by
`inspect --verify`.

Writing happens in a directory beside OUT that is renamed last, so OUT is complete or absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from llmsqueeze import __version__, untrusted
from llmsqueeze.activation import ActivationRecord, GateRecord, side_tensors
from llmsqueeze.encodings import ENCODINGS, nonzeros, smallest_layout
from llmsqueeze.errors import CheckpointError, RecipeError, ResourceError
from llmsqueeze.kv_record import KvRecord, kv_tensors
from llmsqueeze.ranks import ALONE, Team
from llmsqueeze.shards import (
    KV_NAME,
    SIDE_NAME,
    ShardRecord,
    ShardWriter,
    hash_file,
    hash_header,
    list_shards,
)
from llmsqueeze.side_files import write_side_file

MANIFEST_NAME = "llmsqueeze.json"
FORMAT_VERSION = 1
FORMATS = ("llmsqueeze", "dense")
# The files beside the weights that make a checkpoint usable; everything else stays behind.
ASSET_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class SiteRecord:
    """One compressed linear. bytes_*: of its weight alone. report: what the method said of it."""

    shape: tuple[int, int]
    dtype: str
    encoding: str  # of encodings.ENCODINGS, or "dense"
    nonzeros: int
    bytes_before: int
    bytes_after: int
    report: dict[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        return 1 - self.nonzeros / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Manifest:
    """llmsqueeze.json. steps: what was done, oldest first, each with recipe, source and calibration.

    activation: the gates of sparsified activations, kv_cache: how the KV cache is quantised, if either is.
    """

    format: str
    sites: dict[str, SiteRecord]
    shards: dict[str, ShardRecord]
    bytes_before: int
    bytes_after: int
    steps: list[dict[str, Any]]
    activation: ActivationRecord | None = None
    kv_cache: KvRecord | None = None
    format_version: int = FORMAT_VERSION
    tool_version: str = __version__

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Strict inverse of to_json; CheckpointError on anything it does not recognise."""
        try:
            raw = untrusted.parse_json(text)
            version = raw["format_version"]
            if type(version) is not int or version < 1:
                raise ValueError(f"format_version is {version!r}")
            if version > FORMAT_VERSION:
                raise CheckpointError(
                    f"{MANIFEST_NAME}: format version {version} is newer than this llmsqueeze "
                    f"({__version__}) reads; upgrade llmsqueeze"
                )
            raw["sites"] = {n: _strict(SiteRecord, r) for n, r in raw["sites"].items()}
            raw["shards"] = {n: _strict(ShardRecord, r) for n, r in raw["shards"].items()}
            if raw.get("activation") is not None:
                raw["activation"] = ActivationRecord.from_raw(raw["activation"])
            if raw.get("kv_cache") is not None:
                raw["kv_cache"] = KvRecord.from_raw(raw["kv_cache"])
            manifest = _strict(cls, raw)
            manifest._validate()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{MANIFEST_NAME}: not a valid manifest ({error})") from error
        return manifest

    def _validate(self) -> None:
        if self.format not in FORMATS or not isinstance(self.tool_version, str):
            raise ValueError("format or tool_version")
        if not (_is_count(self.bytes_before) and _is_count(self.bytes_after)):
            raise ValueError("bytes_before or bytes_after")
        if not isinstance(self.steps, list) or not all(map(_is_step, self.steps)):
            raise ValueError("steps")
        for name, site in self.sites.items():
            if not _is_site(site):
                raise ValueError(f"site {name}")
        files = {**self.shards}
        if self.activation:
            files[SIDE_NAME] = self.activation.file
        if self.kv_cache and self.kv_cache.file:
            files[KV_NAME] = self.kv_cache.file
        for name, file in files.items():
            hashes = (file.sha256, file.header_sha256)
            if not _is_count(file.bytes) or not all(isinstance(text, str) for text in hashes):
                raise ValueError(f"shard {name}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_DTYPES = ("float32", "float16", "bfloat16")


def _is_site(site: SiteRecord) -> bool:
    if len(site.shape) != 2 or not all(_is_count(n) and n > 0 for n in site.shape):
        return False
    figures = site.report.values() if isinstance(site.report, dict) else [None]
    return (
        site.encoding in (*ENCODINGS, "dense")
        and site.dtype in _DTYPES
        and all(map(_is_count, (site.nonzeros, site.bytes_before, site.bytes_after)))
        and site.nonzeros <= math.prod(site.shape)
        and all(type(figure) in (int, float) and math.isfinite(figure) for figure in figures)
    )


_NUMBER = (int, float)
# What is told of steps, by their command: paths, and types of what is there.
_STEPS: dict[str, dict[str, Any]] = {
    "prune": {"recipe.method": str, "recipe.target.pattern": str, "sparsity": _NUMBER},
    "encode": {"recipe.to": str},
    "sparsify": {"recipe.sparsity": _NUMBER, "recipe.prefill": str},
    "quantize-kv": {"recipe.method": str, "recipe.bits": int},
}


def _is_step(step: Any) -> bool:
    command = _at(step, "command")
    if not isinstance(command, str):
        return False
    told = {"source.name": str, "recipe": dict, **_STEPS.get(command, {})}
    if _at(step, "recipe.target.pattern") == "tile":
        told["recipe.target.tile"] = int
    return all(isinstance(_at(step, path), kind) for path, kind in told.items())


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


_Record = TypeVar("_Record", SiteRecord, ShardRecord, Manifest)


def _strict(record: type[_Record], raw: dict[str, Any]) -> _Record:
    unknown = set(raw) - {f.name for f in fields(record)}
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
    if "shape" in raw:
        raw = {**raw, "shape": tuple(raw["shape"])}
    return record(**raw)


def read_manifest(directory: Path, config: dict[str, Any]) -> Manifest | None:
    """The manifest, checked against config.json and every shard header; None for a plain checkpoint."""
    quantization = config.get("quantization_config")
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == "llmsqueeze"
    path = directory / MANIFEST_NAME
    if not path.is_file():
        if ours:
            raise CheckpointError(f"{path}: missing; without it the weights cannot be decoded")
        return None
    try:
        text = untrusted.read_text(path, untrusted.LARGE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} {untrusted.reason(error)}") from error
    manifest = Manifest.from_json(text)
    if (manifest.format == "llmsqueeze") != ours:
        raise CheckpointError(f"{path} says format {manifest.format!r}; config.json disagrees")
    if ours and (quantization or {}).get("manifest_sha256") != _sha256(text):
        raise CheckpointError(f"{path} was changed after config.json was written")
    files = {file.name: file for file in list_shards(directory)}
    if set(files) != set(manifest.shards):
        raise CheckpointError(f"{directory}: the shards are not those that {MANIFEST_NAME} lists")
    for name, file in files.items():
        if hash_header(file) != manifest.shards[name].header_sha256:
            raise CheckpointError(
                f"{file}: header differs from {MANIFEST_NAME}; the file is damaged or was replaced "
                f"(if weights were changed on purpose, delete {MANIFEST_NAME})"
            )
    if manifest.activation:
        side_tensors(directory, manifest.activation)
    if manifest.kv_cache:
        kv_tensors(directory, manifest.kv_cache)
    return manifest


def verify(directory: Path, manifest: Manifest) -> list[str]:
    """Hash every shard; the names of those whose contents differ from the manifest."""
    files = dict(manifest.shards)
    if manifest.activation:
        files[SIDE_NAME] = manifest.activation.file
    if manifest.kv_cache and manifest.kv_cache.file:
        files[KV_NAME] = manifest.kv_cache.file
    return [
        name
        for name, record in files.items()
        if (directory / name).stat().st_size != record.bytes
        or hash_file(directory / name) != record.sha256
    ]


def decode(site: str, record: SiteRecord, parts: dict[str, Tensor]) -> Tensor:
    """The [out, in] weight from the parts of its encoding."""
    try:
        weight = ENCODINGS[record.encoding].decode(parts, record.shape[1])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{site}: damaged {record.encoding} encoding ({error})") from error
    if tuple(weight.shape) != record.shape:
        raise CheckpointError(f"{site}: decodes to {tuple(weight.shape)}, not {record.shape}")
    return weight


def check_parts(site: str, record: SiteRecord, parts: dict[str, Tensor]) -> None:
    """CheckpointError if the parts of an encoding do not belong together, or to such a weight."""
    encoding = ENCODINGS[record.encoding]
    try:
        encoding.check(parts, record.shape[1])
    except ValueError as error:
        raise CheckpointError(f"{site}: damaged {record.encoding} encoding ({error})") from error
    if (rows := len(parts[encoding.long])) != record.shape[0]:
        raise CheckpointError(f"{site}: has {rows} rows, not {record.shape[0]}")


class ArtifactWriter:
    """Writes one checkpoint. Used as a context manager: leaving it without publish() removes all traces.

    directory: where to write, one that outlives this, as for a run that can be resumed; see work.Work.
    team: ranks that make the same calls, of which each writes some of the shards, the first one all else.
    """

    def __init__(
        self,
        out: Path,
        *,
        format: str = "llmsqueeze",
        overwrite: bool = False,
        directory: Path | None = None,
        team: Team = ALONE,
    ) -> None:
        check_output(out, overwrite)
        self._out, self._overwrite, self._team = out, overwrite, team
        self._format, self._given = format, directory
        self._sites: dict[str, SiteRecord] = {}
        self._activation: ActivationRecord | None = None
        self._kv_cache: KvRecord | None = None

    def __enter__(self) -> ArtifactWriter:
        self.directory = self._given or self._temporary()
        self._shards = ShardWriter(self.directory, self._team)
        return self

    def _temporary(self) -> Path:
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(".partial", f".{self._out.name}.", self._out.parent))
        except OSError as error:
            raise ResourceError(f"cannot write to {self._out.parent} ({error.strerror})") from error

    def __exit__(self, *raised: object) -> None:
        with contextlib.closing(self._shards):
            if self._given is None:
                shutil.rmtree(self.directory, ignore_errors=True)

    def snapshot(self) -> dict[str, Any]:
        """What restore() goes on from, in plain types and tensors; see ShardWriter.snapshot."""
        sites = {name: asdict(record) for name, record in self._sites.items()}
        return {**self._shards.snapshot(), "sites": sites}

    def restore(self, found: dict[str, Any] | None) -> None:
        """Go back to a snapshot, None for the beginning; CheckpointError when its files are not there."""
        sites = found["sites"] if found else {}
        self._sites = {name: _strict(SiteRecord, record) for name, record in sites.items()}
        self._shards.restore(found)

    def add(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is."""
        self._shards.add(name, tensor)

    def add_site(
        self, site: str, weight: Tensor, report: dict[str, float], stored: str | None = None
    ) -> SiteRecord:
        """Store the [out, in] weight of a compressed linear in the smallest encoding it fits.

        stored: what it is called on disk, where that is not the module's name.
        """
        stored = stored or site
        rows, columns = weight.shape
        encoding, parts = smallest_layout(weight) if self._format == "llmsqueeze" else ("dense", {})
        made = functools.cache(lambda: ENCODINGS[encoding].encode(weight))
        for part, layout in parts.items():
            make = functools.partial(lambda part: made()[part], part)
            self._shards.add(f"{stored}.weight_{part}", layout, make)
        if not parts:
            self._shards.add(f"{stored}.weight", weight)
        dense_bytes = weight.numel() * weight.element_size()
        packed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
        self._sites[site] = record = SiteRecord(
            shape=(rows, columns),
            dtype=str(weight.dtype).removeprefix("torch."),
            encoding=encoding,
            nonzeros=nonzeros(weight),
            bytes_before=dense_bytes,
            bytes_after=packed_bytes or dense_bytes,
            report=report,
        )
        return record

    def add_activation(
        self, method: str, prefill: str, gates: dict[str, GateRecord], tensors: dict[str, Tensor]
    ) -> ActivationRecord:
        """Store the gates of sparsified activations and their side tensors."""
        file = write_side_file(self.directory, SIDE_NAME, tensors, self._team)
        self._activation = ActivationRecord(method, prefill, gates, file)
        return self._activation

    def add_kv_cache(self, record: KvRecord, tensors: dict[str, Tensor]) -> KvRecord:
        """Store how the KV cache is quantised. tensors: see kv_record; none for an uncalibrated method."""
        file = write_side_file(self.directory, KV_NAME, tensors, self._team) if tensors else None
        self._kv_cache = replace(record, file=file)
        return self._kv_cache

    def write_text(self, name: str, text: str) -> None:
        """A side file, such as the model card."""
        if self._team.leads:
            (self.directory / name).write_text(text, encoding="utf-8")

    def publish(
        self, config: dict[str, Any], source: Path, steps: list[dict[str, Any]], bytes_before: int
    ) -> Manifest:
        """Finish the files; the first rank renames the directory to OUT. config: the source's."""
        manifest = Manifest(
            format=self._format,
            sites=self._sites,
            shards=self._shards.finish(),
            bytes_before=bytes_before,
            bytes_after=self._shards.total_bytes + self._side_bytes(),
            steps=steps,
            activation=self._activation,
            kv_cache=self._kv_cache,
        )
        if not self._team.leads:
            return manifest
        for asset in assets(source):
            shutil.copyfile(asset, self.directory / asset.name)
        text = manifest.to_json()
        (self.directory / MANIFEST_NAME).write_text(text, encoding="utf-8")
        config = {k: v for k, v in config.items() if k != "quantization_config"}
        if self._format == "llmsqueeze":
            config["quantization_config"] = {
                "quant_method": "llmsqueeze",
                "format_version": FORMAT_VERSION,
                "manifest_sha256": _sha256(text),
            }
        # config.json last: without it a directory is not a checkpoint to anyone.
        (self.directory / "config.json").write_text(_config_text(config), encoding="utf-8")
        if os.path.lexists(self._out) and not self._overwrite:
            raise ResourceError(
                f"{self._out} was made by something else in the meantime; move it and run the same command "
                "again"
            )
        publish_directory(self.directory, self._out)
        return manifest

    def _side_bytes(self) -> int:
        records = [r.file for r in (self._activation, self._kv_cache) if r]
        return sum(file.bytes for file in records if file)


def add_to_last_step(directory: Path, key: str, value: Any) -> None:
    """Record something more of how a finished checkpoint was made."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    manifest = read_manifest(directory, config)
    assert manifest is not None
    *before, last = manifest.steps
    text = replace(manifest, steps=[*before, {**last, key: value}]).to_json()
    config["quantization_config"]["manifest_sha256"] = _sha256(text)
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")
    (directory / "config.json").write_text(_config_text(config), encoding="utf-8")


def publish_directory(finished: Path, out: Path) -> None:
    """Rename `finished` to `out`; a checkpoint that stood there is removed only after that succeeded.

    No fsync: a power cut may still lose what was written, but then the hashes do not match and
    nothing damaged loads.
    """
    finished.chmod(0o755)
    for path in finished.iterdir():
        path.chmod(0o644)  # safetensors creates files for the owner alone
    if not out.exists():
        finished.rename(out)
        return
    aside = finished.with_suffix(".replaced")
    out.rename(aside)
    try:
        finished.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside)


def check_output(
    out: Path, overwrite: bool, *, mark: str = "config.json", kind: str = "checkpoint"
) -> None:
    """RecipeError unless `out` is free, or a checkpoint that may be replaced.

    mark, kind: the file that every such directory has, and what it is called.
    """
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise RecipeError(f"{out} exists already; choose another -o, or pass --overwrite")
    if out.is_symlink() or not out.is_dir() or not (out / mark).is_file():
        raise RecipeError(f"{out} is not a {kind} directory; --overwrite will not replace it")


def _config_text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def assets(source: Path) -> Iterator[Path]:
    """Tokenizer and other side files of a checkpoint directory.

    CheckpointError on a link that leads elsewhere: a stranger's LICENSE would put any file of this machine
    into what is made, and published. In the hub's cache links lead to the blobs of the same repository.
    """
    found = {path for pattern in ASSET_PATTERNS for path in source.glob(pattern) if path.is_file()}
    inside = source.resolve()
    homes = (
        (inside, inside.parent.parent / "blobs") if inside.parent.name == "snapshots" else (inside,)
    )
    for path in found:
        if path.is_symlink() and not any(home in path.resolve().parents for home in homes):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, outside of the checkpoint; put a copy there if it "
                "belongs to it"
            )
    return iter(sorted(found))
