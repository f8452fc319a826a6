"""tiktoken encodings: load, train, chat template.

    python -m data.tokenizer train --input=PATH --vocab_size=4096 --out_dir=out/mine       then --tokenizer=out/mine

A tokenizer is a pattern that cuts text into pieces, byte pairs merged inside the pieces in order of rank, and special
tokens at the end of the vocabulary, which text can never produce. data/bpe4096.tiktoken, the default, is the file
tokenizer.tiktoken that this command wrote (10 s; torch 2.13.0, rustbpe 0.1.0, the held-out documents left out):

    python -m data.tokenizer train --input=pytorch,plays,speeches --vocab_size=4096 --out_dir=out/bpe_laptop
"""
import base64
import difflib
import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from configurator import ROOT, BadInput, configure, exits_cleanly

BUILT_IN = ("bpe4096", "bytes", "gpt2", "cl100k_base")
SPECIALS = ("<s>", "</s>", "<用户>", "<AI>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>", "<|reserved_1|>")
# GPT-4's pattern, with the possessive quantifiers of tiktoken's own copy: a megabyte of spaces does not make it backtrack.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
           r"|\s+(?!\S)|\s")


# GPT-2 writes bytes as letters: printable ones stand for themselves, the others are U+0100 onwards.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_LETTERS = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


class Tokenizer:
    """Text to ids and back. Ordinary text never becomes a special token: those are placed by id (bos, eos, special)."""

    def __init__(self, name, pattern, ranks, specials):
        """ranks: {bytes: id}, ids in merge order; specials: {text: id}."""
        self.name, self.specials = name, specials
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.n_vocab = self.encoding.n_vocab
        self.hash = fingerprint(pattern, rank_lines(ranks), sorted(specials.items()))
        self.files = {"tokenizer.tiktoken": rank_lines(ranks)}           # what save writes, beside tokenizer_config.json:
        self.about = {"name": name, "pattern": pattern, "specials": specials, "hash": self.hash}
        self.bos = specials["<s>" if "<s>" in specials else "<|endoftext|>"]
        self.eos = specials["</s>" if "</s>" in specials else "<|endoftext|>"]
        self.stop_ids = [self.eos]                                       # where generation ends
        self.bytes_of = {i: token for token, i in ranks.items()} | {i: text.encode("utf-8") for text, i in specials.items()}

    def encode(self, text):
        """list of int. BadInput for text that UTF-8 cannot hold (a command line with other bytes gives lone surrogates)."""
        return self.encoding.encode_ordinary(check_utf8(text))

    def encode_batch(self, texts):
        """One list of ids for each text, computed by threads."""
        return self.encoding.encode_ordinary_batch([check_utf8(text) for text in texts], num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids):
        """bytes. Ids that mean nothing (a model's vocabulary may be larger than its tokenizer's) show as U+FFFD."""
        return b"".join(self.bytes_of.get(int(i), b"\xef\xbf\xbd") for i in ids)

    def decode(self, ids):
        """str; bytes that are not UTF-8, such as half a character, show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """Number of bytes of text that each id stands for: (n_vocab,) int64, 0 for specials and unused ids."""
        sizes, specials = np.zeros(self.n_vocab, np.int64), set(self.specials.values())
        for i, token in self.bytes_of.items():
            sizes[i] = 0 if i in specials else len(token)
        return sizes

    def special(self, text):
        """The id of a special token; BadInput where this tokenizer has none such."""
        if text not in self.specials:
            raise BadInput(f"tokenizer {self.name!r} has no special token {text}; it has {', '.join(self.specials)}")
        return self.specials[text]

    def save(self, folder):
        """Write all that load_tokenizer(folder) needs: the vocabulary's file and tokenizer_config.json."""
        about = json.dumps(self.about, indent=1, ensure_ascii=False)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in {**self.files, "tokenizer_config.json": about}.items():
            (Path(folder) / name).write_bytes(as_bytes(content))


class ReleasedTokenizer(Tokenizer):
    """The tokenizer of a released model: its tokenizer.json, run by the package tokenizers, or its tokenizer.model, run by
    sentencepiece."""

    def __init__(self, about, file, content):
        """about: tokenizer_config.json with name, bos_token, eos_token and stop_ids; file and content: the one beside it."""
        self.name, self.files = about["name"], {file: content}
        engine = json_engine if file == "tokenizer.json" else sentencepiece_engine
        added = {token["content"]: int(i) for i, token in about.get("added_tokens_decoder", {}).items()}
        self.run, vocab, self.specials, byte_level = engine(content, added)
        self.bytes_of = {i: piece.encode("utf-8") if piece in self.specials else piece_bytes(piece, byte_level) for piece, i in vocab.items()}
        self.n_vocab = max(vocab.values()) + 1
        self.bos, self.eos = vocab[about["bos_token"]], vocab[about["eos_token"]]
        self.stop_ids = sorted({self.eos, *about["stop_ids"]})
        self.chat_template = about.get("chat_template")
        self.hash = fingerprint(hashlib.sha256(as_bytes(content)).hexdigest(), about["bos_token"], about["eos_token"])
        self.about = {**about, "hash": self.hash}

    def encode(self, text):
        return self.run([check_utf8(text)], False)[0]

    def encode_batch(self, texts):
        return self.run([check_utf8(text) for text in texts], False)

    def encode_with_specials(self, text):
        """As encode, but the texts of special tokens become these tokens: for templates only."""
        return self.run([check_utf8(text)], True)[0]


def json_engine(source, added):
    """(run, {piece: id}, specials, byte_level) of a tokenizer.json; run(texts, specials) -> lists of ids, specials saying
    whether the texts of special tokens become these tokens."""
    try:
        import tokenizers
    except ImportError:
        raise BadInput("a released tokenizer.json needs the package tokenizers: pip install tokenizers") from None
    spec = json.loads(source)
    for token in spec["added_tokens"]:
        token["special"] = True                                          # so that encode_special_tokens covers them all
    engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
    engine.no_truncation()
    engine.no_padding()

    def run(texts, specials):
        engine.encode_special_tokens = not specials                      # the package's name for "as ordinary text"
        return [e.ids for e in engine.encode_batch(texts, add_special_tokens=False)]
    vocab = engine.get_vocab(with_added_tokens=True)
    marks = {token["content"] for token in spec["added_tokens"]}
    # SentencePiece keeps the chat marks among its ordinary pieces.
    return run, vocab, {piece: i for piece, i in vocab.items() if piece in marks or piece in SPECIALS}, '"ByteLevel"' in source


def sentencepiece_engine(source, added):
    """The same of a tokenizer.model (bytes) and the tokens that tokenizer_config.json adds to it."""
    try:
        import sentencepiece
    except ImportError:
        raise BadInput("a released tokenizer.model needs the package sentencepiece: pip install sentencepiece") from None
    engine = sentencepiece.SentencePieceProcessor(model_proto=source)
    vocab = {engine.id_to_piece(i): i for i in range(engine.get_piece_size())} | added
    marks = {piece: i for piece, i in vocab.items() if piece in added or engine.is_control(i) or engine.is_unknown(i)}
    split = re.compile("(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")")

    def run(texts, specials):
        if not specials:
            return engine.encode(texts)
        parts = [[part for part in split.split(text) if part] for text in texts]
        return [[i for part in row for i in ([marks[part]] if part in marks else engine.encode(part))] for row in parts]
    return run, vocab, marks, False


def as_bytes(content):
    return content if isinstance(content, bytes) else content.encode("utf-8")


def piece_bytes(piece, byte_level):
    """What a piece of a released vocabulary stands for: GPT-2's letters for bytes, or SentencePiece's marks."""
    if byte_level:
        return bytes(BYTE_LETTERS[letter] for letter in piece)
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")


def check_utf8(text):
    """The text itself; BadInput where it holds lone surrogates, which tiktoken would silently replace."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"text is not valid UTF-8: character {error.start} is the lone surrogate "
                       f"{ascii(text[error.start])}") from None
    return text


def fingerprint(*parts):
    """sha256 hex of everything that decides what ids mean. A tokenizer's name is not part of it."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def rank_lines(ranks):
    """One line 'base64 id' for each token, in merge order: the text of a .tiktoken file."""
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in sorted(ranks.items(), key=lambda item: item[1]))


def parse_ranks(text):
    """The reverse of rank_lines; ValueError where the text is something else."""
    pairs = [line.split() for line in text.splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(i) for token, i in pairs}
    if list(ranks.values()) != list(range(len(pairs))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("ranks are not 0, 1, 2, ... or single bytes are missing")
    return ranks


def with_specials(name, ranks):
    """A Tokenizer of these ranks, the project's pattern, and its specials at the end of the vocabulary."""
    return Tokenizer(name, PATTERN, ranks, {text: len(ranks) + i for i, text in enumerate(SPECIALS)})


# ---- loading

def load_tokenizer(name):
    """A Tokenizer. name: one of BUILT_IN, or a folder that holds one (saved by train, a checkpoint, a released model).

    Relative folders count from here, then from the project. BadInput where there is none or its files are damaged.
    """
    if name in ("gpt2", "cl100k_base"):
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:                                       # whatever its HTTP client raises
            raise BadInput(f"tokenizer {name!r}: tiktoken has no copy and could not download one "
                           f"({type(error).__name__}); it needs a network once, bpe4096 and bytes need none") from None
        return Tokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)
    if name == "bytes":
        return with_specials(name, {bytes([i]): i for i in range(256)})
    if name == "bpe4096":
        return with_specials(name, read_ranks(ROOT / "data" / "bpe4096.tiktoken"))
    folder = next((p for p in (Path(name), ROOT / name) if p.is_dir()), None)
    if folder is None:
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        raise BadInput(f"no tokenizer {name!r}" + (f"; did you mean {near[0]}?" if near else "") +
                       f" Choices: {', '.join(BUILT_IN)}, or a folder written by tokenizer.py train")
    released = released_files(folder)
    ranks = None if released else read_ranks(folder / "tokenizer.tiktoken")
    try:
        if released:
            about = read_about(folder)
            tokenizer = ReleasedTokenizer(about, *released)
            found = tokenizer.hash
        else:
            about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            found = fingerprint(about["pattern"], rank_lines(ranks), sorted(about["specials"].items()))
            tokenizer = Tokenizer(about["name"], about["pattern"], ranks, about["specials"])
        if found != about.get("hash", found):
            raise ValueError(f"its hash is {found[:12]}, not {str(about['hash'])[:12]}")
        return tokenizer
    except FileNotFoundError as error:
        raise BadInput(f"{folder}: {Path(error.filename).name} is missing") from None
    except BadInput:
        raise
    except Exception as error:                                           # tokenizers raises plain Exceptions
        raise BadInput(f"{folder}: damaged tokenizer: {type(error).__name__}: {error}") from None


def load_for_model(folder, name, vocab_size):
    """The tokenizer of a checkpoint or released folder, or the one named instead; BadInput where there is none, or where
    the model's vocabulary has not room for it."""
    if name is None and not has_tokenizer(folder):
        raise BadInput(f"{folder}: holds no tokenizer; name one with --tokenizer (a folder, or {', '.join(BUILT_IN)})")
    tokenizer = load_tokenizer(name or str(folder))
    if tokenizer.n_vocab > vocab_size:
        raise BadInput(f"{folder}: tokenizer {tokenizer.name!r} has {tokenizer.n_vocab} tokens, the model's vocabulary only {vocab_size}")
    return tokenizer


def has_tokenizer(folder):
    """Whether a folder holds a tokenizer."""
    return (Path(folder) / "tokenizer.tiktoken").is_file() or released_files(Path(folder)) is not None


def released_files(folder):
    """(file name, content) of a released tokenizer, or None. Of two the one whose package is there."""
    if (folder / "tokenizer.tiktoken").is_file():
        return None
    have = [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    usable = [name for name in have if importlib.util.find_spec("tokenizers" if name == "tokenizer.json" else "sentencepiece")]
    for name in usable or have:
        content = (folder / name).read_bytes()
        return name, content.decode("utf-8") if name == "tokenizer.json" else content
    return None


def read_about(folder):
    """tokenizer_config.json of a released folder, completed: name, bos_token and eos_token as text, all ids that end a text."""
    about = {"name": folder.resolve().name, "stop_ids": []}
    about |= json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if (folder / "chat_template.jinja").is_file():
        about["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for mark, usual in (("bos_token", "<s>"), ("eos_token", "</s>")):
        text = about.get(mark) or usual
        about[mark] = text["content"] if isinstance(text, dict) else text
    for file in ("config.json", "generation_config.json"):               # the released ones end at several ids
        ids = json.loads((folder / file).read_text(encoding="utf-8")).get("eos_token_id") if (folder / file).is_file() else None
        about["stop_ids"] = sorted({*about["stop_ids"], *([ids] if isinstance(ids, int) else ids or [])})
    return about


def read_ranks(path):
    """{bytes: id} of a .tiktoken file; BadInput where it is missing or damaged."""
    try:
        return parse_ranks(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.parent}: holds no tokenizer ({path.name} is missing)") from None
    except ValueError as error:
        raise BadInput(f"{path}: damaged ({error})") from None


# ---- chat

def chat_ids(tokenizer, messages, generate=False):
    """Ids of a conversation. Our tokenizers: <s>, then <用户>text<AI> for a user, text</s> for the assistant, as the template
    of the released models has it; a released tokenizer: <s>, then its own template.

    messages  [{"role": "user" | "assistant" | "system", "content": text}]; a system's text stands as it is
    generate  the assistant speaks next, so the last message must be a user's
    returns   (ids, answer_mask): lists of one length; true on the assistant's tokens and their eos, the ones to learn
    """
    for n, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise BadInput(f"chat message {n}: its content is empty")
        if role not in ("user", "assistant", "system"):
            raise BadInput(f"chat message {n}: role is user, assistant or system, not {role!r}")
    if generate and (not messages or messages[-1]["role"] != "user"):
        raise BadInput("chat: the last message must be the user's for the assistant to answer")
    if isinstance(tokenizer, ReleasedTokenizer):
        return templated_ids(tokenizer, messages, generate)
    user, answer = tokenizer.special("<用户>"), tokenizer.special("<AI>")
    ids, mask = [tokenizer.bos], [False]
    for message in messages:
        text = tokenizer.encode(message["content"].strip())
        turn = {"user": [user, *text, answer], "assistant": [*text, tokenizer.eos], "system": text}[message["role"]]
        ids += turn
        mask += [message["role"] == "assistant"] * len(turn)
    return ids, mask


def templated_ids(tokenizer, messages, generate):
    """chat_ids through the template that a released folder brings: the whole conversation as one text for an answer to be
    generated, turn by turn to learn from, each answer closed by an end-of-text id."""
    if not tokenizer.chat_template:
        raise BadInput(f"tokenizer {tokenizer.name!r} has no chat template")
    for n, message in enumerate(messages, 1):
        found = next((text for text in tokenizer.specials if text in message["content"]), None)
        if found:
            raise BadInput(f"chat message {n}: holds {found}, which is a special token")
    if generate:
        ids = tokenizer.encode_with_specials(render(tokenizer, messages, True))
        ids = ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]
        return ids, [False] * len(ids)
    ids, mask, before = [tokenizer.bos], [False], ""
    for n, message in enumerate(messages, 1):
        text = render(tokenizer, messages[:n], n < len(messages) and messages[n]["role"] == "assistant")
        if not text.startswith(before):
            raise BadInput(f"tokenizer {tokenizer.name!r}: its chat template rewrites earlier turns, so answers can't be told apart")
        turn, answer = tokenizer.encode_with_specials(text[len(before):]), message["role"] == "assistant"
        if answer and not set(turn) & set(tokenizer.stop_ids):
            turn.append(tokenizer.eos)
        turn = turn[1:] if n == 1 and turn[:1] == [tokenizer.bos] else turn
        ids, mask, before = ids + turn, mask + [answer] * len(turn), text
    return ids, mask


def render(tokenizer, messages, generate):
    """The text of a conversation by the tokenizer's own template, as transformers renders it; in a sandbox."""
    import jinja2.sandbox  # torch brings it
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        template = environment.from_string(tokenizer.chat_template)
        return template.render(messages=messages, add_generation_prompt=generate, bos_token=tokenizer.about["bos_token"],
                               eos_token=tokenizer.about["eos_token"])
    except jinja2.TemplateError as error:
        raise BadInput(f"tokenizer {tokenizer.name!r}: its chat template fails: {error}") from None


# ---- training

@dataclass
class TrainOptions:
    input: str = "pytorch,plays,speeches"   # files or folders of .txt, .md, .py, or these corpora; separated by commas
    vocab_size: int = 4096                  # ids in all: 256 bytes, the merges, and the 8 special tokens
    out_dir: str = "out/tokenizer"          # folder to write; its last part becomes the tokenizer's name
    overwrite: bool = False                 # replace the tokenizer that is there

    def problems(self):
        lines, name = [], Path(self.out_dir).name
        if not 264 < self.vocab_size <= 2 ** 20:
            lines.append(f"vocab_size={self.vocab_size}: must be above 264 (256 bytes and 8 special tokens), at most {2 ** 20}")
        if name in BUILT_IN or not re.fullmatch(r"[\w-][\w.-]*", name):
            lines.append(f"out_dir={self.out_dir!r}: its last part names the tokenizer: letters, digits, '_', '-', '.', "
                         f"and none of {', '.join(BUILT_IN)}")
        return lines


def training_texts(source):
    """Texts to train on: the train split of a shipped corpus, or the files of a path."""
    if source in ("pytorch", "plays", "speeches"):
        spec = importlib.util.spec_from_file_location(f"prepare_{source}", ROOT / "data" / source / "prepare.py")
        prepare = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(prepare)
        yield from (text for split, text in prepare.documents() if split == "train")
        return
    path = Path(source)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py"))
    if not files:
        raise BadInput(f"--input: {source}: no such corpus, file, or folder with .txt, .md or .py files")
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{file}: not UTF-8 text") from None


def train(name, texts, vocab_size):
    """A Tokenizer whose merges fit an iterable of texts. BadInput where rustbpe is missing or the text has too few pairs."""
    try:
        import rustbpe
    except ImportError:
        raise BadInput("training a tokenizer needs rustbpe: pip install rustbpe") from None
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIALS), pattern=PATTERN)
    ranks = {bytes(token): i for token, i in trainer.get_mergeable_ranks()}
    if len(ranks) != vocab_size - len(SPECIALS):
        raise BadInput(f"too little text for {vocab_size} tokens: it gives {len(ranks) + len(SPECIALS)}; lower --vocab_size")
    return with_specials(name, ranks)


@exits_cleanly
def main(argv):
    if argv[:1] != ["train"]:
        if argv[:1] in (["--help"], ["-h"]):
            print(__doc__)
            return
        raise BadInput("tokenizer.py does one thing: python -m data.tokenizer train --input=PATH --vocab_size=N --out_dir=FOLDER")
    (options,), _ = configure(argv[1:], TrainOptions, usage=__doc__)
    out_dir = Path(options.out_dir)
    if (out_dir / "tokenizer.tiktoken").exists() and not options.overwrite:
        raise BadInput(f"{out_dir}: holds a tokenizer already; --overwrite=True replaces it")
    print(f"training {options.vocab_size} tokens on {options.input}")
    texts = (text for source in options.input.split(",") for text in training_texts(source.strip()))
    tokenizer = train(out_dir.name, texts, options.vocab_size)
    tokenizer.save(out_dir)
    print(f"wrote {out_dir} (hash {tokenizer.hash[:12]}); use it with --tokenizer={options.out_dir}")


if __name__ == "__main__":
    main()
