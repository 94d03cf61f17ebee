"""Keys and values of recipes as their dataclasses declare them: JSON Schema of fields, and checks of values.

A field's type, default and metadata say all of it. metadata: "help"; "choices", what a string may be;
"resolved", its default follows from other keys, which is what null stands for.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from llmsqueeze.errors import RecipeError

_TYPES: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
_NAMES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list of texts",
    "null": "nothing",
}


def field_schemas(record: type) -> dict[str, dict[str, Any]]:
    """The JSON Schema of every field that is a plain value; sections have schemas of their own."""
    hints = typing.get_type_hints(record)
    found = {}
    for field in dataclasses.fields(record):
        schema = type_schema(hints[field.name])
        if schema is None:
            continue
        choices = field.metadata.get("choices")
        if choices:
            schema["enum"] = list(choices)
        if "help" in field.metadata:
            schema["description"] = field.metadata["help"]
        if field.metadata.get("resolved"):
            schema = nullable(schema)
        elif field.default is not dataclasses.MISSING:
            schema["default"] = (
                list(field.default) if isinstance(field.default, tuple) else field.default
            )
        found[field.name] = schema
    return found


def type_schema(hint: Any) -> dict[str, Any] | None:
    """Of a plain type, or None for one that is a section: `int`, `str | None`, `tuple[str, ...]`."""
    if typing.get_origin(hint) is tuple:
        return {"type": "array", "items": {"type": "string"}}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [_TYPES.get(t, "null") for t in typing.get_args(hint)]
        return {"type": kinds} if len(set(kinds)) == len(kinds) else None
    return {"type": _TYPES[hint]} if hint in _TYPES else None


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, or nothing: what stands for the default."""
    changed = {**schema, "type": [*_kinds(schema), "null"]}
    if "enum" in schema:
        changed["enum"] = [*schema["enum"], None]
    return changed


def check_section(
    raw: Mapping[str, Any], schemas: Mapping[str, dict[str, Any]], known: Iterable[str] = ()
) -> None:
    """RecipeError on a key that is neither in schemas nor in known, or a value that its schema refuses."""
    names = [*schemas, *known]
    for key, value in raw.items():
        if key not in names:
            raise RecipeError(f"unknown key {key!r}{suggest(key, names)}", (str(key),))
        if key in schemas:
            _check(key, value, schemas[key])


def _check(key: str, value: Any, schema: dict[str, Any]) -> None:
    kinds = _kinds(schema)
    if not any(_is(value, kind) for kind in kinds):
        wanted = " or ".join(_NAMES[kind] for kind in kinds if kind != "null")
        raise RecipeError(f"{value!r} is not {wanted}", (key,))
    choices = [c for c in schema.get("enum", ()) if c is not None]
    if choices and value is not None and value not in choices:
        hint = suggest(value, choices)
        raise RecipeError(
            f"{value!r} is no choice{hint or '; choose from ' + ', '.join(choices)}", (key,)
        )


def suggest(given: Any, known: Iterable[str]) -> str:
    """ "; did you mean …?", or nothing if nothing is like it."""
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _kinds(schema: dict[str, Any]) -> list[str]:
    kind = schema["type"]
    return [kind] if isinstance(kind, str) else list(kind)


def _is(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str)
    if kind == "array":
        return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
    if kind == "number" and isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
