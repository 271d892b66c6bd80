"""Who may use the server. In this example, whoever says "Bearer alice" is alice."""

from langgraph_sdk import Auth

auth = Auth()


@auth.authenticate
async def authenticate(authorization: str | None) -> str:
    """Return the user's identity."""
    scheme, _, name = (authorization or "").partition(" ")
    if scheme != "Bearer" or not name:
        raise Auth.exceptions.HTTPException(status_code=401, detail="Who are you?")
    return name


@auth.on
async def own_only(ctx: Auth.types.AuthContext, value: dict) -> dict[str, str]:
    """Mark what a user makes, and show a user nothing else."""
    mine = {"owner": ctx.user.identity}
    value.setdefault("metadata", {}).update(mine)
    return mine
