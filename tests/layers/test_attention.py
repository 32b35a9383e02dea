import pytest
import torch

from retnet.layers.attention import Attention, AttentionConfig, AttentionState
from retnet.layers.token_layout import TokenLayout
from tests.layers.devices import assert_equal_on


def decode(layer: Attention, state: AttentionState | None, x: torch.Tensor, in_place: bool = True) -> AttentionState:
    start = None if state is None else state.position
    layout = TokenLayout.of(tuple(x.shape[:2]), x.device, start=start, carry=True, in_place=in_place)
    with torch.no_grad():
        return layer(x, state, layout)[1]


def test_the_cache_of_a_window_never_holds_more_than_the_window():
    layer = Attention(AttentionConfig(2, 1, head_dim=4, window=5), 8)
    state = decode(layer, None, torch.randn(2, 3, 8))
    assert state.keys.shape == (2, 3, 1, 4)
    for _ in range(9):
        state = decode(layer, state, torch.randn(2, 1, 8))
    assert state.keys.shape == (2, 5, 1, 4)
    assert state.position.tolist() == [12, 12]
    assert sorted(state.slot_positions()[0].tolist()) == [7, 8, 9, 10, 11]
    state = decode(layer, None, torch.randn(2, 30, 8))
    assert state.keys.shape == (2, 5, 1, 4)


def test_a_cache_moves_rarely_and_in_place_steps_return_the_same_state():
    layer = Attention(AttentionConfig(2, 1, head_dim=4), 8)
    state = decode(layer, None, torch.randn(1, 10, 8))
    addresses = set()
    for _ in range(200):
        state = decode(layer, state, torch.randn(1, 1, 8))
        addresses.add(state.keys.data_ptr())
    assert state.position.item() == 210
    assert len(addresses) <= 10
    reserved = state.reserve(1000)
    address = reserved.keys.data_ptr()
    for _ in range(50):
        after = decode(layer, reserved, torch.randn(1, 1, 8))
        assert after is reserved
    assert reserved.keys.data_ptr() == address


def test_grouped_heads_have_fewer_keys_and_values():
    layer = Attention(AttentionConfig(8, 2, head_dim=4), 32)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (8, 32)
    state = decode(layer, None, torch.randn(1, 6, 32))
    assert state.nbytes == 2 * 6 * 2 * 4 * 4 + 8


def test_dropout_acts_in_training_alone():
    layer, x = Attention(AttentionConfig(2, 2, head_dim=4, dropout=0.5), 8), torch.randn(1, 20, 8)
    layout = TokenLayout.of((1, 20), x.device)
    layer.eval()
    assert torch.equal(layer(x, None, layout)[0], layer(x, None, layout)[0])
    layer.train()
    assert not torch.equal(layer(x, None, layout)[0], layer(x, None, layout)[0])


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
@pytest.mark.parametrize("qk_norm", ["rms", "l2"])
@torch.no_grad()
def test_norms_of_q_and_k_and_the_gate_are_their_formulas(qk_norm, gate):
    K, eps = 6, 0.03
    config = AttentionConfig(4, 2, head_dim=K, rotary="none", qk_norm=qk_norm, qk_norm_eps=eps, gate=gate)
    layer, x = Attention(config, 8).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    if qk_norm == "rms":
        for weight in (layer.q_norm_weight, layer.k_norm_weight):
            weight.normal_()
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, K)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if qk_norm == "rms":
        q, k = (
            y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * w
            for y, w in ((q, layer.q_norm_weight), (k, layer.k_norm_weight))
        )
    else:
        q, k = (y / (y.square().sum(-1, keepdim=True) + eps).sqrt() for y in (q, k))
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / K**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    out = torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v).flatten(-2)
    if gate == "sigmoid":
        out = out * torch.sigmoid(x @ layer.gate_proj.weight.T)
    y = layer(x, None, TokenLayout.of((2, 9), x.device))[0]
    torch.testing.assert_close(y, out @ layer.out_proj.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learnable", [True, False])
@torch.no_grad()
def test_sinks_are_terms_of_the_sum_that_divides_the_weights(learnable):
    K, config = 6, AttentionConfig(4, 2, head_dim=6, rotary="none", num_sinks=3, learnable_sinks=learnable)
    layer, x = Attention(config, 8).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    logits = torch.zeros(4, 3, dtype=torch.float64)
    if learnable:
        assert torch.equal(layer.sink_logits, logits)
        logits = layer.sink_logits.normal_()
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, K)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    scores = torch.einsum("bihk,bjhk->bhij", q, k.repeat_interleave(2, 2)) / K**0.5
    weights = scores.exp().tril()
    weights = weights / (weights.sum(-1, keepdim=True) + logits.exp().sum(-1)[:, None, None])
    out = torch.einsum("bhij,bjhk->bihk", weights, v.repeat_interleave(2, 2)).flatten(-2)
    y = layer(x, None, TokenLayout.of((2, 9), x.device))[0]
    torch.testing.assert_close(y, out @ layer.out_proj.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm_eps": -1e-6}, "qk_norm_eps is -1e-06; accepted: a number of at least 0"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; accepted: a divisor of num_heads"),
        ({"head_dim": 5}, "head_dim is 5; accepted: an even number"),
        ({"window": 0}, "window is 0"),
        ({"alibi": True}, "alibi is true with rotary 'half'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"rotary_factor": 0.0}, "rotary_factor 0.0"),
        ({"rotary_dim": 8}, "rotary_dim is 8; accepted: an even number from 2 to 6, or None"),
        ({"rotary_dim": 3}, "rotary_dim is 3; accepted: an even number"),
        ({"rotary_dim": 4, "rotary": "none"}, "rotary_dim is 4; accepted: None without rotary"),
        ({"max_context": 0}, "max_context is 0"),
        ({"max_context": 8, "window": 4}, "max_context is 8 with window 4; accepted: one of them"),
        ({"num_sinks": -1}, "num_sinks is -1; accepted: 0 or more logits per head"),
    ],
)
def test_invalid_configurations_are_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, **options})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 40},
        {"rotary": "none", "alibi": True},
        {"qk_norm": "rms", "gate": "sigmoid"},
        {"qk_norm": "l2", "window": 40},
        {"rotary": "none", "qk_norm": "rms", "gate": "sigmoid"},
        {"rotary_dim": 16, "num_sinks": 1},
        {"rotary_dim": 16, "num_sinks": 2, "window": 40},
    ],
)
def test_cuda_equals_cpu_for_packs_pads_and_decoding(options):
    torch.manual_seed(0)
    layer = Attention(AttentionConfig(4, 2, head_dim=32, **options), 64)
    assert_equal_on(("cpu", "cuda"), layer)


class TestMaxContext:
    """Attention that is defined for 6 tokens."""

    @pytest.fixture
    def layer(self) -> Attention:
        return Attention(AttentionConfig(2, 1, head_dim=4, max_context=6), 8)

    def test_longer_rows_and_documents_are_refused_and_packs_of_short_ones_are_not(self, layer):
        x = torch.randn(1, 12, 8)
        with pytest.raises(ValueError, match=r"a sequence has 12 tokens; accepted by this layer: at most 6 \(max_cont"):
            layer(x, None, TokenLayout.of((1, 12), x.device))
        layer(x, None, TokenLayout.of((1, 12), x.device, cu_seqlens=torch.tensor([0, 6, 12])))
        with pytest.raises(ValueError, match="a sequence has 7 tokens"):
            layer(x, None, TokenLayout.of((1, 12), x.device, cu_seqlens=torch.tensor([0, 5, 12])))

    def test_pads_do_not_count(self, layer):
        x, mask = torch.randn(2, 9, 8), torch.arange(9) >= torch.tensor([[3], [5]])
        layer(x, None, TokenLayout.of((2, 9), x.device, mask=mask))
        mask[0, 2] = True
        with pytest.raises(ValueError, match="a sequence has 7 tokens"):
            layer(x, None, TokenLayout.of((2, 9), x.device, mask=mask))

    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("room", [0, 4, 6])
    def test_steps_pieces_and_scores_of_a_continuation_end_at_the_limit(self, layer, in_place, room):
        x = torch.randn(2, 12, 8)
        state = layer.init_state(2, x.device, x.dtype, room)
        state = decode(layer, state, x[:, :3], in_place)
        for t in range(3, 6):
            state = decode(layer, state, x[:, t : t + 1], in_place)
        assert state.keys.shape[1] == 6
        for more in (1, 2):
            with pytest.raises(ValueError, match=f"a sequence has {6 + more} tokens"):
                decode(layer, state, x[:, 6 : 6 + more], in_place)
        with pytest.raises(ValueError, match="a sequence has 8 tokens"), torch.no_grad():
            layer(x[:, 6:8], state, TokenLayout.of((2, 2), x.device, start=state.position))
        assert state.position.tolist() == [6, 6]

    def test_a_longer_cache_is_refused(self, layer):
        with pytest.raises(ValueError, match="a sequence has 7 tokens"):
            layer.init_state(1, torch.device("cpu"), torch.float32, 7)
