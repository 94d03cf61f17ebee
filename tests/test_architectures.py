"""Every supported family: the walk is the model, statistics are its hooks, saving changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmsqueeze import compress
from llmsqueeze.architectures import FAMILIES
from llmsqueeze.calibrate import walk
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError
from llmsqueeze.methods import weight_method
from llmsqueeze.methods.base import Target
from llmsqueeze.recipe import PruneRecipe
from tests.conftest import MIXTURES, TINY, load_dense

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
BOTH = frozenset({"sq_sum", "gram"})

# Linears fed by the same tensor, by the last parts of their names.
GROUPS: dict[str, list[set[str]]] = {
    **{
        family: [
            {"q_proj", "k_proj", "v_proj"},
            {"o_proj"},
            {"gate_proj", "up_proj"},
            {"down_proj"},
        ]
        for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
    },
    "phi3": [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
    "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    "gpt_neox": [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}],
}
# Mixtures of experts have tests of their own: not every token enters their linears.
families = pytest.mark.parametrize("family", sorted(TINY))


def tokens(samples: int = 5, seqlen: int = 16) -> Tensor:
    return torch.randint(3, 160, (samples, seqlen), generator=torch.Generator().manual_seed(3))


def reference(path: Path) -> Any:
    return load_dense(path, dtype=torch.float32).eval()


@torch.no_grad()
def block_inputs(model: Any, path: str, ids: Tensor) -> list[Tensor]:
    """What enters every block in the model's own forward."""
    seen: list[Tensor] = []
    blocks = model.get_submodule(path)
    handles = [
        b.register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for b in blocks
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_every_family_is_covered() -> None:
    assert set(TINY) | set(MIXTURES) == set(FAMILIES)
    assert set(TINY) == set(GROUPS)


@families
@pytest.mark.parametrize("order", ["group", "block"])
@pytest.mark.parametrize("batch", [1, 4])
def test_walk_reproduces_the_forward_and_hooks(
    tiny: Tiny, family: str, order: str, batch: int
) -> None:
    """Uncompressed, every statistic of the walk equals a hook on transformers' own forward."""
    path = tiny(family)
    ids = tokens()
    model = reference(path)
    sums: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def gather(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = x.square().sum(0)
            grams[name] = x.t() @ x

        return gather

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(ids, use_cache=False)

    checkpoint = Checkpoint(path)
    seen: list[str] = []
    for step in walk(checkpoint, ids, BOTH, torch.float32, CPU, batch, order):
        groups: dict[int, set[str]] = {}
        alive = []  # a freed object's id may be given out again
        for site in step.sites:
            assert site.stats is not None
            assert site.stats.count == ids.numel()
            assert torch.allclose(site.stats.sq_sum, sums[site.name], rtol=1e-4, atol=1e-6), (
                site.name
            )
            scale = grams[site.name].abs().max()
            assert (site.stats.gram - grams[site.name]).abs().max() < 1e-4 * scale, site.name
            alive.append(site.stats)
            groups.setdefault(id(site.stats), set()).add(site.name.rpartition(".")[2])
            seen.append(site.name)
        assert list(groups.values()) == GROUPS[family]
    assert sorted(seen) == sorted(n for n in sums if n.startswith(checkpoint.blocks_path))


@families
@pytest.mark.parametrize("order", ["group", "block"])
def test_what_nobody_asks_for_is_not_measured(tiny: Tiny, family: str, order: str) -> None:
    """And what is asked for is measured as if all had been; of the second block nothing is."""
    checkpoint, ids = Checkpoint(tiny(family)), tokens()
    every = [name for i in range(checkpoint.block_count) for name in checkpoint.linears(i)]
    asked = set(every[::3]) - set(checkpoint.linears(1))
    assert asked
    found: list[dict[str, Tensor]] = []
    for sites in (None, asked):
        grams: dict[str, Tensor] = {}
        for step in walk(
            checkpoint,
            ids,
            BOTH | {"product"},
            torch.float32,
            CPU,
            2,
            order,
            sites=sites,
            dense_share=0.5,
        ):
            for group in step.groups:
                assert sites is None or {site.name for site in group} & asked
                for site in group:
                    assert site.stats is not None
                    if site.name in asked:
                        grams[site.name] = torch.cat((site.stats.gram, site.stats.cross))
                        step.replace(site, site.weight * 0.5)
        found.append(grams)
    assert found[0].keys() == found[1].keys() == asked
    for name, gram in found[0].items():
        assert torch.equal(gram, found[1][name]), name


@families
def test_compressed_prefix_feeds_the_next_block(tiny: Tiny, family: str) -> None:
    """With real pruning, the inputs of the last block equal those of the really pruned model."""
    path, ids = tiny(family), tokens()
    method, config = weight_method("wanda"), weight_method("wanda").Config()
    for order in ("group", "block"):
        model = reference(path)
        checkpoint = Checkpoint(path)
        last = checkpoint.block_count - 1
        for step in walk(checkpoint, ids, BOTH, torch.float32, CPU, 2, order):
            for site in step.sites:
                if step.index == last and site.name.endswith(
                    ("q_proj", "qkv_proj", "query_key_value")
                ):
                    prefix = block_inputs(model, checkpoint.blocks_path, ids)[last]
                    entering = linear_input(model, site.name, ids)
                    assert prefix.shape[0] == ids.shape[0]
                    expected = entering.reshape(-1, entering.shape[-1]).double().square().sum(0)
                    assert torch.allclose(site.stats.sq_sum, expected, rtol=1e-3, atol=1e-5)
                pruned = method.prune(site.weight, site.stats, Target(0.5), config)
                step.replace(site, pruned.weight)
                model.get_submodule(site.name).weight.data.copy_(pruned.weight)


@families
@pytest.mark.parametrize("order", ["group", "block"])
def test_dense_model_is_followed_beside_the_pruned_one(tiny: Tiny, family: str, order: str) -> None:
    """Cross products, drift and held-out sums of the last block, against hooks on two whole models."""
    path, ids = tiny(family), tokens()
    method, config = weight_method("wanda"), weight_method("wanda").Config()
    needs = frozenset({"sq_sum", "gram", "product"})
    dense, pruned = reference(path), reference(path)
    checkpoint = Checkpoint(path)
    last = checkpoint.block_count - 1
    compared = 0
    for step in walk(
        checkpoint, ids, needs, torch.float32, CPU, 2, order, dense_share=0.5, held_out=2
    ):
        prefix = f"{checkpoint.blocks_path}.{step.index}."
        for site in step.sites:
            assert site.stats is not None and site.stats.held_out is not None
            if step.index == last:
                inside = site.name.removeprefix(prefix)
                x, dense_x = (flat(linear_input(m, site.name, ids)) for m in (pruned, dense))
                close(site.stats.gram, x.t() @ x)
                close(site.stats.cross, dense_x.t() @ x)
                held_out = x[3 * ids.shape[1] :]
                close(site.stats.held_out.gram, held_out.t() @ held_out)
                assert site.stats.held_out.count == 2 * ids.shape[1]
                if inside in checkpoint.residuals:
                    at = prefix + checkpoint.residuals[inside]
                    drift = linear_input(dense, at, ids) - linear_input(pruned, at, ids)
                    close(site.stats.drift, flat(drift).t() @ x)
                    compared += 1
                else:
                    assert site.stats.drift is None
            out = method.prune(site.weight, site.stats, Target(0.5), config)
            step.replace(site, out.weight)
            if order == "group" or step.index < last:
                pruned.get_submodule(site.name).weight.data.copy_(out.weight)
    assert compared == len(checkpoint.residuals)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).double()


def close(mine: Tensor | None, expected: Tensor) -> None:
    assert mine is not None
    assert (mine - expected).abs().max() < 2e-4 * expected.abs().max() + 1e-7


@families
def test_residual_writers_add_to_the_tensor_they_are_said_to(tiny: Tiny, family: str) -> None:
    """Whatever such a linear puts out appears, unchanged, on top of the residual stream."""
    checkpoint = Checkpoint(tiny(family))
    for writer, module in checkpoint.residuals.items():
        model = reference(tiny(family))
        residual, written, out = with_noise_written(
            model, model.get_submodule(f"{checkpoint.blocks_path}.1"), writer, module
        )
        assert torch.allclose(out.flatten(), (residual + written).flatten(), atol=1e-5), writer


@torch.no_grad()
def with_noise_written(
    model: Any, block: nn.Module, writer: str, module: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What enters `module`, the noise that `writer` puts out (others: nothing), and the block's output."""
    for name, linear in block.named_modules():
        if isinstance(linear, nn.Linear) and name != writer:
            for parameter in linear.parameters():
                parameter.zero_()
    seen: dict[str, Tensor] = {}

    def write(linear: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen["written"] = torch.randn_like(out)
        return seen["written"]

    def leave(block: nn.Module, args: Any, out: Any) -> None:
        seen["out"] = out[0] if isinstance(out, tuple) else out

    block.get_submodule(module).register_forward_pre_hook(
        lambda m, args: seen.update(residual=args[0])
    )
    block.get_submodule(writer).register_forward_hook(write)
    block.register_forward_hook(leave)
    model(tokens(samples=2), use_cache=False)
    return seen["residual"], seen["written"].reshape(seen["residual"].shape), seen["out"]


@torch.no_grad()
def linear_input(model: Any, name: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


@families
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_sparsity_zero_changes_no_logit(
    tiny: Tiny, family: str, method: str, tmp_path: Path, text_file: Path
) -> None:
    path, out = tiny(family), tmp_path / "out"
    prune(path, out, method, 0.0, text_file)
    with torch.no_grad():
        a = AutoModelForCausalLM.from_pretrained(path)(tokens()).logits
        b = load_dense(out)(tokens()).logits
    assert torch.equal(a, b)


@families
def test_loaded_model_is_exactly_the_masked_one(
    tiny: Tiny, family: str, tmp_path: Path, text_file: Path
) -> None:
    path, out = tiny(family), tmp_path / "out"
    report = prune(path, out, "wanda", 0.5, text_file)
    dense = AutoModelForCausalLM.from_pretrained(path)
    pruned = load_dense(out)
    assert pruned.dtype == torch.bfloat16
    parameters = dict(pruned.named_parameters())
    assert set(parameters) == set(dict(dense.named_parameters()))
    for name, original in dense.named_parameters():
        site = report.manifest.sites.get(name.removesuffix(".weight"))
        mine = parameters[name]
        if site is None:
            assert torch.equal(mine, original), name
        else:
            gone = mine == 0
            assert torch.equal(mine[~gone], original[~gone]), name
            assert (gone.sum(dim=1) == original.shape[1] // 2).all(), name
    tied = dense.config.tie_word_embeddings
    head, embedding = pruned.get_output_embeddings(), pruned.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


def prune(path: Path, out: Path, method: str, sparsity: float, text: Path) -> compress.Report:
    from llmsqueeze.recipe import Calibration

    recipe = PruneRecipe(
        method, Target(sparsity), weight_method(method).Config(),
        calibration=Calibration(str(text), samples=3, seqlen=20),
    )  # fmt: skip
    return compress.prune(Checkpoint(path), "tiny", out, recipe, CPU)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "olmoe", "num_experts": 64}, "mixture-of-experts.*supported: mixtral"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 128}, "mixture-of-experts"),
        ({"model_type": "llama", "num_local_experts": 8}, "mixture-of-experts"),
        ({"model_type": "mamba"}, "unknown architecture 'mamba'"),
        ({"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}, "remote code"),
        ({}, "unknown architecture None"),
    ],
)
def test_other_architectures_are_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(tmp_path)
