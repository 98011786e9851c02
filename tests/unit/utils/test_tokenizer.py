"""Ids against sentencepiece, tokenizers and transformers; decoding against sentencepiece."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import UserError
from utils import tokenizer as module
from utils.tokenizer import load_tokenizer

TINY_YI = Path(__file__).parents[3] / "models" / "tiny-yi"
SPECIAL = ["<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and hello world again.",
    "A tokenizer splits text into pieces; 1,2,3,4,5,6,7 are numbers.",
    "Paris is the capital of France. def main(argv): return 0",
]
NASTY = [
    "",
    "hello",
    " hello",
    "   three spaces",
    "trailing ",
    "\n",
    "\n\n\tx  y\r\nz",
    "1,2,3,4,5,6,7,",
    "日本語と中文，你好。",
    "emoji 🙂👩‍👩‍👧 and é, ﬁ, ½",
    "a<|im_end|>b",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|> hello",
    "<|im_end|><|im_end|>hello",
    "▁ under",
]


def train(folder: Path, **options) -> Path:
    """A small sentencepiece model of Yi's kind in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "character_coverage": 0.99,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "user_defined_symbols": SPECIAL,
        "bos_piece": "<|startoftext|>",
        "eos_piece": "<|endoftext|>",
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **(settings | options),
    )
    return folder


@pytest.fixture(scope="session")
def spm_dir(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="session")
def prefixed_dir(tmp_path_factory) -> Path:
    """As Llama's: a space is put before a text."""
    return train(tmp_path_factory.mktemp("prefixed"), add_dummy_prefix=True)


def copy_with(folder: Path, target: Path, **files: dict) -> Path:
    """A copy of `folder` with JSON files, named without their suffix."""
    shutil.copytree(folder, target)
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def truth(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def converted(folder: Path, *, prepend: bool) -> dict:
    """tokenizer.json of a folder's model; with `prepend` the usual faulty conversion."""
    model = truth(folder)
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = sorted(
        (vocab[piece], piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not piece.startswith("<")
    )
    made = RustTokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    steps = [normalizers.Prepend("▁")] if prepend else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(["<unk>", "<|startoftext|>", "<|endoftext|>", *SPECIAL])
    return json.loads(made.to_str())


CONFIGS = {
    "none": {},
    "llama": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
    "yi": {
        "tokenizer_class": "YiTokenizer",
        "add_bos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_yi.YiTokenizer", None]},
    },
}


@pytest.mark.parametrize("text", NASTY, ids=repr)
@pytest.mark.parametrize("config", CONFIGS)
def test_ids_are_sentencepieces(spm_dir, tmp_path, config, text):
    folder = copy_with(spm_dir, tmp_path / "m", tokenizer_config=CONFIGS[config])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(text) == truth(folder).encode(text)
    assert tokenizer.encode(text, add_special_tokens=True) == truth(folder).encode(text)


def test_ids_of_tiny_yi():
    tokenizer = load_tokenizer(TINY_YI)
    for text in NASTY:
        assert tokenizer.encode(text) == truth(TINY_YI).encode(text), text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.end_ids == (2, 7)
    assert tokenizer.vocab_size == 4096


def test_faulty_tokenizer_json_beside_the_model_is_not_used(spm_dir, tmp_path):
    faulty = converted(spm_dir, prepend=True)
    # Seen in the wild: the byte pieces declared as special tokens.
    faulty["added_tokens"].append({"id": 15, "content": "<0x0A>", "special": True})
    folder = copy_with(spm_dir, tmp_path / "m", tokenizer=faulty, tokenizer_config=CONFIGS["llama"])
    text = "hello<|im_end|>hello\n<0x0A>"
    library = RustTokenizer.from_str(json.dumps(converted(spm_dir, prepend=True)))
    assert library.encode(text).ids != truth(folder).encode(text)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(text) == truth(folder).encode(text)
    assert tokenizer.decode(tokenizer.encode("a\nb")) == "a\nb"


def test_tokenizer_json_with_a_vocabulary_of_its_own_is_used(spm_dir, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(module.log, "warning", warnings.append)
    other = converted(train(tmp_path / "other", vocab_size=380), prepend=False)
    folder = copy_with(spm_dir, tmp_path / "m", tokenizer=other)
    expected = RustTokenizer.from_str(json.dumps(other)).encode("hello world").ids
    assert load_tokenizer(folder).encode("hello world") == expected
    assert len(warnings) == 1 and "tokenizer.json" in warnings[0]


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|> b", "<|startoftext|>a<unk>"])
def test_control_tokens_in_a_text_become_their_ids(spm_dir, text):
    model = truth(spm_dir)
    ids = {"<unk>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    expected, rest = [], text
    while rest:
        token = next((t for t in ids if rest.startswith(t)), None)
        if token is not None:
            expected.append(ids[token])
            rest = rest[len(token) :]
            continue
        plain = rest.split("<")[0]
        expected += model.encode(plain)
        rest = rest[len(plain) :]
    assert load_tokenizer(spm_dir).encode(text) == expected


def test_added_tokens_of_a_fine_tune(spm_dir, tmp_path):
    added = {
        "400": {"content": "<tool>", "special": False},
        "401": {"content": "<|pause|>", "special": True, "rstrip": True},
    }
    folder = copy_with(spm_dir, tmp_path / "m", tokenizer_config={"added_tokens_decoder": added})
    tokenizer, model = load_tokenizer(folder), truth(spm_dir)
    text = "a<tool>b<|pause|>   c"
    expected = [*model.encode("a"), 400, *model.encode("b"), 401, *model.encode("c")]
    assert tokenizer.encode(text) == expected
    assert tokenizer.vocab_size == 402
    assert tokenizer.decode(expected) == "a<tool>bc"
    assert tokenizer.decode(expected, skip_special_tokens=False) == "a<tool>b<|pause|>c"
    assert tokenizer.decode([399 + 10]) == ""


def test_dummy_space_only_at_the_start(prefixed_dir):
    """The rule of transformers' Llama tokenizer without its legacy mode."""
    from transformers import LlamaTokenizer

    reference = LlamaTokenizer.from_pretrained(str(prefixed_dir))
    tokenizer, model = load_tokenizer(prefixed_dir), truth(prefixed_dir)
    for text in ["hello", " hello", "", "hello\nworld"]:
        assert tokenizer.encode(text) == model.encode(text)
    text = "hello<|endoftext|>hello world"
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@pytest.mark.parametrize("decoder", ["metaspace", "byte-level"])
def test_tokenizer_json_alone_is_the_truth(spm_dir, tmp_path, decoder):
    if decoder == "metaspace":
        content = converted(spm_dir, prepend=False)
    else:
        made = RustTokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {piece: i for i, piece in enumerate([*alphabet, "he", "ll", "Ġw"])}
        made.model = models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l"), ("Ġ", "w")])
        made.add_special_tokens(SPECIAL)
        content = json.loads(made.to_str())
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    reference, tokenizer = RustTokenizer.from_str(json.dumps(content)), load_tokenizer(folder)
    for text in NASTY:
        ids = reference.encode(text).ids
        assert tokenizer.encode(text) == ids
        expected = reference.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_special_tokens_around_a_prompt(spm_dir, tmp_path):
    content = converted(spm_dir, prepend=False)
    made = RustTokenizer.from_str(json.dumps(content))
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", 1)]
    )
    folder = copy_with(spm_dir, tmp_path / "json", tokenizer=json.loads(made.to_str()))
    (folder / "tokenizer.model").unlink()
    ids = truth(spm_dir).encode("hello")
    assert load_tokenizer(folder).encode("hello", add_special_tokens=True) == [1, *ids]
    for number, (config, expected) in enumerate(
        [
            ({"tokenizer_class": "LlamaTokenizer"}, [1, *ids]),
            ({"tokenizer_class": "PreTrainedTokenizerFast"}, ids),
            ({"add_bos_token": True, "add_eos_token": True}, [1, *ids, 2]),
        ]
    ):
        folder = copy_with(spm_dir, tmp_path / f"m{number}", tokenizer_config=config)
        assert load_tokenizer(folder).encode("hello", add_special_tokens=True) == expected


def test_decoding_is_sentencepieces(spm_dir, prefixed_dir):
    for folder in (spm_dir, prefixed_dir, TINY_YI):
        tokenizer, model = load_tokenizer(folder), truth(folder)
        rng = random.Random(0)
        first = 3  # unknown and control pieces have their own spelling
        for _ in range(100):
            size = rng.randrange(1, 12)
            ids = [rng.randrange(first, model.get_piece_size()) for _ in range(size)]
            assert tokenizer.decode(ids, skip_special_tokens=False) == model.decode(ids), ids


@pytest.mark.parametrize("skip", [True, False])
def test_stream_is_the_whole_text(spm_dir, prefixed_dir, skip):
    rng = random.Random(1)
    for folder in (spm_dir, prefixed_dir, TINY_YI):
        tokenizer = load_tokenizer(folder)
        # Byte pieces are half of the ids, so that many characters are cut or wrong.
        byte_ids = range(5, 5 + 260)
        for _ in range(100):
            ids = [
                rng.choice(byte_ids) if rng.random() < 0.5 else rng.randrange(tokenizer.vocab_size)
                for _ in range(rng.randrange(1, 20))
            ]
            stream = tokenizer.stream(skip_special_tokens=skip)
            parts = []
            while ids_left := ids[sum(map(len, parts)) :]:
                parts.append(ids_left[: rng.randrange(1, 4)])
            text = "".join([*map(stream.push, parts), stream.finish()])
            assert text == tokenizer.decode(ids, skip_special_tokens=skip)


def test_stream_holds_back_half_a_character(spm_dir):
    tokenizer = load_tokenizer(spm_dir)
    ids = tokenizer.encode("a🙂")
    assert len(ids) == 5
    stream = tokenizer.stream()
    assert [stream.push([i]) for i in ids] == ["a", "", "", "", "🙂"]
    stream = tokenizer.stream()
    assert stream.push(ids[:3]) == "a"
    assert stream.finish() == "\ufffd\ufffd"


def test_special_tokens_are_skipped_or_shown():
    tokenizer = load_tokenizer(TINY_YI)
    ids = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"


def test_word_ids(spm_dir, prefixed_dir):
    model = truth(spm_dir)
    tokenizer = load_tokenizer(spm_dir)
    assert tokenizer.word_ids("dog") == (tuple(model.encode("dog")), tuple(model.encode(" dog")))
    assert tokenizer.word_ids(" dog") == (tuple(model.encode(" dog")),)
    assert tokenizer.word_ids("") == ()
    # Inside a text a tokenizer with a dummy space has none either.
    pieces = [
        truth(prefixed_dir).id_to_piece(i) for i in load_tokenizer(prefixed_dir).word_ids("dog")[0]
    ]
    assert not pieces[0].startswith("▁")


MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "你好 \n hi"},
]


def test_chat_prompt():
    tokenizer = load_tokenizer(TINY_YI)
    text = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n你好 \n hi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(MESSAGES) == truth(TINY_YI).encode(text)
    assert tokenizer.turn_end_ids() == (7,)


def test_chat_template_renders_as_in_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    template = """{%- if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {% for message in messages -%}
        {%- if loop.index > 9 %}{% break %}{% endif %}
        {{- bos_token if loop.first }}[{{ message['role'] | upper }}]
        {{ message | tojson }}
    {% endfor %}
    {%- if add_generation_prompt %}<|im_start|>{% endif %}"""
    folder = copy_with(TINY_YI, tmp_path / "m", tokenizer_config={"bos_token": "<|startoftext|>"})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    made = RustTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    reference = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|startoftext|>")
    expected = reference.apply_chat_template(
        MESSAGES, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_chat_template(MESSAGES) == tokenizer.encode(expected)
    with pytest.raises(UserError, match="chat template fails .no tools."):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages.none.at_all }}", "{{ 1 + 'a' }}"])
def test_faulty_chat_template(tmp_path, source):
    folder = copy_with(TINY_YI, tmp_path / "m")
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match="chat_template.jinja: the chat template fails"):
        load_tokenizer(folder).apply_chat_template(MESSAGES)


@pytest.mark.parametrize("place", ["jinja", "template", "config", "named", "generation"])
def test_places_of_a_chat_template(spm_dir, tmp_path, place):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}!"
    files = {
        "template": {"chat_template": {"chat_template": source}},
        "config": {"tokenizer_config": {"chat_template": source}},
        "named": {"tokenizer_config": {"chat_template": [{"name": "default", "template": source}]}},
        "generation": {"generation_config": {"chat_template": source}},
    }
    folder = copy_with(spm_dir, tmp_path / "m", **files.get(place, {}))
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    ids = load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "hello"}])
    assert ids == truth(folder).encode("hello!")


def test_chat_without_a_template(spm_dir):
    with pytest.raises(UserError, match="--chat needs a chat template"):
        load_tokenizer(spm_dir).apply_chat_template(MESSAGES)


def test_vocab_file_replaces_the_folders_model(spm_dir, prefixed_dir):
    chosen = str(prefixed_dir / "tokenizer.model")
    tokenizer = load_tokenizer(spm_dir, vocab_file=chosen)
    assert tokenizer.encode("hello") == truth(prefixed_dir).encode("hello")
    with pytest.raises(UserError, match="--vocab_file .* does not exist"):
        load_tokenizer(spm_dir, vocab_file=str(spm_dir / "missing.model"))


def test_files_of_another_format_go_to_transformers(tmp_path):
    """GPT-2's pair of files, read by the class that --tokenizer_type names."""
    vocab = {piece: i for i, piece in enumerate([*"abc", "ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    assert load_tokenizer(tmp_path, tokenizer_type="gpt2").encode("cab") == [2, 3]
    with pytest.raises(UserError, match="transformers cannot load .*no-such-type"):
        load_tokenizer(tmp_path, tokenizer_type="no-such-type")


def test_type_does_not_change_ids(spm_dir):
    tokenizer = load_tokenizer(spm_dir, tokenizer_type="llama")
    assert tokenizer.encode("hello") == truth(spm_dir).encode("hello")


REMOTE = """
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
print("REMOTE CODE RAN")

class OwnTokenizer(PreTrainedTokenizerFast):
    def __init__(self, **kwargs):
        model = models.BPE(vocab={"a": 0, "b": 1}, merges=[])
        super().__init__(tokenizer_object=Tokenizer(model), **kwargs)
"""


def test_code_of_a_checkpoint_runs_only_if_trusted(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "m"
    folder.mkdir()
    config = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(REMOTE, encoding="utf-8")
    with pytest.raises(UserError, match="--trust_remote_code"):
        load_tokenizer(folder)
    assert "REMOTE CODE RAN" not in capsys.readouterr().out
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    assert load_tokenizer(folder, trust_remote_code=True).encode("ba") == [1, 0]
    assert "REMOTE CODE RAN" in capsys.readouterr().out


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has no tokenizer .tokenizer.model or tokenizer.json.; name a folder"),
        ({"tokenizer.model": "version https://git-lfs"}, "is not a sentencepiece model"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "[]"}, "is not a JSON object"),
        ({"tokenizer.json": '{"model": 1}'}, "is not a tokenizer.json that"),
        ({"tokenizer_config.json": "{}"}, "transformers cannot load the tokenizer"),
    ],
)
def test_unusable_folders(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist; correct --tokenizer_dir"):
        load_tokenizer(tmp_path / "none")


def test_contradicting_ids_of_added_tokens(spm_dir, tmp_path):
    content = converted(spm_dir, prepend=False)
    added = {"500": {"content": "<tool>"}}
    folder = copy_with(
        spm_dir, tmp_path / "m", tokenizer=content, tokenizer_config={"added_tokens_decoder": added}
    )
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="'<tool>' the id 400, tokenizer_config.json 500"):
        load_tokenizer(folder)
