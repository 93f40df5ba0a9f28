"""Plays the fixed evaluation set with one model, with and without skills in its prompt, and compares two such results.

    python eval.py tiny

    tiny on webshop (generated tasks, not the official ones)
    128 tasks of val, evaluation set a27fef2362f2, T=0.4, 1 episode per task, seed 0

    with skills in the prompt
      task type      n  success [95 %]          score [95 %]                 turns     invalid  unfinished
      beauty        30  0.833 [0.664, 0.927]    0.967 [0.940, 0.993]           4.8       0.000       0.000
      ...
      all          128  0.773 [0.694, 0.837]    0.950 [0.934, 0.966]           4.7       0.002       0.000

    with - without skills, paired by task
      success +0.695 [+0.617, +0.773]  p 3.23e-27 (McNemar)  a difference

    python eval.py --show eval-tiny-webshop.json --lost       what the agent saw and said, turn by turn
    python eval.py --compare runs/webshop-sdar-0/checkpoint-30/eval.json runs/webshop-grpo-0/checkpoint-30/eval.json

A checkpoint inside a run folder is played under its run's own settings (environment, data, skills, prompt, limits,
seed; not the number of tasks and the temperature); any other model under the defaults of sdar.py. Flags of the same
names override either. A result holds every episode, so that two results on one evaluation set can be compared task by
task: the same tasks are easy or hard for both, and pairing takes that out of the noise. Intervals are 95 % intervals:
Wilson's for a success rate of one episode per task, else percentiles of a bootstrap over tasks (10,000 resamples,
fixed seed), which needs a few dozen tasks. They hold for this checkpoint on tasks like these; another training seed
adds noise of its own.
"""

import dataclasses
import itertools
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import NormalDist

import numpy as np

import envs
import sdar
from lib import folders, runs
from lib.episodes import episode_lines, episodes_beside, show
from lib.program import UserError, check_regular, exit_status
from lib.results import FORMAT, read_result, write_result
from lib.settings import Parser, add_options, number
from lib.tasks import evaluation_set_hash

Z = NormalDist().inv_cdf(0.975)
RESAMPLES, BLOCK = 10_000, 100  # resamples of a bootstrap, and how many are held in memory at once


# ----------------------------------------------------------------------------------------------------------- statistics

def wilson(successes, n):
    """Wilson's 95 % interval of a rate of `successes` in n independent trials -> (low, high). Wilson 1927."""
    rate, shrink = successes / n, 1 + Z * Z / n
    centre = (rate + Z * Z / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap(values):
    """95 % percentile interval of the mean of values [tasks], resampling tasks -> (low, high)."""
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(BLOCK, len(values)))].mean(1) for _ in range(RESAMPLES // BLOCK)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def paired_bootstrap(first, second):
    """Mean of first - second, both [tasks] in one order, and its 95 % interval -> (difference, low, high)."""
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return float(differences.mean()), *bootstrap(differences)


def mcnemar(first, second):
    """Exact two-sided p of McNemar's test on two lists of won or lost, in one order of tasks.

    Tasks that only one side won are a fair coin if the sides are equally good; the others say nothing. McNemar 1947.
    """
    only_first = sum(bool(a) and not b for a, b in zip(first, second))
    only_second = sum(bool(b) and not a for a, b in zip(first, second))
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2 ** n)


def by_task(outcomes, key):
    """Outcomes -> the mean of outcome[key] of each task [tasks], in the order of task ids."""
    values = defaultdict(list)
    for outcome in outcomes:
        values[outcome["task_id"]].append(outcome[key])
    return np.array([np.mean(values[task_id]) for task_id in sorted(values)])


def describe(outcomes):
    """One line of the table: n tasks, success and score with intervals, turns, shares of invalid and unfinished."""
    won, score = by_task(outcomes, "won"), by_task(outcomes, "score")
    # Equal values have a bootstrap interval of no width, as if nothing were unknown.
    single = len(outcomes) == len(won) or won.min() == won.max()
    turns = sum(outcome["turns"] for outcome in outcomes)
    return {"n": len(won), "episodes": len(outcomes),
            "success": float(won.mean()), "success_interval": wilson(won.sum(), len(won)) if single else bootstrap(won),
            "score": float(score.mean()), "score_interval": bootstrap(score), "turns": turns / len(outcomes),
            "invalid": sum(outcome["invalid"] for outcome in outcomes) / turns,
            "unfinished": sum(not outcome["done"] for outcome in outcomes) / len(outcomes)}


def summarise(outcomes):
    """Outcomes -> {task type: describe(...)}, types in alphabetical order, and "all" last."""
    types = sorted({outcome["task_type"] for outcome in outcomes})
    table = {kind: describe([o for o in outcomes if o["task_type"] == kind]) for kind in types}
    return table | {"all": describe(outcomes)}


def difference(first, second):
    """Paired difference first - second of two outcome lists -> {"success": ..., "score": ...}, each a dict.

    p is McNemar's, for success with one episode per task on both sides, else None. `shown` needs an interval without 0
    and, where there is a p, p < 0.05: with few discordant tasks the bootstrap is too sure of itself, the test is not.
    """
    result = {}
    for key, measure in (("won", "success"), ("score", "score")):
        a, b = by_task(first, key), by_task(second, key)
        value, low, high = paired_bootstrap(a, b)
        p = mcnemar(a, b) if key == "won" and len(a) == len(first) == len(second) else None
        result[measure] = {"difference": value, "interval": (low, high), "p": p,
                           "shown": (low > 0 or high < 0) and (p is None or p < 0.05)}
    return result


def print_table(title, table):
    rows = [("task type", "n", "success [95 %]", "score [95 %]", "turns", "invalid", "unfinished")]
    for kind, s in table.items():
        success, score = ("{:.3f} [{:.3f}, {:.3f}]".format(s[m], *s[m + "_interval"]) for m in ("success", "score"))
        rest = f"{s['turns']:.1f}", f"{s['invalid']:.3f}", f"{s['unfinished']:.3f}"
        rows.append((kind, s["n"], success, score, *rest))
    print(f"\n{title}")
    width = max(len(row[0]) for row in rows)
    for kind, n, success, score, *rest in rows:
        print(f"  {kind:<{width}}{n:>5}  {success:<22}  {score:<22}" + "".join(f"{cell:>12}" for cell in rest))


def print_difference(title, result):
    print(f"\n{title}, paired by task")
    for measure, d in result.items():
        p = "" if d["p"] is None else f"  p {d['p']:.3g} (McNemar)"
        verdict = "a difference" if d["shown"] else "no difference shown"
        print("  {:<8}{:+.3f} [{:+.3f}, {:+.3f}]{}  {}".format(measure, d["difference"], *d["interval"], p, verdict))


# ------------------------------------------------------------------------------------------------------- one evaluation

CONDITIONS = {"without": "without skills", "with": "with skills in the prompt"}

# Settings of sdar.Config that decide an episode, and all that are flags here under the same names.
SETTINGS = ("env", "data", "human_goals", "retriever", "skills", "retrieval", "max_turns", "history",
            "history_observations", "max_prompt_tokens", "max_response_tokens", "check_admissible", "seed", "dtype")
SAMPLING = ("eval_split", "eval_tasks", "eval_temperature")  # flags with names of their own here
FLAGS = (*SETTINGS, *SAMPLING, "env_timeout", "rollout_batch", "device", "threads")


def evaluation_config(model, explicit):
    """Model and explicitly given settings -> Config: that of the run around a checkpoint, else sdar's defaults."""
    flags, run = explicit, folders.settings_of(model, sdar.Config)
    explicit = {"eval_tasks": sdar.Config.eval_tasks, "eval_temperature": sdar.Config.eval_temperature,
                "model": model} | explicit
    if run is None:
        return sdar.make_config(explicit)
    if explicit.get("env", run.env) in set(sdar.FIELDS["env"].metadata["choices"]) - {run.env}:
        run = sdar.in_environment(run, explicit["env"])
    cfg = dataclasses.replace(run, **explicit)
    if cfg.retrieval == "none":  # a run without a teacher, which is to be shown the same skills as the others
        cfg.retrieval = sdar.Config.retrieval
    # the others decide nothing of an evaluation, or are idle in the run alone
    sdar.validate(cfg, flags.keys() & {"retriever", "history_observations", "human_goals"})
    return cfg


def play(policy, cfg, environments, tasks, repeats, skills, condition):
    """sdar.rollout over the tasks, `repeats` times, each with its own seed -> (a JSON-ready dict per episode, the
    episodes as lines of a file)."""
    outcomes, lines = [], []
    for repeat in range(repeats):
        episodes = sdar.rollout(policy, environments, tasks, cfg, temperature=cfg.eval_temperature, skills=skills,
                                seed=cfg.seed + 1_000_003 * repeat, doing=CONDITIONS[condition])
        outcomes += [{"task_id": e.task.task_id, "task_type": e.task_type, "repeat": repeat, "won": e.won,
                      "score": e.score, "turns": len(e.turns), "invalid": sum(not t.valid for t in e.turns),
                      "done": e.done} for e in episodes]
        lines += episode_lines(policy.chat, envs.READABLE[cfg.env], episodes, skills=skills, condition=condition,
                               repeat=repeat)
    return outcomes, lines


def free_to_write(out, settings):
    """Raises UserError unless `out` can be written without losing a result of other settings."""
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} for the result: make it, or choose another with --out.")
    check_regular(episodes_beside(out), "choose another with --out")
    if out.exists():
        unlike = changes(read_result(out), settings)
        if unlike:
            raise UserError(f"{out} holds another evaluation (there | here: {unlike}): choose a file with --out.")


def changes(first, second):
    """What differs in the settings of two results, for a message: 'seed 0 | 1, max_turns 15 | 30'."""
    a, b = ({name: result[name] for name in ("model", "evaluation_set", "conditions")} | result["sampling"] |
            {name: result["config"].get(name) for name in SETTINGS} for result in (first, second))
    return ", ".join(f"{name} {a[name]} | {b[name]}" for name in a if a[name] != b[name])


def evaluate(model, options):
    """Plays the evaluation set under the given options, prints the tables, writes the result file -> its dict."""
    cfg = evaluation_config(model, {name: options[name] for name in FLAGS if name in options})
    repeats = options.get("repeats", 1)
    if repeats < 1 or repeats > 1 and cfg.eval_temperature == 0:
        raise UserError(f"--repeats is {repeats}, but must be at least 1, and 1 with --temperature 0, whose episodes "
                        "are all alike.")
    conditions = [name for name in CONDITIONS if options.get("condition", "both") in (name, "both")]
    env = sdar.make_env(cfg, probe=True)
    tasks = sdar.evaluation_tasks(cfg, env)
    settings = {"model": model, "evaluation_set": evaluation_set_hash(env, tasks, cfg.env_timeout),
                "conditions": conditions, "config": folders.storable(cfg),
                "sampling": {"split": cfg.eval_split, "tasks": len(tasks), "repeats": repeats, "seed": cfg.seed,
                             "temperature": cfg.eval_temperature}}
    name = Path(model).absolute().name
    default = f"{model}/eval.json" if name.startswith("checkpoint-") else f"eval-{name}-{cfg.env}.json"
    out = Path(options.get("out", default))
    free_to_write(out, settings)
    skills = sdar.load_skills(cfg, env.task_types)
    policy = sdar.load_policy(dataclasses.replace(cfg, kl_coef=0.0, teacher="none"), skills)  # no reference
    environments = [env] + [sdar.make_env(cfg) for _ in tasks[1:]]
    print(headline(settings))
    played = {name: play(policy, cfg, environments, tasks, repeats, skills if name == "with" else None, name)
              for name in conditions}
    outcomes = {name: some for name, (some, _) in played.items()}
    summary = {name: summarise(outcomes[name]) for name in conditions}
    if len(conditions) == 2:
        summary["with - without"] = difference(outcomes["with"], outcomes["without"])
    result = {"format": FORMAT, **settings, "provenance": folders.provenance(sdar.__version__), "summary": summary,
              "episodes": episodes_beside(out).name, "outcomes": outcomes}
    write_result(out, result, itertools.chain(*(lines for _, lines in played.values())))  # first: printing may fail
    for name in conditions:
        print_table(CONDITIONS[name], summary[name])
    if len(conditions) == 2:
        print_difference("with - without skills", summary["with - without"])
    print(f"\nsaved in {out}; read its episodes: python eval.py --show {out} --lost")
    return result


def headline(result):
    cfg, sampling = result["config"], result["sampling"]
    how = f"T={sampling['temperature']:g}" if sampling["temperature"] else "greedy"
    episodes = f"{sampling['repeats']} episode{'s' * (sampling['repeats'] > 1)} per task"
    return (f"{result['model']} on {cfg['env']} ({runs.data_label(cfg.get('data'))})\n"
            f"{sampling['tasks']} tasks of {sampling['split']}, evaluation set {result['evaluation_set'][:12]}, {how}, "
            f"{episodes}, seed {sampling['seed']}")


# ----------------------------------------------------------------------------------------------------------- comparison

def compare(first_path, second_path):
    """Prints the paired difference of two result files per condition that both have -> {condition: difference(...)}."""
    first, second = read_result(first_path), read_result(second_path)
    sets = [side["evaluation_set"][:12] for side in (first, second)]
    if first["evaluation_set"] != second["evaluation_set"]:
        raise UserError(f"{first_path} and {second_path} were made on different evaluation sets "
                        f"({' and '.join(sets)}): only results on the same tasks can be compared.")
    shared = [name for name in first["conditions"] if name in second["conditions"]]
    for name in shared:
        played = [{outcome["task_id"] for outcome in side["outcomes"][name]} for side in (first, second)]
        if played[0] != played[1]:
            raise UserError(f"{first_path} and {second_path} have outcomes of different tasks ({CONDITIONS[name]}): "
                            "evaluate one of them anew.")
    if not shared:
        raise UserError(f"{first_path} and {second_path} have no condition in common: evaluate both with the same one.")
    print(f"A  {first_path}: {headline(first)}\nB  {second_path}: {headline(second)}")
    print(f"settings that differ, A | B: {changes(first, second) or 'none'}")
    result = {}
    for name in shared:
        result[name] = difference(first["outcomes"][name], second["outcomes"][name])
        rates = (by_task(side["outcomes"][name], "won").mean() for side in (first, second))
        print_difference("A - B, {} (success {:.3f} and {:.3f})".format(CONDITIONS[name], *rates), result[name])
    return result


# ----------------------------------------------------------------------------------------------------------------- main

def parse_args(argv):
    """Command line -> {option: value} of what was given; `model` is always there, None if absent."""
    parser = Parser("python eval.py MODEL [options]", __doc__).add_commands()
    what = parser.add_argument_group("evaluation")
    what.add_argument("model", nargs="?", default=None, metavar="MODEL",
                      help="a checkpoint, tiny, a model folder, or a name that transformers loads")
    what.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="compare two result files instead")
    what.add_argument("--show", metavar="RUN", help="print the episodes of a run's last step, or of a result file")
    what.add_argument("--step", type=number(int), metavar="INT", help="with --show: of this training step instead")
    what.add_argument("--lost", action="store_true", help="with --show: only the episodes that were lost")
    what.add_argument("--condition", choices=("both", *CONDITIONS), help="skills in the prompt (default both ways)")
    what.add_argument("--temperature", "--eval_temperature", dest="eval_temperature", type=number(float),
                      metavar="FLOAT", help=f"0 is greedy (default {sdar.Config.eval_temperature})")
    what.add_argument("--tasks", "--eval_tasks", dest="eval_tasks", type=number(int), metavar="INT",
                      help=f"tasks, drawn by task type (default {sdar.Config.eval_tasks}); 0 for the whole split")
    what.add_argument("--repeats", type=number(int), metavar="INT",
                      help="episodes per task, each with its own seed (default 1)")
    what.add_argument("--split", "--eval_split", dest="eval_split", metavar="NAME",
                      help="of the environment's tasks (default val; alfworld: valid_unseen)")
    what.add_argument("--out", metavar="FILE",
                      help="result file (default: eval.json in a checkpoint, else eval-<model>-<env>.json)")
    add_options(parser, sdar.Config, set(FLAGS) - {*SAMPLING}, sdar.TABLES)
    options = vars(parser.parse_args(argv))
    given = {name for name, value in options.items() if value is not None}
    for name, others in {"compare": set(), "show": {"step", "lost"}}.items():
        if name in given and given - others - {name}:
            raise UserError(f"--{name} does not go with {', '.join(sorted(given - others - {name}))}: leave it out.")
        if name not in given and given & others:
            raise UserError(f"--{min(given & others)} needs --{name} RUN.")
    if not given & {"compare", "show", "model"}:
        raise UserError("Give a model (tiny, runs/webshop-sdar-0/checkpoint-30), --compare A B, or --show RUN.")
    if options.get("retrieval") == "none":
        raise UserError("--retrieval none shows no skills: use --condition without.")
    return options


def command(argv):
    options = parse_args(argv)
    if "compare" in options:
        compare(*options["compare"])
    elif "show" in options:
        show(options["show"], options.get("step"), options.get("lost", False))
    else:
        evaluate(options["model"], options)


def main(argv=None):
    """The command line. Returns the exit status; bad input is one sentence on standard error and status 2."""
    return exit_status(command, argv)


if __name__ == "__main__":
    sys.exit(main())
