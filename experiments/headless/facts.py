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
    results, rows, settings: label and text.
    """
    facts, run = _published(notebook), notebook.metadata.get("run", {})
    rows = dict.fromkeys(("Date", "Network", "Settings", "Device", "Versions"), "not recorded")
    started, config = run.get("started") or facts.get("recorded"), facts.get("config", {})
    if started:
        rows["Date"] = _date(started, run.get("seconds"))
    if config:  # then there is the rest of what a run is
        data, machine = facts["data"], facts["machine"]
        images = f"{data['train_images']:,} training and {data['test_images']:,} test images"
        named = f"{machine['device']} ({machine['device_name']})" if machine["device_name"] else machine["device"]
        rows |= {
            "Network": f"{config['model']} on {data['title']} ({images})",
            "Settings": ", ".join(f"{n.replace('_', ' ')} {config[n]}" for n in SETTINGS if config[n] is not None),
            "Device": f"{named}, {machine['precision']}, threads: {machine['threads']}, {machine['system']}",
            "Versions": ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items())),
        }
    command = {"command": run["command"]} if "command" in run else {}
    return {
        **_verdict(facts.get("verdict"), run),
        "results": {
            label: form.format(factor * facts["results"][name])
            for name, (label, factor, form) in RESULTS.items()
            if facts.get("results", {}).get(name) is not None
        },
        "rows": rows,
        "settings": {name: str(value) for name, value in {**command, **config}.items() if name != "given"},
    }


def _published(notebook: NotebookNode) -> dict[str, Any]:
    """The facts in the outputs of an executed notebook, merged in the order of its cells."""
    from experiments.notebook import FACTS  # loads torch

    facts: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            facts.update(output.get("data", {}).get(FACTS, {}))
    return facts


def _verdict(judged: Mapping[str, Any] | None, run: Mapping[str, Any]) -> dict[str, str]:
    if run.get("status") == "failed":
        where = run["message"].partition("\n")[0]
        return {"state": "stopped", "verdict": "Stopped before the end", "detail": f"{where}. There is no verdict."}
    if judged is None:
        detail = "The notebook that this page was made from holds none."
        return {"state": "no-verdict", "verdict": "No verdict", "detail": detail}
    sentence = judged["headline"].partition(": ")[2]
    verdict = STATES[judged["state"]]
    return {"state": judged["state"], "verdict": verdict, "detail": sentence[:1].upper() + sentence[1:]}


def _date(started: str, seconds: float | None) -> str:
    from experiments.notebook import duration  # loads torch

    moment = datetime.datetime.fromisoformat(started).astimezone(datetime.UTC)
    took = f", took {duration(seconds)}" if seconds is not None else ""
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC{took}"
