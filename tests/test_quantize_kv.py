"""quantize-kv: calibration against plain computations, the artifact, and what the product does with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import llmsqueeze
from llmsqueeze.blocks import load_blocks
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import RecipeError
from llmsqueeze.evaluate import cache_options, perplexity
from llmsqueeze.kv_calibration import STRIDE, gradient_places, gradients, observe_block, tables
from llmsqueeze.kv_recipe import KvRecipe
from llmsqueeze.numerics.rope import rotate
from llmsqueeze.observe import Attention, observing
from llmsqueeze.quantize_kv import quantize_kv
from llmsqueeze.runtime import load
from llmsqueeze.runtime.kv_cache import PackedLayer, attached_cache, packed_cache
from llmsqueeze.shards import KV_NAME
from tests.numerics.test_rope import ROPES

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "gpt_neox")


def tokens(samples: int = 3, length: int = 24) -> Tensor:
    return torch.randint(3, 150, (samples, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def quantized(tiny: Tiny, text_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """A tiny checkpoint with a calibrated cache."""

    def make(source: Path, name: str = "kv", **asked: Any) -> Path:
        calibration = {"text": str(text_file), "samples": 6, "seqlen": 40}
        recipe = KvRecipe.from_dict(
            {"bits": 3, "calibration": calibration, "dtype": "float32", **asked}
        )
        quantize_kv(Checkpoint(source), "tiny", tmp_path / name, recipe, CPU)
        return tmp_path / name

    return make


def observed(path: Path, ids: Tensor, layer: int) -> Attention:
    """What the full model computes with in one layer."""
    model = load(Checkpoint(path), torch.float32, CPU)
    found: list[Attention] = []
    with observing(model.config, found.append), torch.no_grad():
        model(ids, use_cache=False)
    return next(a for a in found if a.layer == layer)


# Calibration


@pytest.mark.parametrize("rope", list(ROPES))
def test_keys_are_taken_as_they_were_before_the_rotary_embedding(tiny: Tiny, rope: str) -> None:
    family, changes = ROPES[rope]
    path, ids = tiny(family, "float32", **changes), tokens()
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, args: Any, out: Tensor) -> None:
            seen[name] = out

        return keep

    layer = 1
    block = reference.get_submodule(Checkpoint(path).blocks_path)[layer]
    # After the norm of the keys, where there is one.
    part = {"qwen3": "self_attn.k_norm", "gemma3_text": "self_attn.k_norm"}.get(
        family, "attention.query_key_value" if family == "gpt_neox" else "self_attn.k_proj"
    )
    block.get_submodule(part).register_forward_hook(hook("keys"))
    with torch.no_grad():
        reference(ids)
    if family == "gpt_neox":
        heads = seen["keys"].view(*ids.shape, 4, 3, 10)[..., 1, :].transpose(1, 2)
    elif part.endswith("k_norm"):
        heads = seen["keys"] if seen["keys"].shape[1] == 2 else seen["keys"].transpose(1, 2)
    else:
        heads = seen["keys"].view(*ids.shape, 2, -1).transpose(1, 2)
    batches = [slice(0, 2), slice(2, 3)]
    for loaded in load_blocks(Checkpoint(path), ids, torch.float32, CPU, batches):
        turn = tables(loaded.model, ids.shape[1], torch.float32, CPU).get(loaded.index)
        found = observe_block(loaded, batches, turn, sinks=1, sensing=False)
        if loaded.index == layer:
            assert torch.allclose(torch.cat(found.keys), heads[:, :, 1:], atol=2e-5)
            break


def test_drawn_pairs_add_up_to_what_attention_does(tiny: Tiny, monkeypatch: Any) -> None:
    """Σ u uᵀ against the sum over all pairs, p (1 − p) R⁻¹ q qᵀ R, in fp64 loops."""
    from llmsqueeze import kv_calibration

    monkeypatch.setattr(kv_calibration, "DRAWS", 4000)
    path, ids = tiny("qwen3", "float32"), tokens(1, 14)
    attention = observed(path, ids, 0)
    sinks = 2
    for loaded in load_blocks(Checkpoint(path), ids, torch.float32, CPU, [slice(0, 1)]):
        turn = tables(loaded.model, 14, torch.float32, CPU)[0]
        seen = observe_block(loaded, [slice(0, 1)], turn, sinks=sinks, sensing=True)
        break
    assert turn is not None
    query, key = attention.query[0].double(), attention.key[0].double()
    cos, sin = (part.double() for part in turn)
    expected = torch.zeros(2, 12, 12, dtype=torch.float64)
    by_key = torch.zeros(2, 14, dtype=torch.float64)
    for head in range(4):
        for i in range(sinks + 1, 14):
            share = (query[head, i] @ key[head // 2, : i + 1].T * attention.scaling).softmax(0)
            for j in range(sinks, i + 1):
                pull = float(share[j] * (1 - share[j]))
                # The query as seen from key j: qᵀ R_j k = (R_jᵀ q)ᵀ k.
                seen_from = rotate(query[head, i], cos[j], -sin[j])
                expected[head // 2] += pull * torch.outer(seen_from, seen_from)
                by_key[head // 2, j] += pull * float(seen_from @ seen_from)
    senses = torch.cat(seen.senses, dim=1).double()
    found = senses.mT @ senses
    assert float((found - expected).norm() / expected.norm()) < 0.02
    drawn = torch.zeros(2, 14 - sinks, dtype=torch.float64)
    drawn.scatter_add_(1, torch.cat(seen.at, dim=1), senses.square().sum(-1))
    assert float((drawn - by_key[:, sinks:]).norm() / by_key.norm()) < 0.02


def test_gradients_are_the_loss_s(tiny: Tiny) -> None:
    """Against a central difference of the model's own loss, in the key that attention computes with."""
    path, ids = tiny("llama", "float32"), tokens(2, 13)
    model = load(Checkpoint(path), torch.float32, CPU).double()
    turns = tables(model, 13, torch.float64, CPU)
    found = gradients(
        model, model.model.layers, ids, turns, sinks=1, on_sample=lambda done, total: None
    )
    assert sorted(found) == [0, 1, 2]
    kept = range(1, 13, STRIDE)
    assert found[1].shape == (2, 2 * len(kept), 10)
    places = gradient_places(2, 12, 2)
    assert places[0].tolist() == [p - 1 + 12 * s for s in (0, 1) for p in kept]

    def loss(sample: int, head: int, place: int, channel: int, by: float) -> float:
        class Nudged(DynamicCache):
            def update(
                self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kw: Any
            ) -> Any:
                if layer == 1:
                    nudge = torch.zeros(10, dtype=torch.float64)
                    nudge[channel] = by
                    keys = keys.clone()
                    cos, sin = (part[place].double() for part in turns[layer])
                    keys[0, head, place] += rotate(nudge, cos, sin)
                return super().update(keys, values, layer, *args, **kw)

        cache = Nudged(config=model.config)
        with torch.no_grad():
            logits = model(ids[sample : sample + 1], **cache_options(model, cache)).logits
        return float(
            torch.nn.functional.cross_entropy(logits[0, :-1], ids[sample, 1:], reduction="sum")
        )

    for sample, head, index, channel in ((0, 0, 0, 3), (1, 1, 2, 8), (0, 1, 1, 0)):
        place = kept[index]
        slope = (
            loss(sample, head, place, channel, 0.02) - loss(sample, head, place, channel, -0.02)
        ) / 0.04  # norms compute in fp32: smaller steps drown in their rounding
        got = float(found[1][head, sample * len(kept) + index, channel])
        assert got == pytest.approx(slope, rel=1e-2, abs=3e-5)


def test_gradients_are_without_dropout(tiny: Tiny) -> None:
    model = load(Checkpoint(tiny("opt", "float32", dropout=0.5)), torch.float32, CPU)
    blocks, ids = model.model.decoder.layers, tokens(2, 13)
    found = [
        gradients(model, blocks, ids, {}, sinks=1, on_sample=lambda done, total: None)
        for _ in range(2)
    ]
    assert found[0].keys() == {0, 1, 2}
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])
    assert not model.training and "forward" not in vars(blocks[0])


def test_an_observed_model_computes_what_it_did(tiny: Tiny) -> None:
    """With padding, too: a name that transformers does not know gets no mask at all."""
    for family in FAMILIES:
        model = load(Checkpoint(tiny(family, "float32")), torch.float32, CPU)
        ids = tokens(2, 12)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        before = model.config._attn_implementation
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits
            seen: list[Attention] = []
            with observing(model.config, seen.append):
                found = model(ids, attention_mask=mask).logits
        assert torch.equal(found[:, 5:], expected[:, 5:])
        assert len(seen) == model.config.num_hidden_layers
        assert model.config._attn_implementation == before


# The checkpoint, and the cache it makes


DEFAULT = {"outliers": 0.1, "sinks": 2}
PLAIN = {"outliers": 0.1, "config": {"plain": True}}
FISHER = {"config": {"fisher": True}}


@pytest.mark.parametrize(
    ("family", "asked"),
    [(family, asked) for family in FAMILIES for asked in (DEFAULT, PLAIN)]
    + [(family, FISHER) for family in ("llama", "gemma3_text", "opt")],
)
def test_every_family_decodes_as_it_reads(
    tiny: Tiny, quantized: Callable[..., Path], family: str, asked: dict[str, Any]
) -> None:
    path = quantized(tiny(family, "float32"), **asked)
    model = load(Checkpoint(path), torch.float32, CPU)
    ids = tokens(2, 20)
    cache, whole = llmsqueeze.kv_cache(model), llmsqueeze.kv_cache(model)
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], **cache_options(model, cache)).logits for t in range(20)]
        logits = model(ids, **cache_options(model, whole)).logits
        exact = model(ids).logits
    assert torch.allclose(torch.cat(steps, dim=1), logits, atol=1e-3)
    error = (logits - exact).norm() / exact.norm()
    assert 1e-4 < float(error) < 0.5
    packed = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    assert len(packed) == model.config.num_hidden_layers
    # Sinks are what the model computed, rounded to bf16 and nothing else.
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_options(model, plain))
    first = packed[0]
    index = cache.layers.index(first)
    count = first.format.sinks
    for kept, true in zip(
        first._sinks, (plain.layers[index].keys, plain.layers[index].values), strict=True
    ):
        # Later layers see what the quantised ones before them put out; a window has slid past the sinks.
        if index == 0 and not first.window:
            assert torch.equal(kept, true[:, :, :count].bfloat16())


@pytest.mark.parametrize("rope", [r for r in ROPES if r != "dynamic"])
def test_fine_codes_change_next_to_nothing(
    tiny: Tiny, quantized: Callable[..., Path], rope: str
) -> None:
    """Geometry of every rope type: with exact outliers everywhere, the cache is the dynamic one."""
    family, changes = ROPES[rope]
    path = quantized(tiny(family, "float32", **changes), bits=4, outliers=0.25)
    model = load(Checkpoint(path), torch.float32, CPU)
    formats = model.llmsqueeze_kv_formats
    import dataclasses

    full = {
        i: dataclasses.replace(
            f,
            keys=dataclasses.replace(f.keys, slots=f.keys.offset.shape[-1]),
            values=dataclasses.replace(f.values, slots=f.keys.offset.shape[-1] - 1),
        )
        for i, f in formats.items()
    }
    ids = torch.nn.functional.pad(tokens(2, 18), (5, 0))
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    ids[1, 5:8], mask[1, 5:8] = 0, 0  # rows begin at different places
    options = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 8,
        "eos_token_id": None,
    }
    expected = model.generate(
        ids, **cache_options(model, DynamicCache(config=model.config)), **options
    )
    found = model.generate(ids, **cache_options(model, packed_cache(model, full)), **options)
    assert torch.equal(found, expected)


def test_reloading_gives_the_same_bits(tiny: Tiny, quantized: Callable[..., Path]) -> None:
    source = tiny("llama", "float32")
    one = quantized(source, "one", outliers=0.1)
    two = quantized(source, "two", outliers=0.1)
    assert (one / KV_NAME).read_bytes() == (two / KV_NAME).read_bytes()
    ids = tokens(2, 20)
    logits = []
    for path in (one, two):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids, **cache_options(model, attached_cache(model))).logits)
    assert torch.equal(*logits)
    dense = load(Checkpoint(source), torch.float32, CPU)
    with torch.no_grad():  # the weights are untouched
        assert torch.equal(model(ids).logits, dense(ids).logits)
    with pytest.raises(RecipeError, match="quantize-kv"):
        llmsqueeze.kv_cache(dense)


def test_side_tensors_are_as_many_as_they_should(
    tiny: Tiny, quantized: Callable[..., Path]
) -> None:
    path = quantized(tiny("llama", "float32"))
    checkpoint = Checkpoint(path)
    found = checkpoint.read_kv_cache()
    assert len(found) == 3 * 8
    per_layer = sum(t.numel() * t.itemsize for n, t in found.items() if n.startswith("1."))
    channels = 2 * 10
    assert per_layer == channels * 2 * (2 + 1 + 4) + 4 * 8 * 4
    # An 8B model: 32 layers, 8 heads of 128.
    assert 32 * (8 * 128 * 2 * (2 + 1 + 4) + 4 * 16 * 4) < 1e6
    assert checkpoint.manifest and checkpoint.manifest.bytes_after > checkpoint.stored_bytes


def test_more_bits_lose_less(tiny: Tiny, quantized: Callable[..., Path]) -> None:
    source = tiny("llama", "float32")
    ids = tokens(6, 40)
    lost = []
    for bits in (4, 3, 2):
        model = load(Checkpoint(quantized(source, f"kv{bits}", bits=bits)), torch.float32, CPU)
        with torch.no_grad():
            logits = model(ids, **cache_options(model, attached_cache(model))).logits
            lost.append(float((logits - model(ids).logits).square().mean()))
    assert lost[0] < 0.5 * lost[1] < 0.25 * lost[2]


# The command line


def test_the_command_and_what_follows_it(
    cli: Any, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kv"
    args = ["--calib", text_file, "--samples", 4, "--seqlen", 32, "--device", "cpu", "--json", "-q"]
    result = cli("quantize-kv", tiny(), "-o", out, "--bits", 3, "--outliers", 0.1, *args)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["method"] == "kvquant" and document["outlier_slots"] == {"keys": 1, "values": 0}
    width = 10
    codes = 16 * 3 / width
    assert document["bits_per_element"] == pytest.approx(codes + (24 / width + 16 / 20) / 2)

    evaluated = [
        "--text",
        text_file,
        "--seqlen",
        40,
        "--windows",
        2,
        "--device",
        "cpu",
        "--json",
        "-q",
    ]
    stored = json.loads(cli("eval", out, *evaluated).stdout)
    assert stored["kv_cache"]["format"] == "kvquant:3, 1 outlier slot"
    assert stored["kv_cache"]["bits_per_element"] > document["bits_per_element"]  # sinks, positions
    none = json.loads(cli("eval", out, "--kv-cache", "none", *evaluated).stdout)
    assert "kv_cache" not in none and none["token_ppl"] != stored["token_ppl"]
    assert none["token_ppl"] == json.loads(cli("eval", tiny(), *evaluated).stdout)["token_ppl"]
    other = json.loads(cli("eval", out, "--kv-cache", "fp8", *evaluated).stdout)
    assert other["kv_cache"]["format"] == "fp8"
    checkpoint = Checkpoint(out)
    model = load(checkpoint, torch.float32, CPU)
    from llmsqueeze.data import evaluation_windows, load_tokenizer

    windows = evaluation_windows(text_file, load_tokenizer(out), seqlen=40, windows=2).tokens
    found = perplexity(model, windows, cache=lambda: attached_cache(model))
    assert stored["token_ppl"] == pytest.approx(found.token_ppl, rel=1e-6)

    shown = json.loads(cli("inspect", out, "--verify", "--json", "-q").stdout)
    assert shown["kv_cache"]["bits"] == 3 and shown["steps"][-1]["command"] == "quantize-kv"
    assert "kvquant" in (out / "README.md").read_text()

    # Steps chain: gates keep the cache, the cache keeps gates, a conversion keeps both, pruning neither.
    both = tmp_path / "both"
    assert cli("sparsify", out, "-o", both, "--allocation", "uniform", *args).exit_code == 0
    made = Checkpoint(both)
    assert made.activation and made.kv_cache == checkpoint.kv_cache
    again, packed = tmp_path / "again", tmp_path / "packed"
    assert (
        cli("quantize-kv", both, "-o", again, "--method", "rotate", "--json", "-q").exit_code == 0
    )
    chained = Checkpoint(again)
    assert chained.activation == made.activation and chained.kv_cache
    assert chained.kv_cache.method == "rotate" and chained.kv_cache.file is None
    assert [s["command"] for s in chained.manifest.steps] == [  # type: ignore[union-attr]
        "quantize-kv", "sparsify", "quantize-kv",
    ]  # fmt: skip
    assert cli("convert", both, "-o", packed, "--to", "llmsqueeze", "-q").exit_code == 0
    assert Checkpoint(packed).kv_cache == checkpoint.kv_cache
    for command in (["prune", out], ["convert", out, "--to", "dense"]):
        target = tmp_path / command[0]
        prune_only = args[:-2] if command[0] == "prune" else []
        result = cli(*command, "-o", target, *prune_only)
        assert result.exit_code == 0 and "left out" in result.stderr
        assert Checkpoint(target).kv_cache is None and not (target / KV_NAME).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 5], "kvquant has 2, 3, 4"),
        (["--method", "fp8", "--bits", 4], "fp8 has 8"),
        (["--outliers", 1.5], "share of entries"),
        (["--outliers", -0.1], "share of entries"),
        (["--sinks", 100], "outside"),
        (["--method", "rotate", "--outliers", 0.01], "belongs to kvquant"),
        (["--method", "rotate", "--samples", 3], "needs no calibration"),
        (["--method", "fp8", "--plain"], "needs no calibration"),
        (["--sinks", 31, "--seqlen", 32], "leaves nothing"),
    ],
)
def test_bad_requests_write_nothing(
    cli: Any, tiny: Tiny, text_file: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    out = tmp_path / "out"
    calib = [] if "--method" in options else ["--calib", text_file, "--samples", 2]
    result = cli("quantize-kv", tiny(), "-o", out, "--device", "cpu", "-q", *calib, *options)
    assert result.exit_code == 2 and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints(
    cli: Any, tiny: Tiny, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    chunks = {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 8}
    result = cli(
        "quantize-kv", tiny("llama", **chunks), "-o", tmp_path / "x", "--device", "cpu", "-q"
    )
    assert result.exit_code == 2 and "full or sliding attention" in result.stderr
    nan = tmp_path / "nan"
    shutil.copytree(tiny("llama", "float32"), nan)
    from safetensors.torch import load_file, save_file

    weights = load_file(nan / "model.safetensors")
    name = next(n for n in weights if n.endswith("1.self_attn.k_proj.weight"))
    weights[name].mul_(1e38)
    save_file(weights, nan / "model.safetensors", {"format": "pt"})
    result = cli("quantize-kv", nan, "-o", tmp_path / "y", "--samples", 2, "--seqlen", 16,
                 "--device", "cpu", "-q")  # fmt: skip
    assert result.exit_code != 0 and not (tmp_path / "y").exists()

    good = quantized(tiny("llama", "float32"), "good")
    missing = tmp_path / "missing"
    shutil.copytree(good, missing)
    (missing / KV_NAME).unlink()
    damaged = tmp_path / "damaged"
    shutil.copytree(good, damaged)
    data = bytearray((damaged / KV_NAME).read_bytes())
    data[-20] ^= 255
    (damaged / KV_NAME).write_bytes(bytes(data))
    assert cli("inspect", missing, "-q").exit_code == 3
    result = cli("inspect", damaged, "--verify", "-q")
    assert result.exit_code == 3 and KV_NAME in result.stderr
