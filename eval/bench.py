"""What the clock says to what the FLOPs promise: techniques at real shapes, against the plain model and an oracle.

Weights are random, the decoder's shape is real, visual features are random and handed over encoded, so that only the
decoder is timed. In each round all settings run in turn on the same numbers, and ratios are taken within the round:

* ``speed-up``: time of the plain model over the technique's;
* ``predicted``: the same ratio of FLOPs (:mod:`mllm.cost`);
* ``oracle``: time of the plain model over that of stock decoder layers in a bare loop on the rows that the technique
  leaves in each layer, cut once by hand, without hooks, layouts, masks or bookkeeping: what the machine can give.

A technique that does not lose anything has ``realised_over_oracle`` = 1. Where cached keys of an image are used again,
the oracle is the plain model on the text alone; techniques that change what is attended to (MMA) or add work (LoRRA)
have none, and are compared with the prediction.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.adapters import LoRRA, ModalityMutualAttention
from mllm.cost import ARCHITECTURES, LayerWork, ModelSpec
from mllm.errors import ConfigError
from mllm.eval.results import environment, write_json
from mllm.loading import pick_device, pick_dtype
from mllm.roles import ChatFormat
from mllm.technique import Stack, VisualPolicy
from mllm.timing import PeakMemory, synchronize
from mllm.token_pruning import EEMLLM, DyVTE, FreezeVisual, NAAViT, URaG
from mllm.versions import CACHE

_IMAGE, _USER, _ASSISTANT, _VOCABULARY = 5, 6, 7, 1000
_CHAT = ChatFormat(((_USER,),), ((_ASSISTANT,),))
_RESAMPLES = 1000


def _nothing(layers: int) -> Stack:
    return Stack()


def _exit_half(layers: int) -> Stack:
    return Stack(DyVTE(exit_layer=layers // 2 - 1))


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        stack: for a number of layers.
        bare: the stack whose rows the oracle runs; ``stack`` without, or None for no oracle.
        pages: blocks into which the visual tokens are split.
        text_only: whether the oracle is the plain model on the text alone.
    """

    stack: Callable[[int], Stack]
    bare: Callable[[int], Stack] | None = None
    pages: int = 1
    text_only: bool = False


def _same(stack: Callable[[int], Stack]) -> Setting:
    return Setting(stack, stack)


#: settings by name
SETTINGS: dict[str, Setting] = {
    "neutral": Setting(lambda layers: Stack(DyVTE(exit_layer=layers - 1)), _nothing),
    "exit_half": _same(_exit_half),
    # one gate is asked, and lets go
    "learned_exit": Setting(
        lambda layers: Stack(DyVTE(gate="light", candidate_layers=[layers // 2 - 1], threshold=0.0)), _exit_half
    ),
    # the gate of every layer is asked, and none lets go: what gates cost
    "gates_only": Setting(lambda layers: Stack(DyVTE(gate="light", threshold=1.0)), _nothing),
    "freeze_all": _same(lambda layers: Stack(FreezeVisual())),
    "naavit_all": _same(lambda layers: Stack(NAAViT())),
    "ee_all": _same(lambda layers: Stack(EEMLLM())),
    "naavit_exit": _same(lambda layers: Stack(NAAViT(), DyVTE(exit_layer=layers // 2 - 1))),
    "naavit_reuse": Setting(lambda layers: Stack(NAAViT(image_cache=1)), text_only=True),
    "urag_20_to_5": Setting(lambda layers: Stack(URaG(layer=max(1, layers // 4))), _nothing, pages=20),
    "mma": Setting(lambda layers: Stack(ModalityMutualAttention())),
    "lorra": Setting(lambda layers: Stack(LoRRA(router_length=1 << 17))),
}


@dataclass
class Row:
    """One setting at one size; times in milliseconds, medians over the rounds.

    Attributes:
        arch, layers, attn, dtype, device: what ran; ``layers`` may be fewer than the architecture has.
        setting: name of the setting.
        phase: ``"prefill"`` or ``"decode"`` (one token).
        visual_tokens, text_tokens, batch: the prompt.
        plain_ms, technique_ms, oracle_ms: medians.
        speedup, oracle, predicted: ratios to the plain model.
        realised_over_oracle, realised_over_predicted: with 95 % bootstrap intervals of the median over rounds.
        kv_bytes, dense_kv_bytes, peak_bytes, dense_peak_bytes: after a prefill, and at most during it.
        rounds: timed rounds.
        note: what was adapted to this machine, or why there are no times.
    """

    arch: str
    layers: int
    attn: str
    dtype: str
    device: str
    setting: str
    phase: str
    visual_tokens: int
    text_tokens: int
    batch: int
    plain_ms: float | None = None
    technique_ms: float | None = None
    oracle_ms: float | None = None
    speedup: float | None = None
    oracle: float | None = None
    predicted: float | None = None
    realised_over_oracle: float | None = None
    realised_over_oracle_ci95: list[float] = field(default_factory=list)
    realised_over_predicted: float | None = None
    realised_over_predicted_ci95: list[float] = field(default_factory=list)
    kv_bytes: int | None = None
    dense_kv_bytes: int | None = None
    peak_bytes: int | None = None
    dense_peak_bytes: int | None = None
    rounds: int = 0
    note: str = ""


# --- model and prompt -------------------------------------------------------------------------------------------------


def build_model(spec: ModelSpec, layers: int, attn: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A LLaVA with random weights, a decoder of this shape and a vision tower that is never run."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=8
        ),
        text_config=LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=spec.hidden,
            intermediate_size=spec.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=1 << 17,
        ),
        image_token_index=_IMAGE,
    )
    config._attn_implementation = attn
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def prompt(model: nn.Module, visual: int, text: int, batch: int, pages: int = 1, seed: int = 0) -> dict[str, Any]:
    """Inputs of the multimodal base model: a user turn with ``visual`` tokens in its middle, and the answer's header.

    Args:
        model: from :func:`build_model`.
        visual: visual tokens, at least one a page; 0 for text alone.
        text: text tokens; between two pages stands one of them.
        batch: prompts.
        pages: blocks of visual tokens.
        seed: of tokens and features.
    """
    weight = model.lm_head.weight
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, _VOCABULARY, (batch, text + visual), generator=generator)  # (B, S)
    ids[:, 0], ids[:, -1] = _USER, _ASSISTANT
    if not visual:
        return {"input_ids": ids.to(weight.device)}
    sizes = [visual // pages + (number < visual % pages) for number in range(pages)]
    place = (text - pages + 1) // 2
    for size in sizes:
        ids[:, place : place + size] = _IMAGE
        place += size + 1
    features = torch.randn(batch, visual, weight.shape[1], generator=generator) * 0.02
    features = features.to(weight.device, weight.dtype)
    pictures = tuple(picture for row in features for picture in row.split(sizes))
    return {
        "input_ids": ids.to(weight.device),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pictures)},
    }


# --- the oracle -------------------------------------------------------------------------------------------------------


def _bare_policy(
    layer: nn.Module, policy: VisualPolicy, text: Tensor, visual: Tensor, start: int, rotary: tuple, cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """A decoder layer in which visual rows only offer keys and values, by hand for one image behind ``start`` rows."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, batch, size = layer.self_attn, text.shape[0], visual.shape[1]
    cos, sin = rotary
    split = (start, start + size)

    def heads(states: Tensor) -> Tensor:
        return states.view(batch, states.shape[1], -1, attention.head_dim).transpose(1, 2)

    normed, normed_visual = layer.input_layernorm(text), layer.input_layernorm(visual)
    keys = [heads(attention.k_proj(rows)) for rows in (normed[:, :start], normed_visual, normed[:, start:])]
    values = [heads(attention.v_proj(rows)) for rows in (normed[:, :start], normed_visual, normed[:, start:])]
    keys, values = torch.cat(keys, dim=2), torch.cat(values, dim=2)  # (B, kv_heads, S, head_dim)
    _, keys = apply_rotary_pos_emb(keys[:, :, :1], keys, cos, sin)
    queries = heads(attention.q_proj(normed))  # (B, heads, T, head_dim)
    text_cos, text_sin = (torch.cat([t[:, : split[0]], t[:, split[1] :]], dim=1) for t in rotary)
    queries, _ = apply_rotary_pos_emb(queries, queries[:, :, :1], text_cos, text_sin)
    keys, values = cache.update(keys, values, attention.layer_idx)
    sdpa = nn.functional.scaled_dot_product_attention
    grouped = attention.num_key_value_groups
    all_keys, all_values = (rows.repeat_interleave(grouped, dim=1) for rows in (keys, values))
    first = sdpa(queries[:, :, :start], all_keys[:, :, :start], all_values[:, :, :start], is_causal=True)
    rest = queries.shape[2] - start
    mask = torch.ones(rest, keys.shape[2], dtype=torch.bool, device=text.device).tril(keys.shape[2] - rest)
    second = sdpa(queries[:, :, start:], all_keys, all_values, attn_mask=mask)
    out = torch.cat([first, second], dim=2).transpose(1, 2).flatten(2)  # (B, T, heads * head_dim)
    text = text + attention.o_proj(out)
    text = text + layer.mlp(layer.post_attention_layernorm(text))
    if policy.own_value:
        own = values[:, :, split[0] : split[1]].repeat_interleave(grouped, dim=1)
        visual = visual + attention.o_proj(own.transpose(1, 2).flatten(2))
    if policy.ffn:
        visual = visual + layer.mlp(layer.post_attention_layernorm(visual))
    return text, visual


def oracle_prefill(
    model: nn.Module, stack: Stack, inputs: dict[str, Any], dropped: tuple[int, Tensor] | None = None
) -> DynamicCache:
    """The stack's work in a bare loop over the model's own layers; returns the cache.

    Args:
        model: from :func:`build_model`.
        stack: fixed exits and policies of visual rows.
        inputs: from :func:`prompt`.
        dropped: a layer, and the (N,) columns that still run it and those behind it.
    """
    text_model, spec = model.model.language_model, ModelSpec.from_config(model.config.text_config)
    ids = inputs["input_ids"]
    visual = (ids[0] == _IMAGE).nonzero()[:, 0]  # (V,)
    features = torch.cat(inputs["mm_encoder_outputs"]["image"].pooler_output).view(len(ids), len(visual), -1)
    hidden = text_model.embed_tokens(ids).index_copy(1, visual, features)  # (B, S, D)
    rotary = text_model.rotary_emb(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
    cache = DynamicCache(config=model.config)
    last = stack.last_visual_layer(spec)
    text = (ids[0] != _IMAGE).nonzero()[:, 0]  # (T,)
    start, apart = int(visual[0]), None  # (B, V, D) visual rows, while they travel apart
    whole, tables = rotary, rotary
    for number, layer in enumerate(text_model.layers):
        policy = stack.visual_policy(number, spec) if number <= last else None
        if policy is not None:
            if apart is None:
                apart, hidden = hidden[:, visual], hidden[:, text]
            hidden, apart = _bare_policy(layer, policy, hidden, apart, start, whole, cache)
            continue
        if apart is not None:
            if number <= last:
                hidden = torch.cat([hidden[:, :start], apart, hidden[:, start:]], dim=1)
            else:
                tables = tuple(table[:, text] for table in rotary)
            apart = None
        elif number == last + 1:
            hidden, tables = hidden[:, text], tuple(table[:, text] for table in rotary)
        elif dropped is not None and number == dropped[0]:
            hidden, tables = hidden[:, dropped[1]], tuple(table[:, dropped[1]] for table in rotary)
        hidden = layer(hidden, attention_mask=None, position_embeddings=tables, use_cache=True, **{CACHE: cache})
    text_model.norm(hidden)
    return cache


def _dropped(stack: Stack, spec: ModelSpec, ids: Tensor, outputs: dict[str, Any]) -> tuple[int, Tensor] | None:
    """Where URaG dropped pages, and the columns that stayed in the first row."""
    if "URaG" not in outputs:
        return None
    (urag,) = stack.techniques
    kept = torch.tensor(outputs["URaG"]["kept"][0], device=ids.device)
    visual = ids[0] == _IMAGE
    page = (visual & ~visual.roll(1)).cumsum(dim=0) - 1  # (S,)
    stay = ~visual | torch.isin(page, kept)
    return urag.first_visual_layer(spec), stay.nonzero()[:, 0]


def oracle_step(model: nn.Module, token: Tensor, position: int, cache: DynamicCache) -> None:
    """One further token through the model's own layers on a cache whose layers differ in length."""
    text_model = model.model.language_model
    hidden = text_model.embed_tokens(token)  # (B, 1, D)
    rotary = text_model.rotary_emb(hidden, torch.tensor([[position]], device=hidden.device))
    for layer in text_model.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, use_cache=True, **{CACHE: cache})
    text_model.norm(hidden)


# --- measuring --------------------------------------------------------------------------------------------------------


def _timed(device: torch.device, call: Callable[[], Any]) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def _interval(ratios: Sequence[float]) -> list[float]:
    """95 % bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return [medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]]


def _fill(row: Row, plain: list[float], technique: list[float], oracle: list[float]) -> None:
    row.rounds = len(plain)
    row.plain_ms, row.technique_ms = statistics.median(plain), statistics.median(technique)
    speedups = [a / b for a, b in zip(plain, technique, strict=True)]
    row.speedup = statistics.median(speedups)
    if oracle:
        row.oracle_ms = statistics.median(oracle)
        row.oracle = statistics.median(a / b for a, b in zip(plain, oracle, strict=True))
        ratios = [a / b for a, b in zip(oracle, technique, strict=True)]
        row.realised_over_oracle, row.realised_over_oracle_ci95 = statistics.median(ratios), _interval(ratios)
    if row.predicted is not None:
        ratios = [speedup / row.predicted for speedup in speedups]
        row.realised_over_predicted, row.realised_over_predicted_ci95 = statistics.median(ratios), _interval(ratios)


def measure_size(
    model: nn.Module, arch: str, visual: int, text: int, batch: int, settings: Sequence[str], rounds: int, note: str
) -> list[Row]:
    """All settings at one size, prefill and decode."""
    base, device = model.model, model.lm_head.weight.device
    layers = model.config.text_config.num_hidden_layers
    spec = ModelSpec.from_config(model.config.text_config)
    token = torch.full((batch, 1), 20, device=device)
    common = (arch, layers, model.config._attn_implementation, str(model.dtype).removeprefix("torch."), device.type)
    memory = PeakMemory(device)
    text_inputs = prompt(model, 0, text, batch)
    rows: list[Row] = []

    def run(given: dict[str, Any]) -> Any:
        encoded = given.get("mm_encoder_outputs")
        more = {} if encoded is None else {"mm_encoder_outputs": dict(encoded)}
        return base(**{**given, **more}, use_cache=True)

    def step(cache: DynamicCache) -> Any:
        return base(input_ids=token, use_cache=True, **{CACHE: cache})

    def peak(call: Callable[[], Any]) -> int | None:
        memory.reset()
        call()
        return memory.read()

    for name in settings:
        setting = SETTINGS[name]
        stack = setting.stack(layers)
        inputs = prompt(model, visual, text, batch, setting.pages)
        run(inputs)  # warm up
        prefill = Row(*common, name, "prefill", visual, text, batch, note=note)
        decode = Row(*common, name, "decode", visual, text, batch, note=note)
        prefill.dense_peak_bytes = peak(lambda inputs=inputs: run(inputs))
        handle = stack.attach(model, _CHAT)
        run(inputs)  # warm up; also fills the image cache where there is one
        handle.run.reset()
        cache = run(inputs)[CACHE]
        report = handle.run.report()
        prefill.predicted = report.dense_flops / report.flops
        prefill.kv_bytes, prefill.dense_kv_bytes = report.kv_bytes, report.dense_kv_bytes
        if len(report.cache_lengths) == spec.layers:  # else a branch does further work, which is not predicted
            decode.predicted = _decode_prediction(spec, report.cache_lengths, batch, visual + text)
        prefill.peak_bytes = peak(lambda inputs=inputs: run(inputs))
        dropped = _dropped(stack, spec, inputs["input_ids"], handle.run.outputs)
        handle.detach()
        oracle_of: Callable[[], Any] | None = None
        if setting.text_only:
            oracle_of = partial(run, text_inputs)
        elif setting.bare is not None and (batch == 1 or dropped is None):  # rows choose different pages
            oracle_of = partial(oracle_prefill, model, setting.bare(layers), inputs, dropped)
        plain, technique, oracle = [], [], []
        for _ in range(rounds):
            plain.append(_timed(device, partial(run, inputs)))
            handle = _reattach(handle, stack, model)
            technique.append(_timed(device, partial(run, inputs)))
            handle.detach()
            if oracle_of is not None:
                oracle.append(_timed(device, oracle_of))
        _fill(prefill, plain, technique, oracle)
        dense = run(inputs)[CACHE]
        bare = oracle_of() if oracle_of is not None and not setting.text_only else None
        plain, technique, oracle = [], [], []
        for number in range(4 * rounds + 2):
            times = [_timed(device, partial(step, dense))]
            handle = _reattach(handle, stack, model)
            times.append(_timed(device, partial(step, cache)))
            handle.detach()
            if bare is not None:
                place = visual + text + number
                times.append(_timed(device, partial(oracle_step, model, token, place, bare)))
            if number >= 2:  # the first ones grow the caches
                for values, value in zip((plain, technique, oracle), times, strict=False):
                    values.append(value)
        _fill(decode, plain, technique, oracle)
        rows += [prefill, decode]
    return rows


def _reattach(handle: Any, stack: Stack, model: nn.Module) -> Any:
    """Attach again, with what the handle kept of images."""
    kept = handle.run.image_cache
    handle = stack.attach(model, _CHAT)
    handle.run.image_cache = kept
    return handle


def _decode_prediction(spec: ModelSpec, lengths: list[int], batch: int, dense: int) -> float:
    """FLOPs of one further token on the plain model over those on caches of these lengths."""
    plain = LayerWork(batch, batch * (dense + 1)).flops(spec) * spec.layers
    return plain / sum(LayerWork(batch, batch * (length + 1)).flops(spec) for length in lengths[: spec.layers])


# --- what fits --------------------------------------------------------------------------------------------------------


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    a @ a
    return 2 * 2048**3 / min(_timed(device, lambda: a @ a) for _ in range(3)) * 1e3


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = Path("/proc/meminfo")
    if memory.exists():
        for line in memory.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30


def _layers_that_fit(spec: ModelSpec, element: int, length: int, free: int) -> int:
    """Decoder layers whose weights and caches (three at a time) take at most two thirds of the free memory."""
    per_layer = element * (
        2 * spec.hidden * (spec.q_width + spec.kv_width)
        + 3 * spec.hidden * spec.intermediate
        + 3 * 2 * length * spec.kv_width
    )
    working = element * length * (4 * spec.hidden + 3 * spec.intermediate)
    return min(spec.layers, int((free * 2 / 3 - working) // per_layer))


def run_bench(
    out: str | Path,
    architectures: Sequence[str],
    visual_tokens: Sequence[int] = (576, 2880, 10000),
    batches: Sequence[int] = (1, 8),
    text_tokens: int = 64,
    settings: Sequence[str] = tuple(SETTINGS),
    rounds: int = 7,
    seconds: float = 300.0,
    layers: int | None = None,
    attn: str = "sdpa",
    dtype: str = "auto",
    device: str = "auto",
) -> list[Row]:
    """Measure and write ``bench.json``, ``bench.md`` and ``bench.png`` into ``out``.

    Args:
        out: folder.
        architectures: names of :data:`mllm.cost.ARCHITECTURES`.
        visual_tokens, batches: sizes; every pair is one cell.
        text_tokens: per prompt.
        settings: names of :data:`SETTINGS`.
        rounds: timed rounds a setting.
        seconds: a cell that is expected to take longer is left out, and says so.
        layers: decoder layers at most; fewer are used where memory forbids, and the rows say so.
        attn, dtype, device: see :func:`mllm.load`.

    Raises:
        ConfigError: an unknown architecture or setting, or a size that is too small.
    """
    for name, known in (*((a, ARCHITECTURES) for a in architectures), *((s, SETTINGS) for s in settings)):
        if name not in known:
            raise ConfigError(f"{name!r} is not one of: {', '.join(known)}.")
    if min(*visual_tokens, *batches, rounds, text_tokens, layers or 4) < 1 or (layers or 4) < 4 or text_tokens < 22:
        raise ConfigError(
            f"visual_tokens {list(visual_tokens)}, batches {list(batches)}, rounds {rounds}, text_tokens {text_tokens} "
            f"and layers {layers}: at least 1, 1, 1, 22 (they stand between 20 pages) and 4 are needed."
        )
    if small := [size for size in visual_tokens if size < max(SETTINGS[name].pages for name in settings)]:
        raise ConfigError(f"{small[0]} visual tokens do not fill the pages of {', '.join(settings)}. Give more.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    target = pick_device(device)
    number = pick_dtype(dtype, target)
    speed = _speed(target, number)
    rows: list[Row] = []
    cells = [(arch, batch, visual) for arch in architectures for batch in batches for visual in sorted(visual_tokens)]
    model, built = None, None
    with torch.inference_mode(), tqdm(cells, desc="bench", file=sys.stderr) as bar:
        for arch, batch, visual in bar:
            bar.set_postfix_str(f"{arch}, batch {batch}, {visual} visual tokens")
            spec = ARCHITECTURES[arch]
            length = batch * (visual + text_tokens)
            if built is not None and built[0] != arch:
                model = built = None  # before the free memory is looked at
            free = _free_bytes(target) + (0 if model is None else sum(p.nbytes for p in model.parameters()))
            use = min(layers or spec.layers, _layers_that_fit(spec, number.itemsize, length, free))
            common = (arch, use, attn, str(number).removeprefix("torch."), target.type)
            dense = LayerWork(length, length * (visual + text_tokens)).flops(spec) * max(use, 0)
            expected = dense / speed * (4 + rounds * 2.5) * len(settings)
            if use < 4 or expected > seconds:
                why = (
                    "not enough memory for 4 layers"
                    if use < 4
                    else f"left out: about {expected:.0f} s expected on this machine, more than {seconds:.0f}"
                )
                rows += [Row(*common, name, "prefill", visual, text_tokens, batch, note=why) for name in settings]
                continue
            note = "" if use == spec.layers else f"{use} of {spec.layers} layers"
            if built != (arch, use):
                model = None
                model, built = build_model(spec, use, attn, number, target), (arch, use)
            rows += measure_size(model, arch, visual, text_tokens, batch, settings, rounds, note)
            write_json(out / "bench.json", _document(rows, speed))  # what stands if it is stopped
    write_json(out / "bench.json", _document(rows, speed))
    (out / "bench.md").write_text(table(rows), encoding="utf-8")
    draw(rows, out / "bench.png")
    return rows


def _document(rows: list[Row], speed: float) -> dict[str, Any]:
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "matmul_gflops": round(speed / 1e9, 1),
        },
        "env": environment(),
        "rows": [asdict(row) for row in rows],
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""

    def ratio(value: float | None, spread: list[float] = ()) -> str:
        if value is None:
            return "-"
        return f"{value:.2f}" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else "")

    lines = [
        "| model | batch | visual | phase | setting | plain ms | speed-up | predicted | oracle | realised / oracle | "
        "realised / predicted | KV | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = "-" if row.plain_ms is None else f"{row.plain_ms:.1f}"
        cache = f"{row.kv_bytes / row.dense_kv_bytes:.2f}x" if row.dense_kv_bytes else "-"
        lines.append(
            f"| {row.arch} | {row.batch} | {row.visual_tokens} | {row.phase} | {row.setting} | {plain} | "
            f"{ratio(row.speedup)} | {ratio(row.predicted)} | {ratio(row.oracle)} | "
            f"{ratio(row.realised_over_oracle, row.realised_over_oracle_ci95)} | "
            f"{ratio(row.realised_over_predicted, row.realised_over_predicted_ci95)} | {cache} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Realised against predicted speed-up of the prefill, a mark a setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.phase == "prefill" and row.speedup is not None]
    figure, axes = plt.subplots(figsize=(5.5, 5), dpi=130)
    top = max([2.0, *(max(row.speedup, row.predicted) for row in shown)]) * 1.05
    axes.plot([0.8, top], [0.8, top], color="#999999", linewidth=1, label="as predicted")
    marks, colors = "osD^vP*X", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
    for number, setting in enumerate(dict.fromkeys(row.setting for row in shown)):
        own = [row for row in shown if row.setting == setting]
        axes.scatter(
            [row.predicted for row in own],
            [row.speedup for row in own],
            marker=marks[number % len(marks)],
            color=colors[number % len(colors)],
            s=26,
            label=setting,
        )
    axes.set(xlabel="predicted from FLOPs", ylabel="measured", title="Speed-up of the prefill")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a ``bench.json``."""
    return [Row(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]]
