"""/openapi.json: the API described in OpenAPI 3.1, made from the models of its requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from loramux.server.openai.schema import RequestModel
from loramux.server.versions import installed_versions

ERROR_CODES = {
    "400": "The request cannot be used; `param` names the field.",
    "404": "No such model.",
    "408": "The body did not arrive in time.",
    "409": "The adapter's name is taken, or in use.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "422": "The adapter failed.",
    "429": "The server is full; Retry-After says when to try again.",
    "500": "The server's own fault.",
    "503": "The server is loading, draining or has failed; Retry-After says when to try again.",
}
_SCHEMA = "#/components/schemas/"
_EVENTS: dict[str, Any] = {"text/event-stream": {}}
_PLAIN = "text/plain"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

Operation = tuple[str, str, str, type[RequestModel] | None]
"""Method, path, docstring of its handler, model of its body."""


def described(operations: Iterable[Operation]) -> dict[str, Any]:
    """Return the description of some operations."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for method, path, text, model in operations:
        plain_path = re.sub(r":\w+}", "}", path)
        body = None if model is None else _body(model, schemas)
        paths.setdefault(plain_path, {})[method.lower()] = _operation(plain_path, text, body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "loramux", "version": installed_versions()["loramux"]},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _body(model: type[RequestModel], schemas: dict[str, Any]) -> dict[str, Any]:
    """A reference to a model's schema, which is added to the schemas with those that it names."""
    schema = model.model_json_schema(ref_template=_SCHEMA + "{model}")
    schemas.update(schema.pop("$defs", {}))
    without_effect = {name: _unused("It has no effect.") for name in sorted(model.INERT)}
    as_default = {
        name: _unused("Not served.") | {"enum": [*values, None]}
        for name, values in sorted(model.AS_DEFAULT.items())
    }
    schema["properties"] = {**as_default, **without_effect, **schema["properties"]}
    schemas[model.__name__] = schema
    return {"$ref": _SCHEMA + model.__name__}


def _unused(description: str) -> dict[str, Any]:
    return {"description": description}


def _operation(path: str, text: str, body: dict[str, Any] | None) -> dict[str, Any]:
    answer = {"application/json": {"schema": {"type": "object"}}}
    is_generation = path.endswith(("completions", "responses"))
    is_text = path.endswith("lora_adapter")
    content = {_PLAIN: {"schema": {"type": "string"}}} if is_text else answer
    error = {"application/json": {"schema": {"$ref": _SCHEMA + "Error"}}}
    refusals = {code: {"description": why, "content": error} for code, why in ERROR_CODES.items()}
    operation: dict[str, Any] = {
        "summary": text.strip().partition("\n")[0],
        "responses": {
            "200": {
                "description": "The answer.",
                "content": content | (_EVENTS if is_generation else {}),
            },
            **refusals,
        },
    }
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
    names = re.findall(r"{(\w+)}", path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    return operation
