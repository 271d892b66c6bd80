"""Sessions as an app uses them: asked for, waited for, listed, deleted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._models import (
    AuthContext,
    AuthenticateRequest,
    AuthState,
    Owner,
    Requirement,
)
from ._owner import OwnerLike, owner_of
from ._registry import provider_id
from ._resume import PendingAuthorization
from ._service import Service
from ._tools import InjectedAuth
from ._vault import handler_name
from .handlers import AuthHandlerInterface


class Sessions:
    """The spec's methods, and connecting ahead of time."""

    _service: Service

    async def wait_connected(
        self,
        provider: str,
        *,
        scopes: Iterable[str] = (),
        handler: str | None = None,
        profile: str = "default",
        owner: OwnerLike = None,
        timeout: float = 300.0,  # noqa: ASYNC109 - as in `authenticate`, in seconds
    ) -> AuthContext:
        """
        Wait until there is a connection, whoever asks for it; return its context.

        Raises:
            AuthorizationRequired: None came within *timeout* seconds.
            AuthorizationRefused: The person said no meanwhile.
            ScopeWithheld: The person agreed, but to less.
        """
        need = InjectedAuth(provider, scopes=scopes, handler=handler, profile=profile)
        who, asked = self._service.owners.outside_runs(owner), need.requirement
        writes = self._service.writes
        session = await self._service.ask(
            lambda e: e.wait_connected(who, asked, timeout_s=timeout)
        )
        return self._service.keep(who, asked, session, writes)

    async def connect(
        self,
        provider: str | PendingAuthorization,
        *,
        scopes: Iterable[str] = (),
        handler: str | None = None,
        profile: str = "default",
        owner: OwnerLike = None,
        timeout: float = 300.0,  # noqa: ASYNC109 - as in `authenticate`, in seconds
        paste: bool = False,
        device: bool = False,
    ) -> AuthContext:
        """
        Ask the person for a connection ahead of time; return its context.

        In a notebook the link is shown as a card, elsewhere it is printed. Nothing is
        shown when there is a connection already.

        Args:
            provider: The provider's id, or what a paused run waits for.
            scopes: What is needed there.
            handler: Name of a handler; by default the provider's first.
            profile: Which account of the owner.
            owner: Whose; by default the one that `PocketAuth(owner=)` names, or
                the person of this machine.
            timeout: How many seconds to wait; pasting waits for the person.
            paste: For kernels and machines whose 127.0.0.1 the person's browser does
                not reach: the provider's page is shown, the browser ends at an address
                that does not load, and that address is asked for, unseen. Only an
                answer to this very question is taken.
            device: For terminals and kernels far away, where the provider can: the
                person types a short code on any machine (RFC 8628).

        Raises:
            ConfigurationError: A setting is wrong, or the provider has no device flow.
            AuthorizationRequired: The person did not finish in time.
            AuthorizationRefused: The person said no.
            ScopeWithheld: The person agreed, but to less.
            CallbackRefused: What was pasted does not answer this question.
            ProviderError: The exchange failed; call again.
        """
        from .notebook import Connecting

        if isinstance(provider, PendingAuthorization):
            pending, ticket = provider, provider.url.rpartition("/")[2]
            _, key = await self._service.ask(lambda e: e.attempts.ticket(ticket))
            who, scopes, handler = key.owner, pending.scopes, pending.handler
            provider, profile = pending.provider, pending.profile
        else:
            who = self._service.owners.outside_runs(owner)
        need = InjectedAuth(provider, scopes=scopes, handler=handler, profile=profile)
        asked = need.requirement
        connecting = Connecting(self._service, who, asked)
        await connecting.run(paste=paste, device=device, timeout_s=timeout)
        return await self.wait_connected(
            provider,
            scopes=asked.scopes,
            handler=handler,
            profile=profile,
            owner=who,
            timeout=0,
        )

    # ------------------------------------------------------------- the spec's methods

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
        who = _owner(thread_id, owner)
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
        who = _owner(thread_id, owner)
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
        who = _owner(thread_id, owner)
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
        who, provider = _owner(thread_id, owner), self._plain(auth_provider)
        for key, stored, _ in await self._service.ask(lambda e: e.sessions(who)):
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
        who = _owner(thread_id, owner)
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
            for key, stored, state in await self._service.ask(lambda e: e.sessions(who))
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
        who, provider = _owner(thread_id, owner), self._plain(auth_provider)
        return await self._service.ask(
            lambda e: e.delete(who, provider, profile, auth_handler_name)
        )

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

    def _plain(self, provider: Any) -> str:
        plain = str(getattr(provider, "value", provider))
        return self._service.registry.canonical(plain)


def _owner(thread_id: str, owner: OwnerLike) -> Owner:
    return Owner("thread", thread_id) if owner is None else owner_of(owner)
