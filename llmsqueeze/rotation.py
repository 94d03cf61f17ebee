"""One rotation of the residual stream for a whole model, folded into its weights. An experiment.

WINA's choice of inputs is best where the columns of a linear are orthogonal. Its paper (arXiv 2505.19427)
rotates every block by itself and pays two dense matrices a block for it. One rotation Q for all
blocks costs nothing when the model runs: with every RMSNorm's γ folded into what reads it, norm(x Q) =
norm(x) Q, so W diag(γ) Q reads the rotated stream, Qᵀ W writes to it, and the model computes what it
computed. Q are the eigenvectors of Σ (W diag(γ))ᵀ (W diag(γ)) over all linears that read the stream.
(The published code also takes the mean off the embedding, which RMSNorm does not forgive.)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze.artifact import ArtifactWriter
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import RecipeError

# Norm of a block → the linears that read what it puts out.
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@torch.no_grad()
def rotate(checkpoint: Checkpoint, out: Path) -> Checkpoint:
    """Write the same function with a rotated residual stream to `out`, its head untied, and open it.

    Weights are computed in fp64 and stored in their own dtype. RecipeError when the checkpoint is
    pruned, since no zero would survive, or of a family without plain RMSNorms.
    """
    if checkpoint.manifest is not None and checkpoint.manifest.sites:
        raise RecipeError("--rotate would fill every zero of a pruned checkpoint; start from dense")
    if checkpoint.config["model_type"] not in FAMILIES:
        raise RecipeError(f"--rotate knows {', '.join(FAMILIES)} only")
    names = {id(module): name for name, module in checkpoint.model.named_modules()}
    embedding = names[id(checkpoint.model.get_input_embeddings())] + ".weight"
    head = names[id(checkpoint.model.get_output_embeddings())] + ".weight"
    norm = checkpoint.blocks_path.rpartition(".")[0] + ".norm.weight"
    turn = _rotation(checkpoint)
    outer = checkpoint.read(checkpoint.outer_parameters)
    gamma = outer[norm].double()
    new = {
        embedding: outer[embedding].double() @ turn,
        norm: torch.ones_like(gamma),
        head: (outer.get(head, outer[embedding]).double() * gamma) @ turn,
    }
    with ArtifactWriter(out, format="dense") as writer:
        for name in dict.fromkeys([*outer, head]):
            source = outer.get(name, outer[embedding])
            writer.add(name, new.get(name, source).to(source.dtype))
        for index in range(checkpoint.block_count):
            for name, tensor in _turned(checkpoint, index, turn).items():
                writer.add(name, tensor)
        config = {**checkpoint.config, "tie_word_embeddings": False}
        steps = checkpoint.manifest.steps if checkpoint.manifest else []
        writer.publish(config, checkpoint.path, steps, checkpoint.stored_bytes)
    return Checkpoint(out)


def _rotation(checkpoint: Checkpoint) -> Tensor:
    """[hidden, hidden] fp64, orthogonal; the directions that are read most come first."""
    total: Tensor | float = 0.0
    for index in range(checkpoint.block_count):
        prefix = f"{checkpoint.blocks_path}.{index}."
        block = checkpoint.read(checkpoint.block_parameters(index))
        for norm, readers in _READERS.items():
            gamma = block[f"{prefix}{norm}.weight"].double()
            for reader in readers:
                weight = block[f"{prefix}{reader}.weight"].double() * gamma
                total = total + weight.t() @ weight
    assert isinstance(total, Tensor)
    return torch.linalg.eigh(total).eigenvectors.flip(1)


def _turned(checkpoint: Checkpoint, index: int, turn: Tensor) -> dict[str, Tensor]:
    """One block's parameters for the rotated stream, in their own dtypes."""
    prefix = f"{checkpoint.blocks_path}.{index}."
    block = checkpoint.read(checkpoint.block_parameters(index))
    new: dict[str, Tensor] = {}
    for norm, readers in _READERS.items():
        gamma = block[f"{prefix}{norm}.weight"].double()
        new[f"{prefix}{norm}.weight"] = torch.ones_like(gamma)
        for reader in readers:
            name = f"{prefix}{reader}.weight"
            new[name] = (block[name].double() * gamma) @ turn
    for writer in _WRITERS:
        for part in ("weight", "bias"):
            name = f"{prefix}{writer}.{part}"
            if name in block:
                new[name] = turn.t() @ block[name].double()
    return {name: new.get(name, tensor).to(tensor.dtype) for name, tensor in block.items()}
