"""Any body gets an answer or a refusal that names a field."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.serve.http.api.completions import CompletionBody

NUMBERS = st.sampled_from([0, 1, 2, 5, -1, 20, 257, 2**31, 2**63, -(2**63), 10**400, 0.0, 0.5, -0.0, 1e-300, 1e300])
TEXTS = st.sampled_from(["", "a", "€", "\x00", "\ufffd", "<|document|>", "5", "x" * 700, "json_object", "\u2028"])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
KEYS = st.sampled_from(["", "5", "300", "type", "json", "include_usage", "a"])
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2), max_leaves=6
)
NAMES = st.sampled_from([*CompletionBody.model_fields, *CompletionBody.refused, "unknown"])
LIKELY = {  # so that many bodies reach the engine
    "temperature": st.sampled_from([0, 1, 0.5, 1e6]),
    "top_p": st.sampled_from([0, 1, 1e-12, 0.5]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.sampled_from(["\ufffd", ["a", "\x00"], "<|document|>"]),
    "logit_bias": st.just({"5": -100, "256": 100}),
    "n": st.integers(1, 4),
    "echo": st.booleans(),
    "logprobs": st.integers(0, 20),
    "stream": st.booleans(),
    "repetition_penalty": st.sampled_from([1e-6, 1e6]),
}


@settings(max_examples=100)
@given(
    prompt=st.sampled_from(["a", "", [], [5], [[], [1]], ["a", "é"]]) | VALUES,
    likely=st.fixed_dictionaries({}, optional=LIKELY),
    odd=st.dictionaries(NAMES, VALUES, max_size=2),
)
def test_no_body_makes_the_server_fail(client, prompt, likely, odd):
    body = {"max_tokens": 2, "prompt": prompt} | likely | odd
    response = client.post("/v1/completions", json=body)
    if response.status_code == 200:
        assert "error" not in response.text[:20]
        return
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] is not None
    assert error["message"]
