"""What this machine can tell about kernels.py, as tables and as results/kernels.json.

    python -m tools.bench_kernels                    every report except `large`, which takes minutes
    python -m tools.bench_kernels cpu accuracy       some of them
    python -m tools.bench_kernels gpu --out gpu.json --rounds 10

cpu       seconds and memory of forward and backward against full logits, fp32
large     memory at sizes whose logits do not fit, bf16
memory    bytes of the buffers, computed
roofline  a prediction for each kernel and architecture: what limits it, and TFLOP/s
accuracy  errors against fp64, of every backend that can run here
compile   registers, spills and matrix instructions of every kernel on five architectures; needs triton but no GPU
gpu       ms, TFLOP/s and memory on this GPU, beside the libraries that are installed

`dense_scores` (reference values from [N, V] logits) and `mend_interpreter` are used by the tests too.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels
from kernels import DIVERGENCES, fused_gap_gate, fused_logprob

try:
    import triton
except ImportError:
    triton = None

REPORTS = ("cpu", "large", "memory", "roofline", "accuracy", "compile", "gpu")  # those that measure memory come first
QWEN = {  # model: (D, V)
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-3B": (2048, 151936),
    "Qwen2.5-7B": (3584, 152064),
}
CASES = {  # name: (N, D, V, whether there is a teacher, divergence), fp32
    "logp + entropy, V=49152": (2048, 576, 49152, False, None),
    "gap_gate, V=49152": (2048, 576, 49152, True, None),
    "gap_gate + rkl, V=49152": (2048, 576, 49152, True, "rkl"),
    "gap_gate, V=1024": (4096, 128, 1024, True, None),
    "gap_gate, V=2048": (4096, 128, 2048, True, None),
}
LARGE = {  # the same in bf16, to measure memory alone: full logits do not fit
    "Qwen2.5-1.5B, N=8192": (8192, 1536, 151936, True, "rkl"),
    "V=32768": (8192, 256, 32768, True, "rkl"),
    "V=262144": (8192, 256, 262144, True, "rkl"),
    "V=32768, N=16384": (16384, 256, 32768, True, "rkl"),
}


# ------------------------------------------------------------------------------------------------------------ accuracy


def mend_interpreter():
    """Triton's interpreter (3.6 to 3.9) multiplies bit patterns of bf16 operands; this makes it widen them first."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def dense_scores(student, teacher, weight, targets, temperature=1.0):
    """All outputs from [N, V] logits, written from the definitions, in the inputs' dtype: {name: [N]}.

    The teacher is a constant: neither it nor the weight gets a gradient from its side.
    """
    s = (student @ weight.t() / temperature).log_softmax(-1)
    q = (teacher.detach() @ weight.detach().t() / temperature).log_softmax(-1)
    p, p_t, m = s.exp(), q.exp(), torch.logaddexp(s, q) - math.log(2)
    pick = targets[:, None]
    rkl, fkl = (p * (s - q)).sum(-1), (p_t * (q - s)).sum(-1)
    jsd = ((p * (s - m)).sum(-1) + (p_t * (q - m)).sum(-1)) / 2
    logp, teacher_logp = s.gather(1, pick)[:, 0], q.gather(1, pick)[:, 0]
    return {"logp": logp, "teacher_logp": teacher_logp, "entropy": -(p * s).sum(-1), "rkl": rkl, "fkl": fkl, "jsd": jsd}


def accuracy_inputs(dtype, n, d, v):
    """-> student, teacher [n, d], weight [v, d], targets [n], upstream gradients [3, n]; on a GPU if there is one."""
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(n, d, generator=rng)
    teacher, weight = student + torch.randn(n, d, generator=rng) / 4, torch.randn(v, d, generator=rng) / d**0.5
    upstream, targets = torch.randn(3, n, generator=rng), torch.randint(v, (n,), generator=rng)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return *(x.to(device, dtype) for x in (student, teacher, weight)), targets.to(device), upstream.to(device)


def accuracy(backend, dtype, n=45, d=72, v=1013):
    """Errors against fp64 on the same inputs: {quantity: largest difference; for gradients relative to their norm}."""
    student, teacher, weight, targets, upstream = accuracy_inputs(dtype, n, d, v)
    errors = {}
    for divergence in (None, *DIVERGENCES):
        exact = [x.double().requires_grad_() for x in (student, weight)]
        want = dense_scores(exact[0], teacher.double(), exact[1], targets, 0.7)
        ours = [x.clone().requires_grad_() for x in (student, weight)]
        out = fused_gap_gate(
            ours[0], teacher, ours[1], targets, temperature=0.7, divergence=divergence, backend=backend
        )
        got = {"logp": out.logp, "teacher_logp": out.teacher_logp, "entropy": out.entropy}
        got |= {divergence: out.divergence} if divergence else {}
        names = ["logp", "entropy"] + [divergence] * (divergence is not None)
        for values in (want, got):
            sum((values[name] * g).sum() for name, g in zip(names, upstream)).backward()
        gap = want["teacher_logp"] - want["logp"]
        found = {name: (got[name] - want[name]).abs().max() for name in got}
        found |= {"gap": (out.gap - gap).abs().max(), "gate": (out.gate - torch.sigmoid(5 * gap)).abs().max()}
        for name, mine, true in zip(("d_student", "d_weight"), ours, exact):
            found[f"{name}, {divergence or 'no divergence'}"] = (mine.grad - true.grad).norm() / true.grad.norm()
        for name, error in found.items():
            errors[name] = max(errors.get(name, 0.0), error.item())
    return errors


def report_accuracy(backend=None):
    """A row per quantity, a column for every backend that can run here and dtype; where there is no GPU, triton runs in
    the interpreter, in a process of its own."""
    on_gpu = torch.cuda.is_available()
    here = [backend] if backend else ["torch"] + ["triton"] * (triton is not None and on_gpu)
    table = {}
    for name in here:
        for dtype in (torch.float32, torch.bfloat16):
            column = f"{name} {str(dtype).removeprefix('torch.')}"
            for quantity, error in accuracy(name, dtype).items():
                table.setdefault(quantity, {"error of": quantity})[column] = error
    if backend is None and triton is not None and not on_gpu:
        command = [sys.executable, "-m", "tools.bench_kernels", "accuracy", "--backend", "triton"]
        done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
                              cwd=Path(__file__).resolve().parents[1])
        if done.returncode:
            raise RuntimeError(f"the interpreter failed: {done.stderr.strip().splitlines()[-1]}")
        for row in json.loads(done.stdout):
            errors = {f"{name}, interpreted": error for name, error in row.items() if name != "error of"}
            table[row["error of"]] |= errors
    return list(table.values())


# ---------------------------------------------------------------------------------------------------- computed reports


def report_memory(n=8192):
    """Bytes besides inputs, results and gradients, in bf16, from the buffers' sizes."""
    rows = []
    for model, (d, v) in QWEN.items():
        student = torch.empty(n, d, dtype=torch.bfloat16, device="meta")
        weight, targets = torch.empty(v, d, dtype=torch.bfloat16, device="meta"), torch.empty(n, device="meta")
        problem = kernels.Problem(student, student, weight, targets, 1.0, "rkl", torch.float32)
        fields, scores = len(kernels.fields_of(problem)), len(kernels.Scores._fields)
        token_chunk, vocab_chunk = kernels.chunk_sizes(problem)
        sums = 4 * n * d + 4 * vocab_chunk * d  # fp32 of d_student, and of one chunk of d_weight
        on_cpu = sums + 4 * n * (2 * fields + scores) + kernels.KEEP_BYTES
        on_cpu += 4 * vocab_chunk * d + 4 * token_chunk * (5 * vocab_chunk + 2 * d)  # operands and logits in fp32
        on_gpu = 4 * n * d + 2 * min(n, kernels.GPU_CHUNK) * min(v, kernels.GPU_CHUNK)  # sums of d_student, and dz
        on_gpu += 4 * n * ((fields + 7) * kernels.MAX_STRIPS + fields + scores)  # 7: of [strips, n] in `merge`, at most
        rows.append({"model": model, "n": n, "d": d, "v": v, "triton": on_gpu, "torch on cpu": on_cpu,
                     "full logits, at least": 2 * 4 * n * v})  # both sides' log-probs in fp32
    return rows


class Machine(NamedTuple):
    """What a GPU can do per second, and at a time. All can read 128 bytes of shared memory per processor and clock."""

    tensor: float  # bf16 FLOP
    l2: float  # bytes
    hbm: float  # bytes
    clocks: float  # of all processors together
    lanes: int  # fp32 operations per processor and clock
    height: int  # rows of hidden states that are multiplied with one read of W's tile from shared memory


# sm_90: an H200, whose tensor and L2 rates were measured there (cuBLAS; tiles of 128 x 64 and 128 x 128). Of the others
# (A100, L40S, B200, MI300X) nothing was: data sheets, and for L2 the share of its nominal rate that the H200 reached.
MACHINES = {
    "sm_80": Machine(312e12, 6.2e12, 2.0e12, 108 * 1.41e9, 128, 32),
    "sm_89": Machine(362e12, 14.7e12, 0.86e12, 142 * 2.52e9, 128, 32),
    "sm_90": Machine(751e12, 9.5e12, 4.8e12, 132 * 1.755e9, 128, 64),
    "sm_100": Machine(2250e12, 11.2e12, 8.0e12, 148 * 1.85e9, 128, 128),
    "gfx942": Machine(1307e12, 22e12, 5.3e12, 304 * 2.1e9, 64, 32),
}
EPILOGUE = {  # kernel: instructions per logit after the products, counted in the code for sm_90; sides it reads
    "student": (10, 1), "teacher": (8, 1), "pair": (11, 2), "mixture": (23, 2), "gradient, none": (13, 1),
    "gradient, rkl": (10, 2), "gradient, fkl": (10, 2), "gradient, jsd": (25, 2),
}


def predict(name, arch, n=8192, d=1536, v=151936, machine=None):
    """Prediction of a kernel's time in bf16: the slowest of what overlaps (tensor units, L2, HBM, shared memory), then
    the epilogue, which does not overlap. -> FLOP per byte from L2, ms of each, what limits it, TFLOP/s."""
    machine, (instructions, sides) = machine or MACHINES[arch], EPILOGUE[name]
    tile = kernels.TILES[TARGETS[arch][4]][sides - 1]
    rows, tiles, flop = sides * tile.rows, n * v / (tile.rows * tile.cols), 2 * n * d * v * sides
    l2 = tiles * 2 * d * (rows + tile.cols)
    # kernels.GROUP = 16 blocks of rows share one pass over W
    hbm = 2 * d * (v * math.ceil(n / tile.rows / 16) + n * sides) + 2 * n * v * ("gradient" in name)
    shared = tiles * 2 * d * (rows + tile.cols * rows / machine.height)
    ms = {"tensor": flop / machine.tensor, "L2": l2 / machine.l2, "HBM": hbm / machine.hbm,
          "shared memory": shared / (128 * machine.clocks)}
    ms = {name: 1e3 * seconds for name, seconds in ms.items()}
    limiter = max(ms, key=ms.get)
    epilogue = 1e3 * n * v * sides * instructions / (machine.lanes * machine.clocks)
    return {"FLOP/B": flop / l2, **ms, "epilogue": epilogue, "limited by": limiter,
            "TFLOP/s": flop / (ms[limiter] + epilogue) / 1e9}


def report_roofline():
    """`predict` of every kernel on every architecture, for Qwen2.5-1.5B's head and 8,192 tokens."""
    return [{"arch": arch, "kernel": name, **predict(name, arch)} for arch in TARGETS for name in EPILOGUE]


# ------------------------------------------------------------------------------------------------------------- compile
# What ptxas or the AMD assembler makes of each kernel that would be chosen, found out without a GPU.

TARGETS = {  # architecture: (triton's backend, name there, warp size, bytes of shared memory per block, key of TILES)
    "sm_80": ("cuda", 80, 32, 163 * 1024, "sm_80"),
    "sm_89": ("cuda", 89, 32, 99 * 1024, "sm_80"),
    "sm_90": ("cuda", 90, 32, 227 * 1024, "sm_90"),
    "sm_100": ("cuda", 100, 32, 227 * 1024, "sm_90"),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024, "gfx942"),
}
TENSOR_CORES = {  # the instruction that shows that matrix units are used
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}


def kernel_variants():
    """name -> (kernel, its compile-time flags): every kernel of products that a call can launch."""
    forward = {name: (kernels._forward_kernel, {"PASS": name}) for name in ("student", "teacher", "pair")}
    gradient = {f"gradient, {name}": (kernels._gradient_kernel, {"DIVERGENCE": name})
                for name in ("none", *DIVERGENCES)}
    return forward | {"mixture": (kernels._mixture_kernel, {})} | gradient


def compile_variant(name, arch, half):
    """-> what the assembler says: registers, spilled and shared bytes, matrix instructions; and what will limit it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, flags = kernel_variants()[name]
    tile = kernels.TILES[TARGETS[arch][4]][2 * (not half) + EPILOGUE[name][1] - 1]
    constants = flags | {"BLOCK_N": tile.rows, "BLOCK_V": tile.cols, "BLOCK_D": tile.depth, "PRECISION": tile.precision}
    types = dict.fromkeys(("student", "teacher", "weight", "out"), "*bf16" if half else "*fp32")
    types |= dict.fromkeys(("partials", "per_token"), "*fp32") | {"targets": "*i64", "scale": "fp32"}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = [i for i, (arg, kind) in enumerate(signature.items())
               if kind.startswith("*") or arg == "D" or arg.startswith("stride")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    backend, chip, warp, limit, _ = TARGETS[arch]
    compiled = triton.compile(source, target=GPUTarget(backend, chip, warp),
                              options={"num_warps": tile.warps, "num_stages": tile.stages})
    read = read_amdgcn if backend == "hip" else read_ptx
    model = predict(name, arch) if half else {}
    return {"kernel": name, "arch": arch, "dtype": "bf16" if half else "fp32", "tile": list(tile[:3]),
            "warps": tile.warps, "stages": tile.stages, "shared": compiled.metadata.shared, "shared_limit": limit,
            **read(compiled.asm, arch), **{key: model[key] for key in ("FLOP/B", "limited by") if model}}


def read_ptx(asm, arch):
    from triton.backends.nvidia.compiler import get_ptxas  # the wheel has two, each for some of the chips

    chip = re.search(r"\.target (\w+)", asm["ptx"])[1]
    assembler = get_ptxas(TARGETS[arch][1]).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(asm["ptx"])
        done = subprocess.run([assembler, "-v", f"--gpu-name={chip}", file, "-o", f"{folder}/out"], check=True,
                              capture_output=True, text=True)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    return {"registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]), "spilled": spilled,
            "matrix_instructions": asm["ptx"].count(TENSOR_CORES[arch])}


def read_amdgcn(asm, arch):
    def number(field):
        return int(re.search(rf"\.{field}:\s+(\d+)", asm["amdgcn"])[1])

    return {"registers": number("vgpr_count"), "spilled": number("vgpr_spill_count"),
            "matrix_instructions": asm["amdgcn"].count(TENSOR_CORES[arch])}


def report_compile():
    """Every kernel that would be chosen, for every architecture that has a tile and both kinds of dtype."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # silences triton 3.9's warning about this very default
    return [compile_variant(name, arch, half)
            for arch in TARGETS for half in (True, False) for name in kernel_variants()]


# ---------------------------------------------------------------------------------------------------- measured reports


def full_logits(student, teacher, weight, targets, divergence):
    """The same values from [N, V] tensors and autograd. Returns (logp, entropy, gate, divergence)."""
    log_probs = F.linear(student, weight).float().log_softmax(-1)
    logp = log_probs.gather(1, targets[:, None]).squeeze(1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1)
    if teacher is None:
        return logp, entropy, None, None
    with torch.no_grad():
        teacher_log_probs = F.linear(teacher, weight).float().log_softmax(-1)
        gap = teacher_log_probs.gather(1, targets[:, None]).squeeze(1) - logp
    div = (probs * (log_probs - teacher_log_probs)).sum(-1) if divergence == "rkl" else None
    return logp, entropy, torch.sigmoid(5.0 * gap), div


def fused(student, teacher, weight, targets, divergence):
    if teacher is None:
        return *fused_logprob(student, weight, targets), None, None
    out = fused_gap_gate(student, teacher, weight, targets, divergence=divergence)
    return out.logp, out.entropy, out.gate, out.divergence


PATHS = {"full": full_logits, "fused": fused}


def bench_inputs(shape, dtype=torch.float32, device="cpu"):
    """-> student, teacher [N, D], weight [V, D], targets [N], divergence."""
    n, d, v, has_teacher, divergence = shape
    rng = torch.Generator(device).manual_seed(0)

    def draw(*size):  # in its own dtype: a wider copy would count as peak memory
        return torch.randn(*size, generator=rng, dtype=dtype, device=device)

    student, teacher = draw(n, d).requires_grad_(), draw(n, d) if has_teacher else None
    weight = draw(v, d).mul_(d**-0.5).requires_grad_()
    return student, teacher, weight, torch.randint(v, (n,), generator=rng, device=device), divergence


def bench_loss(path, inputs):
    """A training loss of what a path gives; it may leave out everything except logp."""
    logp, entropy, gate, div = path(*inputs)
    loss = -(logp if gate is None else gate * logp).mean()
    loss = loss if entropy is None else loss - 0.01 * entropy.mean()
    return loss if div is None else loss + 0.1 * div.mean()


def bench_step(path, inputs):
    """Forward and backward. Returns loss and norms of the gradients, which all paths must share."""
    inputs[0].grad = inputs[2].grad = None
    loss = bench_loss(PATHS[path], inputs)
    loss.backward()
    return loss.item(), inputs[0].grad.norm().item(), inputs[2].grad.norm().item()


def extra_mebibytes(path, case, threads, pipe):
    """Run in a process of its own: a step's peak resident size beyond that with the inputs in place; for LARGE, beyond
    that with the gradients in place, too."""
    import resource  # exists on Unix only

    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss counts bytes there, KiB elsewhere
    torch.set_num_threads(threads)
    inputs = bench_inputs(CASES[case]) if case in CASES else bench_inputs(LARGE[case], torch.bfloat16)
    gradients_too = [torch.ones_like(x) for x in (inputs[0], inputs[2])] if case in LARGE else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del gradients_too
    bench_step(path, inputs)
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit)


def measure_memory(path, case, threads):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=extra_mebibytes, args=(path, case, threads, sender))
    process.start()
    sender.close()
    mebibytes = receiver.recv()
    process.join()
    return mebibytes


def measure_time(case, rounds):
    """Median seconds per path over alternating rounds, after a warm-up in which the paths must agree."""
    inputs = bench_inputs(CASES[case])
    torch.testing.assert_close(bench_step("fused", inputs), bench_step("full", inputs), rtol=1e-4, atol=1e-6)
    seconds = {path: [] for path in PATHS}
    for _ in range(rounds):
        for path in PATHS:
            start = time.perf_counter()
            bench_step(path, inputs)
            seconds[path].append(time.perf_counter() - start)
    return {path: statistics.median(s) for path, s in seconds.items()}


def report_cpu(rounds, threads):
    """Time and memory of CASES against full logits. Memory first, while this process is small: on Linux a child's
    resident peak starts at its parent's."""
    torch.set_num_threads(threads)
    memory = {case: {path: measure_memory(path, case, threads) for path in PATHS} for case in CASES}
    rows = []
    for case in CASES:
        seconds = measure_time(case, rounds)
        rows.append({"case": case, "full s": seconds["full"], "fused s": seconds["fused"],
                     "speed-up": seconds["full"] / seconds["fused"], "full MiB": memory[case]["full"],
                     "fused MiB": memory[case]["fused"], "memory": memory[case]["fused"] / memory[case]["full"]})
    return rows


def report_large(threads):
    """Extra memory in bf16 at sizes whose logits do not fit, besides inputs and gradients: minutes of computing."""
    return [{"case": case, "fused MiB": measure_memory("fused", case, threads)} for case in LARGE]


def gpu_paths():
    """name -> function of bench_inputs; the libraries' paths where they are installed, some of which give NLL alone."""
    def library_nll(student, teacher, weight, targets, divergence):
        options = torch.nn.LinearCrossEntropyOptions()  # in chunks; None would be plain logits
        return -F.linear_cross_entropy(student, weight, targets, reduction="none", options=options), None, None, None

    def liger_nll(student, teacher, weight, targets, divergence):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        return -liger_fused_linear_cross_entropy(student, weight, targets, reduction="none"), None, None, None

    def cce_nll(student, teacher, weight, targets, divergence):
        from cut_cross_entropy import linear_cross_entropy
        return -linear_cross_entropy(student, weight, targets, reduction="none"), None, None, None

    paths = dict(PATHS) | {"torch.compile of full": torch.compile(full_logits)}
    paths |= {"linear_cross_entropy, NLL": library_nll} if hasattr(F, "linear_cross_entropy") else {}
    for module, name, path in (("liger_kernel", "Liger, NLL", liger_nll), ("cut_cross_entropy", "CCE, NLL", cce_nll)):
        paths |= {name: path} if importlib.util.find_spec(module) else {}
    return paths


def measure_gpu(step, rounds):
    """-> {"peak MiB": of memory besides the inputs, "ms"} of a function without arguments."""
    try:
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        return {"peak MiB": peak, "ms": triton.testing.do_bench(step, rep=100 * rounds)}
    except torch.cuda.OutOfMemoryError:
        return {"ms": "out of memory"}


def gpu_steps(inputs):
    """name -> (function to time, the products of [N, D] and [D, V] that its result needs)."""
    student, teacher, weight, targets, _ = inputs

    def step(path, divergence=None):
        student.grad = weight.grad = None
        bench_loss(path, (student, teacher, weight, targets, divergence)).backward()

    steps = {"fused log-prob, no gradient": (torch.no_grad()(lambda: fused_logprob(student, weight, targets)), 1),
             "fused, forward": (lambda: fused(*inputs), 2), "fused with rkl": (lambda: step(fused, "rkl"), 4)}
    for name, path in gpu_paths().items():
        steps[name] = (lambda path=path: step(path)), 3 if name.endswith("NLL") else 4  # two of them backward
    return steps


def report_gpu(rounds, n=8192, model="Qwen2.5-1.5B"):
    """The kernels, and forward and backward by full logits and libraries, on this GPU in bf16: ms, TFLOP/s, share of a
    plain product's rate in the same run, peak memory besides inputs. A path that runs out of memory says so."""
    d, v = QWEN[model]
    inputs = bench_inputs((n, d, v, True, None), torch.bfloat16, "cuda")
    a, b, flop = inputs[0].detach(), inputs[2].detach(), 2 * n * d * v
    product = triton.testing.do_bench(lambda: a @ b.t())
    rows = [{"path": "one product", "ms": product, "TFLOP/s": flop / product / 1e9}]
    for name, (step, products) in gpu_steps(inputs).items():
        row = {"path": name, **measure_gpu(step, rounds)}
        if "peak MiB" in row:
            row["TFLOP/s"] = flop * products / row["ms"] / 1e9
            row["share of a product"] = product * products / row["ms"]
        rows.append(row)
    return [{"device": torch.cuda.get_device_name(), "model": model, "n": n, **row} for row in rows]


# -------------------------------------------------------------------------------------------------------- command line


def print_rows(rows):
    """A table with a column for every key of the rows, in order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def text(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    table = [names, *([text(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.bench_kernels",
                                     description="What this machine can tell about kernels.py.")
    parser.add_argument("reports", nargs="*", help=f"of {', '.join(REPORTS)} (default: all except large)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per path, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", help="accuracy of this backend alone, as JSON on standard output")
    parser.add_argument("--out", default="results/kernels.json")
    args = parser.parse_args(argv)
    unknown = set(args.reports) - set(REPORTS)
    if unknown:
        parser.error(f"there is no report {', '.join(sorted(unknown))}: choose from {', '.join(REPORTS)}")
    args.reports = [name for name in REPORTS if name in args.reports or (not args.reports and name != "large")]
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.backend:
        if kernels.interpreted():
            mend_interpreter()
        print(json.dumps(report_accuracy(args.backend)))
        return
    out = Path(args.out)
    found = json.loads(out.read_text()) if out.exists() else {}
    run = {
        "accuracy": ("largest errors against fp64 on the same inputs", report_accuracy),
        "memory": ("bytes besides inputs, results and gradients, bf16, computed from the buffers", report_memory),
        "roofline": ("PREDICTION in ms and TFLOP/s, bf16; measured on sm_90 are two of its constants", report_roofline),
        "compile": ("compiled without a GPU", report_compile),
        "cpu": ("forward and backward against full logits, fp32", lambda: report_cpu(args.rounds, args.threads)),
        "large": ("memory at sizes whose logits do not fit, bf16", lambda: report_large(args.threads)),
        "gpu": ("forward and backward on this GPU, bf16", lambda: report_gpu(args.rounds)),
    }
    missing = {"compile": "triton is not installed" if triton is None else None,
               "gpu": None if torch.cuda.is_available() else "there is no GPU here"}
    for name in args.reports:
        title, report = run[name]
        print(f"\n{name}: {title}", flush=True)
        if missing.get(name):
            print(f"  not done: {missing[name]}")
            continue
        rows = report()
        print_rows(rows)
        found[name] = {"command": shlex.join(["python", "-m", "tools.bench_kernels", *argv]),
                       "torch": torch.__version__, "triton": None if triton is None else triton.__version__,
                       "machine": platform.machine(), "threads": args.threads, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
