"""Both prompt styles beside each other, with and without skills: what a model makes of them, and how long they are.

    python -m tools.prompt_table --model runs/smollm2 --tasks 32      plays every environment, or that of --env
    python -m tools.prompt_table --count FOLDER                       tokens of the expert's prompts, by a tokenizer

Prints a Markdown table, a row per environment, style and condition, and keeps it as JSON (--out, by default
results/prompts-<name>.json), which is written anew after each row. Tasks are those of the evaluation set, sampled at
--temperature, and the limit of a prompt is the paper's. Invalid is a turn whose answer did not keep the format, or
whose action was not possible; cut is an answer that --max_response_tokens ended.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

import envs
import sdar
from lib import folders, models, runs
from lib.program import exit_status, to_json, write_atomically
from lib.settings import Parser, add_options, number

CONDITIONS = [(style, skilled) for style in ("short", "full") for skilled in (False, True)]
FLAGS = ("env", "model", "data", "env_timeout", "max_turns", "max_prompt_tokens", "max_response_tokens",
         "rollout_batch", "device", "dtype", "threads", "seed")
PLAYED = ("environment", "prompt", "skills", "tasks", "success", "turns", "invalid", "no format", "cut",
          "tokens per response", "prompt tokens, mean", "longest")
COUNTED = ("environment", "prompt", "skills", "tasks", "turns", "prompt tokens, mean", "longest")


def settings(env, style, given):
    """The Config under which a row is played."""
    paper = {"max_prompt_tokens": sdar.ENV_DEFAULTS[env].get("max_prompt_tokens", sdar.Config.max_prompt_tokens)}
    return sdar.make_config(paper | given | {"env": env, "prompt": style, "method": "grpo", "kl_coef": 0.0})


def play_row(policy, cfg, skilled):
    """The evaluation set, played once -> the numbers of a row."""
    env = sdar.make_env(cfg)
    tasks = sdar.evaluation_tasks(cfg, env)
    skills = sdar.load_skills(dataclasses.replace(cfg, retrieval="type"), env.task_types) if skilled else None
    episodes = sdar.rollout(policy, [env, *(sdar.make_env(cfg) for _ in tasks[1:])], tasks, cfg, skills=skills,
                            temperature=cfg.eval_temperature, seed=cfg.seed, doing=f"{cfg.env}, {cfg.prompt}")
    turns = [turn for episode in episodes for turn in episode.turns]
    prompts = [len(turn.prompt_ids) for turn in turns]
    return {"tasks": len(tasks), "success": runs.mean(episode.won for episode in episodes), "turns": len(turns),
            "invalid": runs.mean(not turn.valid for turn in turns),
            "no format": runs.mean(turn.action == "" for turn in turns),
            "cut": runs.mean(turn.response.stop == "length" for turn in turns),
            "tokens per response": runs.mean(len(turn.response.ids) for turn in turns),
            "prompt tokens, mean": runs.mean(prompts), "longest": max(prompts)}


def read_chat(folder):
    from transformers import AutoTokenizer
    return models.Chat(AutoTokenizer.from_pretrained(folder))


def count_tokens(chat, cfg, skilled, tasks):
    """The expert's play of the first training tasks, in prompts that nothing is cut from -> the numbers of a row."""
    env, lengths = sdar.make_env(cfg), []
    skills = sdar.load_skills(dataclasses.replace(cfg, retrieval="type"), env.task_types)
    for task in range(tasks):
        running = sdar.start_episode(cfg, sdar.Task("train", task, 0), env)
        text = sdar.skill_text(skills, running.episode) if skilled else ""
        while not running.over:
            context = sdar.turn_context(cfg, running.info, running.observation, running.past)
            lengths.append(len(chat.prompt(sdar.render(cfg, context, text))))
            running.past.append((running.observation, env.expert()))
            running.observation, _, terminated, truncated, running.info = env.step(running.past[-1][1])
            running.over = terminated or truncated
    return {"tasks": tasks, "turns": len(lengths), "prompt tokens, mean": runs.mean(lengths),
            "longest": max(lengths)}


def line(cells):
    """A row of a Markdown table; rates with three digits, other means with one."""
    shown = [f"{cell:.3f}" if isinstance(cell, float) and cell <= 1 else f"{cell:.1f}" if isinstance(cell, float)
             else str(cell) for cell in cells]
    return f"| {' | '.join(shown)} |"


def make_table(options, command):
    """Plays or counts, as the options say; prints the table and writes the JSON -> its path."""
    folder, tasks = options.pop("count", None), options.pop("tasks")
    temperature = options.pop("temperature")
    model = options.setdefault("model", folder or sdar.Config.model)
    out = Path(options.pop("out", f"results/prompts-{Path(model).name}.json"))
    given = options | {"eval_tasks": tasks, "eval_temperature": temperature}
    names = [given.pop("env")] if "env" in given else list(envs.ENVIRONMENTS)
    columns, player, rows = COUNTED if folder else PLAYED, None, []
    print(line(columns), line(["---"] * len(columns)), sep="\n", flush=True)
    for name in names:
        for style, skilled in CONDITIONS:
            cfg = settings(name, style, given)
            if player is None:
                player = read_chat(folder) if folder else sdar.load_policy(cfg)
            numbers = count_tokens(player, cfg, skilled, tasks) if folder else play_row(player, cfg, skilled)
            rows.append({"environment": name, "prompt": style, "skills": "with" if skilled else "without"} | numbers)
            print(line(rows[-1][column] for column in columns), flush=True)
            write_atomically({out: to_json({"command": command, "settings": given, "rows": rows,
                                            "provenance": folders.provenance(sdar.__version__)}, indent=1)})
    return out


def table(argv):
    parser = Parser("python -m tools.prompt_table [options]", __doc__).add_commands()
    group = parser.add_argument_group("table")
    group.add_argument("--count", metavar="FOLDER", help="count prompt tokens by this tokenizer, and play no model")
    group.add_argument("--tasks", type=number(int), metavar="INT", default=32, help="per environment (default 32)")
    group.add_argument("--temperature", type=number(float), metavar="FLOAT", default=sdar.Config.eval_temperature,
                       help=f"0 is greedy (default {sdar.Config.eval_temperature})")
    group.add_argument("--out", metavar="FILE", help="JSON (default results/prompts-<name>.json)")
    add_options(parser, sdar.Config, FLAGS, sdar.TABLES)
    argv = sys.argv[1:] if argv is None else argv
    options = vars(parser.parse_args(argv))
    print(f"\nsaved in {make_table(options, shlex.join(['python', '-m', 'tools.prompt_table', *argv]))}")


def main(argv=None):
    """The command line. Returns the exit status; bad input is one sentence on standard error and status 2."""
    return exit_status(table, argv)


if __name__ == "__main__":
    sys.exit(main())
