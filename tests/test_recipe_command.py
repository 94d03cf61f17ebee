"""`llmsqueeze recipe`, presets and settings: what is said in full, and where a mistake stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import (
    ACTIVATION_METHODS,
    ALLOCATIONS,
    KV_METHODS,
    REFITS,
    TILE_MODES,
    WEIGHT_METHODS,
)
from llmsqueeze.presets import PRESETS
from llmsqueeze.recipe_file import read_recipe
from llmsqueeze.recipe_schema import recipe_schema, step_schema
from llmsqueeze.step_recipes import RECIPES, merge, parse_settings, parse_steps, resolved

Cli = Callable[..., Any]
Tiny = Callable[..., Path]

RAW: list[dict[str, Any]] = [
    *[preset.recipe for preset in PRESETS.values()],
    *[{"prune": {"method": m, "refit": r}} for m in WEIGHT_METHODS for r in REFITS],
    *[{"prune": {"allocation": a, "target": {"pattern": "tile"}}} for a in ("uniform", "benefit")],
    *[{"prune": {"allocation": a}} for a in ALLOCATIONS if a != "benefit"],
    *[{"prune": {"tiles": t, "target": {"pattern": "tile"}}} for t in TILE_MODES],
    {"prune": {"target": {"pattern": "2:4-out", "channel_budget": 0.1}, "ignore": ["re:down"]}},
    *[{"sparsify": {"method": m}} for m in ACTIVATION_METHODS],
    *[{"quantize-kv": {"method": m}} for m in KV_METHODS],
    {command: None for command in RECIPES},
]


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("raw", RAW, ids=json.dumps)
def test_what_is_read_is_valid_short_and_in_full(raw: dict[str, Any], validator: Any) -> None:
    steps = parse_steps(raw)
    full = json.loads(json.dumps(resolved(steps)))
    assert parse_steps(full) == steps
    for recipe in (raw, full):
        validator.validate(recipe)
    manifest = {
        "format_version": 1,
        "steps": [{"command": s.command, "recipe": s.recipe.to_dict()} for s in steps],
    }
    validator.validate(json.loads(json.dumps(manifest)))
    for step in steps:
        jsonschema.validate(full[step.command], step_schema(RECIPES[step.command]))


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"squeeze": {}}, "squeeze", ""),
    ({"prunes": {}}, "prunes", "prune"),
    ({"prune": [1]}, "prune", ""),
    ({"prune": {"metod": "wanda"}}, "prune.metod", "method"),
    ({"prune": {"method": "wander"}}, "prune.method", "wanda"),
    ({"prune": {"target": {"sparsty": 0.5}}}, "prune.target.sparsty", "sparsity"),
    ({"prune": {"target": {"sparsity": "half"}}}, "prune.target.sparsity", ""),
    ({"prune": {"target": {"sparsity": True}}}, "prune.target.sparsity", ""),
    ({"prune": {"calibration": {"sample": 4}}}, "prune.calibration.sample", "samples"),
    ({"prune": {"calibration": {"samples": 4.5}}}, "prune.calibration.samples", ""),
    ({"prune": {"config": {"admm_step": 4}}}, "prune.config.admm_step", "admm_steps"),
    ({"prune": {"method": "dsnot", "config": {"swap": "no"}}}, "prune.config.swap", ""),
    ({"prune": {"ignore": "down_proj"}}, "prune.ignore", ""),
    ({"encode": {"to": "int4"}}, "encode.to", "int8"),
    ({"sparsify": {"allocation": "gredy"}}, "sparsify.allocation", "greedy"),
    ({"sparsify": {"sequential": "yes"}}, "sparsify.sequential", ""),
    ({"quantize-kv": {"bits": "4"}}, "quantize-kv.bits", ""),
    ({"quantize-kv": {"method": "fp8", "config": {"plain": True}}}, "quantize-kv.config.plain", ""),
]


@pytest.mark.parametrize(("raw", "path", "meant"), WRONG, ids=lambda w: str(w)[:60])
def test_mistakes_are_placed_and_refused_by_the_schema(
    raw: dict[str, Any], path: str, meant: str, validator: Any, cli: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("# first\n" + yaml.safe_dump(raw, default_flow_style=False))
    result = cli("recipe", "validate", file)
    assert result.exit_code == 2
    key = path.rpartition(".")[2]
    line = next(
        i for i, t in enumerate(file.read_text().splitlines(), 1) if t.strip().startswith(key)
    )
    assert f"{file}:{line}: recipe: {path}: " in result.stderr.replace("\n", "")
    assert (f"did you mean {meant!r}" in result.stderr) if meant else True
    assert not validator.is_valid(raw)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"prune": {"target": {"sparsity": 1.5}}}, "recipe: prune.target: sparsity 1.5"),
        ({"prune": {"target": {"pattern": "3:2"}}}, "recipe: prune.target: pattern 3:2"),
        ({"quantize-kv": {"bits": 7}}, "recipe: quantize-kv: --bits 7"),
        ({"sparsify": {"prefill": "some"}}, "recipe: sparsify: unknown policy 'some'"),
    ],
)
def test_what_no_schema_says_is_checked_too(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_steps(raw)
    assert str(caught.value).startswith(says)


def test_yaml_is_read_as_it_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("prune: {target: {pattern: 2:4}, refit_config: {refit_ridge: 1e-5}}\nencode:\n")
    raw = read_recipe(file)
    assert raw["prune"] == {"target": {"pattern": "2:4"}, "refit_config": {"refit_ridge": 1e-5}}
    parse_steps(raw)
    file.write_text("prune: {}\nencode: {}\nprune: {method: wanda}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: 'prune' is there twice"):
        read_recipe(file)


def test_files_go_over_presets_and_settings_over_both(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("sparsify: {sparsity: 0.3, prefix: 2}\nquantize-kv:\n")
    args = [
        "--preset",
        "fastest",
        "--set",
        "sparsify.prefix=8",
        "--set",
        "prune.target.pattern=2:4",
    ]
    result = cli("recipe", "show", file, *args, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document) == ["prune", "encode", "sparsify", "quantize-kv"]
    assert (document["sparsify"]["sparsity"], document["sparsify"]["prefix"]) == (0.3, 8)
    assert document["quantize-kv"]["bits"] == PRESETS["fastest"].recipe["quantize-kv"]["bits"]
    assert document["prune"]["target"]["pattern"] == "2:4"
    shown = cli("recipe", "show", file, *args)
    assert yaml.safe_load(shown.stdout) == document
    file.write_text(shown.stdout)
    assert json.loads(cli("recipe", "show", file, "--json").stdout) == document
    assert cli("recipe", "validate", file).exit_code == 0


def test_recipes_of_one_command(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("sparsity: 0.3\n")
    assert cli("recipe", "validate", file, "--step", "sparsify").exit_code == 0
    document = json.loads(cli("recipe", "show", file, "--step", "sparsify", "--json").stdout)
    assert document == RECIPES["sparsify"].from_dict({"sparsity": 0.3}).to_dict()
    assert cli("recipe", "validate", file).exit_code == 2
    result = cli("recipe", "validate", file, "--step", "prune")
    assert result.exit_code == 2 and f"{file}:1: recipe: sparsity" in result.stderr
    for args in (["show"], ["show", file, "--step", "sparsify", "--preset", "fastest"]):
        assert cli("recipe", *args).exit_code == 2


def test_the_schema_is_printed(cli: Cli) -> None:
    for args in ([], ["--json"]):
        assert json.loads(cli("recipe", "schema", *args).stdout) == recipe_schema()
    one = json.loads(cli("recipe", "schema", "--step", "quantize-kv").stdout)
    assert one == step_schema(RECIPES["quantize-kv"])


@pytest.mark.parametrize("text", ["sparsify", "=1", "sparsify..x=1", "sparsify.x=[1"])
def test_settings_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        parse_settings((text,))


def test_merging_changes_neither_side() -> None:
    under, over = {"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"x": 3}, "c": None}
    assert merge(under, over) == {"a": {"x": 3, "y": 2}, "b": 1, "c": None}
    assert under == {"a": {"x": 1, "y": 2}, "b": 1} and over == {"a": {"x": 3}, "c": None}


def test_settings_are_not_blamed_on_the_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "ok.yaml"
    file.write_text("sparsify:\n  sparsity: 0.4\n")
    for wrong in (
        "sparsify.sparsity=hello",
        "sparsify.sparsity=2024-13-45",
        "sparsify.sparsty=0.5",
    ):
        result = cli("recipe", "show", file, "--set", wrong)
        assert result.exit_code == 2 and "ok.yaml" not in result.stderr, result.stderr
        assert "spars" in result.stderr


def test_json_may_be_indented_by_tabs(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text('{\n\t"prune": {\n\t\t"methd": "wanda"\n\t}\n}')
    result = cli("recipe", "validate", file)
    assert result.exit_code == 2 and "did you mean 'method'?" in result.stderr


def test_what_show_prints_can_be_done(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    """Of a history that has a command twice, too; into directories that are not there yet."""
    once, twice = ({"command": "prune", "recipe": {"method": "magnitude", "target": {"sparsity": share}}}
                   for share in (0.3, 0.6))  # fmt: skip
    history, shown = tmp_path / "history.yaml", tmp_path / "shown.yaml"
    history.write_text(yaml.safe_dump({"format_version": 1, "steps": [once, twice]}))
    result = cli("recipe", "show", history)
    assert result.exit_code == 0, result.stderr
    shown.write_text(result.stdout)
    out = tmp_path / "not" / "there" / "out"
    result = cli("compress", tiny(), "-o", out, "--recipe", shown, "--device", "cpu", "-q")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads((out / "llmsqueeze.json").read_text())["steps"]) == 2


@pytest.mark.parametrize("windows", ["0", "-1"])
def test_a_search_needs_windows(cli: Cli, tiny: Tiny, tmp_path: Path, windows: str) -> None:
    args = ["compress", tiny(), "-o", tmp_path / "out", "--preset", "fastest", "--windows", windows]
    for target in ([], ["--target-ppl-ratio", 1.05]):
        assert cli(*args, *target).exit_code == 2


def test_a_wrong_choice_is_told_the_right_one(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    result = cli("compress", tiny(), "-o", tmp_path / "out", "--preset", "fastst")
    assert result.exit_code == 2 and "'careful'; did you mean 'fastest'?" in result.stderr
