"""The OpenAPI document, made from the models that requests are checked by and the types of what is answered."""

from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from dsv3_jax.http_api import requests, responses

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "A parameter that is not supported, or out of range.", 401: "No or a wrong key.", 403: "A host that is not localhost.",
    404: "No such model.", 408: "The body did not come in time.", 413: "The body is too large.", 415: "The body is no JSON.",
    500: "The engine failed.", 503: "As many requests wait as may, or the server stops; see Retry-After.",
}  # fmt: skip
_ANSWERS = {
    "Completion": responses.Completion, "ChatCompletion": responses.ChatCompletion, "Model": responses.Model,
    "ModelList": responses.ModelList, "Error": responses.Error,
}  # fmt: skip


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=name)}}}


def _answers(content: dict[str, Any], what: str, *errors: int) -> dict[str, Any]:
    refused = {str(status): {"description": _ERRORS[status], "content": _json("Error")} for status in (401, 403, *errors)}
    return {"200": {"description": what, "content": content}} | refused


def _get(what: str, content: dict[str, Any], *errors: int, **more: Any) -> dict[str, Any]:
    return {"get": {"summary": what, "responses": _answers(content, what, *errors), **more}}


def _post(what: str, request: str, answer: str) -> dict[str, Any]:
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # JSON, at last [DONE]
    content = _json(answer) | {"text/event-stream": {"schema": event}}
    return {
        "post": {
            "summary": what,
            "requestBody": {"required": True, "content": _json(request)},
            "responses": _answers(content, what, 400, 404, 408, 413, 415, 500, 503),
        }
    }


def document(with_keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1, true to what is taken, with or without a key."""
    kinds = (requests.CompletionRequest, requests.ChatRequest)
    _, taken = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
    schemas = taken["$defs"]
    for name, kind in _ANSWERS.items():
        described = TypeAdapter(kind).json_schema(ref_template=_REF)
        schemas |= described.pop("$defs", {})
        schemas[name] = described
    text = {"text/plain": {"schema": {"type": "string"}}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    health = {"application/json": {"schema": {"type": "object", "properties": {"status": {"type": "string"}}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dsv3_jax", "version": version("dsv3-jax")},
        "security": [{"key": []}] if with_keys else [],
        "paths": {
            "/v1/completions": _post("Continue prompts", "CompletionRequest", "Completion"),
            "/v1/chat/completions": _post("Answer a conversation", "ChatRequest", "ChatCompletion"),
            "/v1/models": _get("The model that is served", _json("ModelList")),
            "/v1/models/{name}": _get("The same by its name", _json("Model"), 404, parameters=[name]),
            "/metrics": _get("Figures in Prometheus' text format", text),
            "/health": _get("Whether the server takes requests; needs no key", health, security=[]),
            "/": _get("A page to try the model by", {"text/html": {"schema": {"type": "string"}}}),
            "/openapi.json": _get("This document", {"application/json": {"schema": {"type": "object"}}}),
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
