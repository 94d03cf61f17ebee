"""SIGINT and SIGTERM while a run can be resumed: the first ends it after its block, the second at once."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsqueeze.console import Console

EXIT_TERMINATED = 143


@contextlib.contextmanager
def deferred(console: Console) -> Iterator[Callable[[], bool]]:
    """While this lasts, the first signal is only noted; whether there was one is what it gives."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            end(number, frame)
        asked = True
        console.urgent("stopping after this block; a second signal ends at once")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Whoever started this in a shell's background has SIGINT ignored, and wants it to be.
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, handle)
    try:
        yield lambda: asked
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def end(number: int, frame: FrameType | None) -> None:
    """Unwind like an error, so that what is half written is removed."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(EXIT_TERMINATED)
