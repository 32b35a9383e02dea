"""Kinds of specification in EulerStack's schema: which run here and which are refused by name, as Markdown tables.

    python benchmarks/stack_kinds.py --specs eulerstack_specs.json --before before.json > docs/results/stack_kinds.md

The kinds are those of `tests/stack/kinds.py`, where each has a specification of our own; what a kind that runs does is
tested in `tests/stack/test_stack_kinds.py`. `eulerstack_specs.py` records the specifications that EulerStack's own
tests accept. `before.json` is what `--json` prints with an older checkout on the path:

    PYTHONPATH=OLDER python benchmarks/stack_kinds.py --specs eulerstack_specs.json --json > before.json

EulerStack's preset files are not published. The table of presets goes by what its package says of their contents.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import yaml

from retnet.stack import StackError, parse_stack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.stack.kinds import REFUSED, RUN

PRESETS = 57
# What its presets need beyond plain layers, as names of kinds. The others have plain layers alone.
_DEEPSEEK = ("experts of DeepSeek-V3",)
NEEDS: dict[str, tuple[str, ...]] = {
    **{f"llm_{size}_mla": ("latent_dim",) for size in ("0p1b", "0p8b", "2b", "4b", "16b")},
    "arch_advanced_mla": ("latent_dim",),
    "arch_advanced_mod": ("depth_gating",),
    "arch_expert_deepseek_moe": _DEEPSEEK,
    "arch_expert_deepseek_moe_mini": _DEEPSEEK,
    "arch_expert_dilated_longnet": ("window_mode: dilated",),
    "arch_expert_dilated_longnet_mini": ("window_mode: dilated",),
    "arch_expert_dual_stream": ("parallel: concat",),
    "arch_expert_reasoning_r1": ("execution_modes", "transition"),
    "arch_expert_titans_memory": ("memory",),
    "arch_expert_kitchen_sink": ("latent_dim", "branched", "parallel: concat", "execution_modes", "transition",
                                 "memory", "depth_gating", "integrator: discrete", "integrator: ode_rk4", "ttt_layer"),
    "arch_expert_dsv4_v3fallback": _DEEPSEEK,
    "arch_expert_mhc_moe_mini": (*_DEEPSEEK, "residual: hyper_connection"),
    "arch_expert_dsv4_subset_mini": ("residual: hyper_connection", "affinity: sqrt_softplus", "shared_experts",
                                     "balance: sequence_aux_coef", "mtp"),
    "arch_expert_dsv4_flash_mini": ("compression: csa", "compression: hca", "residual: hyper_connection",
                                    "affinity: sqrt_softplus", "mtp", "optimizer: hybrid", "quant_aware_training"),
}  # fmt: skip
Verdicts = dict[str, list[str]]


def refusals(text: str) -> list[str]:
    """The errors of a specification, once each; [] if it is accepted."""
    try:
        parse_stack(text)
    except StackError as error:
        return [*dict.fromkeys(fault.what for fault in error.faults)]
    return []


def verdicts(specs: Path | None) -> dict[str, Verdicts]:
    """What refuses each kind, and each recorded specification."""
    kinds = RUN | {name: text for name, (text, *_) in REFUSED.items()}
    recorded = [] if specs is None else json.loads(specs.read_text())
    return {
        "kinds": {name: refusals(text) for name, text in kinds.items()},
        "specs": {str(i): refusals(yaml.safe_dump(spec, sort_keys=False)) for i, spec in enumerate(recorded)},
    }


def runs(found: Verdicts) -> str:
    return f"{sum(not faults for faults in found.values())} of {len(found)}"


def preset_verdicts(kinds: Verdicts) -> Verdicts:
    """The needed kinds of each preset that are refused."""
    return {name: [need for need in needs if kinds[need]] for name, needs in NEEDS.items()}


def table(columns: tuple[str, ...], rows: list[tuple]) -> str:
    head = f"| {' | '.join(columns)} |\n|---|" + "---|" * (len(columns) - 1)
    return "\n".join([head, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def main(now: dict[str, Verdicts], before: dict[str, Verdicts]) -> None:
    print("# Kinds of specification in EulerStack's schema\n")
    print('Printed by `benchmarks/stack_kinds.py`, which explains the tables. "before": commit ec473e5.\n')
    presets, presets_before = preset_verdicts(now["kinds"]), preset_verdicts(before["kinds"])
    refused = [sum(map(bool, found.values())) for found in (presets_before, presets)]
    rows = [
        ("kinds below", runs(before["kinds"]), runs(now["kinds"])),
        ("specifications that EulerStack's own tests accept", runs(before["specs"]), runs(now["specs"])),
        ("EulerStack's presets", *(f"{PRESETS - count} of {PRESETS}" for count in refused)),
    ]
    print(table(("accepted", "before", "now"), rows) + "\n\n## Kinds\n")
    say = {True: "refused", False: "runs"}
    cells = [(name, say[bool(before["kinds"][name])], faults[0] if faults else "runs")
             for name, faults in now["kinds"].items()]  # fmt: skip
    print(table(("kind", "before", "now"), cells))
    print("\n## Presets that need more than plain layers\n")
    cells = [(f"`{name}`", say[bool(presets_before[name])], "refused: " + ", ".join(found) if found else "runs")
             for name, found in presets.items()]  # fmt: skip
    print(table(("preset", "before", "now"), cells))
    print("\n## Reasons of refusal among the specifications of EulerStack's tests\n")
    counts = [Counter(what for faults in found["specs"].values() for what in faults) for found in (before, now)]
    print(table(("error", "before", "now"), [(what, n, counts[1][what]) for what, n in counts[0].most_common()]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", type=Path, help="what eulerstack_specs.py wrote")
    parser.add_argument("--before", type=Path, help="what --json printed at another commit")
    parser.add_argument("--json", action="store_true", help="print what refuses each kind and specification")
    options = parser.parse_args()
    found = verdicts(options.specs)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        main(found, json.loads(options.before.read_text()) if options.before else found)
