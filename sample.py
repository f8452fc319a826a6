"""Generate text with a trained model.

    python sample.py                                       from the latest checkpoint of out/laptop
    python sample.py --ckpt=RUN_OR_CHECKPOINT --prompt="def " --num_samples=3
    python sample.py --chat=True                           a conversation; an empty line or end of input ends it
"""
import codecs
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configurator import BadInput, configure, exits_cleanly
from data.tokenizer import chat_ids, load_for_model
from engine import checkpoint
from engine.device import pick_device
from model import MiniCPM


@dataclass
class SampleConfig:
    ckpt: str = "out/laptop"            # checkpoint, run folder (its latest), or the folder of a released model
    tokenizer: str | None = None        # unset: the checkpoint's own
    prompt: str | None = None           # text to continue; unset: from the start of a document
    prompt_file: str | None = None      # a UTF-8 file to continue
    chat: bool = False                  # True: a conversation through the chat template
    num_samples: int = 1                # in one batch
    max_new_tokens: int = 300
    temperature: float = 0.7            # 0: always the likeliest token
    top_k: int | None = 50              # keep the k likeliest tokens; None: all
    top_p: float | None = None          # keep the fewest tokens whose probability reaches p; None: all
    seed: int = 1337                    # sample i draws from seed + i
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # auto: as stored

    def problems(self):
        out = [f"--{name}={getattr(self, name)}: must be above 0" for name in ("num_samples", "max_new_tokens", "top_k")
               if getattr(self, name) is not None and getattr(self, name) <= 0]
        if self.temperature < 0:
            out.append(f"--temperature={self.temperature}: must not be negative")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            out.append(f"--top_p={self.top_p}: must be above 0 and at most 1")
        if self.prompt is not None and self.prompt_file is not None:
            out.append("--prompt and --prompt_file: give one of them")
        if self.chat and (self.prompt is not None or self.prompt_file is not None or self.num_samples > 1):
            out.append("--chat: asks for its input, and has one sample")
        return out


def read_prompt(config):
    """Text of the prompt, or None; BadInput where it is empty or not UTF-8."""
    if config.prompt_file is None:
        return config.prompt
    try:
        text = Path(config.prompt_file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{config.prompt_file}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})") from None
    if not text:
        raise BadInput(f"{config.prompt_file}: the prompt is empty")
    return text


def context_length(model):
    """Tokens that prompt and continuation may have together: what RoPE was set up for."""
    config = model.config
    return int(config.max_position * (config.rope_factor if config.rope_scaling in ("linear", "dynamic") else 1))


def stream(model, tokenizer, ids, config, seed):
    """Yield the text that continues ids as it comes, never half a character; one sample, up to the end of its text."""
    check_length(model, ids, config)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in model.generate([ids], config.max_new_tokens, config.temperature, config.top_k, config.top_p, seed,
                                tokenizer.stop_ids, [tokenizer.bos]):
        if int(token) not in tokenizer.stop_ids:
            yield decoder.decode(tokenizer.decode_bytes([int(token)]))
    yield decoder.decode(b"", final=True)


def check_length(model, ids, config):
    if len(ids) + config.max_new_tokens > context_length(model):
        raise BadInput(f"a prompt of {len(ids)} tokens and --max_new_tokens={config.max_new_tokens} exceed the context of "
                       f"{context_length(model)} tokens")


def converse(model, tokenizer, config):
    """A conversation on the terminal: each answer sees all that was said."""
    messages = []
    while True:
        try:
            said = input("you> ")
        except EOFError:
            return
        if not said.strip():
            return
        messages.append({"role": "user", "content": said})
        ids, _ = chat_ids(tokenizer, messages, generate=True)
        answer = []
        for text in stream(model, tokenizer, ids, config, config.seed + len(messages)):
            print(text, end="", flush=True)
            answer.append(text)
        print()
        messages.append({"role": "assistant", "content": "".join(answer).strip() or "..."})


@exits_cleanly
def main(argv):
    (config,), _ = configure(argv, SampleConfig, usage=__doc__)
    if sys.stdout.encoding.lower().replace("-", "") != "utf8":
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    text = read_prompt(config)
    folder = checkpoint.resolve(config.ckpt)
    tokenizer = load_for_model(folder, config.tokenizer, checkpoint.read_meta(folder)["model"]["vocab_size"])
    ids = [tokenizer.bos] + (tokenizer.encode(text) if text else [])
    model = MiniCPM.from_pretrained(folder, pick_device(config.device), None if config.dtype == "auto" else getattr(torch, config.dtype))
    if config.chat:
        return converse(model.eval(), tokenizer, config)
    check_length(model, ids, config)
    if config.num_samples == 1:
        print(text or "", end="")
        for part in stream(model.eval(), tokenizer, ids, config, config.seed):
            print(part, end="", flush=True)
        print()
        return
    rows = torch.stack(list(model.eval().generate([ids] * config.num_samples, config.max_new_tokens, config.temperature, config.top_k,
                                                  config.top_p, config.seed, tokenizer.stop_ids, [tokenizer.bos])), dim=1).tolist()
    for number, row in enumerate(rows, 1):
        end = next((i for i, token in enumerate(row) if token in tokenizer.stop_ids), len(row))
        print(f"--- sample {number}\n{text or ''}{tokenizer.decode(row[:end])}")


if __name__ == "__main__":
    main()
