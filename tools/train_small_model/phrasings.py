"""How each skill is asked for; every skill keeps one phrasing out of training.

``[red|green]`` stands for one of its parts, so that one line holds many phrasings.  The last line
of each skill is held out: it is never trained on, and ``evaluate.py`` asks with it.
"""

import itertools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Ways:
    """The phrasings of one skill; those of one line are about as often asked as of another."""

    train: tuple[tuple[str, ...], ...]
    held_out: str


def expand(pattern: str) -> list[str]:
    """All texts that a pattern stands for."""
    assert not re.search(r"\[[^]]*\[", pattern), pattern
    parts = [
        piece[1:-1].split("|") if piece.startswith("[") else [piece]
        for piece in re.split(r"(\[[^]]*\])", pattern)
    ]
    return ["".join(choice) for choice in itertools.product(*parts)]


THINGS = "[shapes|objects|things|figures]"
ONE = "[shape|object|thing|figure]"
IN_IT = "[in the picture|in the image|in this picture|in this image|here]"
SEE = "[do you see|can you see|do you find]"
SHOW = "[Does the picture show|Does the image show|Does this picture have|Does it show]"
COLOUR = "[colour|color]"
TRUE = "[Is it true that|Is it correct that|Would you say that|Can one say that]"
TELL = "[Tell me|Say|Can you tell me]"

_PATTERNS: dict[str, str] = {
    "count": f"""
        How many {THINGS} are [there|{IN_IT[1:-1]}|shown]?
        How many [shapes|things|figures] {SEE}?
        How many [shapes|objects|things] {SEE} {IN_IT}?
        How many {THINGS} does the [picture|image] [show|have]?
        Count [the|all|all the] {THINGS}[.| in the picture.| in the image.]
        What is the number of {THINGS}[?| in the picture?]
        {TELL} how many {THINGS} there are.
        How many objects do you see?""",
    "count shape": f"""
        How many {{shapes}} [are there|are shown|{SEE[1:-1]}]?
        How many {{shapes}} {SEE} {IN_IT}?
        How many {{shapes}} are [in the image|in this picture|in this image|here]?
        How many {{shapes}} does the [picture|image] [show|have]?
        Count [the|all|all the] {{shapes}}[.| in the picture.| in the image.]
        What is the number of {{shapes}}[?| in the picture?]
        {TELL} how many {{shapes}} there are.
        How many {{shapes}} are in the picture?""",
    "count colour": f"""
        How many {{colour}} {THINGS} are [there|{IN_IT[1:-1]}|shown]?
        How many {{colour}} [objects|things|figures] {SEE}?
        How many {THINGS} are {{colour}}?
        How many of the {THINGS} are {{colour}}?
        Count [the|all|all the] {{colour}} {THINGS}[.| in the picture.| in the image.]
        What is the number of {{colour}} {THINGS}?
        {TELL} how many {THINGS} are {{colour}}.
        How many {{colour}} shapes do you see?""",
    "colour": f"""
        [What|Which] {COLOUR} is the {{name}}?
        [What|Which] {COLOUR} is the {{name}} {IN_IT}?
        [What|Which] {COLOUR} does the {{name}} have?
        What is the colour of the {{name}}?
        The {{name}} is [what|which] {COLOUR}?
        {TELL} the {COLOUR} of the {{name}}.
        {TELL} [what|which] {COLOUR} the {{name}} is.
        In [what|which] {COLOUR} is the {{name}}?
        What is the color of the {{name}}?""",
    "shape": f"""
        [What|Which] {ONE} is {{colour}}?
        What is the {{colour}} {ONE}?
        What {{colour}} {ONE} is there?
        What {{colour}} {ONE} {SEE}?
        What is {{colour}} {IN_IT}?
        What shape [is|has] the {{colour}} [object|thing|figure|one]?
        {TELL} what the {{colour}} {ONE} is.
        {TELL} which {ONE} is {{colour}}.
        Which {{colour}} [object|thing] {SEE}?
        Which {{colour}} shape do you see?""",
    "exists": f"""
        Is there a {{colour}} {{name}}[?| in the picture?| in the image?| here?]
        [Do|Can] you [see|find] a {{colour}} {{name}}[?| in the picture?| in this image?]
        {SHOW} a {{colour}} {{name}}?
        {TRUE} there is a {{colour}} {{name}}?
        Is one of the {THINGS} a {{colour}} {{name}}?
        Is a {{colour}} {{name}} in the [picture|drawing]?
        Is a {{colour}} {{name}} in the image?""",
    "exists simple": f"""
        Is there a {{name}}[?| in the picture?| in the image?| here?]
        [Do|Can] you [see|find] a {{name}}[?| in the picture?| in this image?]
        {SHOW} a {{name}}?
        {TRUE} there is a {{name}}?
        Is one of the {THINGS} a {{name}}?
        Is a {{name}} in the [image|drawing]?
        Is a {{name}} in the picture?""",
    "is colour": f"""
        Is the {{name}} {{colour}}[?| in the picture?| in this image?]
        {TRUE} the {{name}} is {{colour}}?
        Is the {COLOUR} of the {{name}} {{colour}}?
        Does the {{name}} have the {COLOUR} {{colour}}?
        Is {{colour}} the color of the {{name}}?""",
    "where": f"""
        Where is the {{thing}}[?| in the picture?| in this image?]
        Where in the [picture|drawing] is the {{thing}}?
        Where {SEE} the {{thing}}?
        In [which|what] part of the [picture|image] is the {{thing}}?
        What is the [place|position] of the {{thing}}?
        {TELL} where the {{thing}} is.
        At [which|what] place is the {{thing}}?
        Where in the image is the {{thing}}?""",
    "at": f"""
        What is at the {{place}}[?| of the picture?| of the image?]
        What {SEE} at the {{place}}[?| of the picture?| of the image?]
        [What|Which] [shape|figure|thing] is at the {{place}}?
        What is in the {{place}} of the [picture|image]?
        [What|Which] [shape|figure|thing] {SEE} at the {{place}}?
        {TELL} what is at the {{place}}.
        What object is at the {{place}}?
        Which object is at the {{place}}?""",
    "largest": f"""
        [What|Which] {ONE} is [the largest|the biggest|largest|biggest]?
        [What|Which] is the [largest|biggest] [shape|thing|figure]?
        [What|Which] is the biggest [object|one]?
        {TELL} which {ONE} is the [largest|biggest].
        Name the [largest|biggest] {ONE}.
        Of all {THINGS}, which is the [largest|biggest]?
        Which is the largest object?""",
    "smallest": f"""
        [What|Which] {ONE} is [the smallest|the tiniest|smallest]?
        [What|Which] is the [smallest|tiniest] [shape|thing|figure]?
        [What|Which] is the [tiniest object|smallest one]?
        {TELL} which {ONE} is the [smallest|tiniest].
        Name the [smallest|tiniest] {ONE}.
        Of all {THINGS}, which is the [smallest|tiniest]?
        Which is the smallest object?""",
    "larger": f"""
        Is the {{a}} [larger|bigger] than the {{b}}?
        {TRUE} the {{a}} is larger than the {{b}}?
        [Would you say|Can one say|Is it correct that] the {{a}} is [larger|bigger] than the {{b}}?
        Is the {{a}} the [larger|bigger] one, compared with the {{b}}?
        Compared with the {{b}}, is the {{a}} [larger|bigger]?
        Is it true that the {{a}} is bigger than the {{b}}?""",
    "relation": f"""
        Is the {{a}} {{side}} the {{b}}[?| in the picture?| in this image?]
        Do you see the {{a}} {{side}} the {{b}}?
        {TRUE} the {{a}} is {{side}} the {{b}}?
        Does the {{a}} [stand|lie] {{side}} the {{b}}?
        Is the place of the {{a}} {{side}} the {{b}}?
        Would you say the {{a}} is {{side}} the {{b}}?""",
    "beside": f"""
        What is {{side}} the {{a}}[?| in the picture?| in this image?]
        [What|Which] [shape|thing|figure] is {{side}} the {{a}}?
        What {SEE} {{side}} the {{a}}?
        {TELL} what is {{side}} the {{a}}.
        What object is {{side}} the {{a}}?
        Which object is {{side}} the {{a}}?""",
    "more": f"""
        Are there more {{a}} than {{b}}[?| in the picture?| in this image?]
        [Do|Can] you see more {{a}} than {{b}}?
        Is the number of {{a}} larger than the number of {{b}}?
        {SHOW} more {{a}} than {{b}}?
        {TRUE} there are more {{a}} than {{b}}?
        Are more {{a}} than {{b}} in the picture?""",
    "describe": """
        Describe [this image|the image|this picture|the picture|it].
        [Please describe|Describe for me] [this image|the image|this picture|the picture].
        [What|Which things] [is|are] [in this picture|in the picture|in this image|in the image]?
        What do you see[?| here?| in the picture?| in this image?| in this picture?]
        What can you see[?| here?| in the picture?| in this image?]
        Tell me what you see[.| here.| in the picture.]
        What does [the image|the picture|this image|this picture] show?
        What is shown [here|in the picture|in this image]?
        Tell me what is in the [picture|image].
        Describe what is [in the picture|in the image|there|shown].
        Describe what you see.""",
    "read word": """
        What does it say?
        What does the [text|picture|image|sign|word] say?
        Read [the word|it|what is written|the writing|this][.| to me.]
        What word is [written here|written in the picture|this|it|shown|in the picture]?
        What is the word[?| in the picture?| here?]
        What is written [in the picture|here|in this image|there]?
        Which word [do you see|can you see|is it|is written here|is in the image]?
        Can you read the [word|writing][?| for me?]
        What text [is written here|is in the picture|do you see|does it show]?
        Read the text.""",
    "read number": """
        What number is [it|this|shown|in the picture|written here|in this image]?
        Read the number[.| to me.]
        Which number [do you see|can you see|is it|is written here|is in the image]?
        What is the number[?| in the picture?| here?]
        What number [do you see|can you see|does it show|does the picture show]?
        Can you read the number[?| for me?]
        Tell me the number[.| in the picture.]
        Which number is written in the picture?""",
    "text colour": f"""
        [What|Which] {COLOUR} is the [text|writing][?| in the picture?]
        [What|Which] {COLOUR} does the [text|writing] have?
        In [which|what] {COLOUR} is it written?
        What is the {COLOUR} of the text?
        {TELL} the {COLOUR} of the [text|writing].
        What is the color of the writing?
        What is the colour of the writing?""",
    "icon": """
        What is this?
        [What|Which] icon is [this|it|shown|in the picture]?
        What does the [icon|symbol] show?
        Which icon [do you see|can you see]?
        What icon [do you see|can you see]?
        What thing is this?
        What is [it|the icon|the symbol]?
        What object is this?""",
    "icon colour": f"""
        [What|Which] {COLOUR} is the {{name}}?
        [What|Which] {COLOUR} is the {{name}} {IN_IT}?
        [What|Which] {COLOUR} does the {{name}} have?
        What is the colour of the {{name}}?
        The {{name}} is [what|which] {COLOUR}?
        {TELL} the {COLOUR} of the {{name}}.
        What is the color of the {{name}}?""",
    "icon side": f"""
        What is {{side}}[?| in the picture?| in this image?]
        [What|Which] [icon|thing|symbol] is {{side}}?
        What {SEE} {{side}}?
        {TELL} what is {{side}}.
        What object is {{side}}?
        Which object is {{side}}?""",
    "icon count": f"""
        How many [icons|symbols] are [there|shown|in the image|in this picture|in this image|here]?
        How many [icons|symbols] {SEE}?
        Count [the|all|all the] [icons|symbols].
        What is the number of [icons|symbols]?
        {TELL} how many [icons|symbols] there are.
        How many icons are in the picture?""",
    "bar tallest": f"""
        Which bar is [the tallest|tallest|highest|the largest|the longest]?
        [What|Which] {COLOUR} is the tallest bar?
        What is the {COLOUR} of the [tallest|highest] bar?
        Which is the [tallest|highest] bar?
        Which {COLOUR} is the highest bar?
        {TELL} which bar is [the tallest|the highest].
        Which bar has the [highest|largest] value?
        Which bar is the highest?
        What color is the highest bar?""",
    "bar shortest": f"""
        Which bar is [the shortest|shortest|lowest|the smallest]?
        [What|Which] {COLOUR} is the shortest bar?
        What is the {COLOUR} of the [shortest|lowest] bar?
        Which is the [shortest|lowest] bar?
        Which {COLOUR} is the lowest bar?
        {TELL} which bar is [the shortest|the lowest].
        Which bar has the [lowest|smallest] value?
        Which bar is the lowest?
        What color is the lowest bar?""",
    "bar count": f"""
        How many bars are [there|shown|in the picture|in this image|here]?
        How many bars {SEE}?
        How many bars does the [chart|picture] [have|show]?
        Count [the|all|all the] bars.
        What is the number of bars[?| in the chart?]
        {TELL} how many bars there are.
        How many bars are in the chart?""",
    "bar value": f"""
        What is the [value|height] of the {{colour}} bar?
        About what value [is|has] the {{colour}} bar?
        How [high|tall|large] is the {{colour}} bar?
        What value does the {{colour}} bar [have|show]?
        Which value [has|does] the {{colour}} bar[?| have?]
        {TELL} [the value of|about how tall is] the {{colour}} bar.
        About how tall is the {{colour}} bar?
        About how high is the {{colour}} bar?""",
    "bar taller": f"""
        Is the {{a}} bar [taller|higher|larger] than the {{b}} bar?
        {TRUE} the {{a}} bar is taller than the {{b}} bar?
        [Would you say|Is it correct that] the {{a}} bar is [taller|higher] than the {{b}} bar?
        Compared with the {{b}} bar, is the {{a}} bar [taller|higher]?
        Does the {{a}} bar have a [higher|larger] value than the {{b}} bar?
        Is it true that the {{a}} bar is higher than the {{b}} bar?""",
    "pair more": """
        Which [picture|image] has more [shapes|objects|things]?
        Which image shows more [shapes|objects|things]?
        In which [picture|image] are [more|the most] [shapes|objects|things]?
        In which [picture|image] do you see more [shapes|objects|things]?
        Which of the two [pictures|images] has more [shapes|objects|things]?
        Which [picture|image] has the larger number of [shapes|objects]?
        Which picture shows more shapes?""",
    "pair count": f"""
        How many [shapes|objects|things] are in the {{nth}} picture?
        How many [objects|things] are in the {{nth}} image?
        How many [shapes|objects|things] {SEE} in the {{nth}} [picture|image]?
        How many [shapes|objects|things] does the {{nth}} [picture|image] [have|show]?
        Count the [shapes|objects|things] in the {{nth}} [picture|image].
        {TELL} how many shapes are in the {{nth}} [picture|image].
        How many shapes are in the {{nth}} image?""",
    "pair same": f"""
        [Do|Can] both [pictures|images] [show|have] the same number of [shapes|objects|things]?
        Are there as many [shapes|objects|things] in the first [picture|image] as in the second?
        Is the number of [shapes|objects|things] [the same in both|equal in the two] pictures?
        {TRUE} both pictures have the same number of [shapes|objects|things]?
        Is the number of shapes the same in both images?""",
    "pair colour": f"""
        [What|Which] {COLOUR} is the {{name}} in the {{nth}} [picture|image]?
        [What|Which] {COLOUR} does the {{name}} in the {{nth}} [picture|image] have?
        What is the {COLOUR} of the {{name}} in the {{nth}} image?
        {TELL} the {COLOUR} of the {{name}} in the {{nth}} [picture|image].
        In the {{nth}} [picture|image], [what|which] {COLOUR} is the {{name}}?
        What is the color of the {{name}} in the {{nth}} picture?""",
    "pair which": """
        Which [picture|image] [shows|has] a {thing}?
        In which [picture|image] is [a|the] {thing}?
        In which picture do you see a {thing}?
        Where do you see a {thing}, in the first or the second [picture|image]?
        Which of the two [pictures|images] [shows|has] a {thing}?
        In which image do you see a {thing}?""",
    "follow count": """
        Is that more than {n}?
        Are [these|those|they|there] more than {n}?
        [Is|Was] [this|that] [number larger than|over|more than] {n}?
        And is that more than {n}?
        Is it more than {n}?""",
    "follow where": """
        And where is it?
        Where is it[?| in the picture?| in the image?]
        Where [do|can] you see [it|that]?
        [And where|Where] is that one?
        In which part of the picture is it?
        Where is that?""",
    "follow colour": f"""
        And [what|which] {COLOUR} is it?
        [What|Which] {COLOUR} [is it|does it have]?
        What {COLOUR} is that?
        And its {COLOUR}?
        What is its {COLOUR}?
        Which colour is that?""",
    "follow again": """
        And the {b}?
        What about the {b}?
        And where is the {b}?
        How about the {b}?
        And what about the {b}?""",
}


def _ways(lines: str) -> Ways:
    *train, held_out = [line.strip() for line in lines.strip().splitlines()]
    assert "[" not in held_out, held_out
    found = (tuple(text for text in expand(line) if text != held_out) for line in train)
    return Ways(tuple(line for line in found if line), held_out)


ASK: dict[str, Ways] = {skill: _ways(lines) for skill, lines in _PATTERNS.items()}
