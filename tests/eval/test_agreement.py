import torch

from retnet.eval.agreement import check_model, check_operator
from retnet.models.directory import load_model
from retnet.ops import cpu_recurrent


def test_a_model_agrees_with_itself_in_float64_to_rounding(byte_model):
    ids = torch.randint(257, (2, 37), generator=torch.Generator().manual_seed(0))
    rows = list(check_model(load_model(byte_model), ids, ["float64"], chunk_sizes=[5]))
    assert all(row.relative < 1e-12 for row in rows)
    assert {row.changed for row in rows} == {0}
    assert {row.tokens for row in rows} == {74}


def test_checking_a_model_does_not_change_it(byte_model):
    model = load_model(byte_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(check_model(model, torch.arange(9)[None], ["bfloat16"], chunk_sizes=[4]))
    assert model.config == load_model(byte_model).config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_nan_fails_the_check(monkeypatch):
    def lost(*arguments):
        out, *rest = forward(*arguments)
        return torch.full_like(out, torch.nan), *rest

    forward = cpu_recurrent.forward
    monkeypatch.setattr(cpu_recurrent, "forward", lost)
    rows = {row.way: row.passed for row in check_operator((1, 9, 2, 4, 4), ["float32"], [4])}
    assert not rows["recurrent"]
    assert rows["chunkwise, C = 4"]
