"""How fast a whole model decodes on a CPU, compressed and dense, and what memory each takes.

Each model lives in a process of its own, so that its memory can be told; they work by turns, since nothing
else keeps a CPU from doing other work meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.bench import Timing, relative_error
from llmsqueeze.bench_model import (
    REPEATS,
    STEPS,
    TOLERANCE,
    Comparison,
    Speed,
    agreement,
    count_dropped,
    formats_of,
    last_logits,
    operator_error,
    read_bytes,
)
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import EnvironmentFault, LlmsqueezeError
from llmsqueeze.ops import cpu
from llmsqueeze.runtime import load
from llmsqueeze.runtime.gates import gating_of, remove
from llmsqueeze.runtime.generate import Decoder

# What dense weights are tried in: which is faster depends on the CPU.
DENSE = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Facts:
    """What a process says of its model once it is loaded. logits: of the prompt's last tokens."""

    load_seconds: float
    logits: Tensor
    error: float
    operator: str
    formats: dict[str, int]
    tokens: list[int]


@dataclass(frozen=True)
class _Memory:
    """Bytes that the process holds in memory once it has decoded, mapped files included; peak: the most so
    far."""

    resident: int
    peak: int


def compare(
    checkpoint: Checkpoint,
    prompt: Tensor,
    dtype: torch.dtype,
    *,
    skip_mass: float = 0.0,
    note: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Greedy decoding behind a prompt [tokens]; batch 1. dtype: of the compressed model.

    skip_mass: what attention may leave out of a quantised cache, see runtime.tiles. EnvironmentFault where
    there are no kernels, those of the KV cache included, and if the compressed model is wrong.
    """
    if cpu.library() is None:
        raise EnvironmentFault(
            "kernels for a CPU were not built, there was no C++ compiler when llmsqueeze was installed"
        )
    # The compressed one first: if it is wrong, nothing else needs to be loaded.
    wanted = [(dtype, True), *((each, False) for each in DENSE)]
    with contextlib.ExitStack() as stack:
        workers: list[_Worker] = []
        facts: list[_Facts] = []
        for each, kernels in wanted:
            name = str(each).removeprefix("torch.")
            note(f"compressed, computed in {name}" if kernels else f"dense in {name}")
            worker = _Worker(checkpoint.path, prompt, each, kernels, skip_mass)
            stack.callback(worker.close)
            workers.append(worker)
            facts.append(worker.ask("load"))
            if not facts[0].error <= TOLERANCE:
                raise EnvironmentFault(
                    f"{facts[0].operator}: wrong result on this CPU (relative error {facts[0].error:.2g})"
                )
        steps: list[list[float]] = [[] for _ in wanted]
        prompts: list[list[float]] = [[] for _ in wanted]
        for turn in range(REPEATS):
            note(f"turn {turn + 1} of {REPEATS}")
            for index, worker in enumerate(workers):
                step, whole = worker.ask("decode")
                if turn:  # the first one warms up
                    steps[index].append(step)
                    prompts[index].append(whole)
        speeds = [
            dataclasses.replace(
                worker.ask("describe"), step=_timing(step), prefill=_timing(whole),
                load_seconds=fact.load_seconds,
            )
            for worker, step, whole, fact in zip(workers, steps, prompts, facts, strict=True)
        ]  # fmt: skip
    (mine, *others), (compressed, *dense) = facts, speeds
    best = min(range(len(DENSE)), key=lambda index: dense[index].step.median)
    # In a dtype that dense is not tried in, fp32 says what is right.
    exact = others[DENSE.index(dtype if dtype in DENSE else torch.float32)]
    return Comparison(
        dense=dense[best],
        compressed=compressed,
        error=mine.error,
        logit_error=relative_error(mine.logits, exact.logits),
        same_tokens=agreement(exact.tokens, mine.tokens),
        tokens=len(mine.tokens),
        formats=mine.formats,
        dense_dtype=DENSE[best],
        slower_dense=dense[1 - best],
    )


class _Worker:
    """The parent's end of a process with a model in it."""

    def __init__(
        self, path: Path, prompt: Tensor, dtype: torch.dtype, kernels: bool, skip_mass: float
    ) -> None:
        # A fork would share the parent's pages, and its threads' locks.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(
                theirs,
                str(path),
                prompt.tolist(),
                dtype,
                kernels,
                skip_mass,
                torch.get_num_threads(),
            ),
            daemon=True,
        )
        self._process.start()
        theirs.close()

    def ask(self, what: str) -> Any:
        try:
            self._pipe.send(what)
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EnvironmentFault(
                "a process that measured ended without an answer; there may be too little memory for "
                "the dense model"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._pipe.close()  # which ends it
        self._process.join(1)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(
    pipe: Any, path: str, prompt: list[int], dtype: torch.dtype, kernels: bool, skip_mass: float,
    threads: int,
) -> None:  # fmt: skip
    """The process's end: answers until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to end
    torch.set_num_threads(threads)
    model: _Model | None = None
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        try:
            if what == "load":
                model = _Model(Path(path), torch.tensor(prompt), dtype, kernels, skip_mass)
                pipe.send(model.facts)
            else:
                assert model is not None
                pipe.send(model.decode() if what == "decode" else model.describe())
        except (LlmsqueezeError, MemoryError) as error:
            pipe.send(error)
        except Exception as error:  # told by the parent, like its own; not every kind can be sent
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


class _Model:
    def __init__(
        self, path: Path, prompt: Tensor, dtype: torch.dtype, kernels: bool, skip_mass: float = 0.0
    ) -> None:
        self._prompt = prompt
        began = time.perf_counter()
        self._model = load(Checkpoint(path), dtype, torch.device("cpu"), kernels=kernels)
        seconds = time.perf_counter() - began
        logits = last_logits(self._model, prompt)
        if not kernels and gating_of(self._model) is not None:
            remove(self._model)
        formats = getattr(self._model, "llmsqueeze_kv_formats", None) if kernels else None
        self._decoder = Decoder(
            self._model, len(prompt) + STEPS + 1, formats=formats, skip_mass=skip_mass
        )
        tokens = [int(token) for token in self._decoder.generate(prompt, STEPS)]
        # Before what only a bench does: references make weights dense.
        self._memory = _memory()
        count_dropped(self._model, tokens)
        error, operator = operator_error(self._model, prompt, formats) if kernels else (0.0, "")
        self.facts = _Facts(seconds, logits, error, operator, formats_of(self._model), tokens)

    def decode(self) -> tuple[float, float]:
        """Milliseconds of a token, and of the whole prompt."""
        began = time.perf_counter()
        tokens = self._decoder.generate(self._prompt, STEPS)
        next(tokens)
        read = time.perf_counter()
        count = sum(1 for _ in tokens)
        return 1e3 * (time.perf_counter() - read) / count, 1e3 * (read - began)

    def describe(self) -> Speed:
        """All that is not a timing."""
        none = Timing(0.0, 0.0, 0.0)
        held = {
            id(t): t.numel() * t.element_size()
            for t in (*self._model.parameters(), *self._model.buffers())
        }
        cache = self._decoder.cache_bytes(len(self._prompt) + STEPS)
        return Speed(
            none, none, sum(held.values()), read_bytes(self._model) + cache, cache, 0.0,
            self._memory.resident, self._memory.peak,
        )  # fmt: skip


def _memory() -> _Memory:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = {name: int(rest.split()[0]) for name, _, rest in (s.partition(":") for s in lines)
                 if name in ("VmRSS", "VmHWM")}  # fmt: skip
    return _Memory(1024 * kibibytes["VmRSS"], 1024 * kibibytes["VmHWM"])


def _timing(found: list[float]) -> Timing:
    return Timing(statistics.median(found), min(found), max(found))


def processor() -> str:
    """What the CPU calls itself, and the best instructions that there is code for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), "CPU")
    return f"{name} ({cpu.instructions()})"
