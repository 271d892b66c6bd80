"""Devices without a browser at the test authorization server (RFC 8628)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from authlib.oauth2.rfc6749.errors import InvalidGrantError, InvalidScopeError
from authlib.oauth2.rfc8628 import DeviceAuthorizationEndpoint
from authlib.oauth2.rfc8628 import DeviceCodeGrant as BaseGrant
from flask import g

from ._ledger import Client, Device

if TYPE_CHECKING:
    from ._grants import Protocol


class DeviceAuthorization(DeviceAuthorizationEndpoint):  # type: ignore[misc]
    """Gives out the two codes."""

    server: Protocol

    @property
    def EXPIRES_IN(self) -> float:  # noqa: N802
        """Authlib's name."""
        return _whole(self.server.ledger.device_code_ttl_s)

    @property
    def INTERVAL(self) -> float:  # noqa: N802
        """Authlib's name."""
        return _whole(self.server.ledger.device_interval_s)

    def get_verification_uri(self) -> str:
        return f"{self.server.ledger.origin}/device"

    def authenticate_client(self, request: Any) -> Client:
        # Older versions of Authlib give the next method the form's `client_id` only.
        client: Client = super().authenticate_client(request)
        g.client = client
        return client

    def save_device_credential(
        self, _client_id: str | None, scope: str | None, data: dict[str, Any]
    ) -> None:
        ledger, client = self.server.ledger, g.client
        if not client.may_ask_for(scope):
            raise InvalidScopeError
        device = Device(
            client.client_id,
            scope or " ".join(sorted(client.scopes or ())),
            data["user_code"],
            ledger.device_interval_s,
            ledger.now() + ledger.device_code_ttl_s,
            ledger.now,
        )
        ledger.add_device(data["device_code"], device)


class DeviceCodeGrant(BaseGrant):  # type: ignore[misc]
    """Answers the polls of a device."""

    server: Protocol

    def query_device_credential(self, device_code: str) -> Device:
        device = self.server.ledger.find_device(device_code)
        if device is None:
            raise InvalidGrantError
        self._device = device
        return device

    def query_user_grant(self, _user_code: str) -> tuple[str, bool] | None:
        device = self._device
        if device.grant:
            return device.grant.username, True
        return ("", False) if device.denied else None

    def should_slow_down(self, credential: Device) -> bool:
        return self.server.ledger.polls_too_fast(credential)


def _whole(seconds: float) -> float:
    return int(seconds) if seconds == int(seconds) else seconds
