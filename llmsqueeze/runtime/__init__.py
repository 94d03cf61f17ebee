"""From a checkpoint on disk to a model that runs. Knows formats, never methods."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError
from llmsqueeze.integration import LlmsqueezeConfig  # and registers the format with transformers
from llmsqueeze.runtime import mapped
from llmsqueeze.runtime.generation import read_generation
from llmsqueeze.runtime.linears import use_kernels
from llmsqueeze.shards import entry_name


def load(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, kernels: bool = False
) -> Any:
    """The causal language model, ready to run. checkpoint: opened, hence already checked.

    kernels: compressed weights stay compressed on the device, and kernels compute with them; else they
    are dense there, zeros and all. On a CPU pruned and eight-bit weights then stay in the file.

    Raises CheckpointError if transformers reports a tensor missing, left over or of another shape;
    EnvironmentFault if the device or dtype has no kernels.
    """
    read_generation(checkpoint)  # transformers reads it too, and says less of what is wrong
    if kernels and device.type == "cpu" and (found := mapped.load(checkpoint, dtype)) is not None:
        return found
    config = AutoConfig.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=False
    )
    # Or it would look for weights by itself: by other names, and pickled ones in the end.
    config.transformers_weights = entry_name(checkpoint.path)
    # The dense form has a manifest, too, and nothing that transformers would decode.
    compressed = "quantization_config" in checkpoint.config
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint.path,
        config=config,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        quantization_config=LlmsqueezeConfig(dequantize=True) if compressed else None,
    )
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            raise CheckpointError(
                f"{checkpoint.path}: {problem} {sorted(map(str, info[problem]))[0]}"
            )
    if kernels:
        use_kernels(model, device)
    return model.to(device).eval()
