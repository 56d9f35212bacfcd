"""The name of an image, wherever it lies: in the object store or on the web."""

from __future__ import annotations

from visq.errors import InvalidRequest
from visq.objects.ref import ObjectRef, check_access, parse_uri
from visq.objects.web_ref import WebRef, is_web, parse_url
from visq.objects.web_rules import WebRules
from visq.settings import Settings

ImageRef = ObjectRef | WebRef
"""``str(ref)`` is what messages call it; ``ref.uri`` is all of it, and a secret if it is a URL."""


def image_ref(uri: str, tenant: str, settings: Settings) -> ImageRef:
    """The image that a job of `tenant` names, if it may be read as far as the name tells.

    :raises InvalidRequest: it is neither an ``s3://`` name nor a URL of the web without password.
    :raises ImageForbidden: jobs of `tenant` may not read it.
    """
    if not is_web(uri):
        ref = parse_uri(uri)
        check_access(ref, tenant, settings)
        return ref
    web = parse_url(uri)
    if web.userinfo:
        raise InvalidRequest("the URL of an image has a user or a password; leave them out")
    WebRules.from_settings(settings).check(web)
    return web
