"""SDAR in verl: a policy loss with verl's signature, eq. (2) plus the gated term of eq. (5). Written for verl 0.9.

    from verl.trainer.ppo.core_algos import register_policy_loss
    register_policy_loss("sdar")(sdar_policy_loss)          # then actor_rollout_ref.actor.policy_loss.loss_mode=sdar

or functools.partial(sdar_policy_loss, sdar_coef=0.1) for another lambda. Put these two lines into a module and name
it in VERL_USE_EXTERNAL_MODULES, so that the workers load it. verl adds KL and entropy itself.

verl's ppo_loss (verl/workers/utils/losses.py) hands a policy loss no teacher: there, append "teacher_log_prob" to
`fields` and pass teacher_log_prob=data["teacher_log_prob"]. The trainer puts that tensor into the batch before the
update, as it does old_log_probs: the actor's log-probs of the same responses after prompts with the skill text in them.
"""

from sdar import policy_loss, sdar_loss  # or paste the block between the first two rulers of sdar.py here


def sdar_policy_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
                     rollout_is_weights=None, *, teacher_log_prob, sdar_coef=0.01, gate_beta=5.0):
    """verl's policy loss plus lambda times the gated term -> (loss, metrics as floats).

    All tensors [B, T]; rollout_is_weights, if any, weigh eq. (2) alone. config: verl's ActorConfig, for its clip ratios
    and global_batch_info. At sdar_coef 0 it is verl's vanilla loss (0.9.1: equal up to 5e-8). Raises ValueError for an
    aggregation other than token-mean and for asymmetric clips.
    """
    if loss_agg_mode != "token-mean":
        raise ValueError(f"SDAR is a mean over tokens: set loss_agg_mode to token-mean, not {loss_agg_mode}.")
    if {config.clip_ratio_low, config.clip_ratio_high} - {None, config.clip_ratio}:
        raise ValueError("SDAR clips symmetrically: set clip_ratio_low and clip_ratio_high to clip_ratio.")
    local = response_mask.sum().clamp(min=1)  # verl averages metrics over micro-batches, so they are means of this one
    weights = response_mask if rollout_is_weights is None else response_mask * rollout_is_weights
    pg, metrics = policy_loss(log_prob, old_log_prob, advantages, weights, num_tokens=local, clip=config.clip_ratio,
                              dual_clip=config.get("clip_ratio_c", 3.0))
    distill, more = sdar_loss(log_prob, teacher_log_prob, response_mask, beta=gate_beta, num_tokens=local)
    total, ranks = config.global_batch_info.get("batch_num_tokens"), config.global_batch_info.get("dp_size", 1)
    share = 1 if total is None else local * ranks / total  # of the optimiser step's tokens; verl's ranks are averaged
    metrics |= more | {"sdar/loss": distill.detach()}
    return (pg + sdar_coef * distill) * share, {name: float(value) for name, value in metrics.items()}
