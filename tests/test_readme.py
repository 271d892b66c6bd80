"""The README is run: every Python block, in order, with a local GitHub."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import call, free_port, says
from langchain_core.messages import HumanMessage

import langchain_pocket_auth._catalog as catalog
from langchain_pocket_auth import PocketAuth
from langchain_pocket_auth._seal import new_key
from langchain_pocket_auth.testing import AuthorizationServer, Browser, ScriptedModel

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL
)


@pytest.fixture
def github(
    server: AuthorizationServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Put a local server in GitHub's place; return the base URL of the callbacks."""
    base = f"http://127.0.0.1:{free_port()}"
    server.register(
        client_id="client id",
        client_secret="client secret",
        redirect_uris=[f"{base}/auth/github/oauth2/callback"],
        scopes=["repo"],
        token_endpoint_auth_method="client_secret_post",
    )
    row = catalog._sections(catalog.BUNDLED)["github"].replace(
        "https://github.com/login/oauth/authorize", server.authorization_endpoint
    )
    row = row.replace(
        "https://github.com/login/oauth/access_token", server.token_endpoint
    )
    row = row.replace("https://api.github.com", server.api)
    assert row.count("https://github.com") == 1  # of the device flow
    rows = tmp_path / "providers.toml"
    rows.write_text(row)
    monkeypatch.setattr(catalog, "BUNDLED", rows)
    monkeypatch.setenv("POCKET_AUTH_BASE_URL", base)
    monkeypatch.setenv("POCKET_AUTH_STORAGE", f"sqlite:///{tmp_path}/sessions.db")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return base


async def _run(block: str, names: dict[str, Any]) -> None:
    code = compile(block, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if result is not None:
        await result


async def test_every_block_of_the_readme_does_what_it_says(
    server: AuthorizationServer, github: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader who copies the blocks in order gets the issues of the repository."""
    script = [says(call("list_issues", repo="acme/app"))]
    names: dict[str, Any] = {
        "model": ScriptedModel(script=script),
        "read_keys": new_key,
    }
    pockets: list[PocketAuth] = []
    for block in BLOCKS:
        text = block.replace("/repos/{repo}/issues", "/issues")
        text = text.replace("answer.json()", "answer.json()['issues']")
        if "resume(result)" in text:
            before, after = text.split("result = await agent.ainvoke(resume(", 1)
            await _run(before, names)
            page = await Browser("alice").avisit(names["pending"].url)
            assert "GitHub is connected" in page.text
            await _run("result = await agent.ainvoke(resume(" + after, names)
            assert names["result"]["messages"][-1].text == "done"
        else:
            await _run(text, names)
        if (pocket := names.get("pocket")) not in pockets and pocket is not None:
            pockets.append(pocket)
    tool_results = [m for m in names["result"]["messages"] if m.type == "tool"]
    assert [m.status for m in tool_results] == ["success"]
    assert tool_results[0].text
    assert "/connect/" in capsys.readouterr().out
    # The same conversation in the hand-built graph: nothing is asked again.
    graph_result = await names["graph"].ainvoke(
        {"messages": [("user", "and again?")]}, {"configurable": {"thread_id": "2"}}
    )
    assert "__interrupt__" not in graph_result
    assert graph_result["messages"][-1].text == "done"
    messages = await names["flow"].ainvoke(
        [HumanMessage("and again?")], {"configurable": {"thread_id": "3"}}
    )
    assert [m.type for m in messages] == ["human", "ai", "tool"]
    assert messages[-1].text == tool_results[0].text
    assert set(names["guarded"].args) == {"url"}
    for pocket in pockets:
        await pocket.aclose()


def test_readme_names_every_command_and_stays_short() -> None:
    """Every console command is in the README, which fits on a few screens."""
    text = README.read_text()
    assert 'python -m pip install -e ".[demo]" && pocket-auth demo' in text
    assert 'python -m pip install -e ".[test]" && python -m pytest' in text
    assert len(text.splitlines()) <= 400
