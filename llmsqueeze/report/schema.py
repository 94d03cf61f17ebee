"""The documents that pipelines keep, written down once: JSON Schemas of results and of the report.

A schema's number goes up when a key is taken away or changes its meaning; keys may be added.
"""

from __future__ import annotations

from typing import Any

EVAL = "llmsqueeze.eval/1"
BENCH_MODEL = "llmsqueeze.bench-model/1"
BENCH_KERNELS = "llmsqueeze.bench-kernels/1"
REPORT = "llmsqueeze.report/1"

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_COUNT: Schema = {"type": "integer", "minimum": 0}
# What is measured, divided by and drawn on a scale of powers of ten.
_POSITIVE: Schema = {"type": "number", "minimum": 1e-9, "maximum": 1e15}
_SIZE: Schema = {"type": "integer", "minimum": 1, "maximum": 10**15}
_MAYBE_SIZE: Schema = {**_SIZE, "type": ["integer", "null"]}
_PERPLEXITY: Schema = {"type": "number", "minimum": 1, "maximum": 1e100}
_FLAG: Schema = {"type": "boolean"}
_MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
_MAYBE_TEXT: Schema = {"type": ["string", "null"]}
_OBJECT: Schema = {"type": "object"}


def _object(properties: Schema, *, optional: Schema | None = None, closed: bool = False) -> Schema:
    schema = {
        "type": "object",
        "required": list(properties),
        "properties": {**properties, **(optional or {})},
    }
    return schema | ({"additionalProperties": False} if closed else {})


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


_CONDITION = _object({"fail_if": _TEXT, "value": _MAYBE_NUMBER, "failed": _FLAG})
_CONDITIONS = {"conditions": _list(_CONDITION)}
_BYTES = _object({"before": _COUNT, "after": _COUNT})

# What a result must have to be reported; it has more, which is shown as it is.
_EVAL = _object(
    {
        "schema": {"const": EVAL}, "checkpoint": _TEXT, "manifest_sha256": _MAYBE_TEXT,
        "token_ppl": _PERPLEXITY, "seqlen": _COUNT, "windows": _COUNT,
        "tokens": _COUNT, "bos": _FLAG, "dtype": _TEXT, "device": _TEXT, "backend": _TEXT,
        "text": _TEXT, "text_sha256": _TEXT, "tokens_sha256": _TEXT, "size_bytes": _SIZE,
        "bytes_per_token": _SIZE,
    },
    optional={
        "against": _TEXT, "dense_token_ppl": _PERPLEXITY, "token_ppl_ratio": _NUMBER,
        "dense_size_bytes": _MAYBE_SIZE, "dense_bytes_per_token": _MAYBE_SIZE,
        "passkey": _object({"accuracy": _SHARE, "prompts": _COUNT, "length": _COUNT}),
        "dense_passkey": _object({"accuracy": _SHARE}),
        "kv_cache": _object({"format": _TEXT, "bits_per_element": _NUMBER}),
        "activation": _object(
            {
                "gated": _TEXT, "sparsity": _MAYBE_NUMBER,
                "gates": _map(_object({"target": _SHARE, "measured": _MAYBE_NUMBER})),
            }
        ),
        "tasks": _map(_OBJECT), **_CONDITIONS,
    },
)  # fmt: skip
# What is taken of one as a baseline: reports of older versions will do.
BASELINE: Schema = _object(
    {"checkpoint": _TEXT, "token_ppl": _PERPLEXITY},
    optional={
        "tasks": _OBJECT, "size_bytes": _MAYBE_SIZE, "bytes_per_token": _MAYBE_SIZE,
        "passkey": {**_object({"accuracy": _SHARE}), "type": ["object", "null"]},
    },
)  # fmt: skip
_SPEED = _object({"ms_per_token": _POSITIVE, "range": _list(_NUMBER), "bytes_per_token": _SIZE})
_BENCH_MODEL = _object(
    {
        "schema": {"const": BENCH_MODEL}, "checkpoint": _TEXT, "manifest_sha256": _MAYBE_TEXT,
        "dtype": _TEXT, "prompt": _COUNT, "compiled": _FLAG, "dense": _SPEED,
        "compressed": _SPEED, "speedup": _POSITIVE, "bound": _POSITIVE, "error": _NUMBER,
        "same_tokens": _COUNT, "tokens": _COUNT,
    },
    # gpu, or the others: what it was measured on (document.read_result sees to that).
    optional={
        "gpu": _TEXT, "cpu": _TEXT, "threads": _COUNT, "dense_dtype": _TEXT, "skip_mass": _SHARE,
        **_CONDITIONS,
    },
)  # fmt: skip
_BENCH_KERNELS = _object(
    {
        "schema": {"const": BENCH_KERNELS}, "gpu": _TEXT,
        "rows": _list(
            _object(
                {
                    "rows": _COUNT, "columns": _COUNT, "tokens": _COUNT, "kernel": _TEXT,
                    "microseconds": _POSITIVE, "gb_per_second": _NUMBER, "bound": _POSITIVE,
                    "speedup": _POSITIVE,
                }
            )
        ),
    },
    optional=_CONDITIONS,
)  # fmt: skip
# What any command prints under --json instead of a result when it could not give one.
_ERROR = _object({"error": _TEXT, "exit_code": _COUNT})

RESULTS: dict[str, Schema] = {
    "eval": _EVAL,
    "bench model": _BENCH_MODEL,
    "bench kernels": _BENCH_KERNELS,
    "error": _ERROR,
}

_SITE = _object(
    {
        "name": _TEXT, "block": {"type": ["integer", "null"]}, "projection": _TEXT,
        "shape": _list(_COUNT), "sparsity": _SHARE, "encoding": _TEXT, "bytes": _BYTES,
        "error": _MAYBE_NUMBER, "figures": _map(_NUMBER),
    },
    closed=True,
)  # fmt: skip
_GATE = _object(
    {
        "name": _TEXT, "block": {"type": ["integer", "null"]}, "projection": _TEXT, "kind": _TEXT,
        "members": _list(_TEXT), "sparsity": _SHARE, "threshold": _NUMBER, "zeros": _SHARE,
        "ratio": _NUMBER, "rank": _COUNT, "measured": _MAYBE_NUMBER, "curve": _list(_NUMBER),
    },
    closed=True,
)  # fmt: skip
_CHECKPOINT = _object(
    {
        "name": _TEXT, "label": _TEXT, "manifest_sha256": _TEXT, "model_type": _TEXT,
        "blocks": _COUNT, "dtype": _TEXT, "format": _TEXT,
        # dense: of the same tensors with every site dense, in its own dtype.
        "bytes": _object({"file": _COUNT, "tensors": _COUNT, "dense": _COUNT}, closed=True),
        "bytes_per_token": _COUNT,
        # Of all sites together; null without any.
        "sparsity": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "steps": _list(_OBJECT), "sites": _list(_SITE),
        # Every site's tiles as strings, a tile row each: 1 for a dense tile, 0 for a 2:4 one.
        "tiles": {
            "type": ["object", "null"], "required": ["size", "sites"],
            "properties": {"size": _COUNT, "sites": _map(_list(_TEXT))},
            "additionalProperties": False,
        },
        # curve: the threshold of |x|·scale for the shares 0, curve_step, … of dropped inputs.
        "activation": {
            "type": ["object", "null"], "required": ["method", "prefill", "curve_step", "gates"],
            "properties": {"method": _TEXT, "prefill": _TEXT, "curve_step": _NUMBER,
                           "gates": _list(_GATE)},
            "additionalProperties": False,
        },
        "kv_cache": {"type": ["object", "null"]},
    },
    closed=True,
)  # fmt: skip
REPORT_SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": REPORT,
    **_object(
        {
            "schema": {"const": REPORT}, "tool_version": _TEXT,
            # Whether a condition to fail held, or a result is an error.
            "failed": _FLAG,
            "conditions": _list(
                _object({"of": _TEXT, **_CONDITION["properties"]}, closed=True)
            ),
            # What the tool promises of a checkpoint, held against what was measured.
            "checks": _list(
                _object(
                    {
                        "of": _TEXT, "name": _TEXT, "detail": _TEXT,
                        "status": {"enum": ["passed", "failed", "not measured"]},
                    },
                    closed=True,
                )
            ),
            "warnings": _list(_TEXT),
            "checkpoints": _list(_CHECKPOINT),
            # checkpoint: the place of the one that was measured among the checkpoints, if it is there.
            "results": _list(
                _object(
                    {
                        "kind": {"enum": list(RESULTS)}, "label": _TEXT, "file": _TEXT,
                        "checkpoint": {"type": ["integer", "null"]}, "document": _OBJECT,
                    },
                    closed=True,
                )
            ),
        },
        closed=True,
    ),
}  # fmt: skip

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


def fault(value: Any, schema: Schema, at: str = "") -> str | None:
    """What is wrong with a value, in words, or None: the part of JSON Schema that is used here."""
    where = at or "the document"
    if "const" in schema and value != schema["const"]:
        return f"{where} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is none of {', '.join(schema['enum'])}"
    wanted = schema.get("type", [])
    names = [wanted] if isinstance(wanted, str) else wanted
    if names and not any(_is(value, name) for name in names):
        return f"{where} is no {' or '.join(names)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        if not low <= value <= high:
            return f"{where} is {value}"
    if isinstance(value, list) and "items" in schema:
        parts = ((f"{at}[{i}]", item, schema["items"]) for i, item in enumerate(value))
        return next(filter(None, (fault(v, s, p) for p, v, s in parts)), None)
    if isinstance(value, dict):
        return _object_fault(value, schema, at)
    return None


def _object_fault(value: dict[str, Any], schema: Schema, at: str) -> str | None:
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            return f"{at or 'the document'} has no {name}"
    for name, part in value.items():
        if name not in known and rest is False:
            return f"{at or 'the document'} has an unknown {name}"
        inner = known.get(name, rest if isinstance(rest, dict) else {})
        if found := fault(part, inner, f"{at}.{name}".lstrip(".")):
            return found
    return None


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
