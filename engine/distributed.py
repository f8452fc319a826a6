"""Many processes that train one model: the process group, the mesh, and what is done to the model
outside of model.py.

    torchrun --nproc_per_node=8 train.py config/minicpm_1b.py

torchrun starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE. The mesh is replicate x
shard: parameters, gradients and optimizer state are sharded over the `shard` ranks of a row, and
each of the `replicate` rows holds a full copy. replicate=1 is FSDP, shard=1 is data parallelism,
anything between is hybrid sharding, which keeps the all-gathers inside a node: the default on
several nodes (mesh_shape).

The rule for failures: a rank that fails says so in one line, tells the others through the store,
and exits at once. The others exit too, however they are blocked (exit_with_peers), and torchrun
ends who is left. What only rank 0 does stands in `if world.rank == 0:`; if the others need it, a
collective call follows, such as `world.barrier()`. What each rank finds out about its own machine
(memory, dtype, device) may differ, so it is compared or reduced before it is used.
"""
import atexit
import contextlib
import datetime
import functools
import math
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from configurator import BadInput, expected_error
from engine.device import pick_device

UNDER_TORCHRUN = "LOCAL_RANK" in os.environ
SECONDS_FOR_OTHERS = 3.0                # that a failed rank waits, so that rank 0 speaks first
POLL_SECONDS = 1.0                      # between two looks whether another rank has failed
FAILED = "failed rank"                  # key of the store
COMPILED_SHAPES = 64                    # most shapes that a block is compiled for
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting",
             "timeout", "NCCL", "Broken pipe")


@dataclass(frozen=True)
class World:
    """This process among those that train one model; World(device=...) is a process alone."""
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: object = None                 # DeviceMesh: see make_mesh; None: alone
    attempt: str = ""                   # the same on all ranks, and another one after every restart

    @property
    def alone(self):
        """Whether this process was started without torchrun, so that nothing is sharded."""
        return self.mesh is None

    @property
    def shards(self):
        """Number of processes that one copy of the model is sharded over."""
        return self.mesh.shape[-1] if self.mesh else 1

    @property
    def replicas(self):
        """Number of copies of the model."""
        return self.size // self.shards

    @property
    def shard_rank(self):
        """Which shard of a copy this process holds."""
        return self.rank % self.shards

    @property
    def replica_rank(self):
        """Which copy this process holds a shard of."""
        return self.rank // self.shards

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
    if not dist.is_initialized():  # several runs may follow in one process
        join_process_group(rank, size, cuda, config.timeout)
    attempt, per_node = World(size=size).from_rank0(
        (f"{os.getpid()}-{time.time_ns()}", int(os.environ["LOCAL_WORLD_SIZE"])))
    mesh = make_mesh(device.type, *mesh_shape(config, size, per_node))
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
    done = threading.Event()
    watcher = threading.Thread(target=exit_with_peers, args=(rank, done), daemon=True)
    watcher.start()
    atexit.register(leave_process_group, watcher, done)


def leave_process_group(watcher, done):
    """Leave the process group. gloo's threads hold the tensors of the last collective a moment
    longer; a thread that frees them while the interpreter ends would abort the process."""
    done.set()
    watcher.join(2 * POLL_SECONDS)
    dist.destroy_process_group()
    time.sleep(0.2)


def mesh_shape(config, size, per_node):
    """Return (replicate, shard) for `size` ranks, `per_node` of them on a node.

    An option left at 0 follows from the other. By default all ranks share one copy, and on several
    nodes those of a node, so that parameters are gathered inside of it. (Nodes with unequal numbers
    of ranks share one copy.) Raises BadInput if the options do not fit.
    """
    replicate, shard = config.replicate, config.shard
    if not replicate and not shard:
        shard = per_node if size % per_node == 0 else size
    replicate = replicate or size // shard
    shard = shard or size // replicate
    if replicate * shard != size:
        raise BadInput(f"--replicate={config.replicate} --shard={config.shard}: their product is "
                       f"not the number of processes, {size}")
    return replicate, shard


def make_mesh(device_type, replicate, shard):
    """Return the DeviceMesh replicate x shard. A single copy has one dimension, so that FSDP2 takes
    its plain path, without an all-reduce between copies."""
    from torch.distributed.device_mesh import init_device_mesh
    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


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
        if dist.is_initialized():
            tell_peers(rank)
        say_and_exit(rank, exit_code, message)


def tell_peers(rank):
    """Tell the others that this rank has failed; the first one that does counts."""
    with contextlib.suppress(dist.DistError):              # without a store the others end anyway
        dist.distributed_c10d._get_default_store().compare_set(FAILED, "", str(rank))


def exit_with_peers(rank, done):
    """Run in a thread: end this process soon after another rank has failed or the store is gone.

    The main thread may be blocked meanwhile, in a collective or waiting for files of that rank.
    torchrun would end it only 30 s after its SIGTERM, and on another node later. Returns once the
    event `done` is set.
    """
    store = dist.distributed_c10d._get_default_store().clone()     # the main thread may block in it
    while not done.wait(POLL_SECONDS):
        try:
            failed = f"rank {store.get(FAILED).decode()} failed" if store.check([FAILED]) else None
        except dist.DistError:
            failed = "no store"
        if failed and not done.wait(SECONDS_FOR_OTHERS):   # in which this rank may speak itself
            say_and_exit(rank, 4, f"lost contact with the other processes ({failed})")


def say_and_exit(rank, exit_code, message):
    """Print why this rank ends and end it at once, without what waits for other ranks or threads at
    the end of a process."""
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
    """Raise BadInput on a rank that has other values (a dict) than rank 0."""
    expected = world.from_rank0(values)
    different = [f"{name} is {values[name]} and there {expected.get(name)}"
                 for name in sorted(values) if values[name] != expected.get(name)]
    if different:
        raise BadInput(f"has another configuration than rank 0: {', '.join(different)}")


# ---- what is done to the model, in this order

def distribute(model, config, mesh, dtype, compiled):
    """Shard a model that is still on the meta device: activation checkpointing, compile, FSDP2.

    All blocks share what is compiled: one graph per shape, and one more for the blocks that
    recompute. Dense blocks must compile whole: a graph break, or more than COMPILED_SHAPES shapes,
    is an error and does not silently make them eager.
    Blocks are gathered and used in `dtype`, their gradients are reduced in float32. The embedding,
    the head and the last norm stay float32: their gradients are sums over many tokens, and model.py
    casts where it multiplies with them, so that one process and many compute by the same rule.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if config.recompute:
        recompute_blocks(model, config.recompute)
    if compiled:
        torch._dynamo.config.recompile_limit = COMPILED_SHAPES
        fullgraph = not model.config.num_experts or dtype == torch.bfloat16    # ops.grouped_linear
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=fullgraph)
    policy = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float32,
                               cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy(param_dtype=dtype),
                    reshard_after_forward=config.reshard_after_forward,
                    shard_placement_fn=shard_dimension)
    fully_shard(model, mesh=mesh, mp_policy=policy())


def recompute_blocks(model, every):
    """Activation checkpointing: every n-th block keeps only its input, and runs again in the
    backward pass."""
    for block in model.blocks[::every]:
        block.forward = recomputed(block.forward)


def recomputed(forward):
    """Return a function that calls forward and keeps only its inputs for the backward pass.

    It is a Python function because Dynamo compiles those: a functools.partial of checkpoint is
    skipped, with the whole block.
    """
    from torch.utils.checkpoint import checkpoint

    def keep_inputs(*args):
        return checkpoint(forward, *args, use_reentrant=False)
    return keep_inputs


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
