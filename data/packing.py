"""Conversations to rows: reading records from files, and packing their token ids into rows.

data/files.py reads the files: .jsonl, .json (a list of objects) and .parquet. A record has one of
the common shapes:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    {"instruction": ..., "input": ..., "output": ...}       also with context, response (dolly)
    {"question": ..., "response": ...}
    {"prompt": ..., "chosen": ..., "rejected": ...}         a preference pair; each text or messages

The tables PARTS and SHAPES below list all keys that are understood. Beside the shapes there may be
a system text, which becomes the first turn, and a history of [question, answer] lists, which come
before the question. A turn with "weight": 0, "train": false, "loss_mask": 0 or "loss": false is
not learned. A prompt said twice (in prompt and in chosen, say) is read once; the two must agree.

Every other key is an error that names it, because it may change what the record means (tools,
reasoning_content, images, ...). Exceptions: keys whose value is null, "", [] or {}, and those of
HARMLESS, which say where a record is from.

A packed corpus consists of rows of block_size + 1 tokens: whole conversations (or documents) back
to back, each from its <s> to the eos of its last answer, then eos as padding. Beside each split
lies a second one, SPLIT_mask, with the class of every token (PADDING, TEXT or ANSWER), which
decides whether the token is a target. The <s> of a conversation never is, because it does not
follow from what stands before it in the row.
"""
import hashlib
import json
import re

import numpy as np

from configurator import BadInput
from data.corpus import SPLITS, ShardWriter, atomic_folder, prepare_once, write_meta
from data.dataset import ANSWER, PADDING, TEXT
from data.files import decode, find_file, raw_records
from data.tokenizer import chat_ids, check_utf8

# What a record may say, and the keys that say it.
PARTS = {
    "turns": ("messages", "conversations", "conversation"),         # a list of turns
    "question": ("instruction", "prompt", "question", "query"),     # text or turns
    "context": ("input", "context"),                        # text, after the question on a new line
    "answer": ("output", "response", "answer", "completion"),       # text or a turn
    "system": ("system", "system_prompt"),                          # text of the first turn
    "history": ("history",),                                        # [[question, answer], ...]
    "chosen": ("chosen",),                                          # text, a turn or turns
    "rejected": ("rejected",),
    # of a turn
    "role": ("role", "from"),
    "content": ("content", "value"),                                # text, or a list of its parts
    "learn": ("weight", "train", "loss_mask", "loss"),              # 0 or 1, False or True
    # of a part of a content
    "type": ("type",),                                              # "text"
    "text": ("text",),
}
SHAPES = {
    "conversation": ("turns", "system", "question"),
    "single exchange": ("question", "context", "answer", "system", "history"),
    "preference pair": ("chosen", "rejected", "turns", "question", "context", "system", "history"),
    "turn": ("role", "content", "learn"),
    "part of the content": ("type", "text"),
}
# Keys that say where a record is from or what it is about, and change nothing of its text. (text is
# the record written out once more, as in alpaca.)
HARMLESS = frozenset(
    "_id avatarUrl categories category chosen-model chosen-rating chosen-score chosen_model "
    "chosen_rating chosen_score conversation_hash conversation_id country created created_at "
    "data_source dataset dataset_name date detoxify_moderation difficulty domain family generator "
    "hash hashed_ip header id idx index instruction_id lang language license margin message_id "
    "meta metadata model model_name n_turns num_tokens num_turns openai_moderation origin "
    "prompt_id quality question_id rating record_id redacted rejected-model rejected-rating "
    "rejected-score rejected_model rejected_rating rejected_score sample_id score score_chosen "
    "score_rejected scores source source_id sources split state subject tag tags task task_name "
    "task_type text timestamp title topic topics toxic turn turn_id turn_identifier uid url "
    "user_id uuid version views".split())
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")          # HH-RLHF's form of a conversation
OPEN_ROWS = 64              # rows kept open while packing: conversations may still be added to them


# ---- reading records

def read_conversations(path, skip_bad=False):
    """Yield each conversation of a file, as [{"role", "content"}, ...] up to its last answer.

    An answer that is not to be learned has "learn": False too. Bad records: see read_records.
    """
    return (messages for _, messages in read_records(path, parse_conversation, skip_bad))


def read_questions(path, skip_bad=False):
    """Yield (messages, answer, family) of each conversation of a file.

    answer is the text of the last answer, messages is what comes before it and ends with a user's
    turn, and family is the record's field of that name ("" if it has none). Bad records: see
    read_records.
    """
    return (question for _, question in read_records(path, parse_question, skip_bad))


def read_pairs(path, skip_bad=False, convert=lambda *pair: pair, say=print):
    """Yield convert(messages, chosen text, rejected text) of each preference pair of a file.

    The messages end with a user's turn. Bad records: see read_records. A pair is one too if convert
    raises BadInput.
    """
    def parse(record):
        return convert(*parse_pair(record))
    return (pair for _, pair in read_records(path, parse, skip_bad, say))


def read_records(path, parse, skip_bad=False, say=print):
    """Yield (place in the file, parse(record)) for each record of a file.

    If parse raises ValueError, the record is bad, and BadInput names its file and line. With
    skip_bad, bad records are left out instead, and say(text) gets their number at the end.
    """
    n_records, n_bad, first_bad = 0, 0, None
    for place, source in raw_records(find_file(path)):
        n_records += 1
        try:
            value = parse(decode(source))
        except ValueError as error:
            if not skip_bad:
                raise BadInput(f"{place}: {error}; correct it, or leave out bad records with "
                               "--skip_bad=True") from None
            n_bad += 1
            first_bad = first_bad or f"{place}: {error}"
        else:
            yield place, value
    if n_bad:
        say(f"skipped {n_bad} of {n_records}; the first: {first_bad}")


def parse_conversation(record):
    """Return the messages of a record up to the last answer; ValueError says what is wrong."""
    if any(record.get(key) is not None for key in PARTS["turns"]):
        parts = read_parts(record, "conversation")
        messages = normalize(as_turns(parts.get("turns", [])))
        if not holds(messages, normalize(asked_turns(parts))):
            raise ValueError("its prompt is not in its messages")
    elif any(key in record for key in PARTS["question"]):
        parts = read_parts(record, "single exchange")
        messages = normalize([*asked_turns(parts), *as_turns(parts.get("answer"), "assistant")])
    else:
        raise ValueError("holds neither messages, conversations, nor instruction and output; it "
                         f"has the keys {', '.join(record) or '(none)'}")
    messages = with_system(parts, messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("conversation without an assistant turn")
    if not any(turn.get("learn", True) for turn in messages if turn["role"] == "assistant"):
        raise ValueError("all answers are marked as not to be learned")
    return messages


def parse_question(record):
    """Return (messages, answer, family) of a record; ValueError says what is wrong."""
    *messages, answer = parse_conversation(record)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the last answer does not follow a user's turn")
    return messages, answer["content"], str(record.get("family", ""))


def parse_pair(record):
    """Return (messages, chosen text, rejected text) of a record; ValueError says what is wrong.

    chosen and rejected may be messages that begin with the prompt, or with the end of it.
    """
    parts = read_parts(record, "preference pair")
    # HH-RLHF says the prompt in the answers only, which are transcripts then.
    turns_of = as_turns if {"question", "turns"} & parts.keys() else split_transcript
    prompts, answers = [], []
    for side in ("chosen", "rejected"):
        if not parts.get(side):
            raise ValueError(f"unbalanced pair: {side} is missing or empty")
        *prompt, answer = normalize(turns_of(parts[side], "assistant"))
        if answer["role"] != "assistant":
            raise ValueError(f"{side} does not end with the assistant's answer")
        if "learn" in answer:
            raise ValueError(f"{side} is marked as not to be learned")
        prompts.append(prompt)
        answers.append(answer["content"])
    if prompts[0] != prompts[1]:
        raise ValueError("unbalanced pair: chosen and rejected answer different prompts")
    if answers[0] == answers[1]:
        raise ValueError("chosen equals rejected")
    prompt = with_system(parts, merge_prompts(stated_prompt(parts, answers[0]), prompts[0]))
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError("the prompt does not end with the user's turn")
    return prompt, *answers


def stated_prompt(parts, chosen):
    """Return the messages of a pair's prompt as said beside its answers, [] if it is not."""
    asked = normalize(asked_turns(parts))
    if "turns" not in parts:
        return asked
    turns = normalize(as_turns(parts["turns"]))
    if turns and turns[-1] == {"role": "assistant", "content": chosen}:
        turns.pop()                         # the messages repeat the chosen answer too
    return merge_prompts(asked, turns)


def merge_prompts(stated, repeated):
    """Return the longer one of two forms of a prompt; ValueError if they disagree.

    repeated, which begins the answers, may say all that is stated and more, or the end of it.
    """
    if holds(repeated, stated):
        return repeated
    if stated[len(stated) - len(repeated):] == repeated:
        return stated
    raise ValueError("unbalanced pair: prompt differs from the prompt in chosen and rejected")


def holds(messages, part):
    """Return whether the messages of `part` stand among `messages`, in a row."""
    ends = range(len(part), len(messages) + 1)
    return any(messages[end - len(part):end] == part for end in ends)


def read_parts(record, shape):
    """Return {part: value} of a record (a turn, ...) of a shape.

    Raises ValueError if a key is not understood, or if two keys give one part different values.
    """
    names = {key: part for part in SHAPES[shape] for key in PARTS[part]}
    parts = {}
    for key, value in record.items():
        if key not in names:
            if value not in (None, "", [], {}) and key not in HARMLESS:
                raise ValueError(f"the key {key!r} is not understood in a {shape}, which may have "
                                 f"{', '.join(names)} or one of HARMLESS in data/packing.py")
        elif value not in (None, "") and parts.setdefault(names[key], value) != value:
            raise ValueError(f"{' and '.join(k for k in PARTS[names[key]] if k in record)} differ")
    return parts


def asked_turns(parts):
    """Return the turns of a record's history and question, [] if it has neither."""
    turns, question, context = [], parts.get("question"), parts.get("context")
    history = parts.get("history", [])
    if not isinstance(history, list) or not all(isinstance(exchange, list) and len(exchange) == 2
                                                for exchange in history):
        raise ValueError("history is a list of [question, answer] lists")
    for asked, answered in history:
        turns += [*as_turns(asked, "user"), *as_turns(answered, "assistant")]
    if context is not None:
        if not isinstance(question or "", str) or not isinstance(context, str):
            raise ValueError("input or context is text that follows a question which is text")
        question = f"{question}\n{context}" if question else context
    if question is not None or "answer" in parts:
        turns += split_transcript(question, "user")
    return turns


def with_system(parts, messages):
    """Return the messages with the system text of a record as the first one."""
    system = normalize(as_turns(parts["system"], "system")) if "system" in parts else []
    if messages[:len(system)] == system:
        return messages
    if any(turn["role"] == "system" for turn in messages):
        raise ValueError("the key system differs from the system turn of the messages")
    return system + messages


def split_transcript(value, role):
    """Return the turns of a transcript, without a last one that is still to be said; of another
    value as_turns."""
    if not isinstance(value, str) or not TRANSCRIPT.match(value):
        return as_turns(value, role)
    _, *pieces = TRANSCRIPT.split(value)
    turns = [{"role": ROLES[speaker.lower()], "content": content}
             for speaker, content in zip(pieces[::2], pieces[1::2])]
    return turns if turns[-1]["content"].strip() else turns[:-1]


def as_turns(value, role=None):
    """Return a list of turns: those given, or a text as the turn of a role.

    Raises ValueError if the value is something else.
    """
    if role and (value is None or isinstance(value, str)):
        value = {"role": role, "content": value}
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("messages are a list of objects with role and content")
    return turns


def normalize(turns):
    """Return turns as messages: {"role", "content"} with stripped text, whatever their spelling,
    and "learn": False if it is an answer that is not to be learned.

    Raises ValueError if a turn has no known role or no text, or a key that is not understood.
    """
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(normalize_turn(read_parts(turn, "turn")))
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None
    return messages


def normalize_turn(parts):
    """Return the message of a turn, given as {part: value}."""
    role, content = parts.get("role"), parts.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role {role!r}; it is one of {', '.join(ROLES)}")
    role = ROLES[role]
    if isinstance(content, list):
        content = "".join(map(content_text, content))
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"empty {'answer' if role == 'assistant' else 'text'}")
    message = {"role": role, "content": check_utf8(content.strip())}
    learn = parts.get("learn", role == "assistant")
    if learn not in (0, 1):
        raise ValueError(f"{learn!r} says whether it is learned; that must be 0 or 1")
    if learn and role != "assistant":
        raise ValueError("marked as to be learned, which only answers are")
    return message if learn or role != "assistant" else {**message, "learn": False}


def content_text(part):
    """Return the text of {"type": "text", "text": ...}, a part of a message's content."""
    parts = read_parts(part, "part of the content") if isinstance(part, dict) else {}
    if parts.get("type") != "text" or not isinstance(parts.get("text"), str):
        raise ValueError(f"content in parts is a list of {{'type': 'text', 'text': ...}}, which "
                         f"{str(part)[:40]} is not")
    return parts["text"]


# ---- packing

def fit_conversation(tokenizer, messages, row):
    """Tokenize as many exchanges from the start of a conversation as fit into a row.

    Returns ([(id, class), ...], number of exchanges left out); the list is empty if not even the
    first exchange fits, or if none of the answers that fit is to be learned.
    """
    ends = [n for n, turn in enumerate(messages, 1) if turn["role"] == "assistant"]
    for left_out, end in enumerate(reversed(ends)):
        ids, is_answer = chat_ids(tokenizer, messages[:end])
        if len(ids) <= row:
            if ids[0] != tokenizer.bos or tokenizer.bos in ids[1:]:
                raise BadInput(f"tokenizer {tokenizer.name!r} has no bos token, or writes it "
                               "inside conversations too, so they could not be told apart in a row")
            classes = token_classes(messages[:end], is_answer)
            if ANSWER not in classes:       # none of the answers that fit is to be learned
                break
            return list(zip(ids, classes)), left_out
    return [], len(ends)


def token_classes(messages, is_answer):
    """Return the class of each token of a conversation, given which of them belong to answers.

    The answers are the runs of True in is_answer, in order. One that is not to be learned is
    PADDING: never a target, whatever --answers_only.
    """
    mask = np.array(is_answer)
    classes = np.where(mask, ANSWER, TEXT)
    classes[0] = PADDING
    learn = [turn.get("learn", True) for turn in messages if turn["role"] == "assistant"]
    if not all(learn):
        number = (mask & ~np.insert(mask[:-1], 0, False)).cumsum()      # of the run, from 1
        if number[-1] != len(learn):
            raise BadInput("answers that follow each other, or that the chat template rewrites, "
                           "cannot be told apart, so one of them cannot be left unlearned")
        classes[mask & ~np.array([True, *learn])[number]] = PADDING
    return classes.tolist()


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
               shard_tokens=20_000_000, overwrite=False, skip_bad=False):
    """Pack documents into rows and write them as a corpus, all or nothing.

    documents  iterable of (split, document) or (split, document, its place in a file); split is
               "train" or "val", and a document is what `fit` takes
    fit        (tokenizer, document, row) -> ([(id, class), ...] of at most row tokens, how much was
               left out); by default documents are conversations (messages)
    skip_bad   True: leave out and count documents for which fit raises BadInput, as a chat template
               does that knows no system turn
    returns    meta.json as a dict. Per split: documents; those truncated and dropped because of
               their length; rows; tokens with padding; filled, the tokens without; bytes of answers
    """
    row, sha256, token_bytes = block_size + 1, hashlib.sha256(), tokenizer.token_bytes()
    bad = []
    with atomic_folder(folder, overwrite) as temporary:
        writers = {split: RowWriter(temporary, split, tokenizer, row, shard_tokens)
                   for split in SPLITS}
        for number, (split, document, *place) in enumerate(documents, 1):
            sha256.update(json.dumps([split, document]).encode())
            try:
                pairs, left_out = fit(tokenizer, document, row)
            except BadInput as error:
                bad.append(f"{place[0] if place else f'document {number}'}: {error}")
                if not skip_bad:
                    raise BadInput(bad[0]) from None
                continue
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
        if bad:
            print(f"skipped {len(bad)} of {number}; the first: {bad[0]}")
        return write_meta(temporary, tokenizer, sha256.hexdigest(), splits | masks, row)


def prepare(name, documents, block_size, options, fit=fit_conversation, skip_bad=False):
    """Write the packed corpus DATA_DIR/NAME/TOKENIZER (see write_rows), unless it exists.

    options  PrepareOptions
    """
    def write(folder, tokenizer):
        return write_rows(folder, tokenizer, documents, block_size, fit,
                          overwrite=options.overwrite, skip_bad=skip_bad)
    prepare_once(name, options, write, describe_rows, block_size + 1)


def describe_rows(meta, total):
    """Return what a new packed corpus holds, in one line."""
    filled = 100 * total["filled"] / total["tokens"]
    val = meta["splits"]["val"]
    return (f"{total['documents']:,} documents ({val['documents']:,} held out) in "
            f"{total['rows']:,} rows of {meta['row']} tokens, {filled:.1f} % filled; "
            f"{total['truncated']:,} truncated at a turn and {total['dropped']:,} dropped, being "
            "longer than a row")
