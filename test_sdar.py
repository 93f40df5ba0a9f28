"""Tests of the method, on CPU, in the order of the equations: advantages, policy loss, KL, gate and distillation;
packing, training step, prompts and skills, rollout; the loss block and README's snippets. Other tests are in tests/.
"""

import copy
import dataclasses
import math
import random
import re
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import envs
import kernels
import sdar
from conftest import config, own_logp, same, script
from lib import folders, models
from lib.packing import width

NO_TEACHER = {"sdar_coef": 0.0, "teacher": "none", "retrieval": "none"}
numbers = lambda *values: torch.tensor(values, dtype=torch.float64)
all_gaps = lambda gaps, rows: [gap for row in rows for gap in gaps[row][0]]


def update(policy, rows, cfg, optimizer=torch.optim.AdamW, step=0):
    """One train_step on copies -> (parameters, their last gradients, {row: (gap, gate)}, metrics)."""
    policy = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    metrics, gaps = sdar.train_step(policy, optimizer(policy.model.parameters(), lr=cfg.lr), rows, cfg, step)
    named = dict(policy.model.named_parameters())
    return ({n: p.detach() for n, p in named.items()}, torch.cat([p.grad.flatten() for p in named.values()]), gaps,
            metrics)


# -------------------------------------------------------------------------------------------------- eq. (1): advantages

def test_advantages_of_a_group_computed_by_hand():
    returns, groups = numbers(10, 10, 0, 0, 0, 0), torch.tensor([7, 3, 7, 3, 7, 7])  # in any order
    # 10, 0, 0, 0: mean 2.5, unbiased variance (56.25 + 3 * 6.25) / 3 = 25.  10, 0: mean 5, unbiased variance 50.
    hand = [7.5 / 5, 5 / math.sqrt(50), -0.5, -5 / math.sqrt(50), -0.5, -0.5]
    assert sdar.group_advantages(returns, groups).tolist() == pytest.approx(hand, rel=1e-6)
    assert sdar.group_advantages(returns, groups, eps=5.0)[[0, 2]].tolist() == pytest.approx([0.75, -0.25])


def test_equal_returns_and_groups_of_one_get_exactly_zero():
    for returns, groups in (([0.1] * 7, [0] * 7), ([10.0, 10.0], [4, 4]), ([10.0], [2]), ([3.0, 9.0], [0, 1])):
        assert sdar.group_advantages(torch.tensor(returns), torch.tensor(groups)).tolist() == [0.0] * len(returns)


def episodes_by_hand(validity, won):
    """Episodes of one group; validity[i] lists which turns of episode i are valid."""
    context = sdar.Context("task", "fashion", (), "page", ())
    turn = lambda valid: sdar.Turn(context, (5, 6), sdar.Response((7, 2), (-1.0, -1.0), "end"), "", "", valid)
    return [sdar.Episode(sdar.Task("train", 0, 0), "fashion", [turn(v) for v in valid], won=w, score=float(w))
            for valid, w in zip(validity, won)]


@pytest.mark.parametrize("stats, won, hand", [
    ("episode", True, [math.sqrt(1 / 2), math.sqrt(1 / 2) - 0.25, -math.sqrt(1 / 2)]),
    ("episode", False, [0, -0.25, 0]),  # all lost: only the format is trained
    ("turn", False, [1 / math.sqrt(3), -2 / math.sqrt(3), 1 / math.sqrt(3)])])  # 0, -0.25, 0: std 0.25 / sqrt(3)
def test_invalid_turns_are_penalised_after_the_statistics_or_inside_as_in_the_released_code(policy, stats, won, hand):
    episodes = episodes_by_hand([[True, False], [True]], [won, False])
    cfg = config(**NO_TEACHER, advantage_stats=stats, invalid_penalty=0.25)
    rows, metrics = sdar.make_rows(policy, cfg, episodes, {})
    assert [row.advantage for row in rows] == pytest.approx(hand, rel=1e-4)
    assert metrics["grpo/zero_variance_groups"] == (not won)


def test_the_return_is_ten_for_a_win_or_ten_times_the_score():
    episode = sdar.Episode(sdar.Task("train", 0, 0), "fashion", [], won=False, score=0.75)
    assert sdar.episode_return(config(), episode) == 0 and sdar.episode_return(config(reward="score"), episode) == 7.5
    assert sdar.episode_return(config(), dataclasses.replace(episode, won=True, score=1.0)) == 10


# ------------------------------------------------------------------------------------------------- eq. (2): policy loss

def policy_gradient(ratio, advantage, **kwargs):
    logp = numbers(math.log(ratio))[None].requires_grad_()
    loss, _ = sdar.policy_loss(
        logp, torch.zeros_like(logp), numbers(advantage), torch.ones_like(logp), num_tokens=1, **kwargs)
    loss.backward()
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0),  # on-policy: value -A, gradient -A grad logp
    (1.5, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -0.5),  # A > 0: clipped from above only
    (0.5, -1.0, 0.8, 0.0), (1.5, -1.0, 1.5, 1.5),  # A < 0: clipped from below only
    (5.0, -1.0, 3.0, 0.0), (2.9, -1.0, 2.9, 2.9), (5.0, 1.0, -1.2, 0.0),  # dual clip bounds A < 0 alone
])
def test_clipping_on_both_sides_in_written_numbers(ratio, advantage, loss, gradient):
    assert policy_gradient(ratio, advantage) == pytest.approx((loss, gradient))


def test_clip_widths_are_settings_and_the_metrics_are_shares_of_the_tokens():
    assert policy_gradient(1.5, 1.0, clip=0.4) == pytest.approx((-1.4, 0.0))
    assert policy_gradient(5.0, -1.0, dual_clip=4.0)[0] == pytest.approx(4.0)
    logp, mask = torch.log(numbers(1.5, 1.1, 9.0))[None], numbers(1, 1, 0)[None]
    _, metrics = sdar.policy_loss(logp, torch.zeros_like(logp), numbers(1), mask, num_tokens=8)
    assert metrics["grpo/clip_fraction"] == 1 / 8
    assert metrics["grpo/old_kl"].item() == pytest.approx(-math.log(1.5 * 1.1) / 8)


def test_one_advantage_per_row_is_broadcast_and_masked_tokens_count_nothing():
    generator = torch.Generator().manual_seed(1)
    logp, old = (-torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (torch.rand(3, 4, generator=generator) < 0.6).double()
    a = numbers(1.0, -2.0, 0.5)
    row = sdar.policy_loss(logp, old, a, mask, num_tokens=20)[0]
    assert row == sdar.policy_loss(logp, old, a[:, None].expand(3, 4), mask, num_tokens=20)[0]
    assert row != sdar.policy_loss(logp, old, a.flip(0), mask, num_tokens=20)[0]
    assert sdar.policy_loss(logp, old, a, mask, num_tokens=10)[0].item() == pytest.approx(2 * row.item())
    for odd in (math.inf, math.nan):  # at masked places
        wild = a[:, None].expand(3, 4).masked_fill(mask == 0, odd)
        assert sdar.policy_loss(logp, old, wild, mask, num_tokens=20)[0] == row
        gate = torch.full((3, 4), 0.5).double()
        losses = [sdar.sdar_loss(logp, old, mask, gate=g)[0] for g in (gate, gate.masked_fill(mask == 0, odd))]
        assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------------- eq. (3): KL

def test_k3_in_written_numbers_and_its_gradient():
    logp = numbers(-2.0, -1.0, -1.0)[None].requires_grad_()
    reference = numbers(-1.0, -1.0, -2.0)[None].requires_grad_()
    loss = sdar.kl_loss(logp, reference, torch.ones_like(logp), num_tokens=1)
    assert loss.item() == pytest.approx((math.e - 2) + 0 + 1 / math.e)  # e^d - d - 1 at d = 1, 0, -1
    loss.backward()
    assert logp.grad[0].tolist() == pytest.approx([1 - math.e, 0, 1 - 1 / math.e]) and reference.grad is None
    assert sdar.kl_loss(logp, reference, numbers(1, 0, 0)[None], num_tokens=4).item() == pytest.approx((math.e - 2) / 4)


def test_expected_k3_under_the_student_is_the_kl_to_the_reference_and_not_the_reverse():
    generator = torch.Generator().manual_seed(2)
    student, reference = (torch.randn(9, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    # the mask as probabilities: an expectation
    expected = sdar.kl_loss(student, reference, student.exp(), num_tokens=1).item()
    forward = (student.exp() * (student - reference)).sum().item()
    assert expected == pytest.approx(forward, rel=1e-12)
    assert abs(forward - (reference.exp() * (reference - student)).sum().item()) > 0.01


# ------------------------------------------------------------------------------------- eq. (4) and (5): gap, gate, loss

def gap_example(seed=3, shape=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    logp, teacher = (-2 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return logp.requires_grad_(), teacher.requires_grad_(), (torch.rand(shape, generator=generator) < 0.7).double()


def test_gap_gate_and_loss_in_written_numbers():
    logp, teacher = numbers(-2.0, -1.0, -9.0)[None], numbers(-1.5, -1.0, -1.0)[None]
    loss, metrics = sdar.sdar_loss(logp, teacher, numbers(1, 1, 0)[None], beta=2.0)
    gate = 1 / (1 + math.exp(-1))
    assert loss.item() == pytest.approx(gate * 0.5 / 2)
    hand = {"sdar/gap": 0.25, "sdar/gap_abs": 0.25, "sdar/gate": (gate + 0.5) / 2, "sdar/gate_active": 0.5}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(hand)


def test_at_beta_zero_the_gate_is_exactly_one_half_and_at_a_large_beta_it_is_hard():
    logp, teacher, mask = gap_example()
    assert sdar.sdar_loss(logp, teacher, torch.ones_like(mask), beta=0.0)[1]["sdar/gate"] == 0.5
    sdar.sdar_loss(logp, teacher, mask, beta=1e6, num_tokens=1)[0].backward()
    assert torch.equal(logp.grad, -((teacher > logp) * mask))


@pytest.mark.parametrize("surrogate, weight", [
    ("mle", lambda d, g: g), ("centered", lambda d, g: g - 0.5), ("gap", lambda d, g: g * d), ("opsd", lambda d, g: d)])
def test_the_gradient_is_minus_the_weighted_score_and_nothing_flows_into_teacher_or_gate(surrogate, weight):
    logp, teacher, mask = gap_example()
    gap = (teacher - logp).detach()
    for gate, used, num, divisor in (
            (None, torch.sigmoid(2 * gap), None, mask.sum()), (torch.full_like(gap, 0.9), 0.9, 40, 40)):
        logp.grad = None
        loss, metrics = sdar.sdar_loss(logp, teacher, mask, beta=2.0, num_tokens=num, surrogate=surrogate, gate=gate)
        loss.backward()
        torch.testing.assert_close(logp.grad, -weight(gap, used) * mask / divisor)
    assert teacher.grad is None and not any(value.requires_grad for value in metrics.values())
    assert set(sdar.SURROGATES) == {"mle", "centered", "gap", "opsd"}


def expected_gradient(logits, teacher, **kwargs):
    """Gradient of eq. (5)'s last term w.r.t. the student's logits, averaged over its own samples by enumeration."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    sdar.sdar_loss(logp, teacher, logp.detach().exp(), num_tokens=1, **kwargs)[0].backward()
    return logits.grad


def test_expected_gradient_is_that_of_a_bounded_odd_reward_for_small_gaps_beta_quarters_of_the_reverse_kls():
    generator = torch.Generator().manual_seed(4)
    logits, other = (torch.randn(11, dtype=torch.float64, generator=generator) for _ in range(2))
    teacher, beta = other.log_softmax(-1), 5.0
    result = expected_gradient(logits, teacher, beta=beta)
    p = logits.softmax(-1)
    reward = torch.tanh(beta * (teacher - p.log()) / 2) / 2
    by_hand = -p * (reward - (p * reward).sum())  # -E[w grad logp] of a softmax
    assert by_hand.abs().max() > 0.01
    torch.testing.assert_close(result, by_hand, rtol=1e-12, atol=1e-15)
    centered = expected_gradient(logits, teacher, beta=beta, surrogate="centered")
    torch.testing.assert_close(result, centered, rtol=1e-12, atol=1e-15)
    assert expected_gradient(logits, teacher, beta=0.0).abs().max() < 1e-15
    close, student = (logits + 1e-4 * other).log_softmax(-1), logits.clone().requires_grad_()
    logp = student.log_softmax(-1)
    (logp.exp() * (logp - close)).sum().backward()  # KL(student || teacher)
    result = expected_gradient(logits, close, beta=beta)
    torch.testing.assert_close(result, beta / 4 * student.grad, rtol=1e-3, atol=1e-10)


def test_no_loss_changes_its_inputs_and_what_is_masked_may_be_infinite():
    logp, teacher, mask = (x.detach() for x in gap_example())
    inputs = [logp, teacher, mask, numbers(1, -1, 2), torch.tensor([0, 0, 0])]
    before = copy.deepcopy(inputs)
    sdar.group_advantages(*inputs[3:])
    losses = [lambda x, y: sdar.policy_loss(x, y, inputs[3], mask, num_tokens=5)[0],
              lambda x, y: sdar.kl_loss(x, y, mask, num_tokens=5)]
    losses += [lambda x, y, s=surrogate, gate=gate: sdar.sdar_loss(x, y, mask, surrogate=s, gate=gate)[0]
               for surrogate in sdar.SURROGATES for gate in (None, mask)]
    for loss in losses:
        tame, wild = ([x.clone().masked_fill_(mask == 0, fill) for x in (logp, teacher)] for fill in (-1.0, -math.inf))
        values = [loss(x.requires_grad_(), y) for x, y in (tame, wild)]
        sum(values).backward()
        assert values[0] == values[1] and torch.equal(tame[0].grad, wild[0].grad) and tame[0].grad.norm() > 0
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


def test_log_probs_far_apart_have_no_gradient_beyond_the_clip_instead_of_nan():
    for advantage in (1.0, -1.0):
        logp, old_logp = torch.tensor([[0.0]], requires_grad=True), torch.tensor([[-89.0]])
        sdar.policy_loss(logp, old_logp, torch.tensor([advantage]), torch.ones(1, 1), num_tokens=1)[0].backward()
        assert logp.grad == 0


def test_packed_log_probs_are_the_models_own_row_by_row(policy):
    rng = random.Random(0)
    ids = lambda n: tuple(rng.randrange(10, 590) for _ in range(n))
    prompts, responses = [ids(30), ids(3), ids(12)], [[ids(5), ids(1), ids(9)], [ids(4)], [ids(2), ids(2)]]
    for chosen in ([0, 1, 2], [1], [0, 2]):
        batch = sdar.pack([prompts[i] for i in chosen], [responses[i] for i in chosen], policy.device)
        with torch.no_grad():
            logp, entropy = kernels.fused_logprob(*sdar.head_inputs(policy, policy.model, batch), batch.targets)
        own = torch.cat([own_logp(policy.model, prompts[i], r) for i in chosen for r in responses[i]])
        assert own.std() > 0.1 and entropy.min() > 0
        torch.testing.assert_close(logp, own, rtol=0, atol=1e-5)
        assert batch.targets.tolist() == [t for i in chosen for r in responses[i] for t in r]


@pytest.mark.parametrize("siblings", [1, 2])
def test_padding_ids_change_nothing(policy, siblings):
    prompts, responses = [tuple(range(20, 60)), tuple(range(70, 75))], [[(30, 31)], [(40, 41, 42)] * siblings]
    batch = sdar.pack(prompts, responses, policy.device)
    other = batch.ids.clone()
    other[1, len(prompts[1]) + 3 * siblings:] = 99
    assert not torch.equal(other, batch.ids)
    with torch.no_grad():
        assert torch.equal(sdar.head_inputs(policy, policy.model, batch)[0],
                           sdar.head_inputs(policy, policy.model, batch._replace(ids=other))[0])


def test_micro_batches_hold_every_row_once_within_their_room_with_and_without_a_teacher_alike(rows):
    alone = [dataclasses.replace(row, teacher_ids=()) for row in rows]
    shape = lambda batches: [[[(r.prompt_ids, r.response_ids) for r in g] for g in batch] for batch in batches]
    for room in (1, 700, 1500, 10**9):
        batches = list(sdar.micro_batches(rows, room))
        assert shape(batches) == shape(sdar.micro_batches(alone, room))
        assert sorted(id(r) for batch in batches for g in batch for r in g) == sorted(map(id, rows))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(map(width, batch)) <= room
            assert all((r.prompt_ids, r.teacher_ids) == (g[0].prompt_ids, g[0].teacher_ids) for g in batch for r in g)
    assert any(len(g) > 1 for g in batches[0]) and len(batches) == 1  # members of a group share their first prompt


def test_siblings_that_read_different_skills_are_scored_in_parts_that_keep_to_the_same_room(policy, rows, monkeypatch):
    for number, row in enumerate(rows):  # all share a prompt
        row.prompt_ids, row.teacher_ids = rows[0].prompt_ids, (*rows[0].prompt_ids, number + 5)
    room, sizes, pack = 3 * max(len(row.teacher_ids) + len(row.response_ids) for row in rows), [], sdar.pack
    score = lambda room: sdar.response_logp(policy, policy.model, rows, config(micro_tokens=room), teacher=True)
    whole = score(10**6)
    monkeypatch.setattr(sdar, "pack", lambda *some: sizes.append(pack(*some).ids.numel()) or pack(*some))
    parts = score(room)
    assert len(rows) > 3 < len(sizes) and max(sizes) <= room
    assert all(parts[row] == pytest.approx(whole[row], abs=1e-4) for row in rows)


def test_sampler_and_trainer_agree_on_log_probs(policy, played):
    cfg = config(temperature=0.7, **NO_TEACHER)
    prompts = [turn.prompt_ids for e in played for turn in e.turns]
    responses = sdar.sample(policy, prompts, cfg, cfg.temperature, noises(prompts))
    rows = [sdar.Row(p, (), r.ids, 0.0, r.logp) for p, r in zip(prompts, responses)]
    found = sdar.response_logp(policy, policy.model, rows, cfg)
    for row, response in zip(rows, responses):
        assert found[row] == pytest.approx(response.logp, abs=1e-4)
        own = own_logp(policy.model, row.prompt_ids, row.response_ids, 0.7).tolist()
        assert found[row] == pytest.approx(own, abs=1e-4)


def test_sdar_with_lambda_zero_is_grpo_bit_for_bit(policy, rows, skills, played):
    grpo, _, _, metrics = update(policy, rows, config(**NO_TEACHER))
    zero, _, _, more = update(policy, rows, config(sdar_coef=0.0))
    assert same(grpo, zero) and metrics["grpo/loss"] == more["grpo/loss"] and more["sdar/gap_abs"] > 0.001
    assert not same(grpo, update(policy, rows, config(sdar_coef=0.1))[0])
    assert not same(grpo, dict(policy.model.named_parameters()))
    bare, _ = sdar.make_rows(policy, config(**NO_TEACHER), played, skills)
    assert [r.advantage for r in bare] == [r.advantage for r in rows]
    assert bare[0].teacher_ids == () != rows[0].teacher_ids
    assert same(grpo, update(policy, bare, config(**NO_TEACHER))[0])


def test_a_teacher_that_sees_the_students_prompt_has_no_gap(policy, played):
    cfg = config(retrieval="none", sdar_coef=0.1)
    rows, _ = sdar.make_rows(policy, cfg, played, sdar.load_skills(cfg, envs.make("webshop").task_types))
    assert all(row.teacher_ids == row.prompt_ids for row in rows)
    _, _, gaps, metrics = update(policy, rows, cfg)
    assert max(map(abs, all_gaps(gaps, rows))) < 1e-6
    assert metrics["sdar/gate"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("way", ["a row at a time", "little room", "siblings apart", "recomputed", "by triton"])
def test_loss_and_gradient_do_not_depend_on_how_they_are_computed(way, policy, rows, monkeypatch):
    cfg = config(sdar_coef=0.5, kl_coef=0.1, entropy_coef=0.1, micro_tokens=10**9)
    _, whole, _, metrics = update(policy, rows, cfg, torch.optim.SGD)
    assert whole.norm() > 0.01
    cfg.micro_tokens = {"a row at a time": 1, "little room": 1200}.get(way, 10**9)
    if way == "siblings apart":
        policy = dataclasses.replace(policy, packs=False)
    if way == "recomputed":
        cfg.recompute, policy = True, dataclasses.replace(policy, model=copy.deepcopy(policy.model))
        models.recompute_activations(policy.model)
    if way == "by triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(kernels, "choose_backend", lambda *_: "triton")
    _, parts, _, more = update(policy, rows, cfg, torch.optim.SGD)
    assert (parts - whole).norm() < (1e-5 if way == "by triton" else 2e-6) * whole.norm()
    for name in ("grpo/loss", "grpo/entropy", "kl/loss", "sdar/loss", "sdar/gap", "sdar/gate"):
        assert more[name] == pytest.approx(metrics[name], rel=1e-4 if way == "by triton" else 1e-5, abs=1e-6)


@pytest.mark.parametrize("surrogate", ["mle", "rkl", "fkl"])
def test_the_loss_of_a_step_is_eq_5_of_the_models_own_distributions(policy, rows, surrogate):
    policy_term = distillation = 0.0
    for row in rows:
        student, teacher = (own_logp(policy.model, prompt, row.response_ids, whole=True)
                            for prompt in (row.prompt_ids, row.teacher_ids))
        gap = (teacher - student).gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]
        p, q = (student, teacher) if surrogate == "rkl" else (teacher, student)
        distance = gap if surrogate == "mle" else (p.exp() * (p - q)).sum(-1)  # or the exact divergence
        policy_term -= row.advantage * len(gap) / 100
        distillation += (torch.sigmoid(5 * gap) * distance).sum().item() / 100
    batch = next(sdar.micro_batches(rows, 10**9))
    loss, metrics, _ = sdar.step_loss(policy, config(sdar_coef=0.5, surrogate=surrogate), batch, 100, sdar.Frozen())
    assert metrics["sdar/loss"].item() == pytest.approx(distillation, rel=1e-4) and abs(distillation) > 1e-4
    assert loss.item() == pytest.approx(policy_term + 0.5 * distillation, rel=1e-4)


def test_direct_loss_falls_on_the_predictors_of_response_tokens_alone(policy, rows):
    model, seen = copy.deepcopy(policy.model), []

    def keep(module, args, out):
        if out.last_hidden_state.requires_grad:
            out.last_hidden_state.retain_grad()
            seen.append(out.last_hidden_state)

    model.base_model.register_forward_hook(keep)
    batch = next(sdar.micro_batches(rows, 10**9))
    copied = dataclasses.replace(policy, model=model)
    sdar.step_loss(copied, config(sdar_coef=0.5), batch, 10, sdar.Frozen())[0].backward()
    (hidden,) = seen  # one pass with gradient: the student's
    touched = hidden.grad.flatten(0, 1).abs().sum(-1).nonzero()[:, 0].tolist()
    expected, length = set(), hidden.shape[1]
    for b, group in enumerate(batch):
        start = end = len(group[0].prompt_ids)
        for row in group:
            expected |= {b * length + start - 1, *(b * length + end + k for k in range(len(row.response_ids) - 1))}
            end += len(row.response_ids)
    assert set(touched) == expected


def test_the_end_of_turn_token_is_trained(policy, rows):
    prompt, end, trained = rows[0].prompt_ids, (min(policy.stop_ids),), copy.deepcopy(policy.model)
    weights, *_ = update(policy, [sdar.Row(prompt, (), end, 1.0, (0.0,))], config(lr=1e-3, **NO_TEACHER))
    trained.load_state_dict(weights, strict=False)
    assert own_logp(trained, prompt, end) > own_logp(policy.model, prompt, end) + 0.01


def test_later_updates_of_a_batch_compare_with_the_sampling_policy_and_an_early_teacher_stays(policy, rows):
    once = update(policy, rows, config(sdar_coef=0.1))[3]
    assert once["grpo/old_kl"] == 0 and once["grpo/clip_fraction"] == 0
    cfg = config(sdar_coef=0.1, updates=2, teacher="rollout", lr=0.05)
    early = update(policy, rows, cfg)[3]
    assert abs(early["grpo/old_kl"]) > 1e-3 and early["grpo/clip_fraction"] > 0
    live = update(policy, rows, dataclasses.replace(cfg, teacher="live"))[3]
    assert abs(live["sdar/gap_abs"] - early["sdar/gap_abs"]) > 0.01
    moved = dataclasses.replace(policy, ref=copy.deepcopy(policy.model))
    moved.ref.model.norm.weight.data *= 2
    for teacher, model in (("rollout", moved.model), ("ref", moved.ref)):
        frozen = sdar.frozen_logp(moved, rows, dataclasses.replace(cfg, teacher=teacher))
        own = {row: own_logp(model, row.teacher_ids, row.response_ids).tolist() for row in rows}
        assert all(frozen.teacher_logp[row] == pytest.approx(own[row], abs=1e-5) for row in rows)
    own = {row: own_logp(moved.model, row.prompt_ids, row.response_ids).tolist() for row in rows}
    assert all(frozen.old_logp[row] == pytest.approx(own[row], abs=1e-5) for row in rows)


def test_a_teacher_of_before_the_update_is_the_live_one_when_there_is_one_update(policy, rows):
    live = update(policy, rows, config(sdar_coef=0.1))
    early = update(policy, rows, config(sdar_coef=0.1, teacher="rollout"))
    reference = update(policy, rows, config(sdar_coef=0.1, teacher="ref"))  # the policy is still the initial one
    assert max(map(abs, all_gaps(live[2], rows))) > 0.01
    for other in (early, reference):
        assert all_gaps(other[2], rows) == pytest.approx(all_gaps(live[2], rows), abs=2e-6)
    torch.testing.assert_close(early[1], live[1], rtol=1e-3, atol=1e-6)


def test_kl_to_the_reference_is_zero_at_first_and_then_grows(policy, rows):
    moving, cfg = copy.deepcopy(policy), config(kl_coef=0.01, **NO_TEACHER)
    optimizer = sdar.make_optimizer(moving.model, cfg)
    first, second = (sdar.train_step(moving, optimizer, rows, cfg, step)[0] for step in range(2))
    assert abs(first["kl/loss"]) < 1e-9 < 1e-4 < second["kl/loss"]
    strong, weak = (update(moving, rows, dataclasses.replace(cfg, kl_coef=c), torch.optim.SGD)[1] for c in (1.0, 1e-12))
    assert (strong - weak).norm() > 0.01


def test_the_entropy_term_raises_entropy(policy, rows):
    for row in rows:
        row.advantage = 0.0
    cfg = config(entropy_coef=1.0, lr=1e-3, **NO_TEACHER)
    moving = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    optimizer = torch.optim.SGD(moving.model.parameters(), lr=cfg.lr)
    before, after = (sdar.train_step(moving, optimizer, rows, cfg, step)[0]["grpo/entropy"] for step in range(2))
    assert after > before + 1e-4


def test_the_learning_rate_warms_up_and_falls_to_zero_only_on_the_linear_schedule(policy, rows):
    rates = lambda **more: [sdar.learning_rate(config(lr=1.0, steps=4, warmup=2, **more), step) for step in range(4)]
    assert [rates(lr_schedule=name) for name in ("constant", "linear")] == [[0.5, 1, 1, 1], [0.5, 0.75, 0.5, 0.25]]
    moving, cfg = copy.deepcopy(policy), config(lr=1.0, warmup=4, **NO_TEACHER)
    optimizer = sdar.make_optimizer(moving.model, cfg)
    sdar.train_step(moving, optimizer, rows, cfg, 0)
    assert optimizer.param_groups[0]["lr"] == 0.25 and not same(moving.model.state_dict(), policy.model.state_dict())


@pytest.mark.parametrize("updates", [1, 2])
def test_a_broken_gradient_is_refused_and_changes_nothing_in_a_later_update_either(updates, policy, rows, monkeypatch):
    calls, step = [], sdar.optimizer_step

    def break_last(model, *args):
        calls.append(model)
        if len(calls) == updates:
            model.lm_head.weight.grad[0, 0] = math.nan
        return step(model, *args)

    monkeypatch.setattr(sdar, "optimizer_step", break_last)
    broken = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    optimizer = torch.optim.AdamW(broken.model.parameters(), lr=1.0)
    with pytest.raises(sdar.UserError, match="gradient norm is nan"):
        sdar.train_step(broken, optimizer, rows, config(updates=updates, **NO_TEACHER), 0)
    assert same(dict(broken.model.named_parameters()), dict(policy.model.named_parameters()))
    assert not optimizer.state and not broken.model.training


def long_context(words=80):
    page = "WebShop [SEP] " + " ".join(f"word{i}" for i in range(words))
    return sdar.Context(
        "find a red lamp", "garden", (("earlier page " * 9, "search[one]"), ("", "search[two]")), page, ())


def test_a_long_prompt_loses_history_first_then_the_middle_of_the_observation_and_never_the_task(policy):
    chat, context = policy.chat, long_context()
    full = len(sdar.fit_prompt(chat, config(), context)[1])
    stages = []
    for limit in range(full, 130, -3):
        fitted, ids = sdar.fit_prompt(chat, config(max_prompt_tokens=limit), context)
        assert len(ids) <= limit and ids == chat.prompt(sdar.render(config(), fitted))
        assert fitted.task == context.task and "find a red lamp" in chat.tokenizer.decode(ids)
        assert fitted.history == context.history[len(context.history) - len(fitted.history):]  # the latest stay
        if fitted.history:
            assert fitted.observation == context.observation
        elif fitted.observation != context.observation:
            head, tail = fitted.observation.split(" ... ")
            assert context.observation.startswith(head) and context.observation.endswith(tail) and head and tail
            assert abs(len(chat.encode(head)) - len(chat.encode(tail))) <= 2
        stages.append((len(fitted.history), len(fitted.observation)))
    assert stages == sorted(stages, reverse=True) and {h for h, _ in stages} == {0, 1, 2} and stages[-1][1] < 500
    with pytest.raises(sdar.UserError, match=r"--max_prompt_tokens 40 is too small: .* need \d+ tokens"):
        sdar.fit_prompt(chat, config(max_prompt_tokens=40), context)


def test_the_teacher_sees_the_skills_whole_and_the_students_cut_observation(policy, skills):
    cfg = config(max_prompt_tokens=200)
    context, ids = sdar.fit_prompt(policy.chat, cfg, long_context())
    turn, decode = sdar.Turn(context, ids, None, "", "", True), policy.chat.tokenizer.decode
    assert " ... " in context.observation and not context.history
    text = decode(sdar.teacher_ids(policy.chat, cfg, turn, skills["garden"]))
    assert all(part in text for part in (
        skills["garden"], context.observation.removeprefix("WebShop [SEP] "), context.task))
    assert skills["garden"] not in decode(ids)
    raw = sdar.teacher_ids(policy.chat, config(teacher_prompt="raw"), turn, skills["garden"])
    assert raw[-len(ids):] == ids and decode(raw[:-len(ids)]).strip().endswith(skills["garden"])
    cut = sdar.teacher_ids(policy.chat, config(teacher_prompt="raw", max_prompt_tokens=200), turn, skills["garden"])
    assert cut == raw[-200:] and skills["garden"] not in decode(cut)  # as released: the skills go first


def test_skills_are_the_general_ones_and_those_of_the_type(skills):
    kinds = envs.make("webshop").task_types
    folder = folders.ROOT / "data" / "skills" / "webshop"
    general, own = ((folder / "general.md").read_text().strip(),
                    {k: (folder / f"{k}.md").read_text().strip() for k in kinds})
    assert skills == {kind: f"{general}\n{own[kind]}" for kind in kinds}
    everything = sdar.load_skills(config(retrieval="full"), kinds)
    assert all(text.count(part) == 1 for text in everything.values() for part in (general, *own.values()))
    assert sdar.load_skills(config(retrieval="none"), kinds) == dict.fromkeys(kinds, "")


def noises(prompts):
    return [random.Random(number) for number, _ in enumerate(prompts)]


def test_the_experts_words_win_and_finished_episodes_stop_generating(policy, monkeypatch):
    cfg = config(tasks=6, max_turns=15)
    environments = [sdar.make_env(cfg) for _ in range(12)]
    lazy = environments[0]  # never buys
    act = lambda env: "search[red]" if env is lazy else env.expert()
    calls, done = script(monkeypatch, act), []
    monkeypatch.setattr(sdar.progress, "advance", done.append)
    episodes = sdar.rollout(policy, environments, sdar.step_tasks(cfg, lazy, 1), cfg)
    assert [e.won for e in episodes] == [e.done for e in episodes] == [False] + [True] * 11
    assert sum(done) == 12 * 15  # turns, those that a finished episode does not need included
    assert all(turn.valid and turn.action.startswith(("search[", "click[")) for e in episodes for turn in e.turns)
    lengths = [len(e.turns) for e in episodes]
    assert lengths[0] == 15 and max(lengths[1:]) < 15 and len(set(lengths)) > 2
    assert calls == [sum(n > turn for n in lengths) for turn in range(15)]
    for episode in episodes:  # a prompt shows the last two turns, and the actions in them
        assert [len(t.context.history) for t in episode.turns[:4]] == [0, 1, 2, 2][:len(episode.turns)]
        assert [a for _, a in episode.turns[2].context.history] == [t.action for t in episode.turns[:2]]


def test_members_of_a_group_start_from_the_same_task_and_equal_seeds_play_identical_episodes(policy):
    cfg = config(tasks=3, group_size=2, max_turns=2, max_response_tokens=2)
    environments = [sdar.make_env(cfg) for _ in range(6)]
    tasks = sdar.step_tasks(cfg, environments[0], 4)
    assert [t.group for t in tasks] == [0, 0, 1, 1, 2, 2] and tasks == sdar.step_tasks(cfg, environments[0], 4)
    assert tasks != sdar.step_tasks(cfg, environments[0], 5)
    assert tasks != sdar.step_tasks(config(tasks=3, seed=1), environments[0], 4)
    play = lambda seed: sdar.rollout(policy, environments, tasks, cfg, seed=seed)
    assert play(3) == play(3) != play(4)
    first = [e.turns[0].prompt_ids for e in play(3)]
    assert first[0::2] == first[1::2] and len(set(first)) == 3


def test_stop_reasons_are_recorded_and_finished_responses_leave_the_batch(policy, rows):
    prompts, widths = [row.prompt_ids for row in rows], []
    half = dataclasses.replace(policy, stop_ids=frozenset(range(0, 600, 5)))
    hook = policy.model.register_forward_hook(
        lambda module, args, kwargs, out: widths.append(len(out.logits)), with_kwargs=True)
    responses = sdar.sample(half, prompts, config(max_response_tokens=6), 2.0, noises(prompts))
    hook.remove()
    assert {r.stop for r in responses} == {"end", "length"}
    for response in responses:
        ends = [t in half.stop_ids for t in response.ids]
        assert ends == [False] * (len(ends) - 1) + [response.stop == "end"] and len(response.logp) == len(ends)
        assert len(ends) == 6 or response.stop == "end"
    assert widths[1:6] == [sum(len(r.ids) > n for r in responses) for n in range(1, 6)] and widths[5] < len(prompts)


def test_greedy_responses_do_not_depend_on_the_batch_composition(policy, rows):
    prompts = [row.prompt_ids for row in rows] + [(5, 6, 7)]
    play = lambda prompts, side: sdar.sample(policy, prompts, config(rollout_batch=side), 0, noises(prompts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # transformers' arguments go by their current names
        together, alone, reverse = play(prompts, 64), play(prompts, 1), play(prompts[::-1], 5)[::-1]
    assert [r.ids for r in together] == [r.ids for r in alone] == [r.ids for r in reverse]
    assert len({r.ids for r in together}) > 3
    for prompt, a, b in zip(prompts, together, alone):
        assert a.logp == pytest.approx(b.logp, abs=1e-4)
        assert own_logp(policy.model, prompt, a.ids, whole=True).argmax(-1).tolist() == list(a.ids)


@pytest.fixture(scope="module")
def bundled():
    return sdar.load_policy(sdar.make_config({}))


@pytest.mark.parametrize("env", envs.ENVIRONMENTS)
@pytest.mark.parametrize("seed", range(5))
def test_neighbours_order_and_rollout_batch_change_no_episode(bundled, env, seed):
    cfg, rng = sdar.make_config({"env": env, "max_turns": 3, "tasks": 3, "group_size": 2}), random.Random(seed)
    def play(tasks, batch):
        environments = [sdar.make_env(cfg) for _ in tasks]
        episodes = sdar.rollout(bundled, environments, tasks, dataclasses.replace(cfg, rollout_batch=batch), seed=seed)
        played = defaultdict(list)
        for e in episodes:
            played[e.task[:2]].append([turn.response.ids for turn in e.turns])
        return played

    tasks = sdar.step_tasks(cfg, sdar.make_env(cfg), seed)
    whole = play(tasks, 128)
    assert any(first != second for first, second in whole.values())  # members of a group differ
    for batch in (1, 4, 128):
        assert play(rng.sample(tasks, len(tasks)), batch) == whole
    some = rng.sample(tasks[::2], 2)
    assert play(some, 2) == {task[:2]: whole[task[:2]][:1] for task in some}


def test_an_environment_that_raises_is_reported_with_task_and_turn(policy, monkeypatch):
    cfg = config()
    environments = [sdar.make_env(cfg) for _ in range(4)]
    tasks = sdar.step_tasks(cfg, environments[0], 0)
    script(monkeypatch, lambda env: "search[lamp]")
    step = environments[2].step

    def fail_the_second_time(action):
        if environments[2].page != "start":
            raise ZeroDivisionError("the shelf broke\nbadly")
        return step(action)

    monkeypatch.setattr(environments[2], "step", fail_the_second_time)
    message = f"task {tasks[2].task_id} of split 'train' (action 'search[lamp]' in turn 2): ZeroDivisionError: the"
    with pytest.raises(sdar.UserError, match=re.escape(message) + " shelf broke.$"):
        sdar.rollout(policy, environments, tasks, cfg)


def test_an_action_that_the_observation_does_not_offer_is_invalid_unless_the_check_is_off(policy, monkeypatch):
    for check in (True, False):
        cfg = config(max_turns=2, check_admissible=check)
        environments = [sdar.make_env(cfg) for _ in range(4)]
        act = lambda env: "search[lamp]" if env.page == "start" else "click[no such thing]"
        script(monkeypatch, act)
        episodes = sdar.rollout(policy, environments, sdar.step_tasks(cfg, environments[0], 0), cfg)
        assert [[t.valid for t in e.turns] for e in episodes] == [[True, not check]] * 4


def test_the_block_of_losses_runs_in_an_empty_file():
    source = Path(sdar.__file__).read_text()
    start = source.index("- advantages and losses\n")
    exec(source[source.index("\n", start):source.index("\n# -----", start)], namespace := {})
    for returns in ([10, 0, 10, 10], [True, False, True, True]):
        advantages = namespace["group_advantages"](torch.tensor(returns), torch.tensor([0, 0, 1, 1]))
        assert advantages.tolist() == pytest.approx([0.7071, -0.7071, 0, 0], abs=1e-4)
    logp, teacher, mask = (x.detach() for x in gap_example())
    assert namespace["sdar_loss"](logp, teacher, mask)[0] == sdar.sdar_loss(logp, teacher, mask)[0]
    assert {"group_advantages", "policy_loss", "kl_loss", "sdar_loss"} <= namespace.keys()


def test_readmes_snippets_run_as_they_stand(monkeypatch):
    monkeypatch.chdir(Path(sdar.__file__).parent)
    pages = {page: Path(page).read_text() for page in ("README.md", "docs/environments.md", "docs/kernels.md")}
    snippets = [(page, code) for page, text in pages.items() for code in re.findall(r"```python\n(.*?)```", text, re.S)]
    assert [page for page, _ in snippets].count("README.md") == 1 and len(snippets) == 6
    for page, code in snippets:
        exec(code, namespace := {})
        if page != "docs/environments.md":
            gradients = [p.grad.norm() for p in namespace["model"].parameters()]
            assert all(map(torch.isfinite, gradients)) and min(gradients) > 0
