"""Which handlers there are: own ones first, then those of catalog rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ._catalog import Catalog
from ._errors import ConfigurationError, UnknownProvider
from ._http import Http
from ._models import Requirement
from ._providers import register_id
from ._rows import Client, Provider
from .handlers import AuthHandlerInterface
from .handlers._of_rows import handlers_of
from .handlers._row import Memory, Registration, RowHandler


class Registry:
    """
    Finds handlers by name or provider; makes those of rows on demand.

    Args:
        catalog: The rows.
        handlers: The app's own.
        base_url: Where callbacks arrive.
        clients: The app's registrations by provider.
        app_name: What registrations that it makes itself are called.
    """

    def __init__(
        self,
        catalog: Catalog,
        handlers: Iterable[AuthHandlerInterface | type[AuthHandlerInterface]],
        *,
        base_url: str,
        clients: Mapping[str, Client],
        app_name: str | None = None,
    ) -> None:
        self.catalog, self._base_url = catalog, base_url
        self._clients = {self.canonical(name): value for name, value in clients.items()}
        self._http, self._app_name = Http(), app_name
        self._memory = Remembered()
        self._by_name: dict[str, AuthHandlerInterface] = {}
        self._rows: dict[str, list[AuthHandlerInterface]] = {}
        for entry in handlers:
            handler = self._bound(entry() if isinstance(entry, type) else entry)
            if handler.name in self._by_name:
                raise ConfigurationError(f"two handlers are named {handler.name!r}")
            self._by_name[handler.name] = handler

    async def close(self) -> None:
        """Close the connections to providers."""
        await self._http.close()

    def remember_in(self, memory: Memory) -> None:
        """Say where clients that are registered by themselves are remembered."""
        self._memory.store = memory

    @property
    def own(self) -> list[AuthHandlerInterface]:
        """The handlers that were passed in."""
        return list(self._by_name.values())

    @property
    def clients(self) -> Mapping[str, Client]:
        """The app's registrations by provider."""
        return self._clients

    def canonical(self, provider: str) -> str:
        """Return the id behind an alias; other ids as they are."""
        return self.catalog.canonical(provider)

    def label(self, provider: str) -> str:
        """Return a provider's name for people."""
        row = self.catalog.find(provider)
        return row.label if row else provider

    def of(self, provider: str) -> list[AuthHandlerInterface]:
        """
        Return the handlers of a provider, the default first.

        Raises:
            UnknownProvider: There is none.
        """
        provider = self.canonical(provider)
        own = [h for h in self.own if provider_id(h) == provider]
        rows = [h for h in self._of_row(provider) if h.name not in self._by_name]
        if own and provider not in self._clients:
            rows = []  # replaced by the app's own: it is not registered for the row
        if not own and not rows:
            row = self.catalog.get(provider)
            raise UnknownProvider(
                f"{row.label} {row.unsupported}: pass a handler of your own in "
                "PocketAuth(handlers=[...])"
            )
        # Stable: of several defaults an own one comes first. A key in the settings
        # counts before a default that the app is not registered for.
        found = sorted([*own, *rows], key=lambda h: not h.provider_default())
        client = self._clients.get(provider)
        if client and not client.client_id:
            found.sort(key=lambda h: not h.unattended)
        return found

    def named(self, name: str) -> AuthHandlerInterface:
        """
        Return the handler of that name.

        Raises:
            UnknownProvider: There is none.
        """
        if handler := self._by_name.get(name):
            return handler
        # An own row may call its handler anything.
        for provider in (*self.catalog.own, *self._providers_of(name)):
            for handler in self._of_row(provider):
                if handler.name == name:
                    return handler
        raise UnknownProvider(
            f"no handler {name!r}: pass it as PocketAuth(handlers=[...])"
        )

    @staticmethod
    def _providers_of(name: str) -> Iterable[str]:
        # "google-service-account-keypair" is of google_service_account, and
        # "basicauth" of the provider of that name.
        yield name
        parts = name.split("-")
        for end in range(len(parts) - 1, 0, -1):
            yield "-".join(parts[:end])
            yield "_".join(parts[:end])

    def candidates(self, requirement: Requirement) -> list[AuthHandlerInterface]:
        """Return the handlers whose sessions may serve *requirement*, best first."""
        if requirement.handler is None:
            return self.of(requirement.provider)
        handler = self.named(requirement.handler)
        if provider_id(handler) != self.canonical(requirement.provider):
            raise ConfigurationError(
                f"{handler.name!r} is a handler of {provider_id(handler)!r}, not of "
                f"{requirement.provider!r}"
            )
        return [handler]

    def _of_row(self, provider: str) -> list[AuthHandlerInterface]:
        if provider not in self._rows:
            row: Provider | None = self.catalog.find(provider)
            if row is None:
                return []  # not remembered: anybody can ask for any name
            made = handlers_of(row)
            self._rows[provider] = [self._bound(kind()) for kind in made]
        return self._rows[provider]

    def _bound(self, handler: AuthHandlerInterface) -> AuthHandlerInterface:
        provider = register_id(handler.provider())
        if isinstance(handler, RowHandler):
            handler.bind(
                Registration(
                    self._base_url,
                    self._clients.get(provider),
                    self._http,
                    self._app_name,
                    self._memory,
                )
            )
        return handler


class Remembered:
    """A memory that is told later where to remember: the store opens late."""

    store: Memory | None = None

    async def recall(self, name: str) -> dict[str, Any] | None:
        """Return what was remembered under a name, or `None`."""
        return await self.store.recall(name) if self.store else None

    async def remember(self, name: str, data: dict[str, Any]) -> None:
        """Remember *data* under a name."""
        if self.store:
            await self.store.remember(name, data)


def provider_id(handler: AuthHandlerInterface) -> str:
    """Return the plain id of a handler's provider."""
    provider = handler.provider()
    return str(getattr(provider, "value", provider))
