"""The page tool: stored pages, and pages of a real HTTP server that redirects, floods, hangs and refuses."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from local_servers import serving

from icrl_megatron.agents import page
from icrl_megatron.agents.page import NO_TEXT, Document, FetchedPages, FetchLimits, Page, StoredPages
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import ToolCall, ToolFailure, ToolUseError
from icrl_megatron.utils.errors import ConfigError

HTML = (
    "<html><head><title>T</title><script>var hidden = 1;</script></head><body><nav><a href='/'>Home</a></nav>"
    "<article><h1>Ardea</h1><p>Ardea is a town of 4120 people, and it lies at the sea in the west.</p>"
    "<p>Its river is the Lume, which is short and wide.</p></article></body></html>"
)
LIMITS = FetchLimits(total_s=1.0, page_bytes=50_000, redirects=2)
PACKED = gzip.compress(b"<p>" * 10_000_000)
"""Made before a request whose time is limited."""


@pytest.fixture
def extracts() -> None:
    pytest.importorskip("trafilatura", reason="not installed: pip install -e '.[page]'")


def stored(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_stored_pages_as_text(tmp_path: Path, extracts: None) -> None:
    pages = stored(
        tmp_path / "pages.jsonl", {"url": "http://ardea", "html": HTML}, {"id": 7, "text": "seven \x1b<b>" * 9}
    )
    tool = Page(StoredPages(pages), chars=100)
    found = asyncio.run(tool.call({"page": " http://ardea "}))
    assert "Ardea is a town of 4120 people" in found and "hidden" not in found and "<" not in found
    assert found.endswith("characters left out ...]")
    assert asyncio.run(tool.call({"page": "7"})).startswith("seven <b>seven <b>")
    with pytest.raises(ToolUseError, match="no page 'http://other'"):
        asyncio.run(tool.call({"page": "http://other"}))


def test_a_folder_of_pages(tmp_path: Path, extracts: None) -> None:
    (tmp_path / "pages" / "towns").mkdir(parents=True)
    (tmp_path / "pages" / "towns" / "ardea.html").write_text(HTML)
    (tmp_path / "pages" / "note.txt").write_bytes(b"plain \xff")
    (tmp_path / "pages" / "empty.html").write_text("")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "pages" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "pages" / "same.txt").symlink_to(tmp_path / "pages" / "note.txt")
    tool = Page(StoredPages(tmp_path / "pages"))
    assert "4120" in asyncio.run(tool.call({"page": "towns/ardea.html"}))
    for name in ("note.txt", "same.txt"):
        assert asyncio.run(tool.call({"page": name})) == "plain \ufffd"
    assert asyncio.run(tool.call({"page": "empty.html"})) == NO_TEXT
    for outside in ("../secret.txt", "link.txt", str(tmp_path / "secret.txt"), "towns"):
        with pytest.raises(ToolUseError):
            asyncio.run(tool.call({"page": outside}))


def test_bad_stored_pages_are_refused_lost_ones_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_LINE_BYTES", 1 << 20)
    good = {"id": "a", "text": "A"}
    for rows, words in (
        ([good, {"id": "b"}], "line 2: not an object"),
        ([good, good], "line 2: a second page 'a'"),
        ([{"id": [], "text": ""}], "line 1"),
        ([good, {"id": "b", "text": "x" * (1 << 20)}], "line 2: longer than 1 MiB; delete the line"),
        ([], "holds no pages"),
    ):
        with pytest.raises(ConfigError, match=words):
            StoredPages(stored(tmp_path / "bad.jsonl", *rows))
    with pytest.raises(ConfigError, match="does not exist"):
        StoredPages(tmp_path / "gone")
    path = stored(tmp_path / "pages.jsonl", good)
    pages = StoredPages(path)
    path.write_text("damaged")
    with pytest.raises(ToolFailure, match=r"pages\.jsonl"):
        asyncio.run(pages("a"))


@given(st.text(st.characters(exclude_categories=[]), max_size=60) | st.text(max_size=20).map("http://{}".format))
def test_no_text_raises_anything_else(text: str) -> None:
    """With no name to resolve: only what is an address of its own, or none, is tried."""
    fetch = FetchedPages(FetchLimits(total_s=0.5))
    try:
        url = fetch._address(text)
    except ToolUseError as error:
        str(error).encode(errors="strict")
        return
    assert url.scheme in ("http", "https") and url.host


async def answer(request: web.Request) -> web.StreamResponse:
    kind = request.match_info["kind"]
    if kind == "html":
        return web.Response(text=HTML, content_type="text/html")
    if kind == "gzip":
        return web.Response(body=PACKED, headers={"Content-Encoding": "gzip"}, content_type="text/html")
    if kind == "long":
        return web.Response(text="x" * 60_000)
    if kind == "latin":
        return web.Response(body="Grüße".encode("latin-1"), headers={"Content-Type": "text/plain; charset=latin-1"})
    if kind == "charset":
        return web.Response(body=b"plain", headers={"Content-Type": "text/plain; charset=no-such"})
    if kind == "binary":
        return web.Response(body=b"\x00", content_type="image/png")
    if kind == "slow":
        await asyncio.sleep(5)
    if kind == "broken":
        return web.Response(body=b"not gzip", headers={"Content-Encoding": "gzip"}, content_type="text/html")
    if kind in ("loop", "once", "file", "local"):
        to = {"loop": "/loop", "once": "html", "file": "file:///etc/passwd", "local": "http://[::1]:1/"}[kind]
        return web.Response(status=302, headers={"Location": to})
    return web.Response(status=int(kind), text="an error page")


def served(work: Callable[[str], Awaitable[Any]]) -> Any:
    """What `work` returns for the address of a server."""

    async def run() -> Any:
        async with serving(web.get("/{kind}", answer)) as url:
            return await work(url)

    return asyncio.run(run())


def fetched(kind: str, private: bool = True, host: str = "127.0.0.1") -> Document:
    async def work(url: str) -> Document:
        return await FetchedPages(LIMITS, private)(f"{url.replace('127.0.0.1', host)}/{kind}")

    return served(work)  # type: ignore[no-any-return]


def test_fetched_pages(extracts: None) -> None:
    assert fetched("html") == fetched("once") == fetched("html", host="localhost") == Document(HTML, html=True)
    assert fetched("latin") == Document("Grüße", html=False) and fetched("charset").text == "plain"

    async def work(url: str) -> Any:
        box = Toolbox([Page(FetchedPages(LIMITS, private=True))], ToolLimits(tries=1))
        session = box.session()
        return [await session.call(ToolCall("page", {"page": f"{url}/{kind}"})) for kind in ("html", "404")]

    good, gone = served(work)
    assert good.outcome == "answer" and "4120" in good.text
    assert (gone.text, gone.outcome) == ("The page answers HTTP 404.", "invalid")


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("403", ToolUseError, "HTTP 403"),
        ("500", ToolUseError, "HTTP 500"),
        ("503", ToolFailure, "HTTP 503"),
        ("long", ToolUseError, "longer than 48 KiB"),
        ("gzip", ToolUseError, "longer than 48 KiB"),
        ("binary", ToolUseError, "image/png"),
        ("loop", ToolUseError, "redirects more than 2 times"),
        ("file", ToolUseError, "http:// or https://"),
        ("local", ToolFailure, "cannot be read"),
        ("slow", ToolFailure, "within 1 s"),
        ("broken", ToolFailure, "damaged"),
    ],
)
def test_what_is_observed_and_what_is_not(kind: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fetched(kind)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "0.0.0.0", "0x7f.1", "169.254.169.254"],
)
def test_addresses_that_are_not_public_are_refused(host: str) -> None:
    with pytest.raises(ToolUseError, match="not a public address"):
        fetched("html", private=False, host=host)


def test_a_redirect_to_an_inner_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own address passes for public; the one it redirects to does not."""
    real = page._is_public
    monkeypatch.setattr(page, "_is_public", lambda host: host == "127.0.0.1" or real(host))
    with pytest.raises(ToolUseError, match="::1 is not a public address"):
        fetched("local", private=False)


def test_a_server_that_is_gone_is_a_failure() -> None:
    with pytest.raises(ToolFailure, match="cannot be read"):
        asyncio.run(FetchedPages(LIMITS, private=True)("http://127.0.0.1:1/"))
