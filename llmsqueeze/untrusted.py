"""Bytes from outside, read with suspicion: files that are files and not too large, JSON that means one thing.

What is wrong is a ValueError in words that name no file: whoever reads knows its path, and which of our
errors it is.
"""

from __future__ import annotations

import functools
import json
import math
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

# No recipe and no config.json is larger; of documents that grow with a model, none.
SMALL, LARGE = 4 * 2**20, 64 * 2**20
# Every integer that a file of ours or of transformers holds fits: arithmetic on more digits takes for ever,
# or ends in an OverflowError far from here.
_DIGITS = 20
# Levels of lists and objects within each other. What copies or prints such a value takes several frames of
# the stack for each.
_DEPTH = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_file(path: Path) -> int:
    """Bytes of a file; ValueError if it is none, as a pipe that nobody writes to, or a device without end.

    Links are followed. OSError if there is nothing.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("is not a regular file")
    return found.st_size


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file; ValueError if it has more than `most` bytes, or is no file."""
    if check_file(path) > most:
        raise ValueError(f"is larger than {most / 2**20:.0f} MiB")
    with path.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:  # it grew
        raise ValueError(f"is larger than {most / 2**20:.0f} MiB")
    return data


def read_text(path: Path, most: int = SMALL) -> str:
    """The same as text; ValueError also if it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from error


def parse_json(text: str, *, twice: bool = False) -> Any:
    """JSON as plain types; ValueError on what readers understand differently or cannot compute with.

    That is: NaN and infinities, integers of more than 64 bits, halves of surrogate pairs (no text can be
    written with them), deep nesting, and a key that an object has twice, unless `twice`, where the last
    counts.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=None if twice else _object,
        )
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    _check_depth(value)
    if _SURROGATE.search(text) and not is_text(json.dumps(value, ensure_ascii=False)):
        raise ValueError("holds half of a surrogate pair")
    return value


def read_json(path: Path, most: int = SMALL, *, twice: bool = False) -> Any:
    """parse_json of a file; OSError if it cannot be read."""
    return parse_json(read_text(path, most), twice=twice)


def is_text(text: str) -> bool:
    """Whether it can be written: it cannot with half of a surrogate pair, as "\\ud800" in JSON stands for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_refusal(error: BaseException) -> bool:
    """Whether a library says by it that it cannot go on, and not the system or who started this process."""
    # What Rust calls a panic comes as a BaseException of a class that cannot be imported.
    panic = type(error).__name__ == "PanicException"
    return panic or (isinstance(error, Exception) and not isinstance(error, MemoryError))


def first_line(error: BaseException) -> str:
    """What an error says, or is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@functools.singledispatch
def reason(error: Exception) -> str:
    """Why a file could not be read, in words, of what the functions above raise."""
    return first_line(error)


@reason.register
def _(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


@reason.register
def _(error: json.JSONDecodeError) -> str:
    return f"is not JSON ({error})"


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        if not level:
            return
    raise ValueError("is nested too deeply")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"holds {constant}, which is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"holds {digits[:_DIGITS]}…, which is no number")
    return number


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS or not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError(f"holds an integer of more than 64 bits ({digits[:_DIGITS]}…)")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"has {name!r} twice")
            seen.add(name)
    return found
