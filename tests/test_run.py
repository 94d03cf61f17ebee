"""`llmsqueeze run` and `llmsqueeze doctor`, as their users call them."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsqueeze import doctor, ops
from llmsqueeze.ops import cpu, cuda, kernels
from tests.conftest import load_dense, tiny_model

LIBRARY = cpu.library
Cli = Callable[..., Any]
Tiny = Callable[..., Path]


def expected(path: Path, prompt: str, tokens: int) -> tuple[list[int], str]:
    """By transformers alone, up to where the model ends."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = load_dense(path, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()
    if found and found[-1] == model.generation_config.eos_token_id:
        found.pop()
    return found, tokenizer.decode(found, skip_special_tokens=True)


def test_it_goes_on_as_transformers_does(cli: Cli, tiny: Tiny) -> None:
    path = tiny("llama", "float32")
    found, text = expected(path, "line 3 squares", 12)
    result = cli("run", path, "line 3 squares", "--tokens", 12, "--device", "cpu", "-q")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == text + "\n"
    result = cli("run", path, "line 3 squares", "--tokens", 12, "--device", "cpu", "-q", "--json")
    document = json.loads(result.stdout)
    assert document["text"] == text
    assert document["tokens"] == len(found)


def test_it_stops_where_the_model_ends(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("llama", "float32")
    found, _ = expected(path, "line", 12)
    other = tmp_path / "ends"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = [2, found[4]]
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(path).save_pretrained(other)
    result = cli("run", other, "line", "--tokens", 12, "--device", "cpu", "-q", "--json")
    assert json.loads(result.stdout)["tokens"] == found.index(found[4])


def test_a_chat_template_is_used_unless_raw(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(tiny()).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    tokenizer.chat_template = "{% for m in messages %}Q:{{ m.content }}{% endfor %} A:"
    tokenizer.save_pretrained(path)
    counts = {}
    for flags in ((), ("--raw",)):
        result = cli("run", path, "hello", *flags, "--tokens", 2, "--device", "cpu", "-q", "--json")
        assert result.exit_code == 0, result.stderr
        counts[flags] = json.loads(result.stdout)["prompt_tokens"]
    assert counts == {(): len("Q:hello A:"), ("--raw",): len("hello")}


def test_a_quantised_cache_is_used(
    cli: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kv"
    made = cli("quantize-kv", tiny(), "-o", out, "--method", "fp8", "-q")
    assert made.exit_code == 0, made.stderr
    from llmsqueeze.runtime import kv_cache

    calls: list[Any] = []
    own = kv_cache.attached_cache
    monkeypatch.setattr(kv_cache, "attached_cache", lambda m: calls.append(m) or own(m))
    result = cli("run", out, "line", "--tokens", 5, "--device", "cpu", "-q", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(calls) == 1


def test_a_quantised_cache_is_read_as_it_lies(
    cli: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, out = tmp_path / "wide", tmp_path / "kv"
    tiny_model(head_dim=64).save_pretrained(wide)
    AutoTokenizer.from_pretrained(tiny()).save_pretrained(wide)
    made = cli("quantize-kv", wide, "-o", out, "--method", "rotate", "--bits", 4, "-q")
    assert made.exit_code == 0, made.stderr
    from llmsqueeze.runtime.tiles import TiledLayer

    calls: list[Any] = []
    own = TiledLayer.attend
    monkeypatch.setattr(TiledLayer, "attend", lambda *given: calls.append(1) or own(*given))
    options = ["line", "--tokens", 5, "--device", "cpu", "--json"]
    unpacked = "the KV cache is unpacked at every step"
    for flags, built in (((), True), ((), False), (("--backend", "reference"), True)):
        if not built:
            monkeypatch.setattr(cpu, "library", lambda: None)
        elif cpu.library() is None:
            continue
        result = cli("run", out, *options, *flags)
        assert result.exit_code == 0, result.stderr
        read = built and not flags
        # A prompt gives the first token; the last one is not read any more.
        assert len(calls) == (3 * (json.loads(result.stdout)["tokens"] - 1) if read else 0)
        assert (unpacked in result.stderr) == (not built)
        calls.clear()
        monkeypatch.setattr(cpu, "library", LIBRARY)


def test_the_prompt_can_be_piped_in(cli: Cli, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--tokens", 3, "--device", "cpu", "-q"]
    given = cli("run", tiny(), "line 4", *options).stdout
    monkeypatch.setattr("sys.stdin", io.StringIO("line 4"))
    assert cli("run", tiny(), *options).stdout == given


def test_the_backend_can_be_chosen(
    cli: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsqueeze.ops.cpu.library", lambda: None)
    out = tmp_path / "out"
    made = cli("prune", tiny(), "-o", out, "--method", "magnitude", "--sparsity", 0.5, "-q")
    assert made.exit_code == 0, made.stderr
    options = ["line", "--tokens", 3, "--device", "cpu", "-q"]
    assert cli("run", out, *options, "--backend", "reference").exit_code == 0
    evaluated = ["eval", "--windows", 1, "--device", "cpu", "-q"]
    for source in (out, tiny()):  # also where there is nothing that a kernel would do
        for result in (
            cli("run", source, *options, "--backend", "kernels"),
            cli(*evaluated, source, "--backend", "kernels"),
        ):
            assert result.exit_code == 4
            assert "no C++ compiler" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["line", "--tokens", 0], "at least one token"),
        (["  "], "prompt is empty"),
        (["line", "--tokens", 64], "more than the 64"),
    ],
)
def test_bad_requests(cli: Cli, tiny: Tiny, arguments: list[Any], message: str) -> None:
    result = cli("run", tiny(), *arguments, "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr


def test_doctor_says_what_is_there(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMSQUEEZE_CACHE_DIR", str(tmp_path))
    result = cli("doctor", "--json", "-q")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["versions"]["torch"] == torch.__version__
    on_cpu = [check for check in document["checks"] if check["device"] == "cpu"]
    launched = {name for name, f in vars(kernels).items() if inspect.isfunction(f)}
    operators = {n for n in launched & vars(ops).keys() if n.endswith("_linear")}
    operators |= {"attend", "kv_append, kv_attend"}
    assert len(operators) == 10
    # Of the CPU alone.
    operators |= {"bitmask_linear", "dense_linear", "gated_bitmask_linear", "panels_linear"}
    assert document["cpu_kernels"] == cpu.instructions()
    assert {check["operator"] for check in on_cpu} == operators
    assert all(0 < check["error"] < doctor.TOLERANCE for check in document["checks"])
    assert len(document["gpus"]) == torch.cuda.device_count()
    people = cli("doctor", "-q")
    assert people.exit_code == 0
    assert "right, off by" in people.stdout


def test_doctor_does_not_pass_over_a_wrong_result(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TOLERANCE", 1e-9)
    result = cli("doctor", "--json", "-q")
    assert result.exit_code == 4
    assert "computes wrong on cpu" in json.loads(result.stdout)["error"]


def test_doctor_warms_for_a_gpu_that_is_not_here(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("LLMSQUEEZE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_: b"code")
    document = json.loads(cli("doctor", "--warm", "--arch", "sm_80", "--json", "-q").stdout)
    assert document["kernels"]["warmed"] == document["kernels"]["compiled"] > 40
    for wrong in (["--arch", "sm_90"], ["--warm", "--arch", "hopper"]):
        assert cli("doctor", *wrong).exit_code == 2
