"""Turn a finished run into a packed file and an ONNX file, and check that both compute what was evaluated.

    python -m experiments.export debug_output
    python -m experiments.export debug_output --onnx small.onnx --int8 int8.onnx --multiple-of 8

RUN is the output folder of experiments.debug_run. Both files go into it (model.cdq, model.onnx) unless named. Checks:
the packed file is read again and compared with the compacted network, bit for bit; on the run's test set, where it can
be had without a download, the unpacked network must be right on the same images as the network that was evaluated, and
ONNX Runtime must predict the same as PyTorch with logits within 1e-3; otherwise on images of noise. --int8 writes a
third file, which computes in 8-bit integers, and may cost at most half a point of accuracy on the test set. The ONNX
files keep a multiple of N channels (8) in every layer that loses some, with the same outputs: that runs faster. A file
that would be the same as the one that is there is left; one that would differ is written over with --force only.
Exit status: 0 written and equal, 1 a check failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.pipeline import SavedRun
from metrics import QuantizationComparison
from src.data import ImageData, normalize
from src.export import check_onnx, compact_with_indices, export_int8, export_onnx, pack, unpack
from src.pruning import CompactNetwork
from src.storage import CommandParser, StorageError, check_output, fail, log_info
from src.training import predict

EQUAL, DIFFERENT = 0, 1
PACKED, ONNX = "model.cdq", "model.onnx"
NOISE_IMAGES = 256
CALIBRATION_IMAGES = 512
FAST_MULTIPLE = 8  # docs/compression.md: 15 % less time in ONNX Runtime than with the exact number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    run = Path(options.run)
    try:
        saved = SavedRun.open(run)
        packed, onnx = Path(options.packed or run / PACKED), Path(options.onnx or run / ONNX)
        int8 = Path(options.int8) if options.int8 else None
        wishes = {name: getattr(options, name) for name in ("multiple_of", "data_root", "force")}
        return export(saved, packed, onnx, int8, **wishes)
    except ValueError as error:  # every error of the library that bad input can cause is one
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or options.run!r}: {error.strerror or error}")


def export(
    saved: SavedRun,
    packed: Path,
    onnx: Path,
    int8: Path | None = None,
    *,
    multiple_of: int = FAST_MULTIPLE,
    data_root: str | None = None,
    force: bool = False,
) -> int:
    """Write the files, print what is in them and how each check came out, and return the exit status.

    multiple_of, data_root, force: the command's options. Raises ValueError for a network that cannot be exported, and
    StorageError where int8 is asked for and the run's images are not here, before anything is written; StorageError,
    too, at a file that holds something else and is not forced.
    """
    model = saved.network()
    outputs = [packed, onnx, *([int8] if int8 else [])]
    if len({path.absolute() for path in outputs}) < len(outputs):
        raise StorageError(f"one file is named twice among {', '.join(map(str, outputs))}; name different files")
    for path in outputs:
        check_output(path)
    data = _data(saved, data_root, needed=int8 is not None)
    compacted, rounded = compact_with_indices(model), compact_with_indices(model, multiple_of=multiple_of)
    quantized = None
    if int8 and data:
        training = data.train_images[:: -(-len(data.train_images) // CALIBRATION_IMAGES)]  # of every class
        calibration, images = (normalize(each, data.mean, data.std) for each in (training, data.test_images))
        quantized = export_int8(rounded, int8, calibration, images, data.test_labels, force=force)
    in_file, in_onnx = pack(compacted, packed, force=force), export_onnx(rounded, onnx, force=force)
    print(f"{in_file.text()}\n\n{in_onnx.text()}")
    print(f"Its layers keep multiples of {multiple_of} channels where any were removed (--multiple-of).\n")
    network = unpack(packed)
    same = _same_state(network, compacted.network)
    checks = {"the packed file, read again, holds the compacted network bit for bit": same}
    if data is None:
        images = torch.randn(NOISE_IMAGES, *network.input_size, generator=torch.Generator().manual_seed(0))
        log_info(f"the run's test set is not here: checking on {NOISE_IMAGES} images of noise")
    else:
        images = normalize(data.test_images, data.mean, data.std)
        before, after = (predict(each, data)[0] for each in (model, network))
        right = [int((each == data.test_labels).sum()) for each in (before, after)]
        differing, count = int((before != after).sum()), len(before)
        name = f"test set, {data.title}: quantized network {right[0]:,} of {count:,} right, unpacked {right[1]:,}"
        checks[f"{name}, {differing} predictions differ"] = differing == 0
    compared = check_onnx(onnx, network, images)
    checks[compared.text()] = compared.passed
    if quantized:
        bops = [
            QuantizationComparison(b_a=bits, multiple_of=multiple_of).calculate_stats(model).total_bops / 1e9
            for bits in (32, 8)
        ]
        print(quantized.text())
        print(f"BOPs, weights at their learned bits: {bops[0]:.2f} G, with 8-bit activations {bops[1]:.2f} G\n")
        checks["int8 costs at most half a point of accuracy"] = quantized.passed
    for report in (in_file, in_onnx, quantized):
        if report and not report.written:
            print(f"{report.path} was there already, the same, and is left as it is")
    for words, passed in checks.items():
        print(f"[{'ok' if passed else 'FAILED'}] {words}")
    return EQUAL if all(checks.values()) else DIFFERENT


def _same_state(network: CompactNetwork, other: CompactNetwork) -> bool:
    """Whether two networks have the same description and, byte for byte, the same state."""
    mine, theirs = (
        {name: (tensor.dtype, tensor.contiguous().numpy().tobytes()) for name, tensor in each.state_dict().items()}
        for each in (network, other)
    )
    return network.description == other.description and mine == theirs


def _data(saved: SavedRun, data_root: str | None, needed: bool) -> ImageData | None:
    try:
        return saved.load_data(data_root)
    except (ValueError, OSError) as error:
        if needed:
            raise StorageError(f"--int8 needs the images that the run was trained on: {error}") from error
        log_info(str(error))
        return None


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("experiments.export", __doc__)
    parser.add_argument("run", metavar="RUN", help="output folder of experiments.debug_run")
    parser.add_argument("--packed", metavar="F", help=f"the packed file (default: {PACKED} in RUN)")
    parser.add_argument("--onnx", metavar="F", help=f"the ONNX file (default: {ONNX} in RUN)")
    parser.add_argument("--int8", metavar="F", help="an ONNX file that computes in 8-bit integers (default: none)")
    parser.add_argument(
        "--multiple-of",
        type=int,
        default=FAST_MULTIPLE,
        metavar="N",
        help=f"channels that the ONNX files keep in a layer are a multiple of N (default: {FAST_MULTIPLE})",
    )
    parser.add_argument("--data-root", help="where the run's data is (default: where it was when the run was trained)")
    parser.add_argument("--force", action="store_true", help="write over a file that holds something else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
