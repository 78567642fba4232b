"""The plan of the house, drawn from the imports in the code: districts, doors, and arrows that run one way.

A district is a folder of `src/` or `experiments/`; the files beside them (`resnet.py`, `src/quantizer.py`, commands)
stand alone. An arrow a -> b means that a imports b. The README's layout table lists the districts from the lowest to
the highest, and its drawing shows the arrows that do not follow from others.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = ("src", "experiments", "resnet", "utils_quantization", "metrics")
MOST_MODULES = 9
COMMANDS = frozenset(
    f"experiments.{name}" for name in ("debug_run", "compare", "export", "bench", "run_notebook", "lab")
)


class Import(NamedTuple):
    """One imported name: who imports which name from which module, and where."""

    importer: str
    module: str
    name: str
    line: int


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the product by its dotted name; a package goes by its folder's."""
    files = [root / f"{name}.py" for name in ROOTS[2:]]
    files += [path for folder in ROOTS[:2] for path in sorted((root / folder).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports_of(name: str, source: str, known: frozenset[str]) -> Iterator[Import]:
    """The imports of the project's own modules in a module's source, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOTS:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in known:
                    yield Import(name, submodule, "", node.lineno)
                else:
                    yield Import(name, node.module, alias.name, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ROOTS:
                    yield Import(name, alias.name, "", node.lineno)


def district(module: str) -> str:
    """'src.data.cifar10' -> 'src.data'; a file that stands alone is its own district."""
    return ".".join(module.split(".")[:2])


def arrows(imports: list[Import]) -> set[tuple[str, str]]:
    """(a, b) where district a imports from district b."""
    return {(district(i.importer), district(i.module)) for i in imports if district(i.importer) != district(i.module)}


MODULES = modules()
KNOWN = frozenset(MODULES)
IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, path.read_text("utf-8"), KNOWN)]
ARROWS = arrows(IMPORTS)
DISTRICTS = sorted({district(name) for name in KNOWN if MODULES[name].name == "__init__.py" and "." in name})


def past_the_door(imports: list[Import], public: dict[str, set[str]]) -> list[str]:
    """Imports that reach into another district by another way than a name in the `__all__` of its door."""
    wrong = []
    for found in imports:
        target = district(found.module)
        if target not in public or target == district(found.importer):
            continue
        inside = found.module.removeprefix(target).lstrip(".")
        name = found.name or inside
        if (found.name and inside) or (name and name not in public[target]):
            wrong.append(f"{found.importer}:{found.line} imports {found.module} {found.name}".rstrip())
    return wrong


def successors(pairs: set[tuple[str, str]]) -> dict[str, set[str]]:
    """What each name has an arrow to."""
    return {name: {b for a, b in pairs if a == name} for name, _ in pairs}


def public_names(package: str) -> set[str]:
    """`__all__` of a package's door, read from its source."""
    for node in ast.parse(MODULES[package].read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()


PUBLIC = {name: public_names(name) for name in DISTRICTS}


def test_no_folder_holds_more_modules_than_a_reader_can_hold_in_the_head() -> None:
    folders: dict[Path, list[str]] = {}
    for path in MODULES.values():
        if path.name != "__init__.py":
            folders.setdefault(path.parent, []).append(path.name)
    crowded = {str(folder.relative_to(ROOT)): len(names) for folder, names in folders.items() if folder != ROOT}
    assert {folder: count for folder, count in crowded.items() if count > MOST_MODULES} == {}
    for top in ("src", "experiments"):
        inside = [path for path in (ROOT / top).iterdir() if path.is_dir() and path.name != "__pycache__"]
        assert 1 < len(inside) <= MOST_MODULES


@pytest.mark.parametrize("name", DISTRICTS)
def test_a_door_says_in_three_lines_what_lives_behind_it(name: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[name].read_text("utf-8"))) or ""
    assert 1 <= len([line for line in text.splitlines() if line.strip()]) <= 3, text
    assert PUBLIC[name], f"{name} has no __all__"


def test_other_districts_are_entered_through_their_doors() -> None:
    assert len(IMPORTS) > 500
    assert past_the_door(IMPORTS, PUBLIC) == []


def test_no_private_name_crosses_modules() -> None:
    assert [f"{i.importer}:{i.line} {i.name}" for i in IMPORTS if re.match(r"_[a-z]", i.name)] == []


def test_only_doors_export_what_others_define() -> None:
    plain = [name for name, path in MODULES.items() if path.name != "__init__.py"]
    assert [name for name in plain if "\n__all__" in MODULES[name].read_text("utf-8")] == []


def test_arrows_form_no_circle_between_districts_nor_between_modules() -> None:
    """On a circle, `static_order` raises CycleError with its names."""
    within = {(i.importer, i.module) for i in IMPORTS if district(i.importer) == district(i.module)}
    within = {(a, b) for a, b in within if a != b and a not in DISTRICTS and b not in DISTRICTS}
    for pairs in (ARROWS, within):
        order = list(TopologicalSorter(successors(pairs)).static_order())
        assert all(order.index(b) < order.index(a) for a, b in pairs)


def table_order() -> list[str]:
    """The districts and files of the README's layout table, from the lowest to the highest row."""
    layout = README.split("## Layout")[1].split("\n## ")[0]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in layout.splitlines() if line.startswith("| `")]
    return [name.rstrip("/").removesuffix(".py").replace("/", ".") for row in rows for name in row]


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_arrows_run_down_the_readme_table() -> None:
    order = [name for name in table_order() if name.split(".")[0] in ROOTS]
    unnamed = {district(name) for name in KNOWN} - set(order) - {"src", "experiments"}
    assert unnamed == set(), "districts that the table does not name"
    place = {name: number for number, name in enumerate(order)}
    back = [f"{a} -> {b}" for a, b in sorted(ARROWS) if {a, b} <= set(place) and place[a] < place[b]]
    assert back == [], "arrows that run against the order of the table"


def drawn_arrows() -> set[tuple[str, str]]:
    """The arrows of the README's drawing: a line 'a -> b, c' for each district."""
    drawing = README.split("## Layout")[1].split("```text\n")[1].split("```")[0]
    found = set()
    for line in drawing.splitlines():
        name, arrow, targets = line.partition("->")
        if arrow:
            found |= {(name.strip(), target.strip()) for target in targets.split(",") if target.strip()}
    return found


def short(name: str) -> str:
    """The drawing's name of a district or of a file that stands alone; the commands are one."""
    return "commands" if name in COMMANDS else name.split(".")[-1]


def reduced(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that do not follow from others: a -> c goes where there is a way from a to c through a third."""

    after = successors(pairs)

    @functools.cache
    def reached(name: str) -> set[str]:
        return after.get(name, set()).union(*map(reached, after.get(name, set())))

    return {(a, c) for a, c in pairs if not any(c in reached(b) for b in after[a])}


def test_the_readme_draws_the_arrows_of_the_code() -> None:
    named = {(short(a), short(b)) for a, b in ARROWS if not {a, b} & {"src", "experiments"}}
    assert drawn_arrows() == reduced({(a, b) for a, b in named if a != b})


@pytest.mark.parametrize(
    "line",
    ["from src.storage.files import write_atomic", "import src.storage.files", "from src.storage import not_public"],
)
def test_a_way_past_the_door_is_seen(line: str) -> None:
    known = frozenset({"src.storage", "src.storage.files"})
    found = list(imports_of("src.data.dataset", line, known))
    assert len(past_the_door(found, {"src.storage": {"write_atomic"}})) == 1
