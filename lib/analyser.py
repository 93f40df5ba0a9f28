"""Hindsight skills of OPID (arXiv 2606.26790): what a finished episode teaches, as text that a teacher prompt can show.

An analysis of an episode is one episode skill and a few step skills: the steps that have one are the critical steps.
OPID asks an external model for it. Here `by_rules` finds it from the task, the outcome and the episode's own steps, and
never from a gold answer; or the policy writes it, asked by `analysis_prompt` and read by `parse_analysis`. The rules
speak in the words of data/skills. Everything is pure and deterministic.
"""

import ast
import json
import re
import warnings
from collections import Counter
from itertools import islice
from typing import NamedTuple

MOST = {"webshop": 5, "alfworld": 5, "search": 2}  # step skills per episode, as in OPID's scripts


class Step(NamedTuple):
    observation: str  # as the environment gave it
    text: str  # the whole response
    action: str  # "" where the response is not in the format
    valid: bool  # whether the action did something
    value: float  # discounted return from here on, before the penalty of invalid turns


class Analysis(NamedTuple):
    episode_skill: str
    step_skills: dict  # {step from 0: one imperative sentence}


class Fault(NamedTuple):
    step: int
    lesson: str  # a key of LESSONS[env]
    advice: str  # what to do at this step instead


LESSONS = {  # what to avoid in the next episode; the sentences of data/skills where there is one
    "webshop": {
        "query": "Search with every detail of the request, not for the bare product.",
        "price": "Compare the price with the limit before you open a product: if the first one costs too much, take "
                 "the next that fits.",
        "fit": "If a product does not fit, go back.",
        "options": "Choose every option that is asked for before you buy.",
        "buy": "Buy as soon as the product fits and every option is chosen.",
        "invalid": "Click only a label in brackets that the page shows.",
        "repeat": "Never repeat what changed nothing."},
    "alfworld": {
        "search": "Search place after place, likely ones first, and open what is closed.",
        "take": "Take the thing as soon as you see it.",
        "other": "Take nothing but the thing that the task names.",
        "place": "Bring it to the place that the task names, and to no other.",
        "clean": "Clean the thing at the sinkbasin first, then bring it there.",
        "heat": "Heat the thing with the microwave first, then bring it there.",
        "cool": "Cool the thing with the fridge first, then bring it there.",
        "lamp": "Take the thing, find the lamp and turn it on. To examine it alone does nothing.",
        "two": "One is not enough: after the first, search for another and bring it to the same place.",
        "wait": "Never wait: go on until the task is done.",
        "invalid": "Choose only one of the commands.",
        "repeat": "Never repeat what changed nothing."},
    "search": {
        "memory": "Never answer from memory: search first, then answer.",
        "topic": "Search for a name that the question gives, not for its topic.",
        "both": "Search for both names at once, then compare the two numbers.",
        "hops": "What is found first only leads on. Search for the name that it gives, and answer after that.",
        "check": "Before you answer, check that what was found tells exactly what is asked.",
        "words": "Answer with the words that were found, and no more of them than needed.",
        "late": "Answer before the turns are over.",
        "invalid": "Think first, then write one search or one answer.",
        "repeat": "Never repeat what changed nothing."}}


def by_rules(env, task, won, steps):
    """The analysis of an episode by the rules of its environment, or None where they find nothing to say.

    env: "webshop" | "alfworld" | "search"; steps: list of Step, in order. A success is told as the workflow that worked,
    a failure as what to avoid; a step skill stands where a rule finds a fault, in a success, too, and says what to do
    there instead.
    """
    find, workflow = RULES[env]
    faults = list(find(task, won, steps))
    named = {fault.step for fault in faults}
    faults += [fault for fault in repetitions(steps) if fault.step not in named]
    faults.sort(key=lambda fault: fault.step)
    lessons = list(dict.fromkeys(LESSONS[env][fault.lesson] for fault in faults))
    path = workflow(task, steps) if won else []
    episode_skill = f"What worked: {', then '.join(map(quote, path))}." if path else " ".join(lessons)
    return Analysis(episode_skill, choose(faults, MOST[env])) if episode_skill else None


def choose(faults, most):
    """Faults in order of time -> step skills: no advice twice, and the first fault of each kind before further ones."""
    earlier, ranked = Counter(), []
    for fault in faults:
        ranked.append((earlier[fault.lesson], fault))
        earlier[fault.lesson] += 1
    skills = {}
    for _, fault in sorted(ranked, key=lambda pair: pair[0]):
        if len(skills) < most and fault.step not in skills and fault.advice not in skills.values():
            skills[fault.step] = fault.advice
    return dict(sorted(skills.items()))


def repetitions(steps):
    """Steps that do what was done before under the same observation."""
    seen = set()
    for i, step in enumerate(steps):
        if step.action and (step.observation, step.action) in seen:
            yield Fault(i, "repeat", f"Do not repeat {quote(step.action)}: it changed nothing.")
        seen.add((step.observation, step.action))


def quote(text, most=80):
    """Text from an episode as part of a sentence: on one line, and not longer than `most`."""
    return " ".join(text.split())[:most]


# ------------------------------------------------------------------------------------------------------------- WebShop

FILLER = set("""a an and also any are as at be both buy can do find for from get has have i if in is it like looking make
    me my need now of old one or please sell shopping so that the to want wants well what which with would you""".split())
OPTION_NAMES = {"color", "size", "style", "scent", "flavor", "pack"}  # never values, where the task names values only


class Request(NamedTuple):
    words: list  # of what is asked for, without filler, options and price
    limit: float  # dollars
    options: dict  # {value: name}; empty where the task names values only
    text: str


class Page(NamedTuple):
    products: dict  # {label: (title, price)} of a results page
    title: str  # of a product's page, else ""
    price: float
    values: list  # what can be chosen on it


def read_request(task):
    text = task.lower()
    limit = re.search(r"price lower than (\d+(?:\.\d+)?)", text)
    wish = text[:limit.start()] if limit else text
    options = re.findall(r"(?:with|and) ([^:,]{1,40}): ([^,]{1,80})", wish)
    words = re.findall(r"\w+", re.split(r" with [^:,]{1,40}: ", wish)[0])
    return Request([word for word in dict.fromkeys(words) if word not in FILLER],
                   float(limit[1]) if limit else float("inf"), {value.strip(): name for name, value in options}, wish)


def read_page(observation):
    parts = [part.strip().lower() for part in observation.split("[SEP]")]
    at = next((i for i, part in enumerate(parts) if part.startswith("price:")), 0)
    if at:
        start = parts.index("< prev") + 1 if "< prev" in parts else at - 1
        return Page({}, parts[at - 1], dollars(parts[at]), parts[start:at - 1])
    return Page({parts[i - 2]: (parts[i - 1], dollars(part)) for i, part in enumerate(parts)
                 if i > 1 and part.startswith("$")}, "", 0.0, [])


def dollars(text):
    """The first number of a price: of a range its lower end, so that no price is called too high without need."""
    found = re.search(r"\d[\d,]*(?:\.\d+)?", text, re.ASCII)
    return float(found[0].replace(",", "")) if found else 0.0


def lacking(request, text):
    have = set(re.findall(r"\w+", text.lower()))
    return [word for word in request.words if word not in have]


def wanted_values(request, page):
    """{value: what the advice calls it} of the page's option values that the task asks for."""
    if request.options:
        return {value: f"{request.options[value]}: {value}" for value in page.values if value in request.options}
    return {value: value for value in page.values if value and value not in OPTION_NAMES
            and re.search(rf"\b{re.escape(value)}\b", request.text)}


def webshop_faults(task, won, steps):
    request, chosen, fewest = read_request(task), set(), 0
    for i, step in enumerate(steps):
        page, (verb, argument) = read_page(step.observation), split_action(step.action)
        if not step.valid:
            yield Fault(i, "invalid", "Click a label in brackets that the page shows.")
        elif verb == "search":
            if 3 * len(lacking(request, argument)) > len(request.words):
                yield Fault(i, "query", f"Search with every detail of the request: {quote(' '.join(request.words))}.")
        elif argument in page.products:
            chosen = set()
            fitting = {label: len(lacking(request, title)) for label, (title, price) in page.products.items()
                       if price <= request.limit}
            fewest = min(fitting.values(), default=0)
            if not won:
                yield from choice_fault(i, request, page.products[argument], argument, fitting)
        elif page.title:
            yield from item_fault(i, request, page, argument, chosen, fewest, won)
            chosen.add(argument)
    if steps and not won and steps[-1].action != "click[buy now]":
        yield Fault(len(steps) - 1, "buy", "Buy a product that fits before the turns are over.")


def choice_fault(i, request, product, label, fitting):
    """A product opened that costs too much, or that lacks more details than another one on the page."""
    title, price = product
    if label in fitting and fitting[label] <= min(fitting.values()):
        return
    better = min(fitting, key=fitting.get, default=None)
    advice = f"take the one that fits: click[{quote(better)}]" if better else "go on to others: none of these fits"
    if price > request.limit:
        yield Fault(i, "price", f"{quote(label)} costs more than {request.limit:g} dollars: {advice}.")
    else:
        yield Fault(i, "fit", f"{quote(label)} is not {quote(' '.join(lacking(request, title)))}: {advice}.")


def item_fault(i, request, page, argument, chosen, fewest, won):
    """On a product's page: what should have been done before, or instead of, the click that was made."""
    missing = lacking(request, page.title)
    leaving = argument in ("< prev", "back to search")
    unchosen = [name for value, name in wanted_values(request, page).items() if value not in chosen]
    if not won and (page.price > request.limit or len(missing) > fewest):
        why = (f"It costs more than {request.limit:g} dollars" if page.price > request.limit
               else f"It is not {quote(' '.join(missing))}")
        if not leaving:
            yield Fault(i, "fit", f"{why}: go back and take one that fits.")
    elif argument == "buy now" and unchosen:
        yield Fault(i, "options", f"Choose {quote(' and '.join(unchosen))} before you buy.")
    elif argument == "buy now" and not won:
        yield Fault(i, "fit", "Check every detail of the request before you buy: if the product does not fit, go back.")
    elif leaving and not missing or argument in page.values and argument not in wanted_values(request, page):
        yield (Fault(i, "options", f"It fits: choose {quote(' and '.join(unchosen))}.") if unchosen else
               Fault(i, "buy", "All is chosen: buy now."))


def split_action(action):
    """"click[red]" -> ("click", "red")"""
    verb, _, argument = action.partition("[")
    return verb, argument.removesuffix("]").lower()


def webshop_path(task, steps):
    """The last search and what was opened and chosen from there, without products that were left again."""
    wanted, path = read_request(task), []
    for step in steps:
        page, (verb, argument) = read_page(step.observation), split_action(step.action)
        if step.valid and verb == "search":
            path = [step.action]
        elif step.valid and (argument in page.products or argument == "next >"):
            path = [action for action in path if action.startswith(("search", "click[next"))] + [step.action]
        elif step.valid and (argument == "buy now" or argument in wanted_values(wanted, page)):
            path.append(step.action)
    return path


# ------------------------------------------------------------------------------------------------------------ ALFWorld

TREATMENTS = {"clean": ("clean", "sinkbasin"), "heat": ("heat", "microwave"), "hot": ("heat", "microwave"),
              "cool": ("cool", "fridge")}


class House:
    """What the agent has seen and done so far, read from its own observations and actions."""

    def __init__(self, task, steps):
        text = " ".join(re.sub(r"\b(?:a|an|the|some|find|put|it|them|and)\b", " ", task.lower()).split())
        match = re.match(r"(?:(examine|look at|clean|heat|hot|cool|two) )?(\w+) (?:in|on|with|under) (\w+)", text)
        self.how, self.kind, self.target = match.groups() if match else ("", "", "")
        self.verb, self.appliance = TREATMENTS.get(self.how, ("", ""))
        self.here, self.held, self.sees, self.closed, self.brought = "", "", [], False, False
        self.treated, self.places, self.spots = set(), [], {}
        for step in steps:  # hindsight: where each kind was first seen, whenever that was
            place, things = contents(step.observation)
            for thing in things:
                self.spots.setdefault(thing.split()[0], place)

    def observe(self, observation):
        place, things = contents(observation)
        if place:
            self.here, self.sees, self.closed = place, things, False
        self.closed = self.closed or "is closed." in observation
        if not self.places:
            self.places = re.findall(r"\ba (\w+ \d+)", observation)

    def act(self, action):
        words = action.split()
        thing = " ".join(words[1:3])
        if action.startswith("go to "):
            self.here, self.sees, self.closed = action[len("go to "):], [], False
            self.places = [place for place in self.places if place != self.here]
        elif words[0] == "take":
            self.held, self.sees = thing, [other for other in self.sees if other != thing]
        elif words[0] in ("put", "move"):
            self.brought |= is_a(thing, self.kind) and is_a(self.here, self.target)
            self.held, self.sees = "", [*self.sees, thing]
        elif words[0] == self.verb:
            self.treated.add(thing)

    def there(self, thing):
        """Whether a thing lies where the task wants it."""
        return is_a(self.here, self.target) and (not self.verb or thing in self.treated)

    def next_goal(self):
        """(lesson, advice, pattern of the actions that follow it)"""
        if self.held and not is_a(self.held, self.kind):
            return "other", f"Put {self.held} down and look for the {self.kind}.", "put |move "
        if not self.held:
            return self.next_search()
        if self.how in ("examine", "look at"):
            lamp = next((thing for thing in self.sees if is_a(thing, self.target)), None)
            if lamp:
                return "lamp", f"Turn on the lamp: use {lamp}.", f"use {lamp}"
            return "lamp", f"Find the {self.target} and turn it on{self.spot(self.target)}.", "go to |open "
        if self.verb and self.held not in self.treated:
            return (self.verb, f"{self.verb.capitalize()} the {self.kind} with the {self.appliance} first.",
                    f"{self.verb} |(go to|open|close) {self.appliance}")
        if not is_a(self.here, self.target):
            return "place", f"Bring the {self.kind} to the {self.target} and place it there.", f"go to {self.target} "
        if self.closed:
            return "place", f"Open {self.here} and place the {self.kind} there.", "open "
        return "place", f"Place the {self.kind} in {self.here}.", "put |move "

    def next_search(self):
        seen = [thing for thing in self.sees if is_a(thing, self.kind) and not self.there(thing)]
        if seen:
            return "take", f"Take {seen[0]} as soon as you see it.", f"take {self.kind} "
        if self.closed:
            return "search", f"Open {self.here} and look inside.", "open "
        if self.how == "two" and self.brought:
            return "two", f"Search for another {self.kind} and bring it to the same place.", "go to |open "
        advice = f"Search for the {self.kind} in a place that you have not seen{self.spot(self.kind)}."
        return "search", advice, f"go to ({'|'.join(self.places)})$" if self.places else "go to |open "

    def spot(self, kind):
        return f": it is at {self.spots[kind]}" if kind in self.spots else ""


def is_a(thing, kind):
    return thing.partition(" ")[0] == kind


def contents(observation):
    """The receptacle that an observation looks into, and what lies there."""
    match = re.search(r"(?:On the|The) (\w+ \d+)(?:, you see| is open\. In it, you see)(.*)", observation)
    return (match[1], re.findall(r"\ba (\w+ \d+)", match[2])) if match else ("", [])


def alfworld_faults(task, won, steps):
    house = House(task, steps)
    for i, step in enumerate(steps):
        house.observe(step.observation)
        lesson, advice, pattern = house.next_goal() if house.kind else ("", "", "")
        if not step.valid:
            yield Fault(i, "invalid", advice or "Choose one of the commands.")
            continue
        if not re.match(pattern, step.action):
            if lesson == "search" and not step.action.startswith(("go", "open")):
                lesson = "other" if step.action.startswith("take ") else "wait"
            yield Fault(i, lesson, advice)
        house.act(step.action)


def alfworld_path(task, steps):
    """What was done to the thing and the lamp, and the way to each of these actions."""
    house, path, way = House(task, []), [], []
    for step in steps:
        verb = step.action.partition(" ")[0]
        if step.valid and verb == "go":
            way = [step.action]
        elif step.valid and verb == "open":
            way.append(step.action)
        elif step.valid and re.match(rf"\w+ ({house.kind}|{house.target}) ", step.action) and verb != "examine":
            path, way = [*path, *way, step.action], []
    return path


# ----------------------------------------------------------------------------------------------------------- Search-QA

def search_faults(task, won, steps):
    sides = re.search(r"of (.+) and (.+?) (?:has|have|is|was|did)\b|, (.+?) or (.+?)\?*$", task)
    names = [side for side in sides.groups() if side] if sides else asked_names(task, steps)
    goal = " and ".join(names) or "a name that the question gives"
    found, queries = "", []
    for i, step in enumerate(steps):
        found += step.observation.lower() if i else ""
        kind, words = read_block(step.action)
        if not step.valid or not kind:
            yield Fault(i, "invalid", "Think first, then write one search or one answer.")
        elif kind == "search":
            if words in queries:
                yield Fault(i, "repeat", f"Search for something else than {quote(words)}, which you have searched for.")
            elif sides and not all(name.lower() in words for name in names):
                yield Fault(i, "both", f"Search for both names at once: {quote(goal)}.")
            elif not any(name.lower() in words for name in names) and not any(title in words for title in titles(found)):
                yield Fault(i, "topic", f"Search for {quote(goal)}, not for the topic.")
            queries.append(words)
        elif not queries:
            yield Fault(i, "memory", f"Do not answer from memory: search for {quote(goal)} first.")
        elif words not in found and words not in ("yes", "no"):
            yield Fault(i, "words", "Answer with the words that were found.")
        elif not won and sides:
            yield Fault(i, "both", f"Compare the two numbers of {quote(goal)} before you answer.")
        elif not won and len(queries) == 1 and re.search(r"\b(whose|that|who|only)\b", task):
            yield Fault(i, "hops", "Search for the name that was found first, then answer.")
        elif not won:
            yield Fault(i, "check", "Check that what was found tells exactly what is asked.")
    if steps and not won and read_block(steps[-1].action)[0] == "search":
        yield Fault(len(steps) - 1, "late", "Answer now, with the words that were found.")


def asked_names(task, steps):
    """The names in a question: capitalised words after the first, or what a passage found is about."""
    names = re.findall(r"(?<=\s)[A-Z][\w.'-]*\b(?: [A-Z][\w.'-]*\b)*", task)
    about = [title for step in steps for title in titles(step.observation) if re.search(rf"\b{re.escape(title)}\b", task)]
    return names or about or [words for kind, words in map(read_block, [step.action for step in steps])
                              if kind == "answer" and words in task.lower()]


def titles(text):
    r"""The titles of passages in an observation, lower-cased: Doc 1: \"Title\"\n..."""
    return [title.lower() for title in re.findall(r'doc \d+: \\"(.{1,100}?)\\"', text, re.IGNORECASE)]


def read_block(action):
    match = re.match(r"<(search|answer)>(.*)</", action, re.DOTALL)
    return (match[1], match[2].strip().lower()) if match else ("", "")


def search_path(task, steps):
    blocks = [read_block(step.action) for step in steps if step.valid]
    return [f"search for {words}" for words in dict.fromkeys(words for kind, words in blocks if kind == "search")]


RULES = {"webshop": (webshop_faults, webshop_path), "alfworld": (alfworld_faults, alfworld_path),
         "search": (search_faults, search_path)}


# ------------------------------------------------------------------------------------------------ the policy's analysis

def analysis_prompt(task, won, steps, most, error=None, previous=""):
    """The user message that asks the policy for the analysis of an episode, as a JSON object.

    error, previous: what was wrong with an answer that `parse_analysis` refused, and that answer, for a second try.
    """
    told = [f"Step {i}, return {step.value:.2f}\nObservation: {step.observation.strip()}\nResponse: {step.text.strip()}"
            for i, step in enumerate(steps)]
    about = ("the workflow that worked: its decision rules and the order of its actions" if won else
             "rules that avoid this failure: the main mistake, and by which signs it can be seen early")
    retry = [] if error is None else [f"Your last answer could not be used: {error}", "It ended in:", previous[-2000:]]
    return "\n".join([
        "Here is a finished episode of an agent. Write down what to know before playing it again.", f"Task: {task}",
        f"Outcome: {'success' if won else 'failure'}", *told, "Answer with one JSON object and nothing else:",
        '{"episode_summary": "..", "episode_skill": "..", "step_skills": {"0": ".."}}',
        "episode_summary: what happened, in one or two sentences.", f"episode_skill: {about}.",
        f"step_skills: for at most {min(most, len(steps))} decisive steps, by their numbers from 0 to {len(steps) - 1}, "
        "one short imperative sentence each. It advises the agent at that step, in words that can be followed there; "
        "it does not look back.", *retry])


def parse_analysis(text, candidates, most):
    """The answer to `analysis_prompt` -> Analysis. Raises ValueError, whose sentence can be shown to the policy.

    candidates: the step indices that may have a skill. Of the objects in the text the first with an episode_skill
    counts. Code fences, text around, trailing commas and Python literals are tolerated; skills that are blank or for
    other keys are dropped, and only the first `most` are kept.
    """
    found = next((value for value in map(read_object, islice(objects(text), 50)) if "episode_skill" in value), None)
    if found is None:
        raise ValueError("the answer holds no JSON object with an episode_skill")
    episode, steps = found["episode_skill"], found.get("step_skills", {})
    if not isinstance(episode, str) or not episode.strip():
        raise ValueError("episode_skill must be a text that is not blank")
    if not isinstance(steps, dict):
        raise ValueError("step_skills must be an object from step numbers to texts")
    index = {str(number): number for number in candidates}
    kept = [(index[str(key).strip()], value.strip()) for key, value in steps.items()
            if str(key).strip() in index and isinstance(value, str) and value.strip()]
    return Analysis(episode.strip(), dict(kept[:most]))


def objects(text):
    """Yields what stands between each { and its }, outer ones first."""
    open_at, spans = [], []
    for token in re.finditer(r"""[{}]|(?<=[{\[:,\s])("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""", text, re.DOTALL):
        if token[0] == "{":
            open_at.append(token.start())
        elif token[0] == "}" and open_at:
            spans.append((open_at.pop(), token.end()))
    return (text[start:end] for start, end in sorted(spans))


def read_object(text):
    """A JSON object, without its trailing commas, or a Python dict; {} if it is neither."""
    strings_or_commas = r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])'
    plain = re.sub(strings_or_commas, lambda match: match[1] or "", text, flags=re.DOTALL)
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
                value = read(plain if read is json.loads else text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return value
    return {}
