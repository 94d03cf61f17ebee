"""A compressed model for a CPU whose weights stay where they are: in the file, mapped, without a copy.

Behind gates kernels need another order, input after input: those weights are laid out anew from the file, one
group of linears after another, so that none but that group is ever dense in memory.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.checkpoint import Checkpoint, PackedSource, place
from llmsqueeze.ops import cpu
from llmsqueeze.policy import Policy
from llmsqueeze.runtime import gates, kv_cache, layers, linears
from llmsqueeze.runtime.backend import has_work
from llmsqueeze.runtime.gates import GatedLinear
from llmsqueeze.runtime.generation import read_generation
from llmsqueeze.runtime.packed import (
    LEAST_SPARSITY,
    BitmaskLinear,
    DenseLinear,
    PackedLinear,
    StoredEmbedding,
    StoredInt8Linear,
)


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any | None:
    """The causal language model, ready to run; None if kernels do not use all of it as it is stored."""
    if cpu.library() is None or not has_work(checkpoint):
        return None
    model = checkpoint.build(dtype)
    if not suits(checkpoint, model) or fill(model, checkpoint, dtype) is None:
        return None
    if generation := read_generation(checkpoint):
        model.generation_config = generation
    if checkpoint.kv_cache:
        formats = kv_cache.stored_formats(checkpoint.kv_cache, checkpoint.read_kv_cache())
        kv_cache.attach(model, formats)
    return model


def suits(checkpoint: Checkpoint, model: Any) -> bool:
    """Whether fill() takes a model as the checkpoint builds it. There are no kernels for experts, and none
    that keep some modules in fp32."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None)
    return not (
        checkpoint.mixture or getattr(model, "_keep_in_fp32_modules", None) or strict
    ) and has_work(checkpoint)


@torch.no_grad()
def fill(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> linears.Report | None:
    """Give an empty model, of parameters on the meta device, the checkpoint's weights and gates.

    Returns what was done; None if parameters were left empty.

    Linears, the head's too, have the bits of the file whatever dtype is, and so do embeddings, whose rows
    are cast as they are looked up; what else there is is cast at once.
    """
    begun = time.perf_counter()
    gated = _install_gates(model, checkpoint, dtype)
    modules = dict(model.named_modules())
    embedded = model.get_input_embeddings()
    tied = None
    stored = checkpoint.read_parts(_kept_packed(checkpoint, modules))
    for name in checkpoint.sources:
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        if leaf == "weight" and type(module) is nn.Linear:
            model.set_submodule(path, _linear(checkpoint, path, module, dtype, stored.get(name)))
        elif leaf == "weight" and type(module) is nn.Embedding:
            table = StoredEmbedding(checkpoint.read([name])[name], module.padding_idx, dtype)
            model.set_submodule(path, table)
            tied = table.weight if module is embedded else tied
        elif (leaf != "bias" or type(module) is not nn.Linear) and not (
            leaf == "weight" and isinstance(module, GatedLinear)
        ):
            place(model, checkpoint.read([name]), dtype, torch.device("cpu"))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.is_meta and head.bias is None and tied is not None:
        model.set_output_embeddings(DenseLinear(tied, None))
    else:
        model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    report = linears.Report()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            wide = module.out_features * module.in_features * dtype.itemsize
            report.count(module.format, 1, wide, module)
    if gated:

        def read(path: str, linear: nn.Linear) -> Tensor:
            return checkpoint.read([f"{path}.weight"])[f"{path}.weight"].to(dtype)

        found = linears.pack_linears(
            model, torch.device("cpu"), choose=linears.on_cpu, weight_of=read
        )
        report.formats.update(found.formats)
        report.bytes_before += found.bytes_before
        report.bytes_after += found.bytes_after
    else:
        layers.join(model)
    report.seconds = time.perf_counter() - begun
    return report


def _install_gates(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Put the gates into the skeleton, before it has weights; whether there are any."""
    record = checkpoint.activation
    if record is None:
        return False
    # Gates are made for the dtype and device of a weight: here one element stands for all.
    for gate in record.gates.values():
        for member in gate.members:
            linear = model.get_submodule(member)
            standing = torch.zeros((), dtype=dtype).expand(linear.weight.shape)
            linear.weight = nn.Parameter(standing, requires_grad=False)
    blocks = model.get_submodule(checkpoint.blocks_path).children()
    parts = gates.parts_of(record, checkpoint.read_activation())
    gates.install(model, parts, Policy.parse(record.prefill), blocks)
    return True


def _kept_packed(checkpoint: Checkpoint, modules: dict[str, nn.Module]) -> list[str]:
    """The weights that linears without gates keep as they are encoded."""
    found = []
    for name, source in checkpoint.sources.items():
        path, _, leaf = name.rpartition(".")
        if (
            leaf == "weight"
            and type(modules[path]) is nn.Linear
            and isinstance(source, PackedSource)
        ):
            record = source.record
            if record.encoding == "int8" or record.sparsity >= LEAST_SPARSITY:
                found.append(name)
    return found


def _linear(
    checkpoint: Checkpoint, path: str, module: nn.Linear, dtype: torch.dtype,
    stored: dict[str, Tensor] | None,
) -> PackedLinear:  # fmt: skip
    """What computes as `module`, whose parameters are empty, with `stored` parts or the dense weight."""
    bias = None
    if module.bias is not None:
        bias = checkpoint.read([f"{path}.bias"])[f"{path}.bias"].to(dtype)
    name = f"{path}.weight"
    if stored is None:
        return DenseLinear(checkpoint.read([name])[name], bias)
    source = checkpoint.sources[name]
    assert isinstance(source, PackedSource)
    if source.record.encoding == "int8":
        return StoredInt8Linear(bias, **stored)
    return BitmaskLinear(module.weight, bias, stored)
