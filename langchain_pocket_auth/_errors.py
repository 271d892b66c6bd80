"""
Every error of the package. Each branch says who has to act.

```text
PocketAuthError
├── ConfigurationError            the developer: fix code or settings
│   ├── UnknownProvider           no such provider or handler
│   ├── MissingClient             an app registration is not set
│   ├── OwnerUnknown              nothing says whose session this is
│   ├── GateRequired              this place of a graph cannot pause safely
│   └── CallbackServerError       the callback server cannot listen
├── AuthorizationRequired         the person: open `.url` and agree
├── AuthorizationRefused          the person said no, here or at the provider
├── ScopeWithheld                 the person agreed to less than the tool needs
├── AlreadyResumed                another run continues this pause (in `_task`)
├── FutureNotFound                nobody waits for this consent (any more)
├── CallbackRefused               an answer that does not belong to its attempt
├── RedactedContext               a context that came out of a dump has no secret
├── ProviderError                 the provider answered with an error
│   ├── TokenRequestError         the token endpoint refused: `.code`, `.status`
│   ├── GrantRevoked              the grant is gone: consent is needed again
│   └── ProviderUnavailable       network, 5xx, 429: retry after `.retry_after_s`
└── StorageError                  the operator
    ├── StorageUnavailable        the store does not answer; nothing is lost
    └── CredentialUnreadable      a record does not open: key, tampering, type
```

No message of these holds a secret, a state or a link.
"""

from __future__ import annotations


class PocketAuthError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(PocketAuthError):
    """Code or settings are wrong; the text names the remedy."""


class UnknownProvider(ConfigurationError, LookupError):  # noqa: N818 - names of DESIGN
    """No provider or handler of that name is known."""


class MissingClient(ConfigurationError):  # noqa: N818
    """The app is not registered for a provider; the text names the setting."""


class OwnerUnknown(ConfigurationError):  # noqa: N818
    """Nothing trustworthy says whose session is meant."""


class GateRequired(ConfigurationError):  # noqa: N818
    """A pause here could hand its answer to another tool; add the gate."""


class CallbackServerError(ConfigurationError):
    """The callback server cannot listen at its address."""


class AuthorizationRequired(PocketAuthError):  # noqa: N818 - a pause, not a failure
    """
    The person has to connect an account first.

    Attributes:
        url: The connect link for the person's browser, or `None` before
            `prepare`. It is not in the text: texts reach models and logs.
        provider: The provider's id.
        scopes: The scopes that are needed.
    """

    def __init__(
        self,
        message: str,
        *,
        provider: str,
        scopes: tuple[str, ...] = (),
        url: str | None = None,
    ) -> None:
        super().__init__(message)
        self.provider = provider
        self.scopes = scopes
        self.url = url


class AuthorizationRefused(PocketAuthError):  # noqa: N818
    """The person refused, at the provider or in the chat."""


class ScopeWithheld(PocketAuthError):  # noqa: N818
    """The person agreed, but to less than the tool needs."""


class FutureNotFound(PocketAuthError, ValueError):  # noqa: N818
    """No consent of that uid is being waited for."""


class CallbackRefused(PocketAuthError):  # noqa: N818
    """
    An answer does not belong to the attempt it names.

    Attributes:
        reason: A word for the page that is shown: `unknown`, `expired`, `replayed`,
            `mismatch`, `malformed`; where persons are told apart also `sign_in`
            (nobody is signed in), `wrong_person` (somebody else is),
            `wrong_account` (the app does not take it), `too_many` (clicks at once).
        account: Whose account the app does not take, where the provider told.
    """

    def __init__(self, reason: str, *, account: str | None = None) -> None:
        super().__init__(f"the authorization answer was refused: {reason}")
        self.reason, self.account = reason, account


class RedactedContext(PocketAuthError):  # noqa: N818
    """A context restored from a dump holds no secrets; ask `PocketAuth` again."""


class ProviderError(PocketAuthError):
    """A provider did not do what was asked of it."""

    def __init__(self, message: str, *, provider: str) -> None:
        super().__init__(message)
        self.provider = provider


class TokenRequestError(ProviderError):
    """
    A token endpoint refused (RFC 6749 section 5.2).

    Attributes:
        code: The `error` of the answer, or `invalid_response`.
        status: The HTTP status.
    """

    def __init__(self, message: str, *, provider: str, code: str, status: int) -> None:
        super().__init__(message, provider=provider)
        self.code = code
        self.status = status


class GrantRevoked(ProviderError):  # noqa: N818
    """The grant is no longer good; the person has to consent again."""


class ProviderUnavailable(ProviderError):  # noqa: N818
    """
    No usable answer: network, timeout, 5xx, 429. The session is kept.

    Attributes:
        retry_after_s: Seconds the provider asked to wait, or `None`.
        lost: Whether the answer was lost on the way: the request may have counted.
    """

    def __init__(
        self,
        message: str,
        *,
        provider: str,
        retry_after_s: float | None = None,
        lost: bool = False,
    ) -> None:
        super().__init__(message, provider=provider)
        self.retry_after_s = retry_after_s
        self.lost = lost


class StorageError(PocketAuthError):
    """The store or what is in it; the operator has to act."""


class StorageUnavailable(StorageError):  # noqa: N818
    """The store does not answer. Never read this as "no session"."""


class CredentialUnreadable(StorageError):  # noqa: N818
    """A stored record does not open; it is kept as it is."""
