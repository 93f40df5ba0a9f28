"""Tests of lib/analyser.py: what the rules say of episodes made by hand, and what is read from a policy's analysis."""

import json

import pytest
from hypothesis import given, strategies as st

from lib.analyser import LESSONS, MOST, Analysis, Step, analysis_prompt, by_rules, parse_analysis

LAMP = "i need a small red lamp with size: large, and price lower than 20.00 dollars"
RESULTS = f"Instruction: [SEP] {LAMP} [SEP] Back to Search [SEP] Page 1 (Total results: 3) [SEP] Next > [SEP] " \
          "AA-1 [SEP] Galvo small red lamp [SEP] $50.0 [SEP] BB-2 [SEP] Brimo small lamp [SEP] $9.0 [SEP] " \
          "CC-3 [SEP] Velmar small red lamp [SEP] $10.0 to $30.0"


def item(title, price):
    return f"Instruction: [SEP] {LAMP} [SEP] Back to Search [SEP] < Prev [SEP] size [SEP] large [SEP] medium [SEP] " \
           f"{title} [SEP] Price: ${price} [SEP] Rating: N.A. [SEP] Description [SEP] Buy Now"


FIT, DEAR, PLAIN = item("Velmar small red lamp", 10.0), item("Galvo small red lamp", 50.0), item("Brimo small lamp", 9.0)
FACTS = '\n<information>{"result": "Doc 1: \\"Peru\\"\\nThe country Peru lies in South America."}</information>\n'
START = "You are in the middle of a room. Looking quickly around you, you see a desk 1, a drawer 1, and a fridge 1."
DESK = "You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 1."


def play(*pairs):
    """(observation, action) pairs -> steps; an action that begins with "!" did nothing."""
    return [Step(seen, f"<think> so</think>{action}", action.lstrip("!"), action[:1] not in ("!", ""), 0.0)
            for seen, action in pairs]


def lessons(*keys):
    return " ".join(LESSONS[key] for key in keys)


SEARCHED = ("WebShop", "search[a small red lamp]"), (RESULTS, "click[cc-3]")
CASES = {  # name: (environment, task, won, steps, the analysis)
    "a perfect purchase": (
        "webshop", LAMP, True, [*SEARCHED, (FIT, "click[large]"), (FIT, "click[buy now]")],
        (lessons("options") + " What worked: search[a small red lamp], then click[cc-3], then click[large], then "
         "click[buy now].", {})),
    "an option not chosen": ("webshop", LAMP, False, [*SEARCHED, (FIT, "click[buy now]")],
                             (lessons("options"), {2: "Choose large before you buy."})),
    "the bare product searched for, and one that costs too much": (
        "webshop", LAMP, False, [("WebShop", "search[lamp]"), (RESULTS, "click[aa-1]"), (DEAR, "click[buy now]")],
        (lessons("query", "price", "fit"),
         {0: "Search with every detail of the request: a small red lamp.", 1: "Take the one that fits: click[cc-3].",
          2: "This one costs too much: go back and take one that fits."})),
    "a product that lacks a detail": (
        "webshop", LAMP, False, [SEARCHED[0], (RESULTS, "click[bb-2]"), (PLAIN, "click[large]"), (PLAIN, "!x")],
        (lessons("fit", "buy", "invalid"),
         {1: "Take the one that fits: click[cc-3].", 2: "This one is not red: go back and take one that fits.",
          3: "Buy a product that fits before the turns are over."})),
    "a detour that a success took": (
        "webshop", LAMP, True, [SEARCHED[0], (RESULTS, "click[bb-2]"), (PLAIN, "click[< prev]"), SEARCHED[1],
                                (FIT, "click[large]"), (FIT, "click[large]"), (FIT, "click[buy now]")],
        (lessons("options") + " What worked: search[a small red lamp], then click[cc-3], then click[large], then "
         "click[large], then click[buy now].", {5: "Do not repeat click[large]: it changed nothing."})),
    "a mug heated and placed": (
        "alfworld", "put a hot mug in fridge.", True,
        [(START, "go to desk 1"), (DESK, "take mug 1 from desk 1"), ("You pick up the mug 1.", "go to microwave 1"),
         ("You arrive at microwave 1. The microwave 1 is closed.", "heat mug 1 with microwave 1"),
         ("You heat the mug 1.", "look"), ("You are facing the microwave 1.", "go to fridge 1"),
         ("You arrive at fridge 1. The fridge 1 is closed.", "open fridge 1"),
         ("You open the fridge 1. The fridge 1 is open. In it, you see nothing.", "put mug 1 in/on fridge 1")],
        (lessons("heat") + " What worked: go to desk 1, then take mug 1 from desk 1, then go to microwave 1, then heat "
         "mug 1 with microwave 1, then go to fridge 1, then open fridge 1, then put mug 1 in/on fridge 1.",
         {4: "Bring the mug to the fridge and place it there."})),
    "a mug brought cold, after a closed drawer and a pen": (
        "alfworld", "heat some mug and put it in fridge.", False,
        [(START, "go to drawer 1"), ("You arrive at drawer 1. The drawer 1 is closed.", "go to desk 1"),
         (DESK, "take pen 1 from desk 1"), ("You pick up the pen 1 from the desk 1.", "move pen 1 to desk 1"),
         ("You move the pen 1 to the desk 1.", "take mug 1 from desk 1"), ("You pick up the mug 1.", "go to fridge 1")],
        (lessons("search", "take", "heat"), {1: "Open drawer 1 and look inside.", 2: "Take mug 1 now.",
                                             5: "Heat the mug with the microwave first."})),
    "one of two, then waiting": (
        "alfworld", "find two pen and put them in drawer.", False,
        [(START, "look"), (START, "go to desk 1"), (DESK, "take pen 1 from desk 1"), ("Done.", "!move pen 1 to desk"),
         ("Nothing happens.", "go to drawer 1"), ("You arrive at drawer 1. The drawer 1 is closed.", "open drawer 1"),
         ("The drawer 1 is open. In it, you see nothing.", "move pen 1 to drawer 1"), ("You move it.", "look")],
        (lessons("wait", "invalid", "two"),
         {0: "Search another place for the pen: go to desk 1.", 3: "Bring the pen to the drawer and place it there.",
          7: "Search for another pen and bring it to the same place."})),
    "a lamp not turned on": (
        "alfworld", "look at pen under the desklamp.", False,
        [(START, "go to desk 1"), (DESK.replace("mug 1", "desklamp 1"), "take pen 1 from desk 1"),
         ("You pick up the pen 1 from the desk 1.", "examine pen 1")],
        (lessons("lamp"), {2: "Turn on the lamp: use desklamp 1."})),
    "an answer from memory": ("search", "What is the continent of Peru?", False, [("?", "<answer> Peru </answer>")],
                              (lessons("memory"), {0: "Search for Peru first, then answer."})),
    "a search for the topic, twice": (
        "search", "What is the continent of Peru?", False,
        [("?", "<search> continent </search>"), (FACTS, "<search> continent </search>"), (FACTS, "!"),
         (FACTS, "<answer> Asia </answer>")],
        (lessons("topic", "repeat", "invalid", "words"),
         {0: "Search for Peru, not for the topic.", 1: "Search for something else than before."})),
    "one side of a comparison": (
        "search", "Which has more neighbours, Peru or Chad?", False,
        [("?", "<search> Peru </search>"), (FACTS, "<answer> Peru </answer>")],
        (lessons("both"), {0: "Search for both names at once: Peru and Chad.",
                           1: "Compare the two numbers of Peru and Chad before you answer."})),
    "the first of two hops": (
        "search", "What is the currency of the country whose capital is Lima?", False,
        [("?", "<search> Lima </search>"), (FACTS, "<answer> Peru </answer>")],
        (lessons("hops"), {1: "Search for the name that was found first, then answer."})),
    "an answer found": (
        "search", "What is the continent of Peru?", True,
        [("?", "<search> Peru </search>"), (FACTS, "<answer> South America </answer>")],
        (lessons("words") + " What worked: search for peru.", {}))}


@pytest.mark.parametrize("name", CASES)
def test_the_rules_say_what_worked_or_what_went_wrong(name):
    env, task, won, pairs, expected = CASES[name]
    assert by_rules(env, task, won, play(*pairs)) == Analysis(*expected)


PIECES = st.sampled_from([FIT, RESULTS, START, DESK, FACTS, "", "[[[ [SEP] $ [SEP] price: [SEP]", "The 1 is open.",
                          "\ud800\u202eé\x00", "click[", "click[cc-3]", "click[buy now]", "search[]", "go to desk 1",
                          "take pen 1 from desk 1", "move", "put  ", "<search> ( </search>", "<answer></answer>", LAMP,
                          "put two pen in desk.", "$9,9,.", "with a: b", "a" * 5000, "of a and " * 800, "," * 5000])
STEPS = st.lists(st.builds(Step, PIECES | st.text(), st.just(""), PIECES | st.text(), st.booleans(), st.just(0.0)),
                 max_size=9)


@given(st.sampled_from(sorted(MOST)), PIECES | st.text(), st.booleans(), STEPS)
def test_no_text_makes_the_rules_fail_or_say_too_much(env, task, won, steps):
    found = by_rules(env, task, won, steps)
    skills = found.step_skills if found else {}
    assert len(skills) <= MOST[env] and skills.keys() <= set(range(len(steps))) and (steps or not found)
    assert all(text.strip() and "\n" not in text and len(text) < 400 for text in skills.values())


def test_the_prompt_shows_outcome_returns_and_a_refused_answer_in_part():
    steps = [Step("a {room}", "<think> go</think>", "look", True, 9.5)]
    prompt = analysis_prompt("{task}", True, steps, 5)
    assert all(text in prompt for text in ("Task: {task}", "success", "Step 0, return 9.50", "a {room}", "at most 1 "))
    again = analysis_prompt("t", False, steps, 5, "no object", "x" + "y" * 2000)
    assert "failure" in again and "no object" in again and "xy" not in again and "y" * 2000 in again


WHOLE = {"episode_summary": "s", "episode_skill": "Buy it.", "step_skills": {"0": "Go.", "2": "Stop."}}


@pytest.mark.parametrize("text", [
    json.dumps(WHOLE), f"Here's what I found:\n```json\n{json.dumps(WHOLE, indent=1)}\n``` Isn't it {{good}}?", str(WHOLE),
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


@given(st.text() | st.dictionaries(st.text(), st.text()).map(lambda skills: json.dumps(WHOLE | {"step_skills": skills})),
       st.integers(0, 5))
def test_no_answer_gives_more_skills_than_asked_for(text, most):
    try:
        found = parse_analysis(text, range(3), most)
    except ValueError:
        return
    assert len(found.step_skills) <= most and found.step_skills.keys() <= {0, 1, 2}
