"""Names, seals and reads back what is stored; knows lifetimes, not meanings."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError

from ._errors import ConfigurationError, CredentialUnreadable
from ._models import (
    REVEAL,
    AuthContext,
    AuthenticateResponse,
    Confidential,
    Owner,
    SessionKey,
    find_type,
    type_name,
)
from ._seal import KeyRing
from .storage import Key, Record, StorageBackend

# A version starts at a random number and counts up: a row that was deleted and
# made again never reaches an old version, so an old seal does not open in it.
_VERSION_BITS = 52
ATTEMPT_TTL = timedelta(minutes=30)  # the longest that any attempt is open
ATTEMPT_KEPT = timedelta(days=1)  # so that a late answer is told "expired"
CAS_TRIES = 8
SWEEP_EVERY = 100  # new records between two cleanings


class _Entry(BaseModel):
    """Something the vault keeps, sealed. `purpose` is part of name and seal."""

    model_config = ConfigDict(hide_input_in_errors=True)
    purpose: ClassVar[str]

    def __repr__(self) -> str:
        return f"<{self.purpose}>"

    __str__ = __repr__


class Typed(BaseModel):
    """A third party's model with the name of its type."""

    model_config = ConfigDict(hide_input_in_errors=True)
    type: str
    data: dict[str, Any]
    detail_type: str | None = None

    @classmethod
    def of(cls, value: Confidential) -> Typed:
        """Reveal *value* for sealing."""
        detail = getattr(value, "detail", None)
        try:
            data = value.model_dump(mode="json", context=REVEAL)
            json.dumps(data)
        except (ValueError, TypeError):
            raise ConfigurationError(
                f"{type(value).__name__} cannot be stored: fields and `detail` have to "
                "be JSON or an AuthenticateResponse"
            ) from None
        if detail is not None and not isinstance(detail, AuthenticateResponse):
            if not _plain(detail):
                raise ConfigurationError(
                    f"the detail of {type(value).__name__} is neither JSON nor an "
                    "AuthenticateResponse"
                )
            detail = None
        named = type_name(type(detail)) if detail is not None else None
        return cls(type=type_name(type(value)), data=data, detail_type=named)

    def restore(self) -> Confidential:
        """
        Build the model again.

        Raises:
            CredentialUnreadable: Its type is not known here, or has changed.
        """
        data = dict(self.data)
        try:
            if self.detail_type:
                data["detail"] = _type(self.detail_type).model_validate(data["detail"])
            return _type(self.type).model_validate(data)
        except ValidationError as error:
            raise CredentialUnreadable(
                f"a stored {self.type} does not fit its class any more: {error}"
            ) from None

    def __repr__(self) -> str:
        return f"<stored {self.type}>"

    __str__ = __repr__


def _type(name: str) -> type[Confidential]:
    if (found := find_type(name)) is None:
        raise CredentialUnreadable(
            f"a stored record is a {name}, and no such class is known: import the "
            "module that defines it before PocketAuth is used"
        )
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


class Session(_Entry):
    """A grant."""

    purpose = "session"

    context: Typed
    scopes: list[str]
    """Granted, as far as answers tell."""
    client_id: str | None = None
    obtained_at: datetime
    needs_consent: str | None = None
    """Why it cannot be renewed any more; the record is kept until replaced."""
    failures: int = 0

    def auth_context(self) -> AuthContext:
        """Return the context, with all its secrets."""
        context = self.context.restore()
        if not isinstance(context, AuthContext):
            raise CredentialUnreadable(
                f"a stored {self.context.type} is no AuthContext"
            )
        return context

    @property
    def account(self) -> str | None:
        """Whose account it is, where the provider told."""
        account = self.context.data.get("account")
        return account if isinstance(account, str) else None


class Future(_Entry):
    """A request for consent, waiting for the person."""

    purpose = "future"

    id: str
    ticket: str
    status: Literal["pending", "done", "denied"] = "pending"
    handler: str
    owner_id: str
    scopes: list[str]
    needed: list[str]
    state: Literal["NO_SESSION", "DO_AUTH"]
    request: Typed
    turns: list[str] = Field(default_factory=list)
    """Which turns of which conversations wait for it; the last 50."""
    pauses: dict[str, str] = Field(default_factory=dict)
    """Tasks of graphs that wait for it, with their threads; the last 50."""
    refused: dict[str, datetime] = Field(default_factory=dict)
    """Threads in which the person said no, and when."""
    tools: list[str] = Field(default_factory=list)
    withheld: list[str] = Field(default_factory=list)
    """What the person left out."""
    resolved: str | None = None
    """Name of an attempt that was answered outside a callback."""
    choosing: str | None = None
    """Name of an attempt whose person has yet to choose an account."""
    expires_at: datetime


class Pointer(_Entry):
    """From a ticket to its future, or from an attempt, or from a pause."""

    purpose = "ticket"

    owner: tuple[str, str]
    provider: str
    profile: str
    connection: str

    @classmethod
    def to(cls, key: SessionKey) -> Self:
        """Point to the place of a session."""
        return cls(
            owner=(key.owner.kind, key.owner.id),
            provider=key.provider,
            profile=key.profile,
            connection=key.connection,
        )

    def session_key(self) -> SessionKey:
        """Return the place of the session that is asked for."""
        kind, owner_id = self.owner
        owner = Owner(kind, owner_id)  # type: ignore[arg-type]
        return SessionKey(owner, self.provider, self.profile, self.connection)


class Attempt(_Entry):
    """One click on the connect page."""

    purpose = "attempt"

    uid: str
    future_id: str
    target: Pointer
    handler: str
    scopes: list[str]
    request: Typed
    data: dict[str, Any] = Field(default_factory=dict)
    status: Literal[
        "pending", "exchanging", "choosing", "resolved", "done", "denied", "failed"
    ] = "pending"
    answer: Any = None
    """What it was resolved with outside a callback, until it is exchanged."""
    context: Typed | None = None
    """The grant, while its person chooses an account."""
    answer_digest: str | None = None
    expires_at: datetime
    exchange_until: datetime | None = None


class Waited(BaseModel):
    """A future that a paused task waits for."""

    target: Pointer
    future_id: str


class Claim(BaseModel):
    """Says who continues a pause, and until when nobody else does."""

    holder: str
    answers: int
    """How many answers the task had: with more of them, another may go on."""
    until: datetime


class Pause(_Entry):
    """A task of a graph that waits, or has waited, for persons."""

    purpose = "pause"

    counts: dict[str, int] = Field(default_factory=dict)
    """How often the task's guarded calls have paused, by ordinal."""
    interrupt_ids: list[str] = Field(default_factory=list)
    """The interrupts that it raised for us; the last is the open one."""
    thread_id: str | None = None
    checkpoint_id: str | None = None
    nodes: list[str] = Field(default_factory=list)
    configurable: dict[str, Any] = Field(default_factory=dict)
    waits_for: list[Waited] = Field(default_factory=list)
    claims: dict[str, Claim] = Field(default_factory=dict)


class Known(_Entry):
    """What the app got to know and has to remember: a client that it registered."""

    purpose = "known"

    data: dict[str, Any]


class _Canary(_Entry):
    purpose = "canary"


E_ = TypeVar("E_", bound=_Entry)


@dataclass(frozen=True, slots=True)
class Stored(Generic[E_]):
    """An entry with the place and version it was read at."""

    key: Key
    version: int
    entry: E_


class Shelf:
    """All records of one owner, opened one by one when asked for."""

    def __init__(self, vault: Vault, owner: Owner, records: dict[str, Record]) -> None:
        self._vault, self._owner, self._records = vault, owner, records

    def get(self, kind: type[E_], key: SessionKey) -> Stored[E_] | None:
        """Return the entry of that session key, or `None`."""
        name = key.name(kind.purpose)
        record = self._records.get(name)
        if record is None:
            return None
        return self._vault.unseal(kind, (self._owner.namespace, name), record)

    def holds(self, kind: type[_Entry], key: SessionKey) -> bool:
        """Whether there is an entry of that session key."""
        return key.name(kind.purpose) in self._records

    def keys(self, kind: type[_Entry]) -> list[SessionKey]:
        """Return the session keys of all entries of a kind."""
        parts = [json.loads(name) for name in self._records]
        return [
            SessionKey(self._owner, provider, profile, connection)
            for purpose, provider, profile, connection in parts
            if purpose == kind.purpose
        ]


class Vault:
    """Seals entries into a backend. Every change is a compare-and-swap."""

    def __init__(
        self, backend: StorageBackend, keys: KeyRing, clock: Callable[[], datetime]
    ) -> None:
        self._backend, self._keys, self.now = backend, keys, clock
        self._created = count(1)

    async def open(self) -> None:
        """
        Open the backend and prove that the keys fit what is in it.

        Raises:
            ConfigurationError: They do not: starting now would ask everybody again.
        """
        await self._backend.open()
        try:
            await self._backend.sweep()
            key = ("meta", "canary")
            # Of two processes that start at once one creates it, both read it.
            if await self._backend.get(key) is None:
                await self.create(key, _Canary())
            await self.get(_Canary, key)
        except CredentialUnreadable as error:
            await self._backend.close()
            raise ConfigurationError(
                f"the keys do not fit this store: {error}"
            ) from None
        except BaseException:
            await self._backend.close()
            raise

    async def close(self) -> None:
        """Close the backend."""
        await self._backend.close()

    async def shelf(self, owner: Owner) -> Shelf:
        """Read everything of an owner, in one step."""
        return Shelf(self, owner, await self._backend.list(owner.namespace))

    async def get(self, kind: type[E_], key: Key) -> Stored[E_] | None:
        """Return the entry at *key*, or `None`."""
        record = await self._backend.get(key)
        return None if record is None else self.unseal(kind, key, record)

    async def create(
        self, key: Key, entry: E_, ttl: timedelta | None = None
    ) -> Stored[E_] | None:
        """Store a new entry; `None` if there is one already."""
        if ttl is not None and next(self._created) % SWEEP_EVERY == 0:
            await self._backend.sweep()  # as many leave as come, and more
        stored = Stored(key, secrets.randbits(_VERSION_BITS), entry)
        return await self._put(stored, None, ttl)

    async def replace(
        self, old: Stored[E_], entry: E_, ttl: timedelta | None = None
    ) -> Stored[E_] | None:
        """Store *entry* in place of *old*; `None` if *old* is not current any more."""
        return await self._put(
            Stored(old.key, old.version + 1, entry), old.version, ttl
        )

    async def delete(self, old: Stored[Any]) -> bool:
        """Delete *old* if it is current."""
        return await self._backend.delete(old.key, expected=old.version)

    async def discard(self, key: Key) -> None:
        """Delete whatever is at *key*."""
        await self._backend.delete(key)

    async def lease(
        self, stored: Stored[Any], holder: str, duration: timedelta
    ) -> bool:
        """Reserve an entry for *holder*."""
        return await self._backend.lease(stored.key, holder, duration)

    async def free(self, stored: Stored[Any], holder: str) -> None:
        """End the reservation."""
        await self._backend.free(stored.key, holder)

    async def _put(
        self, new: Stored[E_], expected: int | None, ttl: timedelta | None
    ) -> Stored[E_] | None:
        try:
            plain = new.entry.model_dump_json(context=REVEAL).encode()
        except PydanticSerializationError:
            plain = b""
        if not plain:
            raise ConfigurationError(
                f"a {new.entry.purpose} holds something that is not JSON"
            )
        value = self._keys.seal(plain, *new.key, str(new.version))
        done = await self._backend.put(
            new.key, value, version=new.version, expected=expected, ttl=ttl
        )
        return new if done else None

    def unseal(self, kind: type[E_], key: Key, record: Record) -> Stored[E_]:
        """
        Open a record.

        Raises:
            CredentialUnreadable: It does not open, or is of another kind.
        """
        plain = self._keys.open(record.value, *key, str(record.version))
        try:
            entry = kind.model_validate_json(plain)
        except ValidationError as error:
            raise CredentialUnreadable(
                f"a stored {kind.purpose} does not fit this version: {error}"
            ) from None
        return Stored(key, record.version, entry)


def digest(secret: str) -> str:
    """Hash under which a state or ticket is found; it cannot be turned back."""
    return hashlib.sha256(secret.encode()).hexdigest()


def ticket_key(ticket: str) -> Key:
    """Where the pointer of a ticket is stored."""
    return ("ticket", digest(ticket))


def attempt_key(uid: str) -> Key:
    """Where the attempt of a uid is stored."""
    return ("attempt", digest(uid))


def pause_key(task: str) -> Key:
    """Where the pause of a task is stored."""
    return ("pause", task)


def known_key(name: str) -> Key:
    """Where something known by that name is stored."""
    return ("known", name)


def handler_name(stored: Stored[Session]) -> str:
    """Return the name of the handler that a session came from."""
    connection: str = json.loads(stored.key[1])[3]
    return connection.partition("?")[0]


def entry_key(kind: type[_Entry], key: SessionKey) -> Key:
    """Where the session or future of a session key is stored."""
    return (key.owner.namespace, key.name(kind.purpose))
