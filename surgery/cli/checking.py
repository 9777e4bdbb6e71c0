"""`surgery doctor`: what is installed here, and what of the library's limits it brings with it."""

from __future__ import annotations

import operator
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch.torch_version import TorchVersion

from surgery.cli.screen import out

FAILED = 1  # exit code
TESTED = ("torch", "transformers")  # whose versions matter to the last digit
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
# Packages that the library works with, and what they are for.
BESIDE = {
    "transformers": "models of Hugging Face, train, plans from configs",
    "peft": "adapters",
    "accelerate": "its loops",
    "trl": "SFTTrainer",
    "bitsandbytes": "quantised bases, 8-bit optimizers",
    "torchao": "quantised bases",
    "matplotlib": "pictures: loss.png",
    "triton": "kernels on a GPU",
}


def check_up() -> None:
    """Tell versions, devices, compilers and what is limited here; exit code 1 if it is broken."""
    screen = out()
    table = Table("what", "here", "note")
    for row in [*_versions(), *_devices(), *_compilers()]:
        table.add_row(*map(escape, row))
    screen.print(table)
    for said in (wrong := list(_wrong())):
        screen.print(f"[red]broken: {escape(said)}[/red]", soft_wrap=True, highlight=False)
    for said in _limits():
        screen.print(f"[yellow]here: {escape(said)}[/yellow]", soft_wrap=True, highlight=False)
    if wrong:
        raise typer.Exit(FAILED)
    screen.print("[green]ready[/green]")


def installed(name: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def wanted() -> Iterator[tuple[str, str, bool]]:
    """Yield what the library asks for: name, versions, and whether that is for an extra only."""
    for line in (requires("model-surgery") or ()) if installed("model-surgery") else ():
        what, _, condition = line.partition(";")
        name = re.split(r"[\[<>=!~ ]", what, maxsplit=1)[0]
        versions = re.sub(r"^[\w.-]+\s*(\[.*?\])?\s*", "", what).strip()
        yield name, versions, "extra" in condition


def _versions() -> Iterator[tuple[str, str, str]]:
    yield "model-surgery", installed("model-surgery") or "not installed: run from its sources", ""
    yield "Python", platform.python_version(), sys.executable
    yield "torch", torch.__version__, ""
    for name, use in BESIDE.items():
        yield name, installed(name) or "-", use


def _devices() -> Iterator[tuple[str, str, str]]:
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", ""
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        capability = f"compute capability {found.major}.{found.minor}"
        yield f"GPU {i}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB", capability
    if torch.backends.mps.is_available():
        yield "GPU", "Apple (mps)", "not tested"


def _compilers() -> Iterator[tuple[str, str, str]]:
    yield "C++ compiler", _compiler() or "-", "what torch.compile builds with on a CPU"


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _wrong() -> Iterator[str]:
    """Yield what keeps the library from working, with the fix."""
    if other := installed("surgery"):
        yield (
            f"the distribution 'surgery' {other} is another tool and writes into the same folder: "
            "pip uninstall surgery && pip install --force-reinstall --no-deps model-surgery"
        )
    for name, versions, extra in wanted():
        # What an extra brings must fit if it is there, and need not be there.
        here, told = installed(name), f"pip install '{name}{versions}'"
        if here is None and not extra:
            yield f"{name} is not installed: {told}"
        elif here is not None and name in TESTED and not fits(here, versions):
            yield f"{name} {here} was not tested: {told}"


def fits(here: str, versions: str) -> bool:
    """Say whether a version lies in a range such as >=2.11,<2.16."""
    return all(
        COMPARE[sign](TorchVersion(here), bound)
        for sign, bound in re.findall(r"(>=|<=|==|!=|<|>)\s*([\w.]+)", versions)
    )


def _limits() -> Iterator[str]:
    """Yield the known limits that apply on this machine."""
    gpu = torch.cuda.is_available()
    cases: tuple[tuple[bool, str], ...] = (
        (
            not gpu,
            "no GPU: work on weights runs in bands on the CPU; peaks are those of the process",
        ),
        (
            gpu and find_spec("triton") is None,
            "no Triton: kernels run operation by operation, right but slower",
        ),
        (
            _compiler() is None,
            'no C++ compiler: backend="inductor" and compile=True fall back to eager on a CPU',
        ),
        (
            installed("transformers") is None,
            'no transformers: train, diff and plans from configs need "model-surgery[hf]"',
        ),
        (
            installed("matplotlib") is None,
            "no matplotlib: train draws no loss.png",
        ),
        (
            sys.platform == "win32",
            "Windows was not tested",
        ),
        (
            TorchVersion(torch.__version__) < "2.12",
            "torch 2.11: attention gets a mask and repeated keys when traced; gradients are equal "
            "up to the last bits, and more is kept",
        ),
    )
    yield from (said for holds, said in cases if holds)
