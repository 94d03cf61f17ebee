"""A recipe of several steps, as plain data: which there are, in which order, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.errors import RecipeError
from llmsqueeze.kv_recipe import KvRecipe
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.recipe_file import parse_yaml
from llmsqueeze.recipe_keys import suggest
from llmsqueeze.sparsify_recipe import SparsifyRecipe, ThresholdsRecipe

# In the order in which they are done: thresholds and codebooks are calibrated on the weights that will run.
Recipe = PruneRecipe | EncodeRecipe | SparsifyRecipe | ThresholdsRecipe | KvRecipe
RECIPES: dict[str, type[PruneRecipe | EncodeRecipe | SparsifyRecipe | KvRecipe]] = {
    "prune": PruneRecipe,
    "encode": EncodeRecipe,
    "sparsify": SparsifyRecipe,
    "quantize-kv": KvRecipe,
}


@dataclass(frozen=True)
class Step:
    """command: of RECIPES; recipe: its recipe."""

    command: str
    recipe: Recipe


def is_manifest(raw: Mapping[str, Any]) -> bool:
    """Whether it is a checkpoint's llmsqueeze.json."""
    return isinstance(raw.get("steps"), list) and "format_version" in raw


def parse_steps(raw: Mapping[str, Any]) -> list[Step]:
    """From a mapping of commands to their recipes, or from a checkpoint's manifest; RecipeError on others.

    A mapping's steps are done in the order of RECIPES. A manifest says what was done, so the same is done
    again, in its order.
    """
    if is_manifest(raw):
        steps = _recorded(raw["steps"])
    else:
        for command in raw:
            if command not in RECIPES:
                steps_ = ", ".join(RECIPES)
                raise RecipeError(
                    f"{command!r} is no step; steps are {steps_}{suggest(command, RECIPES)}",
                    (str(command),),
                )
        steps = [_step(command, raw[command]) for command in RECIPES if command in raw]
    if not steps:
        raise RecipeError(f"recipe: no step; steps are {', '.join(RECIPES)}")
    return steps


def resolved(steps: list[Step]) -> dict[str, Any]:
    """The recipe of steps with everything said, which parse_steps reads back."""
    if len({step.command for step in steps}) == len(steps):
        return {step.command: step.recipe.to_dict() for step in steps}
    # A mapping has every command once. Where one was done twice, it is written as manifests have it.
    done = [{"command": step.command, "recipe": step.recipe.to_dict()} for step in steps]
    return {"format_version": 1, "steps": done}


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with what `over` says put over it, key by key; an empty section leaves what is there."""
    merged = dict(under)
    for key, value in over.items():
        if isinstance(merged.get(key), Mapping) and (value is None or isinstance(value, Mapping)):
            merged[key] = merge(merged[key], value or {})
        else:
            merged[key] = value
    return merged


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """A recipe from texts like "sparsify.sparsity=0.4"; RecipeError on others."""
    import yaml

    found: dict[str, Any] = {}
    for text in settings:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {text}: write STEP.KEY=VALUE, as in sparsify.sparsity=0.4")
        try:
            nested: Any = parse_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"--set {text}: {value!r} is not a value") from error
        for key in reversed(keys):
            nested = {key: nested}
        found = merge(found, nested)
    return found


def _step(command: str, raw: Any) -> Step:
    if raw is not None and not isinstance(raw, dict):
        raise RecipeError("not a mapping of recipe keys to values", (command,))
    if raw and raw.get("method", "") is None and command == "sparsify":
        raise RecipeError(
            "it only read thresholds off stored curves; name its method", (command, "method")
        )
    try:
        return Step(command, RECIPES[command].from_dict(raw or {}))
    except RecipeError as error:
        raise error.within(command) from error


def _recorded(entries: list[Any]) -> list[Step]:
    """What a manifest says was done. Precision is what it was, whatever this machine would choose."""
    steps: list[Step] = []
    gated = False
    for entry in entries:
        command = entry.get("command") if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or not isinstance(command, str) or command not in RECIPES:
            raise RecipeError(f"recipe: {command!r} is no step; steps are {', '.join(RECIPES)}")
        raw = entry.get("recipe")
        if isinstance(raw, dict) and raw.get("dtype") == "auto" and entry.get("compute_dtype"):
            raw = {**raw, "dtype": entry["compute_dtype"]}
        if command == "sparsify" and gated and isinstance(raw, dict) and raw.get("method") is None:
            steps.append(Step(command, ThresholdsRecipe.from_dict(raw)))
        else:
            steps.append(_step(command, raw))
        gated = command == "sparsify" or (gated and command == "quantize-kv")
    return steps
