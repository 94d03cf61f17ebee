"""Decoding over a cache in tiles, against the packed cache that is unpacked at every step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import llmsqueeze
from llmsqueeze.errors import EnvironmentFault, RecipeError
from llmsqueeze.evaluate import cache_options
from llmsqueeze.ops import cpu
from llmsqueeze.runtime import kv_cache
from llmsqueeze.runtime.generate import Decoder, fixed_cache
from llmsqueeze.runtime.kv_cache import LayerFormat, packed_cache, parse_format
from llmsqueeze.runtime.tiles import TiledLayer
from tests.conftest import compile_whole, tiny_model
from tests.test_kv_append import codecs

# Heads 64 wide, three of them for six queries' heads.
WIDE = {"hidden_size": 48, "head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 3}
PROMPT = torch.arange(5, 24)


def wide_model(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(family, **WIDE, **changes)


def format_of(name: str, sinks: int = 0) -> LayerFormat:
    kind, _, bits = name.partition(":")
    if kind in ("kvquant", "plain"):
        return LayerFormat(*codecs(kind, int(bits), 64, 1), sinks)
    return parse_format(name)


def stepwise(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of every token, read one after another."""
    options = cache_options(model, cache)
    with torch.no_grad():
        found = [model(ids[None, i : i + 1], **options).logits[0, -1] for i in range(len(ids))]
    return torch.stack(found)


NAMES = ["fp8", "rotate:4", "rotate:3", "rotate:2", "kvquant:4", "kvquant:3", "plain:4"]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sinks", [0, 3])
def test_tokens_see_what_the_packed_cache_gives_back(family: str, name: str, sinks: int) -> None:
    if sinks and name.partition(":")[0] not in ("kvquant", "plain"):
        pytest.skip("only calibrated formats have sinks")
    model, format = wide_model(family), format_of(name, sinks)
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format)
    with torch.no_grad():
        exact = model(PROMPT[None]).logits[0]
    expected = stepwise(model, packed_cache(model, formats), PROMPT)
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 40, formats=formats)
    found = stepwise(model, decoder.cache, PROMPT)
    assert all(isinstance(layer, TiledLayer) for layer in decoder.cache.layers)
    # A number at the border of two codes may be given either, for which 2 and 3 bits are coarse.
    assert float((found - expected).norm()) < 0.25 * float((expected - exact).norm())


@pytest.mark.parametrize("name", ["rotate:4", "kvquant:3"])
def test_a_prompt_is_read_as_it_is_and_coded_then(name: str) -> None:
    model, format = wide_model(), format_of(name, 2 if name.startswith("kvquant") else 0)
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format)
    with torch.no_grad():
        exact = model(PROMPT[None]).logits[0, -1]
    decoder = Decoder(model, 64, formats=formats)
    for _ in range(2):  # it can be used again
        tokens = [int(token) for token in decoder.generate(PROMPT, 8)]
        assert tokens[0] == int(exact.argmax())
    read = decoder.cache.layers[0].tiles.clone()
    decoder.cache.reset()
    # Coded one by one the first layer's keys and values are the same: they do not depend on attention.
    fed = torch.cat([PROMPT, torch.tensor(tokens[:-1])])
    stepwise(model, decoder.cache, fed)
    assert float((decoder.cache.layers[0].tiles != read).float().mean()) < 1e-3


def test_layers_may_differ() -> None:
    model = wide_model("gemma3_text")
    formats = {3: parse_format("rotate:4")}
    expected = stepwise(model, packed_cache(model, formats), PROMPT)
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 40, formats=formats)
    kinds = [isinstance(layer, TiledLayer) for layer in decoder.cache.layers]
    assert kinds == [False, False, False, True]
    assert torch.allclose(stepwise(model, decoder.cache, PROMPT), expected, atol=2e-3)


def test_what_does_not_fit_is_refused() -> None:
    narrow = tiny_model()
    formats = dict.fromkeys(range(3), parse_format("rotate:4"))
    with pytest.raises(EnvironmentFault, match="heads 10 wide"):
        list(Decoder(narrow, 32, formats=formats).generate(PROMPT, 2))
    moving = tiny_model(
        **WIDE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    calibrated = dict.fromkeys(range(3), format_of("kvquant:4"))
    with pytest.raises(EnvironmentFault, match="length of the text"):
        Decoder(moving, 32, formats=calibrated)
    model = wide_model()
    decoder = Decoder(model, 32, formats=formats)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="did not look"):
        stepwise(model, decoder.cache, PROMPT)
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 32, formats=formats)
    options = cache_options(model, decoder.cache)
    with torch.no_grad(), pytest.raises(RuntimeError, match="did not look"):
        model(PROMPT[None, :5], **options)
        model.set_attn_implementation("eager")
        model(PROMPT[None, 5:9], **options)


def test_generate_takes_it() -> None:
    model, format = wide_model(), format_of("kvquant:4", 2)
    kv_cache.attach(model, dict.fromkeys(range(model.config.num_hidden_layers), format))
    decoder = Decoder(model, 64, formats=model.llmsqueeze_kv_formats)
    expected = [int(token) for token in decoder.generate(PROMPT, 8)]
    formats = kv_cache.attached_formats(model)
    cache = fixed_cache(model, 64, formats)
    options = cache_options(model, cache) | {"do_sample": False, "eos_token_id": None}
    found = model.generate(PROMPT[None], max_new_tokens=8, **options)
    assert found[0, len(PROMPT) :].tolist() == expected
    both = torch.stack([PROMPT, PROMPT.flip(0)])
    options |= cache_options(model, fixed_cache(model, 64, formats))
    assert model.generate(both, max_new_tokens=8, **options)[0, len(PROMPT) :].tolist() == expected
    options |= cache_options(model, fixed_cache(model, 30, formats))
    with pytest.raises(ValueError, match=r"32 \+ 1 tokens do not fit a cache of 32"):
        model.generate(PROMPT[None], max_new_tokens=20, **options)
    with pytest.raises(RecipeError, match="quantize-kv"):
        llmsqueeze.kv_cache(wide_model(), tokens=64)


def test_a_step_compiles_whole() -> None:
    model = wide_model()
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format_of("kvquant:4", 2))
    decoder = Decoder(model, 64, formats=formats)
    options = cache_options(model, decoder.cache)
    found = []
    for step in (model, compile_whole(model)):
        decoder.cache.reset()
        with torch.no_grad():
            model(PROMPT[None, :10], **options)
            steps = [step(PROMPT[None, i : i + 1], **options).logits for i in range(10, 19)]
        found.append(torch.cat(steps))
    assert torch.allclose(*found, atol=1e-5)
    # torch.compile may go wrong where an argument lies within another.
    for layer in decoder.cache.layers:
        assert all(sinks.storage_offset() == 0 for sinks in layer.sinks)


def test_a_cache_of_so_many_tokens_needs_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model()
    kv_cache.attach(model, dict.fromkeys(range(model.config.num_hidden_layers), format_of("fp8")))
    monkeypatch.setattr(cpu, "library", lambda: object())
    cache = llmsqueeze.kv_cache(model, tokens=64)
    assert all(isinstance(layer, TiledLayer) for layer in cache.layers)
    monkeypatch.setattr(cpu, "library", lambda: None)
    with pytest.raises(EnvironmentFault, match=r"on a CPU where there was a C\+\+ compiler"):
        llmsqueeze.kv_cache(model, tokens=64)


@pytest.mark.parametrize("name", ["fp8", "rotate:4", "kvquant:4"])
def test_the_same_tokens_follow_as_by_the_packed_cache(name: str) -> None:
    """Where one token leads by more than what the logits of both caches differ."""
    model = wide_model()
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format_of(name))
    ids, count = PROMPT, 12
    for _ in range(count):  # greedy, by the packed cache
        logits = stepwise(model, packed_cache(model, formats), ids)
        ids = torch.cat([ids, logits[-1:].argmax(-1)])
    model.set_attn_implementation("sdpa")
    found = stepwise(model, Decoder(model, 64, formats=formats).cache, ids[:-1])
    answers, wanted = (x[len(PROMPT) - 1 :] for x in (found, logits))
    one, two = wanted.topk(2).values.unbind(-1)
    clear = one - two > 2 * (answers - wanted).abs().amax(-1)
    assert int(clear.sum()) > count // 2
    assert torch.equal(answers.argmax(-1)[clear], wanted.argmax(-1)[clear])


def test_attention_factors_are_taken_off_new_keys() -> None:
    """YaRN's: tokens read one by one are coded as those of a prompt."""
    rope = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 64
    model = wide_model(rope_parameters=rope)
    assert model.model.rotary_emb.attention_scaling > 1.1
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format_of("kvquant:4"))
    decoder = Decoder(model, 40, formats=formats)
    tiles = []
    for step in (len(PROMPT), 1):
        decoder.cache.reset()
        with torch.no_grad():
            for part in PROMPT.split(step):
                model(part[None], **cache_options(model, decoder.cache))
        tiles.append(decoder.cache.layers[0].tiles.clone())
    assert float((tiles[0] != tiles[1]).float().mean()) < 1e-3


LONG = torch.randint(3, 150, (70,), generator=torch.Generator().manual_seed(5))


def formats_for(model: Any, name: str, sinks: int = 2) -> dict[int, LayerFormat]:
    calibrated = name.partition(":")[0] in ("kvquant", "plain")
    format = format_of(name, sinks if calibrated else 0)
    return dict.fromkeys(range(model.config.num_hidden_layers), format)


def in_pieces(model: Any, cache: Any, ids: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Logits of every token, read in pieces of these sizes."""
    options = cache_options(model, cache)
    with torch.no_grad():
        found = [model(part[None], **options).logits[0] for part in ids.split(list(sizes))]
    return torch.cat(found)


@pytest.mark.parametrize("name", ["fp8", "rotate:4", "kvquant:4"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_window_keeps_a_ring_of_tiles(family: str, name: str) -> None:
    """Long past where it begins again; sinks slide out, too."""
    model = wide_model(family, max_position_embeddings=128)
    formats = formats_for(model, name)
    with torch.no_grad():
        exact = model(LONG[None]).logits[0]
    expected = stepwise(model, packed_cache(model, formats), LONG)
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 80, formats=formats)
    found = stepwise(model, decoder.cache, LONG)
    for layer in decoder.cache.layers:
        assert layer.tiles.shape[2] == (2 if layer.window else 5)
    assert float((found - expected).norm()) < 0.25 * float((expected - exact).norm())
    # The same tiles, whether tokens come one by one or as a prompt: of the first layer, which attention
    # of other tokens does not reach.
    tiles = decoder.cache.layers[0].tiles.clone()
    decoder.cache.reset()
    in_pieces(model, decoder.cache, LONG, (70,))
    first = decoder.cache.layers[0]
    newest = [(69 - i) // 16 % tiles.shape[2] for i in range(6)]
    places = sorted(set(newest))
    assert float((first.tiles[:, :, places] != tiles[:, :, places]).float().mean()) < 2e-3


@pytest.mark.parametrize("name", ["fp8", "rotate:4", "kvquant:4", "plain:4"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_prompt_may_come_in_pieces(family: str, name: str) -> None:
    """Each sees what was cached before as the packed cache gives it back, and itself as it is."""
    model = wide_model(family, max_position_embeddings=128)
    formats = formats_for(model, name)
    with torch.no_grad():
        exact = model(LONG[None]).logits[0]
    sizes = (9, 1, 1, 23, 1, 30, 1, 1, 3)
    packed = packed_cache(model, formats)
    expected = in_pieces(model, packed, LONG, sizes)
    model.set_attn_implementation("sdpa")
    cache = Decoder(model, 80, formats=formats).cache
    found = in_pieces(model, cache, LONG, sizes)
    lost = float((expected - exact).norm())
    # New tokens of a piece are not coded yet when they are seen: nearer to the exact result than that.
    assert float((found - exact).norm()) < 1.1 * lost
    assert float((found[:9] - exact[:9]).norm()) < 1e-4 * float(exact.norm())
    first = cache.layers[0]
    assert int(first.shared.length) == 70
    if (
        not first.window
    ):  # what a next piece would see of the first layer, which attention does not reach
        first.shared.before = 70
        for one, other in zip(first._unpacked(), packed.layers[0]._read(), strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-2
    again = first.tiles.clone()
    cache.reset()
    in_pieces(model, cache, LONG, (70,))
    newest = sorted({(69 - i) // 16 % again.shape[2] for i in range(6)})
    assert float((again[:, :, newest] != cache.layers[0].tiles[:, :, newest]).float().mean()) < 2e-3


@pytest.mark.parametrize("name", ["fp8", "rotate:4", "kvquant:4"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_rows_with_padding_are_single_runs(family: str, name: str) -> None:
    model = wide_model(family, max_position_embeddings=128)
    formats = formats_for(model, name)
    rows = [LONG[:41], LONG[20:39], LONG[3:36]]
    ids = torch.stack([torch.nn.functional.pad(row, (41 - len(row), 0)) for row in rows])
    mask = (ids != 0).long()
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}

    def answer(ids: Tensor, mask: Tensor) -> Tensor:
        cache = fixed_cache(model, 64, formats)
        found = model.generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True,
            **cache_options(model, cache), **options,
        )  # fmt: skip
        layer = cache.layers[0]
        assert (layer.shared.padding is None) == bool(mask.all())
        return torch.stack(found.logits, dim=1)

    together = answer(ids, mask)
    for row, one in enumerate(rows):
        alone = answer(one[None], torch.ones_like(one)[None])[0]
        # The prompt's, then what is read from tiles; a number at the border of two codes may be given either.
        off = (together[row] - alone).abs().amax(-1)
        assert float(off[0]) < 1e-5 and float(off[1]) < 2e-3 and float(off.max()) < 0.05


def test_padding_elsewhere_is_refused() -> None:
    model = wide_model()
    formats = formats_for(model, "kvquant:4")
    ids = torch.stack([PROMPT, PROMPT.flip(0)])
    mask = torch.ones_like(ids)

    def read(mask: Tensor | None, more: Tensor | None = None, **rest: Any) -> None:
        options = cache_options(model, fixed_cache(model, 64, formats))
        with torch.no_grad():
            model(ids, attention_mask=mask, **options, **rest)
            if more is not None:
                model(ids[:, :4], attention_mask=more, **options)

    for place in (5, -1):  # between tokens, and behind them
        mask[:] = 1
        mask[0, place] = 0
        with pytest.raises(EnvironmentFault, match="padding in front of each row"):
            read(mask)
    mask[:] = 1
    mask[0, :3] = 0
    with pytest.raises(EnvironmentFault, match="position_ids that count"):
        read(mask)
    at = (mask.cumsum(1) - 1).clamp_min(0)
    with pytest.raises(EnvironmentFault, match="padding in front of each row"):
        read(mask, torch.ones(2, 23).long(), position_ids=at)
    later = torch.cat([mask, torch.ones(2, 4).long()], dim=1)
    later[1, len(PROMPT)] = 0
    with pytest.raises(EnvironmentFault, match="padding in front of each row"):
        read(mask, later, position_ids=at)


def test_beams_go_on_from_one_another() -> None:
    model = wide_model()
    formats = formats_for(model, "rotate:4")
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "num_beams": 3}
    mask = torch.ones_like(PROMPT)[None]
    expected = model.generate(
        PROMPT[None],
        attention_mask=mask,
        **cache_options(model, packed_cache(model, formats)),
        **options,
    )
    model.set_attn_implementation("sdpa")
    cache = fixed_cache(model, 64, formats)
    found = model.generate(
        PROMPT[None], attention_mask=mask, **cache_options(model, cache), **options
    )
    scores = []
    for ids in (expected, found):
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        scores.append(
            float(logs[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None]).sum())
        )
    # By the exact model both answers are as likely, if codes did not lead them apart.
    assert scores[1] > scores[0] - 0.05 * abs(scores[0])


@pytest.mark.parametrize("full_first", [True, False])
def test_layers_without_a_format_keep_their_own(full_first: bool) -> None:
    """As a checkpoint of before has it: layers of full attention alone, prompts too."""
    kinds = (
        ["full_attention", "sliding_attention"]
        if full_first
        else ["sliding_attention", "full_attention"]
    )
    model = wide_model("gemma3_text", max_position_embeddings=128, layer_types=kinds * 2)
    full = [i for i, kind in enumerate(kinds * 2) if kind == "full_attention"]
    formats = dict.fromkeys(full, format_of("rotate:4"))
    with torch.no_grad():
        exact = model(LONG[None]).logits[0]
    expected = stepwise(model, packed_cache(model, formats), LONG)
    model.set_attn_implementation("sdpa")
    cache = Decoder(model, 80, formats=formats).cache
    lost = float((expected - exact).norm())
    for sizes in ((20,) + (1,) * 50, (20, 30) + (1,) * 20):
        cache.reset()
        found = in_pieces(model, cache, LONG, sizes)
        assert float((found[:20] - exact[:20]).norm()) < 1e-4 * float(exact.norm())
        assert float((found[50:] - expected[50:]).norm()) < 0.5 * lost


def test_what_weighs_next_to_nothing_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model()
    formats = formats_for(model, "kvquant:4")
    given = []
    monkeypatch.setattr(TiledLayer, "attend", _noting(TiledLayer.attend, given))
    exact, found = (
        stepwise(model, fixed_cache(model, 80, formats, mass), LONG[:40]) for mass in (0.0, 1e-4)
    )
    assert given[0] == 0 and given[-1] == pytest.approx(math.log(80 / 1e-4))
    assert torch.allclose(found, exact, atol=1e-3)
    kv_cache.attach(model, formats)
    for wrong in ({"tokens": 64, "skip_mass": 1.0}, {"skip_mass": 0.1}):
        with pytest.raises(RecipeError, match="share"):
            llmsqueeze.kv_cache(model, **wrong)


def _noting(own: Any, found: list[float]) -> Any:
    def attend(layer: TiledLayer, *given: Any) -> Tensor:
        found.append(layer.skip)
        y: Tensor = own(layer, *given)
        return y

    return attend
