import pytest


@pytest.mark.parametrize(
    ("path", "instead"), [("/v1/responses", "use /v1/chat/completions"), ("/v1/embeddings", "no embeddings")]
)
def test_routes_that_are_left_out_say_so_and_what_to_use(client, path, instead):
    for response in (client.post(path, json={"input": "a"}), client.get(path)):
        assert response.status_code == 404
        error = response.json()["error"]
        assert f"{path} is left out of this server" in error["message"]
        assert instead in error["message"]
        assert error["code"] == "not_supported"
