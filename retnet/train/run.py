"""A training run from a recipe to a saved model: data, Trainer, validation, loss curve.

The Trainer does the training. Ours are the batches (packed documents), which weights decay, and what is shown.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from retnet.data import VOCAB_SIZE, PackedDataset, Split, find_documents, split_documents
from retnet.layers.moe import ExpertLinear, MoE
from retnet.models.hf import RetNetForCausalLM
from retnet.stack.resolve import resolve_model
from retnet.train.curve import save_loss_curve
from retnet.train.progress import ProgressCallback
from retnet.train.recipe import Recipe

SUMMARY_FILE = "training.json"
CURVE_FILE = "loss_curve.png"


@dataclass(frozen=True)
class TrainingSummary:
    """What a run did; also in `training.json` beside the weights, with the log."""

    steps: int
    tokens: int
    seconds: float
    train_bytes: int
    valid_bytes: int
    valid_bits_per_byte: float | None
    parameters: int


class PackedTrainer(Trainer):
    """Trainer whose weight decay leaves norms, biases and decays alone; routers learn at a rate of their own."""

    def __init__(self, *args: Any, router_lr_multiplier: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.router_lr_multiplier = router_lr_multiplier

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, routers moved to groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        assert self.model is not None
        modules = (module for module in self.model.modules() if isinstance(module, MoE))
        routers = {id(module.router.weight) for module in modules}
        if made and routers and self.router_lr_multiplier != 1.0:
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in routers]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in routers]
                    optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * self.router_lr_multiplier})
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        matrices = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding, ExpertLinear)) and not name.endswith("decay_proj")
        }
        return [name for name, _ in model.named_parameters() if name in matrices]


def train(recipe: Recipe, console: Console) -> TrainingSummary:
    """Run a recipe. The output directory holds the model, `training.json` and `loss_curve.png`.

    Raises ValueError or OSError for a model or data that cannot be used, and ValueError if the loss is not finite.
    """
    arguments = recipe.training_arguments()
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs in one process would split packed rows: start one process a GPU with torchrun, "
            "or choose one with CUDA_VISIBLE_DEVICES"
        )
    split = split_documents(find_documents(recipe.data), recipe.valid_fraction)
    model = load_for_training(recipe.model)
    train_rows = PackedDataset(split.train, recipe.length, arguments.seed)
    valid_rows = PackedDataset(split.valid, recipe.length, None)
    tokens_per_step = (
        arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        * recipe.length
    )
    progress = ProgressCallback(console, tokens_per_step)
    trainer = PackedTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=valid_rows,
        callbacks=[progress],
        router_lr_multiplier=recipe.router_lr_multiplier,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        _describe(console, recipe, model, split, train_rows)
    try:
        outcome = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    finally:
        progress.close()
    valid_loss = trainer.evaluate()["eval_loss"] if arguments.do_eval else None
    output = Path(str(arguments.output_dir))
    trainer.save_model(str(output))
    steps = trainer.state.global_step
    summary = TrainingSummary(
        steps=steps,
        tokens=steps * tokens_per_step,
        seconds=outcome.metrics["train_runtime"],
        train_bytes=train_rows.num_bytes,
        valid_bytes=valid_rows.num_bytes,
        valid_bits_per_byte=None if valid_loss is None else valid_loss / math.log(2),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    if trainer.is_world_process_zero():
        _record(output, recipe, arguments, summary, trainer.state.log_history)
    return summary


def load_for_training(name: str) -> RetNetForCausalLM:
    """The model that a name stands for: fresh from a preset or a stack, or a saved one to go on from.

    Raises ValueError or OSError if there is none, or if it does not read bytes.
    """
    model = resolve_model(name)
    if model.config.vocab_size < VOCAB_SIZE:
        raise ValueError(
            f"{name} has a vocabulary of {model.config.vocab_size}; bytes and the document start need {VOCAB_SIZE}"
        )
    return RetNetForCausalLM.wrap(model)


def _describe(console: Console, recipe: Recipe, model: nn.Module, split: Split, rows: PackedDataset) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    valid_bytes = sum(document.size for document in split.valid)
    console.print(
        f"[bold]{recipe.model}[/] {parameters / 1e6:.2f}M parameters, {torch.get_num_threads()} threads; "
        f"[bold]{recipe.data}[/] {rows.num_bytes / 1e6:.2f} MB in {len(split.train)} documents, "
        f"{len(rows)} rows of {rows.length}; validation {valid_bytes / 1e6:.2f} MB in {len(split.valid)}"
    )


def _record(
    output: Path, recipe: Recipe, arguments: TrainingArguments, summary: TrainingSummary, log: list[dict[str, Any]]
) -> None:
    record = {
        "recipe": recipe.model_dump(mode="json", exclude={"training"}) | {"training": arguments.to_sanitized_dict()},
        "summary": asdict(summary),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "log": log,
    }
    (output / SUMMARY_FILE).write_text(json.dumps(record, indent=1) + "\n")
    save_loss_curve(log, summary.tokens / summary.steps, output / CURVE_FILE)
