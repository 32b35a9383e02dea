"""LangChain's client of OpenAI's API."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra `clients`")

pytestmark = pytest.mark.slow


class Verdict(BaseModel):
    """Whether something is so."""

    answer: bool


@pytest.fixture(scope="module")
def chat(url):
    return langchain_openai.ChatOpenAI(
        model="byte-model", base_url=f"{url}/v1", api_key="none", max_tokens=100, seed=1, temperature=0.7
    )


def test_an_answer_and_its_stream_are_the_same_text(chat):
    whole = chat.invoke("Hello")
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == whole.content


def test_structured_output(chat):
    assert isinstance(chat.with_structured_output(Verdict, method="json_schema").invoke("Is it so?"), Verdict)


def test_a_completion(url):
    model = langchain_openai.OpenAI(
        model="byte-model", base_url=f"{url}/v1", api_key="none", max_tokens=20, seed=1, temperature=0.7
    )
    assert model.invoke("Once") == "".join(model.stream("Once"))
