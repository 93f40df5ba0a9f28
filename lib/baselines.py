"""The baselines' formulas, for any trainer: each of the four functions needs torch alone, and no other function here
except `relative`, which goes with the first.

    gigpo_advantages   GiGPO, arXiv 2505.10978   turns from equal states are compared with each other too
    rlsd_advantages    RLSD, arXiv 2604.03128    the teacher scales each token's advantage and never turns its sign
    skill_sd_loss      Skill-SD                  an importance-weighted k3 estimate of KL(student || teacher) as a loss
    opid_advantages    OPID, arXiv 2606.26790    the log-prob shift under hindsight skills is added to the advantage

R turns of a step · E episodes · B rows · T response tokens of a row. Eq. (1) is sdar.py's, and Agg(z) the sum of z over
all response tokens of an optimiser step divided by their number. The last three functions also take flattened tokens,
[N] for each [B, T] and for advantages. What is masked may be anything, NaN and infinities too.
"""

import torch


def gigpo_advantages(rewards, episodes, groups, observations, *, gamma=0.95, weight=1.0, divide_by_std=False):
    """GiGPO, its eq. 3 and 5 to 8: A = A_episode + weight A_step -> [R] in the dtype of rewards.

    One entry per turn, each episode's in order of time: the environment's reward, the ids of episode and group (of one
    task), and the raw observation (any hashable) that the turn answers. Tensors or lists; episodes may interleave.

        A_episode  eq. (1) over the sums of an episode's rewards: with weight 0 this is GRPO
        A_step     G - mean G over the turns of one group with an identical observation, G_t = r_t + gamma G_(t+1)

    divide_by_std also divides A_step by the unbiased standard deviation + 1e-6. A turn whose observation occurs once in
    its group gets A_step 0. The released code (verl-agent, gigpo/core_gigpo.py) differs in A_episode: its statistics
    run over turns instead of episodes, and it divides by the standard deviation only where it does so in A_step.
    Raises ValueError if the lengths differ.
    """
    lengths = [len(x) for x in (rewards, episodes, groups, observations)]
    if len(set(lengths)) > 1:
        raise ValueError(f"rewards, episodes, groups and observations need one entry per turn, got {lengths} of them")
    rewards = torch.as_tensor(rewards)
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    episodes, groups = (x.tolist() if isinstance(x, torch.Tensor) else x for x in (episodes, groups))
    pairs = list(zip(groups, episodes))
    number = {episode: i for i, episode in enumerate(sorted(set(pairs)))}
    owner = torch.tensor([number[pair] for pair in pairs], dtype=torch.int64, device=rewards.device)  # [R]
    returns = rewards.new_zeros(len(number)).index_add_(0, owner, rewards)  # [E]
    to_go, discounted = [0.0] * len(number), []
    for reward, i in zip(reversed(rewards.tolist()), reversed(owner.tolist())):
        to_go[i] = reward + gamma * to_go[i]
        discounted.append(to_go[i])
    of_episode = relative(returns, [group for group, _ in number])
    of_step = relative(rewards.new_tensor(discounted[::-1]), zip(groups, observations), divide_by_std)
    return of_episode[owner] + weight * of_step


def relative(values, keys, divide_by_std=True):
    """values [n], minus the mean of those with an equal key, divided by their unbiased standard deviation + 1e-6.

    Equal values, or a single one, give exactly 0. With divide_by_std these are sdar.group_advantages, bit for bit, for
    keys of any type: once more here, because lib imports no top-level file and this one can be copied.
    """
    advantages, places = torch.zeros_like(values), {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    for members in places.values():
        v = values[members]
        if len(v) > 1 and (v != v[0]).any():
            advantages[members] = (v - v.mean()) / (v.std(unbiased=True) + 1e-6 if divide_by_std else 1)
    return advantages


def rlsd_advantages(advantages, logp, teacher_logp, mask, *, mix, clip=0.2):
    """RLSD: A_t = A ((1 - mix) + mix w), w = clip(exp(sign(A) D), 1 - clip, 1 + clip), D = teacher_logp - logp.

    advantages: [B] or [B, T]; the rest [B, T], logp that of the policy that sampled. Returns [B, T], a constant, 0
    where masked. A token that the teacher prefers gains more under A > 0 and loses less under A < 0; w is 1 at D = 0.
    The released script (ZJU-REAL/SDAR, verl/trainer/ppo/rlsd_utils.py) lowers mix from 0.5 to 0 over 100 steps.
    """
    with torch.no_grad():
        if advantages.dim() < logp.dim():
            advantages = advantages.unsqueeze(-1)  # [B, 1]
        gap = (teacher_logp - logp).masked_fill(mask == 0, 0.0)
        w = torch.exp(torch.sign(advantages) * gap).clamp(1 - clip, 1 + clip)
        return (advantages * ((1 - mix) + mix * w)).masked_fill(mask == 0, 0.0)


def skill_sd_loss(logp, teacher_logp, old_logp, mask, *, num_tokens):
    """Skill-SD: Agg(rho k3), k3 = exp(-d) - 1 + d, d = logp - teacher_logp, rho = exp(logp - old_logp).

    All [B, T]; num_tokens: response tokens of the whole optimiser step. Returns (loss, metrics), both shares of
    num_tokens, so that micro-batches add up. Gradients flow to logp through rho and k3, to nothing else. As in the
    released code (ZJU-REAL/SDAR, verl/trainer/ppo/skillsd_utils.py) exponents are bounded from above alone, -d at 20
    and log rho at 10, and the d outside of exp is not bounded.
    """
    d = (logp - teacher_logp.detach()).masked_fill(mask == 0, 0.0)
    log_rho = (logp - old_logp.detach()).masked_fill(mask == 0, 0.0)
    k3 = torch.exp((-d).clamp(max=20)) - 1 + d
    rho = torch.exp(log_rho.clamp(max=10))
    with torch.no_grad():
        values = {"skill_sd/rho": rho, "skill_sd/k3": k3, "skill_sd/gap": -d}
        metrics = {name: (value * mask).sum() / num_tokens for name, value in values.items()}
    return (rho * k3 * mask).sum() / num_tokens, metrics


def opid_advantages(advantages, episode_shift, step_shift, mask, *, episode_weight=0.001, step_weight=0.001):
    """OPID: A_t = A + episode_weight D_episode + step_weight D_step, neither clipped nor normalised.

    advantages: [B] or [B, T]; the rest [B, T]. A shift D is the sampled token's log-prob under the policy that sampled,
    with the skill minus without it, and zero where that skill was not routed. Returns [B, T], a constant, 0 where
    masked. Source: docs/gigpo/opid_algorithm_technical_note.md of jinyangwu/OPID; the weights are its scripts'.
    """
    with torch.no_grad():
        if advantages.dim() < episode_shift.dim():
            advantages = advantages.unsqueeze(-1)  # [B, 1]
        total = advantages + episode_weight * episode_shift + step_weight * step_shift
        return total.masked_fill(mask == 0, 0.0)
