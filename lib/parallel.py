"""Several processes as one run, by `torchrun --nproc_per_node 8 sdar.py ...`: each plays and trains whole groups.

Weights, gradients and AdamW's moments are sharded over the processes (FSDP2), and gathered when they are saved, so that
any number of processes resumes. Sampling, teacher and reference read whole copies and wait for nobody: processes meet at
the end of a rollout, and in the update at every micro-batch. Rank 0 alone writes files and shows what happens.

A run of one process has no process group: each function here is then what its name says of one.
"""

import contextlib
import copy
import itertools
import os
import pickle
from datetime import timedelta

import torch

from lib.program import UserError, describe

PATIENCE = timedelta(hours=1)  # for a process that does not come to a meeting, such as one whose rollout takes longest


class World:
    """This process among those of the run, 0 .. size - 1."""

    rank, size = 0, 1
    store = None  # what all processes read and write at any time, torchrun's
    free = False  # no other process waits for this one, so that a signal may stop it at once
    stopped = False  # a signal came while it was not free


WORLD = World()


def is_first():
    """Whether this process writes the run's files."""
    return WORLD.rank == 0


# ------------------------------------------------------------------------------------------------------ start and end

def launched(program):
    """program(argv) as one of torchrun's processes, if it was started by that: the others' output is hidden, and of
    several that fail the first says why."""
    def run(argv):
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return program(argv)
        join()
        try:
            with hidden_output(WORLD.rank > 0):
                program(argv)
            torch.distributed.destroy_process_group()
        except Exception as error:
            if getattr(error, "elsewhere", False) or WORLD.store.add("failed", 1) > 1:
                raise SystemExit(2 if isinstance(error, UserError) else 1) from None
            raise

    return run


def join():
    """Makes the process group: NCCL between GPUs, gloo between CPUs and for all that is not a tensor on a GPU."""
    import torch.distributed as dist
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun has started more processes than there are GPUs here ({torch.cuda.device_count()}"
                            "): lower --nproc_per_node.")
        torch.cuda.set_device(local)
    WORLD.store, WORLD.rank, WORLD.size = next(dist.rendezvous("env://"))
    dist.init_process_group(store=WORLD.store, rank=WORLD.rank, world_size=WORLD.size, timeout=PATIENCE)


@contextlib.contextmanager
def hidden_output(hidden):
    with contextlib.ExitStack() as stack:
        if hidden:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


# ------------------------------------------------------------------------------------------------------------- meetings

def everywhere(value):
    """This function is called by all processes -> the list of their values, which travel as pickles."""
    if WORLD.size == 1:
        return [value]
    values = [None] * WORLD.size
    torch.distributed.all_gather_object(values, value)
    return values


def agree(error=None):
    """Raises what one of the processes brings, in all of them, so that they go on, or end, alike."""
    if WORLD.size == 1:
        if error is not None:
            raise error
        return
    for rank, one in enumerate(everywhere(portable(error))):
        if one is not None:
            one = error if rank == WORLD.rank else one
            one.agreed, one.elsewhere = True, rank != WORLD.rank
            raise one


def portable(error):
    """An exception that survives pickling, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # an exception's class may refuse in any way
        return RuntimeError(describe(error))


def agreed(error):
    """Whether all processes raise an exception, so that they can still save together."""
    return WORLD.size == 1 or getattr(error, "agreed", False)


def each(call, *args, **kwargs):
    """call(...) by every process, at its own pace and without meetings in it. What one raises is raised in all."""
    if WORLD.size == 1:
        return call(*args, **kwargs)
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
    if WORLD.size == 1:
        return call(*args, **kwargs)
    result = failure = None
    if is_first():
        try:
            result = call(*args, **kwargs)
        except BaseException as error:
            failure = error
    agree(failure)
    return everywhere(result)[0]


def interrupt(*_):
    """Signal handler: KeyboardInterrupt, as soon as no other process waits for this one."""
    if WORLD.size == 1 or WORLD.free:
        WORLD.free = False
        raise KeyboardInterrupt
    WORLD.stopped = True


def take_stop():
    """Whether a signal has come that is still to be heeded; it is not reported twice."""
    stopped, WORLD.stopped = WORLD.stopped, False
    return stopped


# ------------------------------------------------------------------------------------------------ shares of the work

def share(tasks, whole=1):
    """This process's part of a list, in one piece; `whole` neighbours (a group) stay together."""
    start, end = (rank * (len(tasks) // whole) // WORLD.size * whole for rank in (WORLD.rank, WORLD.rank + 1))
    return tasks[start:end]


def spread(items, others=lambda item: None):
    """The list of which all processes have shares: own items, and others(item) for each item of another process."""
    lists = everywhere(list(map(others, items)))
    lists[WORLD.rank] = items
    return list(itertools.chain(*lists))


def gather(items):
    """The lists of all processes, as one."""
    return items if WORLD.size == 1 else list(itertools.chain(*everywhere(list(items))))


def total(number):
    return sum(everywhere(number))


def mean(values):
    """Over the values of all processes; 0 where there is nothing to average."""
    values = list(values)
    return total(sum(values)) / max(total(len(values)), 1)


# ------------------------------------------------------------------------------------------------------------- sharding

def shard(policy, decoder, groups):
    """Shards policy.model in place; policy.fast becomes, or stays, a whole copy, from which this process samples.

    decoder: the part of policy.model that gives hidden states; called as policy.model.sharded_decoder it gathers the
    weights of one layer after the other, and those of embedding and head until the backward pass is done. Gradients are
    sums over all processes. groups: of a step. Raises UserError if there are not enough, or for one GPU's --device.
    """
    if WORLD.size == 1:
        return
    if groups < WORLD.size:
        raise UserError(f"{groups} tasks per step leave some of the {WORLD.size} processes without one, as a group is "
                        "not divided: raise --tasks, or lower --nproc_per_node.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from transformers.modeling_layers import GradientCheckpointingLayer
    model, kind = policy.model, policy.device.type
    if kind == "cuda" and policy.device.index not in (None, torch.cuda.current_device()):
        raise UserError(f"--device {policy.device} is one GPU, and torchrun gives each process its own: leave it out.")
    if policy.fast is model:
        policy.rounded = copy.deepcopy(model).requires_grad_(False)
    mesh = init_device_mesh(kind, (WORLD.size,))
    model.sharded_decoder = decoder.__call__
    for layer in reversed([one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "sharded_decoder")
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def in_step(micro_batches, model):
    """Yields this process's micro-batches, and then takes part, with nothing, in those that others still have."""
    own = list(micro_batches)
    most = max(everywhere(len(own)))
    yield from own
    for _ in range(most - len(own)):
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        hidden = model.sharded_decoder(input_ids=token, use_cache=False).last_hidden_state
        (0 * (hidden.sum() + model.get_output_embeddings().weight.sum())).backward()


def full(tensor):
    """A tensor, gathered if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole(state):
    """A state_dict, nested, whose sharded tensors are gathered, one by one, into rank 0's host memory (None elsewhere).

    A tensor that has two names, such as tied weights (state_dict(keep_vars=True)), stays one.
    """
    gathered = {}

    def visit(value):
        if isinstance(value, dict):
            return {key: visit(one) for key, one in value.items()}
        if not hasattr(value, "full_tensor"):
            return value
        if id(value) not in gathered:
            tensor = value.detach().full_tensor()
            gathered[id(value)] = tensor.cpu() if is_first() else None
        return gathered[id(value)]

    return state if WORLD.size == 1 else visit(state)


def cut(state, optimizer):
    """What `whole` has made of the optimiser's state_dict -> the same with this process's parts of the tensors."""
    if WORLD.size == 1:
        return state
    from torch.distributed.tensor import distribute_tensor
    params = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    for number, param in enumerate(params):
        for name, one in state["state"].get(number, {}).items():
            if one.shape == param.shape:  # a moment, not the count of steps
                state["state"][number][name] = distribute_tensor(
                    one.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
    return state
