"""Generated tasks of the three environments, in the schema of the official data and read by the same functions.

WebShop: a catalogue of made-up products. ALFWorld: games in rooms of our own. Search-QA: passages and questions from
data/facts.json. Every task is a pure function of its number: the same in each process and on each machine. Scores on
generated tasks are not comparable with those on the official data. The words stand in data/words.json.
"""
import functools
import itertools
import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lib.official import (
    ALFWORLD_SPLITS,
    ALFWORLD_TYPES,
    APPLIANCES,
    Catalogue,
    Question,
    build_game,
    normalize_answer,
    parse_lists,
)
from lib.retrieval import corpus_search, make_corpus

DATA = Path(__file__).resolve().parents[1] / "data"
WORDS = json.loads((DATA / "words.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# WebShop: a catalogue in the official schema
# ---------------------------------------------------------------------------------------------------------------------

# A department of words.json: the first level of product_category ("root"), its attributes (shared by its types), its
# options with all their values, and its types as {second level: noun phrases}. No word of a noun phrase occurs in
# another one, in an attribute or in an option, so a search for the noun alone finds the type and nothing tells its
# products apart. Descriptions have equal lengths, and so have first bullets, without stop words or words of a request:
# BM25 then ranks by what a shopper asks for alone, and duplicates tie.
WEBSHOP = WORDS["webshop"]


def webshop_catalogue() -> Catalogue:
    """1,368 generated products with their instructions, as the content of the three official files.

    Every call gives the same. A product is defined by its type, two of the type's seven attributes and a brand.
    Products of one type are near-duplicates that differ in an attribute, and have the same options. Five of a type's
    21 pairs of attributes are held out: only validation asks for them. In two of the 16 others and in one of the five
    there is an overpriced duplicate, listed (so, at equal BM25, ranked) before the cheap
    product: it costs 50 to 90 dollars more, which the goal's bound, at most 40 above the price, never allows. In a
    tenth of the pairs the second attribute stands in the first bullet point and not in the title.
    """
    rng, later = random.Random(0), random.Random("held-out products")
    chunks = rng.sample([a + b + c + d for a in "BDKLMNPRST" for b in "AEIO" for c in "DKLMNRTV" for d in "AIOU"], 40)
    asins = [f"{first}-{second}" for first in chunks for second in chunks]
    rng.shuffle(asins)
    types = [(category, group, noun) for category, department in WEBSHOP["departments"].items()
             for group, nouns in department["types"].items() for noun in nouns]
    option_counts = [0 if 20 * i < 3 * len(types) else 1 if 20 * i < 12 * len(types) else 2 for i in range(len(types))]
    rng.shuffle(option_counts)
    catalogue, duplicates, kinds = Catalogue([], {}, {}, held_out=set()), [], []
    for (category, group, noun), option_count in zip(types, option_counts, strict=True):
        department = WEBSHOP["departments"][category]
        shared = {"category": category, "query": _plural(noun), "images": ["https://example.com/picture.jpg"],
                  "product_category": f"{department['root']} › {group} › {_plural(noun).title()}",
                  "customization_options": _draw_options(rng, department["options"], option_count)}
        pool = rng.sample(department["attributes"], 7)
        pairs = [(a, b) for a in pool for b in pool if pool.index(a) < pool.index(b)]
        trained = rng.sample(pairs, 16)
        kinds.append((noun, shared, [pair for pair in pairs if pair not in trained]))
        for number, pair in enumerate(trained):
            _add_products(rng, catalogue, asins, pair, noun, shared, duplicates, duplicated=number < 2)
    for noun, shared, pairs in kinds:    # drawn last: the bundled model has seen the products above, and none of these
        for number, pair in enumerate(pairs):
            _add_products(later, catalogue, asins, pair, noun, shared, duplicates, duplicated=number < 1, held_out=True)
    rng.shuffle(catalogue.items)
    _list_first(catalogue.items, duplicates)
    return catalogue


def _add_products(rng, catalogue, asins, pair, noun, shared, duplicates, *, duplicated, held_out=False):
    """Adds the product of a pair of attributes to the catalogue, with its overpriced duplicate if it has one."""
    pair = rng.sample(pair, 2)
    products = _draw_products(rng, asins, pair, noun, shared, duplicated)
    catalogue.items.extend(products)
    if duplicated:
        duplicates.append([product["asin"] for product in products])
    if held_out:
        catalogue.held_out.update(product["asin"] for product in products)
    _add_instructions(rng, catalogue, products, pair, noun)


def _plural(noun):
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")


def _article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _draw_options(rng, options, count):
    """`count` of a department's options with at most four values each, as `customization_options`."""
    names = sorted(rng.sample(list(options), count))
    return {name: [{"value": value} for value in sorted(rng.sample(options[name], min(4, len(options[name]))))]
            for name in names}


def _draw_products(rng, asins, pair, noun, shared, duplicated):
    """[product], or [overpriced duplicate, product], as entries of items_shuffle.json."""
    hidden = rng.random() < 0.1
    price = rng.randrange(50, 450) / 10
    prices = [round(price + rng.randrange(500, 900) / 10, 1), price] if duplicated else [price]
    brands = rng.sample(WEBSHOP["brands"], 2)
    return [shared | _product(rng, asins.pop(), brand, pair, noun, price, hidden)
            for brand, price in zip(brands, prices, strict=False)]


def _product(rng, asin, brand, pair, noun, price, hidden):
    """The fields of an entry of items_shuffle.json that its type does not share."""
    words = ["everyday", pair[0]] if hidden else pair
    bullet = f"Proven {pair[1]} quality." if hidden else rng.choice(WEBSHOP["bullets"])
    return {"asin": asin, "name": " ".join([brand, *words, noun]), "pricing": f"${price:.2f}",
            "full_description": rng.choice(WEBSHOP["descriptions"]),
            "small_description": [bullet, f"Comes with {rng.choice(WEBSHOP['details'])}."]}


def _add_instructions(rng, catalogue, products, pair, noun):
    """Adds the products' attributes and instructions; only a third of the overpriced duplicates gets one."""
    for product in products:
        detail = product["small_description"][1].removeprefix("Comes with ").rstrip(".")
        entry = {"attributes": [*pair, detail]}
        overpriced = product is not products[-1]
        if not overpriced or rng.random() < 1 / 3:
            entry |= {"instruction": _request(rng, pair, noun), "instruction_attributes": list(pair)}
        if not overpriced and rng.random() < 0.2:
            catalogue.human[product["asin"]] = [_human_request(rng, pair, noun, product)]
        catalogue.attributes[product["asin"]] = entry


def _request(rng, pair, noun):
    what = f"{noun} that is {pair[0]} and {pair[1]}" if rng.random() < 0.2 else f"{pair[0]} {pair[1]} {noun}"
    return f"{rng.choice(WEBSHOP['requests'])} {_article(what)}"


def _human_request(rng, pair, noun, product):
    values = [rng.choice(values)["value"] for values in product["customization_options"].values()]
    options = f" - i would like {' and '.join(values)}" if values else ""
    text = rng.choice(WEBSHOP["human_requests"]).format(noun=noun, a=pair[0], b=pair[1], options=options)
    return {"instruction": text, "instruction_attributes": list(pair), "instruction_options": values}


def _list_first(items, pairs):
    """Swaps products in place so that the first of each pair of asins comes before the second."""
    place = {item["asin"]: i for i, item in enumerate(items)}
    for first, second in pairs:
        i, j = place[first], place[second]
        if i > j:
            items[i], items[j] = items[j], items[i]


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld: games
# ---------------------------------------------------------------------------------------------------------------------

# Rooms of words.json: what stands in them, as "receptacle number, ..", one layout per entry; "seen" are those of train
# and valid_seen, "unseen" those of valid_unseen alone. Objects: the rooms where they occur and their placements, the
# kinds of receptacles that can hold them and where one looks for them, likeliest first.
ALFWORLD_ROOMS, ALFWORLD_OBJECTS = WORDS["alfworld"]["rooms"], WORDS["alfworld"]["objects"]
ALFWORLD_ABILITIES, ALFWORLD_OPENABLE = WORDS["alfworld"]["abilities"], WORDS["alfworld"]["openable"]
ALFWORLD_PLACEMENTS = {obj: row["placements"] for row in ALFWORLD_OBJECTS for obj in row["objects"]}

PLACED_GOAL = """(exists (?r - receptacle ?o - object) (and (objecttype ?o {obj}type) (receptacletype ?r {place}type)
    (inreceptacle ?o ?r)%s))"""
LIT_GOAL = """(and (exists (?lamp - object ?r - receptacle ?a - agent ?l - location) (and (objecttype ?lamp {place}type)
        (toggleable ?lamp) (istoggled ?lamp) (receptacleatlocation ?r ?l) (atlocation ?a ?l) (inreceptacle ?lamp ?r)))
    (exists (?o - object ?a - agent) (and (objecttype ?o {obj}type) (holds ?a ?o))))"""
TWO_GOAL = """(exists (?r - receptacle ?o - object ?other - object) (and (not (= ?o ?other)) (objecttype ?o {obj}type)
    (objecttype ?other {obj}type) (receptacletype ?r {place}type) (inreceptacle ?o ?r) (inreceptacle ?other ?r)))"""

class TaskRule(NamedTuple):
    """A task type of the generator. In the texts {obj} is the object's kind, {place} the receptacle's or the lamp's."""
    rooms: tuple
    sentences: tuple                     # the original's two
    goal: str                            # PDDL; its types are named after the kinds
    verb: str | None = None              # what to do to the object first


def _treatment(verb, quality, rooms):
    ability, _, gained, _ = APPLIANCES[verb]
    return TaskRule(rooms, (f"put a {quality} {{obj}} in {{place}}.",
                            f"{verb} some {{obj}} and put it in {{place}}."),
                    PLACED_GOAL % f" ({ability} ?o) ({gained} ?o)", verb)


ALFWORLD_RULES = dict(zip(ALFWORLD_TYPES, [
    TaskRule(tuple(ALFWORLD_ROOMS), ("put a {obj} in {place}.", "put some {obj} on {place}."), PLACED_GOAL % ""),
    TaskRule(("living room", "bedroom"), ("look at {obj} under the {place}.", "examine the {obj} with the {place}."),
             LIT_GOAL),
    _treatment("clean", "clean", ("kitchen", "bathroom")),
    _treatment("heat", "hot", ("kitchen",)),
    _treatment("cool", "cool", ("kitchen",)),
    TaskRule(tuple(ALFWORLD_ROOMS), ("put two {obj} in {place}.", "find two {obj} and put them in {place}."),
             TWO_GOAL)], strict=True))


@functools.lru_cache
def game_types(split):
    """The task type of each game of a split: they take turns."""
    return [ALFWORLD_TYPES[number % len(ALFWORLD_TYPES)] for number in range(ALFWORLD_SPLITS[split])]


@functools.lru_cache(maxsize=512)
def generate_game(split, task_id):
    """Game number `task_id` of a split of ALFWORLD_SPLITS, as a `Game`.

    A room has 8 to 12 receptacles; one or two of the wanted objects (two or three where two are to be brought), none
    of them at the destination; a lamp in living rooms and bedrooms; 11 to 18 other objects. Each lies in one of its
    placements, with half the chance at each next one.
    """
    rng = random.Random(f"alfworld {split} {task_id}")
    task_type = game_types(split)[task_id]
    rule = ALFWORLD_RULES[task_type]
    room = rng.choice(rule.rooms)
    layouts = ALFWORLD_ROOMS[room]["unseen" if split == "valid_unseen" else "seen"]
    layout = {kind: int(number) for entry in rng.choice(layouts).split(", ") for kind, number in [entry.split()]}
    objects = [obj for row in ALFWORLD_OBJECTS if room in row["rooms"] for obj in row["objects"]
               if set(row["placements"]) & layout.keys()]
    lamps = [obj for obj in objects if obj in ALFWORLD_ABILITIES["toggleable"]]
    lamp = rng.choice(lamps) if lamps else None
    objects = [obj for obj in objects if obj not in lamps]
    wanted, place = _draw_goal(rng, rule, objects, layout, lamp)

    number = rng.choice((2, 3) if task_type == "pick_two_obj_and_place" else (1, 1, 2))
    others = rng.choices([obj for obj in objects if obj != wanted], k=rng.randint(11, 18))
    lying = [(wanted, _draw_placement(rng, wanted, layout, avoid=place)) for _ in range(number)]
    lying += [(obj, _draw_placement(rng, obj, layout)) for obj in [lamp] * bool(lamp) + others]
    goal = parse_lists(rule.goal.format(obj=wanted, place=place), "goal")[0]
    sentence = rng.choice(rule.sentences).format(obj=wanted, place=place)
    return build_game(*_lay_out(layout, lying), goal, sentence, task_type, f"{split} {task_id}")


def _draw_goal(rng, rule, objects, layout, lamp):
    """(object, destination): the destination is one of the object's placements, not the only one; or the lamp."""
    if rule.goal is LIT_GOAL:
        return rng.choice(objects), lamp
    ability, appliance = APPLIANCES[rule.verb][:2] if rule.verb else (None, None)
    able = objects if ability is None else [obj for obj in objects if obj in ALFWORLD_ABILITIES[ability]]
    places = {obj: [place for place in ALFWORLD_PLACEMENTS[obj] if place in layout] for obj in able}
    obj = rng.choice([obj for obj in able if len(places[obj]) > 1])
    return obj, rng.choice([place for place in places[obj] if f"{place}type" != appliance])


def _draw_placement(rng, obj, layout, avoid=None):
    """(kind, number) of a receptacle for an object, not of the kind `avoid`."""
    kinds = [kind for kind in ALFWORLD_PLACEMENTS[obj] if kind in layout and kind != avoid]
    kind, = rng.choices(kinds, [2.0**-rank for rank in range(len(kinds))])
    return kind, rng.randint(1, layout[kind])


def _entity(kind, number):
    """An id that `entity_names` turns into "kind number"; it counts down from the last in the order of ids."""
    prefix = kind.removesuffix("basin")
    return f"{prefix}_bar_{99 - number}" + f"_bar_{kind}" * (prefix != kind)


def _lay_out(layout, lying):
    """(typed names, initial facts) of a room {receptacle: number} with objects [(kind, (receptacle, number))]."""
    typed, facts, numbers = [("agent1", "agent"), ("start", "location")], [["atlocation", "agent1", "start"]], Counter()
    for kind, count in layout.items():
        for number in range(1, count + 1):
            entity = _entity(kind, number)
            typed += [(entity, "receptacle"), (f"by_{entity}", "location")]
            facts += [["receptacletype", entity, f"{kind}type"], ["receptacleatlocation", entity, f"by_{entity}"]]
            facts += [["openable", entity]] * (kind in ALFWORLD_OPENABLE)
    for obj, place in lying:
        numbers[obj] += 1
        entity, holder = _entity(obj, numbers[obj]), _entity(*place)
        abilities = [name for name, able in ALFWORLD_ABILITIES.items() if obj in able]
        abilities += ["pickupable"] * ("toggleable" not in abilities)
        typed.append((entity, "object"))
        facts += [["objecttype", entity, f"{obj}type"], *([name, entity] for name in abilities),
                  ["inreceptacle", entity, holder], ["objectatlocation", entity, f"by_{holder}"]]
    facts += [["cancontain", f"{place}type", f"{obj}type"] for obj in numbers for place in ALFWORLD_PLACEMENTS[obj]
              if place in layout]
    return typed, facts


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA: passages from bundled facts
# ---------------------------------------------------------------------------------------------------------------------

SEARCH_TYPES = ("one_hop", "two_hop", "comparison")


class Country(NamedTuple):
    """A country of facts.json."""
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
    """A chemical element of facts.json."""
    name: str
    symbol: str
    number: int
    text: str


def plain(text):
    """The text in ASCII: JSON would show other letters as numbers, which no model could copy."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def with_article(name):
    """The name of a country as it stands within a sentence."""
    takes_one = re.search("Republic|United|Islands|Bahamas|Comoros|Gambia|Maldives|Netherlands|Philippines", name)
    return f"the {name}" if takes_one else name


def accepted_names(name, aliases):
    """The plain name first, then what else is accepted for it."""
    return tuple(dict.fromkeys([plain(name), name, *aliases]))


def list_words(words):
    """"a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


@functools.lru_cache(maxsize=1)
def load_facts():
    """(countries, elements) of data/facts.json, elements by their number."""
    facts = json.loads((DATA / "facts.json").read_text(encoding="utf-8"))
    return tuple(map(make_country, facts["countries"])), make_elements(facts["elements"])


def make_country(entry):
    name, capital, currency = plain(entry["name"]), plain(entry["capital"]), plain(entry["currency"])
    called, languages = with_article(name), tuple(map(plain, entry["languages"]))
    borders = tuple(with_article(plain(border)) for border in entry.get("borders", ()))
    text = (f"The country {name} lies in {entry['continent']}. Its currency is the {currency}, its "
            f"{'languages are' if languages[1:] else 'language is'} {list_words(languages)}. "
            f"{called[0].upper() + called[1:]} has {len(borders) or 'no'} neighbour{'s' * (len(borders) != 1)}")
    text += f": {list_words(borders)}." if borders else "."
    golds = dict.fromkeys([called, *accepted_names(entry["name"], entry.get("aliases", ()))])
    return Country(called, tuple(golds), capital,
                   accepted_names(entry["capital"], entry.get("capital_aliases", ())),
                   accepted_names(entry["currency"], entry.get("currency_aliases", ())),
                   entry["continent"], languages, borders, text, f"The capital of {called} is {capital}.")


def make_elements(entries):
    entries = sorted(entries, key=lambda entry: entry["number"])
    following = [entry["name"] for entry in entries[1:]] + [None]
    elements = []
    for entry, after in zip(entries, following, strict=True):
        kind = ("an " if entry["category"][0] in "aeiou" else "a ") + entry["category"]
        text = (f"The element {entry['name']} has the atomic number {entry['number']} and the symbol "
                f"{entry['symbol']}. It is {kind}." + (f" Next comes {after}." if after else ""))
        elements.append(Element(entry["name"], entry["symbol"], entry["number"], text))
    return tuple(elements)


@functools.lru_cache(maxsize=1)
def fact_passages():
    """[(title, passage)]: one per country, which leaves out its capital, one per capital and one per element."""
    countries, elements = load_facts()
    parts = [(country.name.removeprefix("the "), country.text) for country in countries]
    parts += [(country.capital, country.capital_text) for country in countries]
    parts += [(element.name.capitalize(), element.text) for element in elements]
    return [(title, f'"{title}"\n{text}') for title, text in parts]


@functools.lru_cache(maxsize=1)
def bundled_corpus():
    """The `Corpus` of the bundled passages, searched where there are no others."""
    passages = [passage for _, passage in fact_passages()]
    return make_corpus(map(str, range(len(passages))), passages)


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA: questions
# ---------------------------------------------------------------------------------------------------------------------

# What can be asked of a country or an element, as one names it or describes it: {relation: wordings}.
SEARCH_WORDINGS, COMPARISON_WORDINGS = WORDS["search"]["wordings"], WORDS["search"]["comparisons"]


def is_held_out(element):
    """Whether an element is for validation: every fourth run of ten, which keeps most neighbours together."""
    return (element.number - 1) // 10 % 4 == 3


def facts_of_split(split):
    """(countries, elements) of "train" or "val": a fixed quarter of each is held out; no question mixes the two."""
    countries, elements = load_facts()
    held_out = set(random.Random("held-out countries").sample(range(len(countries)), len(countries) // 4))
    return ([country for number, country in enumerate(countries) if (number in held_out) == (split == "val")],
            [element for element in elements if is_held_out(element) == (split == "val")])


def country_relations(country):
    """Yields (relation, golds, the text that says so)."""
    yield "capital", country.capital_golds, country.capital_text
    yield "currency", country.currency_golds, country.text
    yield "continent", (country.continent,), country.text
    if len(country.languages) == 1:
        yield "language", country.languages, country.text


def element_relations(element):
    """Yields (relation, golds, the text that says so)."""
    yield "symbol", (element.symbol,), element.text
    yield "atomic number", (str(element.number),), element.text


def one_hop_facts(countries, elements):
    """Yields (relation, name, description, golds, hops); the description is the name."""
    for entity, relations in [(country, country_relations) for country in countries] + [
            (element, element_relations) for element in elements]:
        for relation, golds, text in relations(entity):
            yield relation, entity.name, entity.name, golds, ((entity.name, (text,)),)
    for country in countries:
        capital = country.capital
        yield "country", capital, capital, country.golds, ((capital, (country.capital_text,)),)


def two_hop_facts(countries, elements):
    """Yields (relation, name, description, golds, hops), such as a description "the only neighbour of {name}"."""
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

    It must not contain the answer (except in comparisons), and if it has two hops, a search for its own words must not
    find a passage with the answer. top: query -> the three best passages.
    """
    if question.task_type == "two_hop" and any(mentions(passage, question.golds) for passage in top(question.text)):
        return False
    if question.task_type != "comparison" and mentions(question.text, question.golds):
        return False
    return all(any(text in passage for passage in top(query)) for query, texts in question.hops for text in texts)


def draw_comparisons(split, count, top):
    """`count` comparisons, of countries and elements in turn: never of equals, always answerable by one search."""
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
    """The answerable questions about facts as (relation, name, description, golds, hops).

    Training asks in all wordings, validation in one, so that its questions are independent.
    """
    questions = []
    for relation, name, description, golds, hops in facts:
        wordings = SEARCH_WORDINGS[relation]
        for wording in wordings if split == "train" else [rng.choice(wordings)]:
            questions.append(Question(wording.format(description), golds, kind, (name,), relation, hops))
    return [question for question in questions if is_answerable(question, top)]


@functools.lru_cache(maxsize=1)
def search_questions():
    """{"train" | "val": `Question`s}, the same in every process. The three types alternate."""
    top = functools.lru_cache(maxsize=None)(functools.partial(corpus_search, bundled_corpus(), topk=3))
    splits = {}
    for split in ("train", "val"):
        rng, entities = random.Random(f"questions {split}"), facts_of_split(split)
        one_hop = ask_facts("one_hop", one_hop_facts(*entities), split, rng, top)
        two_hop = ask_facts("two_hop", two_hop_facts(*entities), split, rng, top)
        rng.shuffle(one_hop)
        rng.shuffle(two_hop)
        comparisons = draw_comparisons(split, min(len(one_hop), len(two_hop)), top)
        splits[split] = tuple(itertools.chain.from_iterable(zip(one_hop, two_hop, comparisons, strict=False)))
    return splits
