"""Text to token ids and back: load a tokenizer, apply its chat template, train one.

    python -m data.tokenizer train --input=PATH --vocab_size=4096 --out_dir=out/mine

Use the result with --tokenizer=out/mine. Our own tokenizers are byte pair encodings run by
tiktoken: a pattern cuts text into pieces, byte pairs are merged inside each piece in order of rank,
and special tokens have the last ids of the vocabulary. Tokenizers of released models are run by
transformers. With both, ordinary text never becomes a special token.

The default, data/bpe4096.tiktoken, is the tokenizer.tiktoken that this command wrote (10 s; torch
2.13.0, rustbpe 0.1.0; held-out documents not included):

    python -m data.tokenizer train --input=pytorch,plays,speeches --vocab_size=4096 \
        --out_dir=out/bpe_laptop
"""
import base64
import difflib
import functools
import hashlib
import importlib
import itertools
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from configurator import ROOT, BadInput, configure, exits_cleanly, refuse_lfs_pointer
from data.files import TEXT_SUFFIXES, find_files, read_texts

BUILT_IN = ("bpe4096", "bytes", "gpt2", "cl100k_base")
SPECIALS = ("<s>", "</s>", "<用户>", "<AI>", "<|im_start|>", "<|im_end|>",
            "<|reserved_0|>", "<|reserved_1|>")
# GPT-4's pattern with possessive quantifiers, as in tiktoken: no backtracking on a megabyte of
# spaces.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
# Byte-level vocabularies write each byte as a letter: printable bytes as themselves, the others as
# U+0100 onwards (GPT-2).
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
UNPRINTABLE = sorted({*range(256)} - {*PRINTABLE})
BYTE_LETTERS = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(UNPRINTABLE)}

# Any of these makes a folder a tokenizer: the first is ours, transformers reads the others.
TOKENIZER_FILES = ("tokenizer.tiktoken", "tokenizer.json", "tokenizer.model", "vocab.json")
# What is fetched from a model on the hub: all but weights and code.
HUB_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
NEEDS_TRANSFORMERS = "a released tokenizer needs transformers: pip install transformers"
# Part of the hash of a released tokenizer: with one vocabulary, two may still cut text differently.
PROBE = " Hello  World's\r\n\n\tdéjà-vu 1234567 <s>漢字。😀\u2028 x"


class Tokenizer:
    """A byte pair encoding, run by tiktoken.

    name        names the folder of its corpora, data/CORPUS/NAME
    n_vocab     number of ids
    hash        sha256 of all that decides what ids mean, so not of the name
    bos, eos    ids that begin and end a document
    stop_ids    list of the ids that end generation
    specials    {text: id} of the special tokens
    bytes_of    {id: bytes} that the ids stand for
    """

    def __init__(self, name, pattern, ranks, specials):
        """ranks: {bytes: id}, ids in merge order; specials: {text: id}."""
        self.name, self.pattern, self.ranks, self.specials = name, pattern, ranks, specials
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=specials)
        self.n_vocab = self.encoding.n_vocab
        self.hash = fingerprint(pattern, rank_lines(ranks), sorted(specials.items()))
        self.bos = specials["<s>" if "<s>" in specials else "<|endoftext|>"]
        self.eos = specials["</s>" if "</s>" in specials else "<|endoftext|>"]
        self.stop_ids = [self.eos]
        self.bytes_of = {i: token for token, i in ranks.items()}
        self.bytes_of |= {i: text.encode("utf-8") for text, i in specials.items()}

    def encode(self, text):
        """Return the ids of a text, a list of int. Raises BadInput if the text is not UTF-8."""
        return self.encoding.encode_ordinary(check_utf8(text))

    def encode_batch(self, texts):
        """Return one list of ids per text, computed by threads."""
        texts = [check_utf8(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids):
        """Return the bytes that ids stand for.

        Ids without a token give U+FFFD: a model's vocabulary may be larger than its tokenizer's.
        """
        return b"".join(self.bytes_of.get(int(i), b"\xef\xbf\xbd") for i in ids)

    def decode(self, ids):
        """Return the text of ids. Bytes that are not UTF-8, as of half a character, give U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """Return the number of bytes per id: (n_vocab,) int64, 0 for special and unused ids."""
        sizes = np.zeros(self.n_vocab, np.int64)
        for i, token in self.bytes_of.items():
            sizes[i] = len(token)
        sizes[list(self.specials.values())] = 0
        return sizes

    def special(self, text):
        """Return the id of a special token. Raises BadInput if the tokenizer does not have it."""
        if text not in self.specials:
            raise BadInput(f"tokenizer {self.name!r} has no special token {text}; "
                           f"it has {', '.join(self.specials)}")
        return self.specials[text]

    def save(self, folder):
        """Write all that load_tokenizer(folder) needs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"name": self.name, "pattern": self.pattern, "specials": self.specials,
                 "hash": self.hash}
        config = json.dumps(about, indent=1, ensure_ascii=False)
        (folder / "tokenizer.tiktoken").write_bytes(rank_lines(self.ranks).encode("utf-8"))
        (folder / "tokenizer_config.json").write_bytes(config.encode("utf-8"))


class ReleasedTokenizer(Tokenizer):
    """The tokenizer of a released model, run by transformers.

    Special tokens are the ones marked as special; other added tokens, such as <think>, are ordinary
    vocabulary: text has their ids, and their bytes count. bos is eos if the folder names no
    beginning-of-text token. The token that the chat template writes after an answer ends generation
    too, whether or not the folder says so.
    """

    def __init__(self, folder, hf, name):
        """folder: where it comes from; hf: the fast tokenizer of transformers."""
        self.hf, self.name = hf, name
        saved, vocab, added = hf.init_kwargs, hf.get_vocab(), hf.added_tokens_decoder
        self.n_vocab = max(vocab.values()) + 1
        self.eos = hf.eos_token_id
        self.bos = self.eos if hf.bos_token is None else hf.bos_token_id
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self.stop_ids = sorted({self.eos, *saved.get("stop_ids", ()), *configured_eos_ids(folder),
                                *answer_end_ids(hf)})
        self.stop_texts = tuple(token.content for i, token in added.items() if i in self.stop_ids)
        backend = hf.backend_tokenizer
        byte_level = "ByteLevel" in f"{backend.pre_tokenizer!r} {backend.decoder!r}"
        self.bytes_of = {i: piece_bytes(piece, byte_level) for piece, i in vocab.items()
                         if i not in added}
        self.bytes_of |= {i: token.content.encode("utf-8") for i, token in added.items()}
        self.hash = fingerprint(sorted(vocab.items()), self.bos, self.eos, self.encode(PROBE))
        model = folder / "tokenizer.model"                      # needed by llama.cpp's converter
        self.sentencepiece = model.read_bytes() if model.is_file() else None

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        if not texts:
            return []                                           # on which transformers fails
        return self.hf([check_utf8(text) for text in texts], add_special_tokens=False,
                       split_special_tokens=True, verbose=False)["input_ids"]

    def save(self, folder):
        self.hf.init_kwargs |= {"name": self.name, "stop_ids": self.stop_ids,
                                "tokenizer_hash": self.hash}    # go to tokenizer_config.json
        self.hf.save_pretrained(folder)
        if self.sentencepiece:
            (Path(folder) / "tokenizer.model").write_bytes(self.sentencepiece)


def configured_eos_ids(folder):
    """Return all ids at which a released model ends, from the config files of its folder."""
    ids = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ids += [value] if isinstance(value, int) else value or []
    return ids


def answer_end_ids(hf):
    """Return [id] of the added token that a released tokenizer's chat template writes after an
    answer, [] if there is none."""
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = hf.apply_chat_template(talk, tokenize=False)
    except Exception:                       # chat_ids says it when it is given a conversation
        return []
    rest = text.rpartition("answer")[2]
    found = [(rest.index(token.content), i) for i, token in hf.added_tokens_decoder.items()
             if token.content in rest]
    return [min(found)[1]] if found else []


def piece_bytes(piece, byte_level):
    """Return the bytes that a piece of a released vocabulary stands for.

    Byte-level vocabularies use BYTE_LETTERS (a piece with other letters is a mark, and stands for
    itself); SentencePiece writes a space as U+2581 and a single byte as <0xFF>.
    """
    if byte_level and BYTE_LETTERS.keys() >= {*piece}:
        return bytes(BYTE_LETTERS[letter] for letter in piece)
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")


def check_utf8(text):
    """Return the text. Raises BadInput if it has lone surrogates, which a command line that is not
    UTF-8 gives, and which tokenizers would silently replace."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])       # Python reads a stray byte as U+DC00 + byte
        byte = f" (the byte {code - 0xDC00:#04x})" if 0xDC80 <= code <= 0xDCFF else ""
        raise BadInput(f"text is not valid UTF-8: character {error.start} is the lone surrogate "
                       f"{ascii(text[error.start])}{byte}") from None
    return text


def fingerprint(*parts):
    """Return the sha256, in hex, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def rank_lines(ranks):
    """Return the text of a .tiktoken file: one line 'base64 id' per token, in merge order."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in in_order)


def read_ranks(path):
    """Return {bytes: id} of a .tiktoken file. Raises ValueError if it is something else."""
    pairs = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {base64.b64decode(token, validate=True): int(i) for token, i in pairs}


def with_specials(name, ranks):
    """Return a Tokenizer of these ranks with the project's pattern and special tokens."""
    specials = {text: len(ranks) + i for i, text in enumerate(SPECIALS)}
    return Tokenizer(name, PATTERN, ranks, specials)


# ---- loading

def load_tokenizer(name):
    """Return a Tokenizer.

    name    one of BUILT_IN; a folder (written by train, of a checkpoint, of a released model),
            relative to the current folder or to the project; or the name of a model on the Hugging
            Face hub, such as openbmb/MiniCPM-1B-sft-bf16
    raises  BadInput if there is no such tokenizer, its files are damaged, or a package is missing
    """
    if name in ("gpt2", "cl100k_base"):
        return load_tiktoken(name)
    if name == "bytes":
        return with_specials(name, {bytes([i]): i for i in range(256)})
    if name == "bpe4096":
        return with_specials(name, read_ranks(ROOT / "data" / "bpe4096.tiktoken"))
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return load_folder(folder)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return load_folder(download(name), Path(name).name)
    near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise BadInput(f"no tokenizer {name!r}{hint} Choices: {', '.join(BUILT_IN)}, a folder written "
                   "by python -m data.tokenizer train, a released model's folder or hub name")


def load_tiktoken(name):
    """Return one of tiktoken's own encodings. Raises BadInput if it can't be downloaded."""
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:                                  # its HTTP client raises many kinds
        raise BadInput(f"tokenizer {name!r}: tiktoken has no copy and could not download one "
                       f"({type(error).__name__}); it needs a network once, bpe4096 and bytes "
                       "need none") from None
    return Tokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def download(name):
    """Return the local folder with the tokenizer files of a model on the hub, cached there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BadInput(f"tokenizer {name!r}: there is no such folder; if it is a name on the hub: "
                       + NEEDS_TRANSFORMERS) from None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:                                  # its HTTP client raises many kinds
        raise BadInput(f"tokenizer {name!r}: there is no such folder, and the Hugging Face hub did "
                       "not give it; check the name and the network "
                       f"({first_line(error)})") from None


def load_folder(folder, name=None):
    """Return the Tokenizer of a folder. Raises BadInput if there is none or its files are damaged.

    name: the name of a released tokenizer; unset: the one that was saved with it, or the folder's.
    """
    if not has_tokenizer(folder):
        raise BadInput(f"{folder}: holds no tokenizer ({' or '.join(TOKENIZER_FILES)} is missing)")
    for pattern in ("tokenizer.tiktoken", *HUB_FILES):
        for path in filter(Path.is_file, folder.glob(pattern)):
            refuse_lfs_pointer(path)
    try:
        if (folder / "tokenizer.tiktoken").is_file():
            return load_own(folder)
        return load_released(folder, name)
    except BadInput:
        raise
    except Exception as error:                                  # tokenizers raises plain Exceptions
        raise BadInput(f"{folder}: damaged tokenizer: {first_line(error)}") from None


def load_own(folder):
    """Return the tiktoken Tokenizer that was saved in a folder."""
    about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    pattern, specials = about["pattern"], about["specials"]
    ranks = read_ranks(folder / "tokenizer.tiktoken")
    # Checked before tiktoken sees the ranks: it crashes on inconsistent ones.
    check_hash(fingerprint(pattern, rank_lines(ranks), sorted(specials.items())), about["hash"])
    return Tokenizer(about["name"], pattern, ranks, specials)


def load_released(folder, name):
    """Return the ReleasedTokenizer of a folder. No network is used, and no code from the folder."""
    try:
        import transformers
    except ImportError:
        raise BadInput(NEEDS_TRANSFORMERS) from None
    transformers.logging.set_verbosity_error()                  # what matters is raised
    warnings.filterwarnings("ignore", module="transformers")
    try:
        hf = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                        trust_remote_code=False)
        if isinstance(hf, transformers.LlamaTokenizerFast):
            # MiniCPM's folders name this class, which puts a space before every text, although
            # their vocabulary wants none. The general class does as the vocabulary says.
            hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        if (folder / "tokenizer.json").is_file():
            raise
        raise BadInput(f"{folder}: could not be converted ({first_line(error)}); a tokenizer.model "
                       "needs pip install -U transformers sentencepiece protobuf") from None
    if not hf.is_fast:
        raise BadInput(f"{folder}: {type(hf).__name__} is not a fast tokenizer, so it cannot say "
                       "which characters a token stands for")
    if hf.eos_token is None:
        raise BadInput(f"{folder}: tokenizer_config.json names no eos_token, which ends texts and "
                       "answers; name it there")
    name = name or hf.init_kwargs.get("name") or folder.resolve().name
    tokenizer = ReleasedTokenizer(folder, hf, name)
    check_hash(tokenizer.hash, hf.init_kwargs.get("tokenizer_hash", tokenizer.hash))
    return tokenizer


def check_hash(found, saved):
    """Raise ValueError if a tokenizer is not the one that was saved."""
    if found != saved:
        raise ValueError(f"its hash is {found[:12]}, not {str(saved)[:12]}")


def first_line(error):
    """Return the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def load_for_model(folder, name, vocab_size):
    """Return the tokenizer of a checkpoint or released folder, or the one called name instead.

    Raises BadInput if there is none, or if it has more ids than the model's vocabulary.
    """
    if name is None and not has_tokenizer(folder):
        raise BadInput(f"{folder}: holds no tokenizer; name one with --tokenizer "
                       f"(a folder, a hub name, or {', '.join(BUILT_IN)})")
    tokenizer = load_tokenizer(name or str(folder))
    if tokenizer.n_vocab > vocab_size:
        raise BadInput(f"{folder}: tokenizer {tokenizer.name!r} has {tokenizer.n_vocab} tokens, "
                       f"the model's vocabulary only {vocab_size}")
    return tokenizer


def has_tokenizer(folder):
    """Return whether a folder holds a tokenizer."""
    return any((Path(folder) / file).is_file() for file in TOKENIZER_FILES)


# ---- chat

def chat_ids(tokenizer, messages, generate=False):
    """Return the ids of a conversation and which of them the model learns to predict.

    The ids are those of the whole text that the template makes of the conversation, in training as
    in generation. So the ids of a prompt, followed by the answer and the token that ends it, begin
    the ids of every longer conversation, as far as the template allows.

    Our tokenizers follow the template of the released MiniCPM models, except that every answer
    ends: <s>, then <用户>text<AI> for a user, text</s> for the assistant, and a system's text as it
    is. tools/convert.py exports it as CHAT_TEMPLATE. Released tokenizers follow their own template.
    With both, a message that spells a special token is encoded as ordinary text.

    messages  [{"role": "user" | "assistant" | "system", "content": text}]
    generate  True: ids for an answer to follow, so the last message must be a user's
    returns   (ids, answer_mask), lists of one length: answer_mask is True for the tokens of the
              assistant's answers, each with the token that ends it (one of tokenizer.stop_ids) and
              nothing after it. A template may leave earlier answers without such a token
    raises    BadInput if a message cannot be used or the template fails
    """
    for n, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise BadInput(f"chat message {n}: its content is empty")
        if role not in ("user", "assistant", "system"):
            raise BadInput(f"chat message {n}: role is user, assistant or system, not {role!r}")
        check_utf8(content)
    if generate and (not messages or messages[-1]["role"] != "user"):
        raise BadInput("chat: the last message must be the user's for the assistant to answer")
    if isinstance(tokenizer, ReleasedTokenizer):
        return template_ids(tokenizer, messages, generate)
    return own_template_ids(tokenizer, messages)


def own_template_ids(tokenizer, messages):
    """Return (ids, answer_mask) by our template.

    A special token always cuts the text, so the texts between two of them are encoded together.
    """
    user, answer = tokenizer.special("<用户>"), tokenizer.special("<AI>")
    parts = [(tokenizer.bos, False)]        # (special token or text, whether it is learned)
    for message in messages:
        text = message["content"].strip()
        if message["role"] == "user":
            parts += [(user, False), (text, False), (answer, False)]
        elif message["role"] == "assistant":
            parts += [(text, True), (tokenizer.eos, True)]
        else:
            parts.append((text, False))
    ids, mask = [], []
    for is_text, group in itertools.groupby(parts, lambda part: isinstance(part[0], str)):
        found, learned = zip(*group)
        if is_text:                         # system messages, and an answer if it follows directly
            before = "".join(text for text, learn in zip(found, learned) if not learn)
            found = tokenizer.encode("".join(found))
            ends = np.cumsum([len(tokenizer.bytes_of[i]) for i in found])
            learned = (ends > len(before.encode("utf-8"))).tolist()
        ids += found
        mask += learned
    return ids, mask


def template_ids(tokenizer, messages, generate):
    """Return (ids, answer_mask) by a released tokenizer's template, as apply_chat_template has it.

    What is added: bos in front unless the template writes it (or there is none), and eos at the end
    unless the last answer ends with a stop token. What differs: a message that spells a special
    token is encoded as ordinary text.
    """
    said = "".join(message["content"] for message in messages)
    # A character that breaks up the names of special tokens in messages: a private one, not used.
    gap = next(char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in said)
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    messages = [{**message, "content": break_specials(tokenizer, message["content"], gap)}
                for message in plain]
    text = render(tokenizer, messages, generate)
    if messages != plain and text.replace(gap, "") != render(tokenizer, plain, generate):
        raise BadInput(f"tokenizer {tokenizer.name!r}: its chat template looks for a special token "
                       "that a message spells, so the message cannot be encoded as ordinary text")
    spans = [] if generate else answer_spans(tokenizer, messages, text)
    encoded = tokenizer.hf(text, add_special_tokens=False, split_special_tokens=False,
                           return_offsets_mapping=True, verbose=False)
    ids, offsets = np.array(encoded["input_ids"]), encoded["offset_mapping"]
    mask = learned_tokens(tokenizer, ids, offsets, spans)
    keep = np.array([text[start:end] != gap for start, end in offsets])
    ids, mask = ids[keep].tolist(), mask[keep].tolist()
    if spans and messages[-1]["role"] == "assistant":
        if not text[:spans[-1][1]].endswith(tokenizer.stop_texts):
            ids, mask = [*ids, tokenizer.eos], [*mask, True]
    if tokenizer.hf.bos_token is not None and ids[:1] != [tokenizer.bos]:
        ids, mask = [tokenizer.bos, *ids], [False, *mask]
    return ids, mask


def break_specials(tokenizer, content, gap):
    """Return a text with `gap` after the first character of every special token's name in it."""
    for name in {*tokenizer.specials, *tokenizer.stop_texts}:
        content = content.replace(name, name[0] + gap + name[1:])
    return content


def answer_spans(tokenizer, messages, text):
    """Return the (first, last) character of each answer in the rendered text of a conversation.

    An answer is what follows the prompt that generation would get, up to and with the first stop
    token, or else to the end of the turn. last is exclusive. An earlier answer that the template
    writes differently once other turns follow (without its reasoning, say) is not what generation
    gives, so it has no span, and a line says so. Raises BadInput if this happens to the last
    message, or if the template leaves out part of an answer.
    """
    spans, name = [], f"tokenizer {tokenizer.name!r}"
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:n], True) if n else ""
        answered = render(tokenizer, messages[:n + 1], False)
        turn = answered.removeprefix(prompt)
        if not all(word in turn for word in message["content"].split()):
            raise BadInput(f"{name}: its chat template leaves out all or part of the answer in "
                           f"chat message {n + 1}")
        ends = [turn.index(stop) + len(stop) for stop in tokenizer.stop_texts if stop in turn]
        last = len(prompt) + min(ends, default=len(turn))
        if not (answered.startswith(prompt) and text.startswith(answered[:last])):
            if n + 1 == len(messages):
                raise BadInput(f"{name}: its chat template writes a conversation differently for "
                               "training than for generation, so the answer cannot be located")
            say_once(f"{name}: its chat template writes earlier answers differently from the last "
                     "one; they are context, and only the last one is learned")
            continue
        if not ends:                        # it may end only once other turns follow
            last += next((len(s) for s in tokenizer.stop_texts if text.startswith(s, last)), 0)
        spans.append((len(prompt), last))
    return spans


def learned_tokens(tokenizer, ids, offsets, spans):
    """Return a bool array (n,): which tokens of a rendered text belong to an answer.

    ids, offsets  of its tokens: (n,), and n pairs of characters (start, end)
    spans         (first, last) character of each answer
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    special, mask = np.isin(ids, list(tokenizer.specials.values())), np.zeros(len(ids), bool)
    for first, last in spans:
        inside = (starts < last) & (ends > first)
        # A special token may have taken in spaces after it. Another token may share its characters
        # with the prompt, and with what follows an answer without an end mark.
        inside &= np.where(special, starts >= first, ends <= last)
        if (inside & (starts < first)).any():
            say_once(f"tokenizer {tokenizer.name!r}: the last characters of its chat template's "
                     "prompt and the first of an answer share a token, so answers begin "
                     "differently in training and in generation")
        mask |= inside
    return mask


def render(tokenizer, messages, generate):
    """Return the text of a conversation by a released tokenizer's template."""
    try:
        return tokenizer.hf.apply_chat_template(messages, tokenize=False,
                                                add_generation_prompt=generate)
    except Exception as error:                                  # a template may raise anything
        raise BadInput(f"tokenizer {tokenizer.name!r}: its chat template fails or is missing: "
                       f"{first_line(error)}") from None


@functools.cache
def say_once(line):
    """Print a line to standard error, only the first time."""
    print(line, file=sys.stderr)


# ---- training

@dataclass
class TrainOptions:
    input: str = "pytorch,plays,speeches"   # these corpora, or .txt, .md, .jsonl and .parquet
                                            # files or folders of them, separated by commas
    vocab_size: int = 4096                  # all ids: 256 bytes, the merges, and 8 special tokens
    out_dir: str = "out/tokenizer"          # folder to write; its last part names the tokenizer
    overwrite: bool = False                 # replace the tokenizer in out_dir

    def problems(self):
        lines, name = [], Path(self.out_dir).name
        if not 264 < self.vocab_size <= 2 ** 20:
            lines.append(f"--vocab_size={self.vocab_size}: must be above 264 (256 bytes and 8 "
                         f"special tokens) and at most {2 ** 20}")
        if name in BUILT_IN or not re.fullmatch(r"[\w-][\w.-]*", name):
            lines.append(f"--out_dir={self.out_dir}: its last part names the tokenizer: letters, "
                         f"digits, '_', '-', '.', and none of {', '.join(BUILT_IN)}")
        return lines


def training_texts(source):
    """Yield the texts of a source: the train split of a shipped corpus, or the files of a path."""
    if source in ("pytorch", "plays", "speeches"):
        corpus = importlib.import_module(f"data.{source}.prepare")
        yield from (text for split, text in corpus.documents() if split == "train")
        return
    for file in find_files(source, TEXT_SUFFIXES):
        yield from read_texts(file)


def train(name, texts, vocab_size):
    """Return a Tokenizer with merges trained on an iterable of texts.

    Raises BadInput if rustbpe is missing or the texts have too few pairs.
    """
    try:
        import rustbpe
    except ImportError:
        raise BadInput("training a tokenizer needs rustbpe: pip install rustbpe") from None
    n_ranks = vocab_size - len(SPECIALS)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), n_ranks, pattern=PATTERN)
    ranks = {bytes(token): i for token, i in trainer.get_mergeable_ranks()}
    if len(ranks) != n_ranks:
        raise BadInput(f"too little text for {vocab_size} tokens: it gives "
                       f"{len(ranks) + len(SPECIALS)}; lower --vocab_size")
    return with_specials(name, ranks)


@exits_cleanly
def main(argv):
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    if argv[:1] != ["train"]:
        raise BadInput("usage: python -m data.tokenizer train --input=PATH --vocab_size=N "
                       "--out_dir=FOLDER")
    (options,), _ = configure(argv[1:], TrainOptions, usage=__doc__)
    out_dir = Path(options.out_dir)
    if (out_dir / "tokenizer.tiktoken").exists() and not options.overwrite:
        raise BadInput(f"{out_dir}: already holds a tokenizer; --overwrite=True replaces it")
    print(f"training {options.vocab_size} tokens on {options.input}")
    sources = [source.strip() for source in options.input.split(",")]
    texts = (text for source in sources for text in training_texts(source))
    tokenizer = train(out_dir.name, texts, options.vocab_size)
    tokenizer.save(out_dir)
    print(f"wrote {out_dir} (hash {tokenizer.hash[:12]}); "
          f"use it with --tokenizer={options.out_dir}")


if __name__ == "__main__":
    main()
