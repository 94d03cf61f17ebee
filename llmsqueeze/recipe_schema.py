"""JSON Schema of recipes, from the dataclasses that read them.

What depends on several keys at once (a pattern that implies a sparsity, bits that a method has) and the
ranges of numbers are left to `recipe validate`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.kv_recipe import DEFAULT_KV_METHOD, KvRecipe
from llmsqueeze.methods import (
    ACTIVATION_METHODS,
    ALLOCATIONS,
    DEFAULT_METHOD,
    DEFAULT_REFIT,
    KV_METHODS,
    REFITS,
    TILE_MODES,
    WEIGHT_METHODS,
    Entry,
    load_entry,
)
from llmsqueeze.recipe import Calibration, PruneRecipe, target_schemas
from llmsqueeze.recipe_keys import field_schemas
from llmsqueeze.sparsify_recipe import (
    DEFAULT_ACTIVATION_METHOD,
    SparsifyRecipe,
    ThresholdsRecipe,
)
from llmsqueeze.step_recipes import RECIPES

Schema = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """A section with the keys of the Config that another key chooses. default: its choice if left out."""

    chosen_by: str
    table: dict[str, Entry]
    default: str


SETTINGS: dict[type, dict[str, Settings]] = {
    PruneRecipe: {
        "config": Settings("method", WEIGHT_METHODS, DEFAULT_METHOD),
        # Which is the default depends on whether a method is named: settings are allowed either way.
        "refit_config": Settings("refit", REFITS, DEFAULT_REFIT),
        "allocation_config": Settings("allocation", ALLOCATIONS, "uniform"),
        "tiles_config": Settings("tiles", TILE_MODES, "score"),
    },
    EncodeRecipe: {},
    SparsifyRecipe: {"config": Settings("method", ACTIVATION_METHODS, DEFAULT_ACTIVATION_METHOD)},
    KvRecipe: {"config": Settings("method", KV_METHODS, DEFAULT_KV_METHOD)},
}


def recipe_schema() -> Schema:
    """Of a file for `compress --recipe`: a recipe, or the manifest of a checkpoint."""
    steps = {command: step_schema(kind) for command, kind in RECIPES.items()}
    recorded = [
        {
            "if": {"properties": {"command": {"const": command}}},
            "then": {"properties": {"recipe": _recorded(command, schema)}},
        }
        for command, schema in steps.items()
    ]
    entry = {
        "type": "object",
        "properties": {"command": {"enum": list(RECIPES)}},
        "required": ["command", "recipe"],
        "allOf": recorded,
    }
    manifest = {
        "type": "object",
        "properties": {"steps": {"type": "array", "items": entry, "minItems": 1}},
    }
    recipe = {
        "type": "object",
        "properties": {command: _or_nothing(schema) for command, schema in steps.items()},
        "additionalProperties": False,
        "minProperties": 1,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of llmsqueeze compress",
        "if": {"type": "object", "required": ["format_version", "steps"]},
        "then": manifest,
        "else": recipe,
    }


def step_schema(kind: type) -> Schema:
    """Of the recipe of one step, as its command's own --recipe takes it."""
    properties: Schema = dict(field_schemas(kind))
    conditions = []
    for field in dataclasses.fields(kind):
        settings = SETTINGS[kind].get(field.name)
        if settings:
            properties[field.name] = {"type": ["object", "null"]}
            conditions += _conditions(field.name, settings)
        elif field.name == "target":
            properties["target"] = _section(target_schemas())
        elif field.name == "calibration":
            properties["calibration"] = _section(field_schemas(Calibration))
    schema: Schema = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    return {**schema, "allOf": conditions} if conditions else schema


def _conditions(section: str, settings: Settings) -> list[Schema]:
    """What a section may hold, by the value of the key that chooses."""
    found = []
    for choice in settings.table:
        module = load_entry(settings.table, choice)
        then = _section(field_schemas(module.Config) if module else {})
        chosen: Schema = {"properties": {settings.chosen_by: {"const": choice}}}
        if choice == settings.default:  # a key that is not there meets any condition on its value
            chosen = {"properties": {settings.chosen_by: {"enum": [choice, None]}}}
        else:
            chosen["required"] = [settings.chosen_by]
        found.append({"if": chosen, "then": {"properties": {section: then}}})
    return found


def _section(schemas: dict[str, Schema]) -> Schema:
    return {"type": ["object", "null"], "properties": schemas, "additionalProperties": False}


def _or_nothing(schema: Schema) -> Schema:
    return {**schema, "type": ["object", "null"]}


def _recorded(command: str, schema: Schema) -> Schema:
    """Of a step in a manifest, where thresholds may have been read off stored curves."""
    if command != "sparsify":
        return _or_nothing(schema)
    thresholds = {
        "type": "object",
        "properties": {**field_schemas(ThresholdsRecipe), "method": {"type": "null"}},
        "required": ["method", "sparsity"],
        "additionalProperties": False,
    }
    read_off = {"properties": {"method": {"type": "null"}}, "required": ["method"]}
    return {"if": read_off, "then": thresholds, "else": _or_nothing(schema)}
