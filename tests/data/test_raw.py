import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data.raw import Html, Warc, decode
from data.sources import PIECE, Source

PAGES = {
    "gb18030": "<html><meta charset=gb2312><p>这是一个中文网页，讲的是编码。</p></html>",
    "utf-8": "<html><p>Grüße, 世界 😀</p></html>",
    "shift_jis": '<html><meta content="text/html; charset=Shift_JIS"><p>これは日本語です。</p></html>',
    "cp1252": "<html><meta charset='iso-8859-1'><p>“naïve” – 5 €</p></html>",
    "utf-16": "<html><p>Ωραία, 页面</p></html>",
    "iso2022_jp": '<?xml version="1.0" encoding="iso-2022-jp"?><html>日本</html>',
}


def read(source: Source) -> dict[str, str]:
    """id -> text, pieces put together."""
    texts: dict[str, str] = {}
    for document in source.documents():
        texts[document.id] = texts.get(document.id, "") + document.text
    return texts


def test_html_in_mixed_encodings(tmp_path: Path) -> None:
    for encoding, text in PAGES.items():
        (tmp_path / f"{encoding}.html").write_bytes(text.encode(encoding))
    source = Html(f"{tmp_path}/*.html")
    assert read(source) == {f"{encoding}.html": text for encoding, text in PAGES.items()}
    assert source.size() == sum(len(text.encode(encoding)) for encoding, text in PAGES.items())
    assert len(source.inputs()) == len(PAGES)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", "没有声明编码的网页，只能从内容里看出来它是什么编码的。" * 5),
        ("big5", "這個網頁沒有宣告編碼，只能從內容判斷它是什麼編碼。" * 5),
        ("cp1251", "Эта страница не объявляет кодировку, её надо угадать по содержанию." * 5),
        ("euc_jp", "このページは文字コードを宣言していないので、内容から推測します。" * 5),
        ("cp1252", "Où êtes-vous allés après la fête ? Les élèves étaient très fatigués." * 5),
    ],
)
def test_an_encoding_that_is_not_declared_is_guessed(encoding: str, text: str) -> None:
    assert decode(text.encode(encoding)) == text


def test_a_wrong_declaration_does_not_matter() -> None:
    text = "<html><meta charset=iso-8859-1><p>Größe, naïve, 页面</p></html>"
    assert decode(text.encode()) == text
    assert decode(text.encode(), "latin-1") == text
    assert decode(PAGES["gb18030"].encode("gb18030"), "no-such-thing") == PAGES["gb18030"]
    assert decode("<meta charset=utf-16>é".encode()) == "<meta charset=utf-16>é"


def test_what_the_server_declares_goes_before_the_page() -> None:
    data = "<meta charset=big5><p>编码</p>".encode("gb18030")
    assert decode(data, "gbk") == "<meta charset=big5><p>编码</p>"


def test_a_few_broken_bytes_do_not_spoil_a_page() -> None:
    text = "这是很长的一段文字。" * 500
    data = text.encode()
    broken = data[:6000] + b"\xff" + data[6000:]
    assert (decode(broken) or "").replace("\ufffd", "") == text


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<html>")
    (tmp_path / "b.html").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40)
    with pytest.raises(
        ValueError, match=r"b\.html: in no known encoding; convert it to UTF-8 or leave it out"
    ):
        read(Html(f"{tmp_path}/*.html"))


def test_a_long_page_comes_in_pieces(tmp_path: Path) -> None:
    text = "<p>words and words</p>\n" * (3 * PIECE // 20)
    (tmp_path / "long.html").write_text(text)
    pieces = list(Html(f"{tmp_path}/long.html").documents())
    assert len(pieces) > 1 and "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def archive(compressed: bool = True) -> bytes:
    """A WARC file with three pages among other records."""
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=compressed)
    writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "test"}))

    def add(
        path: str, kind: str, body: bytes, status: str = "200 OK", record: str = "response", **named: str
    ) -> None:
        headers = StatusAndHeaders(status, [("Content-Type", kind), *named.items()], protocol="HTTP/1.1")
        made = writer.create_warc_record(
            f"http://a.example{path}",
            record,
            payload=io.BytesIO(body),
            http_headers=headers if record != "conversion" else None,
            warc_content_type=kind if record == "conversion" else "",
            warc_headers_dict={"WARC-Date": "2024-01-05T10:00:00Z", "WARC-Record-ID": f"<urn:uuid:id{path}>"},
        )
        writer.write_record(made)

    add("/page", "text/html; charset=gb2312", "<html>编码</html>".encode("gb18030"))
    add("/page", "text/html", b"", record="request")
    add("/gone", "text/html", b"<html>not found</html>", status="404 Not Found")
    add("/image", "image/png", b"\x89PNG")
    add("/liar", "text/html", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40)
    add("/packed", "text/plain", gzip.compress(b"plain text"), **{"Content-Encoding": "gzip"})
    add("/converted", "text/plain", "umgewandelt – Text".encode(), record="conversion")
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [True, False])
def test_an_archive_yields_its_pages(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / ("x.warc" + ".gz" * compressed)
    path.write_bytes(archive(compressed))
    source = Warc(str(path))
    assert read(source) == {
        "http://a.example/page": "<html>编码</html>",
        "http://a.example/packed": "plain text",
        "http://a.example/converted": "umgewandelt – Text",
    }
    about = [dict(document.about) for document in source.documents()]
    urls = [f"http://a.example/{name}" for name in ("page", "packed", "converted")]
    assert about == [{"url": url, "retrieved": "2024-01-05"} for url in urls]
    assert list(source.inputs()) == [str(path)]


def test_a_file_compressed_as_one_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "x.warc.gz").write_bytes(gzip.compress(archive(compressed=False)))
    assert len(read(Warc(f"{tmp_path}/x.warc.gz"))) == 3


def broken() -> Iterator[tuple[str, bytes]]:
    whole, plain = archive(), archive(compressed=False)
    for cut in (3, 20, len(whole) // 2, len(whole) - 1):
        yield f"cut at {cut}", whole[:cut]
    for cut in (100, len(plain) // 2, len(plain) - 30, len(plain) - 1):
        yield f"plain, cut at {cut}", plain[:cut]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    yield "flipped", bytes(flipped)
    yield "followed by something", whole + b"something"
    yield "empty", b""
    yield "no archive", b"<html>not an archive</html>\r\n\r\n"
    yield "gzip of something", gzip.compress(b"something else")
    yield "random", os.urandom(1000)


@pytest.mark.parametrize(("name", "data"), broken(), ids=[name for name, _ in broken()])
def test_a_broken_archive_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "x.warc.gz").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"x\.warc\.gz: broken or cut off \(.*\); get it again, or leave it out$"
    ) as caught:
        read(Warc(f"{tmp_path}/x.warc.gz"))
    assert "\n" not in str(caught.value)
