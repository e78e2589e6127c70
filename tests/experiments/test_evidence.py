"""The published page says what the stored results say, and nothing of the machine that they were made on."""

from __future__ import annotations

from pathlib import Path

from experiments import tuning
from experiments.page import PAGE, STORED, page
from experiments.records import FILE
from experiments.report import opened, tuned

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_stored_results_say() -> None:
    assert (DOCS / PAGE).read_text("utf-8") == page(DOCS), "run python -m experiments publish"


def test_stored_trials_were_made_by_the_settings_that_are_stored_beside_them() -> None:
    """Runs are held against them wherever results are opened."""
    for folder in (file.parent for file in (DOCS / STORED).glob(f"*/{FILE}")):
        experiment, runs = opened(folder)
        trials = tuned(folder)
        assert {run.header.seed for run in trials}.isdisjoint({run.header.seed for run in runs})
        for trial in trials:
            short = tuning.shorter(experiment)
            assert trial.header.settings == short.digest(short.contestant(trial.header.contestant)), f"{folder.name}: a trial"
