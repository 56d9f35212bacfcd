"""Object names, and who may read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visq.errors import ImageForbidden, InvalidRequest
from visq.objects import ObjectRef, check_access, parse_uri
from visq.settings import Settings

SECRET = "a-secret-that-no-message-may-hold"


@pytest.mark.parametrize(
    ("uri", "bucket", "key", "version"),
    [
        ("s3://pictures/cat.jpg", "pictures", "cat.jpg", None),
        ("s3://pictures/cat.jpg?versionId=a.B_c-1", "pictures", "cat.jpg", "a.B_c-1"),
        ("s3://pictures/a?b=c", "pictures", "a?b=c", None),
        ("s3://pictures/a%20b c#d", "pictures", "a%20b c#d", None),
        ("s3://a.b-c/x/y/", "a.b-c", "x/y/", None),
    ],
)
def test_a_uri_is_bucket_key_and_version(
    uri: str, bucket: str, key: str, version: str | None
) -> None:
    ref = parse_uri(uri)
    assert (ref.bucket, ref.key, ref.version_id) == (bucket, key, version)
    assert ref.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "cat.jpg",
        "S3://pictures/cat.jpg",
        "file:///etc/passwd",
        "http://pictures/cat.jpg",
        "data:image/png;base64,AAAA",
        "s3://pictures",
        "s3://pictures/",
        "s3:///cat.jpg",
        "s3://ab/cat.jpg",
        "s3://Pictures/cat.jpg",
        "s3://user:pass@pictures/cat.jpg",
        "s3://-pictures/cat.jpg",
        "s3://pic..tures/cat.jpg",
        "s3://.incoming/cat.jpg",
        "s3://pictures/../secret",
        "s3://pictures/a/./b",
        "s3://pictures/a/..",
        "s3://pictures/a\0b",
        "s3://pictures/a\nb",
        "s3://pictures/\ud800",
        "s3://pictures/" + "ä" * 513,
        "s3://pictures/a?versionId=",
        "s3://pictures/a?versionId=b c",
        "s3://pictures/a?versionId=b?versionId=c",
    ],
)
def test_what_is_not_an_object_name_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_uri(uri)


def test_a_refused_signed_url_is_not_repeated_in_the_message() -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_uri(f"https://pictures.example.com/cat.jpg?X-Amz-Signature={SECRET}")
    assert SECRET not in str(raised.value)


@given(st.text(min_size=1, max_size=80), st.none() | st.from_regex(r"\A[A-Za-z0-9._-]{1,40}\Z"))
def test_every_reference_that_exists_survives_its_uri(key: str, version: str | None) -> None:
    try:
        ref = ObjectRef("pictures", key, version)
    except InvalidRequest:
        return
    assert parse_uri(ref.uri) == ref


def test_a_tenant_reads_only_its_own_uploads() -> None:
    settings = Settings(upload_bucket="uploads", s3_buckets="uploads,pictures")
    check_access(parse_uri("s3://uploads/ann/1"), "ann", settings)
    for uri in ("s3://uploads/bob/1", "s3://uploads/annabel/1", "s3://uploads/ann"):
        with pytest.raises(ImageForbidden, match=uri):
            check_access(parse_uri(uri), "ann", settings)


@pytest.mark.parametrize(
    ("listed", "uri", "allowed"),
    [
        ("", "s3://anything/x", True),
        ("pictures", "s3://pictures/x", True),
        ("pictures", "s3://pictures2/x", False),
        (" other , pictures/team-a/ ", "s3://pictures/team-a/x", True),
        ("pictures/team-a", "s3://pictures/team-ab/x", False),
        ("pictures/team-a", "s3://pictures/x", False),
        ("pictures", "s3://visq-uploads/ann/x", True),
    ],
)
def test_jobs_read_only_the_listed_buckets(listed: str, uri: str, allowed: bool) -> None:
    settings = Settings(s3_buckets=listed)
    if allowed:
        check_access(parse_uri(uri), "ann", settings)
    else:
        with pytest.raises(ImageForbidden):
            check_access(parse_uri(uri), "ann", settings)
