"""Every word the generated tasks use; the vocabulary is made from these lists."""

DIGITS = "0123456789"
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 245),
    "yellow": (240, 225, 50),
    "cyan": (40, 215, 225),
    "pink": (245, 90, 200),
    "orange": (245, 140, 25),
    "white": (245, 245, 245),
}
SHAPES = ("square", "circle", "triangle", "cross", "diamond")
LETTERS = "ACEFHKLNPTUX"
# the nine cells of a picture, row by row; one word each, so that naming one takes one look
PLACES = (
    *("top-left", "top", "top-right"),
    *("left", "centre", "right"),
    *("bottom-left", "bottom", "bottom-right"),
)

NAMES = (
    *("anna", "bruno", "clara", "david", "elena", "felix", "grace", "henry"),
    *("irene", "jonas", "karin", "louis", "maria", "nadia", "oscar", "paula"),
)
ITEMS = (
    *("apple", "bread", "candle", "drum", "engine", "feather", "garden", "hammer"),
    *("island", "jacket", "kettle", "lemon", "mirror", "needle", "onion", "pencil"),
)
ADJECTIVES = ("old", "small", "quiet", "bright", "cold", "heavy", "long", "soft")
NOUNS = (
    *("river", "hill", "road", "house", "bird", "cloud", "tree", "boat"),
    *("farmer", "horse", "wind", "bridge", "forest", "stone", "lamp", "door"),
)
VERBS = ("follows", "watches", "passes", "finds", "leaves", "meets", "hides", "shows")

# what the question and fact templates of `questions.py` and `documents.py` say besides the lists
GLUE = (
    *("which", "digit", "digits", "shape", "shapes", "objects", "what", "colour", "where", "how"),
    *("many", "are", "is", "there", "at", "the", "read", "box", "nothing", "in", "picture"),
    *("passkey", "key", "of", "list", "item", "item", "comes", "after", "number", "repeat"),
    *("a", "and", "image", "answer", "question", "first", "last", "text", "remember"),
)

WORDS = tuple(
    dict.fromkeys((*GLUE, *COLOURS, *SHAPES, *PLACES, *NAMES, *ITEMS, *ADJECTIVES, *NOUNS, *VERBS))
)
