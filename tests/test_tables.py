"""The tables of the docs are those of the results."""

from __future__ import annotations

import pytest

from benchmarks.tables import pages, render


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_tables_are_the_results(page):
    text = page.read_text()
    assert render(text) == text
