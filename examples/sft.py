"""Fine-tune a chat model on a JSONL file of conversations, and look at it before and after.

    firetitand serve &
    python examples/sft.py                       # LoRA on SmolLM2-135M-Instruct
    python examples/sft.py --lora-rank 0         # every parameter

Each line of the data is `{"messages": [{"role": ..., "content": ...}, ...]}`. The loss is the mean
over the assistant's tokens; everything else is only read.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tinker
from tqdm.auto import tqdm

from firetitan_client import FiretitanServiceClient, GradAccNormalization

DATA = Path(__file__).parent / "data"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "Do you know how ships float?"


@dataclass
class Report:
    """What a run looked like."""

    losses: list[float] = field(default_factory=list)
    """Mean training loss a step."""
    heldout: tuple[float, float] = (0.0, 0.0)
    """Mean loss on conversations never trained on, before and after."""
    answers: tuple[str, str] = ("", "")
    """What the model said, before and after."""


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """Conversations of a JSONL file."""
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def to_datum(tokenizer: Any, chat: list[dict[str, str]]) -> tinker.Datum:
    """A conversation as tokens; weight 1 where the assistant speaks, 0 elsewhere."""
    tokens: list[int] = []
    weights: list[float] = []
    for turn, message in enumerate(chat, start=1):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            chat[: turn - 1], add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(chat[:turn], return_dict=False)
        weights += [0.0] * (len(prompt) - len(tokens)) + [1.0] * (len(whole) - len(prompt))
        tokens = whole
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def num_loss_tokens(data: list[tinker.Datum]) -> float:
    """How many tokens the loss is a sum over."""
    return sum(sum(datum.loss_fn_inputs["weights"].data) for datum in data)


def train(
    service: FiretitanServiceClient,
    *,
    model: str = MODEL,
    lora_rank: int = 16,
    steps: int = 30,
    batch_size: int = 8,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Report:
    """Run the whole recipe and report.

    Args:
        service: Where to train.
        model: Hugging Face id or folder.
        lora_rank: 0 trains every parameter.
        steps: Optimizer steps.
        batch_size: Conversations a step.
        learning_rate: None takes one that suits the rank.
        seed: Of the adapter's first weights and of the order of the data.
    """
    learning_rate = learning_rate or (2e-3 if lora_rank else 5e-5)
    policy = service.create_training_client(base_model=model, lora_rank=lora_rank, seed=seed)
    tokenizer = policy.get_tokenizer()
    chats = [to_datum(tokenizer, chat) for chat in read_chats(DATA / "chats.jsonl")]
    unseen = [to_datum(tokenizer, chat) for chat in read_chats(DATA / "heldout.jsonl")[:24]]
    report = Report()

    def heldout_loss() -> float:
        output = policy.forward(unseen, "cross_entropy").result()
        return float(output.metrics["loss:sum"]) / num_loss_tokens(unseen)

    def answer(name: str) -> str:
        saved = policy.save_weights_for_sampler(name).result()
        sampler = service.create_sampling_client(model_path=saved.path)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
        )
        reply = sampler.sample(
            prompt=tinker.ModelInput.from_ints(prompt),
            num_samples=1,
            sampling_params=tinker.SamplingParams(max_tokens=40, temperature=0.0),
        ).result()
        return str(tokenizer.decode(reply.sequences[0].tokens, skip_special_tokens=True)).strip()

    loss_before, answer_before = heldout_loss(), answer("before")
    order = random.Random(seed)
    progress = tqdm(range(steps), desc="sft")
    for step in progress:
        batch = order.sample(chats, batch_size)
        done = policy.forward_backward(batch, "cross_entropy")
        # Warm up, then fall linearly to a tenth.
        rate = learning_rate * min(1.0, (step + 1) / 3) * (1.0 - 0.9 * step / steps)
        policy.optim_step(
            tinker.AdamParams(learning_rate=rate, grad_clip_norm=1.0),
            grad_accumulation_normalization=GradAccNormalization.NUM_LOSS_TOKENS,
        ).result()
        report.losses.append(done.result().metrics["loss:sum"] / num_loss_tokens(batch))
        progress.set_postfix(loss=f"{report.losses[-1]:.3f}")
    report.heldout = (loss_before, heldout_loss())
    report.answers = (answer_before, answer("after"))
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="Hugging Face id or folder")
    parser.add_argument("--lora-rank", type=int, default=16, help="0: every parameter")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with FiretitanServiceClient.from_firetitan_config(
        base_model=options.model,
        lora_rank=options.lora_rank,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        report = train(service, **vars(options))
    print(f"training loss  {report.losses[0]:.3f} -> {report.losses[-1]:.3f}")
    print(f"held-out loss  {report.heldout[0]:.3f} -> {report.heldout[1]:.3f}")
    print(f"before: {report.answers[0]}\nafter:  {report.answers[1]}")


if __name__ == "__main__":
    main()
