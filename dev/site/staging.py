"""The pages as the generator reads them: docs/ with generated parts, and a page for each file that a page links.

A link out of docs/, such as to a test or an example, leads on the site to a page with that file's text. A link to a
folder becomes its name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dev.site import generated
from dev.site.notebooks import as_markdown

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)((?:#[^)\s]*)?(?: \"([^\"]*)\")?\))")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
PICTURES = {".png", ".svg", ".jpg", ".gif"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json", ".sh": "bash"}
MAX_BYTES = 300_000  # of a linked file


class Staging:
    """Copies pages from a repository into a folder."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.docs, self.folder = root, root / "docs", folder
        self._staged: set[Path] = set()

    def all_pages(self) -> None:
        for page in sorted(self.docs.rglob("*.md")):
            self.page(page)

    def place(self, source: Path) -> Path:
        """The path of a source file in the staged folder."""
        if source.is_relative_to(self.docs):
            return source.relative_to(self.docs)
        path = Path("files") / source.relative_to(self.root)
        return path if source.suffix in {".md", *PICTURES} else path.with_name(path.name + ".md")

    def page(self, source: Path) -> None:
        if source.suffix == ".ipynb":
            text = as_markdown(source, self.folder / self.place(source))
        else:
            text = generated.fill(source.read_text(encoding="utf-8"), self.root)
        code: list[str] = []  # is no Markdown: put aside while links are replaced

        def aside(match: re.Match[str]) -> str:
            code.append(match[0])
            return f"\x00{len(code) - 1}\x00"

        text = LINK.sub(lambda match: self._link(match, source), CODE.sub(aside, text))
        self._write(source, re.sub(r"\x00(\d+)\x00", lambda match: code[int(match[1])], text))

    def _link(self, match: re.Match[str], source: Path) -> str:
        before, target, after, title = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = Path(os.path.normpath(source.parent / target))
        if not file.exists() or not file.is_relative_to(self.root):
            raise ValueError(f"{source.relative_to(self.root)} links {target}, which does not exist")
        if file.is_dir():
            return before.removesuffix("(").strip("[]")
        self._follow(file)
        place = os.path.relpath(self.place(file), self.place(source).parent)
        if title and file.suffix == ".py":
            return f"{before}{place}{_line_of(title, file)})"
        return f"{before}{place}{after}"

    def _follow(self, file: Path) -> None:
        """Stage a linked file, unless it is a page of docs/, which is staged anyway."""
        if file in self._staged or (file.suffix == ".md" and file.is_relative_to(self.docs)):
            return
        self._staged.add(file)
        if file.suffix in PICTURES:
            target = self.folder / self.place(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        elif file.suffix in {".md", ".ipynb"}:
            self.page(file)
        else:
            if file.stat().st_size > MAX_BYTES:
                raise ValueError(f"{file.relative_to(self.root)} is linked and has over {MAX_BYTES} bytes")
            self._write(file, _source_page(file.relative_to(self.root), file.read_text(encoding="utf-8")))

    def _write(self, source: Path, text: str) -> None:
        if not source.is_relative_to(self.docs) and source.suffix != ".ipynb":
            text = f"---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n{text}"  # code needs the width
        target = self.folder / self.place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def _source_page(path: Path, text: str) -> str:
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall(r"`+", text)), 3)
    return f"# {path}\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _line_of(name: str, file: Path) -> str:
    """The anchor of the line that defines a function."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith(f"def {name}("):
            return f"#__codelineno-0-{number}"
    raise ValueError(f"{file} has no function {name}")
