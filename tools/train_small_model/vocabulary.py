"""The names and phrasings of the small model's world.

Plain data: colours, shapes, icons, printed words and, for each skill, the ways to ask for it.  The
last phrasing of every list in ``ASK`` is held out: it is never trained on and is what
``evaluate.py`` asks with.
"""

from typing import Final

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (35, 70, 220),
    "yellow": (245, 215, 30),
    "orange": (250, 135, 20),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
    "brown": (120, 70, 30),
    "gray": (130, 130, 130),
    "black": (20, 20, 20),
}
"""Names and the middle of each colour; drawing jitters around it."""

BACKGROUNDS: Final[tuple[tuple[int, int, int], ...]] = (
    (255, 255, 255),
    (255, 255, 255),
    (250, 248, 240),
    (235, 240, 250),
    (235, 250, 235),
    (225, 225, 225),
)

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
PLURAL: Final = {name: name + "s" for name in SHAPES} | {"cross": "crosses"}

ICONS: Final[dict[str, int]] = {
    "house": 0xF015,
    "car": 0xF1B9,
    "tree": 0xF1BB,
    "bell": 0xF0F3,
    "book": 0xF02D,
    "camera": 0xF030,
    "fish": 0xF578,
    "key": 0xF084,
    "lock": 0xF023,
    "plane": 0xF072,
    "sun": 0xF185,
    "moon": 0xF186,
    "cloud": 0xF0C2,
    "umbrella": 0xF0E9,
    "cat": 0xF6BE,
    "flag": 0xF024,
}
"""Icon names and their code points in Font Awesome 6 Free Solid (font licence: SIL OFL 1.1)."""

LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
DIGITS: Final = "0123456789"

WORDS: Final = tuple(
    """
    stop go open exit sale free dog bird bus one two six ten sky rain snow fire milk tea cake hot
    cold up down out off push pull play end next work home help shop bank park road city town king
    love game ball team win lost keep wait call mail door wall room bed lamp time day week year new
    old good best gold iron wood menu soup meat egg bean corn
    """.split()
)
"""Printed in half of the pictures of words; the other half shows random letters."""

HELD_OUT_WORDS: Final = tuple("frog lion nose hand drum cafe pear taxi zoo mind boat jump".split())

PLACES: Final = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)

UNKNOWN: Final = "I don't know."

OFF_WORLD: Final = (
    "Who painted this?",
    "What is the capital of France?",
    "Who is the president?",
    "What year was this picture taken?",
    "What is the name of the person?",
    "How much does it cost?",
    "What is the weather like?",
    "Why is the sky blue?",
    "What is the meaning of life?",
    "Write a poem.",
    "Tell me a joke.",
    "Where was this photo taken?",
    "Who are you?",
    "What is the square root of two?",
    "How old is the man?",
    "Which brand is this?",
    "Translate this into German.",
    "Is the woman happy?",
    "What will happen next?",
    "Who won the game?",
    "What breed is the dog?",
    "How tall is the building?",
    "What language is spoken in Brazil?",
    "What is the price of gold?",
    "Write a program.",
    "How do I cook rice?",
)
HELD_OUT_OFF_WORLD: Final = (
    "Who took this picture?",
    "What is the capital of Germany?",
    "How old is the woman?",
    "Where was this painted?",
    "Write a joke.",
    "What is the name of the dog?",
)

ASK: Final[dict[str, tuple[str, ...]]] = {
    "count": (
        "How many shapes are there?",
        "How many shapes do you see?",
        "Count the shapes.",
        "How many objects are in the picture?",
        "How many things are there?",
        "What is the number of shapes?",
        "How many shapes are in the image?",
        "How many objects do you see?",
    ),
    "count shape": (
        "How many {shapes} are there?",
        "How many {shapes} do you see?",
        "Count the {shapes}.",
        "What is the number of {shapes}?",
        "How many {shapes} are in the picture?",
    ),
    "count colour": (
        "How many {colour} shapes are there?",
        "How many {colour} objects do you see?",
        "Count the {colour} shapes.",
        "How many shapes are {colour}?",
        "How many {colour} things are in the picture?",
        "How many {colour} shapes do you see?",
    ),
    "colour": (
        "What colour is the {name}?",
        "What color is the {name}?",
        "Which colour is the {name}?",
        "What is the colour of the {name}?",
        "The {name} is which color?",
        "What is the color of the {name}?",
    ),
    "shape": (
        "What shape is {colour}?",
        "Which shape is {colour}?",
        "What is the {colour} shape?",
        "What is the {colour} object?",
        "What {colour} shape is there?",
        "Which {colour} shape do you see?",
    ),
    "exists": (
        "Is there a {colour} {name}?",
        "Do you see a {colour} {name}?",
        "Is there a {colour} {name} in the picture?",
        "Can you see a {colour} {name}?",
        "Does the picture show a {colour} {name}?",
        "Is a {colour} {name} in the image?",
    ),
    "exists simple": (
        "Is there a {name}?",
        "Do you see a {name}?",
        "Is there a {name} in the image?",
        "Can you see a {name}?",
        "Does the picture show a {name}?",
        "Is a {name} in the picture?",
    ),
    "where": (
        "Where is the {thing}?",
        "Where in the picture is the {thing}?",
        "Where do you see the {thing}?",
        "In which part of the picture is the {thing}?",
        "What is the place of the {thing}?",
        "Where in the image is the {thing}?",
    ),
    "at": (
        "What is at the {place}?",
        "What do you see at the {place}?",
        "Which shape is at the {place}?",
        "What is in the {place} of the picture?",
        "Which object is at the {place}?",
    ),
    "largest": (
        "Which shape is the largest?",
        "What is the largest shape?",
        "Which object is the biggest?",
        "What is the biggest shape?",
        "Which is the largest object?",
    ),
    "smallest": (
        "Which shape is the smallest?",
        "What is the smallest shape?",
        "Which object is the smallest?",
        "Which is the smallest object?",
    ),
    "larger": (
        "Is the {a} larger than the {b}?",
        "Is the {a} bigger than the {b}?",
        "Would you say the {a} is larger than the {b}?",
        "Is the {a} the larger one, compared with the {b}?",
        "Is it true that the {a} is bigger than the {b}?",
    ),
    "relation": (
        "Is the {a} {side} the {b}?",
        "Do you see the {a} {side} the {b}?",
        "Is it true that the {a} is {side} the {b}?",
        "Would you say the {a} is {side} the {b}?",
    ),
    "beside": (
        "What is {side} the {a}?",
        "Which shape is {side} the {a}?",
        "What do you see {side} the {a}?",
        "Which object is {side} the {a}?",
    ),
    "more": (
        "Are there more {a} than {b}?",
        "Do you see more {a} than {b}?",
        "Is the number of {a} larger than the number of {b}?",
        "Are more {a} than {b} in the picture?",
    ),
    "describe": (
        "Describe this image.",
        "Describe the picture.",
        "What is in this picture?",
        "What do you see?",
        "Tell me what you see.",
        "What does the image show?",
        "Describe what you see.",
    ),
    "read word": (
        "What does it say?",
        "Read the word.",
        "What word is written here?",
        "What is the word?",
        "What is written in the picture?",
        "Which word do you see?",
        "Read the text.",
    ),
    "read number": (
        "What number is it?",
        "Read the number.",
        "Which number do you see?",
        "What is the number?",
        "What number is written here?",
        "Which number is written in the picture?",
    ),
    "text colour": (
        "What colour is the text?",
        "What color is the text?",
        "Which colour is the writing?",
        "In which color is it written?",
        "What is the colour of the writing?",
    ),
    "icon": (
        "What is this?",
        "What icon is this?",
        "What does the icon show?",
        "Which icon do you see?",
        "What object is this?",
    ),
    "icon colour": (
        "What colour is the {name}?",
        "What color is the {name}?",
        "Which colour is the {name}?",
        "What is the color of the {name}?",
    ),
    "icon side": (
        "What is {side}?",
        "Which icon is {side}?",
        "What do you see {side}?",
        "Which object is {side}?",
    ),
    "icon count": (
        "How many icons are there?",
        "How many icons do you see?",
        "Count the icons.",
        "How many icons are in the picture?",
    ),
    "bar tallest": (
        "Which bar is the tallest?",
        "Which bar is tallest?",
        "What colour is the tallest bar?",
        "Which bar is the highest?",
        "What color is the highest bar?",
    ),
    "bar shortest": (
        "Which bar is the shortest?",
        "Which bar is shortest?",
        "What colour is the shortest bar?",
        "Which bar is the lowest?",
        "What color is the lowest bar?",
    ),
    "bar count": (
        "How many bars are there?",
        "How many bars do you see?",
        "Count the bars.",
        "How many bars are in the chart?",
    ),
    "bar value": (
        "What is the value of the {colour} bar?",
        "About what value is the {colour} bar?",
        "How high is the {colour} bar?",
        "How tall is the {colour} bar?",
        "About how high is the {colour} bar?",
    ),
    "bar taller": (
        "Is the {a} bar taller than the {b} bar?",
        "Is the {a} bar higher than the {b} bar?",
        "Would you say the {a} bar is taller than the {b} bar?",
        "Is it true that the {a} bar is higher than the {b} bar?",
    ),
    "pair more": (
        "Which picture has more shapes?",
        "Which image has more shapes?",
        "In which picture are more shapes?",
        "Which picture shows more shapes?",
    ),
    "pair count": (
        "How many shapes are in the {nth} picture?",
        "How many shapes do you see in the {nth} image?",
        "Count the shapes in the {nth} picture.",
        "How many shapes are in the {nth} image?",
    ),
    "pair colour": (
        "What colour is the {name} in the {nth} picture?",
        "What color is the {name} in the {nth} image?",
        "Which colour is the {name} in the {nth} picture?",
        "What is the color of the {name} in the {nth} picture?",
    ),
    "pair which": (
        "Which picture shows a {thing}?",
        "In which picture is a {thing}?",
        "Which image has a {thing}?",
        "In which image do you see a {thing}?",
    ),
}
"""How to ask for each skill; the last phrasing of each list is held out."""
