"""Tests of tools/gpu_check.py, which checks machines with a GPU, and of what it holds them to (tools/step_cost.py)."""

import copy
import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch

from conftest import refused
from lib import models
from tools import gpu_check, step_cost
from tools.memory import QWEN, qwen


def test_the_padded_tokenizer_reads_texts_as_the_bundled_one_and_has_a_text_for_every_id():
    plain, padded = models.read_model("tiny")[1], gpu_check.padded_tokenizer(2304)
    text = "<think>use every detail</think><action>click[red lamp $20.97]</action>"
    assert models.Chat(copy.deepcopy(padded)).prompt(text) == models.Chat(plain).prompt(text)
    assert sorted(padded.get_vocab().values()) == list(range(2304)) and padded.decode([5, 2303, 2200])


def slow_check(machine):
    time.sleep(30)


def failing_check(machine):
    gpu_check.require(False, "the sum is 3, not 2")


def test_a_check_that_fails_or_takes_too_long_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    checks = {"sum": (failing_check, 5), "wait": (slow_check, 1), "last one": (lambda machine: {"x": 1}, 5)}
    monkeypatch.setattr(gpu_check, "CHECKS", {"model": checks})
    path = tmp_path / "gpu.json"
    gpu_check.write(path, {"checks": {}})
    gpu_check.run_group("model", None, gpu_check.CPU, path)
    found = json.loads(path.read_text())["checks"]
    assert [found[name]["ok"] for name in checks] == [False, False, True] and found["last one"]["found"] == {"x": 1}
    assert "the sum is 3, not 2" in found["sum"]["error"] and "took more than 1 s" in found["wait"]["error"]
    gpu_check.run_group("model", ["last"], gpu_check.CPU, path)


def test_checks_of_a_process_that_ends_are_recorded_as_failed(tmp_path, monkeypatch, capsys):
    ended = lambda command, **_: types.SimpleNamespace(returncode=-11)
    monkeypatch.setattr(subprocess, "run", ended)
    refused(gpu_check.main, ["--cpu", "--only", "values", "ranks", "--out", str(tmp_path / "gpu.json")],
            "These checks failed: values, ranks", capsys)
    found = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert found == dict.fromkeys(("values", "ranks"), {"ok": False, "error": "its process ended before it was done"})


def test_without_a_gpu_there_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(gpu_check.main, ["--out", str(tmp_path / "gpu.json")], "There is no GPU here: --cpu runs", capsys)
    assert not (tmp_path / "gpu.json").exists()


def test_the_kernels_are_held_to_fp64_to_the_interpreters_numbers_and_to_themselves(tmp_path, monkeypatch):
    small = gpu_check.CPU._replace(head=(8, 16, 100))
    assert max(gpu_check.check_interpreter(small).values()) < 1
    assert [row["n"] for row in gpu_check.check_values(small)] == [45, 45, 8, 8]
    assert gpu_check.check_repeats(small)["cases"] == 8
    stored = json.loads(gpu_check.INTERPRETED.read_text())
    stored["torch.float32 rkl"]["d_weight"][1] *= 1.1
    (tmp_path / "other.json").write_text(json.dumps(stored))
    monkeypatch.setattr(gpu_check, "INTERPRETED", tmp_path / "other.json")
    with pytest.raises(gpu_check.UserError, match="d_weight of torch.float32 rkl is .* from the interpreter's"):
        gpu_check.check_interpreter(small)
    monkeypatch.setattr(gpu_check, "LIMITS", dict.fromkeys(gpu_check.LIMITS, (1e-9, 1e-9)))
    with pytest.raises(gpu_check.UserError, match="errors against fp64 are too large"):
        gpu_check.check_values(small)


def test_a_steps_cost_adds_up_and_decoding_is_bound_by_launches_or_by_bytes():
    with torch.device("meta"):
        size = step_cost.size_of(qwen(*QWEN["Qwen2.5-1.5B"]))
    assert size.matrices == 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    gpu = step_cost.Gpu(product=1e12, copy=1e9, layers=0.5, head=0.5, launch=1e-3)
    assert step_cost.layers_seconds(size, 10, 0, gpu) == pytest.approx(10 * 2 * size.matrices / 0.5e12)
    assert step_cost.head_seconds(size, 10, gpu, 5) == pytest.approx(10 * 5 * 2 * 1536 * 151936 / 0.5e12)
    assert step_cost.decode_seconds(size, 1, 100, gpu) > 3.0 and step_cost.decode_seconds(
        size, 1, 100, gpu._replace(copy=1e15)) == 28 * 1e-3
    work = step_cost.WORK["webshop"]
    once, twice = (step_cost.step_seconds(size, work._replace(turns=turns)) for turns in (8, 16))
    assert all(twice[part] == pytest.approx(2 * once[part], rel=0.01) for part in once if part != "optimiser")
    assert twice["optimiser"] == once["optimiser"] > 0


@pytest.mark.slow
def test_every_check_goes_through_on_a_cpu(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tools.gpu_check", "--cpu", "--out", str(tmp_path / "gpu.json")],
                          cwd=gpu_check.ROOT, capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})
    found = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert done.returncode == 0 and all(result["ok"] for result in found.values()), done.stdout
    assert list(found) == [name for checks in gpu_check.CHECKS.values() for name in checks]
