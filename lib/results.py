"""Results of eval.py: files written, read and checked; outcomes summarised, compared and printed.

An outcome is a dict per episode (OUTCOME); several may be of one task, which then count as one in all intervals.
"""

import json
import math
import shlex
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.checkpoints import checkpoints
from lib.episodes import episodes_beside
from lib.folders import is_run
from lib.program import UserError, check_regular, mismatch, to_json, write_atomically
from lib.runs import method_name
from lib.statistics import (
    cluster_bootstrap,
    cluster_difference,
    mcnemar,
    pass_at_k,
    pass_hat_k,
    sample_size,
    sign_flip_p,
    wilson,
)

CONDITIONS = {"without": "without skills", "with": "with skills in the prompt"}
FORMAT = "sdar eval 2"  # marks result files
PARTS = {"model": str, "evaluation_set": str, "conditions": list, "sampling": dict, "config": dict, "summary": dict,
         "outcomes": dict}
# What is used of "run", the training behind the model; it may be absent, and in it the analyser.
RUN = {"method": str, "seed": int, "step": int, "analyser": str}
SAMPLING_KINDS = {"split": str, "tasks": int, "repeats": int, "seed": int, "temperature": (int, float)}
OUTCOME = {"task_id": int, "task_type": str, "won": (bool, int), "score": (int, float), "turns": int, "invalid": int,
           "done": (bool, int)}  # of an episode


def write_result(out, result, lines):
    """Writes a result and the lines of the file of episodes beside it; where that fails, both stay as they were.
    Raises UserError."""
    try:
        write_atomically({episodes_beside(out): "".join(lines), out: to_json(result, indent=1)})
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another file with --out.") from error


def result_path(path):
    """A result file, a checkpoint or a run folder, of which the last evaluated checkpoint counts -> its result file.
    Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        return path
    candidates = checkpoints(path) if is_run(path) else [path]
    found = [folder / "eval.json" for folder in candidates if (folder / "eval.json").is_file()]
    if not found:
        last = candidates[-1] if candidates else "MODEL"
        raise UserError(f"{path} holds no result (eval.json): python eval.py {shlex.quote(str(last))} makes one.")
    return found[-1]


def read_result(path):
    """A result file -> dict. Raises UserError if it cannot be read or this program did not write it."""
    try:
        check_regular(Path(path))
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The result file {path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file, so not a result of eval.py ({error}).") from error
    wrong = what_is_wrong(result)
    if wrong:
        raise UserError(f"{path} was not written by this version of eval.py ({wrong}).")
    return result


def what_is_wrong(result):
    """Why a JSON value is not a result, a clause, or None."""
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        return f"format {FORMAT!r}"
    checks = [("it", result, PARTS)]
    if not mismatch("it", result, PARTS):
        checks += [("sampling", result["sampling"], SAMPLING_KINDS), ("config", result["config"], {"env": str})]
        checks += [("run", result["run"], RUN, ("analyser",))] if result.get("run") is not None else []
        conditions = result["conditions"]
        if not conditions or conditions != [name for name in CONDITIONS if name in conditions]:
            return f"conditions {conditions!r:.100}"
        for name in conditions:
            outcomes = result["outcomes"].get(name)
            if not isinstance(outcomes, list) or not outcomes:
                return f"no outcomes of condition {name!r}"
            checks += [(f"outcome {number} of {name!r}", outcome, OUTCOME) for number, outcome in enumerate(outcomes)]
    return next((found for check in checks if (found := mismatch(*check))), None)


# ------------------------------------------------------------------------------------------------------------ summaries

def by_task(outcomes, key):
    """Outcomes -> the mean of outcome[key] of each task [tasks], in the order of task ids; `won` counts as 0 or 1."""
    values = defaultdict(list)
    for outcome in outcomes:
        values[outcome["task_id"]].append(bool(outcome[key]) if key == "won" else outcome[key])
    return np.array([np.mean(values[task_id]) for task_id in sorted(values)])


def estimate(seeds, key):
    """Mean of outcome[key] over `seeds`, outcomes on the same tasks for each training seed, and its 95 % interval ->
    (mean, (low, high)).

    Wilson's for the success rate of one episode per task, else `bounded_bootstrap`'s.
    """
    table = np.array([by_task(outcomes, key) for outcomes in seeds])  # [seeds, tasks]
    if key == "won" and sum(map(len, seeds)) == table.shape[1]:
        return float(table.mean()), wilson(float(table.sum()), table.shape[1])
    return bounded_bootstrap(table)


def bounded_bootstrap(table):
    """Mean of table [seeds, tasks] of rates or scores, and its interval: a bootstrap over tasks and seeds, within what
    the mean can be; Wilson's where all rates are equal, of which a bootstrap would give no width, as if nothing were
    unknown."""
    mean, low, high = cluster_bootstrap(table)
    least, most, tasks = float(np.min(table)), float(np.max(table)), np.shape(table)[1]
    if least == most and 0 <= mean <= 1:
        low, high = wilson(mean * tasks, tasks)
    return mean, (max(low, min(least, 0.0)), min(high, max(most, 1.0)))


def describe(outcomes):
    """One line of the table: n tasks, success and score with intervals, turns, shares of invalid and unfinished."""
    success, success_interval = estimate([outcomes], "won")
    score, score_interval = estimate([outcomes], "score")
    turns = sum(outcome["turns"] for outcome in outcomes)
    return {"n": len({outcome["task_id"] for outcome in outcomes}), "episodes": len(outcomes),
            "success": success, "success_interval": success_interval,
            "score": score, "score_interval": score_interval, "turns": turns / len(outcomes),
            "invalid": sum(outcome["invalid"] for outcome in outcomes) / turns,
            "unfinished": sum(not outcome["done"] for outcome in outcomes) / len(outcomes)}


def summarise(outcomes):
    """Outcomes -> {task type: describe(...)}, types in alphabetical order, and "all" last."""
    types = sorted({outcome["task_type"] for outcome in outcomes})
    table = {kind: describe([o for o in outcomes if o["task_type"] == kind]) for kind in types}
    return table | {"all": describe(outcomes)}


def attempts(seeds):
    """pass@k and pass^k of `seeds` (see `estimate`), as (mean, (low, high)) each -> {k: (pass@k, pass^k)}, k from 2 to
    the number of episodes of each task, beyond 8 powers of two alone. For k = 1 both are the success."""
    counts = [Counter(outcome["task_id"] for outcome in outcomes) for outcomes in seeds]
    wins = [Counter(outcome["task_id"] for outcome in outcomes if outcome["won"]) for outcomes in seeds]
    most = min(min(count.values()) for count in counts)

    def mean(chance, k):
        return bounded_bootstrap(
            [[chance(won[i], count[i], k) for i in sorted(count)] for count, won in zip(counts, wins)])

    return {k: (mean(pass_at_k, k), mean(pass_hat_k, k)) for k in range(2, most + 1)
            if k <= 8 or k == most or k & (k - 1) == 0}


def difference(first, second, same_seeds=False):
    """Difference first - second, paired by task -> {"success": ..., "score": ...}, each a dict.

    first, second: outcomes for each training seed (see `estimate`); same_seeds: theirs are the same, and paired, too.
    p, for one seed on both sides, else None: McNemar's for success with one episode per task, else that of sign flips.
    `shown` needs an interval without 0 and, where there is a p, p < 0.05: with few tasks that differ the bootstrap is
    too sure of itself, the test is not. `tasks`, with as many episodes of each, would show this difference between
    these very runs with 80 % power, 6 or more where there is a p, which is never below 2 / 2^tasks; `seeds` (None
    unless both sides have several) between the methods.
    """
    result, alone = {}, len(first) == len(second) == 1
    for key, measure in (("won", "success"), ("score", "score")):
        a, b = (np.array([by_task(outcomes, key) for outcomes in side]) for side in (first, second))  # [seeds, tasks]
        value, low, high = cluster_bootstrap(a - b) if alone or same_seeds else cluster_difference(a, b)
        low, high = max(low, min(a.min() - b.max(), -1.0)), min(high, max(a.max() - b.min(), 1.0))
        single = key == "won" and len(first[0]) == len(second[0]) == a.shape[1]
        p, test = (mcnemar(a[0], b[0]), "McNemar") if single else (sign_flip_p(a[0] - b[0]), "sign flips")
        by_seed = [variance((a - b).mean(1))] if same_seeds else [variance(a.mean(1)), variance(b.mean(1))]
        result[measure] = {
            "difference": value, "interval": (low, high), "p": p if alone else None, "test": test if alone else None,
            "shown": (low > 0 or high < 0) and (not alone or p < 0.05),
            "tasks": sample_size(value, variance(a.mean(0) - b.mean(0)), least=6 if alone else 2),
            "seeds": None if min(len(a), len(b)) == 1 else sample_size(value, sum(by_seed))}
    return result


def variance(values):
    """The unbiased one; of a single value nothing is known."""
    return float(values.var(ddof=1)) if len(values) > 1 else math.inf


# -------------------------------------------------------------------------------------------------------- several files

class Group(NamedTuple):
    """Results of one method and equal settings, one per training seed; or one result alone."""

    paths: list
    results: list

    @property
    def seeds(self):
        """The training seeds, a set; empty for a model that is not of a run."""
        return {result["run"]["seed"] for result in self.results if result.get("run")}

    @property
    def title(self):
        """Method and training seeds; None for a model that is not of a run."""
        seeds = "s" * (len(self.seeds) > 1) + " " + ", ".join(map(str, sorted(self.seeds)))
        return f"{method_name(self.results[0]['run'])}, training seed{seeds}," if self.seeds else None

    def played(self, condition):
        return [result["outcomes"][condition] for result in self.results]


def grouped(paths, found, key):
    """Result files and what is in them -> list of Group, in order: those with one key(result), which is None for what
    belongs to no group. A training seed that comes twice is no second seed: such results stay alone."""
    alike = defaultdict(list)
    for number, result in enumerate(found):
        alike[number if key(result) is None else key(result)].append(number)
    groups = []
    for numbers in alike.values():
        seeds = {n: (found[n].get("run") or {}).get("seed") for n in numbers}
        numbers.sort(key=lambda n: seeds[n])  # equal seeds of two groups face each other
        several = len(set(seeds.values())) == len(numbers)
        groups += [Group([paths[n] for n in some], [found[n] for n in some])
                   for some in ([numbers] if several else [[n] for n in numbers])]
    return groups


def lettered(groups):
    """-> {"A": first group, "B": second, ..., "Z", "AA", "BB", ...}"""
    return {chr(ord("A") + number % 26) * (number // 26 + 1): group for number, group in enumerate(groups)}


def shared_conditions(paths, found):
    """The conditions that all results have. Raises UserError if they cannot be compared."""
    shared = [name for name in found[0]["conditions"] if all(name in other["conditions"] for other in found)]
    for path, other in zip(paths[1:], found[1:]):
        sets = [side["evaluation_set"][:12] for side in (found[0], other)]
        if found[0]["evaluation_set"] != other["evaluation_set"]:
            raise UserError(f"{paths[0]} and {path} were made on different evaluation sets ({' and '.join(sets)}): "
                            "only results on the same tasks can be compared.")
        for name in shared:
            played = [{outcome["task_id"] for outcome in side["outcomes"][name]} for side in (found[0], other)]
            if played[0] != played[1]:
                raise UserError(f"{paths[0]} and {path} have outcomes of different tasks ({CONDITIONS[name]}): "
                                "evaluate one of them anew.")
    if not shared:
        raise UserError(f"{' and '.join(map(str, paths))} have no condition in common: evaluate all with the same one.")
    return shared


# ------------------------------------------------------------------------------------------------------------- printing

def with_interval(mean, interval):
    return "{:.3f} [{:.3f}, {:.3f}]".format(mean, *interval)


def print_table(title, table):
    rows = [("task type", "n", "success [95 %]", "score [95 %]", "turns", "invalid", "unfinished")]
    for kind, s in table.items():
        success, score = (with_interval(s[measure], s[measure + "_interval"]) for measure in ("success", "score"))
        rest = f"{s['turns']:.1f}", f"{s['invalid']:.3f}", f"{s['unfinished']:.3f}"
        rows.append((kind, s["n"], success, score, *rest))
    print(f"\n{title}")
    width = max(len(row[0]) for row in rows)
    for kind, n, success, score, *rest in rows:
        print(f"  {kind:<{width}}{n:>5}  {success:<22}  {score:<22}" + "".join(f"{cell:>12}" for cell in rest))


def print_attempts(indent, seeds):
    for k, chances in attempts(seeds).items():
        print(indent + "  ".join(f"{name}{k} {with_interval(*chance)}" for name, chance in
                                 zip(("pass@", "pass^"), chances)))


def print_groups(title, groups):
    """groups: {letter: outcomes for each training seed}."""
    print(f"\n{title}\n{'':>6}{'success [95 %]':<24}score [95 %]")
    for letter, seeds in groups.items():
        success, score = (with_interval(*estimate(seeds, key)) for key in ("won", "score"))
        print(f"  {letter:<4}{success:<24}{score}")
        print_attempts("      ", seeds)


def print_summary(result):
    """All that is printed of one evaluation that was played."""
    for name in result["conditions"]:
        print_table(CONDITIONS[name], result["summary"][name])
        print_attempts("  ", [result["outcomes"][name]])
    if "with - without" in result["summary"]:
        print_difference("with - without skills, paired by task", result["summary"]["with - without"])
    errors = sum(outcome["errors"] for outcomes in result["outcomes"].values() for outcome in outcomes)
    if result["requests"]:
        counts = sorted(result["requests"]["counts"].items())
        print("\nrequests: " + ", ".join(f"{count:,} {what}" for what, count in counts))
    if errors:
        last = f"; the last failure: {result['requests']['last_failure']}" if result["requests"] else ""
        print(f"{errors:,} searches or requests had no answer (without one from the model an episode ends lost{last})")


def print_difference(title, result):
    print(f"\n{title}")
    for measure, d in result.items():
        p = "" if d["p"] is None else f"  p {d['p']:.3g} ({d['test']})"
        verdict = "a difference" if d["shown"] else "no difference shown"
        needed = [f"{d[what]:,} {what}" for what in ("tasks", "seeds") if d[what] not in (None, math.inf)]
        power = f"; {' or '.join(needed)} would show it (80 % power)" if needed else ""
        print("  {:<8}{:+.3f} [{:+.3f}, {:+.3f}]{}  {}{}".format(
            measure, d["difference"], *d["interval"], p, verdict, power))
