"""kernels.py and tools/bench_kernels.py: both backends, triton in its interpreter, against fp64 and each other."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import GapGate, choose_backend, fused_gap_gate, fused_logprob
from tools import bench_kernels

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROOT = Path(kernels.__file__).resolve().parent
DIVERGENCES = [None, *kernels.DIVERGENCES]
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
BACKENDS = ["torch", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]  # at sizes that need seconds
SETTINGS = {  # tokens per chunk, columns per chunk, bytes of logits that may be kept for the backward pass
    "torch, one chunk": (99, 999, 2**27),
    "torch, some kept": (7, 50, 17 * 131 * 8),
    "torch, none kept": (7, 50, 0),
    "triton": (40, 100, 0),
}
if kernels.triton is not None:
    bench_kernels.mend_interpreter()
    tl, row = kernels.tl, kernels._row  # kernels find functions among the globals of their file


@pytest.fixture(params=[pytest.param(x, marks=needs_triton if x == "triton" else ()) for x in SETTINGS])
def backend(request, monkeypatch):
    """The name of the backend with which a test runs, in every setting, with ragged chunks; fp64 stays with torch."""
    name = request.param.split(",")[0]
    monkeypatch.setattr(kernels, "choose_backend", lambda _, *x: "torch" if f64 in (y.dtype for y in x) else name)
    set_chunks(monkeypatch, *SETTINGS[request.param])
    return name


def set_chunks(monkeypatch, tokens, columns, keep_bytes):
    monkeypatch.setattr(kernels, "KEEP_BYTES", keep_bytes)
    if kernels.triton is not None:
        monkeypatch.setattr(kernels, "GROUP", tl.constexpr(2))  # so that there are several groups of row blocks
    monkeypatch.setattr(kernels, "chunk_sizes", lambda problem: (tokens, columns))


def head_inputs(n=45, d=24, v=131, *, dtypes=(f32, f32, f32), scale=1.0, ignored=(3, 17)):
    """-> student, teacher [n, d], weight [v, d], targets [n]."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(n, d, generator=rng, dtype=f64) for _ in range(2))
    weight, targets = torch.randn(v, d, generator=rng, dtype=f64) / d**0.5, torch.randint(v, (n,), generator=rng)
    targets[:1], targets[-1:] = 0, v - 1
    targets[[i for i in ignored if i < n]] = -100
    return *(x.to(dtype) for x, dtype in zip((student, teacher, weight), dtypes)), targets


def far_below_zero(below, dtype, scale):
    """Logits of the student are `below` zero, those of the teacher half as far."""
    *inputs, targets = head_inputs(scale=scale, dtypes=(dtype,) * 3)
    student, teacher, weight = (torch.nn.functional.pad(x, (0, 1), value=y) for x, y in zip(inputs, (1.0, 0.5, -below)))
    assert (student @ weight.T).max() < -below / 2
    return student, teacher, weight, targets


DTYPES = [(f32, bf16, f32), (f32, f16, f32), (f32, f64, f32), (bf16, f32, bf16), (bf16, bf16, bf16), (bf16, f32, f32),
          (f32, f32, f16)]  # of student, teacher, weight
INPUTS = {"plain": head_inputs, "fp64": lambda: head_inputs(dtypes=(f64,) * 3),
          "far below zero": lambda: far_below_zero(40.0, f32, 2.8),
          "10,000 below zero, fp64": lambda: far_below_zero(1e4, f64, 30.0),
          "gaps beyond 100 nats": lambda: head_inputs(scale=30.0), "one token": lambda: head_inputs(1),
          "no gap": lambda: (*head_inputs()[:1] * 2, *head_inputs()[2:]),
          "no token": lambda: head_inputs(0), "all ignored": lambda: head_inputs(3, ignored=range(3))}
CASES = [(name, divergence) for name in INPUTS for divergence in DIVERGENCES]
INPUTS |= {"column-major": lambda: [x.t().contiguous().t() for x in head_inputs(ignored=())],
           "rows far apart": lambda: [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in head_inputs(ignored=())],
           "strided targets": lambda: [torch.stack([x, x], -1)[..., 0] for x in head_inputs(ignored=())]}
INPUTS |= {str(dtypes): lambda dtypes=dtypes: head_inputs(dtypes=dtypes) for dtypes in DTYPES}
CASES += [(name, "rkl") for name in INPUTS if (name, "rkl") not in CASES]
TOLERANCES = {"fp64": 1e-12, "10,000 below zero, fp64": 1e-8, "far below zero": 2e-4, "no gap": 2e-6}


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


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
    assert equal(grads[-1][:2], grads[-2][:2])  # backward can run again
    return [x for x in out if x is not None], [x for both in grads[:-1] for x in both[:2]]


def assert_close(got, want, tol=1e-5):
    """Within tol of each value and of the largest, with which the error of a sum over tokens grows; or got's dtype."""
    for a, b in zip(got, want, strict=True):
        atol, rtol = tol * max([1, *b.abs().flatten().tolist()]), max(tol, torch.finfo(a.dtype).eps)
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name, divergence", CASES)
def test_values_and_gradients_are_those_of_dense_fp64_in_the_right_dtype_and_inputs_stay(backend, name, divergence):
    inputs, gate = INPUTS[name](), kernels.GATES[DIVERGENCES.index(divergence)]
    before, dtype = [x.clone() for x in inputs], torch.promote_types(f32, inputs[0].dtype)
    options = {"divergence": divergence, "gate": gate, "beta": 1.7, "temperature": 0.7}
    (out, grads), (want, want_grads) = (run(f, *inputs, **options) for f in (fused_gap_gate, dense))
    assert_close(out + grads, want + want_grads, TOLERANCES.get(name, 1e-5))
    assert [x.dtype for x in out + grads] == [dtype] * len(out) + [inputs[0].dtype, inputs[2].dtype] * (len(grads) // 2)
    with torch.autocast("cpu", dtype=bf16):  # changes nothing
        students_half = fused_logprob(inputs[0], *inputs[2:], temperature=0.7)
    assert_close(students_half, (out[0], out[2]), 2e-6)
    assert backend == "triton" or equal(students_half, (out[0], out[2]))
    assert equal(before, inputs)
    assert kernels.without_ignored(*inputs, None, 1.0, None).teacher.dtype in (bf16, f32, dtype)  # not wider


@pytest.mark.parametrize("divergence, mirrored", [("rkl", "fkl"), ("fkl", "rkl"), ("jsd", "jsd")])
def test_the_teachers_side_that_the_gradient_of_w_leaves_out_would_have_changed_it(divergence, mirrored):
    student, teacher, *rest = head_inputs()
    out, own = run(dense, student, teacher, *rest, divergence=divergence)
    same, others = run(dense, teacher, student, *rest, divergence=mirrored)  # the gradient flows to the teacher's side
    assert_close([out[-1]], [same[-1]], 1e-12)
    assert others[5].norm() > 0.1 * own[5].norm()  # of W, from the divergence alone


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("n, d, v", [(1, 1, 2), (5, 70, 9), (64, 64, 128), (65, 33, 129), (140, 24, 700), (3, 8, 1100)])
@pytest.mark.parametrize("name", BACKENDS)
def test_sizes_around_those_of_tiles_give_the_same_and_two_runs_are_bit_equal(monkeypatch, name, n, d, v, divergence):
    set_chunks(monkeypatch, 100, 400, 500_000)
    inputs, options = head_inputs(n, d, v), {"divergence": divergence, "temperature": 1.5}
    first, second = (sum(run(fused_gap_gate, *inputs, **options, backend=name), []) for _ in range(2))
    assert equal(first, second)
    assert_close(first, sum(run(dense, *inputs, **options), []))


@needs_triton
@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(1, 140), d=st.integers(1, 90), v=st.integers(2, 300), divergence=st.sampled_from(DIVERGENCES),
       temperature=st.sampled_from([0.5, 1.0, 1e12]))
def test_the_backends_agree_on_random_shapes(n, d, v, divergence, temperature):
    inputs, options = head_inputs(n, d, v), {"divergence": divergence, "temperature": temperature}
    (out, grads), (want, want_grads) = (run(fused_gap_gate, *inputs, backend=x, **options) for x in ("triton", "torch"))
    assert_close(out + grads, want + want_grads)


@needs_triton
@pytest.mark.slow
def test_the_whole_vocabulary_of_qwen_passes():
    inputs = head_inputs(3, 16, 151_936, ignored=())
    assert_close(fused_gap_gate(*inputs, divergence="rkl", backend="triton"), dense(*inputs, divergence="rkl"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_passes_for_every_output_with_respect_to_student_and_weight(monkeypatch, divergence):
    set_chunks(monkeypatch, 7, 5, 300)
    student, _, weight, targets = head_inputs(9, 4, 11, dtypes=(f64,) * 3)
    uniform = torch.zeros_like(student)  # hidden states of a uniform teacher, whatever the head: constant in w too

    def outputs(s, w):
        out = fused_gap_gate(s, uniform, w, targets, divergence=divergence, temperature=0.8)
        return *fused_logprob(s, w, targets), *(x for x in out if x is not None and x.requires_grad)

    assert torch.autograd.gradcheck(outputs, (leaf(student), leaf(weight)))


def test_ignored_rows_may_hold_nan_and_give_zeros_and_zero_gradient(backend):
    student, teacher, weight, targets = head_inputs(ignored=(3, *range(17, 26), 30))
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


def test_a_target_with_probability_0_999_keeps_its_small_gradient(backend):
    student, teacher, weight, targets = head_inputs(6, 8, 501)
    student, weight[400], targets[:] = student[:1].expand(6, -1), 0.0, 400
    weight[400] = student[0] / student[0].norm()**2 * (torch.logsumexp(student[0] @ weight.T, 0) + math.log(999))
    inputs = leaf(student), leaf(weight)
    logp, want = fused_logprob(*inputs, targets)[0], dense(inputs[0], teacher, inputs[1], targets).logp
    assert (abs(logp.exp() - 0.999) < 1e-4).all()
    for a, b in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (logp, want))):
        assert (a - b).norm() < 1e-3 * b.norm()  # 1 - p is known to eps / 0.001


@pytest.mark.parametrize("keep_bytes, kept, pairs", [(0, 0, 0), (17 * 131 * 8, 14, 7), (2**27, 21, 21)])
def test_no_product_is_computed_that_was_kept_or_that_no_gradient_needs(monkeypatch, keep_bytes, kept, pairs):
    set_chunks(monkeypatch, 7, 50, keep_bytes)
    products, original = [], kernels.accumulate
    monkeypatch.setattr(kernels, "accumulate", lambda *a: products.append(1) or original(*a))
    student, teacher, weight, targets = head_inputs()
    assert not fused_gap_gate(student, leaf(teacher), weight, targets).logp.requires_grad
    passing = torch.inference_mode()(teacher.clone)()  # which cannot be saved for the backward pass
    for s, w, count in ((leaf(student), weight, 1), (student, leaf(weight), 1), (leaf(student), leaf(weight), 2)):
        for divergence, output, again in ((None, "logp", 21 - kept), ("rkl", "logp", 21 - pairs),
                                          ("rkl", "divergence", 2 * (21 - pairs))):
            products.clear()
            out = fused_gap_gate(s, teacher if divergence else passing, w, targets, divergence=divergence)
            assert len(products) == 2 * 7 * 3  # two sides of 43 tokens by 131 columns
            getattr(out, output).sum().backward()
            assert len(products) == 42 + again + 21 * count


def test_memory_of_logits_stays_bounded_as_tokens_grow(monkeypatch):
    set_chunks(monkeypatch, 16, 300, 0)
    with torch.profiler.profile(profile_memory=True) as seen:
        run(fused_gap_gate, *head_inputs(200, 8, 301), divergence="jsd")
    assert 16 * 300 <= max(x.self_cpu_memory_usage for x in seen.events()) / 4 < 200 * 301 / 4


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
    *(("temperature", x, ValueError, f"lie in 1e-12..1e12, got {x}") for x in (0.0, -1.0, 9e-13, 2e12, math.nan)),
    *((name, "kl", ValueError, f"{name}='kl' is unknown") for name in ("gate", "divergence", "backend")),
])
def test_inputs_that_do_not_fit_are_refused_in_one_sentence_with_the_offending_values(argument, value, error, words):
    arguments = dict(zip(("student", "teacher", "weight", "targets"), head_inputs(3)))
    with pytest.raises(error, match=words) as caught:
        fused_gap_gate(**arguments | {argument: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["triton is not installed", "the tensors are on cpu", "a tensor is fp64"])
def test_auto_is_triton_on_a_gpu_and_a_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch, words):
    student, _, weight, targets = head_inputs()
    gpu = types.SimpleNamespace(is_cuda=True, dtype=bf16, device="cuda:0")
    assert choose_backend("auto", student, weight) == choose_backend("torch", student, weight) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", mock.Mock(side_effect=[(8, 0), (7, 5)]))
    assert [choose_backend("auto", gpu, gpu) for _ in range(2)] == [[*kernels.BACKENDS][-1], "torch"]
    monkeypatch.setattr(torch.cuda, "device_of", mock.MagicMock())  # triton's kernels run on the current device
    assert fused_logprob(student, weight, targets) and torch.cuda.device_of.call_args.args[0] is weight
    monkeypatch.setattr(kernels, "triton", None if "installed" in words else types)
    monkeypatch.setattr(kernels, "BACKENDS", dict.fromkeys(("torch", "triton")))
    monkeypatch.setenv("TRITON_INTERPRET", "0" if "cpu" in words else "1")
    with pytest.raises(ValueError, match=words):
        fused_logprob(student.to(f64 if "fp64" in words else f32), weight, targets, backend="triton")


def python(*arguments, folder=ROOT):
    return subprocess.check_output([sys.executable, *arguments], cwd=folder, text=True)


@pytest.mark.parametrize("with_triton", [pytest.param(True, marks=needs_triton), False])
def test_the_file_alone_in_an_empty_folder_imports_and_runs(with_triton, tmp_path):
    (tmp_path / "kernels.py").write_text((ROOT / "kernels.py").read_text())
    hidden = "" if with_triton else "sys.modules['triton'] = None; "
    scores = "kernels.fused_logprob(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 3]))[0]"
    program = f"import sys; {hidden}import torch, kernels; print(*kernels.BACKENDS, {scores}.argmax().item())"
    assert python("-c", program, folder=tmp_path).split() == ["torch", *["triton"] * with_triton, "0"]


def test_a_bf16_gradient_of_w_needs_no_wider_sums_where_one_product_gives_it(monkeypatch):
    student, _, weight, targets = head_inputs(dtypes=(bf16,) * 3)
    problem, written = kernels.Problem(student, None, weight, targets, 0.7, None, f32), []
    dz = torch.randn(len(student), len(weight), generator=torch.Generator().manual_seed(2)).bfloat16()
    backend = kernels.Backend(None, lambda *_: lambda rows, columns, w: dz[rows, columns])
    monkeypatch.setattr(kernels, "operand_dtype", lambda problem: bf16)  # as on a GPU
    set_chunks(monkeypatch, 99, 50, 0)
    found = kernels.gradients(problem, None, None, {}, backend, False, True)[1]
    want = 0.7 * dz.double().T @ student.double()
    assert found.dtype == bf16 and (found - want).norm() < 5e-3 * want.norm()
    for tokens in (99, 40):  # one chunk, two
        set_chunks(monkeypatch, tokens, 50, 0)
        monkeypatch.setattr(kernels, "accumulate", lambda out, *_: written.append(out.dtype))
        kernels.gradients(problem, None, None, {}, backend, False, True)
    assert set(written[:3]) == {bf16} and set(written[3:]) == {f32}


@needs_triton
@pytest.mark.parametrize("capability, hip, key", [
    ((8, 0), None, "sm_80"), ((8, 9), None, "sm_80"), ((9, 0), None, "sm_90"), ((10, 3), None, "sm_90"),
    ((12, 0), None, "sm_80"), ((9, 4), "6.4", "gfx942"),
])
def test_a_device_gets_the_tiles_of_its_architecture(monkeypatch, capability, hip, key):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    student, teacher, weight, _ = head_inputs(dtypes=(bf16, f32, bf16))
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    for pair, other, found in ((False, None, 0), (True, student, 1), (False, teacher, 2), (True, teacher, 3)):
        problem = kernels.Problem(student.bfloat16(), other, on_gpu, None, 1.0, None, f32)
        assert kernels.tile_for(problem, pair) == kernels.TILES[key][found]


@needs_triton
@pytest.mark.parametrize("n, rounds_of_tiles", [(8192, 288), (128, 5), (1, 5), (20_000, 713)])
def test_strips_cover_the_vocabulary_and_leave_few_processors_idle(monkeypatch, n, rounds_of_tiles):
    launched, v = [], 151_936
    monkeypatch.setattr(kernels, "launch", lambda *a, **_: launched.append(a))
    monkeypatch.setattr(kernels, "tile_for", lambda *_: kernels.TILES["sm_90"][0])  # 594 tiles of 256 columns
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: mock.Mock(multi_processor_count=132))
    weight = mock.MagicMock(is_cuda=True, new_zeros=lambda *size, dtype: size)
    weight.__len__.return_value = v
    problem = kernels.Problem(None, None, weight, range(n), 1.0, None, f32)
    fields, strips, tokens = kernels.by_strips(None, problem, False, 4)
    (_, _, _, parts, _, length), blocks = launched[0], -(-n // 128)
    assert (fields, tokens) == (4, n) and parts == strips and (strips - 1) * length < 594 <= strips * length
    assert -(-blocks * strips // 132) * length <= rounds_of_tiles  # at best blocks * 594 / 132


@needs_triton
def test_rows_begin_where_64_bits_say():
    @kernels.triton.jit
    def offsets(out, rows, stride, n: tl.constexpr):
        at = row(out, tl.load(rows + tl.arange(0, n)), stride)  # a pointer, in bytes
        tl.store(out + tl.arange(0, n)[:, None], at.to(tl.int64))

    rows, out = torch.tensor([0, 1, 20_000, 2**31 - 1], dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    offsets[(1,)](out, rows, 151_936, 4)
    assert torch.equal(out - out[0], rows.long() * 151_936 * 8)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_is_within_the_promised_bounds_of_fp64(name, capsys, monkeypatch):
    monkeypatch.setattr(bench_kernels, "mend_interpreter", lambda: None)  # done above, and impossible without triton
    bench_kernels.main(["accuracy", "--backend", name])
    errors = {row.pop("error of"): row for row in json.loads(capsys.readouterr().out)}
    assert {"logp", "teacher_logp", "entropy", "gap", "gate", "rkl", "fkl", "jsd", "d_weight, jsd"} <= errors.keys()
    for quantity, found in errors.items():
        half = 5e-3 if quantity.startswith("d_") else 1e-5
        assert found[f"{name} float32"] < 1e-5 and found[f"{name} bfloat16"] < half, (quantity, found)


@needs_triton
@pytest.mark.slow
def test_every_kernel_that_would_be_chosen_compiles_without_spills_and_with_matrix_instructions(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    python("-m", "tools.bench_kernels", "compile", "--out", str(tmp_path / "report.json"))
    rows = json.loads((tmp_path / "report.json").read_text())["compile"]["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"} and len(rows) == 5 * 16
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] <= row["shared_limit"], row
        exact = row["dtype"] == "fp32" and row["arch"] in ("sm_80", "sm_89")  # which have no such units for it
        assert row["matrix_instructions"] > 0 or exact, row
        assert row["dtype"] == "fp32" or row["FLOP/B"] > 85, row


def test_the_model_expects_60_percent_of_cublas_even_of_a_slow_l2():
    slow = bench_kernels.MACHINES["sm_90"]._replace(l2=5.5e12)
    sides = [bench_kernels.predict(name, "sm_90", machine=slow) for name in ("student", "teacher")]
    assert 2 / sum(1 / x["TFLOP/s"] for x in sides) > 424 and all(x["limited by"] == "L2" for x in sides)
    found = bench_kernels.predict("student", "sm_90")
    assert found["limited by"] == "tensor" and 0.4 < found["shared memory"] / found["tensor"] < 0.6  # 80 of 128 clocks


def test_reports_are_printed_and_recorded_with_their_command_and_unknown_ones_refused(tmp_path, capsys, monkeypatch):
    cases = {"tiny": (16, 8, 64, True, "rkl"), "one-sided": (16, 8, 64, False, None)}
    for name, value in {"CASES": cases, "LARGE": cases, "measure_memory": lambda *_: 1.5}.items():
        monkeypatch.setattr(bench_kernels, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "new" / "report.json"
    bench_kernels.main(["gpu", "large", "cpu", "memory", "roofline", "--threads", "1", "--out", str(out)])
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert "not done: there is no GPU here" in printed and "Qwen2.5-7B" in printed
    assert list(found) == ["cpu", "large", "memory", "roofline"]
    assert found["cpu"]["command"].startswith("python -m tools.bench_kernels gpu large cpu")
    assert found["large"]["rows"] == [{"case": name, "fused MiB": 1.5} for name in cases]
    assert all(row["full s"] > 0 and row["memory"] == 1 for row in found["cpu"]["rows"])
    assert all(row["triton"] < row["torch on cpu"] < row["full logits, at least"] for row in found["memory"]["rows"])
    with pytest.raises(SystemExit):
        bench_kernels.main(["memroy"])
    assert "there is no report memroy: choose from cpu, large" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    assert 0 <= bench_kernels.measure_memory("fused", "gap_gate, V=1024", 1) < 200
