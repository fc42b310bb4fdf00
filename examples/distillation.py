"""Teach a model to do unasked what it does when told (on-policy distillation).

    firetitand serve &
    python examples/distillation.py
    python examples/distillation.py --lora-rank 0    # every parameter

The teacher is a deployment of its own: the same model, with a system prompt in front of each
question. The student gets the question alone. Each step the student answers in its own words, the
teacher scores every token of the answers, and the student is pushed up where the teacher finds a
token likelier than the student did, down elsewhere: a policy gradient whose reward at each token is
log p(teacher) - log p(student), so that its expectation is minus the gradient of the KL divergence
from the teacher (Agarwal et al. 2024, "On-Policy Distillation of Language Models", with the reverse
KL). Afterwards the student behaves as if the system prompt were there.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from dataclasses import dataclass, field
from typing import Any

import tinker
from sft import DATA, MODEL, read_chats
from tqdm.auto import tqdm

from firetitan_client import (
    DeploymentConfig,
    DeploymentSampler,
    FiretitanServiceClient,
    GradAccNormalization,
)

SYSTEM = "Answer in one short sentence."


@dataclass
class Report:
    """What a run looked like."""

    kls: list[float] = field(default_factory=list)
    """A step's mean over the student's tokens of log p(student) - log p(teacher), in nats."""
    heldout: tuple[float, float] = (0.0, 0.0)
    """The same on questions never trained on, before and after."""
    answers: tuple[str, str] = ("", "")
    """A sampled answer to a question never trained on, before and after."""


@dataclass(frozen=True)
class Answer:
    """One answer of the student.

    Attributes:
        prompt: What the student read.
        tokens: What it said.
        student: The logprob of each of these tokens when it was sampled.
        teacher: The teacher's logprob of each.
    """

    prompt: list[int]
    tokens: list[int]
    student: list[float]
    teacher: list[float]

    def gaps(self) -> list[float]:
        """What each token says about the KL divergence from the teacher."""
        return [ours - theirs for ours, theirs in zip(self.student, self.teacher, strict=True)]


def to_datum(answer: Answer) -> tinker.Datum:
    """An answer, rewarded at each token by how much likelier the teacher finds it."""
    before = len(answer.prompt) - 1
    tokens = answer.prompt + answer.tokens
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + answer.student,
            "advantages": [0.0] * before + [-gap for gap in answer.gaps()],
        },
    )


async def score(teacher: DeploymentSampler, prompt: list[int], tokens: list[int]) -> list[float]:
    """The teacher's logprob of each of `tokens` behind `prompt`."""
    response, _ = await teacher.async_completions_stream(
        prompt + tokens, max_tokens=0, temperature=1.0, echo=True, logprobs=True
    )
    content = response["choices"][0]["logprobs"]["content"]
    return [float(entry["logprob"]) for entry in content[len(prompt) :]]


def train(
    service: FiretitanServiceClient,
    *,
    model: str = MODEL,
    lora_rank: int = 16,
    steps: int = 16,
    num_questions: int = 16,
    max_tokens: int = 24,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Report:
    """Run the whole recipe and report.

    Args:
        service: Where to train and sample.
        model: Hugging Face id or folder, of student and teacher.
        lora_rank: 0 trains every parameter.
        steps: Optimizer steps.
        num_questions: Questions a step, one answer each.
        max_tokens: Longest answer.
        learning_rate: None takes one that suits the rank.
        seed: Of the adapter's first weights, the order of the questions and the samples.
    """
    learning_rate = learning_rate or (1e-3 if lora_rank else 2e-5)
    student = service.create_training_client(base_model=model, lora_rank=lora_rank, seed=seed)
    teacher = service.create_inference_deployment_sampler(
        DeploymentConfig(deployment_id=f"teacher-{student.trainer_job_id}", base_model=model),
        cleanup_on_close="delete",
    )
    tokenizer = student.get_tokenizer()
    report = Report()

    def tokens_of(question: str, *, told: bool) -> list[int]:
        chat = [{"role": "system", "content": SYSTEM}] if told else []
        chat += [{"role": "user", "content": question}]
        tokens: list[int] = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        return tokens

    def questions_of(name: str) -> list[str]:
        return sorted({chat[0]["content"] for chat in read_chats(DATA / name)})

    def answer(sampler: Any, questions: list[str], draw_seed: int) -> list[Answer]:
        prompts = [tokens_of(question, told=False) for question in questions]
        futures = [
            sampler.sample(
                prompt=tinker.ModelInput.from_ints(prompt),
                num_samples=1,
                sampling_params=tinker.SamplingParams(
                    max_tokens=max_tokens, seed=1000 * draw_seed + index, temperature=1.0
                ),
            )
            for index, prompt in enumerate(prompts)
        ]
        said = [future.result().sequences[0] for future in futures]

        async def scores() -> list[list[float]]:
            told = [tokens_of(question, told=True) for question in questions]
            return await asyncio.gather(
                *(
                    score(teacher, prompt, list(one.tokens))
                    for prompt, one in zip(told, said, strict=True)
                )
            )

        return [
            Answer(prompt, list(one.tokens), list(one.logprobs), scored)
            for prompt, one, scored in zip(prompts, said, asyncio.run(scores()), strict=True)
        ]

    def kl(answers: list[Answer]) -> float:
        return statistics.mean(gap for answer in answers for gap in answer.gaps())

    def hotload(name: str) -> Any:
        saved = student.save_weights_for_sampler(name).result()
        return service.create_sampling_client(model_path=saved.path)

    def look(sampler: Any) -> tuple[float, str]:
        """The KL on held-out questions, and one answer."""
        answers = answer(sampler, questions_of("heldout.jsonl"), 1000 + seed)
        text = tokenizer.decode(answers[0].tokens, skip_special_tokens=True)
        return kl(answers), str(text).strip()

    questions = questions_of("chats.jsonl")
    order = random.Random(seed)
    first_look = (0.0, "")
    progress = tqdm(range(steps), desc="distillation")
    for step in progress:
        sampler = hotload(f"step-{step}")
        if step == 0:
            first_look = look(sampler)
        answers = answer(sampler, order.sample(questions, num_questions), 100 * seed + step)
        student.forward_backward([to_datum(one) for one in answers], "importance_sampling")
        rate = learning_rate * min(1.0, (step + 1) / 3) * (1.0 - 0.9 * step / steps)
        student.optim_step(
            tinker.AdamParams(learning_rate=rate, grad_clip_norm=1.0),
            grad_accumulation_normalization=GradAccNormalization.NUM_LOSS_TOKENS,
        ).result()
        report.kls.append(kl(answers))
        progress.set_postfix(kl=f"{report.kls[-1]:.3f}")
    last_look = look(hotload("last"))
    report.heldout = (first_look[0], last_look[0])
    report.answers = (first_look[1], last_look[1])
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="Hugging Face id or folder")
    parser.add_argument("--lora-rank", type=int, default=16, help="0: every parameter")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with FiretitanServiceClient.from_firetitan_config(
        base_model=options.model,
        lora_rank=options.lora_rank,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        report = train(service, **vars(options))
    print(f"KL to the teacher             {report.kls[0]:.3f} -> {report.kls[-1]:.3f}")
    print(f"KL to the teacher, held out   {report.heldout[0]:.3f} -> {report.heldout[1]:.3f}")
    print(f"before: {report.answers[0]}\nafter:  {report.answers[1]}")


if __name__ == "__main__":
    main()
