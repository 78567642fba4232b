"""Images in memory as uint8: CIFAR-10, the embedded digits and a user's own folders, with batched augmentation.

Downloads are checked against the official md5. A source gives arrays; `ImageData` puts them on a device.
"""

from src.data.cifar10 import CIFAR10_MEAN, CIFAR10_STD
from src.data.dataset import (
    ImageData,
    augment,
    check_source,
    epoch_batches,
    load_data,
    normalize,
    steps_per_epoch,
    test_batches,
)
from src.data.image_sources import DataError, read_digits

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "DataError",
    "ImageData",
    "augment",
    "check_source",
    "epoch_batches",
    "load_data",
    "normalize",
    "read_digits",
    "steps_per_epoch",
    "test_batches",
]
