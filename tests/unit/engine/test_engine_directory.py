"""EngineWriter and read_config: a directory is a whole engine or none, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.engine_file import EngineWriter, read_config
from engine.errors import EngineError, UserError


def write_engine(output_dir: Path, ranks: int, text: str, companions: tuple[Path, ...] = ()):
    """An engine of `ranks` files that each hold `text`."""
    names = [f"rank{rank}.engine" for rank in range(ranks)]
    config = {"engine": {"schema_version": 1, "files": [{"name": name} for name in names]}}
    with EngineWriter(output_dir) as writer:
        for name in names:
            (writer.staging / name).write_text(text)
        writer.commit(config, companions)
    return config


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_commit_moves_everything_into_place(tmp_path):
    (tmp_path / "tokenizer.model").write_text("pieces")
    config = write_engine(tmp_path / "out", 2, "one", (tmp_path / "tokenizer.model",))
    found = contents(tmp_path / "out")
    assert json.loads(found.pop("config.json")) == config
    assert found == {"rank0.engine": "one", "rank1.engine": "one", "tokenizer.model": "pieces"}


def test_config_is_sorted_and_indented(tmp_path):
    write_engine(tmp_path, 1, "one")
    text = (tmp_path / "config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_config_moves_last(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, to: (moved.append(Path(to).name), replace(source, to))
    )
    write_engine(tmp_path, 3, "one")
    assert sorted(moved[:-1]) == ["rank0.engine", "rank1.engine", "rank2.engine"]
    assert moved[-1] == "config.json"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, UserError])
def test_failure_keeps_the_old_engine(tmp_path, error):
    write_engine(tmp_path, 2, "old")
    before = contents(tmp_path)
    with pytest.raises(error), EngineWriter(tmp_path) as writer:
        (writer.staging / "rank0.engine").write_text("new")
        raise error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_no_directory_that_was_not_there(tmp_path, error):
    with pytest.raises(error), EngineWriter(tmp_path / "out") as writer:
        (writer.staging / "rank0.engine").write_text("new")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_an_empty_directory_that_was_there(tmp_path):
    with pytest.raises(RuntimeError), EngineWriter(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_commit_means_no_engine(tmp_path):
    write_engine(tmp_path, 1, "old")
    before = contents(tmp_path)
    with EngineWriter(tmp_path) as writer:
        (writer.staging / "rank0.engine").write_text("new")
    assert contents(tmp_path) == before


def test_failed_companion_is_a_user_error_and_keeps_the_old_engine(tmp_path):
    write_engine(tmp_path / "out", 1, "old")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="^writing .* failed .No such file"):
        write_engine(tmp_path / "out", 1, "new", (tmp_path / "gone",))
    assert contents(tmp_path / "out") == before


def test_fewer_ranks_remove_the_old_files_only(tmp_path):
    write_engine(tmp_path, 4, "old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.engine").write_text("mine too")
    (tmp_path / "folder").mkdir()
    write_engine(tmp_path, 2, "new")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json",
        "rank0.engine",
        "rank1.engine",
        "notes.txt",
        "other.engine",
        "folder",
    }
    assert (tmp_path / "rank0.engine").read_text() == "new"


@pytest.mark.parametrize("files", [None, 3, ["rank7.engine"], [{"size": 1}]])
def test_damaged_list_of_old_files_removes_nothing(tmp_path, files):
    (tmp_path / "rank7.engine").write_text("old")
    config = {"engine": {"schema_version": 1, "files": files}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_engine(tmp_path, 1, "new")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "rank0.engine",
        "rank7.engine",
    }


def test_listed_paths_cannot_lead_out_of_the_directory(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("keep")
    folder = tmp_path / "out"
    folder.mkdir()
    config = {"engine": {"schema_version": 1, "files": [{"name": "../outside.txt"}]}}
    (folder / "config.json").write_text(json.dumps(config))
    write_engine(folder, 1, "new")
    assert outside.read_text() == "keep"


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_killed_builds_are_removed(tmp_path):
    for name in (f".building-{dead_process()}", f".building-{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank0.engine").write_text("half")
    kept = [f".building-{os.getppid()}", ".building-notes"]
    for name in kept:
        (tmp_path / name).mkdir()
    write_engine(tmp_path, 1, "new")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "rank0.engine", *kept}


def test_too_little_space_names_both_sizes(tmp_path):
    with EngineWriter(tmp_path) as writer:
        writer.require_space(1000)
        with pytest.raises(UserError, match=r"^--output_dir .* has .* GB free .* needs 1000000.00"):
            writer.require_space(10**15)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write everywhere, so as root act as another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("output", [".", "engine", "deeper/engine"])
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_forbidden_directory_is_a_user_error(tmp_path, mode, output):
    locked = tmp_path / "locked"
    locked.mkdir(mode=mode)
    message = "^--output_dir .*locked.* cannot be written .Permission denied"
    with unprivileged(), pytest.raises(UserError, match=message):
        write_engine(locked / output, 1, "new")
    locked.chmod(0o700)
    assert list(locked.iterdir()) == []


@pytest.mark.parametrize("output", ["file", "file/engine", "file/deeper/engine"])
def test_path_through_a_file_is_a_user_error(tmp_path, output):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match="^--output_dir .*file.* cannot be written"):
        write_engine(tmp_path / output, 1, "new")
    assert (tmp_path / "file").read_text() == "not a directory"


def test_read_config_gives_back_what_was_committed(tmp_path):
    config = write_engine(tmp_path, 1, "one")
    assert read_config(tmp_path) == config


def test_missing_directory_is_refused(tmp_path):
    with pytest.raises(EngineError, match="^--engine_dir .*gone does not exist"):
        read_config(tmp_path / "gone")


def test_directory_without_config_is_refused(tmp_path):
    with pytest.raises(EngineError, match="^--engine_dir .* holds no config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "cannot be read"),
        ('{"engine": {"schema_ver', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("[]", "has no 'engine' section"),
        ('{"architectures": ["LlamaForCausalLM"]}', "has no 'engine' section"),
        ('{"builder_config": {}, "plugin_config": {}}', "has no 'engine' section"),
        ('{"engine": 3}', "has no 'engine' section"),
        ('{"engine": {}}', "has engine schema version None and this program reads version 1"),
        (
            '{"engine": {"schema_version": 2}}',
            "has engine schema version 2 and this program reads version 1",
        ),
    ],
)
def test_unusable_config_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(EngineError, match=f"config.json {message}"):
        read_config(tmp_path)


def test_config_that_is_a_directory_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(EngineError, match="config.json cannot be read"):
        read_config(tmp_path)


def test_an_interruption_while_the_staging_directory_is_made_leaves_none(tmp_path, monkeypatch):
    make = Path.mkdir

    def interrupted(path, **options):
        make(path, **options)
        if path.name.startswith(".building-"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), EngineWriter(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_what_only_looks_like_a_staging_directory_stops_no_build(tmp_path):
    (tmp_path / ".building-99999999999999999999").mkdir()
    with EngineWriter(tmp_path):
        pass
    assert not any(tmp_path.iterdir())
