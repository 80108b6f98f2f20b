"""Train the demo's three teachers on the first 1,297 handwritten digits and test them on the last 500.

`general` learns which way up an image is (no label is used); `low` learns the digits 0 to 4 and "other", `high` the
digits 5 to 9 and "other". One thread and one seed: the same torch on the same processor gives the same weights.

Usage: python examples/demo/train_teachers.py FOLDER [--out examples/demo/weights]
where FOLDER is what write_digits.py wrote.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from tiny_cnn import general, specialist
from torch import nn
from torch.nn import functional

TRAINING_IMAGES = 1297
BATCH = 64
OTHER = 5

# Maps images [B, 3, H, W] and digits [B] to what one teacher is shown and should answer.
Task = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def all_rotations(images: torch.Tensor, digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    """Every image turned by 0, 90, 180 and 270 degrees; the answer is the number of quarter turns."""
    turned = torch.cat([torch.rot90(images, turns, dims=(2, 3)) for turns in range(4)])
    return turned, torch.arange(4).repeat_interleave(len(images))


def digits_from(first: int) -> Task:
    """The images as they are; the answer is which of five digits from `first` each shows, or `OTHER`."""

    def task(images: torch.Tensor, digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mine = (digits >= first) & (digits < first + OTHER)
        return images, torch.where(mine, digits - first, OTHER)

    return task


# Factory, task and epochs; an epoch of all rotations has four times the images.
TEACHERS: dict[str, tuple[Callable[[], nn.Module], Task, int]] = {
    "general": (general, all_rotations, 15),
    "low": (specialist, digits_from(0), 60),
    "high": (specialist, digits_from(5), 60),
}


def load_images(folder: Path, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """All images [N, 3, H, W] as `model` wants them, and their digits [N], in the order of the data set."""
    transform = create_transform(**model.data_config, is_training=False)
    paths = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    if len(paths) <= TRAINING_IMAGES:
        raise SystemExit(f"{folder}: found {len(paths)} images; write them with examples/demo/write_digits.py first")
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    return images, torch.tensor([int(path.parent.name) for path in paths])


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Each image moved by up to an eighth of its size, so that the little data goes further."""
    size = images.shape[-1]
    reach = size // 8
    padded = functional.pad(images, (reach, reach, reach, reach), mode="replicate")
    corners = torch.randint(0, 2 * reach + 1, (len(images), 2)).tolist()
    return torch.stack(
        [image[:, top : top + size, left : left + size] for image, (top, left) in zip(padded, corners, strict=True)]
    )


def train(model: nn.Module, task: Task, epochs: int, images: torch.Tensor, digits: torch.Tensor) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            inputs, answers = task(shifted(images[rows]), digits[rows])
            loss = functional.cross_entropy(model.head(model(inputs)["global"]), answers, label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


@torch.inference_mode()
def accuracy(model: nn.Module, task: Task, images: torch.Tensor, digits: torch.Tensor) -> float:
    model.eval()
    inputs, answers = task(images, digits)
    return (model.head(model(inputs)["global"]).argmax(dim=1) == answers).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, (factory, task, epochs) in TEACHERS.items():
        torch.manual_seed(0)
        model = factory()
        images, digits = load_images(arguments.folder, model)
        start = time.perf_counter()
        train(model, task, epochs, images[:TRAINING_IMAGES], digits[:TRAINING_IMAGES])
        seconds = time.perf_counter() - start
        correct = accuracy(model, task, images[TRAINING_IMAGES:], digits[TRAINING_IMAGES:])
        path = arguments.out / f"{name}.safetensors"
        save_file(model.state_dict(), path)
        print(f"{name}: {correct:.1%} of the test images, {seconds:.0f} s, {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
