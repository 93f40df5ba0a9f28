"""The run folder: settings, log, learning curve, episodes, checkpoints. The method is in sdar.py; this stores it.

    <run>/config.json          settings, package versions, commit
    <run>/metrics.jsonl        a line per step and per evaluation
    <run>/curve.png            success by step
    <run>/episodes/*.jsonl     whole episodes, with the gap and gate of each token
    <run>/checkpoint-<step>/   model and tokenizer as save_pretrained writes them, and state.pt (optimiser, step)
"""

import contextlib
import dataclasses
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from importlib import import_module, metadata
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Bad input: printed as one sentence, without a traceback."""


def first_sentence(error):
    return str(error).strip().split("\n")[0].rstrip(".") + "."


def exit_status(program, argv):
    """Runs program(argv) -> 0; 2 after a UserError, one sentence on standard error; 130 after Ctrl-C."""
    try:
        program(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # what was done is saved
        return 130
    return 0


def optional(module, package):
    """An optional library, imported where it is used. Raises UserError with the pip line if it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: pip install {package}.") from error


# ------------------------------------------------------------------------------------------------------------- settings

def provenance(version):
    """Versions and commit, for config.json."""
    names = ("torch", "transformers", "tokenizers", "gymnasium", "numpy", "rapidfuzz")
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"sdar": version, "python": platform.python_version(), "commit": commit,
            "packages": {name: metadata.version(name) for name in names}}


def free_folder(name):
    """The first of runs/<name>, runs/<name>-2, runs/<name>-3, ... that does not exist."""
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return str(path)


def create_run(cfg, version, name="config.json"):
    """Makes the folder cfg.out and writes cfg to `name` in it -> its Path.

    Raises UserError if the folder holds a run or files of others that a run would replace, if it can't be written, or
    if cfg.report_to is not installed.
    """
    run = Path(cfg.out)
    if cfg.report_to != "none":
        optional(TRACKERS[cfg.report_to], cfg.report_to)
    if checkpoints(run):
        raise UserError(f"{run} already holds a run: go on with it by --resume {run}, or choose another with --out.")
    own = {"config.json", "metrics.jsonl", "curve.png", "episodes", "state.pt", "model.safetensors", name}
    for taken in sorted(own if not is_run(run, name) else ()):
        if (run / taken).exists():
            raise UserError(f"{run} already holds {taken}, which a run would replace: choose another with --out.")
    write_settings(run, cfg, name, provenance(version))
    try:
        (run / "metrics.jsonl").write_text("")
    except OSError as error:
        raise unwritable(run, error) from error
    return run


def unwritable(run, error):
    return UserError(f"The run folder {run} cannot be written ({error.strerror}): choose one by --out.")


def write_settings(run, cfg, name="config.json", made_by=None):
    """cfg and provenance in the run folder's file `name`, made or replaced atomically; made_by None: as stored."""
    hidden = run / f".{name}.tmp"
    try:
        run.mkdir(parents=True, exist_ok=True)
        made_by = made_by or json.loads((run / name).read_text())["provenance"]
        hidden.write_text(json.dumps(dataclasses.asdict(cfg) | {"provenance": made_by}, indent=1))
        hidden.rename(run / name)
    except OSError as error:
        raise unwritable(run, error) from error


def read_settings(run, kind, name="config.json"):
    """The settings in a run folder -> kind(**settings), kind being the dataclass that was written."""
    path = Path(run) / name
    if (Path(run) / "state.pt").is_file():
        raise UserError(f"{run} is a checkpoint: give the run folder that holds it.")
    if not path.is_file():
        raise UserError(f"{run} is not a run folder (no {name}): give the folder that --out named.")
    try:
        stored = json.loads(path.read_text())
        stored.pop("provenance")
        check_types(settings := kind(**stored))
        return settings
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} was not written by this version of the program ({error}): start a new run, or go on "
                        "with the version that its provenance names.") from error


def check_types(settings):
    """Raises TypeError unless each field has the type of its default (None: a str or None; float: int too)."""
    for field in dataclasses.fields(settings):
        value, default = getattr(settings, field.name), field.default
        of_type = (str, type(None)) if default is None else (int, float) if type(default) is float else type(default)
        if not isinstance(value, of_type) or isinstance(value, bool) != isinstance(default, bool):
            raise TypeError(f"{field.name} is {value!r}")


def is_run(folder, name="config.json"):
    """Whether a folder is a run of ours: its settings have a provenance, which a model's config.json has not."""
    path = Path(folder) / name
    return path.is_file() and '"provenance"' in path.read_text(errors="replace")


def reopen(folder, explicit, kind, changeable, name="config.json"):
    """--resume: (settings, run, last checkpoint). UserError if an explicit setting outside `changeable` differs."""
    run = Path(folder)
    cfg = read_settings(run, kind, name)
    for setting, value in explicit.items():
        if value != getattr(cfg, setting) and setting not in changeable:
            raise UserError(f"--{setting} {value} contradicts the run in {run}, which has {getattr(cfg, setting)}: "
                            "leave it out, or start a new run with --out.")
        setattr(cfg, setting, value)
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} holds no checkpoint yet: start it again without --resume.")
    if cfg.steps < step_of(found[-1]):
        raise UserError(f"--steps {cfg.steps} is less than the {step_of(found[-1])} steps that {run} already has: "
                        "raise it.")
    return cfg, run, found[-1]


# ---------------------------------------------------------------------------------------------------------- checkpoints

def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(run):
    """Checkpoint folders of a run, oldest first."""
    found = [path for path in Path(run).glob("checkpoint-*")
             if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "state.pt").is_file()]
    return sorted(found, key=step_of)


def save_checkpoint(run, model, tokenizer, optimizer, step, keep=2):
    """Writes <run>/checkpoint-<step> atomically (in a hidden folder, then renamed) -> its Path.

    Only the newest `keep` stay, and checkpoint-0, from which a resumed run reads its reference model.
    """
    final = run / f"checkpoint-{step}"
    hidden = run / f".{final.name}.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    model.save_pretrained(hidden)
    tokenizer.save_pretrained(hidden)
    torch.save({"optimizer": optimizer.state_dict(), "step": step}, hidden / "state.pt")
    replaced = run / f".{final.name}.old"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    hidden.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in checkpoints(run)[:-keep]:
        if step_of(old) > 0:
            shutil.rmtree(old)
    return final


def restore(checkpoint, model, optimizer, ref=None):
    """Loads weights and optimiser state in place, and ref from checkpoint-0 -> steps done; trims the log to them."""
    from safetensors.torch import load_model
    run, device = checkpoint.parent, str(model.device)
    load_model(model, checkpoint / "model.safetensors", device=device)
    if ref is not None and (run / "checkpoint-0").is_dir():
        load_model(ref, run / "checkpoint-0" / "model.safetensors", device=device)
    state = torch.load(checkpoint / "state.pt", map_location=device, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    trim_metrics(run, state["step"])
    return state["step"]


def trim_metrics(run, step):
    """Drops the lines that a killed run wrote after its last checkpoint, and those that are no metrics or torn."""
    path = run / "metrics.jsonl"
    # an evaluation comes after its step's checkpoint: where one is due, the resumed run plays it again
    kept = [line + "\n" for line, entry in read_lines(path)
            if entry["step"] < step or entry["step"] == step and "eval/success" not in entry]
    path.write_text("".join(kept))


def read_lines(path):
    """Yields (line, entry) of the lines of metrics.jsonl that are metrics."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield line, entry


# ----------------------------------------------------------------------------------------------------------- a live run

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def handling(handler):
    """Ctrl-C, SIGTERM and SIGHUP call handler(number, frame) within the block; what is ignored (nohup) stays so."""
    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, handler) for number in heeded]
    try:
        yield
    finally:
        for number, old in zip(heeded, before):
            signal.signal(number, old)


@contextlib.contextmanager
def uninterrupted(doing="finishing this update, then saving ..."):
    """What would stop the run waits until the block is done, so that weights, optimiser, log and files always belong to
    a whole step."""
    pressed = []
    with handling(lambda *_: pressed.append(print(f"\n{doing}"))):
        yield
    if pressed:
        raise KeyboardInterrupt


@contextlib.contextmanager
def all_or_nothing(model, optimizer, copy):
    """If the block raises, weights and optimiser are as before it; copy: whether it may have changed them by then."""
    before = deepcopy((model.state_dict(), optimizer.state_dict())) if copy else None
    try:
        yield
    except BaseException:
        if before:
            model.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
        raise


class Run:
    """An open run: log, progress bar and checkpoints. `step` is the number of whole steps done.

    As a context manager it saves the whole steps however the block ends: at the end, on Ctrl-C, SIGTERM and SIGHUP (as
    a KeyboardInterrupt, with a line on how to resume), and on a UserError (which then says where they are).
    """

    def __init__(self, folder, model, tokenizer, optimizer, cfg, step, command):
        """cfg: settings of the run (steps, save_every, report_to); step: those done; command: what --resume follows."""
        self.folder, self.step, self.save_every = folder, step, cfg.save_every
        self.resume = f"{command} --resume {folder}"
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.send = tracker(cfg, folder)
        self.bar = tqdm(total=cfg.steps, initial=step, unit="step", dynamic_ncols=True, disable=None)  # on terminals

    def save(self):
        return save_checkpoint(self.folder, self.model, self.tokenizer, self.optimizer, self.step)

    def __enter__(self):
        self.signals = handling(signal.default_int_handler)  # each raises KeyboardInterrupt
        self.signals.__enter__()
        if self.step == 0:
            self.save_whole()  # a resumed run reads its reference model from there
        return self

    def __exit__(self, kind, error, trace):
        try:
            if error is None or isinstance(error, KeyboardInterrupt):
                self.save_whole(stopped=error is not None)
            elif isinstance(error, UserError):
                with contextlib.suppress(KeyboardInterrupt), uninterrupted("saving ..."):
                    saved = self.save()
                raise UserError(f"{error} All whole steps are saved in {saved}; {self.resume} goes on.") from error
            elif isinstance(error, OSError):
                raise unwritable(self.folder, error) from error
        finally:
            self.signals.__exit__(None, None, None)
            self.bar.close()

    def save_whole(self, stopped=False):
        """Saves; if Ctrl-C stopped the run, or is pressed meanwhile, says how to go on; raises the latter."""
        try:
            with uninterrupted("saving ..."):
                saved = self.save()
        except KeyboardInterrupt:
            self.bar.write(f"stopped after step {self.step}, saved in {saved}; go on: {self.resume}")
            raise
        if stopped:
            self.bar.write(f"stopped after step {self.step}, saved in {saved}; go on: {self.resume}")

    def log(self, step, metrics, line):
        """A line in metrics.jsonl, the same to wandb or tensorboard, and `line` above the progress bar."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        try:
            self.send(metrics, step)
        except Exception as error:  # whatever a tracker raises, it is not worth a run
            self.send = lambda metrics, step: None
            self.bar.write(f"warning: nothing more is sent to the tracker: {type(error).__name__}: {error}")
        self.bar.write(line)
        sys.stdout.flush()  # a log file shows the line at once, too

    def finish_step(self, metrics, line):
        """Counts and logs a step that is done, and saves it where that is due."""
        self.step += 1
        self.log(self.step, metrics, line)
        self.bar.update()
        if self.step % self.save_every == 0:
            self.save()


def headline(cfg, folder, policy, backend):
    """What is printed at the start of a run."""
    tasks = f"data in {cfg.data}" if cfg.data else "tasks generated here, not the official ones"
    size = sum(p.numel() for p in policy.model.parameters()) / 1e6
    return (f"{cfg.method} on {cfg.env} ({tasks}), model {cfg.model} ({size:.2f}M parameters), {policy.device}, run "
            f"folder {folder}\n{backend} kernels: log-probs within {policy.fused_error:.1e} of the model's own")


def mean(values):
    """0 where there is nothing to average."""
    values = list(values)
    return sum(values) / max(len(values), 1)


def episode_metrics(episodes, returns):
    """What a step's episodes, and their returns, say of it (docs/metrics.md)."""
    turns = [turn for e in episodes for turn in e.turns]
    return {"reward/mean": mean(returns),
            "reward/success": mean(e.won for e in episodes),
            "reward/score": mean(e.score for e in episodes),
            "rollout/turns": mean(len(e.turns) for e in episodes),
            "rollout/unfinished": mean(not e.done for e in episodes),
            "rollout/invalid": mean(not t.valid for t in turns),
            "rollout/errors": sum(e.errors for e in episodes),
            "rollout/cut_off": mean(t.response.stop == "length" for t in turns),
            "rollout/response_tokens": mean(len(t.response.ids) for t in turns)}


def step_line(cfg, step, m):
    """What is printed of a training step's metrics m."""
    teacher = "" if cfg.teacher == "none" else f"  gap {m['sdar/gap']:+.3f}  gate {m['sdar/gate']:.3f}"
    errors = f"  errors {m['rollout/errors']}" if m["rollout/errors"] else ""
    return (f"step {step:3d}/{cfg.steps}  success {m['reward/success']:.2f}  turns {m['rollout/turns']:.1f}  "
            f"invalid {m['rollout/invalid']:.2f}  entropy {m['grpo/entropy']:.3f}  "
            f"zero-variance {m['grpo/zero_variance_groups']:.2f}{teacher}{errors}  {m['time/step']:.1f} s")


TRACKERS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # --report_to: module


def tracker(cfg, folder):
    """-> a function (metrics, step) that hands metrics on to cfg.report_to: wandb, tensorboard, or none."""
    if cfg.report_to == "wandb":
        wandb = optional(TRACKERS["wandb"], "wandb")
        wandb.init(project="sdar", name=folder.name, config=dataclasses.asdict(cfg))
        return lambda metrics, step: wandb.log(metrics, step=step)
    if cfg.report_to == "tensorboard":
        writer = optional(TRACKERS["tensorboard"], "tensorboard").SummaryWriter(str(folder))
        return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
    return lambda metrics, step: None


def peak_memory_gb(device):
    """Of the GPU's allocations, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)


# ------------------------------------------------------------------------------------------------------------- pictures

def plot_curve(run, cfg):
    """<run>/curve.png: success by step on the evaluation set, sampled and greedy, and of the training rollouts."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    entries = [entry for _, entry in read_lines(run / "metrics.jsonl")]
    tasks = f"{cfg.eval_tasks} evaluation tasks"
    curves = {"reward/success": (f"training rollouts, T={cfg.temperature:g}", dict(color="0.75", lw=1)),
              "eval/success": (f"{tasks}, T={cfg.eval_temperature:g}", dict(color="C0", marker="o")),
              "eval/greedy_success": (f"{tasks}, greedy", dict(color="C1", marker="s"))}
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, (label, style) in curves.items():
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="step", ylabel="success rate", ylim=(0, 1),
             title=f"{cfg.method} on {cfg.env} ({'official data' if cfg.data else 'generated tasks'})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=120)
    pyplot.close(figure)
