"""Who is let in: hosts, origins, tokens; how fast; and the headers of every answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.serve.options import MAX_SESSIONS, ServeOptions, is_loopback
from posecrafter_rt.serve.security import CONTENT_POLICY, Guard, Refusal, TokenBucket, check_request

LOCAL = ServeOptions()
OPEN = ServeOptions(is_loopback=False, token="a secret of some length")


def request(path: str = "/api/info", query: str = "", **headers: str) -> dict[str, Any]:
    given = {"host": "127.0.0.1:8000", **headers}
    return {"type": "http", "path": path, "query_string": query.encode(),
            "headers": [(key.encode(), value.encode()) for key, value in given.items()]}  # fmt: skip


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "127.1.2.3"])
def test_this_machine_by_any_of_its_names(host: str) -> None:
    check_request(request(host=host), LOCAL)


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "192.168.0.7:8000", "", "127.0.0.1.evil.example", "localhost@evil", "::"]
)
def test_a_name_that_was_bent_to_this_machine_is_refused(host: str) -> None:
    with pytest.raises(Refusal) as refused:
        check_request(request(host=host), LOCAL)
    assert refused.value.status == 421 and "--token" in refused.value.hint


def test_behind_a_proxy_the_token_stands_for_the_name() -> None:
    local = ServeOptions(token="a secret of some length")
    check_request(request(host="studio.example", authorization="Bearer a secret of some length"), local)
    with pytest.raises(Refusal):
        check_request(request(host="studio.example"), local)


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "https://127.0.0.1:8000"])
def test_the_page_itself_may(origin: str) -> None:
    check_request(request(origin=origin), LOCAL)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9000", "http://localhost:8000", "",
                                    "http://127.0.0.1:8000.evil.example", "http://evil.example#127.0.0.1:8000"])  # fmt: skip
def test_other_pages_may_not(origin: str) -> None:
    with pytest.raises(Refusal) as refused:
        check_request(request(origin=origin), LOCAL)
    assert refused.value.status == 403


def test_pages_that_are_named_may() -> None:
    allowed = ServeOptions(allow_origins=("https://a.example",))
    check_request(request(origin="https://a.example"), allowed)
    with pytest.raises(Refusal):
        check_request(request(origin="http://a.example"), allowed)


@pytest.mark.parametrize(("given", "sent"), [
    ("https://Example.org", "https://example.org"), ("HTTPS://example.org:443", "https://example.org"),
    ("http://example.org:80", "http://example.org"), ("http://[::1]:80", "http://[::1]"),
    ("file://", "file://"),
    ("http://example.org:443", "http://example.org:443"), ("https://example.org:8443", "https://example.org:8443"),
])  # fmt: skip
def test_an_origin_is_compared_as_browsers_send_it(given: str, sent: str) -> None:
    check_request(request(origin=sent), ServeOptions(allow_origins=("https://other.example", given)))


@pytest.mark.parametrize("given", ["http://[::1", "https://bücher.example", "https://example.org:", "https://user@example.org",
                                   "https://example.org/", "example.org", "https://example.org:port", "*", "https://",
                                   "https://:8443", "https://*.example.org", "https://*"])  # fmt: skip
def test_what_no_browser_sends_as_an_origin_is_refused(given: str) -> None:
    with pytest.raises(PoseCrafterError, match="is no origin") as caught:
        ServeOptions(allow_origins=(given,))
    assert caught.value.hint


@pytest.mark.parametrize("path", ["/ws", "/api/info", "/metrics", "/healthy", "/trackers/x", "//"])
def test_the_token_is_needed(path: str) -> None:
    wrong = ({}, {"query": "token=wrong"}, {"query": "token="}, {"query": "token=%C3%A9"}, {"authorization": "Bearer "},
             {"authorization": f"Basic {OPEN.token}"}, {"authorization": "Bearer é"})  # fmt: skip
    for brought in wrong:
        with pytest.raises(Refusal) as refused:
            check_request(request(path, **brought), OPEN)
        assert refused.value.status == 401


@pytest.mark.parametrize("given", [{"query": "token=a+secret+of+some+length"}, {"query": "x=1&token=a%20secret%20of%20some%20length"},
                                   {"authorization": "Bearer a secret of some length"},
                                   {"authorization": "bearer a secret of some length"}])  # fmt: skip
def test_the_token_opens(given: dict[str, str]) -> None:
    check_request(request("/ws", **given), OPEN)
    check_request(request("/ws", host="studio.example", **given), OPEN)


@pytest.mark.parametrize("path", ["/health", "/", "/assets/main.js", "/tracker/holistic.js"])
def test_what_holds_no_secret_needs_none(path: str) -> None:
    check_request(request(path), OPEN)


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    bucket = TokenBucket(10, 5)
    assert [bucket.take(100.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert [bucket.take(100.15), bucket.take(100.15)] == [True, False]
    assert [bucket.take(200.0) for _ in range(6)] == [True] * 5 + [False]


@given(st.lists(st.floats(0, 0.5), max_size=200), st.floats(1, 100), st.integers(1, 50))
def test_a_bucket_never_lets_more_through(pauses: list[float], rate: float, burst: int) -> None:
    bucket, now_s, passed = TokenBucket(rate, burst), 50.0, 0
    for pause in pauses:
        now_s += pause
        passed += bucket.take(now_s)
        assert passed <= burst + (now_s - 50) * rate + 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_sessions": 0},
        {"max_sessions": MAX_SESSIONS + 1},
        {"token": " "},
        {"is_loopback": False},
        {"allow_origins": ("https://a.example/",)},
        {"allow_origins": ("a.example",)},
        {"allow_origins": ("*",)},
    ],
)
def test_impossible_options_are_refused_with_a_hint(wrong: dict[str, Any]) -> None:
    with pytest.raises(PoseCrafterError) as refused:
        ServeOptions(**wrong)
    assert refused.value.hint


@pytest.mark.parametrize("token", ["secret\n", "secret\r", "secret ", " secret", "sec\tret", "secrét", "secret\udcff"])
def test_a_token_that_clients_cannot_send_is_refused_and_not_shown(token: str) -> None:
    """As from a file that ends with a line break; every request would get 401, or 500."""
    with pytest.raises(PoseCrafterError, match="characters that clients cannot send") as refused:
        ServeOptions(token=token)
    assert refused.value.hint and token.strip() not in f"{refused.value} {refused.value.hint}"


@pytest.mark.parametrize(("host", "is_local"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
    ("0.0.0.0", False), ("::", False), ("192.168.0.7", False), ("studio.example", False), ("", False),
])  # fmt: skip
def test_what_is_this_machine(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local


def answered(scope: dict[str, Any]) -> list[Any]:
    """What a guarded app, which only says 200, answers."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(app, LOCAL)(scope, receive, send))
    return sent


@pytest.mark.parametrize(
    ("path", "kept"),
    [("/", b"no-cache"), ("/assets/a.js", b"no-cache"), ("/api/info", b"no-store"), ("/health", b"no-store")],
)
def test_every_answer_has_the_headers(path: str, kept: bytes) -> None:
    headers = dict(answered(request(path))[0]["headers"])
    assert headers[b"x-own"] == b"1" and headers[b"cache-control"] == kept
    assert headers[b"content-security-policy"].decode() == CONTENT_POLICY
    assert headers[b"x-content-type-options"] == b"nosniff" and headers[b"referrer-policy"] == b"no-referrer"


def test_the_policy_names_no_other_host() -> None:
    assert "http" not in CONTENT_POLICY and "*" not in CONTENT_POLICY and "'unsafe-inline'" not in CONTENT_POLICY
    assert "'unsafe-eval'" not in CONTENT_POLICY.replace("'wasm-unsafe-eval'", "")


def test_a_refused_request_never_reaches_the_app() -> None:
    start, body = answered(request(origin="http://evil.example"))
    assert (
        start["status"] == 403
        and b"evil.example" in body["body"]
        and dict(start["headers"])[b"cache-control"] == b"no-store"
    )
    accept, text, close = answered({**request(origin="http://evil.example"), "type": "websocket"})
    assert accept["type"] == "websocket.accept" and '"error"' in text["text"] and close["code"] == 1008
