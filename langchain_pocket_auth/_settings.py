"""Settings from the constructor, the environment and a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

from pydantic import SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ._errors import ConfigurationError
from ._http import LOOPBACK_HOSTS
from ._rows import Client
from ._site import AccountMatcher, Site, VerifyUser

DEFAULT_BASE_URL = "http://127.0.0.1:8711"
"""A fixed port, because redirect URIs are registered with one."""

ClientLike: TypeAlias = Client | tuple[str, str] | Mapping[str, Any]


class _Environment(EnvSettingsSource):
    """Variables as they are: a key that happens to be a number of JSON is none."""

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        if field is None and not str(value).lstrip().startswith("{"):
            return value
        return super().decode_complex_value(field_name, field, value)


class Settings(BaseSettings):
    """
    What `POCKET_AUTH_*` variables and the settings file may say.

    The same names in both: `POCKET_AUTH_CLIENTS__GITHUB__CLIENT_ID` is
    `[clients.github] client_id`. The environment wins over the file.
    """

    model_config = SettingsConfigDict(
        env_prefix="POCKET_AUTH_",
        env_nested_delimiter="__",
        extra="ignore",
        hide_input_in_errors=True,
    )

    clients: dict[str, Client] = {}
    keys: SecretStr | None = None
    keys_file: Path | None = None
    storage: str | None = None
    base_url: str | None = None
    public_url: str | None = None

    def key_source(self) -> str | Path | None:
        """
        Return the keys, or the file that they are in.

        Raises:
            ConfigurationError: Both are set.
        """
        if self.keys and self.keys_file:
            raise ConfigurationError(
                "POCKET_AUTH_KEYS and POCKET_AUTH_KEYS_FILE are both set (or keys and "
                "keys_file in the settings file): keep one of them"
            )
        return self.keys.get_secret_value() if self.keys else self.keys_file

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del env_settings, dotenv_settings, file_secret_settings
        file = TomlConfigSettingsSource(
            settings_cls, settings_cls.model_config.get("toml_file")
        )
        return init_settings, _Environment(settings_cls), file


def read_settings(file: str | Path | None) -> Settings:
    """
    Read the environment and, if named, a settings file.

    Raises:
        ConfigurationError: A value or the file is wrong; no value is shown.
    """
    source: type[Settings] = Settings
    if file is not None:
        if not Path(file).is_file():
            raise ConfigurationError(f"there is no settings file {file}")

        class FromFile(Settings):
            model_config = SettingsConfigDict(toml_file=file)

        source = FromFile
    try:
        return source()
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigurationError(f"settings: {'; '.join(lines)}") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"settings: {type(error).__name__}: {error}") from None


def client_of(provider: str, value: ClientLike) -> Client:
    """
    Return an app registration written in any of its forms.

    Raises:
        ConfigurationError: It is in none of them.
    """
    if isinstance(value, Client):
        return value
    try:
        if isinstance(value, Mapping):
            return Client(**value)
        client_id, secret = [] if isinstance(value, str) else value
        return Client(client_id=client_id, client_secret=SecretStr(secret))
    except (ValidationError, TypeError, ValueError):
        raise ConfigurationError(
            f'clients[{provider!r}] is ("client id", "client secret") or '
            "Client(client_id=..., client_secret=...); a public client is "
            'Client(client_id="...")'
        ) from None


def site_of(
    base_url: str | None,
    public_url: str | None,
    *,
    verify_user: VerifyUser | None,
    confirm: Literal["code"] | None,
    account_matcher: AccountMatcher | None,
) -> Site:
    """
    Return where the app is reached, if that is safe as it is set.

    Raises:
        ConfigurationError: It is not, or an address cannot be one.
    """
    if base_url and public_url:
        raise ConfigurationError(
            "set base_url for this machine alone, or public_url for everybody, not both"
        )
    if confirm not in {None, "code"}:
        raise ConfigurationError('confirm= is "code" or nothing')
    for name, given in (
        ("verify_user", verify_user),
        ("account_matcher", account_matcher),
    ):
        if given is not None and not callable(given):
            raise ConfigurationError(
                f"{name}= takes the function itself, not a {type(given).__name__}"
            )
    if public_url and verify_user is None and confirm is None:
        raise ConfigurationError(
            "public_url needs verify_user=, which says who is signed in to your app, "
            'or confirm="code": without it, whoever is sent a link connects their '
            "account for the person who sent it"
        )
    return Site(
        url=_checked(public_url) if public_url else check_base_url(base_url or ""),
        public=bool(public_url),
        verify_user=verify_user,
        confirm=confirm,
        account_matcher=account_matcher,
    )


def check_public(storage: object, *, has_keys: bool) -> None:
    """
    Refuse what would be made up in each process, where several have to agree.

    Raises:
        ConfigurationError: The store or its keys are not named.
    """
    if storage is None:
        raise ConfigurationError(
            "public_url needs storage= (POCKET_AUTH_STORAGE) to be named: all "
            "processes that run agents or serve connect links use one store, such as "
            "postgresql://... or redis://..., or one SQLite file on one machine"
        )
    if storage != "memory://" and not has_keys:
        raise ConfigurationError(
            "public_url needs keys= (POCKET_AUTH_KEYS or POCKET_AUTH_KEYS_FILE), the "
            "same for all processes: `pocket-auth keys new` makes one"
        )


def _checked(public_url: str) -> str:
    parts = _plain_parts(public_url)
    if parts is None or parts.scheme != "https":
        raise ConfigurationError(
            "public_url must be like https://app.example.com or "
            f"https://app.example.com/agents, not {public_url!r}"
        )
    return public_url.rstrip("/")


def _plain_parts(url: str) -> SplitResult | None:
    """Return the parts of a URL that is host, port and path, and nothing else."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and not (parts.query or parts.fragment or "@" in url)
    except ValueError:
        return None
    return parts if plain and parts.hostname else None


def check_base_url(url: str) -> str:
    """
    Return *url*, or the default, without a trailing slash.

    Raises:
        ConfigurationError: It is not on this machine.
    """
    url = url or DEFAULT_BASE_URL
    parts = _plain_parts(url)
    if parts is None or parts.scheme not in {"http", "https"}:
        raise ConfigurationError(
            f"base_url must be like {DEFAULT_BASE_URL}, not {url!r}"
        )
    if parts.hostname not in LOOPBACK_HOSTS:
        raise ConfigurationError(
            f"base_url {url!r} is not on this machine: on a public address a link sent "
            "to somebody else would connect the wrong person's account; set public_url "
            "instead, with verify_user= or confirm=, or use http://127.0.0.1:<port>"
        )
    return url.rstrip("/")
