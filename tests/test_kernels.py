"""kernels.py: both backends, triton in its interpreter, against fp64 and each other; and its reports."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on any machine; compiling them is tested in a process of its own

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import GapGate, fused_gap_gate, fused_logprob
from tools import bench_kernels
from tools.bench_kernels import dense_scores

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DIVERGENCES = [None, *kernels.DIVERGENCES]
ROOT = Path(kernels.__file__).resolve().parent
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
slow = pytest.mark.slow
SETTINGS = {  # tokens per chunk, columns per chunk, bytes of logits that may be kept for the backward pass
    "torch, one chunk": (99, 999, 2**27),
    "torch, logits kept": (7, 50, 2**27),
    "torch, some kept": (7, 50, 17 * 131 * 8),
    "torch, none kept": (7, 50, 0),
    "triton": (30, 100, 0),
}


@pytest.fixture(scope="module", autouse=True)
def mended_interpreter():
    torch.set_num_threads(1)
    if kernels.triton is not None:
        bench_kernels.mend_interpreter()


@pytest.fixture(params=[pytest.param(x, marks=needs_triton if x == "triton" else ()) for x in SETTINGS])
def backend(request, monkeypatch):
    """Runs a test in every setting, with ragged chunks; what is fp64 stays with torch, which alone computes in it."""
    name = request.param.split(",")[0]
    monkeypatch.setattr(kernels, "choose_backend", lambda _, *x: "torch" if f64 in (y.dtype for y in x) else name)
    set_chunks(monkeypatch, *SETTINGS[request.param])


def set_chunks(monkeypatch, tokens, columns, keep_bytes):
    monkeypatch.setattr(kernels, "KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(kernels, "chunk_sizes", lambda problem: (
        max(1, min(tokens, len(problem.targets))), min(columns, len(problem.weight))))


@pytest.fixture
def products(monkeypatch):
    """A list that grows by one with every matrix product of a chunk."""
    calls, original = [], kernels.accumulate
    monkeypatch.setattr(kernels, "accumulate", lambda *a: calls.append(1) or original(*a))
    return calls


def head_inputs(n=45, d=24, v=131, *, seed=0, dtype=f32, scale=1.0, ignored=(3, 17)):
    """-> student, teacher [n, d], weight [v, d], targets [n]."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(n, d, generator=rng, dtype=f64) for _ in range(2))
    weight = torch.randn(v, d, generator=rng, dtype=f64) / d**0.5
    targets = torch.randint(v, (n,), generator=rng)
    targets[0], targets[-1] = 0, v - 1
    targets[[i for i in ignored if 0 < i < n - 1]] = -100
    return student.to(dtype), teacher.to(dtype), weight.to(dtype), targets


def dense(student, teacher, weight, targets, *, temperature=1.0, beta=5.0, gate="gap", divergence=None):
    """GapGate in fp64 from [N, V] logits, with the gates' formulas written out once more."""
    x = dense_scores(student.double(), teacher.double(), weight.double(), targets.clamp(min=0), temperature)
    gap, h = (x["teacher_logp"] - x["logp"]).detach(), x["entropy"].detach()
    argument = {"gap": gap, "entropy": h, "soft_or": 1 - (1 - h) * (1 - gap)}
    gates = torch.ones_like(gap) if gate == "none" else torch.sigmoid(beta * argument[gate])
    fields = x["logp"], x["teacher_logp"], x["entropy"], gap, gates, x.get(divergence)
    return GapGate(*(y if y is None else torch.where(targets == -100, 0, y) for y in fields))


def leaf(x):
    return x.detach().clone().requires_grad_()


def total(out):
    return sum(x.sum() for x in (out.logp, out.entropy, out.divergence) if x is not None)


def run(function, student, teacher, weight, targets, backwards=1, **options):
    """-> outputs, gradients w.r.t. student and weight of a random combination of them, the same for any function."""
    inputs = leaf(student), leaf(weight)
    out = function(inputs[0], teacher, inputs[1], targets, **options)
    up = torch.randn(3, len(targets), generator=torch.Generator().manual_seed(1), dtype=f64)
    loss = sum((x.double() * u).sum() for x, u in zip((out.logp, out.entropy, out.divergence), up) if x is not None)
    grads = [x for _ in range(backwards) for x in torch.autograd.grad(loss, inputs, retain_graph=True)]
    return [x for x in out if x is not None], grads


def assert_close(got, want, tol, scaled=False):
    """scaled: the absolute tolerance grows with the largest value, as do sums over tokens."""
    for a, b in zip(got, want, strict=True):
        atol = tol * max(1, b.abs().max().item()) if scaled else tol
        torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=atol)


def assert_same_as_dense(*inputs, tol=2e-5, **options):
    (got, got_grads), (want, want_grads) = (run(f, *inputs, **options) for f in (fused_gap_gate, dense))
    assert_close(got, want, tol)
    assert_close(got_grads, want_grads, tol, scaled=True)


# ------------------------------------------------------------------------------------------------ values and gradients


@each_divergence
@pytest.mark.parametrize("temperature", [0.7, 2.5])
def test_values_and_gradients_agree_with_dense_fp64_whatever_the_chunks(backend, divergence, temperature):
    assert_same_as_dense(*head_inputs(), divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("gate, divergence", zip(kernels.GATES, DIVERGENCES))
def test_every_gate_is_its_formula(backend, gate, divergence):
    assert_same_as_dense(*head_inputs(), gate=gate, divergence=divergence, beta=1.7)


@each_divergence
def test_peaked_logits_far_below_zero_keep_their_normalisation(backend, divergence):
    student, teacher, weight, targets = head_inputs(scale=4.0)
    student, teacher = (torch.cat([x, torch.ones(len(x), 1)], 1) for x in (student, teacher))
    weight = torch.cat([weight, torch.full((len(weight), 1), -60.0)], 1)
    assert (student @ weight.T).max() < -30
    assert_same_as_dense(student, teacher, weight, targets, divergence=divergence, tol=2e-4)


def test_statistics_of_any_split_of_the_vocabulary_merge_to_those_of_the_whole():
    rng = torch.Generator().manual_seed(0)
    z, zt = (30 * torch.randn(5, 96, generator=rng, dtype=f64) - shift for shift in (1e4, 50))
    fields, y = kernels.STUDENT + kernels.TEACHER + kernels.CROSS, torch.tensor([0, 31, 32, 70, 95])

    def merged(size):
        parts = [kernels.chunk_statistics(z[:, c], zt[:, c], y - c.start, fields, torch.empty(2, *z[:, c].shape).to(z))
                 for c in kernels.slices(96, size)]
        return kernels.merge(torch.stack(parts, 1), fields)

    for size in (1, 7, 32):
        torch.testing.assert_close(merged(size), merged(96), rtol=1e-12, atol=1e-12)


@each_divergence
def test_gradcheck_passes_for_every_output_with_respect_to_student_and_weight(monkeypatch, divergence):
    set_chunks(monkeypatch, 7, 5, 300)
    student, teacher, weight, targets = head_inputs(12, 4, 11, dtype=f64)

    def outputs(s, w, fixed):
        out = fused_gap_gate(s, fixed, w, targets, divergence=divergence, temperature=0.8)
        return [y for y in (out.logp, out.entropy, out.divergence) if y is not None]

    uniform = torch.zeros_like(teacher)  # hidden states of a uniform teacher, whatever the head: constant in w too
    assert torch.autograd.gradcheck(lambda s: outputs(s, weight, teacher), leaf(student))
    assert torch.autograd.gradcheck(lambda w: outputs(student, w, uniform), leaf(weight))
    assert torch.autograd.gradcheck(lambda s, w: fused_logprob(s, w, targets), (leaf(student), leaf(weight)))


@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_each_output_alone_has_the_dense_gradient(backend, divergence):
    student, teacher, weight, targets = head_inputs()
    inputs, up = (leaf(student), leaf(weight)), torch.linspace(-1, 1, len(targets), dtype=f64)
    outs = [f(inputs[0], teacher, inputs[1], targets, divergence=divergence) for f in (fused_gap_gate, dense)]
    for name in ("logp", "entropy", "divergence"):
        got, want = (torch.autograd.grad((getattr(x, name) * up).sum(), inputs, retain_graph=True) for x in outs)
        assert all(x.abs().max() > 1e-3 for x in want)
        assert_close(got, want, 2e-5)


def test_fused_logprob_gives_the_students_half_of_fused_gap_gate(backend):
    student, teacher, weight, targets = head_inputs()
    out = fused_gap_gate(student, teacher, weight, targets, temperature=1.3)
    for a, b in zip(fused_logprob(student, weight, targets, temperature=1.3), (out.logp, out.entropy)):
        assert torch.equal(a, b)


def test_teacher_and_constants_carry_no_gradient_and_the_weights_leaves_out_the_teachers_side(backend):
    student, teacher, weight, targets = head_inputs()
    leaves = leaf(student), leaf(teacher), leaf(weight)
    out = fused_gap_gate(*leaves, targets, divergence="rkl")
    assert not (out.teacher_logp.requires_grad or out.gap.requires_grad or out.gate.requires_grad)
    out.divergence.sum().backward()
    own, both = leaf(weight), leaf(weight)
    dense(student, teacher, own, targets, divergence="rkl").divergence.sum().backward()
    s, q = ((x @ both.T).log_softmax(-1) for x in (student, teacher))
    ((s.exp() * (s - q)).sum(-1) * (targets != -100)).sum().backward()
    assert leaves[1].grad is None and (both.grad - own.grad).norm() > 0.1 * own.grad.norm()
    assert_close([leaves[2].grad], [own.grad], 2e-5)
    out = fused_gap_gate(student, leaves[1], weight, targets, divergence="jsd")
    assert not any(x.requires_grad for x in out)


def test_ignored_rows_may_hold_nan_and_give_zeros_and_zero_gradient(backend):
    student, teacher, weight, targets = head_inputs(ignored=(3, 17, 18, 19, 20, 21, 22, 23, 24, 25, 30))
    kept = targets != -100
    student[~kept], teacher[~kept] = math.nan, math.inf
    student, weight, other = leaf(student), leaf(weight), leaf(weight)
    out = fused_gap_gate(student, teacher, weight, targets, gate="none", divergence="jsd")
    assert all((x[~kept] == 0).all() and x[kept].isfinite().all() for x in out) and (out.gate[kept] == 1).all()
    torch.autograd.backward((out.logp, out.entropy, out.divergence), (torch.where(kept, 1.0, math.nan),) * 3)
    assert (student.grad[~kept] == 0).all() and (student.grad[kept] != 0).any(-1).all()
    total(fused_gap_gate(student.detach()[kept], teacher[kept], other, targets[kept], divergence="jsd")).backward()
    torch.testing.assert_close(weight.grad, other.grad)


@pytest.mark.parametrize("n, target", [(0, 5), (1, 5), (3, -100)], ids=["no token", "one token", "all ignored"])
def test_no_token_one_token_and_ignored_tokens_alone_work(backend, n, target):
    student, teacher, weight, _ = head_inputs(n=3)
    inputs = student[:n], teacher[:n], weight, torch.full((n,), target)
    for divergence in kernels.DIVERGENCES:
        out, grads = run(fused_gap_gate, *inputs, divergence=divergence, gate="entropy")
        assert all(x.shape == (n,) and (x != 0).all() == (target == 5) | (n == 0) for x in out)
        assert grads[0].shape == (n, 24) and all((x != 0).any() == (n == 1) for x in grads)
    if n == 1:
        assert_same_as_dense(*inputs, divergence="rkl")


def test_non_contiguous_hidden_states_and_weight_views_give_the_same_and_inputs_stay_as_they_were(backend):
    student, teacher, weight, targets = head_inputs()
    wide = torch.stack([student, teacher], 2).transpose(0, 1).contiguous().transpose(0, 1)  # column stride 2
    tall = torch.cat([weight, weight]).T.contiguous().T[: len(weight)]  # column-major view of a bigger table
    assert not wide[..., 0].is_contiguous() and not tall.is_contiguous()
    before, (a, w) = [wide.clone(), tall.clone()], (wide.requires_grad_(), tall.requires_grad_())
    total(fused_gap_gate(a[..., 0], a[..., 1], w, targets, divergence="rkl")).backward()
    s, t = leaf(student), leaf(weight)
    total(fused_gap_gate(s, teacher, t, targets, divergence="rkl")).backward()
    assert_close((a.grad[..., 0], a.grad[..., 1], w.grad), (s.grad, torch.zeros_like(s), t.grad), 1e-5)
    assert all(torch.equal(x, y) for x, y in zip(before, (wide, tall)))


@each_divergence
def test_two_runs_and_two_backward_passes_of_one_run_are_bit_equal(backend, divergence):
    first, second = (run(fused_gap_gate, *head_inputs(140), divergence=divergence, backwards=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[1][:2], first[1][2:]))


# ------------------------------------------------------------------------------------------- dtypes and extreme values


@pytest.mark.parametrize("dtypes", [(f32, bf16, f32), (f32, f16, f32), (f32, f64, f32), (bf16, f32, bf16),
                                    (bf16, bf16, bf16), (bf16, f32, f32), (f32, f32, f16), (f64, f64, f64)])
def test_outputs_are_fp32_or_fp64_and_gradients_have_the_inputs_dtypes_whatever_these_are(backend, dtypes):
    *values, targets = head_inputs()
    inputs = *(x.to(dtype) for x, dtype in zip(values, dtypes)), targets
    (out, grads), (want, want_grads) = (run(f, *inputs, divergence="fkl") for f in (fused_gap_gate, dense))
    assert all(x.dtype == (f64 if dtypes[0] == f64 else f32) for x in out)
    assert_close(out, want, 1e-12 if dtypes[0] == f64 else 1e-5)
    for got, want, dtype in zip(grads, want_grads, dtypes[::2]):
        assert got.dtype == dtype
        rtol = max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=1e-5)


def test_autocast_changes_nothing():
    plain = fused_gap_gate(*head_inputs(), divergence="jsd")
    with torch.autocast("cpu", dtype=bf16):
        assert all(torch.equal(a, b) for a, b in zip(plain, fused_gap_gate(*head_inputs(), divergence="jsd")))


def test_a_target_with_probability_0_999_keeps_its_small_gradient(backend):
    student, teacher, weight, _ = head_inputs(6, 8, 501)
    student[:, 0], weight[:, 0] = 1.0, 0.0
    student[:], weight[400], targets = student[0].clone(), 0, torch.full((6,), 400)
    weight[400, 0] = torch.logsumexp((student[0] @ weight.T)[torch.arange(501) != 400], 0) + math.log(999)
    inputs = leaf(student), leaf(weight)
    logp, _ = fused_logprob(*inputs, targets)
    assert 0.9989 < logp[0].exp() < 0.9991
    got = torch.autograd.grad(logp.sum(), inputs)
    want = torch.autograd.grad(dense(inputs[0], teacher, inputs[1], targets).logp.sum(), inputs)
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in zip(got, want))  # 1 - p is known to eps / 0.001


@each_divergence
def test_gaps_of_sixty_nats_saturate_the_gate_without_nan(backend, divergence):
    student, teacher, weight, targets = torch.zeros(2, 17), torch.zeros(2, 17), torch.eye(17), torch.tensor([4, 4])
    teacher[0, 4] = student[1, 4] = 40.0
    student[0, 4] = teacher[1, 4] = -24.0
    out = fused_gap_gate(student, teacher, weight, targets)
    assert out.gap[0] > 26 > -26 > out.gap[1] and out.gate[0] == 1 and 0 <= out.gate[1] < 1e-30
    assert_same_as_dense(student, teacher, weight, targets, divergence=divergence)


@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_identical_distributions_have_no_gap_and_no_divergence(backend, divergence):
    student, _, weight, targets = head_inputs(ignored=())
    out = fused_gap_gate(student, student, weight, targets, divergence=divergence)
    assert (out.gap == 0).all() and (out.gate == 0.5).all() and out.divergence.abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------------- cost and errors


@pytest.mark.parametrize("keep_bytes, kept", [(0, 0), (17 * 131 * 8, 14), (2**27, 21)])
def test_logits_are_kept_for_the_backward_pass_while_they_fit(monkeypatch, products, keep_bytes, kept):
    set_chunks(monkeypatch, 7, 50, keep_bytes)
    student, _, weight, targets = head_inputs()
    logp, _ = fused_logprob(leaf(student), weight, targets)
    assert len(products) == 7 * 3  # 43 tokens by 131 columns
    logp.sum().backward()
    assert len(products) == 21 + 21 + 21 - kept


def test_a_frozen_head_or_frozen_student_costs_no_gradient_of_its_own(products):
    student, teacher, weight, targets = head_inputs()
    for s, w, count in ((leaf(student), weight, 3), (student, leaf(weight), 3), (leaf(student), leaf(weight), 4)):
        products.clear()
        fused_gap_gate(s, teacher, w, targets).logp.sum().backward()
        assert len(products) == count  # both sides' logits, the teacher's in the forward pass alone, and the gradients


def test_memory_of_logits_stays_bounded_as_tokens_grow(monkeypatch):
    set_chunks(monkeypatch, 16, 300, 0)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x))
            return out

    student, teacher, weight, targets = head_inputs(200, 8, 301)
    with Watch():
        total(fused_gap_gate(leaf(student), teacher, leaf(weight), targets, divergence="jsd")).backward()
    assert 16 * 300 <= max(sizes) < 200 * 301 / 4


@pytest.mark.parametrize("argument, value, error, words", [
    ("targets", torch.tensor([0, 131, -1]), ValueError, r"0\.\.130, got \[131, -1\]"),
    ("targets", torch.zeros(3, dtype=torch.int32), TypeError, "int64 tensor, got torch.int32"),
    ("targets", torch.zeros(3, 1, dtype=torch.int64), TypeError, r"shape \(3, 1\)"),
    ("targets", torch.zeros(4, dtype=torch.int64), ValueError, r"student has shape \(3, 24\).*length 4"),
    ("targets", [0, 1, 2], TypeError, "targets must be .* got list"),
    ("targets", torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "targets is on meta"),
    ("teacher", torch.zeros(3, 23), ValueError, r"teacher has shape \(3, 23\)"),
    ("teacher", torch.zeros(3, 24, device="meta"), ValueError, "teacher is on meta but weight is on cpu"),
    ("teacher", None, TypeError, "teacher must be .* got NoneType"),
    ("student", torch.zeros(3, 24, dtype=torch.int64), TypeError, "student must be .* got torch.int64"),
    ("student", torch.zeros(1, 3, 24), TypeError, "student must be a 2-D"),
    ("weight", torch.zeros(0, 24), ValueError, r"weight .* \(0, 24\)"),
    ("temperature", 0.0, ValueError, "temperature must be positive and finite, got 0.0"),
    ("temperature", math.nan, ValueError, "temperature"),
    ("gate", "gpa", ValueError, "gate='gpa' is unknown"),
    ("divergence", "kl", ValueError, "divergence='kl' is unknown"),
    ("backend", "cuda", ValueError, "backend='cuda' is unknown"),
])
def test_inputs_that_do_not_fit_are_refused_in_one_sentence_with_the_offending_values(argument, value, error, words):
    student, teacher, weight, _ = head_inputs(3)
    arguments = {"student": student, "teacher": teacher, "weight": weight, "targets": torch.tensor([0, 1, 2])}
    with pytest.raises(error, match=words) as caught:
        fused_gap_gate(**arguments | {argument: value})
    assert "\n" not in str(caught.value)


def test_auto_is_triton_on_a_gpu_and_a_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch):
    student, _, weight, targets = head_inputs()
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=bf16, device="cuda:0")
    assert kernels.choose_backend("auto", student, weight) == kernels.choose_backend("torch", weight, weight) == "torch"
    assert kernels.choose_backend("auto", on_gpu, on_gpu) == ("torch" if kernels.triton is None else "triton")
    reasons = ["triton is not installed", "a tensor is fp64", "the tensors are on cpu"]
    if kernels.triton is not None:
        with pytest.raises(ValueError, match=reasons[1]):
            fused_logprob(student.double(), weight, targets, backend="triton")
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match=reasons[2]):
            fused_logprob(student, weight, targets, backend="triton")
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match=reasons[0]):
        fused_logprob(student, weight, targets, backend="triton")


@pytest.mark.parametrize("with_triton", [pytest.param(True, marks=needs_triton), False])
def test_the_file_alone_in_an_empty_folder_imports_and_runs(with_triton, tmp_path):
    (tmp_path / "kernels.py").write_text(Path(kernels.__file__).read_text())
    program = "import sys\n" + ("" if with_triton else "sys.modules['triton'] = None\n") + (
        "import torch, kernels\n"
        "logp, entropy = kernels.fused_logprob(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 3]))\n"
        "print(sorted(kernels.BACKENDS), bool(logp[0] > logp[1]))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == ("['torch', 'triton'] True" if with_triton else "['torch'] True"), done.stderr


# ------------------------------------------------------------------------------------------------------ triton kernels


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype, bound", [(f32, 1e-5), (bf16, 5e-3)])
def test_every_backend_is_within_the_promised_bounds_of_fp64(name, dtype, bound):
    errors = bench_kernels.accuracy(name, dtype)
    assert {"logp", "teacher_logp", "entropy", "gap", "gate", "rkl", "fkl", "jsd", "d_weight, jsd"} <= errors.keys()
    assert all(error < (bound if name.startswith("d_") else 1e-5) for name, error in errors.items()), errors


@needs_triton
@slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(1, 140), d=st.integers(1, 90), v=st.integers(2, 300), seed=st.integers(0, 99),
       divergence=st.sampled_from(DIVERGENCES), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_backends_agree_on_random_shapes(n, d, v, seed, divergence, temperature):
    results = [run(fused_gap_gate, *head_inputs(n, d, v, seed=seed), divergence=divergence, temperature=temperature,
                   backend=name) for name in ("torch", "triton")]
    assert_close(*([*out, *grads] for out, grads in results), 1e-5, scaled=True)


@needs_triton
@slow
def test_the_whole_vocabulary_of_qwen_passes():
    inputs = head_inputs(3, 16, 151_936, ignored=())
    got = fused_gap_gate(*inputs, divergence="rkl", backend="triton")
    assert_close(got, dense(*inputs, divergence="rkl"), 1e-5)


@needs_triton
def test_rows_begin_where_64_bits_say():
    import triton
    import triton.language as tl

    global row  # kernels find functions among the globals of their file
    row = kernels._row

    @triton.jit
    def offsets(out, rows, stride, n: tl.constexpr):
        at = row(out, tl.load(rows + tl.arange(0, n)), stride)  # a pointer, in bytes
        base = row(out, tl.zeros((n,), tl.int32), stride)
        tl.store(out + tl.arange(0, n)[:, None], at.to(tl.int64) - base.to(tl.int64))

    rows, out = torch.tensor([0, 1, 20_000, 2**31 - 1], dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    offsets[(1,)](out, rows, 151_936, 4)
    assert out.tolist() == [r * 151_936 * 8 for r in rows.tolist()]


@needs_triton
def test_the_teacher_is_computed_again_only_for_a_divergence(monkeypatch):
    seen, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *a, **flags: seen.append(flags.get("DIVERGENCE")) or launch(*a, **flags))
    for divergence in (None, "rkl"):
        run(fused_gap_gate, *head_inputs(), divergence=divergence, backend="triton")
    assert seen == [None, "none", None, "rkl"]


@needs_triton
@slow
def test_every_kernel_that_would_be_chosen_compiles_without_spills_and_with_matrix_instructions(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.bench_kernels", "compile", "--out", str(tmp_path / "report.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "report.json").read_text())["compile"]["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"} and len(rows) == 5 * 16
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] <= row["shared_limit"], row
        assert row["matrix_instructions"] > 0 or row["dtype"] == "fp32", row  # exact fp32 has no such units


# ------------------------------------------------------------------------------------------------------------- reports


def test_reports_are_printed_and_recorded_with_their_command_and_unknown_ones_refused(tmp_path, capsys, monkeypatch):
    case = {"tiny": (16, 8, 64, True, "rkl")}
    monkeypatch.setattr(bench_kernels, "CASES", case | {"one-sided": (16, 8, 64, False, None)})
    monkeypatch.setattr(bench_kernels, "LARGE", case)
    monkeypatch.setattr(bench_kernels, "measure_memory", lambda *_: 1.5)
    out = tmp_path / "new" / "report.json"
    bench_kernels.main(["gpu", "large", "cpu", "memory", "roofline", "--threads", "1", "--out", str(out)])
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert torch.cuda.is_available() or "not done: there is no GPU here" in printed
    assert list(found) == ["cpu", "large", "memory", "roofline"] and "Qwen2.5-7B" in printed
    assert found["cpu"]["command"].startswith("python -m tools.bench_kernels gpu large cpu")
    assert found["cpu"]["rows"][0]["full s"] > 0 and found["large"]["rows"] == [{"case": "tiny", "fused MiB": 1.5}]
    assert all(row["triton"] < row["torch on cpu"] < row["full logits, at least"] for row in found["memory"]["rows"])
    with pytest.raises(SystemExit):
        bench_kernels.main(["memroy"])
    assert "there is no report memroy: choose from cpu, large" in capsys.readouterr().err


@slow
def test_memory_is_measured_in_a_process_of_its_own_and_kernels_py_forwards_to_the_reports():
    assert 0 <= bench_kernels.measure_memory("fused", "gap_gate, V=1024", 1) < 200
    done = subprocess.run([sys.executable, "kernels.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert "tools.bench_kernels" in done.stdout, done.stderr
