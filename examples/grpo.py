"""Teach a model by reward alone (GRPO): name the capital of a country in one exact sentence.

    firetitand serve &
    python examples/grpo.py

Each step: hotload the policy into the sampler, draw a group of answers for each question, reward
them, and push up those that are better than their group. Rewarded is `The capital of Italy is
Rome.` and nothing around it; the right capital in other words earns a little. Some countries are
never trained on: their reward shows whether the model learned the task or the answers.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass, field
from typing import Any

import tinker
from tqdm.auto import tqdm

from firetitan_client import FiretitanServiceClient, GradAccNormalization

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SYSTEM = "Answer in one short sentence."
CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Bulgaria": "Sofia", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Cuba": "Havana", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "England": "London", "Finland": "Helsinki", "France": "Paris",
    "Germany": "Berlin", "India": "New Delhi", "Iran": "Tehran", "Ireland": "Dublin",
    "Italy": "Rome", "Japan": "Tokyo", "Lebanon": "Beirut", "Mexico": "Mexico City",
    "Norway": "Oslo", "Russia": "Moscow", "Scotland": "Edinburgh", "Spain": "Madrid",
    "Syria": "Damascus", "Taiwan": "Taipei", "Thailand": "Bangkok", "Turkey": "Ankara",
}  # fmt: skip
HELD_OUT = {
    "Argentina": "Buenos Aires", "Greece": "Athens", "Hungary": "Budapest", "Iraq": "Baghdad",
    "Kenya": "Nairobi", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon",
}  # fmt: skip


@dataclass
class Report:
    """What a run looked like."""

    rewards: list[float] = field(default_factory=list)
    """Mean reward a step, of the questions trained on."""
    heldout: tuple[float, float] = (0.0, 0.0)
    """Mean reward of the questions never trained on, before and after."""
    answers: tuple[str, str] = ("", "")
    """A sampled answer to a question never trained on, before and after."""


def reward(country: str, capital: str, answer: str) -> float:
    """1 for the exact sentence, 0.3 for the right capital in other words, else 0."""
    if answer.strip() == f"The capital of {country} is {capital}.":
        return 1.0
    return 0.3 if capital.lower() in answer.lower() else 0.0


def to_datum(prompt: list[int], sequence: Any, advantage: float) -> tinker.Datum:
    """A sampled answer with its advantage; the prompt is only read."""
    before = len(prompt) - 1
    tokens = prompt + list(sequence.tokens)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + list(sequence.logprobs),
            "advantages": [0.0] * before + [advantage] * len(sequence.tokens),
        },
    )


def train(
    service: FiretitanServiceClient,
    *,
    model: str = MODEL,
    lora_rank: int = 16,
    steps: int = 20,
    num_questions: int = 4,
    group_size: int = 8,
    max_tokens: int = 16,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Report:
    """Run the whole recipe and report.

    Args:
        service: Where to train and sample.
        model: Hugging Face id or folder.
        lora_rank: 0 trains every parameter.
        steps: Optimizer steps.
        num_questions: Questions a step.
        group_size: Answers drawn for each question.
        max_tokens: Longest answer.
        learning_rate: None takes one that suits the rank.
        seed: Of the adapter's first weights, the order of the questions and the samples.
    """
    learning_rate = learning_rate or (3e-4 if lora_rank else 3e-5)
    policy = service.create_training_client(base_model=model, lora_rank=lora_rank, seed=seed)
    tokenizer = policy.get_tokenizer()
    report = Report()

    def tokens_of(country: str) -> list[int]:
        question = f"What is the capital of {country}?"
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        tokens: list[int] = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        return tokens

    def draw(sampler: Any, countries: list[str], num_samples: int, draw_seed: int) -> list[Any]:
        """For each country a group of sampled sequences, every group by a seed of its own."""
        futures = [
            sampler.sample(
                prompt=tinker.ModelInput.from_ints(tokens_of(country)),
                num_samples=num_samples,
                sampling_params=tinker.SamplingParams(
                    max_tokens=max_tokens, seed=1000 * draw_seed + index, temperature=1.0
                ),
            )
            for index, country in enumerate(countries)
        ]
        return [future.result().sequences for future in futures]

    def text(sequence: Any) -> str:
        return str(tokenizer.decode(sequence.tokens, skip_special_tokens=True))

    def hotload(name: str) -> Any:
        saved = policy.save_weights_for_sampler(name).result()
        return service.create_sampling_client(model_path=saved.path)

    def look(sampler: Any) -> tuple[float, str]:
        """Mean reward on the held-out countries, and one answer."""
        groups = draw(sampler, list(HELD_OUT), 4, 1000 + seed)
        rewards = [
            reward(country, capital, text(sequence))
            for (country, capital), group in zip(HELD_OUT.items(), groups, strict=True)
            for sequence in group
        ]
        return statistics.mean(rewards), text(groups[-1][0])

    order = random.Random(seed)
    first_look = (0.0, "")
    progress = tqdm(range(steps), desc="grpo")
    for step in progress:
        sampler = hotload(f"step-{step}")
        if step == 0:
            first_look = look(sampler)
        countries = order.sample(sorted(CAPITALS), num_questions)
        data, rewards = [], []
        groups = draw(sampler, countries, group_size, 100 * seed + step)
        for country, group in zip(countries, groups, strict=True):
            scores = [reward(country, CAPITALS[country], text(sequence)) for sequence in group]
            rewards += scores
            mean, spread = statistics.mean(scores), statistics.pstdev(scores)
            if spread == 0:
                continue  # All equal: nothing to prefer.
            data += [
                to_datum(tokens_of(country), sequence, (score - mean) / spread)
                for sequence, score in zip(group, scores, strict=True)
                if score != mean
            ]
        if data:
            policy.forward_backward(data, "ppo")
            policy.optim_step(
                tinker.AdamParams(learning_rate=learning_rate, grad_clip_norm=1.0),
                grad_accumulation_normalization=GradAccNormalization.NUM_LOSS_TOKENS,
            ).result()
        report.rewards.append(statistics.mean(rewards))
        progress.set_postfix(reward=f"{report.rewards[-1]:.2f}")
    last_look = look(hotload("last"))
    report.heldout = (first_look[0], last_look[0])
    report.answers = (first_look[1], last_look[1])
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="Hugging Face id or folder")
    parser.add_argument("--lora-rank", type=int, default=16, help="0: every parameter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with FiretitanServiceClient.from_firetitan_config(
        base_model=options.model,
        lora_rank=options.lora_rank,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        report = train(service, **vars(options))
    print(f"reward, first 4 steps  {statistics.mean(report.rewards[:4]):.2f}")
    print(f"reward, last 4 steps   {statistics.mean(report.rewards[-4:]):.2f}")
    print(f"reward, never trained  {report.heldout[0]:.2f} -> {report.heldout[1]:.2f}")
    print(f"before: {report.answers[0]}\nafter:  {report.answers[1]}")


if __name__ == "__main__":
    main()
