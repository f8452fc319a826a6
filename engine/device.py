"""What the machine can do: which device and compute dtype, whether compiling repays, how much memory is free."""
import ctypes
import math
import os
import platform
import re
import shutil

import torch

from configurator import BadInput

COMPILE_REPAYS = 300                        # updates that a run on a CPU must have ahead for compiling to pay
# bf16 FLOP/s of a GPU by a word of its name: dense tensor-core peaks of NVIDIA's data sheets, from memory (T4: float16).
PEAK_FLOPS = {"T4": 65e12, "A100": 312e12, "A10": 125e12, "L40S": 362e12, "4090": 165e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12,
              "B200": 2250e12}


def pick_device(name):
    """torch.device of --device; BadInput where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput("--device=mps: not available on this machine")
    return device


def pick_dtype(name, device):
    """Compute dtype: what was asked for, or bfloat16 where the chip multiplies it, float16 where only that is fast."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    if device.type == "cpu" and any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile")):
        return torch.bfloat16
    return torch.float32


def tune_malloc():
    """Have glibc keep freed memory for the next step. By default it gives large buffers back to the system every time, and
    the page faults of getting them again cost a quarter of a CPU step (LOG.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6"), -1, -4            # names of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)


def peak_flops(device, say):
    """FLOP/s that a GPU can do at best, for the utilisation in metrics.jsonl; None where its name is not known, which is said."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for word, flops in PEAK_FLOPS.items() if re.search(rf"\b{word}\b", name.replace("-", " "))), None)
    if peak is None:
        say(f"mfu: not reported, no peak is known here for {name!r}")
    return peak


def decide_compile(config, state, device, say):
    """Decide, once in a run, whether it is compiled; say why not."""
    if state.compiled is None:
        why_not = why_not_compile(config, state, device)
        state.compiled = why_not is None
        if why_not:
            say(f"compile: off, {why_not}")


def why_not_compile(config, state, device):
    """None where torch.compile will do good, else the reason against it."""
    if not config.compile:
        return "as asked"
    if device.type == "mps":
        return "not used on mps"
    if device.type == "cuda":
        return None if torch.cuda.get_device_capability(device)[0] >= 7 else "this GPU is too old for Triton"
    ahead = None if state.max_steps is None else state.max_steps - state.step
    if ahead is not None and ahead < COMPILE_REPAYS:
        return f"{ahead} steps are too few to repay it"
    if ahead is None and config.minutes < 1:
        return f"{config.minutes} minutes are too few to repay it"
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"])):
        return "no C++ compiler here"
    return None


def free_memory(device):
    """Bytes; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf                                                     # Windows
