"""A live run: log, learning curve, episodes, saving however it ends. The method is in sdar.py; this stores it.

    <run>/metrics.jsonl        a line per step and per evaluation
    <run>/curve.png            success by step
    <run>/episodes/*.jsonl     whole episodes, with the gap and gate of each token

The folder itself is made in lib/folders.py, and its checkpoints in lib/checkpoints.py.
"""

import contextlib
import shlex
import signal
import sys
import traceback
import warnings
from copy import deepcopy

import torch
from tqdm import tqdm

from lib import parallel
from lib.advice import PATIENCE, advice
from lib.checkpoints import NotSaved, checkpoints, save_checkpoint, step_of
from lib.folders import TRACKERS, read_lines, storable, stored_settings, unwritable
from lib.program import Diverged, UserError, describe, optional, out_of_memory, reader_gone, to_json

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
    pressed = [True] * parallel.take_stop()

    def note(*_):
        pressed.append(True)
        print(f"\n{doing}")

    with handling(note):
        yield
    parallel.agree(KeyboardInterrupt() if pressed else None)


@contextlib.contextmanager
def all_or_nothing(model, optimizer, copy):
    """If the block raises, weights and optimiser are as before it, and the exception says so (`undone`).

    copy: whether more than one optimiser step is in the block. Without it the copy is spared, and nothing is undone.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = deepcopy((trained, optimizer.state_dict())) if copy else None
    try:
        yield
    except BaseException as error:
        if before:
            model.load_state_dict(before[0], strict=False)
            optimizer.load_state_dict(before[1])
            error.undone = True
        raise


BOUND_MEMORY = {"micro_tokens": "an update", "rollout_batch": "sampling"}  # settings, and what they bound


class Run:
    """An open run: log, progress bar and checkpoints. `step` is the number of whole steps done.

    As a context manager it saves the whole steps however the block ends: at the end, on Ctrl-C, SIGTERM and SIGHUP (as
    a KeyboardInterrupt, with a line on how to resume), and on any error. What the user can change (bad input, a full
    disk, too little memory) becomes a UserError, which says what is saved. An optimiser step that was begun and not
    logged is not saved: then the last checkpoint is where the run goes on.
    """

    def __init__(self, folder, model, tokenizer, optimizer, cfg, step, command, flags=None, more=None):
        """cfg: settings of the run (steps, save_every, keep, ...); step: those done; command: what --resume follows;
        flags: those of the settings that are flags of the command, None: all; more: what else checkpoints keep."""
        self.folder, self.step, self.cfg = folder.absolute(), step, cfg  # an environment may change directories
        self.flags, self.more = flags, more
        self.resume_command = f"{command} --resume {shlex.quote(str(folder))}"
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        found = parallel.first(checkpoints, folder)
        self.saved = step if folder / f"checkpoint-{step}" in found else None  # a resumed run's
        self.settings = stored_settings(folder)  # each checkpoint carries them
        self.recent, self.said = [], set()  # metrics of the last steps, and which advice was given
        self.torn = False  # whether an optimiser step has begun whose end is not logged
        self.bar = tqdm(total=cfg.steps, initial=step, unit="step", dynamic_ncols=True, disable=None)  # on terminals
        self.send = no_tracker if parallel.WORLD.rank else start_tracker(cfg, folder)

    def save(self, spared=0):
        """-> the checkpoint of the last whole step, written unless it is there. Raises NotSaved.

        spared: how many checkpoints stay beside it more than cfg.keep says."""
        if self.saved != self.step:
            save_checkpoint(self.folder, self.model, self.tokenizer, self.optimizer, self.step,
                            keep=self.cfg.keep + spared, settings=self.settings, more=self.more)
            self.saved = self.step
        return self.folder / f"checkpoint-{self.step}"

    def __enter__(self):
        self.signals = handling(parallel.interrupt)
        self.signals.__enter__()
        self.hook = self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "torn", True))
        if self.step == 0:
            try:
                self.save_whole()  # a resumed run reads its reference model from there
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.end(error)
        finally:
            self.close()

    def close(self):
        self.hook.remove()
        self.signals.__exit__(None, None, None)
        self.bar.close()

    def end(self, error):
        whole = not self.torn or getattr(error, "undone", False)
        whole &= getattr(error, "agreed", parallel.WORLD.size == 1)  # or other processes do not save
        if error is None or isinstance(error, KeyboardInterrupt) and whole:
            try:
                return self.save_whole(stopped=error is not None)
            except NotSaved as failed:
                raise UserError(f"{failed} {self.keep_whole(False)}") from failed
        if out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # activations: saving needs some memory, too
        kept = self.keep_whole(whole and not isinstance(error, NotSaved), isinstance(error, Diverged))
        sentence = self.explain(error)
        if sentence:
            raise UserError(f"{sentence} {kept}") from error
        self.bar.write(kept)  # before the traceback: a defect of the program, not of the input

    def explain(self, error):
        """What the user can do about an error, a sentence; None for a defect of the program."""
        if isinstance(error, UserError):
            return str(error)
        if parallel.lost(error):
            return "Another process of this run has ended, or does not answer."
        if out_of_memory(error):
            bounds = " or ".join(f"--{name} (now {getattr(self.cfg, name)}, bounds {what})" for name, what in
                                 BOUND_MEMORY.items() if self.flags is None or name in self.flags)
            return f"There is not enough memory ({describe(error).rstrip('.')}): lower {bounds}."
        if isinstance(error, OSError):
            return str(unwritable(self.folder, error))

    def keep_whole(self, save, diverged=False):
        """After an error: saves the whole steps if `save` -> a sentence that says what is saved and how to go on.

        diverged: whether the model of the last whole step samples nothing more, so that no run can go on from it.
        """
        failed = ""
        if save:
            try:
                self.optimizer.zero_grad(set_to_none=True)  # memory may be short
                with contextlib.suppress(KeyboardInterrupt), uninterrupted("saving ..."):
                    saved = self.save(spared=diverged)
                if diverged:
                    return self.before(saved)
                return f"All whole steps are saved in {saved}; {self.resume_command} goes on."
            except NotSaved as error:
                failed = f"{error} "
        found = checkpoints(self.folder)
        return failed + (f"The last checkpoint is {found[-1]}; {self.resume_command} goes on from there." if found
                         else f"{self.folder} holds no checkpoint yet.")

    def before(self, saved):
        """How to go on where the last checkpoint holds a model that samples nothing more."""
        older = [path for path in checkpoints(self.folder) if step_of(path) < self.step]
        if not older:
            return f"{saved} holds this model, and there is none before it."
        command, last = self.resume_command.split(" --resume ")[0], shlex.quote(str(older[-1]))
        return (f"{saved} holds this model; {command} --resume {last} goes on from the last one before, with the same "
                f"--lr and --temperature, and a new run with others starts by --model {last}.")

    def save_whole(self, stopped=False):
        """Saves; if Ctrl-C stopped the run, or is pressed meanwhile, says how to go on; raises the latter."""
        def say_how_to_go_on():
            self.bar.write(f"stopped after step {self.step}, saved in {saved}; go on: {self.resume_command}")

        try:
            with uninterrupted("saving ..."):
                saved = self.save()
        except KeyboardInterrupt:
            say_how_to_go_on()
            raise
        if stopped:
            say_how_to_go_on()

    def log(self, step, metrics, line):
        """A line in metrics.jsonl, the same to wandb or tensorboard, and `line` above the progress bar."""
        parallel.first(self.write, step, metrics)
        self.announce(step, metrics, line)

    def write(self, step, metrics):
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(to_json({"step": step} | metrics) + "\n")

    def announce(self, step, metrics, line):
        try:
            self.send({name: value for name, value in metrics.items() if value is not None}, step)
        except Exception as error:  # whatever a tracker raises must not end the run
            self.send = no_tracker
            warn_of_tracker(error)
        self.bar.write(line)
        sys.stdout.flush()  # a log file shows the line at once, too
        parallel.agree(KeyboardInterrupt() if reader_gone() else None)

    def finish_step(self, metrics, line):
        """Counts and logs a step that is done, and saves it where that is due."""
        parallel.first(self.write, self.step + 1, metrics)
        self.step, self.torn = self.step + 1, False
        self.announce(self.step, metrics, line)
        self.bar.update()
        self.recent = [*self.recent[1 - PATIENCE:], metrics]
        for trouble, text in advice(self.cfg, self.folder, self.recent).items():
            if trouble not in self.said:  # once is enough
                self.bar.write(f"hint: {text}")
                self.said.add(trouble)
        if self.step % self.cfg.save_every == 0:
            self.save()


def data_label(data):
    """What is said of the tasks wherever results are shown; data: the setting."""
    return f"data in {data}" if data else "generated tasks, not the official ones"


def method_name(settings, between=" by "):
    """What a run with these settings, {name: value}, calls its method; OPID is told apart by who analyses."""
    return between.join([settings["method"], *{settings.get("analyser")} - {None, "none"}])


def headline(cfg, folder, policy, backend):
    """What is printed at the start of a run."""
    size = sum(p.numel() for p in policy.model.parameters()) / 1e6
    return (f"{method_name(vars(cfg))} on {cfg.env} ({data_label(cfg.data)}), model {cfg.model} ({size:.2f}M "
            f"parameters), {policy.device}, run folder {folder}\n{backend} kernels: log-probs within "
            f"{policy.fused_error:.1e} of the model's own")


def farewell(folder):
    """What is printed at the end of a run."""
    saved, curve = checkpoints(folder)[-1], folder / "curve.png"
    drawn = f"; curve in {curve}" if curve.exists() else ""
    return f"saved in {saved}{drawn}; evaluate it: python eval.py {shlex.quote(str(saved))}"


def mean(values):
    """0 where there is nothing to average."""
    values = list(values)
    return sum(values) / max(len(values), 1)


def episode_metrics(episodes, returns):
    """What a step's episodes, those of all processes, and their returns say of it (docs/metrics.md)."""
    turns = [turn for e in episodes for turn in e.turns]
    return {"reward/mean": parallel.mean(returns),
            "reward/success": parallel.mean(e.won for e in episodes),
            "reward/score": parallel.mean(e.score for e in episodes),
            "rollout/turns": parallel.mean(len(e.turns) for e in episodes),
            "rollout/unfinished": parallel.mean(not e.done for e in episodes),
            "rollout/invalid": parallel.mean(not t.valid for t in turns),
            "rollout/errors": parallel.total(sum(e.errors for e in episodes)),
            "rollout/cut_off": parallel.mean(t.response.stop == "length" for t in turns),
            "rollout/response_tokens": parallel.mean(len(t.response.ids) for t in turns)}


def step_line(cfg, step, m):
    """What is printed of a training step's metrics m: at most 100 columns, all others are in metrics.jsonl."""
    shown = {"step": f"{step:3d}/{cfg.steps}", "success": f"{m['reward/success']:.2f}",
             "turns": f"{m['rollout/turns']:.1f}", "invalid": f"{m['rollout/invalid']:.2f}",
             "entropy": f"{m['grpo/entropy']:.2f}", "zero-var": f"{m['grpo/zero_variance_groups']:.2f}"}
    if cfg.teacher != "none":
        shown["gap"] = f"{m['sdar/gap'] / (m.get('sdar/distilled') or 1):+.3f}"  # of the tokens that it acts on
    if m["rollout/errors"]:
        shown["errors"] = str(m["rollout/errors"])
    seconds = f"{m['time/step']:.{0 if m['time/step'] >= 10 else 1}f} s"
    for name in ("", "turns", "zero-var", "gap", "entropy"):  # the first to be left out
        shown.pop(name, None)
        line = "  ".join([*(f"{key} {value}" for key, value in shown.items()), seconds])
        if len(line) <= 100:
            return line
    return line[:100]


def start_tracker(cfg, folder):
    try:
        return tracker(cfg, folder)
    except UserError:  # it is not installed
        raise
    except Exception as error:
        warn_of_tracker(error)
        return no_tracker


def warn_of_tracker(error):
    warnings.warn(f"nothing more is sent to the tracker: {describe(error)}", RuntimeWarning, stacklevel=2)


def no_tracker(metrics, step):
    pass


def tracker(cfg, folder):
    """-> a function (metrics, step) that hands metrics on to cfg.report_to: wandb, tensorboard, or none."""
    if cfg.report_to == "wandb":
        wandb = optional(TRACKERS["wandb"], "wandb")
        wandb.init(project="sdar", name=folder.name, config=storable(cfg))
        return lambda metrics, step: wandb.log(metrics, step=step)
    if cfg.report_to == "tensorboard":
        writer = optional(TRACKERS["tensorboard"], "tensorboard").SummaryWriter(str(folder))
        return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
    return no_tracker


def peak_memory_gb(device):
    """Of the GPU's allocations, or of this process; None where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 1e9


# ------------------------------------------------------------------------------------------------------------- pictures

def plot_curve(run, cfg):
    """Draws <run>/curve.png; where that fails, a warning says why, and training goes on."""
    if parallel.WORLD.rank:
        return
    try:
        draw_curve(run, cfg)
    except Exception as error:  # no matplotlib, a broken font cache, a full disk
        warnings.warn(f"{run / 'curve.png'} is not drawn: {describe(error)}", RuntimeWarning, stacklevel=2)


def draw_curve(run, cfg):
    """<run>/curve.png: success by step on the evaluation set, sampled and greedy, and of the training rollouts."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    entries = [entry for _, entry in read_lines(run / "metrics.jsonl")]
    tasks = f"{cfg.eval_tasks or 'all'} tasks of {cfg.eval_split}"
    curves = {"reward/success": (f"training rollouts, T={cfg.temperature:g}", dict(color="0.75", lw=1)),
              "eval/success": (f"{tasks}, T={cfg.eval_temperature:g}", dict(color="C0", marker="o")),
              "eval/greedy_success": (f"{tasks}, greedy", dict(color="C1", marker="s")),
              "eval/skilled_success": (f"{tasks}, with skills", dict(color="C2", marker="^"))}
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, (title, style) in curves.items():
        points = [(entry["step"], entry[name]) for entry in entries if isinstance(entry.get(name), float | int)]
        if points:
            axes.plot(*zip(*points), label=title, **style)
    axes.set(xlabel="step", ylabel="success rate", ylim=(0, 1),
             title=f"{method_name(vars(cfg))} on {cfg.env} ({data_label(cfg.data)})".replace("$", r"\$"))  # no formula
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=120)
    pyplot.close(figure)
