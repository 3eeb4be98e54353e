"""Do our caption scores and our tokenizer equal pycocoevalcap's?

    python benchmarks/caption_parity.py --data DATA [--json FILE] [--java]

DATA holds `cider_reference/golden.json`: texts, their Treebank tokens and scores by pycocoevalcap. With `--java`, which
needs a Java on the PATH, the original tokenizer also runs over every caption found in DATA/texts (`*.txt.gz`,
`PartiPrompts.tsv`) and DATA/flickr8k (`*.tar`). About half a minute. Exits with 1 when a check fails.
"""

import argparse
import csv
import gzip
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from diptych.eval.captions import score_tokens, tokenize

SCORE_TOLERANCE = 1e-6
TOKEN_AGREEMENT = 0.995


def check_scores(golden: dict[str, Any]) -> dict[str, float]:
    """Largest difference from the stored scores per part, corpus and images; the stored CIDEr lacks the factor 100."""
    differences = {}
    for name, part in golden.items():
        if not (isinstance(part, dict) and "tok_cands" in part):
            continue  # scores alone, whose texts are elsewhere
        ours = score_tokens(part["tok_cands"], part["tok_refs"])
        place = {key: i for i, key in enumerate(ours.keys)}
        order = [place[key] for key in part["ids"]]
        pairs = [
            (ours.cider / 100, part["corpus"]["CIDEr"]),
            (ours.rouge_l, part["corpus"]["ROUGE_L"]),
            *zip(ours.bleu, part["corpus"]["Bleu"], strict=True),
            *zip((ours.cider_per_image[i] / 100 for i in order), part["cider"], strict=True),
            *zip((ours.rouge_l_per_image[i] for i in order), part["rouge"], strict=True),
        ]
        differences[name] = max(abs(a - b) for a, b in pairs)
    return differences


def stored_texts(golden: dict[str, Any]) -> list[tuple[str, str]]:
    """Raw captions with the original's tokens."""
    pairs: list[tuple[str, str]] = []
    for part in golden.values():
        for raw, tokens in (("refs", "tok_refs"), ("cands", "tok_cands")):
            if isinstance(part, dict) and tokens in part:
                for key, captions in part[raw].items():
                    pairs += zip(captions, part[tokens][key], strict=True)
    return pairs


def corpora(data: Path) -> dict[str, list[str]]:
    """Every caption of the texts and WebDataset tars under `data`, by file name."""
    found = {}
    for path in sorted((data / "texts").glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found[path.name] = [line.rstrip("\n") for line in lines if line.strip()]
    for path in sorted((data / "texts").glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as lines:
            found[path.name] = [row["Prompt"] for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    for path in sorted((data / "flickr8k").glob("*.tar")):
        with tarfile.open(path) as tar:
            files = (tar.extractfile(member) for member in tar if member.name.endswith(".json"))
            found[path.name] = [text for file in files if file for text in json.load(file)["captions"]]
    return found


def run_java(captions: list[str]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokens = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    return [tokens[i][0] for i in range(len(captions))]


def agreement(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    wrong = [(raw, theirs, ours) for raw, theirs in pairs if (ours := tokenize(raw)) != theirs]
    for raw, theirs, ours in wrong[:5]:
        print(f"    {raw!r}\n      original {theirs!r}\n      ours     {ours!r}")
    return {"captions": len(pairs), "different": len(wrong), "agreement": 1 - len(wrong) / len(pairs)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--java", action="store_true", help="also run the original tokenizer")
    options = parser.parse_args()
    golden_file = options.data / "cider_reference" / "golden.json"
    if not golden_file.is_file():
        parser.error(f"{golden_file} is missing: give the folder that holds cider_reference/golden.json")
    if options.java and not shutil.which("java"):
        parser.error("--java needs a Java on the PATH")
    golden = json.loads(golden_file.read_text(encoding="utf-8"))

    scores = check_scores(golden)
    for name, difference in scores.items():
        print(f"scores  {name}: largest difference {difference:.1e}")
    tokens = {"golden.json": agreement(stored_texts(golden))}
    if options.java:
        for name, captions in corpora(options.data).items():
            tokens[name] = agreement(list(zip(captions, run_java(captions), strict=True)))
    for name, result in tokens.items():
        print(f"tokens  {name}: {result['agreement']:.4%} of {result['captions']} captions identical")

    passed = bool(scores) and max(scores.values()) < SCORE_TOLERANCE
    passed = passed and all(result["agreement"] > TOKEN_AGREEMENT for result in tokens.values())
    if options.json:
        options.json.write_text(json.dumps({"passed": passed, "scores": scores, "tokens": tokens}, indent=2) + "\n")
    worst = min(result["agreement"] for result in tokens.values())
    print(
        f"{'PASS' if passed else 'FAIL'}: {len(scores)} score sets within {max(scores.values(), default=0):.1e}, "
        f"tokens identical for at least {worst:.4%} of captions in {len(tokens)} corpora"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
