"""Readers of the official data of the three environments, and the rules of that data that others share.

WebShop: the product JSON files of princeton-nlp/WebShop and the goals built from them. ALFWorld: the game.tw-pddl files
of alfworld 0.4.2, read into a `Game`. Search-QA: the question rows of Search-R1. The generated tasks pass through the
same functions. Malformed files raise ValueError, and missing ones FileNotFoundError, with one sentence that says what
is wrong, where, and what to do.
"""
import functools
import itertools
import json
import math
import os
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------------------------------

READ_AT_ONCE = 1 << 22                   # bytes
LARGEST_ENTRY = 1 << 26                  # characters of an entry of a list that is read one by one
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data, kind, where):
    """The `kind` (dict or list) in bytes of UTF-8 JSON; `where` names the file, and the line if there are several."""
    try:
        text = data.decode("utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise not_json(where, error) from error
    if SURROGATE.search(text):
        check_text(content, where)
    if not isinstance(content, kind):
        raise ValueError(f"{where} holds a {type(content).__name__} where a {kind.__name__} is expected; give a file "
                         "in the official format.")
    return content


def not_json(where, error):
    return ValueError(f"{where} is not UTF-8 JSON: {error}; download or write it again.")


def check_text(content, where):
    """Raises ValueError for half of a surrogate pair in parsed JSON, which can be neither printed nor tokenized."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds {error.object[error.start]!a}, half of a surrogate pair, which is not a "
                         "character; remove it, or write the file again.") from error


def check_file(path, content):
    """`path` as a `Path`, which must be a file, not a folder, pipe or device; `content` says what is expected there."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}; give the path of {content}.")
    if not path.is_file():               # a pipe would be waited for
        raise FileNotFoundError(f"{path} cannot be read: it is not a regular file; give the path of {content}.")
    return path


def open_file(path, content, **options):
    """`open(path, **options)` after `check_file`."""
    path = check_file(path, content)
    try:
        return open(path, **options)
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be read ({error.strerror}); give the path of {content}.") from error


def read_json_file(path, kind):
    """The content of a JSON file, which must be a `kind` (dict or list)."""
    with open_file(path, "a JSON file", mode="rb") as file:
        return parse_json(file.read(), kind, path)


def read_json_list(path, progress=None):
    """Yields the entries of a JSON file that holds one list, of which it never holds more than a few.

    progress: a tqdm bar that counts bytes.
    """
    with open_file(path, "a JSON file", encoding="utf-8") as file:
        try:
            start = file.read(64).lstrip()
            if start[:1] == "[":
                yield from parse_entries(start[1:], file, path, progress)
                return
        except (ValueError, RecursionError) as error:
            raise error if type(error) is ValueError else not_json(path, error) from error
    yield from read_json_file(path, list)        # it is not a list, and refused like any other file


def parse_entries(text, file, path, progress):
    """Yields the entries of a list whose text is `text` and what follows in the file. Raises json.JSONDecodeError."""
    decode, blanks = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    start, count, at_end, last = 0, 0, False, False
    while not last:
        try:
            start = blanks.match(text, start).end()
            if not count and text[start:start + 1] == "]":
                start, last = start + 1, True
                continue
            entry, end = decode(text, start)
            after = blanks.match(text, end).end()
            if text[after:after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
        except json.JSONDecodeError as error:    # maybe the text read so far ends within the entry
            if at_end or len(text) - start > LARGEST_ENTRY:
                raise json.JSONDecodeError(f"{error.msg} at entry {count}", text, error.pos) from error
            part = file.read(READ_AT_ONCE)
            text, start, at_end = text[start:] + part, 0, not part
            if progress is not None:
                progress.update(file.buffer.tell() - progress.n)
            continue
        if SURROGATE.search(text, start, end):
            check_text(entry, f"{path}, entry {count}")
        yield entry
        start, last, count = after + 1, text[after] == "]", count + 1
    if (text[start:] + file.read()).strip():
        raise json.JSONDecodeError("Extra data after the list", text, start)


def read_jsonl(path):
    """Yields ("file, line n", dict) for every line that is not blank."""
    with open_file(path, "a file with an object per line", mode="rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, parse_json(line, dict, where)


def check_folder(path, content):
    """`path` as a `Path`, which must be a folder; `content` says which one is meant."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the one that holds {content}.")
    return path


def checked(entry, field, kind, where):
    """`entry[field]`, which must be a `kind` (a list: of strings); `where` names the file and the entry."""
    names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    if field not in entry:
        raise ValueError(f"{where}: field {field!r} is missing; it must be a {names}.")
    value = entry[field]
    if not isinstance(value, kind) or isinstance(value, list) and not all(isinstance(item, str) for item in value):
        strings = " of strings" if isinstance(value, list) else ""
        raise ValueError(f"{where}: field {field!r} must be a {names}{strings}, not {value!r:.60}.")
    return value


def check_name(text, where):
    """Raises ValueError for a task's type that cannot name a file, as that of its skills, in a folder."""
    if not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f\x7f]{0,100}", text):
        raise ValueError(f"{where} must be a plain name of at most 100 characters, without slashes, not {text!r:.60}.")


# ---------------------------------------------------------------------------------------------------------------------
# WebShop: products (web_agent_site/engine/engine.py, load_products)
# ---------------------------------------------------------------------------------------------------------------------

DROPPED_FIELDS = frozenset({
    "product_information", "brand", "brand_url", "list_price", "availability_quantity", "availability_status",
    "total_reviews", "total_answered_questions", "seller_id", "seller_name", "fulfilled_by_amazon",
    "fast_track_message", "aplus_present", "small_description_old"})
# Labels of a page's buttons. An option value equal to one of them cannot be chosen.
BUTTONS = {"search", "back to search", "< prev", "next >", "description", "features", "reviews", "attributes",
           "buy now"}
# Option values are compared by colour: the first of these, in this order, that occurs inside the value stands for it.
COLORS = [
    "alabaster", "apricot", "aqua", "ash", "asphalt", "azure", "banana", "beige", "black", "blue", "blush", "bordeaux",
    "bronze", "brown", "burgundy", "camel", "camo", "caramel", "champagne", "charcoal", "cheetah", "chestnut",
    "chocolate", "christmas", "coffee", "cognac", "copper", "coral", "cranberry", "cream", "crystal", "dark", "denim",
    "eggplant", "elephant", "espresso", "fuchsia", "gold", "granite", "grape", "graphite", "grass", "gray", "green",
    "grey", "heather", "indigo", "ivory", "ivy", "khaki", "lavender", "lemon", "leopard", "light", "lilac", "lime",
    "magenta", "maroon", "mauve", "merlot", "midnight", "mint", "mocha", "multicolor", "mushroom", "mustard", "natural",
    "navy", "nude", "olive", "orange", "peach", "pewter", "pink", "plum", "purple", "rainbow", "red", "rose", "royal",
    "rust", "sand", "sapphire", "seashell", "silver", "skull", "slate", "steel", "stone", "stonewash", "sunflower",
    "tan", "taupe", "teal", "tiger", "turquoise", "violet", "walnut", "wheat", "white", "wine", "yellow"]
# Words of a product title that are not nouns, for the noun rule used where no tagger is installed.
NOT_NOUNS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "from", "in", "into", "is", "it", "its", "made",
    "of", "off", "on", "onto", "or", "our", "out", "over", "per", "so", "than", "that", "the", "their", "this", "to",
    "under", "until", "up", "very", "with", "within", "without", "you", "your", "all", "any", "both", "each", "every",
    "extra", "more", "most", "new", "no", "non", "not", "only", "other", "same", "some", "such", "adjustable",
    "authentic", "big", "black", "blue", "bright", "brown", "classic", "clear", "comfortable", "compact", "cute",
    "dark", "deep", "delicious", "double", "durable", "easy", "elegant", "everyday", "fine", "flat", "free", "fresh",
    "full", "gray", "great", "green", "grey", "handmade", "heavy", "high", "ideal", "large", "light", "lightweight",
    "little", "long", "low", "luxury", "mini", "modern", "natural", "old", "organic", "perfect", "pink", "plain",
    "portable", "premium", "pure", "purple", "quick", "quiet", "red", "reusable", "rich", "round", "short", "silent",
    "simple", "slim", "small", "smooth", "soft", "solid", "strong", "super", "sweet", "thick", "thin", "tiny", "tall",
    "ultra", "unique", "vintage", "warm", "white", "wide", "yellow"})


class Catalogue(NamedTuple):
    """The content of the official files, and what errors call them."""
    items: Iterable                      # items_shuffle.json: one dict per product; of a file they are read one by one
    attributes: dict                     # items_ins_v2.json: {asin: attributes and the synthetic instruction}
    human: dict | None                   # items_human_ins.json: {asin: [instructions]}; None: synthetic goals
    names: tuple = ("items", "attributes", "human")
    held_out: set = frozenset()          # asins that only validation asks for; none where the order of goals decides


def catalogue_files(folder, human_goals):
    """The paths of the official files in a folder; the human file is needed for human goals only."""
    folder = check_folder(folder, "the official WebShop files")
    names = ["items_shuffle", "items_ins_v2"] + ["items_human_ins"] * human_goals
    return [find_file(folder, f"{name}*.json") for name in names]


def read_catalogue(paths, progress=None):
    """The `Catalogue` in the files of `catalogue_files`; progress: a tqdm bar that counts bytes of products."""
    rest = [read_json_file(path, dict) for path in paths[1:]]
    return Catalogue(read_json_list(paths[0], progress), *(rest + [None])[:2], tuple(path.name for path in paths))


def find_file(folder, pattern):
    """The path of the one file in the folder that matches `pattern`."""
    matches = sorted(folder.glob(pattern))
    if not matches:
        raise FileNotFoundError(f"No {pattern} in {folder}; put the official WebShop file there.")
    if len(matches) > 1:
        names = ", ".join(path.name for path in matches)
        raise ValueError(f"Several files match {pattern} in {folder} ({names}); keep one of them there.")
    return check_file(matches[0], "the official WebShop file")


def read_products(catalogue):
    """Yields every product in the order of the file, as the original's loader leaves it."""
    items_name, attributes_name, *human_name = catalogue.names
    seen = set()
    for number, entry in enumerate(catalogue.items):
        if not isinstance(entry, dict):
            raise ValueError(f"{items_name}, entry {number}: a product must be an object, not {entry!r:.60}.")
        asin = checked(entry, "asin", str, f"{items_name}, entry {number}")
        if asin == "nan" or len(asin) > 10 or asin in seen:          # the original's filter
            continue
        seen.add(asin)
        product = load_product(entry, f"{items_name}, entry {number} ({asin})")
        product |= load_instructions(asin, catalogue, f"{attributes_name}, {asin}")
        if catalogue.human is not None:
            check_human_instructions(product.get("instructions", []), f"{human_name[0]}, {asin}")
        yield product
    if not seen:
        raise ValueError(f"{items_name} holds no product with a usable asin; give a file with at least one.")


def build_products(catalogue):
    """{asin: product} in the order of the file."""
    return {product["asin"]: product for product in read_products(catalogue)}


def load_product(entry, where):
    """A product as the original's loader leaves it, except the fields that come from the other two files."""
    bullets = checked(entry, "small_description", (list, str), where)
    pricing, tag = parse_pricing(entry, where)
    options, images = parse_options(entry, where)
    if not isinstance(entry.get("images"), list) or not entry["images"]:
        raise ValueError(f"{where}: field 'images' must be a list of at least one address.")
    check_name(checked(entry, "category", str, where), f"{where}: field 'category'")
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


def parse_pricing(entry, where):
    """([a fixed price, or the two ends of a range], price tag) of a text such as "$12.99" or "$10.00$20.00"."""
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
        images.update(zip(values, (choice.get("image") for choice in choices), strict=True))
        options[name.lower()] = values
    return options, images


def load_instructions(asin, catalogue, where):
    """The fields of a product that come from the attribute file and, for human goals, from the human file."""
    known = catalogue.attributes.get(asin, {})
    if not isinstance(known, dict):
        raise ValueError(f"{where}: the entry must be an object, not {known!r:.60}.")
    found = {"Attributes": checked(known, "attributes", list, where) if "attributes" in known else ["DUMMY_ATTR"]}
    if catalogue.human is not None:
        return {**found, "instructions": catalogue.human[asin]} if asin in catalogue.human else found
    if asin not in catalogue.attributes:
        raise ValueError(f"{where}: there is no entry for this product; take the file that goes with the products.")
    found["instruction_text"] = known.get("instruction")
    found["instruction_attributes"] = known.get("instruction_attributes")
    if found["instruction_text"] is not None:
        checked(known, "instruction", str, where)
        if not checked(known, "instruction_attributes", list, where):
            raise ValueError(f"{where}: field 'instruction_attributes' is empty although there is an instruction.")
    return found


def check_human_instructions(instructions, where):
    if not isinstance(instructions, list) or not all(isinstance(entry, dict) for entry in instructions):
        raise ValueError(f"{where}: the entry must be a list of objects.")
    for entry in instructions:
        checked(entry, "instruction", str, where)
        checked(entry, "instruction_attributes", list, where)
        checked(entry, "instruction_options", list, where)


# ---------------------------------------------------------------------------------------------------------------------
# WebShop: goals (web_agent_site/engine/goal.py)
# ---------------------------------------------------------------------------------------------------------------------

COPIED_FIELDS = ("asin", "category", "query", "name", "product_category")
GOAL_FIELDS = {*COPIED_FIELDS, "instruction_text", "attributes", "price_upper", "goal_options"}


NO_BOUND = 1000000                       # the bound of a goal without one


def draw_price_bound(price, rng):
    """The upper price of a goal: the larger of two of the next four tens above the price, which end at 990."""
    first = math.floor(price / 10) + 1 if price < 990 else 100
    candidates = [10.0 * step for step in range(first, min(first + 4, 100))]
    return max(rng.sample(candidates, 2)) if len(candidates) > 1 else NO_BOUND


def price_phrase(bound):
    return f", and price lower than {bound:.2f} dollars" if bound < NO_BOUND else ""


def make_goal(product, instruction, attributes, bound, options):
    return {**{field: product[field] for field in COPIED_FIELDS}, "instruction_text": instruction,
            "attributes": attributes, "price_upper": bound if bound < NO_BOUND else NO_BOUND, "goal_options": options}


def kept_instructions(product, human_goals):
    """The instructions of which goals are made: people's as entries of the file, of a synthetic one its attributes."""
    if human_goals:
        return [entry for entry in product.get("instructions", []) if entry["instruction_attributes"]]
    return [product["instruction_attributes"]] if product["instruction_text"] is not None else []


def human_goals_of(product, bounds):
    """One goal per human instruction that names attributes, each with its price bound; options are a list of values."""
    return [make_goal(product, entry["instruction"].strip(".") + price_phrase(bound), entry["instruction_attributes"],
                      bound, entry["instruction_options"])
            for entry, bound in zip(kept_instructions(product, True), bounds, strict=True)]


def synthetic_goals_of(product, bounds):
    """One goal per combination of option values, all with one price bound; its options are {name: value}."""
    names, goals = sorted(product["options"]), []
    for values in itertools.product(*(product["options"][name] for name in names)):
        options = dict(zip(names, values, strict=True))
        wish = ", and ".join(f"{name}: {value}" for name, value in options.items())
        text = product["instruction_text"] + (f" with {wish}" if wish else "") + price_phrase(bounds[0])
        goals.append(make_goal(product, text, product["instruction_attributes"], bounds[0], options))
    return goals


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld: what a game is, and queries of its state
# ---------------------------------------------------------------------------------------------------------------------

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
OBJECT_TYPES = ("agent", "location", "receptacle", "object", "rtype", "otype")
# What the rules and texts rely on: the argument types of the predicates that place objects.
SIGNATURES = {"atlocation": ("agent", "location"), "receptacleatlocation": ("receptacle", "location"),
              "inreceptacle": ("object", "receptacle"), "holds": ("agent", "object")}

# verb -> what the held object must be, the receptacle's type, the fact that becomes true, the one that ceases to be
APPLIANCES = {"clean": ("cleanable", "sinkbasintype", "isclean", None),
              "heat": ("heatable", "microwavetype", "ishot", "iscool"),
              "cool": ("coolable", "fridgetype", "iscool", "ishot")}


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


def place_of(game, facts):
    """The agent's location."""
    return next(location for location in game.locations if ("atlocation", game.agent, location) in facts)


def held_object(game, facts):
    """The object in the agent's hands, or None."""
    return next((obj for obj in game.objects if ("holds", game.agent, obj) in facts), None)


def contents(game, facts, receptacle):
    """The objects in or on a receptacle, in the order shown."""
    return [obj for obj in game.objects if ("inreceptacle", obj, receptacle) in facts]


def is_accessible(game, facts, receptacle):
    """Whether the receptacle is open or cannot be closed."""
    return ("openable", receptacle) not in game.static or ("opened", receptacle) in facts


def fits(game, obj, receptacle):
    """Whether the receptacle's type can hold the object's; there is no limit to how many."""
    return any(("cancontain", kind, of) in game.static
               for kind in game.types[receptacle] for of in game.types[obj])


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld: PDDL and goal formulas
# ---------------------------------------------------------------------------------------------------------------------

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
    """Raises ValueError for a fact or a goal's atom that the rules cannot use; variables begin with "?"."""
    if not fact or not all(isinstance(word, str) for word in fact):
        raise ValueError(f"{where}: {str(fact):.60} is not a fact; it must be a predicate and its arguments.")
    name, *arguments = fact
    if name not in PREDICATES:
        raise ValueError(f"{where}: predicate {name!r} is unknown to ALFWorld's rules; take a game of the original "
                         "ALFRED domain.")
    if len(arguments) != PREDICATES[name]:
        raise ValueError(f"{where}: predicate {name!r} takes {PREDICATES[name]} arguments, not {len(arguments)}.")
    for word, kind in zip(arguments, SIGNATURES.get(name, ()), strict=False):     # most predicates have no signature
        if word not in by_type.get(kind, ()) and not word.startswith("?"):
            raise ValueError(f"{where}: {word!r} in a fact {name!r} is not {kind!r} in (:objects ...); declare it "
                             "there.")


def is_static(formula):
    """Whether a part of a goal is an atom that no action changes."""
    return (isinstance(formula, list) and all(isinstance(word, str) for word in formula)
            and (formula[:1] == ["="] and len(formula) == 3 or bool(formula) and formula[0] in STATIC_PREDICATES))


def ground(formula, binding, by_type, static, where):
    """A goal formula without variables: True, False, ("fact", fact), ("not", f), ("and", [f..]) or ("or", [f..]).

    formula: nested lists of words; binding: {variable: id}; by_type: {type: ids}; static: the facts that never change.
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
    return ground_atom(formula, binding, by_type, static, where)


def ground_atom(formula, binding, by_type, static, where):
    """An atom of a goal: ("fact", fact), or whether it is true if no action changes it."""
    atom = tuple(binding.get(word, word) if isinstance(word, str) else word for word in formula)
    if atom[0] == "=" and is_static(formula):
        return atom[1] == atom[2]
    check_fact(list(atom), by_type, where)
    free = [word for word in atom if word.startswith("?")]
    if free:
        raise ValueError(f"{where}: variable {free[0]!r} of the goal stands outside its quantifier.")
    return ("fact", atom) if atom[0] in DYNAMIC_PREDICATES else atom in static


def combine(head, parts):
    """("and" | "or", parts) shortened where a part decides it; stops drawing parts as soon as one does."""
    decisive, rest = head == "or", []
    for part in parts:
        if part is decisive:
            return decisive
        if not isinstance(part, bool):
            rest.append(part)
    return (head, rest) if rest else not decisive


def bindings(variables, binding, tests, by_type, static):
    """Yields every extension of `binding` to `variables`, except those where one of the static `tests` fails."""
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


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld: game files
# ---------------------------------------------------------------------------------------------------------------------

def entity_names(ids):
    """{id: name}. Numbers are given from the highest down, over the sorted ids of each kind, as the original does."""
    kinds = {}
    for entity in sorted(ids, reverse=True):
        kind, bar, _ = entity.partition("_bar_")
        kinds.setdefault((kind + "basin" * ("basin" in entity) if bar else kind, bool(bar)), []).append(entity)
    return {entity: f"{kind} {number}" if numbered else kind
            for (kind, numbered), entities in kinds.items() for number, entity in enumerate(entities, 1)}


def build_game(typed, initial, goal, task, task_type, where):
    """The `Game` of [(name, type)], facts and goal as nested lists, and the task's sentence and type."""
    by_type, declared = {kind: [] for kind in OBJECT_TYPES}, set()
    for name, kind in typed:
        if name in declared:
            raise ValueError(f"{where}: {name!r} stands twice in (:objects ...); declare it once.")
        if kind not in by_type:
            raise ValueError(f"{where}: {name!r} has the unknown type {kind!r}; the types are {', '.join(by_type)}.")
        declared.add(name)
        by_type[kind].append(name)
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


def read_task(grammar, where):
    """The task sentence, which the original's generator writes into a rule of the game's grammar."""
    match = re.search(r'"task"\s*:\s*\[\s*\{\s*"rhs"\s*:\s*("(?:[^"\\]|\\.)*")', grammar)
    if match is None:
        raise ValueError(f"{where}: the grammar has no rule \"task\" with the task sentence; add one.")
    try:
        task = json.loads(match[1], strict=False)
    except ValueError as error:
        raise not_json(f"{where}: the task sentence in the grammar", error) from error
    check_text(task, where)
    return task.removeprefix(TASK_PREFIX)


def read_task_type(path):
    """The type that traj_data.json beside the game gives, else the one in the names of the file and its folders."""
    trajectory = path.with_name("traj_data.json")
    if trajectory.exists():
        found = read_json_file(trajectory, dict).get("task_type")
        return found if found in ALFWORLD_TYPES else "unknown"
    return next((kind for part in reversed(path.parts) for kind in ALFWORLD_TYPES if kind in part), "unknown")


def parse_game(content, where, task_type="unknown"):
    """The `Game` in a game.tw-pddl's JSON object; `where` names the file in errors."""
    for field in ("pddl_problem", "grammar"):
        if not isinstance(content.get(field), str):
            raise ValueError(f"{where}: field {field!r} is missing or not a string; give a file of json_2.1.1.")
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
    task = read_task(content["grammar"], where)
    try:
        return build_game(parse_typed(sections[":objects"]), facts, sections[":goal"][0], task, task_type, where)
    except RecursionError as error:
        raise ValueError(f"{where}: the PDDL problem is nested too deeply; take the file as published.") from error


def load_game(path):
    """The `Game` in a game.tw-pddl file; the last 512 are remembered as long as their files do not change."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise FileNotFoundError(f"There is no file {path}; give the path of a game.tw-pddl.") from error
    return _load_game(os.path.abspath(path), (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=512)
def _load_game(path, stamp):
    path = Path(path)
    return parse_game(read_json_file(path, dict), str(path), read_task_type(path))


class Games(NamedTuple):
    """The games of a split."""
    paths: list                          # in order
    types: list                          # task type of each
    skipped: dict                        # {reason: number of folders left out}


@functools.lru_cache(maxsize=16)
def find_games(data, split):
    """A split's `Games` by the official loader's rules.

    It leaves out movable receptacles and sliced objects, and whatever has no game file, another type or no solution.
    """
    root = check_folder(data, "ALFWorld's json_2.1.1")
    folder = (root / "json_2.1.1" if (root / "json_2.1.1").is_dir() else root) / split
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; the official layout is "
                                f"json_2.1.1/{{{','.join(ALFWORLD_SPLITS)}}}/**/game.tw-pddl.")
    games, types, skipped = [], [], Counter()
    for parent in sorted({path.parent for name in ("game.tw-pddl", "traj_data.json") for path in folder.rglob(name)}):
        inside, game = str(parent.relative_to(folder)), parent / "game.tw-pddl"
        if not (parent / "traj_data.json").exists():
            skipped["no traj_data.json"] += 1
        elif "movable" in inside or "Sliced" in inside:
            skipped["movable or sliced"] += 1
        elif (task_type := read_task_type(game)) == "unknown":
            skipped["other task type"] += 1
        elif not game.exists():
            skipped["no game.tw-pddl"] += 1
        elif not read_json_file(game, dict).get("solvable", False):
            skipped["not solvable"] += 1
        else:
            games.append(str(game))
            types.append(task_type)
    if not games:
        left_out = ", ".join(f"{number} {reason}" for reason, number in skipped.items()) or "none were found"
        raise ValueError(f"{folder} holds no playable game (left out: {left_out}); give a folder with at least one.")
    return Games(games, types, dict(skipped))


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA: questions
# ---------------------------------------------------------------------------------------------------------------------

ROW_FIELDS = ("question", "data_source", "ground_truth", "reward_model", "golden_answers", "env_kwargs",
              "teacher_prompt")


class Question(NamedTuple):
    """A task. Only generated ones have names, relation and hops, which the scripted players need."""
    text: str
    golds: tuple                         # accepted answers; of a generated question the first as passages write it
    task_type: str                       # of an official one its data_source
    names: tuple = ()                    # what the question names, as it names it
    relation: str = ""                   # what it asks for, in words that name nothing
    hops: tuple = ()                     # searches that lead to the answer, as (query, texts that it must find)
    teacher_prompt: str = ""             # what an official one has for a teacher alone


def nfc(text):
    """One form for texts that look alike: "é" may be one code point or two."""
    return unicodedata.normalize("NFC", text)


def normalize_answer(text):
    """Lower-cased NFC without ASCII punctuation and the articles a, an and the, with single spaces (SQuAD's rule)."""
    text = nfc(text.lower())
    text = "".join(character for character in text if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def read_parquet(path):
    """Yields ("file, row n", dict) for every row."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Reading {path} needs pyarrow: pip install pyarrow, or give the rows as JSONL.") from error
    with open_file(path, "a parquet file", mode="rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            rows = table.read([name for name in table.schema_arrow.names if name in ROW_FIELDS]).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"{path} is not a parquet file: {reason}; download or write it again.") from error
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
        if not re.fullmatch(r"(?=.{1,100}$)[\w-]+([ .][\w-]+)*", source):      # it names a file of skills
            raise ValueError(f"{where}: data_source {source!r:.60} must be a plain name, of letters, digits, - and _, "
                             "of at most 100 characters.")
        teacher = row.get("teacher_prompt") or ""
        if not isinstance(teacher, str):
            raise ValueError(f"{where}: teacher_prompt, if given, must be a text.")
        questions.append(Question(text, row_golds(row, where), source.removeprefix("searchR1_"),  # verl adds this
                                  teacher_prompt=teacher))
    if not questions:
        raise ValueError(f"{path} holds no question; give a file with at least one row.")
    return tuple(questions)


def question_files(data):
    """{split: path}. A folder's test file is "val"; a single file is "val" alone, so that nobody trains on it."""
    if Path(data).is_file():
        return {"val": str(data)}
    folder, files = check_folder(data, "train and test questions, or a single file"), {}
    for split, stems in (("train", ["train"]), ("val", ["test", "val", "validation", "dev"])):
        names = [f"{stem}{suffix}" for stem in stems for suffix in (".parquet", ".jsonl")]
        found = [folder / name for name in names if (folder / name).is_file()]
        files |= {split: str(found[0])} if found else {}
    if not files:
        raise FileNotFoundError(f"{data} holds neither train nor test questions; put train.jsonl and test.jsonl (or "
                                ".parquet) there.")
    return files
