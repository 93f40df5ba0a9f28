"""Tests of tools/study.py: its plan, its runs by a stand-in for sdar.py, study.json, statistics by hand."""

import json
import math
import os
import signal
import sys

import pytest

import sdar
from lib.program import try_lock
from tools import study, study_report

STAND_IN = """
import json, os, pathlib, signal, sys, time
words = [word for word in sys.argv[1:] if not word.startswith("--no-")]
given = {name[2:]: json.loads(text) if text[0].isdigit() else text for name, text in zip(words[::2], words[1::2])}
given |= {word[5:]: False for word in sys.argv if word.startswith("--no-")}
last, method = given["steps"], given["method"] if given["steps"] else "untrained"
with open("played", "a") as file:
    file.write(f"{method} {given['seed']}\\n")
if method == os.environ.get("FAILS"):
    sys.exit("warning: slow\\nerror: The disk is full.")
out = pathlib.Path(given["out"])
(out / "checkpoint-2").mkdir(parents=True)
(out / "config.json").write_text(json.dumps(given | {"provenance": {"commit": "abc"}}))
if method == os.environ.get("STOPS"):
    press = lambda: os.kill(os.getppid(), signal.SIGINT)
    signal.signal(signal.SIGTERM, lambda *_: (press(), time.sleep(0.3), (out / "saved").touch(), sys.exit(130)))
    press()
    time.sleep(60)
lines = [{"step": i, "reward/success": 0.25, "grpo/zero_variance_groups": 1.0} for i in range(1, last + 1)]
lines += [{"step": last, "eval/success": {"untrained": 0.0, "grpo": 0.4, "sdar": 0.8}[method]}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""
ALL = [f"{arm} {seed}" for seed in (0, 1) for arm in ("untrained", "grpo", "sdar")]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """-> a function that runs a study of two arms and two seeds by stand-ins, one at a time; it gives the status."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "study.md").write_text("Asked.\n<!-- study: begin -->\nold\n<!-- study: end -->\nLimits.\n")
    regime = "A", "webshop"
    for name, value in {"PROGRAM": [sys.executable, "stand_in.py"], "ROOT": tmp_path,
                        "SEEDS": {regime: 2}, "MORE_SEEDS": {},
                        "REGIMES": {regime: study.REGIMES[regime] | {"steps": 2}},
                        "FEWER_ARMS": {regime: ("grpo", "sdar_1")}}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study_report, "draw", lambda made, path: path.write_text(str(len(made))))  # takes a second
    return lambda *flags: study.main([*flags, "--jobs", "1"])


def played(folder):
    return (folder / "played").read_text().splitlines()


def records(folder):
    return {study.key(one)[2:]: one for one in json.loads((folder / "results" / "study.json").read_text())["runs"]}


def test_every_run_of_the_plan_is_a_valid_configuration_and_seeds_come_before_arms():
    runs = study.plan()
    for run in runs + study.plan(rates=[1e-3]) + study.plan(quick=True):
        cfg = sdar.make_config(run["flags"] | study.STORAGE | {"seed": run["seed"]})
        assert (cfg.env, cfg.seed) == (run["env"], run["seed"])
    assert {run["flags"]["eval_tasks"] for run in runs} == {256} and len(set(map(study.key, runs))) == len(runs)
    first = runs[:10 * len(study.ARMS)]
    assert {run["env"] for run in first} == {"webshop"} and first == sorted(first, key=lambda run: run["seed"])


def test_a_study_plays_what_its_file_lacks_and_reports_from_the_file_alone(start, tmp_path, capsys):
    assert start() == 0 and played(tmp_path) == ALL
    first = records(tmp_path)
    assert first["sdar_1", 1].items() >= {"commit": "abc", "evaluation": [[2, 0.8]], "zero_variance": 1.0,
                                          "training": [0.25, 0.25]}.items()
    page = (tmp_path / "docs" / "study.md").read_text()
    assert page.startswith("Asked.\n<!-- ") and page.endswith(" -->\nLimits.\n") and "old" not in page
    assert "| sdar_1 | 2 | 0.400 [0.400, 0.400] | +0.200 [unknown] |" in page  # the area, without scatter
    assert "sdar_1 seed 1: training success 0.250, evaluation 0.80" in capsys.readouterr().out
    assert not list(tmp_path.glob("runs/**/checkpoint-*"))
    study.shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results" / "study.png").unlink()
    assert start("--report") == 0 and (tmp_path / "results" / "study.png").read_text() == "6"
    for idle in (["--report", "--part", "A"], ["--quick", "--rates", "1"], ["--rates", "1", "--arms", "grpo"]):
        assert start(*idle) == 2 and "would do nothing" in capsys.readouterr().err
    assert start("--seeds", "3", "--arms", "sdar_1") == 0 and played(tmp_path) == [*ALL, "untrained 2", "sdar 2"]
    assert first.items() <= records(tmp_path).items() and start("--seeds", "0") == 2
    made, file = json.loads((tmp_path / "results" / "study.json").read_text()), tmp_path / "results" / "study.json"
    for damage in ({"evaluation": []}, {"evaluation": None}, {"evaluation": [[1, 0.5]]}, {"seconds": None}):
        file.write_text(json.dumps(made | {"runs": [made["runs"][-1] | damage]}))
        assert start("--report") == 2 and "move it away" in capsys.readouterr().err


def test_only_an_unfinished_folder_and_changed_settings_are_played_again(start, tmp_path, monkeypatch, capsys):
    start()
    log = tmp_path / "runs" / "study" / "A" / "webshop" / "sdar_1" / "0" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(True)[:2]))  # without the last evaluation
    (tmp_path / "results" / "study.json").unlink()
    descriptor = os.open(log.parent, os.O_RDONLY)
    assert try_lock(descriptor) and start() == 2 and log.exists()
    assert "Another program is writing to" in capsys.readouterr().err
    os.close(descriptor)
    assert start() == 0 and played(tmp_path) == [*ALL, "sdar 0"] and len(records(tmp_path)) == 6
    monkeypatch.setitem(study.ARMS, "sdar_1", study.sdar(0.5))
    assert start() == 0 and played(tmp_path)[7:] == ["sdar 0", "sdar 1"] and "2 runs of" in capsys.readouterr().out


def test_a_run_that_fails_is_recorded_with_its_sentence_and_tried_again(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "sdar")
    assert start() == 2 and records(tmp_path)["sdar_1", 0]["error"] == "The disk is full (status 1)."
    shown = capsys.readouterr()
    assert "sdar_1 seed 0: FAILED: The disk is full" in shown.out and "Runs that failed: 2" in shown.err
    assert "FAILED: The disk" in (tmp_path / "docs" / "study.md").read_text()
    monkeypatch.delenv("FAILS")
    assert start() == 0 and played(tmp_path) == [*ALL, "sdar 0", "sdar 1"]


def test_ctrl_c_even_twice_lets_the_children_save_and_leaves_a_valid_file(start, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    monkeypatch.setenv("STOPS", "sdar")
    assert start() == 130 and list(records(tmp_path)) == [("untrained", 0), ("grpo", 0)] and played(tmp_path) == ALL[:3]
    assert (tmp_path / "runs" / "study" / "A" / "webshop" / "sdar_1" / "0" / "saved").exists()
    monkeypatch.delenv("STOPS")
    assert start() == 0 and played(tmp_path)[3:] == ALL[2:]


def test_measures_of_a_curve_are_those_computed_by_hand():
    curve = {"evaluation": [[0, 0.1], [5, 0.3], [10, 0.7], [12, 0.5]], "training": [0.5, 1.0]}
    assert study_report.training(curve) == 0.75
    assert study_report.area(curve) == pytest.approx((5 * 0.2 + 5 * 0.5 + 2 * 0.6) / 12)
    assert study_report.final(curve) == 0.5 and study_report.steps_to(curve, 0.1) == 0
    assert study_report.steps_to(curve, 0.5) == pytest.approx(7.5) and study_report.steps_to(curve, 0.8) == 12


def test_differences_are_paired_by_seed_and_corrected_for_the_number_of_arms(tmp_path):
    final = {"grpo": [0.4, 0.6, 0.5], "gigpo": [0.5, 0.7, 0.61], "sdar_1": [0.7, 0.7, 0.4, 0.9]}
    run = {"part": "A", "env": "webshop", "training": [0.0], "zero_variance": 0.5, "seconds": 60,
           "flags": {"tasks": 2, "group_size": 4, "steps": 20, "lr": 1e-4}}
    made = [run | {"arm": arm, "seed": seed, "evaluation": [[20, success]]}
            for arm, values in final.items() for seed, success in enumerate(values)]
    made += [run | {"arm": "untrained", "seed": seed, "evaluation": [[0, 0.0]], "training": []} for seed in range(4)]
    made += [made[0] | {"arm": "rlsd", "error": "It failed."}, made[0] | {"seed": 9}]  # untrained has no seed 9
    grpo, gigpo, sdar_1 = (row for row in study_report.summary(made) if row["measure"] == "final")
    assert grpo["reached"] == 2 and "p" not in grpo and grpo["mean"] == pytest.approx(0.5)
    assert grpo["high"] == pytest.approx(0.5 + 4.302653 * 0.1 / math.sqrt(3))  # Student's t, 2 degrees of freedom
    t = 0.1 / (0.2 / math.sqrt(3))  # differences 0.3, 0.1, -0.1 of the seeds of both
    assert (sdar_1["seeds"], sdar_1["pairs"], sdar_1["p_sign_flip"]) == (4, 3, 0.75)
    assert [sdar_1[name] for name in ("difference", "p", "p_holm")] == pytest.approx(
        [0.1, 1 - t / math.sqrt(2 + t * t), 1 - t / math.sqrt(2 + t * t)])
    assert gigpo["p_holm"] == pytest.approx(2 * gigpo["p"]) and gigpo["p_sign_flip"] == 0.25
    assert (gigpo["verdict"], sdar_1["verdict"]) == ("a difference", "no difference shown")
    text = study_report.tables(made)
    assert "50% of grpo's groups have zero variance. 10 runs; half of them took up to 60 s." in text
    assert "rlsd seed 0: FAILED: It failed." in text and text.endswith("under their seeds: 1 runs.")
    assert "Controls against" not in text
    made += [run | {"arm": "foreign_1", "seed": seed, "evaluation": [[20, success]]}
             for seed, success in enumerate([0.6, 0.6, 0.4, 0.7])]  # areas 0.05, 0.05, 0 and 0.1 below sdar_1's
    _, controls = study_report.tables(made).split("Controls against sdar_1, area:")
    assert "| foreign_1 (control) | 4 |" in controls and " -0.050 [" in controls and "gigpo" not in controls
    for draw in study_report.draw, study_report.draw_front:
        draw(made, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_quick_study_runs_from_end_to_end(tmp_path):
    assert study.main(["--quick", "--part", "A", "--env", "webshop", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "study.png").exists() and "| sdar_1 | 1 |" in (tmp_path / "study.md").read_text()
