"""Requests that a web server need not fear: to a host one at a time, apart, and as its robots.txt says."""

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy

import httpx
from protego import Protego

from data.cli import one_line
from data.download import not_now
from data.raw import TYPES

NAME = "isoflop"  # what robots.txt may speak of
REDIRECTS = 5  # RFC 9309, section 2.3.1.2
ROBOTS_BYTES = 500 * 1024  # section 2.5
ROBOTS_SECONDS = 24 * 3600  # section 2.4
LONGEST_WAIT = 600  # seconds; who asks for more is left for another day
CODINGS = frozenset({"", "identity", "gzip", "deflate"})


class Refused(Exception):
    """An address that will not be had, with the reason. again: another start may have more luck."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class Busy(Exception):
    """A server that may answer later. wait: seconds that it asks for, if it does. host: set where no page of
    that host can be had before."""

    def __init__(self, reason: str, wait: float | None = None, host: str | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        self.host = host


@dataclass(frozen=True)
class Page:
    """A response: where it was found after redirects, status, headers, and the body, decompressed."""

    url: str
    status: str
    headers: list[tuple[str, str]]
    body: bytes
    retrieved: str  # ISO 8601, UTC


@dataclass
class Host:
    """What is known of a host: when it may be asked next, and what its robots.txt says, by scheme."""

    delay: float
    ready: float = 0.0  # time.monotonic()
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    robots: dict[str, tuple[float, Protego]] = field(default_factory=dict)  # since when


class Http:
    """Fetches pages. contact: who asks, for servers to see. delay: seconds between requests to a host.

    timeout: seconds for one request; largest: bytes of a page.
    """

    def __init__(self, contact: str, delay: float, timeout: float, largest: int) -> None:
        self.agent = f"{NAME}/0.1 (+{contact})"
        self.delay = delay
        self.timeout = timeout
        self.largest = largest
        self._hosts: dict[str, Host] = {}
        headers = {"User-Agent": self.agent, "Accept-Encoding": "gzip"}
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout)
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # each request by itself

    async def close(self) -> None:
        await self._client.aclose()

    def host(self, url: str) -> Host:
        return self._hosts.setdefault(host_name(url), Host(self.delay))

    async def page(self, url: str) -> Page:
        """The page at an address, where its host allows. Raises Refused or Busy."""
        for _ in range(REDIRECTS + 1):
            if not (await self._robots(url)).can_fetch(url, NAME):
                raise Refused("robots.txt disallows it")
            page = await self._request(url, self.largest, checked=True)
            target = _target(page)
            if target is None:
                return page
            url = target
        raise Refused(f"more than {REDIRECTS} redirects")

    async def _robots(self, url: str) -> Protego:
        """The rules of a host; they are asked for once a day."""
        host, parts = self.host(url), httpx.URL(url)
        since, rules = host.robots.get(parts.scheme, (-ROBOTS_SECONDS, None))
        if rules is None or time.monotonic() - since > ROBOTS_SECONDS:
            try:
                text = await self._robots_text(str(parts.copy_with(raw_path=b"/robots.txt")))
            except Busy as busy:
                raise Busy(f"robots.txt: {busy}", busy.wait, host_name(url)) from None
            rules = Protego.parse(text)
            host.robots[parts.scheme] = time.monotonic(), rules
            host.delay = max(self.delay, rules.crawl_delay(NAME) or 0.0)
            host.ready = max(host.ready, time.monotonic() + host.delay)
        return rules

    async def _robots_text(self, url: str) -> str:
        """A host without rules (4xx) allows everything; one that cannot say raises (RFC 9309, 2.3.1)."""
        for _ in range(REDIRECTS + 1):
            try:
                page = await self._request(url, ROBOTS_BYTES, checked=False)
            except Refused as refused:
                if str(refused).startswith("status 4"):
                    return ""
                raise Refused(f"robots.txt: {refused}", again=True) from None
            target = _target(page)
            if target is None:
                return page.body.decode("utf-8", "replace").lstrip("\ufeff")
            url = target
        return ""

    async def _request(self, url: str, largest: int, checked: bool) -> Page:
        """One request, when it is the host's turn. checked: only pages of TYPES are wanted."""
        host = self.host(url)
        async with host.turn:
            await asyncio.sleep(max(0.0, host.ready - time.monotonic()))
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._get(url, largest, checked)
            except (TimeoutError, httpx.TimeoutException):
                raise Busy(f"no answer within {self.timeout:g} s") from None
            except (httpx.DecodingError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise Refused(one_line(error)) from None
            except httpx.TransportError as error:
                raise Busy(one_line(error)) from None
            finally:
                host.ready = time.monotonic() + host.delay

    async def _get(self, url: str, largest: int, checked: bool) -> Page:
        async with self._client.stream("GET", url) as response:
            headers = [
                (name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw
            ]
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            status = f"{response.status_code} {response.reason_phrase}".strip()
            if not response.has_redirect_location:
                _check(response, largest, checked)
            body = bytearray()
            if response.status_code == 200:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > largest and checked:
                        raise Refused(f"larger than {largest:,} bytes")
                    if len(body) > largest:  # rules beyond that need not be read
                        break
            return Page(url, status, headers, bytes(body), now)


def host_name(url: str) -> str:
    """The host of an address, with its port where that is not the usual one."""
    return httpx.URL(url).netloc.decode()


def _check(response: httpx.Response, largest: int, checked: bool) -> None:
    """Raises Refused or Busy on what its status and headers tell not to read."""
    status, headers = response.status_code, response.headers
    if not_now(status):
        wait = _seconds(headers.get("Retry-After"))
        if wait is not None and wait > LONGEST_WAIT:
            raise Refused(f"status {status}, asks to wait {wait:,.0f} s", again=True)
        raise Busy(f"status {status}", wait)
    if status != 200:
        raise Refused(f"status {status}")
    coding = headers.get("Content-Encoding", "").strip().lower()
    if coding not in CODINGS:
        raise Refused(f"content encoding {coding}")
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if checked and kind not in TYPES:
        raise Refused(f"content type {kind or 'unknown'}")
    if checked and headers.get("Content-Length", "").isdigit() and int(headers["Content-Length"]) > largest:
        raise Refused(f"larger than {largest:,} bytes")


def _target(page: Page) -> str | None:
    """Where a response redirects to."""
    location = next((value for name, value in page.headers if name.lower() == "location"), None)
    if not page.status.startswith("3") or location is None:
        return None
    try:
        target = httpx.URL(page.url).join(location)
    except httpx.InvalidURL:
        raise Refused(f"redirects to {location}, which is no address") from None
    if target.scheme not in ("http", "https") or not target.host:
        raise Refused(f"redirects to {target}")
    return str(target.copy_with(fragment=None))


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for: it holds seconds or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
