"""Mutations of bytes, of JSON and of YAML. Everything follows from the random generator that is given."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

INTEGERS = (
    0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53,
    2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**9, 10**15, -(2**31), -(2**63),
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """Text that stands in JSON as it is, whether or not it is any."""

    text: str


LIMITS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1e308",
    "5e-324",
    "9" * 5000,
    "-" + "9" * 400,
    "1e-400",
    "18446744073709551616",
    "0x10",
    "01",
    "-0",
    "1.0",
    "true",
    "null",
    "[" * 70 + "]" * 70,
    "[" * 3000,
    '{"a":' * 500 + "1" + "}" * 500,
    "{",
    "]",
    '"\\ud800"',
    '"\\udfff\\ud800"',
    '"\\u0000"',
    '"\n"',
    "'a'",
    "",
    '{"a": 1, "a": 2}',
    "/* */ 1",
    "[1,]",
    '"\\x41"',
    "\ufeff1",
)
TEXTS = (
    "",
    ".",
    "..",
    "../x",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "\x00",
    "x\x00y",
    "\x1b[2J",
    "a" * 300,
    "a" * 70_000,
    "\u202e",
    "é",
    "\U0001f600",
    "$(id)",
    "%s%n",
    "{{ 7*7 }}",
    "__class__",
    "model",
    "nan",
    "inf",
    "-1",
    "re:(",
    "re:(a+)+$",
    "[/red]",
    "[link=x]",
    '"><script>',
    "\r\n",
    "2:4",
    "tile",
    "F32",
    "model.safetensors",
    "bitmask",
    "int8",
    "kvquant",
    "teal",
    "prune",
    "float32",
    "dense",
    "after:4",
)


def hostile(rng: random.Random) -> Any:
    """One value that no honest file has, or that stands where another type should."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(INTEGERS)
    if kind == 1:
        return Raw(rng.choice(LIMITS))
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice(
            (None, True, False, [], {}, [[]], {"": {}}, [None], 0.5, -0.5, 1.5, 1e-30, 1e30)
        )
    if kind == 4:
        return [hostile(rng) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(TEXTS): hostile(rng) for _ in range(rng.randrange(3))}
    return rng.uniform(-4, 4) if kind == 6 else rng.randrange(-3, 300)


@dataclass(frozen=True)
class Pairs:
    """An object that may have a key twice."""

    pairs: list[tuple[str, Any]]


def dumps(value: Any) -> str:
    """JSON, with Raw and Pairs as they are."""
    texts: list[str] = []

    def place(part: Any) -> str:
        if isinstance(part, Raw):
            texts.append(part.text)
        else:
            inside = (f"{json.dumps(name)}: {dumps(v)}" for name, v in part.pairs)
            texts.append("{" + ", ".join(inside) + "}")
        return f"@raw{len(texts) - 1}@"

    text = json.dumps(value, default=place)
    for number, raw in enumerate(texts):
        text = text.replace(f'"@raw{number}@"', raw, 1)
    return text


def mutate_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """The same JSON value with one place changed."""
    inside = isinstance(value, (dict, list)) and value and rng.random() < 0.92 ** (depth + 1)
    if not inside:
        return _changed(rng, value)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        kind = rng.randrange(12)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value, rng.choice(value)]
        return [*value[:at], mutate_value(rng, value[at], depth + 1), *value[at + 1 :]]
    name = rng.choice(list(value))
    kind = rng.randrange(14)
    if kind == 0:
        return {k: v for k, v in value.items() if k != name}
    if kind == 1:
        return {(rng.choice(TEXTS) if k == name else k): v for k, v in value.items()}
    if kind == 2:
        return Pairs([*value.items(), (name, hostile(rng))])
    if kind == 3:
        return {**value, rng.choice(TEXTS): hostile(rng)}
    if kind == 4:
        return {**value, name: value[rng.choice(list(value))]}
    return {**value, name: mutate_value(rng, value[name], depth + 1)}


def _changed(rng: random.Random, value: Any) -> Any:
    if type(value) in (int, float) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**6, value / 2, 0))
    if isinstance(value, str) and value and rng.random() < 0.3:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice((*TEXTS, value[-1])) + value[at + rng.randrange(2) :]
    return hostile(rng)


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """JSON text of `value`, changed in one place or a few, and now and then in its bytes."""
    for _ in range(1 if rng.random() < 0.7 else rng.randrange(2, 5)):
        if isinstance(value, (dict, list)):
            value = mutate_value(rng, value)
    data = dumps(value).encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, data) if rng.random() < 0.2 else data


def mutate_bytes(rng: random.Random, data: bytes, reach: int | None = None) -> bytes:
    """One to four changes of bytes, all within the first `reach`."""
    raw = bytearray(data)
    for _ in range(1 if rng.random() < 0.6 else rng.randrange(2, 5)):
        size = min(len(raw), reach or len(raw))
        at = rng.randrange(size + 1) if size else 0
        rng.choice(_CHANGES)(rng, raw, at)
    return bytes(raw)


def _flip(rng: random.Random, raw: bytearray, at: int) -> None:
    if at < len(raw):
        raw[at] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, raw: bytearray, at: int) -> None:
    raw[at : at + 1] = bytes(
        [rng.choice((0, 1, 127, 128, 255, 10, 34, 91, 123, rng.randrange(256)))]
    )


def _insert(rng: random.Random, raw: bytearray, at: int) -> None:
    raw[at:at] = rng.randbytes(rng.randrange(1, 9))


def _delete(rng: random.Random, raw: bytearray, at: int) -> None:
    del raw[at : at + rng.randrange(1, 17)]


def _cut(rng: random.Random, raw: bytearray, at: int) -> None:
    del raw[at:]


def _repeat(rng: random.Random, raw: bytearray, at: int) -> None:
    piece = raw[at : at + rng.randrange(1, 64)]
    raw[at:at] = piece * rng.randrange(1, 4)


def _word(rng: random.Random, raw: bytearray, at: int) -> None:
    form = rng.choice(("<I", "<Q", ">I", ">Q"))
    size = struct.calcsize(form)
    word = struct.pack(form, rng.choice(INTEGERS) % 2 ** (8 * size))
    at = at // 4 * 4 if rng.random() < 0.5 else at
    raw[at : at + size] = word


def _digits(rng: random.Random, raw: bytearray, at: int) -> None:
    """Another number for one in a text."""
    while at < len(raw) and not 48 <= raw[at] <= 57:
        at += 1
    end = at
    while end < len(raw) and 48 <= raw[end] <= 57:
        end += 1
    raw[at:end] = str(rng.choice(INTEGERS)).encode()


_CHANGES: Sequence[Callable[[random.Random, bytearray, int], None]] = (
    _flip, _byte, _insert, _delete, _cut, _repeat, _word, _digits,
)  # fmt: skip

YAML_PIECES = (
    "&a [*a]",
    "*a",
    "&a",
    "!!python/object/apply:os.system [id]",
    "!!python/name:os.system",
    "!!int x",
    "!!float 1",
    "!!binary ?",
    "!!timestamp 2001-99-99",
    "2001-12-14",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!map 5",
    "!!bool 3",
    "!!str [1]",
    "!<tag:x>",
    "? [1]\n: 2",
    "<<: *a",
    "<<: 5",
    "<<: [{a: 1}]",
    "|\n  x",
    ">-\n x",
    "---\n",
    "...\n",
    "%YAML 9.9\n---\n",
    "%TAG ! x\n---\n",
    "[" * 99,
    "{" * 99,
    "- " * 99,
    "a: " * 99,
    "\t",
    "\x00",
    "\ufeff",
    "\x85",
    "\u2028",
    '"\\ud800"',
    '"\\x00"',
    "'",
    '"',
    "#",
    ":",
    "- ",
    "\n",
    "  ",
    "[1, 2",
    "{a: 1}",
    "~",
    "yes",
    "0o7",
    "1_000",
    "0x1F",
    "1e5",
    ".inf",
    "-.inf",
    ".nan",
    "1e999",
    "9" * 5000,
    "12:30:45",
    "=",
    "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    ),
    "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 9)}]}}\n"
        for i in range(9)
    ),
)


def mutate_yaml(rng: random.Random, data: bytes, value: Any) -> bytes:
    """A YAML text, changed by pieces that mean something there; or JSON of `value`, which is YAML as well."""
    if rng.random() < 0.4:
        return mutate_json(rng, value)
    text = data.decode()
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1)
        if rng.random() < 0.5:  # where a value stands
            at = text.find(": ", at) + 2 if ": " in text[at:] else at
            end = text.find("\n", at) if rng.random() < 0.5 else at
            text = text[:at] + rng.choice(YAML_PIECES) + text[max(at, end) :]
        else:
            text = text[:at] + rng.choice((*YAML_PIECES, *TEXTS)) + text[at:]
    data = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, data) if rng.random() < 0.2 else data
