"""The page that describes the routes, made of the service's own OpenAPI description."""

import json
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

PAGE = Template(Path(__file__).with_name("docs.html").read_text(encoding="utf-8"))
TYPES = {"string": "text", "array": "list", "integer": "whole number", "null": "null"}


def docs_page(openapi: Mapping[str, Any], address: str) -> str:
    """The page.

    Args:
        openapi: `FastAPI.openapi()`.
        address: where the service is reached, with a slash at its end.
    """
    schemas = openapi.get("components", {}).get("schemas", {})
    routes = ""
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            command = f"curl -s {shlex.quote(address.rstrip('/') + path)}"
            asked = _schema(route.get("requestBody", {}), schemas)
            if example := asked.get("example"):
                body = shlex.quote(json.dumps(example, indent=2))
                command += f" -H 'Content-Type: application/json' -d {body}"
            routes += (
                f"<section><h2>{method.upper()} {escape(path)}</h2>"
                f"<p>{escape(route.get('description', ''))}</p>"
                f'<pre tabindex="0">{escape(command)}</pre>'
                f"{_fields('Request', asked)}"
            )
            for status, answer in route["responses"].items():
                heading = f"Answer {status}: {answer['description']}"
                routes += _fields(heading, _schema(answer, schemas))
            routes += "</section>"
    return PAGE.substitute(title=escape(openapi["info"]["title"]), routes=routes)


def _schema(message: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a request or an answer, empty where it has none."""
    schema = message.get("content", {}).get("application/json", {}).get("schema", {})
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _fields(heading: str, schema: Mapping[str, Any]) -> str:
    needed = schema.get("required", ())
    rows = "".join(
        f"<dt><code>{escape(name)}</code> {escape(_type(field))}"
        f"{'' if name in needed else ', may be left out'}</dt>"
        f"<dd>{escape(field.get('description', ''))}</dd>"
        for name, field in schema.get("properties", {}).items()
    )
    return rows and f"<h3>{escape(heading)}</h3><dl>{rows}</dl>"


def _type(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    kind = TYPES.get(schema.get("type", ""), schema.get("type", "anything"))
    if "items" not in schema:
        return kind
    item = _type(schema["items"])
    return f"{kind} of ({item})" if " or " in item else f"{kind} of {item}"
