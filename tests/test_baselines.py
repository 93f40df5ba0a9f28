"""lib/baselines.py by hand-computed cases; the algebra of gates, surrogates and divergences by enumeration."""

import math

import pytest
import torch

import kernels
import sdar
from lib.baselines import gigpo_advantages, opid_advantages, rlsd_advantages, skill_sd_loss

numbers = lambda *values: torch.tensor(values, dtype=torch.float64)


def random_rows(seed, *shape):
    rng = torch.Generator().manual_seed(seed)
    return -2 * torch.rand(shape, generator=rng, dtype=torch.float64)


# Group 0: episode 0 sees a, b, c and gets 10 at the end, episode 1 sees a, b and gets nothing. Group 1: episode 2 sees
# a and gets 4, episode 3 sees a twice and gets 2 at the end. By time, so that episodes interleave:
EPISODES, GROUPS = [0, 1, 2, 3, 0, 1, 3, 0], [0, 0, 1, 1, 0, 0, 1, 0]
OBSERVATIONS, REWARDS = list("aaaabbac"), numbers(0, 0, 4, 0, 0, 0, 2, 10)
# With gamma 1/2, G is 2.5 0 4 1 5 0 2 10; means are 1.25 (group 0, a), 2.5 (group 0, b), 7/3 (group 1, a).
STEP = numbers(1.25, -1.25, 5 / 3, -4 / 3, 2.5, -2.5, -1 / 3, 0)
STD = numbers(*[1.25 * math.sqrt(2)] * 2, *[math.sqrt(7 / 3)] * 2, *[2.5 * math.sqrt(2)] * 2, math.sqrt(7 / 3), 1)
# Returns are 10 and 0, and 4 and 2: each is its standard deviation / sqrt(2) from the mean.
EPISODE = numbers(1, -1, 1, -1, 1, -1, -1, 1) / math.sqrt(2)


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("std, step", [(False, STEP), (True, STEP / STD)])
def test_gigpo_adds_the_advantages_of_episode_and_step_as_computed_by_hand(weight, std, step):
    got = gigpo_advantages(REWARDS, EPISODES, GROUPS, OBSERVATIONS, gamma=0.5, weight=weight, divide_by_std=std)
    torch.testing.assert_close(got, EPISODE + weight * step, rtol=2e-6, atol=0)


def step_part(rewards, episodes, groups, observations, **options):
    rest = rewards, episodes, groups, observations
    return (gigpo_advantages(*rest, **options) - gigpo_advantages(*rest, weight=0.0, **options)).tolist()


def test_gigpo_gives_zero_to_equal_returns_and_to_an_observation_that_occurs_once_in_its_group():
    assert step_part(numbers(1, 0), [0, 1], [0, 0], ["page", "page"]) == pytest.approx([0.5, -0.5])
    for groups, observations in (([0, 0], ["page", "page "]), ([0, 1], ["page", "page"])):
        assert step_part(numbers(1, 0), [0, 1], groups, observations) == [0, 0]
    assert step_part(numbers(*[0.1] * 7), range(7), [3] * 7, ["x"] * 7, divide_by_std=True) == [0] * 7


def test_gigpo_discounts_a_reward_by_095_per_turn_within_its_episode_alone():
    result = step_part(numbers(0, 0, 0, 10, 10), [0, 0, 1, 0, 1], [0] * 5, ["start", "x", "start", "y", "z"])
    assert result == pytest.approx([-0.2375, 0, 0.2375, 0, 0])  # +-(10 * 0.95 - 10 * 0.95^2) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gigpo_with_weight_zero_is_grpo_bit_for_bit(dtype):
    rng = torch.Generator().manual_seed(0)
    episodes = torch.randint(12, (90,), generator=rng)
    groups, rewards = episodes % 3, torch.randn(90, generator=rng).to(dtype)
    observations = [f"page {i}" for i in torch.randint(5, (90,), generator=rng)]
    returns = torch.zeros(12, dtype=dtype).index_add_(0, episodes, rewards)
    grpo = sdar.group_advantages(returns, torch.arange(12) % 3)[episodes]
    assert torch.equal(gigpo_advantages(rewards, episodes, groups, observations, weight=0.0), grpo)
    assert not torch.equal(gigpo_advantages(rewards, episodes, groups, observations), grpo) and grpo.dtype == dtype


def test_gigpo_numbers_episodes_within_their_group_takes_whole_rewards_and_refuses_unequal_lengths():
    alike = gigpo_advantages([10, 0, 0, 10], [0, 1, 0, 1], [0, 0, 1, 1], list("abcd"))
    assert torch.equal(alike, gigpo_advantages([10.0, 0.0, 0.0, 10.0], [0, 1, 2, 3], [0, 0, 1, 1], list("abcd")))
    with pytest.raises(ValueError, match=r"one entry per turn, got \[2, 2, 1, 2\]"):
        gigpo_advantages([1.0, 2.0], [0, 1], [0], ["x", "y"])


def test_rlsd_scales_by_the_teachers_ratio_clipped_and_inverted_for_negative_advantages_as_computed_by_hand():
    logp, teacher = numbers(-1, -1, -9, -1, -1)[None], numbers(-1, -1, -1, -9, -1)[None]
    teacher[0, :2] += numbers(math.log(1.1), -math.log(1.1))
    for sign, w in ((1, numbers(1.1, 1 / 1.1, 1.2, 0.8, 1)), (-1, numbers(1 / 1.1, 1.1, 0.8, 1.2, 1))):
        got = rlsd_advantages(numbers(2.0 * sign), logp, teacher, torch.ones(1, 5), mix=0.5)
        torch.testing.assert_close(got, 2 * sign * (0.5 + 0.5 * w)[None])
    wide = rlsd_advantages(numbers(1), logp, teacher, torch.ones(1, 5), mix=1.0, clip=0.05)
    torch.testing.assert_close(wide, numbers(1.05, 0.95, 1.05, 0.95, 1)[None])


def test_rlsd_at_mix_zero_or_without_a_gap_is_grpo_bit_for_bit_and_zero_stays_zero():
    logp, teacher, a = random_rows(0, 4, 6).float(), random_rows(1, 4, 6).float(), torch.tensor([0.3, -1.7, 0.0, 1e-3])
    mask, grpo = torch.ones(4, 6), a[:, None].expand(4, 6)
    assert torch.equal(rlsd_advantages(a, logp, teacher, mask, mix=0.0), grpo)
    assert torch.equal(rlsd_advantages(a, logp, logp, mask, mix=0.3), grpo)
    changed = rlsd_advantages(a, logp.requires_grad_(), teacher.requires_grad_(), mask, mix=0.5)
    assert (changed != grpo).sum() == 18 and torch.equal(changed.sign(), grpo.sign()) and not changed.requires_grad


def test_skill_sd_in_written_numbers_with_exponents_bounded_from_above_alone():
    cases = [  # d, log rho -> rho k3
        (math.log(2), 0.0, math.log(2) - 0.5), (-math.log(2), math.log(3), 3 * (1 - math.log(2))), (0.0, 5.0, 0.0),
        (-50.0, 0.0, math.exp(20) - 51), (50.0, 0.0, math.exp(-50) + 49), (1.0, 30.0, math.exp(10) / math.e),
        (1.0, -30.0, math.exp(-30) / math.e)]
    for d, log_rho, value in cases:
        loss, metrics = skill_sd_loss(numbers(-1), numbers(-1 - d), numbers(-1 - log_rho), numbers(1), num_tokens=4)
        assert loss.item() == pytest.approx(value / 4, rel=1e-12)
        rho = math.exp(min(log_rho, 10))
        hand = {"skill_sd/rho": rho / 4, "skill_sd/k3": value / rho / 4, "skill_sd/gap": -d / 4}
        assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(hand)


def test_skill_sd_sends_gradient_through_rho_and_k3_to_the_student_alone():
    logp, teacher, old = (random_rows(seed, 3, 4).requires_grad_() for seed in range(3))
    mask = (random_rows(3, 3, 4) > -1.5).double()
    loss = lambda x: skill_sd_loss(x, teacher, old, mask, num_tokens=7)[0]
    assert torch.autograd.gradcheck(loss, logp)  # by finite differences
    loss(logp).backward()
    assert teacher.grad is None and old.grad is None and logp.grad.norm() > 0.01


def test_skill_sd_on_policy_has_k3s_value_and_the_gradient_of_plain_self_distillation():
    logp, teacher, mask = random_rows(0, 3, 4).requires_grad_(), random_rows(1, 3, 4), torch.ones(3, 4)
    loss = skill_sd_loss(logp, teacher, logp.detach(), mask, num_tokens=12)[0]
    assert torch.equal(loss.detach(), sdar.kl_loss(logp.detach(), teacher, mask, num_tokens=12))
    ours, = torch.autograd.grad(loss, logp)
    opsd, = torch.autograd.grad(sdar.sdar_loss(logp, teacher, mask, surrogate="opsd")[0], logp)
    torch.testing.assert_close(ours, opsd)  # d of each token: rho's part completes k3's


def test_opid_adds_each_shift_with_a_weight_of_its_own_and_clips_nothing():
    one, mask = torch.ones(1, 1), torch.ones(1, 1)
    added = lambda a, episode, step, **weights: opid_advantages(numbers(a), one * episode, one * step, mask, **weights)
    assert added(0, 1, 0, episode_weight=0.25, step_weight=9).item() == 0.25
    assert added(0, 0, 2, episode_weight=9, step_weight=0.5).item() == 1.0
    assert added(0, 1, 2).item() == pytest.approx(0.003) and added(-1, 1, 2).item() == pytest.approx(-0.997)
    assert added(2, -1e4, 0).item() == pytest.approx(-8)


def test_opid_with_weights_zero_is_grpo_bit_for_bit_and_in_a_tied_group_the_shift_alone():
    a, episode, step = random_rows(0, 4), random_rows(1, 4, 6), random_rows(2, 4, 6)
    routed = torch.tensor([True, False, True, False])[:, None]  # a row has one source
    episode, step, mask = episode.where(routed, 0), step.where(~routed, 0), torch.ones(4, 6)
    unchanged = opid_advantages(a, episode, step, mask, episode_weight=0.0, step_weight=0.0)
    assert torch.equal(unchanged, a[:, None].expand(4, 6))
    tied = opid_advantages(torch.zeros_like(a), episode.requires_grad_(), step, mask, episode_weight=0.5)
    assert torch.equal(tied, torch.where(routed, 0.5 * episode.detach(), 0.001 * step)) and not tied.requires_grad


FUNCTIONS = {  # of advantages, logp, teacher_logp, old_logp, mask
    "rlsd": lambda a, x, y, z, mask: rlsd_advantages(a, x, y, mask, mix=0.5),
    "opid": lambda a, x, y, z, mask: opid_advantages(a, x, y, mask),
    "skill_sd": lambda a, x, y, z, mask: skill_sd_loss(x, y, z, mask, num_tokens=9)[0],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_masked_may_be_anything_no_input_changes_and_flattened_tokens_give_the_same(function, odd):
    x, y, z = (random_rows(seed, 3, 5) for seed in range(3))
    mask, a = (random_rows(3, 3, 5) > -1.2).double(), numbers(1, -2, 0.5)
    assert 0 < mask.sum() < 15
    wild = [v.masked_fill(mask == 0, odd).requires_grad_() for v in (x, y, z)]
    spread = a[:, None].expand(3, 5).masked_fill(mask == 0, odd)  # an advantage for each token
    inputs = spread, *wild, mask
    before = [v.detach().clone() for v in inputs]
    tame, result = function(a, x.requires_grad_(), y, z, mask), function(*inputs)
    assert torch.equal(result, tame) and torch.equal(function(a, *wild, mask.bool()), tame)
    assert torch.equal(function(*(v.flatten() for v in inputs)), tame.flatten() if tame.dim() else tame)
    assert all(torch.equal(v.nan_to_num(7), w.nan_to_num(7)) for v, w in zip(inputs, before))
    if tame.requires_grad:
        (tame + result).backward()
        assert torch.equal(x.grad, wild[0].grad) and (x.grad != 0).sum() == mask.sum()
    else:
        assert (result[mask == 0] == 0).all()


# ---------------------------------------------------------------------------- algebra on a whole vocabulary

def every_token(vocab=9, width=4, **options):
    """One state with each token as its target -> hidden state, head, GapGate, student's and teacher's probabilities."""
    rng = torch.Generator().manual_seed(7)
    student, teacher, weight = (torch.randn(n, width, generator=rng, dtype=torch.float64) for n in (1, 1, vocab))
    student.requires_grad_()
    states = (x.expand(vocab, -1) for x in (student, teacher))
    out = kernels.fused_gap_gate(*states, weight, torch.arange(vocab), **options)
    p, teacher_p = ((hidden @ weight.T).softmax(-1)[0].detach() for hidden in (student, teacher))
    return student, weight, out, p, teacher_p


WEIGHTS = {"mle": lambda d, g: g, "centered": lambda d, g: g - 0.5, "gap": lambda d, g: g * d, "opsd": lambda d, g: d}
GATES = {"gap": lambda d, h, beta: torch.sigmoid(beta * d), "entropy": lambda d, h, beta: torch.sigmoid(beta * h),
         "soft_or": lambda d, h, beta: torch.sigmoid(beta * (h + d - h * d)), "none": lambda d, h, beta: numbers(1)}


@pytest.mark.parametrize("beta", [5.0, 0.0])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("surrogate", WEIGHTS)
def test_the_expected_gradient_over_the_vocabulary_is_the_covariance_of_weight_and_score(surrogate, gate, beta):
    student, weight, out, p, teacher_p = every_token(gate=gate, beta=beta)
    d, h = (teacher_p / p).log(), -(p * p.log()).sum()
    w = WEIGHTS[surrogate](d, GATES[gate](d, h, beta))
    want = -(p * (w - (p * w).sum())) @ weight  # -E[w grad logp]; the mask as probabilities: an expectation
    sdar.sdar_loss(out.logp, out.teacher_logp, p, num_tokens=1, surrogate=surrogate, gate=out.gate)[0].backward()
    torch.testing.assert_close(student.grad[0], want, rtol=1e-12, atol=1e-15)
    blind = surrogate in ("mle", "centered") and (gate in ("none", "entropy") or beta == 0)  # w is one constant
    assert (student.grad.abs().max() < 1e-15) == blind


@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_a_divergence_and_its_gradient_are_those_of_the_enumerated_distributions(divergence):
    student, weight, out, p, q = every_token(divergence=divergence)
    kl, m = lambda first, second: (first * (first / second).log()).sum(), (p + q) / 2
    value, slope = {  # slope: of the value w.r.t. each of p, except a constant, which a softmax ignores
        "rkl": (kl(p, q), (p / q).log()), "fkl": (kl(q, p), -q / p),
        "jsd": ((kl(p, m) + kl(q, m)) / 2, (p / m).log() / 2)}[divergence]
    torch.testing.assert_close(out.divergence.detach(), value.expand_as(p), rtol=1e-12, atol=0)
    out.divergence[0].backward()
    torch.testing.assert_close(student.grad[0], (p * (slope - (p * slope).sum())) @ weight, rtol=1e-11, atol=1e-14)


def test_plain_self_distillation_has_the_gradient_of_the_reverse_kl_in_expectation():
    student, _, out, p, _ = every_token(divergence="rkl")
    loss = sdar.sdar_loss(out.logp, out.teacher_logp, p, num_tokens=1, surrogate="opsd")[0]
    sampled, exact = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, out.divergence[0]))
    torch.testing.assert_close(sampled, exact, rtol=1e-12, atol=1e-15)
