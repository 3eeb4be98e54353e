"""Do captions and images help to classify audio? Few-shot ESC-10: audio alone, + text, + images, and controls.

    python benchmarks/uml_audio.py --data esc10.tar --texts captions.txt.gz
        [--captioned-images flickr8k.tar] [--labelled-images caltech101.tar]
        [--text-encoder NAME] [--image-encoder NAME] [--json FILE]

Audio: mean and standard deviation of log-mel frames. Texts: captions that name what is heard; no caption belongs to a
clip. Images: images whose captions name it, and images of a class of that name; chainsaws and sneezing have none. Each
seed tests on one of the five folds, whose recordings occur in no other, and learns from the rest; the
step is selected on min(4, k) clips a class, nothing on the test fold. Without encoders the texts are read by a small T5
trained here on the captions, and images by a random network. Three minutes of one CPU core.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.data.class_texts import permuted
from diptych.data.pixels import SkippedItems, image_batches
from diptych.data.sources import Source, open_source
from diptych.data.splits import draw_episode
from diptych.data.store import VectorStore
from diptych.encoders import open_image_encoder, open_text_encoder
from diptych.encoders.audio import MelConfig, write_frames
from diptych.eval.frechet import RandomFeatures
from diptych.experiments.few_shot import FewShotResult, gain, spread
from diptych.rng import derive_seed
from diptych.run_folder import write_json
from diptych.tokenizers.recipes import encoder_tiny
from diptych.uml.data import read_rows
from diptych.uml.objective import SharedHead, SharedHeadConfig, uml_loss
from diptych.uml.training import Score, select_best, start_head

WORDS = {
    "Baby cry": r"bab(y|ies)|infants?|toddlers?",
    "Chainsaw": r"chain ?saws?|sawing",
    "Clock tick": r"clocks?",
    "Dog bark": r"dogs?",
    "Fire crackling": r"(camp|bon)?fires?|flames?",
    "Helicopter": r"helicopters?",
    "Person sneeze": r"sneez\w*|noses?|tissues?",
    "Rain": r"rain\w*|umbrellas?",
    "Rooster": r"roosters?|chickens?",
    "Sea waves": r"waves?|ocean",
}
"""Pattern of what is heard in each class, as captions name it."""
LABELS = {"Clock tick": "watch", "Helicopter": "helicopter", "Rooster": "rooster"}
"""Classes of Caltech101 that show what is heard."""
NO_IMAGES = ("Chainsaw", "Person sneeze")
MOST_TEXTS, MOST_IMAGES = 30, 60
AUDIO, TEXT, IMAGE = "audio", "text", "image"
STEPS, EVERY = 300, 20
Labelled = tuple[Tensor, Tensor]
"""Features [N D] and labels [N]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What is learned from."""

    others: tuple[str, ...] = ()
    init: bool = False
    """The classifier begins as each class's mean text."""
    unrelated: bool = False
    """Control: texts and images are taken to be about other classes than they are."""


WAYS = {
    "audio only (lambda 0)": Way(),
    "text init only (lambda 0)": Way(init=True),
    "+ unrelated text": Way(others=(TEXT,), unrelated=True),
    "+ text": Way(others=(TEXT,)),
    "+ text, text init": Way(others=(TEXT,), init=True),
    "+ unrelated text + unrelated images": Way(others=(TEXT, IMAGE), unrelated=True),
    "+ text + images": Way(others=(TEXT, IMAGE)),
    "+ text + images, text init": Way(others=(TEXT, IMAGE), init=True),
}
CONTROL = next(iter(WAYS))


def clip_features(store: VectorStore) -> Tensor:
    """Mean and standard deviation over the frames, [N 2F]."""
    rows = read_rows(store, np.arange(len(store)))
    clips = [frames[valid] for frames, valid in zip(rows.features_BSF, rows.valid_BS, strict=True)]
    return torch.stack([torch.cat([frames.mean(0), frames.std(0)]) for frames in clips])


def naming(captions: Iterable[str], name: str) -> list[int]:
    """Indices of the captions that name what is heard in the class, and nothing of another class."""
    own, others = WORDS[name], "|".join(pattern for other, pattern in WORDS.items() if other != name)
    found = []
    for place, caption in enumerate(captions):
        text = caption.lower()
        if re.search(rf"\b({own})\b", text) and not re.search(rf"\b({others})\b", text):
            found.append(place)
    return found


def some(items: list[int], most: int, *parts: int | str) -> list[int]:
    rng = np.random.default_rng(derive_seed(*parts))
    return sorted(rng.permutation(items)[:most].tolist())


def texts(source: Source, classes: list[str], encoder) -> Labelled:
    captions = [text for item in range(len(source)) for text in source.captions(item)]
    chosen = [some(naming(captions, name), MOST_TEXTS, "texts", name) for name in classes]
    print("texts: " + ", ".join(f"{name} {len(found)}" for name, found in zip(classes, chosen, strict=True)))
    vectors_ND = encoder([captions[place] for found in chosen for place in found]).float().cpu()
    return vectors_ND, torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(f) for f in chosen]))


def images(captioned: Source | None, labelled: Source | None, classes: list[str], encoder) -> Labelled:
    chosen: list[tuple[Source, list[int], int]] = []
    if captioned is not None:
        captions = [" ".join(captioned.captions(item)) for item in range(len(captioned))]
        chosen += [(captioned, naming(captions, name), label) for label, name in enumerate(classes)]
    if labelled is not None:
        labels = [labelled.label(item) for item in range(len(labelled))]
        for label, name in enumerate(classes):
            chosen.append((labelled, [i for i, found in enumerate(labels) if found == LABELS.get(name)], label))
    size = getattr(encoder, "image_size", RandomFeatures.SIZE)
    vectors, labels_found = [], []
    for source, items, label in chosen:
        kept = some(items, MOST_IMAGES, "images", label) if classes[label] not in NO_IMAGES else []
        for pixels_B3HW, _ in image_batches(source, np.array(kept, int), size=size, skipped=SkippedItems()):
            vectors.append(encoder(pixels_B3HW).detach().float().cpu())
            labels_found += [label] * len(pixels_B3HW)
    print("images: " + ", ".join(f"{name} {labels_found.count(label)}" for label, name in enumerate(classes)))
    return torch.cat(vectors), torch.tensor(labels_found)


def fit(
    way: Way, train: Labelled, valid: Labelled, others: Mapping[str, Labelled], *, classes: int, seed: int
) -> tuple[SharedHead, Score]:
    """Train a shared classifier on all rows at once; return it as it was at the selected step."""
    widths = {AUDIO: train[0].shape[1]} | {name: x_ND.shape[1] for name, (x_ND, _) in others.items()}
    config = SharedHeadConfig(widths=widths, anchor=TEXT, classes=classes)
    images_ND = others[IMAGE][0] if IMAGE in others else None
    head = start_head(config, images_ND, others[TEXT], init="anchor" if way.init else "random", seed=seed)
    head.fit_statistics(train[0], AUDIO)
    known = {AUDIO: train} | {name: others[name] for name in way.others}
    if way.unrelated:
        wrong = torch.from_numpy(permuted(classes, seed=seed))
        known |= {name: (known[name][0], wrong[known[name][1]]) for name in way.others}
    # A modality that shows some classes only says nothing about the others.
    present = {name: labels_N.unique() for name, (_, labels_N) in known.items()}
    labels = {name: torch.searchsorted(present[name], labels_N) for name, (_, labels_N) in known.items()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.01)
    scores: list[Score] = []
    kept = head.state_dict()
    for step in range(1, STEPS + 1):
        logits = {name: head(x_ND, name)[:, present[name]] for name, (x_ND, _) in known.items()}
        loss, _ = uml_loss(logits, labels, dict.fromkeys(known, 1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            scores.append(score(head, valid, step))
            if (best := select_best(scores, patience=10)) == scores[-1]:
                kept = {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(kept)
    assert best is not None
    return head, best


@torch.no_grad()
def score(head: SharedHead, examples: Labelled, step: int) -> Score:
    logits_NC, labels_N = head(examples[0], AUDIO), examples[1]
    accuracy = float((logits_NC.argmax(1) == labels_N).float().mean())
    return Score(step=step, accuracy=accuracy, loss=float(F.cross_entropy(logits_NC, labels_N)))


def trial(
    store: VectorStore, features_ND: Tensor, others: Mapping[str, Labelled], *, shots: int, seed: int
) -> list[FewShotResult]:
    """Every way on one fold, learned from ``shots`` clips a class of the other folds."""
    labels_N, fold_N, classes = store.array("labels"), store.array("fold"), store.manifest["classes"]
    assert labels_N is not None
    assert fold_N is not None
    test, rest = (np.flatnonzero((fold_N == 1 + seed % 5) == asked) for asked in (True, False))
    # Standardized by clips whose labels are not looked at, of which there are plenty.
    features_ND = (features_ND - features_ND[rest].mean(0)) / features_ND[rest].std(0)
    episode = draw_episode(labels_N[rest], shots, seed=seed)
    y_N = torch.from_numpy(np.array(labels_N))
    train, valid = ((features_ND[rest[chosen]], y_N[rest[chosen]]) for chosen in (episode.train, episode.valid))
    found = []
    for name, way in WAYS.items():
        if set(way.others) <= set(others):
            head, best = fit(way, train, valid, others, classes=len(classes), seed=seed)
            tested = score(head, (features_ND[test], y_N[test]), best.step)
            result = FewShotResult(
                control=name,
                shots=shots,
                seed=seed,
                accuracy=tested.accuracy,
                valid_accuracy=best.accuracy,
                chosen={"step": best.step},
            )
            found.append(result)
    return found


def text_encoder(name: str | None, captions: Source):
    if name is not None:
        return open_text_encoder(name)
    stage = encoder_tiny()
    stage = replace(stage, model=replace(stage.model, vocab_size=2000, lowercase=True))
    with tempfile.TemporaryDirectory() as folder:
        every = (text for item in range(len(captions)) for text in captions.captions(item))
        stage.fit(every, Path(folder)).save_pretrained(Path(folder) / "text_encoder")
        return open_text_encoder(str(Path(folder) / "text_encoder"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tar of ogg and json {label, fold}")
    parser.add_argument("--texts", required=True, help="source of captions")
    parser.add_argument("--captioned-images", help="source of captioned images")
    parser.add_argument("--labelled-images", help="source of images sorted into classes")
    parser.add_argument("--text-encoder", help="folder, run or hub name")
    parser.add_argument("--image-encoder", help="folder, run or hub name")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4], help="numbers of clips of each class")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args()
    captions = open_source(options.texts)
    with tempfile.TemporaryDirectory() as folder:
        store = write_frames(options.data, Path(folder) / "frames", config=MelConfig(window=1024, hop=640))
        features_ND = clip_features(store)
        others = {TEXT: texts(captions, store.manifest["classes"], text_encoder(options.text_encoder, captions))}
        if options.captioned_images or options.labelled_images:
            encoder = open_image_encoder(options.image_encoder) if options.image_encoder else RandomFeatures()
            specs = (options.captioned_images, options.labelled_images)
            sources = [open_source(spec) if spec else None for spec in specs]
            others[IMAGE] = images(*sources, store.manifest["classes"], encoder)
        results = [
            result
            for shots, seed in product(options.shots, range(options.seeds))
            for result in trial(store, features_ND, others, shots=shots, seed=seed)
        ]
    report(results, options.shots, options.json)


def report(results: list[FewShotResult], every: list[int], file: Path | None) -> None:
    ways = list(dict.fromkeys(result.control for result in results))
    print(f"{'accuracy, mean and standard deviation over seeds':50}" + "".join(f"{s:>8} shots" for s in every))
    for way in ways:
        cells = [spread(results, way, shots) for shots in every]
        print(f"{way:50}" + "".join(f"{mean:8.1%} {deviation:5.1%}" for mean, deviation in cells))
    for way, shots in product(ways[1:], [*every, None]):
        print(f"{f'{shots} shots' if shots else 'all shots'}: {gain(results, way, CONTROL, shots=shots)}")
    for own, control in (("+ text", "+ unrelated text"), ("+ text + images", "+ unrelated text + unrelated images")):
        if own in ways:
            print(f"all shots: {gain(results, own, control)}")
    if file:
        write_json(file, [asdict(result) for result in results])
    alone = spread(results, CONTROL, every[-1])[0]
    print(f"verdict: audio alone with {every[-1]} shots a class is right {alone:.1%} of the time (a guess: 10 %)")
    sys.exit(alone < 0.2)


if __name__ == "__main__":
    main()
