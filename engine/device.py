"""What the machine can do: device and compute dtype, whether compiling pays, how much memory there
is."""
import ctypes
import math
import os
import platform
import re
import shutil

import torch

from configurator import BadInput

COMPILE_PAYS_AFTER = 300                # least remaining updates of a run on a CPU
MICRO_TOKENS_CPU = 8192                 # tokens per forward at most on a CPU; more is not faster
LOSS_BYTES = 4 * 2 ** 30                # of logits, at most: engine/ops.py, MAX_LOGITS, KEPT_LOGITS
USABLE = 0.9                            # of a GPU's memory: the rest is context, NCCL, fragments
# Peak bf16 FLOP/s (T4: float16) of a GPU by a word of its name: dense tensor-core peaks of NVIDIA's
# data sheets, from memory.
PEAK_FLOPS = {"T4": 65e12, "A100": 312e12, "A10": 125e12, "L40S": 362e12, "4090": 165e12,
              "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def pick_device(name):
    """Return the torch.device of --device. Raises BadInput if this machine does not have it."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise BadInput(f"--device={name}: this machine has {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput("--device=mps: not available on this machine")
    return device


def pick_dtype(name, device):
    """Return the compute dtype: as requested, else bfloat16 if the chip multiplies it, float16 if
    only that is fast, float32 otherwise."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        if major == 7:
            return torch.float16
        return torch.bfloat16 if major >= 8 else torch.float32
    if device.type == "cpu":
        probes = (f"_is_{unit}_supported" for unit in ("avx512_bf16", "amx_tile"))
        if any(getattr(torch.cpu, probe, bool)() for probe in probes):
            return torch.bfloat16
    return torch.float32


def tune_malloc():
    """Make glibc keep freed memory for the next step. By default it returns large buffers to the
    system, and the page faults of allocating them again cost a quarter of a CPU step (LOG.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6"), -1, -4            # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)


def peak_flops(device, say):
    """Return the peak FLOP/s of a GPU, for the utilization in metrics.jsonl; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for word, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{word}\b", name.replace("-", " ")):
            return flops
    say(f"mfu: not reported, the peak of {name!r} is not known here")
    return None


# ---- compile

def decide_compile(config, state, device, say):
    """Set state.compiled once per run. If torch.compile is switched off, say why."""
    if state.compiled is None:
        reason = reason_not_to_compile(config, state, device)
        state.compiled = reason is None
        if reason:
            say(f"compile: off, {reason}")
    if state.compiled:
        trust_compiler()


def trust_compiler():
    """Spare the check that the C++ compiler knows this CPU's vector instructions, which torch makes
    in each process: 6 s of the first start, 1 s of later ones. Compilers of C++17 know all but
    AMX."""
    from torch._inductor.config import cpp  # loads the compiler
    if cpp.vec_isa_ok is None and not torch.cpu._is_amx_tile_supported():
        cpp.vec_isa_ok = True


def reason_not_to_compile(config, state, device):
    """Return why torch.compile cannot work or would not pay for its compile time, or None."""
    if not config.compile:
        return "as requested"
    if device.type == "mps":
        return "not used on mps"
    if device.type == "cuda":
        recent = torch.cuda.get_device_capability(device)[0] >= 7
        return None if recent else "this GPU is too old for Triton"
    if state.max_steps is None and config.minutes < 1:
        return f"{config.minutes} minutes are too few to pay for it"
    if state.max_steps is not None and state.max_steps - state.step < COMPILE_PAYS_AFTER:
        return f"{state.max_steps - state.step} steps are too few to pay for it"
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"])):
        return "no C++ compiler here"
    return None


# ---- memory

def available_memory(device):
    """Return the free bytes of a GPU, or the machine's memory; infinite if the system does not
    say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf                                        # Windows


def training_bytes(model, shards=1):
    """Return the bytes of float32 parameters, gradients and AdamW's two moments on one process."""
    return 16 * model.n_params / shards


def activation_bytes(model, block_size, recompute):
    """Return about how many bytes autograd keeps per sequence, in 16-bit compute.

    Per block and token: the residual stream twice in float32 (8 C), the inputs of its matrices, q,
    k and v before and after RoPE and attention's output (16 C), and the SwiGLU's four tensors (8
    F). A recomputed block keeps its float32 input only.
    """
    C, F = model.n_embd, model.n_ff * (model.num_experts_per_tok if model.num_experts else 1)
    recomputed = len(range(0, model.n_layer, recompute)) if recompute else 0
    per_token = 4 * C * recomputed + (24 * C + 8 * F) * max(1, model.n_layer - recomputed)
    return per_token * block_size


def check_memory(model, device, shards=1):
    """Raise BadInput if the model, its gradients and AdamW's moments alone do not fit.

    shards: processes that the model is sharded over; on a CPU those of one machine share its
    memory.
    """
    needed, free = training_bytes(model, shards), available_memory(device)
    if device.type != "cuda":
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > free:
        raise BadInput(f"{model.n_params:,} parameters need {needed / 2**30:,.0f} GiB with their "
                       f"gradients and AdamW's moments; {device} has {free / 2**30:,.0f} GiB: take "
                       "a smaller model or a larger machine, or shard a copy over more processes "
                       "(--shard)")


def choose_micro_batch(model, config, batch, device, shards=None):
    """Return the sequences per forward: the largest divisor of a rank's batch that a CPU is fast
    with, or that by a plain estimate fits a GPU.

    shards: processes that FSDP shards a copy over; None: no FSDP, which holds gathered blocks and,
    between micro-steps, whole gradients beside the shards, even if there is only one
    """
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    if device.type != "cuda":
        fits = MICRO_TOKENS_CPU // config.block_size
    else:
        logits = batch * config.block_size * model.vocab_size
        free = USABLE * available_memory(device) - training_bytes(model, shards or 1)
        free -= min(LOSS_BYTES, 6 * logits)                # kept in 16 bits, a slice in float32
        if shards:                                         # gradients between micro-steps, blocks
            free -= (4 if config.reshard_after_forward else 6) * model.n_params
        fits = free // activation_bytes(model, config.block_size, config.recompute)
    return max(n for n in divisors if n <= max(1, fits))


def halve_until_it_fits(micro, attempt, say):
    """Call attempt(micro), halving micro as long as it runs out of memory. Returns the micro that
    fits.

    Raises BadInput if a single sequence does not fit.
    """
    while True:
        try:
            attempt(micro)
            return micro
        except torch.OutOfMemoryError:
            if micro == 1:
                raise out_of_memory() from None
            say(f"micro-batch: {micro} sequences do not fit in memory, trying {micro // 2}")
            micro //= 2
        torch.cuda.empty_cache()


def out_of_memory():
    """Return the BadInput of a step that ran out of GPU memory."""
    return BadInput("the GPU ran out of memory: lower --micro_batch_size, give --recompute=1, or "
                    "shard over more processes (--shard; python -m tools.plan says what fits)")
