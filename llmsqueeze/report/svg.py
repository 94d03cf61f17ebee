"""Pictures by hand: axes, marks and labels as SVG text. Colours are CSS variables of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

FONT = 12
# Of a letter of the page's sans-serif at FONT; a little wide, so that labels rather have room left.
LETTER = 6.6

# Lightness falls all the way, so that it reads in print and for every kind of colour vision.
_RAMP = ("#fff7d6", "#b5dfb9", "#4fb3bf", "#2273b5", "#14245f")
# From the first block to the last: two hues that every kind of colour vision tells apart, and both
# readable on white and on black.
_DEPTH = ("#0a7fc2", "#8b8b8b", "#e08a00")


@dataclass(frozen=True)
class Axis:
    """Maps values to places. low, high: values; start, end: where they lie; log: by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(value) - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values on it, four to nine of them."""
        if self.log and self.high > 4 * self.low:
            return _log_ticks(self.low, self.high)
        step = nice((self.high - self.low) / 6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [count * step for count in range(first, last + 1)]


def axis_over(
    values: Sequence[float], start: float, end: float, *, zero: bool = True, room: float = 0.06
) -> Axis:
    """An axis that holds all values, and zero if asked to: from a round number to a little beyond."""
    low, high = (0.0 if zero else min(values)), max(values)
    if not high > low:
        low, high = low - (0 if zero else 1), high + 1
    margin = (high - low) * room
    return Axis(low if zero else low - margin, high + margin, start, end)


def nice(step: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `step`."""
    power = 10 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= step * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors]
        ticks = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(ticks) <= 9:
            return ticks
    return ticks[:: -(-len(ticks) // 9)]


def ramp(share: float) -> str:
    """The colour of a value between 0 and 1, light to dark."""
    return _between(_RAMP, share)


def depth_colour(index: int, count: int) -> str:
    """The colour of one of `count` blocks."""
    return _between(_DEPTH, index / max(1, count - 1))


def _between(stops: Sequence[str], share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    pairs = zip(_channels(stops[left]), _channels(stops[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - left)):02x}" for a, b in pairs)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def picture(name: str, title: str, description: str, width: float, height: float, body: str) -> str:
    """A whole SVG. name: unique on the page; title and description are what a screen reader reads."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-labelledby="{name}-t {name}-d"><title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(description)}</desc>{body}</svg>'
    )


def text(
    x: float, y: float, content: str, anchor: str = "start", kind: str = "", turn: float = 0
) -> str:
    """anchor: start, middle or end; kind: a CSS class; turn: degrees."""
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    named = f' class="{kind}"' if kind else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{turned}>'
        f"{escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def box(
    x: float, y: float, width: float, height: float, fill: str = "", kind: str = "", tip: str = ""
) -> str:
    """fill: a colour, or kind: a CSS class; tip: what the pointer finds on it."""
    named = f' class="{kind}"' if kind else ""
    filled = f' fill="{fill}"' if fill else ""
    shape = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{named}{filled}'
    )
    return f"{shape}><title>{escape(tip)}</title></rect>" if tip else f"{shape}/>"


def dot(x: float, y: float, radius: float, fill: str = "", kind: str = "", tip: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    filled = f' fill="{fill}"' if fill else ""
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"{named}{filled}>{inner}</circle>'


def path(points: Sequence[tuple[float, float]], colour: str, tip: str = "") -> str:
    """A line through points."""
    if not points:
        return ""
    way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<path d="{way}" class="curve" stroke="{colour}">{inner}</path>'


def across(axis: Axis, top: float, bottom: float, label: str, write: Callable[[float], str]) -> str:
    """A horizontal axis at `bottom`, with grid lines up to `top`."""
    parts = [line(axis.start, bottom, axis.end, bottom, "axis")]
    for tick in axis.ticks:
        x = axis.at(tick)
        parts.append(line(x, top, x, bottom, "grid") + text(x, bottom + 17, write(tick), "middle"))
    parts.append(text((axis.start + axis.end) / 2, bottom + 36, label, "middle", "label"))
    return "".join(parts)


def upright(
    axis: Axis, left: float, right: float, label: str, write: Callable[[float], str]
) -> str:
    """A vertical axis at `left`, with grid lines to `right`."""
    parts = [line(left, axis.start, left, axis.end, "axis")]
    for tick in axis.ticks:
        y = axis.at(tick)
        parts.append(line(left, y, right, y, "grid") + text(left - 7, y + 4, write(tick), "end"))
    parts.append(text(left - 52, (axis.start + axis.end) / 2, label, "middle", "label", -90))
    return "".join(parts)


def scale_bar(
    name: str, x: float, y: float, width: float, colour: Callable[[float], str],
    labels: Sequence[tuple[float, str]], label: str,
) -> str:  # fmt: skip
    """What the colours of a picture mean. labels: a share of the bar's length, and what stands there."""
    stops = "".join(f'<stop offset="{i * 10}%" stop-color="{colour(i / 10)}"/>' for i in range(11))
    parts = [
        f'<defs><linearGradient id="{name}">{stops}</linearGradient></defs>',
        box(x, y, width, 10, f"url(#{name})", "edge"),
        *(text(x + share * width, y + 25, written, "middle") for share, written in labels),
        text(x + width + 24, y + 10, label, kind="label"),
    ]
    return "".join(parts)


def place_labels(
    points: Sequence[tuple[float, float, str]], area: tuple[float, float, float, float],
    taken: Sequence[tuple[float, float, float, float]] = (),
) -> str:  # fmt: skip
    """Labels beside points so that none covers another, a point or what is taken.

    area, taken: left, top, right, bottom. A label that had to move away is tied to its point by a line.
    """
    left, top, right, bottom = area
    used = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in points] + list(taken)
    parts = []
    for x, y, label in points:
        width = LETTER * len(label)
        for offset, side in _TRIES:
            start = x + 10 if side > 0 else x - 10 - width if side < 0 else x - width / 2
            rect = (start, y + offset - FONT * 0.8, start + width, y + offset + FONT * 0.45)
            inside = rect[0] >= left and rect[2] <= right and rect[1] >= top and rect[3] <= bottom
            if inside and not any(_overlap(rect, other) for other in used):
                break
        else:
            # No place is free: the point keeps its tip and its line in the table below.
            continue
        used.append(rect)
        if abs(offset) > 10:
            end = rect[0] - 2 if side > 0 else rect[2] + 2 if side < 0 else x
            parts.append(line(x, y, end, y + offset, "lead"))
        parts.append(text(start, y + offset + 3, label))
    return "".join(parts)


# Where a label may stand: so far below its point, on the right (1), on the left (-1), or centred.
_TRIES = [
    (offset, side)
    for distance in (0, 15, 30, 45, 60, 80, 100, 130)
    for offset in (distance, -distance)
    for side in ((1, -1) if distance < 15 else (1, -1, 0))
]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
