"""What run.py prints and writes, and what it asks of the engine, which is a stub here."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import run
from engine.errors import UserError
from engine.sampling import SamplingParams
from tests.cli.stub_session import StubSession
from utils.interactive import GREETING
from utils.request import DEFAULT_TEXT, on_root
from utils.run_batch import measure
from utils.tokenizer import load_tokenizer

TINY_YI = Path(__file__).parents[2] / "models" / "tiny-yi"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_YI)


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Path:
    """An engine directory to name, and no terminal to ask at."""
    folder = tmp_path / "engine"
    folder.mkdir()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return folder


@pytest.fixture
def call(engine, monkeypatch, capsys):
    """Runs main on a stub; gives the printed text and the stub."""

    def call(*args: str, session: StubSession | None = None, tokens: int = 4):
        session = session or StubSession()
        session.opened = []

        def open_engine(engine_dir, world, **options):
            session.opened.append((engine_dir, world.size, options))
            return session

        monkeypatch.setattr("engine.backends.open_engine", open_engine, raising=False)
        common = ["--engine_dir", str(engine), "--max_output_len", str(tokens)]
        if "--tokenizer_dir" not in args:
            common += ["--tokenizer_dir", str(TINY_YI)]
        assert run.main([*common, *args]) == 0
        out, session.err = capsys.readouterr()
        return out, session

    return call


def test_texts_in_order(call, tokenizer):
    texts = ["1,2,3,4,5,6,7,", "你好 <|im_end|>", " b"]
    out, session = call("--input_text", *texts)
    expected = ""
    for index, text in enumerate(texts):
        answer = tokenizer.decode(tokenizer.encode(text)[:4], skip_special_tokens=False)
        expected += f'Input [Text {index}]: "{text}"\nOutput [Text {index} Beam 0]: "{answer}"\n'
    assert out == expected
    assert [list(ids) for ids in session.calls[0][0]] == [tokenizer.encode(t) for t in texts]


def test_default_text(call):
    out, _ = call()
    assert out.startswith(f'Input [Text 0]: "{DEFAULT_TEXT}"\n')


def test_parameters_reach_the_engine(call, engine, tokenizer):
    args = ["--input_text", "a", "--temperature", "0.5", "--top_k", "0", "--top_p", "0.9"]
    args += ["--min_p", "0.1", "--repetition_penalty", "1.1", "--presence_penalty", "0.2"]
    args += ["--frequency_penalty", "0.3", "--no_repeat_ngram_size", "3", "--random_seed", "7"]
    args += ["--min_length", "2", "--length_penalty", "0.8", "--early_stopping", "0"]
    args += ["--stop_words", "dog", "--bad_words", " cat", "--device", "cpu"]
    _, session = call(*args, "--max_kv_cache_len", "32")
    assert session.calls[0][1] == [
        SamplingParams(
            max_new_tokens=4,
            end_ids=(2, 7, 9),
            pad_id=0,
            min_length=2,
            temperature=0.5,
            top_k=0,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            no_repeat_ngram_size=3,
            random_seed=7,
            length_penalty=0.8,
            early_stopping=0,
            stop_words=(tuple(tokenizer.encode("dog")), tuple(tokenizer.encode(" dog"))),
            bad_words=(tuple(tokenizer.encode(" cat")),),
        )
    ]
    options = {
        "device": "cpu",
        "max_attention_window": 32,
        "tuning": True,
        "may_share_gpu": False,
    }
    assert session.opened == [(str(engine), 1, options)]


def test_words_per_prompt_and_chosen_end(call, tokenizer):
    words = ["--stop_words", " x", " y", "--stop_words", " z"]
    _, session = call("--input_text", "a", "b", *words, "--end_id", "5", "--pad_id", "3")
    params = session.calls[0][1]
    expected = [
        tuple(tuple(tokenizer.encode(w)) for w in (" x", " y")),
    ]
    assert [p.stop_words for p in params] == [*expected, (tuple(tokenizer.encode(" z")),)]
    assert all((p.end_ids, p.pad_id) == ((5,), 3) for p in params)


def test_idle_and_meaningless_flags_are_reported(call, monkeypatch):
    lines = []
    monkeypatch.setattr("utils.log.warning", lines.append)
    call("--top_p", "0.8", "--use_py_session", "--debug_mode", "--no_prompt_template")
    assert lines == [
        "without meaning here and ignored: --use_py_session, --debug_mode, --no_prompt_template",
        "--top_p without effect while --top_k is 1; add --top_k 0",
    ]


def test_notes_of_the_engine_are_repeated_whatever_the_log_level(call):
    session = StubSession()
    session.info.notes = ("this engine has DUMMY weights",)
    call("--input_text", "a", "--log_level", "internal_error", session=session)
    assert "this engine has DUMMY weights" in session.err


def test_terminal_that_cannot_show_the_text(call, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    call("--input_text", "é")
    assert b'Input [Text 0]: "\\xe9"' in narrow.buffer.getvalue()


def test_beams(call, tokenizer):
    out, _ = call("--input_text", "one two three four five", "--num_beams", "2")
    ids = tokenizer.encode("one two three four five")
    assert out.splitlines()[1:] == [
        f'Output [Text 0 Beam 0]: "{tokenizer.decode(ids[:4])}"',
        f'Output [Text 0 Beam 1]: "{tokenizer.decode(ids[1:5])}"',
    ]


def test_streaming_prints_what_has_grown(call, tokenizer):
    texts = ["1,2,3,4,5,6", "7,8,9,10,11", "a,b,c,d,e,f"]
    out, _ = call("--input_text", *texts, "--streaming", "--streaming_interval", "2", tokens=5)
    ids = [tokenizer.encode(text) for text in texts]
    # Two prompts make a batch; the third follows alone.
    order = [(0, 2), (1, 2), (0, 4), (1, 4), (0, 5), (1, 5), (2, 2), (2, 4), (2, 5)]
    expected = ""
    for index, tokens in order:
        answer = tokenizer.decode(ids[index][:tokens])
        expected += f'Input [Text {index}]: "{texts[index]}"\n'
        expected += f'Output [Text {index} Beam 0]: "{answer}"\n'
    assert out == expected


def test_id_files_replace_the_text(call, tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("5,6,7,8,9\n11\n", encoding="utf-8")
    csv, npy = tmp_path / "o.csv", tmp_path / "o.npy"
    files = ["--output_csv", str(csv), "--output_npy", str(npy)]
    out, _ = call("--input_tokens", str(source), *files)
    rows = [[5, 6, 7, 8, 9, 5, 6, 7, 8], [11, 11, 2, 2, 2, 2, 2, 2, 2]]
    assert out == ""
    assert np.load(npy).tolist() == rows
    assert csv.read_text(encoding="utf-8").split() == [",".join(map(str, row)) for row in rows]
    _, session = call("--input_file", str(npy))
    assert session.calls[0][0] == (tuple(rows[0]), (11, 11))


def test_score_and_logit_files(call, tmp_path):
    names = ["output_log_probs_npy", "output_cum_log_probs_npy", "output_logits_npy"]
    flags = [part for name in names for part in (f"--{name}", str(tmp_path / f"{name}.npy"))]
    out, session = call("--input_text", "1,2,3,4", *flags, tokens=2)
    assert out.startswith("Input [Text 0]")
    assert np.load(tmp_path / "output_log_probs_npy.npy").tolist() == [[[-0.5, -0.5]]]
    assert np.load(tmp_path / "output_cum_log_probs_npy.npy").tolist() == [[-1.0]]
    assert np.load(tmp_path / "output_logits_npy_generation.npy").shape == (1, 1, 2, 4)
    assert session.calls[0][1][0].log_probs


def test_prompts_of_a_file_and_their_limit(call, tmp_path, tokenizer):
    source = tmp_path / "in.txt"
    source.write_text("1,2,3,4,5,6\n\nb\n", encoding="utf-8")
    _, session = call("--input_file", str(source), "--input_tokens_limit", "3")
    expected = [tuple(tokenizer.encode(text)[-3:]) for text in ("1,2,3,4,5,6", "b")]
    assert list(session.calls[0][0]) == expected


def test_tokenizer_of_the_engine_directory(call, engine, tokenizer):
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY_YI / name, engine / name)
    common = ["--engine_dir", str(engine), "--max_output_len", "4", "--input_text", "a b"]
    call("--input_text", "a b")
    assert run.main(common) == 0


def test_tokenizer_of_the_checkpoint_the_engine_was_built_from(call, engine, capsys):
    call("--input_text", "a")
    record = {"engine": {"source": str(TINY_YI)}}
    (engine / "config.json").write_text(json.dumps(record), encoding="utf-8")
    assert run.main(["--engine_dir", str(engine), "--max_output_len", "4"]) == 0
    assert DEFAULT_TEXT in capsys.readouterr().out


def test_ids_need_no_tokenizer(call, engine, tmp_path, capsys):
    call("--input_text", "a")
    source = tmp_path / "in.csv"
    source.write_text("5,6\n", encoding="utf-8")
    common = ["--engine_dir", str(engine), "--max_output_len", "4"]
    assert run.main([*common, "--input_file", str(source)]) == 0
    assert capsys.readouterr().out == 'Input [Text 0]: "5,6"\nOutput [Text 0 Beam 0]: "5,6"\n'
    with pytest.raises(UserError, match="--tokenizer_dir is not given .* which text needs"):
        run.main([*common, "--input_text", "a"])
    with pytest.raises(UserError, match="which --stop_words needs"):
        run.main([*common, "--input_file", str(source), "--stop_words", "a"])


def chat_text(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def test_chat(call, tokenizer):
    _, session = call("--chat", "--system_prompt", "Be kind.", "--input_text", "hi", "yes")
    for ids, text in zip(session.calls[0][0], ["hi", "yes"], strict=True):
        prompt = chat_text(("system", "Be kind."), ("user", text)) + "<|im_start|>assistant\n"
        assert list(ids) == tokenizer.encode(prompt)
    assert 7 in session.calls[0][1][0].end_ids


def test_typed_prompts(call, monkeypatch, tokenizer):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1,2,3,4,5\n\n🙂 x\n/exit\nno\n"))
    out, session = call("--interactive", "--streaming_interval", "1", tokens=5)
    prompts = ["1,2,3,4,5", "🙂 x"]
    assert [list(prompt) for (prompt,), _ in session.calls] == [
        tokenizer.encode(p) for p in prompts
    ]
    assert out == "".join(tokenizer.decode(tokenizer.encode(p)[:5]) + "\n" for p in prompts)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_is_asked_if_there_is_no_prompt(call, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", Terminal("1,2\n"))
    out, _ = call()
    assert out.startswith(f"{GREETING}\n> ")
    for flags in (["--input_text", "a"], ["--output_csv", str(tmp_path / "o.csv")]):
        monkeypatch.setattr(sys, "stdin", Terminal("1,2\n"))
        assert GREETING not in call(*flags)[0]


def test_typed_chat_remembers(call, monkeypatch, tokenizer):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nmore\n"))
    session = StubSession()
    session.info.limits.max_input_len = 100
    call("--interactive", "--chat", session=session, tokens=3)
    first = chat_text(("user", "hi")) + "<|im_start|>assistant\n"
    answer = tokenizer.decode(tokenizer.encode(first)[:3])
    second = chat_text(("user", "hi"), ("assistant", answer), ("user", "more"))
    asked = [list(prompt) for (prompt,), _ in session.calls]
    assert asked == [
        tokenizer.encode(first),
        tokenizer.encode(second + "<|im_start|>assistant\n"),
    ]


def test_typed_chat_forgets_when_the_engine_has_no_room(call, monkeypatch, tokenizer):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nmore\n"))
    session = StubSession()
    system = ["--chat", "--system_prompt", "S"]
    last = chat_text(("system", "S"), ("user", "more")) + "<|im_start|>assistant\n"
    session.info.limits.max_input_len = len(tokenizer.encode(last)) + 1
    call("--interactive", *system, session=session, tokens=3)
    assert list(session.calls[-1][0][0]) == tokenizer.encode(last)


def test_typed_prompt_that_is_too_long_is_reported_and_the_next_answered(
    call, monkeypatch, tokenizer
):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'word ' * 100}\nok\n"))
    out, session = call("--interactive")
    assert session.err.count("\n") == 1 and "tokens, too many" in session.err
    assert out == tokenizer.decode(tokenizer.encode("ok")[:4]) + "\n"


def test_profile(call):
    out, session = call("--input_text", "1,2,3", "4,5,6", "7,8,9", "--run_profiling")
    assert len(session.calls) == 3
    warm_up, timed, first = session.calls
    assert warm_up == timed
    assert len(first[0]) == 2 and [p.max_new_tokens for p in first[1]] == [1, 1]
    assert "tokens/s" in out and "Time to first token:" in out and "Output [Text 2" in out


def test_profile_figures():
    ticks = iter([10.0, 12.0, 20.0, 20.25])
    params = [SamplingParams(4, min_length=4)] * 2
    _, profile = measure(StubSession(), [(1, 2, 3, 4), (5,)], params, clock=lambda: next(ticks))
    assert str(profile).splitlines() == [
        "Latency: 2000.0 ms for 5 new tokens of 2 prompts",
        "Throughput: 2.5 tokens/s",
        "Time to first token: 250.0 ms",
    ]


def test_other_ranks_read_and_print_nothing(capsys):
    """Rank 1 of 2 gets rank 0's value and raises rank 0's error."""

    def fail():
        raise AssertionError("ran on rank 1")

    received = SimpleNamespace(rank=1, bcast=lambda value: (7, None))
    assert on_root(received, fail) == 7
    failed = SimpleNamespace(rank=1, bcast=lambda value: (None, UserError("no tokens")))
    with pytest.raises(UserError, match="no tokens"):
        on_root(failed, fail)
    sent = []
    root = SimpleNamespace(rank=0, bcast=lambda value: sent.append(value) or value)
    with pytest.raises(ValueError):
        on_root(root, lambda: int("x"))

    def refuse():
        raise UserError("no tokens")

    with pytest.raises(UserError):
        on_root(root, refuse)
    assert len(sent) == 1 and str(sent[0][1]) == "no tokens"
