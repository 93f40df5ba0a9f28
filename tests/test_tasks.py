"""Generated tasks, which every version must make alike, and the scripted players, which win or lose them."""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import sys
import time
import types
from operator import itemgetter
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import envs
import sdar
from conftest import config
from lib import experts, generated, retrieval, settings, tasks
from lib.official import ALFWORLD_SPLITS, ALFWORLD_TYPES, APPLIANCES, is_true

CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))
each = pytest.mark.parametrize("name", list(envs.ENVIRONMENTS))


def play(env, player, rng, **options):
    """(turns, last info) of an episode; player: "expert", "strays" (begins at random), "weak" or "random"."""
    strays = {"WebShop": 4, "ALFWorld": 20, "Search-QA": 1}[env.label] if player == "strays" else 0
    (observation, info), turns, ended = env.reset(options=options), 0, False
    while not ended:
        moves = info["admissible"] or ["<search> <words> </search>", "<answer> <words> </answer>"]
        if player == "random":
            action = rng.choice(moves).replace("<words>", rng.choice(f"{info['task']} {observation}".split()))
        elif turns < strays:
            action = experts.random_move(info["admissible"], rng) or moves[0].replace("<words>", info["task"])
        else:
            _, action = env.demonstrate(rng, weak=player == "weak")
        observation, _, terminated, truncated, info = env.step(action)
        turns, ended = turns + 1, terminated or truncated
    return turns, info


def tasks_of(name):
    if name == "webshop":
        shops = [envs.WebShop(), envs.WebShop(human_goals=True), envs.WebShop(seed=7, shuffle_seed=7)]
        return [*generated.webshop_catalogue()[:3], *[[shop.goals, shop.price] for shop in shops]]
    if name == "search":
        questions = {split: [question[:6] for question in some] for split, some in generated.search_questions().items()}
        return [questions, generated.fact_passages()]  # without teacher_prompt, which only official ones have
    games = [generated.generate_game(split, number) for split in ALFWORLD_SPLITS for number in range(130)]
    return [[game._replace(types={}), sorted(game.types.items())] for game in games]


def demonstrations_of(name):
    """Prompts, thoughts, actions and answers of seeded play by the expert and the weak demonstrator."""
    env, told = envs.make(name), []
    for number in range(60):
        rng, past, ended = random.Random(number), [], False
        observation, info = env.reset(options={"split": ("train", "val")[number % 2], "task_id": number})
        told.append(env.goal)
        while not ended and len(past) < 20:
            skills = "1. Be careful.\n" if number % 3 == 0 else ""
            told.append(envs.PROMPTS[name](info["task"], past[-2:], observation, info["admissible"], skills))
            thought, action = env.demonstrate(rng, number % 4 > 1)
            past.append((observation if number % 5 else "", action))
            observation, reward, terminated, truncated, info = env.step(action)
            told += [thought, action, observation, reward, info["score"]]
            ended = terminated or truncated
    return told


@each
def test_tasks_demonstrations_and_prompts_are_those_of_the_bundled_model(name):
    texts = [json.dumps(make(name), default=sorted) for make in (tasks_of, demonstrations_of)]
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] == CASES["digests"][name]


@each
def test_the_evaluation_set_is_drawn_by_task_type_and_the_same_for_every_seed(name):
    cfg = sdar.make_config({"env": name, "model": "tiny", "eval_tasks": 60})
    env = sdar.make_env(cfg)
    types, tasks = env.types_of(cfg.eval_split), sdar.evaluation_tasks(cfg, env)
    assert len(types) == env.num_tasks(cfg.eval_split) and len({*tasks}) == 60
    assert [kind for task in tasks if (kind := types[task.task_id]) != ask(env, task)["task_type"]] == []
    for kind, share in Counter(types).items():
        assert abs(sum(types[task.task_id] == kind for task in tasks) - 60 * share / len(types)) <= 1
    assert sdar.evaluation_tasks(dataclasses.replace(cfg, seed=9, group_size=3), env) == tasks
    whole = sdar.evaluation_tasks(dataclasses.replace(cfg, eval_tasks=0), env)
    assert [task.task_id for task in whole] == list(range(len(types)))
    with pytest.raises(sdar.UserError, match="0 plays all"):
        sdar.evaluation_tasks(dataclasses.replace(cfg, eval_tasks=len(types) + 1), env)


def ask(env, task):
    return env.reset(options={"split": task.split, "task_id": task.task_id})[1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_every_type_gets_its_share_of_the_draw_and_at_least_one_task_if_there_is_room(sizes, data):
    types = [str(kind) for kind, size in enumerate(sizes) for _ in range(size)]
    count = data.draw(st.integers(1, len(types)))
    drawn = Counter(types[number] for number in tasks.stratified(types, count))
    assert sum(drawn.values()) == count == len(set(tasks.stratified(types, count)))
    assert len(drawn) == len(sizes) or count < len(sizes)
    if all(count * size >= len(types) for size in sizes):  # nobody needs the help
        assert all(abs(drawn[str(kind)] - count * size / len(types)) < 1 for kind, size in enumerate(sizes))


def test_a_human_goal_a_split_and_an_official_split_are_settings():
    cfg = sdar.make_config({"human_goals": True, "eval_tasks": 0})
    assert len(sdar.evaluation_tasks(cfg, sdar.make_env(cfg))) == 57
    seen = sdar.make_config({"env": "alfworld", "eval_split": "valid_seen", "eval_tasks": 0})
    assert len(sdar.evaluation_tasks(seen, sdar.make_env(seen))) == 140
    assert sdar.make_config({"env": "alfworld"}).eval_split == "valid_unseen"
    with pytest.raises(sdar.UserError, match="human_goals would do nothing"):
        sdar.make_config({"env": "search", "human_goals": True})


ANSWER = ("page", {"task": "t", "task_type": "grocery", "admissible": None, "valid": True, "won": False, "score": 0.0})


class Odd(envs.WebShop):
    """A shop that answers a step with whatever `act` returns."""
    act = staticmethod(lambda: None)

    def step(self, action):
        return self.act()


def try_again():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


def raises(error):
    raise error


def info(**changes):
    return "page", 0.0, False, False, {key: value for key, value in (ANSWER[1] | changes).items() if value is not ...}


@pytest.mark.parametrize("act, why", [
    (lambda: time.sleep(60), "no answer within --env_timeout 0.3 seconds"),
    (lambda: [None for _ in iter(int, 1)], "no answer within --env_timeout 0.3 seconds"),
    (lambda: try_again(), "no answer within --env_timeout 0.3 seconds"),
    (lambda: info(admissible=[1]), "instead of texts"), (lambda: raises(GeneratorExit()), "GeneratorExit"),
    (lambda: info(retriever_errors="many"), "is 'many' instead of a whole number"),
    (lambda: sys.exit(3), "SystemExit: 3"), (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    (lambda: (os.chdir("/"), info())[1], "it changed the working directory to /, where nothing would be found"),
    (lambda: None, "it returned None instead of a tuple of 5 values"), (lambda: ANSWER, "instead of a tuple of 5"),
    (lambda: (b"page", *info()[1:]), "observation and info are bytes and dict"),
    (lambda: (*info()[:4], [1]), "observation and info are str and list"),
    (lambda: info(won=...), "its info has no 'won'"), (lambda: info(valid="yes"), "is 'yes', which is not of"),
    (lambda: info(task=None), r"info\['task'\] is None"), (lambda: info(admissible="look"), "'admissible'"),
    (lambda: info(score=math.nan), "the score is nan instead of a finite number"),
    (lambda: ("page", math.inf, *info()[2:]), "the reward is inf"), (lambda: ("page", "1", *info()[2:]), "the reward"),
    (lambda: ("page", 0.0, "no", *info()[3:]), "terminated and truncated are")])
def test_whatever_an_environment_does_wrong_is_one_sentence_that_names_the_task(policy, monkeypatch, act, why):
    monkeypatch.setattr(Odd, "act", staticmethod(act))
    folder, cfg = os.getcwd(), config(env_timeout=0.3)
    with pytest.raises(sdar.UserError, match=f"task 7 of split 'train' .action .* in turn 1.: .*{why}") as error:
        sdar.rollout(policy, [Odd()], [sdar.Task("train", 7, 0)], cfg)
    assert os.getcwd() == folder and "\n" not in str(error.value)


def test_an_answer_of_the_right_types_is_taken_as_it_is_numpys_included(policy, monkeypatch):
    info = ANSWER[1] | {"won": np.True_, "score": 1, "admissible": ("look",)}
    right = "half a pair \ud800", np.float32(0), np.False_, True, info
    monkeypatch.setattr(Odd, "act", staticmethod(lambda: right))
    episode, = sdar.rollout(policy, [Odd()], [sdar.Task("train", 7, 0)], config(env_timeout=0.0))
    assert (episode.won, episode.score, episode.done, len(episode.turns)) == (True, 1, False, 1)
    assert [type(value) for value in (episode.won, episode.score, episode.done)] == [bool, float, bool]
    with pytest.raises(ValueError, match="2 tasks need as many environments, not 1"):
        sdar.rollout(policy, [Odd()], [sdar.Task("train", 7, 0)] * 2, config())


def test_splits_and_task_types_that_are_not_there_are_a_sentence():
    with pytest.raises(sdar.UserError, match="split 'moon' cannot be listed: WebShop has no split 'moon'"):
        sdar.evaluation_tasks(config(eval_split="moon"), envs.make("webshop"))
    for odd in (None, [None, "a"]):
        with pytest.raises(sdar.UserError, match="cannot be listed"):
            tasks.types_of(types.SimpleNamespace(types_of=lambda split, odd=odd: odd), "val")
    counted = types.SimpleNamespace(num_tasks=lambda split: 3)
    listed = types.SimpleNamespace(types_of=lambda split: "aab")
    assert tasks.types_of(counted, "val") == [""] * 3 and tasks.count_tasks(listed, "val") == 3
    skills = sdar.load_skills(config(retrieval="none"), ("a", "b"))
    with pytest.raises(sdar.UserError, match="task type 'c', which is not among its task_types .a, b."):
        skills["c"]


def test_what_belongs_to_another_environment_or_method_is_not_carried_over():
    human = sdar.make_config({"human_goals": True, "teacher": "rollout", "sdar_coef": 0.1})
    base = settings.set_by_hand(human, sdar.make_config, sdar.RECIPE)
    assert sdar.make_config({}, base) == human
    grpo = sdar.make_config({"method": "grpo"}, base)
    assert (grpo.teacher, grpo.sdar_coef, grpo.retrieval, grpo.human_goals) == ("none", 0.0, "none", True)
    assert sdar.make_config({"preset": "official"}, base).teacher == "rollout"
    searching = sdar.make_config({"env": "search"}, base)
    assert not searching.human_goals and searching.teacher == "rollout"
    assert not sdar.in_environment(human, "alfworld").human_goals


def test_validation_asks_for_products_that_neither_training_nor_the_bundled_models_cloning_has_seen():
    catalogue, env = generated.webshop_catalogue(), envs.WebShop()
    cloned = [item for item in catalogue.items if item["asin"] not in catalogue.held_out]
    cloned.sort(key=itemgetter("asin"))
    told = [cloned, {item["asin"]: catalogue.attributes[item["asin"]] for item in cloned},
            {asin: request for asin, request in sorted(catalogue.human.items()) if asin not in catalogue.held_out}]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    assert digest.startswith("a3926f595c76fdb9")  # of the whole catalogue that the bundled model was cloned on
    val, train = ([env.goals[number] for number in env.splits[split]] for split in ("val", "train"))
    request = lambda goal: goal["instruction_text"].split(", and price")[0]
    for part in (itemgetter("asin"), request):
        assert not set(map(part, val)) & set(map(part, train))
    assert {goal["asin"] for goal in val} <= catalogue.held_out and len(val) > 2000 and len(train) > 6000
    assert set(envs.WebShop(human_goals=True).types_of("val")) == set(env.types_of("val")) == set(env.task_types)


@each
@pytest.mark.parametrize("player, least, most, stride", [
    ("expert", 1, 1, 19), ("strays", 1, 1, 19), ("weak", 0.02, 0.45, 7), ("random", 0, 0.04, 7),
    pytest.param("expert", 1, 1, 1, marks=pytest.mark.slow)])
def test_experts_win_every_task_weak_players_some_of_every_type_random_ones_few(name, player, least, most, stride):
    longest, wins = {"webshop": 15, "alfworld": 24, "search": 3}[name], defaultdict(list)
    for env in [envs.make(name)] + ([envs.WebShop(human_goals=True)] if name == "webshop" else []):
        for split in ALFWORLD_SPLITS if name == "alfworld" else ("train", "val"):
            for task_id in range(0, env.num_tasks(split), stride):
                turns, info = play(env, player, random.Random(task_id), split=split, task_id=task_id)
                assert player != "expert" or info["won"] and turns <= longest, (split, task_id)
                wins[info["task_type"]].append(info["won"])
    assert set(wins) == set(env.task_types)
    for kind, won in wins.items():
        assert least <= sum(won) / len(won) <= (max(0.7, most) if kind == "comparison" else most), kind
    assert experts.random_move(["help", "click[buy now]", "search[<words>]"], random.Random(0)) is None


@each
def test_thoughts_differ_where_actions_do_and_are_read_back(name, monkeypatch):
    env, different, rng = envs.make(name), set(), random.Random(0)
    for task_id in range(150):
        _, info = env.reset(options={"split": "train", "task_id": task_id})
        for _ in range(25):
            good, weak = env.demonstrate(rng), env.demonstrate(rng, weak=True)
            assert good[1] == env.expert() and (good == weak or good[0] != weak[0])
            for thought, action in (good, weak):
                assert envs.parse_action(name, experts.write_answer(name, thought, action)) == (action, True)
            if good != weak:
                different.add(" ".join(weak[0].split()[-1 if "elsewhere" in weak[0] else -2:]))
            *_, terminated, truncated, info = env.step(rng.choice([good, weak])[1])
            assert info["valid"]
            if terminated or truncated:
                break
    assert different >= set(CASES["weak thoughts"][name])        # every failure mode shows
    monkeypatch.setattr(experts, f"{name.upper()}_FAILURE_MODES", defaultdict(float))
    assert all(play(env, "weak", rng, task_id=task_id)[1]["won"] for task_id in range(30))


def test_only_both_attributes_and_a_price_below_the_bound_win_and_overpriced_duplicates_rank_first():
    env, duplicates = envs.WebShop(), 0
    for goal in env.goals[:300]:
        env.reset(options={"goal": goal})
        env.step(env.expert())
        for asin in env.results[:10]:
            if env.products[asin]["query"] == goal["query"]:
                has_both = set(goal["attributes"]) <= set(env.products[asin]["Attributes"])
                wins = env.reward_of(asin, goal["goal_options"])[0] == 1
                assert wins == (has_both and env.price[asin] <= goal["price_upper"])
        first, second = env.results[:2]
        if env.price[first] > goal["price_upper"]:
            assert second == goal["asin"] and 50 <= env.price[first] - env.price[second] <= 90
            duplicates += 1
    assert duplicates / 300 == pytest.approx(1 / 8, abs=0.05)


def test_splits_have_the_official_sizes_all_types_in_turn_unseen_rooms_and_no_task_twice_and_sentences_say_the_goal():
    env, rooms, tasks = envs.ALFWorld(), {}, Counter()
    assert [env.num_tasks(split) for split in (*ALFWORLD_SPLITS, "val")] == [3553, 140, 134, 134]
    assert env.reset(options={"split": "val"}, seed=5) == env.reset(options={"split": "valid_unseen"}, seed=5)
    for split, size in ALFWORLD_SPLITS.items():
        games = [generated.generate_game(split, number) for number in range(min(size, 600))]
        assert [game.task_type for game in games] == [ALFWORLD_TYPES[i % 6] for i in range(len(games))]
        tasks.update((game.task, game.static, game.initial) for game in games)
        rooms[split] = {tuple(sorted(set(game.names.values()) - {game.names[obj] for obj in game.objects}))
                        for game in games}
        for game, goal in zip(games, map(experts.read_goal, games)):
            assert not is_true(game.goal, game.initial) and 12 <= len(game.objects) <= 24
            assert goal.verb == next((verb for verb in APPLIANCES if verb in game.task_type), None)
            assert goal.two == (game.task_type == "pick_two_obj_and_place") == (" two " in game.task)
            assert bool(goal.lamps) == (game.task_type == "look_at_obj_in_light") == ("lamp" in game.task)
            named = {game.names[entity].split()[0] for entity in [*goal.objects, *goal.places, *goal.lamps]}
            assert named <= set(re.findall(r"\w+", game.task))
            if goal.two and len(goal.places) > 1:    # at two receptacles of a kind they are not two at one
                (obj, other, *_), (place, elsewhere, *_) = sorted(goal.objects), goal.places
                for end, wins in ((place, True), (elsewhere, False)):
                    assert is_true(game.goal, {("inreceptacle", obj, place), ("inreceptacle", other, end)}) == wins
    assert (max(tasks.values()), len(rooms["train"]), len(rooms["valid_unseen"]), env.skipped("val")) == (1, 20, 9, {})
    assert rooms["valid_seen"] <= rooms["train"] and not rooms["valid_unseen"] & rooms["train"]


def test_the_household_expert_decides_by_what_the_prompt_shows_and_refuses_goals_of_other_types():
    env, answers = envs.ALFWorld(), defaultdict(Counter)
    for number in range(576):
        rng, past = random.Random(number), []
        observation, info = env.reset(options={"split": "train", "task_id": number % 48})
        while not info["won"] and len(past) < 40:
            prompt = envs.alfworld_prompt(info["task"], past[-2:], observation, info["admissible"])
            answers[number % 48, prompt][env.expert()] += 1
            past.append(("", env.expert() if rng.random() < 0.9 else rng.choice(info["admissible"])))
            observation, *_, info = env.step(past[-1][1])
    unusual = sum(answer.total() - max(answer.values()) for answer in answers.values())
    assert unusual <= 0.001 * sum(map(Counter.total, answers.values()))
    env.game = env.game._replace(goal=("not", ("fact", ("opened", "x"))))
    with pytest.raises(ValueError, match="can't read the goal of the task '"):
        env.expert()


def test_questions_are_distinct_of_the_three_types_in_turn_give_nothing_away_and_share_no_entity_between_splits():
    countries, elements = generated.load_facts()
    entity_of = {element.name: element.name for element in elements}
    entity_of |= {name: country.name for country in countries for name in (country.name, country.capital)}
    entities, corpus = defaultdict(set), generated.bundled_corpus()
    for split, questions in generated.search_questions().items():
        assert len({question.text for question in questions}) == len(questions) > {"train": 3000, "val": 300}[split]
        assert [question.task_type for question in questions] == list(generated.SEARCH_TYPES) * (len(questions) // 3)
        for question in questions:
            assert question.task_type == "comparison" or not generated.mentions(question.text, question.golds)
            assert all(name in question.text for name in question.names)
            if question.task_type == "two_hop":
                found = " ".join(retrieval.corpus_search(corpus, question.text, 3))
                assert not generated.mentions(found, question.golds), question.text
            queries = [] if question.task_type == "comparison" else [query for query, _ in question.hops]
            entities[split] |= {entity_of[name] for name in [*question.names, *queries]}
    assert not entities["train"] & entities["val"] and min(map(len, entities.values())) > 50


@each
def test_there_are_short_skills_for_every_type_of_task_that_tell_no_answer(name):
    golds = {question.golds[0] for split in generated.search_questions().values() for question in split}
    telling = {f" {gold} " for gold in golds - {"I", "In", "At"} if not gold.isdecimal()}
    paths = list((Path(envs.__file__).parent / "data" / "skills" / name).glob("*.md"))
    assert {"general", *envs.make(name).task_types} <= {path.stem for path in paths}
    for text, most in ((path.read_text(), 150 if path.stem == "general" else 60) for path in paths):
        assert 0 < len(text.split()) < most and not any(gold in text for gold in telling)
