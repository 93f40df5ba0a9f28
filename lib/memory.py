"""How much memory a run takes, by part: from its settings and the shape of its model, before it starts.

The formulas are held to what is measured by `python -m tools.memory check` (docs/gpu.md).
"""

import contextlib
import math
import os
from typing import NamedTuple

import torch

from lib import models

KEPT_LOGITS = 7 * 2**25  # bytes that kernels.py may keep from forward to backward on a CPU (its KEEP_BYTES)
CHUNK = 8192  # tokens, and vocabulary columns, of its largest buffer on a GPU (its GPU_CHUNK)
USABLE = 0.9  # share of a GPU's memory for tensors; the rest: CUDA's context, libraries' workspaces, fragmentation
MICRO_TOKENS = range(1024, 65_536 + 1, 1024)  # what --micro_tokens auto chooses from


class Shape(NamedTuple):
    """What memory depends on in a causal LM besides its number of parameters."""

    layers: int
    hidden: int
    heads: int
    query: int  # width of a layer's queries: heads x their size
    keys: int  # width of its keys and values together
    wide: int  # width of the feed-forward part
    vocab: int
    tied: bool  # whether head and embedding are one matrix


def shape_of(model):
    config = models.text_config(model)
    heads = getattr(config, "num_attention_heads", None) or 1
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return Shape(config.num_hidden_layers, config.hidden_size, heads, heads * head,
                 2 * head * (getattr(config, "num_key_value_heads", None) or heads), wide, config.vocab_size, tied)


def bytes_of(model, besides=None):
    """Bytes of a model's parameters; besides: those that belong to this model too count there."""
    shared = set() if besides is None else set(map(id, besides.parameters()))
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in shared)


# ---------------------------------------------------------------------------------------------------------- prediction

def predict(cfg, policy):
    """Bytes of a run by phase and part -> {"always", "sampling", "scoring", "update": {part: bytes}}.

    The largest that the settings allow: every prompt and response at its limit. Of policy it uses model, fast, ref,
    ema, autocast and device; its models may be on the meta device. The peak is `total` of this.
    """
    shape, each = shape_of(policy.model), 2 if policy.autocast else 4  # bytes of a computed number
    trained = 4 * sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    row, siblings = cfg.max_prompt_tokens + cfg.max_response_tokens, most_siblings(cfg)
    tokens = max(cfg.micro_tokens, row)  # of a micro-batch
    scored = tokens * siblings // (cfg.max_prompt_tokens + siblings)  # response tokens among them
    always = {"weights": bytes_of(policy.model), "AdamW": 2 * trained}
    if getattr(policy, "fast", policy.model) is not policy.model:
        always["bf16 copy"] = bytes_of(policy.fast, besides=policy.model)
    if policy.ema is not None:
        always["average"] = bytes_of(policy.ema)
    reference = 0 if policy.ref is None else bytes_of(policy.ref)
    if reference and not cfg.offload_reference:
        always["reference"] = reference
    sampling = {"cache": cfg.rollout_batch * row * shape.layers * shape.keys * each,
                "scores": cfg.rollout_batch * shape.vocab * SCORES}
    scoring = {"activations": tokens * passing(shape, each), "head": head_buffers(shape, scored, policy, False)}
    if reference and cfg.offload_reference:
        scoring["reference"] = reference
    update = {"gradients": trained, "activations": activations(cfg, shape, tokens, policy.autocast),
              "head": head_buffers(shape, scored, policy, True) + 4 * shape.vocab * shape.hidden}
    if policy.autocast:
        update["bf16 weights"] = bytes_of(policy.model) // 2
    if cfg.updates > 1:
        update["copy to undo a step"] = bytes_of(policy.model) + 2 * trained
    return {"always": always, "sampling": sampling, "scoring": scoring, "update": update}


def most_siblings(cfg):
    """Tokens of the responses that can share one prompt: a group's, within lib.packing's bound."""
    return min(4 * cfg.max_prompt_tokens, cfg.group_size * cfg.max_response_tokens)


SCORES = 28


def total(parts):
    """The peak of what `predict` gives."""
    phases = [sum(phase.values()) for name, phase in parts.items() if name != "always"]
    return sum(parts["always"].values()) + max(phases)


def layer(shape, autocast, packed):
    """Bytes per token that autograd keeps of a layer, as saved by transformers' Qwen2 and Llama layers with SDPA.

    Of each norm: input and normalised input in fp32, and the result, of which autocast makes bf16 copies, one for each
    of the five products that read it. Queries, keys, values and attention's output, and four times the width of the
    feed-forward part (gate, its activation, up, product). packed: a mask makes SDPA repeat keys and values per head.
    """
    stream = 16 * shape.hidden + 10 * shape.hidden if autocast else 24 * shape.hidden
    keys = 2 * shape.query if packed else shape.keys
    return stream + (2 if autocast else 4) * (2 * shape.query + keys + 4 * shape.wide) + 4 * shape.heads + 8


def passing(shape, each):
    """Bytes per token that come and go while a layer is computed, forward or backward."""
    return 12 * shape.hidden + each * 3 * shape.wide


def activations(cfg, shape, tokens, autocast):
    """Bytes of activations of a micro-batch with gradient: what is kept, what comes and goes, and the packing mask."""
    each = 2 if autocast else 4
    whole = layer(shape, autocast, packed=True)
    kept = 4 * shape.hidden * shape.layers + whole if cfg.recompute else whole * shape.layers
    mask = min(tokens, cfg.max_prompt_tokens + most_siblings(cfg)) * (each + 1)  # per token: additive and boolean
    return tokens * (kept + passing(shape, each) + 8 * shape.hidden + mask)


def head_buffers(shape, scored, policy, gradient):
    """Bytes that kernels.py takes besides inputs and results: a chunk of logits; with gradient fp32 sums of the hidden
    states' gradient, and on a CPU the logits that it keeps."""
    sums = 4 * scored * shape.hidden * (1 + gradient)
    if policy.device.type == "cuda":
        return sums + 4500 * scored + gradient * 2 * min(scored, CHUNK) * min(shape.vocab, CHUNK)
    return sums + 5 * 2**22 + gradient * min(KEPT_LOGITS, 4 * scored * shape.vocab)


# ------------------------------------------------------------------------------------------------------ what there is

def memory_there(device):
    """Bytes of memory of a GPU, or of this machine; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf
