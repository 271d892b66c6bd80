"""Reading a pause, and answering it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from langgraph.types import Command

from ._cards import Card
from ._models import Outcome

PAYLOAD_TYPE = "pocket_auth"
_TEXTS = ("key", "url", "message", "provider", "handler", "profile", "state", "reason")
_LISTS = ("scopes", "missing_scopes", "tools", "tool_call_ids")
DECLINES = frozenset({"decline", "cancel"})


@dataclass(frozen=True, slots=True)
class PendingAuthorization:
    """
    One connection that a paused run waits for.

    Attributes:
        key: Names the question in the answer.
        url: The connect link, for the person's browser only.
        message: One sentence for the person.
        provider: The provider's id.
        handler: The handler's name.
        profile: Which account of the person.
        state: `NO_SESSION`, `DO_AUTH` or `PENDING_RESOLVE`.
        reason: Why it is asked.
        scopes: What is asked for.
        missing_scopes: What the present connection lacks.
        account: The connected account, where known.
        tools: Names of the tools that need it.
        tool_call_ids: Their calls.
        expires_at: Until when the link works.
        interrupt_ids: The interrupts that ask for it.
        confirm: `"code"`: the page shows a code at its end, which `resume(code=)` or
            `PocketAuth.confirm` takes.
    """

    key: str
    url: str
    message: str
    provider: str
    handler: str
    profile: str
    state: str
    reason: str
    scopes: tuple[str, ...]
    missing_scopes: tuple[str, ...]
    account: str | None
    tools: tuple[str, ...]
    tool_call_ids: tuple[str, ...]
    expires_at: datetime
    interrupt_ids: tuple[str, ...] = field(default=())
    confirm: Literal["code"] | None = None

    def _card(self) -> Card:
        lines = [f"{self.reason}."]
        if self.scopes:
            lines.append(f"Permissions: {', '.join(self.scopes)}")
        if self.profile != "default":
            lines.append(f"Profile: {self.profile}")
        if self.account:
            lines.append(f"Account: {self.account}")
        if self.confirm:
            lines.append("At its end the page shows a code: give it in this chat.")
        return Card(self.message, tuple(lines), self.url)

    def _repr_html_(self) -> str:
        return self._card()._repr_html_()


class PendingAuthorizations(list[PendingAuthorization]):
    """What a paused run waits for; a notebook shows it with buttons to connect."""

    def _repr_html_(self) -> str:
        if not self:
            return Card("Nothing waits for an authorization.")._repr_html_()
        return "".join(pending._repr_html_() for pending in self)


def payload(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Return the interrupt payload: plain JSON without a secret of the protocol."""
    requests = []
    for outcome in outcomes:
        consent = outcome.consent
        if consent is None:
            continue
        tools = sorted(set(outcome.tools))
        reason = (
            f"needs more permissions: {', '.join(consent.missing_scopes)}"
            if consent.upgrade
            else "is not connected yet"
        )
        if outcome.wrong_code:
            reason = "is not connected: that was not the code that the page shows"
        requests.append(
            {
                "key": consent.key,
                "mode": "url",
                "url": consent.url,
                "message": f"Connect {consent.display_name} to let "
                f"{', '.join(tools)} act for you.",
                "provider": consent.provider,
                "handler": consent.handler,
                "profile": consent.profile,
                "state": consent.state.name,
                "reason": f"{consent.display_name} {reason}",
                "scopes": list(consent.scopes),
                "missing_scopes": list(consent.missing_scopes),
                "account": consent.account,
                "tools": tools,
                "tool_call_ids": list(outcome.tool_call_ids),
                "expires_at": consent.expires_at.isoformat(),
                **({"confirm": consent.confirm} if consent.confirm else {}),
            }
        )
    messages = dict.fromkeys(str(request["message"]) for request in requests)
    return {
        "type": PAYLOAD_TYPE,
        "version": 1,
        "message": " ".join(messages),
        "requests": requests,
    }


def declined_keys(answers: Iterable[Any]) -> set[str]:
    """Return which questions the answers decline; anything else means "look again"."""
    declined: set[str] = set()
    for answer in answers:
        responses = answer.get("responses") if isinstance(answer, Mapping) else None
        if not isinstance(responses, Mapping):
            continue
        for key, response in responses.items():
            action = response.get("action") if isinstance(response, Mapping) else None
            if isinstance(action, str) and action in DECLINES:
                declined.add(key)
            else:
                declined.discard(key)
    return declined


def codes(answers: Iterable[Any]) -> dict[str, str]:
    """Return the confirmation codes among the answers, by question; the last count."""
    found: dict[str, str] = {}
    for answer in answers:
        responses = answer.get("responses") if isinstance(answer, Mapping) else None
        if not isinstance(responses, Mapping):
            continue
        for key, response in responses.items():
            found.pop(key, None)
            content = response.get("content") if isinstance(response, Mapping) else None
            code = content.get("code") if isinstance(content, Mapping) else None
            if isinstance(code, str) and key not in declined_keys([answer]):
                found[key] = code
    return found


def pending_authorizations(source: Any) -> list[PendingAuthorization]:
    """
    Return what a paused run waits for, one entry per connection.

    Args:
        source: What `invoke` returned, a state snapshot, a stream chunk, a
            `langgraph_sdk` thread state, an `Interrupt`, or a list of interrupts.

    Returns:
        A list, which a notebook shows as cards with a button; empty when nothing
        of ours is pending.
    """
    merged: dict[str, PendingAuthorization] = {}
    for interrupt_id, value in _interrupts(source):
        for request in _requests(value):
            old = merged.get(request["key"])
            merged[request["key"]] = _pending(request, interrupt_id, old)
    return PendingAuthorizations(merged.values())


def resume(
    source: Any,
    *,
    decline: Iterable[Any] = (),
    code: str | Mapping[str, str] | None = None,
) -> Command[Any]:
    """
    Return the command that lets a paused run look again.

    It grants nothing: what the person did at the provider decides, with
    `PocketAuth(confirm="code")` together with the code that the page showed.

    Args:
        source: As for `pending_authorizations`.
        decline: Entries, keys or provider ids that the person does not want; the
            model is told so and the rest goes on.
        code: What the person read on the page and gave in the chat. Where several
            connections are pending, a mapping from key or provider id to code.

    Raises:
        ValueError: Nothing of ours is pending, or not what is declined or confirmed;
            or a code alone for several.
    """
    unwanted = {getattr(entry, "key", entry) for entry in decline}
    given = _codes_given(source, code, unwanted)
    known: set[Any] = set()
    answers: dict[str, Any] = {}
    for interrupt_id, value in _interrupts(source):
        responses = {}
        for request in _requests(value):
            names = {request["key"], request["provider"]}
            known |= names
            action = "decline" if names & unwanted else "accept"
            response: dict[str, Any] = {"action": action}
            if action == "accept" and (names & given.keys()):
                [named, *_] = names & given.keys()
                response["content"] = {"code": given[named]}
            responses[request["key"]] = response
        if responses and interrupt_id:
            answers[interrupt_id] = {"responses": responses}
    if not answers:
        raise ValueError("this run does not wait for an authorization")
    if unwanted - known:
        raise ValueError(f"not asked for, so not declined: {unwanted - known}")
    if given.keys() - known:
        raise ValueError(f"not asked for, so not confirmed: {given.keys() - known}")
    return Command(resume=answers)


def _codes_given(
    source: Any, code: str | Mapping[str, str] | None, unwanted: set[Any]
) -> dict[str, str]:
    if code is None:
        return {}
    if not isinstance(code, str):
        return dict(code)
    wanted = [
        pending.key
        for pending in pending_authorizations(source)
        if not {pending.key, pending.provider} & unwanted
    ]
    if len(wanted) != 1:
        raise ValueError(
            f"{len(wanted)} connections are pending: say which one a code is for, "
            'e.g. code={"github": "..."}'
        )
    return {wanted[0]: code}


def _requests(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, Mapping) or value.get("type") != PAYLOAD_TYPE:
        return []
    requests = value.get("requests")
    if not isinstance(requests, (list, tuple)):
        return []
    return [dict(request) for request in requests if _is_whole(request)]


def _is_whole(request: Any) -> bool:
    """Whether a request is as we wrote it; a client may have sent it back otherwise."""
    if not isinstance(request, Mapping):
        return False
    try:
        datetime.fromisoformat(request.get("expires_at"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    lists = [request.get(name) for name in _LISTS]
    return all(isinstance(request.get(name), str) for name in _TEXTS) and all(
        isinstance(listed, (list, tuple)) and all(isinstance(t, str) for t in listed)
        for listed in lists
    )


def _interrupts(source: Any) -> list[tuple[str, Any]]:
    """Find id and value of every interrupt, in whatever shape a run is described."""
    if isinstance(source, Mapping):
        return _interrupts_of(source)
    if hasattr(source, "interrupts"):  # a state snapshot, one of its tasks
        return _interrupts(list(source.interrupts))
    if hasattr(source, "value") and hasattr(source, "id"):
        return [(source.id, source.value)]
    if isinstance(source, (list, tuple)):
        return [part for entry in source for part in _interrupts(entry)]
    return []


def _interrupts_of(source: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if source.get("type") == PAYLOAD_TYPE:
        return [("", source)]
    if "value" in source and ("id" in source or "interrupt_id" in source):
        named = source.get("id") or source.get("interrupt_id")
        return [(named if isinstance(named, str) else "", source["value"])]
    if "__interrupt__" in source or "messages" in source:
        # A state: its other fields are the app's, whatever they are called.
        keys: tuple[str, ...] = ("__interrupt__",)
    else:
        keys = ("interrupts", "tasks")
    found = [part for key in keys for part in _interrupts(_listed(source.get(key)))]
    found += _interrupts(_wrapped(source))
    return list({json.dumps(part, default=str): part for part in found}.values())


def _wrapped(source: Mapping[str, Any]) -> Any:
    """Return what a chunk wraps: of version 2, of mode "debug", or an event's."""
    if {"type", "ns", "data"} <= source.keys():
        return [source["data"], source.get("interrupts")]
    if {"type", "step", "payload"} <= source.keys():
        return source["payload"]
    if {"event", "data"} <= source.keys() and isinstance(source["data"], Mapping):
        return source["data"].get("chunk")
    return None


def _listed(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):  # `langgraph_sdk`: {task id: [interrupts]}
        lists = [v for v in value.values() if isinstance(v, (list, tuple))]
        return [entry for entries in lists for entry in entries]
    return list(value) if isinstance(value, (list, tuple)) else None


def _pending(
    request: dict[str, Any], interrupt_id: str, old: PendingAuthorization | None
) -> PendingAuthorization:
    def union(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*getattr(old, name, ()), *request[name]]))

    ids = (
        *(old.interrupt_ids if old else ()),
        *([interrupt_id] if interrupt_id else ()),
    )
    return PendingAuthorization(
        key=request["key"],
        url=request["url"],
        message=request["message"],
        provider=request["provider"],
        handler=request["handler"],
        profile=request["profile"],
        state=request["state"],
        reason=request["reason"],
        account=request.get("account"),
        scopes=union("scopes"),
        missing_scopes=union("missing_scopes"),
        tools=union("tools"),
        tool_call_ids=union("tool_call_ids"),
        expires_at=datetime.fromisoformat(request["expires_at"]),
        interrupt_ids=tuple(dict.fromkeys(ids)),
        confirm="code" if request.get("confirm") == "code" else None,
    )
