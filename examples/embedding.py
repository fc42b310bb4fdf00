"""Make a text embedding model of a chat model, with in-batch negatives.

    firetitand serve &
    python examples/embedding.py
    python examples/embedding.py --custom        # the same loss, written here
    python examples/embedding.py --lora-rank 0   # every parameter

A query asks where to buy something in a town, a document says what a shop there sells. An embedding
is the last hidden state of a text's last token; a query is answered by the document with the
highest cosine. In a batch each query's document is the positive of its own query and a negative of
all others (InfoNCE; van den Oord et al. 2018, "Representation Learning with Contrastive Predictive
Coding", equation 4, in both directions). The held-out wares and towns are never trained on.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field
from typing import Any

import tinker
import torch
from tqdm.auto import tqdm

from firetitan_client import FiretitanServiceClient

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WARES = (
    "apples", "boots", "bread", "candles", "carpets", "cheese", "clocks", "coats", "coffee",
    "drums", "eggs", "flutes", "glasses", "gloves", "hats", "honey", "kites", "knives", "lamps",
    "maps", "mirrors", "nails", "paint", "paper", "pearls", "pens", "pots", "rings", "ropes",
    "salt", "scarves", "seeds", "soap", "spoons", "stamps", "stoves", "tea", "tents", "toys",
    "umbrellas", "vases", "wheels",
)  # fmt: skip
TOWNS = (
    "Athens", "Berlin", "Bern", "Bristol", "Cairo", "Cork", "Delhi", "Dublin", "Geneva", "Hanoi",
    "Kyoto", "Leeds", "Lima", "Lisbon", "Lyon", "Madrid", "Milan", "Oslo", "Paris", "Perth",
    "Porto", "Prague", "Quito", "Rome", "Seoul", "Sofia", "Tokyo", "Turin", "Vienna", "York",
)  # fmt: skip
HELD_OUT_WARES = (
    "baskets", "bells", "books", "chairs", "cups", "fish", "guitars", "keys", "masks", "olives",
    "rice", "saddles", "shirts", "violins", "wool", "yarn",
)  # fmt: skip
HELD_OUT_TOWNS = ("Antwerp", "Boston", "Naples", "Riga", "Seville", "Tunis", "Utrecht", "Zagreb")
QUERIES = ("Where can I buy {ware} in {town}?", "I need {ware} and I am in {town}.")
DOCUMENTS = ("A shop in {town} sells {ware}.", "{town}: old family store, known for its {ware}.")


@dataclass
class Report:
    """What a run looked like."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of a step's queries; ln(batch size) where all documents look alike."""
    recall: tuple[float, float] = (0.0, 0.0)
    """Of how many held-out queries the nearest document is the right one, before and after."""


def draw_pairs(
    wares: tuple[str, ...], towns: tuple[str, ...], count: int, order: random.Random
) -> list[tuple[str, str]]:
    """Queries and their documents; no two have both ware and town in common."""
    places = order.sample([(ware, town) for ware in wares for town in towns], count)
    return [
        (
            order.choice(QUERIES).format(ware=ware, town=town),
            order.choice(DOCUMENTS).format(ware=ware, town=town),
        )
        for ware, town in places
    ]


def info_nce(embeddings: list[torch.Tensor], num_queries: int, temperature: float) -> torch.Tensor:
    """The loss in both directions, a mean over the queries."""
    unit = torch.nn.functional.normalize(torch.stack(embeddings), dim=-1)
    cosines = unit[:num_queries] @ unit[num_queries:].T / temperature
    labels = torch.arange(num_queries)
    forth = torch.nn.functional.cross_entropy(cosines, labels)
    back = torch.nn.functional.cross_entropy(cosines.T, labels)
    return (forth + back) / 2


def train(
    service: FiretitanServiceClient,
    *,
    model: str = MODEL,
    lora_rank: int = 16,
    steps: int = 25,
    batch_size: int = 16,
    temperature: float = 0.05,
    custom: bool = False,
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
        temperature: Cosines are divided by it.
        custom: Use `forward_backward_custom` with `info_nce` above, not the built-in loss.
        learning_rate: None takes one that suits the rank.
        seed: Of the adapter's first weights and of the pairs.
    """
    learning_rate = learning_rate or (5e-4 if lora_rank else 1e-4)
    policy = service.create_training_client(base_model=model, lora_rank=lora_rank, seed=seed)
    tokenizer = policy.get_tokenizer()
    order = random.Random(seed)
    unseen = draw_pairs(
        HELD_OUT_WARES,
        HELD_OUT_TOWNS,
        len(HELD_OUT_WARES) * len(HELD_OUT_TOWNS),
        random.Random(1000 + seed),
    )
    report = Report()

    def to_data(pairs: list[tuple[str, str]]) -> list[tinker.Datum]:
        """All queries, then all documents in the same order."""
        texts = [query for query, _ in pairs] + [document for _, document in pairs]
        return [
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokenizer.encode(text)), loss_fn_inputs={}
            )
            for text in texts
        ]

    def recall() -> float:
        config = {"output": "embedding", "pooling": "last"}
        outputs = policy.forward(to_data(unseen), "cross_entropy", config).result().loss_fn_outputs
        embeddings = torch.stack([output["embedding"].to_torch() for output in outputs])
        queries, documents = torch.nn.functional.normalize(embeddings, dim=-1).chunk(2)
        nearest = (queries @ documents.T).argmax(dim=1)
        return float((nearest == torch.arange(len(unseen))).float().mean())

    def loss_fn(
        data: list[tinker.Datum], embeddings: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss = info_nce(embeddings, len(data) // 2, temperature)
        return loss, {"loss": float(loss.detach())}

    before = recall()
    progress = tqdm(range(steps), desc="embedding")
    for step in progress:
        data = to_data(draw_pairs(WARES, TOWNS, batch_size, order))
        done: Any
        if custom:
            done = policy.forward_backward_custom(data, loss_fn, output="embedding", pooling="last")
        else:
            done = policy.forward_backward_contrastive(
                data, num_queries=batch_size, temperature=temperature, pooling="last"
            )
        rate = learning_rate * min(1.0, (step + 1) / 3) * (1.0 - 0.9 * step / steps)
        policy.optim_step(tinker.AdamParams(learning_rate=rate, grad_clip_norm=1.0)).result()
        report.losses.append(done.result().metrics["loss"])
        progress.set_postfix(loss=f"{report.losses[-1]:.3f}")
    report.recall = (before, recall())
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="Hugging Face id or folder")
    parser.add_argument("--lora-rank", type=int, default=16, help="0: every parameter")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--custom", action="store_true", help="with the loss written here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with FiretitanServiceClient.from_firetitan_config(
        base_model=options.model,
        lora_rank=options.lora_rank,
        create_deployment=False,
        cleanup_trainer_on_close=True,
    ) as service:
        report = train(service, **vars(options))
    print(f"loss                {report.losses[0]:.3f} -> {report.losses[-1]:.3f}")
    print(f"recall@1, held out  {report.recall[0]:.2f} -> {report.recall[1]:.2f}")


if __name__ == "__main__":
    main()
