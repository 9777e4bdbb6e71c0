"""The tables and figures of the docs are those of the results."""

from __future__ import annotations

import pytest

from benchmarks import figures, tables
from benchmarks.tables import pages, render


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_tables_are_the_results(page):
    text = page.read_text()
    assert render(text) == text, "python -m benchmarks.tables writes them anew"
    assert text.count(tables.MARK) == len(tables.PLACE.findall(text))
    assert text.count(figures.MARK) == len(figures.FIGURE.findall(text))


def test_a_figure_that_is_not_the_results_is_found():
    place = "<!-- figure: sampling :: methods :: AdamW :: time_over_adamw -->"
    assert figures.fill(f"takes 0.97{place}x") == f"takes 1.00{place}x"
    ratio = place.replace(
        "time_over_adamw -->", "peak_megabytes / AdamW :: peak_megabytes * 100 -->"
    )
    assert figures.fill(f"is 7{ratio} %") == f"is 100{ratio} %"


def test_a_table_may_have_some_rows_only():
    text = "<!-- table: sampling | methods | quality | badam; AdamW -->\n"
    rows = render(text).splitlines()[3:]
    assert [row.split(" | ")[0] for row in rows] == ["| badam", "| AdamW"]
