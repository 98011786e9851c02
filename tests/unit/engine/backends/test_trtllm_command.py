"""trtllm-build's command line in the words of three ranges of versions (help_texts.py)."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.backends import trtllm_command
from engine.backends.trtllm_command import Dialect, make_command
from engine.config import ModelConfig
from engine.errors import UserError
from engine.limits import BuildLimits
from engine.mapping import Mapping
from engine.quant import Algorithm, QuantConfig
from engine.record import EngineRecord
from tests.unit.engine.backends.help_texts import DIALECTS, MIDDLE, NEW, OLD

# What the seed's commands give.
SEED = {
    "use_gpt_attention_plugin": "bfloat16",
    "use_gemm_plugin": "float16",
    "enable_context_fmha": True,
    "remove_input_padding": True,
    "use_fused_mlp": True,
    "use_custom_all_reduce": False,
    "builder_opt": None,
}
RECORD = EngineRecord(
    config=ModelConfig(),
    dtype="bfloat16",
    quant=QuantConfig(),
    mapping=Mapping(2, 0, 2, 1),
    limits=BuildLimits(max_batch_size=4, max_input_len=1024, max_output_len=512),
    layout_version=1,
)


def translate(
    text: str, switches: dict[str, Any] | None = None, record: EngineRecord = RECORD
) -> dict[str, str | None]:
    """The command's flags with their values; None for a flag without one."""
    command = make_command(
        "trtllm-build",
        Dialect.from_help(text),
        record,
        SEED if switches is None else switches,
        checkpoint_dir=Path("ckpt"),
        output_dir=Path("out"),
        workers=2,
    )
    assert command[0] == "trtllm-build"
    found: dict[str, str | None] = {}
    for word in command[1:]:
        if word.startswith("--"):
            assert word not in found, f"{word} is given twice"
            found[word] = None
        else:
            last = next(reversed(found))
            assert found[last] is None, f"{last} has two values"
            found[last] = word
    return found


COMMON = {
    "--checkpoint_dir": "ckpt",
    "--output_dir": "out",
    "--max_batch_size": "4",
    "--max_input_len": "1024",
    "--max_beam_width": "1",
    "--max_num_tokens": "4096",
    "--workers": "2",
    "--gpt_attention_plugin": "bfloat16",
    "--gemm_plugin": "bfloat16",
    "--context_fmha": "enable",
    "--remove_input_padding": "enable",
    "--output_timing_cache": "out/model.cache",
}
EXPECTED = {
    "0.8 to 0.10": {**COMMON, "--max_output_len": "512", "--use_fused_mlp": None},
    "0.11 to 0.13": {**COMMON, "--max_seq_len": "1536", "--use_fused_mlp": None},
    "0.14 to 1.2": {**COMMON, "--max_seq_len": "1536", "--use_fused_mlp": "enable"},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_the_seeds_switches(name):
    assert translate(DIALECTS[name]) == EXPECTED[name]


def test_mentioned_flags_are_not_listed_ones():
    text = "  --max_seq_len MAX_SEQ_LEN\n                        Instead of --max_output_len N\n"
    assert Dialect.from_help(f"usage: x\n{text}").flags == {"--max_seq_len": True}


def test_limits_are_always_given():
    limits = BuildLimits(2, 64, 32, max_beam_width=4, max_num_tokens=100)
    found = translate(NEW, {}, replace(RECORD, limits=limits))
    assert found["--max_num_tokens"] == "100"
    assert found["--max_seq_len"] == "96"
    assert found["--max_beam_width"] == "4"


def test_paged_cache_and_logits():
    limits = replace(
        RECORD.limits, paged_kv_cache=True, tokens_per_block=32, gather_all_token_logits=True
    )
    record = replace(RECORD, limits=limits)
    new, old = translate(NEW, {}, record), translate(OLD, {}, record)
    assert (new["--kv_cache_type"], new["--tokens_per_block"]) == ("paged", "32")
    assert "--paged_kv_cache" not in new
    assert (old["--paged_kv_cache"], old["--tokens_per_block"]) == ("enable", "32")
    assert new["--gather_all_token_logits"] is old["--gather_all_token_logits"] is None


def test_switches_without_a_counterpart_are_said(caplog):
    switches = {
        "builder_opt": 3,
        "strongly_typed": True,
        "use_custom_all_reduce": True,
        "multi_block_mode": True,
        "enable_context_fmha_fp32_acc": True,
        "use_rmsnorm_plugin": "float16",
        "enable_debug_output": True,
    }
    with caplog.at_level(logging.INFO, logger="yi"):
        new = translate(NEW, switches)
    [line] = [r.getMessage() for r in caplog.records]
    assert line.startswith("without a counterpart in this trtllm-build: ")
    gone = set(line.partition(": ")[2].split(", "))
    assert gone == {f"--{name}" for name in switches} - {"--enable_debug_output"}
    assert "--enable_debug_output" in new
    old = translate(OLD, switches)
    assert (old["--builder_opt"], old["--strongly_typed"]) == ("3", None)
    assert old["--rmsnorm_plugin"] == "bfloat16"
    assert old["--multi_block_mode"] == old["--context_fmha_fp32_acc"] == "enable"
    middle = translate(MIDDLE, switches)
    assert "--rmsnorm_plugin" not in middle
    assert middle["--use_custom_all_reduce"] == "enable"


def test_visualise_takes_a_folder_since_0_14():
    assert translate(OLD, {"visualize": True})["--visualize_network"] is None
    assert translate(NEW, {"visualize": True})["--visualize_network"] == "out"


def test_fp8_has_no_gemm_plugin():
    record = replace(RECORD, quant=QuantConfig(Algorithm.FP8))
    assert "--gemm_plugin" not in translate(NEW, SEED, record)


def test_timing_cache_is_read_where_there_is_one(tmp_path):
    cache = tmp_path / "model.cache"
    assert "--input_timing_cache" not in translate(NEW, {"timing_cache": str(cache)})
    cache.write_bytes(b"")
    assert translate(NEW, {"timing_cache": str(cache)})["--input_timing_cache"] == str(cache)


def script(folder: Path, body: str) -> str:
    path = folder / "trtllm-build"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return str(path)


def test_a_tool_of_another_kind_is_refused(tmp_path):
    tool = script(tmp_path, "print('--checkpoint_dir DIR --gemm_plugin X')")
    with pytest.raises(UserError, match="is not that of TensorRT-LLM 0.8 … 1.2"):
        trtllm_command.probe(tool)
    broken = script(tmp_path, "import sys; sys.exit('libnvinfer.so.9: cannot open')")
    with pytest.raises(UserError, match=r"status 1 .*\(libnvinfer.so.9: cannot open\)"):
        trtllm_command.probe(broken)


def test_output_is_logged_and_failure_is_one_sentence(tmp_path, caplog):
    tool = script(tmp_path, "print('step 1'); print('no tactic'); raise SystemExit(3)")
    with (
        caplog.at_level(logging.INFO, logger="yi"),
        pytest.raises(UserError) as error,
    ):
        trtllm_command.run([tool], to_repeat=[tool, "--output_dir", "my engines"])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1:] == ["step 1", "no tactic"]
    assert str(error.value) == (
        "trtllm-build ended with status 3 (no tactic); the checkpoint is kept, and this repeats "
        f"the step: {tool} --output_dir 'my engines'"
    )
