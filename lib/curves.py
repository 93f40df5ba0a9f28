"""Learning curves of any runs in one picture, grouped by method, with bands over training seeds."""

from collections import defaultdict
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.folders import read_lines, stored_settings
from lib.program import UserError, check_regular, is_of_kind, mismatch, optional
from lib.runs import data_label, method_name
from lib.statistics import t_interval

KINDS = {"env": str, "method": str, "seed": int, "analyser": str}  # what is used of a run's settings
PANES = {"eval/success": "sampled at T={}", "eval/greedy_success": "greedy", "eval/skilled_success": "with skills"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # told apart by all eyes
MARKERS = "osD^vP*"


class LearningRun(NamedTuple):
    path: Path
    settings: dict
    points: dict  # {metric: {step: success}}


def read_run(path, defaults):
    """A run folder -> LearningRun, with defaults, {setting: value}, for settings that an older run lacks. UserError."""
    path, settings = Path(path), None
    with suppress(ValueError, RecursionError):  # a damaged file
        settings = stored_settings(path)
    wrong = mismatch("config.json", settings, KINDS, optional=("analyser",))
    if wrong:
        raise UserError(f"{path} is not a run folder ({wrong}): give one that --out of sdar.py named.")
    entries = [entry for _, entry in read_lines(path / "metrics.jsonl")]
    entries = [entry for entry in entries if is_of_kind(entry.get("step"), (int,))]
    points = {name: {entry["step"]: entry[name] for entry in entries if is_of_kind(entry.get(name), (int, float))}
              for name in PANES}
    if not any(points.values()):
        raise UserError(f"{path} has no evaluation in its metrics.jsonl: leave it out.")
    return LearningRun(path, defaults | settings, points)


def grouped(found, defaults):
    """Runs of one environment -> {label: runs that differ in the seed alone}. A label is the method, who analyses, and
    the settings in which its runs differ, where they are not the default. UserError for a seed that comes twice."""
    methods, groups = defaultdict(list), defaultdict(list)
    for run in found:
        methods[method_name(run.settings)].append(run)
    for method, runs in methods.items():
        differing = [name for name in defaults if len({str(run.settings[name]) for run in runs}) > 1]
        for run in runs:
            own = [f"{name} {run.settings[name]}" for name in differing if run.settings[name] != defaults[name]]
            groups[", ".join([method, *own])].append(run)
    for label, first, second in ((label, *two) for label, runs in groups.items() for two in combinations(runs, 2)):
        if first.settings["seed"] == second.settings["seed"]:
            raise UserError(f"{first.path} and {second.path} are runs of one seed ({label}, seed "
                            f"{first.settings['seed']}), which count once: leave one out.")
    return groups


def band(runs, metric):
    """-> (steps that all runs have, [steps, 3] of mean, low, high): from three seeds on Student's 95 % interval, else
    least and most."""
    steps = sorted(set.intersection(*(set(run.points[metric]) for run in runs)))
    values = np.array([[run.points[metric][step] for run in runs] for step in steps]).reshape(len(steps), len(runs))
    if len(runs) >= 3:
        return steps, np.clip([t_interval(row) for row in values], 0, 1).reshape(-1, 3)
    return steps, np.stack([values.mean(1), values.min(1), values.max(1)], 1)


def draw(paths, out, defaults):
    """Draws the runs into the picture `out`: a row per environment, a pane per kind of evaluation; prints where each
    group ends.
    defaults: {setting: value} of the settings that tell runs apart. Raises UserError."""
    if not Path(out).suffix:
        raise UserError(f"--out must end in the kind of picture, such as .png, not be {out}.")
    check_regular(Path(out), "choose another with --out")
    optional("matplotlib", "matplotlib").use("Agg")
    from matplotlib import pyplot
    rows = defaultdict(list)
    for run in [read_run(path, defaults) for path in paths]:
        rows[run.settings["env"], data_label(run.settings.get("data"))].append(run)
    groups = {key: grouped(some, defaults) for key, some in rows.items()}
    styles = {label: (COLORS[number % len(COLORS)], MARKERS[number // len(COLORS) % len(MARKERS)])
              for number, label in enumerate(dict.fromkeys(label for some in groups.values() for label in some))}
    runs = [run for some in rows.values() for run in some]
    metrics = {name: how for name, how in PANES.items() if any(run.points[name] for run in runs)}
    figure, panes = pyplot.subplots(len(rows), len(metrics), figsize=(4.5 * len(metrics), 3.8 * len(rows)), sharey=True,
                                    squeeze=False, gridspec_kw={"hspace": 0.4, "wspace": 0.06})
    for (env, tasks), row in zip(rows, panes):
        print(f"{env} ({tasks})")
        for pane, (metric, how) in zip(row, metrics.items()):
            draw_pane(pane, groups[env, tasks], metric, styles)
            warm = " or ".join(sorted({str(run.settings.get("eval_temperature")) for run in rows[env, tasks]}))
            pane.set_title(plain(f"{env}, {how.format(warm)}\n{tasks}"), size=10)
        row[0].set_ylabel("success on the evaluation set")
        row[-1].legend(*row[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.02, 0.5),
                      frameon=False, fontsize=9)
    for pane in panes[-1]:
        pane.set_xlabel("training step")
    try:
        figure.savefig(out, dpi=120, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"The picture {out} cannot be written ({error}): choose another by --out.") from error
    pyplot.close(figure)
    print(f"drawn in {out}")


def plain(text):
    """For matplotlib, which reads what stands between two $ as mathematics."""
    return text.replace("$", r"\$")


def draw_pane(pane, groups, metric, styles):
    for label, runs in groups.items():
        (steps, values), (color, marker) = band(runs, metric), styles[label]
        if not steps:
            if any(run.points[metric] for run in runs):
                print(f"  {label}: {metric} is not drawn, since its runs have no step in common")
            continue
        seeds = {1: "one seed", 2: "2 seeds, min to max"}.get(len(runs), f"{len(runs)} seeds, 95 % t interval")
        pane.plot(steps, values[:, 0], color=color, marker=marker, ms=4, lw=1.8, label=plain(f"{label} ({seeds})"))
        if len(runs) > 1:
            pane.fill_between(steps, values[:, 1], values[:, 2], color=color, alpha=0.15, lw=0)
        mean, low, high = values[-1]
        interval = f" [{low:.3f}, {high:.3f}]" if len(runs) > 1 else ""
        print(f"  {label} ({seeds}), step {steps[-1]}: {metric} {mean:.3f}{interval}")
    pane.set_ylim(0, 1)
    pane.xaxis.get_major_locator().set_params(integer=True)
    pane.grid(alpha=0.25, lw=0.6)
    pane.spines[["top", "right"]].set_visible(False)
