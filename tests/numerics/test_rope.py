"""Turning and turning back, against the rotary modules of every family and rope type."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from llmsqueeze.numerics.rope import rotate, unrotate
from tests.conftest import tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "partial": ("gpt_neox", {}),
    "by layer": ("gemma3_text", {}),
}


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn", "partial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turned_as_transformers_does_and_back(rope: str, dtype: torch.dtype) -> None:
    family, changes = ROPES[rope]
    model = tiny_model(family, **changes)
    module = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    ids = torch.tensor([[0, 1, 5, 40], [3, 3, 60, 2]])
    cos, sin = module(torch.zeros(1, dtype=dtype), ids)
    x = vectors(2, 3, 4, 12 if family == "qwen3" else 10)
    code = importlib.import_module(type(model).__module__)
    expected, _ = code.apply_rotary_pos_emb(x, x, cos.float(), sin.float())
    found = rotate(x, cos.float()[:, None], sin.float()[:, None])
    assert torch.allclose(found, expected, atol=1e-6)
    back = unrotate(found, cos.float()[:, None], sin.float()[:, None])
    assert torch.allclose(back, x, atol=1e-5)
    if rope == "yarn":  # its factor lengthens vectors
        assert float(found.norm() / x.norm()) > 1.05
    if rope == "partial":
        assert torch.equal(found[..., cos.shape[-1] :], x[..., cos.shape[-1] :])


def test_scores_depend_on_distance_alone() -> None:
    """q̃ᵀ R_n k by the formula that a fused kernel uses, in fp64."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    angles = torch.arange(40, dtype=torch.float64)[:, None] * torch.logspace(0, -3, 8).double()
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
    turned = [rotate(x.expand(40, -1), cos, sin) for x in (query, key)]
    assert torch.allclose(turned[1].norm(dim=-1), key.norm())
    for n in (0, 7, 31):
        score = turned[0][8] @ turned[1][n]
        pulled = unrotate(turned[0][8], cos[n], sin[n])
        assert float(score) == pytest.approx(float(pulled @ key), abs=1e-12)
        if n + 5 < 40:
            assert float(score) == pytest.approx(float(turned[0][13] @ turned[1][n + 5]), abs=1e-12)
