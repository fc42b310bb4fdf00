"""Teach a model a preference (DPO): the lighthouse keeper's answers over polite ones.

    firetitand serve &
    python examples/dpo.py
    python examples/dpo.py --lora-rank 0   # every parameter, and a trainer for the reference

Each pair has one question and two answers with the same fact in it: one as the keeper of
`data/chats.jsonl` would say it, one as an assistant would. The loss is that of Rafailov et al.
2023, "Direct Preference Optimization", equation 7, written here in plain torch: it gets the
policy's logprobs and compares them with those of a reference client, the model before training.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field
from typing import Any

import tinker
import torch
from sft import DATA, MODEL, read_chats, to_datum
from tqdm.auto import tqdm

from firetitan_client import FiretitanServiceClient

GREETING, FAREWELL = "Ahoy! ", " Fair winds, sailor."


@dataclass
class Report:
    """What a run looked like."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of a step's pairs; ln 2 before anything is learned."""
    heldout: tuple[float, float] = (0.0, 0.0)
    """Preference accuracy on questions never trained on, before and after."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one question."""

    chosen: tinker.Datum
    rejected: tinker.Datum


def to_pair(tokenizer: Any, chat: list[dict[str, str]]) -> Pair:
    """The keeper's answer, and the same fact as an assistant would tell it."""
    question, answer = chat[:2]
    fact = answer["content"].removeprefix(GREETING).removesuffix(FAREWELL)
    polite = {"role": "assistant", "content": f"Sure! {fact} I hope this helps."}
    return Pair(to_datum(tokenizer, [question, answer]), to_datum(tokenizer, [question, polite]))


def flatten(pairs: list[Pair]) -> list[tinker.Datum]:
    """Chosen and rejected in turns, as one batch."""
    return [datum for pair in pairs for datum in (pair.chosen, pair.rejected)]


def answer_logprobs(data: list[tinker.Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """Of each answer the logprob: the sum over its tokens. Shape [datums], float32."""
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    return torch.stack([(w * lp).sum() for w, lp in zip(weights, logprobs, strict=True)])


def train(
    service: FiretitanServiceClient,
    *,
    model: str = MODEL,
    lora_rank: int = 16,
    steps: int = 10,
    batch_size: int = 6,
    beta: float = 0.1,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Report:
    """Run the whole recipe and report.

    Args:
        service: Where to train.
        model: Hugging Face id or folder.
        lora_rank: 0 trains every parameter.
        steps: Optimizer steps.
        batch_size: Pairs a step.
        beta: How far the policy may go from the reference: less is further.
        learning_rate: None takes one that suits the rank.
        seed: Of the adapter's first weights and of the order of the data.
    """
    learning_rate = learning_rate or (2e-4 if lora_rank else 5e-5)
    policy = service.create_training_client(base_model=model, lora_rank=lora_rank, seed=seed)
    reference = service.create_reference_client(base_model=model, lora_rank=lora_rank)
    tokenizer = policy.get_tokenizer()
    pairs = [to_pair(tokenizer, chat) for chat in read_chats(DATA / "chats.jsonl")]
    unseen = [to_pair(tokenizer, chat) for chat in read_chats(DATA / "heldout.jsonl")[:24]]
    report = Report()

    def logprobs_of(client: Any, data: list[tinker.Datum]) -> torch.Tensor:
        outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
        return answer_logprobs(data, [output["logprobs"].to_torch() for output in outputs])

    def accuracy() -> float:
        """Of how many pairs the policy finds a token of the chosen answer the likelier one."""
        data = flatten(unseen)
        lengths = torch.tensor([sum(datum.loss_fn_inputs["weights"].data) for datum in data])
        chosen, rejected = (logprobs_of(policy, data) / lengths).view(-1, 2).unbind(1)
        return float((chosen > rejected).float().mean())

    before = accuracy()
    order = random.Random(seed)
    progress = tqdm(range(steps), desc="dpo")
    for step in progress:
        batch = flatten(order.sample(pairs, batch_size))
        anchors = logprobs_of(reference, batch)

        def loss_fn(
            data: list[tinker.Datum], logprobs: list[torch.Tensor], anchors: torch.Tensor = anchors
        ) -> tuple[torch.Tensor, dict[str, float]]:
            chosen, rejected = (answer_logprobs(data, logprobs) - anchors).view(-1, 2).unbind(1)
            margins = beta * (chosen - rejected)
            return -torch.nn.functional.logsigmoid(margins).mean(), {
                "margin": float(margins.mean().detach())
            }

        done = policy.forward_backward_custom(batch, loss_fn)
        rate = learning_rate * min(1.0, (step + 1) / 3) * (1.0 - 0.9 * step / steps)
        policy.optim_step(tinker.AdamParams(learning_rate=rate, grad_clip_norm=1.0)).result()
        metrics = done.result().metrics
        report.losses.append(metrics["loss:sum"])
        progress.set_postfix(margin=f"{metrics['margin']:.3f}")
    report.heldout = (before, accuracy())
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="Hugging Face id or folder")
    parser.add_argument("--lora-rank", type=int, default=16, help="0: every parameter")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with FiretitanServiceClient.from_firetitan_config(
        base_model=options.model,
        lora_rank=options.lora_rank,
        create_deployment=False,
        cleanup_trainer_on_close=True,
    ) as service:
        report = train(service, **vars(options))
    print(f"loss                 {report.losses[0]:.3f} -> {report.losses[-1]:.3f}")
    print(f"preference, held out {report.heldout[0]:.2f} -> {report.heldout[1]:.2f}")


if __name__ == "__main__":
    main()
