"""Who may ask: keys, the names under which a server without keys answers, and what a request's body may be."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv3_jax.http_api.keys import is_loopback
from dsv3_jax.http_api.requests import ApiError
from dsv3_jax.http_api.responses import error_object

OPEN = "/health"  # the one path that takes no key


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _presented(authorization: str) -> bytes:
    """The key in a request: `Bearer KEY`, or as the password that a browser asks for."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


class Guard:
    """Lets those requests through to an application that may be answered, with `scope["state"]["cache_salt"]` of their key.

    Without keys only those whose Host is this machine's own name: a web site can give its own name this machine's address,
    and a browser then takes the server for that site's.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str]):
        self._app, self._digests = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["cache_salt"] = self._admit(scope["path"], Headers(scope=scope))
            except ApiError as error:
                return await refusal(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> str:
        """The salt of the caller's cache. Raises `ApiError`."""
        if not self._digests:
            host = headers.get("host", "localhost").rsplit("]", 1)[0].lstrip("[") or "localhost"
            if not is_loopback(host) and not is_loopback(host.rsplit(":", 1)[0]):
                raise ApiError(403, "without --api-key-file this server answers to localhost alone", code="wrong_host")
            return ""
        presented = _digest(_presented(headers.get("authorization", "")))
        matches = [hmac.compare_digest(presented, digest) for digest in self._digests]  # all of them, in constant time
        if any(matches):
            return presented.hex()
        if path == OPEN:
            return ""
        raise ApiError(401, "no or a wrong API key; send `Authorization: Bearer KEY`", code="invalid_api_key")


def check_json(headers: Headers) -> None:
    """Raises `ApiError` for a body that is not declared JSON: others may be sent by any web site's page, from its visitor."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type={kind or 'none'}: send application/json", code="unsupported_media_type")


def refusal(error: ApiError) -> JSONResponse:
    """The response of an error."""
    response = JSONResponse(error_object(error), error.status)
    if error.status in (401, 403, 408, 413, 415):
        response.headers["Connection"] = "close"  # of these the body may not have been read
    if error.status == 401:
        for scheme in ("Bearer", 'Basic realm="dsv3", charset="UTF-8"'):  # browsers read one scheme a line
            response.headers.append("WWW-Authenticate", scheme)
    if error.retry_s:
        response.headers["Retry-After"] = str(max(round(error.retry_s), 1))
    return response
