"""The doctor on the project's own pipeline and on others, with bad input, and without side effects."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments.doctor import Pipeline, Report, Watcher, before, first_steps, report_figure, report_table
from experiments.doctor.__main__ import main
from experiments.doctor.causes.catalogue import CAUSES, causes
from experiments.doctor.examine import examine
from experiments.doctor.pipeline import PipelineParts, build_pipeline
from experiments.doctor.report import BEFORE, FAILED, FIRST_STEPS, NOT_JUDGED, PASSED, UNUSUAL, Finding
from experiments.notebook.demonstration import small_config, small_data, small_network
from experiments.pipeline import Run, RunConfig, build_run, configure, prepare_data
from resnet import NETWORKS
from src.data import ImageData, load_data
from src.runs import CHECKPOINT, RunFolder, load_checkpoint
from src.runs.checkpoint import state_bytes

WIDTHS = (4, 8, 16)


@pytest.fixture(scope="module")
def prepared() -> tuple[RunConfig, ImageData]:
    config = configure("smoke", limit=240, epochs=2, batch_size=24, delay=0, device="cpu", precision="fp32")
    return prepare_data(config)


@pytest.fixture
def pipeline(prepared: tuple[RunConfig, ImageData]) -> Pipeline:
    return build_pipeline(*prepared, replace(PipelineParts(), network=small_network))


def keys(report: Report, name: str) -> list[str]:
    """The causes of the failed finding called `name`."""
    found = [finding for finding in report.findings if finding.name == name and finding.failed]
    assert found, f"{name} did not fail: {report.text(passed=False)}"
    return [cause.key for cause in found[0].causes]


def everything(pipeline: Pipeline) -> dict[str, Any]:
    """All state that an examination might disturb."""
    model, optimizer = pipeline.model, pipeline.optimizer
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "switches": [getattr(module, "enabled", None) for module in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "moments": {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()},
        "random": torch.get_rng_state(),
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_examining_before_training_leaves_every_bit_as_it_was(pipeline: Pipeline) -> None:
    images, labels = pipeline.first_batches(1)[0]
    pipeline.take_step(images, labels, 0.0)  # so that moments and gradients are there
    pipeline.model.layer1.eval()  # type: ignore[operator]
    kept = everything(pipeline)
    before(pipeline)
    first_steps(pipeline)
    now = everything(pipeline)
    assert [name for name in kept if not same(kept[name], now[name])] == []


def test_a_healthy_pipeline_passes_all_four_stages(pipeline: Pipeline, tmp_path: Path) -> None:
    report = examine(pipeline, tmp_path)
    assert report.failed == (), report.text(passed=False)
    stages = {finding.stage for finding in report.findings if finding.status == PASSED}
    assert len(stages) == 4
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("settings", [{"learnable_bit": False}, {"regularization": "decoupled"}, {"peak": 0.0}])
def test_other_forms_of_the_method_raise_no_alarm(
    prepared: tuple[RunConfig, ImageData], settings: dict[str, Any]
) -> None:
    config, data = prepared
    built = build_pipeline(replace(config, **settings), data, replace(PipelineParts(), network=small_network))
    report = before(built) + first_steps(built)
    assert report.failed == (), report.text(passed=False)


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1, "warmup_epochs": 1}, {"stem_bits": 8}])
def test_the_settings_of_the_recipe_raise_no_alarm(
    prepared: tuple[RunConfig, ImageData], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = prepared
    monkeypatch.setitem(NETWORKS, "resnet20", lambda classes, shortcut: small_network(config, data))
    built = Pipeline.of_run(build_run(replace(config, **settings), data))
    report = before(built) + first_steps(built)
    assert report.failed == (), report.text(passed=False)


def test_the_page_shows_a_pipeline_of_ones_own_that_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "doctor.md").read_text(encoding="utf-8")
    example, code = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    assert example == (docs / "doctor_example.py").read_text(encoding="utf-8")
    torch.manual_seed(0)
    place: dict[str, Any] = {}
    exec(code, place)
    assert not place["report"].faulty, capsys.readouterr().out
    assert "DOCTOR: no fault found" in capsys.readouterr().out


@pytest.mark.parametrize("levels", [1, 16], ids=["black", "12 bits read as 16"])
def test_blank_images_are_named_before_their_labels_are_blamed(
    levels: int, prepared: tuple[RunConfig, ImageData], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "test"), "ab", range(120)):
        path = tmp_path / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, levels, (32, 32, 3), dtype=np.uint8)).save(path)
    data = load_data(f"folder:{tmp_path}")
    report = before(build_pipeline(prepared[0], data, replace(PipelineParts(), network=small_network)))
    assert keys(report, "images differ")[0] == "images-blank"
    assert report.diagnosis[0].key == "images-blank", report.text()


def test_another_kind_of_optimizer_than_promised_is_a_finding(pipeline: Pipeline) -> None:
    other = torch.optim.SGD(pipeline.model.parameters(), lr=0.01)
    report = before(replace(pipeline, optimizer=other))
    assert keys(report, "kind of optimizer") == ["other-optimizer"]


def watched(run: Run, *, restart_at: int | None = None, from_step: int = 0) -> Watcher:
    """A watcher of all epochs; a fresh one from step `from_step` of the run on; deaf for two steps from restart_at."""
    watcher, count = Watcher(Pipeline.of_run(run)), 0
    while len(run.history) < run.config.epochs:
        for step in run.steps():
            if count == from_step:
                watcher = Watcher(Pipeline.of_run(run))
            if count >= from_step and (restart_at is None or not restart_at <= count < restart_at + 2):
                watcher.step(len(run.history), step)
            count += 1
        record = run.finish_epoch()
        if count > from_step:
            watcher.epoch(record)
    return watcher


@pytest.mark.parametrize(
    "settings", [{"restart_at": 9}, {"restart_at": 19}, {"from_step": 33}, {"from_step": 40}], ids=str
)
def test_a_watcher_that_misses_steps_raises_no_alarm(settings: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(epochs=4)
    monkeypatch.setitem(NETWORKS, "small", lambda classes, shortcut: small_network(config, small_data()))
    run = build_run(replace(config, model="small"), small_data())
    watcher = watched(run, **settings)
    assert watcher.seen.missed
    report = watcher.report()
    assert not report.faulty, report.text(passed=False)
    statuses = {finding.name: finding.status for finding in report.findings}
    assert statuses["records follow the epochs"] == PASSED
    assert statuses["coefficient applied"] == PASSED
    last = watcher.seen.views[-1]
    watcher.seen.views[-1] = replace(last, record=replace(last.record, coefficient=7.0))
    assert keys(watcher.report(), "coefficient applied")


def test_a_report_puts_failures_of_early_stages_first_and_counts_their_causes() -> None:
    late = Finding("b", "", FIRST_STEPS, "", "", FAILED, causes("no-update", "learning-rate-zero"))
    early = Finding("a", "", BEFORE, "", "", FAILED, causes("learning-rate-zero"))
    passed = Finding("c", "", BEFORE, "", "", PASSED)
    report = Report((late, passed)) + Report((early,))
    assert [finding.name for finding in report.worst_first] == ["a", "b", "c"]
    # learning-rate-zero: 1 from the early stage, 1/2 x 1/2 from the later; no-update: 1/2
    assert [cause.key for cause in report.diagnosis] == ["learning-rate-zero", "no-update"]
    assert report.to_json()["state"] == "faulty"
    assert "[learning-rate-zero]" in report.text()
    *shown, last = report.text().splitlines()
    assert last == report.headline
    assert [line.split()[-1] for line in shown if line.startswith("  FAILED")] == ["a", "b"]
    assert sum(line.startswith("  passed") for line in report.text(passed=True).splitlines()) == 1


def test_the_headline_counts_what_is_unusual_and_says_what_would_let_the_doctor_look() -> None:
    odd = Finding("a", "", BEFORE, "1", "2", UNUSUAL, causes("learning-rate-zero"))
    unseen = [Finding(name, "", BEFORE, "", "no", NOT_JUDGED, needs="tests") for name in "bc"]
    report = Report((odd, *unseen))
    assert not report.faulty
    assert report.diagnosis == ()
    assert report.headline == (
        "DOCTOR: no fault found; 0 checks passed, 1 unusual, 2 not judged; not looked at: the test set (give tests=)"
    )
    assert "unusual" in report.text()
    assert "1 unusual" in report_figure(report).get_label()


def test_every_cause_says_what_it_is_and_what_to_do() -> None:
    for cause in CAUSES.values():
        assert cause.text.endswith("."), cause.key
        assert cause.remedy, cause.key


def test_figure_and_table_show_what_failed() -> None:
    early = Finding("one thing", "", BEFORE, "1", "2", FAILED, causes("learning-rate-zero"))
    report = Report((early, Finding("another", "", FIRST_STEPS, "", "", PASSED)))
    figure = report_figure(report, subtitle="a test")
    assert "1 of 2 checks failed" in figure.get_label()
    assert "one thing" in " ".join(text.get_text() for text in figure.axes[0].texts)
    table = report_table(report).to_html()
    assert "learning rate is 0" in table
    assert "rgba(" in table
    assert "color: #" not in table, "a text colour of its own would be unreadable on a dark page"
    marked = report_table(Report((replace(early, measured="in `weights` <3"),))).to_html()
    assert "in <code>weights</code> &lt;3" in marked


def test_bad_input_of_the_command_is_exit_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path / "nothing")]) == 2
    assert main(["--preset", "nonsense"]) == 2
    assert "error:" in capsys.readouterr().err


def test_the_example_of_a_plain_script_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pipeline", "docs.doctor_example:pipeline"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("DOCTOR: no fault found; "), told.out
    assert "the training (give epochs=)" in told.out
    assert "[2/4] first steps: " in told.err


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("train", "need MODULE:FUNCTION"),
        ("nowhere.train:pipeline", "there is no module 'nowhere'"),
        ("made_up:other", "module made_up has no function 'other'"),
        ("made_up:number", "number() returned int; return Pipeline.of_parts"),
        ("imports:pipeline", "there is no module 'not_installed'"),
    ],
)
def test_a_function_that_gives_no_pipeline_is_told(
    place: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "made_up.py").write_text("def number(): return 3")
    (tmp_path / "imports.py").write_text("import not_installed")
    assert main(["--pipeline", place]) == 2
    assert told in capsys.readouterr().err


def test_a_finished_run_is_examined_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, data = prepare_data(configure("smoke", limit=60, epochs=1, batch_size=30, device="cpu"))
    run = build_run(config, data)
    watched(run)
    folder = RunFolder.open(tmp_path / "run")
    folder.save_progress(run.model, run.optimizer, run.progress, asdict(config), data.digest)

    assert main(["--run", str(folder.path)]) == 0, capsys.readouterr().out
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith("DOCTOR: no fault found; ")
    assert main(["--run", str(folder.path), "--all"]) == 0
    *every, last = capsys.readouterr().out.splitlines()
    assert last == told
    assert len(every) > 10
    state = load_checkpoint(folder.path / CHECKPOINT)
    state["history"]["records"][-1]["unstructured_sparsity"] += 0.1
    (folder.path / CHECKPOINT).write_bytes(state_bytes(state))
    assert main(["--run", str(folder.path)]) == 1
    assert "sparsity" in capsys.readouterr().out


def test_the_first_check_that_failed_is_heard_however_many_follow() -> None:
    """One early finding names a source; three of the same stage name what followed from it."""
    source = Finding("one thing", "", BEFORE, "", "", FAILED, causes("network-differs"))
    followed = Finding("another", "", BEFORE, "", "", FAILED, causes("penalty-wrong", "penalty-scaled"))
    report = Report((source, followed, followed, followed))
    # votes: penalty-wrong 3, penalty-scaled 3/2, network-differs 1
    assert [cause.key for cause in report.diagnosis] == ["penalty-wrong", "network-differs", "penalty-scaled"]
    assert Report((followed, source)).diagnosis[0].key == "penalty-wrong"
