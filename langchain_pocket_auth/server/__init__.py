"""What browsers meet: the routes to mount, and a server that runs them."""

from ._background import BackgroundServer
from ._routes import make_router

__all__ = ["BackgroundServer", "make_router"]
