"""Scripted players of the three environments, from which models learn by behaviour cloning.

Each player is one function (env, rng) -> (thought, action) of the environment's state. Without rng it is the expert,
which wins every generated task from any state that allows it. With rng, a `random.Random`, it is the weak
demonstrator: at each decision that a failure mode of its environment describes, it does the wrong thing with the
probability given there. Thoughts of a good and of a wrong decision differ, and the texts are fixed: the bundled model
was trained on them.
"""
import re
from typing import NamedTuple

from lib.generated import ALFWORLD_PLACEMENTS, WEBSHOP
from lib.official import (
    ALFWORLD_TYPES,
    APPLIANCES,
    BUTTONS,
    contents,
    fits,
    held_object,
    is_accessible,
    place_of,
)


def random_move(admissible, rng):
    """One of the possible actions (`info["admissible"]`) that neither ends the episode nor needs words, or None."""
    moves = [move for move in admissible or () if "<" not in move and move not in ("click[buy now]", "help")]
    return rng.choice(moves) if moves else None


def write_answer(env_name, thought, action):
    """The answer that `envs.parse_action` reads back as (action, True).

    A thought begins with a space, so that its first word is the same token as within an observation.
    """
    return f"<think> {thought}</think>" + (action if env_name == "search" else f"<action>{action}</action>")


def failures(rng, modes):
    """mode -> whether the player fails in this way now: drawn by `modes` {mode: probability}, never without rng."""
    return (lambda mode: False) if rng is None else (lambda mode: rng.random() < modes[mode])


# ---------------------------------------------------------------------------------------------------------------------
# WebShop
# ---------------------------------------------------------------------------------------------------------------------

# Search the product without its details; open the first product whatever its price and details; buy with an option not
# chosen; stay with a wrong product.
WEBSHOP_FAILURE_MODES = {"vague_query": 0.6, "any_price": 0.6, "skip_options": 0.5, "keep_wrong": 1.0}


def webshop_player(env, rng=None) -> tuple[str, str]:
    """(thought, action) on any page. The expert wins every goal that its own product can win."""
    fails = failures(rng, WEBSHOP_FAILURE_MODES)
    if env.page == "results":
        return _choose_product(env, fails)
    if env.page == "item":
        return _choose_options(env, fails)
    if env.page in ("description", "features", "reviews", "attributes"):
        return "back to the product", "click[< prev]"
    details, noun = _request_words(env.goal)
    if details != noun and fails("vague_query"):
        return "search the product", f"search[{noun}]"
    return "use every detail", f"search[{details}]"


def _request_words(goal):
    """The words to search for: what is asked for in the task's words, article included, and its noun phrase alone."""
    text = re.sub(r", and price lower than [\d.]+ dollars$", "", goal["instruction_text"].lower())
    match = re.match(rf"(?:{'|'.join(WEBSHOP['requests'])}) (.+?)(?: with [^:]+: .*)?$", text)
    if match is None:                    # a person's wording
        return " ".join([*goal["attributes"], goal["query"]]).lower(), goal["query"]
    noun = match[1].split(" that ")[0]
    for attribute in goal["attributes"]:
        noun = " ".join(noun.replace(attribute, " ").split())
    return match[1], noun or goal["query"]


def _wanted_options(env, asin):
    """The goal's option values that can be clicked on a product's page, {option name: value} in page order."""
    wanted = env.goal["goal_options"]
    pairs = wanted.items() if isinstance(wanted, dict) else [(None, value) for value in wanted]
    options = env.products[asin]["options"]
    sets = {value: name for name, values in options.items() for value in values}  # of equal values the later one counts
    found = {}
    for name, values in options.items():
        for value in values:
            clickable = sets[value] == name and value and value not in BUTTONS and not set(value) & {"[", "\n"}
            if clickable and ((name, value) in pairs or (None, value) in pairs):
                found[name] = value
    return found


def _can_win(env, asin):
    """Whether buying the product can win; the goal's own product stands in for goals that none can win."""
    if asin == env.goal["asin"]:
        return True
    if env.price[asin] > env.goal["price_upper"]:
        return False
    return env.reward_of(asin, _wanted_options(env, asin))[0] == 1.0


def _choose_product(env, fails):
    start = 10 * (env.page_number - 1)
    shown = env.results[start:start + 10]
    good = next((asin for asin in shown if _can_win(env, asin)), None)
    if shown and good == shown[0]:
        return "first one fits", f"click[{good.lower()}]"
    if shown and fails("any_price"):
        return "take the first", f"click[{shown[0].lower()}]"
    if good:
        overpriced = env.price[shown[0]] > env.goal["price_upper"]
        return "first costs too much" if overpriced else "another one fits", f"click[{good.lower()}]"
    if any(_can_win(env, asin) for asin in env.results[start + 10:]):
        return "look further", "click[next >]"
    details, _ = _request_words(env.goal)
    queries = [details, " ".join([*env.goal["attributes"], env.goal["query"]]), env.goal["name"]]
    queries = list(dict.fromkeys(query.lower() for query in queries))
    used = queries.index(env.query) if env.query in queries else -1
    return "none of these fits", f"search[{queries[(used + 1) % len(queries)]}]"


def _choose_options(env, fails):
    if not _can_win(env, env.asin) and not fails("keep_wrong"):
        return "not the right one", "click[< prev]"
    for name, value in _wanted_options(env, env.asin).items():
        if value not in env.options.values():
            if fails("skip_options"):
                return "good enough", "click[buy now]"
            return f"choose {name}: {value}", f"click[{value}]"
    return "all is chosen", "click[buy now]"


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld
# ---------------------------------------------------------------------------------------------------------------------

# Pass a closed receptacle; bring the object untreated; put it anywhere; examine it without a lamp; stop after one of
# two; do nothing once the work seems done.
ALFWORLD_FAILURE_MODES = {"skip_closed": 0.6, "as_it_is": 0.7, "any_place": 0.8, "no_lamp": 0.55,
                          "one_is_enough": 0.75, "idle": 1.0}


class HouseGoal(NamedTuple):
    """What a game asks for. Ids, not kinds: the goal's static parts are decided already."""
    objects: set                         # any of them will do
    places: list                         # receptacles where it is to go, lowest number first; none for a lamp
    lamps: set
    verb: str | None                     # "clean", "heat" or "cool" first
    two: bool


def goal_facts(formula):
    """The facts named in a formula of `official.ground`."""
    if isinstance(formula, bool):
        return set()
    head, inner = formula
    if head == "fact":
        return {inner}
    return set().union(*map(goal_facts, [inner] if head == "not" else inner))


def read_goal(game):
    """The `HouseGoal` of a game of the six types, read from its goal; its sentence may say it in any words.

    Raises ValueError for other goals.
    """
    facts = goal_facts(game.goal)
    lamps = {fact[1] for fact in facts if fact[0] == "istoggled"}
    places = [] if lamps else sorted({fact[2] for fact in facts if fact[0] == "inreceptacle"},
                                     key=lambda place: _kind_number(game, place))
    objects = {fact[2] for fact in facts if fact[0] == "holds"} if lamps else {
        fact[1] for fact in facts if fact[0] == "inreceptacle"}
    if not objects:
        raise ValueError(f"The expert can't read the goal of the task {game.task!r}; it knows the types "
                         f"{', '.join(ALFWORLD_TYPES)}.")
    gained = {fact[0] for fact in facts}
    verb = next((verb for verb, appliance in APPLIANCES.items() if appliance[2] in gained), None)
    return HouseGoal(objects, places, lamps, verb, game.task_type == "pick_two_obj_and_place")


def alfworld_player(env, rng=None) -> tuple[str, str]:
    """(thought, action) in any state of a game of the six types; raises ValueError for other goals.

    The player remembers nothing: it looks for an object in rounds, from where it stands, through one order of the
    receptacles. A thought names what the decision is about, as the task does, and says at once what the observation
    shows of it, which is easy to read off.
    """
    fails = failures(rng, ALFWORLD_FAILURE_MODES)
    goal, held = read_goal(env.game), held_object(env.game, env.facts)
    if held is None:
        return _find_object(env, goal, fails)
    if held not in goal.objects:
        return _put_back(env, held)
    if goal.lamps:
        return _find_lamp(env, goal, held, fails)
    untreated = goal.verb and (APPLIANCES[goal.verb][2], held) not in env.facts
    if untreated and not fails("as_it_is"):
        return _treat_first(env, goal.verb, held)
    if untreated:
        return "fine as it is", _bring(env, held, goal.places[0])[1]
    at_place = goal.places[0] in _here(env)
    if goal.verb is None and not goal.two and not at_place and fails("any_place"):
        wrong = _wrong_place(env.game, held, goal)
        if wrong:
            return "any place does", _bring(env, held, wrong)[1]
    return _bring(env, held, goal.places[0])


def _find_object(env, goal, fails):
    game, facts, here = env.game, env.facts, _here(env)
    kind = game.names[min(goal.objects)].split()[0]
    full = set(goal.places[:1]) if goal.two else set()       # what lies there already is to stay
    seen = [(obj, receptacle) for receptacle in here if is_accessible(game, facts, receptacle)
            for obj in contents(game, facts, receptacle) if obj in goal.objects]
    if seen and env.last and env.last[0] in ("put", "look") and fails(
            "one_is_enough" if goal.two and env.last[0] == "put" else "idle"):
        return "all is done", "look"
    takes = [_command(env, "take", *found) for found in seen if found[1] not in full]
    if takes:
        return f"{kind} found", min(takes)
    closed = [place for place in here if not is_accessible(game, facts, place) and place not in full]
    if closed and not fails("skip_closed"):
        return f"{kind} inside?", _command(env, "open", closed[0])
    likely = ALFWORLD_PLACEMENTS.get(kind, [])
    places = [place for place, _ in game.places if place not in full]
    action = _go_on(env, places, lambda place: (place in goal.places, *_rank(game, place, likely)))
    return f"{kind} {'elsewhere' if closed else 'missing'}", action


def _find_lamp(env, goal, held, fails):
    game = env.game
    lamps = [obj for place in _here(env) for obj in contents(game, env.facts, place) if obj in goal.lamps]
    if fails("idle" if env.last == ("examine", held) else "no_lamp"):
        return "just examine it", _command(env, "examine", held)
    kind = game.names[min(goal.lamps)].split()[0]
    if lamps:
        return f"{kind} found", _command(env, "use", lamps[0])
    likely = ALFWORLD_PLACEMENTS.get(kind, [])
    places = [place for place, _ in game.places]
    return f"{kind} missing", _go_on(env, places, lambda place: _rank(game, place, likely))


def _treat_first(env, verb, held):
    _, kind, _, _ = APPLIANCES[verb]
    appliance = min((receptacle for receptacle, _ in env.game.places if kind in env.game.types[receptacle]),
                    key=lambda receptacle: _kind_number(env.game, receptacle))
    action = _command(env, verb, held, appliance) if appliance in _here(env) else _go(env, appliance)
    return f"{verb} it first", action


def _bring(env, held, place):
    """Put what is held into a receptacle: the next move towards that."""
    kind, _ = _kind_number(env.game, place)
    if place not in _here(env):
        return f"{kind} away", _go(env, place)
    if not is_accessible(env.game, env.facts, place):
        return f"{kind} closed", _command(env, "open", place)
    return f"{kind} reached", _command(env, "put", held, place)


def _put_back(env, held):
    """Put a wrong object down: here, if possible, else in the first receptacle that holds such objects."""
    fitting = [receptacle for receptacle, _ in env.game.places if fits(env.game, held, receptacle)]
    if not fitting:
        return "keep it then", "look"
    here = _here(env)
    place = min(fitting, key=lambda receptacle: (receptacle not in here, _kind_number(env.game, receptacle)))
    return "put this back", _bring(env, held, place)[1]


def _wrong_place(game, held, goal):
    """The last receptacle by name that can hold the object, is always open and not asked for; or None."""
    return max((receptacle for receptacle, _ in game.places if fits(game, held, receptacle)
                and receptacle not in goal.places and ("openable", receptacle) not in game.static),
               key=lambda receptacle: _kind_number(game, receptacle), default=None)


def _here(env):
    """The receptacles where the agent stands."""
    return env.game.receptacles.get(place_of(env.game, env.facts), [])


def _kind_number(game, receptacle):
    """("cabinet", 2): the order of names, in which 10 comes after 9."""
    kind, _, number = game.names[receptacle].partition(" ")
    return kind, int(number or 0)


def _rank(game, receptacle, likely):
    """Sorts the kinds in `likely` first, in their order, and the others by name."""
    kind, number = _kind_number(game, receptacle)
    return likely.index(kind) if kind in likely else len(likely), kind, number


def _go_on(env, receptacles, rank):
    """Go to the first receptacle that ranks after the place here, and from the last one to the first.

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
    """The command of a possible action, in the environment's wording."""
    return next(command for command, possible in env.actions.items() if possible == action)


# ---------------------------------------------------------------------------------------------------------------------
# Search-QA
# ---------------------------------------------------------------------------------------------------------------------

# Answer with a name from the question before anything was found; search for what is asked without the name; answer with
# what a first search found although it only leads to the answer.
SEARCH_FAILURE_MODES = {"guess": 0.7, "vague_query": 0.6, "stop_early": 0.7}


def search_player(env, rng=None) -> tuple[str, str]:
    """(thought, action) in any state of a generated question; raises ValueError for an official one."""
    fails, question = failures(rng, SEARCH_FAILURE_MODES), env.question
    if not question.hops:
        raise ValueError(f"No scripted player can answer the official question {question.text!r:.60}; demonstrations "
                         "exist for generated questions only: leave data out.")
    done = _hops_done(env)
    if done == len(question.hops):
        return _finding(question), f"<answer> {question.golds[0]} </answer>"
    if done:
        name = question.hops[done][0]
        if fails("stop_early"):
            return "that must be it", f"<answer> {name} </answer>"
        return "look further", f"<search> {name} </search>"
    if fails("guess"):
        return "no need to search", f"<answer> {question.names[0]} </answer>"
    if fails("vague_query"):
        return "any page will do", f"<search> {question.relation} </search>"
    return "look it up", f"<search> {question.hops[0][0]} </search>"


def _finding(question):
    """The thought before the answer: what is asked of what, or the two numbers and which name to answer with."""
    query, texts = question.hops[-1]
    if question.task_type == "comparison":
        numbers = [re.search(r"(?:has|number) (no|\d+)", text)[1] for text in texts]
        found = ", ".join(f"{name} {number}" for name, number in zip(question.names, numbers, strict=True))
        return f"{found}: the {'first' if question.names[0] == question.golds[0] else 'second'}"
    return f"{query}: {question.relation}"


def _hops_done(env):
    """How many hops lead to what is shown now. What a later hop needs counts only if it was searched for."""
    hops = env.question.hops
    return max((done for done, (query, texts) in enumerate(hops, 1)
                if all(text in env.observation for text in texts) and (done == 1 or env.query == query)), default=0)
