"""Mixtures of experts, pruned expert by expert from the tokens that are routed there.

The oracle is a plain loop over tokens and experts in fp64, fed by hooks on transformers' own modules.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmsqueeze import compress
from llmsqueeze.architectures import FAMILIES, Mixture
from llmsqueeze.calibrate import walk
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError, RecipeError, Stopped
from llmsqueeze.expert_note import few_tokens
from llmsqueeze.methods import weight_method
from llmsqueeze.methods.base import Target
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.runtime import load
from llmsqueeze.site import LEAST_TOKENS, prune_site
from llmsqueeze.work import Work
from tests.conftest import load_dense, save_tokenizer, tiny_model
from tests.methods.test_refit import admm_by_loop
from tests.methods.test_weight_methods import sparsegpt_by_loop

Tiny = Callable[..., Path]
Cli = Callable[..., Any]
CPU = torch.device("cpu")
MIXTURES = {name: family.mixture for name, family in FAMILIES.items() if family.mixture}
both = pytest.mark.parametrize("family", sorted(MIXTURES))
orders = pytest.mark.parametrize("order", ["group", "block"])
# Two blocks, and more tokens an expert than inputs.
SMALL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 2, "intermediate_size": 24, "num_local_experts": 4},
    "qwen3_moe": {"num_hidden_layers": 2, "num_experts": 4, "mlp_only_layers": [0]},
}


def ids_of(samples: int = 6, seqlen: int = 24) -> Tensor:
    return torch.randint(3, 160, (samples, seqlen), generator=torch.Generator().manual_seed(3))


def mixture_of(family: str) -> Mixture:
    mixture = MIXTURES[family]
    assert mixture is not None
    return mixture


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of `tiny`, its experts as 3-D tensors."""

    def make(family: str) -> Path:
        path = tmp_path_factory.mktemp(family) / "fused"
        model = tiny_model(family).to(torch.bfloat16)
        model.save_pretrained(path, save_original_format=False)
        save_tokenizer(path)
        return path

    return make


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint whose last experts get no token: of opposite logits one is above their 0, always."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "idle"
            model = tiny_model(family)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if name.endswith(".mlp.gate.weight"):
                        weight[1], weight[3], weight[4:] = -weight[0], -weight[2], 0
            model.save_pretrained(made[family])
            save_tokenizer(made[family])
        return made[family]

    return make


def reference(path: Path) -> Any:
    return load_dense(path, dtype=torch.float32).eval()


def names_in(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_weights(one: Any, other: Any) -> bool:
    mine, theirs = weights_of(one), weights_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# --- the oracle ------------------------------------------------------------------------------------


class Oracle:
    """What enters every linear of a transformers model, by a loop over tokens and experts, in fp64."""

    def __init__(self, model: Any, mixture: Mixture, ids: Tensor) -> None:
        self.model, self.mixture, self.ids = model, mixture, ids

    @torch.no_grad()
    def inputs(self, site: str) -> tuple[Tensor, list[int]]:
        """[tokens, in] fp64, and which token of the calibration set each is, in ascending order."""
        path, _, leaf = site.rpartition(".")
        module, _, number = path.rpartition(".")
        if not module.endswith(self.mixture.module):
            seen = self._seen(site)[0].flatten(0, 1).double()
            return seen, list(range(len(seen)))
        hidden, index, _ = self._seen(module)
        experts, expert = self.model.get_submodule(module), int(number)
        gate, up = experts.gate_up_proj[expert].double().chunk(2)
        found, at = [], []
        for token in range(len(hidden)):
            if expert not in index[token].tolist():
                continue
            x = hidden[token].double()
            if leaf == self.mixture.down:
                x = nn.functional.silu(gate @ x) * (up @ x)
            found.append(x)
            at.append(token)
        width = experts.down_proj.shape[2 if leaf == self.mixture.down else 1]
        return torch.stack(found) if found else torch.zeros(0, width, dtype=torch.float64), at

    def put(self, site: str, weight: Tensor) -> None:
        """Set the weight of a linear, or the part of a 3-D parameter that it is."""
        path, _, leaf = site.rpartition(".")
        module, _, number = path.rpartition(".")
        if not module.endswith(self.mixture.module):
            self.model.get_submodule(site).weight.data.copy_(weight)
            return
        experts, expert = self.model.get_submodule(module), int(number)
        if leaf == self.mixture.down:
            experts.down_proj.data[expert] = weight
        else:
            half = experts.gate_up_proj.shape[1] // 2
            begin = half if leaf == self.mixture.up else 0
            experts.gate_up_proj.data[expert, begin : begin + half] = weight

    def _seen(self, module: str) -> tuple[Any, ...]:
        seen: list[tuple[Any, ...]] = []
        handle = self.model.get_submodule(module).register_forward_pre_hook(
            lambda m, args: seen.append(args)
        )
        self.model(self.ids, use_cache=False)
        handle.remove()
        return seen[0]


def expert_sites(checkpoint: Checkpoint) -> list[str]:
    return [name.removesuffix(".weight") for name in checkpoint.routed_shares]


def close(mine: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    assert (mine - expected).abs().max() <= tolerance * expected.abs().max() + 1e-9


# --- statistics ------------------------------------------------------------------------------------


@both
@orders
@pytest.mark.parametrize("batch", [1, 4])
def test_statistics_are_of_the_tokens_routed_to_an_expert(
    tiny: Tiny, family: str, order: str, batch: int
) -> None:
    """Uncompressed: counts, sums and Gram matrices of every site, those of samples too."""
    path, ids = tiny(family, "float32", **SMALL[family]), ids_of()
    checkpoint = Checkpoint(path)
    oracle = Oracle(reference(path), mixture_of(family), ids)
    needs = frozenset({"sum", "sq_sum", "gram", "probe"})
    routed = set()
    for step in walk(checkpoint, ids, needs, torch.float32, CPU, batch, order, held_out=2):
        for site in step.sites:
            x, at = oracle.inputs(site.name)
            stats = site.stats
            assert stats is not None and stats.held_out is not None
            assert stats.count == len(x) and stats.samples == len(ids)
            close(stats.sq_sum, x.square().sum(0))
            close(stats.gram.double(), x.t() @ x)
            close(stats.sum, x.sum(0), 2e-3)  # terms of both signs
            sample = torch.tensor(at) // ids.shape[1]
            sums = torch.stack([x[sample == s].sum(0) for s in range(len(ids))])
            close(stats.sample_sq, sums.square().sum(0), 2e-3)
            last = x[sample >= len(ids) - 2]
            assert stats.held_out.count == len(last)
            close(stats.held_out.gram.double(), last.t() @ last)
            probe = stats.probe().double()
            assert bool(len(probe)) == bool(len(last))
            assert not len(last) or torch.cdist(probe, last).amin(dim=1).max() < 1e-3
            if site.routed:
                routed.add(site.name)
    assert routed == set(expert_sites(checkpoint))


@both
@orders
def test_dense_model_is_followed_where_it_routes_alike(tiny: Tiny, family: str, order: str) -> None:
    """Cross products of the last block: tokens that the dense model sends elsewhere stand for themselves."""
    path, ids = tiny(family, "float32", **SMALL[family]), ids_of()
    mixture = mixture_of(family)
    dense, pruned = (Oracle(reference(path), mixture, ids) for _ in range(2))
    method, config = weight_method("wanda"), weight_method("wanda").Config()
    needs = frozenset({"sq_sum", "gram", "product"})
    elsewhere = compared = 0
    for step in walk(Checkpoint(path), ids, needs, torch.float32, CPU, 2, order, dense_share=0.5):
        for site in step.sites:
            assert site.stats is not None
            if site.routed and step.index == 1:
                (x, at), (dense_x, dense_at) = pruned.inputs(site.name), dense.inputs(site.name)
                place = {token: row for row, token in enumerate(dense_at)}
                rows = [dense_x[place[t]] if t in place else x[r] for r, t in enumerate(at)]
                elsewhere += sum(t not in place for t in at)
                compared += 1
                close(site.stats.cross.double(), torch.stack(rows).t() @ x)
                assert site.stats.drift is None
            if site.stats.count:
                weight = method.prune(site.weight, site.stats, Target(0.7), config).weight
                step.replace(site, weight)
                if order == "group" or step.index == 0:
                    pruned.put(site.name, weight)
    assert compared and elsewhere


# --- pruning, by textbook formulas ------------------------------------------------------------------


def recipe_of(method: str, target: Target, **rest: Any) -> PruneRecipe:
    return PruneRecipe(method, target, weight_method(method).Config(), **rest)


def agree(
    mine: Tensor, score: Tensor, target: Target, *, rows: bool, rounding: float = 0.0
) -> None:
    """The mask removes the lowest scores, where there is more than rounding between these and the others."""
    score = score.double()
    groups, gone = (
        (score, mine == 0) if rows else (score.reshape(1, -1), (mine == 0).reshape(1, -1))
    )
    count = target.removed_of(groups.shape[1])
    if target.pattern is not None:
        groups, gone = (
            t.unflatten(1, (-1, target.pattern.m)).flatten(0, 1) for t in (groups, gone)
        )
        count = target.pattern.m - target.pattern.n
    ordered = groups.sort(dim=1).values
    below, above = ordered[:, count - 1 : count], ordered[:, count : count + 1]
    clear = (below < above * (1 - rounding)).squeeze(1)
    assert (gone.sum(dim=1) == count).all()
    assert torch.equal(gone[clear], (groups <= below)[clear])
    assert clear.float().mean() > 0.9


def textbook(
    method: str, weight: Tensor, x: Tensor, target: Target
) -> tuple[Tensor | None, Tensor | None]:
    """A score whose lowest go, or the weights that are left."""
    if method == "magnitude":
        return weight.abs(), None
    if method == "wanda":
        return weight.double().abs() * x.square().sum(0).sqrt(), None
    if method == "sparsegpt":
        return None, sparsegpt_by_loop(weight, x, target, 128, 0.01)
    return None, admm_by_loop(weight, x, target.sparsity, 20, 15)


@both
@pytest.mark.parametrize(
    ("method", "pattern", "order"),
    [
        ("magnitude", "unstructured", "group"),
        ("wanda", "unstructured", "group"),
        ("wanda", "2:4", "block"),
        ("sparsegpt", "unstructured", "group"),
        ("admm", "unstructured", "block"),
    ],
)
def test_every_expert_is_pruned_by_its_own_tokens(
    tiny: Tiny, family: str, method: str, pattern: str, order: str
) -> None:
    """Site after site: the oracle looks at transformers' model as it is pruned by then."""
    path, ids = tiny(family, "float32", **SMALL[family]), ids_of()
    target = Target.parse(None, pattern)
    recipe = recipe_of(method, target, dense_share=0.0)
    oracle = Oracle(reference(path), mixture_of(family), ids)
    checked = 0
    waiting: list[tuple[str, Tensor]] = []
    for step in walk(Checkpoint(path), ids, recipe.needs | {"probe"}, torch.float32, CPU, 4, order):
        for (
            name,
            weight,
        ) in waiting:  # order "block": statistics are of the block before it is pruned
            oracle.put(name, weight)
        waiting = []
        for site in step.sites:
            pruned = prune_site(site, target, recipe)
            if site.routed and (step.index == 1 or method in ("magnitude", "wanda")):
                x, _ = oracle.inputs(site.name)
                assert pruned.report["routed_tokens"] == len(x)
                by = expected_method(recipe, len(x), site.weight.shape[1])
                instead = {m for m in ("wanda", "magnitude") if f"by_{m}" in pruned.report}
                few = by != method or len(x) < LEAST_TOKENS
                assert instead == ({by} if few else set())
                score, left = textbook(by, site.weight, x, target)
                if score is not None:
                    whole = by == "magnitude" and pattern == "unstructured"
                    rounding = 1e-4 if by == "wanda" else 0.0
                    agree(pruned.weight, score, target, rows=not whole, rounding=rounding)
                    kept = pruned.weight != 0
                    assert torch.equal(pruned.weight[kept], site.weight[kept])
                else:
                    assert left is not None
                    assert torch.equal(pruned.weight == 0, left == 0)
                    close(pruned.weight.double(), left, 5e-3)
                checked += by == method
            step.replace(site, pruned.weight)
            waiting.append((site.name, pruned.weight))
            if order == "group":
                oracle.put(*waiting.pop())
    assert checked >= 6


def expected_method(recipe: PruneRecipe, tokens: int, inputs: int) -> str:
    if tokens < LEAST_TOKENS:
        return "magnitude"
    return (
        "wanda"
        if "gram" in recipe.needs and tokens < recipe.expert_tokens * inputs
        else recipe.method
    )


@both
def test_an_expert_without_tokens(
    idle: Callable[[str], Path], family: str, tmp_path: Path, text_file: Path
) -> None:
    """By magnitude, whatever the recipe says, and the manifest and what people read say so."""
    path, mixture = idle(family), mixture_of(family)
    made = prune(path, tmp_path / "out", text_file, expert_tokens=0.0).manifest
    routed = {n: r.report for n, r in made.sites.items() if "routed_tokens" in r.report}
    without = [name for name, report in routed.items() if report["routed_tokens"] == 0]
    experts = 1 + max(int(n.split(".")[-2]) for n in made.sites if mixture.module in n)
    assert {int(name.split(".")[-2]) for name in without} >= set(range(4, experts))
    checkpoint, source = Checkpoint(tmp_path / "out"), Checkpoint(path)
    for site in without:
        before, after = (c.read([f"{site}.weight"])[f"{site}.weight"] for c in (source, checkpoint))
        agree(after, before.abs(), Target(0.5), rows=False)
        assert "by_magnitude" in routed[site] and "relative_error" not in routed[site]
    few = sum("by_magnitude" in report for report in routed.values())
    said = few_tokens(made.sites)
    assert said is not None and said.startswith(f"{few} of {len(routed)} ")
    assert f"{few} by magnitude; least: " in said and said.endswith(", 0")
    assert torch.isfinite(load(checkpoint, torch.float32, CPU)(ids_of()).logits).all()


@both
def test_experts_with_too_few_tokens_to_be_fitted(
    tiny: Tiny, family: str, tmp_path: Path, text_file: Path
) -> None:
    """By wanda, below as many tokens as the recipe says; held-out ones do not count."""
    path = tiny(family, "float32", **SMALL[family])
    found = set()
    for factor in (0.0, 8.0):
        out = tmp_path / str(factor)
        report = prune(path, out, text_file, 9, expert_tokens=factor)
        sites = report.manifest.sites
        routed = {n: r for n, r in sites.items() if "routed_tokens" in r.report}
        assert set(routed) == set(expert_sites(Checkpoint(path)))
        for record in routed.values():
            by = {name for name in ("wanda", "magnitude") if f"by_{name}" in record.report}
            assert len(by) == ("refit_steps" not in record.report)
            tokens, inputs = record.report["routed_tokens"], record.shape[1]
            assert (by == {"magnitude"}) == (tokens < LEAST_TOKENS)
            if tokens < factor * inputs:
                assert by
            if factor == 0 and tokens >= LEAST_TOKENS:
                assert not by
            found |= by
    assert "wanda" in found
    assert few_tokens(prune(path, tmp_path / "none", text_file, method="magnitude", config=None,
                            refit="none", refit_config=None).manifest.sites) is None  # fmt: skip
    with pytest.raises(RecipeError, match="expert-tokens"):
        recipe_of("wanda", Target(0.5), expert_tokens=-1.0)


def prune(path: Path, out: Path, text: Path, samples: int = 1, **changes: Any) -> compress.Report:
    """By the default method; of several samples one is held out."""
    calibration = {"text": str(text), "samples": samples, "seqlen": 60}
    recipe = PruneRecipe.from_dict({"calibration": calibration})
    return compress.prune(
        Checkpoint(path), "tiny", out, dataclasses.replace(recipe, **changes), CPU
    )


# --- files -----------------------------------------------------------------------------------------


@both
def test_unpruned_it_is_the_same_bit_for_bit(
    tiny: Tiny, fused: Callable[[str], Path], family: str, tmp_path: Path, cli: Cli
) -> None:
    """From tensors of single experts and from fused ones; names on disk are the family's own."""
    path = tiny(family)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert not any(len(shape) == 3
                   for name, shape in names_in(path).items())  # fmt: skip
    for source in (path, fused(family)):
        ours, dense = tmp_path / "ours", tmp_path / "dense"
        assert (
            cli("convert", source, "-o", ours, "--to", "llmsqueeze", "--overwrite", "-q").exit_code
            == 0
        )
        assert (
            cli("convert", ours, "-o", dense, "--to", "dense", "--overwrite", "-q").exit_code == 0
        )
        assert names_in(dense) == names_in(path)
        for found in (source, ours, dense):
            assert same_weights(load_dense(found), model), found


@both
def test_pruned_it_loads_everywhere(
    tiny: Tiny, fused: Callable[[str], Path], family: str, tmp_path: Path, cli: Cli,
    prune_args: list[object], text_file: Path,
) -> None:  # fmt: skip
    """transformers, our loader and the dense form have the same weights, and are as good by `eval`."""
    path, out, dense = tiny(family), tmp_path / "out", tmp_path / "dense"
    done = cli("prune", path, "-o", out, *prune_args, "--json", "--ignore", "re:experts.0.")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert cli("convert", out, "-o", dense, "--to", "dense", "-q").exit_code == 0
    # Masks and values lie under the names that the dense weights have, ignored ones as they are.
    owners = {name.partition("_values")[0].partition("_mask")[0].partition("_row_offsets")[0]
              for name in names_in(out)}  # fmt: skip
    assert owners == set(names_in(path)) == set(names_in(dense))
    mine, plain = (load_dense(p) for p in (out, dense))
    assert same_weights(mine, plain)
    ours = load(Checkpoint(out), torch.float32, CPU, kernels=True)(ids_of()).logits
    close(ours, plain.float()(ids_of()).logits, 1e-4)
    for name, tensor in weights_of(mine).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            assert (tensor[0] != 0).all() and (tensor[1:] == 0).float().mean() == pytest.approx(
                0.5, abs=0.02
            )
        if name.endswith("mlp.gate.weight"):
            assert torch.equal(tensor, weights_of(AutoModelForCausalLM.from_pretrained(path))[name])
    mine.save_pretrained(tmp_path / "saved")
    assert names_in(tmp_path / "saved") == names_in(path)
    figures = []
    for checkpoint in (out, dense):
        measured = cli("eval", checkpoint, "--text", text_file, "--seqlen", 32, "--windows", 4,
                       "--device", "cpu", "--dtype", "float32", "--json")  # fmt: skip
        assert measured.exit_code == 0, measured.stderr
        figures.append(json.loads(measured.stdout)["token_ppl"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    other = tmp_path / "from fused"
    assert (
        cli("prune", fused(family), "-o", other, *prune_args, "--ignore", "re:experts.0.").exit_code
        == 0
    )
    assert digests(other)["model.safetensors"] == digests(out)["model.safetensors"]


@pytest.mark.parametrize("wrong", ["missing", "shape", "both"])
def test_experts_that_do_not_fit_are_refused(
    tiny: Tiny, fused: Callable[[str], Path], wrong: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    path = fused("qwen3_moe")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = tensors.pop(name)
    says = "experts.0.gate_proj.weight is missing"
    if wrong == "shape":
        tensors[name], says = whole[:-1].contiguous(), "needs 6 experts"
    if wrong == "both":
        tensors[name], says = whole, "are the same"
        tensors["model.layers.0.mlp.experts.3.up_proj.weight"] = whole[3, 28:].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(path)


@both
def test_stopped_it_goes_on_to_the_same_bytes(
    tiny: Tiny, family: str, tmp_path: Path, text_file: Path
) -> None:
    recipe = PruneRecipe.from_dict(
        {"calibration": {"text": str(text_file), "samples": 4, "seqlen": 24}}
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress.prune(Checkpoint(tiny(family)), "tiny", whole, recipe, CPU)
    with pytest.raises(Stopped, match="after block 1 of 3"):
        compress.prune(
            Checkpoint(tiny(family)), "tiny", out, recipe, CPU,
            work=Work(out, CPU, policy="auto", stop=lambda: True),
        )  # fmt: skip
    work = Work(out, CPU, policy="required")
    report = compress.prune(Checkpoint(tiny(family)), "tiny", out, recipe, CPU, work=work)
    assert report.resumed == 1
    assert digests(out) == digests(whole)


# --- the other commands ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune(tiny("mixtral"), out, text_file)
    return out


def test_other_commands_take_it(
    pruned: Path, cli: Cli, tmp_path: Path, text_file: Path, prune_args: list[object]
) -> None:
    quantized = tmp_path / "kv"
    for args in (
        ["run", pruned, "line 4", "--tokens", 3, "--device", "cpu"],
        ["inspect", pruned, "--verify"],
        ["quantize-kv", pruned, "-o", quantized, *prune_args],
        ["run", quantized, "line 4", "--tokens", 3, "--device", "cpu"],
        ["report", pruned, "-o", tmp_path / "report"],
        ["compress", pruned, "-o", tmp_path / "int8", "--set", "encode.to=int8"],
        ["plan", pruned],
    ):
        done = cli(*args)
        assert done.exit_code == 0, (args, done.stderr)
    assert few_tokens(Checkpoint(pruned).manifest.sites) is not None  # type: ignore[union-attr]
    assert "were pruned otherwise" in (tmp_path / "report" / "report.md").read_text()
    model = reference(tmp_path / "int8")
    assert model.model.layers[0].mlp.experts.down_proj.dim() == 3


def test_what_is_not_there_yet_is_refused(
    tiny: Tiny, cli: Cli, tmp_path: Path, prune_args: list[object]
) -> None:
    path = tiny("mixtral")
    steps = ["--set", "prune.target.sparsity=0.5", "--set", "sparsify.sparsity=0.4"]
    for args, says in (
        (["sparsify", path, "-o", tmp_path / "out", *prune_args], "no gates for experts"),
        (["compress", path, "-o", tmp_path / "out", *steps], "no gates for experts"),
        (["prune", path, "-o", tmp_path / "out", *prune_args, "--pattern", "tile", "--tile", 8,
          "--tiles", "tile"], "trains no masks of experts"),
    ):  # fmt: skip
        done = cli(*args)
        assert done.exit_code == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "dsnot"],
        ["--method", "wanda", "--allocation", "owl"],
        ["--pattern", "2:4-out"],
        ["--pattern", "tile", "--tile", 8, "--sparsity", 0.3],
        ["--allocation", "alpha", "--method", "magnitude"],
    ],
)
def test_methods_allocations_and_patterns(
    idle: Callable[[str], Path], cli: Cli, tmp_path: Path, prune_args: list[object],
    options: list[object],
) -> None:  # fmt: skip
    """With experts that nothing is known of among them."""
    done = cli("prune", idle("mixtral"), "-o", tmp_path / "out", *prune_args, *options, "--json")
    assert done.exit_code == 0, done.stderr
    wanted = 0.3 if "tile" in options else 0.5
    assert json.loads(done.stdout)["sparsity"] == pytest.approx(wanted, abs=0.02)
    assert torch.isfinite(reference(tmp_path / "out")(ids_of()).logits).all()


def test_bytes_read_are_those_of_chosen_experts(tiny: Tiny, pruned: Path) -> None:
    """Dense ones: nothing runs experts as they are stored."""
    from llmsqueeze.bench_model import read_bytes
    from llmsqueeze.traffic import bytes_per_token

    source, made = Checkpoint(tiny("mixtral")), Checkpoint(pruned)
    config = AutoConfig.from_pretrained(tiny("mixtral"))
    whole = 3 * config.hidden_size * config.intermediate_size * 2 * config.num_hidden_layers
    experts = sum(source.model.get_parameter(name).numel() * 2 for name in source.routed_shares)
    assert experts == whole * config.num_local_experts
    outside = 2 * sum(
        source.model.get_parameter(name).numel()
        for name in source.sources
        if name not in source.routed_shares and "embed_tokens" not in name
    )
    read = bytes_per_token(source)
    assert read == outside + whole * config.num_experts_per_tok + 2 * config.hidden_size
    assert read == read_bytes(load(source, torch.bfloat16, CPU))
    saved = sum(
        record.bytes_before - record.bytes_after
        for name, record in made.manifest.sites.items()  # type: ignore[union-attr]
        if f"{name}.weight" not in source.routed_shares
    )
    assert bytes_per_token(made) == read - saved
