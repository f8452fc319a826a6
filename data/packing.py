"""Conversations and preference pairs: files to token ids with a loss mask, packed into rows.

A file holds one JSON object a line, or one JSON list of them:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}    also "conversations", "from", "value"
    {"instruction": ..., "input": ..., "output": ...}                                          alpaca
    {"prompt": ..., "chosen": ..., "rejected": ...}                                            a pair; each text or messages

A packed corpus is a corpus whose tokens come in rows of block_size + 1: whole conversations (or documents) back to back, each from its <s>
to the eos of its last answer, then eos as padding. Beside each split lies a second one, SPLIT_mask, that gives every token
its class (dataset.py: PADDING, TEXT, ANSWER): whether it is to be predicted. A conversation's <s> never is: what comes next
to it in a row is chance.
"""
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from configurator import ROOT, BadInput
from data.dataset import ANSWER, PADDING, TEXT, complete_or_nothing, open_corpus, write_shard
from data.tokenizer import chat_ids, check_utf8, load_tokenizer

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
OPEN_ROWS = 64                          # rows that a conversation may still go into while packing


# ---- reading files

def read_conversations(path, skip_bad=False):
    """Yield each conversation of a file as [{"role", "content"}, ...] up to its last answer. Bad ones: see read_records."""
    return read_records(path, conversation, skip_bad)


def read_questions(path, skip_bad=False):
    """Yield (messages, answer, family): the last answer is what is asked for; family is the record's own field, or ""."""
    def question(record):
        *messages, last = conversation(record)
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the last answer does not follow a user's turn")
        return messages, last["content"], str(record.get("family", ""))
    return read_records(path, question, skip_bad)


def read_pairs(path, skip_bad=False):
    """Yield (messages, chosen text, rejected text); the messages end with the user's."""
    return read_records(path, pair, skip_bad)


def read_records(path, understand, skip_bad=False):
    """Yield understand(record) of each record of a file. Where it raises ValueError: BadInput that names file and line, or
    with skip_bad the record is left out and the number of such printed at the end."""
    count, bad = 0, []
    for where, source in sources(Path(path)):
        count += 1
        try:
            record = json.loads(source) if isinstance(source, bytes) else source
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            value = understand(record)
        except ValueError as error:
            reason = f"not JSON ({error.msg}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
            bad.append(f"{where}: {reason}" if not bad else None)
            if not skip_bad:
                raise BadInput(f"{bad[0]}; mend it, or --skip_bad=True leaves such out") from None
            continue
        yield value
    if bad:
        print(f"skipped {len(bad)} of {count}; the first: {bad[0]}")


def sources(path):
    """Yield (where, bytes of a line) of a file, or (where, object) if it is one JSON list."""
    try:
        with open(path, "rb") as file:
            if not file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                file.seek(0)
                yield from ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
                return
        records = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    yield from ((f"{path}, item {n}", record) for n, record in enumerate(records, 1))


def conversation(record):
    """The messages of one record, up to the last answer; ValueError says what is wrong with it."""
    if "messages" in record or "conversations" in record:
        said = turns(record.get("messages", record.get("conversations")))
    elif "instruction" in record:
        said = turns([{"role": "user", "content": join(record["instruction"], record.get("input"))},
                      {"role": "assistant", "content": record.get("output")}])
    else:
        raise ValueError("holds neither messages, conversations, nor instruction and output")
    answers = [n for n, turn in enumerate(said, 1) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("conversation without an assistant turn")
    return said[:answers[-1]]


def pair(record):
    """(messages, chosen, rejected) of one record. Where chosen and rejected are messages that begin with the prompt, that one counts."""
    prompts, answers = [], []
    for side in ("chosen", "rejected"):
        if not record.get(side):
            raise ValueError(f"unbalanced pair: {side} is missing or empty")
        said = record[side]
        *before, last = turns([{"role": "assistant", "content": said}] if isinstance(said, str) else said)
        if last["role"] != "assistant":
            raise ValueError(f"{side} does not end with the assistant's answer")
        prompts.append(before)
        answers.append(last["content"])
    if prompts[0] != prompts[1]:
        raise ValueError("unbalanced pair: chosen and rejected answer different prompts")
    prompt = record.get("prompt") or []
    prompt = prompts[0] or turns([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError("the prompt does not end with the user's turn")
    if answers[0] == answers[1]:
        raise ValueError("chosen equals rejected")
    return prompt, *answers


def turns(said):
    """Messages in the one spelling that the rest uses, stripped; ValueError where one has no known role or no text."""
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise ValueError("messages are a list of objects with role and content")
    out = []
    for n, turn in enumerate(said, 1):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"turn {n}: unknown role {role!r}; it is one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"turn {n}: empty {'answer' if ROLES[role] == 'assistant' else 'text'}")
        out.append({"role": ROLES[role], "content": check_utf8(content.strip())})
    return out


def join(instruction, further):
    return f"{instruction}\n{further}" if isinstance(instruction, str) and further else instruction


# ---- packing

def fit(tokenizer, messages, row):
    """([(id, class), ...], exchanges left out) of as many exchanges from the start as row tokens hold; none may be left."""
    ends = [n for n, turn in enumerate(messages, 1) if turn["role"] == "assistant"]
    for left_out, end in enumerate(reversed(ends)):
        ids, answer = chat_ids(tokenizer, messages[:end])
        if len(ids) <= row:
            if ids.count(tokenizer.bos) > 1:
                raise BadInput(f"tokenizer {tokenizer.name!r} uses its mark of a beginning inside conversations too, so they could not be told apart")
            classes = [PADDING, *(ANSWER if learn else TEXT for learn in answer[1:])]
            return list(zip(ids, classes)), left_out
    return [], len(ends)


def place(rows, pairs, row):
    """Put a conversation into the fullest open row that has room for it, else into a new one; returns the row that no longer
    stays open because of that, or None."""
    room = [open_row for open_row in rows if len(open_row) + len(pairs) <= row]
    if room:
        max(room, key=len).extend(pairs)
        return None
    rows.append(pairs)
    return rows.pop(max(range(len(rows)), key=lambda i: len(rows[i]))) if len(rows) > OPEN_ROWS else None


def write_rows(folder, tokenizer, documents, block_size, fit=fit, shard_tokens=20_000_000, overwrite=False):
    """Pack documents into shards of rows, all or nothing.

    documents  iterable of (split, document), split "train" or "val"; a document is whatever fit takes: messages
    fit        (tokenizer, document, row) -> ([(id, class), ...] of at most row tokens, how much was left out)
    returns    the meta.json as a dict: per split documents, those truncated and dropped for their length, rows, tokens
               (padding included), filled (not included), and bytes (of answers alone)
    """
    row, sha = block_size + 1, hashlib.sha256()
    sums = ("documents", "truncated", "dropped", "rows", "filled", "bytes", "tokens")
    splits = {split: dict.fromkeys(sums, 0) | {"shards": [], "counts": []} for split in ("train", "val")}
    masks = {f"{split}_mask": {"tokens": 0, "shards": [], "counts": []} for split in splits}
    open_rows, closed = {split: [] for split in splits}, {split: [] for split in splits}
    sizes = tokenizer.token_bytes()

    def close(split, pairs):
        closed[split].append(np.array(pairs + [(tokenizer.eos, PADDING)] * (row - len(pairs)), np.int32))

    def add_shard(split):
        both = np.stack(closed[split])                                   # (rows, row, 2)
        for name, entry, values in ((split, splits[split], both[..., 0]), (f"{split}_mask", masks[f"{split}_mask"], both[..., 1])):
            file = f"{name}_{len(entry['shards']):06d}.bin"
            write_shard(temporary / file, values.ravel(), tokenizer.n_vocab)
            entry["shards"].append(file)
            entry["counts"].append(values.size)
            entry["tokens"] += values.size
        splits[split]["rows"] += len(both)
        closed[split].clear()

    with complete_or_nothing(folder, overwrite) as temporary:
        for n, (split, document) in enumerate(documents, 1):
            sha.update(json.dumps([split, document]).encode())
            try:
                pairs, left_out = fit(tokenizer, document, row)
            except BadInput as error:
                raise BadInput(f"document {n}: {error}") from None
            entry = splits[split]
            if not pairs:
                entry["dropped"] += 1
                continue
            entry["documents"] += 1
            entry["truncated"] += left_out > 0
            entry["filled"] += len(pairs)
            entry["bytes"] += int(sum(sizes[i] for i, kind in pairs if kind == ANSWER))
            full = place(open_rows[split], pairs, row)
            if full:
                close(split, full)
                if len(closed[split]) * row >= shard_tokens:
                    add_shard(split)
        for split in splits:
            for pairs in open_rows[split]:
                close(split, pairs)
            if closed[split]:
                add_shard(split)
            if not splits[split]["rows"]:
                raise BadInput(f"{folder}: no {split} documents of at most {row} tokens; a corpus needs both train and val")
        meta = {"row": row, "tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.n_vocab,
                "corpus_sha256": sha.hexdigest(), "splits": splits | masks}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def prepare(name, documents, block_size, options, fit=fit):
    """Write data_dir/NAME/TOKENIZER from an iterable of (split, document) (see write_rows), not touched where the corpus is there.

    options: tokenizer, data_dir, overwrite (data/prepare_corpus.py: PrepareOptions)
    """
    tokenizer = load_tokenizer(options.tokenizer)
    folder = ROOT / options.data_dir / name / tokenizer.name
    if folder.exists() and not options.overwrite:
        row = open_corpus(options.data_dir, name, tokenizer, "train").row
        if row != block_size + 1:
            raise BadInput(f"--block_size={block_size}: {folder} was prepared with {row - 1 if row else 'none'}; "
                           f"--overwrite=True prepares it again")
        print(f"{folder} is already prepared; --overwrite=True does it again")
        return
    print(f"preparing {folder}", flush=True)
    start = time.perf_counter()
    meta = write_rows(folder, tokenizer, documents, block_size, fit, overwrite=options.overwrite)
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    both = {key: train[key] + val[key] for key in train if key not in ("shards", "counts")}
    print(f"{name}: {both['documents']:,} documents ({val['documents']:,} held out) in {both['rows']:,} rows of {meta['row']} "
          f"tokens, {100 * both['filled'] / both['tokens']:.1f} % filled; {both['truncated']:,} truncated at a turn and "
          f"{both['dropped']:,} dropped, being longer than a row; {time.perf_counter() - start:.1f} s")
