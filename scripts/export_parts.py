"""Copy what `mllm claims --retrain` trained into the package: weights, configs and loss curves, without checkpoints.

python scripts/export_parts.py runs/claims/parts
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mllm.eval.claims import PARTS, PARTS_FOLDER

KEPT = ("*.safetensors", "*_config.json", "training.json", "retrieval.json", "exits.json", "exits.png", "loss.png")
#: what base models have and parts share with them
LEFT = ("processor_config.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder of trained parts")
    parser.add_argument("--to", type=Path, default=PARTS_FOLDER)
    arguments = parser.parse_args()
    for part in PARTS.values():
        for seed in part.seeds:
            source, target = (part.folder(root, seed) for root in (arguments.parts, arguments.to))
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for pattern in KEPT:
                for file in source.glob(pattern):
                    if file.name in LEFT:
                        continue
                    shutil.copyfile(file, target / file.name)


if __name__ == "__main__":
    main()
