"""Train the model ``tiny`` from nothing: a CLIP tower, a projector and a Llama, 7M parameters, on drawn pictures.

    python scripts/train_tiny.py --out runs/tiny                 # goes on where it was stopped
    python scripts/train_tiny.py --out runs/tiny --export        # best weights so far -> mllm/weights/tiny
    python scripts/train_tiny.py --evaluate                      # held-out scores of those -> their model card

Trained end to end, such a model stays for hours on what questions alone are worth. The stages go round that:

0. *tower*: each visual token learns to say what is under it (colour, shape or character, place), read off the
   projector's output with the language model's own word embeddings. Looking up is then matching of embeddings.
1. *look up*: tower and projector frozen. Visual tokens are averaged over 4 x 4, later 2 x 2 patches, at the positions
   that they have in full, so that steps are many and short. Questions about a picture share its tokens and do not see
   each other. Queries and keys of the language model start equal: attention begins as matching, which is what looking
   up needs.
2. *joint*: everything is trained, on all 144 tokens.

Batch k depends on k alone: a run that was killed goes on from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mllm import puzzles
from mllm.drawn import COLORS, DRAWN, Sample, rng_for
from mllm.puzzles import COLUMNS, GLYPHS, PUZZLES, ROWS, SIDE, Picture

PATCH = 8
TILES = SIDE // PATCH  # 12 x 12 visual tokens
ROW_TOKENS = 512
IGNORED = -100
SOURCES: dict[str, Callable[..., Iterator[Sample]]] = PUZZLES | DRAWN
WEIGHTS = Path(__file__).parent.parent / "mllm" / "weights" / "tiny"

SPECIAL = (
    "<pad>",
    "<end>",
    "<user>",
    "<assistant>",
    "<system>",
    "<image>",
    "<picture>",
)  # the last one opens each picture
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<picture><image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] != 'user' %}{{ '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        name: of the log.
        steps: optimizer steps.
        rate: peak learning rate, reached after 50 steps; goes down as a cosine to ``last`` times it.
        mixture: share of the rows of each source.
        pools: side of the squares of patches that are averaged to one visual token; each sample draws one.
        dense: pictures with dense labels in each step, beside the questions.
        tower_rate: learning rate of tower and projector as a share of ``rate``; 0 freezes them.
        rows: rows of 512 tokens in a batch.
        early: tokens before an answer that are to say its first token already.
    """

    name: str
    steps: int
    rate: float
    mixture: dict[str, float] = field(default_factory=dict)
    pools: tuple[int, ...] = (1,)
    dense: int = 0
    tower_rate: float = 0.0
    rows: int = 5
    last: float = 0.1
    early: int = 0


_EASY = {"grids": 0.5, "characters": 0.2, "talk": 0.1, "album": 0.1, "spelling": 0.1, "words": 0.5}
_ALL = {"grids": 0.4, "characters": 0.14, "talk": 0.14, "album": 0.1, "leaflets": 0.16, "booklets": 0.14}
_ALL |= {"spelling": 0.18, "words": 0.5}
STAGES = (
    Stage("tower", 1800, 1e-3, dense=40, last=0.02),
    Stage("look up", 1350, 1e-3, _EASY, pools=(4,), last=0.8, early=3),
    Stage("joint", 1450, 8e-4, _ALL, pools=(1, 1, 2, 4), dense=16, tower_rate=0.6, rows=4, last=0.05, early=3),
)
#: texts are lost where their characters are averaged
_FINEST = {"spelling": 2, "leaflets": 2, "booklets": 2}
#: long documents are short where they are averaged, and take up the positions of all their tokens
_COARSEST = {"booklets": 2}


def pool_of(source: str, pool: int) -> int:
    """The pool of a sample: as fine as its source needs, as coarse as it can bear."""
    return max(min(pool, _FINEST.get(source, TILES)), _COARSEST.get(source, 1))


# --- the model --------------------------------------------------------------------------------------------------------


def build_tokenizer(size: int = 640) -> Any:
    """BPE on the words of our own questions; digits and capitals are single tokens, bytes stand in for the rest."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        text
        for name, samples in SOURCES.items()
        for sample in samples("train", 0, 400)
        for turn in sample.turns
        for text in (turn.question, turn.answer)
    ]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"\d|[A-Z](?![a-z])|[^\w\s▁]"), "isolated"),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    characters = ["▁", *map(chr, range(0x21, 0x7F))]
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=characters, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    order = sorted(learned["vocab"], key=learned["vocab"].get)
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *order]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=merges, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=[*SPECIAL[2:]],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_of(out: Path) -> Any:
    """The tokenizer of a run: made once, so that new kinds of questions do not change the ids of a run that goes on."""
    from transformers import AutoTokenizer

    folder = out / "tokenizer"
    if not folder.exists():
        build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def build_processor(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,  # the class token, which the strategy drops again
    )


def build_model(tokenizer: Any, seed: int = 0) -> Any:
    """The untrained model.

    Args:
        tokenizer: its tokenizer.
        seed: of the weights.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=192,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            initializer_range=0.06,  # about 1 / sqrt(hidden_size)
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=TILES**2,
        tie_word_embeddings=True,
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
            for linear in (attention.o_proj, layer.mlp.down_proj):
                linear.weight *= 0.3  # what 6 layers add starts no larger than what is there
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def pixel_values(images: list[Image.Image]) -> Tensor:
    """(I, 3, 96, 96), as the processor makes them."""
    pictures = [image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.BICUBIC) for image in images]
    array = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # (I, 96, 96, 3)
    return array.permute(0, 3, 1, 2).float() / 127.5 - 1


def tower_features(model: Any, pixels: Tensor) -> Tensor:
    """(I, 144, 192) what the projector is given."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


# --- stage 0: dense labels --------------------------------------------------------------------------------------------

NOTHING = len(GLYPHS)
NO_COLOR = len(COLORS)


def dense_labels(picture: Picture) -> Tensor:
    """(5, 144) long for each patch: glyph, colour, row and column of the grid, place in its word."""
    labels = np.zeros((5, TILES, TILES), dtype=np.int64)
    labels[0], labels[1] = NOTHING, NO_COLOR
    labels[2] = (np.arange(TILES) * 3 // TILES)[:, None]
    labels[3] = (np.arange(TILES) * 3 // TILES)[None]
    starts = np.arange(TILES) * PATCH
    for thing in picture.things:
        left, top, right, bottom = thing.box
        across = np.clip(np.minimum(right, starts + PATCH) - np.maximum(left, starts), 0, None)
        down = np.clip(np.minimum(bottom, starts + PATCH) - np.maximum(top, starts), 0, None)
        inside = down[:, None] * across[None] > 0.35 * PATCH**2
        for group, value in ((0, GLYPHS.index(thing.glyph)), (1, list(COLORS).index(thing.color)), (4, thing.order)):
            labels[group][inside] = value
    return torch.from_numpy(labels).flatten(1)


def dense_picture(rng: Any, split: str = "train") -> Picture:
    """A picture of any kind for the tower."""
    kind = rng.random()
    if kind < 0.25:
        return puzzles.shape_grid(split, rng)
    if kind < 0.6:
        return puzzles.character_grid(split, rng)
    if kind < 0.94:
        text, _ = puzzles.random_text(split, rng)
        return puzzles.reading_picture(split, rng, text)
    return puzzles.document(split, rng, (2,))[0][0]


class DenseHeads(nn.Module):
    """What each visual token shows, read off the projector with word embeddings, and off the tower with own layers."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()

        def ids(names: Any) -> Tensor:
            found = [tokenizer(name, add_special_tokens=False)["input_ids"][-1] for name in names]
            return torch.tensor(found)

        self.words = [ids(GLYPHS), ids(COLORS), ids(ROWS), ids(COLUMNS)]
        self.sizes = [NOTHING + 1, NO_COLOR + 1, TILES, TILES, 6]
        self.heads = nn.Linear(192, sum(self.sizes))

    def forward(self, model: Any, pixels: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
        """Loss, and per group the share of occupied patches that are right."""
        features = tower_features(model, pixels)  # (I, 144, 192)
        visual = model.model.multi_modal_projector(features).float()  # (I, 144, 256)
        table = model.get_input_embeddings().weight.detach()
        unit = F.rms_norm(visual, visual.shape[-1:])
        total = 0.02 * (visual.norm(dim=-1) - 2).square().mean()
        occupied = labels[:, 0] != NOTHING  # (I, 144)
        weight = torch.where(occupied, 1.0, 0.25)
        scores = []
        for group, words in enumerate(self.words):
            logits = unit @ table[words].T  # (I, 144, words)
            if group < 2:
                logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
            target = labels[:, group]
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(weight)
            total = total + (loss * weight).mean() * (1.0 if group < 2 else 0.3)
            scores.append((logits.argmax(-1) == target)[occupied].float().mean().item())
        places = torch.arange(TILES**2).expand(len(pixels), -1)
        fine = [labels[:, 0], labels[:, 1], places // TILES, places % TILES, labels[:, 4]]
        pieces = self.heads(features).float().split(self.sizes, dim=-1)
        for group, (piece, target) in enumerate(zip(pieces, fine, strict=True)):
            loss = F.cross_entropy(piece.flatten(0, 1), target.flatten(), reduction="none").view_as(weight)
            total = total + (loss * weight).mean() * (0.5, 0.5, 0.1, 0.1, 0.3)[group]
        scores.append((pieces[4].argmax(-1) == labels[:, 4])[occupied].float().mean().item())
        return total, scores


def dense_batch(seed: object, size: int, split: str = "train") -> tuple[Tensor, Tensor]:
    rng = rng_for("dense", split, seed)
    pictures = [dense_picture(rng, split) for _ in range(size)]
    return pixel_values([p.image for p in pictures]), torch.stack([dense_labels(p) for p in pictures])


# --- packed conversations ---------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """Conversations laid end to end into rows of tokens.

    Attributes:
        ids: (B, S) long; visual tokens hold the image token.
        positions: (B, S) long, as if each question stood alone behind its pictures.
        mask: (B, 1, S, S) bool, who sees whom: causal, within a conversation and its pictures.
        targets: (B, S) long, the token to say next, -100 where nothing is learned.
        images: pictures in the order of the visual tokens, with the pool of each.
        questions: for each question its kind and the (row, column) places that say its answer.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    images: list[Image.Image]
    pools: list[int]
    questions: list[tuple[str, list[tuple[int, int]]]]


class Packer:
    """Turns samples into :class:`Packed` batches."""

    def __init__(self, tokenizer: Any) -> None:
        self.image, self.picture, self.user, self.assistant, self.end = (
            tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "picture", "user", "assistant", "end")
        )
        self.words = lru_cache(maxsize=20000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )

    def sample(
        self, sample: Sample, pool: int, images: bool = True, chat: bool = False, early: int = 0
    ) -> tuple[list, ...]:
        """Ids, positions, segments, targets of a sample, and (kind, columns) of its questions.

        Segment 0 is seen by all that comes later: the pictures, and all of a chat. Other questions have one each.
        """
        ids, positions, segments, targets = [self.user], [0], [0], [IGNORED]
        place = 1
        questions = []
        for number, turn in enumerate(sample.turns):
            head = [self.user] if chat and number else []
            ids += head
            positions += range(place, place + len(head))
            segments += [0] * len(head)
            targets += [IGNORED] * len(head)
            place += len(head)
            for _ in sample.images if images and number == (sample.shown_at if chat else 0) else ():
                tiles = [(k * pool + pool // 2) for k in range(TILES // pool)]
                found = [place + 1 + row * TILES + column for row in tiles for column in tiles]
                ids += [self.picture] + [self.image] * len(found)
                positions += [place, *found]
                segments += [0] * (len(found) + 1)
                targets += [IGNORED] * (len(found) + 1)
                place += 1 + TILES**2
            question, answer = self.words(turn.question), self.words(turn.answer)
            new = [*question, self.assistant, *answer, self.end]
            first = len(ids) + len(question)
            ids += new
            positions += range(place, place + len(new))
            segments += [0 if chat else number + 1] * len(new)
            if chat:
                place += len(new)
            said = [*answer, self.end]
            hints = min(early, len(question))
            targets += [IGNORED] * (len(question) - hints) + said[:1] * hints + said + [IGNORED]
            questions.append((turn.kind, list(range(first, first + len(said)))))
        return ids, positions, segments, targets, questions

    def pack(
        self, samples: list[tuple[Sample, int]], images: bool = True, width: int = ROW_TOKENS, early: int = 0
    ) -> Packed:
        """Lay samples end to end, first fit; a sample longer than a row widens all rows."""
        parts = [self.sample(s, pool, images, s.source.startswith("talk"), early) for s, pool in samples]
        width = max(width, max(len(part[0]) for part in parts))
        rows: list[list[int]] = []
        room: list[int] = []
        for number, part in enumerate(parts):
            row = next((row for row, left in enumerate(room) if left >= len(part[0])), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(width)
            rows[row].append(number)
            room[row] -= len(part[0])
        ids, positions, owner, segment = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(4))
        targets = torch.full((len(rows), width), IGNORED)
        pictures, pools, questions = [], [], []
        for row, members in enumerate(rows):
            at = 0
            for number in members:
                part = parts[number]
                span = slice(at, at + len(part[0]))
                ids[row, span], positions[row, span] = torch.tensor(part[0]), torch.tensor(part[1])
                segment[row, span], targets[row, span] = torch.tensor(part[2]), torch.tensor(part[3])
                owner[row, span] = number + 1
                sample, pool = samples[number]
                if images:
                    pictures += sample.images
                    pools += [pool] * len(sample.images)
                questions += [(kind, [(row, at + column) for column in columns]) for kind, columns in part[4]]
                at += len(part[0])
        seen = (owner[:, :, None] == owner[:, None]) & (
            (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])
        )
        seen &= torch.ones(width, width, dtype=torch.bool).tril()
        return Packed(ids, positions, seen[:, None], targets, pictures, pools, questions)


def visual_tokens(model: Any, packed: Packed, frozen: bool) -> Tensor | None:
    """(visual tokens of all pictures, 256), averaged as each picture's pool says."""
    if not packed.images:
        return None
    with torch.set_grad_enabled(not frozen):
        features = tower_features(model, pixel_values(packed.images))
        visual = model.model.multi_modal_projector(features).float()  # (I, 144, 256)
    pieces = []
    for picture, pool in zip(visual, packed.pools, strict=True):
        if pool > 1:
            grid = picture.T.view(1, -1, TILES, TILES)
            picture = F.avg_pool2d(grid, pool).flatten(2)[0].T
        pieces.append(picture)
    return torch.cat(pieces)


def decode(model: Any, packed: Packed, visual: Tensor | None, picture: int) -> tuple[Tensor, Tensor]:
    """Logits (A, V) at the places that say answers, and their targets (A,), row by row.

    The layers of the stock model, with a mask of our own; the last one computes only those places.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

    text = model.model.language_model
    x = text.embed_tokens(packed.ids)  # (B, S, D)
    if visual is not None:
        x = x.masked_scatter((packed.ids == picture)[..., None], visual)
    cos, sin = text.rotary_emb(x, packed.positions)  # (B, S, head)
    size, _, width = x.shape
    head = text.config.head_dim
    chosen = packed.targets != IGNORED  # (B, S)
    longest = int(chosen.sum(dim=1).max())
    # columns of the answers, filled up with other columns
    columns = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :longest]  # (B, A)
    rows = torch.arange(size)[:, None]
    kept = chosen[rows, columns]  # (B, A)

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (-1, head)).transpose(1, 2)

    for number, layer in enumerate(text.layers):
        attention, last = layer.self_attn, number + 1 == len(text.layers)
        h = F.rms_norm(x, (width,), layer.input_layernorm.weight, text.config.rms_norm_eps)
        keys, values = heads(attention.k_proj(h)), heads(attention.v_proj(h))
        if not last:
            queries, keys = apply_rotary_pos_emb(heads(attention.q_proj(h)), keys, cos, sin)
            mask = packed.mask
        else:
            keys = keys * cos[:, None] + rotate_half(keys) * sin[:, None]
            h, x = h[rows, columns], x[rows, columns]
            queries = heads(attention.q_proj(h))
            queries = queries * cos[rows, columns][:, None] + rotate_half(queries) * sin[rows, columns][:, None]
            mask = packed.mask[rows, 0, columns][:, None]  # (B, 1, A, S)
        # rows of padding see nothing: what comes out of them is not used
        mixed = F.scaled_dot_product_attention(queries.to(values.dtype), keys.to(values.dtype), values, attn_mask=mask)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        h = F.rms_norm(x, (width,), layer.post_attention_layernorm.weight, text.config.rms_norm_eps)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    x = F.rms_norm(x[kept], (width,), text.norm.weight, text.config.rms_norm_eps)  # (A, D)
    return model.lm_head(x).float(), packed.targets[rows, columns][kept]


def make_batch(packer: Packer, stage: Stage, seed: object) -> Packed:
    """The rows of one step: samples of the mixture until they are full. A function of stage and seed alone."""
    rng = rng_for("mixture", stage.name, seed)
    left, samples = stage.rows * ROW_TOKENS, []
    while True:
        source = rng.choices(list(stage.mixture), list(stage.mixture.values()))[0]
        pool = pool_of(source, rng.choice(stage.pools))
        sample = next(SOURCES[source]("train", f"{stage.name}/{seed}/{len(samples)}", 1))
        left -= len(packer.sample(sample, pool)[0])
        if left < 0 and samples:
            return packer.pack(samples, early=stage.early)
        samples.append((sample, pool))


# --- training ---------------------------------------------------------------------------------------------------------


def autocast() -> Any:
    """bfloat16 products where this CPU computes in it; float32 elsewhere."""
    from mllm.loading import pick_dtype

    return torch.autocast("cpu", torch.bfloat16, enabled=pick_dtype("auto", torch.device("cpu")) is torch.bfloat16)


def rate_at(stage: Stage, step: int) -> float:
    """Learning rate of a step."""
    falling = stage.last + (1 - stage.last) * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
    return stage.rate * falling * min(1.0, (step + 1) / 50)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state so that a kill leaves the old or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def validate(model: Any, packer: Packer, stage: Stage, size: int, split: str = "train") -> dict[str, float]:
    """Accuracy per kind on a fixed set; by default of the training side, to choose among checkpoints."""
    found: dict[str, list[bool]] = {}
    for source in stage.mixture:
        pool = pool_of(source, stage.pools[0])
        samples = [(sample, pool) for sample in SOURCES[source](split, "validation", size)]
        for kind, rights in answer_all(model, packer, samples).items():
            found.setdefault(kind, []).extend(rights)
    return {kind: round(sum(rights) / len(rights), 3) for kind, rights in sorted(found.items())}


@torch.inference_mode()
def answer_all(
    model: Any,
    packer: Packer,
    samples: list[tuple[Sample, int]],
    images: bool = True,
    chunk: int = 24,
    exact: bool = False,
) -> dict[str, list[bool]]:
    """For each question, by kind, whether greedy generation would give exactly the expected answer.

    It would if, with the expected answer given, each of its tokens and the end are the most likely ones.
    ``exact`` computes in float32 everywhere.
    """
    found: dict[str, list[bool]] = {}
    picture = packer.image
    for start in range(0, len(samples), chunk):
        packed = packer.pack(samples[start : start + chunk], images)
        with nullcontext() if exact else autocast():
            logits, targets = decode(model, packed, visual_tokens(model, packed, True), picture)
        right = torch.zeros(packed.ids.shape, dtype=torch.bool)
        chosen = packed.targets != IGNORED
        right[chosen] = logits.argmax(-1) == targets
        for kind, places in packed.questions:
            found.setdefault(kind, []).append(all(bool(right[place]) for place in places))
    return found


class Run:
    """A training run: a folder with its state, its best weights and its log."""

    def __init__(
        self, out: Path, stages: tuple[Stage, ...], save_seconds: float = 60, check: int = 100, tokenizer: Any = None
    ) -> None:
        self.out, self.stages, self.save_seconds, self.check = out, stages, save_seconds, check
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = tokenizer or tokenizer_of(out)
        self.packer = Packer(self.tokenizer)
        self.model = build_model(self.tokenizer)
        self.heads = DenseHeads(self.model, self.tokenizer)
        self.stage, self.step, self.best, self.seconds = 0, 0, -1.0, 0.0
        self.optimizer_state: dict[str, Any] | None = None
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.stage, self.step, self.best, self.seconds = (state[k] for k in ("stage", "step", "best", "seconds"))
            self.optimizer_state = state["optimizer"]

    def parameters(self, stage: Stage) -> list[dict[str, Any]]:
        """Groups of what a stage trains, each with its share of the learning rate."""
        inner = self.model.model
        seeing = [*inner.vision_tower.parameters(), *inner.multi_modal_projector.parameters()]
        if not stage.mixture:
            return [{"params": [*seeing, *self.heads.parameters()], "share": 1.0}]
        groups = [{"params": list(inner.language_model.parameters()), "share": 1.0}]
        if stage.tower_rate:
            groups.append({"params": [*seeing, *self.heads.parameters()], "share": stage.tower_rate})
        return groups

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict(), "stage": self.stage}
        state |= {"step": self.step, "best": self.best, "seconds": self.seconds}
        save_state(self.out / "state.pt", state | {"optimizer": optimizer and optimizer.state_dict()})

    def loss(self, stage: Stage) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the current step, and what the log says about it."""
        if not stage.mixture:
            pixels, labels = dense_batch(self.step, stage.dense)
            with autocast():
                loss, scores = self.heads(self.model, pixels, labels)
            return loss, {"dense": [round(score, 3) for score in scores]}
        packed = make_batch(self.packer, stage, self.step)
        with autocast():
            visual = visual_tokens(self.model, packed, frozen=not stage.tower_rate)
            logits, targets = decode(self.model, packed, visual, self.packer.image)
        loss = F.cross_entropy(logits, targets)
        told = {"answers": round(loss.item(), 4), "questions": len(packed.questions), "tokens": packed.ids.numel()}
        if stage.dense:
            pixels, labels = dense_batch(f"{stage.name}/{self.step}", stage.dense)
            with autocast():
                dense, scores = self.heads(self.model, pixels, labels)
            loss = loss + 0.5 * dense
            told["dense"] = [round(score, 3) for score in scores]
        return loss, told

    def run(self, seconds: float = math.inf) -> None:
        """Train to the end, or for some seconds."""
        begun, saved = time.monotonic(), time.monotonic()
        before = self.seconds
        with (self.out / "log.jsonl").open("a") as log:

            def note(**row: Any) -> None:
                log.write(json.dumps({"stage": self.stages[self.stage].name, "step": self.step} | row) + "\n")
                log.flush()

            while self.stage < len(self.stages):
                stage = self.stages[self.stage]
                groups = self.parameters(stage)
                self.model.requires_grad_(False)
                for group in groups:
                    for parameter in group["params"]:
                        parameter.requires_grad_(True)
                optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
                if self.optimizer_state is not None:
                    optimizer.load_state_dict(self.optimizer_state)
                    self.optimizer_state = None
                while self.step < stage.steps:
                    for group in optimizer.param_groups:
                        group["lr"] = rate_at(stage, self.step) * group["share"]
                    loss, told = self.loss(stage)
                    loss.backward()
                    for group in groups:
                        nn.utils.clip_grad_norm_(group["params"], 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    self.step += 1
                    now = time.monotonic()
                    self.seconds = before + now - begun
                    note(loss=round(loss.item(), 4), seconds=round(self.seconds, 1), **told)
                    if stage.mixture and (self.step % self.check == 0 or self.step == stage.steps):
                        scores = validate(self.model, self.packer, stage, 16)
                        mean = sum(scores.values()) / len(scores)
                        note(validation=round(mean, 4), kinds=scores)
                        if stage.pools[0] == 1 and mean > self.best:
                            self.best = mean
                            save_state(self.out / "best.pt", {"model": self.model.state_dict(), "step": self.step})
                    if now - saved > self.save_seconds:
                        self.save(optimizer)
                        saved = now
                    if now - begun > seconds:
                        self.save(optimizer)
                        return
                self.stage, self.step = self.stage + 1, 0
                self.save(None)


# --- what comes out ---------------------------------------------------------------------------------------------------


def export(out: Path, folder: Path = WEIGHTS) -> None:
    """Write the best weights of a run, or its last ones where none were validated in full, as a 16-bit model folder."""
    best = out / "best.pt"
    state = torch.load(best if best.exists() else out / "state.pt", weights_only=True)
    tokenizer = tokenizer_of(out)
    model = build_model(tokenizer)
    model.load_state_dict(state["model"])
    model.half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    curve(out / "log.jsonl", folder / "loss.png")


def curve(log: Path, picture: Path) -> None:
    """Draw the loss of answers over the steps of the later stages, and the validation accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(6, 3), dpi=100)
    right = axes.twinx()
    offset, seen = 0, 0
    for stage in STAGES[1:]:
        own = {("validation" in row, row["step"]): row for row in rows if row["stage"] == stage.name}  # resumed: once
        losses = {step: row.get("answers", row["loss"]) for (check, step), row in own.items() if not check}
        steps, values = list(losses), list(losses.values())
        smooth = [sum(values[max(0, k - 20) : k + 1]) / len(values[max(0, k - 20) : k + 1]) for k in range(len(values))]
        axes.plot([offset + step for step in steps], smooth, color=f"C{seen}", label=stage.name)
        checks = [(offset + step, row["validation"]) for (check, step), row in own.items() if check]
        if checks:
            right.plot(*zip(*checks, strict=True), "o--", color=f"C{seen}", markersize=3)
        offset, seen = offset + max(steps, default=0), seen + 1
    axes.set(xlabel="step", ylabel="answer token loss", ylim=(0, 1.2))
    right.set(ylabel="validation accuracy (dots)", ylim=(0, 1))
    axes.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def shuffled(samples: list[Sample]) -> list[Sample]:
    """The same questions, with the pictures of another sample that has as many."""
    from dataclasses import replace

    by_count: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        by_count.setdefault(len(sample.images), []).append(number)
    mixed = list(samples)
    for members in by_count.values():
        for place, number in enumerate(members):
            other = members[(place + 1) % len(members)]
            mixed[number] = replace(samples[number], images=samples[other].images)
    return mixed


def evaluate(model: Any, tokenizer: Any, size: int, seed: object = 7, sources: tuple[str, ...] = ()) -> dict[str, Any]:
    """Held-out accuracy per kind: (right, of) with the picture, with another sample's, and without one."""
    packer = Packer(tokenizer)
    scores: dict[str, dict[str, list[int]]] = {}
    for source in sources or tuple(PUZZLES):
        samples = list(SOURCES[source]("test", seed, size))
        inputs = {"picture": (samples, True), "shuffled": (shuffled(samples), True), "none": (samples, False)}
        for control, (shown, images) in inputs.items():
            if control != "picture" and source == "words":
                continue
            for kind, rights in answer_all(model, packer, [(s, 1) for s in shown], images, exact=True).items():
                cell = scores.setdefault(kind, {}).setdefault(control, [0, 0])
                cell[0] += sum(rights)
                cell[1] += len(rights)
    return scores


def write_card(model: Any, tokenizer: Any, size: int, sources: tuple[str, ...] = (), folder: Path = WEIGHTS) -> None:
    """Score the committed weights and write the table into their model card, between its two marks."""
    from mllm.eval.stats import wilson

    scores = evaluate(model, tokenizer, size, sources=sources)
    lines = ["| question | n | chance | with the picture | another picture | no picture |", "|---|---|---|---|---|---|"]
    for kind in puzzles.CHANCE:
        if kind not in scores:
            continue
        cells = []
        for control in ("picture", "shuffled", "none"):
            right, of = scores[kind].get(control, (0, 0))
            low, high = wilson(right, of) if of else (0, 0)
            cells.append(f"{100 * right / of:.0f} % ({100 * low:.0f} to {100 * high:.0f})" if of else "")
        row = (kind, scores[kind]["picture"][1], f"{100 * puzzles.CHANCE[kind]:.0f} %", *cells)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    before, mark, rest = text.partition("<!-- scores -->\n")
    _, other, after = rest.partition("<!-- end of scores -->\n")
    card.write_text(before + mark + "\n".join(lines) + "\n" + other + after, encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


#: a few steps of everything
SMOKE = (
    Stage("tower", 3, 1e-3, dense=4),
    Stage("look up", 3, 1e-3, _EASY, pools=(4,), rows=1),
    Stage("joint", 3, 3e-4, {"grids": 1.0}, dense=4, tower_rate=0.5, rows=1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the training state and log")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; again goes on")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--export", action="store_true", help="write the best weights into the package and stop")
    parser.add_argument("--evaluate", type=int, nargs="?", const=200, help="held-out samples per source; into the card")
    parser.add_argument("--sources", default="", help="what to evaluate, with commas: grids,words; everything without")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments.out)
    elif arguments.evaluate:
        from mllm.loading import load

        model, processor = load("tiny", dtype="float32", device="cpu")
        write_card(model, processor.tokenizer, arguments.evaluate, tuple(filter(None, arguments.sources.split(","))))
    elif arguments.smoke:
        Run(arguments.out, SMOKE, save_seconds=0).run(arguments.seconds)
    else:
        Run(arguments.out, STAGES).run(arguments.seconds)


if __name__ == "__main__":
    main()
