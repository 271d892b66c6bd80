"""Which handlers there are: own ones first, then those of catalog rows."""

from __future__ import annotations

from collections.abc import Iterable

from ._catalog import Catalog, Client, register_id
from ._errors import ConfigurationError, UnknownProvider
from ._http import Http
from ._models import Requirement
from .handlers import AuthHandlerInterface, OAuth2Handler
from .handlers._oauth2 import Registration


class Registry:
    """Finds handlers by name or provider; makes those of rows on demand."""

    def __init__(
        self,
        catalog: Catalog,
        handlers: Iterable[AuthHandlerInterface | type[AuthHandlerInterface]],
        *,
        base_url: str,
        clients: dict[str, Client],
    ) -> None:
        self._catalog, self._clients = catalog, clients
        self._base_url, self._http = base_url, Http()
        self._by_name: dict[str, AuthHandlerInterface] = {}
        self._rows: dict[str, AuthHandlerInterface | None] = {}
        for entry in handlers:
            handler = self._bound(entry() if isinstance(entry, type) else entry)
            if handler.name in self._by_name:
                raise ConfigurationError(f"two handlers are named {handler.name!r}")
            self._by_name[handler.name] = handler

    async def close(self) -> None:
        """Close the connections to providers."""
        await self._http.close()

    @property
    def own(self) -> list[AuthHandlerInterface]:
        """The handlers that were passed in."""
        return list(self._by_name.values())

    def label(self, provider: str) -> str:
        """Return a provider's name for people."""
        row = self._catalog.find(provider)
        return row.label if row else provider

    def environment_keys(self, provider: str) -> tuple[str, ...]:
        """Return the keys of `AuthContext.to_dict`."""
        if row := self._catalog.find(provider):
            return row.environment_keys
        return (f"{provider.upper().replace('-', '_')}_TOKEN",)

    def of(self, provider: str) -> list[AuthHandlerInterface]:
        """
        Return the handlers of a provider, the default first.

        Raises:
            UnknownProvider: There is none.
        """
        own = [h for h in self.own if provider_id(h) == provider]
        row = self._of_row(provider)
        if own and row and provider not in self._clients:
            row = None  # replaced by the app's own: it is not registered for the row
        found = [*own, *([row] if row and row.name not in self._by_name else [])]
        if not found:
            self._catalog.get(provider)
        return sorted(found, key=lambda h: not h.provider_default())

    def named(self, name: str) -> AuthHandlerInterface:
        """
        Return the handler of that name.

        Raises:
            UnknownProvider: There is none.
        """
        if handler := self._by_name.get(name):
            return handler
        row = self._of_row(name.removesuffix("-oauth2"))
        if row is None or row.name != name:
            raise UnknownProvider(
                f"no handler {name!r}: pass it as PocketAuth(handlers=[...])"
            )
        return row

    def candidates(self, requirement: Requirement) -> list[AuthHandlerInterface]:
        """Return the handlers whose sessions may serve *requirement*, best first."""
        if requirement.handler is None:
            return self.of(requirement.provider)
        handler = self.named(requirement.handler)
        if provider_id(handler) != requirement.provider:
            raise ConfigurationError(
                f"{handler.name!r} is a handler of {provider_id(handler)!r}, not of "
                f"{requirement.provider!r}"
            )
        return [handler]

    def _of_row(self, provider: str) -> AuthHandlerInterface | None:
        if provider not in self._rows:
            row = self._catalog.find(provider)
            self._rows[provider] = self._bound(OAuth2Handler.of(row)()) if row else None
        return self._rows[provider]

    def _bound(self, handler: AuthHandlerInterface) -> AuthHandlerInterface:
        provider = register_id(handler.provider())
        if isinstance(handler, OAuth2Handler):
            client = self._clients.get(provider)
            handler.bind(Registration(self._base_url, client, self._http))
        return handler


def provider_id(handler: AuthHandlerInterface) -> str:
    """Return the plain id of a handler's provider."""
    provider = handler.provider()
    return str(getattr(provider, "value", provider))
