"""Questions about what is not of the small model's world; the honest answer is "I don't know."

Most are made from templates and lists of words, so that there are thousands; some templates and
some words are held out for ``evaluate.py``.
"""

import random
import string
from typing import Final

_FILLERS: Final[dict[str, str]] = {
    "person": "man|woman|boy|girl|child|person|baby|lady|president|king|teacher|singer|actor",
    "animal": "dog|horse|elephant|bird|cow|lion|bear|rabbit|monkey|snake|tiger|puppy",
    "object": "table|chair|phone|computer|bottle|shirt|bike|train|hat|watch|bag|cup|jacket|boat",
    "country": "France|Spain|Italy|Japan|Brazil|India|Canada|Egypt|Peru|Norway|Kenya|Chile|Poland",
    "city": "Paris|London|Rome|Tokyo|Berlin|Madrid|Vienna|New York|Chicago|Moscow|Sydney",
    "language": "German|French|Spanish|Italian|Japanese|Chinese|Russian|Latin|Greek",
    "mood": "happy|sad|angry|tired|young|famous|married|rich|friendly|sick",
    "text": "poem|story|song|letter|program|book|speech|recipe|novel|report|list",
    "topic": "love|war|music|science|history|football|money|the sea|space|food|physics|cats",
    "food": "rice|pasta|soup|bread|pizza|coffee|tea|cake|eggs|fish",
    "famous": "Einstein|Mozart|Shakespeare|Napoleon|Picasso|Newton|Beethoven|Plato",
    "verb": "painted|took|made|drew|sold|owns|designed|sent",
    "place": "street|beach|park|office|kitchen|school|church|restaurant|hotel|airport",
}

_HELD_OUT_FILLERS: Final[dict[str, str]] = {
    "person": "doctor|farmer|grandmother",
    "animal": "sheep|wolf",
    "object": "laptop|sofa",
    "country": "Germany|Mexico",
    "city": "Lisbon|Boston",
    "language": "Dutch|Arabic",
    "mood": "bored|nervous",
    "text": "joke|essay",
    "topic": "the weather|art",
    "food": "potatoes|noodles",
    "famous": "Darwin|Bach",
    "verb": "built|bought",
    "place": "library|museum",
}

_TEMPLATES: Final = tuple(
    line.strip()
    for line in """
    Who {verb} this?
    Who {verb} this picture?
    When was this picture taken?
    What year was this {verb}?
    Where was this photo taken?
    Why was this picture made?
    What is the capital of {country}?
    How many people live in {country}?
    What language is spoken in {country}?
    What is the largest city of {country}?
    Who is the president of {country}?
    Is this a photo of {city}?
    How far is it from {city} to {city}?
    What is the weather like in {city}?
    What time is it in {city}?
    What is the name of the {person}?
    How old is the {person}?
    Is the {person} {mood}?
    What is the {person} doing?
    What is the {person} wearing?
    Who is the {person}?
    Why is the {person} {mood}?
    Where does the {person} live?
    What color is the {animal}?
    What colour is the {object}?
    What colour are the eyes of the {person}?
    What is the {animal} doing?
    What breed is the {animal}?
    How old is the {animal}?
    Is the {animal} {mood}?
    Where is the {person}?
    Where is the {animal}?
    Where is the {object}?
    How much does the {object} cost?
    Which brand is the {object}?
    How heavy is the {object}?
    What is the {object} made of?
    Who {verb} the {object}?
    Is the {object} new?
    Write a {text}.
    Write a {text} about {topic}.
    Tell me a {text} about {topic}.
    Tell me about {topic}.
    What do you think about {topic}?
    What is {topic}?
    Explain {topic} to me.
    Translate this into {language}.
    Say it in {language}.
    What does this mean in {language}?
    Do you speak {language}?
    Who was {famous}?
    When did {famous} live?
    Where was {famous} born?
    What did {famous} do?
    How do I cook {food}?
    Is there {food} on the plate?
    How many calories has {food}?
    Do you like {food}?
    Is this a {place}?
    Which {place} is this?
    How many people are in the {place}?
    Is it day or night?
    What is the weather like?
    Is it raining?
    Why is the sky blue?
    What is the meaning of life?
    What will happen next?
    Who won the game?
    What happened before?
    What is the square root of {number}?
    What is {number} plus {number}?
    What is {number} times {number}?
    What day is it?
    Who are you?
    What is your name?
    How are you?
    Are you human?
    What can you do?
    Hello!
    Hi.
    Hello, how are you?
    Good morning.
    Thank you!
    Bye.
    Help me.
    Can you help me?
    Tell me something.
    How tall is the building?
    What is the price of gold?
    What brand is the car in front?
    Is this picture art?
    Who is the artist?
    What style is this picture?
    Which film is this from?
    Is that safe to eat?
    What is the phone number?
    Which disease is this?
    What is the score of the game?
    """.strip().splitlines()
)

_HELD_OUT_TEMPLATES: Final = tuple(
    line.strip()
    for line in """
    What is the currency of {country}?
    What is the {person} holding?
    Did {famous} like {topic}?
    How fast is the {animal}?
    When was the {object} {verb}?
    Give me a {text} in {language}.
    How big is {city}?
    Should I eat {food}?
    Which way is the {place}?
    Why did the {person} buy the {object}?
    Good evening!
    Nice to meet you.
    What is your favourite song?
    Are we alone in the universe?
    """.strip().splitlines()
)


_WITH_FILLERS: Final = tuple(t for t in _TEMPLATES if "{" in t and "{number}" not in t)


def _fill(rng: random.Random, template: str, fillers: dict[str, str]) -> str:
    wanted = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    if not wanted:
        return template
    words = {
        field: str(rng.randint(2, 99))
        if field == "number"
        else rng.choice(fillers[field].split("|"))
        for field in wanted
    }
    return template.format(**words)


def off_world(rng: random.Random, held_out: bool) -> str:
    """A question that nothing drawn here can answer."""
    if not held_out:
        return _fill(rng, rng.choice(_TEMPLATES), _FILLERS)
    if rng.random() < 0.6:
        return _fill(rng, rng.choice(_HELD_OUT_TEMPLATES), _FILLERS)
    return _fill(rng, rng.choice(_WITH_FILLERS), _HELD_OUT_FILLERS)


def frame_words() -> list[str]:
    """The templates without what is filled in; their words are tokens, all others are spelled."""
    return [
        "".join(text for text, _, _, _ in string.Formatter().parse(template))
        for template in _TEMPLATES
    ]
