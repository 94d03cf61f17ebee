"""`sparsify` end to end on tiny checkpoints: what is written, loaded, measured and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from llmsqueeze.activation import thresholds
from llmsqueeze.artifact import MANIFEST_NAME
from llmsqueeze.blocks import find_groups, load_blocks
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError
from llmsqueeze.gate_calibration import calibrate_block, choose_gates
from llmsqueeze.parts import Split, cut_parts
from llmsqueeze.policy import Policy
from llmsqueeze.ranks import ALONE
from llmsqueeze.rotation import rotate
from llmsqueeze.runtime import load
from llmsqueeze.runtime.gates import GatedLinear, gating_of
from llmsqueeze.shards import SIDE_NAME
from llmsqueeze.sparsify_recipe import SparsifyRecipe
from llmsqueeze.traffic import bytes_per_token, stored_bytes
from tests.conftest import TINY, load_dense

CPU = torch.device("cpu")
FP32 = torch.float32


@pytest.fixture
def args(text_file: Path) -> list[Any]:
    return ["--calib", text_file, "--samples", 6, "--seqlen", 48, "--device", "cpu", "-q", "--json"]


def made(cli: Any, source: Path, out: Path, *options: Any) -> dict[str, Any]:
    result = cli("sparsify", source, "-o", out, *options)
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


UNIFORM = ("--allocation", "uniform")


@pytest.mark.parametrize("method", ["teal", "wina", "chess", "rsparse"])
def test_thresholds_run_and_drop_what_was_asked(
    cli: Any, tiny: Any, tmp_path: Path, text_file: Path, args: list[Any], method: str
) -> None:
    source, out = tiny(), tmp_path / "out"
    document = made(cli, source, out, "--method", method, "--sparsity", 0.4, *UNIFORM, *args)
    assert document["method"] == method and document["prefill"] == "dense"
    gates = document["gates"]
    expected = 9 if method == "chess" else 12
    assert len(gates) == expected
    assert cli("inspect", out, "--verify").exit_code == 0
    # The weights are those of the source.
    before, after = Checkpoint(source), Checkpoint(out)
    for name in before.sources:
        assert torch.equal(before.read([name])[name], after.read([name])[name])
    # On the text it was calibrated on, every gate drops its share.
    result = cli("eval", out, "--text", text_file, "--seqlen", 48, "--windows", 6, "--device", "cpu",
                 "-q", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)["activation"]
    assert measured["gated"] == "after:4"
    for name, gate in measured["gates"].items():
        assert gate["target"] == pytest.approx(gates[name]["sparsity"])
        if method != "rsparse":
            assert gate["target"] == pytest.approx(0.4)
        assert gate["measured"] == pytest.approx(gate["target"], abs=0.03)
    assert measured["bytes_per_token"] == pytest.approx(
        document["bytes_per_token"]["after"], rel=0.02
    )


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_loads_gated_through_transformers(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any], family: str
) -> None:
    from transformers import AutoModelForCausalLM

    source, out = tiny(family), tmp_path / "out"
    document = made(cli, source, out, "--sparsity", 0.5, *args)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=FP32).eval()
    model = load_dense(out, dtype=FP32).eval()
    gating = gating_of(model)
    assert gating is not None and set(gating.gates) == set(document["gates"])
    ids = torch.randint(3, 150, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)  # prompts are dense
        gating.policy = Policy("all")
        gated = model(ids).logits
        assert not torch.allclose(gated, plain(ids).logits, atol=1e-3)
        # The same by hand: thresholds from the files, applied in hooks on the dense model.
        apply_by_hand(plain, Checkpoint(out))
        assert torch.allclose(plain(ids).logits, gated, atol=1e-5)


def apply_by_hand(model: nn.Module, checkpoint: Checkpoint) -> None:
    tensors, record = checkpoint.read_activation(), checkpoint.activation
    assert record is not None
    for name, gate in record.gates.items():
        scale = tensors[f"{name}.scale"]
        tau = torch.tensor(
            [gate.threshold / float(s) if s > 0 else float("inf") for s in scale], dtype=FP32
        )
        assert torch.allclose(tau, thresholds(gate.threshold, scale), rtol=1e-6)
        for member in gate.members:
            model.get_submodule(member).register_forward_pre_hook(
                lambda m, a, t=tau: (torch.where(a[0].abs() > t, a[0], torch.zeros(())),)
            )


def test_sparsity_zero_is_lossless(cli: Any, tiny: Any, tmp_path: Path, args: list[Any]) -> None:
    source, out = tiny(), tmp_path / "out"
    made(cli, source, out, "--sparsity", 0, *args)
    plain, model = (load(Checkpoint(p), FP32, CPU) for p in (source, out))
    gating = gating_of(model)
    assert gating is not None
    gating.policy = Policy("all")
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_pruned_checkpoint_is_calibrated_as_it_is(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any], prune_args: list[Any]
) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert cli("prune", tiny(), "-o", pruned, "--method", "wanda", *prune_args).exit_code == 0
    document = made(cli, pruned, out, "--method", "wina", "--allocation", "greedy", *args)
    before, after = Checkpoint(pruned), Checkpoint(out)
    assert after.manifest is not None and before.manifest is not None
    assert {n: s.encoding for n, s in after.manifest.sites.items()} == {
        n: s.encoding for n, s in before.manifest.sites.items()
    }
    assert [step["command"] for step in after.manifest.steps] == ["prune", "sparsify"]
    for name in before.sources:
        assert torch.equal(before.read([name])[name], after.read([name])[name])
    # Scales are norms of the pruned columns.
    name = "model.layers.0.mlp.down_proj"
    weight = after.read([f"{name}.weight"])[f"{name}.weight"].float()
    assert torch.allclose(after.read_activation()[f"{name}.scale"], weight.norm(dim=0), rtol=1e-5)
    # Pruning again changes the weights: their thresholds go.
    again = tmp_path / "again"
    assert cli("prune", out, "-o", again, "--method", "wanda", *prune_args).exit_code == 0
    assert Checkpoint(again).activation is None
    assert document["bytes_per_token"]["before"] == bytes_per_token(before)


def test_other_sparsities_come_from_the_stored_curves(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    source, half, less, direct = tiny(), *(tmp_path / n for n in ("half", "less", "direct"))
    options = ["--no-sequential", *UNIFORM, *args]
    made(cli, source, half, "--sparsity", 0.5, *options)
    made(cli, half, less, "--sparsity", 0.3, "--prefill", "tail:0.5", "--json", "-q")
    made(cli, source, direct, "--sparsity", 0.3, *options)
    changed, calibrated = Checkpoint(less).activation, Checkpoint(direct).activation
    assert changed is not None and calibrated is not None
    assert changed.prefill == "tail:0.5"
    for name, gate in calibrated.gates.items():
        assert changed.gates[name].sparsity == 0.3
        assert changed.gates[name].threshold == pytest.approx(gate.threshold, rel=1e-4)
    branched = tmp_path / "branched"
    made(cli, source, branched, "--method", "rsparse", "--rsparse-ratio", 0.5, *args)
    result = cli("sparsify", branched, "-o", tmp_path / "x", "--sparsity", 0.3)
    assert result.exit_code == 2 and "--method" in result.stderr


@pytest.mark.parametrize("after", [0.1, 0.2, 0.5, 0.7])
def test_greedy_shares_keep_their_proportions(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any], after: float
) -> None:
    half, other = tmp_path / "half", tmp_path / "other"
    made(cli, tiny(), half, "--sparsity", 0.5, *args)  # greedy is the default
    made(cli, half, other, "--sparsity", after, "-q", "--json")
    made(cli, other, tmp_path / "back", "--sparsity", after, "-q", "--json")
    records = [Checkpoint(path).activation for path in (half, other, tmp_path / "back")]
    shares = [{n: g.sparsity for n, g in r.gates.items()} for r in records if r is not None]
    assert len(set(shares[0].values())) > 1
    for name, share in shares[0].items():
        scaled = share * after / 0.5 if after <= 0.5 else 1 - (1 - share) * (1 - after) / 0.5
        assert shares[1][name] == pytest.approx(scaled) == shares[2][name]
    for index in range(3):
        assert saved_share(Checkpoint(other), index) == pytest.approx(after, abs=1e-6)


def saved_share(checkpoint: Checkpoint, block: int) -> float:
    """The share of a block's gated bytes that is not read."""
    assert checkpoint.activation is not None
    weights, saved = 0, 0.0
    for name, gate in checkpoint.activation.gates.items():
        if name.startswith(f"model.layers.{block}."):
            size = sum(stored_bytes(checkpoint, f"{m}.weight") for m in gate.members)
            weights, saved = weights + size, saved + size * gate.sparsity
    return saved / weights


def test_greedy_divides_the_blocks_budget(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    out = tmp_path / "out"
    made(cli, tiny(), out, "--method", "teal", "--allocation", "greedy", "--sparsity", 0.5, *args)
    checkpoint = Checkpoint(out)
    assert checkpoint.activation is not None
    for index in range(3):
        assert saved_share(checkpoint, index) == pytest.approx(0.5, abs=1e-6)
    different = {gate.sparsity for gate in checkpoint.activation.gates.values()}
    assert len(different) > 3


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_models_that_are_sparse_already_lose_nothing(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any], activation: str
) -> None:
    source = tiny("llama", hidden_act=activation, mlp_bias=False)
    out = tmp_path / "out"
    document = made(cli, source, out, "--sparsity", 0.3, *UNIFORM, *args)
    downs = {n: g for n, g in document["gates"].items() if n.endswith("down_proj")}
    assert set(document["already_sparse"]) == set(downs)
    for gate in downs.values():
        assert gate["threshold"] == 0 and gate["sparsity"] == gate["zeros"] > 0.3


def test_calibration_matches_hooks_on_the_whole_model(
    tiny: Any, text_file: Path, tmp_path: Path, cli: Any, args: list[Any]
) -> None:
    """Not sequential: the threshold is the quantile of |x|·‖W‖ over what the dense model sees."""
    source, out = tiny(dtype="float32"), tmp_path / "out"
    made(cli, source, out, "--method", "wina", "--no-sequential", *UNIFORM, *args)
    checkpoint = Checkpoint(out)
    record = checkpoint.activation
    assert record is not None
    model = load(Checkpoint(source), FP32, CPU)
    from llmsqueeze.data import calibration_windows, load_tokenizer

    tokens = calibration_windows(
        str(text_file), load_tokenizer(source), samples=6, seqlen=48, seed=0, bos=False
    ).tokens
    seen: dict[str, torch.Tensor] = {}
    for name in record.gates:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, n=name: seen.__setitem__(n, a[0][:, 4:].flatten(0, 1))
        )
    with torch.no_grad():
        model(tokens)
    for name, gate in record.gates.items():
        stacked = torch.cat([model.get_submodule(m).weight for m in gate.members])
        scores = seen[name].abs() * stacked.norm(dim=0)
        assert gate.threshold == pytest.approx(float(scores.flatten().median()), rel=0.01)


def test_sequential_gates_see_what_earlier_gates_leave(tiny: Any) -> None:
    checkpoint = Checkpoint(tiny(dtype="float32"))
    tokens = torch.randint(3, 150, (8, 32), generator=torch.Generator().manual_seed(1))
    split = Split.of(cut_parts(tokens, 4, 0), ALONE)
    batches = split.batches
    for sequential in (False, True):
        recipe = SparsifyRecipe.from_dict(
            {"sparsity": 0.6, "sequential": sequential, "allocation": "uniform"}
        )
        parts = {}
        for loaded in load_blocks(checkpoint, tokens, FP32, CPU, batches):
            assert loaded.run is not None
            groups = find_groups(loaded.run, batches[0], loaded.linears)
            specs = choose_gates(loaded, groups, checkpoint.mlp, recipe)
            for state in calibrate_block(loaded, specs, recipe, split):
                parts[loaded.prefix + state.spec.at] = (loaded.prefix, state)
        model = load(checkpoint, FP32, CPU)
        from dataclasses import replace

        from llmsqueeze.runtime.gates import install

        installed = {}
        for name, (prefix, state) in parts.items():
            part = state.parts()
            members = tuple(prefix + m for m in part.members)
            installed[name] = replace(part, at=name, members=members)
        gating = install(model, installed, Policy("after", 4), model.model.layers)
        gating.count()
        with torch.no_grad():
            model(tokens)
        gaps = [abs(value - 0.6) for value in gating.sparsity().values()]
        if sequential:
            assert max(gaps) < 0.02


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_rotation_changes_nothing_that_is_computed(
    tiny: Any, tmp_path: Path, family: str, tied: bool
) -> None:
    source = Checkpoint(tiny(family, dtype="float32", tie_word_embeddings=tied))
    turned = rotate(source, tmp_path / "turned")
    ids = torch.randint(3, 150, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = load(source, torch.float64, CPU)(ids).logits
        after = load(turned, torch.float64, CPU)(ids).logits
    # In fp64 from weights stored in fp32: what differs is the rounding of the stored ones.
    assert torch.allclose(after, before, atol=2e-4 * float(before.abs().max()))
    names = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    old = torch.cat(list(source.read(names).values())).double()
    new = torch.cat(list(turned.read(names).values())).double()

    def overlap(weight: torch.Tensor) -> float:
        gram = weight.t() @ weight
        return float((gram - gram.diagonal().diag()).norm() / gram.norm())

    assert overlap(new) < overlap(old)


def test_columns_are_orthogonal_where_one_linear_reads_the_stream() -> None:
    weight = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.eigh(weight.t() @ weight).eigenvectors.flip(1)
    gram = (weight @ turn).t() @ (weight @ turn)
    off = gram - gram.diagonal().diag()
    assert float(off.abs().max()) <= 1e-10 * float(gram.max())
    # Wide: sixteen columns are zero, and dropping those inputs changes nothing.
    empty = gram.diagonal() < 1e-18 * gram.max()
    assert int(empty.sum()) == 16
    x = torch.randn(5, 40, dtype=torch.float64)
    assert torch.allclose(x.masked_fill(empty, 0) @ (weight @ turn).t(), x @ (weight @ turn).t())


def test_sparsify_rotates_on_request(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any], prune_args: list[Any]
) -> None:
    out = tmp_path / "out"
    made(cli, tiny(), out, "--rotate", "--sparsity", 0.3, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Checkpoint(out).config["tie_word_embeddings"] is False
    assert cli("eval", out, "--seqlen", 24, "--windows", 2, "--device", "cpu").exit_code == 0
    pruned = tmp_path / "pruned"
    assert cli("prune", tiny(), "-o", pruned, "--method", "wanda", *prune_args).exit_code == 0
    for source in (pruned, tiny("gemma2")):
        result = cli("sparsify", source, "-o", tmp_path / "x", "--rotate", *args)
        assert result.exit_code == 2 and "--rotate" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pruned"]


def test_convert_keeps_gates_or_drops_them_openly(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    out, dense, back = (tmp_path / n for n in ("out", "dense", "back"))
    made(cli, tiny(), out, *args)
    assert cli("convert", out, "-o", back, "--to", "llmsqueeze").exit_code == 0
    kept, original = Checkpoint(back), Checkpoint(out)
    assert kept.activation == original.activation
    for name, tensor in original.read_activation().items():
        assert torch.equal(kept.read_activation()[name], tensor)
    result = cli("convert", out, "-o", dense, "--to", "dense")
    assert result.exit_code == 0 and "thresholds" in result.stderr
    assert Checkpoint(dense).activation is None and not (dense / SIDE_NAME).exists()


BAD: list[tuple[list[Any], int, str]] = [
    (["--sparsity", 1], 2, "outside"),
    (["--sparsity", -0.1], 2, "outside"),
    (["--prefill", "half"], 2, "policy"),
    (["--ignore", "nothing_like_it"], 2, "no module"),
    (["--ignore", "re:proj"], 2, "nothing to gate"),
    (["--method", "rsparse", "--allocation", "greedy"], 2, "budget"),
    (["--method", "teal", "--rsparse-ratio", 0.5], 2, "belongs to rsparse"),
    (["--prefix", 48], 2, "leaves nothing"),
    (["--seqlen", 100], 2, "positions"),
    (["--calib", "missing.txt"], 3, "missing.txt"),
]


@pytest.mark.parametrize(("options", "code", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_requests_are_one_line_and_write_nothing(
    cli: Any,
    tiny: Any,
    tmp_path: Path,
    args: list[Any],
    options: list[Any],
    code: int,
    message: str,
) -> None:
    out = tmp_path / "out"
    result = cli("sparsify", tiny(), "-o", out, *args, *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_chess_on_a_plain_mlp_is_refused(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    result = cli("sparsify", tiny("opt"), "-o", tmp_path / "out", "--method", "chess", *args)
    assert result.exit_code == 2 and "gated MLP" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_not_finite_stop_the_run(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny(dtype="float32"), source)
    from safetensors.torch import load_file, save_file

    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    result = cli("sparsify", source, "-o", tmp_path / "out", *args)
    assert result.exit_code == 3 and "NaN" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def damage(path: Path, change: Any) -> None:
    """Alter the manifest and make config.json agree, as a careless tool would."""
    import hashlib

    manifest = json.loads((path / MANIFEST_NAME).read_text())
    change(manifest)
    text = json.dumps(manifest)
    (path / MANIFEST_NAME).write_text(text)
    config = json.loads((path / "config.json").read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    config["quantization_config"]["manifest_sha256"] = digest
    (path / "config.json").write_text(json.dumps(config))


def _gate(manifest: dict[str, Any]) -> Any:
    return manifest["activation"]["gates"]["model.layers.0.mlp.down_proj"]


DAMAGES: list[tuple[Any, str]] = [
    (lambda m: _gate(m).update(width=40), "shape"),
    (lambda m: _gate(m).update(members=["model.layers.0.mlp.up_proj"]), "does not fit"),
    (lambda m: _gate(m).update(members=["model.layers.9.mlp.up_proj"]), "does not fit"),
    (lambda m: _gate(m).update(threshold=-1.0), "manifest"),
    (lambda m: _gate(m).update(sparsity=1.0), "manifest"),
    (lambda m: _gate(m).update(rank=3), "does not fit the manifest"),
    (lambda m: _gate(m).update(surprise=3), "manifest"),
    (lambda m: m["activation"]["gates"].pop("model.layers.0.mlp.down_proj"), "does not fit"),
    (lambda m: m["activation"].update(prefill="sometimes"), "policy"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_thresholds_that_do_not_fit_are_refused(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any], change: Any, message: str
) -> None:
    out = tmp_path / "out"
    made(cli, tiny(), out, *args)
    damage(out, change)
    result = cli("eval", out, "--device", "cpu", "--seqlen", 24, "--windows", 1)
    assert result.exit_code == 3 and message in result.stderr, result.stderr
    with pytest.raises(CheckpointError):
        load(Checkpoint(out), FP32, CPU)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**12), st.floats(), st.text(max_size=4),
    st.lists(st.text(max_size=3), max_size=2), st.just({}), st.just({"a": [1]}),
)  # fmt: skip


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_in_the_record_is_refused_or_harmless(
    cli: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory, text_file: Path,
    data: st.DataObject,
) -> None:  # fmt: skip
    out = tmp_path_factory.getbasetemp() / "fuzzed_gates"
    if not out.exists():
        options = ["--calib", text_file, "--samples", 2, "--seqlen", 24, "--device", "cpu"]
        made(
            cli,
            tiny(),
            out,
            *options,
            "-q",
            "--json",
            "--method",
            "rsparse",
            "--rsparse-ratio",
            0.5,
        )
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    original = json.dumps(manifest)
    place = manifest["activation"]
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.integers(0, 9)) == 0:
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    try:
        damage(out, lambda m: (m.clear(), m.update(manifest)))
        checkpoint = Checkpoint(out)
        model = load(checkpoint, FP32, CPU)
        with torch.no_grad():
            model(torch.arange(3, 9).reshape(1, -1))
    except CheckpointError as error:
        assert "\n" not in str(error).strip()
    finally:
        damage(out, lambda m: (m.clear(), m.update(json.loads(original))))


def test_a_missing_or_altered_side_file_is_noticed(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    out = tmp_path / "out"
    made(cli, tiny(), out, *args)
    side = out / SIDE_NAME
    data = side.read_bytes()
    side.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    result = cli("inspect", out, "--verify")
    assert result.exit_code == 3 and SIDE_NAME in result.stderr
    side.unlink()
    result = cli("inspect", out)
    assert result.exit_code == 3 and SIDE_NAME in result.stderr


def test_the_recorded_recipe_repeats_the_run(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    import yaml

    one, two = tmp_path / "one", tmp_path / "two"
    made(cli, tiny(), one, "--method", "chess", "--no-chess-attention", "--prefill", "all", *args)
    manifest = Checkpoint(one).manifest
    assert manifest is not None
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(manifest.steps[-1]["recipe"]))
    made(cli, tiny(), two, "--recipe", file, "--device", "cpu", "-q", "--json")
    assert (one / SIDE_NAME).read_bytes() == (two / SIDE_NAME).read_bytes()
    assert Checkpoint(two).activation == Checkpoint(one).activation


def test_gates_are_shown_and_asked_for_only_where_there_are_any(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    out = tmp_path / "out"
    made(cli, tiny(), out, "--method", "rsparse", "--rsparse-ratio", 0.5, *args)
    shown = cli("inspect", out)
    assert "with a low-rank branch" in " ".join(shown.stdout.replace("│", " ").split())
    document = json.loads(cli("inspect", out, "--json").stdout)
    assert document["activation"]["method"] == "rsparse"
    result = cli("eval", tiny(), "--gate", "all", "--device", "cpu")
    assert result.exit_code == 2 and "sparsify it first" in result.stderr


def test_drift_is_warned_of(cli: Any, tiny: Any, tmp_path: Path, args: list[Any]) -> None:
    out, other = tmp_path / "out", tmp_path / "other.txt"
    made(cli, tiny(), out, *args)
    other.write_text("zzzz ~~~~ QQQQ ##### " * 60)
    result = cli("eval", out, "--text", other, "--seqlen", 48, "--device", "cpu", "--no-progress")
    assert result.exit_code == 0 and "warning:" in result.stderr
    assert "gates" in result.stderr


def test_bytes_per_token_by_hand(cli: Any, tiny: Any, tmp_path: Path, args: list[Any]) -> None:
    out = tmp_path / "out"
    made(cli, tiny(), out, "--method", "teal", "--sparsity", 0.5, *args)
    hidden, inner, kv, vocab = 40, 72, 20, 160
    linears = hidden * (hidden * 2 + kv * 2) + 3 * hidden * inner
    thresholds_ = 4 * (3 * hidden + inner)
    blocks = 3 * (linears * 2 * 0.5 + 2 * hidden * 2 + thresholds_)
    outer = hidden * 2 + hidden * 2 + vocab * hidden * 2  # a row of the embedding, norm, head
    assert bytes_per_token(Checkpoint(out)) == pytest.approx(blocks + outer, abs=1)
    assert bytes_per_token(Checkpoint(tiny())) == 3 * (linears * 2 + 2 * hidden * 2) + outer


def test_of_a_table_of_positions_one_row_is_read(tiny: Any) -> None:
    checkpoint = Checkpoint(tiny("opt"))
    whole = sum(stored_bytes(checkpoint, name) for name in checkpoint.sources)
    table = "model.decoder.embed_positions.weight"
    rows = checkpoint.model.get_parameter(table).shape[0]
    size = stored_bytes(checkpoint, table)
    assert bytes_per_token(checkpoint) == whole - size + size // rows


def test_loaded_linears_share_the_gate_of_their_input(
    cli: Any, tiny: Any, tmp_path: Path, args: list[Any]
) -> None:
    out = tmp_path / "out"
    made(cli, tiny(), out, *args)
    model = load(Checkpoint(out), torch.bfloat16, CPU)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, GatedLinear)
    assert attention.q_proj.gate is attention.k_proj.gate is attention.v_proj.gate
    assert attention.q_proj.gate.threshold.dtype == FP32
    assert model.dtype == torch.bfloat16
