"""The language of the demo corpus: statements of fact, sentences without facts, and the questions asked about them.

Sentences are lower case without punctuation, as in a transcript; questions are written the way a person types them. A
checksum of its words says whether a sentence belongs to training or to evaluation (:func:`is_held_out`). So no stage
is ever trained on an evaluation sentence.
"""

import random
import zlib
from dataclasses import dataclass, field

TRANSCRIBE = "Transcribe the speech to text without explanation:"
REPEAT = "Repeat what is said about {s}:"
VOICE_QUESTIONS = ("Is the speaker a man or a woman?", "Does a man or a woman speak?")

NAMES = """anna peter maria thomas julia daniel sofia martin helen victor laura simon clara oscar emma felix nora
hugo alice robert diana george irene walter lucy frank grace henry olga paul rita samuel tina oliver vera edward
wendy arthur bella carlos doris ethan fiona gordon hannah isaac jasmine kevin linda marcus nadia patrick
quentin brenda steven theresa harold megan louis janet ralph cynthia bruno ivan""".split()
UNHEARD_NAMES = "adam monica stella gregory tamara vincent rachel leonard".split()

CITIES = """paris london berlin madrid rome vienna prague lisbon dublin oslo athens warsaw moscow cairo tokyo boston
chicago denver dallas toronto montreal sydney geneva hamburg munich milan naples seville""".split()
JOBS = """baker teacher doctor farmer pilot nurse lawyer painter singer driver waiter gardener plumber butcher tailor
writer barber dentist carpenter soldier sailor judge miner cook banker dancer""".split()
COLORS = """red green blue yellow black white brown orange purple pink golden silver violet gray crimson turquoise
beige scarlet bronze amber""".split()
DIGITS = "zero one two three four five six seven eight nine".split()
THINGS = """lamp key hammer umbrella camera wallet ladder bottle blanket mirror basket candle compass letter
notebook pencil pillow radio ruler scissors shovel suitcase ticket towel vase whistle ring clock""".split()
PLACES = """in the kitchen|under the bed|on the table|behind the door|in the garage|next to the window|on the shelf
|in the drawer|under the stairs|in the cellar|on the balcony|behind the sofa|in the bathroom|near the fireplace
|in the attic|on the roof|beside the piano|under the carpet|in the cupboard|outside the gate|on the porch
|behind the curtain|in the hallway|on the desk""".replace("\n", "").split("|")
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
HOURS = "one two three four five six seven eight nine ten eleven twelve".split()
FOODS = """apples bread cheese soup rice potatoes chicken salmon noodles pancakes cherries strawberries mushrooms
tomatoes carrots chocolate honey walnuts sausages pizza spinach yogurt cabbage grapes""".split()
INSTRUMENTS = """violin guitar trumpet flute cello harp clarinet trombone saxophone accordion banjo mandolin oboe
tuba drums organ keyboard harmonica bassoon ukulele""".split()
GOODS = """bicycle sweater necklace hat jacket kettle telescope tent rug hammer toaster bracelet saddle wagon helmet
scarf statue teapot mattress puzzle lantern backpack canoe shirt""".split()

ADJECTIVES = """old young tall small quiet happy tired friendly clever brave gentle lazy hungry curious famous strange
lonely proud careful nervous elegant cheerful serious honest polite stubborn patient wealthy humble sleepy
grumpy graceful""".split()
BEINGS = """horse dog cat bird child neighbor king queen wolf fox rabbit sheep goat duck owl bear monkey stranger
visitor student artist captain thief guard uncle grandmother turtle dragon pirate wizard prince merchant hunter
elephant lion squirrel pigeon""".split()
DEEDS = """walked jumped slept waited danced sat ran wandered laughed rested hid looked stood sang climbed
played""".split()
SCENES = """along the river|across the bridge|through the forest|near the lake|behind the castle|in the meadow
|by the sea|around the village|over the hill|in front of the church|beneath a large tree|beyond the mountain
|inside the tunnel|at the harbor|among the flowers|down the narrow street|past the old mill|up the steep path
|close to the station|between the rocks""".replace("\n", "").split("|")
WHEN = """in the morning|after lunch|before sunrise|at midnight|last summer|during the winter|all day long|for an hour
|every evening|once again|yesterday|in early spring""".replace("\n", "").split("|")
WEATHER = "sunny rainy cloudy windy foggy stormy snowy warm cold freezing humid dry".split()
TOPICS = """music history politics football science poetry cooking travel money dreams holidays gardens painting
mathematics movies fashion health school business nature
weather language chemistry religion theater friendship medicine architecture""".split()
ACTIONS = """close the windows|water the plants|feed the animals|wash the dishes|call your brother|lock the cabin
|bring warm clothes|turn off the lights|read the instructions|check the oven|send the package|clean the floor
|charge the phone|paint the fence|sharpen the knives|repair the engine
|polish the shoes|sweep the yard|fold the shirts|empty the bin|answer the mail""".replace("\n", "").split("|")
NOVELTIES = """a new library|a big museum|a small theater|another hospital|a public park|a modern factory|a deep well
|a stone wall|a wooden tower|a long fence|a concrete dam
|a glass palace|a football stadium""".replace("\n", "").split("|")
CROWDS = """the people|our parents|some workers|the farmers of the valley|many tourists|the children|two engineers
|a group of friends""".replace("\n", "").split("|")

# kind -> (subjects, values, statements, questions); "{s}" is the subject, "{v}" the value asked for.
_CODES = [f"{a} {b}" for a in DIGITS for b in DIGITS]
_TIMES = [f"on {day} at {hour}" for day in DAYS for hour in HOURS]
KINDS: dict[str, tuple[list[str], list[str], tuple[str, ...], tuple[str, ...]]] = {
    "home": (
        NAMES,
        CITIES,
        ("{s} lives in {v}", "{s} has a house in {v}", "the home of {s} is in {v}"),
        ("Where does {s} live?", "In which city does {s} live?"),
    ),
    "job": (
        NAMES,
        JOBS,
        ("{s} works as a {v}", "{s} earns money as a {v}", "the job of {s} is {v}"),
        ("What does {s} work as?", "What is the job of {s}?"),
    ),
    "code": (
        COLORS,
        _CODES,
        ("the {s} box opens with the code {v}", "the code of the {s} box is {v}", "use {v} to open the {s} box"),
        ("Which code opens the {s} box?", "What is the code of the {s} box?"),
    ),
    "place": (
        THINGS,
        PLACES,
        ("the {s} is {v}", "you will find the {s} {v}", "somebody left the {s} {v}"),
        ("Where is the {s}?", "Where can I find the {s}?"),
    ),
    "arrival": (
        NAMES,
        _TIMES,
        ("{s} arrives {v}", "{s} will be here {v}", "we expect {s} {v}"),
        ("When does {s} arrive?", "When will {s} be here?"),
    ),
    "food": (
        NAMES,
        FOODS,
        ("{s} likes to eat {v}", "the favorite food of {s} is {v}", "for dinner {s} wants {v}"),
        ("What does {s} like to eat?", "What is the favorite food of {s}?"),
    ),
    "instrument": (
        NAMES,
        INSTRUMENTS,
        ("{s} plays the {v}", "{s} is learning the {v}", "{s} practices the {v} at night"),
        ("Which instrument does {s} play?", "What does {s} play?"),
    ),
    "purchase": (
        NAMES,
        GOODS,
        ("{s} bought a {v}", "{s} paid for a {v}", "at the market {s} got a {v}"),
        ("What did {s} buy?", "What did {s} get at the market?"),
    ),
}
# Values never spoken in training, for the figures reported apart.
UNHEARD_VALUES = {
    "home": "brussels helsinki phoenix calcutta".split(),
    "job": "mechanic sculptor librarian".split(),
    "food": "bananas lentils pears".split(),
    "instrument": "bagpipes xylophone".split(),
    "purchase": "hammock parasol".split(),
}


@dataclass
class Fact:
    """One statement of fact: ``value`` answers every question of ``kind`` about ``subject``."""

    kind: str
    subject: str
    value: str

    def questions(self) -> list[str]:
        """Returns the ways to ask for the value; names are capitalised as a person would type them."""
        subject = self.subject.capitalize() if self.subject in NAMES + UNHEARD_NAMES else self.subject
        return [question.format(s=subject) for question in KINDS[self.kind][3]]


@dataclass
class Passage:
    """Sentences in spoken order; ``facts[i]`` is what sentence ``i`` states, None where it states nothing."""

    sentences: list[str] = field(default_factory=list)
    facts: list[Fact | None] = field(default_factory=list)


def is_held_out(sentence: str) -> bool:
    """Tells whether a sentence is kept for evaluation (one in eight)."""
    return zlib.crc32(sentence.encode()) % 8 == 0


def _filler(rng: random.Random) -> str:
    pick = rng.choice
    return pick(
        (
            lambda: f"the {pick(ADJECTIVES)} {pick(BEINGS)} {pick(DEEDS)} {pick(SCENES)}",
            lambda: f"{pick(WHEN)} a {pick(ADJECTIVES)} {pick(BEINGS)} {pick(DEEDS)} {pick(SCENES)}",
            lambda: f"it was {pick(WEATHER)} and {pick(WEATHER)} {pick(WHEN)}",
            lambda: f"we talked about {pick(TOPICS)} and {pick(TOPICS)} {pick(WHEN)}",
            lambda: f"please remember to {pick(ACTIONS)} and {pick(ACTIONS)}",
            lambda: f"{pick(CROWDS)} built {pick(NOVELTIES)} {pick(SCENES)}",
            lambda: f"nobody knows why the {pick(BEINGS)} {pick(DEEDS)} {pick(SCENES)}",
        )
    )()


class PassageWriter:
    """Draws the sentences of one passage, one after the other, without end.

    Args:
        rng: the passage's own source of randomness.
        held_out: write evaluation sentences instead of training sentences.
        fact_share: probability that a sentence states a fact.
        num_kinds: how many kinds of fact the passage draws from; few kinds make many distractors.
        unheard: every fact uses a name or a value that training never speaks.
    """

    def __init__(
        self, rng: random.Random, held_out: bool, fact_share: float, num_kinds: int, unheard: bool = False
    ) -> None:
        self.rng, self.held_out, self.fact_share, self.unheard = rng, held_out, fact_share, unheard
        kinds = list(UNHEARD_VALUES) if unheard else list(KINDS)
        self.kinds = rng.sample(kinds, min(num_kinds, len(kinds)))
        self.passage = Passage()
        self._stated: set[tuple[str, str]] = set()

    def add_sentence(self) -> str:
        """Appends one sentence to ``passage`` and returns it; a subject is never stated twice for one kind."""
        fact = self._draw_fact() if self.rng.random() < self.fact_share else None
        while True:
            if fact is None:
                sentence = _filler(self.rng)
            else:
                sentence = self.rng.choice(KINDS[fact.kind][2]).format(s=fact.subject, v=fact.value)
            if is_held_out(sentence) == self.held_out and sentence not in self.passage.sentences:
                break
            fact = self._draw_fact() if fact is not None else None
        if fact is not None:
            self._stated.add((fact.kind, fact.subject))
        self.passage.sentences.append(sentence)
        self.passage.facts.append(fact)
        return sentence

    def _draw_fact(self) -> Fact | None:
        kind = self.rng.choice(self.kinds)
        subjects, values = KINDS[kind][:2]
        if self.unheard:
            if self.rng.random() < 0.5:
                subjects = UNHEARD_NAMES
            else:
                values = UNHEARD_VALUES[kind]
        free = [subject for subject in subjects if (kind, subject) not in self._stated]
        return Fact(kind, self.rng.choice(free), self.rng.choice(values)) if free else None


def vocabulary() -> set[str]:
    """Returns every word that training can speak."""
    texts = [s for _, _, statements, _ in KINDS.values() for s in statements] + [
        value for subjects, values, _, _ in KINDS.values() for value in subjects + values
    ]
    rng = random.Random(0)
    texts += [_filler(rng) for _ in range(20_000)]
    return {word for text in texts for word in text.split() if "{" not in word}
