"""Videos in a WebDataset tar: members that share a name up to its first dot are one sample (X.mp4, X.json, X.txt).

What X.json holds, captions or fields, is seen when its video is probed (`preprocess.captions.look_beside`).

Nothing is unpacked: a member is known by where its bytes lie. Its name only names it, and one that would lead out of a
folder (`..`, a leading slash, a link) is set aside.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from preprocess.outcome import short
from preprocess.remote import open_file

_LARGEST_TEXT = 16 * 2**20


@dataclass
class TarVideo:
    """One video of a tar; `error` says why it cannot be one."""

    name: str
    span: list[int] = field(default_factory=list)  # offset and size in the tar, bytes
    captions: list[int] | None = None  # the same of X.json
    fields: dict[str, Any] = field(default_factory=dict)  # X.txt
    error: str = ""


def read_tar(path: str, suffixes: Collection[str]) -> list[TarVideo]:
    """Videos of a tar in their order; of a damaged tar those before the damage, and an entry that says so."""
    videos: list[TarVideo] = []
    sidecars: dict[str, dict[str, tuple[int, int]]] = {}
    damage = ""
    with open_file(path) as file:
        try:
            end = file.seek(0, 2)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    name, span = posixpath.normpath(member.name), (member.offset_data, member.size)
                    suffix = PurePosixPath(name).suffix.lower()
                    if posixpath.basename(name).startswith("."):
                        continue  # hidden, as in a folder: what macOS adds to each file
                    if suffix in suffixes and not member.isdir():
                        videos.append(TarVideo(name, list(span), error=_unfit(member, end)))
                    elif suffix in (".json", ".txt") and member.isfile() and not member.issparse():
                        sidecars.setdefault(_key(name), {})[suffix] = span
        except (tarfile.TarError, EOFError) as error:
            damage = f"the tar is damaged here, or compressed ({short(error)}); plain .tar files are taken"
        for video in videos:
            beside = sidecars.get(_key(video.name), {})
            if not video.error and ".json" in beside:
                video.captions = list(beside[".json"])
            if not video.error and ".txt" in beside and beside[".txt"][1] <= _LARGEST_TEXT:
                file.seek(beside[".txt"][0])
                video.fields["txt"] = file.read(beside[".txt"][1]).decode("utf-8", "replace").strip()
    if damage:
        videos.append(TarVideo("(rest of the tar)", error=damage))
    return videos


def find_member(path: str, name: str) -> list[int] | None:
    """Offset and size of a plain file in a tar; None where there is none of that name."""
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if posixpath.normpath(member.name) == name and member.isfile() and not member.issparse():
                return [member.offset_data, member.size]
    return None


def _key(name: str) -> str:
    """WebDataset's: the path up to the first dot of its last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}"


def _unfit(member: tarfile.TarInfo, end: int) -> str:
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        return f"its name {member.name!r} leads out of the tar"
    if not member.isfile() or member.issparse():
        return f"member {member.name!r} is a link or no plain file"
    if member.offset_data + member.size > end:
        return f"the tar is cut off inside of {member.name!r}"
    return ""
