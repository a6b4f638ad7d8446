"""The result of a policy, as text and as JSON."""

from __future__ import annotations

from statepool.cli import get as getting
from statepool.cli import set as setting
from statepool.cli import unset as unsetting
from statepool.cli.report import warn
from statepool.cli.session import Session
from statepool.model.outcomes import GetResult, SetResult
from statepool.policy import Done, ItemOutcome, Outcome


def report_outcome(session: Session, outcome: Outcome, dry_run: bool) -> int:
    """
    Print the result for each object.

    :returns: the exit code
    """
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"outcome": form(outcome), "dry_run": dry_run})
    else:
        for item in outcome.items:
            _tell(session, item, dry_run)
    return outcome.exit_code


def _tell(session: Session, item: ItemOutcome, dry_run: bool) -> None:
    for answer in item.answers:
        if isinstance(answer, GetResult):
            getting.tell(session, answer, dry_run)
        elif isinstance(answer, SetResult):
            setting.tell(session, answer, dry_run)
        else:
            unsetting.tell(session, answer, item.state or "", dry_run)
    if item.done in (Done.FAILED, Done.ABORTED) and not item.answers:
        warn(f"{item.object} {item.state}: {item.why}" + (f" ({item.hint})" if item.hint else ""))
    elif not item.answers:
        session.say(f"{item.object} {item.state}: {item.done}: {item.why}")
