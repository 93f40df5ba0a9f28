"""Text environments of the paper as gymnasium environments: plain action strings in, text observations out.

`reset(seed=, options=)` returns (observation, info) and `step(action)` returns (observation, reward, terminated,
truncated, info). A task is a pure function of (data, split, task_id). Every `info` has `task` (the instruction),
`task_id`, `task_type`, `admissible` (actions that would do something now; None where any text may be written), `valid`
(whether the last action did something), `won` and `score`. Nothing random is drawn outside the environment's own
generators. For each environment there follow its prompts, its parser, its rules and its class.
"""
import functools
import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
from rapidfuzz import fuzz, utils

from lib import experts
from lib.catalogue import official_shop, shop_of, split_goals, weighted_goal
from lib.generated import SEARCH_TYPES, bundled_corpus, game_types, generate_game, search_questions, webshop_catalogue
from lib.official import (
    ALFWORLD_SPLITS,
    ALFWORLD_TYPES,
    APPLIANCES,
    BUTTONS,
    COLORS,
    GOAL_FIELDS,
    NOT_NOUNS,
    TASK_PREFIX,
    check_folder,
    contents,
    find_games,
    fits,
    held_object,
    is_accessible,
    is_true,
    load_game,
    load_questions,
    nfc,
    normalize_answer,
    place_of,
    question_files,
)
from lib.retrieval import HITS, Retriever, bm25, corpus_search, read_corpus
from lib.server import main
from lib.spaces import AnyText

# ---------------------------------------------------------------------------------------------------------------------
# What the three environments share
# ---------------------------------------------------------------------------------------------------------------------

class TextEnv(gymnasium.Env):
    """Spaces, checks of calls and scripted players.

    Subclasses set the attributes below and define two methods: `types_of`, split -> the `task_type` of each of its
    tasks in the order of their numbers, and `_observe`, () -> the current observation, which `render` shows.
    """
    metadata = {"render_modes": ["ansi"], "render_fps": 1}
    label = example = ""                 # the environment's name and an action, for errors
    player: Callable                     # (env, rng or None) -> (thought, action), see lib/experts.py

    def __init__(self, render_mode=None):
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode must be None or 'ansi', not {render_mode!r}.")
        self.render_mode = render_mode
        self.observation_space, self.action_space = AnyText(), AnyText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.over = False                # whether the episode has ended

    def pay(self, reward, ended):
        """The reward, which is 0 after the end of an episode; ended: whether this step ends it."""
        reward, self.over = 0.0 if self.over else reward, self.over or ended
        return reward

    def render(self):
        """The current observation, where render_mode is "ansi"."""
        if not hasattr(self, "over"):
            raise gymnasium.error.ResetNeeded(f"No episode of {self.label} is running; call reset before render.")
        return self._observe() if self.render_mode == "ansi" else None

    def check_options(self, options, alone=None):
        """The options of `reset` as a dict: "split" and "task_id", or the option `alone` by itself."""
        options = options or {}
        known = {"split", "task_id"} | ({alone} if alone else set())
        if options.keys() - known or alone in options and len(options) > 1:
            also = f", or {alone!r} by itself" if alone else ""
            raise ValueError(f"{self.label} resets to options 'split' and 'task_id'{also}, not to {list(options)}.")
        return options

    def check_split(self, split, splits):
        if split not in splits:
            raise ValueError(f"{self.label} has no split {split!r}; its splits are {', '.join(splits)}.")
        return split

    def choose_task(self, options, split, size):
        """The number of a task in a split of `size` tasks: options["task_id"], or drawn where there is none."""
        task_id = options.get("task_id")
        if not size:
            raise ValueError(f"{self.label} has no task in split {split!r}; choose another split or more data.")
        if task_id is None:
            task_id = self.np_random.integers(size)
        if not isinstance(task_id, (int, np.integer)) or not 0 <= task_id < size:
            raise ValueError(f"{self.label} has no task {task_id!r} in split {split!r}; give a number from 0 to "
                             f"{size - 1}.")
        return int(task_id)

    def check_action(self, action, running):
        if not isinstance(action, str):
            raise TypeError(f"{self.label} takes an action as a string such as {self.example!r}, not as "
                            f"{type(action).__name__}.")
        if not running:
            raise gymnasium.error.ResetNeeded(f"No episode of {self.label} is running; call reset before step.")

    def num_tasks(self, split):
        return len(self.types_of(split))

    def expert(self):
        """A good next action, from any state of a task that the scripted players can read."""
        return self.player()[1]

    def demonstrate(self, rng, weak=False):
        """The next (thought, action) of the expert or of the weak demonstrator; rng: `random.Random`."""
        return self.player(rng if weak else None)


def prompt_head(role, skills):
    """The lines with which a prompt begins."""
    return [role, "Skills:", skills.strip()] if skills else [role]


def last_steps(history, shown):
    """The lines about the last (observation, action) pairs; shown: observation -> its text in a prompt."""
    lines = [f"- on: {shown(seen)}\n  {action}" if seen else f"- {action}" for seen, action in history]
    return ["Last steps:", *lines] if lines else []


def full_prompt(context, skills, official, *, rules, show, now, actions, how, example):
    """The user message of one turn for an instruct model: rules, skills, task, last steps, this step, how to answer.

    context: an `sdar.Context`. rules: the role in one line, then the rules. show: an earlier observation -> its text,
    "" to leave it out; now: that of the current one. actions: the possible ones. how: to act. example: of an answer.
    official: what the released prompts tell, in their order: no rules, no number of turns left, no example.
    """
    turn, past = context.turn, context.history
    steps = [f"Steps taken so far: {turn - 1}" + f" (the last {len(past)} shown)" * bool(past)] * (turn > 1)
    for number, (seen, action) in enumerate(past, turn - len(past)):
        steps += [f"Observation {number}:\n{show(seen)}"] * bool(show(seen))
        steps += [f"Action {number}: {action or '(none, since the answer did not keep the format)'}"]
    limit = "" if official else f" of at most {context.max_turns}; steps left after it: {context.max_turns - turn}"
    return "\n\n".join(filter(None, [
        rules.partition("\n")[0] if official else rules, skills and f"Advice for such tasks:\n{skills.strip()}",
        f"Task: {context.task}", "\n".join(steps), f"This is step {turn}{limit}.",
        now and f"Observation {turn}:\n{now}", actions and "\n".join(["Possible actions:", *actions]),
        "First reason step by step inside <think> </think>: what the task still needs, what you know by now, and what "
        f"to do next. Then {how}. Write nothing else.",
        "" if official else f"Your answer must have the form of this example from another task:\n{example}"]))


def read_answer(text, kinds, tags):
    """An answer -> (kind, what it says) if it is one closed thought, then one block <kind>..</kind>, and nothing else.

    kinds: of blocks that are allowed. A block is not blank and holds none of `tags`; a thought may hold any text
    about actions. ("", "") for every other answer.
    """
    block = rf"(?ai:<(?P<kind>{'|'.join(kinds)})>(?P<inner>((?!</?({'|'.join(tags)})>).)*)</(?P=kind)>)"
    match = re.fullmatch(rf"\s*<think>((?!</?think>).)*</think>\s*{block}\s*", text, re.DOTALL)
    return (match["kind"].lower(), match["inner"].strip()) if match else ("", "")


def parse_tagged(text, tail, official):
    """An answer with <action> -> (action, valid), lower-cased: see `parse_webshop`."""
    if not official:
        action = read_answer(text, ["action"], ["think", "action"])[1].lower()
        return action, bool(action)
    lower = text.lower()
    start, end = lower.find("<action>"), lower.find("</action>")
    if start < 0 or end < 0:
        return lower[-tail:], False
    valid = "<think>" in text and "</think>" in text and not re.search("[\u4e00-\u9fff]", text)
    return lower[start + len("<action>"):end].strip(), valid


# ---------------------------------------------------------------------------------------------------------------------
# WebShop (Yao et al. 2022, arXiv 2207.01206; rules of princeton-nlp/WebShop in its text modes)
#
# A shopper reads an instruction, searches a catalogue, opens items, chooses options and buys. Everything that the
# original shows or counts is reproduced; only its search engine (Lucene) is replaced by a BM25 of the same constants.
# ---------------------------------------------------------------------------------------------------------------------

NOT_BUTTONS = str.maketrans("[]", "()")  # brackets of a title, which nobody can click


def page_texts(observation):
    """The visible texts of a page, joined by " [SEP] " in an observation, without the task that stands above them."""
    parts = observation.split(" [SEP] ")
    parts = parts[parts[0] == "WebShop":]
    return parts[2 if parts[:1] == ["Instruction:"] else 0:]


def webshop_page(observation, admissible):
    """A page as short lines: what can be clicked, alone, stands in brackets; the task, shown elsewhere, is left out.

    observation: visible texts joined by " [SEP] ". admissible: what can be clicked, as labels or as click[label].

    >>> print(webshop_page("Instruction: [SEP] i need a lamp [SEP] Back to Search [SEP] < Prev [SEP] color [SEP] red"
    ...                    " [SEP] Galvo lamp [SEP] Price: $9.5 [SEP] Buy Now",
    ...                    ["click[back to search]", "click[< prev]", "click[buy now]", "click[red]"]))
    [back to search] [< prev]
    color [red]
    Galvo lamp Price: $9.5
    [buy now]
    """
    labels = {item.removeprefix("click[").removesuffix("]") if item.startswith("click[") else item
              for item in admissible}
    parts = page_texts(observation)
    kinds = ["text" if part.lower() not in labels else "button" if part.lower() in BUTTONS else "link"
             for part in parts]
    on_results = "next >" in labels
    page = ""
    for i, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
        before = kinds[i - 1] if i else None
        after = kinds[i + 1] if i + 1 < len(parts) else None
        if on_results:
            new_line = kind == "link"
        else:  # an option's name, the title or text below a row of brackets, a row of buttons below a text
            new_line = kind == "text" and (before != "text" or after == "link") or kind == "button" and before != kind
        page += "\n" if new_line else " "
        page += part.translate(NOT_BUTTONS) if kind == "text" else f"[{part.lower()}]"
    return page.strip()


def webshop_prompt(task, history, observation, admissible, skills=""):
    """The user message of one turn.

    task: the instruction. history: the last (observation, action) pairs, oldest first; of a pair with the observation
    "" only the action is shown. An earlier page is shown as text alone, since its buttons are gone. admissible: what
    can be clicked now. skills: text, may be "".
    """
    return "\n".join([
        *prompt_head("You shop online. Find what the task asks for and buy it.", skills),
        *last_steps(history, lambda seen: webshop_page(seen, [])),
        "Page:", webshop_page(observation, admissible), f"Task: {task}",
        "Think in <think> </think>, then act in <action> </action>: search[words], or click[label] with a label in "
        "brackets."])


ACT = "give exactly one of the possible actions inside <action> </action>"
WEBSHOP_EXAMPLE = "<think>The second one fits and 45 is below 60: I open it.</think>\n<action>click[b01abcdef]</action>"
WEBSHOP_RULES = """You are shopping in an online store: find a product that is all the task asks for, and buy it.
- search[words] lists the products that fit the words best, at most 50, ten per page. It can be done on every page.
- click[label] presses what stands in [brackets] on the page: the id of a product opens it, a value beside the name of \
an option chooses it, description and features tell more, next > turns the page, and < prev goes back.
- Of each option one value can be chosen. The page does not show which one is, and a new list of products forgets it.
- click[buy now] buys the open product as chosen and ends the task. Kind, features, options and price must all fit.
- Any other action changes nothing and costs a step."""
MOST_LISTED = 40  # actions; for the others, the brackets on the page have to do


def webshop_full_prompt(context, skills="", official=False):
    """`full_prompt` in the shop. Earlier pages, and the current one with official, are their texts in a row."""
    show = lambda seen: (" [SEP] " if official else " | ").join(page_texts(seen))
    actions = list(context.admissible)
    if official:  # a search is offered where there is a search bar
        actions = actions[not context.observation.startswith("WebShop"):]
    elif len(actions) > MOST_LISTED:
        actions[MOST_LISTED:] = ["click[any other label in brackets on the page]"]
    now = show(context.observation) if official else webshop_page(context.observation, context.admissible)
    return full_prompt(context, skills, official, rules=WEBSHOP_RULES, show=show, now=now, actions=actions, how=ACT,
                       example=WEBSHOP_EXAMPLE)


def parse_webshop(text, *, official=False):
    """Splits an answer into the action, lower-cased, and whether the answer is valid; an invalid one's action is "".

    A valid answer is one closed <think>..</think>, then one <action>..</action> that is not blank, and nothing else.
    official: as in verl-agent, the first pair of <action> tags counts wherever it stands, without one the last 20
    characters; <think> and </think> somewhere and no Chinese character make it valid.

    >>> parse_webshop("<think>i should search</think><action> search[Red shirt] </action>")
    ('search[red shirt]', True)
    >>> parse_webshop("<action>click[buy now]</action>"), parse_webshop("click[buy now]", official=True)
    (('', False), ('click[buy now]', False))
    """
    action, valid = parse_tagged(text, 20, official)
    blank = not official and re.fullmatch(r"search\[\s*\]", action)  # it would open an empty results page
    return ("", False) if blank else (action, valid)


WEBSHOP_MAX_STEPS = 15
HITS_PER_PAGE = 10
SUB_PAGES = ("description", "features", "reviews", "attributes")


def split_action(action):
    """Split `name[argument]` at the last "[" and the last "]" after it; (action, None) where it has no such form."""
    match = re.match(r"(.+)\[(.+)\]", action)
    return match.groups() if match else (action, None)


def normalize_color(value):
    """The first colour word found inside `value` (a string, or a tuple that holds the word), else `value` itself."""
    return next((color for color in COLORS if color in value), value)


def token_set_ratio(a, b):
    """thefuzz's token_set_ratio, 0..100: Latin-1 above ASCII is deleted, other scripts are kept; tuples as `str`."""
    a, b = (re.sub("[\x80-\xff]", "", nfc(str(text))) for text in (a, b))
    return round(fuzz.token_set_ratio(a, b, processor=utils.default_process))


@functools.lru_cache(maxsize=1)
def noun_tagger():
    """spaCy's small English model, or None where it is not installed."""
    try:
        import spacy
        return spacy.load("en_core_web_sm")
    except (ImportError, OSError):       # OSError is what spaCy raises for a model that is not installed
        return None


def nouns_by_rule(title):
    """Every purely alphabetic word of two letters or more, lower-cased, that is not in `NOT_NOUNS`.

    Titles are mostly nouns, so this keeps a few adjectives too many, which match or miss in both titles alike.
    """
    words = re.findall(r"[^\W_]+", nfc(title.lower()))
    return [word for word in words if word.isalpha() and len(word) > 1 and word not in NOT_NOUNS]


@functools.lru_cache(maxsize=65536)
def title_nouns(title):
    """The lower-cased nouns of a product title, in order and with repetitions.

    spaCy's en_core_web_sm decides where it is installed (common and proper nouns), `nouns_by_rule` otherwise.
    """
    tagger = noun_tagger()
    if tagger is None:
        return nouns_by_rule(title)
    return [token.text.lower() for token in tagger(title) if token.pos_ in ("NOUN", "PROPN")]


# Reward

def type_reward(bought, goal, nouns):
    """How far the product is of the wanted kind: r_type in {0, 0.1, 0.5, 1} and what decides it."""
    bought_nouns, goal_nouns = nouns(bought["name"]), nouns(goal["name"])
    # Repeated nouns count in the denominator only, so a title can score below 1 against itself.
    title_score = len(set(bought_nouns) & set(goal_nouns)) / len(goal_nouns) if goal_nouns else 0.2
    levels = [{level.strip() for level in item["product_category"].split("›")} for item in (bought, goal)]
    query_match = bought["query"] == goal["query"]
    category_match = len(levels[0] & levels[1]) >= 2
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    if title_score < 0.1:
        r_type = 0.1 if title_score else 0.0
    return {"r_type": r_type, "query_match": query_match, "category_match": category_match, "title_score": title_score}


def count_attributes(bought, wanted):
    """How many wanted attributes the product has: by fuzzy match, or literally in its texts."""
    texts = [nfc(text.lower()) for text in (bought["Title"], " ".join(bought["BulletPoints"]), bought["Description"])]
    return sum(any(token_set_ratio(has, wish) > 85 for has in bought["Attributes"])
               or any(nfc(wish) in text for text in texts) for wish in wanted)


def count_options(chosen, wanted):
    """How many wanted options were chosen. A synthetic goal wants (name, value) pairs, compared as Python text."""
    chosen = [normalize_color(value) for value in chosen.values()]
    wanted = [normalize_color(wish) for wish in (wanted.items() if isinstance(wanted, dict) else wanted)]
    return sum(any(token_set_ratio(value, wish) > 85 for value in chosen) for wish in wanted)


def webshop_reward(bought, goal, options, price, *, nouns=None):
    """The graded reward of a purchase, 0..1, and its parts (web_agent_site/engine/goal.py, get_reward).

    bought: product as loaded; goal: as in `WebShop.goals`; options: {name: value} chosen; price: of the product in
    dollars; nouns: title -> lower-cased nouns with repetitions (default `title_nouns`).
    reward = r_type * (attributes met + options met + price met) / (attributes + options + 1); each other r_* is a met
    share, each w_* the share of that part in the denominator; r_option, w_option are None for a goal without options.
    Raises ValueError for a goal without attributes.
    """
    parts = type_reward(bought, goal, nouns or title_nouns)
    attributes, wanted = len(goal["attributes"]), len(goal["goal_options"])
    if not attributes:
        raise ValueError(f"The goal for {goal['asin']} names no attribute; the reward is defined for at least one.")
    total = attributes + wanted + 1
    attribute_hits = count_attributes(bought, goal["attributes"])
    option_hits = count_options(options, goal["goal_options"])
    r_price = price <= goal["price_upper"]
    parts |= {
        "num_attr_matches": attribute_hits, "r_att": attribute_hits / attributes, "w_att": attributes / total,
        "num_option_matches": option_hits, "r_option": option_hits / wanted if wanted else None,
        "w_option": wanted / total if wanted else None, "r_price": r_price, "w_price": 1 / total,
    }
    return (attribute_hits + option_hits + r_price) / total * parts["r_type"], parts


# Pages: lists of (kind, text) with kind "text", "button", "asin" or "option"

def start_page(instruction):
    return [("text", "WebShop"), ("text", "Instruction: "), ("text", instruction), ("button", "Search")]


def top_of_page(instruction):
    return [("text", "Instruction:"), ("text", instruction), ("button", "Back to Search")]


def results_page(instruction, shown, number, total):
    """Page `number` of a search with `total` hits, of which the products `shown` are on this page."""
    parts = top_of_page(instruction) + [("text", f"Page {number} (Total results: {total})")]
    parts += [("button", "< Prev")] * (number > 1) + [("button", "Next >")]
    for product in shown:
        parts += [("asin", product["asin"]), ("text", product["Title"]), ("text", product["Price"])]
    return parts


def item_page(instruction, product, show_attrs):
    parts = top_of_page(instruction) + [("button", "< Prev")]
    for name, values in product["options"].items():
        parts += [("text", name)] + [("option", value) for value in values]
    parts += [("text", text)
              for text in (product["Title"], f"Price: {product['Price']}", f"Rating: {product['Rating']}")]
    buttons = ["Description", "Features", "Reviews"] + ["Attributes"] * show_attrs + ["Buy Now"]
    return parts + [("button", button) for button in buttons]


def sub_page(instruction, product, page):
    """One of `SUB_PAGES`. List entries have a leading space, so that even an empty one is visible."""
    texts = {
        "description": [product["Description"]],
        "features": [" " + bullet for bullet in product["BulletPoints"]],
        "reviews": [],
        "attributes": [" " + attribute for attribute in product["Attributes"]]
                      + [product["category"], product["query"], product["product_category"]],
    }[page]
    return top_of_page(instruction) + [("button", "< Prev")] + [("text", text) for text in texts]


def done_page(asin, options, score):
    """The page after a purchase. The original fills only these fields; the others are empty or "None"."""
    chosen = json.dumps(options, sort_keys=True)
    for character in "<>&'":             # as Flask writes JSON into a page
        chosen = chosen.replace(character, f"\\u{ord(character):04x}")
    texts = ["Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)",
             "Purchased", "asin", asin, "options", chosen, "attrs", "None", "category", "None", "query", "None",
             "product category", "None",
             "Target", "asin", "options", "attrs", "price upper", "instuction text", "category", "product category",
             "query", "Goal ", "None",
             "Reward", "Your score (min 0.0, max 1.0)", str(score), "Reward Details ", "None"]
    return [("text", text) for text in texts]


def page_clickables(parts):
    """What can be clicked, each label once: buttons, then asins, then option values."""
    labels = {kind: [text for k, text in parts if k == kind] for kind in ("button", "asin", "option")}
    return list(dict.fromkeys([text.lower() for text in labels["button"] + labels["asin"]] + labels["option"]))


def visible_parts(parts):
    """Yields what the original's HTML parser keeps: white space becomes a space, or nothing if it has a line break."""
    for kind, text in parts:
        if text.strip(" \n\t\f\r"):
            yield kind, text
        elif text and "\n" not in text:
            yield kind, " "


def plain_text(parts):
    return " [SEP] ".join(text.strip() for _, text in visible_parts(parts))


def rich_text(parts, address, opened):
    """One line per visible text; buttons are marked, as clicked if in `address` (options) or `opened` (asins)."""
    front, lines = "", ""
    for kind, text in visible_parts(parts):
        clicked = kind == "option" and f'"{text}"' in address or kind == "asin" and text in opened
        if kind != "text":
            lines += {"button": "", "asin": "\n", "option": "  "}[kind]
            lines += f"[clicked button] {text} [clicked button_]\n" if clicked else f"[button] {text} [button_]\n"
        else:
            lines += f"{text}\n"
        if clicked and kind == "option":
            front = f"You have clicked {text}.\n{front}"
    return front + lines


# Data

@functools.lru_cache(maxsize=8)
def load_shop(data, human_goals):
    """(`Shop`, title -> nouns) of the official files in the folder `data`, or generated: the only place that asks."""
    if data is not None:
        return official_shop(data, human_goals), title_nouns
    catalogue = webshop_catalogue()
    # Generated titles are judged by the rule everywhere, so that a score does not depend on what is installed.
    return shop_of(catalogue if human_goals else catalogue._replace(human=None)), nouns_by_rule


@functools.lru_cache(maxsize=8)
def load_search(data, human_goals):
    """query -> at most 50 asins, best first; recent queries are remembered."""
    return functools.lru_cache(maxsize=4096)(functools.partial(bm25, load_shop(data, human_goals)[0].postings()))


@functools.lru_cache(maxsize=64)
def load_goals(data, human_goals, seed, shuffle_seed):
    """({asin: price}, shuffled goals), drawn as in the original. Shared between environments: not to be changed."""
    prices, goals = load_shop(data, human_goals)[0].draw(seed, shuffle_seed)
    if not goals:
        raise ValueError(f"The WebShop data in {data} give no {'human' if human_goals else 'synthetic'} goal; at least "
                         "one product needs an instruction.")
    return prices, goals


class WebShop(TextEnv):
    """Buy what an instruction asks for; actions are `search[words]` (on every page) and `click[label]`.

    data: folder with the official items_shuffle*.json, items_ins_v2*.json and, for human goals, items_human_ins*.json;
        None takes the generated catalogue, whose scores are not comparable with those on the official products.
    human_goals: instructions written by people instead of synthetic ones.
    seed: of the prices and price bounds; shuffle_seed: of the order of goals (the original fixes 233; verl-agent and
        SDAR use one number for both, a different one per worker).
    search: query -> ranked asins, replaces the BM25, the random draw of the query "<r>" included.
    nouns: title -> its lower-cased nouns with repetitions, replaces `title_nouns`.
    observation_mode: "text", or "text_rich" with a line per text and marked buttons.
    show_attrs: items also have a page of attributes.

    `reset(options=)` takes {"split": "train" | "val", "task_id": int}, {"split": "all"} (the original's weighted draw
    over all goals) or {"goal": index in `goals` or a goal}. The first 500 official goals are "val", the others "train"
    (half each if there are fewer than 1,000); generated goals are split by product. The reward is the graded score of a
    purchase, which ends the episode; it is truncated after `WEBSHOP_MAX_STEPS`. As in the original, a search still
    works afterwards; a purchase pays nothing.

    State: page ("start", "results", "item", one of `SUB_PAGES`, "done"), results (asins, best first), page_number (from
    1; None before a search), asin (or None), options ({name: value} chosen), clickables (labels), goal, price ({asin:
    dollars}). products, goals and price are shared between environments and must not be changed.
    Raises FileNotFoundError or ValueError for missing or malformed files, ValueError for impossible options of `reset`.
    """
    label, example, player = "WebShop", "search[red lamp]", experts.webshop_player

    def __init__(self, data=None, *, human_goals=False, seed=233, search: Callable | None = None,
                 nouns: Callable | None = None, shuffle_seed=233, observation_mode="text", show_attrs=False,
                 render_mode=None):
        super().__init__(render_mode)
        if observation_mode not in ("text", "text_rich"):
            raise ValueError(f"observation_mode must be 'text' or 'text_rich', not {observation_mode!r}.")
        source = (None if data is None else str(data)), bool(human_goals)
        self.shop, own_nouns = load_shop(*source)
        self.products = self.shop.products
        self.price, self.goals = load_goals(*source, seed, shuffle_seed)
        self.search, self.own_search = search or load_search(*source), search is None
        self.nouns = nouns or own_nouns
        self.observation_mode, self.show_attrs = observation_mode, bool(show_attrs)
        self.splits = split_goals(self.goals, self.shop.held_out)
        self.page = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.task_id = self._choose_goal(seed, self.check_options(options, alone="goal"))
        self.steps = 0
        self._show_start()
        return self._observe(), self._info(valid=True, score=0.0)

    def _choose_goal(self, seed, options):
        """(goal, task_id); the task_id is the index in the split, for a goal given by index that index, else None."""
        goal = options.get("goal")
        if isinstance(goal, dict):
            missing = GOAL_FIELDS - goal.keys()
            if missing or goal["asin"] not in self.products:
                raise ValueError(f"The given goal lacks {sorted(missing)} or its product is not in the catalogue.")
            return goal, None
        if "goal" in options:
            options = {"split": "all", "task_id": goal}
        split = self.check_split(options.get("split", "train"), [*self.splits, "all"])
        indices = self.splits.get(split, range(len(self.goals)))
        if split == "all" and options.get("task_id") is None:
            own_seed = int(self.np_random.integers(2**32)) if seed is None else seed
            options = {"task_id": weighted_goal(self.goals, random.Random(own_seed))}
        task_id = self.choose_task(options, split, len(indices))
        return self.goals[indices[task_id]], task_id

    def step(self, action):
        self.check_action(action, running=self.page is not None)
        name, argument = split_action(action)
        argument = argument and argument.lower()
        score, valid = 0.0, False
        if name == "search" and argument is not None:
            self._show_results(argument, 1)
            valid = True
        elif name == "click" and argument is not None:
            wanted = nfc(argument)
            label = next((label for label in self.clickables if nfc(label) == wanted), None)
            if label not in (None, "search"):        # the latter is a label, and refused when clicked
                score, valid = self._click(label), True
        self.steps += 1
        bought = valid and self.page == "done"
        truncated = not bought and self.steps >= WEBSHOP_MAX_STEPS
        score = self.pay(score, bought or truncated)
        return self._observe(), score, bought, truncated, self._info(valid=valid, score=score)

    def _click(self, label):
        """Do what the label stands for and return the score, which is 0 except for a purchase."""
        # The original tells pages apart by the first of these names in the address, which holds words and options too.
        names = ("search_results", "item_page", "item_sub_page", "done")
        here = next((name for name in names if name in self.address), None)
        if label == "buy now":
            return self._buy()
        if label == "back to search":
            self._show_start()
        elif label in ("next >", "< prev") and here == "search_results":
            self._show_results(self.query, self.page_number + (1 if label == "next >" else -1))
        elif label == "< prev" and here == "item_page":
            self._show_results(self.query, self.page_number)
        elif label in SUB_PAGES:
            self._show(label)
        else:
            self._open_or_choose(label)
        return 0.0

    def _open_or_choose(self, label):
        """Open a product of the results, choose an option value, or go from a sub page back to the item."""
        if self.page == "results":
            self.asin = next(asin for asin in self.shown if asin.lower() == label)
            self.opened = self.opened | {self.asin}
        elif self.page == "item":        # a value that stands under two names is set for the later one
            for name, values in reversed(self.products[self.asin]["options"].items()):
                if label in values:
                    self.options = {**self.options, name: label}
                    break
        self._show("item")

    def _buy(self):
        score, self.reward_parts = self.reward_of(self.asin, self.options)
        self._show("done", score)
        return score

    def reward_of(self, asin, options):
        """`webshop_reward` of buying a product with these options for the goal at hand."""
        return webshop_reward(self.products[asin], self.goal, options, self.price[asin], nouns=self.nouns)

    def _show_start(self):
        self.query, self.page_number, self.asin, self.options = None, None, None, {}
        self.results, self.shown, self.opened, self.reward_parts = [], [], frozenset(), None
        self._show("start")

    def _show_results(self, query, number):
        """Show page `number` of a search and forget the options. The search is repeated, so that "<r>" draws anew."""
        self.query, self.page_number, self.asin, self.options = query, number, None, {}
        self.results = self._rank(query)
        self.shown = self.results[(number - 1) * HITS_PER_PAGE:number * HITS_PER_PAGE]
        self._show("results")

    def _rank(self, query):
        """The asins for a query: "<r>" random ones, "<c> word" a category, "<q> words" a query, else a search."""
        mark, *words = query.split(" ")
        if mark == "<r>" and self.own_search:
            return self.shop.asins[self.np_random.permutation(len(self.products))[:HITS]].tolist()
        if mark == "<c>":                # without a word, and for "<a>", the original raises; here nothing is found
            return self.shop.where("category", words[0]) if words else []
        if mark == "<q>":
            return self.shop.where("query", " ".join(words).strip())
        if mark == "<a>":
            return []
        return [asin for asin in self.search(query) if self.own_search or asin in self.products][:HITS]

    def _show(self, page, score=None):
        self.page = page
        instruction, product = self.goal["instruction_text"], self.products.get(self.asin)
        if page == "start":
            self.parts = start_page(instruction)
        elif page == "results":
            shown = [self.products[asin] for asin in self.shown]
            self.parts = results_page(instruction, shown, self.page_number, len(self.results))
        elif page == "item":
            self.parts = item_page(instruction, product, self.show_attrs)
        elif page == "done":
            self.parts = done_page(self.asin, self.options, score)
        else:
            self.parts = sub_page(instruction, product, page)
        self.clickables = page_clickables(self.parts)

    @property
    def address(self):
        """The page's address in the original, without host and session."""
        words = "+".join((self.query or "").split(" "))
        if self.page == "start":
            return ""
        if self.page == "results":
            return f"search_results/{words}/{self.page_number}"
        if self.page == "item":
            return f"item_page/{self.asin}/{words}/{self.page_number}/{json.dumps(self.options)}"
        if self.page == "done":
            return f"done/{self.asin}/{self.options}"
        return f"item_sub_page/{self.asin}/{words}/{self.page_number}/{self.page.title()}/{self.options}"

    def _observe(self):
        if self.observation_mode == "text":
            return plain_text(self.parts)
        return rich_text(self.parts, self.address, self.opened)

    def _info(self, *, valid, score):
        # "search" is a label but refused when clicked, and a label with a bracket can't be written as an action.
        labels = [label for label in self.clickables if label and label != "search" and not set(label) & {"[", "\n"}]
        return {"task": self.goal["instruction_text"], "task_id": self.task_id, "task_type": self.goal["category"],
                "admissible": ["search[<words>]", *(f"click[{label}]" for label in labels)],
                "valid": valid, "won": score == 1.0, "score": score}

    @property
    def task_types(self):
        """The departments of the goals: what `info["task_type"]` can be."""
        return tuple(self.shop.categories)

    def types_of(self, split):
        return [self.goals[number]["category"] for number in self.splits[self.check_split(split, self.splits)]]

    def num_tasks(self, split):          # without a goal being read for its type: there may be a million
        return len(self.splits[self.check_split(split, self.splits)])


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld (Shridhar et al. 2021, arXiv 2010.03768; rules and texts of alfworld 0.4.2 on textworld 1.7.0)
#
# A household task in words. The official engine compiles each game with a planner and derives every text from a
# grammar; the rules are few and the same in all games, so they stand here as plain functions on the set of facts that
# are true. Only a game's objects, initial facts, goal and task sentence are read from its file (`official.Game`).
# ---------------------------------------------------------------------------------------------------------------------

def alfworld_scene(observation):
    """An observation on one line, without the engine's welcome and its task sentence."""
    return " ".join(observation.removeprefix("-= Welcome to TextWorld, ALFRED! =-").partition(TASK_PREFIX)[0].split())


def alfworld_prompt(task, history, observation, admissible, skills=""):
    """The user message of one turn, with every possible command except "help".

    task: the sentence. history: the last (observation, action) pairs, oldest first; of a pair with the observation ""
    only the action is shown. admissible: the possible commands. skills: text, may be "".
    """
    commands = ", ".join(command for command in admissible if command != "help")
    return "\n".join([
        *prompt_head("You do a task in a house.", skills), *last_steps(history, alfworld_scene),
        f"Now: {alfworld_scene(observation)}", f"Commands: {commands}", f"Task: {task}",
        "Think in <think> </think>, then act in <action> </action>: one of the commands."])


ALFWORLD_EXAMPLE = "<think>The fork is clean now and has to go into a drawer.</think>\n<action>go to drawer 2</action>"
ALFWORLD_RULES = """You are doing a household task in a room with numbered places, such as fridge 1, and objects.
- You are at one place at a time. "go to" leads to a place and shows what is there; a closed place must be opened first.
- You can hold one object: take it from where it lies, then put it down at another place.
- To heat, cool or clean an object, hold it and be at a microwave, fridge or sinkbasin, which may stay closed.
- "use" turns on a lamp at the place where you are.
- Any action that is not listed as possible does nothing and costs a step.
- The episode ends by itself as soon as the task is done."""


def alfworld_full_prompt(context, skills="", official=False):
    """`full_prompt` in the house, with every possible command except "help"."""
    return full_prompt(context, skills, official, rules=ALFWORLD_RULES, show=alfworld_scene, how=ACT,
                       now=alfworld_scene(context.observation), example=ALFWORLD_EXAMPLE,
                       actions=[command for command in context.admissible if command != "help"])


def parse_alfworld(text, *, official=False):
    """Splits an answer into the action, lower-cased, and whether the answer keeps the format.

    The format is WebShop's; official: without the action's tags the action is the last 30 characters.

    >>> parse_alfworld("<think>take the egg</think><action>take egg 1 from fridge 1</action>")
    ('take egg 1 from fridge 1', True)
    >>> parse_alfworld("I go to fridge 1"), parse_alfworld("go to fridge 1", official=True)
    (('', False), ('go to fridge 1', False))
    """
    return parse_tagged(text, 30, official)


ALFWORLD_MAX_STEPS = 50
KNIVES = {"knifetype", "butterknifetype"}
PUT_WORDINGS = {"move": ("move {} to {}", "You move the {} to the {}.", "move (object) to (receptacle):  "),
                "put": ("put {} in/on {}", "You put the {} in/on the {}.", "put (object) in/on (receptacle):  ")}
HELP = ("Available commands:\n"            # the original loses the first line break of its rule
        "  look:                             look around your current location\n"
        "  inventory:                        check your current inventory\n"
        "  go to (receptacle):               move to a receptacle\n"
        "  open (receptacle):                open a receptacle\n"
        "  close (receptacle):               close a receptacle\n"
        "  take (object) from (receptacle):  take an object from a receptacle\n"
        "  {put}place an object in or on a receptacle\n"
        "  examine (something):              examine a receptacle or an object\n"
        "  use (object):                     use an object\n"
        "  heat (object) with (receptacle):  heat an object using a receptacle\n"
        "  clean (object) with (receptacle): clean an object using a receptacle\n"
        "  cool (object) with (receptacle):  cool an object using a receptacle\n"
        "  slice (object) with (object):     slice an object using a sharp object\n")


def possible_actions(game, facts, put_wording="move"):
    """{command: (verb, *ids)} of all possible actions, the engine's `admissible_commands`."""
    names, static = game.names, game.static
    place, held = place_of(game, facts), held_object(game, facts)
    put = PUT_WORDINGS[put_wording][0]
    actions = {"look": ("look",), "inventory": ("inventory",), "help": ("help",)}
    for receptacle, location in game.places:
        if location != place:
            actions[f"go to {names[receptacle]}"] = ("go", receptacle, location)
    for receptacle in game.receptacles.get(place, ()):
        where, accessible = names[receptacle], is_accessible(game, facts, receptacle)
        actions[f"examine {where}"] = ("examine receptacle", receptacle)
        if ("openable", receptacle) in static:
            verb = "close" if accessible else "open"
            actions[f"{verb} {where}"] = (verb, receptacle)
        for obj in contents(game, facts, receptacle):
            if accessible and held is None and ("pickupable", obj) in static:
                actions[f"take {names[obj]} from {where}"] = ("take", obj, receptacle)
            if ("toggleable", obj) in static:              # in the original even if the receptacle is closed
                actions[f"use {names[obj]}"] = ("use", obj)
        if held is None:
            continue
        if accessible and fits(game, held, receptacle):
            actions[put.format(names[held], where)] = ("put", held, receptacle)
        for verb, (ability, kind, _, _) in APPLIANCES.items():
            if (ability, held) in static and kind in game.types[receptacle]:
                actions[f"{verb} {names[held]} with {where}"] = (verb, held, receptacle)
    if held is not None:
        # The domain was to offer what lies in an open receptacle here, too, but a comma in its list of variables
        # makes a type that nothing has: as recorded, only what is held can be examined.
        actions[f"examine {names[held]}"] = ("examine", held)
        if game.types[held] & KNIVES:
            for obj in game.objects:                       # even what lies in a closed receptacle
                if ("sliceable", obj) in static and ("objectatlocation", obj, place) in facts:
                    actions[f"slice {names[obj]} with {names[held]}"] = ("slice", obj, held)
    return actions


def apply_action(game, facts, action):
    """Change `facts` as a possible action does."""
    verb, *ids = action
    agent, place = game.agent, place_of(game, facts)
    if verb == "go":
        facts.remove(("atlocation", agent, place))
        facts.add(("atlocation", agent, ids[1]))
    elif verb == "open":
        facts.add(("opened", ids[0]))
    elif verb == "close":
        facts.remove(("opened", ids[0]))
    elif verb == "take":
        facts -= {("inreceptacle", *ids), ("objectatlocation", ids[0], place)}
        facts |= {("holds", agent, ids[0]), ("holdsany", agent), ("not_inreceptacle", *ids)}
    elif verb == "put":
        facts -= {("holds", agent, ids[0]), ("holdsany", agent), ("not_inreceptacle", *ids)}
        facts |= {("inreceptacle", *ids), ("objectatlocation", ids[0], place)}
    elif verb in APPLIANCES:
        _, _, gained, lost = APPLIANCES[verb]
        facts.add((gained, ids[0]))
        facts.discard((lost, ids[0]))
    elif verb == "use":
        facts ^= {("ison", ids[0])}
        facts.add(("istoggled", ids[0]))
    elif verb == "slice":
        facts.add(("issliced", ids[0]))


# Texts

def list_names(names, article="a "):
    """"a x", "a x, and a y", "a x, a y, and a z", or "nothing"."""
    *first, last = [article + name for name in names] or ["nothing"]
    return ", ".join(first) + ", and " + last if first else last


def receptacle_text(game, facts, receptacle):
    name = game.names[receptacle]
    if not is_accessible(game, facts, receptacle):
        return f"The {name} is closed."
    seen = list_names(game.names[obj] for obj in contents(game, facts, receptacle))
    if ("openable", receptacle) in game.static:
        return f"The {name} is open. In it, you see {seen}."
    return f"On the {name}, you see {seen}."


def object_text(game, facts, obj):
    name = game.names[obj]
    if ("isreceptacleobject", obj) in game.static:
        inner = [game.names[other] for other in game.objects if ("inreceptacleobject", other, obj) in game.static]
        return f"This is a normal {name}. In it, you see {list_names(inner)}."
    hot, cool, clean, is_sliced = ((fact, obj) in facts for fact in ("ishot", "iscool", "isclean", "issliced"))
    qualities = ["hot"] if hot else ["cool"] if cool else []
    qualities += ["clean"] if clean else []
    if qualities:
        if qualities == ["cool"] and not is_sliced:          # the only combination that the original calls so
            qualities = ["cold"]
        return f"This is a {' and '.join(qualities)}{' sliced' if is_sliced else ''} {name}."
    if ("toggleable", obj) in game.static and ("istoggled", obj) in facts:
        return f"This {name} is on."     # never "off": that it was not used is no fact of the original
    return f"This is a sliced {name}." if is_sliced else f"There's nothing special about {name}."


def look_text(game, facts, first=False):
    """What "look" says. Only the `first` look, which opens an episode, lists the room."""
    place = place_of(game, facts)
    here = game.receptacles.get(place)
    if here:
        # The original lists what is here and recorded as not in a receptacle here. The engine records "not in
        # receptacle" only when an object is taken out of one, so an object that has moved to another one beside it is
        # listed, once for each that it was taken out of.
        beside = list_names(game.names[obj] for obj in game.objects if ("objectatlocation", obj, place) in facts
                            for receptacle in here if ("not_inreceptacle", obj, receptacle) in facts)
        facing = list_names((game.names[receptacle] for receptacle in here), "")
        return f"You are facing the {facing}. Next to it, you see {beside}."
    seen = list_names(game.names[receptacle] for receptacle, _ in game.places) if first else "nothing"
    return f"You are in the middle of a room. Looking quickly around you, you see {seen}."


def feedback(game, facts, action, put_wording="move"):
    """The engine's answer to an action that was done; `facts` are those after it."""
    verb, *ids = action
    first, second = ([game.names.get(entity) for entity in ids] + [None, None])[:2]
    if verb == "go":
        return f"You arrive at {first}. {receptacle_text(game, facts, ids[0])}"
    if verb == "open":
        return f"You open the {first}. {receptacle_text(game, facts, ids[0])}"
    if verb == "close":
        return f"You close the {first}."
    if verb == "take":
        return f"You pick up the {first} from the {second}."
    if verb == "put":
        return PUT_WORDINGS[put_wording][1].format(first, second)
    if verb in APPLIANCES:
        return f"You {verb} the {first} using the {second}."
    if verb == "use":                    # the original tests whether it was ever used, so it never turns off
        return f"You turn on the {first}."
    if verb == "slice":
        return f"You sliced the {first} with the {second}."
    if verb == "examine":
        return object_text(game, facts, ids[0])
    if verb == "examine receptacle":
        return receptacle_text(game, facts, ids[0])
    if verb == "look":
        return look_text(game, facts)
    if verb == "help":
        return HELP.replace("{put}", PUT_WORDINGS[put_wording][2])
    held = held_object(game, facts)
    return "You are not carrying anything." if held is None else f"You are carrying: a {game.names[held]}."


# Data

class GameSource(NamedTuple):
    """Where games come from."""
    types: Callable                      # split -> each game's task type
    load: Callable                       # (split, number) -> `Game`
    skipped: Callable                    # split -> {reason: number of games left out}


def game_source(data):
    """The official games in the folder `data`, or the generated ones where it is None: the only place that asks."""
    if data is None:
        return GameSource(game_types, generate_game, lambda split: {})
    folder = str(check_folder(data, "ALFWorld's json_2.1.1"))
    return GameSource(lambda split: find_games(folder, split).types,
                      lambda split, number: load_game(find_games(folder, split).paths[number]),
                      lambda split: find_games(folder, split).skipped)


class ALFWorld(TextEnv):
    """Do a household task; actions are the engine's commands: `go to fridge 1`, `heat egg 1 with microwave 1`.

    data: folder with the official layout, json_2.1.1/{train,valid_seen,valid_unseen}/**/game.tw-pddl, each beside its
        traj_data.json (or the folder json_2.1.1 itself); None takes as many generated games as there are official
        ones, whose scores are not comparable with those on the official games.
    put_wording: "move" ("move X to Y", version 0.4.2) or "put" ("put X in/on Y", older releases).

    `reset(options=)` takes {"split": one of ALFWORLD_SPLITS, or "val" for valid_unseen, "task_id": int}, or {"game":
    path of a game.tw-pddl}, which is played whatever its folder and its field `solvable` say. Official games of a split
    are numbered in the order of their paths. The episode is terminated in every state where the goal is true, and the
    first time pays 1; as in the original, one can go on from there and undo it, which pays nothing. It is truncated
    after `ALFWORLD_MAX_STEPS`.

    State: game (a `Game`), facts (those that actions change, as a set), actions ({command: action} possible now), last
    (the action done by the last step, None at the start and where nothing happened). `skipped(split)` counts the games
    left out. Raises FileNotFoundError or ValueError for missing or malformed files and impossible options of `reset`.
    """
    label, example, player = "ALFWorld", "go to desk 1", experts.alfworld_player
    task_types = ALFWORLD_TYPES

    def __init__(self, data=None, *, put_wording="move", render_mode=None):
        super().__init__(render_mode)
        if put_wording not in PUT_WORDINGS:
            raise ValueError(f"put_wording must be 'move' or 'put', not {put_wording!r}.")
        self.source, self.put_wording = game_source(data), put_wording
        self.game = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.game, self.task_id = self._choose_game(self.check_options(options, alone="game"))
        self.facts, self.steps, self.last = set(self.game.initial), 0, None
        self.observation = (f"-= Welcome to TextWorld, ALFRED! =-\n\n{look_text(self.game, self.facts, first=True)}\n\n"
                     f"{TASK_PREFIX}{self.game.task}")
        return self.observation, self._info(valid=True)

    def _observe(self):
        return self.observation

    def _choose_game(self, options):
        """(game, task_id); the task_id is the number in the split, None for a game given by its path."""
        if "game" in options:
            return load_game(options["game"]), None
        split = options.get("split", "train")
        task_id = self.choose_task(options, split, self.num_tasks(split))
        return self.source.load(self._split(split), task_id), task_id

    def _split(self, split):
        self.check_split(split, [*ALFWORLD_SPLITS, "val"])
        return "valid_unseen" if split == "val" else split

    def step(self, action):
        self.check_action(action, running=self.game is not None)
        found = self.last = self.actions.get(nfc(action.strip()))
        if found is None:
            self.observation = "Nothing happens."
        else:
            apply_action(self.game, self.facts, found)
            self.observation = feedback(self.game, self.facts, found, self.put_wording)
        self.steps += 1
        info = self._info(valid=found is not None)
        truncated = not info["won"] and self.steps >= ALFWORLD_MAX_STEPS
        return self.observation, self.pay(info["score"], info["won"] or truncated), info["won"], truncated, info

    def _info(self, *, valid):
        self.actions = possible_actions(self.game, self.facts, self.put_wording)
        won = is_true(self.game.goal, self.facts)
        return {"task": self.game.task, "task_id": self.task_id, "task_type": self.game.task_type,
                "admissible": sorted(self.actions), "valid": valid, "won": won, "score": float(won)}

    def types_of(self, split):
        return self.source.types(self._split(split))

    def skipped(self, split):
        """{reason: number of games of the split that were left out}."""
        return self.source.skipped(self._split(split))

    @property
    def goal(self):
        """All that distinguishes the game from others, ready for JSON: its first facts, and what is asked for."""
        return [sorted(self.game.static | self.game.initial), self.game.goal]


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA (Search-R1, Jin et al. 2025, arXiv 2503.09516; rules and texts as in verl-agent's and SDAR's copy)
#
# A question is answered in at most four turns, each of which is a search or the answer. What a search finds is shown
# between <information> tags. Documents are text by strangers, so they can neither write a tag nor give an answer.
# ---------------------------------------------------------------------------------------------------------------------

SEARCH_TAGS = ("think", "search", "answer", "information")


def search_prompt(task, history, observation, admissible, skills=""):
    """The user message of one turn. admissible is not used: any words may be searched for.

    task: the question. history: the last (observation, action) pairs, oldest first; of a pair with the observation ""
    only the action is shown. An action that is not a valid block is not shown as written, so that no text of the agent
    adds a tag. skills: text, may be "".
    """
    steps = []
    for seen, action in history:
        steps += [seen.strip()] if seen and seen != task else []
        steps.append(f"- {parse_search(f'<think></think>{action}')[0] or '(not in the format)'}")
    return "\n".join([
        *prompt_head("You answer a question. Search for what you need to know, then answer.", skills),
        *(["Last steps:", *steps] if steps else []),
        *(["Found:", observation.strip()] if observation and observation != task else []),
        f"Question: {task}",
        "Think in <think> </think>, then act: <search> words </search>, or <answer> short answer </answer>."])


SEARCH_EXAMPLE = "<think>First I need the country where the Nile ends.</think>\n<search> mouth of the Nile </search>"
SEARCH_RULES = """You are answering a question with the help of a search engine over an encyclopedia.
- A step is one search or the answer. A search shows the few passages that fit its words best.
- The answer ends the task. It has to be an accepted answer word for word (capitals, punctuation and a, an, the do not \
count): give the bare name, date or number, or yes or no.
- The last step must be the answer."""


def passages(observation):
    """What a search found, as text: without JSON and its escapes (one may be torn where the middle of a long text was
    cut out), and with a space in a document's tag, so that it is none."""
    text = observation.strip()
    if text.startswith("<information>"):
        text = re.sub(r'^<information>({"result": ")?|("})?(</information>)?$', "", text)
        text = re.sub(r'(\\u[0-9a-f]{4})+|\\["\\/bfnrt]', lambda escape: json.loads(f'"{escape[0]}"'), text)
    return re.sub(rf"(?ai)<(?=/?({'|'.join(SEARCH_TAGS)})>)", "< ", text).strip()


def search_full_prompt(context, skills="", official=False):
    """`full_prompt` for a question. What the agent wrote is shown as the parser reads it, as in `search_prompt`."""
    show = lambda seen: "" if seen == context.task else passages(seen)
    history = [(seen, parse_search(f"<think></think>{action}")[0]) for seen, action in context.history]
    return full_prompt(
        context._replace(history=history), skills, official, rules=SEARCH_RULES, show=show, actions=(),
        now=show(context.observation), example=SEARCH_EXAMPLE, how="either search for what you do not know yet, "
        "<search> words </search>, or, once you know enough, answer, <answer> short answer </answer>")


def tagged_blocks(text, tag):
    """The texts between <tag> and </tag>, with single spaces, in order."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE | re.ASCII)
    return [" ".join(inner.split()) for inner in found]


def parse_search(text, *, official=False):
    """Splits an answer into its action and whether the answer is valid; an invalid one's action is "".

    A valid answer is one closed <think>..</think>, then one search or answer block, which is not blank and holds none
    of SEARCH_TAGS, and nothing else. official: as in the released code, everything after the first </search> (without
    one: the first </answer>) is cut, and the first search block, else the first answer block, is acted on; both kinds,
    or one kind twice, are invalid, and <think> is not required.

    >>> parse_search("<think>look it up</think><search>Lisbon</search>")
    ('<search> Lisbon </search>', True)
    >>> text = "<search>Lisbon</search><answer>Spain</answer>"
    >>> parse_search(text), parse_search(text, official=True)
    (('', False), ('<search> Lisbon </search>', False))
    """
    if not official:
        tag, inner = read_answer(text, ("search", "answer"), SEARCH_TAGS)
        return (f"<{tag}> {' '.join(inner.split())} </{tag}>", True) if inner else ("", False)
    counts = {tag: len(re.findall(f"<{tag}>", text, re.IGNORECASE | re.ASCII)) for tag in ("search", "answer")}
    end = re.search("(?ai)</search>", text) or re.search("(?ai)</answer>", text)
    kept = text[:end.end()] if end else text
    blocks = [(tag, inner) for tag in ("search", "answer") for inner in tagged_blocks(kept, tag)]
    tag, inner = blocks[0] if blocks else ("", "")
    return f"<{tag}> {inner} </{tag}>" if blocks else "", sum(counts.values()) == len(blocks) == 1


SEARCH_MAX_TURNS = 4
SEARCH_FAILED = "The search failed: the retriever gave no answer."


def exact_match(answer, golds):
    """Whether the answer is one of `golds` (a string or several) after normalisation (SQuAD's, as in Search-R1).

    >>> exact_match("The  Beatles!", ["Rolling Stones", "beatles"])
    True
    """
    golds = [golds] if isinstance(golds, str) else golds
    return normalize_answer(answer) in map(normalize_answer, golds)


def information(result):
    """The observation after a search: JSON between tags. "<" is escaped, so that no text inside makes a tag."""
    return "\n<information>" + json.dumps({"result": result}).replace("<", "\\u003c") + "</information>\n"


# Data

class QuestionSource(NamedTuple):
    """Where questions come from."""
    questions: Callable                  # "train" | "val" -> `Question`s
    task_types: Callable                 # () -> what info["task_type"] can be
    corpus: Callable                     # () -> the `Corpus` searched where no retriever is given


def question_source(data):
    """The official rows at `data`, or the generated questions where it is None: the only place that asks."""
    if data is None:
        return QuestionSource(lambda split: search_questions()[split], lambda: SEARCH_TYPES, bundled_corpus)
    files = question_files(data)
    first = Path(next(iter(files.values())))

    def questions(split):
        if split not in files:
            raise ValueError(f"There are no {split!r} questions beside {first}; give a folder with train.jsonl and "
                             "test.jsonl (or .parquet).")
        return load_questions(files[split])

    def task_types():
        return tuple(sorted({question.task_type for split in files for question in questions(split)}))

    def corpus():
        path = first.parent / "corpus.jsonl"
        if not path.is_file():
            raise ValueError(f"{path.parent} has no corpus.jsonl to search in; put one there, or give SearchQA a "
                             "retriever=: the address of a /retrieve server, or a function.")
        return read_corpus(str(path))

    return QuestionSource(questions, task_types, corpus)


class SearchQA(TextEnv):
    """Answer a question; actions are `<search> words </search>` and `<answer> words </answer>`, or a text with one.

    data: folder with the official rows, train.* and test.* (or val.*, validation.*, dev.*, the first that is there), as
        .parquet or .jsonl; or one such file, all of it "val". A row has `question` and its answers, as ground_truth
        {"target": ..}, as the same inside reward_model, or as golden_answers; and maybe `data_source`, and a text that
        the teacher alone is shown beside the skills, `teacher_prompt` (info["teacher_prompt"]). None takes the
        generated questions, whose scores are not comparable with those on the official ones.
    retriever: address of a server that answers POST /retrieve, or (query, topk) -> passages, which may raise OSError or
        ValueError where a search fails. None takes BM25 over corpus.jsonl ({"id", "contents"} a line) beside the
        official rows, or over the bundled facts for generated questions.
    topk: passages shown per search.

    `reset(options=)` takes {"split": "train" | "val", "task_id": int}. The first observation is the question. An answer
    ends the episode, with reward 1 if it is an exact match; it is truncated after `SEARCH_MAX_TURNS`. If a text holds
    several answers the last one counts, as in the original, but only those of the action, never those of documents.
    An action without a block costs a turn, too; its observation is empty. A search that fails does not end the episode:
    the observation says so, a warning is given, and it is counted. `info` also has `error` (the last action's, or None)
    and `retriever_errors` (the episode's number of them).

    State: question (a `Question`), goal (its accepted answers), observation, query (the last search's, or None), turns,
    ended.
    Raises FileNotFoundError or ValueError for missing or malformed files, ValueError for impossible options of `reset`.
    """
    label, example, player = "Search-QA", "<search> Lisbon </search>", experts.search_player

    def __init__(self, data=None, *, retriever: str | Callable | None = None, topk=3, render_mode=None):
        super().__init__(render_mode)
        if type(topk) is not int or topk < 1:
            raise ValueError(f"topk must be a whole number of at least 1, not {topk!r}.")
        self.source, self.topk = question_source(data), topk
        if retriever is None:
            retriever = functools.partial(corpus_search, self.source.corpus())
        self.retriever = Retriever(retriever) if isinstance(retriever, str) else retriever
        self.question, self.ended = None, True

    def _questions(self, split):
        return self.source.questions(self.check_split(split, ("train", "val")))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = self.check_options(options)
        split = options.get("split", "train")
        questions = self._questions(split)
        self.task_id = self.choose_task(options, split, len(questions))
        self.question = questions[self.task_id]
        self.goal = list(self.question.golds)
        self.observation, self.query, self.turns, self.ended = self.question.text, None, 0, False
        self.error, self.errors = None, 0
        return self.observation, self._info(valid=True, won=False)

    def step(self, action):
        self.check_action(action, running=not self.ended)
        answers, queries = tagged_blocks(action, "answer"), tagged_blocks(action, "search")
        self.turns += 1
        self.observation, self.error, won = "", None, False
        if answers:
            won = exact_match(answers[-1], self.question.golds)
        elif queries:
            self.query = queries[0]
            self.observation = self._search(self.query)
        truncated = not answers and self.turns >= SEARCH_MAX_TURNS
        self.ended = bool(answers) or truncated
        info = self._info(valid=bool(answers or queries), won=won)
        return self.observation, float(won), bool(answers), truncated, info

    def _observe(self):
        return self.observation

    def _search(self, query):
        try:
            passages = self.retriever(query, self.topk)
            if not isinstance(passages, list) or not all(isinstance(passage, str) for passage in passages):
                raise ValueError("a retriever must return a list of texts")
        except (OSError, ValueError) as error:
            self.error = f"{type(error).__name__}: {error}"
            self.errors += 1
            warnings.warn(f"A search failed, and the episode goes on without it: {self.error}", RuntimeWarning,
                          stacklevel=3)
            return information(SEARCH_FAILED)
        return information("".join(f"Doc {number}: {passage.strip()}\n"
                                   for number, passage in enumerate(passages[:self.topk], 1)))

    def _info(self, *, valid, won):
        return {"task": self.question.text, "task_id": self.task_id, "task_type": self.question.task_type,
                "admissible": None, "valid": valid, "won": won, "score": float(won), "error": self.error,
                "retriever_errors": self.errors, "teacher_prompt": self.question.teacher_prompt}

    @property
    def task_types(self):
        """What `info["task_type"]` can be: the data sources of all splits, or the types of generated questions."""
        return self.source.task_types()

    def types_of(self, split):
        return [question.task_type for question in self._questions(split)]


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------

ENVIRONMENTS = {"webshop": WebShop, "alfworld": ALFWorld, "search": SearchQA}
MAX_TURNS = {"webshop": WEBSHOP_MAX_STEPS, "alfworld": ALFWORLD_MAX_STEPS, "search": SEARCH_MAX_TURNS}
# (task, history, observation, admissible, skills) -> the user message of a turn
PROMPTS = {"webshop": webshop_prompt, "alfworld": alfworld_prompt, "search": search_prompt}
# (sdar.Context, skills, official) -> the same for a model that is not cut to these environments
FULL_PROMPTS = {"webshop": webshop_full_prompt, "alfworld": alfworld_full_prompt, "search": search_full_prompt}
# (observation, admissible) -> the observation as that message has it
READABLE = {"webshop": webshop_page, "alfworld": lambda observation, admissible: alfworld_scene(observation),
            "search": lambda observation, admissible: observation.strip()}
PARSERS = {"webshop": parse_webshop, "alfworld": parse_alfworld, "search": parse_search}
gymnasium.register(id="sdar/WebShop-v0", entry_point=WebShop)
gymnasium.register(id="sdar/ALFWorld-v0", entry_point=ALFWorld)
gymnasium.register(id="sdar/SearchQA-v0", entry_point=SearchQA)


def make(name, data=None, **kwargs) -> gymnasium.Env:
    """The environment `name` ("webshop", "alfworld", "search") on `data`: a path, or None for its generated tasks."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"There is no environment {name!r}; choose one of {', '.join(ENVIRONMENTS)}.")
    return ENVIRONMENTS[name](data, **kwargs)


def parse_action(env_name, text, *, official=False):
    """A model's answer -> (action, valid), by the format that the environment's prompt asks for.

    valid says whether the format was kept; whether the action was possible is `info["valid"]` after the step.
    official: where the format is broken, act on the end of the answer, as the released code does.

    >>> parse_action("webshop", "<think>it fits</think><action>click[Buy Now]</action>")
    ('click[buy now]', True)
    """
    return PARSERS[env_name](text, official=official)


if __name__ == "__main__":
    main()  # python envs.py serve-search
