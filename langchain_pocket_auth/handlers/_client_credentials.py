"""OAuth 2 client credentials: the app connects as itself (RFC 6749 section 4.4)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from .._errors import ConfigurationError, MissingClient, TokenRequestError
from .._futures import FutureData
from .._models import AuthContext
from .._placement import fill
from .._rows import Method, Provider
from ._answers import OAuth2Context, checked, context_of
from ._grant import GrantHandler, OAuth2Request

# A refresh token is not issued here (RFC 6749 section 4.4.3), and some servers refuse
# the request for one.
_OFFLINE = "offline_access"


class ClientCredentialsHandler(GrantHandler):
    """
    Connects the app itself, by its own id and secret; nobody is asked.

    There is no refresh token: a token that is over is replaced by a new one.
    """

    method: ClassVar[Method] = "client_credentials"

    @classmethod
    def _described(cls, row: Provider) -> str:
        return f"Connects the app itself to {row.label}."

    @classmethod
    def recommended_scopes(cls) -> set[str]:
        """Return the row's, unless those are for the accounts of people."""
        if cls.row.authorization_endpoint:
            return set()
        return super().recommended_scopes() - {_OFFLINE}

    @property
    def unattended(self) -> bool:
        return True

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> OAuth2Request:
        """
        Make the request, with the app's id and secret in it.

        Raises:
            MissingClient: One of them is not set; the text names the settings.
            ConfigurationError: A variable of the provider's URLs is not set.
        """
        del kwargs
        client = self._client
        # Confidential clients only (RFC 6749 section 4.4), whatever the row says.
        if not client.client_id or client.client_secret is None:
            raise MissingClient(
                f"{self.row.label} wants the app's id and secret: set "
                f"{self._setting}CLIENT_ID and {self._setting}CLIENT_SECRET"
            )
        self._variables(strict=True)
        return OAuth2Request(
            auth_scopes=list(auth_scopes or ()),
            client_id=client.client_id,
            client_secret=client.client_secret.get_secret_value(),
            redirect_uri="",
        )

    async def prepare(  # type: ignore[override]
        self,
        auth_req: OAuth2Request,
        thread_id: str,
        profile: str,
        future_uid: str,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        """
        Refuse: there is nobody to ask.

        Raises:
            ConfigurationError: Always.
        """
        del auth_req, thread_id, profile, future_uid, args, kwargs
        raise ConfigurationError(
            f"{self.name} connects the app itself: there is no page for a person"
        )

    async def authenticate(  # type: ignore[override]
        self,
        auth_req: OAuth2Request,
        future_uid: str,
        *args: Any,
        future: FutureData | None = None,
        **kwargs: Any,
    ) -> OAuth2Context:
        """
        Ask for a token (RFC 6749 section 4.4.2).

        Raises:
            ConfigurationError: The provider refuses the app, or these scopes to it.
            ProviderUnavailable: No usable answer; retry later.
        """
        del future_uid, args, future, kwargs
        return await self._asked(auth_req)

    async def refresh(  # type: ignore[override]
        self,
        auth_req: OAuth2Request,
        context: OAuth2Context,
        *args: Any,
        **kwargs: Any,
    ) -> OAuth2Context:
        """Ask for the next token; raises as `authenticate` does."""
        del context, args, kwargs
        return await self._asked(auth_req)

    async def _asked(self, request: OAuth2Request) -> OAuth2Context:
        row = await self._server()
        values = self._variables(strict=True)
        grant = {
            "grant_type": "client_credentials",
            **{k: fill(v, values) for k, v in row.token_parameters.items()},
            **self._resource,
        }
        needed = [s for s in row.required_scopes if s != _OFFLINE]
        scopes = list(dict.fromkeys([*(request.auth_scopes or ()), *needed]))
        if row.scoped and scopes:
            grant[row.scope_parameter] = row.scope_separator.join(scopes)
        app = await self._app(row, request)
        sent = datetime.now(UTC)
        answer = await self._requests(row).ask(
            self._url(row.token_endpoint or ""), app, grant
        )
        try:
            new = context_of(row, checked(row, answer), sent, row.token_response)
        except TokenRequestError as error:
            # There is no person who could do something about it.
            raise ConfigurationError(
                f"{error}: check what {row.label} allows the app {row.id!r} to do"
            ) from None
        update = {
            "description": f"{row.label} as the app itself",
            "scopes": scopes if new.scopes is None else new.scopes,
        }
        return new.model_copy(update=update)

    def can_refresh(self, context: AuthContext) -> bool:
        del context
        return True
