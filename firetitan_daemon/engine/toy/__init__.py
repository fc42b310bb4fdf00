"""A bigram model in numpy behind the engine seam, for tests of everything around an engine."""

from firetitan_daemon.engine.toy.model import TOY_MODEL
from firetitan_daemon.engine.toy.sample import ToySampleEngine
from firetitan_daemon.engine.toy.train import ToyTrainEngine

__all__ = ["TOY_MODEL", "ToySampleEngine", "ToyTrainEngine"]
