"""Loading llmsqueeze checkpoints through transformers: what ``import llmsqueeze`` registers.

``from_pretrained`` gives a model that computes with kernels where there are some, on a CPU with weights that
stay in the file, as `run` does; else, and when asked to, the masked dense weights, bit for bit. transformers
itself would initialise a tensor it does not find at random and go on; here that is an error before any weight
is loaded.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmsqueeze import experts
from llmsqueeze.encodings import ENCODINGS, Encoding
from llmsqueeze.errors import CheckpointError

_log = logging.getLogger("llmsqueeze")


@register_quantization_config("llmsqueeze")
class LlmsqueezeConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json, and how a checkpoint is to be loaded.

    dequantize: as an ordinary model with dense weights, to be trained, saved or changed. The rest is the
    checkpoint's own.
    """

    def __init__(
        self,
        dequantize: bool = False,
        quant_method: str = "llmsqueeze",
        format_version: int | None = None,
        manifest_sha256: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise CheckpointError(f"quantization_config: unknown key {sorted(unknown)[0]!r}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.manifest_sha256 = manifest_sha256
        # By this name transformers, too, knows that a loaded model is an ordinary one.
        self.dequantize = dequantize

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"dequantize": self.dequantize}


def _merge(cls: Any, found: Any, given: Any) -> Any:
    """The checkpoint's settings, loading attributes as given. transformers does so for kinds on a list of its
    own, and warns of all others."""
    if not isinstance(given, LlmsqueezeConfig):
        return _merge_others(found, given)
    merged = _merge_others(found, None)
    if isinstance(merged, LlmsqueezeConfig):
        for name, value in given.get_loading_attributes().items():
            setattr(merged, name, value)
        return merged
    return _merge_others(found, given)  # which refuses two kinds


_merge_others = AutoHfQuantizer.merge_quantization_configs
AutoHfQuantizer.merge_quantization_configs = classmethod(_merge)


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
    """Decodes sites while transformers loads them, or keeps it from loading any; puts gates into the finished
    model, and lets it compute with kernels."""

    requires_calibration = True
    # Only a path: transformers copies this object, and all it holds, for every tensor it decodes.
    _directory: Path
    _dtype: torch.dtype
    _mapped = False  # weights stay in the file, and transformers loads none
    _apart = False  # experts have linears of their own while their weights are loaded
    # Where the model is to be, if it is one GPU: weights get there when they are packed.
    _target: torch.device | None = None

    @property
    def _dense(self) -> bool:
        wanted: bool = self.quantization_config.dequantize
        return wanted

    def update_device_map(self, device_map: Any) -> Any:
        if self._dense:
            return device_map
        # Where a CPU is all there is, nothing is to be planned.
        if isinstance(device_map, str) and not torch.accelerator.is_available():
            return {"": torch.device("cpu")}
        where = _only_device(device_map)
        if where is not None and where.type == "cuda":
            self._target = where
            return {"": torch.device("cpu")}
        return device_map

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> nn.Module:
        from llmsqueeze.checkpoint import Checkpoint
        from llmsqueeze.runtime import deferred

        if not checkpoint_files:
            raise CheckpointError("a llmsqueeze checkpoint loads from its directory only")
        # Opening checks manifest, headers, names and shapes, and raises on the first mismatch.
        self._directory = Path(checkpoint_files[0]).parent
        checkpoint = Checkpoint(self._directory)
        self._dtype = next(model.parameters()).dtype
        where = self._target or _only_device(device_map)
        if not self._dense and deferred.fits(checkpoint, model, where):
            deferred.defer(model)
            self._mapped = True
        elif checkpoint.mixture:
            experts.take_apart(model, checkpoint.mixture)
            self._apart = True
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from llmsqueeze.checkpoint import Checkpoint
        from llmsqueeze.runtime import deferred

        checkpoint = Checkpoint(self._directory)
        if self._mapped:
            deferred.fill(model, checkpoint)
            _attach_kv_cache(model, checkpoint)
            return model
        # transformers would undo on save what it applied on load; a dense model has nothing to undo.
        # From 5.24 on it forgets the conversions of a dequantised model by itself.
        _cast_renamed(model, self._dtype)
        if self._apart:
            experts.put_together(model)
        _install_gates(model, checkpoint)
        _attach_kv_cache(model, checkpoint)
        conversions = getattr(model, "_weight_conversions", None) or ()
        # Without a list of what was done on load, saving undoes what the model's family usually needs.
        left = [c for c in conversions if not _is_ours(c)]
        model._weight_conversions = None if self._apart else left or None
        if not self._dense and not self._pack(model, checkpoint):
            self.remove_quantization_config(model)
            model._weight_conversions = None if self._apart else left or None
            for part in model.modules():
                if hasattr(part, "config"):
                    vars(part.config).pop("_is_quantized", None)
        return model

    def _pack(self, model: nn.Module, checkpoint: Any) -> bool:
        """Let a loaded model compute with kernels, where there are some; whether it now does."""
        from llmsqueeze.runtime import backend, linears, sealed

        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        weight = next(model.parameters())
        where = self._target or weight.device
        reason = backend.missing(weight.dtype, where)
        if len(devices) > 1:
            reason = (
                f"kernels compute on one device, and device_map takes {len(devices)}; give one, as "
                'device_map="cuda"'
            )
        packed = False
        if reason is None:
            packed = bool(linears.use_kernels(model, where).formats)
        elif backend.has_work(checkpoint):
            _log.warning("%s: its weights are made dense: %s", self._directory, reason)
        if self._target is not None:
            model.to(self._target)
        if packed:
            sealed.seal(model)
        return packed

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
        from llmsqueeze.runtime.sealed import refusal

        raise refusal("saved")  # one with dense weights has no quantizer any more

    @property
    def is_trainable(self) -> bool:
        from llmsqueeze.runtime.sealed import refusal

        raise refusal("trained")

    @property
    def is_compileable(self) -> bool:
        return True


def _only_device(device_map: Any) -> torch.device | None:
    """The device that a device_map puts all of a model on; None if it takes several, or plans yet."""
    if device_map is None:
        return torch.device("cpu")
    if not isinstance(device_map, dict) or set(device_map) != {""}:
        return None
    (where,) = device_map.values()
    if where == "disk":
        return None
    return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)


def _install_gates(model: nn.Module, checkpoint: Any) -> None:
    from llmsqueeze.policy import Policy
    from llmsqueeze.runtime import gates

    if record := checkpoint.activation:
        blocks = model.get_submodule(checkpoint.blocks_path).children()
        parts = gates.parts_of(record, checkpoint.read_activation())
        gates.install(model, parts, Policy.parse(record.prefill), blocks)


def _attach_kv_cache(model: nn.Module, checkpoint: Any) -> None:
    from llmsqueeze.runtime import kv_cache

    if record := checkpoint.kv_cache:
        kv_cache.attach(model, kv_cache.stored_formats(record, checkpoint.read_kv_cache()))


def _pattern(part: str) -> str:
    return f"weight_{part}"


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(op, _Decode) for op in getattr(conversion, "operations", ()))


def _cast_renamed(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all weights the dtype that was asked for: older releases load renamed ones in the file's."""
    if any(getattr(model, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict")):
        return
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _merges(conversion: Any) -> bool:
    return any(isinstance(op, MergeModulelist) for op in getattr(conversion, "operations", ()))


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
