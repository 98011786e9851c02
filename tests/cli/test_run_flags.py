"""run.py: its frozen flags and every refusal's sentence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import run
from engine.errors import UserError
from engine.sampling import SamplingParams
from utils.generation import Decoding

ROOT = Path(__file__).parents[2]
TINY_YI = ROOT / "models" / "tiny-yi"

# The whole interface. A flag is added or dropped here and in the README on purpose only.
FLAGS = {
    "bad_words",
    "chat",
    "debug_mode",
    "device",
    "early_stopping",
    "end_id",
    "engine_dir",
    "frequency_penalty",
    "help",
    "input_file",
    "input_text",
    "interactive",
    "length_penalty",
    "log_level",
    "lora_ckpt_source",
    "lora_dir",
    "lora_task_uids",
    "max_attention_window_size",
    "max_input_length",
    "max_output_len",
    "min_length",
    "min_p",
    "no_add_special_tokens",
    "no_prompt_template",
    "no_repeat_ngram_size",
    "no_tuning",
    "num_beams",
    "num_prepend_vtokens",
    "output_csv",
    "output_cum_log_probs_npy",
    "output_log_probs_npy",
    "output_logits_npy",
    "output_npy",
    "oversubscribe_gpu",
    "pad_id",
    "presence_penalty",
    "prompt_table_path",
    "prompt_tasks",
    "random_seed",
    "repetition_penalty",
    "run_profiling",
    "stop_words",
    "streaming",
    "streaming_interval",
    "system_prompt",
    "temperature",
    "tokenizer_dir",
    "tokenizer_type",
    "top_k",
    "top_p",
    "trust_remote_code",
    "use_py_session",
    "vocab_file",
}
# Older spellings and what they are called now.
ALIASES = {
    "input_tokens": "input_file",
    "input_tokens_limit": "max_input_length",
    "max_kv_cache_len": "max_attention_window_size",
    "prompt_table": "prompt_table_path",
    "tasks": "prompt_tasks",
}


def test_frozen_flags():
    actions = run.make_parser()._actions
    spelled = {
        option.lstrip("-").replace("-", "_"): action.dest.replace("-", "_")
        for action in actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert {flag for flag, dest in spelled.items() if flag == dest} == FLAGS
    assert {flag: dest for flag, dest in spelled.items() if flag != dest} == ALIASES


def test_defaults_are_the_parameters_own():
    own = {f.name: f.default for f in fields(SamplingParams)}
    assert {f.name: f.default for f in fields(Decoding)} == {
        f.name: own[f.name] for f in fields(Decoding)
    }
    assert run.make_parser().parse_args(["--max_output_len", "1"]).engine_dir == "engine_outputs"


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys, run; text = run.make_parser().format_help(); assert '--input_text' in text;"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


OUTPUTS = [f"output_{name}" for name in ("csv", "npy", "log_probs_npy", "cum_log_probs_npy")]
REFUSALS = [
    (["--lora_dir", "x"], "--lora_dir: LoRA is not available in this version; leave it out"),
    (["--lora_task_uids", "0", "-1"], "--lora_task_uids: LoRA is not available"),
    (["--lora_ckpt_source", "hf"], "--lora_ckpt_source: LoRA is not available"),
    (["--prompt_table", "p.npy"], "--prompt_table_path: prompt tuning is not available"),
    (["--tasks", "0,1"], "--prompt_tasks: prompt tuning is not available"),
    (["--num_prepend_vtokens", "3"], "--num_prepend_vtokens: prompt tuning is not available"),
    (["--input_text", "a", "--input_file", "b.txt"], "cannot be combined: prompts come from one"),
    (["--chat", "--no_prompt_template"], "--chat and --no_prompt_template cannot be combined"),
    (["--chat", "--no_add_special_tokens"], "the chat template places the special tokens"),
    (["--interactive", "--input_text", "a"], "an interactive run asks for its prompts"),
    (["--interactive", "--input_file", "a.txt"], "an interactive run asks for its prompts"),
    (["--interactive", "--run_profiling"], "an interactive run cannot be repeated"),
    *((["--interactive", f"--{name}", "o"], "writes no files") for name in OUTPUTS),
    (["--streaming", "--run_profiling"], "a profile times whole runs"),
    (["--streaming", "--output_logits_npy", "o"], "a stream has no logits"),
    (["--num_beams", "2", "--output_logits_npy", "o"], "--output_logits_npy cannot be combined"),
    (["--num_beams", "2", "--output_log_probs_npy", "o"], "with --num_beams 2, since beam search"),
    (["--system_prompt", "x"], "--system_prompt is a part of a chat; add --chat"),
    (["--chat", "--input_file", "p.csv"], "--input_file p.csv holds token ids; give a .txt file"),
    (["--engine_dir", "missing"], "--engine_dir missing does not exist; build an engine"),
    (["--tokenizer_dir", "./missing"], "--tokenizer_dir ./missing does not exist"),
    (["--vocab_file", "missing.model"], "--vocab_file missing.model does not exist"),
    (["--input_file", "missing.txt"], "--input_file missing.txt cannot be read"),
    (["--input_file", "p.json"], "--input_file p.json is of no known kind"),
    (["--input_text", "a", ""], "--input_text: prompt 1 has no tokens"),
    (["--input_text", "a", "\udcff"], "--input_text: text 1 is not UTF-8"),
    (["--output_csv", "."], "--output_csv . is a folder; name a file"),
    (["--stop_words", ""], "--stop_words '' has no tokens; give a word"),
    (
        ["--input_text", "a", "b", "c", "--bad_words", "x", "--bad_words", "y"],
        "--bad_words is given 2 times for 3 prompts; give it once for all of them",
    ),
    (["--temperature", "-1"], "--temperature -1.0 is not possible"),
    (["--min_length", "9"], "--min_length 9 is more than --max_output_len 4"),
    (["--num_beams", "2", "--top_p", "0.5"], "--top_p 0.5 cannot be combined with --num_beams 2"),
]


@pytest.mark.parametrize("args, message", REFUSALS, ids=lambda value: str(value)[:40])
def test_refusals_before_any_engine_is_opened(tmp_path, monkeypatch, args, message):
    def open_engine(*args, **options):
        raise AssertionError("the engine was opened")

    monkeypatch.setattr("engine.backends.open_engine", open_engine, raising=False)
    monkeypatch.chdir(tmp_path)
    common = ["--engine_dir", str(tmp_path), "--max_output_len", "4"]
    if "--tokenizer_dir" not in args and "--vocab_file" not in args:
        common += ["--tokenizer_dir", str(TINY_YI)]
    with pytest.raises(UserError) as caught:
        run.main([*common, *args])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "args, words",
    [
        ([], ["--max_output_len"]),
        (["--max_output_len", "0"], ["--max_output_len", "0"]),
        (["--max_output_len", "4", "--engine_dir", "missing"], ["--engine_dir missing"]),
        (["--max_output_len", "4", "--max_out"], ["--max_out"]),
    ],
)
def test_mistakes_exit_with_2_and_one_line(args, words):
    done = subprocess.run(
        [sys.executable, "run.py", *args], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert all(word in done.stderr for word in words)
    assert "Traceback" not in done.stderr
