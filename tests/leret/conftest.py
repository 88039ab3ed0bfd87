"""The run that the tests of rounds begin with."""

import json

import pytest
from rounds_world import STYLES
from run_world import opened


@pytest.fixture
def ready(tmp_path):
    """`ready(**options)`: a run with three styles over the ten questions; `ready.said` is what it says."""
    (tmp_path / "styles.json").write_text(json.dumps(STYLES))
    said = []

    def make(**options):
        return opened(tmp_path / "in", said, **{"prompts": str(tmp_path / "styles.json"), **options})

    make.said = said
    return make
