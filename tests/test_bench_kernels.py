"""tools/bench_kernels.py: what its reports promise, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; compiling is tested in a process of its own

import pytest
import torch

import kernels
from tools import bench_kernels

ROOT = Path(kernels.__file__).resolve().parent
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
if kernels.triton is not None:
    bench_kernels.mend_interpreter()


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_every_backend_is_within_the_promised_bounds_of_fp64(name, dtype, bound):
    errors = bench_kernels.accuracy(name, dtype)
    assert {"logp", "teacher_logp", "entropy", "gap", "gate", "rkl", "fkl", "jsd", "d_weight, jsd"} <= errors.keys()
    assert all(error < (bound if name.startswith("d_") else 1e-5) for name, error in errors.items()), errors


@needs_triton
@pytest.mark.slow
def test_every_kernel_that_would_be_chosen_compiles_without_spills_and_with_matrix_instructions(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.bench_kernels", "compile", "--out", str(tmp_path / "report.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "report.json").read_text())["compile"]["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"} and len(rows) == 5 * 16
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] <= row["shared_limit"], row
        assert row["matrix_instructions"] > 0 or row["dtype"] == "fp32", row  # exact fp32 has no such units


def test_reports_are_printed_and_recorded_with_their_command_and_unknown_ones_refused(tmp_path, capsys, monkeypatch):
    case = {"tiny": (16, 8, 64, True, "rkl")}
    monkeypatch.setattr(bench_kernels, "CASES", case | {"one-sided": (16, 8, 64, False, None)})
    monkeypatch.setattr(bench_kernels, "LARGE", case)
    monkeypatch.setattr(bench_kernels, "measure_memory", lambda *_: 1.5)
    out = tmp_path / "new" / "report.json"
    bench_kernels.main(["gpu", "large", "cpu", "memory", "roofline", "--threads", "1", "--out", str(out)])
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert torch.cuda.is_available() or "not done: there is no GPU here" in printed
    assert list(found) == ["cpu", "large", "memory", "roofline"] and "Qwen2.5-7B" in printed
    assert found["cpu"]["command"].startswith("python -m tools.bench_kernels gpu large cpu")
    assert found["cpu"]["rows"][0]["full s"] > 0 and found["large"]["rows"] == [{"case": "tiny", "fused MiB": 1.5}]
    assert all(row["triton"] < row["torch on cpu"] < row["full logits, at least"] for row in found["memory"]["rows"])
    bench_kernels.main(["accuracy", "--backend", "torch"])
    assert set(json.loads(capsys.readouterr().out)[0]) == {"error of", "torch float32", "torch bfloat16"}
    with pytest.raises(SystemExit):
        bench_kernels.main(["memroy"])
    assert "there is no report memroy: choose from cpu, large" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own_and_kernels_py_forwards_to_the_reports():
    assert 0 <= bench_kernels.measure_memory("fused", "gap_gate, V=1024", 1) < 200
    done = subprocess.run([sys.executable, "kernels.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert "tools.bench_kernels" in done.stdout, done.stderr
