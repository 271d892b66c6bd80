"""Every call of the contract as one atomic statement, for any dialect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Integer,
    LargeBinary,
    Select,
    Text,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.sql import ClauseElement

from ._schema import RECORDS

_R = RECORDS.c

# Parameters are named other than columns: SQLAlchemy keeps those names for itself.
_NAMESPACE = bindparam("in_namespace", type_=Text)
_NAME = bindparam("with_name", type_=Text)
_HOLDER = bindparam("holder", type_=Text)
_EXPECTED = bindparam("expected", type_=BigInteger)
_LIFETIME = bindparam("lifetime", type_=Double)
_VALUE = bindparam("new_value", type_=LargeBinary)
_MOST = bindparam("most", type_=Integer)

_HERE = (_R.namespace == _NAMESPACE, _R.name == _NAME)
_UNLEASED = {"lease_holder": null(), "lease_until": null()}
_DONE = literal_column("1", Integer)
# Else SQLite's LIMIT brings one more parameter.
_FROM_THE_FIRST = literal_column("0", Integer)


@dataclass(frozen=True, slots=True)
class Statements:
    """The statements of one dialect; those that change something say what."""

    get: ClauseElement
    list: ClauseElement
    take: ClauseElement
    delete: ClauseElement
    delete_expected: ClauseElement
    create: ClauseElement
    replace: ClauseElement
    rewrite: ClauseElement
    walk: ClauseElement
    walk_one: ClauseElement
    lease: ClauseElement
    free: ClauseElement
    sweep: ClauseElement

    @classmethod
    def of(
        cls,
        insert: Callable[..., Any],
        now: ColumnElement[float],
        *,
        once: Any = None,
        row: Any = None,
    ) -> Self:
        """
        Build them.

        Where a statement waits for another's row, PostgreSQL looks again at the row
        as it is then, but not at other tables or subqueries: so each condition is
        on the row that is changed.

        Args:
            insert: The dialect's.
            now: Seconds since the epoch, by the store's clock.
            once: The same, read once in a statement, where that is another
                expression: what an index can be searched for.
            row: Where a row is, if there is something faster than its key.
        """
        alive = or_(_R.expires_at.is_(None), _R.expires_at > now)
        expired = _R.expires_at <= (now if once is None else once)
        there = (*_HERE, alive)
        stored = {
            "version": bindparam("new_version", type_=BigInteger),
            "value": _VALUE,
            "expires_at": now + _LIFETIME,
            **_UNLEASED,
        }
        deleted = delete(RECORDS).where(*there)
        current = update(RECORDS).where(*there, _R.version == _EXPECTED)
        page = (
            select(_R.namespace, _R.name, _R.version, _R.value)
            .where(alive)
            .limit(_MOST)
            .offset(_FROM_THE_FIRST)
        )
        place, start = tuple_(_R.namespace, _R.name), tuple_(_NAMESPACE, _NAME)
        # Two that sweep at once take different rows, and wait for nobody.
        few = (
            select(*((_R.namespace, _R.name) if row is None else (row,)))
            .where(expired)
            # Else PostgreSQL, which cannot know how few have expired, may read the
            # table until it has met so many.
            .order_by(_R.expires_at)
            .limit(_MOST)
            .offset(_FROM_THE_FIRST)
            .with_for_update(skip_locked=True)
        )
        among = place.in_(few) if row is None else row == any_(_array(few))
        free_for_holder = or_(
            _R.lease_until.is_(None), _R.lease_until <= now, _R.lease_holder == _HOLDER
        )
        return cls(
            get=select(_R.version, _R.value).where(*there),
            list=select(_R.name, _R.version, _R.value).where(
                _R.namespace == _NAMESPACE, alive
            ),
            take=deleted.returning(_R.version, _R.value),
            delete=deleted.returning(_DONE),
            delete_expected=deleted.where(_R.version == _EXPECTED).returning(_DONE),
            create=insert(RECORDS)
            .values(namespace=_NAMESPACE, name=_NAME, **stored)
            .on_conflict_do_update(
                index_elements=[_R.namespace, _R.name],
                set_=stored,
                where=_R.expires_at <= now,
            )
            .returning(_DONE),
            replace=current.values(stored).returning(_DONE),
            rewrite=current.values(value=_VALUE).returning(_DONE),
            walk=page.where(place >= start).order_by(_R.namespace, _R.name),
            walk_one=page.where(_R.namespace == _NAMESPACE, _R.name >= _NAME).order_by(
                _R.name
            ),
            lease=update(RECORDS)
            .where(*there, free_for_holder)
            .values(lease_holder=_HOLDER, lease_until=now + _LIFETIME)
            .returning(_DONE),
            free=update(RECORDS)
            .where(*there, _R.lease_holder == _HOLDER)
            .values(_UNLEASED)
            .returning(_DONE),
            sweep=delete(RECORDS).where(among, expired).returning(_DONE),
        )


def _array(few: Select[Any]) -> Any:
    # For IN (SELECT ...) PostgreSQL may read the table.
    return func.array(few.scalar_subquery())
