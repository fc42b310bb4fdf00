"""Settings of the built-in losses, and formulas where they are delicate."""

from __future__ import annotations

import math

import pytest
import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.losses import LOSSES, choose_loss


def evaluate(
    name: str, config: dict[str, float], learner: list[float], **inputs: list[float]
) -> tuple[list[float], list[float]]:
    loss, settings = choose_loss(name, config)
    leaf = torch.tensor(learner)[:, None].requires_grad_()
    tensors = {key: torch.tensor(values)[:, None] for key, values in inputs.items()}
    terms = loss.formula(leaf, tensors, settings, (len(learner),))
    (slope,) = torch.autograd.grad(terms.sum(), leaf)
    return terms[:, 0].tolist(), slope[:, 0].tolist()


def test_the_seven_losses_are_registered() -> None:
    assert set(LOSSES) == {
        "cross_entropy",
        "importance_sampling",
        "ppo",
        "cispo",
        "dro",
        "dapo",
        "gspo",
    }


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ppo", (0.8, 1.2)),
        ("cispo", (0.0, 4.0)),
        ("dapo", (0.8, 1.28)),
        ("gspo", (1 - 3e-4, 1 + 4e-4)),
    ],
)
def test_default_thresholds(name: str, wanted: tuple[float, float]) -> None:
    _, settings = choose_loss(name, {})
    assert (settings["clip_low_threshold"], settings["clip_high_threshold"]) == wanted
    assert all(value is None for key, value in settings.items() if "cap" in key or "eps" in key)


def test_default_beta() -> None:
    assert choose_loss("dro", {})[1] == {"beta": 0.05}


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("ppo", {"clip_low": 0.8}, "clip_low_threshold"),
        ("cross_entropy", {"beta": 1.0}, "no settings"),
        ("ppo", {"clip_low_threshold": math.nan}, "finite"),
        ("ppo", {"clip_low_threshold": "0.8"}, "finite"),
        ("ppo", {"clip_low_threshold": 1.5}, "above clip_high_threshold"),
        ("ppo", {"ratio_log_cap": -1.0}, "at least 0"),
        ("dapo", {"eps_clip_c": 0.5}, "at least 1"),
        ("ppo", {"target_logprob_support": "candidates"}, "full_vocabulary"),
    ],
)
def test_bad_settings_are_named(name: str, config: dict[str, float], text: str) -> None:
    with pytest.raises(FiretitanError, match=text) as caught:
        choose_loss(name, config)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.field == f'loss_fn_config["{next(iter(config))}"]'


def test_the_default_support_is_accepted() -> None:
    choose_loss("ppo", {"target_logprob_support": "full_vocabulary"})


def test_unknown_loss() -> None:
    with pytest.raises(FiretitanError, match="cross_entropy") as caught:
        choose_loss("reinforce", {})
    assert caught.value.reason is Reason.UNKNOWN_LOSS


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"cross_entropy"}))
def test_positions_without_advantage_count_for_nothing_even_if_the_ratio_overflows(
    name: str,
) -> None:
    terms, slope = evaluate(name, {}, [-1.0, -1.0], logprobs=[-1.0, -3e38], advantages=[1.0, 0.0])
    assert terms[1] == 0 and slope[1] == 0
    assert math.isfinite(terms[0]) and slope[0] < 0


def test_ppo_stops_pushing_beyond_the_bounds_only() -> None:
    learner = [math.log(ratio) for ratio in (1.5, 1.5, 0.5, 0.5, 1.1)]
    terms, slope = evaluate(
        "ppo", {}, learner, logprobs=[0.0] * 5, advantages=[1.0, -1.0, 1.0, -1.0, 1.0]
    )
    assert terms == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1])
    assert slope == pytest.approx([0, 1.5, -0.5, 0, -1.1])


def test_importance_sampling_cap_is_off_unless_sent() -> None:
    inputs = {"logprobs": [-5.0], "advantages": [2.0]}
    terms, slope = evaluate("importance_sampling", {}, [0.0], **inputs)
    assert terms == pytest.approx([-2 * math.exp(5)]) and slope == terms
    terms, slope = evaluate("importance_sampling", {"ratio_log_cap": 1.0}, [0.0], **inputs)
    assert terms == pytest.approx([-2 * math.e]) and slope == [0]


def test_dapo_limits_the_loss_of_negative_advantages() -> None:
    inputs = {"logprobs": [-3.0, -3.0], "advantages": [-1.0, 1.0]}
    free, _ = evaluate("dapo", {}, [0.0, 0.0], **inputs)
    assert free == pytest.approx([math.exp(3), -1.28])
    held, slope = evaluate("dapo", {"eps_clip_c": 3.0}, [0.0, 0.0], **inputs)
    assert held == pytest.approx([3.0, -1.28]) and slope == [0, 0]


def test_cispo_weighs_without_gradient_of_the_weight() -> None:
    terms, slope = evaluate("cispo", {}, [-1.0, -1.0], logprobs=[-2.0, -9.0], advantages=[1.0, 1.0])
    assert terms == pytest.approx([math.e, 4.0])
    assert slope == pytest.approx([-math.e, -4.0])


def test_gspo_mean_follows_the_mask() -> None:
    wide = {"clip_low_threshold": 0.1, "clip_high_threshold": 10.0}
    inputs = {"logprobs": [-2.0, -1.0, -1.0], "advantages": [1.0, 1.0, 0.0]}
    terms, _ = evaluate("gspo", wide, [-1.0, -1.0, -3.0], **inputs)
    assert terms == pytest.approx([-math.exp(0.5), -math.exp(0.5), 0])
    terms, slope = evaluate(
        "gspo", wide, [-1.0, -1.0, -3.0], **inputs, sequence_ratio_mask=[1.0, 1.0, 1.0]
    )
    assert terms == pytest.approx([-math.exp(-1 / 3), -math.exp(-1 / 3), 0])
    assert slope == pytest.approx(terms)
