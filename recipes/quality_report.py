"""Tables and plots of `quality.py` from the rows of its arms.

Rows are compared only if their stacks have one shape and were trained on the same tokens for as many steps: each such
group has tables of its own.
A stack's result under an optimizer is that of its best learning rate: the one with the lowest mean loss over seeds
among those with the most seeds.
"""

import math
import statistics
from collections import defaultdict
from pathlib import Path

from mixers_pictures import Panel, draw

from retnet.system.sizes import format_bytes

Group = tuple[str, str, int]  # shape, data, steps
REFERENCE = "llama"
# Colours that colour-blind readers can tell apart (Okabe and Ito), in the order of the stacks.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")


def grouped(rows: list[dict]) -> dict[Group, list[dict]]:
    groups: dict[Group, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["shape"], row["data"], row["steps"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: item[0][2]))


def by_rate(rows: list[dict]) -> dict[tuple[str, str], dict[float, list[dict]]]:
    """(stack, optimizer) -> rate -> the rows of all seeds, in the order of the rates."""
    found: dict[tuple[str, str], dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (row["rate"], row["seed"])):
        found[row["stack"], row["optimizer"]][row["rate"]].append(row)
    return found


def finished(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["status"] == "done"]


def best_rate(rates: dict[float, list[dict]]) -> float | None:
    """None without a finished row."""
    done = {rate: finished(rows) for rate, rows in rates.items() if finished(rows)}
    if not done:
        return None
    most = max(map(len, done.values()))
    losses = {
        rate: statistics.mean(row["valid_loss"] for row in rows) for rate, rows in done.items() if len(rows) == most
    }
    return min(losses, key=losses.__getitem__)


def at_an_edge(rates: dict[float, list[dict]]) -> bool:
    """Whether a rate beside the best one was not tried. Runs that were ended for their loss count as tried."""
    tried = [rate for rate, rows in rates.items() if any(row["status"] in ("done", "abandoned") for row in rows)]
    return best_rate(rates) in (tried[0], tried[-1])


def tables(rows: list[dict]) -> str:
    """Markdown: per group the perplexity of every rate, and what the best rate of each stack gives."""
    parts = []
    for (shape, data, steps), group in grouped(rows).items():
        first = group[0]
        tokens = steps * first["length"] * first["rows_per_step"]
        parts.append(f"### {shape}, {tokens / 1e6:.1f} million tokens ({steps} steps), data {data}, {first['device']}")
        parts += [sweep_table(group), result_table(group)]
        if any(row.get("final") for row in group):
            parts.append(final_table(group))
    return "\n\n".join(parts)


def sweep_table(rows: list[dict]) -> str:
    """Validation perplexity of each stack (rows) at each rate of each optimizer (columns), the mean over seeds."""
    found = by_rate(rows)
    columns = sorted({(row["optimizer"], row["rate"]) for row in rows})
    stacks = list(dict.fromkeys(stack for stack, _ in found))
    lines = [
        "| stack | " + " | ".join(f"{optimizer} {rate:g}" for optimizer, rate in columns) + " | |",
        "|---|" + "---:|" * len(columns) + "---|",
    ]
    for stack in stacks:
        cells, notes = [], []
        for optimizer, rate in columns:
            rates = found.get((stack, optimizer), {})
            cell = _cell(rates.get(rate, []))
            cells.append(f"**{cell}**" if cell and rate == best_rate(rates) else cell)
        for optimizer in sorted({optimizer for optimizer, _ in columns}):
            rates = found.get((stack, optimizer), {})
            if best_rate(rates) is not None and at_an_edge(rates):
                notes.append(f"{optimizer}: best at an edge")
        lines.append(f"| {stack} | {' | '.join(cells)} | {'; '.join(notes)} |")
    return "\n".join(lines)


def _cell(rows: list[dict]) -> str:
    done = finished(rows)
    if done:
        mean = statistics.mean(row["perplexity"] for row in done)
        return f"{mean:.1f}" + (f" ({len(done)} seeds)" if len(done) > 1 else "")
    if not rows:
        return ""
    last = rows[-1]["curve"][-1]["step"] if rows[-1]["curve"] else 0
    return f"{rows[-1]['status']} at {last}"


def chosen(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(stack, optimizer) -> the finished rows of its best rate, best first."""
    found = {}
    for key, rates in by_rate(rows).items():
        rate = best_rate(rates)
        if rate is not None:
            found[key] = finished(rates[rate])
    return dict(sorted(found.items(), key=lambda item: (item[0][1], statistics.mean(r["valid_loss"] for r in item[1]))))


def result_table(rows: list[dict]) -> str:
    """What the best rate of each stack gives: perplexity with its range over seeds, against Llama's, speed, memory."""
    best = chosen(rows)
    lines = [
        f"| stack | optimizer | rate | seeds | perplexity | range | against {REFERENCE} | parameters | tokens/s "
        "| peak memory |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for (stack, optimizer), runs in best.items():
        seen = [row["perplexity"] for row in runs]
        rival = best.get((REFERENCE, optimizer))
        against = ""
        if rival is not None and stack != REFERENCE:
            against = f"{100 * (statistics.mean(seen) / statistics.mean(r['perplexity'] for r in rival) - 1):+.1f}%"
        spread = f"{min(seen):.1f} to {max(seen):.1f}" if len(seen) > 1 else ""
        peak = runs[0].get("peak_bytes")
        lines.append(
            f"| {stack} | {optimizer} | {runs[0]['rate']:g} | {len(runs)} | {statistics.mean(seen):.2f} | {spread} "
            f"| {against} | {runs[0]['parameters']} | {statistics.mean(r['tokens_per_second'] for r in runs):.0f} "
            f"| {format_bytes(peak) if peak else ''} |"
        )
    return "\n".join(lines)


def final_table(rows: list[dict]) -> str:
    """The other measurements of finalists, at every rate that has one, means over seeds."""
    lines = [
        "| stack | optimizer | rate | test perplexity | bits per byte of books, rows of | loss at position "
        "| repeat, nats (first time) after | decode, ms per token | state |",
        "|---|---|---:|---:|---|---|---|---:|---:|",
    ]
    for (stack, optimizer), rates in by_rate(rows).items():
        for rate, runs in rates.items():
            finals = [row["final"] for row in runs if row.get("final")]
            if finals:
                cells = " | ".join(_final_cells(finals))
                lines.append(f"| {stack} | {optimizer} | {rate:g} | {cells} |")
    return "\n".join(lines)


def _final_cells(finals: list[dict]) -> list[str]:
    def of(name: str) -> list:
        return [final[name] for final in finals if name in final]

    test = f"{math.exp(statistics.mean(of('test_loss'))):.2f}" if of("test_loss") else ""
    books = "; ".join(f"{length}: {bits:.3f}" for length, bits in _means(of("books_bits_per_byte")))
    positions = _means(of("positions"))
    places = "; ".join(f"{last}: {loss:.3f}" for last, loss in positions[-5::2])
    again = dict(_means([[(point["gap"], point["again"]) for point in line] for line in of("recall")]))
    first = dict(_means([[(point["gap"], point["first"]) for point in line] for line in of("recall")]))
    repeats = "; ".join(f"{gap}: {loss:.2f} ({first[gap]:.2f})" for gap, loss in again.items())
    decode = of("decode")
    speed = f"{statistics.mean(d['milliseconds_per_token'] for d in decode):.3f}" if decode else ""
    return [test, books, places, repeats, speed, format_bytes(decode[0]["state_bytes"]) if decode else ""]


def _means(lines: list[list]) -> list[tuple[float, float]]:
    """The mean of several lines of (x, y) with the same x."""
    return [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*lines, strict=True)]


def picture(rows: list[dict], path: Path, stacks: list[str] | None = None) -> None:
    """The longest group's best rates under the optimizer with the most stacks: loss against tokens and seconds; with
    finalists, loss by position and of repeats."""
    group = list(grouped(rows).values())[-1]
    best = chosen(group)
    if not best:
        raise ValueError("no arm is done; accepted: at least one")
    optimizers = [optimizer for _, optimizer in best]
    optimizer = max(optimizers, key=optimizers.count)
    runs = {stack: found for (stack, used), found in best.items() if used == optimizer and stack in (stacks or [stack])}
    curves = {stack: [row["curve"] for row in found] for stack, found in runs.items()}
    by_tokens = {
        stack: _means([[(p["tokens"] / 1e6, p["valid"]) for p in line] for line in lines])
        for stack, lines in curves.items()
    }
    by_seconds = {stack: [(p["seconds"], p["valid"]) for p in lines[0]] for stack, lines in curves.items()}
    late = sorted(loss for line in by_tokens.values() for _, loss in line[len(line) // 3 :])
    span = (late[0] - 0.05, late[-1] + 0.1)
    panels = [
        Panel("validation loss", "million tokens", "nats per token", by_tokens, y_range=span),
        Panel("validation loss", f"seconds on one {group[0]['device']}", "nats per token", by_seconds, y_range=span),
    ]
    finals = {stack: [row["final"] for row in found if row.get("final")] for stack, found in runs.items()}
    positions = {s: _means([f["positions"] for f in of if "positions" in f]) for s, of in finals.items()}
    repeats = {
        s: _means([[(p["gap"], p["again"] - p["first"]) for p in f["recall"]] for f in of if "recall" in f])
        for s, of in finals.items()
    }
    positions, repeats = ({s: line for s, line in lines.items() if line} for lines in (positions, repeats))
    if positions:
        lowest = min(loss for line in positions.values() for _, loss in line)
        panels.append(
            Panel("loss by position", "context length, tokens", "nats per token", positions, x_base=2,
                  y_range=(lowest - 0.1, lowest + 1.5), limit=(group[0]["length"], "training length"))
        )  # fmt: skip
    if repeats:
        panels.append(
            Panel("a passage repeated", "tokens between", "nats per token less the first time's", repeats, x_base=2,
                  limit=(group[0]["length"], "training length"))
        )  # fmt: skip
    count = statistics.mean(row["parameters"] for found in runs.values() for row in found)
    draw(
        panels, path, f"{count / 1e6:.0f} million parameters, {optimizer}, best rate of each stack", styles(list(runs))
    )


def styles(stacks: list[str]) -> dict[str, dict]:
    """Arguments of each stack's lines; those of hybrids are thicker."""
    return {
        stack: {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": ("-", "--", ":")[i // len(_COLOURS) % 3],
            "linewidth": 2.4 if stack.startswith(("hybrid", "tri")) else 1.6,
            "marker": "osDv^P*X"[i % 8],
        }
        for i, stack in enumerate(sorted(stacks))
    }
