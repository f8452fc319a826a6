"""Tokenizers: exact round trips, special tokens that text cannot forge, damaged files, chat
templates."""
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from configurator import ROOT, BadInput
from data import tokenizer

NASTY = ["", " ", "hello world\n", "naïve café 漢字 用户 😀 \u200d\u0301",
         "\x00\x01\x7f\ufeff\ufffe", "a\r\nb\rc\t\t  d   ", "12345 1,000.5",
         "</s><s><用户><AI><|im_start|><|endoftext|><|reserved_0|>", " " * 5000, "x" * 5000,
         "\n \n" * 500]


@pytest.fixture(params=["bpe4096", "bytes"])
def tok(request):
    return tokenizer.load_tokenizer(request.param)


def test_sizes_and_specials(tok):
    assert tok.n_vocab == {"bpe4096": 4096, "bytes": 264}[tok.name]
    assert [tok.special(text)
            for text in tokenizer.SPECIALS] == list(range(tok.n_vocab - 8, tok.n_vocab))
    assert (tok.bos, tok.eos) == (tok.special("<s>"), tok.special("</s>"))
    with pytest.raises(BadInput, match="no special token <x>"):
        tok.special("<x>")


def test_any_text_comes_back(tok):
    rng = random.Random(0)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = NASTY + ["".join(map(chr, rng.choices(points, k=50))) for _ in range(100)]
    for text, ids in zip(texts, tok.encode_batch(texts)):
        assert ids == tok.encode(text)
        assert tok.decode(ids) == text
        assert all(i < tok.n_vocab - 8 for i in ids), "text became a special token"


def test_every_byte_has_an_id_and_ids_count_bytes(tok):
    ids = [tok.encoding.encode_single_token(bytes([b])) for b in range(256)]
    assert tok.decode_bytes(ids) == bytes(range(256))
    # half a character is shown, not raised
    assert tok.decode(np.array([ids[0xFF]])) == "\ufffd"
    # a model's padded vocabulary
    assert tok.decode([tok.n_vocab + 5]) == "\ufffd"
    sizes = tok.token_bytes()
    assert sizes.shape == (tok.n_vocab,) and sizes[-8:].tolist() == [0] * 8
    assert sizes[:-8].min() == 1
    text = NASTY[3]
    assert sizes[tok.encode(text)].sum() == len(text.encode("utf-8"))


def test_lone_surrogates_are_refused(tok):
    with pytest.raises(BadInput, match="character 1 is the lone surrogate '.udcff'"):
        tok.encode("a\udcff")
    with pytest.raises(BadInput):
        tok.encode_batch(["fine", "\ud800"])


def test_the_committed_vocabulary_is_the_one_of_all_published_numbers():
    assert tokenizer.load_tokenizer("bpe4096").hash[:16] == "1700f1f66f993103"


def test_hash_is_what_it_does_not_its_name():
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"cd": 257}
    swapped = ranks | {b"ab": 257, b"cd": 256}
    original = tokenizer.with_specials("one", ranks)
    assert original.hash == tokenizer.with_specials("two", ranks).hash
    assert original.hash == tokenizer.with_specials("one",
                                                    dict(sorted(ranks.items(), reverse=True))).hash
    others = [tokenizer.with_specials("one", swapped),
              tokenizer.Tokenizer("one", r"\S+|\s+", ranks, original.specials),
              tokenizer.Tokenizer("one", tokenizer.PATTERN, ranks,
                                  {**original.specials, "</s>": 300}),
              tokenizer.load_tokenizer("bytes"), tokenizer.load_tokenizer("bpe4096")]
    assert len({original.hash} | {other.hash for other in others}) == 6


def test_saved_tokenizer_stands_by_itself(tok, tmp_path):
    tok.save(tmp_path / "step-00000001")
    again = tokenizer.load_tokenizer(str(tmp_path / "step-00000001"))
    assert (again.name, again.hash, again.n_vocab, again.bos, again.eos) == (
        tok.name, tok.hash, tok.n_vocab, tok.bos, tok.eos)
    assert again.encode(NASTY[3]) == tok.encode(NASTY[3])
    assert not [p.name for p in tmp_path.rglob("*") if p.suffix in (".pkl", ".pt")]


def damage_last_rank(folder):
    path = folder / "tokenizer.tiktoken"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[-1] = "enp6enp6 " + lines[-1].split()[1]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("damage", [
    damage_last_rank,
    lambda folder: os.truncate(folder / "tokenizer.tiktoken", 1001),
    lambda folder: (folder / "tokenizer.tiktoken").write_bytes(b"\xff\xfe"),
    lambda folder: (folder / "tokenizer.tiktoken").write_text("", encoding="utf-8"),
    lambda folder: (folder / "tokenizer.tiktoken").unlink(),
    lambda folder: (folder / "tokenizer_config.json").unlink(),
    lambda folder: (folder / "tokenizer_config.json").write_text("{", encoding="utf-8"),
    lambda folder: (folder / "tokenizer_config.json").write_text("[]", encoding="utf-8"),
    lambda folder: (folder / "tokenizer_config.json").write_text('{"specials": {}}',
                                                                 encoding="utf-8"),
])
def test_damage_takes_one_line(damage, tmp_path):
    tokenizer.load_tokenizer("bpe4096").save(tmp_path)
    damage(tmp_path)
    with pytest.raises(BadInput, match="damaged|missing") as caught:
        tokenizer.load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_unknown_name_offers_the_closest():
    with pytest.raises(BadInput, match="did you mean bpe4096.*bytes, gpt2, cl100k_base"):
        tokenizer.load_tokenizer("bpe4069")


def test_without_a_network_gpt2_takes_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    with pytest.raises(BadInput, match="gpt2.*needs a network") as caught:
        tokenizer.load_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


# ---- chat

def test_chat_template_and_mask(tok):
    user, answer = tok.special("<用户>"), tok.special("<AI>")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 2+2?\n"},
                {"role": "assistant", "content": " 4 </s> "}, {"role": "user", "content": "3+3?"}]
    ids, mask = tokenizer.chat_ids(tok, messages, generate=True)
    four = tok.encode("4 </s>")
    assert ids == [tok.bos, *tok.encode("Be brief."), user, *tok.encode("2+2?"), answer, *four,
                   tok.eos, user, *tok.encode("3+3?"), answer]
    assert [i for i, learn in zip(ids, mask) if learn] == [*four, tok.eos]
    assert len(ids) == len(mask) and ids.count(tok.eos) == 1


@pytest.mark.parametrize("messages, generate, message",
                         [([{"role": "user", "content": "  "}], False,
                           "message 1: its content is empty"),
                          ([{"role": "user"}], False, "message 1: its content is empty"),
                          ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
                           False, "message 2: role"),
                          ([{"role": "user", "content": "a"},
                            {"role": "assistant", "content": "b"}], True, "last message"),
                          ([], True, "last message"),])
def test_bad_chats_take_one_line(messages, generate, message):
    with pytest.raises(BadInput, match=message):
        tokenizer.chat_ids(tokenizer.load_tokenizer("bytes"), messages, generate)


CONVERSATION = [
    {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hi hi\nthere"},
    {"role": "user", "content": "漢 user"}, {"role": "assistant", "content": "漢字 </s> hi"},
    {"role": "user", "content": "assistant"}, {"role": "assistant", "content": "there"}]


def learned(tok, said):
    """The text of all that is learned of a conversation."""
    ids, mask = tokenizer.chat_ids(tok, said)
    return tok.decode([i for i, learn in zip(ids, mask) if learn])


def assert_training_continues_prompts(tok, said, answers, ended=True):
    """Three turns: the ids of each prompt and then of its answer begin the ids of training.

    answers: what each answer decodes to with all that is learned. ended: earlier ones have a mark.
    """
    ids, mask = tokenizer.chat_ids(tok, said)
    end, first = 0, [n for n, message in enumerate(said) if message["role"] == "assistant"]
    assert len(first) == len(answers) == 3
    for n, answer in zip(first, answers):
        prompt, _ = tokenizer.chat_ids(tok, said[:n], generate=True)
        assert prompt == ids[:len(prompt)] and not any(mask[end:len(prompt)])
        end = (mask[len(prompt):] + [False]).index(False) + len(prompt)
        assert tok.decode(ids[len(prompt):end]) == answer
        alone, its_mask = tokenizer.chat_ids(tok, said[:n + 1])
        assert alone[:end] == ids[:end] and its_mask[:end] == mask[:end], "one turn or three"
        last = len(prompt) + sum(its_mask[len(prompt):]) - 1
        assert alone[last] in tok.stop_ids, "an end is learned"
        assert not ended or ids[end - 1] in tok.stop_ids
    assert not any(mask[end:]), "what a template writes after the end is not learned"


@pytest.mark.parametrize("system", [[], ["Be ", "br"], [" Be br", "ief. "]])
def test_our_own_conversations_have_the_same_ids_in_training_and_generation(tok, system):
    """Also with system messages in a row, whose texts meet: they are one text, as when exported."""
    said = [{"role": "system", "content": text} for text in system] + CONVERSATION
    answers = ["hi hi\nthere</s>", "漢字 </s> hi</s>", "there</s>"]
    assert_training_continues_prompts(tok, said, answers)


def test_our_own_template_is_the_exported_one(tok, tmp_path):
    """The ids are those of apply_chat_template with the template that tools/convert.py writes."""
    transformers = pytest.importorskip("transformers")
    from tools import convert
    convert.write_tokenizer(tmp_path, tok, 64)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    said = [{"role": role, "content": text} for role, text in (
        ("system", " Be br"), ("system", "ief. "), ("user", " 2+2?\n"), ("assistant", "4 "),
        ("user", "why"), ("assistant", "so\nit is"), ("system", "Now be"), ("assistant", "long"),
        ("user", "bye"))]
    for n in range(1, len(said) + 1):
        ids, mask = tokenizer.chat_ids(tok, said[:n])
        assert stock.apply_chat_template(said[:n], return_dict=False) == ids
        assert len(ids) == len(mask)
    assert re.fullmatch("4</s>so\nit is</s>.*long</s>", learned(tok, said))


def test_chat_needs_the_specials():
    plain = tokenizer.Tokenizer("plain", tokenizer.PATTERN, {bytes([b]): b for b in range(256)},
                                {"<|endoftext|>": 256})
    assert plain.bos == plain.eos == 256
    with pytest.raises(BadInput, match="'plain' has no special token <用户>"):
        tokenizer.chat_ids(plain, [{"role": "user", "content": "a"}])


# ---- training

def test_training_merges_the_commonest_pairs_and_is_repeatable(tmp_path, capsys):
    pytest.importorskip("rustbpe")
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("abcabc abcabc déjà vu\n" * 50,
                                                    encoding="utf-8")
    for name in ("one", "two"):
        tokenizer.main(["train", f"--input={tmp_path / 'text'}", "--vocab_size=268",
                        f"--out_dir={tmp_path / name}"])
    one, two = (tokenizer.load_tokenizer(str(tmp_path / name)) for name in ("one", "two"))
    assert one.n_vocab == 268 and one.name == "one" and one.hash == two.hash
    assert len(one.encode("abc")) == 1
    assert tokenizer.main(["train", f"--input={tmp_path / 'text'}", "--vocab_size=268",
                           f"--out_dir={tmp_path / 'one'}", "--overwrite=True"]) is None


@pytest.mark.parametrize("arguments, message", [
    ([], "python -m data.tokenizer train"),
    (["trian"], "python -m data.tokenizer train"),
    (["train", "--vocab_size=264"], "must be above 264"),
    (["train", "--out_dir=out/bytes"], "names the tokenizer"),
    (["train", "--vocab=300"], "did you mean --vocab_size"),
    (["train", "--input=no/such/path", "--out_dir=out/never"], "no such file or folder"),
])
def test_command_line_errors_take_one_line(arguments, message, capsys):
    pytest.importorskip("rustbpe")
    with pytest.raises(SystemExit) as caught:
        tokenizer.main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_too_little_text(tmp_path):
    pytest.importorskip("rustbpe")
    with pytest.raises(BadInput, match="too little text for 1000"):
        tokenizer.train("tiny", ["abc"], 1000)


def test_missing_trainer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(BadInput, match="pip install rustbpe"):
        tokenizer.train("x", [], 300)


def test_importing_stays_light():
    code = ("import sys, data.tokenizer; assert not {'torch', 'tokenizers', 'transformers', "
            "'huggingface_hub', 'rustbpe', 'requests'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- released tokenizers

MINICPM = ("{% for m in messages %}{{ '<用户>' + m['content'] + '<AI>' if m['role'] == 'user' "
           "else m['content'] }}{% endfor %}")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] "
          "+ '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA2 = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == "
          "'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
          "{% else %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}{% endif %}{% endfor %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' }}"
          "{{ m.content | trim + '<|eot|>' }}{% endfor %}"
          "{{ '<|header|>assistant<|/header|>\n\n' if add_generation_prompt }}")
# The end of the text stands only after the last turn (Phi-3), or only before another turn.
PHI3 = ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}")
NOT_LAST = ("{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content }}"
            "{{ eos_token if m.role == 'assistant' and not loop.last }}{% endfor %}")
# Reasoning stays in the last answer only (DeepSeek, Qwen).
THINK = ("{% for m in messages %}[{{ m.role }}]"
         "{{ m.content if loop.last else m.content.split('</think>')[-1] }}</s>{% endfor %}"
         "{% if add_generation_prompt %}[assistant]{% endif %}")
TALK = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hi\nhi 漢"},
        {"role": "user", "content": "user"}, {"role": "assistant", "content": "assistant"}]


def released_folder(folder, kind, template=MINICPM, bos="<s>", eos="</s>", **config):
    """A tiny tokenizer.json as released models have it: "sentencepiece" writes spaces as U+2581,
    "prefix" adds one in front
    as well (Llama 2), "bytes" is byte-level (GPT-2)."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    marks = ["<unk>", "<s>", "</s>", "<用户>", "<AI>", "<|im_start|>", "<|im_end|>",
             "<|header|>", "<|/header|>", "<|eot|>"]
    if kind == "bytes":
        hf = tokenizers.Tokenizer(tokenizers.models.BPE())
        hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        hf.train_from_iterator(["hi hi there"], tokenizers.trainers.BpeTrainer(
            special_tokens=marks, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    else:
        vocab = marks + [f"<0x{b:02X}>"
                         for b in range(256)] + ["\u2581", "h", "i", "hi", "\u2581hi"]
        hf = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(vocab)},
                                                        [("h", "i"), ("\u2581", "hi")],
                                                        unk_token="<unk>", byte_fallback=True,
                                                        fuse_unk=True))
        if kind == "prefix":
            hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                prepend_scheme="always", split=False)
        else:
            hf.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    hf.add_special_tokens(marks)
    hf.add_tokens(["<think>"])
    # which must not cut documents
    hf.enable_truncation(4)
    folder.mkdir(parents=True)
    hf.save(str(folder / "tokenizer.json"))
    config |= {"eos_token": eos, "chat_template": template} | ({"bos_token": bos} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def released(*args, **options):
    """The tokenizer of a released_folder."""
    return tokenizer.load_tokenizer(str(released_folder(*args, **options)))


def of_transformers(folder, messages, **options):
    """The ids of apply_chat_template."""
    import transformers
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    return hf.apply_chat_template(messages, return_dict=False, **options)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_released_tokenizer(kind, tmp_path):
    tok = tokenizer.load_tokenizer(str(released_folder(tmp_path / "MiniCPM", kind)))
    assert (tok.name, tok.bos, tok.eos, tok.encode_batch([])) == ("MiniCPM", 1, 2, [])
    for text in ["", "hi hi", "漢字 😀\n", "</s><用户>hi<AI>", "hi" * 100]:
        ids = tok.encode(text)
        assert tok.encode_batch([text]) == [ids] and tok.decode(ids) == text
        assert not set(ids) & set(tok.specials.values())
        assert tok.token_bytes()[ids].sum() == len(text.encode("utf-8"))
    assert tok.decode(tok.encode("<think>")) == "<think>"
    assert tok.token_bytes()[tok.specials["<s>"]] == 0
    with pytest.raises(BadInput, match="lone surrogate"):
        tok.encode("a\udcff")
    tok.stop_ids.append(5)
    tok.save(tmp_path / "step-00000001")
    again = tokenizer.load_tokenizer(str(tmp_path / "step-00000001"))
    assert (again.name, again.hash, again.stop_ids) == (tok.name, tok.hash, [2, 5])
    assert again.encode("hi there") == tok.encode("hi there")
    assert tokenizer.chat_ids(again, TALK) == tokenizer.chat_ids(tok, TALK)
    path = tmp_path / "step-00000001" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"hi"', '"hj"'), encoding="utf-8")
    with pytest.raises(BadInput, match="damaged"):
        tokenizer.load_tokenizer(str(tmp_path / "step-00000001"))


@pytest.mark.parametrize("kind, text", [("sentencepiece", "hi\n\thi"), ("prefix", " hi\n\thi")])
def test_a_space_in_front_is_the_vocabularys_choice(kind, text, tmp_path):
    """The class LlamaTokenizer, which MiniCPM's folders name, would put one there in any case."""
    tok = tokenizer.load_tokenizer(str(released_folder(tmp_path / "model", kind,
                                                       tokenizer_class="LlamaTokenizer")))
    assert tok.decode(tok.encode("hi\n\thi")) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "prefix", "bytes"])
@pytest.mark.parametrize("template, marks, learned", [
    (CHATML, {"bos": None, "eos": "<|im_end|>"}, "hi\nhi 漢<|im_end|>assistant<|im_end|>"),
    (LLAMA2, {}, " hi\nhi 漢 </s> assistant </s>"),
])
def test_conversations_get_the_ids_of_apply_chat_template(template, marks, learned, kind, tmp_path):
    folder = released_folder(tmp_path / "model", kind, template, **marks)
    tok = tokenizer.load_tokenizer(str(folder))
    ids, mask = tokenizer.chat_ids(tok, TALK)
    assert ids == of_transformers(folder, TALK) and len(ids) == len(mask)
    assert tok.decode([i for i, learn in zip(ids, mask) if learn]) == learned
    for n in (1, 3):
        prompt, none = tokenizer.chat_ids(tok, TALK[:n], generate=True)
        assert prompt == of_transformers(folder, TALK[:n],
                                         add_generation_prompt=True) == ids[:len(prompt)]
        assert not any(none) and mask[
            len(prompt)] and not mask[len(prompt) - 1], "an answer begins where a prompt ends"
    with pytest.raises(BadInput, match="lone surrogate"):
        tokenizer.chat_ids(tok, [{"role": "user", "content": "a\udcff"}])


@pytest.mark.parametrize("kind", ["sentencepiece", "prefix", "bytes"])
@pytest.mark.parametrize("template, marks, before, end", [
    (MINICPM, {}, "", ""),                              # only the last answer ends, with eos
    (CHATML, {"bos": None, "eos": "<|im_end|>"}, "", "<|im_end|>"),
    (CHATML, {}, "", "<|im_end|>"),                     # which the folder does not name as an end
    (LLAMA2, {}, " ", " </s>"),
    (LLAMA3, {"eos": "<|eot|>"}, "", "<|eot|>"),
    (PHI3, {}, "", "<|im_end|>"),
    (NOT_LAST, {}, "", "</s>"),
], ids=["minicpm", "chatml", "chatml-eos", "llama2", "llama3", "phi3", "not-last"])
def test_conversations_have_the_same_ids_in_training_and_generation(
        template, marks, before, end, kind, tmp_path):
    tok = released(tmp_path / "model", kind, template, **marks)
    if kind == "prefix" and template == MINICPM:
        before = " "                                    # the vocabulary's, after the mark <AI>
    said = [message["content"] for message in CONVERSATION[1::2]]
    answers = [before + text + end for text in said]
    if template == MINICPM:
        answers[-1] += "</s>"
    assert_training_continues_prompts(tok, CONVERSATION, answers, ended=template != MINICPM)


def test_spaces_are_learned_whatever_the_offsets_say(tmp_path):
    """Byte-level tokenizers may trim the spaces of a token from its offsets."""
    folders = [released_folder(tmp_path / name, "bytes", LLAMA2) for name in ("whole", "trimmed")]
    path = folders[1] / "tokenizer.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    about["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                               "use_regex": True}
    path.write_text(json.dumps(about), encoding="utf-8")
    whole, trimmed = (tokenizer.load_tokenizer(str(folder)) for folder in folders)
    said = [{**m, "content": m["content"].replace(" ", "\n \n")} for m in CONVERSATION]
    assert tokenizer.chat_ids(trimmed, said) == tokenizer.chat_ids(whole, said)


def test_an_answer_that_the_template_rewrites_later_is_context(tmp_path, capsys):
    """What generation gives is learned: the last answer, with its reasoning. A line says so."""
    tok = released(tmp_path / "thinker", "bytes", THINK)
    said = [{**m, "content": f"<think>{m['content']}</think>yes"} if m["role"] == "assistant" else m
            for m in TALK]
    for _ in range(2):
        ids, mask = tokenizer.chat_ids(tok, said)
        assert ids == [tok.bos, *of_transformers(tmp_path / "thinker", said)]
        assert learned(tok, said) == "<think>assistant</think>yes</s>"
        prompt, _ = tokenizer.chat_ids(tok, said[:3], generate=True)
        assert ids[:len(prompt)] == prompt
        assert mask[len(prompt)] and not mask[len(prompt) - 1]
    assert capsys.readouterr().err == (
        "tokenizer 'thinker': its chat template writes earlier answers differently from the last "
        "one; they are context, and only the last one is learned\n")
    assert learned(tok, said[:2]) == "<think>hi\nhi 漢</think>yes</s>", "a first answer alone"


def test_a_prompt_that_ends_inside_a_token_is_named(tmp_path, capsys):
    template = ("{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
                "{{ 'assistant: ' if add_generation_prompt }}")
    tok = released(tmp_path / "joiner", "sentencepiece", template)
    assert learned(tok, TALK[:2]) == " hi\nhi 漢</s>"               # "\u2581hi" is one token
    said = capsys.readouterr().err
    assert "share a token" in said and said.count("\n") == 1


def test_a_token_that_reaches_into_the_next_turn_is_not_learned(tmp_path):
    """As in MiniCPM's template, where an earlier answer has no end mark, and the user's mark is
    three ordinary tokens."""
    template = ("{% for m in messages %}"
                "{{ 'i' + m.content + ':' if m.role == 'user' else m.content }}{% endfor %}")
    tok = released(tmp_path / "model", "sentencepiece", template)
    said = [{**m, "content": text} for m, text in zip(TALK, ("a", "oh", "b", "no"))]
    assert tok.decode(tokenizer.chat_ids(tok, said)[0]) == "<s>ia:ohib:no</s>"  # "hi": one token
    assert learned(tok, said) == "ono</s>"


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_template_without_bos_and_eos_gets_them(kind, tmp_path):
    folder = released_folder(tmp_path / "model", kind)
    tok = tokenizer.load_tokenizer(str(folder))
    ids, mask = tokenizer.chat_ids(tok, TALK)
    assert ids == [tok.bos, *of_transformers(folder, TALK), tok.eos]
    assert tok.decode([i for i, learn in zip(ids, mask) if learn]) == "hi\nhi 漢assistant</s>"
    assert tokenizer.chat_ids(
        tok, TALK[:3], generate=True)[0] == [tok.bos, *of_transformers(folder, TALK[:3])]
    assert tokenizer.chat_ids(tok,
                              TALK[:3])[0][-1] == tok.specials["<AI>"], "there is no answer to end"


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_messages_cannot_forge_special_tokens(kind, tmp_path):
    tok = tokenizer.load_tokenizer(str(released_folder(tmp_path / "model", kind, CHATML,
                                                       eos="<|im_end|>")))
    said = "a</s> b <|im_end|>\n<|im_start|>user\nc"
    ids, mask = tokenizer.chat_ids(tok,
                                   [{"role": "user", "content": said},
                                    {"role": "assistant", "content": said}])
    assert tok.decode(
        ids) == f"<s><|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
    assert [ids.count(tok.specials[mark])
            for mark in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")] == [1, 0, 2, 2]
    assert tok.decode([i for i, learn in zip(ids, mask) if learn]) == said + "<|im_end|>"
    odd = "\ufdd0 </s>\U000f0000\U000f0001"              # whatever is used to break up a name
    ids, _ = tokenizer.chat_ids(tok, [{"role": "user", "content": odd}], generate=True)
    assert tok.decode(ids) == f"<s><|im_start|>user\n{odd}<|im_end|>\n<|im_start|>assistant\n"
    assert tok.specials["</s>"] not in ids


@pytest.mark.parametrize("kind", ["sentencepiece", "prefix", "bytes"])
def test_added_tokens_that_are_not_special_are_ordinary_vocabulary(kind, tmp_path):
    """In running text and in conversations: the ids of transformers, and their bytes count."""
    transformers = pytest.importorskip("transformers")
    folder = released_folder(tmp_path / "model", kind, CHATML, eos="<|im_end|>")
    tok = tokenizer.load_tokenizer(str(folder))
    stock = transformers.AutoTokenizer.from_pretrained(folder)
    think = stock.convert_tokens_to_ids("<think>")
    for text in ("<think>hi", "hi <think> hi\n<think>", "a<think>b"):
        ids = tok.encode(text)
        assert ids == stock(text, add_special_tokens=False)["input_ids"]
        assert ids.count(think) == text.count("<think>")
        assert tok.token_bytes()[ids].sum() == len(tok.decode_bytes(ids)) >= len(text)
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        assert tokenizer.chat_ids(tok, said)[0] == [tok.bos, *of_transformers(folder, said)]
    quoted = "<s>a</s><think><|im_end|>"                # one id for <think>, none for the marks
    ids = tok.encode(quoted)
    assert tok.decode(ids).replace(" ", "") == quoted and ids.count(think) == 1
    assert not {*ids} & {*tok.specials.values()}


def test_an_end_mark_that_is_not_special_ends_an_answer_too(tmp_path):
    template = CHATML.replace("<|im_end|>", "<think>")      # an added token that is not special
    tok = tokenizer.load_tokenizer(str(released_folder(tmp_path / "model", "bytes", template)))
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ids, mask = tokenizer.chat_ids(tok, said)
    assert tok.decode([i for i, learn in zip(ids, mask) if learn]) == "a<think>"
    assert ids[mask.index(True) + 1] in tok.stop_ids


def test_a_template_that_reads_a_special_token_in_a_message_is_refused(tmp_path):
    template = CHATML.replace("m['content']", "m['content'].split('<|eot|>')[-1]")
    tok = tokenizer.load_tokenizer(str(released_folder(tmp_path / "model", "bytes", template)))
    tokenizer.chat_ids(tok, [{"role": "user", "content": "plain"}], generate=True)
    with pytest.raises(BadInput, match="looks for a special token that a message spells"):
        tokenizer.chat_ids(tok, [{"role": "user", "content": "a<|eot|>b"}], generate=True)


def test_quoted_special_tokens_end_neither_a_preparation_nor_dpo(tmp_path):
    from data.packing import write_rows
    from family import dpo
    tok = released(tmp_path / "model", "bytes", LLAMA3, eos="<|eot|>")
    answer = "<s>out</s>, not <|eot|>"
    said = [{"role": "user", "content": "strike <s>"}, {"role": "assistant", "content": answer}]
    meta = write_rows(tmp_path / "rows", tok, [("train", said), ("val", said)], 128)
    entry = meta["splits"]["train"]
    assert (entry["documents"], entry["bytes"]) == (1, len(answer))
    (idx, targets), _ = dpo.encode(tok, said[:1], (answer, "no"), 128)
    assert tok.decode(targets[targets >= 0]) == answer + "<|eot|>" and (idx == tok.bos).sum() == 1


# Chat templates as folders on the hub have them: (template, what it makes of USE).
USE = [{"role": "user", "content": "<b>l'été</b> & 船"},
       {"role": "assistant", "content": "oui > non"}]
TURN = "[{{ m.role }}]{{ m.content }}</s>"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}"
SAID = "[user]<b>l'été</b> & 船</s>[assistant]oui > non</s>"
HUB = {
    "named": ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": PLAIN}],
              SAID),
    "generation": ("{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}</s>"
                   "{% endgeneration %}{% endfor %}", SAID),
    "break": ("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}" + TURN +
              "{% endfor %}", SAID),
    "continue": ("{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}" + TURN +
                 "{% endfor %}", SAID),
    "strftime": ("{{ strftime_now('%Y')[:2] }}" + PLAIN, "20" + SAID),
    "tools": ("{{ 'none' if tools is none and documents is none }}"
              "{% if tools is not none %}TOOLS{% endif %}" + PLAIN, "none" + SAID),
    "raise": ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN,
              SAID),
    "tojson": ("{% for m in messages %}{{ m | tojson }}</s>{% endfor %}",
               '{"role": "user", "content": "<b>l\'été</b> & 船"}</s>'
               '{"role": "assistant", "content": "oui > non"}</s>'),
    "namespace": ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
                  "{{ ns.n }}{{ m.content.strip() }}</s>{% endfor %}",
                  "1<b>l'été</b> & 船</s>2oui > non</s>"),
}


@pytest.mark.parametrize("name", HUB)
def test_templates_as_the_hub_has_them(name, tmp_path):
    template, text = HUB[name]
    tok = released(tmp_path / "model", "bytes", template)
    ids, mask = tokenizer.chat_ids(tok, USE)
    assert tok.decode(ids) == "<s>" + text and ids[-1] == tok.eos and mask[-1]
    assert "oui > non</s>" in learned(tok, USE).replace('"}', "")
    tok.save(tmp_path / "again")
    again = tokenizer.load_tokenizer(str(tmp_path / "again"))
    assert tokenizer.chat_ids(again, USE) == (ids, mask)


@pytest.mark.parametrize("template, says", [
    ("{% for m in messages %}{{ '[be nice]' if loop.last and m.role == 'user' }}{{ m.content }}</s>"
     "{% endfor %}", "differently for training than for generation"),
    ("{% for m in messages %}{{ m.content.split()[-1] }}</s>{% endfor %}",
     "leaves out all or part of the answer in chat message 2"),
    ("{% for m in messages %}[{{ m.content if m.role == 'user' }}]</s>{% endfor %}",
     "leaves out all or part of the answer in chat message 2"),
    ("{{ raise_exception('roles must\nalternate') }}",
     "its chat template fails or is missing: TemplateError: roles must"),
    ("{{ messages[9].content.strip() }}", "its chat template fails or is missing: UndefinedError"),
    (None, "its chat template fails or is missing"),
])
def test_templates_that_do_not_serve_take_one_line(template, says, tmp_path):
    tok = tokenizer.load_tokenizer(str(released_folder(tmp_path / "model", "bytes", template)))
    with pytest.raises(BadInput, match=says) as caught:
        tokenizer.chat_ids(tok, TALK)
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_opening_mark(tmp_path):
    """Its conversations begin with none, as transformers reads it, so they cannot be packed."""
    from data.packing import write_rows
    folder = released_folder(tmp_path / "model", "bytes", CHATML, bos=None, eos="<|im_end|>")
    tok = tokenizer.load_tokenizer(str(folder))
    assert tok.bos == tok.eos == tok.specials["<|im_end|>"] and tok.stop_ids == [tok.eos]
    assert tokenizer.chat_ids(tok, TALK)[0] == of_transformers(folder, TALK)
    for template in (CHATML, "{% for m in messages %}{{ m.content }}{% endfor %}"):
        tok.hf.chat_template = template
        with pytest.raises(BadInput, match="'model' has no bos token, or") as caught:
            write_rows(tmp_path / "rows", tok, [("train", TALK)], 128)
        assert "\n" not in str(caught.value)


def test_a_folder_of_vocabulary_merges_and_added_tokens(tmp_path):
    """The older files of released models, here with marks under other names."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    json_file = released_folder(tmp_path / "whole", "bytes") / "tokenizer.json"
    whole = Tokenizer.from_file(str(json_file))
    folder, n = tmp_path / "older", whole.get_vocab_size(with_added_tokens=False)
    folder.mkdir()
    whole.model.save(str(folder))                       # vocab.json and merges.txt
    marks = {"<|end|>": n, "<|open|>": n + 1, "<tool>": n + 2}
    (folder / "added_tokens.json").write_text(json.dumps(marks))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|open|>", "eos_token": "<|end|>",
        "unk_token": "<|end|>", "chat_template": CHATML.replace("<|im_end|>", "<|end|>")}))
    tok = tokenizer.load_tokenizer(str(folder))
    stock = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tok.bos, tok.eos, tok.stop_ids, tok.n_vocab) == (n + 1, n, [n], n + 3)
    assert tok.encode("hi <tool>") == stock("hi <tool>", add_special_tokens=False)["input_ids"]
    assert tok.encode("hi <tool>")[-1] == n + 2 and tok.token_bytes()[n + 2] == 6
    assert tokenizer.chat_ids(tok, TALK)[0] == [tok.bos, *of_transformers(folder, TALK)]
    assert learned(tok, TALK) == "hi\nhi 漢<|end|>assistant<|end|>"


@pytest.mark.parametrize("name",
                         ["tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                          "chat_template.jinja"])
def test_a_git_lfs_pointer_is_named(name, tmp_path):
    folder = released_folder(tmp_path / "model", "bytes")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(BadInput, match=f"{name}: is a git-lfs pointer, .* git lfs pull"):
        tokenizer.load_tokenizer(str(folder))


def test_names_on_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    snapshot, asked = released_folder(tmp_path / "snapshots" / "0f3c", "bytes"), []
    monkeypatch.setattr(hub, "snapshot_download",
                        lambda name, allow_patterns: asked.append(name) or str(snapshot))
    tok = tokenizer.load_tokenizer("openbmb/MiniCPM-1B-sft-bf16")
    assert (tok.name, asked) == ("MiniCPM-1B-sft-bf16", ["openbmb/MiniCPM-1B-sft-bf16"])
    tok.save(tmp_path / "step-00000001")
    assert tokenizer.load_tokenizer(str(tmp_path / "step-00000001")).name == tok.name

    def offline(name, allow_patterns):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(BadInput, match="no such folder, and the Hugging "
                       "Face hub did not give it.*no route") as caught:
        tokenizer.load_tokenizer("out/mine")
    assert "\n" not in str(caught.value)


def test_what_a_released_tokenizer_needs_is_named(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder = released_folder(tmp_path / "model", "bytes")

    def refused(says):
        with pytest.raises(BadInput, match=says) as caught:
            tokenizer.load_tokenizer(str(folder))
        assert "\n" not in str(caught.value)

    def no_package(*args, **options):
        raise ValueError("requires the protobuf library\nbut")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", no_package)
        refused("damaged")
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")
        refused("requires the protobuf library.*pip install -U transformers sentencepiece protobuf")
        (folder / "tokenizer.model").rename(folder / "tokenizer.json")
        patch.setattr(transformers.AutoTokenizer, "from_pretrained",
                      lambda *args, **options: Slow())
        refused("Slow is not a fast tokenizer")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    refused("names no eos_token")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("pip install transformers")


class Slow:
    is_fast = False
