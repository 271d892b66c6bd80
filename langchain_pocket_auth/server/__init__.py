"""What browsers meet: the routes to mount, and a server that runs them."""

from ._background import BackgroundServer
from ._requests import callback_of
from ._routes import make_router

__all__ = ["BackgroundServer", "callback_of", "make_router"]
