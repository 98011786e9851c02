"""Reading prompts from texts and files; expected ids are written out or sentencepiece's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from engine.errors import UserError
from utils import prompts
from utils.tokenizer import load_tokenizer

TINY_YI = Path(__file__).parents[3] / "models" / "tiny-yi"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_YI)


def truth(text: str) -> list[int]:
    model = str(TINY_YI / "tokenizer.model")
    return sentencepiece.SentencePieceProcessor(model_file=model).encode(text)


def write(folder: Path, name: str, content: str | np.ndarray) -> str:
    path = folder / name
    if isinstance(content, str):
        path.write_bytes(content.encode())
    else:
        np.save(path, content)
    return str(path)


def test_texts_and_chats(tokenizer):
    assert prompts.encode_texts(tokenizer, ["a b", "1,2"]) == [truth("a b"), truth("1,2")]
    user = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.encode_chats(tokenizer, ["hi"]) == [truth(user)]
    system = "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert prompts.encode_chats(tokenizer, ["hi"], "Be kind.") == [truth(system + user)]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\r\n\r\n two \r\n", ["one", " two "]),
        ("\ufeffone", ["one"]),
        ("a\u2028b\x0cc\n你好", ["a\u2028b\x0cc", "你好"]),
        ("\n \n", []),
    ],
)
def test_text_file(tmp_path, content, expected):
    assert prompts.read_texts(write(tmp_path, "p.txt", content)) == expected


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("p.csv", "1,2,3\n4\n", [[1, 2, 3], [4]]),
        ("p.csv", "1, 2 ,\r\n\r\n3,\r\n", [[1, 2], [3]]),
        ("p.npy", np.array([[0, 0, 5, 0, 6], [7, 2, 8, 2, 2]]), [[5, 0, 6], [7, 2, 8]]),
        ("p.npy", np.array([[0, 2]], "int32"), [[]]),
        ("p.npy", np.array([0, 5, 2], "uint16"), [[0, 5, 2]]),
    ],
)
def test_id_file(tmp_path, name, content, expected):
    assert prompts.read_ids(write(tmp_path, name, content), padding={0, 2}) == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.csv", "1,2\n3,x\n", "line 2 holds 'x'"),
        ("p.csv", "1,-2\n", "line 1 holds '-2'"),
        ("p.csv", "1.5\n", "line 1 holds '1.5'"),
        ("p.npy", "text", "it is no array of numbers"),
        ("p.npy", "", "it is no array of numbers"),
        ("p.npy", np.zeros((2, 2)), r"float64 of shape \(2, 2\)"),
        ("p.npy", np.zeros((1, 2, 2), int), r"shape \(1, 2, 2\)"),
        ("p.npy", np.array([[1], [2, 3]], dtype=object), "it is no array of numbers"),
    ],
)
def test_unreadable_id_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=f"--input_file .* cannot be read: .*{message}"):
        prompts.read_ids(write(tmp_path, name, content))


def test_unreadable_text_files(tmp_path):
    with pytest.raises(UserError, match="is of no known kind; use .txt"):
        prompts.read_texts(write(tmp_path, "p.json", "[]"))
    with pytest.raises(UserError, match="No such file"):
        prompts.read_texts(str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match="No such file"):
        prompts.read_ids(str(tmp_path / "missing.csv"))
    (tmp_path / "p.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="byte 2 is not UTF-8"):
        prompts.read_texts(str(tmp_path / "p.txt"))
    (tmp_path / "p.csv").write_bytes(b"1,\xff")
    with pytest.raises(UserError, match="no text with commas"):
        prompts.read_ids(str(tmp_path / "p.csv"))


def test_last_tokens_are_kept():
    assert prompts.limit_length([[1, 2, 3], [4]], 2) == [[2, 3], [4]]
    assert prompts.limit_length([[1, 2, 3]], None) == [[1, 2, 3]]


def test_prompts_without_tokens():
    with pytest.raises(UserError, match="^--input_file p.txt holds no prompt"):
        prompts.check_prompts([], "--input_file p.txt")
    with pytest.raises(UserError, match="^--input_text: prompt 1 has no tokens"):
        prompts.check_prompts([[1], []], "--input_text")
