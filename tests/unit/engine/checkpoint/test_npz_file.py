from __future__ import annotations

import random
from contextlib import closing

import numpy as np
import pytest
import torch

from engine.checkpoint.npz_file import NpzFile
from engine.errors import CheckpointError

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(4, 3),
    "half:name": np.linspace(-1, 1, 5).astype(np.float16),
    "scalar": np.float64(2.5),
    "bytes": np.arange(6, dtype=np.int8).reshape(2, 3),
    "empty": np.zeros((0, 3), dtype=np.int64),
}


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        NpzFile(path)
    assert str(path) in str(caught.value)


def test_arrays_of_numpy(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **ARRAYS)
    file = NpzFile(path)
    assert set(file.tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        tensor = file.tensors[name]
        assert tensor.shape == np.shape(array) and tensor.origin == str(path)
        assert torch.equal(tensor.read(), torch.from_numpy(np.array(array)))
    assert file.tensors["matrix"].rows(1, 3).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert file.tensors["matrix"].rows(4).shape == (0, 3)
    file.close()


def test_archives_that_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.ones(3))
    refused(path, "array 'a' is compressed, .* save the arrays again with numpy.savez$")
    np.savez(path, a=np.array([{}], dtype=object))
    refused(path, "array 'a' has dtype '.O', which is none of <f8, .*; save it again as one")
    np.savez(path, a=np.ones(3, dtype=">f4"))
    refused(path, "array 'a' has dtype '>f4'")
    np.savez(path, a=np.asfortranarray(np.ones((3, 2))))
    refused(path, "array 'a' is stored by columns; save it again .* numpy.ascontiguousarray$")
    np.savez(path, a=np.ones(300))
    path.write_bytes(path.read_bytes()[:400])
    refused(path, "is not a zip archive that can be read")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(path, "is a Git LFS pointer")
    refused(tmp_path / "none.npz", "cannot be read")


def test_damage_is_refused_or_harmless(tmp_path):
    """Seeded byte flips outside the data: a CheckpointError or an array of the right size."""
    path = tmp_path / "x.npz"
    np.savez(path, a=np.arange(40, dtype=np.float32))
    good, rng, count = path.read_bytes(), random.Random(1), 0
    start = good.index(np.arange(40, dtype=np.float32).tobytes())
    places = [*range(start), *range(start + 160, len(good))]
    for _ in range(400):
        data = bytearray(good)
        data[rng.choice(places)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with closing(NpzFile(path)) as file:
                for tensor in file.tensors.values():
                    assert tensor.read().numel() * tensor.dtype.itemsize == 160
        except CheckpointError as error:
            count += 1
            assert str(path) in str(error)
    assert count > 150
