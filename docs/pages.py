"""The pages of the recipes as Markdown, in the words of ``lightning-recipes show``."""

from __future__ import annotations

import functools
import html
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import docstring_parser
from pictures import PICTURES

from lightning_recipes import catalog, datamodules, modules

TITLES = {
    "continual": "Continual learning",
    "datamodules": "Data modules",
    "finetuning": "Fine-tuning",
    "resume": "Resuming a run",
}
LAST = ("modules", "datamodules")
SAYS = {
    "modules": "LightningModules that a paper brings.",
    "datamodules": "Data in the setting of a paper, for its module or for yours.",
}


@functools.cache
def known() -> dict[str, type]:
    """Every public recipe, by class name."""
    return catalog.recipes()


def path(name: str) -> str:
    """Where a recipe's page lies, seen from the root of the site's sources."""
    return f"recipes/{name}.md"


def title(folder: str) -> str:
    """The heading over a folder's recipes."""
    return TITLES.get(folder, folder.capitalize())


@functools.cache
def by_folder() -> dict[str, dict[str, type]]:
    """The recipes by what a user wants them for, in alphabetical order."""
    found: dict[str, dict[str, type]] = {}
    for name, recipe in sorted(known().items(), key=lambda item: item[0].lower()):
        found.setdefault(catalog.purpose(recipe), {})[name] = recipe
    return {folder: found[folder] for folder in sorted(found, key=lambda folder: (folder in LAST, folder))}


def about(folder: str) -> str:
    """What the recipes of a folder are for, from the folder's own docstring."""
    module = sys.modules.get(f"lightning_recipes.callbacks.{folder}")
    return SAYS.get(folder) or (inspect.getdoc(module) or "").split("\n")[0]


# -- a recipe's page -------------------------------------------------------------------------------------------------


def page(recipe: type) -> str:
    """A recipe's page: picture, what it does and costs, how to use it, its arguments, its maths and its evidence."""
    name = recipe.__name__
    folder = catalog.purpose(recipe)
    where = f"[Gallery](../gallery.md) / [{title(folder)}](../gallery.md#{folder})\n{{ .trail }}"
    parts = [f"---\ntitle: {name}\nhide: [toc]\n---", where, f"# {name}", f"{prose(recipe.does)}\n{{ .does }}"]
    parts += ['<div class="top" markdown>', figure(name, "../"), terms(facts(recipe)), "</div>"]
    parts += [*use(recipe), *how_it_works(recipe), "## Arguments"]
    declared = [(f"`{name}{kind}`", prose(says)) for name, kind, says in catalog.documented_arguments(recipe)]
    parts += [terms(declared) if declared else "None."]
    if others := catalog.beside(recipe):
        parts += ["## Beside other recipes", others_table(others)]
    return "\n\n".join([*parts, "## Evidence", evidence(name)]) + "\n"


def facts(recipe: type) -> list[tuple[str, str]]:
    """Those of the card, with links."""
    found: list[tuple[str, str]] = []
    for label, text in catalog.facts(recipe):
        text = text[:1].upper() + text[1:] if label == "Runs on" else text
        text = f"<{text}>" if text.startswith("https://") else prose(text)
        if label:
            found.append((label, text))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {text}")
    return found


def terms(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of terms and what they mean."""
    return "\n\n".join(f"{term}\n:   {text or '&nbsp;'}" for term, text in pairs)


def use(recipe: type) -> list[str]:
    """How to use it: what the class says, its configs and the line that imports it."""
    says = docstring_parser.parse(inspect.getdoc(recipe) or "")
    parts = ["## Use", *(prose(text) for text in (says.short_description, says.long_description) if text)]
    for file in catalog.config_files(recipe):
        shown = file.relative_to(catalog.config_folder()).as_posix()
        whole = shown.startswith("papers/")
        command = f"--config {shown}" if whole else f"--config mine.yaml --config {shown}"
        block = (
            fenced(f"lightning-recipes fit {command}", "sh") + "\n\n" + fenced(file.read_text("utf-8"), "yaml", shown)
        )
        parts.append(f'=== "{file.name}"\n\n' + indented(block))
    parts.append('=== "Python"\n\n' + indented(fenced(catalog.import_line(recipe), "python")))
    return parts


def how_it_works(recipe: type) -> list[str]:
    """What its file says: the equations, where they come from, and what of them is the paper's."""
    file = inspect.getmodule(recipe)
    source = f"From `{file.__name__.replace('.', '/')}.py`.\n{{ .where }}"
    return ["## How it works", prose(inspect.getdoc(file) or ""), source]


def others_table(others: Sequence[tuple[str, str, str]]) -> str:
    """What it cannot share a Trainer with, and what must stand before or after it."""
    rows = [f"| {how} | `{other}` | {cell(why)} |" for how, other, why in others]
    return "\n".join(["| | recipe | why |", "|---|---|---|", *rows])


def evidence(name: str) -> str:
    """The measured claims as a table, and in which settings they were measured."""
    claims = catalog.claims(name)
    if not claims:
        return "None recorded yet: nothing is claimed of this one that a small experiment could show."
    settings = list(dict.fromkeys(claim["setting"] for claim in claims if claim.get("setting")))
    details = "\n".join(f"    - {prose(setting)}" for setting in settings)
    parts = [claims_table(claims), f'??? note "Settings"\n\n{details}' if settings else ""]
    return "\n\n".join([*parts, f"[The claims of all recipes](../evidence.md#{name})"])


def claims_table(claims: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, a row a claim; what does not show stands there like the rest."""
    rows = ["| claim | without | with | seeds | shows |", "|---|---|---|---|---|"]
    for claim in claims:
        metric = f"<br><small>{cell(claim['metric'])}</small>" if claim.get("metric") else ""
        shows = '<b class="yes">yes</b>' if claim.get("holds") else '<b class="no">not shown</b>'
        figures = [figure_of(claim, "without"), figure_of(claim, "with")]
        rows.append(f"| {cell(claim['claim'])}{metric} | {' | '.join(figures)} | {claim.get('seeds', '')} | {shows} |")
    return '<div class="claims" markdown>\n\n' + "\n".join(rows) + "\n\n</div>"


def all_evidence() -> str:
    """The claims of every recipe under its name, so that each can be found and linked to; then who has none."""
    with_claims = {name: claims for name in sorted(known(), key=str.lower) if (claims := catalog.claims(name))}
    held = [sum(bool(claim.get("holds")) for claim in claims) for claims in with_claims.values()]
    of = sum(map(len, with_claims.values()))
    parts = [
        f"{sum(held)} of {of} claims of {len(with_claims)} recipes show.",
        f'<div class="jumps">{wanted("“forget” or “not shown”")}</div>',
    ]
    for name, claims in with_claims.items():
        parts.append(f"## [{name}](recipes/{name}.md#evidence) {{ #{name} }}")
        parts.append(f'{prose(known()[name].does)}\n<span class="tally">{tally(claims)}</span>\n{{ .claimed }}')
        parts.append(claims_table(claims))
    without = ", ".join(f"`{name}`" for name in sorted(known(), key=str.lower) if name not in with_claims)
    return "\n\n".join([*parts, f"## No claim measured {{ #none }}\n\n{without}."])


def figure_of(claim: Mapping[str, Any], side: str) -> str:
    """A measured mean and its standard deviation over seeds."""
    value, spread = claim.get(side), claim.get(f"{side}_sd")
    if not isinstance(value, (int, float)):
        return cell(str(value)) if value is not None else ""
    return f"{value:.3g}\u00a0±\u00a0{spread:.2g}" if isinstance(spread, (int, float)) else f"{value:.3g}"


# -- pictures and the gallery ----------------------------------------------------------------------------------------


def images(name: str, up: str) -> str:
    """The picture for a light and for a dark page; the theme shows one of them."""
    width, height = (round(96 * inches) for inches in PICTURES[name].size)
    says = html.escape(PICTURES[name].caption, quote=True)
    return "".join(
        f'<img src="{up}pictures/{name}{which}.svg#only-{tone}" alt="{says}" width="{width}" height="{height}"'
        ' loading="lazy">'
        for which, tone in (("", "light"), ("-dark", "dark"))
    )


def figure(name: str, up: str) -> str:
    """The picture with its caption."""
    caption = html.escape(PICTURES[name].caption)
    return f'<figure class="picture">{images(name, up)}<figcaption>{caption}</figcaption></figure>'


def strip(names: Sequence[str], up: str) -> str:
    """Some pictures in a row, each a link to its recipe."""
    cards = [
        f'<a href="{up}recipes/{name}.html" title="{html.escape(known()[name].does, quote=True)}">{images(name, up)}'
        f"<span>{name}</span></a>"
        for name in names
    ]
    return f'<div class="strip">{"".join(cards)}</div>'


def gallery(up: str) -> str:
    """A card a recipe, by folder, with links to the folders on top."""
    jumps = "".join(f'<a href="#{folder}">{title(folder)}</a>' for folder in by_folder())
    parts = [f'<div class="jumps">{jumps}{wanted("“long-tail” or “LoRA”")}</div>']
    for folder, recipes in by_folder().items():
        parts.append(f"## {title(folder)} {{ #{folder} }}\n\n{about(folder)}")
        parts.append(f'<div class="gallery">{"".join(card(recipe, up) for recipe in recipes.values())}</div>')
    return "\n\n".join(parts)


def wanted(such: str) -> str:
    """A field to filter by words; hidden until ``assets/tables.js`` makes it work."""
    return f'<input type="search" placeholder="Filter, as in {such}" aria-label="Filter" hidden>'


def card(recipe: type, up: str) -> str:
    """One recipe in the gallery: its picture, what it does, when to use it, what it costs, what was measured. The
    filter finds it by its paper's title, too."""
    name, say = recipe.__name__, html.escape
    says = docstring_parser.parse(inspect.getdoc(recipe) or "")
    more = [says.short_description, says.long_description, recipe.paper.title if recipe.paper else ""]
    return (
        f'<a class="card" id="{name}" href="{up}recipes/{name}.html"'
        f' data-words="{say(" ".join(" ".join(filter(None, more)).split()))}">'
        f'<span class="picture">{images(name, up)}</span>'
        f'<span class="name">{name}</span><span class="does">{say(recipe.does)}</span>'
        f'<span class="fact"><b>Use when</b> {say(recipe.use_when)}</span>'
        f'<span class="fact"><b>Costs</b> {say(recipe.costs)}</span>'
        f'<span class="shown">{shown(name)}</span></a>'
    )


def shown(name: str) -> str:
    """The evidence in one line: a dot a claim, and the first one's figures."""
    claims = catalog.claims(name)
    if not claims:
        return "nothing to measure" if known()[name].paper is None else "no claim measured yet"
    first = claims[0]
    figures = f"{first['without']:.3g} → {first['with']:.3g}" if isinstance(first.get("with"), (int, float)) else ""
    what = html.escape(str(first.get("metric", "")))
    measured = f'<span class="first">{what}: {figures}</span>' if figures and what else ""
    return f"{tally(claims)}{measured}"


def tally(claims: Sequence[Mapping[str, Any]]) -> str:
    """A dot a claim, and how many show."""
    held = sum(bool(claim.get("holds")) for claim in claims)
    dots = "".join(f'<i class="{"yes" if claim.get("holds") else "no"}"></i>' for claim in claims)
    return f'<span class="dots">{dots}</span>{held} of {len(claims)} shown'


# -- modules and data ------------------------------------------------------------------------------------------------


def modules_and_data() -> str:
    """Tables of what the two packages hold, those of papers with a link to their pages."""
    parts = [f'<div class="jumps">{wanted("“classifier” or “digits”")}</div>']
    for heading, package, where in (("Modules", modules, "modules"), ("Data modules", datamodules, "datamodules")):
        parts.append(f"## {heading}\n\n`from lightning_recipes.{where} import ...`")
        rows = ["| name | what it is |", "|---|---|"]
        public = sorted(package.__all__, key=lambda name: (name not in known(), name.lower()))
        for name in public:
            found = getattr(package, name)
            says = found.does if name in known() else (inspect.getdoc(found) or "").split("\n\n")[0]
            rows.append(f"| `{name}` | {cell(' '.join(says.split()))} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


# -- text ------------------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """A docstring's plain text as Markdown: what would be read as markup is escaped, but for code and its blocks."""
    lines = []
    for line in text.split("\n"):
        if line.startswith("    "):
            lines.append(line)  # equations and tables stand in blocks of their own
            continue
        line = re.sub(r"``([^`]+)``", r"`\1`", re.sub(r":\w+:(`[^`]*`)", r"\1", line))
        pieces = re.split(r"(`[^`]*`)", line)
        lines.append("".join(piece if piece.startswith("`") else _escaped(piece) for piece in pieces))
    return "\n".join(lines)


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return re.sub(r"\b(\w)\*", r"\1\\*", text)  # X* is a symbol


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return prose(text).replace("|", r"\|")


def fenced(text: str, language: str, name: str = "") -> str:
    """A block of code."""
    return f"```{language}" + (f' title="{name}"' if name else "") + f"\n{text.rstrip()}\n```"


def indented(text: str) -> str:
    """Moved right by four, as part of what stands above."""
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))
