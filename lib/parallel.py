"""Several processes as one run, by `torchrun --nproc_per_node 8 sdar.py ...`: each plays and trains groups of its own.

Weights, gradients and AdamW's moments are sharded (FSDP2), and gathered when they are saved, so that any number of
processes resumes. Sampling, teacher and reference read whole copies and wait for nobody: processes meet at the end of a
rollout, and in an update at every micro-batch. Rank 0 alone writes files and shows what happens.

With one process there is no process group, and each function does what its name says of one.
"""

import contextlib
import copy
import itertools
import os
import sys
from datetime import timedelta
from types import SimpleNamespace

import torch

from lib.program import UserError, describe

PATIENCE = timedelta(hours=1)  # with a process that does not come to a meeting: rollouts differ in length
WORLD = SimpleNamespace(
    rank=0, size=1,  # this process's number, and that of all processes
    store=None,  # torchrun's, where any process reads and writes at any time
    free=False,  # no other process waits for this one, so that a signal may stop it at once
    stopped=False)  # a signal came while it was not free


def launched(program):
    """-> program(argv), as one of the run's processes if torchrun started it: rank 0 alone prints, and of several
    processes that fail the first says why."""
    def run(argv):
        if "LOCAL_RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1":
            return program(argv)
        join()
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if WORLD.rank else sys.stdout), \
                    contextlib.redirect_stderr(nowhere if WORLD.rank else sys.stderr):
                program(argv)
            torch.distributed.destroy_process_group()
        except Exception as error:
            if getattr(error, "elsewhere", False) or WORLD.store.add("failed", 1) > 1:
                raise SystemExit(2 if isinstance(error, UserError) else 1) from None
            raise

    return run


def join():
    """Makes the process group: NCCL for tensors on GPUs, gloo for all else."""
    import torch.distributed as dist
    if torch.cuda.is_available():
        if int(os.environ["LOCAL_RANK"]) > torch.cuda.device_count():
            raise SystemExit(2)  # one of them says why
        if int(os.environ["LOCAL_RANK"]) == torch.cuda.device_count():
            raise UserError(f"torchrun has started more processes than the {torch.cuda.device_count()} GPUs here: "
                            "lower --nproc_per_node.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    WORLD.store, WORLD.rank, WORLD.size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # by itself torch would take NCCL alone
    dist.init_process_group(backend, store=WORLD.store, rank=WORLD.rank, world_size=WORLD.size, timeout=PATIENCE)


# ------------------------------------------------------------------------------------------------------------- meetings

def everywhere(value):
    """Called by all processes -> the list of their values."""
    values = [value] * WORLD.size
    if WORLD.size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def agree(error=None):
    """Raises in all processes the exception that one brings, so that they can still save together."""
    pickles = error is None or isinstance(error, UserError | KeyboardInterrupt | OSError)  # others may not
    for rank, one in enumerate(everywhere(error if pickles else RuntimeError(describe(error)))):
        if one is not None:
            one = error if rank == WORLD.rank else one
            one.agreed, one.elsewhere = True, rank != WORLD.rank
            raise one


def lost(error):
    """Whether an exception says that another process has ended, or does not answer: gloo has no type of its own."""
    return WORLD.size > 1 and isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))


def each(call, *args, **kwargs):
    """call(...) by every process at its own pace, without meetings in it; what one raises is raised in all."""
    result = failure = None
    try:
        WORLD.free = True
        if take_stop():
            raise KeyboardInterrupt
        result = call(*args, **kwargs)
        WORLD.free = False
    except BaseException as error:
        WORLD.free, failure = False, error
    agree(failure)
    return result


def first(call, *args, **kwargs):
    """call(...) by rank 0 alone, as it writes files -> its result in all processes; what it raises is raised in all."""
    return everywhere(each(call, *args, **kwargs) if WORLD.rank == 0 else each(bool))[0]


def interrupt(*_):
    """Signal handler: KeyboardInterrupt, as soon as no other process waits for this one."""
    if WORLD.size == 1 or WORLD.free:
        WORLD.free = False
        raise KeyboardInterrupt
    WORLD.stopped = True


def take_stop():
    """Whether a signal came that is still to be heeded."""
    stopped, WORLD.stopped = WORLD.stopped, False
    return stopped


# --------------------------------------------------------------------------------------------------- shares of the work

def share(tasks, whole=1):
    """This process's piece of a list, in which every `whole` neighbours (a group) stay together."""
    start, end = (len(tasks) // whole * rank // WORLD.size * whole for rank in (WORLD.rank, WORLD.rank + 1))
    return tasks[start:end]


def spread(items, others=lambda item: None):
    """The whole of a list of which each process has a share: its own items, and others(item) for all others."""
    lists = everywhere(list(map(others, items)))
    lists[WORLD.rank] = items
    return list(itertools.chain(*lists))


def gather(items):
    return list(itertools.chain(*everywhere(list(items))))


def total(number):
    return sum(everywhere(number))


def mean(values):
    """Over the values of all processes; 0 where there is nothing to average."""
    values = list(values)
    return total(sum(values)) / max(total(len(values)), 1)


# ------------------------------------------------------------------------------------------------------------- sharding

def shard(policy, decoder, groups):
    """Shards policy.model in place; policy.fast becomes, or stays, a whole copy.

    decoder: what gives its hidden states. model.sharded_decoder, the same, gathers the weights of a layer at a time and
    keeps those of embedding and head until the backward pass, whose gradients are sums over the processes. groups: of a
    step. Raises UserError for too few, and for one GPU's --device.
    """
    if WORLD.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from transformers.modeling_layers import GradientCheckpointingLayer
    model, device = policy.model, policy.device
    if groups < WORLD.size:
        raise UserError(f"--tasks {groups} leaves processes without a group: raise it, or lower --nproc_per_node.")
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise UserError(f"--device {device} is one GPU, and torchrun gives each process its own: leave it out.")
    if policy.fast is model:
        policy.rounded = copy.deepcopy(model).requires_grad_(False)
    mesh = init_device_mesh(device.type, (WORLD.size,))
    model.sharded_decoder = decoder.__call__
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*reversed(layers), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)
    register_fsdp_forward_method(model, "sharded_decoder")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def in_step(micro_batches, model):
    """Yields this process's micro-batches, then takes part, with nothing, in those that others still have."""
    own = list(micro_batches)
    idle = max(everywhere(len(own))) - len(own)
    yield from own
    for _ in range(idle):
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        hidden = model.sharded_decoder(input_ids=token, use_cache=False).last_hidden_state
        (0 * (hidden.sum() + model.get_output_embeddings().weight.sum())).backward()


def full(tensor):
    """A tensor, gathered if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
