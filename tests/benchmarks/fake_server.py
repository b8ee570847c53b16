"""A stand-in for `cast serve` with known delays: `python -m tests.benchmarks.fake_server DIR --port N`.

DIR/fake.json sets id, pattern, sparse_layers, first_s (time to the first token), gap_s (time between tokens), and
`fault`: "exit" (dies at start), "status" (every second request answers 500), "short" (one token too few),
"cut" (the stream breaks off).
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

DEFAULTS = {
    "pattern": "dense",
    "sparse_layers": 0,
    "first_s": 0.05,
    "gap_s": 0.01,
    "fault": None,
    "weight_bytes": 1000,
    "id": "fake",
}


def build_app(settings: dict[str, Any]) -> FastAPI:
    app = FastAPI()
    requests = 0

    @app.get("/health")
    def health() -> Response:
        return Response()

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse("# HELP cast:resident_memory_bytes RSS\ncast:resident_memory_bytes 1.5e+07\n")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [model()]}

    @app.get(f"/v1/models/{settings['id']}")
    def model() -> dict[str, Any]:
        proof = {name: settings[name] for name in ("pattern", "sparse_layers", "weight_bytes")}
        proof |= {"value_dtype": "float32", "sparse_weight_bytes": 0, "kernel": "portable", "context_length": 256}
        return {"id": settings["id"], "cast24": proof}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        nonlocal requests
        requests += 1
        if settings["fault"] == "status" and requests % 2 == 0:
            return JSONResponse({"error": {"message": "out of luck"}}, 500)
        return StreamingResponse(events(await request.json()), media_type="text/event-stream")

    async def events(body: dict[str, Any]) -> AsyncIterator[bytes]:
        count = body["max_tokens"] - (settings["fault"] == "short")
        await asyncio.sleep(settings["first_s"])
        for index in range(count):
            if index:
                await asyncio.sleep(settings["gap_s"])
            if settings["fault"] == "cut" and index == count // 2:
                return
            yield event({"choices": [{"index": 0, "text": "x", "finish_reason": None}], "usage": None})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        yield event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    return app


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def main() -> None:
    directory, _, port = sys.argv[1:]
    settings = DEFAULTS | json.loads((Path(directory) / "fake.json").read_text())
    if settings["fault"] == "exit":
        sys.exit("the weights are upside down")
    uvicorn.run(build_app(settings), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
