"""What a run's memory is, beside what lib/memory.py says of it. Each writes its part of results/memory.json:

    python -m tools.memory check [MODEL ..]    predicted and allocated bytes by phase, of MODELS; minutes
    python -m tools.memory flat [--steps 150]  this process's memory after step 20 and after the last of short steps
    python -m tools.memory table               what fits on GPUs of 24, 48 and 80 GB, predicted

`check` counts what torch's allocator hands out, to the byte, in training steps that are as large as the settings allow:
full micro-batches of siblings, prompts and responses at their limits. The models have random weights.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import json
import os
import random
import shlex
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

import sdar
from lib import memory, models, runs
from lib.models import shortened
from lib.program import UserError, exit_status, write_atomically
from tools.bench_kernels import print_rows

OUT = Path(__file__).resolve().parent.parent / "results" / "memory.json"
QWEN = {  # layers, hidden size, width of the feed-forward part, heads, heads of keys, vocabulary, whether tied
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 151936, True),
    "Qwen2.5-3B": (36, 2048, 11008, 16, 2, 151936, True),
    "Qwen2.5-7B": (28, 3584, 18944, 28, 4, 152064, False),
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, 151936, True),  # without its norms of queries and keys
}


def qwen(layers, hidden, wide, heads, key_heads, vocab, tied):
    """A Qwen2 with random weights, on torch's default device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied))


def smollm2():
    """A Llama of SmolLM2-135M's shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True))


# --------------------------------------------------------------------------------------------------- what is allocated

@contextlib.contextmanager
def allocations(device):
    """Yields a namespace whose `peak` is, after the block, the most bytes of tensors that were there at once within it.

    On a CPU: those alive before, and from then on every allocation and release that torch's profiler records.
    """
    found = types.SimpleNamespace()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.peak = torch.cuda.max_memory_allocated(device)
        return
    gc.collect()
    alive = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects()
             if issubclass(type(x), torch.Tensor)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield found
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    found.peak = now = sum(alive.values())
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        found.peak = max(found.peak, now)


def full_rows(cfg, vocab, micro_batches):
    """Rows of micro-batches that are full, of groups of siblings whose prompts and responses are at their limits."""
    rng = random.Random(0)
    ids = lambda count: tuple(rng.choices(range(vocab), k=count))
    rows, prompt, response = [], cfg.max_prompt_tokens, cfg.max_response_tokens
    for _ in range(max(1, cfg.micro_tokens // (prompt + cfg.group_size * response)) * micro_batches):
        shared = ids(prompt)
        for _ in range(cfg.group_size):
            rows.append(sdar.Row(shared, shared, ids(response), rng.gauss(0, 1), (-1.0,) * response))
    return rows


def measure(policy, cfg):
    """-> {phase: peak bytes} of sampling, of scoring by the reference, and of an update after one that has made the
    optimiser's state."""
    vocab, optimizer = memory.shape_of(policy.model).vocab, sdar.make_optimizer(policy.model, cfg)
    small = dataclasses.replace(cfg, micro_tokens=1)
    sdar.train_step(policy, optimizer, full_rows(small, vocab, 1)[:1], small, 0)
    optimizer.zero_grad(set_to_none=True)
    rows, found = full_rows(cfg, vocab, 2), {}
    with allocations(policy.device) as found["scoring"]:
        sdar.response_logp(policy, policy.ref, rows, cfg)
    ids = functools.partial(random.Random(0).choices, range(vocab), k=cfg.max_prompt_tokens)
    prompts = [tuple(ids()) for _ in range(2 * cfg.rollout_batch)]  # the second half joins beside a cache that is there
    with allocations(policy.device) as found["sampling"]:
        sdar.sample(policy, prompts, cfg, 1.0, [random.Random(number) for number in range(len(prompts))])
    with allocations(policy.device) as found["update"]:
        sdar.train_step(policy, optimizer, rows, cfg, 1)
    return {phase: one.peak for phase, one in found.items()}


def make_policy(model, cfg, device="cpu"):
    """-> sdar.Policy without tokenizer, with all that sdar.make_policy makes; none of its responses ends early."""
    if cfg.recompute:
        models.recompute_activations(model)
    policy = sdar.Policy(model.to(device).eval(), None, frozenset(), torch.device(device), cfg.dtype == "bfloat16")
    policy.rounded = models.fast_copy(model, alone=False) if policy.autocast else None
    policy.ref = models.fast_copy(model) if policy.autocast else copy.deepcopy(model).requires_grad_(False)
    return policy


def config(**changes):
    """Settings of a run on a real model that plays WebShop, evaluations left out."""
    return sdar.make_config({"model": "random", "eval_every": 0} | changes)


SMALL = {"max_prompt_tokens": 256, "max_response_tokens": 32, "micro_tokens": 1024, "rollout_batch": 8}
MODELS = {  # what `check` measures: name: (model, settings)
    "bundled": (lambda: models.read_model("tiny")[0], SMALL | {"micro_tokens": 2048}),
    "bundled, bf16": (lambda: models.read_model("tiny")[0], SMALL | {"dtype": "bfloat16"}),
    "Qwen2 of 34M": (lambda: qwen(12, 384, 1536, 6, 2, 16384, True), SMALL),
    "Qwen2 of 34M, recomputing": (lambda: qwen(12, 384, 1536, 6, 2, 16384, True), SMALL | {"recompute": True}),
    "SmolLM2-135M": (smollm2, SMALL | {"micro_tokens": 512}),
}


def check(names):
    rows = []
    for name in names or MODELS:
        make, settings = MODELS[name]
        torch.manual_seed(0)
        cfg = config(**settings)
        policy = make_policy(make(), cfg)
        parts = memory.predict(cfg, policy)
        always = sum(parts["always"].values())
        for phase, bytes_there in measure(policy, cfg).items():
            predicted = always + sum(parts[phase].values())
            rows.append({"model": name, "phase": phase, "predicted MB": predicted / 1e6, "measured MB":
                         bytes_there / 1e6, "predicted / measured": predicted / bytes_there})
        peak, measured = memory.peak(parts) / 1e6, max(row["measured MB"] for row in rows if row["model"] == name)
        rows.append({"model": name, "phase": "peak", "predicted MB": peak, "measured MB": measured,
                     "predicted / measured": peak / measured})
        print_rows(rows[-4:])
    return rows


# ----------------------------------------------------------------------------------------------------- over many steps

def resident_bytes():
    """Bytes of this process in memory once freed memory is returned, which glibc puts off: RSS alone varies by 10 %."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flat(steps, early=20):
    """Memory of this process after step `early` and after the last one of a run of short steps of the bundled model."""
    seen, finish = {}, runs.Run.finish_step

    def finish_and_note(run, metrics, line):
        finish(run, metrics, line)
        if run.step % early == 0 or run.step == steps:
            seen[run.step] = resident_bytes() / 1e6

    flags = f"--steps {steps} --tasks 2 --group_size 2 --max_turns 3 --eval_every 0 --save_every 50 --threads 1"
    with tempfile.TemporaryDirectory() as folder, patch.object(runs.Run, "finish_step", finish_and_note):
        if sdar.main([*flags.split(), "--out", f"{folder}/run"]):
            raise UserError("The run did not end well.")
    return [{f"MB after step {step}": size for step, size in seen.items()}
            | {"last / early": seen[steps] / seen[early], "flags": flags}]


# ------------------------------------------------------------------------------------------------------------ what fits

WAYS = {  # how a model may be trained: (settings, rank of a LoRA adapter, 0 for all weights)
    "all weights": ({}, 0),
    "recompute": ({"recompute": True}, 0),
    "recompute, offload_reference": ({"recompute": True, "offload_reference": True}, 0),
    "LoRA of rank 64, recompute": ({"recompute": True}, 64),
}
CARDS = {"24 GB": 24 * 2**30, "48 GB": 48 * 2**30, "80 GB": 80 * 2**30}
BATCHES = (128, 64, 32, 16, 8)  # values of --rollout_batch that are tried


def on_paper(name, rank):
    """What memory.predict reads of a policy on a GPU, its weights without memory. rank: of a LoRA adapter on every
    linear layer except the head; the base is then frozen, its matrices bf16, and its own reference."""
    with torch.device("meta"):
        model = qwen(*QWEN[name])
        fast, ref = models.fast_copy(model, alone=False), models.fast_copy(model)
        if rank:
            sizes = [sum(matrix.shape) for matrix in models.matrices(model)[:-1]]
            ref.adapter = torch.nn.Parameter(torch.empty(rank * sum(sizes)))
            model, fast, ref = ref, ref, None
    return types.SimpleNamespace(model=model, fast=fast, ref=ref, ema=None, vllm=None, autocast=True,
                                 device=torch.device("cuda"))


def table():
    """A row per model and way: bytes by phase at the paper's settings, and the largest of BATCHES with which the run
    fits on each card. None of it is measured."""
    rows = []
    for name in QWEN:
        for way, (settings, rank) in WAYS.items():
            policy = on_paper(name, rank)
            fits = {}
            for batch in BATCHES:
                parts = memory.predict(dataclasses.replace(config(), rollout_batch=batch, **settings), policy)
                for card, size in CARDS.items():
                    if memory.peak(parts) <= memory.USABLE * size:
                        fits.setdefault(card, batch)
                if batch == BATCHES[0]:
                    phases = {phase: sum(some.values()) / 1e9 for phase, some in parts.items()}
            rows.append({"model": name, "way": way, **phases, **{card: fits.get(card, "no") for card in CARDS}})
    return rows


# ----------------------------------------------------------------------------------------------------- the command line

def command(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.memory", description=__doc__.split("\n")[0])
    parser.add_argument("report", choices=("check", "flat", "table"))
    parser.add_argument("models", nargs="*", help=f"of check: {', '.join(MODELS)} (default: all)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if unknown := set(args.models) - set(MODELS):
        raise UserError(f"There is no model {shortened(unknown)}: choose from {', '.join(MODELS)}.")
    rows = {"check": lambda: check(args.models), "flat": lambda: flat(args.steps), "table": table}[args.report]()
    if args.report != "check":  # which prints as it goes
        print_rows(rows)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found[args.report] = {"command": shlex.join(["python", "-m", "tools.memory", *argv]), "torch": torch.__version__,
                          "transformers": version("transformers"), "rows": rows}
    write_atomically({args.out: json.dumps(found, indent=1) + "\n"})


def main(argv=None):
    return exit_status(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
