"""`llmsqueeze compress`: one recipe for all steps, the same as the commands one after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe_schema import recipe_schema
from llmsqueeze.step_recipes import parse_steps

Cli = Callable[..., Any]
Tiny = Callable[..., Path]


@pytest.fixture
def recipe(text_file: Path) -> dict[str, Any]:
    calibration = {"text": str(text_file), "samples": 4, "seqlen": 24}
    return {
        # Whatever the order in the file.
        "quantize-kv": {"bits": 3, "calibration": calibration},
        "prune": {"method": "wanda", "target": {"sparsity": 0.5}, "calibration": calibration},
        "sparsify": {"method": "teal", "sparsity": 0.3, "calibration": calibration},
    }


def write(path: Path, recipe: Any) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def contents(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= {f"{file.name}:{name}": t for name, t in load_file(file).items()}
    return found


def same(one: Path, two: Path) -> bool:
    a, b = contents(one), contents(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_the_commands_one_after_another(
    cli: Cli, tiny: Tiny, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    options = ["--device", "cpu", "-q", "--json"]
    result = cli("compress", tiny(), "-o", out, "--recipe", write(tmp_path / "r", recipe), *options)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    commands = ["prune", "sparsify", "quantize-kv"]
    walks = [walk["commands"] for walk in document["walks"]]
    assert walks == [["prune", "sparsify"], ["quantize-kv"]]
    assert document["bytes_per_token"]["after"] < document["bytes_per_token"]["before"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r"]  # nothing is left over
    source = tiny()
    for command in commands:
        step = tmp_path / command
        file = write(tmp_path / f"{command}.yaml", recipe[command])
        result = cli(command, source, "-o", step, "--recipe", file, "--device", "cpu", "-q")
        assert result.exit_code == 0, result.stderr
        source = step
    assert same(out, source)
    made = Checkpoint(out)
    assert made.manifest and [s["command"] for s in made.manifest.steps] == commands
    assert made.activation and made.kv_cache
    assert cli("inspect", out, "--verify").exit_code == 0


# Everything that a manifest may hold: steps of every kind, repeated, and in orders of their own.
HISTORIES: dict[str, list[tuple[str, list[Any]]]] = {
    "prune": [("prune", ["--method", "wanda", "--refit", "pcg", "--pattern", "2:4"])],
    "tiles": [("prune", ["--pattern", "tile", "--tile", 16, "--sparsity", 0.3])],
    "magnitude": [("prune", ["--method", "magnitude"])],
    "owl": [("prune", ["--method", "dsnot", "--allocation", "owl", "--ignore", "down_proj"])],
    "encode": [("convert", ["--to", "llmsqueeze", "--encode", "int8"])],
    "encoded gates": [("sparsify", ["--encode", "int8", "--sparsity", 0.4])],
    "chess": [("sparsify", ["--method", "chess", "--prefill", "all"])],
    "rsparse": [("sparsify", ["--method", "rsparse", "--no-sequential"])],
    "other thresholds": [("sparsify", []), ("sparsify", ["--sparsity", 0.3])],
    "rotate": [("quantize-kv", ["--method", "rotate", "--bits", 3])],
    "kvquant": [("quantize-kv", ["--bits", 3, "--outliers", 0.05, "--seed", 2])],
    "all": [
        ("prune", ["--method", "sparsegpt", "--sparsity", 0.4]),
        ("sparsify", []),
        ("quantize-kv", ["--bits", 2]),
        ("sparsify", ["--sparsity", 0.25]),
    ],
    "again and backwards": [
        ("quantize-kv", ["--method", "fp8"]),
        ("sparsify", ["--method", "wina"]),
        ("prune", ["--method", "wanda", "--sparsity", 0.3]),
        ("prune", ["--method", "wanda", "--sparsity", 0.6]),
        ("sparsify", ["--sparsity", 0.2]),
    ],
}


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_a_manifest_makes_its_checkpoint_again(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path, history: str
) -> None:
    calibration = ["--calib", text_file, "--samples", 4, "--seqlen", 24, "--device", "cpu"]
    source = tiny()
    for index, (command, options) in enumerate(HISTORIES[history]):
        out = tmp_path / str(index)
        # Other thresholds are only read off stored curves where nothing else is asked for.
        plain = command == "convert" or (index and set(options[::2]) == {"--sparsity"})
        gates = command == "sparsify" and plain and Checkpoint(source).activation
        bare = command == "convert" or gates or {"rotate", "fp8"} & set(options)
        given = [*options, *([] if bare else calibration), "-q"]
        result = cli(command, source, "-o", out, *given)
        assert result.exit_code == 0, result.stderr
        source = out
    made, again = source / "llmsqueeze.json", tmp_path / "again"
    options = ["--device", "cpu", "-q", "--json"]
    result = cli("compress", tiny(), "-o", again, "--recipe", made, *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["reproduced"] is True
    assert same(source, again)
    steps = [json.loads(p.read_text())["steps"] for p in (made, again / "llmsqueeze.json")]
    kept = [[(s["command"], s["recipe"]) for s in given] for given in steps]
    for one, two in zip(*kept, strict=True):
        # Precision is said where it was left to the machine; all else is the same.
        both = [{**recipe, "dtype": None} for _, recipe in (one, two)]
        assert one[0] == two[0] and both[0] == both[1]
    validator = jsonschema.Draft202012Validator(recipe_schema())
    for file in (made, again / "llmsqueeze.json"):
        validator.validate(json.loads(file.read_text()))
    wrong = json.loads(made.read_text())
    wrong["steps"][0]["recipe"]["sparsty"] = 1
    assert not validator.is_valid(wrong)


def test_what_is_not_the_same_is_named(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    args = ["--set", f"sparsify.calibration={{text: {text}, samples: 2, seqlen: 24}}"]
    options = ["--device", "cpu", "-q", "--json"]
    one = tmp_path / "one"
    assert cli("compress", tiny(), "-o", one, *args, *options).exit_code == 0
    text.write_text("other " + text.read_text())
    made = ["--recipe", one / "llmsqueeze.json", *options]
    document = json.loads(cli("compress", tiny(), "-o", tmp_path / "two", *made).stdout)
    assert document["reproduced"] is False
    assert document["differences"] == [
        "other bytes in thresholds", "sparsify: another calibration text"
    ]  # fmt: skip
    result = cli("compress", tiny(), "-o", tmp_path / "four", *made, "--set", "prune.order=block")
    assert result.exit_code == 2 and "leave" in result.stderr


def test_a_step_without_settings_takes_its_defaults() -> None:
    (step,) = parse_steps({"quantize-kv": None})
    assert step.command == "quantize-kv"
    assert step.recipe == type(step.recipe).from_dict({})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "no step"),
        ({"squeeze": {}}, "'squeeze' is no step"),
        ({"prune": [1]}, "not a mapping"),
        ({"prune": {"metod": "wanda"}}, "metod"),
        ({"sparsify": {"method": None, "sparsity": 0.5}}, "stored curves"),
        (
            {"format_version": 1, "steps": [{"command": "squeeze", "recipe": {}}]},
            "'squeeze' is no step",
        ),
        (
            {
                "format_version": 1,
                "steps": [{"command": "sparsify", "recipe": {"method": None, "sparsity": 0.5}}],
            },
            "stored curves",
        ),
    ],
)
def test_recipes_that_are_none(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_steps(raw)


def test_a_failing_step_leaves_nothing(
    cli: Cli, tiny: Tiny, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    recipe["sparsify"]["ignore"] = ["no_such_module"]
    out = tmp_path / "out"
    given = write(tmp_path / "r", recipe)
    result = cli("compress", tiny(), "-o", out, "--recipe", given, "--device", "cpu", "-q")
    assert result.exit_code == 2
    assert "no_such_module" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_masks_can_be_trained_within_the_walk(
    cli: Cli,
    tiny: Tiny,
    tmp_path: Path,
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calibrating thresholds switches gradients off; training masks needs them."""
    from llmsqueeze import compress

    seen = []

    def learn_masks(*_: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        raise RecipeError("far enough")

    monkeypatch.setattr(compress, "learn_masks", learn_masks)
    recipe["prune"] |= {
        "target": {"pattern": "tile", "sparsity": 0.35, "tile": 16},
        "tiles": "tile",
    }
    given = write(tmp_path / "r", recipe)
    result = cli("compress", tiny(), "-o", tmp_path / "out", "--recipe", given, "--device", "cpu")
    assert "far enough" in result.stderr
    assert seen == [True]


def test_blocks_come_in_order_and_once(tiny: Tiny, tmp_path: Path, recipe: dict[str, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from llmsqueeze.compress import Pruning
    from llmsqueeze.recipe import PruneRecipe
    from llmsqueeze.streamed import StreamedCheckpoint
    from llmsqueeze.work import Work

    source = Checkpoint(tiny())
    cpu = torch.device("cpu")
    work = Work(tmp_path / "out", cpu)
    pruning = Pruning(source, PruneRecipe.from_dict(recipe["prune"]), cpu, work)
    pruning.prepare()
    with ThreadPoolExecutor() as pool:
        streamed = StreamedCheckpoint(pruning, "name", pool, lambda done: None)
        streamed.rewind({}, 8)
        outer = streamed.read(source.outer_parameters)
        assert all(
            torch.equal(outer[n], t) for n, t in source.read(source.outer_parameters).items()
        )
        first = streamed.read(streamed.block_parameters(0))
        assert any((t == 0).float().mean() > 0.45 for t in first.values())
        with pytest.raises(RuntimeError, match="block 1 was pruned"):
            streamed.read(streamed.block_parameters(2))
