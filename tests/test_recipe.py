"""Recipes: every part composes, in YAML and on the command line, and nothing unknown slips through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import ALLOCATIONS, REFITS, WEIGHT_METHODS
from llmsqueeze.prune_command import build_recipe
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.recipe_file import read_recipe

PATTERNS: list[dict[str, Any]] = [
    {"sparsity": 0.6, "pattern": "unstructured"},
    {"pattern": "2:4"},
    {"pattern": "4:8-out", "channel_budget": 0.1},
    {"pattern": "tile", "sparsity": 0.3, "tile": 64},
]


@pytest.mark.parametrize("target", PATTERNS, ids=lambda t: t["pattern"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("refit", REFITS)
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_dictionary_round_trip(method: str, refit: str, allocation: str, target: Any) -> None:
    raw = {"method": method, "refit": refit, "allocation": allocation, "target": target}
    recipe = PruneRecipe.from_dict(raw)
    again = PruneRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert (recipe.method, recipe.refit, recipe.allocation) == (method, refit, allocation)


def test_default_is_the_best_and_a_named_method_is_as_published() -> None:
    assert PruneRecipe.from_dict({}).refit == "pcg"
    assert PruneRecipe.from_dict({"target": {"pattern": "tile"}}).allocation == "benefit"
    assert PruneRecipe.from_dict({"method": "wanda"}).refit == "none"
    assert PruneRecipe.from_dict({"method": "wanda", "refit": "pcg"}).refit == "pcg"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"metod": "wanda"}, "metod"),
        ({"method": "wander"}, "wander"),
        ({"target": {"sparsty": 0.5}}, "sparsty"),
        ({"target": [1]}, "target: not a mapping"),
        ({"target": {"sparsity": "half"}}, "recipe:"),
        ({"calibration": {"sample": 3}}, "sample"),
        ({"config": {"damping": 1.0}}, "admm has no setting 'damping'"),
        ({"method": "wanda", "refit_config": {"refit_steps": 3}}, "none has no setting"),
        ({"dense_share": 1.5}, "outside [0, 1]"),
        ({"dense_share": "much"}, "recipe:"),
        ({"ignore": 5}, "recipe:"),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        PruneRecipe.from_dict(raw)
    assert says in str(caught.value)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({
            "method": "sparsegpt",
            "config": {"damping": 0.1, "block_size": 64},
            "target": {"sparsity": 0.7},
            "calibration": {"samples": 9, "seed": 4},
        })
    )  # fmt: skip
    recipe = build_recipe(read_recipe(file), {"damping": 0.2, "samples": 5, "refit": "pcg"})
    assert (recipe.config.damping, recipe.config.block_size) == (0.2, 64)
    assert (recipe.calibration.samples, recipe.calibration.seed) == (5, 4)
    assert recipe.target.sparsity == 0.7
    assert recipe.refit == "pcg"


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\xff"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        read_recipe(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")


def test_a_manifest_records_a_recipe_that_runs_again(
    cli: Any, tiny: Any, tmp_path: Path, prune_args: list[Any]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    args = ["--pattern", "2:4", "--method", "wanda", "--refit", "pcg", *prune_args]
    assert cli("prune", tiny(), "-o", one, *args).exit_code == 0
    recorded = json.loads((one / "llmsqueeze.json").read_text())["steps"][0]["recipe"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recorded))
    result = cli("prune", tiny(), "-o", two, "--recipe", file, "--device", "cpu", "-q")
    assert result.exit_code == 0, result.stderr
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


COMPOSED = [
    ["--method", "magnitude", "--refit", "pcg", "--pattern", "tile", "--tile", "16"],
    ["--method", "sparsegpt", "--refit", "pcg", "--pattern", "2:4-out", "--channel-budget", "0.1"],
    ["--method", "wanda", "--allocation", "owl", "--sparsity", "0.6"],
    ["--method", "dsnot", "--swap", "quadratic", "--refit", "pcg", "--pattern", "4:8"],
    ["--allocation", "alpha", "--order", "block", "--sparsity", "0.6"],
    ["--pattern", "tile", "--tile", "16", "--sparsity", "0.25"],
]


@pytest.mark.parametrize("args", COMPOSED, ids=" ".join)
def test_parts_compose_end_to_end(
    cli: Any, tiny: Any, tmp_path: Path, prune_args: list[Any], args: list[str]
) -> None:
    result = cli("prune", tiny(), "-o", tmp_path / "out", "--json", *prune_args, *args)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    wanted = 0.25 if "0.25" in args else 0.35 if "tile" in args else 0.5
    wanted = 0.6 if "0.6" in args else wanted
    assert document["sparsity"] == pytest.approx(wanted, abs=0.02)
    assert cli("inspect", tmp_path / "out", "--verify").exit_code == 0
    assert all(0 < site["relative_error"] < 1 for site in document["sites"])
