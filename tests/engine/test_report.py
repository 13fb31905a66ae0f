"""The table of a document and the counts: what is wrong with a model shows in both."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import report
from tests.engine.zoo import Animal

EQUAL = {"tensors": 3, "differences": []}
NO_TABLE = {"refused": "UnsupportedModel: no table"}
RESULTS: dict[str, dict[str, Any]] = {
    "AForCausalLM a tp2": {"class": "A", "error": "", "traced": EQUAL, "builtin": EQUAL},
    "AForCausalLM b tp4": {"class": "A", "error": "", "traced": EQUAL, "builtin": EQUAL},
    "BForCausalLM a tp2": {"class": "B", "error": "", "traced": EQUAL | {"merge": "1 missing: x"}, "builtin": NO_TABLE},
    "CForCausalLM a tp2": {"class": "", "error": "ValueError: <no> | kernel"},
}
ROWS = [
    "| architecture | in vLLM | layout | equal at tp | remark |",
    "|---|---|---|---|---|",
    "| AForCausalLM | A | built in, traced | 2, 4 |  |",
    "| BForCausalLM | B | traced |  | merge: 1 missing: x |",
    "| CForCausalLM | CModel | none |  | ValueError: &lt;no> \\| kernel |",
]


@pytest.fixture(autouse=True)
def three(monkeypatch):
    names = {f"{letter}ForCausalLM": f"{letter.lower()}.{letter}Model" for letter in "ABC"}
    found = {name: Animal(name, "text generation", place) for name, place in names.items()}
    monkeypatch.setattr(report, "animals", lambda: found)


def test_a_table_has_a_line_for_each_architecture():
    assert report.table(RESULTS) == ROWS


def test_the_document_around_the_markers_stays_and_what_changed_is_told(tmp_path):
    document = tmp_path / "layouts.md"
    document.write_text(f"# Before\n{report.BEGIN}\n{report.END}\nafter\n")
    assert report.write(document, RESULTS) == [f"+{row}" for row in ROWS]
    assert document.read_text() == "\n".join(["# Before", report.BEGIN, *ROWS, report.END, "after", ""])
    assert report.write(document, RESULTS) == []
    worse = {"class": "A", "error": "", "traced": EQUAL | {"differences": ["rank 0: x"]}, "builtin": EQUAL}
    assert report.write(document, RESULTS | {"AForCausalLM b tp4": worse}) == [
        f"-{ROWS[2]}",
        "+| AForCausalLM | A | built in, traced | 2 | 1 differences: rank 0: x |",
    ]


def test_a_document_without_markers_is_left_alone(tmp_path):
    document = tmp_path / "layouts.md"
    document.write_text("# Before\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        report.write(document, RESULTS)
    assert document.read_text() == "# Before\n"


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (RESULTS["AForCausalLM a tp2"], True),
        (RESULTS["CForCausalLM a tp2"], True),
        (RESULTS["BForCausalLM a tp2"], False),
        (RESULTS["AForCausalLM a tp2"] | {"builtin": EQUAL | {"differences": ["x"]}}, False),
        (RESULTS["AForCausalLM a tp2"] | {"traced": {"refused": "UnsupportedModel: x"}}, False),
        (RESULTS["AForCausalLM a tp2"] | {"traced": EQUAL | {"verify": "x"}}, False),
        ({"class": "A", "error": ""}, False),
        ({"class": "A", "error": "", "traced": {"refused": "x: a bias"}, "expected": "a bias"}, True),
        ({"class": "A", "error": "", "traced": {"refused": "x: a head"}, "expected": "a bias"}, False),
        ({"class": "A", "error": "", "traced": EQUAL, "builtin": NO_TABLE, "expected": "a bias"}, False),
    ],
)
def test_a_model_passes_if_vllm_does_not_load_it_or_all_of_ours_is_equal(found, right):
    assert report.passed(found) is right


def test_the_counts():
    assert report.summary(RESULTS) == (
        "3 architectures: vLLM loads 2, equal everywhere 1, with a built-in table 1; "
        "models at a size: 2 equal, 1 not loaded, 1 wrong"
    )
