"""What tools/study.py reports of its runs: measures of a learning curve, statistics over seeds, tables, a picture.

A record is what results/study.json holds of a run: part, env, arm, seed, flags, evaluation [[step, success], ...], ...
Environments and arms keep the order in which the records come.
"""

import itertools
import math
from collections import defaultdict

from lib import statistics
from lib.program import write_atomically
from lib.runs import mean

MARKS = "<!-- study: begin -->", "<!-- study: end -->"  # around the generated part of a page
NAMES = {"webshop": "WebShop", "alfworld": "ALFWorld", "search": "Search-QA"}
UNTRAINED = "untrained"  # the arm that is evaluated before any training
CONTROLS = ("no_gate_1", "no_skill_1", "shuffled_1", "other_1", "foreign_1")
# Arms that are drawn, in colours that colour-blind people tell apart.
COLORS = {"grpo": "black", "gigpo": "#e69f00", "sdar_0.01": "#56b4e9", "sdar_1": "#0072b2", "rkl_1": "#009e73",
          "opid_1": "#cc79a7", "no_gate_1": "#d55e00", "foreign_1": "0.5"}
FRONT = ("grpo", "sdar_0.01", "sdar_1", "no_gate_1", "foreign_1")  # curves of the README's picture
# From grpo's figures before the study: search half-way to its end with full batches, alfworld just below its end.
THRESHOLDS = {"webshop": 0.5, "search": 0.3, "alfworld": 0.3}


# ---------------------------------------------------------------------------------------------------------- statistics

def area(run):
    """Area under the evaluation curve by the trapezoid rule, over the length of the run: in [0, 1]."""
    curve = run["evaluation"]
    total = sum((b - a) * (y + z) / 2 for (a, y), (b, z) in itertools.pairwise(curve))
    return total / (curve[-1][0] - curve[0][0])


def training(run):
    """Mean success of the training rollouts."""
    return mean(run["training"])


def final(run):
    return run["evaluation"][-1][1]


def steps_to(run, threshold):
    """The step at which the curve first reaches the threshold, on straight lines between its evaluations; if it never
    does, its last step, a lower bound."""
    curve = run["evaluation"]
    if curve[0][1] >= threshold:
        return curve[0][0]
    for (a, y), (b, z) in itertools.pairwise(curve):
        if z >= threshold:
            return a + (threshold - y) / (z - y) * (b - a)
    return curve[-1][0]


MEASURES = {  # function of a record, its words, digits shown
    "area": (area, "Area under the evaluation curve", 3),
    "training": (training, "Success of the training rollouts, mean of all steps (skill_grpo's see skills)", 3),
    "final": (final, "Success after the last step", 3),
    "steps": (lambda run: steps_to(run, THRESHOLDS[run["env"]]),
              "Steps until success reaches {threshold}; a run that never does counts with its length", 1)}


def runs_by_regime(records):
    """-> {(part, environment): {arm: {seed: record}}} of the runs that did not fail; an evaluation begins with that of
    the untrained model under the same seed, which is a run of its own. Without that a run is left out."""
    found = {}
    before = {(one["env"], one["seed"]): one["evaluation"] for one in finished(records, UNTRAINED)}
    for one in finished(records):
        if (one["env"], one["seed"]) in before:
            evaluation = before[one["env"], one["seed"]] + one["evaluation"]
            arms = found.setdefault((one["part"], one["env"]), {})
            arms.setdefault(one["arm"], {})[one["seed"]] = one | {"evaluation": evaluation}
    return found


def finished(records, arm=None):
    """Records of runs that did not fail: of an arm, or of all that train."""
    return [one for one in records if "error" not in one and (one["arm"] == arm if arm else one["arm"] != UNTRAINED)]


def summary(records):
    """-> rows {part, env, measure, arm, seeds, reached, mean, low, high}; for arms other than grpo also
    {pairs, difference, difference_low, difference_high, p, p_sign_flip, p_holm, verdict}.

    reached: seeds that reach the threshold. Intervals are Student's over seeds, of 95 %; differences are paired by
    seed; Holm's p allows for all arms that are compared with grpo in one environment, part and measure.
    """
    return [row for (part, env), runs in runs_by_regime(records).items() for measure in MEASURES
            for row in compare(part, env, measure, runs)]


def compare(part, env, measure, runs, base="grpo"):
    """The rows of one regime and measure, arms against the base; runs: {arm: {seed: record}}."""
    threshold, function, rows = THRESHOLDS[env], MEASURES[measure][0], []
    values = {arm: {seed: function(one) for seed, one in by_seed.items()} for arm, by_seed in runs.items()}
    for arm, by_seed in values.items():
        center, low, high = statistics.t_interval(list(by_seed.values()))
        reached = sum(max(success for _, success in one["evaluation"]) >= threshold for one in runs[arm].values())
        rows.append({"part": part, "env": env, "measure": measure, "arm": arm, "seeds": len(by_seed),
                     "reached": reached, "mean": center, "low": low, "high": high})
        seeds = sorted(by_seed.keys() & values.get(base, {}).keys())
        if arm != base and seeds:
            rows[-1] |= against([by_seed[seed] for seed in seeds], [values[base][seed] for seed in seeds])
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, statistics.holm([row["p"] for row in tested])):
        row |= {"p_holm": p, "verdict": "a difference" if p < 0.05 else "no difference shown"}
    return rows


def against(values, base):
    """The comparison of an arm's values with the base's, of the same seeds in the same order."""
    difference, low, high, p = statistics.paired_t(values, base)
    return {"pairs": len(values), "difference": difference, "difference_low": low, "difference_high": high, "p": p,
            "p_sign_flip": statistics.sign_flip_p([a - b for a, b in zip(values, base)])}


# --------------------------------------------------------------------------------------------------- lines and tables

def line(one):
    """A record in one line."""
    name = f"{one['part']} {one['env']} {one['arm']} seed {one['seed']}"
    if "error" in one:
        return f"{name}: FAILED: {one['error']}"
    trained = f"training success {mean(one['training']):.3f}, " if one["training"] else ""
    curve = " ".join(f"{success:.2f}" for _, success in one["evaluation"])
    return f"{name}: {trained}evaluation {curve or 'none'} ({one['seconds']} s)"


def rates(records):
    """Training success by regime and learning rate, of all steps and of the last quarter, a line each."""
    found = defaultdict(list)
    for one in records:
        if "error" not in one:
            found[f"{one['part']} {one['env']} {one['arm']}"].append(one["training"])
    return "\n".join(
        f"{name}: training success {mean(map(mean, curves)):.3f}, last quarter "
        f"{mean(mean(curve[-math.ceil(len(curve) / 4):]) for curve in curves):.3f} ({len(curves)} seeds)"
        for name, curves in found.items())


def insert(text, page):
    """Puts text between the marks of a page, or into a new page."""
    before, _, rest = (page.read_text(encoding="utf-8") if page.exists() else "").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2] or "\n"
    write_atomically({page: f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}"})


def tables(records):
    """The generated part of docs/study.md."""
    texts, regimes = [], runs_by_regime(records)
    for (part, env), runs in regimes.items():
        texts.append(f"### Part {part}, {NAMES[env]}\n\n{regime_text(runs)}")
        for measure, (_, words, digits) in MEASURES.items():
            rows = compare(part, env, measure, runs)
            texts.append(f"{words.format(threshold=THRESHOLDS[env])}:\n\n{table(rows, measure == 'steps', digits)}")
        controlled = {arm: by_seed for arm, by_seed in runs.items() if arm in ("sdar_1", *CONTROLS)}
        if len(controlled) > 1 and "sdar_1" in controlled:
            rows = compare(part, env, "area", controlled, "sdar_1")
            texts.append(f"Controls against sdar_1, area:\n\n{table(rows, False, 3, 'sdar_1')}")
    texts += [line(one) for one in records if "error" in one]
    left_out = len(finished(records)) - sum(len(arm) for runs in regimes.values() for arm in runs.values())
    if left_out:
        texts.append(f"Left out, since the untrained model was not evaluated under their seeds: {left_out} runs.")
    return "\n\n".join(texts)


def regime_text(runs):
    """A regime in words: size, share of zero-variance groups, what its runs took; runs: {arm: {seed: record}}."""
    groups = [one["zero_variance"] for one in runs.get("grpo", {}).values()]
    records = [one for by_seed in runs.values() for one in by_seed.values()]
    flags, seconds = records[0]["flags"], sorted(one["seconds"] for one in records)
    poor = f"; {mean(groups):.0%} of grpo's groups have zero variance" if groups else ""
    return (f"{flags['tasks']} tasks x {flags['group_size']} episodes, {flags['steps']} steps, learning rate "
            f"{flags['lr']:g}{poor}. {len(records)} runs; half of them took up to {seconds[len(seconds) // 2]} s.")


def table(rows, with_reached, digits, base="grpo"):
    """Markdown; rows: of one regime and measure."""
    heads = ["arm", "seeds", *["reached"] * with_reached, "mean [95 %]", f"minus {base} [95 %]", "p", "sign-flip p",
             "Holm's p", "verdict"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = [row["arm"] + " (control)" * (row["arm"] in CONTROLS), row["seeds"]]
        cells += [row["reached"]] * with_reached
        cells += [f"{row['mean']:.{digits}f} {interval(row['low'], row['high'], f'.{digits}f')}"]
        cells += [""] * 5 if "p" not in row else [
            f"{row['difference']:+.{digits}f} "
            f"{interval(row['difference_low'], row['difference_high'], f'+.{digits}f')}",
            *("<0.0001" if row[name] < 1e-4 else f"{row[name]:.4f}" for name in ("p", "p_sign_flip", "p_holm")),
            f"**{row['verdict']}**" if row["verdict"] == "a difference" else row["verdict"]]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def interval(low, high, shape):
    return f"[{low:{shape}}, {high:{shape}}]" if math.isfinite(low) else "[unknown]"


# ------------------------------------------------------------------------------------------------------------- picture

def draw(records, path):
    """A row of panes per regime: curves of some arms with 95 % bands over seeds; all arms' differences from grpo."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    regimes = runs_by_regime(records)
    heights = [max(3.0, 0.8 + 0.19 * len(runs)) for runs in regimes.values()]
    figure, panes = pyplot.subplots(len(regimes), 3, figsize=(13, sum(heights) + 0.3), squeeze=False,
                                    layout="constrained", height_ratios=heights)
    for ((part, env), runs), (left, *right) in zip(regimes.items(), panes):
        draw_curves(left, runs, f"Part {part}, {NAMES[env]}")
        for pane, measure in zip(right, ("area", "final")):
            rows = [row for row in compare(part, env, measure, runs) if "p" in row]
            draw_differences(pane, rows, f"{MEASURES[measure][1]}, minus grpo's")
    figure.suptitle("Means over seeds with 95 % intervals. Differences are paired by seed; filled: Holm's p < 0.05; "
                    "grey or dashed: a control.", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_front(records, path):
    """Part A's curves of a few arms, a pane per environment."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    found = {env: runs for (part, env), runs in runs_by_regime(records).items() if part == "A"}
    figure, panes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), squeeze=False, layout="constrained")
    for (env, runs), pane in zip(found.items(), panes[0]):
        draw_curves(pane, {arm: runs[arm] for arm in FRONT if arm in runs}, NAMES[env])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_curves(pane, runs, title):
    for arm, color in COLORS.items():
        if arm in runs:
            curves = [one["evaluation"] for one in runs[arm].values()]
            steps, points = [step for step, _ in curves[0]], zip(*([success for _, success in one] for one in curves))
            centers, lows, highs = zip(*map(statistics.t_interval, points))
            pane.plot(steps, centers, "--" if arm in CONTROLS else "-", color=color, marker="o", ms=3,
                      label=f"{arm}, {len(curves)} seed{'s' * (len(curves) > 1)}")
            if len(curves) > 1:
                pane.fill_between(steps, lows, highs, color=color, alpha=0.12, lw=0)
    pane.set(xlabel="training step", ylabel="success on unseen tasks, T=0.4")
    pane.set_ylim(0, min(1, pane.get_ylim()[1]))
    pane.set_title(title, fontsize="medium", fontweight="bold")
    pane.xaxis.get_major_locator().set_params(integer=True)
    pane.grid(alpha=0.3)
    pane.legend(fontsize="x-small")


def draw_differences(pane, rows, title):
    """A line per arm, with its 95 % interval: filled where Holm's p is below 0.05, grey for a control."""
    pane.axvline(0, color="0.6", lw=1)
    for height, row in enumerate(rows):
        color = "0.5" if row["arm"] in CONTROLS else "#0072b2"
        if math.isfinite(row["difference_low"]):
            pane.plot([row["difference_low"], row["difference_high"]], [height, height], color=color, lw=1.5)
        pane.plot(row["difference"], height, "o", color=color, mfc=color if row["p_holm"] < 0.05 else "white", ms=5)
    pane.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize="small")
    pane.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    pane.locator_params(axis="x", nbins=5)
    pane.set_title(title, fontsize="small")
    pane.grid(axis="x", alpha=0.3)
