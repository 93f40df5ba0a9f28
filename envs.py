"""Text environments of the paper as gymnasium environments: plain action strings in, text observations out.

`reset(seed=, options=)` returns (observation, info) and `step(action)` returns (observation, reward, terminated,
truncated, info). A task is a pure function of (data, split, task_id). Every `info` has `task` (the instruction),
`task_id`, `task_type`, `admissible` (actions that would do something now; None where any text may be written), `valid`
(whether the last action did something), `won` and `score`. Nothing random is drawn outside the environment's own
generators.
"""
import argparse
import bisect
import functools
import http.client
import http.server
import itertools
import json
import os
import random
import re
import string
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import gymnasium
import numpy as np
from rapidfuzz import fuzz, utils


class AnyText(gymnasium.spaces.Text):
    """A text space that holds every string; gymnasium's own is limited to a character set and a length."""

    def contains(self, x):
        return isinstance(x, str)


def split_answer(text, tail):
    """An answer -> (action, valid); without the action's tags the action is the last `tail` characters. Lower-cased."""
    lower = text.lower()
    start, end = lower.find("<action>"), lower.find("</action>")
    if start < 0 or end < 0:
        return lower[len(lower) - min(tail, len(lower)):], False
    valid = "<think>" in text and "</think>" in text and not re.search("[\u4e00-\u9fff]", text)
    return lower[start + len("<action>"):end].strip(), valid


# ---------------------------------------------------------------------------------------------------------------------
# WebShop (Yao et al. 2022, arXiv 2207.01206; rules of princeton-nlp/WebShop in its text modes)
#
# A shopper reads an instruction, searches a catalogue, opens items, chooses options and buys. Everything that the
# original shows or counts is reproduced; only its search engine (Lucene) is replaced by a BM25 of the same constants.
# ---------------------------------------------------------------------------------------------------------------------

WEBSHOP_MAX_STEPS = 15
WEBSHOP_VAL_GOALS = 500                  # the first 500 goals of the fixed order are held out, as in the original
HITS, HITS_PER_PAGE = 50, 10
SUB_PAGES = ("description", "features", "reviews", "attributes")

# Option values are compared by colour: the first of these, in this order, that occurs inside the value stands for it.
COLORS = """alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy
    camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry
    cream crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey
    heather indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint
    mocha multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose
    royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger
    turquoise violet walnut wheat white wine yellow""".split()

# Words of a shop title that are no nouns, for the noun rule used where no tagger is installed.
NOT_NOUNS = frozenset("""a an and are as at be but by for from in into is it its made of off on onto or our out over
    per so than that the their this to under until up very with within without you your all any both each every
    extra more most new no non not only other same some such adjustable authentic big black blue bright brown
    classic clear comfortable compact cute dark deep delicious double durable easy elegant everyday fine flat free
    fresh full gray great green grey handmade heavy high ideal large light lightweight little long low luxury mini
    modern natural old organic perfect pink plain portable premium pure purple quick quiet red reusable rich round
    short silent simple slim small smooth soft solid strong super sweet thick thin tiny tall ultra unique vintage
    warm white wide yellow""".split())


# Text rules

def split_action(action):
    """Split `name[argument]` at the last "[" and the last "]" after it; (action, None) where it has no such form."""
    match = re.match(r"(.+)\[(.+)\]", action)
    return match.groups() if match else (action, None)


def normalize_color(value):
    """The first colour word found inside `value` (a string, or a tuple that holds the word), else `value` itself."""
    return next((color for color in COLORS if color in value), value)


def token_set_ratio(a, b):
    """thefuzz's token_set_ratio, 0..100: Latin-1 above ASCII is deleted, other scripts are kept; tuples by `str`."""
    a, b = (re.sub("[\x80-\xff]", "", str(text)) for text in (a, b))
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

    Titles are mostly nouns, so this errs by a few adjectives, which match or miss in both titles alike.
    """
    words = re.findall(r"[^\W_]+", title.lower())
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


# Search: BM25 with the constants of Anserini

STOP_WORDS = frozenset("""a an and are as at be but by for if in into is it no not of on or s such t that the their
    then there these they this to was will with""".split())


def search_terms(text):
    """Lower-cased alphanumeric words without stop words; a plural "s" is cut, so that "lamps" finds "lamp"."""
    words = (word for word in re.findall(r"[^\W_]+", text.lower()) if word not in STOP_WORDS)
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]


class Postings(NamedTuple):
    """An inverted index: for each term the documents that hold it and what it adds to their scores."""
    ids: list                            # document number -> identifier
    terms: dict                          # term -> (document numbers [n] int32 ascending, weights [n] fp32)


def build_postings(ids, texts, *, k1=0.9, b=0.4):
    """Index `texts` under `ids` for BM25 with Lucene's idf, ln(1 + (N - df + 0.5) / (df + 0.5))."""
    counts = {}
    lengths = np.zeros(len(ids))
    for number, text in enumerate(texts):
        terms = search_terms(text)
        lengths[number] = len(terms)
        for term, count in Counter(terms).items():
            counts.setdefault(term, []).append((number, count))
    penalty = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
    postings = {}
    for term, entries in counts.items():
        numbers, tf = np.array(entries, dtype=np.int32).T
        idf = np.log(1 + (len(ids) - len(entries) + 0.5) / (len(entries) + 0.5))
        postings[term] = numbers, (idf * tf / (tf + penalty[numbers])).astype(np.float32)
    return Postings(list(ids), postings)


def bm25_scores(postings, query):
    """The score of every document, [number of documents] fp32; 0 where no term of the query occurs."""
    scores = np.zeros(len(postings.ids), dtype=np.float32)
    for term in search_terms(query):
        if term in postings.terms:
            numbers, weights = postings.terms[term]
            scores[numbers] += weights
    return scores


def bm25(postings, query, k=HITS):
    """The identifiers of at most k best documents, best first; equal scores in document order."""
    scores = bm25_scores(postings, query)
    hits = np.flatnonzero(scores)
    if len(hits) > k:                    # sort only what can be among the best k
        hits = hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
    best = hits[np.argsort(-scores[hits], kind="stable")][:k]
    return tuple(postings.ids[number] for number in best)


def product_document(product):
    """The text under which a product is found: title, description, first bullet point and options, lower-cased."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product["options"].items())
    first_bullet = product["BulletPoints"][0] if product["BulletPoints"] else ""
    return " ".join([product["Title"], product["Description"], first_bullet, options]).lower()


# Loading the official files

DROPPED_FIELDS = frozenset("""product_information brand brand_url list_price availability_quantity
    availability_status total_reviews total_answered_questions seller_id seller_name fulfilled_by_amazon
    fast_track_message aplus_present small_description_old""".split())


def read_json(folder, pattern, kind):
    """The content of the one file in `folder` that matches `pattern`, and its name; `kind` is the expected type."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"WebShop data folder {folder} is no folder; give the one with the official files.")
    matches = sorted(folder.glob(pattern))
    if not matches:
        raise FileNotFoundError(f"No {pattern} in {folder}; put the official WebShop file there.")
    if len(matches) > 1:
        names = ", ".join(path.name for path in matches)
        raise ValueError(f"Several files match {pattern} in {folder} ({names}); keep one of them there.")
    try:
        content = json.loads(matches[0].read_text(encoding="utf-8"))
    except ValueError as error:          # both not JSON and not UTF-8
        raise ValueError(f"{matches[0]} is not a JSON file: {error}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{matches[0]} holds a {type(content).__name__} where a {kind.__name__} is expected.")
    return content, matches[0].name


def checked(entry, field, kind, where):
    """`entry[field]`, which must be a `kind` (a list: of strings); `where` names the file and entry in the error."""
    names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    if field not in entry:
        raise ValueError(f"{where}: field {field!r} is missing; it must be a {names}.")
    value = entry[field]
    if not isinstance(value, kind) or isinstance(value, list) and not all(isinstance(item, str) for item in value):
        strings = " of strings" if isinstance(value, list) else ""
        raise ValueError(f"{where}: field {field!r} must be a {names}{strings}, not {value!r:.60}.")
    return value


def parse_pricing(entry, where):
    """(list of one fixed price or of a range's two ends, price tag) from a text such as "$12.99" or "$10.00$20.00"."""
    text = entry.get("pricing")
    if not text:
        return [100.0], "$100.0"
    try:
        parts = checked(entry, "pricing", str, where).split("$")[1:]
        prices = [float(re.sub(r"[^\d.]", "", part)) for part in parts][:2]
        return prices, f"${prices[0]}" if len(prices) == 1 else f"${prices[0]} to ${prices[1]}"
    except (ValueError, IndexError) as error:
        raise ValueError(f"{where}: field 'pricing' must be a text such as '$12.99' or '$10.00$20.00', "
                         f"not {text!r:.60}.") from error


def parse_options(entry, where):
    """({option name: values}, {value: image or None}), lower-cased, from `customization_options`."""
    if "customization_options" not in entry:
        raise ValueError(f"{where}: field 'customization_options' is missing; it must be a dict or null.")
    options, images = {}, {}
    if not entry["customization_options"]:
        return options, images
    for name, choices in checked(entry, "customization_options", dict, where).items():
        if choices is None:
            continue
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise ValueError(f"{where}: option {name!r} in 'customization_options' must be null or a list of objects.")
        values = [checked(choice, "value", str, f"{where}, option {name!r}").strip().replace("/", " | ").lower()
                  for choice in choices]
        images.update(zip(values, (choice.get("image") for choice in choices)))
        options[name.lower()] = values
    return options, images


def load_product(entry, where):
    """A product as the original's loader leaves it, but for the fields that come from the other two files."""
    bullets = checked(entry, "small_description", (list, str), where)
    pricing, tag = parse_pricing(entry, where)
    options, images = parse_options(entry, where)
    if not isinstance(entry.get("images"), list) or not entry["images"]:
        raise ValueError(f"{where}: field 'images' must be a list of at least one address.")
    checked(entry, "category", str, where)
    checked(entry, "product_category", str, where)
    return {
        **{field: value for field, value in entry.items() if field not in DROPPED_FIELDS},
        "query": checked(entry, "query", str, where).lower().strip(),
        "Title": checked(entry, "name", str, where),
        "Description": checked(entry, "full_description", str, where),
        "BulletPoints": bullets if isinstance(bullets, list) else [bullets],
        "Reviews": [], "Rating": "N.A.",          # the original ships no reviews
        "pricing": pricing, "Price": tag,
        "options": options, "option_to_image": images,
        "MainImage": entry["images"][0],
    }


def load_instructions(product, attributes, human, where):
    """The fields of a product that come from the attribute file and, if `human` is not None, from the human file."""
    asin = product["asin"]
    known = attributes.get(asin, {})
    if not isinstance(known, dict):
        raise ValueError(f"{where}: the entry must be an object, not {known!r:.60}.")
    found = {"Attributes": checked(known, "attributes", list, where) if "attributes" in known else ["DUMMY_ATTR"]}
    if human is not None:
        return {**found, "instructions": human[asin]} if asin in human else found
    if asin not in attributes:
        raise ValueError(f"{where}: there is no entry for this product; take the file that goes with the products.")
    found["instruction_text"] = known.get("instruction")
    found["instruction_attributes"] = known.get("instruction_attributes")
    if found["instruction_text"] is not None:
        checked(known, "instruction", str, where)
        if not checked(known, "instruction_attributes", list, where):
            raise ValueError(f"{where}: field 'instruction_attributes' is empty although there is an instruction.")
    return found


@functools.lru_cache(maxsize=8)
def load_products(data, human_goals):
    """{asin: product} in the order of the file. Shared between environments: not to be changed."""
    if data is None:
        catalogue = webshop_catalogue()
        items, attributes, human = catalogue["items"], catalogue["attributes"], catalogue["human"]
        items_name, attributes_name, human_name = "items", "attributes", "human"
    else:
        items, items_name = read_json(data, "items_shuffle*.json", list)
        attributes, attributes_name = read_json(data, "items_ins_v2*.json", dict)
        human, human_name = read_json(data, "items_human_ins*.json", dict) if human_goals else (None, None)
    products = {}
    for number, entry in enumerate(items):
        if not isinstance(entry, dict):
            raise ValueError(f"{items_name}, entry {number}: a product must be an object, not {entry!r:.60}.")
        asin = checked(entry, "asin", str, f"{items_name}, entry {number}")
        if asin == "nan" or len(asin) > 10 or asin in products:      # the original's filter
            continue
        product = load_product(entry, f"{items_name}, entry {number} ({asin})")
        products[asin] = product | load_instructions(
            product, attributes, human if human_goals else None, f"{attributes_name}, {asin}")
        check_human_instructions(products[asin].get("instructions", []), f"{human_name}, {asin}")
    if not products:
        raise ValueError(f"{items_name} holds no product with a usable asin; give a file with at least one.")
    return products


def check_human_instructions(instructions, where):
    if not isinstance(instructions, list) or not all(isinstance(entry, dict) for entry in instructions):
        raise ValueError(f"{where}: the entry must be a list of objects.")
    for entry in instructions:
        checked(entry, "instruction", str, where)
        checked(entry, "instruction_attributes", list, where)
        checked(entry, "instruction_options", list, where)


@functools.lru_cache(maxsize=8)
def load_search(data, human_goals):
    """query -> at most 50 asins, best first, over the products of `load_products`; recent queries are remembered."""
    products = load_products(data, human_goals)
    postings = build_postings(list(products), map(product_document, products.values()))
    return functools.lru_cache(maxsize=4096)(functools.partial(bm25, postings))


# Goals

GOAL_FIELDS = {"asin", "category", "query", "name", "product_category", "instruction_text", "attributes", "price_upper",
               "goal_options"}


def draw_prices(products, rng):
    """{asin: price}; a price range is drawn uniformly between its ends, once for all episodes."""
    return {asin: product["pricing"][0] if len(product["pricing"]) == 1 else rng.uniform(*product["pricing"])
            for asin, product in products.items()}


def draw_price_bound(price, rng):
    """(upper price of a goal, the sentence about it): the larger of two of the next four tens above the price."""
    candidates = [bound for bound in (10.0 * step for step in range(1, 100)) if bound > price][:4]
    if len(candidates) < 2:
        return 1000000, ""
    upper = max(rng.sample(candidates, 2))
    return upper, f", and price lower than {upper:.2f} dollars"


def make_goal(product, instruction, attributes, price_upper, options):
    copied = {field: product[field] for field in ("asin", "category", "query", "name", "product_category")}
    return {**copied, "instruction_text": instruction, "attributes": attributes, "price_upper": price_upper,
            "goal_options": options}


def human_goals_of(product, price, rng):
    """One goal for each human instruction that names attributes; its options are a list of values."""
    goals = []
    for entry in product.get("instructions", []):
        if entry["instruction_attributes"]:
            upper, sentence = draw_price_bound(price, rng)
            goals.append(make_goal(product, entry["instruction"].strip(".") + sentence, entry["instruction_attributes"],
                                   upper, entry["instruction_options"]))
    return goals


def synthetic_goals_of(product, price, rng):
    """One goal for each combination of option values, all under one price bound; its options are {name: value}."""
    if product["instruction_text"] is None:
        return []
    upper, sentence = draw_price_bound(price, rng)
    names = sorted(product["options"])
    goals = []
    for values in itertools.product(*(product["options"][name] for name in names)):
        options = dict(zip(names, values))
        wish = ", and ".join(f"{name}: {value}" for name, value in options.items())
        text = product["instruction_text"] + (f" with {wish}" if wish else "") + sentence
        goals.append(make_goal(product, text, product["instruction_attributes"], upper, options))
    return goals


def build_goals(products, prices, human_goals, rng):
    """All goals in product order. `weight` is 1 for human goals, else the mean inverse frequency of the attributes."""
    goals_of = human_goals_of if human_goals else synthetic_goals_of
    goals = [goal for asin, product in products.items() for goal in goals_of(product, prices[asin], rng)]
    frequency = Counter(attribute for goal in goals for attribute in goal["attributes"])
    for goal in goals:
        rarity = sum(1 / frequency[attribute] for attribute in goal["attributes"])
        goal["weight"] = 1 if human_goals else rarity / len(goal["attributes"])
    return goals


@functools.lru_cache(maxsize=64)
def load_goals(data, human_goals, seed, shuffle_seed):
    """({asin: price}, shuffled goals), drawn as in the original. Shared between environments: not to be changed."""
    products = load_products(data, human_goals)
    rng = random.Random(seed)
    prices = draw_prices(products, rng)
    goals = build_goals(products, prices, human_goals, rng)
    if not goals:
        raise ValueError(f"The WebShop data in {data or 'the generated catalogue'} give no "
                         f"{'human' if human_goals else 'synthetic'} goal; at least one product needs an instruction.")
    random.Random(shuffle_seed).shuffle(goals)
    return prices, goals


def weighted_goal(goals, rng):
    """The index that the original plays when none is asked for.

    Its table of cumulative weights begins with a zero, so goal i is drawn with the weight of goal i - 1, goal 0 never.
    """
    cumulative = [0, *itertools.accumulate(goal["weight"] for goal in goals)]
    return min(bisect.bisect(cumulative, rng.uniform(0, cumulative[-1])), len(goals) - 1)


# Reward

def type_reward(bought, goal, nouns):
    """How far the product is of the wished kind: r_type in {0, 0.1, 0.5, 1} and what it is decided by."""
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


def count_attributes(bought, wished):
    """How many wished attributes the product has: by fuzzy match, or literally in its texts."""
    texts = [bought["Title"].lower(), " ".join(bought["BulletPoints"]).lower(), bought["Description"].lower()]
    return sum(any(token_set_ratio(has, wish) > 85 for has in bought["Attributes"])
               or any(wish in text for text in texts) for wish in wished)


def count_options(chosen, wished):
    """How many wished options were chosen. A synthetic goal wishes (name, value) pairs, compared as Python text."""
    chosen = [normalize_color(value) for value in chosen.values()]
    wished = [normalize_color(wish) for wish in (wished.items() if isinstance(wished, dict) else wished)]
    return sum(any(token_set_ratio(value, wish) > 85 for value in chosen) for wish in wished)


def webshop_reward(bought, goal, options, price, *, nouns=None):
    """The original's graded reward of a purchase, 0..1, and its parts.

    bought: product as loaded; goal: as in `WebShop.goals`; options: {name: value} chosen; price: of the product in
    dollars; nouns: title -> lower-cased nouns with repetitions (default `title_nouns`).
    reward = r_type * (attributes met + options met + price met) / (attributes + options + 1); each other r_* is a met
    share, each w_* the share of that part in the denominator; r_option, w_option are None for a goal without options.
    """
    parts = type_reward(bought, goal, nouns or title_nouns)
    attributes, wishes = len(goal["attributes"]), len(goal["goal_options"])
    if not attributes:
        raise ValueError(f"The goal for {goal['asin']} names no attribute; the reward is defined for at least one.")
    total = attributes + wishes + 1
    attribute_hits = count_attributes(bought, goal["attributes"])
    option_hits = count_options(options, goal["goal_options"])
    r_price = price <= goal["price_upper"]
    parts |= {
        "num_attr_matches": attribute_hits, "r_att": attribute_hits / attributes, "w_att": attributes / total,
        "num_option_matches": option_hits, "r_option": option_hits / wishes if wishes else None,
        "w_option": wishes / total if wishes else None, "r_price": r_price, "w_price": 1 / total,
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
    """One of `SUB_PAGES`. List entries have a leading blank, so that even an empty one is visible."""
    texts = {
        "description": [product["Description"]],
        "features": [" " + bullet for bullet in product["BulletPoints"]],
        "reviews": [],
        "attributes": [" " + attribute for attribute in product["Attributes"]]
                      + [product["category"], product["query"], product["product_category"]],
    }[page]
    return top_of_page(instruction) + [("button", "< Prev")] + [("text", text) for text in texts]


def done_page(asin, options, score):
    """The page after a purchase. The original fills only these fields of it; the others are blank or "None"."""
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
    """Drop what the original's HTML parser drops: blanks become one blank, or nothing if they hold a line break."""
    for kind, text in parts:
        if text.strip(" \n\t\f\r"):
            yield kind, text
        elif text and "\n" not in text:
            yield kind, " "


def plain_text(parts):
    return " [SEP] ".join(text.strip() for _, text in visible_parts(parts))


def rich_text(parts, address, opened):
    """One line for each visible text; buttons are marked, as clicked if in `address` (options) or `opened` (asins)."""
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


class WebShop(gymnasium.Env):
    """Buy what an instruction asks for; actions are `search[words]` (on every page) and `click[label]`.

    data: folder with the official items_shuffle*.json, items_ins_v2*.json and, for human goals, items_human_ins*.json;
        None takes the generated catalogue, whose scores are not comparable with those on the official products.
    human_goals: instructions written by people instead of synthetic ones.
    seed: of the prices and price bounds; shuffle_seed: of the order of goals (the original fixes 233; verl-agent and
        SDAR take the same number for both, another one for every worker).
    search: query -> ranked asins, replaces the BM25, the random draw of the query "<r>" included.
    nouns: title -> its lower-cased nouns with repetitions, replaces `title_nouns`.
    observation_mode: "text", or "text_rich" with a line for each text and marked buttons.
    show_attrs: items also have a page of attributes.

    `reset(options=)` takes {"split": "train" | "val", "task_id": int}, {"split": "all"} (the original's weighted draw
    over all goals) or {"goal": index in `goals` or a goal}. The first 500 goals are "val", the others "train" (half
    each if there are fewer than 1,000). The reward is the graded score of a purchase, which ends the episode; it is
    truncated after `WEBSHOP_MAX_STEPS`. As in the original, a search still works afterwards.

    State: page ("start", "results", "item", one of `SUB_PAGES`, "done"), results (asins, best first), page_number (from
    1; None before a search), asin (or None), options ({name: value} chosen), clickables (labels), goal, price ({asin:
    dollars}). products, goals and price are shared between environments and must not be changed.
    Raises FileNotFoundError or ValueError for missing or malformed files, ValueError for impossible options of `reset`.
    """
    metadata = {"render_modes": []}

    def __init__(self, data=None, *, human_goals=False, seed=233, search: Callable | None = None,
                 nouns: Callable | None = None, shuffle_seed=233, observation_mode="text", show_attrs=False):
        if observation_mode not in ("text", "text_rich"):
            raise ValueError(f"observation_mode must be 'text' or 'text_rich', not {observation_mode!r}.")
        data = None if data is None else str(data)
        self.products = load_products(data, bool(human_goals))
        self.price, self.goals = load_goals(data, bool(human_goals), seed, shuffle_seed)
        self.search, self.draws_random = search or load_search(data, bool(human_goals)), search is None
        # Generated titles are judged by the rule everywhere, so that a score does not depend on what is installed.
        self.nouns = nouns or (nouns_by_rule if data is None else title_nouns)
        self.observation_mode, self.show_attrs = observation_mode, bool(show_attrs)
        first_train = WEBSHOP_VAL_GOALS if len(self.goals) >= 2 * WEBSHOP_VAL_GOALS else len(self.goals) // 2
        self.splits = {"val": range(first_train), "train": range(first_train, len(self.goals))}
        self.observation_space, self.action_space = AnyText(max_length=65536), AnyText(max_length=1024)
        self.page = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.task_id = self._choose_goal(seed, options or {})
        self.steps = 0
        self._show_start()
        return self._observe(), self._info(valid=True, score=0.0)

    def _choose_goal(self, seed, options):
        """(goal, task_id); the task_id is the index in the split, for a goal given by index that index, else None."""
        unknown = options.keys() - {"split", "task_id", "goal"}
        if unknown or "goal" in options and len(options) > 1:
            raise ValueError(f"reset takes options 'split' and 'task_id', or 'goal' alone, not {sorted(options)}.")
        if isinstance(options.get("goal"), dict):
            missing = GOAL_FIELDS - options["goal"].keys()
            if missing or options["goal"]["asin"] not in self.products:
                raise ValueError(f"The given goal lacks {sorted(missing)} or its product is not in the catalogue.")
            return options["goal"], None
        split = "all" if "goal" in options else options.get("split", "train")
        indices = range(len(self.goals)) if split == "all" else self.splits.get(split)
        if not indices:
            raise ValueError(f"WebShop has no goals in split {split!r}; splits are 'train', 'val' and 'all'.")
        task_id = options.get("goal", options.get("task_id"))
        if task_id is None and split == "all":
            own_seed = int(self.np_random.integers(2**32)) if seed is None else seed
            task_id = weighted_goal(self.goals, random.Random(own_seed))
        elif task_id is None:
            task_id = int(self.np_random.integers(len(indices)))
        if not isinstance(task_id, (int, np.integer)) or not 0 <= task_id < len(indices):
            raise ValueError(
                f"Goal {task_id!r} is not in split {split!r}; it must be a number from 0 to {len(indices) - 1}.")
        return self.goals[indices[task_id]], int(task_id)

    def step(self, action):
        if not isinstance(action, str):
            raise TypeError(f"A WebShop action is a string such as 'search[red lamp]', not {type(action).__name__}.")
        if self.page is None:
            raise gymnasium.error.ResetNeeded("Call reset before the first step.")
        name, argument = split_action(action)
        argument = argument and argument.lower()
        score, valid = 0.0, False
        if name == "search" and argument is not None:
            self._show_results(argument, 1)
            valid = bool(argument.strip())
        elif name == "click" and argument in self.clickables and argument != "search":
            score, valid = self._click(argument), True
        self.steps += 1
        bought = valid and self.page == "done"
        observation, info = self._observe(), self._info(valid=valid, score=score)
        return observation, score, bought, not bought and self.steps >= WEBSHOP_MAX_STEPS, info

    def _click(self, label):
        """Do what the label stands for and return the score, which is 0 but for a purchase."""
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
        score, self.reward_parts = webshop_reward(
            self.products[self.asin], self.goal, self.options, self.price[self.asin], nouns=self.nouns)
        self._show("done", score)
        return score

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
        if mark == "<r>" and self.draws_random:
            return self.np_random.permutation(list(self.products))[:HITS].tolist()
        if mark == "<c>":                # without a word, and for "<a>", the original raises; here nothing is found
            return [asin for asin, product in self.products.items() if words and product["category"] == words[0]]
        if mark == "<q>":
            return [asin for asin, product in self.products.items() if product["query"] == " ".join(words).strip()]
        if mark == "<a>":
            return []
        return [asin for asin in self.search(query) if asin in self.products][:HITS]

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
        return tuple(sorted({goal["category"] for goal in self.goals}))

    def num_tasks(self, split):
        if split not in self.splits:
            raise ValueError(f"WebShop has no split {split!r}; splits are {', '.join(self.splits)}.")
        return len(self.splits[split])

    def expert(self):
        """A good next action, from any page."""
        return webshop_expert(self)[1]

    def demonstrate(self, rng, careless=False):
        """The next (thought, action) of the careful or the careless shopper; rng: `random.Random`."""
        return webshop_habit(self, rng) if careless else webshop_expert(self)


# ---------------------------------------------------------------------------------------------------------------------
# WebShop: a generated catalogue in the official schema
# ---------------------------------------------------------------------------------------------------------------------

# A department: the first level of product_category, its attributes (shared by its types), its options with all their
# values, and its types as "group: noun phrase, ..". No word of a noun phrase occurs in another one, in an attribute or
# in an option, so that a search for the noun alone finds the type and nothing tells its products apart.
WEBSHOP_DEPARTMENTS = {
    "beauty": (
        "Beauty & Personal Care",
        "vegan, cruelty free, paraben free, long lasting, gentle, hydrating, travel friendly, non greasy, handmade, "
        "natural",
        {"scent": "lavender, jasmine, citrus, vanilla, coconut, cedar", "size": "small, medium, large"},
        ["Skin Care: face cream, body lotion, eye serum, lip balm", "Hair Care: shampoo, beard wax, curl spray",
         "Bath: bath bomb, hand soap", "Makeup: mascara, nail polish, makeup brush"],
    ),
    "electronics": (
        "Electronics",
        "wireless, waterproof, rechargeable, portable, fast charging, heavy duty, energy saving, shockproof, quiet, "
        "touch control",
        {"color": "black, white, blue, red, gray, silver", "style": "retro, modern, sport, studio"},
        ["Accessories: phone case, tablet stand, power bank, wall charger", "Audio: bluetooth speaker, headset, radio",
         "Computers: keyboard, webcam, usb hub", "Smart Home: alarm clock"],
    ),
    "fashion": (
        "Clothing, Shoes & Jewelry",
        "machine washable, lightweight, breathable, stretchy, quick dry, slim fit, wrinkle resistant, fleece lined, "
        "soft, padded",
        {"color": "black, blue, green, pink, brown, purple", "size": "small, medium, large, giant"},
        ["Tops: hoodie, polo shirt, cardigan, tank top", "Outerwear: rain jacket, winter coat",
         "Bottoms: denim skirt, yoga pant", "Dresses: maxi dress", "Accessories: wool scarf, leather belt, sun hat"],
    ),
    "garden": (
        "Home & Kitchen",
        "rust proof, foldable, easy clean, space saving, sturdy, eco friendly, stackable, non slip, dimmable, washable",
        {"color": "black, white, green, red, brown, orange", "size": "small, medium, large, giant"},
        ["Lighting: desk lamp, paper lantern", "Textiles: area rug, throw pillow, shower curtain, bed sheet",
         "Outdoor: flower pot, patio chair, bird feeder", "Storage: laundry basket, spice rack"],
    ),
    "grocery": (
        "Grocery & Gourmet Food",
        "gluten free, sugar free, dairy free, organic, kosher, low sodium, non gmo, keto friendly, fair trade, "
        "caffeine free",
        {"flavor": "lemon, honey, ginger, mint, berry, cinnamon", "pack": "single, double, triple"},
        ["Beverages: herbal tea, ground coffee, cocoa powder",
         "Snacks: granola bar, trail mix, rice cracker, corn chip",
         "Pantry: olive oil, pancake syrup, tomato sauce, peanut butter"],
    ),
}
WEBSHOP_BRANDS = ("Norvell Brimo Kestin Velmar Orlano Tamsol Dunvar Galvo Hestel Ilvane Lumbry Marloft Nuvera Pelmont "
                  "Rendal Solmery Torbin Umbrik Wexley Zanvi").split()
# Descriptions have equal lengths, and so have first bullets, without stop words or words of a request: BM25 then ranks
# by what a shopper asks for alone, and twins tie.
WEBSHOP_DESCRIPTIONS = ["Checked twice before leaving our workshop.", "Our shoppers buy more every year.",
                        "Ships within two days from here.", "Crafted from scratch like years ago."]
WEBSHOP_BULLETS = ["Good every day.", "Lasts many years.", "Liked across towns.", "Simple yet solid."]
WEBSHOP_DETAILS = ["gift wrap", "two year warranty", "printed guide", "spare parts"]
WEBSHOP_REQUESTS = ["find me", "i need", "i am looking for", "i want to buy", "please get me"]
WEBSHOP_HUMAN_REQUESTS = [
    "my old {noun} is gone, so now i want one that is {a} and also {b}{options}",
    "do you sell any {noun} which is both {a} and {b}?{options}",
    "shopping for my sister today: {b}, {a}, and it has to be a {noun}{options}",
    "a {noun} for the weekend, {a} if possible, and {b} as well{options}",
    "what i miss at home is a {noun}. make it {b} and {a}{options}",
]


def webshop_catalogue() -> dict:
    """1,026 generated products with their instructions, in the three official files' schema.

    Every call gives the same. A product is defined by its type, two of the type's seven attributes and a brand.
    Products of one type are near-duplicates that differ in an attribute, and have the same options. In an eighth of
    the pairs of attributes there is a dear twin, listed (so, at equal BM25, ranked) before the cheap one: it is 50 to
    90 dollars above it, which the goal's bound, at most 40 above the price, never allows. In a tenth of the pairs the
    second attribute stands in the first bullet point and not in the title.

    Returns {"items": items_shuffle.json's list, "attributes": items_ins_v2.json's, "human": items_human_ins.json's}.
    """
    rng = random.Random(0)
    chunks = rng.sample([a + b + c + d for a in "BDKLMNPRST" for b in "AEIO" for c in "DKLMNRTV" for d in "AIOU"], 40)
    asins = [f"{first}-{second}" for first in chunks for second in chunks]
    rng.shuffle(asins)
    types = [(department, group, noun) for department, (_, _, _, groups) in WEBSHOP_DEPARTMENTS.items()
             for line in groups for group, nouns in [line.split(": ")] for noun in nouns.split(", ")]
    option_counts = [0 if 20 * i < 3 * len(types) else 1 if 20 * i < 12 * len(types) else 2 for i in range(len(types))]
    rng.shuffle(option_counts)
    catalogue = {"items": [], "attributes": {}, "human": {}}
    pairs_of_twins = []
    for (department, group, noun), option_count in zip(types, option_counts):
        root, attributes, options, _ = WEBSHOP_DEPARTMENTS[department]
        kind = {"category": department, "query": _plural(noun), "images": ["https://example.com/picture.jpg"],
                "product_category": f"{root} › {group} › {_plural(noun).title()}",
                "customization_options": _draw_options(rng, options, option_count)}
        pool = rng.sample(attributes.split(", "), 7)
        pairs = rng.sample([(a, b) for a in pool for b in pool if pool.index(a) < pool.index(b)], 16)
        for number, pair in enumerate(pairs):
            pair = rng.sample(pair, 2)
            hidden = rng.random() < 0.1
            price = rng.randrange(50, 450) / 10
            prices = [round(price + rng.randrange(500, 900) / 10, 1), price] if number < 2 else [price]
            products = [kind | _product(rng, asins.pop(), brand, pair, noun, price, hidden)
                        for brand, price in zip(rng.sample(WEBSHOP_BRANDS, 2), prices)]
            catalogue["items"] += products
            if len(products) == 2:
                pairs_of_twins.append([product["asin"] for product in products])
            for product in products:
                entry = {"attributes": [*pair, product["small_description"][1].removeprefix("Comes with ").rstrip(".")]}
                is_dear = len(products) == 2 and product is products[0]
                if not is_dear or rng.random() < 1 / 3:
                    entry |= {"instruction": _request(rng, pair, noun), "instruction_attributes": list(pair)}
                if not is_dear and rng.random() < 0.2:
                    catalogue["human"][product["asin"]] = [_human_request(rng, pair, noun, kind)]
                catalogue["attributes"][product["asin"]] = entry
    rng.shuffle(catalogue["items"])
    _list_first(catalogue["items"], pairs_of_twins)
    return catalogue


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _draw_options(rng: random.Random, options: dict, count: int) -> dict:
    names = sorted(rng.sample(list(options), count))
    values = {name: options[name].split(", ") for name in names}
    return {name: [{"value": value} for value in sorted(rng.sample(values[name], min(4, len(values[name]))))]
            for name in names}


def _product(rng, asin: str, brand: str, pair: list, noun: str, price: float, hidden: bool) -> dict:
    """One entry of items_shuffle.json, without the fields that all products of its type share."""
    words = ["everyday", pair[0]] if hidden else pair
    bullet = f"Proven {pair[1]} quality." if hidden else rng.choice(WEBSHOP_BULLETS)
    return {"asin": asin, "name": " ".join([brand, *words, noun]), "pricing": f"${price:.2f}",
            "full_description": rng.choice(WEBSHOP_DESCRIPTIONS),
            "small_description": [bullet, f"Comes with {rng.choice(WEBSHOP_DETAILS)}."]}


def _request(rng, pair: list, noun: str) -> str:
    what = f"{noun} that is {pair[0]} and {pair[1]}" if rng.random() < 0.2 else f"{pair[0]} {pair[1]} {noun}"
    return f"{rng.choice(WEBSHOP_REQUESTS)} {_article(what)}"


def _human_request(rng, pair: list, noun: str, kind: dict) -> dict:
    values = [rng.choice(values)["value"] for values in kind["customization_options"].values()]
    options = f" - i would like {' and '.join(values)}" if values else ""
    text = rng.choice(WEBSHOP_HUMAN_REQUESTS).format(noun=noun, a=pair[0], b=pair[1], options=options)
    return {"instruction": text, "instruction_attributes": list(pair), "instruction_options": values}


def _list_first(items: list, pairs: list) -> None:
    """Swaps products in place so that the first of each pair of asins comes before the second."""
    place = {item["asin"]: i for i, item in enumerate(items)}
    for first, second in pairs:
        i, j = place[first], place[second]
        if i > j:
            items[i], items[j] = items[j], items[i]


# ---------------------------------------------------------------------------------------------------------------------
# WebShop: a careful and a careless shopper
# ---------------------------------------------------------------------------------------------------------------------

# How often the careless shopper gives in to a habit, at each decision where the careful one would do something else:
# search the product without its details; open the first product whatever its price and details; buy with an option not
# chosen; stay with a wrong product.
WEBSHOP_HABITS = {"vague_query": 0.6, "any_price": 0.6, "skip_options": 0.5, "keep_wrong": 1.0}
WEBSHOP_BUTTONS = {"search", "back to search", "< prev", "next >", "description", "features", "reviews", "attributes",
                   "buy now"}


def webshop_expert(env) -> tuple[str, str]:
    """The careful shopper's (thought, action) in any state: wins every goal that its own product can win."""
    return _shop(env, careless=lambda habit: False)


def webshop_habit(env, rng: random.Random) -> tuple[str, str]:
    """The careless shopper's (thought, action): the careful one's, but for WEBSHOP_HABITS drawn from `rng`."""
    return _shop(env, careless=lambda habit: rng.random() < WEBSHOP_HABITS[habit])


def _shop(env, careless) -> tuple[str, str]:
    """Thoughts of a careful and a careless decision begin with different words."""
    if env.page == "results":
        return _choose_product(env, careless)
    if env.page == "item":
        return _choose_options(env, careless)
    if env.page in ("description", "features", "reviews", "attributes"):
        return "back to the product", "click[< prev]"
    details, noun = _request_words(env.goal)
    if details != noun and careless("vague_query"):
        return "search the product", f"search[{noun}]"
    return "use every detail", f"search[{details}]"


def _request_words(goal: dict) -> tuple[str, str]:
    """The words to search for: what is asked for in the task's words, article included, and its noun phrase alone."""
    text = re.sub(r", and price lower than [\d.]+ dollars$", "", goal["instruction_text"].lower())
    match = re.match(rf"(?:{'|'.join(WEBSHOP_REQUESTS)}) (.+?)(?: with [^:]+: .*)?$", text)
    if match is None:  # a human's wording
        return " ".join([*goal["attributes"], goal["query"]]).lower(), goal["query"]
    noun = match[1].split(" that ")[0]
    for attribute in goal["attributes"]:
        noun = " ".join(noun.replace(attribute, " ").split())
    return match[1], noun or goal["query"]


def _wanted_options(env, asin: str) -> dict[str, str]:
    """The goal's option values that can be clicked on a product's page, {option name: value} in page order."""
    wanted = env.goal["goal_options"]
    pairs = wanted.items() if isinstance(wanted, dict) else [(None, value) for value in wanted]
    options = env.products[asin]["options"]
    sets = {value: name for name, values in options.items() for value in values}  # of equal values the later one counts
    found = {}
    for name, values in options.items():
        for value in values:
            clickable = sets[value] == name and value and value not in WEBSHOP_BUTTONS and not set(value) & {"[", "\n"}
            if clickable and ((name, value) in pairs or (None, value) in pairs):
                found[name] = value
    return found


def _fits(env, asin: str) -> bool:
    """Whether buying the product can win; the goal's own product stands in for goals that none can win."""
    if asin == env.goal["asin"]:
        return True
    if env.price[asin] > env.goal["price_upper"]:
        return False
    reward, _ = webshop_reward(env.products[asin], env.goal, _wanted_options(env, asin), env.price[asin],
                               nouns=env.nouns)
    return reward == 1.0


def _choose_product(env, careless) -> tuple[str, str]:
    start = 10 * (env.page_number - 1)
    shown = env.results[start:start + 10]
    fitting = next((asin for asin in shown if _fits(env, asin)), None)
    if shown and fitting == shown[0]:
        return "first one fits", f"click[{fitting.lower()}]"
    if shown and careless("any_price"):
        return "take the first", f"click[{shown[0].lower()}]"
    if fitting:
        dear = env.price[shown[0]] > env.goal["price_upper"]
        return "first costs too much" if dear else "another one fits", f"click[{fitting.lower()}]"
    if any(_fits(env, asin) for asin in env.results[start + 10:]):
        return "look further", "click[next >]"
    details, _ = _request_words(env.goal)
    queries = [details, " ".join([*env.goal["attributes"], env.goal["query"]]), env.goal["name"]]
    queries = list(dict.fromkeys(query.lower() for query in queries))
    used = queries.index(env.query) if env.query in queries else -1
    return "none of these fits", f"search[{queries[(used + 1) % len(queries)]}]"


def _choose_options(env, careless) -> tuple[str, str]:
    if not _fits(env, env.asin) and not careless("keep_wrong"):
        return "not the right one", "click[< prev]"
    for name, value in _wanted_options(env, env.asin).items():
        if value not in env.options.values():
            if careless("skip_options"):
                return "good enough", "click[buy now]"
            return f"choose {name}: {value}", f"click[{value}]"
    return "all is chosen", "click[buy now]"


# ---------------------------------------------------------------------------------------------------------------------
# WebShop: prompt and answer
# ---------------------------------------------------------------------------------------------------------------------

def webshop_page(observation: str, admissible: list[str]) -> str:
    """A page as short lines: what can be clicked stands in brackets, the task (told elsewhere) is left out.

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
    parts = observation.split(" [SEP] ")
    if parts[0] == "WebShop":
        parts = parts[1:]
    if parts[:1] == ["Instruction:"]:
        parts = parts[2:]
    kinds = ["text" if part.lower() not in labels else "button" if part.lower() in WEBSHOP_BUTTONS else "link"
             for part in parts]
    on_results = "next >" in labels
    page = ""
    for i, (part, kind) in enumerate(zip(parts, kinds)):
        before = kinds[i - 1] if i else None
        after = kinds[i + 1] if i + 1 < len(parts) else None
        if on_results:
            new_line = kind == "link"
        else:  # an option's name, the title or text below a row of brackets, a row of buttons below a text
            new_line = kind == "text" and (before != "text" or after == "link") or kind == "button" and before != kind
        page += ("\n" if new_line else " ") + (part if kind == "text" else f"[{part.lower()}]")
    return page.strip()


def webshop_prompt(task: str, history: list, observation: str, admissible: list[str], skills: str = "") -> str:
    """The user message of one turn.

    history: the last (observation, action) pairs, oldest first; of a pair with the observation "" only the action is
    shown. An earlier page is shown as text alone, since what could be clicked there is gone.
    """
    lines = ["You shop online. Find what the task asks for and buy it."]
    if skills:
        lines += ["Skills:", skills.strip()]
    if history:
        lines.append("Last steps:")
        lines += [f"- on: {webshop_page(seen, [])}\n  {action}" if seen else f"- {action}" for seen, action in history]
    lines += ["Page:", webshop_page(observation, admissible), f"Task: {task}",
              "Think in <think> </think>, then act in <action> </action>: search[words], or click[label] with a label "
              "in brackets."]
    return "\n".join(lines)


def parse_webshop(text: str, *, official: bool = False) -> tuple[str, bool]:
    """Splits an answer into the action, lower-cased, and whether the answer keeps the format.

    The format asks for <action> and </action>, <think> and </think>, and no Chinese characters. Without the action's
    tags the action is "", or, as in the official projection, the answer's last 20 characters.

    >>> parse_webshop("<think>i should search</think><action> search[Red shirt] </action>")
    ('search[red shirt]', True)
    >>> parse_webshop("<action>click[buy now]</action>")
    ('click[buy now]', False)
    >>> parse_webshop("click[buy now]"), parse_webshop("click[buy now]", official=True)
    (('', False), ('click[buy now]', False))
    """
    return split_answer(text, 20 if official else 0)


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld (Shridhar et al. 2021, arXiv 2010.03768; rules and texts of alfworld 0.4.2 on textworld 1.7.0)
#
# A household task in words. The official engine compiles each game with a planner and derives every text from a
# grammar; the rules are few and the same in all games, so they stand here as plain functions on the set of facts that
# are true. Only a game's objects, initial facts, goal and task sentence are read from its file.
# ---------------------------------------------------------------------------------------------------------------------

ALFWORLD_MAX_STEPS = 50
ALFWORLD_SPLITS = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}    # and their numbers of official games
ALFWORLD_TYPES = ("pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep",
                  "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep", "pick_two_obj_and_place")
TASK_PREFIX = "Your task is to: "

# The domain's predicates and their numbers of arguments. PDDL ignores case; everything is kept in lower case.
DYNAMIC_PREDICATES = {
    "atlocation": 2, "inreceptacle": 2, "objectatlocation": 2, "holds": 2, "holdsany": 1, "opened": 1, "isclean": 1,
    "ishot": 1, "iscool": 1, "ison": 1, "istoggled": 1, "issliced": 1}
STATIC_PREDICATES = {
    "receptacleatlocation": 2, "openable": 1, "isreceptacleobject": 1, "inreceptacleobject": 2,
    "isreceptacleobjectfull": 1, "wasinreceptacle": 2, "checked": 1, "examined": 1, "receptacletype": 2,
    "cancontain": 2, "objecttype": 2, "holdsanyreceptacleobject": 1, "full": 1, "cleanable": 1, "heatable": 1,
    "coolable": 1, "pickupable": 1, "moveable": 1, "toggleable": 1, "sliceable": 1}
PREDICATES = DYNAMIC_PREDICATES | STATIC_PREDICATES
# What the rules and texts rely on: the types of the arguments of the predicates that place things.
SIGNATURES = {"atlocation": ("agent", "location"), "receptacleatlocation": ("receptacle", "location"),
              "inreceptacle": ("object", "receptacle"), "holds": ("agent", "object")}

# verb -> what the held object must be, the receptacle's type, the fact that becomes true, the one that ceases to be
APPLIANCES = {"clean": ("cleanable", "sinkbasintype", "isclean", None),
              "heat": ("heatable", "microwavetype", "ishot", "iscool"),
              "cool": ("coolable", "fridgetype", "iscool", "ishot")}
KNIVES = {"knifetype", "butterknifetype"}
PUT_WORDINGS = {"move": ("move {} to {}", "You move the {} to the {}.", "move (object) to (receptacle):  "),
                "put": ("put {} in/on {}", "You put the {} in/on the {}.", "put (object) in/on (receptacle):  ")}
HELP = ("Available commands:\n"            # the first line break of its rule is lost in the original
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


class Game(NamedTuple):
    """What a game file says. Shared between environments: not to be changed. A fact is a tuple (predicate, *ids)."""
    task: str                            # the sentence after "Your task is to: "
    task_type: str                       # one of ALFWORLD_TYPES, or "unknown"
    agent: str
    locations: list
    objects: list                        # ids in the order of every list that is shown
    names: dict                          # id -> name as shown, such as "mug 2"
    receptacles: dict                    # location -> receptacles there, in the order shown
    places: list                         # (receptacle, location), in the order shown
    types: dict                          # receptacle or object -> its types
    static: frozenset                    # facts that no action changes
    initial: frozenset                   # the other facts that are true at the start
    goal: object                         # ground formula over those, see `ground`


# Reading game files

def parse_lists(text, where):
    """A PDDL text as nested lists of lower-case words; comments are left out."""
    lists = [[]]
    for word in re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", text).lower()):
        if word == "(":
            lists.append([])
        elif word != ")":
            lists[-1].append(word)
        elif len(lists) > 1:
            lists[-2].append(lists.pop())
        else:
            raise ValueError(f"{where}: the PDDL problem has a ')' without its '('; take the file as it was published.")
    if len(lists) > 1:
        raise ValueError(f"{where}: the PDDL problem lacks {len(lists) - 1} ')'; the file may have been cut off.")
    return lists[0]


def parse_typed(words):
    """[(name, type)] of `a b - type c - type`; "object" is the type of names without one."""
    typed, names = [], []
    words = iter(words)
    for word in words:
        if word == "-":
            kind = next(words, "object")
            typed += [(name, kind) for name in names]
            names = []
        else:
            names.append(word)
    return typed + [(name, "object") for name in names]


def check_fact(fact, by_type, where):
    """Complain about a fact or a goal's atom that the rules can't use; variables begin with "?"."""
    if not fact or not all(isinstance(word, str) for word in fact):
        raise ValueError(f"{where}: {str(fact):.60} is no fact; it must be a predicate and its arguments.")
    name, *arguments = fact
    if name not in PREDICATES:
        raise ValueError(f"{where}: predicate {name!r} is unknown to ALFWorld's rules; take a game of the original "
                         "ALFRED domain.")
    if len(arguments) != PREDICATES[name]:
        raise ValueError(f"{where}: predicate {name!r} takes {PREDICATES[name]} arguments, not {len(arguments)}.")
    for word, kind in zip(arguments, SIGNATURES.get(name, ())):
        if word not in by_type.get(kind, ()) and not word.startswith("?"):
            raise ValueError(f"{where}: {word!r} in a fact {name!r} is no {kind} of (:objects ...); declare it there.")


def entity_names(ids):
    """{id: name}. Numbers are given from the highest down, over the sorted ids of each kind, as the original does."""
    kinds = {}
    for entity in sorted(ids, reverse=True):
        kind, bar, _ = entity.partition("_bar_")
        kinds.setdefault((kind + "basin" * ("basin" in entity) if bar else kind, bool(bar)), []).append(entity)
    return {entity: f"{kind} {number}" if numbered else kind
            for (kind, numbered), entities in kinds.items() for number, entity in enumerate(entities, 1)}


def is_static(formula):
    """Whether a part of a goal is an atom that no action changes."""
    return (isinstance(formula, list) and all(isinstance(word, str) for word in formula)
            and (formula[:1] == ["="] and len(formula) == 3 or bool(formula) and formula[0] in STATIC_PREDICATES))


def ground(formula, binding, by_type, static, where):
    """A goal formula without variables: True, False, ("fact", fact), ("not", f), ("and", [f..]) or ("or", [f..]).

    What depends on static facts alone is decided here, so that little is left to test after each step.
    """
    if not isinstance(formula, list) or not formula:
        raise ValueError(f"{where}: the goal holds {str(formula):.60} where a formula is expected.")
    head, parts = formula[0], formula[1:]
    recurse = functools.partial(ground, by_type=by_type, static=static, where=where)
    if head in ("and", "or"):
        # What static facts decide goes first: a quantifier is not unfolded where its neighbours already fail.
        parts = sorted(parts, key=lambda part: not is_static(part))
        return combine(head, (recurse(part, binding) for part in parts))
    if head == "not" and len(parts) == 1:
        inner = recurse(parts[0], binding)
        return not inner if isinstance(inner, bool) else ("not", inner)
    if head == "imply" and len(parts) == 2:
        return recurse(["or", ["not", parts[0]], parts[1]], binding)
    if head in ("exists", "forall") and len(parts) == 2 and all(isinstance(part, list) for part in parts):
        variables = parse_typed([str(word) for word in parts[0]])
        if head == "forall":
            return recurse(["not", ["exists", parts[0], ["not", parts[1]]]], binding)
        conjuncts = parts[1][1:] if parts[1][:1] == ["and"] else [parts[1]]
        tests = [part for part in conjuncts if is_static(part)]
        return combine("or", (recurse(parts[1], bound)
                              for bound in bindings(variables, binding, tests, by_type, static)))
    if head in ("not", "imply", "exists", "forall"):
        raise ValueError(f"{where}: the goal's {head!r} is malformed; take the file as it was published.")
    atom = tuple(binding.get(word, word) if isinstance(word, str) else word for word in formula)
    if head == "=" and is_static(formula):
        return atom[1] == atom[2]
    check_fact(list(atom), by_type, where)
    free = [word for word in atom if word.startswith("?")]
    if free:
        raise ValueError(f"{where}: variable {free[0]!r} of the goal stands outside its quantifier.")
    return ("fact", atom) if head in DYNAMIC_PREDICATES else atom in static


def combine(head, parts):
    """("and" | "or", parts) shortened where a part decides it; stops to draw parts as soon as one does."""
    decisive, rest = head == "or", []
    for part in parts:
        if part is decisive:
            return decisive
        if not isinstance(part, bool):
            rest.append(part)
    return (head, rest) if rest else not decisive


def bindings(variables, binding, tests, by_type, static):
    """Every extension of `binding` to `variables`, less those where one of the static `tests` fails."""
    if not variables:
        yield binding
        return
    (name, kind), *rest = variables
    for entity in by_type.get(kind, ()):
        bound = {**binding, name: entity}
        if all(_may_hold(test, bound, static) for test in tests if name in test):
            yield from bindings(rest, bound, tests, by_type, static)


def _may_hold(test, binding, static):
    atom = tuple(binding.get(word, word) for word in test)
    if any(word.startswith("?") for word in atom):
        return True
    return atom[1] == atom[2] if atom[0] == "=" else atom in static


def is_true(formula, facts):
    """Whether a formula of `ground` is true."""
    if isinstance(formula, bool):
        return formula
    head, inner = formula
    if head == "fact":
        return inner in facts
    if head == "not":
        return not is_true(inner, facts)
    if head == "and":
        return all(is_true(part, facts) for part in inner)
    return any(is_true(part, facts) for part in inner)


def read_game_json(path):
    """The JSON object in a file, which must be one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"There is no file {path}; give the path of a game.tw-pddl.") from error
    except ValueError as error:          # both not JSON and not UTF-8
        raise ValueError(f"{path} is not a JSON file: {error}; download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object is expected.")
    return content


def read_task(grammar, where):
    """The task sentence, which the original's generator writes into a rule of the game's grammar."""
    match = re.search(r'"task"\s*:\s*\[\s*\{\s*"rhs"\s*:\s*("(?:[^"\\]|\\.)*")', grammar)
    if match is None:
        raise ValueError(f"{where}: the grammar has no rule \"task\" with the task sentence; add one.")
    return json.loads(match[1], strict=False).removeprefix(TASK_PREFIX)


def read_task_type(path):
    """The type as traj_data.json beside the game says, else as the names of the file and its folders do."""
    trajectory = path.with_name("traj_data.json")
    if trajectory.exists():
        found = read_game_json(trajectory).get("task_type")
        return found if found in ALFWORLD_TYPES else "unknown"
    return next((kind for part in reversed(path.parts) for kind in ALFWORLD_TYPES if kind in part), "unknown")


def parse_game(content, where, task_type="unknown"):
    """The game in a game.tw-pddl's JSON object; `where` names the file in errors."""
    for field in ("pddl_problem", "grammar"):
        if not isinstance(content.get(field), str):
            raise ValueError(f"{where}: field {field!r} is missing or no string; give a file of json_2.1.1.")
    problem = parse_lists(content["pddl_problem"], where)
    if len(problem) != 1 or problem[0][:1] != ["define"]:
        raise ValueError(f"{where}: field 'pddl_problem' must be one (define ...).")
    sections = {part[0]: part[1:] for part in problem[0][1:] if isinstance(part, list) and part
                and isinstance(part[0], str)}
    for section in (":objects", ":init", ":goal"):
        if section not in sections:
            raise ValueError(f"{where}: the PDDL problem has no section ({section} ...); take the file as published.")
    if not all(isinstance(word, str) for word in sections[":objects"]) or len(sections[":goal"]) != 1:
        raise ValueError(f"{where}: (:objects ...) must be a plain list and (:goal ...) hold one formula.")
    facts = [fact if isinstance(fact, list) else [fact] for fact in sections[":init"]
             if not isinstance(fact, list) or fact[:1] != ["="]]     # those are distances and costs, for planners
    return build_game(parse_typed(sections[":objects"]), facts, sections[":goal"][0],
                      read_task(content["grammar"], where), task_type, where)


def build_game(typed, initial, goal, task, task_type, where):
    """A game from [(name, type)], facts and the goal as nested lists, and the task's sentence and type."""
    by_type = {}
    for name, kind in typed:
        by_type.setdefault(kind, []).append(name)
    for fact in initial:
        check_fact(fact, by_type, where)
    facts = {tuple(fact) for fact in initial}
    static = frozenset(fact for fact in facts if fact[0] in STATIC_PREDICATES)
    agents = by_type.get("agent", [])
    if len(agents) != 1 or sum(fact[0] == "atlocation" for fact in facts) != 1:
        raise ValueError(f"{where}: there must be one agent and one fact of where it is (atLocation).")

    ids = by_type.get("receptacle", []) + by_type.get("object", [])
    types = {entity: set() for entity in ids}
    places = []
    for name, *arguments in static:
        if name in ("objecttype", "receptacletype"):
            types.setdefault(arguments[0], set()).add(arguments[1])
        elif name == "receptacleatlocation":
            places.append(tuple(arguments))
    places.sort()
    receptacles = {}
    for receptacle, location in places:
        receptacles.setdefault(location, []).append(receptacle)
    return Game(task, task_type, agents[0], by_type.get("location", []), sorted(by_type.get("object", [])),
                entity_names(ids), receptacles, places, types, static, frozenset(facts - static),
                ground(goal, {}, by_type, static, where))


@functools.lru_cache(maxsize=512)
def _load_game(path, stamp):
    path = Path(path)
    return parse_game(read_game_json(path), str(path), read_task_type(path))


def load_game(path):
    """The game in a game.tw-pddl file; the last 512 games are remembered as long as their files do not change."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise FileNotFoundError(f"There is no file {path}; give the path of a game.tw-pddl.") from error
    return _load_game(os.path.abspath(path), (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=16)
def find_games(data, split):
    """(paths of a split's games, {reason: number of folders left out}), read once; the official loader's rules.

    It leaves out movable receptacles and sliced objects, and what has no game file, another type or is not solvable.
    """
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"ALFWorld data folder {root} is no folder; give the one that holds json_2.1.1.")
    folder = (root / "json_2.1.1" if (root / "json_2.1.1").is_dir() else root) / split
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; the official layout is "
                                f"json_2.1.1/{{{','.join(ALFWORLD_SPLITS)}}}/**/game.tw-pddl.")
    games, skipped = [], Counter()
    for parent in sorted({path.parent for name in ("game.tw-pddl", "traj_data.json") for path in folder.rglob(name)}):
        inside, game = str(parent.relative_to(folder)), parent / "game.tw-pddl"
        if not (parent / "traj_data.json").exists():
            skipped["no traj_data.json"] += 1
        elif "movable" in inside or "Sliced" in inside:
            skipped["movable or sliced"] += 1
        elif read_task_type(game) == "unknown":
            skipped["other task type"] += 1
        elif not game.exists():
            skipped["no game.tw-pddl"] += 1
        elif not read_game_json(game).get("solvable", False):
            skipped["not solvable"] += 1
        else:
            games.append(str(game))
    if not games:
        left_out = ", ".join(f"{number} {reason}" for reason, number in skipped.items()) or "none were found"
        raise ValueError(f"{folder} holds no playable game (left out: {left_out}); give a folder with at least one.")
    return games, dict(skipped)


# Rules

def place_of(game, facts):
    """The agent's location."""
    return next(location for location in game.locations if ("atlocation", game.agent, location) in facts)


def held_object(game, facts):
    """The object in the agent's hands, or None."""
    return next((thing for thing in game.objects if ("holds", game.agent, thing) in facts), None)


def contents(game, facts, receptacle):
    """The objects in or on a receptacle, in the order shown."""
    return [thing for thing in game.objects if ("inreceptacle", thing, receptacle) in facts]


def is_accessible(game, facts, receptacle):
    return ("openable", receptacle) not in game.static or ("opened", receptacle) in facts


def fits(game, thing, receptacle):
    """Whether the receptacle's type can hold the object's; there is no limit to how many."""
    return any(("cancontain", kind, of) in game.static
               for kind in game.types[receptacle] for of in game.types[thing])


def possible_actions(game, facts, put_wording="move"):
    """{command: (verb, *ids)} of all that can be done, the engine's `admissible_commands`."""
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
        for thing in contents(game, facts, receptacle):
            if accessible and held is None and ("pickupable", thing) in static:
                actions[f"take {names[thing]} from {where}"] = ("take", thing, receptacle)
            if ("toggleable", thing) in static:              # the original asks not that the receptacle be open
                actions[f"use {names[thing]}"] = ("use", thing)
        if held is None:
            continue
        if accessible and fits(game, held, receptacle):
            actions[put.format(names[held], where)] = ("put", held, receptacle)
        for verb, (ability, kind, _, _) in APPLIANCES.items():
            if (ability, held) in static and kind in game.types[receptacle]:
                actions[f"{verb} {names[held]} with {where}"] = (verb, held, receptacle)
    if held is not None:
        # The domain means to offer what lies in an open receptacle here, too, but a comma in its list of variables
        # makes a type that nothing has: as recorded, only what is held can be examined.
        actions[f"examine {names[held]}"] = ("examine", held)
        if game.types[held] & KNIVES:
            for thing in game.objects:                       # even what lies in a closed receptacle
                if ("sliceable", thing) in static and ("objectatlocation", thing, place) in facts:
                    actions[f"slice {names[thing]} with {names[held]}"] = ("slice", thing, held)
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
        facts |= {("holds", agent, ids[0]), ("holdsany", agent)}
    elif verb == "put":
        facts -= {("holds", agent, ids[0]), ("holdsany", agent)}
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
    seen = list_names(game.names[thing] for thing in contents(game, facts, receptacle))
    if ("openable", receptacle) in game.static:
        return f"The {name} is open. In it, you see {seen}."
    return f"On the {name}, you see {seen}."


def object_text(game, facts, thing):
    name = game.names[thing]
    if ("isreceptacleobject", thing) in game.static:
        inner = [game.names[other] for other in game.objects if ("inreceptacleobject", other, thing) in game.static]
        return f"This is a normal {name}. In it, you see {list_names(inner)}."
    hot, cool, clean, is_sliced = ((fact, thing) in facts for fact in ("ishot", "iscool", "isclean", "issliced"))
    qualities = ["hot"] if hot else ["cool"] if cool else []
    qualities += ["clean"] if clean else []
    if qualities:
        if qualities == ["cool"] and not is_sliced:          # the only combination that the original calls so
            qualities = ["cold"]
        return f"This is a {' and '.join(qualities)}{' sliced' if is_sliced else ''} {name}."
    if ("toggleable", thing) in game.static:
        return f"This {name} is {'on' if ('istoggled', thing) in facts else 'off'}."
    return f"This is a sliced {name}." if is_sliced else f"There's nothing special about {name}."


def look_text(game, facts, first=False):
    """What "look" says. Only the `first` look, which opens an episode, lists the room."""
    here = game.receptacles.get(place_of(game, facts))
    if here:                             # objects are always in a receptacle, so nothing is ever next to one
        return f"You are facing the {list_names((game.names[r] for r in here), '')}. Next to it, you see nothing."
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
    if verb == "use":                    # the original asks whether it was ever used, so it never turns off
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


class ALFWorld(gymnasium.Env):
    """Do a household task; actions are the engine's commands: `go to fridge 1`, `heat egg 1 with microwave 1`.

    data: folder with the official layout, json_2.1.1/{train,valid_seen,valid_unseen}/**/game.tw-pddl, each beside its
        traj_data.json (the folder json_2.1.1 itself will do too); None takes generated tasks in as many games as the
        official ones, whose scores are not comparable with those on the official games.
    put_wording: "move" ("move X to Y", version 0.4.2) or "put" ("put X in/on Y", older releases).

    `reset(options=)` takes {"split": one of ALFWORLD_SPLITS, or "val" for valid_unseen, "task_id": int}, or {"game":
    path of a game.tw-pddl}, which is played whatever its folder and its field `solvable` say. Official games of a split
    are numbered in the order of their paths. The reward is 1 and the episode terminated in every state where the goal
    is true; as in the original, one can go on from there, and undo it. It is truncated after `ALFWORLD_MAX_STEPS`.

    State: game (a `Game`), facts (those that actions change, as a set), actions ({command: action} possible now), last
    (the action done by the last step, None at the start and where nothing happened). `skipped(split)` counts the games
    left out. Raises FileNotFoundError or ValueError for missing or malformed files and impossible options of `reset`.
    """
    metadata = {"render_modes": []}
    task_types = ALFWORLD_TYPES

    def __init__(self, data=None, *, put_wording="move"):
        if put_wording not in PUT_WORDINGS:
            raise ValueError(f"put_wording must be 'move' or 'put', not {put_wording!r}.")
        if data is not None and not Path(data).is_dir():
            raise FileNotFoundError(f"ALFWorld data folder {data} is no folder; give the one that holds json_2.1.1.")
        self.data, self.put_wording = None if data is None else str(data), put_wording
        self.observation_space, self.action_space = AnyText(max_length=65536), AnyText(max_length=1024)
        self.game = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.game, self.task_id = self._choose_game(options or {})
        self.facts, self.steps, self.last = set(self.game.initial), 0, None
        observation = (f"-= Welcome to TextWorld, ALFRED! =-\n\n{look_text(self.game, self.facts, first=True)}\n\n"
                       f"{TASK_PREFIX}{self.game.task}")
        return observation, self._info(valid=True)

    def _choose_game(self, options):
        """(game, task_id); the task_id is the number in the split, None for a game given by its path."""
        unknown = options.keys() - {"split", "task_id", "game"}
        if unknown or "game" in options and len(options) > 1:
            raise ValueError(f"reset takes options 'split' and 'task_id', or 'game' alone, not {sorted(options)}.")
        if "game" in options:
            return load_game(options["game"]), None
        split, task_id = options.get("split", "train"), options.get("task_id")
        size = self.num_tasks(split)
        if task_id is None:
            task_id = int(self.np_random.integers(size))
        if not isinstance(task_id, (int, np.integer)) or not 0 <= task_id < size:
            raise ValueError(f"Game {task_id!r} is not in split {split!r}; it must be a number from 0 to {size - 1}.")
        if self.data is None:
            return generate_game(self._split(split), int(task_id)), int(task_id)
        return load_game(find_games(self.data, self._split(split))[0][task_id]), int(task_id)

    def _split(self, split):
        split = "valid_unseen" if split == "val" else split
        if split not in ALFWORLD_SPLITS:
            raise ValueError(f"ALFWorld has no split {split!r}; splits are {', '.join(ALFWORLD_SPLITS)} and val.")
        return split

    def step(self, action):
        if not isinstance(action, str):
            raise TypeError(f"An ALFWorld action is a string such as 'go to desk 1', not {type(action).__name__}.")
        if self.game is None:
            raise gymnasium.error.ResetNeeded("Call reset before the first step.")
        found = self.last = self.actions.get(action.strip())
        if found is None:
            observation = "Nothing happens."
        else:
            apply_action(self.game, self.facts, found)
            observation = feedback(self.game, self.facts, found, self.put_wording)
        self.steps += 1
        info = self._info(valid=found is not None)
        truncated = not info["won"] and self.steps >= ALFWORLD_MAX_STEPS
        return observation, info["score"], info["won"], truncated, info

    def _info(self, *, valid):
        self.actions = possible_actions(self.game, self.facts, self.put_wording)
        won = is_true(self.game.goal, self.facts)
        return {"task": self.game.task, "task_id": self.task_id, "task_type": self.game.task_type,
                "admissible": sorted(self.actions), "valid": valid, "won": won, "score": float(won)}

    def num_tasks(self, split):
        split = self._split(split)
        return ALFWORLD_SPLITS[split] if self.data is None else len(find_games(self.data, split)[0])

    def skipped(self, split):
        """{reason: number of games of the split that were left out}."""
        split = self._split(split)
        return {} if self.data is None else find_games(self.data, split)[1]

    @property
    def goal(self):
        """All that tells the game from others, ready for JSON: the facts at its start, and what is asked for."""
        return [sorted(self.game.static | self.game.initial), self.game.goal]

    def expert(self):
        """A good next action, in any state of a game of the six types."""
        return alfworld_expert(self)[1]

    def demonstrate(self, rng, careless=False):
        """The next (thought, action) of the careful or the careless player; rng: `random.Random`."""
        return alfworld_habit(self, rng) if careless else alfworld_expert(self)


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld: generated tasks
# ---------------------------------------------------------------------------------------------------------------------

class Room(NamedTuple):
    """A kind of room: what stands in it, as "receptacle number, ..", one layout a line."""
    seen: list                           # layouts of train and valid_seen
    unseen: list                         # layouts of valid_unseen alone


ALFWORLD_ROOMS = {
    "kitchen": Room(
        ["cabinet 3, coffeemachine 1, countertop 2, drawer 2, fridge 1, garbagecan 1, microwave 1, sinkbasin 1",
         "cabinet 2, countertop 3, diningtable 1, drawer 2, fridge 1, garbagecan 1, microwave 1, sinkbasin 1",
         "cabinet 4, countertop 1, drawer 1, fridge 1, microwave 1, shelf 1, sinkbasin 1, stoveburner 2",
         "coffeemachine 1, countertop 2, diningtable 1, drawer 3, fridge 1, microwave 1, shelf 2, sinkbasin 1",
         "cabinet 2, coffeemachine 1, countertop 1, diningtable 2, fridge 1, microwave 1, sinkbasin 1, stoveburner 1",
         "cabinet 3, countertop 2, drawer 1, fridge 1, garbagecan 1, microwave 1, sinkbasin 1"],
        ["cabinet 4, coffeemachine 1, countertop 2, fridge 1, garbagecan 1, microwave 1, shelf 1, sinkbasin 1",
         "cabinet 1, countertop 3, diningtable 1, drawer 2, fridge 1, microwave 1, sinkbasin 1, stoveburner 2",
         "cabinet 2, countertop 1, diningtable 1, drawer 2, fridge 1, garbagecan 1, microwave 1, sinkbasin 1"]),
    "living room": Room(
        ["armchair 2, coffeetable 1, drawer 2, garbagecan 1, shelf 1, sidetable 2, sofa 1, tvstand 1",
         "armchair 1, coffeetable 2, diningtable 1, drawer 1, sidetable 1, sofa 1, tvstand 1",
         "armchair 2, coffeetable 1, desk 1, drawer 2, shelf 2, sofa 1",
         "coffeetable 1, diningtable 1, dresser 1, garbagecan 1, shelf 2, sidetable 1, sofa 2, tvstand 1",
         "armchair 1, desk 1, drawer 3, shelf 1, sidetable 2, sofa 1, tvstand 1"],
        ["armchair 2, coffeetable 1, diningtable 1, drawer 1, dresser 1, sidetable 1, sofa 1",
         "armchair 1, coffeetable 1, desk 1, drawer 2, garbagecan 1, shelf 1, sidetable 1, sofa 1, tvstand 1"]),
    "bedroom": Room(
        ["bed 1, desk 1, drawer 3, dresser 1, garbagecan 1, shelf 2",
         "bed 1, desk 2, drawer 2, safe 1, shelf 1, sidetable 1",
         "bed 2, drawer 2, dresser 1, garbagecan 1, sidetable 2",
         "armchair 1, bed 1, desk 1, drawer 1, dresser 1, shelf 3",
         "bed 1, desk 1, drawer 4, garbagecan 1, safe 1, sidetable 2"],
        ["bed 1, desk 1, drawer 2, dresser 1, garbagecan 1, shelf 1, sidetable 1",
         "armchair 1, bed 2, desk 1, drawer 3, safe 1, shelf 1, sidetable 1"]),
    "bathroom": Room(
        ["bathtubbasin 1, cabinet 2, countertop 1, garbagecan 1, sinkbasin 2, toilet 1, toiletpaperhanger 1",
         "cabinet 4, countertop 1, garbagecan 1, handtowelholder 1, sinkbasin 1, toilet 1, towelholder 1",
         "countertop 1, drawer 3, garbagecan 1, shelf 1, sinkbasin 1, toilet 1, toiletpaperhanger 1",
         "cabinet 3, countertop 2, garbagecan 1, handtowelholder 2, sinkbasin 1, toilet 1"],
        ["bathtubbasin 1, cabinet 3, countertop 1, drawer 1, garbagecan 1, sinkbasin 1, toilet 1",
         "cabinet 2, countertop 1, drawer 2, handtowelholder 1, shelf 1, sinkbasin 1, toilet 1"]),
}
# (things, rooms where they occur, what can hold them: where one looks for them, likeliest first)
ALFWORLD_THINGS = [
    ("apple bread egg lettuce potato tomato", "kitchen",
     "fridge countertop diningtable sinkbasin microwave garbagecan"),
    ("cup plate", "kitchen", "countertop cabinet diningtable shelf sinkbasin fridge microwave"),
    ("bowl", "kitchen bedroom", "countertop cabinet desk shelf diningtable dresser sinkbasin fridge microwave"),
    ("mug", "kitchen bedroom",
     "countertop cabinet desk shelf coffeemachine diningtable dresser sinkbasin fridge microwave"),
    ("butterknife fork knife ladle spatula spoon", "kitchen", "countertop drawer diningtable sinkbasin"),
    ("kettle pan pot", "kitchen", "stoveburner countertop cabinet sinkbasin"),
    ("peppershaker saltshaker", "kitchen", "countertop cabinet shelf drawer diningtable"),
    ("glassbottle winebottle", "kitchen", "countertop cabinet garbagecan shelf fridge diningtable"),
    ("dishsponge", "kitchen", "sinkbasin countertop cabinet drawer garbagecan"),
    ("cloth soapbar", "bathroom", "sinkbasin countertop cabinet bathtubbasin toilet garbagecan"),
    ("candle soapbottle spraybottle tissuebox", "bathroom", "countertop cabinet toilet shelf drawer garbagecan"),
    ("toiletpaper", "bathroom", "toiletpaperhanger toilet countertop cabinet shelf drawer garbagecan"),
    ("handtowel", "bathroom", "handtowelholder countertop cabinet bathtubbasin"),
    ("towel", "bathroom", "towelholder bathtubbasin"),
    ("cd cellphone creditcard keychain pen pencil watch", "living bedroom",
     "desk sidetable drawer coffeetable shelf dresser diningtable safe"),
    ("book laptop newspaper", "living bedroom", "sofa bed coffeetable desk armchair sidetable diningtable dresser"),
    ("remotecontrol", "living", "sofa tvstand armchair coffeetable sidetable drawer"),
    ("pillow", "living bedroom", "sofa bed armchair"),
    ("alarmclock statue vase", "living bedroom", "shelf sidetable dresser desk tvstand coffeetable diningtable safe"),
    ("desklamp floorlamp", "living bedroom", "desk sidetable dresser tvstand shelf"),
]
ALFWORLD_HOMES = {thing: homes.split() for things, _, homes in ALFWORLD_THINGS for thing in things.split()}
ALFWORLD_ABILITIES = {
    "cleanable": """apple bowl butterknife cloth cup dishsponge egg fork kettle knife ladle lettuce mug pan plate pot
        potato soapbar spatula spoon tomato""".split(),
    "heatable": "apple bread cup egg mug plate potato tomato".split(),
    "coolable": "apple bowl bread cup egg lettuce mug pan plate pot potato tomato winebottle".split(),
    "sliceable": "apple bread egg lettuce potato tomato".split(),
    "toggleable": "desklamp floorlamp".split(),
}
ALFWORLD_OPENABLE = {"cabinet", "drawer", "fridge", "microwave", "safe"}

PLACED_GOAL = """(exists (?r - receptacle ?o - object) (and (objecttype ?o {thing}type) (receptacletype ?r {place}type)
    (inreceptacle ?o ?r)%s))"""
LIT_GOAL = """(and (exists (?lamp - object ?r - receptacle ?a - agent ?l - location) (and (objecttype ?lamp {place}type)
        (toggleable ?lamp) (istoggled ?lamp) (receptacleatlocation ?r ?l) (atlocation ?a ?l) (inreceptacle ?lamp ?r)))
    (exists (?o - object ?a - agent) (and (objecttype ?o {thing}type) (holds ?a ?o))))"""
TWO_GOAL = """(exists (?r - receptacle ?o - object ?other - object) (and (not (= ?o ?other)) (objecttype ?o {thing}type)
    (objecttype ?other {thing}type) (receptacletype ?r {place}type) (inreceptacle ?o ?r) (inreceptacle ?other ?r)))"""


class TaskRule(NamedTuple):
    """A task type of the generator. In the texts {thing} is what to bring, {place} the receptacle or the lamp."""
    rooms: str
    sentences: tuple                     # the original's two
    goal: str                            # PDDL; its types are named after the kinds
    verb: str | None = None              # what to do to the thing before


def _treat(verb, quality, rooms):
    ability, _, gained, _ = APPLIANCES[verb]
    return TaskRule(rooms, (f"put a {quality} {{thing}} in {{place}}.",
                            f"{verb} some {{thing}} and put it in {{place}}."),
                    PLACED_GOAL % f" ({ability} ?o) ({gained} ?o)", verb)


ALFWORLD_RULES = dict(zip(ALFWORLD_TYPES, [
    TaskRule("kitchen, living room, bedroom, bathroom", ("put a {thing} in {place}.", "put some {thing} on {place}."),
             PLACED_GOAL % ""),
    TaskRule("living room, bedroom", ("look at {thing} under the {place}.", "examine the {thing} with the {place}."),
             LIT_GOAL),
    _treat("clean", "clean", "kitchen, bathroom"), _treat("heat", "hot", "kitchen"), _treat("cool", "cool", "kitchen"),
    TaskRule("kitchen, living room, bedroom, bathroom",
             ("put two {thing} in {place}.", "find two {thing} and put them in {place}."), TWO_GOAL)]))


@functools.lru_cache(maxsize=512)
def generate_game(split, task_id):
    """Game number `task_id` of a split of ALFWORLD_SPLITS; its type goes round with the number.

    A room with 8 to 12 receptacles; one or two of the wanted things (two or three where two are to be brought), none
    where they are to go; a lamp in living rooms and bedrooms; 11 to 18 other things. All lie where things of their kind
    are at home, with half the chance at each next home.
    """
    rng = random.Random(f"alfworld {split} {task_id}")
    task_type = ALFWORLD_TYPES[task_id % len(ALFWORLD_TYPES)]
    rule = ALFWORLD_RULES[task_type]
    room = rng.choice(rule.rooms.split(", "))
    seen, unseen = ALFWORLD_ROOMS[room]
    layout = {kind: int(number) for entry in rng.choice(unseen if split == "valid_unseen" else seen).split(", ")
              for kind, number in [entry.split()]}
    things = [thing for kinds, rooms, _ in ALFWORLD_THINGS if room.split()[0] in rooms.split()
              for thing in kinds.split() if set(ALFWORLD_HOMES[thing]) & layout.keys()]
    lamps = [thing for thing in things if thing in ALFWORLD_ABILITIES["toggleable"]]
    lamp = rng.choice(lamps) if lamps else None
    things = [thing for thing in things if thing not in lamps]
    wanted, place = _draw_errand(rng, rule, things, layout, lamp)

    number = rng.choice((2, 3) if task_type == "pick_two_obj_and_place" else (1, 1, 2))
    others = rng.choices([thing for thing in things if thing != wanted], k=rng.randint(11, 18))
    lying = [(wanted, _draw_home(rng, wanted, layout, avoid=place)) for _ in range(number)]
    lying += [(thing, _draw_home(rng, thing, layout)) for thing in [lamp] * bool(lamp) + others]
    goal = parse_lists(rule.goal.format(thing=wanted, place=place), "goal")[0]
    sentence = rng.choice(rule.sentences).format(thing=wanted, place=place)
    return build_game(*_lay_out(layout, lying), goal, sentence, task_type, f"{split} {task_id}")


def _draw_errand(rng, rule, things, layout, lamp):
    """(thing, place): the place can hold the thing, which is at home elsewhere too; the lamp if it is to be lit."""
    if rule.goal is LIT_GOAL:
        return rng.choice(things), lamp
    ability, appliance = APPLIANCES[rule.verb][:2] if rule.verb else (None, None)
    able = things if ability is None else [thing for thing in things if thing in ALFWORLD_ABILITIES[ability]]
    places = {thing: [home for home in ALFWORLD_HOMES[thing] if home in layout] for thing in able}
    thing = rng.choice([thing for thing in able if len(places[thing]) > 1])
    return thing, rng.choice([place for place in places[thing] if f"{place}type" != appliance])


def _draw_home(rng, thing, layout, avoid=None):
    """(kind, number) of a receptacle for a thing, not of the kind `avoid`."""
    homes = [home for home in ALFWORLD_HOMES[thing] if home in layout and home != avoid]
    home, = rng.choices(homes, [2.0**-rank for rank in range(len(homes))])
    return home, rng.randint(1, layout[home])


def _entity(kind, number):
    """An id that `entity_names` turns into "kind number"; it counts down from the last in the order of ids."""
    prefix = kind.removesuffix("basin")
    return f"{prefix}_bar_{99 - number}" + f"_bar_{kind}" * (prefix != kind)


def _lay_out(layout, lying):
    """(typed names, initial facts) of a room {receptacle: number} with things [(thing, (receptacle, number))]."""
    typed, facts, numbers = [("agent1", "agent"), ("start", "location")], [["atlocation", "agent1", "start"]], Counter()
    for kind, count in layout.items():
        for number in range(1, count + 1):
            entity = _entity(kind, number)
            typed += [(entity, "receptacle"), (f"by_{entity}", "location")]
            facts += [["receptacletype", entity, f"{kind}type"], ["receptacleatlocation", entity, f"by_{entity}"]]
            facts += [["openable", entity]] * (kind in ALFWORLD_OPENABLE)
    for thing, home in lying:
        numbers[thing] += 1
        entity, holder = _entity(thing, numbers[thing]), _entity(*home)
        abilities = [name for name, able in ALFWORLD_ABILITIES.items() if thing in able]
        abilities += ["pickupable"] * ("toggleable" not in abilities)
        typed.append((entity, "object"))
        facts += [["objecttype", entity, f"{thing}type"], *([name, entity] for name in abilities),
                  ["inreceptacle", entity, holder], ["objectatlocation", entity, f"by_{holder}"]]
    facts += [["cancontain", f"{home}type", f"{thing}type"] for thing in numbers for home in ALFWORLD_HOMES[thing]
              if home in layout]
    return typed, facts


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld: a careful and a careless player
# ---------------------------------------------------------------------------------------------------------------------

# How often the careless player gives in to a habit, at each decision where the careful one would do something else:
# pass a closed receptacle; bring the thing as it is; put it anywhere; examine it without a lamp; stop after one of two;
# go on doing nothing once the work seems done.
ALFWORLD_HABITS = {"skip_closed": 0.6, "as_it_is": 0.7, "any_place": 0.8, "no_lamp": 0.55, "one_is_enough": 0.75,
                   "idle": 1.0}


class Errand(NamedTuple):
    """What a goal asks for. Ids, not kinds: the goal's static parts are decided already."""
    things: set                          # any of them will do
    places: list                         # receptacles where it is to go, lowest number first; none for a lamp
    lamps: set
    verb: str | None                     # "clean", "heat" or "cool" first
    two: bool


def goal_facts(formula):
    """The facts named in a formula of `ground`."""
    if isinstance(formula, bool):
        return set()
    head, inner = formula
    if head == "fact":
        return {inner}
    return set().union(*map(goal_facts, [inner] if head == "not" else inner))


def read_errand(game):
    """The errand of a game of the six types, read from its goal; its sentence may say it in any words.

    Raises ValueError for other goals.
    """
    facts = goal_facts(game.goal)
    lamps = {fact[1] for fact in facts if fact[0] == "istoggled"}
    places = [] if lamps else sorted({fact[2] for fact in facts if fact[0] == "inreceptacle"},
                                     key=lambda place: _kind_number(game, place))
    things = {fact[2] for fact in facts if fact[0] == "holds"} if lamps else {
        fact[1] for fact in facts if fact[0] == "inreceptacle"}
    if not things:
        raise ValueError(f"The expert can't read the goal of the task {game.task!r}; it knows the types "
                         f"{', '.join(ALFWORLD_TYPES)}.")
    gained = {fact[0] for fact in facts}
    verb = next((verb for verb, appliance in APPLIANCES.items() if appliance[2] in gained), None)
    return Errand(things, places, lamps, verb, game.task_type == "pick_two_obj_and_place")


def alfworld_expert(env) -> tuple[str, str]:
    """The careful player's (thought, action) in any state.

    It remembers nothing: it looks for a thing in rounds, from where it stands, through one order of the receptacles.
    """
    return _keep_house(env, careless=lambda habit: False)


def alfworld_habit(env, rng: random.Random) -> tuple[str, str]:
    """The careless player's (thought, action): the careful one's, but for ALFWORLD_HABITS drawn from `rng`."""
    return _keep_house(env, careless=lambda habit: rng.random() < ALFWORLD_HABITS[habit])


def _keep_house(env, careless) -> tuple[str, str]:
    """A thought names what the decision is about, as it stands in the task, and says at once what the page shows of it:
    that is easily read off. Thoughts of a careful and a careless decision differ."""
    errand, held = read_errand(env.game), held_object(env.game, env.facts)
    if held is None:
        return _find_thing(env, errand, careless)
    if held not in errand.things:
        return _put_back(env, held)
    if errand.lamps:
        return _find_lamp(env, errand, held, careless)
    untreated = errand.verb and (APPLIANCES[errand.verb][2], held) not in env.facts
    if untreated and not careless("as_it_is"):
        return _treat_first(env, errand.verb, held)
    if untreated:
        return "fine as it is", _bring(env, held, errand.places[0])[1]
    at_place = errand.places[0] in _here(env)
    if errand.verb is None and not errand.two and not at_place and careless("any_place"):
        wrong = _wrong_place(env.game, held, errand)
        if wrong:
            return "any place does", _bring(env, held, wrong)[1]
    return _bring(env, held, errand.places[0])


def _find_thing(env, errand, careless):
    game, facts, here = env.game, env.facts, _here(env)
    kind = game.names[min(errand.things)].split()[0]
    full = set(errand.places[:1]) if errand.two else set()   # what lies there already is to stay
    seen = [(thing, receptacle) for receptacle in here if is_accessible(game, facts, receptacle)
            for thing in contents(game, facts, receptacle) if thing in errand.things]
    if seen and env.last and env.last[0] in ("put", "look"):
        if careless("one_is_enough" if errand.two and env.last[0] == "put" else "idle"):
            return "all is done", "look"
    takes = [_command(env, "take", *found) for found in seen if found[1] not in full]
    if takes:
        return f"{kind} found", min(takes)
    closed = [place for place in here if not is_accessible(game, facts, place) and place not in full]
    if closed and not careless("skip_closed"):
        return f"{kind} inside?", _command(env, "open", closed[0])
    homes = ALFWORLD_HOMES.get(kind, [])
    places = [place for place, _ in game.places if place not in full]
    action = _go_on(env, places, lambda place: (place in errand.places, *_rank(game, place, homes)))
    return f"{kind} {'elsewhere' if closed else 'missing'}", action


def _find_lamp(env, errand, held, careless):
    game = env.game
    lamps = [thing for place in _here(env) for thing in contents(game, env.facts, place) if thing in errand.lamps]
    if careless("idle" if env.last == ("examine", held) else "no_lamp"):
        return "just examine it", _command(env, "examine", held)
    kind = game.names[min(errand.lamps)].split()[0]
    if lamps:
        return f"{kind} found", _command(env, "use", lamps[0])
    homes = ALFWORLD_HOMES.get(kind, [])
    places = [place for place, _ in game.places]
    return f"{kind} missing", _go_on(env, places, lambda place: _rank(game, place, homes))


def _treat_first(env, verb, held):
    _, kind, _, _ = APPLIANCES[verb]
    appliance = min((receptacle for receptacle, _ in env.game.places if kind in env.game.types[receptacle]),
                    key=lambda receptacle: _kind_number(env.game, receptacle))
    action = _command(env, verb, held, appliance) if appliance in _here(env) else _go(env, appliance)
    return f"{verb} it first", action


def _bring(env, held, place):
    """Put what is held into a receptacle: the next step to it."""
    kind, _ = _kind_number(env.game, place)
    if place not in _here(env):
        return f"{kind} away", _go(env, place)
    if not is_accessible(env.game, env.facts, place):
        return f"{kind} closed", _command(env, "open", place)
    return f"{kind} reached", _command(env, "put", held, place)


def _put_back(env, held):
    """Put a wrong thing down: here, if it can be, else in the first receptacle that holds such things."""
    fitting = [receptacle for receptacle, _ in env.game.places if fits(env.game, held, receptacle)]
    if not fitting:
        return "keep it then", "look"
    here = _here(env)
    place = min(fitting, key=lambda receptacle: (receptacle not in here, _kind_number(env.game, receptacle)))
    return "put this back", _bring(env, held, place)[1]


def _wrong_place(game, held, errand):
    """The last receptacle by name that can hold a thing, is always open and not what is asked for; or None."""
    return max((receptacle for receptacle, _ in game.places if fits(game, held, receptacle)
                and receptacle not in errand.places and ("openable", receptacle) not in game.static),
               key=lambda receptacle: _kind_number(game, receptacle), default=None)


def _here(env):
    return env.game.receptacles.get(place_of(env.game, env.facts), [])


def _kind_number(game, receptacle):
    """("cabinet", 2): the order of names, in which 10 comes after 9."""
    kind, _, number = game.names[receptacle].partition(" ")
    return kind, int(number or 0)


def _rank(game, receptacle, homes):
    """Sorts the kinds in `homes` first, in their order, and the others by name."""
    kind, number = _kind_number(game, receptacle)
    return homes.index(kind) if kind in homes else len(homes), kind, number


def _go_on(env, receptacles, rank):
    """Go to the first receptacle that ranks after the place here, from the last again to the first.

    Receptacles that share a place count as the first of them, so that no round leaves one out.
    """
    location = dict(env.game.places)
    first = {}
    for receptacle in sorted(receptacles, key=rank):
        first.setdefault(location[receptacle], receptacle)
    here = first.pop(place_of(env.game, env.facts), None)
    if not first:
        return "look"
    after = [receptacle for receptacle in first.values() if here and rank(receptacle) > rank(here)]
    return _go(env, (after or list(first.values()))[0])


def _go(env, receptacle):
    return _command(env, "go", receptacle, dict(env.game.places)[receptacle])


def _command(env, *action):
    return next(command for command, possible in env.actions.items() if possible == action)


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld: prompt and answer
# ---------------------------------------------------------------------------------------------------------------------

def alfworld_prompt(task: str, history: list, observation: str, admissible: list[str], skills: str = "") -> str:
    """The user message of one turn.

    history: the last (observation, action) pairs, oldest first; of a pair with the observation "" only the action is
    shown. The engine's welcome and its task sentence are left out, and so is the command "help".
    """
    def scene(text):
        return " ".join(text.removeprefix("-= Welcome to TextWorld, ALFRED! =-").partition(TASK_PREFIX)[0].split())

    lines = ["You do a task in a house."]
    if skills:
        lines += ["Skills:", skills.strip()]
    if history:
        lines.append("Last steps:")
        lines += [f"- on: {scene(seen)}\n  {action}" if seen else f"- {action}" for seen, action in history]
    commands = ", ".join(command for command in admissible if command != "help")
    lines += [f"Now: {scene(observation)}", f"Commands: {commands}", f"Task: {task}",
              "Think in <think> </think>, then act in <action> </action>: one of the commands."]
    return "\n".join(lines)


def parse_alfworld(text: str, *, official: bool = False) -> tuple[str, bool]:
    """Splits an answer into the action, lower-cased, and whether the answer keeps the format.

    The format is WebShop's. Without the action's tags the action is "", or, as in the official projection, the answer's
    last 30 characters.

    >>> parse_alfworld("<think>take the egg</think><action>take egg 1 from fridge 1</action>")
    ('take egg 1 from fridge 1', True)
    >>> parse_alfworld("I go to fridge 1"), parse_alfworld("go to fridge 1", official=True)
    (('', False), ('go to fridge 1', False))
    """
    return split_answer(text, 30 if official else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA (Search-R1, Jin et al. 2025, arXiv 2503.09516; rules and texts as in verl-agent's and SDAR's copy)
#
# A question is answered in at most four turns, each of which is a search or the answer. What a search finds is shown
# between <information> tags. Documents are strangers' text, so they can neither write a tag nor give an answer.
# ---------------------------------------------------------------------------------------------------------------------

SEARCH_MAX_TURNS = 4
SEARCH_TAGS = ("think", "search", "answer", "information")
SEARCH_FAILED = "The search failed: the retriever gave no answer."
RETRIEVER_TIMEOUT = 30.0                 # seconds for one try
RETRIEVER_TRIES = 3                      # on a refused connection, a time-out or a status of 500 and above
RETRIEVER_PAUSE = 1.0                    # seconds before the second try, twice as many before the third
REQUEST_LIMIT = 1 << 20                  # bytes of a request that the server reads


# Score and format

def normalize_answer(text):
    """Lower-cased, without ASCII punctuation and the articles a, an and the, blanks squeezed (SQuAD's rule)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer, golds):
    """Whether the answer is one of `golds` (a string or several) after normalisation.

    >>> exact_match("The  Beatles!", ["Rolling Stones", "beatles"])
    True
    """
    golds = [golds] if isinstance(golds, str) else golds
    return normalize_answer(answer) in map(normalize_answer, golds)


def tagged_blocks(text, tag):
    """The texts between <tag> and </tag>, blanks squeezed, in their order."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE)
    return [" ".join(inner.split()) for inner in found]


def tagged(tag, text):
    return f"<{tag}> {text} </{tag}>"


def parse_search(text, *, official=False):
    """Splits an answer into its action and whether the answer keeps the format.

    What stands behind the first </search> (without one: the first </answer>) is cut. The action is the first search
    block, else the first answer block. An answer with both kinds, with one twice, or with another of SEARCH_TAGS in its
    block is invalid, and its action "". <think> is not asked for.
    official: as in the released code an invalid answer's block is acted on, and a tag in a block is no fault.

    >>> parse_search("<think>look it up</think><search>Lisbon</search>")
    ('<search> Lisbon </search>', True)
    >>> text = "<search>Lisbon</search><answer>Spain</answer>"
    >>> parse_search(text), parse_search(text, official=True)
    (('', False), ('<search> Lisbon </search>', False))
    """
    counts = {tag: len(re.findall(f"<{tag}>", text, re.IGNORECASE)) for tag in ("search", "answer")}
    end = re.search("</search>", text, re.IGNORECASE) or re.search("</answer>", text, re.IGNORECASE)
    kept = text[:end.end()] if end else text
    blocks = [(tag, inner) for tag in ("search", "answer") for inner in tagged_blocks(kept, tag)]
    if not blocks:
        return "", False
    tag, inner = blocks[0]
    is_clean = not re.search(f"</?({'|'.join(SEARCH_TAGS)})>", inner, re.IGNORECASE)
    valid = sum(counts.values()) == 1 and (is_clean or official)
    return (tagged(tag, inner) if valid or official else ""), valid


def information(result):
    """What a search answers: JSON between tags. "<" is written as an escape, so that no text inside makes a tag."""
    return "\n<information>" + json.dumps({"result": result}).replace("<", "\\u003c") + "</information>\n"


# Questions from files

ROW_FIELDS = ("question", "data_source", "ground_truth", "reward_model", "golden_answers", "env_kwargs")


class Question(NamedTuple):
    """A task. Only generated ones have the last three fields, which the scripted players go by."""
    text: str
    golds: tuple                         # accepted answers; of a generated question the first as passages write it
    task_type: str                       # of an official one its data_source
    names: tuple = ()                    # what the question names, as it names it
    relation: str = ""                   # what it asks for, in words that name nothing
    hops: tuple = ()                     # searches that lead to the answer, as (query, texts that it must find)


def read_jsonl(path):
    """Yields ("file, line n", object) for every line that is not blank."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"it holds a {type(row).__name__} where an object is expected")
                    yield f"{path}, line {number}", row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}; give one JSON object per line.") from error


def read_parquet(path):
    """Yields ("file, row n", object) for every row."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Reading {path} needs pyarrow: pip install pyarrow, or give the rows as JSONL.") from error
    try:
        fields = [name for name in pyarrow.parquet.read_schema(path).names if name in ROW_FIELDS]
        rows = pyarrow.parquet.read_table(path, columns=fields).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}.") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def row_golds(row, where):
    """The accepted answers of an official row, from whichever of the three places has them."""
    nested = row.get("reward_model")
    truth = row.get("ground_truth") or (nested.get("ground_truth") if isinstance(nested, dict) else None)
    golds = truth.get("target") if isinstance(truth, dict) else row.get("golden_answers")
    golds = [golds] if isinstance(golds, str) else golds
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"{where}: there are no answers; a row needs ground_truth {{\"target\": ..}}, the same inside "
                         "reward_model, or golden_answers, each a string or a list of strings.")
    return tuple(golds)


@functools.lru_cache(maxsize=8)
def load_questions(path):
    """The rows of a .jsonl or .parquet file as `Question`s, in the order of the file."""
    if Path(path).suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path} is neither .jsonl nor .parquet; give the questions in one of these formats.")
    questions = []
    for where, row in (read_parquet if Path(path).suffix == ".parquet" else read_jsonl)(path):
        if "question" not in row and isinstance(row.get("env_kwargs"), dict):
            row = row["env_kwargs"]      # where verl-agent's copy of the rows has them
        text, source = row.get("question"), row.get("data_source") or "unknown"
        if not isinstance(text, str) or not text.strip() or not isinstance(source, str):
            raise ValueError(f"{where}: a row needs a text as question, and data_source, if given, must be one too.")
        questions.append(Question(text, row_golds(row, where), source.removeprefix("searchR1_")))  # verl adds this
    if not questions:
        raise ValueError(f"{path} holds no question; give a file with at least one row.")
    return tuple(questions)


def question_files(data):
    """{split: path}. A folder's test file is "val"; a single file is "val" alone, so that none is trained on it."""
    if Path(data).is_file():
        return {"val": str(data)}
    if not Path(data).is_dir():
        raise FileNotFoundError(f"There is no {data}; give a folder with train and test questions, or a single file.")
    files = {}
    for split, stems in (("train", ["train"]), ("val", ["test", "val", "validation", "dev"])):
        names = [f"{stem}{suffix}" for stem in stems for suffix in (".parquet", ".jsonl")]
        found = [Path(data) / name for name in names if (Path(data) / name).is_file()]
        files |= {split: str(found[0])} if found else {}
    if not files:
        raise FileNotFoundError(f"{data} holds neither train nor test questions; put train.jsonl and test.jsonl (or "
                                ".parquet) there.")
    return files


# Retrieval

class Corpus(NamedTuple):
    ids: list                            # identifiers
    passages: list                       # texts, of the form "Title"\nText
    postings: Postings                   # over the passages' numbers


def make_corpus(ids, passages):
    return Corpus(list(ids), list(passages), build_postings(range(len(passages)), passages))


@functools.lru_cache(maxsize=4)
def load_corpus(path=None):
    """The passages of a JSONL file of {"id", "contents"}, or without a path the embedded ones."""
    if path is None:
        passages = [passage for _, passage in fact_passages()]
        return make_corpus(map(str, range(len(passages))), passages)
    ids, passages = [], []
    for where, row in read_jsonl(path):
        if not isinstance(row.get("contents"), str):
            raise ValueError(f"{where}: there is no text as contents; a line is {{\"id\": .., \"contents\": ..}}.")
        ids.append(str(row.get("id", len(ids))))
        passages.append(row["contents"])
    if not passages:
        raise ValueError(f"{path} holds no passage; give a file with at least one.")
    return make_corpus(ids, passages)


def corpus_search(corpus, query, topk):
    """The topk best passages, best first: a retriever, once the corpus is bound."""
    return [corpus.passages[number] for number in bm25(corpus.postings, query, topk)]


def result_passages(reply):
    """The passages in the JSON text of a server's answer to one query. Raises ValueError if it has another form."""
    try:
        entries = json.loads(reply)["result"][0]
        passages = [entry.get("document", entry)["contents"] for entry in entries]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the answer is not of the form {{\"result\": [[{{\"document\": {{\"contents\": ..}}}}]]}} "
                         f"({type(error).__name__})") from error
    if not all(isinstance(passage, str) for passage in passages):
        raise ValueError("the answer has contents that are no text")
    return passages


class Retriever:
    """Client of a server that answers POST /retrieve, ours or Search-R1's or SDAR's: (query, topk) -> passages.

    Search-R1's server reads a list under "queries", SDAR's a text under "query": the first that is understood is kept.
    Raises ConnectionError if no try succeeds and ValueError for a refusal or an answer of another form.
    """

    def __init__(self, url, *, timeout=RETRIEVER_TIMEOUT, tries=RETRIEVER_TRIES, pause=RETRIEVER_PAUSE):
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"The retriever's address must be like http://127.0.0.1:8000, not {url!r}.")
        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        self.timeout, self.tries, self.pause = timeout, tries, pause
        self.key = None                  # of the query in a request, once one has worked

    def __call__(self, query, topk):
        forms, refusals = {"queries": [query], "query": query}, []
        for key in [self.key] if self.key else forms:
            try:
                passages = result_passages(self._post({key: forms[key], "topk": topk, "return_scores": True}))
            except ValueError as error:
                refusals.append(error)
                continue
            self.key = key
            return passages
        raise ValueError(f"{self.url}: {refusals[0]}")

    def _post(self, body):
        """The text of the answer."""
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        for number in range(self.tries):
            time.sleep(self.pause * number)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500:
                    raise ValueError(f"the request was refused with status {error.code}") from error
                reason = f"status {error.code}"
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"{self.url}: no answer in {self.tries} tries, the last one ended with: {reason}")


def retrieve(corpus, request, topk):
    """The server's answer to a request, both as JSON objects. Raises ValueError for a malformed request."""
    if not isinstance(request, dict) or ("queries" in request) == ("query" in request):
        raise ValueError('The request must be a JSON object with either "queries" (a list) or "query" (a text).')
    queries = request["queries"] if "queries" in request else [request["query"]]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError('"queries" must be a list of texts, "query" a text.')
    topk = topk if request.get("topk") is None else request["topk"]
    if type(topk) is not int or topk < 1:
        raise ValueError('"topk" must be a whole number of at least 1, or null.')
    result = []
    for query in queries:
        scores = bm25_scores(corpus.postings, query)
        found = [({"id": corpus.ids[number], "contents": corpus.passages[number]}, float(scores[number]))
                 for number in bm25(corpus.postings, query, topk)]
        result.append([{"document": document, "score": score} if request.get("return_scores") else document
                       for document, score in found])
    return {"result": result}


def search_server(corpus, host="127.0.0.1", port=8000, topk=3):
    """An HTTP server, bound and not yet started, that answers POST /retrieve by `retrieve`; port 0 takes a free one."""
    if topk < 1:
        raise ValueError(f"topk must be at least 1, not {topk}")

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 30                     # seconds for a client to send its request

        def do_POST(self):
            if self.path.rstrip("/") != "/retrieve":
                return self.answer(404, {"error": f"There is nothing at {self.path}; post to /retrieve."})
            size = self.headers.get("Content-Length", "")
            if not size.isdecimal() or int(size) > REQUEST_LIMIT:
                return self.answer(413, {"error": f"A request must tell its length, at most {REQUEST_LIMIT} bytes."})
            try:
                request = json.loads(self.rfile.read(int(size)))
            except (ValueError, RecursionError) as error:
                return self.answer(400, {"error": f"The request is no JSON: {error}."})
            try:
                self.answer(200, retrieve(corpus, request, topk))
            except ValueError as error:
                self.answer(400, {"error": str(error)})

        def do_GET(self):
            self.answer(405, {"error": 'Post {"queries": ["..."], "topk": 3} to /retrieve.'})

        def answer(self, status, body):
            body = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):    # a line for each of a training run's searches helps nobody
            pass

    return http.server.ThreadingHTTPServer((host, port), Handler)


class SearchQA(gymnasium.Env):
    """Answer a question; actions are `<search> words </search>` and `<answer> words </answer>`, or a text with one.

    data: folder with the official rows, train.* and test.* (or val.*, validation.*, dev.*, the first that is there), as
        .parquet or .jsonl; or one such file, all of it "val". A row has `question` and its answers, as ground_truth
        {"target": ..}, as the same inside reward_model, or as golden_answers; and maybe `data_source`. None takes the
        generated questions, whose scores are not comparable with those on the official ones.
    retriever: address of a server that answers POST /retrieve, or (query, topk) -> passages, which may raise OSError or
        ValueError where a search fails. None takes BM25 over corpus.jsonl ({"id", "contents"} a line) beside the
        official rows, or over the embedded facts for generated questions.
    topk: passages shown for a search.

    `reset(options=)` takes {"split": "train" | "val", "task_id": int}. The first observation is the question. An answer
    ends the episode, with reward 1 if it is an exact match; it is truncated after `SEARCH_MAX_TURNS`. If a text holds
    several answers the last one counts, as in the original, but only those of the action, never those of documents.
    An action without a block costs a turn, too; its observation is empty. A search that fails does not end the episode:
    it is shown as failed, warned of, and counted. `info` also has `error` (the last action's, or None) and
    `retriever_errors` (the episode's number of them).

    State: question (a `Question`), goal (its accepted answers), observation, query (the last search's, or None), turns,
    ended.
    Raises FileNotFoundError or ValueError for missing or malformed files, ValueError for impossible options of `reset`.
    """
    metadata = {"render_modes": []}

    def __init__(self, data=None, *, retriever: str | Callable | None = None, topk=3):
        if type(topk) is not int or topk < 1:
            raise ValueError(f"topk must be a whole number of at least 1, not {topk!r}.")
        self.files = None if data is None else question_files(data)
        self.topk = topk
        if isinstance(retriever, str):
            retriever = Retriever(retriever)
        if retriever is None:
            folder = None if data is None else Path(next(iter(self.files.values()))).parent
            if folder and not (folder / "corpus.jsonl").is_file():
                raise ValueError(f"{folder} has no corpus.jsonl to search in; put one there, or give SearchQA a "
                                 "retriever=: the address of a /retrieve server, or a function.")
            corpus = load_corpus(folder and str(folder / "corpus.jsonl"))
            retriever = functools.partial(corpus_search, corpus)
        self.retriever = retriever
        self.observation_space, self.action_space = AnyText(max_length=65536), AnyText(max_length=65536)
        self.question, self.ended = None, True

    def _questions(self, split):
        if split not in ("train", "val"):
            raise ValueError(f"Search-QA has no split {split!r}; splits are 'train' and 'val'.")
        if self.files is None:
            return search_questions()[split]
        if split not in self.files:
            raise ValueError(f"There are no {split!r} questions beside {next(iter(self.files.values()))}; give a "
                             "folder with train.jsonl and test.jsonl (or .parquet).")
        return load_questions(self.files[split])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        if options.keys() - {"split", "task_id"}:
            raise ValueError(f"reset takes options 'split' and 'task_id', not {sorted(options)}.")
        split, task_id = options.get("split", "train"), options.get("task_id")
        questions = self._questions(split)
        if task_id is None:
            task_id = int(self.np_random.integers(len(questions)))
        if not isinstance(task_id, (int, np.integer)) or not 0 <= task_id < len(questions):
            raise ValueError(
                f"Question {task_id!r} is not in split {split!r}; it must be a number from 0 to {len(questions) - 1}.")
        self.question, self.task_id = questions[task_id], int(task_id)
        self.goal = list(self.question.golds)
        self.observation, self.query, self.turns, self.ended = self.question.text, None, 0, False
        self.error, self.errors = None, 0
        return self.observation, self._info(valid=True, won=False)

    def step(self, action):
        if not isinstance(action, str):
            raise TypeError(f"A Search-QA action is a text such as '<search> Lisbon </search>', not "
                            f"{type(action).__name__}.")
        if self.ended:
            raise gymnasium.error.ResetNeeded("No episode is running: call reset before the first step.")
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

    def _search(self, query):
        try:
            passages = self.retriever(query, self.topk)
            if not isinstance(passages, list) or not all(isinstance(passage, str) for passage in passages):
                raise ValueError("a retriever must return a list of texts")
        except (OSError, ValueError) as error:
            self.error = f"{type(error).__name__}: {error}"
            self.errors += 1
            warnings.warn(f"A search failed, and the episode goes on without it: {self.error}", RuntimeWarning)
            return information(SEARCH_FAILED)
        return information("".join(f"Doc {number}: {passage.strip()}\n"
                                   for number, passage in enumerate(passages[:self.topk], 1)))

    def _info(self, *, valid, won):
        return {"task": self.question.text, "task_id": self.task_id, "task_type": self.question.task_type,
                "admissible": None, "valid": valid, "won": won, "score": float(won), "error": self.error,
                "retriever_errors": self.errors}

    @property
    def task_types(self):
        """What `info["task_type"]` can be: the data sources of all splits, or the types of generated questions."""
        if self.files is None:
            return SEARCH_TYPES
        return tuple(sorted({question.task_type for split in self.files for question in self._questions(split)}))

    def num_tasks(self, split):
        return len(self._questions(split))

    def expert(self):
        """A good next action, in any state of a generated question."""
        return search_expert(self)[1]

    def demonstrate(self, rng, careless=False):
        """The next (thought, action) of the careful or the careless searcher; rng: `random.Random`."""
        return search_habit(self, rng) if careless else search_expert(self)


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA: passages and questions from embedded facts
# ---------------------------------------------------------------------------------------------------------------------

FACTS = Path(__file__).resolve().parent / "data" / "facts.json"
SEARCH_TYPES = ("one_hop", "two_hop", "comparison")
# What can be asked of a country or an element, as one names it or describes it.
SEARCH_WORDINGS = {
    "capital": ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."),
    "currency": ("What is the currency of {}?", "Which currency is used in {}?", "Name the currency of {}."),
    "continent": ("What is the continent of {}?", "Which continent does {} lie in?", "Name the continent of {}."),
    "language": ("What is the language of {}?", "Which language is spoken in {}?", "Name the language of {}."),
    "country": ("What is the country with the capital {}?", "Which country has the capital {}?",
                "Name the country whose capital is {}."),
    "symbol": ("What is the symbol of {}?", "Which symbol stands for {}?", "Name the symbol of {}."),
    "atomic number": ("What is the atomic number of {}?", "Which atomic number does {} have?",
                      "Name the atomic number of {}."),
}
COMPARISON_WORDINGS = {
    "more neighbours": ("Which of {} and {} has more neighbours?", "Which has more neighbours, {} or {}?"),
    "higher atomic number": ("Which of {} and {} has the higher atomic number?",
                             "Which has the higher atomic number, {} or {}?"),
}


class Country(NamedTuple):
    name: str                            # as a sentence has it: "the Gambia"
    golds: tuple                         # names, the first is the one above
    capital: str
    capital_golds: tuple
    currency_golds: tuple
    continent: str
    languages: tuple
    borders: tuple                       # names of neighbours
    text: str                            # of the passage about it
    capital_text: str                    # of the passage about its capital


class Element(NamedTuple):
    name: str
    symbol: str
    number: int
    text: str


def plain(text):
    """The text in ASCII: JSON would show other letters as numbers, which none could copy."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def with_article(name):
    """The name of a country as it stands within a sentence."""
    takes_one = re.search("Republic|United|Islands|Bahamas|Comoros|Gambia|Maldives|Netherlands|Philippines", name)
    return f"the {name}" if takes_one else name


def spellings_of(name, aliases):
    """The plain name first, then what else is accepted for it."""
    return tuple(dict.fromkeys([plain(name), name, *aliases]))


def list_words(words):
    """"a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


@functools.lru_cache(maxsize=1)
def load_facts():
    """(countries, elements) of data/facts.json, elements by their number."""
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    return tuple(map(make_country, facts["countries"])), make_elements(facts["elements"])


def make_country(entry):
    name, capital, currency = plain(entry["name"]), plain(entry["capital"]), plain(entry["currency"])
    called, languages = with_article(name), tuple(map(plain, entry["languages"]))
    borders = tuple(with_article(plain(border)) for border in entry.get("borders", ()))
    text = (f"The country {name} lies in {entry['continent']}. Its currency is the {currency}, its "
            f"{'languages are' if languages[1:] else 'language is'} {list_words(languages)}. "
            f"{called[0].upper() + called[1:]} has {len(borders) or 'no'} neighbour{'s' * (len(borders) != 1)}")
    text += f": {list_words(borders)}." if borders else "."
    golds = dict.fromkeys([called, *spellings_of(entry["name"], entry.get("aliases", ()))])
    return Country(called, tuple(golds), capital,
                   spellings_of(entry["capital"], entry.get("capital_aliases", ())),
                   spellings_of(entry["currency"], entry.get("currency_aliases", ())),
                   entry["continent"], languages, borders, text, f"The capital of {called} is {capital}.")


def make_elements(entries):
    entries = sorted(entries, key=lambda entry: entry["number"])
    following = [entry["name"] for entry in entries[1:]] + [None]
    elements = []
    for entry, after in zip(entries, following):
        kind = ("an " if entry["category"][0] in "aeiou" else "a ") + entry["category"]
        text = (f"The element {entry['name']} has the atomic number {entry['number']} and the symbol "
                f"{entry['symbol']}. It is {kind}." + (f" Next comes {after}." if after else ""))
        elements.append(Element(entry["name"], entry["symbol"], entry["number"], text))
    return tuple(elements)


@functools.lru_cache(maxsize=1)
def fact_passages():
    """[(title, passage)]: one for each country, which leaves out its capital, for each capital and for each element."""
    countries, elements = load_facts()
    parts = [(country.name.removeprefix("the "), country.text) for country in countries]
    parts += [(country.capital, country.capital_text) for country in countries]
    parts += [(element.name.capitalize(), element.text) for element in elements]
    return [(title, f'"{title}"\n{text}') for title, text in parts]


def is_held_out(element):
    """Whether an element is for validation: every fourth run of ten, so that most have their neighbour with them."""
    return (element.number - 1) // 10 % 4 == 3


def facts_of_split(split):
    """(countries, elements): a fixed quarter of each is held out, and no question mixes the two parts."""
    countries, elements = load_facts()
    held_out = set(random.Random("held-out countries").sample(range(len(countries)), len(countries) // 4))
    return ([country for number, country in enumerate(countries) if (number in held_out) == (split == "val")],
            [element for element in elements if is_held_out(element) == (split == "val")])


def country_relations(country):
    """Yields (relation, golds, the text that tells it)."""
    yield "capital", country.capital_golds, country.capital_text
    yield "currency", country.currency_golds, country.text
    yield "continent", (country.continent,), country.text
    if len(country.languages) == 1:
        yield "language", country.languages, country.text


def element_relations(element):
    yield "symbol", (element.symbol,), element.text
    yield "atomic number", (str(element.number),), element.text


def one_hop_facts(countries, elements):
    """Yields (relation, name, the same name, golds, hops): questions describe nothing."""
    for entity, relations in [(country, country_relations) for country in countries] + [
            (element, element_relations) for element in elements]:
        for relation, golds, text in relations(entity):
            yield relation, entity.name, entity.name, golds, ((entity.name, (text,)),)
    for country in countries:
        capital = country.capital
        yield "country", capital, capital, country.golds, ((capital, (country.capital_text,)),)


def two_hop_facts(countries, elements):
    """Yields (relation, name, description that contains the name, golds, hops)."""
    for country in countries:
        by_capital = ("the country whose capital is {}", country.capital, country.capital_text)
        by_neighbour = [("the only neighbour of {}", other.name, other.text)
                        for other in countries if other.borders == (country.name,)]
        for description, name, found in [by_capital, *by_neighbour]:
            for relation, golds, text in country_relations(country):
                yield relation, name, description.format(name), golds, ((name, (found,)), (country.name, (text,)))
    for before, element in itertools.pairwise(elements):
        if element.number == before.number + 1:
            description = f"the element that comes after {before.name}"
            hops = (before.name, (before.text,)), (element.name, (element.text,))
            for relation, golds, _ in element_relations(element):
                yield relation, before.name, description, golds, hops


def mentions(text, golds):
    """Whether one of the answers occurs in the text as words."""
    return any(f" {normalize_answer(gold)} " in f" {normalize_answer(text)} " for gold in golds)


def is_answerable(question, top):
    """Whether its searches find what they must and the question gives nothing away.

    It must not hold the answer (but for comparisons), and if it has two hops, a search for its own words must not find
    a passage with the answer. top: query -> the three best passages.
    """
    if question.task_type == "two_hop" and any(mentions(passage, question.golds) for passage in top(question.text)):
        return False
    if question.task_type != "comparison" and mentions(question.text, question.golds):
        return False
    return all(any(text in passage for passage in top(query)) for query, texts in question.hops for text in texts)


def draw_comparisons(split, count, top):
    """`count` comparisons, of countries and elements in turn. No pair of equals, none that one search does not find."""
    countries, elements = facts_of_split(split)
    rng, drawn = random.Random(f"comparisons {split}"), {}
    kinds = [("more neighbours", countries, lambda country: len(country.borders)),
             ("higher atomic number", elements, lambda element: element.number)]
    while len(drawn) < count:
        relation, entities, value = kinds[len(drawn) % 2]
        first, second = rng.sample(entities, 2)
        if value(first) == value(second):
            continue
        winner = max(first, second, key=value)
        golds = winner.golds if relation == "more neighbours" else (winner.name,)
        wording = rng.choice(COMPARISON_WORDINGS[relation])
        names = (first.name, second.name)
        query = f" {'and' if ' and ' in wording else 'or'} ".join(names)
        question = Question(wording.format(*names), golds, "comparison", names, relation,
                            ((query, (first.text, second.text)),))
        if is_answerable(question, top):
            drawn[question.text] = question
    return list(drawn.values())


def ask_facts(kind, facts, split, rng, top):
    """The answerable questions for (relation, name, description, golds, hops): training asks in all wordings, but
    validation in one, so that its questions are independent."""
    questions = []
    for relation, name, description, golds, hops in facts:
        wordings = SEARCH_WORDINGS[relation]
        for wording in wordings if split == "train" else [rng.choice(wordings)]:
            questions.append(Question(wording.format(description), golds, kind, (name,), relation, hops))
    return [question for question in questions if is_answerable(question, top)]


@functools.lru_cache(maxsize=1)
def search_questions():
    """{split: questions}, the same in every process. The three types take turns: any stretch has a third of each."""
    top = functools.lru_cache(maxsize=None)(functools.partial(corpus_search, load_corpus(), topk=3))
    splits = {}
    for split in ("train", "val"):
        rng, entities = random.Random(f"questions {split}"), facts_of_split(split)
        one_hop = ask_facts("one_hop", one_hop_facts(*entities), split, rng, top)
        two_hop = ask_facts("two_hop", two_hop_facts(*entities), split, rng, top)
        rng.shuffle(one_hop)
        rng.shuffle(two_hop)
        comparisons = draw_comparisons(split, min(len(one_hop), len(two_hop)), top)
        splits[split] = tuple(itertools.chain.from_iterable(zip(one_hop, two_hop, comparisons)))
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA: a careful and a careless searcher
# ---------------------------------------------------------------------------------------------------------------------

# How often the careless searcher gives in to a habit, at each decision where the careful one would do something else:
# answer with a name from the question before anything was found; search for what is asked without the name; answer with
# what a first search found although it only leads to the answer.
SEARCH_HABITS = {"guess": 0.7, "vague_query": 0.6, "stop_early": 0.7}


def search_expert(env):
    """The careful searcher's (thought, action) in any state of a generated question: wins every one."""
    return _search_or_answer(env, careless=lambda habit: False)


def search_habit(env, rng):
    """The careless searcher's (thought, action): the careful one's, but for SEARCH_HABITS drawn from `rng`."""
    return _search_or_answer(env, careless=lambda habit: rng.random() < SEARCH_HABITS[habit])


def _search_or_answer(env, careless):
    """Thoughts of a careful and a careless decision differ from the first word on."""
    question = env.question
    if not question.hops:
        raise ValueError(f"No scripted player can answer the official question {question.text!r:.60}; demonstrations "
                         "exist for generated questions only: leave data out.")
    done = _hops_done(env)
    if done == len(question.hops):
        return _finding(question), tagged("answer", question.golds[0])
    if done:
        name = question.hops[done][0]
        if careless("stop_early"):
            return "that must be it", tagged("answer", name)
        return "look further", tagged("search", name)
    if careless("guess"):
        return "no need to search", tagged("answer", question.names[0])
    if careless("vague_query"):
        return "any page will do", tagged("search", question.relation)
    return "look it up", tagged("search", question.hops[0][0])


def _finding(question):
    """The thought before the answer: what is asked of what, or the two numbers and which name to answer with."""
    query, texts = question.hops[-1]
    if question.task_type == "comparison":
        numbers = [re.search(r"(?:has|number) (no|\d+)", text)[1] for text in texts]
        found = ", ".join(f"{name} {number}" for name, number in zip(question.names, numbers))
        return f"{found}: the {'first' if question.names[0] == question.golds[0] else 'second'}"
    return f"{query}: {question.relation}"


def _hops_done(env):
    """How many hops lead to what is shown now. What a later hop needs counts only if it was searched for."""
    hops = env.question.hops
    return max((done for done, (query, texts) in enumerate(hops, 1)
                if all(text in env.observation for text in texts) and (done == 1 or env.query == query)), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA: prompt
# ---------------------------------------------------------------------------------------------------------------------

def search_prompt(task, history, observation, admissible, skills=""):
    """The user message of one turn. admissible is not used: any words may be searched for.

    history: the last (observation, action) pairs, oldest first; of a pair with the observation "" only the action is
    shown. An action that is no valid block is not shown as written, so that no text of the agent adds a tag.
    """
    lines = ["You answer a question. Search for what you need to know, then answer."]
    if skills:
        lines += ["Skills:", skills.strip()]
    steps = []
    for seen, action in history:
        steps += [seen.strip()] if seen and seen != task else []
        steps.append(f"- {parse_search(action)[0] or '(not in the format)'}")
    if steps:
        lines += ["Last steps:", *steps]
    if observation and observation != task:
        lines += ["Found:", observation.strip()]
    lines += [f"Question: {task}",
              "Think in <think> </think>, then act: <search> words </search>, or <answer> short answer </answer>."]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------

ENVIRONMENTS = {"webshop": WebShop, "alfworld": ALFWorld, "search": SearchQA}
MAX_TURNS = {"webshop": WEBSHOP_MAX_STEPS, "alfworld": ALFWORLD_MAX_STEPS, "search": SEARCH_MAX_TURNS}
# (task, history, observation, admissible, skills) -> user message of a turn
PROMPTS = {"webshop": webshop_prompt, "alfworld": alfworld_prompt, "search": search_prompt}
PARSERS = {"webshop": parse_webshop, "alfworld": parse_alfworld, "search": parse_search}
gymnasium.register(id="sdar/WebShop-v0", entry_point=WebShop)
gymnasium.register(id="sdar/ALFWorld-v0", entry_point=ALFWorld)
gymnasium.register(id="sdar/SearchQA-v0", entry_point=SearchQA)


def make(name, data=None, **kwargs) -> gymnasium.Env:
    """The environment called `name` ("webshop", "alfworld", "search") on `data`: a path, or None for its own tasks."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"There is no environment {name!r}; choose one of {', '.join(ENVIRONMENTS)}.")
    return ENVIRONMENTS[name](data, **kwargs)


def parse_action(env_name, text, *, official=False):
    """A model's answer -> (action, valid), by the format that the environment's prompt asks for.

    valid says whether the format was kept; whether the action exists on the page is `info["valid"]` after the step.
    official: where the format is broken, act on the answer's end, as the released code does.

    >>> parse_action("webshop", "<think>it fits</think><action>click[Buy Now]</action>")
    ('click[buy now]', True)
    """
    return PARSERS[env_name](text, official=official)


def random_move(admissible, rng):
    """One of the actions possible now (`info["admissible"]`) that ends nothing and has no words to fill in, or None."""
    moves = [move for move in admissible or () if "<" not in move and move not in ("click[buy now]", "help")]
    return rng.choice(moves) if moves else None


def write_answer(env_name, thought, action):
    """The answer that `parse_action` reads back as (action, True).

    A thought begins with a blank, so that its first word is the same token as in a page.
    """
    return f"<think> {thought}</think>" + (action if env_name == "search" else f"<action>{action}</action>")


def main(argv=None):
    """`python envs.py serve-search`: the embedded passages, or those of a file, behind POST /retrieve."""
    parser = argparse.ArgumentParser(description="Serves Search-QA's retriever: BM25 over passages, POST /retrieve.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve-search", help="serve passages until Ctrl-C", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on")
    command.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any free one")
    command.add_argument("--corpus", help='JSONL file of {"id", "contents"}; without it the embedded facts')
    command.add_argument("--topk", type=int, default=3, help="passages for a request that asks for no number")
    args = parser.parse_args(argv)
    try:
        server = search_server(load_corpus(args.corpus), args.host, args.port, args.topk)
    except (OSError, ValueError, OverflowError) as error:
        sys.exit(f"error: cannot serve on {args.host}:{args.port}: {error}")
    with server:
        print(f"Serving at http://{args.host}:{server.server_port}/retrieve, until Ctrl-C.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
