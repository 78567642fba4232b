"""The test accuracy by a loop of its own."""

from __future__ import annotations

import torch

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.reference.objective import cross_entropy
from experiments.doctor.runner import NotApplicable
from src.training import autocast
from utils_quantization import eval_mode, shared_quantized_weights

ACCURACY_CLOSE = {torch.float32: 5e-4, torch.bfloat16: 5e-3}  # beside half an image


@torch.no_grad()
def accuracy_by_hand(pipeline: Pipeline, precision: torch.dtype) -> tuple[int, int, float]:
    """Right answers, images, and mean cross entropy over the whole test set. Raises NotApplicable without one."""
    if pipeline.test_batches is None:
        raise NotApplicable("there is no test set", "tests")
    right = count = 0
    loss = 0.0
    with eval_mode(pipeline.model), shared_quantized_weights(pipeline.model):
        for images, labels in pipeline.test_batches(pipeline):
            images, labels = images.to(pipeline.device), labels.to(pipeline.device)
            with autocast(images.device, precision):
                scores = pipeline.model(images)
            scores = scores.float()
            right += sum(a == b for a, b in zip(scores.argmax(1).tolist(), labels.tolist(), strict=True))
            loss += float(cross_entropy(scores, labels)) * len(labels)
            count += len(labels)
    if not count:
        raise NotApplicable("the test set is empty")
    return right, count, loss / count
