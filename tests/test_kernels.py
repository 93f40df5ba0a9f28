"""kernels.py: both backends, triton in its interpreter, against fp64 and against each other."""

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
from kernels import GapGate, choose_backend, fused_gap_gate, fused_logprob
from tools import bench_kernels

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DIVERGENCES = [None, *kernels.DIVERGENCES]
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
SETTINGS = {  # tokens per chunk, columns per chunk, bytes of logits that may be kept for the backward pass
    "torch, one chunk": (99, 999, 2**27),
    "torch, all kept": (7, 50, 2**27),
    "torch, some kept": (7, 50, 17 * 131 * 8),
    "torch, none kept": (7, 50, 0),
    "triton": (30, 100, 0),
}
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


def head_inputs(n=45, d=24, v=131, *, seed=0, dtypes=(f32, f32, f32), scale=1.0, ignored=(3, 17)):
    """-> student, teacher [n, d], weight [v, d], targets [n]."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(n, d, generator=rng, dtype=f64) for _ in range(2))
    weight, targets = torch.randn(v, d, generator=rng, dtype=f64) / d**0.5, torch.randint(v, (n,), generator=rng)
    targets[0], targets[-1] = 0, v - 1
    targets[[i for i in ignored if 0 < i < n - 1]] = -100
    return *(x.to(dtype) for x, dtype in zip((student, teacher, weight), dtypes)), targets


def far_below_zero():
    student, teacher, weight, targets = head_inputs(scale=4.0)
    student, teacher = (torch.cat([x, torch.ones(len(x), 1)], 1) for x in (student, teacher))
    weight = torch.cat([weight, torch.full((len(weight), 1), -60.0)], 1)
    assert (student @ weight.T).max() < -30
    return student, teacher, weight, targets


def strided():
    student, teacher, weight, targets = head_inputs()
    wide = torch.stack([student, teacher], 2).transpose(0, 1).contiguous().transpose(0, 1)  # column stride 2
    tall = torch.cat([weight, weight]).T.contiguous().T[: len(weight)]  # column-major view of a bigger table
    assert not wide[..., 0].is_contiguous() and not tall.is_contiguous()
    return wide[..., 0], wide[..., 1], tall, targets


def gaps_of_64_nats():
    student, teacher = torch.zeros(2, 17), torch.zeros(2, 17)
    teacher[0, 4] = student[1, 4] = 40.0
    student[0, 4] = teacher[1, 4] = -24.0
    return student, teacher, torch.eye(17), torch.tensor([4, 4])


DTYPES = [(f32, bf16, f32), (f32, f16, f32), (f32, f64, f32), (bf16, f32, bf16), (bf16, bf16, bf16), (bf16, f32, f32),
          (f32, f32, f16), (f64, f64, f64)]  # of student, teacher, weight
INPUTS = {"plain": head_inputs, "logits far below zero": far_below_zero, "gaps of 64 nats": gaps_of_64_nats,
          "strided views": strided, "one token": lambda: head_inputs(1)}
INPUTS |= {str(dtypes): lambda dtypes=dtypes: head_inputs(dtypes=dtypes) for dtypes in DTYPES}


def dense(student, teacher, weight, targets, *, temperature=1.0, beta=5.0, gate="gap", divergence=None):
    """GapGate in fp64 from [N, V] logits, with the gates' formulas written out once more."""
    student, teacher, weight = student.double(), teacher.double(), weight.double()
    x = bench_kernels.dense_scores(student, teacher, weight, targets.clamp(min=0), temperature)
    gap, h = (x["teacher_logp"] - x["logp"]).detach(), x["entropy"].detach()
    argument = {"gap": gap, "entropy": h, "soft_or": 1 - (1 - h) * (1 - gap), "none": torch.full_like(h, math.inf)}
    fields = x["logp"], x["teacher_logp"], x["entropy"], gap, torch.sigmoid(beta * argument[gate]), x.get(divergence)
    return GapGate(*(y if y is None else torch.where(targets == -100, 0, y) for y in fields))


def leaf(x):
    return x.detach().requires_grad_()  # with x's own strides


def run(function, student, teacher, weight, targets, **options):
    """-> outputs, gradients w.r.t. student and weight of each output alone and of all, the same for every function."""
    inputs, rng = [leaf(x) for x in (student, weight, teacher)], torch.Generator().manual_seed(1)
    out = function(inputs[0], inputs[2], inputs[1], targets, **options)
    assert not any(x.requires_grad for x in (out.teacher_logp, out.gap, out.gate))
    terms = [x for x in (out.logp, out.entropy, out.divergence) if x is not None]
    terms = [(x * g).sum() for x, g in zip(terms, torch.randn(3, len(targets), generator=rng, dtype=f64))]
    losses = [*terms, sum(terms), sum(terms)]
    grads = [torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True) for x in losses]
    assert all(x[2] is None for x in grads)  # the teacher's
    assert all(torch.equal(a, b) for a, b in zip(grads[-1][:2], grads[-2]))  # backward can run again
    return [x for x in out if x is not None], [x for both in grads[:-1] for x in both[:2]]


def assert_close(got, want, tol=1e-5):
    """Within tol of each value and of the largest, with which the error of a sum over tokens grows; or got's dtype."""
    for a, b in zip(got, want, strict=True):
        atol, rtol = tol * max(1, b.abs().max().item()), max(tol, torch.finfo(a.dtype).eps)
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name, divergence", [(name, divergence) for name in INPUTS for divergence in DIVERGENCES
                                              if name in list(INPUTS)[:3] or divergence == "rkl"])
def test_values_and_gradients_are_those_of_dense_fp64_in_the_right_dtype_and_inputs_stay(backend, name, divergence):
    inputs, tol = INPUTS[name](), {"logits far below zero": 2e-4, str((f64,) * 3): 1e-12}.get(name, 1e-5)
    before, dtype = [x.clone() for x in inputs], torch.promote_types(f32, inputs[0].dtype)
    temperature, gate = 0.7 if tol < 1e-4 else 1.0, kernels.GATES[DIVERGENCES.index(divergence)]
    options = {"divergence": divergence, "gate": gate, "beta": 1.7, "temperature": temperature}
    (out, grads), (want, want_grads) = (run(f, *inputs, **options) for f in (fused_gap_gate, dense))
    assert_close(out + grads, want + want_grads, tol)
    assert all(x.dtype == dtype for x in out)
    assert [x.dtype for x in grads] == [inputs[0].dtype, inputs[2].dtype] * (len(grads) // 2)
    with torch.autocast("cpu", dtype=bf16):  # changes nothing
        assert_close(fused_logprob(inputs[0], *inputs[2:], temperature=temperature), (out[0], out[2]), 2e-6)
    assert all(torch.equal(x, y) for x, y in zip(before, inputs))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_two_runs_are_bit_equal(backend, divergence):
    first, second = (run(fused_gap_gate, *head_inputs(), divergence=divergence) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_passes_for_every_output_with_respect_to_student_and_weight(monkeypatch, divergence):
    set_chunks(monkeypatch, 7, 5, 300)
    student, teacher, weight, targets = head_inputs(12, 4, 11, dtypes=(f64,) * 3)

    def outputs(s, w, fixed):
        out = fused_gap_gate(s, fixed, w, targets, divergence=divergence, temperature=0.8)
        return [y for y in (out.logp, out.entropy, out.divergence) if y is not None]

    uniform = torch.zeros_like(teacher)  # hidden states of a uniform teacher, whatever the head: constant in w too
    assert torch.autograd.gradcheck(lambda s: outputs(s, weight, teacher), leaf(student))
    assert torch.autograd.gradcheck(lambda w: outputs(student, w, uniform), leaf(weight))
    assert torch.autograd.gradcheck(lambda s, w: fused_logprob(s, w, targets), (leaf(student), leaf(weight)))


def test_statistics_of_any_split_of_the_vocabulary_merge_to_those_of_the_whole():
    rng, y = torch.Generator().manual_seed(0), torch.tensor([0, 31, 32, 70, 95])
    z, zt = (30 * torch.randn(5, 96, generator=rng, dtype=f64) - shift for shift in (1e4, 50))
    fields = kernels.STUDENT + kernels.TEACHER + kernels.CROSS

    def merged(size):
        scratch = torch.empty(2, 5, size, dtype=f64)
        parts = [kernels.chunk_statistics(z[:, c], zt[:, c], y - c.start, fields, scratch)
                 for c in kernels.slices(96, size)]
        return kernels.merge(torch.stack(parts, 1), fields)

    for size in (1, 8, 32):
        torch.testing.assert_close(merged(size), merged(96), rtol=1e-12, atol=1e-12)


def test_ignored_rows_may_hold_nan_and_give_zeros_and_zero_gradient(backend):
    student, teacher, weight, targets = head_inputs(ignored=(3, 17, 18, 19, 20, 21, 22, 23, 24, 25, 30))
    kept = targets != -100
    student[~kept], teacher[~kept] = math.nan, math.inf
    student, weight, other = leaf(student), leaf(weight), leaf(weight)
    out = fused_gap_gate(student, teacher, weight, targets, gate="none", divergence="jsd")
    assert all((x[~kept] == 0).all() and x[kept].isfinite().all() for x in out) and (out.gate[kept] == 1).all()
    torch.autograd.backward((out.logp, out.entropy, out.divergence), (torch.where(kept, 1.0, math.nan),) * 3)
    assert (student.grad[~kept] == 0).all() and (student.grad[kept] != 0).any(-1).all()
    some = fused_gap_gate(student.detach()[kept], teacher[kept], other, targets[kept], divergence="jsd")
    (some.logp + some.entropy + some.divergence).sum().backward()
    assert_close([weight.grad], [other.grad])


@pytest.mark.parametrize("n, target", [(0, 5), (1, 5), (3, -100)], ids=["no token", "one token", "all ignored"])
@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_no_token_one_token_and_ignored_tokens_alone_work(backend, divergence, n, target):
    student, teacher, weight, _ = head_inputs(n=3)
    inputs = student[:n], teacher[:n], weight, torch.full((n,), target)
    out, grads = run(fused_gap_gate, *inputs, divergence=divergence, gate="entropy")
    assert all(x.shape == (n,) and (x == 0).all() == (n != 1) for x in out)
    assert grads[0].shape == (n, 24) and all((x != 0).any() == (n == 1) for x in grads)


def test_a_target_with_probability_0_999_keeps_its_small_gradient(backend):
    student, teacher, weight, targets = head_inputs(6, 8, 501)
    student, weight[400], targets[:] = student[:1].expand(6, -1), 0.0, 400
    weight[400] = student[0] / student[0].norm()**2 * (torch.logsumexp(student[0] @ weight.T, 0) + math.log(999))
    inputs = leaf(student), leaf(weight)
    logp, want = fused_logprob(*inputs, targets)[0], dense(inputs[0], teacher, inputs[1], targets).logp
    assert (abs(logp.exp() - 0.999) < 1e-4).all()
    for a, b in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (logp, want))):
        assert (a - b).norm() < 1e-3 * b.norm()  # 1 - p is known to eps / 0.001


@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_great_gaps_saturate_the_gate_and_identical_distributions_have_neither_gap_nor_divergence(backend, divergence):
    out = fused_gap_gate(*gaps_of_64_nats(), divergence=divergence)
    assert out.gap[0] > 26 > -26 > out.gap[1] and out.gate[0] == 1 and 0 <= out.gate[1] < 1e-30
    student, _, weight, targets = head_inputs(ignored=())
    out = fused_gap_gate(student, leaf(student), weight, targets, divergence=divergence)
    assert not any(x.requires_grad for x in out)  # a teacher's leaf alone asks for nothing
    assert (out.gap == 0).all() and (out.gate == 0.5).all() and out.divergence.abs().max() < 1e-6


@pytest.mark.parametrize("keep_bytes, kept", [(0, 0), (17 * 131 * 8, 14), (2**27, 21)])
def test_logits_are_kept_while_they_fit_and_a_frozen_head_or_student_costs_no_product(monkeypatch, keep_bytes, kept):
    set_chunks(monkeypatch, 7, 50, keep_bytes)
    products, original = [], kernels.accumulate
    monkeypatch.setattr(kernels, "accumulate", lambda *a: products.append(1) or original(*a))
    student, teacher, weight, targets = head_inputs()
    for s, w, count in ((leaf(student), weight, 1), (student, leaf(weight), 1), (leaf(student), leaf(weight), 2)):
        products.clear()
        logp = fused_gap_gate(s, teacher, w, targets).logp
        assert len(products) == 2 * 7 * 3  # two sides of 43 tokens by 131 columns
        logp.sum().backward()
        assert len(products) == 42 + 21 - kept + 21 * count  # the teacher's logits once, in the forward pass


def test_memory_of_logits_stays_bounded_as_tokens_grow(monkeypatch):
    set_chunks(monkeypatch, 16, 300, 0)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x))
            return out

    with Watch():
        run(fused_gap_gate, *head_inputs(200, 8, 301), divergence="jsd")
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


@pytest.mark.parametrize("words", ["triton is not installed", "the tensors are on cpu", "a tensor is fp64"])
def test_auto_is_triton_on_a_gpu_and_a_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch, words):
    student, _, weight, targets = head_inputs()
    gpu = types.SimpleNamespace(is_cuda=True, dtype=bf16, device="cuda:0")
    assert choose_backend("auto", student, weight) == choose_backend("torch", student, weight) == "torch"
    assert choose_backend("auto", gpu, gpu) == ("torch" if kernels.triton is None else "triton")
    monkeypatch.setattr(kernels, "triton", None if "installed" in words else types)
    monkeypatch.setattr(kernels, "BACKENDS", dict.fromkeys(("torch", "triton")))
    monkeypatch.setenv("TRITON_INTERPRET", "0" if "cpu" in words else "1")
    with pytest.raises(ValueError, match=words):
        fused_logprob(student.to(f64 if "fp64" in words else f32), weight, targets, backend="triton")


@pytest.mark.parametrize("with_triton", [pytest.param(True, marks=needs_triton), False])
def test_the_file_alone_in_an_empty_folder_imports_and_runs(with_triton, tmp_path):
    (tmp_path / "kernels.py").write_text(Path(kernels.__file__).read_text())
    program = "import sys\n" + ("" if with_triton else "sys.modules['triton'] = None\n") + (
        "import torch, kernels\n"
        "logp, entropy = kernels.fused_logprob(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 3]))\n"
        "print(sorted(kernels.BACKENDS), bool(logp[0] > logp[1]))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == ("['torch', 'triton'] True" if with_triton else "['torch'] True"), done.stderr


@needs_triton
@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(1, 140), d=st.integers(1, 90), v=st.integers(2, 300), seed=st.integers(0, 99),
       divergence=st.sampled_from(DIVERGENCES), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_backends_agree_on_random_shapes(n, d, v, seed, divergence, temperature):
    results = [run(fused_gap_gate, *head_inputs(n, d, v, seed=seed), divergence=divergence, temperature=temperature,
                   backend=name) for name in ("torch", "triton")]
    assert_close(*(out + grads for out, grads in results))


@needs_triton
@pytest.mark.slow
def test_the_whole_vocabulary_of_qwen_passes():
    inputs = head_inputs(3, 16, 151_936, ignored=())
    assert_close(fused_gap_gate(*inputs, divergence="rkl", backend="triton"), dense(*inputs, divergence="rkl"))


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
def test_the_teacher_is_computed_again_only_where_a_gradient_flows_into_a_divergence(monkeypatch):
    seen, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *a, **kw: seen.append(kw.get("DIVERGENCE")) or launch(*a, **kw))
    run(fused_gap_gate, *head_inputs(), divergence="rkl", backend="triton")
    assert seen == [None, "none", "none", "rkl", "rkl", "rkl"]  # forward; logp, entropy, divergence alone; all, twice
