"""What all handlers of catalog rows share: names, settings, URLs, placement."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self
from urllib.parse import urlencode
from weakref import WeakKeyDictionary

from .._errors import ConfigurationError
from .._http import Http
from .._models import AuthContext
from .._placement import Placed, fill
from .._providers import AuthProvider
from .._row_parts import Form
from .._rows import Client, Method, Provider
from ._base import AuthHandlerInterface


class Memory(Protocol):
    """Remembers, sealed, what an app got to know: its registered clients."""

    async def recall(self, name: str) -> dict[str, Any] | None: ...
    async def remember(self, name: str, data: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Registration:
    """What the app brings: where callbacks arrive, its client, its HTTP client."""

    base_url: str
    client: Client | None
    http: Http
    app_name: str | None = None
    memory: Memory | None = None
    _locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = field(
        default_factory=WeakKeyDictionary
    )

    @property
    def registering(self) -> asyncio.Lock:
        """Held while the app registers itself; a forked child has a loop of its own."""
        return self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())


class RowHandler(AuthHandlerInterface):
    """
    A way of authenticating that a row describes.

    Attributes:
        row: The facts.
        method: Which of the row's ways this is.
        registration: What the app brings; set by `PocketAuth`.
        members: What the app's registration has to hold in place of a secret.
    """

    row: ClassVar[Provider]
    method: ClassVar[Method]
    registration: Registration | None = None
    members: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if row := vars(cls).get("row"):
            cls.name = vars(cls).get("name", row.handler_name(cls.method))
            cls.description = vars(cls).get("description", cls._described(row))
            cls.scoped = cls._is_scoped(row)

    @classmethod
    def of(cls, row: Provider, method: Method) -> type[Self]:
        """Return the handler class of a row's method."""
        title = re.sub(r"\W", "", row.label.title()) or row.id
        kind = method.replace("_", " ").title().replace(" ", "")
        facts = {"row": row, "method": method, "__module__": cls.__module__}
        return type(f"{title}{kind}Handler", (cls,), facts)

    @classmethod
    def _described(cls, row: Provider) -> str:
        return f"Connects {row.label} accounts."

    @classmethod
    def _is_scoped(cls, row: Provider) -> bool:
        del row
        return False

    def bind(self, registration: Registration) -> None:
        """Receive what `PocketAuth` knows and the row does not."""
        self.registration = registration

    # `type(self).row` is what the spec's static methods read in a hand-written class.
    @classmethod
    def provider(cls) -> AuthProvider:
        return AuthProvider(cls.row.id)

    @classmethod
    def provider_default(cls) -> bool:
        return cls.row.methods[:1] == (cls.method,)

    # ------------------------------------------------------- what the engine asks

    def connection(self) -> str:
        """The handler, and the tenant where there is one."""
        values = self._variables(strict=False)
        used = {k: v for k, v in values.items() if k in self._tenant}
        used |= self._resource
        return f"{self.name}?{urlencode(sorted(used.items()))}" if used else self.name

    @property
    def _resource(self) -> dict[str, str]:
        """The parameter that says what tokens are for (RFC 8707), if the row does."""
        return {"resource": self.row.resource} if self.row.resource else {}

    @property
    def _tenant(self) -> set[str]:
        """Variables that tell one server from another; a callback's do not."""
        row = self.row
        return {
            name
            for name, variable in row.variables.items()
            if variable.callback_parameter is None and name != "user_agent"
        }

    def placement(self, context: AuthContext) -> Placed:
        """Return where API calls take the credential of *context*."""
        spec = self._api
        return Placed(
            spec.api_credential,
            self._values(context),
            spec.api_headers,
            spec.api_query,
            spec.api_base_url or self.row.api_base_url,
        )

    @property
    def _api(self) -> Provider | Form:
        return self.row

    def _values(self, context: AuthContext) -> dict[str, str]:
        client = self._registration.client
        values = self._variables(strict=False)
        values |= {"token": context.access_token}
        if client:
            values["client_id"] = client.client_id
            if client.client_secret:
                values["client_secret"] = client.client_secret.get_secret_value()
        return values

    # ------------------------------------------------------------------ settings

    @property
    def _registration(self) -> Registration:
        if self.registration is None:
            raise ConfigurationError(
                f"{self.name} is not bound: pass it as PocketAuth(handlers=[...])"
            )
        return self.registration

    @property
    def _setting(self) -> str:
        """What the names of this provider's settings begin with."""
        return f"POCKET_AUTH_CLIENTS__{self.row.id.upper()}__"

    def _variables(
        self, *, strict: bool, learned: Mapping[str, Any] | None = None
    ) -> dict[str, str]:
        """Return the values of the row's variables: learned, the app's, or default."""
        client = self._registration.client
        given = client.variables if client else {}
        # Of what answers tell, only what a pattern bounds decides where requests go.
        given |= {
            name: (learned or {})[name]
            for name, variable in self.row.variables.items()
            if variable.callback_parameter and name in (learned or {})
        }
        values = {}
        for name, variable in self.row.variables.items():
            value = given.get(name, variable.default)
            if value is not None and re.fullmatch(variable.pattern, str(value)):
                values[name] = str(value)
            elif strict:
                fits = f"does not fit {variable.pattern}"
                wrong = "is not set" if value is None else fits
                raise ConfigurationError(
                    f"{self.row.label} needs {name} ({variable.description}), which "
                    f"{wrong}: set {self._setting}{name.upper()}"
                )
        return values

    def _url(self, template: str, learned: Mapping[str, Any] | None = None) -> str:
        """
        Return an endpoint with its variables filled in.

        Raises:
            ConfigurationError: One is missing, or does not fit its pattern.
        """
        if "{" not in template:
            return template
        return fill(template, self._variables(strict=True, learned=learned))
