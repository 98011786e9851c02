"""What each mode costs in quality: perplexity of tiny-yi's held-out text, and how often the most
probable token is the exact model's, engine by engine.

    python -m benchmarks.quality [--work DIR] [--modes NAME …] [--write README.md]

Calibrates on the bundled articles with the commands that users have, builds an engine per mode,
and prints a Markdown table; --write puts it between the marks of a file. Perplexity is per token,
in windows of 512 that do not overlap, as in models/tiny-yi/evaluate.py.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.marks import write_between
from engine.backends import open_engine
from engine.comm import World
from utils.cli import Parser, run_main
from utils.evaluation.perplexity import cut_windows, sum_likelihood
from utils.evaluation.task import Ids

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-yi"
ARTICLES = ROOT / "tests" / "data" / "cnn_dailymail"
MARK = "quality table"
EXACT, BASELINE = "FP32", "BF16"


@dataclass(frozen=True)
class Mode:
    """A row of the table: build.py's flags, and the calibrations they need; {kv} and the like stand
    for what a calibration wrote."""

    flags: str
    needs: tuple[str, ...] = ()


# Name → the command that writes it, at {out}.
CALIBRATIONS = {
    "kv": "hf_yi_convert.py -i {model} -o {out} --calibrate-kv-cache -t fp16 {calib}",
    "sq": "hf_yi_convert.py -i {model} -o {out} -sq 0.5 -t fp32 {calib}",
    "fp8": "quantize.py --model_dir {model} --dtype bfloat16 --qformat fp8 --export_path {out} "
    "{calib}",
    "awq": "quantize.py --model_dir {model} --dtype bfloat16 --qformat int4_awq "
    "--export_path {out}.pt {calib}",
    "gptq": "quantize.py --model_dir {model} --dtype bfloat16 --qformat int4_gptq "
    "--export_path {out}.safetensors {calib}",
}
CALIBRATION_FLAGS = "--calib_dataset {articles} --calib_size 20 --calib_max_length 256"

_HF = "--model_dir {model} --dtype bfloat16"
_SQ = "--ft_model_dir {sq}/1-gpu --dtype bfloat16 --use_smooth_quant"
_AWQ = f"{_HF} --use_weight_only --weight_only_precision int4_awq --quant_ckpt_path {{awq}}.pt"
_GPTQ = (
    f"{_HF} --use_weight_only --weight_only_precision int4_gptq --quant_ckpt_path "
    "{gptq}.safetensors"
)
_FP8 = f"{_HF} --enable_fp8 --quantized_fp8_model_path {{fp8}}/llama_tp1_rank0.npz"
_INT8_KV = "--int8_kv_cache --ft_model_dir {kv}/1-gpu"

MODES = {
    EXACT: Mode("--model_dir {model} --dtype float32"),
    "FP16": Mode("--model_dir {model} --dtype float16"),
    BASELINE: Mode(_HF),
    "INT8 weight-only": Mode(f"{_HF} --use_weight_only"),
    "INT4 weight-only": Mode(f"{_HF} --use_weight_only --weight_only_precision int4"),
    "SmoothQuant per tensor": Mode(_SQ, ("sq",)),
    "SmoothQuant per channel": Mode(f"{_SQ} --per_channel", ("sq",)),
    "SmoothQuant per token": Mode(f"{_SQ} --per_token", ("sq",)),
    "SmoothQuant per token, per channel": Mode(f"{_SQ} --per_token --per_channel", ("sq",)),
    "INT4 AWQ, groups of 128": Mode(_AWQ, ("awq",)),
    "INT4 GPTQ, groups of 128": Mode(_GPTQ, ("gptq",)),
    "FP8, calibrated": Mode(_FP8, ("fp8",)),
    "FP8, scales at run time": Mode(f"{_HF} --enable_fp8"),
    "INT8 KV cache": Mode(f"{_HF} {_INT8_KV}", ("kv",)),
    "FP8 KV cache": Mode(f"{_HF} --fp8_kv_cache --ft_model_dir {{kv}}/1-gpu", ("kv",)),
    "INT8 weight-only, INT8 KV cache": Mode(
        "--ft_model_dir {kv}/1-gpu --dtype bfloat16 --use_weight_only --int8_kv_cache", ("kv",)
    ),
    "INT4 AWQ, INT8 KV cache": Mode(f"{_AWQ} {_INT8_KV}", ("awq", "kv")),
    "INT4 GPTQ, INT8 KV cache": Mode(f"{_GPTQ} {_INT8_KV}", ("gptq", "kv")),
    "FP8, FP8 KV cache": Mode(f"{_FP8} --fp8_kv_cache", ("fp8",)),
    "SmoothQuant per token, per channel, INT8 KV cache": Mode(
        f"{_SQ} --per_token --per_channel --int8_kv_cache", ("sq",)
    ),
}


@dataclass(frozen=True)
class Quality:
    """An engine's perplexity, its most probable token at every position (int64 [positions], not
    rounded by anything), and the bytes of its rank file."""

    perplexity: float
    best: Tensor
    bytes: int

    def agreement(self, exact: Quality) -> float:
        """Part of the positions at which `exact` has the same most probable token."""
        return (self.best == exact.best).float().mean().item()


class Workshop:
    """Calibrations and engines in a folder, each made once."""

    def __init__(self, work: Path):
        self.work = work

    def calibrate(self, name: str) -> Path:
        """Where the calibration's files are, made now if they are not there."""
        out = self.work / name
        done = out.with_name(f"{name}.done")
        if not done.exists():
            calib = CALIBRATION_FLAGS.format(articles=ARTICLES)
            self._run(CALIBRATIONS[name].format(model=MODEL, out=out, calib=calib))
            done.touch()
        return out

    def build(self, name: str, *extra: str) -> Path:
        """The engine directory of the mode called `name`."""
        mode = MODES[name]
        words = "_".join(["engine", name, *extra]).lower()
        folder = self.work / "".join(c if c.isalnum() else "_" for c in words)
        if not (folder / "config.json").exists():
            places = {need: self.calibrate(need) for need in mode.needs}
            flags = mode.flags.format(model=MODEL, **places)
            build(shlex.split(f"{flags} --output_dir {folder} --log_level error"), *extra)
        return folder

    def _run(self, command: str) -> None:
        script, *arguments = shlex.split(command)
        finished = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=self.work,
            capture_output=True,
            text=True,
        )
        if finished.returncode:
            raise RuntimeError(f"{command}\n{finished.stdout}\n{finished.stderr}")


def build(flags: list[str], *extra: str) -> None:
    """build.py in this process: it starts much faster than a new one, and there are many."""
    import build as script

    with redirect_stdout(io.StringIO()):
        status = script.main([*flags, *extra])
    assert status == 0, flags


def measure(folder: Path, device: str = "cpu") -> Quality:
    """Of a one-rank engine of tiny-yi."""
    from sentencepiece import SentencePieceProcessor

    codec = SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    tokens = codec.encode((MODEL / "heldout.txt").read_text(encoding="utf-8"))
    session = open_engine(folder, World(), device=device)
    best: list[Tensor] = []

    def score(windows: Sequence[Ids]) -> Iterator[Tensor]:
        for logits_SV in session.score(windows):
            best.append(logits_SV.argmax(-1).cpu())
            yield logits_SV

    likelihood = sum_likelihood(score, cut_windows(tokens), session.info.config.vocab_size)
    return Quality(likelihood.perplexity, torch.cat(best), session.info.files[0].bytes)


def make_table(found: dict[str, Quality]) -> str:
    """Markdown; `found` has the exact and the baseline mode."""
    lines = [
        "| mode | engine file, MB | perplexity | against BF16 | same best token as FP32 |",
        "|---|---|---|---|---|",
    ]
    base, exact = found[BASELINE].perplexity, found[EXACT]
    for name, quality in found.items():
        change = 100 * (quality.perplexity / base - 1)
        against = "–" if name == BASELINE else f"{change:+.2f} %"
        same = "–" if name == EXACT else f"{100 * quality.agreement(exact):.1f} %"
        size = quality.bytes / 1e6
        lines.append(f"| {name} | {size:.1f} | {quality.perplexity:.2f} | {against} | {same} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="quality.py", description="perplexity of every mode on tiny-yi")
    parser.add_argument("--work", metavar="DIR", help="keep calibrations and engines here")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="NAME")
    parser.add_argument("--write", metavar="FILE", help="put the table between the file's marks")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        workshop = Workshop(work.resolve())
        found = {}
        for name in dict.fromkeys([EXACT, BASELINE, *args.modes]):
            found[name] = measure(workshop.build(name))
            print(f"{name}: {found[name].perplexity:.3f}", file=sys.stderr, flush=True)
    table = make_table({name: found[name] for name in MODES if name in found})
    print(table)
    if args.write:
        write_between(Path(args.write), MARK, table)
    return 0


if __name__ == "__main__":
    run_main(main)
