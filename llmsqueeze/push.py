"""A checkpoint on its way to the Hugging Face hub: which of its files, into what is there, in one commit.

The hub keeps a commit whole or not at all, so nobody ever sees half of a checkpoint.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsqueeze import __version__
from llmsqueeze.artifact import ASSET_PATTERNS, MANIFEST_NAME, verify
from llmsqueeze.card import is_sealed
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError, EnvironmentFault, RecipeError
from llmsqueeze.shards import KV_NAME, SIDE_NAME, hash_file

CARD_NAME = "README.md"
MAIN = "main"
# Of the files beside the weights only texts, and models of tokenizers, go out.
ASSET_SUFFIXES = ("", ".json", ".txt", ".model", ".jinja", ".md")
# What a commit replaces; nothing else in a repository is touched.
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
_KEPT = (".gitattributes", CARD_NAME, "LICENSE*", "NOTICE*")
# As the hub writes access tokens.
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


@dataclass(frozen=True)
class Upload:
    """files: name in the repository → where it lies; card aside. left_out: name → why."""

    files: dict[str, Path]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Place:
    """A repository's branch as it was found. head: its commit, None if there is no such repository yet.

    branch: False if it will begin where the main one is. files: their names. card: README.md there.
    """

    repo: str
    revision: str
    head: str | None
    branch: bool
    private: bool
    files: tuple[str, ...]
    card: str | None


@dataclass(frozen=True)
class Pushed:
    """commit: None if nothing had to change."""

    url: str
    commit: str | None
    deleted: list[str]


def select(checkpoint: Checkpoint) -> Upload:
    """The files of a checkpoint that llmsqueeze made; CheckpointError if one must not go out.

    Hashes every shard: what is uploaded is what was written.
    """
    manifest, folder = checkpoint.manifest, checkpoint.path
    if manifest is None:
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}; push uploads what llmsqueeze made")
    damaged = verify(folder, manifest)
    if damaged:
        raise CheckpointError(f"{folder / damaged[0]}: contents differ from the manifest")
    names = {*manifest.shards, MANIFEST_NAME, "config.json"}
    names |= {path.name for path in folder.glob("*.safetensors.index.json")}
    names |= {SIDE_NAME} if manifest.activation else set()
    names |= {KV_NAME} if manifest.kv_cache and manifest.kv_cache.file else set()
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name in names or path.name == CARD_NAME:
            continue
        if not path.is_file():
            left_out[path.name] = "a folder" if path.is_dir() else "no file"
        elif not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in ASSET_PATTERNS):
            left_out[path.name] = "no part of a checkpoint"
        elif path.suffix not in ASSET_SUFFIXES:
            left_out[path.name] = f"not text: {path.suffix}"
        else:
            names.add(path.name)
    files = {name: folder / name for name in sorted(names)}
    for path in files.values():
        _check_file(path, folder)
    return Upload(files, left_out)


def _check_file(path: Path, folder: Path) -> None:
    """CheckpointError for a link that leads out of the folder, and for a text that holds an access token."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} is a link to a file elsewhere; put a copy in its place")
    if path.suffix != ".safetensors" and (found := _TOKEN.search(path.read_bytes())):
        raise CheckpointError(
            f"{path} holds what looks like an access token ({found[0][:6].decode()}…); take it out"
        )


def check_card(card: str) -> None:
    """RecipeError for a card that holds an access token."""
    if found := _TOKEN.search(card.encode("utf-8")):
        raise RecipeError(
            f"{CARD_NAME} holds what looks like an access token ({found[0][:6].decode()}…); take it out"
        )


def paths_within(manifest: Mapping[str, Any]) -> list[str]:
    """Absolute paths of this machine that a manifest's steps name, which will be seen by all."""
    found: dict[str, None] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Mapping):
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                collect(inner)
        elif isinstance(value, str) and Path(value).is_absolute():
            found[value] = None

    collect(manifest)
    return list(found)


class Hub:
    """The hub under the name of whoever is logged in. Every failure is an EnvironmentFault of one line."""

    def __init__(self, repo: str) -> None:
        """RecipeError if no repository can have this name, EnvironmentFault if nobody is logged in."""
        from huggingface_hub import HfApi, get_token

        self.repo = repo
        if get_token() is None:
            raise EnvironmentFault(
                "nobody is logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN to a "
                "token that may write"
            )
        self._api: Any = HfApi(library_name="llmsqueeze", library_version=__version__)

    def find(self, revision: str) -> Place:
        """What is there now; nothing is changed."""
        from huggingface_hub.errors import (
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        with self._reaching():
            try:
                main = self._api.model_info(self.repo)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                # Also what the hub answers to a token that it does not know; making it will tell.
                return Place(self.repo, revision, None, revision == MAIN, True, (), None)
            found, branch = main, True
            if revision != MAIN:
                try:
                    found = self._api.model_info(self.repo, revision=revision)
                except RevisionNotFoundError:
                    branch = False
            files = tuple(sorted(entry.rfilename for entry in found.siblings or ()))
            card = self._read(CARD_NAME, found.sha) if CARD_NAME in files else None
        return Place(self.repo, revision, found.sha, branch, bool(main.private), files, card)

    def publish(
        self, place: Place, upload: Upload, card: str | None, *, private: bool, message: str
    ) -> Pushed:
        """One commit with all files and the card, None to leave the one that is there.

        What a checkpoint that was there had and this one has not is deleted by the same commit. What the hub
        then has is compared with what was sent.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        deleted = stale(place, upload)
        contents: dict[str, Path | bytes] = dict(upload.files)
        if card is not None:
            contents[CARD_NAME] = card.encode("utf-8")
        with self._reaching():
            head = place.head
            if head is None:
                self._api.create_repo(self.repo, private=private, exist_ok=False)
                head = self._api.model_info(self.repo).sha
            if not place.branch:
                self._api.create_branch(self.repo, branch=place.revision, revision=head)
            operations: list[Any] = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
                for name, source in contents.items()
            ]
            operations += [CommitOperationDelete(path_in_repo=name) for name in deleted]
            # parent_commit: refused if somebody else was faster.
            made = self._api.create_commit(
                self.repo, operations, commit_message=message, revision=place.revision,
                parent_commit=head,
            )  # fmt: skip
            self._compare(made.oid, contents)
        url = f"{self._api.endpoint}/{self.repo}"
        if place.revision != MAIN:
            url += f"/tree/{place.revision}"
        return Pushed(url, None if made.oid == head else made.oid, deleted)

    def _compare(self, commit: str, contents: Mapping[str, Path | bytes]) -> None:
        entries = self._api.get_paths_info(self.repo, list(contents), revision=commit)
        found = {entry.path: entry for entry in entries}
        for name, content in contents.items():
            entry = found.get(name)
            if entry is None or not _same(entry, content):
                raise EnvironmentFault(
                    f"{self.repo} has {'no' if entry is None else 'another'} {name} after commit "
                    f"{commit[:12]}; look at its .gitignore, and push again"
                )

    def _read(self, name: str, revision: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.repo, name, revision=revision, local_dir=folder)
            return Path(path).read_text(encoding="utf-8", errors="replace")

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """The client's errors, of many kinds, in one line that says what to do."""
        from huggingface_hub.errors import (  # type: ignore[attr-defined]
            HfHubHTTPError,
            HFValidationError,
            HTTPError,
        )

        try:
            yield
        except HFValidationError as error:
            raise RecipeError(f"{self.repo}: no name of a repository ({_line(error)})") from error
        except HfHubHTTPError as error:
            raise EnvironmentFault(self._answer(error)) from error
        except (HTTPError, OSError) as error:
            raise EnvironmentFault(
                f"the Hugging Face hub cannot be reached ({_line(error)}); nothing was published"
            ) from error
        except (ValueError, RuntimeError) as error:
            # How the client reports a refused card, and an upload that broke off; the cause says more.
            cause = error.__cause__
            if isinstance(cause, HfHubHTTPError) and isinstance(error, RuntimeError):
                raise EnvironmentFault(self._answer(cause)) from error
            reason = _line(error) + (f": {_line(cause)}" if cause else "")
            raise EnvironmentFault(
                f"{self.repo} did not take the upload ({reason}); nothing was published"
            ) from error

    def _answer(self, error: Any) -> str:
        status = error.response.status_code
        said = (error.server_message or _line(error)).strip().splitlines()[0]
        if status == 401:
            return (
                f"the hub does not know this token ({said}); run `hf auth login` again, or set HF_TOKEN to "
                "one that may write"
            )
        if status == 403:
            return (
                f"this token may not write to {self.repo} ({said}); take one with write access to it, or "
                "another name"
            )
        if status in (409, 412):
            return (
                f"{self.repo} was changed meanwhile, or is somebody else's ({said}); nothing was "
                "published"
            )
        return f"{self.repo}: the hub answers {status} ({said}); nothing was published"


def check_place(
    place: Place, upload: Upload, card: str, *, private: bool | None, overwrite: bool,
    keep_card: bool, replace_card: bool,
) -> str | None:  # fmt: skip
    """The card to upload, None to leave the one that is there; RecipeError where something would be lost.

    private: what was asked for, None if nothing was.
    """
    if place.head is None:
        if keep_card:
            raise RecipeError(f"--keep-card: there is no {place.repo} yet, so no card to keep")
        return card
    if private is not None and private != place.private:
        now, asked = (("private", "--public"), ("public", "--private"))[private]
        raise RecipeError(
            f"{place.repo} is {now} already, and {asked} does not change that; do it on the hub, or leave "
            "the option out"
        )
    others = [name for name in place.files if not _matches(name, _KEPT)]
    if others and MANIFEST_NAME not in others and not overwrite:
        raise RecipeError(
            f"{place.repo} holds other things ({', '.join(others[:3])}{', …' if others[3:] else ''}); take "
            "another name, or --overwrite to replace a checkpoint there"
        )
    if keep_card:
        if place.card is None:
            raise RecipeError(f"--keep-card: {place.repo} has no {CARD_NAME} to keep")
        return None
    if place.card in (None, card) or is_sealed(str(place.card)) or replace_card:
        return card
    raise RecipeError(
        f"somebody wrote the {CARD_NAME} of {place.repo}: --keep-card leaves it, --replace-card does not"
    )


def stale(place: Place, upload: Upload) -> list[str]:
    """Files of a checkpoint that was there, and which this one has not."""
    patterns = (*_WEIGHTS, MANIFEST_NAME, "config.json", *ASSET_PATTERNS)
    return [
        name
        for name in place.files
        if name not in upload.files and _matches(name, patterns) and not _matches(name, _KEPT)
    ]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _same(entry: Any, content: Path | bytes) -> bool:
    """Whether a file on the hub has this content: by sha256 if it is large, as git knows it if it is not."""
    if entry.lfs:
        if isinstance(content, bytes):
            return bool(entry.lfs.sha256 == hashlib.sha256(content).hexdigest())
        return bool(entry.lfs.sha256 == hash_file(content))
    data = content if isinstance(content, bytes) else content.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return bool(entry.blob_id == blob.hexdigest())


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
