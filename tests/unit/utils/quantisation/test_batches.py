from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.errors import UserError
from utils.quantisation.batches import make_batches

# A token for every character, none for an empty text, and a special one in front.
LETTERS = SimpleNamespace(
    encode=lambda text, add_special_tokens: [1, *map(ord, text)] if text else []
)


def rows(texts, **settings):
    wanted = {"batch_size": 2, "max_length": 4, "vocab_size": 128, **settings}
    return [batch.tolist() for batch in make_batches(texts, LETTERS, **wanted)]


def test_only_texts_of_one_length_share_a_batch():
    assert rows(["ab", "wxyz", "", "uvwx", "rstu", "cd"]) == [
        [[1, 119, 120, 121], [1, 117, 118, 119]],
        [[1, 114, 115, 116]],
        [[1, 97, 98], [1, 99, 100]],
    ]


def test_a_seed_takes_another_part_of_a_long_text():
    text = "".join(map(chr, range(32, 126)))
    found = [rows([text], seed=seed)[0][0] for seed in range(4)]
    assert found == [rows([text], seed=seed)[0][0] for seed in range(4)]
    assert len({ids[0] for ids in found}) > 1
    assert all(ids == list(range(ids[0], ids[0] + 4)) for ids in found if ids[0] != 1)
    assert rows(["abc"], seed=5) == [[[1, 97, 98, 99]]]


def test_refusals():
    with pytest.raises(UserError, match="texts hold no tokens; name others as --calib_dataset"):
        rows([""])
    with pytest.raises(UserError, match="gives the token id 122 but the model's vocabulary has 98"):
        rows(["az"], vocab_size=98)
