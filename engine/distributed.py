"""Many processes, one model: the process group, the mesh, and what is done to the model outside model.py, in a fixed order.

    torchrun --nproc_per_node=8 train.py config/minicpm_1b.py

torchrun starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE; train.py imports this file only then. The mesh is
replicate x shard: parameters, gradients and optimizer state lie in pieces on the `shard` ranks of a row, and each of the
`replicate` rows holds all of them. replicate=1 is FSDP, shard=1 is plain data parallelism, anything between is the hybrid
that keeps the gathering of parameters inside a node.
"""
import atexit
import datetime
import functools
import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from configurator import BadInput


@dataclass(frozen=True)
class World:
    """This process among the others."""
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    attempt: str                        # a word that all ranks share and no earlier start of this run had


def join(config):
    """Join the process group that torchrun began; BadInput where device or mesh do not fit it. Returns the World.

    A collective that waits longer than config.timeout minutes for a silent peer ends in an error.
    """
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    if config.device not in ("auto", "cuda", "cpu"):
        raise BadInput(f"--device={config.device}: under torchrun it is auto, cuda (each process takes the GPU of its LOCAL_RANK) or cpu")
    if cuda and local >= torch.cuda.device_count():
        raise BadInput(f"rank {rank}: needs GPU {local} of its node, which has {torch.cuda.device_count()}; "
                       "start as many processes on a node as it has GPUs, or give --device=cpu")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    replicate, shard = mesh_shape(config, size)
    if not dist.is_initialized():                                        # once, however many runs follow in these processes
        # torchrun's store outlives a restart, and in it the addresses of the processes that are gone: look elsewhere in it.
        # Between nodes restarts are counted apart; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each round its own store.
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if one_node else 0}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=datetime.timedelta(minutes=config.timeout))
        atexit.register(leave)
    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    return World(rank, size, device, mesh, broadcast_from_rank0(f"{os.getpid()}-{time.time_ns()}"))


def leave():
    """Leave the process group. gloo's threads hold the tensors of the last collective for a moment longer than it takes, and one that
    lets go of them while the interpreter ends aborts the process: give them that moment."""
    dist.destroy_process_group()
    time.sleep(0.2)


def mesh_shape(config, size):
    """(replicate, shard) for so many ranks; what is not given is the rest. BadInput where they do not multiply to it."""
    replicate = config.replicate or (size // config.shard if config.shard else 1)
    shard = config.shard or size // replicate
    if replicate * shard != size:
        raise BadInput(f"--replicate={config.replicate} --shard={config.shard}: do not multiply to the {size} processes that there are")
    return replicate, shard


def distribute(model, config, mesh, dtype, compiled):
    """Make a model (still on the meta device) one over all ranks: activation checkpointing, compile, sharding.

    Blocks are gathered and used in `dtype`, their gradients summed in float32. The embedding, the head and the last norm
    stay float32: their gradients are sums over many tokens, and model.py rounds where it multiplies with them, so that one
    process and many compute by the same rule.
    """
    if config.recompute:
        recompute(model, config.recompute)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=rounded, shard_placement_fn=shard_dimension)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))


def recompute(model, every):
    """Activation checkpointing: every n-th block, from the first on, keeps only its inputs and runs again in the backward pass."""
    for block in model.blocks[::every]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard_dimension(p):
    """Stacked experts are cut along their rows, since the ranks may outnumber the experts; all else along dimension 0."""
    return Shard(1) if p.dim() == 3 else Shard(0)


# ---- pieces of tensors

def place(tensor):
    """(local piece, its offset in the whole, the whole's shape) of a tensor that may be spread over the ranks."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim(), tuple(tensor.shape)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset), tuple(tensor.shape)


@torch.no_grad()
def put(tensor, whole):
    """Copy into a tensor its piece of the whole."""
    piece, offset, _ = place(tensor)
    piece.copy_(whole[tuple(slice(first, first + n) for first, n in zip(offset, piece.shape))])


# ---- agreement

def total(*numbers):
    """Sum of each number over all ranks, in float64, on the CPU."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def broadcast_from_rank0(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value):
    """[value of rank 0, of rank 1, ...], on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(work):
    """work() on every rank. Where one of them has BadInput or an OSError, all end, none waits for it, and rank 0 says
    whose it was."""
    result = error = None
    try:
        result = work()
    except (BadInput, OSError) as caught:
        error = caught.args if isinstance(caught, BadInput) else (str(caught),)
    errors = all_gather_object(error)
    bad = [rank for rank, e in enumerate(errors) if e]
    if not bad:
        return result
    if dist.get_rank() > 0:
        raise SystemExit(2)
    raise BadInput(*errors[0]) if len(set(errors)) == 1 else BadInput(*[f"rank {rank}: {line}" for rank in bad for line in errors[rank]])


def check_same(value, what):
    """BadInput where a rank was given another value than rank 0."""
    values = all_gather_object(value)
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    if odd:
        names = sorted(name for name in values[0] if any(values[rank].get(name) != values[0][name] for rank in odd)) \
            if isinstance(value, dict) else []
        if dist.get_rank() > 0:
            raise SystemExit(2)
        raise BadInput(f"rank {odd[0]}: has another {what} than rank 0" + (f": {', '.join(names)}" if names else ""))


def lost_a_peer(error):
    """Whether an error of a collective says that another process is gone, or silent for too long."""
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "timeout", "NCCL", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
