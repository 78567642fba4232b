"""A plain PyTorch script, and the function that shows it to the doctor.

python -m experiments.doctor --pipeline docs.doctor_example:pipeline
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from experiments.doctor import Expected, Pipeline


def dataset(count, seed):
    """Images of ten classes, each with a pattern of its own under noise: put your data set here."""
    patterns = torch.randint(0, 256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=random)
    noise = torch.randint(0, 256, (count, 3, 32, 32), generator=random).float()
    return (0.3 * patterns[labels] + 0.7 * noise).to(torch.uint8), labels


def pipeline():
    """The parts of the script, for the doctor: a network, its optimizer, its loaders and one step."""
    torch.manual_seed(0)
    (images, labels), (test_images, test_labels) = raw = dataset(640, seed=1), dataset(200, seed=2)
    normalised, tests = ((x.float() / 255 - 0.5) / 0.2 for x in (images, test_images))
    loader = DataLoader(TensorDataset(normalised, labels), batch_size=64, shuffle=True)
    test_loader = DataLoader(TensorDataset(tests, test_labels), batch_size=100)
    model = resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step(images, labels):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    promise = Expected(quantized=(), num_classes=10, input_size=(3, 32, 32), lambda_dz=0.0, lambda_bit=0.0)
    return Pipeline.of_parts(model, optimizer, loader, step, tests=test_loader, data=raw, expected=promise)
