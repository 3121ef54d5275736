"""The contracts in docs/architecture.md are those of the source."""

from __future__ import annotations

import pytest

from ideogram4_quant.diagnostics import contracts


def test_the_document_has_the_contracts_of_the_source():
    document = contracts.DOCUMENT.read_text(encoding="utf-8")
    assert contracts.with_contracts(document) == document, (
        "run python -m ideogram4_quant.diagnostics.contracts --write"
    )


def test_a_changed_signature_changes_the_contracts(tmp_path, monkeypatch):
    source = 'def f(a: int, *, b: str = "x") -> None:\n    """Does it. More.\n\n    Rest."""\n'
    (tmp_path / "m.py").write_text(source)
    monkeypatch.setattr(contracts, "ROOT", tmp_path)
    monkeypatch.setattr(contracts, "CONTRACTS", {"m.py": ("f",)})
    wanted = "```python\n# m.py\ndef f(a: int, *, b: str='x') -> None\n    # Does it\n```\n"
    assert contracts.contracts() == wanted
    (tmp_path / "m.py").write_text(source.replace("a: int", "a: float"))
    assert contracts.contracts() != wanted


def test_a_name_that_is_gone_and_markers_that_are_gone_are_told(monkeypatch):
    with pytest.raises(contracts.ContractError, match="markers"):
        contracts.with_contracts("# Architecture\n")
    monkeypatch.setattr(contracts, "CONTRACTS", {"errors.py": ("NoSuchError",)})
    with pytest.raises(contracts.ContractError, match="NoSuchError"):
        contracts.contracts()
