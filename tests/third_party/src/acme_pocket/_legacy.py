"""A handler as "How to implement auth" describes it, for Acme's old login."""

import base64
import hashlib
import os
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from urllib.parse import urlencode

import httpx
from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from langchain_pocket_auth import (
    AuthContext,
    AuthenticateRequest,
    AuthenticateResponse,
    AuthHandlerInterface,
    FutureStore,
)

from ._rows import URL

router = APIRouter(prefix="/acme-legacy")


@router.get("/oauth2/callback")
async def callback(code: str, state: str) -> HTMLResponse:
    FutureStore.resolve_future(state, code)
    return HTMLResponse("success")


class LegacyRequest(AuthenticateRequest):
    client_id: str
    client_secret: str


class LegacyResponse(AuthenticateResponse):
    access_token: str
    expires_in: int
    refresh_token: str
    scope: str


class LegacyContext(AuthContext):
    def to_dict(self) -> dict[str, str]:
        return {"ACME_LEGACY_TOKEN": self.access_token}

    def to_profiled_dict(self, profile: str) -> dict[str, str]:
        return {f"{profile.upper()}_ACME_LEGACY_TOKEN": self.access_token}

    @classmethod
    def from_response(cls, response: LegacyResponse) -> Self:
        lifetime = timedelta(seconds=response.expires_in)
        return cls(
            access_token=response.access_token,
            description=f"Acme, for {response.scope}",
            expires_at=datetime.now(UTC) + lifetime,
            detail=response,
        )


class AcmeLegacyHandler(AuthHandlerInterface):
    name = "acme-legacy-oauth2"
    description = "Connects accounts of Acme's old login."
    scoped = True
    router = router

    @staticmethod
    def provider() -> str:
        return "acme-legacy"

    @staticmethod
    def provider_default() -> bool:
        return True

    @staticmethod
    def recommended_scopes() -> set[str]:
        return {"read"}

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> LegacyRequest:
        return LegacyRequest(
            auth_scopes=auth_scopes,
            client_id=os.environ["ACME_LEGACY_CLIENT_ID"],
            client_secret=os.environ["ACME_LEGACY_CLIENT_SECRET"],
        )

    def prepare(
        self,
        auth_req: AuthenticateRequest,
        thread_id: str,
        profile: str,
        future_uid: str,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        assert isinstance(auth_req, LegacyRequest)
        verifier = secrets.token_urlsafe(48)
        redirect_uri = os.environ["ACME_LEGACY_REDIRECT_URI"]
        FutureStore.create_future(
            future_uid,
            data={
                "redirect_uri": redirect_uri,
                "thread_id": thread_id,
                "profile": profile,
                "verifier": verifier,
            },
        )
        digest = hashlib.sha256(verifier.encode()).digest()
        query = {
            "response_type": "code",
            "client_id": auth_req.client_id,
            "redirect_uri": redirect_uri,
            "scope": " ".join(auth_req.auth_scopes or ()),
            "state": future_uid,
            "code_challenge": base64.urlsafe_b64encode(digest).decode().rstrip("="),
            "code_challenge_method": "S256",
        }
        url = f"{URL}/authorize?{urlencode(query)}"
        return f"User needs to authenticate using the following URL: {url}"

    async def authenticate(
        self, auth_req: AuthenticateRequest, future_uid: str, *args: Any, **kwargs: Any
    ) -> LegacyContext:
        future = FutureStore.get_future(future_uid)
        return await self._ask(
            auth_req,
            grant_type="authorization_code",
            code=await future.future,
            redirect_uri=future.data["redirect_uri"],
            code_verifier=future.data["verifier"],
        )

    async def refresh(
        self,
        auth_req: AuthenticateRequest,
        context: AuthContext,
        *args: Any,
        **kwargs: Any,
    ) -> LegacyContext:
        last = context.detail
        assert isinstance(last, LegacyResponse)
        return await self._ask(
            auth_req, grant_type="refresh_token", refresh_token=last.refresh_token
        )

    async def _ask(self, auth_req: AuthenticateRequest, **form: str) -> LegacyContext:
        assert isinstance(auth_req, LegacyRequest)
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.post(
                f"{URL}/token",
                data=form,
                auth=(auth_req.client_id, auth_req.client_secret),
            )
        answer.raise_for_status()
        return LegacyContext.from_response(LegacyResponse(**answer.json()))
