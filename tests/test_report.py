"""`llmsqueeze report`: what is in its files, against the checkpoints and results it was made of."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

from llmsqueeze import bench, bench_cpu, bench_model
from llmsqueeze.bench import Timing
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.report import files, pictures, svg, tiles
from llmsqueeze.report.document import short_names
from llmsqueeze.report.page import page
from llmsqueeze.report.schema import BENCH_KERNELS, REPORT_SCHEMA, RESULTS, fault
from llmsqueeze.report.text import junit, markdown

Cli = Callable[..., Any]
Tiny = Callable[..., Path]
SVG = "{http://www.w3.org/2000/svg}"
FILES = ["report.json", "report.md", "junit.xml", "report.html"]
EVALUATION = ["--seqlen", 32, "--windows", 4, "--device", "cpu", "-q", "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture
def made(cli: Cli, tiny: Tiny, folder: Path, prune_args: list[Any]) -> Path:
    """A directory with `out`, a checkpoint with all there is to report, and its result, made once."""
    if not (folder / "eval.json").exists():
        tile = ["--pattern", "tile", "--tile", 16, "--method", "wanda"]
        first, second, out = folder / "pruned", folder / "gated", folder / "out"
        assert cli("prune", tiny(), "-o", first, *tile, *prune_args).exit_code == 0
        assert cli("sparsify", first, "-o", second, *prune_args).exit_code == 0
        assert cli("quantize-kv", second, "-o", out, *prune_args).exit_code == 0
        limits = ["--fail-if", "token_ppl_ratio > 100", "--max-size", "1kB"]
        result = cli("eval", out, "--against", tiny(), *limits, *EVALUATION)
        assert result.exit_code == 1, result.stderr  # for its size
        (folder / "eval.json").write_text(result.stdout)
        (folder / "dense.json").write_text(cli("eval", tiny(), *EVALUATION).stdout)
    return folder


def report_of(cli: Cli, out: Path, *what: object) -> dict[str, Any]:
    result = cli("report", *what, "-o", out, "-q")
    assert result.exit_code == 0, result.stderr
    found = json.loads((out / "report.json").read_text())
    jsonschema.validate(found, REPORT_SCHEMA)
    return dict(found)


def model_result(checkpoint: str = "/somewhere/fast", speedup: float = 1.5) -> dict[str, Any]:
    """What `bench model` prints. The numbers are invented: they show what is drawn, no speed."""
    speed = {
        "ms_per_token": 6.0, "range": [5.9, 6.1], "prefill_ms": 9.0, "weight_bytes": 200,
        "bytes_per_token": 210, "cache_bytes": 10, "load_seconds": 1.0,
    }  # fmt: skip
    return {
        "schema": "llmsqueeze.bench-model/1", "checkpoint": checkpoint, "manifest_sha256": None,
        "gpu": "invented", "torch": "2", "dtype": "bfloat16", "prompt": 128, "compiled": True,
        "formats": {}, "dense": speed, "compressed": speed | {"ms_per_token": 6.0 / speedup},
        "speedup": speedup, "bound": 1.8, "error": 1e-3, "logit_error": 0.1, "same_tokens": 20,
        "tokens": 32,
    }  # fmt: skip


def kernels_result() -> dict[str, Any]:
    """What `bench kernels` prints, of its own rows with invented numbers."""
    rows = [bench.Row(4096, 4096, 1, "dense", Timing(12, 12, 12), 16, 1, 1, 0)]
    for kernel, bits, speedup in (("2:4", 9, 1.6), ("activations 50 % × int8", 4, 0.8)):
        timing = Timing(12 / speedup, 1, 99)
        rows.append(bench.Row(4096, 4096, 1, kernel, timing, bits, 16 / bits, speedup, 1e-3))
    found = [bench.as_json(row) for row in rows]
    return {"schema": BENCH_KERNELS, "gpu": "invented", "torch": "2", "rows": found}


def test_the_report_says_what_the_checkpoint_holds(cli: Cli, made: Path, tmp_path: Path) -> None:
    report = report_of(cli, tmp_path / "r", made / "out", made / "eval.json", made / "dense.json")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(FILES)
    (entry,) = report["checkpoints"]
    checkpoint = Checkpoint(made / "out")
    zeros = weights = saved = 0
    assert len(entry["sites"]) == 21
    for site in entry["sites"]:
        weight = checkpoint.read([site["name"] + ".weight"])[site["name"] + ".weight"]
        assert site["sparsity"] == pytest.approx(float((weight == 0).double().mean()))
        assert site["name"] == f"model.layers.{site['block']}." + (
            "mlp." if site["projection"] in ("gate_proj", "up_proj", "down_proj") else "self_attn."
        ) + site["projection"]  # fmt: skip
        assert site["error"] == site["figures"]["relative_error"]
        zeros, weights = zeros + int((weight == 0).sum()), weights + weight.numel()
        saved += 2 * weight.numel() - site["bytes"]["after"]
        # The tiles, by plain loops.
        found = entry["tiles"]["sites"][site["name"]]
        for i, row in enumerate(found):
            for j, sign in enumerate(row):
                tile = weight[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
                groups = [g for line in tile for g in line.split(4)]
                sparse = all(int((g != 0).sum()) <= 2 for g in groups)
                assert sign == ("0" if sparse else "1"), (site["name"], i, j)
        assert len(found) == -(-weight.shape[0] // 16)
        assert len(found[0]) == -(-weight.shape[1] // 16)
    assert entry["sparsity"] == pytest.approx(zeros / weights)
    assert entry["bytes"]["dense"] - entry["bytes"]["tensors"] == saved
    assert [step["command"] for step in entry["steps"]] == ["prune", "sparsify", "quantize-kv"]
    assert entry["kv_cache"]["layers"] == 3
    evaluation = json.loads((made / "eval.json").read_text())
    curves = checkpoint.read_activation()
    for gate in entry["activation"]["gates"]:
        assert gate["curve"] == pytest.approx(curves[gate["name"] + ".curve"].tolist(), rel=1e-5)
        measured = evaluation["activation"]["gates"][gate["name"]]["measured"]
        assert gate["measured"] == measured is not None
    assert report["results"][0]["document"] == evaluation
    assert [r["checkpoint"] for r in report["results"]] == [0, None]


def test_tiles_of_dense_sites_are_read_as_well(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    args = ["--pattern", "tile", "--tile", 20, "--sparsity", 0.25, "--method", "magnitude"]
    assert cli("prune", tiny(), "-o", out, *args, *prune_args).exit_code == 0
    assert cli("convert", out, "-o", dense, "--to", "dense", "-q").exit_code == 0
    report = report_of(cli, tmp_path / "r", out, dense)
    packed, plain = (entry["tiles"] for entry in report["checkpoints"])
    assert packed == plain
    shares = tiles.dense_shares(packed)
    assert set(shares.values()) == {0.5}  # of 2 × 2 and 4 × 2 tiles, at a sparsity of 25 %
    # The dense form is as large as before, and promises nothing else.
    assert [c["of"] for c in report["checks"] if c["name"] == "the file is smaller"] == ["out"]


def test_conditions_appear_in_every_file(cli: Cli, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    result = cli("report", made / "out", made / "eval.json", "-o", out, "--json")
    assert result.exit_code == 0  # a failed condition ends the command it was given to
    document = json.loads(result.stdout)
    assert document["failed"] and document["files"] == FILES
    report = json.loads((out / "report.json").read_text())
    size = json.loads((made / "eval.json").read_text())["size_bytes"]
    assert [c["failed"] for c in report["conditions"]] == [False, True]
    assert document["conditions"] == report["conditions"]
    assert report["conditions"][1] == {
        "of": "eval out", "fail_if": "size_bytes > 1000", "value": size, "failed": True,
    }  # fmt: skip
    summary = (out / "report.md").read_text()
    assert summary.startswith("## ❌ llmsqueeze: 1 of 2 conditions failed")
    assert rf"| eval out | fails if size\_bytes &gt; 1000 | {size} | failed |" in summary
    suites = ElementTree.parse(out / "junit.xml").getroot()
    cases = {(c.get("classname"), c.get("name")): c for c in suites.iter("testcase")}
    failed = cases["eval out", "fail if size_bytes > 1000"].find("failure")
    assert failed is not None and failed.get("message") == f"size_bytes > 1000: {size}"
    assert cases["eval out", "fail if token_ppl_ratio > 100"].find("failure") is None
    assert {name for of, name in cases if of == "out"} == {
        "the file is smaller", "the loss is measured",
    }  # fmt: skip
    assert suites.get("tests") == "4" and suites.get("failures") == "1"
    text = (out / "report.html").read_text()
    assert (
        "1 of 2 conditions failed" in text
        and f"fails if size_bytes &gt; 1000, and it is {size}" in text
    )


def test_what_was_not_measured_is_skipped_not_passed(cli: Cli, made: Path, tmp_path: Path) -> None:
    report = report_of(cli, tmp_path / "r", made / "out")
    (check,) = [c for c in report["checks"] if c["name"] == "the loss is measured"]
    assert check["status"] == "not measured"
    suites = ElementTree.fromstring(junit(report))
    assert suites.get("skipped") == "1" and suites.get("failures") == "0"
    assert "✅" not in markdown(report)


def test_its_own_conditions(cli: Cli, tiny: Tiny, made: Path, tmp_path: Path) -> None:
    what = [made / "out", made / "eval.json", made / "dense.json"]
    passing = cli("report", *what, "-o", tmp_path / "a", "--fail-if", "token_ppl > 1e6")
    assert passing.exit_code == 0, passing.stderr
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    # Of both results, for both have a perplexity.
    assert [c["of"] for c in report["conditions"]] == [
        "eval out", "eval out", "report on eval out", f"report on eval {tiny().name}",
    ]  # fmt: skip
    ratios = [c["value"] for c in report["conditions"] if c["fail_if"].startswith("token_ppl >")]
    between = sorted(ratios, reverse=True)[0] * 0.999  # only the worse of them fails, the first
    what.sort(key=lambda path: path.name == "dense.json", reverse=ratios[1] > ratios[0])
    mixed = cli("report", *what, "-o", tmp_path / "c", "--fail-if", f"token_ppl > {between}")
    assert mixed.exit_code == 1 and mixed.stderr.count("failed:") == 1
    assert re.search(r"fail if token_ppl > \S+\s*│ FAILED", mixed.stdout)
    failing = cli("report", *what, "-o", tmp_path / "b", "--fail-if", "speedup < 1.3", "--json")
    assert failing.exit_code == 1 and "speedup < 1.3: not in the report" in failing.stderr
    assert json.loads(failing.stdout)["conditions"][-1]["failed"]
    assert json.loads((tmp_path / "b" / "report.json").read_text())["failed"]


def test_a_measurement_that_failed_is_reported(cli: Cli, made: Path, tmp_path: Path) -> None:
    failed = cli("eval", tmp_path / "absent", "--json")
    assert failed.exit_code == 3
    (tmp_path / "eval.json").write_text(failed.stdout)
    out = tmp_path / "r"
    report = report_of(cli, out, made / "out", tmp_path / "eval.json")
    assert report["failed"] and report["results"][0]["kind"] == "error"
    assert "1 of 1 measurements did not come to an end" in (out / "report.md").read_text()
    error = ElementTree.parse(out / "junit.xml").getroot().find(".//error")
    assert error is not None and "no such checkpoint" in error.get("message", "")
    assert error.get("type") == "exit code 3"
    what = [tmp_path / "eval.json", made / "dense.json"]
    result = cli("report", *what, "-o", tmp_path / "s", "--fail-if", "token_ppl > 1e6")
    assert result.exit_code == 1  # whatever the others have


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not one JSON document"), ("{}", "not what"), ("[1]", "not what"),
        ('{"a": NaN}', "NaN"), ('{"a": 1e999}', "1e999"), ('{"schema": "llmsqueeze.eval/2"}', "not what"),
        ('{"schema": "llmsqueeze.eval/1"}', "has no checkpoint"), (None, "No such file"),
    ],
)  # fmt: skip
def test_what_is_no_result(cli: Cli, tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    result = cli("report", path, "-o", tmp_path / "r")
    assert result.exit_code == 3 and message in result.stderr and "result.json" in result.stderr
    assert not (tmp_path / "r").exists()


def test_results_of_what_has_changed_are_refused(cli: Cli, made: Path, tmp_path: Path) -> None:
    document = json.loads((made / "eval.json").read_text())
    stale = tmp_path / "stale.json"
    stale.write_text(json.dumps(document | {"manifest_sha256": "0" * 64}))
    result = cli("report", made / "out", stale, "-o", tmp_path / "r")
    assert result.exit_code == 3 and "another checkpoint when it was measured" in result.stderr
    # Where a directory only moved, the hash still tells.
    moved = tmp_path / "moved"
    shutil.copytree(made / "out", moved)
    report = report_of(cli, tmp_path / "r", moved, made / "eval.json")
    assert report["results"][0]["checkpoint"] == 0


def test_refusals(cli: Cli, tiny: Tiny, made: Path, tmp_path: Path) -> None:
    out, what = tmp_path / "r", made / "dense.json"
    assert cli("report", "-o", out).exit_code == 2
    assert cli("report", what, what, "-o", out).exit_code == 2
    assert cli("report", tiny(), "-o", out).exit_code == 3  # a plain checkpoint
    assert cli("report", what, "-o", out, "--fail-if", "bad").exit_code == 2
    assert not out.exists()
    report_of(cli, out, what)
    assert cli("report", what, "-o", out).exit_code == 2
    before = (out / "report.html").read_bytes()
    assert cli("report", what, "-o", out, "--overwrite").exit_code == 0
    assert (out / "report.html").read_bytes() == before  # nothing depends on the time
    result = cli("report", what, "-o", made / "out", "--overwrite")
    assert result.exit_code == 2 and "not a report directory" in result.stderr


def test_a_report_is_complete_or_absent(
    cli: Cli, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(report: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmsqueeze.report.files.publish_directory", lambda a, b: broken(a))
    assert cli("report", made / "dense.json", "-o", tmp_path / "r").exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_the_schema_can_be_printed(cli: Cli) -> None:
    result = cli("report", "--schema")
    assert result.exit_code == 0 and json.loads(result.stdout) == REPORT_SCHEMA


def mutations(value: Any) -> Any:
    """Copies of a document, each with one key gone or of another type."""
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        yield {k: v for k, v in value.items() if k != key}
        for other in (None, "x", -1, 1.5, True, [], {}):
            yield value | {key: other}
        for changed in mutations(inner):
            yield value | {key: changed}
        if isinstance(inner, list) and inner:
            yield value | {key: [*inner, 0]}


def test_documents_are_checked_as_json_schema_says(made: Path) -> None:
    found = {
        "eval": json.loads((made / "eval.json").read_text()),
        "bench model": model_result()
        | {"conditions": [{"fail_if": "a", "value": 1, "failed": True}]},
        "bench kernels": kernels_result(),
        "error": {"error": "text", "exit_code": 3},
    }
    rejected = 0
    for kind, document in found.items():
        checker = jsonschema.Draft202012Validator(RESULTS[kind])
        checker.check_schema(RESULTS[kind])
        assert checker.is_valid(document) and fault(document, RESULTS[kind]) is None
        for changed in mutations(copy.deepcopy(document)):
            assert (fault(changed, RESULTS[kind]) is None) == checker.is_valid(changed), changed
            rejected += not checker.is_valid(changed)
    assert rejected > 200
    jsonschema.Draft202012Validator.check_schema(REPORT_SCHEMA)


def test_bench_prints_what_report_reads(
    cli: Cli, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documents of bench: what measures is replaced, what prints is not."""
    times = Timing(2.0, 1.9, 2.1)
    dense = bench_model.Speed(times, times, 300, 310, 10, 1.0)
    mine = bench_model.Speed(Timing(1.0, 0.9, 1.1), times, 200, 205, 5, 1.0)
    found = bench_model.Comparison(
        dense, mine, 1e-3, 0.01, 30, 32, {"2:4": 21}, torch.bfloat16, dense
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "invented")
    monkeypatch.setattr(bench_cpu, "compare", lambda *args, **options: found)
    rows = [bench.Row(16, 32, 1, "2:4", times, 9, 16 / 9, 1.5, 1e-3)]
    monkeypatch.setattr(bench, "table", lambda *args: iter(rows))
    options = ["--prompt", 16, "--json", "-q", "--device", "cpu"]
    result = cli("bench", "model", made / "out", *options, "--min-speedup", 2.5)
    assert result.exit_code == 1, result.stderr
    (tmp_path / "model.json").write_text(result.stdout)
    result = cli("bench", "kernels", "--json", "-q")
    assert result.exit_code == 0, result.stderr
    (tmp_path / "kernels.json").write_text(result.stdout)
    what = [made / "out", tmp_path / "model.json", tmp_path / "kernels.json"]
    report = report_of(cli, tmp_path / "r", *what)
    assert [r["kind"] for r in report["results"]] == ["bench model", "bench kernels"]
    assert report["results"][0]["checkpoint"] == 0
    assert report["conditions"][0]["fail_if"] == "speedup < 2.5" and report["failed"]
    (check,) = [c for c in report["checks"] if c["name"] == "decoding is faster"]
    assert check["status"] == "passed" and "2 times" in check["detail"]


def as_report(*documents: dict[str, Any], checkpoints: Any = ()) -> dict[str, Any]:
    """A report of results that are of no checkpoint here."""
    from llmsqueeze.report.document import build

    results = [
        {"kind": kind, "label": kind, "file": f"{i}.json", "checkpoint": None, "document": d}
        for i, d in enumerate(documents)
        for kind, schema in RESULTS.items()
        if fault(d, schema) is None
    ]
    assert len(results) == len(documents)
    return build([], results) | {"checkpoints": list(checkpoints)}


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    bars = [pictures.Bar("fast", 2.0, 3.0, ""), pictures.Bar("slow", 0.5, 1.0, "")]
    root = parse_svg(pictures.speeds("p", "Speeds", bars))
    boxes = {kind: [b for b in root.iter(f"{SVG}rect") if b.get("class") == kind]
             for kind in ("bar", "slower", "bound")}  # fmt: skip
    (fast,), (slow,) = boxes["bar"], boxes["slower"]
    start = float(fast.get("x", ""))
    assert start == float(slow.get("x", ""))
    assert float(fast.get("width", "")) == pytest.approx(4 * float(slow.get("width", "")), rel=2e-3)
    (dense,) = [e for e in root.iter(f"{SVG}line") if e.get("class") == "dense"]
    one = float(dense.get("x1", "")) - start
    assert float(fast.get("width", "")) == pytest.approx(2 * one, rel=2e-3)
    marks = [float(b.get("x", "")) + 1.5 - start for b in boxes["bound"]]
    assert marks == pytest.approx([3 * one, one], rel=2e-3)


def evaluation(name: str, ppl: float, bytes: int, **more: Any) -> dict[str, Any]:
    """What `eval` prints, with invented numbers."""
    return {
        "schema": "llmsqueeze.eval/1", "checkpoint": name, "manifest_sha256": "1" * 64,
        "token_ppl": ppl, "seqlen": 2048, "windows": 9, "tokens": 9 * 2047, "bos": False,
        "dtype": "float32", "device": "cpu", "backend": "reference", "text": "a text",
        "text_sha256": "2" * 64, "tokens_sha256": "3" * 64, "size_bytes": bytes,
        "bytes_per_token": bytes // 2, "against": "dense", "dense_token_ppl": 10.0,
        "token_ppl_ratio": ppl / 10, "dense_size_bytes": 1000_000, "dense_bytes_per_token": 900_000,
        **more,
    }  # fmt: skip


@pytest.mark.parametrize("worst", [20.0, 400.0])
def test_points_stand_where_their_numbers_are(worst: float) -> None:
    report = as_report(evaluation("a/one", 12.0, 800_000), evaluation("a/two", worst, 400_000))
    root = parse_svg(pictures.perplexity("p", report["results"], "size_bytes", "file size"))
    points = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter(f"{SVG}circle")]
    ticks = tick_values(root)
    places = [(ticks["x"](x), ticks["y"](y)) for x, y in points]
    assert places[0] == (pytest.approx(800, rel=0.01), pytest.approx(12, rel=0.02))
    assert places[1] == (pytest.approx(400, rel=0.01), pytest.approx(worst, rel=0.02))
    (dense,) = [e for e in root.iter(f"{SVG}line") if e.get("class") == "dense"]
    assert ticks["y"](float(dense.get("y1", ""))) == pytest.approx(10, rel=0.02)
    labels = {e.text for e in root.iter(f"{SVG}text")}
    assert {"one", "two", "dense (dense)"} <= labels
    assert ("perplexity, logarithmic" in labels) == (worst == 400)


def tick_values(root: Any) -> dict[str, Callable[[float], float]]:
    """What a place on either axis stands for, read from the first and last label beside it."""
    import math

    texts = [(e.get("text-anchor"), float(e.get("x")), float(e.get("y")), e.text or "")
             for e in root.iter(f"{SVG}text") if e.get("class") is None]  # fmt: skip
    along = [(x, float(t.split()[0])) for a, x, y, t in texts if re.fullmatch(r"[\d.]+ (k?B)", t)]
    up = [(y - 4, float(t)) for a, x, y, t in texts if a == "end" and re.fullmatch(r"[\d.]+", t)]
    log = any(e.text == "perplexity, logarithmic" for e in root.iter(f"{SVG}text"))

    def reader(pairs: list[tuple[float, float]], log: bool) -> Callable[[float], float]:
        (a, v), (b, w) = pairs[0], pairs[-1]
        if log:
            return lambda place: v * math.exp(math.log(w / v) * (place - a) / (b - a))
        return lambda place: v + (w - v) * (place - a) / (b - a)

    assert len(along) > 3 and len(up) > 2
    return {"x": reader(along, False), "y": reader(up, log)}


def test_only_what_can_be_compared_shares_a_picture() -> None:
    same = evaluation("a", 12.0, 800_000), evaluation("b", 20.0, 400_000)
    assert page(as_report(*same)).count("<svg") == 2
    other = evaluation("b", 20.0, 400_000, dtype="bfloat16")
    assert page(as_report(same[0], other)).count("<svg") == 4


def test_sections_of_other_kinds_are_shown() -> None:
    tasks = {"arc_easy": {"acc": 0.5125, "acc_stderr": 0.01}, "piqa": {"acc": 0.61, "alias": "x"}}
    new = {"something_new": {"deep": {"figure": 42.5}}}
    report = as_report(evaluation("a", 12.0, 800_000, tasks=tasks, **new))
    text, summary = page(report), markdown(report)
    for part in ("arc_easy", "0.5125", "acc_stderr", "something_new.deep.figure", "42.5"):
        assert part in text
    assert "0.5125" in summary and r"arc\_easy" in summary
    step = {
        "command": "another",
        "recipe": {"search": [1, 2]},
        "source": {"name": "s", "sha256": {}},
    }
    assert "search" in page(as_report(evaluation("a", 12.0, 9), checkpoints=[large(2, [step])]))


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["/a/b/c", "/a/x/c", "demo", "org/d"]) == ["b/c", "x/c", "demo", "d"]
    assert short_names(["/c", "/a/c"]) == ["/c", "/a/c"]
    assert short_names(["x/c", "x/c"]) == ["c", "c"]


def test_nothing_that_is_shown_is_taken_for_markup() -> None:
    name = '/x/<b>&"|`*_\x1b'
    failed = {"error": name, "exit_code": 3}
    judged = [{"fail_if": name, "value": 1.0, "failed": True}]
    measured = evaluation(name, 12.0, 8, conditions=judged)
    report = as_report(measured, model_result(name), failed)
    text = page(report)
    Strict.check(text)
    assert "<b>" not in text and "<b>" not in markdown(report)
    assert all("\\|" in line for line in markdown(report).splitlines() if "&lt;b&gt;" in line)
    ElementTree.fromstring(junit(report))


def test_what_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    """Names of directories may be any bytes, which `--json` prints as lone surrogates."""
    written = files.write(as_report(evaluation("/x/\udcff", 12.0, 8)), tmp_path / "r")
    assert all((tmp_path / "r" / name).read_text(encoding="utf-8") for name in written)


def test_equal_results_have_labels_of_their_own() -> None:
    report = as_report(*[evaluation("/x/m", 12.0, 8)] * 3)
    assert len({result["label"] for result in report["results"]}) == 3


def test_a_cpu_is_named_with_its_threads_and_dtypes() -> None:
    result = model_result() | {"cpu": "a Xeon", "threads": 2, "dense_dtype": "float32"}
    del result["gpu"]
    for text in (page(as_report(result)), markdown(as_report(result))):
        assert "a Xeon, 2 threads, bfloat16, dense float32" in text


class Strict(HTMLParser):
    """Fails on tags that do not match, ids that are there twice, references to nothing or elsewhere."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    @classmethod
    def check(cls, text: str) -> None:
        parser = cls()
        parser.feed(text)
        parser.close()
        assert parser.open == []
        assert len(set(parser.ids)) == len(parser.ids)
        assert set(parser.references) <= set(parser.ids)
        for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
            root = parse_svg(drawing)
            assert root[0].tag == f"{SVG}title" and root[1].tag == f"{SVG}desc"
            assert root[0].text and root[1].text and "nan" not in drawing

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs), tag
        assert tag not in ("script", "link", "iframe", "object")
        assert values.get("src", "data:").startswith("data:") and "href" not in values
        assert tag != "img" or values["alt"]
        self.ids += [values["id"]] if "id" in values else []
        self.references += values.get("aria-labelledby", "").split()
        self.references += re.findall(r"url\(#(.*?)\)", values.get("fill", ""))
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.get_starttag_text().endswith("/>") or self.open[-1:] == [tag]:  # type: ignore[union-attr]
            assert self.open.pop() == tag


def parse_svg(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing.replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ', 1))


def large(blocks: int, steps: Any = ()) -> dict[str, Any]:
    """A checkpoint of the report with so many blocks, every figure another."""
    generator = torch.Generator().manual_seed(blocks)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def some() -> float:
        return float(torch.rand((), generator=generator))

    places = [(b, n, f"model.layers.{b}.{n}") for b in range(blocks) for n in names]
    sites = [
        {
            "name": name, "block": b, "projection": n, "shape": [576, 576], "sparsity": some(),
            "encoding": "bitmask", "bytes": {"before": 9, "after": 5}, "error": some(),
            "figures": {"relative_error": some()},
        }
        for b, n, name in places
    ]  # fmt: skip
    maps = {name: ["10110", "01010"] for _, _, name in places}
    gates = [
        {
            "name": name, "block": b, "projection": n, "kind": "input", "members": [name],
            "sparsity": 0.4, "threshold": 0.1 + some(), "zeros": 0.0, "ratio": 1.0, "rank": 0,
            "measured": None, "curve": [i / 100 * (0.1 + b) for i in range(96)],
        }
        for b, n, name in places
        if n in ("q_proj", "o_proj", "gate_proj", "down_proj")
    ]  # fmt: skip
    return {
        "name": "large", "label": "large", "manifest_sha256": "0" * 64, "model_type": "llama",
        "blocks": blocks, "dtype": "bfloat16", "format": "llmsqueeze",
        "bytes": {"file": 55, "tensors": 50, "dense": 90}, "bytes_per_token": 50, "sparsity": 0.5,
        "steps": list(steps), "sites": sites, "tiles": {"size": 128, "sites": maps},
        "activation": {"method": "teal", "prefill": "dense", "curve_step": 0.01, "gates": gates},
        "kv_cache": None,
    }  # fmt: skip


def crowded(blocks: int) -> dict[str, Any]:
    """A report with all pictures: many blocks, and results close together under long names."""
    close = [
        evaluation(f"x/a-rather-long-name-of-{i}", 12 + 0.01 * i, 600_000 + 900 * i)
        for i in range(9)
    ]
    report = as_report(*close, model_result(), kernels_result(), checkpoints=[large(blocks)])
    jsonschema.validate(report, REPORT_SCHEMA)
    return report


@pytest.mark.parametrize("blocks", [1, 30, 80])
def test_the_page_is_strict_and_needs_nothing_else(blocks: int) -> None:
    text = page(crowded(blocks))
    Strict.check(text)
    assert len(re.findall("<svg", text)) == 9
    assert not re.search(r"https?://|@import", text)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
# Run in the page: texts of a picture that overlap or leave it, and what made the page scroll sideways.
MEASURE = """<script>
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect(), boxes = [];
  for (const text of svg.querySelectorAll("text")) {
    const a = text.getBoundingClientRect();
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 ||
        a.bottom > frame.bottom + 1) found.push("outside: " + text.textContent);
    for (const [b, other] of boxes)
      if (a.left + 1 < b.right && b.left + 1 < a.right && a.top + 4 < b.bottom && b.top + 4 < a.bottom)
        found.push("over: " + text.textContent + " / " + other);
    boxes.push([a, text.textContent]);
  }
}
if (document.documentElement.scrollWidth > window.innerWidth) found.push("wider than the window");
document.body.innerHTML = "<p>texts: " + JSON.stringify(found) + "</p>";
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to lay the page out")
@pytest.mark.parametrize(("blocks", "width"), [(30, 1100), (80, 1100), (80, 500)])
def test_no_label_covers_another_in_a_browser(tmp_path: Path, blocks: int, width: int) -> None:
    file = tmp_path / "page.html"
    opened = page(crowded(blocks)).replace("<details>", "<details open>")
    file.write_text(opened.replace("</body>", MEASURE + "</body>"))
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        f"--window-size={width},900", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (texts,) = re.findall("<p>texts: (.*)</p>", done.stdout)
    assert json.loads(texts) == []


def test_a_map_of_tiles_is_a_png_of_them() -> None:
    """Decoded by the format's own rules: width, height, one bit a pixel, rows after a filter byte."""
    import base64
    import struct
    import zlib

    rows = ["1010110011", "0000000001", "1111111111"]
    tag = tiles.image(rows, 6, "label")
    data = base64.b64decode(re.findall('base64,(.*?)"', tag)[0])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        chunks[body[:4]], at = body[4:], at + 12 + length
    assert struct.unpack(">IIBB", chunks[b"IHDR"][:10]) == (10, 3, 1, 3)
    lines = zlib.decompress(chunks[b"IDAT"])
    assert ["".join(f"{b:08b}" for b in lines[i + 1 : i + 3])[:10] for i in (0, 3, 6)] == rows
    assert 'width="60" height="18"' in tag


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0, 1, False), (0, 7.3, False), (3e-5, 0.4, True), (20, 27, True), (1, 1e9, True),
        (0, 3e8, False),
    ],
)  # fmt: skip
def test_ticks_are_few_and_inside(low: float, high: float, log: bool) -> None:
    axis = svg.Axis(low, high, 0, 100, log)
    assert 2 <= len(axis.ticks) <= 9
    assert all(-1e-6 <= axis.at(tick) <= 100 + 1e-6 for tick in axis.ticks)
    assert axis.at(low) == 0 and axis.at(high) == pytest.approx(100)


def test_for_terminals_pipes_and_actions(
    cli: Cli, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    what = [made / "eval.json", "--fail-if", "token_ppl > 1"]
    plain = cli("report", *what, "-o", tmp_path / "a")
    assert plain.exit_code == 1 and "\x1b" not in plain.stdout + plain.stderr
    assert "FAILED" in plain.stdout and "::error" not in plain.stderr
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;31m" in cli("report", *what, "-o", tmp_path / "b").stderr
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in cli("report", *what, "-o", tmp_path / "c").stderr
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = cli("report", *what, "-o", tmp_path / "d", "--json")
    assert json.loads(result.stdout)["failed"]  # one document still
    (line,) = [entry for entry in result.stderr.splitlines() if entry.startswith("::error")]
    assert line.startswith("::error title=llmsqueeze::token_ppl > 1: ")
    result = cli("report", tmp_path / "absent%.json", "-o", tmp_path / "e")
    assert "::error title=llmsqueeze::" in result.stderr and "absent%25.json" in result.stderr
    quiet = cli("report", made / "out", "-o", tmp_path / "f", "-q")
    assert quiet.exit_code == 0 and quiet.stderr == ""


# Stands for the command on the PATH of a script: leaves a request, and gives what came of it.
SHIM = """#!/bin/sh
here=$(mktemp -d "$REQUESTS/XXXXXX")
printf '%s\\n' "$@" > "$here/arguments"
mv "$here/arguments" "$here/request"
until [ -e "$here/code" ]; do sleep 0.05; done
cat "$here/stdout"
cat "$here/stderr" >&2
exit "$(cat "$here/code")"
"""


@pytest.mark.parametrize(("ratio", "code"), [("100", 0), ("0.5", 1)])
def test_the_workflow_of_the_readme(
    cli: Cli, tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ratio: str, code: int,
) -> None:  # fmt: skip
    """Its shell lines, as GitHub Actions runs them: with limits that hold, and with one that does not.

    The shell is a real one; its commands run in this process, where torch is imported already.
    """
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = re.findall("<!-- pipeline -->\n```yaml\n(.*?)```", readme, re.DOTALL)
    job = yaml.safe_load(block)["jobs"]["compress"]
    (script,) = [step["run"] for step in job["steps"] if step.get("id") == "squeeze"]
    shim, requests, work = (tmp_path / name for name in ("bin", "requests", "work"))
    for directory in (shim, requests, work):
        directory.mkdir()
    (shim / "llmsqueeze").write_text(SHIM)
    (shim / "llmsqueeze").chmod(0o755)
    environment = {key: str(value) for key, value in job["env"].items()} | {
        "MODEL": str(tiny()),
        "CALIBRATION": f"--calib {text_file} --samples 4 --seqlen 24 --method wanda --device cpu",
        "EVALUATION": "--seqlen 32 --windows 4 --device cpu",
        "RATIO": ratio, "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(work / "summary.md"),
        "REQUESTS": str(requests), "PATH": f"{shim}:{os.environ['PATH']}",
    }  # fmt: skip
    assert environment.keys() >= job["env"].keys()
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(work)
    shell = subprocess.Popen(
        ["bash", "-e", "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    ran = []
    try:
        while shell.poll() is None:
            for request in requests.glob("*/request"):
                ran.append(request.read_text().splitlines())
                request.unlink()
                result = cli(*ran[-1])
                for name in ("stdout", "stderr", "exit_code"):
                    (request.parent / name).write_text(str(getattr(result, name)))
                (request.parent / "exit_code").rename(request.parent / "code")
            time.sleep(0.02)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    _, err = shell.communicate()
    assert [arguments[0] for arguments in ran] == ["prune", "eval", "report"]
    assert shell.returncode == code, err
    errors = [line for line in err.splitlines() if "::error" in line]
    assert len(errors) == code
    assert all("::error title=llmsqueeze::token_ppl_ratio > 0.5: " in line for line in errors)
    assert (work / "summary.md").read_text().startswith(f"## {'❌' if code else '✅'}")
    failures = ElementTree.parse(work / "report" / "junit.xml").getroot()
    assert failures.get("failures") == str(code)
