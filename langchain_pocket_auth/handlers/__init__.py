"""Ways of authenticating."""

from ._answers import OAuth2Context
from ._base import AuthHandlerInterface
from ._form import FormContext, FormHandler
from ._grant import OAuth2Request
from ._oauth2 import OAuth2Handler

__all__ = [
    "AuthHandlerInterface",
    "FormContext",
    "FormHandler",
    "OAuth2Context",
    "OAuth2Handler",
    "OAuth2Request",
]
