"""What computes: results depend on it as on a recipe."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from llmsqueeze import __version__


def computing(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that began, whatever its recipe."""
    return {
        "compute_dtype": str(dtype).removeprefix("torch."),
        "device": _name(device),
        "versions": versions(),
    }


def computer(device: torch.device) -> dict[str, str]:
    """What ranks must have in common."""
    found = {"device": _name(device), **versions()}
    if device.type == "cpu":
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        found["products of bf16"] = str(torch.cpu._is_avx512_bf16_supported())
    return found


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    return {
        "llmsqueeze": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
