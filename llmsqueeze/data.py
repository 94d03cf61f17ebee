"""Text to token windows: what calibration and evaluation see, with a hash that pins it.

A plain text file is tokenised once and cut into consecutive windows, so that another tool can be
given the very same tokens. Collections of documents (.jsonl, a hub dataset) are shuffled by the
seed, joined and cut. The bundled texts are cut by register and shuffled by the seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import untrusted
from llmsqueeze.errors import CheckpointError, DataError, EnvironmentFault

BUNDLED_CALIBRATION = ("prose", "dialogue", "technical", "code")
BUNDLED_EVALUATION = "evaluation"
# Bytes of a text, which take as much memory, and characters of one that is tokenised as a whole, which take
# some thirty times as much.
MOST_BYTES, MOST_WHOLE = 2**30, 64 * 2**20
# Where only the first tokens are wanted: so many more of them, of so many characters, are looked at first.
SPARE, CHARACTERS = 256, 8


@dataclass(frozen=True)
class Windows:
    """tokens: [windows, seqlen] int64. text_sha256: of the text they came from."""

    tokens: Tensor
    text_sha256: str
    source: str
    bos: bool

    def describe(self) -> dict[str, Any]:
        """What a manifest or report records. tokens_sha256 covers the little-endian int64 ids."""
        data = self.tokens.contiguous().numpy().astype("<i8").tobytes()
        return {
            "source": self.source,
            "text_sha256": self.text_sha256,
            "tokens_sha256": hashlib.sha256(data).hexdigest(),
            "samples": self.tokens.shape[0],
            "seqlen": self.tokens.shape[1],
            "bos": self.bos,
        }


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer; CheckpointError when it has none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (
        BaseException
    ) as error:  # transformers raises many kinds; all mean the files are unusable
        if not untrusted.is_refusal(error):
            raise
        raise CheckpointError(
            f"{path}: no usable tokenizer ({type(error).__name__}); copy the model's tokenizer "
            "files into the directory"
        ) from error


@contextlib.contextmanager
def tokenizing() -> Iterator[None]:
    """Turn what a tokenizer raises, whose files load but do not fit together, into a CheckpointError."""
    try:
        yield
    except BaseException as error:
        if not untrusted.is_refusal(error):
            raise
        why = untrusted.first_line(error)
        raise CheckpointError(
            f"the checkpoint's tokenizer or chat template fails: {why}"
        ) from error


def calibration_windows(
    spec: str | None, tokenizer: Any, *, samples: int, seqlen: int, seed: int, bos: bool = False
) -> Windows:
    """Exactly `samples` windows of `seqlen` tokens.

    spec: None for the bundled texts, a .txt or .jsonl file, or a hub dataset NAME[:CONFIG[:SPLIT]].
    Raises DataError when the text is missing, unreadable or too short.
    """
    if spec is None:
        return _bundled_windows(tokenizer, samples, seqlen, seed, bos)
    path = Path(spec)
    if path.suffix in (".jsonl", ".txt") or path.is_file():
        data = _read_bytes(path)
        text = _decode(path, data)
        sha = hashlib.sha256(data).hexdigest()
        if path.suffix != ".jsonl":
            windows = _cut(_tokenize_start(tokenizer, text, samples * seqlen, bos), seqlen)[
                :samples
            ]
            return Windows(_enough(windows, samples, seqlen, spec), sha, path.name, bos)
        documents = _jsonl(path, text)
        random.Random(seed).shuffle(documents)
        windows = _pack(documents, tokenizer, samples, seqlen, bos)
        return Windows(_enough(windows, samples, seqlen, spec), sha, path.name, bos)
    documents = []
    wanted = 0
    for document in _hub_documents(spec, seed):
        documents.append(document)
        wanted += len(document)
        # A token is rarely longer than eight characters; more text than this is never needed.
        if wanted > samples * seqlen * 8:
            break
    windows = _pack(documents, tokenizer, samples, seqlen, bos)
    sha = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    return Windows(_enough(windows, samples, seqlen, spec), sha, spec, bos)


def evaluation_windows(
    path: Path | None, tokenizer: Any, *, seqlen: int, windows: int | None, bos: bool = False
) -> Windows:
    """Consecutive windows of one text, all of them or the first `windows`.

    path: None for the bundled evaluation text, which no bundled calibration text shares a line with.
    """
    data = _read_bytes(path) if path else bundled_text(BUNDLED_EVALUATION).encode("utf-8")
    name = path.name if path else f"bundled {BUNDLED_EVALUATION}.txt"
    text = _decode(Path(name), data)
    if windows is None and len(text) > MOST_WHOLE:
        raise DataError(
            f"{path or name}: {len(text):,} characters are too many to evaluate all of them; say how many "
            "windows (--windows)"
        )
    if windows is None:
        tokens = _tokenize(tokenizer, text, bos)
    else:
        tokens = _tokenize_start(tokenizer, text, windows * seqlen, bos)
    cut = _cut(tokens, seqlen)[:windows]
    enough = _enough(cut, windows or 1, seqlen, str(path or name))
    return Windows(enough, hashlib.sha256(data).hexdigest(), name, bos)


def bundled_text(name: str) -> str:
    """One of the texts in calib_data/, by its name without .txt."""
    folder = importlib.resources.files("llmsqueeze._calib_data")
    return (folder / f"{name}.txt").read_text(encoding="utf-8")


def _bundled_windows(tokenizer: Any, samples: int, seqlen: int, seed: int, bos: bool) -> Windows:
    texts = {name: bundled_text(name) for name in BUNDLED_CALIBRATION}
    tokenized = _tokenize_each(tokenizer, list(texts.values()), bos)
    windows = torch.cat([_cut(tokens, seqlen) for tokens in tokenized])
    order = list(range(windows.shape[0]))
    random.Random(seed).shuffle(order)
    chosen = _enough(windows[order[:samples]], samples, seqlen, "the bundled calibration text")
    sha = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    return Windows(chosen, sha, "bundled " + ", ".join(BUNDLED_CALIBRATION), bos)


def _tokenize(tokenizer: Any, text: str, bos: bool) -> Tensor:
    """[tokens] int64, no special tokens but the one asked for."""
    return _tokenize_each(tokenizer, [text], bos)[0]


def _tokenize_start(tokenizer: Any, text: str, wanted: int, bos: bool) -> Tensor:
    """Its first tokens, as many as wanted if it has them, without tokenising much more of it.

    They are those of the whole text: what is cut off begins at a space, behind many more tokens than a merge
    spans.
    """
    length = CHARACTERS * (wanted + SPARE)
    while length < len(text):
        space = text.rfind(" ", 0, length)
        tokens = _tokenize(tokenizer, text[: space if space > 0 else length], bos)
        if tokens.numel() >= wanted + SPARE:
            return tokens[:wanted]
        length *= 4
    return _tokenize(tokenizer, text, bos)


def _tokenize_each(tokenizer: Any, texts: list[str], bos: bool) -> list[Tensor]:
    """Like _tokenize, for several texts at once: fast tokenizers then use several threads."""
    if bos and tokenizer.bos_token_id is None:
        raise DataError("--bos: this checkpoint's tokenizer has no beginning-of-text token")
    first = [tokenizer.bos_token_id] if bos else []
    with tokenizing():
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [torch.tensor([*first, *ids], dtype=torch.int64) for ids in encoded]


def _cut(tokens: Tensor, seqlen: int) -> Tensor:
    """[windows, seqlen]: consecutive, the incomplete tail dropped."""
    count = tokens.numel() // seqlen
    return tokens[: count * seqlen].reshape(count, seqlen)


def _pack(documents: Iterable[str], tokenizer: Any, samples: int, seqlen: int, bos: bool) -> Tensor:
    parts: list[Tensor] = []
    length = 0
    for document in documents:
        if length >= samples * seqlen:
            break
        parts.append(_tokenize_start(tokenizer, document, samples * seqlen, bos))
        length += parts[-1].numel()
    joined = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return _cut(joined, seqlen)[:samples]


def _enough(windows: Tensor, wanted: int, seqlen: int, source: str) -> Tensor:
    if windows.shape[0] < wanted:
        raise DataError(
            f"{source} is too short: it gives {windows.shape[0]} windows of {seqlen} tokens, "
            f"{wanted} are needed; give more text, or fewer or shorter windows"
        )
    return windows


def _read_bytes(path: Path) -> bytes:
    try:
        return untrusted.read_bytes(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {untrusted.reason(error)}") from error


def _decode(path: Path, data: bytes) -> str:
    """Line ends become "\\n", as any tool that opens the file as text would have them."""
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _jsonl(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{path}: line {number} is not a JSON object with a "text" field'
            ) from error
        if not isinstance(document, str) or not untrusted.is_text(document):
            raise DataError(f'{path}: line {number}: "text" is not a string of characters')
        documents.append(document)
    return documents


def _hub_documents(spec: str, seed: int) -> Iterator[str]:
    """Documents of a hub dataset, or of a local directory in the hub's layout, in shuffled order."""
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            f"{spec} is no file, and hub datasets need a package: pip install 'llmsqueeze[datasets]'"
        ) from error
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    try:
        stream = datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True, trust_remote_code=False
        )
        for row in stream.shuffle(seed=seed, buffer_size=10_000):
            if not isinstance(row.get("text"), str):
                raise DataError(f'dataset {spec}: its rows have no "text" string')
            yield row["text"]
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds; all mean it is not to be had
        raise DataError(
            f"{spec}: neither a file nor a dataset that loads ({untrusted.first_line(error)})"
        ) from error
