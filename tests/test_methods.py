"""Tests of the methods as rows of settings: what each is without its own weight, what it leaves in the log, where the
teacher acts, and which skills it is shown. The formulas alone are tested in test_baselines.py."""

import copy
import dataclasses
import json
import math
import socketserver
import threading

import pytest
import torch

import envs
import eval as sdar_eval
import sdar
from conftest import assert_same_run, config, flags, lines_of, refused
from lib import endpoint, hindsight
from lib.analyser import Analysis
from lib.program import UserError
from lib.results import difference
from lib.skills import CONTROLS, STRATEGIES, Skills, contains, library, read_skills
from lib.tasks import checked

OWN_METRIC = {"grpo": "grpo/loss", "gigpo": "gigpo/change", "sdar": "sdar/gate", "opsd": "sdar/gap",
              "grpo_opsd": "sdar/gap", "skill_grpo": "skills/missing", "rlsd": "rlsd/change",
              "skill_sd": "skill_sd/k3", "opid": "opid/change"}
OWN_WEIGHTS = {"gigpo": ["gigpo_weight"], "sdar": ["sdar_coef"], "grpo_opsd": ["sdar_coef"], "rlsd": ["rlsd_mix"],
               "skill_sd": ["sdar_coef"], "opid": ["opid_episode_weight", "opid_step_weight"]}
WEBSHOP = sdar.folders.ROOT / "data" / "skills" / "webshop"


def of_method(method, **changes):
    return config(method=method, **(sdar.METHODS[method] | changes))


def trained(policy, cfg, episodes, skills, steps=1):
    """-> (all weights after some training steps on the same episodes, one vector; the last step's metrics)."""
    model = copy.deepcopy(policy.model)
    policy = dataclasses.replace(policy, model=model, ema=copy.deepcopy(model) if cfg.teacher == "ema" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr)  # unlike AdamW it does not scale small gradients up
    for step in range(steps):
        rows, metrics = sdar.make_rows(policy, cfg, episodes, skills)
        metrics |= sdar.train_step(policy, optimizer, rows, cfg, step)[0]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


@pytest.fixture(scope="module")
def games(policy):
    """{env: (four random episodes of two tasks, one of them declared won, skills by type)}."""
    made = {}
    for env in envs.ENVIRONMENTS:
        cfg = config(env=env)
        environments = [sdar.make_env(cfg) for _ in range(4)]
        episodes = sdar.rollout(policy, environments, sdar.step_tasks(cfg, environments[0], 0), cfg, seed=5)
        episodes[1].won = True
        made[env] = episodes, sdar.load_skills(cfg, environments[0].task_types)
    return made


def test_the_tables_of_these_tests_name_every_method():
    assert set(OWN_METRIC) == set(sdar.METHODS) == set(OWN_WEIGHTS) | {"grpo", "opsd", "skill_grpo"}


@pytest.mark.parametrize("env", envs.ENVIRONMENTS)
@pytest.mark.parametrize("method", sdar.METHODS)
def test_every_method_trains_in_every_environment_and_leaves_metrics_of_its_own(method, env, policy, games):
    weights, metrics = trained(policy, of_method(method, env=env), *games[env], steps=3)
    assert weights.isfinite().all() and metrics[OWN_METRIC[method]] != 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["skills/missing"] == (method == "skill_grpo")  # these episodes were played without them


@pytest.mark.parametrize("method", OWN_WEIGHTS)
def test_a_method_without_its_own_weight_is_grpo_bit_for_bit_and_with_it_something_else(method, policy, games):
    played = games["webshop"]
    plain, _ = trained(policy, of_method("grpo"), *played)
    without, _ = trained(policy, of_method(method, **dict.fromkeys(OWN_WEIGHTS[method], 0)), *played)
    with_it, _ = trained(policy, of_method(method, **dict.fromkeys(OWN_WEIGHTS[method], 1)), *played)
    assert torch.equal(without, plain) and not torch.equal(with_it, plain)


def test_distillation_without_rewards_does_not_depend_on_who_won(policy, games):
    episodes, skills = games["webshop"]
    lost = [dataclasses.replace(e, won=False) for e in episodes]
    cfg = of_method("opsd", sdar_coef=1.0)
    assert torch.equal(trained(policy, cfg, episodes, skills)[0], trained(policy, cfg, lost, skills)[0])
    assert not torch.equal(trained(policy, of_method("grpo"), episodes, skills)[0],
                           trained(policy, of_method("grpo"), lost, skills)[0])


@pytest.mark.parametrize("method, ours, official", [("opsd", ("opsd", 5.0), ("mle", 5.0)),
                                                    ("grpo_opsd", ("opsd", 5.0), ("mle", 0.0))])
def test_the_official_preset_runs_what_the_scripts_run_under_these_names(method, ours, official):
    for preset, wanted in ("none", ours), ("official", official):
        cfg = sdar.make_config({"method": method, "preset": preset})
        assert (cfg.surrogate, cfg.gate_beta) == wanted


@pytest.mark.parametrize("words, culprit", [
    ("--method grpo --distill failed", "--distill"), ("--method gigpo --advantage_stats turn", "--advantage_stats"),
    ("--gigpo_gamma 0.5", "--gigpo_gamma"), ("--rlsd_clip 0.5", "--rlsd_clip"), ("--ema 0.5", "--ema"),
    ("--method opid --retrieval full", "--retrieval"), ("--opid_step_weight 1", "--opid_step_weight"),
    ("--method skill_grpo --retrieval ucb", "ucb"), ("--method skill_sd --gate_beta 1", "--gate_beta"),
    ("--sdar_coef 0 --sdar_decay 9", "--sdar_decay"), ("--method grpo --analyser rules", "--analyser"),
    ("--method opid --teacher none", "--teacher"), ("--method rlsd --teacher none", "--teacher"),
    ("--method opid --analyser none", "--opid_step_weight"), ("--analyser rules", "--analyser"),
    ("--method opsd --sdar_coef 0", "weight 0"), ("--method opsd --invalid_penalty 1", "--invalid_penalty"),
    ("--method opsd --gigpo_weight 1", "--gigpo_weight"), ("--method opid --sdar_coef 1 --distill failed", "--distill"),
    ("--retrieval full --skills other", "--skills other"), ("--env search --reward score", "--reward"),
    ("--student_skills", "--student_skills"), ("--method grpo --student_skills", "--student_skills"),
    ("--method ppo", "skill_sd"), ("--retrieval best", "ucb"), ("--ema 2 --teacher ema", "--ema")])
def test_settings_of_methods_that_would_do_nothing_or_contradict_are_refused(words, culprit, capsys):
    refused(sdar.main, words.split(), culprit, capsys)


# ----------------------------------------------------------------------------------------------- where it acts, by whom

def test_gigpo_compares_turns_by_what_the_environment_showed_and_pays_at_the_last_turn(games):
    episodes, _ = games["webshop"]
    cfg = of_method("gigpo", gigpo_gamma=0.5, invalid_penalty=0.0)
    plain = of_method("grpo", invalid_penalty=0.0)
    steps = sdar.turn_advantages(cfg, episodes)[0] - sdar.turn_advantages(plain, episodes)[0]
    group, turns = [e.task.group for e in episodes for _ in e.turns], [t for e in episodes for t in e.turns]
    to_go = [10.0 * e.won * 0.5 ** (len(e.turns) - 1 - n) for e in episodes for n in range(len(e.turns))]
    for i, turn in enumerate(turns):
        alike = [g for g, other, where in zip(to_go, turns, group)
                 if (other.observation, where) == (turn.observation, group[i])]
        assert steps[i].item() == pytest.approx(to_go[i] - sum(alike) / len(alike), abs=1e-12)
    assert turns[0].observation and max(abs(steps)) > 0


@pytest.mark.parametrize("distill, taught", [("all", [1, 1, 1, 1]), ("failed", [1, 0, 1, 1]),
                                             ("zero_variance", [0, 0, 1, 1])])
def test_the_last_term_acts_on_the_episodes_that_are_asked_for(distill, taught, policy, games):
    episodes, skills = games["webshop"]
    rows, _ = sdar.make_rows(policy, config(distill=distill), episodes, skills)
    owner = [i for i, e in enumerate(episodes) for _ in e.turns]
    assert [row.source != "" for row in rows] == [bool(taught[i]) for i in owner]
    tokens = [len(row.response_ids) for row in rows]
    _, metrics = trained(policy, config(distill=distill), episodes, skills)
    share = sum(n for n, i in zip(tokens, owner) if taught[i]) / sum(tokens)
    assert metrics["sdar/distilled"] == pytest.approx(share)
    nobody = trained(policy, config(distill=distill, sdar_coef=1.0), [dataclasses.replace(e, won=True) for e in episodes
                                                                      ], skills)
    plain = trained(policy, of_method("grpo"), [dataclasses.replace(e, won=True) for e in episodes], skills)
    assert torch.equal(nobody[0], plain[0]) == (distill == "failed")


def test_coefficients_fall_linearly_to_0_and_stay_there():
    cfg = config(sdar_coef=0.8, sdar_decay=4, rlsd_mix=0.5, rlsd_decay=2)
    now = [sdar.scheduled(cfg, step) for step in range(6)]
    assert [one.sdar_coef for one in now] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    assert [one.rlsd_mix for one in now] == pytest.approx([0.5, 0.25, 0, 0, 0, 0])
    assert sdar.scheduled(config(sdar_coef=0.8), 10**6).sdar_coef == 0.8


def test_the_averaged_teacher_follows_slowly_and_a_resumed_run_goes_on_with_it(model_folder, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    more = {"method": "sdar", "teacher": "ema", "ema": 0.5, "retrieval": "ucb", "eval_every": 0, "eval_tasks": None,
            "sdar_coef": 1}
    assert sdar.main(flags(model_folder, straight, **more)) == 0
    assert sdar.main(flags(model_folder, run, **more | {"steps": 2})) == 0
    state = torch.load(run / "checkpoint-2" / "state.pt", weights_only=True)["more"]
    assert sum(times for files in state["skills"].values() for times, _ in files.values()) == 8  # episodes
    name = "model.embed_tokens.weight"
    weights = [sdar.models.read_model(str(run / f"checkpoint-{n}"))[0].state_dict()[name] for n in range(3)]
    expected = (weights[0] + weights[1]) / 4 + weights[2] / 2  # half of it each step
    assert torch.allclose(state["ema"][name], expected, atol=1e-6) and not torch.equal(weights[2], expected)
    assert sdar.main(["--resume", str(run), "--steps", "4"]) == 0
    assert_same_run(run, straight)


# --------------------------------------------------------------------------------------------------------------- skills

@pytest.mark.parametrize("task, kinds", [
    ("find me a vegan lotion under 30 dollars", ["beauty"]), ("a Bluetooth speaker", ["electronics"]),
    ("a coffee table lamp", ["garden", "grocery"]), ("flavorful sluggish things", []), ("", [])])
def test_keywords_are_whole_words_of_the_task_and_all_their_categories_are_shown(task, kinds):
    types = envs.make("webshop").task_types
    general, files = read_skills(WEBSHOP, types)
    text = library(WEBSHOP, types, "keyword").retrieve("fashion", task, "any")
    assert text == "\n".join([general, *(files[kind] for kind in kinds)])


def test_a_random_file_depends_on_the_episode_alone_and_all_of_them_come_up():
    skills = library(WEBSHOP, envs.make("webshop").task_types, "random")
    texts = [skills.retrieve("beauty", "", f"seed {n}") for n in range(60)]
    assert len(set(texts)) == len(skills) and texts[7] == skills.retrieve("garden", "?", "seed 7")


def test_ucb_tries_every_file_once_and_then_prefers_what_paid():
    skills = Skills({"a": ""}, "general", {"a": "A", "b": "B", "c": "C"}, how="ucb")
    shown = []
    for _ in range(200):
        shown.append(skills.retrieve("a", "", ""))
        skills.learn("a", 0.9 if shown[-1] == "general\nB" else 0.1)
    assert len(set(shown[:3])) == 3 and shown.count("general\nB") > 120 and len(set(shown[50:])) == 3
    times = {name: entry[0] for name, entry in skills.tried["a"].items()}
    bound = {n: skills.tried["a"][n][1] / k + math.sqrt(2 * math.log(200) / k) for n, k in times.items()}
    assert skills.most_promising("a") == max(bound, key=bound.get)


def test_a_step_that_fails_leaves_the_statistics_of_ucb_as_they_were(model_folder, tmp_path, monkeypatch):
    def fails(*_):
        raise UserError("It failed.")

    monkeypatch.setattr(sdar, "train_step", fails)
    assert sdar.main(flags(model_folder, tmp_path / "run", method="sdar", sdar_coef=1, retrieval="ucb", eval_every=0,
                           eval_tasks=None)) == 2
    saved = torch.load(tmp_path / "run" / "checkpoint-0" / "state.pt", weights_only=True)
    assert saved["more"]["skills"] == {}


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_spoil_what_the_skills_say(control):
    types = envs.make("webshop").task_types
    true, spoiled = (sdar.load_skills(config(skills=name), types) for name in (None, control))
    for kind in types:
        assert spoiled[kind] != true[kind]
    if control == "shuffled":
        assert all(sorted(spoiled[kind].split()) == sorted(true[kind].split()) for kind in types)
    elif control == "other":
        assert sorted(spoiled.values()) == sorted(true.values()) and spoiled.general == true.general
    else:
        assert not set(" ".join(true.values()).split("\n")) & set(" ".join(spoiled.values()).split("\n"))


def test_skills_that_are_cut_off_or_empty_are_counted(policy, games):
    episodes, skills = games["webshop"]
    missing = lambda cfg, skills: sdar.make_rows(policy, cfg, episodes, skills)[1]["skills/missing"]
    assert missing(config(), skills) == 0 and missing(config(retrieval="none"), dict.fromkeys(skills, "")) == 0
    assert missing(config(teacher_prompt="raw", max_prompt_tokens=50), skills) == 1
    assert missing(config(), dict.fromkeys(skills, "")) == missing(config(), dict.fromkeys(skills, "\n")) == 1
    assert contains("x  cafe\u0301\nau lait", "café au\tlait") and not contains("café au", "café au lait")


def test_a_task_may_bring_a_text_for_the_teacher_which_stands_where_skills_do(policy, tmp_path):
    rows = [{"question": "Who?", "golden_answers": ["me"], "teacher_prompt": "Say <who> \u00e9 it is."},
            {"question": "When?", "golden_answers": ["now"]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "corpus.jsonl").write_text('{"contents": "nobody"}\n')
    cfg = config(env="search", data=str(tmp_path), retrieval="none")
    environments = [sdar.make_env(cfg) for _ in range(4)]
    episodes = sdar.rollout(policy, environments, sdar.step_tasks(cfg, environments[0], 0), cfg)
    made, metrics = sdar.make_rows(policy, cfg, episodes, sdar.load_skills(cfg, ("unknown",)))
    shown = {policy.chat.tokenizer.decode(row.teacher_ids) for row in made if row.teacher_ids != row.prompt_ids}
    assert shown and all(rows[0]["teacher_prompt"] in prompt for prompt in shown) and metrics["skills/missing"] == 0
    assert sum(row.teacher_ids == row.prompt_ids for row in made) == sum(
        len(e.turns) for e in episodes if e.goal == "When?")
    with_skills = sdar.rollout(policy, environments, sdar.step_tasks(cfg, environments[0], 0), cfg,
                               skills=sdar.load_skills(cfg, ("unknown",)))
    assert {e.goal for e in with_skills} == {"Who?", "When?"} and not any(  # a student never reads it
        "Say <who>" in policy.chat.tokenizer.decode(turn.prompt_ids) for e in with_skills for turn in e.turns)
    rows[1]["teacher_prompt"] = 7
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: .*teacher_prompt"):
        envs.SearchQA(str(tmp_path / "bad.jsonl"), retriever=lambda *_: []).types_of("val")


# ----------------------------------------------------------------------------------------------------- hindsight (OPID)

def test_each_turn_is_scored_under_one_hindsight_skill_and_under_none_where_it_failed(policy, games, monkeypatch):
    episodes, skills = games["webshop"]
    episodes = [dataclasses.replace(e, teacher_prompt="Own.") for e in episodes]
    found = [Analysis("Whole.", {1: "Here."}), None, Analysis("Other.", {}), Analysis("Other.", {0: "First."})]
    monkeypatch.setattr(hindsight, "analyse", lambda *_: found)
    cfg = of_method("opid", opid_episode_weight=0.25, opid_step_weight=0.5)
    rows, metrics = sdar.make_rows(policy, cfg, episodes, skills)
    wanted = [("step" if n in one.step_skills else "episode") if one else ""
              for e, one in zip(episodes, found) for n in range(len(e.turns))]
    assert [row.source for row in rows] == wanted and metrics["opid/analysed"] == 0.75 and {"", "step"} < set(wanted)
    decoded = [policy.chat.tokenizer.decode(row.teacher_ids) for row in rows]
    assert [sum(text in prompt for text in ("Whole.", "Here.", "Other.", "First.")) for prompt in decoded] == [
        "Own." in prompt for prompt in decoded] == [source != "" for source in wanted]
    old, teacher = torch.zeros(sum(len(r.response_ids) for r in rows)), torch.ones(1)
    advantages, _ = sdar.token_advantages(cfg, rows, old, teacher.expand_as(old), 1)
    gain = {"episode": 0.25, "step": 0.5, "": 0.0}
    assert torch.allclose(advantages, sdar.repeat_tokens(rows, lambda r: r.advantage + gain[r.source], "cpu"))
    cfg = of_method("opid", opid_episode_weight=0.0, opid_step_weight=0.5)
    assert {row.source for row in sdar.make_rows(policy, cfg, episodes, skills)[0]} == {"", "step"}


def test_the_policy_is_asked_twice_at_most_and_shown_its_error(policy, games, monkeypatch):
    episodes, _ = games["search"]
    good = '{"episode_skill": "Search.", "step_skills": {"0": "Search now."}}'
    asked, answers = [], iter([good, "no", "no", good] + [good, "[]"])
    response = lambda text: sdar.Response(tuple(policy.chat.encode(text)), (), "length")

    def sample(_, prompts, cfg, temperature, noises):
        asked.append([policy.chat.tokenizer.decode(ids) for ids in prompts])
        assert cfg.max_response_tokens == hindsight.MAX_TOKENS and len(noises) == len(prompts)
        return [response(next(answers)) for _ in prompts]

    cfg = of_method("opid", env="search", analyser="policy", max_prompt_tokens=8000)
    found = hindsight.analyse(policy, cfg, episodes, [0.0, 10.0, 0.0, 0.0], sample)
    assert [one and one.episode_skill for one in found] == ["Search.", "Search.", None, "Search."]
    assert list(map(len, asked)) == [4, 2] and all(e.goal in text for e, text in zip(episodes, asked[0]))
    nothing = hindsight.analyse(policy, dataclasses.replace(cfg, max_prompt_tokens=5), episodes, [0.0] * 4, sample)
    assert nothing == [None] * 4


def test_opid_is_told_apart_by_its_analyser_in_every_output(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sdar.main(flags(model_folder, None, method="opid", steps=1, eval_every=0, eval_tasks=None)) == 0
    assert "opid by rules on webshop" in capsys.readouterr().out
    assert lines_of(tmp_path / "runs" / "webshop-opid-rules-0")[0]["opid/analysed"] > 0


@pytest.mark.parametrize("retrieval", STRATEGIES)
def test_lambda_0_is_grpo_bit_for_bit_though_siblings_are_shown_different_skills(retrieval, policy, games):
    episodes, _ = games["webshop"]
    plain, _ = trained(policy, of_method("grpo"), episodes, None)
    cfg = of_method("sdar", retrieval=retrieval, sdar_coef=0.0)
    skills = sdar.load_skills(cfg, envs.make("webshop").task_types)
    assert torch.equal(trained(policy, cfg, episodes, skills)[0], plain)


def test_what_an_evaluation_cannot_know_is_not_said(capsys):
    once, twice = (sdar.evaluation_tasks(config(eval_split=s), envs.make("webshop")) for s in ("val", "val,val"))
    assert once == twice  # no task counts twice
    won, lost = ({"task_id": 0, "won": won, "score": 0.0} for won in (True, False))
    assert difference([[won]], [[lost]])["success"]["tasks"] == math.inf  # one task has no variance
    for words, culprit in ("--condition without --skills other", "--skills"), ("--retrieval ucb", "ucb"):
        refused(sdar_eval.main, ["tiny", *words.split()], culprit, capsys)


def test_keywords_may_be_phrases_in_any_spelling_and_a_byte_order_mark_is_no_text(tmp_path):
    words = json.dumps({"a": ["Coffee  table", "t-shirt"], "b": ["CAFE\u0301", "STRASSE"]})
    for name, text in {"general.md": "G", "a.md": "A", "b.md": "B", "keywords.json": words}.items():
        (tmp_path / name).write_text("\ufeff" + text)
    skills = library(tmp_path, ("a", "b"), "keyword")
    shown = {"a coffee-table": "G\nA", "coffee, no tables": "G", "caf\u00e9": "G\nB", "Stra\u00dfe, t shirt": "G\nA\nB"}
    assert {task: skills.retrieve("a", task, "") for task in shown} == shown
    (tmp_path / "keywords.json").write_text('{"a": [], "b": ["++"]}')
    with pytest.raises(sdar.UserError, match=r"a word of 'b' is '\+\+'"):
        library(tmp_path, ("a", "b"), "keyword")


def test_opid_needs_rules_or_the_policy_in_an_environment_from_elsewhere(monkeypatch, policy, games):
    monkeypatch.setattr(sdar, "RULES", {})
    with pytest.raises(sdar.UserError, match="choose --analyser policy"):
        sdar.validate(of_method("opid"))
    answer, cfg = policy.chat.encode('{"episode_skill": "Search."}'), of_method("opid", env="own", analyser="policy")
    sample = lambda _, prompts, *__: [sdar.Response(answer, (), "end")] * len(prompts)
    assert hindsight.analyse(policy, cfg, games["search"][0], [0.0] * 4, sample) == [Analysis("Search.", {})] * 4


def test_a_text_for_the_teacher_that_is_none_or_longer_than_the_models_positions_is_told(policy, games, monkeypatch):
    info = {"task": "", "task_type": "", "admissible": None, "valid": True, "won": False, "score": 0.0}
    with pytest.raises(ValueError, match="teacher_prompt"):
        checked(("", info | {"teacher_prompt": 7}), 2)
    episodes, skills = games["webshop"]
    long = [dataclasses.replace(e, teacher_prompt="many words " * 2000) for e in episodes]
    with pytest.warns(RuntimeWarning, match="made for 4096 positions"):  # rotary ones, which have no end
        sdar.make_rows(policy, config(), long, skills)
    monkeypatch.setattr(policy.model.config, "rope_parameters", None)
    with pytest.raises(sdar.UserError, match="has 4096 positions"):
        sdar.make_rows(policy, config(), long, skills)


@pytest.mark.parametrize("reply", [
    b"sk-secret", b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n-5", b"HTTP/1.1 302 X\r\nLocation: http://[x",
    b"HTTP/1.1 401 X\r\n\r\n" + b" " * 1995 + b"sk-secret", b"HTTP/1.1 429 X\r\nRetry-After: 1 Jan 99999999999999 0:0",
    b"HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\n-5"])
def test_whatever_a_hostile_server_says_is_a_counted_failure_without_the_key(reply, monkeypatch):
    class Hostile(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16), self.request.sendall(reply + b"\r\n\r\n")

    monkeypatch.setattr(endpoint, "PAUSE", 0)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model = endpoint.Endpoint(f"http://127.0.0.1:{server.server_address[1]}", "m", "sk-secret", max_tokens=5)
        assert model.answer("hello", 0.0, 0) == endpoint.Answer("", "error")
        server.shutdown()
    assert model.failed_in_a_row == 1 and model.last_failure and "sk-s" not in model.last_failure
