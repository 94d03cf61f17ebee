"""Loading through transformers after `import llmsqueeze`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError
from llmsqueeze.runtime.gates import gating_of

Tiny = Callable[..., Path]


@pytest.fixture
def pruned(cli: Any, tiny: Tiny, tmp_path: Path, prune_args: list[Any]) -> Path:
    assert cli("prune", tiny(), "-o", tmp_path / "out", *prune_args).exit_code == 0
    return tmp_path / "out"


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"device_map": "cpu"}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float16])
def test_every_way_to_load_gives_the_same_weights(
    cli: Any, pruned: Path, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype | None
) -> None:
    dense = tmp_path / "dense"
    assert cli("convert", pruned, "-o", dense, "--to", "dense", "-q").exit_code == 0
    kwargs = {**options, **({"dtype": dtype} if dtype else {})}
    mine = AutoModelForCausalLM.from_pretrained(pruned, **kwargs)
    plain = AutoModelForCausalLM.from_pretrained(dense, **kwargs)
    for (name, a), (_, b) in zip(mine.named_parameters(), plain.named_parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    ids = torch.arange(3, 40, device=mine.device).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("gated", [False, True])
def test_loading_copies_no_checkpoint(
    cli: Any, pruned: Path, tmp_path: Path, text_file: Path, gated: bool, monkeypatch: Any
) -> None:
    """transformers deep-copies the quantizer for every tensor it decodes: it must be light."""
    if gated:
        options = ["--calib", text_file, "--samples", 2, "--seqlen", 24, "--device", "cpu", "-q"]
        assert cli("sparsify", pruned, "-o", tmp_path / "gated", *options).exit_code == 0

    def refuse(self: Checkpoint, memo: Any) -> Any:
        raise AssertionError("a checkpoint was copied")

    monkeypatch.setattr(Checkpoint, "__deepcopy__", refuse, raising=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gated" if gated else pruned)
    assert (gating_of(model) is not None) == gated


def test_saving_a_loaded_model_gives_a_plain_dense_checkpoint(pruned: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "before", ["import llmsqueeze; import transformers", "import transformers; import llmsqueeze"]
)
def test_import_order_does_not_matter(pruned: Path, before: str) -> None:
    code = (
        f"{before}; from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(pruned)!r});"
        "w = m.model.layers[0].mlp.down_proj.weight; print(int((w == 0).sum()) * 2 == w.numel())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("change", ["missing", "extra", "renamed"])
def test_missing_or_extra_tensors_are_an_error(pruned: Path, change: str) -> None:
    """transformers alone would initialise what is missing at random and go on."""
    file = pruned / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_mask"
    if change != "extra":
        moved = tensors.pop(name)
    if change == "renamed":
        tensors["model.layers.1.mlp.up_proj.weight_musk"] = moved
    if change == "extra":
        tensors["model.layers.1.mlp.extra.weight"] = torch.ones(2, 2)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(pruned)


def test_unknown_settings_are_an_error(pruned: Path) -> None:
    file = pruned / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["bits"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="bits"):
        AutoModelForCausalLM.from_pretrained(pruned)
