"""Activations that wait on the host or on the disk: the same numbers, and the same bytes in the end."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsqueeze import compress
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import ResourceError, Stopped
from llmsqueeze.parking import Parked, Parking
from llmsqueeze.plan import memory_estimate
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.work import Work
from tests.test_resume import contents

Cli = Callable[..., Any]
Tiny = Callable[..., Path]
CPU = torch.device("cpu")
SHAPE = (5, 7, 6)


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_put_there_comes_back(tmp_path: Path, dtype: torch.dtype, disk: bool) -> None:
    x = torch.randn(SHAPE).to(dtype)
    parked = Parked(SHAPE, dtype, CPU, tmp_path if disk else None)
    parked[0:3] = x[0:3]
    parked[3:5] = x[3:5].float()
    parked[4] = x[4]
    assert len(parked) == 5 and parked.shape == SHAPE and parked.nbytes == x.nbytes
    assert torch.equal(parked[0:5], x) and torch.equal(parked[2:4], x[2:4])
    assert parked[5:9].shape == (0, *SHAPE[1:])
    before, twin = parked.cpu(), parked.clone()
    parked[1:2] = torch.zeros(1, *SHAPE[1:])
    assert torch.equal(before, x) and torch.equal(twin[0:5], x)
    twin[0:5] = x.flip(0)
    assert torch.equal(twin[0:5], x.flip(0)) and torch.equal(parked[2:5], x[2:5])
    parked[0:1].zero_()  # a copy
    assert torch.equal(parked[0:1], x[0:1])
    assert not list(tmp_path.iterdir())


def test_only_what_lies_elsewhere_is_parked(tmp_path: Path) -> None:
    for place in ("device", "host"):
        assert isinstance(Parking(place).new(SHAPE, torch.float32, CPU), torch.Tensor)
    assert isinstance(Parking("disk", tmp_path).new(SHAPE, torch.float32, CPU), Parked)
    assert Parking("host").elsewhere(torch.device("cuda"))


def test_no_room_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="no space left for activations"):
        Parked(SHAPE, torch.float32, CPU, tmp_path)
    monkeypatch.undo()
    parked = Parked(SHAPE, torch.float32, CPU, tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="no space left for activations"):
        parked[0:1] = torch.ones(1, *SHAPE[1:])


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "wanda"), ("--method", "sparsegpt", "--order", "block"), (),
        ("--method", "wanda", "--allocation", "owl"),
    ],
)  # fmt: skip
def test_the_result_has_the_same_bytes(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path, options: tuple[str, ...]
) -> None:
    found = []
    for place in ("device", "disk"):
        out = tmp_path / place
        result = cli(
            "prune", tiny(), "-o", out, "--calib", text_file, "--samples", 4, "--seqlen", 24,
            "--batch-size", 3, "--activations", place, "--device", "cpu", *options, "-q",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        found.append(contents(out))
        assert not out.with_name(place + ".work").exists()
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("order", ["group", "block"])
def test_a_gpu_gives_the_same_bytes_wherever_they_wait(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path, order: str
) -> None:
    found = []
    for place in ("device", "host", "disk"):
        out = tmp_path / place
        result = cli(
            "prune", tiny(), "-o", out, "--calib", text_file, "--samples", 4, "--seqlen", 24,
            "--batch-size", 3, "--activations", place, "--device", "cuda", "--order", order, "-q",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        found.append(contents(out))
    assert found[0] == found[1] == found[2]


def test_a_run_goes_on_wherever_they_wait(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    source = Checkpoint(tiny())
    text = {"text": str(text_file), "samples": 3, "seqlen": 24}
    recipe = PruneRecipe.from_dict({"calibration": text})

    def run(out: Path, place: str, stop: bool) -> None:
        work = Work(out, CPU, policy="auto", stop=lambda: stop)
        compress.prune(source, "tiny", out, recipe, CPU, work=work, activations=place)

    run(tmp_path / "whole", "device", False)
    out = tmp_path / "out"
    for place in ("disk", "device"):
        with pytest.raises(Stopped):
            run(out, place, True)
    run(out, "disk", False)
    assert contents(out) == contents(tmp_path / "whole")


def test_memory_is_that_of_a_batch(tiny: Tiny) -> None:
    source, recipe = (
        Checkpoint(tiny()),
        PruneRecipe.from_dict({"method": "wanda", "order": "block"}),
    )
    tokens = torch.empty(4096, 64, dtype=torch.int64, device="meta")
    held, parked = (
        memory_estimate(source, recipe, tokens, torch.float32, CPU, parked=parked)
        for parked in (False, True)
    )
    width = source.model.get_input_embeddings().weight.shape[1]
    waiting = tokens.numel() * width * 4
    assert 0.9 * waiting < held - parked <= waiting
