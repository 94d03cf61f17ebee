"""Encodings of a linear on disk, and rounding to eight bits: convert, sparsify and compress."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.encoded import EncodedCheckpoint
from llmsqueeze.encodings import ENCODINGS, smallest
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.numerics import int8
from llmsqueeze.sparsify import sparsify
from llmsqueeze.sparsify_recipe import SparsifyRecipe
from tests.conftest import load_dense
from tests.test_compress import same

Cli = Callable[..., Any]
Tiny = Callable[..., Path]


@pytest.fixture
def encoded(cli: Cli, tiny: Tiny, tmp_path: Path) -> Path:
    out = tmp_path / "encoded"
    result = cli("convert", tiny(), "-o", out, "--to", "llmsqueeze", "--encode", "int8", "-q")
    assert result.exit_code == 0, result.stderr
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("sparsity", "rounded", "expected"),
    [(0.0, False, "dense"), (0.5, False, "bitmask"), (0.0, True, "int8"), (0.9, True, "bitmask")],
)
def test_the_smallest_encoding_gives_the_weight_back(
    dtype: torch.dtype, sparsity: float, rounded: bool, expected: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    weight[torch.rand(48, 64, generator=generator) < sparsity] = 0
    if rounded:
        weight = int8.round_weight(weight)
    name, parts = smallest(weight)
    assert name == expected
    if name == "dense":
        assert not parts
        return
    encoding = ENCODINGS[name]
    assert tuple(parts) == encoding.parts
    assert parts[encoding.typed].dtype == dtype
    assert torch.equal(encoding.decode(parts, 64), weight)
    assert (
        sum(t.numel() * t.element_size() for t in parts.values()) < weight.numel() * dtype.itemsize
    )


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("codes", torch.zeros(4, 8, dtype=torch.uint8), "codes"),
        ("codes", torch.zeros(4, 9, dtype=torch.int8), "columns"),
        ("largest", torch.ones(3), "3 magnitudes .* for 4 rows"),
        ("largest", torch.tensor([1.0, -1.0, 1.0, 1.0]), "that are none"),
        ("largest", torch.tensor([1.0, torch.nan, 1.0, 1.0]), "that are none"),
    ],
)
def test_damaged_parts_are_told(part: str, value: torch.Tensor, message: str) -> None:
    parts = ENCODINGS["int8"].encode(torch.randn(4, 8)) | {part: value}
    with pytest.raises(ValueError, match=message):
        ENCODINGS["int8"].decode(parts, 8)


def test_every_linear_of_every_block_is_rounded(encoded: Path, tiny: Tiny) -> None:
    before, after = Checkpoint(tiny()), Checkpoint(encoded)
    weights = {f"{n}.weight" for i in range(before.block_count) for n in before.linears(i)}
    source, found = before.read(before.sources), after.read(after.sources)
    for name, tensor in source.items():
        expected = int8.round_weight(tensor) if name in weights else tensor
        assert torch.equal(found[name], expected), name
    assert after.manifest
    assert {f"{site}.weight" for site in after.manifest.sites} == weights
    assert {site.encoding for site in after.manifest.sites.values()} == {"int8"}
    for site in after.manifest.sites.values():
        assert site.bytes_after == site.shape[0] * (site.shape[1] + 2)
    (step,) = after.manifest.steps
    assert step["command"] == "encode" and 0.001 < step["rounding_error"] < 0.02
    assert after.stored_bytes < 0.8 * before.stored_bytes


def test_transformers_loads_what_was_encoded(encoded: Path, tiny: Tiny) -> None:
    model = load_dense(encoded)
    original = AutoModelForCausalLM.from_pretrained(tiny())
    for (name, found), weight in zip(model.named_parameters(), original.parameters(), strict=True):
        linear = ".layers." in name and name.endswith("proj.weight")
        assert torch.equal(found, int8.round_weight(weight) if linear else weight), name


def test_it_goes_back_and_forth(encoded: Path, cli: Cli, tmp_path: Path) -> None:
    dense, again = tmp_path / "dense", tmp_path / "again"
    assert cli("convert", encoded, "-o", dense, "--to", "dense", "-q").exit_code == 0
    assert cli("convert", dense, "-o", again, "--to", "llmsqueeze", "-q").exit_code == 0
    assert same(encoded, again)
    one, two = Checkpoint(encoded), Checkpoint(dense)
    weights = two.read(two.sources)
    assert all(torch.equal(t, weights[name]) for name, t in one.read(one.sources).items())
    result = cli("inspect", encoded, "--verify")
    assert result.exit_code == 0 and "int8" in result.stdout and "linears to int8" in result.stdout


def test_sparsify_calibrates_on_the_rounded_weights(
    encoded: Path, cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[object]
) -> None:
    at_once, later = tmp_path / "at-once", tmp_path / "later"
    result = cli("sparsify", tiny(), "-o", at_once, "--encode", "int8", *prune_args, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert 0.001 < document["rounding_error"] < 0.02
    per_token = document["bytes_per_token"]
    assert per_token["after"] < 0.7 * per_token["before"]
    assert cli("sparsify", encoded, "-o", later, *prune_args).exit_code == 0
    assert same(at_once, later)
    made = Checkpoint(at_once)
    assert [step["command"] for step in made.steps] == ["encode", "sparsify"]
    assert "rounded to int8" in (at_once / "README.md").read_text()


@pytest.mark.parametrize("pruned", [False, True])
def test_a_recipe_encodes_within_the_walk(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path, prune_args: list[object], pruned: bool
) -> None:
    calibration = {"text": str(text_file), "samples": 4, "seqlen": 24}
    recipe: dict[str, Any] = {
        "encode": None,
        "sparsify": {"method": "wina", "sparsity": 0.3, "calibration": calibration},
    }
    if pruned:
        recipe["prune"] = {
            "method": "wanda", "target": {"pattern": "2:4-out"}, "calibration": calibration,
        }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    options = ["--device", "cpu", "-q", "--json"]
    result = cli("compress", tiny(), "-o", out, "--recipe", file, *options)
    assert result.exit_code == 0, result.stderr
    (walk,) = json.loads(result.stdout)["walks"]
    assert walk["commands"] == [*(["prune"] if pruned else []), "encode", "sparsify"]
    source, step = tiny(), tmp_path / "step"
    if pruned:
        more = ["--method", "wanda", "--pattern", "2:4-out"]
        assert cli("prune", source, "-o", step, *more, *prune_args).exit_code == 0
        source = step
    options = ["--method", "wina", "--sparsity", 0.3, "--encode", "int8", *prune_args]
    assert cli("sparsify", source, "-o", tmp_path / "two", *options).exit_code == 0
    assert same(out, tmp_path / "two")
    again = tmp_path / "again"
    options = ["--device", "cpu", "-q"]
    made = cli("compress", tiny(), "-o", again, "--recipe", out / "llmsqueeze.json", *options)
    assert made.exit_code == 0, made.stderr
    assert same(out, again)


def test_a_recipe_may_only_encode(encoded: Path, cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text("encode: {to: int8}")
    assert cli("compress", tiny(), "-o", out, "--recipe", file, "-q").exit_code == 0
    assert same(encoded, out)


def test_what_was_calibrated_on_other_weights_is_left_out(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[object]
) -> None:
    gated, out = tmp_path / "gated", tmp_path / "out"
    assert cli("sparsify", tiny(), "-o", gated, *prune_args).exit_code == 0
    result = cli("convert", gated, "-o", out, "--to", "llmsqueeze", "--encode", "int8")
    assert result.exit_code == 0
    assert "sparsify OUT anew" in result.stderr
    assert Checkpoint(out).activation is None


def test_requests_that_make_no_sense(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("convert", tiny(), "-o", out, "--to", "dense", "--encode", "int8")
    assert result.exit_code == 2 and "--to llmsqueeze" in result.stderr
    assert not out.exists()
    with pytest.raises(RecipeError, match="choose from int8"):
        EncodeRecipe("int3")
    with pytest.raises(RecipeError, match="unknown key"):
        EncodeRecipe.from_dict({"bits": 8})


@pytest.mark.parametrize("change", ["missing", "dtype"])
def test_a_site_must_be_stored_as_its_encoding_says(encoded: Path, change: str) -> None:
    file = encoded / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_largest"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name].half()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        Checkpoint(encoded)


def test_rounding_comes_after_a_rotation(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    recipe = SparsifyRecipe.from_dict(
        {
            "rotate": True,
            "calibration": {"text": str(text_file), "samples": 4, "seqlen": 24},
        }
    )
    out = tmp_path / "out"
    sparsify(Checkpoint(tiny()), "x", out, recipe, torch.device("cpu"), encode=EncodeRecipe())
    made = Checkpoint(out)
    assert made.manifest
    assert {site.encoding for site in made.manifest.sites.values()} == {"int8"}


def test_a_rounded_checkpoint_says_nothing_of_what_belonged_to_others(encoded: Path) -> None:
    wrapped = EncodedCheckpoint(Checkpoint(encoded), "x", EncodeRecipe())
    assert wrapped.activation is None and wrapped.kv_cache is None
    names = wrapped.block_parameters(0)
    inner = Checkpoint(encoded).read(names)
    assert all(torch.equal(t, inner[name]) for name, t in wrapped.read(names).items())
    assert wrapped.rounding_error == 0
