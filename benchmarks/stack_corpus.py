"""Comparison with EulerStack: how each library treats EulerStack's own stack files, as Markdown tables.

    python benchmarks/stack_corpus.py CORPUS > docs/results/stack_corpus.md

CORPUS is a folder with `valid.json`, `invalid.json`, `quirks.json` and the files that they name. The JSON files record
EulerStack's results: its package pins an older torch and ran in an environment of its own.

Every valid file that we accept is built at full size to count parameters, and run with reduced widths. Three checks, in
float32 with weights at unit gain and errors relative to centred logits: cached one-token steps against one full
forward; the logits of a prefix against those of the whole sequence; greedy tokens with a cache against those without.
For the other files the tables say where each library refuses them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from retnet.models.cost import parameter_counts
from retnet.models.decode.generation import generate
from retnet.models.lm import LanguageModel
from retnet.stack import StackError, load_stack
from retnet.stack.build import model_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.stack.shrink import shrunk, shrunk_model  # the reduction and the weights that tests use

INTRODUCTION = """\
# EulerStack's files, read by EulerStack and by this library

Printed by `benchmarks/stack_corpus.py`, which explains the columns. Errors are relative, in float32. "Validation",
"Compatibility" and "Unsupported" are the categories of the error, followed by its place in the file.
"""
ACCEPTED = "accepted"
TOKENS, PROMPT, NEW = 48, 16, 24
CLOSE = 1e-5  # relative difference between two orders of summation in float32


@torch.no_grad()
def measure(model: LanguageModel) -> tuple[float, float, int]:
    """(cached error, prefix error, number of equal tokens among NEW) of a small model."""
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    full = model(ids).logits
    scale = (full - full.mean(-1, keepdim=True)).norm()
    output = model(ids[:, :PROMPT], carry=True)
    pieces = [output.logits]
    for t in range(PROMPT, TOKENS):
        output = model(ids[:, t : t + 1], output.state, carry=True)
        pieces.append(output.logits)
    cached = (torch.cat(pieces, 1) - full).norm() / scale
    prefix = (model(ids[:, :PROMPT]).logits - full[:, :PROMPT]).norm() / scale
    with_cache = torch.stack(list(generate(model, ids[:, :PROMPT], NEW, temperature=0)), 1)
    without = ids[:, :PROMPT]
    for _ in range(NEW):
        without = torch.cat([without, model(without).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return cached.item(), prefix.item(), int((with_cache == without[:, PROMPT:]).sum())


def number(value: float | None) -> str:
    """One digit; empty if there is no value (a stack that may not carry its state, a model too large to run)."""
    return "" if value is None else f"{value:.0e}"


def valid_rows(corpus: Path) -> list[tuple]:
    """(file, parameters ours, theirs, cached error ours, theirs, prefix error ours, theirs, greedy tokens equal)."""
    rows = []
    for name, entry in entries(corpus, "valid"):
        if verdict(corpus / "valid" / name) != ACCEPTED:
            continue
        stack = load_stack(corpus / "valid" / name)
        count = parameter_counts(model_config(stack))["total"]
        theirs = [entry.get(f"eulerstack_{key}_rel_err") for key in ("cached_vs_full", "prefix")]
        cached = prefix = equal = None
        if all(layer.keeps_state for layer in shrunk(stack).layers):
            cached, prefix, equal = measure(shrunk_model(stack))
        rows.append((name, count, entry.get("eulerstack_real_params", ""), cached, theirs[0], prefix, theirs[1], equal))
    return rows


def entries(corpus: Path, kind: str) -> list[tuple[str, dict]]:
    return list(json.loads((corpus / f"{kind}.json").read_text()).items())


def verdict(path: Path) -> str:
    """The places where we refuse a file, or "accepted"."""
    try:
        load_stack(path)
    except StackError as error:
        return "; ".join(f"{p.category.removesuffix('Error')} at `{p.dotted}`" for p in error.faults)
    return ACCEPTED


def table(columns: list[str], rows: list[tuple]) -> str:
    head = f"| {' | '.join(columns)} |\n|---|" + "---|" * (len(columns) - 1)
    return "\n".join([head, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def summary(valid: list[tuple], corpus: Path) -> str:
    """Number of files for which each library gives the expected result."""

    def small(errors: list[float | None]) -> str:
        known = [error for error in errors if error is not None]
        return f"{sum(error <= CLOSE for error in known)} of {len(known)}, worst {number(max(known))}"

    def right(kind: str) -> str:
        found = [verdict(corpus / kind / name) for name, _ in entries(corpus, kind)]
        return f"{sum(place != ACCEPTED for place in found)} of {len(found)} refused"

    outcomes = Counter(entry["result"].split()[0] for _, entry in entries(corpus, "quirks"))
    cached, their_cached, prefix, their_prefix, greedy = (list(column) for column in list(zip(*valid, strict=True))[3:])
    known = [count for count in greedy if count is not None]
    crashes = ", ".join(f"{count} {what}" for what, count in outcomes.items())
    rows = [
        (f"cached decoding equals one forward within {CLOSE:.0e}", small(cached), small(their_cached)),
        (f"logits of a prefix do not depend on later tokens, within {CLOSE:.0e}", small(prefix), small(their_prefix)),
        ("greedy tokens are equal with and without a cache", f"{known.count(NEW)} of {len(known)}", "not recorded"),
        ("valid files", f"{len(valid)} accepted, {right('valid')}", f"{len(entries(corpus, 'valid'))} accepted"),
        ("invalid files", right("invalid"), f"{len(entries(corpus, 'invalid'))} refused"),
        ("edge cases that EulerStack accepts or crashes on", right("quirks"), crashes),
    ]
    return table(["over the corpus", "ours", "EulerStack's"], rows)


def main(corpus: Path) -> None:
    valid = valid_rows(corpus)
    print(INTRODUCTION)
    print(summary(valid, corpus) + "\n\n## Valid files\n")
    columns = ["file", *(f"{what}, {whose}" for what in ("parameters", "cached error", "prefix error")
               for whose in ("ours", "EulerStack"))]  # fmt: skip
    cells = [
        (row[0], row[1], row[2], *map(number, row[3:7]), "state refused" if row[7] is None else f"{row[7]}/{NEW}")
        for row in valid
    ]
    print(table([*columns, "equal greedy tokens"], cells) + "\n\n## Valid files that are refused here\n")
    refused = [(name, verdict(corpus / "valid" / name)) for name, _ in entries(corpus, "valid")]
    print(table(["file", "ours"], [row for row in refused if row[1] != ACCEPTED]) + "\n\n## Invalid files\n")
    faults = [
        (name, entry["fault"], f"{entry['category'].removesuffix('Error')} at `{entry['path'].replace('|', '` or `')}`",
         verdict(corpus / "invalid" / name))
        for name, entry in entries(corpus, "invalid")
    ]  # fmt: skip
    print(
        table(["file", "fault", "EulerStack", "ours"], faults)
        + "\n\n## Edge cases that EulerStack accepts or crashes on\n"
    )
    quirks = [
        (name, entry["what"], entry["result"], verdict(corpus / "quirks" / name))
        for name, entry in entries(corpus, "quirks")
    ]
    print(table(["file", "edge case", "EulerStack", "ours"], quirks))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    main(parser.parse_args().corpus)
