"""The HTTP face of the service: OpenAI's video routes over the job store.

Routes: POST /v1/videos (JSON or multipart), GET /v1/videos, GET and DELETE /v1/videos/{id},
GET /v1/videos/{id}/content; and, beyond OpenAI's, POST /v1/videos/{id}/cancel. A storyboard travels in the extension
field `storyboard` (video_request.py). A failed job is a 200 with `error` in its body, because clients poll until a
terminal status. OpenAI's client retries 409 and 5xx by itself, so what a retry cannot mend says
`x-should-retry: false`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException

from sample.jobs import Job, JobStore, KeyReused, NotFinished
from sample.video_request import INPUT_REFERENCE, MAX_UPLOADS, ApiError, VideoRequest, VideoService, parse_request

NO_RETRY = {"x-should-retry": "false"}
POLL_AFTER = {"openai-poll-after-ms": "500"}
MAX_BODY_BYTES = 32 * 2**20
MAX_FIELDS = 32  # of a form, files aside


@dataclass(frozen=True)
class Body:
    """The fields of a request, and its files by part name."""

    fields: dict[str, Any]
    files: dict[str, bytes]


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


def _create(store: JobStore, service: VideoService, body: Body, key: str | None) -> Job:
    if store.counts().get("queued", 0) >= service.max_queued:  # before uploads are decoded
        message = f"{service.max_queued} videos are waiting already; try again later"
        raise ApiError(429, message, code="queue_full", retry_after=10)
    parsed = parse_request(body.fields, service, body.files)
    try:
        return store.create(parsed.request, key, parsed.media)[0]
    except KeyReused as error:
        raise ApiError(409, str(error), code="idempotency_key_reused") from error


async def _read_body(request: Request) -> Body:
    """The fields and files of a JSON or form body."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB", code="body_too_large")
    if kind == "application/json":
        fields = _from_json(raw, "the body")
        if not isinstance(fields, dict):
            raise ApiError(400, "the body must be a JSON object")
        body = Body(fields, {})
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        body = await _read_form(request, bytes(raw))
    else:
        raise ApiError(415, f"content type {kind or 'missing'!r}: send application/json or multipart/form-data")
    for name, kinds in (("storyboard", (str, bytes)), (INPUT_REFERENCE, str)):  # bytes: a file of JSON
        if isinstance(body.fields.get(name), kinds):
            body.fields[name] = _from_json(body.fields[name], name)
    return body


async def _read_form(request: Request, raw: bytes) -> Body:
    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": raw, "more_body": False}

    body = Body({}, {})
    limits = {"max_files": MAX_UPLOADS + 1, "max_fields": MAX_FIELDS, "max_part_size": MAX_BODY_BYTES}
    async with Request(request.scope, replay).form(**limits) as form:
        for name, value in form.multi_items():
            if name in body.fields or name in body.files:
                raise ApiError(400, f"field {name!r} is given twice", param=name)
            if isinstance(value, UploadFile):
                where = body.fields if name in VideoRequest.model_fields else body.files
                where[name] = await value.read()
            elif name == f"{INPUT_REFERENCE}[image_url]":  # how OpenAI's JavaScript client writes an object
                body.fields[INPUT_REFERENCE] = {"image_url": value}
            else:
                body.fields[name] = value
    return body


def _from_json(text: str | bytes | bytearray, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"{name} is not valid JSON ({error})", param=None if name == "the body" else name
        ) from error


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
        said = {"message": message, "type": kind, "param": param, "code": code}
        # a request's own words may hold half a character, which no answer can
        error = {name: value and value.encode(errors="replace").decode() for name, value in said.items()}
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
