"""Checkpoints: whole, checked and recoverable folders of a run.

    <run>/checkpoint-<step>/   model (with --lora_rank the adapter alone) and tokenizer as save_pretrained writes them,
                               state.pt (optimiser), run.json (step, the run's settings, size and CRC-32 of every file)

CRC-32 finds any damage of up to four bytes in a row, and misses one in four billion of other accidents. It reads
4 GB/s on one core: the 18 GB that a model of 1.5 billion parameters takes cost some 5 s, when saved and when resumed.
"""

import json
import re
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from lib import lora
from lib.program import UserError, check_regular, crc32, describe, to_json

SEAL = "run.json"  # written last: a folder without it is not a checkpoint


class NotSaved(UserError):
    """A checkpoint could not be written; those before it are as they were."""


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("checkpoint-"))


def has_a_checkpoints_name(folder):
    return re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", folder.name, re.ASCII) is not None


def is_checkpoint(folder):
    return (folder / "state.pt").is_file() or (folder / SEAL).is_file()


def checkpoints(run):
    """Checkpoint folders of a run, oldest first, damaged ones too."""
    found = [path for path in Path(run).glob("checkpoint-*")
             if has_a_checkpoints_name(path) and is_checkpoint(path)]
    return sorted(found, key=step_of)


def sealed(checkpoint):
    """What its run.json says, {"step", "settings", "files": {name: [bytes, CRC-32]}}. Raises UserError without one."""
    path = checkpoint / SEAL
    try:
        check_regular(path, "copy the checkpoint's own back")
        stored = json.loads(path.read_text(encoding="utf-8"))
        if (isinstance(stored["step"], int) and isinstance(stored["settings"], dict | None)
                and all(len(one) == 2 for one in stored["files"].values())
                and "state.pt" in stored["files"] and {"config.json", lora.CONFIG} & stored["files"].keys()):
            return stored
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path} is damaged")


def fault(checkpoint, ending=""):
    """What is wrong with a checkpoint's files, or with those of that ending: a clause that names one, or None."""
    try:
        for name, (size, checksum) in sealed(checkpoint)["files"].items():
            path = checkpoint / name
            if not name.endswith(ending):
                continue
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes instead of {size}"
            if crc32(path) != checksum:
                return f"{path} is damaged (its checksum differs)"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"


def foreign(checkpoint, settings):
    """Why an intact checkpoint is not what this run saved under this name, a clause, or None.

    settings: those that no resume changes, which the run's checkpoints carry; {} for a run whose checkpoints have none.
    """
    stored = sealed(checkpoint)
    if stored["step"] != step_of(checkpoint):
        return f"{checkpoint} has another name than it was saved under, checkpoint-{stored['step']}"
    theirs = stored["settings"] or {}
    unlike = next((name for name in settings if name not in theirs or theirs[name] != settings[name]), None)
    if unlike:
        there = theirs.get(unlike, "not stored")
        return f"{checkpoint} is of another run (--{unlike} is {there} there, and {settings[unlike]} in config.json)"


def newest_intact(candidates, settings):
    """Checkpoints, oldest first -> (the newest without a fault, or None; the faults of newer ones). settings: those
    that all checkpoints of the run have in common, as in `foreign`."""
    faults = []
    for checkpoint in reversed(candidates):
        found = fault(checkpoint) or foreign(checkpoint, settings)
        if found is None:
            return checkpoint, faults
        faults.append(found)
    return None, faults


# ------------------------------------------------------------------------------------------------------------- to write

def save_checkpoint(run, model, tokenizer, optimizer, step, *, keep=2, settings=None, more=None):
    """Writes <run>/checkpoint-<step> atomically (in a hidden folder, then renamed) -> its Path.

    Only the newest `keep` stay, and checkpoint-0, from which a resumed run reads its reference model. Files that the
    run has not written, such as an evaluation, stay too. settings: the run's, as in its config.json. more: {name:
    object with a state_dict} that goes with the optimiser. Raises NotSaved.
    """
    final, hidden = run / f"checkpoint-{step}", run / f".checkpoint-{step}.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NotSaved(f"The weights hold NaN or infinity ({name}) after step {step}, so they are not saved.")
        lora.save(model, hidden) if lora.has_adapter(model) else model.save_pretrained(hidden)
        tokenizer.save_pretrained(hidden)
        with open(hidden / "state.pt", "wb") as file:
            states = {name: one.state_dict() for name, one in (more or {}).items()}
            torch.save({"optimizer": optimizer.state_dict(), "step": step, "more": states}, file)
        seal(hidden, step, settings)
        put_in_place(hidden, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them
        shutil.rmtree(hidden, ignore_errors=True)
        why = getattr(error, "strerror", None) or describe(error).rstrip(".")
        raise NotSaved(f"{final} cannot be written ({why}): make room there, or give it the rights.") from error
    for old in checkpoints(run)[:-keep]:
        if step_of(old) > 0:
            drop(old)
    return final


def seal(folder, step, settings=None):
    files = {path.name: [path.stat().st_size, crc32(path)] for path in sorted(folder.iterdir())}
    (folder / SEAL).write_text(to_json({"step": step, "settings": settings, "files": files}, indent=1))


def put_in_place(hidden, final):
    """Renames hidden to final; what was there is deleted only afterwards, and comes back by `recover` if neither is."""
    recover(final.parent)
    if final.exists():
        final.rename(final.with_name(f".{final.name}.old"))
    hidden.rename(final)
    recover(final.parent)


def recover(run):
    """Ends what a killed program has begun: a replaced checkpoint comes back, or goes once its successor is there.

    Files in it that the run has not written, such as an evaluation, move to the successor.
    """
    for replaced in run.glob(".checkpoint-*.old"):
        final = replaced.with_name(replaced.name[1:].removesuffix(".old"))
        if not final.exists():
            replaced.rename(final)
            continue
        own = own_files(replaced)
        for path in list(replaced.iterdir()):
            if path.name not in own and not (final / path.name).exists():
                path.rename(final / path.name)
        shutil.rmtree(replaced)


def own_files(checkpoint):
    """Names of the files that the run wrote into a checkpoint, its seal last."""
    try:
        return [*sealed(checkpoint)["files"], SEAL]
    except UserError:
        return []


def drop(checkpoint):
    """Deletes what the run wrote into a checkpoint, and the folder if it is empty then."""
    try:
        for name in own_files(checkpoint):
            (checkpoint / name).unlink(missing_ok=True)
        if not any(checkpoint.iterdir()):
            checkpoint.rmdir()
    except OSError as error:
        warnings.warn(f"{checkpoint} cannot be deleted ({error.strerror}).", RuntimeWarning, stacklevel=2)


# -------------------------------------------------------------------------------------------------------------- to read

def load_state(checkpoint, optimizer, ref=None, more=None):
    """Loads the optimiser's state and what was saved as `more` in place, and ref's weights from checkpoint-0 -> steps
    done.

    The model is to be loaded from the checkpoint like any other. Raises UserError if a reference model is needed and
    checkpoint-0 is not intact.
    """
    first = checkpoint.with_name("checkpoint-0")
    if isinstance(ref, torch.nn.Module) and checkpoint != first:  # not lora.Base, which has no weights of its own
        wrong = fault(first)
        if wrong:
            raise UserError(f"This run needs its initial weights as reference (--kl_coef, --teacher ref), but {wrong}: "
                            "copy checkpoint-0 back, or start a new run.")
        loaded = type(ref).from_pretrained(first, dtype=torch.float32, trust_remote_code=False)
        ref.load_state_dict(loaded.state_dict())
    device = optimizer.param_groups[0]["params"][0].device
    state = torch.load(checkpoint / "state.pt", map_location=device, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    for name, one in (more or {}).items():
        if name in state.get("more", {}):  # checkpoints of 0.3 have none
            one.load_state_dict(state["more"][name])
    return state["step"]
