"""EulerStack's specifications as our models, beside what EulerStack's own runtime makes of them: a Markdown table.

    python benchmarks/stack_corpus.py CORPUS > table.md

CORPUS is a folder with `valid.json` and `valid/`. Every CORE file is counted at full size and run with its widths
shrunk: the error of cached one-token steps against one full forward (float32, weights at unit gain, relative to centred
logits), that of a prefix's logits against the whole sequence's, and whether greedy generation with a cache gives the
tokens of generation without. EulerStack's figures are those recorded in `valid.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from retnet.models.cost import parameter_counts
from retnet.models.generation import generate
from retnet.models.lm import LanguageModel
from retnet.stack import load_stack
from retnet.stack.build import model_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.stack.shrink import shrunk, small_model  # the reduction and the weights that tests use

TOKENS, PROMPT, NEW = 48, 16, 24


@torch.no_grad()
def measure(model: LanguageModel) -> tuple[float, float, int]:
    """(cached error, prefix error, equal tokens of NEW) of a small model."""
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
    return "" if value is None else f"{value:.0e}"


def main(corpus: Path) -> None:
    index = json.loads((corpus / "valid.json").read_text())
    columns = ["file", "parameters: ours", "EulerStack's", "its estimate", "cached error: ours", "EulerStack's"]
    columns += ["prefix error: ours", "EulerStack's", "greedy tokens equal"]
    print(f"| {' | '.join(columns)} |\n|---|" + "---:|" * (len(columns) - 1))
    for name, entry in index.items():
        if entry["scope"] != "CORE":
            continue
        stack = load_stack(corpus / "valid" / name)
        count = parameter_counts(model_config(stack))["total"]
        theirs = [entry.get(f"eulerstack_{key}_rel_err") for key in ("cached_vs_full", "prefix")]
        ours = ["refused: state false"] * 3
        if all(layer.keeps_state for layer in shrunk(stack).layers):
            cached, prefix, equal = measure(small_model(stack))
            ours = [number(cached), number(prefix), f"{equal}/{NEW}"]
        cells = (name, count, entry["eulerstack_real_params"], entry["est_params"], ours[0], number(theirs[0]), ours[1],
                 number(theirs[1]), ours[2])  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
