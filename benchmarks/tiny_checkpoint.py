"""What the tiny checkpoint knows, measured on rendered scenes that no training saw.

python benchmarks/tiny_checkpoint.py --closest 500 --malformed 1024 --out benchmarks/results/tiny_checkpoint.json

The closest of 3, 4 and 5 marked points is asked on sets without shortcuts, and once more with the depth span replaced:
by the true codes (oracle), random ones, those of another picture, and its own first code repeated.
The share of malformed spans is that of answers sampled at temperature 1 with the grammar switched off.
"""

import argparse
import json
import time

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.files import out_file, write_json
from perceptio_hf.lab.ablation.figures import closest_scores, spans_without_grammar
from perceptio_hf.lab.held_out import answer_items, held_out_items, score_items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint; default: the embedded one")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--closest", type=int, default=0, help="questions for the closest of 3, 4 and 5 points each")
    parser.add_argument("--malformed", type=int, default=0, help="answers about depth sampled without the grammar")
    parser.add_argument("--out", type=out_file, help="JSON file to write")
    options = parser.parse_args()
    folder = options.model or perceptio_hf.tiny_checkpoint()
    torch.set_num_threads(1)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    items = held_out_items(options.scenes)
    start = time.perf_counter()
    answers = answer_items(model, processor, items, progress=tqdm)
    seconds = time.perf_counter() - start
    scores = {"scenes": options.scenes, "questions": len(items)}
    scores |= {name: round(value, 4) for name, value in score_items(items, answers).items()}
    if options.closest:
        found = closest_scores(model, processor, options.closest, options.closest)
        scores |= {name: round(value, 4) for name, value in found.items()}
    if options.malformed:
        found = spans_without_grammar(model, processor, items, options.malformed)
        scores |= {name: round(value, 4) for name, value in found.items()}
    print(json.dumps(scores, indent=2))
    print(f"{len(items)} answers in {seconds:.0f} s on one thread")
    if options.out:
        write_json(options.out, scores)


if __name__ == "__main__":
    main()
