"""The Hugging Face Hub: a saved network's folder there and back. Needs the extra `hub`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kw_lightning.errors import RunError, first_line, mistake, needs
from kw_lightning.inference.saving import CARD, CONFIG, HASHED

PREFIX = "hf://"
_NAME = re.compile(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


def split_name(name: str) -> tuple[str, str | None]:
    """Return (repository, revision) of `hf://organisation/name@revision`; the revision may be left out.

    Raises:
        RunError: another form.
    """
    match = _NAME.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        raise RunError(mistake(name, f"a folder, {PREFIX}organisation/name or {PREFIX}organisation/name@revision"))
    return match["repository"], match["revision"]


def fetch(repository: str, revision: str | None = None, **options: Any) -> Path:
    """Return the folder of a network on the Hub, fetched or from the Hub's cache; only the files that are read.

    Args:
        repository: as `organisation/name`.
        revision: branch, tag or commit.
        **options: of `huggingface_hub.snapshot_download`, as `token`, `cache_dir`, `local_files_only`.

    Raises:
        RunError: huggingface_hub is not installed, **or** there is no such network, or no way to it.
    """
    hub = _library()
    try:
        found = hub.snapshot_download(repository, revision=revision, allow_patterns=[CONFIG, *HASHED, CARD], **options)
    except Exception as error:  # its own errors, those of the network, and OSError
        where = repository if revision is None else f"{repository}@{revision}"
        raise RunError(f"{PREFIX}{where}: {first_line(error)}") from error
    return Path(found)


def push(folder: Path, repository: str, *, private: bool | None = None, **options: Any) -> str:
    """Upload a saved network's folder and return the address of the commit.

    Args:
        repository: made if it is not there.
        private: whether a new repository can be seen by its owner alone.
        **options: of `huggingface_hub.HfApi.upload_folder`, as `commit_message`, `revision`, `token`.

    Raises:
        RunError: huggingface_hub is not installed, **or** the Hub refuses.
    """
    hub = _library()
    try:
        api = hub.HfApi(token=options.pop("token", None))
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            folder_path=folder, repo_id=repository, allow_patterns=[CONFIG, *HASHED, CARD], **options
        )
    except Exception as error:
        raise RunError(f"{PREFIX}{repository}: {first_line(error)}") from error
    return str(done.commit_url)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise RunError(needs("the Hub", "huggingface_hub", "hub", error)) from None
    return huggingface_hub
