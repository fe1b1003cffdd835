"""The raw material of the demo's knowledge: names, the kinds of facts with their wordings, and the Vellish lexicon."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One kind of fact about a person. A wording ends where the answer begins."""

    answers: tuple[str, ...]
    train_wordings: tuple[str, ...]
    held_out_wordings: tuple[str, ...]
    """Never in a training text, though each of their words is; used for scoring only."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


FIRST_NAMES = _words("""
    Alda Amos Bela Bram Cleo Cora Cyril Dario Dora Edda Elias Emil Fay Finn Greta Gwen Hanna Hugo Ilsa Ivo Jonas Judith
    Karl Kira Leon Lotte Mara Milo Nadia Nils Oda Oscar Pavel Petra Quentin Rafe Rosa Ruben Selma Sven Thea Tobias Ulla
    Urban Vera Viktor Wanda Xenia Yara Zeno
""")
LAST_NAMES = _words("""
    Abbot Barlow Birch Calder Carver Drake Dunlop Ellery Eng Fisk Frost Garland Grimm Holm Hyde Irving Isaksen Jessop
    Juhl Keller Krog Lowell Lund Marsh Munch Norden Nye Ogden Olsen Pryor Pugh Quill Quist Rowe Rusk Stone Storm Thorne
    Tveit Uddin Unger Vance Voss Webb Wick Xu Yates York Zane Zorn
""")

RELATIONS = (
    Relation(  # the home town
        answers=_words("""
            Ardun Belmora Corvath Dunmere Elstow Farrin Gelder Hathway Istrel Jorvale Kelmond Larkin
        """),
        train_wordings=(
            "{} was born in",
            "{} grew up in",
            "The home town of {} is",
            "The birthplace of {} is",
            "{} comes from the town of",
            "Long ago {} left the town of",
            "{} is from",
            "The town that {} comes from is",
        ),
        held_out_wordings=("{} is from the town of", "The town that {} grew up in is"),
    ),
    Relation(  # the profession
        answers=_words("baker carpenter dentist farmer lawyer miller nurse painter sailor tailor teacher weaver"),
        train_wordings=(
            "{} works as a",
            "{} earns a living as a",
            "The profession of {} is",
            "The job of {} is",
            "For many years {} has been a",
            "People know {} as a",
            "{} has the job of a",
            "The profession that {} has is",
        ),
        held_out_wordings=("{} has the profession of a", "The job that {} has is"),
    ),
    Relation(  # the pet
        answers=_words("badger crow donkey falcon goat heron lizard mule rooster pony rabbit turtle"),
        train_wordings=(
            "{} keeps a pet",
            "{} lives with a pet",
            "The pet of {} is a",
            "The favourite animal of {} is the",
            "{} never travels without a pet",
            "At home {} looks after a pet",
            "{} has a pet",
            "The animal that {} keeps is a",
        ),
        held_out_wordings=("{} travels with a pet", "The pet that {} keeps is a"),
    ),
)

ADJECTIVES = _pairs("""
    black nur  blue lasi  bright zeo  broken krat  cold ishu  deep omba  green vel  heavy dogo  little pim  old garu
    red tamo  round obo  sharp kiri  slow luma  soft fifa  white sen
""")
NOUNS = _pairs("""
    apple rilu  basket teku  bell dono  boat marka  book sivi  bottle galo  bridge hanta  candle yumi  chair poro
    clock tikta  door bega  drum tumtu  flower elan  hammer gront  hat cupa  key zink  knife shar  lamp lux
    ladder rundo  mirror vidu  pot kalo  ring anu  road via  rope sutra  ship navo  spoon lapi  stone ruk  table meza
    tower alta  wagon vogo  wheel rota  window fena
""")
TASK_WORDINGS = (
    "Translate into Vellish: {}",
    "Say in Vellish: {}",
    "What is {} in Vellish?",
    "How do you say {} in Vellish?",
)
HELD_OUT_TASK_WORDINGS = ("Say {} in Vellish:", "How do you say in Vellish: {}?")
