"""``python -m tests.tutorials.update [NAME]...``: run the tutorials and write what they print and draw into them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tests.tutorials.page import ROOT, Picture, Run

FOLDER = ROOT / "docs" / "tutorials"


def pages() -> list[Path]:
    """The tutorials: all pages with code in them."""
    return [path for path in sorted(FOLDER.glob("*.md")) if "```python" in path.read_text(encoding="utf-8")]


def update(path: Path) -> Run:
    """Run a page, and write it and its pictures anew."""
    run, before = Run(path), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            run(check=False)
            for part in run.parts:
                if isinstance(part, Picture) and run.left_out is None:
                    picture = path.parent / part.file
                    picture.parent.mkdir(exist_ok=True)
                    with Image.open(part.source) as drawn:  # a palette: half of the bytes
                        drawn.convert("RGB").quantize(256).save(picture, optimize=True)
        finally:
            os.chdir(before)
    path.write_text(run.updated(), encoding="utf-8")
    return run


def main(names: Sequence[str]) -> None:
    """Update the pages of those names, or all."""
    known = {path.stem: path for path in pages()}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no tutorial named {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names or known:
        run = update(known[name])
        print(f"{name}: up to date" + (f" but for what was left out: {run.left_out}" if run.left_out else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
