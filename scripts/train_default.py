"""Train the projector of the default model: frozen SmolLM2-135M-Instruct, frozen EfficientNet-Lite0.

    python scripts/train_default.py --out runs/projector --steps 700            # goes on where it was stopped
    python scripts/train_default.py --out runs/projector --export               # writes mllm/weights/default
    python scripts/train_default.py --out runs/projector --evaluate             # held-out scores into its model card

Only the two linear layers of the stock LLaVA projector are trained. Early on most batches see 49 visual tokens a
picture (feature maps averaged over 2 x 2), which is fast, later all see 196. Several questions about a picture share
one sequence, as turns of a chat. Batch k depends on k alone, so a run that was killed goes on with the same data. The
frozen language model runs in bfloat16 where the CPU computes in it, else in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from data_sources import SOURCES, Sample, rng_for  # isort: skip  (beside this file)

from mllm.default_model import PARTS, WEIGHTS, assemble, cache_folder
from mllm.loading import pick_dtype

MIXTURE = {"pictures": 0.45, "scenes": 0.30, "reading": 0.12, "documents": 0.13}
IGNORED = -100
PEAK_RATE = 6e-4


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


def encode(sample: Sample, processor: Any, tokens_per_image: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a chat about the sample; only answers and their end are labelled."""
    tokenizer = processor.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(sample.turns):
        content = [{"type": "image"} for _ in sample.images] if number == 0 else []
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": turn.question}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        text = text.replace(processor.image_token, processor.image_token * tokens_per_image)
        question = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{turn.answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        gap = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids += question + answer + gap
        labels += [IGNORED] * len(question) + answer + [IGNORED] * len(gap)
    return ids, labels


def batch_loss(model: Any, processor: Any, samples: list[Sample], pool: int) -> Tensor:
    """Mean cross-entropy of the answer tokens of some chats; ``pool`` averages that many tokens along a side."""
    pictures = [image for sample in samples for image in sample.images]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]  # (I, 3, H, W)
    with torch.no_grad():
        grid = model.model.vision_tower.grid(pixels)  # (I, C, h, w)
    grid = torch.nn.functional.avg_pool2d(grid, pool)  # (I, C, h / pool, w / pool)
    visual = model.model.multi_modal_projector(grid.flatten(2).transpose(1, 2))  # (I, T, D)
    rows = [encode(sample, processor, visual.shape[1]) for sample in samples]
    width = max(len(ids) for ids, _ in rows)
    ids, labels = torch.zeros(2, len(rows), width, dtype=torch.long).unbind(0)  # (B, S) each
    labels.fill_(IGNORED)
    mask = torch.zeros_like(ids)
    for number, (row_ids, row_labels) in enumerate(rows):
        ids[number, : len(row_ids)] = torch.tensor(row_ids)
        labels[number, : len(row_ids)] = torch.tensor(row_labels)
        mask[number, : len(row_ids)] = 1
    embeds = model.get_input_embeddings()(ids)  # (B, S, D)
    image = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(image, visual.flatten(0, 1).to(embeds.dtype))
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    target = labels[:, 1:]
    chosen = target != IGNORED
    logits = model.lm_head(hidden[:, :-1][chosen]).float()  # (answer tokens, V)
    return torch.nn.functional.cross_entropy(logits, target[chosen])


def make_batch(step: int, micro: int, size: int, progress: float) -> tuple[list[Sample], int]:
    """The samples of one micro-batch and how many tokens along a side are averaged; a function of the numbers alone.

    All come from one source, so that little is padding.
    """
    rng = rng_for("mixture", step, micro)
    source = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    pool = 1 if rng.random() < 0.25 + 1.5 * progress else 2
    options = {"pages": (2,)} if source == "documents" and pool == 1 else {}
    return list(SOURCES[source]("train", step * 1000 + micro, size, **options)), pool


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state so that a kill leaves the old or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(model: Any, processor: Any, out: Path, steps: int, micro_size: int = 4, micros: int = 2) -> None:
    """Train up to ``steps`` optimizer steps in all, going on from ``out/state.pt`` where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1.0, weight_decay=0.02)
    first, state_file = 0, out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    saved = time.monotonic()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="projector", mininterval=10)
    with (out / "log.jsonl").open("a") as log:
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
            log.write(json.dumps({"step": step, "loss": round(total, 4), "lr": rate}) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{total:.3f}")
            if time.monotonic() - saved > 60 or step + 1 == steps:
                state = {"projector": projector.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                save_state(state_file, state)
                saved = time.monotonic()


def export(out: Path, folder: Path = WEIGHTS) -> None:
    """Write the projector of a training state as 16-bit safetensors, and the loss curve beside it."""
    state = torch.load(out / "state.pt", weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.to(torch.float16).contiguous() for k, v in state["projector"].items()}, folder / "projector.safetensors"
    )
    curve(out / "log.jsonl", folder / "loss.png")


def curve(log: Path, picture: Path) -> None:
    """Draw the loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}  # a resumed step counts once
    steps, losses = list(rows), [row["loss"] for row in rows.values()]
    window = max(1, len(losses) // 40)
    smooth = [
        sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))
    ]
    figure, axes = plt.subplots(figsize=(6, 3), dpi=120)
    axes.plot(steps, losses, color="#bbbbbb", linewidth=0.6)
    axes.plot(steps, smooth, color="#0072b2", linewidth=1.5)
    axes.set(xlabel="step", ylabel="answer token loss", title="default model, projector")
    axes.set_ylim(0, sorted(losses)[int(len(losses) * 0.98)])
    figure.tight_layout()
    figure.savefig(picture)


def correct(answer: str, turn: Any) -> bool:
    """Whether the answer begins with an accepted one, case and punctuation aside."""
    said = "".join(c for c in answer.lower() if c.isalnum() or c == " ").split()
    accepted = [a.lower().split() for a in (turn.answer, *turn.accepted)]
    return any(said[: len(words)] == words for words in accepted)


def evaluate(model: Any, processor: Any, count: int, batch: int = 8) -> list[dict[str, Any]]:
    """Held-out accuracy per kind of question, with the picture, with another sample's, and with a blank one."""
    from PIL import Image

    from mllm.eval.stats import wilson
    from mllm.inputs import chat_inputs

    rows = []
    for source in MIXTURE:
        options = {"pages": (2,)} if source == "documents" else {}
        items = []
        for sample in SOURCES[source]("test", 7, count, **options):
            turn = next((t for t in sample.turns if t.kind != "caption"), None)
            if turn is not None:
                items.append((sample, turn))
        blank = Image.new("RGB", (224, 224), "white")
        for control in ("picture", "shuffled", "blank"):
            right = 0
            for start in tqdm(range(0, len(items), batch), desc=f"{source}, {control}", mininterval=10):
                chunk = items[start : start + batch]
                pictures = [list(sample.images) for sample, _ in chunk]
                if control == "shuffled":
                    pictures = [
                        list(items[(start + k + len(items) // 2) % len(items)][0].images) for k in range(len(chunk))
                    ]
                elif control == "blank":
                    pictures = [[blank] * len(row) for row in pictures]
                inputs = chat_inputs(processor, [turn.question for _, turn in chunk], pictures)
                with torch.inference_mode():
                    answers = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
                        :, inputs["input_ids"].shape[1] :
                    ]
                texts = processor.batch_decode(answers, skip_special_tokens=True)
                right += sum(correct(text, turn) for text, (_, turn) in zip(texts, chunk, strict=True))
            low, high = wilson(right, len(items))
            rows.append(
                {"source": source, "input": control, "n": len(items), "score": right / len(items), "ci95": [low, high]}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


CARD = """# Projector of the default model

Two linear layers (1712 -> 576 -> 576, GELU) between EfficientNet-Lite0 (stride-16, stride-32 and head features at
224 px, 14 x 14 = 196 visual tokens) and SmolLM2-135M-Instruct. Both of these are frozen and come from their own
packages (Apache-2.0); this folder holds only what was trained here, in 16 bit. Licence: Apache-2.0.

**Data**: openclipart (public domain), Noto emoji (Apache-2.0), and scenes, words and pages drawn by
`scripts/data_sources.py`; its training side only. Training and test share no picture, concept, font or document.

**Recipe**: `scripts/train_default.py`, {steps} steps of 8 chats, AdamW, peak rate 6e-4, cosine, seed 0, on CPU; three
quarters of the first batches see 49 visual tokens a picture, all of the last half see 196. Loss curve: `loss.png`.

**Held-out accuracy** (`scripts/train_default.py --evaluate`; free generation, one question a sample, exact first words;
95 % Wilson intervals). *shuffled* shows the picture of another sample, *blank* a white one: what the questions alone
are worth.

| questions about | n | with the picture | shuffled picture | blank picture |
|---|---|---|---|---|
{table}

**What it can do**: tell the broad kind of a thing drawn on a plain background, colours and simple shapes, and chat in
English about it in short sentences. **What it cannot do**: name things reliably (the test concepts were never seen in
training), read running text, count or locate many things, understand photographs with background, follow long
instructions. It is small on purpose: it shows what techniques do, offline, on a CPU.
"""


def write_card(rows: list[dict[str, Any]], steps: int, folder: Path = WEIGHTS) -> None:
    """Write the model card with the measured scores."""
    lines = []
    for source in MIXTURE:
        cells = {row["input"]: row for row in rows if row["source"] == source}
        shown = [
            f"{100 * c['score']:.0f} % ({100 * c['ci95'][0]:.0f} to {100 * c['ci95'][1]:.0f})"
            for c in (cells["picture"], cells["shuffled"], cells["blank"])
        ]
        lines.append(f"| {source} | {cells['picture']['n']} | {' | '.join(shown)} |")
    (folder / "README.md").write_text(CARD.format(steps=steps, table="\n".join(lines)), encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state and log")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps in all")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--export", action="store_true", help="write the projector into the package and stop")
    parser.add_argument(
        "--evaluate", type=int, nargs="?", const=100, help="held-out samples per source; writes the card"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments.out)
    elif arguments.evaluate:
        model, processor = build_model(load_file(WEIGHTS / "projector.safetensors"))
        step = torch.load(arguments.out / "state.pt", weights_only=True)["step"]
        write_card(evaluate(model.eval(), processor, arguments.evaluate), step)
    else:
        train(*build_model(), arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
