"""Runs that are cut off: killed, stopped, out of room. What goes on ends in the bits of one that was not."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmsqueeze import compress, shards, work
from llmsqueeze.blocks import Boundary, Run
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.device import worker
from llmsqueeze.errors import RecipeError, Stopped
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.work import Trail, Work, difference, sweep

Cli = Callable[..., Any]
Tiny = Callable[..., Path]
CPU = torch.device("cpu")
BLOCKS = 8

# Importing torch takes seconds, a fork of what has imported it none. Small shards, so that there are many.
SPAWNER = """
import json, os, resource, signal, sys
import torch
from pathlib import Path
from llmsqueeze import cli, quantize_kv, shards, sparsify, steps
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.data import load_tokenizer
shards.SHARD_BYTES = 60_000
load_tokenizer(Checkpoint(Path(sys.argv[1])).path)
exec(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        err = os.open(asked["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(err, 2)
        os.dup2(err, 1)
        if asked["room"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["room"], asked["room"]))
        exec(asked["before"])
        sys.argv = ["llmsqueeze", *asked["args"]]
        try:
            cli.main()
        except SystemExit as done:
            sys.stderr.flush()
            os._exit(done.code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Spawner:
    """Runs of the command line, one at a time, in processes that can be killed.

    prelude: done once, before all of them.
    """

    def __init__(self, folder: Path, checkpoint: Path, prelude: str = "") -> None:
        self._stderr = folder / "stderr"
        self._process = subprocess.Popen(
            [sys.executable, "-c", SPAWNER, str(checkpoint), prelude],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # a fork has no other threads
        )

        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def start(self, args: list[object], room: int = 0, before: str = "") -> int:
        """The process's number. room: bytes that a file may have. before: done there first."""
        asked = {
            "args": [str(arg) for arg in args],
            "stderr": str(self._stderr),
            "room": room,
            "before": before,
        }
        self._stderr.write_text("")
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> int:
        """Wait for it; its exit code, or less than 0 for the signal that killed it."""
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def run(self, args: list[object], room: int = 0, before: str = "") -> int:
        self.start(args, room, before)
        return self.end()

    def wait_for(self, text: str) -> None:
        """Until it has said so."""
        until = time.monotonic() + 60
        while text not in self.said:
            assert time.monotonic() < until, self.said
            time.sleep(0.005)

    @property
    def said(self) -> str:
        return self._stderr.read_text()

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def spawner(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Iterator[Spawner]:
    spawner = Spawner(tmp_path_factory.mktemp("spawner"), tiny(num_hidden_layers=BLOCKS))
    yield spawner
    spawner.close()


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def request_of(tiny: Tiny, tmp_path: Path, text_file: Path) -> Callable[[str], list[object]]:
    """The arguments of a command by a name for what it does, without -o."""
    calibration = {"text": str(text_file), "samples": 6, "seqlen": 32}
    recipe = {
        "prune": {"allocation": "owl", "calibration": calibration},
        "encode": {"to": "int8"},
        "sparsify": {"sparsity": 0.4, "calibration": calibration},
        "quantize-kv": {"bits": 3, "calibration": calibration},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    options = ["--calib", text_file, "--samples", 6, "--seqlen", 32, "--batch-size", 2]

    def build(what: str) -> list[object]:
        source = tiny(num_hidden_layers=BLOCKS)
        commands: dict[str, list[object]] = {
            "prune": ["prune", source, *options],
            "without data": ["prune", source, "--method", "magnitude"],
            "allocation": ["prune", source, *options, "--method", "wanda", "--allocation", "owl"],
            "tiles": ["prune", source, *options, "--method", "wanda", "--pattern", "tile", "--tile", 8,
                      "--allocation", "benefit"],
            "sparsify": ["sparsify", source, *options, "--encode", "int8"],
            "quantize-kv": ["quantize-kv", source, *options, "--bits", 3, "--fisher"],
            "compress": ["compress", source, "--recipe", file],
        }  # fmt: skip
        return [*commands[what], "--device", "cpu", "--no-progress"]

    return build


Request = Callable[[str], list[object]]


@pytest.mark.parametrize(
    ("what", "times"),
    [
        ("prune", 6),
        ("without data", 5),
        ("allocation", 5),
        ("tiles", 5),
        ("sparsify", 3),
        ("quantize-kv", 3),
        ("compress", 3),
    ],
)
def test_killed_at_any_moment_it_ends_in_the_same_bytes(
    spawner: Spawner, request_of: Request, tmp_path: Path, what: str, times: int
) -> None:
    args = request_of(what)
    began = time.monotonic()
    assert spawner.run([*args, "-o", tmp_path / "whole"]) == 0, spawner.said
    takes = time.monotonic() - began
    expected = contents(tmp_path / "whole")
    chance = random.Random(what)
    folder = tmp_path / "folder"
    folder.mkdir()
    kills = 0
    while kills < times:
        pid = spawner.start([*args, "-o", folder / "out"])
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # it was done before
            until = began + chance.uniform(0, takes)
            while time.monotonic() < until:
                os.kill(pid, 0)
                time.sleep(0.005)
            os.kill(pid, signal.SIGKILL)
        code = spawner.end()
        if code == 0:  # the rest of it, maybe on a machine with less else to do
            takes = min(takes, 2 * (time.monotonic() - began))
        assert code in (0, -signal.SIGKILL), spawner.said
        kills += code != 0
        assert {p.name for p in folder.iterdir()} <= {"out", "out.work"}
        if (folder / "out").exists():  # it was done, or killed after it had published
            assert contents(folder / "out") == expected
            shutil.rmtree(folder / "out")
    assert spawner.run([*args, "-o", folder / "out"]) == 0, spawner.said
    assert contents(folder / "out") == expected
    assert [p.name for p in folder.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("what", "number"),
    [("prune", signal.SIGINT), ("prune", signal.SIGTERM), ("compress", signal.SIGTERM)],
)
def test_stopped_after_a_block_it_goes_on(
    spawner: Spawner, request_of: Request, tmp_path: Path, what: str, number: int
) -> None:
    args = request_of(what)
    assert spawner.run([*args, "-o", tmp_path / "whole"]) == 0, spawner.said
    folder = tmp_path / "folder"
    folder.mkdir()
    pid = spawner.start([*args, "-o", folder / "out", "--json"])
    block = "pruning block" if what == "prune" else "sparsify block"
    spawner.wait_for(f"{block} 2/")
    os.kill(pid, number)
    assert spawner.end() == 75, spawner.said
    assert "Traceback" not in spawner.said
    document = json.loads(spawner.said.splitlines()[-1])
    assert document["exit_code"] == 75 and "goes on from there" in document["error"]
    assert [p.name for p in folder.iterdir()] == ["out.work"]
    again = [*args, "-o", folder / "out", "--resume", "required"]
    assert spawner.run(again) == 0, spawner.said
    assert "going on after block" in spawner.said
    assert f"{block} 1/" not in spawner.said
    assert contents(folder / "out") == contents(tmp_path / "whole")
    assert [p.name for p in folder.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(
    spawner: Spawner, request_of: Request, tmp_path: Path, number: int, code: int
) -> None:
    args = [*request_of("prune"), "-o", tmp_path / "out"]
    pid = spawner.start(args)
    spawner.wait_for("pruning block 1/")
    os.kill(pid, signal.SIGSTOP)  # or the block may be done between the two
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    spawner.wait_for("a second signal ends at once")
    os.kill(pid, number)
    assert spawner.end() in (code, 75), spawner.said
    assert "Traceback" not in spawner.said
    assert not (tmp_path / "out").exists()
    assert spawner.run(args) == 0, spawner.said


def test_without_room_nothing_is_published_and_it_goes_on(
    spawner: Spawner, request_of: Request, tmp_path: Path
) -> None:
    """A limit on the size of files makes writing fail as a full disk does, without needing one."""
    args = [*request_of("prune"), "-q"]  # what it says goes to a file, too
    assert spawner.run([*args, "-o", tmp_path / "whole"]) == 0, spawner.said
    lost = kept = 0
    # The run's identity, tensors of no shard, the first state, a shard: what does not fit first.
    for room in (1_000, 30_000, 64_000, 65_500):
        folder = tmp_path / str(room)
        folder.mkdir()
        code = spawner.run([*args, "-o", folder / "out"], room)
        assert code == 5, spawner.said
        assert "no space left" in spawner.said and "Traceback" not in spawner.said
        left = [p.name for p in folder.iterdir()]
        assert left in ([], ["out.work"])
        lost, kept = lost + (not left), kept + bool(left)
        assert spawner.run([*args, "-o", folder / "out"]) == 0, spawner.said
        assert [p.name for p in folder.iterdir()] == ["out"]
        assert contents(folder / "out") == contents(tmp_path / "whole")
    assert lost == 3 and kept == 1


# From here on in this process, where time and faults are ours.


def stop_after(blocks: int) -> Callable[[], bool]:
    """Says to stop when it is asked the n-th time."""
    asked = iter(range(1, 10_000))
    return lambda: next(asked) >= blocks


@pytest.fixture
def stopped(tiny: Tiny, tmp_path: Path, text_file: Path) -> tuple[Path, list[object]]:
    """A copy of a checkpoint, its pruning stopped after a block, and the command that it was."""
    source = tmp_path / "source"
    shutil.copytree(tiny(), source)
    text = tmp_path / "text.txt"
    shutil.copyfile(text_file, text)
    raw = {"method": "wanda", "calibration": {"text": str(text), "samples": 4, "seqlen": 24}}
    out = tmp_path / "folder" / "out"
    with pytest.raises(Stopped, match="after block 1 of 3"):
        compress.prune(
            Checkpoint(source), str(source), out, PruneRecipe.from_dict(raw), CPU,
            work=Work(out, CPU, policy="auto", stop=stop_after(1)),
        )  # fmt: skip
    args = ["prune", source, "-o", out, "--method", "wanda", "--calib", text, "--samples", 4, "--seqlen",
            24, "--device", "cpu"]  # fmt: skip
    return source, args


Stopped_ = tuple[Path, list[object]]


def test_the_same_command_goes_on(cli: Cli, stopped: Stopped_, tmp_path: Path) -> None:
    _, args = stopped
    whole = [*args[:3], tmp_path / "whole", *args[4:], "--resume", "never", "--json", "-q"]
    document = json.loads(cli(*whole).stdout)
    assert document["resumed_blocks"] == 0
    result = cli(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["resumed_blocks"] == 1
    assert contents(tmp_path / "folder" / "out") == contents(tmp_path / "whole")


def edit_run(folder: Path, **changes: object) -> None:
    file = folder / "out.work" / "run.json"
    run = json.loads(file.read_text())
    for name, value in changes.items():
        first, _, second = name.partition("__")
        if second:
            run[first][second] = value
        else:
            run[first] = value
    file.write_text(json.dumps(run))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--sparsity", 0.6], "recipe.target.sparsity (0.5 then, 0.6 now)"),
        (["--method", "magnitude"], "recipe.method"),
        (["--refit", "pcg"], "recipe.refit"),
        (["--samples", 5], "recipe.calibration.samples (4 then, 5 now)"),
        (["--dtype", "bfloat16"], "recipe.dtype"),
        (["--batch-size", 1], "recipe.batch"),
        (["--ignore", "down_proj"], "recipe.ignore"),
        ("source", "source.model.safetensors"),
        ("config", "source.config.json"),
        ("text", "calibration.text_sha256"),
        ({"versions__torch": "1.0"}, "versions.torch"),
        ({"versions__llmsqueeze": "0"}, "versions.llmsqueeze"),
        ({"versions__transformers": "4"}, "versions.transformers"),
        ({"device": "Abacus"}, "device"),
        ({"compute_dtype": "float64"}, "compute_dtype"),
        ({"command": "sparsify"}, "command"),
        ({"state_version": 0}, "state_version"),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_what_differs(
    cli: Cli, stopped: Stopped_, tmp_path: Path, change: Any, says: str
) -> None:
    source, args = stopped
    folder = tmp_path / "folder"
    if isinstance(change, list):
        args = [*args, *change]
    elif isinstance(change, dict):
        edit_run(folder, **change)
    elif change == "source":
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    elif change == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "note": "new"}))
    else:
        text = tmp_path / "text.txt"
        text.write_text(text.read_text() + ".")
    before = contents(folder)
    result = cli(*args, "-q")
    assert result.exit_code == 2, result.stderr
    assert says in result.stderr and "--resume never" in result.stderr
    assert contents(folder) == before  # nothing is lost by that
    assert cli(*args, "-q", "--resume", "never").exit_code == 0
    assert [p.name for p in folder.iterdir()] == ["out"]


def test_required_needs_a_state(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]
) -> None:
    folder = tmp_path / "folder"
    result = cli("prune", tiny(), "-o", folder / "out", *prune_args, "--resume", "required")
    assert result.exit_code == 2
    assert "has no state to go on from" in result.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["run.json", "prune.pt"])
def test_a_damaged_state_is_refused(cli: Cli, stopped: Stopped_, tmp_path: Path, name: str) -> None:
    file = tmp_path / "folder" / "out.work" / name
    file.write_bytes(file.read_bytes()[:20])
    result = cli(*stopped[1], "-q")
    assert result.exit_code == 3
    assert str(file) in result.stderr and "Traceback" not in result.stderr
    assert file.exists()


def test_commands_that_cannot_go_on_leave_a_state_alone(
    cli: Cli, stopped: Stopped_, tmp_path: Path
) -> None:
    before = contents(tmp_path / "folder")
    out = tmp_path / "folder" / "out"
    result = cli("convert", stopped[0], "-o", out, "--to", "dense", "-q")
    assert result.exit_code == 2
    assert "was cut off" in result.stderr
    assert contents(tmp_path / "folder") == before


def test_two_runs_into_one_place(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]
) -> None:
    folder = tmp_path / "folder"
    with Work(folder / "out", CPU):
        result = cli("prune", tiny(), "-o", folder / "out", *prune_args)
        assert result.exit_code == 2
        assert "another run is writing" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        with pytest.raises(RecipeError, match="another run"):
            Work(folder / "out", CPU).__enter__()
    assert list(folder.iterdir()) == []
    assert cli("prune", tiny(), "-o", folder / "out", *prune_args).exit_code == 0


def test_a_folder_of_somebody_else_is_left_alone(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any]
) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.tex").write_text("years of work")
    result = cli("prune", tiny(), "-o", tmp_path / "out", *prune_args)
    assert result.exit_code == 2
    assert "no work folder" in result.stderr
    assert (tmp_path / "out.work" / "thesis.tex").read_text() == "years of work"


def test_where_nothing_can_be_written(
    cli: Cli, tiny: Tiny, tmp_path: Path, prune_args: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = cli("prune", tiny(), "-o", tmp_path / "out", *prune_args)
    assert result.exit_code == 5
    assert "Read-only file system" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_a_source_that_changes_is_noticed(
    cli: Cli,
    tiny: Tiny,
    tmp_path: Path,
    prune_args: list[Any],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny(), source)
    file = source / "model.safetensors"
    store = compress.store_block

    def meddle(*args: Any) -> Any:
        if file.exists() and fault == "gone":
            file.rename(source / "moved")
        elif fault == "changed":
            os.utime(file, ns=(1, 1))
        return store(*args)

    monkeypatch.setattr(compress, "store_block", meddle)
    folder = tmp_path / "folder"
    result = cli("prune", source, "-o", folder / "out", *prune_args)
    assert result.exit_code == 3
    assert "model.safetensors" in result.stderr and "Traceback" not in result.stderr
    assert not (folder / "out").exists()
    if fault == "changed":
        assert "was changed while it was being read" in result.stderr
        assert (
            list(folder.iterdir()) == []
        )  # what was read may be of either: no state of that is kept
    else:  # the file may come back, and the blocks that were done are good
        (source / "moved").rename(file)
        monkeypatch.setattr(compress, "store_block", store)
        assert cli("prune", source, "-o", folder / "out", *prune_args).exit_code == 0


@pytest.mark.parametrize("fault", ["activations", "weights"])
def test_a_block_that_is_not_finite(
    cli: Cli,
    tiny: Tiny,
    tmp_path: Path,
    prune_args: list[Any],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prune_site, forward = compress.prune_site, Run.forward

    def spoil(site: Any, *args: Any) -> Any:
        pruned = prune_site(site, *args)
        if site.name == "model.layers.1.mlp.down_proj":
            pruned.weight[0, 0] = torch.nan
        return pruned

    def overflow(self: Run, rows: slice) -> torch.Tensor:
        out = forward(self, rows)
        layer: Any = self.block.self_attn
        return out * torch.inf if layer.layer_idx == 1 else out

    if fault == "weights":
        monkeypatch.setattr(compress, "prune_site", spoil)
    else:
        monkeypatch.setattr(Run, "forward", overflow)
    folder = tmp_path / "folder"
    result = cli("prune", tiny(), "-o", folder / "out", *prune_args)
    assert result.exit_code == 3
    assert ("layers.2" if fault == "activations" else "layers.1") in result.stderr
    assert "--dtype float32" in result.stderr
    # The same run would end the same, and another dtype is another run.
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["prune", "sparsify", "quantize-kv"])
def test_memory_for_fewer_samples_at_a_time(
    cli: Cli,
    tiny: Tiny,
    tmp_path: Path,
    prune_args: list[Any],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result is that of a run with the smaller batches from the block on where memory ended."""
    forward = Run.forward
    most = 1

    def need_memory(self: Run, rows: slice) -> torch.Tensor:
        if rows.stop - rows.start > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, rows)

    args = [command, tiny(), *prune_args[:-1]]  # with notes
    small = tmp_path / "small"
    assert cli(*args, "-o", small, "--batch-size", 1).exit_code == 0
    monkeypatch.setattr(Run, "forward", need_memory)
    result = cli(*args, "-o", tmp_path / "out", "--batch-size", 4)
    assert result.exit_code == 0, result.stderr
    assert "going on with 2 samples" in result.stderr and "with 1 samples" in result.stderr
    step = json.loads((tmp_path / "out/llmsqueeze.json").read_text())["steps"][-1]
    assert step["reduced_batch"] == 1
    for file in small.glob("*.safetensors"):
        ours = load_file(tmp_path / "out" / file.name)
        assert all(torch.equal(ours[name], t) for name, t in load_file(file).items())
    most = 0
    folder = tmp_path / "folder"
    result = cli(*args, "-o", folder / "out", "--batch-size", 4)
    assert result.exit_code == 5
    assert "with one sample at a time" in result.stderr and "Traceback" not in result.stderr
    assert list(folder.iterdir()) == []


def test_memory_ends_while_a_block_is_stored(
    cli: Cli, tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is done beside, as on a GPU: the next attempt begins when nobody else writes."""
    args = ["prune", tiny(num_hidden_layers=4), "--method", "wanda", "--calib", text_file, "--samples", 4,
            "--seqlen", 24, "--batch-size", 4]  # fmt: skip
    assert cli(*args, "-o", tmp_path / "expected").exit_code == 0
    forward, store, met, failed = Run.forward, compress.store_block, [], []

    def fail_once(self: Run, rows: slice) -> torch.Tensor:
        met.extend([] if any(self is run for run in met) else [self])
        if len(met) == 3 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, rows)

    def store_slowly(*given: Any) -> Any:
        time.sleep(0.3)
        return store(*given)

    monkeypatch.setattr(Run, "forward", fail_once)
    monkeypatch.setattr(compress, "beside", lambda device: worker())
    monkeypatch.setattr(compress, "store_block", store_slowly)
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)  # many files
    result = cli(*args, "-o", tmp_path / "out")
    assert result.exit_code == 0 and failed, result.stderr
    expected, found = (
        {
            n: t
            for f in sorted((tmp_path / d).glob("*.safetensors"))
            for n, t in load_file(f).items()
        }
        for d in ("expected", "out")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    assert cli("inspect", tmp_path / "out", "--verify").exit_code == 0


def test_killed_while_it_published(tmp_path: Path) -> None:
    """Between the renames the old checkpoint is aside; after them a state has nothing to go on for."""
    out, folder = tmp_path / "out", tmp_path / "out.work"
    (folder / "files").mkdir(parents=True)
    (folder / "files.replaced").mkdir()
    (folder / "files.replaced" / "config.json").write_text("old")
    (folder / "lock").touch()
    (folder / "run.json").write_text("{}")
    sweep(out)
    assert (out / "config.json").read_text() == "old"
    assert (folder / "run.json").exists()
    (folder / "files").rmdir()
    (folder / "files.replaced").mkdir()
    sweep(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_made_elsewhere_meanwhile_is_not_replaced(
    tiny: Tiny, tmp_path: Path, cli: Cli, prune_args: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    card = compress.card.model_card

    def meddle(*args: Any) -> str:
        out.mkdir()
        (out / "config.json").write_text("mine")
        return card(*args)

    monkeypatch.setattr(compress.card, "model_card", meddle)
    result = cli("prune", tiny(), "-o", out, *prune_args)
    assert result.exit_code == 5
    assert (out / "config.json").read_text() == "mine"
    monkeypatch.undo()
    result = cli("prune", tiny(), "-o", out, *prune_args, "--overwrite", "--resume", "required")
    assert result.exit_code == 0, result.stderr


def test_states_take_a_tenth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And there is one after every block that is slow enough."""
    now = 100.0
    monkeypatch.setattr(work.time, "monotonic", lambda: now)
    write = work.write_state

    def slow(path: Path, state: Any) -> None:
        nonlocal now
        now += 2.0
        write(path, state)

    monkeypatch.setattr(work, "write_state", slow)
    for seconds, written in ((25.0, [1, 2, 3, 4, 5]), (7.0, [1, 4])):
        with Work(tmp_path / "out", CPU, policy="auto") as folder:
            folder.begin(dict)
            trail = folder.trail("walk", 6)
            seen = []
            for done in range(1, 6):
                now += seconds
                trail.reached(Boundary(done), dict)
                seen.append(Trail(folder, "walk", 6).start.done)
        assert sorted(set(seen)) == written


def test_the_difference_of_two_runs_is_named() -> None:
    one = {"a": {"b": [1, {"c": None}]}, "d": "x"}
    assert difference(one, json.loads(json.dumps(one))) is None
    assert difference(one, {**one, "d": "y"}) == 'd ("x" then, "y" now)'
    assert difference(one, {"a": {"b": [1, {"c": 2}]}, "d": "x"}) == "a.b.1.c (null then, 2 now)"
    assert difference(one, {"a": {"b": [1]}, "d": "x"}) is not None
    assert difference(one, {**one, "e": 1}) == "e (null then, 1 now)"


def test_what_was_done_is_said_where_no_block_is_left_to_do(
    tiny: Tiny, tmp_path: Path, text_file: Path
) -> None:
    """Killed behind the last block, with smaller batches: the step is recorded as it was done."""
    calibration = {"text": str(text_file), "samples": 4, "seqlen": 24}
    recipe = PruneRecipe.from_dict({"calibration": calibration})
    pruning = compress.Pruning(Checkpoint(tiny()), recipe, CPU, Work(tmp_path / "out", CPU))
    pruning.prepare()
    pruning.blocks(2)
    assert pruning.step("tiny", {}, 0.5)["reduced_batch"] == 2
