"""Where and in which precision to compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from llmsqueeze.errors import EnvironmentFault, ResourceError

T = TypeVar("T")


def choose_device(name: str) -> torch.device:
    """ "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; EnvironmentFault if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EnvironmentFault(f"--device {name}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"--device {name}: this torch ({torch.__version__}) sees {torch.cuda.device_count()} GPUs"
        )
    if device.type not in ("cpu", "cuda"):
        raise EnvironmentFault(f"--device {name}: only cpu and cuda are supported")
    return device


def watch_peak(device: torch.device) -> None:
    """Let max_memory_allocated count from here."""
    if device.type == "cuda":
        torch.cuda.init()  # where the device has a number, the next call does not see to it
        torch.cuda.reset_peak_memory_stats(device)


def calibration_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own dtype where the device multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    # Without these instructions a CPU emulates 16 bits, slower than float32.
    native = stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return stored if device.type == "cuda" or native else torch.float32


def evaluation_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own dtype on a GPU and float32 on a CPU.

    Whatever the CPU: a gate must not depend on which machine of a pool it ran on.
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return stored if device.type == "cuda" else torch.float32


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; torch has an error of its own for devices only."""
    said = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in said
    )


def with_smaller_batches(
    batch: int, attempt: Callable[[int], T], note: Callable[[str], None], ranks: int = 1
) -> T:
    """attempt(batch), and with half of it for as long as memory is too small.

    ranks: of several none tries again: memory may end on one, and the others cannot go back with it.
    ResourceError when it is too small for one sample at a time.
    """
    if ranks > 1:
        return attempt(batch)
    while True:
        try:
            return attempt(batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if batch <= 1:
                raise ResourceError(
                    "out of memory with one sample at a time; give smaller --samples or --seqlen"
                ) from error
        # Not before: until here the error kept what had been allocated.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        batch //= 2
        note(f"out of memory; going on with {batch} samples at a time")


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """fp32 products in fp32: TF32 would put its rounding into the statistics."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _AtOnce(Executor):
    """Runs what is submitted before it returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def worker() -> Iterator[Executor]:
    """One thread that takes work in order; after a failure, what has not begun is dropped."""
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[Executor]:
    """For host work that can go on beside the device's.

    Where the CPU itself computes, it is done at once: another thread would take a core from a matrix
    product that waits for its slowest thread.
    """
    if device.type == "cpu":
        yield _AtOnce()
        return
    with worker() as thread:
        yield thread
