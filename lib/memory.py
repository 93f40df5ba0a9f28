"""How much memory a run takes, by part: from its settings and the shape of its model, before it starts.

`python -m tools.memory check` holds the formulas to what torch allocates; docs/gpu.md has the result.
"""

import contextlib
import itertools
import math
import os
from dataclasses import replace
from typing import NamedTuple

import torch

from lib import models
from lib.engine import PREFILL

KEPT_LOGITS = 7 * 2**25  # bytes that kernels.py may keep from forward to backward on a CPU (its KEEP_BYTES)
CHUNK = 8192  # tokens, and vocabulary columns, of its largest buffer on a GPU (its GPU_CHUNK)
USABLE = 0.9  # share of a GPU's memory for tensors; the rest: CUDA's context, libraries' workspaces, fragmentation
MICRO_TOKENS = range(1024, 65_536 + 1, 1024)  # what --micro_tokens auto chooses from


class Shape(NamedTuple):
    """What memory depends on in a causal LM, besides its number of parameters."""

    layers: int
    hidden: int
    heads: int
    query: int  # width of a layer's queries: heads x their size
    keys: int  # width of its keys and values together
    wide: int  # width of the feed-forward part
    vocab: int


def shape_of(model):
    config = models.text_config(model)
    layers = list(getattr(config, "per_layer_config", None) or [config])  # of layers that are unlike each other

    def widest(name, default):
        """The largest value of a setting, which may be a list or belong to each layer; default where there is none."""
        found = [getattr(layer, name, None) for layer in layers]
        return max(itertools.chain(*(one if isinstance(one, list | tuple) else [one or 0] for one in found))) or default

    hidden, heads = config.hidden_size, widest("num_attention_heads", 1)
    size = widest("head_dim", hidden // heads)  # of a head
    keys = 2 * size * widest("num_key_value_heads", heads)
    return Shape(config.num_hidden_layers, hidden, heads, heads * size, keys, widest("intermediate_size", 4 * hidden),
                 config.vocab_size)


def bytes_of(model, besides=None):
    """Bytes of a model's parameters, except those that belong to the model `besides`, too."""
    shared = set() if besides is None else set(map(id, besides.parameters()))
    return sum(own(p).numel() * p.element_size() for p in model.parameters() if id(p) not in shared)


def own(tensor):
    """This process's part of a tensor that is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---------------------------------------------------------------------------------------------------------- prediction

def predict(cfg, policy):
    """Bytes of a run by phase and part: {"always" | "sampling" | "scoring" | "update": {part: bytes}}.

    What the settings allow at most: prompts and responses at their limits, full micro-batches of siblings. Of policy it
    reads model, fast, ref, ema, vllm, autocast and device; the models may be on the meta device.
    """
    shape = shape_of(policy.model)
    trained = 4 * sum(own(p).numel() for p in policy.model.parameters() if p.requires_grad)
    siblings = sibling_tokens(cfg)
    tokens = max(cfg.micro_tokens, cfg.max_prompt_tokens + cfg.max_response_tokens)  # of a micro-batch
    scored = tokens * siblings // (cfg.max_prompt_tokens + siblings)  # those of responses
    always = {"weights": bytes_of(policy.model), "AdamW": 2 * trained}
    scoring = larger(activations=tokens * passing(shape, policy.autocast), head=head_buffers(shape, scored, policy))
    layer = passing(shape, policy.autocast) + (kept(shape, policy.autocast) if cfg.recompute else 0)
    update = {"gradients": trained, "activations": activations(cfg, shape, tokens, policy.autocast),
              **larger(head=trained_head(shape, scored, policy), layer=tokens * layer + held(policy))}
    if policy.fast is not policy.model:
        always["bf16 copy"] = bytes_of(policy.fast, besides=policy.model)
    if policy.ref is not None:
        (scoring if cfg.offload_reference else always)["reference"] = bytes_of(policy.ref)
    if policy.ema is not None:
        always["average"] = bytes_of(policy.ema)
    if policy.autocast:
        update["bf16 weights"] = 2 * sum(matrix.numel() for matrix in models.matrices(policy.model)
                                         if matrix.dtype == torch.float32)
    if cfg.updates > 1:
        update["copy to undo a step"] = 3 * trained
    generating = sampling(cfg, shape, policy) if policy.vllm is None else {}
    if policy.vllm is not None:
        (always if policy.vllm.stays_awake else generating)["vLLM"] = vllm_bytes(policy)
    return {"always": always, "sampling": generating, "scoring": scoring, "update": update}


def vllm_bytes(policy):
    """Bytes of vLLM's weights, in the dtype of computing, and of its cache."""
    each = 2 if policy.autocast else 4
    return policy.vllm.cache_bytes + each * sum(p.numel() for p in policy.model.parameters())


def peak(parts):
    """The most bytes that are allocated at once, of what `predict` gives."""
    return sum(parts["always"].values()) + max(sum(parts[phase].values()) for phase in parts if phase != "always")


def larger(**parts):
    """The larger of parts that come one after the other, as {name: bytes}."""
    name = max(parts, key=parts.get)
    return {name: parts[name]}


def sibling_tokens(cfg):
    """The most response tokens that can share one prompt: those of a group, within the bound of lib.packing."""
    return min(4 * cfg.max_prompt_tokens, cfg.group_size * cfg.max_response_tokens)


def passing(shape, autocast):
    """Bytes per token that come and go while a layer is computed: hidden states in fp32, three times its width."""
    return 12 * shape.hidden + (2 if autocast else 4) * 3 * shape.wide


def kept(shape, autocast):
    """Bytes per token that autograd keeps of one of transformers' Qwen2 or Llama layers with SDPA.

    Of each norm its input and the normalised input in fp32, and its result: under autocast as a bf16 copy for each of
    the five products that read it. Queries, keys, values (repeated for all heads, as masks make SDPA do), attention's
    output, and four times the width of the feed-forward part: gate, its activation, up, and the product of both.
    """
    norms = (16 + 10 if autocast else 24) * shape.hidden
    return norms + (2 if autocast else 4) * 4 * (shape.query + shape.wide) + 4 * shape.heads + 8


def activations(cfg, shape, tokens, autocast):
    """Bytes of a micro-batch's activations that autograd keeps, and of the mask of packed rows."""
    layer = 4 * shape.hidden if cfg.recompute else kept(shape, autocast)
    mask = (3 if autocast else 5) * min(tokens, cfg.max_prompt_tokens + sibling_tokens(cfg))
    return tokens * (layer * shape.layers + 8 * shape.hidden + mask)  # 8: the last norm's


def held(policy):
    """Bytes of the gradient of the head's weight, which waits beside the gradients until the embedding's comes, too."""
    weight = policy.model.get_output_embeddings().weight
    return 4 * weight.numel() if weight.requires_grad else 0


def head_buffers(shape, scored, policy):
    """Bytes that the kernels take for the log-probs of `scored` tokens: hidden states, chunks of logits or strips."""
    chunks = 4500 * scored if policy.device.type == "cuda" else 20 * min(2**20, scored * shape.vocab)
    return 4 * scored * shape.hidden + chunks


def trained_head(shape, scored, policy):
    """The same with gradients: of hidden states, in fp32; of logits, a chunk, and on a CPU those that are kept; of the
    head's weight, in its own dtype and then in fp32."""
    logits = min(KEPT_LOGITS, 4 * scored * shape.vocab)
    if policy.device.type == "cuda":
        logits = 2 * min(scored, CHUNK) * min(shape.vocab, CHUNK)
    buffers = head_buffers(shape, scored, policy) + 4 * scored * shape.hidden + logits
    return max(buffers + held(policy) // 2, held(policy) * 3 // 2) if policy.autocast else buffers + held(policy)


def sampling(cfg, shape, policy):
    """Bytes by part while the engine of lib/engine.py generates cfg.rollout_batch responses side by side."""
    from lib.cache import SPARE, make_cache  # imports transformers, too
    each, rows = 2 if policy.autocast else 4, cfg.rollout_batch
    columns = cfg.max_prompt_tokens + cfg.max_response_tokens + SPARE
    most = max(PREFILL, cfg.max_prompt_tokens) if make_cache(policy.model).joins else math.inf
    prompts = min(rows * cfg.max_prompt_tokens, most)  # computed at once
    prefill = prompts * (passing(shape, policy.autocast) + shape.layers * shape.keys * each
                         + (each + 1) * cfg.max_prompt_tokens)  # its own cache, and its mask
    decode = rows * columns * 2 * shape.query * each  # keys and values of a layer, repeated for all heads
    scores = rows * shape.vocab * 24  # logits and log-probs in fp32, cumulative probabilities in fp64
    return {"cache": rows * columns * shape.layers * shape.keys * each,
            **larger(activations=max(prefill, decode), head=scores)}


# ------------------------------------------------------------------------------------------------ what follows from it

def choose_micro_tokens(cfg, policy):
    """What --micro_tokens auto stands for: on a GPU the largest of MICRO_TOKENS with which all that is still to be
    allocated, beside the models and vLLM, fits into what is free; at least the first of them. On a CPU the default."""
    if policy.device.type != "cuda":
        return type(cfg)().micro_tokens
    unused = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    room = USABLE * (torch.cuda.mem_get_info(policy.device)[0] + unused)

    def to_come(size):
        parts = predict(replace(cfg, micro_tokens=size), policy)
        allocated = sum(parts["always"].values()) - parts["always"]["AdamW"] + parts["sampling"].get("vLLM", 0)
        return peak(parts) - allocated

    fitting = [size for size in MICRO_TOKENS if to_come(size) <= room]
    return max(fitting, default=MICRO_TOKENS[0])


def offloaded(policy):
    """-> the policy, whose reference, if it has one of its own, waits in this machine's memory instead of a GPU's:
    pinned, so that the GPU reads it fastest."""
    if isinstance(policy.ref, torch.nn.Module) and policy.device.type == "cuda":  # an evaluation has none
        for tensor in (*policy.ref.parameters(), *policy.ref.buffers()):
            tensor.data = tensor.data.to("cpu").pin_memory()
    return policy


@contextlib.contextmanager
def on_device(model, device):
    """Within the block the model's weights are on the device; afterwards they are where they were before."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []  # not lora.Base's
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in zip(tensors, home):
            tensor.data = data


def memory_there(device):
    """Bytes of memory of a GPU, or of this machine; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf
