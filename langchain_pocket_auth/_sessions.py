"""Sessions as the spec uses them: asked for, waited for, listed, ended."""

from __future__ import annotations

from typing import Any

from ._accounts import Accounts
from ._errors import OwnerUnknown
from ._models import (
    AuthContext,
    AuthenticateRequest,
    AuthState,
    Owner,
    Requirement,
    SessionKey,
)
from ._owner import OwnerLike, owner_of
from ._registry import provider_id
from ._vault import Session, Stored, handler_name
from .handlers import AuthHandlerInterface


class Sessions(Accounts):
    """The spec's methods."""

    def make_request(
        self,
        auth_scopes: list[str] | None = None,
        auth_handler_name: str | None = None,
        auth_provider: str | None = None,
        **kwargs: Any,
    ) -> AuthenticateRequest:
        """
        Make a request of the handler that is meant.

        Raises:
            ConfigurationError: Unknown handler, or the app is not registered.
        """
        handler = self.find_handler_instance(auth_handler_name, auth_provider)
        return handler.make_request(auth_scopes, **kwargs)

    def find_handler_instance(
        self, name: str | None = None, auth_provider: str | None = None
    ) -> AuthHandlerInterface:
        """
        Return a handler by name, or the default one of a provider.

        Raises:
            UnknownProvider: There is none.
            ValueError: Neither is named.
        """
        if name is not None:
            return self._service.registry.named(name)
        if auth_provider is not None:
            return self._service.registry.of(self._plain(auth_provider))[0]
        raise ValueError("name a handler or a provider")

    async def check(
        self,
        auth_req: AuthenticateRequest,
        auth_handler_name: str | None = None,
        auth_provider: str | None = None,
        thread_id: str = "default",
        profile: str = "default",
        *,
        owner: OwnerLike = None,
    ) -> AuthState:
        """Return how a request stands; changes nothing."""
        asked = self._asked(auth_req, auth_handler_name, auth_provider, profile)
        who = self._owner(thread_id, owner)
        if self._service.peek_request(who, asked, auth_req) is not None:
            return AuthState.SKIP_AUTH
        writes = self._service.writes
        standing = await self._service.ask(lambda e: e.standing(who, asked, auth_req))
        if standing.state is AuthState.SKIP_AUTH and standing.session:
            self._service.keep(who, asked, standing.session, writes)
        return standing.state

    async def prepare(
        self,
        auth_req: AuthenticateRequest,
        auth_handler_name: str | None = None,
        auth_provider: str | None = None,
        thread_id: str = "default",
        profile: str = "default",
        *,
        owner: OwnerLike = None,
    ) -> str | None:
        """
        Return the connect link for the person, or `None` if none is needed.

        However often it is called, there is one link until it is used or over.

        Raises:
            ConfigurationError: A setting is wrong; raised before any link.
        """
        asked = self._asked(auth_req, auth_handler_name, auth_provider, profile)
        who = self._owner(thread_id, owner)
        consent = await self._service.ask(
            lambda e: e.prepare(who, asked, request=auth_req)
        )
        return None if consent is None else consent.url

    async def authenticate(
        self,
        auth_req: AuthenticateRequest,
        auth_handler_name: str | None = None,
        auth_provider: str | None = None,
        thread_id: str = "default",
        profile: str = "default",
        *,
        owner: OwnerLike = None,
        timeout: float = 300.0,  # noqa: ASYNC109 - the spec's waiting time, in seconds
    ) -> AuthContext:
        """
        Return the context; waits at most *timeout* seconds for a prepared consent.

        Raises:
            AuthorizationRequired: Nothing was prepared, or not finished in time.
            AuthorizationRefused: The person said no.
            ProviderUnavailable: The token is over and cannot be renewed now.
        """
        asked = self._asked(auth_req, auth_handler_name, auth_provider, profile)
        who = self._owner(thread_id, owner)
        context = self._service.peek_request(who, asked, auth_req)
        if context is not None:
            return context
        writes = self._service.writes
        session = await self._service.ask(
            lambda e: e.authenticate(who, asked, request=auth_req, timeout_s=timeout)
        )
        return self._service.keep(who, asked, session, writes)

    authenticate_async = authenticate

    async def get_auth_context(
        self,
        auth_provider: str,
        thread_id: str = "default",
        profile: str = "default",
        *,
        owner: OwnerLike = None,
    ) -> AuthContext | None:
        """Return the stored context of a provider, fresh or not; `None`: no session."""
        who, provider = self._owner(thread_id, owner), self._plain(auth_provider)
        for key, stored, _ in await self._service.ask(
            lambda e: e.connections.sessions(who)
        ):
            if (key.provider, key.profile) == (provider, profile):
                return self._service.for_tool(Requirement(provider), stored)
        return None

    async def list_session_state(
        self,
        thread_id: str = "default",
        auth_provider: str | None = None,
        *,
        owner: OwnerLike = None,
    ) -> list[dict[str, Any]]:
        """
        Return an owner's sessions, each with the keys below.

        `provider`, `handler`, `profile`, `account` (where the provider told whose it
        is), `scope` (what was granted), `state` and `expires_at` (of the token).
        """
        who = self._owner(thread_id, owner)
        wanted = None if auth_provider is None else self._plain(auth_provider)
        return [
            {
                "provider": key.provider,
                "handler": handler_name(stored),
                "profile": key.profile,
                "account": stored.entry.account,
                "scope": list(stored.entry.scopes),
                "state": state,
                "expires_at": stored.entry.auth_context().expires_at,
            }
            for key, stored, state in await self._service.ask(
                lambda e: e.connections.sessions(who)
            )
            if wanted in {None, key.provider}
        ]

    async def delete_session(
        self,
        auth_provider: str,
        thread_id: str = "default",
        profile: str = "default",
        *,
        auth_handler_name: str | None = None,
        owner: OwnerLike = None,
    ) -> bool:
        """Forget a connection: here at once, and revoke it at the provider."""
        who, provider = self._owner(thread_id, owner), self._plain(auth_provider)
        return await self._service.ask(
            lambda e: e.delete(who, provider, profile, auth_handler_name)
        )

    async def _sessions_of(
        self, owner: Owner
    ) -> list[tuple[SessionKey, Stored[Session], AuthState]]:
        return await self._service.ask(lambda e: e.connections.sessions(owner))

    def _asked(
        self,
        request: AuthenticateRequest,
        handler: str | None,
        provider: str | None,
        profile: str,
    ) -> Requirement:
        if provider is None:
            provider = provider_id(self.find_handler_instance(handler))
        scopes = tuple(request.auth_scopes or ())
        return Requirement(self._plain(provider), scopes, handler, profile)

    def _owner(self, thread_id: str, owner: OwnerLike) -> Owner:
        if owner is not None:
            return owner_of(owner)
        if thread_id == "default" and self._service.site.asks_who:
            # The spec's default: one conversation that everybody would share.
            raise OwnerUnknown(
                "many use this PocketAuth: say whose connection is meant, with owner= "
                "or thread_id="
            )
        return Owner("thread", thread_id)
