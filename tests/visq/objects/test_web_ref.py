"""URLs of images: what is one, and what people see of it."""

from __future__ import annotations

import pytest

from visq.errors import ConfigurationError, ImageForbidden, InvalidRequest
from visq.objects import ObjectRef
from visq.objects.images import image_ref
from visq.objects.web_ref import MAX_NAME, MAX_URL, WebRef, is_web, parse_url, public_name
from visq.objects.web_rules import WebRules, is_public
from visq.settings import Settings


@pytest.mark.parametrize(
    ("url", "netloc", "port", "target"),
    [
        ("https://a.test", "a.test", 443, b"/"),
        ("HTTPS://A.Test:443/B?c=D%20#e", "a.test", 443, b"/B?c=D%20"),
        ("http://a.test/x", "a.test", 80, b"/x"),
        ("http://a.test:443/x", "a.test:443", 443, b"/x"),
        ("https://[::1]:8/x", "[::1]:8", 8, b"/x"),
        ("https://ex\xe4mple.test/\xe4", "xn--exmple-cua.test", 443, b"/%C3%A4"),
        (
            "https://a.test/a?X-Amz-Signature=1%2F2&b=",
            "a.test",
            443,
            b"/a?X-Amz-Signature=1%2F2&b=",
        ),
    ],
)
def test_a_url_is_taken_apart_once(url: str, netloc: str, port: int, target: bytes) -> None:
    ref = parse_url(url)
    assert (ref.uri, ref.netloc, ref.port, ref.target) == (url, netloc, port, target)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://" + "a" * MAX_URL, "characters"),
        ("ftp://a.test/b", "something else"),
        ("https:a.test", "something else"),
        ("https://", "host"),
        ("https:///b", "host"),
        ("https://a..b/", "host"),
        ("https://.a/", "host"),
        ("https://%31.test/", "host"),
        ("https://a.test:0/", "port"),
        ("https://a.test:65536/", "port"),
        ("https://a.test:x/", "not valid"),
        ("https://[::1/", "not valid"),
        ("https://a.test/b c", "white space"),
        ("https://a.test/b\nHost: c", "white space"),
        ("https://a.test/b\0", "not valid"),
        ("https://\ud800.test/", "not valid"),
        ("https://" + "a" * 64 + ".test/", "host"),
    ],
)
def test_what_is_no_url_is_refused_and_not_repeated(url: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as raised:
        parse_url(url)
    assert url not in raised.value.message


def test_people_see_no_secret_of_a_url() -> None:
    url = "https://me:word@a.test:8/b.png?X-Amz-Signature=1#c"
    assert public_name(url) == "https://a.test:8/b.png"
    ref = parse_url(url)
    assert str(ref) == "https://a.test:8/b.png"
    for secret in ("word", "Signature"):
        assert secret not in repr(ref)
    assert len(public_name("https://a.test/" + "b" * 1000)) == MAX_NAME
    assert public_name("s3://photos/what?.png") == "s3://photos/what?.png"


@pytest.mark.parametrize("location", ["//b.test/c", "/c?d=1", "c", "https://b.test:9/"])
def test_a_redirect_may_be_relative(location: str) -> None:
    ref = parse_url("https://a.test/x/y").redirected(location)
    assert ref.uri in (
        "https://b.test/c",
        "https://a.test/c?d=1",
        "https://a.test/x/c",
        "https://b.test:9/",
    )


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("2606:4700::1111", True),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("::127.0.0.1", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("2002:808:808::", True),
    ],
)
def test_public_addresses_are_told_from_others(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://127.0.0.1/a", "not public"),
        ("https://[::1]/a", "not public"),
        ("https://169.254.169.254/latest/meta-data", "not public"),
        ("http://example.org/a", "give an `https://` URL"),
        ("https://gateway.test:8443/a", None),
        ("http://gateway.test:8443/a", None),
        ("http://plain.test/a", None),
        ("https://plain.test/a", None),
        ("http://plain.test:81/a", "https"),
        ("https://10.0.0.5/a", None),
        ("https://10.0.0.5:444/a", "not public"),
        ("http://[fd00::1]:9000/a", None),
        ("https://example.org/a", None),
    ],
)
def test_jobs_read_from_public_https_and_listed_hosts(url: str, says: str | None) -> None:
    listed = "Gateway.test:8443, plain.test,10.0.0.5,[fd00::1]:9000"
    settings = Settings(image_url_hosts=listed)
    if says is None:
        ref = image_ref(url, "acme", settings)
        assert isinstance(ref, WebRef)
        assert ref.uri == url
    else:
        with pytest.raises(ImageForbidden, match=says):
            image_ref(url, "acme", settings)


def test_without_the_public_internet_only_listed_hosts_are_read() -> None:
    settings = Settings(image_urls="off", image_url_hosts="gateway.test")
    image_ref("http://gateway.test/a", "acme", settings)
    for url in ("https://example.org/a", "https://gateway.test:8443/a"):
        with pytest.raises(ImageForbidden, match="reads no images"):
            image_ref(url, "acme", settings)


def test_a_job_names_images_of_the_store_too_and_gives_no_password() -> None:
    assert image_ref("s3://photos/a", "acme", Settings()) == ObjectRef("photos", "a")
    with pytest.raises(InvalidRequest, match="s3://"):
        image_ref("ftp://a.test/b", "acme", Settings())
    with pytest.raises(InvalidRequest, match="password") as raised:
        image_ref("https://me:word@a.test/b", "acme", Settings())
    assert "word@" not in raised.value.message


def test_web_urls_are_told_from_other_names() -> None:
    assert is_web("HTTPS://a")
    assert is_web("http://")
    assert not is_web("s3://a/http://b")


def test_private_addresses_are_allowed_to_who_says_so() -> None:
    ref = parse_url("http://127.0.0.1/a")
    WebRules(plain_http=True, private=True).check(ref)
    with pytest.raises(ImageForbidden, match="this is how"):
        WebRules(plain_http=True, advice="this is how").check(ref)


@pytest.mark.parametrize(
    "hosts",
    ["https://a.test", "a.test/b", "a.test:", "a.test:0", "a.test:70000", "::1", "a b", "*"],
)
def test_hosts_that_are_none_are_refused_at_the_start(hosts: str) -> None:
    with pytest.raises(ConfigurationError, match="VISQ_IMAGE_URL_HOSTS"):
        Settings(image_url_hosts=hosts)
