"""Fused LM-head scores for SDAR: log-probability, entropy, teacher gap, gate and divergence without [N, V] logits.

    fused_logprob(hidden, weight, targets)           -> (logp, entropy)
    fused_gap_gate(student, teacher, weight, targets) -> GapGate(logp, teacher_logp, entropy, gap, gate, divergence)

This file needs torch alone and can be copied into any trainer. N tokens, D hidden size, V vocabulary, t temperature.

Forward. Student and teacher share the head W. Per token, with target y and log-probabilities s, q over the vocabulary:

    s = log_softmax(W h / t)    q = log_softmax(W h_T / t)    p = e^s    p_T = e^q    m = log((p + p_T) / 2)
    logp = s_y                  teacher_logp = q_y            entropy = -sum p s
    gap = q_y - s_y             gate = sigmoid(beta gap), or see `gate_values`
    rkl = sum p (s - q)         fkl = sum p_T (q - s)         jsd = (sum p (s - m) + sum p_T (q - m)) / 2

Backward. Teacher, gap and gate are constants. For upstream gradients g_* of the other outputs, the logits' gradient has
one row-coefficient form, each term of which sums to zero over the vocabulary:

    dz = g_logp (onehot_y - p)  -  g_ent p (s + entropy)  +  g_div dD
    dD = p (s - q - rkl)   |   p - p_T   |   p (s - m - sum p (s - m)) / 2              for rkl | fkl | jsd
    dh = dz W / t               dW = dz^T h / t                                         from the student's side alone

Memory. Tokens pass in chunks: all V columns of `chunk_rows` tokens at a time, in buffers that the chunks share, so that
the workspace does not grow with N. The backward pass computes a chunk's logits again, except those of the first chunks,
which the forward pass keeps while they fit in `KEEP_BYTES`: small problems keep everything and compute nothing twice,
large ones are bounded. On top come the gradients: dW [V, D] and dh [N, D] are summed in fp32.
Ignored tokens are never touched: they cost nothing, give zeros, and neither their hidden states nor their upstream
gradients, which may be NaN, reach any result.

Limits. Arithmetic is fp32 (fp64 where student or weight is fp64). On CUDA, student and weight of one half-precision
dtype are multiplied as they are, with fp32 results, and dz is rounded to that dtype once; fp16 dz may underflow without
loss scaling. Elsewhere a half-precision head is copied to fp32 for each pass. Only first derivatives.
"""

import argparse
import json
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the target that torch.nn.functional.cross_entropy ignores
GATES = ("gap", "entropy", "soft_or", "none")
DIVERGENCES = ("rkl", "fkl", "jsd")
KEEP_BYTES = 5 * 2**26  # 320 MiB of log-probabilities may be kept from forward to backward


class GapGate(NamedTuple):
    """What SDAR needs of each token, all [N]; zeros where the target is ignored."""

    logp: Tensor  # student's log-probability of the target; differentiable
    teacher_logp: Tensor  # teacher's; constant
    entropy: Tensor  # of the student's distribution, in nats; differentiable
    gap: Tensor  # teacher_logp - logp; constant
    gate: Tensor  # see `gate_values`; constant
    divergence: Optional[Tensor]  # between the two distributions; differentiable; None unless asked for


def fused_logprob(hidden, weight, targets, *, temperature=1.0, backend="auto"):
    """Log-probability of each target, and entropy, of softmax(hidden @ weight.T / temperature).

    hidden [N, D] and weight [V, D]: floating point, any strides. targets [N]: int64 in 0..V-1, or -100 = ignore.
    Returns (logp, entropy), each [N] in fp32 (fp64 where an input is), differentiable w.r.t. hidden and weight.
    Raises ValueError or TypeError on inputs that don't fit together.
    """
    check_inputs({"hidden": hidden}, weight, targets, temperature)
    logp, entropy, _, _ = BACKENDS[choose_backend(backend)](hidden, None, weight, targets, float(temperature), None)
    return logp, entropy


def fused_gap_gate(
    student, teacher, weight, targets, *, beta=5.0, gate="gap", temperature=1.0, divergence=None, backend="auto"
):
    """Student's and teacher's view of the same targets under one head: SDAR's equation (4) and its relatives.

    student, teacher [N, D]: hidden states without and with the privileged context; dtypes may differ. weight, targets,
    temperature: as in `fused_logprob`. gate: "gap" | "entropy" | "soft_or" | "none". divergence: None, "rkl" =
    KL(student || teacher), "fkl" = KL(teacher || student) or "jsd" = Jensen-Shannon, in nats.
    Returns GapGate, fields [N] in fp32 (fp64 where student or weight is). logp, entropy and divergence are
    differentiable w.r.t. student and weight; teacher gets no gradient, and weight none through the teacher.
    Raises ValueError or TypeError on inputs that don't fit together.
    """
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} is unknown; choose one of {', '.join(GATES)}")
    if divergence is not None and divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is unknown; choose None or one of {', '.join(DIVERGENCES)}")
    check_inputs({"student": student, "teacher": teacher}, weight, targets, temperature)
    run = BACKENDS[choose_backend(backend)]
    logp, entropy, teacher_logp, div = run(student, teacher.detach(), weight, targets, float(temperature), divergence)
    gap = teacher_logp - logp.detach()
    gates = gate_values(gate, gap, entropy.detach(), beta).masked_fill(targets == IGNORE, 0)
    return GapGate(logp, teacher_logp, entropy, gap, gates, div)


def gate_values(gate, gap, entropy, beta):
    """Trust the teacher where it prefers the token, where the student is unsure, where either holds, or always."""
    if gate == "gap":
        return torch.sigmoid(beta * gap)
    if gate == "entropy":
        return torch.sigmoid(beta * entropy)
    if gate == "soft_or":
        return torch.sigmoid(beta * (1 - (1 - entropy) * (1 - gap)))
    return torch.ones_like(gap)


def check_inputs(hiddens, weight, targets, temperature):
    """One sentence for whatever does not fit. `hiddens`: argument name -> tensor."""
    for name, x in {**hiddens, "weight": weight}.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:
            raise TypeError(f"{name} must be a 2-D floating-point tensor, got {describe(x)}")
        if x.device != weight.device:
            raise ValueError(f"{name} is on {x.device} but weight is on {weight.device}; move them to one device")
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() != 1:
        raise TypeError(f"targets must be a 1-D int64 tensor, got {describe(targets)}")
    if targets.device != weight.device:
        raise ValueError(f"targets is on {targets.device} but weight is on {weight.device}; move them to one device")
    if len(weight) == 0:
        raise ValueError(f"weight needs a row per vocabulary entry, got shape {tuple(weight.shape)}")
    for name, x in hiddens.items():
        if x.shape != (len(targets), weight.shape[1]):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but targets of length {len(targets)} and weight of shape "
                f"{tuple(weight.shape)} ask for {(len(targets), weight.shape[1])}"
            )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= len(weight)))]
    if len(wrong):
        raise ValueError(f"targets must be {IGNORE} or lie in 0..{len(weight) - 1}, got {wrong[:5].tolist()}")


def describe(x):
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def choose_backend(backend):
    if backend == "triton":
        raise ValueError('this build has the torch backend only; use backend="torch" or "auto" instead of "triton"')
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    return "torch" if backend == "auto" else backend


# ---------------------------------------------------------------------------------------------------- torch backend


def torch_backend(student, teacher, weight, targets, temperature, divergence):
    """-> logp, entropy, teacher_logp, divergence; the last two None where there is no teacher or no divergence."""
    keep = torch.is_grad_enabled() and (student.requires_grad or weight.requires_grad)
    return TorchScores.apply(student, weight, teacher, targets, 1.0 / temperature, divergence, keep)


def chunk_rows(vocab, device):
    """Tokens per chunk: few enough for cache and memory, yet enough for a matrix product to run at full speed."""
    if device.type == "cuda":
        return max(1, min(4096, 2**27 // vocab))
    return max(1, min(max(256, 2**20 // vocab), 2**25 // vocab))


class Workspace:
    """The head in the dtype that is multiplied, and [chunk, V] buffers that all chunks share."""

    def __init__(self, student, weight, num_tokens):
        self.dtype = torch.promote_types(torch.promote_types(student.dtype, weight.dtype), torch.float32)
        half = student.dtype == weight.dtype and student.dtype in (torch.float16, torch.bfloat16)
        self.operand = student.dtype if half and weight.is_cuda else self.dtype  # CPUs multiply halves slower than fp32
        self.weight = weight.to(self.operand)
        self.chunk = max(1, min(chunk_rows(len(weight), weight.device), num_tokens))
        self.buffers = {}

    def buffer(self, name, rows):
        if name not in self.buffers:
            self.buffers[name] = self.weight.new_empty(self.chunk, len(self.weight), dtype=self.dtype)
        return self.buffers[name][:rows]

    def log_probs(self, hidden, scale, out):
        """log_softmax(scale * hidden W^T) into `out`; overwrites the buffer "p"."""
        logits = self.matmul(hidden, self.weight.t(), scale, self.buffer("p", len(hidden)), beta=0)
        return torch.log_softmax(logits, -1, out=out)

    def kept_or_log_probs(self, kept, at, hidden, scale, name):
        """Rows `at` of what the forward pass kept, or the same computed again into the buffer `name`."""
        return kept[at] if at.stop <= len(kept) else self.log_probs(hidden, scale, self.buffer(name, len(hidden)))

    def matmul(self, a, b, scale, out, beta):
        """out = beta * out + scale * a b, summed in out's dtype whatever the dtype of the operands."""
        out_dtype = {} if self.operand == self.dtype else {"out_dtype": self.dtype}
        return torch.addmm(out, a.to(self.operand), b.to(self.operand), beta=beta, alpha=scale, out=out, **out_dtype)


def chunks(rows, size):
    """Yields (positions among the rows, the rows themselves)."""
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield slice(start, start + len(chunk)), chunk


def rows_to_keep(num_rows, row_bytes, chunk):
    """How many rows' log-probabilities go from forward to backward: all if they fit, else whole chunks."""
    fit = KEEP_BYTES // row_bytes
    return num_rows if num_rows <= fit else fit // chunk * chunk


class TorchScores(torch.autograd.Function):
    """The formulas at the top of this file, chunk by chunk."""

    @staticmethod
    def forward(ctx, student, weight, teacher, targets, scale, divergence, keep):
        rows = (targets != IGNORE).nonzero().squeeze(1)
        work = Workspace(student, weight, len(rows))
        logp, entropy, teacher_logp, div = (weight.new_zeros(len(targets), dtype=work.dtype) for _ in range(4))
        row_bytes = len(weight) * work.dtype.itemsize * (2 if divergence else 1)
        kept = rows_to_keep(len(rows), row_bytes, work.chunk) if keep else 0
        kept_s = logp.new_empty(kept, len(weight))
        kept_q = logp.new_empty(kept if divergence else 0, len(weight))
        for at, chunk in chunks(rows, work.chunk):
            y, n = targets[chunk, None], len(chunk)
            if teacher is not None:
                q = kept_q[at] if at.stop <= len(kept_q) else work.buffer("q" if divergence else "s", n)
                work.log_probs(teacher[chunk], scale, out=q)
                teacher_logp[chunk] = q.gather(1, y).squeeze(1)
            s = kept_s[at] if at.stop <= kept else work.buffer("s", n)
            work.log_probs(student[chunk], scale, out=s)
            logp[chunk] = s.gather(1, y).squeeze(1)
            p = torch.exp(s, out=work.buffer("p", n))
            if divergence:
                div[chunk] = divergence_values(divergence, p, s, q, out=work.buffer("q", n))
            entropy[chunk] = -p.mul_(s).sum(-1)
        ctx.save_for_backward(student, weight, teacher, targets, rows, entropy, div, kept_s, kept_q)
        ctx.scale, ctx.divergence = scale, divergence
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(teacher_logp)
        return logp, entropy, teacher_logp if teacher is not None else None, div if divergence else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy, _, g_div):
        student, weight, teacher, targets, rows, entropy, div, kept_s, kept_q = ctx.saved_tensors
        work = Workspace(student, weight, len(rows))
        d_student = entropy.new_zeros(student.shape) if ctx.needs_input_grad[0] else None
        d_weight = entropy.new_zeros(weight.shape) if ctx.needs_input_grad[1] else None
        kind = None if g_div is None else ctx.divergence
        for at, chunk in chunks(rows, work.chunk):
            h, q = student[chunk], None
            if kind:
                q = work.kept_or_log_probs(kept_q, at, teacher[chunk], ctx.scale, "q")
            s = work.kept_or_log_probs(kept_s, at, h, ctx.scale, "s")
            columns = [x if x is None else x[chunk, None] for x in (targets, entropy, div, g_logp, g_entropy, g_div)]
            dz = logit_gradient(kind, s, q, *columns, work)
            if d_student is not None:
                d_student[chunk] = work.matmul(dz, work.weight, ctx.scale, d_student.new_empty(h.shape), beta=0)
            if d_weight is not None:
                work.matmul(dz.t(), h, ctx.scale, d_weight, beta=1)
        cast = [g if g is None else g.to(x.dtype) for g, x in ((d_student, student), (d_weight, weight))]
        return *cast, None, None, None, None, None


def divergence_values(kind, p, s, q, out):
    """Per-row divergence between p = e^s and e^q, all [n, V]. `out` is scratch; it may be q's own memory."""
    if kind == "rkl":
        return torch.sub(s, q, out=out).mul_(p).sum(-1)
    p_teacher = q.exp()
    if kind == "fkl":
        return torch.sub(q, s, out=out).mul_(p_teacher).sum(-1)
    m = torch.logaddexp(s, q).sub_(math.log(2))
    student_half = (s - m).mul_(p).sum(-1)
    return (student_half + torch.sub(q, m, out=out).mul_(p_teacher).sum(-1)) / 2


def logit_gradient(kind, s, q, y, entropy, div, g_logp, g_entropy, g_div, work):
    """dz [n, V] from s, q [n, V] and columns [n, 1]; kind and g_div are None together. Overwrites buffers "p", "s"."""
    p = torch.exp(s, out=work.buffer("p", len(s)))
    a, b = torch.zeros_like(entropy), None
    if g_logp is not None:
        a = a - g_logp
    if g_entropy is not None:
        a, b = a - g_entropy * entropy, -g_entropy
    if kind == "rkl":
        a, b = a - g_div * div, g_div if b is None else g_div + b
    if kind == "fkl":
        a = a + g_div
    if kind == "jsd":
        log_ratio = s - torch.logaddexp(s, q)  # s - m, but for a constant that centring removes
        a = torch.addcmul(a, g_div, log_ratio - (p * log_ratio).sum(-1, keepdim=True), value=0.5)
    if b is not None:
        a = torch.addcmul(a, b, s, out=work.buffer("s", len(s)))
    if kind == "rkl":
        a.addcmul_(g_div, q, value=-1)
    dz = p.mul_(a)
    if kind == "fkl":
        dz.addcmul_(g_div, q.exp(), value=-1)
    return dz if g_logp is None else dz.scatter_add_(1, y, g_logp)


BACKENDS = {"torch": torch_backend}


# ------------------------------------------------------------------------------------------------------- benchmark
# python kernels.py: time and extra memory of these functions against full logits, on CPU, as a table and as JSON.

CASES = {  # name: (N, D, V, has a teacher, divergence)
    "logp + entropy, V=49152": (2048, 576, 49152, False, None),
    "gap_gate, V=49152": (2048, 576, 49152, True, None),
    "gap_gate + rkl, V=49152": (2048, 576, 49152, True, "rkl"),
    "gap_gate, V=1024": (4096, 128, 1024, True, None),
    "gap_gate, V=2048": (4096, 128, 2048, True, None),
}


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


def bench_inputs(case):
    n, d, v, has_teacher, divergence = CASES[case]
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(n, d, generator=rng).requires_grad_()
    teacher = torch.randn(n, d, generator=rng) if has_teacher else None
    weight = (torch.randn(v, d, generator=rng) / d**0.5).requires_grad_()
    return student, teacher, weight, torch.randint(v, (n,), generator=rng), divergence


def bench_step(path, inputs):
    """Forward and backward of a training loss. Returns loss and norms of the gradients, which all paths must share."""
    inputs[0].grad = inputs[2].grad = None
    logp, entropy, gate, div = PATHS[path](*inputs)
    loss = -(logp if gate is None else gate * logp).mean() - 0.01 * entropy.mean()
    loss = loss if div is None else loss + 0.1 * div.mean()
    loss.backward()
    return loss.item(), inputs[0].grad.norm().item(), inputs[2].grad.norm().item()


def extra_mebibytes(path, case, threads, pipe):
    """Runs in a process of its own: the peak resident size of one step, over what it was with the inputs built."""
    import resource  # Unix only, which the functions above are not

    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss counts bytes there, KiB elsewhere
    torch.set_num_threads(threads)
    inputs = bench_inputs(case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
    """Median seconds per path over interleaved rounds, after a warm-up round in which both paths must agree."""
    inputs = bench_inputs(case)
    torch.testing.assert_close(bench_step("fused", inputs), bench_step("full", inputs), rtol=1e-4, atol=1e-6)
    seconds = {path: [] for path in PATHS}
    for _ in range(rounds):
        for path in PATHS:
            start = time.perf_counter()
            bench_step(path, inputs)
            seconds[path].append(time.perf_counter() - start)
    return {path: statistics.median(s) for path, s in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description="Time and extra memory against full logits, on CPU.")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per path, of which the median is reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default="", help="only the cases whose name contains this")
    parser.add_argument("--out", default="results/kernels_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = ("full s", "fused s", "speedup", "full MiB", "fused", "memory")
    print(f"{'forward + backward, fp32':26}" + "".join(f"{name:>10}" for name in columns))
    cases = [name for name in CASES if args.cases in name]
    # Memory first, while this process is small: a child's peak counts from its parent's size at the fork.
    memory = {case: {path: measure_memory(path, case, args.threads) for path in PATHS} for case in cases}
    rows = []
    for case in cases:
        (full_s, fused_s), (full_mb, fused_mb) = measure_time(case, args.rounds).values(), memory[case].values()
        print(f"{case:26}{full_s:10.3f}{fused_s:10.3f}{full_s / fused_s:9.2f}x", end="")
        print(f"{full_mb:10.0f}{fused_mb:10.0f}{fused_mb / full_mb:10.2f}", flush=True)
        row = dict(full_s=full_s, fused_s=fused_s, full_extra_mib=full_mb, fused_extra_mib=fused_mb)
        rows.append({"case": case} | {name: round(value, 4) for name, value in row.items()})
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "torch": torch.__version__}
    report |= {"machine": platform.machine(), "threads": args.threads, "rounds": args.rounds, "rows": rows}
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
