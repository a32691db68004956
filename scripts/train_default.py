"""Train the projector of the default model: frozen SmolLM2-135M-Instruct, frozen EfficientNet-Lite0.

    python scripts/train_default.py --out runs/projector --steps 700            # goes on where it was stopped
    python scripts/train_default.py --out runs/projector --export               # writes mllm/weights/default
    python scripts/train_default.py --evaluate                                  # held-out scores into the model card

``--init mllm/weights/default/projector.safetensors`` starts from a trained projector instead of a random one.

Only the two linear layers of the stock LLaVA projector are trained. Early on most batches see 49 visual tokens a
picture (feature maps averaged over 2 x 2), which is fast, later all see 196. Several questions about a picture share
one sequence, but none sees another: else they would learn the form of an answer from each other, and the model would
not know what to say to a first question. Batch k depends on k alone, so a run that was killed goes on with the same
data. The frozen language model runs in bfloat16 where the CPU computes in it, else in float32.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from data_sources import SOURCES, Sample, rng_for, side  # isort: skip  (beside this file)

from mllm.default_model import PARTS, PROJECTOR, WEIGHTS, assemble, cache_folder
from mllm.inputs import chat_inputs, open_image
from mllm.loading import pick_dtype

MIXTURE = {"pictures": 0.45, "scenes": 0.30, "reading": 0.12, "documents": 0.13}
IGNORED = -100
PEAK_RATE = 6e-4
SEED = 10_000_000
VALIDATION_SEED = 1


def build_model(projector: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
    """The default model from its cached parts, everything frozen but the projector."""
    from mllm.default_model import _part

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    paths = [_part(cache, package, file, checksum, force=False) for package, (file, checksum) in PARTS.items()]
    torch.manual_seed(0)
    return freeze(*assemble(*paths, projector))


def freeze(model: Any, processor: Any) -> tuple[Any, Any]:
    """Leave gradients to the projector alone, which stays in float32."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    dtype = pick_dtype("auto", torch.device("cpu"))
    model.model.language_model.to(dtype)
    model.lm_head.to(dtype)
    return model, processor


@dataclass
class Chat:
    """One sample as token ids: a prefix with the pictures, then its questions, each of which sees the prefix alone.

    Attributes:
        ids: token ids of prefix and turns, (S,).
        labels: the same where an answer or its end stands, -100 elsewhere.
        turns: number of the turn of each token, 0 for the prefix.
        positions: as if each turn followed the prefix directly.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, ids: list[int], labelled: bool, turn: int, position: int) -> None:
        self.ids += ids
        self.labels += ids if labelled else [IGNORED] * len(ids)
        self.turns += [turn] * len(ids)
        self.positions += range(position, position + len(ids))


def encode(sample: Sample, processor: Any, tokens_per_image: int) -> Chat:
    """The sample's questions, each in the very form of a chat's first question, behind shared pictures."""
    tokenizer = processor.tokenizer
    chat = Chat()
    for number, turn in enumerate(sample.turns, 1):
        content = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": turn.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        head, mark, tail = text.rpartition(processor.image_token)
        shared = (head + mark).replace(processor.image_token, processor.image_token * tokens_per_image)
        if number == 1:
            chat.add(tokenizer(shared, add_special_tokens=False)["input_ids"], False, 0, 0)
            behind = len(chat.ids)
        question = tokenizer(tail, add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{turn.answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        chat.add(question, False, number, behind)
        chat.add(answer, True, number, behind + len(question))
    return chat


def batch_loss(model: Any, processor: Any, samples: list[Sample], pool: int) -> Tensor:
    """Cross-entropy of the answers, each question counting alike; ``pool`` averages that many tokens along a side."""
    pictures = [image for sample in samples for image in sample.images]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]  # (I, 3, H, W)
    with torch.no_grad():
        grid = model.model.vision_tower.grid(pixels)  # (I, C, h, w)
    grid = torch.nn.functional.avg_pool2d(grid, pool)  # (I, C, h / pool, w / pool)
    visual = model.model.multi_modal_projector(grid.flatten(2).transpose(1, 2))  # (I, T, D)
    chats = [encode(sample, processor, visual.shape[1]) for sample in samples]
    width = max(len(chat.ids) for chat in chats)
    ids, positions = torch.zeros(2, len(chats), width, dtype=torch.long).unbind(0)  # (B, S) each
    labels, turns = torch.full((2, len(chats), width), IGNORED).unbind(0)  # (B, S) each
    for number, chat in enumerate(chats):
        for whole, part in ((ids, chat.ids), (labels, chat.labels), (turns, chat.turns), (positions, chat.positions)):
            whole[number, : len(part)] = torch.tensor(part)
    # a token sees what stands before it in the prefix and in its own turn; padding sees padding
    seen = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])  # (B, S, S)
    seen = seen & torch.ones(width, width, dtype=torch.bool).tril()
    embeds = model.get_input_embeddings()(ids)  # (B, S, D)
    image = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(image, visual.flatten(0, 1).to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=seen[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    target = labels[:, 1:]
    chosen = target != IGNORED
    logits = model.lm_head(hidden[:, :-1][chosen]).float()  # (answer tokens, V)
    losses = torch.nn.functional.cross_entropy(logits, target[chosen], reduction="none")
    # short answers decide the scores: a caption of ten tokens must not outweigh them
    question = (torch.arange(len(chats))[:, None] * width + turns[:, 1:])[chosen]  # (answer tokens,)
    _, question, lengths = question.unique(return_inverse=True, return_counts=True)
    return (losses / lengths[question]).sum() / len(lengths)


def is_validation(sample: Sample) -> bool:
    """Whether a training sample is kept for validation: a concept, scene, font or document goes there as a whole."""
    return side(f"validation {sample.group}", 0.06) == "test"


def draw(source: str, seed: int, size: int, validation: bool = False, **options: Any) -> list[Sample]:
    """Samples of the training side: what training learns from, or what validation keeps from it."""
    found = (s for s in SOURCES[source]("train", seed, 1000 * size, **options) if is_validation(s) == validation)
    return list(itertools.islice(found, size))


def make_batch(step: int, micro: int, size: int, progress: float) -> tuple[list[Sample], int]:
    """The samples of one micro-batch and how many tokens along a side are averaged; a function of the numbers alone.

    All come from one source, so that little is padding.
    """
    rng = rng_for("mixture", SEED, step, micro)
    source = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    pool = 1 if rng.random() < 0.25 + 1.5 * progress else 2
    options = {"pages": (2,)} if source == "documents" and pool == 1 else {}
    return draw(source, SEED + step * 1000 + micro, size, **options), pool


@torch.no_grad()
def validate(model: Any, processor: Any, count: int, size: int = 4) -> dict[str, float]:
    """Mean loss by source over ``count`` samples that training never sees, with all visual tokens."""
    losses = {}
    for source in MIXTURE:
        options = {"pages": (2,)} if source == "documents" else {}
        samples = draw(source, VALIDATION_SEED, count, validation=True, **options)
        chunks = [samples[start : start + size] for start in range(0, count, size)]
        total = sum(len(chunk) * batch_loss(model, processor, chunk, 1).item() for chunk in chunks)
        losses[source] = round(total / count, 4)
    return losses


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state so that a kill leaves the old or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    model: Any,
    processor: Any,
    out: Path,
    steps: int,
    micro_size: int = 2,
    micros: int = 2,
    validation: int = 12,
    every: int = 150,
    init: str = "random",
) -> None:
    """Train up to ``steps`` optimizer steps in all, going on from ``out/state.pt`` where there is one.

    ``validation`` samples a source are scored before the first step, after the last and every ``every`` steps; ``init``
    says in the state where the weights came from.
    """
    out.mkdir(parents=True, exist_ok=True)
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1.0, weight_decay=0.02)
    first, state_file = 0, out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"])
        first, init = state["step"], state["init"]
    saved = time.monotonic()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="projector", mininterval=10)
    with (out / "log.jsonl").open("a") as log:

        def write(row: dict[str, Any]) -> None:
            log.write(json.dumps(row) + "\n")
            log.flush()

        if first == 0 and validation:
            write({"step": 0, "validation": validate(model, processor, validation)})
        for step in bar:
            progress = step / steps
            rate = PEAK_RATE * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(progress * math.pi))
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for micro in range(micros):
                samples, pool = make_batch(step, micro, micro_size, progress)
                loss = batch_loss(model, processor, samples, pool) / micros
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            write({"step": step, "loss": round(total, 4), "lr": rate})
            bar.set_postfix(loss=f"{total:.3f}")
            if validation and ((step + 1) % every == 0 or step + 1 == steps):
                write({"step": step + 1, "validation": validate(model, processor, validation)})
            if time.monotonic() - saved > 60 or step + 1 == steps:
                state = {"projector": projector.state_dict(), "optimizer": optimizer.state_dict()}
                save_state(state_file, state | {"step": step + 1, "init": init, "chats": micro_size * micros})
                saved = time.monotonic()


def export(out: Path, folder: Path = WEIGHTS) -> None:
    """Write the projector of a training state as 16-bit safetensors that say how they were made, and the loss curve."""
    state = torch.load(out / "state.pt", weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_log(out / "log.jsonl")
    validations = [row["validation"] for row in rows if "validation" in row]
    recipe = {
        "steps": str(state["step"]),
        "chats_per_step": str(state["chats"]),
        "init": state["init"],
        "validation_before": json.dumps(validations[0] if validations else {}),
        "validation_after": json.dumps(validations[-1] if validations else {}),
    }
    weights = {name: value.to(torch.float16).contiguous() for name, value in state["projector"].items()}
    save_file(weights, folder / "projector.safetensors", metadata=recipe)
    curve(rows, folder / "loss.png")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a training log; what was logged again after a kill counts once."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["step"], "validation" in row] = row
    return [rows[key] for key in sorted(rows)]


def curve(rows: list[dict[str, Any]], picture: Path) -> None:
    """Draw training and validation loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained = [row for row in rows if "loss" in row]
    steps, losses = [row["step"] for row in trained], [row["loss"] for row in trained]
    window = max(1, len(losses) // 20)
    smooth = [
        sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))
    ]
    figure, axes = plt.subplots(figsize=(8, 4), dpi=120)
    axes.plot(steps, losses, color="#cccccc", linewidth=0.5)
    axes.plot(steps, smooth, color="#000000", linewidth=1.5, label=f"training, mean of {window + 1} steps")
    validated = [row for row in rows if "validation" in row]
    for name in validated[0]["validation"] if validated else ():
        values = [row["validation"][name] for row in validated]
        axes.plot([row["step"] for row in validated], values, marker="o", markersize=3, label=f"validation, {name}")
    axes.set(xlabel="step", ylabel="cross-entropy of an answer's tokens", title="default model, projector")
    top = max([sorted(losses)[int(len(losses) * 0.97)], *(v for row in validated for v in row["validation"].values())])
    axes.set_ylim(0, 1.05 * top)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


#: committed task -> tokens that a reply may have, as in its YAML file
TASKS = {"mllm_vqa": 10, "mllm_caption": 20, "mllm_reading": 8, "mllm_docqa": 8}
CONTROLS = ("picture", "shuffled", "blank")


def replies(model: Any, processor: Any, asked: list[tuple[str, list[Any]]], tokens: int, size: int) -> Iterator[str]:
    """Replies to questions about pictures; what is asked twice is answered once."""
    keys = [(question, b"".join(image.tobytes() for image in images)) for question, images in asked]
    first = list({key: number for number, key in reversed(list(enumerate(keys)))}.values())
    first.sort(key=lambda number: len(asked[number][1]))  # equal numbers of pages side by side: less padding
    known = {}
    for start in tqdm(range(0, len(first), size), mininterval=10, leave=False):
        numbers = first[start : start + size]
        inputs = chat_inputs(processor, [asked[n][0] for n in numbers], [asked[n][1] for n in numbers])
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        known |= {keys[n]: text.split("\n")[0].strip() for n, text in zip(numbers, texts, strict=True)}
    return (known[key] for key in keys)


def evaluate(model: Any, processor: Any, limit: int | None = None, size: int = 8) -> list[dict[str, Any]]:
    """Scores by task and kind of question, with the picture, with another question's, and with a blank one."""
    import pyarrow.parquet as pq

    from mllm.eval.stats import interval
    from mllm.eval.tasks import task_folder, verify_data
    from mllm.eval.tasks.utils import score_answer, score_caption

    rows = []
    for task, tokens in TASKS.items():
        verify_data(task)
        docs = pq.read_table(task_folder() / "data" / f"{task}.parquet").to_pylist()[:limit]
        pictures = [[open_image(io.BytesIO(image["bytes"])) for image in doc["images"]] for doc in docs]
        # the next document that has as many pages, another picture and another answer
        others = [
            next(
                (k for k in (*range(n + 1, len(docs)), *range(n)) if exchangeable(docs[n], docs[k])),
                n,
            )
            for n in range(len(docs))
        ]
        shown = {
            "picture": pictures,
            "shuffled": [pictures[k] for k in others],
            "blank": [[Image.new("RGB", image.size, "white") for image in row] for row in pictures],
        }
        score = score_caption if task == "mllm_caption" else score_answer
        scores: dict[tuple[str, str], list[float]] = {}
        for control in CONTROLS:
            asked = [(doc["question"], row) for doc, row in zip(docs, shown[control], strict=True)]
            for doc, reply in zip(docs, replies(model, processor, asked, tokens, size), strict=True):
                for kind in ("all", doc["kind"]):
                    scores.setdefault((kind, control), []).extend(score(doc, [reply]).values())
        for (kind, control), values in sorted(scores.items(), key=lambda item: item[0][0] != "all"):
            row = {"task": task, "kind": kind, "input": control, "n": len(values), "score": sum(values) / len(values)}
            rows.append(row | {"ci95": list(interval(values))})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def exchangeable(doc: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the other document's pictures can stand in for this one's and do not show its answer."""
    return (
        len(doc["images"]) == len(other["images"]) and doc["kind"] == other["kind"] and doc["answer"] != other["answer"]
    )


CARD = """# Projector of the default model

Two linear layers (1712 -> 576 -> 576, GELU) between EfficientNet-Lite0 (stride-16, stride-32 and head features at
224 px, 14 x 14 = 196 visual tokens) and SmolLM2-135M-Instruct. Both of these are frozen and come from their own
packages (Apache-2.0); this folder holds only what was trained here, in 16 bit. Licence: Apache-2.0.

**Data**: openclipart (public domain), Noto emoji (Apache-2.0), and scenes, words and pages drawn by
`scripts/data_sources.py`; its training side only. Training and test share no picture, concept, font, document or
combination of shapes.

**Recipe**: `scripts/train_default.py`, {steps} steps of {chats} pictures with all their questions,
{init}.
AdamW, peak rate 6e-4, cosine, on CPU; early batches see 49 visual tokens a picture, late ones 196. `loss.png` shows it.
{validation}

**Held-out scores** (`scripts/train_default.py --evaluate --limit {limit}`; the committed evaluation tasks, free
generation, 95 % intervals). *shuffled* shows the picture of another question of the same kind with another answer,
*blank* a white one: what is not above these does not come from the picture. (A model that looks scores below chance
when shuffled, since the other picture shows another answer.) Accuracy; for captions, F1 of the content words. The best
constant reply to each kind of question scores {constant}.

| task | kind of question | n | with the picture | shuffled picture | blank picture |
|---|---|---|---|---|---|
{table}

{verdict}
"""

#: what came before, where the weights were trained on from others; rewrite it with them
HISTORY = """\
from an earlier projector (342 steps of 8 pictures, whose questions were turns of one chat and saw each other)"""

#: what the scores above let one say; rewrite it with them
VERDICT = """\
**What it can do**: on drawn scenes of a few plain shapes, name a shape, its colour and its side, and say whether
something is there; with a clip-art thing on a plain background, choose between two kinds and often tell the broad kind
(animal, food, ...); read single digits at times. **What it cannot do**: name things (the test concepts were never
seen in training; near 0), read words, letters or numbers, answer about documents of several pages (not above the best
constant reply), understand photographs, follow long instructions. It is small on purpose: it shows offline, on a CPU,
what a technique keeps of an ability that is there. Judge techniques by `mllm_vqa`, and by nothing this model cannot
do without them."""


def write_card(rows: list[dict[str, Any]], recipe: dict[str, str], folder: Path = WEIGHTS) -> None:
    """Write the model card with the measured scores; ``recipe`` is what the weights file says of itself."""
    from mllm.eval.tasks import manifest

    scores = {(row["task"], row["kind"], row["input"]): row for row in rows}
    constant = dict.fromkeys(row["task"] for row in rows)
    lines = []
    for task, kind in dict.fromkeys((row["task"], row["kind"]) for row in rows):
        cells = [scores[task, kind, control] for control in CONTROLS]
        shown = [f"{c['score']:.2f} [{c['ci95'][0]:.2f}, {c['ci95'][1]:.2f}]" for c in cells]
        bold = "**" if kind == "all" else ""
        lines.append(f"| {task} | {bold}{kind}{bold} | {cells[0]['n']} | {' | '.join(shown)} |")
    before, after = (json.loads(recipe.get(name, "{}")) for name in ("validation_before", "validation_after"))
    listed = ", ".join(f"{name} {before[name]:.2f} -> {after[name]:.2f}" for name in after)
    text = CARD.format(
        steps=recipe["steps"],
        chats=recipe["chats_per_step"],
        init="from random weights" if recipe["init"] == "random" else HISTORY,
        validation=f"Loss on validation samples of the training side, before and after:\n{listed}." if after else "",
        table="\n".join(lines),
        limit=max(row["n"] for row in rows),
        constant=", ".join(f"{manifest()[task]['constant_reply']:.2f} in {task}" for task in constant),
        verdict=VERDICT,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/projector"), help="folder of the training state and log (runs/projector)"
    )
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps in all (700)")
    parser.add_argument("--init", type=Path, help="projector to start from, as safetensors; random without")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--export", action="store_true", help="write the projector into the package and stop")
    parser.add_argument("--evaluate", action="store_true", help="score the packaged projector and write its model card")
    parser.add_argument("--limit", type=int, help="with --evaluate: questions a task; all without")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments.out)
    elif arguments.evaluate:
        model, processor = build_model(load_file(PROJECTOR))
        with safe_open(PROJECTOR, "pt") as file:
            recipe = file.metadata()
        write_card(evaluate(model.eval(), processor, arguments.limit), recipe)
    else:
        model, processor = build_model(load_file(arguments.init) if arguments.init else None)
        train(
            model, processor, arguments.out, arguments.steps, init=arguments.init.name if arguments.init else "random"
        )


if __name__ == "__main__":
    main()
