"""Loading llmsqueeze checkpoints through transformers: what ``import llmsqueeze`` registers.

``from_pretrained`` rebuilds the masked dense weights, bit for bit. transformers itself would
initialise a tensor it does not find at random and go on; here that is an error before any weight is
loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmsqueeze import experts
from llmsqueeze.encodings import ENCODINGS, Encoding
from llmsqueeze.errors import CheckpointError


@register_quantization_config("llmsqueeze")
class LlmsqueezeConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json."""

    def __init__(
        self, quant_method: str, format_version: int, manifest_sha256: str, **unknown: Any
    ) -> None:
        if unknown:
            raise CheckpointError(f"quantization_config: unknown key {sorted(unknown)[0]!r}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.manifest_sha256 = manifest_sha256
        # The loaded model is an ordinary dense one: transformers then forgets the quantisation.
        self.dequantize = True


class _Decode(ConversionOps):
    """The parts of an encoding → weight, in the dtype the model was asked for."""

    def __init__(self, hf_quantizer: HfQuantizer, encoding: Encoding) -> None:
        self.encoding = encoding
        # The attribute tells transformers to leave the parts' dtypes to this operation.
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: nn.Module,
        **kwargs: Any,
    ) -> dict[str, Any]:
        parts = {part: _single(input_dict[_pattern(part)]) for part in self.encoding.parts}
        expected = model.get_parameter(full_layer_name)
        weight = self.encoding.decode(parts, expected.shape[1])
        return {full_layer_name: weight.to(expected.dtype)}


@register_quantizer("llmsqueeze")
class LlmsqueezeQuantizer(HfQuantizer):
    """Decodes sites while transformers loads them, and puts gates into the finished model."""

    requires_calibration = True
    # Of a checkpoint with gates or a KV-cache format, between the two ends of loading. Only its path:
    # transformers copies this object, and all it holds, for every tensor it decodes.
    _equipped: Path | None = None
    _apart = False  # experts have linears of their own while their weights are loaded

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        from llmsqueeze.checkpoint import Checkpoint

        if not checkpoint_files:
            raise CheckpointError("a llmsqueeze checkpoint loads from its directory only")
        # Opening checks manifest, headers, names and shapes, and raises on the first mismatch.
        directory = Path(checkpoint_files[0]).parent
        checkpoint = Checkpoint(directory)
        self._equipped = directory if checkpoint.activation or checkpoint.kv_cache else None
        if checkpoint.mixture:
            experts.take_apart(model, checkpoint.mixture)
            self._apart = True
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # transformers would undo on save what it applied on load; a dense model has nothing to undo.
        # From 5.24 on it forgets the conversions of a dequantised model by itself.
        if self._apart:
            _cast_renamed(model)
            experts.put_together(model)
        if self._equipped is not None:
            _equip(model, self._equipped)
        conversions = getattr(model, "_weight_conversions", None) or ()
        # Without a list of what was done on load, saving undoes what the model's family usually needs.
        left = [c for c in conversions if not _is_ours(c)]
        model._weight_conversions = None if self._apart else left or None
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], *model: nn.Module
    ) -> list[Any]:
        if self._apart:  # nothing is to be merged yet
            weight_conversions = [c for c in weight_conversions if not _merges(c)]
        found: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return found

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [
            WeightConverter(
                [_pattern(part) for part in encoding.parts], "weight", [_Decode(self, encoding)]
            )
            for encoding in ENCODINGS.values()
        ]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True  # after loading, the model is dense

    @property
    def is_trainable(self) -> bool:
        return True


def _equip(model: nn.Module, directory: Path) -> None:
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.policy import Policy
    from llmsqueeze.runtime import gates, kv_cache

    checkpoint = Checkpoint(directory)
    if record := checkpoint.activation:
        blocks = model.get_submodule(checkpoint.blocks_path).children()
        parts = gates.parts_of(record, checkpoint.read_activation())
        gates.install(model, parts, Policy.parse(record.prefill), blocks)
    if checkpoint.kv_cache:
        kv_cache.attach(
            model, kv_cache.stored_formats(checkpoint.kv_cache, checkpoint.read_kv_cache())
        )


def _pattern(part: str) -> str:
    return f"weight_{part}"


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(op, _Decode) for op in getattr(conversion, "operations", ()))


def _cast_renamed(model: nn.Module) -> None:
    """Give all weights the dtype that was asked for: older releases load renamed ones in the file's."""
    dtype = model.get_input_embeddings().weight.dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _merges(conversion: Any) -> bool:
    return any(isinstance(op, MergeModulelist) for op in getattr(conversion, "operations", ()))


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
