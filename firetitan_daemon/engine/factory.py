"""Which engine serves a base model: the toy, or transformers and torch.

Knows: both kinds by name. Must not know: how they work; imports the one it needs when it needs it,
so a toy worker never loads torch.
"""

from __future__ import annotations

from firetitan_daemon.engine.api import ModelSpec, TrainEngine
from firetitan_daemon.engine.sample_api import SampleEngine

TOY_MODEL = "firetitan/toy"


def make_train_engine(spec: ModelSpec) -> TrainEngine:
    """Load a model for training.

    Raises:
        FiretitanError: MODEL_NOT_FOUND, UNSUPPORTED, INVALID_ARGUMENT.
    """
    if spec.base_model == TOY_MODEL:
        from firetitan_daemon.engine.toy import ToyTrainEngine

        return ToyTrainEngine(spec)
    from firetitan_daemon.engine.hf_train import HfTrainEngine

    return HfTrainEngine(spec)


def make_sample_engine(spec: ModelSpec) -> SampleEngine:
    """Load a model for sampling.

    Raises:
        FiretitanError: MODEL_NOT_FOUND, UNSUPPORTED, INVALID_ARGUMENT.
    """
    if spec.base_model == TOY_MODEL:
        from firetitan_daemon.engine.toy import ToySampleEngine

        return ToySampleEngine(spec)
    from firetitan_daemon.engine.hf_sample import HfSampleEngine

    return HfSampleEngine(spec)
