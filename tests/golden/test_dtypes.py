"""bf16 and fp16 engines err no more than transformers does in the same type.

Both are compared with transformers in fp32: on prompts, and on the tokens that the engine goes on
with, which it computes one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.golden import truth
from tests.golden.asking import ask, question
from tests.golden.truth import TINY_YI

pytestmark = pytest.mark.usefixtures("one_thread")

# The same roundings in another order give other errors; a rounding too many gives larger ones.
MARGIN = 1.5
NEW_TOKENS = 24
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CACHES = {
    "contiguous": "--max_batch_size 8",
    "paged, in chunks": (
        "--max_batch_size 8 --max_num_tokens 40 --paged_kv_cache --tokens_per_block 16"
    ),
}


@pytest.mark.parametrize("flags", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error(dtype, flags, open_built, device):
    prompts = truth.cut_prompts((2, 21, 64, 144, 13, 34), start=9000)
    session = open_built(TINY_YI, *flags.split(), "--dtype", dtype, device=device)
    scores = ask(session, question(prompts, score=True)).logits
    answers = ask(session, question(prompts, max_new_tokens=NEW_TOKENS, end_ids=()))

    texts = [p + new for p, new in zip(prompts, answers.best, strict=True)]
    exact, rounded = (
        [truth.score(truth.load_model(TINY_YI, kind), text) for text in texts]
        for kind in (torch.float32, DTYPES[dtype])
    )
    in_prompts = [slice(len(p)) for p in prompts]
    after_them = [slice(len(p) - 1, len(p) - 1 + NEW_TOKENS) for p in prompts]
    for found, places in ((scores, in_prompts), (answers.logits, after_them)):
        wanted = [logits[place] for logits, place in zip(exact, places, strict=True)]
        allowed = [logits[place] for logits, place in zip(rounded, places, strict=True)]
        assert 0 < error(found, wanted) <= MARGIN * error(allowed, wanted)


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative, in norm over everything."""
    x, y = torch.cat(list(found)).double(), torch.cat(list(wanted)).double()
    return ((x - y).norm() / y.norm()).item()
