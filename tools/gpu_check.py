"""What a machine with a GPU must show, in minutes and with nothing to download, as results/gpu.json:

    python -m tools.gpu_check                          every check; meant to take less than 6 minutes on an H100
    python -m tools.gpu_check --only table decoding    some of them
    python -m tools.gpu_check --cpu                    the same path with tiny shapes, for machines without a GPU
    TRITON_INTERPRET=1 python -m tools.gpu_check --interpret FILE     the numbers that compiled kernels are held to

Models have random weights, in Qwen2.5-1.5B's shape, and the bundled tokenizer, padded to their vocabulary. Each check
has a time limit; the file is written after each, so that one that fails or hangs takes nothing else with it.
"""

import argparse
import copy
import functools
import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

import envs
import kernels
import sdar
from lib import memory, models
from lib.engine import TorchEngine
from lib.program import UserError, describe, exit_status, write_atomically
from tools import bench_kernels, step_cost
from tools.memory import QWEN, full_rows, measure, qwen

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = ROOT / "results" / "kernels_interpreted.json"


class Machine(NamedTuple):
    """Where the checks run, and how large they are."""

    device: str
    backend: str  # of the kernels
    model: tuple  # arguments of tools.memory.qwen
    head: tuple  # tokens, hidden size, vocabulary of the larger checks of kernels
    batches: tuple  # responses side by side
    prompt: int
    response: int
    dtype: str


GPU = Machine("cuda", "triton", QWEN["Qwen2.5-1.5B"], (512, 1536, 151936), (1, 8, 32, 128), 512, 64, "bfloat16")
CPU = Machine("cpu", "torch", (2, 64, 128, 4, 2, 2304, True), (64, 64, 2304), (1, 4), 64, 4, "bfloat16")


def require(holds, sentence):
    """Raises UserError, which marks a check as failed, unless something holds."""
    if not holds:
        raise UserError(sentence)


# ------------------------------------------------------------------------------------------------------------- kernels

RAGGED = 45, 72, 1013  # tokens, hidden size, vocabulary: no block is full
LIMITS = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-5, 5e-3)}  # of a value; of a gradient, relative to its norm


def check_values(machine):
    """Errors against fp64 on ragged, and on the larger, shapes."""
    rows = []
    for n, d, v in RAGGED, machine.head:
        for dtype, limits in LIMITS.items():
            found = bench_kernels.accuracy(machine.backend, dtype, n, d, v)
            gradient = max(error for name, error in found.items() if name.startswith("d_"))
            value = max(error for name, error in found.items() if not name.startswith("d_"))
            rows.append({"n": n, "d": d, "v": v, "dtype": str(dtype), "value": value, "gradient": gradient})
            require(value <= limits[0] and gradient <= limits[1], f"errors against fp64 are too large: {rows[-1]}")
    return rows


def outputs(backend, divergence, inputs):
    """-> {name: tensor} of everything that the kernels give on inputs of bench_kernels.accuracy_inputs."""
    student, teacher, weight, targets, upstream = inputs
    student, weight = student.detach().requires_grad_(), weight.detach().requires_grad_()
    out = kernels.fused_gap_gate(student, teacher, weight, targets, temperature=0.7, divergence=divergence,
                                 backend=backend)
    found = {name: value for name, value in out._asdict().items() if value is not None}
    trained = ("logp", "entropy", *(["divergence"] if divergence else []))
    sum((found[name] * g).sum() for name, g in zip(trained, upstream)).backward()
    return {name: x.detach() for name, x in found.items()} | {"d_student": student.grad, "d_weight": weight.grad}


def summaries(backend):
    """{case: {name: numbers}}: each value, and of gradients their norm and, if any is wrong, another weighted sum."""
    found = {}
    for dtype in LIMITS:
        inputs = bench_kernels.accuracy_inputs(dtype, *RAGGED)
        for divergence in (None, *kernels.DIVERGENCES):
            case = found.setdefault(f"{dtype} {divergence}", {})
            for name, x in outputs(backend, divergence, inputs).items():
                x = x.cpu().double()
                weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64)
                case[name] = x.tolist() if x.dim() == 1 else [x.norm().item(), (x.flatten() * weights).sum().item()]
    return found


def check_interpreter(machine):
    """Largest difference from the numbers that triton's interpreter gave, which --interpret has stored."""
    stored, largest = json.loads(INTERPRETED.read_text()), {}
    for case, values in summaries(machine.backend).items():
        for name, numbers in values.items():
            limit = 5e-3 * max(map(abs, stored[case][name])) if name.startswith("d_") else 2e-5
            off = max(abs(a - b) for a, b in zip(numbers, stored[case][name], strict=True))
            require(off <= limit, f"{name} of {case} is {off:.1e} from the interpreter's (limit {limit:.1e})")
            largest[name] = max(largest.get(name, 0.0), off)
    return largest


def check_repeats(machine):
    """Two runs must agree in every bit."""
    n, d, v = machine.head
    for dtype in LIMITS:
        inputs = bench_kernels.accuracy_inputs(dtype, n, d, v)
        for divergence in (None, *kernels.DIVERGENCES):
            first, second = (outputs(machine.backend, divergence, inputs) for _ in range(2))
            other = [name for name, x in first.items() if not torch.equal(x, second[name])]
            require(not other, f"two runs in {dtype} with divergence {divergence} differ in {', '.join(other)}")
    return {"n": n, "d": d, "v": v, "cases": 2 * (1 + len(kernels.DIVERGENCES))}


def check_sanitizer(machine):
    """NVIDIA's compute-sanitizer over the ragged case: memory, then races."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if machine.device == "cpu" or not Path(program).exists():
        return {"skipped": "compute-sanitizer is not installed" if machine.device == "cuda" else "there is no GPU"}
    code = ("import torch; from tools.gpu_check import RAGGED, bench_kernels, outputs; "
            "inputs = bench_kernels.accuracy_inputs(torch.bfloat16, *RAGGED); "
            "[outputs('triton', divergence, inputs) for divergence in (None, 'rkl')]")
    found = {}
    for tool in ("memcheck", "racecheck"):
        done = subprocess.run([program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
                              capture_output=True, text=True, cwd=ROOT,
                              env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        said = (done.stdout + done.stderr).strip().splitlines()[-1:]
        require(done.returncode == 0, f"{tool} ends with status {done.returncode}: {' '.join(said)}")
        found[tool] = " ".join(said)
    return found


def check_table(machine):
    """The kernels beside a plain product, full logits, torch.compile and libraries."""
    if machine.device == "cpu":
        return bench_kernels.measure_time("gap_gate, V=1024", 1)
    return bench_kernels.report_gpu(1)


# ----------------------------------------------------------------------------------------------------- model and engine

@functools.cache
def model_of(machine):
    torch.manual_seed(0)
    with torch.device(machine.device):
        return qwen(*machine.model)


@functools.cache
def padded_tokenizer(vocabulary):
    """The bundled tokenizer with words that no text holds, up to `vocabulary` ids."""
    from transformers import AutoTokenizer
    stored = json.loads((models.TINY / "tokenizer.json").read_text())
    used = {token["content"]: token["id"] for token in stored["added_tokens"]} | stored["model"]["vocab"]
    free = set(range(vocabulary)) - {*used.values()}
    stored["model"]["vocab"] = used | {f"\ue000{number}": number for number in free}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(models.TINY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        (Path(folder) / "tokenizer.json").write_text(json.dumps(stored))
        return AutoTokenizer.from_pretrained(folder)


def make_policy(machine, cfg):
    """-> the policy that sdar.py would train; its weights are moved by every check that trains it."""
    return sdar.make_policy(model_of(machine), copy.deepcopy(padded_tokenizer(machine.model[5])), cfg)


def config(machine, **changes):
    small = {"model": "random", "device": machine.device, "dtype": machine.dtype, "eval_every": 0, "prompt": "short",
             "max_prompt_tokens": max(machine.prompt, 512), "max_response_tokens": machine.response}
    return sdar.make_config(small | changes)


def check_training(machine, env):
    """Two steps of sdar.py's algorithm in bf16 -> metrics of the second one."""
    more = {"offload_reference": True, "updates": 2} if env == "alfworld" and machine.device == "cuda" else {}
    cfg = config(machine, env=env, tasks=2, group_size=4, max_turns=2, **more)
    environments = [sdar.make_env(cfg) for _ in range(cfg.tasks * cfg.group_size)]
    skills = sdar.load_skills(cfg, environments[0].task_types)
    policy = make_policy(machine, cfg)
    optimizer = sdar.make_optimizer(policy.model, cfg)
    for step in range(2):
        start = time.perf_counter()
        episodes = sdar.rollout(policy, environments, sdar.step_tasks(cfg, environments[0], step), cfg, seed=step)
        rolled = time.perf_counter()
        rows, _ = sdar.make_rows(policy, cfg, episodes, skills)
        metrics, _ = sdar.train_step(policy, optimizer, rows, cfg, step)
        optimizer.zero_grad(set_to_none=True)
        metrics |= {"rollout s": rolled - start, "update s": time.perf_counter() - rolled, "rows": len(rows)}
    require(all(map(math.isfinite, metrics.values())), f"not all metrics are finite: {metrics}")
    require(metrics["rollout/logp_diff_mean"] < 0.1, "sampler and trainer differ by "
            f"{metrics['rollout/logp_diff_mean']:.2g} nats per token")
    return metrics | {"fused_error": policy.fused_error}


def bare_policy(machine, cfg):
    """A policy none of whose responses ends before the limit."""
    policy = make_policy(machine, cfg)
    policy.stop_ids = frozenset()
    return policy


def synchronised(machine):
    if machine.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def check_decoding(machine):
    """The engine's prefill and decode by number of responses side by side: tokens/s, beside what step_cost says."""
    size, rng, rows = step_cost.size_of(model_of(machine)), random.Random(0), []
    policy = bare_policy(machine, config(machine, kl_coef=0.0))
    for batch in machine.batches:
        cfg = config(machine, rollout_batch=batch)
        engine = TorchEngine(policy, cfg, 1.0)
        for number in range(batch):
            engine.submit(number, tuple(rng.choices(range(machine.model[5]), k=machine.prompt)), random.Random(number))
        stamps, prefilled = [synchronised(machine)], 0
        while len(engine):
            prefilled = len(stamps) if engine.waiting else prefilled
            engine.step()
            stamps.append(synchronised(machine))
        prefill = stamps[prefilled] - stamps[0]  # may take several steps
        decode = (stamps[-1] - stamps[prefilled]) / (len(stamps) - 1 - prefilled)
        length = machine.prompt + machine.response / 2
        expected = step_cost.decode_seconds(size, batch, length, step_cost.Gpu())
        rows.append({"batch": batch, "prefill tokens/s": batch * machine.prompt / prefill, "ms per step": 1e3 * decode,
                     "tokens/s": batch / decode, "predicted ms per step": 1e3 * expected})
    return rows


def check_step(machine):
    """Seconds of the parts of an update on full micro-batches, beside what step_cost says."""
    cfg = config(machine, group_size=2, max_prompt_tokens=2 * machine.prompt)
    policy, size, gpu = bare_policy(machine, cfg), step_cost.size_of(model_of(machine)), step_cost.Gpu()
    rows = full_rows(cfg, machine.model[5], 4)
    plain = sdar.make_config({"model": "random", "method": "grpo", "kl_coef": 0.0} | {
        name: getattr(cfg, name) for name in ("device", "dtype", "max_prompt_tokens", "max_response_tokens")})
    optimizer = sdar.make_optimizer(policy.model, plain)
    steps = {"reference": lambda: sdar.response_logp(policy, policy.ref, rows, cfg),
             "teacher": lambda: sdar.response_logp(policy, policy.fast, rows, cfg, teacher=True),
             "update": lambda: sdar.train_step(policy, optimizer, rows, plain, 0),
             "optimiser": optimizer.step}
    prompts = len({row.prompt_ids for row in rows}) * cfg.max_prompt_tokens
    scored = sum(len(row.response_ids) for row in rows)
    length = cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    forward = step_cost.layers_seconds(size, prompts + scored, length, gpu)
    one_pass = forward + step_cost.head_seconds(size, scored, gpu, 1)
    finish = step_cost.optimizer_seconds(size, gpu)
    expected = {"reference": one_pass, "teacher": one_pass, "optimiser": finish,
                "update": 3 * forward + step_cost.head_seconds(size, scored, gpu, 4) + finish}
    found = []
    for part, run in steps.items():
        seconds = []
        for _ in range(3):  # the first one compiles kernels and makes the optimiser's state
            start = synchronised(machine)
            run()
            seconds.append(synchronised(machine) - start)
        found.append({"part": part, "tokens": prompts + scored, "s": min(seconds[1:]), "predicted s": expected[part]})
    return found


def check_memory(machine):
    """Peak memory by phase, beside what lib.memory says."""
    cfg = config(machine, max_prompt_tokens=machine.prompt, group_size=4, rollout_batch=machine.batches[-2])
    policy = bare_policy(machine, cfg)
    parts = memory.predict(cfg, policy)
    always, rows = sum(parts["always"].values()), []
    for phase, there in measure(policy, cfg).items():
        predicted = always + sum(parts[phase].values())
        rows.append({"phase": phase, "GB": there / 1e9, "predicted GB": predicted / 1e9, "ratio": predicted / there})
    return rows


# --------------------------------------------------------------------------------------------------------- several GPUs

def sum_over_ranks(rank, ranks, device, store):
    """A process of `check_ranks`: sums a tensor over all and checks it."""
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", f"file://{store}", rank=rank,
                                         world_size=ranks)
    x = torch.full((1 << 20,), rank + 1.0, device=f"cuda:{rank}" if device == "cuda" else "cpu")
    torch.distributed.all_reduce(x)
    if (x != ranks * (ranks + 1) / 2).any():
        raise ValueError(f"rank {rank} has a wrong sum")
    torch.distributed.destroy_process_group()


def check_ranks(machine):
    """A sum over all GPUs by NCCL; on CPUs over two processes by gloo."""
    ranks = torch.cuda.device_count() if machine.device == "cuda" else 2
    if ranks == 1:
        return {"skipped": "there is one GPU"}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(sum_over_ranks, (ranks, machine.device, f"{folder}/store"), nprocs=ranks)
    return {"ranks": ranks}


# ------------------------------------------------------------------------------------------------- one after the other

CHECKS = {  # name: (check, seconds that it may take); those of a group share a process
    "kernels": {"values": (check_values, 60), "interpreter": (check_interpreter, 40), "repeats": (check_repeats, 40),
                "table": (check_table, 100)},
    "model": {**{f"training {env}": (functools.partial(check_training, env=env), 60) for env in envs.ENVIRONMENTS},
              "decoding": (check_decoding, 60), "step": (check_step, 60), "memory": (check_memory, 60)},
    "tools": {"sanitizer": (check_sanitizer, 90), "ranks": (check_ranks, 60)},
}


def run_check(check, machine, seconds):
    """-> {"ok", "seconds", and "found" or, of a check that failed or took too long, "error"}."""
    def too_long(*_):
        raise TimeoutError(f"it took more than {seconds} s")

    start, before = time.perf_counter(), signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        result = {"ok": True, "found": check(machine)}
    except Exception as error:  # whatever fails here, the other checks must go on
        result = {"ok": False, "error": describe(error)}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result | {"seconds": time.perf_counter() - start}


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: json.dumps(results, indent=1) + "\n"})


def about(machine, argv):
    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {"command": " ".join(["python", "-m", "tools.gpu_check", *argv]), "python": sys.version.split()[0],
            "device": torch.cuda.get_device_name() if machine.device == "cuda" else "cpu",
            "packages": {name: installed(name) for name in ("torch", "triton", "transformers", "numpy")}}


def run_group(group, only, machine, path):
    """The checks of a group, in this process."""
    for name, (check, seconds) in CHECKS[group].items():
        if only and name.split()[0] not in only:
            continue
        results = json.loads(path.read_text())
        results["checks"][name] = run_check(check, machine, seconds)
        print(f"{name}: {json.dumps(results['checks'][name])[:600]}", flush=True)
        write(path, results)


def run_all(args, machine, path, argv):
    """Each group in a process of its own: after an illegal memory access nothing else runs on a GPU there."""
    write(path, about(machine, argv) | {"checks": {}})
    start = time.perf_counter()
    for group, checks in CHECKS.items():
        chosen = [name for name in checks if not args.only or name.split()[0] in args.only]
        if not chosen:
            continue
        limit = 60 + sum(checks[name][1] for name in chosen)
        try:
            subprocess.run([sys.executable, "-m", "tools.gpu_check", *argv, "--group", group], cwd=ROOT, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"{group}: stopped after {limit} s", flush=True)
        results = json.loads(path.read_text())
        for name in chosen:
            results["checks"].setdefault(name, {"ok": False, "error": "its process ended before it was done"})
        write(path, results | {"seconds": time.perf_counter() - start})
    failed = [name for name, result in json.loads(path.read_text())["checks"].items() if not result["ok"]]
    require(not failed, f"These checks failed: {', '.join(failed)}; {path} says why.")


def command(argv):
    names = [name.split()[0] for checks in CHECKS.values() for name in checks]
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--only", nargs="+", choices=sorted(set(names)), help="these checks")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu.json")
    parser.add_argument("--interpret", type=Path, help="write the interpreter's numbers to a file, and nothing else")
    parser.add_argument("--group", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.interpret:
        require(kernels.interpreted(), "--interpret needs TRITON_INTERPRET=1 in the environment, before Python starts.")
        bench_kernels.mend_interpreter()
        return write(args.interpret, summaries("triton"))
    require(args.cpu or torch.cuda.is_available(), "There is no GPU here: --cpu runs the same checks at tiny sizes.")
    machine, path = CPU if args.cpu else GPU, args.out.absolute()
    run_group(args.group, args.only, machine, path) if args.group else run_all(args, machine, path, argv)


def main(argv=None):
    return exit_status(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
