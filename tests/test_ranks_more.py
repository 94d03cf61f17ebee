"""Calibrating gates and codebooks on several ranks: the bytes of one, whatever their number."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsqueeze.shards import KV_NAME
from tests.test_ranks import Launcher
from tests.test_resume import contents

Cli = Callable[..., Any]
Tiny = Callable[..., Path]
BLOCKS = 3


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"), tiny())
    yield launcher
    launcher.close()


@pytest.fixture
def calibration(text_file: Path) -> list[object]:
    small = ["--samples", 5, "--seqlen", 24, "--batch-size", 1]
    return ["--calib", text_file, *small, "--device", "cpu", "--no-progress"]


def same_bytes(
    launcher: Launcher, folder: Path, args: list[object], sizes: tuple[int, ...], before: str = ""
) -> Path:
    """What one rank makes of it, once the others have made the same."""
    for size in (1, *sizes):
        out = folder / str(size)
        args_of = [*args, "--gpus", size, "-o", out, "--json"]
        assert launcher.run(args_of, before=before) == 0, launcher.said
        documents = [line for line in launcher.said.splitlines() if line.startswith("{")]
        assert len(documents) == 1 and json.loads(documents[0])["ranks"] == size
        assert launcher.said.count(f"calibrating block {BLOCKS}/") == 1
        assert contents(out) == contents(folder / "1")
    assert {path.name for path in folder.iterdir()} == {str(n) for n in (1, *sizes)}
    return folder / "1"


# Chosen on tokens of three parts, of which not all are too small to have branches.
BRANCHES = """
from llmsqueeze import gate_calibration
from llmsqueeze.methods import rsparse
gate_calibration.BRANCH_TOKENS, gate_calibration.BRANCH_GAIN = 50, -1
rsparse.RATIOS = (0.8, 0.65)
"""
GATES: dict[str, tuple[list[object], tuple[int, ...]]] = {
    "teal": (["--allocation", "uniform"], (2, 3, 4)),
    "teal, greedy": (["--batch-size", 2], (3,)),
    "wina": (["--method", "wina", "--allocation", "uniform", "--dtype", "bfloat16"], (2,)),
    "wina, greedy": (["--method", "wina", "--no-sequential"], (3,)),
    "chess": (["--method", "chess", "--allocation", "uniform"], (2,)),
    "chess, greedy": (["--method", "chess", "--samples", 20, "--seqlen", 16], (3,)),
    "rsparse": (["--method", "rsparse"], (2, 3)),
    "rsparse, one ratio": (["--method", "rsparse", "--rsparse-ratio", 0.8], (2,)),
    "fewer samples than ranks": (["--samples", 2], (4,)),
    "rotated and rounded": (["--rotate", "--encode", "int8"], (2,)),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_have_the_same_bytes(
    launcher: Launcher, tiny: Tiny, calibration: list[object], tmp_path: Path, name: str
) -> None:
    options, sizes = GATES[name]
    branches = "rsparse" in name
    before = BRANCHES if branches else ""
    args = ["sparsify", tiny(), *calibration, *options]
    out = same_bytes(launcher, tmp_path, args, sizes, before)
    gates = json.loads((out / "llmsqueeze.json").read_text())["activation"]["gates"].values()
    assert any(gate["rank"] for gate in gates) == branches
    if not branches:
        assert (len({gate["sparsity"] for gate in gates}) > 1) == ("uniform" not in options)
    assert len(list(out.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(("method", "then"), [("rsparse", 3), ("chess", 1)])
def test_gates_that_were_stopped_any_number_goes_on_with(
    launcher: Launcher, tiny: Tiny, calibration: list[object], tmp_path: Path, method: str, then: int
) -> None:  # fmt: skip
    args = ["sparsify", tiny(num_hidden_layers=8), *calibration, "--method", method]
    assert launcher.run([*args, "-o", tmp_path / "whole"]) == 0, launcher.said
    pid = launcher.start([*args, "--gpus", 2, "-o", tmp_path / "out", "--json"])
    launcher.wait_for("calibrating block 1/")
    os.kill(pid, signal.SIGTERM)
    assert launcher.end() == 75, launcher.said
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out.work"}
    again = [*args, "--gpus", then, "-o", tmp_path / "out", "--resume", "required"]
    assert launcher.run(again) == 0, launcher.said
    assert "going on after block" in launcher.said
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_thresholds_are_read_off_by_one(
    launcher: Launcher, tiny: Tiny, calibration: list[object], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    assert launcher.run(["sparsify", tiny(), *calibration, "-o", first]) == 0, launcher.said
    args = ["sparsify", first, "--sparsity", 0.3, "--device", "cpu"]
    for size in (1, 2):
        assert launcher.run([*args, "--gpus", size, "-o", tmp_path / str(size)]) == 0, launcher.said
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_fails_of_is_said_by_the_first(
    launcher: Launcher, tiny: Tiny, calibration: list[object], tmp_path: Path, rank: int
) -> None:
    before = f"""
def FAULT(rank):
    from llmsqueeze import gate_calibration
    from llmsqueeze.errors import CalibrationError
    def fail(*args): raise CalibrationError("the gates are odd")
    if rank == {rank}: gate_calibration._observe = fail
"""
    args = ["sparsify", tiny(), *calibration, "--gpus", 2, "-o", tmp_path / "out", "-q", "--json"]
    assert launcher.run(args, before=before) == 3, launcher.said
    errors = [line for line in launcher.said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "the gates are odd" in errors[0], launcher.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize(
    ("command", "options"),
    [("sparsify", ["--method", method]) for method in ("teal", "chess", "rsparse")]
    + [("quantize-kv", []), ("quantize-kv", ["--outliers", 0.05, "--bits", 3])],
)
def test_gpus_give_the_same_bytes(
    tiny: Tiny, calibration: list[object], tmp_path: Path, command: str, options: list[object]
) -> None:
    """By nccl, and as on one of them."""
    base = [sys.executable, "-m", "llmsqueeze", command, tiny(), *calibration, *options]
    for size in (1, 2):
        args = [*base, "--device", "cuda", "--gpus", size, "-o", tmp_path / str(size)]
        done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


CACHES: dict[str, tuple[list[object], tuple[int, ...]]] = {
    "kvquant": ([], (2, 3, 4)),
    "kvquant with outliers": (["--outliers", 0.05, "--bits", 3, "--batch-size", 2], (2,)),
    "plain": (["--plain", "--outliers", 0.05, "--bits", 2], (3,)),
    "fewer samples than ranks": (["--samples", 2, "--dtype", "bfloat16"], (4,)),
}


@pytest.mark.parametrize("name", CACHES)
def test_codebooks_have_the_same_bytes(
    launcher: Launcher, tiny: Tiny, calibration: list[object], tmp_path: Path, name: str
) -> None:
    options, sizes = CACHES[name]
    out = same_bytes(launcher, tmp_path, ["quantize-kv", tiny(), *calibration, *options], sizes)
    assert (out / KV_NAME).exists()


def test_a_cache_without_codebooks_too(launcher: Launcher, tiny: Tiny, tmp_path: Path) -> None:
    args = ["quantize-kv", tiny(), "--method", "rotate", "--device", "cpu"]
    for size in (1, 2):
        assert launcher.run([*args, "--gpus", size, "-o", tmp_path / str(size)]) == 0, launcher.said
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


def test_gradients_are_for_one(
    launcher: Launcher, tiny: Tiny, calibration: list[object], tmp_path: Path
) -> None:
    args = ["quantize-kv", tiny(), *calibration, "--fisher", "--gpus", 2, "-o", tmp_path / "out"]
    assert launcher.run([*args, "-q"]) == 2
    assert launcher.said.startswith("error: --fisher takes gradients of the whole model")
    assert launcher.said.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_codebooks_that_were_stopped_any_number_goes_on_with(
    launcher: Launcher, tiny: Tiny, calibration: list[object], tmp_path: Path
) -> None:
    """After the layers that the ranks fit side by side."""
    args = ["quantize-kv", tiny(num_hidden_layers=8), *calibration]
    assert launcher.run([*args, "-o", tmp_path / "whole"]) == 0, launcher.said
    pid = launcher.start([*args, "--gpus", 2, "-o", tmp_path / "out", "--json"])
    launcher.wait_for("calibrating block 1/")
    os.kill(pid, signal.SIGTERM)
    assert launcher.end() == 75, launcher.said
    stopped = re.search(r"stopped after block (\d) of 8", launcher.said)
    assert stopped and int(stopped[1]) % 2 == 0
    again = [*args, "--gpus", 3, "-o", tmp_path / "out", "--resume", "required"]
    assert launcher.run(again) == 0, launcher.said
    assert f"going on after block {stopped[1]}" in launcher.said
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
