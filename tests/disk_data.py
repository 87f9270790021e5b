"""Small data sets on disk: the same kind of images as an image folder, a COCO json and a semantic set."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, COUNT = 64, 8
NAMES = ("cat", "dog", "eel")


def draw(rng: np.random.Generator, label: int) -> tuple[np.ndarray, list[int]]:
    """An image with one bright square of the label's colour, and its box (x, y, width, height)."""
    image = rng.integers(0, 90, (SIZE, SIZE, 3), dtype=np.uint8)
    x, y = (int(value) for value in rng.integers(4, 28, 2))
    image[y : y + 28, x : x + 28, label] = 250
    return image, [x, y, 28, 28]


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_data(root: Path) -> None:
    """An image folder, a COCO json and a semantic set with the same kind of images."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(COUNT):
        label = number % len(NAMES)
        image, (x, y, w, h) = draw(rng, label)
        save(root / "pics" / NAMES[label] / f"{number}.png", image)
        save(root / "boxes" / f"{number}.png", image)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append(
            {
                "id": number + 1,
                "image_id": number,
                "category_id": label + 1,
                "bbox": [x, y, w, h],
                "segmentation": outline,
                "area": w * h,
                "iscrowd": 0,
            }
        )
        save(root / "areas/images" / f"{number}.png", image)
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[y : y + h, x : x + w] = label
        save(root / "areas/labels" / f"{number}.png", mask)
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(content))
