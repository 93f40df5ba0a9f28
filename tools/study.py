"""The study: every method against GRPO, over seeds, on the bundled model and the generated tasks of the environments.

    python -m tools.study                            all of it, a run per core at a time; resumes after Ctrl-C
    python -m tools.study --part A --env webshop     one regime of one environment
    python -m tools.study --report                   the tables and the picture anew, from results/study.json alone
    python -m tools.study --part A --env search --rates 3e-5 1e-4 3e-4     grpo's training success by learning rate
    python -m tools.study --quick                    two arms, one seed, two steps: does everything work?

Part A is poor in signal: 2 tasks x 4 episodes per step. Part B has full batches: 8 x 8, in ALFWorld 4 x 8.
An arm is a method with its settings; each (arm, seed) is one run of sdar.py, in runs/study/<part>/<env>/<arm>/<seed>.
After each run study.json is written: what it holds is not run again unless its settings have changed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from lib import folders
from lib.program import UserError, exit_status, to_json, write_atomically
from lib.runs import handling, mean
from lib.settings import Parser
from tools import study_report

ROOT, PROGRAM = folders.ROOT, [sys.executable, "sdar.py"]

# ---------------------------------------------------------------------------------------------------------- the design

SCHEDULE = {"lr_schedule": "linear", "warmup": 3}
REGIMES = {  # part, environment -> size of a step, rate; a rate may be chosen on grpo's training success alone
    ("A", "webshop"): SCHEDULE | {"tasks": 2, "group_size": 4, "steps": 20, "lr": 1e-4},
    ("A", "search"): SCHEDULE | {"tasks": 2, "group_size": 4, "steps": 40, "lr": 1e-4},
    ("A", "alfworld"): SCHEDULE | {"tasks": 2, "group_size": 4, "steps": 20, "lr": 2e-4},
    ("B", "webshop"): SCHEDULE | {"tasks": 8, "group_size": 8, "steps": 30, "lr": 4e-4},
    ("B", "search"): SCHEDULE | {"tasks": 8, "group_size": 8, "steps": 60, "lr": 4e-4},
    ("B", "alfworld"): SCHEDULE | {"tasks": 4, "group_size": 8, "steps": 20, "lr": 4e-4}}
SPLITS = {"webshop": "val", "search": "val", "alfworld": "valid_seen,valid_unseen"}  # none has tasks of training
SEEDS = dict(zip(REGIMES, (10, 10, 5, 5, 5, 3)))
MORE_SEEDS = dict.fromkeys(("untrained", "grpo", "sdar_0.01", "sdar_1", "rkl_1", "no_gate_1"), 20)  # of A, webshop


def sdar(coef=1.0, **changes):
    return {"method": "sdar", "sdar_coef": coef} | changes


ARMS = {  # settings that make an arm; strengths are written out, whatever the defaults are
    study_report.UNTRAINED: {"method": "grpo", "steps": 0},
    "grpo": {"method": "grpo"},
    "gigpo": {"method": "gigpo"},
    **{f"sdar_{coef:g}": sdar(coef) for coef in (0.01, 0.1, 0.3, 1.0)},  # the paper's lambda is 0.01
    "centered_1": sdar(surrogate="centered"),
    "rkl_1": sdar(surrogate="rkl"),
    "failed_1": sdar(distill="failed"),
    "decayed_1": sdar(sdar_decay=20),
    **{f"{method}_{coef:g}": {"method": method, "sdar_coef": coef}
       for method in ("opsd", "grpo_opsd") for coef in (0.01, 1.0)},
    "skill_grpo": {"method": "skill_grpo"},
    "rlsd": {"method": "rlsd"},
    **{f"skill_sd_{coef:g}": {"method": "skill_sd", "sdar_coef": coef} for coef in (0.001, 1.0)},
    **{f"opid_{weight:g}": {"method": "opid", "analyser": "rules", "opid_episode_weight": weight,
                            "opid_step_weight": weight} for weight in (0.001, 1.0)},
    "no_gate_1": sdar(gate="none"),  # controls from here on: a weight of 1 whatever the teacher says
    "no_skill_1": sdar(retrieval="none"),  # the teacher reads what the student reads: gap 0, gate 1/2, as at beta 0
    "shuffled_1": sdar(skills="shuffled"),
    "other_1": sdar(skills="other"),
    "foreign_1": sdar(skills="foreign")}
IN_PART_A = ("grpo", "gigpo", "sdar_0.01", "sdar_1", "rkl_1", "opid_0.001", "opid_1", "no_gate_1", "shuffled_1",
             "foreign_1")
FEWER_ARMS = {("A", "search"): IN_PART_A, ("A", "alfworld"): IN_PART_A} | {
    ("B", env): ("grpo", "gigpo", "sdar_0.01", "sdar_1") for env in SPLITS}  # elsewhere: all

# Not among a run's flags; one thread, so that it repeats exactly.
STORAGE = {"threads": 1, "keep": 1, "save_every": 10_000, "episodes_every": 10_000}
RATE = "grpo_lr_"  # and a learning rate: arms of --rates, which are not reported
QUICK = {"tasks": 2, "group_size": 2, "steps": 2, "eval_every": 2, "eval_tasks": 8}


def key(run):
    """What tells a run from others. A run is {part, env, arm, seed, flags}, flags being its settings except the seed.
    Its record in study.json adds evaluation [[step, success], ..], training [success per step], ..., or the error that
    ended it."""
    return run["part"], run["env"], run["arm"], run["seed"]


def settings(part, env, changes):
    """All settings of a run except its seed. Two evaluations (four in search, where they take little): the untrained
    model, from which all arms of a seed start, is evaluated in an arm of its own."""
    regime = REGIMES[part, env]
    evaluation = {"eval_every": regime["steps"] // (4 if env == "search" else 2), "eval_start": False,
                  "eval_split": SPLITS[env], "eval_tasks": 256, "eval_temperature": 0.4, "eval_greedy": False}
    return {"env": env, "model": "tiny"} | regime | evaluation | changes


def arms_of(regime, chosen=None, rates=None, quick=False):
    """-> {arm: flags} of a regime, or of those chosen; rates: grpo alone at these learning rates, never evaluated."""
    if rates:
        flags = {name: value for name, value in settings(*regime, ARMS["grpo"]).items() if not name.startswith("eval_")}
        return {f"{RATE}{rate:g}": flags | {"lr": rate, "eval_every": 0} for rate in rates}
    names = chosen or (("grpo", "sdar_1") if quick else FEWER_ARMS.get(regime, ARMS))
    names = dict.fromkeys((study_report.UNTRAINED, *names))  # every curve begins with its evaluation
    return {name: settings(*regime, (QUICK if quick else {}) | ARMS[name]) for name in names}


def plan(part=None, env=None, arms=None, seeds=None, rates=None, quick=False):
    """The study's runs, of all parts, environments and arms or of those given, in their order: seed 0 of every arm of
    an environment comes before seed 1 of any. seeds: how many instead of the study's own number."""
    return [{"part": regime[0], "env": regime[1], "arm": arm, "seed": seed, "flags": flags}
            for regime in REGIMES if part in (None, regime[0]) and env in (None, regime[1])
            for seed in range(seeds or (1 if quick else 3 if rates else max([SEEDS[regime], *MORE_SEEDS.values()])))
            for arm, flags in arms_of(regime, arms, rates, quick).items()
            if seeds or quick or rates or seed < seeds_of(regime, arm)]


def seeds_of(regime, arm):
    return MORE_SEEDS.get(arm, SEEDS[regime]) if regime == ("A", "webshop") else SEEDS[regime]


# ------------------------------------------------------------------------------------------------------------- one run

def command(run, folder):
    """The command line that trains a run; a switch that is off is --no-NAME."""
    words = list(PROGRAM)
    for name, value in (run["flags"] | STORAGE | {"seed": run["seed"], "out": folder}).items():
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def outcome(run, folder):
    """What a finished run's folder says -> a record of study.json; None before, or if other settings made it."""
    stored, wanted = folders.stored_settings(folder), run["flags"] | {"seed": run["seed"]}
    if stored is None or any(stored.get(name) != value for name, value in wanted.items()):
        return None
    entries, last = [entry for _, entry in folders.read_lines(folder / "metrics.jsonl")], run["flags"]["steps"]
    evaluation = [[e["step"], e["eval/success"]] for e in entries if "eval/success" in e]
    trained = [e for e in entries if "reward/success" in e]
    if len(trained) < last or run["flags"]["eval_every"] and [step for step, _ in evaluation][-1:] != [last]:
        return None
    seconds = (folder / "metrics.jsonl").stat().st_mtime - (folder / "config.json").stat().st_mtime
    return run | {
        "commit": stored["provenance"]["commit"], "seconds": round(seconds), "evaluation": evaluation,
        "training": [e["reward/success"] for e in trained],
        "zero_variance": round(mean(e["grpo/zero_variance_groups"] for e in trained), 4)}


class Crew:
    """The processes that train, which end before the study does."""

    def __init__(self):
        self.live, self.stopping = set(), False

    def carry_out(self, run, root):
        """Trains a run, unless its folder holds it already -> its record, with `error` if it failed.

        Checkpoints of a finished run are deleted: those of the whole study would take 7 GB.
        """
        folder = root.joinpath(*map(str, key(run)))
        found = outcome(run, folder)
        if found is None and not self.stopping:
            if folder.exists():  # what an interrupted run left
                folders.lock(folder)  # UserError while a program still writes to it
                shutil.rmtree(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            log = folder.with_name(f"{run['seed']}.log")
            status = self.train(command(run, folder), log)
            found = outcome(run, folder) if status == 0 else None
            if found is None:
                return run | {"error": failure_reason(log, status)}
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return found

    def train(self, words, log):
        """Runs a command line to its end -> its exit status. It has a session of its own: Ctrl-C stops it by stop."""
        with open(log, "w", encoding="utf-8") as file:
            child = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                     start_new_session=True)
        self.live.add(child)
        if self.stopping:  # since before it was there to be told
            child.terminate()
        status = child.wait()
        self.live.discard(child)
        return status

    def stop(self):
        self.stopping = True
        for child in list(self.live):
            child.terminate()


def failure_reason(log, status):
    """Why a program failed: its error sentence, or the last line of its output."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or lines or ["no output"]
    return f"{said[-1].removeprefix('error: ').rstrip('.')} (status {status})."


def run_all(runs, study, out, root, jobs):
    """Trains the runs, `jobs` at a time, and writes study.json after each. However it ends, no run is left behind."""
    crew = Crew()
    with tqdm(total=len(runs), unit="run", dynamic_ncols=True, disable=None) as bar, ThreadPoolExecutor(jobs) as pool:
        with handling(signal.default_int_handler):
            waiting = [pool.submit(crew.carry_out, run, root) for run in runs]
            try:
                for done in as_completed(waiting):
                    one = done.result()
                    study[key(one)] = one
                    write_study(out, study)
                    bar.write(study_report.line(one))
                    bar.update()
                    sys.stdout.flush()
            except BaseException:
                with handling(lambda *_: None):  # a second Ctrl-C must leave no run behind
                    bar.write("stopping the runs in progress ...")
                    crew.stop()
                    pool.shutdown(cancel_futures=True)
                raise


# ---------------------------------------------------------------------------------------------------------- study.json

FORMAT = "sdar study 1"


def read_study(path):
    """study.json -> {key: record}. Runs with other settings than today's are left out, with a line that says how many.
    Raises UserError for another file."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError(f"its format is {stored['format']!r}")
        current = [one for one in stored["runs"] if is_current(one)]
        study = {key(one): one for one in current}
        for one in current:
            check_record(one)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} was not written by this version of the study ({error}): move it away.") from error
    others = len(stored["runs"]) - len(current)
    if others:
        print(f"{others} runs of {path} have settings that the study no longer has: left out")
    return study


def check_record(one):
    """Raises ValueError or TypeError for a finished run's record whose curve or time are not what `outcome` writes."""
    if "error" not in one and one["flags"].get("eval_tasks"):
        steps = [step for step, success in one["evaluation"] if 0 <= success <= 1]
        if steps[-1:] != [one["flags"]["steps"]] or one["seconds"] < 0:
            raise ValueError(f"the record of {key(one)} is damaged")


def is_current(one):
    """Whether the study would make a recorded run with the same settings today."""
    return one["arm"].startswith(RATE) or (
        one["arm"] in ARMS and one["flags"] == settings(one["part"], one["env"], ARMS[one["arm"]]))


def is_done(run, study):
    one = study.get(key(run), {"error": "not tried"})
    return "error" not in one and one["flags"] == run["flags"]


def write_study(out, study):
    """One line per run and per row of the summary, so that two versions of the file can be compared."""
    parts = {"runs": in_order(study), "summary": study_report.summary(reported(study))}
    lists = [f'"{name}": [\n' + ",\n".join(map(to_json, rows)) + "\n]" for name, rows in parts.items()]
    head = f'{{"format": "{FORMAT}", "command": "python -m tools.study",\n'
    write_atomically({out / "study.json": head + ",\n".join(lists) + "}\n"})


def in_order(study):
    """The records: by regime and arm as in the tables above, then by seed."""
    regimes, arms = list(REGIMES), list(ARMS)
    return [study[key] for key in sorted(study, key=lambda key: (
        regimes.index(key[:2]), arms.index(key[2]) if key[2] in ARMS else len(arms), key[2:]))]


def reported(study):
    return [one for one in in_order(study) if one["arm"] in ARMS]


def report(study, out):
    """Writes study.json, study.png and the tables, in docs/study.md for the study's own folder, else <out>/study.md."""
    records = reported(study)
    if not study_report.runs_by_regime(records):
        raise UserError(f"{out / 'study.json'} holds no finished run, so there is nothing to report.")
    write_study(out, study)
    page = ROOT / "docs" / "study.md" if out.resolve() == ROOT / "results" else out / "study.md"
    study_report.insert(study_report.tables(records), page)
    study_report.draw(records, out / "study.png")
    if any(one["part"] == "A" for one in study_report.finished(records)):
        study_report.draw_front(records, out / "curve.png")
    print(f"written: {out / 'study.json'}, the pictures beside it, {page}")


# -------------------------------------------------------------------------------------------------------- command line

def parse(argv):
    parser = Parser("python -m tools.study [options]", __doc__).add_commands()
    add = parser.add_argument_group("study").add_argument
    add("--part", choices=("A", "B"), default=None, help="one part alone")
    add("--env", choices=tuple(SPLITS), default=None, help="one environment alone")
    add("--arms", choices=tuple(ARMS), nargs="+", default=None, metavar="ARM", help=f"of {', '.join(ARMS)}")
    add("--seeds", type=int, default=None, help="seeds per arm instead of the study's own number")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a core each (default: all cores)")
    add("--out", type=Path, default=None, help="folder of study.json and study.png (default: results)")
    add("--rates", type=float, nargs="+", default=None, metavar="LR", help="grpo alone at these learning rates")
    add("--report", action="store_true", default=False, help="run nothing: tables and picture from study.json")
    add("--quick", action="store_true", default=False, help="a try of two arms, in runs/study-quick")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.seeds is not None and args.seeds < 1:
        raise UserError("--jobs and --seeds must be at least 1.")
    idle = {"report": ("part", "env", "arms", "seeds", "rates", "quick"), "quick": ("rates",), "rates": ("arms",)}
    for name, others in idle.items():
        for other in others:
            if getattr(args, name) and getattr(args, other):
                raise UserError(f"--{other} would do nothing beside --{name}: leave one of them out.")
    return args


def program(argv):
    args = parse(argv)
    root = ROOT / "runs" / ("study-quick" if args.quick else "study")
    if args.quick:
        folders.make_folder(root)
        folders.lock(root)
        for part in root.glob("[AB]"):
            shutil.rmtree(part)
    out = args.out or (root if args.quick else ROOT / "results")
    folders.make_folder(out)
    folders.lock(out)
    study = {} if args.quick else read_study(out / "study.json")
    if not args.report:
        runs = plan(args.part, args.env, args.arms, args.seeds, args.rates, args.quick)
        todo = [run for run in runs if not is_done(run, study)]
        print(f"{len(runs)} runs, of which {len(runs) - len(todo)} are done", flush=True)
        run_all(todo, study, out, root, args.jobs)
        if args.rates:
            return print(study_report.rates([study[key(run)] for run in runs]))
    report(study, out)
    failed = [one for one in study.values() if "error" in one]
    if failed:
        raise UserError(f"Runs that failed: {len(failed)}, such as {study_report.line(failed[0])} The next start tries "
                        "again.")


def main(argv=None):
    """The command line -> the exit status."""
    return exit_status(program, argv)


if __name__ == "__main__":
    sys.exit(main())
