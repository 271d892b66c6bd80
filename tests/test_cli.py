"""The command `pocket-auth`, as it is typed: what it lists, prints and checks."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import sqlite3
import stat
import subprocess
import sys
import tomllib
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from langchain_pocket_auth import PocketAuth, Provider
from langchain_pocket_auth._catalog import Catalog, read_providers
from langchain_pocket_auth._rewrap import Rewrapped
from langchain_pocket_auth._seal import KeyRing
from langchain_pocket_auth._vault import Known, Vault, known_key
from langchain_pocket_auth.cli import main, make_app
from langchain_pocket_auth.cli._keys import _in_vault
from langchain_pocket_auth.cli._terminal import Setup
from langchain_pocket_auth.testing import assert_no_leak, free_port

MODULE = [sys.executable, "-m", "langchain_pocket_auth.cli"]
README = Path(__file__).parents[1] / "README.md"
CATALOG = Catalog()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person without settings, whose files are all in one folder."""
    for name in [n for n in os.environ if n.startswith("POCKET_AUTH_")]:
        monkeypatch.delenv(name)
    for place in ("CONFIG", "DATA"):
        monkeypatch.setenv(f"XDG_{place}_HOME", str(tmp_path / place.lower()))
    monkeypatch.setenv("POCKET_AUTH_BASE_URL", f"http://127.0.0.1:{free_port()}")
    return tmp_path


def typed(*arguments: str) -> Any:
    """Return what became of the command: `exit_code`, `stdout`, `stderr`."""
    result = CliRunner().invoke(make_app(), arguments)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result


def pocket_auth(*arguments: str) -> str:
    """Return what the command prints; it must be in order."""
    result = typed(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def checks(*arguments: str) -> dict[str, tuple[str, str]]:
    """Return what the doctor says, by name of the check."""
    found = json.loads(typed(*arguments, "doctor", "--json").stdout)
    return {one["name"]: (one["status"], one["text"]) for one in found}


# ------------------------------------------------------------------------ the command


def test_version_is_the_package_s() -> None:
    """`--version` prints the version alone."""
    assert pocket_auth("--version") == version("langchain-pocket-auth") + "\n"


def test_readme_has_a_line_for_every_command() -> None:
    """The table "Commands" names exactly the commands that there are."""
    import typer.main

    def names(command: Any, before: str) -> set[str]:
        below = getattr(command, "commands", {})
        found = {before} if not below or command.invoke_without_command else set()
        return found.union(*(names(c, f"{before} {n}") for n, c in below.items()))

    table = README.read_text().partition("\n## Commands\n")[2].partition("\n## ")[0]
    told = re.findall(r"^\| `(pocket-auth[a-z -]*[a-z])", table, re.MULTILINE)
    assert set(told) == names(typer.main.get_command(make_app()), "pocket-auth")
    assert len(told) == len(set(told))


def test_command_alone_shows_its_help() -> None:
    """Without a subcommand the help names them all."""
    text = CliRunner().invoke(make_app(), []).output
    for command in ("demo", "doctor", "keys", "login", "providers", "serve"):
        assert command in text


def test_exit_code_of_the_demo_is_the_command_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`demo --yes --port` reaches the demo, and its exit code comes back."""
    asked = {}

    def run(**options: object) -> int:
        asked.update(options)
        return 1

    monkeypatch.setattr("langchain_pocket_auth.demo.run", run)
    assert typed("demo", "--yes", "--port", "1234").exit_code == 1
    assert asked == {"yes": True, "port": 1234}


def test_missing_typer_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extra, one line says what to install, and the exit code is 2."""
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        'The command needs more: pip install "langchain-pocket-auth[cli]"\n'
    )


def test_module_runs_as_a_command() -> None:
    """`python -m langchain_pocket_auth.cli` is the command, where PATH lacks it."""
    done = subprocess.run(
        [*MODULE, "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == version("langchain-pocket-auth")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--settings", "missing.toml", "connections"),
        ("--provider-file", "missing.toml", "providers"),
        ("providers", "show", "githubb"),
        ("login", "github"),
        ("login", "github", "--yes"),
        ("login", "demo", "--device"),
        ("providers", "--json", "show", "github"),
        ("new-provider", "No Id"),
        ("new-provider", "acme", "--issuer", "http://acme.example"),
        ("new-provider", "acme", "--issuer", "https://{tenant}.example"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...],
) -> None:
    """What is wrong goes to stderr, without a traceback, and nothing else happens."""
    result = typed(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr
    assert "Traceback" not in result.stderr


# -------------------------------------------------------------------------- providers


def test_providers_are_listed_for_people_and_for_programs() -> None:
    """Both lists have every row of the catalog, methods by default first."""
    rows = json.loads(pocket_auth("providers", "--json"))
    assert [row["id"] for row in rows] == list(CATALOG)
    assert {
        "id": "github",
        "name": "GitHub",
        "methods": list(CATALOG.get("github").methods),
        "category": "devtools",
        "sources": CATALOG.get("github").sources,
    } in rows
    lines = pocket_auth("providers").splitlines()
    assert [re.split(r"  +", line) for line in lines] == [
        [
            row["id"],
            row["name"],
            ", ".join(row["methods"]) or "none",
            row["category"],
            str(row["sources"]),
        ]
        for row in rows
    ]


@pytest.mark.parametrize(
    ("search", "provider"),
    [
        ("HUB", "github"),
        ("lark", "feishu"),
        ("Login with", "amazon"),
        ("crypto", "alchemy"),
        ("aws-keypair", "aws"),
    ],
)
def test_search_looks_into_all_names(search: str, provider: str) -> None:
    """Id, alias, name, category and handlers' names are searched, in any case."""
    found = json.loads(pocket_auth("providers", "--search", search, "--json"))
    assert provider in {row["id"] for row in found}
    assert len(found) < len(list(CATALOG)) / 2


def test_search_without_a_match_ends_with_1() -> None:
    """A script can tell by the exit code."""
    result = typed("providers", "--search", "no such thing", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, [])
    assert "No provider matches 'no such thing'" in result.stderr


def test_list_fits_a_terminal(home: Path) -> None:
    """On a terminal of 80 columns the list is a table, and no id is cut."""
    ours, theirs = pty.openpty()
    command = [*MODULE, "providers", "--search", "google"]
    env = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        text = b""
        while select.select([ours], [], [], 20)[0]:
            try:
                text += os.read(ours, 65536)
            except OSError:  # how terminals say that nobody writes any more
                break
        process.wait(20)
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.decode())
    assert "│ google " in plain
    assert "…" not in plain
    assert max(map(len, plain.splitlines())) <= 80


@pytest.mark.parametrize("provider", list(CATALOG))
def test_every_provider_can_be_shown(provider: str) -> None:
    """Each way to connect and what is not certain is told, in lines that fit."""
    row = CATALOG.get(provider)
    text = pocket_auth("providers", "show", provider)
    assert text.startswith(f"{row.label} ({provider})\n")
    for method in row.methods:
        assert f"\n\n{row.handler_name(method)}\n  description " in text
    flat = " ".join(text.split())
    for key in row.unverified:
        assert key in flat
    told = "stated from general knowledge, no source was seen" in flat
    assert told == bool(row.unverified)
    assert ("they are not promised" in flat) == (row.sources in {0, 1})
    # What cannot be broken stays whole, so that it can be copied: a label and a word.
    wide = [line.split() for line in text.splitlines() if len(line) > 80]
    assert max(map(len, wide), default=0) <= 2


def shown(provider: str, *options: str, file: Path | None = None) -> dict[str, Any]:
    """Return what is shown of a provider, for programs."""
    before = ("--provider-file", str(file)) if file else ()
    text = pocket_auth(*before, "providers", "show", provider, "--json", *options)
    found: dict[str, Any] = json.loads(text)
    return found


def test_shown_redirect_uri_is_the_one_that_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one is told to register is what the handler sends, and is printed whole."""
    monkeypatch.setenv("POCKET_AUTH_CLIENTS__GITHUB__CLIENT_ID", "github-id")
    monkeypatch.setenv("POCKET_AUTH_CLIENTS__GITHUB__CLIENT_SECRET", "github-secret")
    request: Any = PocketAuth("memory://").make_request(auth_provider="github")
    found = shown("github")["methods"]["oauth2"]
    assert found["redirect_uri"] == request.redirect_uri
    assert [one["name"] for one in found["settings"]] == [
        "POCKET_AUTH_CLIENTS__GITHUB__CLIENT_ID",
        "POCKET_AUTH_CLIENTS__GITHUB__CLIENT_SECRET",
    ]
    result = typed("providers", "show", "github")
    assert f"redirect_uri                   {request.redirect_uri}\n" in result.stdout
    assert_no_leak(["github-secret"], text=[result.output, json.dumps(found)])


def test_provider_is_shown_under_another_name_and_address() -> None:
    """An alias finds the row; --base-url says where the app will be."""
    found = shown("twitter", "--base-url", "https://app.example/")
    assert found["id"] == "x"
    uri = "https://app.example/auth/x/oauth2/callback"
    assert found["methods"]["oauth2"]["redirect_uri"] == uri


def test_refused_redirect_uri_is_told_with_the_remedy() -> None:
    """Slack takes https only: the page says so, and what to set."""
    remedy = "set POCKET_AUTH_BASE_URL to such an address"
    assert remedy in pocket_auth("providers", "show", "slack")
    https = pocket_auth("providers", "show", "slack", "--base-url", "https://a.example")
    assert remedy not in https


ODD = """
[odd]
display_name = "Odd"
docs = "https://odd.example/docs"
checked = 2026-01-02
sources = 1
unverified = ["revocation_endpoint", "token.api_credential", "variables.site", "docs"]
authorization_endpoint = "https://{site}.odd.example/authorize"
token_endpoint = "https://{site}.odd.example/token"
revocation_endpoint = "https://{site}.odd.example/revoke"
device_authorization_endpoint = "https://{site}.odd.example/device"
token_endpoint_auth_method = "none"
code_challenge_method = "unsupported"
scope_separator = ","
required_scopes = ["offline"]
recommended_scopes = ["read", "write"]
env_keys = ["ODD_BEARER"]
api_headers = { Odd-Version = "3" }
[odd.variables.site]
description = "your site"
default = "www"
[odd.token]
handler = "odd-key"
note = "Ask your admin."
api_credential = { query = "key" }
api_query = { user = "{user}" }
[odd.token.fields]
token = { label = "Key", secret = true, pattern = "k-.*" }
user = { label = "User", required = false, env_key = "ODD_NAME" }
"""


def test_all_that_registering_needs_is_shown(home: Path) -> None:
    """Endpoints, scopes, settings, fields and places, each as its row says it."""
    file = home / "odd.toml"
    file.write_text(ODD)
    found = shown("odd", file=file)
    oauth, form = found["methods"]["oauth2"], found["methods"]["token"]
    assert found["checked"] == "2026-01-02"
    assert oauth["token_endpoint"] == "https://{site}.odd.example/token"
    assert oauth["token_endpoint_auth_method"] == "none"
    assert oauth["code_challenge_method"] == "unsupported"
    assert oauth["device_flow"] is True
    assert (oauth["required_scopes"], oauth["recommended_scopes"]) == (
        ["offline"],
        ["read", "write"],
    )
    assert oauth["scope_separator"] == ","
    assert oauth["api_credential"] == "Authorization: Bearer {token}"
    assert oauth["api_headers"] == {"Odd-Version": "3"}
    assert oauth["env_keys"] == ["ODD_BEARER"]
    assert oauth["unverified"] == ["revocation_endpoint"]
    # A public client has no secret; the variable has a default and may be left out.
    assert [(one["name"], one["required"]) for one in oauth["settings"]] == [
        ("POCKET_AUTH_CLIENTS__ODD__CLIENT_ID", True),
        ("POCKET_AUTH_CLIENTS__ODD__SITE", False),
    ]
    assert form["handler"] == "odd-key"
    assert form["fields"]["token"] == {
        "label": "Key",
        "secret": True,
        "required": True,
        "pattern": "k-.*",
    }
    assert (form["api_credential"], form["api_query"]) == (
        "?key={token}",
        {"user": "{user}"},
    )
    assert "ODD_NAME" in form["env_keys"]
    assert set(form["unverified"]) == {"api_credential", "docs"}

    text = pocket_auth("--provider-file", str(file), "providers", "show", "odd")
    for line in (
        "  revocation_endpoint            https://{site}.odd.example/revoke (unverified)",
        "  device_flow                    yes",
        '  scope_separator                ","',
        "  api_credential  ?key={token} (unverified)",
        "  docs            https://odd.example/docs (unverified)",
        "  note            Ask your admin.",
        "  fields          token: Key (secret, matches k-.*)",
        "                  user: User (optional)",
    ):
        assert f"{line}\n" in text
    flat = " ".join(text.split())
    assert "ODD__SITE (your site; default: www) (unverified)" in flat
    assert "These facts rest on one source only: they are not promised." in flat


@pytest.mark.parametrize(
    ("row", "credential"),
    [
        ({"header": "X-Key"}, "X-Key: {token}"),
        ({"prefix": "Token "}, "Authorization: Token {token}"),
        ({"username": "{token}", "password": ""}, "Authorization: Basic {token}:"),
        (
            {"url": "https://odd.example/{token}"},
            "URLs begin with https://odd.example/{token}",
        ),
        ({"signature": True}, "signed requests"),
    ],
)
def test_place_of_a_credential_is_told(
    row: dict[str, Any], credential: str, home: Path
) -> None:
    """Wherever an API takes its credential, the page says it as one would write it."""
    facts = ", ".join(f"{key} = {json.dumps(value)}" for key, value in row.items())
    file = home / "odd.toml"
    file.write_text(f"[odd.token]\napi_credential = {{ {facts} }}\n")
    found = shown("odd", file=file)["methods"]["token"]["api_credential"]
    assert found.startswith(credential)


def test_what_an_issuer_tells_is_not_asked_for(home: Path) -> None:
    """A row that is discovered needs no settings: its server may register the app."""
    file = home / "odd.toml"
    file.write_text('[odd]\nissuer = "https://odd.example"\n')
    text = pocket_auth("--provider-file", str(file), "providers", "show", "odd")
    assert "(optional: the app registers itself)" in text
    assert "device_flow" not in text
    assert "not promised" not in text  # the person's own facts


# ----------------------------------------------------------------------- new-provider


@pytest.mark.parametrize("name", ["acme", "7-up_2"])
@pytest.mark.parametrize("issuer", [None, 'https://acme.example/"a"'])
def test_new_provider_s_row_loads_as_printed(
    name: str, issuer: str | None, home: Path
) -> None:
    """The text is a file of one provider that can be used, whatever the issuer."""
    options = ("--issuer", issuer) if issuer else ()
    file = home / f"{name}.toml"
    file.write_text(pocket_auth("new-provider", name, *options))
    [row] = read_providers(file)
    assert (row.id, row.issuer, row.methods) == (name, issuer, ("oauth2",))
    assert shown(name, file=file)["id"] == name


@pytest.mark.parametrize("issuer", [None, "https://acme.example"])
def test_every_example_of_a_new_row_is_a_key_that_exists(issuer: str | None) -> None:
    """With each comment mark taken away, the row still loads."""
    options = ("--issuer", issuer) if issuer else ()
    text = pocket_auth("new-provider", "acme", *options)
    opened = re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE)
    table = tomllib.loads(opened)["acme"]
    row = Provider(id="acme", **table)
    assert len(table) > 12
    assert row.methods == ("oauth2", "token")


def test_new_row_for_a_known_provider_says_so() -> None:
    """The row is printed, and a line beside it says whose place it takes."""
    result = typed("new-provider", "github")
    assert result.exit_code == 0
    assert "github is known already" in result.stderr


# ------------------------------------------------------------------------------- keys


def key_file(home: Path) -> Path:
    """Return where the keys are."""
    return home / "config" / "pocket-auth" / "keys"


def test_new_key_is_one_that_is_accepted() -> None:
    """`keys new` prints one key in the form of POCKET_AUTH_KEYS, another each time."""
    first, second = pocket_auth("keys", "new"), pocket_auth("keys", "new")
    assert first != second
    assert len(first.splitlines()) == 1
    ring = KeyRing.parse(f"{first.strip()},{second.strip()}")
    assert ring.open(ring.seal(b"plain", "row"), "row") == b"plain"


def test_rotated_file_opens_the_old_and_seals_with_the_new(home: Path) -> None:
    """The new key is the first; nothing is lost, shown, or readable by others."""
    path = key_file(home)
    before = KeyRing.file(path)
    sealed, old = before.seal(b"plain", "row"), path.read_text()
    result = typed("keys", "rotate")
    assert result.exit_code == 0
    new = path.read_text().removesuffix(old).strip()
    assert new
    after = KeyRing.file(path)
    assert after.open(sealed, "row") == b"plain"
    assert KeyRing.parse(new).open(after.seal(b"more", "row"), "row") == b"more"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    keys = [line.partition(":")[2] for line in path.read_text().splitlines()]
    assert_no_leak(keys, text=[result.output])
    assert "Restart what runs already" in " ".join(result.stderr.split())


def test_first_rotation_makes_the_key(home: Path) -> None:
    """Where there is no key file yet, there is one key afterwards."""
    pocket_auth("keys", "rotate")
    assert len(key_file(home).read_text().splitlines()) == 1


def test_second_rotation_at_the_same_time_is_refused(home: Path) -> None:
    """What another rotation left half done is named, and no key is lost."""
    KeyRing.file(key_file(home))
    old = key_file(home).read_text()
    aside = key_file(home).with_name("keys.new")
    aside.touch()
    result = typed("keys", "rotate")
    assert result.exit_code == 2
    assert "delete it and try again" in " ".join(result.stderr.split())
    assert key_file(home).read_text() == old
    assert aside.exists()


def test_key_file_that_cannot_be_replaced_stays_as_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full: one sentence, the old keys, and nothing beside them."""
    KeyRing.file(key_file(home))
    old = key_file(home).read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = typed("keys", "rotate")
    assert result.exit_code == 2
    assert "No space left on device" in " ".join(result.stderr.split())
    assert [p.read_text() for p in key_file(home).parent.iterdir()] == [old]


def test_keys_of_the_environment_are_not_rotated_but_explained(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new last part is printed, never the present value, and no file is made."""
    present = pocket_auth("keys", "new").strip()
    monkeypatch.setenv("POCKET_AUTH_KEYS", present)
    result = typed("keys", "rotate")
    assert result.exit_code == 1
    assert KeyRing.parse(present + result.stdout.strip()).ids[0] in present
    told = " ".join(result.stderr.split())
    first, then = (
        told.index("behind their present value"),
        told.index("put it in front"),
    )
    assert first < told.index("without the new key cannot open") < then
    assert "`pocket-auth keys rewrap`" in told[then:]
    assert_no_leak([present.partition(":")[2]], text=[result.output])
    assert not key_file(home).exists()


def in_store(number: int) -> None:
    """Put records into the user's store, as an agent would."""

    async def work(vault: Vault) -> None:
        for n in range(number):
            assert await vault.create(known_key(f"{n}"), Known(data={}))

    asyncio.run(_in_vault(Setup(), work))


def listed() -> dict[str, tuple[int, str]]:
    """Return what `keys status` says of each key."""
    told = json.loads(pocket_auth("keys", "status", "--json"))
    return {one["key"]: (one["records"], one["use"]) for one in told["keys"]}


def test_rotation_seals_all_with_the_new_key_which_can_stay_alone(home: Path) -> None:
    """`keys rotate` rewraps; then the old key can go, and the status said so."""
    path = key_file(home)
    in_store(3)
    [old] = KeyRing.file(path).ids
    assert listed() == {old: (3, "seals")}
    result = typed("keys", "rotate")
    assert result.exit_code == 0
    assert "3 of 3 records were under another key" in result.stdout
    assert f"{old} can be dropped." in result.stdout
    new, _ = KeyRing.file(path).ids
    assert listed() == {
        new: (3, "seals"),
        old: (0, "none; can be put first, or dropped"),
    }
    path.write_text(path.read_text().splitlines()[0])
    assert listed() == {new: (3, "seals")}


def test_rewrap_after_a_rotation_elsewhere(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status, rewrap, status: who keeps the keys elsewhere sees when one can go."""
    old, new = (pocket_auth("keys", "new").strip() for _ in range(2))
    old_id, new_id = (key.partition(":")[0] for key in (old, new))
    monkeypatch.setenv("POCKET_AUTH_KEYS", old)
    in_store(2)
    monkeypatch.setenv("POCKET_AUTH_KEYS", f"{new},{old}")
    assert listed()[old_id] == (2, "opens what `keys rewrap` has not sealed anew")
    text = pocket_auth("keys", "status")
    assert re.search(rf"^{new_id} +0 +seals$", text, re.MULTILINE)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    pocket_auth("keys", "rewrap")
    assert listed()[new_id] == (2, "seals")
    # Without the rewrap no start would be allowed.
    monkeypatch.setenv("POCKET_AUTH_KEYS", new)
    pocket_auth("keys", "status")
    assert not key_file(home).exists()


def test_rewrap_tells_what_it_could_not_do(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Records that do not open end in exit code 1, whichever command finds them."""
    in_store(2)
    [database] = (home / "data").rglob("*.db")
    with closing(sqlite3.connect(database)) as db:
        db.execute("UPDATE pocket_auth_records SET value = 'x' WHERE name = '1'")
        db.commit()
    old = key_file(home).read_text()
    assert typed("keys", "rotate").exit_code == 1
    assert key_file(home).read_text().endswith(old)
    for command in ("status", "rewrap"):
        result = typed("keys", command)
        assert result.exit_code == 1
        assert "1 records do not open" in result.stderr


def test_rewrap_tells_who_has_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that still seals with the old key is told as such."""
    in_store(1)

    async def never_done(vault: Vault, **_: Any) -> Rewrapped:
        return Rewrapped({"a": 3}, {vault.key_ids[0]: 2, vault.key_ids[1]: 1})

    pocket_auth("keys", "rotate")
    monkeypatch.setattr("langchain_pocket_auth._rewrap.rewrap", never_done)
    result = typed("keys", "rewrap")
    assert result.exit_code == 1
    assert "Something still seals with" in result.stderr


def test_named_key_file_is_used_and_rotated(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POCKET_AUTH_KEYS_FILE stands in the place of the user's own, and is not made."""
    path = home / "secrets"
    monkeypatch.setenv("POCKET_AUTH_KEYS_FILE", str(path))
    assert typed("keys", "rotate").exit_code == 2
    assert checks()["keys"][0] == "failed"
    assert not path.exists()
    path.write_text(pocket_auth("keys", "new"))
    path.chmod(0o600)
    assert checks()["keys"] == ("ok", f"read from {path}, which nobody else can read")
    pocket_auth("keys", "rotate")
    assert len(path.read_text().splitlines()) == 2
    assert not key_file(home).exists()


def test_rotation_rewraps_nothing_in_memory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is kept, there is nothing to seal anew."""
    KeyRing.file(key_file(home))
    monkeypatch.setenv("POCKET_AUTH_STORAGE", "memory://")
    assert "records" not in pocket_auth("keys", "rotate")


# ----------------------------------------------------------------------------- doctor


def test_doctor_finds_a_new_machine_in_order(home: Path) -> None:
    """Nothing set: everything is all right, and what was probed is gone."""
    found = checks()
    assert {status for status, _ in found.values()} == {"ok"}
    assert found.keys() == {"settings", "clock", "port", "keys", "store"}
    [database] = (home / "data").rglob("*.db")
    with sqlite3.connect(database) as db:
        rows = db.execute("SELECT namespace FROM pocket_auth_records").fetchall()
    db.close()
    assert ("doctor",) not in rows
    text = pocket_auth("doctor")
    assert re.search(
        r"^  ok +port +http://127\.0\.0\.1:\d+ is free$", text, re.MULTILINE
    )


def test_doctor_tells_what_to_register_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each registration is tried as a run would; secrets are not shown."""
    base = os.environ["POCKET_AUTH_BASE_URL"]
    settings = {
        "GITHUB__CLIENT_ID": "github-client",
        "GITHUB__CLIENT_SECRET": "github-very-secret",
        "LINEAR__CLIENT_ID": "linear-client",
        "SLACK__CLIENT_ID": "slack-client",
        "SLACK__CLIENT_SECRET": "slack-very-secret",
        "SHOPIFY__CLIENT_ID": "shopify-client",
        "SHOPIFY__CLIENT_SECRET": "shopify-very-secret",
        "GITHUBB__CLIENT_ID": "typo",
        "OWNHANDLER__CLIENT_ID": "own",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"POCKET_AUTH_CLIENTS__{name}", value)
    monkeypatch.setenv("POCKET_AUTH_BASEURL", "typo")
    result = typed("doctor")
    assert result.exit_code == 1
    found = checks()
    status = {name: status for name, (status, _) in found.items()}
    text = {name: text for name, (_, text) in found.items()}
    assert status["app github"] == "ok"
    assert f"{base}/auth/github/oauth2/callback" in text["app github"]
    assert status["app linear"] == "failed"
    assert "POCKET_AUTH_CLIENTS__LINEAR__CLIENT_SECRET" in text["app linear"]
    assert status["app slack"] == "failed"
    assert "https" in text["app slack"]
    assert status["app githubb"] == "failed"
    assert "did you mean github" in text["app githubb"]
    # Perhaps a handler in the app's own code, which this command cannot see.
    assert status["app ownhandler"] == "warning"
    assert status["app shopify"] == "failed"
    assert "POCKET_AUTH_CLIENTS__SHOPIFY__SHOP" in text["app shopify"]
    assert "POCKET_AUTH_BASEURL is no setting" in " ".join(result.stdout.split())
    secrets = [v for v in settings.values() if v.endswith("very-secret")]
    assert_no_leak(secrets, text=[result.output, json.dumps(found)])


@pytest.mark.parametrize(
    ("name", "value", "check", "remedy"),
    [
        ("BASE_URL", "https://app.example", "settings", "http://127.0.0.1:<port>"),
        ("KEYS", "no-key", "settings", "pocket-auth keys new"),
        ("STORAGE", "sqlite:////dev/null/store.db", "store", "does not answer"),
        ("CLIENTS", "{", "settings", "settings"),
    ],
)
def test_doctor_names_the_setting_that_is_wrong(
    name: str, value: str, check: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong is one failed check, with its remedy; the exit code is 1."""
    monkeypatch.setenv(f"POCKET_AUTH_{name}", value)
    result = typed("doctor")
    assert result.exit_code == 1
    found = json.loads(typed("doctor", "--json").stdout)
    [wrong] = [one for one in found if one["status"] == "failed"]
    assert wrong["name"] == check
    assert remedy in wrong["text"]


def test_doctor_looks_at_the_key_file(home: Path) -> None:
    """A key that others can read is told, with the command that mends it."""
    pocket_auth("doctor")
    assert checks()["keys"][0] == "ok"
    key_file(home).chmod(0o644)
    status, text = checks()["keys"]
    assert status == "failed"
    assert "chmod 600" in text


def test_doctor_sees_that_keys_do_not_fit_the_store(home: Path) -> None:
    """Another key than the store's: told before anybody is asked again."""
    pocket_auth("doctor")
    key_file(home).unlink()
    status, text = checks()["store"]
    assert status == "failed"
    assert "the keys do not fit this store" in text


def test_doctor_warns_of_a_store_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that end with the process are no mistake, but worth a line."""
    monkeypatch.setenv("POCKET_AUTH_STORAGE", "memory://")
    assert typed("doctor").exit_code == 0
    assert checks()["store"][0] == "warning"


def test_doctor_tells_who_has_to_serve_an_https_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody answers there, and this machine cannot look into what is in front."""
    monkeypatch.setenv("POCKET_AUTH_BASE_URL", f"https://localhost:{free_port()}")
    status, text = checks()["port"]
    assert status == "warning"
    assert "mount pocket.router" in text


def test_doctor_takes_keys_of_the_environment_and_keys_of_the_app(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key file is made, and an app that brings an API key needs nobody."""
    monkeypatch.setenv("POCKET_AUTH_KEYS", pocket_auth("keys", "new").strip())
    monkeypatch.setenv("POCKET_AUTH_CLIENTS__OPENAI__TOKEN", "sk-very-secret")
    found = checks()
    assert {status for status, _ in found.values()} == {"ok"}
    assert found["app openai"][1] == "complete"
    assert not key_file(home).exists()
    assert_no_leak(["sk-very-secret"], text=[typed("doctor").output])


def test_doctor_reads_a_settings_file(home: Path) -> None:
    """`--settings` names a file as PocketAuth(settings_file=) does."""
    file = home / "pocket-auth.toml"
    file.write_text('[clients.github]\nclient_id = "a"\nclient_secret = "b"\n')
    found = checks("--settings", str(file))
    assert found["app github"][0] == "ok"
    assert str(file) in found["settings"][1]


def test_doctor_knows_a_clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A year before this version was made fails."""
    monkeypatch.setattr("langchain_pocket_auth.cli._checks.RELEASE_YEAR", 3000)
    assert checks()["clock"][0] == "failed"
