"""Writes the generated parts of README.md: the tables of recipes, evidence, comparisons and reproduced papers.

``python -m benchmarks.readme`` rewrites them; ``--check`` only says whether they are up to date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.results import results_table
from lightning_recipes.catalog import recipes, table

ROOT = Path(__file__).parents[1]


def evidence_table() -> str:
    """The figures that ``python -m benchmarks.claims`` wrote, one row a claim."""
    path = ROOT / "lightning_recipes" / "evidence.json"
    claims = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| recipe | claim | without | with | seeds | shows |", "|---|---|---|---|---|---|"]
    for name, found in claims.items():
        for claim in found:
            without = f"{claim['without']:.3g} ± {claim['without_sd']:.2g}"
            with_recipe = f"{claim['with']:.3g} ± {claim['with_sd']:.2g}"
            shows = "yes" if claim["holds"] else "**not shown**"
            rows.append(f"| `{name}` | {claim['claim']} | {without} | {with_recipe} | {claim['seeds']} | {shows} |")
    return "\n".join(rows)


def paper_table() -> str:
    """What ``python -m benchmarks.papers.lightweight_cnn`` wrote, one row an arm, one column a data set."""
    from benchmarks.papers.lightweight_cnn import ARMS, PAPER_PARAMETERS, RESULTS

    sets = json.loads(RESULTS.read_text(encoding="utf-8"))
    titles = [f"{name} ({found['seeds']} seeds)" for name, found in sets.items()]
    rows = [f"| arm | parameters | {' | '.join(titles)} |", f"|---|---|{'---|' * len(sets)}"]
    for arm, says in ARMS.items():
        found = [each["arms"][arm] for each in sets.values()]
        scores = [f"{100 * values['clean']:.2f} ± {100 * values['clean_sd']:.2f} %" for values in found]
        rows.append(f"| {says} | {found[0]['parameters']:,} | {' | '.join(scores)} |")
    theirs = [f"{100 * each['paper']['accuracy']:.0f} %" for each in sets.values()]
    return "\n".join([*rows, f"| the paper | {PAPER_PARAMETERS:,} | {' | '.join(theirs)} |"])


def filled(text: str) -> str:
    """README with its generated parts made anew."""
    parts = {"recipes": table(recipes(), markdown=True), "evidence": evidence_table(), "paper": paper_table()}
    parts["results"] = results_table()
    for name, part in parts.items():
        pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"README.md has no place for {name}")
    return text


def main() -> None:
    """Rewrite README.md, or say that it is out of date."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        raise SystemExit("README.md is out of date: python -m benchmarks.readme" if before != after else 0)
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
