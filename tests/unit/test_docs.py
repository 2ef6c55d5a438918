"""The documentation's site: it builds strictly and offline, with a page and a picture a recipe, and no dead link."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from lightning_recipes import catalog

ROOT = Path(__file__).parents[2]
NAMES = sorted(catalog.recipes())
README = ROOT / "README.md"
SECTIONS = re.findall(r"^## (.*)", README.read_text(encoding="utf-8"), re.MULTILINE) if README.is_file() else []

pytest.importorskip("material", reason="needs the extra 'docs'")
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="needs a checkout")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings are errors, and whoever asked for the network would find none."""
    out = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-W", "error::UserWarning", "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Read(HTMLParser):
    """What a page links to and loads, which anchors it has, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if "href" in given:
            (self.links if tag == "a" else self.loads).append(given["href"])
        if "src" in given:
            self.loads.append(given["src"])

    def handle_data(self, data: str) -> None:
        self.text += data


def words(text: str) -> str:
    """Text without what the two ways of showing it differ by: line breaks and quotes of code."""
    return " ".join(html.unescape(text).replace("`", "").split())


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_a_page_in_the_words_of_its_card(name: str, site: Path) -> None:
    recipe, page = catalog.recipes()[name], Read(site / "recipes" / f"{name}.html")
    said = words(page.text)
    for text in (recipe.does, recipe.use_when, recipe.costs, catalog.import_line(recipe)):
        assert words(text) in said
    if recipe.paper:
        assert words(recipe.paper.title) in said and recipe.paper.url in page.links
    for argument, declared, says in catalog.documented_arguments(recipe):
        assert words(f"{argument}{declared}") in said and words(says) in said
    for file in catalog.config_files(recipe):
        assert words(file.read_text(encoding="utf-8")) in said
    for claim in catalog.claims(name):
        assert words(claim["claim"]) in said
    for _, other, why in catalog.beside(recipe):
        assert other in said and words(why) in said


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_a_picture_for_light_and_dark_pages(name: str, site: Path) -> None:
    light, dark = (site / "pictures" / f"{name}{which}.svg" for which in ("", "-dark"))
    parts = [(e.tag.rpartition("}")[2], e.get("d", "")) for e in ET.parse(light).iter()]
    drawn = sum(d.count("M") if tag == "path" else tag in ("text", "use") for tag, d in parts)  # tiles share a path
    assert drawn > 8, "a picture with next to nothing in it"
    assert light.stat().st_size < 150_000
    assert light.read_bytes() != dark.read_bytes(), "it has no tone of the palette in it"
    assert "#000000" not in light.read_text(encoding="utf-8"), "a colour that is not of the palette: dark on dark"
    gallery = (site / "gallery.html").read_text(encoding="utf-8")
    assert f'href="recipes/{name}.html"' in gallery and f"pictures/{name}.svg#only-light" in gallery
    assert words(catalog.recipes()[name].does) in words(re.sub(r"<[^>]+>", " ", gallery))


def test_the_gallery_is_in_the_navigation_and_shows_every_claim(site: Path) -> None:
    gallery = (site / "gallery.html").read_text(encoding="utf-8")
    assert "gallery.html" in Read(site / "index.html").links
    held = sum(bool(claim["holds"]) for name in NAMES for claim in catalog.claims(name))
    shown = sum(len(catalog.claims(name)) for name in NAMES)
    assert (gallery.count('<i class="yes">'), gallery.count('<i class="no">')) == (held, shown - held)
    assert 0 < held < shown


def test_the_evidence_has_every_claim_under_its_recipe_and_each_page_links_to_the_other(site: Path) -> None:
    html_ = (site / "evidence.html").read_text(encoding="utf-8")
    page, said = Read(site / "evidence.html"), words(Read(site / "evidence.html").text)
    starts = [(html_.index(f'<h2 id="{name}"'), name) for name in NAMES if catalog.claims(name)]
    for (start, name), (end, _) in zip(sorted(starts), [*sorted(starts)[1:], (html_.index('<h2 id="none"'), "")]):
        assert html_[start:end].count("<tr>") == 1 + len(catalog.claims(name)), name
        assert f"recipes/{name}.html#evidence" in page.links
        assert f"../evidence.html#{name}" in Read(site / "recipes" / f"{name}.html").links
        for claim in catalog.claims(name):
            assert words(claim["claim"]) in said
    held = sum(bool(claim["holds"]) for name in NAMES for claim in catalog.claims(name))
    total = sum(len(catalog.claims(name)) for name in NAMES)
    assert f"{held} of {total} claims of {len(starts)} recipes show." in said
    assert all(f"recipes/{name}.html" in page.links for name in NAMES if not catalog.claims(name)), (
        "these are named too"
    )


def test_the_tutorials_are_listed_in_the_order_of_their_index(site: Path) -> None:
    index = (site / "tutorials" / "index.html").read_text(encoding="utf-8")
    nav = index[: index.index("<article")]
    places = [
        nav.index(f'href="{name}.html"') for name in ("few_images", "robust_classifier", "ten_tasks", "eight_gpus")
    ]
    assert places == sorted(places)


def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): Read(path) for path in site.rglob("*.html")}
    assert len(pages) > len(NAMES) + 5
    for path, page in pages.items():
        assert "](" not in page.text and "<!--" not in page.text, f"{path} shows markup"
        for target in page.loads:
            assert not urlsplit(target).netloc or path == "404.html", f"{path} loads {target}"
        if path == "404.html":
            continue  # served from any place, so its links are absolute
        for target in (*page.links, *page.loads):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (site / path).parent / unquote(parts.path) if parts.path else site / path
            assert file.exists(), f"{path} links to {target}"
            there = pages.get(file.resolve().relative_to(site.resolve()).as_posix())
            if parts.fragment and there is not None and parts.fragment != "__skip":
                assert parts.fragment in there.anchors, f"{path} links to {target}"
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?https?:", style.read_text(encoding="utf-8")), style


def test_a_recipe_without_a_picture_stops_the_build_and_is_named(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, 'docs'); import hooks\n"
        "from mkdocs.config import load_config\n"
        "from mkdocs.structure.files import Files\n"
        "removed = hooks.PICTURES.pop('AAER')\n"
        "try: hooks.on_files(Files([]), load_config('mkdocs.yml'))\n"
        "except hooks.PluginError as error: print(error)\n"
        "hooks.PICTURES['AAER'] = hooks.PICTURES['Nobody'] = removed\n"
        "try: hooks.on_files(Files([]), load_config('mkdocs.yml'))\n"
        "except hooks.PluginError as error: print(error)\n"
        "for what in ('NOTHING.md', 'README.md only: Nonsense'):\n"
        "    try: hooks.include(what)\n"
        "    except hooks.PluginError as error: print(error)\n"
        "from pictures import draws\n"
        "for bad in (lambda figure: None, removed.draw):\n"
        "    try: draws('AAER')(bad)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no picture of AAER: write a function in docs/pictures for each",
        "docs/pictures draws Nobody, which is no public recipe",
        "cannot include 'NOTHING.md': there is no such file in the repository",
        "README.md has no section 'Nonsense'; it has " + ", ".join(["intro", *SECTIONS]),
        "<lambda> has no docstring to be the picture's caption",
        "AAER has two pictures, aaer and aaer",
    ]
