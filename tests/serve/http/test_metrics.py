"""Metrics for Prometheus."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.serve.http.server import tiny_server


def values(text: str) -> dict[str, float]:
    """Samples by name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_requests_tokens_times_and_prefixes_are_counted():
    with tiny_server(prefix_cache_bytes=2**24) as client:
        body = {"model": "tiny", "prompt": [1] * 100, "max_tokens": 5, "ignore_eos": True}
        for _ in range(2):
            assert client.post("/v1/completions", json=body).status_code == 200
        client.post("/v1/completions", json=body | {"prompt": [999]})
        text = client.get("/metrics").text
    counts = values(text)
    assert counts["retnet_requests_total{method=POST,route=/v1/completions,status=200}"] == 2
    assert counts["retnet_requests_total{method=POST,route=/v1/completions,status=400}"] == 1
    assert counts["retnet_outputs_total{reason=length}"] == 2
    assert counts["retnet_new_tokens_total{}"] == 10
    assert counts["retnet_slots{}"] == 4
    assert counts["retnet_running{}"] == counts["retnet_waiting{}"] == 0
    assert counts["retnet_prefix_hits_total{}"] == 1
    assert counts["retnet_prefix_tokens_saved_total{}"] == 99
    assert sum(value for name, value in counts.items() if name.startswith("retnet_prefix_misses_total")) == 1
    assert counts["retnet_prefix_state_bytes{}"] > 0
    assert counts["retnet_slot_state_bytes{}"] > 0
    for name in ("queue", "time_to_first_token", "time_per_token"):
        assert counts[f"retnet_{name}_seconds_count{{}}"] == 2
        assert counts[f"retnet_{name}_seconds_sum{{}}"] > 0


def test_what_clients_send_makes_no_new_labels():
    with tiny_server() as client:
        for i in range(20):
            client.get(f"/none/{i}")
            client.request(f"METHOD{i}", "/health")
            client.get(f"/v1/models/{i}")
        names = [name for name in values(client.get("/metrics").text) if name.startswith("retnet_requests_total")]
    assert sorted(names) == [
        "retnet_requests_total{method=GET,route=/v1/models/{name:path},status=404}",
        "retnet_requests_total{method=GET,route=none,status=404}",
        "retnet_requests_total{method=other,route=/health,status=405}",
    ]


def test_two_servers_in_one_process_count_for_themselves():
    with tiny_server() as first, tiny_server() as second:
        first.get("/v1/models")
        assert "/v1/models" in first.get("/metrics").text
        assert "/v1/models" not in second.get("/metrics").text
