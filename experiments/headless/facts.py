"""What a page says about its run at the top: verdict, results, date, configuration, device, versions.

The notebook publishes these facts beside an output that it shows anyway, under a type that only the page reads, so
they travel with the executed notebook and are never those of another run. What was not published is said to be absent.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbformat import NotebookNode

STATES = {"healthy": "Healthy", "faulty": "Fault found", "inconclusive": "Inconclusive"}
STOPPED, NO_VERDICT = "stopped", "no-verdict"


@dataclass(frozen=True)
class Header:
    """The head of a page.

    state: healthy, faulty, inconclusive, stopped or no-verdict. verdict: that in words; detail: one sentence on it.
    results: name and value of the run's numbers. rows: name and text of everything else. settings: the command and the
    whole configuration.
    """

    state: str
    verdict: str
    detail: str
    results: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]


def published(notebook: NotebookNode) -> dict[str, Any]:
    """The facts in the outputs of an executed notebook, merged in the order of its cells."""
    from experiments.notebook import FACTS  # loads torch

    facts: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found = output.get("data", {}).get(FACTS)
            if isinstance(found, Mapping):
                facts.update(found)
    return facts


def header(notebook: NotebookNode) -> Header:
    """The head of the page of an executed notebook: its facts and the runner's `notebook.metadata["run"]`."""
    facts, run = published(notebook), notebook.metadata.get("run", {})
    state, verdict, detail = _verdict(facts.get("verdict", {}), run)
    config, machine, versions = (facts.get(name, {}) for name in ("config", "machine", "versions"))
    rows = [
        ("Date", _date(run.get("started") or facts.get("recorded", ""), run.get("seconds"))),
        ("Network", _network(facts)),
        ("Settings", _settings(config)),
        ("Device", _device(machine)),
        ("Versions", ", ".join(f"{name} {versions[name]}" for name in sorted(versions, key=_version_order))),
    ]
    settings = [(name, _plain(value)) for name, value in config.items() if name != "given"]
    if run.get("command"):
        settings.insert(0, ("command", run["command"]))
    shown = tuple((name, text or "not recorded") for name, text in rows)
    return Header(state, verdict, detail, _results(facts.get("results", {})), shown, tuple(settings))


def _verdict(judged: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[str, str, str]:
    if run.get("status") == "failed":
        where = str(run.get("message", "")).partition("\n")[0]
        return STOPPED, "Stopped before the end", f"{where}. There is no verdict." if where else "There is no verdict."
    if judged.get("state") not in STATES:
        return NO_VERDICT, "No verdict", "The notebook that this page was made from holds none."
    headline = str(judged.get("headline", ""))
    sentence = headline.partition(": ")[2] or headline
    return judged["state"], STATES[judged["state"]], sentence[:1].upper() + sentence[1:]


def _results(results: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    shares = {
        "accuracy_float32": "test accuracy",
        "unstructured_sparsity": "weights that are zero",
        "structured_sparsity": "dead channels",
    }
    found = [(label, f"{100 * results[name]:.1f} %") for name, label in shares.items() if name in results]
    if "mean_bits" in results:
        found.append(("bits on average", f"{results['mean_bits']:.1f}"))
    if results.get("structured_mac_ratio"):
        found.append(("fewer MACs", f"{results['structured_mac_ratio']:.2f}×"))
    return tuple(found)


def _date(started: str, seconds: float | None) -> str:
    from experiments.notebook import duration

    try:
        moment = datetime.datetime.fromisoformat(started).astimezone(datetime.UTC)
    except ValueError:
        return ""
    took = f", took {duration(seconds)}" if seconds is not None else ""
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC{took}"


def _network(facts: Mapping[str, Any]) -> str:
    config, data = facts.get("config", {}), facts.get("data", {})
    images = [f"{data[f'{part}_images']:,} {part}" for part in ("train", "test") if f"{part}_images" in data]
    title = data.get("title") or data.get("name") or config.get("data", "")
    if not title:
        return str(config.get("model", ""))
    counts = f" ({' and '.join(images)} images)" if images else ""
    return f"{config.get('model', 'network')} on {title}{counts}"


def _settings(config: Mapping[str, Any]) -> str:
    named = {"preset": "preset", "epochs": "epochs", "batch_size": "batch size", "limit": "limit", "seed": "seed"}
    return ", ".join(f"{label} {config[name]}" for name, label in named.items() if config.get(name) is not None)


def _device(machine: Mapping[str, Any]) -> str:
    name, kind = machine.get("device_name", ""), machine.get("device", "")
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}" if "threads" in machine else ""
    return _joined(
        [f"{kind} ({name})" if name else kind, machine.get("precision", ""), threads, machine.get("system", "")]
    )


def _version_order(name: str) -> tuple[int, str]:
    """Python and torch first; a saved notebook has its keys in the order of the alphabet."""
    first = ("python", "torch")
    return (first.index(name) if name in first else len(first), name)


def _joined(parts: list[str]) -> str:
    return ", ".join(part for part in parts if part)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
