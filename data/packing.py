"""Conversations to rows: reading records from files, and packing their token ids into rows.

A file holds one JSON object per line (.jsonl), or one JSON list of objects. A record has one of the
common shapes:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    {"instruction": ..., "input": ..., "output": ...}
    {"prompt": ..., "chosen": ..., "rejected": ...}       a preference pair; each text or messages

A packed corpus consists of rows of block_size + 1 tokens: whole conversations (or documents) back
to back, each from its <s> to the eos of its last answer, then eos as padding. Beside each split
lies a second one, SPLIT_mask, with the class of every token (PADDING, TEXT or ANSWER), which
decides whether the token is a target. The <s> of a conversation never is, because it does not
follow from what stands before it in the row.
"""
import hashlib
import json
from pathlib import Path

import numpy as np

from configurator import BadInput
from data.corpus import SPLITS, ShardWriter, atomic_folder, prepare_once, write_meta
from data.dataset import ANSWER, PADDING, TEXT
from data.tokenizer import chat_ids, check_utf8

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}
OPEN_ROWS = 64              # rows kept open while packing: conversations may still be added to them


# ---- reading records

def read_conversations(path, skip_bad=False):
    """Yield each conversation of a file, as [{"role", "content"}, ...] up to its last answer.

    Bad records: see read_records.
    """
    return read_records(path, parse_conversation, skip_bad)


def read_questions(path, skip_bad=False):
    """Yield (messages, answer, family) of each conversation of a file.

    answer is the text of the last answer, messages is what comes before it and ends with a user's
    turn, and family is the record's field of that name ("" if it has none). Bad records: see
    read_records.
    """
    return read_records(path, parse_question, skip_bad)


def read_pairs(path, skip_bad=False):
    """Yield (messages, chosen text, rejected text) of each preference pair of a file.

    The messages end with a user's turn. Bad records: see read_records.
    """
    return read_records(path, parse_pair, skip_bad)


def read_records(path, parse, skip_bad=False):
    """Yield parse(record) for each record of a file.

    If parse raises ValueError, the record is bad, and BadInput names its file and line. With
    skip_bad, bad records are left out instead, and their number is printed at the end.
    """
    n_records, n_bad, first_bad = 0, 0, None
    for where, source in raw_records(Path(path)):
        n_records += 1
        try:
            record = json.loads(source) if isinstance(source, bytes) else source
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            value = parse(record)
        except ValueError as error:
            reason = error
            if isinstance(error, json.JSONDecodeError):
                reason = f"not JSON ({error.msg}, column {error.colno})"
            if not skip_bad:
                raise BadInput(f"{where}: {reason}; correct it, or leave out bad records with "
                               "--skip_bad=True") from None
            n_bad += 1
            first_bad = first_bad or f"{where}: {reason}"
        else:
            yield value
    if n_bad:
        print(f"skipped {n_bad} of {n_records}; the first: {first_bad}")


def raw_records(path):
    """Yield (place in the file, record): lines as bytes, or the objects of a JSON list."""
    try:
        with open(path, "rb") as file:
            first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if not first.startswith(b"["):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", line
                return
            records = json.loads(file.read())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        raise BadInput(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    for number, record in enumerate(records, 1):
        yield f"{path}, item {number}", record


def parse_conversation(record):
    """Return the messages of a record up to the last answer; ValueError says what is wrong."""
    if "messages" in record or "conversations" in record:
        messages = normalize(record.get("messages", record.get("conversations")))
    elif "instruction" in record:
        question, context = record["instruction"], record.get("input")
        if context and isinstance(question, str):
            question = f"{question}\n{context}"
        messages = normalize([{"role": "user", "content": question},
                              {"role": "assistant", "content": record.get("output")}])
    else:
        raise ValueError("holds neither messages, conversations, nor instruction and output")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("conversation without an assistant turn")
    return messages


def parse_question(record):
    """Return (messages, answer, family) of a record; ValueError says what is wrong."""
    *messages, answer = parse_conversation(record)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the last answer does not follow a user's turn")
    return messages, answer["content"], str(record.get("family", ""))


def parse_pair(record):
    """Return (messages, chosen text, rejected text) of a record; ValueError says what is wrong.

    chosen and rejected may be messages that begin with the prompt; these replace the field prompt.
    """
    prompts, answers = [], []
    for side in ("chosen", "rejected"):
        if not record.get(side):
            raise ValueError(f"unbalanced pair: {side} is missing or empty")
        *prompt, answer = as_messages(record[side], "assistant")
        if answer["role"] != "assistant":
            raise ValueError(f"{side} does not end with the assistant's answer")
        prompts.append(prompt)
        answers.append(answer["content"])
    if prompts[0] != prompts[1]:
        raise ValueError("unbalanced pair: chosen and rejected answer different prompts")
    prompt = prompts[0] or as_messages(record.get("prompt") or [], "user")
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError("the prompt does not end with the user's turn")
    if answers[0] == answers[1]:
        raise ValueError("chosen equals rejected")
    return prompt, *answers


def as_messages(value, role):
    """Return normalized messages: those given, or a text as the one message of a role."""
    return normalize([{"role": role, "content": value}] if isinstance(value, str) else value)


def normalize(messages):
    """Return messages as [{"role", "content"}, ...] with stripped text, whatever their spelling.

    Raises ValueError if a message has no known role or no text.
    """
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError("messages are a list of objects with role and content")
    out = []
    for number, turn in enumerate(messages, 1):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"turn {number}: unknown role {role!r}; it is one of "
                             f"{', '.join(ROLES)}")
        role = ROLES[role]
        if not isinstance(content, str) or not content.strip():
            kind = "answer" if role == "assistant" else "text"
            raise ValueError(f"turn {number}: empty {kind}")
        out.append({"role": role, "content": check_utf8(content.strip())})
    return out


# ---- packing

def fit_conversation(tokenizer, messages, row):
    """Tokenize as many exchanges from the start of a conversation as fit into a row.

    Returns ([(id, class), ...], number of exchanges left out); the list is empty if not even the
    first exchange fits.
    """
    ends = [n for n, turn in enumerate(messages, 1) if turn["role"] == "assistant"]
    for left_out, end in enumerate(reversed(ends)):
        ids, is_answer = chat_ids(tokenizer, messages[:end])
        if len(ids) <= row:
            if ids[0] != tokenizer.bos or tokenizer.bos in ids[1:]:
                raise BadInput(f"tokenizer {tokenizer.name!r} has no bos token, or writes it "
                               "inside conversations too, so they could not be told apart in a row")
            classes = [ANSWER if answer else TEXT for answer in is_answer]
            classes[0] = PADDING
            return list(zip(ids, classes)), left_out
    return [], len(ends)


class RowWriter:
    """Packs documents of one split into rows and writes the rows and their classes as shards.

    A document goes into the fullest open row with room for it (best fit), else into a new one.
    """

    def __init__(self, folder, split, tokenizer, row, shard_tokens):
        self.row, self.padding = row, (tokenizer.eos, PADDING)
        self.open_rows = []                     # lists of (id, class)
        shard_tokens = -(-shard_tokens // row) * row            # whole rows
        self.tokens = ShardWriter(folder, f"{split}_", tokenizer.n_vocab, shard_tokens, "documents",
                                  "truncated", "dropped", "rows", "filled", "bytes")
        self.classes = ShardWriter(folder, f"{split}_mask_", tokenizer.n_vocab, shard_tokens)

    def add(self, pairs):
        """Put a document, [(id, class), ...] of at most `row` tokens, into a row."""
        rows_with_room = [row for row in self.open_rows if len(row) + len(pairs) <= self.row]
        if rows_with_room:
            max(rows_with_room, key=len).extend(pairs)
            return
        self.open_rows.append(list(pairs))
        if len(self.open_rows) > OPEN_ROWS:
            fullest = max(self.open_rows, key=len)
            self.open_rows.remove(fullest)
            self.write_row(fullest)

    def write_row(self, pairs):
        ids, classes = np.array(pairs + [self.padding] * (self.row - len(pairs))).T
        self.tokens.write(ids)
        self.classes.write(classes)
        self.tokens.entry["rows"] += 1

    def finish(self):
        """Write the rows that are still open; return the entries of the split and its mask."""
        for pairs in self.open_rows:
            self.write_row(pairs)
        return self.tokens.finish(), self.classes.finish()


def write_rows(folder, tokenizer, documents, block_size, fit=fit_conversation,
               shard_tokens=20_000_000, overwrite=False):
    """Pack documents into rows and write them as a corpus, all or nothing.

    documents  iterable of (split, document), split "train" or "val"; a document is what `fit` takes
    fit        (tokenizer, document, row) -> ([(id, class), ...] of at most row tokens, how much was
               left out); by default documents are conversations (messages)
    returns    meta.json as a dict. Per split: documents; those truncated and dropped because of
               their length; rows; tokens with padding; filled, the tokens without; bytes of answers
    """
    row, sha256, token_bytes = block_size + 1, hashlib.sha256(), tokenizer.token_bytes()
    with atomic_folder(folder, overwrite) as temporary:
        writers = {split: RowWriter(temporary, split, tokenizer, row, shard_tokens)
                   for split in SPLITS}
        for number, (split, document) in enumerate(documents, 1):
            sha256.update(json.dumps([split, document]).encode())
            try:
                pairs, left_out = fit(tokenizer, document, row)
            except BadInput as error:
                raise BadInput(f"document {number}: {error}") from None
            entry = writers[split].tokens.entry
            if not pairs:
                entry["dropped"] += 1
                continue
            answer_ids = [token for token, kind in pairs if kind == ANSWER]
            entry["documents"] += 1
            entry["truncated"] += left_out > 0
            entry["filled"] += len(pairs)
            entry["bytes"] += int(token_bytes[answer_ids].sum())
            writers[split].add(pairs)
        splits, masks = {}, {}
        for split, writer in writers.items():
            splits[split], masks[f"{split}_mask"] = writer.finish()
        return write_meta(temporary, tokenizer, sha256.hexdigest(), splits | masks, row)


def prepare(name, documents, block_size, options, fit=fit_conversation):
    """Write the packed corpus DATA_DIR/NAME/TOKENIZER (see write_rows), unless it exists.

    options  PrepareOptions
    """
    def write(folder, tokenizer):
        return write_rows(folder, tokenizer, documents, block_size, fit,
                          overwrite=options.overwrite)
    prepare_once(name, options, write, describe_rows, block_size + 1)


def describe_rows(meta, total):
    """Return what a new packed corpus holds, in one line."""
    filled = 100 * total["filled"] / total["tokens"]
    val = meta["splits"]["val"]
    return (f"{total['documents']:,} documents ({val['documents']:,} held out) in "
            f"{total['rows']:,} rows of {meta['row']} tokens, {filled:.1f} % filled; "
            f"{total['truncated']:,} truncated at a turn and {total['dropped']:,} dropped, being "
            "longer than a row")
