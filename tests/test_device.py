"""Connecting from a terminal far from any browser: the device flow (RFC 8628)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import ACME, provider
from support import BOUND_S, state, token, until

from langchain_pocket_auth import (
    AuthorizationRefused,
    AuthorizationRequired,
    ConfigurationError,
    PocketAuth,
    ProviderError,
    TokenRequestError,
)
from langchain_pocket_auth._http import Answer
from langchain_pocket_auth.handlers._device import (
    DeviceCode,
    device_code_of,
    polled,
)
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    assert_no_leak,
    free_port,
)

ROW = {
    "id": "acme",
    "display_name": "Acme",
    "authorization_endpoint": "https://acme.test/authorize",
    "token_endpoint": "https://acme.test/token",
    "device_authorization_endpoint": "https://acme.test/device",
}


def row(**facts: Any) -> Any:
    from langchain_pocket_auth import Provider

    return Provider(**ROW | facts)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.at, self.slept = datetime(2026, 1, 1, tzinfo=UTC), []

    def now(self) -> datetime:
        return self.at

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at += timedelta(seconds=seconds)


def says(body: str, status: int = 400) -> Answer:
    return Answer(status, body.encode(), None)


def error(code: str) -> Answer:
    return says(f'{{"error": "{code}"}}')


TOKEN = says('{"access_token": "at", "token_type": "bearer"}', 200)
LOST = ProviderError("no answer", provider="acme")


async def poll(
    *answers: Answer | Exception, interval_s: float = 5, lives_s: float = 900
) -> tuple[Time, Any]:
    """Poll a server that gives these answers; return the clock and what came out."""
    time, left = Time(), iter(answers)
    code = DeviceCode(
        "CODE", "https://acme.test/d", None, time.at + timedelta(seconds=lives_s),
        interval_s, "secret",
    )  # fmt: skip

    async def ask() -> Answer:
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        result: Any = await polled(row(), code, ask, now=time.now, sleep=time.sleep)
    except Exception as raised:  # noqa: BLE001 - looked at by the test
        result = raised
    assert list(left) == [], "it stopped asking too early"
    return time, result


def unavailable() -> Exception:
    from langchain_pocket_auth import ProviderUnavailable

    return ProviderUnavailable("no answer", provider="acme", lost=True)


@pytest.mark.parametrize(
    ("answers", "slept"),
    [
        (["authorization_pending"] * 2, [5, 5, 5]),
        (["slow_down", "authorization_pending"], [5, 10, 10]),
        (["slow_down", "slow_down", "authorization_pending"], [5, 10, 15, 15]),
        (["lost", "lost", "authorization_pending"], [5, 10, 20, 20]),
        (["lost"] * 5, [5, 10, 20, 40, 60, 60]),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
async def test_questions_are_as_far_apart_as_the_server_wants(
    answers: list[str], slept: list[float]
) -> None:
    """The interval grows by 5 s for good when told so, and doubles without answers."""
    given = [unavailable() if a == "lost" else error(a) for a in answers]
    time, result = await poll(*given, TOKEN)
    assert result["access_token"] == "at"
    assert time.slept == slept


@pytest.mark.parametrize(
    ("answer", "raised"),
    [
        ("access_denied", AuthorizationRefused),
        ("expired_token", AuthorizationRequired),
        ("invalid_client", ConfigurationError),
        ("unauthorized_client", ConfigurationError),
        ("invalid_grant", TokenRequestError),
    ],
)
async def test_nothing_is_asked_after_a_final_answer(
    answer: str, raised: type[Exception]
) -> None:
    """A refusal ends it at once, each with its own error."""
    time, result = await poll(error("authorization_pending"), error(answer))
    assert type(result) is raised
    assert time.slept == [5, 5]


async def test_code_that_ran_out_is_not_asked_about() -> None:
    """After `expires_in` the server is left alone, whatever it would say."""
    pending = [error("authorization_pending")] * 3
    time, result = await poll(*pending, lives_s=20)
    assert type(result) is AuthorizationRequired
    assert time.slept == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("body", "interval_s"),
    [
        ('"expires_in": 900', 5.0),
        ('"expires_in": 900, "interval": 7', 7.0),
        ('"expires_in": 900, "interval": "2"', 2.0),
        ('"expires_in": 900, "interval": 0', 5.0),
        ('"expires_in": 900, "interval": null', 5.0),
    ],
)
def test_interval_is_five_seconds_unless_said(body: str, interval_s: float) -> None:
    """A server may leave the interval out (section 3.2)."""
    text = (
        '{"device_code": "d", "user_code": "U", '
        f'"verification_uri": "https://acme.test/d", {body}}}'
    )
    code = device_code_of(row(), says(text, 200), datetime.now(UTC))
    assert code.interval_s == interval_s
    assert "'d'" not in repr(code)


@pytest.mark.parametrize(
    "uri", ["http://acme.test/d", "javascript:alert(1)", "file:///etc/passwd"]
)
def test_person_is_not_sent_to_an_insecure_page(uri: str) -> None:
    """The page must be https, because a person signs in there."""
    text = f'{{"device_code": "d", "user_code": "U", "verification_uri": "{uri}"}}'
    with pytest.raises(ConfigurationError, match="https"):
        device_code_of(row(), says(text, 200), datetime.now(UTC))


def test_google_s_older_name_of_the_page_is_read() -> None:
    """Google answers `verification_url`, as before the RFC."""
    text = (
        '{"device_code": "d", "user_code": "U", "verification_url": "https://g.test/d"}'
    )
    code = device_code_of(row(), says(text, 200), datetime.now(UTC))
    assert code.verification_uri == "https://g.test/d"


# ---------------------------------------------------------------- through PocketAuth


@pytest.fixture
def far(server: AuthorizationServer) -> Iterator[PocketAuth]:
    """A pocket whose provider has the device flow, on a server that is quick."""
    server.device_interval_s = 0.05
    base = f"http://127.0.0.1:{free_port()}"
    server.register(
        client_id=ACME[0],
        client_secret=ACME[1],
        redirect_uris=[f"{base}/auth/acme/oauth2/callback"],
    )
    acme = provider(
        server,
        "acme",
        device_authorization_endpoint=server.device_authorization_endpoint,
    )
    pocket = PocketAuth(
        "memory://", base_url=base, providers=[acme], clients={"acme": ACME}
    )
    yield pocket
    pocket.close()


async def shown(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return address and code, as soon as they are printed."""
    text = ""

    async def printed() -> bool:
        nonlocal text
        text += capsys.readouterr().out
        return "code " in text

    await until(printed)
    found = re.search(r"Open (\S+) on any machine\.\n2\. Type the code (\S+) ", text)
    assert found, text
    return found[1], found[2]


async def test_person_agrees_on_another_machine(
    far: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A code is shown, typed elsewhere, and the session is stored and refreshable."""
    waiting = asyncio.ensure_future(
        far.connect("acme", scopes=["read"], device=True, timeout=BOUND_S)
    )
    url, code = await shown(capsys)
    await asyncio.to_thread(alice.approve_device, url, code)
    context = await waiting
    assert context.scopes == ["read"]
    assert await state(far, "read") == "SKIP_AUTH"
    assert (await token(far, "read")).access_token == context.access_token
    assert_no_leak(
        [*server.issued_access_tokens, *server.issued_refresh_tokens],
        capsys.readouterr().out,
    )


async def test_paused_run_s_question_is_answered_by_code(
    far: PocketAuth, alice: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """The link that is out already counts as answered."""
    request = far.make_request(["read"], auth_provider="acme")
    assert await far.prepare(request, auth_provider="acme")
    waiting = asyncio.ensure_future(far.connect("acme", scopes=["read"], device=True))
    await asyncio.to_thread(alice.approve_device, *await shown(capsys))
    await waiting
    assert await far.prepare(request, auth_provider="acme") is None


async def test_refusal_elsewhere_is_a_refusal_here(
    far: PocketAuth, alice: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """Denied on the other machine: the error says so, and nothing is stored."""
    waiting = asyncio.ensure_future(far.connect("acme", device=True, timeout=BOUND_S))
    url, code = await shown(capsys)
    await asyncio.to_thread(lambda: alice.approve_device(url, code, approve=False))
    with pytest.raises(AuthorizationRefused):
        await waiting
    assert await state(far) == "NO_SESSION"


async def test_waiting_for_the_other_machine_ends(
    far: PocketAuth, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody types the code: the call ends in time, and the next shows another."""
    with pytest.raises(AuthorizationRequired, match=r"within 0\.5 seconds"):
        await far.connect("acme", device=True, timeout=0.5)
    _, first = await shown(capsys)
    with pytest.raises(AuthorizationRequired):
        await far.connect("acme", device=True, timeout=0.5)
    assert (await shown(capsys))[1] != first


async def test_provider_without_the_flow_says_what_to_do(
    make_pocket: Callable[..., PocketAuth],
) -> None:
    """There is no endpoint in the row: a sentence, and no code."""
    with pytest.raises(ConfigurationError, match="without device=True"):
        await make_pocket().connect("acme", device=True)
