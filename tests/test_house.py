"""Tests of the house's order: imports go one way, and what is meant to be read stays small."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"lib": {"lib"}, "kernels": set(), "envs": {"lib"}, "sdar": {"lib", "kernels", "envs"},
              "eval": {"lib", "kernels", "envs", "sdar"}, "tools": {"lib", "kernels", "envs", "sdar", "eval", "tools"}}
FILES = sorted(path for name in MAY_IMPORT for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")])
AT_MOST = {"sdar.py": 1050, "kernels.py": 830, "envs.py": 1250, "eval.py": 350, "test_sdar.py": 700, "README.md": 190}


def imported(path):
    """Modules that a file imports anywhere, except in `if __name__ == "__main__"`: "lib.runs", "torch", ..."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def long_functions(path, most=45):
    """Names of the functions with more lines, Triton kernels apart."""
    return [node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= most
            and "triton.jit" not in map(ast.unparse, node.decorator_list)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_and_functions_fit_on_a_screen(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    own = {name.split(".")[0] for name in imported(path)} & MAY_IMPORT.keys()
    assert own <= MAY_IMPORT[layer] and long_functions(path) == []
    if layer == "kernels":
        names = {name.split(".")[0] for name in imported(path)}
        assert names - sys.stdlib_module_names == {"torch", "triton"} and not names & {"argparse", "subprocess", "json"}


def test_no_file_of_lib_or_tools_imports_itself_through_others():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES if path.parent != ROOT}
    graph = {name: {other for other in names for found in imported(path) if f"{found}.".startswith(f"{other}.")}
             for name, path in names.items()}
    assert any(graph.values())
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_what_is_meant_to_be_read_stays_small():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in AT_MOST}
    assert {name: count for name, count in lines.items() if count > AT_MOST[name]} == {}
    tests = [*ROOT.glob("test_*.py"), *ROOT.glob("tests/*.py")]
    assert sum(len(path.read_text().splitlines()) for path in tests) <= 2500
