"""What a browser understands of a page: forms, refreshes and the outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_SUBMITS = {"submit", "image"}
_CHOICES = {"checkbox", "radio"}
_NOT_SENT = {"button", "reset", "file"}


@dataclass
class Button:
    """Something that submits a form."""

    name: str
    value: str
    formaction: str = ""
    text: str = ""

    @property
    def words(self) -> set[str]:
        """All words a person could recognise it by, in lower case."""
        said = f"{self.name} {self.value} {self.text}".lower()
        return set("".join(c if c.isalnum() else " " for c in said).split())


@dataclass
class Form:
    """A form with the values it has before anybody types."""

    action: str
    method: str
    ident: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    buttons: list[Button] = field(default_factory=list)

    @property
    def wants_password(self) -> bool:
        return "password" in self.types.values()


@dataclass
class Page:
    """An HTML page as far as a flow is concerned."""

    forms: list[Form] = field(default_factory=list)
    refresh: str | None = None
    """Content of `<meta http-equiv="refresh">`."""
    outcome: str | None = None
    """Content of `<meta name="pocket-auth-outcome">`."""


def read_page(html: str) -> Page:
    """Parse *html*."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.page


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self._form: Form | None = None
        self._button: Button | None = None
        self._select: tuple[Form, str] | None = None
        self._textarea: tuple[Form, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "meta":
            self._meta(given)
        elif tag == "form":
            self._form = Form(
                action=given.get("action", ""),
                method=given.get("method", "get").lower(),
                ident=given.get("id", ""),
            )
            self.page.forms.append(self._form)
        elif form := self._owner(given.get("form", "")):
            self._control(form, tag, given)

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = None
        elif tag == "button":
            self._button = None
        elif tag == "select":
            self._select = None
        elif tag == "textarea":
            self._textarea = None

    def handle_data(self, data: str) -> None:
        if self._button:
            self._button.text += data
        if self._textarea:
            form, name = self._textarea
            form.fields[name] += data

    def _meta(self, given: dict[str, str]) -> None:
        if given.get("http-equiv", "").lower() == "refresh":
            self.page.refresh = given.get("content", "")
        elif given.get("name") == "pocket-auth-outcome":
            self.page.outcome = given.get("content", "")

    def _owner(self, ident: str) -> Form | None:
        if not ident:
            return self._form
        return next((f for f in self.page.forms if f.ident == ident), None)

    def _control(self, form: Form, tag: str, given: dict[str, str]) -> None:
        if "disabled" in given:
            return
        name = given.get("name", "")
        if tag in {"input", "button"}:
            self._input(form, tag, given)
        elif tag == "select" and name:
            self._select = (form, name)
        elif tag == "option" and self._select:
            owner, of = self._select
            if "selected" in given or of not in owner.fields:
                owner.fields[of] = given.get("value", "")
        elif tag == "textarea" and name:
            form.fields[name], form.types[name] = "", tag
            self._textarea = (form, name)

    def _input(self, form: Form, tag: str, given: dict[str, str]) -> None:
        name, value = given.get("name", ""), given.get("value", "")
        kind = given.get("type", "submit" if tag == "button" else "text").lower()
        if kind in _SUBMITS:
            button = Button(name, value, given.get("formaction", ""))
            form.buttons.append(button)
            if tag == "button":
                self._button = button
        elif not name or kind in _NOT_SENT:
            return
        elif kind in _CHOICES:
            if "checked" in given:
                form.fields[name] = given.get("value", "on")
        else:
            form.fields[name], form.types[name] = value, kind
