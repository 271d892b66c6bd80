"""The catalog: its data holds together, is read lazily, and refuses what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from langchain_pocket_auth import (
    AuthProvider,
    ConfigurationError,
    PocketAuth,
    Provider,
    UnknownProvider,
)
from langchain_pocket_auth._catalog import BUNDLED, Catalog, read_providers
from langchain_pocket_auth._providers import ALIASES

TABLES: dict[str, dict[str, Any]] = tomllib.loads(BUNDLED.read_text(encoding="utf-8"))
CATALOG = Catalog()
ROWS = [CATALOG.get(provider) for provider in CATALOG]
HANDLERS = [row.handler_name(method) for row in ROWS for method in row.methods]


# ------------------------------------------------------------------- the bundled data


def test_rows_are_sorted_and_complete() -> None:
    """235 providers, in the order of their ids, so that a new row has one place."""
    assert list(TABLES) == sorted(TABLES) == list(CATALOG)
    assert len(TABLES) == 235


def test_handlers_are_complete() -> None:
    """The 287 of the data, and four more that the app connects by itself."""
    counted = Counter(method for row in ROWS for method in row.methods)
    assert counted.pop("client_credentials") == 4
    assert counted == {"oauth2": 150, "token": 125, "basic": 7, "keypair": 5}
    assert counted.total() == 287


def test_name_of_a_handler_is_one_handler_s_only() -> None:
    """A stored session is found by the name of its handler."""
    assert [name for name, n in Counter(HANDLERS).items() if n > 1] == []


def test_row_read_alone_is_the_row_of_the_whole_file() -> None:
    """Cutting the file into sections loses nothing and mixes nothing."""
    for row in ROWS:
        assert row == Provider(id=row.id, **TABLES[row.id])


def test_whole_file_is_a_providers_file() -> None:
    """The bundled file is in the format that is documented for one's own."""
    assert read_providers(BUNDLED) == ROWS


def test_enumeration_lists_the_bundled_ids() -> None:
    """What an editor completes is what there is."""
    source = Path(sys.modules[AuthProvider.__module__].__file__ or "").read_text()
    members = re.findall(r'^    ([A-Z0-9_]+) = "([a-z0-9_]+)"$', source, re.MULTILINE)
    assert [value for _, value in members] == list(TABLES)
    assert all(name == value.upper() for name, value in members)
    assert all(AuthProvider[name] == value for name, value in members)


def test_aliases_are_those_of_the_rows() -> None:
    """The package knows them without reading the file, and no alias hides an id."""
    told = {alias: row.id for row in ROWS for alias in row.aliases}
    assert told == ALIASES
    assert list(ALIASES) == sorted(ALIASES)
    assert not ALIASES.keys() & TABLES.keys()
    assert all(CATALOG.get(alias).id == provider for alias, provider in told.items())


def test_row_says_where_its_facts_are_from() -> None:
    """A link and a day; without a link there is no source, and no service to read of."""
    for row in ROWS:
        assert row.checked is not None, row.id
        assert row.sources is not None, row.id
        assert row.display_name, row.id
        assert row.category, row.id
        if row.docs is None:
            assert row.sources == 0, row.id
            assert row.id in {"apitoken", "basicauth"}, "these are no services"
        else:
            assert row.docs.startswith("https://"), row.id


def test_unverified_key_is_a_fact_of_its_row() -> None:
    """What is marked as unseen is stated there, by a key or by its default."""
    for row in ROWS:
        for key in row.unverified:
            fact: Any = row
            for name in key.split("."):
                fact = fact[name] if isinstance(fact, dict) else getattr(fact, name)
            assert fact not in (None, (), {}, ""), (row.id, key)


def test_handler_is_found_by_its_name() -> None:
    """The name tells the provider, or the row could not be read alone."""
    for name in HANDLERS:
        pocket = PocketAuth("memory://")  # which has read no row yet
        assert pocket.find_handler_instance(name).name == name


# ------------------------------------------------------------------- lazily, and once


def test_import_reads_no_row() -> None:
    """`import` does not pay for the catalog, nor does naming a provider."""
    script = """if True:
        import sys
        opened = []
        sys.addaudithook(
            lambda event, args: opened.append(str(args[0])) if event == "open" else None
        )
        from langchain_pocket_auth import *
        import langchain_pocket_auth
        pocket = langchain_pocket_auth.PocketAuth("memory://")
        langchain_pocket_auth.AuthProvider("sendgird")
        print(sum(path.endswith("providers.toml") for path in opened))
        pocket.find_handler_instance("github-oauth2")
        pocket.find_handler_instance("slack-oauth2")
        print(sum(path.endswith("providers.toml") for path in opened))
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["0", "1"], "")


# -------------------------------------------------------------------- what is refused

OAUTH2 = {
    "authorization_endpoint": "https://a.test/authorize",
    "token_endpoint": "https://a.test/token",
}
REGIONAL = """
authorization_endpoint = "https://a.test/authorize"
token_endpoint = "https://{region}.a.test/token"
"""
FORM = '[own.token]\napi_credential = { header = "X-Key" }\n'

# What stands in the row, and what the error has to name.
WRONG = {
    # unknown keys, at each depth
    "unknown key": ('scope_seperator = ","\n', "scope_seperator"),
    "unknown key of a form": (FORM + 'hint = "x"\n', "token.hint"),
    "unknown key of a field": (
        '[own.token.fields]\ntoken = { label = "Key", secret = true, mask = true }',
        "token.fields.token.mask",
    ),
    "unknown key of a place": (
        '[own.token]\napi_credential = { cookie = "k" }',
        "token.api_credential.cookie",
    ),
    "unknown key of a variable": (
        REGIONAL + "[own.variables.region]\nregex = 'eu|us'",
        "variables.region.regex",
    ),
    "unknown key of a revocation": (
        '[own.revocation]\nendpoint = "https://a.test/r"\nverb = "PUT"',
        "revocation.verb",
    ),
    "unknown member of an answer": (
        'token_response = { acces_token = "data.token" }',
        "acces_token",
    ),
    "another id inside": ('id = "other"\n', "id"),
    # wrong types and values
    "text for a list": ('required_scopes = "read"\n', "required_scopes"),
    "number for a text": ("scope_separator = 1\n", "scope_separator"),
    "no truth value": ('scoped = "maybe"\n', "scoped"),
    "no day": ('checked = "last week"\n', "checked"),
    "text for a form": ('token = "yes"\n', "token"),
    "PKCE that is plain": ('code_challenge_method = "plain"\n', "code_challenge_meth"),
    "method that is none": ('token_request_method = "PUT"\n', "token_request_method"),
    "default that is not offered": ('default_method = "token"\n', "default_method"),
    "no pattern": (
        REGIONAL + '[own.variables.region]\npattern = "["',
        "variables.region.pattern",
    ),
    "no pattern of a field": (
        '[own.token.fields]\ntoken = { label = "K", secret = true, pattern = "(" }',
        "token.fields.token.pattern",
    ),
    # placeholders and variables
    "unknown placeholder of a URL": (REGIONAL, "region"),
    "unknown placeholder of a parameter": (
        'token_parameters = { audience = "{site}" }\n',
        "site",
    ),
    "unknown placeholder of a header": ('api_headers = { X = "{site}" }\n', "site"),
    "unknown placeholder of the API": (
        'api_base_url = "https://{site}.test"\n',
        "site",
    ),
    "unknown placeholder of a form": (
        '[own.token]\napi_credential = { username = "{user}", password = "{token}" }',
        r"token: .*user",
    ),
    "unknown placeholder of a revocation": (
        '[own.revocation]\nendpoint = "https://a.test/r"\nparameters = { x = "{site}" }',
        "site",
    ),
    "unused variable": ('[own.variables.region]\ndefault = "eu"', "region"),
    "default that does not fit": (
        REGIONAL + "[own.variables.region]\npattern = 'eu|us'\ndefault = 'de'",
        "variables.region",
    ),
    "callback names any host": (
        REGIONAL + '[own.variables.region]\ncallback_parameter = "location"',
        "variables.region",
    ),
    # credentials
    "two places": (
        'api_credential = { header = "X-Key", query = "key" }\n',
        "api_credential",
    ),
    "two places of a form": (
        '[own.token]\napi_credential = { url = "https://a.test/{token}", query = "k" }',
        "token.api_credential",
    ),
    "half of a pair": (
        '[own.token]\napi_credential = { username = "{token}" }',
        "token.api_credential",
    ),
    "credential without TLS": (
        '[own.token]\napi_credential = { url = "http://a.test/{token}" }',
        "token.api_credential",
    ),
    "form without a secret": (
        '[own.basic.fields]\nuser = { label = "User" }',
        "basic: .*secret",
    ),
    "form without a field": ("[own.basic]\nfields = {}", "basic: .*field"),
    "field without a label": (
        "[own.token.fields]\ntoken = { secret = true }",
        "token.fields.token.label",
    ),
    # further requests
    "revocation without TLS": (
        '[own.revocation]\nendpoint = "http://a.test/r"',
        "revocation.endpoint",
    ),
    "look-up that keeps nothing": (
        '[own.account_lookup]\nendpoint = "https://a.test/accounts"',
        "account_lookup.members",
    ),
    "exchange with nobody": (
        '[own.token_exchange]\ngrant_type = "x"',
        "token_exchange.endpoint",
    ),
}


def _text(rest: str) -> str:
    """Return a row that is right but for *rest*."""
    facts = "".join(f'{k} = "{v}"\n' for k, v in OAUTH2.items() if k not in rest)
    return f"[own]\n{facts}{rest}\n"


def test_row_that_the_wrong_ones_are_made_of_is_right(tmp_path: Path) -> None:
    """What is refused below is refused for what was added."""
    file = tmp_path / "own.toml"
    file.write_text(_text(FORM))
    assert [row.methods for row in read_providers(file)] == [("oauth2", "token")]
    file.write_text(_text(REGIONAL + "[own.variables.region]\npattern = 'eu|us'"))
    assert [row.methods for row in read_providers(file)] == [("oauth2",)]


@pytest.mark.parametrize(("rest", "named"), WRONG.values(), ids=WRONG)
def test_wrong_row_of_a_file_is_refused_by_file_row_and_key(
    tmp_path: Path, rest: str, named: str
) -> None:
    """The developer reads where to look, before anything is asked or sent."""
    file = tmp_path / "own.toml"
    file.write_text(_text(rest))
    with pytest.raises(ConfigurationError, match=rf"own\.toml: \[own\]: .*{named}"):
        PocketAuth("memory://", providers=[file])


@pytest.mark.parametrize(
    ("rest", "named"),
    [wrong for name, wrong in WRONG.items() if name != "another id inside"],
    ids=[name for name in WRONG if name != "another id inside"],
)
def test_wrong_row_in_python_is_refused_alike(rest: str, named: str) -> None:
    """`Provider(...)` has the same rules as a file."""
    [table] = tomllib.loads(_text(rest)).values()
    with pytest.raises(ValidationError) as caught:
        Provider(id="own", **table)
    parts = [(".".join(map(str, e["loc"])), e["msg"]) for e in caught.value.errors()]
    assert any(re.search(named, f"{key}: {text}") for key, text in parts)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[own]\n", r"\[own\]: .*no way to authenticate"),
        ('[own]\nauthorization_endpoint = "https://a.test/"', "needs a token_endpoint"),
        ("own = 1", r"\[own\] is no table"),
        ("[own", "own.toml"),
        ("[Own]\ntoken = {}", r"own.toml.*'Own' is no provider id"),
        ('["a b"]\ntoken = {}', r"own.toml.*'a b' is no provider id"),
    ],
)
def test_file_that_holds_no_provider_is_refused(
    tmp_path: Path, text: str, named: str
) -> None:
    """The text names the file and what is wrong with it."""
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=named):
        PocketAuth("memory://", providers=[file])


def test_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    """Not as an `OSError` from nowhere."""
    with pytest.raises(ConfigurationError, match=r"missing\.toml"):
        PocketAuth("memory://", providers=[tmp_path / "missing.toml"])


# ---------------------------------------------------------------- own rows, and others


@pytest.mark.parametrize(
    ("asked", "suggested"),
    [("githib", "github"), ("slak", "slack"), ("sendgrd", "sendgrid"), ("ownn", "own")],
)
def test_unknown_provider_is_told_with_similar_ones(asked: str, suggested: str) -> None:
    """A typing error is found by reading the message."""
    pocket = PocketAuth("memory://", providers=[Provider(id="own", **OAUTH2)])
    with pytest.raises(UnknownProvider, match=rf"'{asked}': did you mean.*{suggested}"):
        pocket.make_request(auth_provider=asked)


def test_unknown_provider_like_no_other_says_how_to_add_it() -> None:
    """There is nothing to guess then."""
    with pytest.raises(UnknownProvider, match=r"'qqqqqq'; .*Provider\(") as caught:
        Catalog().get("qqqqqq")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("how", ["file", "object"])
@pytest.mark.parametrize("provider", ["github", "sendgrid"])
def test_own_row_replaces_a_bundled_one(
    tmp_path: Path, how: str, provider: str
) -> None:
    """Whole: no fact of the bundled row remains, also under its alias."""
    file = tmp_path / "own.toml"
    lines = [f'{key} = "{url}"' for key, url in OAUTH2.items()]
    file.write_text("\n".join([f"[{provider}]", *lines]))
    own = Provider(id=provider, **OAUTH2)
    pocket = PocketAuth(
        "memory://",
        providers=[file if how == "file" else own],
        clients={provider: ("id", "secret")},
    )
    for name in (provider, {"sendgrid": "sendgird"}.get(provider, provider)):
        handler: Any = pocket.find_handler_instance(auth_provider=name)
        assert handler.row == own
    with pytest.raises(UnknownProvider):
        pocket.find_handler_instance(f"{provider}-token")


def test_own_row_may_have_the_id_that_is_an_alias_elsewhere() -> None:
    """`twitter` means x, until the app has a row of that name."""
    own = Provider(id="twitter", **OAUTH2)
    assert Catalog().get("twitter").id == "x"
    assert Catalog([own]).get("twitter") is own
    assert Catalog([own]).get("x").id == "x"


def test_own_row_is_found_by_its_own_alias() -> None:
    """What a row says is true of an own row too."""
    own = Provider(id="acme", aliases=("acme-inc",), **OAUTH2)
    pocket = PocketAuth("memory://", providers=[own])
    for name in ("acme", "acme-inc"):
        found = pocket.find_handler_instance(auth_provider=name)
        assert found.name == "acme-oauth2"


@pytest.mark.parametrize("provider", ["own", "my-own", "my_own", "my-own_2"])
@pytest.mark.parametrize("name", [None, "key-of-own"])
def test_handler_of_an_own_row_is_found_by_name(
    provider: str, name: str | None
) -> None:
    """However the id is written, and whatever the row calls the handler."""
    own = Provider(id=provider, token={"handler": name} if name else {}, **OAUTH2)
    pocket = PocketAuth("memory://", providers=[own])
    for handler in map(own.handler_name, own.methods):
        assert pocket.find_handler_instance(handler).name == handler


def test_two_ways_of_a_row_with_one_name_are_refused() -> None:
    """One of them could never be reached."""
    with pytest.raises(ValidationError, match="own-oauth2"):
        Provider(id="own", token={"handler": "own-oauth2"}, **OAUTH2)


def test_later_own_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    """A deployment's file may correct what the code says."""
    file = tmp_path / "own.toml"
    file.write_text(_text('display_name = "Corrected"'))
    rows = Catalog([Provider(id="own", **OAUTH2), file])
    assert rows.get("own").label == "Corrected"
