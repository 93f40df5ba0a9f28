"""What a run says of itself: before it starts, the memory and disk it will take; when it fails, the cause."""

import math
import os
import shutil
import warnings
from pathlib import Path

import torch

from lib import models
from lib.program import UserError

# --------------------------------------------------------------------------------------------------- memory and disk

def forecast(cfg, folder, policy):
    """Parameters, memory by part and disk of a run that is about to start -> lines of text. Warns if either is short.

    For the bundled model, which is small: "".
    """
    if models.is_bundled(cfg.model):
        return ""
    always, sampling, update = memory_parts(cfg, policy)
    total = sum(always.values()) + max(sum(sampling.values()), sum(update.values()))
    size, (disk, files) = sum(p.numel() for p in policy.model.parameters()), disk_parts(cfg, policy.model)
    there, free = memory_there(policy.device), free_disk(folder)
    lines = [f"\n{size / 1e6:,.1f} million parameters; memory at most about {gigabytes(total)}:"]
    for title, parts in (("always", always), ("sampling", sampling), ("update", update)):
        lines.append(f"  {title:9}" + ", ".join(f"{name} {gigabytes(part)}" for name, part in parts.items()))
    lines.append(f"disk {gigabytes(disk)} per checkpoint, {gigabytes(files)} in all with --keep {cfg.keep}, of "
                 f"{gigabytes(free)} free")
    if total > there:
        warnings.warn(f"The run may take more memory ({gigabytes(total)}) than there is ({gigabytes(there)}): lower "
                      "--rollout_batch, --micro_tokens or --max_prompt_tokens, or set --recompute.", RuntimeWarning,
                      stacklevel=2)
    if files > free:
        warnings.warn(f"The disk of {folder} has too little room for the run's {gigabytes(files)}: lower --keep, or "
                      "choose another with --out.", RuntimeWarning, stacklevel=2)
    return "\n".join(lines)


def gigabytes(size):
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"


def memory_parts(cfg, policy):
    """Bytes of a run by part -> (always there, while sampling, during an update), three {name: bytes}.

    Weights, gradients and AdamW's two moments are fp32. A token's activations are what autograd keeps of a layer: its
    inputs and norms, queries, keys, values and attention's output, and three times the width of the feed-forward part
    (gate, up, product); under --recompute a layer's input, and one layer whole. Scores are one row of the vocabulary
    per response while sampling; in an update the kernels never build the whole.
    """
    config = models.text_config(policy.model)
    size = sum(p.numel() for p in policy.model.parameters())
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 1
    head = getattr(config, "head_dim", None) or hidden // heads
    kept = 2 * head * (getattr(config, "num_key_value_heads", None) or heads)  # keys and values of a token
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    each = 2 if policy.autocast else 4  # bytes of a computed number
    token = 4 * 6 * hidden + each * (2 * hidden + 2 * heads * head + kept + 4 * wide)  # residual stream and norms: fp32
    row = cfg.max_prompt_tokens + cfg.max_response_tokens
    always = {"weights": 4 * size, "AdamW": 8 * size}
    if policy.ref is not None:
        always["reference"] = 4 * size
    if policy.ema is not None:
        always["average"] = 4 * size
    sampling = {"keys and values": cfg.rollout_batch * row * layers * kept * each,
                "scores": 3 * 4 * cfg.rollout_batch * config.vocab_size}
    update = {"gradients": 4 * size, "activations": max(cfg.micro_tokens, row) * (
        layers * 4 * hidden + token if cfg.recompute else layers * token)}
    if policy.autocast:
        update["bf16 weights"] = 2 * size
    if cfg.updates > 1:
        update["copy to undo a step"] = 12 * size
    return always, sampling, update


def disk_parts(cfg, model):
    """Bytes of (a checkpoint, all that are there at once: cfg.keep, the one being written, the first)."""
    size = sum(p.numel() for p in model.parameters())  # a tied weight counts once
    each = (16 if cfg.teacher == "ema" else 12) * size  # weights, AdamW's moments, the average
    return each, (cfg.keep + 1) * each + 4 * size


def memory_there(device):
    """Bytes of memory of a GPU, or of this machine; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def free_disk(folder):
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


# ------------------------------------------------------------------------------------------------------ broken numbers

def check_finite(norm, model, metrics):
    """Raises UserError if a gradient's norm is not finite, with the cause, as far as the step's metrics tell it."""
    if math.isfinite(norm):
        return
    broken = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
    not_finite = lambda name: not math.isfinite(metrics.get(name, 0.0))
    if broken:
        cause = f"the weights hold NaN or infinity ({broken}): start again with a lower --lr"
    elif (largest := max(float(p.detach().abs().max()) for p in model.parameters())) > 1e6:  # products overflow
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
    raise UserError(f"The gradient norm is {norm}, since {cause}. This step changed nothing.")
