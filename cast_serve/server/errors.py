"""Errors as the OpenAI API reports them: a status and {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from conversion.errors import InputError


class APIError(Exception):
    """A request that cannot be answered.

    Args:
        message: one sentence for the caller.
        param: name of the parameter at fault, if one is.
        code: machine-readable reason, e.g. "model_not_found".
        status: HTTP status.
        headers: extra response headers.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.headers = headers

    def body(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": _type_of(self.status), "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def _type_of(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def install(app: FastAPI) -> None:
    """Make every error of `app`, whoever raises it, leave in the OpenAI form."""

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(InputError)
    async def input_error(request: Request, error: InputError) -> JSONResponse:
        return APIError(str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _describe(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers) if error.headers else None
        return APIError(message, status=error.status_code, headers=headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return APIError("the server failed on this request; its log says why", status=500).response()


def _describe(errors: Sequence[Any]) -> APIError:
    """Turn the first of pydantic's complaints into one sentence about one parameter."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return APIError(f"the request body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        return APIError("the request body must be a JSON object sent with Content-Type: application/json")
    param = path[0]
    where = ".".join(path)
    if first["type"] == "missing":
        return APIError(f"parameter '{where}' is required", param=param)
    return APIError(f"parameter '{where}' is invalid: {_reason(first)}", param=param)


def _reason(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = error.get("input")
    return f"{message}, got {value}" if isinstance(value, int | float) else message
