"""from_pretrained on a CUDA device: by kernels in 16 bits, without a flag; skipped where there is none."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import llmsqueeze
from llmsqueeze.bench_model import formats_of, operator_error
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import EnvironmentFault, RecipeError
from llmsqueeze.ops import cuda
from llmsqueeze.runtime import load
from llmsqueeze.runtime.packed import PackedLinear
from tests.conftest import load_dense
from tests.test_cpu_kernels import IDS, logits, off

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ANSWER = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def made(
    cli: Any, tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> Callable[..., Path]:
    """A checkpoint after some commands."""

    def make(*steps: str, **changes: Any) -> Path:
        calib = ("--calib", text_file, "--samples", 2, "--seqlen", 24, "--device", "cpu")
        options: dict[str, tuple[Any, ...]] = {
            "prune": ("--method", "magnitude", "--sparsity", 0.6, "--device", "cpu"),
            "2:4": ("--method", "magnitude", "--pattern", "2:4", "--device", "cpu"),
            "convert": ("--to", "llmsqueeze", "--encode", "int8"),
            "sparsify": ("--sparsity", 0.5, *calib),
            "quantize-kv": ("--method", "rotate", "--bits", 4),
        }
        path = tiny("llama", **changes)
        for number, step in enumerate(steps):
            out = tmp_path / "-".join(steps[: number + 1]).replace(":", "")
            command = "prune" if step == "2:4" else step
            result = cli(command, path, "-o", out, *options[step], "-q")
            assert result.exit_code == 0, result.stderr
            path = out
        return path

    return make


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0, {"": 0}, "auto"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_every_way_to_load_gives_kernels(
    made: Callable[..., Path], device_map: Any, dtype: torch.dtype | None, caplog: Any
) -> None:
    path = made("prune")
    options = {"device_map": device_map, **({"dtype": dtype} if dtype else {})}
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, **options
        )
    assert not any(info.values()) and not caplog.records
    assert formats_of(model) and model.is_quantized and not model.training
    assert model.dtype == (dtype or torch.bfloat16)
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    assert any(isinstance(m, PackedLinear) for m in model.modules())
    assert operator_error(model, IDS[0])[0] < 1e-2
    # Of one precision: not much further from fp64's logits than the dense model.
    exact = logits(load_dense(path, dtype=torch.float64), IDS).cuda()
    error = off(logits(load_dense(path, **options), IDS.cuda()), exact)
    assert off(logits(model, IDS.cuda()), exact) <= 2 * error + 1e-6


@pytest.mark.parametrize(
    "steps",
    [("prune",), ("2:4",), ("convert",), ("sparsify",), ("prune", "sparsify"), ("prune", "quantize-kv")],
)  # fmt: skip
def test_it_is_what_run_computes_with(made: Callable[..., Path], steps: tuple[str, ...]) -> None:
    changes = {"head_dim": 64} if "quantize-kv" in steps else {}
    path = made(*steps, **changes)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cuda")
    same = load(Checkpoint(path), torch.bfloat16, torch.device("cuda"), kernels=True)
    assert formats_of(model) == formats_of(same) and formats_of(model)
    assert torch.equal(logits(model, IDS.cuda()), logits(same, IDS.cuda()))
    given: list[dict[str, Any]] = [{}, {}]
    if "quantize-kv" in steps:
        given = [
            {"past_key_values": llmsqueeze.kv_cache(m, tokens=64)} for m in (model, same)
        ]  # fmt: skip
    found = [
        m.generate(IDS[:1].cuda(), **options, **ANSWER)
        for m, options in zip((model, same), given, strict=True)
    ]
    assert torch.equal(*found)


def test_dense_weights_are_on_the_host_until_they_are_packed(made: Callable[..., Path]) -> None:
    path = made("prune", hidden_size=512, intermediate_size=2048)
    gc.collect()  # what other tests left: it would be freed meanwhile
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cuda")
    packed = torch.cuda.memory_allocated() - before
    del model
    gc.collect()
    before = torch.cuda.memory_allocated()
    dense = load_dense(path, device_map="cuda")
    assert packed < 0.75 * (torch.cuda.memory_allocated() - before)
    assert not formats_of(dense)


def test_where_there_are_no_kernels_it_says_so(
    made: Callable[..., Path], monkeypatch: Any, caplog: Any
) -> None:
    path = made("prune")

    def message(**options: Any) -> str:
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        assert not formats_of(model) and not model.is_quantized
        assert all(parameter.is_cuda for parameter in model.parameters())
        assert off(logits(model, IDS.cuda()), logits(model, IDS.cuda()).double()) == 0
        (record,) = caplog.records
        return str(record.getMessage())

    for device_map in ("cuda", "auto"):
        assert "take dtype bfloat16" in message(device_map=device_map, dtype=torch.float32)

    def absent() -> str:
        raise EnvironmentFault("run: pip install 'llmsqueeze[cuda]'")

    monkeypatch.setattr(cuda, "compiler", absent)
    assert "pip install 'llmsqueeze[cuda]'" in message(device_map="cuda")


def test_what_a_model_by_kernels_refuses(made: Callable[..., Path], tmp_path: Path) -> None:
    path = made("prune")
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cuda")
    before = logits(model, IDS.cuda())
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("cannot be saved", lambda: model.save_pretrained(tmp_path / "saved")),
        ("cannot be trained", model.train),
        ('device_map="cpu"', model.cpu),
        ("dtype=torch.float16", model.half),
        ("dtype=torch.float32", model.float),
    ]
    for message, call in refused:
        with pytest.raises(RecipeError, match=message):
            call()
    assert model.cuda().to("cuda:0").bfloat16() is model
    assert torch.equal(logits(model, IDS.cuda()), before)
    on_cpu = AutoModelForCausalLM.from_pretrained(path)
    assert on_cpu.device.type == "cpu"
    with pytest.raises(RecipeError, match='device_map="cuda:0"'):
        on_cpu.cuda()


def test_pipelines(made: Callable[..., Path]) -> None:
    path = made("prune")
    for options in ({"device_map": "cuda"}, {"device_map": "auto"}):
        made_ = pipeline("text-generation", model=str(path), **options)
        assert formats_of(made_.model)
        (answer,) = made_("the cat", max_new_tokens=6, do_sample=False)
        assert answer["generated_text"].startswith("the cat")
    with pytest.raises(RecipeError, match="device_map="):
        pipeline("text-generation", model=str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
def test_it_compiles(made: Callable[..., Path]) -> None:
    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    model = AutoModelForCausalLM.from_pretrained(made("prune"), device_map="cuda")
    expected = logits(model, IDS.cuda())
    compiled = torch.compile(model, fullgraph=True)
    assert off(logits(compiled, IDS.cuda()), expected.double()) < 2e-2
    static = model.generate(IDS[:1].cuda(), cache_implementation="static", **ANSWER)
    assert int(static[0, IDS.shape[1]]) == int(expected[0, -1].argmax())
