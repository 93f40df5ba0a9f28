"""Tests of lib/analyser.py: what the rules say of episodes made by hand, and what is read from a policy's analysis."""

import contextlib
import json

import pytest
from hypothesis import given, strategies as st

from lib.analyser import LESSONS, MOST, Analysis, Step, analysis_prompt, by_rules, choose, parse_analysis

LAMP = "i need a small red lamp with size: large, and price lower than 20.00 dollars"
RESULTS = "Next > [SEP] AA-1 [SEP] Galvo small red lamp [SEP] $50.0 [SEP] BB-2 [SEP] Brimo small lamp [SEP] $9.0 " \
          "[SEP] CC-3 [SEP] Velmar small red lamp [SEP] $10.0 to $30.0"
ITEM = "< Prev [SEP] size [SEP] large [SEP] medium [SEP] {} lamp [SEP] Price: ${} [SEP] Buy Now"
FIT, DEAR, PLAIN = ITEM.format("small red", 10), ITEM.format("small red", 50), ITEM.format("small", 9)
FACTS = '\n<information>{"result": "Doc 1: \\"Peru\\"\\nThe country Peru lies in South America."}</information>\n'
ROOM = "You are in the middle of a room. Looking quickly around you, you see a desk 1, a drawer 1, and a fridge 1."
DESK = "You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 1."
DRAWER, TAKEN = "You arrive at drawer 1. The drawer 1 is closed.", "You pick it up."

# (observation, action) pairs -> steps; an action that begins with "!" did nothing
play = lambda pairs: [Step(seen, "", action.lstrip("!"), action[:1] != "!", 0.0) for seen, action in pairs]
lessons = lambda *keys: " ".join(LESSONS[key] for key in keys)
START, OPENED, LARGE = ("", "search[a small red lamp]"), (RESULTS, "click[cc-3]"), (FIT, "click[large]")
PERU, MEDIUM = ("?", "<search> Peru </search>"), (FIT, "click[medium]")
ASK, TOPIC = "What is the continent of Peru?", "<search> continent </search>"
CASES = {  # name: (environment, task, won, steps, episode skill, step skills)
    "a perfect purchase after a detour": (
        "webshop", LAMP, True,
        [START, (RESULTS, "click[bb-2]"), (PLAIN, "click[< prev]"), OPENED, LARGE, LARGE, (FIT, "click[buy now]")],
        lessons("query", "price", "options"), {5: "Do not repeat click[large]: it changed nothing."}),
    "wrong options": (
        "webshop", LAMP, False, [OPENED, MEDIUM, LARGE, MEDIUM, (FIT, "click[buy now]")],
        lessons("options", "buy", "fit"), {1: "Choose large before you buy.", 3: "All is chosen: buy now.",
                                           4: "Compare every detail with the request before you buy."}),
    "the bare product searched for, and one that costs too much": (
        "webshop", LAMP, False, [("", "search[lamp]"), (RESULTS, "click[aa-1]"), (DEAR, "click[buy now]")],
        lessons("query", "price", "fit"),
        {0: "Search with every detail of the request: a small red lamp.", 1: "Take the one that fits: click[cc-3].",
         2: "This one costs too much: go back and take one that fits."}),
    "a product that lacks a detail": (
        "webshop", LAMP, False, [START, (RESULTS, "click[bb-2]"), (PLAIN, "click[large]"), (PLAIN, "!x")],
        lessons("fit", "buy", "invalid"),
        {1: "Take the one that fits: click[cc-3].", 2: "This one is not red: go back and take one that fits.",
         3: "Buy a product that fits before the turns are over."}),
    "a mug heated and placed": (
        "alfworld", "put a hot mug in fridge.", True,
        [(ROOM, "go to desk 1"), (DESK, "take mug 1 from desk 1"), (TAKEN, "go to microwave 1"),
         ("The microwave 1 is closed.", "heat mug 1 with microwave 1"), ("You heat the mug 1.", "look"),
         ("You are facing the microwave 1.", "go to fridge 1"), ("The fridge 1 is closed.", "open fridge 1"),
         ("The fridge 1 is open. In it, you see nothing.", "put mug 1 in/on fridge 1")],
        lessons("search", "take", "heat"), {4: "Bring the mug to the fridge and place it there."}),
    "a closed drawer passed, a pen taken, and a mug brought cold": (
        "alfworld", "heat some mug and put it in fridge.", False,
        [(ROOM, "go to drawer 1"), (DRAWER, "go to desk 1"), (DESK, "take pen 1 from desk 1"), (TAKEN, "look"),
         ("You see nothing.", "move pen 1 to desk 1"), ("Moved.", "take mug 1 from desk 1"), (TAKEN, "go to fridge 1")],
        lessons("search", "take", "other", "heat"),
        {1: "Open drawer 1 and look inside.", 2: "Take mug 1 now.", 3: "Put pen 1 down and look for the mug.",
         6: "Heat the mug with the microwave first."}),
    "one of two, then waiting": (
        "alfworld", "find two pen and put them in drawer.", False,
        [(ROOM, "look"), (ROOM, "go to desk 1"), (DESK, "take pen 1 from desk 1"), (TAKEN, "!move pen 1 to desk"),
         ("Nothing happens.", "go to drawer 1"), (DRAWER, "open drawer 1"),
         ("The drawer 1 is open. In it, you see nothing.", "move pen 1 to drawer 1"), ("Moved.", "look")],
        lessons("wait", "invalid", "two"),
        {0: "Search another place for the pen: go to desk 1.", 3: "Bring the pen to the drawer and place it there.",
         7: "Search for another pen and bring it to the same place."}),
    "a lamp not turned on": ("alfworld", "look at pen under the mug.", False,
                             [(ROOM, "go to desk 1"), (DESK, "take pen 1 from desk 1"), (TAKEN, "examine pen 1")],
                             lessons("lamp"), {2: "Turn on the lamp: use mug 1."}),
    "an answer from memory": ("search", "What is the symbol of radon?", False, [("?", "<answer> Radon </answer>")],
                              lessons("memory"), {0: "Search for radon first, then answer."}),
    "a search for the topic, twice": (
        "search", ASK, False, [("?", TOPIC), (FACTS, TOPIC), (FACTS, "!"), (FACTS, "<answer> Asia </answer>")],
        lessons("topic", "repeat", "invalid", "words"),
        {0: "Search for Peru, not for the topic.", 1: "Search for something else than before."}),
    "one side of a comparison": (
        "search", "Which has more neighbours, Peru or Chad?", False, [PERU, (FACTS, "<answer> Peru </answer>")],
        lessons("both"), {0: "Search for both names at once: Peru and Chad.",
                          1: "Compare the two numbers of Peru and Chad before you answer."}),
    "the first of two hops": ("search", "What is the continent of the only neighbour of Peru?", False,
                              [PERU, (FACTS, "<answer> Peru </answer>")], lessons("hops"),
                              {1: "Search for the name that was found first, then answer."}),
    "an answer found": ("search", ASK, True, [PERU, (FACTS, "<answer> America </answer>")],
                        lessons("memory", "topic", "words"), {}),
    "an answer to something else": ("search", ASK, False, [PERU, (FACTS, "<answer> Peru </answer>")], lessons("check"),
                                    {1: "Check that what was found tells exactly what is asked."}),
    "no answer": ("search", ASK, False, [PERU, (FACTS, "<search> in Peru </search>")], lessons("late"),
                  {1: "Answer now, with the words that were found."})}


@pytest.mark.parametrize("name", CASES)
def test_the_rules_say_what_worked_or_what_went_wrong(name):
    env, task, won, pairs, *expected = CASES[name]
    assert by_rules(env, task, won, play(pairs)) == Analysis(*expected)


def test_the_first_fault_of_each_kind_comes_before_further_ones():
    assert choose([(0, "a", "x"), (1, "a", "y"), (2, "b", "z"), (3, "c", "x")], 2) == {0: "x", 2: "z"}


TEXTS = st.text() | st.sampled_from([
    FIT, RESULTS, ROOM, DESK, FACTS, LAMP, "[[[ [SEP] $ [SEP] price: [SEP]", "\ud800\u202eé", "click[", "click[cc-3]",
    "click[buy now]", "search[]", "go to desk 1", "take pen 1 from desk 1", "move", "put  ", "<search> ( </search>",
    "<answer></answer>", "put two pen in desk.", "$9,9,.", "with a: b", "a" * 5000, "of a and " * 800, "," * 5000])
STEPS = st.lists(st.builds(Step, TEXTS, st.just(""), TEXTS, st.booleans(), st.just(0.0)), max_size=9)


@given(st.sampled_from(sorted(MOST)), TEXTS, st.booleans(), STEPS)
def test_no_text_makes_the_rules_fail_or_say_too_much(env, task, won, steps):
    found = by_rules(env, task, won, steps)
    skills = found.step_skills if found else {}
    assert len(skills) <= MOST[env] and skills.keys() <= set(range(len(steps))) and (steps or not found)
    assert all(text.strip() and "\n" not in text and len(text) < 400 for text in skills.values())


def test_the_prompt_shows_the_episode_with_its_returns_and_the_end_of_a_refused_answer():
    prompt = analysis_prompt("{task}", True, steps := [Step("a {room}", "go", "look", True, 9.5)], 5)
    assert all(text in prompt for text in ("Task: {task}", "success", "Step 0, return 9.50", "a {room}", "at most 1 "))
    again = analysis_prompt("t", False, steps, 5, "no object", "x" + "y" * 2000)
    assert "failure" in again and "no object" in again and "xy" not in again and "y" * 2000 in again


WHOLE = {"episode_summary": "s", "episode_skill": "Buy it.", "step_skills": {"0": "Go.", "2": "Stop."}}


@pytest.mark.parametrize("text", [
    json.dumps(WHOLE), str(WHOLE), f"What's \"new:\n```json\n{json.dumps(WHOLE, indent=1)}\n``` Isn't it {{good}}?",
    json.dumps(WHOLE).replace("}", ", }"), f'{{"other": 1}} {json.dumps({"answer": WHOLE})} {{"episode_skill": "No."}}',
    '{"episode_skill": " Buy it. ", "step_skills": {0: "Go.", "x": "a", "7": "b", 1: " ", "1.0": "c", "2": "Stop."}}',
    json.dumps(WHOLE | {"step_skills": {"1": 5, "0": "Go.", "2": "Stop.", "3": "Too many."}})])
def test_an_analysis_is_read_whatever_surrounds_it(text):
    assert parse_analysis(text, range(4), 2) == Analysis("Buy it.", {0: "Go.", 2: "Stop."})


@pytest.mark.parametrize(("text", "why"), [
    ("", "no JSON object"), ("{" * 9000 + '"episode_skill"', "no JSON object"), ('{"a":' * 9000, "no JSON object"),
    ('[1, {"step_skills": {}}]', "no JSON object"), ('{"episode_skill": " "}', "blank"),
    ('{"episode_skill": ["a"]}', "not a text"), ('{"episode_skill": "a", "step_skills": ["b"]}', "step_skills")])
def test_an_analysis_that_cannot_be_used_is_refused_with_the_reason(text, why):
    with pytest.raises(ValueError, match=why):
        parse_analysis(text, range(4), 2)


@given(st.text() | st.dictionaries(st.sampled_from("01234 "), st.text()).map(
    lambda skills: json.dumps(WHOLE | {"step_skills": skills})), st.integers(0, 3))
def test_no_answer_gives_more_skills_than_asked_for(text, most):
    with contextlib.suppress(ValueError):
        skills = parse_analysis(text, range(3), most).step_skills
        assert len(skills) <= most and skills.keys() <= {0, 1, 2}
