"""What runs the tutorials notices what it should: each check fails where the page is wrong."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import pytest

from tests.tutorials.page import PageError, Picture, Run, agrees, mismatch, parse, renewed
from tests.tutorials.test_tutorials import named_configs


def page(folder: Path, text: str) -> Run:
    path = folder / "page.md"
    path.write_text(text.replace("'''", "```"), encoding="utf-8")
    return Run(path)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_blocks_have_their_language_title_lines_and_comments() -> None:
    text = 'a\n```python\nx = 1\n```\n\n<!-- tolerance: 3 -->\n```text\n1\n2\n```\n```yaml title="a.yaml"\n```\n'
    first, second, third = parse(text)
    assert (first.language, first.text, first.line, first.end) == ("python", "x = 1\n", 3, 4)
    assert (second.text, second.line, second.end, dict(second.says)) == ("1\n2\n", 8, 10, {"tolerance": "3"})
    assert (third.title, third.text, dict(third.says)) == ("a.yaml", "", {})


def test_a_picture_has_a_source() -> None:
    (picture,) = parse("<!-- picture: runs/a.png -->\n![what it shows](pictures/b.png)\n")
    assert picture == Picture("pictures/b.png", "runs/a.png", 2)
    with pytest.raises(PageError, match="page:1: no <!-- picture"):
        parse("![what it shows](pictures/b.png)\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```python\nx\n", "page:1: this block does not end"),
        ("<!-- tolerence: 3 -->\n", "page:1: 'tolerence' says nothing"),
        ("<!-- tolerance: 3 -->\n", "before no block"),
        ("```python {.x}\n```\n", "page:1: .* opens no block"),
    ],
)
def test_a_page_that_cannot_be_read_says_where(text: str, says: str) -> None:
    with pytest.raises(PageError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("shown", "printed", "tolerance", "same"),
    [
        ("acc 93.4 %", "acc  93.5 %", None, True),  # one unit of the last place, and blanks do not count
        ("acc 93.4 %", "acc 93.6 %", None, False),
        ("acc 93.4 %", "acc 96.4 %", 3.0, True),
        ("acc 93.4 %", "acc 96.5 %", 3.0, False),
        ("acc 93.4 %", "accuracy 93.4 %", None, False),
        ("seed 3", "seed 4", 3.0, False),  # integers are exact
        ("-0.5", "0.4", 1.0, True),
        ("1.2e-3", "1.3e-3", None, True),
        ("1.2e-3", "1.4e-3", None, False),
        ("PGD-20: 0.12", "PGD-50: 0.12", None, False),
    ],
)
def test_lines_agree_up_to_the_tolerance(shown: str, printed: str, tolerance: float | None, same: bool) -> None:
    assert agrees(shown, printed, tolerance) is same


def test_the_first_line_that_differs_is_found() -> None:
    assert mismatch("a\nb\n", "a\nb\n") is None
    assert mismatch("a\nb\n", "a\nc\n") == (1, "c")
    assert mismatch("a\n", "a\nb\n") == (1, "b")
    assert mismatch("a\nb\n", "a\n") == (1, "nothing like it")
    assert mismatch("a\n...\nd\n", "a\nb\nc\nd\n") is None
    assert mismatch("a\n...\n", "a\nb\n") is None
    assert mismatch("b\nd\n", "a\nb\nc\nd\ne\n", among=True) is None
    assert mismatch("d\nb\n", "a\nb\nc\nd\ne\n", among=True) == (1, "nothing like it")
    assert mismatch("x 0.2\n", "y\nx 0.9\n", among=True) == (0, "x 0.9")


def test_output_is_renewed() -> None:
    assert renewed("a 0.5\n", "b\nc\n\n") == "b\nc\n"
    assert renewed("a 0.5\n...\nc 1\n", "a 0.7\nb\nc 2\n") == "a 0.7\n...\nc 2\n"
    assert renewed("c 1\n", "a\nc 2\n", among=True) == "c 2\n"
    with pytest.raises(LookupError, match="d 1"):
        renewed("d 1\n", "a\nc 2\n", among=True)


def test_blocks_share_a_namespace_and_are_checked(tmp_path: Path) -> None:
    text = "'''python\nx = 0.25\n'''\n'''python\nprint('x is', x)\n'''\n'''text\nx is {}\n'''\n"
    page(tmp_path, text.format("0.25"))()
    with pytest.raises(PageError, match=r"page\.md:8: the page shows\n  x is 0.35\nand printed was\n  x is 0.25"):
        page(tmp_path, text.format("0.35"))()


def test_output_that_is_not_shown_and_a_text_block_of_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"page\.md:2: the page does not show"):
        page(tmp_path, "'''python\nprint(1)\n'''\n")()
    with pytest.raises(PageError, match=r"page\.md:2: this text block is after no block that prints"):
        page(tmp_path, "'''text\n1\n'''\n")()


def test_a_traceback_points_into_the_page(tmp_path: Path) -> None:
    run = page(tmp_path, "# Title\n\n'''python\nx = 1\n'''\n\n'''python\n\ny = x / 0\n'''\n")
    with pytest.raises(ZeroDivisionError) as raised:
        run()
    frame = traceback.extract_tb(raised.tb)[-1]
    assert (frame.filename, frame.lineno, frame.line) == (str(run.path), 9, "y = x / 0")


def test_the_process_is_as_it_was_after_a_page(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads(), dict(os.environ), list(sys.path), torch.get_rng_state()
    text = """'''python title="of_the_page.py"
value = 3
'''
'''python
import os
import torch
import of_the_page
from dataclasses import dataclass

os.environ["OF_THE_PAGE"] = "1"
torch.manual_seed(1)


@dataclass
class Of:
    page: "int" = of_the_page.value


print(Of(), torch.get_num_threads())
'''
'''text
Of(page=3) 1
'''
"""
    page(tmp_path, text)()
    assert (torch.get_num_threads(), dict(os.environ), list(sys.path)) == before[:3]
    assert torch.equal(torch.get_rng_state(), before[3])
    assert "of_the_page" not in sys.modules and "__tutorial__" not in sys.modules


def test_configs_are_read_as_the_command_reads_them(tmp_path: Path) -> None:
    text = """'''yaml title="mine.yaml"
trainer:
  callbacks+:
    - class_path: AAER
      init_args:
        {}: 0.1
'''
"""
    page(tmp_path, text.format("epsilon"))()
    with pytest.raises(PageError, match=r"(?s)page\.md:2: no config .*did you mean epsilon"):
        page(tmp_path, text.format("epsilonn"))()


def test_only_this_packages_command_runs(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"page\.md:2: echo is no command that a page may run"):
        page(tmp_path, "'''sh\necho 1\n'''\n")()


def test_a_picture_that_nothing_draws_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"page\.md:2: no picture a\.png was drawn; there are none"):
        page(tmp_path, "<!-- picture: a.png -->\n![](b.png)\n")()


def test_a_page_ends_where_it_lacks_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_THERE", raising=False)
    run = page(tmp_path, "'''python\nx = 1\n'''\n<!-- needs: NOT_THERE -->\n'''python\nx / 0\n'''\n")
    run()
    assert run.left_out == "page.md: from line 6 on it needs NOT_THERE"


def test_a_page_is_updated_in_place(tmp_path: Path) -> None:
    text = "a\n'''python\nprint(1)\n'''\n'''text\n'''\nb\n"
    text += "'''python\nprint('x\\ny 0.5')\n'''\n'''text\n...\ny 0.1\n'''\nc\n"
    run = page(tmp_path, text)
    run(check=False)
    wanted = text.replace("'''text\n'''", "'''text\n1\n'''").replace("y 0.1", "y 0.5").replace("'''", "```")
    assert run.updated() == wanted
    page(tmp_path, wanted)()


def test_configs_that_a_page_names_are_found() -> None:
    text = "`fit --config base/a.yaml --config\nmine.yaml --config=recipes/b.yaml`"
    assert named_configs(text) == ["base/a.yaml", "mine.yaml", "recipes/b.yaml"]
