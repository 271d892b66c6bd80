"""Who may start, answer and finish an attempt: the same browser, and the owner."""

from __future__ import annotations

import secrets

from ._errors import CallbackRefused
from ._events import Event, Tell
from ._models import SessionKey
from ._site import Site, Visitor
from ._vault import Attempt


class Admission:
    """Compares visitors with the owner that a link is for."""

    def __init__(self, site: Site, tell: Tell) -> None:
        self._site, self._tell = site, tell

    def proves(self, visitor: Visitor) -> bool:
        """Whether the app itself answers, where that is the person: on this machine."""
        return visitor.trusted and not self._site.public

    def admit(self, visitor: Visitor, key: SessionKey, *, here: bool = False) -> bool:
        """
        Return whether a visitor is known to be the owner; refuse anybody else.

        Raises:
            CallbackRefused: `wrong_person`; with *here*, nobody: `sign_in`.
        """
        if visitor.trusted or self._site.verify_user is None:
            return False
        if visitor.person is None and here:
            raise CallbackRefused("sign_in")
        if visitor.person not in {None, key.owner}:
            why = "somebody else was signed in"
            self._tell(Event.at(key, "refused", reason=why))
            raise CallbackRefused("wrong_person")
        return visitor.person is not None


def same_browser(visitor: Visitor, attempt: Attempt) -> None:
    """Refuse another browser than the one that began an attempt, if one did."""
    if attempt.browser is None or visitor.trusted:
        return
    if not secrets.compare_digest(attempt.browser, visitor.browser or ""):
        raise CallbackRefused("mismatch")
