"""Teaching: `/admin/jobs` and `/admin/files`: a store that is taught while it is served."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from growlm.engine import Engine
from growlm.modules import KINDS
from growlm.modules.shapes import RECALLING
from growlm.server.events import event_stream
from growlm.server.files import FILE_KINDS, Files
from growlm.server.jobs import Job, Jobs
from growlm.server.reading import StrictRoute
from growlm.server.refusals import Refusal
from growlm.store.stored_module import is_name
from growlm.training.config import LearnConfig


class JobBody(BaseModel):
    """What is to be done. All but `verb`, `module` and `files` are options of `growlm learn`."""

    model_config = ConfigDict(extra="forbid")

    verb: Literal["learn", "update", "remove", "verify"]
    module: str | None = None
    files: list[str] = Field(default=[], max_length=64, description="Ids of files that were sent, or paths.")
    kind: str | None = None
    tokens: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1, le=1000)
    sequence_length: int | None = Field(default=None, ge=2, le=1 << 20)
    learning_rate: float | None = Field(default=None, gt=0, description="By default short trials find it.")
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    separator: str | None = Field(default=None, min_length=1, max_length=100, pattern=r"^[^\x00]*$")
    text_key: str | None = Field(default=None, min_length=1, max_length=100, pattern=r"^[^\x00]*$")
    restart: bool = False

    def job(self, files: Files, engine: Engine) -> Job:
        """
        Raises:
            Refusal: fields that contradict each other, or the store.
        """
        learns = self.verb in ("learn", "update")
        if self.verb == "verify":
            if self.module is not None or self.files:
                raise Refusal(400, "verify reads the whole store; leave out module and files", "invalid_value")
            return Job(self.verb, None, [])
        if self.module is None:
            raise Refusal(400, "module is missing; give its name", "invalid_value", "module")
        if not is_name(self.module):
            told = (
                f"module is {self.module!r}; give a name of small letters, digits, dots, - and _, and not auto or base"
            )
            raise Refusal(400, told, "invalid_value", "module")
        there = engine.store.find(self.module) is not None
        if self.verb == "learn" and there and not self.restart:
            told = f"module {self.module!r} exists; its next version is learned as an update"
            raise Refusal(409, told, "module_exists", "module")
        if self.verb in ("update", "remove") and not there:
            raise Refusal(404, f"no module {self.module!r}; /v1/models lists them", "model_not_found", "module")
        if self.verb == "remove":
            if self.files:
                raise Refusal(400, "remove takes a module alone; leave out files", "invalid_value", "files")
            return Job(self.verb, self.module, [self.module, "--yes"])
        if learns and not self.files:
            raise Refusal(400, "files is empty; send some, or name some", "invalid_value", "files")
        if self.kind is not None and self.kind not in learned_kinds():
            told = f"kind is {self.kind!r}; expected one of auto, {', '.join(learned_kinds())}"
            raise Refusal(400, told, "invalid_value", "kind")
        given = [self.module, "--data", *map(str, files.paths(self.files))]
        positions = engine.base.trained_positions or engine.base.max_positions
        if self.sequence_length is None and positions is not None and positions < LearnConfig().sequence_length:
            given.append(f"--sequence-length={positions}")
        for name in ("kind", "tokens", "epochs", "sequence_length", "learning_rate", "seed", "separator", "text_key"):
            if (value := getattr(self, name)) is not None:
                given += [f"--{name.replace('_', '-')}={value}"]
        given += ["--restart"] * self.restart + ["--update"] * (self.verb == "update")
        return Job(self.verb, self.module, given)


def begun(body: JobBody, jobs: Jobs, files: Files, engine: Engine) -> Job:
    """A job that runs, or waits for those before it.

    Raises:
        Refusal: what cannot be, or too many wait.
    """
    if jobs.full:
        raise Refusal(503, "too many jobs wait; try again later", "queue_full", headers={"Retry-After": "60"})
    job = body.job(files, engine)
    if any(one.module == job.module and one.verb == job.verb and not one.over for one in jobs.all()):
        told = (
            f"a job of this kind{f' for {job.module!r}' if job.module else ''} runs or waits already; cancel it first"
        )
        raise Refusal(409, told, "job_exists")
    job.learns_from = [name for name in body.files if files.sent(name)]
    return jobs.add(job)


def learned_kinds() -> list[str]:
    """Of modules, as they are written."""
    return [*KINDS, *(f"{kind}{RECALLING}" for kind in KINDS if kind != "recall")]


def teaching_paths(jobs: Jobs, files: Files, engine: Engine) -> APIRouter:
    paths = APIRouter(prefix="/admin", tags=["admin"], route_class=StrictRoute)

    def found(name: str) -> Job:
        if (job := jobs.get(name)) is None:
            raise Refusal(404, f"no job {name!r}; /admin/jobs lists them", "no_such_job")
        return job

    @paths.put("/files/{name}")
    async def send(name: str, request: Request) -> dict[str, Any]:
        """Sends a file to learn from, as the body alone."""
        return {"id": await files.take(name, request.stream()), "name": name}

    @paths.get("/files")
    def sent() -> dict[str, Any]:
        """Files that were sent and are kept."""
        return {"data": files.all()}

    @paths.delete("/files/{name}")
    def forget(name: str) -> dict[str, bool]:
        if not files.remove(name):
            raise Refusal(404, f"no file {name!r}; /admin/files lists them", "no_such_file")
        return {"removed": True}

    @paths.get("/kinds")
    def kinds() -> dict[str, list[str]]:
        """Of modules that can be learned, and of files that they are learned from."""
        return {"data": learned_kinds(), "files": sorted(FILE_KINDS)}

    @paths.post("/jobs", status_code=202)
    async def begin(body: JobBody) -> dict[str, Any]:
        """Begins a job, or has it wait for those before it."""
        return begun(body, jobs, files, engine).to_json()

    @paths.get("/jobs")
    async def listed() -> dict[str, Any]:
        return {"data": [job.to_json() for job in jobs.all()]}

    @paths.get("/jobs/{job}")
    async def one(job: str) -> dict[str, Any]:
        return found(job).to_json()

    @paths.get("/jobs/{job}/events")
    async def events(job: str) -> Response:
        """Its lines and how far it is, as server-sent events, until it has ended."""
        return await event_stream(found(job).events(jobs.ending), dict, lambda: None)

    @paths.get("/jobs/{job}/log", response_class=PlainTextResponse)
    async def log(job: str) -> str:
        return "".join(f"{line}\n" for line in found(job).lines)

    @paths.delete("/jobs/{job}")
    async def cancel(job: str) -> dict[str, Any]:
        """Ends a job as Ctrl-C does; the same job again goes on where it was."""
        await jobs.cancel(found(job))
        return found(job).to_json()

    return paths
