"""The README's measurements. Run from the repository's root; each writes results/<name>.json:

    python -m tools.measure step               a GRPO step against TRL's (pip install trl datasets accelerate)
    python -m tools.measure webshop            steps per second, loading
    python -m tools.measure alfworld           steps per second, reset and parsing; players of the generated tasks; its
                                               own engine beside ours if it is there (pip install alfworld)
    python -m tools.measure bm25               ranks beside bm25s and rank-bm25 (pip install bm25s rank-bm25)
    TRITON_INTERPRET=1 python -m tools.measure liger       errors beside fused_linear_jsd (pip install liger-kernel)
    python -m tools.measure skill_texts        what the bundled model does with the skills, and with each control's text

Ours and TRL's steps run in this one process, block by block in turn: the ratio is fair where the seconds are not.
"""

import functools
import importlib.util
import itertools
import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

import envs
import kernels
import sdar
from eval import evaluate
from lib import generated, retrieval
from lib.official import ALFWORLD_SPLITS, load_game, read_task
from lib.skills import CONTROLS
from tools import bench_kernels

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, PROMPT, NEW, SAMPLES, GROUP = 2048, 200, 16, 64, 8  # 64 samples in groups of 8, 200 + 16 tokens


def small_model():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None))


def sdar_steps(count):
    """Seconds of each of `count` GRPO steps of sdar.py: sampling, random returns, update."""
    cfg = sdar.make_config({"model": "tiny", "method": "grpo", "max_response_tokens": NEW, "lr": 1e-4})
    policy = sdar.Policy(small_model().eval(), None, frozenset([1]), torch.device("cpu"), False)
    optimizer, rng, stamps = sdar.make_optimizer(policy.model, cfg), random.Random(0), [time.perf_counter()]
    for step in range(count):
        groups = [tuple(rng.randrange(3, VOCABULARY) for _ in range(PROMPT)) for _ in range(SAMPLES // GROUP)]
        prompts = [prompt for prompt in groups for _ in range(GROUP)]
        noises = [random.Random(f"{step} {number}") for number in range(SAMPLES)]
        responses = sdar.sample(policy, prompts, cfg, 1.0, noises)
        returns = torch.tensor([rng.random() for _ in prompts])
        advantages = sdar.group_advantages(returns, torch.arange(SAMPLES) // GROUP).tolist()
        rows = [sdar.Row(p, (), r.ids, a, r.logp) for p, r, a in zip(prompts, responses, advantages)]
        sdar.train_step(policy, optimizer, rows, cfg, step)
        stamps.append(time.perf_counter())
    return [b - a for a, b in zip(stamps, stamps[1:])]


def trl_steps(count):
    """Seconds of `count` steps of GRPOTrainer each: same model, lengths, groups, learning rate; no reference model."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                        unk_token="<unk>", padding_side="left")
    rng, stamps = random.Random(0), []
    rows = [{"prompt": " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(PROMPT))} for _ in range(400)]

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(
            output_dir=out, per_device_train_batch_size=SAMPLES, num_generations=GROUP, max_completion_length=NEW,
            max_steps=count + 1, learning_rate=1e-4, beta=0.0, temperature=1.0, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, logging_strategy="no")
        trainer = GRPOTrainer(
            model=small_model(), args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [rng.random() for _ in completions], callbacks=[Clock()])
        trainer.train()
    return [b - a for a, b in zip(stamps, stamps[1:])]  # the first step, with its setting-up, has no stamp before it


def measure_step(count=8):
    sdar_steps(2), trl_steps(1)  # warm up
    ours, theirs = [], []
    for _ in range(2):
        ours += sdar_steps(count)
        theirs += trl_steps(count)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"sdar.py {statistics.median(ours):.3f} s per step, TRL {statistics.median(theirs):.3f} s, ratio {ratio:.2f} "
          f"(medians of {len(ours)}, {torch.get_num_threads()} threads)")
    shape = {"vocabulary": VOCABULARY, "prompt": PROMPT, "new": NEW, "samples": SAMPLES, "group": GROUP,
             "model": "Qwen2 128 x 4"}
    return {"sdar_s": ours, "trl_s": theirs, "ratio_of_medians": ratio, "trl": version("trl"), "shape": shape}


def measure_webshop(episodes=2000):
    """Expert and random play in equal parts: searches, resets and rewards count, the expert's own thinking does not."""
    start = time.perf_counter()
    env = envs.WebShop()
    load = time.perf_counter() - start
    rng, steps, seconds = random.Random(0), 0, 0.0
    for number in range(episodes):
        start = time.perf_counter()
        _, info = env.reset(options={"split": "train", "task_id": rng.randrange(env.num_tasks("train"))})
        seconds += time.perf_counter() - start
        words = [word for word in info["task"].split() if word.isalpha()]
        for _ in range(15):
            if number % 2:
                action = env.expert()
            else:
                action = rng.choice(info["admissible"]).replace("<words>", " ".join(rng.sample(words, 3)))
            start = time.perf_counter()
            _, _, terminated, truncated, info = env.step(action)
            seconds += time.perf_counter() - start
            steps += 1
            if terminated or truncated:
                break
    print(f"{len(env.products)} products: loaded in {load:.2f} s, {steps / seconds:.0f} steps/s ({steps} steps)")
    return {"products": len(env.products), "goals": len(env.goals), "load_s": load, "steps": steps,
            "steps_per_s": steps / seconds}


def measure_alfworld(repeats=20):
    """The recorded commands of data/golden/alfworld, admissible commands included, on one core."""
    import gzip
    records = [json.loads(gzip.decompress(path.read_bytes()))
               for path in sorted((ROOT / "data" / "golden" / "alfworld").glob("*.json.gz"))]
    parsing, resets, seconds, steps, env = [], [], 0.0, 0, envs.ALFWorld()
    with tempfile.TemporaryDirectory() as folder:
        for number, record in enumerate(records):
            path = Path(folder) / f"{number}.tw-pddl"
            path.write_text(json.dumps(record["game"]))
            start = time.perf_counter()
            load_game(path)
            parsing.append(time.perf_counter() - start)
            for kind in ("plan", "walk") * repeats:
                start = time.perf_counter()
                env.reset(options={"game": path})
                reset = time.perf_counter()
                for step in record[kind]["steps"][1:]:
                    env.step(step["command"])
                resets.append(reset - start)
                seconds += time.perf_counter() - reset
                steps += len(record[kind]["steps"]) - 1
    print(f"{len(records)} games: parsed in at most {max(parsing) * 1e3:.1f} ms, reset in {max(resets) * 1e3:.2f} ms, "
          f"{steps / seconds:.0f} steps/s ({steps} steps)")
    return {"games": len(records), "parse_s": max(parsing), "reset_s": max(resets), "steps": steps,
            "steps_per_s": steps / seconds} | alfworld_players() | beside_official_engine(records)


def play_timed(reset, step, read, commands):
    """-> (what `read` gives of every answer, seconds of the reset, seconds of the steps)."""
    start = time.perf_counter()
    found = [read(reset())]
    middle = time.perf_counter()
    found += [read(step(command)) for command in commands]
    return found, middle - start, time.perf_counter() - middle


def official_games(records, folder):
    """Yields (record, path of its game file, alfworld's own engine on that file)."""
    import textworld
    from alfworld.agents.environment import alfred_tw_env
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    domain, grammar = Path(ALFRED_PDDL_PATH).read_text(), Path(ALFRED_TWL2_PATH).read_text()
    wanted = textworld.EnvInfos(won=True, admissible_commands=True)
    for number, record in enumerate(records):
        path = Path(folder) / f"{number}.tw-pddl"
        task = read_task(record["game"]["grammar"], path)
        path.write_text(json.dumps(record["game"] | {
            "pddl_domain": domain, "walkthrough": [], "grammar": grammar.replace("UNKNOWN GOAL.", task)}))
        yield record, path, textworld.start(
            str(path), wanted, [alfred_tw_env.AlfredDemangler(), alfred_tw_env.AlfredInfos])


def beside_official_engine(records):
    """Ours and alfworld's engine in turn on the recorded commands: resets and steps, with admissible commands."""
    if importlib.util.find_spec("alfworld") is None:
        print("alfworld is not installed, so there is no comparison with it: pip install alfworld")
        return {}
    seconds, steps, stdout = {"ours": [0.0, 0.0], "official": [0.0, 0.0]}, 0, os.dup(1)  # [resets, steps]

    def official_answer(state):  # a step gives (state, reward, done)
        state = state if isinstance(state, dict) else state[0]
        return state["feedback"], sorted(state["admissible_commands"])

    os.dup2(2, 1)  # the planner's library writes to the standard output
    with tempfile.TemporaryDirectory() as folder:
        for record, path, official in official_games(records, folder):
            ours = envs.ALFWorld()
            load_game(path)  # read the file before the clock starts, as textworld.start has
            for kind in ("plan", "walk"):
                commands = [entry["command"] for entry in record[kind]["steps"][1:]]
                played = {"ours": play_timed(functools.partial(ours.reset, options={"game": path}), ours.step,
                                             lambda answer: (answer[0], answer[-1]["admissible"]), commands),
                          "official": play_timed(official.reset, official.step, official_answer, commands)}
                assert played["ours"][0] == played["official"][0], (path, kind)
                steps += len(commands)
                for name, (_, resetting, stepping) in played.items():
                    seconds[name] = [seconds[name][0] + resetting, seconds[name][1] + stepping]
    os.dup2(stdout, 1)
    return report_beside(seconds, 2 * len(records), steps)


def report_beside(seconds, resets, steps):
    """seconds: {engine: [of all resets, of all steps]} -> what results/alfworld.json holds of the comparison."""
    report = {name: {"reset_s": resetting / resets, "steps_per_s": steps / stepping}
              for name, (resetting, stepping) in seconds.items()}
    ratios = {part: theirs / ours
              for part, theirs, ours in zip(("resets", "steps"), seconds["official"], seconds["ours"])}
    print(f"alfworld {version('alfworld')}: reset in {report['official']['reset_s']:.2f} s, "
          f"{report['official']['steps_per_s']:.1f} steps/s; ours is {ratios['resets']:.0f} and {ratios['steps']:.0f} "
          f"times as fast on the same {steps} steps, with the same texts and commands")
    return {"beside_official": report | {"times_as_fast": ratios, "alfworld": version("alfworld"),
                                         "textworld": version("textworld"), "steps": steps}}


def alfworld_players(weak_limit=30):
    """Win rate and steps of the scripted players on all generated tasks, by split and type, and random play's rates."""
    start = time.perf_counter()
    for split, size in ALFWORLD_SPLITS.items():
        for number in range(size):
            generated.generate_game(split, number)
    generating = (time.perf_counter() - start) / sum(ALFWORLD_SPLITS.values())
    env, rows = envs.ALFWorld(), []
    players = {"expert": lambda info, rng: env.expert(), "random": lambda info, rng: rng.choice(info["admissible"]),
               "weak": lambda info, rng: env.demonstrate(rng, weak=True)[1]}
    for player, choose in players.items():
        limit = weak_limit if player == "weak" else envs.ALFWORLD_MAX_STEPS
        for split, size in ALFWORLD_SPLITS.items():
            lengths = {kind: [] for kind in env.task_types}  # of the episodes won; None for those lost
            for number in range(size):
                rng = random.Random(f"{player} {split} {number}")
                _, info = env.reset(options={"split": split, "task_id": number})
                while not info["won"] and env.steps < limit:
                    *_, info = env.step(choose(info, rng))
                lengths[info["task_type"]].append(env.steps if info["won"] else None)
            for kind, all_lengths in [*lengths.items(), ("all", sum(lengths.values(), []))]:
                won = [length for length in all_lengths if length is not None]
                rows.append({"player": player, "split": split, "task_type": kind, "tasks": len(all_lengths),
                             "limit": limit, "won": len(won) / len(all_lengths),
                             "mean_steps": statistics.mean(won) if won else None, "max_steps": max(won, default=None)})
                if kind == "all":
                    print(f"{player:8} {split:12} won {rows[-1]['won']:.3f} of {size} in {limit} steps")
    return {"generate_s": generating, "players": rows}


def measure_bm25(shown=(3, 10)):
    """Ranks and scores of every generated question over the bundled passages, beside two other BM25s.

    All get the same terms, k1 and b; equal scores go by document number. rank-bm25 has its own idf, so it is given
    Lucene's; its scores are k1 + 1 times as large, which moves no rank.
    """
    import math

    import bm25s
    import numpy as np
    from rank_bm25 import BM25Okapi
    corpus, k1, b = generated.bundled_corpus(), 0.9, 0.4
    terms = [retrieval.search_terms(passage) for passage in corpus.passages]
    sparse = bm25s.BM25(method="lucene", k1=k1, b=b)
    sparse.index(terms, show_progress=False)
    okapi = BM25Okapi(terms, k1=k1, b=b)
    frequency = dict(zip(corpus.postings.terms, np.diff(corpus.postings.starts).tolist(), strict=True))
    okapi.idf = {term: math.log(1 + (len(terms) - df + 0.5) / (df + 0.5)) for term, df in frequency.items()}
    others = {"bm25s": sparse.get_scores, "rank-bm25": lambda query: okapi.get_scores(query) / (k1 + 1)}
    questions = [question.text for split in generated.search_questions().values() for question in split]
    rows = []
    for name, scores_of in others.items():
        error, same = 0.0, dict.fromkeys(shown, 0)
        for question in questions:
            ours = retrieval.bm25_scores(corpus.postings, question).astype(float)
            theirs = np.asarray(scores_of(retrieval.search_terms(question)), dtype=float)
            error = max(error, float(np.abs(ours - theirs).max() / ours.max()))
            for k in shown:
                best = list(retrieval.bm25(corpus.postings, question, k))
                same[k] += best == np.argsort(-theirs, kind="stable")[:len(best)].tolist()
        rows.append({"package": name, "version": version(name), "largest_score_error": error}
                    | {f"same_top{k}": same[k] for k in shown})
        print(f"{name} {version(name)}: {len(questions)} questions, same ranks in "
              + ", ".join(f"{same[k]} (top {k})" for k in shown)
              + f"; scores differ by at most {error:.1e} of the best one")
    return {"passages": len(terms), "questions": len(questions), "k1": k1, "b": b, "idf": "ln(1 + (N - df + 0.5) / "
            "(df + 0.5))", "numpy": version("numpy"), "others": rows}


def measure_liger(n=64, d=128, v=1064):
    """Errors against fp64 of a mean KL and its gradients, bf16, on the same inputs. On a CPU and in the interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("Set TRITON_INTERPRET=1: this comparison runs without a GPU.")
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction
    bench_kernels.mend_interpreter()
    rng = torch.Generator().manual_seed(0)
    student, weight = torch.randn(n, d, generator=rng), torch.randn(v, d, generator=rng) / d**0.5
    teacher = student + torch.randn(n, d, generator=rng) / 4
    student, teacher, weight = (x.to(torch.bfloat16) for x in (student, teacher, weight))
    targets = torch.randint(v, (n,), generator=rng)

    def ours(backend, divergence):
        return lambda s, w: kernels.fused_gap_gate(s, teacher, w, targets, divergence=divergence,
                                                   backend=backend).divergence.mean()

    def liger(jsd_beta):
        return lambda s, w: LigerFusedLinearJSDFunction.apply(s, w, teacher, weight, None, jsd_beta)

    rows = []
    for divergence, jsd_beta in (("fkl", 0.0), ("rkl", 1.0), ("jsd", 0.5)):
        exact = [x.double().requires_grad_() for x in (student, weight)]
        want = bench_kernels.dense_scores(exact[0], teacher.double(), exact[1], targets, 1.0)[divergence].mean()
        want.backward()
        for name, path in (("sdar triton", ours("triton", divergence)), ("sdar torch", ours("torch", divergence)),
                           ("Liger", liger(jsd_beta))):
            inputs = [x.clone().requires_grad_() for x in (student, weight)]
            loss = path(*inputs)
            loss.backward()
            errors = [((x.grad - y.grad).norm() / y.grad.norm()).item() for x, y in zip(inputs, exact)]
            rows.append({"divergence": divergence, "path": name, "loss": abs(loss.item() / want.item() - 1),
                         "d_student": errors[0], "d_weight": errors[1]})
    bench_kernels.print_rows(rows)
    return {"liger-kernel": version("liger-kernel"), "n": n, "d": d, "v": v, "dtype": "bfloat16",
            "relative_errors": rows}


def measure_skill_texts():
    """Success of the untrained bundled model with each text in its own prompt, 128 tasks, T=0.4, 95 % intervals."""
    found = {env: {} for env in envs.ENVIRONMENTS}
    for env, name in itertools.product(found, ("none", "skills", *CONTROLS)):
        with tempfile.TemporaryDirectory() as folder:
            options = {"env": env, "condition": "without" if name == "none" else "with", "threads": 1,
                       "out": f"{folder}/eval.json"} | ({"skills": name} if name in CONTROLS else {})
            summary = evaluate("tiny", options)["summary"][options["condition"]]["all"]
            found[env][name] = {"tasks": summary["n"], "success": summary["success"],
                                "interval": [round(bound, 3) for bound in summary["success_interval"]]}
    return {"success": found}


def main():
    what = {"step": measure_step, "webshop": measure_webshop, "alfworld": measure_alfworld, "bm25": measure_bm25,
            "liger": measure_liger, "skill_texts": measure_skill_texts}
    if len(sys.argv) != 2 or sys.argv[1] not in what:
        sys.exit(f"usage: python -m tools.measure {' | '.join(what)}")
    name = sys.argv[1]
    report = {"command": shlex.join(["python", "-m", "tools.measure", *sys.argv[1:]]), "torch": torch.__version__,
              "python": platform.python_version(), "threads": torch.get_num_threads()}
    (ROOT / "results" / f"{name}.json").write_text(json.dumps(report | what[name](), indent=1) + "\n")


if __name__ == "__main__":
    main()
