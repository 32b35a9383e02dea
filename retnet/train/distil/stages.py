"""The stages of a distillation, from a teacher to a saved student.

    OUT/stages/student    the start: the teacher's weights in the student's layers
    OUT/stages/layers     a run that aligns the layers (`objectives.py`)
    OUT/stages/chosen     the aligned student with attention in the layers that keep it, where they are chosen
    OUT                   a run on the teacher's logits; its model is the result

Runs are those of `retnet train`, with their checkpoints, logs and reports. A stage that is finished is in the record
(`record.py`), and a call that resumes continues with the next one.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import TrainingArguments

from retnet.layers.attention import AttentionConfig
from retnet.models.convert import copy_side_files
from retnet.models.directory import save_model, write_model_config
from retnet.models.fingerprint import fingerprint
from retnet.models.lm import LanguageModel
from retnet.stack.load import Stack
from retnet.stack.resolve import resolve_model
from retnet.system.outputs import check_new_directory, filled_directory
from retnet.system.progress import Progress
from retnet.train.distil.choice import choose_attention
from retnet.train.distil.fit import fit_outputs_, layer_errors, mixer_of_layer, scale_heads_to_
from retnet.train.distil.from_stack import Mixers, all_retention, retention_everywhere, stack_mixers
from retnet.train.distil.objectives import AlignedForCausalLM, LogitsForCausalLM
from retnet.train.distil.record import RECORD_FILE, Record
from retnet.train.distil.samples import every, mean_nats, spread
from retnet.train.distil.settings import LAYERS, LOGITS, stage_recipe
from retnet.train.distil.student import converted_layers, make_student, student_config
from retnet.train.distil.teacher import open_teacher
from retnet.train.finish import TrainingSummary
from retnet.train.inputs import RunData, Wrap, check_reads, open_data
from retnet.train.recipe import Recipe
from retnet.train.run import Objective, train

MEASURED_TOKENS = 32768  # of training data, for the start's scale and the layer errors
CHOICE_TOKENS = 65536  # for the choice of attention layers
STUDENT, CHOSEN = "student", "chosen"


@dataclass(frozen=True)
class Request:
    """What a distillation is asked for.

    teacher: a directory of ours, or one that `retnet convert` reads. stack: the student's mixers by layer; None:
    retention everywhere. keep_attention: how many attention layers stay, chosen by measured loss; None: those of the
    stack. cross_entropy: its weight in the loss of the last stage, from 0 to below 1; the divergence has the rest.
    data, settings: as for `retnet train` (`settings.py`).
    """

    teacher: Path
    output: Path
    stack: Stack | None = None
    keep_attention: int | None = None
    cross_entropy: float = 0.0
    data: str | None = None
    settings: tuple[str, ...] = ()
    resume: bool = False

    def __post_init__(self) -> None:
        if self.stack is None and self.keep_attention is None:
            raise ValueError("no student: accepted: a stack, a number of attention layers to keep, or both")
        if self.keep_attention is not None and self.keep_attention < 1:
            raise ValueError(f"keep_attention is {self.keep_attention}; accepted: 1 or more")
        if not 0 <= self.cross_entropy < 1:
            raise ValueError(f"cross_entropy is {self.cross_entropy}; accepted: from 0 to below 1")


@dataclass(frozen=True)
class Outcome:
    """teacher_perplexity, student_perplexity: on the validation data. attention: the layers that have it."""

    teacher_perplexity: float
    student_perplexity: float | None
    attention: tuple[int, ...]
    tokens: int


def distil(request: Request, console: Console) -> Outcome:
    """Run the stages that are not finished. Afterwards the output directory holds the student and its record.

    Raises what `train` raises; ValueError for a teacher or a stack that cannot be used, and for a call that resumes
    with another request; FileExistsError for an output that holds something else.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError("distillation runs in one process; accepted: a call without torchrun")
    if request.resume and not (request.output / RECORD_FILE).is_file():
        raise FileNotFoundError(f"{request.output} holds no {RECORD_FILE}; accepted: a distillation that was begun")
    if not request.resume:
        check_new_directory(request.output, accepted="a new or empty directory, or --resume to continue what is there")
    return _Stages(request, console).run()


class _Stages:
    def __init__(self, request: Request, console: Console):
        self.request, self.console = request, console
        self.folder = request.output / "stages"
        for stage in (LAYERS, LOGITS):  # bad settings are found before the teacher is read
            self._recipe(stage, self.folder / STUDENT)
        with Progress(console, f"reading {request.teacher}"):
            self.teacher = open_teacher(request.teacher)
        self.mixers = self._mixers()
        self.config = replace(student_config(self.teacher.config, self.mixers), name=request.output.name)
        self.layers = converted_layers(self.teacher.config, self.config)
        if request.keep_attention is not None and request.keep_attention >= len(self.layers):
            raise ValueError(
                f"keep_attention is {request.keep_attention} of {len(self.layers)} attention layers; accepted: 1 to "
                f"{len(self.layers) - 1}"
            )
        self.taught = fingerprint(self.teacher)
        asked = {
            "teacher": self.taught,
            "stack": [None if mixer is None else repr(mixer) for mixer in self.mixers],
            "keep_attention": request.keep_attention,
            "cross_entropy": request.cross_entropy,
        }
        self.record = (Record.resumed if request.resume else Record)(request.output, asked)

    def run(self) -> Outcome:
        with nullcontext() if self.request.resume else filled_directory(self.request.output, Exception):
            self.record.begin()
            if not self.record.has(STUDENT):
                self._start()
        self._say_errors("start", self.record[STUDENT]["layer_errors"])
        if not self.record.has(LAYERS):
            self._align()
        self._say_errors("aligned", self.record[LAYERS]["layer_errors"])
        if self.request.keep_attention is not None and not self.record.has(CHOSEN):
            self._choose()
        if not self.record.has(LOGITS):
            self._train_on_logits()
        return self._outcome()

    # Stages

    def _start(self) -> None:
        with Progress(self.console, "making the student"):
            student = make_student(self.teacher, self.config)
            directory = self.folder / STUDENT
            write_model_config(directory, student)  # data of conversations is read with the model's tokenizer
            copy_side_files(self.request.teacher, directory)
            samples = spread(self.data.train, MEASURED_TOKENS, self._to_device(self.teacher, student))
            with self._precision():
                valid = self._valid_nats(self.teacher)
                if not math.isfinite(valid):
                    raise ValueError(
                        f"the validation loss of {self.request.teacher} is {valid}; accepted: a teacher whose weights "
                        "and logits are finite"
                    )
                scale_heads_to_(student, self.teacher, self.layers, samples)
                fit_outputs_(student, self.teacher, self.layers, samples)
                errors = layer_errors(student, self.teacher, self.layers, samples)
            save_model(student, directory)
        self.record.finish(STUDENT, {"layer_errors": _by_name(errors), "teacher_loss": valid})

    def _align(self) -> None:
        summary = self._train(
            LAYERS, STUDENT, lambda student: AlignedForCausalLM.of(student, self.teacher, self.layers)
        )
        with Progress(self.console, "measuring layers"):
            student = resolve_model(str(self.folder / LAYERS))
            samples = spread(self.data.train, MEASURED_TOKENS, self._to_device(self.teacher, student))
            with self._precision():
                errors = layer_errors(student, self.teacher, self.layers, samples)
        self.record.finish(LAYERS, {"layer_errors": _by_name(errors), **_totals(summary)})

    def _choose(self) -> None:
        count = cast(int, self.request.keep_attention)
        with Progress(self.console, "choosing attention layers") as shown:
            student = resolve_model(str(self.folder / LAYERS))
            samples = spread(self.data.train, CHOICE_TOKENS, self._to_device(self.teacher, student))
            with self._precision():
                choice = choose_attention(
                    student, self.teacher, self.layers, count, samples, lambda n, of: shown.update(n, total=of)
                )
            mixers = [None if i in choice.kept else mixer for i, mixer in enumerate(self.mixers)]
            config = replace(student_config(self.teacher.config, mixers), name=self.config.name)
            for i in choice.kept:
                student.layers[i].mixer = mixer_of_layer(self.teacher, i)
            student.config = config
            save_model(student, self.folder / CHOSEN)
            copy_side_files(self.folder / LAYERS, self.folder / CHOSEN)
        kept = ", ".join(f"{i} (KL {loss:.3f})" for i, loss in zip(choice.kept, choice.losses[1:], strict=True))
        self._say(f"attention stays in layers {kept}; without it KL {choice.losses[0]:.3f}")
        self.record.finish(CHOSEN, {"kept": sorted(choice.kept), "order": choice.kept, "losses": choice.losses})

    def _train_on_logits(self) -> None:
        before = LAYERS if self.request.keep_attention is None else CHOSEN
        share = self.request.cross_entropy
        summary = self._train(LOGITS, before, lambda student: LogitsForCausalLM.of(student, self.teacher, share))
        self.record.finish(LOGITS, {"loss": summary.valid_loss, **_totals(summary)})

    def _train(self, stage: str, before: str, wrap: Wrap) -> TrainingSummary:
        self._say(f"stage {stage}")
        facts = {"objective": stage, "teacher": self.taught, "cross_entropy": self.request.cross_entropy}
        summary = train(self._recipe(stage, self.folder / before), self.console, Objective(wrap, facts))
        gc.collect()  # the trainer refers to itself
        return summary

    def _outcome(self) -> Outcome:
        done = self.record
        converted = set(self.layers) - set(done[CHOSEN]["kept"] if done.has(CHOSEN) else ())
        attention = tuple(
            i
            for i, layer in enumerate(self.teacher.config.layers)
            if isinstance(layer.mixer, AttentionConfig) and i not in converted
        )
        loss = done[LOGITS]["loss"]
        perplexity = None if loss is None else math.exp(loss)
        tokens = done[LAYERS]["tokens"] + done[LOGITS]["tokens"]
        return Outcome(math.exp(done[STUDENT]["teacher_loss"]), perplexity, attention, tokens)

    # Shared

    def _mixers(self) -> Mixers:
        request, teacher = self.request, self.teacher.config
        if request.stack is None:
            return all_retention(teacher)
        mixers = stack_mixers(teacher, request.stack)
        return mixers if request.keep_attention is None else retention_everywhere(teacher, mixers, request.stack)

    def _recipe(self, stage: str, model: Path) -> Recipe:
        output = self.request.output if stage == LOGITS else self.folder / stage
        request = self.request
        return stage_recipe(
            stage, request.settings, data=request.data, model=model, output=output, resume=request.resume
        )

    @cached_property
    def _measured(self) -> tuple[Recipe, TrainingArguments]:
        recipe = self._recipe(LOGITS, self.folder / STUDENT)
        return recipe, recipe.training_arguments()

    @cached_property
    def data(self) -> RunData:
        data = open_data(*self._measured)
        check_reads(self.teacher, str(self.request.teacher), data.corpus)
        return data

    def _to_device(self, *models: LanguageModel) -> torch.device:
        device = self._measured[1].device
        for model in models:
            model.to(device).eval()
        return device

    def _precision(self) -> AbstractContextManager[Any]:
        """As in training."""
        arguments = self._measured[1]
        dtype = torch.float16 if arguments.fp16 else torch.bfloat16
        return torch.autocast(arguments.device.type, dtype, enabled=arguments.bf16 or arguments.fp16)

    def _valid_nats(self, model: LanguageModel) -> float:
        per_sample, device = self._measured[1].eval_batch_size, self._measured[1].device
        rows = self.data.valid.values()
        return mean_nats(model, (sample for each in rows for sample in every(each, per_sample, device)))

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _say_errors(self, when: str, errors: Mapping[str, float]) -> None:
        self._say(f"layer errors, {when}: " + ", ".join(f"{i} {error:.3f}" for i, error in errors.items()))


def _by_name(errors: Mapping[int, float]) -> dict[str, float]:
    return {str(i): error for i, error in errors.items()}


def _totals(summary: TrainingSummary) -> dict[str, Any]:
    return {"tokens": summary.tokens, "seconds": summary.seconds, "steps": summary.steps}
