"""Making WET files for tests: records, members, and everything that can be wrong with them."""

import gzip


def record(number: object, text: bytes | str, **changes: object) -> bytes:
    """One WARC record. Changes: length, end, kind, identity, extra (header lines), url."""
    body = text.encode() if isinstance(text, str) else text
    url = changes.get("url", f"http://site.example/{number}")
    identity = changes.get("identity", f"<urn:uuid:{number}>")
    head = (
        f"WARC/1.0\r\nWARC-Type: {changes.get('kind', 'conversion')}\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2019-02-16T07:20:43Z\r\nWARC-Record-ID: {identity}\r\n"
        f"WARC-Block-Digest: sha1:{number}\r\n{changes.get('extra', '')}"
        f"Content-Length: {changes.get('length', len(body))}\r\n\r\n"
    )
    return head.encode() + body + bytes(changes.get("end", b"\r\n\r\n"))  # type: ignore[call-overload]


def member(*records: bytes) -> bytes:
    """Records as one gzip member."""
    return gzip.compress(b"".join(records), mtime=0)


def wet_file(texts: list[str], name: str = "") -> bytes:
    """A WET file as Common Crawl writes it: a warcinfo, then a member a page."""
    head = member(record("info", "software: test", kind="warcinfo", identity=f"<info {name}>"))
    return head + b"".join(member(record(f"{name}{number}", text)) for number, text in enumerate(texts))
