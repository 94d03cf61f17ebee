"""Pruned models for a CPU whose weights stay in the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsqueeze import artifact
from llmsqueeze.bench_model import formats_of, operator_error
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.numerics.packing import check_bitmask, pack_bitmask
from llmsqueeze.ops import cpu
from llmsqueeze.runtime import load, mapped
from llmsqueeze.runtime.generate import Decoder
from llmsqueeze.runtime.linears import use_kernels
from llmsqueeze.runtime.packed import BitmaskLinear, DenseLinear, StoredEmbedding
from tests.conftest import TINY
from tests.test_cpu_kernels import IDS, logits, off

CPU = torch.device("cpu")


@pytest.fixture
def pruned(
    cli: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    def make(family: str = "llama", **changes: Any) -> Path:
        out = tmp_path / family
        arguments = ("--method", "magnitude", "--sparsity", 0.5, "-q")
        result = cli("prune", tiny(family, **changes), "-o", out, *arguments)
        assert result.exit_code == 0, result.stderr
        return out

    return make


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_model_computes_the_same(
    pruned: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint(pruned(family))
    model = load(checkpoint, dtype, CPU, kernels=True)
    assert any(isinstance(m, BitmaskLinear) for m in model.modules())
    # Gemma's embedding is more than a table: it stays, and so does the head that shares it.
    assert any(isinstance(m, DenseLinear) for m in model.modules()) or family.startswith("gemma")
    assert mapped.load(checkpoint, dtype) is not None
    dense = load(checkpoint, dtype, CPU)
    for ids in (IDS, IDS[:1, :1], torch.arange(30)[None]):
        worst = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        found = logits(model, ids)
        assert off(found, logits(dense, ids).double()) < worst
    assert model.generation_config.to_dict() == dense.generation_config.to_dict()
    assert model.dtype == dense.dtype and not model.training
    if dtype == torch.float32:
        chosen = [list(map(int, Decoder(m, 32).generate(IDS[0], 9))) for m in (model, dense)]
        assert chosen[0] == chosen[1]
        asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(IDS, **asked), dense.generate(IDS, **asked))
    with pytest.raises(RecipeError, match="cannot be saved"):
        model.save_pretrained(checkpoint.path / "out")


@pytest.fixture
def made(cli: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Checkpoints by what was done to them: of eight bits, with gates, pruned or not."""

    def make(what: str) -> Path:
        path = tiny("llama")
        steps: dict[str, tuple[Any, ...]] = {
            "pruned": ("prune", "--method", "magnitude", "--sparsity", 0.5),
            "int8": ("convert", "--to", "llmsqueeze", "--encode", "int8"),
            "gated": ("sparsify", "--sparsity", 0.5, "--allocation", "uniform", "--samples", 2,
                      "--seqlen", 16, "--calib", tmp_path / "text.txt"),
            "chess": ("sparsify", "--method", "chess", "--sparsity", 0.5, "--allocation", "uniform",
                      "--samples", 2, "--seqlen", 16, "--calib", tmp_path / "text.txt"),
        }  # fmt: skip
        (tmp_path / "text.txt").write_text(
            "the cat sat on the mat and the dog ran to the sea. " * 9
        )
        for step in what.split("+"):
            command, *options = steps[step]
            out = tmp_path / f"{what}-{step}"
            result = cli(command, path, "-o", out, *options, "-q")
            assert result.exit_code == 0, result.stderr
            path = out
        return path

    return make


@pytest.mark.parametrize(
    "what, format",
    [
        ("int8", "int8"),
        ("gated", "gated"),
        ("pruned+gated", "gated bitmask"),
        ("int8+gated", "gated int8"),
        ("pruned+chess", "gated bitmask"),
    ],
)
def test_eight_bits_and_gates_without_a_dense_model(
    made: Callable[..., Path], what: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(made(what))
    # Made dense, codes times their scale would be rounded to 16 bits, which moves inputs over thresholds.
    copied = load(checkpoint, torch.float32, CPU)
    use_kernels(copied)
    together: list[int] = []
    read = Checkpoint.read

    def reading(self: Checkpoint, names: Any) -> Any:
        found = read(self, names)
        together.append(len(found))
        return found

    monkeypatch.setattr(Checkpoint, "read", reading)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("dense")
    )
    model = load(checkpoint, torch.float32, CPU, kernels=True)
    assert set(together) == {1}
    assert format in formats_of(model)
    for ids in (IDS, IDS[:1, :1], torch.arange(30)[None]):
        assert off(logits(model, ids), logits(copied, ids).double()) < 1e-5
    assert operator_error(model, IDS[0])[0] < 1e-2
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_copied(pruned: Callable[..., Path], tied: bool) -> None:
    path = pruned(tie_word_embeddings=tied)
    model = load(Checkpoint(path), torch.float32, CPU, kernels=True)
    held = [
        buffer
        for module in model.modules()
        if isinstance(module, (BitmaskLinear, DenseLinear, StoredEmbedding))
        for buffer in module.buffers()
    ]
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split()
        if file == str(path / "model.safetensors"):
            spans.append(range(*(int(end, 16) for end in span.split("-"))))
    assert spans and held
    assert all(any(buffer.data_ptr() in span for span in spans) for buffer in held)
    # Through one mapping: the system counts what it maps near by for each of them.
    packed = [b for m in model.modules() if isinstance(m, BitmaskLinear) for b in m.buffers()]
    assert any(all(buffer.data_ptr() in span for buffer in packed) for span in spans)
    head = model.get_output_embeddings().weight
    assert (head.data_ptr() == model.get_input_embeddings().weight.data_ptr()) == tied


def test_what_is_not_pruned_is_loaded_as_before(
    tiny: Callable[..., Path], pruned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mapped.load(Checkpoint(tiny()), torch.float32) is None
    path = pruned()
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert mapped.load(Checkpoint(path), torch.float32) is None


def damage(path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Contents that the headers, all that is checked at every load, do not show."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = next(n for n in tensors if n.endswith(f"weight_{part}"))
    if part == "row_offsets":
        tensors[name][1:] += 2**30
    else:
        tensors[name][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr(
        artifact, "hash_header", lambda f: artifact.Manifest.from_json(
            (path / "llmsqueeze.json").read_text()).shards[f.name].header_sha256
    )  # fmt: skip


@pytest.mark.parametrize("part", ["row_offsets", "mask"])
def test_damaged_weights_are_refused(
    pruned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Before a kernel would read where they point."""
    path = pruned()
    damage(path, monkeypatch, part)
    with pytest.raises(CheckpointError, match="damaged bitmask"):
        load(Checkpoint(path), torch.float32, CPU, kernels=True)


def test_parts_that_do_not_belong_together() -> None:
    weight = torch.randn(6, 19) * (torch.rand(6, 19) < 0.5)
    values, mask, row_offsets = pack_bitmask(weight)
    check_bitmask(values, mask, row_offsets, 19)
    stray, swapped = mask.clone(), row_offsets.clone()
    stray[2, 2] |= 128
    swapped[2] += 1
    for parts, columns, message in (
        ((values, mask, row_offsets), 30, "does not fit 30"),
        ((values, mask, row_offsets[1:]), 19, "row offsets"),
        ((values, stray, row_offsets), 19, "beyond the last column"),
        ((values, mask, swapped), 19, "disagree"),
        ((values[1:], mask, row_offsets), 19, "set bits"),
    ):
        with pytest.raises(ValueError, match=message):
            check_bitmask(*parts, columns)
