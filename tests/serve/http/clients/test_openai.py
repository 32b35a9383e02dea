"""OpenAI's own Python client."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

openai = pytest.importorskip("openai", reason="needs the extra `clients`")

pytestmark = pytest.mark.slow
MODEL = "byte-model"
MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


class Colour(BaseModel):
    name: Literal["red", "green", "blue"]
    share: Annotated[int, Field(ge=0, le=100)]
    bright: bool


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_a_completion_and_its_stream_are_the_same_text(client):
    fields = {"model": MODEL, "prompt": "Once", "max_tokens": 40, "seed": 3}
    whole = client.completions.create(**fields)
    assert whole.usage.completion_tokens == 40
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **fields))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 40
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_many_prompts_and_choices(client):
    result = client.completions.create(
        model=MODEL, prompt=["One", "Two"], n=2, max_tokens=5, logprobs=2, echo=True, seed=1
    )
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in result.choices] == ["One", "One", "Two", "Two"]
    for choice in result.choices:
        values = choice.logprobs.token_logprobs  # a document start stands before the first
        assert all(math.isfinite(value) and value <= 0 for value in values)
        assert len(choice.logprobs.tokens) == len(values) == len(choice.logprobs.top_logprobs)


def test_a_chat_and_its_stream_are_the_same_text(client):
    fields = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 30, "seed": 5, "temperature": 0.8}
    whole = client.chat.completions.create(**fields)
    assert whole.choices[0].message.role == "assistant"
    chunks = client.chat.completions.create(stream=True, **fields)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content


def test_log_probabilities_of_a_chat(client):
    result = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3, temperature=0
    )
    tokens = result.choices[0].logprobs.content
    assert len(tokens) == result.usage.completion_tokens
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
        assert token.bytes


def test_parsed_outputs_are_objects_of_a_pydantic_model(client):
    for seed in range(3):
        result = client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Colour, max_tokens=400, seed=seed
        )
        parsed = result.choices[0].message.parsed
        assert isinstance(parsed, Colour)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Colour, max_tokens=5)


def test_a_parsed_stream(client):
    fields = {"model": MODEL, "messages": MESSAGES, "response_format": Colour, "max_tokens": 400}
    with client.chat.completions.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Colour)
    assert "content.delta" in kinds
    assert "content.done" in kinds


def test_fields_of_vllm_and_of_sessions_pass_through(client):
    extra = {"structured_outputs": {"choice": ["yes", "no"]}, "keep_session": True}
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, extra_body=extra)
    assert first.choices[0].message.content in ("yes", "no")
    session = first.session["id"]
    follow = [{"role": "user", "content": "Are you sure?"}]
    second = client.chat.completions.create(
        model=MODEL, messages=follow, max_tokens=20, extra_body=extra | {"session_id": session}
    )
    assert second.session["id"] == session
    assert second.session["reused_tokens"] > first.usage.prompt_tokens - 2


def test_errors_are_of_the_clients_classes(client):
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a" * 3000, max_tokens=10)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.APIStatusError, match="responses"):
        client.responses.create(model=MODEL, input="a")


def test_a_stream_that_is_closed_early_frees_its_slot(client):
    for _ in range(12):  # more than the server has places
        stream = client.completions.create(model=MODEL, prompt="Once", max_tokens=2000, stream=True)
        next(iter(stream))
        stream.close()
    assert client.completions.create(model=MODEL, prompt="Once", max_tokens=3).usage.completion_tokens == 3


def test_the_asynchronous_client_has_many_requests_at_a_time(url):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def one(seed: int) -> str:
                text = ""
                async for chunk in await client.completions.create(
                    model=MODEL, prompt="Once", max_tokens=30, seed=seed, stream=True
                ):
                    text += chunk.choices[0].text
                return text

            alone = [await one(seed) for seed in range(3)]
            crowd = await asyncio.gather(*[one(seed % 3) for seed in range(12)])
            assert crowd == alone * 4
            return crowd

    assert len(asyncio.run(run())) == 12
