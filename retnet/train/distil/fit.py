"""Layer errors of a student, and the parts of its start that are fitted to the teacher: heads and output projections.

A student mixer is given what the teacher's mixer is given. Its error is the mean squared difference of their outputs,
relative to the mean square of the teacher's. Both fits are least squares over the tokens of a few samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from retnet.layers.block import Block
from retnet.layers.mixer_base import MixerModule
from retnet.layers.retention import MultiScaleRetention
from retnet.layers.token_layout import TokenLayout
from retnet.models.lm import LanguageModel
from retnet.train.distil.samples import Sample
from retnet.train.distil.student import scale_heads_

RIDGE = 1e-2  # of the output projections, relative to the mean square of their inputs
Seen = dict[int, tuple[Tensor, Tensor]]


def mixer_of_layer(model: LanguageModel, i: int) -> MixerModule:
    """The mixer of layer i."""
    return cast(Block, model.layers[i]).mixer


@contextmanager
def watched(modules: Mapping[int, nn.Module]) -> Iterator[Seen]:
    """A context that keeps (first argument, output) of the last call of each module, by its number."""
    seen: Seen = {}

    def keep(i: int) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            seen[i] = given[0].detach(), (made[0] if isinstance(made, tuple) else made).detach()

        return hook

    handles = [module.register_forward_hook(keep(i)) for i, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watched_mixers(model: LanguageModel, layers: Sequence[int]) -> Any:
    """`watched`, for the mixers of these layers."""
    return watched({i: mixer_of_layer(model, i) for i in layers})


def layer_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error relative to the mean square of `wanted`: 0 for equal outputs, 1 for an output of 0."""
    wide = wanted.float()
    return (output.float() - wide).square().mean() / wide.square().mean().clamp_min(1e-12)


@torch.no_grad()
def layer_errors(
    student: LanguageModel, teacher: LanguageModel, layers: Sequence[int], samples: Sequence[Sample]
) -> dict[int, float]:
    """The mean of `layer_error` over the samples, by layer."""
    sums = dict.fromkeys(layers, 0.0)
    for ids, _, bounds in samples:
        with watched_mixers(teacher, layers) as seen:
            teacher.hidden(ids, cu_seqlens=bounds)
        layout = TokenLayout.of((1, ids.shape[1]), ids.device, cu_seqlens=bounds)
        for i in layers:
            given, wanted = seen.pop(i)
            sums[i] += float(layer_error(mixer_of_layer(student, i)(given, None, layout)[0], wanted))
    return {i: total / len(samples) for i, total in sums.items()}


@torch.no_grad()
def scale_heads_to_(
    student: LanguageModel, teacher: LanguageModel, layers: Sequence[int], samples: Sequence[Sample]
) -> None:
    """Multiply each head of the student's mixers by the factor that brings it nearest to the teacher's head.

    The factor is that of least squares, <student, teacher> / <student, student>, over all tokens of the samples, of
    what the heads hand to the output projection. It is small where the two are little alike.
    """
    products = {i: torch.zeros(2, cast(Any, mixer_of_layer(student, i)).config.num_heads) for i in layers}
    projections = {i: cast(Any, mixer_of_layer(teacher, i)).out_proj for i in layers}
    for ids, _, bounds in samples:
        with watched_mixers(teacher, layers) as seen, watched(projections) as of_teacher:
            teacher.hidden(ids, cu_seqlens=bounds)
        layout = TokenLayout.of((1, ids.shape[1]), ids.device, cu_seqlens=bounds)
        for i in layers:
            mixer = cast(MultiScaleRetention, mixer_of_layer(student, i))
            with watched({i: mixer.out_proj}) as of_student:
                mixer(seen.pop(i)[0], None, layout)
            own, taught = (
                x.pop(i)[0].double().unflatten(-1, (mixer.config.num_heads, -1)) for x in (of_student, of_teacher)
            )
            both = torch.stack([(own * taught).sum((0, 1, 3)), own.square().sum((0, 1, 3))])
            products[i] += both.to(products[i])
    for i in layers:
        with_teacher, with_itself = products[i]
        factor = with_teacher / with_itself.clamp_min(1e-30)
        scale_heads_(cast(MultiScaleRetention, mixer_of_layer(student, i)), factor[:, None])


@torch.no_grad()
def fit_outputs_(
    student: LanguageModel, teacher: LanguageModel, layers: Sequence[int], samples: Sequence[Sample]
) -> None:
    """Replace the output projections W of the student's mixers by those nearest to the teacher's outputs Y.

    W + argmin_V |X (W + V)^T - Y|^2 + ridge |V|^2, where X is what the student's heads hand to W: with few tokens the
    projection stays near the teacher's. Layers are fitted one after the other, each from a pass of the teacher, so that
    the sums of one layer are in memory.
    """
    for i in layers:
        mixer = cast(MultiScaleRetention, mixer_of_layer(student, i))
        projection = mixer.out_proj
        width, weight = projection.in_features, projection.weight.float()
        squares = weight.new_zeros(width, width)
        products = weight.new_zeros(width, projection.out_features)
        for ids, _, bounds in samples:
            with watched_mixers(teacher, [i]) as seen:
                teacher.hidden(ids, cu_seqlens=bounds)
            given, wanted = seen[i]
            layout = TokenLayout.of((1, ids.shape[1]), ids.device, cu_seqlens=bounds)
            with watched({i: projection}) as of_student:
                made = mixer(given, None, layout)[0]
            x = of_student[i][0].flatten(0, -2).float()
            squares.addmm_(x.T, x)
            products.addmm_(x.T, (wanted.float() - made.float()).flatten(0, -2))
        squares.diagonal().add_(RIDGE * squares.diagonal().mean().clamp_min(1e-30))  # heads may give nothing but zeros
        projection.weight.add_(torch.linalg.solve(squares, products).T.to(projection.weight.dtype))
