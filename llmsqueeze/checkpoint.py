"""A checkpoint on disk seen as a model: an empty skeleton, and tensors read block by block.

Opening reads headers only, and fails unless every parameter of the architecture is there exactly
once with the right shape and nothing is left over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from llmsqueeze.activation import ActivationRecord, read_side_tensors, side_tensors
from llmsqueeze.architectures import family_of
from llmsqueeze.artifact import (
    MANIFEST_NAME,
    Manifest,
    SiteRecord,
    check_parts,
    decode,
    read_manifest,
)
from llmsqueeze.config_file import check_config, read_config
from llmsqueeze.encodings import ENCODINGS, owner_of
from llmsqueeze.errors import CheckpointError, SourceDamaged
from llmsqueeze.experts import FusedPart, fused_parts, take_apart
from llmsqueeze.kv_record import KvRecord, kv_tensors, read_kv_tensors
from llmsqueeze.shards import (
    DTYPES,
    KV_NAME,
    SIDE_NAME,
    StoredTensor,
    hash_file,
    list_shards,
    load,
    read_headers,
)

# Rotary tables and the like, which are not stored: a model has some kilobytes of them.
_MOST_TABLES = 64 * 2**20
_WEIGHT_DTYPES = ("F32", "F16", "BF16")
# Buffers that old exporters saved and current models compute themselves.
_OBSOLETE = (r"rotary_emb\.inv_freq$", r"\.attention\.(masked_)?bias$")


@dataclass(frozen=True)
class PackedSource:
    """A compressed site: its record and where the parts of its encoding lie."""

    record: SiteRecord
    parts: dict[str, StoredTensor]


Source = StoredTensor | PackedSource


class Checkpoint:
    """An opened checkpoint directory.

    path; config: config.json as parsed; blocks_path, residuals, mlp, mixture: see architectures.Family;
    manifest: None for a plain Hugging Face checkpoint;
    model: the empty model whose names and shapes count; sources: parameter name → where it lies.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError with one line for everything that is wrong with `path`."""
        self.path = path
        self.config = read_config(path)
        check_config(path, self.config)
        family = family_of(self.config)
        self.blocks_path = family.blocks
        self.residuals = family.residuals
        self.mlp = family.mlp
        self.mixture = family.mixture
        quantization = self.config.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") != "llmsqueeze":
            method = quantization.get("quant_method")
            raise CheckpointError(
                f"{path}: already quantised by {method!r}; start from the unquantised checkpoint"
            )
        self.manifest: Manifest | None = read_manifest(path, self.config)
        stored = read_headers(path)
        self._check_depth(len(stored))
        # First without a byte of memory: until they are matched, sizes are what a stranger says.
        self.model = self._build(None, torch.device("meta"))
        self.sources: dict[str, Source] = self._match(stored)
        tables = sum(buffer.nbytes for buffer in self.model.buffers())
        if tables > _MOST_TABLES:
            raise CheckpointError(
                f"{path / 'config.json'}: its model has {tables:,} bytes of tables beside the weights"
            )
        self.model = self.build(None)
        self._check_sites()
        self._check_gates()
        self._check_kv_cache()

    def build(self, dtype: torch.dtype | None) -> Any:
        """A causal language model with parameters on the meta device and real buffers.

        Experts have linears of their own, which the model that runs has not; see experts.take_apart.
        dtype: of the computation; some families round constants (Gemma's embedding scale) to it.
        """
        return self._build(dtype, init_empty_weights(include_buffers=False))

    def _build(self, dtype: torch.dtype | None, emptied: AbstractContextManager[Any]) -> Any:
        # Whatever transformers raises here, it raises because of what config.json says.
        try:
            config = AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            # Random initial values would be thrown away, and take longer than everything else here.
            with no_init_weights(), emptied:
                model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=False, **({"dtype": dtype} if dtype else {})
                )
        except Exception as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            file = self.path / "config.json"
            raise CheckpointError(f"{file}: no model can be built from it ({lines[0]})") from error
        if self.mixture:
            take_apart(model, self.mixture)
        return model.eval()

    @cached_property
    def routed_shares(self) -> dict[str, float]:
        """Parameters of experts, and the share of all tokens that an expert sees on average."""
        groups = fused_parts(self.model).values()
        chosen = self.model.config.num_experts_per_tok if groups else 0
        return {p.parameter: chosen / (parts[-1].index + 1) for parts in groups for p in parts}

    @property
    def block_count(self) -> int:
        return len(self.blocks)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        blocks = self.model.get_submodule(self.blocks_path)
        return list(blocks)  # type: ignore[call-overload, no-any-return]

    def block_parameters(self, index: int) -> list[str]:
        """Full names of the parameters of one block, in model order."""
        prefix = f"{self.blocks_path}.{index}."
        return [prefix + name for name, _ in self.blocks[index].named_parameters()]

    @cached_property
    def outer_parameters(self) -> list[str]:
        """Full names of the parameters outside the blocks: embeddings, final norm, untied head."""
        return [name for name in self.sources if not name.startswith(self.blocks_path + ".")]

    def linears(self, index: int, model: nn.Module | None = None) -> dict[str, nn.Linear]:
        """The linears of one block by full module name, of `model` if one is given.

        CheckpointError on parameters of three or more dimensions: experts that were not taken apart.
        """
        prefix = f"{self.blocks_path}.{index}."
        block = self.blocks[index] if model is None else model.get_submodule(prefix[:-1])
        for name, parameter in block.named_parameters():
            if parameter.dim() > 2:
                raise CheckpointError(
                    f"{prefix}{name} has {parameter.dim()} dimensions: fused experts of a "
                    "mixture-of-experts model, which llmsqueeze does not prune yet"
                )
        return {
            prefix + name: module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }

    def cache_shape(self, layer: int) -> tuple[int, int]:
        """Key-value heads and their width, as the attention module has them: configs carry unused ones."""
        config = self.model.config.get_text_config(decoder=True)
        attention: Any = next(m for m in self.blocks[layer].modules() if hasattr(m, "scaling"))
        groups = getattr(attention, "num_key_value_groups", 1)
        width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
        queries = config.num_attention_heads
        return queries // groups, width or config.hidden_size // queries

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters on the CPU in the dtype they are stored in, compressed sites decoded.

        Raises CheckpointError on NaN or Inf, naming the parameter.
        """
        wanted = {name: self.sources[name] for name in names}
        stored: list[StoredTensor] = []
        for source in wanted.values():
            stored.extend([source] if isinstance(source, StoredTensor) else source.parts.values())
        loaded = load(stored)
        tensors: dict[str, Tensor] = {}
        for name, source in wanted.items():
            if isinstance(source, StoredTensor):
                tensor = loaded[source.name]
            else:
                parts = {part: loaded[where.name] for part, where in source.parts.items()}
                tensor = decode(name.removesuffix(".weight"), source.record, parts)
            # One reduction instead of an elementwise test: a sum is finite only if all terms are,
            # unless it overflows, so the slow test runs only when the fast one is in doubt.
            if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not tensor.isfinite().all():
                raise SourceDamaged(f"{name} holds NaN or Inf; the checkpoint is damaged")
            tensors[name] = tensor
        return tensors

    def read_parts(self, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The parts of those that are compressed, as they lie in the file: pages come when they are used.

        Each file is mapped once for all of them: every mapping counts as memory what is touched near by.
        Raises CheckpointError if parts do not belong together.
        """
        packed = {n: s for n in names if isinstance(s := self.sources[n], PackedSource)}
        loaded = load(part for source in packed.values() for part in source.parts.values())
        found = {}
        for name, source in packed.items():
            found[name] = {part: loaded[where.name] for part, where in source.parts.items()}
            check_parts(name.removesuffix(".weight"), source.record, found[name])
        return found

    def site_dtype(self, name: str) -> torch.dtype:
        """The dtype a parameter is stored in."""
        source = self.sources[name]
        if isinstance(source, StoredTensor):
            return DTYPES[source.dtype]
        return DTYPES[source.parts[ENCODINGS[source.record.encoding].typed].dtype]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights: that of the first block's first linear."""
        return self.site_dtype(next(iter(self.linears(0))) + ".weight")

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they lie on disk."""
        total = 0
        for source in self.sources.values():
            parts = [source] if isinstance(source, StoredTensor) else source.parts.values()
            for stored in parts:
                elements = 1
                for extent in stored.shape:
                    elements *= extent
                total += elements * DTYPES[stored.dtype].itemsize
        return total

    @property
    def file_bytes(self) -> int:
        """Bytes of its safetensors files, thresholds and codebooks included."""
        sides = (self.path / name for name in (SIDE_NAME, KV_NAME))
        files = [*list_shards(self.path), *(side for side in sides if side.is_file())]
        return sum(file.stat().st_size for file in files)

    def stored_name(self, parameter: str) -> str:
        """The name to write a parameter under: the one it was found under, or where experts were found
        fused, as they are not written, the one in the family's own checkpoints."""
        source = self.sources[parameter]
        if isinstance(source, PackedSource):
            part, stored = next(iter(source.parts.items()))
            return stored.name.removesuffix(f"_{part}")
        if self.mixture and self._fused:
            return self.mixture.stored(parameter)
        return source.name

    @cached_property
    def _fused(self) -> bool:
        """Whether experts are stored as 3-D tensors."""
        return any(isinstance(s, StoredTensor) and s.within for s in self.sources.values())

    @property
    def manifest_sha256(self) -> str | None:
        """What names a checkpoint of ours whatever its directory is called; None for a plain one."""
        return hash_file(self.path / MANIFEST_NAME) if self.manifest else None

    @property
    def identity(self) -> list[Path]:
        """config.json and every shard: the files that a result depends on."""
        return [self.path / "config.json", *list_shards(self.path)]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """How it was made, step by step; empty for a plain checkpoint."""
        return self.manifest.steps if self.manifest else []

    @property
    def site_reports(self) -> dict[str, dict[str, float]]:
        """Every compressed site and what is known of it; empty for a plain checkpoint."""
        sites = self.manifest.sites if self.manifest else {}
        return {name: record.report for name, record in sites.items()}

    @property
    def changes(self) -> dict[str, Any]:
        """What is done to the weights while they are read, in plain types; nothing to those on disk."""
        return {}

    def progress(self) -> dict[str, Any]:
        """What rewind() needs to read on from here; one on disk reads the same whenever it is asked."""
        return {}

    def rewind(self, found: dict[str, Any], batch: int) -> None:
        """Go back to where progress() gave `found`; empty: to the beginning. batch: see Pruning.blocks."""

    @property
    def activation(self) -> ActivationRecord | None:
        """The gates of sparsified activations, if the checkpoint has any."""
        return self.manifest.activation if self.manifest else None

    def read_activation(self) -> dict[str, Tensor]:
        """The side tensors of the gates on the CPU; CheckpointError on values that cannot be."""
        assert self.activation is not None
        return read_side_tensors(side_tensors(self.path, self.activation))

    @property
    def kv_cache(self) -> KvRecord | None:
        """How the KV cache is quantised, if the checkpoint says so."""
        return self.manifest.kv_cache if self.manifest else None

    def read_kv_cache(self) -> dict[str, Tensor]:
        """The tensors of a calibrated KV cache on the CPU; CheckpointError on values that cannot be."""
        assert self.kv_cache is not None
        return read_kv_tensors(kv_tensors(self.path, self.kv_cache))

    def _check_sites(self) -> None:
        for name in self.manifest.sites if self.manifest else ():
            if f"{name}.weight" not in self.sources:
                raise CheckpointError(f"{self.path}: {name} of {MANIFEST_NAME} is not in the model")

    def _check_kv_cache(self) -> None:
        record = self.kv_cache
        if record is None:
            return
        heads, width = self.cache_shape(min(record.layers[0], self.block_count - 1))
        if max(record.layers) >= self.block_count or (record.heads, record.width) != (heads, width):
            raise CheckpointError(
                f"{self.path}: {MANIFEST_NAME} quantises {record.heads} key-value heads of {record.width} up "
                f"to layer {max(record.layers)}; the model has {self.block_count} layers, {heads} heads of "
                f"{width}"
            )

    def _check_gates(self) -> None:
        if self.activation is None:
            return
        modules = dict(self.model.named_modules())
        for name, gate in self.activation.gates.items():
            if name not in modules:
                raise CheckpointError(f"{self.path}: gate {name} is no module of this model")
            for member in (*gate.members, *gate.rows):
                linear = modules.get(member)
                width = None
                if isinstance(linear, nn.Linear):
                    width = linear.in_features if member in gate.members else linear.out_features
                if width != gate.width:
                    raise CheckpointError(
                        f"{self.path}: gate {name} has {gate.width} thresholds, {member} does not fit"
                    )

    def _check_depth(self, tensors: int) -> None:
        # A damaged config must not make us build a billion empty blocks before it is found out.
        depth = self.config.get("num_hidden_layers")
        if not isinstance(depth, int) or not 0 < depth <= tensors:
            raise CheckpointError(
                f"{self.path / 'config.json'}: num_hidden_layers is {depth!r}, but the shards hold "
                f"{tensors} tensors"
            )

    def _match(self, stored: dict[str, StoredTensor]) -> dict[str, Source]:
        """Assign every stored tensor to a parameter, strictly."""
        tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        expected = dict(self.model.named_parameters())  # tied parameters appear once
        expected.update((n, p) for n, p in self.model.state_dict().items() if n not in tied)
        for name in tied:
            expected.pop(name, None)
        ignored = [*_OBSOLETE, *(self.model._keys_to_ignore_on_load_unexpected or ())]

        fused = fused_parts(self.model)
        known = expected.keys() | tied.keys() | fused.keys()
        rest: dict[str, StoredTensor] = {}
        for name, tensor in stored.items():
            parameter = self._parameter_name(name, known)
            for part, where in self._parts(parameter, tensor, fused.get(parameter)):
                if part in rest:
                    raise CheckpointError(f"{self.path}: {name} and {rest[part].name} are the same")
                rest[part] = where
        sources: dict[str, Source] = {}
        for name, parameter in expected.items():
            source = self._take(name, rest)
            if source is None:
                raise CheckpointError(f"{self.path}: {name} is missing from the weights")
            shape = source.shape if isinstance(source, StoredTensor) else source.record.shape
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{self.path}: {name} has shape {shape}, the architecture needs "
                    f"{tuple(parameter.shape)}"
                )
            sources[name] = source
        for name in tied.keys() & rest.keys():
            self._check_tied(rest.pop(name), sources.get(tied[name]))
        for name, tensor in rest.items():
            if not any(re.search(pattern, name) for pattern in ignored):
                raise CheckpointError(
                    f"{self.path}: {tensor.name} does not belong to a {self.config['model_type']}"
                )
        return sources

    def _parts(
        self, parameter: str, tensor: StoredTensor, parts: list[FusedPart] | None
    ) -> Iterator[tuple[str, StoredTensor]]:
        """The parameters that a stored tensor is, and where each of them lies."""
        if parts is None:
            yield parameter, tensor
            return
        experts, rows = parts[-1].index + 1, parts[-1].end
        if len(tensor.shape) != 3 or tensor.shape[:2] != (experts, rows):
            raise CheckpointError(
                f"{self.path}: {tensor.name} has shape {tensor.shape}, the architecture needs {experts} "
                f"experts of {rows} rows"
            )
        for part in parts:
            yield part.parameter, tensor.part(part.index, part.begin, part.end)

    def _parameter_name(self, stored: str, known: Set[str]) -> str:
        """The model's name for a stored tensor: renamed as transformers would, or as it is."""
        prefix = self.model.base_model_prefix + "."
        renamed = stored
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for name in (renamed, prefix + renamed, stored, prefix + stored):
            if owner_of(name) in known:
                return name
        return stored

    @cached_property
    def _renamings(self) -> list[Any]:
        mapping = get_model_conversion_mapping(self.model)
        return [entry for entry in mapping if not isinstance(entry, WeightConverter)]

    def _take(self, name: str, rest: dict[str, StoredTensor]) -> Source | None:
        """Remove from `rest` what stores parameter `name`."""
        site = name.removesuffix(".weight")
        record = self.manifest.sites.get(site) if self.manifest else None
        if record is None or record.encoding == "dense" or not name.endswith(".weight"):
            tensor = rest.pop(name, None)
            if tensor is not None and tensor.dtype not in _WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{self.path}: {name} is {tensor.dtype}; weights must be "
                    + ", ".join(_WEIGHT_DTYPES)
                )
            return tensor
        encoding = ENCODINGS[record.encoding]
        parts = {part: rest.pop(f"{name}_{part}", None) for part in encoding.parts}
        found = {part: tensor for part, tensor in parts.items() if tensor is not None}
        if len(found) < len(parts):
            return None
        dtype = DTYPES.get(found[encoding.typed].dtype)
        values = found.get("values")
        if str(dtype) != f"torch.{record.dtype}" or (
            values is not None and values.shape != (record.nonzeros,)
        ):
            raise CheckpointError(f"{self.path}: {name} is not stored as the manifest says")
        return PackedSource(record, found)

    def _check_tied(self, copy: StoredTensor, original: Source | None) -> None:
        """A tied parameter may be stored twice, if both are the same."""
        if not isinstance(original, StoredTensor) or not torch.equal(
            load([copy])[copy.name], load([original])[original.name]
        ):
            raise CheckpointError(
                f"{self.path}: {copy.name} differs from the embedding that config.json ties it to; "
                "set tie_word_embeddings to false if they are separate"
            )


class ChangingCheckpoint(Checkpoint):
    """One whose weights are changed while they are read: what was calibrated on the old ones is not there."""

    @property
    def activation(self) -> ActivationRecord | None:
        return None

    @property
    def kv_cache(self) -> KvRecord | None:
        return None


def place(
    model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Put tensors into the skeleton as parameters on `device`, floats cast to `dtype`."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, parameter)
