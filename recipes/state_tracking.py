"""State tracking: sums of all digits so far, modulo 2 (parity) or more, learnt on short strings, tested on long ones.

    python recipes/state_tracking.py quick --out out/tracking         CPU, a few minutes
    python recipes/state_tracking.py full --out out/tracking          one GPU: more stacks, steps, rates and seeds

After each digit the model says the sum so far. A state that only decays forgets the first digits or adds them without a
modulus; a sign or an angle per token can count (arXiv 2411.12537; Mamba-3, arXiv 2603.15569). Strings grow during the
training, since the gradient of a long one says little about a single digit. No stack has rotary positions. An accuracy
is that of the second half of the positions of strings of one length. Of each stack, the results are those of the
learning rate with the best mean over lengths.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mixers_train import Run, precision
from quality_train import learning_rate
from torch import Tensor
from variants import with_variant

from retnet import LanguageModel, ModelConfig
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.retention import RetentionConfig
from retnet.models.presets import FORMS, retnet_config

CONV_WIDTH, TEST_SEED = 4, 2**31


GROWTH = ((0.3, 4), (0.5, 2), (1.0, 1))  # until a share of the steps: strings of length / divisor


@dataclass(frozen=True)
class Setting:
    """Trained on strings of up to `length` digits, `digits` per step, tested on `tests` of each of `lengths`."""

    moduli: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    stacks: tuple[str, ...]
    num_layers: int = 1
    width: int = 32
    heads: int = 2
    length: int = 40
    lengths: tuple[int, ...] = (40, 80, 160, 320)
    digits: int = 1280
    tests: int = 128


def _retention(config: ModelConfig, **values) -> ModelConfig:
    layers = (replace(layer, mixer=replace(layer.mixer, **values)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


def _mamba2(config: ModelConfig) -> ModelConfig:
    """With as many floats in the memory."""

    def mamba(mixer: RetentionConfig) -> Mamba2Config:
        return Mamba2Config(mixer.value_dim, head_dim=mixer.head_value_dim, state_dim=mixer.head_key_dim)

    layers = (replace(layer, mixer=mamba(layer.mixer)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


STACKS = {
    "gated": lambda config: config,
    "gated + conv": partial(_retention, conv_width=CONV_WIDTH),
    "Mamba-2": _mamba2,
    "signed": partial(with_variant, signed=True, sign_start=0.0),  # from 2, one seed of two fails at parity
    "rotated": partial(with_variant, rotated=True, rotary_base=1.0),  # all pairs of a head turn alike
    "signed + conv": partial(with_variant, conv_width=CONV_WIDTH, signed=True, sign_start=0.0),
    "rotated + conv": partial(with_variant, conv_width=CONV_WIDTH, rotated=True, rotary_base=1.0),
    "two-tap": partial(with_variant, two_tap=True),
}
QUICK = ("gated", "gated + conv", "Mamba-2", "signed", "rotated")
SETTINGS = {
    "quick": Setting((2, 3), (1e-2,), (0,), 1000, QUICK),
    "full": Setting((2, 3, 5), (3e-3, 1e-2), (0, 1, 2), 6000, tuple(STACKS), num_layers=2, width=64, digits=10240),
}


def stack(name: str, setting: Setting, modulus: int, seed: int) -> ModelConfig:
    config = retnet_config(
        name, setting.num_layers, setting.width, setting.heads, form=FORMS["-gated"], vocab_size=modulus, seed=seed
    )
    return STACKS[name](_retention(replace(config, tie_embeddings=False), rotary="none"))


def strings(modulus: int, length: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits [size, length] and their sums so far, modulo `modulus`."""
    digits = torch.randint(modulus, (size, length), generator=generator, device=generator.device)
    return digits, digits.cumsum(1) % modulus


def loss(model: LanguageModel, digits: Tensor, sums: Tensor) -> Tensor:
    return F.cross_entropy(model(digits).logits.flatten(0, 1).float(), sums.flatten())


@torch.no_grad()
def accuracy(model: LanguageModel, modulus: int, length: int, tests: int, device: torch.device) -> float:
    """Share of right sums in the second half of `tests` strings."""
    generator = torch.Generator(device).manual_seed(TEST_SEED)
    digits, sums = strings(modulus, length, tests, generator)
    with precision(device):
        right = model(digits).logits.argmax(-1) == sums
    return right[:, length // 2 :].float().mean().item()


def measure(setting: Setting, device: torch.device, graphs: bool) -> Iterator[list[dict]]:
    """Rows per modulus and seed, whose runs train at once on the same strings."""
    for modulus in setting.moduli:
        for seed in setting.seeds:
            begin = time.perf_counter()
            runs = [
                Run(name, stack(name, setting, modulus, seed), rate, loss, device, graphs)
                for name in setting.stacks
                for rate in setting.rates
            ]
            _train(runs, setting, modulus, seed)
            print(f"modulus {modulus}, seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
            yield [row for run in runs for row in _tested(run, setting, modulus, seed)]


def _train(runs: list[Run], setting: Setting, modulus: int, seed: int) -> None:
    """Without weight decay and to a rate of 0: an angle that is a little wrong is far off after many digits."""
    generator = torch.Generator(runs[0].device).manual_seed(seed)
    for run in runs:
        for group in run.optimizer.param_groups:
            group["weight_decay"] = 0.0
    for step in range(setting.steps):
        length = setting.length // next(divisor for end, divisor in GROWTH if step < end * setting.steps)
        batch = strings(modulus, length, setting.digits // length, generator)
        for run in runs:
            run.step(batch, learning_rate(step, setting.steps, run.peak))
    for run in runs:
        run.wait()
        run.release()


def _tested(run: Run, setting: Setting, modulus: int, seed: int) -> list[dict]:
    common = {"modulus": modulus, "stack": run.name, "rate": run.peak, "seed": seed}
    common["parameters"] = sum(p.numel() for p in run.model.parameters())
    common["final_loss"] = round(torch.stack(run.losses[-20:]).mean().item(), 4)
    run.model.eval()
    return [
        common | {"length": length, "accuracy": accuracy(run.model, modulus, length, setting.tests, run.device)}
        for length in setting.lengths
    ]


def table(rows: list[dict]) -> str:
    """Markdown: accuracy in percent at the best rate: the mean over seeds, with the lowest in brackets."""
    lengths = sorted({int(row["length"]) for row in rows})
    lines = [
        f"| modulus | stack | rate | {' | '.join(map(str, lengths))} |",
        "|---:|---|---:|" + "---:|" * len(lengths),
    ]
    found: dict[tuple[int, str], dict[float, dict[int, list[float]]]] = {}
    for row in rows:
        by_rate = found.setdefault((int(row["modulus"]), row["stack"]), {})
        by_rate.setdefault(float(row["rate"]), {}).setdefault(int(row["length"]), []).append(float(row["accuracy"]))
    for (modulus, name), by_rate in found.items():
        rate = max(by_rate, key=lambda rate: sum(map(statistics.mean, by_rate[rate].values())))
        cells = (
            f"{100 * statistics.mean(seen):.1f} ({100 * min(seen):.1f})" for _, seen in sorted(by_rate[rate].items())
        )
        lines.append(f"| {modulus} | {name} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--out", type=Path, default=Path("out/tracking"))
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=None)
    parser.add_argument("--steps", type=int, default=None, help="(default: the setting's)")
    for name, kind in (("moduli", int), ("rates", float), ("seeds", int)):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=None, help="(default: the setting's)")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    given = {name: getattr(options, name) for name in ("stacks", "moduli", "rates", "seeds")}
    chosen = {name: tuple(values) for name, values in given.items() if values is not None}
    setting = replace(setting, steps=options.steps or setting.steps, **chosen)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for found in measure(setting, device, graphs=not options.eager):
        rows += found
        with (options.out / "tracking.csv").open("w", newline="") as file:  # an interrupted run keeps its rows
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
