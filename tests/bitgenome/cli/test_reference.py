"""docs/configuration.md holds every key, as the settings define it."""

from bitgenome.cli.reference import reference
from tests.conftest import REPOSITORY


def test_the_page_of_all_keys_is_that_of_the_settings() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert page == reference() + "\n", "python -m bitgenome.cli.reference > docs/configuration.md"


def test_every_key_says_what_it_means() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []
