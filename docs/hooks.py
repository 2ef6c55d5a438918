"""What MkDocs calls while it builds the site: writes the pages and pictures of the recipes, and fills in the others.

Nothing that is written here lands in the repository. A page in ``docs/`` may say, in a comment of its own line,

    <!-- gallery -->                                  the cards of all recipes
    <!-- strip of pictures: Name, Name -->            some of their pictures
    <!-- modules and data -->                         what ``modules`` and ``datamodules`` hold
    <!-- all evidence -->                             the claims of every recipe, under its name
    <!-- include FILE -->                             a Markdown file of the repository, without its title
    <!-- include FILE only: Section; Section -->      those of its sections
    <!-- include FILE text of: Section -->           one section without its heading
    <!-- include FILE but for: Section; Section -->   all but those; 'intro' is what stands before the first
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
for folder in (ROOT, DOCS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pages  # noqa: E402 - found by the lines above
from pictures import PICTURES  # noqa: E402

LINKS = {"CONTRIBUTING.md": "write-a-recipe.md", "README.md": "index.md"}
"""Where a link to a file of the repository goes on the site; what is in docs/ is where it is."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the navigation: the recipes by folder, the tutorials in the order of their own index."""
    index = (DOCS / "tutorials" / "index.md").read_text(encoding="utf-8")
    tutorials = [
        f"tutorials/{name}" for name in ("index.md", *re.findall(r"^\d+\. \[.*?\]\((\w+\.md)\)", index, re.MULTILINE))
    ]
    folders = pages.by_folder()
    recipes = [{pages.title(folder): [pages.path(name) for name in found]} for folder, found in folders.items()]
    config.nav = [
        "index.md",
        "gallery.md",
        {"Recipes": recipes},
        "modules-and-data.md",
        {"Tutorials": tutorials},
        "evidence.md",
        "compared.md",
        "write-a-recipe.md",
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page and two pictures a recipe, and the picture of all that were compared.

    Raises:
        PluginError: a recipe has no picture, or a picture no recipe.
    """
    known = pages.known()
    if missing := sorted(known.keys() - PICTURES.keys()):
        raise PluginError(f"no picture of {', '.join(missing)}: write a function in docs/pictures for each")
    if nobodys := sorted(PICTURES.keys() - known.keys()):
        raise PluginError(f"docs/pictures draws {', '.join(nobodys)}, which is no public recipe")
    for name, recipe in known.items():
        light, dark = PICTURES[name].svg()
        files.append(File.generated(config, f"pictures/{name}.svg", content=light))
        files.append(File.generated(config, f"pictures/{name}-dark.svg", content=dark))
        files.append(File.generated(config, pages.path(name), content=pages.page(recipe)))
    compared = (ROOT / "benchmarks" / "results.png").read_bytes()
    files.append(File.generated(config, "pictures/results.png", content=compared))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Fill in what the page asks for, and link the names of recipes to their pages."""
    up = "../" * page.file.src_uri.count("/")

    def fill(found: re.Match[str]) -> str:
        what = found[1].strip()
        if what == "gallery":
            return pages.gallery(up)
        if what == "modules and data":
            return pages.modules_and_data()
        if what == "all evidence":
            return pages.all_evidence()
        if what.startswith("strip of pictures:"):
            return pages.strip([name.strip() for name in what.partition(":")[2].split(",")], up)
        if what.startswith("include "):
            return include(what.removeprefix("include "))
        return found[0]

    markdown = re.sub(r"^<!-- (.*?) -->$", fill, markdown, flags=re.MULTILINE)
    return linked(markdown, page.file.src_uri)


def include(what: str) -> str:
    """The Markdown of a file of the repository, as a page takes it in.

    Raises:
        PluginError: there is no such file or section.
    """
    parts = re.fullmatch(r"(\S+)(?: (only|text of|but for): (.*))?", what)
    if parts is None or not (ROOT / parts[1]).is_file():
        raise PluginError(f"cannot include {what!r}: there is no such file in the repository")
    text = (ROOT / parts[1]).read_text(encoding="utf-8")
    found = {"intro": ""}
    for piece in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        heading = re.match(r"## (.*)\n", piece)
        found[heading[1] if heading else "intro"] = piece if heading else re.sub(r"\A# .*\n", "", piece)
    named = [name.strip() for name in (parts[3] or "").split(";") if name.strip()]
    if unknown := [name for name in named if name not in found]:
        raise PluginError(f"{parts[1]} has no section {unknown[0]!r}; it has {', '.join(found)}")
    if parts[2] == "only":
        found = {name: found[name] for name in named}
    elif parts[2] == "text of":
        found = {name: found[name].partition("\n")[2] for name in named}
    elif parts[2]:
        found = {name: piece for name, piece in found.items() if name not in named}
    text = "\n".join(piece.strip() + "\n" for piece in found.values())
    text = re.sub(r"^<!-- .*? -->\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^   (?=\S)", "    ", text, flags=re.MULTILINE)  # what belongs to an item of a list
    text = text.replace(" ± ", "\u00a0±\u00a0")  # a figure and its spread stay on one line
    return re.sub(r"\]\(([^)#:\s]+)\)", lambda m: f"]({LINKS.get(m[1], m[1].removeprefix('docs/'))})", text)


def linked(markdown: str, here: str) -> str:
    """The text with every `Name` of a recipe in code style a link to its page, but for code blocks and links."""
    known, up = pages.known(), "../" * here.count("/")
    names = "|".join(sorted(known, key=len, reverse=True))
    inside = re.compile(rf"(?<![\[`])`({names})`(?![\]`])")
    lines, fenced = [], False
    for line in markdown.split("\n"):
        if line.lstrip(" >").startswith("```"):
            fenced = not fenced
        if not fenced and not line.startswith(("#", "<")):
            line = inside.sub(
                lambda m: m[0] if pages.path(m[1]) == here else f"[`{m[1]}`]({up}{pages.path(m[1])})", line
            )
        lines.append(line)
    return "\n".join(lines)
