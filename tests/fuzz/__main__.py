"""Read mutated inputs and report what was neither refused nor whole.

    python -m tests.fuzz --inputs 1000000 --seed 1
    python -m tests.fuzz --target "llmsqueeze.json" --only 1:4711

An input follows from its target, the seed and its number: what is found says how to read it again.
Every input has two seconds of a core, and the process 4 GiB more memory than it begins with.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import SHARES, Target, is_ours, targets

SECONDS = 2.0
MEMORY = 4 * 2**30
TURNS = 20


class TooLong(BaseException):
    """An input took more than its time. Not an Exception: what catches those must not hide it."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile input for every reader of outside bytes.")
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only these; repeatable")
    parser.add_argument("--only", metavar="SEED:NUMBER", help="one input again, with its traceback")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so long")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as made:
        found = targets(Path(made))
        chosen = {name: found[name] for name in args.target or found}
        if args.only:
            ((name, target),) = chosen.items()
            again(name, target, args.only)
            return
        figures = run(chosen, args.inputs, args.seed, args.seconds)
    show(figures)
    if args.json:
        written = {name: asdict(found) for name, found in figures.items()}
        args.json.write_text(json.dumps(written, indent=1) + "\n")
    sys.exit(1 if any(found.failures for found in figures.values()) else 0)


@dataclass
class Figures:
    """Of one target. failures: what was raised and where → how often, and seed and number of the first."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)


def run(chosen: dict[str, Target], inputs: int, seed: int, seconds: float) -> dict[str, Figures]:
    """All targets in turns, so that each has its share whenever the time is over."""
    _limit_memory()
    signal.signal(signal.SIGPROF, _ring)
    whole = sum(SHARES[name] for name in chosen)
    stop = time.monotonic() + seconds
    figures = {name: Figures() for name in chosen}
    for turn in range(TURNS):
        for name, target in chosen.items():
            count = max(1, round(inputs * SHARES[name] / whole))
            for number in range(count * turn // TURNS, count * (turn + 1) // TURNS):
                if time.monotonic() > stop:
                    break
                _read(name, target, seed, number, figures[name])
    return figures


def _read(name: str, target: Target, seed: int, number: int, figures: Figures) -> None:
    began = time.process_time()
    content = target.make(random.Random(f"{name} {seed} {number}"))
    started = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        target.read(content)
    except BaseException as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if isinstance(error, KeyboardInterrupt):
            raise
        figures.refused += 1
        if not is_ours(error):
            where = _place(error)
            times, first = figures.failures.get(where, (0, f"{seed}:{number}"))
            figures.failures[where] = (times + 1, first)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    ended = time.process_time()
    figures.inputs += 1
    figures.seconds += ended - began
    figures.slowest = max(figures.slowest, ended - started)


def show(figures: dict[str, Figures]) -> None:
    for name, found in figures.items():
        print(
            f"{name:26} {found.inputs:8,} inputs {found.refused:8,} refused "
            f"{found.inputs / max(found.seconds, 1e-9):8,.0f} a second, slowest {found.slowest:.2f} s"
        )
        for failure, (times, first) in found.failures.items():
            print(f"  {times} × {failure}\n    --only {first}")
    every, spent = (sum(getattr(f, n) for f in figures.values()) for n in ("inputs", "seconds"))
    kinds = sum(len(found.failures) for found in figures.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{every:,} inputs in {spent:.0f} s, {kinds} kinds of failures, {peak:,.0f} MiB at most")


def again(name: str, target: Target, which: str) -> None:
    """Read one input, without limits."""
    seed, _, number = which.partition(":")
    content = target.make(random.Random(f"{name} {seed} {number}"))
    print(repr(content)[:4000])
    target.read(content)
    print("accepted")


def _place(error: BaseException) -> str:
    """What was raised, and the innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if "llmsqueeze/" in f.filename] or list(frames)
    last = mine[-1]
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {message[:160]}"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _ring(number: int, frame: FrameType | None) -> None:
    raise TooLong("took too long")


if __name__ == "__main__":
    main()
