"""Damaged and hostile checkpoints: always one of our errors, never a traceback, never silent success."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmsqueeze import compress
    from llmsqueeze.methods.base import Target
    from llmsqueeze.methods.magnitude import Config
    from llmsqueeze.recipe import PruneRecipe

    out = tmp_path_factory.mktemp("fuzz") / "pruned"
    recipe = PruneRecipe("magnitude", Target(0.5), Config())
    compress.prune(Checkpoint(tiny()), "tiny", out, recipe, torch.device("cpu"))
    return out


def read_all(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return checkpoint.read(checkpoint.sources)


def header_size(data: bytes) -> int:
    return int(struct.unpack("<Q", data[:8])[0])


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_change_to_header_manifest_or_length_is_refused(
    pruned: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("mutant") / "checkpoint"
    shutil.copytree(pruned, path)
    name = data.draw(st.sampled_from(["model.safetensors", "llmsqueeze.json"]))
    raw = bytearray((path / name).read_bytes())
    reach = 8 + header_size(raw) if name.endswith("safetensors") else len(raw)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "overwrite"]))
    at = data.draw(st.integers(0, reach - 1))
    if kind == "flip":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del raw[at:]
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        new = data.draw(st.binary(min_size=1, max_size=9))
        if raw[at : at + len(new)] == new:
            return
        raw[at : at + len(new)] = new
    (path / name).write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value).strip()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_plain_checkpoint_with_a_damaged_header(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Without a manifest a header may change and stay valid; then it must mean the same tensors."""
    source = tiny()
    path = tmp_path_factory.mktemp("mutant") / "checkpoint"
    shutil.copytree(source, path)
    raw = bytearray((path / "model.safetensors").read_bytes())
    at = data.draw(st.integers(0, 7 + header_size(raw)))
    raw[at] = data.draw(st.integers(0, 255))
    (path / "model.safetensors").write_bytes(raw)
    try:
        tensors = read_all(path)
    except CheckpointError as error:
        assert "\n" not in str(error).strip()
        return
    original = read_all(source)
    assert tensors.keys() == original.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == original[name].shape


@given(
    st.dictionaries(
        st.sampled_from(["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
                         "vocab_size", "rope_parameters", "quantization_config", "hidden_act",
                         "layer_types", "max_position_embeddings", "torch_dtype", "auto_map"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=4,
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_hostile_config(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("mutant") / "checkpoint"
    shutil.copytree(tiny(), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    try:
        Checkpoint(path)
    except CheckpointError as error:
        assert str(error)


def copy(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(NAME), f"{NAME} is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra does not belong"),
        (lambda t: t.update({NAME: torch.ones(3, 3)}), "has shape"),
        (lambda t: t.update({NAME: t[NAME].long()}), "is I64"),
        (lambda t: t.update({NAME: t[NAME].t().contiguous()}), "has shape"),
        (lambda t: t[NAME].view(-1)[5].fill_(float("nan")), f"{NAME} holds NaN"),
        (lambda t: t[NAME].view(-1)[5].fill_(float("inf")), f"{NAME} holds NaN or Inf"),
    ],
)
def test_wrong_tensors_are_named(
    cli: Any, tiny: Tiny, tmp_path: Path, prune_args: list[Any], change: Any, says: str
) -> None:
    path = copy(tiny(), tmp_path)
    rewrite(path, change)
    result = cli("prune", path, "-o", tmp_path / "out", *prune_args)
    assert result.exit_code == 3
    assert says in result.stderr
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_activations_that_overflow_name_the_site(
    cli: Any, tiny: Tiny, tmp_path: Path, prune_args: list[Any]
) -> None:
    path = copy(tiny(), tmp_path)
    rewrite(path, lambda t: t["model.layers.1.input_layernorm.weight"].fill_(3e38))
    result = cli("prune", path, "-o", tmp_path / "out", *prune_args)
    assert result.exit_code == 3
    assert "model.layers.1.self_attn" in result.stderr
    result = cli(
        "eval",
        path,
        "--text",
        prune_args[1],
        "--seqlen",
        16,
        "--windows",
        2,
        "-q",
        "--device",
        "cpu",
    )
    assert result.exit_code == 3
    assert "not finite" in result.stderr


def sharded(tiny: Tiny, tmp_path: Path) -> Path:
    path = copy(tiny(max_shard_size="20KB"), tmp_path)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_many_shards_read_the_same(tiny: Tiny, tmp_path: Path) -> None:
    one, many = read_all(tiny()), read_all(sharded(tiny, tmp_path))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_any_index_name_is_fine(tiny: Tiny, tmp_path: Path) -> None:
    path = sharded(tiny, tmp_path)
    (path / "model.safetensors.index.json").rename(path / "weights.safetensors.index.json")
    read_all(path)


@pytest.mark.parametrize(
    "damage", ["shard", "entry", "moved", "outside", "json", "empty", "bin", "second"]
)
def test_index_that_lies(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    path = sharded(tiny, tmp_path)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    weight_map = index["weight_map"]
    first = next(iter(weight_map))
    if damage == "shard":
        (path / weight_map[first]).unlink()
    elif damage == "entry":
        del weight_map[first]
    elif damage == "moved":
        weight_map[first] = next(f for f in weight_map.values() if f != weight_map[first])
    elif damage == "outside":
        weight_map[first] = "../" + weight_map[first]
    elif damage == "empty":
        index["weight_map"] = {}
    elif damage == "bin":
        weight_map[first] = "model.bin"
    file.write_text(json.dumps(index) if damage != "json" else "{" * 100_000)
    if damage == "second":
        shutil.copy(file, path / "other.safetensors.index.json")
    with pytest.raises(CheckpointError):
        read_all(path)


def test_a_tensor_in_two_shards_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = sharded(tiny, tmp_path)
    shards = sorted(path.glob("*.safetensors"))
    tensors = load_file(shards[0])
    name, tensor = next(iter(load_file(shards[1]).items()))
    save_file({**tensors, name: tensor}, shards[0], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is in both"):
        read_all(path)


@pytest.mark.parametrize("end", [0, 5, 8, 100, -1, -1000])
def test_truncated_shard(cli: Any, tiny: Tiny, tmp_path: Path, end: int) -> None:
    path = copy(tiny(), tmp_path)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:end])
    for command in (["inspect", path], ["eval", path], ["prune", path, "-o", tmp_path / "out"]):
        result = cli(*command, "-q")
        assert result.exit_code == 3, result.stderr
        assert "model.safetensors" in result.stderr


def test_missing_pieces(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in cli("inspect", empty).stderr
    path = copy(tiny(), tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    result = cli("inspect", path)
    assert result.exit_code == 3
    assert "pickle" in result.stderr


def test_quantised_sources_are_refused(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    path = copy(tiny(), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    assert "already quantised by 'gptq'" in cli("inspect", path).stderr


def test_manifest_of_the_future_says_upgrade(pruned: Path, tmp_path: Path) -> None:
    from llmsqueeze.artifact import Manifest

    raw = json.loads((pruned / "llmsqueeze.json").read_text())
    raw["format_version"] = 2
    raw["novelty"] = True
    with pytest.raises(CheckpointError, match="upgrade llmsqueeze"):
        Manifest.from_json(json.dumps(raw))


def test_tied_weights_stored_twice(tiny: Tiny, tmp_path: Path) -> None:
    path = copy(tiny("opt"), tmp_path)
    embedding = "model.decoder.embed_tokens.weight"
    rewrite(path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert "lm_head.weight" not in read_all(path)
    rewrite(path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match="ties"):
        read_all(path)


def test_base_model_names_and_obsolete_buffers(tiny: Tiny, tmp_path: Path) -> None:
    path = copy(tiny(), tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    original = read_all(tiny())
    renamed = read_all(path)
    assert all(torch.equal(original[name], renamed[name]) for name in original)
