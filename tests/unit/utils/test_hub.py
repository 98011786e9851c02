"""Folders and repositories, with a cache on disk as huggingface_hub lays it out and no network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from engine import env
from engine.errors import UserError
from utils.hub import choose_patterns, resolve_model_dir

NAME, COMMIT = "01-ai/Yi-6B", "0" * 40


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch) -> Path:
    """An empty cache and working directory, and a network that may not be touched."""
    cache, here = tmp_path / "cache", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(env, "hub_offline", lambda: False)

    def no_network(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    return cache


def fill_cache(cache: Path, *files: str, shards: tuple[str, ...] = ()) -> Path:
    repository = cache / "models--01-ai--Yi-6B"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    for name in files:
        (snapshot / name).write_text("{}", encoding="utf-8")
    if shards:
        index = {"weight_map": dict(zip("abc", shards, strict=False))}
        path = snapshot / "model.safetensors.index.json"
        path.write_text(json.dumps(index), encoding="utf-8")
    return snapshot


def test_local_folder_is_taken_as_it_is(tmp_path):
    assert resolve_model_dir(str(tmp_path), "--model_dir") == tmp_path
    Path("01-ai/Yi-6B").mkdir(parents=True)
    assert resolve_model_dir(NAME, "--model_dir") == Path("01-ai/Yi-6B")


@pytest.mark.parametrize(
    "name",
    ["./yi-6b", "../Yi/6B", "/models/Yi-6B", "~/models", "a/b/c", "Yi-6B", "here/missing", "a/b c"],
)
def test_mistyped_paths_are_no_repositories(name):
    Path("here").mkdir()
    with pytest.raises(UserError, match=r"^--model_dir .* does not exist; name a folder"):
        resolve_model_dir(name, "--model_dir")


def test_file_is_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(UserError, match="is a file; name a folder"):
        resolve_model_dir(str(path), "--model_dir")


def test_offline_finds_the_cached_tokenizer_but_not_weights(isolated, monkeypatch):
    monkeypatch.setattr(env, "hub_offline", lambda: True)
    snapshot = fill_cache(isolated, "config.json", "tokenizer.model")
    assert resolve_model_dir(NAME, "--tokenizer_dir", need="tokenizer") == snapshot
    with pytest.raises(
        UserError,
        match=f"^--model_dir {NAME} is not a local folder, HF_HUB_OFFLINE is set and the local "
        f"Hugging Face cache does not have its weights; download it with 'hf download {NAME}'",
    ):
        resolve_model_dir(NAME, "--model_dir")


def test_offline_wants_every_shard(isolated, monkeypatch):
    monkeypatch.setattr(env, "hub_offline", lambda: True)
    snapshot = fill_cache(isolated, "config.json", "a.safetensors", shards=("a.safetensors", "b.s"))
    with pytest.raises(UserError, match="does not have its weights"):
        resolve_model_dir(NAME, "--model_dir")
    (snapshot / "b.s").touch()
    assert resolve_model_dir(NAME, "--model_dir") == snapshot


@pytest.mark.parametrize("error", [HTTPError("no route"), ConnectionError("refused"), OSError()])
def test_unreachable_hub_falls_back_to_the_cache(isolated, monkeypatch, error):
    def fail(*args, timeout, **kwargs):
        assert timeout <= 10
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(UserError, match="the hub cannot be used .*download it with 'hf download"):
        resolve_model_dir(NAME, "--model_dir")
    snapshot = fill_cache(isolated, "config.json", "pytorch_model.bin")
    assert resolve_model_dir(NAME, "--model_dir") == snapshot


@pytest.mark.parametrize(
    "kind, message",
    [
        ("RepositoryNotFoundError", "is neither a local folder nor a repository"),
        ("GatedRepoError", "gated; accept its terms"),
    ],
)
def test_repository_that_cannot_be_had(monkeypatch, kind, message):
    kind = getattr(huggingface_hub.errors, kind)

    def fail(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(UserError, match=message):
        resolve_model_dir(NAME, "--model_dir")


def test_fetch_asks_only_for_what_is_needed(isolated, monkeypatch):
    files = ["config.json", "a.safetensors", "pytorch_model.bin", "tokenizer.model", "demo.gif"]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    asked = []

    def download(name, *, allow_patterns, etag_timeout):
        asked.append((name, allow_patterns))
        return str(fill_cache(isolated, "config.json", "a.safetensors"))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = resolve_model_dir(NAME, "--model_dir")
    assert (folder / "a.safetensors").is_file()
    assert asked == [(NAME, choose_patterns(files, "weights"))]
    with pytest.raises(UserError, match="the repository has no tokenizer"):
        resolve_model_dir(NAME, "--tokenizer_dir", need="tokenizer")


def chosen(files: list[str], need: str) -> set[str]:
    patterns = choose_patterns(files, need)
    return set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns))


def test_chosen_files():
    small = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"}
    safe = {"model-1.safetensors", "model.safetensors.index.json"}
    pickled = {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    other = {"README.md", "demo.gif", "model.gguf", "pytorch_model.pt"}
    everything = sorted(small | safe | pickled | other)
    assert chosen(everything, "weights") == small | safe
    assert chosen(sorted(small | pickled | other), "weights") == small | pickled
    assert chosen(everything, "tokenizer") == small
