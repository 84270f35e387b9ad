"""Imports between the package's folders go downward only: no folder depends on the folders built on it. No name of a
class has two meanings."""

from __future__ import annotations

import ast
from pathlib import Path

import icrl_megatron

ROOT = Path(icrl_megatron.__file__).parent
LAYERS = (
    *("types", "utils", "settings", "distributed", "agents", "tasks", "model", "engines", "algo", "data", "telemetry"),
    *("rollout", "distill", "actor", "report", "run", "plan", "launch", "evaluation", "loop", "train", "sft", "cli"),
)
"""Folders and modules of the package's root, lowest first: each imports only from itself and from those before it."""

SAME_SENSE = {"Fields"}
"""The columns of a row: some readers may change them and others may not."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below the root."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules of this package that a file imports anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, below = name.partition(".")
            if package != ROOT.name or not below:
                continue
            while below not in known:  # a name inside a module
                below = below.rpartition(".")[0]
            found.add(below)
    return found


def layer(module: str) -> str:
    return module.partition(".")[0]


def upward(layers: tuple[str, ...]) -> list[str]:
    """Imports that go up, as "module -> module"."""
    height = {name: i for i, name in enumerate(layers)}
    known = modules()
    return [
        f"{module} -> {other}"
        for module, path in sorted(known.items())
        for other in sorted(imported(path, set(known)))
        if module and other and height[layer(other)] > height[layer(module)]
    ]


def test_every_folder_has_a_layer() -> None:
    assert {layer(module) for module in modules() if module} == set(LAYERS)


def test_imports_go_downward_only() -> None:
    assert upward(LAYERS) == []


def test_an_upward_import_is_found() -> None:
    assert "loop -> run.parts" in upward(tuple(reversed(LAYERS)))


def test_no_modules_import_each_other() -> None:
    """Within a folder too: whether circular imports work depends on which module is imported first."""
    known = modules()
    below = {module: imported(path, set(known)) - {module} for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in below[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in known:
        visit(module, ())


def test_the_root_contains_only_the_programs() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {
        "__init__.py", "cli.py", "loop.py", "sft.py", "train.py", "types.py",
    }  # fmt: skip


def definitions() -> dict[str, set[str]]:
    """Name -> its definitions, over all classes and type aliases of the package: a class is named by its module, and an
    alias by its type."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.ClassDef(name=name):
                    found.setdefault(name, set()).add(f"class in {module}")
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() | ast.BinOp() as value):
                    if name[0].isupper() and not name.isupper():
                        found.setdefault(name, set()).add(ast.unparse(value))
    return found


def test_no_name_has_two_meanings() -> None:
    names = definitions()
    assert {"Episode", "StopReason", "Ended"} <= set(names)
    assert {name: of for name, of in names.items() if len(of) > 1 and name not in SAME_SENSE} == {}
