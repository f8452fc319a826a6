"""Records as people have them: every key is read, or named in one line. Nothing that changes the
meaning is ignored."""
import json
import sys

import pytest

from configurator import BadInput
from data.dataset import ANSWER, PADDING, TEXT
from data.files import find_files, read_texts
from data.packing import fit_conversation, read_conversations, read_pairs
from data.tokenizer import load_tokenizer

TOK = load_tokenizer("bytes")


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def read_one(read, tmp_path, record):
    """Return what is read from a file of one record."""
    (tmp_path / "in.jsonl").write_text(json.dumps(record), encoding="utf-8")
    (value,) = read(tmp_path / "in.jsonl")
    return value


ALPACA = {"instruction": "q", "input": "", "output": "a"}
CONVERSATIONS = [(ALPACA, [user("q"), answer("a")]),
                 ({**ALPACA, "system": "s", "history": [["x", "y"], ["z", "w"]]},
                  [system("s"), user("x"), answer("y"), user("z"), answer("w"), user("q"),
                   answer("a")]),
                 ({"system_prompt": "s", "question": "q", "response": "a", "id": 3},
                  [system("s"), user("q"), answer("a")]),
                 ({"instruction": "q", "context": "c", "response": "a", "category": "open"},
                  [user("q\nc"), answer("a")]),
                 ({"prompt": [system("s"), user("q")], "completion": [answer("a")]},
                  [system("s"), user("q"), answer("a")]),
                 ({"conversations": [{"from": "human", "value": "q"},
                                     {"from": "gpt", "value": "a"}], "system": "s", "tools": ""},
                  [system("s"), user("q"), answer("a")]),
                 ({"messages": [system("s"), user("q"), answer("a")], "system": "s", "prompt": "q",
                   "prompt_id": "7", "tools": None}, [system("s"), user("q"), answer("a")]),
                 ({"messages": [user([{"type": "text", "text": "q"},
                                      {"type": "text", "text": "r", "image_url": None}]),
                                answer("a", tool_calls=[])]}, [user("qr"), answer("a")]),
                 ({"messages": [user("q"), answer("a", weight=0), user("r"),
                                answer("b", weight=1)]},
                  [user("q"), answer("a", learn=False), user("r"), answer("b")]),
                 ({"messages": [{**user("q"), "train": False}, answer("a", train=False), user("r"),
                                answer("b", loss_mask=True)]},
                  [user("q"), answer("a", learn=False), user("r"), answer("b")]),]


@pytest.mark.parametrize("record, messages", CONVERSATIONS)
def test_what_a_record_says_is_read(tmp_path, record, messages):
    """The system text, the history and the marks of turns were dropped without a word."""
    assert read_one(read_conversations, tmp_path, record) == messages


PAIR = {"chosen": [user("q"), answer("yes")], "rejected": [user("q"), answer("no")]}
TEXTS = {"chosen": "yes", "rejected": "no"}
PAIRS = [({"prompt": "q", **PAIR}, [user("q")]),
         ({"prompt": "q", **PAIR, "system": "s"}, [system("s"), user("q")]),
         ({**PAIR, "system": "s"}, [system("s"), user("q")]),
         ({"prompt": [system("s"), user("q")], **PAIR}, [system("s"), user("q")]),
         ({"prompt": [user("x"), answer("y"), user("q")], **PAIR},
          [user("x"), answer("y"), user("q")]),
         ({"prompt": "x",
           **{side: [user("x"), answer("y"), *turns] for side, turns in PAIR.items()}},
          [user("x"), answer("y"), user("q")]),
         ({"prompt": "q", "messages": PAIR["chosen"], **PAIR, "score_chosen": 8,
           "score_rejected": 2}, [user("q")]),
         ({"conversations": [{"from": "human", "value": "q"}],
           "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}},
          [user("q")]), ({"instruction": "q", "input": "c", **TEXTS}, [user("q\nc")]),
         ({"system": "s", "question": "q", **TEXTS}, [system("s"), user("q")]),
         ({"prompt": "q", "history": [["x", "y"]], **TEXTS}, [user("x"), answer("y"), user("q")]),
         ({side: f"\n\nHuman: x\n\nAssistant: y\n\nHuman: q\n\nAssistant: {text}"
           for side, text in TEXTS.items()}, [user("x"), answer("y"), user("q")]),]


@pytest.mark.parametrize("record, prompt", PAIRS)
def test_the_whole_prompt_of_a_pair_is_read(tmp_path, record, prompt):
    """A system column, and what prompt said beyond the turns that chosen repeats, were dropped."""
    assert read_one(read_pairs, tmp_path, record) == (prompt, "yes", "no")


REFUSED = [(read_conversations, record, says) for record, says in [
    ({"messages": [user("q"), answer("a")], "tools": "[{}]"},
     "the key 'tools' is not understood in a conversation"),
    ({"messages": [user("q"), answer("a", reasoning_content="r")]},
     "turn 2: the key 'reasoning_content' is not understood in a turn"),
    ({"messages": [user("q"), answer(None, tool_calls=[{}])]}, "turn 2: the key 'tool_calls'"),
    ({"messages": [user("q"), answer("a"), {"role": "tool", "content": "r"}]},
     "turn 3: unknown role 'tool'"),
    ({"messages": [user([{"type": "image_url", "image_url": {"url": "u"}}]), answer("a")]},
     "turn 1: the key 'image_url' is not understood in a part"),
    ({"messages": [user(["q"]), answer("a")]},
     "turn 1: content in parts is a list of {'type': 'text'"),
    ({"messages": [user("q"), answer("a", weight=0.5)]},
     "turn 2: 0.5 says whether it is learned; that must be 0 or 1"),
    ({"messages": [user("q"), answer("a", weight=1, train=False)]},
     "turn 2: weight and train differ"),
    ({"messages": [{**user("q"), "train": True}, answer("a")]},
     "turn 1: marked as to be learned, which only answers are"),
    ({"messages": [user("q"), answer("a", weight=0)]},
     "all answers are marked as not to be learned"),
    ({"messages": [system("s"), user("q"), answer("a")], "system": "t"},
     "system differs from the system turn"),
    ({"messages": [user("q"), answer("a")], "prompt": "another"},
     "its prompt is not in its messages"),
    ({**ALPACA, "response": "b"}, "output and response differ"),
    ({**ALPACA, "history": ["x", "y"]}, "history is a list of [question, answer] lists"),
    ({**ALPACA, "history": 5}, "history is a list of [question, answer] lists"),
    ({**ALPACA, "instruction": [user("q")], "input": "c"}, "input or context is text that follows"),
    ({**ALPACA, "few_shot": "x"},
     "the key 'few_shot' is not understood in a single exchange, which may have instruction,"),
    ({"messages": "", "x": 1}, "the key 'x' is not understood"),
    ({"data": 1}, "it has the keys data"),
    ({**TEXTS, "prompt": "q"}, "the key 'chosen' is not understood in a single exchange"),
]] + [(read_pairs, record, says) for record, says in [
    ({"prompt": "another", **PAIR}, "prompt differs from the prompt in chosen and rejected"),
    ({"prompt": [user("q"), answer("y"), user("r")], **PAIR},
     "prompt differs from the prompt in chosen and rejected"),
    ({"prompt": [system("s"), user("q")], **TEXTS, "system": "t"},
     "system differs from the system turn"),
    ({"prompt": "q", **TEXTS, "label": True},
     "the key 'label' is not understood in a preference pair"),
    ({"prompt": "q", "rejected": "no", "chosen": [answer("yes", weight=0)]},
     "chosen is marked as not to be learned"),
]]


@pytest.mark.parametrize("read, record, says", REFUSED)
def test_what_is_not_understood_is_named_by_file_and_line_and_counted(
        tmp_path, capsys, read, record, says):
    good = {"prompt": "q", **TEXTS} if read is read_pairs else ALPACA
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, record])), encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(list(read(path, skip_bad=True))) == 1
    assert f"skipped 1 of 2; the first: {path}:2: " in capsys.readouterr().out


DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello"


@pytest.mark.parametrize("record, expected", [
    ({"instruction": "", "input": "What is rain?", "output": "Water."},
     [user("What is rain?"), answer("Water.")]),
    ({"instruction": "Write.", "output": DIALOGUE}, [user("Write."), answer(DIALOGUE.strip())]),
    ({"prompt": DIALOGUE + "\n\nHuman: q\n\nAssistant:", "response": "a"},
     [user("hi"), answer("hello"), user("q"), answer("a")])])
def test_only_a_question_is_read_as_a_transcript(record, expected, tmp_path):
    assert read_one(read_conversations, tmp_path, record) == expected


def test_a_pair_may_quote_a_transcript_or_be_one(tmp_path):
    quoted = {"prompt": "Write.", "chosen": DIALOGUE, "rejected": "no"}
    assert read_one(read_pairs, tmp_path, quoted) == ([user("Write.")], DIALOGUE.strip(), "no")
    told = {"chosen": DIALOGUE, "rejected": DIALOGUE + " you"}
    assert read_one(read_pairs, tmp_path, told) == ([user("hi")], "hello", "hello you")
    asked = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " yes", "rejected": " no"}
    assert read_one(read_pairs, tmp_path, asked) == ([user("q")], "yes", "no")
    unused = {"context": "Green sky.", "chosen": [user("Colour?"), answer("green")],
              "rejected": [user("Colour?"), answer("blue")]}
    with pytest.raises(BadInput, match="prompt differs"):
        read_one(read_pairs, tmp_path, unused)


def test_an_answer_of_weight_0_is_context_and_not_learned(tmp_path):
    """It was learned, whatever its mark."""
    messages = read_one(read_conversations, tmp_path,
                        {"messages": [user("q"), answer("bad", weight=0), user("r"), answer("good"),
                                      user("t"), answer("worse", weight=0)]})
    pairs, left_out = fit_conversation(TOK, messages, 100)
    assert TOK.decode(
        [i for i, _ in pairs]) == "<s><用户>q<AI>bad</s><用户>r<AI>good</s><用户>t<AI>worse</s>"
    assert left_out == 0
    assert TOK.decode([i for i, kind in pairs if kind == ANSWER]) == "good</s>"
    # never a target
    assert TOK.decode([i for i, kind in pairs if kind == PADDING]) == "<s>bad</s>worse</s>"
    asked = TOK.decode([i for i, kind in pairs if kind == TEXT])
    assert asked == "<用户>q<AI><用户>r<AI><用户>t<AI>"
    # without the last exchange
    assert fit_conversation(TOK, messages, len(pairs) - 1)[1] == 1
    assert fit_conversation(TOK, messages, 10) == ([], 3), "the exchange that fits teaches nothing"
    with pytest.raises(BadInput, match="cannot be told apart, so one of them"):
        fit_conversation(TOK, [user("q"), answer("a", learn=False), answer("b")], 100)


# ---- files

def test_parquet_and_utf16_are_read(tmp_path):
    """Most chat sets of the hub are parquet; PowerShell writes UTF-16."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    records = [{"messages": [user(f"q{i}é"), answer("a", tool_calls=None)], "source": "here"}
               for i in range(3)]
    wanted = [[user(f"q{i}é"), answer("a")] for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in.parquet")
    assert list(read_conversations(tmp_path / "in.parquet")) == wanted
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    for text in (lines, json.dumps(records, indent=1)):
        (tmp_path / "in.json").write_text(text, encoding="utf-16")
        assert list(read_conversations(tmp_path / "in.json")) == wanted
    parquet.write_table(pyarrow.Table.from_pylist([*records, {"messages": [user("q")]}]),
                        tmp_path / "in.parquet")
    with pytest.raises(BadInput, match="in.parquet, row 4: conversation without an assistant turn"):
        list(read_conversations(tmp_path / "in.parquet"))
    parquet.write_table(pyarrow.Table.from_pylist([{"text": None}, {"text": "x"}, {"text": " "}]),
                        tmp_path / "text.parquet")
    assert list(read_texts(tmp_path / "text.parquet")) == ["x"]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": 5}]), tmp_path / "text.parquet")
    for path, says in (("text.parquet",
                        "text.parquet, row 1: not a JSON object with a field 'text'"),
                       ("in.parquet", "in.parquet: has no column 'text'; it has messages, source"),
                       ("broken.parquet", "broken.parquet: cannot be read as .parquet"),
                       ("none.parquet", "none.parquet: no such file")):
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(BadInput, match=says):
            list(read_texts(tmp_path / path))


def test_conversations_in_parquet_name_the_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput,
                       match="in.parquet: reading .parquet needs pyarrow: pip install pyarrow"):
        list(read_conversations(tmp_path / "in.parquet"))


def test_what_is_not_the_file_itself_is_named(tmp_path):
    (tmp_path
     / "lfs.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (tmp_path / "half.jsonl").write_bytes("\ufeff{".encode("utf-16-le") + b"x")
    for name, says in (("lfs.txt",
                        "lfs.txt: is a git-lfs pointer, not the file itself; run git lfs pull"),
                       ("half.jsonl", "half.jsonl: not utf-16-le .truncated data at byte 4")):
        with pytest.raises(BadInput, match=says):
            list(read_texts(tmp_path / name))
    for inputs, says in ((f"{tmp_path},{tmp_path / 'no'}", "--input: .*no: no such file or folder"),
                         (f"{tmp_path / 'lfs.txt'}", "--input: .*lfs.txt: no .json file there")):
        with pytest.raises(BadInput, match=says):
            find_files(inputs, (".json",) if "lfs" in inputs else (".txt",))
