"""The command line as a user meets it: results, JSON contract, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Cli = Callable[..., Any]
Tiny = Callable[..., Path]


def test_help_names_every_command(cli: Cli) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    for command in ("prune", "eval", "inspect", "convert"):
        assert command in result.stdout


def test_prune_json_contract(cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]) -> None:
    args = ["--method", "wanda", *prune_args]
    result = cli("prune", tiny(), "-o", tmp_path / "out", "--json", *args)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["method"] == "wanda"
    assert document["refit"] == "none"
    assert document["pattern"] == "unstructured"
    assert document["sparsity"] == pytest.approx(0.5)
    assert document["bytes"]["after"] < document["bytes"]["before"]
    assert document["seconds"] > 0
    assert document["peak_rss_bytes"] > 1_000_000
    assert document["peak_device_bytes"] is None
    assert len(document["sites"]) == 21
    site = document["sites"][0]
    assert site["name"] == "model.layers.0.self_attn.q_proj"
    assert site["shape"] == [40, 40]
    assert site["bytes"]["before"] == 40 * 40 * 2


def test_eval_json_contract(cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]) -> None:
    out = tmp_path / "out"
    assert cli("prune", tiny(), "-o", out, *prune_args).exit_code == 0
    text = prune_args[1]
    result = cli("eval", out, "--against", tiny(), "--text", text, "--seqlen", 32, "--windows", 5,
                 "--json", "-q", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["seqlen"] == 32
    assert document["tokens"] == 5 * 31
    assert document["dtype"] == "float32"
    assert len(document["text_sha256"]) == 64
    assert document["token_ppl_ratio"] == pytest.approx(
        document["token_ppl"] / document["dense_token_ppl"]
    )
    assert document["token_ppl"] != document["dense_token_ppl"]


def test_tables_for_people_and_lines_on_stderr(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path
) -> None:
    result = cli("prune", tiny(), "-o", tmp_path / "out", "--method", "magnitude")
    assert result.exit_code == 0
    assert "50.00% of 21 linears" in result.stdout
    assert "pruning block 3/3" in result.stderr


def test_quiet_is_quiet(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    assert cli("prune", tiny(), "-o", tmp_path / "out", "--method", "magnitude", "-q").stderr == ""


def test_environment_twins(
    cli: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSQUEEZE_JSON", "1")
    monkeypatch.setenv("LLMSQUEEZE_QUIET", "1")
    result = cli("inspect", tiny())
    assert json.loads(result.stdout)["format"] == "plain"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cli: Cli, shell: str) -> None:
    script = cli("completion", shell).stdout
    assert "_LLMSQUEEZE_COMPLETE" in script and f"{shell}_complete" in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("llmsqueeze pl", "plan"),
        ("llmsqueeze compress --pre", "--preset"),
        ("llmsqueeze compress --preset ", "fastest"),
        ("llmsqueeze recipe ", "validate"),
    ],
)
def test_bash_completes(line: str, offers: str) -> None:
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "llmsqueeze"],
        env={
            **os.environ,
            "_LLMSQUEEZE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"plain,{offers}" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["prun", "x"], "prune"),
        (["prune", "x", "-o", "y", "--sparsty", "0.5"], "--sparsity"),
        (["prune", "x", "-o", "y", "--method", "wandaa"], "wanda"),
        (["compress", "x", "-o", "y", "--preset", "fast"], "fastest"),
    ],
)
def test_near_misses_get_a_suggestion(cli: Cli, args: list[str], meant: str) -> None:
    result = cli(*args)
    assert result.exit_code == 2
    assert "id you mean" in result.stderr and f"'{meant}'" in result.stderr


def test_inspect_and_verify(cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]) -> None:
    out = tmp_path / "out"
    assert cli("prune", tiny(), "-o", out, "--method", "wanda", *prune_args).exit_code == 0
    document = json.loads(cli("inspect", out, "--json", "--verify").stdout)
    assert document["verified"] is True
    assert document["steps"][0]["recipe"]["method"] == "wanda"
    assert document["bytes"]["after"] == sum_of_tensor_bytes(out)

    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit of one weight: headers do not see it, hashes must
    file.write_bytes(data)
    result = cli("inspect", out, "--verify")
    assert result.exit_code == 3
    assert "model.safetensors" in result.stderr


def sum_of_tensor_bytes(path: Path) -> int:
    from safetensors.torch import load_file

    return sum(t.numel() * t.element_size() for t in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_convert_round_trip_is_bit_exact(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any], pattern: str
) -> None:
    from llmsqueeze.checkpoint import Checkpoint

    first, dense, again = tmp_path / "first", tmp_path / "dense", tmp_path / "again"
    assert cli("prune", tiny(), "-o", first, "--pattern", pattern, *prune_args).exit_code == 0
    assert cli("convert", first, "-o", dense, "--to", "dense", "-q").exit_code == 0
    assert cli("convert", dense, "-o", again, "--to", "llmsqueeze", "-q").exit_code == 0
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert json.loads((again / "llmsqueeze.json").read_text())["steps"]
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config
    packed, plain = Checkpoint(first), Checkpoint(dense)
    for name in plain.sources:
        a, b = packed.read([name])[name], plain.read([name])[name]
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name


def test_ignore_leaves_linears_dense(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]
) -> None:
    result = cli("prune", tiny(), "-o", tmp_path / "out", "--json", "--ignore", "down_proj",
                 "--ignore", r"re:layers\.0\.", "--ignore", "lm_head", *prune_args)  # fmt: skip
    names = [site["name"] for site in json.loads(result.stdout)["sites"]]
    assert len(names) == 12
    assert not any("down_proj" in name or "layers.0." in name for name in names)


def test_chained_steps_are_kept(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli("prune", tiny(), "-o", one, "--sparsity", 0.3, *prune_args).exit_code == 0
    assert cli("prune", one, "-o", two, "--sparsity", 0.6, *prune_args).exit_code == 0
    document = json.loads(cli("inspect", two, "--json").stdout)
    assert [step["recipe"]["target"]["sparsity"] for step in document["steps"]] == [0.3, 0.6]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--sparsity", "1"], 2, "[0, 1)"),
        (["--sparsity", "nan"], 2, "nan is not a number"),
        (["--sparsity", "0.7", "--pattern", "2:4"], 2, "removes 0.5"),
        (["--pattern", "3:7"], 2, "does not divide"),
        (["--pattern", "4:2"], 2, "2:4"),
        (["--pattern", "squares"], 2, "unknown pattern"),
        (["--method", "dwim"], 2, "dwim"),
        (["--damping", "0.1"], 2, "belongs to sparsegpt"),
        (["--method", "sparsegpt", "--damping", "-1"], 2, "damping"),
        (["--ignore", "no_such"], 2, "no module"),
        (["--ignore", "re:("], 2, "regular expression"),
        (["--ignore", "re:layers"], 2, "nothing to prune"),
        (["--samples", "0"], 2, "--samples"),
        (["--samples", "5000"], 3, "too short"),
        (["--seqlen", "1"], 2, "two tokens"),
        (["--seqlen", "65"], 2, "64 positions"),
        (["--calib", "missing.txt"], 3, "missing.txt"),
        (["--device", "cuda:99"], 4, "cuda:99"),
        (["--device", "toaster"], 4, "toaster"),
        (["--no-such-option"], 2, "no-such-option"),
    ],
)  # fmt: skip
def test_bad_requests_leave_nothing(
    cli: Cli,
    tiny: Tiny,
    tmp_path: Path,
    prune_args: list[Any],
    args: list[str],
    code: int,
    says: str,
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    result = cli("prune", tiny(), "-o", folder / "out", *prune_args, *args)
    assert result.exit_code == code, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(folder.iterdir()) == []


def test_errors_are_one_json_document(cli: Cli, tmp_path: Path) -> None:
    for args in (["prune", tmp_path / "nope", "-o", tmp_path / "o"], ["prune", "--zzz"]):
        result = cli(*args, "--json")
        document = json.loads(result.stdout)
        assert document["exit_code"] == result.exit_code
        assert document["error"]


def test_existing_output_is_kept_unless_told(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]
) -> None:
    out = tmp_path / "out"
    assert cli("prune", tiny(), "-o", out, *prune_args).exit_code == 0
    before = (out / "llmsqueeze.json").read_bytes()
    refused = cli("prune", tiny(), "-o", out, "--sparsity", 0.6, *prune_args)
    assert refused.exit_code == 2
    assert (out / "llmsqueeze.json").read_bytes() == before
    args = ["--sparsity", 0.6, "--overwrite", *prune_args]
    assert cli("prune", tiny(), "-o", out, *args).exit_code == 0
    assert (out / "llmsqueeze.json").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_replaces_other_things(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("years of work")
    result = cli("prune", tiny(), "-o", out, "--method", "magnitude", "--overwrite")
    assert result.exit_code == 2
    assert (out / "chapter1.tex").read_text() == "years of work"


def test_output_inside_the_source_is_refused(cli: Cli, tiny: Tiny) -> None:
    result = cli("prune", tiny(), "-o", tiny() / "sub", "--method", "magnitude")
    assert result.exit_code == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_without_a_state_leaves_nothing(
    tiny: Tiny, tmp_path: Path, text_file: Path, number: int, code: int
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    args = ["prune", tiny(num_hidden_layers=60), "-o", folder / "out", "--calib", text_file,
            "--samples", 100, "--seqlen", 56, "--batch-size", 1, "--device", "cpu",
            "--resume", "never"]  # fmt: skip
    # Whoever runs the tests in a shell's background passes an ignored SIGINT on.
    process = subprocess.Popen(
        [sys.executable, "-m", "llmsqueeze", *map(str, args)], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "block 2/" in line:
            break
    process.send_signal(number)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == code, rest
    assert "Traceback" not in rest
    assert list(folder.iterdir()) == []


def test_killed_run_leaves_nothing_that_loads(tiny: Tiny, tmp_path: Path) -> None:
    args = ["prune", tiny(num_hidden_layers=60), "-o", tmp_path / "out", "--method", "magnitude"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmsqueeze", *map(str, args)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "block 2/" in line:
            break
    process.kill()
    process.stderr.close()
    process.wait(timeout=60)
    time.sleep(0.05)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json"))


def test_disk_full_publishes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    # A file size limit makes write() fail as a full disk does, without needing one.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from llmsqueeze.cli import main; main()"
    )
    args = ["prune", tiny(), "-o", tmp_path / "work" / "out", "--method", "magnitude", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "work").iterdir()) == []
