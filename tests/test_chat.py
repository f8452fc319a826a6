"""Conversations: what is read, what is refused, how it is packed, what the loss sees, and how
answers are scored."""
import importlib.util
import io
import json
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import sample
from configurator import ROOT, BadInput
from data.corpus import write_corpus
from data.dataset import ANSWER, PADDING, TEXT, Split, held_out_loss, make_batches, open_corpus
from data.packing import read_conversations, read_pairs, read_questions, write_rows
from data.tokenizer import chat_ids, load_tokenizer
from model import MiniCPM, MiniCPMConfig, init_weights
from tools import evaluate

TOK = load_tokenizer("bytes")


def script(name):
    """data/NAME/prepare.py as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}",
                                                  ROOT / "data" / name / "prepare.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def talk(*texts):
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def talks(n, seed=0):
    """n conversations of different lengths, no two alike, (split, messages)."""
    rng = random.Random(seed)
    return [("train" if i % 5 else "val",
             talk(f"q{i}" + "x" * rng.randrange(30), f"a{i}" + "y" * rng.randrange(20),
                  *([f"more{i}", "z"] if i % 3 == 0 else []))) for i in range(n)]


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records),
                    encoding="utf-8")
    return path


# ---- reading

def test_the_common_shapes_read_the_same(tmp_path):
    messages, wanted = [{"role": "user", "content": " hi "},
                        {"role": "assistant", "content": "yo"}], talk("hi", "yo")
    records = [{"messages": messages},
               {"conversations": [{"from": "human", "value": "hi"},
                                  {"from": "gpt", "value": "yo"}]},
               {"instruction": "hi", "output": "yo", "input": ""},
               {"messages": [*messages, {"role": "user", "content": "unanswered"}]}]
    assert list(read_conversations(write(tmp_path / "a.jsonl", *records, ""))) == [wanted] * 4
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(records, indent=1), encoding="utf-8")
    assert list(read_conversations(tmp_path / "a.json")) == [wanted] * 4
    both = write(tmp_path / "b.jsonl",
                 {"instruction": "Add", "input": "1 2", "output": "3", "family": "sums"},
                 {"messages": talk("a", "b", "c", "d")})
    assert list(read_questions(both)) == [(talk("Add\n1 2"), "3", "sums"),
                                          (talk("a", "b", "c"), "d", "")]
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r"},
             {"prompt": talk("p"), "chosen": talk("p", "c"), "rejected": talk("p", "r")},
             {"prompt": "p", "chosen": talk("x", "c")[1:], "rejected": " r"},
             {"chosen": talk("p", "c"), "rejected": talk("p", "r")}]
    assert list(read_pairs(write(tmp_path / "p.jsonl", *pairs))) == [(talk("p"), "c", "r")] * 4


BAD = [(read_conversations, record, says) for record, says in [
    ({"messages": talk("hi")}, "without an assistant turn"),
    ({"messages": []}, "without an assistant turn"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "turn 1: unknown role 'robot'"),
    ({"messages": talk("hi", " \n")}, "turn 2: empty answer"),
    ({"messages": talk("", "yo")}, "turn 1: empty text"),
    ({"messages": [{"role": "user"}]}, "turn 1: empty text"),
    ({"messages": "hi"}, "messages are a list"), ({"messages": ["hi"]}, "messages are a list"),
    ({"messages": [{"role": []}]}, "unknown role"),
    ({"instruction": "hi"}, "turn 2: empty answer"),
    ({"text": "hi"}, "holds neither messages"), ([1], "not a JSON object"),
    ('{"messages": [', "not JSON (Expecting value"),
    ("{'a': 1}", "not JSON (Expecting property name enclosed in double quotes, column 2)"),
    ({"messages": talk("hi", "\ud800")}, "lone surrogate"),
]] + [(read_questions, {"messages": [*talk("a"), {"role": "system", "content": "s"},
                                     *talk("a", "b")[1:]]}, "does not follow a user's turn")] + [
    (read_pairs, record, says) for record, says in [
        ({"prompt": "p", "chosen": "c"}, "unbalanced pair: rejected is missing"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "chosen is missing or empty"),
        ({"prompt": "p", "chosen": "c ", "rejected": "c"}, "chosen equals rejected"),
        ({"chosen": "c", "rejected": "r"}, "the prompt does not end with the user"),
        ({"prompt": "p", "chosen": talk("p", "c"), "rejected": talk("q", "r")},
         "answer different prompts"),
        ({"prompt": "p", "chosen": talk("p"), "rejected": "r"},
         "chosen does not end with the assistant"),
        ({"prompt": 5, "chosen": "c", "rejected": "r"}, "list of objects")]]


@pytest.mark.parametrize("read, record, says", BAD)
def test_bad_records_are_named_by_file_and_line_and_skipped_only_on_request(
        tmp_path, capsys, read, record, says):
    good = {"prompt": "p", "chosen": "c",
            "rejected": "r"} if read is read_pairs else {"messages": talk("a", "b")}
    path = write(tmp_path / "x.jsonl", good, "", record, good)
    with pytest.raises(BadInput) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}:3: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(list(read(path, skip_bad=True))) == 2
    assert f"skipped 1 of 3; the first: {path}:3: " in capsys.readouterr().out


def test_files_without_readable_records(tmp_path):
    (tmp_path / "list.json").write_text('[{"messages": []},\n {]')
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    for name, says in (("none.jsonl", "no such file"), ("list.json", "list.json:2: not JSON"),
                       ("latin.jsonl", "latin.jsonl:1: 'utf-8' codec")):
        with pytest.raises(BadInput, match=re.escape(str(tmp_path / name)[-10:])) as caught:
            list(read_conversations(tmp_path / name))
        assert says in str(caught.value)


# ---- packing

def conversations_in(split):
    """Return [(ids, classes)] of each conversation of a split, with the padding that follows it."""
    tokens, classes = (part.read(0, split.n_tokens).reshape(-1, split.row)
                       for part in (split, split.classes))
    out = []
    for row, kinds in zip(tokens, classes):
        starts = np.flatnonzero(row == TOK.bos)
        assert starts[0] == 0
        out += [(row[a:b].tolist(), kinds[a:b].tolist())
                for a, b in zip(starts, [*starts[1:], split.row])]
    return out


def test_every_conversation_is_packed_whole_and_masked(tmp_path):
    said = talks(400)
    meta = write_rows(tmp_path / "a", TOK, said, 120, shard_tokens=40 * 121)
    for name in ("train", "val"):
        split, found, filled = Split(tmp_path / "a", name), Counter(), 0
        for ids, kinds in conversations_in(split):
            length = max(i for i, kind in enumerate(kinds) if kind == ANSWER) + 1
            assert ids[length:] == [TOK.eos] * (len(ids) - length)
            assert kinds[length:] == [PADDING] * (len(ids) - length)
            found[tuple(ids[:length]), tuple(kinds[:length])] += 1
            filled += length
        wanted = Counter()
        for s, messages in said:
            if s == name:
                ids, answer = chat_ids(TOK, messages)
                wanted[tuple(ids),
                       (PADDING, *(ANSWER if learn else TEXT for learn in answer[1:]))] += 1
        entry = meta["splits"][name]
        assert found == wanted
        assert (entry[
            "documents"], entry["filled"], entry["tokens"]) == (len(wanted), filled, split.n_tokens)
        assert entry["bytes"] == sum(len(m["content"]) for s, messages in said if s == name
                                     for m in messages if m["role"] == "assistant")
    assert meta["splits"]["train"]["filled"] > 0.95 * meta["splits"]["train"]["tokens"]
    assert len(meta["splits"]["train"]["shards"]) > 1
    assert all(n % 121 == 0 for entry in meta["splits"].values()
               for n in entry["counts"]), "shards hold whole rows"


def test_long_conversations_are_cut_at_a_turn_or_dropped(tmp_path):
    three = talk("q" * 10, "a" * 10, "r" * 10, "b" * 10, "s" * 10, "c" * 10)        # 1 + 3 * 23 ids
    said = [("train", three), ("train", talk("x" * 60, "y")),
            ("train", talk("x", "y" * 60, "q", "a")), ("val", three[:2])]
    for block_size, exchanges, counts in ((69, 3, (3, 0, 0)), (68, 2, (3, 2, 0)),
                                          (46, 2, (1, 1, 2)), (45, 1, (1, 1, 2))):
        entry = write_rows(tmp_path / str(block_size), TOK, said, block_size)["splits"]["train"]
        assert (entry["documents"], entry["truncated"], entry["dropped"]) == counts
        found = [ids for ids, _ in conversations_in(Split(tmp_path / str(block_size), "train"))]
        wanted = chat_ids(TOK, three[:2 * exchanges])[0]
        assert wanted + [TOK.eos] * (block_size + 1 - len(wanted)) in found
    with pytest.raises(BadInput, match="no train documents of at most 11 tokens"):
        write_rows(tmp_path / "none", TOK, said, 10)
    assert not (tmp_path / "none").exists()
    one_mark = load_tokenizer("bytes")
    # as in some released tokenizers: doc_ids would be wrong
    one_mark.bos = one_mark.eos
    with pytest.raises(BadInput,
                       match="document 1: tokenizer 'bytes' has no bos token, or writes it inside"):
        write_rows(tmp_path / "none", one_mark, said, 69)


def tiny():
    model = MiniCPM(MiniCPMConfig(vocab_size=TOK.n_vocab, n_layer=2, n_head=2, n_embd=32, n_ff=64,
                                  dim_model_base=32))
    init_weights(model, 0)
    return model.eval()


@torch.no_grad()
def test_a_packed_row_gives_every_conversation_what_it_gets_alone(tmp_path):
    """Attention and positions do not cross conversations: losses are equal, and bits per byte are
    of answers alone."""
    said, model = talks(40), tiny()
    write_rows(tmp_path / "a", TOK, said, 120)
    split = Split(tmp_path / "a", "train")
    batch, n = make_batches(
        lambda name: split, 0, 120, TOK.bos)([[0, "a"]], 0, split.n_tokens // split.row)
    nll, _ = model(batch["idx"], batch["targets"], doc_ids=batch["doc_ids"])
    alone, answers, size = [], 0, 0
    for s, messages in said:
        if s == "train":
            ids, answer = chat_ids(TOK, messages)
            targets = torch.tensor([[i if learn else -100
                                     for i, learn in zip(ids[1:], answer[1:])]])
            one, _ = model(torch.tensor([ids[:-1]]), targets)
            alone += one[targets >= 0].tolist()
            answers += sum(answer)
            size += sum(len(m["content"]) for m in messages[1::2])
    packed = nll[batch["targets"] >= 0]
    assert n == answers == len(packed)
    assert packed.sort().values.sub(torch.tensor(alone).sort().values).abs().max() < 1e-5
    nats, targets, n_bytes = held_out_loss(model, split, TOK.token_bytes(), 120, split.n_tokens, 4,
                                           "cpu", TOK.bos).sum(axis=1)
    assert (targets, n_bytes) == (answers, size) and nats == pytest.approx(sum(alone), rel=1e-6)


def test_batches_mix_text_and_conversations(tmp_path):
    write_rows(tmp_path / "talk", TOK, talks(200), 64)
    write_corpus(tmp_path / "text", TOK,
                 [(split, "plain words " * 300) for split in ("train", "val")])
    splits = {name: Split(tmp_path / name, "train") for name in ("talk", "text")}
    plan = [[0, "text"], [8, "text:0.5,talk:0.5"]]
    wanted = {}
    for answers_only, least in ((True, ANSWER), (False, TEXT)):
        batch, n = make_batches(splits.get, 3, 64, TOK.bos, answers_only)(plan, 0, 40)
        again = make_batches(splits.get, 3, 64, TOK.bos, answers_only)(plan, 30, 10)[0]
        assert all(torch.equal(batch[key][30:], again[key]) for key in batch)
        assert n == int((batch["targets"] >= 0).sum())
        idx, targets = batch["idx"], batch["targets"]
        text = (targets >= 0).all(1)
        assert text[:8].all() and 8 < int((~text).sum()) < 24
        assert torch.equal(targets[text][:, :-1], idx[text][:, 1:])
        rows = splits["talk"].read(0, splits["talk"].n_tokens).reshape(-1, 65).tolist()
        for i in torch.where(~text)[0].tolist():
            at = [row[:-1] for row in rows].index(idx[i].tolist())                 # a whole row
            kinds = splits["talk"].classes.read(at * 65 + 1, 64)
            assert targets[i].tolist() == [t if kind >= least else -100
                                           for t, kind in zip(rows[at][1:], kinds)]
            assert (targets[i] != TOK.bos).all(), "the <s> of the next conversation is not a target"
        wanted[answers_only] = n
    assert wanted[True] < wanted[False]
    seen = [make_batches({"talk": splits[
        "talk"]}.get, 3, 64)([[0, "talk"]], i, 1)[0]["idx"].tolist()[0] for i in range(len(rows))]
    assert sorted(seen) == sorted(row[:-1] for row in rows), "an epoch reads every row once"


def test_the_block_size_must_be_that_of_the_packed_corpus(tmp_path, capsys):
    import train
    write(tmp_path / "in.jsonl", *({"messages": messages} for _, messages in talks(60)))
    prepare = [f"--input={tmp_path / 'in.jsonl'}", "--name=mine", "--tokenizer=bytes",
               f"--data_dir={tmp_path}", "--block_size=64", "--val_share=0.2"]
    script("chat").main(prepare)
    said = capsys.readouterr().out
    corpus = open_corpus(tmp_path, "mine", TOK, "train")
    assert corpus.row == 65
    assert re.search(r"mine: 60 documents \(\d+ held out\) in \d+ "
                     r"rows of 65 tokens, \d\d\.\d % filled; 0 trunc", said)
    train_on = ["--data=mine", "--tokenizer=bytes", f"--data_dir={tmp_path}", "--doc_mask=True",
                f"--out_dir={tmp_path / 'run'}", "--n_layer=1", "--n_head=2", "--n_embd=32",
                "--n_ff=32", "--max_steps=2", "--sample_tokens=0", "--quiet=True",
                "config/laptop.py"]
    for main, argv, says in (
            (train.main, [train_on[-1], *train_on[:-1], "--block_size=128"],
             r"--block_size=128: mine is packed in rows for --block_size=64; use that, or prepare "
             r"mine again with --block_size=128 --ov"),
            (script("chat").main, [*prepare, "--block_size=128"],
             r"--block_size=128: .*mine.bytes was prepared with 64; --overwrite=True prepares it "
             r"again"),
            (script("chat").main, [*prepare[:1], "--name=instruct"],
             "--name=instruct: .* none of the shipped"),
            (script("chat").main,
             [f"--input={tmp_path / 'bytes'}", *prepare[1:], "--overwrite=True"],
             "--input: .*bytes: no .jsonl, .json, .parquet file there")):
        (tmp_path / "bytes").mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and re.match(
            says, error := capsys.readouterr().err) and error.count("\n") == 1, error
    train.main([train_on[-1], *train_on[:-1], "--block_size=64"])
    # all that goes with it: no cloze
    evaluate.main([f"--ckpt={tmp_path / 'run'}", f"--data_dir={tmp_path}", "--json=True"])
    result = json.loads(capsys.readouterr().out)
    assert result["bpb"] > 1 and result["block_size"] == 64 and "cloze" not in result
    assert "exact" not in result
    for task, says in (("cloze", "--task=cloze: mine is packed in rows"),
                       ("exact", f"--task=exact: no {tmp_path / 'mine' / 'test.jsonl'}; name")):
        with pytest.raises(SystemExit):
            evaluate.main([f"--ckpt={tmp_path / 'run'}", f"--data_dir={tmp_path}",
                           f"--task={task}"])
        assert capsys.readouterr().err.startswith(says)
    evaluate.main([f"--ckpt={tmp_path / 'run'}", f"--questions_file={tmp_path / 'in.jsonl'}",
                   "--task=exact", "--questions=4", "--answer_tokens=3"])
    assert re.search(r"exact 0.0 \+- 0.0 % of 4 questions, \d\.\d tokens per answer\n$",
                     capsys.readouterr().out)


# ---- instructions

def solve(family, question):
    """The answer from the question alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if family in ("add", "larger"):
        return str({"add": sum, "larger": max}[family](numbers))
    if family == "sort":
        return " ".join(map(str, sorted(numbers)))
    if family == "count":
        letter, text = re.search(r"(?:many|the|does) (\w) .*?((?: \w){6})\W?$", question).groups()
        return str(text.split().count(letter))
    if family == "backwards":
        return re.search(r"\b\w( \w){2,4}(?=\.| backwards| from)", question)[0][::-1]
    if family == "copy":
        return re.search(r"(\w+( \w+){4})\.?$", question)[1]
    if family == "end":
        four = re.search(r"(?:of|words:) (\w+ \w+ \w+ \w+)(?=[.?]|$)", question)[1].split()
        return four[0] if "first" in question else four[-1]
    word = next(filter(None,
                       re.search(r"^Which word follows (\w+) in this|comes "
                                 r"after (\w+)\?$|^Find the word after (\w+)\.",
                                 question).groups()))
    passage = re.search(r"\w+( \w+){5}(?=$|\. What)", question)[0].split()
    return passage[passage.index(word) + 1]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """The files made from a hundred files of torch: (module, folder, material)."""
    module, folder = script("instruct"), tmp_path_factory.mktemp("instruct")
    nn = [document
          for document in script("pytorch").documents(ROOT.__class__(torch.__file__).parent / "nn")]
    module.write_instructions(folder, nn, {"train": 4000, "test": 400})
    return module, folder, nn


def test_instructions_are_right_and_repeat(instruct, tmp_path):
    module, folder, documents = instruct
    module.write_instructions(tmp_path, documents, {"train": 4000, "test": 400})
    assert all((tmp_path / file.name).read_bytes() == file.read_bytes()
               for file in folder.iterdir())
    assert len([*folder.iterdir()]) == 4
    for name in ("train", "test"):
        questions = list(read_questions(folder / f"{name}.jsonl"))
        pairs = list(read_pairs(folder / f"pairs_{name}.jsonl"))
        assert {*Counter(family for _, _, family in questions).values()} == {len(questions) // 8}
        for (messages, answer, family), (prompt, chosen, rejected) in zip(
                questions, pairs, strict=True):
            assert chosen == evaluate.normalise(
                answer) == solve(family, messages[0]["content"]), (family, messages, answer)
            assert prompt == messages and rejected == f"The answer is {chosen}."
            assert answer in (chosen, rejected)
        long = sum(answer.startswith("The answer is") for _, answer, _ in questions)
        assert 0.4 < long / len(questions) < 0.6


def test_no_test_question_has_the_content_of_a_training_question(instruct):
    """Not in another order or wording either: sorted, what a question is about stays on one side.
    """
    _, folder, _ = instruct
    sides = []
    for name in ("train", "test"):
        asked = [(family, messages[0]["content"], answer)
                 for messages, answer, family in read_questions(folder / f"{name}.jsonl")]
        sides.append({(family,
                       solve(family, question) if family in ("sort", "backwards")
                       else tuple(sorted(re.findall(r"\d+", question)))
                       if family in ("add", "larger")
                       else tuple(sorted(solve(family, question).split())) if family == "copy"
                       else question) for family, question, _ in asked})
    assert not sides[0] & sides[1] and len(sides[1]) > 200


# ---- exact match

class Parrot:
    """Answers from a book, by the prompt; afterwards it goes on talking, as rows do until all have
    stopped."""

    def __init__(self, book):
        self.book = {tuple(chat_ids(TOK, talk(question), generate=True)[0]): TOK.encode(answer)
                     for question, answer in book.items()}

    def generate(self, prompts, max_new_tokens, temperature, stop_ids, never_ids):
        assert temperature == 0 and stop_ids == [TOK.eos] and never_ids == [TOK.bos]
        said = [(self.book[tuple(prompt)] + [TOK.eos] * max_new_tokens)[:max_new_tokens]
                for prompt in prompts]
        return (torch.tensor(step) for step in zip(*said))


def test_exact_match_takes_both_styles_and_nothing_else(tmp_path):
    book = {"1": "7", "2": "The answer is 7.", "3": " 7.", "4": "The answer is 70.", "5": "77",
            "6": "", "7": "7 7"}
    wanted = ["The answer is 7.", "7", "7", "7", "7", "7", "The answer is 77."]
    file = write(tmp_path / "q.jsonl",
                 *({"messages": talk(question, answer),
                    "family": "odd" if int(question) % 2 else "even"}
                   for question, answer in zip(book, wanted)))
    config = evaluate.EvaluateConfig(batch_size=3)
    result = evaluate.exact(Parrot(book), TOK, config, file)
    assert result["exact"] == 3 / 7 and result["exact_questions"] == 7
    assert result["answer_tokens"] == sum(map(len, book.values())) / 7
    assert {name: (share, n) for name, (share, _, n) in result[
        "families"].items()} == {"odd": (0.5, 4), "even": (1 / 3, 3)}
    assert result["exact_se"] == pytest.approx((3 / 7 * 4 / 7 / 7) ** 0.5)
    assert evaluate.exact(Parrot(book), TOK, evaluate.EvaluateConfig(questions=2),
                          file)["exact_questions"] == 2
    assert evaluate.exact(Parrot(book), TOK, evaluate.EvaluateConfig(answer_tokens=1),
                          file)["exact"] == 0, "one that has not ended is not right"


# ---- a conversation on the terminal

class Talker:
    """Says the same to everything; keeps each prompt, its length and the tokens asked for."""

    def __init__(self, answer, max_position):
        self.answer, self.asked = answer, []
        self.config = MiniCPMConfig(max_position=max_position)

    def generate(self, prompts, max_new_tokens, *rest):
        self.asked.append((TOK.decode(prompts[0]), len(prompts[0]), max_new_tokens))
        ids = [*TOK.encode(self.answer), TOK.eos]
        return iter([torch.tensor([i]) for i in ids[:max_new_tokens]])


@pytest.fixture
def say(monkeypatch, capsys):
    """A function that holds a conversation of lines of bytes; it gives (model, output, notes)."""
    def hold(lines, answer="yes", max_position=4096, **options):
        config, model = sample.SampleConfig(chat=True, **options), Talker(answer, max_position)
        assert not config.problems()
        # as exits_cleanly sets it
        stdin = io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8",
                                 errors="surrogateescape")
        monkeypatch.setattr("sys.stdin", stdin)
        sample.converse(model, TOK, config)
        said = capsys.readouterr()
        return model, said.out, said.err.splitlines()
    return hold


def test_the_system_text_opens_a_conversation(say, capsys):
    model, said, notes = say([b"hi", b"more"], system=" Be brief. ")
    first = "<s>Be brief.<用户>hi<AI>"
    assert [prompt for prompt, *_ in model.asked] == [first, first + "yes</s><用户>more<AI>"]
    assert said.count("yes") == 2 and notes == [] and {n for *_, n in model.asked} == {300}
    with pytest.raises(SystemExit):
        sample.main(["--system=x"])
    assert capsys.readouterr().err == "--system: goes with --chat=True\n"


def test_a_full_context_drops_the_oldest_turns_and_says_so(say):
    """The answer may take 20 of 60 tokens: there is room for two questions and the system text."""
    lines = [b"question %d" % i for i in range(5)]
    model, _, notes = say(lines, max_position=60, max_new_tokens=20, system="Sys", answer="a")
    for i, (prompt, length, new) in enumerate(model.asked):
        assert length + new <= 60 and new == 20 and prompt.startswith("<s>Sys<用户>question ")
        asked = [int(n) for n in re.findall(r"question (\d)", prompt)]
        assert asked == list(range(max(0, i - 1), i + 1)), "whole exchanges"
    assert notes == ["the context of 60 tokens is full: the oldest 2 turns are left out"] * 3


@pytest.mark.parametrize("new_tokens", [None, 20])
def test_a_question_that_does_not_fit_is_left_out_and_the_conversation_goes_on(say, new_tokens):
    lines = [b"one", b"x" * 70, b"two"]
    model, _, (note,) = say(lines, max_position=60, max_new_tokens=new_tokens, answer="a")
    assert [prompt for prompt, *_ in model.asked] == [
        "<s><用户>one<AI>", "<s><用户>one<AI>a</s><用户>two<AI>"]
    assert note.startswith("question left out: a prompt of 73 tokens leaves no room")


def test_an_answer_takes_what_fits_unless_a_number_is_asked_for(say):
    model, _, notes = say([b"x" * 50], max_position=60)
    assert [n for *_, n in model.asked] == [60 - 53] and notes == []
    assert [n for *_, n in say([b"x"], max_position=60, max_new_tokens=9)[0].asked] == [9]
    config, model = sample.SampleConfig(), Talker("", 60)
    assert sample.with_new_tokens(config, model, [0] * 59).max_new_tokens == 1
    with pytest.raises(BadInput, match="a prompt of 60 tokens leaves no room in the context of 60"):
        sample.with_new_tokens(config, model, [0] * 60)


def test_a_byte_that_is_not_utf8_is_named_and_the_conversation_goes_on(say):
    lines = [b"one", b"caf\xe9 </s>", "用 </s>".encode(), b"", b"after an empty line"]
    model, _, notes = say(lines)
    assert [prompt for prompt, *_ in model.asked] == [
        "<s><用户>one<AI>", "<s><用户>one<AI>yes</s><用户>用 </s><AI>"]
    assert notes == ["question left out: text is not valid UTF-8: character 3 is the lone "
                     "surrogate '\\udce9' (the byte 0xe9)"]


def test_an_empty_answer_leaves_its_question_out(say):
    model, _, notes = say([b"one", b"two"], answer=" \n")
    assert [prompt.count("<AI>") for prompt, *_ in model.asked] == [1, 1]
    assert notes == ["question left out: the answer is empty"] * 2


def test_a_tokenizer_without_chat_marks_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked for a question"))
    plain = load_tokenizer("bytes")
    plain.specials = {"<s>": plain.bos, "</s>": plain.eos}
    with pytest.raises(BadInput, match="has no special token <用户>"):
        sample.converse(Talker("", 60), plain, sample.SampleConfig(chat=True))


def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path):
    (tmp_path / "prompt.txt").write_text("def f", encoding="utf-8-sig")
    config = sample.SampleConfig(prompt_file=str(tmp_path / "prompt.txt"))
    assert sample.read_prompt(config) == "def f"
