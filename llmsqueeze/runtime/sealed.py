"""What a model whose weights lie in kernels' layouts cannot do, refused before it is done half or wrongly."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.errors import RecipeError

# What gives such a model's weights as a trainer or save_pretrained wants them.
DENSE = "quantization_config=llmsqueeze.LlmsqueezeConfig(dequantize=True)"


def seal(model: Any) -> None:
    """Let a model that computes with kernels refuse to be moved, cast, trained or given other weights.

    All of it raises RecipeError and leaves the model as it was.
    """
    model.requires_grad_(False)
    model.llmsqueeze_sealed = True
    for name, method in _METHODS.items():
        setattr(model, name, MethodType(method, model))


def is_sealed(model: Any) -> bool:
    return getattr(model, "llmsqueeze_sealed", False)


def refusal(what: str) -> RecipeError:
    return RecipeError(
        f"a model that computes with kernels cannot be {what}; load it again, with {DENSE}"
    )


def _apply(model: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """What to(), cuda(), half() and the like come down to."""
    here = next(model.parameters())
    there = fn(torch.empty(0, dtype=here.dtype, device=here.device))
    if there.device != here.device:
        raise RecipeError(
            f"a model that computes with kernels stays on {here.device}: its weights are laid out for that; "
            f'load it with device_map="{there.device}"'
        )
    if there.dtype != here.dtype:
        raise RecipeError(
            f"a model that computes with kernels keeps its dtype, {here.dtype}; load it with "
            f"dtype={there.dtype}"
        )
    return model  # weights are not touched: of those that are mapped a copy would be made


def _train(model: Any, mode: bool = True) -> Any:
    if mode:
        raise refusal("trained")
    return type(model).train(model, False)


def _half(model: Any) -> Any:
    return torch.nn.Module.half(model)


def _float(model: Any) -> Any:
    return torch.nn.Module.float(model)


def _copy(model: Any, memo: Any) -> Any:
    raise RecipeError("a model that computes with kernels cannot be copied; load it again")


def _tie_weights(model: Any, *args: Any, **kwargs: Any) -> None:
    """They are tied, where they were to be, to what kernels read."""


def _resize(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    table = model.get_input_embeddings()
    if new_num_tokens in (None, table.weight.shape[0]):
        return table
    raise refusal("given more or fewer tokens")


_METHODS: dict[str, Callable[..., Any]] = {
    "_apply": _apply,
    "train": _train,
    "half": _half,  # transformers' own would speak of quantised models
    "float": _float,
    "__deepcopy__": _copy,  # layers know the addresses of their weights
    "tie_weights": _tie_weights,
    "resize_token_embeddings": _resize,
}
