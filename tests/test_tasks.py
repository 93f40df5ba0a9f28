"""Generated tasks, which every version must make alike, and the scripted players, which must win or lose them as told."""
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import envs
from lib import experts, generated
from lib.official import ALFWORLD_SPLITS, ALFWORLD_TYPES, is_true

each = pytest.mark.parametrize("name", list(envs.ENVIRONMENTS))
MODES = {"webshop": experts.WEBSHOP_FAILURE_MODES, "alfworld": experts.ALFWORLD_FAILURE_MODES,
         "search": experts.SEARCH_FAILURE_MODES}


def play(env, choose, limit=50, **options):
    """Whether an episode is won, and its turns; choose: info -> action, which must be possible."""
    observation, info = env.reset(options=options)
    info["observation"] = observation
    for turn in range(limit):
        if info["won"]:
            return True, turn
        observation, _, terminated, truncated, info = env.step(choose(info))
        info["observation"] = observation
        if terminated or truncated:
            return info["won"], turn + 1
    return info["won"], limit


def random_action(name, info, rng):
    words = re.findall(r"\w+", f"{info['task']} {info['observation']}" if name == "search" else info["task"])
    start = rng.randrange(len(words))
    some = " ".join(words[start:start + rng.randint(1, 3)])
    if name == "search":
        return rng.choice(["<search> {} </search>", "<answer> {} </answer>"]).format(some)
    return rng.choice(info["admissible"]).replace("<words>", some)


def room_of(game):
    return tuple(sorted(name for entity, name in game.names.items() if entity not in game.objects))


@pytest.fixture(scope="module")
def houses():
    """{split: generated games}; of the large training split the first 600."""
    return {split: [generated.generate_game(split, i) for i in range(min(size, 600))]
            for split, size in ALFWORLD_SPLITS.items()}


# --------------------------------------------------------------------------------------- the same tasks in every version

def tasks_of(name):
    if name == "webshop":
        return [*generated.webshop_catalogue()[:3], *[[env.goals, env.price] for env in (
            envs.WebShop(), envs.WebShop(human_goals=True), envs.WebShop(seed=7, shuffle_seed=7))]]
    if name == "search":
        return [generated.search_questions(), generated.fact_passages()]
    return [[sorted(value) if isinstance(value, frozenset) else {key: sorted(kinds) for key, kinds in value.items()}
             if field == "types" else value for field, value in generated.generate_game(split, number)._asdict().items()]
            for split in ALFWORLD_SPLITS for number in range(130)]


def demonstrations_of(name):
    """Thoughts, actions, observations and prompts of seeded play by the expert and the weak demonstrator."""
    env, told = envs.make(name), []
    for number in range(60):
        rng, past = random.Random(number), []
        observation, info = env.reset(options={"split": ("train", "val")[number % 2], "task_id": number})
        for _ in range(20):
            skills = "1. Be careful.\n" if number % 3 == 0 else ""
            prompt = envs.PROMPTS[name](info["task"], past[-2:], observation, info["admissible"], skills)
            thought, action = env.demonstrate(rng, number % 4 > 1)
            told += [prompt, thought, action]
            past.append((observation if number % 5 else "", action))
            observation, reward, terminated, truncated, info = env.step(action)
            told += [observation, reward, info["score"]]
            if terminated or truncated:
                break
    return told


@pytest.mark.parametrize("make, name, digest", [
    (tasks_of, "webshop", ""), (tasks_of, "alfworld", ""), (tasks_of, "search", ""),
    (demonstrations_of, "webshop", ""), (demonstrations_of, "alfworld", ""), (demonstrations_of, "search", "")])
def test_tasks_demonstrations_and_prompts_are_those_that_the_bundled_model_was_trained_on(make, name, digest):
    assert hashlib.sha256(json.dumps(make(name)).encode()).hexdigest()[:16] == digest


# --------------------------------------------------------------------------------------------------------------- players

@each
@pytest.mark.parametrize("share", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_the_expert_wins_every_task(name, share):
    env, longest = envs.make(name), {"webshop": 15, "alfworld": 24, "search": 3}[name]
    for split in ALFWORLD_SPLITS if name == "alfworld" else ("train", "val"):
        for task_id in range(0, env.num_tasks(split), share):
            won, turns = play(env, lambda info: env.expert(), split=split, task_id=task_id)
            assert won and turns <= longest, (split, task_id)


def test_the_expert_wins_every_goal_in_human_words():
    env = envs.WebShop(human_goals=True)
    assert len(env.goals) >= 120 and all(play(env, lambda info: env.expert(), goal=goal)[0] for goal in env.goals)


@each
def test_the_expert_recovers_from_wherever_random_moves_lead(name):
    env, ended, stray = envs.make(name), 0, {"webshop": 4, "alfworld": 20, "search": 1}[name]
    for number in range(200):
        rng, moves = random.Random(number), iter(range(stray))

        def choose(info, rng=rng, moves=moves):
            if next(moves, None) is None:
                return env.expert()
            if name == "search":
                return rng.choice(["nothing", "<search> zzz </search>", f"<search> {info['task']} </search>"])
            return experts.random_move(info["admissible"], rng) or f"search[{info['task']}]"

        _, info = env.reset(options={"split": "train", "task_id": number})
        assert play(env, choose, limit=15 if name == "webshop" else 120, split="train", task_id=number)[0] or ended, number


@each
def test_random_play_rarely_wins(name):
    env, rng, won = envs.make(name), random.Random(0), defaultdict(list)
    for task_id in range(300):
        win = play(env, lambda info: random_action(name, info, rng), split="train", task_id=task_id)[0]
        won[env.question.task_type if name == "search" else ""].append(win)
    for kind, wins in won.items():
        assert sum(wins) / len(wins) < (0.1 if kind == "comparison" else 0.04), kind


@each
def test_the_weak_demonstrator_wins_some_tasks_of_every_type_and_far_from_all(name):
    env, won, limit = envs.make(name), defaultdict(list), 30 if name == "alfworld" else 15
    for number in range(600):
        rng = random.Random(f"weak {number}")
        win, _ = play(env, lambda info, rng=rng: env.demonstrate(rng, weak=True)[1], limit, split="train", task_id=number)
        _, info = env.reset(options={"split": "train", "task_id": number})
        won[info["task_type"]].append(win)
    rates = {kind: sum(wins) / len(wins) for kind, wins in won.items()}
    assert set(rates) == set(env.task_types) and all(0 < rate < 0.5 for rate in rates.values()), rates
    assert 0.08 < sum(rates.values()) / len(rates) < 0.35, rates


@each
def test_every_failure_mode_costs_wins_and_without_them_the_weak_demonstrator_is_the_expert(name, monkeypatch):
    env, limit = envs.make(name), 30 if name == "alfworld" else 15

    def success(**modes):
        for mode in MODES[name]:
            monkeypatch.setitem(MODES[name], mode, modes.get(mode, 0.0))
        rng = random.Random(0)
        return sum(play(env, lambda info: env.demonstrate(rng, weak=True)[1], limit, split="train", task_id=number)[0]
                   for number in range(120)) / 120

    modes = dict(MODES[name])
    assert success() == 1.0
    for mode in modes:
        assert success(**{mode: 1.0}) < 1.0, mode


@each
def test_thoughts_are_short_differ_where_actions_do_and_answers_are_read_back(name, monkeypatch):
    env, differing, rng = envs.make(name), set(), random.Random(0)
    for mode in MODES[name]:
        monkeypatch.setitem(MODES[name], mode, 0.5)
    for task_id in range(120):
        _, info = env.reset(options={"split": "train", "task_id": task_id})
        for _ in range(25):
            good, weak = env.demonstrate(rng), env.demonstrate(rng, weak=True)
            assert good[1] == env.expert() and (good == weak or good[0] != weak[0])
            for thought, action in (good, weak):
                assert 2 <= len(thought.split()) <= 9
                assert envs.parse_action(name, experts.write_answer(name, thought, action)) == (action.lower(), True)
            if good != weak:
                differing.add(" ".join(weak[0].split()[-2:]))
                assert name == "alfworld" or good[0].split()[0] != weak[0].split()[0]
            *_, terminated, truncated, info = env.step(rng.choice([good, weak])[1])
            assert info["valid"]
            if terminated or truncated:
                break
    assert len(differing) >= 3


def test_a_random_move_ends_nothing_and_needs_no_words():
    admissible = ["help", "click[buy now]", "search[<words>]"]
    assert experts.random_move([*admissible, "look"], random.Random(0)) == "look"
    assert experts.random_move(admissible, random.Random(0)) is None is experts.random_move(None, random.Random(0))


# --------------------------------------------------------------------------------------------------------------- WebShop

def test_within_a_type_only_both_attributes_and_a_price_below_the_bound_win_and_overpriced_duplicates_rank_first():
    env, duplicates = envs.WebShop(), 0
    for goal in env.goals[:300]:
        env.reset(options={"goal": goal})
        env.step(env.expert())
        same_type = [asin for asin in env.results[:10] if env.products[asin]["query"] == goal["query"]]
        for asin in same_type:
            has_both = set(goal["attributes"]) <= set(env.products[asin]["Attributes"])
            won = env.reward_of(asin, goal["goal_options"])[0] == 1
            assert won == (has_both and env.price[asin] <= goal["price_upper"])
        if env.price[env.results[0]] > goal["price_upper"]:
            assert env.results[1] == goal["asin"] and env.price[env.results[0]] - env.price[goal["asin"]] >= 50
            duplicates += 1
    assert duplicates / 300 == pytest.approx(1 / 8, abs=0.05)


def test_products_differ_from_their_neighbours_in_one_attribute_and_share_their_options():
    catalogue = generated.webshop_catalogue()
    assert len({item["asin"] for item in catalogue.items}) == len(catalogue.items) == 1026
    pairs = {(item["query"], frozenset(catalogue.attributes[item["asin"]]["attributes"][:2])) for item in catalogue.items}
    for query, pair in pairs:
        assert sum(other == query and len(pair & near) == 1 for other, near in pairs) >= 3
    options = defaultdict(set)
    for item in catalogue.items:
        options[item["query"]].add(json.dumps(item["customization_options"]))
    assert len(options) >= 50 and all(len(kinds) == 1 for kinds in options.values())


# -------------------------------------------------------------------------------------------------------------- ALFWorld

def test_splits_have_the_official_sizes_all_types_in_turn_and_no_task_twice(houses):
    env = envs.ALFWorld()
    assert [env.num_tasks(split) for split in ("train", "valid_seen", "valid_unseen", "val")] == [3553, 140, 134, 134]
    assert env.skipped("train") == {} and env.task_types == ALFWORLD_TYPES
    play_val, play_unseen = (env.reset(options={"split": split, "task_id": 5}) for split in ("val", "valid_unseen"))
    assert play_val == play_unseen
    for games in houses.values():
        assert [game.task_type for game in games] == [ALFWORLD_TYPES[i % 6] for i in range(len(games))]
    games = [game for games in houses.values() for game in games]
    assert len({(game.task, game.static, game.initial) for game in games}) == len(games)
    rooms = {split: set(map(room_of, games)) for split, games in houses.items()}
    assert rooms["valid_seen"] <= rooms["train"] and not rooms["valid_unseen"] & rooms["train"]
    assert (len(rooms["train"]), len(rooms["valid_unseen"])) == (20, 9)


def test_a_game_is_unsolved_and_its_sentence_names_what_its_goal_asks_for(houses):
    for game in houses["train"] + houses["valid_unseen"]:
        goal = experts.read_goal(game)
        assert not is_true(game.goal, game.initial) and 12 <= len(game.objects) <= 24 and 8 <= len(room_of(game)) <= 12
        assert goal.verb == {"clean": "clean", "heat": "heat", "cool": "cool"}.get(game.task_type.split("_")[1])
        assert goal.two == (game.task_type == "pick_two_obj_and_place") == (" two " in game.task)
        assert bool(goal.lamps) == (game.task_type == "look_at_obj_in_light") == ("lamp" in game.task)
        for entity in [*goal.objects, *goal.places, *goal.lamps]:
            assert game.names[entity].split()[0] in re.findall(r"\w+", game.task)
        if goal.two and len(goal.places) > 1:    # at two receptacles of a kind they are not two at one
            (obj, other, *_), (place, elsewhere, *_) = sorted(goal.objects), goal.places
            assert is_true(game.goal, {("inreceptacle", obj, place), ("inreceptacle", other, place)})
            assert not is_true(game.goal, {("inreceptacle", obj, place), ("inreceptacle", other, elsewhere)})


def test_the_household_expert_decides_by_what_the_prompt_shows_and_refuses_goals_of_other_types():
    env, answers = envs.ALFWorld(), defaultdict(Counter)
    for i, repeat in [(i, repeat) for i in range(48) for repeat in range(12)]:
        rng, past = random.Random(f"{i} {repeat}"), []
        observation, info = env.reset(options={"split": "train", "task_id": i})
        while not info["won"] and len(past) < 40:
            prompt = envs.alfworld_prompt(info["task"], past[-2:], observation, info["admissible"])
            action = env.expert()
            answers[i, prompt][action] += 1
            past.append(("", action if rng.random() < 0.9 else rng.choice(info["admissible"])))
            observation, *_, info = env.step(past[-1][1])
    counts = [count for answer in answers.values() for count in answer.values()]
    assert sum(counts) - sum(max(answer.values()) for answer in answers.values()) <= 0.001 * sum(counts)
    env.game = env.game._replace(goal=("not", ("fact", ("opened", "x"))))
    with pytest.raises(ValueError, match="can't read the goal of the task '"):
        env.expert()


# ------------------------------------------------------------------------------------------------------------- Search-QA

def test_questions_are_distinct_in_turn_of_the_three_types_and_no_entity_is_in_both_splits():
    countries, elements = generated.load_facts()
    entity_of = {element.name: element.name for element in elements}
    entity_of |= {name: country.name for country in countries for name in (country.name, country.capital)}
    entities = {}
    for split, questions in generated.search_questions().items():
        assert len({question.text for question in questions}) == len(questions) > {"train": 3000, "val": 300}[split]
        assert [question.task_type for question in questions] == list(generated.SEARCH_TYPES) * (len(questions) // 3)
        for question in questions:
            assert question.task_type == "comparison" or not generated.mentions(question.text, question.golds)
            assert all(name in question.text for name in question.names)
            assert not any(generated.mentions(question.relation, [name]) for name in question.names)
        named = [question.names for question in questions] + [
            (query,) for question in questions if question.task_type != "comparison" for query, _ in question.hops]
        entities[split] = {entity_of[name] for names in named for name in names}
    assert not entities["train"] & entities["val"] and min(map(len, entities.values())) > 50


def test_no_search_for_a_two_hop_question_finds_its_answer_and_what_the_expert_writes_was_shown():
    env = envs.SearchQA()
    for task_id, question in enumerate(generated.search_questions()["val"]):
        shown, _ = env.reset(options={"split": "val", "task_id": task_id})
        if question.task_type == "two_hop":
            found = re.sub(r"Doc \d:|\\n", " ", env.step(f"<search> {question.text} </search>")[0])
            assert not generated.mentions(found, question.golds), question.text
            env.reset(options={"split": "val", "task_id": task_id})
        while not env.ended:
            action = env.expert()
            assert f" {re.search('> (.+) <', action)[1]}" in f" {question.text}\n{shown}"
            shown = env.step(action)[0]


def test_facts_are_symmetric_and_passages_short_and_plain():
    countries, elements = generated.load_facts()
    borders = {country.name: country.borders for country in countries}
    assert all(name in borders[other] for name, others in borders.items() for other in others) and len(borders) > 190
    assert [element.number for element in elements] == list(range(1, 119))
    for entry in json.loads((generated.DATA / "facts.json").read_text(encoding="utf-8"))["countries"]:
        for text in [entry["name"], entry["capital"], entry["currency"], *entry["languages"]]:
            assert len(generated.plain(text)) == len(text), f"{text} loses a letter in ASCII"
    for title, passage in generated.fact_passages():
        assert passage.isascii() and passage.startswith(f'"{title}"\nThe ') and len(passage) < 450


@each
def test_there_are_short_skills_for_every_type_of_task_that_tell_no_answer(name):
    folder = Path(envs.__file__).parent / "data" / "skills" / name
    kinds = {"general", *envs.make(name).task_types}
    assert kinds <= {path.stem for path in folder.glob("*.md")} and (name == "search" or len(list(folder.iterdir())) == len(kinds))
    names = {question.golds[0] for split in generated.search_questions().values() for question in split} - {"I", "In", "At"}
    for path in folder.glob("*.md"):
        text = path.read_text()
        assert 0 < len(text.split()) < (150 if path.stem == "general" else 60), path
        assert not any(f" {name} " in text for name in names if not name.isdecimal())
