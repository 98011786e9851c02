"""An engine whose cache stores codes, against transformers with the same roundings.

Keys, after RoPE, and values are rounded in its eager attention. Scales are 0.8 of the largest
value of each head, so that some codes saturate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from engine.comm import World
from engine.engine_file import map_tensors
from engine.models.yi import Yi
from engine.quant import KVStorage, QuantConfig
from engine.session import Session
from tests.golden import truth
from tests.golden.asking import ask, question
from tests.golden.conftest import Build, Open
from tests.golden.truth import TINY_YI

pytestmark = pytest.mark.usefixtures("one_thread")

LARGEST = {KVStorage.INT8: 127, KVStorage.FP8: 448}
CACHES = {
    "contiguous": "--max_batch_size 8",
    "paged, in chunks": (
        "--max_batch_size 8 --max_num_tokens 40 --paged_kv_cache --tokens_per_block 16"
    ),
}
# Of fp32 sums in another order. Where one puts a value on the other side of a tie, its code and
# with it the logits change visibly, as they do between transformers in fp32 and fp64: hence a
# limit for most prompts and one for all. A GPU's sums are in an order further from that of
# transformers on the CPU, so more of the prompts have such a value.
MOST_LIMITS, LIMIT = {"cpu": 1e-5, "cuda": 1e-4}, 1e-3
NEW_TOKENS = 16
PROMPTS = truth.cut_prompts((2, 21, 5, 64, 9, 144, 13), start=9000)


@contextmanager
def attention_sees(change: Any) -> Iterator[None]:
    """While it lasts, transformers attends to change(x [B, G, S, D], layer, 0 keys or 1 values)."""
    original = modeling_llama.eager_attention_forward

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any):
        layer = module.layer_idx
        return original(module, query, change(key, layer, 0), change(value, layer, 1), *args, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", attend)
        yield


def find_scales(kv: KVStorage) -> Tensor:
    """fp32 [layers, 2, G], from the longest prompt."""
    found: dict[tuple[int, int], Tensor] = {}

    def record(x: Tensor, layer: int, which: int) -> Tensor:
        found[layer, which] = 0.8 * x[0].abs().amax((1, 2)) / LARGEST[kv]
        return x

    with attention_sees(record):
        truth.score(truth.load_model(TINY_YI), max(PROMPTS, key=len))
    layers = 1 + max(layer for layer, _ in found)
    return torch.stack([torch.stack([found[i, 0], found[i, 1]]) for i in range(layers)])


def round_to(kv: KVStorage, scales: Tensor) -> Any:
    def change(x: Tensor, layer: int, which: int) -> Tensor:
        scale_G11 = scales[layer, which][:, None, None]
        codes = (x / scale_G11).clamp(-LARGEST[kv], LARGEST[kv])
        codes = codes.round() if kv is KVStorage.INT8 else codes.to(torch.float8_e4m3fn).float()
        return codes * scale_G11

    return change


def open_with_scales(
    folder: Path, plain: Session, kv: KVStorage, scales: Tensor, device: str
) -> Session:
    """The engine in `folder`, whose session is `plain`, as if built with a quantised cache."""
    record = replace(plain.info, quant=QuantConfig(kv=kv))
    tensors = {f"blocks.{slot}.attn.kv_scale": scale for slot, scale in enumerate(scales)}
    tensors |= map_tensors(folder / record.files[0].name)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    world = World()
    parallel = world.split(1, 1, torch.device(device))
    network = Yi(record.config, record.quant, record.mapping, None, tensors, parallel)
    return Session(record, network, world, parallel)


@pytest.mark.parametrize("flags", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("kv", LARGEST)
def test_agrees_with_rounded_transformers(
    kv: KVStorage, flags: str, build: Build, open_built: Open, device: str
) -> None:
    scales = find_scales(kv)
    plain = open_built(TINY_YI, *flags.split(), device=device)
    session = open_with_scales(build(TINY_YI, *flags.split()), plain, kv, scales, device)
    scores = ask(session, question(PROMPTS, score=True)).logits
    answers = ask(session, question(PROMPTS, max_new_tokens=NEW_TOKENS, end_ids=()))
    texts = [p + new for p, new in zip(PROMPTS, answers.best, strict=True)]
    model = truth.load_model(TINY_YI)
    exact = [truth.score(model, text) for text in texts]
    with attention_sees(round_to(kv, scales)):
        rounded = [truth.score(model, text) for text in texts]
    in_prompts = [slice(len(p)) for p in PROMPTS]
    after_them = [slice(len(p) - 1, len(p) - 1 + NEW_TOKENS) for p in PROMPTS]
    for found, places in ((scores, in_prompts), (answers.logits, after_them)):
        wanted = [logits[place] for logits, place in zip(rounded, places, strict=True)]
        assert median(map(error, found, wanted)) <= MOST_LIMITS[device]
        assert error(torch.cat(found), torch.cat(wanted)) <= LIMIT
    # The roundings are there.
    assert error(torch.cat(exact), torch.cat(rounded)) > 10 * LIMIT


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in norm."""
    return ((found - wanted).norm() / wanted.norm()).item()
