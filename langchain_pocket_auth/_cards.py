"""Cards that notebooks show where a person has something to do."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

_BOX = (
    "border:1px solid #8886;border-radius:8px;padding:12px 16px;max-width:36em;"
    "font-family:system-ui,sans-serif"
)
_BUTTON = (
    "display:inline-block;margin-top:10px;padding:8px 16px;border-radius:6px;"
    "background:#1f6feb;color:#fff;text-decoration:none"
)


@dataclass(frozen=True, slots=True, repr=False)
class Card:
    """
    A few lines and a button, as HTML in a notebook and as text elsewhere.

    Attributes:
        title: What it is about.
        lines: What is to be known or done.
        url: Where the button leads, in a new tab.
        button: What it says.
    """

    title: str
    lines: tuple[str, ...] = ()
    url: str | None = None
    button: str = "Connect"

    def __repr__(self) -> str:
        return "\n".join(
            map(plain, [self.title, *self.lines, *([self.url] if self.url else [])])
        )

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{escape(line)}</div>" for line in self.lines)
        button = ""
        if self.url is not None and self.url.startswith(("https://", "http://")):
            button = (
                f'<a href="{escape(self.url)}" target="_blank" '
                f'rel="noopener noreferrer" style="{_BUTTON}">{escape(self.button)}</a>'
            )
        title = f"<strong>{escape(self.title)}</strong>"
        return f'<div style="{_BOX}">{title}{lines}{button}</div>'


def plain(text: str) -> str:
    """Return *text* without what could steer a terminal: others named some things."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
