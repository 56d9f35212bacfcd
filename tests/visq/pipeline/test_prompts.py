"""The forms of a prompt, and the messages that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visq.errors import InvalidRequest, UnsupportedParameter, VisqError
from visq.pipeline.prompts import Conversation, as_list, conversation, with_system, with_urls
from visq.types import ImagePart
from visq.vl import IMAGE_TOKEN

RED, BLUE = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")


def shown(said: Conversation) -> list[Any]:
    """Each message as its role and its parts: texts, and `...` for an image."""
    return [
        (m.role, [... if isinstance(p, ImagePart) else p.text for p in m.parts()])
        for m in said.messages
    ]


@pytest.mark.parametrize(
    ("prompt", "parts", "images"),
    [
        ("hello", ["hello"], []),
        (("what?", RED), ["what?", ...], [RED]),
        ((RED, "what?"), [..., "what?"], [RED]),
        (("what?", [RED, BLUE]), ["what?", ..., ...], [RED, BLUE]),
        (([RED, BLUE], "what?"), [..., ..., "what?"], [RED, BLUE]),
        (("what?", []), ["what?"], []),
        (("what?", Path("a.png")), ["what?", ...], [Path("a.png")]),
        (("what?", "https://a.test/b.png"), ["what?", ...], ["https://a.test/b.png"]),
        (("what?", "s3://bucket/key"), ["what?", ...], ["s3://bucket/key"]),
        (("https://a.test/b.png", "what?"), [..., "what?"], ["https://a.test/b.png"]),
        (("https://a.test is what?", RED), ["https://a.test is what?", ...], [RED]),
        ((f"a {IMAGE_TOKEN} b", RED), ["a ", ..., " b"], [RED]),
        ((f"{IMAGE_TOKEN}{IMAGE_TOKEN}\nwhat?", [RED, BLUE]), [..., ..., "\nwhat?"], [RED, BLUE]),
        (f"the text {IMAGE_TOKEN}", [f"the text {IMAGE_TOKEN}"], []),
    ],
)
def test_a_prompt_of_any_form_is_a_message(
    prompt: Any, parts: list[Any], images: list[Any]
) -> None:
    said = conversation(prompt)
    assert shown(said) == [("user", parts)]
    assert said.images == images


@pytest.mark.parametrize(
    ("item", "image"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "a.png"),
        ({"type": "image", "image": RED}, RED),
        ({"type": "image_data", "image_data": {"data": RED}}, RED),
    ],
)
def test_an_image_in_openai_messages_may_have_any_of_these_forms(item: Any, image: object) -> None:
    said = conversation(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "what?"}, item]},
            {"role": "assistant", "content": None},
        ]
    )
    assert shown(said) == [
        ("system", ["Be brief."]),
        ("user", ["what?", ...]),
        ("assistant", [""]),
    ]
    assert said.images == [image]


@pytest.mark.parametrize(
    ("prompts", "number", "single"),
    [
        ("one", 1, True),
        (("one", RED), 1, True),
        ([{"role": "user", "content": "one"}], 1, True),
        (["one"], 1, False),
        ([("one", RED), "two", [{"role": "user", "content": "three"}]], 3, False),
        ([], 0, False),
    ],
)
def test_one_prompt_and_a_list_of_one_are_told_apart(
    prompts: Any, number: int, single: bool
) -> None:
    listed, was_single = as_list(prompts)
    assert (len(listed), was_single) == (number, single)


@pytest.mark.parametrize(
    "prompts", [7, None, ("a", "b"), ("a", RED, BLUE), ["a", 7], ["a", {"role": "user"}], [[]]]
)
def test_what_is_no_prompt_is_a_value_error_before_anything_is_sent(prompts: Any) -> None:
    with pytest.raises(ValueError, match="unsupported prompt") as caught:
        as_list(prompts)
    assert isinstance(caught.value, VisqError)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ([{"type": "video_url", "video_url": "a.mp4"}], UnsupportedParameter, "video_url"),
        ([{"type": "poem", "poem": "a"}], InvalidRequest, "'poem'"),
        ([{"type": "image_url"}], InvalidRequest, "no image"),
        ([{"type": "text", "text": 7}], InvalidRequest, "int"),
        (["text"], InvalidRequest, "None"),
        (
            [{"type": "image_url", "image_url": {"url": "a", "max_dynamic_patch": 1}}],
            UnsupportedParameter,
            "max_dynamic_patch",
        ),
        (
            [{"type": "text", "text": IMAGE_TOKEN * 2}, {"type": "image", "image": RED}],
            InvalidRequest,
            "1 images and 2 times",
        ),
    ],
)
def test_a_part_that_nobody_knows_is_refused_by_name(
    content: list[Any], error: type[VisqError], says: str
) -> None:
    with pytest.raises(error, match=says):
        conversation([{"role": "user", "content": content}])


def test_a_role_and_a_field_that_nobody_knows_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="role"):
        conversation([{"role": "tool", "content": "a"}])
    with pytest.raises(UnsupportedParameter, match="tool_calls"):
        conversation([{"role": "user", "content": "a", "tool_calls": []}])


def test_a_system_message_comes_first_unless_there_is_one() -> None:
    assert shown(with_system(conversation("hi"), "Be brief."))[0] == ("system", ["Be brief."])
    own = conversation([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    assert with_system(own, "Be brief.") == own


def test_images_get_their_names_in_order() -> None:
    messages = with_urls(conversation(("what?", [RED, BLUE])), ["img_1", "img_2"])
    urls = [p.image_url.url for p in messages[0].parts() if isinstance(p, ImagePart)]
    assert urls == ["img_1", "img_2"]
