"""What a page says about its run at the top: verdict, results, date, configuration, device, versions.

The notebook publishes these facts beside an output that it shows anyway, under a type that only the page reads, so
they travel with the executed notebook and are never those of another run. What was not published is said to be absent.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from nbformat import NotebookNode

STATES = {"healthy": "Healthy", "faulty": "Fault found", "inconclusive": "Inconclusive"}
RESULTS = {  # name in run.json: label, factor, format
    "accuracy_float32": ("test accuracy", 100, "{:.1f} %"),
    "unstructured_sparsity": ("weights that are zero", 100, "{:.1f} %"),
    "structured_sparsity": ("dead channels", 100, "{:.1f} %"),
    "mean_bits": ("bits on average", 1, "{:.1f}"),
    "structured_mac_ratio": ("fewer MACs", 1, "{:.2f}×"),
}
SETTINGS = ("preset", "epochs", "batch_size", "limit", "seed")


def header(notebook: NotebookNode) -> dict[str, Any]:
    """The head of the page of an executed notebook, from its facts and the runner's `notebook.metadata["run"]`.

    state: healthy, faulty, inconclusive, stopped or no-verdict. verdict: that in words; detail: one sentence on it.
    results, rows: label and text. settings: the command and the whole configuration.
    """
    facts, run = published(notebook), notebook.metadata.get("run", {})
    config, machine, versions, results = (facts.get(key, {}) for key in ("config", "machine", "versions", "results"))
    device, name, threads = (machine.get(key, "") for key in ("device", "device_name", "threads"))
    parts = [
        f"{device} ({name})" if name else device,
        machine.get("precision"),
        threads and f"{threads} thread{'s' if threads > 1 else ''}",
        machine.get("system"),
    ]
    order = sorted(versions, key=lambda name: ({"python": 0, "torch": 1}.get(name, 2), name))
    rows = {
        "Date": _date(run.get("started") or facts.get("recorded", ""), run.get("seconds")),
        "Network": _network(config, facts.get("data", {})),
        "Settings": ", ".join(f"{n.replace('_', ' ')} {config[n]}" for n in SETTINGS if config.get(n) is not None),
        "Device": ", ".join(part for part in parts if part),
        "Versions": ", ".join(f"{name} {versions[name]}" for name in order),
    }
    settings = {"command": run["command"]} if run.get("command") else {}
    for name, value in config.items():
        if name != "given":
            settings[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return {
        **_verdict(facts.get("verdict", {}), run),
        "results": {
            label: form.format(factor * results[name])
            for name, (label, factor, form) in RESULTS.items()
            if results.get(name) is not None
        },
        "rows": {name: text or "not recorded" for name, text in rows.items()},
        "settings": settings,
    }


def published(notebook: NotebookNode) -> dict[str, Any]:
    """The facts in the outputs of an executed notebook, merged in the order of its cells."""
    from experiments.notebook import FACTS  # loads torch

    facts: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            facts.update(output.get("data", {}).get(FACTS, {}))
    return facts


def _verdict(judged: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    if run.get("status") == "failed":
        where = f"{run['message'].partition(chr(10))[0]}. " if run.get("message") else ""
        return {"state": "stopped", "verdict": "Stopped before the end", "detail": f"{where}There is no verdict."}
    if judged.get("state") not in STATES:
        detail = "The notebook that this page was made from holds none."
        return {"state": "no-verdict", "verdict": "No verdict", "detail": detail}
    sentence = judged.get("headline", "").partition(": ")[2]
    return {
        "state": judged["state"],
        "verdict": STATES[judged["state"]],
        "detail": sentence[:1].upper() + sentence[1:],
    }


def _date(started: str, seconds: float | None) -> str:
    from experiments.notebook import duration  # loads torch

    try:
        moment = datetime.datetime.fromisoformat(started).astimezone(datetime.UTC)
    except ValueError:
        return ""
    took = f", took {duration(seconds)}" if seconds is not None else ""
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC{took}"


def _network(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    title = data.get("title") or data.get("name") or config.get("data", "")
    images = [f"{data[f'{part}_images']:,} {part}" for part in ("train", "test") if f"{part}_images" in data]
    counts = f" ({' and '.join(images)} images)" if images else ""
    return f"{config.get('model', 'network')} on {title}{counts}" if title else config.get("model", "")
