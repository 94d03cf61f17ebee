"""Loading through transformers after `import llmsqueeze`."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import llmsqueeze
from llmsqueeze import LlmsqueezeConfig
from llmsqueeze.bench_model import formats_of
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.ops import cpu
from llmsqueeze.runtime import load
from llmsqueeze.runtime.gates import gating_of
from llmsqueeze.runtime.packed import BitmaskLinear, DenseLinear, StoredEmbedding
from tests.conftest import MIXTURES, TINY
from tests.test_cpu_kernels import IDS, logits, off

Tiny = Callable[..., Path]
DENSE = {"quantization_config": LlmsqueezeConfig(dequantize=True)}
ANSWER = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def pruned(cli: Any, tiny: Tiny, tmp_path: Path, prune_args: list[Any]) -> Path:
    assert cli("prune", tiny(), "-o", tmp_path / "out", *prune_args).exit_code == 0
    return tmp_path / "out"


@pytest.fixture
def made(cli: Any, tiny: Tiny, tmp_path: Path, text_file: Path) -> Callable[..., Path]:
    """A checkpoint after some commands."""

    def make(*steps: str, family: str = "llama") -> Path:
        calib = ("--calib", text_file, "--samples", 2, "--seqlen", 24)
        options: dict[str, tuple[Any, ...]] = {
            "prune": ("--method", "magnitude", "--sparsity", 0.5),
            "convert": ("--to", "llmsqueeze", "--encode", "int8"),
            "sparsify": ("--sparsity", 0.5, *calib),
            "quantize-kv": ("--method", "rotate", "--bits", 4),
        }
        # No kernel attends over keys of ten elements.
        path = tiny(family, **({"head_dim": 64} if "quantize-kv" in steps else {}))
        for number, step in enumerate(steps):
            out = tmp_path / "-".join((family, *steps[: number + 1]))
            result = cli(step, path, "-o", out, *options[step], "-q")
            assert result.exit_code == 0, result.stderr
            path = out
        return path

    return make


def plain(path: Path, **options: Any) -> Any:
    """With dense weights."""
    return AutoModelForCausalLM.from_pretrained(path, **DENSE, **options)


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"device_map": "cpu"}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float16])
def test_every_way_to_load_gives_the_same_weights(
    cli: Any, pruned: Path, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype | None
) -> None:
    out = tmp_path / "dense"
    assert cli("convert", pruned, "-o", out, "--to", "dense", "-q").exit_code == 0
    kwargs = {**options, **({"dtype": dtype} if dtype else {})}
    mine = plain(pruned, **kwargs)
    theirs = AutoModelForCausalLM.from_pretrained(out, **kwargs)
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    ids = torch.arange(3, 40, device=mine.device).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float16])
def test_every_way_to_load_gives_kernels(
    pruned: Path, options: dict[str, Any], dtype: torch.dtype | None, caplog: Any
) -> None:
    kwargs = {**options, **({"dtype": dtype} if dtype else {})}
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(
            pruned, output_loading_info=True, **kwargs
        )
    assert not any(info.values()) and not caplog.records
    assert formats_of(model) == {"bitmask": 21, "dense": 1}
    assert not model.training and model.dtype == (dtype or torch.bfloat16)
    assert model.device.type == "cpu"
    dense = plain(pruned, **kwargs)
    assert model.generation_config.to_dict() == dense.generation_config.to_dict()
    # Of one precision: no further from fp64's logits than twice as far as the dense model.
    exact = logits(plain(pruned, dtype=torch.float64), IDS[:, :1])
    error = off(logits(dense, IDS[:, :1]), exact)
    assert off(logits(model, IDS[:, :1]), exact) <= 2 * error + 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is the GPU")
def test_auto_is_the_cpu_where_there_is_no_gpu(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned, device_map="auto")
    assert formats_of(model)["bitmask"] == 21


@pytest.mark.parametrize("family", sorted(TINY))
def test_generate_gives_the_dense_models_tokens(made: Callable[..., Path], family: str) -> None:
    path = made("prune", family=family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    dense = plain(path, dtype=torch.float32)
    assert "bitmask" in formats_of(model) and not formats_of(dense)
    assert torch.equal(model.generate(IDS, **ANSWER), dense.generate(IDS, **ANSWER))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    found, expected = (
        m.generate(IDS, attention_mask=mask, num_beams=2, **ANSWER) for m in (model, dense)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "steps, format",
    [
        (("convert",), "int8"),
        (("sparsify",), "gated"),
        (("prune", "sparsify"), "gated bitmask"),
        (("convert", "sparsify"), "gated int8"),
        (("prune", "quantize-kv"), "bitmask"),
        (("prune", "sparsify", "quantize-kv"), "gated bitmask"),
    ],
)
def test_eight_bits_gates_and_caches(
    made: Callable[..., Path], steps: tuple[str, ...], format: str
) -> None:
    """The same as what `run` computes with, to which tests/test_mapped.py compares dense models."""
    path = made(*steps)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    same = load(Checkpoint(path), torch.float32, torch.device("cpu"), kernels=True)
    assert format in formats_of(model) and formats_of(model) == formats_of(same)
    assert (gating_of(model) is not None) == ("sparsify" in steps)
    for ids in (IDS, IDS[:1, :1]):
        assert torch.equal(logits(model, ids), logits(same, ids))
    if "quantize-kv" not in steps:
        assert torch.equal(model.generate(IDS, **ANSWER), same.generate(IDS, **ANSWER))
        return
    for tokens in (64, None):  # in tiles, and growing
        caches = [llmsqueeze.kv_cache(m, tokens=tokens) for m in (model, same)]
        found = [
            m.generate(IDS[:1], past_key_values=cache, **ANSWER)
            for m, cache in zip((model, same), caches, strict=True)
        ]
        assert torch.equal(*found)


def test_weights_stay_in_the_file(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    kinds = (BitmaskLinear, DenseLinear, StoredEmbedding)
    held = [b for m in model.modules() if isinstance(m, kinds) for b in m.buffers()]
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split()
        if file == str(pruned / "model.safetensors"):
            spans.append(range(*(int(end, 16) for end in span.split("-"))))
    assert spans and held
    assert all(any(buffer.data_ptr() in span for span in spans) for buffer in held)


def test_no_weight_is_ever_dense(made: Callable[..., Path], monkeypatch: Any) -> None:
    from llmsqueeze import integration

    paths = made("prune"), made("sparsify")
    monkeypatch.setattr(integration._Decode, "convert", lambda *a, **k: pytest.fail("dense"))
    for path in paths:
        AutoModelForCausalLM.from_pretrained(path)


def test_settings_of_the_user_reach_the_model(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        pruned, attn_implementation="eager", dtype=torch.float32
    )
    assert model.config._attn_implementation == "eager" and formats_of(model)["bitmask"] == 21
    dense = plain(pruned, attn_implementation="eager", dtype=torch.float32)
    assert off(logits(model, IDS), logits(dense, IDS).double()) < 1e-5
    config = AutoConfig.from_pretrained(pruned)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 50.0}
    model, dense = (
        AutoModelForCausalLM.from_pretrained(pruned, config=config, dtype=torch.float32, **how)
        for how in ({}, DENSE)
    )
    assert formats_of(model) and off(logits(model, IDS), logits(dense, IDS).double()) < 1e-5
    assert off(logits(model, IDS), logits(plain(pruned, dtype=torch.float32), IDS).double()) > 1e-3


def test_other_heads_compute_with_kernels(pruned: Path) -> None:
    """What is not the checkpoint's own kind of model is loaded dense, and then packed."""
    body = AutoModel.from_pretrained(pruned, dtype=torch.float32)
    dense = AutoModel.from_pretrained(pruned, dtype=torch.float32, **DENSE)
    assert "bitmask" in formats_of(body)
    with torch.no_grad():
        found, expected = (m(IDS).last_hidden_state for m in (body, dense))
    assert off(found, expected.double()) < 1e-5
    classes = AutoModelForSequenceClassification.from_pretrained(pruned, num_labels=3)
    assert "bitmask" in formats_of(classes)
    shallow = AutoModelForCausalLM.from_pretrained(pruned, num_hidden_layers=1)
    assert formats_of(shallow)["bitmask"]


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_experts_are_dense_beside_kernels(made: Callable[..., Path], family: str) -> None:
    path = made("prune", family=family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert "bitmask" in formats_of(model)
    assert torch.equal(
        model.generate(IDS, **ANSWER), plain(path, dtype=torch.float32).generate(IDS, **ANSWER)
    )


def test_a_cache_format_alone_leaves_an_ordinary_model(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(made("quantize-kv"))
    assert not formats_of(model) and not model.is_quantized
    llmsqueeze.kv_cache(model)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert not hasattr(model.config, "_is_quantized")


def test_where_there_are_no_kernels_it_says_so(
    pruned: Path, monkeypatch: Any, caplog: Any, tmp_path: Path
) -> None:
    def messages(**options: Any) -> list[str]:
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(pruned, **options)
        assert not formats_of(model) and not model.is_quantized
        model.save_pretrained(tmp_path / "saved")
        return [record.getMessage() for record in caplog.records]

    (line,) = messages(dtype=torch.float64)
    assert str(pruned) in line and "made dense" in line and "take dtype float32" in line
    monkeypatch.setattr(cpu, "library", lambda: None)
    (line,) = messages()
    assert "no C++ compiler" in line and "install one" in line
    assert not messages(**DENSE)


def test_what_a_model_by_kernels_refuses(pruned: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    before = logits(model, IDS)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("cannot be saved.*dequantize=True", lambda: model.save_pretrained(tmp_path / "saved")),
        ("cannot be saved.*dequantize=True", model.state_dict),
        ("cannot be trained.*dequantize=True", model.train),
        ('stays on cpu.*device_map="meta"', lambda: model.to("meta")),
        ("keeps its dtype.*dtype=torch.float16", model.half),
        ("keeps its dtype.*dtype=torch.float32", model.float),
        ("keeps its dtype.*dtype=torch.float32", lambda: model.to(torch.float32)),
        ("cannot be copied; load it again", lambda: copy.deepcopy(model)),
        ("more or fewer tokens.*dequantize", lambda: model.resize_token_embeddings(99)),
    ]
    for message, call in refused:
        with pytest.raises(RecipeError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()
    # Nothing of it was done, and what changes nothing is allowed.
    assert model.eval().cpu().to("cpu", torch.bfloat16).bfloat16() is model
    model.tie_weights()
    model.resize_token_embeddings(160)
    assert not llmsqueeze.use_kernels(model).formats
    assert torch.equal(logits(model, IDS), before)
    assert not any(p.requires_grad for p in model.parameters())
    assert str(model.config) and str(model)


def test_trainers_are_told(pruned: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    with pytest.raises(RecipeError, match=r"cannot be trained.*dequantize=True"):
        Trainer(model, arguments)
    Trainer(plain(pruned), arguments)


def test_pipelines(pruned: Path) -> None:
    found, expected = (
        pipeline(
            "text-generation",
            model=str(pruned),
            device_map="cpu",
            model_kwargs={"dtype": torch.float32, **how},
        )
        for how in ({}, DENSE)
    )
    assert formats_of(found.model)["bitmask"] == 21 and not formats_of(expected.model)
    answers = [p("the cat", max_new_tokens=6, do_sample=False) for p in (found, expected)]
    assert answers[0] == answers[1]


def test_kernels_for_a_dense_model(pruned: Path) -> None:
    model = plain(pruned, dtype=torch.float32)
    expected = logits(model, IDS)
    assert llmsqueeze.use_kernels(model).formats["bitmask"] == 21
    assert off(logits(model, IDS), expected.double()) < 1e-5
    assert not llmsqueeze.use_kernels(model).formats
    with pytest.raises(RecipeError, match="cannot be trained"):
        model.train()


def test_a_copy_of_a_dense_model_has_gates_of_its_own(made: Callable[..., Path]) -> None:
    model = plain(made("prune", "sparsify"), dtype=torch.float32)
    twin = copy.deepcopy(model)
    logits(model, IDS[:1, :1])
    assert torch.equal(logits(twin, IDS), logits(model, IDS))
    logits(twin, IDS[:1, :3])
    first, second = gating_of(model), gating_of(twin)
    assert first and second and (first.length, second.length) == (IDS.shape[1], 3)


def test_settings_in_config_are_not_confused(tiny: Tiny, pruned: Path) -> None:
    """LlmsqueezeConfig is for our checkpoints, and keeps what theirs says of itself."""
    model = AutoModelForCausalLM.from_pretrained(pruned)
    theirs = json.loads((pruned / "config.json").read_text())["quantization_config"]
    assert model.config.quantization_config.to_dict() == {**theirs, "dequantize": False}
    with pytest.raises(ValueError, match="pre-quantized"):
        plain(tiny())


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
    model = plain(tmp_path / "gated" if gated else pruned)
    assert (gating_of(model) is not None) == gated


def test_saving_a_loaded_model_gives_a_plain_dense_checkpoint(pruned: Path, tmp_path: Path) -> None:
    model = plain(pruned)
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
        "w = m.model.layers[0].mlp.down_proj; print(2 * w.values.numel() == w.mask.shape[0] * w.in_features)"
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
    for options in ({}, DENSE):
        with pytest.raises(CheckpointError):
            AutoModelForCausalLM.from_pretrained(pruned, **options)


def test_unknown_settings_are_an_error(pruned: Path) -> None:
    file = pruned / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["bits"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="bits"):
        AutoModelForCausalLM.from_pretrained(pruned)
