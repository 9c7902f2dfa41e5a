"""Storyboard files: YAML or JSON on disk to checked `Storyboard` objects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from infra.config import ConfigError, load_config
from sample.storyboard import Storyboard, StoryboardError

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass
class StoryboardFile:
    """A file of storyboards; a file of one storyboard may hold its fields at the top instead."""

    storyboards: list[Storyboard] = field(default_factory=list)


def load_storyboards(paths: Iterable[Path], frame_step: int = 4) -> list[Storyboard]:
    """All storyboards of the files, and of the files in the folders, in order; names are unique.

    `frame_step` is the model's: a shot holds as many times k frames, and one (`models.codecs.VideoCodec`).
    A storyboard without a name gets its file's, numbered if the file holds several. Media paths are relative to the
    file that names them. Raises ConfigError naming the file and the key.
    """
    boards: list[Storyboard] = []
    origin: dict[str, Path] = {}
    for path in _files(paths):
        loaded = _read(path)
        for index, board in enumerate(loaded):
            if board.name == Storyboard.name:
                board = replace(board, name=path.stem if len(loaded) == 1 else f"{path.stem}-{index:03d}")
            try:
                board.validate(frame_step=frame_step)
            except StoryboardError as error:
                raise ConfigError(f"{path}: {error}") from error
            if board.name in origin:
                raise ConfigError(
                    f"{path}: storyboard name {board.name!r} is taken by {origin[board.name]}; names become file "
                    "names, so give each its own"
                )
            origin[board.name] = path
            boards.append(_resolve_media(board, path))
    return boards


def _files(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not found:
                raise ConfigError(f"{path}: no storyboard files ({', '.join(SUFFIXES)}) in this folder")
            files += found
        else:
            files.append(path)
    return files


def _read(path: Path) -> list[Storyboard]:
    """Storyboards of one file; the layout is told by its top key, so that errors speak of the right one."""
    import yaml

    try:
        with path.open(encoding="utf-8") as text:
            top = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such storyboard file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        top = None  # load_config says what is wrong and where
    if isinstance(top, dict) and "storyboards" not in top:
        return [load_config(Storyboard, path)]
    boards = load_config(StoryboardFile, path).storyboards
    if not boards:
        raise ConfigError(f"{path}: holds no storyboards")
    return boards


def _resolve_media(board: Storyboard, path: Path) -> Storyboard:
    def found(field: str, value: str) -> str:
        file = (path.parent / value).resolve()
        if not file.is_file():
            raise ConfigError(f"{path}: {field}: no such file {file}")
        return str(file)

    return board.with_media(found)
