"""One strict build of the site."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from dev.site.finish import finish
from dev.site.navigation import nav
from dev.site.staging import ROOT, Staging


def build(site: Path, root: Path = ROOT) -> None:
    """Build root/docs into the folder `site`, which is replaced. Raises CalledProcessError after the generator's words.

    Nothing is read from the network.
    """
    with TemporaryDirectory() as name:
        work = Path(name)
        staged, built = work / "docs", work / "built"
        Staging(root, staged).all_pages()
        (staged / "assets").mkdir()
        shutil.copyfile(Path(__file__).parent / "retnet.css", staged / "assets" / "retnet.css")
        config = yaml.safe_load((Path(__file__).parent / "zensical.yml").read_text(encoding="utf-8"))
        config |= {"docs_dir": staged.name, "site_dir": built.name, "nav": nav(staged / "index.md")}
        (mkdocstrings,) = [plugin["mkdocstrings"] for plugin in config["plugins"] if "mkdocstrings" in plugin]
        mkdocstrings["handlers"]["python"]["paths"] = [str(root)]
        (work / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        generator = str(Path(sys.executable).with_name("zensical"))
        command = [generator, "build", "--strict", "--clean", "-f", "mkdocs.yml"]
        subprocess.run(command, cwd=work, check=True, env=os.environ | {"NO_COLOR": "1"})
        finish(built, staged)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(built, site)
