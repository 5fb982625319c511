"""The doctor: finds what is there, says what to do about what is not."""

import importlib.metadata

import pytest

from gristmill.flows import doctor


def test_it_finds_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    findings = {finding.what: finding for finding in doctor.examine()}
    assert findings["torch"].found == importlib.metadata.version("torch") and findings["torch"].ok
    assert findings["cores"].found.isdigit()
    assert all(finding.advice for finding in findings.values() if not finding.ok)
    assert doctor.show(list(findings.values())) == 0
    assert "ok       torch" in capsys.readouterr().out


def test_a_missing_package_is_named_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    lost = doctor._package("no-such-package", "pip install it", needed=True)
    assert lost == doctor.Finding("no-such-package", "not installed", False, "pip install it")
    assert doctor._package("no-such-package", "pip install it", needed=False).ok is None
    assert doctor.show([lost]) == 1
    assert "MISSING" in capsys.readouterr().out


def test_a_prefect_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    (finding,) = doctor._prefect()
    assert finding.ok is False and "unset it" in finding.advice


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("GRISTMILL_DATA", str(tmp_path))
    assert next(doctor._data()).ok
    monkeypatch.setenv("GRISTMILL_DATA", "/no/such/folder")
    assert next(doctor._data()).ok is None
