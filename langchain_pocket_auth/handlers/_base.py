"""The interface that every way of authenticating implements (the spec's)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

from .._models import AuthContext, AuthenticateRequest, Choice
from .._placement import BEARER, Placed


class AuthHandlerInterface(ABC):
    """
    One way of authenticating at one provider.

    `prepare`, `authenticate` and `refresh` are the spec's. A subclass with its
    own callback endpoint names it in `router`; it is served below `/auth`.

    Attributes:
        name: Name of the handler, such as `github-oauth2`.
        description: What it does, for people.
        scoped: Whether scopes limit what its sessions may do.
        router: A FastAPI `APIRouter` with an own callback, or `None`.
    """

    name: str
    description: str
    scoped: bool
    router: Any = None

    @staticmethod
    def provider() -> Any:
        """Return the provider: an `AuthProvider`, or its id."""
        raise NotImplementedError

    @staticmethod
    def provider_default() -> bool:
        """Whether this handler is meant when only the provider is named."""
        return False

    @staticmethod
    def recommended_scopes() -> set[str]:
        """Return the scopes that are asked for when a tool names none."""
        return set()

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> AuthenticateRequest:
        """
        Make the request, with the app's registration in it.

        Raises:
            ConfigurationError: A setting is missing; raised before any link.
        """
        raise NotImplementedError

    def prepare(
        self,
        auth_req: AuthenticateRequest,
        thread_id: str,
        profile: str,
        future_uid: str,
        *args: Any,
        **kwargs: Any,
    ) -> str | Awaitable[str]:
        """
        Return the provider's page for one attempt: called when a person clicks.

        Args:
            auth_req: What `make_request` made, with the scopes to ask for.
            thread_id: The owner's id.
            profile: Which account of the owner.
            future_uid: The attempt's uid: use it as `state`.
            args: Nothing today.
            kwargs: `future`, the attempt's `FutureData`.
        """
        raise NotImplementedError

    @abstractmethod
    async def authenticate(
        self, auth_req: AuthenticateRequest, future_uid: str, *args: Any, **kwargs: Any
    ) -> AuthContext:
        """Exchange the person's answer, found in the resolved future."""
        raise NotImplementedError

    # Not abstract: the spec calls it optional for handlers whose sessions last.
    async def refresh(
        self,
        auth_req: AuthenticateRequest,
        context: AuthContext,
        *args: Any,
        **kwargs: Any,
    ) -> AuthContext:
        """
        Renew *context* without the person.

        Raises:
            GrantRevoked: The person has to consent again.
            ProviderUnavailable: Retry later; the session is kept.
        """
        raise NotImplementedError

    # -- beyond the spec: what the engine asks, with answers that fit any handler

    posts_callback: ClassVar[bool] = False
    """Whether the answer arrives as a form that the browser posts."""

    attempt_ttl: ClassVar[timedelta] = timedelta(minutes=10)
    """How long an attempt waits for its answer; half an hour at most."""

    @property
    def unattended(self) -> bool:
        """Whether `authenticate` needs no person: nobody is asked, nothing pauses."""
        return False

    def connection(self) -> str:
        """Canonical name of what a session of this handler belongs to."""
        return self.name

    def read_callback(self, parameters: Mapping[str, str]) -> Any:
        """
        Return what a callback brings for `authenticate`; `None`: nothing usable.

        Raises:
            CallbackRefused: The callback is not the provider's.
        """
        return parameters.get("code")

    def choices(self, context: AuthContext) -> Sequence[Choice]:  # noqa: ARG002
        """Return the accounts between which the person has to choose."""
        return ()

    def chosen(self, context: AuthContext, choice: str) -> AuthContext:  # noqa: ARG002
        """Return *context* for the account of that id."""
        return context

    def placement(self, context: AuthContext) -> Placed:
        """Return where API calls take the credential of *context*."""
        return Placed(BEARER, {"token": context.access_token})

    def environment(self) -> dict[str, str]:
        """Return the keys of `AuthContext.to_dict`, with what each stands for."""
        provider = self.provider()
        name = str(getattr(provider, "value", provider)).upper().replace("-", "_")
        return {f"{name}_TOKEN": "access_token"}

    def secrets(self, context: AuthContext) -> tuple[str, ...]:
        """Return what is masked in all that tools return and raise."""
        return (context.access_token,)

    def missing_scopes(
        self, granted: Collection[str], needed: Collection[str]
    ) -> list[str]:
        """Return which of *needed* are not covered by *granted*, in order."""
        return [s for s in needed if s not in granted] if self.scoped else []

    def can_refresh(self, context: AuthContext) -> bool:  # noqa: ARG002
        """Whether `refresh` can be tried with *context*."""
        return type(self).refresh is not AuthHandlerInterface.refresh

    def check_issuer(
        self,
        issuer: str | None,  # noqa: ARG002
        data: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> bool:
        """Whether an answer's `iss` is right for an attempt's *data* (RFC 9207)."""
        return True

    def can_revoke(self, context: AuthContext) -> bool:  # noqa: ARG002
        """Whether `revoke` can be tried with *context*."""
        return type(self).revoke is not AuthHandlerInterface.revoke

    async def revoke(self, auth_req: AuthenticateRequest, context: AuthContext) -> bool:  # noqa: ARG002
        """
        Withdraw the grant at the provider.

        Returns:
            Whether it is withdrawn; `False`: it cannot be, do not try again.

        Raises:
            Exception: Try again later, of a `ProviderUnavailable` not before its
                `retry_after_s`.
        """
        return False
