"""Find the weights that torchvision and timm publish: in the caches, whole or damaged, or where to get them. No network unless asked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..core.errors import ModelError
from ..core.files import sha256_file
from ..core.text import quoted
from .names import SMALL_CNN
from .weights import read_state

# torchvision states a licence for some of its files alone; the rest is under the library's, on ImageNet's terms
_TORCHVISION_LICENCE = "BSD-3-Clause"
_HASH = re.compile(r"-([a-f0-9]{8,})\.")  # in a published file's name: the start of its SHA-256
_BLOB = re.compile(r"[a-f0-9]{64}")  # name of a large file in Hugging Face's cache: its SHA-256


@dataclass(frozen=True)
class Published:
    """The published weights of one architecture.

    Args:
        arch: a resolved name.
        url: address of the file itself; "" when there is none.
        repository: on the Hugging Face hub, "owner/name[@revision]"; "" when there is none.
        names: file names to try in the repository.
        licence: as the library states it; "" when it states none.
        megabytes: size in MiB, where the library states it.
    """

    arch: str
    url: str = ""
    repository: str = ""
    names: tuple[str, ...] = ()
    licence: str = ""
    megabytes: float | None = None

    @property
    def exists(self) -> bool:
        """Whether any weights were published at all."""
        return bool(self.url or self.repository)

    @property
    def address(self) -> str:
        """Where a browser gets the file: the hub first, as `--init pretrained` does."""
        repo, _, revision = self.repository.partition("@")
        return f"https://huggingface.co/{repo}/resolve/{revision or 'main'}/{self.names[0]}" if repo else self.url

    @property
    def place(self) -> Path | None:
        """The path that a file fetched by hand is put at; None where only the hub's own cache serves."""
        from torch.hub import get_dir

        return Path(get_dir()) / "checkpoints" / Path(urlsplit(self.url).path).name if self.url else None

    @property
    def hub_folder(self) -> Path | None:
        """The repository's folder in Hugging Face's cache, whether it is there or not."""
        from huggingface_hub import constants

        repo = self.repository.partition("@")[0]
        return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" if repo else None

    @cached_property
    def path(self) -> Path | None:
        """The file in one of the two caches, whole or not; None if it is in neither. Looks at the disk only."""
        from huggingface_hub import try_to_load_from_cache

        repo, _, revision = self.repository.partition("@")
        for name in self.names if repo else ():
            found = try_to_load_from_cache(repo, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
        return self.place if self.place is not None and os.path.isfile(self.place) else None

    @cached_property
    def damage(self) -> str:
        """Why the file here cannot be what was published; "" when it can, or when there is none. Reads all of it."""
        return _damage(self.path, self.path.stat().st_mtime_ns, self.megabytes) if self.path is not None else ""

    def damaged_error(self) -> ModelError:
        """M003 for `damage`."""
        return ModelError(
            "M003",
            f"the pretrained weights of {self.arch} on this machine are damaged: {self.path}",
            why=self.damage,
            try_=f"rm {quoted(str(self.path))}   (and repeat with --init pretrained, which fetches it; or --init scratch)",
        )


def published_weights(arch: str) -> Published:
    """What is published for a resolved name; from the libraries' tables, no network."""
    library, _, name = arch.rpartition("/")
    if library == "torchvision":
        from torchvision.models import get_model_weights

        weights: Any = get_model_weights(name).DEFAULT
        licence = str(weights.meta.get("license") or _TORCHVISION_LICENCE)
        return Published(arch, weights.url, licence=licence, megabytes=weights.meta.get("_file_size"))
    if library == "timm":
        import timm

        cfg = timm.models.get_pretrained_cfg(name)
        if cfg is not None:
            files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
            # NumPy archives and other forms that only timm's own code reads are not taken.
            url = "" if cfg.custom_load or not isinstance(cfg.url, str) else cfg.url
            return Published(arch, url, cfg.hf_hub_id or "", files, "" if cfg.license in (None, "unknown") else cfg.license)
    return Published(arch)


def pretrained_available(arch: str) -> Path | None:
    """The published weights of a resolved name where they lie, whole, in torch's or Hugging Face's cache; None if nowhere.

    Looks at the disk only.
    """
    found = published_weights(arch)
    return None if found.damage else found.path


def fetch_published(arch: str, allow_download: bool) -> Path:
    """The published weights of a resolved name as a local file, downloaded where that is allowed.

    Raises:
        ModelError: M003, the file here is damaged; M007, nothing is published, or it is neither here nor to be had.
    """
    found = published_weights(arch)
    if found.damage:
        raise found.damaged_error()
    if found.path is not None:
        return found.path
    if not found.exists:
        own = " (it is made for training from scratch)" if arch == SMALL_CNN else ""
        raise ModelError("M007", f"there are no published weights for {arch}{own}", try_="--init scratch")
    if not allow_download:
        raise _absent(found, f"the pretrained weights of {arch} are not on this machine, and downloading was not allowed")
    return _download(found)


def _absent(found: Published, message: str) -> ModelError:
    """M007 with the file, the place, and what to do without a network."""
    by_hand = f"put it at {found.place}, or name it" if found.place is not None and found.address == found.url else "name it"
    bare = found.arch.removeprefix("torchvision/")
    return ModelError(
        "M007",
        message,
        where=str(found.place if found.address == found.url else found.hub_folder),
        why=f"published as {found.address}, licence: {found.licence or 'not stated'}",
        try_=f"fetch that file where there is a network, and {by_hand}: --model {bare} --init FILE   (or --init scratch)",
    )


def _download(found: Published) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from torch.hub import download_url_to_file

    repo, _, revision = found.repository.partition("@")
    try:
        for name in found.names if repo else ():
            try:
                return Path(hf_hub_download(repo, name, revision=revision or None))
            except EntryNotFoundError:
                continue  # Older repositories have only the second name.
        if found.place is None:
            raise ModelError("M007", f"{found.repository} holds none of {', '.join(found.names)}")
        found.place.parent.mkdir(parents=True, exist_ok=True)
        digest = _HASH.search(found.place.name)
        download_url_to_file(found.url, str(found.place), digest.group(1) if digest else None, progress=False)
        return found.place
    except (OSError, RuntimeError, HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _absent(found, f"cannot download the pretrained weights of {found.arch}: {reason}") from error


@lru_cache(maxsize=64)
def _damage(path: Path, changed_ns: int, megabytes: float | None) -> str:
    """What speaks against a cached file; `changed_ns` is there so that a file that was exchanged is looked at again."""
    size = path.stat().st_size / 2**20
    if megabytes and size < 0.99 * megabytes:
        return f"{size:.1f} of {megabytes:.1f} MiB are there, as after an interrupted download"
    blob = _BLOB.fullmatch(path.resolve().name)
    digest = blob.group() if blob else next(iter(_HASH.findall(path.name)), "")
    if not digest:  # nothing states what it should be: it has at least to be a file of weights
        try:
            read_state(path)
        except ModelError as error:
            return error.message
        return ""
    found = sha256_file(path)
    return "" if found.startswith(digest) else f"its SHA-256 begins with {found[:8]}, and its name states {digest[:8]}"
