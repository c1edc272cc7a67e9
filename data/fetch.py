"""Web pages to WARC files, politely.

    python -m data.fetch addresses=list.txt directory=fetched contact=you@example.org

Pages go to `<directory>/00000.warc.gz` and so on, one gzip member a page; data.raw.Warc reads them. What is
there is noted in done.jsonl, what is not, and why, in failed.jsonl. The same command again goes on where it
stopped, after a kill too: it fetches what is in neither, and what failed only for the time being.
"""

import asyncio
import fcntl
import heapq
import io
import json
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data.cli import main_guard, one_line, one_line_errors
from data.http import Busy, Http, Page, Refused, host_name

CONF = Path(__file__).resolve().parent.parent / "conf"
FILE_BYTES = 2**30  # of a WARC file; the next page then begins another
NAMED = 3  # addresses told of those that failed for one reason
EXAMPLES = {"contact": "you@example.org", "addresses": "list.txt", "directory": "fetched"}
DROPPED = frozenset({"transfer-encoding", "content-length", "content-encoding"})


class Store:
    """A folder of fetched pages and of what is known about the others; one process at a time has it open.

    A page is written whole and then noted in done.jsonl; opened again, what is not noted is cut off. there:
    addresses of the pages that were here when it was opened; refused: those that had failed for good.
    """

    def __init__(self, directory: Path, agent: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.agent = agent
        self._lock = (directory / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory}: another fetch is at work here; wait for it to end") from None
        done = [line for line in _lines(directory / "done.jsonl") if line["end"] <= self._size(line["file"])]
        failed = [line for line in _lines(directory / "failed.jsonl") if not line["again"]]
        self.there = {line["address"] for line in done}
        self.refused = {line["address"] for line in failed}
        self.pages = len(done)
        self._number = max((int(line["file"][:5]) for line in done), default=0)
        self._warc = (directory / self._name()).open("ab")
        self._warc.truncate(max((line["end"] for line in done if line["file"] == self._name()), default=0))
        self._done = _rewritten(directory / "done.jsonl", done)
        self._failed = _rewritten(directory / "failed.jsonl", failed)

    def close(self) -> None:
        with ExitStack() as files:  # all of them, also where a full disk refuses what one still holds
            for file in (self._lock, self._failed, self._done, self._warc):
                files.callback(file.close)

    def keep(self, address: str, page: Page) -> None:
        if self._warc.seek(0, io.SEEK_END) > FILE_BYTES:
            self._warc.close()
            self._number += 1
            self._warc = (self.directory / self._name()).open("ab")
        record = _member(page)
        if not self._warc.seek(0, io.SEEK_END):
            record = _first_member(self._name(), self.agent) + record
        self._warc.write(record)
        self._warc.flush()
        line = {"address": address, "url": page.url, "file": self._name(), "end": self._warc.tell()}
        _append(self._done, line)
        self.pages += 1

    def fail(self, address: str, reason: str, again: bool) -> None:
        _append(self._failed, {"address": address, "reason": reason, "again": again})

    def _name(self) -> str:
        return f"{self._number:05}.warc.gz"

    def _size(self, name: str) -> int:
        path = self.directory / name
        return path.stat().st_size if path.is_file() else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file; the last one may be torn, and is left out then."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _rewritten(path: Path, lines: list[dict[str, Any]]) -> Any:
    """The file with just these lines, open to append."""
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fresh.replace(path)
    return path.open("a", encoding="utf-8")


def _append(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _member(page: Page) -> bytes:
    """A response record. The body has no coding any more; the header that named it gets another name."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    headers = [(name, value) for name, value in page.headers if name.lower() not in DROPPED]
    coded = [("X-Crawler-" + name, value) for name, value in page.headers if name.lower() in DROPPED]
    headers += [*coded, ("Content-Length", str(len(page.body)))]
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=True)
    record = writer.create_warc_record(
        page.url,
        "response",
        payload=io.BytesIO(page.body),
        http_headers=StatusAndHeaders(page.status, headers, protocol="HTTP/1.1"),
        warc_headers_dict={"WARC-Date": page.retrieved},
    )
    writer.write_record(record)
    return buffer.getvalue()


def _first_member(name: str, agent: str) -> bytes:
    from warcio.warcwriter import WARCWriter

    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=True)
    writer.write_record(writer.create_warcinfo_record(name, {"software": agent, "robots": "obey"}))
    return buffer.getvalue()


class Crawl:
    """Addresses by host, each host asked when it is ready, `hosts` of them at the same time."""

    def __init__(self, http: Http, store: Store, hosts: int, retries: int, meter: "Meter") -> None:
        self.http = http
        self.store = store
        self.hosts = hosts
        self.retries = retries
        self.meter = meter
        self._waiting: dict[
            str, deque[tuple[str, int]]
        ] = {}  # host -> addresses and how often each was tried
        self._ready: list[tuple[float, str]] = []  # a heap of when each host may be asked

    async def run(self, addresses: list[str]) -> None:
        for address in addresses:
            self._waiting.setdefault(host_name(address), deque()).append((address, 0))
        self._ready = [(0.0, host) for host in self._waiting]
        await asyncio.gather(*(self._work() for _ in range(min(self.hosts, len(self._ready)))))

    async def _work(self) -> None:
        while self._ready:  # where none is left, the other workers have the rest
            ready, host = heapq.heappop(self._ready)
            await asyncio.sleep(max(0.0, ready - time.monotonic()))
            address, tried = self._waiting[host].popleft()
            wait = await self._try(host, address, tried)
            if self._waiting[host]:
                ready = max(self.http.host(address).ready, time.monotonic() + wait)
                heapq.heappush(self._ready, (ready, host))

    async def _try(self, host: str, address: str, tried: int) -> float:
        """Fetch one address. Returns how many seconds its host asks to be left alone beyond the usual."""
        try:
            page = await self.http.page(address)
        except Refused as refused:
            self._fail(address, str(refused), refused.again)
        except Busy as busy:
            if tried < self.retries:
                self._waiting[host].appendleft((address, tried + 1))
                return busy.wait if busy.wait is not None else self.http.delay * 2 ** (tried + 1)
            self._fail(address, str(busy), again=True)
            while busy.host == host and self._waiting[host]:
                self._fail(self._waiting[host].popleft()[0], str(busy), again=True)
        else:
            self.store.keep(address, page)
            self.meter.fetched(len(page.body))
        return 0.0

    def _fail(self, address: str, reason: str, again: bool) -> None:
        self.store.fail(address, reason, again)
        self.meter.failed(address, reason)


class Meter:
    """What has become of the addresses, and a progress bar on a terminal: addresses done, pages a second,
    failures, and the time left. there, refused: addresses that an earlier start had fetched, or had given up
    for good. failures: addresses by the reason."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.pages = self.bytes = self.there = self.refused = 0
        self.failures: defaultdict[str, list[str]] = defaultdict(list)
        self._progress = Progress(
            TextColumn("fetch"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}  {task.fields[rate]:.1f}/s"),
            TextColumn("{task.fields[failures]:,} failed"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def begin(self, addresses: int) -> Progress:
        self._started = time.perf_counter()
        self._task = self._progress.add_task("", total=addresses, rate=0.0, failures=0)
        return self._progress

    def fetched(self, size: int) -> None:
        self.pages += 1
        self.bytes += size
        self._show()

    def failed(self, address: str, reason: str) -> None:
        self.failures[reason].append(address)
        self._show()

    def ranked(self) -> list[tuple[str, list[str]]]:
        """The failures, the most frequent reason first."""
        return sorted(self.failures.items(), key=lambda failure: -len(failure[1]))

    def summary(self, failed: Path) -> Iterator[str]:
        """Lines that say it all. failed: the file that names the failures."""
        yield f"fetched: {self.pages:,} pages, {self.bytes:,} bytes; {self.there:,} were there already"
        if self.refused:
            yield f"failed before, for good: {self.refused:,}, listed in {failed}; delete it to try again"
        for reason, addresses in self.ranked():
            more = len(addresses) - NAMED
            others = f" and {more:,} more, listed in {failed}" if more > 0 else ""
            yield f"failed: {len(addresses):,} {reason}: {', '.join(addresses[:NAMED])}{others}"

    def _show(self) -> None:
        failures = sum(map(len, self.failures.values()))
        rate = self.pages / (time.perf_counter() - self._started)
        self._progress.update(self._task, completed=self.pages + failures, rate=rate, failures=failures)


def read_addresses(path: Path) -> list[str]:
    """The addresses in a file, one a line, each once; empty lines and those that begin with # are skipped.

    Raises ValueError on a file that cannot be read and a line that is no address.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"addresses: {path}: {reason}; name a text file with one address a line") from None
    found: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            url = httpx.URL(line.strip()).copy_with(fragment=None)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{path}: line {number}: {line.strip()} is no address; write https://host/page")
        found[str(url)] = None
    if not found:
        raise ValueError(f"{path}: holds no address; write one a line")
    return list(found)


def check(config: DictConfig) -> None:
    """Raises ValueError in one line on a key that is not set, or to what cannot be."""
    for key, example in EXAMPLES.items():
        if OmegaConf.is_missing(config, key) or config[key] is None:
            raise ValueError(f"{key}: must be set, for example {key}={example}")
    contact = str(config.contact)
    if not contact.isascii() or " " in contact or not ("@" in contact or "://" in contact):
        raise ValueError(
            f"contact: {contact!r} reaches no one; give an e-mail address or the address of a page"
        )
    for key in ("delay", "timeout"):
        if not (isinstance(config[key], int | float) and config[key] > 0):
            raise ValueError(f"{key}: {config[key]!r} is not a number of seconds above 0; give one")
    for key, least in {"hosts": 1, "retries": 0, "largest": 1}.items():
        if not (isinstance(config[key], int) and config[key] >= least):
            raise ValueError(f"{key}: {config[key]!r} is not a whole number of at least {least}; give one")


def fetch(config: DictConfig) -> Meter:
    """Fetch what is not there yet. Raises ValueError on a mistake in the settings, a folder that cannot be
    written, or if nothing was had."""
    check(config)
    addresses, directory = read_addresses(Path(str(config.addresses))), Path(str(config.directory))
    meter, http = Meter(), Http(str(config.contact), config.delay, config.timeout, config.largest)
    try:
        store = Store(directory, http.agent)
        try:
            meter.there = len(store.there.intersection(addresses))
            meter.refused = len(store.refused.intersection(addresses))
            known = store.there | store.refused
            rest = [address for address in addresses if address not in known]
            crawl = Crawl(http, store, config.hosts, config.retries, meter)
            with meter.begin(len(rest)):
                asyncio.run(crawl.run(rest))
        finally:
            store.close()
    except OSError as error:
        raise ValueError(
            f"directory: {directory}: {error.strerror}; make room there or name a folder that can be written"
        ) from None
    if not store.pages:
        reason = next(iter(meter.ranked()), ("every one failed before", []))[0]
        raise ValueError(
            f"{config.addresses}: nothing could be fetched ({reason}); see {directory}/failed.jsonl"
        )
    return meter


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="fetch")
@one_line_errors
def main(config: DictConfig) -> None:
    meter = fetch(config)
    for line in meter.summary(Path(config.directory, "failed.jsonl")):
        print(line)
    print(config.directory)


if __name__ == "__main__":
    main_guard(main)
