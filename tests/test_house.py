"""Tests of the house's order: imports go one way, and what is meant to be read stays small."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"lib": {"lib"}, "kernels": set(), "envs": {"lib"}, "sdar": {"lib", "kernels", "envs"},
              "eval": {"lib", "kernels", "envs", "sdar"}, "tools": {"lib", "kernels", "envs", "sdar", "eval", "tools"},
              "recipes": {"sdar"}}
FILES = sorted(path for name in MAY_IMPORT for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")])
AT_MOST = {"sdar.py": 1250, "kernels.py": 830, "envs.py": 1330, "eval.py": 350, "test_sdar.py": 700, "README.md": 190,
           "lib/baselines.py": 350, "lib/parallel.py": 200, "lib/vllm_engine.py": 200}


def imported(path):
    """Modules that a file imports anywhere, except in `if __name__ == "__main__"`: "lib.runs", "torch", ..."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            inside = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (inside + alias.name for alias in node.names)


def long_functions(path, most=45):
    """Names of the functions with more lines, Triton kernels apart."""
    return [node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= most
            and "triton.jit" not in map(ast.unparse, node.decorator_list)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_and_functions_fit_on_a_screen(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    names = {name.split(".")[0] for name in imported(path)}
    assert names & MAY_IMPORT.keys() <= MAY_IMPORT[layer] and long_functions(path) == []
    if layer == "kernels":
        assert names - sys.stdlib_module_names == {"torch", "triton"} and not names & {"argparse", "subprocess", "json"}


def test_no_file_imports_itself_through_others():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {name: {other for found in imported(path) for other in names if f"{found}.".startswith(f"{other}.")}
             for name, path in names.items()}
    assert {"lib.models", "lib.runs"} <= graph["sdar"] and "tools.clone" in graph["tools.tiny"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names a circle


def test_what_is_meant_to_be_read_stays_small():
    lines = lambda path: len(path.read_text().splitlines())
    assert {name: lines(ROOT / name) for name, most in AT_MOST.items() if lines(ROOT / name) > most} == {}
    assert sum(map(lines, [*ROOT.glob("test_*.py"), *ROOT.glob("tests/*.py")])) <= 6800


def test_every_warning_is_a_warning_of_python_which_one_place_prints():
    assert [path.name for path in FILES if re.search(r"""f?["'](\\n)?warning: """, path.read_text())] == ["program.py"]


@pytest.mark.parametrize("name", ["sdar", "tools.tiny"])
def test_threads_are_told_to_spin_for_a_short_time_only_before_torch_is_loaded(name):
    say = "lambda name, *_: print(os.environ['GOMP_SPINCOUNT']) if name == 'torch' else None"
    watch = f"type('Watch', (), {{'find_spec': {say}}})"
    code = f"import importlib, os, sys\nsys.meta_path.insert(0, {watch})\nimportlib.import_module({name!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if "OMP" not in key})
    assert done.stdout.split()[:1] == ["2000"], done.stderr
