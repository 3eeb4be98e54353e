"""Dual encoders on images of another kind: Caltech101 by the names of its classes and by a linear probe.

    python benchmarks/ito_transfer.py --run RUN [RUN ...] --data caltech101_64.tar --meta meta.json [--json FILE]
        [--pairs flickr8k_96.tar?split=test [--map FILE.png]]

`--meta` holds "classnames" and "items": [file, number of the class, split]. The l2 of the probe is chosen on the split
"val", and the test split is scored once. An untrained encoder of the same shape is the control: it shows what a
probe reads from the pixels alone. `--pairs` adds the modality gap among captioned images, and `--map` a UMAP of them
with a panel for each run, which needs the extra `umap`. Two minutes a run on one core. Fails if the features of a run
are not better than its control's.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel

from diptych.data.sources import Source, open_source
from diptych.dual.evaluation import embed_pairs, embed_source
from diptych.dual.metrics import ENSEMBLE, PLAIN, class_accuracy, class_embeddings, modality_gap, modality_map
from diptych.dual.model import DualEncoder, open_dual
from diptych.eval.probe import linear_probe
from diptych.io import write_bytes


def untrained(encoder: DualEncoder) -> DualEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DualEncoder(CLIPModel(encoder.clip.config), encoder.processor)


def transfer(encoder: DualEncoder, source: Source, meta: dict[str, Any]) -> dict[str, float]:
    place = {str(Path(file).with_suffix("")): (label, split) for file, label, split in meta["items"]}
    images = embed_source(encoder, source)
    told = [place[source.key(int(item))] for item in images.items_I]
    labels_I = torch.tensor([label for label, _ in told])
    train, val, test = (torch.tensor([split == name for _, split in told]) for name in ("train", "val", "test"))
    metrics: dict[str, float] = {}
    for name, templates in (("zero_shot_one_prompt", PLAIN), ("zero_shot", ENSEMBLE)):
        classes_CD = class_embeddings(encoder.embed_texts, meta["classnames"], templates=templates)
        accuracy = class_accuracy(images.embedding_ID[test] @ classes_CD.T, labels_I[test])
        metrics |= {f"{name}/{key}": value for key, value in asdict(accuracy).items()}
    states_IW = images.state_IW
    probe = linear_probe(
        states_IW[train], labels_I[train], states_IW[test], labels_I[test], validation=(states_IW[val], labels_I[val])
    )
    return metrics | {f"probe/{key}": value for key, value in asdict(probe).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--meta", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs")
    parser.add_argument("--map", type=Path)
    options = parser.parse_args()
    if options.map and not options.pairs:
        parser.error("--map shows captioned images: give --pairs")
    meta, source = json.loads(options.meta.read_text()), open_source(options.data)

    results, spaces = {}, {}
    for run in options.run:
        encoder = open_dual(run, device="cpu")
        found = transfer(encoder, source, meta)
        found["probe/untrained"] = transfer(untrained(encoder), source, meta)["probe/accuracy"]
        if options.pairs:
            pairs = embed_pairs(encoder, embed_source(encoder, open_source(options.pairs)))
            spaces[run.name] = (pairs.images_ID, pairs.first_ID)
            found |= {f"modality/{key}": value for key, value in asdict(modality_gap(*spaces[run.name])).items()}
        results[run.name] = found
        print(run.name, *(f"{name} {value:.4g}" for name, value in found.items()), sep="\n    ", flush=True)
    if options.map:
        write_bytes(options.map, modality_map(spaces))
    passed = all(found["probe/accuracy"] > found["probe/untrained"] for found in results.values())
    chance = np.bincount([label for _, label, split in meta["items"] if split == "test"]).max()
    chance /= sum(split == "test" for *_, split in meta["items"])
    if options.json:
        options.json.write_text(json.dumps({"passed": passed, "most_frequent": chance, **results}, indent=2) + "\n")
    shown = ", ".join(f"{name} {found['probe/accuracy']:.1%}" for name, found in results.items())
    print(f"{'PASS' if passed else 'FAIL'}: linear probes {shown}; the most frequent class alone {chance:.1%}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
