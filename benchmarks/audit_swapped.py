"""Does `diptych audit` find captions that belong to another image, and images that are there twice?

In a tenth of the pairs the captions are exchanged among one another. A dual encoder learns from these pairs, as one
would, and audits them. The score is the share of exchanged captions among the tenth that fits worst; by chance it is a
tenth. Control: the same with the heads as they were drawn. Near duplicates: photos compressed again, at half the size,
and mirrored, each beside its original.

    python benchmarks/audit_swapped.py --data flickr8k_96.tar --out DIR [--pairs 2000] [--seeds 0 1 2] [--steps 400]
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from diptych.data.audit import Fit, near_duplicates
from diptych.data.pixels import SkippedItems
from diptych.data.sources import open_source
from diptych.data.sources.decode import decode
from diptych.dual.evaluation import pair_fits
from diptych.dual.model import open_dual
from diptych.io import write_bytes
from diptych.registry import RECIPES
from diptych.run_folder import write_json

SHARE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="clip-frozen")
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    spec = f"{given.data}?split=train"
    found = {"precision": [], "control": [], **duplicates(spec, given.seeds[0])}
    for seed in given.seeds:
        noisy, wrong = exchange(spec, given.out / f"noisy-{seed}.jsonl", pairs=given.pairs, seed=seed)
        for name in ("precision", "control"):
            run = given.out / f"{name}-{seed}"
            recipe = RECIPES[given.recipe]()
            recipe.data.pairs = noisy
            recipe.data.cache = given.out / "features"
            recipe.train.seed = seed
            recipe.train.quiet = True
            recipe.train.steps = given.steps if name == "precision" else 1
            recipe.optim.lr = recipe.optim.lr if name == "precision" else 1e-12
            recipe.fit(run, recipe=given.recipe)
            source = open_source(noisy)
            fits = pair_fits(open_dual(run, device="auto"), source, skipped=SkippedItems())
            found[name].append(precision(fits, wrong))
        print(f"seed {seed}: {found['precision'][-1]:.3f}, heads as drawn {found['control'][-1]:.3f}", flush=True)
    for name in ("precision", "control"):
        print(f"{name}: {np.mean(found[name]):.3f} +- {np.std(found[name], ddof=len(given.seeds) > 1):.3f}")
    write_json(given.out / "audit.json", found)


def exchange(spec: str, file: Path, *, pairs: int, seed: int) -> tuple[str, set[int]]:
    """A source of ``pairs`` images with one caption each, of which a tenth is another image's; and which these are."""
    source = open_source(spec)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(source))[:pairs])
    captions = [source.captions(int(item))[0] for item in chosen]
    wrong = generator.permutation(pairs)[: int(SHARE * pairs)]
    moved = {int(a): captions[b] for a, b in zip(wrong, np.roll(wrong, 1), strict=True)}
    rows = [
        {"key": source.key(int(item)), "captions": [moved.get(row, captions[row])]} for row, item in enumerate(chosen)
    ]
    write_bytes(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return f"{spec}&keep={file}", set(moved)


def precision(fits: list[Fit], wrong: set[int]) -> float:
    worst = sorted(fits, key=lambda each: each.fit)[: len(wrong)]
    return float(np.mean([each.item in wrong for each in worst]))


def duplicates(spec: str, seed: int) -> dict[str, float]:
    """The share of altered copies that are found, by kind, and of other photos that are taken for copies."""
    source = open_source(spec)
    items = np.random.default_rng(seed).permutation(len(source))[:500]
    originals = [source.image(int(item), 96) for item in items]
    found = {}
    for kind in ("compressed", "halved", "mirrored"):
        copies = [decode(alter(image, kind), 32) for image in originals]
        small = [decode(png(Image.fromarray(image)), 32) for image in originals]
        twins = near_duplicates([*small, *copies])
        found[f"recall/{kind}"] = float(np.mean([twins.get(500 + i) in (i, twins.get(i)) for i in range(500)]))
    found["false"] = len(near_duplicates(small)) / 500
    print({name: round(value, 4) for name, value in found.items()}, flush=True)
    return found


def alter(image: np.ndarray, kind: str) -> bytes:
    changed = Image.fromarray(image[:, ::-1] if kind == "mirrored" else image)
    if kind == "halved":
        changed = changed.resize((48, 48), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    changed.save(file, "JPEG", quality=50 if kind == "compressed" else 90)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
