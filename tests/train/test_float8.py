"""Products in float8: which layers have them, their numbers, and runs with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retnet import LanguageModel
from retnet.models.directory import load_model, save_model
from retnet.models.presets import FORMS, retnet_config
from retnet.train.float8 import float8_layers, use_float8
from retnet.train.recipe import load_recipe
from retnet.train.run import train

from .conftest import recipe_for

CPU = torch.device("cpu")


def sixteen_heads() -> LanguageModel:
    """Whose decays are computed by a layer with sizes that float8 could have."""
    return LanguageModel(retnet_config("sixteen", 2, 128, 16, form=FORMS["-gated"], vocab_size=257, seed=3))


def test_all_plain_products_of_blocks_are_in_float8_and_no_others():
    pytest.importorskip("torchao")
    model = sixteen_heads()
    plain, names = set(float8_layers(model)), set(model.state_dict())
    layers = {f"layers.{i}.{name}" for i in range(2) for name in (
        "mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.gate_proj", "mixer.out_proj",
        "feed_forward.up_proj", "feed_forward.down_proj",
    )}  # fmt: skip
    assert plain == layers
    weights = dict(model.named_parameters())
    use_float8(model, "rowwise", CPU)
    changed = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert changed == layers
    assert set(model.state_dict()) == names
    assert all(p is weights[name] for name, p in model.named_parameters())


def rounded(x: torch.Tensor, over: int | None, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """x as float8 holds it, with one scale, or one per vector along a dimension: a power of two."""
    most = x.abs().amax() if over is None else x.abs().amax(over, keepdim=True)
    scale = torch.finfo(dtype).max / most
    scale = scale if over is None else torch.exp2(torch.floor(torch.log2(scale)))
    return (x * scale).to(dtype).double() / scale.double()


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_products_and_gradients_are_those_of_rounded_operands(scaling):
    """Rows are scaled along the dimension that a product sums over."""
    pytest.importorskip("torchao")
    model = sixteen_heads()
    use_float8(model, scaling, CPU)
    layer = model.layers[0].mixer.q_proj
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 128, generator=generator) * torch.logspace(-3, 1, 48)[:, None]
    dy = torch.randn(48, 128, generator=generator) * torch.logspace(-2, 2, 128)
    weight, leaf = layer.weight.detach(), x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    of = (lambda over: over) if scaling == "rowwise" else (lambda over: None)
    small = torch.float8_e4m3fn if scaling == "rowwise" else torch.float8_e5m2  # of gradients
    found = {"y": y.detach(), "dx": leaf.grad, "dw": layer.weight.grad}
    expected = {
        "y": rounded(x, of(1)) @ rounded(weight, of(1)).T,
        "dx": rounded(dy, of(1), small) @ rounded(weight, of(0)),
        "dw": rounded(dy, of(0), small).T @ rounded(x, of(0)),
    }
    exact = {"y": x.double() @ weight.double().T, "dx": dy.double() @ weight.double(), "dw": dy.T.double() @ x.double()}
    for name, value in expected.items():
        assert (found[name].double() - value).norm() < 1e-5 * value.norm(), name
        assert (value - exact[name]).norm() > 5e-3 * value.norm(), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"float8": "rows"}, "float8 is 'rows'"),
        ({"float8": "rowwise", "bf16": "false"}, "without bf16; accepted: bf16=true"),
        ({"float8": "rowwise", "length": 47, "per_device_train_batch_size": 3}, "with 141 tokens per step"),
        ({"float8": "rowwise", "method": "state"}, "with method 'state'; accepted: none"),
    ],
)
def test_a_run_without_float8_products_is_refused(settings, message):
    values = {"model": "retnet-tiny", "data": "stdlib", "bf16": "true"} | settings
    with pytest.raises(ValueError, match=message):
        load_recipe(None, [f"{key}={value}" for key, value in values.items()])


def test_a_model_without_sizes_for_float8_is_refused():
    config = retnet_config("odd", 1, 24, 2, vocab_size=257)
    with pytest.raises(ValueError, match="accepted: a model whose linear layers have sizes in multiples of 16"):
        use_float8(LanguageModel(config), "tensorwise", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "light", "layer"])
def test_a_run_in_float8_learns_and_saves_a_plain_model(recompute, short_texts, tmp_path, console, no_curve):
    pytest.importorskip("torchao")
    stack = tmp_path / "model"
    save_model(sixteen_heads(), stack)
    losses = []
    for name, more in (("bf16", {}), ("float8", {"float8": "tensorwise"})):
        recipe = recipe_for(
            stack, short_texts, tmp_path / name, bf16=True, recompute=recompute, do_eval=True, max_steps=12, **more
        )
        losses.append(train(recipe, console).valid_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    saved = load_model(tmp_path / "float8")
    assert type(saved.layers[0].mixer.q_proj) is nn.Linear
    assert {p.dtype for p in saved.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_compiled_blocks_in_float8_are_near_those_in_bfloat16(scaling):
    pytest.importorskip("torchao")
    losses, device = [], torch.device("cuda")
    ids = torch.randint(257, (4, 257), generator=torch.Generator().manual_seed(0)).to(device)
    for float8 in (False, True):
        model = sixteen_heads().to(device)
        if float8:
            use_float8(model, scaling, device)
        for block in model.layers:
            block.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[0] < 5.4
