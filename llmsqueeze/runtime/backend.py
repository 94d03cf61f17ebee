"""Where there are kernels for compressed weights: what every command and from_pretrained decide by."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmsqueeze.checkpoint import Checkpoint, PackedSource
from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.ops import cpu, cuda


def missing(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why there are no kernels in a dtype on a device, and what helps; None if there are."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        if cpu.library() is None:
            return (
                "kernels for a CPU were not built, there was no C++ compiler when llmsqueeze was installed; "
                "install one and then llmsqueeze again"
            )
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return (
                f"kernels for a CPU compute in 16 bits or float32, not {name}; take dtype float32"
            )
        return None
    if device.type != "cuda":
        return "kernels for compressed weights run on CUDA and CPUs only; take device cuda"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"kernels compute in bfloat16 or float16 on CUDA, not {name}; take dtype bfloat16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "kernels need a GPU of compute capability 8.0"
    try:
        cuda.compiler()
    except EnvironmentFault as fault:
        return str(fault)
    return None


def has_work(checkpoint: Checkpoint) -> bool:
    """Whether anything in it is for kernels: compressed weights, or gates."""
    packed = [s for s in checkpoint.sources.values() if isinstance(s, PackedSource)]
    return bool(packed) or checkpoint.activation is not None


def choose_backend(
    asked: str | None,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    note: Callable[[str], None] = lambda line: None,
) -> str:
    """What was asked for; else "kernels" where there are some, or "reference": weights made dense.

    note: told why kernels are not used, if nobody asked for that. EnvironmentFault when they were asked for
    where there are none.
    """
    reason = missing(dtype, device) if asked != "reference" else None
    if reason and asked == "kernels":
        raise EnvironmentFault(f"--backend kernels: {reason}")
    if reason and has_work(checkpoint):
        note(f"compressed weights are made dense: {reason}")
    return asked or ("reference" if reason else "kernels")
