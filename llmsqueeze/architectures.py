"""The decoder families we can walk block by block.

A new family is one line here and one line in tests/test_architectures.py: the walk itself learns
masks, rotary tables and other arguments from the model's own forward.
"""

from __future__ import annotations

from typing import Any

from llmsqueeze.errors import CheckpointError

# model_type in config.json → where the list of decoder blocks sits in the causal language model
BLOCKS: dict[str, str] = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "phi3": "model.layers",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
}

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def blocks_path(config: dict[str, Any]) -> str:
    """Module path of the block list for this config.json; CheckpointError says why there is none."""
    model_type = config.get("model_type")
    if any(isinstance(config.get(key), int) and config[key] > 1 for key in _EXPERT_KEYS):
        raise CheckpointError(
            f"{model_type} is a mixture-of-experts model: its experts are 3-D parameters, which "
            "llmsqueeze does not prune yet, and pruning the rest alone would mislead"
        )
    if isinstance(model_type, str) and model_type in BLOCKS:
        return BLOCKS[model_type]
    if config.get("auto_map"):
        raise CheckpointError(
            f"architecture {model_type!r} needs remote code, which llmsqueeze never runs; supported: "
            + ", ".join(BLOCKS)
        )
    raise CheckpointError(
        f"unknown architecture {model_type!r} (model_type in config.json); supported: "
        + ", ".join(BLOCKS)
    )
