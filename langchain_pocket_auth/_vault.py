"""Names, seals and reads back what is stored; knows lifetimes, not meanings."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import count
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError

from ._canaries import is_canary, prove, retire, used
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
from .storage import Key, Page, Record, StorageBackend

logger = logging.getLogger(__name__)

# A version starts at a random number and counts up: a row that was deleted and
# made again never reaches an old version, so an old seal does not open in it.
_VERSION_BITS = 52
ATTEMPT_TTL = timedelta(minutes=30)  # the longest that any attempt is open
ATTEMPT_KEPT = timedelta(days=1)  # so that a late answer is told "expired"
HOLD_TTL = timedelta(minutes=10)  # how long a grant waits to be linked
# So that it is given back afterwards, even if nobody keeps house for long.
HOLD_KEPT = timedelta(days=30)
# How long who links it, or gives it back, is left alone: more than a match (10 s) and
# a save in bad weather (5 s) take.
LINK_LIMIT = timedelta(seconds=30)
CAS_TRIES = 8
SWEEP_EVERY = 100  # new records between two cleanings


class _UnfitError(CredentialUnreadable):
    """A record opens, and is not of the form that is known here."""


class _Entry(BaseModel):
    """Something the vault keeps, sealed. `purpose` is part of name and seal."""

    model_config = ConfigDict(hide_input_in_errors=True)
    purpose: ClassVar[str]
    passing: ClassVar[bool] = False
    """Whether one that another version of the package wrote counts as run out."""

    @classmethod
    def over(cls) -> Self | None:
        """Return what stands in for it then, so that it can be replaced."""
        return None

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
    connected_at: datetime | None = None
    """When the person agreed first; `None` in records of older versions."""
    obtained_at: datetime
    needs_consent: str | None = None
    """Why it cannot be renewed any more; the record is kept until replaced."""
    failures: int = 0
    refused: bool = False
    """Whether the API does not take it, and it cannot be renewed."""
    lacks: dict[str, list[str]] = Field(default_factory=dict)
    """Scopes that the API missed, by those that were thought to be enough."""

    def lacking(self, needed: Iterable[str]) -> list[str]:
        """Return the scopes that an API missed where *needed* were granted."""
        return self.lacks.get(" ".join(sorted(needed)), [])

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
    passing = True

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
    held: str | None = None
    """Name of an attempt whose grant waits to be linked."""
    attempts: list[str] = Field(default_factory=list)
    """Where its latest attempts are stored, so that there are never many."""
    expires_at: datetime

    @classmethod
    def over(cls) -> Self:
        return cls(
            id="",
            ticket="",
            handler="",
            owner_id="",
            scopes=[],
            needed=[],
            state="NO_SESSION",
            request=Typed(type="", data={}),
            expires_at=datetime.min.replace(tzinfo=UTC),
        )


class Pointer(_Entry):
    """From a ticket to its future, or from an attempt, or from a pause."""

    purpose = "ticket"
    passing = True

    owner: tuple[Literal["user", "thread", "app"], Annotated[str, Field(min_length=1)]]
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
        owner = Owner(kind, owner_id)
        return SessionKey(owner, self.provider, self.profile, self.connection)


class Grant(BaseModel):
    """What an attempt brought, while nobody may use it, and what it waits for."""

    model_config = ConfigDict(hide_input_in_errors=True)
    context: Typed
    sent: datetime
    """When it was asked for."""
    choose: bool = False
    """For the choice of an account."""
    person: bool = False
    """For the owner to say that it was they who agreed."""
    code: str | None = None
    """For this code to come from the chat."""
    wrong: list[str] = Field(default_factory=list)
    """Codes that came in its place."""
    matched: bool = False
    """Whether the app has said that the account is right."""

    @property
    def waits(self) -> bool:
        """Whether it may not be linked yet."""
        return self.choose or self.person or self.code is not None

    @property
    def account(self) -> str | None:
        """Whose account it is, where the provider told."""
        account = self.context.data.get("account")
        return account if isinstance(account, str) else None

    def auth_context(self) -> AuthContext:
        """Return the context, with all its secrets."""
        context = self.context.restore()
        assert isinstance(context, AuthContext)  # noqa: S101 - sealed as one
        return context

    def __repr__(self) -> str:
        return "<stored grant>"

    __str__ = __repr__


class Hold(_Entry):
    """Says that an attempt of the same name holds a grant, and until when."""

    purpose = "held"

    until: datetime


class Attempt(_Entry):
    """One click on the connect page."""

    purpose = "attempt"
    passing = True

    uid: str
    future_id: str
    target: Pointer
    handler: str
    scopes: list[str]
    request: Typed
    data: dict[str, Any] = Field(default_factory=dict)
    status: Literal[
        "pending", "exchanging", "held", "resolved", "done", "denied", "failed"
    ] = "pending"
    answer: Any = None
    """What it was resolved with outside a callback, until it is exchanged."""
    grant: Grant | None = None
    """While it is not linked."""
    browser: str | None = None
    """Digest of the cookie of the browser that began it, and has to end it."""
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
    passing = True

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

    @classmethod
    def over(cls) -> Self:
        return cls()


class Known(_Entry):
    """What the app got to know and has to remember: a client that it registered."""

    purpose = "known"

    data: dict[str, Any]


class Owed(_Entry):
    """A grant that is to be given back to its provider."""

    purpose = "outbox"

    target: Pointer
    """Where it was, or would have been, the grant of a session."""
    handler: str
    scopes: list[str]
    context: Typed
    session_version: int | None = None
    """Of the session that is deleted first, if whoever began that has died."""
    spares: bool = False
    """Whether it stays with the provider where the session is connected anew."""
    tries: int = 0
    next_try: datetime
    since: datetime


class Used(_Entry):
    """The last day on which a session was used."""

    purpose = "used"

    day: date
    bucket: date | None = None
    """The day among whose pointers that session is."""


class Idle(Pointer):
    """From a day to a session that was used on it, and perhaps not since."""

    purpose = "idle"
    passing = False


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
        return self._vault.read(kind, (self._owner.namespace, name), record)

    def holds(self, kind: type[_Entry], key: SessionKey) -> bool:
        """Whether there is an entry of that session key."""
        return key.name(kind.purpose) in self._records

    def keys(self, kind: type[_Entry]) -> list[SessionKey]:
        """Return the session keys of all entries of a kind."""
        found = []
        for name in self._records:
            with suppress(ValueError, TypeError):  # a row that is not ours
                purpose, provider, profile, connection = json.loads(name)
                if purpose == kind.purpose:
                    found.append(SessionKey(self._owner, provider, profile, connection))
        return found


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
            await prove(self._backend, self._keys)
        except BaseException:
            await self._backend.close()
            raise

    async def close(self) -> None:
        """Close the backend."""
        await self._backend.close()

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of the keys; the first seals."""
        return self._keys.ids

    async def used_keys(self) -> set[str]:
        """Return the ids of the keys that may not be dropped."""
        return await used(self._backend)

    async def walk(self, after: str | None, limit: int) -> Page:
        """Return a page of all entries, as they are stored."""
        page = await self._backend.walk(after=after, limit=limit)
        records = {k: r for k, r in page.records.items() if not is_canary(k)}
        return Page(records, page.after)

    def sealed_anew(self, key: Key, record: Record) -> bytes:
        """
        Return what a stored entry looks like under the first key.

        Raises:
            CredentialUnreadable: It does not open.
        """
        bound_to = (*key, str(record.version))
        return self._keys.seal(self._keys.open(record.value, *bound_to), *bound_to)

    async def rewrite(self, key: Key, record: Record, value: bytes) -> bool:
        """Store other bytes of the same entry, if it is current."""
        return await self._backend.rewrite(key, value, expected=record.version)

    async def retire(self, key_id: str) -> None:
        """Let a key be dropped, under which nothing is left."""
        await retire(self._backend, key_id)

    async def shelf(self, owner: Owner) -> Shelf:
        """Read everything of an owner, in one step."""
        return Shelf(self, owner, await self._backend.list(owner.namespace))

    async def get(self, kind: type[E_], key: Key) -> Stored[E_] | None:
        """Return the entry at *key*, or `None`."""
        record = await self._backend.get(key)
        return None if record is None else self.read(kind, key, record)

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

    async def discard(self, key: Key) -> bool:
        """Delete whatever is at *key*; whether there was anything."""
        return await self._backend.delete(key)

    async def clear(self, owner: Owner) -> None:
        """Delete everything in an owner's own namespace but sessions: they end."""
        for name in await self._backend.list(owner.namespace):
            if not name.startswith(f'["{Session.purpose}"'):
                await self._backend.delete((owner.namespace, name))

    async def entries(
        self, kind: type[E_], namespace: str
    ) -> AsyncIterator[Stored[E_]]:
        """Walk through all entries of a namespace that can be read."""
        after: str | None = None
        while True:
            page = await self._backend.walk(namespace, after=after)
            for key, record in page.records.items():
                with suppress(CredentialUnreadable):
                    yield self.unseal(kind, key, record)
            if (after := page.after) is None:
                return

    async def page(
        self, kind: type[E_], namespace: str, *, after: str | None, limit: int
    ) -> tuple[list[Stored[E_]], str | None]:
        """Return some of those entries, and where the next ones begin."""
        page = await self._backend.walk(namespace, after=after, limit=limit)
        found = []
        for key, record in page.records.items():
            with suppress(CredentialUnreadable):
                found.append(self.unseal(kind, key, record))
        return found, page.after

    async def sweep(self, limit: int = 1000) -> int:
        """Erase at most *limit* records whose time is over; how many there were."""
        return await self._backend.sweep(limit)

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

    def read(self, kind: type[E_], key: Key, record: Record) -> Stored[E_] | None:
        """
        Open a record; one of another version of the package may count as run out.

        Raises:
            CredentialUnreadable: It does not open, or is of another kind.
        """
        try:
            return self.unseal(kind, key, record)
        except _UnfitError:
            if not kind.passing:
                raise
        logger.info("a %s of another version counts as expired", kind.purpose)
        over = kind.over()
        return None if over is None else Stored(key, record.version, over)

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
            raise _UnfitError(
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


def used_key(key: SessionKey) -> Key:
    """Where the last use of the session of a session key is stored."""
    return ("used", digest(json.dumps(entry_key(Session, key))))


def handler_name(stored: Stored[Session]) -> str:
    """Return the name of the handler that a session came from."""
    connection: str = json.loads(stored.key[1])[3]
    return connection.partition("?")[0]


def session_key_of(stored: Stored[Session]) -> SessionKey:
    """Return the session key of a stored session."""
    namespace, name = stored.key
    kind, _, owner_id = namespace.partition(":")
    _, provider, profile, connection = json.loads(name)
    owner = Owner(kind, owner_id)  # type: ignore[arg-type]
    return SessionKey(owner, provider, profile, connection)


def entry_key(kind: type[_Entry], key: SessionKey) -> Key:
    """Where the session or future of a session key is stored."""
    return (key.owner.namespace, key.name(kind.purpose))
