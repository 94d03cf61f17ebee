"""`llmsqueeze recipe`: what a recipe says in full, whether it is one, and what one may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import light
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe_file import located, read_recipe
from llmsqueeze.recipe_options import PRESET_SUMMARIES, ask, preset_option, set_option
from llmsqueeze.recipe_schema import recipe_schema, step_schema
from llmsqueeze.step_recipes import RECIPES, resolved

if TYPE_CHECKING:
    from llmsqueeze.console import Console

step_option = click.option(
    "--step", type=click.Choice(list(RECIPES)),
    help="FILE is the recipe of this command alone, as its own --recipe takes it.",
)  # fmt: skip


@click.group()
def recipe() -> None:
    """Show, validate and describe the recipes of compress."""


@recipe.command(
    help=f"""Print a recipe with every default filled in, as YAML or with --json as JSON.

FILE is a recipe, or the llmsqueeze.json of a checkpoint.

\b
Presets:
{PRESET_SUMMARIES}
"""
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@preset_option
@set_option
@step_option
@light
def show(
    console: Console, file: Path | None, preset: str | None, settings: tuple[str, ...], step: str | None
) -> None:  # fmt: skip
    import yaml

    if step:
        if file is None or preset or settings:
            raise RecipeError("--step reads FILE alone: leave --preset and --set out")
        document = _alone(file, step)
    else:
        asked = ask(preset, file, settings)
        if asked is None:
            raise RecipeError("give a FILE or --preset NAME")
        document = resolved(asked.steps)
    console.stream(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    console.result(document)


@recipe.command()
@click.argument("file", type=click.Path(path_type=Path))
@step_option
@light
def validate(console: Console, file: Path, step: str | None) -> None:
    """Check FILE: exit code 0 if it is a recipe, 2 and where it is wrong if not.

    The checkpoint that it will meet, and texts that it names, are not looked at.
    """
    if step:
        _alone(file, step)
        commands = [step]
    else:
        asked = ask(None, file, ())
        assert asked is not None
        commands = [done.command for done in asked.steps]
    console.stream(f"{file}: {', '.join(commands)}\n")
    console.result({"file": str(file), "steps": commands, "valid": True})


@recipe.command()
@step_option
@light
def schema(console: Console, step: str | None) -> None:
    """Print the JSON Schema of recipe files, for editors and other tools."""
    document = step_schema(RECIPES[step]) if step else recipe_schema()
    console.stream(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    console.result(document)


def _alone(file: Path, step: str) -> dict[str, Any]:
    raw = read_recipe(file)
    with located(file):
        return RECIPES[step].from_dict(raw).to_dict()
