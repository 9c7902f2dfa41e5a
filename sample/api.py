"""The HTTP face of the service: OpenAI's video routes over the job store.

Routes: POST /v1/videos (JSON or multipart), GET /v1/videos, GET and DELETE /v1/videos/{id},
GET /v1/videos/{id}/content; and, beyond OpenAI's, POST /v1/videos/{id}/cancel. A storyboard travels in the extension
field `shots`; `prompt` is then the story all shots share. A failed job is a 200 with `error` in its body, because
clients poll until a terminal status. OpenAI's client retries 409 and 5xx by itself, so what a retry cannot mend says
`x-should-retry: false`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException

from sample.jobs import Job, JobStore, KeyReused, NotFinished
from sample.shot import nearest_frames
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot
from sample.video_io import fit_frames

NO_RETRY = {"x-should-retry": "false"}
POLL_AFTER = {"openai-poll-after-ms": "500"}
MAX_BODY_BYTES = 32 * 2**20
MAX_STEPS, MAX_GUIDANCE = 200, 30.0


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
    max_shots: int
    first_frame: bool  # whether a shot can start from a given image
    results: Path  # folder of finished videos
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


class ShotRequest(BaseModel):
    """One entry of `shots`."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1, max_length=4000)
    sentence: str = Field(default="", max_length=4000)
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, lt=2**63)


class VideoRequest(BaseModel):
    """The body of POST /v1/videos: OpenAI's fields, then ours."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1, max_length=8000)
    model: str | None = None
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    size: str | None = None
    input_reference: Any = None
    shots: list[ShotRequest] | None = Field(default=None, min_length=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE)
    negative_prompt: str = Field(default="", max_length=4000)


def build_api(store: JobStore, service: VideoService) -> FastAPI:
    """The app over a job store. It only records and reads jobs; a dispatcher and workers do them."""
    app = FastAPI(title="Shotloom videos", docs_url=None, redoc_url=None)
    _install_error_handlers(app)

    @app.post("/v1/videos")
    async def create(request: Request) -> JSONResponse:
        body = await _read_body(request)
        key = request.headers.get("idempotency-key")
        job = await run_in_threadpool(_create, store, service, body, key)
        return JSONResponse(video_object(job, service), headers=NO_RETRY | POLL_AFTER)

    @app.get("/v1/videos")
    def list_videos(
        after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> dict[str, Any]:
        if not 1 <= limit <= 100:
            raise ApiError(400, f"limit is {limit}; give 1 to 100", param="limit")
        try:
            jobs, has_more = store.page(after=after, limit=limit, order=order)
        except KeyError as error:
            raise ApiError(404, f"no video {after!r} to list after", param="after", code="video_not_found") from error
        data = [video_object(job, service) for job in jobs]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}

    @app.get("/v1/videos/{video_id}")
    def retrieve(video_id: str) -> JSONResponse:
        job = _find(store, video_id)
        return JSONResponse(video_object(job, service), headers=POLL_AFTER)

    @app.get("/v1/videos/{video_id}/content")
    def content(video_id: str, variant: str = "video") -> Response:
        job = _find(store, video_id)
        if variant != "video":
            raise ApiError(400, f"variant is {variant!r}; this server has 'video' only", param="variant")
        if job.status != "completed" or job.result is None:
            code = "video_failed" if job.status == "failed" else "video_not_ready"
            raise ApiError(409, f"video {video_id} is {job.status}; it has content once completed", code=code)
        path = service.results / Path(job.result).name
        if not path.is_file():
            raise ApiError(404, f"the file of video {video_id} is gone from the server", code="content_missing")
        return FileResponse(path, media_type="video/mp4", filename=f"{video_id}.mp4")

    @app.post("/v1/videos/{video_id}/cancel")
    def cancel(video_id: str) -> dict[str, Any]:
        _find(store, video_id)
        return video_object(store.cancel(video_id), service)

    @app.delete("/v1/videos/{video_id}")
    def delete(video_id: str) -> dict[str, Any]:
        _find(store, video_id)
        try:
            job = store.delete(video_id)
        except NotFinished as error:
            raise ApiError(409, str(error), code="video_not_finished") from error
        if job.result is not None:
            (service.results / Path(job.result).name).unlink(missing_ok=True)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    return app


def video_object(job: Job, service: VideoService) -> dict[str, Any]:
    """OpenAI's Video object of a job, with the extension `shots` (frames of the finished file)."""
    request = job.request
    shots, start = [], 0
    for shot in request["storyboard"]["shots"]:
        shots.append({"start_frame": start, "num_frames": shot["frames"], "prompt": shot["prompt"] or shot["sentence"]})
        start += shot["frames"]
    error = {"code": job.error_code, "message": job.error_message} if job.status == "failed" else None
    return {
        "id": job.id,
        "object": "video",
        "model": request["model"],
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None,
        "seconds": f"{start / service.fps:g}",
        "size": request["size"],
        "prompt": request["prompt"],
        "error": error,
        "remixed_from_video_id": None,
        "shots": shots,
    }


def _create(store: JobStore, service: VideoService, body: dict[str, Any], key: str | None) -> Job:
    request = parse_request(body, service)
    if store.counts().get("queued", 0) >= service.max_queued:
        message = f"{service.max_queued} videos are waiting already; try again later"
        raise ApiError(429, message, code="queue_full", retry_after=10)
    try:
        return store.create(request, key)[0]
    except KeyReused as error:
        raise ApiError(409, str(error), code="idempotency_key_reused") from error


def parse_request(body: dict[str, Any], service: VideoService) -> dict[str, Any]:
    """The job's request (JSON-ready: model, size, prompt, storyboard, steps, guidance, first_frame) or an ApiError."""
    try:
        request = VideoRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(VideoRequest.model_fields if len(first["loc"]) == 1 else ShotRequest.model_fields)
            raise ApiError(400, f"unknown field {param!r}; known: {known}", param=param) from error
        raise ApiError(400, f"{param}: {first['msg']}", param=param) from error
    if request.model not in (None, service.model):
        message = f"model {request.model!r} is not served here; use {service.model!r}"
        raise ApiError(400, message, param="model", code="model_not_found")
    if request.size not in (None, service.size):
        raise ApiError(400, f"size {request.size!r} is not made here; use {service.size!r}", param="size")
    if request.shots is None:
        shots = [StoryboardShot(sentence=request.prompt, frames=_frames(request.seconds, service, "seconds"))]
    else:
        shots = [
            StoryboardShot(
                prompt=shot.prompt,
                sentence=shot.sentence,
                seed=shot.seed,
                frames=_frames(shot.seconds or request.seconds, service, f"shots.{index}.seconds"),
            )
            for index, shot in enumerate(request.shots)
        ]
    story = "" if request.shots is None else request.prompt
    board = Storyboard("video", story, shots, negative=request.negative_prompt, seed=request.seed)
    try:
        board.validate(frame_step=service.frame_step, max_shots=service.max_shots)
    except StoryboardError as error:
        raise ApiError(400, str(error), param=error.param) from error
    return {
        "model": service.model,
        "size": service.size,
        "prompt": request.prompt,
        "storyboard": board.to_dict(),
        "steps": request.steps,
        "guidance": request.guidance,
        "first_frame": _first_frame(request.input_reference, service),
    }


def _frames(seconds: float | None, service: VideoService, param: str) -> int:
    if seconds is None:
        return service.frames_per_shot
    frames = nearest_frames(seconds * service.fps, service.frame_step)
    if frames > service.max_frames:
        longest = math.floor(service.max_frames / service.fps * 100) / 100
        raise ApiError(400, f"{param}: {seconds:g} s is too long; a shot here lasts up to {longest:g} s", param=param)
    return frames


def _first_frame(reference: Any, service: VideoService) -> str | None:
    """The given image scaled to the model's size, as base64 PNG: small, decoded once, and part of the body hash."""
    if reference is None:
        return None
    param = "input_reference"
    if not service.first_frame:
        raise ApiError(400, f"model {service.model!r} cannot start from an image", param=param)
    if isinstance(reference, Mapping) and isinstance(reference.get("image_url"), str):
        url = reference["image_url"]
        if not url.startswith("data:image/") or ";base64," not in url:
            raise ApiError(400, "image_url must be a data: URL; this server fetches nothing itself", param=param)
        try:
            data = base64.b64decode(url.split(";base64,", 1)[1], validate=True)
        except binascii.Error as error:
            raise ApiError(400, f"image_url holds no valid base64 ({error})", param=param) from error
    elif isinstance(reference, bytes):
        data = reference
    else:
        raise ApiError(400, "input_reference must be an uploaded image or {'image_url': 'data:...'}", param=param)
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))[None]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ApiError(400, f"input_reference is not a readable image ({error})", param=param) from error
    buffer = io.BytesIO()
    Image.fromarray(fit_frames(pixels, service.height, service.width)[0]).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


async def _read_body(request: Request) -> dict[str, Any]:
    """The fields of a JSON or form body; uploaded files as bytes, `shots` and other JSON values of a form parsed."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB", code="body_too_large")
    if kind == "application/json":
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON ({error})") from error
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        return body
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise ApiError(415, f"content type {kind or 'missing'!r}: send application/json or multipart/form-data")

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(raw), "more_body": False}

    fields: dict[str, Any] = {}
    async with Request(request.scope, replay).form() as form:
        for name, value in form.multi_items():
            if name in fields:
                raise ApiError(400, f"field {name!r} is given twice", param=name)
            fields[name] = await value.read() if isinstance(value, UploadFile) else value
    for name in ("shots", "input_reference"):
        if isinstance(fields.get(name), str):
            try:
                fields[name] = json.loads(fields[name])
            except ValueError as error:
                raise ApiError(400, f"{name} is not valid JSON ({error})", param=name) from error
    return fields


def _find(store: JobStore, video_id: str) -> Job:
    job = store.get(video_id)
    if job is None:
        raise ApiError(404, f"no video {video_id!r}", param="video_id", code="video_not_found")
    return job


def _install_error_handlers(app: FastAPI) -> None:
    def answer(
        status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> JSONResponse:
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        headers = {"retry-after": str(retry_after)} if retry_after else dict(NO_RETRY)
        error = {"message": message, "type": kind, "param": param, "code": code}
        return JSONResponse({"error": error}, status_code=status, headers=headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error.status, error.message, error.param, error.code, error.retry_after)

    @app.exception_handler(StarletteHTTPException)
    async def on_http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return answer(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        return answer(400, f"{param}: {first['msg']}", param)

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "the server failed on this request; its log says why", code="internal_error")
