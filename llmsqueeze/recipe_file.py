"""Recipe files: YAML read strictly, and the line in which a mistake stands."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsqueeze.errors import RecipeError


@functools.cache
def _loader() -> Any:
    """YAML as people mean it: 2:4 is a text, not the 124 of base 60, and 1e-5 a number, as in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

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
    return Loader


def parse_yaml(text: str) -> Any:
    """One document as plain types; yaml.YAMLError on others."""
    import yaml

    return yaml.load(text, Loader=_loader())


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file as plain types: YAML in the shape of a recipe's to_dict, any part left out.

    RecipeError if it cannot be read, is no mapping, or says a key twice (in YAML).
    """
    import yaml

    text = _read(path)
    twice = None
    try:
        if path.suffix == ".json":  # which YAML reads slowly, and numbers like 1e-05 as text
            raw = json.loads(text)
        else:
            raw = parse_yaml(text)
            twice = _twice(yaml.compose(text, Loader=_loader()))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
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

    try:
        node = yaml.compose(_read(path), Loader=_loader())
    except yaml.YAMLError:  # JSON indented by tabs
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
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not YAML (not UTF-8 text)") from error


def _twice(node: Any) -> tuple[str, int] | None:
    """A key that a mapping has twice, of which YAML keeps the last without a word, and its second line."""
    seen = set()
    for key, value in _pairs(node):
        if key.value in seen:
            return str(key.value), key.start_mark.line + 1
        seen.add(key.value if isinstance(key.value, str) else id(key))
        if found := _twice(value):
            return found
    return None


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a YAML node; none if it is no mapping."""
    import yaml

    return node.value if isinstance(node, yaml.MappingNode) else []
