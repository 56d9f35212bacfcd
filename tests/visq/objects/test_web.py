"""Images of the web: read from a real server, which attacks."""

from __future__ import annotations

import datetime
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.website import Page, Visit, Website
from visq.errors import (
    ImageError,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
)
from visq.objects import FetchedObject, NotModified
from visq.objects.web import WebReader
from visq.objects.web_ref import parse_url
from visq.objects.web_rules import WebRules

pytestmark = pytest.mark.timeout(30)
"""A server that is waited for without end fails its test by this."""

DATA = bytes(range(256)) * 40
MAX = 100_000


@pytest.fixture
def site() -> Iterator[Website]:
    with Website() as site:
        yield site


def reader(*sites: Website, seconds: float = 20.0, silence: float = 20.0) -> WebReader:
    """One that may read from `sites`, beside the public internet."""
    rules = WebRules(listed=frozenset(("127.0.0.1", site.port) for site in sites))
    return WebReader(rules, silence_seconds=silence, total_seconds=seconds)


def read(reader: WebReader, url: str, etag: str | None = None) -> FetchedObject | NotModified:
    return reader.get(parse_url(url), max_bytes=MAX, if_none_match=etag)


def test_an_image_is_read_with_its_etag(site: Website) -> None:
    url = site.show("/a.png", DATA, '"1"')
    assert read(reader(site), url + "?signature=%2Fb") == FetchedObject(DATA, '"1"')
    [asked] = site.asked
    assert asked.path == "/a.png?signature=%2Fb"
    assert asked.headers["host"] == site.host
    assert asked.headers["accept-encoding"] == "identity"
    assert "cookie" not in asked.headers


def test_an_image_that_is_unchanged_is_not_read_again(site: Website) -> None:
    url = site.show("/a.png", DATA, '"1"')
    assert read(reader(site), url, '"1"') == NotModified()
    assert read(reader(site), url, '"2"') == FetchedObject(DATA, '"1"')


@pytest.mark.parametrize("etag", ['W/"1"', "1", '""1"', '"' + "1" * 500 + '"', None])
def test_an_etag_that_does_not_promise_the_same_bytes_is_none(
    site: Website, etag: str | None
) -> None:
    url = site.show("/a.png", DATA, etag)
    assert read(reader(site), url) == FetchedObject(DATA, None)


def test_unchanged_says_nothing_to_who_did_not_ask_for_it(site: Website) -> None:
    url = site.page("/a.png", lambda visit: visit.answer(304))
    with pytest.raises(ImageFetchFailed, match="304"):
        read(reader(site), url)


def test_a_body_may_come_in_chunks_or_end_with_the_connection(site: Website) -> None:
    chunked = site.page(
        "/chunked",
        lambda visit: visit.raw(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        ),
    )
    closed = site.page("/closed", lambda visit: visit.raw(b"HTTP/1.0 200 OK\r\n\r\nabcde"))
    for url in (chunked, closed):
        assert read(reader(site), url) == FetchedObject(b"abcde", None)


def test_a_password_goes_to_its_own_server_only(site: Website) -> None:
    with Website() as other:
        other.show("/b", DATA)
        site.redirect("/a", other.url("/b"))
        url = site.url("/a").replace("://", "://me:w%20rd@")
        assert read(reader(site, other), url) == FetchedObject(DATA, None)
        assert site.asked[0].headers["authorization"] == "Basic bWU6dyByZA=="
        assert "authorization" not in other.asked[0].headers


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_and_the_etag_of_its_end_is_not_that_of_the_image(
    site: Website, status: int
) -> None:
    site.show("/end", DATA, '"1"')
    url = site.redirect("/a.png", "/end", status)
    assert read(reader(site), url, '"1"') == FetchedObject(DATA, None)
    assert [asked.headers.get("if-none-match") for asked in site.asked] == ['"1"', None]


def test_no_more_than_three_redirects_are_followed(site: Website) -> None:
    site.show("/0", DATA)
    for number in range(1, 5):
        site.redirect(f"/{number}", f"/{number - 1}")
    assert read(reader(site), site.url("/3")) == FetchedObject(DATA, None)
    with pytest.raises(ImageForbidden, match="more than 3 times"):
        read(reader(site), site.url("/4"))


# --- where a URL may not lead --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "scheme"), [("127.0.0.1", "http"), ("127.0.0.1", "https"), ("localhost", "https")]
)
def test_a_redirect_into_the_network_of_the_server_is_refused(
    site: Website, host: str, scheme: str
) -> None:
    with Website() as inside:
        inside.show("/secret", DATA)
        url = site.redirect("/a.png", f"{scheme}://{host}:{inside.port}/secret?to=1")
        with pytest.raises(ImageForbidden) as raised:
            read(reader(site), url)
        assert inside.asked == []
    assert raised.value.message.startswith(f"image {site.url('/a.png')} leads to ")
    assert "to=1" not in raised.value.message


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "https://", "https://a b/", "https://[::1"]
)
def test_a_redirect_to_something_else_is_refused(site: Website, location: str) -> None:
    url = site.redirect("/a.png", location)
    with pytest.raises(ImageForbidden, match="redirected to a URL that"):
        read(reader(site), url)


def test_the_rules_of_a_url_hold_for_a_redirect_too(site: Website) -> None:
    listed = frozenset({("127.0.0.1", site.port)})
    url = site.redirect("/a.png", "http://example.invalid/b?to=1")
    with pytest.raises(ImageForbidden, match="give an `https://` URL"):
        read(WebReader(WebRules(listed=listed)), url)
    url = site.redirect("/a.png", "https://example.invalid/b?to=1")
    with pytest.raises(ImageForbidden, match=r"example\.invalid, from where this server reads no"):
        read(WebReader(WebRules(everyone=False, listed=listed)), url)


def test_a_redirect_to_nowhere_ends(site: Website) -> None:
    url = site.page("/a.png", lambda visit: visit.answer(302))
    with pytest.raises(ImageForbidden, match="more than 3 times"):
        read(reader(site), url)


def test_a_name_that_leads_to_loopback_is_refused_before_anybody_is_asked(site: Website) -> None:
    site.show("/a.png", DATA)
    with pytest.raises(ImageForbidden, match="not public"):
        read(reader(site), f"https://localhost:{site.port}/a.png")
    assert site.asked == []


def test_all_addresses_of_a_host_must_be_public(
    site: Website, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(0, 0, 0, "", (address, 443)) for address in ("8.8.8.8", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ImageForbidden, match="not public"):
        read(reader(site), "https://pictures.test/a.png")


# --- servers that fail or lie --------------------------------------------------------------------


def truncated(visit: Visit) -> None:
    visit.answer(200, DATA, Content_Length=str(len(DATA) + 1))


def truncated_chunks(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n")


def reset(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")
    visit.reset()


BROKEN: dict[str, tuple[Page, type[ImageError], str]] = {
    "500": (lambda visit: visit.answer(500), ImageFetchFailed, "HTTP status 500"),
    "429": (lambda visit: visit.answer(429), ImageFetchFailed, "HTTP status 429"),
    "418": (lambda visit: visit.answer(418), ImageFetchFailed, "HTTP status 418"),
    "206": (lambda visit: visit.answer(206, DATA), ImageFetchFailed, "HTTP status 206"),
    "404": (lambda visit: visit.answer(404), ImageNotFound, "not found"),
    "410": (lambda visit: visit.answer(410), ImageNotFound, "not found"),
    "401": (lambda visit: visit.answer(401), ImageForbidden, "refused by its server"),
    "403": (lambda visit: visit.answer(403), ImageForbidden, "refused by its server"),
    "truncated": (truncated, ImageFetchFailed, "RemoteProtocolError"),
    "truncated chunks": (truncated_chunks, ImageFetchFailed, "RemoteProtocolError"),
    "reset": (reset, ImageFetchFailed, "ReadError"),
    "garbage": (lambda visit: visit.raw(b"\0" * 99), ImageFetchFailed, "RemoteProtocolError"),
    "nothing": (lambda visit: None, ImageFetchFailed, "RemoteProtocolError"),
    "endless headers": (
        lambda visit: visit.raw(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 100_000),
        ImageFetchFailed,
        "RemoteProtocolError",
    ),
    "two lengths": (
        lambda visit: visit.raw(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"
        ),
        ImageFetchFailed,
        "RemoteProtocolError",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_of_the_server_is_told_without_the_query(site: Website, fault: str) -> None:
    page, error, says = BROKEN[fault]
    url = site.page("/a.png", page)
    with pytest.raises(error, match=says) as raised:
        read(reader(site), f"{url}?signature=secret")
    assert raised.value.message.startswith(f"image {url} ")
    assert "secret" not in f"{raised.value!r} {raised.value.__cause__!r}"


@pytest.mark.parametrize("fault", ["500", "truncated", "reset", "nothing"])
def test_what_may_pass_is_tried_again_and_what_was_read_before_is_no_part_of_it(
    site: Website, fault: str
) -> None:
    def page(visit: Visit) -> None:
        if len(site.asked) == 1:
            BROKEN[fault][0](visit)
        else:
            visit.answer(200, DATA)

    assert read(reader(site), site.page("/a.png", page)) == FetchedObject(DATA, None)


@pytest.mark.parametrize("fault", ["404", "403", "418"])
def test_what_stays_as_it_is_is_asked_once(site: Website, fault: str) -> None:
    url = site.page("/a.png", BROKEN[fault][0])
    with pytest.raises(ImageError):
        read(reader(site), url)
    assert len(site.asked) == 1


def test_a_body_that_announces_too_much_is_not_read(site: Website) -> None:
    url = site.page("/a.png", lambda visit: visit.answer(200, b"a", Content_Length=str(MAX + 1)))
    with pytest.raises(ImageTooLarge, match=f"more than {MAX} bytes"):
        read(reader(site), url)


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_body_without_end_is_left(site: Website, head: bytes) -> None:
    def page(visit: Visit) -> None:
        visit.raw(head)
        while not site.closing.is_set():
            visit.raw(bytes(4096))

    with pytest.raises(ImageTooLarge):
        read(reader(site), site.page("/a.png", page))


SLOW: dict[str, Page] = {
    "headers": lambda visit: visit.drip(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000),
    "informational": lambda visit: visit.drip(b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "body": lambda visit: (
        visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n"),
        visit.drip(b"a"),
    )[1],
    "silent": lambda visit: visit.silence(),
}


@pytest.mark.parametrize("part", SLOW)
def test_one_limit_of_time_holds_over_a_server_that_answers_slowly(
    site: Website, part: str
) -> None:
    url = site.page("/a.png", SLOW[part])
    with pytest.raises(ImageFetchFailed, match=r"could not be fetched in 0\.5 s"):
        read(reader(site, seconds=0.5, silence=100), url)


def test_a_server_that_falls_silent_is_left_before_that(site: Website) -> None:
    url = site.page("/a.png", SLOW["silent"])
    with pytest.raises(ImageFetchFailed, match="ReadTimeout") as raised:
        read(reader(site, silence=0.2), url)
    assert " in " not in raised.value.message
    assert len(site.asked) == 2


def test_a_server_that_is_not_there_is_a_failed_fetch(site: Website) -> None:
    with Website() as gone:
        other = reader(site, gone)
    with pytest.raises(ImageFetchFailed, match="ConnectError"):
        read(other, gone.url("/a.png"))
    with pytest.raises(ImageFetchFailed, match="host is not found"):
        read(other, "https://nobody.invalid/a.png")


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Website]:
    """A server with a certificate for pictures.test, which this process trusts; that name, and
    others.test, lead to it."""
    tls = certificate(tmp_path, "pictures.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    real = socket.getaddrinfo

    def lookup(host: Any, *rest: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return real("127.0.0.1" if name.endswith(".test") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with Website(tls) as site:
        yield site


def certificate(folder: Path, name: str) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    return tls


def test_the_certificate_must_be_that_of_the_name_whatever_the_address(secure: Website) -> None:
    secure.show("/a.png", DATA)
    names = frozenset({("pictures.test", secure.port), ("others.test", secure.port)})
    web = WebReader(WebRules(listed=names), total_seconds=20)
    url = f"https://pictures.test:{secure.port}/a.png"
    assert read(web, url) == FetchedObject(DATA, None)
    assert secure.asked[0].headers["host"] == f"pictures.test:{secure.port}"
    with pytest.raises(ImageFetchFailed, match="ConnectError"):
        read(web, f"https://others.test:{secure.port}/a.png")
    assert len(secure.asked) == 1
