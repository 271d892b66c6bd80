"""No secret anywhere: canaries from every step, looked for in every place."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from conftest import ACME, call, says
from langchain.agents import create_agent
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver

from langchain_pocket_auth import (
    AuthContext,
    InjectedAuth,
    PocketAuth,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    LeakWatch,
    ScriptedModel,
)

Acme = Annotated[AuthContext, InjectedAuth("acme", scopes=["read"])]


def tools(server: AuthorizationServer) -> list[Any]:
    """Return tools that treat their token as badly as tools do."""

    @tool
    def good(acme: Acme) -> str:
        """Use the token as it should be."""
        headers = {"Authorization": f"Bearer {acme.access_token}"}
        return str(httpx.get(f"{server.api}/me", headers=headers).json()["sub"])

    @tool
    def blabs(acme: Acme) -> str:
        """Answer with the token, the context and everything in it."""
        return f"{acme.access_token} {acme} {acme!r} {acme.model_dump()} {dict(acme)}"

    @tool
    def breaks(acme: Acme) -> str:
        """Fail with the token in the error."""
        try:
            {}[f"bad key {acme.access_token}"]
        except KeyError as error:
            raise RuntimeError(f"cannot use {acme.access_token!r} {acme!r}") from error

    @tool
    def typed(count: int, acme: Acme) -> str:
        """Be called with an argument that is no number."""
        return f"{count}"

    return [good, blabs, breaks, typed]


def handle(error: Exception) -> str:
    """Tell the model what went wrong, as apps do."""
    return f"failed: {error!r}"


@pytest.mark.parametrize("fault", ["none", "denied", "exchange", "refresh"])
def test_no_secret_shows_anywhere(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    tmp_path: Path,
    fault: str,
) -> None:
    """Tokens, codes, state, verifier and client secret stay where they belong."""
    server.access_token_ttl_s = 2
    store, checkpoints = tmp_path / "sessions.db", tmp_path / "checkpoints.db"
    keys = "k:" + "A" * 43
    pocket = make_pocket(f"sqlite:///{store}", keys=keys)
    script = [
        says(call("good"), call("blabs"), call("breaks"), call("typed", count="x")),
        says(call("good", "again")),
    ]
    from langchain.agents.middleware import ToolRetryMiddleware

    retry = ToolRetryMiddleware(max_retries=0, on_failure="continue")
    secrets = [ACME[1]]
    seen: list[Any] = []
    with LeakWatch() as watch, SqliteSaver.from_conn_string(str(checkpoints)) as saver:
        agent = create_agent(
            ScriptedModel(script=script),
            tools(server),
            middleware=[pocket.middleware(), retry],
            checkpointer=saver,
        )
        config: Any = {
            "configurable": {"thread_id": "1"},
            "callbacks": watch.callbacks,
        }
        result = agent.invoke({"messages": [("user", "go")]}, config)
        [pending] = pending_authorizations(result)
        seen += [result, pending, pocket]

        person = Browser("alice")
        if fault == "exchange":
            server.fault("error200")
            answer = person.authorize(pending.url)
            seen.append(person.open(answer).text)
        answer = person.authorize(pending.url, approve=fault != "denied")
        query = parse_qs(urlsplit(answer).query)
        secrets += query["state"] + query.get("code", [])
        attempt = pocket._service.run_sync(
            pocket._service.call(lambda e: e.attempts.find(query["state"][0]))
        )
        secrets.append(attempt.entry.data["code_verifier"])
        page = person.open(answer)
        seen += [page.text, str(page.headers)]
        seen.append(person.open(page.headers["location"]).text)

        if fault == "refresh":
            server.fault(500, times=3, grant_type="refresh_token")
        if fault != "denied":
            time.sleep(2.1)  # the token's lifetime: the next use refreshes
            server.access_token_ttl_s = 3600  # however slow the machine is now
        result = agent.invoke(resume(result), config)
        seen += [result, list(saver.list(config)), agent.get_state(config)]
        texts = {m.tool_call_id: m.text for m in result["messages"] if m.type == "tool"}
        if fault in {"none", "exchange"}:
            assert texts["call-good"] == texts["again"] == "alice"
            assert "***" in texts["call-blabs"]
            assert "cannot use" in texts["call-breaks"]
            assert server.token_requests["refresh_token"] == 1
        else:
            assert "not run" in texts["call-good"]

    secrets += server.issued_codes
    secrets += server.issued_access_tokens
    secrets += server.issued_refresh_tokens
    pocket.close()
    assert store.stat().st_size
    watch.assert_clean(secrets, *seen, files=[store, checkpoints])
