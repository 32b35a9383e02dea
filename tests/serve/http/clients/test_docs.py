"""The Python examples of the page's section on clients run."""

from __future__ import annotations

import re

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs/do/serve.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE[PAGE.index("## Clients") :], re.DOTALL)


def test_the_page_has_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=["openai", "langchain"])
def test_an_example_runs(url, example):
    for library in re.findall(r"^(?:import|from) (openai|langchain_openai)", example, re.MULTILINE):
        pytest.importorskip(library, reason="needs the extra `clients`")
    exec(example.replace("http://localhost:8000", url).replace('"demo"', '"byte-model"'), {"__name__": "example"})
