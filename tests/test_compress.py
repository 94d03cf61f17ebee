"""`llmsqueeze compress`: one recipe for all steps, the same as the commands one after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import RecipeError
from llmsqueeze.steps import parse_steps

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


def test_a_manifest_makes_its_checkpoint_again(
    cli: Cli, tiny: Tiny, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    del recipe["quantize-kv"]
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--device", "cpu", "-q"]
    given = write(tmp_path / "r", recipe)
    assert cli("compress", tiny(), "-o", one, "--recipe", given, *options).exit_code == 0
    again = cli("compress", tiny(), "-o", two, "--recipe", one / "llmsqueeze.json", *options)
    assert again.exit_code == 0, again.stderr
    assert same(one, two)


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
            {"format_version": 1, "steps": [{"command": "prune", "recipe": {}}] * 2},
            "prune is there twice",
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
