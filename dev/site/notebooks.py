"""A notebook as a page: its texts, its code, and the outputs that are stored in it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

HIDDEN = "hide-input"  # the tag of cells that only draw: their code is folded


def as_markdown(notebook: Path, pictures: Path) -> str:
    """The page of a notebook. Its PNG outputs are written beside `pictures`, as NAME-1.png, NAME-2.png, ..."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts, count = [], 0
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(_code(source.rstrip(), HIDDEN in cell.get("metadata", {}).get("tags", ())))
            for output in cell["outputs"]:
                data = _data(output)
                if "image/png" in data:
                    count += 1
                    picture = pictures.with_name(f"{pictures.stem}-{count}.png")
                    picture.parent.mkdir(parents=True, exist_ok=True)
                    picture.write_bytes(base64.b64decode("".join(data["image/png"])))
                    parts.append(f'<img src="{picture.name}" alt="output of the cell above">')
                elif "text/plain" in data:
                    parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _code(source: str, folded: bool) -> str:
    block = f"```python\n{source}\n```"
    if not folded:
        return block
    return f'<details markdown="1"><summary>Code of the picture</summary>\n\n{block}\n\n</details>'


def _data(output: dict[str, Any]) -> dict[str, Any]:
    """An output by MIME type; printed text counts as text/plain."""
    return output.get("data", {}) | ({"text/plain": output["text"]} if output["output_type"] == "stream" else {})
