"""The run folder as a whole: how it is created and locked, its settings, and how a run is resumed.

    <run>/config.json          settings, package versions, commit; may be given to --config
    <run>/set-aside-<n>/       checkpoints, log and episodes of steps after the one that a resumed run went on from
"""

import dataclasses
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from importlib import metadata
from pathlib import Path

from lib import parallel
from lib.checkpoints import (
    SEAL,
    checkpoints,
    fault,
    foreign,
    has_a_checkpoints_name,
    is_checkpoint,
    load_state,
    newest_intact,
    recover,
    sealed,
    step_of,
)
from lib.episodes import step_file, steps_written
from lib.program import AT_END, UserError, check_regular, optional, to_json, try_lock, without_secrets, write_atomically

ROOT = Path(__file__).resolve().parent.parent
TRACKERS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # --report_to: module
PROGRAMS = {"config.json": "python sdar.py", "clone.json": "python -m tools.clone"}  # by where they keep settings
LOCKED = {}  # folder: descriptor of the lock that this program holds on it


def provenance(version):
    """Versions and commit, for config.json."""
    names = ("torch", "transformers", "tokenizers", "gymnasium", "numpy", "rapidfuzz")
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"sdar": version, "python": platform.python_version(), "commit": commit,
            "packages": {name: metadata.version(name) for name in names}}


def stored_settings(run):
    """What a run's config.json holds, a dict; None for a folder of another kind."""
    return json.loads((run / "config.json").read_text(encoding="utf-8")) if is_run(run) else None


def unwritable(run, error):
    return UserError(f"The run folder {run} cannot be written ({error.strerror}): choose one by --out.")


# --------------------------------------------------------------------------------------------------- create and lock

def create_run(cfg, version, stem="run", name="config.json"):
    """Makes the folder cfg.out and writes cfg to `name` in it -> its Path, locked.

    stem: where cfg.out is None, it is set to the first of runs/<stem>, runs/<stem>-2, ... that does not exist. Raises
    UserError if the folder holds a run or files of others that a run would replace, if another program writes to it, if
    it can't be written, or if cfg.report_to is not installed.
    """
    if cfg.report_to != "none":
        optional(TRACKERS[cfg.report_to], cfg.report_to)
    if cfg.out is None:
        cfg.out = str(claim_folder(stem))
    run = Path(cfg.out)
    make_folder(run)
    lock(run)
    check_files(run)
    if checkpoints(run):
        raise UserError(f"{run} already holds a run: go on with it by --resume {shlex.quote(str(run))}, or choose "
                        "another with --out.")
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


def check_files(run):
    """Raises UserError where a run could not write to the files of a run folder, or would wait for ever."""
    for name in ("config.json", "metrics.jsonl", "curve.png"):
        check_regular(run / name, "move it away")
    if (run / "episodes").exists() and not (run / "episodes").is_dir():
        raise UserError(f"{run / 'episodes'} is a file, where a run has a folder: move it away.")


def make_folder(run, exist_ok=True):
    try:
        str(run).encode()
        run.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        raise unwritable(run, error) from error
    except UnicodeEncodeError as error:
        raise UserError(f"The name of the run folder {run} is not text in this locale: set LC_ALL=C.UTF-8, or choose "
                        "another with --out.") from error


def claim_folder(stem):
    """Makes the first of runs/<stem>, runs/<stem>-2, ... that does not exist: two programs at once get two."""
    number, path = 1, Path("runs") / stem
    while True:
        try:
            make_folder(path, exist_ok=False)
            return path
        except FileExistsError:
            number += 1
            path = Path("runs") / f"{stem}-{number}"


def lock(run):
    """Until this program ends, however it ends, no other may write to the folder. UserError if another does already.

    The lock is on the folder itself and leaves no file. There is none on Windows and on file systems without locks.
    """
    key = run.resolve()
    if key in LOCKED or os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(run, os.O_RDONLY)
    if not try_lock(descriptor):
        os.close(descriptor)
        raise UserError(f"Another program is writing to {run}: wait for it to end, or choose another folder with "
                        "--out.")
    LOCKED[key] = descriptor
    AT_END.callback(lambda: os.close(LOCKED.pop(key)))


# ------------------------------------------------------------------------------------------------------------- settings

def storable(cfg):
    """A settings dataclass -> a dict without passwords and keys in addresses, which are given anew when needed."""
    return {name: without_secrets(value) if isinstance(value, str) else value
            for name, value in dataclasses.asdict(cfg).items()}


def write_settings(run, cfg, name="config.json", made_by=None):
    """cfg and provenance in the run folder's file `name`, made or replaced atomically; made_by None: as stored."""
    try:
        made_by = made_by or json.loads((run / name).read_text(encoding="utf-8"))["provenance"]
        write_atomically({run / name: to_json(storable(cfg) | {"provenance": made_by}, indent=1)})
    except OSError as error:
        raise unwritable(run, error) from error


def read_settings(run, kind, name="config.json"):
    """The settings in a run folder -> kind(**settings), kind being the dataclass that was written."""
    path = Path(run) / name
    if not is_run(run, name):
        for other, program in PROGRAMS.items():
            if other != name and is_run(run, other):
                raise UserError(f"{run} was made by another program: go on with it by {program} --resume "
                                f"{shlex.quote(str(run))}.")
    if not path.is_file():
        raise UserError(f"{run} is not a run folder (no {name}): give the folder that --out named.")
    if not is_run(run, name):
        raise UserError(f"{run} is not a run folder ({path} is not a run's, or is damaged): give the folder that --out "
                        "named.")
    return settings_in(path, kind)


def settings_in(path, kind):
    """The settings in a file of ours, such as config.json -> kind(**settings). Raises UserError."""
    path = Path(path)
    try:
        check_regular(path, "give the config.json of a run folder")
        stored = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stored, dict) and "provenance" not in stored:
            raise UserError(f"{path} holds no settings of a run (no provenance): give the config.json of a run folder; "
                            "a model is given by --model.")
        return to_settings(stored, kind)
    except OSError as error:
        raise UserError(f"The settings {path} cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} was not written by this version of the program ({error}): start a new run, or go on "
                        "with the version that its provenance names.") from error


def to_settings(stored, kind):
    """What config.json holds -> kind(**settings). Raises ValueError, TypeError, AttributeError or KeyError."""
    stored = dict(stored)
    stored.pop("provenance")
    settings = kind(**stored)
    for field in dataclasses.fields(settings):  # each has the type of its default (None: a str or None; float: int too)
        value, default = getattr(settings, field.name), field.default
        of_type = (str, type(None)) if default is None else (int, float) if type(default) is float else type(default)
        if not isinstance(value, of_type) or isinstance(value, bool) != isinstance(default, bool):
            raise TypeError(f"{field.name} is {value!r}")
    return settings


def settings_of(model, kind):
    """The settings under which a checkpoint was made, which it carries, or its run -> kind(**settings), or None."""
    folder = Path(model).absolute()
    if (folder / "run.json").is_file():
        stored = sealed(folder)["settings"]
        if stored:
            try:
                return to_settings(stored, kind)
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise UserError(f"{folder / 'run.json'} was not written by this version of the program "
                                f"({error}).") from error
    return read_settings(folder.parent, kind) if is_checkpoint(folder) and is_run(folder.parent) else None


def is_run(folder, name="config.json"):
    """Whether a folder is a run of ours: its settings have a provenance, which a model's config.json has not."""
    path = Path(folder) / name
    return path.is_file() and '"provenance"' in path.read_text(errors="replace")


# -------------------------------------------------------------------------------------------------------------- resume

def reopen(folder, explicit, kind, changeable, name="config.json"):
    """--resume: (settings, run, checkpoint), the run locked. folder: a run, or one of its checkpoints.

    The checkpoint is the newest that is intact; what is wrong with newer ones is printed. Raises UserError, if an
    explicit setting outside `changeable` differs, too.
    """
    run, wanted = Path(folder), None
    if is_checkpoint(run):
        wanted = run if has_a_checkpoints_name(run) else run.resolve()  # a link to one, or "."
        run = wanted.parent
        if not is_run(run, name):
            raise UserError(f"{wanted} is a checkpoint outside its run folder, so there is no run to go on with: start "
                            "a new one from it with --model.")
        if not has_a_checkpoints_name(wanted):
            raise UserError(f"{folder} is not named as a run names its checkpoints, checkpoint-<step>: give it that "
                            f"name, or go on from the newest by --resume {shlex.quote(str(run))}.")
    cfg = read_settings(run, kind, name)
    lock(run)
    check_files(run)
    cfg.out = str(run)
    for setting, value in explicit.items():
        stored = getattr(cfg, setting)
        same = (Path(value).resolve() == run.resolve() if setting == "out" else
                value == stored or without_secrets(str(value)) == stored)
        if not same and setting not in changeable:
            raise UserError(f"--{setting} {value} contradicts the run in {run}, which has {stored}: leave it out, or "
                            "start a new run with --out.")
        if setting != "out":
            setattr(cfg, setting, value)
    recover(run)
    checkpoint = choose_checkpoint(run, wanted, fixed_settings(run, changeable))
    if cfg.steps < step_of(checkpoint):
        raise UserError(f"--steps {cfg.steps} is less than the {step_of(checkpoint)} steps that {checkpoint} already "
                        "has: raise it.")
    return cfg, run, checkpoint


def fixed_settings(run, changeable):
    """What each checkpoint of a run carries of the run's config.json and no resume changes; {} without config.json."""
    return {name: value for name, value in (stored_settings(run) or {}).items()
            if name not in changeable and name not in ("out", "provenance")}


def choose_checkpoint(run, wanted, settings):
    """The newest intact checkpoint, with a warning for each newer one; or the wanted one. Raises UserError.

    settings: see fixed_settings. A checkpoint-0 of another run is an error, too: the reference model is read from it.
    """
    first = run / "checkpoint-0"
    if is_checkpoint(first) and not fault(first, SEAL) and foreign(first, settings):
        raise UserError(f"{foreign(first, settings)}: copy the run's own back, or start a new run.")
    candidates = [wanted] if wanted else checkpoints(run)
    if not candidates:
        raise UserError(f"{run} holds no checkpoint yet: start it again without --resume.")
    size = sum(path.stat().st_size for path in candidates[-1].iterdir())
    if size > 4e9:  # a second and more
        print(f"checking the {size / 1e9:.0f} GB of {candidates[-1]} ...", flush=True)
    checkpoint, faults = newest_intact(candidates, settings)
    if checkpoint is None:
        advice = f"--resume {shlex.quote(str(run))} takes the newest that is intact" if wanted else "start a new run"
        raise UserError(f"No run can go on from {candidates[-1]}, since {faults[0]}: {advice}.")
    for wrong in faults:
        warnings.warn(f"{wrong}: going on from {checkpoint}.", RuntimeWarning, stacklevel=2)
    return checkpoint


def is_finished(cfg, run, checkpoint):
    """Whether nothing is left to do after the checkpoint, not even the last evaluation."""
    done = step_of(checkpoint)
    evaluated = not cfg.eval_every or any(
        entry["step"] == done and "eval/success" in entry for _, entry in read_lines(run / "metrics.jsonl"))
    return done >= cfg.steps and evaluated


def finished_text(cfg, run, checkpoint):
    """What is printed of a run that is finished."""
    done = step_of(checkpoint)
    rate = " (a linear --lr_schedule then falls to 0 at the new end)" * (getattr(cfg, "lr_schedule", "") == "linear")
    return (f"{run} is finished ({done} steps): go on with it by --resume {shlex.quote(str(run))} --steps {done + 10} "
            f"or more{rate}, or evaluate it: python eval.py {shlex.quote(str(checkpoint))}")


def restore(checkpoint, optimizer, ref=None, eval_every=0, more=None):
    """Loads the optimiser's state, that of `more`, {name: object with a load_state_dict}, and ref's weights from
    checkpoint-0 -> steps done. Later steps are set aside.

    eval_every: of the run that goes on, which plays an evaluation that is due now again.
    """
    done = load_state(checkpoint, optimizer, ref, more)
    parallel.first(set_aside, checkpoint.parent, done)
    parallel.first(trim_metrics, checkpoint.parent, done, eval_every and done % eval_every == 0)
    return done


def set_aside(run, step):
    """Moves checkpoints and episodes of later steps, and a copy of the log, to a folder of their own, and says so."""
    later = [checkpoint for checkpoint in checkpoints(run) if step_of(checkpoint) > step]
    dumps = [step_file(run, number) for number in steps_written(run) if number > step]
    if not later:
        for dump in dumps:  # of steps that are trained anew
            dump.unlink()
        return
    aside = next(path for path in map(run.joinpath, map("set-aside-{}".format, itertools.count(1)))
                 if not path.exists())
    (aside / "episodes").mkdir(parents=True)
    for dump in dumps:
        dump.rename(aside / "episodes" / dump.name)
    if (run / "metrics.jsonl").exists():
        shutil.copy2(run / "metrics.jsonl", aside)
    for checkpoint in later:
        checkpoint.rename(aside / checkpoint.name)
    print(f"going on from step {step}; what the run had of later steps is kept in {aside}")


def trim_metrics(run, step, again=False):
    """Drops the lines that a killed run wrote after its last checkpoint, and those that are not metrics or torn.

    again: whether the evaluation after this step, which comes after its checkpoint, is played once more.
    """
    path = run / "metrics.jsonl"
    kept = [line + "\n" for line, entry in read_lines(path)
            if entry["step"] < step or entry["step"] == step and not (again and "eval/success" in entry)]
    write_atomically({path: "".join(kept)})


def read_lines(path):
    """Yields (line, entry) of the lines of metrics.jsonl that are metrics."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield line, entry
