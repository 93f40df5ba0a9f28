"""Tests of a run as a whole: its folder, resuming, stopping, bad input, and the other environments."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
import torch
from test_envs import GAMES, game_file

import envs
import sdar
from conftest import (
    CORPUS, QUESTIONS, assert_same_run, config, flags, interrupt_in, lines_of, refused, same, weights_of, written)
from lib import folders, models, retrieval, runs
from lib.advice import advice


@pytest.fixture(scope="module")
def straight(model_folder, tmp_path_factory):
    """A run of four steps without interruption."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert sdar.main(flags(model_folder, run)) == 0
    return run


def test_a_run_folder_holds_config_metrics_curve_episodes_and_loadable_checkpoints(straight, model_folder):
    assert {path.name for path in straight.iterdir()} == {  # nothing half-written, old checkpoints gone
        "config.json", "metrics.jsonl", "curve.png", "episodes", "checkpoint-0", "checkpoint-3", "checkpoint-4"}
    stored = json.loads((straight / "config.json").read_text())
    lines, versions = lines_of(straight), stored["provenance"]["packages"]
    assert (stored["tasks"], versions["torch"]) == (2, metadata.version("torch"))
    assert [(e["step"], "eval/success" in e) for e in lines] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert {"reward/success", "grpo/loss", "sdar/gap", "sdar/gate", "kl/loss", "rollout/turns"} <= lines[1].keys()
    episodes = [json.loads(line) for line in (straight / "episodes" / "step-00001.jsonl").read_text().splitlines()]
    assert len(episodes) == 4 and all(len(episode["turns"]) == 3 for episode in episodes)
    for turn in [turn for episode in episodes for turn in episode["turns"]]:
        assert len(turn["tokens"]) == len(turn["gap"]) == len(turn["gate"]) == len(turn["logp"])
        assert all(g == pytest.approx(1 / (1 + math.exp(-5 * d)), abs=1e-3) for d, g in zip(turn["gap"], turn["gate"]))
    first, last = (weights_of(straight / name) for name in ("checkpoint-0", "checkpoint-4"))
    again = sdar.load_policy(config(model=str(straight / "checkpoint-4"))).model.state_dict()
    assert torch.equal(again["model.norm.weight"], last["model.norm.weight"])
    assert same(first, weights_of(model_folder)) and not same(first, last)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(straight, model_folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert sdar.main(flags(model_folder, run, steps=2)) == 0
    with open(run / "metrics.jsonl", "a") as file:  # what a run killed after its last checkpoint leaves
        file.write('5\n{"a": 1}\n{"step": 3, "grpo/loss": 99}\n{"st')
    refused(sdar.main, ["--resume", str(run), "--steps", "1"], "--steps 1", capsys)
    assert sdar.main(["--resume", str(run), "--steps", "4"]) == 0
    assert sdar.main(["--resume", str(run)]) == 0  # it knows its new number of steps, and has nothing left to do
    assert_same_run(run, straight)


@pytest.mark.parametrize("module, name, call", [
    (sdar, "train_step", 2), (sdar, "rollout", 4),  # rollouts 1 and 2 are the first evaluation
    (runs, "save_checkpoint", 1), (runs, "save_checkpoint", 5)])  # of checkpoint-0, and the last one
def test_ctrl_c_saves_whole_steps_and_the_resumed_run_is_the_uninterrupted_one(
        module, name, call, straight, model_folder, tmp_path, monkeypatch, capsys):
    interrupt_in(monkeypatch, module, name, call)
    run = tmp_path / "run"
    assert sdar.main(flags(model_folder, run)) == 130
    assert f"--resume {run}" in capsys.readouterr().out
    assert sdar.main(["--resume", str(run)]) == 0
    assert_same_run(run, straight)


@pytest.mark.parametrize("stop, status", [(signal.SIGKILL, -9), (signal.SIGHUP, 130), (signal.SIGTERM, 130)])
def test_a_program_that_is_killed_or_stopped_resumes_bit_for_bit(
        stop, status, straight, model_folder, tmp_path):
    run, end = tmp_path / "run", time.monotonic() + 60
    process = subprocess.Popen(
        [sys.executable, sdar.__file__, *flags(model_folder, run)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)])  # nohup's
    while not (run / "checkpoint-1").exists():
        assert process.poll() is None and time.monotonic() < end, "checkpoint-1 did not appear"
        time.sleep(0.005)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status and not (run / "checkpoint-4").exists()
    if stop != signal.SIGKILL:
        assert f"saved in {runs.checkpoints(run)[-1]}" in output and f"--resume {run}" in output
        assert not list(run.glob(".*"))  # no half-written checkpoint
    assert sdar.main(["--resume", str(run)]) == 0
    assert_same_run(run, straight)


def test_an_environment_that_raises_loses_no_finished_step(model_folder, tmp_path, capsys, monkeypatch):
    calls, step = [], envs.WebShop.step

    def fail_later(self, action):
        calls.append(action)
        if len(calls) > 26:  # the evaluation twice 2 x 3 turns, a step 2 tasks x 2 episodes x 3 turns
            raise RuntimeError("out of stock")
        return step(self, action)

    monkeypatch.setattr(envs.WebShop, "step", fail_later)
    arguments = flags(model_folder, tmp_path / "run", eval_every=9, save_every=9, steps=3)
    refused(sdar.main, arguments, "RuntimeError: out of stock", capsys)
    assert [path.name for path in runs.checkpoints(tmp_path / "run")] == ["checkpoint-0", "checkpoint-1"]


def test_folders_that_hold_another_run_or_none_are_refused(straight, model_folder, tmp_path, capsys):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    cases = [(flags(model_folder, straight), f"--resume {straight}"), (["--resume", str(tmp_path)], "no config.json"),
             (flags(straight, tmp_path / "run"), "one of the checkpoints in it (checkpoint-0, checkpoint-3"),
             (["--resume", str(model_folder)], "config.json"),  # a model's
             (["--resume", str(straight), "--seed", "0", "--lr", "0.5"], "--lr 0.5 contradicts"),
             (["--resume", str(straight), "--threads", "-5"], "--threads"), (["--resume", ""], "--resume is empty"),
             (flags(model_folder, straight / "checkpoint-4"), "checkpoint-4 already holds config.json"),
             (["--resume", str(shutil.copytree(straight / "checkpoint-4", tmp_path / "apart"))], "outside its run")]
    for arguments, culprit in cases:
        refused(sdar.main, arguments, culprit, capsys)
    stored = json.loads((straight / "config.json").read_text())
    for config_file, culprit in ((stored, "no checkpoint"), (stored | {"sft_steps": 0}, "not written by this version"),
                                 (stored | {"steps": "5"}, "steps is '5'")):
        (tmp_path / "config.json").write_text(json.dumps(config_file))
        refused(sdar.main, ["--resume", str(tmp_path)], culprit, capsys)
    assert before == {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}


def test_metrics_go_to_tensorboard_whose_failure_ends_nothing_and_a_missing_library_is_named(
        model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(sdar.main, flags(model_folder, tmp_path / "a", report_to="tensorboard"), "pip install tensorboard", capsys)
    assert not (tmp_path / "a").exists()
    writer, sent = types.SimpleNamespace(), []
    writer.add_scalar = lambda name, value, step: sent.append((name, step)) if step < 2 else 1 / 0
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda _: writer))
    arguments = flags(model_folder, tmp_path / "b", report_to="tensorboard", steps=3, eval_every=0, eval_tasks=None)
    with pytest.warns(RuntimeWarning, match="nothing more is sent to the tracker: Zero") as caught:
        assert sdar.main(arguments) == 0 and ("grpo/loss", 1) in sent and len(lines_of(tmp_path / "b")) == 3
    assert len(caught) == 1


def official_games(folder):
    """The official layout with recorded games: four to train on, three to evaluate on."""
    for number, name in enumerate(GAMES):
        path = game_file(folder / "json_2.1.1" / ("train" if number < 4 else "valid_unseen"), name)
        path.with_name("traj_data.json").write_text(json.dumps({"task_type": name.split("-")[0]}))
    return {"data": folder, "eval_tasks": 3}


@pytest.mark.parametrize("name, more, types_seen", [
    ("alfworld", lambda folder: {}, 3), ("search", lambda folder: {}, 3), ("alfworld", official_games, 2)])
def test_a_run_trains_in_the_other_environments_and_logs_success_by_task_type(
        name, more, types_seen, model_folder, tmp_path):
    run, changes = tmp_path / "run", {"eval_tasks": 6} | more(tmp_path / "data")
    assert sdar.main(flags(model_folder, run, env=name, steps=1, eval_every=1, **changes)) == 0
    first, step, last = lines_of(run)
    kinds = {key for key in first if key.startswith("eval/success/")}
    assert kinds <= {f"eval/success/{kind}" for kind in envs.make(name).task_types} and len(kinds) >= types_seen
    assert step["rollout/errors"] == 0 and math.isfinite(step["grpo/loss"]) and step["sdar/gate"] > 0
    assert not same(weights_of(run / "checkpoint-1"), weights_of(run / "checkpoint-0"))


def test_a_retriever_that_is_down_is_counted_and_loses_no_step(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(retrieval.Retriever.__init__.__kwdefaults__, "pause", 0.0)
    monkeypatch.setitem(envs.PARSERS, "search", lambda text, official=False: ("<search> lisbon </search>", True))
    run = tmp_path / "run"
    arguments = flags(model_folder, run, env="search", retriever="http://127.0.0.1:9", steps=1, eval_every=0,
                      eval_tasks=None)
    refused(sdar.main, arguments, "Connection refused): start it, or give another address", capsys)
    monkeypatch.setattr(retrieval.Retriever, "probe", lambda self: None)  # it goes down later
    with pytest.warns(RuntimeWarning, match="127.0.0.1"):
        assert sdar.main(arguments) == 0
    (step,) = lines_of(run)
    assert step["rollout/errors"] == 12 and "errors 12" in capsys.readouterr().out


def test_settings_come_from_defaults_environment_model_preset_method_and_user_and_runs_get_free_folders(
        tmp_path, monkeypatch):
    make = lambda **explicit: sdar.make_config(explicit | {"out": "x"})
    assert make(model="m").lr == 1e-6 and make().lr == sdar.TINY_DEFAULTS["webshop"]["lr"] and make(lr=0.5).lr == 0.5
    turns = {env: [make(env=env, model=model).max_turns for model in ("m", "tiny")] for env in envs.ENVIRONMENTS}
    assert turns == {"webshop": [15, 8], "alfworld": [50, 24], "search": [4, 4]}
    assert make(env="search", model="m").history == 4 and make(env="search", model="m", history=1).history == 1
    official = make(preset="official")
    assert (official.advantage_stats, official.teacher, official.teacher_prompt, official.check_admissible) == (
        "turn", "rollout", "raw", False)
    assert make(preset="official", advantage_stats="episode").advantage_stats == "episode"
    grpo = make(preset="official", method="grpo")
    assert (grpo.teacher, grpo.sdar_coef, grpo.entropy_coef) == ("none", 0.0, 0.001)
    for model in ("m", "tiny"):
        home, away = make(model=model), make(env="search", model=model)
        assert sdar.in_environment(home, "search") == away and sdar.in_environment(away, "webshop") == home
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(3) as pool:  # at once, as three programs may
        made = pool.map(lambda _: folders.create_run(sdar.make_config({"seed": 3}), "v", "webshop-sdar-3"), range(3))
        assert sorted(map(str, made)) == [f"runs/webshop-sdar-3{number}" for number in ("", "-2", "-3")]


def without(source, folder, *files):
    """A copy of the model folder without some of its files."""
    return shutil.copytree(source, folder, ignore=lambda *_: files)


NO_JSON = {"items_shuffle.json": "[{", "items_ins_v2.json": "{}"}
# name: (flags of a good run that are replaced, what the sentence must name); t: an empty folder, m: a good model
BAD_INPUT = {
    "unknown environment": lambda t, m: ({"env": "chess"}, "--env 'chess'"),
    "unknown device": lambda t, m: ({"device": "abacus"}, "abacus"),
    "missing model": lambda t, m: ({"model": t / "nowhere"}, "nowhere"),
    "model without tokenizer": lambda t, m: ({"model": without(
        m, t / "bare", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")}, "bare"),
    "model without chat template": lambda t, m: ({"model": without(m, t / "mute", "chat_template.jinja")}, "mute"),
    "model without weights": lambda t, m: ({"model": without(m, t / "empty", "model.safetensors")}, "empty"),
    "retriever that nothing asks": lambda t, m: ({"retriever": "http://127.0.0.1:9"}, "webshop searches nothing"),
    "retriever without a scheme": lambda t, m: ({"env": "search", "retriever": "127.0.0.1"}, "http://127.0.0.1:8000"),
    "questions but no corpus": lambda t, m: ({"env": "search", "data": written(t / "q", QUESTIONS)}, "no corpus.jsonl"),
    "more turns than the environment plays": lambda t, m: ({"max_turns": 16}, "--max_turns 16"),
    "malformed products": lambda t, m: ({"data": written(t / "shelf", NO_JSON)}, "items_shuffle.json"),
    "too few training tasks": lambda t, m: (
        {"env": "search", "data": written(t / "q", QUESTIONS | CORPUS), "tasks": 3}, "--tasks 3"),
    "group of one": lambda t, m: ({"group_size": 1}, "--group_size"),
    "learning rate that is not a number": lambda t, m: ({"lr": "nan"}, "--lr"),
    "temperature zero": lambda t, m: ({"temperature": 0}, "--temperature"),
    "skills without general.md": lambda t, m: ({"skills": t}, "general.md"),
    "prompt limit too small": lambda t, m: ({"max_prompt_tokens": 20}, "--max_prompt_tokens"),
    "too many evaluation tasks": lambda t, m: ({"eval_tasks": 10**6}, "--eval_tasks"),
    "a flag without effect": lambda t, m: ({"method": "grpo", "gate_beta": 2}, "--gate_beta"),
    "exact divergence to an early teacher": lambda t, m: ({"surrogate": "rkl", "teacher": "rollout"}, "--teacher"),
    "evaluation flags without evaluations": lambda t, m: ({"eval_every": 0}, "--eval_tasks"),
    "out is a file": lambda t, m: ({"out": m / "config.json"}, "config.json"),
    "out is a model folder": lambda t, m: ({"out": m}, "already holds config.json, which a run would replace"),
    "seed beyond torch's": lambda t, m: ({"seed": 2**64}, "--seed"),
    "skills that are not text": lambda t, m: ({"skills": written(t / "s", {"general.md": "ÿ"})}, "is not UTF-8 text"),
    "houses elsewhere": lambda t, m: ({"env": "alfworld", "data": t}, "json_2.1.1"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_that_names_the_culprit(name, model_folder, tmp_path, capsys):
    changes, culprit = BAD_INPUT[name](tmp_path, model_folder)
    refused(sdar.main, flags(model_folder, tmp_path / "run", **changes), culprit, capsys)
    assert not (tmp_path / "run").exists()  # so that the corrected command can use the folder


def test_a_longer_run_keeps_the_evaluation_at_the_old_end_and_idle_flags_are_refused(model_folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert sdar.main(flags(model_folder, run, steps=3)) == 0 and models.is_bundled(run / "checkpoint-3") is False
    assert sdar.main(["--resume", str(run), "--steps", "4"]) == 0
    assert [e["step"] for e in lines_of(run) if "eval/success" in e] == [0, 2, 3, 4]
    refused(sdar.main, ["--resume", str(run), "--retriever", "http://h:1"], "--retriever would do nothing", capsys)
    stored = json.loads((run / "checkpoint-4" / "run.json").read_text())
    stored["settings"]["model"] = "tiny"
    (run / "checkpoint-4" / "run.json").write_text(json.dumps(stored))
    assert models.is_bundled(run / "checkpoint-4")  # what training makes of the bundled model keeps its defaults


def test_a_run_that_learns_nothing_says_why_and_what_to_do():
    fine = {"rollout/cut_off": 0.1, "rollout/invalid": 0.2, "grpo/zero_variance_groups": 0.5, "reward/success": 0.3}
    told = lambda **changes: advice(config(env="webshop"), "runs/x", [fine, *[fine | changes] * 3])
    assert told() == {} == advice(config(), "runs/x", [fine | {"rollout/invalid": 1.0}] * 2)
    cases = {"rollout/cut_off": "--max_response_tokens", "rollout/invalid": "python -m tools.clone --env webshop"}
    for name, words in cases.items():
        (text,) = told(**{name: 1.0}).values()
        assert words in text and "python eval.py --show runs/x" in text
    (never,) = told(**{"grpo/zero_variance_groups": 1.0, "reward/success": 0.0}).values()
    (solved,) = told(**{"grpo/zero_variance_groups": 1.0, "reward/success": 1.0}).values()
    assert "--reward score" in never and "success 1.00" in solved
