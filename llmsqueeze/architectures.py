"""The decoder families we can walk block by block.

A new family is one line here and one line in tests/test_architectures.py: the walk itself learns
masks, rotary tables and other arguments from the model's own forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmsqueeze.errors import CheckpointError


@dataclass(frozen=True)
class GatedMlp:
    """Names within a block: down(activation(gate(x)) · up(x)), and attention's first and last linear."""

    activation: str = "mlp.act_fn"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    query: str = "self_attn.q_proj"
    attention_out: str = "self_attn.o_proj"


@dataclass(frozen=True)
class Mixture:
    """A block's mixture of experts, each down(activation(gate(x)) · up(x)) of the tokens routed to it.

    module: within a block, whose parameters gate_up_proj [experts, gate and up, in] and down_proj [experts,
    out, in] transformers makes of all of them. gate, up, down: an expert's linears where each is stored by
    itself, as the family's own checkpoints have them. folder: what these call the module's first part.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    module: str = "mlp.experts"
    folder: str = "mlp"

    def stored(self, parameter: str) -> str:
        """The name that the family's own checkpoints have for a parameter of a mixture."""
        return parameter.replace(f".{self.module.partition('.')[0]}.", f".{self.folder}.")


@dataclass(frozen=True)
class Family:
    """blocks: module path of the list of decoder blocks in the causal language model.

    residuals: linear → module, both within a block, where the linear's output is added, unchanged,
    to the very tensor that enters the module: the residual stream.
    mlp: the parts of a gated MLP whose gate, up and down are linears of their own. mixture: what some or all
    blocks have in its place.
    """

    blocks: str = "model.layers"
    residuals: Mapping[str, str] = field(default_factory=dict)
    mlp: GatedMlp | None = None
    mixture: Mixture | None = None


_PRE_NORM = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}

# model_type in config.json → family
FAMILIES: dict[str, Family] = {
    "llama": Family(residuals=_PRE_NORM, mlp=GatedMlp()),
    "mistral": Family(residuals=_PRE_NORM, mlp=GatedMlp()),
    "qwen2": Family(residuals=_PRE_NORM, mlp=GatedMlp()),
    "qwen3": Family(residuals=_PRE_NORM, mlp=GatedMlp()),
    "phi3": Family(residuals=_PRE_NORM),
    # What experts put out is weighted before it is added, so none of them writes to the residual stream.
    "mixtral": Family(
        residuals={"self_attn.o_proj": "input_layernorm"},
        mixture=Mixture("w1", "w3", "w2", folder="block_sparse_moe"),
    ),
    "qwen3_moe": Family(residuals=_PRE_NORM, mixture=Mixture()),
    # Gemma normalises what attention and MLP put out before adding it: nothing is added unchanged.
    "gemma2": Family(mlp=GatedMlp()),
    "gemma3_text": Family(mlp=GatedMlp()),
    "opt": Family(
        "model.decoder.layers",
        {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    ),
    # Attention and MLP run side by side and both write: correcting one of them is correcting all.
    "gpt_neox": Family("gpt_neox.layers", {"attention.dense": "input_layernorm"}),
}

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family_of(config: dict[str, Any]) -> Family:
    """The family of this config.json; CheckpointError says why there is none."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    has_experts = any(isinstance(config.get(key), int) and config[key] > 1 for key in _EXPERT_KEYS)
    if has_experts and (family is None or family.mixture is None):
        raise CheckpointError(
            f"{model_type} is a mixture-of-experts model of a kind that llmsqueeze does not prune yet, and "
            "pruning the rest alone would mislead; supported: "
            + ", ".join(name for name, known in FAMILIES.items() if known.mixture)
        )
    if family is not None:
        if config.get("do_layer_norm_before") is False:  # OPT-350m: its norms come after the sum
            return Family(family.blocks)
        return family
    if config.get("auto_map"):
        raise CheckpointError(
            f"architecture {model_type!r} needs remote code, which llmsqueeze never runs; supported: "
            + ", ".join(FAMILIES)
        )
    raise CheckpointError(
        f"unknown architecture {model_type!r} (model_type in config.json); supported: "
        + ", ".join(FAMILIES)
    )
