"""How small general compressors make the held-out text: the figures a language model's bits per byte face."""

import lzma
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

COMPRESSED_BYTES = 2**22  # xz keeps a dozen bytes of state per byte; more text would cost time and memory


class HeldOutCompression:
    """Compresses the first COMPRESSED_BYTES of the text it is given with gzip -9 and xz -9, in a thread.

    The dictionary of xz is as large as the text can be, so that it is as good as the 64 MiB of -9.
    """

    def __init__(self) -> None:
        self.bytes = 0
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": COMPRESSED_BYTES}]
        self._gzip = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
        self._xz = lzma.LZMACompressor(filters=filters)
        self._sizes = {"gzip": 0, "xz": 0}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heldout")
        self._last: Future[None] | None = None

    def add(self, text: str) -> None:
        data = text.encode()[: COMPRESSED_BYTES - self.bytes]
        if data:
            self.bytes += len(data)
            self._last = self._thread.submit(self._compress, data)

    def close(self) -> dict[str, Any]:
        """{"gzip_bits_per_byte", "xz_bits_per_byte", "compressed_bytes": how much text they are of}."""
        if self._last:
            self._last.result()
        self._thread.shutdown()
        self._sizes["gzip"] += len(self._gzip.flush())
        self._sizes["xz"] += len(self._xz.flush())
        rates = {f"{name}_bits_per_byte": 8 * size / max(self.bytes, 1) for name, size in self._sizes.items()}
        return {**rates, "compressed_bytes": self.bytes}

    def _compress(self, data: bytes) -> None:
        self._sizes["gzip"] += len(self._gzip.compress(data))
        self._sizes["xz"] += len(self._xz.compress(data))
