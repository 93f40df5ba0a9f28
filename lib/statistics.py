"""Statistics of evaluations and of training runs: intervals, tests of differences, sample sizes. numpy only.

All intervals are 95 % intervals, all tests two-sided. What is random (bootstrap, sign flips) has a fixed seed, so that
a result can be repeated. Few seeds are the rule here: what resamples them, or takes their standard error, allows for
their number by Student's t.
"""

import math
from statistics import NormalDist

import numpy as np

Z, Z_POWER = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8)  # of a 95 % interval, of 80 % power
RESAMPLES, BLOCK = 10_000, 100  # resamples of a bootstrap, and how many are held in memory at once
EXACT = 16  # differences of which all 2^n sign patterns are tried


# ----------------------------------------------------------------------------------------------------- one rate or mean

def wilson(successes, n):
    """Wilson's interval of a rate of `successes` in n independent trials -> (low, high). Wilson 1927."""
    rate, shrink = successes / n, 1 + Z * Z / n
    centre = (rate + Z * Z / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def cluster_bootstrap(table):
    """Mean of table [seeds, tasks], and its percentile interval, resampling both -> (mean, low, high).

    The pigeonhole bootstrap of a crossed design (Owen 2007): a resample takes seeds and, independently, tasks, and
    each pair that it took. A single seed is kept: then the interval holds for this training run alone.
    """
    table = np.asarray(table, dtype=np.float64)
    return float(table.mean()), *percentiles(resampled_means(table, stream=0))


def cluster_difference(first, second):
    """Mean of first [seeds, tasks] minus that of second [other seeds, same tasks] -> (difference, low, high).

    A resample takes the same tasks for both sides, which pairs them, and seeds for each on its own. Of equal seeds,
    cluster_bootstrap(first - second) pairs the seeds, too.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    means = resampled_means(first, stream=0) - resampled_means(second, stream=1)
    return float(first.mean() - second.mean()), *percentiles(means)


def resampled_means(table, stream):
    """Means of RESAMPLES resamples of table [seeds, tasks]; tasks are drawn alike for tables of one width.

    n values resampled scatter too little, by sqrt((n - 1) / n), and a percentile is a normal quantile where Student's
    would be due: with a handful of seeds an interval would miss far too often. So what distinguishes the seeds, the
    deviations of their means, is first stretched by both factors (Hesterberg 2015, "expanded percentiles").
    """
    seeds, tasks = table.shape
    if seeds > 1:
        stretch = t_quantile(seeds - 1) / Z * math.sqrt(seeds / (seeds - 1))
        table = table + (stretch - 1) * (table.mean(1, keepdims=True) - table.mean())
    draw_tasks, draw_seeds, means = np.random.default_rng(0), np.random.default_rng([1, stream]), []
    for _ in range(RESAMPLES // BLOCK):
        by_seed = table[:, draw_tasks.integers(tasks, size=(BLOCK, tasks))].mean(2)  # [seeds, BLOCK]
        chosen = draw_seeds.integers(seeds, size=(seeds, BLOCK))
        means.append(np.take_along_axis(by_seed, chosen, 0).mean(0))
    return np.concatenate(means)


def percentiles(means):
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


# -------------------------------------------------------------------------------------------------- several attempts

def pass_at_k(successes, n, k):
    """Chance that at least one of k attempts at a task succeeds, unbiased from n >= k attempts. Chen et al. 2021
    (arXiv 2107.03374)."""
    return 1 - math.comb(n - successes, k) / math.comb(n, k)


def pass_hat_k(successes, n, k):
    """pass^k: chance that all of k attempts at a task succeed, unbiased from n >= k attempts. Yao et al. 2024
    (tau-bench, arXiv 2406.12045)."""
    return math.comb(successes, k) / math.comb(n, k)


# ---------------------------------------------------------------------------------------------------------- Student's t

def t_p(t, df):
    """P(|T| > |t|) of Student's t with a whole number df >= 1 of degrees of freedom, with an absolute error of 1e-14:
    the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4, in the angle whose tangent is t / sqrt(df)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if df % 2:
        terms = np.cumprod([math.cos(angle), *(square * 2 * j / (2 * j + 1) for j in range(1, df // 2))])
        inside = 2 / math.pi * (angle + sine * float(terms.sum()) * (df > 1))
    else:
        inside = sine * float(np.cumprod([1.0, *(square * (2 * j - 1) / (2 * j) for j in range(1, df // 2))]).sum())
    return max(1 - inside, 0.0)


def t_quantile(df):
    """The t with P(|T| > t) = 0.05, by bisection of the same angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p(math.sqrt(df) * math.tan(middle), df) > 0.05 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def t_interval(values):
    """Student's interval of the mean of independent values, such as one per seed -> (mean, low, high).

    A single value says nothing of the scatter: its interval is (-inf, inf).
    """
    values = np.asarray(values, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    half = t_quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return mean, mean - half, mean + half


def paired_t(first, second):
    """Paired t-test of two lists in one order, such as one value per seed -> (mean of first - second, low, high, p).

    A single pair has the interval (-inf, inf) and p 1. Equal differences have no scatter to judge them by: then the
    interval is that, too, and p the sign flips', 2 / 2^n.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    mean, low, high = t_interval(differences)
    n = len(differences)
    if n == 1 or mean == 0:
        return mean, low, high, 1.0
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error < 1e-12 * abs(mean):  # rounding alone
        return mean, -math.inf, math.inf, 2 / 2 ** n
    return mean, low, high, t_p(mean / error, n - 1)


# ------------------------------------------------------------------------------------------------- tests of differences

def mcnemar(first, second):
    """Exact p of McNemar's test on two lists of won or lost, in one order of tasks.

    Tasks that only one side won are a fair coin if the sides are equally good; the others say nothing. McNemar 1947.
    """
    only_first = sum(bool(a) and not b for a, b in zip(first, second))
    only_second = sum(bool(b) and not a for a, b in zip(first, second))
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2 ** n)


def sign_flip_p(differences):
    """Permutation p of the mean of paired differences: without an effect each may as well have the other sign.

    All sign patterns of up to EXACT differences, else RESAMPLES random ones. n pairs give no p below 2 / 2^n.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n, floor = len(differences), abs(differences.sum()) - 1e-12 * np.abs(differences).sum()  # sums are rounded
    if n <= EXACT:
        sums = np.zeros(1)
        for value in differences:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= floor).mean())
    rng = np.random.default_rng(0)
    sums = np.concatenate([rng.choice((-1.0, 1.0), size=(BLOCK, n)) @ differences for _ in range(RESAMPLES // BLOCK)])
    return float((1 + (np.abs(sums) >= floor).sum()) / (1 + RESAMPLES))


def holm(p_values):
    """p-values adjusted for their number, in the same order: below 0.05 they bound the chance of any false one. Holm
    1979."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def sample_size(difference, variance, least=2):
    """How many pairs, of tasks or of seeds, would show a mean difference this large with 80 % power: `least` or more;
    inf for 0, and of an infinite variance.

    n = (z_0.975 + z_0.8)^2 variance / difference^2, with the variance of the paired differences: the normal
    approximation, as in Miller 2024 (arXiv 2411.00640). It takes the difference seen for the true one.
    """
    exact = (Z + Z_POWER) ** 2 * variance / difference ** 2 if difference else math.inf
    return max(least, math.ceil(exact)) if math.isfinite(exact) else math.inf
