"""Whatever is sent to our routes: no 5xx, no echo, nothing lost."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import anyio
import httpx
import pytest
import schemathesis
from conftest import provider
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from support import BOUND_S, KEYS, answer_url, connect, deliver, link, query_of, state

from langchain_pocket_auth import Form, FormField, PocketAuth, Provider
from langchain_pocket_auth.testing import AuthorizationServer, Browser
from langchain_pocket_auth.testing._outside import outside

Make = Callable[..., PocketAuth]

TEXT = {"schema": {"type": "string"}}
HEADERS = ["Origin", "Sec-Fetch-Site", "Sec-Purpose", "Cookie", "X-Forwarded-Host"]
HEADERS += ["X-Forwarded-For", "Forwarded", "Content-Type"]


def operation(names: tuple[str, ...], query: tuple[str, ...], body: bool) -> Any:
    """Return an OpenAPI operation that takes anything."""
    parameters = [{"name": n, "in": "path", "required": True, **TEXT} for n in names]
    parameters += [{"name": n, "in": "query", **TEXT} for n in query]
    parameters += [{"name": n, "in": "header", **TEXT} for n in HEADERS]
    anything = {
        "type": "object",
        "properties": {n: {"type": "string"} for n in FIELDS},
        "additionalProperties": {"type": "string"},
    }
    kinds = ("application/x-www-form-urlencoded", "application/json", "text/plain")
    content = {kind: {"schema": anything} for kind in kinds}
    described: dict[str, Any] = {"parameters": parameters, "responses": {"200": {}}}
    return described | ({"requestBody": {"content": content}} if body else {})


FIELDS = ("account", "attempt", "token", "finish", "connection", "action", "state")
ANSWER = ("state", "code", "error", "error_description", "iss", "scope")
PATHS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "/connect/{ticket}": (("ticket",), ()),
    "/connections": ((), ("connection",)),
    "/auth/{provider}/{method}/callback": (("provider", "method"), ANSWER),
    "/auth/{provider}/{method}/form": (("provider", "method"), ("state",)),
}
OPENAPI = {
    "openapi": "3.1.0",
    "info": {"title": "routes of a pocket", "version": "1"},
    "paths": {
        path: {
            method: operation(names, query, method in {"post", "put"})
            for method in ("get", "post", "put", "delete", "patch", "head", "options")
        }
        for path, (names, query) in PATHS.items()
    },
}
CASES = st.one_of(
    found.ok().as_strategy()
    for found in schemathesis.openapi.from_dict(OPENAPI).get_all_operations()
)


def test_every_route_is_fuzzed(pocket: PocketAuth) -> None:
    """A route that is new has to be described here."""
    routes = (route for route in pocket.router.routes if isinstance(route, Route))
    assert {route.path.rstrip("/") for route in routes} == PATHS.keys()


# schemathesis replaces strategies of hypothesis-jsonschema.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@pytest.mark.timeout(60)
def test_no_request_breaks_the_server_or_is_echoed(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Odd requests get pages of ours, and the person's own answer still counts."""
    typed = Provider(
        id="typed", token=Form(fields={"token": FormField(label="Key", secret=True)})
    )
    pocket = make_pocket(providers=[provider(server, "beta"), typed], keys=KEYS)

    async def prepared() -> tuple[str, str, str, str]:
        await pocket.serve()
        await connect(pocket, alice, "other")
        url, form = await link(pocket, "read"), await link(pocket, provider="typed")
        asked = await deliver(form, method="POST")
        callback = await answer_url(alice, url)
        return url, callback, asked.headers["location"], form

    url, callback, form, typed_url = anyio.run(prepared)
    tickets = [each.rpartition("/")[2] for each in (url, typed_url)]
    states = [query_of(callback)["state"], query_of(form)["state"]]
    before = dict(server.token_requests)

    with outside(), httpx.Client(base_url=pocket.base_url, timeout=BOUND_S) as http:

        @settings(
            max_examples=120,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=CASES, live=st.integers(0, 3), data=st.data())
        def fuzz(case: schemathesis.Case, live: int, data: st.DataObject) -> None:
            path, query = dict(case.path_parameters or {}), dict(case.query or {})
            if live & 1:  # half of the requests are about something that is there
                path["ticket"] = data.draw(st.sampled_from(tickets))
                names = st.sampled_from(["acme", "zeta", "beta", "typed", "github"])
                path["provider"] = data.draw(names)
                path["method"] = data.draw(st.sampled_from(["oauth2", "token"]))
            if live & 2 and "state" in query:
                query["state"] = data.draw(st.sampled_from(states))
                if query.get("error") == "access_denied":  # the right answer, by chance
                    query["error"] = "other"
            where = {name: quote(str(value), safe="") for name, value in path.items()}
            sent = {k: v for k, v in (case.headers or {}).items() if v.isascii()}
            shape = {
                k: v for k, v in sent.items() if v.isprintable() and v == v.strip()
            }
            body = case.body if isinstance(case.body, dict) else None
            kind = "json" if case.media_type == "application/json" else "data"
            answer = http.request(
                case.method,
                case.path.format(**where),
                params=query,
                headers=shape,
                **({kind: body} if body else {}),
            )
            assert answer.status_code < 500, (answer.status_code, case.path)
            page = html.unescape(answer.text)
            texts = [*query.values(), *shape.values(), *(body or {}).values()]
            for text in map(str, texts):
                assert len(text) < 8 or text not in page, case.path

        fuzz()
    assert dict(server.token_requests) == before

    async def still_works() -> None:
        assert await state(pocket, "other") == "SKIP_AUTH"
        assert (await deliver(await link(pocket, "read"))).status_code == 200

    anyio.run(still_works)
