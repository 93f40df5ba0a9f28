"""Tests of several processes as one run: two equal one, resume as one and the other way round, and end together."""

import faulthandler
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch

import envs
import kernels
import sdar
from conftest import flags, lines_of, weights_of

pytestmark = pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(),
                                reason="forks processes that meet over gloo, on the CPU")
ROUNDING = {"grpo/grad_norm": 1e-5, "rollout/logp_diff_max": 1e-5}  # a sum of all gradients' squares; rounding itself
SETTINGS = {"tasks": 3, "lr": 1e-4, "steps": 2, "eval_tasks": 3, "updates": 2, "micro_tokens": 1000}


def run_ranks(arguments, folder, size=2, before=lambda rank: None, during=lambda pids: None):
    """sdar.main in forked processes, as torchrun would start them -> (exit statuses, what each has written)."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [folder / f"rank-{rank}.txt" for rank in range(size)]
    pids = []
    for rank, log in enumerate(logs):
        pid = os.fork()
        if pid == 0:
            run_rank(arguments, rank, size, store.port, log, before)
        pids.append(pid)
    during(pids)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return statuses, [log.read_text() for log in logs]


def run_rank(arguments, rank, size, port, log, before):
    """Ends the process that calls it."""
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        faulthandler.dump_traceback_later(300, exit=True)  # processes that wait for each other would do so for an hour
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                       "TORCHELASTIC_RESTART_COUNT": "0"}
        before(rank)
        status = sdar.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_as(size, arguments, folder):
    """A run of one process, in this one, or of several."""
    assert sdar.main(arguments) == 0 if size == 1 else run_ranks(arguments, folder, size)[0] == [0] * size


def assert_close(run, other, step):
    """Losses and other metrics and weights agree to 1e-6, AdamW's moments to 1e-5 of the largest, and all tokens."""
    for a, b in zip(lines_of(run), lines_of(other), strict=True):
        assert a.keys() == b.keys()
        assert {name: (a[name], b[name]) for name in a
                if a[name] != pytest.approx(b[name], rel=ROUNDING.get(name, 1e-6), abs=ROUNDING.get(name, 1e-6))} == {}
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}
    a, b = (weights_of(one / f"checkpoint-{step}") for one in (run, other))
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max() for name in a) < 1e-6
    a, b = (torch.load(one / f"checkpoint-{step}" / "state.pt") for one in (run, other))
    assert a["more"]["skills"] == b["more"]["skills"]
    a, b = a["optimizer"], b["optimizer"]
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for number, moments in a["state"].items():
        for name, one in moments.items():
            assert (one - b["state"][number][name]).abs().max() <= 1e-5 * one.abs().max()
    a, b = ([[turn["tokens"] for turn in json.loads(line)["turns"]] for line in
             (one / "episodes" / f"step-{step:05d}.jsonl").read_text().splitlines()] for one in (run, other))
    assert a == b


@pytest.fixture(scope="module", autouse=True)
def returns():
    """What the random model never wins: returns that differ within a group, and follow from an episode's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdar, "episode_return", lambda cfg, episode: 10 * random.Random(episode.name).random())
        yield


@pytest.fixture(scope="module")
def pair(model_folder, tmp_path_factory):
    """A run of one process, and the same of two: live teacher, its divergence, reference, two updates per step, shares
    of two groups and of one."""
    folder = tmp_path_factory.mktemp("pair")
    for size in (1, 2):
        run_as(size, flags(model_folder, folder / str(size), **SETTINGS, surrogate="rkl"), folder)
    return folder


def test_two_processes_equal_one(pair):
    assert_close(pair / "2", pair / "1", step=2)
    moved = weights_of(pair / "2" / "checkpoint-2")["model.norm.weight"] - 1
    assert moved.abs().max() > 1e-4  # a hundred times what they may differ by


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"method": "gigpo"}, {"method": "opid"}, {"retrieval": "ucb", "distill": "failed"},
    {"method": "rlsd", "teacher": "ema", "advantage_stats": "turn"}, {"tasks": 2, "micro_tokens": 1, "updates": 6}])
def test_two_processes_equal_one_with_every_method(changes, model_folder, tmp_path):
    for size in (1, 2):
        arguments = flags(model_folder, tmp_path / str(size), **SETTINGS | changes)
        run_as(size, [*arguments, "--recompute"], tmp_path)
    assert_close(tmp_path / "2", tmp_path / "1", step=2)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_run_resumes_with_another_number_of_processes(before, after, pair, tmp_path):
    straight, resumed = (shutil.copytree(pair / source, tmp_path / name) for source, name in
                         (("1", "straight"), (str(before), "resumed")))
    run_as(1, ["--resume", str(straight), "--steps", "4"], tmp_path)
    run_as(after, ["--resume", str(resumed), "--steps", "4"], tmp_path)
    assert_close(resumed, straight, step=4)


def after(count, function, then):
    """A function that from its count-th call on calls `then` before."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) > count:
            then()
        return function(*args, **kwargs)

    return call


def sold_out():
    raise RuntimeError("sold out")


def no_memory():
    raise MemoryError("CUDA out of memory")


FAULTS = {  # what goes wrong in the second step of rank 1 alone: (where, calls before, what), (the error, what is kept)
    "an environment": ((envs.WebShop, "step", 6, sold_out), "sold out. All whole steps are saved in {}/checkpoint-1"),
    "memory": ((kernels, "fused_gap_gate", 1, no_memory), "lower --micro_tokens"),
    "the process": ((kernels, "fused_gap_gate", 1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
                    "Another process of this run has ended"),
    "a setting": (None, "--tasks 1 leaves processes without a group")}


@pytest.mark.parametrize("what", FAULTS)
def test_what_fails_in_one_process_ends_all_with_one_sentence(what, model_folder, tmp_path):
    place, sentence = FAULTS[what]

    def before(rank):
        if place and rank == 1:
            where, name, count, then = place
            setattr(where, name, after(count, getattr(where, name), then))

    run = tmp_path / "run"
    changes = {"tasks": 2 if place else 1, "save_every": 9, "eval_every": 0, "eval_tasks": None}
    statuses, written = run_ranks(flags(model_folder, run, **changes), tmp_path, before=before)
    errors = [line for text in written for line in text.splitlines() if line.startswith("error: ")]
    assert 2 in statuses and 0 not in statuses and "Traceback" not in "".join(written)
    assert len(errors) == 1 and sentence.format(run) in errors[0]
    assert place is None or "--resume" in errors[0]


def test_nan_in_one_processs_part_of_the_weights_is_named(model_folder, tmp_path):
    def before(rank):
        step = sdar.optimizer_step

        def spoil(model, *others):  # the first of two updates
            norm = step(model, *others)
            model.get_input_embeddings().weight.detach().to_local().fill_(float("nan") if rank else 0.1)
            return norm

        sdar.optimizer_step = spoil

    arguments = flags(model_folder, tmp_path / "run", updates=2, steps=1, eval_every=0, eval_tasks=None)
    statuses, written = run_ranks(arguments, tmp_path, before=before)
    errors = [line for text in written for line in text.splitlines() if line.startswith("error: ")]
    assert statuses == [2, 2] and len(errors) == 1 and "the weights hold NaN or infinity (model.embed" in errors[0]


@pytest.mark.parametrize("number, to", [(signal.SIGTERM, (0, 1)), (signal.SIGINT, (1,))])
def test_a_signal_to_any_process_saves_the_whole_steps_of_all_once(number, to, model_folder, tmp_path):
    run, end = tmp_path / "run", time.monotonic() + 120

    def during(pids):
        while not (run / "checkpoint-1").exists():
            assert time.monotonic() < end, "checkpoint-1 did not appear"
            time.sleep(0.05)
        for rank in to:
            os.kill(pids[rank], number)

    arguments = flags(model_folder, run, steps=100, save_every=1, eval_every=0, eval_tasks=None)
    statuses, written = run_ranks(arguments, tmp_path, during=during,
                                  before=lambda rank: signal.signal(signal.SIGINT, signal.default_int_handler))
    saved = sdar.runs.checkpoints(run)[-1]
    assert statuses == [130, 130] and f"stopped after step {saved.name[11:]}, saved in {saved}" in written[0]
    assert written[1] == "" and len((run / "metrics.jsonl").read_text().splitlines()) == int(saved.name[11:])


@pytest.mark.slow
def test_torchrun_starts_a_run_and_hands_ctrl_c_on(model_folder, tmp_path):
    run, end = tmp_path / "run", time.monotonic() + 200
    arguments = flags(model_folder, run, steps=100, save_every=1, eval_every=0, eval_tasks=None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = subprocess.Popen(
        [*torchrun, sdar.__file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (run / "checkpoint-1").exists():
        assert launcher.poll() is None and time.monotonic() < end, "checkpoint-1 did not appear"
        time.sleep(0.05)
    launcher.send_signal(signal.SIGINT)
    output, errors = launcher.communicate(timeout=60)
    assert f"saved in {sdar.runs.checkpoints(run)[-1]}; go on" in output and "error: " not in errors
    assert output.count("run folder") == output.count("stopped after step") == 1
