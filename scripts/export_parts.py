"""Copy trained parts into the package: weights, configs and curves, without checkpoints.

python scripts/export_parts.py runs/claims/parts                              # all that `mllm claims --retrain` trained
python scripts/export_parts.py runs/gates --name default/gates --half         # one part
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from mllm.eval.claims import PARTS, PARTS_FOLDER
from mllm.saving import PACKAGED, WEIGHTS_NAME

KEPT = ("*.safetensors", "*_config.json", "training.json", "retrieval.json", "exits.json", "exits.png", "loss.png")
#: what base models have and parts share with them
LEFT = ("processor_config.json", "tokenizer_config.json")


def export(source: Path, target: Path, half: bool = False) -> None:
    """Copy one part; its weights as float16 with ``half``."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for pattern in KEPT:
        for file in source.glob(pattern):
            if file.name not in LEFT:
                shutil.copyfile(file, target / file.name)
    if half:
        tensors = load_file(source / WEIGHTS_NAME)
        save_file({name: value.half() for name, value in tensors.items()}, target / WEIGHTS_NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of trained parts; with --name of one")
    parser.add_argument("--name", help="place in the package of one part, such as default/gates")
    parser.add_argument("--half", action="store_true", help="store the weights of one part as float16")
    arguments = parser.parse_args()
    if arguments.name:
        export(arguments.source, PACKAGED / arguments.name, arguments.half)
        return
    for part in PARTS.values():
        for seed in part.seeds:
            export(part.folder(arguments.source, seed), part.folder(PARTS_FOLDER, seed))


if __name__ == "__main__":
    main()
