"""Fused LM-head scores for SDAR: log-probability, entropy, teacher gap, gate and divergence without [N, V] logits.

    fused_logprob(hidden, weight, targets)            -> (logp, entropy)
    fused_gap_gate(student, teacher, weight, targets) -> GapGate(logp, teacher_logp, entropy, gap, gate, divergence)

This file needs only torch (2.8 on a GPU), uses triton where it is installed and the tensors are on a GPU, and can be
copied into any trainer. N tokens, D hidden size, V vocabulary, t temperature.

Forward. Student and teacher share the head W. Per token, with target y and logits z = W h / t, zt = W h_T / t:

    s = log_softmax(z)          q = log_softmax(zt)           p = e^s    p_T = e^q    m = log((p + p_T) / 2)
    logp = s_y                  teacher_logp = q_y            entropy = -sum p s
    gap = q_y - s_y             gate = sigmoid(beta gap), or see `gate_values`
    rkl = sum p (s - q)         fkl = sum p_T (q - s)         jsd = (sum p (s - m) + sum p_T (q - m)) / 2

The vocabulary is processed in chunks. A chunk yields per token and side its largest logit, sum e^u and sum e^u u with
u = z - largest, and for the two KLs sum e^u (u - u_T) and sum e^u_T (u_T - u). `merge` combines chunks by shifting all
of them to the largest logit of any. Since all sums are relative to it, no precision is lost where logits are far from
zero. jsd needs both normalisers first, and so a second pass.

Backward. Teacher, gap and gate are constants. For upstream gradients g_* of the other outputs, the gradient of the
logits is a sum of terms, each of which sums to zero over the vocabulary:

    dz = g_logp (onehot_y - p)  -  g_ent p (s + entropy)  +  g_div dD
    dD = p (s - q - rkl)   |   p - p_T   |   p (s - m - A) / 2,  A = sum p (s - m)              for rkl | fkl | jsd
    dh = dz W / t               dW = dz^T h / t                                     from the student's side alone

onehot - p is formed in fp32, and dz is rounded once, to the dtype that is multiplied. The chunks are processed again,
with dz of one chunk at a time in a buffer: its part of dW is written once, and dh is summed in fp32. The teacher's
logits are recomputed only for a divergence.

Memory. Besides results and gradients: buffers of one vocabulary chunk by one token chunk, the fp32 sums of dh, a few
numbers per token; nothing grows with V. On CPUs the first chunks' logits are kept for the backward pass while they fit
in KEEP_BYTES. Ignored tokens are dropped before the first product: they cost nothing, give zeros, and may hold NaN.

Limits. Arithmetic is fp32 (fp64, by torch alone, where student or weight is). Hidden states are promoted to the dtype
of a wider weight. Products of half-precision operands are summed in fp32; on CPUs, where they are slow, each chunk is
copied to fp32. fp16 dz may underflow without loss scaling. Only first derivatives. Exclude calls from torch.compile.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it, and the torch backend does not need it
    triton = None

IGNORE = -100  # the target that torch.nn.functional.cross_entropy ignores
GATES = ("gap", "entropy", "soft_or", "none")
DIVERGENCES = ("rkl", "fkl", "jsd")
GPU_CHUNK = 8192  # tokens, and vocabulary columns, per chunk on a GPU: fills it, and a chunk has 32-bit offsets
MAX_STRIPS = 64  # parts of the vocabulary whose statistics triton computes in parallel
KEEP_BYTES = 7 * 2**25  # 224 MiB of logits may be kept from forward to backward on a CPU


class GapGate(NamedTuple):
    """What SDAR needs for each token, all [N]; zeros where the target is ignored."""

    logp: Tensor  # student's log-probability of the target; differentiable
    teacher_logp: Tensor  # teacher's; constant
    entropy: Tensor  # of the student's distribution, in nats; differentiable
    gap: Tensor  # teacher_logp - logp; constant
    gate: Tensor  # see `gate_values`; constant
    divergence: Tensor | None  # between the two distributions; differentiable; None unless requested


def fused_logprob(hidden, weight, targets, *, temperature=1.0, backend="auto"):
    """Log-probability of each target, and entropy, of softmax(hidden @ weight.T / temperature).

    hidden [N, D] and weight [V, D]: floating point, any strides. targets [N]: int64 in 0..V-1, or -100 = ignore.
    temperature: 1e-12..1e12. backend: "auto", "triton" or "torch", see `choose_backend`.
    Returns (logp, entropy in nats), each [N] in fp32 (fp64 where an input is), differentiable w.r.t. hidden and weight.
    Raises ValueError or TypeError on inputs that don't fit together.
    """
    check_inputs({"hidden": hidden}, weight, targets, temperature)
    logp, entropy, _, _ = head_scores(hidden, None, weight, targets, temperature, None, backend)
    return logp, entropy


def fused_gap_gate(student, teacher, weight, targets, *, beta=5.0, gate="gap", temperature=1.0, divergence=None,
                   backend="auto"):
    """Student's and teacher's view of the same targets under one head: SDAR's equation (4) and its relatives.

    student, teacher [N, D]: hidden states without and with the privileged context; dtypes may differ. weight, targets,
    temperature, backend: as in `fused_logprob`. gate: "gap" | "entropy" | "soft_or" | "none". divergence: None, "rkl" =
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
    logp, entropy, teacher_logp, div = head_scores(student, teacher.detach(), weight, targets, temperature, divergence,
                                                   backend)
    gap = teacher_logp - logp.detach()
    gates = gate_values(gate, gap, entropy.detach(), beta).masked_fill(targets == IGNORE, 0)
    return GapGate(logp, teacher_logp, entropy, gap, gates, div)


def gate_values(gate, gap, entropy, beta):
    """gap, entropy [N] -> gate [N]: trust the teacher where it prefers the token ("gap"), where the student is unsure
    ("entropy"), where either holds ("soft_or", the OR of probabilities), or always ("none").
    """
    if gate == "gap":
        return torch.sigmoid(beta * gap)
    if gate == "entropy":
        return torch.sigmoid(beta * entropy)
    if gate == "soft_or":
        return torch.sigmoid(beta * (1 - (1 - entropy) * (1 - gap)))
    return torch.ones_like(gap)


def check_inputs(hiddens, weight, targets, temperature):
    """Raises an error of one sentence for whatever does not fit. hiddens: argument name -> tensor."""
    for name, x in {**hiddens, "weight": weight}.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:
            raise TypeError(f"{name} must be a 2-D floating-point tensor, got {describe(x)}")
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() != 1:
        raise TypeError(f"targets must be a 1-D int64 tensor, got {describe(targets)}")
    for name, x in {**hiddens, "targets": targets}.items():
        if x.device != weight.device:
            raise ValueError(f"{name} is on {x.device} but weight is on {weight.device}; move them to one device")
    if len(weight) == 0:
        raise ValueError(f"weight needs a row per vocabulary entry, got shape {tuple(weight.shape)}")
    shape = len(targets), weight.shape[1]
    for name, x in hiddens.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but targets of length {len(targets)} and weight of "
                             f"shape {tuple(weight.shape)} ask for {shape}")
    if not 1e-12 <= temperature <= 1e12:  # beyond, scaled logits pass LOWEST or fp32's limits
        raise ValueError(f"temperature must lie in 1e-12..1e12, got {temperature}")
    wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= len(weight)))]
    if len(wrong):
        raise ValueError(f"targets must be {IGNORE} or lie in 0..{len(weight) - 1}, got {wrong[:5].tolist()}")


def describe(x):
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def choose_backend(backend, student, weight):
    """The name of the backend that runs for these tensors; "auto" is triton wherever it can run, on a GPU.
    Raises ValueError, with the reason, if the named backend can't run them."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    reason = None
    if triton is None:
        reason = "triton is not installed (pip install triton)"
    elif not weight.is_cuda and not interpreted():
        reason = f"the tensors are on {weight.device} (only the interpreter, TRITON_INTERPRET=1, runs there)"
    elif weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] < 8:
        reason = "the GPU is older than sm_80"
    elif torch.float64 in (student.dtype, weight.dtype):
        reason = "it computes in fp32 and a tensor is fp64"
    if backend == "triton" and reason:
        raise ValueError(f'backend="triton" cannot run here: {reason}; use backend="torch" or "auto"')
    if backend == "auto":
        return "torch" if reason or not weight.is_cuda else "triton"
    return backend


def interpreted():
    """Whether triton runs kernels in Python, which works on any machine."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ------------------------------------------------------------------------------------- one forward, one backward pass


class Problem(NamedTuple):
    """What a backend sees: no ignored tokens, hidden states of a dtype at least as wide as the weight's."""

    student: Tensor  # [n, D]
    teacher: Tensor | None  # [n, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [n]
    scale: float  # 1 / temperature
    divergence: str | None
    dtype: torch.dtype  # of all sums and results


class Scores(NamedTuple):
    """Per token, all [n]: what the results and the gradient are made of."""

    logp: Tensor
    entropy: Tensor
    top: Tensor  # largest of the student's logits
    log_sum: Tensor  # s = (z - top) - log_sum; top + log_sum would lose digits where logits are far from zero
    teacher_logp: Tensor | None = None
    teacher_top: Tensor | None = None
    teacher_log_sum: Tensor | None = None
    divergence: Tensor | None = None
    centre: Tensor | None = None  # the mean that dD subtracts: rkl for rkl, sum p (s - m) for jsd


class Backend(NamedTuple):
    forward: Callable  # (problem, bytes of logits that it may keep) -> (Scores, kept logits)
    gradient: Callable  # (problem, scores, upstream gradients, kept logits) -> (rows, columns, w) -> dz of a chunk


def head_scores(student, teacher, weight, targets, temperature, divergence, backend):
    """-> logp, entropy, teacher_logp, divergence, all [N]; the last two are None where there is none.

    Autocast, which would round the sums, is off; triton's kernels run on the current device, so it is the weight's."""
    chosen = BACKENDS[choose_backend(backend, student, weight)]
    keep = torch.is_grad_enabled() and (student.requires_grad or weight.requires_grad)
    with torch.autocast(weight.device.type, enabled=False), torch.cuda.device_of(weight):
        return HeadScores.apply(student, weight, teacher, targets, 1.0 / temperature, divergence, chosen, keep)


class HeadScores(torch.autograd.Function):
    """The two passes over the vocabulary. A backend gives the forward one, and dz of each chunk of the backward one."""

    @staticmethod
    def forward(ctx, student, weight, teacher, targets, scale, divergence, backend, keep):
        real = targets != IGNORE
        rows = None if bool(real.all()) else real.nonzero().squeeze(1)  # None: all rows, without a copy
        problem = without_ignored(student, teacher, weight, targets, rows, scale, divergence)
        scores, kept = backend.forward(problem, KEEP_BYTES if keep and not weight.is_cuda else 0)
        kept_logits = [logits for both_sides in kept.values() for logits in both_sides]
        ctx.save_for_backward(student, weight, teacher if divergence else None, targets, rows, *scores, *kept_logits)
        ctx.constants = scale, divergence, backend, list(kept)
        ctx.set_materialize_grads(False)
        results = (scores.logp, scores.entropy, scores.teacher_logp, scores.divergence)
        logp, entropy, teacher_logp, div = (scatter_rows(x, rows, len(targets)) for x in results)
        if teacher is not None:
            ctx.mark_non_differentiable(teacher_logp)
        return logp, entropy, teacher_logp, div

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy, _, g_div):
        student, weight, teacher, targets, rows, *saved = ctx.saved_tensors
        scale, divergence, backend, places = ctx.constants
        scores, logits = Scores(*saved[: len(Scores._fields)]), saved[len(Scores._fields) :]
        kept = dict(zip(places, zip(logits[::2], logits[1::2])))
        divergence = None if g_div is None else divergence
        problem = without_ignored(student, teacher if divergence else None, weight, targets, rows, scale, divergence)
        upstream = [x if x is None or rows is None else x[rows] for x in (g_logp, g_entropy, g_div)]
        d_student, d_weight = gradients(problem, scores, upstream, kept, backend, *ctx.needs_input_grad[:2])
        if d_student is not None:
            d_student = scatter_rows(d_student.to(student.dtype), rows, len(targets))
        return d_student, d_weight, None, None, None, None, None, None


def without_ignored(student, teacher, weight, targets, rows, scale, divergence):
    """The Problem of the tokens `rows`, or of all where that is None."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, weight.dtype), torch.float32)

    def gather(hidden):
        hidden = hidden if rows is None else hidden[rows]
        fp64 = hidden.dtype == torch.float64  # of a teacher beside an fp32 student: rounded
        return row_major(hidden.to(dtype if fp64 else torch.promote_types(hidden.dtype, weight.dtype)))

    student, teacher = gather(student), None if teacher is None else gather(teacher)
    targets = (targets if rows is None else targets[rows]).contiguous()  # triton's kernels know no stride of it
    return Problem(student, teacher, row_major(weight), targets, scale, divergence, dtype)


def row_major(x):
    return x if x.stride(1) == 1 else x.contiguous()


def scatter_rows(values, rows, count):
    """[n, ...] -> [count, ...]: back to all tokens, with zeros where the target is ignored."""
    if values is None or rows is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)


def slices(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def chunk_sizes(problem):
    """(tokens, vocabulary columns) of a chunk; on a CPU one that stays in its caches."""
    n, vocab = len(problem.targets), len(problem.weight)
    if problem.weight.is_cuda:
        return max(1, min(n, GPU_CHUNK)), min(vocab, GPU_CHUNK)
    columns = min(vocab, 4096)
    return max(1, min(n, max(256, 2**20 // columns))), columns


def operand_dtype(problem):
    """What is multiplied: the hidden states' own dtype on a GPU; at least fp32 on a CPU, where halves are slow."""
    return problem.student.dtype if problem.weight.is_cuda else problem.dtype


def accumulate(out, a, b, scale, beta):
    """out = beta out + scale a b, summed in out's dtype even where that is wider than the dtype of a and b."""
    wider = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, beta=beta, alpha=scale, out=out, **wider)


def gradients(problem, scores, upstream, kept, backend, want_student, want_weight):
    """-> (d_student [n, D] in problem.dtype, d_weight [V, D] in the weight's), None where not wanted."""
    student, weight = problem.student, problem.weight
    token_chunk, vocab_chunk = chunk_sizes(problem)
    d_student = student.new_zeros(student.shape, dtype=problem.dtype) if want_student else None
    d_weight = (torch.empty_like if len(student) else torch.zeros_like)(weight) if want_weight else None
    part = None  # the sums of one chunk of d_weight, where d_weight's own dtype is too narrow to sum in
    one_product = token_chunk >= len(student) and operand_dtype(problem) == weight.dtype  # it sums in fp32 by itself
    if want_weight and weight.dtype != problem.dtype and not one_product:
        part = weight.new_empty(vocab_chunk, weight.shape[1], dtype=problem.dtype)
    gradient_of = backend.gradient(problem, scores, upstream, kept)
    for columns in slices(len(weight), vocab_chunk):
        w = weight[columns].to(operand_dtype(problem))  # [c, D]
        for rows in slices(len(student), token_chunk):
            dz = gradient_of(rows, columns, w)  # [r, c]
            if want_student:
                accumulate(d_student[rows], dz, w, problem.scale, 1)
            if want_weight:
                d_w = d_weight[columns] if part is None else part[: len(w)]
                accumulate(d_w, dz.t(), student[rows].to(w.dtype), problem.scale, 1 if rows.start else 0)
        if part is not None and len(student):
            d_weight[columns] = part[: len(w)]
    return d_student, d_weight


# ------------------------------------------------------------------------------- torch backend, and the specification
#
# A statistic is one number per token, [n]. STUDENT are those of the student's logits z of a part of the vocabulary,
# TEACHER those of the teacher's zt, CROSS those of both KLs, with u = z - m and u_T = zt - m_T.

STUDENT = ("m", "s", "e", "zy")  # max z, sum e^u, sum e^u u, z of the target (0 where it is in another part)
TEACHER = ("m_T", "s_T", "zy_T")
CROSS = ("r", "f")  # sum e^u (u - u_T), sum e^u_T (u_T - u)


def fields_of(problem):
    """The names of the statistics that a problem needs, in the order in which they are stored."""
    return STUDENT + TEACHER * (problem.teacher is not None) + CROSS * (problem.divergence in ("rkl", "fkl"))


def locate(y, columns):
    """Targets y [r] -> whether each is one of a chunk's columns, and a valid column for each, both [r, 1]."""
    y = y[:, None]
    return (y >= 0) & (y < columns), y.clamp(0, columns - 1)


def chunk_statistics(z, zt, y, fields, scratch):
    """Logits [r, c] of a chunk, its targets y [r] (elsewhere: outside 0..c-1) -> statistics [fields, r].

    Specification of `_forward_kernel`. scratch: two buffers like z, since allocating them costs more than the sums.
    """
    a, b = scratch
    here, at = locate(y, z.shape[1])

    def of_target(logits):
        return torch.where(here, logits.gather(1, at), 0)[:, 0]

    m = z.amax(1)
    u = torch.sub(z, m[:, None], out=a)
    p = torch.exp(u, out=b)
    found = [m, p.sum(1), torch.linalg.vecdot(p, u), of_target(z)]
    if "m_T" not in fields:
        return torch.stack(found)
    m_t = zt.amax(1)
    if "r" in fields:
        difference = u.sub_(zt).add_(m_t[:, None])  # u - u_T
        r = torch.linalg.vecdot(p, difference)
    p_t = torch.sub(zt, m_t[:, None], out=b).exp_()
    found += [m_t, p_t.sum(1), of_target(zt)]
    if "r" in fields:
        found += [r, -torch.linalg.vecdot(p_t, difference)]
    return torch.stack(found)


def merge(parts, fields):
    """Statistics [fields, parts, n] of parts of the vocabulary -> of all of it, [fields, n]."""
    x = dict(zip(fields, parts))
    m = x["m"].amax(0)
    moved = x["m"] - m  # [parts, n], <= 0: by how much every u of a part changes
    down = moved.exp()
    whole = {"m": m, "s": (down * x["s"]).sum(0), "zy": x["zy"].sum(0)}
    whole["e"] = (down * (x["e"] + x["s"] * moved)).sum(0)
    if "m_T" in fields:
        m_t = x["m_T"].amax(0)
        moved_t = x["m_T"] - m_t
        down_t = moved_t.exp()
        whole |= {"m_T": m_t, "s_T": (down_t * x["s_T"]).sum(0), "zy_T": x["zy_T"].sum(0)}
    if "r" in fields:
        apart = moved - moved_t  # by how much every u - u_T changes
        whole["r"] = (down * (x["r"] + x["s"] * apart)).sum(0)
        whole["f"] = (down_t * (x["f"] - x["s_T"] * apart)).sum(0)
    return torch.stack([whole[name] for name in fields])


def finish(statistics, fields, divergence, mixture=None):
    """Statistics of the whole vocabulary [fields, n] -> Scores.

    mixture: (sum p (s - m), sum p_T (q - m)), each [n]; without it jsd is left out.
    """
    x = dict(zip(fields, statistics))
    log_s = x["s"].log()
    logp, entropy = (x["zy"] - x["m"]) - log_s, log_s - x["e"] / x["s"]
    if "m_T" not in fields:
        return Scores(logp, entropy, x["m"], log_s)
    log_s_t = x["s_T"].log()
    teacher_logp = (x["zy_T"] - x["m_T"]) - log_s_t
    value = centre = None
    if divergence == "rkl":
        value = centre = x["r"] / x["s"] - log_s + log_s_t
    elif divergence == "fkl":
        value = x["f"] / x["s_T"] - log_s_t + log_s
    elif mixture is not None:
        value, centre = (mixture[0] + mixture[1]) / 2, mixture[0]
    return Scores(logp, entropy, x["m"], log_s, teacher_logp, x["m_T"], log_s_t, value, centre)


def log_probs(logits, top, log_sum, out):
    return torch.sub(logits, top[:, None], out=out).sub_(log_sum[:, None])


def mixture_statistics(z, zt, scores, scratch):
    """Logits [r, c] -> (sum p (s - m), sum p_T (q - m)) [2, r] of a chunk. Specification of `_mixture_kernel`."""
    s = log_probs(z, scores.top, scores.log_sum, scratch[0])
    q = log_probs(zt, scores.teacher_top, scores.teacher_log_sum, scratch[1])
    d = q - s
    student = torch.linalg.vecdot(above_mean(d), s.exp_())
    return torch.stack([student, torch.linalg.vecdot(above_mean(d.neg_()), q.exp_())])


def above_mean(d):
    """s - m from d = q - s: how far a log-probability s lies above log((e^s + e^q) / 2)."""
    return F.softplus(d).neg_().add_(math.log(2))


def chunk_gradient(z, zt, y, scores, upstream, divergence, out):
    """dz [r, c] of a chunk into `out`, from logits [r, c] and scores [r]. Specification of `_gradient_kernel`.

    y [r]: targets counted from the chunk's first column. upstream: (g_logp, g_ent, g_div) [r], None where none flows.
    """
    g_logp, g_ent, g_div = (x if x is None else x[:, None] for x in upstream)
    entropy = scores.entropy[:, None]
    s = log_probs(z, scores.top, scores.log_sum, out)
    p = s.exp()
    level, slope = torch.zeros_like(entropy), None  # dz = p (level + slope s + ...) + ..., both [r, 1]
    if g_logp is not None:
        level = level - g_logp
    if g_ent is not None:
        level, slope = level - g_ent * entropy, -g_ent
    if divergence:
        q = log_probs(zt, scores.teacher_top, scores.teacher_log_sum, torch.empty_like(zt))
    if divergence == "rkl":
        level, slope = level - g_div * scores.centre[:, None], g_div if slope is None else slope + g_div
    if divergence == "fkl":
        level = level + g_div
    if divergence == "jsd":
        above = above_mean(q.sub_(s)).sub_(scores.centre[:, None])
        level = torch.addcmul(level, g_div, above, value=0.5)  # [r, c] from here on
    factor = level if slope is None else torch.addcmul(level, slope, s, out=out)
    if divergence == "rkl":
        factor.addcmul_(g_div, q, value=-1)
    dz = torch.mul(p, factor, out=out)
    if divergence == "fkl":
        dz.addcmul_(g_div, q.exp_(), value=-1)
    if g_logp is not None:
        here, at = locate(y, z.shape[1])
        dz.scatter_add_(1, at, torch.where(here, g_logp, 0))
    return dz


class Workspace:
    """Logits of one chunk at a time: kept ones, or new ones in buffers that all chunks share."""

    def __init__(self, problem, kept=None):
        self.problem, self.kept, self.buffers = problem, {} if kept is None else kept, {}

    def buffer(self, name, rows, columns):
        """[rows, columns] of problem.dtype, with the contents that the last use of this name left."""
        if name not in self.buffers:
            size = math.prod(chunk_sizes(self.problem))
            self.buffers[name] = self.problem.weight.new_empty(size, dtype=self.problem.dtype)
        return self.buffers[name][: rows * columns].view(rows, columns)

    def logits(self, hidden, w, name):
        z = self.buffer(name, len(hidden), len(w))
        accumulate(z, hidden.to(w.dtype), w.t(), self.problem.scale, 0)
        return z

    def pair(self, rows, columns, w):
        """-> student's and teacher's logits [r, c], the latter None without a teacher."""
        if (rows.start, columns.start) in self.kept:
            return self.kept[rows.start, columns.start]
        z = self.logits(self.problem.student[rows], w, "z")
        return z, None if self.problem.teacher is None else self.logits(self.problem.teacher[rows], w, "zt")

    def chunks(self):
        """Yields (rows, columns, z, zt, two scratch buffers like z) for every chunk, token chunks fastest."""
        token_chunk, vocab_chunk = chunk_sizes(self.problem)
        for columns in slices(len(self.problem.weight), vocab_chunk):
            w = self.problem.weight[columns].to(operand_dtype(self.problem))
            for rows in slices(len(self.problem.targets), token_chunk):
                z, zt = self.pair(rows, columns, w)
                yield rows, columns, z, zt, (self.buffer("a", *z.shape), self.buffer("b", *z.shape))


def select(scores, rows):
    return Scores(*(x if x is None else x[rows] for x in scores))


def torch_forward(problem, keep_bytes):
    """-> (Scores, {(first row, first column): logits of a chunk} kept for the backward pass)."""
    fields, work = fields_of(problem), Workspace(problem)
    whole = problem.weight.new_ones(len(fields), len(problem.targets), dtype=problem.dtype)
    for rows, columns, z, zt, scratch in work.chunks():
        found = chunk_statistics(z, zt, problem.targets[rows] - columns.start, fields, scratch)
        if columns.start:  # merge with all chunks so far, so that memory does not grow with V
            found = merge(torch.stack([whole[:, rows], found], 1), fields)
        whole[:, rows] = found
        keep_bytes -= z.nbytes * (2 if problem.divergence else 1)
        if keep_bytes >= 0:
            work.kept[rows.start, columns.start] = z.clone(), zt.clone() if problem.divergence else None
    scores = finish(whole, fields, problem.divergence)
    if problem.divergence != "jsd":
        return scores, work.kept
    mixture = torch.zeros_like(whole[:2])
    for rows, _, z, zt, scratch in work.chunks():
        mixture[:, rows] += mixture_statistics(z, zt, select(scores, rows), scratch)
    return finish(whole, fields, "jsd", mixture), work.kept


def torch_gradient(problem, scores, upstream, kept):
    """-> a function of (rows, columns, w) that gives dz [r, c] of a chunk."""
    work = Workspace(problem, kept)

    def gradient_of(rows, columns, w):
        z, zt = work.pair(rows, columns, w)
        parts = [x if x is None else x[rows] for x in upstream]
        y = problem.targets[rows] - columns.start
        dz = chunk_gradient(z, zt, y, select(scores, rows), parts, problem.divergence, work.buffer("dz", *z.shape))
        return dz.to(w.dtype)

    return gradient_of


# -------------------------------------------------------------------------------------------------- triton backend
#
# No atomics, and each element is written by one program, so that two runs are bit-equal. A tile of 128 x 256 leaves few
# registers: hence few masks, a kernel of its own for the target's logit, and exp2, one instruction where exp has more.

if triton is not None:
    LN2 = tl.constexpr(math.log(2))
    LOG2E = tl.constexpr(1 / math.log(2))
    LOWEST = tl.constexpr(-1e20)  # below every product; minus infinity would make NaN of 0 * inf
    GROUP = tl.constexpr(16)  # blocks of tokens whose hidden states stay in L2 while the vocabulary passes

    @triton.jit
    def _row(pointer, rows, stride):
        """Pointers to the beginning of rows, [n, 1]; in 64 bits, since 20,000 rows of 151,936 are beyond 32."""
        return pointer + rows[:, None].to(tl.int64) * stride

    @triton.jit
    def _column(table, field, rows, N):
        """table[field, rows] of a table [fields, N], as a column [n, 1]; rows beyond N repeat the last one."""
        return tl.load(table + tl.minimum(rows, N - 1) + field * tl.cast(N, tl.int64))[:, None]

    @triton.jit
    def _store(partials, field, values, rows, strip, strips, N):
        """partials[field, strip, rows] = values, of partials [fields, strips, N]."""
        tl.store(partials + (field * strips + strip).to(tl.int64) * N + rows, values, mask=rows < N)

    @triton.jit
    def _place(N, BLOCK_N: tl.constexpr):
        """-> this program's rows, its part of the vocabulary, and how many parts there are: GROUP blocks of rows by all
        parts, rows fastest, then the next GROUP. All on axis 0, which alone has no limit of 65,535."""
        blocks = tl.cdiv(N, BLOCK_N)
        parts = tl.num_programs(0) // blocks
        first = tl.program_id(0) // (GROUP * parts) * GROUP
        size = tl.minimum(blocks - first, GROUP)
        rest = tl.program_id(0) - first * parts
        return (first + rest % size) * BLOCK_N + tl.arange(0, BLOCK_N), rest // size, parts

    @triton.jit
    def _load(pointers, d, D, BLOCK_D: tl.constexpr):
        """Elements d to d + BLOCK_D - 1 of rows, zeros beyond D."""
        return tl.load(pointers + d, mask=tl.arange(0, BLOCK_D)[None, :] < D - d, other=0.0)

    @triton.jit
    def _products(student, teacher, weight, rows, first, N, D, V, stride_s, stride_t, stride_w, PAIR: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """Products of student and teacher with BLOCK_V columns of the vocabulary from `first` on, both
        [BLOCK_N, BLOCK_V] in fp32; LOWEST beyond V. Without PAIR the teacher's are zeros, which the compiler removes.
        Each tile of the weight is loaded once. Rows and columns beyond the end repeat the last one: no mask is needed.
        """
        cols = first + tl.arange(0, BLOCK_V)
        depth = tl.arange(0, BLOCK_D)[None, :]
        z, zt = tl.zeros((BLOCK_N, BLOCK_V), tl.float32), tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        s_at = _row(student, tl.minimum(rows, N - 1), stride_s) + depth
        t_at = _row(teacher, tl.minimum(rows, N - 1), stride_t) + depth
        w_at = _row(weight, tl.minimum(cols, V - 1), stride_w) + depth
        for d in range(0, D, BLOCK_D):
            s = _load(s_at, d, D, BLOCK_D)
            w = tl.trans(_load(w_at, d, D, BLOCK_D))
            z = tl.dot(s, w.to(s.dtype), z, input_precision=PRECISION)
            if PAIR:
                t = _load(t_at, d, D, BLOCK_D)
                zt = tl.dot(t, w.to(t.dtype), zt, input_precision=PRECISION)
        if first + BLOCK_V > V:
            z = tl.where(cols[None, :] < V, z, LOWEST)
            zt = tl.where(cols[None, :] < V, zt, LOWEST)
        return z, zt

    @triton.jit
    def _powers(z, m, scale):
        """A tile of products, and the largest logit before it -> the new largest, u = log2(e) (logit - largest), 2^u;
        and what that does to the sums before: what is added to each u, and the factor of each 2^u."""
        top = tl.maximum(m, tl.max(z, 1) * scale)
        u = (z * scale - top[:, None]) * LOG2E
        moved = (m - top) * LOG2E
        return top, u, tl.exp2(u), moved, tl.exp2(moved)

    @triton.jit
    def _forward_kernel(student, teacher, weight, partials, N, D, V, tiles, stride_s, stride_t, stride_w, scale,
                        PASS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                        BLOCK_D: tl.constexpr):
        """`chunk_statistics` except zy of each strip of `tiles` tiles, partials [fields, strips, N].
        PASS: "pair"; or one side, "student" or "teacher", whose hidden states are `student`."""
        rows, strip, strips = _place(N, BLOCK_N)
        m, s = tl.full((BLOCK_N,), LOWEST, tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        mt, st, e, r, f = m, s, s, s, s
        for tile in range(strip * tiles, tl.minimum((strip + 1) * tiles, tl.cdiv(V, BLOCK_V))):
            z, zt = _products(student, teacher, weight, rows, tile * BLOCK_V, N, D, V, stride_s, stride_t, stride_w,
                              PASS == "pair", PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            m, u, p, moved, down = _powers(z, m, scale)
            if PASS == "pair":
                mt, ut, pt, moved_t, down_t = _powers(zt, mt, scale)
                r = down * (r + s * (moved - moved_t)) + tl.sum(p * (u - ut), 1)
                f = down_t * (f - st * (moved - moved_t)) + tl.sum(pt * (ut - u), 1)
                st = down_t * st + tl.sum(pt, 1)
            if PASS != "teacher":
                e = down * (e + s * moved) + tl.sum(p * u, 1)
            s = down * s + tl.sum(p, 1)
        _store(partials, 0, m, rows, strip, strips, N)
        _store(partials, 1, s, rows, strip, strips, N)
        if PASS != "teacher":
            _store(partials, 2, e * LN2, rows, strip, strips, N)
        if PASS == "pair":
            _store(partials, 4, mt, rows, strip, strips, N)
            _store(partials, 5, st, rows, strip, strips, N)
            _store(partials, 7, r * LN2, rows, strip, strips, N)
            _store(partials, 8, f * LN2, rows, strip, strips, N)

    @triton.jit
    def _target_kernel(hidden, weight, targets, out, N, D, stride_h, stride_w, scale, BLOCK_N: tl.constexpr,
                       BLOCK_D: tl.constexpr):
        """out [N]: the logit of each target."""
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        y = tl.load(targets + rows, mask=rows < N, other=0)
        h_at = _row(hidden, tl.minimum(rows, N - 1), stride_h) + tl.arange(0, BLOCK_D)[None, :]
        w_at = _row(weight, y, stride_w) + tl.arange(0, BLOCK_D)[None, :]
        z = tl.zeros((BLOCK_N,), tl.float32)
        for d in range(0, D, BLOCK_D):
            h, w = _load(h_at, d, D, BLOCK_D), _load(w_at, d, D, BLOCK_D)
            z += tl.sum(h.to(tl.float32) * w.to(tl.float32), 1)
        tl.store(out + rows, z * scale, mask=rows < N)

    @triton.jit
    def _log2_probs(z, table, field, rows, N, scale):
        """log2 of the probabilities that products z give; top and log_sum are fields of a table [fields, N]."""
        top, log_sum = _column(table, field, rows, N), _column(table, field + 1, rows, N)
        return (z * scale - top) * LOG2E - log_sum * LOG2E

    @triton.jit
    def _mixture_kernel(student, teacher, weight, partials, per_token, N, D, V, tiles, stride_s, stride_t, stride_w,
                        scale, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                        BLOCK_D: tl.constexpr):
        """`mixture_statistics` of each strip, partials [2, strips, N]; per_token [4, N]: both's top and log_sum."""
        rows, strip, strips = _place(N, BLOCK_N)
        of_student, of_teacher = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for tile in range(strip * tiles, tl.minimum((strip + 1) * tiles, tl.cdiv(V, BLOCK_V))):
            z, zt = _products(student, teacher, weight, rows, tile * BLOCK_V, N, D, V, stride_s, stride_t, stride_w,
                              True, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            s, q = _log2_probs(z, per_token, 0, rows, N, scale), _log2_probs(zt, per_token, 2, rows, N, scale)
            d = q - s
            lower = 1.0 - tl.log2(1.0 + tl.exp2(-tl.abs(d)))  # the smaller of both, above the mean
            p, pt = tl.exp2(s), tl.exp2(q)
            of_student += tl.sum(p * (lower - tl.maximum(d, 0.0)), 1)
            of_teacher += tl.sum(pt * (lower + tl.minimum(d, 0.0)), 1)
        _store(partials, 0, of_student * LN2, rows, strip, strips, N)
        _store(partials, 1, of_teacher * LN2, rows, strip, strips, N)

    @triton.jit
    def _gradient_kernel(student, teacher, weight, out, stride_out, per_token, targets, N, D, V, first, stride_s,
                         stride_t, stride_w, scale, DIVERGENCE: tl.constexpr, PRECISION: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
        """`chunk_gradient`: dz of a chunk whose first column is `first`, in whole tiles. per_token [5 or 9, N]: top,
        log_sum, entropy, g_logp, g_ent; for a divergence also the teacher's top and log_sum, centre, g_div."""
        rows, part, _ = _place(N, BLOCK_N)
        cols = part * BLOCK_V + tl.arange(0, BLOCK_V)
        z, zt = _products(student, teacher, weight, rows, part * BLOCK_V, N, D, V, stride_s, stride_t, stride_w,
                          DIVERGENCE != "none", PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
        s = _log2_probs(z, per_token, 0, rows, N, scale)
        p, entropy = tl.exp2(s), _column(per_token, 2, rows, N)
        g_logp, g_ent = _column(per_token, 3, rows, N), _column(per_token, 4, rows, N)
        dz = p * ((-g_logp - g_ent * entropy) - (g_ent * LN2) * s)
        if DIVERGENCE != "none":
            q = _log2_probs(zt, per_token, 5, rows, N, scale)
            centre, g_div = _column(per_token, 7, rows, N), _column(per_token, 8, rows, N)
        if DIVERGENCE == "rkl":
            dz += p * ((g_div * LN2) * (s - q) - g_div * centre)
        if DIVERGENCE == "fkl":
            dz += g_div * (p - tl.exp2(q))
        if DIVERGENCE == "jsd":
            above = 1.0 - tl.maximum(q - s, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(q - s)))  # log2 of p over the mean
            dz += (0.5 * g_div) * (p * (above * LN2 - centre))
        y = tl.load(targets + tl.minimum(rows, N - 1)).to(tl.int32) - first - part * BLOCK_V
        dz = tl.where(tl.arange(0, BLOCK_V)[None, :] == y[:, None], dz + g_logp, dz)
        tl.store(out + rows[:, None] * stride_out + cols[None, :], dz.to(out.dtype.element_ty))


class Tile(NamedTuple):
    """The work of one program: rows (tokens) x cols (of the vocabulary), `depth` of D per step of the inner loop."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    precision: str = "ieee"  # of fp32 products; "tf32x3" sums three products of tensor cores, nearly as exact


# The largest tiles found that triton 3.6 and 3.9 compile without spills (`python -m tools.bench_kernels compile`).
# A dtype has a single depth: both passes must sum a logit in the same order, or else p would not sum to 1.
TILES = {  # the oldest architecture that has them: for kernels that read one side, and both; the same in fp32
    "sm_80": (Tile(128, 256, 32, 8, 4), Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 8, 2), Tile(32, 64, 32, 8, 2)),
    "sm_90": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 3, "tf32x3"),
              Tile(128, 64, 32, 8, 3, "tf32x3")),
    "gfx942": (Tile(128, 256, 64, 8, 2), Tile(128, 128, 64, 8, 2), Tile(128, 128, 32, 8, 2), Tile(128, 64, 32, 8, 2)),
}


def tile_for(problem, pair):
    """The tile of a kernel that reads one side or, with `pair`, both. A single fp32 operand makes products fp32."""
    device, architecture = problem.weight.device, "sm_80"  # in the interpreter: any
    if device.type == "cuda":  # a consumer's Blackwell, 12, has the shared memory and the instructions of 8
        hopper = torch.cuda.get_device_capability(device)[0] in (9, 10)
        architecture = "gfx942" if torch.version.hip else "sm_90" if hopper else "sm_80"
    fp32 = torch.float32 in [x.dtype for x in (problem.student, problem.teacher) if x is not None]
    return TILES[architecture][2 * fp32 + pair]


def launch(kernel, problem, tile, parts, arguments, integer, **flags):
    """Runs a kernel on (blocks of tokens) x (parts of the vocabulary) programs. arguments: those between weight and N;
    integer: the one after N, D, V."""
    student, weight = problem.student, problem.weight
    teacher = student if problem.teacher is None else problem.teacher  # never read where there is none
    kernel[(triton.cdiv(len(student), tile.rows) * parts,)](
        student, teacher, weight, *arguments, len(student), student.shape[1], len(weight), integer,
        student.stride(0), teacher.stride(0), weight.stride(0), problem.scale, **flags, PRECISION=tile.precision,
        BLOCK_N=tile.rows, BLOCK_V=tile.cols, BLOCK_D=tile.depth, num_warps=tile.warps, num_stages=tile.stages)


def by_strips(kernel, problem, pair, fields, *tensors, **flags):
    """What a kernel finds in each strip of the vocabulary, [fields, strips, n]; zeros where it writes nothing.

    There are up to MAX_STRIPS strips, or one per processor: what finishes first, and of equals the fewest."""
    weight, n, tile = problem.weight, len(problem.targets), tile_for(problem, pair)
    blocks, tiles = triton.cdiv(n, tile.rows), triton.cdiv(len(weight), tile.cols)
    processors = torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 2
    most = min(tiles, max(MAX_STRIPS, processors // blocks))
    lengths = [triton.cdiv(tiles, strips) for strips in range(1, most + 1)]  # in tiles
    length = min(lengths, key=lambda x: triton.cdiv(blocks * triton.cdiv(tiles, x), processors) * x)
    strips = triton.cdiv(tiles, length)
    partials = weight.new_zeros(fields, strips, n, dtype=torch.float32)
    launch(kernel, problem, tile, strips, (partials, *tensors), length, **flags)
    return partials


def triton_forward(problem, keep_bytes):
    """`torch_forward` by kernels; keeps nothing. The KLs need both sides at once; else a pass per side is as fast."""
    if len(problem.targets) == 0:
        return torch_forward(problem, 0)  # a grid may not be empty
    fields, weight, y = fields_of(problem), problem.weight, problem.targets
    if "r" in fields:
        partials = by_strips(_forward_kernel, problem, True, len(fields), PASS="pair")
    else:
        partials = by_strips(_forward_kernel, problem, False, len(STUDENT), PASS="student")
        if problem.teacher is not None:
            other = problem._replace(student=problem.teacher, teacher=problem.student)  # so that both get the same tile
            partials = torch.cat([partials, by_strips(_forward_kernel, other, False, len(TEACHER), PASS="teacher")])
    for hidden, zy in ((problem.student, 3), (problem.teacher, 6)):
        if hidden is not None:  # into the first strip; zy of the others stays zero
            _target_kernel[(triton.cdiv(len(hidden), 16),)](hidden, weight, y, partials[zy], *hidden.shape,
                                                            hidden.stride(0), weight.stride(0), problem.scale, 16, 128)
    whole = merge(partials, fields)
    scores = finish(whole, fields, problem.divergence)
    if problem.divergence != "jsd":
        return scores, {}
    normalisers = torch.stack([scores.top, scores.log_sum, scores.teacher_top, scores.teacher_log_sum])
    mixture = by_strips(_mixture_kernel, problem, True, 2, normalisers).sum(1)
    return finish(whole, fields, "jsd", mixture), {}


def triton_gradient(problem, scores, upstream, kept):
    """`torch_gradient` by a kernel."""
    per_token = [scores.top, scores.log_sum, scores.entropy, *upstream[:2]]
    if problem.divergence:
        per_token += [scores.teacher_top, scores.teacher_log_sum, scores.centre, upstream[2]]
    per_token = torch.stack([torch.zeros_like(scores.top) if x is None else x for x in per_token])  # [5 or 9, n]
    tile = tile_for(problem, problem.divergence is not None)
    whole = [triton.cdiv(size, block) * block for size, block in zip(chunk_sizes(problem), tile)]
    out = problem.student.new_empty(whole, dtype=operand_dtype(problem))  # whole tiles, which are stored without masks

    def gradient_of(rows, columns, w):
        teacher = None if problem.teacher is None else problem.teacher[rows]
        part = problem._replace(student=problem.student[rows], teacher=teacher, weight=problem.weight[columns])
        arguments = out, out.stride(0), per_token[:, rows].contiguous(), problem.targets[rows]
        flags = {"DIVERGENCE": problem.divergence or "none"}
        launch(_gradient_kernel, part, tile, triton.cdiv(len(w), tile.cols), arguments, columns.start, **flags)
        return out[: len(part.student), : len(w)]

    return gradient_of


BACKENDS = {"torch": Backend(torch_forward, torch_gradient)}
if triton is not None:
    BACKENDS["triton"] = Backend(triton_forward, triton_gradient)
