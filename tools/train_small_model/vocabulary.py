"""The names of the small model's world: colours, shapes, icons, printed words, places.

How they are asked about is in ``phrasings.py``, what is not of this world in ``offworld.py``.
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
    old good best gold iron wood menu soup meat egg bean corn bread water apple grape lemon melon
    onion sugar salt honey juice pizza pasta salad steak bacon cream hotel motel train truck ship
    bike metro ferry ticket travel street bridge castle church school office market garden forest
    river ocean beach island desert mount valley winter summer spring autumn monday friday sunday
    april may june july august march music radio video phone email paper pencil table chair couch
    floor window mirror carpet closet kitchn oven fridge bottle glass plate spoon knife fork towel
    soap brush comb shirt pants dress socks shoes boots glove scarf watch jewel crown queen prince
    knight dragon wizard magic ghost witch angel demon robot alien rocket planet comet orbit space
    earth storm cloudy sunny windy foggy three four five seven eight nine zero half full empty big
    small tall short wide thin thick fast slow hard soft loud quiet clean dirty rich poor happy sad
    angry calm brave kind nice mean smart lazy busy early late first last begin start finish enter
    leave arrive return send fetch carry throw catch kick jumpy run walk swim climb drive fly sing
    dance laugh cry smile sleep dream wake eat drink cook bake boil read write draw paint build
    break fix open close lock turn twist press hold drop pick choose vote count add minus equal
    news press film actor stage light sound voice story novel poem verse rhyme page cover title
    north south east west inside police doctor nurse judge pilot farmer baker tailor sailor
    mouse horse sheep goat cow pig duck goose hen eagle hawk owl crow wolf bear deer fox snake
    tiger zebra camel monkey rabbit turtle whale shark crab ant bee wasp spider worm snail
    """.split()
)
"""Printed in half of the pictures of words; the other half shows random letters."""

HELD_OUT_WORDS: Final = tuple(
    """
    frog lion nose hand drum cafe pear taxi zoo mind boat jump pepper butter silver copper bakery
    museum subway airport dinner lunch candle basket pillow blanket jacket button pocket wallet
    guitar violin piano hammer ladder engine tunnel harbor meadow flower tulip daisy panda koala
    puppy kitten beaver salmon oyster quick jolly vivid extra index query
    """.split()
)
"""Never printed in training, not even by chance; those of more than six letters are left out."""

OTHER_THINGS: Final = tuple(
    """
    dog person man woman child face horse elephant chair table bottle computer phone clock banana
    apple pizza mountain river building bridge boat train bicycle hat shoe window door street
    dragon robot hexagon pentagon arrow spiral cube
    """.split()
)
"""Things that no picture of this world holds: "Is there a dog?" is answered with no."""

PLACES: Final = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)

UNKNOWN: Final = "I don't know."
