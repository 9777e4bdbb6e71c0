"""Passes by name: whose a name is, and packages that are broken."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from models import make
from torch import nn

import passes
import surgery
from surgery import catalogue
from surgery.contract.options import to_json
from surgery.contract.registry import _PASSES
from surgery.engine.decide import decide
from surgery.passkit import EVERY, Method, check_types, register


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


@pytest.mark.parametrize("name", ["auto", "", 3, "a,b:c", "*", nn.Linear])
def test_a_name_that_nobody_could_ask_for_is_refused(name):
    with pytest.raises(surgery.OptionError, match="cannot be the name of a pass"):
        surgery.register(name)


@pytest.fixture
def a_pass():
    """Make a pass, for one test, of a function that returns its state."""
    before = dict(_PASSES)

    def made(state, name="strange"):
        @surgery.register(name)
        @dataclass(frozen=True, kw_only=True)
        class Strange:
            def start(self, model: nn.Module):
                return state()

        Strange.__qualname__ = name
        return Strange()

    yield made
    _PASSES.clear()
    _PASSES.update(before)


def state(name="strange", **attributes):
    """Make the class of a state."""
    hooks = {"rewrite": lambda self, graph, inputs, saved: None}
    return type("State", (Method,), hooks | {"name": name} | attributes)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda: None, r"strange: Strange\.start\(model\) returns a NoneType"),
        (state, r"returns the class State\. .* surgery\.passkit\.Method"),
        (lambda: state("other")(), r"called 'other'.*`name: str = 'strange'` in State"),
        (lambda: state(after="recompute")(), r"is a string.*after = \('recompute',\)"),
        (lambda: state(conflicts=("misa",))(), "conflicts is a tuple"),
    ],
    ids=["none", "a class", "another name", "a string", "no reasons"],
)
def test_what_start_returns_is_looked_at(a_pass, returned, message):
    strange = a_pass(returned)
    for call in (surgery.apply, lambda model, spec: surgery.plan(model, None, spec)):
        with pytest.raises(surgery.OptionError, match=message):
            call(make("plain"), strange)


def test_a_reason_may_hold_braces(a_pass):
    strange = a_pass(state(conflicts={"lisa": "of {x: 1} and {other}"}))
    with pytest.raises(surgery.ConflictError, match=r"of \{x: 1\} and lisa"):
        surgery.apply(make("plain"), [strange, "lisa"])


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"after": ("recompute",)}, ["recompute", "strange", "compress"]),
        ({"after": ("compress",)}, ["recompute", "compress", "strange"]),
        ({"before": ("recompute",)}, ["strange", "recompute", "compress"]),
        ({"before": (EVERY,)}, ["strange", "recompute", "compress"]),
        ({"after": (EVERY, "recompute"), "before": ("compress",)}, ["recompute", "strange"]),
    ],
    ids=["behind recompute", "behind compress", "before", "first", "between"],
)
def test_a_name_counts_before_every(a_pass, declared, expected):
    """`recompute` comes after all others, `compress` after it: who names them comes after them."""
    strange = a_pass(state(**declared))
    specs = catalogue.resolve(["compress", strange, "recompute"], {})
    found = [method.name for method in decide(make("plain"), specs).rewriting]
    assert found[: len(expected)] == expected


def test_a_dict_or_a_set_is_no_list_of_passes():
    for spec in ({"lisa": {"layers": 1}}, {"lisa", "recompute"}):  # options lost, any order
        with pytest.raises(surgery.OptionError, match="is not a pass"):
            surgery.apply(make("plain"), spec)


def test_an_option_without_a_default_is_asked_for():
    @surgery.register("needy")
    @dataclass(frozen=True, kw_only=True)
    class Needy:
        k: int

        def start(self, model: nn.Module):
            raise AssertionError

    with pytest.raises(surgery.OptionError, match=r'no default for k.*"needy", k=\.\.\.'):
        surgery.apply(make("plain"), "needy")
    del _PASSES["needy"]


def test_types_of_options():
    @dataclass(frozen=True, kw_only=True)
    class Options:
        name: ClassVar = "options"
        saves: ClassVar[tuple[str, ...]] = ()
        pair: tuple[int, str] = (1, "a")
        any: Any = None

        def __post_init__(self):
            check_types(self)

    Options(pair=(2, "b"), any=[3])
    with pytest.raises(surgery.OptionError, match="pair="):
        Options(pair=("b", 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(surgery.OptionError, match="which a save can hold"):
        Options(any={"a": 1})
    with pytest.raises(surgery.OptionError, match=r"any=torch\.float32 .* cannot hold"):
        to_json(Options(any=torch.float32))


def test_an_instance_that_was_not_registered_says_how():
    @dataclass(frozen=True, kw_only=True)
    class Mine:
        def start(self, model: nn.Module):
            raise AssertionError

    with pytest.raises(surgery.OptionError, match=r'@surgery\.register\("mine"\)|\'mine\''):
        surgery.apply(make("plain"), Mine())


@pytest.mark.parametrize(
    ("kind", "old", "new", "value"),
    [
        (passes.Misa, "smoothing", "ema_decay", 0.5),
        (passes.Misa, "explore", "uniform_mix", 0.1),
        (passes.Misa, "flush", "momentum_step", True),
        (passes.Rso, "state", "on_resample", "transport"),
        (passes.Galore, "state", "on_resample", "reset"),
    ],
)
def test_an_option_is_taken_by_its_earlier_name(kind, old, new, value):
    with pytest.warns(FutureWarning, match=f"{old}= of {kind.__name__} is called {new}= now"):
        assert kind(**{old: value}) == kind(**{new: value})
    with pytest.warns(FutureWarning, match=new):
        assert catalogue.resolve(kind.name, {old: value}) == (kind(**{new: value}),)
    with pytest.raises(surgery.OptionError, match=f"{old}= and {new}=, which are the same option"):
        kind(**{old: value, new: value})
    saved = {"name": kind.name, "options": {old: value}}
    assert catalogue.from_json(saved) == kind(**{new: value})
