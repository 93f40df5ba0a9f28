"""Hindsight skills of OPID (arXiv 2606.26790): what a finished episode teaches, as text that a teacher prompt can show.

An analysis is one episode skill and a few step skills; the steps that have one are the critical steps. OPID asks an
external model for it. Here `by_rules` reads it off the task, the outcome and the episode's own steps, never a gold
answer; or the policy writes it, asked by `analysis_prompt` and read by `parse_analysis`. Everything is pure.
"""

import ast
import json
import re
import warnings
from itertools import islice
from typing import NamedTuple

MOST = {"webshop": 5, "alfworld": 5, "search": 2}  # step skills per episode, as in OPID's scripts


class Step(NamedTuple):
    observation: str  # as the environment gave it
    text: str  # the whole response
    action: str  # "" where the response is not in the format
    valid: bool  # whether the action did something
    value: float  # discounted return from here on, gamma 0.95, before the penalty of invalid turns


class Analysis(NamedTuple):
    episode_skill: str
    step_skills: dict  # {step from 0: one imperative sentence}


LESSONS = {  # in the words of data/skills, with which the bundled model was trained
    "query": "Search with every detail of the request, not for the bare product.",
    "price": "Compare the price with the limit before you open a product: if the first one costs too much, take the "
             "next that fits.",
    "fit": "If a product does not fit, go back.",
    "options": "Choose every option that is asked for before you buy.",
    "buy": "Buy as soon as the product fits and every option is chosen.",
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
    "memory": "Never answer from memory: search first, then answer.",
    "topic": "Search for a name that the question gives, not for its topic.",
    "both": "Search for both names at once, then compare the two numbers.",
    "hops": "What is found first only leads on. Search for the name that it gives, and answer after that.",
    "check": "Before you answer, check that what was found tells exactly what is asked.",
    "words": "Answer with the words that were found, and no more of them than needed.",
    "late": "Answer before the turns are over.",
    "invalid": "Think first, then write one action, one that is possible now.",
    "repeat": "Never repeat what changed nothing."}


def by_rules(env, task, won, steps):
    """The analysis of an episode by the rules of its environment, or None where they find nothing to say.

    env: "webshop" | "alfworld" | "search"; steps: list of Step, in order. The episode skill of a success tells the
    workflow that it followed, that of a failure the rules that it broke. A step skill stands where a rule was broken,
    in a success, too, and says what to do instead.
    """
    faults, workflow = RULES[env](task, won, steps)  # [(step, key of LESSONS, advice)], keys of LESSONS in order
    done, faulty = set(), {i for i, _, _ in faults}
    for i, step in enumerate(steps):
        if (step.observation, step.action) in done and i not in faulty and step.action:
            faults.append((i, "repeat", f"Do not repeat {quote(step.action)}: it changed nothing."))
        done.add((step.observation, step.action))
    faults.sort()
    lessons = won and workflow or [key for _, key, _ in faults]
    skill = " ".join(dict.fromkeys(LESSONS[key] for key in lessons))
    return Analysis(skill, choose(faults, MOST[env])) if skill else None


def choose(faults, most):
    """Faults in order of time -> step skills: the first fault of each kind before the others, no advice twice."""
    kinds, skills = [key for _, key, _ in faults], {}
    for i, _, advice in sorted(faults, key=lambda fault: faults.index(fault) != kinds.index(fault[1])):
        if len(skills) < most and advice not in skills.values():
            skills.setdefault(i, advice)
    return dict(sorted(skills.items()))


def quote(text):
    """Text of an episode as part of a sentence: on one line, and not longer than 80 characters."""
    return " ".join(text.split())[:80]


# ------------------------------------------------------------------------------------------------------------- WebShop

FILLER = set("""a also am an and any are as at be both buy can do find for from get has have i if in is it like looking
    make me my need now of one or please sell so that the to want well what which with would you""".split())
OPTION_NAMES = {"color", "size", "style", "scent", "flavor", "pack"}  # in a task these are never values


class Request:
    """What a task asks for: text without the price limit, details without the options, and the limit in dollars."""

    def __init__(self, task):
        self.text, _, limit = task.lower().partition(", and price lower than ")
        details = re.split(r" with (?:(?! with )[^:,]){1,40}: ", self.text)[0]
        self.details = re.sub(r"^(?:(?:i|am|need|looking|for|find|me|want|to|buy|please|get) )*", "", details)
        self.limit = dollars(limit) or float("inf")

    def lacks(self, text):
        """The words of the details that a title or a query does not have, not even in the plural."""
        have = set(re.findall(r"\w+", text))
        have |= FILLER | {re.sub("e?s$", "", word) for word in have}
        return [word for word in re.findall(r"\w+", self.details) if word not in have]

    def options(self, values):
        return [value for value in values if value and value not in OPTION_NAMES
                and re.search(rf"\b{re.escape(value)}\b", self.text)]


def dollars(text):
    """The first number in a text, or 0. Of a range of prices it is the lower end, so that none is too high wrongly."""
    found = re.search(r"\d[\d,]*(?:\.\d+)?", text, re.ASCII)
    return float(found[0].replace(",", "")) if found else 0.0


def read_page(observation):
    """({label: (title, price)} of a results page, (title, price) of a product's page or None, what it lets choose)"""
    parts = [part.strip().lower() for part in observation.split("[SEP]")]
    at = next((i for i, part in enumerate(parts) if part.startswith("price:")), 0)
    if at:
        start = parts.index("< prev") + 1 if "< prev" in parts else at
        return {}, (parts[at - 1], dollars(parts[at])), parts[start:at - 1]
    return {parts[i - 2]: (parts[i - 1], dollars(part)) for i, part in enumerate(parts)
            if i > 1 and part.startswith("$")}, None, []


def webshop(task, won, steps):
    """Faults and workflow, as in `by_rules`. Title, price and options of what was opened are held against the task."""
    request, faults, workflow, chosen = Request(task), [], [], set()
    fewest = 0  # of the details asked for, how many the best product found lacks
    for i, step in enumerate(steps):
        products, product, values = read_page(step.observation)
        verb, _, label = step.action.lower().removesuffix("]").partition("[")
        if not step.valid:
            faults.append((i, "invalid", "Click a label in brackets that the page shows."))
        elif verb == "search":
            if 2 * len(request.lacks(label)) < len(request.lacks("")):
                workflow.append("query")
            elif not won:
                faults.append((i, "query", f"Search with every detail of the request: {quote(request.details)}."))
        elif label in products:
            workflow.append("price")
            chosen, lacks = set(), {other: len(request.lacks(title)) for other, (title, price) in products.items()
                                    if price <= request.limit}
            fewest, better = min(lacks.values(), default=0), min(lacks, key=lacks.get, default="")
            if not won and lacks.get(label, fewest + 1) > fewest:
                advice = f"Take the one that fits: click[{quote(better)}]." if better else "None fits: go on to others."
                faults.append((i, "fit" if label in lacks else "price", advice))
        elif product:
            workflow += ["options"] if label in request.options(values) else []
            faults += [(i, *fault) for fault in item_faults(request, product, values, label, chosen, fewest, won)]
            chosen.add(label)
    if steps and not won and steps[-1].action != "click[buy now]":
        faults.append((len(steps) - 1, "buy", "Buy a product that fits before the turns are over."))
    return faults, workflow


def item_faults(request, product, values, label, chosen, fewest, won):
    """At most one (lesson, advice): what was due on a product's page instead of the click on a label."""
    (title, price), options = product, request.options(values)
    lacking, left = request.lacks(title), " and ".join(value for value in options if value not in chosen)
    wrong = label in values and label not in options
    if not won and (price > request.limit or len(lacking) > fewest):
        why = "costs too much" if price > request.limit else f"is not {quote(' '.join(lacking))}"
        if label not in ("< prev", "back to search"):
            yield "fit", f"This one {why}: go back and take one that fits."
    elif left and (wrong or label == "buy now"):
        yield "options", f"Choose {quote(left)} before you buy."
    elif wrong:
        yield "buy", "All is chosen: buy now."
    elif label == "buy now" and not won:
        yield "fit", "Compare every detail with the request before you buy."


# ------------------------------------------------------------------------------------------------------------ ALFWorld

TREATMENTS = {"clean": ("clean", "sinkbasin"), "heat": ("heat", "microwave"), "hot": ("heat", "microwave"),
              "cool": ("cool", "fridge")}  # how a task says it: (verb, appliance)


def alfworld(task, won, steps):
    """Faults and workflow, as in `by_rules`. Each action is held against the next sub-goal that is not met yet."""
    house, faults, done = House(task, steps), [], ""
    for i, step in enumerate(steps):
        house.update(done, step.observation)
        lesson, advice, pattern = house.next_goal() if house.kind else ("", "Choose one of the commands.", "")
        verb, done = step.action.partition(" ")[0], step.action if step.valid else ""
        if not step.valid:
            faults.append((i, "invalid", advice))
        elif not re.match(pattern, done):
            if lesson == "search" and verb not in ("go", "open"):
                lesson = "other" if verb == "take" else "wait"
            faults.append((i, lesson, advice))
    workflow = ["search", "take", house.verb or house.how or "place"] if house.kind and steps else []
    return faults, workflow


def contents(observation):
    """The receptacle that an observation looks into, and what lies there."""
    match = re.search(r"(?:On the|The) (\w+ \d+)(?:, you see| is open\. In it, you see)(.*)", observation)
    return (match[1], re.findall(r"\ba (\w+ \d+)", match[2])) if match else ("", [])


class House:
    """What the agent has seen and done so far, by its own observations and actions."""

    def __init__(self, task, steps):
        words = re.sub(r"\b(?:a|an|the|some|find|put|it|them|and)\b", " ", task.lower()).split()
        match = re.match(r"(?:(examine|look at|clean|heat|hot|cool|two) )?(\w+) (?:in|on|with|under) (\w+)",
                         " ".join(words))
        self.how, self.kind, self.target = match.groups("") if match else ("", "", "")
        self.how = "lamp" if self.how in ("examine", "look at") else self.how
        self.verb, self.appliance = TREATMENTS.get(self.how, ("", ""))
        self.here, self.held, self.sees, self.treated, self.closed, self.brought = "", "", [], set(), False, False
        self.unseen = re.findall(r"\ba (\w+ \d+)", steps[0].observation) if steps else []
        self.spots = {}  # with hindsight: where each kind of thing was seen first, now or later
        for place, things in map(contents, (step.observation for step in steps)):
            for thing in things:
                self.spots.setdefault(thing.split()[0], place)

    def update(self, action, observation):
        """action: the last one if it did something, or ""; observation: what it showed."""
        verb, thing = (re.match(r"(go to|\w+) (\w+ \d+)", action) or re.match("()()", "")).groups()
        if verb == "go to":
            self.here, self.sees, self.closed = thing, [], False
            self.unseen = [place for place in self.unseen if place != thing]
        elif verb == "take":
            self.held, self.sees = thing, [other for other in self.sees if other != thing]
        elif verb in ("put", "move"):
            self.brought |= self.how == "two" and thing.startswith(f"{self.kind} ") and self.arrived
            self.held, self.sees, self.spots[thing.split()[0]] = "", [*self.sees, thing], self.here
        elif verb and verb == self.verb:
            self.treated.add(thing)
        place, things = contents(observation)
        if place:
            self.here, self.sees = place, things
        self.closed = "is closed." in observation or self.closed and not place

    @property
    def arrived(self):
        return self.here.startswith(f"{self.target} ")

    def next_goal(self):
        """(lesson, advice, pattern of the actions that follow it)"""
        kind, target, here, held, lamp = self.kind, self.target, self.here, self.held, self.how == "lamp"
        thing = next((thing for thing in self.sees if thing.startswith(f"{kind} ")
                      and not (self.arrived and (thing in self.treated or not self.verb))), "")
        light = next((thing for thing in self.sees if thing.startswith(f"{target} ")), "")
        wanted = target if held else kind
        spot = f": go to {self.spots[wanted]}" if wanted in self.spots else ""
        goals = [  # the first that holds is the next
            (held and not held.startswith(f"{kind} "), "other", f"Put {held} down and look for the {kind}.",
             "(put|move) "),
            (thing and not held, "take", f"Take {thing} now.", f"take {kind} "),
            (self.closed and not held, "search", f"Open {here} and look inside.", "open "),
            (self.brought and not held, "two", f"Search for another {kind} and bring it to the same place.", "go|open"),
            (not held, "search", f"Search another place for the {kind}{spot}.", f"go to ({'|'.join(self.unseen)})"),
            (lamp and light, "lamp", f"Turn on the lamp: use {light}.", f"use {target} "),
            (lamp, "lamp", f"Find the {target} and turn it on{spot}.", "go |open"),
            (self.verb and held not in self.treated, self.verb, f"{self.verb.title()} the {kind} with the "
             f"{self.appliance} first.", f"{self.verb} |(go to|open|close) {self.appliance} "),
            (not self.arrived, "place", f"Bring the {kind} to the {target} and place it there.", f"go to {target} "),
            (self.closed, "place", f"Open {here} and place the {kind} there.", "open "),
            (True, "place", f"Place the {kind} in {here}.", "(put|move) ")]
        return next(goal for holds, *goal in goals if holds)


# ----------------------------------------------------------------------------------------------------------- Search-QA

def search(task, won, steps):
    """Faults and workflow, as in `by_rules`. Each search or answer is held against the question and what was found."""
    both = re.search(r"of (.{1,60}) and (.{1,60}?) (?:has|have|is|was|did)\b|, (.{1,60}?) or (.{1,60}?)\?*$", task)
    capitalised = re.findall(r"(?<=\s)[A-Z][\w.'-]*\b(?: [A-Z][\w.'-]*\b)*", task)
    last = re.findall(r"\b(\w+)(?: have)?\W*$", task)
    names = list(filter(None, both.groups())) if both else capitalised or last or ["a name that the question gives"]
    goal, found, queries, faults = quote(" and ".join(names)), "", [], []
    for i, step in enumerate(steps):
        found += step.observation.lower() if i else ""
        block = re.match(r"<(search|answer)>(.*)</", step.action, re.DOTALL)
        words = block[2].strip().lower() if block else ""
        if not step.valid or not block:
            rules = [(True, "invalid", "Think first, then write one search or one answer.")]
        elif block[1] == "search":
            named = sum(name.lower() in words for name in names)
            rules = [(words in queries, "repeat", "Search for something else than before."),
                     (both and not won and named < 2, "both", f"Search for both names at once: {goal}."),
                     (not named and words not in found, "topic", f"Search for {goal}, not for the topic."),
                     (i == len(steps) - 1, "late", "Answer now, with the words that were found.")]
            queries.append(words)
        else:
            rules = [(not queries, "memory", f"Search for {goal} first, then answer."),
                     (words not in found and words not in ("yes", "no"), "words",
                      "Answer with the words that were found."),
                     (both and not won, "both", f"Compare the two numbers of {goal} before you answer."),
                     (not won and len(queries) == 1 and re.search(r"\b(whose|that|who|only)\b", task), "hops",
                      "Search for the name that was found first, then answer."),
                     (not won, "check", "Check that what was found tells exactly what is asked.")]
        faults += [(i, lesson, advice) for holds, lesson, advice in rules if holds][:1]
    workflow = ["memory", "both" if both else "topic", *["hops"] * (len(queries) > 1), "words"] if queries else []
    return faults, workflow


RULES = {"webshop": webshop, "alfworld": alfworld, "search": search}


# ------------------------------------------------------------------------------------------------ the policy's analysis

ASK = """Here is a finished episode of an agent. Write down what to know before it is played again.
Task: {task}
Outcome: {outcome}
{steps}
Answer with one JSON object of this form and nothing else:
{{"episode_summary": "..", "episode_skill": "..", "step_skills": {{"0": ".."}}}}
episode_summary: what happened, in one or two sentences.
episode_skill: {about}.
step_skills: for at most {most} decisive steps, by their numbers, one short imperative sentence each. It says what to \
do at that step, not what was done."""


def analysis_prompt(task, won, steps, most, error=None, previous=""):
    """The user message that asks the policy to analyse an episode. Nothing of the episode is cut.

    error, previous: for a second try, what `parse_analysis` refused the first answer for, and that answer.
    """
    told = "\n".join(f"Step {i}, return {step.value:.2f}\nObservation: {step.observation}\nResponse: {step.text}"
                     for i, step in enumerate(steps))
    about = ("what worked: the rule of decision and the order of the actions" if won else
             "how to avoid the failure: the main mistake and its first signs")
    again = f"\nYour last answer could not be used: {error}. It ended in:\n{previous[-2000:]}" if error else ""
    return ASK.format(task=task, outcome="success" if won else "failure", steps=told, about=about,
                      most=min(most, len(steps))) + again


def parse_analysis(text, candidates, most):
    """The answer to `analysis_prompt` -> Analysis. Raises ValueError, whose sentence the policy can be shown.

    candidates: the step indices that may have a skill. Of all objects in the text the first with an episode_skill
    counts. Code fences and other text around it, trailing commas and Python literals are tolerated; blank skills and
    those for other keys are dropped, and the first `most` of the rest are kept.
    """
    found = next((value for value in read_objects(text) if "episode_skill" in value), None)
    if found is None:
        raise ValueError("there is no JSON object with an episode_skill")
    episode, steps = found["episode_skill"], found.get("step_skills", {})
    if not isinstance(episode, str) or not episode.strip():
        raise ValueError("episode_skill is not a text, or blank")
    if not isinstance(steps, dict):
        raise ValueError("step_skills is not an object of step numbers and texts")
    index = {str(number): number for number in candidates}
    kept = [(index[str(key).strip()], skill.strip()) for key, skill in steps.items()
            if str(key).strip() in index and isinstance(skill, str) and skill.strip()]
    return Analysis(episode.strip(), dict(kept[:most]))


def read_objects(text, tries=50):
    """Yields the JSON objects and Python dicts that begin at one of the first braces of a text, in order."""
    text = re.sub(r'("(?:[^"\\]|\\.)*"?)|,(?=\s*[}\]])', lambda match: match[1] or "", text, flags=re.DOTALL)
    for brace in islice(re.finditer("{", text), tries):
        for read in (lambda part: json.JSONDecoder().raw_decode(part)[0],
                     lambda part: ast.literal_eval(part[:part.rindex("}") + 1])):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Python warns of a text's unknown escapes
                    value = read(text[brace.start():])
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, dict):
                yield value
                break
