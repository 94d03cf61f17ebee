"""Where and in which precision to compute."""

from __future__ import annotations

import torch

from llmsqueeze.errors import EnvironmentFault


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


def compute_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own dtype on a GPU and float32 on a CPU, where 16 bits are slower."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else stored
