"""The report as one HTML page that needs nothing else: no scripts, no fonts, no other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from llmsqueeze.report import pictures, svg, tiles
from llmsqueeze.report.pictures import Bar
from llmsqueeze.report.text import (
    clean,
    comparable,
    device_of,
    extra_figures,
    failures,
    headline,
    number,
    printable,
    result_facts,
    share,
    step_line,
    task_rows,
)
from llmsqueeze.units import size

_STYLE = f"""
:root{{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--grid:#dfe3e8;--card:#f5f7f9;
--point:#0072b2;--bad:#c3420a;--good:#00704f;--bound:#1b1f24}}
@media (prefers-color-scheme:dark){{:root{{--paper:#14171b;--ink:#e8eaed;--soft:#a5adb8;--grid:#343a42;
--card:#1d2127;--point:#4da8dd;--bad:#f0855a;--good:#46c79a;--bound:#fff}}}}
@media print{{:root{{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--grid:#ccc;--card:#fff;
--point:#0072b2;--bad:#c3420a;--good:#00704f;--bound:#000}}
body{{padding:0}}svg{{min-width:0!important}}.scroll{{overflow:visible!important}}
figure,tr,.cards{{break-inside:avoid}}h2,h3{{break-after:avoid}}
.cell,.bar,.slower,.tiles,.edge{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:24px 20px 60px;max-width:1000px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}}
h1{{font-size:26px;margin:0 0 4px}}h2{{font-size:20px;margin:40px 0 8px;border-bottom:1px solid var(--grid);
padding-bottom:4px}}h3{{font-size:16px;margin:26px 0 6px}}
p{{margin:6px 0;max-width:75ch}}.soft{{color:var(--soft)}}
.verdict{{font-size:17px;font-weight:600}}.passed{{color:var(--good)}}.failed{{color:var(--bad)}}
.cards{{display:flex;flex-wrap:wrap;gap:10px;margin:12px 0}}
.cards div{{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:8px 14px;
min-width:140px}}
.cards dt{{font-size:12px;color:var(--soft)}}.cards dd{{margin:0;font-size:19px;font-weight:600}}
.cards dd+dd{{font-size:12px;font-weight:400;color:var(--soft)}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:13px;margin:8px 0}}caption{{text-align:left;color:var(--soft);
padding-bottom:4px}}
th,td{{padding:3px 12px 3px 0;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top;
font-variant-numeric:tabular-nums}}
td.n,th.n{{text-align:right}}td.n,td span{{white-space:nowrap}}
th{{font-weight:600}}tbody th{{font-weight:400}}
figure{{margin:16px 0}}figcaption{{font-weight:600;font-size:14px}}figcaption span{{font-weight:400;
color:var(--soft)}}
details{{margin:6px 0}}summary{{cursor:pointer;color:var(--soft);font-size:13px}}
pre{{background:var(--card);padding:10px 12px;border-radius:6px;font-size:12px;overflow-x:auto}}
svg{{display:block;width:100%;min-width:720px;height:auto;font-size:{svg.FONT}px}}
svg text{{fill:var(--ink)}}svg .label{{fill:var(--soft)}}svg .heading{{font-weight:600}}
.axis{{stroke:var(--soft)}}.grid{{stroke:var(--grid)}}.lead{{stroke:var(--soft);stroke-width:.7}}
.dense{{stroke:var(--ink);stroke-dasharray:5 4;stroke-width:1.3}}
.curve{{fill:none;stroke-width:1.2;opacity:.75}}.mark{{stroke:var(--paper);stroke-width:1}}
.point{{fill:var(--point);stroke:var(--paper)}}.reference{{fill:var(--ink)}}.bad{{fill:var(--bad)}}
.bar{{fill:var(--point)}}.slower{{fill:var(--bad)}}.bound{{fill:var(--bound);stroke:var(--paper)}}
.empty{{fill:none;stroke:var(--grid);stroke-dasharray:2 2}}.edge{{stroke:var(--grid)}}
img.tiles{{image-rendering:pixelated;display:block;border:1px solid var(--grid)}}
.key i{{display:inline-block;width:12px;height:12px;margin:0 5px 0 14px;border:1px solid var(--grid);
vertical-align:-1px}}
.maps td{{padding:3px 10px 3px 0}}
"""


def page(report: Mapping[str, Any]) -> str:
    """The whole page, of a report as schema.REPORT_SCHEMA describes it."""
    names = [c["label"] for c in report["checkpoints"]] or list(
        dict.fromkeys(pictures.short(r) for r in report["results"])
    )
    title = "llmsqueeze report: " + ", ".join(names)
    parts = [
        f"<h1>{escape(', '.join(names))}</h1>",
        f'<p class="soft">llmsqueeze {escape(report["tool_version"])}, schema '
        f"{escape(report['schema'])}</p>",
        _verdict(report),
        _conditions(report),
        _quality(report),
        _speed(report),
        *(_checkpoint(report, index) for index in range(len(report["checkpoints"]))),
        _results(report),
    ]
    return printable(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body></html>\n"
    )


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", text: int = 1
) -> str:
    """Cells are HTML already. The first is the row's name; columns from `text` on hold numbers."""
    kinds = ["" if place < text else ' class="n"' for place in range(len(head))]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(head, kinds, strict=True)
    )
    body = ""
    for row in rows:
        rest = zip(row[1:], kinds[1:], strict=True)
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in rest)
        body += f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{named}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(title: str, note: str, drawing: str, table: str = "") -> str:
    """A picture, what it shows, and its numbers behind a click."""
    behind = f"<details><summary>as a table</summary>{table}</details>" if table else ""
    return (
        f"<figure><figcaption>{escape(title)} <span>{escape(note)}</span></figcaption>"
        f'<div class="scroll">{drawing}</div>{behind}</figure>'
    )


def _verdict(report: Mapping[str, Any]) -> str:
    kind = "failed" if report["failed"] else "passed" if clean(report) else "soft"
    parts = [f'<p class="verdict {kind}">{escape(headline(report))}</p>']
    parts += [f"<p>{escape(message)}</p>" for message in failures(report)]
    parts += [f'<p class="soft">Warning: {escape(message)}</p>' for message in report["warnings"]]
    return "".join(parts)


def _conditions(report: Mapping[str, Any]) -> str:
    tables = []
    if report["conditions"]:
        rows = [
            [
                escape(c["of"]), escape(c["fail_if"]),
                "not measured" if c["value"] is None else escape(number(c["value"])),
                _status("failed" if c["failed"] else "passed"),
            ]
            for c in report["conditions"]
        ]  # fmt: skip
        tables.append(_table(["of", "fails if", "measured", ""], rows, text=2))
    if report["checks"]:
        rows = [
            [escape(c["of"]), escape(c["name"]), escape(c["detail"]), _status(c["status"])]
            for c in report["checks"]
        ]
        tables.append(_table(["of", "promise", "measured", ""], rows, text=4))
    return "<h2>Conditions and promises</h2>" + "".join(tables) if tables else ""


def _status(status: str) -> str:
    sign = {"passed": "✓ ", "failed": "✗ "}.get(status, "")
    return f'<span class="{status.replace(" ", "-")}">{sign}{escape(status)}</span>'


def _quality(report: Mapping[str, Any]) -> str:
    found = [r for r in report["results"] if r["kind"] == "eval"]
    if not found:
        return ""
    parts = ["<h2>Quality</h2>"]
    for place, group in enumerate(comparable(found)):
        first = group[0]["document"]
        parts.append(
            f"<p>token_ppl@{first['seqlen']} of {first['tokens']} predictions in {first['windows']} windows "
            f"of {escape(first['text'])}, {escape(first['dtype'])}"
            f"{', after a beginning-of-text token' if first['bos'] else ''}.</p>"
        )
        rows = [[escape(pictures.short(r)), *map(escape, result_facts(r))] for r in group]
        head = ["", "perplexity", "times dense", "file", "read per token", "inputs dropped",
                "KV bits", "keys found"]  # fmt: skip
        used = [i for i in range(8) if i < 2 or any(row[i] for row in rows)]
        table = _table([head[i] for i in used], [[row[i] for i in used] for row in rows])
        if not all(map(pictures.is_dense, group)):
            for key, label in (
                ("size_bytes", "file size"),
                ("bytes_per_token", "bytes read per token"),
            ):
                drawing = pictures.perplexity(f"ppl{place}-{key}", group, key, label)
                note = (
                    "nearer to the lower left is better; dashed: dense; a cross: a condition failed"
                )
                parts.append(_figure(f"Perplexity against {label}.", note, drawing))
        parts.append(table)
    for result in found:
        for section, tasks in task_rows(result["document"]).items():
            names = list(dict.fromkeys(n for figures in tasks.values() for n in figures))
            rows = [
                [escape(task), *(number(f[n]) if n in f else "" for n in names)]
                for task, f in tasks.items()
            ]
            caption = f"{pictures.short(result)}: {section}"
            parts.append(_table(["", *names], rows, caption=caption))
    return "".join(parts)


def _speed(report: Mapping[str, Any]) -> str:
    models = [r for r in report["results"] if r["kind"] == "bench model"]
    parts = []
    if models:
        bars = [_model_bar(r) for r in models]
        rows = [
            [
                escape(bar.label), f"{1e3 / d['dense']['ms_per_token']:.1f}",
                f"{1e3 / d['compressed']['ms_per_token']:.1f}", f"{bar.speedup:.2f}",
                f"{bar.bound:.2f}", size(d["dense"]["bytes_per_token"]),
                size(d["compressed"]["bytes_per_token"]), f"{d['same_tokens']} of {d['tokens']}",
                f"{escape(device_of(d))}, {d['prompt']} tokens of prompt, "
                f"{'compiled' if d['compiled'] else 'not compiled'}",
            ]
            for bar, d in zip(bars, (r["document"] for r in models), strict=True)
        ]  # fmt: skip
        head = ["", "tokens/s dense", "tokens/s", "speed-up", "bound", "read dense", "read",
                "same tokens", "on"]  # fmt: skip
        note = "bars: measured; upright marks: as fast as the bytes that are read allow"
        drawing = pictures.speeds("speed-models", "Decoding against its bound", bars)
        parts.append(_figure("Decoding, whole models.", note, drawing, _table(head, rows)))
    for place, result in enumerate(r for r in report["results"] if r["kind"] == "bench kernels"):
        document = result["document"]
        shapes: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
        for row in document["rows"]:
            shapes.setdefault((row["rows"], row["columns"], row["tokens"]), []).append(row)
        for (down, across, tokens), members in shapes.items():
            title = f"{down} × {across}, {tokens} token{'s' * (tokens > 1)}"
            parts.append(
                _kernels(f"speed{place}-{down}-{across}-{tokens}", title, document, members)
            )
    return "<h2>Speed</h2>" + "".join(parts) if parts else ""


def _model_bar(result: Mapping[str, Any]) -> Bar:
    d = result["document"]
    note = (
        f"{d['compressed']['ms_per_token']:.3f} ms a token, dense {d['dense']['ms_per_token']:.3f}"
    )
    return Bar(pictures.short(result), d["speedup"], d["bound"], note)


def _kernels(
    name: str, title: str, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> str:
    bars = [
        Bar(r["kernel"], r["speedup"], r["bound"], f"{r['microseconds']:.2f} µs")
        for r in rows
        if r["kernel"] != "dense"
    ]
    table = _table(
        ["kernel", "µs", "GB/s", "speed-up", "bound", "of bound"],
        [
            [
                escape(r["kernel"]), f"{r['microseconds']:.2f}", f"{r['gb_per_second']:.0f}",
                f"{r['speedup']:.2f}", f"{r['bound']:.2f}", f"{r['speedup'] / r['bound']:.0%}",
            ]
            for r in rows
        ],
    )  # fmt: skip
    if not bars:
        return table
    note = f"on {document['gpu']}; upright marks: as fast as bytes allow"
    return _figure(f"Kernels, {title}.", note, pictures.speeds(name, title, bars), table)


def _checkpoint(report: Mapping[str, Any], index: int) -> str:
    entry = report["checkpoints"][index]
    parts = [f"<h2>{escape(entry['label'])}</h2>", _cards(report, index), _steps(entry)]
    inside = [site for site in entry["sites"] if site["block"] is not None]
    if inside:
        parts += _maps(entry, index, inside)
    if entry["tiles"] and entry["tiles"]["sites"]:
        parts.append(_tile_maps(entry, index))
    if entry["activation"]:
        parts.append(_gates(entry, index))
    if entry["kv_cache"]:
        rows = [
            [escape(name.replace("_", " ")), escape(str(value))]
            for name, value in entry["kv_cache"].items()
        ]
        parts.append("<h3>KV cache</h3>" + _table(["", ""], rows, text=2))
    return "".join(parts)


def _cards(report: Mapping[str, Any], index: int) -> str:
    entry = report["checkpoints"][index]
    mine = [r for r in report["results"] if r["checkpoint"] == index]
    tensors, dense = entry["bytes"]["tensors"], entry["bytes"]["dense"]
    cards = [
        ("file", size(entry["bytes"]["file"]), f"tensors {tensors / dense:.1%} of dense"),
        ("read per token", size(entry["bytes_per_token"]), "without the KV cache"),
    ]
    if entry["sparsity"] is not None:
        note = f"zeros in {len(entry['sites'])} linears"
        cards.append(("sparsity", share(entry["sparsity"]), note))
    for result in mine:
        document = result["document"]
        if result["kind"] == "eval":
            ratio = document.get("token_ppl_ratio")
            note = "no dense model beside it" if ratio is None else f"{ratio:.4g} times dense"
            title = f"perplexity@{document['seqlen']}"
            cards.append((title, f"{document['token_ppl']:.2f}", note))
        elif result["kind"] == "bench model":
            note = f"of {document['bound']:.2f}× that bytes allow"
            cards.append(("decoding", f"{document['speedup']:.2f}×", note))
    made = f"{entry['model_type']}, {entry['blocks']} blocks, {entry['dtype']}, {entry['format']}"
    inner = "".join(
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd>{escape(c)}</dd></div>"
        for a, b, c in cards
    )
    return f'<p class="soft">{escape(made)}</p><dl class="cards">{inner}</dl>'


def _steps(entry: Mapping[str, Any]) -> str:
    """How it was made: whatever the manifest says of each step, in its own words."""
    parts = ["<h3>How it was made</h3>"]
    for step in entry["steps"]:
        known = {k: v for k, v in step.items() if k != "command"}
        if isinstance(known.get("source"), dict):
            known["source"] = known["source"].get("name")
        text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
        parts.append(
            f"<details><summary>{escape(step['command'])}: {escape(step_line(step))}</summary>"
            f"<pre>{escape(text)}</pre></details>"
        )
    return "".join(parts)


def _maps(entry: Mapping[str, Any], index: int, inside: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sparsity and error by block and projection, and what every site has to say of itself."""
    figures = list(dict.fromkeys(name for site in entry["sites"] for name in site["figures"]))
    table = _table(
        ["site", "shape", "encoding", "sparsity", "before", "after", *figures],
        [
            [
                escape(s["name"]), f"{s['shape'][0]} × {s['shape'][1]}", escape(s["encoding"]),
                share(s["sparsity"]), size(s["bytes"]["before"]), size(s["bytes"]["after"]),
                *(number(s["figures"][n]) if n in s["figures"] else "" for n in figures),
            ]
            for s in entry["sites"]
        ],
        text=3,
    )  # fmt: skip
    parts = ["<h3>Weights</h3>"]
    sparse = _cells((_cell(s), s["sparsity"]) for s in inside)
    drawing = pictures.heatmap(
        f"sparsity{index}", "Sparsity by block and projection", sparse, entry["blocks"],
        lambda value: f"{value:.0%}" if value in (0, 0.25, 0.5, 0.75, 1) else share(value),
        highest=1, label="zeros of all weights",
    )  # fmt: skip
    parts.append(_figure("Sparsity", "by block and projection", drawing, table))
    errors = _cells((_cell(s), s["error"]) for s in inside if s["error"] is not None)
    if errors:
        most = max(errors.values())
        drawing = pictures.heatmap(
            f"error{index}", "Relative error by block and projection", errors, entry["blocks"],
            lambda value: f"{value:.2%}" if most < 0.05 else share(value),
            highest=most, label="relative error",
        )  # fmt: skip
        note = "of each linear's output on the calibration text, or of its weights where they were rounded"
        parts.append(_figure("Error", note, drawing))
    return parts


def _cell(record: Mapping[str, Any]) -> tuple[int, str]:
    return record["block"], record["projection"]


def _cells(
    values: Iterable[tuple[tuple[int, str], float]],
) -> dict[tuple[int, str], float]:
    """The value of every cell: the mean, where experts share one."""
    found: dict[tuple[int, str], list[float]] = {}
    for cell, value in values:
        found.setdefault(cell, []).append(value)
    return {cell: sum(several) / len(several) for cell, several in found.items()}


def _tile_maps(entry: Mapping[str, Any], index: int) -> str:
    found, length = tiles.dense_shares(entry["tiles"]), entry["tiles"]["size"]
    inside = [s for s in entry["sites"] if s["block"] is not None and s["name"] in found]
    drawing = pictures.heatmap(
        f"tiles{index}", "Share of dense tiles", _cells((_cell(s), found[s["name"]]) for s in inside),
        entry["blocks"], lambda value: f"{value:.0%}", highest=1, label="dense of all tiles",
    )  # fmt: skip
    note = f"of {length} × {length} weights; the others are 2:4"
    projections = list(dict.fromkeys(s["projection"] for s in inside))
    pixels = tiles.tile_pixels(entry["tiles"])
    by_block: dict[int, dict[str, str]] = {}
    for site in inside:
        label = f"{site['name']}: {found[site['name']]:.0%} of the tiles dense"
        rows = entry["tiles"]["sites"][site["name"]]
        row = by_block.setdefault(site["block"], {})
        image = tiles.image(rows, pixels, escape(label))
        row[site["projection"]] = row.get(site["projection"], "") + image
    maps = _table(
        ["block", *projections],
        [[str(b), *(row.get(p, "") for p in projections)] for b, row in by_block.items()],
        text=99,
    )
    key = (
        f'<p class="key">outputs downwards, inputs to the right<i style="background:{tiles.DENSE}">'
        f'</i>dense<i style="background:{tiles.SPARSE}"></i>2:4</p>'
    )
    return (
        "<h3>Tiles</h3>"
        + _figure("Dense tiles", note, drawing)
        + f"<details><summary>map of every linear</summary>{key}"
        f'<div class="maps">{maps}</div></details>'
    )


def _gates(entry: Mapping[str, Any], index: int) -> str:
    activation = entry["activation"]
    gates = activation["gates"]
    inside = [gate for gate in gates if gate["block"] is not None]
    parts = [
        "<h3>Activations</h3>",
        f"<p>{len(gates)} gates by {escape(activation['method'])}; policy for prompts: "
        f"{escape(activation['prefill'])}. A token decoded by itself is always gated.</p>",
    ]
    head = ["gate", "linears", "dropped", "measured", "threshold", "exact zeros", "rank"]
    table = _table(
        head,
        [
            [
                escape(g["name"]), escape(", ".join(m.rpartition(".")[2] for m in g["members"])),
                share(g["sparsity"]), "" if g["measured"] is None else share(g["measured"]),
                number(g["threshold"]), share(g["zeros"]), str(g["rank"]),
            ]
            for g in gates
        ],
        text=2,
    )  # fmt: skip
    if inside:
        drawing = pictures.heatmap(
            f"gates{index}", "Share of inputs dropped by block and gate",
            {_cell(g): g["sparsity"] for g in inside}, entry["blocks"],
            lambda value: f"{value:.0%}" if value in (0, 0.25, 0.5, 0.75, 1) else share(value),
            highest=1, label="inputs meant to be dropped",
        )  # fmt: skip
        parts.append(_figure("Inputs dropped", "by block and gate", drawing, table))
        drawing = pictures.threshold_curves(f"curves{index}", activation, entry["blocks"])
        note = "what every share costs, a line a block; dots: what was chosen"
        parts.append(_figure("Threshold curves", note, drawing))
    return "".join(parts)


def _results(report: Mapping[str, Any]) -> str:
    """All that results say, so that nothing that was measured is left out."""
    parts = []
    for result in report["results"]:
        rows = [[escape(name), escape(value)] for name, value in extra_figures(result).items()]
        if rows:
            table = _table(["", ""], rows, text=2)
            title = f"{escape(result['label'])} ({escape(result['file'])})"
            parts.append(f"<details><summary>{title}</summary>{table}</details>")
    return "<h2>Results in full</h2>" + "".join(parts) if parts else ""
