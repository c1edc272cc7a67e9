"""Raw text from the web as sources: HTML files, and WARC archives as crawlers write them.

The markup is the text; data.corpus.clean.MainText takes the main text out of it.
"""

import codecs
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.cli import one_line
from data.sources import Document, Files, pieces

TYPES = frozenset({"text/html", "application/xhtml+xml", "text/plain"})
BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
DECLARED = re.compile(
    rb"<(?:meta\b[^>]{0,200}?\bcharset|\?xml\b[^>]{0,80}?\bencoding)\s*=\s*[\"']?\s*([\w:.-]+)", re.IGNORECASE
)
HEAD = 4096  # bytes in which an encoding may be declared
SAMPLE = 2**16  # bytes from which one is guessed
# What browsers read under a name: the superset that is meant (WHATWG Encoding Standard, section 4.2).
SUPERSETS = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030", "gbk": "gb18030",
    "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs", "tis-620": "cp874", "iso8859-11": "cp874",
}  # fmt: skip
LATIN = frozenset({"cp1250", "cp1254", "cp1257", "mac_latin2"})  # guessed for cp1252, the most common by far
DAMAGE = 0.001  # share of characters that may be wrong in an encoding that is otherwise right


class Html(Files):
    """HTML files, one document each.

    Each file is read in the encoding of its byte order mark, in UTF-8, in what it declares, or in what it
    looks like. Raises ValueError where none of them fits.
    """

    def read(self, path: Path, name: str) -> Iterator[Document]:
        text = decode(path.read_bytes())
        if text is None:
            raise ValueError(f"{path}: in no known encoding; convert it to UTF-8 or leave it out")
        yield from pieces(name, [text])


class Warc(Files):
    """The pages in .warc and .warc.gz files: successful responses with HTML or plain text, and converted text
    (Common Crawl's WET files).

    A document's id is its address, so that it stays when pages are fetched again; `about` has url and
    retrieved (ISO date). Raises ValueError on a file that is broken or cut off.
    """

    def read(self, path: Path, name: str) -> Iterator[Document]:
        from warcio.exceptions import ArchiveLoadFailed

        try:
            with path.open("rb") as file:
                yield from _pages(file)
        except (EOFError, gzip.BadGzipFile, zlib.error, ArchiveLoadFailed) as error:
            raise ValueError(
                f"{path}: broken or cut off ({one_line(error)}); get it again, or leave it out"
            ) from error

    def size(self) -> int | None:
        return None  # compressed, and with pictures and the like


def decode(data: bytes, declared: str | None = None) -> str | None:
    """The text of a page, None where no encoding fits. declared: what the server says it is in."""
    for mark, encoding in BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    named = _codec(declared) or _codec_in(data)
    # Text in UTF-8 is hardly ever valid by chance, so it goes before a name; but what is escaped in ASCII is.
    encodings = (
        [named, "utf-8"] if named and named.startswith(("iso2022", "hz", "utf-16")) else ["utf-8", named]
    )
    for damage in (0.0, DAMAGE):
        for encoding in filter(None, encodings):
            text = data.decode(encoding, "replace")
            if text.count("\ufffd") <= damage * len(text):
                return text
    return _guessed(data)


def _codec(name: str | None) -> str | None:
    try:
        found = codecs.lookup(name or "").name
    except (LookupError, ValueError):
        return None
    return SUPERSETS.get(found, found)


def _codec_in(data: bytes) -> str | None:
    match = DECLARED.search(data, 0, HEAD)
    named = _codec(match[1].decode("ascii")) if match else None
    # A declaration that was read as ASCII cannot stand in UTF-16.
    return None if named and named.startswith(("utf-16", "utf-32")) else named


def _guessed(data: bytes) -> str | None:
    import charset_normalizer

    best = charset_normalizer.from_bytes(data[:SAMPLE]).best()
    if best is None:
        return None
    return data.decode("cp1252" if best.encoding in LATIN else best.encoding, "replace")


class _Gunzipped:
    """The content of a gzip file; the end of a file that is cut off is no EOFError, by which warcio ends."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = gzip.GzipFile(fileobj=file)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except EOFError as error:
            raise zlib.error(str(error)) from None


def _pages(file: BinaryIO) -> Iterator[Document]:
    """The pages of an archive. Raises EOFError and others where it is broken or cut off."""
    from warcio.archiveiterator import ArchiveIterator

    compressed = file.read(2) == b"\x1f\x8b"
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4))
    if not compressed and file.read() != b"\r\n\r\n":
        raise EOFError("it does not end as a record does")
    file.seek(0)
    # Not decompressed by warcio, which takes a file that is cut off for one that ends.
    for record in ArchiveIterator(_Gunzipped(file) if compressed else file):
        if record.rec_headers.get_header("Content-Length") is None:
            raise EOFError("a record without length")
        page = record.rec_type in ("response", "conversion")
        content = record.content_stream().read() if page else b""
        while record.raw_stream.read(2**16):
            pass
        if record.raw_stream.limit > 0:
            raise EOFError("a record is shorter than it says")
        if page:
            yield from _page(record, content)


def _page(record: Any, content: bytes) -> Iterator[Document]:
    headers = record.http_headers
    if headers and not (headers.get_statuscode() or "").startswith("2"):
        return
    source = headers or record.rec_headers
    kind, _, parameters = (source.get_header("Content-Type") or "").partition(";")
    if kind.strip().lower() not in TYPES:
        return
    charset = re.search(r"charset\s*=\s*[\"']?([\w:.-]+)", parameters, re.IGNORECASE)
    text = decode(content, charset[1] if charset else None)
    if text is None:  # not text, whatever its header says; there is some in every crawl
        return
    url = record.rec_headers.get_header("WARC-Target-URI") or ""
    retrieved = (record.rec_headers.get_header("WARC-Date") or "")[:10]
    id = url or (record.rec_headers.get_header("WARC-Record-ID") or "").strip("<>").removeprefix("urn:uuid:")
    about = {key: value for key, value in {"url": url, "retrieved": retrieved}.items() if value}
    for piece in pieces(id, [text]):
        yield piece._replace(about=about)
