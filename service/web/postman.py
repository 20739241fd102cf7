"""``python -m service.web.postman``: the OpenAPI document as a Postman collection (2.1), on standard output.

Its variables ``base_url``, ``token``, ``client_id`` and ``client_secret`` are for whoever imports it to fill in; the
access token is put into ``access_token`` by a test script of the token request, so the others work after that one.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from service.web.openapi import document

Node = dict[str, Any]

_VARIABLES: Final = {
    "base_url": "http://127.0.0.1:8080", "token": "", "client_id": "", "client_secret": "", "access_token": "",
}  # fmt: skip

_BODIES: Final = {
    "requestVoucher": {
        "request_id": "{{$guid}}", "distributor_id": "DIST-001", "terminal_id": "AT-998877", "product_ids": ["PAY"],
    },
    "issueVouchers": {"quantity": 1},
}  # fmt: skip

_PATH_VALUES: Final = {"code": "MAMVDDMMYY01", "id": "{{voucher_id}}"}

_KEEP_TOKEN: Final = 'pm.collectionVariables.set("access_token", pm.response.json().access_token);'
_KEEP_VOUCHER: Final = 'pm.collectionVariables.set("voucher_id", pm.response.json().vouchers[0].voucher_id);'
_KEPT: Final = {"getToken": _KEEP_TOKEN, "issueVouchers": _KEEP_VOUCHER}


def collection() -> Node:
    """The collection: a folder for each API, a request for each operation."""
    described = document(client_api=True, scope_prefix="")
    folders: dict[str, list[Node]] = {tag["name"]: [] for tag in described["tags"]}
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            folders[operation["tags"][0]].append(_item(path, method.upper(), operation))
    return {
        "info": {
            "name": "voucherd",
            "description": described["info"]["description"],
            "schema": "https://schema.getpostman.com/json/collection/v2.1.0/collection.json",
        },
        "variable": [{"key": key, "value": value} for key, value in {**_VARIABLES, "voucher_id": ""}.items()],
        "item": [{"name": name, "item": items} for name, items in folders.items()],
    }


def _item(path: str, method: str, operation: Node) -> Node:
    name = operation["operationId"]
    parameters = operation.get("parameters", [])
    segments = [segment[1:-1] if segment.startswith("{") else segment for segment in path.strip("/").split("/")]
    in_path = {parameter["name"] for parameter in parameters if parameter["in"] == "path"}
    query = [parameter["name"] for parameter in parameters if parameter["in"] == "query"]
    headers = [
        {"key": parameter["name"], "value": "{{$guid}}"}
        for parameter in parameters
        if parameter["in"] == "header" and parameter["required"]
    ]
    url: Node = {
        "raw": "{{base_url}}" + path.replace("{", ":").replace("}", "") + "".join(f"?{one}=" for one in query),
        "host": ["{{base_url}}"],
        "path": [f":{segment}" if segment in in_path else segment for segment in segments],
        "variable": [{"key": one, "value": _PATH_VALUES[one]} for one in sorted(in_path)],
        "query": [{"key": one, "value": _PATH_VALUES[one]} for one in query],
    }
    request: Node = {
        "method": method, "header": headers, "url": url, "auth": _auth(operation["security"]),
        "description": operation["summary"],
    }  # fmt: skip
    if name in _BODIES:
        request["body"] = {"mode": "raw", "raw": json.dumps(_BODIES[name]), "options": {"raw": {"language": "json"}}}
    elif name == "getToken":
        request["body"] = {"mode": "urlencoded", "urlencoded": [{"key": "grant_type", "value": "client_credentials"}]}
    item: Node = {"name": operation["summary"], "request": request}
    if name in _KEPT:
        item["event"] = [{"listen": "test", "script": {"type": "text/javascript", "exec": [_KEPT[name]]}}]
    return item


def _auth(security: list[Node]) -> Node:
    if not security:
        return {"type": "noauth"}
    if "secret" in security[0]:
        pair = {"username": "{{client_id}}", "password": "{{client_secret}}"}
        return {"type": "basic", "basic": [{"key": key, "value": value} for key, value in pair.items()]}
    variable = "{{token}}" if "token" in security[0] else "{{access_token}}"
    return {"type": "bearer", "bearer": [{"key": "token", "value": variable}]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(collection(), indent=2) + "\n")
