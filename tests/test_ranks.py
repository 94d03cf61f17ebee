"""Pruning on several ranks: the bytes of one, whatever their number, and no other end than a clear one.

Ranks are forks of a process that has imported torch, started by --gpus as it starts processes; that it does
start those, and that torchrun's are alike, is tested once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsqueeze import launch, ranks
from llmsqueeze.blocks import BEGINNING, Boundary
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.numerics.stats import InputStats
from llmsqueeze.parts import Pool, Split, cut_parts
from llmsqueeze.plan import largest_share
from llmsqueeze.ranks import Team, own_device, shared_out
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.world import World
from tests.test_resume import Spawner, contents

Cli = Callable[..., Any]
Tiny = Callable[..., Path]
CPU = torch.device("cpu")
BLOCKS = 3

# In place of launch._start: a fork instead of a new process, its number in a file.
FORKING = """
from llmsqueeze import launch, ranks

class Fork:
    def __init__(self, pid): self.pid, self.returncode = pid, None
    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode
    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)
    def kill(self): self.send_signal(signal.SIGKILL)
    def wait(self):
        while self.poll() is None: pass

def start(rank, size, meeting, watched):
    pid = os.fork()
    if pid:
        with open(PIDS, "a") as file: file.write(f"{pid}\\n")
        return Fork(pid)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(size), launch.MEETING: str(meeting)}
    FAULT(rank)
    try:
        cli.main()
    except SystemExit as done:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(done.code)

FAULT = lambda rank: None
launch._start = start
launch.GRACE_SECONDS = 10.0
"""


class Launcher(Spawner):
    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self._pids = folder / "pids"
        super().__init__(folder, checkpoint, FORKING.replace("PIDS", repr(str(self._pids))))

    def start(self, args: list[object], room: int = 0, before: str = "") -> int:
        self._pids.write_text("")
        return super().start(args, room, before)

    def rank(self, number: int) -> int:
        """The process of a rank, once it is there."""
        until = time.monotonic() + 60
        while len(pids := self._pids.read_text().splitlines()) <= number:
            assert time.monotonic() < until
            time.sleep(0.002)
        return int(pids[number])


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"), tiny())
    yield launcher
    launcher.close()


@pytest.fixture
def prune(tiny: Tiny, text_file: Path) -> list[object]:
    calibration = ["--calib", text_file, "--samples", 5, "--seqlen", 24, "--batch-size", 1]
    return ["prune", tiny(), *calibration, "--device", "cpu", "--no-progress"]


METHODS: dict[str, list[object]] = {
    "magnitude": ["--method", "magnitude"],
    "wanda": ["--method", "wanda"],
    "sparsegpt": ["--method", "sparsegpt"],
    "dsnot": ["--method", "dsnot"],
    "default": [],
}


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_ranks_gives_the_same_bytes(
    launcher: Launcher, prune: list[object], tmp_path: Path, method: str
) -> None:
    for size in (1, 2, 3, 4):
        args = [*prune, *METHODS[method], "--gpus", size, "-o", tmp_path / str(size), "--json"]
        assert launcher.run(args) == 0, launcher.said
        documents = [line for line in launcher.said.splitlines() if line.startswith("{")]
        assert len(documents) == 1 and json.loads(documents[0])["ranks"] == size
        assert launcher.said.count(f"pruning block {BLOCKS}/") == 1
        assert {p.name for p in tmp_path.iterdir()} == {str(n) for n in range(1, size + 1)}
        assert contents(tmp_path / str(size)) == contents(tmp_path / "1")
    assert len(list((tmp_path / "1").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--method", "wanda", "--samples", 2], 4),  # fewer samples than ranks
        (["--method", "sparsegpt", "--samples", 40, "--seqlen", 8], 3),  # more than there are parts
        (["--samples", 7, "--batch-size", 2, "--order", "block"], 3),
        (["--method", "wanda", "--refit", "pcg", "--allocation", "owl"], 2),
        (["--method", "dsnot", "--swap", "quadratic", "--dtype", "bfloat16"], 2),
        (["--pattern", "tile", "--tile", 8, "--allocation", "benefit"], 2),
    ],
)
def test_other_requests_too(
    launcher: Launcher, prune: list[object], tmp_path: Path, options: list[object], size: int
) -> None:
    assert launcher.run([*prune, *options, "-o", tmp_path / "one"]) == 0, launcher.said
    args = [*prune, *options, "--gpus", size, "-o", tmp_path / "several"]
    assert launcher.run(args) == 0, launcher.said
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


@pytest.mark.parametrize("order", ["group", "block"])
def test_experts_too(
    launcher: Launcher, tiny: Tiny, prune: list[object], tmp_path: Path, order: str
) -> None:
    args = [prune[0], tiny("mixtral", num_hidden_layers=1), *prune[2:], "--order", order]
    for size in (1, 3):
        out = tmp_path / str(size)
        assert launcher.run([*args, "--gpus", size, "-o", out]) == 0, launcher.said
    assert contents(tmp_path / "3") == contents(tmp_path / "1")


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_rank_that_is_killed_ends_the_run_and_any_number_goes_on(
    launcher: Launcher, prune: list[object], tmp_path: Path, lost: int
) -> None:
    args = [*prune, "--method", "sparsegpt"]
    began = time.monotonic()
    assert launcher.run([*args, "--gpus", 3, "-o", tmp_path / "whole"]) == 0, launcher.said
    takes = time.monotonic() - began
    chance = random.Random(lost)
    folder = tmp_path / "folder"
    folder.mkdir()
    out = folder / "out"
    for attempt in range(3):
        launcher.start([*args, "--gpus", 3, "-o", out, "--json"])
        if attempt == 0:  # surely when there is a state
            launcher.wait_for("pruning block 2/")
        else:
            time.sleep(chance.uniform(0, takes))
        killed = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(launcher.rank(lost), signal.SIGKILL)
        code = launcher.end()
        assert time.monotonic() - killed < takes + 30
        assert code == 75 or (code == 0 and out.exists()), launcher.said
        assert {p.name for p in folder.iterdir()} <= {"out", "out.work"}
        assert "Traceback" not in launcher.said
        if code == 75:
            assert lost == 0 or not out.exists()
            documents = [line for line in launcher.said.splitlines() if line.startswith("{")]
            assert len(documents) == 1 and json.loads(documents[0])["exit_code"] == 75
            assert f"rank {lost} of 3 was ended by SIGKILL" in launcher.said
            assert launcher.said.count("error:") == 1
        if attempt == 0:
            assert code == 75 and not out.exists()
            assert (folder / "out.work" / "run.json").exists()
        if out.exists():
            break
    if not out.exists():
        required = ["--resume", "required", "--gpus", lost + 1]
        assert launcher.run([*args, *required, "-o", out]) == 0, launcher.said
        assert "going on after block" in launcher.said
    assert contents(out) == contents(tmp_path / "whole")
    assert [p.name for p in folder.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "then"), [(signal.SIGTERM, 1), (signal.SIGINT, 3)])
def test_stopped_after_a_block_any_number_goes_on(
    launcher: Launcher, prune: list[object], tmp_path: Path, number: int, then: int
) -> None:
    assert launcher.run([*prune, "-o", tmp_path / "whole"]) == 0, launcher.said
    folder = tmp_path / "folder"
    folder.mkdir()
    pid = launcher.start([*prune, "--gpus", 2, "-o", folder / "out", "--json"])
    launcher.wait_for("pruning block 1/")
    os.kill(pid, number)
    assert launcher.end() == 75, launcher.said
    document = json.loads(launcher.said.splitlines()[-1])
    assert document["exit_code"] == 75 and "goes on from there" in document["error"]
    assert launcher.said.count("stopping after this block") == 1
    assert [p.name for p in folder.iterdir()] == ["out.work"]
    again = [*prune, "--gpus", then, "-o", folder / "out", "--resume", "required"]
    assert launcher.run(again) == 0, launcher.said
    assert "going on after block" in launcher.said
    assert contents(folder / "out") == contents(tmp_path / "whole")
    assert [p.name for p in folder.iterdir()] == ["out"]


def test_a_second_signal_ends_all_at_once(
    launcher: Launcher, prune: list[object], tmp_path: Path
) -> None:
    pid = launcher.start([*prune, "--gpus", 2, "-o", tmp_path / "out"])
    launcher.wait_for("pruning block 1/")
    both = launcher.rank(0), launcher.rank(1)
    for rank in both:
        os.kill(rank, signal.SIGSTOP)  # or the block may be done between the two
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
        time.sleep(0.2)
    for rank in both:
        os.kill(rank, signal.SIGCONT)
    assert launcher.end() in (143, 130, 75), launcher.said
    assert "Traceback" not in launcher.said
    assert not (tmp_path / "out").exists()


FAULTS = {
    "calibration": ("raise CalibrationError('the Hessian is odd')", 3, "the Hessian is odd"),
    "memory": ("raise MemoryError", 5, "out of memory; try smaller --samples"),
    "disk": ("raise OSError(28, 'No space left on device')", 5, "no space left on the disk"),
    "bug": ("raise ZeroDivisionError('by nought')", 70, "ZeroDivisionError: by nought"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_fails_of_is_said_by_the_first(
    launcher: Launcher, prune: list[object], tmp_path: Path, fault: str, rank: int
) -> None:
    statement, code, says = FAULTS[fault]
    before = f"""
def fail(*args):
    from llmsqueeze.errors import CalibrationError
    {statement}
def FAULT(rank):
    from llmsqueeze import compress
    if rank == {rank}: compress.prune_site = fail
"""
    folder = tmp_path / "folder"
    folder.mkdir()
    began = time.monotonic()
    args = [*prune, "--gpus", 2, "-o", folder / "out", "-q", "--json"]
    assert launcher.run(args, before=before) == code, launcher.said
    assert time.monotonic() - began < 20  # before it would be ended by force
    errors = [line for line in launcher.said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and says in errors[0], launcher.said
    assert sum(line.startswith("{") for line in launcher.said.splitlines()) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["device", "torch", "instructions", "something new"])
def test_ranks_that_are_unlike(
    launcher: Launcher, prune: list[object], tmp_path: Path, name: str
) -> None:
    """Say, two sorts of GPUs."""
    before = f"""
def FAULT(rank):
    from llmsqueeze import ranks
    own = ranks.computer
    if rank: ranks.computer = lambda device: own(device) | {{"{name}": "another"}}
"""
    args = [*prune, "--gpus", 2, "-o", tmp_path / "out", "-q", "--json"]
    assert launcher.run(args, before=before) == 4, launcher.said
    assert f"error: rank 1 has {name} another, rank 0 " in launcher.said
    assert list(tmp_path.iterdir()) == []


def test_requests_that_cannot_be_met(
    launcher: Launcher, prune: list[object], cli: Cli, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    masks = ["--pattern", "tile", "--tiles", "tile"]
    for options, code, says in (
        (["--gpus", 2, "-o", taken], 2, "exists already"),
        (["--gpus", 2, "-o", tmp_path / "out", *masks], 2, "trains masks of the whole model"),
    ):
        assert launcher.run([*prune, *options, "-q"]) == code, launcher.said
        assert says in launcher.said and launcher.said.count("\n") == 1
    result = cli(*prune, "--gpus", 17, "-o", tmp_path / "out", "-q")
    assert result.exit_code == 2 and "at most 16" in result.stderr
    assert sorted(tmp_path.iterdir()) == [taken]


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are GPUs enough")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_fewer_gpus_than_ranks(
    launcher: Launcher, prune: list[object], tmp_path: Path, device: str
) -> None:
    args = [*prune, "--device", device, "--gpus", 2, "-o", tmp_path / "out", "-q", "--json"]
    assert launcher.run(args) == 4, launcher.said
    assert launcher.said.count("error:") == 1 and "GPUs" in launcher.said
    assert not any(tmp_path.iterdir())


def test_ranks_take_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    second = World(rank=5, size=6, local_rank=1, local_size=2)
    assert own_device("auto", second, None) == torch.device("cuda", 1)
    assert own_device("cuda", second, 6) == torch.device("cuda", 1)
    assert own_device("cpu", second, 6) == CPU
    with pytest.raises(RecipeError, match="GPU of its own"):
        own_device("cuda:1", second, None)
    with pytest.raises(ranks.EnvironmentFault, match=r"3 ranks: this torch .* sees 2 GPUs"):
        own_device("auto", World(size=3, local_size=3), 3)


def test_other_commands_and_numbers_are_refused_under_torchrun(
    cli: Cli, prune: list[object], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a cluster, it may mean anything
    monkeypatch.setenv("RANK", "0")
    assert launch.world() == World()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    out = ["-o", tmp_path / "out"]
    for command in (["eval", tiny()], ["doctor"]):
        result = cli(*command, "-q")
        assert result.exit_code == 2 and "only `prune`" in result.stderr
    result = cli(*prune, *out, "--gpus", 3)
    assert result.exit_code == 2 and "--gpus 3 in one of 2 ranks" in result.stderr
    monkeypatch.setenv("RANK", "1")
    result = cli(*prune, *out, "--gpus", 3, "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "")
    assert not any(tmp_path.iterdir())


def test_processes_are_started_by_us_and_by_torchrun(
    prune: list[object], cli: Cli, tmp_path: Path
) -> None:
    args = [*prune, "--method", "wanda", "--json", "-q"]
    starts = {
        "own": (["-m", "llmsqueeze"], ["--gpus", 2]),
        "torchrun": (
            [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                2,
                "-m",
                "llmsqueeze",
            ],
            [],
        ),
    }
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    started = {
        name: subprocess.Popen(
            [str(a) for a in [sys.executable, *before, *args, *after, "-o", tmp_path / name]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for name, (before, after) in starts.items()
    }  # fmt: skip
    assert cli(*args, "-o", tmp_path / "one").exit_code == 0
    for name, process in started.items():
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert json.loads(stdout)["ranks"] == 2
        assert contents(tmp_path / name) == contents(tmp_path / "one")


def test_a_rank_ends_like_by_a_signal_when_its_launcher_is_gone() -> None:
    watched, kept = os.pipe()
    code = "import time; from llmsqueeze import launch; launch._follow_launcher(); time.sleep(60)"
    rank = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, launch.LAUNCHER: str(watched)},
        pass_fds=[watched],
    )
    os.close(watched)
    time.sleep(0.5)
    assert rank.poll() is None
    os.close(kept)
    assert rank.wait(timeout=60) == -signal.SIGTERM


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("method", METHODS)
def test_gpus_give_the_same_bytes(
    prune: list[object], tmp_path: Path, text_file: Path, method: str
) -> None:
    """By nccl, and as on one of them."""
    base = [sys.executable, "-m", "llmsqueeze", *prune, *METHODS[method], "--device", "cuda"]
    for size in (1, 2):
        args = [*base, "--gpus", size, "-o", tmp_path / str(size)]
        done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


# From here on in this process.


@pytest.mark.parametrize("held_out", [0, 1, 5])
@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("samples", [6, 16, 41])
def test_parts_have_every_sample_once(samples: int, batch: int, held_out: int) -> None:
    tokens = torch.zeros(samples, 4, dtype=torch.int64)
    parts = cut_parts(tokens, batch, held_out)
    assert [s for part in parts for s in part.samples] == list(range(samples))
    assert 1 <= len(parts) <= 16
    for part in parts:
        assert {s >= samples - held_out for s in part.samples} == {part.held_out}
        assert all(rows.stop - rows.start <= batch for rows in part.batches)
    for size in (1, 2, 3, 16):
        splits = [Split.of(parts, Team(rank, size)) for rank in range(size)]
        assert sorted(s for split in splits for s in split.samples) == list(range(samples))
        assert len({len(split.own) for split in splits}) == 1
        for split in splits:
            rows = [r for batch in split.batches for r in range(batch.start, batch.stop)]
            assert rows == list(range(len(split.samples)))


def test_a_pool_has_the_sums_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 7, 5, generator=generator)
    needs = frozenset({"sum", "sq_sum", "gram", "probe"})
    split = Split.of(cut_parts(torch.zeros(40, 7), 1, 5), Team())
    pool = Pool(split, lambda: InputStats(5, needs, CPU), x[:0, 0])
    for part in split.own:
        assert part is not None
        sums = pool.fresh()
        for rows in part.batches:
            sums.update(x[rows])
        pool.add()
    stats = pool.finish()
    assert stats.held_out is not None
    for found, rows in ((stats, x), (stats.held_out, x[35:]), (stats.fitting(), x[:35])):
        tokens = rows.reshape(-1, 5).double()
        assert found.count == len(tokens)
        assert torch.allclose(found.gram.double(), tokens.t() @ tokens, rtol=1e-5, atol=1e-4)
        assert torch.allclose(found.sq_sum, tokens.square().sum(0), rtol=1e-6)
    assert torch.equal(stats.probe(), x[35:].reshape(-1, 5))
    assert torch.allclose(stats.sample_sq, x.double().sum(1).square().sum(0))


def test_tasks_are_shared_out_evenly() -> None:
    assert shared_out([3, 9, 3, 4], 2) == [1, 0, 1, 1]
    assert shared_out([1], 3) == [0]
    assert shared_out([], 3) == []
    costs = [(7 * i) % 11 + 1 for i in range(40)]
    owners = shared_out(costs, 4)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= max(costs)


@pytest.mark.parametrize(
    ("batch", "ranks", "expected"), [(2, 1, 32), (2, 3, 12), (16, 4, 16), (32, 4, 32)]
)
def test_what_a_rank_holds_is_known_before(batch: int, ranks: int, expected: int) -> None:
    recipe = PruneRecipe.from_dict({"method": "wanda", "calibration": {"samples": 32}})
    tokens = torch.zeros(32, 8, dtype=torch.int64)
    found = len(largest_share(tokens, batch, recipe, ranks))
    parts = cut_parts(tokens, batch, 0)
    assert found == expected
    assert found == max(len(Split.of(parts, Team(rank, ranks)).samples) for rank in range(ranks))


def test_a_state_of_one_process_is_dealt_out() -> None:
    """Also to a rank that has no sample: there may be fewer parts than ranks."""
    x = torch.randn(4, 3, 2)
    whole, parts = (
        Boundary(1, (x,)),
        Boundary(1, (x[:3],), (0, 1, 2), (Boundary(1, (x[3:],), (3,)),)),
    )
    for boundary in (whole, parts):
        for samples in ([], [2, 0], [0, 1, 2, 3]):
            ours = torch.full((max(len(samples), 1), 3, 2), -1.0)
            boundary.restore([ours], samples)
            assert torch.equal(ours, x[samples] if samples else torch.full((1, 3, 2), -1.0))
    BEGINNING.restore([torch.zeros(2, 3, 2)], [0, 1])
    with pytest.raises(CheckpointError, match="sample 3"):
        Boundary(1, (x[:3],), (0, 1, 2)).restore([torch.zeros(2, 3, 2)], [1, 3])


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((70, 0), 70), ((-9, 4), 4), ((-9, -15), 75), ((75, -9), 75), ((3, 3), 3)],
)
def test_the_exit_code_is_that_of_what_went_wrong_first(
    codes: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rank. One that is left alone is made to end, which is no news."""

    class Ended:
        def __init__(self, code: int) -> None:
            self.code, self.returncode, self.killed = code, None, False

        def poll(self) -> int | None:
            if self.returncode is None and (self.killed or self.code != -signal.SIGKILL):
                self.returncode = self.code
            return self.returncode

        def kill(self) -> None:
            self.killed = True

    class Quiet:
        def note(self, message: str) -> None: ...
        def error(self, message: str, code: int) -> None: ...

    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.05)
    ranks: Any = [Ended(code) for code in codes]
    console: Any = Quiet()
    ended = launch._await(console, ranks)
    assert launch._conclude(console, ranks, ended, []) == expected
