"""Folders of the converter's format, made by numpy, read back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.checkpoint.ft import open_ft, read_ft_kv_scales
from engine.checkpoint.open import Paths, open_source
from engine.config import ModelConfig
from engine.errors import CheckpointError, UserError
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.deferred import defer
from engine.weights.numerics import dequantize
from tests.ft_golden import (
    Shape,
    cache_files,
    golden_files,
    smooth_layer,
    upstream_fields,
    write_folder,
)

FULL = QuantConfig()
MODES = {
    f"per_token={t} per_channel={c}": QuantConfig(Algorithm.W8A8_SQ, per_token=t, per_channel=c)
    for t in (False, True)
    for c in (False, True)
}
SQ = MODES["per_token=False per_channel=True"]
STATIC = MODES["per_token=False per_channel=False"]

SHAPES = {
    "tp 1": Shape(),
    "tp 2": Shape(tp=2),
    "tp above kv heads": Shape(tp=4),
    "no groups": Shape(kv_heads=8, tp=2),
    "Yi-6B": Shape(32, 4, 128, 24, 32, 10, 1, 8),
    "Yi-34B": Shape(56, 8, 128, 24, 32, 10, 1, 4),
}
DENSE = "model.layers.1.attention.dense"
QKV = "model.layers.1.attention.query_key_value"


def write(folder: Path, shape: Shape, alpha: float | None = None, **fields) -> Path:
    """A folder as TensorRT-LLM's converter makes it, with changed or (None: no) fields."""
    files = golden_files(shape, shape.weights(), shape.ranges(), alpha)
    merged = upstream_fields(shape, alpha) | fields
    return write_folder(folder, files, merged)


def logits(shape: Shape, weights) -> torch.Tensor:
    """transformers' logits of some tokens."""
    model = LlamaForCausalLM(LlamaConfig(**shape.hf()))
    model.load_state_dict({name: torch.as_tensor(array) for name, array in weights.items()})
    with torch.no_grad():
        return model(torch.arange(20)[None] * 7 % shape.vocab).logits


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_full_precision_is_the_original(tmp_path, shape):
    weights = shape.weights()
    with open_ft(write(tmp_path, shape), quant=FULL) as checkpoint:
        checkpoint.check()
        assert checkpoint.quant is None
        assert checkpoint.config == ModelConfig.from_hf(shape.hf(), "hf")
        assert checkpoint.tensors.keys() == weights.keys()
        for name, array in weights.items():
            source, expected = checkpoint.tensors[name], torch.from_numpy(array)
            assert torch.equal(source.read(), expected), name
            for start, stop in ((0, 1), (3, 9), (5, None)):
                found = source.rows(start, stop)
                assert torch.equal(found, expected[start:stop]), name
                assert found.is_contiguous(), name


@pytest.mark.parametrize("shape", [Shape(tp=2), Shape(tp=4)], ids=["tp 2", "tp 4"])
def test_smoothed_network_is_the_same_function(tmp_path, shape):
    """The weights that full precision takes from a smoothed folder, run by transformers."""
    weights = shape.weights()
    with open_ft(write(tmp_path, shape, 0.7), quant=FULL) as checkpoint:
        checkpoint.check()
        found = {name: source.read() for name, source in checkpoint.tensors.items()}
    o_proj, q_proj = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "oq")
    torch.testing.assert_close(found[o_proj], torch.from_numpy(weights[o_proj]))
    assert not np.allclose(found[q_proj], weights[q_proj], rtol=0.1)
    torch.testing.assert_close(logits(shape, found), logits(shape, weights), rtol=0, atol=1e-4)


@pytest.mark.parametrize("quant", MODES.values(), ids=MODES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_int8_weights(tmp_path, shape, quant):
    """Codes times scales are the smoothed weights within half a step."""
    folder, weights = write(tmp_path, shape, 0.5), shape.weights()
    with open_ft(folder, quant=quant) as checkpoint:
        checkpoint.check()
        assert checkpoint.quant == quant
        for layer, found in enumerate(shape.ranges()):
            prefix = f"model.layers.{layer}."
            stems = [name.removesuffix(".weight") for name in weights if name.startswith(prefix)]
            own = {stem.split(".")[-1]: weights[f"{stem}.weight"] for stem in stems}
            smoothed, x, smoothers = smooth_layer(own, found["x"], 0.5)
            for stem in (stem for stem in stems if stem.endswith("_proj")):
                name = stem.split(".")[-1]
                linear, w_NK = checkpoint.linear(stem), smoothed[name]
                steps = np.abs(w_NK).max(axis=1) / 127
                steps = steps if quant.per_channel else np.full_like(steps, steps.max())
                np.testing.assert_allclose(linear.scale_N, steps, rtol=1e-5, err_msg=stem)
                error = np.abs(linear.codes_NK.numpy() * steps[:, None] - w_NK)
                assert (error <= steps[:, None] * 0.50001).all(), stem
                if quant.per_token:
                    assert linear.input_scale is None
                else:
                    assert linear.input_scale == pytest.approx(x[name].max() / 127, rel=1e-5)
                if name in ("o_proj", "down_proj"):
                    np.testing.assert_allclose(linear.smoother_K, smoothers[name], rtol=1e-5)
                else:
                    assert linear.smoother_K is None
                lazy = defer(checkpoint.lazy_linear(stem))
                assert (lazy.outputs, lazy.inputs) == w_NK.shape
                read = torch.cat([block.codes_NK for block in lazy.blocks()])
                assert torch.equal(read, linear.codes_NK)
                assert (lazy.sketch.input_scale is None) == quant.per_token
                assert (lazy.sketch.smoother_K is None) == (linear.smoother_K is None)


def test_query_key_and_value_keep_scales_of_their_own(tmp_path):
    """One scale for all three would round the smaller of them to next to nothing."""
    shape = Shape(tp=2)
    weights = shape.weights()
    for layer in range(shape.layers):
        weights[f"model.layers.{layer}.self_attn.v_proj.weight"] *= np.float32(0.001)
    files = golden_files(shape, weights, shape.ranges(), 0.0)
    folder = write_folder(tmp_path, files, upstream_fields(shape, 0.0))
    with open_ft(folder, quant=STATIC) as checkpoint:
        codes_NK = checkpoint.linear("model.layers.1.self_attn.v_proj").codes_NK
    assert codes_NK.abs().max() == 127


@pytest.mark.parametrize("quant", [FULL, SQ], ids=["full precision", "int8"])
def test_engines_take_it_from_the_flag(tmp_path, quant):
    """build.py's door, with the scales of the cache."""
    shape = Shape(tp=2)
    folder = write(tmp_path, shape, 0.5)
    quant = QuantConfig(**{**vars(quant), "kv": KVStorage.INT8})
    with open_source(Paths(ft_model_dir=str(folder)), quant) as checkpoint:
        y = shape.ranges()[1]["y"]
        largest = max(y[name] for name in ("q_proj", "k_proj", "v_proj"))
        k, v = checkpoint.cache_scales(1, KVStorage.INT8)
    assert k.tolist() == v.tolist() == pytest.approx([largest / 127])


def test_dequantised_weights_multiply_the_input_as_it_is(tmp_path):
    shape = Shape(layers=1)
    name = "model.layers.0.mlp.down_proj"
    with open_ft(write(tmp_path, shape, 0.5), quant=SQ) as checkpoint:
        w_NK = dequantize(checkpoint.linear(name))
    original = torch.from_numpy(shape.weights()[f"{name}.weight"])
    assert (w_NK - original).norm() < 0.01 * original.norm()


@pytest.mark.parametrize("kind, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_storage_types(tmp_path, kind, dtype):
    shape = Shape(tp=2)
    files = golden_files(shape, shape.weights(), shape.ranges())
    folder = write_folder(tmp_path, {}, upstream_fields(shape) | {"weight_data_type": kind})
    for name, array in files.items():
        if array.dtype == np.float32 and ".scale_" not in name:
            raw = torch.from_numpy(np.ascontiguousarray(array)).to(dtype).view(torch.int16).numpy()
            raw.tofile(folder / name)
    with open_ft(folder, quant=FULL) as checkpoint:
        checkpoint.check()
        assert checkpoint.dtype == dtype
        for name, array in shape.weights().items():
            assert torch.equal(checkpoint.tensors[name].read(), torch.from_numpy(array).to(dtype))


def test_constants_come_from_the_file(tmp_path):
    """TensorRT-LLM's loader takes 1e-6 and theta 10000 whatever the file says."""
    folder = write(tmp_path, Shape(), rms_norm_eps=3e-4, rope_theta=1e6, bos_token_id=5)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    with open_ft(folder, quant=FULL) as checkpoint:
        assert checkpoint.config.rms_norm_eps == 3e-4
        assert checkpoint.config.rope.theta == 1e6
        assert checkpoint.generation == {"bos_token_id": 5, "eos_token_id": [2, 7]}


def remove_field(folder: Path, name: str) -> None:
    path = folder / "config.ini"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(f"{name} =")))


@pytest.fixture
def messages(caplog, monkeypatch) -> Callable[[], list[str]]:
    """What is logged, whatever a script that ran before set up."""
    monkeypatch.setattr(logging.getLogger("yi"), "propagate", True)
    caplog.set_level(logging.WARNING, "yi")
    return lambda: caplog.messages


def test_missing_theta_is_said(tmp_path, messages):
    folder = write(tmp_path, Shape())
    with open_ft(folder, quant=FULL):
        assert messages() == []
    remove_field(folder, "rope_theta")
    with open_ft(folder, quant=FULL) as checkpoint:
        assert checkpoint.config.rope.theta == 10000
    [message] = messages()
    assert f"{folder / 'config.ini'}: has no rope_theta; Llama's default 10000 is used" in message


def test_theta_among_the_rope_parameters(tmp_path, messages):
    values = {"rope_type": "default", "rope_theta": 7e6}
    folder = write(tmp_path, Shape(), rope_parameters=values)
    remove_field(folder, "rope_theta")
    with open_ft(folder, quant=FULL) as checkpoint:
        assert checkpoint.config.rope.theta == 7e6
    assert messages() == []


def test_ranks_are_counted_where_the_file_does_not_say(tmp_path):
    shape = Shape(tp=2)
    folder = write(tmp_path, shape)
    remove_field(folder, "tensor_parallelism")
    with open_ft(folder, quant=FULL) as checkpoint:
        name = "model.layers.1.self_attn.k_proj.weight"
        assert torch.equal(checkpoint.tensors[name].read(), torch.from_numpy(shape.weights()[name]))


def damage(path: Path, index: int, value: float) -> None:
    array = np.fromfile(path, np.float32)
    array[index] = value
    array.tofile(path)


REFUSED = {
    "missing matrix": (
        lambda f: (f / f"{DENSE}.weight.1.bin").unlink(),
        FULL,
        f"{DENSE}.weight.1.bin: is missing; convert the model again",
    ),
    "short matrix": (
        lambda f: (f / f"{DENSE}.weight.1.bin").write_bytes(b"1234"),
        FULL,
        rf"{DENSE}.weight.1.bin: has 4 bytes but \[24, 40\] of float32 are 3840",
    ),
    "long norm": (
        lambda f: (f / "ln_f.weight.bin").write_bytes(bytes(164)),
        SQ,
        r"ln_f.weight.bin: has 164 bytes but \[40\] of float32 are 160",
    ),
    "missing table": (
        lambda f: (f / "lm_head.weight.bin").unlink(),
        SQ,
        "lm_head.weight.bin: is missing",
    ),
    "missing smoother": (
        lambda f: (f / f"{DENSE}.smoother.0.bin").unlink(),
        FULL,
        f"{DENSE}.smoother.0.bin: is missing",
    ),
    "missing codes": (
        lambda f: (f / f"{QKV}.weight.int8.col.0.bin").unlink(),
        SQ,
        f"{QKV}.weight.int8.col.0.bin: is missing",
    ),
    "missing scale": (
        lambda f: (f / f"{QKV}.scale_w_quant_orig.1.bin").unlink(),
        STATIC,
        f"{QKV}.scale_w_quant_orig.1.bin: is missing",
    ),
    "missing input scale": (
        lambda f: (f / f"{QKV}.scale_x_orig_quant.bin").unlink(),
        SQ,
        f"{QKV}.scale_x_orig_quant.bin: is missing",
    ),
    "no int8 weights": (
        lambda f: [path.unlink() for path in f.glob("*.int8.*")],
        SQ,
        "--use_smooth_quant: .* has no int8 weights .*convert .*hf_yi_convert.py --smoothquant",
    ),
    "storage type": (
        lambda f: edit_ini(f, "weight_data_type = fp32", "weight_data_type = int4"),
        FULL,
        "config.ini: weight_data_type 'int4' is not one of fp32, fp16, bf16",
    ),
    "ranks": (
        lambda f: edit_ini(f, "tensor_parallelism = 2", "tensor_parallelism = two"),
        FULL,
        "config.ini: tensor_parallelism 'two' must be a positive whole number",
    ),
    "ranks that do not divide": (
        lambda f: edit_ini(f, "tensor_parallelism = 2", "tensor_parallelism = 3"),
        FULL,
        "config.ini: tensor_parallelism 3 does not divide the model's 8 attention heads",
    ),
    "no section": (
        lambda f: edit_ini(f, "[llama]", "[gpt]"),
        FULL,
        r"config.ini: cannot be read as an ini file with a section \[llama\]",
    ),
    "no ini file": (
        lambda f: (f / "config.ini").write_text("{}"),
        FULL,
        r"config.ini: cannot be read as an ini file with a section \[llama\] \(File contains no",
    ),
    "no width": (
        lambda f: remove_field(f, "hidden_size"),
        FULL,
        "config.ini: field 'hidden_size' is missing",
    ),
    "no eps": (
        lambda f: remove_field(f, "rms_norm_eps"),
        FULL,
        "config.ini: field 'rms_norm_eps' is missing",
    ),
    "no config": (
        lambda f: (f / "config.ini").unlink(),
        FULL,
        "has no config.ini, so hf_yi_convert.py did not write it; give the N-gpu folder",
    ),
    "folder above": (
        lambda f: (
            (f / "2-gpu").mkdir(),
            (f / "config.ini").rename(f / "2-gpu/config.ini"),
        ),
        FULL,
        "has no config.ini, so hf_yi_convert.py did not write it; give .*2-gpu",
    ),
}


def edit_ini(folder: Path, old: str, new: str) -> None:
    path = folder / "config.ini"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("change, quant, message", REFUSED.values(), ids=REFUSED)
def test_refused_when_opened(tmp_path, change, quant, message):
    folder = write(tmp_path, Shape(tp=2), 0.5)
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_ft(folder, quant=quant)
    assert "\n" not in str(caught.value)


def test_folder_without_smoothing_has_no_int8_engine(tmp_path):
    folder = write(tmp_path, Shape())
    with pytest.raises(CheckpointError, match="convert the model with hf_yi_convert.py --smooth"):
        open_ft(folder, quant=STATIC)


@pytest.mark.parametrize("value", [np.nan, 0.0, -1.0, np.inf])
@pytest.mark.parametrize(
    "name, quant",
    [(f"{DENSE}.scale_w_quant_orig.col.bin", SQ), (f"{DENSE}.scale_x_orig_quant.bin", STATIC)],
)
def test_senseless_scales_are_refused_when_read(tmp_path, name, quant, value):
    folder = write(tmp_path, Shape(), 0.5)
    damage(folder / name, 0, value)
    with (
        open_ft(folder, quant=quant) as checkpoint,
        pytest.raises(CheckpointError, match=f"{name}.* only finite values above zero"),
    ):
        checkpoint.linear("model.layers.1.self_attn.o_proj")


def test_flat_codes_of_grouped_queries_are_refused(tmp_path):
    """TensorRT-LLM's per-tensor codes of a model with grouped queries: all zeros and ones."""
    folder = write(tmp_path, Shape(), 0.5)
    path = folder / f"{QKV}.weight.int8.0.bin"
    (np.fromfile(path, np.int8) // 100).tofile(path)
    with open_ft(folder, quant=STATIC) as checkpoint:
        message = "no code is larger than 2 where one should be 127, .*add --per_channel"
        with pytest.raises(CheckpointError, match=message):
            checkpoint.linear("model.layers.1.self_attn.q_proj")
        checkpoint.linear("model.layers.0.self_attn.q_proj")
    with open_ft(folder, quant=SQ) as checkpoint:
        checkpoint.linear("model.layers.1.self_attn.q_proj")


def kv_folder(folder: Path, *patterns: str) -> tuple[Path, ModelConfig, list]:
    """A folder without the scale files that match `patterns`."""
    shape = Shape()
    ranges = shape.ranges()
    files = golden_files(shape, shape.weights(), ranges) | cache_files(ranges)
    write_folder(folder, files, upstream_fields(shape))
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    return folder, ModelConfig.from_hf(shape.hf(), "x"), ranges


def test_cache_scales_per_head(tmp_path):
    folder, config, ranges = kv_folder(tmp_path)
    scales = read_ft_kv_scales(folder, config)
    assert len(scales) == 2
    for (k, v), found in zip(scales, ranges, strict=True):
        assert k.dtype == v.dtype == torch.float32
        np.testing.assert_allclose(k, found["k"] / 127, rtol=1e-6)
        np.testing.assert_allclose(v, found["v"] / 127, rtol=1e-6)


def test_cache_scales_per_layer(tmp_path):
    folder, config, ranges = kv_folder(tmp_path, "*.head.bin")
    for (k, v), found in zip(read_ft_kv_scales(folder, config), ranges, strict=True):
        assert k.tolist() == pytest.approx([found["k"].max() / 127])
        assert v.tolist() == pytest.approx([found["v"].max() / 127])


def test_cache_scales_of_tensorrt_llm(tmp_path):
    folder, config, ranges = kv_folder(tmp_path, "*_cache.*", "*.weight.*", "config.ini")
    for (k, v), found in zip(read_ft_kv_scales(folder, config), ranges, strict=True):
        largest = max(found["y"][name] for name in ("q_proj", "k_proj", "v_proj"))
        assert k.tolist() == v.tolist() == pytest.approx([largest / 127])


CACHE_K = "model.layers.1.attention.k_cache.scale_quant_orig.head.bin"
CACHE_V = "model.layers.1.attention.v_cache.scale_quant_orig.head.bin"
KV_REFUSED = {
    "none": (
        lambda f: [path.unlink() for path in f.glob("model.layers.1.*")],
        r"has no scales for the KV cache of layer 1 .*hf_yi_convert.py --calibrate-kv-cache",
    ),
    "one of two": (lambda f: (f / CACHE_V).unlink(), f"{CACHE_V}: is missing"),
    "heads": (
        lambda f: np.ones(3, np.float32).tofile(f / CACHE_K),
        rf"{CACHE_K}: has 12 bytes but \[2\] of float32 are 8",
    ),
    "NaN": (lambda f: damage(f / CACHE_K, 1, np.nan), "holds nan where only finite values"),
    "zero": (lambda f: damage(f / CACHE_V, 0, 0), "holds 0 where only finite values above zero"),
    "more layers": (
        lambda f: (f / CACHE_K).rename(f / CACHE_K.replace("layers.1", "layers.2")),
        "belongs to layer 2 but the model has 2 layers",
    ),
}


@pytest.mark.parametrize("change, message", KV_REFUSED.values(), ids=KV_REFUSED)
def test_cache_scales_that_are_refused(tmp_path, change, message):
    folder, config, _ = kv_folder(tmp_path)
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_ft_kv_scales(folder, config)
    assert "\n" not in str(caught.value)
