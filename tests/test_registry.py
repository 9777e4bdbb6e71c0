"""Passes by name: whose a name is, and packages that are broken."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
from models import make
from torch import nn

import passes
import surgery
from surgery import catalogue
from surgery.contract.registry import _PASSES
from surgery.passkit import register


@pytest.fixture
def announced(monkeypatch):
    """Let packages announce passes: a function that takes their entry points."""
    loads: list[str] = []

    class Counted(EntryPoint):
        def load(self):
            loads.append(self.value)
            return super().load()

    def announce(*values: str) -> list[str]:
        points = [Counted(f"entry{i}", value, catalogue.GROUP) for i, value in enumerate(values)]
        monkeypatch.setattr(catalogue, "entry_points", lambda group: points)
        catalogue._load_others.cache_clear()
        return loads

    before = dict(_PASSES)
    yield announce
    _PASSES.clear()
    _PASSES.update(before)
    catalogue._load_others.cache_clear()


def test_an_outside_class_of_the_same_name_does_not_replace_ours():
    @dataclass(frozen=True, kw_only=True)
    class Misa:
        def start(self, model: nn.Module):
            raise AssertionError

    Misa.__qualname__ = "Misa"  # as at the top of somebody's module
    for decorate in (surgery.register, register):
        with pytest.raises(surgery.OptionError, match=r"taken by passes\.misa\.Misa.*another"):
            decorate("misa")(Misa)
    assert _PASSES["misa"] is passes.Misa


def test_a_name_of_ours_cannot_be_taken_before_ours_are_loaded():
    script = """
from dataclasses import dataclass
import surgery
from surgery.passkit import register
try:
    @register("misa")
    @dataclass(frozen=True, kw_only=True)
    class Misa:
        def start(self, model): ...
except surgery.OptionError as error:
    assert "taken by passes.misa" in str(error)
    import passes
    assert surgery.testing.tiny() is not None
    surgery.apply(surgery.testing.tiny(), "misa", budget=0.5)
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import surgery.testing\n" + script],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "refused", done.stderr


def test_a_class_may_be_defined_again():
    """As in a notebook, where a cell is run twice."""
    for _ in range(2):

        @surgery.register("again")
        @dataclass(frozen=True, kw_only=True)
        class Again:
            def start(self, model: nn.Module):
                return passes.BAdam().start(model)

    del _PASSES["again"]


def test_a_broken_package_takes_nothing_else_with_it(announced):
    loads = announced("nowhere_at_all:thing", "passes")
    surgery.apply(make("plain"), "misa", budget=0.5)
    surgery.apply(make("plain"), passes.BAdam())
    assert loads == []  # nobody had to be asked
    with pytest.raises(
        surgery.OptionError, match="could not be loaded: ModuleNotFoundError"
    ) as error:
        surgery.apply(make("plain"), "miza")
    assert "Did you mean 'misa'" in str(error.value)
    with pytest.warns(RuntimeWarning, match="nowhere_at_all"):
        assert "misa" in surgery.available()


def test_packages_are_loaded_once(announced):
    loads = announced("passes", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            surgery.available()
            with pytest.raises(surgery.OptionError, match="unknown pass"):
                surgery.apply(make("plain"), "miza")
    assert loads == ["passes", "json"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: type("Bare", (), {"start": lambda self, model: None}), "goes above @dataclass"),
        (lambda: dataclass(type("Thawed", (), {"start": lambda s, m: None})), "frozen=True"),
        (lambda: dataclass(frozen=True)(type("Stuck", (), {})), r"has no start\(model\)"),
    ],
    ids=["no dataclass", "not frozen", "no start"],
)
def test_what_is_no_pass_cannot_be_registered(made, message):
    with pytest.raises(surgery.OptionError, match=message):
        surgery.register("strange")(made())
    assert "strange" not in _PASSES


def test_an_instance_that_was_not_registered_says_how():
    @dataclass(frozen=True, kw_only=True)
    class Mine:
        def start(self, model: nn.Module):
            raise AssertionError

    with pytest.raises(surgery.OptionError, match=r'@surgery\.register\("mine"\)|\'mine\''):
        surgery.apply(make("plain"), Mine())
