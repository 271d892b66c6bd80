"""The accounts that the agent may use: one object, for the graph and for the routes."""

import os

from langchain_pocket_auth import PocketAuth, Provider

acme = Provider(
    id="acme",
    authorization_endpoint=os.environ["ACME_AUTHORIZATION_ENDPOINT"],
    token_endpoint=os.environ["ACME_TOKEN_ENDPOINT"],
)
# The rest is in the environment: POCKET_AUTH_BASE_URL (where this server is reached),
# POCKET_AUTH_STORAGE, POCKET_AUTH_KEYS, POCKET_AUTH_CLIENTS__ACME__CLIENT_ID, ...
pocket = PocketAuth(providers=[acme])
