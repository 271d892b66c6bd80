"""What the parts talk about: states, owners, requirements, and masked models."""

from __future__ import annotations

import enum
import json
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from ._errors import ConfigurationError, PocketAuthError, RedactedContext
from ._placement import BEARER, Placed

if TYPE_CHECKING:
    import httpx

REVEAL: Final = object()
"""Serialization context with which the vault, and nobody else, sees secrets."""


class AuthState(enum.Enum):
    """The six answers of `PocketAuth.check`."""

    SKIP_AUTH = "skip_auth"
    """A session exists and covers the request."""
    DO_AUTH = "do_auth"
    """A session exists, but the request needs more than it grants."""
    DO_REFRESH = "do_refresh"
    """A session exists and has expired; it can be renewed without the person."""
    NO_SESSION = "no_session"
    """There is no session."""
    PENDING_RESOLVE = "pending_resolve"
    """A connect link is out; the person has not finished."""
    RESOLVED = "resolved"
    """The person has finished; the answer waits to be exchanged."""


_TYPES: dict[str, type[Confidential]] = {}
_SEALED_NAMES = frozenset(
    [
        "__repr__",
        "__str__",
        "__repr_args__",
        "__rich_repr__",
        "__pretty__",
        "__iter__",
        "__getattr__",
        "__reduce__",
        "__reduce_ex__",
        "__getstate__",
        "model_dump",
        "model_dump_json",
    ]
)


class Confidential(BaseModel):
    """
    A model whose default ways out show no secret.

    `repr`, `str`, `dict`, `model_dump`, `model_dump_json`, serializers built on
    them and validation errors show `public_fields` only; pickling raises.
    A subclass cannot switch this off: trying to is a `TypeError`.
    """

    model_config = ConfigDict(hide_input_in_errors=True)
    public_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.__module__ != __name__:
            opened = sorted(_SEALED_NAMES & vars(cls).keys())
            serializers = set(cls.__pydantic_decorators__.model_serializers)
            if opened or serializers != {"_masked"}:
                raise TypeError(
                    f"{cls.__qualname__} defines {', '.join(opened) or 'a serializer'}:"
                    " that could show secrets; remove it"
                )
            if cls.model_config.get("hide_input_in_errors") is not True:
                raise TypeError(
                    f"{cls.__qualname__} must not set hide_input_in_errors=False"
                )
        _TYPES[type_name(cls)] = cls

    @model_serializer(mode="wrap")
    def _masked(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        if info.context is REVEAL:
            revealed: dict[str, Any] = handler(self)
            return revealed
        return dict(self._public_items())

    @model_validator(mode="wrap")
    @classmethod
    def _forget_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # hide_input_in_errors covers str(error) only: errors() would still hold it.
        try:
            return handler(data)
        except ValidationError as error:
            lines = [
                InitErrorDetails(
                    type=PydanticCustomError(line["type"], "{text}", {"text": text}),
                    loc=line["loc"],
                    input="***",
                )
                for line in error.errors(
                    include_url=False, include_context=False, include_input=False
                )
                # A validator's own text may quote the value.
                for text in [
                    "Value refused"
                    if line["type"] in {"value_error", "assertion_error"}
                    else line["msg"]
                ]
            ]
        raise ValidationError.from_exception_data(
            cls.__name__, lines, hide_input=True
        ) from None

    def _public_items(self) -> Iterator[tuple[str, Any]]:
        return ((k, v) for k, v in self.__dict__.items() if k in self.public_fields)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        yield from self._public_items()
        if hidden := type(self).model_fields.keys() - self.public_fields:
            yield None, f"{len(hidden)} hidden"

    def __str__(self) -> str:
        return repr(self)

    def __iter__(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        return self._public_items()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds secrets and is not pickled")

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise RedactedContext(
                    f"{type(self).__name__} came out of a dump, which holds no "
                    f"{name!r}; ask PocketAuth for the context again"
                )
            return super().__getattr__(name)


def type_name(cls: type) -> str:
    """Name under which the vault stores and finds a model's type."""
    # Ours by the package, so that what is stored survives a move between modules.
    package = f"{__package__}."
    home = __package__ if cls.__module__.startswith(package) else cls.__module__
    return f"{home}.{cls.__qualname__}"


def find_type(name: str) -> type[Confidential] | None:
    """Return the registered model type of that name."""
    return _TYPES.get(name)


class AuthContext(Confidential, ABC):
    """
    What a tool gets: the access token and what is known about it.

    The token shows in three ways only: the attribute, `to_dict` and
    `to_profiled_dict`. Not to be confused with `langgraph_sdk.auth.types.AuthContext`,
    which describes a request to a LangGraph Server.
    """

    public_fields = frozenset({"description", "expires_at", "scopes"})

    access_token: str = Field(description="user's access token")
    description: str = Field(description="description of this authentication context")
    expires_at: datetime | None = Field(description="expiration datetime")
    detail: Any | None = Field(default=None, description="detailed information")
    scopes: list[str] | None = Field(default=None, description="what was granted")

    _environment: Mapping[str, str] = PrivateAttr(
        default_factory=lambda: {"ACCESS_TOKEN": "access_token"}
    )
    _placed: Placed | None = PrivateAttr(default=None)
    _provider: str | None = PrivateAttr(default=None)
    _clients: Callable[..., Any] | None = PrivateAttr(default=None)
    _masked_texts: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("expires_at")
    @classmethod
    def _aware(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value

    def to_dict(self) -> dict[str, str]:
        """Return the secrets under the provider's environment keys."""
        named = {key: self._secret(name) for key, name in self._environment.items()}
        return {key: value for key, value in named.items() if value is not None}

    def to_profiled_dict(self, profile: str) -> dict[str, str]:
        """Return `to_dict` with the upper-case profile before each key."""
        return {f"{profile.upper()}_{key}": v for key, v in self.to_dict().items()}

    def _secret(self, name: str) -> str | None:
        value = getattr(self, name, None)
        return value if isinstance(value, str) else None

    # ------------------------------------------------------------------- API calls

    def headers(self) -> dict[str, str]:
        """
        Return the headers that authorize a call of the provider's API.

        Most often `{"Authorization": "Bearer …"}`; where the API wants another header,
        basic authentication or further headers, those.

        Raises:
            ConfigurationError: Headers are not enough: the API takes its credential
                in the query or path (use `apply`), or wants signed requests.
        """
        placed = self._placement()
        if placed.place.query or placed.place.url:
            raise ConfigurationError(
                f"{self._provider} takes its credential in the URL: use apply(request)"
            )
        return placed.rendered_headers()

    def apply(self, request: httpx.Request) -> httpx.Request:
        """
        Put the credential where the provider's API takes it; return *request*.

        Headers, query or path, as it is documented. `httpx.Client(auth=auth.apply)`
        does so for every request of a client that talks to that API only.

        Raises:
            ConfigurationError: The request would go out without TLS to another
                machine, or the API wants signed requests.
        """
        return self._placement().apply(request)

    def async_client(
        self, *, hosts: Iterable[str] = (), **settings: Any
    ) -> httpx.AsyncClient:
        """
        Return an HTTP client of the provider's API; close it, or use `async with`.

        The credential goes to the host of `api_base_url` and to *hosts*, to no other,
        and follows no redirect. An API that answers 401 is asked once more with a
        renewed credential; one that cannot be renewed is asked for again before the
        next call of a tool. An API that names scopes it misses (RFC 6750 section 3.1)
        lets the next call ask the person for them.

        Args:
            hosts: Further hosts of the API: `uploads.example.com`.
            settings: For `httpx.AsyncClient`: `timeout`, `headers`, …

        Raises:
            ConfigurationError: Where the API is is not known: name *hosts*; or this
                context was not given to a tool by PocketAuth.
        """
        made: httpx.AsyncClient = self._made(hosts, synchronous=False, **settings)
        return made

    def sync_client(
        self, *, hosts: Iterable[str] = (), **settings: Any
    ) -> httpx.Client:
        """Return the same for synchronous tools; see `async_client`."""
        made: httpx.Client = self._made(hosts, synchronous=True, **settings)
        return made

    def _made(self, hosts: Iterable[str], **settings: Any) -> Any:
        if self._clients is None:
            raise ConfigurationError(
                "this context was not given to a tool by PocketAuth, which would renew "
                "it: use headers() or apply(request)"
            )
        return self._clients(self, hosts, **settings)

    @property
    def api_base_url(self) -> str | None:
        """The address of the provider's API for this account, where it is known."""
        return self._placement().rendered_base_url()

    def _placement(self) -> Placed:
        return self._placed or Placed(BEARER, {"token": self.access_token})


class AuthenticateRequest(Confidential):
    """What a handler needs to authenticate: scopes and the app's registration."""

    public_fields = frozenset({"auth_scopes"})

    auth_scopes: list[str] | None = Field(
        default_factory=list,
        description="authentication scopes. if the authentication handler is non "
        "scoped, it isn't needed",
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several accounts that a grant reaches."""

    id: str
    label: str


class AuthenticateResponse(Confidential):
    """What a provider answered; may be the `detail` of a context."""


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """Whose session it is. Never taken from the model."""

    kind: Literal["user", "thread", "app"]
    id: str

    def __post_init__(self) -> None:
        if self.kind not in {"user", "thread", "app"}:
            raise ValueError(f"an owner is a user, a thread or an app, not {self.kind}")
        if not isinstance(self.id, str) or not self.id:
            raise ValueError("an owner's id is a non-empty string")

    @property
    def namespace(self) -> str:
        """The owner's part of every storage key; kinds hold no colon."""
        return f"{self.kind}:{self.id}"


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a tool needs: written by the tool's author, never by the model."""

    provider: str
    scopes: tuple[str, ...] = ()
    handler: str | None = None
    profile: str = "default"
    required: bool = True
    detail: bool = False

    @property
    def place(self) -> tuple[str, str | None, str]:
        """Requirements of one place are served by one session."""
        return (self.provider, self.handler, self.profile)

    def __or__(self, other: Requirement) -> Requirement:
        """Both at once: the union of the scopes."""
        return Requirement(
            self.provider,
            tuple(dict.fromkeys(self.scopes + other.scopes)),
            self.handler,
            self.profile,
            self.required or other.required,
            self.detail or other.detail,
        )


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Where a session is stored."""

    owner: Owner
    provider: str
    profile: str
    connection: str

    def name(self, purpose: str) -> str:
        """The name part of a storage key; JSON keeps the parts apart."""
        return json.dumps([purpose, self.provider, self.profile, self.connection])


@dataclass(frozen=True, slots=True)
class Consent:
    """A future as the agent's side sees it: what is asked, where, since when."""

    key: str
    url: str
    expires_at: datetime
    state: AuthState
    provider: str
    display_name: str
    handler: str
    profile: str
    scopes: tuple[str, ...]
    missing_scopes: tuple[str, ...]
    place: SessionKey
    upgrade: bool
    """Whether there is a session already, which grants less."""
    account: str | None = None
    confirm: Literal["code"] | None = None
    """Whether the chat has to give a code."""


@dataclass(frozen=True, slots=True)
class Turn:
    """
    Where in which conversation something is needed.

    Attributes:
        name: The same when the same turn looks again.
        thread_id: The conversation, if there is one.
        task: The task of the graph that would wait, if there is one.
    """

    name: str
    thread_id: str | None = None
    task: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Resumption:
    """
    How a paused run can be continued from outside.

    Attributes:
        thread_id: Its thread.
        checkpoint_id: The checkpoint of the root graph that it paused in.
        configurable: What the run was configured with; JSON.
        nodes: The nodes of its root graph, by which it is told from others.
        context: Its run-time context; known in this process only.
        user: A context that knows who asked a LangGraph Server; in this process only.
    """

    thread_id: str
    checkpoint_id: str | None = None
    configurable: dict[str, Any] = field(default_factory=dict)
    nodes: Mapping[str, Any] = field(default_factory=dict)
    context: Any = None
    user: Context | None = None


@dataclass(slots=True)
class Outcome:
    """
    How a requirement stands for one turn.

    Exactly one of `consent` (wait for the person) and `refusal` (do not ask
    again in this turn) is set, or none: the requirement is met.
    """

    requirement: Requirement
    consent: Consent | None = None
    refusal: PocketAuthError | None = None
    tools: list[str] = field(default_factory=list)
    tool_call_ids: list[str] = field(default_factory=list)
    wrong_code: bool = False
    """Whether the chat gave a code that did not connect it."""
