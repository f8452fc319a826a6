"""nanoGPT and transformers in our shapes, for tools/bench.py to time beside ours.

nanoGPT comes from a checkout of karpathy/nanoGPT: its model.py with its own feed-forward and
optimizer. transformers is its Granite, the architecture that our exports have. In float32 they run
as they are; bfloat16 means autocast and torch.compile in training, bfloat16 weights in decoding.
"""
import contextlib
import functools
import importlib.util
import io
import sys
from pathlib import Path

import torch

from configurator import BadInput

LEARNING_RATE = 1e-3                    # ours is muP's; with this one their weights stay finite


def load_nanogpt(folder, shape, length):
    """Return nanoGPT's model for sequences of `length` tokens. It knows no cache."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder, "model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                         # its dataclass needs it
    with contextlib.redirect_stdout(io.StringIO()):         # it prints its size
        spec.loader.exec_module(module)
        return module.GPT(module.GPTConfig(
            block_size=length, vocab_size=shape.vocab_size, n_layer=shape.n_layer,
            n_head=shape.n_head, n_embd=shape.n_embd, dropout=0.0, bias=False))


def load_granite(shape, length):
    """Return transformers' Granite for sequences of `length` tokens."""
    try:
        from transformers import GraniteConfig, GraniteForCausalLM  # slow to import
    except ImportError:
        raise BadInput("--compare: needs transformers: pip install transformers") from None
    return GraniteForCausalLM(GraniteConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.n_embd, intermediate_size=shape.n_ff,
        num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=length,
        tie_word_embeddings=shape.tie_word_embeddings, bos_token_id=None, eos_token_id=None))


def nanogpt_loss(model, idx, targets):
    return model(idx, targets)[1]


def granite_loss(model, idx, targets):
    logits = model(input_ids=idx, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def load_trainer(name, folder, config, shape, device):
    """Return a peer's (model, optimizer, loss): loss(forward, idx, targets) is a scalar."""
    betas = config.beta1, config.beta2
    if name == "nanogpt":
        model = load_nanogpt(folder, shape, config.block_size).to(device)
        optimizer = model.configure_optimizers(config.weight_decay, LEARNING_RATE, betas,
                                               device.type)
        return model, optimizer, nanogpt_loss
    model = load_granite(shape, config.block_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas, fused=True,
                                  weight_decay=config.weight_decay)
    return model, optimizer, granite_loss


def load_decoder(name, folder, shape, device, dtype, length):
    """Return a peer's number of parameters and generate(prompts (B, T), number of new tokens),
    which draws from the 50 most likely; prompts and new tokens are `length` tokens at most."""
    if name == "nanogpt":
        model = load_nanogpt(folder, shape, length).to(device, dtype).eval()
        generate = functools.partial(model.generate, top_k=50)
    else:
        model = load_granite(shape, length).to(device, dtype).eval()
        generate = functools.partial(generate_with_granite, model)
    return sum(p.numel() for p in model.parameters()), generate


def generate_with_granite(model, prompts, n):
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                          top_k=50, min_new_tokens=n, max_new_tokens=n, pad_token_id=0)
