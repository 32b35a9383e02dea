"""Tables and plots of `quality.py` from the rows of its arms.

Rows are compared only if their stacks have one shape and were trained on the same tokens for as many steps: each such
group has tables of its own.
A stack's result under an optimizer is that of its best learning rate: the one with the lowest mean loss over seeds
among those with the most seeds.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from retnet.plots.frame import facts, save
from retnet.plots.numbers import short, tokens
from retnet.plots.palette import VARIANTS, Look, look
from retnet.plots.panels import Panel, Scale, draw_panels
from retnet.system.sizes import format_bytes

Group = tuple[str, str, int]  # shape, data, steps
REFERENCE = "llama"


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
        stack: _means([[(p["tokens"], p["valid"]) for p in line] for line in lines]) for stack, lines in curves.items()
    }
    by_seconds = {stack: [(p["seconds"], p["valid"]) for p in lines[0]] for stack, lines in curves.items()}
    late = sorted(loss for line in by_tokens.values() for _, loss in line[len(line) // 3 :])
    loss = Scale("nats per token", limits=(late[0] - 0.05, late[-1] + 0.1) if late else (None, None))
    panels = [
        Panel("Validation loss", Scale("tokens of training", short), loss, by_tokens, markers=False),
        Panel(
            "Validation loss by time", Scale(f"seconds on one {group[0]['device']}"), loss, by_seconds, markers=False
        ),
    ]
    finals = {stack: [row["final"] for row in found if row.get("final")] for stack, found in runs.items()}
    positions = {s: _means([f["positions"] for f in of if "positions" in f]) for s, of in finals.items()}
    repeats = {
        s: _means([[(p["gap"], p["again"] - p["first"]) for p in f["recall"]] for f in of if "recall" in f])
        for s, of in finals.items()
    }
    positions, repeats = ({s: line for s, line in lines.items() if line} for lines in (positions, repeats))
    trained = (group[0]["length"], "training length")
    if positions:
        lowest = min(loss for line in positions.values() for _, loss in line)
        nats = Scale("nats per token", limits=(lowest - 0.1, lowest + 1.5))
        panels.append(
            Panel("Loss by position", Scale("context length, tokens", tokens, 2), nats, positions, limit=trained)
        )
    if repeats:
        nats = Scale("nats per token, repeat less first")
        panels.append(Panel("A passage repeated", Scale("tokens between", tokens, 2), nats, repeats, limit=trained))
    size = short(statistics.mean(row["parameters"] for found in runs.values() for row in found))
    counts = [len(found) for found in runs.values()]
    seeds = f"{min(counts)} to {max(counts)} seeds" if max(counts) > 1 else "1 seed"
    by = OPTIMIZERS.get(optimizer, optimizer)
    under = facts(
        f"{size} parameters", f"data {group[0]['data']}", f"{by}, the best rate of each stack", seeds,
        group[0]["device"], f"torch {group[0]['versions']['torch'].partition('+')[0]}",
    )  # fmt: skip
    names = {stack: label(stack) for stack in runs}
    panels = [replace(panel, lines={names[stack]: line for stack, line in panel.lines.items()}) for panel in panels]
    shown = {names[stack]: look for stack, look in looks(list(runs)).items()}
    save(draw_panels(panels, shown, "Stacks of equal parameters on the same tokens", under), path)


RIVALS = {  # base of a stack's name -> its rival and variant; a short convolution is dashed
    "llama": ("attention", 0),
    "retnet": ("retention", 0),
    "retnet-conv": ("retention", 1),
    "gated": ("gated retention", 0),
    "gated-conv": ("gated retention", 1),
    "mamba2": ("mamba", 0),
    "mamba": ("mamba", 2),
    "hyena": ("hyena", 0),
    "hybrid-retnet": ("hybrid", 0),
    "hybrid": ("hybrid", 1),
    "hybrid-gated": ("hybrid", 2),
    "hybrid-retnet-conv": ("hybrid", 3),
    "tri-mixer": ("tri-mixer", 0),
    "tri-mixer-conv": ("tri-mixer", 1),
}


NAMES = {  # in pictures
    "llama": "Llama-style",
    "retnet": "paper's decays",
    "retnet-conv": "paper's decays, conv",
    "gated-conv": "gated, conv",
    "mamba2": "Mamba-2",
    "mamba": "Mamba-1",
    "hyena": "Hyena",
}
CHANGED = {"sigmoid": "sigmoid gate", "qk-rms": "RMSNorm of q and k"}
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}


def label(stack: str) -> str:
    """The stack in words: 'gated, conv, sigmoid gate'."""
    base, *changes = stack.split("+")
    return ", ".join([NAMES.get(base, base), *(CHANGED.get(change, change) for change in changes)])


def looks(stacks: list[str]) -> dict[str, Look]:
    """The look of each stack. Changes of a base keep its colour and get variants that no other stack here has."""
    found, taken = {}, set(RIVALS.values())
    for stack in sorted(stacks, key=lambda name: ("+" in name, name)):
        rival, variant = RIVALS[stack.partition("+")[0]]
        while "+" in stack and (rival, variant) in taken:
            variant += 1
        taken.add((rival, variant))
        found[stack] = look(rival, variant % (VARIANTS + 1))
    return dict(sorted(found.items()))
