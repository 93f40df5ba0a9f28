"""Tasks: what an environment is reset to, which make the evaluation set, and what is expected of an environment.

Whatever an environment does wrong is one sentence that names the task: it raises, exits, hangs, moves to another folder
or answers with something else than gymnasium's tuples.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import threading
from collections import defaultdict
from numbers import Real
from typing import NamedTuple

import numpy as np

from lib.program import UserError, describe

TRUTH = (bool, np.bool_)
INFO = {"task": str, "task_type": str, "admissible": (list, tuple, type(None)), "valid": TRUTH, "won": TRUTH,
        "score": Real}  # what rollouts read of an environment's info, and its types
NAMES = {str: "str", TRUTH: "bool", Real: "float", INFO["admissible"]: "list or None"}


class Task(NamedTuple):
    """What an environment is reset to; episodes of one group are compared with each other."""

    split: str
    task_id: int
    group: int


# ------------------------------------------------------------------------------------------------- the evaluation set

def stratified(types, count):
    """The task types of a split's tasks -> the numbers of `count` of them, ascending, always the same.

    Every type gets its share of the count, rounded by largest remainders, and at least one task if there is room.
    """
    members = defaultdict(list)
    for number, kind in enumerate(types):
        members[kind].append(number)
    exact = {kind: count * len(numbers) / len(types) for kind, numbers in sorted(members.items())}
    share = {kind: max(int(value), int(count >= len(members))) for kind, value in exact.items()}
    while sum(share.values()) != count:  # one more for the type that is furthest below its share, or one less
        step = 1 if sum(share.values()) < count else -1
        able = [kind for kind in exact if 0 < share[kind] + step <= len(members[kind])]
        share[max(able, key=lambda kind: step * (exact[kind] - share[kind]))] += step
    draw = random.Random("evaluation set")
    return sorted(number for kind, size in share.items() for number in draw.sample(members[kind], size))


def types_of(env, split):
    """The task type of each of a split's tasks; "" for all where an environment can only count them."""
    if hasattr(env, "types_of"):
        types = listed(lambda split: list(env.types_of(split)), split)
        if not all(isinstance(kind, str) for kind in types):
            raise UserError(f"The tasks of split {split!r} cannot be listed: types_of gives {types!r:.100} instead of "
                            "texts.")
        return types
    return [""] * count_tasks(env, split)


def count_tasks(env, split):
    """The number of a split's tasks."""
    return listed(env.num_tasks, split) if hasattr(env, "num_tasks") else len(types_of(env, split))


def listed(call, split):
    """call(split). Raises UserError for whatever the environment raises, as for a split that it does not have."""
    try:
        return call(split)
    except (Exception, SystemExit) as error:
        raise UserError(f"The tasks of split {split!r} cannot be listed: {describe(error)}") from error


def evaluation_set_hash(env, tasks, seconds=0.0):
    """SHA-256 (hex) over split, id, instruction and goal of every task: equal exactly if the tasks are.

    Resets env to each task. The goal is env.goal, or None where the environment has no such attribute.
    """
    entries = []
    for task in tasks:
        _, info = reset_env(env, task, seconds)
        entries.append([task.split, task.task_id, info["task"], getattr(env, "goal", None)])
    return hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --------------------------------------------------------------------------------------------- calls of an environment

def guard(task, doing, call, *args, seconds=0.0, **kwargs):
    """call(*args, **kwargs), with a UserError that names task and deed for whatever an environment does wrong.

    seconds: after which a call is given up; 0 never. Works in the main thread of systems that have alarms.
    """
    folder = working_folder()
    try:
        with alarm(seconds):
            result = call(*args, **kwargs)
        if working_folder() != folder:
            raise BadAnswer(f"it changed the working directory to {working_folder()}, where nothing would be found")
        return result
    except (Exception, SystemExit, GeneratorExit, NoAnswer) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"The environment failed on task {task.task_id} of split {task.split!r} ({doing}): "
                        f"{describe(error)}") from error
    finally:
        if folder and working_folder() != folder:
            os.chdir(folder)


def working_folder():
    """None where it has been deleted."""
    with contextlib.suppress(OSError):
        return os.getcwd()


@contextlib.contextmanager
def alarm(seconds):
    """Raises NoAnswer in the block after so many seconds, and each second after that, should the block catch it."""
    if not seconds or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise NoAnswer(f"no answer within --env_timeout {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class NoAnswer(BaseException):
    """Not an Exception, which an environment that tries again may catch."""


class BadAnswer(ValueError):
    """An environment's answer that is not what gymnasium and this program expect."""


def reset_env(env, task, seconds=0.0):
    """-> (observation, info) at the start of a task, checked."""
    def call():
        return checked(env.reset(options={"split": task.split, "task_id": task.task_id}), 2)

    return guard(task, "reset", call, seconds=seconds)


def step_env(env, task, action, turn, seconds=0.0):
    """-> (observation, reward, terminated, truncated, info) after an action, checked; turn: its number, for errors."""
    return guard(task, f"action {action!r:.200} in turn {turn}", lambda: checked(env.step(action), 5), seconds=seconds)


def checked(answer, size):
    """The answer of reset (size 2) or step (5). Raises BadAnswer if it is something else."""
    if not isinstance(answer, tuple) or len(answer) != size:
        raise BadAnswer(f"it returned {answer!r:.100} instead of a tuple of {size} values")
    observation, *middle, info = answer
    if not isinstance(observation, str) or not isinstance(info, dict):
        raise BadAnswer(f"observation and info are {type(observation).__name__} and {type(info).__name__} instead of "
                        "str and dict")
    for name, kind in INFO.items():
        if name not in info:
            raise BadAnswer(f"its info has no {name!r}")
        if not isinstance(info[name], kind):
            raise BadAnswer(f"info[{name!r}] is {info[name]!r:.100}, which is not of type {NAMES[kind]}")
    if not all(isinstance(action, str) for action in info["admissible"] or ()):
        raise BadAnswer(f"info['admissible'] is {info['admissible']!r:.100} instead of texts")
    if not isinstance(info.get("teacher_prompt", ""), (str, type(None))):
        raise BadAnswer(f"info['teacher_prompt'] is {info['teacher_prompt']!r:.100} instead of a text")
    if not isinstance(info.get("retriever_errors", 0), int):
        raise BadAnswer(f"info['retriever_errors'] is {info['retriever_errors']!r:.100} instead of a whole number")
    reward, *ended = middle or [0.0]
    for name, value in {"score": info["score"], "reward": reward}.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise BadAnswer(f"the {name} is {value!r:.100} instead of a finite number")
    if not all(isinstance(value, TRUTH) for value in ended):
        raise BadAnswer(f"terminated and truncated are {ended!r:.100} instead of two truth values")
    return answer
