"""The page of a report: HTML without scripts and without anything from outside the file.

Text that comes from data, settings or paths is escaped, and a content security policy forbids scripts and requests in
case it were not. The page follows the reader's light or dark mode. While a run is going on, it reloads itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from retnet.plots.numbers import short
from retnet.system.durations import format_seconds
from retnet.system.sizes import format_bytes
from retnet.train.report.chart import DIGITS, WIDE, Curve, chart

RELOAD_SECONDS = 15
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"  # also classes of the style sheet
SHOWN_VALIDATIONS = 50
LONGEST_SAMPLE = 4000  # characters
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CHARTS = (  # key of the log, title, unit, factor, whether the axis begins at 0
    ("tokens_per_second", "Throughput", "tokens/s", 1.0, True),
    ("mfu", "Model FLOP utilisation (MFU)", "%", 100.0, True),
    ("learning_rate", "Learning rate", "", 1.0, True),
    ("grad_norm", "Norm of the gradients", "before clipping", 1.0, False),
    ("data_wait", "Waiting for data", "% of the time", 100.0, True),
    ("memory_gib", "Peak memory", "GiB", 1.0, True),
    ("router_loss", "Router loss", "nats", 1.0, False),
    ("expert_peak", "Busiest expert", "load / its share", 1.0, False),
)

Table = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """What a report shows.

    status: RUNNING, FINISHED or STOPPED; note: why, in a sentence. seconds: of the run so far. log: of the Trainer,
    samples: pairs of a prompt and its continuation.
    """

    title: str
    status: str
    note: str
    step: int
    max_steps: int
    tokens_per_step: int
    seconds: float
    log: Sequence[Mapping[str, Any]]
    tables: Mapping[str, Table]
    settings: Mapping[str, Any]
    samples: Sequence[tuple[str, str]] = field(default_factory=tuple)


def render(page: Page, now: datetime | None = None) -> bytes:
    """The page as UTF-8. now: the time that it shows; the current one if None."""
    written = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M:%S UTC")
    reload = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' if page.status == RUNNING else ""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"{reload}<title>{escape(page.title)}: {page.status}</title><style>{_style()}</style></head><body>",
        f"<h1>{escape(page.title)}</h1>",
        f'<p><span class="status {page.status}">{page.status}</span> {escape(page.note)}</p>',
        f'<p class="faint">written {written}{_renewal(page.status)}</p>',
        _tiles(page),
        f'<div class="grid">{_charts(page)}{_validations(page)}{_samples(page.samples)}',
        *(_section(title, _table(rows)) for title, rows in page.tables.items()),
        "</div>",
        f"<details><summary>All settings</summary><pre>{escape(_json(page.settings))}</pre></details>",
        "</body></html>\n",
    ]
    return "\n".join(filter(None, parts)).encode("utf-8", "backslashreplace")  # file names may not be UTF-8


@cache
def _style() -> str:
    return files("retnet.train.report").joinpath("style.css").read_text("utf-8")


def _renewal(status: str) -> str:
    if status != RUNNING:
        return ""
    return "; renewed while training runs, so an old time here means that the run was killed"


def _section(title: str, body: str, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{escape(title)}</h2>{body}</section>"


def _table(rows: Table) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows) + "</table>"


def _tiles(page: Page) -> str:
    last, valid = _last(page.log, "loss"), _last(page.log, "eval_loss")
    tiles = [
        (f"{page.step:,} of {page.max_steps:,}", "steps"),
        (short(page.step * page.tokens_per_step, DIGITS), "tokens"),
        (format_seconds(page.seconds), "of training"),
    ]
    if "bits_per_byte" in last:
        tiles.append((f"{last['bits_per_byte']:.3f}", f"bits per byte, training (loss {last['loss']:.3f})"))
    elif "loss" in last:  # of another kind than the validation's
        tiles.append((f"{last['loss']:.3f}", "training loss"))
    if "eval_bits_per_byte" in valid:
        text = f"bits per byte, validation (perplexity {valid['eval_perplexity']:.2f})"
        tiles.append((f"{valid['eval_bits_per_byte']:.3f}", text))
    if speed := _last(page.log, "tokens_per_second"):
        tiles.append((f"{speed['tokens_per_second']:,.0f}", f"tokens/s, MFU {speed['mfu']:.1%}"))
    if memory := _last(page.log, "memory_gib"):
        tiles.append((format_bytes(memory["memory_gib"] * 2**30, 3), "peak memory"))
    boxes = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles)
    return f'<div class="tiles">{"".join(boxes)}</div>'


def _last(log: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    """The last entry of the log that has a value, {} if none has."""
    return next((entry for entry in reversed(log) if key in entry), {})


def _charts(page: Page) -> str:
    losses = [
        Curve("training", _points(page, "bits_per_byte"), "train"),
        Curve("validation", _points(page, "eval_bits_per_byte"), "valid", marks=True),
    ]
    parts = []
    if picture := chart(losses, "bits per byte", "tokens", "Training and validation loss over tokens", size=WIDE):
        legend = '<p class="legend"><i class="train"></i>training<i class="valid marks"></i>validation</p>'
        parts.append(_section("Loss", legend + picture, wide=True))
    for key, title, unit, factor, from_zero in _CHARTS:
        curve = Curve(title, _points(page, key, factor), "train")
        if picture := chart([curve], unit, "tokens", f"{title} over tokens", from_zero=from_zero):
            parts.append(_section(title, picture))
    return "".join(parts) or _section("Loss", "<p>No step has been logged yet.</p>", wide=True)


def _points(page: Page, key: str, factor: float = 1.0) -> list[tuple[float, float]]:
    return [(entry["step"] * page.tokens_per_step, factor * entry[key]) for entry in page.log if key in entry]


def _validations(page: Page) -> str:
    entries = [entry for entry in page.log if "eval_loss" in entry]
    if not entries:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("step", "tokens", "loss", "perplexity", "bits per byte"))
    rows = [
        f"<tr><td>{e['step']:,}</td><td>{short(e['step'] * page.tokens_per_step, DIGITS)}</td>"
        f"<td>{e['eval_loss']:.4f}</td><td>{e['eval_perplexity']:.3f}</td><td>{e['eval_bits_per_byte']:.4f}</td></tr>"
        for e in entries[-SHOWN_VALIDATIONS:]
    ]
    earlier = len(entries) - len(rows)
    note = f'<p class="faint">the last {len(rows)} of {len(entries)}</p>' if earlier else ""
    body = f'{note}<table class="numbers"><tr>{head}</tr>{"".join(rows)}</table>'
    return _section("Validations", body, wide=True)


def _samples(samples: Sequence[tuple[str, str]]) -> str:
    if not samples:
        return ""
    blocks = (
        f'<pre dir="auto"><span class="prompt">{escape(begun[:LONGEST_SAMPLE])}</span>'
        f"{escape(new[:LONGEST_SAMPLE])}</pre>"
        for begun, new in samples
    )
    note = '<p class="faint">Beginnings of validation documents, in grey, and what the trained model goes on with.</p>'
    return _section("Samples", note + "".join(blocks), wide=True)


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=1, ensure_ascii=False, default=str)
