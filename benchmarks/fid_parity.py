"""The Frechet distance of `diptych evaluate --features WEIGHTS.pth` beside that of `pytorch-fid`, on the same files.

    python benchmarks/fid_parity.py [--weights pt_inception-2015-12-05-6726825d.pth] [--images 200] [--work DIR]

It needs `pip install 'diptych[fid]'`. Two folders of PNG files are written: scenes, and scenes that are blurred and
noisy. `pytorch_fid.fid_score.calculate_fid_given_paths` reads one and the other; Diptych reads the same files and uses
its own statistics and its own distance. Without `--weights` the network of `pytorch-fid` gets random weights, which
both load from one file: what is compared is the way from files to a number, and it is the same for any weights.
Fails if the numbers differ by more than a thousandth of one of them.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from diptych.data.pixels import channels_first
from diptych.data.scenes import ScenesSource
from diptych.eval.frechet import feature_statistics, frechet_distance, metric_name, open_extractor

BAR = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="weights of pytorch-fid's Inception; default: random ones")
    parser.add_argument("--images", type=int, default=200, help="images of each folder")
    parser.add_argument("--work", type=Path, help="folder for the images; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        weights = args.weights or random_weights(work / "random.pth")
        folders = [work / "scenes", work / "changed"]
        for folder in folders:
            write_images(folder, args.images, changed=folder.name == "changed")
        theirs, seconds = by_pytorch_fid(folders, weights)
        print(f"pytorch-fid  {theirs:.6f}  ({seconds:.0f} s)")
        began = time.monotonic()
        extractor = open_extractor(str(weights))
        ours = frechet_distance(*(feature_statistics(extractor, read_images(folder)) for folder in folders))
        print(f"diptych      {ours.value:.6f}  ({time.monotonic() - began:.0f} s)  as {metric_name(extractor)}")
        apart = abs(ours.value - theirs) / abs(theirs)
        print(f"apart by {apart:.1e} of it, {abs(ours.value - theirs):.1e}; bar {BAR:g}")
    return int(apart > BAR)


def write_images(folder: Path, count: int, *, changed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(changed))
    pixels = ScenesSource(level=3, count=count, seed=int(changed), size=64).images(np.arange(count))
    for number, each in enumerate(pixels):
        image = Image.fromarray(each)
        if changed:
            noisy = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), np.float32) + 8 * rng.normal(
                size=each.shape
            )
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:05d}.png")


def read_images(folder: Path) -> torch.Tensor:
    """All images [B, 3, H, W] as bytes."""
    images = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*.png"))]
    return channels_first(np.stack(images))


def random_weights(path: Path) -> Path:
    """Random weights of pytorch-fid's Inception, whose batch norms are scaled so that the features vary."""
    from pytorch_fid import inception

    fetch = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *_, **__: {}
    load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda *_, **__: None
    try:
        torch.manual_seed(0)
        network = inception.fid_inception_v3()
    finally:
        inception.load_state_dict_from_url, torch.nn.Module.load_state_dict = fetch, load
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


def by_pytorch_fid(folders: list[Path], weights: Path) -> tuple[float, float]:
    """The distance by pytorch-fid's own command, whose weights are those of the file; and the seconds it took."""
    from pytorch_fid import fid_score, inception

    fetch = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, map_location="cpu", weights_only=True)
    began = time.monotonic()
    try:
        paths = [str(folder) for folder in folders]
        found = fid_score.calculate_fid_given_paths(paths, batch_size=50, device="cpu", dims=2048, num_workers=0)
    finally:
        inception.load_state_dict_from_url = fetch
    return float(found), time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
