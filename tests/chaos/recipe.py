"""What is trained while processes die: a real fine-tuning and a real GRPO, one session, one order.

Every number drawn comes from the seed, so two runs of the same length are the same run.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tinker
from firetitan.v1 import checkpoint_service_pb2

from firetitan_client import FiretitanServiceClient, GradAccNormalization

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import grpo
import sft

MAX_LENGTH = 128
"""Tokens of a conversation; what comes after is cut off."""
BATCH, QUESTIONS, GROUP, MAX_TOKENS = 4, 2, 4, 16
FINE_TUNING = 8
"""Steps of fine-tuning; those after are of GRPO."""


@dataclass
class Trained:
    """What a run came to; two equal runs come to equal ones."""

    losses: list[float] = field(default_factory=list)
    """Of each step, summed over its tokens."""
    tokens: list[list[int]] = field(default_factory=list)
    """Every answer drawn."""
    digest: str = ""
    """Of the saved weights, moments and counters."""


def train(
    service: FiretitanServiceClient,
    model: str,
    *,
    lora_rank: int,
    seed: int,
    go_on: Callable[[int], bool],
) -> Trained:
    """Fine-tune, then GRPO, then save.

    Args:
        service: Where to train and sample.
        model: Hugging Face id or folder.
        lora_rank: 0 trains every parameter.
        seed: Of everything drawn.
        go_on: Asked before each step with the number of steps taken.
    """
    policy = service.create_training_client(base_model=model, lora_rank=lora_rank, seed=seed)
    tokenizer = policy.get_tokenizer()
    chats = [
        _cut(sft.to_datum(tokenizer, chat)) for chat in sft.read_chats(sft.DATA / "chats.jsonl")
    ]
    order, trained, steps = random.Random(seed), Trained(), 0
    # There is a sampler from the beginning, so that it can die in either part.
    sampler = _hotload(service, policy, "start")
    while go_on(steps):
        if steps < FINE_TUNING:
            data, loss_fn = order.sample(chats, BATCH), "cross_entropy"
        else:
            sampler = _hotload(service, policy, f"step-{steps}")
            countries = order.sample(sorted(grpo.CAPITALS), QUESTIONS)
            data, loss_fn = _rollouts(sampler, tokenizer, countries, 1000 * steps, trained), "ppo"
        passed = policy.forward_backward(data, loss_fn)
        rate = tinker.AdamParams(learning_rate=3e-4 if lora_rank else 3e-5, grad_clip_norm=1.0)
        policy.optim_step(
            rate, grad_accumulation_normalization=GradAccNormalization.NUM_LOSS_TOKENS
        ).result()
        trained.losses.append(float(passed.result().metrics["loss:sum"]))
        steps += 1
    policy.save_state("end").result()
    request = checkpoint_service_pb2.ListCheckpointsRequest(
        parent=f"trainers/{service.trainer_job_id}"
    )
    (saved,) = service.stubs.checkpoints.ListCheckpoints(request).checkpoints
    trained.digest = saved.digest
    return trained


def _hotload(service: FiretitanServiceClient, policy: Any, name: str) -> Any:
    saved = policy.save_weights_for_sampler(name).result()
    return service.create_sampling_client(model_path=saved.path)


def _rollouts(
    sampler: Any, tokenizer: Any, countries: list[str], seed: int, trained: Trained
) -> list[tinker.Datum]:
    """A group of answers to each question, all asked at once, with advantages."""
    prompts = [_question(tokenizer, country) for country in countries]
    groups = [
        sampler.sample(
            prompt=tinker.ModelInput.from_ints(prompt),
            num_samples=GROUP,
            sampling_params=tinker.SamplingParams(
                max_tokens=MAX_TOKENS, seed=seed + index, temperature=1.0
            ),
        )
        for index, prompt in enumerate(prompts)
    ]
    data = []
    for country, prompt, group in zip(countries, prompts, groups, strict=True):
        sequences = group.result().sequences
        trained.tokens += [list(one.tokens) for one in sequences]
        rewards = [_reward(tokenizer, country, one) for one in sequences]
        mean, spread = statistics.mean(rewards), statistics.pstdev(rewards) or 1.0
        data += [
            grpo.to_datum(prompt, one, (reward - mean) / spread)
            for one, reward in zip(sequences, rewards, strict=True)
        ]
    return data


def _question(tokenizer: Any, country: str) -> list[int]:
    asked = {"role": "user", "content": f"What is the capital of {country}?"}
    chat = [{"role": "system", "content": grpo.SYSTEM}, asked]
    tokens: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    return tokens


def _reward(tokenizer: Any, country: str, sequence: Any) -> float:
    """As in the example, and a little for variety, so that groups differ from the beginning."""
    text = tokenizer.decode(sequence.tokens, skip_special_tokens=True)
    exact = grpo.reward(country, grpo.CAPITALS[country], text)
    return exact + 0.1 * len(set(sequence.tokens)) / MAX_TOKENS


def _cut(datum: tinker.Datum) -> tinker.Datum:
    """The first tokens of a conversation; the last of them counts, so that none is without loss."""
    tokens = datum.model_input.to_ints()[:MAX_LENGTH]
    fields = {name: list(field.data)[:MAX_LENGTH] for name, field in datum.loss_fn_inputs.items()}
    fields["weights"][-1] = 1.0
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=fields)
