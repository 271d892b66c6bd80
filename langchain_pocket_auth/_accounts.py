"""Accounts as an app uses them: connected ahead of time, listed, ended, forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._connections import Connection, Forgotten
from ._models import AuthContext, Owner
from ._owner import OwnerLike, owner_of
from ._resume import PendingAuthorization
from ._service import Service
from ._tools import InjectedAuth
from ._vault import digest


class Accounts:
    """What an app does with the accounts of its users, outside of runs."""

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
            ConfigurationError: A setting is wrong, or the provider has no device flow;
                with `public_url`, *paste*, and *device* unless the app's
                `Client(device_in_public=True)` allows it.
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

    async def confirm(
        self,
        pending: PendingAuthorization | str,
        code: str,
        *,
        owner: OwnerLike = None,
    ) -> bool:
        """
        Take the code that a person read on the page and gave in the chat.

        For `PocketAuth(confirm="code")` where no run is resumed with it (see `resume`).
        Spaces, dashes and case do not count. After five wrong codes the grant is given
        back, and the link has to be opened anew.

        Args:
            pending: What is waited for, its key, or a link that `prepare` returned.
            code: As the person wrote it.
            owner: Whose chat it came from: only their own connection is confirmed.
                `None`: the app has seen to that.

        Returns:
            Whether it is connected now. `False`: that was not the code, or nothing
            waits for one.

        Raises:
            StorageError: It could not be stored, and is given back.
        """
        key = pending.key if isinstance(pending, PendingAuthorization) else pending
        if "/" in key:
            key = digest(key.rpartition("/")[2])
        who = None if owner is None else owner_of(owner)
        return await self._service.ask(lambda e: e.confirm(who, key, code))

    # ----------------------------------------------------------------- connections

    async def connections(self, owner: OwnerLike = None) -> list[Connection]:
        """
        Return an owner's connections, without their secrets.

        One whose record does not open is listed, too, so that it can be disconnected.
        The app's own sessions (client credentials, service accounts) are those of
        `Owner("app", "app")`.

        Args:
            owner: Whose; by default the one that `PocketAuth(owner=)` names, or the
                person of this machine.

        Raises:
            OwnerUnknown: Nothing says whose.
            StorageUnavailable: The store does not answer.
        """
        who = self._service.owners.outside_runs(owner)
        return await self._service.ask(lambda e: e.connections.of(who))

    async def disconnect(
        self,
        connection: Connection | str,
        *,
        profile: str | None = None,
        owner: OwnerLike = None,
    ) -> bool:
        """
        End connections: forgotten here at once, then revoked at the provider.

        A provider that does not answer is told later. What is not there, or is
        another owner's, is left as it is.

        Args:
            connection: One of `connections()`, its id, or a provider's id: all of
                the owner's there.
            profile: Only this one of the owner's accounts.
            owner: Whose; by default as for `connections`.

        Returns:
            Whether there was one.

        Raises:
            OwnerUnknown: Nothing says whose.
            StorageUnavailable: The store does not answer.
        """
        if isinstance(connection, Connection):
            name, owner = connection.id, connection.owner if owner is None else owner
        else:
            name = self._plain(connection)
        who = self._service.owners.outside_runs(owner)
        return await self._service.ask(lambda e: e.disconnect(who, name, profile))

    async def forget(self, owner: Owner | str) -> Forgotten:
        """
        Erase all that is kept of an owner (GDPR article 17), and revoke the grants.

        Gone are connections, connect links, attempts, and what paused runs know of
        the owner: a consent that is under way stores nothing any more. What a
        provider is yet to be told stays, sealed, until it was told; a click in this
        very second may leave a sealed attempt for a day, which leads nowhere. It
        looks at every open link and pause of the store: seconds in a large one.

        What is outside of this library is yours to erase: checkpoints with messages
        and links, traces, and the logs, in which the erasure itself is told.

        Raises:
            StorageUnavailable: The store does not answer; call again.
        """
        who = owner_of(owner)
        return await self._service.ask(lambda e: e.connections.forget(who))

    def _plain(self, provider: Any) -> str:
        plain = str(getattr(provider, "value", provider))
        return self._service.registry.canonical(plain)
