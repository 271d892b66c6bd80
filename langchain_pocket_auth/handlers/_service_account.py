"""Key pairs that tokens are made with: service accounts (RFC 7523 section 2.1)."""

from __future__ import annotations

import dataclasses
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from .._errors import ConfigurationError, GrantRevoked, TokenRequestError
from .._futures import FutureData
from .._http import Answer
from .._models import AuthContext, AuthenticateRequest
from .._placement import BEARER, Placed
from .._row_parts import FormField
from .._rows import JWT_BEARER, Method, Provider
from ._answers import checked, context_of
from ._form import FormContext, FormHandler
from ._signing import rsa_key, signed

LIFETIME = timedelta(hours=1)  # the most that Google and Snowflake accept
_GONE = frozenset({"invalid_grant", "unauthorized_client"})
_GONE_STATUS = frozenset({401, 404})  # of servers that have other codes: GitHub's


class SigningHandler(FormHandler):
    """
    A form with the field `private_key`, an RSA key in PEM, that tokens are made with.

    The key stays sealed in the session, where it renews them. Tools find it in
    `to_dict` only; API calls take the token.
    """

    method: ClassVar[Method] = "keypair"

    @classmethod
    def _described(cls, row: Provider) -> str:
        return f"Connects {row.label} by a private key."

    async def authenticate(
        self,
        auth_req: AuthenticateRequest,
        future_uid: str,
        *args: Any,
        future: FutureData | None = None,
        **kwargs: Any,
    ) -> FormContext:
        """
        Make a token with what was typed, or with what the app's settings hold.

        Raises:
            TokenRequestError: The provider refuses what was typed.
            ConfigurationError: It refuses the app's settings.
            ProviderUnavailable: No usable answer.
        """
        given = await super().authenticate(
            auth_req, future_uid, *args, future=future, **kwargs
        )
        return await self._renewed(auth_req, given.fields)

    async def refresh(
        self,
        auth_req: AuthenticateRequest,
        context: AuthContext,
        *args: Any,
        **kwargs: Any,
    ) -> FormContext:
        """
        Make the next token.

        Raises:
            GrantRevoked: The provider refuses the key that a person typed.
            ConfigurationError: It refuses the app's.
            ProviderUnavailable: Retry later.
        """
        del args, kwargs
        assert isinstance(context, FormContext)  # noqa: S101 - `authenticate` made it
        try:
            return await self._renewed(auth_req, context.fields)
        except TokenRequestError as error:
            if error.code in _GONE or error.status in _GONE_STATUS:
                raise GrantRevoked(
                    f"{self.row.label} does not accept the key any more ({error.code})",
                    provider=self.row.id,
                ) from None
            raise

    async def _renewed(
        self, request: AuthenticateRequest, fields: dict[str, str]
    ) -> FormContext:
        try:
            made = await self._made(fields, request.auth_scopes or ())
        except TokenRequestError as error:
            if not self.unattended:
                raise
            # There is no person who could do something about it.
            raise ConfigurationError(
                f"{error}: check {self._setting}PRIVATE_KEY and the settings beside it"
            ) from None
        return made.model_copy(update={"fields": fields})

    @abstractmethod
    async def _made(
        self, fields: Mapping[str, str], scopes: Collection[str]
    ) -> FormContext:
        """
        Return a token that is made with *fields*.

        Raises:
            TokenRequestError: The provider refuses.
            ProviderUnavailable: No usable answer.
        """

    def _answered(
        self, answer: Answer, sent: datetime, scopes: Collection[str] | None = None
    ) -> FormContext:
        row = self.row
        refused: str | None = None
        try:
            content = checked(row, answer)
        except ConfigurationError:
            # What is refused is the account, which is not the app here.
            refused = "unauthorized_client"
        if refused:
            raise TokenRequestError(
                f"{row.label} does not let this account do what is asked ({refused})",
                provider=row.id,
                code=refused,
                status=answer.status,
            )
        token = context_of(row, content, sent, row.token_response)
        granted = token.scopes if token.scopes is not None else scopes
        return self._token_context(token.access_token, token.expires_at, granted)

    def _token_context(
        self,
        token: str,
        expires_at: datetime | None,
        scopes: Collection[str] | None = None,
    ) -> FormContext:
        return FormContext(
            access_token=token,
            description=f"{self.row.label} by a private key",
            expires_at=expires_at,
            scopes=None if scopes is None else list(scopes),
            fields={},
        )

    def _problem(self, name: str, field: FormField, value: str) -> str | None:
        if problem := super()._problem(name, field, value):
            return problem
        if name == "private_key":
            try:
                rsa_key(value)
            except ValueError as error:
                return str(error)
        return None

    def placement(self, context: AuthContext) -> Placed:
        """As a bearer token: what is signed is the way to it."""
        return dataclasses.replace(super().placement(context), place=BEARER)

    def can_refresh(self, context: AuthContext) -> bool:
        del context
        return True


class JwtBearerHandler(SigningHandler):
    """
    A signed assertion is exchanged for a token (RFC 7523 section 2.1).

    The form has the fields `client_email` and `private_key`, and may have `scopes`,
    which are asked for every time, and `subject`, whom the account acts for.
    """

    @classmethod
    def _is_scoped(cls, row: Provider) -> bool:
        return row.scoped

    async def _made(
        self, fields: Mapping[str, str], scopes: Collection[str]
    ) -> FormContext:
        row = self.row
        endpoint = self._url(row.token_endpoint or "")
        always = [s for s in re.split(r"[\s,]+", fields.get("scopes", "")) if s]
        asked = list(dict.fromkeys([*scopes, *always]))
        claims = {"iss": fields["client_email"], "aud": endpoint}
        if row.scoped and asked:
            claims["scope"] = row.scope_separator.join(asked)
        if subject := fields.get("subject"):
            claims["sub"] = subject
        now = datetime.now(UTC)
        assertion = signed(
            claims, rsa_key(fields["private_key"]), "RS256", now=now, lifetime=LIFETIME
        )
        answer = await self._registration.http.request(
            "POST",
            endpoint,
            provider=row.id,
            data={"grant_type": JWT_BEARER, "assertion": assertion},
            headers={"Accept": "application/json"},
        )
        return self._answered(answer, now, asked if row.scoped else None)
