"""Tests of eval.py: summaries and differences, the evaluation set's hash, comparison, curves, servers, command line."""

import dataclasses
import http.server
import json
import random
import shutil
import threading
import time

import numpy as np
import pytest

import envs
import eval as evaluation
import sdar
from conftest import config, flags, refused, written
from lib import checkpoints, curves, endpoint, folders, results
from lib.engine import respond
from lib.program import UserError
from lib.skills import read_skills
from lib.statistics import cluster_bootstrap, wilson


def outcome(task_id, won, **changes):
    return {"task_id": task_id, "task_type": "lamps", "repeat": 0, "won": won, "score": float(won), "turns": 4,
            "invalid": 1, "done": True} | changes


def test_a_summary_has_a_line_for_each_type_and_one_for_all():
    outcomes = [outcome(0, True, turns=3, invalid=0), outcome(1, False, score=0.5, turns=5, invalid=2),
                outcome(2, False, task_type="rugs", turns=8, invalid=8, done=False)]
    table = results.summarise(outcomes)
    assert list(table) == ["lamps", "rugs", "all"] and table["lamps"]["success_interval"] == wilson(1, 2)
    hand = {"n": [2, 1, 3], "success": [1 / 2, 0, 1 / 3], "score": [0.75, 0, 0.5], "turns": [4, 8, 16 / 3],
            "invalid": [2 / 8, 1, 10 / 16], "unfinished": [0, 1, 1 / 3]}
    for name, values in hand.items():
        assert [line[name] for line in table.values()] == pytest.approx(values)


def test_repeats_are_pooled_by_task_so_that_they_do_not_count_as_new_tasks():
    won = [i % 2 == 0 for i in range(40)]
    once = [outcome(i, w) for i, w in enumerate(won)]
    line = results.describe([outcome(i, w, repeat=r) for r in range(4) for i, w in enumerate(won)])
    assert (line["n"], line["episodes"], line["success"]) == (40, 160, 0.5)
    assert line["score_interval"] == results.describe(once)["score_interval"]
    assert line["success_interval"] == cluster_bootstrap([won])[1:]
    never = results.describe([outcome(i, False, repeat=r) for r in range(2) for i in range(10)])
    assert never["success_interval"] == never["score_interval"] == wilson(0, 10)  # a rate of zero has a width too
    assert results.attempts([[outcome(i, True, repeat=r) for r in range(2) for i in range(10)]])[2] == (
        (1, wilson(10, 10)),) * 2


def test_intervals_end_where_rates_and_their_differences_do():
    low, high = ([[outcome(i, (i * 7 + r + n) % 10 < n, repeat=r) for r in range(4) for i in range(10)]
                  for n in rates] for rates in ((0, 1, 5), (4, 9, 10)))
    for chances in results.attempts(low).values():
        assert all(0 <= bound[0] <= mean <= bound[1] <= 1 for mean, bound in chances)
    assert -1 <= results.difference(low, high)["success"]["interval"][0] < -0.9


def test_outcomes_are_paired_by_task_whatever_their_order_and_repeats_have_another_test():
    first, second = ([outcome(i, i < 6) for i in order] for order in (range(12), reversed(range(12))))
    result = results.difference([first], [second])["success"]
    assert (result["difference"], result["interval"], result["p"]) == (0, (0, 0), 1)
    twice = [outcome(i, i < 6, repeat=r) for i in range(12) for r in range(2)]
    assert {results.difference([other], [twice])["success"]["test"] for other in (first, twice)} == {"sign flips"}


def test_four_tasks_won_more_out_of_many_are_no_difference_although_the_bootstrap_excludes_zero():
    base, better, much = ([outcome(i, i < wins) for i in range(128)] for wins in (60, 64, 80))
    result = results.difference([better], [base])["success"]
    assert result["interval"][0] > 0 and result["p"] == 0.125 and not result["shown"]
    result = results.difference([much[:5]], [[outcome(i, False) for i in range(5)]])["success"]
    assert not result["shown"] and result["tasks"] == 6  # of 5 tasks p is at least 2 / 2^5
    result = results.difference([much], [base])["success"]
    assert result["shown"] and result["p"] == pytest.approx(2 / 2 ** 20)


def test_the_hash_changes_with_every_part_of_a_task():
    def digest(*goals, split="val"):
        class Shop:
            def reset(self, options):
                self.goal = goals[options["task_id"]]
                return "", {"task": self.goal["text"], "task_type": "", "admissible": None, "valid": True, "won": False,
                            "score": 0.0}

        return evaluation.evaluation_set_hash(Shop(), [sdar.Task(split, i, i) for i in range(len(goals))])

    lamp = {"text": "a lamp", "price": 20.0, "options": {"color": "red"}}
    known = digest(lamp, lamp)
    assert known == digest(dict(reversed(lamp.items())), lamp)  # the order of a goal's fields means nothing
    others = [digest(lamp), digest(lamp, lamp, split="train"), digest(lamp, lamp | {"text": "a rug"}),
              digest(lamp, lamp | {"price": 30.0}), digest(lamp, lamp | {"options": {"color": "blue"}})]
    assert len({known, *others}) == 6


@pytest.mark.parametrize("name, known", [
    ("webshop", "a27fef2362f28b6b"), ("alfworld", "c0c2dee1a2c17b35"), ("search", "0c461f59dc20202d")])
def test_the_evaluation_set_is_in_every_process_the_one_that_results_were_measured_on(name, known):
    cfg = sdar.make_config({"model": "tiny", "env": name, "out": "x"})
    env = sdar.make_env(cfg)
    assert evaluation.evaluation_set_hash(env, sdar.evaluation_tasks(cfg, env)).startswith(known)


def result_file(path, *repeats, digest="a" * 64, conditions=("without",), run=None, **settings):
    """repeats: won or lost of each task."""
    won = repeats[0]
    outcomes = [outcome(i, w, repeat=r) for r, some in enumerate(repeats) for i, w in enumerate(some)]
    path.write_text(json.dumps({
        "format": evaluation.FORMAT, "model": path.stem, "evaluation_set": digest, "conditions": conditions,
        "sampling": {"split": "val", "tasks": len(won), "repeats": len(repeats), "seed": 0, "temperature": 0.0},
        "config": dataclasses.asdict(sdar.make_config({"model": "tiny"} | settings)),
        "outcomes": dict.fromkeys(conditions, outcomes), **({"run": run} if run else {}),
        "summary": dict.fromkeys(conditions, results.summarise(outcomes))}))
    return str(path)


def test_a_comparison_gives_settings_difference_interval_and_p_per_shared_condition(tmp_path, capsys):
    a = result_file(tmp_path / "a.json", [1] * 30 + [0] * 10, conditions=("without", "with"))
    b = result_file(tmp_path / "b.json", [1] * 10 + [0] * 30, max_turns=6)
    assert evaluation.main(["--compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "B - A, without skills, paired by task\n" in text and "with skills in the prompt" not in text
    assert "  A   0.750 [0.598, 0.858]" in text and "  B   0.250 [0.142, 0.402]" in text
    assert "-0.500" in text and "p 1.91e-06 (McNemar)  a difference; 9 tasks would show it (80 % power)\n" in text
    assert "no difference shown" not in text
    assert "generated tasks, not the official ones" in text and "greedy" in text
    assert "settings that differ, A | B: model a | b, conditions" in text and ", max_turns 8 | 6\n" in text
    a, b = result_file(tmp_path / "a.json", [1, 0] * 20), result_file(tmp_path / "b.json", [0, 1] * 20)
    assert evaluation.main(["--compare", a, b]) == 0 and capsys.readouterr().out.count("no difference shown\n") == 2


def test_results_of_several_seeds_are_compared_by_method_over_tasks_and_seeds(tmp_path, capsys):
    def trained(name, rate, seed, **settings):
        won = np.random.default_rng(seed).random((2, 60)) < np.linspace(0, 2 * rate, 60)
        run = {"method": name, "seed": seed, "step": 30, "sdar_coef": 0.01, "lr": 1e-4} | settings
        return result_file(tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}.json", *won.tolist(), run=run)

    grpo, sdar_low = ([trained(name, rate, seed) for seed in range(4)] for name, rate in (("grpo", 0.3), ("sdar", 0.6)))
    other = [trained("sdar", 0.3, seed, sdar_coef=1.0) for seed in (5, 6)]
    assert evaluation.main(["--compare", *grpo, *sdar_low, *other]) == 0
    text = capsys.readouterr().out
    for part in ("\ngrpo, training seeds 0, 1, 2, 3, on webshop (gen", "\nsdar, training seeds 5, 6, on webshop (gen",
                 "B: training method grpo | sdar\n", "C: training method grpo | sdar, training sdar_coef 0.01 | 1.0\n",
                 "B - A, without skills, paired by task and seed\n", "C - A, without skills, paired by task\n",
                 "not corrected for the 2 comparisons"):
        assert part in text
    assert text.count("pass@2 ") == text.count("pass^2 ") == 3 and "pass@3" not in text and "D  " not in text
    first, second = text.split("paired by task")[1:]
    assert first.splitlines()[1].split("]  ")[1].startswith("a difference; ")
    assert "seeds would show it (80 % power)" in first
    assert "no difference shown; " in second.splitlines()[1] and "would show it" in second.splitlines()[1]
    assert evaluation.main(["--compare", *grpo, *reversed(sdar_low), *other]) == 0
    assert capsys.readouterr().out.split("skills")[1:] == text.split("skills")[1:]  # seeds are paired in any order
    assert evaluation.main(["--compare", grpo[0], grpo[0], *other]) == 0  # the same seed twice is no second seed
    text = capsys.readouterr().out
    assert f"B  {grpo[0]}:\n" in text and "C  " in text and "says nothing of other seeds" in text


def test_a_run_stands_for_the_result_of_its_last_evaluated_checkpoint(run_folder, tmp_path, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    refused(evaluation.main, ["--compare", str(run), str(run)], "checkpoint-0 makes one", capsys)
    result_file(run / "checkpoint-0" / "eval.json", [1, 0, 1])
    for folder in (run, run / "checkpoint-0"):
        assert results.result_path(folder) == run / "checkpoint-0" / "eval.json"
    shutil.copytree(run / "checkpoint-0", run / "checkpoint-20")
    shutil.copytree(run / "checkpoint-0", run / "checkpoint-100", ignore=shutil.ignore_patterns("eval.json"))
    assert results.result_path(run) == run / "checkpoint-20" / "eval.json"


@pytest.mark.parametrize("content, why", [
    (None, "cannot be read"), ("{", "not a JSON file"), ("[]", "not written by this version"),
    ('{"format": "other"}', "not written by this version"), ({"digest": "b" * 64}, "(aaaaaaaaaaaa and bbbbbbbbbbbb)"),
    ({"conditions": ("with",)}, "no condition in common"), ({"conditions": ("with", "with")}, "(conditions ["),
    ({"conditions": ("moon",)}, "(conditions ["),
    ({"run": {"method": "opid", "seed": 0, "step": 1, "analyser": ["x"]}}, "(analyser of run is [")])
def test_files_that_cannot_be_compared_are_refused_by_name(tmp_path, capsys, content, why):
    good, bad = result_file(tmp_path / "good.json", [1, 0]), tmp_path / "bad.json"
    if isinstance(content, dict):
        result_file(bad, [1, 0], **content)
    elif content is not None:
        bad.write_text(content)
    for culprit in (why, str(bad)):
        refused(evaluation.main, ["--compare", good, str(bad)], culprit, capsys)


@pytest.fixture(scope="module")
def run_folder(model_folder, tmp_path_factory):
    """A run folder with one checkpoint."""
    run = tmp_path_factory.mktemp("run") / "run"
    cfg = sdar.make_config({"model": "tiny", "max_turns": 2, "max_response_tokens": 6, "threads": 1, "seed": 3,
                            "retrieval": "full", "eval_tasks": 5, "out": str(run)})
    folders.create_run(cfg, sdar.__version__)
    policy = sdar.load_policy(dataclasses.replace(cfg, model=str(model_folder)))
    checkpoints.save_checkpoint(run, policy.model, policy.chat.tokenizer, sdar.make_optimizer(policy.model, cfg), 0)
    return run


SERVED = ("--endpoint", "http://127.0.0.1:9", "--model", "m")


@pytest.mark.parametrize("argv, why", [
    ((), "Give a model"), (("tiny", "--compare", "a", "b"), "does not go with MODEL"),
    (("--compare", "a", "b", "--seed", "1"), "does not go with seed"), (("tiny", "--repeats", "0"), "--repeats"),
    (("tiny", "--repeats", "2", "--temperature", "0"), "--repeats"), (("tiny", "--temperature", "-1"), "temperature"),
    (("tiny", "--tasks", "1000000"), "tasks"), (("tiny", "--retrieval", "none"), "--condition without"),
    (("tiny", "--tasks", "2", "--split", "moon"), "moon"), (("./nowhere",), "nowhere"),
    (("tiny", "--tasks", "2", "--out", "/nowhere/e.json"), "/nowhere"), (("runs/r/checkpoint-9",), "checkpoint-9"),
    (("--model", "m"), "--model needs --endpoint"), (("--endpoint", "http://127.0.0.1:9"), "--endpoint needs --model"),
    (("tiny", *SERVED), "one model"), ((*SERVED, "--device", "cpu"), "--device would do nothing"),
    ((*SERVED, "--request_timeout", "0"), "--request_timeout"), (SERVED, "does not answer as 'm'"),
    (("--endpoint", "ftp://x", "--model", "m"), "--endpoint must be"), (("--compare", "nowhere"), "nowhere"),
    (("--endpoint", "http://me:pw@127.0.0.1:9", "--model", "m"), "OPENAI_API_KEY"),
    (("tiny", "--tasks", "2", "--out", "e.txt"), "--out must end in .json"),
    (("--curves", "a", "--out", "picture"), "--out must end in"), (("--curves", "nowhere"), "nowhere is not a run"),
    (("--curves", "a", "--seed", "1"), "does not go with seed")])
def test_bad_input_is_one_sentence_and_status_2(capsys, tmp_path, monkeypatch, argv, why):
    monkeypatch.chdir(tmp_path)
    refused(evaluation.main, list(argv), why, capsys)


def test_an_evaluation_by_several_processes_is_refused(monkeypatch, tmp_path, capsys):
    for name, value in ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"):
        monkeypatch.setenv(name, value)
    arguments = ["tiny", "--tasks", "1", "--max_turns", "1", "--out", str(tmp_path / "eval.json")]
    refused(evaluation.main, arguments, "start it without torchrun", capsys)


def test_a_checkpoint_is_played_under_its_runs_settings_and_apart_from_the_run_under_defaults(
        capsys, run_folder, tmp_path):
    checkpoint, common = str(run_folder / "checkpoint-0"), sdar.Config
    cfg = evaluation.evaluation_config(checkpoint, {"max_turns": 9})
    assert (cfg.model, cfg.max_turns, cfg.max_response_tokens, cfg.seed, cfg.retrieval) == (checkpoint, 9, 6, 3, "full")
    assert (cfg.eval_tasks, cfg.eval_temperature) == (common.eval_tasks, common.eval_temperature)
    refused(evaluation.main, [checkpoint, "--retriever", "http://127.0.0.1:9"], "--retriever would do nothing", capsys)
    refused(evaluation.main, [checkpoint, "--env", "chess"], "--env 'chess' is unknown", capsys)
    away = evaluation.evaluation_config(checkpoint, {"env": "search"})
    assert (away.env, away.history, away.seed) == ("search", 4, 3)
    copied = str(shutil.copytree(checkpoint, tmp_path / "checkpoint-0"))
    for model, most in ((copied, common.max_prompt_tokens), ("tiny", 512)):
        assert evaluation.evaluation_config(model, {}).max_prompt_tokens == most
    (tmp_path / "config.json").write_text('{"provenance": {}, "speed": 9}')
    refused(evaluation.main, [copied], "was not written by this version", capsys)
    refused(evaluation.main, [str(run_folder)], "(checkpoint-0)", capsys)  # a run is not a model


def test_an_evaluation_writes_every_episode_and_can_be_repeated_but_not_overwritten(capsys, run_folder, tmp_path):
    checkpoint = run_folder / "checkpoint-0"
    command = [str(checkpoint), "--tasks", "4", "--repeats", "2"]
    assert evaluation.main(command) == 0
    text = capsys.readouterr().out
    assert "generated tasks, not the official ones" in text and "with - without skills" in text and "unfinished" in text
    result = json.loads((checkpoint / "eval.json").read_text())
    assert result["sampling"] == {"split": "val", "tasks": 4, "repeats": 2, "seed": 3, "temperature": 0.4}
    assert set(result["outcomes"]) == {"with", "without"} and result["provenance"]["packages"]["torch"]
    for outcomes in result["outcomes"].values():
        ids = [task.task_id for task in sdar.evaluation_tasks(config(eval_tasks=4), sdar.make_env(config()))]
        assert [(o["task_id"], o["repeat"]) for o in outcomes] == [(i, r) for r in range(2) for i in ids]
        assert all(1 <= o["turns"] <= 2 and 0 <= o["invalid"] <= o["turns"] for o in outcomes)
    assert result["summary"]["with"]["all"]["n"] == 4 and "with - without" in result["summary"]
    assert evaluation.main(command) == 0 and json.loads((checkpoint / "eval.json").read_text()) == result
    refused(evaluation.main, [*command, "--seed", "4"], "seed 3 | 4", capsys)
    (tmp_path / "notes.json").write_text("mine")
    refused(evaluation.main, [*command, "--out", str(tmp_path / "notes.json")], "not a JSON file", capsys)
    assert (tmp_path / "notes.json").read_text() == "mine"


def test_episodes_can_be_read_turn_by_turn_as_the_model_saw_them(model_folder, tmp_path, capsys):
    out = tmp_path / "e.json"
    assert evaluation.main(["tiny", "--tasks", "6", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    played = [json.loads(line) for line in (tmp_path / result["episodes"]).read_text().splitlines()]
    assert [e["condition"] for e in played] == ["without"] * 6 + ["with"] * 6
    for episode, outcome in zip(played, result["outcomes"]["without"] + result["outcomes"]["with"]):
        assert {name: episode[name] for name in ("task_id", "won", "score")} == {
            name: outcome[name] for name in ("task_id", "won", "score")}
        for turn in episode["turns"]:
            assert turn["observation"] in turn["prompt"] and episode["task"] in turn["prompt"]
            assert episode["skills"] in turn["prompt"] and bool(episode["skills"]) == (episode["condition"] == "with")
            assert "[SEP]" not in turn["observation"] and turn["prompt"].startswith("<|im_start|>")
    capsys.readouterr()
    assert evaluation.main(["--show", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(turn["text"] in text and turn["observation"] in text for e in played for turn in e["turns"])
    assert evaluation.main(["--show", str(out), "--lost"]) == 0
    assert capsys.readouterr().out.count("--- episode") == sum(not e["won"] for e in played) < text.count("--- episode")
    run = tmp_path / "run"
    assert sdar.main(flags(model_folder, run, steps=4, episodes_every=2)) == 0
    assert sorted(path.name for path in (run / "episodes").iterdir()) == [f"step-0000{n}.jsonl" for n in (1, 3, 4)]
    capsys.readouterr()
    shown = [evaluation.main(["--show", str(run), *step]) or capsys.readouterr().out for step in ([], ["--step", "4"])]
    assert shown[0] == shown[1] and "mean gap" in shown[0]
    trained = json.loads((run / "episodes" / "step-00004.jsonl").read_text().splitlines()[0])
    assert trained["skills"] and trained["turns"][0]["gap"]
    for argv, why in [(["--show", str(run), "--step", "77"], "no episodes of step 77; it has those of 1, 3, 4"),
                      (["--show", "nowhere"], "nowhere"), (["--show", str(out), "--step", "1"], "is a file"),
                      (["--show", str(run / "metrics.jsonl")], "is not a file of episodes"),
                      (["tiny", "--lost"], "--lost needs --show"), (["tiny", "--show", "x"], "does not go with MODEL")]:
        refused(evaluation.main, argv, why, capsys)


def test_one_greedy_episode_per_task_is_that_of_the_training_loop(run_folder, tmp_path):
    checkpoint, out = str(run_folder / "checkpoint-0"), tmp_path / "greedy.json"
    command = [checkpoint, "--tasks", "3", "--temperature", "0", "--condition", "without", "--out", str(out)]
    assert evaluation.main(command) == 0
    stored = json.loads(out.read_text())
    assert stored["conditions"] == ["without"] and set(stored["summary"]) == {"without"}
    cfg = evaluation.evaluation_config(checkpoint, {"eval_tasks": 3})
    environments = [sdar.make_env(cfg) for _ in range(3)]
    episodes = sdar.rollout(sdar.load_policy(cfg), environments, sdar.evaluation_tasks(cfg, environments[0]), cfg,
                            temperature=0, seed=cfg.seed)
    assert [(o["won"], o["score"], o["turns"]) for o in stored["outcomes"]["without"]] == [
        (e.won, e.score, len(e.turns)) for e in episodes]


def test_skills_are_shown_in_one_condition_only_and_to_a_run_without_a_teacher_too(run_folder, tmp_path, monkeypatch):
    stored = json.loads((run_folder / "config.json").read_text())
    grpo = {"retrieval": "none", "teacher": "none", "method": "grpo"}
    (tmp_path / "config.json").write_text(json.dumps(stored | grpo))
    (tmp_path / "checkpoint-1").symlink_to(run_folder / "checkpoint-0")
    seen, rollout = [], sdar.rollout
    watched = lambda *args, **options: seen.append((options["skills"], options["seed"])) or rollout(*args, **options)
    monkeypatch.setattr(sdar, "rollout", watched)
    assert evaluation.main([str(tmp_path / "checkpoint-1"), "--tasks", "1", "--repeats", "2",
                            "--out", str(tmp_path / "e.json")]) == 0
    (without, first), (_, second), (skills, third), _ = seen
    assert without is None and first == third == 3 != second  # every repeat has a seed of its own
    assert all(len(text) > 100 for text in skills.values()) and len(set(skills.values())) > 1
    assert json.loads((tmp_path / "e.json").read_text())["config"]["method"] == "grpo"


# ---------------------------------------------------------------------------------------------- a model behind a server

def completion(content, **more):
    message = {"choices": [{"message": {"content": content} | more, "finish_reason": "length" if more else "stop"}]}
    return 200, json.dumps(message), {}


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers by the next of server.script or, if there is none, server.reply: (status, text, headers), or a function
    of the handler and the user's message."""

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        server.seen.append((self.path, self.headers["Authorization"], body))
        answer = server.script.pop(0) if server.script else server.reply
        status, text, headers = answer(self, body["messages"][0]["content"]) if callable(answer) else answer
        self.send_response(status)
        for name, value in ({"Content-Length": len(text)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        for part in text if headers.get("slow") else [text]:
            self.wfile.write(part.encode())
            time.sleep(0.02 if headers.get("slow") else 0)

    def log_message(self, *args):
        pass


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.handle_error, server.daemon_threads = lambda *_: None, True  # a connection that was cut
    server.script, server.reply, server.seen = [], completion("no"), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(model, texts):
    return respond(model.engine(None, 0.0), [(text,) for text in texts], map(random.Random, range(len(texts))))


def test_a_server_in_trouble_is_asked_again_and_the_trouble_counted(stub):
    troubles = {
        (429, "slow down", (("Retry-After", 0),)): "status 429", (503, "", ()): "status 503",
        (200, "<html>busy</html>", ()): "no chat completion", (200, "[" * 100_000, ()): "no chat completion",
        (200, '{"choices": []}', ()): "no chat completion", completion(5)[:2] + ((),): "no chat completion",
        (200, "{}", (("Content-Length", 50),)): "connection failed", (200, " " * 90, (("slow", 1),)): "timed out"}
    for (status, text, headers), kind in troubles.items():
        model = endpoint.Endpoint(stub.url, "m", max_tokens=5, timeout=0.5)
        stub.script, stub.seen[:] = [(status, text, dict(headers))] * 2, []
        assert ask(model, ["hello \ud800"]) == [(("no", ""), (), "end")]
        assert model.counts == {f"tried again ({kind})": 2, "answered": 1} and len(stub.seen) == 3
    stub.script = [(503, "loading", {}), (429, "", {"Retry-After": 0})]
    endpoint.Endpoint(stub.url + "/v1/completions", "m", max_tokens=5).probe()
    assert not stub.script and stub.seen[-1][0] == "/v1/chat/completions"
    stub.script = [(200, '{"error": "no model m"}', {})]
    with pytest.raises(UserError, match="not a chat completion: .*no model m"):
        endpoint.Endpoint(stub.url, "m", max_tokens=5).probe()
    stub.script = [lambda handler, text: handler.connection.shutdown(2)]
    assert ask(model, ["hello"])[0].ids == ("no", "") and model.counts["tried again (connection failed)"] == 1


def test_requests_are_given_up_where_another_try_is_useless_and_all_of_them_once_nothing_is_answered(stub, monkeypatch):
    model = endpoint.Endpoint(stub.url + "/v1/", "m", "sk-secret", max_tokens=5)
    monkeypatch.setattr(endpoint, "ANSWER_LIMIT", 1000)
    away = (302, "", {"Location": stub.url + "/else"})
    for refusal in ((400, "too long for sk-secret", {}), away, (200, " " * 1001, {})):
        stub.script = [stub.reply, refusal]
        assert [ask(model, [text])[0].stop for text in ("hello", "long")] == ["end", "error"]
        assert not stub.script and "sk-secret" not in model.last_failure
    kinds = "status 400", "status 302", "too long"
    assert model.counts == {"answered": 3} | {f"given up ({kind})": 1 for kind in kinds}
    stub.reply, stub.seen[:] = (500, "", {}), []
    with pytest.raises(UserError, match="has stopped answering .* requests in a row failed"):
        ask(model, ["hello"] * 1000)
    assert len(stub.seen) <= endpoint.TRIES * (endpoint.GIVE_UP + model.parallel)
    with pytest.raises(UserError, match="has stopped answering"):
        ask(endpoint.Endpoint(stub.url, "m", max_tokens=5), ["hello"])  # none of one is enough


def test_requests_go_out_in_parallel_but_not_too_many_and_answers_come_in_order(stub):
    running, most = [], []

    def reply(handler, text):
        running.append(text)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return completion(None, reasoning_content=text)

    stub.reply = reply
    texts = list("abcdefghijkl")
    model = endpoint.Endpoint(f"{stub.url}/v1/chat/completions", "m", max_tokens=5, parallel=3)
    assert ask(model, texts) == [((f"<think>{text}</think>",), (), "length") for text in texts]
    assert model.engine(None, 0.0).step() == []  # as where the last searches of a rollout run
    assert 2 <= max(most) <= 3 and len({body["seed"] for *_, body in stub.seen}) == len(texts)


def test_a_served_model_is_evaluated_and_episodes_without_an_answer_are_counted(stub, tmp_path, capsys):
    stub.reply = completion("<think>it fits</think><action>click[buy now]</action>")
    out, again = tmp_path / "e.json", tmp_path / "f.json"
    command = ["--endpoint", stub.url, "--model", "some/model", "--tasks", "3", "--max_turns", "2", "--out"]
    assert evaluation.main([*command, str(out)]) == 0
    text, stored = capsys.readouterr().out, out.read_text()
    assert f"some/model at {stub.url}/v1/chat/completions on webshop (generated tasks, not the official" in text
    assert "requests: 12 answered\n" in text and "sk-secret" not in text + stored
    bodies = [body for path, key, body in stub.seen if (path, key) == ("/v1/chat/completions", "Bearer sk-secret")][1:]
    assert [(b["model"], b["temperature"], b["max_tokens"]) for b in bodies] == [("some/model", 0.4, 512)] * 12
    assert len({body["seed"] for body in bodies}) == 6  # of task and turn, the same in both conditions
    skill = read_skills(folders.ROOT / "data/skills/webshop/full", envs.make("webshop").task_types)[0]
    assert [skill in body["messages"][0]["content"] for body in bodies] == [False] * 6 + [True] * 6
    assert evaluation.main(["--show", str(out)]) == 0 and capsys.readouterr().out.count("it fits") == 12
    stub.script = [stub.reply, (400, "prompt too long", {})]
    assert evaluation.main([*command, str(again), "--condition", "without"]) == 0
    text, played = capsys.readouterr().out, json.loads(again.read_text())["outcomes"]["without"]
    assert "requests: 4 answered, 1 given up (status 400)\n" in text and "failure: status 400, prompt too long" in text
    assert sorted((o["errors"], o["turns"], o["won"]) for o in played) == [(0, 2, False), (0, 2, False), (1, 1, False)]
    stub.reply = 401, "no such key as sk-secret", {}
    refused(evaluation.main, [*command, str(tmp_path / "g.json")], "status 401, no such key as ***", capsys)


# ------------------------------------------------------------------------------------------------------ learning curves

def run_of(folder, method, seed, points, **settings):
    """A run folder with these successes by step."""
    stored = dataclasses.asdict(sdar.make_config({"model": "tiny", "method": method, "seed": seed} | settings))
    lines = [json.dumps({"step": step, "eval/success": value}) for step, value in points.items()]
    config_file = json.dumps(stored | {"provenance": {}})
    return str(written(folder, {"config.json": config_file, "metrics.jsonl": "\n".join(lines)}))


def test_learning_curves_are_grouped_by_method_with_bands_over_seeds(tmp_path, capsys):
    kinds = [("grpo", 0.2, {}), ("grpo", 0.3, {}), ("grpo", 0.7, {}), ("sdar", 0.5, {"sdar_coef": 1.0}),
             ("sdar", 0.9, {"sdar_coef": 1.0}), ("sdar", 0.4, {"sdar_coef": 0.01})]
    found = [run_of(tmp_path / str(seed), method, seed, {0: 0.1, 10: value, 20 + seed: 0.9}, **more)
             for seed, (method, value, more) in enumerate(kinds)]
    out = tmp_path / "c.png"
    assert evaluation.main(["--curves", *found, "--out", str(out)]) == 0 and out.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "webshop (generated tasks, not the official ones)\n" in text and "greedy" not in text
    assert "  grpo (3 seeds, 95 % t interval), step 10: eval/success 0.400 [0.000, 1.000]\n" in text  # cut to [0, 1]
    assert "  sdar, sdar_coef 1.0 (2 seeds, min to max), step 10: eval/success 0.700 [0.500, 0.900]\n" in text
    assert "  sdar (one seed), step 25: eval/success 0.900\n" in text
    steps, values = curves.band([curves.read_run(path, {}) for path in found[:3]], "eval/success")
    assert steps == [0, 10] and values[0] == pytest.approx([0.1] * 3)  # the steps that all have
    more = [run_of(tmp_path / "long", "sdar", 7, {0: 0.1, 9: 0.2}, steps=200, skills="$\\bad{$"),
            run_of(tmp_path / "apart", "gigpo", 1, {5: 0.1}),
            run_of(tmp_path / "two", "gigpo", 2, {6: 10 ** 400, 7: 0.2})]
    assert evaluation.main(["--curves", *found, *more, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "steps 200 (one seed), step 9: eval/success 0.200\n" in text
    assert "gigpo: eval/success is not drawn, since its runs have no step in common\n" in text
    torn = str(written(tmp_path / "torn", {"config.json": '{"provenance": '}))
    listed = str(written(tmp_path / "listed", {"config.json": '["provenance"]'}))
    for argv, why in [([torn], "torn is not a run folder"), ([listed], "listed is not a run folder"),
                      ([run_of(tmp_path / "twice", "grpo", 0, {0: 0.1})], "runs of one seed (grpo, seed 0)"),
                      ([run_of(tmp_path / "empty", "grpo", 9, {})], "has no evaluation"),
                      (["--out", str(tmp_path / "no" / "c.png")], "cannot be written")]:
        refused(evaluation.main, ["--curves", *found, *argv], why, capsys)
