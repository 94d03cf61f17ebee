"""`plan --recipe`: what it says beforehand, against what compress then makes and takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Cli = Callable[..., Any]
Tiny = Callable[..., Path]

RECIPES: dict[str, dict[str, Any]] = {
    "half": {"prune": {"method": "wanda"}},
    "little": {"prune": {"method": "wanda", "target": {"sparsity": 0.03}}},
    "tile": {"prune": {"method": "wanda", "target": {"pattern": "tile", "tile": 16}}},
    "int8": {"encode": None},
    "gates": {"sparsify": {"sparsity": 0.4, "ignore": ["v_proj"]}},
    "chess": {"sparsify": {"method": "chess", "allocation": "uniform"}},
    "cache": {"quantize-kv": {"bits": 3}},
    "all": {
        "prune": {"method": "magnitude", "target": {"sparsity": 0.7}},
        "encode": {},
        "sparsify": {"sparsity": 0.5},
        "quantize-kv": {"method": "rotate"},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_are_what_compress_makes(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path, name: str
) -> None:
    recipe = RECIPES[name]
    for command, settings in recipe.items():
        if command in ("prune", "sparsify", "quantize-kv"):
            recipe[command] = {
                **(settings or {}),
                "calibration": {"text": str(text_file), "samples": 4, "seqlen": 24},
            }
    file = tmp_path / "r"
    file.write_text(yaml.safe_dump(recipe))
    # Wide enough that thresholds, which some linears share, count for little.
    source = tiny("llama", hidden_size=128, intermediate_size=384, num_hidden_layers=2)
    options = ["--recipe", file, "--device", "cpu", "--json"]
    result = cli("plan", source, *options)
    assert result.exit_code == 0, result.stderr
    planned = json.loads(result.stdout)
    result = cli("compress", source, "-o", tmp_path / "out", *options, "-q")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert planned["bytes"]["before"] == made["bytes"]["before"]
    assert planned["bytes"]["after"] == pytest.approx(made["bytes"]["after"], rel=0.01)
    assert planned["bytes_per_token"]["before"] == made["bytes_per_token"]["before"]
    found = made["bytes_per_token"]["after"]
    assert planned["bytes_per_token"]["after"] == pytest.approx(found, rel=0.02)
    assert (planned["blocks"], planned["linears"]) == (2, 14)
    assert [step["command"] for step in planned["steps"]] == list(recipe)
    assert planned["seconds"] > 0 and planned["peak_rss_bytes"] > 0
    assert planned["peak_device_bytes"] is None


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "admm"])
def test_eight_bits_stay_where_pruning_fits_nothing(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path, method: str
) -> None:
    source, out = tmp_path / "int8", tmp_path / "out"
    whole = tiny("llama", hidden_size=128, intermediate_size=384, num_hidden_layers=2)
    assert (
        cli("convert", whole, "-o", source, "--to", "llmsqueeze", "--encode", "int8").exit_code == 0
    )
    settings = [f"method={method}", f"calibration.text={text_file}", "calibration.samples=4",
                "calibration.seqlen=24"]  # fmt: skip
    given = ["--device", "cpu", "--json"]
    for setting in settings if method != "magnitude" else settings[:1]:
        given += ["--set", f"prune.{setting}"]
    planned = json.loads(cli("plan", source, *given).stdout)
    made = json.loads(cli("compress", source, "-o", out, *given, "-q").stdout)
    assert planned["bytes"]["after"] == pytest.approx(made["bytes"]["after"], rel=0.01)
    assert cli("plan", source, *given, "--memory", "24GB").exit_code == 2


def test_kernels_are_named_and_dense_is_no_gain(cli: Cli, tiny: Tiny) -> None:
    def kernels(*settings: str) -> dict[str, int]:
        given = [part for setting in settings for part in ("--set", setting)]
        document = json.loads(cli("plan", tiny(), *given, "--device", "cpu", "--json").stdout)
        found: dict[str, int] = document["kernels"]
        return found

    assert kernels("prune.target.sparsity=0.5") == {"values and gaps": 21}
    assert kernels("prune.target.sparsity=0.2") == {"dense": 21}
    pattern = "prune.target.pattern=2:4"
    assert kernels(pattern, "prune.ignore=[down_proj]") == {"sparse tensor cores": 18, "dense": 3}
    assert kernels("encode.to=int8", "sparsify.ignore=[v_proj]") == {
        "columns of 8 bits, skipped": 18,
        "columns of 8 bits": 3,
    }
    args = ["--set", "prune.target.sparsity=0.2", "--device", "cpu"]
    assert "none in decoding" in cli("plan", tiny(), *args).stdout
    assert cli("plan", tiny(), "--set", "prune.target.pattern=3:7").exit_code == 2


def test_trained_masks_have_no_estimate(cli: Cli, tiny: Tiny) -> None:
    args = ["--set", "prune.target.pattern=tile", "--set", "prune.tiles=tile", "--device", "cpu"]
    document = json.loads(cli("plan", tiny(), *args, "--json").stdout)
    assert document["seconds"] is None
