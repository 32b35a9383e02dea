"""Closed choices: every field of a configuration that is a `Literal` refuses other values when it is constructed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

import pytest

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import FEED_FORWARDS, BlockConfig
from retnet.layers.branched import BranchedConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.hyper_connection import HyperConnectionConfig
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixer_base import MixerConfig
from retnet.layers.moe import MoEConfig
from retnet.layers.multi_token import MultiTokenConfig
from retnet.layers.retention import RetentionConfig
from retnet.layers.streams import StreamsConfig
from retnet.models.config import ModelConfig
from retnet.ops.rotary import Llama3, Yarn
from retnet.system.choices import check_choices
from tests.small_models import own_mixers, small_config

RETENTION = RetentionConfig(2, 8, 12, conv_width=4)
BLOCK = BlockConfig(RETENTION, FeedForwardConfig(8))
EXAMPLES = [
    RETENTION,
    AttentionConfig(4, 2, head_dim=6),
    LatentAttentionConfig(4, 2, head_dim=6, latent_dim=5),
    Mamba1Config(14, time_step_rank=2),
    Mamba2Config(12, head_dim=3),
    HyenaConfig(),
    BranchedConfig((RETENTION, AttentionConfig(4, 2, head_dim=6))),
    StreamsConfig(((BLOCK,), (BLOCK, BLOCK))),
    MultiTokenConfig(BLOCK),
    FeedForwardConfig(8),
    MoEConfig(4, 2, 8),
    HyperConnectionConfig(4),
    BLOCK,
    small_config(),
]
SCALINGS = [Yarn(4.0, 8), Llama3(8.0, 32)]  # built in the forward, and checked by the layer's configuration


def literals(example: Any) -> Iterator[str]:
    """The fields with a `Literal` anywhere in their annotation."""
    hints = get_type_hints(type(example))
    yield from (f.name for f in fields(example) if "Literal" in str(hints[f.name]))


def classes(annotation: Any) -> Iterator[type]:
    """The dataclasses named in an annotation."""
    if is_dataclass(annotation):
        yield annotation  # pyright: ignore[reportReturnType]
    for part in get_args(annotation):
        yield from classes(part)


CHOICES = [(example, name) for example in EXAMPLES for name in literals(example)]
IDS = [f"{type(example).__name__}.{name}" for example, name in CHOICES]


def test_every_configuration_class_has_an_example():
    found, queue = set(), [ModelConfig, *(mixer.config for mixer in own_mixers().values()), *FEED_FORWARDS]
    while queue:
        cls = queue.pop()
        if cls not in found:
            found.add(cls)
            queue += [x for hint in get_type_hints(cls).values() for x in classes(hint)]
    assert found == {type(x) for x in EXAMPLES + SCALINGS}
    assert len(CHOICES) > 25


@pytest.mark.parametrize("wrong", ["foo", None, 1, True, ["swish"]], ids=str)
@pytest.mark.parametrize(("example", "name"), CHOICES, ids=IDS)
def test_an_unknown_choice_is_refused_by_name_with_what_is_accepted(example, name, wrong):
    several = isinstance(getattr(example, name), tuple)
    with pytest.raises(ValueError, match=rf"^{name} (is|has) .*; accepted: ") as refusal:
        replace(example, **{name: (wrong,) if several else wrong})
    assert re.search(rf"\b{re.escape(str(wrong))}\b|swish", str(refusal.value))
    assert str(getattr(example, name)[0] if several else getattr(example, name)) in str(refusal.value)


def test_a_choice_of_several_values_is_not_a_word():
    with pytest.raises(ValueError, match="conv_on is 'qk'; accepted: a tuple of q, k, v"):
        replace(RETENTION, conv_on="qk")


@pytest.mark.parametrize("scaling", SCALINGS, ids=["Yarn", "Llama3"])
def test_the_kind_of_a_rotary_scaling_is_checked_by_its_layer(scaling):
    assert list(literals(scaling)) == ["kind"]
    with pytest.raises(ValueError, match="kind is 'foo'; accepted: "):
        AttentionConfig(4, 2, head_dim=6, rotary_scaling=replace(scaling, kind="foo"))


def test_a_mixer_from_outside_is_checked_even_if_it_checks_nothing_itself():
    @dataclass(frozen=True)
    class Plain(MixerConfig):
        form: Literal["a", "b"] | None = None

    @dataclass(frozen=True)
    class Careless(Plain):
        def __post_init__(self) -> None:
            pass

    assert Plain("b").form == "b"
    assert Plain().form is None
    with pytest.raises(ValueError, match="form is 'c'; accepted: a, b, None"):
        Plain("c")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="form is 'c'; accepted: a, b, None"):
        BlockConfig(Careless("c"), None)  # pyright: ignore[reportArgumentType]


def test_only_closed_annotations_are_checked():
    @dataclass
    class Options:
        number: Literal[1, 2]
        tuples: tuple[Literal[1, 2], ...] = ()
        open: Literal["auto"] | int = "auto"
        plain: str | None = None

    check_choices(Options(1, (2, 1), 7, "x"))
    with pytest.raises(ValueError, match="number is True; accepted: 1, 2"):
        check_choices(Options(True))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tuples has 3 in it; accepted: 1, 2"):
        check_choices(Options(1, (1, 3)))  # pyright: ignore[reportArgumentType]
