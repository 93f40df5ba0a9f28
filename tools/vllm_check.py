"""vLLM on CPU beside the torch engine, with the bundled model: log-probs, weights handed over, speed, two training
steps. From the repository's root, in an environment with vLLM (docs/gpu.md); writes results/vllm_cpu.json:

    OMP_NUM_THREADS=1 python -m tools.vllm_check
"""

import dataclasses
import json
import platform
import random
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

import sdar
from lib import agreement, vllm_engine
from lib.engine import TorchEngine, respond

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, LENGTH, NEW, ROUNDS = 128, 300, 64, 2
RUN = ["--engine", "vllm", "--steps", "2", "--eval_every", "0"]


def random_prompts(policy, seed):
    """Different prompts, new for each seed, so that no engine has seen them."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(agreement.vocabulary(policy)) for _ in range(LENGTH)) for _ in range(PROMPTS)]


def generate(engine, prompts):
    """-> (responses, their tokens per second, their tokens per second of this process's CPU time)."""
    start, busy = time.perf_counter(), time.process_time()
    responses = respond(engine, prompts, [random.Random(number) for number in range(len(prompts))])
    tokens = sum(len(response.ids) for response in responses)
    return responses, tokens / (time.perf_counter() - start), tokens / (time.process_time() - busy)


def largest_difference(policy, prompts, responses):
    own = agreement.own_logp(policy, prompts, [[response.ids] for response in responses], 1.0)
    return (own - torch.tensor([x for response in responses for x in response.logp])).abs().max().item()


def measure_speed(policy, cfg):
    """Both engines on the same prompts, in turn."""
    found = {"torch": [], "vllm": []}
    for number in range(ROUNDS):
        prompts = random_prompts(policy, number)
        for name, engine in ("torch", TorchEngine(policy, cfg, 1.0)), ("vllm", policy.engine(cfg, 1.0)):
            responses, *rates = generate(engine, prompts)
            found[name].append(dict(zip(("tokens_per_s", "tokens_per_cpu_s"), rates),
                                    largest_difference=largest_difference(policy, prompts, responses)))
            print(name, found[name][-1], flush=True)
    return found


def measure_handover(policy, cfg):
    """Changes every weight by some 5 % -> how far responses to the same prompts are from old and new weights."""
    prompts, noise = random_prompts(policy, 0), torch.Generator().manual_seed(0)
    before, *_ = generate(policy.engine(cfg, 1.0), prompts)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=noise))
    policy.refresh()
    start = time.perf_counter()
    engine = policy.engine(cfg, 1.0)
    seconds = time.perf_counter() - start
    after, *_ = generate(engine, prompts)
    return {"seconds": seconds, "largest_difference_before": largest_difference(policy, prompts, before),
            "largest_difference_after": largest_difference(policy, prompts, after)}


def measure_steps():
    """sdar.py's log of two training steps."""
    with tempfile.TemporaryDirectory() as folder:
        sdar.main([*RUN, "--out", f"{folder}/run"])
        return [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]


def main():
    cfg = sdar.make_config({"model": "tiny", "engine": "vllm", "max_prompt_tokens": LENGTH, "max_response_tokens": NEW})
    policy = dataclasses.replace(sdar.load_policy(cfg), stop_ids=frozenset())  # every response has NEW tokens
    start = time.perf_counter()
    sdar.start_vllm(policy, cfg)
    report = {"command": "OMP_NUM_THREADS=1 python -m tools.vllm_check", "vllm": vllm_engine.installed(),
              "torch": torch.__version__, "transformers": version("transformers"), "python": platform.python_version(),
              "threads": torch.get_num_threads(), "prompts": PROMPTS, "prompt_tokens": LENGTH, "new_tokens": NEW,
              "start_s": time.perf_counter() - start, "engines": measure_speed(policy, cfg),
              "handover": measure_handover(policy, cfg), "run": ["python sdar.py", *RUN], "steps": measure_steps()}
    (ROOT / "results" / "vllm_cpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
