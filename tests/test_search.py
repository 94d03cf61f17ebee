"""`compress --target-ppl-ratio`: the search against trying everything, and what it publishes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.data import load_tokenizer
from llmsqueeze.search import bisect, descend
from tests.conftest import save_tokenizer, tiny_model
from tests.test_compress import same

Cli = Callable[..., Any]
Tiny = Callable[..., Path]


@given(st.integers(1, 60), st.integers(-1, 60), st.floats(-5, 65))
def test_bisection_finds_the_last_that_is_within(count: int, last: int, first: float) -> None:
    asked = []

    def within(value: float) -> bool:
        asked.append(value)
        return value <= last

    values = list(range(count))
    found = bisect(values, within, first)
    assert found == (None if last < 0 else min(last, count - 1))
    assert len(asked) == len(set(asked)) <= 1 + math.ceil(math.log2(count + 1))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_downhill_finds_the_minimum(first: int, minimum: int, feasible: int) -> None:
    def cost(value: float) -> float:
        return abs(value - minimum) if value <= feasible else math.inf

    found = descend(cost, first, 2, 0, 20)
    assert cost(found) == min(cost(value) for value in range(21))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A tiny model that knows the text a little: of random weights, compression loses nothing."""
    model = tiny_model()
    path = tmp_path_factory.mktemp("trained") / "checkpoint"
    save_tokenizer(path)
    tokens = load_tokenizer(path)(text_file.read_text())["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // 32 * 32]).reshape(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(60):
        batch = windows[torch.randint(len(windows), (16,))]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3  # of 5.1 by chance
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def options(text_file: Path) -> list[Any]:
    return ["--text", text_file, "--windows", 6, "--seqlen", 32, "--device", "cpu", "-q", "--json"]


def recipe(path: Path, text_file: Path, *steps: str, **changes: Any) -> Path:
    calibration = {"text": str(text_file), "samples": 4, "seqlen": 24}
    known: dict[str, Any] = {
        "prune": {"method": "wanda", "target": {"sparsity": 0.5}, "calibration": calibration},
        "encode": {},
        "sparsify": {"sparsity": 0.5, "calibration": calibration},
        "quantize-kv": {"method": "rotate"},
    }
    path.write_text(
        yaml.safe_dump({step: {**known[step], **changes.get(step, {})} for step in steps})
    )
    return path


def ratio_of(cli: Cli, path: Path, source: Path, options: list[Any]) -> float:
    result = cli("eval", path, "--against", source, *options)
    assert result.exit_code == 0, result.stderr
    ratio = json.loads(result.stdout)["token_ppl_ratio"]
    assert isinstance(ratio, float)
    return ratio


def test_it_finds_what_trying_every_sparsity_finds(
    cli: Cli, trained: Path, tmp_path: Path, text_file: Path, options: list[Any]
) -> None:
    source, out, base = trained, tmp_path / "out", tmp_path / "base"
    file = recipe(tmp_path / "r", text_file, "encode", "sparsify", "quantize-kv")
    result = cli("compress", source, "-o", base, "--recipe", file, "--device", "cpu", "-q")
    assert result.exit_code == 0, result.stderr
    ratios = {0.5: ratio_of(cli, base, source, options)}
    for share in (0.2, 0.4, 0.6):
        changed = tmp_path / f"s{share}"
        assert cli("sparsify", base, "-o", changed, "--sparsity", share, "-q").exit_code == 0
        ratios[share] = ratio_of(cli, changed, source, options)
    goal = (ratios[0.4] + ratios[0.5]) / 2
    args = ["--recipe", file, "--target-ppl-ratio", goal, *options]
    result = cli("compress", source, "-o", out, *args)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    found = document["settings"]["sparsify.sparsity"]
    # On the coarse grid nothing better is within; next to what was found, all was tried that matters.
    assert 0.4 <= found < 0.5
    assert max(share for share, ratio in ratios.items() if ratio <= goal) == 0.4
    tried = {p["settings"]["sparsify.sparsity"]: p for p in document["points"]}
    assert tried[found]["within"] and not tried[round(found + 0.01, 2)]["within"]
    assert len(tried) <= 9
    # What was published is what was said of it, and was recorded with its path.
    assert ratio_of(cli, out, source, options) == pytest.approx(
        document["token_ppl_ratio"], rel=1e-6
    )
    assert document["token_ppl_ratio"] <= goal
    made = Checkpoint(out)
    assert made.manifest and made.manifest.steps[-1]["search"]["points"] == document["points"]
    assert cli("inspect", out, "--verify").exit_code == 0
    # And its manifest makes it again.
    manifest = out / "llmsqueeze.json"
    again = cli(
        "compress", source, "-o", tmp_path / "again", "--recipe", manifest, *options[-4:]
    )  # fmt: skip
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["reproduced"] is True
    assert same(out, tmp_path / "again")


def test_pruning_alone_is_bisected(
    cli: Cli, trained: Path, tmp_path: Path, text_file: Path, options: list[Any]
) -> None:
    source = trained
    ratios = {}
    for share in (0.5, 0.8):
        pruned = tmp_path / f"p{share}"
        file = recipe(tmp_path / "r", text_file, "prune", prune={"target": {"sparsity": share}})
        result = cli("compress", source, "-o", pruned, "--recipe", file, "--device", "cpu", "-q")
        assert result.exit_code == 0, result.stderr
        ratios[share] = ratio_of(cli, pruned, source, options)
    goal = (ratios[0.5] + ratios[0.8]) / 2
    file = recipe(tmp_path / "r", text_file, "prune", prune={"allocation": "uniform"})
    args = ["--recipe", file, "--target-ppl-ratio", goal, *options]
    result = cli("compress", source, "-o", tmp_path / "out", *args)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert 0.5 <= document["settings"]["prune.target.sparsity"] < 0.8
    assert {p["settings"]["prune.allocation"] for p in document["points"]} == {"uniform"}
    file = recipe(tmp_path / "r", text_file, "prune")
    result = cli("compress", source, "-o", tmp_path / "two", *["--recipe", file, *args[2:]])
    document = json.loads(result.stdout)
    assert {p["settings"]["prune.allocation"] for p in document["points"]} == {
        "uniform",
        "owl",
        "alpha",
    }


def test_both_together_are_no_worse_than_one(
    cli: Cli, trained: Path, tmp_path: Path, text_file: Path, options: list[Any]
) -> None:
    source = trained
    read = {}
    for name, steps in {"gates": ["sparsify"], "both": ["prune", "sparsify"]}.items():
        changes = {"prune": {"allocation": "uniform", "target": {"sparsity": 0.2}}}
        file = recipe(tmp_path / name, text_file, *steps, **changes)
        args = ["--recipe", file, "--target-ppl-ratio", 1.02, *options]
        result = cli("compress", source, "-o", tmp_path / f"{name}.out", *args)
        assert result.exit_code == 0, result.stderr
        document = json.loads(result.stdout)
        best = min(p["bytes_per_token"] for p in document["points"] if p["within"])
        assert document["bytes_per_token"]["after"] == best
        read[name] = best
    assert read["both"] <= read["gates"]


def test_a_goal_out_of_reach_writes_nothing(
    cli: Cli, trained: Path, tmp_path: Path, text_file: Path, options: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from llmsqueeze import search

    measure = search.Search.measure

    def worse(self: Any, checkpoint: Checkpoint) -> float:
        return measure(self, checkpoint) * (1.5 if checkpoint.manifest else 1)

    monkeypatch.setattr(search.Search, "measure", worse)
    file = recipe(tmp_path / "r", text_file, "sparsify")
    args = ["--recipe", file, "--target-ppl-ratio", 1.01, *options]
    result = cli("compress", trained, "-o", tmp_path / "out", *args)
    assert result.exit_code == 1, result.stderr
    assert "failed: token_ppl_ratio > 1.01" in result.stderr
    document = json.loads(result.stdout)
    assert document["out"] is None and document["token_ppl_ratio"] > 1.01
    assert document["points"] and not any(point["within"] for point in document["points"])
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--set", "encode.to=int8", "--target-ppl-ratio", 1.05], "no sparsity to search"),
        (
            ["--set", "prune.target.pattern=2:4", "--target-ppl-ratio", 1.05],
            "no sparsity to search",
        ),
        (["--set", "sparsify.method=rsparse", "--target-ppl-ratio", 1.05], "no sparsity to search"),
        (["--preset", "fastest", "--target-ppl-ratio", 0.9], "outside"),
        (["--preset", "fastest", "--windows", 3], "--target-ppl-ratio"),
    ],
)
def test_what_cannot_be_searched(
    cli: Cli, tiny: Tiny, tmp_path: Path, args: Any, says: str
) -> None:
    result = cli("compress", tiny(), "-o", tmp_path / "out", *args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_measured_twice_must_be_within_twice(
    cli: Cli, trained: Path, tmp_path: Path, text_file: Path, options: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from llmsqueeze import search

    measure = search.Search.measure

    def drifting(self: Any, checkpoint: Checkpoint) -> float:
        again = checkpoint.path == self.kept
        return measure(self, checkpoint) * (1.2 if again else 1)

    monkeypatch.setattr(search.Search, "measure", drifting)
    file = recipe(tmp_path / "r", text_file, "sparsify")
    args = ["--recipe", file, "--target-ppl-ratio", 1.05, *options]
    result = cli("compress", trained, "-o", tmp_path / "out", *args)
    assert result.exit_code == 1, result.stderr
    document = json.loads(result.stdout)
    assert document["out"] is None and document["token_ppl_ratio"] > 1.05
    assert any(point["within"] for point in document["points"])
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
