"""Episodes as files and as text in the terminal: what the agent was shown, what it said, and what came of it.

A file has a JSON line per episode: split, task_id, task_type, task, won, score, done, `skills` (the text that the
teacher saw, or that the student saw in an evaluation with skills), and turns: the prompt as the model saw it, the
observation in it, text, action, valid, stop, tokens and their logp. Those of a training step also have advantage,
`skills` where they are not the episode's (hindsight) and, with a teacher, the gap and gate of each token; those of a
step whose file stays have the likeliest tokens, too, the most likely first:
"top": {"student": [[[token, log-prob], ..] of each token], "teacher": likewise}.
"""

import json
import math
import re
import shlex
from pathlib import Path

import torch

from lib.program import UserError, check_regular, describe, is_of_kind, mismatch, to_json

EPISODE = {"task": str, "won": (bool, int), "score": (int, float), "turns": list}  # what is printed of an episode
TURN = {"observation": str, "text": str, "valid": bool, "stop": str}
RARE = math.log(0.001)  # a file keeps no alternative that is less likely


def episode_lines(chat, readable, episodes, *, skills=None, rows=(), gaps=(), **more):
    """Yields each episode as a JSON line.

    readable: (observation, admissible) -> the observation as prompts have it. skills: what a student saw that is not
    being trained, a function of the episode, or None. rows: those of all turns in order, or none, with what `note_top`
    has noted; gaps: {row: (gap, gate)}, lists per token. more: what else is to be noted.
    """
    rows = iter(rows)
    for episode in episodes:
        own = [next(rows, None) for _ in episode.turns]
        text = own[0].skills if own[0] else skills(episode) if skills else ""
        turns = [turn_entry(chat, readable, turn, row, gaps, text) for turn, row in zip(episode.turns, own)]
        whole = {"split": episode.task.split, "task_id": episode.task.task_id, "task_type": episode.task_type,
                 "task": episode.turns[0].context.task, "won": episode.won, "score": episode.score,
                 "done": episode.done, "skills": text, "turns": turns}
        yield to_json(more | whole) + "\n"  # in ASCII: a lone surrogate could not be written otherwise


def turn_entry(chat, readable, turn, row, gaps, skills):
    observation = readable(turn.context.observation, turn.context.admissible)
    entry = {"prompt": chat.tokenizer.decode(turn.prompt_ids), "observation": observation, "text": turn.text,
             "action": turn.action, "valid": bool(turn.valid), "stop": turn.response.stop,
             "tokens": chat.tokenizer.convert_ids_to_tokens(list(turn.response.ids)),
             "logp": [round(x, 4) for x in turn.response.logp]}
    if row is not None:
        entry["advantage"] = row.advantage
        if row.skills != skills:
            entry["skills"] = row.skills
    if row in gaps:
        gap, gate = gaps[row]
        entry |= {"gap": [round(x, 4) for x in gap], "gate": [round(x, 4) for x in gate]}
    if row is not None and row.top:
        entry["top"] = {side: named(chat, *found) for side, found in row.top.items()}
    return entry


def named(chat, ids, logps):
    """The likeliest tokens as a file has them: [[token, log-prob], ..] for each token, the rare ones left out."""
    name = chat.tokenizer.convert_ids_to_tokens
    return [[[name(i), round(logp, 4)] for i, logp in zip(*some) if logp >= RARE] for some in zip(ids, logps)]


def note_top(side, rows, hidden, weight, temperature):
    """Notes the likeliest tokens of each row in row.top[side]: (ids, log-probs), lists of k per token. hidden [N, D]:
    what predicts the tokens of the rows' responses, row by row; weight [V, D]."""
    lengths = [len(row.response_ids) for row in rows]
    top = top_tokens(hidden, weight, temperature=temperature)
    for row, ids, logp in zip(rows, *(values.cpu().split(lengths) for values in top)):
        row.top[side] = ids.tolist(), logp.tolist()


@torch.no_grad()
def top_tokens(hidden, weight, *, temperature=1.0, k=3, most_logits=2**24):
    """The k likeliest next tokens under softmax(hidden @ weight.T / temperature), the most likely first.

    hidden [N, D], weight [V, D] -> (ids [N, k] int64, log-probs [N, k] fp32); k is at most V. The logits are computed
    for as many rows at a time as have `most_logits` of them, so that [N, V] is never built.
    """
    found = []
    for rows in hidden.split(max(1, most_logits // len(weight))):
        logits = (rows @ weight.T).float() / temperature  # [rows, V]
        values, ids = logits.topk(min(k, len(weight)))
        found.append((ids, values - logits.logsumexp(-1, keepdim=True)))
    ids, logp = map(torch.cat, zip(*found))
    return ids, logp


# ------------------------------------------------------------------------------------------------------ in a run folder

def step_file(run, step):
    return Path(run) / "episodes" / f"step-{step:05d}.jsonl"


def steps_written(run):
    """The steps whose episodes are in a run folder, ascending."""
    names = (re.fullmatch(r"step-(\d+)\.jsonl", path.name) for path in (Path(run) / "episodes").glob("step-*.jsonl"))
    return sorted(int(name[1]) for name in names if name)


def stays(step, every):
    """Whether the file of a step, 1, 2, .., stays: that of the first and of every so many; the last step's does too."""
    return (step - 1) % every == 0


def write_step(run, step, every, lines):
    """Writes the episodes of a step, and removes those of the step before unless they stay."""
    path = step_file(run, step)
    path.parent.mkdir(exist_ok=True)
    check_regular(path, "move it away")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)
    if step > 1 and not stays(step - 1, every):  # it was there as the last only
        step_file(run, step - 1).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- printing

def episodes_beside(result):
    """The file with the episodes of a result of eval.py."""
    return result.with_name(f"{result.stem}-episodes.jsonl")


def find_episodes(source, step=None, flag="--show"):
    """A run folder, a result of eval.py or a file of episodes -> the file. Raises UserError, which says what else to
    give to the flag of eval.py, if there is none."""
    path = Path(source)
    if path.is_dir():
        steps = steps_written(path)
        if not steps:
            raise UserError(f"{path} holds no episodes: {other_place(path, flag)}.")
        if step is not None and step not in steps:
            raise UserError(f"{path} holds no episodes of step {step}; it has those of {', '.join(map(str, steps))}.")
        return step_file(path, steps[-1] if step is None else step)
    if step is not None:
        raise UserError(f"--step goes with a run folder, and {path} is a file: leave it out.")
    if path.suffix != ".json":
        return path
    if not episodes_beside(path).exists():
        raise UserError(f"There is no {episodes_beside(path).name} beside {path}: {other_place(path, flag)}.")
    return episodes_beside(path)


def other_place(path, flag):
    """Where episodes are that `path`, a folder or file without any, may have been given for, in words."""
    if (path / "eval.json").is_file():
        return f"give its result, {flag} {shlex.quote(str(path / 'eval.json'))}"
    run = path.absolute().parent if steps_written(path.absolute().parent) else "RUN"
    return f"give a run folder, {flag} {shlex.quote(str(run))}, or a result of eval.py"


def read_episodes(path):
    """Yields the episodes of a file. Raises UserError if it cannot be read, or a line is not an episode."""
    try:
        check_regular(path)
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    episode = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {describe(error)}") from error
                wrong = what_is_wrong(number, episode)
                if wrong:
                    raise ValueError(wrong)
                yield number, episode
    except OSError as error:
        raise UserError(f"The episodes in {path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a file of episodes: {describe(error)}") from error


def what_is_wrong(number, episode):
    """Why a JSON value is not an episode that can be shown, a clause, or None."""
    wrong = mismatch(f"episode {number}", episode, EPISODE)
    for count, turn in enumerate([] if wrong else episode["turns"], 1):
        what = f"turn {count} of episode {number}"
        wrong = wrong or mismatch(what, turn, TURN) or wrong_tokens(what, turn)
    return wrong


def wrong_tokens(what, turn):
    """Which of a turn's lists per token, all of which may be absent, is not one, a clause, or None."""
    def is_pair(pair):
        return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and is_number(pair[1])

    is_number = lambda x: is_of_kind(x, (int, float))
    top = turn.get("top", {})
    if not isinstance(top, dict):
        return f"top of {what} is {top!r}"[:200]
    kinds = {"tokens": lambda x: isinstance(x, str), "logp": is_number, "gap": is_number, "gate": is_number,
             "student": lambda some: isinstance(some, list) and all(map(is_pair, some))}
    kinds["teacher"] = kinds["student"]
    for key, fits in kinds.items():
        values = (top if key in ("student", "teacher") else turn).get(key, [])
        if not isinstance(values, list) or not all(map(fits, values)):
            return f"{key} of {what} is {values!r}"[:200]
        if values and len(values) != len(turn.get("tokens", values)):
            return f"{key} of {what} has {len(values)} entries for {len(turn['tokens'])} tokens"


def episode_text(number, episode):
    """An episode turn by turn, to be printed."""
    outcome = "won" if episode["won"] else "lost" if episode.get("done") else "lost, out of turns"
    lines = [f"--- episode {number}: task {episode.get('task_id')} of {episode.get('split')}, "
             f"{episode.get('task_type')}: {outcome}, score {episode['score']:g}"
             + (f", {episode['condition']} skills" if "condition" in episode else ""), f"task: {episode['task']}"]
    for count, turn in enumerate(episode["turns"], 1):
        flaws = ["invalid"] * (not turn["valid"]) + ["cut off at the limit"] * (turn["stop"] == "length")
        gap = turn.get("gap")
        lines += [f"\n[{count}] {turn['observation']}",
                  f"  > {turn['text']}" + (f"   ({', '.join(flaws)})" if flaws else "")
                  + (f"   (mean gap {sum(gap) / len(gap):+.3f})" if gap else "")]
    return "\n".join(lines) + "\n"


def show(source, step=None, lost=False):
    """Prints the episodes of a file, or the lost ones alone."""
    for number, episode in read_episodes(find_episodes(source, step)):
        if not (lost and episode["won"]):
            print(episode_text(number, episode))
