"""A block's forward as a coroutine that pauses where its linears are entered.

Pausing inside the block's own forward, in a hook, needs no knowledge of how the block is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import greenlet
from torch import Tensor, nn


@dataclass(frozen=True)
class Entering:
    """A pause: what enters the linear `leader`, the residual stream it will be added to, if known, and which
    tokens of the batch x are, if it is one of an expert's."""

    leader: str
    x: Tensor
    residual: Tensor | None
    tokens: Tensor | None


class Stream(greenlet.greenlet):  # type: ignore[misc]
    """One batch on its way through one block."""

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__(forward)
        self.residual: Tensor | None = None
        self.tokens: Tensor | None = None
        self.consumer: Any = None

    def advance(self) -> Entering | None:
        """Run to the next pause; None when the forward is done."""
        self.consumer = greenlet.getcurrent()
        paused: Entering | None = self.switch()
        return paused

    def close(self) -> None:
        """Unwind a forward that is still paused; what it has not computed is not computed."""
        # Of a run that failed, the garbage collector may do it in the middle of another's stream: back there.
        self.parent = greenlet.getcurrent()
        self.throw()


@contextlib.contextmanager
def pausing(
    leaders: Mapping[str, nn.Module],
    residuals: Mapping[str, nn.Module],
    experts: Mapping[str, nn.Module],
) -> Iterator[None]:
    """Make every Stream through these modules pause at each of `leaders`.

    residuals: leader → the module whose input is the residual stream that the leader's output joins.
    experts: leader → the expert it is in, which is called with its tokens' numbers after them.
    """

    def pause(leader: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            stream = greenlet.getcurrent()
            if isinstance(stream, Stream):
                residual = stream.residual if leader in residuals else None
                tokens = stream.tokens if leader in experts else None
                stream.consumer.switch(Entering(leader, args[0], residual, tokens))

        return hook

    def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
        stream = greenlet.getcurrent()
        if isinstance(stream, Stream):
            stream.residual = args[0]

    def route(module: nn.Module, args: tuple[Any, ...]) -> None:
        stream = greenlet.getcurrent()
        if isinstance(stream, Stream):
            stream.tokens = args[1]

    handles = [m.register_forward_pre_hook(pause(name)) for name, m in leaders.items()]
    handles += [m.register_forward_pre_hook(remember) for m in set(residuals.values())]
    handles += [m.register_forward_pre_hook(route) for m in set(experts.values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
