import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data.fetch import Store, fetch, read_addresses
from data.http import Page, _seconds
from data.raw import Warc
from data.sources import Document

CONTACT = "tests@example.org"
ROOT = Path(__file__).resolve().parents[2]


class Site:
    """A web server on the loopback: `answers` maps a path to (status, headers, body), one after the other."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        self.requests: list[tuple[float, str, dict[str, str]]] = []
        self.closing = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append((time.monotonic(), self.path, dict(self.headers)))
                answers = site.answers.get(self.path, [(404, {}, b"none")])
                status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
                if self.path == "/stalled":
                    site.closing.wait()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def page(self, path: str, body: str = "<html>page</html>", status: int = 200, **headers: str) -> str:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = (status, {"Content-Type": "text/html; charset=utf-8"} | named, body.encode())
        self.answers.setdefault(path, []).append(answer)
        return self.url + path

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.requests]

    def gaps(self) -> list[float]:
        times = [moment for moment, _, _ in self.requests]
        return [later - sooner for sooner, later in zip(times, times[1:], strict=False)]

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def new_site() -> Iterator[Callable[[], Site]]:
    sites: list[Site] = []

    def make() -> Site:
        sites.append(Site())
        return sites[-1]

    yield make
    for each in sites:
        each.close()


@pytest.fixture
def site(new_site: Callable[[], Site]) -> Site:
    return new_site()


class Fetched:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, pages: list[str], **changes: Any) -> dict[str, str]:
        """Fetch, and return the failures: address -> reason."""
        (self.folder / "list.txt").write_text("\n".join(pages))
        settings = {
            "delay": 0.01,
            "hosts": 4,
            "retries": 2,
            "timeout": 10,
            "largest": 10_000,
            "contact": CONTACT,
        }
        places = {"addresses": str(self.folder / "list.txt"), "directory": str(self.folder / "out")}
        self.meter = fetch(OmegaConf.create(settings | places | changes))
        return {line["address"]: line["reason"] for line in self.failed()}

    def told(self) -> list[str]:
        """What the last fetch says at its end."""
        return list(self.meter.summary(Path("failed.jsonl")))

    def failed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out/failed.jsonl").read_text().splitlines()]

    def pages(self) -> list[Document]:
        return list(Warc(f"{self.folder}/out/*.warc.gz").documents())


@pytest.fixture
def fetched(tmp_path: Path) -> Fetched:
    return Fetched(tmp_path)


def test_pages_come_back_through_the_archive(site: Site, fetched: Fetched) -> None:
    texts = {
        site.page(f"/{n}", f"<html>Seite {n}, 页面</html>"): f"<html>Seite {n}, 页面</html>" for n in range(3)
    }
    compressed = gzip.compress(b"<html>small</html>")
    site.answers["/z"] = [(200, {"Content-Type": "text/html", "Content-Encoding": "gzip"}, compressed)]
    plain = site.page("/plain", "only text", Content_Type="text/plain")
    assert fetched([*texts, site.url + "/z", plain]) == {}
    pages = fetched.pages()
    expected = texts | {site.url + "/z": "<html>small</html>", plain: "only text"}
    assert {page.about["url"]: page.text for page in pages} == expected
    assert all(page.about["retrieved"] == time.strftime("%Y-%m-%d", time.gmtime()) for page in pages)
    assert len({page.id for page in pages}) == 5
    assert {headers["User-Agent"] for _, _, headers in site.requests} == {f"isoflop/0.1 (+{CONTACT})"}


def test_robots_are_asked_first_and_obeyed(site: Site, fetched: Fetched) -> None:
    site.page(
        "/robots.txt",
        "User-agent: *\nDisallow: /\n\n"
        "User-agent: isoflop\nDisallow: /private\nAllow: /private/but\nDisallow: /*.cgi$",
        Content_Type="text/plain",
    )
    allowed = [site.page("/a"), site.page("/private/but"), site.page("/x.cgi?y")]
    refused = [site.page("/private/x"), site.page("/x.cgi")]
    assert fetched([*refused, *allowed]) == dict.fromkeys(refused, "robots.txt disallows it")
    assert site.paths() == ["/robots.txt", "/a", "/private/but", "/x.cgi?y"]


@pytest.mark.parametrize(
    ("status", "allowed"), [(404, True), (403, True), (500, False), (503, False), (429, False)]
)
def test_what_a_robots_status_means(
    site: Site, fetched: Fetched, status: int, allowed: bool, tmp_path: Path
) -> None:
    """RFC 9309, 2.3.1.3 and 2.3.1.4: without rules all is allowed; rules that cannot be had allow nothing."""
    site.page("/robots.txt", status=status)
    addresses = [site.page(f"/{n}") for n in range(3)]
    if allowed:
        assert fetched(addresses) == {}
    else:
        with pytest.raises(
            ValueError, match=rf"list\.txt: nothing could be fetched \(robots\.txt: status {status}\)"
        ):
            fetched(addresses)
        assert site.paths() == ["/robots.txt"] * 3  # once for the whole host, and two retries
        assert [line["again"] for line in fetched.failed()] == [True] * 3


def test_requests_to_a_host_are_apart(site: Site, fetched: Fetched) -> None:
    fetched([site.page(f"/{n}") for n in range(4)], delay=0.1)
    assert len(site.gaps()) == 4 and min(site.gaps()) > 0.099


def test_robots_may_ask_for_more_time(site: Site, fetched: Fetched) -> None:
    site.page("/robots.txt", "User-agent: *\nCrawl-delay: 0.2", Content_Type="text/plain")
    fetched([site.page(f"/{n}") for n in range(3)])
    assert len(site.gaps()) == 3 and min(site.gaps()) > 0.199


def test_hosts_are_asked_at_the_same_time(new_site: Callable[[], Site], fetched: Fetched) -> None:
    sites = [new_site() for _ in range(3)]
    fetched([site.page(f"/{n}") for site in sites for n in range(4)], delay=0.1)
    spans = [(site.requests[0][0], site.requests[-1][0]) for site in sites]
    assert max(start for start, _ in spans) < min(end for _, end in spans)
    assert all(min(site.gaps()) > 0.099 for site in sites)


def test_a_busy_server_is_asked_again_later(site: Site, fetched: Fetched) -> None:
    address = site.page("/a", status=503)
    site.page("/a", "<html>at last</html>")
    late = site.page("/b", status=429, Retry_After="1")
    site.page("/b", "<html>later</html>")
    slow = site.page("/c", status=408)
    site.page("/c", "<html>once more</html>")
    assert fetched([address, late, slow]) == {}
    texts = ["<html>at last</html>", "<html>later</html>", "<html>once more</html>"]
    assert sorted(page.text for page in fetched.pages()) == texts
    first, second = (moment for moment, path, _ in site.requests if path == "/b")
    assert second - first >= 1


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _seconds(None) is None and _seconds("soon") is None
    assert _seconds("120") == 120
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert 3e8 < (_seconds("Wed, 21 Oct 2065 07:28:00 GMT") or 0) < 2e9


def test_what_fails_is_named_and_the_rest_goes_on(site: Site, fetched: Fetched) -> None:
    big = site.page("/big", "x" * 20_000)
    bomb = gzip.compress(b"x" * 1_000_000)
    site.answers["/bomb"] = [(200, {"Content-Type": "text/html", "Content-Encoding": "gzip"}, bomb)]
    site.answers["/broken"] = [(200, {"Content-Type": "text/html", "Content-Encoding": "gzip"}, b"not gzip")]
    image = site.page("/image", Content_Type="image/png")
    away = site.page("/away", status=503)
    long = site.page("/long", status=503, Retry_After="86400")
    loop = site.page("/loop", status=302, Location="/loop")
    file = site.page("/file", status=302, Location="ftp://a.example/x")
    good = site.page("/good")
    gone = site.url + "/gone"
    bomb_url, broken = site.url + "/bomb", site.url + "/broken"
    failures = fetched([big, bomb_url, broken, image, away, long, loop, file, gone, good])
    assert "incorrect header check" in failures.pop(broken)
    assert failures == {
        big: "larger than 10,000 bytes",
        bomb_url: "larger than 10,000 bytes",
        image: "content type image/png",
        away: "status 503",
        long: "status 503, asks to wait 86,400 s",
        loop: "more than 5 redirects",
        file: "redirects to ftp://a.example/x",
        gone: "status 404",
    }
    assert {line["address"] for line in fetched.failed() if line["again"]} == {away, long}
    assert [page.about["url"] for page in fetched.pages()] == [good]
    assert site.paths().count("/away") == 3 and site.paths().count("/gone") == 1
    told = fetched.told()
    assert told[:2] == [
        "fetched: 1 pages, 17 bytes; 0 were there already",
        f"failed: 2 larger than 10,000 bytes: {big}, {bomb_url}",
    ]
    assert f"failed: 1 status 404: {gone}" in told and len(told) == 9


def test_a_host_that_is_not_there_fails_as_a_whole(
    site: Site, new_site: Callable[[], Site], fetched: Fetched
) -> None:
    gone = new_site()
    gone.server.server_close()
    dead = [f"{gone.url}/{n}" for n in range(20)]
    astray = site.page("/astray", status=301, Location=dead[0])
    good = [site.page(f"/{n}") for n in range(3)]
    failures = fetched([astray, *dead, *good], retries=1)
    assert set(failures) == {astray, *dead}
    assert all("robots.txt: " in reason and "connect" in reason.lower() for reason in failures.values())
    assert len(fetched.pages()) == 3


def test_a_server_that_stops_halfway_is_given_up(site: Site, fetched: Fetched) -> None:
    site.answers["/half"] = [(200, {"Content-Type": "text/html", "Content-Length": "10"}, b"half")]
    half, stalled = site.url + "/half", site.url + "/stalled"
    failures = fetched([site.page("/good"), half, stalled], timeout=1, retries=0)
    assert len(fetched.pages()) == 1
    assert "without sending complete message body" in failures[half]
    assert failures[stalled] == "no answer within 1 s"


def test_redirects_are_followed_to_where_they_are_allowed(
    site: Site, new_site: Callable[[], Site], fetched: Fetched
) -> None:
    other = new_site()
    other.page("/robots.txt", "User-agent: *\nDisallow: /no", Content_Type="text/plain")
    target, forbidden = other.page("/yes", "<html>moved</html>"), other.page("/no")
    moved = site.page("/moved", status=301, Location=target + "#part")
    astray = site.page("/astray", status=302, Location=forbidden)
    near = site.page("/near", status=307, Location="../here")
    site.page("/here", "<html>here</html>")
    assert fetched([moved, astray, near]) == {astray: "robots.txt disallows it"}
    assert {page.about["url"]: page.text for page in fetched.pages()} == {
        target: "<html>moved</html>",
        site.url + "/here": "<html>here</html>",
    }
    assert "/no" not in other.paths()


def test_what_is_done_is_not_fetched_again(site: Site, fetched: Fetched) -> None:
    addresses = [site.page(f"/{n}") for n in range(3)]
    busy = site.page("/busy", status=503)
    fetched([*addresses, busy, site.url + "/gone"], retries=0)
    before = len(site.requests)
    site.answers["/busy"] = []
    site.page("/busy")
    new = site.page("/new")
    assert fetched([*addresses, busy, site.url + "/gone", new]) == {site.url + "/gone": "status 404"}
    assert sorted(site.paths()[before:]) == ["/busy", "/new", "/robots.txt"]
    assert len(fetched.pages()) == 5
    assert fetched.told() == [
        "fetched: 2 pages, 34 bytes; 3 were there already",
        "failed before, for good: 1, listed in failed.jsonl; delete it to try again",
    ]
    before = len(site.requests)
    fetched(addresses)
    assert len(site.requests) == before
    assert fetched.told() == ["fetched: 0 pages, 0 bytes; 3 were there already"]


def test_of_many_failures_some_are_named(site: Site, fetched: Fetched) -> None:
    gone = [f"{site.url}/gone{n}" for n in range(5)]
    fetched([*gone, site.page("/good")])
    named = ", ".join(gone[:3])
    assert fetched.told()[1:] == [f"failed: 5 status 404: {named} and 2 more, listed in failed.jsonl"]


def test_a_killed_fetch_goes_on_and_tears_nothing(site: Site, fetched: Fetched, tmp_path: Path) -> None:
    addresses = [site.page(f"/{n}", f"<html>{n} {os.urandom(2000).hex()}</html>") for n in range(60)]
    (tmp_path / "list.txt").write_text("\n".join(addresses))
    command = [
        sys.executable,
        "-m",
        "data.fetch",
        f"addresses={tmp_path}/list.txt",
        f"directory={tmp_path}/out",
    ]
    command += [f"contact={CONTACT}", "delay=0.02"]
    for stop in (10, 25, 40):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while len(set(site.paths())) < stop:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        fetched.pages()  # nothing in it is torn
    # As after a loss of power: a page that was not noted, and half of one
    with (tmp_path / "out/00000.warc.gz").open("ab") as file:
        file.write(b"\x1f\x8b\x08 half a page")
    with (tmp_path / "out/done.jsonl").open("a") as file:
        file.write('{"address": "http://half')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fetched: " in done.stdout
    assert sorted(page.about["url"] for page in fetched.pages()) == sorted(addresses)
    counts = [site.paths().count(f"/{n}") for n in range(60)]
    assert min(counts) == 1 and sum(counts) <= 63  # one in flight at each kill


def test_files_do_not_grow_for_ever(
    fetched: Fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.fetch.FILE_BYTES", 1500)
    header = [("Content-Type", "text/html")]
    for part in range(2):
        store = Store(tmp_path / "out", "agent")
        for n in range(part * 4, part * 4 + 4):
            body = os.urandom(500).hex().encode()
            store.keep(f"http://a/{n}", Page(f"http://a/{n}", "200 OK", header, body, "2024-01-05T00:00:00Z"))
        store.close()
    assert [page.about["url"] for page in fetched.pages()] == [f"http://a/{n}" for n in range(8)]
    assert len(list((tmp_path / "out").glob("*.warc.gz"))) > 2


def test_two_fetches_in_one_folder_are_refused(site: Site, fetched: Fetched, tmp_path: Path) -> None:
    store = Store(tmp_path / "out", "agent")
    with pytest.raises(ValueError, match=r"out: another fetch is at work here"):
        fetched([site.page("/a")])
    store.close()


def test_mistakes_are_one_line(fetched: Fetched, tmp_path: Path) -> None:
    for line in ("example.org/page", "ftp://example.org/x", "http://", "/local/file"):
        with pytest.raises(ValueError, match=rf"list\.txt: line 2: {line} is no address"):
            fetched(["http://a.example/", line])
    with pytest.raises(ValueError, match=r"list\.txt: holds no address"):
        fetched(["# nothing", ""])
    for key, example in (
        ("contact", "you@example.org"),
        ("addresses", "list.txt"),
        ("directory", "fetched"),
    ):
        for nothing in ("???", None):
            with pytest.raises(ValueError, match=rf"^{key}: must be set, for example {key}={example}$"):
                fetched(["http://a.example/"], **{key: nothing})
    (tmp_path / "bytes").write_bytes(b"\xff")
    for path, wrong in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "bytes", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ):
        line = f"^addresses: {path}: {wrong}; name a text file with one address a line$"
        with pytest.raises(ValueError, match=line):
            fetched([], addresses=str(path))
    with pytest.raises(ValueError, match=f"^directory: {tmp_path}/bytes: File exists; make room"):
        fetched(["http://a.example/"], directory=f"{tmp_path}/bytes")
    for contact in ("", "me", "me @x.org"):
        with pytest.raises(ValueError, match=r"^contact: .* reaches no one"):
            fetched(["http://a.example/"], contact=contact)
    for key, value in (("delay", 0), ("delay", "x"), ("timeout", None), ("timeout", float("nan"))):
        with pytest.raises(ValueError, match=rf"^{key}: {value!r} is not a number of seconds above 0"):
            fetched(["http://a.example/"], **{key: value})
    for key, value in (("hosts", 0), ("hosts", 1.5), ("retries", -1), ("largest", "x")):
        with pytest.raises(ValueError, match=rf"^{key}: {value!r} is not a whole number of at least [01]"):
            fetched(["http://a.example/"], **{key: value})
    command = [sys.executable, "-m", "data.fetch", "addresses=none.txt", "directory=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: contact: must be set, for example contact=you@example.org\n"


def test_a_full_disk_is_one_line_and_a_fetch_goes_on(
    site: Site, fetched: Fetched, disk: Path, tmp_path: Path
) -> None:
    addresses = [site.page(f"/{n}", os.urandom(60_000).hex()) for n in range(6)]
    changes: dict[str, Any] = {"directory": f"{disk}/out", "largest": 10**6}
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(2**22 - 2**18))
    with pytest.raises(ValueError, match=rf"^directory: {disk}/out: No space left on device; make room"):
        fetched(addresses, **changes)
    ballast.unlink()
    (tmp_path / "out").symlink_to(disk / "out")
    assert fetched(addresses, **changes) == {}
    assert sorted(page.about["url"] for page in fetched.pages()) == addresses
    assert 0 < fetched.meter.there < 6 and fetched.meter.pages == 6 - fetched.meter.there


def test_addresses_are_read_once_each(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# a list\nhttp://a.example/x#part\n\n http://a.example/x \nhttps://例子.example/页\n")
    assert read_addresses(path) == [
        "http://a.example/x",
        "https://xn--fsqu00a.example/%E9%A1%B5",
    ]
