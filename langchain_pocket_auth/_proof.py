"""What shows that whoever agreed is the owner: a code, and the app's own opinion."""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets

from ._errors import CallbackRefused
from ._models import AuthContext, Owner
from ._site import AccountMatcher
from ._vault import Grant

logger = logging.getLogger(__name__)

CODE_TRIES = 5
MATCH_LIMIT_S = 10.0  # a directory may be asked
# Without those that are taken for another: 8 of 31 are 39 bits, for five tries.
_ALPHABET = "ABCDEFGHJKMNPQRSTUVWXYZ23456789"


def new_code() -> str:
    """Return a confirmation code as it is kept."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(8))


def shown_code(code: str) -> str:
    """Return a code as a person reads it."""
    return f"{code[:4]}-{code[4:]}"


def tried_code(grant: Grant, code: str) -> tuple[bool, Grant]:
    """
    Return whether *code* is the grant's, and the grant as it is after that try.

    A wrong code counts once, however often it comes: a run that goes on tells it again.

    Raises:
        CallbackRefused: None is waited for, or not any more.
    """
    if grant.code is None or len(grant.wrong) >= CODE_TRIES:
        raise CallbackRefused("replayed")
    given = "".join(filter(str.isalnum, code)).upper()[:32]
    if secrets.compare_digest(grant.code.encode(), given.encode()):
        return True, grant.model_copy(update={"code": None})
    wrong = list(dict.fromkeys([*grant.wrong, given]))
    return False, grant.model_copy(update={"wrong": wrong})


async def is_taken(matcher: AccountMatcher, owner: Owner, context: AuthContext) -> bool:
    """Ask the app whether an account may be linked; that it fails is a no."""
    # Not what renews the grant: it is the app's business whose it is, no more.
    hidden = {"refresh_token", "client"} & type(context).model_fields.keys()
    shown = context.model_copy(update=dict.fromkeys(hidden))
    try:
        async with asyncio.timeout(MATCH_LIMIT_S):
            if inspect.iscoroutinefunction(matcher):
                return bool(await matcher(owner, shown))
            found = await asyncio.to_thread(matcher, owner, shown)
            return bool(await found if inspect.isawaitable(found) else found)
    except Exception as error:  # noqa: BLE001 - an app's own
        # Not the text: it is of somebody else.
        logger.warning("account_matcher failed with %s", type(error).__name__)
    return False
