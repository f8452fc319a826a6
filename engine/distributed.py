"""Many processes that train one model: the process group, the mesh, and what is done to the model
outside of model.py.

    torchrun --nproc_per_node=8 train.py config/minicpm_1b.py

torchrun starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE. The mesh is replicate x
shard: parameters, gradients and optimizer state are sharded over the `shard` ranks of a row, and
each of the `replicate` rows holds a full copy. replicate=1 is FSDP, shard=1 is data parallelism,
anything between is hybrid sharding, which keeps the all-gathers inside a node.

The rule for failures: a rank that fails says so in one line and exits at once; torchrun then ends
the other processes. What only rank 0 does stands in `if world.rank == 0:`; if the others need it, a
collective call follows, such as `world.barrier()`.
"""
import atexit
import contextlib
import datetime
import functools
import math
import os
import sys
import time
import traceback
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from configurator import BadInput, expected_error
from engine.device import pick_device

UNDER_TORCHRUN = "LOCAL_RANK" in os.environ
SECONDS_FOR_OTHERS = 3.0                # that a failed rank waits, so that rank 0 speaks first
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting",
             "timeout", "NCCL", "Broken pipe")


@dataclass(frozen=True)
class World:
    """This process among those that train one model; World(device=...) is a process alone."""
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: object = None                 # DeviceMesh replicate x shard; None: alone
    attempt: str = ""                   # the same on all ranks, and another one after every restart

    @property
    def alone(self):
        """Whether this process was started without torchrun, so that nothing is sharded."""
        return self.mesh is None

    @property
    def shards(self):
        """Number of processes that one copy of the model is sharded over."""
        return self.mesh.size(1) if self.mesh else 1

    def barrier(self):
        """Wait until all ranks are here."""
        self.mean(0)

    def mean(self, *numbers):
        """Return the mean of each number over all ranks, a list; alone, the numbers unchanged."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return (sums / self.size).tolist()

    def mean_tensors(self, tensors):
        """Average each tensor of a dict over all ranks, in place."""
        if self.size > 1:
            for tensor in tensors.values():
                dist.all_reduce(tensor)
                tensor /= self.size

    def from_rank0(self, value):
        """Return rank 0's value on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value):
        """Return [value of rank 0, of rank 1, ...] on every rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values


def init_world(config):
    """Return the World of this process: alone, or joined with the others that torchrun started.

    A collective that waits longer than config.timeout minutes for a silent peer fails. Raises
    BadInput if the device or the mesh does not fit.
    """
    if not UNDER_TORCHRUN:
        return World(device=pick_device(config.device))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    if config.device not in ("auto", "cuda", "cpu"):
        raise BadInput(f"--device={config.device}: under torchrun it is auto, cpu, or cuda "
                       "(each process takes the GPU of its LOCAL_RANK)")
    cuda = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise BadInput(f"needs GPU {local_rank} of a node that has {torch.cuda.device_count()}; "
                       "start as many processes per node as it has GPUs, or give --device=cpu")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    replicate, shard = mesh_shape(config, size)
    if not dist.is_initialized():  # several runs may follow in one process
        join_process_group(rank, size, cuda, config.timeout)
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    attempt = World(size=size).from_rank0(f"{os.getpid()}-{time.time_ns()}")
    return World(rank, size, device, mesh, attempt)


def join_process_group(rank, size, cuda, timeout):
    """Initialize the default process group, with a key prefix of its own per restart.

    torchrun's store survives a restart together with the addresses of dead processes. On one node
    the prefix holds the restart count; between nodes restarts are counted apart, so there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 must give each round a store of its own (docs/cluster.md).
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if one_node else 0
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {restart}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                            world_size=size, timeout=datetime.timedelta(minutes=timeout))
    atexit.register(leave_process_group)


def leave_process_group():
    """Leave the process group. gloo's threads hold the tensors of the last collective a moment
    longer; a thread that frees them while the interpreter ends would abort the process."""
    dist.destroy_process_group()
    time.sleep(0.2)


def mesh_shape(config, size):
    """Return (replicate, shard) for so many ranks; an option left at 0 follows from the other.
    Raises BadInput if they do not fit."""
    replicate = config.replicate or (size // config.shard if config.shard else 1)
    shard = config.shard or size // replicate
    if replicate * shard != size:
        raise BadInput(f"--replicate={config.replicate} --shard={config.shard}: their product is "
                       f"not the number of processes, {size}")
    return replicate, shard


# ---- failures

@contextlib.contextmanager
def failing_ranks_exit():
    """Under torchrun, turn an error of this rank into a message and an immediate exit.

    An exit that waited for the others inside a collective would hang. Rank 0 speaks first: if all
    ranks have the same problem, torchrun ends the others before they repeat it.
    """
    try:
        yield
    except Exception as error:
        if not UNDER_TORCHRUN:
            raise
        rank = int(os.environ["RANK"])
        exit_code, message = expected_error(error)
        if exit_code is None and is_lost_peer(error):
            reason = str(error).splitlines()[0]
            exit_code, message = 4, f"lost contact with the other processes ({reason})"
        elif exit_code is None:
            exit_code, message = 1, traceback.format_exc()
        if rank > 0 or exit_code == 4:
            time.sleep(SECONDS_FOR_OTHERS)
        for line in message.splitlines():
            print(f"rank {rank}: {line}" if rank > 0 or exit_code == 4 else line, file=sys.stderr)
        sys.stderr.flush()
        os._exit(exit_code)


def is_lost_peer(error):
    """Return whether an error of a collective says that another process died or is silent."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)


def check_same_config(world, values):
    """Raise BadInput on a rank that was given other values (a dict) than rank 0."""
    expected = world.from_rank0(values)
    different = sorted(name for name in values if values[name] != expected.get(name))
    if different:
        raise BadInput(f"has another configuration than rank 0: {', '.join(different)}")


# ---- what is done to the model, in this order

def distribute(model, config, mesh, dtype, compiled):
    """Shard a model that is still on the meta device: activation checkpointing, compile, FSDP2.

    Blocks are gathered and used in `dtype`, their gradients are reduced in float32. The embedding,
    the head and the last norm stay float32: their gradients are sums over many tokens, and model.py
    casts where it multiplies with them, so that one process and many compute by the same rule.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if config.recompute:
        recompute_blocks(model, config.recompute)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    policy = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float32,
                               cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy(param_dtype=dtype),
                    shard_placement_fn=shard_dimension)
    fully_shard(model, mesh=mesh, mp_policy=policy())


def recompute_blocks(model, every):
    """Activation checkpointing: every n-th block keeps only its input, and runs again in the
    backward pass."""
    from torch.utils.checkpoint import checkpoint
    for block in model.blocks[::every]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard_dimension(p):
    """Shard stacked experts along their rows (there may be fewer experts than ranks), all else
    along dimension 0."""
    from torch.distributed.tensor import Shard
    return Shard(1) if p.dim() == 3 else Shard(0)


def sync_gradients(model, sync):
    """Enable or disable gradient reduction in the next backward pass (no effect without FSDP)."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(sync)


def clip_gradients(model, max_norm):
    """Clip the gradients to a norm (0: no clipping). Returns the norm before, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ---- shards of tensors

def local_shard(tensor):
    """Return (local shard, its offset in the whole, shape of the whole) of a tensor that may be
    sharded."""
    if not hasattr(tensor, "to_local"):
        return tensor, (0,) * tensor.dim(), tuple(tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset), tuple(tensor.shape)


@torch.no_grad()
def copy_local_shard(tensor, whole):
    """Copy into a tensor, which may be sharded, its part of the whole."""
    shard, offset, _ = local_shard(tensor)
    shard.copy_(whole[tuple(slice(first, first + n) for first, n in zip(offset, shard.shape))])
