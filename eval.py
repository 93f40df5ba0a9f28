"""Plays the fixed evaluation set with one model, with and without skills in its prompt, and compares such results.

    python eval.py tiny

    tiny on webshop (generated tasks, not the official ones)
    128 tasks of val, evaluation set a27fef2362f2, T=0.4, 1 episode per task, seed 0

    with skills in the prompt
      task type      n  success [95 %]          score [95 %]                 turns     invalid  unfinished
      beauty        30  0.833 [0.664, 0.927]    0.967 [0.940, 0.993]           4.8       0.000       0.000
      ...
      all          128  0.773 [0.694, 0.837]    0.950 [0.934, 0.966]           4.7       0.002       0.000

    with - without skills, paired by task
      success +0.695 [+0.617, +0.773]  p 3.23e-27 (McNemar)  a difference; 6 tasks would show it (80 % power)

    python eval.py --show eval-tiny-webshop.json --lost       what the agent saw and said, turn by turn
    python eval.py --view runs/webshop-sdar-0                 a page of its episodes, tokens coloured by gap and gate
    python eval.py --compare runs/webshop-grpo-* runs/webshop-sdar-*       results, by method and training seed
    python eval.py --curves runs/webshop-*                    learning curves, by method, with bands over seeds
    python eval.py --endpoint http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-7B-Instruct      a model behind a server

A checkpoint inside a run folder is played under its run's own settings (environment, data, skills, prompt, limits,
seed; not the number of tasks and the temperature); any other model under the defaults of sdar.py. Flags of the same
names override either. A result holds every episode, so that results on one evaluation set can be compared task by
task: the same tasks are easy or hard for all, and pairing takes that out of the noise. Intervals are 95 % intervals:
Wilson's for a success rate of one episode per task, else percentiles of a bootstrap over tasks (10,000 resamples,
fixed seed), which needs a few dozen tasks. For one checkpoint they hold on tasks like these; another training seed
adds noise of its own, and so results of several seeds of a method are resampled over tasks and seeds.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
from pathlib import Path

import envs
import sdar
from lib import curves, folders, results, runs
from lib.checkpoints import sealed
from lib.endpoint import PARALLEL, TIMEOUT, Endpoint
from lib.episodes import episode_lines, episodes_beside, show
from lib.program import UserError, check_regular, exit_status
from lib.results import CONDITIONS, FORMAT, read_result
from lib.settings import Parser, add_options, changeable, number
from lib.tasks import evaluation_set_hash
from lib.viewer import write_page

# ------------------------------------------------------------------------------------------------------- one evaluation

# SETTINGS decide an episode; FLAGS are all settings of sdar.Config that are flags here.
SETTINGS = ("env", "data", "human_goals", "retriever", "skills", "retrieval", "max_turns", "history", "prompt",
            "history_observations", "max_prompt_tokens", "max_response_tokens", "check_admissible", "seed", "dtype")
SAMPLING = ("eval_split", "eval_tasks", "eval_temperature")  # flags with names of their own here
FLAGS = (*SETTINGS, *SAMPLING, "env_timeout", "rollout_batch", "device", "threads", "engine")
LOCAL = ("device", "dtype", "threads", "engine", "max_prompt_tokens")  # what a server decides
# Settings of a training run that tell it apart from others, its seed aside.
TRAINING = [name for name in sorted(sdar.FIELDS.keys() - {*SETTINGS, *changeable(sdar.Config), "out"} | {"steps"})
            if not name.startswith("eval_")] + ["step"]  # steps: a linear schedule falls to 0 there


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
    if cfg.retrieval in ("none", "ucb"):  # no teacher, or one whose choices are not known here: the usual skills
        cfg.retrieval = sdar.Config.retrieval
    # these alone are checked: any other may be idle in the training run and not here
    sdar.validate(cfg, flags.keys() & {"retriever", "history_observations", "human_goals"})
    return cfg


def training_of(model):
    """The settings of the run that a checkpoint is of, and its step, as a dict; None for any other model."""
    run = folders.settings_of(model, sdar.Config) if (Path(model) / "run.json").is_file() else None
    return run and folders.storable(run) | {"step": sealed(Path(model))["step"]}


def connect(model, cfg, options):
    """-> the Endpoint that the options name, once it has answered."""
    for name in LOCAL:
        if name in options:
            raise UserError(f"--{name} would do nothing here, since the server behind --endpoint decides it: leave it "
                            "out.")
    chosen = {"parallel": options.get("rollout_batch"), "timeout": options.get("request_timeout")}
    server = Endpoint(options["endpoint"], model, os.environ.get("OPENAI_API_KEY"), max_tokens=cfg.max_response_tokens,
                      **{name: value for name, value in chosen.items() if value is not None})
    server.probe()
    return server


def play(player, cfg, environments, tasks, repeats, skills, condition):
    """The tasks, `repeats` times, each with its own seed -> (a JSON-ready dict per episode, the episodes as lines of a
    file). player: an sdar.Policy, or an Endpoint."""
    outcomes, lines = [], []
    for repeat in range(repeats):
        episodes = sdar.rollout(player, environments, tasks, cfg, temperature=cfg.eval_temperature, skills=skills,
                                seed=cfg.seed + 1_000_003 * repeat, doing=CONDITIONS[condition])
        outcomes += [{"task_id": e.task.group, "task_type": e.task_type, "repeat": repeat, "won": e.won,
                      "score": e.score, "turns": len(e.turns), "invalid": sum(not t.valid for t in e.turns),
                      "done": e.done, "errors": e.errors} for e in episodes]
        lines += episode_lines(player.chat, envs.READABLE[cfg.env], episodes, condition=condition, repeat=repeat,
                               skills=skills and functools.partial(sdar.skill_text, skills))
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
    elif out.suffix != ".json":
        raise UserError(f"--out must end in .json, not be {out}: beside a result stand its episodes, in .jsonl.")


def evaluate(model, options):
    """Plays the evaluation set under the given options, prints the tables, writes the result file -> its dict."""
    if "LOCAL_RANK" in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise UserError("An evaluation runs in one process, and torchrun has started several, which would all play the "
                        "same: start it without torchrun.")
    cfg = evaluation_config(model, {name: options[name] for name in FLAGS if name in options})
    repeats = options.get("repeats", 1)
    if repeats < 1 or repeats > 1 and cfg.eval_temperature == 0:
        raise UserError(f"--repeats is {repeats}, but must be at least 1, and 1 with --temperature 0, whose episodes "
                        "are all alike.")
    conditions = [name for name in CONDITIONS if options.get("condition", "both") in (name, "both")]
    server = connect(model, cfg, options) if "endpoint" in options else None
    env = sdar.make_env(cfg, probe=True)
    tasks = sdar.evaluation_tasks(cfg, env)
    settings = {"model": model, "endpoint": server and server.shown,
                "evaluation_set": evaluation_set_hash(env, tasks, cfg.env_timeout),
                "conditions": conditions, "config": folders.storable(cfg), "run": training_of(model),
                "sampling": {"split": cfg.eval_split, "tasks": len(tasks), "repeats": repeats, "seed": cfg.seed,
                             "temperature": cfg.eval_temperature}}
    out = Path(options.get("out", default_out(model, cfg)))
    free_to_write(out, settings)
    skills = sdar.load_skills(cfg, env.task_types)
    player = server or sdar.load_policy(dataclasses.replace(cfg, kl_coef=0.0, teacher="none"), skills)  # no reference
    if not server:
        player.model.requires_grad_(False)  # vLLM leaves room for what is trained
        sdar.start_vllm(player, cfg, skills, [cfg.eval_temperature])
    environments = [env] + [sdar.make_env(cfg) for _ in tasks[1:]]
    print(headline(settings), flush=True)
    played = {name: play(player, cfg, environments, tasks, repeats, skills if name == "with" else None, name)
              for name in conditions}
    outcomes = {name: some for name, (some, _) in played.items()}
    summary = {name: results.summarise(outcomes[name]) for name in conditions}
    if len(conditions) == 2:
        summary["with - without"] = results.difference([outcomes["with"]], [outcomes["without"]])
    result = {"format": FORMAT, **settings, "provenance": folders.provenance(sdar.__version__), "summary": summary,
              "requests": server and {"counts": server.counts, "last_failure": server.last_failure},
              "episodes": episodes_beside(out).name, "outcomes": outcomes}
    results.write_result(out, result, itertools.chain(*(lines for _, lines in played.values())))  # printing may fail
    results.print_summary(result)
    print(f"\nsaved in {out}; read its episodes: python eval.py --show {out} --lost")
    return result


def default_out(model, cfg):
    name = Path(model).absolute().name
    return f"{model}/eval.json" if name.startswith("checkpoint-") else f"eval-{name}-{cfg.env}.json"


def headline(result, group=None):
    """Two lines on what was evaluated, and how. group: what to say instead of one model."""
    cfg, sampling = result["config"], result["sampling"]
    how = f"T={sampling['temperature']:g}" if sampling["temperature"] else "greedy"
    episodes = f"{sampling['repeats']} episode{'s' * (sampling['repeats'] > 1)} per task"
    model = f"{result['model']} at {result['endpoint']}" if result.get("endpoint") else result["model"]
    return (f"{group or model} on {cfg['env']} ({runs.data_label(cfg.get('data'))})\n"
            f"{sampling['tasks']} tasks of {sampling['split']}, evaluation set {result['evaluation_set'][:12]}, {how}, "
            f"{episodes}" + ("" if group else f", seed {sampling['seed']}"))


# ----------------------------------------------------------------------------------------------------------- comparison

def facts(result):
    """What a result is of, {name: value}; of a checkpoint of a run the training settings, too."""
    run = result.get("run") or {}
    return ({name: result.get(name) for name in ("model", "endpoint", "evaluation_set", "conditions")}
            | result["sampling"] | {name: result["config"].get(name, sdar.FIELDS[name].default) for name in SETTINGS}
            | {f"training {name}": run[name] for name in TRAINING if name in run})


def training_key(result):
    """What results that differ in nothing but the training seed have in common, a text; None for no run's."""
    some = {name: value for name, value in facts(result).items() if name not in ("model", "seed", "conditions")}
    return json.dumps(some, sort_keys=True) if result.get("run") else None


def changes(first, second, leave_out=()):
    """What differs in two results' facts, for a message: 'seed 0 | 1, max_turns 15 | 30'."""
    a, b = facts(first), facts(second)  # an older result knows less of its training
    return ", ".join(f"{name} {a[name]} | {b[name]}" for name in a
                     if name in b and a[name] != b[name] and name not in leave_out)


def compare(paths):
    """Prints success and score of several results, grouped by method, per condition, and the difference of each group
    from the first -> {condition: {letter: difference(...)}}."""
    paths = [results.result_path(path) for path in paths]
    found = [read_result(path) for path in paths]
    shared = results.shared_conditions(paths, found)
    groups = results.lettered(results.grouped(paths, found, training_key))
    for letter, group in groups.items():
        print(f"{letter}  {', '.join(map(str, group.paths))}:\n{headline(group.results[0], group.title)}")
    first, *others = groups.items()
    for letter, group in others:
        leave_out = ("model", "seed") if first[1].seeds and group.seeds else ()
        unlike = changes(first[1].results[0], group.results[0], leave_out)
        print(f"settings that differ, A | {letter}: {unlike or 'none'}")
    table = {}
    for name in shared:
        results.print_groups(CONDITIONS[name], {letter: group.played(name) for letter, group in groups.items()})
        table[name] = {}
        for letter, group in others:
            same = len(group.seeds) > 1 and group.seeds == first[1].seeds
            table[name][letter] = results.difference(group.played(name), first[1].played(name), same)
            results.print_difference(f"{letter} - A, {CONDITIONS[name]}, paired by task{' and seed' * same}",
                                     table[name][letter])
    if len(others) > 1:
        print(f"\nIntervals and p are not corrected for the {len(others)} comparisons.")
    if any(len(group.seeds) == 1 for group in groups.values()):
        print("\nA single training run says nothing of other seeds: to compare methods, give several runs of each.")
    return table


# ----------------------------------------------------------------------------------------------------------------- main

def parse_args(argv):
    """Command line -> {option: value} of what was given, `model` however it was given."""
    parser = Parser("python eval.py MODEL [options]", __doc__).add_commands()
    what = parser.add_argument_group("evaluation")
    what.add_argument("MODEL", nargs="?", default=None,
                      help="a checkpoint, tiny, a model folder, or a name that transformers loads")
    what.add_argument("--endpoint", metavar="URL", help="evaluate a model behind an OpenAI-compatible server, such as "
                      "http://127.0.0.1:8000/v1; the key, if it wants one, in OPENAI_API_KEY; at most --rollout_batch "
                      f"requests at a time (default {PARALLEL})")
    what.add_argument("--model", metavar="NAME", help="with --endpoint: the model's name there")
    what.add_argument("--request_timeout", type=number(float), metavar="FLOAT",
                      help=f"with --endpoint: seconds for one try of a request (default {TIMEOUT:g})")
    what.add_argument("--compare", nargs="+", metavar="RESULT", help="compare results with the first instead: files, "
                      "checkpoints, or runs, whose last evaluated checkpoint counts; seeds of one method are a group")
    what.add_argument("--curves", nargs="+", metavar="RUN", help="draw the learning curves of runs into --out instead, "
                      "seeds of one method as one curve (default curves.png)")
    what.add_argument("--show", metavar="RUN", help="print the episodes of a run's last step, or of a result file")
    what.add_argument("--view", metavar="RUN", help="make a page of a run's or a result's episodes, one HTML file "
                      "(default RUN/episodes.html)")
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
                      help="result (default: eval.json in a checkpoint, else eval-<model>-<env>.json), picture or page")
    add_options(parser, sdar.Config, set(FLAGS) - {*SAMPLING}, sdar.TABLES)
    return checked(vars(parser.parse_args(argv)))


INSTEAD = {"compare": set(), "curves": {"out"}, "show": {"step", "lost"}, "view": {"out"}}  # of playing
NEEDS = {"step": "show", "lost": "show", "request_timeout": "endpoint", "model": "endpoint", "endpoint": "model"}


def checked(options):
    """The options, with MODEL as `model`. Raises UserError for those that do not go together."""
    given = {name for name, value in options.items() if value is not None}
    for name, others in INSTEAD.items():
        if name in given and given - others - {name}:
            raise UserError(f"--{name} does not go with {', '.join(sorted(given - others - {name}))}: leave it out.")
    for name, other in NEEDS.items():
        if name in given and other not in given:
            raise UserError(f"--{name} needs --{other}, too.")
    if {"MODEL", "model"} <= given:
        raise UserError("Give one model: MODEL, which is loaded here, or --endpoint URL --model NAME.")
    if not given & {*INSTEAD, "MODEL", "model"}:
        raise UserError("Give a model (tiny, runs/webshop-sdar-0/checkpoint-30), --endpoint URL --model NAME, "
                        "--compare A B, --curves RUN RUN, --show RUN, or --view RUN.")
    if options.get("retrieval") in ("none", "ucb"):
        raise UserError("--retrieval none shows no skills (use --condition without), and ucb learns in training alone.")
    if options.get("condition") == "without" and given & {"retrieval", "skills"}:
        raise UserError("--condition without shows no skills: leave --retrieval and --skills out.")
    if not 0 < options.get("request_timeout", TIMEOUT) <= 86_400:
        raise UserError("--request_timeout must be greater than 0 seconds, and at most a day's, 86400.")
    return options | {"model": options.get("model", options["MODEL"])}


def command(argv):
    options = parse_args(argv)
    if "compare" in options:
        compare(options["compare"])
    elif "curves" in options:
        apart = sdar.FIELDS.keys() & {*SETTINGS, *SAMPLING, *TRAINING} - {"seed"}
        curves.draw(options["curves"], options.get("out", "curves.png"),
                    {name: sdar.FIELDS[name].default for name in sorted(apart)})
    elif "show" in options:
        show(options["show"], options.get("step"), options.get("lost", False))
    elif "view" in options:
        print(f"saved in {write_page(options['view'], options.get('out'))}; open it in a browser")
    else:
        evaluate(options["model"], options)


def main(argv=None):
    """The command line. Returns the exit status; bad input is one sentence on standard error and status 2."""
    return exit_status(command, argv)


if __name__ == "__main__":
    sys.exit(main())
