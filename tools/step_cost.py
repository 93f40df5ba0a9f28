"""PREDICTION of what a training step costs on one GPU, part by part: seconds from counts of FLOP, bytes and launches.

    python -m tools.step_cost                  the table of docs/gpu.md: Qwen2.5 on one H100 at the paper's settings

`python -m tools.gpu_check` measures each part and puts the prediction beside it. L layers, D hidden size, Q and
K widths of queries and of keys and values, M numbers in the layers' matrices, V vocabulary.
"""

import math
import sys
from typing import NamedTuple

import torch

from lib import memory, models
from lib.program import exit_status
from tools.bench_kernels import print_rows
from tools.memory import QWEN, qwen


class Gpu(NamedTuple):
    """What a GPU does per second in such a step. Only `product` and `copy` were measured, on an H100; the rest are
    assumptions that gpu_check confirms or refutes."""

    product: float = 798e12  # FLOP of a large bf16 product
    copy: float = 3.0e12  # bytes read and written
    layers: float = 0.45  # share of `product` that whole layers reach: narrow products, and all that is between them
    head: float = 0.82  # share of `product` that kernels.py reaches (measured on an H200)
    launch: float = 1.0e-3  # seconds of the host per layer and call: transformers' Python and some 30 launches


class Work(NamedTuple):
    """A step's work: means per turn of an environment at the paper's settings. Lengths are assumptions."""

    episodes: int
    turns: float
    prompt: int
    skills: int
    response: int
    batch: int = 128  # responses generated side by side


WORK = {
    "webshop": Work(128, 8, 1100, 600, 150),
    "alfworld": Work(128, 25, 900, 600, 120),
    "search": Work(1024, 2.5, 1200, 400, 120),
}


class Size(NamedTuple):
    shape: memory.Shape
    matrices: int  # numbers in the layers' matrices
    parameters: int


def size_of(model):
    matrices = sum(matrix.numel() for matrix in models.matrices(model)) - model.get_output_embeddings().weight.numel()
    return Size(memory.shape_of(model), matrices, sum(p.numel() for p in model.parameters()))


# ---------------------------------------------------------------------------------------------------- seconds of a part

def layers_seconds(size, tokens, length, gpu, passes=1):
    """A forward pass of the layers over `tokens` in sequences of `length`; passes: 3 with gradient, 4 recomputing.

        2 M + 2 L Q length FLOP a token, at gpu.layers x gpu.product
    """
    flop = 2 * size.matrices + 2 * size.shape.layers * size.shape.query * length
    return passes * tokens * flop / (gpu.layers * gpu.product)


def head_seconds(size, scored, gpu, products):
    """Products of kernels.py over `scored` tokens: log-prob 1, both sides 2, both sides and gradient 5: 2 D V each."""
    return products * scored * 2 * size.shape.hidden * size.shape.vocab / (gpu.head * gpu.product)


def decode_seconds(size, rows, length, gpu):
    """A token more of `rows` responses whose sequences have `length` tokens: the host's launches, or the bytes.

        weights 2 (M + V D);  keys and values 2 L K rows length, and (masked SDPA) their copies for all heads, written
        and read, 8 L Q rows length;  logits and log-probs 60 V rows
    """
    shape = size.shape
    kept = rows * length * shape.layers * (2 * shape.keys + 8 * shape.query)
    moved = 2 * (size.matrices + shape.vocab * shape.hidden) + kept + 60 * shape.vocab * rows
    return max(shape.layers * gpu.launch, moved / gpu.copy)


def optimizer_seconds(size, gpu):
    """AdamW: weights, gradients and two moments in fp32, read and (without the gradients) written; the norm reads the
    gradients once more, clipping reads and writes them; the bf16 copy: 46 bytes a parameter."""
    return 46 * size.parameters / gpu.copy


def step_seconds(size, work, gpu=None, recompute=False):
    """-> {part: seconds} of a step of SDAR with live teacher and reference."""
    gpu = gpu or Gpu()
    turns, length = work.episodes * work.turns, work.prompt + work.response
    read, scored = turns * length, turns * work.response
    taught = turns * (length + work.skills)
    tokens_each = math.ceil(scored / work.batch)
    return {"prefill": layers_seconds(size, turns * work.prompt, work.prompt, gpu),
            "decode": tokens_each * decode_seconds(size, work.batch, work.prompt + work.response / 2, gpu),
            "reference": layers_seconds(size, read, length, gpu) + head_seconds(size, scored, gpu, 1),
            "teacher": layers_seconds(size, taught, length + work.skills, gpu) + head_seconds(size, scored, gpu, 1),
            "student": (layers_seconds(size, read, length, gpu, 4 if recompute else 3)
                        + head_seconds(size, scored, gpu, 4)),
            "optimiser": optimizer_seconds(size, gpu)}


# ----------------------------------------------------------------------------------------------------- the command line

def table():
    rows = []
    for name in QWEN:
        with torch.device("meta"):
            size = size_of(qwen(*QWEN[name]))
        for env, work in WORK.items():
            parts = step_seconds(size, work)
            rows.append({"model": name, "environment": env, **parts, "step": sum(parts.values())})
    return rows


def main(argv=None):
    return exit_status(lambda _: print_rows(table()), sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
