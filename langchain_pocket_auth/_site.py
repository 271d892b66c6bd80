"""Where the app is reached by browsers, and who is behind a browser that comes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from ._models import AuthContext, Owner

VerifyUser: TypeAlias = Callable[..., Any]
"""A FastAPI dependency that returns the signed-in user: an id, an `Owner`, `None`."""
AccountMatcher: TypeAlias = Callable[[Owner, AuthContext], bool | Awaitable[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """
    The address of connect links and callbacks, and how persons are told apart.

    Attributes:
        url: Where it is, without a trailing slash. Redirect URIs come from here and
            from no request.
        public: Whether others than the person of this machine reach it.
        verify_user: Says who is signed in; compared with whom a link is for.
        confirm: `"code"`: whoever consented reads a code back into the chat.
        account_matcher: Whether an account may be linked for an owner.
    """

    url: str
    public: bool = False
    verify_user: VerifyUser | None = None
    confirm: Literal["code"] | None = None
    account_matcher: AccountMatcher | None = None

    @property
    def asks_who(self) -> bool:
        """Whether a person has to be known, so that there is no default owner."""
        return self.public or self.verify_user is not None or self.confirm is not None


@dataclass(frozen=True, slots=True, repr=False)
class Visitor:
    """
    Whoever came with a request, as far as it is known.

    Attributes:
        person: The signed-in user, if `verify_user` named one.
        browser: Digest of the browser's cookie; `None` where none is used.
        trusted: The app itself acts, no browser: nothing is compared.
    """

    person: Owner | None = None
    browser: str | None = None
    trusted: bool = False


THE_APP: Final = Visitor(trusted=True)
