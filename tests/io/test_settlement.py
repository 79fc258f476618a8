"""What one worker sees of a tenant while another settles a request of it.

Functions of the core are replaced here, which a translation of it does not notice: so this is not
among the core's own tests, which are run over the translation, too.
"""

from __future__ import annotations

import pytest

from proxy.core import admission
from proxy.core.admission import Claim, Refused
from proxy.core.quota import Account
from tests.core.test_admission import Stage


@pytest.mark.parametrize("limit", ["tokens_per_day", "budget_per_day"])
def test_what_ends_counts_for_others_at_every_moment(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Another worker that asks amid a settlement finds it running, or spent, and never neither."""
    stage = Stage(workers=2, **{limit: 10 if limit == "tokens_per_day" else 10 / admission.NANO})
    claim = stage.ask(9, 9)
    answers: list[Claim | Refused] = []
    let_go, of_day = admission._let_go, Account.of_day

    def asked_around(account: Account, claim: Claim) -> None:
        monkeypatch.setattr(admission, "_let_go", let_go)
        answers.append(stage.ask(5, 5, place=1))
        let_go(account, claim)
        answers.append(stage.ask(5, 5, place=1))

    def ended_meanwhile(account: Account, *args: int, **words: bool) -> int:
        monkeypatch.setattr(Account, "of_day", of_day)
        stage.end(claim, 9, 9)
        return account.of_day(*args, **words)

    monkeypatch.setattr(admission, "_let_go", asked_around)
    monkeypatch.setattr(Account, "of_day", ended_meanwhile)  # as the one who asks reads it
    answers.append(stage.ask(5, 5, place=1))
    assert len(answers) == 3
    assert all(isinstance(answer, Refused) for answer in answers)
