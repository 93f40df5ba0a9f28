"""What a run says of itself: before it starts, the memory and disk it will take; when it fails, the cause."""

import math
import shutil
import warnings
from pathlib import Path

from lib import memory, models, parallel
from lib.program import UserError

# --------------------------------------------------------------------------------------------------- memory and disk

def forecast(cfg, folder, policy):
    """Parameters, memory by part and disk of a run that is about to start -> text. Warns if either does not suffice.

    For the bundled model, which is small: "".
    """
    if models.is_bundled(cfg.model):
        return ""
    parts = memory.predict(cfg, policy)
    most, there = memory.peak(parts), memory.memory_there(policy.device)
    size, (disk, files) = sum(p.numel() for p in policy.model.parameters()), disk_parts(cfg, policy.model)
    free = free_disk(folder)
    lines = [f"\n{size / 1e6:,.1f} million parameters; memory at most about {gigabytes(most)}, with micro-batches of "
             f"{cfg.micro_tokens} tokens:"]
    for phase, some in parts.items():
        lines.append(f"  {phase:9}" + (", ".join(f"{name} {gigabytes(part)}" for name, part in some.items()) or "-"))
    lines.append(f"disk {gigabytes(disk)} per checkpoint, {gigabytes(files)} in all with --keep {cfg.keep}, of "
                 f"{gigabytes(free)} free")
    if most > there:
        warnings.warn(f"The run may take more memory ({gigabytes(most)}) than there is ({gigabytes(there)}): lower "
                      "--rollout_batch, --micro_tokens or --max_prompt_tokens, or set --recompute.", RuntimeWarning,
                      stacklevel=2)
    if files > free:
        warnings.warn(f"The disk of {folder} has too little room for the run's {gigabytes(files)}: lower --keep, or "
                      "choose another with --out.", RuntimeWarning, stacklevel=2)
    return "\n".join(lines)


def gigabytes(size):
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"


def disk_parts(cfg, model):
    """Bytes of (a checkpoint, all that are there at once: cfg.keep, the one being written, the first)."""
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)  # a tied weight counts once
    each = (16 if cfg.teacher == "ema" else 12) * size  # weights, AdamW's moments, the average
    return each, (cfg.keep + 1) * each + 4 * size


def free_disk(folder):
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


# ------------------------------------------------------------------------------------------------------ broken numbers

def check_finite(norm, model, metrics):
    """Raises UserError if a gradient's norm is not finite, with the cause, as far as the step's metrics tell it. Called
    by all processes: each looks at its own part of the weights."""
    if math.isfinite(norm):
        return
    weights = {name: memory.own(p.detach()) for name, p in model.named_parameters()}
    broken = parallel.gather(name for name, weight in weights.items() if not weight.isfinite().all())
    largest = max(parallel.gather(float(weight.abs().max()) for weight in weights.values() if weight.numel()))
    not_finite = lambda name: not math.isfinite(metrics.get(name, 0.0))
    if broken:
        cause = f"the weights hold NaN or infinity ({broken[0]}): start again with a lower --lr"
    elif largest > 1e6:  # products overflow
        cause = f"the weights have grown to {largest:.0e}: start a new run with a lower --lr or --weight_decay"
    elif not_finite("grpo/entropy"):
        cause = "the model's own log-probs overflow: use --dtype float32"
    elif not_finite("sdar/gap"):
        cause = (f"the teacher's log-probs are not finite (mean gap {metrics['sdar/gap']}): look at the skills that it "
                 "reads, or use --teacher none")
    elif not_finite("kl/loss"):
        cause = "the reference model's log-probs are not finite: look at checkpoint-0, or use --kl_coef 0"
    elif not_finite("grpo/loss"):
        cause = f"an advantage or a log-ratio is not finite (loss {metrics['grpo/loss']})"
    else:
        cause = "it overflows in the backward pass: use --dtype float32, or start a new run with a lower --lr"
    parallel.agree(UserError(f"The gradient norm is {norm}, since {cause}. This step changed nothing."))
