"""SDAR: self-distilled agentic reinforcement learning (arXiv 2605.15155), in one file.

An agent plays whole episodes (several turns of observation -> response); GRPO compares the episodes of one task with
each other; and the same model, shown skill text that the student does not see, says of each sampled token how it
likes it.

    (1) A_i = (R_i - mean_group R) / (std_group R + 1e-6)               one R an episode; invalid turns A_i - c_inv
    (2) L_pg = -Agg min(r A, clip(r, 1-e, 1+e) A), dual clip for A < 0  r = exp(logp - old_logp)
    (3) L_kl = Agg(exp(d) - d - 1),  d = ref_logp - logp                the k3 estimate of KL(student || reference)
    (4) gap D = teacher_logp - logp,  gate g = sigmoid(beta D)          both detached
    (5) L = L_pg + c_kl L_kl - c_ent H + lambda Agg(g (teacher_logp - logp))

Agg(z) is the sum over all response tokens of an optimiser step divided by their number.

    symbol      name here          meaning
    pi, s       policy, prompt     one row is one turn: prompt ids (task, short history, observation) -> response ids
    R, A        reward, advantage  10 if the task was won, else 0; normalised inside the group
    r           ratio              current against sampling policy
    D, g        gap, gate          teacher - student log-prob of a sampled token; its trust weight in (0, 1)
    lambda, beta  sdar_coef, gate_beta

What (5) adds has the gradient -lambda Agg(g grad logp): a gate-weighted likelihood of the student's own samples.
On-policy samples have E[grad logp] = 0, so in expectation g acts as g - 1/2 = tanh(beta D / 2) / 2, a bounded and odd
reward for what the skilled teacher prefers, about lambda beta / 4 times the gradient of the reverse KL for small gaps;
at beta = 0 it is pure noise.

Absent on purpose: a critic, a replay buffer, gradients through gate or teacher, re-tokenised responses.

    python sdar.py                                                       the embedded model learns to shop, on a laptop
    python sdar.py --env webshop --model Qwen/Qwen2.5-1.5B-Instruct      the same program on a real model
"""

import argparse
import contextlib
import copy
import dataclasses
import inspect
import itertools
import json
import math
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import envs
import kernels

HERE = Path(__file__).resolve().parent
TINY = HERE / "data" / "tiny"

# B rows (a row is one turn of an episode) · T response tokens of a row · N response tokens of a batch, flattened
# D hidden size · V vocabulary · L length of a packed sequence


# ------------------------------------------------------------------------------------------------ advantages and losses
# From here to the next ruler nothing but torch is used: copy the block into your own trainer as it stands.

def group_advantages(returns, groups, *, eps=1e-6):
    """Eq. (1): returns [E] and integer group ids [E] -> advantages [E], normalised inside each group.

    The standard deviation is the unbiased one. A group of equal returns, or of one episode, gets exactly 0.
    """
    advantages = torch.zeros_like(returns)
    for group in groups.unique():
        members = groups == group
        r = returns[members]
        if len(r) > 1 and (r != r[0]).any():
            advantages[members] = (r - r.mean()) / (r.std(unbiased=True) + eps)  # eq. (1)
    return advantages


def policy_loss(logp, old_logp, advantages, mask, *, num_tokens, clip=0.2, dual_clip=3.0):
    """Eq. (2): PPO's clipped surrogate with dual clip, summed over mask and divided by num_tokens.

    logp, old_logp, mask: [B, T] (or any one shape); advantages: the same shape, or [B] for one value a row.
    num_tokens: response tokens of the whole optimiser step, so that micro-batches add up. Returns (loss, metrics);
    metrics are shares of num_tokens, they too add up over micro-batches.
    """
    if advantages.dim() < logp.dim():
        advantages = advantages.unsqueeze(-1)  # [B, 1]
    ratio = torch.exp(logp - old_logp)
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    pessimistic = torch.maximum(-advantages * ratio, -advantages * clipped)
    bounded = torch.where(advantages < 0, torch.minimum(pessimistic, -advantages * dual_clip), pessimistic)  # eq. (2)
    with torch.no_grad():
        clip_fraction = (((ratio - 1).abs() > clip) * mask).sum() / num_tokens
        old_kl = ((old_logp - logp) * mask).sum() / num_tokens
    return (bounded * mask).sum() / num_tokens, {"grpo/clip_fraction": clip_fraction, "grpo/old_kl": old_kl}


def kl_loss(logp, ref_logp, mask, *, num_tokens):
    """Eq. (3): the k3 estimate of KL(student || reference) on the student's samples. All [B, T]; returns the loss."""
    d = (ref_logp.detach() - logp).clamp(-10, 10)
    return ((torch.exp(d) - d - 1) * mask).sum() / num_tokens  # eq. (3)


SURROGATES = {  # the weight of -logp, a function of gap D and gate g
    "mle": lambda gap, gate: gate,  # the paper, and the released code
    "centered": lambda gap, gate: gate - 0.5,  # same expected gradient, less variance
    "gap": lambda gap, gate: gate * gap,  # truly asymmetric
    "opsd": lambda gap, gate: gap,  # plain on-policy self-distillation
}


def sdar_loss(logp, teacher_logp, mask, *, beta=5.0, num_tokens=None, surrogate="mle", gate=None):
    """The last term of eq. (5), without lambda: its gradient is -Agg(w grad logp), with w from SURROGATES.

    logp, teacher_logp, mask: [B, T]. gate: None for eq. (4), or another gate's values [B, T]. num_tokens: None for the
    mask's own sum, or the tokens of the whole optimiser step. Returns (loss, metrics). The loss value, Agg(w D), is no
    distance to the teacher and need not fall: only its gradient means something.
    """
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    with torch.no_grad():
        gap = teacher_logp - logp  # eq. (4)
        gate = torch.sigmoid(beta * gap) if gate is None else gate  # eq. (4)
        weight = SURROGATES[surrogate](gap, gate)
        metrics = {
            "sdar/gap": (gap * mask).sum() / num_tokens,
            "sdar/gap_abs": (gap.abs() * mask).sum() / num_tokens,
            "sdar/gate": (gate * mask).sum() / num_tokens,
            "sdar/gate_active": ((gate > 0.5) * mask).sum() / num_tokens,
        }
    return (weight * (teacher_logp.detach() - logp) * mask).sum() / num_tokens, metrics  # eq. (5)


# --------------------------------------------------------------------------------------------------------------- config

def option(default, help, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every setting once: default (the paper's WebShop values), type and help. The command line is made from it."""

    # task
    env: str = option("webshop", "environment", choices=tuple(envs.ENVIRONMENTS))
    data: str | None = option(None, "folder with the official data; default: tasks generated by this repository")
    retriever: str | None = option(None, "search: address of a retriever; default: our own search of the passages")
    max_turns: int = option(envs.MAX_TURNS["webshop"], "turns after which an episode ends")
    history: int = option(2, "earlier turns shown in a prompt")
    history_observations: bool = option(True, "show the observations of earlier turns, not only the actions")
    reward: str = option("won", "return of an episode: 10 if won, or 10 times the graded score",
                         choices=("won", "score"))
    # model
    model: str = option("tiny", "tiny (embedded), new (tiny, untrained), a folder, or a name that transformers loads")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", "auto is bf16 compute on CUDA, fp32 elsewhere; weights are always fp32",
                        choices=("auto", "float32", "bfloat16"))
    threads: int = option(0, "CPU threads, 0 for torch's own choice")
    # rollout
    tasks: int = option(16, "tasks a step")
    group_size: int = option(8, "episodes of each task")
    temperature: float = option(1.0, "sampling temperature in training; log-probs use it too")
    max_prompt_tokens: int = option(4096, "limit of a student prompt; a teacher prompt may be longer by its skills")
    max_response_tokens: int = option(512, "limit of a response")
    rollout_batch: int = option(128, "responses generated side by side")
    # algorithm
    method: str = option("sdar", "row of METHODS", choices=("sdar", "grpo"))
    preset: str = option("none", "official: as the released code does it (README, Deviations)",
                         choices=("none", "official"))
    clip: float = option(0.2, "e of eq. (2)")
    dual_clip: float = option(3.0, "bound on the loss of negative advantages, eq. (2)")
    kl_coef: float = option(0.01, "c_kl of eq. (5); 0 needs no reference model")
    entropy_coef: float = option(0.0, "c_ent of eq. (5)")
    invalid_penalty: float = option(0.1, "c_inv of eq. (1)")
    advantage_stats: str = option("episode", "group statistics over episodes, or over turns with the penalty inside",
                                  choices=("episode", "turn"))
    check_admissible: bool = option(True, "an action that the page does not offer makes the turn invalid")
    updates: int = option(1, "optimiser steps a batch")
    sdar_coef: float = option(0.01, "lambda of eq. (5)")
    gate_beta: float = option(5.0, "beta of eq. (4)")
    gate: str = option("gap", "gate of eq. (4)", choices=("gap", "entropy", "soft_or", "none"))
    surrogate: str = option("mle", "weight of -logp in eq. (5), or the exact divergence to the teacher, gate-weighted",
                            choices=(*SURROGATES, *kernels.DIVERGENCES))
    teacher: str = option("live", "teacher's weights: current, before the step's first update, or the initial ones",
                          choices=("live", "rollout", "ref", "none"))
    teacher_prompt: str = option("message", "skills inside the user message, or as raw text before the chat template "
                                 "and cut from the left", choices=("message", "raw"))
    retrieval: str = option("type", "skills a teacher sees: general and those of the task's type, all, or none",
                            choices=("type", "full", "none"))
    skills: str | None = option(None, "folder with general.md and a file per task type; default: data/skills/<env>")
    # optimisation
    steps: int = option(150, "training steps")
    lr: float = option(1e-6, "learning rate")
    warmup: int = option(0, "steps of linear warm-up")
    lr_schedule: str = option("constant", "after the warm-up: constant, or linear to 0 at the end of --steps",
                              choices=("constant", "linear"))
    weight_decay: float = option(0.01, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradient norm clip")
    micro_tokens: int = option(4096, "padded tokens of a micro-batch; bounds the memory of an update")
    recompute: bool = option(False, "keep no activations in the forward pass (gradient checkpointing): slower, smaller")
    seed: int = option(0, "seed of sampling and task order")
    # warm start
    sft_steps: int = option(0, "steps of cloning the environment's expert before the first training step")
    sft_lr: float = option(1e-5, "learning rate of the warm start, cosine to a tenth")
    sft_tokens: int = option(32768, "padded tokens of a warm-start step")
    sft_careless: float = option(0.0, "share of demonstrations by a careless player, without skills in the prompt; the "
                                 "others are the expert's, with skills. 0: all are the expert's, without skills")
    # evaluation and run folder
    eval_every: int = option(10, "steps between evaluations on the fixed panel, 0 for none")
    eval_tasks: int = option(128, "tasks of the panel")
    eval_temperature: float = option(0.4, "temperature of the sampled evaluation; a greedy one stands beside it")
    out: str | None = option(None, "run folder; default: the first free of runs/<env>-<method>-<seed>, ...-2, ...-3")
    save_every: int = option(10, "steps between checkpoints")
    episodes_every: int = option(10, "steps between dumps of whole episodes")
    report_to: str = option("none", "send metrics on", choices=("none", "wandb", "tensorboard"))


METHODS = {"sdar": {}, "grpo": {"sdar_coef": 0.0, "teacher": "none", "retrieval": "none"}}

PRESETS = {"none": {}, "official": {
    "advantage_stats": "turn", "teacher": "rollout", "teacher_prompt": "raw", "entropy_coef": 0.001,
    "check_admissible": False}}

# Where the paper's values for an environment differ from those of WebShop, which stand in Config.
ENV_DEFAULTS = {
    "webshop": {},
    "alfworld": {"max_turns": envs.MAX_TURNS["alfworld"], "max_prompt_tokens": 2048},
    "search": {"max_turns": envs.MAX_TURNS["search"], "history": 4, "tasks": 128, "kl_coef": 0.001,
               "invalid_penalty": 0.01, "warmup": 15}}

# What a model of a million parameters needs instead of the paper's values, which are for billions. WebShop's expert is
# done in 5 turns. With 15, sampling at T=1 gets out of every loop in time: nothing punishes loops, and greedy play ends
# in them.
TINY_DEFAULTS = {
    "max_turns": 8, "history_observations": False, "tasks": 8, "steps": 30, "lr": 4e-4, "lr_schedule": "linear",
    "warmup": 3, "kl_coef": 0.0, "max_prompt_tokens": 512, "max_response_tokens": 32, "sft_lr": 3e-3,
    "sft_tokens": 6144, "micro_tokens": 4096}
TINY_ENV_DEFAULTS = {
    "webshop": {},
    "alfworld": {"max_turns": 24, "tasks": 4, "steps": 20},
    "search": {"max_turns": 4, "max_response_tokens": 48, "steps": 60}}


class UserError(Exception):
    """Bad input: printed as one sentence, without a traceback."""


def env_defaults(env, model):
    """What the environment, and the embedded model in it, have instead of Config's defaults.

    Names every setting in which any environments differ, so that a Config can be moved from one to another.
    """
    common = {name: getattr(Config, name) for values in ENV_DEFAULTS.values() for name in values}
    small = TINY_DEFAULTS | TINY_ENV_DEFAULTS[env] if model in ("tiny", "new") else {}
    return common | ENV_DEFAULTS[env] | small


def move(cfg, env):
    """cfg with another environment's own tasks, skills and defaults."""
    return dataclasses.replace(cfg, env=env, data=None, skills=None, retriever=None, **env_defaults(env, cfg.model))


def make_config(explicit):
    """Defaults < environment < embedded model < preset < method < what the user said. UserError if they contradict."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    chosen = {name: explicit.get(name, fields[name].default) for name in ("env", "model", "preset", "method")}
    for name, value in chosen.items():
        check_choice(fields[name], value)
    values = env_defaults(chosen["env"], chosen["model"]) | PRESETS[chosen["preset"]] | METHODS[chosen["method"]]
    cfg = Config(**(values | explicit))
    if cfg.out is None:
        names = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
        paths = (f"runs/{cfg.env}-{cfg.method}-{cfg.seed}{name}" for name in names)
        cfg.out = next(path for path in paths if not Path(path).exists())
    validate(cfg, explicit, fields)
    return cfg


def check_choice(field, value):
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"--{field.name} {value!r} is unknown; choose from {', '.join(choices)}.")


def validate(cfg, explicit, fields):
    for field in fields.values():
        check_choice(field, getattr(cfg, field.name))
    at_least = {"max_turns": 1, "history": 0, "threads": 0, "tasks": 1, "group_size": 2, "max_prompt_tokens": 1,
                "max_response_tokens": 1, "rollout_batch": 1, "kl_coef": 0, "entropy_coef": 0, "invalid_penalty": 0,
                "sdar_coef": 0, "gate_beta": 0, "updates": 1, "steps": 0, "lr": 0, "warmup": 0, "weight_decay": 0,
                "micro_tokens": 1, "sft_steps": 0, "sft_lr": 0, "sft_tokens": 1, "sft_careless": 0, "eval_every": 0,
                "eval_tasks": 1, "eval_temperature": 0, "save_every": 1, "episodes_every": 1, "dual_clip": 1}
    for name, low in at_least.items():
        value = getattr(cfg, name)
        if not (math.isfinite(value) and value >= low):
            why = "; a group of one has no one to be compared with" if name == "group_size" else ""
            raise UserError(f"--{name} is {value}, but must be at least {low}{why}.")
    for name in ("temperature", "clip", "max_grad_norm"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name} is {getattr(cfg, name)}, but must be greater than 0 and finite.")
    if cfg.max_turns > envs.MAX_TURNS[cfg.env]:
        raise UserError(f"--max_turns {cfg.max_turns} is more than the {envs.MAX_TURNS[cfg.env]} after which {cfg.env} "
                        "ends an episode: lower it.")
    if cfg.sft_careless > 1:
        raise UserError(f"--sft_careless is {cfg.sft_careless}, but is a share between 0 and 1.")
    if cfg.model == "new" and not cfg.sft_steps:
        raise UserError("--model new has random weights: add --sft_steps N to teach it the expert's play first.")
    if cfg.surrogate in kernels.DIVERGENCES and cfg.teacher not in ("live", "none"):
        raise UserError(f"--surrogate {cfg.surrogate} needs the teacher's whole distribution, which only --teacher "
                        f"live computes: leave --teacher {cfg.teacher} out.")
    idle = {}
    if cfg.teacher == "none":
        idle |= dict.fromkeys(("sdar_coef", "gate_beta", "gate", "surrogate", "retrieval", "teacher_prompt"),
                              "there is no teacher (--method grpo or --teacher none)")
    if cfg.teacher != "none" and cfg.gate == "none":
        idle["gate_beta"] = "--gate none has no beta"
    if cfg.teacher != "none" and cfg.surrogate == "opsd":
        idle |= dict.fromkeys(("gate", "gate_beta"), "--surrogate opsd has no gate")
    if cfg.updates == 1:
        idle |= dict.fromkeys(("clip", "dual_clip"), "with --updates 1 every ratio is 1")
    if cfg.history == 0:
        idle["history_observations"] = "--history 0 shows no earlier turn"
    if not cfg.sft_steps:
        idle |= {name: "--sft_steps is 0" for name in ("sft_lr", "sft_tokens", "sft_careless")}
    if not cfg.eval_every:
        idle |= {name: "--eval_every is 0" for name in ("eval_tasks", "eval_temperature")}
    if cfg.env != "search":
        idle["retriever"] = f"{cfg.env} searches nothing"
    if cfg.retrieval == "none" and not cfg.sft_careless:
        idle["skills"] = "--retrieval none shows no skills"
    for name in explicit:
        if name in idle:
            raise UserError(f"--{name} would do nothing here, since {idle[name]}: leave it out.")


def parse_args(argv):
    """Command line -> (explicitly given settings, run folder to resume or None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, from its last checkpoint")
    add_options(parser, [field.name for field in dataclasses.fields(Config)])
    explicit = vars(parser.parse_args(argv))
    return explicit, explicit.pop("resume")


def add_options(parser, names):
    """A flag for each of these fields of Config; one that is not given leaves no trace in the parsed arguments."""
    for field in (field for field in dataclasses.fields(Config) if field.name in names):
        kind = type(field.default) if field.default is not None else str
        others = {**ENV_DEFAULTS, "tiny": TINY_DEFAULTS, **{f"tiny {e}": v for e, v in TINY_ENV_DEFAULTS.items()}}
        others = "".join(f"; {name} {values[field.name]}" for name, values in others.items() if field.name in values)
        text = f"{field.metadata['help']} (default {field.default}{others})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if field.metadata["choices"]:
            how["metavar"] = "|".join(field.metadata["choices"])
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


# --------------------------------------------------------------------------------------------------- prompts and skills

class Context(NamedTuple):
    """What a turn's prompt is made of; the teacher's is made of the same and the skills."""

    task: str
    task_type: str
    history: tuple  # of (observation, action), oldest first
    observation: str
    admissible: tuple


def turn_context(cfg, info, observation, past=()):
    """The context of an environment's page; past: all earlier (observation, action) pairs; the last are shown."""
    shown = past[-cfg.history:] if cfg.history else ()
    history = tuple((seen if cfg.history_observations else "", action) for seen, action in shown)
    return Context(info["task"], info["task_type"], history, observation, tuple(info["admissible"] or ()))


def load_skills(cfg, task_types):
    """Folder of Markdown -> {task type: text}, by cfg.retrieval. Raises UserError if a file is missing."""
    if cfg.retrieval == "none":
        return {kind: "" for kind in task_types}
    folder = Path(cfg.skills or HERE / "data" / "skills" / cfg.env)

    def read(name):
        path = folder / f"{name}.md"
        if not path.is_file():
            raise UserError(f"The skills folder {folder} has no {path.name}: it needs general.md and a file for each "
                            f"of {', '.join(task_types)}.")
        return path.read_text(encoding="utf-8").strip()

    general, by_type = read("general"), {kind: read(kind) for kind in task_types}
    if cfg.retrieval == "full":
        return dict.fromkeys(task_types, "\n".join([general, *by_type.values()]))
    return {kind: f"{general}\n{text}" for kind, text in by_type.items()}


class Chat:
    """Messages -> ids: the template's own text with control tokens, the message as plain text without any.

    So a page that contains "<|im_end|>" stays text. Works for every template that puts the user's message in one place.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        mark = "\ue000"  # private use: in no template
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], add_generation_prompt=True,
                                             tokenize=False, enable_thinking=False)
        if text.count(mark) != 1:
            raise UserError(f"The chat template of {tokenizer.name_or_path} shows a user's message {text.count(mark)} "
                            "times instead of once: such templates are not supported.")
        before, after = text.split(mark)
        self.before, self.after = self.encode(before, control=True), self.encode(after, control=True)

    def encode(self, text, control=False):
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"])

    def prompt(self, text):
        return self.before + self.encode(text) + self.after


def render(cfg, context, skills=""):
    return envs.PROMPTS[cfg.env](context.task, context.history, context.observation, context.admissible, skills)


def fit_prompt(chat, cfg, context, skills=""):
    """Context -> (the context that fits, its prompt ids): drops history first, then the middle of the observation.

    Skills, when the student sees any, come on top of cfg.max_prompt_tokens. Raises UserError if the task is too long.
    """
    limit = cfg.max_prompt_tokens + len(chat.encode(skills))
    while True:
        ids = chat.prompt(render(cfg, context, skills))
        excess = len(ids) - limit
        if excess <= 0:
            return context, ids
        if context.history:
            context = context._replace(history=context.history[1:])
            continue
        words = [word for word in context.observation.split(" ") if word != "..."]
        if len(words) < 3:
            raise UserError(f"--max_prompt_tokens {cfg.max_prompt_tokens} is too small: the task and the instructions "
                            f"alone need {len(ids)} tokens. Raise it.")
        cut = min(max(excess // 4, 1), len(words) - 2)  # a word has seldom more than four tokens: not much too much
        middle = (len(words) - cut) // 2
        context = context._replace(observation=" ".join(words[:middle] + ["..."] + words[middle + cut:]))


def teacher_ids(chat, cfg, turn, skills):
    """The teacher's prompt of a turn: the same context and the skills, which are never cut."""
    if cfg.teacher_prompt == "message":
        return chat.prompt(render(cfg, turn.context, skills))
    raw = chat.encode(f"[Privileged Skill Information]\n{skills}\n\n") + turn.prompt_ids
    return raw[-cfg.max_prompt_tokens:]  # the released code's left cut: the skills go first


# --------------------------------------------------------------------------------------------------------------- policy

@dataclass
class Policy:
    model: torch.nn.Module
    chat: Chat
    stop_ids: frozenset
    device: torch.device
    autocast: bool
    ref: torch.nn.Module | None = None  # the initial weights, frozen
    fused_error: float = 0.0  # largest difference between fused log-probs and the model's own, on a short text


def choose_device(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter is what a CPU build raises for cuda
        raise UserError(f"--device {name} cannot be used here: {first_sentence(error)}") from error


def load_policy(cfg):
    """Model, tokenizer and device -> Policy. Raises UserError if there is no model, or its head is no plain matrix."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    device = choose_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    if cfg.model == "new":
        model, tokenizer = new_model(cfg)
    else:
        path = str(TINY) if cfg.model == "tiny" else cfg.model
        parent = Path(path).parent
        looks_local = parent.is_dir() if parent != Path(".") else Path(path).exists()
        looks_local |= path.startswith((".", "/", "~")) or path.count("/") > 1
        if looks_local and not (Path(path) / "config.json").is_file():
            raise UserError(f"There is no model in {path!r} (no config.json): give tiny, a folder written by "
                            "save_pretrained, or a name such as Qwen/Qwen2.5-1.5B-Instruct.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"Could not load the model {path!r}: {first_sentence(error)}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"The tokenizer of {cfg.model!r} has no chat template: use an instruct model, or put a "
                        "chat_template.jinja into its folder.")
    stop = model.generation_config.eos_token_id if model.generation_config else None
    stop = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
    autocast = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    without_dropout(model)
    if cfg.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model.to(device).eval(), Chat(tokenizer), frozenset(stop), device, autocast)
    policy.fused_error = check_model(policy, cfg)
    if cfg.kl_coef or cfg.teacher == "ref":
        policy.ref = copy.deepcopy(policy.model).requires_grad_(False)
    return policy


def without_dropout(model):
    """Sampler and trainer must be the same function, also in train mode."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def first_sentence(error):
    return str(error).strip().split("\n")[0].rstrip(".") + "."


def compute(policy):
    """bf16 matrix products over fp32 weights where the device is good at them."""
    return torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.autocast)


def check_model(policy, cfg):
    """Compares packed, fused log-probs with the model's own logits on a short text.

    A head that is more than a matrix (bias, soft-cap, scaling), or attention that does not follow the packing mask,
    would train on wrong log-probs without any other sign. Raises UserError; returns the largest difference.
    """
    window = getattr(policy.model.config, "sliding_window", None)
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    if getattr(policy.model.config, "use_sliding_window", True) and window and window < longest:
        raise UserError(f"{cfg.model} attends to {window} tokens only, fewer than --max_prompt_tokens + "
                        f"--max_response_tokens = {longest}: lower them.")
    prompt = policy.chat.prompt("Find a red lamp.")
    answers = [policy.chat.encode(text) for text in ("<action>search[red lamp]</action>", "I have no idea")]
    with torch.no_grad():
        batch = pack([prompt], [[tuple(a) for a in answers]], policy.device)
        fused, _ = kernels.fused_logprob(*head_inputs(policy, policy.model, batch), batch.targets)
        own = []
        for answer in answers:
            ids = torch.tensor([prompt + answer], device=policy.device)
            with compute(policy):
                logits = policy.model(ids).logits[0, len(prompt) - 1:-1].float()  # [T, V]
            own.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0])
    worst = (fused - torch.cat(own)).abs().max().item()
    limit = 0.2 if policy.autocast else 1e-3
    if not worst < limit:
        raise UserError(f"{cfg.model} is not supported: fused log-probs differ from the model's own by {worst:.2g} "
                        f"(limit {limit}), so its head is more than a matrix (bias, soft-cap, scaling), or its "
                        "attention ignores the packing mask.")
    return worst


# Rows that share a prompt are packed into one sequence [prompt, response 1, response 2, ...]: the mask lets a response
# see the prompt and itself, positions start anew after the prompt. Groups share their first prompt, often later ones.

class Pack(NamedTuple):
    ids: torch.Tensor  # [B, L]
    positions: torch.Tensor  # [B, L]
    mask: torch.Tensor | None  # [B, 1, L, L], True = may attend; None: plain causal
    predictors: torch.Tensor  # [N] flat index into B*L of the position that predicts each response token
    targets: torch.Tensor  # [N] response ids, bundle by bundle, row by row


def pack(prompts, responses, device):
    """prompts: one id tuple a bundle; responses: a list of id tuples a bundle -> Pack of len(prompts) sequences."""
    length = max(len(p) + sum(map(len, rs)) for p, rs in zip(prompts, responses))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)
    predictors, targets = [], []
    for b, (prompt, rows) in enumerate(zip(prompts, responses)):
        flat, where, owner = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for number, response in enumerate(rows, start=1):
            start = b * length + len(flat)
            predictors += [b * length + len(prompt) - 1, *range(start, start + len(response) - 1)]
            targets += response
            flat += response
            where += range(len(prompt), len(prompt) + len(response))
            owner += [number] * len(response)
        n = len(flat)
        ids[b, :n], positions[b, :n], branch[b, :n] = torch.tensor(flat), torch.tensor(where), torch.tensor(owner)
    mask = None
    if any(len(rows) > 1 for rows in responses):  # else causal order alone hides the padding, which comes last
        q, k = branch[:, :, None], branch[:, None, :]
        see = torch.ones(length, length, dtype=torch.bool).tril() & ((k == 0) | (k == q))
        mask = (see | torch.eye(length, dtype=torch.bool))[:, None].to(device)  # padding sees itself: no empty softmax
    return Pack(ids.to(device), positions.to(device), mask, torch.tensor(predictors, device=device),
                torch.tensor(targets, device=device))


def head_inputs(policy, model, batch):
    """Pack -> (hidden states that predict the response tokens [N, D], the head's weight [V, D])."""
    with compute(policy):
        hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False,
                                  position_ids=None if batch.mask is None else batch.positions).last_hidden_state
    hidden = hidden.flatten(0, 1)[batch.predictors]
    return hidden, model.get_output_embeddings().weight.to(hidden.dtype)


class Response(NamedTuple):
    ids: tuple
    logp: tuple  # of the sampled tokens, at the sampling temperature
    stop: str  # "end" or "length"


@torch.no_grad()
def sample(policy, prompts, cfg, temperature, generator):
    """prompts: id tuples -> a Response each. temperature 0 is greedy. Equal prompts share one prefill."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))  # little padding, equals adjacent
    responses = [None] * len(prompts)
    for start in range(0, len(order), cfg.rollout_batch):
        rows = order[start:start + cfg.rollout_batch]
        for row, response in zip(rows, sample_batch(policy, [prompts[i] for i in rows], cfg, temperature, generator)):
            responses[row] = response
    return responses


def empty_cache(model):
    """-> (a cache of keys and values that the model fills in place, the keyword arguments that hand it over)."""
    from transformers import DynamicCache
    cache = DynamicCache(config=model.config)
    renamed = "cache" in inspect.signature(model.forward).parameters  # since transformers 5.24
    return cache, {"cache" if renamed else "past_key_values": cache, "use_cache": True}


def sample_batch(policy, prompts, cfg, temperature, generator):
    model, device = policy.model, policy.device
    unique = list(dict.fromkeys(prompts))
    number_of = {prompt: number for number, prompt in enumerate(unique)}
    longest = max(map(len, unique))
    ids = torch.tensor([(0,) * (longest - len(p)) + p for p in unique], device=device)  # [U, P], padded on the left
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in unique], device=device)
    cache, cached = empty_cache(model)
    with compute(policy):
        out = model(input_ids=ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0),
                    logits_to_keep=1, **cached)
    which = torch.tensor([number_of[p] for p in prompts], device=device)
    logits, real = out.logits[which, -1].float(), real[which]
    cache.batch_select_indices(which)
    position = real.sum(1, keepdim=True)
    stop_ids = torch.tensor(sorted(policy.stop_ids), device=device)
    alive = torch.arange(len(prompts), device=device)  # row number of each line of the cache
    tokens, logps = [[] for _ in prompts], [[] for _ in prompts]
    stops = ["length"] * len(prompts)
    for number in range(cfg.max_response_tokens):
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)  # [B, V]
        if temperature == 0:
            token = logprobs.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(logprobs.exp(), 1, generator=generator)  # [B, 1]
        chosen = logprobs.gather(1, token)[:, 0]
        ended = torch.isin(token[:, 0], stop_ids)
        for row, t, lp, end in zip(alive.tolist(), token[:, 0].tolist(), chosen.tolist(), ended.tolist()):
            tokens[row].append(t)
            logps[row].append(lp)
            if end:
                stops[row] = "end"
        keep = torch.nonzero(~ended)[:, 0]
        if len(keep) == 0 or number + 1 == cfg.max_response_tokens:
            break
        if len(keep) < len(alive):  # finished responses stop generating
            cache.batch_select_indices(keep)
            alive, real, token, position = alive[keep], real[keep], token[keep], position[keep]
        real = torch.cat([real, real.new_ones(len(real), 1)], 1)
        with compute(policy):
            out = model(input_ids=token, attention_mask=real, position_ids=position, **cached)
        logits, position = out.logits[:, -1].float(), position + 1
    return [Response(tuple(t), tuple(lp), s) for t, lp, s in zip(tokens, logps, stops)]


# -------------------------------------------------------------------------------------------------------------- rollout

class Task(NamedTuple):
    split: str
    task_id: int
    group: int


@dataclass
class Turn:
    context: Context
    prompt_ids: tuple
    response: Response
    text: str
    action: str
    valid: bool


@dataclass
class Episode:
    task: Task
    task_type: str
    turns: list
    won: bool = False
    score: float = 0.0
    done: bool = False  # False: out of turns
    errors: int = 0  # searches that the retriever failed to answer


def rollout(policy, environments, tasks, cfg, *, temperature=None, skills=None, seed=0, progress=None):
    """Plays tasks[i] in environments[i], all side by side -> list of Episode, in the order of tasks.

    temperature: None for cfg.temperature, 0 for greedy. skills: None, or {task type: text} that the student sees too.
    Finished episodes stop generating. Raises UserError naming task and action if an environment raises.
    """
    temperature = cfg.temperature if temperature is None else temperature
    generator = torch.Generator(policy.device).manual_seed(seed)
    episodes, pages, past = [], [], [[] for _ in tasks]
    for task, env in zip(tasks, environments):
        observation, info = guard(task, "reset", env.reset, options={"split": task.split, "task_id": task.task_id})
        episodes.append(Episode(task, info["task_type"], []))
        pages.append((observation, info))
    active = list(range(len(tasks)))
    for _ in range(cfg.max_turns):
        fitted = []
        for i in active:
            observation, info = pages[i]
            context = turn_context(cfg, info, observation, past[i])
            fitted.append(fit_prompt(policy.chat, cfg, context, skills[info["task_type"]] if skills else ""))
        responses = sample(policy, [ids for _, ids in fitted], cfg, temperature, generator)
        texts = [policy.chat.tokenizer.decode(r.ids[:-1] if r.stop == "end" else r.ids) for r in responses]
        parsed = [envs.parse_action(cfg.env, text, official=not cfg.check_admissible) for text in texts]
        stepped = step_all(cfg, [
            (tasks[i], f"action {action!r} in turn {len(past[i]) + 1}", environments[i].step, action)
            for i, (action, _) in zip(active, parsed)])
        still = []
        for i, (context, ids), response, text, (action, valid), page in zip(
                active, fitted, responses, texts, parsed, stepped):
            observation, _, terminated, truncated, info = page
            valid = valid and (info["valid"] or not cfg.check_admissible)
            episodes[i].turns.append(Turn(context, ids, response, text, action, valid))
            past[i].append((pages[i][0], action))
            pages[i] = observation, info
            episodes[i].won, episodes[i].score, episodes[i].done = info["won"], info["score"], terminated
            episodes[i].errors = info.get("retriever_errors", 0)
            if not (terminated or truncated):
                still.append(i)
        if progress:
            progress.update(len(active) - len(still))
        active = still
        if not active:
            break
    return episodes


def make_env(cfg):
    try:
        return envs.make(cfg.env, data=cfg.data, **({"retriever": cfg.retriever} if cfg.retriever else {}))
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def step_all(cfg, calls):
    """The results of guard(*call) for each call, in order; in threads where a step waits for a retriever's answer."""
    if not cfg.retriever:
        return [guard(*call) for call in calls]
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda call: guard(*call), calls))


def guard(task, doing, call, *args, **kwargs):
    """Names the task in whatever an environment raises, so every Exception is caught: the run ends in a sentence."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        raise UserError(f"The environment failed on task {task.task_id} of split {task.split!r} ({doing}): "
                        f"{type(error).__name__}: {first_sentence(error)}") from error


def check_prompt_limit(policy, cfg, env):
    """Raises UserError if the first task's prompt cannot be made to fit, before anything is saved."""
    task = Task("train", 0, 0)
    observation, info = guard(task, "reset", env.reset, options={"split": task.split, "task_id": task.task_id})
    fit_prompt(policy.chat, cfg, turn_context(cfg, info, observation))


def episode_return(cfg, episode):
    return 10.0 * (episode.score if cfg.reward == "score" else float(episode.won))


# ----------------------------------------------------------------------------------------------- rows and micro-batches

@dataclass
class Row:
    """One turn, as the losses see it. The three lists of numbers have one entry per response token."""

    prompt_ids: tuple
    teacher_ids: tuple  # () without a teacher
    response_ids: tuple
    advantage: float
    old_logp: list | None = None
    ref_logp: list | None = None
    teacher_logp: list | None = None
    gap: list | None = None  # filled in by train_step, for the dump
    gate: list | None = None


def make_rows(policy, cfg, episodes, skills):
    """Episodes -> (rows, metrics): eq. (1), the penalty for invalid turns, and the teacher's prompts."""
    returns = torch.tensor([episode_return(cfg, e) for e in episodes], dtype=torch.float64)
    groups = torch.tensor([e.task.group for e in episodes])
    turns = [(i, turn) for i, e in enumerate(episodes) for turn in e.turns]
    owner = torch.tensor([i for i, _ in turns])
    penalty = torch.tensor([0.0 if turn.valid else cfg.invalid_penalty for _, turn in turns], dtype=torch.float64)
    if cfg.advantage_stats == "turn":  # the released code: statistics over turns, penalty inside
        advantages = group_advantages(returns[owner] - penalty, groups[owner])
    else:
        advantages = group_advantages(returns, groups)[owner] - penalty  # eq. (1)
    prompts = {}  # equal turns have equal teacher prompts: each is made once
    rows = []
    for (i, turn), advantage in zip(turns, advantages.tolist()):
        teacher = ()
        if cfg.teacher != "none":
            key = turn.prompt_ids, episodes[i].task_type
            if key not in prompts:
                prompts[key] = teacher_ids(policy.chat, cfg, turn, skills[episodes[i].task_type])
            teacher = prompts[key]
        rows.append(Row(turn.prompt_ids, teacher, turn.response.ids, advantage))
    flat = [int((returns[groups == g] == returns[groups == g][0]).all()) for g in groups.unique()]
    return rows, {"grpo/zero_variance_groups": sum(flat) / len(flat)}


def micro_batches(rows, micro_tokens):
    """Rows -> lists of bundles, a bundle being the rows with one (prompt, teacher prompt); sorted by length, so that a
    micro-batch has little padding, and each at most micro_tokens padded tokens unless a single bundle is longer."""
    shared = defaultdict(list)
    for row in rows:
        shared[row.prompt_ids, row.teacher_ids].append(row)
    bundles = []
    for members in shared.values():
        room, bundle = 0, []
        for row in members:  # masked attention to siblings is waste: beyond four prompts' length it outweighs sharing
            prompt = len(row.prompt_ids)
            if bundle and room + len(row.response_ids) > min(4 * prompt, micro_tokens - prompt):
                bundles.append(bundle)
                room, bundle = 0, []
            bundle.append(row)
            room += len(row.response_ids)
        bundles.append(bundle)

    def width(bundle):  # of the student's sequence: a teacher changes nothing in how rows are batched
        return len(bundle[0].prompt_ids) + sum(len(row.response_ids) for row in bundle)

    batch = []
    for bundle in sorted(bundles, key=width):
        if batch and (len(batch) + 1) * width(bundle) > micro_tokens:
            yield batch
            batch = []
        batch.append(bundle)
    if batch:
        yield batch


def pack_bundles(policy, bundles, teacher=False):
    prompts = [bundle[0].teacher_ids if teacher else bundle[0].prompt_ids for bundle in bundles]
    return pack(prompts, [[row.response_ids for row in bundle] for bundle in bundles], policy.device)


def column(rows, name, device):
    """One number per response token [N] from the rows' lists, or from a scalar of the row."""
    values = (getattr(row, name) for row in rows)
    flat = [x for row, v in zip(rows, values) for x in (v if isinstance(v, list) else [v] * len(row.response_ids))]
    return torch.tensor(flat, dtype=torch.float32, device=device)


def split_tokens(rows, values):
    return [part.tolist() for part in values.detach().float().cpu().split([len(row.response_ids) for row in rows])]


@torch.no_grad()
def score(policy, model, rows, cfg, name, teacher=False):
    """Fills the rows' list `name` with log-probs of their responses under model, or after the teacher's prompt."""
    for bundles in micro_batches(rows, cfg.micro_tokens):
        batch = pack_bundles(policy, bundles, teacher)
        logp, _ = kernels.fused_logprob(*head_inputs(policy, model, batch), batch.targets, temperature=cfg.temperature)
        members = list(itertools.chain(*bundles))
        for row, values in zip(members, split_tokens(members, logp)):
            setattr(row, name, values)


# ----------------------------------------------------------------------------------------------------------- train step

def step_loss(policy, cfg, bundles, num_tokens):
    """Eq. (5) of one micro-batch -> (loss, metrics as shares of num_tokens). Fills in the rows' gap and gate."""
    rows = list(itertools.chain(*bundles))
    batch = pack_bundles(policy, bundles)
    hidden, weight = head_inputs(policy, policy.model, batch)
    exact = cfg.surrogate if cfg.surrogate in kernels.DIVERGENCES else None
    if cfg.teacher == "live":
        with torch.no_grad():
            teacher, _ = head_inputs(policy, policy.model, pack_bundles(policy, bundles, teacher=True))
        out = kernels.fused_gap_gate(hidden, teacher, weight, batch.targets, beta=cfg.gate_beta, gate=cfg.gate,
                                     temperature=cfg.temperature, divergence=exact)
        logp, entropy, teacher_logp, gate = out.logp, out.entropy, out.teacher_logp, out.gate
    else:
        logp, entropy = kernels.fused_logprob(hidden, weight, batch.targets, temperature=cfg.temperature)
        if cfg.teacher != "none":
            teacher_logp = column(rows, "teacher_logp", logp.device)
            gate = kernels.gate_values(cfg.gate, teacher_logp - logp.detach(), entropy.detach(), cfg.gate_beta)
    mask = torch.ones_like(logp)
    old_logp = logp.detach() if rows[0].old_logp is None else column(rows, "old_logp", logp.device)
    advantages = column(rows, "advantage", logp.device)
    loss, metrics = policy_loss(logp, old_logp, advantages, mask, num_tokens=num_tokens, clip=cfg.clip,
                                dual_clip=cfg.dual_clip)
    metrics |= {"grpo/loss": loss.detach(), "grpo/entropy": entropy.detach().sum() / num_tokens}
    if cfg.kl_coef:
        kl = kl_loss(logp, column(rows, "ref_logp", logp.device), mask, num_tokens=num_tokens)
        loss, metrics["kl/loss"] = loss + cfg.kl_coef * kl, kl.detach()
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * entropy.sum() / num_tokens
    if cfg.teacher != "none":
        distill, more = sdar_loss(logp, teacher_logp, mask, beta=cfg.gate_beta, num_tokens=num_tokens,
                                  surrogate="mle" if exact else cfg.surrogate, gate=gate)
        if exact:
            distill = (gate * out.divergence).sum() / num_tokens
        loss = loss + cfg.sdar_coef * distill  # eq. (5)
        metrics |= more | {"sdar/loss": distill.detach()}
        for row, gap, g in zip(rows, split_tokens(rows, teacher_logp - logp), split_tokens(rows, gate)):
            row.gap, row.gate = gap, g
    return loss, metrics


def train_step(policy, optimizer, rows, cfg, step):
    """All rows of a batch -> cfg.updates optimiser steps -> metrics. Denominators are a whole optimiser step's."""
    if cfg.updates > 1:
        score(policy, policy.model, rows, cfg, "old_logp")
    if cfg.kl_coef:
        score(policy, policy.ref, rows, cfg, "ref_logp")
    if cfg.teacher in ("rollout", "ref"):
        score(policy, policy.ref if cfg.teacher == "ref" else policy.model, rows, cfg, "teacher_logp", teacher=True)
    if cfg.updates > 1:
        rows = random.Random(f"{cfg.seed} {step}").sample(rows, len(rows))
    policy.model.train(cfg.recompute)  # transformers recomputes activations in train mode only
    total = defaultdict(float)
    size = math.ceil(len(rows) / cfg.updates)
    parts = [rows[i:i + size] for i in range(0, len(rows), size)]
    for part in parts:
        num_tokens = sum(len(row.response_ids) for row in part)
        optimizer.zero_grad(set_to_none=True)
        for bundles in micro_batches(part, cfg.micro_tokens):
            loss, metrics = step_loss(policy, cfg, bundles, num_tokens)
            loss.backward()
            for name, value in metrics.items():
                total[name] += float(value) / len(parts)
        total["grpo/grad_norm"] += optimizer_step(policy.model, optimizer, learning_rate(cfg, step), cfg) / len(parts)
    policy.model.eval()
    return dict(total)


def learning_rate(cfg, step):
    """The rate of step 0, 1, ..: a late step of full size would undo on one batch what many have taught."""
    rate = cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1))
    return rate * (1 - step / cfg.steps) if cfg.lr_schedule == "linear" else rate


def optimizer_step(model, optimizer, lr, cfg):
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
    if not math.isfinite(norm):
        raise UserError(f"The gradient norm is {norm}: lower --lr, or use --dtype float32. This step changed nothing.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


def make_optimizer(model, lr, cfg):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=cfg.weight_decay)


# -------------------------------------------------------------------------------------- warm start on the expert's play

class Arena(NamedTuple):
    """An environment with all that its prompts need; the warm start may clone the experts of several."""

    cfg: Config
    env: object
    skills: dict


def warm_start_arenas(cfg):
    """Where experts are cloned: in cfg.env; a new model, which is to become the embedded one, learns all of them."""
    others = [name for name in envs.ENVIRONMENTS if cfg.model == "new" and name != cfg.env]
    arenas = [(c, make_env(c)) for c in [cfg, *(move(cfg, name) for name in others)]]
    return [Arena(c, env, load_skills(c, env.task_types)) for c, env in arenas]


def demonstrated_turns(arena, rng, noise=0.15, most=4):
    """At most so many turns of one episode of the expert, or, for the share cfg.sft_careless, of the careless player
    -> [(context, skills, thought, action)].

    Careful play stands behind a prompt with the skills when there is careless play to tell it from. One move in seven
    is not cloned: a random one, the last one again, or one whose last number, if it ends with one, is raised by one.
    They lead to the pages from which one must find back, and to those where nothing happened. Raises UserError where
    the environment raises, as one without an expert does.
    """
    cfg, env, skills = arena
    careless = rng.random() < cfg.sft_careless
    task = Task("train", rng.randrange(guard(Task("train", 0, 0), "counting tasks", env.num_tasks, "train")), 0)
    observation, info = guard(task, "reset", env.reset, options={"split": task.split, "task_id": task.task_id})
    text = skills[info["task_type"]] if cfg.sft_careless and not careless else ""
    turns, past, over = [], [], False
    while not over:
        context = turn_context(cfg, info, observation, past)
        thought, action = guard(task, "demonstration", env.demonstrate, rng, careless)
        if rng.random() < noise:
            again = past[-1][1] if past else action
            beyond = re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), action)  # "go to shelf 3", if there is one
            slip = rng.choice([again, beyond])
            action = slip if rng.random() < 0.6 else envs.random_move(info["admissible"], rng) or action
        else:
            turns.append((context, text, thought, action))
        over = past[-1:] == [(observation, action)]  # who repeats himself has given up, and would fill the batch
        past.append((observation, action))
        observation, _, terminated, truncated, info = guard(task, f"action {action!r}", env.step, action)
        over |= terminated or truncated
    return rng.sample(turns, min(most, len(turns)))


def demonstrations(chat, arena, rng):
    """Turns of one episode -> a Row each."""
    rows = []
    for context, skills, thought, action in demonstrated_turns(arena, rng):
        _, ids = fit_prompt(chat, arena.cfg, context, skills)
        answer = chat.encode(envs.write_answer(arena.cfg.env, thought, action))
        rows.append(Row(ids, (), answer + (chat.tokenizer.eos_token_id,), 1.0))
    return rows


def warm_start_rows(policy, cfg, arenas, words, step):
    """About cfg.sft_tokens tokens of demonstrations, episode by episode, from the arenas as often as SHARES says.

    An untrained model, which alone has `words`, gets exercises first: it copies random tokens, first near, then far;
    then short demonstrations come in, and longer ones until as many steps again are over. In half of them words are
    exchanged.
    """
    rng = random.Random(f"{cfg.seed} demonstrations {step}")
    progress = step / cfg.sft_steps if words else 1.0
    if progress < EXERCISES:
        return copy_rows(words.exercised, rng, apart=8 + int(max(0, progress / EXERCISES - 0.5) * 200))
    lengthening = (progress - EXERCISES) / EXERCISES
    longest = 192 + lengthening * cfg.max_prompt_tokens if lengthening < 1 else math.inf
    shares = [SHARES[arena.cfg.env] for arena in arenas]
    rows, size = [], 0
    while size < cfg.sft_tokens:
        (arena,) = rng.choices(arenas, shares)
        episode = [row for row in demonstrations(policy.chat, arena, rng) if len(row.prompt_ids) <= longest]
        rows += episode
        size += sum(len(row.prompt_ids) + len(row.response_ids) for row in episode)
    return [words.exchange(row, rng) if words and rng.random() < 0.5 else row for row in rows]


def warm_start_step(policy, optimizer, cfg, arenas, words, step):
    """One optimiser step of likelihood on warm_start_rows -> metrics.

    An untrained model predicts the prompts too, at a tenth of an answer's weight: pages repeat what they name, so that
    there is much more to learn copying from than the few tokens of the answers.
    """
    exercises = math.ceil(EXERCISES * cfg.sft_steps)
    if words and step == exercises:  # they are over, which move one spelling
        join_spellings(policy.model, policy.chat.tokenizer, cfg.seed)
    rows = warm_start_rows(policy, cfg, arenas, words, step)
    size = sum(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    num_tokens = sum(len(row.response_ids) for row in rows)
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for bundles in micro_batches(rows, cfg.micro_tokens):
        if words and step >= exercises:
            batch, weight = pack_whole(policy, list(itertools.chain(*bundles)), prompt_weight=0.1)
        else:
            batch = pack_bundles(policy, bundles)
            weight = torch.ones(len(batch.targets), device=policy.device)
        logp, _ = kernels.fused_logprob(*head_inputs(policy, policy.model, batch), batch.targets)
        loss = -(weight * logp).sum() / num_tokens
        loss.backward()
        total -= logp.detach()[weight == 1].sum().item() / num_tokens
    progress = step / cfg.sft_steps
    lr = cfg.sft_lr * min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * progress))
    norm = optimizer_step(policy.model, optimizer, lr, cfg)
    return {"sft/loss": total, "sft/grad_norm": norm, "sft/tokens": size}


# --------------------------------------------------------------------------------------------------- the embedded model
# Only `--model new` needs what follows. A model of a million parameters learns to copy late, and nothing works without.

EXERCISES = 0.1  # share of an untrained model's warm start that goes to copying random tokens
SHARES = {"webshop": 2, "alfworld": 3, "search": 3}  # of episodes: houses are hard to learn, questions are short


def copy_rows(tokens, rng, apart, count=64, span=10):
    """Rows whose prompt ends with the first token of a random stretch seen before; the response is the rest of it."""
    def draw(low, high):
        return tuple(rng.choices(tokens, k=rng.randint(low, high)))

    rows = []
    for _ in range(count):
        stretch = draw(2, span)
        rows.append(Row(draw(0, apart) + stretch + draw(0, apart) + stretch[:1], (), stretch[1:], 1.0))
    return rows


class Words:
    """The words of an untrained model's tokenizer: a word is its tokens with and without a blank before it.

    common: those in more than a tenth of the prompts, from which all that is written is made. exercised: the tokens of
    the copying exercises, one spelling of each word.
    """

    def __init__(self, chat, arenas, sample=300):
        pairs = spellings(chat.tokenizer)
        self.of = {number: pair for pair in pairs for number in pair}  # token -> its word
        single = set(range(len(chat.tokenizer))) - self.of.keys() - chat.tokenizer.added_tokens_decoder.keys()
        self.others = {2: pairs, 1: [(number,) for number in sorted(single)]}  # by their number of spellings
        self.exercised = sorted(set(range(len(chat.tokenizer))) - {alone for _, alone in pairs})
        rng = random.Random(0)
        rows = [row for arena in itertools.islice(itertools.cycle(arenas), sample)
                for row in demonstrations(chat, arena, rng)]
        count = Counter(word for row in rows for word in self.words(row.prompt_ids))
        self.common = {word for word, number in count.items() if number > len(rows) / 10}

    def words(self, ids):
        return {self.of.get(number, (number,)) for number in ids}

    def exchange(self, row, rng):
        """The row with each rarer word that its answer copies from the prompt exchanged, everywhere, for another one.

        What a word means cannot help there, only where it stands: so copying is learned by place, and does not stop at
        names that were never met.
        """
        copied = sorted(self.words(row.response_ids) & self.words(row.prompt_ids) - self.common)
        other = {old: new for word in copied for old, new in zip(word, rng.choice(self.others[len(word)]))}
        prompt, response = (tuple(other.get(number, number) for number in ids)
                            for ids in (row.prompt_ids, row.response_ids))
        return dataclasses.replace(row, prompt_ids=prompt, response_ids=response)


def pack_whole(policy, rows, prompt_weight):
    """Rows whose prompts are predicted too, but for the first token -> (Pack, weight of each predicted token [N])."""
    batch = pack([row.prompt_ids[:1] for row in rows], [[row.prompt_ids[1:] + row.response_ids] for row in rows],
                 policy.device)
    weight = [w for row in rows for w in [prompt_weight] * (len(row.prompt_ids) - 1) + [1.0] * len(row.response_ids)]
    return batch, torch.tensor(weight, device=policy.device)


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def new_model(cfg, vocabulary=2048, episodes=1500):
    """An untrained Qwen2 of 0.9 million parameters and a BPE tokenizer made from demonstrations."""
    from tokenizers import AddedToken
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    arenas, rng, texts = warm_start_arenas(dataclasses.replace(cfg, sft_careless=0.5)), random.Random(0), []
    for arena in itertools.islice(itertools.cycle(arenas), episodes):
        for context, skills, thought, action in demonstrated_turns(arena, rng):
            texts += ["user\n", render(arena.cfg, context, skills), "assistant\n", thought, action]
    # Without brackets, so that none grows into a token with the word behind it: a label is then the same tokens in the
    # page and in the action.
    tokenizer = Qwen2Tokenizer().train_new_from_iterator((text.replace("[", "\n") for text in texts), vocabulary - 12)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                                  "additional_special_tokens": ["<|im_start|>"]})
    names = ("think", "action", "search", "answer", "information")
    tags = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    tokenizer.chat_template = CHATML
    size = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, use_sliding_window=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **size))
    look_back(model)
    return model, tokenizer


def spellings(tokenizer):
    """Pairs (token of a word after a blank, token of the same word without), sorted: get_vocab has no fixed order."""
    ids = tokenizer.get_vocab()
    return sorted((ids["Ġ" + word], number) for word, number in ids.items() if "Ġ" + word in ids)


@torch.no_grad()
def join_spellings(model, tokenizer, seed):
    """Makes both spellings of a word one vector, but for a difference that all words share.

    A word of the task stands after a blank there and often without one in an action: a copy all the same.
    """
    embedding = model.get_input_embeddings().weight  # [V, D]
    after_blank, alone = torch.tensor(spellings(tokenizer)).T
    difference = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(seed)).to(embedding)
    embedding[alone] = embedding[after_blank] + difference * embedding.std()


@torch.no_grad()
def look_back(model, frequencies=4, strength=6.0):
    """Makes the first two heads of the first layer start out attending one and two tokens back.

    Copying needs such heads, and finding them takes an untrained model most of its training. A key bias k and a query
    bias k rotated back by n positions give, under rotary embedding, the score |k|^2 sum cos((distance - n) angle),
    which is largest at n.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    half = attention.head_dim // 2
    angle = config.rope_parameters["rope_theta"] ** (-torch.arange(frequencies) / half)  # radians a token
    attention.k_proj.bias.view(-1, 2, half)[0, 0, :frequencies] = strength  # the key head that both query heads share
    for back in (1, 2):
        query = attention.q_proj.bias.view(-1, 2, half)[back - 1]
        query[0, :frequencies] = strength * torch.cos(back * angle)
        query[1, :frequencies] = -strength * torch.sin(back * angle)


# ---------------------------------------------------------------------------------------------- run folder, checkpoints

def save_checkpoint(run, policy, optimizer, phase, step, keep=2):
    """Writes <run>/checkpoint-<step> (checkpoint-sft-<step> in the warm start) aside and renames it: never half a one.

    Only the newest `keep` stay, and checkpoint-0, the reference model.
    """
    name = f"checkpoint-{step}" if phase == "rl" else f"checkpoint-sft-{step}"
    aside, final = run / f".{name}.tmp", run / name
    shutil.rmtree(aside, ignore_errors=True)
    policy.model.save_pretrained(aside)
    policy.chat.tokenizer.save_pretrained(aside)
    torch.save({"optimizer": optimizer.state_dict(), "phase": phase, "step": step}, aside / "state.pt")
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for old in checkpoints(run)[:-keep]:
        if old.name != "checkpoint-0":
            shutil.rmtree(old)
    return final


def checkpoints(run):
    """Checkpoint folders of a run, oldest first: those of the warm start come before the others."""
    found = [path for path in run.glob("checkpoint-*") if (path / "state.pt").is_file()]
    return sorted(found, key=lambda path: ("sft" not in path.name, int(path.name.rsplit("-", 1)[1])))


def provenance():
    """Versions and commit, for config.json."""
    names = ("torch", "transformers", "tokenizers", "gymnasium", "numpy", "rapidfuzz")
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"python": platform.python_version(), "commit": commit,
            "packages": {name: metadata.version(name) for name in names}}


def open_run(cfg):
    """Makes the run folder and its config.json. Raises UserError if it holds another run or cannot be written."""
    run = Path(cfg.out)
    if (run / "config.json").exists() and checkpoints(run):
        raise UserError(f"{run} already holds a run: go on with it by --resume {run}, or choose another with --out.")
    try:
        (run / "episodes").mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(cfg) | {"provenance": provenance()}, indent=1))
        (run / "metrics.jsonl").write_text("")
    except OSError as error:
        raise UserError(f"The run folder {run} cannot be written ({error.strerror}): choose one by --out.") from error
    return run


def read_run_config(run):
    """The settings of a run folder -> Config."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run folder (no config.json): give the folder that --out named.")
    try:
        stored = json.loads((run / "config.json").read_text())
        stored.pop("provenance")
        return Config(**stored)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{run / 'config.json'} was not written by this version of the program ({error}).") from error


def reopen_run(folder, explicit):
    """--resume -> (config, run, last checkpoint). Only --steps, --threads and --report_to may differ from the start."""
    run = Path(folder)
    cfg = read_run_config(run)
    for name, value in explicit.items():
        if value != getattr(cfg, name) and name not in ("steps", "threads", "report_to"):
            raise UserError(f"--{name} {value} contradicts the run in {run}, which has {getattr(cfg, name)}: leave it "
                            "out, or start a new run with --out.")
        setattr(cfg, name, value)
    validate(cfg, {}, {field.name: field for field in dataclasses.fields(Config)})
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} holds no checkpoint yet: start it again without --resume, in another folder.")
    done = 0 if "sft" in found[-1].name else int(found[-1].name.rsplit("-", 1)[1])
    if cfg.steps < done:
        raise UserError(f"--steps {cfg.steps} is less than the {done} steps that {run} already has: raise it.")
    return cfg, run, found[-1]


def restore(policy, cfg, run, checkpoint):
    """Weights, optimiser state and position of a checkpoint -> (phase, step, optimiser state)."""
    from safetensors.torch import load_model
    load_model(policy.model, checkpoint / "model.safetensors", device=str(policy.device))
    if policy.ref is not None and (run / "checkpoint-0").is_dir():
        load_model(policy.ref, run / "checkpoint-0" / "model.safetensors", device=str(policy.device))
    state = torch.load(checkpoint / "state.pt", map_location=policy.device, weights_only=True)
    trim_metrics(run, state["phase"], state["step"])
    return state["phase"], state["step"], state["optimizer"]


def trim_metrics(run, phase, step):
    """Drops the lines that a killed run wrote after its last checkpoint; a half-written last line too."""
    kept = []
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        place, last = (entry["phase"] == "rl", entry["step"]), (phase == "rl", step)
        if place < last or place == last and "eval/success" not in entry:  # a panel is played after its checkpoint
            kept.append(line + "\n")
    path.write_text("".join(kept))


class Log:
    """metrics.jsonl, a printed line a step, curve.png, and wandb or tensorboard when asked."""

    def __init__(self, run, cfg, bar):
        self.run, self.bar, self.send = run, bar, lambda metrics, step: None
        if cfg.report_to == "wandb":
            wandb = optional("wandb", "wandb")
            wandb.init(project="sdar", name=run.name, config=dataclasses.asdict(cfg))
            self.send = lambda metrics, step: wandb.log(metrics, step=step)
        elif cfg.report_to == "tensorboard":
            writer = optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run))
            self.send = lambda metrics, step: [writer.add_scalar(k, v, step) for k, v in metrics.items()]

    def __call__(self, phase, step, metrics, line):
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"phase": phase, "step": step} | metrics) + "\n")
        self.send(metrics, step)
        self.bar.write(line)


def optional(module, package):
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: pip install {package}") from error


def plot_curve(run, cfg):
    """curve.png: success on the fixed panel, sampled and greedy, and of the training rollouts, by step."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    entries = [e for e in entries if e["phase"] == "rl"]
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    panel = f"panel of {cfg.eval_tasks}"
    styles = {"reward/success": (f"training rollouts, T={cfg.temperature:g}", dict(color="0.75", lw=1)),
              "eval/success": (f"{panel}, T={cfg.eval_temperature:g}", dict(color="C0", marker="o")),
              "eval/greedy_success": (f"{panel}, greedy", dict(color="C1", marker="s"))}
    for key, (label, style) in styles.items():
        points = [(e["step"], e[key]) for e in entries if key in e]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    tasks = "official data" if cfg.data else "generated tasks"
    axes.set(xlabel="step", ylabel="success rate", ylim=(0, 1), title=f"{cfg.method} on {cfg.env} ({tasks})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=120)
    pyplot.close(figure)


def dump_episodes(path, policy, episodes, rows=None):
    """Whole episodes as JSON lines; with rows (in the order of the turns) each token comes with its gap and gate."""
    rows = iter(rows or [])
    with open(path, "w") as file:
        for episode in episodes:
            turns = []
            for turn in episode.turns:
                row = next(rows, None)
                tokens = policy.chat.tokenizer.convert_ids_to_tokens(list(turn.response.ids))
                entry = {"observation": turn.context.observation, "text": turn.text, "action": turn.action,
                         "valid": turn.valid, "stop": turn.response.stop, "tokens": tokens,
                         "logp": [round(x, 4) for x in turn.response.logp]}
                if row is not None:
                    entry["advantage"] = row.advantage
                    if row.gap is not None:
                        entry |= {"gap": [round(x, 4) for x in row.gap], "gate": [round(x, 4) for x in row.gate]}
                turns.append(entry)
            whole = {"split": episode.task.split, "task_id": episode.task.task_id, "task_type": episode.task_type,
                     "task": episode.turns[0].context.task, "won": episode.won, "score": episode.score,
                     "done": episode.done, "turns": turns}
            file.write(json.dumps(whole, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------------------------------------------- main

def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def episode_metrics(cfg, episodes):
    turns = [turn for e in episodes for turn in e.turns]
    return {"reward/mean": mean(episode_return(cfg, e) for e in episodes),
            "reward/success": mean(e.won for e in episodes),
            "reward/score": mean(e.score for e in episodes),
            "rollout/turns": mean(len(e.turns) for e in episodes),
            "rollout/unfinished": mean(not e.done for e in episodes),
            "rollout/invalid": mean(not t.valid for t in turns),
            "rollout/errors": sum(e.errors for e in episodes),
            "rollout/cut_off": mean(t.response.stop == "length" for t in turns),
            "rollout/response_tokens": mean(len(t.response.ids) for t in turns)}


def panel_tasks(cfg, env, split="val"):
    """The fixed panel: the first tasks of the validation split, the same for every run."""
    size = guard(Task(split, 0, 0), "counting tasks", env.num_tasks, split)
    if size < cfg.eval_tasks:
        raise UserError(f"--eval_tasks {cfg.eval_tasks} is more than the {size} tasks of split {split!r}: lower it.")
    return [Task(split, i, i) for i in range(cfg.eval_tasks)]


def evaluate(policy, cfg, environments, temperature, skills=None):
    """The fixed panel, played once a task -> list of Episode. temperature 0 is greedy."""
    return rollout(policy, environments, panel_tasks(cfg, environments[0]), cfg, temperature=temperature, skills=skills,
                   seed=cfg.seed)


def panel_metrics(policy, cfg, environments):
    sampled = evaluate(policy, cfg, environments, cfg.eval_temperature)
    greedy = evaluate(policy, cfg, environments, 0)
    by_type = defaultdict(list)
    for e in sampled:
        by_type[f"eval/success/{e.task_type}"].append(e.won)
    return {"eval/success": mean(e.won for e in sampled), "eval/score": mean(e.score for e in sampled),
            "eval/greedy_success": mean(e.won for e in greedy), "eval/errors": sum(e.errors for e in sampled + greedy),
            **{name: mean(won) for name, won in sorted(by_type.items())}}


def step_tasks(cfg, env, step):
    """Tasks of a training step, drawn by (seed, step) alone, so that a resumed run sees the same; groups adjoin."""
    size = env.num_tasks("train")
    if size < cfg.tasks:
        raise UserError(f"--tasks {cfg.tasks} is more than the {size} training tasks of {cfg.env}: lower it.")
    ids = random.Random(f"{cfg.seed} tasks {step}").sample(range(size), cfg.tasks)
    return [Task("train", task_id, group) for group, task_id in enumerate(ids) for _ in range(cfg.group_size)]


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits until the block is done, so that weights and optimiser state always belong to a whole step."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(print("\nfinishing this update, then saving ...")))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def train_rl_step(policy, optimizer, cfg, episodes, skills, run, step):
    """Episodes -> advantages -> update, once -> metrics."""
    start = time.perf_counter()
    rows, metrics = make_rows(policy, cfg, episodes, skills)
    metrics |= train_step(policy, optimizer, rows, cfg, step) | episode_metrics(cfg, episodes)
    if step % cfg.episodes_every == 0:
        dump_episodes(run / "episodes" / f"step-{step:05d}.jsonl", policy, episodes, rows)
    return metrics | {"time/update": time.perf_counter() - start, "mem/peak_gb": peak_memory_gb(policy.device)}


def step_line(cfg, step, m):
    teacher = "" if cfg.teacher == "none" else f"  gap {m['sdar/gap']:+.3f}  gate {m['sdar/gate']:.3f}"
    errors = f"  errors {m['rollout/errors']}" if m["rollout/errors"] else ""
    return (f"step {step:3d}/{cfg.steps}  success {m['reward/success']:.2f}  turns {m['rollout/turns']:.1f}  "
            f"invalid {m['rollout/invalid']:.2f}  entropy {m['grpo/entropy']:.3f}  "
            f"flat groups {m['grpo/zero_variance_groups']:.2f}{teacher}{errors}  {m['time/step']:.1f} s")


def warm_start(policy, optimizer, cfg, arenas, log, first, reached):
    words = Words(policy.chat, arenas) if cfg.model == "new" else None
    for step in range(first, cfg.sft_steps):
        start = time.perf_counter()
        with uninterrupted():
            metrics = warm_start_step(policy, optimizer, cfg, arenas, words, step)
            seconds = time.perf_counter() - start
            log("sft", step + 1, metrics | {"time/step": seconds}, f"warm start {step + 1:4d}/{cfg.sft_steps}  "
                f"loss {metrics['sft/loss']:.4f}  {metrics['sft/tokens'] / seconds:.0f} tokens/s")
            reached("sft", step + 1)


def reinforce(policy, optimizer, cfg, environments, skills, run, log, first, reached):
    for step in range(first, cfg.steps + 1):  # the pass with step == cfg.steps only evaluates
        if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics = panel_metrics(policy, cfg, environments)
            log("rl", step, metrics, f"panel after {step} steps: success {metrics['eval/success']:.3f} at "
                f"T={cfg.eval_temperature:g}, {metrics['eval/greedy_success']:.3f} greedy ({cfg.eval_tasks} tasks)")
            plot_curve(run, cfg)
        if step < cfg.steps:
            start, seed = time.perf_counter(), cfg.seed * 1_000_003 + step
            torch.manual_seed(seed)
            episodes = rollout(policy, environments, step_tasks(cfg, environments[0], step), cfg, seed=seed)
            rolled = time.perf_counter()
            with uninterrupted():
                metrics = train_rl_step(policy, optimizer, cfg, episodes, skills, run, step)
                metrics |= {"time/rollout": rolled - start, "time/step": time.perf_counter() - start}
                log("rl", step + 1, metrics, step_line(cfg, step + 1, metrics))
                reached("rl", step + 1)


def train(cfg, run=None, resumed=None):
    """One run: warm start if asked, then cfg.steps steps of reinforcement learning with evaluations and checkpoints.

    run, resumed: the folder and the checkpoint of a run to go on with; a new run's folder is made once all is loaded.
    """
    count = max(cfg.tasks * cfg.group_size, cfg.eval_tasks if cfg.eval_every else 0)
    environments = [make_env(cfg) for _ in range(count)]
    step_tasks(cfg, environments[0], 0)  # both raise if there are too few tasks
    if cfg.eval_every:
        panel_tasks(cfg, environments[0])
    skills = load_skills(cfg, environments[0].task_types)
    arenas = warm_start_arenas(cfg) if cfg.sft_steps else []
    for arena in arenas:  # raises now if the tasks have no expert
        demonstrated_turns(arena, random.Random(0))
    policy = load_policy(cfg)
    check_prompt_limit(policy, cfg, environments[0])
    run = run or open_run(cfg)
    state = {"phase": "sft" if cfg.sft_steps else "rl", "step": 0, "optimizer": None}
    if resumed:
        state["phase"], state["step"], state["optimizer"] = restore(policy, cfg, run, resumed)
    tasks = f"data in {cfg.data}" if cfg.data else "tasks generated here, not the official ones"
    size = sum(p.numel() for p in policy.model.parameters()) / 1e6
    head = policy.model.get_output_embeddings().weight
    kernel = kernels.choose_backend("auto", head, head)
    print(f"{cfg.method} on {cfg.env} ({tasks}), model {cfg.model} ({size:.2f}M parameters), {policy.device}, "
          f"run folder {run}\n{kernel} kernels: log-probs within {policy.fused_error:.1e} of the model's own",
          flush=True)
    with tqdm(total=cfg.sft_steps + cfg.steps, initial=state["step"] + (cfg.sft_steps if state["phase"] == "rl" else 0),
              unit="step", dynamic_ncols=True) as bar:
        log = Log(run, cfg, bar)
        optimizer = make_optimizer(policy.model, cfg.lr, cfg)
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])

        def save():
            return save_checkpoint(run, policy, optimizer, state["phase"], state["step"])

        def reached(phase, step):
            state["phase"], state["step"] = phase, step
            bar.update()
            if step % (cfg.save_every if phase == "rl" else 200) == 0:
                save()

        try:
            if state["phase"] == "sft":
                warm_start(policy, optimizer, cfg, arenas, log, state["step"], reached)
                state["phase"], state["step"] = "rl", 0
                optimizer = make_optimizer(policy.model, cfg.lr, cfg)
                if policy.ref is not None:
                    policy.ref.load_state_dict(policy.model.state_dict())
            if state["step"] == 0:
                save()  # what the reference model of a resumed run is read from
            reinforce(policy, optimizer, cfg, environments, skills, run, log, state["step"], reached)
            saved = save()
        except KeyboardInterrupt:
            saved = save()
            bar.write(f"stopped after step {state['step']}, saved in {saved}; go on: python sdar.py --resume {run}")
            return 130
        except UserError as error:  # an environment that raises, a gradient that overflows: the whole steps are kept
            raise UserError(f"{error} All whole steps are saved in {save()}; --resume {run} goes on.") from error
    curve = f"; curve in {run / 'curve.png'}" if cfg.eval_every else ""
    print(f"saved in {saved}{curve}; evaluate it: python eval.py {saved}")
    return 0


def main(argv=None):
    """The command line. Returns the exit status; bad input is one sentence on standard error and status 2."""
    try:
        explicit, resume = parse_args(argv)
        if resume:
            cfg, run, checkpoint = reopen_run(resume, explicit)
            return train(cfg, run, checkpoint)
        return train(make_config(explicit))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step: nothing to save yet
        return 130


if __name__ == "__main__":
    sys.exit(main())
