"""Run the exported student on images: one model that answers for all three teachers.

Usage: python examples/demo/use.py [EXPORTED] [IMAGES]
"""

import argparse
from pathlib import Path

import torch

from trainer import load_student

FIRST_TEST_IMAGE = 1297  # train_teachers.py never saw the images from this number on
LABELS = {"low": [0, 1, 2, 3, 4, None], "high": [5, 6, 7, 8, 9, None]}
SHOWN = 4


def main() -> None:
    """Name every test image's digit by the two inherited classifiers, and show some of the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", nargs="?", type=Path, default=Path("build/demo/exported"))
    parser.add_argument("images", nargs="?", type=Path, default=Path("build/demo/digits"))
    arguments = parser.parse_args()
    student = load_student(arguments.exported)
    files = [file for file in sorted(arguments.images.glob("*/*.png")) if int(file.stem) >= FIRST_TEST_IMAGE]
    with torch.inference_mode():
        answer = student(files)
    scores = torch.full((len(files), 10), -torch.inf)
    for name, labels in LABELS.items():
        log_probability = answer["teachers"][name]["logits"].log_softmax(dim=1)
        for column, label in enumerate(labels):
            if label is not None:
                scores[:, label] = log_probability[:, column]
    digits = torch.tensor([int(file.parent.name) for file in files])
    for place in range(0, len(files), len(files) // SHOWN):
        print(f"  {files[place]}: {scores[place].argmax()}")
    print(f"  features {tuple(answer['global'].shape)} and {tuple(answer['patch'].shape)}")
    print(f"  digits named right: {(scores.argmax(dim=1) == digits).float().mean():.1%} of {len(files)} test images")


if __name__ == "__main__":
    main()
