"""Skill texts: read from a folder, retrieved for an episode by one of several strategies, or altered as a control.

    <folder>/general.md        shown always
    <folder>/<task type>.md    one file per task type
    <folder>/keywords.json     {task type: [word or phrase, ..]} for keyword retrieval; else the words of its name
"""

import contextlib
import copy
import itertools
import json
import math
import random
import re
import unicodedata
from pathlib import Path

from lib.program import UserError, check_regular, describe, mismatch

STRATEGIES = ("type", "keyword", "ucb", "full", "random", "none")
CONTROLS = ("shuffled", "other", "foreign")  # what --skills may be instead of a folder


class Skills(dict):
    """{task type: general text and the type's own}; asking for another type is a UserError. `retrieve` chooses by more
    than the type."""

    def __init__(self, texts, general="", files=None, words=None, how="type"):
        """texts: of each task type; general, files: what `read_skills` gives; words: what `read_keywords`
        gives; how: one of STRATEGIES."""
        super().__init__(texts)
        self.general, self.files, self.words, self.how = general, files or {}, words or {}, how
        self.tried = {}  # of ucb: {task type: {file: [times, sum of rewards]}}

    def __missing__(self, kind):
        raise UserError(f"The environment reports the task type {kind!r:.100}, which is not among its task_types "
                        f"({', '.join(self)}), so that no skills are known for it.")

    def retrieve(self, kind, task, draw):
        """The text for an episode of this task type and task. draw: a name that the random choice follows from."""
        if self.how == "keyword":  # as in the paper: all categories of which a keyword is in the task
            text = f" {bare_words(task)} "
            chosen = [name for name, words in self.words.items() if any(f" {word} " in text for word in words)]
        elif self.how == "random":
            chosen = [random.Random(f"skills {draw}").choice(sorted(self.files))]
        elif self.how == "ucb":
            chosen = [self.most_promising(kind)]
        else:
            return self[kind]
        return "\n".join([self.general, *(self.files[name] for name in chosen)])

    def most_promising(self, kind):
        """The file with the highest upper confidence bound, mean reward + sqrt(2 ln N / n), for a task type; files that
        were never tried first. The paper names no constant: sqrt(2) is that of UCB1, for rewards in [0, 1]."""
        tried = self.tried.get(kind, {})
        total = sum(times for times, _ in tried.values())

        def bound(name):
            times, rewards = tried.get(name, (0, 0))
            return math.inf if not times else rewards / times + math.sqrt(2 * math.log(total) / times)

        return max(sorted(self.files), key=lambda name: (bound(name), name == kind))

    def learn(self, kind, reward):
        """ucb: notes the reward, in [0, 1], of the episode whose text was retrieved just now."""
        entry = self.tried.setdefault(kind, {}).setdefault(self.most_promising(kind), [0, 0.0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + reward

    @contextlib.contextmanager
    def undone_on_error(self):
        """If the block, a training step, raises, forgets what was learnt in it, since the step is repeated later."""
        before = self.state_dict()
        try:
            yield
        except BaseException:
            self.load_state_dict(before)
            raise

    def state_dict(self):
        """What checkpoints keep of it."""
        return copy.deepcopy(self.tried)

    def load_state_dict(self, state):
        self.tried = state


def retrieve(skills, kind, task, draw):
    """The text for an episode from Skills, or from a plain {task type: text}."""
    return skills.retrieve(kind, task, draw) if isinstance(skills, Skills) else skills[kind]


def bare_words(text):
    """The words of a text in lower case, without what stands between them."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold()))


def contains(prompt, text):
    """Whether a decoded prompt has the whole text; spaces aside, which tokenizers may change."""
    bare = lambda some: "".join(unicodedata.normalize("NFC", some).split())
    return bare(text) in bare(prompt)


def library(folder, task_types, how, control=None):
    """A folder of skills -> Skills for these task types, retrieved by one of STRATEGIES; control: one of CONTROLS, or
    None; for foreign, folder is another environment's. Raises UserError."""
    if how == "none":
        return Skills(dict.fromkeys(task_types, ""))
    names = task_types
    if control == "foreign":
        names = sorted(path.stem for path in Path(folder).glob("*.md") if path.stem != "general")
    general, files = read_skills(folder, names)
    if control == "foreign":
        files = dict(zip(task_types, itertools.cycle(files.values())))
    if control == "shuffled":  # the same words in another order
        general, files = shuffled(general), {kind: shuffled(text) for kind, text in files.items()}
    if control == "other":  # another task type's file beside the same general.md
        if len(files) < 2:
            raise UserError("--skills other needs at least two task types: leave it out.")
        files = dict(zip(files, [*list(files.values())[1:], files[next(iter(files))]]))
    if how == "full":
        return Skills(dict.fromkeys(task_types, "\n".join([general, *files.values()])))
    texts = {kind: f"{general}\n{text}" for kind, text in files.items()}
    words = read_keywords(Path(folder) / "keywords.json", task_types) if how == "keyword" else None
    return Skills(texts, general, files, words, how)


def shuffled(text):
    words = text.split()
    return " ".join(random.Random(text).sample(words, len(words)))


def read_skills(folder, task_types):
    """A folder of general.md and a Markdown file per task type -> (general text, {task type: text}).

    Raises UserError if a file is missing or not UTF-8 text.
    """
    folder = Path(folder)

    def read(name):
        path = folder / f"{name}.md"
        if not path.is_file():
            raise UserError(f"The skills folder {folder} has no {path.name}: it needs general.md and a file for each "
                            f"of {', '.join(task_types)}.")
        try:
            return path.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not UTF-8 text that can be read: {describe(error)}") from error

    return read("general"), {kind: read(kind) for kind in task_types}


def read_keywords(path, task_types):
    """keywords.json -> {task type: its `bare_words`}; without the file, the words of each type's name. UserError."""
    if not path.exists():
        return {kind: bare_words(kind.replace("_", " ")).split() for kind in task_types}
    try:
        check_regular(path)
        words = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file that can be read: {describe(error)}") from error
    wrong = mismatch("it", words, dict.fromkeys(task_types, list)) or next(
        (f"a word of {kind!r} is {word!r}" for kind in task_types for word in words[kind]
         if not isinstance(word, str) or not bare_words(word)), None)
    if wrong:
        raise UserError(f"{path} has to hold a list of words for each task type ({wrong:.200}).")
    return {kind: list(map(bare_words, words[kind])) for kind in task_types}
