"""The options that say what to do as a whole: a preset, a recipe file over it, settings over both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llmsqueeze.errors import RecipeError
from llmsqueeze.presets import PRESETS
from llmsqueeze.recipe_file import located, read_recipe
from llmsqueeze.step_recipes import Step, is_manifest, merge, parse_settings, parse_steps

PRESET_SUMMARIES = "\n".join(f"  {name:<10}{entry.summary}" for name, entry in PRESETS.items())


@dataclass(frozen=True)
class Asked:
    """raw: as merged, without defaults; steps: parsed; manifest: the file, if it is a checkpoint's record."""

    raw: dict[str, Any]
    steps: list[Step]
    manifest: Path | None


def preset_option(body: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--preset", type=click.Choice(list(PRESETS)), help="A recipe by its goal; a file is put over it."
    )(body)  # fmt: skip


def set_option(body: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--set", "settings", multiple=True, metavar="STEP.KEY=VALUE",
        help="One setting over preset and file, as in sparsify.sparsity=0.4. Repeatable.",
    )(body)  # fmt: skip


def recipe_options(body: Callable[..., None]) -> Callable[..., None]:
    """--preset, --recipe and --set; see ask."""
    option = click.option(
        "--recipe", type=click.Path(path_type=Path), metavar="FILE",
        help="YAML with the steps, or the llmsqueeze.json of a checkpoint.",
    )  # fmt: skip
    return preset_option(option(set_option(body)))


def ask(preset: str | None, recipe: Path | None, settings: tuple[str, ...]) -> Asked | None:
    """What the options say together; None if they say nothing.

    RecipeError on a mistake, with the file's line where it stands in one.
    """
    if not (preset or recipe or settings):
        return None
    read = read_recipe(recipe) if recipe else {}
    manifest = recipe if is_manifest(read) else None
    if manifest and (preset or settings):
        raise RecipeError(
            f"{recipe} is the record of a checkpoint, which is made again as it was: leave --preset and "
            "--set out"
        )
    raw = merge(PRESETS[preset].recipe if preset else {}, read)
    over = parse_settings(settings)
    raw = merge(raw, over)
    with located(recipe, over):
        return Asked(raw, parse_steps(raw), manifest)
