"""The support matrix of the docs is that of the tests."""

from __future__ import annotations

import support


def test_the_matrix_in_the_docs_is_that_of_the_tests():
    assert support.PAGE.read_text() == support.matrix(), "python tests/support.py writes it anew"
