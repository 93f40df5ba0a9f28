"""Injects faults into real runs of sdar.py and eval.py and says how many were handled.

    python -m tools.faults                 all of them, some side by side; a line per fault, then "handled n/N"
    python -m tools.faults signal disk     those whose names hold one of these words

A fault is handled if the program ends with the right exit status, prints no traceback and, where it fails, one sentence
on standard error with the right words in it; and if nothing is lost: where the table says `goes_on`, the run is resumed
and its weights and log must equal, bit for bit, those of a run without a fault.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds for one command
SMALL = {"tasks": 2, "group_size": 2, "max_turns": 2, "max_response_tokens": 6, "eval_every": 0, "save_every": 1,
         "keep": 9, "steps": 4, "threads": 1}
QUIET = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# What a patched child process does before main: `at_step` waits for a step's end, `fail` replaces the n-th call.
PRELUDE = '''
import math, os, resource, shutil, signal, sys, time
import sdar, eval as evaluation, envs, torch
from lib import retrieval, runs

def at_step(number, do):
    finish = runs.Run.finish_step
    def finish_step(run, *args):
        finish(run, *args)
        if run.step == number:
            do(run)
    runs.Run.finish_step = finish_step

def fail(where, name, call, error):
    function, calls = getattr(where, name), []
    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise error
        return function(*args, **kwargs)
    setattr(where, name, failing)

def step_at(call, act):
    """The call-th step of a shop returns act(its answer)."""
    step, calls = envs.WebShop.step, []
    def odd_step(env, action):
        calls.append(action)
        answer = step(env, action)
        return act(answer) if len(calls) == call else answer
    envs.WebShop.step = odd_step

def search_always():
    """Every response is a search, and a failed one is tried again at once. The retriever goes down after the first."""
    envs.PARSERS["search"] = lambda text, official=False: ("<search> lisbon </search>", True)
    retrieval.Retriever.__init__.__kwdefaults__["pause"] = 0.0
    retrieval.Retriever.probe = lambda retriever: None
'''


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


class Case(NamedTuple):
    """A fault: `act` prepares a folder, runs a command in it and returns its Done; `then` asserts what must hold."""

    name: str
    act: object
    status: tuple = (2,)
    says: str = ""
    then: object = None


# ------------------------------------------------------------------------------------------------------ to run commands

def flags(**changes):
    """The flags of a short run into the folder `run`; a change to None leaves one out."""
    values = SMALL | {"out": "run"} | changes
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def execute(folder, args, program="sdar", env=None, preexec=None, **streams):
    """Runs a command in the folder, by an interpreter of its own, to its end -> Done."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    known = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHONIO", "LANG"))}
    done = subprocess.run([sys.executable, str(ROOT / f"{program}.py"), *args], cwd=folder, preexec_fn=preexec,
                          env=known | QUIET | (env or {}), timeout=LIMIT, **streams)
    text = lambda raw: (raw or b"").decode("utf-8", "replace")
    return Done(done.returncode, text(done.stdout), text(done.stderr))


class Forked:
    """A command in a process forked from one that has loaded torch already: the same, 4 s sooner.

    Its output goes to files beside the folder; patch: code that the process runs before main.
    """

    parent, lock = None, threading.Lock()

    def __init__(self, folder, args, program="sdar", patch=""):
        self.out, self.err, self.status, self.pid = (
            folder.with_name(f"{folder.name}.{name}-{time.monotonic_ns()}") for name in ("out", "err", "status", "pid"))
        job = {"folder": str(folder), "args": args, "program": program, "patch": patch, "out": str(self.out),
               "err": str(self.err), "status": str(self.status), "pid": str(self.pid)}
        with Forked.lock:
            if Forked.parent is None:
                Forked.parent = subprocess.Popen([sys.executable, "-m", "tools.faults", "--serve"], cwd=ROOT, text=True,
                                                 stdin=subprocess.PIPE, env=os.environ | QUIET)
            print(json.dumps(job), file=Forked.parent.stdin, flush=True)

    @staticmethod
    def end():
        if Forked.parent is not None:
            Forked.parent.stdin.close()
            Forked.parent.wait()
            Forked.parent = None

    def wait_for(self, condition):
        end = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > end:
                os.kill(int(self.pid.read_text()), signal.SIGKILL)
                raise AssertionError(f"not done after {LIMIT} s")
            time.sleep(0.01)

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self.pid.read_text()), number)

    def done(self):
        self.wait_for(lambda: self.status.exists() and self.status.read_text())
        return Done(int(self.status.read_text()), self.out.read_text(errors="replace"),
                    self.err.read_text(errors="replace"))


def serve():
    """The process that others are forked from: a job per line of standard input."""
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import eval  # noqa: F401
    for line in sys.stdin:
        if os.fork() == 0:
            supervise(json.loads(line))
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def supervise(job):
    """Runs a job in a child and writes down its process id and how it ended."""
    child = os.fork()
    if child == 0:
        os._exit(work(job))
    Path(job["pid"]).write_text(str(child))
    Path(job["status"]).write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


def work(job):
    os.chdir(job["folder"])
    for path, descriptor in ((job["out"], 1), (job["err"], 2), (os.devnull, 0)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    import eval
    import sdar
    try:
        exec(PRELUDE + job["patch"], {})
        status = {"sdar": sdar, "eval": eval}[job["program"]].main(job["args"])
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def train(patch="", **changes):
    """A case's act: a run of four steps."""
    return lambda folder: Forked(folder, flags(**changes), patch=patch).done()


def alone(*args, program="sdar", **how):
    """A case's act: a command with an interpreter of its own."""
    return lambda folder: execute(folder, args, program, **how)


def full(*args, program="sdar"):
    """A case's act: a command whose standard output is on a full disk."""
    def act(folder):
        with open("/dev/full", "wb") as disk:
            return execute(folder, args, program, stdout=disk)
    return act


def say(*args, program="sdar"):
    """A case's act: a command."""
    return lambda folder: Forked(folder, args, program).done()


def stopped(*signals, after="step   1/4", seed=0, patch=""):
    """A case's act: a run that gets these signals some time after it has printed `after`."""
    def act(folder):
        process = Forked(folder, flags(), patch=patch)
        process.wait_for(lambda: process.out.exists() and after in process.out.read_text())
        time.sleep(random.Random(seed).uniform(0, 0.8))
        for number in signals:
            process.send(number)
            time.sleep(0.01)
        return process.done()
    return act


def early(seconds):
    """A case's act: Ctrl-C some seconds after the start, most of which pass while torch is loaded."""
    def act(folder):
        process = subprocess.Popen([sys.executable, str(ROOT / "sdar.py"), *flags()], cwd=folder, text=True,
                                   env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
        return Done(process.returncode, out, err)
    return act


def piped(read, *args, program="sdar"):
    """A case's act: a command whose reader goes away after `read` lines."""
    def act(folder):
        process = subprocess.Popen([sys.executable, str(ROOT / f"{program}.py"), *args], cwd=folder, text=True,
                                   env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(read):
            process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        return Done(process.wait(LIMIT), "", err)
    return act


# --------------------------------------------------------------------------------------------------- to prepare folders

STRAIGHT = Path(tempfile.gettempdir()) / f"sdar-faults-{os.getpid()}" / "straight"  # holds a run without a fault


def make_straight():
    STRAIGHT.mkdir(parents=True)
    for args, program in ((flags(), "sdar"), (["run/checkpoint-4", "--tasks", "2", "--out", "eval.json"], "eval")):
        done = Forked(STRAIGHT, args, program).done()
        assert done.status == 0, done.err


def copied(*damages, args=("--resume", "run"), program="sdar"):
    """A case's act: a command on a copy of the run without a fault, after damages, functions of its folder."""
    def act(folder):
        shutil.copytree(STRAIGHT, folder, dirs_exist_ok=True)
        for damage in damages:
            damage(folder / "run")
        return Forked(folder, args, program).done()
    return act


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def replace(path):
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def spoil(how, name):
    return lambda run: how(run / name)


def put(name, text):
    def damage(run):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return damage


def after(*prepare):
    """A case's act: the last of these functions of the folder, after the others."""
    return lambda folder: [do(folder) for do in prepare][-1]


def setting(**changes):
    """Other values in config.json, and in the checkpoints, as if the run had begun with them."""
    def damage(run):
        path = run / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        for seal in run.glob("checkpoint-*/run.json"):
            stored = json.loads(seal.read_text())
            seal.write_text(json.dumps(stored | {"settings": stored["settings"] | changes}))
    return damage


def without_end(run):
    """As a run stopped after step 3, which is resumed to make step 4."""
    remove(run / "checkpoint-4")


# ------------------------------------------------------------------------------------------------------ what must hold

def weights(run, step=4):
    from safetensors.torch import load_file
    return load_file(run / f"checkpoint-{step}" / "model.safetensors")


def lines(run):
    """metrics.jsonl, which must be JSON, without times and memory."""
    def refuse(word):
        raise AssertionError(f"{word} in metrics.jsonl")

    found = [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("time/", "mem/"))} for line in found]


def whole(folder, run="run"):
    """The run has ended and equals the one without a fault."""
    mine, straight = weights(folder / run), weights(STRAIGHT / "run")
    assert all(mine[name].equal(straight[name]) for name in straight), "other weights"
    assert lines(folder / run) == lines(STRAIGHT / "run"), "another log"


def goes_on(folder, run="run"):
    """The run can be resumed, and then equals the one without a fault."""
    done = Forked(folder, ["--resume", run]).done()
    assert done.status == 0, f"resume ends with {done.status}: {done.err[-300:]}"
    whole(folder, run)


def nothing_made(folder):
    assert not (folder / "run").exists(), "a run folder was left"


def holds(*names, then=whole):
    """These files are there, and `then` holds."""
    def check(folder):
        for name in names:
            assert (folder / name).exists(), f"{name} is gone"
        then(folder)
    return check


def nothing(folder):
    """No more need hold."""


def has_no_password(folder):
    for path in (folder / "run").rglob("*.json*"):
        assert "secret" not in path.read_text(), path


def check(case, folder):
    """What is wrong with how a fault was handled, or None."""
    folder.mkdir(parents=True)
    try:
        done = case.act(folder)
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        if done.status not in case.status:
            return f"exit status {done.status} instead of {case.status}: {done.err[-300:]}"
        if "Traceback" in done.out + done.err or "Exception ignored" in done.err:
            return f"a traceback: {done.err[-300:]}"
        if len(errors) != (done.status == 2) or errors and not errors[0].endswith((".", "?", "]")):
            return f"not one sentence: {done.err[-300:]}"
        if case.says not in done.out + done.err:
            return f"nothing about {case.says!r}: {done.err[-300:]}"
        (case.then or nothing)(folder)
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- faults of a kind

def beside(args):
    """A case's act: a command while another run writes to the folder `run`; that one must end well."""
    def act(folder):
        wait = "while not os.path.exists('go'): time.sleep(0.01)"
        other = Forked(folder, flags(), patch=f"import time\ndef wait(run):\n    {wait}\nat_step(1, wait)")
        other.wait_for(lambda: other.out.exists() and "step   1/4" in other.out.read_text())
        done = Forked(folder, args).done()
        (folder / "go").touch()
        assert other.done().status == 0, "the first run suffered"
        return done
    return act


def two_at_once(folder):
    """Two runs with the default name."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: Forked(folder, flags(out=None)).done(), range(2))
    assert first.status == second.status == 0, first.err + second.err
    return first


def both_there(folder):
    for name in ("webshop-sdar-0", "webshop-sdar-0-2"):
        whole(folder / "runs", name)


def retriever(answer, patch="", pause=0.0):
    """A case's act: a run of Search-QA whose retriever answers each request with these bytes, then hangs up.

    patch: code that the run's process executes first. pause: seconds before each byte.
    """
    def answer_slowly(connection):
        with connection, contextlib.suppress(OSError):  # the client may go away
            connection.recv(65536)
            for byte in answer:
                time.sleep(pause)
                connection.sendall(bytes([byte]))

    def act(folder):
        server = socket.create_server(("127.0.0.1", 0))

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer_slowly, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        try:
            address = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}/retrieve?key=secret"
            return Forked(folder, flags(env="search", steps=1, retriever=address), patch=patch).done()
        finally:
            server.close()
    return act


def damaged(how, name):
    """A case: the newest checkpoint is damaged, the one before is taken, and the run ends as it would have."""
    return Case(f"{how.__name__} {name} of a checkpoint", copied(spoil(how, f"checkpoint-4/{name}")), (0,),
                f"checkpoint-4/{name}", whole)


def memory_error(where, call):
    text = "DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 1 bytes"
    return f"fail({where}, {call}, RuntimeError('{text}'))"


FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"  # no file can grow beyond, as on a full disk
COPY = ("--resume", "run")
CONFIG = ("--config", "run/config.json")
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
TWO_TASKS = ("tiny", "--tasks", "2", "--max_turns", "2", "--out", "e.json")

NOT_JSON = b"HTTP/1.0 200 OK\r\n\r\n<html>"
IMPATIENT = "retrieval.Retriever.__init__.__kwdefaults__['timeout'] = 0.3"
WITH_NAN_SCORE = "(*answer[:4], answer[4] | {'score': math.nan})"
ENVIRONMENT_FAULTS = [  # name, what a step does instead of returning its answer, words of the sentence, flags
    ("that raises", "[].pop()", "IndexError: pop from empty list", {}),
    ("that hangs", "time.sleep(60)", "within --env_timeout 0.5 seconds", {"env_timeout": 0.5}),
    ("that exits", "sys.exit(3)", "SystemExit: 3", {}),
    ("that changes the directory", "(os.chdir('/'), answer)[1]", "changed the working directory to /", {}),
    ("that returns nothing", "None", "instead of a tuple of 5 values", {}),
    ("that returns bytes", "(b'page', *answer[1:])", "are bytes and dict instead of str and dict", {}),
    ("whose score is NaN", WITH_NAN_SCORE, "the score is nan instead of a finite number", {}),
    ("whose score is NaN and pays", WITH_NAN_SCORE, "the score is nan instead of a finite number", {"reward": "score"})]

CASES = [
    # signals, at moments drawn by their seeds
    *(Case(f"signal {number.name} at moment {seed}", stopped(number, seed=seed), (0, 130, -9), "", goes_on)
      for number, seeds in ((signal.SIGINT, 3), (signal.SIGTERM, 3), (signal.SIGHUP, 2), (signal.SIGKILL, 4))
      for seed in range(seeds)),
    Case("signal SIGINT pressed five times", stopped(*[signal.SIGINT] * 5), (0, 130), "", goes_on),
    Case("signal SIGTERM then SIGINT", stopped(signal.SIGTERM, signal.SIGINT, seed=5), (0, 130), "", goes_on),
    *(Case(f"signal SIGINT after {seconds} s", early(seconds), (0, 130, -2)) for seconds in (0.5, 1.0, 2.0, 3.0)),
    Case("signal SIGHUP under nohup", stopped(signal.SIGHUP, patch="signal.signal(signal.SIGHUP, signal.SIG_IGN)"),
         (0,), "", whole),
    # damaged checkpoints
    *(damaged(how, name) for name, hows in {
        "model.safetensors": (flip, cut, empty, replace, remove), "state.pt": (flip, cut, empty, remove),
        "tokenizer.json": (flip, remove), "config.json": (cut, empty), "run.json": (cut, empty, remove)}.items()
      for how in hows),
    Case("every checkpoint damaged", copied(*(spoil(flip, f"checkpoint-{n}/state.pt") for n in range(5))),
         says="checkpoint-4/state.pt is damaged"),
    Case("half a checkpoint left by kill -9", copied(
        without_end, put(".checkpoint-4.tmp/model.safetensors", "half")), (0,), "", whole),
    Case("killed while a checkpoint was replaced", copied(
        lambda run: (run / "checkpoint-4").rename(run / ".checkpoint-4.old")), (0,), "is finished", whole),
    Case("names like checkpoints", copied(without_end, put("checkpoint-best-9/a", ""), put("checkpoint-9-good/a", ""),
         put("checkpoint-007/state.pt", "")), (0,), "",
         holds("run/checkpoint-best-9/a", "run/checkpoint-9-good/a", "run/checkpoint-007/state.pt")),
    Case("files of others in rotated checkpoints", copied(without_end, put("checkpoint-1/eval.json", ""), args=(
        *COPY, "--keep", "1")), (0,), "", holds("run/checkpoint-1/eval.json")),
    Case("resume from an older checkpoint", copied(args=("--resume", "run/checkpoint-2")), (0,), "is kept in",
         holds("run/set-aside-1/checkpoint-4/model.safetensors", "run/set-aside-1/metrics.jsonl")),
    Case("resume from an older checkpoint, damaged", copied(spoil(cut, "checkpoint-2/state.pt"), args=(
        "--resume", "run/checkpoint-2")), says="checkpoint-2/state.pt has", then=whole),
    Case("reference gone", copied(without_end, setting(kl_coef=0.1), spoil(remove, "checkpoint-0")),
         says="initial weights as reference"),
    Case("reference damaged", copied(without_end, setting(kl_coef=0.1), spoil(flip, "checkpoint-0/model.safetensors")),
         says="checkpoint-0/model.safetensors is damaged"),
    Case("base model gone", copied(without_end, setting(model="nowhere/model")), (0,), "", whole),
    Case("damaged weights evaluated", copied(spoil(flip, "checkpoint-4/model.safetensors"), program="eval", args=(
        "run/checkpoint-4",)), says="model.safetensors is damaged"),
    # the log
    *(Case(f"log {name}", copied(without_end, damage), (0,), "", whole) for name, damage in {
        "with a torn line": lambda run: (run / "metrics.jsonl").open("a").write('{"step": 4, "grpo/lo'),
        "with a foreign line": lambda run: (run / "metrics.jsonl").open("ab").write(b'\xff\x00\n[1]\n{"step": "x"}\n'),
    }.items()),
    # disk
    Case("disk full at the first checkpoint", train(patch=FULL), says="cannot be written"),
    Case("disk full after step 2", train(patch=f"at_step(2, lambda run: {FULL})"), says="The last checkpoint is",
         then=goes_on),
    Case("disk full at the final save", train(patch=f"at_step(3, lambda run: {FULL})", save_every=9),
         says="cannot be written", then=goes_on),
    Case("folder that can't be made", train(out="/proc/run"), says="/proc/run cannot be written"),
    Case("folder is a file", after(put("run", "mine"), train()), says="run cannot be written"),
    Case("run folder deleted midway", train(patch="at_step(2, lambda run: shutil.rmtree(run.folder))"), says="run"),
    Case("log becomes a folder", train(patch="at_step(2, lambda run: (os.remove(run.folder / 'metrics.jsonl'), "
                                             "os.mkdir(run.folder / 'metrics.jsonl')))"), says="cannot be written"),
    Case("episodes are a file", train(patch="at_step(1, lambda run: (shutil.rmtree(run.folder / 'episodes', True), "
                                            "open(run.folder / 'episodes', 'w').close()))", episodes_every=1),
         says="cannot be written", then=lambda folder: [(folder / "run" / "episodes").unlink(), goes_on(folder)]),
    Case("curve without matplotlib", train(patch="sys.modules['matplotlib'] = None", eval_every=4, eval_tasks=2), (0,),
         "curve.png is not drawn"),
    Case("curve.png is a folder", train(patch="at_step(1, lambda run: (os.remove(run.folder / 'curve.png'), "
                                              "os.mkdir(run.folder / 'curve.png')))", eval_every=4, eval_tasks=2), (0,),
         "curve.png is not drawn"),
    # memory and numbers
    *(Case(f"memory runs out in {name}", train(patch=memory_error(where, call)), says="--rollout_batch", then=goes_on)
      for name, where, call in (("sampling", "sdar.TorchEngine, 'decode'", 5), ("scoring", "sdar, 'token_scores'", 3),
                                ("an optimiser step", "torch.optim.AdamW, 'step'", 3))),
    Case("MemoryError", train(patch="fail(sdar, 'pack', 4, MemoryError())"), says="--micro_tokens", then=goes_on),
    Case("weights become NaN", train(patch="at_step(2, lambda run: [p.data.fill_(math.nan) for p in "
                                           "run.model.parameters()])"), says="", then=goes_on),
    Case("gradient becomes NaN", train(patch="loss = sdar.policy_loss\nsdar.policy_loss = lambda *a, **k: "
                                             "(loss(*a, **k)[0] * math.nan, {})"), says="gradient norm is nan"),
    Case("weights diverge", train(lr=1e30), says="."),
    # environments
    *(Case(f"environment {name}", train(patch=f"step_at(20, lambda answer: {act})", **more), says=says, then=goes_on)
      for name, act, says, more in ENVIRONMENT_FAULTS),
    # output
    Case("reader of a run's output gone", piped(3, *flags()), (141,), "", goes_on),
    Case("reader of --help gone", piped(1, "--help"), (0, 141)),
    Case("reader of eval.py's --help gone", piped(1, "--help", program="eval"), (0, 141)),
    Case("reader of an evaluation gone", piped(1, *TWO_TASKS, program="eval"), (0, 141), "",
         holds("e.json", then=nothing)),
    Case("full standard output", full(*flags()), (2,), "Standard output could not be written", whole),
    Case("full standard output of eval.py", full(*TWO_TASKS, program="eval"), (2,), "Standard output",
         holds("e.json", then=nothing)),
    Case("closed standard output", alone(*flags(), preexec=lambda: os.close(1)), (0,), "", whole),
    Case("closed standard error", alone(*flags(), preexec=lambda: os.close(2)), (0,), "", whole),
    *(Case(f"{name} output", alone(*flags(out="läuft ✓"), env=env), (0,), "", lambda folder: whole(folder, "läuft ✓"))
      for name, env in {"ASCII": {"PYTHONIOENCODING": "ascii"}, "CP1252": {"PYTHONIOENCODING": "cp1252"}}.items()),
    Case("C locale", alone(*flags(), env=C_LOCALE), (0,), "", whole),
    Case("C locale and a name beyond it", alone(*flags(out="läuft"), env=C_LOCALE), says="LC_ALL=C.UTF-8"),
    Case("no resource module", train(patch="sys.modules['resource'] = None"), (0,), "", whole),
    Case("control characters in a name", say("--model", "./\x1b[31mred"), says="\\x1b[31mred"),
    # one folder, several programs
    Case("a second run in the folder", beside(flags()), says="Another program is writing", then=whole),
    Case("resume of a running run", beside(COPY), says="Another program is writing", then=whole),
    Case("two default names at once", two_at_once, (0,), "", both_there),
    # settings
    *(Case(f"config.json {name}", copied(damage), says="config.json", then=lambda folder: whole(folder))
      for name, damage in {
        "cut": spoil(cut, "config.json"), "empty": spoil(empty, "config.json"), "gone": spoil(remove, "config.json"),
        "of an unknown setting": setting(speed=9), "of a wrong type": setting(steps="4"),
        "that is a list": put("config.json", '["provenance"]'), "too deep": put(
            "config.json", '{"provenance": ' + "[" * 100_000)}.items()),
    Case("config.json out of bounds", copied(setting(lr=-1.0)), says="--lr"),
    Case("--config of a cut file", copied(spoil(cut, "config.json"), args=CONFIG), says="config.json"),
    Case("--config that is not there", say(*CONFIG), says="run/config.json"),
    Case("--config starts the same run anew", copied(args=(*CONFIG, "--out", "new")), (0,), "",
         lambda folder: whole(folder, "new")),
    Case("--config and --resume", say(*CONFIG, *COPY), says="--resume"),
    Case("resume of a finished run", copied(), (0,), "is finished", whole),
    Case("resume with another learning rate", copied(args=(*COPY, "--lr", "1")), says="--lr", then=whole),
    Case("resume of nothing", say(*COPY), says="not a run folder", then=nothing_made),
    Case("resume of a model folder", say("--resume", str(ROOT / "data" / "tiny")), says="not a run folder"),
    Case("resume of a clone", after(put("clone.json", '{"provenance": 1}'), say("--resume", ".")), says="tools.clone"),
    Case("unknown flag", train(stepz=3), says="--steps", then=nothing_made),
    Case("hyphens in a flag", say("--group-size", "3"), says="--group_size", then=nothing_made),
    Case("word without a flag", say("webshop"), says="webshop"),
    Case("flag without a value", say("--steps"), says="--steps"),
    Case("steps that are not a number", train(steps="many"), says="--steps: 'many'", then=nothing_made),
    Case("learning rate that is not a number", train(lr="nan"), says="--lr", then=nothing_made),
    Case("seed of 80 digits", train(seed="9" * 80), says="--seed", then=nothing_made),
    Case("seed of 5,000 digits", train(seed="9" * 5000), says="--seed", then=nothing_made),
    Case("model that is not there", train(model="./nowhere"), says="nowhere", then=nothing_made),
    # data and skills
    Case("skills that are not there", train(skills="nowhere"), says="general.md", then=nothing_made),
    Case("skills that are not text", after(put("s/general.md", b"\xff"), train(skills="s")), says="UTF-8",
         then=nothing_made),
    Case("data that is not there", train(data="nowhere"), says="nowhere", then=nothing_made),
    Case("data that is cut", after(
        put("d/items_shuffle.json", "[{"), put("d/items_ins_v2.json", "{}"), train(data="d")),
         says="items_shuffle.json", then=nothing_made),
    # retriever, with a password and a key that must stay in the command
    *(Case(f"retriever that answers {name}", retriever(answer, "search_always()"), (0,), "errors 8", has_no_password)
      for name, answer in {
        "nothing": b"", "garbage": b"\x00garbage\r\n\r\n", "status 500": b"HTTP/1.0 500 No\r\n\r\n",
        "no JSON": NOT_JSON}.items()),
    Case("retriever that answers a byte a second", retriever(NOT_JSON, "search_always()\n" + IMPATIENT, pause=1), (0,),
         "errors 8", has_no_password),
    Case("retriever that is slow from the start", retriever(NOT_JSON, IMPATIENT, pause=1), says="no answer in",
         then=nothing_made),
    Case("retriever that answers no JSON from the start", retriever(NOT_JSON), says="the answer is not of the form",
         then=nothing_made),
    Case("retriever that is not there", train(env="search", retriever="http://127.0.0.1:9"), says="127.0.0.1:9",
         then=nothing_made),
    # evaluation
    Case("evaluation of nothing", say("run/checkpoint-9", program="eval"), says="checkpoint-9"),
    Case("evaluation into no folder", say("tiny", "--tasks", "2", "--out", "no/e.json", program="eval"), says="no"),
    Case("evaluation over other results", copied(program="eval", args=(
        "run/checkpoint-4", "--tasks", "3", "--out", "eval.json")), says="another evaluation"),
    Case("evaluation of a checkpoint elsewhere", copied(lambda run: (run / "checkpoint-4").rename(run.parent / "best"),
         program="eval", args=("best", "--tasks", "2", "--out", "e.json")), (0,), "2 tasks"),
    *(Case(f"comparison of a result {name}", copied(damage, program="eval", args=(
        "--compare", "eval.json", "bad.json")), says="bad.json") for name, damage in {
        "that is not there": lambda run: None,
        "that is cut": lambda run: (run.parent / "bad.json").write_text((run.parent / "eval.json").read_text()[:900]),
        "without outcomes": lambda run: change_result(run.parent, outcomes={}),
        "with empty outcomes": lambda run: change_result(run.parent, outcomes={"with": [], "without": []}),
        "of other tasks": lambda run: change_result(run.parent, outcomes={name: [
            {"task_id": 9, "task_type": "a", "won": True, "score": 1.0, "turns": 1, "invalid": 0, "done": True}]
            for name in ("with", "without")}),
        "of wrong kinds": lambda run: change_result(run.parent, conditions=[["with"]], config=[])}.items()),
]


def change_result(folder, **changes):
    result = json.loads((folder / "eval.json").read_text())
    (folder / "bad.json").write_text(json.dumps(result | changes))


def main(words):
    chosen = [case for case in CASES if not words or any(word in case.name for word in words)]
    try:
        make_straight()
        with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda pair: check(pair[1], STRAIGHT.parent / str(pair[0])), enumerate(chosen))
            wrong = 0
            for case, fault in zip(chosen, found):
                wrong += fault is not None
                print(f"ok    {case.name}" if fault is None else f"WRONG {case.name}: {fault}", flush=True)
    finally:
        Forked.end()
        shutil.rmtree(STRAIGHT.parent, ignore_errors=True)
    print(f"handled {len(chosen) - wrong}/{len(chosen)}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main(sys.argv[1:]))
