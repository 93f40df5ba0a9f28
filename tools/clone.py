"""Behaviour cloning (SFT) of an environment's scripted expert, for models that can't hold the answer format yet.

    python -m tools.clone --env webshop --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 100 --out runs/cloned
    python sdar.py --env webshop --model runs/cloned

--out becomes a model folder; its clone.json, metrics.jsonl and checkpoint-N/ let --resume go on bit for bit. Log-probs,
batching and packing are those of sdar.py. Wherever the expert's play is not the whole story (a bundled model, a second
environment), hand `run` another function from step to lessons: tools/tiny.py does.
"""

import dataclasses
import itertools
import math
import random
import re
import shlex
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import envs
import kernels
import sdar
from lib import experts, folders, memory, models, runs
from lib.checkpoints import step_of
from lib.program import UserError, exit_status
from lib.settings import Parser, add_options, changeable, check_values, option
from lib.tasks import count_tasks, guard, reset_env, step_env


@dataclass
class CloneConfig(sdar.Config):
    """sdar.Config, of which cloning uses what FLAGS names, and what it needs besides."""

    steps: int = option(100, "optimiser steps", group="optimisation", at_least=1)
    lr: float = option(1e-5, "learning rate, times a warm-up over 50 steps and a cosine from 1 to a tenth", above=0)
    tokens: int = option(32768, "tokens per step, prompts included", group="cloning", at_least=1)
    weak: float = option(0.0, "share of demonstrations by a weak demonstrator, without skills in the prompt; the "
                         "others are the expert's, with skills. 0: all are the expert's, without skills",
                         at_least=0, at_most=1)
    save_every: int = option(200, "steps between checkpoints", group="run folder", at_least=1, resume=True)
    kl_coef: float = option(0.0, "not used: cloning has no reference model")
    teacher: str = option("none", "not used: cloning has no teacher")
    bundled: bool = option(False, "not a flag: whether the model descends from the bundled one, and keeps its defaults")


FLAGS = ("env", "data", "model", "device", "dtype", "threads", "history", "history_observations", "max_prompt_tokens",
         "retrieval", "skills", "steps", "lr", "tokens", "weak", "weight_decay", "max_grad_norm", "micro_tokens",
         "recompute", "seed", "out", "save_every", "keep", "report_to", "prompt")
SETTINGS = "clone.json"
FOR_TINY = {"lr": 3e-3, "tokens": 6144}


def clone_config(explicit, kind=CloneConfig):
    """Explicit settings -> kind, with the prompt settings that sdar.py would use. Raises UserError if they can't be."""
    env, model = (explicit.get(name, kind.__dataclass_fields__[name].default) for name in ("env", "model"))
    if env not in envs.ENVIRONMENTS:
        raise UserError(f"--env {env!r} is unknown; choose from {', '.join(envs.ENVIRONMENTS)}.")
    prompts = {name: value for name, value in sdar.defaults(env, model).items()
               if name in FLAGS and name not in ("steps", "lr")}
    small = FOR_TINY | {"bundled": True} if models.is_bundled(model) else {}
    cfg = kind(**(prompts | small | explicit))
    check_values(cfg)
    for name in ("skills", "retrieval"):
        if name in explicit and not cfg.weak:
            raise UserError(f"--{name} would do nothing here, since --weak 0 shows no skills: leave it out.")
    return cfg


# ------------------------------------------------------------------------------------------------------- demonstrations

class Source(NamedTuple):
    """Where demonstrations come from: an environment, with all that its prompts need."""

    cfg: CloneConfig
    env: object
    skills: dict  # task type -> text


def make_source(cfg):
    env = sdar.make_env(cfg, probe=True)
    return Source(cfg, env, sdar.load_skills(cfg, env.task_types))


@dataclass(eq=False)
class Lesson:
    """A text to be imitated: each token of response_ids after prompt_ids, with a weight each. It batches like a Row."""

    prompt_ids: tuple
    response_ids: tuple
    weights: list  # [T]; 1 for what counts as an answer
    teacher_ids: tuple = ()


def demonstrated_turns(source, rng, noise=0.15, most=4):
    """At most `most` turns of one episode of the expert, or, with the probability cfg.weak, of the weak demonstrator
    -> [(context, skills, thought, action)].

    The expert's prompt holds the skills if there are weak demonstrations to tell it from. One move in seven is not
    cloned: a random one, the last one again, or one whose last number, if it ends with one, is raised by one. They lead
    to the observations from which one must find back, and to those where nothing happened. Raises UserError where the
    environment raises, as one without an expert does.
    """
    cfg, env, skills = source
    weak = rng.random() < cfg.weak
    size = count_tasks(env, "train")
    task = sdar.Task("train", rng.randrange(size), 0)
    observation, info = reset_env(env, task)
    text = skills[info["task_type"]] if cfg.weak and not weak else ""
    turns, past, over = [], [], False
    while not over:
        context = sdar.turn_context(cfg, info, observation, past)
        thought, action = guard(task, "demonstration", env.demonstrate, rng, weak)
        if rng.random() < noise:
            again = past[-1][1] if past else action
            beyond = re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), action)  # "go to shelf 3", if there is one
            slip = rng.choice([again, beyond])
            action = slip if rng.random() < 0.6 else experts.random_move(info["admissible"], rng) or action
        else:
            turns.append((context, text, thought, action))
        over = past[-1:] == [(observation, action)]  # a player that repeats itself has given up, and would fill a batch
        past.append((observation, action))
        observation, _, terminated, truncated, info = step_env(env, task, action, len(past) + 1)
        over |= terminated or truncated
    return rng.sample(turns, min(most, len(turns)))


def demonstrations(chat, source, rng):
    """Turns of one episode -> a Lesson each: the prompt as sdar.py makes it, the answer as its parser reads it."""
    lessons = []
    for context, skills, thought, action in demonstrated_turns(source, rng):
        _, ids = sdar.fit_prompt(chat, source.cfg, context, skills)
        answer = chat.answer(experts.write_answer(source.cfg.env, thought, action))
        lessons.append(Lesson(ids, answer, [1.0] * len(answer)))
    return lessons


def count_tokens(lessons):
    return sum(len(lesson.prompt_ids) + len(lesson.response_ids) for lesson in lessons)


def expert_lessons(chat, source):
    """-> a function from step to about cfg.tokens tokens of demonstrations: whole episodes, drawn by (seed, step)."""
    def lessons_of(step):
        rng, lessons = random.Random(f"{source.cfg.seed} demonstrations {step}"), []
        while count_tokens(lessons) < source.cfg.tokens:
            lessons += demonstrations(chat, source, rng)
        return lessons

    return lessons_of


# ------------------------------------------------------------------------------------------------------------- training

def clone_step(policy, optimizer, cfg, lessons, step):
    """One optimiser step of likelihood -> metrics. The loss is the mean over the tokens that count as answers."""
    num_tokens = sum(lesson.weights.count(1.0) for lesson in lessons)
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for micro_batch in sdar.micro_batches(lessons, cfg.micro_tokens, policy.packs):
        members = list(itertools.chain(*micro_batch))
        batch = sdar.pack_rows(policy, micro_batch)
        weight = sdar.join_tokens(members, {lesson: lesson.weights for lesson in members}, policy.device)  # [N]
        logp, _ = kernels.fused_logprob(*sdar.head_inputs(policy, policy.model, batch), batch.targets)
        loss = -(weight * logp).sum() / num_tokens
        loss.backward()
        total -= logp.detach()[weight == 1].sum().item() / num_tokens
    lr = cfg.lr * min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))
    norm = sdar.optimizer_step(policy.model, optimizer, lr, cfg, {})
    policy.refresh()
    return {"clone/loss": total, "clone/grad_norm": norm, "clone/tokens": count_tokens(lessons)}


def run(cfg, policy, lessons_of, folder=None, checkpoint=None, command="python -m tools.clone"):
    """cfg.steps steps on lessons_of(step) -> the folder, which is a model folder in the end.

    folder, checkpoint: the run to go on with. Ctrl-C and a UserError save the whole steps.
    """
    cfg.micro_tokens = cfg.micro_tokens or memory.choose_micro_tokens(cfg, policy)
    optimizer = sdar.make_optimizer(policy.model, cfg)
    if checkpoint:
        done = folders.restore(checkpoint, optimizer)
        folders.write_settings(folder, cfg, SETTINGS)
    else:
        folder, done = folders.create_run(cfg, sdar.__version__, f"{cfg.env}-clone-{cfg.seed}", SETTINGS), 0
    print(f"cloning into {folder}, {cfg.steps} steps on {policy.device}", flush=True)
    with runs.Run(folder, policy.model, policy.chat.tokenizer, optimizer, cfg, done, command, FLAGS) as open_run:
        for step in range(done, cfg.steps):
            start = time.perf_counter()
            with runs.uninterrupted():  # drawing lessons too: tools.tiny changes the model there, once
                lessons = lessons_of(step)
                metrics = clone_step(policy, optimizer, cfg, lessons, step)
                seconds = time.perf_counter() - start
                open_run.finish_step(
                    metrics | {"time/step": seconds}, f"step {step + 1:4d}/{cfg.steps}  loss "
                    f"{metrics['clone/loss']:.4f}  {metrics['clone/tokens'] / seconds:.0f} tokens/s")
    policy.model.save_pretrained(folder)
    policy.chat.tokenizer.save_pretrained(folder)
    return folder


def parse(argv, description, kind, flags, fixed=None):
    """Command line -> (cfg, folder, checkpoint), the last two None unless --resume is given.

    fixed: settings that are not flags, for a new run. Raises UserError.
    """
    parser = Parser(None, description).add_commands("resume")
    add_options(parser, kind, flags, {name: {key: value for key, value in row.items() if key not in ("steps", "lr")}
                                      for name, row in sdar.TABLES.items()} | {"tiny": FOR_TINY})
    explicit = vars(parser.parse_args(argv))
    resume = explicit.pop("resume")
    if resume is not None:
        cfg, folder, checkpoint = folders.reopen(resume, explicit, kind, changeable(kind), SETTINGS)
        check_values(cfg)
        return cfg, folder, checkpoint
    return clone_config((fixed or {}) | explicit, kind), None, None


def clone(argv):
    cfg, folder, checkpoint = parse(argv, __doc__, CloneConfig, FLAGS)
    if checkpoint and step_of(checkpoint) == cfg.steps and (folder / "tokenizer_config.json").is_file():
        return print(f"{folder} is finished ({cfg.steps} steps); train it: {advice(cfg, folder)}")
    source = make_source(cfg)
    demonstrated_turns(source, random.Random(0))  # raises now if the tasks have no expert
    policy = sdar.load_policy(dataclasses.replace(cfg, model=str(checkpoint)) if checkpoint else cfg,
                              source.skills if cfg.weak else None)
    sdar.check_prompt_limit(policy, cfg, source.env)
    folder = run(cfg, policy, expert_lessons(policy.chat, source), folder, checkpoint)
    print(f"saved in {folder}; train it: {advice(cfg, folder)}")


def advice(cfg, folder):
    return f"python sdar.py --env {cfg.env} --model {shlex.quote(str(folder))}"


def main(argv=None, program=clone):
    """The command line. Returns the exit status; bad input is one sentence on standard error and status 2."""
    return exit_status(program, argv)


if __name__ == "__main__":
    sys.exit(main())
