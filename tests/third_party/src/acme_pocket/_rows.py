"""What Acme is, as values, and the one oddity of its admin API that is none."""

import os
from collections.abc import Collection

from langchain_pocket_auth import OAuth2Handler, Provider

URL = os.environ.get("ACME_URL", "https://acme.example")

ACME = Provider(
    id="acme",
    display_name="Acme",
    issuer=URL,
    authorization_endpoint=f"{URL}/authorize",
    token_endpoint=f"{URL}/token",
    revocation_endpoint=f"{URL}/revoke",
    authorization_response_iss_parameter_supported=True,
)


class AcmeAdminHandler(OAuth2Handler):
    """Acme's admin API: who may write may read, and answers do not say so."""

    row = Provider(
        id="acme-admin",
        display_name="Acme Admin",
        authorization_endpoint=f"{URL}/authorize",
        token_endpoint=f"{URL}/token",
        env_keys=("ACME_ADMIN",),
    )

    def missing_scopes(
        self, granted: Collection[str], needed: Collection[str]
    ) -> list[str]:
        readable = [s.replace("write", "read") for s in granted]
        return super().missing_scopes([*granted, *readable], needed)
