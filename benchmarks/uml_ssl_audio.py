"""Does self-supervised UML help audio? ESC-10 frames alone, with captions, with captions whose tokens are shuffled.

    python benchmarks/uml_ssl_audio.py --data esc10.tar --texts captions.txt.gz --text-encoder NAME [--json FILE]

Next-embedding prediction on log-mel frames, for the same number of steps with and without token features of captions,
none of which belongs to a clip; then a linear probe of the mean embedding, trained on four folds and tested on the
fifth, five times. The control keeps every token vector and shuffles their order. For comparison the frames themselves
and an untrained network are probed too. It fails when the untrained network is better than every trained one. It takes
eight minutes of one CPU core.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diptych.data.sources import open_source
from diptych.data.store import VectorStore, write_vectors
from diptych.encoders import open_text_encoder
from diptych.encoders.audio import MelConfig, write_frames
from diptych.eval.probe import linear_probe
from diptych.rng import derive_seed
from diptych.run_folder import save_model, write_json
from diptych.uml.data import read_rows
from diptych.uml.recipes import uml_ssl
from diptych.uml.self_supervised import SharedTransformerConfig, UmlSslConfig, UmlSslRun, embed_features

MEL = MelConfig(window=1024, hop=1280)
CAPTIONS = 2000


def caption_tokens(spec: str, encoder: str, out: Path) -> VectorStore:
    """Token features of some captions."""
    source = open_source(spec)
    rng = np.random.default_rng(derive_seed(0, "captions"))
    items = np.sort(rng.permutation(len(source))[:CAPTIONS])
    texts = [source.captions(int(item))[0] for item in items]
    features_BLD, valid_BL = open_text_encoder(encoder).tokens(texts)
    arrays = {"vectors": features_BLD.cpu().numpy().astype(np.float16), "lengths": valid_BL.sum(1).cpu().numpy()}
    return write_vectors(out, [arrays], keys=texts, manifest={"encoder": encoder})


def shuffled(store: VectorStore, out: Path) -> VectorStore:
    """The same vectors and lengths, every vector in the place of another."""
    lengths = store.array("lengths")
    assert lengths is not None
    real = np.arange(store.vectors.shape[1]) < lengths[:, None]
    vectors = np.array(store.vectors)
    vectors[real] = vectors[real][np.random.default_rng(derive_seed(0, "shuffled")).permutation(int(real.sum()))]
    return write_vectors(out, [{"vectors": vectors, "lengths": lengths}], keys=store.keys, manifest={"shuffled": True})


def probe(embeddings_ND: np.ndarray, frames: VectorStore) -> float:
    """Mean accuracy over the folds."""
    x_ND, labels, fold = torch.from_numpy(embeddings_ND).float(), frames.array("labels"), frames.array("fold")
    assert labels is not None
    assert fold is not None
    y_N, fold_N = torch.from_numpy(np.array(labels)), torch.from_numpy(np.array(fold))
    parts = [(fold_N != number, fold_N == number) for number in fold_N.unique()]
    found = [linear_probe(x_ND[rest], y_N[rest], x_ND[test], y_N[test]).accuracy for rest, test in parts]
    return float(np.mean(found))


def mean_and_std(frames: VectorStore) -> np.ndarray:
    rows = read_rows(frames, np.arange(len(frames)))
    clips = [x_LF[valid_L].numpy() for x_LF, valid_L in zip(rows.features_BSF, rows.valid_BS, strict=True)]
    return np.stack([np.concatenate([x_LF.mean(0), x_LF.std(0)]) for x_LF in clips])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tar of ogg and json {label, fold}")
    parser.add_argument("--texts", required=True, help="source of captions")
    parser.add_argument("--text-encoder", required=True, help="folder, run or hub name")
    parser.add_argument("--steps", type=int, default=400, help="number of optimizer updates of a run")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames = write_frames(options.data, folder / "frames", config=MEL)
        captions = caption_tokens(options.texts, options.text_encoder, folder / "captions")
        others = {"alone": "", "+ captions": str(captions.folder)}
        others["+ shuffled captions"] = str(shuffled(captions, folder / "shuffled").folder)
        base = replace(
            uml_ssl(),
            target=str(frames.folder),
            model=SharedTransformerConfig(width=64, depth=2, heads=4),
            objective=UmlSslConfig(aux_start_step=options.steps // 5),
        )
        found = {"mean and std of frames": [probe(mean_and_std(frames), frames)]}
        for seed in range(options.seeds):
            run = replace(base, train=replace(base.train, steps=options.steps, seed=seed, quiet=True, workers=0))
            untrained(run, folder / f"untrained{seed}")
            places = {"untrained": folder / f"untrained{seed}"}
            for way, stores in others.items():
                places[way] = folder / f"{seed} {way}"
                replace(run, others=stores).fit(places[way], recipe="uml-ssl")
            for way, place in places.items():
                found.setdefault(way, []).append(probe(embed_features(place, frames), frames))
    report(found, options.json)


def untrained(run: UmlSslRun, out: Path) -> None:
    save_model(run.build(run.open()), out / "model")


def report(found: dict[str, list[float]], file: Path | None) -> None:
    print("accuracy of a linear probe on ESC-10, mean over five folds, and standard deviation over seeds")
    for way, scores in found.items():
        print(f"{way:24}{np.mean(scores):8.1%}" + (f" {np.std(scores, ddof=1):6.1%}" if len(scores) > 1 else ""))
    for control in ("alone", "+ shuffled captions"):
        gains = np.subtract(found["+ captions"], found[control])
        error = gains.std(ddof=1) / len(gains) ** 0.5
        verdict = "beyond" if abs(gains.mean()) > 2 * error else "within"
        print(f"captions against {control}: {gains.mean():+.1%} +- {error:.1%}, {verdict} the noise")
    if file:
        write_json(file, found)
    good = max(np.mean(found[way]) for way in ("alone", "+ captions")) > np.mean(found["untrained"])
    print(f"verdict: training {'helps' if good else 'does not help'} the probe")
    sys.exit(not good)


if __name__ == "__main__":
    main()
