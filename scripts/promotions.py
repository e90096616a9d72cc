"""The record of what was promoted, and one promotion at a time (for promote.py).

Each promotion is a run of one experiment, and its tags say what happened. Nothing changes in a run
once it has ended.
"""

import datetime
import random
import time
from typing import NamedTuple

import mlflow
from mlflow.exceptions import MlflowException

from common import runs
from common.errors import TRY_AGAIN, UserError

MOVED = ("promoted", "forced", "undone", "replaced")  # the outcomes of those that moved the alias
MOVING = "moving"  # the outcome of a promotion that has its turn, and of one that died there
PATIENCE = 60  # seconds to wait for another promotion
DEAD = 600  # seconds after which a promotion that has not ended counts as dead


class Record(NamedTuple):
    number: int  # the order in which promotions of this model moved its aliases
    time: str
    outcome: str
    alias: str
    before: str | None  # the version that the alias pointed at; None if there was no alias
    after: str | None  # the version that it was to point at
    who: str
    run_id: str
    reason: str
    running: bool  # whether the promotion is still under way

    def __str__(self):
        outcome = "unfinished" if self.outcome in (MOVING, "pending") else self.outcome
        versions = f"version {self.before or 'none'} -> {self.after or 'none'}"
        line = f"{outcome:<9}{self.time}  {self.alias}  {versions}  by {self.who}  {self.run_id}"
        return "".join(filter(str.isprintable, f"{line}  {self.reason}"))


def records(experiment_name, model_name):
    """Return the `Record`s of a model, newest last."""
    experiment = mlflow.get_experiment_by_name(experiment_name)
    if experiment is None:
        return []
    # search_runs: the same filter works in the search bar of the experiment's page.
    found = mlflow.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.promotion.model = '{model_name}'",
        output_format="list",
    )
    try:
        found.sort(key=lambda run: (int(run.data.tags["promotion.number"]), run.info.start_time))
        return list(map(_record, found))
    except (LookupError, ValueError) as error:
        what = f"a run in {experiment_name} is no record of a promotion of {model_name}: {error}."
        raise UserError(what, "take the tag promotion.model from it, or delete it.") from error


def _record(run):
    tag, started = run.data.tags, run.info.start_time / 1000
    before, after = (None if (v := tag[f"promotion.{n}"]) == "none" else v for n in ("from", "to"))
    return Record(
        number=int(tag["promotion.number"]),
        time=datetime.datetime.fromtimestamp(started).strftime("%Y-%m-%d %H:%M"),
        outcome=tag["promotion.outcome"],
        alias=tag["promotion.alias"],
        before=before,
        after=after,
        who=tag["owner"],
        run_id=run.info.run_id,
        reason=tag["promotion.reason"],
        running=run.info.status == "RUNNING" and time.time() - started < DEAD,
    )


def next_number(found):
    return 1 + max((record.number for record in found), default=0)


def take_turn(run_id, experiment_name, model_name):
    """Wait until no other promotion of this model moves an alias; return the number of this one.

    MLflow has neither locks nor compare-and-swap. So a promotion first says `moving` in its record,
    and then looks for another that does: of two at the same moment, at least one sees the other.
    Whoever sees one takes the word back, and tries again a moment later.
    """
    client, deadline = mlflow.MlflowClient(), time.monotonic() + PATIENCE
    while True:
        client.set_tag(run_id, "promotion.outcome", MOVING)
        found = [r for r in records(experiment_name, model_name) if r.run_id != run_id]
        others = [record.run_id for record in found if record.outcome == MOVING and record.running]
        if not others:
            return next_number(found)
        late = time.monotonic() > deadline
        client.set_tag(run_id, "promotion.outcome", "conflict" if late else "pending")
        if late:
            what = f"another promotion of {model_name} is under way: the run {others[0]}."
            hint = f"try again; if its job died, it counts as dead after {DEAD // 60} minutes."
            raise UserError(what, hint, TRY_AGAIN)
        time.sleep(random.uniform(0.2, 1))


def last_move(found, model_name, alias, current, forced):
    """Return the `Record` of the last move of the alias, which points at the version `current` now.

    Raises UserError if there is none, or, unless `forced`, if it moved the alias somewhere else.
    """
    found = [record for record in found if record.alias == alias]
    # A promotion that died in its turn has moved the alias, or it has not: that shows now.
    moves = [r for r in found if r.outcome in MOVED or (r.outcome == MOVING and r.after == current)]
    if not moves:
        what = f"no move of {model_name}@{alias} is recorded, so there is none to undo."
        raise UserError(what, 'to move it without a record: --version N --force "reason"')
    last = moves[-1]
    if last.after != current and not forced:
        what = (
            f"{model_name}@{alias} points at version {current or 'none'}, but the last move on "
            f"record left it at version {last.after or 'none'}: it was moved by something else."
        )
        hint = f'to go to version {last.before or "none"} all the same: --undo --force "reason"'
        raise UserError(what, hint)
    return last


def version_behind(name, alias):
    """Return the number of the version that an alias points at; UserError if there is none."""
    number = runs.alias_version(name, alias)
    if number is None:
        what = f"{name} has no alias {alias} on the tracking server named above."
        raise UserError(what, f"scripts/load_and_use_models.py versions {name} shows all aliases.")
    return number


def existing_version(name, number):
    """Return a version; UserError if there is none, or none any more."""
    try:
        return mlflow.MlflowClient().get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        what = f"there is no version {number} of {name}, or it was deleted."
        hint = f"scripts/load_and_use_models.py versions {name} shows those that there are."
        raise UserError(what, hint) from error


def trained_on(version):
    """Return the data set that a version's tags name, or else its run; None if neither is known."""
    if "dataset" in version.tags:
        return version.tags["dataset"]
    try:
        return runs.existing_run(version.run_id or "none").data.params.get("dataset")
    except UserError:
        return None
