"""The shape of the source: no import circle, no file or function that is too long to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("xmoe_fairseq", "eval", "data_prep", "benchmarks")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(module: str, path: Path) -> set[str]:
    """Modules of the project that ``module`` imports, in functions and for types too; not the packages that hold it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - statement.level + 1]) if statement.level else ""
            base = ".".join(filter(None, (base, statement.module)))
            found |= {base, *(f"{base}.{alias.name}" for alias in statement.names)}
    return {name for name in found if name in FILES and name != module and not module.startswith(f"{name}.")}


def test_no_module_imports_itself_through_others():
    graph = {module: imported(module, path) for module, path in FILES.items()}
    assert sum(map(len, graph.values())) > 200  # the imports were found
    state: dict[str, str] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " -> ".join((*trail, module))
        if module not in state:
            state[module] = "open"
            for other in sorted(graph[module]):
                visit(other, (*trail, module))
            state[module] = "done"

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("xmoe_fairseq")])
def test_no_file_of_the_package_is_longer_than_300_lines(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 300


def long_functions() -> dict[str, int]:
    found = {}
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
                first = node.body[1].lineno if documented and len(node.body) > 1 else node.lineno
                if node.end_lineno - first + 1 > 40:
                    found[f"{module}.{node.name}"] = node.end_lineno - first + 1
    return found


def test_functions_longer_than_40_lines_say_why():
    """Docstrings left out. A comment in the function with the words "one function" gives the reason."""
    for name, length in long_functions().items():
        module, _, function = name.rpartition(".")
        source = FILES[module].read_text(encoding="utf-8")
        node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == function)
        assert "one function" in (ast.get_source_segment(source, node) or ""), f"{name}: {length} lines"


def test_the_legend_of_axis_letters_stands_once():
    inner = [path for name, path in FILES.items() if name.startswith("xmoe_fairseq.moe.")]
    assert len(inner) > 30
    assert [path.name for path in inner if "Axis letters" in path.read_text(encoding="utf-8")] == []
