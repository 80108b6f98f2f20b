"""Write scikit-learn's handwritten digits as PNG files: FOLDER/<digit>/<number>.png, 1,797 grey images of 8 x 8.

Usage: python examples/demo/write_digits.py FOLDER
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

INK_LEVELS = 16


def write_digits(folder: Path) -> int:
    """Write every image and return how many there are; the number in a name is the place in the data set."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / INK_LEVELS)).astype(np.uint8)
    for number, (image, digit) in enumerate(zip(pixels, digits.target, strict=True)):
        path = folder / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return len(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(f"{write_digits(folder)} images of handwritten digits in {folder}")


if __name__ == "__main__":
    main()
