"""The rooms of design.md 6, kept by the syntax trees: who may import what, and what names mean."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import surgery
from surgery.contract.registry import registered

ROOT = Path(__file__).parent.parent
LEAVES = ("surgery.errors", "surgery.noise", "surgery.ranks")
# room -> what it may import besides itself
LOWER: dict[str, tuple[str, ...]] = dict.fromkeys(LEAVES, ())
for room, below in (
    ("compat", LEAVES),
    ("kernels", ("compat",)),
    ("memory", ("compat",)),
    ("weights", ("memory", "kernels")),
    ("graph", ("weights",)),
    ("contract", ("graph",)),
    ("engine", ("contract",)),
    ("sampling", ("contract",)),
    ("activations", ("graph",)),
    ("logits", ("activations",)),
    ("subspace", ("contract", "activations")),
    ("zeroth_order", ("contract", "activations")),
    ("passkit", ("sampling", "subspace", "zeroth_order", "logits")),
    ("passes", ("passkit",)),
    ("catalogue", ("passes", "contract")),
    ("prediction", ("engine",)),
    ("reports", ("catalogue", "prediction")),
    ("api", ("reports",)),
    ("checkpoints", ("api", "zeroth_order")),
    ("testing", ("checkpoints",)),
    ("__init__", ("testing",)),
    ("cli", ("__init__",)),
    ("__main__", ("cli",)),
):
    LOWER[room if room == "passes" else f"surgery.{room}"] = tuple(
        each if each == "passes" or "." in each else f"surgery.{each}" for each in below
    )
FOREIGN = ("torch", "transformers", "peft", "accelerate")
# Files of more than 300 lines, each with the reason why it is one.
LONG = {
    "surgery/testing/laws.py": "one law after another, each by itself",
    "benchmarks/activation_memory.py": "one table: its rows are peers of one another",
    "tests/test_fsdp.py": "what is sharded and what is not, one case after another",
    "tests/test_compat.py": "one canary after another",
    "tests/test_other_code.py": "one kind of other code after another",
    "tests/test_by_hand.py": "what others do, one kind after another",
    "surgery/engine/dispatch.py": "one forward, and all that may stand in its way",
    "tests/long_life.py": "one life: what may happen to a model, and its reference",
    "tests/test_optimizers.py": "one table of optimizers, and what each needs",
    "tests/test_misa.py": "all that is MISA's own",
    "tests/test_galore.py": "all that is GaLore's own",
    "tests/test_rso.py": "all that is RSO's own",
    "tests/test_velora.py": "all that is VeLoRA's own",
    "tests/test_zeroth_runs.py": "runs of all zeroth-order passes share their set-up",
}
# Modules that bear the name of a public function, each with the reason.
NAMESAKES = {"surgery.kernels.plan": "named in design.md 7: it plans sizes, not surgeries"}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "passes" else ".".join((*parts, "__init__")[:2])


@lru_cache
def files() -> dict[str, Path]:
    """Module -> file, of the library and its passes."""
    found = {}
    for folder in ("surgery", "passes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@lru_cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def run_time(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a tree that are run, not only read by type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from run_time(node)


def imports_of(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    found = set()
    for node in run_time(tree_of(files()[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = whole & set(files())
            found |= modules
            # `from surgery.weights import shards` names a module, not its package
            if modules != whole:
                found.add(node.module)
    return {name for name in found if name in files()}


@lru_cache
def allowed(room: str) -> frozenset[str]:
    found = {room}
    for below in LOWER[room]:
        found |= allowed(below)
    return frozenset(found)


def test_every_file_is_in_a_known_room():
    assert {room_of(module) for module in files()} <= set(LOWER)


@pytest.mark.parametrize("module", files())
def test_imports_run_one_way(module):
    room = room_of(module)
    wrong = {other for other in imports_of(module) if room_of(other) not in allowed(room)}
    assert not wrong, f"{module} ({room}) must not import {sorted(wrong)}"


def test_there_are_no_circles_between_files():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for other in imports_of(module):
                visit(other, (*way, module))
            done.add(module)

    for module in files():
        visit(module, ())


def test_the_engine_and_the_kits_never_meet():
    kits = {"surgery.sampling", "surgery.subspace", "surgery.zeroth_order", "surgery.activations"}
    assert not kits & allowed("surgery.engine")
    assert all("surgery.engine" not in allowed(kit) for kit in kits | {"surgery.passkit"})


def private_names(tree: ast.Module) -> Iterator[str]:
    """What a file touches of others that begins with an underscore."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] in FOREIGN:
                names = [*parts, *(alias.name for alias in node.names)]
                yield from (f"{node.module}: {n}" for n in names if n.startswith("_"))
            imported |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Attribute):
            private = re.fullmatch(r"_[a-zA-Z]\w*", node.attr)
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if private and not own:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            name = ast.unparse(node.args[1])
            if re.match(r"""f?["']_[a-zA-Z]""", name):
                yield ast.unparse(node)
        elif isinstance(node, ast.FunctionDef) and node.name in (
            "_save_to_state_dict",
            "_load_from_state_dict",
        ):
            yield node.name


@pytest.mark.parametrize("module", [m for m in files() if room_of(m) != "surgery.compat"])
def test_private_names_of_others_stand_in_compat_only(module):
    assert not list(private_names(tree_of(files()[module])))


def code_of(page: Path) -> ast.Module:
    """The Python of a page of docs."""
    return ast.parse("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)))


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "passes").glob("[a-z]*.py")), ROOT / "docs" / "write_a_pass.md"],
    ids=str,
)
def test_passes_import_from_the_kit_only(path):
    tree = tree_of(path) if path.suffix == ".py" else code_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            ours = node.module.split(".")[0] in ("surgery", "passes")
            assert not ours or node.module in ("surgery.passkit", "surgery.testing"), node.module


def test_no_module_bears_the_name_of_a_public_function():
    public = {name for name in vars(surgery) if callable(getattr(surgery, name))}
    clash = {module for module in files() if module.rpartition(".")[2] in public}
    assert clash <= set(NAMESAKES)


def test_long_files_have_a_reason():
    long = {
        str(path.relative_to(ROOT))
        for folder in ("surgery", "passes", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if len(path.read_text().splitlines()) > 300
    }
    assert long == set(LONG)
    assert all(LONG.values())


def words_of(tree: ast.Module) -> Iterator[str]:
    """Names and texts of a file, docstrings left out."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ):
            yield node.value


@pytest.mark.parametrize(
    "module", [m for m in files() if room_of(m) in allowed("surgery.engine") | {"surgery.passkit"}]
)
def test_the_engine_names_no_method(module):
    surgery.available()
    names = {*registered(), *(cls.__name__ for cls in registered().values())}
    for text in words_of(tree_of(files()[module])):
        found = names & set(re.findall(r"\w+", text))
        assert not found, f"{module} names {found} in {text!r}"
