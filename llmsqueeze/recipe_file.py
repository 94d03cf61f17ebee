"""Recipe files: YAML read strictly, and the line in which a mistake stands."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsqueeze import untrusted
from llmsqueeze.errors import RecipeError

# Of a recipe, which has some dozens of values, a few within each other.
MOST_BYTES, MOST_NODES, MOST_DEPTH = 2**18, 100_000, 64


@functools.cache
def _loader() -> Any:
    """YAML as people mean it: 2:4 is a text, not the 124 of base 60, and 1e-5 a number, as in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise ValueError("is nested too deeply")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in numbers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(numbers[0], re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
    Loader.add_implicit_resolver(
        numbers[1],
        re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
        list("-+.0123456789"),
    )
    Loader.add_constructor(numbers[0], _integer)
    return Loader


def _integer(loader: Any, node: Any) -> int:
    digits = loader.construct_scalar(node)
    if len(digits) > 20:
        raise ValueError(f"holds an integer of more than 64 bits ({digits[:20]}…)")
    return int(digits)


def parse_yaml(text: str) -> Any:
    """One document as plain types; yaml.YAMLError or ValueError on others."""
    return _construct(_compose(text))


def check_yaml(text: str) -> None:
    """yaml.YAMLError or ValueError on what is no YAML, or too deep or large; tags may be any."""
    _compose(text)


def _compose(text: str) -> Any:
    """The document's node, None for an empty one; ValueError on one too large to be looked at."""
    import yaml

    try:
        node = yaml.compose(text, Loader=_loader())
        _size(node, {})
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    return node


# What PyYAML raises of a tag on what is not of its kind, as in !!bool 5.
_MISFITS = (RecursionError, TypeError, LookupError, AttributeError)


def _construct(node: Any) -> Any:
    loader = _loader()("")
    try:
        return None if node is None else loader.construct_document(node)
    except _MISFITS as error:
        raise ValueError(f"has a value that is none ({type(error).__name__})") from error
    finally:
        loader.dispose()


def _size(node: Any, known: dict[int, int]) -> int:
    """Nodes of YAML, those behind an alias (*name) as often as it stands there; ValueError on too many.

    A few lines of aliases of aliases can stand for more than any memory holds, or for themselves.
    """
    if id(node) not in known:
        known[id(node)] = MOST_NODES  # an alias within what it stands for
        inner = [] if node is None else node.value
        if isinstance(inner, str):
            inner.encode()  # fails on half of a surrogate pair, which no text can be written with
            inner = []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    if known[id(node)] >= MOST_NODES:
        raise ValueError(f"stands for {MOST_NODES:,} values or more by its aliases")
    return known[id(node)]


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file as plain types: YAML in the shape of a recipe's to_dict, any part left out.

    RecipeError if it cannot be read, is no mapping, or says a key twice (in YAML).
    """
    import yaml

    text = _read(path)
    twice = None
    try:
        if path.suffix == ".json":  # which YAML reads slowly, and numbers like 1e-05 as text
            raw = untrusted.parse_json(text)
        else:
            node = _compose(text)
            twice = _twice(node)
            raw = _construct(node)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not YAML ({untrusted.reason(error)})") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: not a mapping of recipe keys to values")
    if twice:
        raise RecipeError(f"{path}:{twice[1]}: {twice[0]!r} is there twice")
    return raw


@contextlib.contextmanager
def located(path: Path | None, besides: dict[str, Any] | None = None) -> Iterator[None]:
    """RecipeErrors that name a key of a recipe get file and line in front.

    besides: settings that do not come from the file.
    """
    try:
        yield
    except RecipeError as error:
        line = None
        if path and error.key and not _has(besides or {}, error.key):
            line = line_of(path, error.key)
        if line is None:
            raise
        raise RecipeError(f"{path}:{line}: {error}") from error


def line_of(path: Path, key: tuple[str, ...]) -> int | None:
    """The line, from 1, of the last part of `key` that stands in the file; None if none does."""
    import yaml

    text = _read(path)
    try:
        node = _compose(text) if len(text) <= MOST_BYTES else None
    except (yaml.YAMLError, ValueError):  # JSON indented by tabs
        return None
    line = None
    for name in key:
        found = [pair for pair in _pairs(node) if str(pair[0].value) == name]
        if not found:
            break
        line = found[0][0].start_mark.line + 1
        node = found[0][1]
    return line


def _has(raw: Any, key: tuple[str, ...]) -> bool:
    """Whether nested mappings have this path."""
    for name in key:
        if not isinstance(raw, dict) or name not in raw:
            return False
        raw = raw[name]
    return True


def _read(path: Path) -> str:
    most = untrusted.LARGE if path.suffix == ".json" else MOST_BYTES
    try:
        return untrusted.read_text(path, most)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} {untrusted.reason(error)}") from error


def _twice(node: Any) -> tuple[str, int] | None:
    """A key that a mapping has twice, of which YAML keeps the last without a word, and its second line."""
    seen = set()
    for key, value in _pairs(node):
        if isinstance(key.value, str):  # others are no keys, as is told later
            if key.value in seen:
                return key.value, key.start_mark.line + 1
            seen.add(key.value)
        if found := _twice(value):
            return found
    return None


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a YAML node; none if it is no mapping."""
    import yaml

    return node.value if isinstance(node, yaml.MappingNode) else []
