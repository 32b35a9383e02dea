"""muP: the coordinate check, initial weights and rates by kind, and the scales that a configuration gets."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.branched import BranchedConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.moe import ExpertLinear, MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.layers.streams import StreamsConfig, streams_block
from retnet.models.config import ModelConfig
from retnet.models.fingerprint import fingerprint
from retnet.models.lm import LanguageModel
from retnet.models.mup import RULES, Rates, growths, summarize, width_ratio, with_mup
from retnet.train.muon import Muon, muon_groups
from retnet.train.optimizer import decayed_parameters, scale_by_width
from tests.small_models import LATENT, MTP, WIDTH, random_ids, small_config

HEAD = 16
VOCAB = 61


def blocks(width: int) -> dict[str, BlockConfig]:
    """Layers of every mixer at a width; heads are of equal width, so wider models have more."""
    heads = width // HEAD
    glu = FeedForwardConfig(2 * width, gated=True, activation="swish")
    paper = RetentionConfig(heads, width, 2 * width)
    gated = replace(paper, decay="gated", conv_width=4, gate="sigmoid")
    attention = AttentionConfig(heads, heads, head_dim=HEAD)
    latent = LatentAttentionConfig(
        heads, heads, HEAD, "half", latent_dim=width // 2, rope_dim=8, q_rank=width // 2, latent_norm="rms"
    )
    mamba2, mamba1 = Mamba2Config(2 * width, head_dim=HEAD, state_dim=16), Mamba1Config(2 * width, width // 16)
    experts = MoEConfig(4, 2, width, router="sigmoid", shared_hidden_dim=width, router_init_std=0.02)
    mixers = {
        "retention": paper,
        "gated": gated,
        "attention": replace(attention, qk_norm="rms", gate="sigmoid"),
        "latent attention": latent,
        "hyena": HyenaConfig(filter_hidden=16),
        "gated branches": BranchedConfig((gated, attention, mamba1), "gate", top_k=2),
    }
    found = {name: BlockConfig(mixer, glu, norm="rms") for name, mixer in mixers.items()}
    found["post-norm"] = BlockConfig(paper, glu, norm_position="post")
    found["experts"] = BlockConfig(paper, experts)
    found["mamba2"], found["mamba1"] = BlockConfig(mamba2, None, norm="rms"), BlockConfig(mamba1, None, norm="rms")
    found["streams"] = streams_block(StreamsConfig(((found["retention"],), (found["mamba2"],)), "concat"))
    return found


def model_of(block: str, width: int, base: int | None, **options) -> LanguageModel:
    config = ModelConfig(VOCAB, width, (blocks(width)[block],) * 2, **options)
    return LanguageModel(config if base is None else with_mup(config, base))


def adamw(model: LanguageModel, lr: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """AdamW in the groups of the trainer."""
    decayed, named = set(decayed_parameters(model)), dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if (name in decayed) == is_decayed], "weight_decay": decay}
        for is_decayed, decay in ((True, weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    scale_by_width(optimizer, model)
    return optimizer


def distances(model: LanguageModel, optimizer: torch.optim.Optimizer, steps: int, ids: Tensor) -> Iterator[float]:
    """How far activations move in training: of each layer, and of the logits."""
    with torch.no_grad():
        before = activations(model, ids)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        after = activations(model, ids)
    return ((new - old).square().mean().sqrt().item() for old, new in zip(before, after, strict=True))


def activations(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    inner: list[Tensor] = []
    hidden, _ = model.hidden(ids[:, :-1], inner=inner)
    return [*inner[1:], model.logits(hidden)]


def powers(block: str, widths: tuple[int, int], mup: bool, algorithm: str = "adamw", batch: int = 2, **options):
    """The powers of the width with which activations move: of each layer, and of the logits."""
    ids, ends = random_ids(batch, 10 * batch, high=VOCAB), []
    for width in widths:
        model = model_of(block, width, widths[0] if mup else None, **options)
        optimizer = adamw(model, 2**-7) if algorithm == "adamw" else Muon(muon_groups(model, 2**-6), lr=2**-6)
        ends.append(list(distances(model, optimizer, 3, ids)))
    return [math.log(wide / narrow) / math.log(widths[1] / widths[0]) for narrow, wide in zip(*ends, strict=True)]


def test_activations_move_equally_at_every_width():
    ordinary, rules = powers("retention", (32, 128), mup=False), powers("retention", (32, 128), mup=True)
    assert min(ordinary) > 0.4, ordinary
    assert max(rules) < 0.15, rules
    assert min(rules) > -0.4, rules


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
@pytest.mark.parametrize("block", blocks(32))
def test_activations_of_every_mixer_move_equally_from_width_64_to_512(block, algorithm):
    """Logits of the ordinary parametrization grow by a power of at least 0.4, under either optimizer."""
    ordinary = powers(block, (64, 512), False, algorithm, 4)
    rules = powers(block, (64, 512), True, algorithm, 4)
    assert max(ordinary) > 0.4, ordinary
    assert max(rules) < 0.2, rules
    assert min(rules) > -0.35, rules


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tie_embeddings": False}, {"init": "normal"}, {"init": "torchscale"}], ids=str)
def test_activations_move_equally_with_another_head_or_initialisation(options):
    assert max(powers("attention", (64, 512), False, batch=4, **options)) > 0.4
    assert max(map(abs, powers("attention", (64, 512), True, batch=4, **options))) < 0.2


def test_the_ordinary_initialisation_has_no_rules():
    """Recorded before there were any; sums, as another version of torch may round them otherwise."""
    recorded = {"paper": 16097.819991106027, "torchscale": 12968.609545400264, "normal": 8703.054825051096}
    for init, expected in recorded.items():
        weights = LanguageModel(ModelConfig(VOCAB, 32, tuple(blocks(32).values()), init=init)).parameters()
        assert sum(w.detach().double().abs().sum().item() for w in weights) == pytest.approx(expected, rel=1e-9), init


@pytest.mark.parametrize("init", ["paper", "normal"])
def test_at_the_base_width_the_model_is_the_ordinary_one(init):
    config = small_config("every mixer", init=init, mtp=MTP)
    plain, same = LanguageModel(config), LanguageModel(with_mup(config, WIDTH, base_head_dim=None))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    assert fingerprint(plain) == fingerprint(same)
    assert [options(group) for group in muon_groups(same, 1.0)] == [options(group) for group in muon_groups(plain, 1.0)]
    assert len(adamw(same, 1.0).param_groups) == 2


def options(group: dict) -> dict:
    return {key: value for key, value in group.items() if key != "params"} | {"size": len(group["params"])}


@pytest.mark.parametrize("stack", ["experts", "every mixer"])
def test_every_parameter_has_a_kind(stack):
    with torch.device("meta"):
        model = LanguageModel(with_mup(small_config(stack, mtp=MTP), 2 * WIDTH))
    kinds = list(summarize(model, model.config))
    assert sum(kind.parameters for kind in kinds) == sum(p.numel() for p in model.parameters())
    linear = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, ExpertLinear))}
    assert linear <= set(growths(model))


def test_a_linear_map_without_a_kind_is_refused():
    class Unnamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.secret = small_config(), nn.Linear(2, 2)

    from retnet.models.init import initialize

    with pytest.raises(ValueError, match="the kind of secret; accepted: a module that names it in GROWTH"):
        initialize(Unnamed(), with_mup(small_config(), 16), 0)


@pytest.mark.parametrize("init", ["paper", "normal"])
def test_initial_weights_follow_their_rules(init):
    """The deviation of each weight at twice the base width, divided by that at the base."""
    for block in ("gated", "mamba2", "experts"):
        narrow, wide = (model_of(block, width, 64, init=init) for width in (64, 128))
        pairs = zip(growths(narrow).items(), growths(wide).items(), strict=True)
        for (module, parts), (other, own) in pairs:
            for part, a, b in zip(own, rows_of(module, parts), rows_of(other, own), strict=True):
                expected = 2.0 ** RULES[part.growth].init
                if a.numel() > 1000:
                    assert float(b.std() / a.std()) == pytest.approx(expected, rel=0.1), (block, part, a.shape)


def rows_of(weight, parts) -> tuple[Tensor, ...]:
    return weight.detach().split([part.rows for part in parts], -2)


def test_adamw_gets_the_rates_and_decays_of_the_rules():
    model = model_of("experts", 64, 16)
    assert width_ratio(model.config) == 4
    optimizer = adamw(model, 0.8)
    block = model.layers[0]
    expected = {
        model.embedding.weight: (0.8, 0.1),
        block.mixer.q_proj.weight: (0.2, 0.4),
        block.feed_forward.up_proj.weight: (0.2, 0.4),
        block.feed_forward.router.weight: (0.2, 0.4),
        block.mixer_norm.weight: (0.8, 0.0),
    }
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert set(groups) == {id(p) for p in model.parameters()}
    for p, (lr, weight_decay) in expected.items():
        group = groups[id(p)]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((lr, weight_decay))
        assert group["eps"] == pytest.approx(1e-8 / 4)
    assert optimizer.param_groups[0]["lr"] == 0.8  # the rate that the trainer logs


def test_muon_gets_the_rates_of_the_rules_part_by_part():
    """A product whose parts are of several kinds moves by the rate of each, and shrinks as one."""
    model = model_of("mamba2", 64, 16)
    groups = {id(p): group for group in muon_groups(model, 0.8, 0.1) for p in group["params"]}
    mixer = model.layers[0].mixer
    group = groups[id(mixer.in_proj.weight)]
    assert group["part_rates"] == (0.5, 0.5, 0.25, 0.25, 0.25)
    assert (group["lr"], group["weight_decay"]) == (0.8, 0.1)
    assert groups[id(mixer.out_proj.weight)]["lr"] == pytest.approx(0.4)
    assert groups[id(mixer.out_proj.weight)]["weight_decay"] == pytest.approx(0.2)
    assert groups[id(mixer.norm_weight)]["lr"] == groups[id(model.embedding.weight)]["lr"] == 0.8

    moved = {}
    for rates in (None, (0.5, 0.25)):
        weight = nn.Parameter(torch.ones(6, 4))
        weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        own = {"params": [weight], "parts": (2, 4)} | ({} if rates is None else {"part_rates": rates})
        Muon([own], lr=0.1, weight_decay=0.5).step()
        moved[rates] = weight.detach() - 0.95
    torch.testing.assert_close(moved[0.5, 0.25][:2], 0.5 * moved[None][:2])
    torch.testing.assert_close(moved[0.5, 0.25][2:], 0.25 * moved[None][2:])


def test_other_optimizers_are_refused():
    model = model_of("retention", 32, 16)
    with pytest.raises(ValueError, match=r"muP has no rules for SGD; accepted: AdamW, or optim=muon"):
        scale_by_width(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_parameters_of_other_packages_keep_their_rate():
    model = model_of("retention", 32, 16)
    assert Rates(model).of(nn.Linear(4, 4).weight, "adamw") == 1.0


def test_a_configuration_gets_its_scales():
    layers = (blocks(64)["attention"], blocks(64)["experts"], blocks(64)["gated branches"])
    config = with_mup(ModelConfig(VOCAB, 64, layers, logit_scale=0.5), 16, base_head_dim=4)
    assert (config.mup_base_width, config.logit_scale) == (16, 0.125)
    assert config.layers[0].mixer.scale == pytest.approx(16**-0.5 / 2)  # at the base 1 / sqrt(4), then 4 / 16 of it
    assert config.layers[1].feed_forward.router_init_std == pytest.approx(0.02 / 4)
    assert config.layers[2].mixer.branches[1].scale == pytest.approx(16**-0.5 / 2)
    assert config.layers[1].mixer == layers[1].mixer  # the head norm takes any scale of retention
    unit = replace(layers[0], mixer=replace(layers[0].mixer, qk_norm="l2"))
    assert with_mup(ModelConfig(VOCAB, 64, (unit,)), 16, 4).layers[0].mixer.scale == pytest.approx(4**-0.5)
    assert with_mup(ModelConfig(VOCAB, 64, layers), 16, 16).layers[0] == layers[0]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_saved_model_keeps_its_base_and_is_the_same_with_transformers_interface(tmp_path):
    from retnet.models.hf import RetNetForCausalLM

    config = with_mup(small_config([replace(blocks(WIDTH)["attention"])], logit_scale=2.0), 8, 4)
    model = LanguageModel(config).eval()
    RetNetForCausalLM.wrap(model).save_pretrained(tmp_path)
    loaded, ids = RetNetForCausalLM.from_pretrained(tmp_path).eval(), random_ids(1, 9)
    assert loaded.model.config == config
    assert Rates(loaded).of(loaded.model.layers[0].mixer.q_proj.weight, "adamw") == 0.25
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model.head(model.hidden(ids)[0] * 0.5))


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        (LATENT, {}, "base_head_dim is 4, and latent_attention has no scale of its own"),
        (blocks(WIDTH)["retention"], {"head_norm": "none"}, "retention without head_norm has no scale of its own"),
    ],
)
def test_layers_whose_scores_cannot_be_scaled_are_refused(block, changes, message):
    config = small_config([replace(block, mixer=replace(block.mixer, **changes))])
    assert with_mup(config, 8).mup_base_width == 8
    with pytest.raises(ValueError, match=message):
        with_mup(config, 8, base_head_dim=4)


def test_rules_are_given_once_and_with_positive_widths():
    with pytest.raises(ValueError, match="mup_base_width is 8 already"):
        with_mup(with_mup(small_config(), 8), 8)
    with pytest.raises(ValueError, match="base_width is 0; accepted: a positive integer"):
        with_mup(small_config(), 0)
    with pytest.raises(ValueError, match="mup_base_width is 0; accepted: a positive integer, or None"):
        small_config(mup_base_width=0)
