"""Names of repositories on the hub."""

import pytest

from llamagen.support.hub import is_repo_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", True),
        ("owner/na.me_1-x", True),
        ("name", False),
        ("a/b/c", False),
        ("/owner/name", False),
        ("./name", False),
        ("owner/", False),
        ("", False),
        ("owner/na me", False),
    ],
)
def test_names_of_repositories(text, expected):
    assert is_repo_id(text) == expected
