"""Train what joins the default model: a projector and a LoRA on SmolLM2-135M-Instruct, behind EfficientNet-Lite0.

    python scripts/train_default.py --out runs/projector --steps 760 --rank 0    # the projector alone
    python scripts/train_default.py --out runs/default-lora --steps 400 --init runs/projector    # both
    python scripts/train_default.py --out runs/default-lora --export             # writes mllm/weights/default
    python scripts/train_default.py --evaluate                                   # held-out scores into the model card

Each goes on where it was stopped. First the two linear layers of the stock LLaVA projector learn to speak to a language
model that stays as it is, then both learn together.

Early on most batches see 49 visual tokens a picture (feature maps averaged over 2 x 2), which is fast, later all see
196. Several questions about a picture share one sequence. In most chats none sees another: else they would learn the
form of an answer from each other, and the model would not know what to say to a first question; in the others they
follow each other as turns do. That the model goes on talking is learned from itself: requests without a picture, with
what it replied before it was trained. Batch k depends on k alone, so a run that was killed goes on with the same data.
The frozen weights are in bfloat16 where the CPU computes in it, else in float32.
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
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from data_sources import SOURCES, Sample, Turn, requests, rng_for, side  # isort: skip  (beside this file)

from mllm.default_model import ADAPTER, PARTS, PROJECTOR, WEIGHTS, _part, assemble, cache_folder
from mllm.finetuning import add_lora
from mllm.inputs import chat_inputs, open_image
from mllm.loading import pick_dtype

MIXTURE = {
    "pictures": 0.3,
    "pairs": 0.08,
    "scenes": 0.2,
    "reading": 0.16,
    "documents": 0.14,
    "text": 0.04,
    "instructions": 0.08,
}
#: share of chats whose questions follow each other
TALKS = 0.25
POOLS = (2, 1)
IGNORED = -100
PEAK_RATE = 4e-4
#: what LoRA updates
TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)|mlp\.(gate|up|down))_proj"
SEED = 20_000_000
VALIDATION_SEED = 1


class Learner:
    """A model with everything frozen but the projector and, with a rank, a LoRA on the language model.

    Args:
        model, processor: as :func:`mllm.default_model.assemble` gives them.
        rank: of the LoRA; 0: none.
        targets: what the LoRA updates; where the projector is part of it, nothing else of the projector learns.
    """

    def __init__(self, model: Any, processor: Any, rank: int = 0, targets: str = TARGETS) -> None:
        self.model, self.processor, self.rank = model, processor, rank
        self.projector = model.model.multi_modal_projector
        freeze(model)
        torch.manual_seed(0)
        if rank:
            self.adapted = add_lora(model, targets, rank)
        if not any(parameter.requires_grad for parameter in self.projector.parameters()):  # no LoRA is on it
            self.projector.requires_grad_(True)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def state(self) -> dict[str, Any]:
        """What was learned, the LoRA under peft's names."""
        adapter = get_peft_model_state_dict(self.adapted) if self.rank else {}
        return {"projector": self.projector.state_dict(), "adapter": adapter, "rank": self.rank}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` told."""
        self.projector.load_state_dict(state["projector"])
        if self.rank and state["adapter"]:
            set_peft_model_state_dict(self.adapted, state["adapter"])


def part_files() -> list[Path]:
    """The parts' files in the cache."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    return [_part(cache, package, file, checksum, force=False) for package, (file, checksum) in PARTS.items()]


def freeze(model: Any) -> None:
    """Leave gradients to nothing; the language model goes into the number format that the CPU computes fastest in."""
    model.requires_grad_(False)
    dtype = pick_dtype("auto", torch.device("cpu"))
    model.model.language_model.to(dtype)
    model.lm_head.to(dtype)


def read_start(source: Path) -> dict[str, Any]:
    """What a run in a folder learned; of a safetensors file, a projector."""
    if source.is_dir():
        return torch.load(source / "state.pt", weights_only=True)
    return {"projector": load_file(source), "adapter": {}}


@dataclass
class Chat:
    """One sample as token ids: a prefix with the pictures, then its questions, each of which sees the prefix alone.

    Attributes:
        ids: token ids of prefix and turns, (S,).
        labels: the same where an answer or its end stands, -100 elsewhere.
        turns: number of the turn of each token, 0 for the prefix.
        positions: as if each turn followed the prefix directly, or, of a talk, as they stand.
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


def encode(sample: Sample, processor: Any, tokens_per_image: int, talk: bool) -> Chat:
    """The sample's questions behind shared pictures, each in the form of a first question, or as turns of a talk."""
    tokenizer = processor.tokenizer
    chat = Chat()
    for number, turn in enumerate(sample.turns, 1):
        images = [] if talk and number > 1 else [{"type": "image"} for _ in sample.images]
        content = [*images, {"type": "text", "text": turn.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        head, mark, tail = text.rpartition(processor.image_token)
        if number == 1:
            shared = (head + mark).replace(processor.image_token, processor.image_token * tokens_per_image)
            chat.add(tokenizer(shared, add_special_tokens=False)["input_ids"], False, 0, 0)
            start = len(chat.ids)
        elif talk:
            start, tail = len(chat.ids), "\n" + tail
        question = tokenizer(tail, add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{turn.answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        chat.add(question, False, number, start)
        chat.add(answer, True, number, start + len(question))
    return chat


def batch_loss(model: Any, processor: Any, samples: list[Sample], pool: int, talk: bool = False) -> Tensor:
    """Cross-entropy of the answers, each question counting alike; ``pool`` averages that many tokens along a side."""
    pictures = [image for sample in samples for image in sample.images]
    visual = torch.zeros(0, 1, 1)  # none
    if pictures:
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]  # (I, 3, H, W)
        with torch.no_grad():
            grid = model.model.vision_tower.grid(pixels)  # (I, C, h, w)
        grid = torch.nn.functional.avg_pool2d(grid, pool, ceil_mode=True)  # (I, C, h / pool, w / pool)
        visual = model.model.multi_modal_projector(grid.flatten(2).transpose(1, 2))  # (I, T, D)
    chats = [encode(sample, processor, visual.shape[1], talk) for sample in samples]
    width = max(len(chat.ids) for chat in chats)
    ids, positions = torch.zeros(2, len(chats), width, dtype=torch.long).unbind(0)  # (B, S) each
    labels, turns = torch.full((2, len(chats), width), IGNORED).unbind(0)  # (B, S) each
    for number, chat in enumerate(chats):
        for whole, part in ((ids, chat.ids), (labels, chat.labels), (turns, chat.turns), (positions, chat.positions)):
            whole[number, : len(part)] = torch.tensor(part)
    # a token sees what stands before it in the prefix and in its own turn, or in all turns; padding sees padding
    seen = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])  # (B, S, S)
    if talk:
        seen = (turns[:, None, :] == IGNORED) == (turns[:, :, None] == IGNORED)
    seen = seen & torch.ones(width, width, dtype=torch.bool).tril()
    embeds = model.get_input_embeddings()(ids)  # (B, S, D)
    image = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(image, visual.to(embeds.dtype))
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


class Draws:
    """Training samples by source; those of ``instructions`` are what the language model itself replies.

    Args:
        replies: request -> reply.
        mixture: source -> share of the micro-batches.
        pools: how many visual tokens along a side are averaged into one, in the course of training.
    """

    def __init__(self, replies: dict[str, str], mixture: dict[str, float], pools: tuple[int, ...] = POOLS) -> None:
        self.mixture = mixture
        self.pools = pools
        self.sources = SOURCES | {"instructions": self.instructions}
        self.replies = replies

    def instructions(self, split: str, seed: int, n: int) -> Iterator[Sample]:
        """Requests without a picture."""
        known = [(request, self.replies[request]) for request in requests(split) if request in self.replies]
        for request, reply in rng_for("instructions", split, seed).sample(known, len(known))[:n]:
            yield Sample((), (Turn(request, reply, kind="instruction"),), "instructions", request)

    def draw(self, source: str, seed: int, size: int, validation: bool = False) -> list[Sample]:
        """Samples of the training side: what training learns from, or what validation keeps from it."""
        found = (s for s in self.sources[source]("train", seed, 1000 * size) if is_validation(s) == validation)
        return list(itertools.islice(found, size))

    def batch(self, step: int, micro: int, size: int, progress: float) -> tuple[list[Sample], int, bool]:
        """The samples of one micro-batch, how many tokens along a side are averaged, and whether they are talks.

        A function of the numbers alone. All samples come from one source, so that little is padding.
        """
        rng = rng_for("mixture", SEED, step, micro)
        source = rng.choices(list(self.mixture), list(self.mixture.values()))[0]
        stage = progress * (len(self.pools) - 1)
        pool = self.pools[int(stage) + (rng.random() < stage % 1)]
        return self.draw(source, SEED + step * 1000 + micro, size), pool, rng.random() < TALKS


@torch.no_grad()
def own_replies(model: Any, processor: Any, file: Path, size: int = 32, tokens: int = 100) -> dict[str, str]:
    """What the language model replies to requests without a picture, as far as it comes to an end; kept in a file."""
    if not file.exists():
        asked, replied = requests("train"), {}
        for start in tqdm(range(0, len(asked), size), desc="its own replies", mininterval=10):
            some = asked[start : start + size]
            inputs = chat_inputs(processor, some, [[] for _ in some])
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(output, skip_special_tokens=True)
            for request, text, ids in zip(some, texts, output.tolist(), strict=True):
                if processor.tokenizer.eos_token_id in ids and text.strip():
                    replied[request] = text.strip()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(replied, indent=1) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


@torch.no_grad()
def validate(learner: Learner, draws: Draws, count: int, size: int = 4) -> dict[str, float]:
    """Mean loss by source over ``count`` samples that training never sees, with all visual tokens."""
    losses = {}
    for source in draws.mixture:
        samples = draws.draw(source, VALIDATION_SEED, count, validation=True)
        chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
        total = sum(len(chunk) * batch_loss(learner.model, learner.processor, chunk, 1).item() for chunk in chunks)
        losses[source] = round(total / len(samples), 4)
    return losses


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state so that a kill leaves the old or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    learner: Learner,
    out: Path,
    steps: int,
    micro_size: int = 4,
    micros: int = 2,
    validation: int = 12,
    every: int = 100,
    init: str = "random",
    mixture: dict[str, float] | None = None,
    pools: tuple[int, ...] = POOLS,
    peak: float = PEAK_RATE,
) -> None:
    """Train up to ``steps`` optimizer steps in all, going on from ``out/state.pt`` where there is one.

    ``validation`` samples a source are scored before the first step, after the last and every ``every`` steps; ``init``
    says in the state where the weights came from; ``mixture`` is ``MIXTURE`` where none is given, ``pools`` those of
    :class:`Draws`, ``peak`` the highest learning rate.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(learner.parameters, lr=1.0, weight_decay=0.02)
    mixture = mixture or MIXTURE
    asked = "instructions" in mixture
    replies = own_replies(learner.model, learner.processor, out / "replies.json") if asked else {}
    draws = Draws(replies, mixture, pools)
    first, state_file = 0, out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        learner.load(state)
        optimizer.load_state_dict(state["optimizer"])
        first, init = state["step"], state["init"]
    saved = time.monotonic()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=out.name, mininterval=10)
    with (out / "log.jsonl").open("a") as log:

        def write(row: dict[str, Any]) -> None:
            log.write(json.dumps(row) + "\n")
            log.flush()

        if first == 0 and validation:
            write({"step": 0, "validation": validate(learner, draws, validation)})
        for step in bar:
            progress = step / steps
            rate = peak * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(progress * math.pi))
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for micro in range(micros):
                loss = batch_loss(learner.model, learner.processor, *draws.batch(step, micro, micro_size, progress))
                (loss / micros).backward()
                total += loss.item() / micros
            torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            write({"step": step, "loss": round(total, 4), "lr": rate})
            bar.set_postfix(loss=f"{total:.3f}")
            if validation and ((step + 1) % every == 0 or step + 1 == steps):
                write({"step": step + 1, "validation": validate(learner, draws, validation)})
            if time.monotonic() - saved > 120 or step + 1 == steps:
                state = {**learner.state(), "optimizer": optimizer.state_dict()}
                save_state(state_file, state | {"step": step + 1, "init": init, "chats": micro_size * micros})
                saved = time.monotonic()


def export(out: Path, folder: Path = WEIGHTS) -> None:
    """Write a training state as 16-bit safetensors that say how they were made, and the loss curve."""
    state, rows = torch.load(out / "state.pt", weights_only=True), read_log(out / "log.jsonl")
    recipe = recipe_of(state, rows)
    folder.mkdir(parents=True, exist_ok=True)
    save_half(state["projector"], folder / PROJECTOR.name, recipe)
    export_adapter(state, folder / ADAPTER.name, TARGETS, recipe)
    curve(rows, folder / "loss.png")


def recipe_of(state: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """How a training state came about, as a safetensors file says it of itself."""
    validations = [row["validation"] for row in rows if "validation" in row]
    return {
        "steps": str(state["step"]),
        "chats_per_step": str(state["chats"]),
        "rank": str(state["rank"]),
        "init": state["init"],
        "validation_before": json.dumps(validations[0] if validations else {}),
        "validation_after": json.dumps(validations[-1] if validations else {}),
    }


def export_adapter(state: dict[str, Any], folder: Path, targets: str, recipe: dict[str, str]) -> None:
    """Write a training state's LoRA as every version of peft reads it, unlike what this one would write."""
    folder.mkdir(parents=True, exist_ok=True)
    save_half(state["adapter"], folder / "adapter_model.safetensors", recipe)
    rank = state["rank"]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    written = json.dumps({**settings, "base_model_name_or_path": "default"}, indent=1) + "\n"
    (folder / "adapter_config.json").write_text(written, encoding="utf-8")


def save_half(tensors: dict[str, Tensor], file: Path, recipe: dict[str, str]) -> None:
    """Write tensors as float16."""
    save_file({key: value.to(torch.float16).contiguous() for key, value in tensors.items()}, file, metadata=recipe)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a training log; what was logged again after a kill counts once."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["step"], "validation" in row] = row
    return [rows[key] for key in sorted(rows)]


def curve(rows: list[dict[str, Any]], picture: Path, title: str = "default model") -> None:
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
    axes.set(xlabel="step", ylabel="cross-entropy of an answer's tokens", title=title)
    top = max([sorted(losses)[int(len(losses) * 0.97)], *(v for row in validated for v in row["validation"].values())])
    axes.set_ylim(0, 1.05 * top)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


#: committed task -> tokens that a reply may have, as in its YAML file; 0: no reply, how a text goes on
TASKS = {"mllm_vqa": 10, "mllm_caption": 20, "mllm_reading": 8, "mllm_docqa": 8, "mllm_text": 12, "mllm_language": 0}
CONTROLS = ("picture", "shuffled", "blank")
TEXT_ONLY = ("trained", "before training")


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


def goes_on(model: Any, processor: Any, docs: list[dict[str, Any]], size: int) -> Iterator[float]:
    """Whether greedy decoding says the word that follows each text, 0 or 1."""
    from lmms_eval.api.instance import Instance

    from mllm.eval.lmms_model import MllmLmms
    from mllm.eval.tasks.utils import next_word

    requests = [
        Instance(
            request_type="loglikelihood",
            arguments=(doc["question"], next_word(doc), number, doc["task"], "test"),
            idx=0,
            metadata={"task": doc["task"], "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
    ]
    lm = MllmLmms(loaded=(model, processor), batch_size=size)
    return (float(same) for _, same in lm.loglikelihood(requests))


def evaluate(
    models: dict[str, Any], processor: Any, tasks: list[str], limit: int | None = None, size: int = 8
) -> list[dict[str, Any]]:
    """Scores by task and kind of question, with the picture, with another question's, and with a blank one.

    ``models`` holds the trained one and the one before; of the latter the questions without a picture are asked alone.
    """
    import pyarrow.parquet as pq

    from mllm.eval.stats import interval
    from mllm.eval.tasks import task_folder, verify_data
    from mllm.eval.tasks.utils import score_answer, score_caption

    rows = []
    for task in tasks:
        verify_data(task)
        docs = pq.read_table(task_folder() / "data" / f"{task}.parquet").to_pylist()[:limit]
        pictures = [[open_image(io.BytesIO(image["bytes"])) for image in doc["images"]] for doc in docs]
        if any(pictures):
            # the next document that has as many pages, another picture and another answer
            others = [
                next((k for k in (*range(n + 1, len(docs)), *range(n)) if exchangeable(docs[n], docs[k])), n)
                for n in range(len(docs))
            ]
            blank = [[Image.new("RGB", image.size, "white") for image in row] for row in pictures]
            shown = dict(zip(CONTROLS, (pictures, [pictures[k] for k in others], blank), strict=True))
            asked = {control: (models["trained"], row) for control, row in shown.items()}
        else:
            asked = {name: (models[name], pictures) for name in TEXT_ONLY}
        score = score_caption if task == "mllm_caption" else score_answer
        scores: dict[tuple[str, str], list[float]] = {}
        for control, (model, seen) in asked.items():
            if tokens := TASKS[task]:
                questions = [(doc["question"], row) for doc, row in zip(docs, seen, strict=True)]
                replied = zip(docs, replies(model, processor, questions, tokens, size), strict=True)
                values = [next(iter(score(doc, [reply]).values())) for doc, reply in replied]
            else:
                values = list(goes_on(model, processor, docs, size))
            for doc, value in zip(docs, values, strict=True):
                for kind in ("all", doc["kind"]):
                    scores.setdefault((kind, control), []).append(value)
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


CARD = """# What joins the default model

A projector, two linear layers (1712 -> 576 -> 576, GELU) between EfficientNet-Lite0 (stride-16, stride-32 and head
features at 224 px, 14 x 14 = 196 visual tokens) and SmolLM2-135M-Instruct, and a LoRA of rank {rank} on all linear
layers of that language model, which is merged when the model is prepared. Both parts come from their own packages
(Apache-2.0); this folder holds only what was trained here, in 16 bit. Licence: Apache-2.0.

**Data**: openclipart (public domain), Noto emoji (Apache-2.0), and scenes, words and pages drawn by
`scripts/data_sources.py`; its training side only. Training and test share no picture, concept, font, document or
combination of shapes. Without pictures: small facts and sums, and requests with what the language model replied before.

**Recipe**: `scripts/train_default.py`, {steps} steps of {chats} chats with all their questions, projector and LoRA,
{init}.
AdamW, peak rate 4e-4, cosine, on one CPU core in 77 minutes; early batches see 49 visual tokens a picture, late ones
196; a quarter of the chats are talks of several turns. `loss.png` shows it.
{validation}

**Held-out scores** (`scripts/train_default.py --evaluate`; the committed evaluation tasks, all questions, free
generation, 95 % intervals). *shuffled* shows the picture of another question of the same kind with another answer,
*blank* a white one: what is not above these does not come from the picture. (A model that looks scores below chance
when shuffled, since the other picture shows another answer.) Accuracy; for captions, F1 of the content words. The best
constant reply to each kind of question scores {constant}.

| task | kind of question | n | with the picture | shuffled picture | blank picture |
|---|---|---|---|---|---|
{table}

Questions without a picture, asked of the language model with the LoRA and without:

| task | kind of question | n | trained | before training |
|---|---|---|---|---|
{text}

{verdict}
"""

#: what came before, where the weights were trained on from others; rewrite it with them
HISTORY = """\
from a projector that was trained alone, by 420 steps of 4 pictures, and before that by 342 steps of 8 (whose questions
were turns of one chat)"""

#: what the scores above let one say; rewrite it with them
VERDICT = """\
**What it can do**: on drawn scenes of a few plain shapes, name a shape, count, and three times in four say its colour,
and describe them; with a clip-art thing on a plain background, tell which of two kinds it is, and two times in three
its kind among thirteen, and describe it so; read a large digit better than chance; say the colour of a shape on a page
twice as often as without the page; chat as its language model did, and go on in running text as well as that.
**What it cannot do**: say whether something is there, or, more than half the time, what is on which side; name things
(the test concepts were never seen in training); read words or numbers; find a page among several (not above the best
constant reply); understand photographs; follow long instructions. For documents there is `default/documents`.
What the LoRA did to text: sums and comparing numbers are learned, some facts (capitals) and the first word of a list
are lost. A second stage with more documents and reading (160 steps) was tried and left: it cost pictures and text more
than it brought. The model is small on purpose: it shows offline, on a CPU, what a technique keeps of an ability that is
there. Judge techniques by `mllm_vqa` and `mllm_caption`, and by nothing this model cannot do without them."""


def write_card(rows: list[dict[str, Any]], recipe: dict[str, str], folder: Path = WEIGHTS) -> None:
    """Write the model card with the measured scores; ``recipe`` is what the weights file says of itself."""
    from mllm.eval.tasks import manifest

    scores = {(row["task"], row["kind"], row["input"]): row for row in rows}
    lines: dict[str, list[str]] = {"pictures": [], "text": []}
    for task, kind in dict.fromkeys((row["task"], row["kind"]) for row in rows):
        seeing = (task, kind, CONTROLS[0]) in scores
        cells = [scores[task, kind, control] for control in (CONTROLS if seeing else TEXT_ONLY)]
        shown = [f"{c['score']:.2f} [{c['ci95'][0]:.2f}, {c['ci95'][1]:.2f}]" for c in cells]
        bold = "**" if kind == "all" else ""
        line = f"| {task} | {bold}{kind}{bold} | {cells[0]['n']} | {' | '.join(shown)} |"
        lines["pictures" if seeing else "text"].append(line)
    constant = dict.fromkeys(task for task, _, control in scores if control == CONTROLS[0])
    before, after = (json.loads(recipe.get(name, "{}")) for name in ("validation_before", "validation_after"))
    listed = ", ".join(f"{name} {before[name]:.2f} -> {after[name]:.2f}" for name in after)
    text = CARD.format(
        rank=recipe["rank"],
        steps=recipe["steps"],
        chats=recipe["chats_per_step"],
        init="from random weights" if recipe["init"] == "random" else HISTORY,
        validation=f"Loss on validation samples of the training side, before and after:\n{listed}." if after else "",
        table="\n".join(lines["pictures"]),
        text="\n".join(lines["text"]),
        constant=", ".join(f"{manifest()[task]['constant_reply']:.2f} in {task}" for task in constant),
        verdict=VERDICT,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/default-lora"), help="folder of the state and the log")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps in all (400)")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA; 0 trains the projector alone (16)")
    parser.add_argument("--init", type=Path, help="a run's folder to start from, or a projector as a safetensors file")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--export", action="store_true", help="write the weights into the package and stop")
    parser.add_argument("--evaluate", action="store_true", help="score the packaged weights and write their model card")
    parser.add_argument("--limit", type=int, help="with --evaluate: questions a task; all without")
    parser.add_argument("--tasks", help="with --evaluate: tasks with commas; the scores of the others stay")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments.out)
    elif arguments.evaluate:
        models = {}
        for name, adapter in zip(TEXT_ONLY, (ADAPTER, None), strict=True):
            models[name], processor = assemble(*part_files(), load_file(PROJECTOR), adapter)
            freeze(models[name].eval())
        with safe_open(PROJECTOR, "pt") as file:
            recipe = file.metadata()
        tasks = arguments.tasks.split(",") if arguments.tasks else list(TASKS)
        rows = evaluate(models, processor, tasks, arguments.limit)
        if arguments.tasks:
            rows += [row for row in json.loads((WEIGHTS / "scores.json").read_text()) if row["task"] not in tasks]
            rows.sort(key=lambda row: list(TASKS).index(row["task"]))
        write_card(rows, recipe)
    else:
        torch.manual_seed(0)  # of a projector that starts at random
        learner, init = Learner(*assemble(*part_files()), arguments.rank), "random"
        if arguments.init:
            init = arguments.init.name
            learner.load(read_start(arguments.init))
        train(learner, arguments.out, arguments.steps, init=init)


if __name__ == "__main__":
    main()
