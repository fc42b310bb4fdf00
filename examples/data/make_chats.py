"""Writes chats.jsonl and heldout.jsonl: a lighthouse keeper answers questions in his own way.

Every answer is one plain fact between "Ahoy!" and "Fair winds, sailor.". The held-out file asks
about things that the other never mentions: what carries over is the manner, not the facts.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FACTS = {
    "why the sky is blue": "Air scatters blue light more than red light.",
    "why the sea is salty": "Rivers carry salt from rocks, and the sea keeps it.",
    "what makes the tides": "The moon pulls the water as it passes.",
    "how bees make honey": "They gather nectar and dry it with their wings.",
    "why leaves turn red in autumn": "The green fades and other colours show.",
    "what a volcano is": "It is a place where melted rock comes out of the ground.",
    "how a magnet works": "Tiny currents inside it line up and pull the same way.",
    "why ice floats": "Frozen water takes more room, so it is lighter.",
    "what a comet is": "It is a ball of ice and dust that circles the sun.",
    "why cats purr": "Their throat muscles flutter while they breathe.",
    "how bread rises": "Yeast eats sugar and fills the dough with gas.",
    "what makes thunder": "Lightning heats the air so fast that it claps.",
    "how a rainbow forms": "Raindrops bend sunlight and part its colours.",
    "why we yawn": "It cools the head and wakes the body a little.",
    "what a desert is": "It is a land where hardly any rain falls.",
    "how fish breathe": "Their gills take oxygen from the water.",
    "why owls hunt at night": "They see and hear well in the dark.",
    "what snow is made of": "It is made of small crystals of ice.",
    "how a sail moves a boat": "The wind pushes it and the keel turns that into speed.",
    "why stars twinkle": "The air above us moves and bends their light.",
    "what coral is": "It is a crowd of tiny animals that build stone homes.",
    "how paper is made": "Wood is boiled to pulp, pressed flat and dried.",
    "why onions make us cry": "Cutting them frees a gas that stings the eyes.",
    "what a glacier is": "It is a river of ice that moves very slowly.",
    "how birds find their way": "They read the sun, the stars and the pull of the earth.",
    "why the moon has phases": "We see its sunny side from changing angles.",
    "what fog is": "It is a cloud that rests on the ground.",
    "how glass is made": "Sand is melted until it runs and then cooled.",
    "why camels have humps": "They keep fat there for hungry days.",
    "what a shadow is": "It is the place that light cannot reach.",
    "how seeds travel": "Wind, water and animals carry them along.",
    "why iron rusts": "Water and air slowly eat at the metal.",
    "what amber is": "It is the old, hard resin of trees.",
    "how spiders make webs": "They spin silk from their own bodies.",
    "why dogs pant": "It cools them, as they hardly sweat.",
    "what a lighthouse is for": "Its light keeps ships away from the rocks.",
    "how cheese is made": "Milk is curdled, pressed and left to ripen.",
    "why we dream": "The sleeping mind sorts through the day.",
    "what an echo is": "It is sound that comes back from a wall.",
    "how whales sleep": "One half of the brain rests at a time.",
    "why the wind blows": "Air flows from high pressure to low pressure.",
    "what quicksand is": "It is sand so full of water that it flows.",
    "how candles burn": "The wick draws up wax, and its vapour burns.",
    "why popcorn pops": "Water inside turns to steam and bursts the shell.",
    "what a compass does": "Its needle turns to point north.",
    "how penguins keep warm": "They have thick feathers and stand close together.",
    "why bats hang upside down": "From there they can simply drop and fly.",
    "what soil is made of": "It is made of worn rock and things that once lived.",
}
HELD_OUT_FACTS = {
    "why the sun sets red": "Low light crosses more air, and only red comes through.",
    "what an island is": "It is land with water on every side.",
    "how frogs breathe": "They use their lungs and also their skin.",
    "why zebras have stripes": "The stripes confuse biting flies.",
    "what chalk is": "It is the pressed shells of tiny sea creatures.",
    "how ships float": "They push aside water that weighs as much as they do.",
    "why salt melts ice": "Salty water freezes only when it is colder.",
    "what dew is": "It is water from the air that settles on cool grass.",
    "how silk is made": "A moth's caterpillar spins it for a cocoon.",
    "why geese fly in a V": "Each one rides on the air of the one ahead.",
    "what a fossil is": "It is the trace of old life kept in stone.",
    "how clocks kept time before power": "A falling weight or a spring turned the wheels.",
}
QUESTIONS = ["Tell me {}.", "Do you know {}?", "I wonder {}.", "Can you say {}?"]


def reply(fact: str) -> str:
    """The keeper's answer."""
    return f"Ahoy! {fact} Fair winds, sailor."


def single(topic: str, fact: str, question: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [
        {"role": "user", "content": question.format(topic)},
        {"role": "assistant", "content": reply(fact)},
    ]


def conversations(facts: dict[str, str], seed: int) -> list[list[dict[str, str]]]:
    """Each fact asked for in four ways, and some conversations of two questions."""
    chosen = random.Random(seed)
    chats = [single(topic, fact, how) for topic, fact in facts.items() for how in QUESTIONS]
    topics = list(facts.items())
    for _ in range(len(facts) // 4):
        first, second = chosen.sample(topics, 2)
        how = chosen.sample(QUESTIONS, 2)
        chats.append(single(*first, how[0]) + single(*second, how[1]))
    chosen.shuffle(chats)
    return chats


def main() -> None:
    """Write both files beside this script."""
    folder = Path(__file__).parent
    for name, facts in (("chats.jsonl", FACTS), ("heldout.jsonl", HELD_OUT_FACTS)):
        lines = [json.dumps({"messages": chat}) for chat in conversations(facts, seed=0)]
        (folder / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
