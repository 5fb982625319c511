r"""Answers to mathematics whose result equals the reference's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..steps import Tools
from ..verifying import Case, Finding


@dataclass(frozen=True)
class ExactMaths:
    r"""Right where the result that the answer gives equals the reference's.

    The result is what stands after the last `####` (GSM8K) or in the last `\boxed{}` (MATH), else after "the answer
    is", `Answer:` or `A:`. last_number: else the last number of the text. Numbers are compared exactly as fractions:
    1,000 is 1000.00, 1/2 is 0.5, 25 % is 25 and 0.25, units and currencies are left out. Everything else (roots, sets,
    intervals, equations) goes to math-verify 0.9 or later, over sympy, in processes with limits of their own. Abstains
    where the reference or the answer gives no result, and where the algebra does not end. value: the result in normal
    form, by which equal numbers are known."""

    last_number: bool = True

    model: ClassVar[None] = None

    def verify(self, cases: Sequence[Case], tools: Tools) -> list[Finding]:
        """One finding a case. detail: both results."""
        from ..algebra import equal_results

        findings = [self._read(case) for case in cases]
        hard = [place for place, (finding, pair) in enumerate(findings) if pair is not None]
        told = equal_results([pair for _, pair in findings if pair is not None])
        for place, right in zip(hard, told, strict=True):
            finding, _ = findings[place]
            detail = finding.detail if right is not None else f"{finding.detail}; the algebra was not decided"
            findings[place] = Finding(right, detail, finding.value), None
        return [finding for finding, _ in findings]

    def _read(self, case: Case) -> tuple[Finding, tuple[str, str] | None]:
        """The finding, and the pair that algebra has still to compare."""
        from ..text.final_answers import equal_numbers, final_answer, normal_form, number, plain, reference_answer

        wanted = None if case.reference is None else reference_answer(case.reference)
        if wanted is None:
            return Finding(None, "the reference gives no result"), None
        said = final_answer(case.answer, self.last_number)
        if said is None:
            return Finding(None, f"no result in the answer; wanted {wanted}"), None
        value, one, other = normal_form(said), number(wanted), number(said)
        detail = f"{said} against {wanted}"
        if one is not None and other is not None:
            return Finding(equal_numbers(one, other), detail, value), None
        if value == normal_form(wanted) or plain(said).casefold() == plain(wanted).casefold():
            return Finding(True, detail, value), None
        if _is_words(plain(wanted)):
            return Finding(False, detail, value), None
        return Finding(None, detail, value), (plain(wanted), plain(said))


def _is_words(said: str) -> bool:
    """Words, in which no algebra may swap letters: `on` is not `no`."""
    return any(len(word) > 1 for word in said.split()) and all(word.isalpha() for word in said.split())
