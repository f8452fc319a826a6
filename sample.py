"""Generate text with a trained model, or chat with it.

    python sample.py                        the latest checkpoint of out/laptop, without a prompt
    python sample.py --ckpt=RUN_OR_CHECKPOINT --prompt="def " --num_samples=3
    python sample.py --chat=True            a conversation; an empty line or end of input ends it
"""
import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configurator import (
    BadInput,
    configure,
    exits_cleanly,
    must_be_positive,
    must_not_be_negative,
)
from data.tokenizer import chat_ids, load_for_model
from engine import checkpoint
from engine.device import pick_device
from model import MiniCPM


@dataclass
class SampleConfig:
    ckpt: str = "out/laptop"            # checkpoint, run folder (its latest), or released folder
    tokenizer: str | None = None        # unset: the checkpoint's own
    prompt: str | None = None           # text to continue; unset: the start of a document
    prompt_file: str | None = None      # UTF-8 file to continue
    chat: bool = False                  # True: a conversation through the chat template
    num_samples: int = 1                # generated in one batch
    max_new_tokens: int = 300
    temperature: float = 0.7            # 0: always the most likely token
    top_k: int | None = 50              # sample from the k most likely tokens; None: from all
    top_p: float | None = None          # sample from the fewest tokens whose probabilities sum to
                                        # top_p; None: from all
    seed: int = 1337                    # sample i uses seed + i
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # auto: as stored

    def problems(self):
        lines = must_be_positive(self, "num_samples max_new_tokens top_k")
        lines += must_not_be_negative(self, "temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            lines.append(f"--top_p={self.top_p}: must be above 0 and at most 1")
        prompted = self.prompt is not None or self.prompt_file is not None
        if self.prompt is not None and self.prompt_file is not None:
            lines.append("--prompt and --prompt_file: give only one of them")
        if self.chat and (prompted or self.num_samples > 1):
            lines.append("--chat: goes without --prompt, --prompt_file and --num_samples")
        return lines


def read_prompt(config):
    """Return the text to continue, or None. Raises BadInput if the file is empty or not UTF-8."""
    if config.prompt_file is None:
        return config.prompt
    try:
        text = Path(config.prompt_file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{config.prompt_file}: not UTF-8 "
                       f"(byte {error.object[error.start]:#04x} at {error.start})") from None
    if not text:
        raise BadInput(f"{config.prompt_file}: the prompt is empty")
    return text


def context_length(model):
    """Return how many tokens prompt and continuation may have together: what RoPE is set up for."""
    config = model.config
    scaled = config.rope_scaling in ("linear", "dynamic")
    return int(config.max_position * (config.rope_factor if scaled else 1))


def check_length(model, ids, config):
    """Raise BadInput if the prompt's ids and what is to be generated exceed the context."""
    if len(ids) + config.max_new_tokens > context_length(model):
        raise BadInput(f"a prompt of {len(ids)} tokens and "
                       f"--max_new_tokens={config.max_new_tokens} exceed the context of "
                       f"{context_length(model)} tokens")


def generate(model, tokenizer, prompts, config, seed):
    """Return an iterator over the new ids of B prompts, (B,) int64 per step."""
    # Never begin another document, unless the same token ends this one.
    return model.generate(prompts, config.max_new_tokens, config.temperature, config.top_k,
                          config.top_p, seed, tokenizer.stop_ids, [tokenizer.bos])


def stream(model, tokenizer, ids, config, seed):
    """Yield the text that continues one prompt, piece by piece, each of whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate(model, tokenizer, [ids], config, seed):
        if int(token) not in tokenizer.stop_ids:
            yield decoder.decode(tokenizer.decode_bytes([int(token)]))
    yield decoder.decode(b"", final=True)


def print_stream(parts):
    """Print pieces of text as they come; return the whole text."""
    text = ""
    for part in parts:
        print(part, end="", flush=True)
        text += part
    print()
    return text


def print_samples(model, tokenizer, ids, config, prompt):
    """Generate num_samples continuations of one prompt in a batch, then print them."""
    prompts = [ids] * config.num_samples
    steps = list(generate(model, tokenizer, prompts, config, config.seed))
    for number, row in enumerate(torch.stack(steps, dim=1).tolist(), 1):
        stops = [i for i, token in enumerate(row) if token in tokenizer.stop_ids]
        end = stops[0] if stops else len(row)
        print(f"--- sample {number}\n{prompt}{tokenizer.decode(row[:end])}")


def converse(model, tokenizer, config):
    """Hold a conversation on the terminal. Each answer depends on everything said before."""
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
        check_length(model, ids, config)
        parts = stream(model, tokenizer, ids, config, config.seed + len(messages))
        answer = print_stream(parts).strip()
        messages.append({"role": "assistant", "content": answer or "..."})


@exits_cleanly
def main(argv):
    (config,), _ = configure(argv, SampleConfig, usage=__doc__)
    prompt = read_prompt(config) or ""
    folder = checkpoint.resolve(config.ckpt)
    vocab_size = checkpoint.read_meta(folder)["model"]["vocab_size"]
    tokenizer = load_for_model(folder, config.tokenizer, vocab_size)
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model = MiniCPM.from_pretrained(folder, pick_device(config.device), dtype).eval()
    if config.chat:
        converse(model, tokenizer, config)
        return
    check_length(model, ids, config)
    if config.num_samples > 1:
        print_samples(model, tokenizer, ids, config, prompt)
        return
    print(prompt, end="")
    print_stream(stream(model, tokenizer, ids, config, config.seed))


if __name__ == "__main__":
    main()
