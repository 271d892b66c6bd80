"""LangChain and LangGraph agents that act for their end users."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._connections import Connection, ConnectionHealth, Forgotten
    from ._errors import (
        AuthorizationRefused,
        AuthorizationRequired,
        CallbackRefused,
        CallbackServerError,
        ConfigurationError,
        CredentialUnreadable,
        FutureNotFound,
        GateRequired,
        GrantRevoked,
        MissingClient,
        OwnerUnknown,
        PocketAuthError,
        ProviderError,
        ProviderUnavailable,
        RedactedContext,
        ScopeWithheld,
        StorageError,
        StorageUnavailable,
        TokenRequestError,
        UnknownProvider,
    )
    from ._events import Event
    from ._futures import FutureData, FutureStore
    from ._history import answer_open_calls
    from ._models import (
        AuthContext,
        AuthenticateRequest,
        AuthenticateResponse,
        AuthState,
        Choice,
        Owner,
    )
    from ._owner import RunInfo, by_thread, from_configurable
    from ._placement import Placed, Placement
    from ._pocket import PocketAuth
    from ._providers import AuthProvider
    from ._resume import PendingAuthorization, pending_authorizations, resume
    from ._rewrap import Rewrapped
    from ._row_parts import (
        AccountLookup,
        Form,
        FormField,
        Revocation,
        TokenExchange,
        Variable,
    )
    from ._rows import Client, Provider
    from ._task import AlreadyResumed
    from ._tools import InjectedAuth, current_auth
    from .handlers import (
        AuthHandlerInterface,
        FormContext,
        FormHandler,
        OAuth2Context,
        OAuth2Handler,
        OAuth2Request,
    )

_HOMES = {
    "_connections": "Connection ConnectionHealth Forgotten",
    "_errors": (
        "AuthorizationRefused AuthorizationRequired CallbackRefused "
        "CallbackServerError ConfigurationError CredentialUnreadable FutureNotFound "
        "GateRequired GrantRevoked MissingClient OwnerUnknown PocketAuthError "
        "ProviderError ProviderUnavailable RedactedContext ScopeWithheld "
        "StorageError StorageUnavailable TokenRequestError UnknownProvider"
    ),
    "_events": "Event",
    "_futures": "FutureData FutureStore",
    "_history": "answer_open_calls",
    "_models": (
        "AuthContext AuthState AuthenticateRequest AuthenticateResponse Choice Owner"
    ),
    "_owner": "RunInfo by_thread from_configurable",
    "_placement": "Placed Placement",
    "_pocket": "PocketAuth",
    "_providers": "AuthProvider",
    "_resume": "PendingAuthorization pending_authorizations resume",
    "_rewrap": "Rewrapped",
    "_row_parts": "AccountLookup Form FormField Revocation TokenExchange Variable",
    "_rows": "Client Provider",
    "_task": "AlreadyResumed",
    "_tools": "InjectedAuth current_auth",
    "handlers": (
        "AuthHandlerInterface FormContext FormHandler OAuth2Context OAuth2Handler "
        "OAuth2Request"
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AccountLookup",
    "AlreadyResumed",
    "AuthContext",
    "AuthHandlerInterface",
    "AuthProvider",
    "AuthState",
    "AuthenticateRequest",
    "AuthenticateResponse",
    "AuthorizationRefused",
    "AuthorizationRequired",
    "CallbackRefused",
    "CallbackServerError",
    "Choice",
    "Client",
    "ConfigurationError",
    "Connection",
    "ConnectionHealth",
    "CredentialUnreadable",
    "Event",
    "Forgotten",
    "Form",
    "FormContext",
    "FormField",
    "FormHandler",
    "FutureData",
    "FutureNotFound",
    "FutureStore",
    "GateRequired",
    "GrantRevoked",
    "InjectedAuth",
    "MissingClient",
    "OAuth2Context",
    "OAuth2Handler",
    "OAuth2Request",
    "Owner",
    "OwnerUnknown",
    "PendingAuthorization",
    "Placed",
    "Placement",
    "PocketAuth",
    "PocketAuthError",
    "Provider",
    "ProviderError",
    "ProviderUnavailable",
    "RedactedContext",
    "Revocation",
    "Rewrapped",
    "RunInfo",
    "ScopeWithheld",
    "StorageError",
    "StorageUnavailable",
    "TokenExchange",
    "TokenRequestError",
    "UnknownProvider",
    "Variable",
    "answer_open_calls",
    "by_thread",
    "current_auth",
    "from_configurable",
    "pending_authorizations",
    "resume",
]


def __getattr__(name: str) -> Any:
    # Importing the package costs next to nothing; its parts come when first used.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
