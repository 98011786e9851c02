"""Model folders: a local one as it is, or a Hugging Face repository fetched into the local cache.

Fetches only the files that are needed, answers at once when the hub is out of reach, and never
takes a mistyped path for a repository. With several ranks, call it on one of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from engine import env
from engine.errors import UserError
from utils import log
from utils.chat_template import read_json

Need = Literal["weights", "tokenizer"]

# Seconds to wait for the hub to answer before the cache is tried.
HUB_TIMEOUT = 5.0
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "config.json",
    "generation_config.json",
)
_WEIGHT_FILES = (*_TOKENIZER_FILES, "quantize_config.json", "hf_quant_config.json")
# Of one repository only the first kind that it has is fetched.
_WEIGHT_KINDS = ("*.safetensors", "*.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def resolve_model_dir(name: str, flag: str, *, need: Need = "weights") -> Path:
    """The local folder for `name`, the value of `flag`: a folder, or a repository "owner/name".

    A repository is looked for on the hub, then in the local cache. UserError for a path that does
    not exist, a repository that does not, and one that is neither reachable nor cached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _is_repository(name):
        kind = "is a file" if folder.is_file() else "does not exist"
        raise UserError(
            f"{flag} {name} {kind}; name a folder, or a Hugging Face repository as owner/name"
        )
    if env.hub_offline():
        return _find_cached(name, flag, need, "HF_HUB_OFFLINE is set")
    return _fetch(name, flag, need)


def _is_repository(name: str) -> bool:
    """Whether `name` can be owner/name on the hub and is no slip in a local path."""
    return bool(_REPOSITORY.fullmatch(name)) and not Path(name).parent.exists()


def _fetch(name: str, flag: str, need: Need) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    try:
        # One short question first: snapshot_download by itself waits long for a dead network.
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT)
        files = [entry.rfilename for entry in info.siblings or ()]
        log.info(f"fetching {name} ({flag}) from the Hugging Face hub")
        patterns = choose_patterns(files, need)
        folder = snapshot_download(name, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT)
    except GatedRepoError:
        raise UserError(
            f"{flag} {name}: the repository is gated; accept its terms on the hub and log in with "
            "'hf auth login', or name a local folder"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{flag} {name} is neither a local folder nor a repository on the Hugging Face hub; "
            "correct the name, or log in with 'hf auth login' if it is private"
        ) from None
    except (HTTPError, OSError) as error:
        return _find_cached(name, flag, need, f"the hub cannot be used ({_first_line(error)})")
    return _checked(Path(folder), name, flag, need)


def choose_patterns(files: Sequence[str], need: Need) -> list[str]:
    """Patterns of the files to fetch out of a repository that holds `files`."""
    if need == "tokenizer":
        return list(_TOKENIZER_FILES)
    kinds = (kind for kind in _WEIGHT_KINDS if any(fnmatch(file, kind) for file in files))
    return _weight_patterns(next(kinds, _WEIGHT_KINDS[0]))


def _weight_patterns(kind: str) -> list[str]:
    return [*_WEIGHT_FILES, kind, f"{kind}.index.json"]


def _find_cached(name: str, flag: str, need: Need, reason: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    choices = [_weight_patterns(kind) for kind in _WEIGHT_KINDS]
    for patterns in choices if need == "weights" else [list(_TOKENIZER_FILES)]:
        # The cache may lack files of the repository that no earlier run needed.
        with suppress(LocalEntryNotFoundError):
            found = snapshot_download(name, allow_patterns=patterns, local_files_only=True)
            if _is_whole(Path(found), need):
                return Path(found)
    raise UserError(
        f"{flag} {name} is not a local folder, {reason} and the local Hugging Face cache does "
        f"not have its {need}; download it with 'hf download {name}' or name a local folder"
    )


def _checked(folder: Path, name: str, flag: str, need: Need) -> Path:
    if not _is_whole(folder, need):
        raise UserError(f"{flag} {name}: the repository has no {need}; use another one")
    return folder


def _is_whole(folder: Path, need: Need) -> bool:
    """Whether a cached snapshot has what is needed; it may hold only what an earlier run needed."""
    if need == "tokenizer":
        return any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()
    if not (folder / "config.json").is_file():
        return False
    for index in _INDEXES:
        shards = set(read_json(folder / index).get("weight_map", {}).values())
        if shards:
            return all((folder / shard).is_file() for shard in shards)
    return any(next(folder.glob(kind), None) for kind in _WEIGHT_KINDS)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
