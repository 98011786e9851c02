"""An engine's compiled kernels: a zip file, from which Triton's own cache is filled on demand.

Members are called key/file as in Triton's cache folder, whose keys are digests of source, types,
options, target and compiler: what another version of any of them asks for is not found, and
compiled as ever. The engine directory is only read.

Beside a kernel are the types of its arguments, by which Triton lets the C compiler make a function
that launches it: that is begun when the engine is opened, and done when its weights are there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import CacheManager, FileCacheManager, triton_key
from triton.runtime.jit import DependenciesFinder, JITCallable

logger = logging.getLogger("yi.ahead")

TYPES_NAME = "arguments.types"
VERSION: str = triton.__version__
SUFFIXES = (".json", ".cubin", ".types")
# Processes of the C compiler at a time; the others of the machine's cores load weights.
MAX_COMPILERS = 4
# The earliest that the format knows: the same kernels make the same file.
TIME = (1980, 1, 1, 0, 0, 0)


def pack(folder: Path, path: Path) -> None:
    """Write the kernels of a Triton cache folder to a zip file."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.glob("*/*")):
            # Groups name their files by absolute paths.
            if file.suffix in SUFFIXES and not file.name.startswith("__grp__"):
                member = zipfile.ZipInfo(f"{file.parent.name}/{file.name}", TIME)
                archive.writestr(member, file.read_bytes(), zipfile.ZIP_DEFLATED)


def settle_keys() -> None:
    """Let a kernel's key not depend on what was launched before it, in another process.

    Triton 3.6 puts the global constants of a function that a kernel calls into the kernel's key
    only if that function has a key already.
    """
    update = DependenciesFinder._update_hash
    if update.__module__ == __name__:
        return

    def settled(self: DependenciesFinder, function: JITCallable) -> None:
        assert function.cache_key
        update(self, function)

    DependenciesFinder._update_hash = settled


def compiler() -> str:
    """What tells builds of Triton apart: by version, and by the version of Python that they are
    for."""
    return hashlib.sha256(triton_key().encode()).hexdigest()


def use(path: Path, made_by: str) -> threading.Thread:
    """Let Triton look into `path`, which the compiler `made_by` made, for what its own cache lacks;
    the thread makes launchers."""
    settle_keys()
    before = set(_packed)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            key, _, file = name.partition("/")
            _packed[key][file] = archive.read(name)
    base = knobs.cache.manager_class or FileCacheManager
    if not issubclass(base, _Unpacking):
        knobs.cache.manager_class = type("EngineCache", (_Unpacking, base), {})
    arguments = (set(_packed) - before, made_by)
    thread = threading.Thread(target=_make_launchers, args=arguments, daemon=True)
    thread.start()
    return thread


def _make_launchers(keys: set[str], made_by: str) -> None:
    """Fill Triton's cache with what launches the kernels of `keys` that are for this GPU. What
    fails here fails again, and is told, where it is needed."""
    if made_by != compiler():
        logger.warning(
            "the engine's kernels were compiled by another Triton than this one (by version, or "
            "for another version of Python) and are compiled again; build.py --target with this "
            "one saves that"
        )
        return
    architecture = driver.active.get_current_target().arch
    launchers = {}
    for key in sorted(keys):
        files = _packed[key]
        [metadata] = [json.loads(data) for name, data in files.items() if name.endswith(".json")]
        if metadata["target"]["arch"] == architecture:
            launchers[files[TYPES_NAME]] = metadata
    with ThreadPoolExecutor(MAX_COMPILERS) as pool:
        for types, metadata in launchers.items():
            source = SimpleNamespace(constants={}, signature=dict(enumerate(json.loads(types))))
            pool.submit(driver.active.launcher_cls, source, SimpleNamespace(**metadata))


_packed: dict[str, dict[str, bytes]] = defaultdict(dict)


class _Unpacking(CacheManager):
    """In front of a cache manager: it gets the kernels of a key before they are looked for."""

    def __init__(self, key: str, *args: Any, **kwargs: Any):
        super().__init__(key, *args, **kwargs)
        self._files = _packed.get(key, {})

    def get_group(self, filename: str) -> dict[str, str] | None:
        found = super().get_group(filename)
        if filename in (found or ()) or filename not in self._files:
            return found
        group = {n: self.put(data, n) for n, data in self._files.items() if n != TYPES_NAME}
        self.put_group(filename, group)
        return group
