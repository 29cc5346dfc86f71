"""What the tests of the report share."""

import pytest

from tests.report.fixture import drift_record


@pytest.fixture(scope="module")
def record():
    return drift_record()


@pytest.fixture
def undrawn(monkeypatch):
    """Pages and files without their pictures, where these are not what is tested: drawing takes seconds."""
    monkeypatch.setattr("deltalab.report.page.inline", lambda panel, number: f'<svg aria-label="{number}"></svg>')
    monkeypatch.setattr("deltalab.report.figures.save", lambda plot, folder: [])
