"""Parity of converted models: their logits beside those of transformers' own classes, as a Markdown table.

    python benchmarks/converter_parity.py > docs/results/converters.md

Models are random, at unit gain, and small: the cases of `tests/models/convert`. "whole" is one forward of 13 tokens;
"decoded" begins with a cached prefix and continues one token at a time, on both sides (Zamba2: on ours). In float64,
transformers' casts to float32 are widened.

Ling- and Ring-linear, MiniCPM-SALA and flash-linear-attention have no class that runs on a CPU: their peers are float64
references written from the published code, for the float32 columns too. Layers of flash-linear-attention are compared
by their outputs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from retnet.layers.token_layout import TokenLayout
from retnet.models.convert import load
from retnet.models.convert.fla_layers import load_layer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.models.convert import (  # the models, references and helpers that tests use
    lightning_reference,
    test_convert_bailing,
    test_convert_hybrids,
    test_convert_minicpm_sala,
    test_convert_minimax,
    test_convert_transformers,
    test_fla_layers,
)
from tests.models.convert.fla_layer_peers import layer_output, layer_state
from tests.models.convert.transformers_peers import VOCAB, our_stepwise, peer, stepwise, widen

COLUMNS = ("case", "peer", "largest value", "float32, whole", "decoded", "float64, whole", "decoded")
TOKENS, PREFIX = 13, 6
WIDE, NARROW = torch.float64, torch.float32
Row = tuple[str, str, float, float, float, float, float]


def difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@contextmanager
def widened(model_type: str) -> Iterator[None]:
    """Let transformers compute in float64 whatever it casts to float32."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    with pytest.MonkeyPatch.context() as patch:
        widen(patch, module)
        torch.set_default_dtype(WIDE)  # MiniMax computes slopes from integers
        try:
            yield
        finally:
            torch.set_default_dtype(NARROW)


def beside_transformers(options: dict, dtype: torch.dtype) -> tuple[str, float, float, float]:
    """Their class, its largest logit, and the largest differences, whole and decoded."""
    theirs = peer(options, dtype)
    ours = load(theirs.state_dict(), config=theirs.config)
    ids = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(4))
    expected = theirs(ids, use_cache=False).logits
    cached = expected if options["model_type"] == "zamba2" else stepwise(theirs, ids, PREFIX)
    decoded = max(difference(our_stepwise(ours, ids, split), cached) for split in (PREFIX, 1))
    return type(theirs).__name__, expected.abs().max().item(), difference(ours(ids).logits, expected), decoded


def transformers_rows() -> Iterator[Row]:
    cases = test_convert_transformers.CASES | test_convert_minimax.CASES | test_convert_hybrids.CASES
    cases["zamba2, Mamba-2 alone"] = test_convert_hybrids._ZAMBA2 | {"time_step_min": 0.3, "time_step_max": 0.5}
    for name, options in cases.items():
        kind = options["model_type"]
        narrow = beside_transformers(options, NARROW)
        with widened(kind):
            wide = beside_transformers(options, WIDE)
        yield name, f"`{wide[0]}`", wide[1], *narrow[2:], *wide[2:]


def reference_rows() -> Iterator[Row]:
    """Models of remote code, beside references."""
    for module, reference in (
        (test_convert_bailing, lightning_reference.bailing),
        (test_convert_minicpm_sala, lightning_reference.minicpm_sala),
    ):
        for name, config in module.CASES.items():
            weights = lightning_reference.random_weights(module.shapes(config))
            ids = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(4))
            expected = reference(ids, weights, config)
            cells = []
            for dtype in (NARROW, WIDE):
                ours = load({key: x.to(dtype) for key, x in weights.items()}, config=config)
                decoded = max(difference(our_stepwise(ours, ids, split), expected) for split in (PREFIX, 1))
                cells += [difference(ours(ids).logits, expected), decoded]
            yield f"{config['model_type']}: {name}", "float64 reference", expected.abs().max().item(), *cells


def fla_rows() -> Iterator[Row]:
    """Layers of flash-linear-attention, beside references."""
    x = torch.randn(2, TOKENS, test_fla_layers.WIDTH, dtype=WIDE, generator=torch.Generator().manual_seed(1))
    bounds = [0, PREFIX, *range(PREFIX + 1, TOKENS + 1)]
    for name, (kind, options) in test_fla_layers.CASES.items():
        state = layer_state(kind, options)
        expected = layer_output(kind, state, options, x)
        cells = []
        for dtype in (NARROW, WIDE):
            layer, y = load_layer(kind, {key: w.to(dtype) for key, w in state.items()}, **options), x.to(dtype)
            whole = layer(y, None, TokenLayout.of((2, TOKENS), y.device))[0]
            cells += [difference(whole, expected), difference(test_fla_layers.in_pieces(layer, y, bounds), expected)]
        yield f"FLA's {kind}: {name}", "float64 reference", expected.abs().max().item(), *cells


@torch.no_grad()
def main() -> None:
    print("# Converted models beside their own classes\n")
    print(
        "Printed by `benchmarks/converter_parity.py`, which explains the columns: the largest absolute difference of\n"
        f"logits, beside transformers {transformers.__version__}, with torch {torch.__version__} on a CPU.\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|" + "---:|" * 5, flush=True)
    parts: list[Callable[[], Iterator[Row]]] = [transformers_rows, reference_rows, fla_rows]
    for part in parts:
        for name, whose, largest, *cells in part():
            print(f"| {name} | {whose} | {largest:.1f} | {' | '.join(f'{cell:.1e}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
