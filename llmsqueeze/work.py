"""The folder beside OUT in which a checkpoint is made, and what in it a run that was cut off goes on from.

    OUT.work/lock        held while a run writes here
            /run.json    which run the state belongs to; without it there is no state
            /NAME.pt     how far the walk NAME has come: replaced whole after a block
            /NAME-N.pt   tensors that were compressed by then, and that no shard has yet
            /NAME-N-R.pt what rank R has of that state, its activations among it; none of a single one
            /files/      the checkpoint that is being written; renamed to OUT last

A state holds what enters the next block, so nothing before it is computed again, and a run that goes on gives
the bits of one that was never cut off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from llmsqueeze.blocks import Boundary
from llmsqueeze.device import beside
from llmsqueeze.errors import (
    CalibrationError,
    CheckpointError,
    RecipeError,
    ResourceError,
    ResumeError,
    SourceChanged,
    SourceDamaged,
    Stopped,
)
from llmsqueeze.ranks import ALONE, Team
from llmsqueeze.state_file import read_state, sync_directory, write_state

STATE_VERSION = 2
RUN_NAME, LOCK_NAME, FILES_NAME = "run.json", "lock", "files"

# A state may take a tenth of the time that the blocks since the one before it took. Where blocks are slower
# than that, there is one after each.
RATIO = 10

# After these the same run would end the same way, or its state is of no use to it.
HOPELESS = (CalibrationError, RecipeError, SourceChanged, SourceDamaged)


def work_folder(out: Path) -> Path:
    """Where a run that writes `out` works."""
    return out.with_name(out.name + ".work")


class Work:
    """A run's work folder. A context manager: published, or failed without a state, it leaves nothing.

    policy: "auto" goes on from a state if there is one, "required" does nothing else, "never" keeps none and
    drops the one that is there, "off" keeps none and will not touch the one that is there.
    stop: asked after every block; where it says so, the state is written and Stopped raised.
    folder, files: other places than beside `out`. on_state: called once there is a state.
    team: ranks that make the same calls. The first has the lock; any number of them goes on from what others
    left.
    """

    def __init__(
        self,
        out: Path,
        device: torch.device,
        *,
        policy: str = "off",
        stop: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = lambda message: None,
        folder: Path | None = None,
        files: Path | None = None,
        on_state: Callable[[], None] = lambda: None,
        team: Team = ALONE,
    ) -> None:
        self.out, self.policy, self.note, self.team = out, policy, note, team
        self.folder = folder or work_folder(out)
        self.files = files or self.folder / FILES_NAME
        self.resumed = 0  # blocks that need not be done again
        self._device, self._stop, self._on_state = device, stop, on_state
        self._accepted = False
        self._identity: Callable[[], dict[str, Any]] | None = None
        self._trails: dict[str, Trail] = {}
        self._announced: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Work:
        self.team.lead(self._take)
        # What several ranks write belongs together: none goes on meanwhile.
        device = self._device if self.team.size == 1 else torch.device("cpu")
        self.executor: Executor = self._stack.enter_context(beside(device))
        return self

    def _take(self) -> None:
        self._lock = lock(self.folder)
        _finish_publishing(self.folder, self.files, self.out)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stack.close()  # nothing is being written any more
            if error is not None and self.team.leads:
                self.team.leave_files(error)
        finally:
            if self.team.leads:
                self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        hopeless = isinstance(error, HOPELESS) and not isinstance(error, ResumeError)
        lost = self._accepted and hopeless
        if error is not None and not lost and self._has_state():
            if self._accepted and not isinstance(error, Stopped):
                self.note(
                    f"{self.folder} has the state of this run; the same command goes on from it"
                )
            self._lock.close()
        else:
            _remove(self.folder, self._lock)

    def begin(self, identity: Callable[[], dict[str, Any]]) -> None:
        """Accept the state that is there, or start without one.

        identity: all that the result depends on, in plain types; asked for when there is a state to compare
        with, or to write. RecipeError, naming what differs, when the state is another run's.
        """
        self._identity = identity
        self.team.lead(self._begin)
        self._accepted = True

    def _begin(self) -> None:
        assert self._identity is not None
        if self._has_state() and self.policy == "off":
            raise ResumeError(
                f"{self.folder} has the state of a run that was cut off; let that one go on, or delete it"
            )
        if self._has_state() and self.policy != "never":
            then = _read_run(self.folder / RUN_NAME)
            differs = difference(then, _plain(self._identity()))
            if differs:
                raise ResumeError(
                    f"{self.folder} has the state of a run with another {differs}; repeat that run's "
                    "options, or pass --resume never to start anew"
                )
        else:
            if self.policy == "required":
                raise ResumeError(f"--resume required: {self.folder} has no state to go on from")
            _empty(self.folder)
        self.files.mkdir(exist_ok=True)

    def fresh(self) -> Path:
        """An empty directory to make a checkpoint in, by a run that keeps no state."""
        self.begin(dict)
        _clear(self.files)
        return self.files

    def trail(self, name: str, total: int = 1) -> Trail:
        """How far the walk `name` of `total` blocks has come on the disk."""
        before = self._trails.get(name)
        if before:
            before.settle()
        trail = Trail(self, name, total)
        done = trail.start.done
        if total > 1 and not any(t.total > 1 for t in self._trails.values()):
            self.resumed = done  # of the walk that makes the checkpoint; others come after it
        if not before and done and total > 1:
            self.note(f"going on after block {done} of {total}, as {self.folder} has it")
        self._trails[name] = trail
        return trail

    def child(self, name: str, out: Path) -> Work:
        """Work on one of several steps, within the folder. The one that makes OUT makes it in `files`."""
        policy = "auto" if self.policy == "required" else self.policy
        return Work(
            out,
            self._device,
            policy=policy,
            stop=self._stop,
            note=self.note,
            folder=self.folder / f"{name}.work",
            files=self.files if out == self.out else None,
            on_state=self.commit,
        )

    def commit(self) -> None:
        """From here on there is a state, and it belongs to this run."""
        if self._has_state() or not self.keeping or not self.team.leads:
            return
        assert self._identity is not None
        path = self.folder / RUN_NAME
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            json.dump(_plain(self._identity()), stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync_directory(self.folder)
        self._on_state()

    def announce(self, name: str) -> None:
        """Say, once, what the states of a walk take."""
        if name not in self._announced:
            self._announced.add(name)
            taken = sum(path.stat().st_size for path in self.folder.glob("*.pt"))
            self.note(
                f"{self.folder} keeps {taken / 1e6:.1f} MB to go on from after a stop (--resume never keeps "
                "none)"
            )

    @property
    def training(self) -> Path | None:
        """Where mask training may keep its own state; None where none is kept."""
        return self.folder / "training" if self.keeping else None

    @property
    def keeping(self) -> bool:
        """Whether states are written."""
        return self.policy in ("auto", "required")

    @property
    def stopping(self) -> bool:
        """Whether to end where the same command can go on; for all ranks only what trails say."""
        return self.keeping and self._stop()

    def _has_state(self) -> bool:
        return (self.folder / RUN_NAME).exists()


class Trail:
    """One walk over the blocks, on the disk as of its last state.

    start: the boundary to go on from. found: what was captured there, by name; empty at the beginning.
    """

    def __init__(self, work: Work, name: str, total: int) -> None:
        self._work, self._name, self.total = work, name, total
        self._file = work.folder / f"{name}.pt"
        self._spool: dict[str, set[str]] = {}
        self._team = work.team
        self._writing: Future[None] | None = None
        self._next = 0.0
        self.start = Boundary()
        self.found: dict[str, Any] = {}
        if self._file.exists():
            self._restore()

    def _restore(self) -> None:
        raw = read_state(self._file)
        try:
            others = [read_state(self._work.folder / name) for name in raw["ranks"]]
            self.start = dataclasses.replace(
                _boundary(raw["done"], raw),
                others=tuple(_boundary(raw["done"], other) for other in others),
            )
            self.found = raw["captured"]
            pending: dict[str, torch.Tensor] = {}
            for name in raw["spool"]:
                tensors = read_state(self._work.folder / name)
                self._spool[name] = set(tensors)
                pending |= tensors
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._file}: not a state to go on from; pass --resume never to start anew"
            ) from error
        if "writer" in self.found:
            self.found["writer"]["pending"] = pending

    def reached(self, at: Boundary, capture: Callable[[], dict[str, Any]]) -> None:
        """Say that the walk has come to `at`; what it stands for is kept if it is time to.

        capture: what has to be kept with it. "writer" is ArtifactWriter.snapshot(). Raises Stopped if the run
        is to end, and ResourceError when there is no room.
        """
        if not self._work.keeping:
            return
        busy = self._writing is not None and not self._writing.done()
        due = not busy and time.monotonic() >= self._next
        votes = self._team.gather([self._work.stopping and at.done < self.total, due])
        stopping, due = any(vote[0] for vote in votes), votes[0][1]
        if not stopping and not due:
            return
        self.keep(at, capture())
        if stopping:
            self.settle()
            self._team.gather(None)  # whoever started them may end all when one has ended
            raise Stopped(
                f"stopped after block {at.done} of {self.total}; the same command goes on from there "
                f"({self._work.folder} has its state)"
            )

    def keep(self, at: Boundary, captured: dict[str, Any]) -> None:
        """Write a state; on a GPU beside what comes next."""
        if not self._work.keeping:
            return
        self.settle()
        pending: dict[str, torch.Tensor] = {}
        if "writer" in captured:
            writer = dict(captured["writer"])
            pending = writer.pop("pending")
            captured = {**captured, "writer": writer}
        own = {
            "activations": [tensor.cpu() for tensor in at.activations],
            "samples": None if at.samples is None else list(at.samples),
        }
        self._writing = self._work.executor.submit(self._write, at.done, own, captured, pending)
        if self._writing.done():
            self.settle()

    def settle(self) -> None:
        """Wait until the last state is on the disk."""
        if self._writing is not None:
            self._writing.result()

    def _write(
        self,
        done: int,
        own: dict[str, Any],
        captured: dict[str, Any],
        pending: dict[str, torch.Tensor],
    ) -> None:
        """Every rank what it has; when all of it is on the disk, the first one what all of it belongs to."""
        began = time.monotonic()
        # Tensors leave the pending ones all at once, when a shard is written.
        self._spool = {f: names for f, names in self._spool.items() if names & pending.keys()}
        held = set().union(*self._spool.values())
        fresh = {name: tensor for name, tensor in pending.items() if name not in held}
        folder, name = self._work.folder, f"{self._name}-{done}"
        if fresh:
            # One rank has them all: that which is to write the shard.
            if not any(tensor.is_meta for tensor in fresh.values()):
                write_state(folder / f"{name}.pt", fresh)
            self._spool[f"{name}.pt"] = set(fresh)
        ranks = [f"{name}-{rank}.pt" for rank in range(1, self._team.size)]
        if not self._team.leads:
            write_state(folder / f"{name}-{self._team.rank}.pt", own)
        self._team.gather(None)
        if self._team.leads:
            state = {"done": done, **own, "ranks": ranks, "captured": captured}
            write_state(self._file, {**state, "spool": list(self._spool)})
            self._work.commit()
            for path in folder.glob(f"{self._name}-*.pt"):
                if path.name not in (*self._spool, *ranks):
                    path.unlink()
            self._work.announce(self._name)
        ended = time.monotonic()
        self._next = ended + RATIO * (ended - began)


def _boundary(done: int, raw: dict[str, Any]) -> Boundary:
    samples = raw["samples"]
    return Boundary(done, tuple(raw["activations"]), None if samples is None else tuple(samples))


def sweep(out: Path) -> None:
    """Finish what a run did not that was killed while it published `out`."""
    folder = work_folder(out)
    if not (folder / LOCK_NAME).exists():
        return
    held = lock(folder)
    _finish_publishing(folder, folder / FILES_NAME, out)
    if (folder / RUN_NAME).exists():
        held.close()
    else:
        _remove(folder, held)


def lock(folder: Path) -> BinaryIO:
    """The lock file of a work folder, which is made if need be, locked.

    RecipeError when another run has it, or when the folder is somebody else's.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / LOCK_NAME).exists() and any(folder.iterdir()):
                raise FileExistsError
            stream = (folder / LOCK_NAME).open("ab")
        except FileNotFoundError:
            continue  # another run has just removed it
        except FileExistsError as error:
            raise RecipeError(
                f"{folder} is no work folder of llmsqueeze; move it, or choose another -o"
            ) from error
        except OSError as error:
            raise ResourceError(f"cannot write to {folder.parent} ({error.strerror})") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(stream.fileno()), (folder / LOCK_NAME).stat()):
                return stream
        except BlockingIOError as error:
            stream.close()
            raise RecipeError(
                f"another run is writing to {folder}; wait for it, or choose another -o"
            ) from error
        except FileNotFoundError:
            pass
        stream.close()  # another run removed it before it was locked


def difference(then: Any, now: Any, path: str = "") -> str | None:
    """The first entry in which two trees of plain types differ, and how; None when they are the same."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            inner = f"{path}.{key}" if path else key
            found = difference(then.get(key), now.get(key), inner)
            if found:
                return found
        return None
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        found_all = (
            difference(a, b, f"{path}.{i}") for i, (a, b) in enumerate(zip(then, now, strict=True))
        )
        return next((found for found in found_all if found), None)
    return None if then == now else f"{path} ({_short(then)} then, {_short(now)} now)"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else text[:20] + "…" + text[-1]


def _plain(value: Any) -> Any:
    """As JSON gives it back, with the version of what is written here."""
    return json.loads(json.dumps({"state_version": STATE_VERSION, **value}))


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}); pass --resume never to start anew"
        ) from error
    return run if isinstance(run, dict) else {}


def _finish_publishing(folder: Path, files: Path, out: Path) -> None:
    """Put things right after a kill between the renames of publish_directory, or right after them."""
    aside = files.with_suffix(".replaced")
    if aside.is_dir() and not out.exists():
        aside.rename(out)
    if not files.exists():  # they are at `out`: the state has done its duty
        (folder / RUN_NAME).unlink(missing_ok=True)


def _empty(folder: Path) -> None:
    """Remove what is in a work folder. What makes a state is removed first, so that half of one is none."""
    (folder / RUN_NAME).unlink(missing_ok=True)
    _clear(folder, LOCK_NAME)


def _clear(folder: Path, but: str = "") -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != but:
            path.unlink()


def _remove(folder: Path, held: BinaryIO) -> None:
    _empty(folder)
    (folder / LOCK_NAME).unlink(missing_ok=True)
    held.close()
    with contextlib.suppress(OSError):  # another run has come
        folder.rmdir()
