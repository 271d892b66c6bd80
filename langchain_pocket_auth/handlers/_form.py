"""Credentials that a person types: an API key, a user and password, a key pair."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, ClassVar
from urllib.parse import quote

from .._errors import ConfigurationError, ProviderError
from .._futures import FutureData, FutureStore
from .._models import AuthContext, AuthenticateRequest
from .._placement import fill, placeholders
from .._row_parts import Form, FormField
from .._rows import Method, Provider
from ._row import RowHandler

MAX_VALUE_BYTES = 4 << 10  # the longest access tokens are JWTs of some 3 KiB
MAX_MULTILINE_BYTES = 64 << 10  # a key with its chain of certificates
# What ends a line or is no text: it could end a header, or cannot be stored.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_IN_LINES = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class FormRequest(AuthenticateRequest):
    """A request of a form; needs nothing but what is typed."""

    client_id: str | None = None
    """Tells the credential in the app's settings: a session of another is not used."""


class FormContext(AuthContext):
    """What was typed; `access_token` is the part that the others go with."""

    fields: dict[str, str]
    """Values by the names of the form's fields; secrets, all of them."""

    def _secret(self, name: str) -> str | None:
        return self.access_token if name == "access_token" else self.fields.get(name)


class FormHandler(RowHandler):
    """
    The handler of a row's form, which this package shows and reads itself.

    If the app's settings hold all that the form requires, nobody is asked: the app
    itself connects (`clients={"openai": {"token": "sk-…"}}`).
    """

    method: ClassVar[Method] = "token"
    # Some have to make a key first.
    attempt_ttl: ClassVar[timedelta] = timedelta(minutes=30)

    @classmethod
    def _described(cls, row: Provider) -> str:
        return f"Connects {row.label} by what a person types into a form."

    @property
    def form(self) -> Form:
        """The form, as the row describes it."""
        if (form := self.row.form(self.method)) is None:
            raise ConfigurationError(
                f"{self.name}: the row of {self.row.id!r} has no {self.method} form"
            )
        return form

    @property
    def segment(self) -> str:
        """What the form's address says after the provider: `token`, `basicauth`."""
        prefix = f"{self.row.id}-".replace("_", "-")
        own = self.name.startswith(prefix)
        return quote(self.name.removeprefix(prefix) if own else self.method, safe="")

    @property
    def address(self) -> str:
        """The page that shows the form, without the attempt."""
        base_url = self._registration.base_url
        return f"{base_url}/auth/{self.row.id}/{self.segment}/form"

    # ------------------------------------------------------------------- the spec's

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> FormRequest:
        """
        Make the request; a form needs nothing of the app.

        Raises:
            ConfigurationError: The settings hold a credential that does not fit.
        """
        del kwargs
        known = None
        if self.unattended:
            values = repr(sorted(self._of_settings().items()))
            known = f"settings:{hashlib.sha256(values.encode()).hexdigest()}"
        return FormRequest(auth_scopes=list(auth_scopes or ()), client_id=known)

    def prepare(
        self,
        auth_req: AuthenticateRequest,
        thread_id: str,
        profile: str,
        future_uid: str,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        """Return the page of ours that shows the form."""
        del auth_req, thread_id, profile, args, kwargs
        return f"{self.address}?state={quote(future_uid, safe='')}"

    async def authenticate(
        self,
        auth_req: AuthenticateRequest,
        future_uid: str,
        *args: Any,
        future: FutureData | None = None,
        **kwargs: Any,
    ) -> FormContext:
        """
        Return what was typed, or what the app's settings hold.

        Raises:
            ConfigurationError: A value of the settings does not fit.
            ProviderError: A value that was typed does not; the link works again.
        """
        del auth_req, args, kwargs
        if future is None and self.unattended:
            return self._context(self._of_settings())
        attempt = future or FutureStore.get_future(future_uid)
        typed = await attempt.future
        if not isinstance(typed, Mapping):
            raise ProviderError(
                f"{self.name}: the answer is not of its form", provider=self.row.id
            )
        values, problems = self.checked(typed)
        for name, problem in problems.items():
            label = self.form.fields[name].label
            raise ProviderError(f"{label} {problem}", provider=self.row.id)
        return self._context(values)

    def _context(self, values: dict[str, str]) -> FormContext:
        return FormContext(
            access_token=self._token(values),
            description=f"{self.row.label} credential",
            expires_at=None,
            fields=values,
        )

    def _token(self, values: Mapping[str, str]) -> str:
        if self.method == "basic" and (pair := self._pair(values)):
            return pair
        return values.get("token") or next(self._typed_secrets(values), "")

    def _pair(self, values: Mapping[str, str]) -> str | None:
        """Return the credentials of RFC 7617, where the API takes them."""
        place = self.form.api_credential
        if place.username is None:
            return None
        pair = f"{fill(place.username, values)}:{fill(place.password or '', values)}"
        return base64.b64encode(pair.encode()).decode()

    def _typed_secrets(self, values: Mapping[str, str]) -> Iterator[str]:
        fields = self.form.fields.items()
        return (values[name] for name, f in fields if f.secret and name in values)

    # --------------------------------------------------------------- what was typed

    def checked(
        self, given: Mapping[str, Any]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """
        Return the values to keep, and what is wrong by the names of fields.

        Space around a value is dropped. What is wrong never quotes the value.
        """
        values: dict[str, str] = {}
        problems: dict[str, str] = {}
        for name, field in self.form.fields.items():
            value = given.get(name)
            value = value.strip() if isinstance(value, str) else ""
            if field.multiline:
                value = value.replace("\r\n", "\n")  # as browsers send lines
            if problem := self._problem(name, field, value):
                problems[name] = problem
            elif value:
                values[name] = value
        return values, problems

    def _problem(self, name: str, field: FormField, value: str) -> str | None:
        if not value:
            return "is missing." if field.required else None
        limit = MAX_MULTILINE_BYTES if field.multiline else MAX_VALUE_BYTES
        if (_CONTROL_IN_LINES if field.multiline else _CONTROL).search(value):
            return "holds a line break or a character that cannot be typed."
        if len(value.encode()) > limit:
            return f"is too long: {limit >> 10} KiB at most."
        # What copying a masked or formatted key brings; a header takes ASCII only.
        if name in self._in_headers and not value.isascii():
            return "holds a character that does not belong there: copy it again."
        if field.pattern and not re.fullmatch(field.pattern, value):
            return "does not look as it should."
        return None

    @property
    def _in_headers(self) -> set[str]:
        form, place = self.form, self.form.api_credential
        names = placeholders(*form.api_headers.values())
        elsewhere = (place.query, place.username, place.url)
        bearer = all(p is None for p in elsewhere) and not place.signature
        return names | {"token"} if bearer else names

    # ------------------------------------------------------------ the app's settings

    @property
    def unattended(self) -> bool:
        """Whether the app's settings hold what the form requires."""
        given = self._settings()
        fields = self.form.fields.items()
        return all(name in given for name, f in fields if f.required) and bool(given)

    def _settings(self) -> dict[str, str]:
        registration = self.registration
        client = registration.client if registration else None
        if client is None:
            return {}
        # A field may have the name of something that every registration has.
        own = {"client_id": client.client_id}
        if client.client_secret:
            own["client_secret"] = client.client_secret.get_secret_value()
        given = {**client.variables, **own}
        return {n: v for n in self.form.fields if (v := given.get(n, "").strip())}

    def _of_settings(self) -> dict[str, str]:
        values, problems = self.checked(self._settings())
        for name, problem in problems.items():
            setting = f"{self._setting}{name.upper()}"
            raise ConfigurationError(
                f"{self.row.label} cannot connect with the app's settings: {setting} "
                f"{problem.rstrip('.')}"
            )
        return values

    # ------------------------------------------------------- what the engine asks

    def connection(self) -> str:
        """The handler: what is typed says which tenant it is of."""
        return self.name

    def read_callback(self, parameters: Mapping[str, str]) -> Any:
        """Nothing: a credential does not arrive in a URL."""
        del parameters

    @property
    def _api(self) -> Form:
        return self.form

    def _values(self, context: AuthContext) -> dict[str, str]:
        fields = context.fields if isinstance(context, FormContext) else {}
        return {"token": context.access_token} | fields

    def secrets(self, context: AuthContext) -> tuple[str, ...]:
        values = self._values(context)
        found = {context.access_token, *self._typed_secrets(values)}
        found |= {self._pair(values) or ""}
        # As `repr` and JSON show a key of several lines.
        found |= {text.replace("\n", "\\n") for text in found}
        return tuple(found - {""})

    def environment(self) -> dict[str, str]:
        """Return a key for each field, and the form's own for the access token."""
        form, prefix = self.form, self.row.env_prefix
        keys = {
            field.env_key or f"{prefix}_{name.upper()}": name
            for name, field in form.fields.items()
        }
        return keys | dict.fromkeys(form.env_keys, "access_token")
