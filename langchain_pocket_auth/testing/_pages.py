"""The pages a person meets at the test authorization server."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from urllib.parse import urlsplit

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; background: #f3f4f6;
  color: #111827; }
main { max-width: 25rem; margin: 10vh auto; padding: 2rem; background: #fff;
  border-radius: .75rem; box-shadow: 0 1px 4px #0003; }
h1 { font-size: 1.25rem; margin: 0 0 1rem; }
label { display: block; margin: .75rem 0; }
input { display: block; width: 100%; box-sizing: border-box; padding: .5rem;
  font: inherit; }
li { font-family: ui-monospace, monospace; }
button { font: inherit; padding: .5rem 1.25rem; margin: 1rem .5rem 0 0; }
small { color: #6b7280; }
[role=alert] { color: #b91c1c; }
@media (prefers-color-scheme: dark) {
  body { background: #111827; color: #f3f4f6; } main { background: #1f2937; }
}
"""


def page_headers(redirect_uri: str = "") -> dict[str, str]:
    """
    Headers of every page.

    Chromium applies `form-action` to the redirects after a form as well, so it
    has to name where the answer to the client goes.
    """
    target = "'self' http://127.0.0.1:* http://localhost:*"
    parts = urlsplit(redirect_uri)
    if parts.scheme in {"http", "https"} and parts.netloc:
        target += f" {parts.scheme}://{parts.netloc}"
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": (
            "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
            f"frame-ancestors 'none'; form-action {target}"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def login_page(*, client_id: str, action: str, username: str, failed: bool) -> str:
    """Ask who the person is."""
    alert = "<p role=alert>Wrong username or password.</p>" if failed else ""
    return _page(
        "Sign in",
        f"""<p>to continue to <strong>{escape(client_id)}</strong></p>{alert}
<form method="post" action="{escape(action)}">
<label>Username <input name="username" value="{escape(username)}" required
  autocomplete="username"></label>
<label>Password <input name="password" type="password" required
  autocomplete="current-password"></label>
<button>Sign in</button>
</form>
<p><small>A test server: anybody may sign in as <em>name</em> with the password
<em>name</em>-password.</small></p>""",
    )


def consent_page(
    *,
    client_id: str,
    scopes: Iterable[str],
    action: str,
    csrf: str,
    username: str,
    note: str = "",
) -> str:
    """Ask whether the application may do what it asks for."""
    items = "".join(f"<li>{escape(scope)}</li>" for scope in scopes)
    return _page(
        f"Allow {client_id}?",
        f"""<p><strong>{escape(client_id)}</strong> asks to act for
<strong>{escape(username)}</strong> with:</p><ul>{items}</ul>
{f"<p>{escape(note)}</p>" if note else ""}
<form method="post" action="{escape(action)}">
<input type="hidden" name="csrf" value="{escape(csrf)}">
<button name="decision" value="approve">Approve</button>
<button name="decision" value="deny">Deny</button>
</form>""",
    )


def device_page(*, action: str) -> str:
    """Ask for the code that a device shows."""
    return _page(
        "Connect a device",
        f"""<form method="get" action="{escape(action)}">
<label>Code <input name="user_code" required autocomplete="off"></label>
<button>Continue</button>
</form>""",
    )


def done_page() -> str:
    """Say that a device will know."""
    return _page("Done", "<p>You may go back to your device.</p>")


def error_page(error: str, description: str) -> str:
    """Say what is wrong with a request that cannot be answered to its client."""
    return _page(
        "This request cannot be answered",
        f"<p role=alert>{escape(error)}</p><p>{escape(description)}</p>",
    )


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><main><h1>{escape(title)}</h1>
{body}
</main></body></html>
"""
