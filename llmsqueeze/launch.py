"""Starting several ranks by one command, and being one of them.

Ranks are told who they are by torchrun's variables, so that both ways of starting them are one. torchrun
itself is not what --gpus starts: its agent gives processes 30 seconds to heed a signal, less than a block may
take, and ends with exit code 1 whatever theirs was.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from llmsqueeze.errors import RankLost, RecipeError
from llmsqueeze.world import MOST_RANKS, World

if TYPE_CHECKING:
    from llmsqueeze.console import Console

# What tells a rank of ours from others that a cluster's variables may be meant for.
MEETING, LAUNCHER, TORCHRUN = (
    "LLMSQUEEZE_RANKS_MEETING",
    "LLMSQUEEZE_RANKS_LAUNCHER",
    "TORCHELASTIC_RUN_ID",
)
# How long the others may go on when one has ended: they notice when they next need it, after a linear or so.
GRACE_SECONDS = 120.0
POLL_SECONDS = 0.02


def world(environment: Mapping[str, str] = os.environ) -> World:
    """Who this process is, of those that --gpus or torchrun started; one alone otherwise."""
    if MEETING not in environment and TORCHRUN not in environment:
        return World()
    rank, size, local_rank, local_size = (
        int(environment.get(name, default))
        for name, default in (
            ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"),
        )
    )  # fmt: skip
    return World(rank, size, local_rank, local_size, environment.get(MEETING, ""))


def share(console: Console, gpus: int | None) -> World:
    """Who this process is. The one that is to start the others does so, and ends when they have.

    RecipeError when there are too many, or not as many as --gpus says.
    """
    found = world()
    if max(found.size, gpus or 1) > MOST_RANKS:
        raise RecipeError(
            f"{max(found.size, gpus or 1)} ranks: at most {MOST_RANKS} can share a calibration"
        )
    if found.size > 1:
        if gpus not in (None, found.size):
            raise RecipeError(
                f"--gpus {gpus} in one of {found.size} ranks; leave it to torchrun, or to --gpus"
            )
        _follow_launcher()
    elif gpus is not None and gpus > 1:
        sys.exit(_launch(console, gpus))
    return found


def _launch(console: Console, size: int) -> int:
    """Run this command line in `size` processes; the first one's exit code."""
    asked: list[int] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            rank.send_signal(number)  # to none that has ended

    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number in numbers if before[number] != signal.SIG_IGN]
    watched, kept = os.pipe()
    with tempfile.TemporaryDirectory(prefix="llmsqueeze-ranks-") as folder:
        for number in heeded:
            signal.signal(number, forward)
        try:
            for rank in range(size):
                ranks.append(_start(rank, size, Path(folder) / "meeting", watched))
                if asked:
                    ranks[-1].send_signal(asked[0])
            return _conclude(console, ranks, _await(console, ranks), asked)
        finally:
            for started in ranks:
                started.kill()
                started.wait()
            for number in heeded:
                signal.signal(number, before[number])
            os.close(watched)
            os.close(kept)


def _start(rank: int, size: int, meeting: Path, watched: int) -> subprocess.Popen[bytes]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // size)),
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        MEETING: str(meeting),
        LAUNCHER: str(watched),
    }
    # In sessions of their own: a terminal's Ctrl-C comes by way of this process, once.
    # Modules are found where this process finds them: `-m` would look into the current directory first.
    begin = f"import sys; sys.path[:] = {sys.path!r}; sys.argv[0] = {sys.argv[0]!r}; "
    return subprocess.Popen(
        [sys.executable, "-c", begin + "from llmsqueeze.cli import main; main()", *sys.argv[1:]],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[watched],
        start_new_session=True,
    )


def _await(console: Console, ranks: list[subprocess.Popen[bytes]]) -> tuple[str, int]:
    """Until all have ended, the last ones made to. Which was the first that was killed, and how; the exit
    code of the first that failed, if that came before."""
    until, lost, code, made_to = float("inf"), "", 0, False
    failed: set[int] = set()
    while True:
        going = any([rank.poll() is None for rank in ranks])
        for number, rank in enumerate(ranks):
            if rank.returncode and number not in failed:
                failed.add(number)
                until = min(until, time.monotonic() + GRACE_SECONDS)
                if rank.returncode < 0 and not lost and not made_to:
                    name = signal.Signals(-rank.returncode).name
                    lost, code = f"rank {number} of {len(ranks)} was ended by {name}", 0
                    console.note(lost)
                elif rank.returncode > 0 and not code and not lost:
                    code = rank.returncode
        if not going:
            return lost, code
        if time.monotonic() > until:
            made_to = True
            for rank in ranks:
                rank.kill()
        time.sleep(POLL_SECONDS)


def _conclude(
    console: Console, ranks: list[subprocess.Popen[bytes]], ended: tuple[str, int], asked: list[int]
) -> int:
    """The first rank's exit code; where that could not say why it ended, it is said here."""
    code = ranks[0].returncode
    if code >= 0:
        return code
    if asked:
        console.error("interrupted; nothing was published", 128 + asked[0])
        return 128 + asked[0]
    lost, failed = ended
    if failed:  # before the ranks met, or the first one would have heard of it
        console.error(
            f"one of {len(ranks)} ranks failed before it met the others; without --gpus, or with fewer, the "
            "run says why",
            failed,
        )
        return failed
    lost = lost or f"rank 0 of {len(ranks)} was ended by {signal.Signals(-code).name}"
    console.error(
        f"{lost}; the same command goes on from the last state that was kept", RankLost.exit_code
    )
    return RankLost.exit_code


def _follow_launcher() -> None:
    """End after the block, as by SIGTERM, when the process that started this one is gone."""
    if LAUNCHER not in os.environ:
        return
    watched = int(os.environ[LAUNCHER])

    def watch() -> None:
        os.read(watched, 1)  # nothing is ever written
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
