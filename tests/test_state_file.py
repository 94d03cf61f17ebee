"""What a run goes on from, while its writing is interrupted."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType

import pytest
import torch

from llmsqueeze.interrupt import EXIT_TERMINATED, end
from llmsqueeze.state_file import read_state, write_state


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_while_a_state_is_written_is_no_failure_of_writing(
    tmp_path: Path, number: int, raised: type[BaseException]
) -> None:
    """torch cannot end its archive after it, and says so with an error of its own."""
    path = tmp_path / "walk.pt"
    write_state(path, {"block": 1})
    pipe = path.with_suffix(".partial")
    os.mkfifo(pipe)  # more than it holds: the write waits, and a signal finds it there
    main = threading.main_thread().ident
    assert main is not None
    came = threading.Event()

    def read() -> None:
        with pipe.open("rb", buffering=0) as stream:
            stream.read(1)
            signal.pthread_kill(main, number)
            came.wait(60)
            while stream.read(1 << 16):
                pass

    def handle(number: int, frame: FrameType | None) -> None:
        came.set()
        end(number, frame)

    reader = threading.Thread(target=read)
    before = signal.signal(number, handle)
    try:
        reader.start()
        with pytest.raises(raised) as caught:
            write_state(path, {"block": 2, "tensor": torch.zeros(1 << 20)})
    finally:
        signal.signal(number, before)
        came.set()
        reader.join(60)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == EXIT_TERMINATED
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert read_state(path) == {"block": 1}
