"""The pictures of the report, each of one question. All of them show numbers that a table beside them has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsqueeze.report import svg
from llmsqueeze.units import size

WIDTH = 920
# Perplexities that differ by more than this are drawn by their logarithm.
LOG_FROM = 8
_NAMES = 108  # room for the names of projections


@dataclass(frozen=True)
class Bar:
    """One measured speed. bound: as fast as bytes allow, both in times dense; note: for the pointer."""

    label: str
    speedup: float
    bound: float
    note: str


def heatmap(
    name: str, title: str, cells: Mapping[tuple[int, str], float], blocks: int,
    write: Callable[[float], str], *, highest: float, label: str,
) -> str:  # fmt: skip
    """Values by block, left to right, and projection, top to bottom; what has no value stays empty.

    highest: the value of the darkest colour; the lightest is 0.
    """
    rows = list(dict.fromkeys(projection for _, projection in cells))
    cell = min(34.0, (WIDTH - _NAMES - 10) / blocks)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * cell >= 22)
    parts = []
    for place, projection in enumerate(rows):
        y = 6 + place * 24
        parts.append(svg.text(_NAMES - 8, y + 15, projection, "end"))
        for block in range(blocks):
            x = _NAMES + block * cell
            value = cells.get((block, projection))
            tip = f"block {block}, {projection}: {'none' if value is None else write(value)}"
            fill = "" if value is None else svg.ramp(value / highest if highest else 0)
            kind = "empty" if value is None else "cell"
            parts.append(svg.box(x, y, cell - 0.5, 22, fill, kind, tip))
    bottom = 6 + len(rows) * 24
    for block in range(0, blocks, every):
        parts.append(svg.text(_NAMES + (block + 0.5) * cell, bottom + 14, str(block), "middle"))
    parts.append(svg.text(_NAMES - 8, bottom + 14, "block", "end", "label"))
    labels = [(share, write(share * highest)) for share in (0, 0.25, 0.5, 0.75, 1)]
    parts.append(svg.scale_bar(f"{name}-scale", _NAMES, bottom + 34, 300, svg.ramp, labels, label))
    least, most = (pick(cells.items(), key=lambda item: item[1]) for pick in (min, max))
    description = (
        f"{label}, of {blocks} blocks and {len(rows)} projections. "
        f"Least {write(least[1])} in block {least[0][0]}, {least[0][1]}; "
        f"most {write(most[1])} in block {most[0][0]}, {most[0][1]}."
    )
    return svg.picture(name, title, description, WIDTH, bottom + 66, "".join(parts))


def threshold_curves(name: str, activation: Mapping[str, Any], blocks: int) -> str:
    """The stored quantile curves of all gates, a panel for each place in a block, and what was chosen."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for gate in activation["gates"]:
        panels.setdefault(gate["projection"], []).append(gate)
    across, wide, high = 2, WIDTH / 2, 262
    parts = []
    for place, gates in enumerate(panels.values()):
        left, top = (place % across) * wide + 76, (place // across) * high + 30
        parts.append(
            _panel(gates, activation["curve_step"], blocks, left, top, wide - 92, high - 84)
        )
    bottom = -(-len(panels) // across) * high
    if blocks > 1:
        labels = [(0.0, "0"), (1.0, str(blocks - 1))]
        parts.append(
            svg.scale_bar(
                f"{name}-scale", 76, bottom + 8, 200,
                lambda share: svg.depth_colour(round(share * 10), 11), labels, "block",
            )
        )  # fmt: skip
    chosen = [gate["sparsity"] for gate in activation["gates"]]
    description = (
        f"Thresholds of {len(chosen)} gates against the share of inputs they drop, by the logarithm. "
        f"Dots are what was chosen, {min(chosen):.0%} to {max(chosen):.0%}."
    )
    return svg.picture(name, "Threshold curves", description, WIDTH, bottom + 42, "".join(parts))


def _panel(
    gates: list[dict[str, Any]], step: float, blocks: int, left: float, top: float, width: float,
    height: float,
) -> str:  # fmt: skip
    members = ", ".join(member.rpartition(".")[2] for member in gates[0]["members"])
    heading = f"{'input' if gates[0]['kind'] == 'input' else 'output'} of {gates[0]['projection']}"
    if members != gates[0]["projection"]:
        heading += f" ({members})" if gates[0]["kind"] == "input" else f" (into {members})"
    x = svg.Axis(0, (len(gates[0]["curve"]) - 1) * step, left, left + width)
    positive = [value for gate in gates for value in gate["curve"] if value > 0]
    parts = [svg.text(left, top - 10, heading, kind="heading")]
    if not positive:
        return parts[0] + svg.text(left, top + 20, "all its inputs are zeros")
    low = max(min(positive), max(positive) * 1e-5)
    y = svg.Axis(low / 1.2, max(positive) * 1.2, top + height, top, log=True)
    parts.append(svg.across(x, top, top + height, "share of inputs dropped", _percent))
    parts.append(svg.upright(y, left, left + width, "threshold of |x|·scale", _short))
    marks = []
    for gate in gates:
        colour = svg.depth_colour(gate["block"] or 0, blocks)
        points = [(i * step, v) for i, v in enumerate(gate["curve"]) if v >= low]
        parts.append(svg.path([(x.at(a), y.at(b)) for a, b in points], colour, gate["name"]))
        if gate["threshold"] >= low:
            tip = f"{gate['name']}: {gate['sparsity']:.1%} at {gate['threshold']:.3g}"
            at = x.at(gate["sparsity"]), y.at(gate["threshold"])
            marks.append(svg.dot(*at, 3.5, colour, "mark", tip))
    return "".join([*parts, *marks])


def perplexity(name: str, results: Sequence[Mapping[str, Any]], key: str, label: str) -> str:
    """Perplexity against bytes. results: of eval, all with the same settings; key: size_bytes or
    bytes_per_token."""
    dense = dense_points(results, key)
    mine = [r for r in results if not is_dense(r)]
    shown = [(r["document"][key], r["document"]["token_ppl"]) for r in mine]
    every = [ppl for _, ppl in shown] + [ppl for _, ppl, _ in dense]
    left, top, right, bottom = 84.0, 14.0, WIDTH - 16.0, 330.0
    x = svg.axis_over([b for b, _ in shown] + [b for b, _, _ in dense if b], left, right)
    if max(every) > LOG_FROM * min(every):
        y = svg.Axis(min(every) / 1.25, max(every) * 1.25, bottom, top, log=True)
    else:
        y = svg.axis_over(every, bottom, top, zero=False, room=0.12)
    parts = [
        svg.across(x, top, bottom, label, lambda value: size(round(value)).replace(".0 ", " ")),
        svg.upright(y, left, right, "perplexity, logarithmic" if y.log else "perplexity", _short),
    ]
    labelled, lines = [], []
    for amount, ppl, title in dense:
        at = y.at(ppl)
        parts.append(svg.line(left, at, right, at, "dense"))
        lines.append((left, at - 2, right, at + 2))
        if amount:
            parts.append(_diamond(x.at(amount), at, f"{title}: {ppl:.4g}"))
            labelled.append((x.at(amount), at, f"{title} (dense)"))
    for result, (amount, ppl) in zip(mine, shown, strict=True):
        failed = any(c["failed"] for c in result["document"].get("conditions", []))
        tip = f"{short(result)}: {ppl:.4g} at {size(amount)}" + (", failed" if failed else "")
        draw = _cross if failed else _round
        parts.append(draw(x.at(amount), y.at(ppl), tip))
        labelled.append((x.at(amount), y.at(ppl), short(result)))
    parts.append(svg.place_labels(labelled, (left, top, right, bottom), lines))
    best = min(shown, key=lambda point: point[1])
    description = (
        f"{len(shown)} compressed checkpoints; least perplexity {best[1]:.4g} at {size(best[0])}. "
        + " ".join(f"Dense {ppl:.4g}." for _, ppl, _ in dense)
    )
    title = f"Perplexity against {label}"
    return svg.picture(name, title, description, WIDTH, bottom + 46, "".join(parts))


def dense_points(
    results: Sequence[Mapping[str, Any]], key: str
) -> list[tuple[float | None, float, str]]:
    """Bytes, if known, perplexity and name of the dense models that results were compared with."""
    found: dict[float, tuple[float | None, float, str]] = {}
    for result in results:
        document = result["document"]
        if is_dense(result):
            found[document["token_ppl"]] = (document[key], document["token_ppl"], short(result))
        elif "dense_token_ppl" in document:
            ppl = document["dense_token_ppl"]
            title = document.get("against", "dense").rstrip("/").rpartition("/")[2]
            if found.get(ppl, (None,))[0] is None:
                found[ppl] = (document.get(f"dense_{key}"), ppl, title)
    return list(found.values())


def is_dense(result: Mapping[str, Any]) -> bool:
    """Whether a result of eval is of a checkpoint that nobody compressed, its cache neither."""
    document = result["document"]
    return document["manifest_sha256"] is None and "kv_cache" not in document


def short(result: Mapping[str, Any]) -> str:
    """What to call the checkpoint of a result."""
    return str(result["label"]).removeprefix(result["kind"]).strip()


def speeds(name: str, title: str, bars: Sequence[Bar]) -> str:
    """Measured speeds as bars from zero, with dense as a line and the bound of each as a mark."""
    longest = max(svg.LETTER * len(bar.label) for bar in bars)
    left, right, top = min(longest + 16, 300), WIDTH - 150.0, 26.0
    bottom = top + 26 * len(bars)
    highest = max(max(bar.speedup, bar.bound) for bar in bars)
    x = svg.axis_over([1.0, highest], left, right)
    parts = [svg.across(x, top, bottom, "times as fast as dense", lambda value: f"{value:g}")]
    for place, bar in enumerate(bars):
        y = top + place * 26 + 4
        slower = "slower" if bar.speedup < 1 else "bar"
        parts.append(svg.text(left - 8, y + 13, bar.label, "end"))
        parts.append(svg.box(left, y, x.at(bar.speedup) - left, 18, kind=slower, tip=bar.note))
        parts.append(
            svg.box(x.at(bar.bound) - 1.5, y - 2, 3, 22, kind="bound", tip="bound by bytes")
        )
        share = f"{bar.speedup:.2f} of {bar.bound:.2f}"
        parts.append(svg.text(right + 12, y + 13, f"{share} ({bar.speedup / bar.bound:.0%})"))
    parts.append(svg.line(x.at(1), top - 6, x.at(1), bottom, "dense"))
    parts.append(svg.text(x.at(1), top - 11, "dense", "middle"))
    best = max(bars, key=lambda bar: bar.speedup)
    description = (
        f"{len(bars)} speeds; fastest {best.label}, {best.speedup:.2f} times dense where bytes allow "
        f"{best.bound:.2f}."
    )
    return svg.picture(name, title, description, WIDTH, bottom + 46, "".join(parts))


def _round(x: float, y: float, tip: str) -> str:
    return svg.dot(x, y, 5.5, kind="point", tip=tip)


def _diamond(x: float, y: float, tip: str) -> str:
    turn = f'<g transform="translate({x:.1f} {y:.1f}) rotate(45)">'
    return f"{turn}{svg.box(-5, -5, 10, 10, kind='reference', tip=tip)}</g>"


def _cross(x: float, y: float, tip: str) -> str:
    turn = f'<g transform="translate({x:.1f} {y:.1f}) rotate(45)">'
    bars = svg.box(-7.5, -2, 15, 4, kind="bad", tip=tip) + svg.box(-2, -7.5, 4, 15, kind="bad")
    return f"{turn}{bars}</g>"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
