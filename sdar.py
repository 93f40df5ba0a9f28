"""SDAR: self-distilled agentic reinforcement learning (arXiv 2605.15155), in one file.

An agent plays whole episodes (several turns of observation -> response); GRPO compares the episodes of one task with
each other; and the same model, shown skill text that the student does not see, scores every sampled token.

    (1) A_i = (R_i - mean_group R) / (std_group R + 1e-6)               one R per episode; invalid turns A_i - c_inv
    (2) L_pg = -Agg min(r A, clip(r, 1-e, 1+e) A), dual clip for A < 0  r = exp(logp - old_logp)
    (3) L_kl = Agg(exp(d) - d - 1),  d = ref_logp - logp                the k3 estimate of KL(student || reference)
    (4) gap D = teacher_logp - logp,  gate g = sigmoid(beta D)          both detached
    (5) L = L_pg + c_kl L_kl - c_ent H + lambda Agg(g (teacher_logp - logp))

Agg(z) is the sum over all response tokens of an optimiser step divided by their number.

    symbol        name here              meaning
    R, A          return, advantage      10 if the task was won, else 0; normalised within the group
    r, e          ratio, clip            current policy against the one that sampled; how far it may move a token
    D, g          gap, gate              teacher's minus student's log-prob of a sampled token; its weight in (0, 1)
    H             entropy                of the student's next-token distribution
    lambda, beta  sdar_coef, gate_beta   weight of the last term, sharpness of the gate
    c_kl, c_ent   kl_coef, entropy_coef  weights of the KL term and of the entropy bonus
    c_inv         invalid_penalty        subtracted from the advantage of an invalid turn

One row is one turn: prompt ids (task, short history, observation) -> response ids.
The last term of (5) has the gradient -lambda Agg(g grad logp): a gate-weighted likelihood of the student's own samples.
On-policy samples have E[grad logp] = 0, so in expectation g acts as g - 1/2 = tanh(beta D / 2) / 2, a bounded and odd
reward for what the skilled teacher prefers, about lambda beta / 4 times the gradient of the reverse KL for small gaps;
at beta = 0 its expected gradient is 0: pure noise.

Absent on purpose: a critic, a replay buffer, gradients through gate or teacher, re-tokenised responses.

    python sdar.py                                                       the bundled model learns to shop, on a laptop
    python sdar.py --env webshop --model Qwen/Qwen2.5-1.5B-Instruct      the same program on a real model
"""

import copy
import dataclasses
import itertools
import math
import random
import sys
import time
from collections import Counter, defaultdict
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import lib  # noqa: F401  before torch: it sets how torch's idle threads wait
import envs
import kernels
from lib import agreement, folders, health, hindsight, lora, memory, models, parallel, progress, runs, vllm_engine
from lib.analyser import RULES
from lib.baselines import gigpo_advantages, opid_advantages, rlsd_advantages, skill_sd_loss
from lib.engine import Response, TorchEngine, respond
from lib.episodes import episode_lines, note_top, stays, write_step
from lib.packing import micro_batches, pack, teacher_parts
from lib.program import UserError, describe, exit_status
from lib.settings import Parser, add_options, changeable, check_value, check_values, option, set_by_hand
from lib.skills import CONTROLS, STRATEGIES, contains, library, retrieve
from lib.tasks import Task, count_tasks, evaluation_set_hash, reset_env, step_env, stratified, types_of

__version__ = "0.4.0"

SEARCHES = 32  # of a retriever at a time

# E episodes · B rows (a row is one turn of an episode) · T response tokens of a row · N those of a micro-batch
# S packed sequences · L their length · P prompt tokens · D hidden size (in shapes; elsewhere the gap) · V vocabulary


# ------------------------------------------------------------------------------------------------ advantages and losses
# From here to the next ruler nothing else is needed: copy the block into your own trainer as it stands.

import torch  # noqa: E402

def group_advantages(returns, groups, *, eps=1e-6):
    """Eq. (1): returns [E], of any number type, and integer group ids [E] -> advantages [E], normalised within each
    group. Each turn of episode i gets advantages[i]: advantages[owner], with the episode of each row in owner [B].

    The standard deviation is the unbiased one. A group of equal returns, or of one episode, gets exactly 0.
    """
    returns = returns if returns.is_floating_point() else returns.float()
    advantages = torch.zeros_like(returns)
    for group in groups.unique():
        members = groups == group
        r = returns[members]
        if len(r) > 1 and (r != r[0]).any():
            advantages[members] = (r - r.mean()) / (r.std(unbiased=True) + eps)  # eq. (1)
    return advantages


def policy_loss(logp, old_logp, advantages, mask, *, num_tokens, clip=0.2, dual_clip=3.0):
    """Eq. (2): PPO's clipped surrogate with dual clip, summed over mask and divided by num_tokens.

    logp, old_logp, mask: [B, T] (or any one shape); advantages: the same shape, or [B] for one value per row.
    num_tokens: response tokens of the whole optimiser step. Returns (loss, metrics), both divided by it, so that
    micro-batches add up.
    """
    if advantages.dim() < logp.dim():
        advantages = advantages.unsqueeze(-1)  # [B, 1]
    log_ratio = (logp - old_logp).masked_fill(mask == 0, 0.0)  # what is masked may be anything, -inf too
    ratio = torch.exp(log_ratio.clamp(max=20))  # far beyond both clips, so that no gradient is 0 * inf
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    pessimistic = torch.maximum(-advantages * ratio, -advantages * clipped)
    bounded = torch.where(advantages < 0, torch.minimum(pessimistic, -advantages * dual_clip), pessimistic)  # eq. (2)
    with torch.no_grad():
        clip_fraction = (((ratio - 1).abs() > clip) * mask).sum() / num_tokens
        old_kl = (-log_ratio * mask).sum() / num_tokens
    loss = (bounded.masked_fill(mask == 0, 0.0) * mask).sum() / num_tokens
    return loss, {"grpo/clip_fraction": clip_fraction, "grpo/old_kl": old_kl}


def kl_loss(logp, ref_logp, mask, *, num_tokens):
    """Eq. (3): the k3 estimate of KL(student || reference) on the student's samples. All [B, T]; returns the loss.

    d is clamped to +-10, as in the released code, so that no single token can overflow.
    """
    d = (ref_logp.detach() - logp).masked_fill(mask == 0, 0.0).clamp(-10, 10)
    return ((torch.exp(d) - d - 1) * mask).sum() / num_tokens  # eq. (3)


SURROGATES = {  # the weight of -logp, a function of gap D and gate g
    "mle": lambda gap, gate: gate,  # the paper, and the released code
    "centered": lambda gap, gate: gate - 0.5,  # same expected gradient, less variance
    "gap": lambda gap, gate: gate * gap,  # a token that the teacher prefers counts more than one that it rejects
    "opsd": lambda gap, gate: gap,  # plain on-policy self-distillation
}


def sdar_loss(logp, teacher_logp, mask, *, beta=5.0, num_tokens=None, surrogate="mle", gate=None):
    """The last term of eq. (5), without lambda: its gradient is -Agg(w grad logp), with w from SURROGATES.

    logp, teacher_logp, mask: [B, T]. gate: None for eq. (4), or another gate's values [B, T]. num_tokens: None for the
    mask's own sum, or the tokens of the whole optimiser step. Returns (loss, metrics). The loss value, Agg(w D), is not
    a distance to the teacher and need not fall: only its gradient means something.
    """
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    difference = (teacher_logp.detach() - logp).masked_fill(mask == 0, 0.0)
    with torch.no_grad():
        gap = difference.detach()  # eq. (4)
        gate = torch.sigmoid(beta * gap) if gate is None else gate.masked_fill(mask == 0, 0.0)  # eq. (4)
        weight = SURROGATES[surrogate](gap, gate)
        metrics = {
            "sdar/gap": (gap * mask).sum() / num_tokens,
            "sdar/gap_abs": (gap.abs() * mask).sum() / num_tokens,
            "sdar/gate": (gate * mask).sum() / num_tokens,
            "sdar/gate_active": ((gate > 0.5) * mask).sum() / num_tokens,
        }
    return (weight * difference * mask).sum() / num_tokens, metrics  # eq. (5)


# ------------------------------------------------------------------------------------------------------------- settings

# A method is a row of settings; nothing else depends on its name. The baselines' formulas are in lib/baselines.py.

NO_TEACHER = {"sdar_coef": 0.0, "teacher": "none", "retrieval": "none"}
METHODS = {
    "grpo": NO_TEACHER,
    "gigpo": NO_TEACHER | {"gigpo_weight": 1.0, "advantage_stats": "episode"},  # arXiv 2505.10978
    "sdar": {},
    "opsd": {"pg_coef": 0.0, "surrogate": "opsd"},  # distillation without rewards, and without gate
    "grpo_opsd": {"surrogate": "opsd"},
    "skill_grpo": NO_TEACHER | {"retrieval": "type", "student_skills": True},
    "rlsd": {"sdar_coef": 0.0, "teacher": "rollout", "rlsd_mix": 0.5},  # arXiv 2604.03128
    "skill_sd": {"sdar_coef": 0.001, "teacher": "rollout", "surrogate": "k3"},  # its k3, not that of eq. (3)
    "opid": {"sdar_coef": 0.0, "teacher": "rollout", "retrieval": "none", "analyser": "rules",  # arXiv 2606.26790
             "opid_episode_weight": 0.001, "opid_step_weight": 0.001}}


@dataclass
class Config:
    """Every setting once: default (the paper's WebShop values), help, bounds. The command line is made from it."""

    env: str = option("webshop", "environment", group="task", choices=tuple(envs.ENVIRONMENTS))
    data: str | None = option(None, "folder with the official data; default: tasks generated by this repository")
    human_goals: bool = option(False, "webshop: instructions written by people instead of synthetic ones")
    retriever: str | None = option(None, "search: a retriever's address; default: our own search", resume=True)
    max_turns: int = option(envs.MAX_TURNS["webshop"], "turns after which an episode ends", at_least=1)
    env_timeout: float = option(60.0, "seconds that an environment may take, 0: any time", at_least=0, resume=True)
    history: int = option(2, "earlier turns shown in a prompt", at_least=0)
    history_observations: bool = option(True, "show the observations of earlier turns, not only the actions")
    prompt: str = option("short", "a few lines, cut to the bundled model, or rules, progress, possible actions and an "
                         "example too; the skills beside it are of the same style", choices=("short", "full"))
    reward: str = option("won", "return of an episode: 10 if won, or 10 x the graded score", choices=("won", "score"))
    model: str = option("tiny", "tiny (the bundled model), a folder, or a name that transformers loads", group="model")
    lora_rank: int = option(0, "train an adapter of this rank beside frozen weights (LoRA; take 10 times the --lr), 0: "
                            "train the weights", at_least=0, at_most=1024)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", resume=True)
    dtype: str = option("auto", "auto is bf16 compute on CUDA, fp32 elsewhere; what is trained is fp32",
                        choices=("auto", "float32", "bfloat16"), resume=True)
    threads: int = option(0, "CPU threads, 0 for torch's own choice", at_least=0, at_most=1024, resume=True)
    tasks: int = option(16, "tasks per step", group="rollout", at_least=1)
    group_size: int = option(8, "episodes per task, which are compared with each other", at_least=2, at_most=4096)
    temperature: float = option(1.0, "sampling temperature in training; log-probs use it too", at_least=1e-12)
    max_prompt_tokens: int = option(4096, "limit of a prompt; skills come on top of it", at_least=1, resume=True)
    max_response_tokens: int = option(512, "limit of a response", at_least=1, resume=True)
    engine: str = option("auto", "what generates responses: a loop of our own (torch), or vLLM; auto: vLLM on CUDA "
                         "where it is installed", choices=("auto", "torch", "vllm"), resume=True)
    rollout_batch: int = option(128, "responses generated side by side", at_least=1, resume=True)
    method: str = option("sdar", "implies settings below (README)", group="algorithm", choices=tuple(METHODS))
    preset: str = option("none", "official: as the released code does it (README)", choices=("none", "official"))
    clip: float = option(0.2, "e of eq. (2)", above=0)
    dual_clip: float = option(3.0, "bound on the loss of negative advantages, eq. (2)", at_least=1)
    pg_coef: float = option(1.0, "weight of L_pg in eq. (5); 0: distillation alone", at_least=0)
    kl_coef: float = option(0.01, "c_kl of eq. (5); 0 needs no reference model", at_least=0)
    entropy_coef: float = option(0.0, "c_ent of eq. (5)", at_least=0)
    invalid_penalty: float = option(0.1, "c_inv of eq. (1)", at_least=0)
    advantage_stats: str = option("episode", "group statistics over episodes, or over turns with the penalty inside",
                                  choices=("episode", "turn"))
    check_admissible: bool = option(True, "an action that the observation does not offer makes the turn invalid; off, "
                                   "broken answers are also read as the released code reads them")
    updates: int = option(1, "optimiser steps per batch", at_least=1)
    is_cap: float = option(0.0, "C: a token's advantage times min(exp(old_logp - the sampler's log-prob), C), where an "
                           "engine rounds otherwise than the trainer; 0: off", at_least=0)
    sdar_coef: float = option(0.01, "lambda of eq. (5)", at_least=0)
    gate_beta: float = option(5.0, "beta of eq. (4)", at_least=0)
    sdar_decay: int = option(0, "steps over which lambda falls linearly to 0; 0: it stays", at_least=0)
    gate: str = option("gap", "gate of eq. (4)", choices=kernels.GATES)
    surrogate: str = option("mle", "last term of (5): the weight of -logp (mle: g, centered: g - 1/2, gap: g D, opsd: "
                            "D), Skill-SD's loss (k3), or an exact divergence to the teacher, gate-weighted",
                            choices=(*SURROGATES, "k3", *kernels.DIVERGENCES))
    distill: str = option("all", "episodes that the last term of (5) acts on: all, lost ones, or zero-variance groups",
                          choices=("all", "failed", "zero_variance"))
    teacher: str = option("live", "the teacher's weights: current (live), as before the step's first update (rollout), "
                          "initial (ref), or an exponential moving average (ema); none: no teacher",
                          choices=("live", "rollout", "ref", "ema", "none"))
    ema: float = option(0.99, "--teacher ema: share of the old average that is kept per step", at_least=0, at_most=1)
    teacher_prompt: str = option("message", "skills inside the user message, or as raw text before the chat template "
                                 "and cut from the left", choices=("message", "raw"))
    retrieval: str = option("type", "skills that are shown: general.md and the file of the task's type, the files with "
                            "a keyword in the task, the most promising file so far (ucb), all files (full), or a "
                            "random one; none: no skills", choices=STRATEGIES)
    skills: str | None = option(None, "folder with general.md and a file per task type, default: data/skills/<env>; or "
                                "a control: shuffled (its words in another order), other (general.md and another task "
                                "type's file), foreign (another environment's)")
    student_skills: bool = option(False, "show the skills to the student while it trains")
    gigpo_weight: float = option(0.0, "weight of GiGPO's step advantages", group="other methods", at_least=0)
    gigpo_gamma: float = option(0.95, "discount of the returns that they compare", at_least=0, at_most=1)
    gigpo_std: bool = option(False, "divide them by their group's standard deviation, too")
    rlsd_mix: float = option(0.0, "share of RLSD's token weights in the advantage", at_least=0, at_most=1)
    rlsd_clip: float = option(0.2, "how far a token weight may be from 1", at_least=0, at_most=1)
    rlsd_decay: int = option(100, "steps over which that share falls linearly to 0; 0: it stays", at_least=0)
    analyser: str = option("none", "who writes OPID's hindsight skills: rules, or the policy",
                           choices=("none", "rules", "policy"))
    opid_episode_weight: float = option(0.0, "weight of the gap under an episode's skill in the advantage", at_least=0)
    opid_step_weight: float = option(0.0, "weight of the gap under a step's skill in the advantage", at_least=0)
    steps: int = option(150, "training steps", group="optimisation", at_least=0, resume=True)
    lr: float = option(1e-6, "learning rate", at_least=0)
    warmup: int = option(0, "steps of linear warm-up", at_least=0)
    lr_schedule: str = option("constant", "after the warm-up; linear: to 0 at the end", choices=("constant", "linear"))
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)
    max_grad_norm: float = option(1.0, "gradient norm clip", above=0)
    micro_tokens: int = option(4096, "student tokens per micro-batch, with padding; auto: as many as fit on the GPU",
                               at_least=0, resume=True, words={"auto": 0})
    recompute: bool = option(False, "gradient checkpointing: updates are slower and need less memory", resume=True)
    offload_reference: bool = option(False, "the reference model waits in host memory, not on the GPU", resume=True)
    seed: int = option(0, "seed of sampling and task order", at_least=-2**40, at_most=2**40)
    eval_every: int = option(10, "steps between evaluations, 0: none", group="evaluation", at_least=0, resume=True)
    eval_split: str = option("val", "split of the evaluation set, or several; alfworld: valid_seen,valid_unseen")
    eval_tasks: int = option(128, "tasks in the evaluation set, drawn by task type; 0 for the whole split", at_least=0)
    eval_temperature: float = option(0.4, "temperature of the sampled evaluation", at_least=0)
    eval_start: bool = option(True, "evaluate before the first step, too", resume=True)
    eval_greedy: bool = option(True, "play the evaluation set greedily, too", resume=True)
    out: str | None = option(None, "run folder; default: the first free of runs/<env>-<method>-<seed>, ...-2, ...-3",
                             group="commands")
    save_every: int = option(10, "steps between checkpoints", group="run folder", at_least=1, resume=True)
    keep: int = option(2, "newest checkpoints that stay, besides the first one", at_least=1, resume=True)
    episodes_every: int = option(10, "steps between dumps of episodes; the last step's stay", at_least=1, resume=True)
    report_to: str = option("none", "also send metrics to", choices=("none", "wandb", "tensorboard"), resume=True)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}

# A default comes from the last of three places that has one: Config, ENV_DEFAULTS, and TINY_DEFAULTS for the bundled
# model. Then a preset, a method and what the user says override it, in this order.

ENV_DEFAULTS = {  # where the paper's values for an environment differ from those for WebShop, and a real model's prompt
    "webshop": {"prompt": "full"},
    "alfworld": {"max_turns": envs.MAX_TURNS["alfworld"], "prompt": "full", "max_prompt_tokens": 2048,
                 "eval_split": "valid_unseen"},
    "search": {"max_turns": envs.MAX_TURNS["search"], "history": 4, "prompt": "full", "tasks": 128, "kl_coef": 0.001,
               "invalid_penalty": 0.01, "warmup": 15}}

# What a model of a million parameters needs instead of the paper's values, which are for billions. WebShop's expert is
# done in 5 turns. With 15, sampling at T=1 escapes every loop before the limit, so that nothing penalises loops and
# greedy play gets stuck in them.
# Steps are so small that many groups are all won or all lost, where the last term of eq. (5) shows (docs/study.md).
SMALL = {"max_turns": 8, "history_observations": False, "prompt": "short", "tasks": 2, "group_size": 4, "steps": 20,
         "lr": 1e-4, "lr_schedule": "linear", "warmup": 3, "kl_coef": 0.0, "sdar_coef": 1.0, "max_prompt_tokens": 512,
         "max_response_tokens": 32}
TINY_DEFAULTS = {
    "webshop": SMALL,
    "alfworld": SMALL | {"max_turns": 24, "lr": 2e-4},
    "search": SMALL | {"max_turns": 4, "max_response_tokens": 48, "steps": 40}}

PRESETS = {"none": {}, "official": {
    "advantage_stats": "turn", "teacher": "rollout", "teacher_prompt": "raw", "entropy_coef": 0.001,
    "check_admissible": False}}
OFFICIAL = {"opsd": {"surrogate": "mle"}, "grpo_opsd": {"surrogate": "mle", "gate_beta": 0.0},  # its scripts
            "opid": {"teacher_prompt": "message"}}  # OPID's own
RECIPE = ("env", "model", "preset", "method")  # settings that determine the defaults of the others
OF_ENV = {name: FIELDS[name].default for name in ("data", "human_goals", "retriever", "skills")}  # belong to one env
TABLES = ENV_DEFAULTS | {f"tiny in {env}": row for env, row in TINY_DEFAULTS.items()}  # for --help


def defaults(env, model):
    """This environment's and model's value of every setting that a table above overrides anywhere."""
    small = TINY_DEFAULTS if models.is_bundled(model) else {}
    common = {name: FIELDS[name].default for table in (ENV_DEFAULTS, small) for row in table.values() for name in row}
    return common | ENV_DEFAULTS[env] | small.get(env, {})


def in_environment(cfg, env):
    """cfg with another environment's own tasks, skills and defaults."""
    return dataclasses.replace(cfg, env=env, **OF_ENV, **defaults(env, cfg.model))


def make_config(explicit, base=None):
    """Explicit settings, on top of base -> Config, the rest by default, preset, method. UserError if they clash.

    What an explicit environment, preset or method implies replaces what base says of it.
    """
    implied = {"env": OF_ENV, "preset": PRESETS.get(explicit.get("preset"), {}),
               "method": METHODS.get(explicit.get("method"), {})}
    replaced = {name for key, row in implied.items() if key in explicit for name in row}
    given = {name: value for name, value in (base or {}).items() if name not in replaced} | explicit
    chosen = {name: given.get(name, FIELDS[name].default) for name in RECIPE}
    for name, value in chosen.items():
        check_value(FIELDS[name], value)
    values = defaults(chosen["env"], chosen["model"]) | PRESETS[chosen["preset"]] | METHODS[chosen["method"]]
    if chosen["preset"] == "official":
        values |= OFFICIAL.get(chosen["method"], {})
    cfg = Config(**(values | given))
    validate(cfg, explicit)
    if cfg.teacher != "none" and cfg.analyser == cfg.retrieval == "none" and "retrieval" not in given:
        raise UserError(f"The teacher beside --method {cfg.method} would read no skills, so that every gap is 0: add "
                        "--retrieval type, or none if that is meant.")
    return cfg


def validate(cfg, explicit=()):
    """Raises UserError for values out of bounds, contradictions, and explicit settings that would do nothing."""
    check_values(cfg)
    if cfg.max_turns > envs.MAX_TURNS[cfg.env]:
        raise UserError(f"--max_turns {cfg.max_turns} is more than the {envs.MAX_TURNS[cfg.env]} after which {cfg.env} "
                        "ends an episode: lower it.")
    if cfg.surrogate in kernels.DIVERGENCES and cfg.teacher not in ("live", "none"):
        raise UserError(f"--surrogate {cfg.surrogate} needs the teacher's whole distribution, which only --teacher "
                        f"live computes: leave --teacher {cfg.teacher} out.")
    if cfg.lora_rank and cfg.teacher == "ema":
        raise UserError("--teacher ema averages weights, and an average of an adapter's two factors is not that of "
                        "their product: choose another teacher, or leave --lora_rank out.")
    if cfg.gigpo_weight and cfg.advantage_stats == "turn":
        raise UserError("--gigpo_weight adds to advantages over episodes: leave --advantage_stats turn out.")
    if cfg.student_skills and cfg.retrieval == "ucb":
        raise UserError("--retrieval ucb learns from an episode before it chooses for the next, and the student's are "
                        "played side by side: choose another with --student_skills.")
    shift = cfg.opid_episode_weight or cfg.opid_step_weight
    if cfg.teacher == "none" and (cfg.rlsd_mix or shift):
        raise UserError(f"--method {cfg.method} moves advantages by what a teacher says: leave --teacher none out.")
    if cfg.analyser == "none" and shift:
        raise UserError("--opid_episode_weight and --opid_step_weight need hindsight skills: choose an --analyser.")
    if cfg.analyser == "rules" and cfg.env not in RULES:
        raise UserError(f"There are no rules that analyse {cfg.env}: choose --analyser policy.")
    if not (cfg.pg_coef or cfg.kl_coef or cfg.entropy_coef or cfg.sdar_coef and cfg.teacher != "none"):
        raise UserError("Nothing is learned, since every term of eq. (5) has weight 0: raise --pg_coef or --sdar_coef.")
    if cfg.skills in ("other", "foreign") and cfg.retrieval not in ("type", "none"):
        raise UserError(f"--skills {cfg.skills} exchanges the texts of task types, and --retrieval {cfg.retrieval} "
                        "does not choose by these: leave one of them out.")
    idle = idle_settings(cfg)
    for name in explicit:
        if name in idle:
            raise UserError(f"--{name} would do nothing here, since {idle[name]}: leave it out.")


def idle_settings(cfg):
    """{setting: why it does nothing in this configuration}."""
    taught = cfg.teacher != "none"
    shown = taught and cfg.analyser == "none" or cfg.student_skills
    rules = [
        (not taught, ("sdar_coef", "sdar_decay", "gate_beta", "gate", "surrogate", "distill", "teacher_prompt",
                      "rlsd_mix", "analyser"), "there is no teacher (--method grpo or --teacher none)"),
        (not shown, ("retrieval", "skills"), "no library skills are shown"),
        (taught and cfg.gate == "none", ("gate_beta",), "--gate none has no beta"),
        (cfg.surrogate in ("opsd", "k3"), ("gate", "gate_beta"), f"--surrogate {cfg.surrogate} has no gate"),
        (taught and not cfg.sdar_coef, ("sdar_decay", "distill"), "--sdar_coef is 0"),
        (cfg.analyser != "none", ("distill",), "every turn with a hindsight skill is distilled"),
        (not (cfg.opid_episode_weight or cfg.opid_step_weight), ("analyser",), "both of OPID's weights are 0"),
        (not cfg.pg_coef, ("clip", "dual_clip", "invalid_penalty", "advantage_stats", "gigpo_weight", "gigpo_gamma",
                           "gigpo_std", "is_cap", "rlsd_mix", "rlsd_clip", "rlsd_decay"), "--pg_coef is 0"),
        (cfg.teacher != "ema", ("ema",), "--teacher is not ema"),
        (not cfg.gigpo_weight, ("gigpo_gamma", "gigpo_std"), "--gigpo_weight is 0"),
        (not cfg.rlsd_mix, ("rlsd_clip", "rlsd_decay"), "--rlsd_mix is 0"),
        (cfg.analyser == "none", ("opid_episode_weight", "opid_step_weight"), "--analyser is none"),
        (cfg.updates == 1, ("clip", "dual_clip"), "with --updates 1 every ratio is 1"),
        (cfg.lora_rank or not (cfg.kl_coef or cfg.teacher == "ref"), ("offload_reference",),
         "there is no reference model with weights of its own"),
        (cfg.offload_reference and models.choose_device(cfg.device).type == "cpu", ("offload_reference",),
         "on a CPU all models are in host memory"),
        (cfg.history == 0, ("history_observations",), "--history 0 shows no earlier turn"),
        (not cfg.eval_every, {n for n in FIELDS if n.startswith("eval_")} - {"eval_every"}, "--eval_every is 0"),
        (cfg.env != "webshop", ("human_goals",), f"{cfg.env} has one kind of goals"),
        (cfg.env in ("alfworld", "search"), ("reward",), f"{cfg.env} grades no score but 0 and 1"),
        (cfg.env != "search", ("retriever",), f"{cfg.env} searches nothing"),
        (cfg.retriever, ("env_timeout",), "a retriever's searches have a deadline of their own"),
        (cfg.retrieval == "none", ("skills", "student_skills"), "--retrieval none shows no skills"),
        (cfg.student_skills and cfg.teacher in ("live", "rollout") and cfg.teacher_prompt == "message"
         and cfg.analyser == "none", ("student_skills", "teacher"), "student and teacher see the same"),
    ]
    return {name: why for holds, names, why in rules if holds for name in names}


# --------------------------------------------------------------------------------------------------- prompts and skills

class Context(NamedTuple):
    """What a turn's prompt is made of; the teacher's is made of the same and the skills."""

    task: str
    task_type: str
    history: tuple  # of (observation, action), oldest first
    observation: str
    admissible: tuple
    turn: int = 1  # its number
    max_turns: int = 1  # of the episode


def turn_context(cfg, info, observation, past=()):
    """The context of an observation; past: all earlier (observation, action) pairs, of which the last are shown."""
    shown = past[-cfg.history:] if cfg.history else ()
    history = tuple((seen if cfg.history_observations else "", action) for seen, action in shown)
    return Context(info["task"], info["task_type"], history, observation, tuple(info["admissible"] or ()),
                   len(past) + 1, cfg.max_turns)


FOREIGN = {"webshop": "search"}  # environments whose skills inform nothing here; elsewhere WebShop's


def load_skills(cfg, task_types):
    """-> {task type: text}, which cfg.retrieval chooses from. Raises UserError if a file is missing."""
    control = cfg.skills if cfg.skills in CONTROLS else None
    own = folders.ROOT / "data" / "skills" / (FOREIGN.get(cfg.env, "webshop") if control == "foreign" else cfg.env)
    own = own / "full" if cfg.prompt == "full" else own
    return library(cfg.skills if cfg.skills and not control else own, task_types, cfg.retrieval, control)


def skill_text(skills, episode):
    """The skills retrieved for an episode."""
    return retrieve(skills, episode.task_type, episode.goal, episode.name)


def teacher_text(text, episode):
    """What a teacher reads in an episode: the skills' text, then the task's own teacher_prompt."""
    return "\n".join(filter(None, (text, episode.teacher_prompt)))


def render(cfg, context, skills=""):
    """The text of a turn's user message."""
    if cfg.prompt == "full":
        return envs.FULL_PROMPTS[cfg.env](context, skills, official=cfg.preset == "official")
    return envs.PROMPTS[cfg.env](context.task, context.history, context.observation, context.admissible, skills)


def fit_prompt(chat, cfg, context, skills=""):
    """Context -> (the context that fits, its prompt ids): drops history first, then the middle of the observation.

    Skills, when the student sees any, come on top of cfg.max_prompt_tokens. Raises UserError if the task is too long.
    """
    limit = cfg.max_prompt_tokens + len(chat.encode(skills))
    while len(ids := chat.prompt(render(cfg, context, skills))) > limit and context.history:
        context = context._replace(history=context.history[1:])
    whole = chat.encode(context.observation)
    left = len(whole)  # tokens of the observation that are kept
    while (excess := len(ids) - limit) > 0:
        if not left:
            raise UserError(f"--max_prompt_tokens {cfg.max_prompt_tokens} is too small: the task and the instructions "
                            f"alone need {len(ids)} tokens. Raise it.")
        left = max(left - excess, 0)
        context = context._replace(observation=chat.ends(whole, left))
        ids = chat.prompt(render(cfg, context, skills))
    return context, ids


def teacher_ids(chat, cfg, turn, skills):
    """The teacher's prompt of a turn: the same context and the skills, which only --teacher_prompt raw cuts."""
    if cfg.teacher_prompt == "message":
        return chat.prompt(render(cfg, turn.context, skills))
    raw = chat.encode(f"[Privileged Skill Information]\n{skills}\n\n") + turn.prompt_ids
    return raw[-cfg.max_prompt_tokens:]  # the released code cuts from the left: the skills first


# --------------------------------------------------------------------------------------------------------------- policy

@dataclass
class Policy:
    """What samples and what is trained, with all that both need."""

    model: torch.nn.Module
    chat: models.Chat
    stop_ids: frozenset
    device: torch.device
    autocast: bool
    ref: torch.nn.Module | None = None  # the initial weights, frozen
    ema: torch.nn.Module | None = None  # a moving average of the weights
    packs: bool = True  # whether siblings may be packed into one sequence
    fused_error: float = 0.0  # largest difference between the trainer's log-probs and the model's own, in a trial
    rounded: torch.nn.Module | None = None  # a copy: of bf16 matrices under autocast, whole if the model is sharded
    vllm: vllm_engine.VLLM | None = None

    @property
    def fast(self):
        """The model for whatever needs no gradient."""
        return self.rounded or self.model

    def refresh(self):
        """Gives `fast` the weights that an optimiser step has changed."""
        models.refresh(self.fast, self.model)
        if self.vllm:
            self.vllm.stale = True

    def weights(self):
        """(name, tensor) of each weight, whole and under the model's own name, for an engine with a copy of its own."""
        return lora.merged_weights(self.fast) if lora.has_adapter(self.fast) else self.fast.named_parameters()

    def engine(self, cfg, temperature):
        """What generates responses (lib/engine.py); temperature 0 is greedy."""
        return (vllm_engine.VLLMEngine if self.vllm else TorchEngine)(self, cfg, temperature)


def load_policy(cfg, skills=None):
    """The model and tokenizer that cfg names -> Policy. Raises UserError if there are none, or they can't be used."""
    models.choose_device(cfg.device)  # raises before the weights are read
    return make_policy(*models.read_model(cfg.model, merge=not cfg.lora_rank), cfg, skills)


def make_policy(model, tokenizer, cfg, skills=None):
    """Model and tokenizer -> Policy on cfg.device. skills: {task type: text} that prompts may contain, or None.

    Raises UserError if the chat template does not fit, or if sampler and trainer would not be the same function.
    """
    device = models.choose_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    autocast = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    chat = models.Chat(tokenizer)
    lora.add(model, cfg.lora_rank, cfg.seed)
    if cfg.recompute:
        models.recompute_activations(model)
    policy = Policy(model.to(device).eval(), chat, models.end_of_turn_ids(model, chat), device, autocast)
    policy.fused_error, policy.packs = check_model(policy, cfg, skills)
    if autocast and cfg.lora_rank:
        lora.round_frozen(policy.model)
    elif autocast:
        policy.rounded = models.fast_copy(policy.model, alone=False)
    if cfg.kl_coef or cfg.teacher == "ref":
        policy.ref = models.reference(policy.model, autocast)
    if cfg.teacher == "ema":
        policy.ema = copy.deepcopy(policy.model).requires_grad_(False)
    return memory.offloaded(policy) if cfg.offload_reference else policy


def start_vllm(policy, cfg, skills=None, temperatures=()):
    """From now on vLLM generates the policy's responses, if that is what cfg.engine means here. Raises UserError if it
    cannot, or not at one of the temperatures that are to come."""
    if vllm_engine.is_chosen(cfg.engine, policy.device):
        policy.vllm = vllm_engine.VLLM(policy, cfg, longest_sequence(policy.chat, cfg, skills))
        for temperature in temperatures:
            policy.engine(cfg, temperature)


def longest_sequence(chat, cfg, skills=None):
    """Tokens of the longest prompt, with any of these skills in it, and its response that the settings allow."""
    bare, texts = Context("", "", (), "", ()), list((skills or {}).values())
    texts += ["\n".join(texts)] * (cfg.retrieval == "keyword")  # which may find all
    lengths = [len(chat.prompt(render(cfg, bare, text))) for text in ("", *texts)]
    response = max(cfg.max_response_tokens, hindsight.MAX_TOKENS if cfg.analyser == "policy" else 0)
    return cfg.max_prompt_tokens + max(lengths) - lengths[0] + response


def check_model(policy, cfg, skills=None):
    """agreement.check_model with this file's sampler and trainer."""
    def try_sampling(policy, prompts, tokens, temperature):
        noises = [random.Random(number) for number in range(len(prompts))]
        crowded = dataclasses.replace(cfg, max_response_tokens=tokens, rollout_batch=len(prompts) - 1)
        return sample(policy, prompts, crowded, temperature, noises)

    def try_training(policy, prompts, responses, temperature):
        batch = pack(prompts, responses, policy.device)
        inputs = head_inputs(policy, policy.model, batch)
        return kernels.fused_logprob(*inputs, batch.targets, temperature=temperature)[0]

    longest = longest_sequence(policy.chat, cfg, skills)
    return agreement.check_model(policy, cfg.model, longest, try_sampling, try_training)


def head_inputs(policy, model, batch):
    """lib.packing.Pack -> (hidden states that predict the response tokens [N, D], the head's weight [V, D])."""
    packed, dtype = {}, torch.bfloat16 if policy.autocast else model.get_output_embeddings().weight.dtype
    if batch.mask is not None:
        packed = {"attention_mask": models.attention_masks(model, batch.mask, batch.positions, dtype),
                  "position_ids": batch.positions}
    with models.autocast(policy):
        hidden = models.decoder(model)(input_ids=batch.ids, use_cache=False, **packed).last_hidden_state
    hidden = hidden.flatten(0, 1)[batch.predictors].to(dtype)  # the last norm gives fp32: no tensor core takes that
    return hidden, model.get_output_embeddings().weight.to(dtype)  # the decoder has gathered it, if it is sharded


# -------------------------------------------------------------------------------------------------------------- rollout

@dataclass
class Turn:
    """Observation, response and action; valid: the format was kept and the action possible."""

    context: Context
    prompt_ids: tuple
    response: Response
    text: str
    action: str
    valid: bool
    observation: str = ""  # as the environment gave it; a prompt that is too long shows less


@dataclass
class Episode:
    """All turns of a task, and how it ended."""

    task: Task
    task_type: str
    turns: list
    goal: str = ""  # the task in words
    teacher_prompt: str = ""  # what the task's own row has for the teacher
    name: str = ""  # seed, task, number among its group: all that its sampling noise follows from
    won: bool = False
    score: float = 0.0
    done: bool = False  # False: out of turns
    errors: int = 0  # searches that the retriever, or responses that a server, failed to give

    def outcome(self):
        """The episode without its turns, which is what other processes learn of it."""
        return dataclasses.replace(self, turns=[])


@dataclass
class Running:
    """An episode that is being played, and what its environment shows now."""

    episode: Episode
    env: object
    observation: str
    info: dict
    past: list  # of (observation, action), oldest first
    over: bool = False


def rollout(policy, environments, tasks, cfg, *, temperature=None, skills=None, seed=0, doing="rollout"):
    """Plays tasks[i] in environments[i], all side by side -> list of Episode, in the order of tasks. There may be more
    environments than tasks, but not fewer (ValueError).

    temperature: None for cfg.temperature, 0 for greedy. skills: None, or {task type: text} that the student sees too.
    Finished episodes stop generating. doing: what the progress bar calls it. Raises UserError naming task and action if
    an environment fails.
    """
    if len(environments) < len(tasks):
        raise ValueError(f"{len(tasks)} tasks need as many environments, not {len(environments)}")
    temperature = cfg.temperature if temperature is None else temperature
    running = [start_episode(cfg, task, env) for task, env in zip(tasks, environments)]
    number_episodes(running, seed)
    with progress.bar(doing, len(running) * cfg.max_turns, "turn"):
        play(policy, running, cfg, temperature, skills)
    return [r.episode for r in running]


def play(policy, running, cfg, temperature, skills):
    """Plays every episode at its own pace until it is over or out of turns: a response that ends steps its environment
    at once, between two tokens of the others. A retriever's searches run while others are generated."""
    engine, pending = policy.engine(cfg, temperature), {}  # pending: {an environment's answer to come: its turn}
    pool = ThreadPoolExecutor(SEARCHES)
    begin = pool.submit if cfg.retriever else at_once

    def ask(r):
        context, ids = turn_prompt(policy.chat, cfg, r, skills)
        engine.submit((r, context, ids), ids, random.Random(f"{r.episode.name} {len(r.past)}"))

    try:
        for r in running:
            ask(r)
        while pending or len(engine):
            for (r, *prompt), response in engine.step():
                turn = read_response(policy.chat, cfg, *prompt, response)
                pending[begin(step_environment, cfg, r, turn)] = r, turn
            futures.wait(pending, timeout=0 if len(engine) else None, return_when=futures.FIRST_COMPLETED)
            for done in [one for one in pending if one.done()]:  # in the order of their turns
                r, turn = pending.pop(done)
                record_turn(cfg, r, turn, done.result())
                r.over |= len(r.past) == cfg.max_turns
                progress.advance(1 + r.over * (cfg.max_turns - len(r.past)))
                if not r.over:
                    ask(r)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no search


def step_environment(cfg, running, turn):
    """The environment's answer to a turn. An episode whose response a server has failed to give ends there."""
    if turn.response.stop == "error":
        errors = running.info.get("retriever_errors", 0) + 1
        return running.observation, 0.0, False, True, running.info | {"valid": False, "retriever_errors": errors}
    return step_env(running.env, running.episode.task, turn.action, len(running.past) + 1, cfg.env_timeout)


def at_once(function, *args):
    """The result of a function as a Future that is done."""
    done = futures.Future()
    done.set_result(function(*args))
    return done


def sample(policy, prompts, cfg, temperature, noises):
    """prompts: id tuples, and each one's random.Random -> a Response each."""
    return respond(policy.engine(cfg, temperature), prompts, noises)


def number_episodes(running, seed):
    """Names each episode by seed, task and how many of the same task come before it: all that its noise depends on, so
    that neither the batch nor the other tasks change what is sampled."""
    seen = Counter()
    for r in running:
        task = r.episode.task[:2]  # split and id
        r.episode.name = f"{seed} {task} {seen[task]}"
        seen[task] += 1


def start_episode(cfg, task, env):
    observation, info = reset_env(env, task, cfg.env_timeout)
    episode = Episode(task, info["task_type"], [], info["task"], info.get("teacher_prompt", ""))
    return Running(episode, env, observation, info, [])


def turn_prompt(chat, cfg, running, skills):
    """-> (context, prompt ids) of the next turn; skills are those that the student sees, or None."""
    context = turn_context(cfg, running.info, running.observation, running.past)
    return fit_prompt(chat, cfg, context, skill_text(skills, running.episode) if skills else "")


def read_response(chat, cfg, context, prompt_ids, response):
    """-> a Turn with the action that the response asks for; whether it is possible the environment says later."""
    text = chat.response_text(response.ids[:-1] if response.stop == "end" else response.ids)
    action, valid = envs.parse_action(cfg.env, text, official=not cfg.check_admissible)
    return Turn(context, prompt_ids, response, text, action, valid)


def record_turn(cfg, running, turn, result):
    """Notes what the environment answered to a turn."""
    observation, _, terminated, truncated, info = result
    turn.observation = running.observation
    turn.valid = turn.valid and (info["valid"] or not cfg.check_admissible)
    running.past.append((running.observation, turn.action))
    running.observation, running.info, running.over = observation, info, terminated or truncated
    episode = running.episode
    episode.turns.append(turn)
    episode.won, episode.score, episode.done = bool(info["won"]), float(info["score"]), bool(terminated)
    episode.errors = info.get("retriever_errors", 0)


def make_env(cfg, probe=False):
    """probe: search once, so that a retriever that does not answer is noticed before anything else is loaded."""
    chosen = {name: value for name in ("retriever", "human_goals") if (value := getattr(cfg, name))}
    try:
        env = envs.make(cfg.env, data=cfg.data, **chosen)
        if probe and cfg.retriever:
            env.retriever.probe()
        return env
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    except (Exception, SystemExit) as error:  # of an environment that is not ours
        raise UserError(f"The environment {cfg.env} cannot be made: {describe(error)}") from error


def step_tasks(cfg, env, step):
    """Tasks of a training step, drawn by (seed, step) alone so that a resumed run sees the same; a group's episodes are
    contiguous."""
    size = count_tasks(env, "train")
    if size < cfg.tasks:
        raise UserError(f"--tasks {cfg.tasks} is more than the {size} training tasks of {cfg.env}: lower it.")
    ids = random.Random(f"{cfg.seed} tasks {step}").sample(range(size), cfg.tasks)
    return [Task("train", task_id, group) for group, task_id in enumerate(ids) for _ in range(cfg.group_size)]


def evaluation_tasks(cfg, env):
    """The fixed evaluation set: cfg.eval_tasks tasks of a split, drawn by task type and the same for every run."""
    splits = dict.fromkeys(cfg.eval_split.split(","))  # no task counts twice
    tasks = [(split, i, kind) for split in splits for i, kind in enumerate(types_of(env, split))]
    if len(tasks) < cfg.eval_tasks:
        raise UserError(f"--eval_tasks {cfg.eval_tasks} is more than the {len(tasks)} tasks of split "
                        f"{cfg.eval_split!r}: lower it; 0 plays all.")
    chosen = stratified([kind for *_, kind in tasks], cfg.eval_tasks or len(tasks))
    return [Task(*tasks[number][:2], number) for number in chosen]


# ----------------------------------------------------------------------------------------------- rows and micro-batches

@dataclass(eq=False)
class Row:
    """One turn, as the losses see it. Rows are compared by identity, so that they can be keys of what is computed."""

    prompt_ids: tuple
    teacher_ids: tuple  # () without a teacher
    response_ids: tuple
    advantage: float
    logp: tuple  # the sampler's log-probs of the response
    source: str = "library"  # of the skills: library, episode or step (of hindsight), "" where nothing is distilled
    skills: str = ""  # their text
    top: dict = dataclasses.field(default_factory=dict)  # {"student" | "teacher": (ids, log-probs)} of likeliest tokens


def episode_return(cfg, episode):
    return 10.0 * (episode.score if cfg.reward == "score" else float(episode.won))


def make_rows(policy, cfg, episodes, skills):
    """Episodes -> (rows, one per turn, with its advantage and the teacher's prompt; metrics).

    skills/missing: share of turns whose skill text is empty or not whole in the prompt that is to show it.
    """
    advantages, metrics = turn_advantages(cfg, episodes)
    texts, more = skill_texts(policy, cfg, episodes, skills)
    rows, prompts, missing = [], {}, []  # equal turns have equal teacher prompts: each is made once
    for turn, advantage, (source, text) in zip((t for e in episodes for t in e.turns), advantages.tolist(), texts):
        key = turn.prompt_ids, text
        if key not in prompts:
            ids = () if cfg.teacher == "none" else teacher_ids(policy.chat, cfg, turn, text)
            prompts[key] = ids, not text or contains(policy.chat.tokenizer.decode(ids or turn.prompt_ids), text)
        response = turn.response
        rows.append(Row(turn.prompt_ids, prompts[key][0], response.ids, advantage, response.logp, source, text))
        missing.append(not prompts[key][1] or not text.strip() and source != "" and cfg.retrieval != "none")
    longest = max(len(row.teacher_ids) + len(row.response_ids) for row in rows)
    agreement.check_lengths(models.text_config(policy.model), cfg.model, longest, longest)
    return rows, metrics | more | {"skills/missing": parallel.mean(missing)}


def turn_advantages(cfg, episodes):
    """-> (advantages of all turns [B], metrics): eq. (1), GiGPO's step advantages, the penalty for invalid turns."""
    returns = torch.tensor([episode_return(cfg, e) for e in episodes], dtype=torch.float64)  # [E]
    groups = torch.tensor([e.task.group for e in episodes])
    turns = [(i, turn) for i, e in enumerate(episodes) for turn in e.turns]
    owner = torch.tensor([i for i, _ in turns])  # [B] episode of each turn
    penalty = torch.tensor([0.0 if turn.valid else cfg.invalid_penalty for _, turn in turns], dtype=torch.float64)
    metrics = {"grpo/zero_variance_groups": parallel.mean(zero_variance_groups(cfg, episodes).values())}
    if cfg.advantage_stats == "turn":  # the released code: statistics over turns, penalty inside
        return group_advantages(returns[owner] - penalty, groups[owner]), metrics
    advantages = group_advantages(returns, groups)[owner]  # eq. (1)
    if cfg.gigpo_weight:
        rewards = torch.zeros(len(turns), dtype=torch.float64)
        rewards[torch.tensor([len(e.turns) for e in episodes]).cumsum(0) - 1] = returns  # earned by the last turn
        observations, before = [turn.observation for _, turn in turns], advantages
        advantages = gigpo_advantages(rewards, owner, groups[owner], observations, gamma=cfg.gigpo_gamma,
                                      weight=cfg.gigpo_weight, divide_by_std=cfg.gigpo_std)
        step_groups = Counter(zip(groups[owner].tolist(), observations))
        count = parallel.total(len(turns))
        metrics |= {"gigpo/change": parallel.total((advantages - before).abs().sum().item()) / count,
                    "gigpo/alone": parallel.total(sum(size == 1 for size in step_groups.values())) / count}
    return advantages - penalty, metrics


def zero_variance_groups(cfg, episodes):
    """{group: whether all of its returns are equal, so that eq. (1) gives 0}."""
    returns = defaultdict(set)
    for e in episodes:
        returns[e.task.group].add(episode_return(cfg, e))
    return {group: len(some) == 1 for group, some in returns.items()}


def skill_texts(policy, cfg, episodes, skills):
    """What teacher, or student, sees beside each turn's prompt -> ([(source, text)] of all turns, metrics)."""
    if cfg.teacher == "none" and not cfg.student_skills:
        return [("", "")] * sum(len(e.turns) for e in episodes), {}
    if cfg.analyser != "none":
        analyses = hindsight.analyse(policy, cfg, episodes, [episode_return(cfg, e) for e in episodes], sample)
        texts = [routed(cfg, one, e, number) for e, one in zip(episodes, analyses) for number in range(len(e.turns))]
        return texts, {"opid/analysed": parallel.mean(one is not None for one in analyses),
                       "opid/step_turns": parallel.mean(source == "step" for source, _ in texts)}
    episodes = parallel.spread(episodes, Episode.outcome)  # ucb learns from all processes' in the same order
    tied, texts = zero_variance_groups(cfg, episodes), []
    for e in episodes:
        distilled = {"all": True, "failed": not e.won, "zero_variance": tied[e.task.group]}[cfg.distill]
        text = skill_text(skills, e) if cfg.teacher == "none" else teacher_text(skill_text(skills, e), e)
        texts += [("library" if distilled else "", text)] * len(e.turns)
        if cfg.retrieval == "ucb":
            skills.learn(e.task_type, episode_return(cfg, e) / 10)
    return texts, {}


def routed(cfg, analysis, episode, number):
    """OPID's hard switch: a turn's own skill if it has one, else that of its episode -> (source, text)."""
    if analysis and cfg.opid_step_weight and number in analysis.step_skills:
        return "step", teacher_text(analysis.step_skills[number], episode)
    if analysis and cfg.opid_episode_weight:
        return "episode", teacher_text(analysis.episode_skill, episode)
    return "", ""


def pack_rows(policy, groups, teacher=False):
    """Groups of rows -> lib.packing.Pack; teacher: behind the teacher's prompts."""
    prompts = [group[0].teacher_ids if teacher else group[0].prompt_ids for group in groups]
    return pack(prompts, [[row.response_ids for row in group] for group in groups], policy.device)


def frozen_inputs(policy, model, micro_batch, cfg, teacher):
    """`head_inputs` of a micro-batch, without gradient, and its targets [N]. teacher: behind the teacher's prompts, in
    as many parts as these ask for. The rows' order is the same."""
    parts = teacher_parts(micro_batch, cfg.micro_tokens) if teacher else [micro_batch]
    batches = [pack_rows(policy, part, teacher) for part in parts]
    hidden, weights = zip(*(head_inputs(policy, model, batch) for batch in batches))
    return torch.cat(hidden), weights[0], torch.cat([batch.targets for batch in batches])


def split_tokens(rows, values):
    """values [N] -> a list of numbers per row."""
    return [part.tolist() for part in values.detach().float().cpu().split([len(row.response_ids) for row in rows])]


def join_tokens(rows, by_row, device):
    """by_row: {row: a number per response token} -> those of the rows [N]."""
    return torch.tensor([x for row in rows for x in by_row[row]], dtype=torch.float32, device=device)


def repeat_tokens(rows, value, device):
    """value(row) for each of the row's response tokens -> [N]."""
    return join_tokens(rows, {row: [value(row)] * len(row.response_ids) for row in rows}, device)


@torch.no_grad()
def response_logp(policy, model, rows, cfg, teacher=False):
    """Log-probs of the rows' responses under model, after the student's or the teacher's prompt -> {row: list}."""
    found = {}
    for members, *head, targets in hidden_states(policy, model, rows, cfg, teacher):
        logp, _ = kernels.fused_logprob(*head, targets, temperature=cfg.temperature)
        found |= zip(members, split_tokens(members, logp))
    return found


def hidden_states(policy, model, rows, cfg, teacher):
    """Yields (rows, hidden states that predict their tokens [N, D], head's weight [V, D], targets [N]) of each
    micro-batch."""
    with memory.on_device(model, policy.device):
        for micro_batch in micro_batches(rows, cfg.micro_tokens, policy.packs):
            yield list(itertools.chain(*micro_batch)), *frozen_inputs(policy, model, micro_batch, cfg, teacher)


def note_likeliest(policy, rows, cfg):
    """Notes in each row the likeliest tokens of student and teacher, for the dump of episodes."""
    teacher = {"none": None, "ref": policy.ref, "ema": policy.ema}.get(cfg.teacher, policy.fast)
    with torch.no_grad(), torch.random.fork_rng():  # models that draw numbers of their own draw the same afterwards
        for side, model in ("student", policy.fast), ("teacher", teacher):
            for some, *head, _ in hidden_states(policy, model, rows, cfg, side == "teacher") if model else ():
                note_top(side, some, *head, cfg.temperature)


# ----------------------------------------------------------------------------------------------------------- train step

class Frozen(NamedTuple):
    """Log-probs under weights that a step's updates do not change, {row: list}; None where no setting asks for them."""

    old_logp: dict | None = None
    ref_logp: dict | None = None
    teacher_logp: dict | None = None


def frozen_logp(policy, rows, cfg):
    """The log-probs that a step needs from before its first update -> Frozen."""
    early_teacher = {"rollout": policy.fast, "ref": policy.ref, "ema": policy.ema}.get(cfg.teacher)
    return Frozen(
        old_logp=response_logp(policy, policy.fast, rows, cfg) if cfg.updates > 1 else None,
        ref_logp=response_logp(policy, policy.ref, rows, cfg) if cfg.kl_coef else None,
        teacher_logp=None if early_teacher is None else response_logp(policy, early_teacher, rows, cfg, teacher=True))


def token_scores(policy, cfg, micro_batch, frozen):
    """Student and teacher on a micro-batch's response tokens -> kernels.GapGate [N]; None for what is not there."""
    batch = pack_rows(policy, micro_batch)
    hidden, weight = head_inputs(policy, policy.model, batch)
    if cfg.teacher == "live":
        with torch.no_grad():
            skilled, *_ = frozen_inputs(policy, policy.fast, micro_batch, cfg, teacher=True)
        return kernels.fused_gap_gate(
            hidden, skilled, weight, batch.targets, beta=cfg.gate_beta, gate=cfg.gate, temperature=cfg.temperature,
            divergence=cfg.surrogate if cfg.surrogate in kernels.DIVERGENCES else None)
    logp, entropy = kernels.fused_logprob(hidden, weight, batch.targets, temperature=cfg.temperature)
    if cfg.teacher == "none":
        return kernels.GapGate(logp=logp, teacher_logp=None, entropy=entropy, gap=None, gate=None, divergence=None)
    teacher_logp = join_tokens(itertools.chain(*micro_batch), frozen.teacher_logp, logp.device)
    gap = teacher_logp - logp.detach()
    gate = kernels.gate_values(cfg.gate, gap, entropy.detach(), cfg.gate_beta)
    return kernels.GapGate(logp, teacher_logp, entropy, gap, gate, divergence=None)


def step_loss(policy, cfg, micro_batch, num_tokens, frozen):
    """Eq. (5) of one micro-batch -> (loss, metrics as shares of num_tokens, {row: (gap, gate)} for the dump)."""
    rows = list(itertools.chain(*micro_batch))
    tokens = token_scores(policy, cfg, micro_batch, frozen)
    logp, mask = tokens.logp, torch.ones_like(tokens.logp)
    old_logp = logp.detach() if frozen.old_logp is None else join_tokens(rows, frozen.old_logp, logp.device)
    advantages, metrics = token_advantages(cfg, rows, old_logp, tokens.teacher_logp, num_tokens)
    sampled = join_tokens(rows, {row: row.logp for row in rows}, logp.device)
    if cfg.is_cap:
        weight = truncated_weights(old_logp, sampled, cfg.is_cap)
        advantages, metrics["rollout/is_weight"] = advantages * weight, weight.sum() / num_tokens
    pg, more = policy_loss(logp, old_logp, advantages, mask, num_tokens=num_tokens, clip=cfg.clip,
                           dual_clip=cfg.dual_clip)
    off = (old_logp - sampled).abs()
    metrics |= more | {"rollout/logp_diff_mean": off.sum() / num_tokens, "rollout/logp_diff_max": off.max()}
    terms = {"grpo/loss": (cfg.pg_coef, pg), "grpo/entropy": (-cfg.entropy_coef, tokens.entropy.sum() / num_tokens)}
    if cfg.kl_coef:
        ref_logp = join_tokens(rows, frozen.ref_logp, logp.device)
        terms["kl/loss"] = cfg.kl_coef, kl_loss(logp, ref_logp, mask, num_tokens=num_tokens)
    gaps = {}
    if cfg.teacher != "none":
        distilled = repeat_tokens(rows, lambda row: row.source != "", logp.device)  # [N]
        distill, more = distillation(cfg, tokens, old_logp, distilled, num_tokens)
        terms["sdar/loss"] = cfg.sdar_coef, distill
        metrics |= more
        gaps = dict(zip(rows, zip(split_tokens(rows, tokens.gap), split_tokens(rows, tokens.gate))))
    loss = sum((coef * value for coef, value in terms.values() if coef), start=0.0 * pg)  # eq. (5), always with a graph
    return loss, metrics | {name: value.detach() for name, (_, value) in terms.items()}, gaps


def truncated_weights(old_logp, sampled_logp, cap):
    """min(exp(old_logp - sampled_logp), cap), all [N]: the importance of tokens that were sampled with other arithmetic
    than the trainer's, truncated (Yao et al. 2025). L_pg is proportional to the advantage, which they multiply."""
    return torch.exp((old_logp - sampled_logp).clamp(max=20)).clamp(max=cap)


def token_advantages(cfg, rows, old_logp, teacher_logp, num_tokens):
    """-> (advantages [N]: those of the tokens' turns, moved by the teacher if RLSD or OPID ask for it; metrics)."""
    mask, metrics = torch.ones_like(old_logp), {}
    advantages = turn = repeat_tokens(rows, lambda row: row.advantage, mask.device)
    if cfg.rlsd_mix:
        advantages = rlsd_advantages(turn, old_logp, teacher_logp, mask, mix=cfg.rlsd_mix, clip=cfg.rlsd_clip)
        metrics["rlsd/change"] = (advantages - turn).abs().sum() / num_tokens
    if cfg.opid_episode_weight or cfg.opid_step_weight:
        of_episode = (teacher_logp - old_logp) * repeat_tokens(rows, lambda row: row.source == "episode", mask.device)
        of_step = (teacher_logp - old_logp) * repeat_tokens(rows, lambda row: row.source == "step", mask.device)
        advantages = opid_advantages(advantages, of_episode, of_step, mask, episode_weight=cfg.opid_episode_weight,
                                     step_weight=cfg.opid_step_weight)
        for name, value in ("episode_gap", of_episode), ("step_gap", of_step), ("change", advantages - turn):
            metrics[f"opid/{name}"] = value.abs().sum() / num_tokens
    return advantages, metrics


def distillation(cfg, tokens, old_logp, mask, num_tokens):
    """The last term of eq. (5), without lambda, over the tokens in mask [N] -> (loss, metrics)."""
    loss, metrics = sdar_loss(tokens.logp, tokens.teacher_logp, mask, beta=cfg.gate_beta, num_tokens=num_tokens,
                              surrogate=cfg.surrogate if cfg.surrogate in SURROGATES else "mle", gate=tokens.gate)
    metrics["sdar/distilled"] = mask.sum() / num_tokens
    if cfg.surrogate in kernels.DIVERGENCES:
        loss = (tokens.gate * tokens.divergence * mask).sum() / num_tokens
    if cfg.surrogate == "k3":
        loss, more = skill_sd_loss(tokens.logp, tokens.teacher_logp, old_logp, mask, num_tokens=num_tokens)
        metrics |= more
    return loss, metrics


def train_step(policy, optimizer, rows, cfg, step):
    """All rows of a batch -> cfg.updates optimiser steps -> (metrics, {row: (gap, gate)}).

    Every denominator is the number of response tokens of a whole optimiser step, whatever the micro-batches.
    """
    cfg = scheduled(cfg, step)
    frozen = frozen_logp(policy, rows, cfg)
    batch = parallel.spread(rows)  # None for each row of another process
    if cfg.updates > 1:
        batch = random.Random(f"{cfg.seed} {step}").sample(batch, len(batch))
    size, lr = math.ceil(len(batch) / cfg.updates), learning_rate(cfg, step)
    parts = [[row for row in batch[i:i + size] if row] for i in range(0, len(batch), size)]
    total, gaps = defaultdict(float), {}
    with runs.all_or_nothing(policy.model, optimizer, copy=len(parts) > 1), progress.bar("update", len(rows), "row"):
        for part in parts:
            num_tokens = parallel.total(sum(len(row.response_ids) for row in part))
            optimizer.zero_grad(set_to_none=True)
            found = []
            for micro_batch in parallel.in_step(micro_batches(part, cfg.micro_tokens, policy.packs), policy.model):
                loss, metrics, some_gaps = step_loss(policy, cfg, micro_batch, num_tokens, frozen)
                loss.backward()
                gaps |= some_gaps
                found.append({name: float(value) for name, value in metrics.items()})
                progress.advance(sum(map(len, micro_batch)))
            for name, value in itertools.chain(*(one.items() for one in parallel.gather(found))):
                total[name] = max(total[name], value) if name.endswith("_max") else total[name] + value / len(parts)
            total["grpo/grad_norm"] += optimizer_step(policy.model, optimizer, lr, cfg, total) / len(parts)
            policy.refresh()
    if policy.ema is not None:
        models.move_average(policy.ema, policy.model, cfg.ema)
    return dict(total), gaps


def scheduled(cfg, step):
    """cfg with sdar_coef and rlsd_mix as of step 0, 1, ..: both may fall linearly to 0."""
    left = lambda steps: max(0.0, 1 - step / steps) if steps else 1.0
    return dataclasses.replace(cfg, sdar_coef=cfg.sdar_coef * left(cfg.sdar_decay),
                               rlsd_mix=cfg.rlsd_mix * left(cfg.rlsd_decay))


def learning_rate(cfg, step):
    """Of step 0, 1, ..: a linear warm-up, then constant, or falling linearly to 0 at cfg.steps."""
    rate = cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1))
    return rate * (1 - step / cfg.steps) if cfg.lr_schedule == "linear" else rate


def optimizer_step(model, optimizer, lr, cfg, metrics):
    """-> the gradient's norm before clipping. If that is not finite it changes nothing and raises UserError, with the
    cause that the step's metrics so far suggest."""
    norm = parallel.full(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)).item()
    health.check_finite(norm, model, metrics)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


def make_optimizer(model, cfg):
    trained = [w for w in model.parameters() if w.requires_grad]  # unfused, a step on a GPU takes their memory again
    return torch.optim.AdamW(trained, cfg.lr, weight_decay=cfg.weight_decay, fused=trained[0].is_cuda or None)


# ------------------------------------------------------------------------------------------------------------- the loop

def train(cfg, folder=None, checkpoint=None):
    """One run of cfg.steps training steps, with evaluations and checkpoints.

    folder, checkpoint: the run to go on with; a new run's folder is made once everything else is loaded and checked.
    """
    if not checkpoint:
        lora.check_new(cfg.model, cfg.lora_rank)
    env = make_env(cfg, probe=True)
    count = max(len(parallel.share(step_tasks(cfg, env, 0), cfg.group_size)),
                len(parallel.share(evaluation_tasks(cfg, env))) if cfg.eval_every else 0)
    environments = [env] + [make_env(cfg) for _ in range(count - 1)]
    skills = load_skills(cfg, env.task_types)
    policy = load_policy(dataclasses.replace(cfg, model=str(checkpoint)) if checkpoint else cfg, skills)
    check_prompt_limit(policy, cfg, env)
    parallel.shard(policy, models.decoder(policy.model), cfg.tasks)
    start_vllm(policy, cfg, skills, [cfg.temperature, *[cfg.eval_temperature] * bool(cfg.eval_every)])
    cfg.micro_tokens = cfg.micro_tokens or memory.choose_micro_tokens(cfg, policy)
    optimizer = make_optimizer(policy.model, cfg)
    more = {"skills": skills} | ({"ema": policy.ema} if policy.ema else {})  # with a state of its own in checkpoints
    if checkpoint:
        done = folders.restore(checkpoint, optimizer, policy.ref, cfg.eval_every, more)
        parallel.first(folders.write_settings, folder, cfg)  # some may have changed
    else:
        name = f"{cfg.env}-{runs.method_name(vars(cfg), '-')}-{cfg.seed}"
        folder, done = parallel.first(folders.create_run, cfg, __version__, name), 0
    head = policy.model.get_output_embeddings().weight
    print(runs.headline(cfg, folder, policy, kernels.choose_backend("auto", head, head)) +
          health.forecast(cfg, folder, policy), flush=True)
    if cfg.eval_every:
        digest = evaluation_set_hash(env, evaluation_tasks(cfg, env), cfg.env_timeout)
        print(f"evaluation set {digest[:12]}, of split {cfg.eval_split}", flush=True)
    with runs.Run(folder, policy.model, policy.chat.tokenizer, optimizer, cfg, done, "python sdar.py",
                  more=more) as run:
        learn(policy, optimizer, environments, skills, cfg, run)
    print(runs.farewell(folder))


def learn(policy, optimizer, environments, skills, cfg, run):
    """The algorithm: evaluate if due, rollout, rows, train step, log, save if due."""
    for step in range(run.step, cfg.steps):
        if cfg.eval_every and step % cfg.eval_every == 0 and (step or cfg.eval_start):
            evaluate(policy, cfg, environments, skills, run)
        start, seed = time.perf_counter(), cfg.seed * 1_000_003 + step
        torch.manual_seed(seed)  # for models that draw numbers of their own
        tasks = parallel.share(step_tasks(cfg, environments[0], step), cfg.group_size)
        episodes = parallel.each(rollout, policy, environments, tasks, cfg, seed=seed,
                                 skills=skills if cfg.student_skills else None)
        rolled = time.perf_counter()
        with runs.uninterrupted(), skills.undone_on_error():
            rows, metrics = make_rows(policy, cfg, episodes, skills)
            if policy.vllm:
                policy.vllm.sleep()
            if stays(step + 1, cfg.episodes_every) or step + 1 == cfg.steps:
                note_likeliest(policy, rows, cfg)
            trained, gaps = train_step(policy, optimizer, rows, cfg, step)
            optimizer.zero_grad(set_to_none=True)  # the next rollout needs the room
            metrics |= trained | runs.episode_metrics(episodes, [episode_return(cfg, e) for e in episodes])
            parallel.first(write_step, run.folder, step + 1, cfg.episodes_every, parallel.gather(episode_lines(
                policy.chat, envs.READABLE[cfg.env], episodes, rows=rows, gaps=gaps)))
            now = time.perf_counter()
            metrics |= {"time/rollout": rolled - start, "time/update": now - rolled, "time/step": now - start,
                        "mem/peak_gb": runs.peak_memory_gb(policy.device)}
            run.finish_step(metrics, runs.step_line(cfg, step + 1, metrics))
    if cfg.eval_every:
        evaluate(policy, cfg, environments, skills, run)


def evaluate(policy, cfg, environments, skills, run):
    """Plays the evaluation set sampled, greedily, and with skills if the student trains with them; logs, draws."""
    tasks = evaluation_tasks(cfg, environments[0])

    def play_all(**how):
        own = parallel.each(rollout, policy, environments, parallel.share(tasks), cfg, seed=cfg.seed, **how)
        return parallel.spread(own, Episode.outcome)

    sampled, others = play_all(temperature=cfg.eval_temperature, doing="evaluation"), {}
    if cfg.eval_greedy:
        others["greedy"] = play_all(temperature=0, doing="greedy evaluation")
    if cfg.student_skills:
        others["skilled"] = play_all(temperature=cfg.eval_temperature, skills=skills, doing="evaluation with skills")
    success = {name: runs.mean(e.won for e in some) for name, some in others.items()}
    metrics = {"eval/success": runs.mean(e.won for e in sampled), "eval/score": runs.mean(e.score for e in sampled),
               **{f"eval/{name}_success": rate for name, rate in success.items()},
               "eval/errors": sum(e.errors for e in itertools.chain(sampled, *others.values())),
               **{f"eval/success/{kind}": runs.mean(e.won for e in sampled if e.task_type == kind)
                  for kind in sorted({e.task_type for e in sampled})}}
    run.log(run.step, metrics, f"evaluation after step {run.step}: success {metrics['eval/success']:.3f} at T="
            f"{cfg.eval_temperature:g}{''.join(f', {rate:.3f} {name}' for name, rate in success.items())} "
            f"({len(tasks)} of {cfg.eval_split})")
    runs.plot_curve(run.folder, cfg)


def check_prompt_limit(policy, cfg, env):
    """Raises UserError if the first task's prompt cannot be made to fit, before anything is saved."""
    turn_prompt(policy.chat, cfg, start_episode(cfg, Task("train", 0, 0), env), None)


# --------------------------------------------------------------------------------------------------------- command line

def parse_args(argv):
    """Command line -> (explicitly given settings, run or checkpoint to resume or None, settings file or None)."""
    parser = Parser("python sdar.py [options]", __doc__).add_commands("resume", "config", version=__version__)
    add_options(parser, Config, tables=TABLES)
    explicit = vars(parser.parse_args(argv))
    return explicit, explicit.pop("resume"), explicit.pop("config")


def command(argv):
    explicit, resume, config = parse_args(argv)
    if resume is None:
        base = None if config is None else set_by_hand(folders.settings_in(config, Config), make_config, RECIPE)
        return train(make_config(explicit, base))
    cfg, folder, checkpoint = parallel.first(folders.reopen, resume, explicit, Config, changeable(Config))
    validate(cfg, explicit)
    if folders.is_finished(cfg, folder, checkpoint):
        return print(folders.finished_text(cfg, folder, checkpoint))
    train(cfg, folder, checkpoint)


def main(argv=None):
    """The command line. Returns the exit status; bad input is one sentence on standard error and status 2."""
    return exit_status(parallel.launched(command), argv)


if __name__ == "__main__":
    sys.exit(main())
