"""A model that transformers builds without loading its weights, which are then mapped as `run` maps them.

While it "loads", a model says that it has no weights, so that none are missing and none are read; it still
gets the buffers that are computed. What it takes are the internals of transformers' loading: no other module
knows of these.
"""

from __future__ import annotations

from typing import Any

import torch

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError
from llmsqueeze.runtime import backend, mapped, sealed


def fits(checkpoint: Checkpoint, model: Any, device: torch.device | None) -> bool:
    """Whether an empty model can be mapped: it is what the checkpoint holds, and kernels use it.

    device: where it is to be; None where that is not known yet, or several.
    """
    expected = {name: p.shape for name, p in checkpoint.model.named_parameters()}
    return (
        device is not None
        and device.type == "cpu"
        and backend.missing(model.dtype, device) is None
        and mapped.suits(checkpoint, model)
        and type(model) is type(checkpoint.model)
        and {name: p.shape for name, p in model.named_parameters()} == expected
        and not _persistent(model)
    )


def defer(model: Any) -> None:
    """Let transformers finish an empty model without weights; fill() then gives it some."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model._keys_to_ignore_on_load_unexpected = {""}  # matches every name
    model.llmsqueeze_hook = model.register_state_dict_post_hook(_forget)


def fill(model: Any, checkpoint: Checkpoint) -> None:
    """End what defer() began. CheckpointError if a parameter gets no weight."""
    model.llmsqueeze_hook.remove()
    del model.llmsqueeze_hook, model._keys_to_ignore_on_load_unexpected
    if mapped.fill(model, checkpoint, model.dtype) is None:
        empty = next(name for name, p in model.named_parameters() if p.is_meta)
        raise CheckpointError(
            f"{checkpoint.path}: {empty} is not mapped; load it with {sealed.DENSE}"
        )
    sealed.seal(model)


def _persistent(model: Any) -> bool:
    """Whether it stores more than parameters."""
    return len(model.state_dict()) != len(dict(model.named_parameters(remove_duplicate=False)))


def _forget(module: Any, state: dict[str, Any], *rest: Any) -> None:
    state.clear()
