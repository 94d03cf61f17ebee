"""What a pipeline lets pass: conditions on reports, and exit code 1."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsqueeze.conditions import Condition, judge, parse_size
from llmsqueeze.errors import RecipeError

Cli = Callable[..., Any]
Tiny = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("a > 1", True), ("a>2", False), ("a >= 2", True), ("a < 2", False), ("a <= 2", True),
        ("a == 2", True), ("a != 2", False), ("b.c < 0.6", True), ("b.c<.5", False),
        ("  a   >  1e0 ", True),
        # Nothing passes that was not measured.
        ("d > 1", True), ("b > 1", True), ("b.d < 1", True), ("a.c > 1", True), ("e < 1", True),
        ("f > 1", True), ("f < 1", True), ("g > 1", True),
    ],
)  # fmt: skip
def test_conditions(text: str, failed: bool) -> None:
    document = {"a": 2, "b": {"c": 0.5}, "e": "0.5", "f": math.nan, "g": True}
    (outcome,) = judge(document, [Condition.parse(text)])
    assert outcome.failed is failed
    described = outcome.describe()
    assert described["failed"] is failed
    json.dumps(described, allow_nan=False)


def test_infinity_is_judged() -> None:
    (outcome,) = judge({"a": math.inf}, [Condition.parse("a > 1.05")])
    assert outcome.failed and outcome.describe()["value"] is None


@pytest.mark.parametrize(
    "text", ["", "a", "a > ", "> 1", "a > b", "a => 1", "a > nan", "a > inf", "a > 1 2"]
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(RecipeError, match="--fail-if"):
        Condition.parse(text)


def test_sizes() -> None:
    texts = ("1000", "180MB", "1.5 GB", "2k", "0.25TB", "7 b")
    assert [parse_size(t) for t in texts] == [
        1000,
        180_000_000,
        1_500_000_000,
        2000,
        250 * 10**9,
        7,
    ]
    for text in ("", "MB", "-1", "1 MiB", "1e3"):
        with pytest.raises(RecipeError, match="180MB"):
            parse_size(text)


@pytest.fixture
def evaluate(cli: Cli, tiny: Tiny, text_file: Path) -> Callable[..., Any]:
    def run(checkpoint: Path | None = None, *options: object) -> Any:
        arguments = ["--text", text_file, "--seqlen", 32, "--device", "cpu", "-q", *options]
        return cli("eval", checkpoint or tiny(), *arguments)

    return run


def test_a_report_says_what_was_judged(evaluate: Callable[..., Any], tiny: Tiny) -> None:
    passing = ["--fail-if", "token_ppl_ratio > 1.05", "--max-size", "1GB"]
    result = evaluate(None, "--against", tiny(), "--json", *passing)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["token_ppl_ratio"] == 1
    assert [c["failed"] for c in document["conditions"]] == [False, False]
    assert document["conditions"][1] == {
        "fail_if": "size_bytes > 1000000000", "value": document["size_bytes"], "failed": False,
    }  # fmt: skip
    assert document["size_bytes"] == sum(f.stat().st_size for f in tiny().glob("*.safetensors"))
    assert 0 < document["bytes_per_token"] < document["size_bytes"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_failed_condition_ends_with_one(evaluate: Callable[..., Any], as_json: bool) -> None:
    failing = [
        "--fail-if",
        "token_ppl > 2",
        "--max-size",
        "1kB",
        "--fail-if",
        "passkey.accuracy < 0.5",
    ]
    result = evaluate(None, *failing, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert result.stderr.count("failed:") == 3
    assert "passkey.accuracy < 0.5: not in the report" in result.stderr
    if as_json:
        document = json.loads(result.stdout)  # one document, all of it
        assert document["token_ppl"] > 2
        assert [c["failed"] for c in document["conditions"]] == [True] * 3
    else:
        assert result.stdout.count("FAILED") == 3


def test_nothing_is_measured_for_a_wrong_condition(evaluate: Callable[..., Any]) -> None:
    result = evaluate(None, "--fail-if", "token_ppl is bad")
    assert result.exit_code == 2 and "--fail-if" in result.stderr and not result.stdout
    assert evaluate(None, "--max-size", "big").exit_code == 2


def test_a_baseline_stands_for_the_dense_model(
    evaluate: Callable[..., Any], cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[object]
) -> None:
    out, report = tmp_path / "out", tmp_path / "dense.json"
    dense = tiny(max_position_embeddings=128)
    assert cli("prune", dense, "-o", out, "--method", "wanda", *prune_args).exit_code == 0
    options = ["--passkey", "--seqlen", 112, "--windows", 4, "--json"]
    report.write_text(evaluate(dense, *options).stdout)
    against = json.loads(evaluate(out, "--against", dense, *options).stdout)
    found = json.loads(evaluate(out, "--baseline", report, *options).stdout)
    same = {"token_ppl", "dense_token_ppl", "token_ppl_ratio", "against", "dense_passkey"}
    assert {k: found[k] for k in same} == {k: against[k] for k in same}
    failing = evaluate(out, "--baseline", report, *options, "--fail-if", "token_ppl_ratio != 0")
    assert failing.exit_code == 1


def test_the_size_is_that_of_all_files(
    evaluate: Callable[..., Any], cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[object]
) -> None:
    gated, out = tmp_path / "gated", tmp_path / "out"
    assert cli("sparsify", tiny(), "-o", gated, *prune_args).exit_code == 0
    assert cli("quantize-kv", gated, "-o", out, *prune_args).exit_code == 0
    files = list(out.glob("*.safetensors"))
    assert len(files) == 3
    document = json.loads(evaluate(out, "--json").stdout)
    assert document["size_bytes"] == sum(file.stat().st_size for file in files)


def test_a_baseline_of_another_tokenizer_is_refused(
    evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    report = json.loads(evaluate(None, "--json").stdout)
    path = tmp_path / "dense.json"
    path.write_text(json.dumps(report | {"tokens_sha256": "0" * 64}))
    result = evaluate(None, "--baseline", path)
    assert result.exit_code == 3 and "tokens_sha256 was" in result.stderr


def test_a_baseline_of_other_settings_is_refused(
    evaluate: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    report = tmp_path / "dense.json"
    report.write_text(evaluate(None, "--json").stdout)
    result = evaluate(None, "--baseline", report, "--windows", 1)
    assert result.exit_code == 3 and "windows was" in result.stderr
    result = evaluate(None, "--baseline", report, "--dtype", "bfloat16")
    assert result.exit_code == 3 and "dtype was 'float32'" in result.stderr
    assert evaluate(None, "--baseline", report, "--against", tiny()).exit_code == 2
    for text in (
        "",
        "[]",
        "{}",
        '{"checkpoint": "x", "token_ppl": "1"}',
        '{"checkpoint": "x", "token_ppl": -1}',
    ):
        report.write_text(text)
        assert evaluate(None, "--baseline", report).exit_code == 3
    assert evaluate(None, "--baseline", tmp_path / "absent").exit_code == 3
