"""Every error and warning of the library leads to a heading of docs/troubleshooting.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from surgery import errors

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
FAMILY = {
    name
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, errors.SurgeryError)
}
# Calls whose whole text comes from elsewhere or reaches nobody, each with the reason.
ELSEWHERE = {
    "surgery captures this model itself": "Dynamo alone hears it, and calls us then",
    "{}: {}": "the text is an argument of `demand`, or `Ending.conflict`'s, read there",
}


def text_of(node: ast.AST, scope: ast.AST) -> str:
    """The text of an expression, with {} for what is filled in, | between what it may be."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts)
        case ast.BinOp(left=left, right=right):
            return text_of(left, scope) + text_of(right, scope)
        case ast.IfExp(body=body, orelse=orelse):
            return f"{text_of(body, scope)}|{text_of(orelse, scope)}"
        case ast.Name(id=name):
            found = [
                text_of(each.value, scope)
                for each in ast.walk(scope)
                if isinstance(each, ast.Assign)
                and any(isinstance(t, ast.Name) and t.id == name for t in each.targets)
            ]
            return "|".join(found) or "{}"
    return "{}"


def message_of(call: ast.Call) -> ast.expr | None:
    """What a call tells a user, if it is one that does."""
    name = ast.unparse(call.func).rpartition(".")[2]
    if name == "demand" and len(call.args) > 2:
        return call.args[2]
    return call.args[0] if name in FAMILY | {"warn"} and call.args else None


@lru_cache
def said_in(file: Path) -> list[tuple[int, str]]:
    return list(dict.fromkeys(_said_in(file)))


def _said_in(file: Path) -> Iterator[tuple[int, str]]:
    for scope in ast.walk(ast.parse(file.read_text())):
        if not isinstance(scope, ast.FunctionDef):
            continue
        for node in ast.walk(scope):
            if isinstance(node, ast.Call) and (told := message_of(node)) is not None:
                yield node.lineno, text_of(told, scope)
        if scope.name == "conflict":
            yield from (
                (node.lineno, text_of(node.value, scope))
                for node in ast.walk(scope)
                if isinstance(node, ast.Return) and node.value is not None
            )


@lru_cache
def quotes() -> list[re.Pattern[str]]:
    """What the page quotes: in its headings, and in the first column of its tables."""
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r'### |\| "', line)]
    quoted = [q for line in lines for q in re.findall('"(.*?)"', line.split(" | ")[0])]
    return [re.compile(re.escape(q).replace(r"\.\.\.", ".*"), re.S) for q in quoted]


FILES = [*sorted((ROOT / "surgery").rglob("*.py")), *sorted((ROOT / "passes").glob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_each_error_and_warning_is_on_the_page(file):
    missing = [
        f"line {line}: {text}"
        for line, text in said_in(file)
        if text not in ELSEWHERE and not any(quote.search(text) for quote in quotes())
    ]
    assert not missing


def test_what_the_page_quotes_is_said():
    said = [text for file in FILES for _, text in said_in(file)]
    said += [file.read_text() for file in FILES if file.name == "exhausted.py"]  # a note, no error
    assert len(said) > 250
    assert not [quote.pattern for quote in quotes() if not any(map(quote.search, said))]


def test_a_new_error_would_be_missed(tmp_path):
    file = tmp_path / "new.py"
    file.write_text(
        'def f(x):\n    raise errors.ModelError(f"{x} is a novelty. " "Take it away.")\n'
    )
    assert said_in(file) == [(2, "{} is a novelty. Take it away.")]
    assert not any(quote.search("{} is a novelty. Take it away.") for quote in quotes())
