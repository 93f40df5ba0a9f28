"""Fused LM-head scores for SDAR: log-probability, entropy, teacher gap, gate and divergence without [N, V] logits.

    fused_logprob(hidden, weight, targets)           -> (logp, entropy)
    fused_gap_gate(student, teacher, weight, targets) -> GapGate(logp, teacher_logp, entropy, gap, gate, divergence)

This file needs torch alone, uses triton where it is installed and the tensors are on a GPU, and can be copied into any
trainer. N tokens, D hidden size, V vocabulary, t temperature.

Forward. Student and teacher share the head W. Per token, with target y and logits z = W h / t, zt = W h_T / t:

    s = log_softmax(z)          q = log_softmax(zt)           p = e^s    p_T = e^q    m = log((p + p_T) / 2)
    logp = s_y                  teacher_logp = q_y            entropy = -sum p s
    gap = q_y - s_y             gate = sigmoid(beta gap), or see `gate_values`
    rkl = sum p (s - q)         fkl = sum p_T (q - s)         jsd = (sum p (s - m) + sum p_T (q - m)) / 2

The vocabulary passes in chunks. A chunk leaves per token and side its largest logit, sum e^u and sum e^u u with
u = z - largest, and for the two KLs sum e^u (u - u_T) and sum e^u_T (u_T - u). Two chunks merge into one by moving both
to the larger of their largest logits, so that everything but jsd needs one pass. All is relative to the largest logit:
nothing is lost where logits are far from zero. jsd needs both normalisers first, so it takes a second pass.

Backward. Teacher, gap and gate are constants. For upstream gradients g_* of the other outputs, the logits' gradient has
one row-coefficient form, each term of which sums to zero over the vocabulary:

    dz = g_logp (onehot_y - p)  -  g_ent p (s + entropy)  +  g_div dD
    dD = p (s - q - rkl)   |   p - p_T   |   p (s - m - A) / 2,  A = sum p (s - m)              for rkl | fkl | jsd
    dh = dz W / t               dW = dz^T h / t                                     from the student's side alone

onehot - p is formed in fp32, and dz rounded once, to the dtype that is multiplied. The chunks pass again, dz of each in
one buffer: its part of dW is written once, dh is summed in fp32. The teacher is computed again only for a divergence.

Memory. Beside results and gradients there are buffers of one chunk of the vocabulary by one chunk of the tokens, the
fp32 sums of dh [N, D], and a few numbers a token. On CPUs the forward pass keeps the first chunks' logits while they
fit in KEEP_BYTES, so that small problems compute nothing twice. Nothing grows with V.
Ignored tokens are never touched: they cost nothing, give zeros, and neither their hidden states nor their upstream
gradients, which may be NaN, reach any result.

Limits. Arithmetic is fp32 (fp64 where student or weight is fp64, torch backend only). Hidden states are promoted to the
weight's dtype where that is wider, and the products of half-precision pairs are summed in fp32 on GPUs; CPUs, which
multiply halves slowly, copy each chunk to fp32. fp16 dz may underflow without loss scaling. Only first derivatives.
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
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no part of torch's CPU builds; the torch backend needs none of it
    triton = None

IGNORE = -100  # the target that torch.nn.functional.cross_entropy ignores
GATES = ("gap", "entropy", "soft_or", "none")
DIVERGENCES = ("rkl", "fkl", "jsd")
GPU_CHUNK = 8192  # tokens, and columns of the vocabulary, of a chunk on a GPU: products that fill it
STRIPS = 16  # parts of the vocabulary whose statistics triton computes side by side
KEEP_BYTES = 7 * 2**25  # 224 MiB of logits may be kept from forward to backward, on CPU


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
    logp, entropy, _, _ = scores(hidden, None, weight, targets, temperature, None, backend)
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
    logp, entropy, teacher_logp, div = scores(
        student, teacher.detach(), weight, targets, temperature, divergence, backend
    )
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


def choose_backend(backend, student, weight):
    """The name of the backend that runs for these tensors; "auto" is triton on a GPU where it is installed.

    Raises ValueError, with the reason, if a backend is named that can't run them.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    reason = None
    if triton is None:
        reason = "triton is not installed (pip install triton)"
    elif not weight.is_cuda and not interpreted():
        reason = f"the tensors are on {weight.device} (only the interpreter, TRITON_INTERPRET=1, runs there)"
    elif torch.float64 in (student.dtype, weight.dtype):
        reason = "it computes in fp32 and a tensor is fp64"
    if backend == "triton" and reason:
        raise ValueError(f'backend="triton" cannot run here: {reason}; use backend="torch" or "auto"')
    if backend == "auto":
        return "torch" if reason or not weight.is_cuda else "triton"
    return backend


def interpreted():
    """Whether triton runs kernels in Python, on any machine."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ------------------------------------------------------------------------------------------- one pass forward, one back


class Problem(NamedTuple):
    """What a backend sees: no ignored tokens, hidden states of a dtype at least as wide as the weight's."""

    student: Tensor  # [n, D]
    teacher: Optional[Tensor]  # [n, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [n]
    scale: float  # 1 / temperature
    divergence: Optional[str]
    dtype: torch.dtype  # of all sums and results


class Scores(NamedTuple):
    """All [n]; what the results and the gradient are made of."""

    logp: Tensor
    entropy: Tensor
    top: Tensor  # largest of the student's logits
    log_sum: Tensor  # s = (z - top) - log_sum; their sum would lose digits where logits are far from zero
    teacher_logp: Optional[Tensor]
    teacher_top: Optional[Tensor]
    teacher_log_sum: Optional[Tensor]
    divergence: Optional[Tensor]
    centre: Optional[Tensor]  # the mean that dD subtracts: rkl for rkl, sum p (s - m) for jsd


def scores(student, teacher, weight, targets, temperature, divergence, backend):
    """-> logp, entropy, teacher_logp, divergence, all [N]; the last two None where there is none."""
    run = BACKENDS[choose_backend(backend, student, weight)]
    keep = torch.is_grad_enabled() and (student.requires_grad or weight.requires_grad)
    with torch.autocast(weight.device.type, enabled=False):  # it would round the sums
        return HeadScores.apply(student, weight, teacher, targets, 1.0 / temperature, divergence, run, keep)


class HeadScores(torch.autograd.Function):
    """The two passes over the vocabulary. A backend gives the forward one, and dz of a chunk of the backward one."""

    @staticmethod
    def forward(ctx, student, weight, teacher, targets, scale, divergence, run, keep):
        real = targets != IGNORE
        rows = None if bool(real.all()) else real.nonzero().squeeze(1)  # None: all rows, without a copy
        dtype = torch.promote_types(torch.promote_types(student.dtype, weight.dtype), torch.float32)
        student_rows, teacher_rows = (dense(x, rows, weight.dtype) for x in (student, teacher))
        problem = Problem(student_rows, teacher_rows, row_major(weight), targets if rows is None else targets[rows],
                          scale, divergence, dtype)
        found, kept = run.forward(problem, KEEP_BYTES if keep and not weight.is_cuda else 0)
        tiles = [tile for pair in kept.values() for tile in pair]
        ctx.save_for_backward(student, weight, teacher, targets, rows, *found, *tiles)
        ctx.problem = scale, divergence, dtype, run, list(kept)
        ctx.set_materialize_grads(False)
        results = [x if x is None else spread(x, rows, len(targets))
                   for x in (found.logp, found.entropy, found.teacher_logp, found.divergence)]
        if teacher is not None:
            ctx.mark_non_differentiable(results[2])
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy, _, g_div):
        student, weight, teacher, targets, rows, *saved = ctx.saved_tensors
        found, tiles = Scores(*saved[:len(Scores._fields)]), saved[len(Scores._fields):]
        scale, divergence, dtype, run, places = ctx.problem
        kept = dict(zip(places, zip(tiles[::2], tiles[1::2])))
        divergence = None if g_div is None else divergence
        upstream = [x if x is None or rows is None else x[rows] for x in (g_logp, g_entropy, g_div)]
        problem = Problem(dense(student, rows, weight.dtype),
                          dense(teacher, rows, weight.dtype) if divergence else None,
                          row_major(weight), targets if rows is None else targets[rows], scale, divergence, dtype)
        d_student, d_weight = gradients(problem, found, upstream, kept, run, *ctx.needs_input_grad[:2])
        if d_student is not None:
            d_student = spread(d_student.to(student.dtype), rows, len(targets))
        return d_student, d_weight, None, None, None, None, None, None


def dense(hidden, rows, weight_dtype):
    """The rows that count, row by row in memory, of a dtype at least as wide as the weight's."""
    if hidden is None:
        return None
    hidden = hidden if rows is None else hidden[rows]
    return row_major(hidden.to(torch.promote_types(hidden.dtype, weight_dtype)))


def row_major(x):
    return x if x.stride(1) == 1 else x.contiguous()


def spread(values, rows, count):
    """Back to all tokens: zeros where the target is ignored."""
    if rows is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)


def slices(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def chunk_sizes(problem):
    """(tokens, vocabulary) of a chunk; on a CPU one that stays in its caches."""
    n, vocab = len(problem.targets), len(problem.weight)
    if problem.weight.is_cuda:
        return max(1, min(n, GPU_CHUNK)), min(vocab, GPU_CHUNK)
    columns = min(vocab, 4096)
    return max(1, min(n, max(256, 2**20 // columns))), columns


def operand_dtype(problem):
    """What is multiplied: the hidden states' own dtype on a GPU; at least fp32 on a CPU, which is slow at halves."""
    return problem.student.dtype if problem.weight.is_cuda else problem.dtype


def accumulate(out, a, b, scale, beta):
    """out = beta out + scale a b, summed in out's dtype, be it wider than that of a and b."""
    wider = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, beta=beta, alpha=scale, out=out, **wider)


def gradients(problem, found, upstream, kept, run, want_student, want_weight):
    """-> (d_student [n, D] in problem.dtype, d_weight [V, D] in the weight's), None where not wanted."""
    student, weight = problem.student, problem.weight
    token_chunk, vocab_chunk = chunk_sizes(problem)
    d_student = student.new_zeros(student.shape, dtype=problem.dtype) if want_student else None
    d_weight = (torch.empty_like if len(student) else torch.zeros_like)(weight) if want_weight else None
    part = None  # sums of a chunk of d_weight, where its own dtype is too narrow to sum in
    if want_weight and weight.dtype != problem.dtype:
        part = weight.new_empty(vocab_chunk, weight.shape[1], dtype=problem.dtype)
    gradient_of = run.gradient(problem, found, upstream, kept)
    for columns in slices(len(weight), vocab_chunk):
        w = weight[columns].to(operand_dtype(problem))  # [c, D]
        for rows in slices(len(student), token_chunk):
            dz = gradient_of(rows, columns, w)  # [r, c]
            if want_student:
                accumulate(d_student[rows], dz, w, problem.scale, 1)
            if want_weight:
                d_w = d_weight[columns] if part is None else part[:len(w)]
                accumulate(d_w, dz.t(), student[rows].to(w.dtype), problem.scale, 1 if rows.start else 0)
        if part is not None and len(student):
            d_weight[columns] = part[:len(w)]
    return d_student, d_weight


# ------------------------------------------------------------------------------- torch backend, and the specification
#
# A statistic is a column of numbers [n]. STUDENT are those of the student's logits z of a chunk, TEACHER those of the
# teacher's zt, CROSS those of both KLs, with u = z - m and u_T = zt - m_T.

STUDENT = ("m", "s", "e", "zy")  # max z, sum e^u, sum e^u u, z of the target (0 where it is in another chunk)
TEACHER = ("m_T", "s_T", "zy_T")
CROSS = ("r", "f")  # sum e^u (u - u_T), sum e^u_T (u_T - u)


def fields_of(has_teacher, divergence):
    return STUDENT + TEACHER * has_teacher + CROSS * (divergence in ("rkl", "fkl"))


def chunk_statistics(z, zt, y, fields, scratch):
    """Logits [r, c] of a chunk, its targets y [r] (elsewhere: outside 0..c-1) -> statistics [len(fields), r].

    Specification of `_forward_kernel`. scratch: two buffers like z.
    """
    a, b = scratch
    here, at = (0 <= y) & (y < z.shape[1]), y.clamp(0, z.shape[1] - 1)[:, None]

    def of_target(logits):
        return torch.where(here, logits.gather(1, at)[:, 0], 0)

    m = z.amax(1)
    u = torch.sub(z, m[:, None], out=a)
    p = torch.exp(u, out=b)
    found = [m, p.sum(1), torch.linalg.vecdot(p, u), of_target(z)]
    if zt is not None:
        m_t, zy_t = zt.amax(1), of_target(zt)
        if "r" in fields:
            difference = u.sub_(zt).add_(m_t[:, None])  # u - u_T
            r = torch.linalg.vecdot(p, difference)
            p_t = torch.sub(zt, m_t[:, None], out=b).exp_()
            found += [m_t, p_t.sum(1), zy_t, r, -torch.linalg.vecdot(p_t, difference)]
        else:
            found += [m_t, torch.sub(zt, m_t[:, None], out=b).exp_().sum(1), zy_t]
    return torch.stack(found)


def merge(first, second, fields):
    """Statistics [len(fields), n] of two parts of the vocabulary -> of both. Specification of `_combine_kernel`."""
    a, b = (dict(zip(fields, part)) for part in (first, second))
    m = torch.maximum(a["m"], b["m"])
    m_t = torch.maximum(a["m_T"], b["m_T"]) if "m_T" in fields else None
    both = dict.fromkeys(fields, 0)
    for part in (a, b):
        moved = part["m"] - m  # <= 0, what every u of this part goes down by
        down = moved.exp()
        both["s"] = both["s"] + down * part["s"]
        both["e"] = both["e"] + down * (part["e"] + part["s"] * moved)
        both["zy"] = both["zy"] + part["zy"]
        if m_t is not None:
            moved_t = part["m_T"] - m_t
            both["s_T"] = both["s_T"] + moved_t.exp() * part["s_T"]
            both["zy_T"] = both["zy_T"] + part["zy_T"]
        if "r" in fields:
            both["r"] = both["r"] + down * (part["r"] + part["s"] * (moved - moved_t))
            both["f"] = both["f"] + moved_t.exp() * (part["f"] - part["s_T"] * (moved - moved_t))
    both["m"] = m
    if m_t is not None:
        both["m_T"] = m_t
    return torch.stack([both[name] for name in fields])


def finish(statistics, fields, divergence, mixture=None):
    """Statistics of the whole vocabulary -> Scores. mixture: (sum p (s - m), sum p_T (q - m)) for jsd."""
    x = dict(zip(fields, statistics))
    log_s = x["s"].log()
    logp, entropy = (x["zy"] - x["m"]) - log_s, log_s - x["e"] / x["s"]
    if "m_T" not in fields:
        return Scores(logp, entropy, x["m"], log_s, None, None, None, None, None)
    log_s_t = x["s_T"].log()
    teacher_logp = (x["zy_T"] - x["m_T"]) - log_s_t
    value = centre = None
    if divergence == "rkl":
        value = centre = x["r"] / x["s"] - log_s + log_s_t
    elif divergence == "fkl":
        value = x["f"] / x["s_T"] - log_s_t + log_s
    elif divergence == "jsd":
        value, centre = (mixture[0] + mixture[1]) / 2, mixture[0]
    return Scores(logp, entropy, x["m"], log_s, teacher_logp, x["m_T"], log_s_t, value, centre)


def log_probs(logits, top, log_sum, out):
    return torch.sub(logits, top[:, None], out=out).sub_(log_sum[:, None])


def mixture_statistics(z, zt, found, scratch):
    """Logits [r, c] -> (sum p (s - m), sum p_T (q - m)) [2, r] of a chunk. Specification of `_mixture_kernel`."""
    s = log_probs(z, found.top, found.log_sum, scratch[0])
    q = log_probs(zt, found.teacher_top, found.teacher_log_sum, scratch[1])
    d = q - s
    student = torch.linalg.vecdot(above_mean(d), s.exp_())
    return torch.stack([student, torch.linalg.vecdot(above_mean(d.neg_()), q.exp_())])


def above_mean(d):
    """s - m of d = q - s: how far a log-probability s lies above log((e^s + e^q) / 2)."""
    return F.softplus(d).neg_().add_(math.log(2))


def chunk_gradient(z, zt, y, found, upstream, divergence, out):
    """dz [r, c] of a chunk into `out`, from logits [r, c] and columns [r]. Specification of `_gradient_kernel`.

    y: targets counted from the chunk's first column. upstream: (g_logp, g_ent, g_div), None where nothing flows.
    """
    g_logp, g_ent, g_div = (x if x is None else x[:, None] for x in upstream)
    entropy = found.entropy[:, None]
    s = log_probs(z, found.top, found.log_sum, out)
    p = s.exp()
    level, slope = torch.zeros_like(entropy), None  # dz = p (level + slope s + ...) + ..., both [r, 1]
    if g_logp is not None:
        level = level - g_logp
    if g_ent is not None:
        level, slope = level - g_ent * entropy, -g_ent
    if divergence:
        q = log_probs(zt, found.teacher_top, found.teacher_log_sum, torch.empty_like(zt))
    if divergence == "rkl":
        level, slope = level - g_div * found.centre[:, None], g_div if slope is None else slope + g_div
    if divergence == "fkl":
        level = level + g_div
    if divergence == "jsd":
        above = above_mean(q.sub_(s)).sub_(found.centre[:, None])
        level = torch.addcmul(level, g_div, above, value=0.5)
    factor = level if slope is None else torch.addcmul(level, slope, s, out=out)
    if divergence == "rkl":
        factor.addcmul_(g_div, q, value=-1)
    dz = torch.mul(p, factor, out=out)
    if divergence == "fkl":
        dz.addcmul_(g_div, q.exp_(), value=-1)
    if g_logp is not None:
        here = (0 <= y) & (y < z.shape[1])
        dz.scatter_add_(1, y.clamp(0, z.shape[1] - 1)[:, None], torch.where(here[:, None], g_logp, 0))
    return dz


class Workspace:
    """Logits of a chunk: kept ones, or new ones in buffers that all chunks share."""

    def __init__(self, problem, kept=None):
        self.problem, self.kept, self.buffers = problem, {} if kept is None else kept, {}

    def buffer(self, name, rows, columns):
        if name not in self.buffers:
            self.buffers[name] = self.problem.weight.new_empty(math.prod(chunk_sizes(self.problem)),
                                                               dtype=self.problem.dtype)
        return self.buffers[name][:rows * columns].view(rows, columns)

    def logits(self, hidden, w, name):
        z = self.buffer(name, len(hidden), len(w))
        accumulate(z, hidden.to(w.dtype), w.t(), self.problem.scale, 0)
        return z

    def pair(self, rows, columns, w, with_teacher):
        """-> student's and teacher's logits [r, c], the latter None where there is no need of them."""
        if (rows.start, columns.start) in self.kept:
            return self.kept[rows.start, columns.start]
        z = self.logits(self.problem.student[rows], w, "z")
        return z, self.logits(self.problem.teacher[rows], w, "zt") if with_teacher else None

    def chunks(self):
        """Yields (rows, columns, the head's rows in the dtype that is multiplied)."""
        token_chunk, vocab_chunk = chunk_sizes(self.problem)
        for columns in slices(len(self.problem.weight), vocab_chunk):
            w = self.problem.weight[columns].to(operand_dtype(self.problem))
            for rows in slices(len(self.problem.targets), token_chunk):
                yield rows, columns, w


def select(found, rows):
    return Scores(*(x if x is None else x[rows] for x in found))


def torch_forward(problem, keep_bytes):
    """-> (Scores, {(first row, first column): logits of a chunk} to be kept for the backward pass)."""
    fields = fields_of(problem.teacher is not None, problem.divergence)
    whole = problem.weight.new_ones(len(fields), len(problem.targets), dtype=problem.dtype)
    work, kept = Workspace(problem), {}
    for rows, columns, w in work.chunks():
        z, zt = work.pair(rows, columns, w, problem.teacher is not None)
        scratch = work.buffer("a", *z.shape), work.buffer("b", *z.shape)
        found = chunk_statistics(z, zt, problem.targets[rows] - columns.start, fields, scratch)
        whole[:, rows] = merge(whole[:, rows], found, fields) if columns.start else found
        keep_bytes -= z.nbytes * (2 if problem.divergence else 1)
        if keep_bytes >= 0:
            kept[rows.start, columns.start] = z.clone(), zt.clone() if problem.divergence else None
    if problem.divergence != "jsd":
        return finish(whole, fields, problem.divergence), kept
    found, mixture = finish(whole, fields, None), torch.zeros_like(whole[:2])
    work.kept = kept
    for rows, columns, w in work.chunks():
        z, zt = work.pair(rows, columns, w, True)
        scratch = work.buffer("a", *z.shape), work.buffer("b", *z.shape)
        mixture[:, rows] += mixture_statistics(z, zt, select(found, rows), scratch)
    return finish(whole, fields, "jsd", mixture), kept


def torch_gradient(problem, found, upstream, kept):
    """-> a function of (rows, columns, w) that gives dz [r, c] of a chunk."""
    work = Workspace(problem, kept)

    def gradient_of(rows, columns, w):
        z, zt = work.pair(rows, columns, w, problem.divergence is not None)
        parts = [x if x is None else x[rows] for x in upstream]
        y = problem.targets[rows] - columns.start
        dz = chunk_gradient(z, zt, y, select(found, rows), parts, problem.divergence, work.buffer("dz", *z.shape))
        return dz.to(w.dtype)

    return gradient_of


class Backend(NamedTuple):
    forward: Callable  # (problem, bytes of logits that it may keep) -> (Scores, kept logits)
    gradient: Callable  # (problem, scores, upstream gradients, kept logits) -> (rows, columns, w) -> dz of a chunk


BACKENDS = {"torch": Backend(torch_forward, torch_gradient)}


# -------------------------------------------------------------------------------------------------- triton backend
#
# No atomics, and each element is written by one program, so that two runs are bit-equal. Programs are numbered with the
# token blocks fastest: those that share a stretch of W run together, and axis 0 has no limit of 65,535.

if triton is not None:
    LOWEST = tl.constexpr(-1e30)  # below every logit; minus infinity would make NaN of 0 * inf

    @triton.jit
    def _row(pointer, rows, stride):
        """Where rows begin, [n, 1]; in 64 bits: 20,000 rows of 151,936 are beyond 32."""
        return pointer + rows[:, None].to(tl.int64) * stride

    @triton.jit
    def _logits(hidden, weight, rows, cols, N, D, V, stride_h, stride_w, scale, BLOCK_N: tl.constexpr,
                BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """scale * hidden[rows] weight[cols]^T, [BLOCK_N, BLOCK_V] in fp32."""
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        depth = tl.arange(0, BLOCK_D)
        h_at = _row(hidden, rows, stride_h) + depth[None, :]
        w_at = _row(weight, cols, stride_w) + depth[None, :]
        for d in range(0, D, BLOCK_D):
            inside = depth[None, :] < D - d
            h = tl.load(h_at + d, mask=(rows[:, None] < N) & inside, other=0.0)
            w = tl.load(w_at + d, mask=(cols[:, None] < V) & inside, other=0.0)
            z = tl.dot(h, tl.trans(w).to(h.dtype), z, input_precision="ieee")
        return z * scale

    @triton.jit
    def _pair_logits(student, teacher, weight, rows, cols, N, D, V, stride_s, stride_t, stride_w, scale,
                     BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """Both sides' logits: each tile of the weight is loaded once."""
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        zt = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        depth = tl.arange(0, BLOCK_D)
        s_at = _row(student, rows, stride_s) + depth[None, :]
        t_at = _row(teacher, rows, stride_t) + depth[None, :]
        w_at = _row(weight, cols, stride_w) + depth[None, :]
        for d in range(0, D, BLOCK_D):
            inside = depth[None, :] < D - d
            w = tl.trans(tl.load(w_at + d, mask=(cols[:, None] < V) & inside, other=0.0))
            s = tl.load(s_at + d, mask=(rows[:, None] < N) & inside, other=0.0)
            z = tl.dot(s, w.to(s.dtype), z, input_precision="ieee")
            t = tl.load(t_at + d, mask=(rows[:, None] < N) & inside, other=0.0)
            zt = tl.dot(t, w.to(t.dtype), zt, input_precision="ieee")
        return z * scale, zt * scale

    @triton.jit
    def _store_statistics(at, step, kept, m, s, e, zy, mt, st, zty, r, f, PAIR: tl.constexpr, KL: tl.constexpr):
        """In the order of STUDENT, TEACHER, CROSS, `step` numbers apart."""
        tl.store(at, m, mask=kept)
        tl.store(at + step, s, mask=kept)
        tl.store(at + 2 * step, e, mask=kept)
        tl.store(at + 3 * step, zy, mask=kept)
        if PAIR:
            tl.store(at + 4 * step, mt, mask=kept)
            tl.store(at + 5 * step, st, mask=kept)
            tl.store(at + 6 * step, zty, mask=kept)
        if KL:
            tl.store(at + 7 * step, r, mask=kept)
            tl.store(at + 8 * step, f, mask=kept)

    @triton.jit
    def _forward_kernel(student, teacher, weight, targets, partials, N, D, V, strip, stride_s, stride_t, stride_w,
                        scale, PAIR: tl.constexpr, KL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                        BLOCK_D: tl.constexpr):
        """Statistics of each strip [fields, strips, N]: `chunk_statistics` and `merge`, tile by tile."""
        row_blocks = tl.cdiv(N, BLOCK_N)
        rows = tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        number = tl.program_id(0) // row_blocks
        y = tl.load(targets + rows, mask=rows < N, other=-1)
        m = tl.full((BLOCK_N,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        e = tl.zeros((BLOCK_N,), tl.float32)
        zy = tl.zeros((BLOCK_N,), tl.float32)
        mt = tl.full((BLOCK_N,), LOWEST, tl.float32)
        st = tl.zeros((BLOCK_N,), tl.float32)
        zty = tl.zeros((BLOCK_N,), tl.float32)
        r = tl.zeros((BLOCK_N,), tl.float32)
        f = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(number * strip, tl.minimum((number + 1) * strip, V), BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            real = (cols < V)[None, :]
            hit = cols[None, :] == y[:, None]
            if PAIR:
                z, zt = _pair_logits(student, teacher, weight, rows, cols, N, D, V, stride_s, stride_t, stride_w, scale,
                                     BLOCK_N, BLOCK_V, BLOCK_D)
            else:
                z = _logits(student, weight, rows, cols, N, D, V, stride_s, stride_w, scale, BLOCK_N, BLOCK_V, BLOCK_D)
            zy += tl.sum(tl.where(hit, z, 0.0), 1)
            m_new = tl.maximum(m, tl.max(tl.where(real, z, LOWEST), 1))
            u = tl.where(real, z - m_new[:, None], 0.0)
            p = tl.where(real, tl.exp(u), 0.0)
            down = tl.exp(m - m_new)
            if KL:
                zty += tl.sum(tl.where(hit, zt, 0.0), 1)
                mt_new = tl.maximum(mt, tl.max(tl.where(real, zt, LOWEST), 1))
                ut = tl.where(real, zt - mt_new[:, None], 0.0)
                pt = tl.where(real, tl.exp(ut), 0.0)
                down_t = tl.exp(mt - mt_new)
                moved = (m - m_new) - (mt - mt_new)
                r = down * (r + s * moved) + tl.sum(p * (u - ut), 1)
                f = down_t * (f - st * moved) + tl.sum(pt * (ut - u), 1)
                st = down_t * st + tl.sum(pt, 1)
                mt = mt_new
            elif PAIR:
                zty += tl.sum(tl.where(hit, zt, 0.0), 1)
                mt_new = tl.maximum(mt, tl.max(tl.where(real, zt, LOWEST), 1))
                st = tl.exp(mt - mt_new) * st + tl.sum(tl.where(real, tl.exp(zt - mt_new[:, None]), 0.0), 1)
                mt = mt_new
            e = down * (e + s * (m - m_new)) + tl.sum(p * u, 1)
            s = down * s + tl.sum(p, 1)
            m = m_new
        at = partials + number.to(tl.int64) * N + rows
        step = tl.num_programs(0) // row_blocks * tl.cast(N, tl.int64)
        kept = rows < N
        _store_statistics(at, step, kept, m, s, e, zy, mt, st, zty, r, f, PAIR, KL)

    @triton.jit
    def _combine_kernel(partials, whole, N, strips, PAIR: tl.constexpr, KL: tl.constexpr, BLOCK_N: tl.constexpr):
        """Statistics [fields, strips, N] -> [fields, N]: `merge`, strip after strip."""
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        kept = rows < N
        step = strips * tl.cast(N, tl.int64)
        m = tl.full((BLOCK_N,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        e = tl.zeros((BLOCK_N,), tl.float32)
        zy = tl.zeros((BLOCK_N,), tl.float32)
        mt = tl.full((BLOCK_N,), LOWEST, tl.float32)
        st = tl.zeros((BLOCK_N,), tl.float32)
        zty = tl.zeros((BLOCK_N,), tl.float32)
        r = tl.zeros((BLOCK_N,), tl.float32)
        f = tl.zeros((BLOCK_N,), tl.float32)
        for number in range(0, strips):
            at = partials + number * tl.cast(N, tl.int64) + rows
            m_part = tl.load(at, mask=kept, other=0.0)
            s_part = tl.load(at + step, mask=kept, other=1.0)
            e_part = tl.load(at + 2 * step, mask=kept, other=0.0)
            zy += tl.load(at + 3 * step, mask=kept, other=0.0)
            m_new = tl.maximum(m, m_part)
            moved, moved_part = m - m_new, m_part - m_new
            down, down_part = tl.exp(moved), tl.exp(moved_part)
            if PAIR:
                mt_part = tl.load(at + 4 * step, mask=kept, other=0.0)
                st_part = tl.load(at + 5 * step, mask=kept, other=1.0)
                zty += tl.load(at + 6 * step, mask=kept, other=0.0)
                mt_new = tl.maximum(mt, mt_part)
                moved_t, moved_t_part = mt - mt_new, mt_part - mt_new
                down_t, down_t_part = tl.exp(moved_t), tl.exp(moved_t_part)
                if KL:
                    r_part = tl.load(at + 7 * step, mask=kept, other=0.0)
                    f_part = tl.load(at + 8 * step, mask=kept, other=0.0)
                    r = down * (r + s * (moved - moved_t)) + down_part * (
                        r_part + s_part * (moved_part - moved_t_part))
                    f = down_t * (f - st * (moved - moved_t)) + down_t_part * (
                        f_part - st_part * (moved_part - moved_t_part))
                st = down_t * st + down_t_part * st_part
                mt = mt_new
            e = down * (e + s * moved) + down_part * (e_part + s_part * moved_part)
            s = down * s + down_part * s_part
            m = m_new
        at, step = whole + rows, tl.cast(N, tl.int64)
        _store_statistics(at, step, kept, m, s, e, zy, mt, st, zty, r, f, PAIR, KL)

    @triton.jit
    def _mixture_kernel(student, teacher, weight, normalisers, partials, N, D, V, strip, stride_s, stride_t, stride_w,
                        scale, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """The second pass of jsd; normalisers [4, N]: both sides' top and log_sum; partials [2, strips, N]."""
        row_blocks = tl.cdiv(N, BLOCK_N)
        rows = tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        number = tl.program_id(0) // row_blocks
        kept = rows < N
        at, step = normalisers + rows, tl.cast(N, tl.int64)
        top = tl.load(at, mask=kept, other=0.0)[:, None]
        log_sum = tl.load(at + step, mask=kept, other=0.0)[:, None]
        top_t = tl.load(at + 2 * step, mask=kept, other=0.0)[:, None]
        log_sum_t = tl.load(at + 3 * step, mask=kept, other=0.0)[:, None]
        of_student = tl.zeros((BLOCK_N,), tl.float32)
        of_teacher = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(number * strip, tl.minimum((number + 1) * strip, V), BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            real = (cols < V)[None, :]
            z, zt = _pair_logits(student, teacher, weight, rows, cols, N, D, V, stride_s, stride_t, stride_w, scale,
                                 BLOCK_N, BLOCK_V, BLOCK_D)
            s, q = (z - top) - log_sum, (zt - top_t) - log_sum_t
            of_student += tl.sum(tl.where(real, tl.exp(s) * _above_mean(q - s), 0.0), 1)
            of_teacher += tl.sum(tl.where(real, tl.exp(q) * _above_mean(s - q), 0.0), 1)
        at = partials + number.to(tl.int64) * N + rows
        tl.store(at, of_student, mask=kept)
        tl.store(at + tl.num_programs(0) // row_blocks * tl.cast(N, tl.int64), of_teacher, mask=kept)

    @triton.jit
    def _above_mean(d):
        """`above_mean`."""
        return 0.6931471805599453 - tl.maximum(d, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(d)))

    @triton.jit
    def _gradient_kernel(student, teacher, weight, targets, columns, out, N, D, V, first, stride_s, stride_t, stride_w,
                         scale, DIVERGENCE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                         BLOCK_D: tl.constexpr):
        """dz [N, V] of a chunk whose first column is `first`; columns [9, N]: top, log_sum, entropy, g_logp, g_ent,
        and for a divergence the teacher's top and log_sum, centre, g_div."""
        row_blocks = tl.cdiv(N, BLOCK_N)
        rows = tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        cols = tl.program_id(0) // row_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
        kept, step = rows < N, tl.cast(N, tl.int64)
        y = tl.load(targets + rows, mask=kept, other=-1) - first
        at = columns + rows
        top = tl.load(at, mask=kept, other=0.0)[:, None]
        log_sum = tl.load(at + step, mask=kept, other=0.0)[:, None]
        entropy = tl.load(at + 2 * step, mask=kept, other=0.0)[:, None]
        g_logp = tl.load(at + 3 * step, mask=kept, other=0.0)[:, None]
        g_ent = tl.load(at + 4 * step, mask=kept, other=0.0)[:, None]
        if DIVERGENCE == "none":
            z = _logits(student, weight, rows, cols, N, D, V, stride_s, stride_w, scale, BLOCK_N, BLOCK_V, BLOCK_D)
        else:
            z, zt = _pair_logits(student, teacher, weight, rows, cols, N, D, V, stride_s, stride_t, stride_w, scale,
                                 BLOCK_N, BLOCK_V, BLOCK_D)
            q = zt - tl.load(at + 5 * step, mask=kept, other=0.0)[:, None]
            q -= tl.load(at + 6 * step, mask=kept, other=0.0)[:, None]
            centre = tl.load(at + 7 * step, mask=kept, other=0.0)[:, None]
            g_div = tl.load(at + 8 * step, mask=kept, other=0.0)[:, None]
        s = (z - top) - log_sum
        p = tl.exp(s)
        hit = (cols[None, :] == y[:, None]).to(tl.float32)
        dz = g_logp * (hit - p) - g_ent * p * (s + entropy)
        if DIVERGENCE == "rkl":
            dz += g_div * p * (s - q - centre)
        if DIVERGENCE == "fkl":
            dz += g_div * (p - tl.exp(q))
        if DIVERGENCE == "jsd":
            dz += g_div * p * (_above_mean(q - s) - centre) * 0.5
        place = _row(out, rows, V) + cols[None, :]
        tl.store(place, dz.to(out.dtype.element_ty), mask=kept[:, None] & (cols[None, :] < V))

    # (BLOCK_N, BLOCK_V, BLOCK_D, warps, stages): the largest tiles found that triton 3.6 and 3.9 compile without
    # spills, which `python kernels.py compile` shows. HALF and FP32 are the common rows, OWN has the exceptions.
    # FP32 has one BLOCK_D: both passes must sum a logit in one order, lest p do not sum to 1.
    HALF = {"forward": (128, 128, 64, 8, 3), "forward pair": (64, 128, 64, 8, 3),
            "forward pair + KL": (64, 64, 64, 4, 3), "mixture": (64, 128, 64, 8, 3),
            "gradient": (128, 128, 64, 8, 3), "gradient + rkl": (64, 128, 64, 8, 3),
            "gradient + fkl": (64, 128, 64, 8, 3), "gradient + jsd": (64, 128, 64, 8, 3)}
    FP32 = {"forward": (64, 64, 32, 4, 2), "forward pair": (64, 64, 32, 8, 2), "forward pair + KL": (64, 64, 32, 8, 2),
            "mixture": (64, 64, 32, 8, 2), "gradient": (64, 64, 32, 4, 2), "gradient + rkl": (32, 64, 32, 8, 2),
            "gradient + fkl": (32, 64, 32, 8, 2), "gradient + jsd": (32, 64, 32, 8, 2), "combine": (128, 0, 0, 4, 1)}
    OWN = {"sm_80": {"forward pair + KL": (32, 128, 64, 8, 3), "gradient": (128, 64, 64, 8, 3)},
           "sm_89": {"forward pair": (128, 64, 64, 8, 3), "forward pair + KL": (32, 128, 64, 8, 3),
                     "gradient": (128, 64, 64, 8, 3)},
           "sm_90": {"forward": (128, 64, 64, 8, 3), "gradient": (128, 64, 64, 8, 3)},
           "sm_100": {"gradient + jsd": (64, 64, 128, 8, 2)},
           "gfx942": {"forward": (128, 128, 64, 8, 2), "gradient": (128, 128, 64, 8, 2)}}
    CONFIGS = {arch: {"half": HALF | own, "fp32": FP32} for arch, own in OWN.items()}

    def architecture(device):
        """The row of CONFIGS for a device: its own architecture's, or the closest older one's."""
        if device.type != "cuda":
            return "sm_80"  # interpreted: any
        if torch.version.hip:
            return "gfx942"
        major, minor = torch.cuda.get_device_capability(device)
        return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_89" if (major, minor) == (8, 9) else "sm_80"

    def launch_options(problem, name):
        """-> the keyword arguments of a kernel's launch that say how it is tiled."""
        rows = CONFIGS[architecture(problem.weight.device)]
        wide = any(x is not None and x.dtype == torch.float32 for x in (problem.student, problem.teacher))
        n, v, d, warps, stages = rows["fp32" if wide else "half"][name]
        return {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}

    def blocks(length, size):
        return -(-length // size)

    def strips_of(vocab, options):
        """-> (columns of a strip, a multiple of the kernel's tile; number of strips)."""
        strip = blocks(vocab, STRIPS * options["BLOCK_V"]) * options["BLOCK_V"]
        return strip, blocks(vocab, strip)

    def sides(problem):
        """-> (student, teacher, weight), (N, D, V), (their row strides); without a teacher the student stands in."""
        student, weight = problem.student, problem.weight
        teacher = student if problem.teacher is None else problem.teacher
        return ((student, teacher, weight), (len(student), student.shape[1], len(weight)),
                (student.stride(0), teacher.stride(0), weight.stride(0)))

    def triton_forward(problem, keep_bytes):
        """`torch_forward` by kernels; keeps nothing."""
        pair, kl = problem.teacher is not None, problem.divergence in ("rkl", "fkl")
        fields = fields_of(pair, problem.divergence)
        tensors, (n, d, v), strides = sides(problem)
        whole = problem.weight.new_empty(len(fields), n, dtype=torch.float32)
        if n == 0:
            return finish(whole, fields, problem.divergence, (whole[0], whole[0])), {}
        options = launch_options(problem, "forward" + " pair" * pair + " + KL" * kl)
        strip, strips = strips_of(v, options)
        partials = whole.new_empty(len(fields), strips, n)
        grid = (blocks(n, options["BLOCK_N"]) * strips,)
        _forward_kernel[grid](*tensors, problem.targets, partials, n, d, v, strip, *strides, problem.scale, PAIR=pair,
                              KL=kl, **options)
        block = FP32["combine"][0]
        _combine_kernel[(blocks(n, block),)](partials, whole, n, strips, PAIR=pair, KL=kl, BLOCK_N=block)
        if problem.divergence != "jsd":
            return finish(whole, fields, problem.divergence), {}
        found = finish(whole, fields, None)
        options = launch_options(problem, "mixture")
        strip, strips = strips_of(v, options)
        parts = whole.new_empty(2, strips, n)
        grid = (blocks(n, options["BLOCK_N"]) * strips,)
        normalisers = torch.stack([found.top, found.log_sum, found.teacher_top, found.teacher_log_sum])
        _mixture_kernel[grid](*tensors, normalisers, parts, n, d, v, strip, *strides,
                              problem.scale, **options)
        return finish(whole, fields, "jsd", parts.sum(1)), {}

    def triton_gradient(problem, found, upstream, kept):
        """`torch_gradient` by a kernel."""
        zero = torch.zeros_like(found.top)
        columns = [found.top, found.log_sum, found.entropy, *upstream[:2]]
        if problem.divergence:
            columns += [found.teacher_top, found.teacher_log_sum, found.centre, upstream[2]]
        columns = torch.stack([zero if x is None else x for x in columns])  # [5 or 9, n]
        out = problem.student.new_empty(math.prod(chunk_sizes(problem)), dtype=operand_dtype(problem))

        def gradient_of(rows, place, w):
            part = problem._replace(student=problem.student[rows], weight=problem.weight[place],
                                    teacher=None if problem.teacher is None else problem.teacher[rows])
            tensors, (n, d, v), strides = sides(part)
            options = launch_options(problem, "gradient" + (f" + {problem.divergence}" if problem.divergence else ""))
            dz = out[:n * v].view(n, v)
            grid = (blocks(n, options["BLOCK_N"]) * blocks(v, options["BLOCK_V"]),)
            _gradient_kernel[grid](*tensors, problem.targets[rows], columns[:, rows].contiguous(), dz, n, d, v,
                                   place.start, *strides, problem.scale, DIVERGENCE=problem.divergence or "none",
                                   **options)
            return dz

        return gradient_of

    BACKENDS["triton"] = Backend(triton_forward, triton_gradient)


# ------------------------------------------------------------------------------------------------------------- reports
# python kernels.py: what this machine can tell of the above, as tables and as results/kernels.json.


def mend_interpreter():
    """The interpreter multiplies the bit patterns of bf16 operands (triton 3.6 to 3.9): makes it widen them first."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def dense_scores(student, teacher, weight, targets, temperature):
    """All outputs from [N, V] tensors in the inputs' dtype: what the functions above are compared with."""
    s = (student @ weight.t() / temperature).log_softmax(-1)
    q = (teacher @ weight.detach().t() / temperature).log_softmax(-1)
    p, p_t, m = s.exp(), q.exp(), torch.logaddexp(s, q) - math.log(2)
    pick = targets[:, None]
    rkl, fkl = (p * (s - q)).sum(-1), (p_t * (q - s)).sum(-1)
    jsd = ((p * (s - m)).sum(-1) + (p_t * (q - m)).sum(-1)) / 2
    return {"logp": s.gather(1, pick)[:, 0], "teacher_logp": q.gather(1, pick)[:, 0], "entropy": -(p * s).sum(-1),
            "rkl": rkl, "fkl": fkl, "jsd": jsd}


def accuracy(backend, dtype, n=45, d=72, v=1013):
    """Errors against fp64 on the same inputs: {quantity: largest difference; for gradients relative to their norm}."""
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(n, d, generator=rng)
    teacher, weight = student + torch.randn(n, d, generator=rng) / 4, torch.randn(v, d, generator=rng) / d**0.5
    upstream = torch.randn(3, n, generator=rng)
    targets = torch.randint(v, (n,), generator=rng)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher, weight = (x.to(device, dtype) for x in (student, teacher, weight))
    upstream, targets = upstream.to(device), targets.to(device)
    errors = {}
    for divergence in (None, *DIVERGENCES):
        exact = [x.double().requires_grad_() for x in (student, weight)]
        want = dense_scores(exact[0], teacher.double(), exact[1], targets, 0.7)
        ours = [x.clone().requires_grad_() for x in (student, weight)]
        out = fused_gap_gate(
            ours[0], teacher, ours[1], targets, temperature=0.7, divergence=divergence, backend=backend
        )
        got = {"logp": out.logp, "teacher_logp": out.teacher_logp, "entropy": out.entropy}
        names = ["logp", "entropy"] + [divergence] * (divergence is not None)
        if divergence:
            got[divergence] = out.divergence
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
    """A row a quantity, a column for every backend that can run here and dtype; where there is no GPU, triton runs in
    the interpreter, in a process of its own."""
    here = [backend] if backend else ["torch"] + ["triton"] * (triton is not None and torch.cuda.is_available())
    table = {}
    for name in here:
        for dtype in (torch.float32, torch.bfloat16):
            column = f"{name} {str(dtype).removeprefix('torch.')}"
            for quantity, error in accuracy(name, dtype).items():
                table.setdefault(quantity, {"error of": quantity})[column] = error
    if backend is None and triton is not None and not torch.cuda.is_available():
        command = [sys.executable, __file__, "accuracy", "--backend", "triton"]
        done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the interpreter failed: {done.stderr.strip().splitlines()[-1]}")
        for row in json.loads(done.stdout):
            errors = {f"{name}, interpreted": error for name, error in row.items() if name != "error of"}
            table[row["error of"]] |= errors
    return list(table.values())


QWEN = {"Qwen2.5-0.5B": (896, 151936), "Qwen2.5-1.5B": (1536, 151936), "Qwen2.5-3B": (2048, 151936),
        "Qwen2.5-7B": (3584, 152064)}


def report_memory(n=8192):
    """Bytes beside inputs, results and gradients, in bf16, from the buffers' sizes."""
    rows = []
    for model, (d, v) in QWEN.items():
        student = torch.empty(n, d, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(v, d, dtype=torch.bfloat16, device="meta")
        problem = Problem(student, student, weight, torch.empty(n, device="meta"), 1.0, "rkl", torch.float32)
        token_chunk, vocab_chunk = chunk_sizes(problem)
        sums = 4 * n * d + 4 * vocab_chunk * d  # fp32 of d_student, and of a chunk of d_weight
        numbers = 4 * n * (len(fields_of(True, "rkl")) * 2 + len(Scores._fields))
        on_cpu = sums + numbers + 4 * vocab_chunk * d + 4 * token_chunk * (5 * vocab_chunk + 2 * d) + KEEP_BYTES
        on_gpu = 4 * n * d + 4 * GPU_CHUNK * d + 2 * GPU_CHUNK * min(n, GPU_CHUNK)
        on_gpu += 4 * n * (len(fields_of(True, "rkl")) * (STRIPS + 1) + len(Scores._fields))
        rows.append({"model": model, "n": n, "d": d, "v": v, "triton": on_gpu, "torch on cpu": on_cpu,
                     "full logits, at least": 2 * 4 * n * v})  # both sides' log-probs in fp32
    return rows


def report_roofline(n=8192):
    """A prediction for an H100 from its measured ceilings; nothing here was run on one."""
    flops, rows = 798e12, []  # cuBLAS in bf16
    for model, (d, v) in QWEN.items():
        product = 2 * n * d * v / flops * 1e3
        rows.append({"model": model, "n": n, "one product, ms": product, "forward, student and teacher": 2 * product,
                     "forward and backward": 5 * product, "with a divergence": 6 * product,
                     "frozen head": 4 * product})
    return rows




# What ptxas or the AMD assembler makes of each kernel that would be chosen, found out without a GPU.

TARGETS = {  # architecture: (triton backend, its name there, warp size, bytes of shared memory a block may have)
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_89": ("cuda", 89, 32, 99 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma",
                "gfx942": "v_mfma"}  # the instruction that shows that matrix units are used


def kernel_variants():
    """name in CONFIGS -> (kernel, its compile-time flags): every kernel that a call can launch."""
    forward = {"forward" + " pair" * pair + " + KL" * kl: (_forward_kernel, {"PAIR": pair, "KL": kl})
               for pair, kl in ((False, False), (True, False), (True, True))}
    gradient = {"gradient" + (f" + {name}" if name != "none" else ""): (_gradient_kernel, {"DIVERGENCE": name})
                for name in ("none", *DIVERGENCES)}
    combine = {"combine": (_combine_kernel, {"PAIR": True, "KL": True})}
    return forward | combine | {"mixture": (_mixture_kernel, {})} | gradient


def compile_variant(name, arch, half, tile=None):
    """-> what the assembler says: registers, spilled and shared bytes, matrix-unit instructions. Needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, flags = kernel_variants()[name]
    n, v, d, warps, stages = tile or CONFIGS[arch]["half" if half else "fp32"][name]
    blocks = {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d}
    constants = flags | {arg: size for arg, size in blocks.items() if arg in kernel.arg_names}
    types = {"student": "*bf16", "teacher": "*bf16", "weight": "*bf16", "out": "*bf16", "targets": "*i64",
             "partials": "*fp32", "whole": "*fp32", "normalisers": "*fp32", "columns": "*fp32", "scale": "fp32"}
    if not half:
        types |= dict.fromkeys(("student", "teacher", "weight", "out"), "*fp32")
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = [i for i, (arg, kind) in enumerate(signature.items())
               if kind.startswith("*") or arg == "D" or arg.startswith("stride")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    backend, chip, warp, limit = TARGETS[arch]
    compiled = triton.compile(source, target=GPUTarget(backend, chip, warp),
                              options={"num_warps": warps, "num_stages": stages})
    read = read_amdgcn if backend == "hip" else read_ptx
    return {"kernel": name, "arch": arch, "dtype": "bf16" if half else "fp32", "tile": [n, v, d], "warps": warps,
            "stages": stages, "shared": compiled.metadata.shared, "shared_limit": limit, **read(compiled.asm, arch)}


def read_ptx(asm, arch):
    from triton.backends.nvidia.compiler import get_ptxas  # the wheel brings two, each for some of the chips

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
    """Every kernel that would be chosen, for every architecture of CONFIGS and both kinds of dtype."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # silences a warning of triton 3.9 about this very default
    jobs = [(name, arch, half) for arch, rows in CONFIGS.items() for half in (True, False) for name in kernel_variants()
            if name in rows["half" if half else "fp32"]]
    return [compile_variant(*job) for job in jobs]


CASES = {  # name: (N, D, V, has a teacher, divergence), fp32
    "logp + entropy, V=49152": (2048, 576, 49152, False, None),
    "gap_gate, V=49152": (2048, 576, 49152, True, None),
    "gap_gate + rkl, V=49152": (2048, 576, 49152, True, "rkl"),
    "gap_gate, V=1024": (4096, 128, 1024, True, None),
    "gap_gate, V=2048": (4096, 128, 2048, True, None),
}
LARGE = {  # the same in bf16, for their memory alone: full logits do not fit
    "Qwen2.5-1.5B, N=8192": (8192, 1536, 151936, True, "rkl"),
    "V=32768": (8192, 256, 32768, True, "rkl"),
    "V=262144": (8192, 256, 262144, True, "rkl"),
    "V=32768, N=16384": (16384, 256, 32768, True, "rkl"),
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


def bench_inputs(shape, dtype=torch.float32, device="cpu"):
    n, d, v, has_teacher, divergence = shape
    rng = torch.Generator(device).manual_seed(0)

    def draw(*size):  # in place, in its own dtype: a wider copy would count as peak memory
        return torch.randn(*size, generator=rng, dtype=dtype, device=device)

    student, teacher = draw(n, d).requires_grad_(), draw(n, d) if has_teacher else None
    weight = draw(v, d).mul_(d**-0.5).requires_grad_()
    return student, teacher, weight, torch.randint(v, (n,), generator=rng, device=device), divergence


def bench_step(path, inputs):
    """Forward and backward of a training loss. Returns loss and norms of the gradients, which all paths must share."""
    inputs[0].grad = inputs[2].grad = None
    logp, entropy, gate, div = PATHS[path](*inputs)
    loss = -(logp if gate is None else gate * logp).mean() - 0.01 * entropy.mean()
    loss = loss if div is None else loss + 0.1 * div.mean()
    loss.backward()
    return loss.item(), inputs[0].grad.norm().item(), inputs[2].grad.norm().item()


def extra_mebibytes(path, case, threads, pipe):
    """In a process of its own: the peak resident size of a step over what it was with the inputs in place; in LARGE
    with as much as the gradients take, too."""
    import resource  # Unix only, which the functions above are not

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
    """Median seconds per path over rounds in turn, after a warm-up in which both paths must agree."""
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


def report_large(rounds, threads):
    """Extra memory in bf16 at sizes whose logits do not fit, beside inputs and gradients: minutes of computing."""
    return [{"case": case, "fused MiB": measure_memory("fused", case, threads)} for case in LARGE]


def gpu_paths():
    """name -> function of bench_inputs; the libraries' paths where they are installed. NLL alone where that is all."""
    def library_nll(student, teacher, weight, targets, divergence):
        options = torch.nn.LinearCrossEntropyOptions()  # in chunks; None is plain logits
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


def report_gpu(rounds, n=8192):
    """Forward and backward on this GPU in bf16: ms, TFLOP/s of the products that the results need, share of a plain
    product's rate in the same run, peak memory beside inputs. A path that runs out of memory says so."""
    rows = []
    for model, (d, v) in QWEN.items():
        inputs = bench_inputs((n, d, v, True, None), torch.bfloat16, "cuda")
        a, b = inputs[0].detach(), inputs[2].detach()
        rate = 2 * n * d * v / triton.testing.do_bench(lambda: a @ b.t()) * 1e3
        for name, path in gpu_paths().items():
            def step():
                inputs[0].grad = inputs[2].grad = None
                logp, entropy, gate, _ = path(*inputs)
                loss = -(logp if gate is None else gate * logp).mean()
                (loss if entropy is None else loss - 0.01 * entropy.mean()).backward()

            products = 3 if name.endswith("NLL") else 4  # student and teacher forward, two backward
            row = {"model": model, "path": name}
            try:
                step()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                torch.cuda.synchronize()
                row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                row["ms"] = triton.testing.do_bench(step, rep=100 * rounds)
                row["TFLOP/s"] = 2 * n * d * v * products / row["ms"] / 1e9
                row["share of a product"] = row["TFLOP/s"] * 1e12 / rate
            except torch.cuda.OutOfMemoryError:
                row["ms"] = "out of memory"
            rows.append(row)
    return rows


REPORTS = ("cpu", "large", "memory", "roofline", "accuracy", "compile", "gpu")  # what measures memory comes first


def print_rows(rows):
    """A table with a column for every key of the rows, in order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def text(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    table = [names, *([text(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def main():
    parser = argparse.ArgumentParser(description="What this machine can tell of these kernels.")
    parser.add_argument("reports", nargs="*", help=f"of {', '.join(REPORTS)} (default: all but large)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps a path, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", help="accuracy of this backend alone, as JSON on standard output")
    parser.add_argument("--out", default="results/kernels.json")
    args = parser.parse_args()
    unknown = set(args.reports) - set(REPORTS)
    if unknown:
        parser.error(f"there is no report {', '.join(sorted(unknown))}: choose of {', '.join(REPORTS)}")
    if args.backend:
        if interpreted():
            mend_interpreter()
        print(json.dumps(report_accuracy(args.backend)))
        return
    wanted = [name for name in REPORTS if name in args.reports or not args.reports and name != "large"]
    out = Path(args.out)
    found = json.loads(out.read_text()) if out.exists() else {}
    run = {
        "accuracy": ("largest errors against fp64 on the same inputs", report_accuracy),
        "memory": ("bytes beside inputs, results and gradients, bf16, computed from the buffers", report_memory),
        "roofline": ("PREDICTION for an H100 at cuBLAS's 798 TFLOP/s, in ms; not measured", report_roofline),
        "compile": ("compiled without a GPU", report_compile),
        "cpu": ("forward and backward against full logits, fp32", lambda: report_cpu(args.rounds, args.threads)),
        "large": ("memory at sizes whose logits do not fit, bf16", lambda: report_large(args.rounds, args.threads)),
        "gpu": ("forward and backward on this GPU, bf16", lambda: report_gpu(args.rounds)),
    }
    missing = {"compile": "triton is not installed" if triton is None else None,
               "gpu": None if torch.cuda.is_available() else "there is no GPU here"}
    for name in wanted:
        title, report = run[name]
        print(f"\n{name}: {title}", flush=True)
        if missing.get(name):
            print(f"  not done: {missing[name]}")
            continue
        rows = report()
        print_rows(rows)
        found[name] = {"command": shlex.join(["python", "kernels.py", *sys.argv[1:]]), "torch": torch.__version__,
                       "triton": None if triton is None else triton.__version__, "machine": platform.machine(),
                       "threads": args.threads, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
