"""Tests of lib/statistics.py, against numbers computed by hand, by enumeration and by other programs, and coverage."""

import itertools
import math

import numpy as np
import pytest

from lib import statistics


def test_wilson_intervals_agree_with_known_ones_and_end_1_96_standard_errors_from_the_rate():
    for successes, n, *known in ((8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)):
        assert statistics.wilson(successes, n) == pytest.approx(known, abs=1e-4)
    for successes, n in ((45, 128), (1, 7), (120, 121)):
        for end in statistics.wilson(successes, n):
            assert abs(successes / n - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, rel=1e-5)


def test_a_bootstrap_interval_is_as_wide_as_the_normal_one_repeatable_and_covers_as_often_as_it_says():
    values = np.random.default_rng(1).normal(0.3, 2.0, size=400)
    low, high = statistics.cluster_bootstrap([values])[1:]
    half = statistics.Z * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert statistics.cluster_bootstrap([values])[1:] == (low, high)
    rng = np.random.default_rng(2)
    intervals = [statistics.cluster_bootstrap([rng.exponential(1.0, size=60)])[1:] for _ in range(100)]
    assert 87 <= sum(low <= 1.0 <= high for low, high in intervals) <= 99


def simulated(rng, seeds, tasks, by_seed, by_task):
    """A table [seeds, tasks] of mean 0: an effect of each seed, one of each task, and noise of 0.3."""
    return (by_seed * rng.normal(size=(seeds, 1)) + by_task * rng.normal(size=tasks)
            + 0.3 * rng.normal(size=(seeds, tasks)))


@pytest.mark.parametrize("seeds, by_seed, by_task", [(3, 0.3, 0.1), (3, 0.0, 0.5), (5, 0.1, 0.5), (10, 0.1, 0.5)])
def test_intervals_over_seeds_and_tasks_cover_the_truth_whichever_of_them_varies(
        monkeypatch, seeds, by_seed, by_task):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, inside = np.random.default_rng(3), 0
    for _ in range(150):
        mean, low, high = statistics.cluster_bootstrap(simulated(rng, seeds, 64, by_seed, by_task))
        inside += low <= 0 <= high
        assert low <= mean <= high
    assert inside >= 0.91 * 150  # of 0.95, by 2.3 standard errors; three seeds by plain percentiles: 0.75


def test_a_difference_pairs_the_tasks_and_lets_each_side_have_seeds_of_its_own():
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 5.0, size=50)  # the same for both sides: it cancels
    first, second = (hard + rng.normal(mean, 0.1, size=(seeds, 50)) for mean, seeds in ((1.0, 4), (0.0, 6)))
    difference, low, high = statistics.cluster_difference(first, second)
    assert difference == pytest.approx(first.mean() - second.mean()) and 0.8 < low < difference < high < 1.2
    equal = statistics.cluster_difference(np.tile(hard, (4, 1)), np.tile(hard, (6, 1)))
    assert equal == pytest.approx((0, 0, 0), abs=1e-12)
    by_seed = np.repeat([[0.0], [1.0], [2.0]], 8, axis=1)
    assert statistics.cluster_difference(by_seed, by_seed)[1] < -1  # the seeds of two sides do not cancel


def test_pass_at_k_and_pass_hat_k_are_the_shares_of_all_choices_of_k_attempts():
    for attempts in itertools.product((0, 1), repeat=5):
        for k in range(1, 6):
            chosen = list(itertools.combinations(attempts, k))
            n, c = len(chosen), sum(attempts)
            assert statistics.pass_at_k(c, 5, k) == pytest.approx(sum(map(any, chosen)) / n)
            assert statistics.pass_hat_k(c, 5, k) == pytest.approx(sum(map(all, chosen)) / n)


def test_t_quantiles_are_those_of_the_tables_and_p_values_those_of_closed_forms():
    table = {1: 12.7062047362, 2: 4.3026527297, 3: 3.1824463053, 4: 2.7764451052, 5: 2.5705818356, 9: 2.2621571628,
             10: 2.2281388520, 30: 2.0422724563, 100: 1.9839715185, 1000: 1.9623390808}
    for df, known in table.items():
        assert statistics.t_quantile(df) == pytest.approx(known, abs=1e-8)
    for t in (0.0, 0.3, 1.0, -2.5, 40.0):
        assert statistics.t_p(t, 1) == pytest.approx(1 - 2 * math.atan(abs(t)) / math.pi, abs=1e-13)  # Cauchy's
        assert statistics.t_p(t, 2) == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t), abs=1e-13)
    assert statistics.t_p(2.0, 7) == pytest.approx(0.085619, abs=1e-6)


def test_paired_t_agrees_with_a_published_example():
    drug = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]  # Student 1908, hours of sleep: t 4.0621, df 9
    other = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    mean, low, high, p = statistics.paired_t(drug, other)
    assert (mean, low, high, p) == pytest.approx((1.58, 0.7001142, 2.4598858, 0.00283289), abs=1e-7)
    assert statistics.t_interval(np.subtract(drug, other)) == (mean, low, high)
    assert statistics.paired_t([0.3], [0.1])[1:] == (-math.inf, math.inf, 1.0)
    assert statistics.paired_t([1, 2], [1, 2]) == (0, 0, 0, 1)
    for first in ([0.3, 0.7], [1.0, 2.0]):  # equal differences from two seeds show nothing, rounded or not
        _, *interval, p = statistics.paired_t(first, [first[0] - 0.1, first[1] - 0.1])
        assert interval == [-math.inf, math.inf] and p == 0.5


def test_mcnemar_is_the_two_sided_binomial_of_the_discordant_tasks():
    first, second = [1] * 8 + [0] * 2 + [1] * 50, [0] * 8 + [1] * 2 + [1] * 50
    assert statistics.mcnemar(first, second) == pytest.approx(2 * (1 + 10 + 45) / 1024)  # 0.109375
    assert statistics.mcnemar(second, first) == statistics.mcnemar(first, second)
    assert statistics.mcnemar([1, 0, 1], [1, 0, 1]) == statistics.mcnemar([1, 0], [0, 1]) == 1.0


def test_sign_flips_count_the_patterns_as_extreme_as_what_was_seen_and_many_are_sampled():
    assert statistics.sign_flip_p([1, 2, 3]) == statistics.sign_flip_p([-1, -2, -3]) == 2 / 8
    assert statistics.sign_flip_p([1, 2, -3]) == 1.0
    assert statistics.sign_flip_p([0.1, 0.2, 0.3, -0.1]) == 6 / 16  # 0.1 + 0.3 + 0.1 is not 0.5, but counts
    values = np.random.default_rng(5).normal(0.2, 1.0, size=40)
    t_test = statistics.paired_t(values, np.zeros(40))[3]
    assert statistics.sign_flip_p(values) == pytest.approx(t_test, abs=0.02) and t_test < 0.5
    assert statistics.sign_flip_p(np.ones(40)) == 1 / 10_001


def test_holm_steps_down_keeps_the_order_and_is_never_less_than_before():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's own way
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []


def test_the_sample_size_gives_80_percent_power():
    assert statistics.sample_size(0.1, 0.25) == statistics.sample_size(-0.1, 0.25) == 197  # 7.849 * 25 = 196.2
    assert statistics.sample_size(0.0, 0.25) == math.inf
    rng, n = np.random.default_rng(6), statistics.sample_size(0.4, 1.0)
    means = rng.normal(0.4, 1.0, size=(4000, n)).mean(1)
    assert (means * math.sqrt(n) > statistics.Z).mean() == pytest.approx(0.8, abs=0.03)
