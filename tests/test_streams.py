"""Streams through a block are greenlets: whoever closes one goes on, wherever it was made."""

from __future__ import annotations

import torch
from torch import nn

from llmsqueeze.streams import Stream, pausing


def test_a_stream_can_be_closed_in_the_middle_of_another() -> None:
    """As when the garbage collector finds what is left of a run that failed."""
    linear = nn.Linear(3, 3)
    done = []

    def failed() -> None:
        linear(torch.zeros(1, 3))
        done.append("failed")

    left = Stream(failed)

    def going() -> None:
        left.close()
        linear(torch.ones(1, 3))
        done.append("going")

    with pausing({"linear": linear}, {}, {}):
        assert left.advance() is not None
        stream = Stream(going)
        entering = stream.advance()
        assert entering is not None and entering.leader == "linear"
        assert torch.equal(entering.x, torch.ones(1, 3))
        assert stream.advance() is None
    assert done == ["going"] and left.dead
