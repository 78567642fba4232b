"""The command from end to end, on a run made here, and everything that it must refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from experiments import debug_run, export
from experiments.export import main
from experiments.pipeline import SavedRun, compress, evaluate_run, load_run
from src.data import load_data, normalize
from src.export import open_session, run_onnx, unpack
from src.runs import load_checkpoint
from src.runs.checkpoint import state_bytes
from src.training import evaluate
from utils_quantization import toggle_quantization


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "out"
    settings = ["--data", "digits", "--epochs", "1", "--limit", "100", "--device", "cpu", "--output", str(path)]
    assert debug_run.main(settings) in (0, 1)  # one epoch is too few for a verdict of health
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


def test_end_to_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    packed, onnx = run / "model.cdq", run / "model.onnx"
    assert f"{packed.stat().st_size:,}" in printed
    assert f"{onnx.stat().st_size:,} bytes" in printed
    assert "times smaller than the FP32 state" in printed
    assert printed.count("[ok]") == 3
    assert "FAILED" not in printed
    network, saved = unpack(packed), SavedRun.open(run)
    model = saved.network()
    data = load_data("digits", limit=100)
    accuracy = json.loads((run / "run.json").read_text())["results"]["accuracy_float32"]
    right = round(100 * accuracy)
    assert evaluate(network, data)[1] == evaluate(model, data)[1] == accuracy
    assert f"quantized network {right} of 100 right, unpacked {right}, 0 predictions differ" in printed
    assert saved.config.preset == "smoke"


def test_named_files_and_force(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, onnx = tmp_path / "a" / "net.cdq", tmp_path / "a" / "net.onnx"
    arguments = [str(run), "--packed", str(packed), "--onnx", str(onnx)]
    assert main(arguments) == 0
    assert not (run / "model.cdq").exists()
    written = packed.read_bytes(), onnx.read_bytes()
    onnx.write_bytes(b"precious")
    packed.chmod(0o400)  # and so it stays, where the file is left as it is
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count(str(onnx)) == error.count("--force") == 1
    assert onnx.read_bytes() == b"precious"
    assert main([*arguments, "--force"]) == 0
    assert f"{packed} was there already, the same, and is left as it is\n" in capsys.readouterr().out
    assert (packed.read_bytes(), onnx.read_bytes()) == written  # the same run gives the same files
    assert packed.stat().st_mode & 0o777 == 0o400
    assert main([str(run), "--packed", str(run / "x"), "--onnx", str(run / "x")]) == 2
    assert "named twice" in capsys.readouterr().err


def test_the_file_that_the_notebook_wrote_is_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = load_run(run, device="cpu")
    dense = SavedRun.open(run).network()
    toggle_quantization(dense, False)
    compress(saved, dense, evaluate_run(saved)[0], run / "model.cdq")
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is left as it is") == printed.count("model.cdq was there already") == 1


def test_int8_says_what_it_costs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    int8 = tmp_path / "int8.onnx"
    status = main([str(run), "--int8", str(int8)])
    printed = capsys.readouterr().out
    data, network = load_data("digits", limit=100), unpack(run / "model.cdq")
    logits = run_onnx(open_session(int8), normalize(data.test_images, data.mean, data.std))
    right = int((logits.argmax(1) == data.test_labels).sum())
    float32 = round(100 * evaluate(network, data)[1])
    assert f"right of 100 test images: float32 {float32} (" in printed
    assert f", int8 {right} (" in printed
    assert f"[{'FAILED' if float32 > right else 'ok'}] int8 costs at most half a point" in printed
    assert status == (float32 > right)
    # untrained bits and channels: 18 layers at 8 bits, stem (3*16*9*1024 MACs) and linear (640) at 32
    rest = 3 * 16 * 9 * 1024 + 640
    bops = ((40_551_040 - rest) * 8 + rest * 32) / 1e9
    assert f"learned bits: {32 * bops:.2f} G, with 8-bit activations {8 * bops:.2f} G" in printed


@pytest.mark.slow
def test_int8_of_a_trained_network_loses_at_most_half_a_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "out"
    assert debug_run.main(["--data", "digits", "--epochs", "6", "--device", "cpu", "--output", str(run)]) in (0, 1)
    assert main([str(run), "--int8", str(tmp_path / "int8.onnx")]) == 0
    assert "[ok] int8 costs at most half a point" in capsys.readouterr().out


def test_interrupted_run_has_no_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "run.json").unlink()
    assert main([str(run)]) == 0
    assert "of 100 right" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["digits", "cifar10"])
def test_without_the_runs_images_noise_is_used_and_nothing_is_downloaded(
    source: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(run / "checkpoint.pt")
    state["config"]["data"] = source
    (run / "checkpoint.pt").write_bytes(state_bytes({**state, "data_digest": "0" * 64}))
    (run / "run.json").unlink()
    assert main([str(run), "--data-root", str(tmp_path / "empty")]) == 0
    captured = capsys.readouterr()
    assert (
        main([str(run), "--int8", str(tmp_path / "int8.onnx"), "--data-root", str(tmp_path / "empty"), "--force"]) == 2
    )
    assert "--int8 needs the images that the run was trained on" in capsys.readouterr().err
    assert not (tmp_path / "int8.onnx").exists()
    assert "was trained on other images" in captured.err
    assert "test set is not here" in captured.err
    assert "on 256 images" in captured.out
    assert not (tmp_path / "empty").exists()


def test_failed_check_is_status_1(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_weight_off(path: Path) -> torch.nn.Module:
        network = unpack(path)
        with torch.no_grad():
            next(network.parameters()).view(-1)[0] += 1e-6
        return network

    monkeypatch.setattr(export, "unpack", one_weight_off)
    assert main([str(run)]) == 1
    assert "[FAILED] the packed file, read again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda run: (run / "checkpoint.pt").unlink(), "holds no run: "),
        (lambda run: shutil.rmtree(run), "holds no run: "),
        (lambda run: (run / "checkpoint.pt").write_bytes(b"\x80\x02nothing"), "cannot be read"),
        (lambda run: _edit(run, "config", colour="red"), "unexpected keyword argument 'colour'"),
        (lambda run: _edit(run, "config", model="resnet21"), "resnet21"),
        (lambda run: _edit(run, "config", model="resnet32"), "another architecture"),
        (lambda run: _edit(run, "config", model="resnet110", shortcut="C"), "shortcut"),
        (lambda run: _edit(run, "model", **{"linear.bias": torch.zeros(7)}), "another architecture"),
        (lambda run: _edit(run, "model", **{"bn1.bias": torch.zeros(16, dtype=torch.float64) / 0}), ""),
    ],
)
def test_bad_runs(run: Path, harm: object, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(harm)
    harm(run)
    if words:
        assert main([str(run)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert not (run / "model.cdq").exists()
    else:
        assert main([str(run)]) in (1, 2)  # not a number anywhere is never passed as equal


def _edit(run: Path, part: str, **values: object) -> None:
    state = load_checkpoint(run / "checkpoint.pt")
    state[part].update(values)
    (run / "checkpoint.pt").write_bytes(state_bytes(state))
