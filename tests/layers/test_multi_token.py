"""Multi-token prediction: its loss against a plain reference, and its states split anywhere."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.layers.multi_token import MultiTokenConfig, run_block
from retnet.layers.recompute import LEVELS, Recompute
from retnet.layers.token_layout import TokenLayout
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from tests.small_models import CONV, GATED, MAMBA2, NOPE, PAPER, WINDOW, random_ids, small_model

BLOCKS = [
    pytest.param(block, id=name, marks=() if name in ("convolution", "window") else pytest.mark.slow)
    for name, block in {
        "retention": PAPER, "convolution": CONV, "window": WINDOW, "mamba2": MAMBA2, "attention": NOPE
    }.items()
]  # fmt: skip
DOCUMENTS = (7, 1, 12, 2, 3)


def model_with(block=PAPER, num_modules=2, num_blocks=1, **options) -> LanguageModel:
    mtp = MultiTokenConfig(block, num_modules, num_blocks, loss_weight=0.3)
    return small_model((PAPER, GATED), mtp=mtp, **{"dtype": "float64", **options})


def reference_loss(model: LanguageModel, documents: list[Tensor], labels: list[Tensor]) -> Tensor:
    """Equations 21 to 25 of arXiv 2412.19437, document by document: h_i is the hidden state of token i, module k
    projects (h_i, token i + k), its blocks see these, and it predicts token i + k + 1."""
    config, nats, count = model.config.mtp, [0.0] * model.config.mtp.num_modules, sum((y != -100).sum() for y in labels)
    for ids, y in zip(documents, labels, strict=True):
        h, _ = model.hidden(ids[None])
        embedded = model.embedding(ids)[None]
        for k, module in enumerate(model.mtp, 1):
            # The zeros that stand for the hidden state before the first token take a place of their own.
            h = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
            x = torch.cat([module.hidden_norm(h), module.embedding_norm(embedded)], -1) @ module.projection.weight.T
            layout = TokenLayout.of((1, len(ids)), ids.device)
            for block in module.blocks:
                x, _ = block(x, None, layout)
            h = module.final_norm(x)
            log_p = (h[0] @ model.head.weight.T).log_softmax(-1)
            for i in range(len(ids) - k):
                if y[i + k] != -100:
                    nats[k - 1] = nats[k - 1] - log_p[i + k, y[i + k]]
    return config.loss_weight / config.num_modules * sum(nats) / count


@pytest.mark.parametrize("block", BLOCKS)
def test_the_loss_of_packed_documents_is_that_of_a_plain_reference(block):
    model = model_with(block, num_blocks=2).train()
    documents = [random_ids(length, seed=length) for length in DOCUMENTS]
    labels = [torch.cat([ids[1:], torch.tensor([-100])]) for ids in documents]
    labels[2][4] = -100
    ids, y = torch.cat(documents)[None], torch.cat(labels)[None]
    bounds = torch.tensor([0, *DOCUMENTS, 0]).cumsum(0)  # an empty document at the end
    hidden, _ = model.hidden(ids, cu_seqlens=bounds)
    loss = model.ahead(hidden, ids, labels=y, cu_seqlens=bounds).loss
    expected = reference_loss(model, documents, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert model.loss(ids, y, cu_seqlens=bounds).item() == pytest.approx((model.mean_nats(hidden, y) + loss).item())
    ours = torch.autograd.grad(loss, list(model.mtp.parameters()) + [model.embedding.weight])
    theirs = torch.autograd.grad(expected, list(model.mtp.parameters()) + [model.embedding.weight])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def ahead_of(model: LanguageModel, ids: Tensor, state: ModelState | None = None, **marks) -> tuple[Tensor, ModelState]:
    """The hidden states of all modules, and the state of model and modules after the tokens."""
    hidden, after = model.hidden(ids, state, carry=True, **marks)
    ahead = model.ahead(hidden, ids, state, carry=True, **marks)
    return torch.stack(ahead.hidden), replace(after, mtp=ahead.states)


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_tokens_may_be_read_in_any_parts_and_drafts_are_those_of_reading(block):
    model, ids = model_with(block, num_modules=3), random_ids(2, 23)
    whole, _ = ahead_of(model, ids)
    for cuts in ([5, 1, 1, 16], [1] * 23):
        parts, state = [], model.init_state(2, num_tokens=23, mtp=True)
        for part in ids.split(cuts, 1):
            out, state = ahead_of(model, part, state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 2), whole)
    state = model.init_state(2, num_tokens=23, mtp=True)
    _, before = ahead_of(model, ids[:, :9], state)
    _, draft = model.draft(ids[:, 9:17], before)
    counts = torch.tensor([3, 8])
    draft.accept_(before, counts)
    for row, count in enumerate((12, 17)):
        _, expected = ahead_of(model, ids[row : row + 1, :count])
        for name, x in before.select(torch.tensor([row])).trim().named_tensors().items():
            torch.testing.assert_close(
                x, expected.trim().named_tensors()[name], msg=lambda text, n=name: f"{n}: {text}"
            )


@torch.no_grad()
def test_padding_and_masked_tokens_inside_a_row_change_nothing():
    model, ids = model_with(WINDOW), random_ids(1, 9)
    whole, _ = ahead_of(model, ids)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0]]).bool()
    padded = torch.full((1, 14), 3)
    padded[mask] = ids[0]
    out, state = ahead_of(model, padded, mask=mask)
    torch.testing.assert_close(out[:, mask], whole[:, 0])
    following, _ = ahead_of(model, random_ids(1, 1, seed=4), state)
    expected, _ = ahead_of(model, torch.cat([ids, random_ids(1, 1, seed=4)], 1))
    torch.testing.assert_close(following[:, :, 0], expected[:, :, -1])


@torch.no_grad()
def test_guesses_are_those_of_reading_each_guess_before_the_next():
    """More guesses than modules: the last module continues its own hidden states."""
    model, ids = model_with(GATED, num_modules=2), random_ids(4, 11)
    _, state = ahead_of(model, ids[:, :-1], model.init_state(4, mtp=True))
    kept = state.clone()
    found = model.guess(ids[:, -1], state, 5, lambda logits, number: logits.argmax(-1))
    for name, x in state.named_tensors().items():
        assert torch.equal(x, kept.named_tensors()[name])

    def read(module, before, tokens):
        """The module's hidden states of the tokens, one more than there are hidden states before them."""
        before, embedded = F.pad(before, (0, 0, 1, 0)), model.embedding(tokens)
        out, _ = module(before, embedded, [None], TokenLayout.of(tuple(tokens.shape), ids.device), run_block)
        return out

    tokens, (before, _) = ids, model.hidden(ids[:, :-1])
    for number in range(1, 6):
        out = read(model.mtp[min(number, 2) - 1], before, tokens)
        tokens = torch.cat([tokens, model.logits(out[:, -1:]).argmax(-1)], 1)
        before = out if number == 1 else torch.cat([before, out[:, -1:]], 1)
    assert torch.equal(tokens[:, 11:], found)


def test_recomputing_changes_no_gradient():
    gradients, ids, bounds = [], random_ids(1, 26), torch.tensor([0, 9, 10, 25])
    for level in LEVELS:
        model = model_with(WINDOW).train()
        model.recompute = Recompute(level)
        model.loss(ids[:, :-1], ids[:, 1:], cu_seqlens=bounds).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_a_configuration_with_mtp_survives_json_and_bad_values_are_refused():
    config = model_with(WINDOW).config
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"num_modules is 0; accepted: 1 to 64"):
        replace(config.mtp, num_modules=0)
    with pytest.raises(ValueError, match="norm_eps is 0; accepted: a number above 0"):
        replace(config.mtp, norm_eps=0)


def test_cost_counts_the_modules_and_their_head_in_training_alone():
    from retnet.models.activations import activation_bytes
    from retnet.models.cost import model_cost, parameter_counts

    config = model_with(num_modules=2, dtype="float32").config
    plain = replace(config, mtp=None)
    counts = parameter_counts(config)
    assert counts["mtp"] == sum(p.numel() for p in LanguageModel(config).mtp.parameters())
    assert counts["total"] - counts["mtp"] == parameter_counts(plain)["total"]
    ours, without = model_cost(config, 100), model_cost(plain, 100)
    assert (ours.decode_flops, ours.forward_flops, ours.state_bytes) == (
        without.decode_flops, without.forward_flops, without.state_bytes
    )  # fmt: skip
    # A model of the module's block, whose head and final norm it has too, and the projection with two norms more.
    one = model_cost(replace(plain, layers=(config.mtp.block,), final_norm="rms"), 100)
    extra = 2 * (2 * config.d_model**2 + 3 * config.d_model) - 2 * config.d_model
    assert ours.training_flops - without.training_flops == 3 * 2 * (one.forward_flops + extra)
    held = activation_bytes(config, "none", autocast=False) - activation_bytes(plain, "none", autocast=False)
    block = activation_bytes(replace(plain, layers=(config.mtp.block,)), "none", autocast=False)
    assert 2 * block < held < 2 * block + 2 * 16 * 4 * config.d_model
