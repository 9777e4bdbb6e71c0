"""The support matrix of the docs is that of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import support

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTS = {file.name: file.read_text() for file in (ROOT / "tests").glob("*.py")}


def test_the_matrix_in_the_docs_is_that_of_the_tests():
    assert support.PAGE.read_text() == support.matrix(), "python tests/support.py writes it anew"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_the_docs_name_are_there(page):
    """Each by its whole name, or by how several begin: `test_a_...`"""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for name in re.findall(r"`(?:tests/)?(test_[\w.]+)`", text):
        if name.endswith(".py"):
            assert name in TESTS, name
        else:
            begun = rf"def {name[:-3]}\w*\(" if name.endswith("...") else rf"def {name}\("
            assert any(re.search(begun, each) for each in TESTS.values()), name


def test_each_row_of_what_survives_what_names_a_test():
    text = (ROOT / "docs" / "checkpoints.md").read_text().split("## What survives what")[1]
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 20
    assert all(re.search(r"`test_\w+", row.split(" | ")[-1]) for row in rows[1:])
