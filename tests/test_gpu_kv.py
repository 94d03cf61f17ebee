"""The quantised KV cache on a CUDA device: attention over tiles, coding into them, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.test_gpu import ROUNDING, _off

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


# Keys before the rotary embedding are rounded to fp16 after they are turned, queries too.
@pytest.mark.parametrize(
    ("kind", "bits", "slots", "limit"),
    [
        ("fp8", 8, 0, 1e-3), ("rotated", 4, 0, 1e-3), ("rotated", 3, 0, 1e-3),
        ("rotated", 2, 0, 1e-3), ("channels", 4, 0, 3e-3), ("channels", 4, 1, 3e-3),
        ("channels", 3, 2, 3e-3), ("channels", 2, 0, 3e-3), ("channels-turned", 4, 1, 3e-3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_attention_over_tiles(kind: str, bits: int, slots: int, limit: float, width: int) -> None:
    from llmsqueeze.ops import kv_attend
    from tests.test_kv_attend import make_case, query_for

    for tokens, padding, sinks, group, window in (
        (3000, None, 0, 4, 0),
        (333, (0, 40), 3, 1, 0),
        (17, (0, 3), 2, 5, 0),
        (1, None, 0, 8, 0),
        (900, (0, 850), 4, 3, 200),
    ):
        for dtype in (torch.bfloat16, torch.float16):
            case = make_case(
                kind, bits, width=width, tokens=tokens, padding=padding, sinks=sinks, slots=slots,
                device="cuda", dtype=dtype,
            )  # fmt: skip
            q = query_for(case, group, dtype)
            given = case.arguments(q, window, width**-0.5)
            found = torch.ops.llmsqueeze.kv_attend(*given)
            expected = kv_attend(q.float(), *given[1:])  # type: ignore[arg-type]
            assert _off(found, expected.double()) < limit + ROUNDING[dtype], (tokens, dtype)
            assert torch.equal(found, torch.ops.llmsqueeze.kv_attend(*given))
            counters = given[11]
            assert isinstance(counters, torch.Tensor) and not bool(counters.any())


@pytest.mark.parametrize(
    ("kind", "bits", "slots", "limit"),
    [("fp8", 8, 0, 3e-3), ("rotated", 4, 0, 3e-3), ("rotated", 3, 0, 3e-3),
     ("channels-turned", 4, 0, 3e-3), ("channels-turned", 4, 1, 3e-3)],
)  # fmt: skip
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 4097, 131072])
def test_any_length_any_group_and_any_number_of_blocks(
    kind: str, bits: int, slots: int, limit: float, width: int, tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As fp32 on what codes stand for; how many blocks share the tokens changes next to nothing."""
    from llmsqueeze.ops import kv_attend, kv_kernels
    from tests.test_kv_attend import make_case, query_for

    case = make_case(
        kind, bits, batch=1, width=width, tokens=tokens, slots=slots, device="cuda", theta=5e5
    )
    for group in (1, 4, 8):
        q = query_for(case, group, torch.bfloat16)
        # Turned keys are rounded to fp16, so that errors grow with scores: here these have a variance of
        # one, as random queries and keys have.
        scores = q.view(1, 2, group, width).float() @ case.keys.float().transpose(2, 3)
        given = case.arguments(q, 0, 1 / float(scores.square().mean().sqrt()))
        expected = kv_attend(q.float(), *given[1:]).double()  # type: ignore[arg-type]
        found = []
        for splits in (1, 33):
            monkeypatch.setattr(kv_kernels, "_splits", lambda *a, splits=splits: splits)
            assert _off(torch.ops.llmsqueeze.kv_attend(*given), expected) < limit, (group, splits)
            # In bf16 a value that goes to the other side of a rounding would be more than what is asked.
            found.append(torch.ops.llmsqueeze.kv_attend(q.half(), *given[1:]))
        assert _off(found[0], found[1].double()) < 1e-3, group


@pytest.mark.parametrize(
    ("kind", "bits"), [("fp8", 8), ("rotated", 4), ("channels", 4), ("channels", 3)]
)
def test_equal_values_come_back(kind: str, bits: int) -> None:
    """Whatever their weights are, these add up to one."""
    from llmsqueeze.numerics import kv_tiles
    from tests.test_kv_attend import make_case, query_for

    case = make_case(kind, bits, batch=1, width=128, tokens=3000, device="cuda")
    keys, values = kv_tiles.read(case.tiles, case.format, 3000)
    same = tuple(part[:, :, :1].expand_as(part).contiguous() for part in values)
    kv_tiles.write(case.tiles, case.format, 0, keys, same)
    given = case.arguments(query_for(case, 4, torch.float16), 0, 128**-0.5)
    together = torch.ops.llmsqueeze.kv_attend(*given)
    case.length.fill_(1)  # with one token there is nothing to weigh
    assert _off(together, torch.ops.llmsqueeze.kv_attend(*given).double()) < 2e-3


def test_a_graph_attends_over_a_cache_that_grows() -> None:
    from llmsqueeze.numerics import kv_tiles
    from llmsqueeze.ops import kv_attend
    from tests.test_kv_attend import make_case, query_for

    case = make_case("channels", 4, width=128, tokens=100, sinks=1, slots=1, device="cuda")
    q = query_for(case, 4, torch.bfloat16)
    given = case.arguments(q, 0, 0.1)
    torch.ops.llmsqueeze.kv_attend(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.llmsqueeze.kv_attend(*given)
    parts = kv_tiles.read(case.tiles, case.format, 100)
    for count in (5, 16, 99, 100):
        case.length.fill_(count)
        case.tiles.zero_()
        some = [tuple(p[:, :, :count] for p in side) for side in parts]
        kv_tiles.write(case.tiles, case.format, torch.tensor([0]).cuda(), *some)
        graph.replay()
        assert _off(y, kv_attend(q.float(), *given[1:]).double()) < 5e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("case", range(12))
def test_tokens_are_coded_into_tiles_as_on_the_cpu(case: int) -> None:
    from llmsqueeze.numerics.kv_tiles import TileFormat, read, read_fields
    from tests.test_kv_append import CASES, COUNT, HEADS, codecs, constants, one_by_one

    kind, bits, width, slots = CASES[case]
    keys, values = codecs(kind, bits, width, slots)
    rotary = width if keys.pre_rope else 0
    format = TileFormat.of(keys, values, width, rotary)
    assert format is not None
    key, value = torch.randn(2, 2, HEADS, COUNT, width).bfloat16()
    padding = torch.tensor([0, 5], dtype=torch.int32)
    found = []
    for device in ("cpu", "cuda"):
        tiles = format.empty(2, HEADS, COUNT, torch.device(device))
        known = constants(keys, values, format, tiles.shape[2], device)
        sinks = torch.zeros(2, 2, HEADS, 4, width, device=device).bfloat16()
        one_by_one(
            key.to(device), value.to(device), tiles, format, known, padding.to(device),
            (sinks[0], sinks[1]),
        )  # fmt: skip
        found.append((tiles.cpu(), sinks.cpu()))
    # Several at a time, as of a prompt: the same bytes.
    for step in (COUNT, 14):
        several, again = torch.zeros_like(tiles), torch.zeros_like(sinks)
        one_by_one(
            key.cuda(), value.cuda(), several, format, known, padding.cuda(), (again[0], again[1]),
            step=step,
        )  # fmt: skip
        assert torch.equal(several, tiles) and torch.equal(again, sinks)
    assert torch.equal(found[0][1], found[1][1])
    fields = [read_fields(tiles, format) for tiles, _ in found]
    # Computed in fp32 instead of fp64: what lies at a border may be coded to either side.
    assert float((fields[0].keys != fields[1].keys).float().mean()) < 4e-3
    # Of outliers as far from the middle as one another either may be taken: what comes back is as near.
    exact = value.double()
    decoded = [
        values.decode(read(tiles, format, COUNT)[1], width, torch.float64) for tiles, _ in found
    ]
    errors = [float((d - exact).norm()) for d in decoded]
    assert abs(errors[0] - errors[1]) < 0.02 * errors[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize(
    "name", ["fp8", "rotate:4", "rotate:3", "kvquant:4", "kvquant:3", "plain:4"]
)
def test_a_cache_in_tiles_decodes_in_a_graph(name: str) -> None:
    from llmsqueeze.evaluate import cache_options
    from llmsqueeze.runtime.generate import Decoder, fixed_cache
    from llmsqueeze.runtime.kv_cache import packed_cache
    from tests.test_tiles import PROMPT, format_of, stepwise, wide_model

    torch._dynamo.reset()  # generate compiles; what other tests compiled counts towards a limit
    model = wide_model().to(torch.float16).cuda()
    calibrated = name.partition(":")[0] in ("kvquant", "plain")
    formats = dict.fromkeys(
        range(model.config.num_hidden_layers), format_of(name, 2 if calibrated else 0)
    )
    formats = {layer: format.to(torch.device("cuda")) for layer, format in formats.items()}
    ids = PROMPT.cuda()
    with torch.no_grad():
        exact = model(ids[None]).logits[0].float()
    expected = stepwise(model, packed_cache(model, formats), ids).float()
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 64, formats=formats)
    decoder.cache.reset()
    found = stepwise(model, decoder.cache, ids).float()
    # A number at the border of two codes may be given either, and feedback then codes the rest otherwise, as
    # well: what was lost is compared.
    lost = float((expected - exact).norm())
    assert float((found - exact).norm()) < 1.3 * lost + 0.002 * float(exact.norm())
    twice = [[int(token) for token in decoder.generate(PROMPT, 12)] for _ in range(2)]
    assert twice[0] == twice[1] and twice[0][0] == int(exact[-1].argmax())
    options = {"do_sample": False, "eos_token_id": None}
    options |= cache_options(model, fixed_cache(model, 64, formats))
    generated = model.generate(ids[None], max_new_tokens=12, **options)[0, len(ids) :]
    assert generated[:3].tolist() == twice[0][:3]
    compiled = Decoder(model, 64, compiled=True, formats=formats)
    assert [int(token) for token in compiled.generate(PROMPT, 12)][:3] == twice[0][:3]


@pytest.mark.parametrize(
    ("kind", "bits", "slots", "limit"),
    [("fp8", 8, 0, 1e-3), ("rotated", 3, 0, 1e-3), ("channels", 4, 1, 3e-3), ("channels-turned", 3, 0, 3e-3)],
)  # fmt: skip
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_a_window_over_a_ring_of_tiles(
    kind: str, bits: int, slots: int, limit: float, width: int
) -> None:
    from llmsqueeze.ops import kv_attend
    from llmsqueeze.ops.packed_attention import ring_tiles
    from tests.test_kv_attend import make_case, query_for

    for tokens, window, padding, group in (
        (3000, 1024, None, 4), (3001, 1000, (0, 2500), 1), (40, 100, None, 8), (333, 17, (3, 320), 5),
        (97, 1, None, 2), (2049, 2048, None, 3),
    ):  # fmt: skip
        case = make_case(
            kind, bits, width=width, tokens=tokens, padding=padding, sinks=2, slots=slots,
            ring=ring_tiles(window), spare=256, device="cuda",
        )  # fmt: skip
        q = query_for(case, group, torch.bfloat16)
        for skip in (0.0, 50.0):
            given = (*case.arguments(q, window, width**-0.5), skip)
            found = torch.ops.llmsqueeze.kv_attend(*given)
            expected = kv_attend(q.float(), *given[1:])  # type: ignore[arg-type]
            assert _off(found, expected.double()) < limit + ROUNDING[torch.bfloat16], (tokens, skip)
            assert torch.equal(found, torch.ops.llmsqueeze.kv_attend(*given))
            counters = given[11]
            assert isinstance(counters, torch.Tensor) and not bool(counters.any())


@pytest.mark.parametrize(
    ("kind", "bits", "slots"),
    [("fp8", 8, 0), ("rotated", 4, 0), ("channels", 4, 0), ("channels", 4, 1), ("channels", 3, 1)],
)
def test_attention_leaves_out_what_weighs_too_little(kind: str, bits: int, slots: int) -> None:
    import math

    from tests.test_kv_attend import make_case, peaked, query_for

    case = make_case(
        kind, bits, width=128, tokens=9000, slots=slots, sinks=2, device="cuda", spare=64
    )
    q = peaked(case, query_for(case, 4, torch.bfloat16), 40.0)
    given = case.arguments(q, 0, 128**-0.5)
    whole = torch.ops.llmsqueeze.kv_attend(*given)
    largest = float(case.values.abs().max())
    # Another kernel: a rounding may go the other way.
    assert _off(torch.ops.llmsqueeze.kv_attend(*given, 1e4), whole.double()) < 1e-3
    for skip in (4.0, 8.0, 12.0, 16.0):
        found = torch.ops.llmsqueeze.kv_attend(*given, skip)
        assert all(
            torch.equal(found, torch.ops.llmsqueeze.kv_attend(*given, skip)) for _ in range(5)
        )
        bound = 2 * largest * min(1.0, 9000 * math.exp(-skip)) + 0.02 * largest
        assert float((found.double() - whole.double()).abs().max()) < bound
    q[:] = torch.nan
    y = torch.ops.llmsqueeze.kv_attend(q, *given[1:], 8.0)
    assert bool(y.isnan().all())


@pytest.mark.parametrize("case", range(12))
def test_tokens_are_coded_into_a_ring_as_on_the_cpu(case: int) -> None:
    """But for what a rounding changes, and for nothing where two outliers are as large."""
    from llmsqueeze.numerics.kv_tiles import TileFormat, read_fields
    from tests.test_kv_append import CASES, COUNT, HEADS, codecs, constants, one_by_one

    kind, bits, width, slots = CASES[case]
    keys, values = codecs(kind, bits, width, slots)
    format = TileFormat.of(keys, values, width, width if keys.pre_rope else 0)
    assert format is not None
    generator = torch.Generator().manual_seed(case)
    key, value = torch.randn(2, 2, HEADS, COUNT, width, generator=generator).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        tiles = format.empty(2, HEADS, 32, torch.device(device))
        known = constants(keys, values, format, 4, device)
        one_by_one(key.to(device), value.to(device), tiles, format, known, window=16)
        found.append(read_fields(tiles.cpu(), format))
    several = torch.zeros_like(tiles)
    one_by_one(key.cuda(), value.cuda(), several, format, known, window=16, step=15)
    assert torch.equal(several, tiles)
    for one, two in zip(found[0].all()[:2], found[1].all()[:2], strict=True):
        assert float((one != two).float().mean()) < 4e-3
    for name in ("key_channels", "value_channels"):
        one, two = (getattr(fields, name) for fields in found)
        assert not one.numel() or float((one != two).float().mean()) < 0.02


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("name", ["fp8", "rotate:3", "kvquant:4", "plain:4"])
def test_a_ring_of_tiles_decodes_in_a_graph(family: str, name: str) -> None:
    """Far beyond where it begins again."""
    from llmsqueeze.runtime.generate import Decoder
    from llmsqueeze.runtime.kv_cache import packed_cache
    from tests.test_tiles import LONG, formats_for, stepwise, wide_model

    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    model = wide_model(family, max_position_embeddings=256).to(torch.float16).cuda()
    formats = {i: f.to(torch.device("cuda")) for i, f in formats_for(model, name).items()}
    ids = LONG.cuda()
    with torch.no_grad():
        exact = model(ids[None]).logits[0].float()
    expected = stepwise(model, packed_cache(model, formats), ids).float()
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 200, formats=formats)
    assert any(layer.tiles.shape[2] == 2 for layer in decoder.cache.layers)
    decoder.cache.reset()
    found = stepwise(model, decoder.cache, ids).float()
    lost = float((expected - exact).norm())
    assert float((found - exact).norm()) < 1.3 * lost + 0.002 * float(exact.norm())
    # The graph's steps are the same ones.
    twice = [[int(token) for token in decoder.generate(LONG[:40], 90)] for _ in range(2)]
    assert twice[0] == twice[1]
    replayed = [layer.tiles.clone() for layer in decoder.cache.layers]
    decoder.cache.reset()
    fed = torch.cat([LONG[:40], torch.tensor(twice[0][:-1])]).cuda()
    options = decoder._options
    with torch.no_grad():
        model(fed[None, :40], **options)
        for i in range(40, len(fed)):
            model(fed[None, i : i + 1], **options)
    for layer, tiles in zip(decoder.cache.layers, replayed, strict=True):
        assert float((layer.tiles != tiles).float().mean()) < 1e-3
    compiled = Decoder(model, 200, compiled=True, formats=formats)
    assert [int(token) for token in compiled.generate(LONG[:40], 20)][:3] == twice[0][:3]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("name", ["fp8", "rotate:4", "kvquant:4"])
def test_padded_rows_and_pieces_over_tiles(family: str, name: str) -> None:
    from llmsqueeze.evaluate import cache_options
    from llmsqueeze.runtime.generate import fixed_cache
    from tests.test_tiles import LONG, formats_for, in_pieces, wide_model

    model = wide_model(family, max_position_embeddings=128).to(torch.float16).cuda()
    formats = {i: f.to(torch.device("cuda")) for i, f in formats_for(model, name).items()}
    rows = [LONG[:41], LONG[20:39], LONG[3:36]]
    ids = torch.stack([torch.nn.functional.pad(row, (41 - len(row), 0)) for row in rows]).cuda()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def answer(ids: torch.Tensor) -> torch.Tensor:
        given = options | cache_options(model, fixed_cache(model, 64, formats))
        found = model.generate(ids, attention_mask=(ids != 0).long(), **given)
        return torch.stack(found.logits, dim=1).float()

    together = answer(ids)
    for row, one in enumerate(rows):
        off = (together[row] - answer(one[None].cuda())[0]).abs().amax(-1)
        assert float(off[0]) < 0.01 and float(off[1]) < 0.03
    with torch.no_grad():
        exact = model(LONG[None].cuda()).logits[0].float()
    cache = fixed_cache(model, 80, formats)
    found = in_pieces(model, cache, LONG.cuda(), (9, 1, 1, 23, 1, 30, 1, 1, 3)).float()
    single = fixed_cache(model, 80, formats)
    ones = in_pieces(model, single, LONG.cuda(), (1,) * 70).float()
    # What a piece sees of itself is not coded yet.
    assert float((found - exact).norm()) < 1.1 * float((ones - exact).norm()) + 0.002 * float(
        exact.norm()
    )
