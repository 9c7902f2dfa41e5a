"""What POST /v1/videos asks for: OpenAI's fields, a storyboard beside them, and uploads, checked and ready to be kept.

A request names no path. Where a storyboard file names an image or a video, a request's storyboard names an uploaded
part of the same multipart body, or holds a data: URL; `input_reference` is a part like any other, and the first frame
of the first shot unless the storyboard names it elsewhere. Parts are decoded here, once, and a job keeps their pixels.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from models.records import RecordError, decode
from models.scene import IMAGE_ROLES
from sample.guidance import check_guidance
from sample.shot import nearest_frames
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot
from sample.uploads import MAX_KEPT_BYTES, Upload, UploadError, read_upload

MAX_STEPS, MAX_GUIDANCE = 200, 30.0
MAX_UPLOADS = 16  # images and videos of one request
MAX_STORYBOARD_BYTES = 256 * 2**10  # as JSON, without its media
INPUT_REFERENCE = "input_reference"
MAX_SHOWN = 300  # characters of a wrong value in an error message

T = TypeVar("T")


@dataclass(frozen=True)
class VideoService:
    """What the served model makes: sizes in pixels, lengths in pixel frames."""

    model: str
    width: int
    height: int
    fps: float
    frames_per_shot: int
    frame_step: int
    max_frames: int  # of one shot
    max_shots: int  # made at once
    max_shots_in_turn: int  # made one after another
    media_width: int  # the model's own size, before videos are enlarged; uploads are scaled to it
    media_height: int
    results: Path  # folder of finished videos
    refused_tasks: Mapping[str, str] = field(default_factory=dict)  # tasks of a storyboard that it cannot do, and why
    refused_fields: Mapping[str, str] = field(default_factory=dict)  # fields of a shot that it cannot use, and why
    distilled: bool = False  # it takes its guidance as an input, so that a request's can only be 1
    lone_shots: bool = False  # it makes one shot at a time and sees no others, so that none can be guided by
    max_queued: int = 100

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


class ApiError(Exception):
    """An answer of OpenAI's error form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after


class VideoRequest(BaseModel):
    """The body of POST /v1/videos: OpenAI's fields, then ours."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | None = Field(default=None, min_length=1, max_length=8000)
    model: str | None = None
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    size: str | None = None
    input_reference: Any = None
    storyboard: dict[str, Any] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE)
    image_guidance: float | list[float] | None = None
    scene_guidance: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE)
    null_text: Literal["shot", "all"] | None = None
    negative_prompt: str | None = Field(default=None, max_length=4000)

    @field_validator("image_guidance", mode="before")
    @classmethod
    def _check_image_guidance(cls, value: Any) -> Any:
        """A number, or a list of two; a form says either as text."""
        with suppress(ValueError):
            value = json.loads(value) if isinstance(value, str) else value
        numbers = value if isinstance(value, list) else [value]
        fits = all(isinstance(one, int | float) and 0 <= one <= MAX_GUIDANCE for one in numbers)
        if value is not None and not (fits and len(numbers) == (2 if isinstance(value, list) else 1)):
            raise ValueError(
                f"give a number from 0 to {MAX_GUIDANCE:g}, or two such: that of the first and that of the last frame"
            )
        return value


@dataclass(frozen=True)
class ParsedRequest:
    """A request in the form in which a job keeps it: JSON-ready `request`, and the files that it names."""

    request: dict[str, Any]
    media: dict[str, bytes]


def parse_request(
    body: Mapping[str, Any], service: VideoService, files: Mapping[str, bytes] | None = None
) -> ParsedRequest:
    """The job's request (model, size, prompt, storyboard, steps and scales of guidance) from a body's fields and
    uploaded parts, or an ApiError that names the field."""
    request = _validated(body)
    if request.model not in (None, service.model):
        message = f"model {request.model!r} is not served here; use {service.model!r}"
        raise ApiError(400, message, param="model", code="model_not_found")
    if request.size not in (None, service.size):
        raise ApiError(400, f"size {request.size!r} is not made here; use {service.size!r}", param="size")
    if request.guidance is not None:
        try:
            check_guidance(request.guidance, service.distilled)
        except ValueError as error:
            raise ApiError(400, str(error), param="guidance") from error
    if request.scene_guidance is not None and service.lone_shots:
        message = "scene_guidance: the model served here makes one shot at a time and sees no others; leave it out"
        raise ApiError(400, message, param="scene_guidance")
    uploads = dict(files or {})
    if request.input_reference is not None:
        uploads[INPUT_REFERENCE] = _from_reference(request.input_reference)
    board = _storyboard(request)
    if INPUT_REFERENCE in uploads and INPUT_REFERENCE not in board.media():
        board = _start_from_reference(board)
    board = _with_lengths(board, request, service)
    most = service.max_shots_in_turn if board.task in ("autoregressive", "extension") else service.max_shots
    with _field_errors(request):
        board.validate(frame_step=service.frame_step, max_shots=most)
        board.check_sequence(board.task or "auto")
        _check_served(board, service)
        board, kept = _keep_media(board, uploads, service)
        board.validate(frame_step=service.frame_step)  # again: now images can be told from videos
    _check_json(board)
    return ParsedRequest(
        {
            "model": service.model,
            "size": service.size,
            "prompt": request.prompt or board.story or board.shots[0].prompt or board.shots[0].sentence,
            "storyboard": board.to_dict(),
            "steps": request.steps,
            "guidance": request.guidance,
            "image_guidance": request.image_guidance,
            "scene_guidance": request.scene_guidance,
            "null_text": request.null_text,
        },
        kept,
    )


def _validated(body: Mapping[str, Any]) -> VideoRequest:
    try:
        request = VideoRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(VideoRequest.model_fields)
            hint = "; send the storyboard as JSON text" if param.startswith("storyboard[") else ""
            raise ApiError(400, f"unknown field {param!r}{hint}; known: {known}", param=param) from error
        raise ApiError(400, f"{param}: {first['msg']}", param=param) from error
    if request.prompt is None and request.storyboard is None:
        raise ApiError(400, "prompt: required, unless a storyboard says what to make", param="prompt")
    return request


def _storyboard(request: VideoRequest) -> Storyboard:
    """The storyboard of a request, with what OpenAI's fields and the plain extensions say of it."""
    if request.storyboard is None:
        board = Storyboard("video", shots=[StoryboardShot()])
    else:
        try:
            board = decode(Storyboard, {"name": "video", "shots": [{}]} | request.storyboard, "storyboard")
        except RecordError as error:
            param = error.at.replace("[", ".").replace("]", "")
            raise ApiError(400, _shortened(str(error)), param=param) from error
    for name, value in board.plan.items():
        if any(isinstance(one, list | dict) for one in (value if isinstance(value, list) else [value])):
            param = f"storyboard.plan.{name}"
            raise ApiError(400, f"{param}: give a number, or a list of numbers", param=param)
    shots, story = board.shots, board.story
    if request.prompt is not None:
        if len(shots) == 1 and not (shots[0].prompt or shots[0].sentence) and shots[0].label is None:
            shots = [replace(shots[0], sentence=request.prompt)]
        else:
            story = _said_once(request.prompt, story or None, "prompt", "story") or ""
    negative = _said_once(request.negative_prompt, board.negative or None, "negative_prompt", "negative")
    seed = _said_once(request.seed, board.seed, "seed", "seed")
    return replace(board, shots=shots, story=story, negative=negative or "", seed=seed)


def _said_once(value: T | None, inner: T | None, name: str, inner_name: str) -> T | None:
    """What the request or its storyboard says of one thing; an ApiError where they differ."""
    if value is not None and inner is not None and value != inner:
        raise ApiError(400, f"{name} and storyboard.{inner_name} differ; leave one of them out", param=name)
    return inner if value is None else value


def _start_from_reference(board: Storyboard) -> Storyboard:
    if not board.shots:
        return board  # refused for that
    first, *rest = board.shots
    if first.first_frame:
        message = "input_reference and storyboard.shots.0.first_frame both say what the first shot starts from"
        raise ApiError(400, f"{message}; leave one of them out", param=INPUT_REFERENCE)
    return replace(board, shots=[replace(first, first_frame=INPUT_REFERENCE), *rest])


def _with_lengths(board: Storyboard, request: VideoRequest, service: VideoService) -> Storyboard:
    """Every shot with its number of frames: its own, else that of `seconds`, else the model's."""
    usual = service.frames_per_shot
    longest = math.floor(service.max_frames / service.fps * 100) / 100
    if request.seconds is not None:
        usual = nearest_frames(request.seconds * service.fps, service.frame_step)
        if usual > service.max_frames:
            message = f"seconds: {request.seconds:g} s is too long; a shot here lasts up to {longest:g} s"
            raise ApiError(400, message, param="seconds")
    for index, shot in enumerate(board.shots):
        if shot.frames is not None and shot.frames > service.max_frames:
            param = f"storyboard.shots.{index}.frames"
            message = f"{param}: {shot.frames} is too long; a shot here has up to {service.max_frames} ({longest:g} s)"
            raise ApiError(400, message, param=param)
    return replace(
        board, shots=[replace(shot, frames=usual if shot.frames is None else shot.frames) for shot in board.shots]
    )


def _check_served(board: Storyboard, service: VideoService) -> None:
    """Raises StoryboardError for what the model cannot do, and for a plan that would never end."""
    if reason := service.refused_tasks.get(board.task or "auto"):
        raise StoryboardError(reason, "task")
    for index, shot in enumerate(board.shots):
        for name, reason in service.refused_fields.items():
            if getattr(shot, name) not in (None, "", []):
                raise StoryboardError(f"model {service.model!r}: {reason}", f"shots.{index}.{name}")
    lag = board.plan.get("lag")
    if isinstance(lag, int | float) and lag > MAX_STEPS:
        raise StoryboardError(f"plan: lag={lag}; give at most {MAX_STEPS} steps", "plan.lag")


def _keep_media(
    board: Storyboard, files: Mapping[str, bytes], service: VideoService
) -> tuple[Storyboard, dict[str, bytes]]:
    """The storyboard with the names of decoded files in place of parts and data: URLs, and these files by name."""
    read: dict[str, Upload] = {}

    def find(field: str, value: str) -> str:
        if value not in read:
            if len(read) == MAX_UPLOADS:
                raise StoryboardError(f"more than {MAX_UPLOADS} images and videos in one request", field)
            data = _from_data_url(value, field) if value.startswith("data:") else files.get(value)
            if data is None:
                known = f"there are {', '.join(map(repr, files))}" if files else "none came with the request"
                raise StoryboardError(f"{field} is {value!r}, which names no uploaded part; {known}", field)
            try:
                read[value] = read_upload(data, service.media_height, service.media_width)
            except UploadError as error:
                where = INPUT_REFERENCE if value == INPUT_REFERENCE else field
                raise StoryboardError(f"{where}: {error}", field) from error
            if sum(len(upload.data) for upload in read.values()) > MAX_KEPT_BYTES:
                message = f"images and videos take more than {MAX_KEPT_BYTES // 2**20} MiB at the model's size"
                raise StoryboardError(message, field)
        return read[value].name

    kept = board.with_media(find)
    if unnamed := [name for name in files if name not in read]:
        message = f"part {unnamed[0]!r} is uploaded, but the storyboard does not name it"
        raise ApiError(400, _shortened(message), param=unnamed[0][:MAX_SHOWN])
    by_name = {upload.name: upload for upload in read.values()}
    for index, shot in enumerate(kept.shots):
        for number, one in enumerate(shot.references):
            if one.role in IMAGE_ROLES and not by_name[one.path].is_image:
                at = f"shots.{index}.references.{number}.path"
                raise StoryboardError(f"{at}: a {one.role} is an image; this is a video", at)
    return _with_given_lengths(kept, by_name, service), {name: upload.data for name, upload in by_name.items()}


def _with_given_lengths(board: Storyboard, uploads: Mapping[str, Upload], service: VideoService) -> Storyboard:
    """A given shot, and one that is edited, is as long as its file, up to the length asked for."""
    shots = []
    for shot in board.shots:
        file = shot.given or (shot.first_frame if board.task == "edit" else "")
        if file and shot.frames is not None:
            frames = min(uploads[file].num_frames, shot.frames)
            shot = replace(shot, frames=(frames - 1) // service.frame_step * service.frame_step + 1)
        shots.append(shot)
    return replace(board, shots=shots)


def _check_json(board: Storyboard) -> None:
    """An ApiError for a storyboard that is very long, or that JSON and UTF-8 cannot hold (NaN, half a character)."""
    try:
        text = json.dumps(board.to_dict(), allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise ApiError(400, f"storyboard: {error}", param="storyboard") from error
    if len(text) > MAX_STORYBOARD_BYTES:
        message = f"storyboard: {len(text)} bytes; at most {MAX_STORYBOARD_BYTES}, without its media"
        raise ApiError(400, message, param="storyboard")


def _from_reference(reference: Any) -> bytes:
    """The bytes of `input_reference`: an upload, or OpenAI's {"image_url": ...} with a data: URL."""
    if isinstance(reference, bytes):
        return reference
    if isinstance(reference, Mapping) and isinstance(reference.get("image_url"), str):
        try:
            return _from_data_url(reference["image_url"], "image_url")
        except StoryboardError as error:
            raise ApiError(400, str(error), param=INPUT_REFERENCE) from error
    message = "input_reference must be an uploaded file or {'image_url': 'data:...'}"
    raise ApiError(400, message, param=INPUT_REFERENCE)


def _from_data_url(url: str, field: str) -> bytes:
    if not url.startswith("data:") or ";base64," not in url[:200]:
        raise StoryboardError(f"{field} must be a data: URL in base64; this server fetches nothing itself", field)
    try:
        return base64.b64decode(url.split(";base64,", 1)[1], validate=True)
    except (binascii.Error, ValueError) as error:
        raise StoryboardError(f"{field} holds no valid base64 ({error})", field) from error


@contextmanager
def _field_errors(request: VideoRequest) -> Iterator[None]:
    """Turns a StoryboardError inside the block into an ApiError that names the field as the request has it."""
    try:
        yield
    except StoryboardError as error:
        raise ApiError(400, _shortened(str(error)), param=_request_field(error.param, request)) from error


def _request_field(param: str | None, request: VideoRequest) -> str | None:
    shots = (request.storyboard or {}).get("shots") or [{}]
    if param == "shots.0.first_frame" and not shots[0].get("first_frame"):
        return INPUT_REFERENCE
    if request.storyboard is None:
        return "prompt" if param is not None and param.startswith("shots") else param
    return None if param is None else f"storyboard.{param}"


def _shortened(message: str) -> str:
    return message if len(message) <= 2 * MAX_SHOWN else f"{message[:MAX_SHOWN]} ... {message[-MAX_SHOWN:]}"
