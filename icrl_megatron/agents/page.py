"""Opens a page as text: from stored pages, or over HTTP. trafilatura (extra `page`) extracts the text of HTML."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from icrl_megatron.agents.text import head, plain
from icrl_megatron.agents.tools import Arguments, ToolFailure, ToolSpec, ToolUseError
from icrl_megatron.utils import connections
from icrl_megatron.utils.errors import ConfigError

NO_TEXT = "The page has no text."
SHOWN_CHARS = 200
MOST_LINE_BYTES = 64 << 20
"""Of a file of stored pages."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/xhtml+xml")
_PLAIN = ("text/plain", "application/json", "text/csv", "text/markdown")
_HEADERS = {"Accept": "text/html, text/*;q=0.9", "Accept-Encoding": "gzip, deflate"}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

PageSource = Callable[[str], Awaitable["Document"]]
"""An address -> its document. Raises ToolUseError for what does not exist, ToolFailure if the infrastructure failed."""


@dataclass(frozen=True)
class Document:
    text: str
    """HTML or plain text."""
    html: bool


class Page:
    """Answers `page`, an id or an address, with the text of that page."""

    def __init__(self, source: PageSource, chars: int = 8000, version: str = "") -> None:
        """`chars`: the length of an answer, after which it is cut. `version` names the pages, for the cache of answers;
        empty: they are not cached. Raises ConfigError if trafilatura is missing."""
        try:
            import trafilatura  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"the page tool extracts text with trafilatura, which cannot be imported ({error}): "
                "pip install 'icrl-megatron[page]'"
            ) from error
        spec = ToolSpec.of_text("page", "Opens a page and answers its text.", "page", maxLength=2000)
        self.spec = replace(spec, version=f"{version}, {chars} characters") if version else spec
        self._source, self._chars = source, chars

    async def call(self, arguments: Arguments) -> str:
        document = await self._source(arguments["page"].strip())
        text = await asyncio.to_thread(_extracted, document.text) if document.html else document.text
        return head(plain(text).strip(), self._chars) or NO_TEXT


def _extracted(html: str) -> str:
    import trafilatura

    try:
        found = trafilatura.extract(html, include_comments=False, include_tables=True)
        return found or trafilatura.html2txt(html)
    except Exception as error:  # a parser that fails on a page will fail on it again
        raise ToolUseError("The page cannot be read.") from error


class StoredPages:
    """Pages of a JSONL file ({"id" or "url": ..., "html" or "text": ...} a line), or of a folder of .html, .md and
    .txt files, whose ids are their paths below it; links out of the folder are no pages. A file is read once, for the
    offsets of its lines.

    Raises ConfigError naming the file, the line and the remedy.
    """

    def __init__(self, path: Path, page_bytes: int = 8 << 20) -> None:
        self._path, self._page_bytes = path, page_bytes
        if path.is_dir():
            found = (p for p in sorted(path.rglob("*")) if p.suffix in (".html", ".htm", ".md", ".txt"))
            found = (p for p in found if p.is_file() and p.resolve().is_relative_to(path.resolve()))
            self._files = {p.relative_to(path).as_posix(): p for p in found}
            self._offsets: dict[str, int] = {}
        elif path.is_file():
            self._files, self._offsets = {}, _offsets(path)
        else:
            raise ConfigError(f"stored pages: {path} does not exist; give a JSONL file or a folder of pages")
        if not len(self):
            raise ConfigError(f"stored pages: {path} holds no pages; give at least one")

    def __len__(self) -> int:
        return len(self._files) + len(self._offsets)

    async def __call__(self, page: str) -> Document:
        if page not in self._files and page not in self._offsets:
            raise ToolUseError(f"There is no page {page[:SHOWN_CHARS]!r}.")
        try:
            return await asyncio.to_thread(self._read, page)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ToolFailure(f"stored pages: {self._path}, page {page[:SHOWN_CHARS]!r}: {error!r}") from error

    def _read(self, page: str) -> Document:
        if page in self._files:
            file = self._files[page]
            with file.open("rb") as opened:
                return Document(
                    opened.read(self._page_bytes).decode(errors="replace"), file.suffix in (".html", ".htm")
                )
        with self._path.open("rb") as lines:
            lines.seek(self._offsets[page])
            return _row(json.loads(lines.readline(MOST_LINE_BYTES)), self._page_bytes)[1]


def _offsets(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    offset = 0
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise ConfigError(
                    f"stored pages: {path}, line {number}: longer than {MOST_LINE_BYTES >> 20} MiB; delete the line"
                )
            try:
                page, _ = _row(json.loads(line), 1)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ConfigError(
                    f"stored pages: {path}, line {number}: not an object with id or url, and html or text ({error!r}); "
                    "fix or delete the line"
                ) from error
            if page in found:
                raise ConfigError(f"stored pages: {path}, line {number}: a second page {page!r}; delete one of them")
            found[page] = offset
            offset += len(line)
    return found


def _row(row: Any, chars: int) -> tuple[str, Document]:
    page = row["id"] if "id" in row else row["url"]
    kind = "html" if "html" in row else "text"
    if not isinstance(page, str | int) or not isinstance(row[kind], str):
        raise TypeError("a page's id is a text or a number, and its content a text")
    return str(page), Document(row[kind][:chars], kind == "html")


@dataclass(frozen=True)
class FetchLimits:
    """Bounds of one page over HTTP."""

    total_s: float = 20.0
    """Seconds, over all redirects."""
    page_bytes: int = 4 << 20
    redirects: int = 5


class FetchedPages:
    """Pages of http and https addresses. `private`: whether loopback, private and other addresses that are not on the
    public internet may be opened; the address that is connected to decides, not the name that was asked for."""

    def __init__(self, limits: FetchLimits, private: bool = False) -> None:
        self._limits, self._private = limits, private

    async def __call__(self, page: str) -> Document:
        url = self._address(page)
        limits = self._limits
        try:
            async with asyncio.timeout(limits.total_s), self._session() as session:
                for _ in range(limits.redirects + 1):
                    found = await self._once(session, url)
                    if isinstance(found, Document):
                        return found
                    url = found
        except connections.ResponseTooLongError as error:
            raise ToolUseError(f"The page is longer than {limits.page_bytes >> 10} KiB.") from error
        except _NameError as error:
            raise ToolUseError(str(error)) from error
        except (aiohttp.InvalidURL, UnicodeError) as error:
            raise ToolUseError(f"{page[:SHOWN_CHARS]!r} is not an address.") from error
        except TimeoutError as error:
            raise ToolFailure(f"{url.host} did not answer within {limits.total_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ToolFailure(f"{url.host} cannot be read ({error!r})") from error
        raise ToolUseError(f"The page redirects more than {limits.redirects} times.")

    def _session(self) -> aiohttp.ClientSession:
        """Without automatic decompression, because `connections.body` bounds what is decompressed."""
        connector = aiohttp.TCPConnector(resolver=_PublicOnly(self._private), use_dns_cache=False)
        return aiohttp.ClientSession(connector=connector, headers=_HEADERS, auto_decompress=False)

    async def _once(self, session: aiohttp.ClientSession, url: URL) -> Document | URL:
        """One request: the document, or where it redirects to."""
        async with session.get(url, allow_redirects=False) as reply:
            if reply.status in _REDIRECTS and "Location" in reply.headers:
                return self._address(reply.headers["Location"], url)
            if reply.status in (429, 502, 503, 504):  # the server's state, not the page's
                raise aiohttp.ClientPayloadError(f"HTTP {reply.status}")
            if reply.status >= 400:
                raise ToolUseError(f"The page answers HTTP {reply.status}.")
            kind = reply.content_type.lower()
            if not kind.startswith(_TEXT_TYPES):
                raise ToolUseError(f"The page is not text but {plain(kind)[:60]}.")
            content = await connections.body(reply, self._limits.page_bytes)
            return Document(_decoded(content, reply.charset), kind not in _PLAIN)

    def _address(self, text: str, base: URL | None = None) -> URL:
        try:
            url = base.join(URL(text)) if base else URL(text)
            host = url.host
        except (ValueError, TypeError) as error:
            raise ToolUseError(f"{text[:SHOWN_CHARS]!r} is not an address.") from error
        if url.scheme not in ("http", "https") or not host:
            raise ToolUseError(f"{text[:SHOWN_CHARS]!r} is not an address that starts with http:// or https://.")
        if not self._private and _is_ip(host) and not _is_public(host):  # aiohttp resolves no literal addresses
            raise ToolUseError(f"{host} is not a public address.")
        return url


class _NameError(Exception):
    """A name that does not exist, or leads to an address that is not public."""


class _PublicOnly(AbstractResolver):
    """Resolves names for the connector, which connects to what is returned here and to nothing else."""

    def __init__(self, private: bool) -> None:
        self._private = private
        self._inner = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            found: list[ResolveResult] = await self._inner.resolve(host, port, family)
        except OSError as error:
            if error.errno == socket.EAI_NONAME:  # the name server answered: there is no such name
                raise _NameError(f"There is no server {host[:SHOWN_CHARS]!r}.") from error
            raise
        if not self._private and not all(_is_public(one["host"]) for one in found):
            raise _NameError(f"{host} is not a public address.")
        return found

    async def close(self) -> None:
        await self._inner.close()


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_public(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if address in _NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast and (inner is None or _is_public(str(inner)))


def _decoded(content: bytes, charset: str | None) -> str:
    try:
        return content.decode(charset or "utf-8", errors="replace")
    except LookupError:
        return content.decode(errors="replace")
