"""summarize.py: its frozen flags and every refusal that needs no model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import summarize
from engine import env
from engine.errors import UserError
from utils.evaluation.plan import EvaluationPlan, plan_evaluation

ROOT = Path(__file__).parents[2]

# The whole interface. A flag is added or dropped here and in the README on purpose only.
FLAGS = {
    "bad_words",
    "batch_size",
    "check_accuracy",
    "check_parity",
    "data_type",
    "dataset_path",
    "debug_mode",
    "device",
    "early_stopping",
    "end_id",
    "engine_dir",
    "eval_ppl",
    "eval_task",
    "frequency_penalty",
    "help",
    "hf_device_map_auto",
    "hf_model_location",
    "length_penalty",
    "log_level",
    "max_attention_window_size",
    "max_input_length",
    "max_ite",
    "min_length",
    "min_p",
    "no_add_special_tokens",
    "no_repeat_ngram_size",
    "no_tuning",
    "num_beams",
    "output_dir",
    "output_len",
    "oversubscribe_gpu",
    "pad_id",
    "ppl_file",
    "presence_penalty",
    "random_seed",
    "repetition_penalty",
    "stop_words",
    "temperature",
    "tensorrt_llm_rouge1_threshold",
    "test_hf",
    "test_trt_llm",
    "tokenizer_dir",
    "tokenizer_type",
    "top_k",
    "top_p",
    "trust_remote_code",
    "use_py_session",
    "vocab_file",
}
# Other spellings and what they are called here.
ALIASES = {
    "hf_model_dir": "hf_model_location",
    "max_kv_cache_len": "max_attention_window_size",
    "max_kv_cache_length": "max_attention_window_size",
    "model_dir": "hf_model_location",
    "test_engine": "test_trt_llm",
}
# TensorRT-LLM's.
DEFAULTS = {
    "batch_size": 1,
    "data_type": "fp16",
    "dataset_path": None,
    "eval_task": "summarize",
    "length_penalty": 1.0,
    "log_level": "info",
    "max_input_length": 923,
    "max_ite": 20,
    "num_beams": 1,
    "output_len": 100,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "tensorrt_llm_rouge1_threshold": 15.0,
    "top_k": 1,
    "top_p": 0.0,
}


def parse(*argv: str) -> dict:
    return vars(summarize.make_parser().parse_args(list(argv)))


def make_plan(*engine_dirs: str) -> EvaluationPlan:
    """A plan to test engines that need not exist."""
    with mock.patch.object(Path, "is_dir", lambda path: True):
        return plan_evaluation(parse("--test_engine", "--engine_dir", *engine_dirs))


def test_frozen_flags():
    spelled = {
        option.lstrip("-").replace("-", "_"): action.dest.replace("-", "_")
        for action in summarize.make_parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert {flag for flag, dest in spelled.items() if flag == dest} == FLAGS
    assert {flag: dest for flag, dest in spelled.items() if flag != dest} == ALIASES


def test_defaults():
    flags = parse()
    assert {name: flags[name] for name in DEFAULTS} == DEFAULTS
    assert flags["engine_dir"] == ["engine_outputs"]


def test_older_spellings_and_hyphens():
    flags = parse(
        "--test-engine", "--hf-model-dir", "m", "--max-kv-cache-length", "9", "--max-ite=3"
    )
    assert flags == parse(
        "--test_trt_llm", "--model_dir=m", "--max_kv_cache_len", "9", "--max_ite", "3"
    )
    assert (flags["hf_model_location"], flags["max_attention_window_size"]) == ("m", 9)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("fp32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16"), ("bf16", "bf16")],
)
def test_data_types(given, dtype):
    plan = plan_evaluation(parse("--test_hf", "--hf_model_dir", "m", "--data_type", given))
    assert plan.hf.dtype == dtype
    assert plan.engine_dirs == ()


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys, summarize; text = summarize.make_parser().format_help();"
        "assert '--check_parity' in text;"
        "heavy = {'torch', 'transformers', 'datasets', 'evaluate', 'numpy', 'matplotlib'};"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_number_of_articles_is_batches_times_size():
    plan = plan_evaluation(
        parse("--test_hf", "--model_dir", "m", "--batch_size", "4", "--max_ite", "5")
    )
    assert (plan.data.articles, plan.batch_size) == (20, 4)


def test_remarks():
    flags = ("--test_hf", "--model_dir", "m", "--debug_mode", "--top_p", "0.9")
    plan = plan_evaluation(parse(*flags, "--use_py_session", "--max_kv_cache_len", "64"))
    assert list(plan.remarks) == [
        "without meaning here and ignored: --use_py_session, --debug_mode",
        "--top_p without effect while --top_k is 1; add --top_k 0",
        "--max_attention_window_size holds for the engine only: transformers attends to all tokens",
    ]


HF = ["--test_hf", "--hf_model_location", "m"]
ENGINE = ["--test_trt_llm", "--engine_dir", "."]
REFUSALS = [
    ([], "neither --test_hf nor --test_trt_llm is given; say with them which side to test"),
    (["--test_hf"], "--test_hf needs the checkpoint; name its folder or hub id with --hf_model_l"),
    ([*HF, "--check_accuracy"], "--check_accuracy compares an engine's ROUGE-1 with a threshold"),
    ([*ENGINE, "--check_accuracy", "--eval_task", "ppl"], "--check_accuracy compares .* --eval_"),
    ([*ENGINE, "--check_parity", "1"], "--check_parity compares an engine with the checkpoint; ad"),
    ([*HF, "--check_parity", "0"], "--check_parity compares .* add both --test_trt_llm and --test"),
    (
        [*HF, *ENGINE, "--check_parity", "1", "--eval_task", "generate"],
        "--check_parity compares scores and --eval_task generate has none; add --eval_ppl",
    ),
    ([*HF, "--ppl_file", "a.txt"], "--ppl_file is a text for perplexity; add --eval_ppl or --eval"),
    ([*ENGINE, "--hf_device_map_auto"], "--hf_device_map_auto belongs to --test_hf; add that fl"),
    ([*HF, "--presence_penalty", "0.5"], "--presence_penalty 0.5 is not known to transformers"),
    ([*HF, "--frequency_penalty", "0.5"], "--frequency_penalty 0.5 is not known to transformers"),
    ([*HF, "--min_length", "101"], "--min_length 101 is more than --output_len 100; lower the one"),
    (
        [*HF, "--stop_words", "a", "--stop_words", "b"],
        "--stop_words is given 2 times; give it once, with all words",
    ),
    (["--test_engine", "--engine_dir", "none"], "--engine_dir none does not exist; build an eng"),
    (["--test_engine", "--engine_dir", ".", "utils/.."], "--engine_dir utils/.. is named twice; "),
    ([*HF, "--check_parity", "-1"], "--check_parity: '-1' is not a number of at least 0"),
    ([*HF, "--batch_size", "0"], "--batch_size: '0' is not a whole number of at least 1"),
    ([*HF, "--eval_task", "mmlu"], "--eval_task: invalid choice: 'mmlu'"),
    ([*HF, "--data_type", "int8"], "--data_type: invalid choice: 'int8'"),
    ([*HF, "--max_it", "3"], "unknown flag --max_it; did you mean --max_ite?"),
]


@pytest.mark.parametrize(("argv", "said"), REFUSALS, ids=lambda value: None)
def test_refusals(argv, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=f"^{said}") as raised:
        summarize.main(argv)
    assert "\n" not in str(raised.value)


def test_several_engines_are_not_started_under_mpirun(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(env, "under_mpi", lambda: True)
    with pytest.raises(UserError, match="^several --engine_dir are each started as a job of their"):
        plan_evaluation(parse("--test_engine", "--engine_dir", "utils", "engine"))
    assert plan_evaluation(parse("--test_engine", "--engine_dir", "utils")).engine_dirs == (
        "utils",
    )
