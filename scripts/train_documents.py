"""Train what the default model reads documents with: a LoRA that sees more of each page.

    python scripts/train_documents.py                                              # 400 visual tokens a page
    python scripts/train_documents.py --out runs/documents-224 --image-size 224    # the control: 196, as pictures have
    python scripts/train_documents.py --evaluate                                   # held-out scores; of both runs
    python scripts/train_documents.py --export --control runs/documents-224        # into mllm/weights/default/documents

The LoRA stands on the finished default model, which stays as it is: ``mllm.load("default/documents")`` merges it. Most
chats are documents of :func:`mllm.drawn.document_samples` with all questions about every page, the rest keeps what the
model can besides. The loop is that of ``train_default.py``: it goes on where it was stopped. At first a page has a
sixteenth of its tokens: many documents are seen so, and the shapes can be told already.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from train_default import (  # isort: skip  (beside this file)
    ADAPTER,
    CONTROLS,
    PROJECTOR,
    WEIGHTS,
    Learner,
    assemble,
    curve,
    evaluate,
    export_adapter,
    part_files,
    read_log,
    recipe_of,
    train,
)

from mllm.default_model import TOWER
from mllm.eval.tasks import manifest
from mllm.loading import load
from mllm.towers import VisionTowerConfig

MIXTURE = {"every page": 0.85, "scenes": 0.08, "instructions": 0.07}
#: with few tokens a page many documents are seen, and what a page shows is told from what the others show; then more
POOLS = (4, 4, 4, 2, 1)
PEAK_RATE = 8e-4
#: what LoRA updates
TARGETS = (
    r".*(language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)|mlp\.(gate|up|down))_proj|multi_modal_projector\.linear_\d)"
)
FOLDER = WEIGHTS / "documents"
PREPARATION = "preprocessor_config.json"
TASK = "mllm_docqa"


def learner_of(rank: int, side: int) -> Learner:
    """The finished default model with pictures of this side in pixels, and a LoRA to learn."""
    model, processor = assemble(*part_files(), load_file(PROJECTOR), ADAPTER)
    processor.image_processor.size = {"height": side, "width": side}
    return Learner(model, processor, rank, TARGETS)


def export(run: Path, folder: Path = FOLDER) -> None:
    """Write a run as an adapter that :func:`mllm.load` opens, with how it wants pictures prepared."""
    state, rows = torch.load(run / "state.pt", weights_only=True), read_log(run / "log.jsonl")
    export_adapter(state, folder, TARGETS, recipe_of(state, rows))
    shutil.copyfile(run / PREPARATION, folder / PREPARATION)
    curve(rows, folder / "loss.png", "default model, documents")


def measure(run: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Scores on the held-out documents of what a run learned, loaded as a user would."""
    export(run, run / "adapter")
    model, processor = load(run / "adapter")
    return evaluate({"trained": model}, processor, [TASK], limit)


def scores_of(run: Path) -> list[dict[str, Any]]:
    """All of :func:`measure`, kept in the run's folder until the run goes on."""
    file = run / "scores.json"
    if not file.exists() or file.stat().st_mtime < (run / "state.pt").stat().st_mtime:
        file.write_text(json.dumps(measure(run), indent=1) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


CARD = """# What the default model reads documents with

A LoRA of rank {rank} on the linear layers of the default model's language model and projector. It sees a page at
{side} px, which are {tokens} visual tokens where a picture in the default model has 196. Loading `default/documents`
with `mllm.load` loads the default model, merges it and prepares pictures in that size. Licence: Apache-2.0.

**Data**: documents of one to three pages drawn by `mllm.drawn.document_samples` (training side: other documents and
fonts than in the task) with all questions about every page, and scenes and requests without a picture so that nothing
is lost: {mixture}.

**Recipe**: `scripts/train_documents.py`, {steps} steps of {chats} chats, AdamW, peak rate {peak:g}, cosine, seed 0,
on one CPU core in 75 minutes; first a page has a sixteenth of its tokens, from the middle on a quarter, at last all of
them. `loss.png` shows it. Loss on validation samples of the training side, before and after:
{validation}

**Held-out scores** on `mllm_docqa`, all questions, free generation, 95 % intervals. *as it is* is the default model;
*control* learned from the same data in as many steps, but sees 196 tokens a page; *shuffled* shows the pages of another
document, *blank* white ones. The best constant reply scores {constant:.2f}.

| question | n | default as it is, 196 tokens | control, 196 tokens | documents, {tokens} tokens | shuffled | blank |
|---|---|---|---|---|---|---|
{table}

{verdict}
"""

#: what the scores above let one say; rewrite it with them
VERDICT = """\
**What it can do**: say, eight times in ten, the colour of the shape on a page that is named by its number, and two
times in three the colour of a shape on whichever page it is; the default model as it is does either three times in ten.
**What it cannot do**: tell on which page a colour is (not above blank pages), read text, or anything about real
documents. **What did it**: the training, not the tokens. The control, which learned the same with half the tokens a
page, is at least as good: shapes this large lose nothing at 224 px. Where cost counts, run the control's command. This
folder is the document model whose pages have more to leave out, for techniques that leave it out. For pictures stay
with `default`: its loss on the validation scenes is 0.52."""


def write_card(run: Path, control: Path, folder: Path = FOLDER) -> None:
    """Write the model card of what is exported, with the scores of its run and of the control's."""
    cells: dict[tuple[str, str], str] = {}
    sources = {
        "default": json.loads((WEIGHTS / "scores.json").read_text(encoding="utf-8")),
        "control": scores_of(control),
        "documents": scores_of(run),
    }
    counts: dict[str, int] = {}
    for name, rows in sources.items():
        for row in rows:
            if row["task"] == TASK:
                column = name if row["input"] == CONTROLS[0] else f"{name} {row['input']}"
                low, high = row["ci95"]
                cells[row["kind"], column] = f"{row['score']:.2f} [{low:.2f}, {high:.2f}]"
                counts[row["kind"]] = row["n"]
    columns = ("default", "control", "documents", *(f"documents {name}" for name in CONTROLS[1:]))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        recipe = file.metadata()
    before, after = (json.loads(recipe[name]) for name in ("validation_before", "validation_after"))
    side = json.loads((folder / PREPARATION).read_text(encoding="utf-8"))["size"]["height"]
    text = CARD.format(
        rank=recipe["rank"],
        side=side,
        tokens=(side // VisionTowerConfig.for_architecture(**TOWER).patch_size) ** 2,
        peak=PEAK_RATE,
        mixture=", ".join(f"{share:.0%} {name}" for name, share in MIXTURE.items()),
        steps=recipe["steps"],
        chats=recipe["chats_per_step"],
        validation=", ".join(f"{name} {before[name]:.2f} -> {after[name]:.2f}" for name in after) + ".",
        constant=manifest()[TASK]["constant_reply"],
        table="\n".join(
            f"| {kind} | {n} | {' | '.join(cells[kind, column] for column in columns)} |" for kind, n in counts.items()
        ),
        verdict=VERDICT,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    shutil.copyfile(run / "scores.json", folder / "scores.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/documents"), help="folder of the state and the log")
    parser.add_argument("--steps", type=int, default=540, help="optimizer steps in all (540)")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (16)")
    parser.add_argument("--image-size", type=int, default=320, help="side in pixels that pages are scaled to (320)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--export", action="store_true", help="write what was learned into the package and stop")
    parser.add_argument("--evaluate", action="store_true", help="score what was learned, into the run's folder")
    parser.add_argument("--control", type=Path, help="with --export: the control's run; its scores join the model card")
    parser.add_argument("--limit", type=int, help="with --evaluate: ask so many questions, keep no scores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = arguments.out
    if arguments.export:
        export(out)
        if arguments.control:
            write_card(out, arguments.control)
    elif arguments.evaluate and arguments.limit:
        measure(out, arguments.limit)
    elif arguments.evaluate:
        scores_of(out)
    else:
        learner = learner_of(arguments.rank, arguments.image_size)
        out.mkdir(parents=True, exist_ok=True)
        learner.processor.image_processor.save_pretrained(out)
        recipe = {"mixture": MIXTURE, "pools": POOLS, "peak": PEAK_RATE}
        train(learner, out, arguments.steps, micros=1, init="default", **recipe)


if __name__ == "__main__":
    main()
