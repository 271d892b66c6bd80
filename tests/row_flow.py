"""One app, one person and one provider of the row server, and all they do."""

from __future__ import annotations

import importlib
import pkgutil
import re
from datetime import datetime, timedelta
from typing import Any, Self

import httpx
import pytest
from row_server import FRAGMENT, Case, RowServer, ec_key, pem, rsa_key
from support import KEYS, Clock, outcome_of

from langchain_pocket_auth import (
    AuthContext,
    Client,
    Owner,
    PocketAuth,
    Provider,
    handlers,
)
from langchain_pocket_auth._placement import placeholders
from langchain_pocket_auth.testing import Browser, free_port
from langchain_pocket_auth.testing._navigation import Navigation
from langchain_pocket_auth.testing._outside import outside

# Everything that a request could spoil by encoding it once too often, or too little.
SECRET = "s3cr:%2B t%+ &=/~"
TYPED = "k%2B+&=/~"
# Tried in this order: the first that fits a variable's pattern.
VALUES = [
    "acme.example.com",
    "acme-1",
    "acme1",
    "accounts.zoho.com",
    "datadoghq.com",
    "v24.0",
    "eu",
]
FORMS = {
    "email": "ann@example.com",
    "client_email": "robot@acme.iam.example.com",
    "subject": "ann@example.com",
    "scopes": "https://www.googleapis.com/auth/drive.readonly",
    "account": "acme-eu1",
    "user": "ann",
    "url": "https://acme.example.com",
    "endpoint": "https://acme.example.com",
    "project_url": "abc.supabase.co",
    "app_id": "123456",
    "installation_id": "7890",
    "network": "eth-mainnet",
}


class Person(Browser):
    """A person whose browser runs the scripts that read an address's fragment."""

    def _load(self, to: Navigation) -> httpx.Response:
        self._http.headers[FRAGMENT] = to.url.partition("#")[2]
        return super()._load(to)


class EverywhereClock(Clock):
    """The time in all handlers too, which may use more of `datetime` than `now`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        for module in pkgutil.iter_modules(handlers.__path__, f"{handlers.__name__}."):
            if hasattr(importlib.import_module(module.name), "datetime"):
                monkeypatch.setattr(f"{module.name}.datetime", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(datetime, name)


def variables_of(row: Provider) -> dict[str, str]:
    """Return values for the variables, other than the defaults where that fits."""
    found = {}
    for name, variable in row.variables.items():
        if variable.callback_parameter and variable.default:
            found[name] = variable.default  # the callback will say another
        else:
            fit = (v for v in VALUES if re.fullmatch(variable.pattern, v))
            found[name] = next(fit)
    return found


def scopes_of(row: Provider, method: str) -> list[str]:
    """Return what a tool asks for: two at least, or no separator would show."""
    if not row.scoped or method not in {"oauth2", "client_credentials"}:
        return []
    # Snowflake's role is a scope with a variable part.
    scopes = [s.replace("{role}", "ANALYST") for s in row.recommended_scopes]
    if row.id == "google":
        scopes = ["openid", "email", "profile", "https://www.googleapis.com/auth/drive"]
    if row.scope_implies:  # of which an answer lists the widest only
        wide, narrow = next(iter(row.scope_implies.items()))
        scopes = [wide, *narrow]
    more = ["first.thing", "second:thing"]
    return scopes + more[: max(0, 2 - len({*scopes, *row.required_scopes}))]


def typed_for(row: Provider, method: str) -> dict[str, str]:
    """Return what a person types into each field of a form."""
    if (form := row.form(method)) is None:
        return {}
    return {
        name: pem(rsa_key()).strip()
        if field.multiline
        else FORMS.get(name, f"{TYPED}{name}" if field.secret else f"v-{name}")
        for name, field in form.fields.items()
    }


class Flow:
    """
    An app with one row, at a server that demands what the row says.

    Args:
        server: The server.
        row: What the server demands.
        method: Which of its ways.
        believes: The row that the app has, if it is another one.
        scopes: What the app's tool asks for; default: what the server expects.
    """

    def __init__(
        self,
        server: RowServer,
        row: Provider,
        method: str,
        *,
        believes: Provider | None = None,
        scopes: list[str] | None = None,
    ) -> None:
        base = f"http://127.0.0.1:{free_port()}"
        self.row, self.handler = row, row.handler_name(method)
        self.who = {"auth_handler_name": self.handler, "auth_provider": row.id}
        self.case: Case = server.case(
            row,
            method,
            redirect_uri=f"{base}/auth/{row.id}/oauth2/callback",
            client_id=f"app:{row.id}+1",
            client_secret=SECRET,
            variables=variables_of(row),
            scopes=scopes_of(row, method),
            typed=typed_for(row, method),
        )
        self._scopes = self.case.scopes if scopes is None else scopes
        self.person = Person("ann", fields=self.case.typed)
        self.pocket = PocketAuth(
            "memory://",
            keys=KEYS,
            base_url=base,
            providers=[self.case.rewritten(believes)],
            clients={row.id: self._client()} if self._needs_app else {},
            session_cache_ttl=timedelta(0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.person.close()
        await self.pocket.aclose()

    @property
    def _needs_app(self) -> bool:
        return self.case.method in {"oauth2", "client_credentials"}

    def _client(self) -> Client:
        row, case = self.row, self.case
        facts: dict[str, Any] = {"client_id": case.client_id, **case.variables}
        named = placeholders(*row.api_headers.values(), *row.api_query.values())
        if row.token_endpoint_auth_method != "none" or "client_secret" in named:
            facts["client_secret"] = case.client_secret
        if row.id == "apple":  # it signs its secret
            del facts["client_secret"]
            case.variables |= {"team_id": "TEAM123456", "key_id": "KEY1234567"}
            facts |= {**case.variables, "private_key": pem(ec_key())}
        return Client(**facts)

    # ------------------------------------------------------------------ what is done

    def request(self) -> Any:
        """Return the request of a tool."""
        return self.pocket.make_request(self._scopes, **self.who)

    async def connect(self) -> str:
        """Let the person connect; return what the last page tells."""
        url = await self.pocket.prepare(self.request(), **self.who)
        assert url is not None
        page = self.person.visit(url)
        return outcome_of(page) or f"status {page.status_code}"

    async def auth(self) -> AuthContext:
        """Return what a tool gets, without waiting for anybody."""
        return await self.pocket.authenticate(self.request(), timeout=0, **self.who)

    async def state(self) -> str:
        """Return the name of the state."""
        return (await self.pocket.check(self.request(), **self.who)).name

    def call(self, auth: AuthContext, path: str = "api") -> int:
        """Call the provider's API with a context; return the status."""
        origin = self.case.origin
        if (form := self.case.form) and form.api_credential.url:
            # The credential is in the path: where the call goes follows from it.
            origin, path = origin.rpartition("/")[0], "getMe"
        with outside():
            request = auth.apply(
                self.person._http.build_request("GET", f"{origin}/{path}")
            )
            return self.person._http.send(request).status_code

    async def disconnect(self) -> bool:
        """Forget the connection."""
        owner = (
            Owner("app", "app") if self.case.method == "client_credentials" else None
        )
        return await self.pocket.delete_session(
            self.row.id, auth_handler_name=self.handler, owner=owner
        )
