"""The word tables of the demo's language: what can be said, and the words that say it.

The tables stand beside the prompt's way, not on it: composing, parsing and drawing all read them, so that
a word is known everywhere or nowhere.
"""

KINDS = (
    "circle", "square", "triangle", "star", "heart", "moon",
    "tree", "flower", "house", "boat", "fish", "cat",
)  # fmt: skip

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")

# The empty word is a choice too: an unspoken size is medium, an unspoken position is the middle,
# an unspoken style is a flat drawing.
SIZES = ("", "tiny", "huge")

POSITIONS = {
    "": "",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}

RELATIONS = {
    "": "and",
    "above": "above",
    "left": "to the left of",
    "front": "in front of",
}

GRADIENT = "gradient"

PLACES = {
    "night": "against a starry night sky",
    "sunset": "against a sunset sky",
    "sea": "on the sea",
    "meadow": "in a grassy meadow",
    "snow": "in falling snow",
    "desert": "in a sandy desert",
    "brick": "on a brick wall",
    "checkered": "on a checkered board",
    "lined": "on lined paper",
}

BACKGROUNDS = {
    "": "",
    **PLACES,
    **{
        f"{colour} {GRADIENT}": f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} gradient background"
        for colour in COLOURS
    },
}

# Each style has its own turn of phrase, in front of the scene or behind it: the wording varies, and the
# drawing still carries everything that the text says.
STYLES = {
    "": "{scene}",
    "pencil": "a pencil sketch of {scene}",
    "watercolour": "a watercolour painting of {scene}",
    "pixel": "{scene}, pixel art",
    "neon": "a glowing neon sign of {scene}",
    "ink": "{scene}, black ink outline",
}

# A few other ways to say the same, for prompts that people type.
SYNONYMS = {
    "ball": "circle", "disc": "circle", "disk": "circle", "box": "square", "crescent": "moon",
    "fishes": "fish", "home": "house", "ship": "boat", "sailboat": "boat", "kitten": "cat",
    "violet": "purple", "small": "tiny", "little": "tiny", "large": "huge", "big": "huge", "giant": "huge",
    "ocean": "sea", "grass": "meadow", "snowy": "snow", "dunes": "desert", "bricks": "brick",
    "checkerboard": "checkered", "notebook": "lined",
    "watercolor": "watercolour", "pixelated": "pixel", "pixels": "pixel",
}  # fmt: skip

# Between two objects: the relation, and whether the second object named is the first one of the relation.
RELATION_WORDS = {
    "above": ("above", False),
    "over": ("above", False),
    "below": ("above", True),
    "under": ("above", True),
    "left": ("left", False),
    "beside": ("left", False),
    "next": ("left", False),
    "right": ("left", True),
    "front": ("front", False),
    "behind": ("front", True),
}

# Words that phrases need and that say nothing by themselves.
FILLERS = frozenset(
    "a an and the of on in at to by with against falling sandy grassy starry sky wall board paper "
    "background sketch painting drawing art glowing sign black outline".split()
)


def _known() -> dict[str, tuple[str, str]]:
    table = {kind: ("kind", kind) for kind in KINDS}
    table |= {colour: ("colour", colour) for colour in COLOURS}
    table |= {size: ("size", size) for size in SIZES if size}
    table |= {place: ("place", place) for place in PLACES}
    table |= {style: ("style", style) for style in STYLES if style}
    table |= {word: ("where", word) for word in (*POSITIONS, *RELATION_WORDS) if word}
    table[GRADIENT] = ("gradient", GRADIENT)
    table |= {word: table[meant] for word, meant in SYNONYMS.items()}
    return table | {kind + "s": ("kind", kind) for kind in KINDS if kind != "fish"}


# Every word with a meaning: the aspect it speaks about, and the table entry it stands for.
KNOWN = _known()
