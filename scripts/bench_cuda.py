"""One run on a GPU: are the techniques right on its attention kernels, and what do they gain at 7B shape?

    python scripts/bench_cuda.py --out benchmarks/cuda            # about 8 minutes on one H100-class GPU
    python scripts/bench_cuda.py --dry-run --out runs/cuda        # the same at a toy size, on a CPU too

Needs torch, transformers and this package; builds and downloads nothing. Random weights. Correctness: every setting of
``mllm bench``, in float32 and bfloat16, on each kernel that SDPA has here, against eager attention in float32; the
plain model's own error stands beside it. The last lines are a short table; ``correctness.json`` and ``bench.json`` are
written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mllm.cost import ARCHITECTURES, ModelSpec
from mllm.errors import MllmError
from mllm.eval.bench import Row, run_bench
from mllm.eval.bench_model import CHAT, SETTINGS, build_model, make_prompt, prepare
from mllm.eval.results import environment, write_json

#: kernels by name; a masked call needs one that takes masks, so flash stands with the one that does
KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def correctness(spec: ModelSpec, layers: int, visual: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per setting, kernel and number format: largest error relative to eager attention in float32."""
    text = 64
    torch.manual_seed(0)
    right = build_model("llava-onevision-7b", spec, layers, "eager", torch.float32, device)
    for parameter in right.parameters():  # random weights are too small for attention to be peaked
        if parameter.ndim == 2:
            parameter.normal_(std=1.2 / parameter.shape[1] ** 0.5)
    for dtype in (torch.float32, torch.bfloat16):
        fast = build_model("llava-onevision-7b", spec, layers, "sdpa", dtype, device)
        fast.load_state_dict(right.state_dict())
        for name, setting in SETTINGS.items():
            prompt = make_prompt(right, visual, text, 2, setting.pages)
            stack = prepare(setting, right, prompt.length)
            alone = run(right, prompt, None)
            wanted = run(right, prompt, stack)
            for kernel, backends in KERNELS.items():
                row = {"setting": name, "dtype": str(dtype).removeprefix("torch."), "kernel": kernel}
                try:
                    with sdpa_kernel(backends):
                        row["plain_error"] = error(run(fast, prompt, None), alone)
                        row["error"] = error(run(fast, prompt, stack), wanted)
                except RuntimeError as failure:  # this GPU, or this number format, has no such kernel
                    yield {**row, "passed": None, "note": str(failure).splitlines()[0]}
                    continue
                limit = max(TOLERANCE[dtype], 2 * row["plain_error"])
                yield {**row, "passed": row["error"] <= limit, "note": ""}


def run(model: torch.nn.Module, prompt: Any, stack: Any) -> torch.Tensor:
    """(B, T, D) float32, what the decoder makes of the text."""
    inputs = prompt.inputs()
    picture = inputs["mm_encoder_outputs"]["image"]
    picture.pooler_output = tuple(part.to(model.dtype) for part in picture.pooler_output)
    if stack is None:
        hidden = model.model(**inputs)[0]
    else:
        with stack(model, CHAT):
            model.model(**prompt_copy(inputs))  # a picture that is asked about again
            hidden = model.model(**inputs)[0]
    text = [n for n in range(prompt.length) if not any(start <= n < stop for start, stop in prompt.pages)]
    return hidden[:, text].float()


def prompt_copy(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def flex_against_calls(spec: ModelSpec, visual: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """MMA's rule for one layer: FlexAttention with a block mask, and the two SDPA calls that the engine makes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, stop, length = 32, 32 + visual, visual + 64
    dtype = torch.bfloat16
    queries = torch.randn(1, spec.heads, length, spec.head_dim, device=device, dtype=dtype)
    keys, values = (torch.randn(1, spec.heads, length, spec.head_dim, device=device, dtype=dtype) for _ in range(2))

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) | ((q >= start) & (q < stop) & (k >= stop))

    blocks = create_block_mask(seen, None, None, length, length, device=str(device))
    flex = torch.compile(flex_attention)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def turned(states: torch.Tensor) -> torch.Tensor:
        return torch.cat([states[:, :, :start], states[:, :, stop:], states[:, :, start:stop]], dim=2)

    def calls() -> torch.Tensor:
        most = sdpa(turned(queries), turned(keys), turned(values), is_causal=True)
        mask = torch.ones(length - stop, length, dtype=torch.bool, device=device).tril(stop)
        last = sdpa(queries[:, :, stop:], keys, values, mask)
        return torch.cat([most[:, :, :start], most[:, :, start + length - stop :], last], dim=2)

    def clock(call: Any) -> float:
        call()
        times = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
        return sorted(times)[len(times) // 2]

    found = {"difference": error(flex(queries, keys, values, block_mask=blocks).float(), calls().float())}
    found |= {"flex_ms": clock(lambda: flex(queries, keys, values, block_mask=blocks)), "calls_ms": clock(calls)}
    return found


def table(checks: list[dict[str, Any]], rows: list[Row]) -> str:
    failed = [check for check in checks if check["passed"] is False]
    ran = sum(check["passed"] is not None for check in checks)
    lines = [f"correctness: {ran - len(failed)} of {ran} passed, {len(checks) - ran} not available on this machine"]
    lines += [f"FAILED {c['setting']} {c['kernel']} {c['dtype']}: {c['error']:.1e}" for c in failed]
    lines.append(
        f"{'setting':14} {'phase':8} {'visual':>6} {'speed-up':>9} {'predicted':>9} {'r/oracle':>9} {'r/pred.':>8}"
    )
    for row in rows:
        if row.speedup is not None:
            lines.append(
                f"{row.setting:14} {row.phase:8} {row.visual_tokens:6} {row.speedup:9.2f} {row.predicted:9.2f} "
                f"{row.realised_over_oracle:9.2f} {row.realised_over_predicted:9.2f}"
            )
        else:
            lines.append(f"{row.setting:14} {row.phase:8} {row.visual_tokens:6} {row.note}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU where there is no GPU")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    begin = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        print("No GPU is visible to torch. Try --dry-run.", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = ModelSpec(6, 64, 96, 4, 2, 16) if options.dry_run else ModelSpec(6, 1024, 2816, 16, 4, 64)
    arch, sizes = "llava-1.5-7b", [2880, 576, 10000]
    if options.dry_run:
        ARCHITECTURES["toy"] = small
        arch, sizes = "toy", [40]
    checks = []
    with torch.inference_mode():
        for check in correctness(small, small.layers, 40 if options.dry_run else 700, device):
            checks.append(check)
    flex: dict[str, Any] = {"note": "needs a GPU"}
    if device.type == "cuda":
        try:
            with torch.inference_mode():
                flex = flex_against_calls(ARCHITECTURES["llava-1.5-7b"], sizes[0], device, options.rounds)
        except Exception as failure:  # torch.compile fails in many ways, none of which is about this package
            flex = {"note": f"{type(failure).__name__}: {str(failure).splitlines()[0]}"}
    write_json(options.out / "correctness.json", {"env": environment(), "checks": checks, "flex": flex})
    rows: list[Row] = []
    for size in sizes:
        left = options.minutes * 60 - (time.monotonic() - begin)
        try:
            rows += run_bench(
                options.out, [arch], [size], [1], rounds=options.rounds, device=str(device), within=max(left, 0.0)
            )
        except (MllmError, RuntimeError) as failure:
            print(f"{size} visual tokens: {failure}", file=sys.stderr)
    print(f"{environment()['gpu'] or 'CPU'}, torch {torch.__version__}, {time.monotonic() - begin:.0f} s; flex: {flex}")
    print(table(checks, rows))
    return int(any(check["passed"] is False for check in checks))


if __name__ == "__main__":
    sys.exit(main())
