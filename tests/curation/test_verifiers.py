"""Verifiers that need no model, and their place in recipes."""

import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.verifiers.matches import Matches
from gristmill.curation.verifying import Case, Verifier


def test_matches_is_re2_search() -> None:
    cases = [Case("", answer) for answer in ("The answer is 42.", "42", "no number", "")]
    found = Matches(r"\b42\b").verify(cases, None)  # type: ignore[arg-type]
    assert [one.right for one in found] == [True, True, False, False]
    assert [one.right for one in Matches(r"\d", none=True).verify(cases, None)] == [False, False, True, True]  # type: ignore[arg-type]
    assert isinstance(Matches("x"), Verifier) and "not found" in found[2].detail
    with pytest.raises(HouseError, match="no regular expression"):
        Matches("(")
