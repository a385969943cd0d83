"""App: the paths of the server, and what each does."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Protocol, TextIO

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from growlm import __version__
from growlm.data import LONG, encode_pieces, start_tokens
from growlm.engine import Engine, Generation
from growlm.errors import GrowlmError, shortened
from growlm.server.admin import admin_paths
from growlm.server.answering import Answering, headers_of
from growlm.server.chat import ChatCompletion
from growlm.server.completions import Completion
from growlm.server.conversation import Conversation, turns_of
from growlm.server.door import Door
from growlm.server.events import ClientGone, error_response, event_stream, unless_gone
from growlm.server.fields import Body, ChatBody, CompletionBody, Message
from growlm.server.files import Files
from growlm.server.jobs import Jobs
from growlm.server.keys import Keys
from growlm.server.messages import CountBody, Messages, MessagesBody
from growlm.server.pages import page_paths
from growlm.server.reading import StrictRoute
from growlm.server.refusals import ANTHROPIC, CLIENT_GONE, Refusal
from growlm.server.responses import Responses, ResponsesBody
from growlm.server.service import Asked, Service
from growlm.server.teaching import teaching_paths

MAX_BODY = 4 << 20  # bytes
_LONGEST_HEADER = 500
_EXPOSED = ("X-Growlm-Module", "X-Growlm-Ignored", "X-Request-Id", "Retry-After")  # to pages elsewhere


class Form(Protocol):
    """One request for text, in the form of one path."""

    async def ask(self) -> Asked: ...

    def whole(self, answers: Sequence[Generation], asked: Asked) -> dict[str, Any]: ...

    def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]: ...


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What is told where a request is not answered."""

    error: Error


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": told}
    for status, told in {
        400: "A field, or the body, that cannot be.",
        401: "No key, or a wrong one.",
        403: "The server has no admin key.",
        404: "No such model.",
        413: "The request is too large.",
        422: "The module does not fit the memory budget.",
        500: "The store is damaged, or the server made a mistake; its log says more.",
        503: "No place; try again in a moment.",
        504: "The answer took too long.",
    }.items()
}


class TokenizeBody(BaseModel):
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    tokens: list[int]


def create_app(
    service: Service,
    *,
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
    own_keys: Keys | None = None,
    local: bool = False,
    jobs: Jobs | None = None,
    files: Files | None = None,
    parse_special: bool = False,
    max_body: int = MAX_BODY,
    origins: Sequence[str] = (),
    log: TextIO | None = sys.stderr,
) -> FastAPI:
    """The server of one service, which it starts and closes.

    Args:
        keys, admin_keys, own_keys, local, max_body, log: as `Door` has them.
        jobs, files: how and from what the store is taught; by default without a bound of memory, from what is sent.
        parse_special: as `Answering` has it.
        origins: of pages elsewhere that may ask from a browser; none by default.
    """
    answering = Answering(service, parse_special=parse_special)
    engine, names = service.engine, answering.names
    teaching = jobs or Jobs(str(engine.store.path), ended=service.reload)
    given = files or Files()
    teaching.done = lambda job: given.remove_all(job.learns_from)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        teaching.start()
        try:
            async with nullcontext() if helper is None else helper.session_manager.run():
                yield
        finally:
            try:
                await teaching.close()
            finally:
                service.close()
                given.close()

    helper = None
    if find_spec("mcp") is not None:
        from growlm.server.assistants import assistant, assistant_paths

        helper = assistant(service, teaching, given)
    # No pages of FastAPI's own: they run scripts from elsewhere, beside the page that knows the key.
    app = FastAPI(title="growlm", version=__version__, lifespan=life, responses=_ERRORS, docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    app.add_middleware(
        Door, keys=keys or Keys(), admin_keys=admin_keys or Keys(), own_keys=own_keys or Keys(), local=local,
        require_place=service.require_place,
        places={engine.base.where: "the base", str(engine.store.path): "the store"},
        max_body=max_body, max_upload=given.most_bytes, log=log,
    )  # fmt: skip
    if origins:  # outside of the door: a browser asks whether it may before it sends a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    _handle_errors(app)

    async def answered(request: Request, body: Body, form: Form) -> Response:
        body.require()
        ignored = body.ignored()
        more = {"X-Growlm-Ignored": _in_a_header(", ".join(ignored))} if ignored else {}
        if body.stream:
            asked = await unless_gone(request, form.ask())
            return await event_stream(form.chunks(asked), lambda: {**headers_of(asked), **more}, asked.leave)

        async def whole() -> tuple[dict[str, Any], dict[str, str]]:
            asked = await form.ask()
            answers = await asked.whole()
            return form.whole(answers, asked), headers_of(asked)

        content, headers = await unless_gone(request, whole())
        return JSONResponse(content, headers={**headers, **more})

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await answered(request, body, Completion(answering, body))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await answered(request, body, ChatCompletion(answering, body))

    @app.post("/v1/responses")
    async def responses(request: Request, body: ResponsesBody) -> Response:
        return await answered(request, body, Responses(answering, body))

    @app.post(ANTHROPIC)
    async def messages(request: Request, body: MessagesBody) -> Response:
        return await answered(request, body, Messages(answering, body))

    @app.post(f"{ANTHROPIC}/count_tokens")
    async def count_tokens(body: CountBody) -> dict[str, int]:
        prompt = await body.conversation(answering).prompt()
        return {"input_tokens": len(await service.prepare(engine.tokens_of, prompt, aside=True))}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": names.cards()}

    @app.get("/v1/models/{model:path}")
    def model_card(model: str) -> dict[str, Any]:
        return names.card(model)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        if (body.prompt is None) == (body.messages is None):
            raise Refusal(400, "give either prompt or messages", "invalid_value", "prompt")
        if body.messages is not None:
            prompt = await Conversation(answering, None, turns_of(body.messages), "messages").prompt()
            ids = await service.prepare(engine.tokens_of, prompt, aside=True)
        else:
            ids = await service.prepare(_ids_of, engine, body.prompt or "", body.add_special_tokens, aside=True)
        return {"count": len(ids), "max_model_len": names.length, "tokens": list(ids)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        return {"prompt": await service.prepare(_text_of, engine, body.tokens, aside=True)}

    @app.get("/tokenizer_info")
    def tokenizer_info() -> dict[str, Any]:
        tokenizer = engine.tokenizer
        tokens = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "chat_template": tokenizer.chat_template,
            **{f"{name}_token": token for name, token in tokens.items()},
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in tokens},
        }

    @app.get("/health")
    @app.get("/ready")
    def health() -> dict[str, str]:
        service.require_whole()
        return {"status": "ok"}

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if helper is not None:
        app.router.routes += assistant_paths(helper)
    else:

        @app.post("/mcp", include_in_schema=False)
        def no_assistants() -> None:
            raise Refusal(404, 'mcp not installed: pip install "growlm[mcp]"', "not_installed")

    app.include_router(page_paths())
    app.include_router(admin_paths(service))
    app.include_router(teaching_paths(teaching, given, engine))
    return app


def _ids_of(engine: Engine, text: str, start: bool) -> list[int]:
    """Of a text as the engine reads it, with the tokens that a text begins with or without: what it spells like a
    special token is letters."""
    if start and text.strip() and len(text) <= LONG:
        return engine.tokens_of(text)
    found = start_tokens(engine.tokenizer) if start and text.strip() else []
    for piece in encode_pieces(engine.tokenizer, text):  # others may ask the tokenizer in between
        found += piece
    return found


def _text_of(engine: Engine, tokens: Sequence[int]) -> str:
    if tokens:
        engine.base.require_rows(tokens, "tokens", engine.tokenizer)
    text: str = engine.tokenizer.decode(tokens)
    return text


def _in_a_header(text: str) -> str:
    """What a header can say of it: it takes a line of ASCII."""
    plain = "".join(sign if sign.isascii() and sign.isprintable() else "?" for sign in text)
    return plain if len(plain) <= _LONGEST_HEADER else f"{plain[:_LONGEST_HEADER]}..."


def _handle_errors(app: FastAPI) -> None:
    async def told(request: Request, error: Exception) -> Response:
        return error_response(error, request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_invalid(error), request.url.path)

    async def by_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, Refusal):  # while the body was read
            return error_response(error.__cause__, request.url.path)
        what = {404: "no such path", 405: "this path takes another method"}.get(error.status_code, error.detail)
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {what}")
        return error_response(refusal, request.url.path, error.headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for kind, handle in (
        (Refusal, told), (GrowlmError, told), (RequestValidationError, invalid), (HTTPException, by_path),
        (ClientGone, gone),
    ):  # fmt: skip
        app.add_exception_handler(kind, handle)


def _invalid(error: RequestValidationError) -> Refusal:
    """The first thing that was refused, by its field."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {first['ctx']['error']}", "invalid_json")
    if not place:
        return Refusal(400, "the body is missing, or no JSON object; send one as application/json", "invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "missing" else f" is {shortened(first['input'])}"
    return Refusal(400, f"{'.'.join(place)}{value}: {message}", "invalid_value", place[0])
