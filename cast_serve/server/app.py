"""The HTTP application and its routes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from cast_serve.server import errors
from cast_serve.server.answer import respond
from cast_serve.server.body_limit import LimitBody
from cast_serve.server.chat_completions import ChatAnswer
from cast_serve.server.completions import CompletionAnswer
from cast_serve.server.errors import APIError
from cast_serve.server.job import Admission
from cast_serve.server.metrics import CountRequests, ServerMetrics
from cast_serve.server.model import ServedModel
from cast_serve.server.protocol import ChatRequest, CompletionRequest, Model, ModelList
from cast_serve.server.streaming import EndOnShutdown


class Server:
    """What the routes share.

    Args:
        capacity: most sequences at once, running or waiting.
    """

    def __init__(self, capacity: int) -> None:
        self.metrics = ServerMetrics()
        self.admission = Admission(capacity)
        self.loaded: ServedModel | None = None

    @property
    def model(self) -> ServedModel:
        """The model; a 503 while it loads."""
        if self.loaded is None:
            raise APIError("the model is still loading: try again later", code="model_loading", status=503)
        return self.loaded


def create_app(
    load: Callable[[], ServedModel],
    *,
    capacity: int,
    on_ready: Callable[[ServedModel], None] = lambda model: None,
    on_failure: Callable[[Exception], None] = lambda error: None,
) -> FastAPI:
    """Build the application; it answers /health at once and loads the model in the background.

    Args:
        load: makes the model; runs in a thread.
        capacity: most sequences in the server at once, running or waiting; more are answered with 429.
        on_ready, on_failure: told the outcome of `load`.
    """
    server = Server(capacity)

    async def load_model() -> None:
        try:
            model = await asyncio.to_thread(load)
        except Exception as error:
            on_failure(error)
            return
        server.metrics.describe_model(model.name, model.engine.info)
        server.loaded = model
        on_ready(model)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load_model())
        yield
        await loading
        if server.loaded is not None:
            await asyncio.to_thread(server.loaded.engine.close)

    app = FastAPI(title="cast serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitBody)
    app.add_middleware(EndOnShutdown)
    app.add_middleware(CountRequests, metrics=server.metrics)  # the outermost: it sees every answer
    errors.install(app)
    _add_routes(app, server)
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        model = server.model
        if model.engine.failure is not None:
            raise APIError(model.engine.failure, code="engine_error", status=503)
        return JSONResponse({"status": "ok", "model": model.name})

    @app.get("/metrics")
    async def metrics() -> Response:
        stats = server.loaded.engine.stats() if server.loaded is not None else None
        return Response(server.metrics.render(stats), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[server.model.card()])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        server.model.require_name(name)
        return server.model.card()

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await respond(CompletionAnswer(server.model, request), http, server.metrics, server.admission)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        return await respond(ChatAnswer(server.model, request), http, server.metrics, server.admission)
