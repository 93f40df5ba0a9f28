"""The rules of the environments: recordings of the originals replayed, official files, prompts, parsers, retrievers and
the interface that all three share. Tables of cases are in cases.json, generated tasks and players in test_tasks.py."""
import doctest
import functools
import gzip
import importlib
import io
import json
import math
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from lib import official as data
from lib import retrieval
from lib.generated import bundled_corpus

GOLDEN = Path(envs.__file__).parent / "data" / "golden"
CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))
GAMES = sorted(path.name.removesuffix(".json.gz") for path in (GOLDEN / "alfworld").glob("*.gz"))
MOVES = {"webshop": "search[lamp]", "alfworld": "look", "search": "<search> Lisbon </search>"}
each = pytest.mark.parametrize("name", list(MOVES))
quick = functools.partial(retrieval.Retriever, timeout=5, tries=3, pause=0.001)


def golden(name):
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalogue")
    for path in (GOLDEN / "webshop" / "catalogue").glob("*.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return folder


def game_file(folder, name=GAMES[0], **changes):
    """The path of a game.tw-pddl with a recorded game, in a folder named after it."""
    path = folder / name / "game.tw-pddl"
    path.parent.mkdir(parents=True, exist_ok=True)
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


# ---------------------------------------------------------------------------------- the interface that all three share
@each
def test_gymnasium_accepts_every_environment_and_equal_seeds_start_a_group_alike(name):
    make = functools.partial(gymnasium.make, f"sdar/{envs.ENVIRONMENTS[name].__name__}-v0")
    check_env(make().unwrapped, skip_render_check=True)
    group = gymnasium.vector.SyncVectorEnv([make] * 4)
    texts, infos = group.reset(seed=[3, 3, 4, 4])
    assert texts[0] == texts[1] != texts[2] == texts[3]
    ids = infos["task_id"].tolist()
    assert ids[0] == ids[1] != ids[2] == ids[3] and infos["task_type"][0] == infos["task_type"][1]
    texts, _, _, _, infos = group.step([MOVES[name]] * 3 + ["no action"])
    assert texts[0] == texts[1] and infos["valid"].tolist() == [True, True, True, False]
    group.close()


@each
def test_an_episode_repeats_in_another_instance_and_is_truncated_at_its_limit(name):
    assert envs.MAX_TURNS == {"webshop": 15, "alfworld": 50, "search": 4}
    moves = (["search[<r>]", "click[next >]"] if name == "webshop" else []) + [MOVES[name]] * 50

    def play():
        env = envs.make(name)
        return [env.reset(seed=5), *(env.step(move) for move in moves[:envs.MAX_TURNS[name]])]

    first = play()
    flags = [step[2:4] for step in first[1:]]
    assert first == play() and flags == [(False, False)] * (len(flags) - 1) + [(False, True)]
    env = envs.make(name)
    draws = {(info["task_id"], info["task_type"]) for seed in range(20) for _, info in [env.reset(seed=seed)]}
    assert len(draws) > 10 and {kind for _, kind in draws} <= set(env.task_types)


@each
def test_wrong_calls_are_refused_in_one_sentence(name):
    env = envs.make(name)
    refused("call reset before step", env.step, MOVES[name], kind=gymnasium.error.ResetNeeded)
    refused("give a number from 0 to", ask, env, env.num_tasks("val"))
    refused("an action as a string such as .*, not as int", env.step, 3, kind=TypeError)
    for options, words in CASES["options"]:
        refused(words, env.reset, options=options)
    refused("no split 'all'", env.num_tasks, "all")
    for function, arguments, words in CASES["arguments"]:
        refused(words, getattr(envs, function), **arguments)


# ---------------------------------------------------------------------------------------- WebShop against the original
def test_products_prices_and_documents_are_those_of_the_original_loader(official):
    recorded = golden("webshop/loader")
    synthetic = envs.WebShop(official, seed=recorded["price_seed"])
    human = envs.WebShop(official, seed=recorded["price_seed"], human_goals=True)
    assert list(synthetic.products) == recorded["asins"] and len(recorded["cases"]) > 30
    assert synthetic.price == human.price == recorded["product_prices"]
    for case in recorded["cases"]:
        product, told = case["product"], case["human_instructions"]
        assert synthetic.products[product["asin"]] == product
        expected = {k: v for k, v in product.items() if k not in ("instruction_text", "instruction_attributes")}
        assert human.products[product["asin"]] == expected | ({} if told is None else {"instructions": told})
    for attribute, asins in recorded["attribute_to_asins"].items():
        assert sorted(a for a, p in synthetic.products.items() if attribute in p["Attributes"]) == asins
    for case in golden("webshop/documents"):
        assert retrieval.product_document(synthetic.products[case["id"]]) == case["contents"]


@pytest.mark.parametrize("kind", ["synthetic", "human"])
def test_goals_their_order_and_their_draw_are_those_of_the_original_and_of_its_training_variant(official, kind):
    recorded = golden("webshop/goals")
    env, recorded = envs.WebShop(official, seed=recorded["price_seed"], human_goals=kind == "human"), recorded[kind]
    assert len(env.goals) == recorded["count"] and len(recorded["cases"]) > 60
    index_of = {position: index for index, position in enumerate(recorded["order"])}
    for case in recorded["cases"]:
        position = case.pop("case")
        assert env.goals[index_of[position]] == case
    assert sum(goal["weight"] for goal in env.goals) == pytest.approx(recorded["total_weight"], rel=1e-12)
    for seed, index in recorded["weighted_draws"]:
        assert data.weighted_goal(env.goals, random.Random(seed)) == index
        assert env.reset(seed=seed, options={"split": "all"})[1]["task_id"] == index
    for variant in golden("webshop/training_variant")["goal_orders"]:      # one seed for prices and order
        if variant["human_goals"] == (kind == "human"):
            seed = variant["env_seed"]
            env = envs.WebShop(official, seed=seed, shuffle_seed=seed, human_goals=kind == "human")
            bounds = [variant["price_upper"][position] for position in variant["order"]]
            assert env.price == variant["product_prices"] and [goal["price_upper"] for goal in env.goals] == bounds


def test_rewards_and_all_their_parts_are_those_of_the_original(official):
    products = envs.WebShop(official).products
    for case in golden("webshop/rewards"):
        bought = case["product"] or products[case["purchased_asin"]]
        names = {bought["name"]: case["nouns_purchased"], case["goal"]["name"]: case["nouns_goal"]}
        reward, parts = envs.webshop_reward(bought, case["goal"], case["options"], case["price"], nouns=names.get)
        assert {"reward": reward, **parts} == case["expected"], case["note"]
    refused("names no attribute", envs.webshop_reward, bought, case["goal"] | {"attributes": []}, {}, 1.0)


def test_the_fuzzy_match_colours_actions_projection_and_white_space_are_those_of_the_original():
    def told(value):                     # JSON has no tuples; the recordings write them as lists
        return tuple(value) if isinstance(value, list) else value

    for case in golden("webshop/token_set_ratio"):
        assert envs.token_set_ratio(told(case["a"]), told(case["b"])) == case["score"], case
    for case in golden("webshop/colors"):
        assert envs.normalize_color(told(case["input"])) == told(case["output"])
    for case in golden("webshop/parse_action"):
        assert envs.split_action(case["action"]) == (case["name"], case["argument"])
    for case in golden("webshop/training_variant")["projection"]:
        action, valid = envs.parse_webshop(case["text"], official=True)
        assert (action, int(valid)) == (case["action"], case["valid"]), case
    parts = [("text", text) for text in ("a", "", "  ", " \n ", " b ")]
    assert envs.plain_text(parts) == "a [SEP]  [SEP] b"
    assert envs.rich_text(parts, "", frozenset()) == "a\n \n b \n"


def replay(case, rankings, official, nouns, shuffle_seed):
    """Plays the recorded actions with the recorded rankings and compares everything that the recording holds."""
    ranking = {}                         # of the step at hand: recorded rankings are inputs
    env = envs.WebShop(official, seed=42, shuffle_seed=shuffle_seed, human_goals=case["human_goals"], nouns=nouns,
                       search=lambda query: ranking[query], observation_mode=case["observation_mode"],
                       show_attrs=case["show_attrs"])
    assert env.goals[case["goal_index"]] == case["goal"]
    obs, info = env.reset(options={"goal": case["goal_index"]})
    assert (obs, env.clickables) == (case["reset"]["obs"], case["reset"]["available_actions"]["clickables"])
    for step in case["steps"]:
        shown = step.get("search")
        ranking = {shown["query"]: shown.get("ranking", rankings.get(shown["query"]))} if shown else {}
        obs, reward, terminated, _, info = env.step(step["action"])
        assert (obs, reward, terminated) == (step["obs"], step["reward"], step["done"]), step["action"]
        assert info["score"] == reward and info["won"] == (reward == 1.0)
        if step["state"] is not None:    # the training variant shows another episode after the last step
            state, actions = step["state"], step["available_actions"]
            assert (env.page, env.query, env.page_number, env.asin, env.options) == tuple(
                state[key] for key in ("page_kind", "keywords", "page", "asin", "options"))
            assert env.clickables == actions["clickables"] and actions["has_search_bar"] == (env.page == "start")
        if shown:
            assert env.results == next(iter(ranking.values()))
        if "reward_info" in step:
            assert {key: env.reward_parts[key] for key in step["reward_info"]} == step["reward_info"]
    return len(case["steps"])


@pytest.mark.parametrize("file, cases, shuffle_seed", [("transcripts", "cases", 233),
                                                       ("training_variant", "transcripts", 42)])
def test_every_recorded_shopping_episode_replays_exactly(official, file, cases, shuffle_seed):
    recorded, nouns = golden(f"webshop/{file}"), golden("webshop/title_nouns").__getitem__
    for case in recorded[cases]:
        assert replay(case, recorded["rankings"], official, nouns, shuffle_seed) > 0


# ------------------------------------------------------------------------------------------------------ WebShop: rules
def test_search_finds_titles_and_special_words_work_as_in_the_original(official):
    env = envs.WebShop(official)
    titles = [product["Title"] for product in env.products.values()]
    found = [asin in env.search(title)[:10] for asin, title in zip(env.products, titles, strict=True)
             if titles.count(title) == 1]
    assert sum(found) >= 0.95 * len(found) > 200 and max(len(env.search(title)) for title in titles) <= 50
    assert env.search("LAMPS") == env.search("lamp") != () == env.search("zzzz the of")

    def results(action):
        return env.step(action) and env.results
    env.reset(seed=1)
    garden = [asin for asin, p in env.products.items() if p["category"] == "garden"]
    assert results("search[<c> garden and more]") == garden and len(garden) > 50
    lamps = [asin for asin, p in env.products.items() if p["query"] == "table lamps"]
    assert results("search[<q> table lamps]") == lamps != []
    first = results("search[<r>]")
    assert len(set(first)) == 50 and first != list(env.products)[:50] and results("click[next >]") != first
    assert results("search[<a> easy clean]") == results("search[<c>]") == []
    for words, page in [("lamp", 1), ("search_results lamp", 0)]:    # page names in the address count
        env.step(f"click[{results(f'search[{words}]')[0]}]")
        assert env.page == "item" and env.step("click[< prev]") and (env.page, env.page_number) == ("results", page)


def test_bm25_equals_the_formula_and_breaks_ties_by_document_number():
    postings = retrieval.build_postings("abcd", ["red lamp lamp", "red chair", "blue chair", "red chair"])
    assert [retrieval.bm25(postings, "red lamps", k) for k in (50, 2)] == [("a", "b", "d"), ("a", "b")]
    red, lamp = math.log(1 + 1.5 / 3.5), math.log(1 + 3.5 / 1.5)     # idf
    long, short = 0.9 * (0.6 + 0.4 * 3 / 2.25), 0.9 * (0.6 + 0.4 * 2 / 2.25)   # penalties of 3 and 2 words, mean 2.25
    expected = [red / (1 + long) + lamp * 2 / (2 + long), red / (1 + short), 0.0, red / (1 + short)]
    assert retrieval.bm25_scores(postings, "the red LAMP").tolist() == pytest.approx(expected, rel=1e-6)


def test_splits_are_disjoint_cover_all_goals_and_hold_out_500_of_1000(official, monkeypatch):
    for human in (False, True):
        env = envs.WebShop(official, human_goals=human)
        assert [*env.splits["val"], *env.splits["train"]] == list(range(len(env.goals)))
        for split, indices in env.splits.items():
            info = ask(env, len(indices) - 1, split)[1]
            assert env.goal is env.goals[indices[-1]] and info["task"] == env.goal["instruction_text"]
    monkeypatch.setattr(envs, "load_goals", lambda *arguments: ({}, [env.goal] * 1000))
    assert envs.WebShop(official).splits == {"val": range(500), "train": range(500, 1000)}


def test_everything_admissible_is_valid_and_nothing_else_changes_what_is_shown_or_shared(official):
    env, rng = envs.WebShop(official), random.Random(0)
    assert env.goals is envs.WebShop(official).goals and env.products is envs.WebShop(official).products
    before = json.dumps([env.products, env.goals, env.price])
    for seed in range(30):
        start, info = env.reset(seed=seed)
        assert info["admissible"] == ["search[<words>]"] and info["valid"]
        for action in ("click[search]", "click[buy now]", "look", "", "Search[x]", "click", "search[]", "click[]"):
            *shown, info = env.step(action)
            assert shown == [start, 0.0, False, False] and not info["valid"] and not info["won"]
        for action in [f"search[{env.goal['query']}]"] + [None] * 13:
            action = action or rng.choice([a for a in info["admissible"] if a.startswith("click")] or ["search[x]"])
            *_, info = env.step(action)
            assert info["valid"]
    assert json.dumps([env.products, env.goals, env.price]) == before


def test_a_given_goal_can_be_played_and_a_purchase_ends_the_episode(official):
    env, won = envs.WebShop(official), 0
    for goal in env.goals[:40]:
        env.reset(options={"goal": dict(goal)})
        for action in [f"search[{goal['name']}]", f"click[{goal['asin']}]",
                       *(f"click[{value}]" for value in goal["goal_options"].values()), "click[Buy Now]"]:
            _, reward, terminated, truncated, info = env.step(action)
        won += info["won"]
        assert info["won"] == (reward == 1.0) and info["score"] == reward and not truncated
        assert not terminated or env.page == "done" and info["admissible"] == ["search[<words>]"]
    assert won > 20


def test_a_tagger_decides_on_nouns_and_without_one_the_rule_drops_adjectives_and_numbers(monkeypatch):
    class Token:
        text, pos_ = "Word", "NOUN"

    for tagger, expected in [(None, ["women", "shirt", "men", "pack", "shirt"]), (lambda title: [Token], ["word"])]:
        monkeypatch.setattr(envs, "noun_tagger", lambda tagger=tagger: tagger)
        envs.title_nouns.cache_clear()
        assert envs.title_nouns("Soft Women's Shirt for Men, 2 Pack of Shirt") == expected
    envs.title_nouns.cache_clear()


# ----------------------------------------------------------------------------------------------------- ALFWorld: rules
@pytest.mark.parametrize("wording", ["move", "put"])
@pytest.mark.parametrize("kind", ["plan", "walk"])
@pytest.mark.parametrize("name", GAMES)
def test_every_step_is_the_official_engines_in_either_wording_of_putting(tmp_path, name, kind, wording):
    def worded(text):
        text = re.sub(r"^You move the (.+) to the (.+)\.$", r"You put the \1 in/on the \2.", text)
        text = text.replace("move (object) to (receptacle):  ", "put (object) in/on (receptacle):  ")
        return re.sub(r"^move (.+) to (.+)$", r"put \1 in/on \2", text)
    worded = worded if wording == "put" else str
    record, env = golden(f"alfworld/{name}")[kind], envs.ALFWorld(put_wording=wording)
    for number, step in enumerate(record["steps"]):
        if step["command"] is None:
            text, info = env.reset(options={"game": game_file(tmp_path, name)})
            reward, done = 0.0, info["won"]
        else:
            text, reward, done, _, info = env.step(worded(step["command"]))
        assert (text, reward, done) == (worded(step["feedback"]), step["reward"], step["done"]), number
        assert info["admissible"] == sorted(map(worded, step["admissible"])) and info["won"] == step["won"]
        assert info["task_type"] == record["task_type"] and info["score"] == reward
        assert info["valid"] == (text != "Nothing happens.")
    assert worded("move (object) to (receptacle):  ") in env.step("help")[0]
    _, info = env.reset(options={"game": game_file(tmp_path, name)})
    while not info["won"]:               # the expert wins official games, too; at the limit it would be truncated
        *_, truncated, info = env.step(env.expert())
        assert not truncated


def test_a_goal_that_is_undone_is_no_longer_won(tmp_path):
    name = "pick_and_place_simple-KeyChain-Sofa-201-2"
    (env := envs.ALFWorld()).reset(options={"game": game_file(tmp_path, name)})
    for step in golden(f"alfworld/{name}")["plan"]["steps"][1:]:
        _, reward, done, _, info = env.step(step["command"])
    assert (reward, done) == (1.0, True) and env.step(" look\n")[1:3] == (1.0, True)
    obj, place = re.fullmatch("move (.+) to (.+)", step["command"]).groups()
    assert env.step("Look")[0] == "Nothing happens."         # space around a command is ignored, case is not
    assert env.step(f"take {obj} from {place}")[1:3] == (0.0, False)


def test_comments_and_every_quantifier_of_a_goal_are_read():
    def goal(text):
        formula, = data.parse_lists(f"{text} ; comment (", "x")
        return data.ground(formula, {}, {"receptacle": ["r1", "r2"]}, frozenset({("openable", "r1")}), "x")

    assert data.parse_typed(["a", "b", "-", "c", "d"]) == [("a", "c"), ("b", "c"), ("d", "object")]
    closed = goal("(forall (?r - receptacle) (imply (openable ?r) (not (opened ?R))))")
    assert data.is_true(closed, set()) and data.is_true(closed, {("opened", "r2")})
    assert not data.is_true(closed, {("opened", "r1")})
    other = goal("(exists (?r ?s - receptacle) (and (not (= ?r ?s)) (openable ?r) (opened ?s)))")
    assert data.is_true(other, {("opened", "r2")}) and not data.is_true(other, {("opened", "r1")})


def test_objects_tell_what_was_done_to_them(tmp_path):
    game = data.load_game(game_file(tmp_path))
    obj = next(entity for entity in game.objects if ("toggleable", entity) not in game.static)
    for facts, text in CASES["qualities"]:
        facts = {(fact, obj) for fact in facts.split()}
        assert envs.object_text(game, facts, obj) == text.replace("X", game.names[obj])
    inside = game._replace(static={("isreceptacleobject", obj), ("inreceptacleobject", game.objects[0], obj)})
    assert envs.object_text(inside, set(), obj).endswith(f"In it, you see a {game.names[game.objects[0]]}.")


def test_the_official_layout_is_read_and_what_its_loader_skips_is_counted(tmp_path):
    def add(split, name, task_type=data.ALFWORLD_TYPES[1], game=True, **changes):
        path = game_file(tmp_path / "json_2.1.1" / split / name, **changes)
        if task_type:
            path.with_name("traj_data.json").write_text(json.dumps({"task_type": task_type}))
        if not game:
            path.unlink()

    for name, changes in {"b": {}, "a": {}, "pick_and_place_with_movable_recep-A": {}, "pick-AppleSliced-B": {},
                          "c": {"task_type": "other"}, "d": {"task_type": None}, "e": {"game": False},
                          "f": {"solvable": False}}.items():
        add("train", name, **changes)
    add("valid_seen", "g", solvable=False)
    for folder in (tmp_path, tmp_path / "json_2.1.1"):
        env = envs.ALFWorld(folder)
        assert env.skipped("train") == {"movable or sliced": 2, "other task type": 1, "no traj_data.json": 1,
                                        "no game.tw-pddl": 1, "not solvable": 1}
        assert env.num_tasks("train") == 2 and ask(env, 1, "train")[1]["task_type"] == "look_at_obj_in_light"
        check_env(env, skip_render_check=True)
    refused("holds no playable game .*1 not solvable", env.num_tasks, "valid_seen")
    refused("There is no folder", env.num_tasks, "valid_unseen", kind=FileNotFoundError)
    add("valid_unseen", "h")
    assert ask(envs.ALFWorld(tmp_path))[1]["task_id"] == 0 and env.num_tasks("val") == 1


def test_a_start_beside_a_receptacle_is_seen_at_once_and_a_changed_file_is_read_again(tmp_path):
    first = data.load_game(path := game_file(tmp_path))
    assert data.load_game(path) is first
    place = re.search(r"\(receptacleAtLocation \S+ (\S+)\)", GAME["pddl_problem"])[1]
    game_file(tmp_path, pddl_problem=GAME["pddl_problem"].replace("agent1 loc_bar_start)", f"agent1 {place})"))
    assert "\n\nYou are facing the " in envs.ALFWorld().reset(options={"game": path})[0]


# ---------------------------------------------------------------------------------------------------- Search-QA: rules
def test_a_search_shows_at_most_topk_documents_in_the_official_format_best_first():
    observation, info = ask(qa := envs.SearchQA())
    assert observation == info["task"] and info["valid"] and info["admissible"] is None and not info["won"]
    observation, *flags, info = qa.step("<think>a</think> <search> Lisbon </search>")
    found = '"Lisbon"\nThe capital of Portugal is Lisbon.'
    assert observation == "\n<information>" + json.dumps({"result": f"Doc 1: {found}\n"}) + "</information>\n"
    assert flags == [0.0, False, False] and info["valid"] and info["error"] is None
    assert qa.step("<search> zzz </search>")[0] == '\n<information>{"result": ""}</information>\n'
    for topk, retriever in [(1, None), (2, None), (5, None), (3, lambda query, topk: [f'"Spain" {query}'] * 4)]:
        env = envs.SearchQA(topk=topk, retriever=retriever)
        ask(env)
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
    def tags(history, observation=""):
        prompt = envs.search_prompt(info["task"], history, observation, None)
        assert "<|im" not in prompt.partition("Found:")[2]
        return {tag: prompt.lower().count(tag) for name in envs.SEARCH_TAGS for tag in (f"<{name}>", f"</{name}>")}

    counts, search, document = [], "<search> x </search>", ["harmless"]
    env = envs.SearchQA(retriever=lambda query, topk: document)
    for text in ("harmless", harm):
        question, info = ask(env)
        own = document[0] = text.format(gold=env.question.golds[0])
        observation, *flags, info = env.step(search)
        assert flags == [0.0, False, False] and not info["won"] and observation.count("<") == 2
        counts += [(tags([(question, search)], observation),
                    tags([(question, search), (observation, search)], observation))]
        shown = json.loads(observation.strip().removeprefix("<information>").removesuffix("</information>"))
        assert shown == {"result": f"Doc 1: {own}\n"} and env.step("<answer> no </answer>")[1] == 0.0
    assert counts[0] == counts[1]
    answer, most = f"<think>{own}</think><search>{own}</search>", sum(tags([(question, search)]).values())
    assert envs.parse_search(answer) == ("", False) and sum(tags([(question, "")]).values()) == most - 2
    for shown in (own, answer, f"<search>{own}</search>"):   # even if a caller passes on what was not parsed
        assert sum(tags([(question, shown)]).values()) <= most


# ------------------------------------------------------------------------------------------------- parsers and prompts
@pytest.mark.parametrize("function, arguments, expected", CASES["calls"])
def test_answers_are_split_and_compared_in_our_way_and_in_the_official_one(function, arguments, expected):
    mode, _, name = function.rpartition(" ")
    result = getattr(envs, name)(*arguments, **({"official": True} if mode else {}))
    assert json.loads(json.dumps(result)) == expected


def test_the_examples_in_docstrings_are_true():
    assert doctest.testmod(envs).failed == 0 < doctest.testmod(envs).attempted


@pytest.mark.parametrize("name, arguments, lines", CASES["prompts"])
def test_a_prompt_holds_skills_history_observation_and_task_as_given(name, arguments, lines):
    first, *middle, last = envs.PROMPTS[name](*arguments).splitlines()
    assert middle == lines and first.startswith("You ") and last.startswith("Think in <think> </think>, then act")


# ---------------------------------------------------------------------------------------------------------- retrievers
GOOD = json.dumps({"result": [[{"document": {"id": "7", "contents": '"T"\nfound'}, "score": 1.5}]]})


class Replies(list):
    """Stands in for urlopen: gives (status, text) in turn, the last one for ever, and keeps the requests."""

    def __call__(self, request, timeout):
        self.requests = [*getattr(self, "requests", []), json.loads(request.data)]
        status, text = self.pop(0) if len(self) > 1 else self[0]
        if status != 200:
            raise urllib.error.HTTPError(request.full_url, status, "", {}, io.BytesIO())
        return io.BytesIO(text.encode())


def failing_search(retriever):
    """Searches twice by a retriever that fails; returns the first error, once all that must hold was checked."""
    env = envs.SearchQA(retriever=retriever)
    ask(env)
    with pytest.warns(RuntimeWarning, match="A search failed"):
        observation, reward, terminated, truncated, info = env.step("<search> x </search>")
    assert observation == "\n<information>" + json.dumps({"result": envs.SEARCH_FAILED}) + "</information>\n"
    assert (reward, terminated, truncated, info["valid"], info["retriever_errors"]) == (0.0, False, False, True, 1)
    error = info["error"]
    with pytest.warns(RuntimeWarning):
        assert env.step("<search> y </search>")[4]["retriever_errors"] == 2
    _, reward, _, _, info = env.step(f"<answer> {env.question.golds[0]} </answer>")
    assert reward == 1.0 and info["error"] is None and info["retriever_errors"] == 2
    assert ask(env)[1]["retriever_errors"] == 0
    return error


def test_the_server_answers_both_request_forms_and_refuses_others():
    server, qa = retrieval.search_server(bundled_corpus(), port=0), envs.SearchQA()
    url = f"http://127.0.0.1:{server.server_port}"
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
    assert best["document"]["contents"] == '"Lisbon"\nThe capital of Portugal is Lisbon.'
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


@pytest.mark.parametrize("refusal", [(422, ""), (200, '{"result": "no"}')])
def test_the_request_form_that_works_is_found_and_remembered(monkeypatch, refusal):
    server = Replies([refusal, (200, GOOD), (500, ""), (503, ""),
                      (200, '{"result": [[{"id": "1", "contents": "a"}, {"contents": "b"}]]}')])
    monkeypatch.setattr(urllib.request, "urlopen", server)
    retriever = quick("http://127.0.0.1:1")
    assert retriever("a", 2) == ['"T"\nfound'] and retriever("b", 2) == ["a", "b"]      # the third try, without scores
    assert [set(request) & {"query", "queries"} for request in server.requests] == [{"queries"}] + [{"query"}] * 4
    assert server.requests[0]["queries"] == ["a"] and server.requests[-1] == {
        "query": "b", "topk": 2, "return_scores": True}


@pytest.mark.parametrize("status, text, words, requests", [*CASES["replies"], (200, "[" * 100000, "ValueError", 4)])
def test_a_server_that_fails_costs_a_turn_but_not_the_episode(monkeypatch, status, text, words, requests):
    monkeypatch.setattr(urllib.request, "urlopen", server := Replies([(status, text)]))
    assert re.search(words, failing_search(quick("http://127.0.0.1:1"))) and len(server.requests) == requests


def test_a_retriever_that_is_down_or_slow_or_wrong_costs_a_turn_but_not_the_episode():
    assert "no answer in 3 tries" in failing_search(quick("http://127.0.0.1:1"))         # nobody listens there
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "timed out" in failing_search(quick(url, timeout=0.05, tries=2))
    for bad in (None, "text", [1]):
        assert "list of texts" in failing_search(lambda query, topk, bad=bad: bad)
    ask(env := envs.SearchQA(retriever=lambda query, topk: 1 / 0))
    refused("division", env.step, "<search> a </search>", kind=ZeroDivisionError)        # a bug is not a failed search


def test_the_command_serves_a_file_until_an_interrupt_and_refuses_bad_input_in_a_sentence(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "x", "contents": '"Cat"\nA cat purrs.'}))
    command = [sys.executable, envs.__file__, "serve-search", "--port", "0", "--corpus", str(tmp_path / "c.jsonl")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[2].rstrip(",")
        assert quick(url)("cats", 1) == ['"Cat"\nA cat purrs.']
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 0
    for arguments, words in [(["--corpus", "none.jsonl"], "none.jsonl"), (["--topk", "0"], "topk must be at least 1"),
                             (["--port", "99999"], "port")]:
        arguments = ["serve-search", "--port", "0", *arguments]
        refused(f"^error: cannot serve .*{words}", envs.main, arguments, kind=SystemExit)


# ------------------------------------------------------------------------------------------------------ official files
GAME = golden(f"alfworld/{GAMES[0]}")["game"]
FILES = CASES["files"] | {"game.tw-pddl": GAME}
LAMP, = FILES["items_shuffle.json"]
HUMAN, = FILES["items_human_ins.json"][LAMP["asin"]]
ROW, = FILES["test.jsonl"]
READ = {"items_shuffle.json": envs.WebShop, "items_ins_v2.json": envs.WebShop, "corpus.jsonl": envs.SearchQA,
        "items_human_ins.json": lambda folder: envs.WebShop(folder, human_goals=True),
        "test.jsonl": lambda folder: ask(envs.SearchQA(folder)),
        "game.tw-pddl": lambda folder: data.load_game(folder / "game.tw-pddl")}


def write(folder, files):
    """Writes good files, and `files` {name: text, bytes, JSON or rows of JSONL} instead of some; returns the folder."""
    for name, content in (FILES | files).items():
        if name.endswith(".jsonl") and isinstance(content, list):
            content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in content)
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


MALFORMED = [                            # (file, its content, words of the sentence that refuses it)
    *((file, content, words) for file in FILES for content, words in CASES[file]),
    *(("items_shuffle.json", [LAMP | change], words) for change, words in CASES["products"]),
    *(("items_shuffle.json", [{key: LAMP[key] for key in LAMP if key != field}], f"entry 0.*'{field}'")
      for field in LAMP if field != "pricing"),
    *(("items_shuffle.json", [LAMP | {field: 5}], f"entry 0.*'{field}' must be") for field in LAMP),
    *(("items_human_ins.json", {LAMP["asin"]: [{key: HUMAN[key] for key in HUMAN if key != field}]},
       f"'{field}' is missing") for field in HUMAN),
    *(("game.tw-pddl", GAME | {"pddl_problem": GAME["pddl_problem"].replace(old, new, 1)}, words)
      for old, new, words in CASES["problems"]),
    ("game.tw-pddl", b"\xff", "is not UTF-8"), ("corpus.jsonl", b"\xff\xfe", "is not UTF-8")]


@pytest.mark.parametrize("file, content, words", MALFORMED)
def test_a_malformed_file_is_refused_in_a_sentence_that_names_the_place(tmp_path, file, content, words):
    sentence = refused(words, READ[file], write(tmp_path, {file: content}))
    assert file in sentence or str(tmp_path) in sentence


def test_missing_ambiguous_and_unreadable_files_are_named(tmp_path, monkeypatch):
    for make in (envs.WebShop, envs.ALFWorld, envs.SearchQA):
        refused("nowhere is not a folder; give the one that holds", make, tmp_path / "nowhere", kind=FileNotFoundError)
    refused("No items_shuffle", envs.WebShop, tmp_path, kind=FileNotFoundError)
    refused("neither train nor test", envs.SearchQA, tmp_path, kind=FileNotFoundError)
    refused("There is no file", envs.ALFWorld().reset, options={"game": tmp_path / "none"}, kind=FileNotFoundError)
    refused("cannot be read", data.load_game, tmp_path, kind=FileNotFoundError)
    (write(tmp_path, {}) / "items_human_ins.json").unlink()      # needed for human goals only
    refused("no task in split 'val'", envs.WebShop(tmp_path).reset, options={"split": "val"})    # one goal: "train"
    (tmp_path / "items_shuffle_1000.json").write_text("[]")
    refused("Several files match.*items_shuffle_1000.json", envs.WebShop, tmp_path, seed=1, human_goals=True)
    for name in ("rows.csv", "rows.parquet"):
        (tmp_path / name).write_text("text")
    refused("neither .jsonl nor .parquet", ask, envs.SearchQA(tmp_path / "rows.csv"))
    env = envs.SearchQA(tmp_path / "rows.parquet")
    if importlib.util.find_spec("pyarrow"):
        refused("rows.parquet is not a parquet file", ask, env)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused("pip install pyarrow", ask, env, kind=ImportError)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", CASES["rows"])
def test_all_forms_of_question_rows_are_read(tmp_path, row, suffix):
    folder = write(tmp_path, {"test.jsonl": [row, "", row]})
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(importlib.import_module("pyarrow").Table.from_pylist([row, row]), tmp_path / "test.parquet")
        (tmp_path / "test.jsonl").unlink()
    env = envs.make("search", folder)
    observation, info = ask(env)
    assert (observation, info["task_type"], env.num_tasks("val"), env.task_types) == ("who?", "nq", 2, ("nq",))
    assert env.step("<answer> anna </answer>")[1] == 1.0


def test_rows_keep_their_order_splits_their_files_and_a_single_file_is_for_validation(tmp_path):
    rows = [ROW | {"question": f"{i}?", "data_source": "hotpotqa"} for i in range(5)]
    write(tmp_path, {"corpus.jsonl": [{"contents": '"Cat"\nA cat purrs.'}, {"contents": '"Dog"\nA dog barks.'}]})
    (tmp_path / "dev.jsonl").write_text(json.dumps(rows[0]))             # test.jsonl goes before it
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    env = envs.SearchQA(tmp_path)
    assert [ask(env, i, "train")[0] for i in range(env.num_tasks("train"))] == [f"{i}?" for i in range(5)]
    assert ask(env)[0] == "who?" and env.task_types == ("hotpotqa", "unknown")
    assert "A dog barks." in env.step("<search> dogs </search>")[0]      # from the corpus beside the rows
    refused("generated questions only", env.expert)
    (tmp_path / "corpus.jsonl").unlink()
    refused("no corpus.jsonl.*retriever=", envs.SearchQA, tmp_path)
    env = envs.SearchQA(tmp_path / "dev.jsonl", retriever=lambda query, topk: [])
    assert ask(env)[0] == "0?" and env.num_tasks("val") == 1
    refused("no 'train' questions beside .*dev.jsonl.*train.jsonl", env.num_tasks, "train")
