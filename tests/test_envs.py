"""The environments' rules, files, prompts, parsers and interface; tables are in cases.json, tasks in test_tasks.py."""
import base64
import contextlib
import doctest
import errno
import functools
import gzip
import http.server
import io
import itertools
import json
import math
import os
import random
import sqlite3
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import gymnasium
import hypothesis
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from lib import catalogue, experts, program, retrieval, server
from lib import official as data
from lib.generated import bundled_corpus

GOLDEN = Path(envs.__file__).parent / "data" / "golden"
CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))
GAMES = sorted(path.name.removesuffix(".json.gz") for path in (GOLDEN / "alfworld").glob("*.gz"))
MOVES = {"webshop": "search[lamp]", "alfworld": "look", "search": "<search> Lisbon </search>"}
each = pytest.mark.parametrize("name", list(MOVES))
quick = functools.partial(retrieval.Retriever, timeout=5, tries=3, pause=0.001)


def golden(name):
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


@pytest.fixture(scope="session", params=["in memory", "on disk"])
def official(request, tmp_path_factory):
    """A folder with the recorded catalogue; blanks after the products make it one that is kept on disk."""
    folder = tmp_path_factory.mktemp("catalogue")
    for path in (GOLDEN / "webshop" / "catalogue").glob("*.gz"):
        blanks = b" " * catalogue.LARGE if request.param == "on disk" and "shuffle" in path.name else b""
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()) + blanks)
    return folder


def game_file(folder, name=GAMES[0], **changes):
    """The path of a game.tw-pddl with a recorded game, in a folder named after it."""
    (path := folder / name / "game.tw-pddl").parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(golden(f"alfworld/{name}")["game"] | changes))
    return path


def ask(env, task_id=0, split="val"):
    return env.reset(options={"split": split, "task_id": task_id})


def refused(words, call, *args, kind=ValueError, **kwargs):
    """Checks that a call is refused in one sentence, which it returns."""
    with pytest.raises(kind, match=words) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@each
def test_gymnasium_accepts_every_environment_seeds_repeat_an_episode_and_its_last_turn_truncates_it(name):
    make = functools.partial(gymnasium.make, f"sdar/{envs.ENVIRONMENTS[name].__name__}-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make().unwrapped)
    group = gymnasium.vector.SyncVectorEnv([make] * 21)
    texts, infos = group.reset(seed=[0, *range(20)])
    ids, kinds = infos["task_id"].tolist(), set(infos["task_type"])
    assert texts[0] == texts[1] and ids[0] == ids[1] and len(set(ids)) > 10 and kinds <= set(envs.make(name).task_types)
    texts, _, _, _, infos = group.step([MOVES[name]] * 20 + ["no action"])
    assert texts[0] == texts[1] and infos["valid"].tolist() == [True] * 20 + [False]
    turns = {"webshop": 15, "alfworld": 50, "search": 4}[name]
    moves = (["search[<r>]", "click[next >]"] if name == "webshop" else []) + [MOVES[name]] * 50
    first, second = ([env.reset(seed=5), *map(env.step, moves[:turns])] for env in (envs.make(name), envs.make(name)))
    assert first == second and envs.MAX_TURNS[name] == turns
    assert [step[2:4] for step in first[1:]] == [(False, False)] * (turns - 1) + [(False, True)]


@each
def test_environments_run_in_processes_of_their_own_their_texts_are_flattened_and_rendered(name):
    entry, moves = f"sdar/{envs.ENVIRONMENTS[name].__name__}-v0", [MOVES[name], "é 本 \U0001f600"]
    found = []
    for mode in ("sync", "async"):
        group = gymnasium.make_vec(entry, num_envs=2, vectorization_mode=mode)
        found.append([group.reset(seed=[3, 4])[0], *(group.step(moves)[:4] for _ in range(2))])
        group.close()
    for sync, parallel in zip(*found, strict=True):
        assert all(map(np.array_equal, sync, parallel))
    env = gymnasium.make(entry, render_mode="ansi")
    for move in (lambda: env.reset(seed=3), lambda: env.step(MOVES[name])):
        text = move()[0]
        assert env.render() == text == env.unwrapped.render() != ""
    space, flat = env.action_space, gymnasium.spaces.flatten_space(env.action_space)
    for sample in ("", text, moves[1], "\0\ud83d\n", "x" * space.max_length, space.sample(), space.sample()):
        codes = gymnasium.spaces.flatten(space, sample)
        assert codes in flat and gymnasium.spaces.unflatten(space, codes) == sample and sample in space
    assert gymnasium.spaces.unflatten(space, gymnasium.spaces.flatten(space, text + "x" * 99999))[:len(text)] == text
    refused("render_mode must be None or 'ansi'", envs.make, name, render_mode="human")
    refused("call reset before render", envs.make(name).render, kind=gymnasium.error.ResetNeeded)
    refused("neither a mask", space.sample, mask=(3, None))


@pytest.mark.parametrize("name", ["webshop", "alfworld"])
def test_a_step_after_the_end_pays_nothing(name):
    env, paid = envs.make(name), []
    for start in ([], ["search[lamp]"] * 14 if name == "webshop" else ["look"] * 49):    # won, and won after the limit
        _, info = ask(env)
        for action in start:
            env.step(action)
        rewards = []
        for number in range(80):
            again = name == "webshop" and env.page == "done"
            rewards.append(env.step("search[lamp]" if again else "look" if number > 40 else env.expert())[1])
        paid.append(sum(rewards))
    assert paid == [1.0, 0.0]


@each
def test_wrong_calls_are_refused_in_one_sentence(name):
    env = envs.make(name)
    refused("call reset before step", env.step, MOVES[name], kind=gymnasium.error.ResetNeeded)
    refused("give a number from 0 to", ask, env, env.num_tasks("val"))
    refused("an action as a string such as .*, not as int", env.step, 3, kind=TypeError)
    refused("no split 'all'", env.num_tasks, "all")
    for options, words in CASES["options"]:
        refused(words, env.reset, options=options)
    for function, arguments, words in CASES["arguments"]:
        refused(words, vars(server).get(function) or getattr(envs, function), **arguments,
                kind=(ValueError, FileNotFoundError, SystemExit))


def test_answers_are_split_and_compared_prompts_show_what_is_given_and_examples_in_docstrings_are_true():
    for function, arguments, expected in CASES["calls"]:
        mode, _, name = function.rpartition(" ")
        result = getattr(envs, name)(*arguments, **({"official": True} if mode else {}))
        assert json.loads(json.dumps(result)) == expected, (function, arguments)
    for name, texts in CASES["invalid answers"].items():
        assert {text: envs.parse_action(name, text) for text in texts} == dict.fromkeys(texts, ("", False))
    for module in (envs, program):
        assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


@each
def test_an_invalid_action_changes_nothing_that_is_seen(name):
    env, rng = envs.make(name), random.Random(0)
    oddities = ["", " ", "no action", "search[]", "click[]", "click[search]", "click[no such thing]", "go to moon 1",
                "take lamp 1", "<search>", "<answer>", "think[x]", "click buy now", "search", "[", "]"]
    for task_id in range(6):
        *_, info = ask(env, task_id, "train")
        for _ in range(4):
            for action in oddities:
                seen = env.clickables[:] if name == "webshop" else info["admissible"]
                *_, ended, _, after = env.step(action)
                assert not after["valid"] and not ended and not after["won"], action
                assert after["admissible"] == info["admissible"]
                assert seen == (env.clickables if name == "webshop" else after["admissible"])
                env.steps = env.turns = 0  # room for more
            *_, info = env.step(env.demonstrate(rng)[1] if name != "search" else "<search> Lisbon </search>")
            env.steps = env.turns = 0
            if info["won"]:
                break


def test_docs_name_the_options_that_the_originals_colour_rule_makes_unwinnable():
    (sentence,) = re.findall(r"goal that asks for (.*?) \(", (Path(envs.__file__).parent / "docs" / "environments.md")
                             .read_text().replace("\n", " "))
    named = re.findall(r'"(\w+)"', sentence)
    won = {value: [envs.count_options({"size": value}, wanted) for wanted in ({"size": value}, [value])]
           for value in [*named, "red", "light blue", "triple"]}
    assert len(named) == 5 and won == dict.fromkeys(named, [0, 1]) | {"red": [1, 1], "light blue": [1, 1],
                                                                       "triple": [1, 1]}


def test_texts_that_look_alike_are_equal_and_brackets_in_texts_are_no_buttons(official):
    env = envs.WebShop(official)
    ask(env)
    product = next(product for product in env.products.values() if product["options"])
    name = next(iter(product["options"]))
    page = envs.webshop_page("Instruction: [SEP] x [SEP] Back to Search [SEP] [2 Pack] Night light [SEP] caf\u00e9",
                             ["click[back to search]", "click[caf\u00e9]"])
    assert page == "[back to search]\n(2 Pack) Night light [caf\u00e9]"
    for own, typed in [("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "cafe\u0301"), ("\u1100\u1161", "\uac00")]:
        env.page, env.asin, env.options, env.clickables = "item", product["asin"], {}, [own]
        env.products = {product["asin"]: product | {"options": {name: [own]}}}
        assert env.step(f"click[{typed}]")[-1]["valid"] and env.options == {name: own}
        assert envs.count_options({name: own}, [typed]) == envs.count_options({name: typed}, {name: own}) == 1
        assert envs.count_attributes(product | {"Attributes": [], "Title": own}, [typed]) == 1


@pytest.mark.parametrize("kind", ["synthetic", "human"])
def test_products_prices_goals_draws_and_splits_are_those_of_the_original(official, kind, monkeypatch):
    loaded, recorded = golden("webshop/loader"), golden("webshop/goals")[kind]
    make = functools.partial(envs.WebShop, official, human_goals=kind == "human")
    env = make(seed=loaded["price_seed"])
    assert list(env.products) == loaded["asins"] and env.price == loaded["product_prices"]
    for case in loaded["cases"]:
        expected = case["product"]
        if kind == "human":
            told = {"instructions": case["human_instructions"]} if case["human_instructions"] else {}
            expected = {key: value for key, value in expected.items() if not key.startswith("instruction_")} | told
        assert env.products[expected["asin"]] == expected
    for attribute, asins in loaded["attribute_to_asins"].items():
        assert sorted(asin for asin, product in env.products.items() if attribute in product["Attributes"]) == asins
    for case in golden("webshop/documents"):
        assert retrieval.product_document(env.products[case["id"]]) == case["contents"]
    for case in recorded["cases"]:
        assert {**env.goals[recorded["order"].index(case["case"])], "case": case["case"]} == case
    assert sum(goal["weight"] for goal in env.goals) == pytest.approx(recorded["total_weight"], rel=1e-12)
    for seed, index in recorded["weighted_draws"]:
        assert env.reset(seed=seed, options={"split": "all"})[1]["task_id"] == index
    size, half = recorded["count"], recorded["count"] // 2
    assert len(env.goals) == size and env.splits == {"val": range(half), "train": range(half, size)}
    assert ask(env, 1, "train")[1]["task"] == env.goals[half + 1]["instruction_text"]
    for variant in golden("webshop/training_variant")["goal_orders"]:      # one seed for prices and order
        if variant["human_goals"] == (kind == "human"):
            env = make(seed=variant["env_seed"], shuffle_seed=variant["env_seed"])
            bounds = [variant["price_upper"][position] for position in variant["order"]]
            assert env.price == variant["product_prices"] and [goal["price_upper"] for goal in env.goals] == bounds
    monkeypatch.setattr(envs, "load_goals", lambda *arguments: ({}, range(1000)))
    assert make().splits == {"val": range(500), "train": range(500, 1000)}


def test_rewards_fuzzy_matches_colours_actions_projection_and_white_space_are_those_of_the_original(official):
    def told(value):                     # JSON has no tuples; the recordings write them as lists
        return tuple(value) if isinstance(value, list) else value

    products = envs.WebShop(official).products
    for case in golden("webshop/rewards"):
        bought = case["product"] or products[case["purchased_asin"]]
        names = {bought["name"]: case["nouns_purchased"], case["goal"]["name"]: case["nouns_goal"]}
        reward, parts = envs.webshop_reward(bought, case["goal"], case["options"], case["price"], nouns=names.get)
        assert {"reward": reward, **parts} == case["expected"], case["note"]
    refused("names no attribute", envs.webshop_reward, bought, case["goal"] | {"attributes": []}, {}, 1.0)
    for case in golden("webshop/token_set_ratio"):
        assert envs.token_set_ratio(told(case["a"]), told(case["b"])) == case["score"], case
    for case in golden("webshop/colors"):
        assert envs.normalize_color(told(case["input"])) == told(case["output"])
    for case in golden("webshop/parse_action"):
        assert envs.split_action(case["action"]) == (case["name"], case["argument"])
    for case in golden("webshop/training_variant")["projection"]:
        assert envs.parse_webshop(case["text"], official=True) == (case["action"], bool(case["valid"])), case
    parts = [("text", text) for text in ("a", "", "  ", " \n ", " b ")]
    assert (envs.plain_text(parts), envs.rich_text(parts, "", ())) == ("a [SEP]  [SEP] b", "a\n \n b \n")


@pytest.mark.parametrize("file, cases, seed", [("transcripts", "cases", 233), ("training_variant", "transcripts", 42)])
def test_every_recorded_shopping_episode_replays_exactly(official, file, cases, seed):
    recorded, nouns, ranking = golden(f"webshop/{file}"), golden("webshop/title_nouns").__getitem__, {}
    for case in recorded[cases]:         # ranking: of the step at hand, since recorded rankings are inputs
        modes = {name: case[name] for name in ("human_goals", "observation_mode", "show_attrs")}
        env = envs.WebShop(official, seed=42, shuffle_seed=seed, nouns=nouns, search=ranking.get, **modes)
        assert env.goals[case["goal_index"]] == case["goal"]
        obs, _ = env.reset(options={"goal": case["goal_index"]})
        assert (obs, env.clickables) == (case["reset"]["obs"], case["reset"]["available_actions"]["clickables"])
        for step in case["steps"]:
            if shown := step.get("search"):
                ranking[shown["query"]] = shown.get("ranking", recorded["rankings"].get(shown["query"]))
            obs, reward, terminated, _, info = env.step(step["action"])
            assert (obs, reward, terminated) == (step["obs"], step["reward"], step["done"]), step["action"]
            assert info["score"] == reward and info["won"] == (reward == 1.0)
            assert not terminated or info["admissible"] == ["search[<words>]"]
            if state := step["state"]:   # the training variant shows another episode after the last step
                assert (env.page, env.query, env.page_number, env.asin, env.options) == tuple(
                    state[key] for key in ("page_kind", "keywords", "page", "asin", "options"))
                actions = step["available_actions"]
                assert (env.clickables, env.page == "start") == (actions["clickables"], actions["has_search_bar"])
            assert not shown or env.results == ranking[shown["query"]]
            assert step.get("reward_info", {}).items() <= (env.reward_parts or {}).items()


def test_search_is_bm25_in_document_order_finds_titles_and_knows_the_special_words_of_the_original(official):
    postings = retrieval.build_postings("abcd", ["red lamp lamp", "red chair", "blue chair", "red chair"])
    assert [retrieval.bm25(postings, "red lamps", k) for k in (50, 2)] == [("a", "b", "d"), ("a", "b")]
    red, lamp = math.log(1 + 1.5 / 3.5), math.log(1 + 3.5 / 1.5)     # idf
    long, short = 0.9 * (0.6 + 0.4 * 3 / 2.25), 0.9 * (0.6 + 0.4 * 2 / 2.25)   # penalties of 3 and 2 words, mean 2.25
    expected = [red / (1 + long) + lamp * 2 / (2 + long), red / (1 + short), 0.0, red / (1 + short)]
    assert retrieval.bm25_scores(postings, "the red LAMP").tolist() == pytest.approx(expected, rel=1e-6)
    env = envs.WebShop(official)
    titles = [product["Title"] for product in env.products.values()]
    found = [asin in env.search(title)[:10] for asin, title in zip(env.products, titles) if titles.count(title) == 1]
    assert sum(found) >= 0.95 * len(found) > 200 and max(len(env.search(title)) for title in titles) <= 50

    def results(action):
        return env.step(action) and env.results
    env.reset(seed=1)
    for words, field, value in [("<c> garden and", "category", "garden"), ("<q> table lamps", "query", "table lamps")]:
        expected = [asin for asin, product in env.products.items() if product[field] == value]
        assert results(f"search[{words}]") == expected != []
    first = results("search[<r>]")
    assert len(set(first)) == 50 and first != list(env.products)[:50] and results("click[next >]") != first
    assert results("search[<a> easy clean]") == results("search[<c>]") == []
    for words, page in [("lamp", 1), ("search_results lamp", 0)]:    # page names in the address count
        env.step(f"click[{results(f'search[{words}]')[0]}]")
        assert env.page == "item" and env.step("click[< prev]") and (env.page, env.page_number) == ("results", page)


@pytest.mark.parametrize("text, terms", CASES["terms"])
def test_terms_and_answers_are_equal_in_every_unicode_form_and_neither_marks_nor_han_runs_make_words(text, terms):
    terms = [unicodedata.normalize("NFC", term) for term in terms]
    forms = {unicodedata.normalize(form, text) for form in ("NFC", "NFD")}
    for form in forms:
        assert retrieval.search_terms(form) == terms
        assert all(envs.exact_match(form, other) for other in forms)
    postings = retrieval.build_postings("ab", [text, "other words"])
    assert all(retrieval.bm25(postings, unicodedata.normalize("NFD", term)) == ("a",) for term in terms)


@hypothesis.given(hypothesis.strategies.text(hypothesis.strategies.characters(max_codepoint=127)))
def test_terms_of_ascii_texts_are_runs_of_letters_and_digits(text):
    pattern, plain = retrieval.word_pattern(), re.findall(r"[^\W_]+", text)
    assert pattern.findall(text) == plain and len(retrieval.search_terms(text)) <= len(plain)


@pytest.mark.parametrize("size, hits", [(9, 9), (900, 900), (30000, 29999), (30001, 300), (30000, 20), (30000, 0)])
def test_what_is_sorted_of_many_documents_holds_the_best_in_document_order(size, hits):
    rng = np.random.default_rng(0)
    for values in (3, 100, 10**6):
        scores = np.zeros(size, dtype=np.float32)
        scores[rng.permutation(size)[:hits]] = rng.integers(1, values, hits)
        expected = [number for number in np.argsort(-scores, kind="stable").tolist() if scores[number]]
        for k in (1, 50, 40000):
            found = retrieval.candidates(scores, k)
            assert found[np.argsort(-scores[found], kind="stable")][:k].tolist() == expected[:k]


def test_everything_admissible_is_valid_and_nothing_else_changes_what_is_shown_or_shared(official):
    env, rng = envs.WebShop(official), random.Random(0)
    everything = lambda: json.dumps([dict(env.products), env.goals[:], dict(env.price)])
    before = everything()
    for seed in range(30):
        start, info = env.reset(seed=seed)
        assert info["admissible"] == ["search[<words>]"] and info["valid"]
        for action in ("click[search]", "click[buy now]", "look", "", "Search[x]", "click", "search[]", "click[]"):
            *shown, info = env.step(action)
            assert shown == [start, 0.0, False, False] and not info["valid"] and not info["won"]
        for _ in range(14):
            *_, info = env.step(experts.random_move(info["admissible"], rng) or f"search[{env.goal['query']}]")
            assert info["valid"]
    assert everything() == before and env.goals is envs.WebShop(official).goals


def test_a_tagger_decides_on_nouns_and_without_one_the_rule_drops_adjectives_and_numbers(monkeypatch):
    tokens = [Mock(text=kind, pos_=kind) for kind in ("NOUN", "ADJ", "PROPN")]
    for tagger, nouns in [(None, ["women", "shirt", "men", "pack", "shirt"]), (lambda text: tokens, ["noun", "propn"])]:
        monkeypatch.setattr(envs, "noun_tagger", lambda tagger=tagger: tagger)
        assert envs.title_nouns.__wrapped__("Soft Women's Shirt for Men, 2 Pack of Shirt") == nouns


@pytest.mark.parametrize("name, kind, wording", [*itertools.product(GAMES, ["plan", "walk"], ["move", "put"])])
def test_every_step_is_the_official_engines_in_either_wording_of_putting(tmp_path, name, kind, wording):
    def worded(text):
        return text if wording == "move" else re.sub("(?m)^(You |  )?move (.+?) to ", r"\1put \2 in/on ", text)

    record, env, game = golden(f"alfworld/{name}")[kind], envs.ALFWorld(put_wording=wording), game_file(tmp_path, name)
    (text, info), reward, done = env.reset(options={"game": game}), 0.0, False
    for number, step in enumerate(record["steps"]):
        if number:
            text, reward, done, _, info = env.step(worded(step["command"]))
        assert (text, reward, done) == (worded(step["feedback"]), step["reward"], step["done"]), number
        assert info["admissible"] == sorted(map(worded, step["admissible"])) and info["won"] == step["won"]
        assert info["score"] == reward and info["valid"] == (text != "Nothing happens.")
    assert info["task_type"] == record["task_type"]
    _, info = env.reset(options={"game": game})
    while not info["won"]:               # the expert wins official games, too; at the limit it would be truncated
        *_, truncated, info = env.step(env.expert())
        assert not truncated
    verb, *ids = env.last
    assert env.step(" look\n")[1:3] == (0.0, True) and env.step("Look")[0] == "Nothing happens."     # case counts
    if verb == "put":                    # a goal that is undone is no longer won
        obj, place = (env.game.names[entity] for entity in ids)
        assert env.step(f"take {obj} from {place}")[1:3] == (0.0, False)


@pytest.mark.parametrize("text, opened, expected", CASES["goals"])
def test_comments_and_every_quantifier_of_a_goal_are_read(text, opened, expected):
    formula, = data.parse_lists(f"{text} ; comment (", "x")
    goal = data.ground(formula, {}, {"receptacle": ["r1", "r2"]}, frozenset({("openable", "r1")}), "x")
    assert data.is_true(goal, {("opened", receptacle) for receptacle in opened}) == expected
    assert data.parse_typed(["a", "b", "-", "c", "d"]) == [("a", "c"), ("b", "c"), ("d", "object")]


def test_a_changed_file_is_read_again_and_texts_tell_where_one_is_and_what_was_done_to_objects(tmp_path):
    game = data.load_game(path := game_file(tmp_path))
    assert data.load_game(path) is game
    obj = next(entity for entity in game.objects if ("toggleable", entity) not in game.static)
    for done, text in CASES["qualities"]:
        assert envs.object_text(game, {(fact, obj) for fact in done.split()}, obj) == text.replace("X", game.names[obj])
    lamp = next(entity for entity in game.objects if ("toggleable", entity) in game.static)
    for facts, text in ((set(), f"There's nothing special about {game.names[lamp]}."),
                        ({("istoggled", lamp)}, f"This {game.names[lamp]} is on.")):
        assert envs.object_text(game, facts, lamp) == text
    inside = game._replace(static={("isreceptacleobject", obj), ("inreceptacleobject", game.objects[0], obj)})
    assert envs.object_text(inside, set(), obj).endswith(f"In it, you see a {game.names[game.objects[0]]}.")
    place = re.search(r"\(receptacleAtLocation \S+ (\S+)\)", GAME["pddl_problem"])[1]
    game_file(tmp_path, pddl_problem=GAME["pddl_problem"].replace("agent1 loc_bar_start)", f"agent1 {place})"))
    assert "\n\nYou are facing the " in envs.ALFWorld().reset(options={"game": path})[0]


def test_look_lists_what_was_taken_out_of_a_receptacle_here_and_lies_in_another_as_the_original_does(tmp_path):
    game, problem = data.load_game(game_file(tmp_path)), GAME["pddl_problem"]
    place = {game.names[receptacle]: location for receptacle, location in game.places}
    for name in ("shelf 1", "desk 1"):   # now at the dresser's place
        problem = re.sub(f"{place[name]}\\)", f"{place['dresser 1']})", problem)
    env = envs.ALFWorld()
    env.reset(options={"game": game_file(tmp_path, pddl_problem=problem)})
    env.step("go to dresser 1")
    for commands, beside in CASES["beside"]:
        for command in commands:
            assert env.step(command)[-1]["valid"], command
        seen = "You are facing the desk 1, dresser 1, and shelf 1. Next to it, you see "
        assert env.step("look")[0] == f"{seen}{beside}.", commands


def test_the_official_layout_is_read_and_what_its_loader_skips_is_counted(tmp_path):
    def add(split, name, task_type="look_at_obj_in_light", **changes):
        path = game_file(tmp_path / "json_2.1.1" / split / name, **changes)
        path.with_name("traj_data.json").write_text(json.dumps({"task_type": task_type}))
        return path

    for name in ("b", "a", "pick_and_place_with_movable_recep-A", "pick-AppleSliced-B"):
        add("train", name)
    add("train", "c", task_type="other")
    add("train", "d").with_name("traj_data.json").unlink()
    add("train", "e").unlink()
    for split in ("train", "valid_seen"):
        add(split, "f", solvable=False)
    for folder in (tmp_path, tmp_path / "json_2.1.1"):
        env = envs.ALFWorld(folder)
        assert env.skipped("train") == CASES["skipped"]
        assert env.num_tasks("train") == 2 and ask(env, 1, "train")[1]["task_type"] == "look_at_obj_in_light"
    refused("holds no playable game .*1 not solvable", env.num_tasks, "valid_seen")
    refused("There is no folder", env.num_tasks, "valid_unseen", kind=FileNotFoundError)


def test_a_search_shows_at_most_topk_documents_in_the_official_format_best_first():
    observation, info = ask(qa := envs.SearchQA())
    assert observation == info["task"] and info["valid"] and info["admissible"] is None and not info["won"]
    observation, *flags, info = qa.step("<think>a</think> <search> Lisbon </search>")
    assert observation == envs.information('Doc 1: "Lisbon"\nThe capital of Portugal is Lisbon.\n')
    assert flags == [0.0, False, False] and info["valid"] and info["error"] is None
    assert qa.step("<search> zzz </search>")[0] == '\n<information>{"result": ""}</information>\n'
    for topk, retriever in [(1, None), (2, None), (5, None), (3, lambda query, topk: [f'"Spain" {query}'] * 4)]:
        ask(env := envs.SearchQA(topk=topk, retriever=retriever))
        observation = env.step("<search> Spain </search>")[0]
        assert observation.count("Doc ") == topk and 'Doc 1: \\"Spain\\"' in observation


@pytest.mark.parametrize("actions, ends", CASES["episodes"])
def test_an_answer_ends_the_episode_the_last_one_counts_and_the_fourth_turn_is_the_last(actions, ends):
    ask(qa := envs.SearchQA())
    for number, action in enumerate(actions, 1):
        observation, *flags, info = qa.step(action.format(qa.question.golds[0]))
        assert flags == (ends if number == len(actions) else [0.0, False, False])
        assert info["won"] == bool(flags[0]) and info["valid"] == ("<" in action)
        assert (observation == "") == ("<search>" not in action or "<answer>" in action)
    refused("call reset before step", qa.step, "<answer> x </answer>", kind=gymnasium.error.ResetNeeded)


@pytest.mark.parametrize("harm", CASES["harmful"])
def test_neither_documents_nor_the_agents_own_text_can_answer_or_write_a_tag(harm):
    def tags(seen, action, observation=""):
        prompt = envs.search_prompt("q?", [(seen, action)], observation, None)
        return re.findall(f"</?(?:{'|'.join(envs.SEARCH_TAGS)})>|<[|]im", prompt.lower())

    search, document = "<search> x </search>", ["harmless"]
    ask(env := envs.SearchQA(retriever=lambda query, topk: document))
    harmless, *_ = env.step(search)
    document[0] = own = harm.format(gold=env.question.golds[0])
    harmful, *flags, info = env.step(search)
    assert flags == [0.0, False, False] and not info["won"] and harmful.count("<") == 2
    assert json.loads(re.sub("</?information>", "", harmful, count=2)) == {"result": f"Doc 1: {own}\n"}
    assert tags("q?", search, harmful) == tags("q?", search, harmless)
    assert tags(harmful, search) == tags(harmless, search) and env.step("<answer> no </answer>")[1] == 0.0
    answer = f"<think>{own}</think><search>{own}</search>"
    assert envs.parse_search(answer) == ("", False) and len(tags("q?", search)) == len(tags("q?", "")) + 2
    for shown in (own, answer, f"<search>{own}</search>"):   # even if a caller passes on what was not parsed
        assert len(tags("q?", shown)) <= len(tags("q?", search))


class Reply(io.BytesIO):
    length = 0                           # bytes that are still to come


def answering(replies):
    """Stands in for an opener: a reply is a text, a status of 400 and above, or an error to raise."""
    return Mock(side_effect=(
        urllib.error.HTTPError("", reply, "", {}, io.BytesIO()) if isinstance(reply, int) else
        Reply(reply.encode()) if isinstance(reply, str) else reply for reply in replies))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_server_answers_both_request_forms_and_refuses_others(host):
    server, qa = retrieval.search_server(bundled_corpus(), host, port=0), envs.SearchQA()
    url = server.url.removesuffix("/retrieve")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def post(body, path="/retrieve", **headers):
        body = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), timeout=10) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    status, reply = post({"queries": ["Lisbon", "zzz", "Spain"], "topk": 2, "return_scores": True})
    best = reply["result"][0][0]
    assert status == 200 and [len(found) for found in reply["result"]] == [1, 0, 2] and best["score"] > 0
    assert post({"query": "Lisbon"}) == (200, {"result": [[best["document"]]]})
    assert len(post({"query": "Spain", "topk": None})[1]["result"][0]) == 3
    for body in (b"", b"{", b"[" * 100000, *CASES["requests"]):
        status, reply = post(body)
        assert status == 400 and reply["error"].endswith(".") and "\n" not in reply["error"]
    assert post({"query": "a"}, "/other")[0] == 404 and post(None)[0] == 405
    assert post(b"", **{"Content-Length": str(retrieval.REQUEST_LIMIT + 1)})[0] == 413
    for address in (url, url + "/", url + "/retrieve"):      # an episode over HTTP is the one without
        remote = envs.SearchQA(retriever=address)
        assert ask(remote, 4) == ask(qa, 4) and remote.step(MOVES["search"]) == qa.step(MOVES["search"])
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("refusal", [422, '{"result": "no"}'])
def test_the_request_form_that_works_is_found_and_remembered(monkeypatch, refusal):
    found, bare = ({"result": [[{"document": {"contents": "a"}, "score": 1.5}]]}, {"result": [[{"contents": "b"}]]})
    replies = [refusal, json.dumps(found), 500, 503, json.dumps(bare)]
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", urlopen := answering(replies))
    retriever = quick("http://127.0.0.1:1")
    assert retriever("x", 2) == ["a"] and retriever("y", 2) == ["b"]         # the third try, without scores
    forms = [{"queries": ["x"]}, {"query": "x"}] + [{"query": "y"}] * 3
    asked = [json.loads(call.args[0].data) for call in urlopen.call_args_list]
    assert asked == [form | {"topk": 2, "return_scores": True} for form in forms]


@pytest.mark.parametrize("reply, words, requests", [
    *CASES["replies"], ("[" * 100000, "ValueError", 4), (TimeoutError("too slow"), "3 tries, .*too slow", 6),
    *((lambda query, topk, bad=bad: bad, "list of texts", 0) for bad in (None, "text", [1]))])
def test_a_search_that_fails_costs_a_turn_but_not_the_episode(monkeypatch, reply, words, requests):
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", urlopen := answering(itertools.repeat(reply)))
    ask(env := envs.SearchQA(retriever=reply if callable(reply) else quick("http://127.0.0.1:1")))
    for count in (1, 2):
        with pytest.warns(RuntimeWarning, match="A search failed"):
            observation, *flags, info = env.step("<search> x </search>")
        assert observation == envs.information(envs.SEARCH_FAILED) and flags == [0.0, False, False] and info["valid"]
        assert info["retriever_errors"] == count and re.search(words, info["error"])
    assert urlopen.call_count == requests
    _, reward, _, _, info = env.step(f"<answer> {env.question.golds[0]} </answer>")
    assert (reward, info["error"], info["retriever_errors"], ask(env)[1]["retriever_errors"]) == (1.0, None, 2, 0)


@contextlib.contextmanager
def serving(*replies, host="127.0.0.1"):
    """Yields (port, requests) of a server that gives each reply once, the last for ever; requests: their headers.

    A reply is (status, headers, text or an iterator of parts), or bytes sent one by one for ever as they are.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            requests.append(self.headers)
            reply = replies[min(len(requests), len(replies)) - 1]
            with contextlib.suppress(OSError):       # the client may leave
                if isinstance(reply, bytes):
                    for number in itertools.count():
                        self.wfile.write(reply[number % len(reply):][:1])
                        time.sleep(0.01)
                status, headers, text = reply
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(text))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads, block_on_close = True, False

    requests, server = [], Server((host, 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.server_port, requests
    server.shutdown()
    server.server_close()


FOUND = (200, {}, '{"result": [[{"contents": "a"}]]}')


def test_a_proxy_is_used_except_for_this_machine_and_redirects_are_not_followed(monkeypatch):
    with serving(FOUND) as (proxy, proxied), serving(FOUND, host="0.0.0.0") as (port, asked):
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for host in ("127.0.0.1", "localhost", "127.8.9.10", "[::ffff:127.0.0.1]", "0.0.0.0"):
            assert quick(f"http://{host}:{port}")("x", 1) == ["a"]
        assert (len(asked), len(proxied)) == (5, 0) and quick("http://retriever.test")("x", 1) == ["a"]
        assert (len(asked), len(proxied)) == (5, 1)
        if socket.has_ipv6:
            with serving(FOUND, host="::1") as (other, _):
                assert quick(f"http://[::1]:{other}/")("x", 1) == ["a"]
        for status in (301, 302, 303, 307, 308):
            with serving((status, {"Location": f"http://localhost:{port}/retrieve"}, "")) as (other, _):
                refused(f"status {status}, a redirect, which is not", quick(f"http://127.0.0.1:{other}"), "x", 1)
        assert len(asked) == 5


@pytest.mark.parametrize("replies, found, tries", [
    ([(200, {}, '{"result": []}')], [], 1), ([(200, {}, '{"result": [[]]}')], [], 1),
    ([(429, {"Retry-After": "0"}, ""), (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, ""), FOUND], ["a"], 3),
    ([(429, {"Retry-After": "99999"}, ""), (429, {"Retry-After": "soon"}, ""), FOUND], ["a"], 3),
    ([(429, {}, "")], "no answer in 3 tries, .*status 429", 3), ([(408, {}, "")], "refused with status 408", 2),
    ([(200, {"Content-Length": "9999999"}, "{}")], "no answer in 3 tries, .*IncompleteRead", 3),
    ([(200, {}, json.dumps({"result": [[{"contents": "a" * 2000}]]}))], "the answer is longer than 1000 bytes", 2),
    ([b" "], "no answer in .* tries, within 0.3 s; .*BadStatusLine|timed out", None),
    ([b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"], "no answer in .* tries, within 0.3 s; .*timed out", None),
    ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999], "no answer in .* tries, within 0.3 s; .*timed out", None)])
def test_a_search_ends_by_its_deadline_and_what_may_pass_is_tried_again(monkeypatch, replies, found, tries):
    monkeypatch.setattr(retrieval, "ANSWER_LIMIT", 1000)
    monkeypatch.setattr(retrieval, "RETRY_AFTER_LIMIT", 0.01)
    with serving(*replies) as (port, requests):
        search = quick(f"http://127.0.0.1:{port}", timeout=0.3 if tries is None else 5)
        if isinstance(found, list):
            assert search("x", 1) == found
        else:
            refused(found, search.probe, kind=(ConnectionError, ValueError))
        assert tries in (None, len(requests))


def test_a_password_in_the_address_is_sent_and_never_shown(monkeypatch):
    with serving(FOUND, (403, {}, ""), (500, {}, "")) as (port, requests):
        search = quick(f"http://me:s%40cret@127.0.0.1:{port}/api/retrieve?key=s%40cret")
        search.probe()
        assert base64.b64decode(requests[0]["Authorization"].removeprefix("Basic ")) == b"me:s@cret"
        for _ in range(2):
            assert "cret" not in refused(f"http://127.0.0.1:{port}/api/retrieve.*", search.probe,
                                         kind=(ConnectionError, ValueError))
        search = quick(f"https://me:cret@127.0.0.1:{port}")
        assert "cret" not in refused("no answer .*SSL", search.probe, kind=ConnectionError)
    for url in ("me:cret@host", "http://me:c/ret@host:x", "ftp://me:cret@host", "http://me:cret@", "http://me:cret@[::1",
                "http://me:cret@host:99999999", "http://me:cret@ho st", "http://me:cret@host\n", "//me:cret@host",
                "http://me:12/cret@host:1", "http://me:/cret@host", "http://host/#me:cret", "http://me:cret@h/\ud800"):
        sentence = refused("address must be like http", retrieval.Retriever, url)
        assert "cret" not in sentence and "c/ret" not in sentence
    assert "not 'ftp://host'" in refused("address must be like http", retrieval.Retriever, "ftp://host")


def test_the_command_serves_a_file_until_an_interrupt(tmp_path):
    command = [sys.executable, envs.__file__, "serve-search", "--port", "0", "--corpus"]
    with subprocess.Popen([*command, write(tmp_path, {}) / "corpus.jsonl"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True,           # an interrupt may be ignored where this runs
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        try:
            url = process.stdout.readline().split()[2].rstrip(",")
            assert quick(url)("cats", 1) == ['"Cat"\nA cat purrs.']
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20)[1] == "" and process.returncode == 0
        finally:
            process.kill()
    refused("no answer in 3 tries", quick(url), "cats", 1, kind=ConnectionError)       # nobody listens any more


GAME, TASK = golden(f"alfworld/{GAMES[0]}")["game"], "Your task is to: "
FILES = CASES["files"] | {"game.tw-pddl": GAME}
LAMP, = FILES["items_shuffle.json"]
READ = {"items_shuffle.json": envs.WebShop, "items_ins_v2.json": envs.WebShop, "corpus.jsonl": envs.SearchQA,
        "items_human_ins.json": lambda folder: envs.WebShop(folder, human_goals=True),
        "test.jsonl": lambda folder: ask(envs.SearchQA(folder)),
        "game.tw-pddl": lambda folder: data.load_game(folder / "game.tw-pddl")}


def write(folder, files, make=False):
    """Writes good files, and `files` {name: text, JSON or rows of JSONL} instead of some; returns the folder."""
    if make:
        folder.mkdir()
    for name, content in (FILES | files).items():
        if name.endswith(".jsonl") and isinstance(content, list):
            content = "\n\n".join(map(json.dumps, content))              # a blank line is no row
        content = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(content, encoding="latin-1")          # "ÿ" is not UTF-8 then
    return folder


MALFORMED = [                            # (file, its content, words of the sentence that refuses it)
    *((file, content, words) for file in FILES for content, words in CASES[file] + CASES["any"]),
    *((file, '{"a":' * 300000, "is not UTF-8 JSON: maximum recursion") for file in FILES),
    ("items_shuffle.json", "[" * 300000, "is not UTF-8 JSON: maximum recursion"),
    ("game.tw-pddl", GAME | {"pddl_problem": GAME["pddl_problem"].replace("(:goal", "(:goal " + "(not " * 99999, 1)
                             + ")" * 99999}, "nested too deeply"),
    *(("game.tw-pddl", GAME | {"grammar": GAME["grammar"].replace(TASK, TASK + bad, 1)}, words)
      for bad, words in [("\\ud83d", "half of a surrogate"), ("\\x", "task sentence in the grammar is not")]),
    *(("items_shuffle.json", [LAMP | {"category": name}], "plain name") for name in ("../a", "a/b", "..", "\n")),
    *(("items_shuffle.json", [LAMP | change], words) for change, words in CASES["products"]),
    *(("items_shuffle.json", [LAMP | {field: 5}], f"entry 0.*'{field}' must be") for field in LAMP),
    *(("items_shuffle.json", [{key: LAMP[key] for key in LAMP if key != field}], f"entry 0.*'{field}'")
      for field in LAMP if field != "pricing"),
    *(("game.tw-pddl", GAME | {"pddl_problem": GAME["pddl_problem"].replace(old, new, 1)}, words)
      for old, new, words in CASES["problems"])]


@pytest.mark.parametrize("file, content, words", MALFORMED)
def test_a_malformed_file_is_refused_in_a_sentence_that_names_the_place(tmp_path, monkeypatch, file, content, words):
    for limit in (catalogue.LARGE, 0):   # products are read one by one above it
        monkeypatch.setattr(catalogue, "LARGE", limit)
        sentence = refused(words, READ[file], write(tmp_path, {file: content}))
        assert file in sentence or str(tmp_path) in sentence


@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")], ids="pdl")
def test_a_pipe_a_folder_and_a_dangling_link_in_place_of_a_file_are_refused_without_waiting(tmp_path, file, make):
    (path := write(tmp_path, {}) / file).unlink()
    make(path)
    sentence = refused(".", READ[file], tmp_path, kind=(FileNotFoundError, ValueError))
    assert str(tmp_path) in sentence and sentence.endswith("."), sentence
    sentence = refused(".", envs.main, ["serve-search", "--corpus", str(path)], kind=SystemExit)
    assert str(path) in sentence, sentence


def test_a_cut_parquet_file_is_refused(tmp_path):
    parquet, path = pytest.importorskip("pyarrow.parquet"), tmp_path / "rows.parquet"
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(CASES["rows"][2:3] * 999), path)
    whole = path.read_bytes()
    broken = whole[:100] + bytes(byte ^ 255 for byte in whole[100:400]) + whole[400:]
    for content in (b"", whole[:-9], whole[9:], whole[:4] + whole[-99:], broken):
        path.write_bytes(content)
        refused("rows.parquet is not a parquet file: .*; download", data.load_questions.__wrapped__, str(path))


def test_missing_ambiguous_and_unreadable_files_are_named(tmp_path, monkeypatch):
    write(tmp_path, {"rows.csv": "text", "rows.parquet": "text"})
    (tmp_path / "items_human_ins.json").unlink()                 # needed for human goals only
    refused("no task in split 'val'", envs.WebShop(tmp_path).reset, options={"split": "val"})    # one goal: "train"
    (tmp_path / "items_shuffle_1000.json").write_text("[]")
    refused("Several files match.*items_shuffle_1000.json", envs.WebShop, tmp_path, seed=1, human_goals=True)
    refused("neither .jsonl nor .parquet", ask, envs.SearchQA(tmp_path / "rows.csv"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused("pip install pyarrow", ask, envs.SearchQA(tmp_path / "rows.parquet"), kind=ImportError)


def test_all_forms_of_rows_are_read_in_order_splits_have_own_files_and_a_single_file_is_for_validation(tmp_path):
    def is_read(env, number=0):
        observation, info = ask(env, number)
        return (observation, info["task_type"], env.step("<answer> anna </answer>")[1]) == ("who?", "nq", 1.0)

    forms, rows = CASES["rows"], [{"question": f"{i}?", "golden_answers": ["Ann"]} for i in range(5)]
    write(tmp_path, {"train.jsonl": rows, "test.jsonl": forms, "dev.jsonl": rows[:1], "rows.parquet": "text"})
    env = envs.SearchQA(tmp_path)
    assert [ask(env, i, "train")[0] for i in range(env.num_tasks("train"))] == [f"{i}?" for i in range(5)]
    assert env.num_tasks("val") == len(forms) and all(is_read(env, i) for i in range(len(forms)))    # not dev.jsonl
    assert env.task_types == ("nq", "unknown") and ask(env)
    assert "A dog barks." in env.step("<search> dogs </search>")[0]      # from the corpus beside the rows
    refused("generated questions only", env.expert)
    (tmp_path / "corpus.jsonl").unlink()
    refused("no corpus.jsonl.*retriever=", envs.SearchQA, tmp_path)
    alone = functools.partial(envs.SearchQA, retriever=lambda query, topk: [])
    env = alone(tmp_path / "dev.jsonl")
    assert ask(env)[0] == "0?" and env.num_tasks("val") == 1
    refused("no 'train' questions beside .*dev.jsonl.*train.jsonl", env.num_tasks, "train")
    parquet, path = pytest.importorskip("pyarrow.parquet"), tmp_path / "rows.parquet"
    refused("rows.parquet is not a parquet file", ask, alone(path))
    for row in forms:
        parquet.write_table(sys.modules["pyarrow"].Table.from_pylist([row]), path)
        assert is_read(alone(path)), row


def test_a_large_catalogue_is_read_once_and_again_when_its_files_change_or_the_cache_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "LARGE", 0)
    store, made = catalogue.store_catalogue, []
    monkeypatch.setattr(catalogue, "store_catalogue", lambda *arguments: made.append(1) or store(*arguments))

    def start(**changes):
        """How often the catalogue was made, and how many folders are left."""
        made.clear()
        shop = catalogue.official_shop(write(tmp_path, changes) if changes else tmp_path, False)
        prices, goals = shop.draw(1, 2)
        assert dict(shop.products) == catalogue.shop_of(data.read_catalogue(shop.files)).products
        assert (dict(prices), [goal["asin"] for goal in goals], len(shop.postings().ids)) == (
            {"B000000001": 12.99}, ["B000000001"], 1)
        return len(made), len(list(cache.iterdir())) - locks

    cache, locks = write(tmp_path, {}) / "sdar_cache", 2
    assert start() == (1, 2) and start() == (0, 2)
    assert start(**{"items_shuffle.json": [LAMP | {"name": "Blue Lamp"}]}) == (1, 2)
    for path in sorted((cache / "webshop-synthetic").iterdir()):
        whole = path.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        for damaged in (whole[:-1], b"", flipped, b"x" * len(whole)):
            path.write_bytes(damaged)
            with pytest.warns(RuntimeWarning, match="webshop-synthetic is damaged .* made again"):
                assert start() == (1, 2), path.name
    monkeypatch.setattr(catalogue, "SUMMED", 0)      # a file too large to be summed at each start
    assert start() == (1, 2)
    with contextlib.closing(sqlite3.connect(cache / "webshop-synthetic" / "products.sqlite")) as lost:
        kept = lost.execute("SELECT asin FROM products").fetchall()
        lost.execute("UPDATE products SET asin = 'B00000000X'")
        lost.commit()
    shop = catalogue.official_shop(tmp_path, False)
    refused("is damaged .*product B000000001 cannot be found", shop.products.__getitem__, "B000000001")
    with contextlib.closing(sqlite3.connect(cache / "webshop-synthetic" / "products.sqlite")) as found:
        found.execute("UPDATE products SET asin = ?", kept[0])
        found.commit()
    shop = catalogue.official_shop(tmp_path, False)
    products = shop.products.path
    products.write_bytes(products.read_bytes().replace(b"Blue", b"Blus"))        # where it is not read at the start
    refused("is damaged .*checksum.*delete its folder", shop.products.__getitem__, "B000000001")
    products.write_bytes(b"x" * products.stat().st_size)
    refused("is damaged .*not a database", dict, catalogue.official_shop(tmp_path, False).products)


def test_the_cache_goes_where_one_can_write_is_never_half_made_and_several_processes_may_make_it_at_once(
        tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    beside = write(tmp_path / "a", {}, make=True) / "sdar_cache"
    store, gone = Mock(side_effect=catalogue.store_catalogue), ".webshop-synthetic-gone"
    monkeypatch.setattr(catalogue, "store_catalogue", store)
    for lock in (True, False):           # one makes it and the others wait, or each makes it and one is kept
        if not lock:
            monkeypatch.setitem(sys.modules, "fcntl", None)
            shutil.rmtree(beside)
            beside.mkdir()
            (beside / gone).symlink_to("deleted by another process since it was listed")
        with ThreadPoolExecutor(8) as pool:
            shops = list(pool.map(lambda _: catalogue.official_shop(tmp_path / "a", False), range(8)))
        assert [list(shop.products) for shop in shops] == [["B000000001"]] * 8
        assert {path.name for path in beside.iterdir()} - {gone} == {"webshop-synthetic", ".webshop-synthetic.lock"}
        assert not (tmp_path / "home").exists() and (store.call_count == 1) == lock
    (write(tmp_path / "b", {}, make=True) / "sdar_cache").write_text("a file where the folder should be")
    assert tmp_path / "home" in catalogue.official_shop(tmp_path / "b", False).products.path.parents
    (tmp_path / "b" / "items_shuffle.json").write_text(json.dumps([LAMP, LAMP | {"asin": "B2", "images": []}]))
    refused("items_shuffle.json, entry 1 \\(B2\\)", catalogue.official_shop, tmp_path / "b", False)
    assert [path.name for path in (tmp_path / "home").glob("sdar/*/*") if path.is_dir()] == ["webshop-synthetic"]
    monkeypatch.setattr(catalogue, "save_postings", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    refused("cannot be written .*No space.*XDG_CACHE_HOME", catalogue.official_shop, write(tmp_path / "b", {}), True,
            kind=OSError)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b" / "sdar_cache"))
    refused("Neither .*sdar_cache nor .* can be written", catalogue.official_shop, tmp_path / "b", True, kind=OSError)


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_a_list_is_read_entry_by_entry_wherever_the_parts_end(official, tmp_path, monkeypatch, size):
    monkeypatch.setattr(data, "READ_AT_ONCE", size)
    text = (official / "items_shuffle.json").read_text(encoding="utf-8").strip()
    entries = json.loads(text)[:20] if size < 10 else json.loads(text)
    for content in (json.dumps(entries, ensure_ascii=False), json.dumps(entries, indent=3), "[]", " [ ] ", "[1, 2.5]"):
        (path := tmp_path / "list.json").write_text(content, encoding="utf-8")
        assert list(data.read_json_list(path)) == json.loads(content)
    for content in ("[", "[1", "[1,", "[1,]", "[1 2]", "[,1]", "[1]]", "[1] x", '[{"a": "b', "[nul]", '["\ud83d"]'):
        path.write_text(content, errors="surrogatepass")
        refused("list.json is not UTF-8 JSON", list, data.read_json_list(path))
