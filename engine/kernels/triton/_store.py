"""An engine's compiled kernels: a zip file, from which Triton's own cache is filled on demand.

Members are called key/file as in Triton's cache folder, whose keys are digests of source, types,
options, target and compiler: what another version of any of them asks for is not found, and
compiled as ever. The engine directory is only read.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.cache import CacheManager, FileCacheManager
from triton.runtime.jit import DependenciesFinder, JITCallable

SUFFIXES = (".json", ".cubin")
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


def use(path: Path) -> None:
    """Let Triton look into `path` for what its own cache lacks."""
    settle_keys()
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            key, _, file = name.partition("/")
            _packed[key][file] = archive.read(name)
    base = knobs.cache.manager_class or FileCacheManager
    if not issubclass(base, _Unpacking):
        knobs.cache.manager_class = type("EngineCache", (_Unpacking, base), {})


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
        group = {name: self.put(data, name) for name, data in self._files.items()}
        self.put_group(filename, group)
        return group
