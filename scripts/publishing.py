"""What publish.py sends: what the server does not have yet. Nothing here loads a model."""

import functools
import os
import posixpath
import shutil
from pathlib import Path

import tqdm
from mlflow.entities import Metric, ViewType

from common import storage
from common.errors import UserError

from .local_store import PARENT_TAG, has_ended

RUN_TAG = "published.run_id"  # the id in the local store
END_TAG = "published.end_time"  # the end of the run when its files were sent first


def end_of(run):
    """When the run ended, in milliseconds; some programs end a run without saying."""
    return run.info.end_time or run.info.start_time


def is_complete(run, there):
    """Whether all of `run` has been published: status and end are sent last."""
    same = (run.info.status, end_of(run)) == (there.info.status, there.info.end_time)
    return has_ended(run) and same


def own_location(experiment):
    """Return where an experiment keeps its files if somebody chose that, as --target_path does.

    None if it is MLflow's own place, .../NUMBER.
    """
    location = experiment.artifact_location.rstrip("/")
    return None if location.endswith(f"/{experiment.experiment_id}") else location


def find_run(server, experiment_id, run_id):
    """Return the run there that `run_id` of the local store was published as, or None.

    There can be two: if the answer to `create_run` is lost, MLflow asks again. One is deleted.
    """
    wanted = f"tags.`{RUN_TAG}` = '{run_id}'"
    found = server.search_runs([experiment_id], wanted, ViewType.ALL)
    active = [run for run in found if run.info.lifecycle_stage == "active"]
    active.sort(key=lambda run: (not has_ended(run), run.info.run_id))
    for other in active[1:]:
        server.delete_run(other.info.run_id)
    return next(iter(active + found), None)


def tags_of(run, there, parent):
    """Return the tags of the published run; `parent` is the id of its parent there, or None."""
    tags = run.data.tags | {RUN_TAG: run.info.run_id}
    if has_ended(run):
        tags[END_TAG] = there.data.tags.get(END_TAG, str(end_of(run)))
    tags.pop(PARENT_TAG, None)
    return tags | ({PARENT_TAG: parent} if parent else {})


def missing_points(source, server, run, there):
    """Return the points of all metrics of `run` that the server does not have."""
    missing = []
    for key in run.data.metrics:
        known = set()
        if key in there.data.metrics:
            known = set(map(point, server.get_metric_history(there.info.run_id, key)))
        history = source.get_metric_history(run.info.run_id, key)
        missing += [metric for metric in history if point(metric) not in known]
    return [Metric(m.key, m.value, m.timestamp, m.step) for m in missing]


def point(metric):
    """What tells one point of a curve from another. `repr`, as NaN does not equal itself."""
    return metric.timestamp, metric.step, repr(metric.value)


def missing_inputs(run, there):
    """Return the data sets of `run` that the server does not have."""

    def name(entry):
        return entry.dataset.name, entry.dataset.digest

    known = set(map(name, there.inputs.dataset_inputs))
    return [entry for entry in run.inputs.dataset_inputs if name(entry) not in known]


def send_files(local, server, run, there):
    """Send the files of `run` that the server does not have; return how many these were."""
    folder, run_id = local.folder(run.info.artifact_uri), there.info.run_id
    own = own_location(local.experiments[run.info.experiment_id])
    # A run without files has no folder; with others, what is above it is there.
    above = folder.parents[1 if own else 2]  # --target_path, or `mlruns`
    if not above.exists():
        say_missing(above)
    # log_artifact: a file in the tab "Artifacts".
    upload = functools.partial(server.log_artifact, run_id)
    if own:
        upload = linking(storage.path_of(there.info.artifact_uri))
    # A run that was continued may have written to its files again.
    since = int(there.data.tags.get(END_TAG, end_of(run)))
    listing = functools.partial(server.list_artifacts, run_id)
    return send(missing_files(files_in(folder), listing, since), upload)


@functools.cache  # once, and not for each run
def say_missing(folder):
    what = f"files    none: there is no {folder}; when it is back, --run_id ID sends them"
    print(what, flush=True)


def files_in(folder):
    """Return {name: path} of all files in a folder and below. UserError if one cannot be sent."""
    files, paths = {}, []
    hint = "rename it, or put the file there itself; none of its run's files was sent."

    def stop(error):
        raise error

    try:
        if folder.is_symlink():
            paths.append(folder)
        elif folder.exists():
            for here, folders, names in os.walk(folder, onerror=stop):
                paths += [Path(here, name) for name in folders + names]
        for path in sorted(paths):
            # MLflow puts a name into the address as it is: `a#1` and `a#2` would both become `a`.
            odd = set("#?%") & set(path.name) or not path.name.isprintable() or path.is_symlink()
            if odd or not (path.is_file() or path.is_dir()):
                what = f"{path} is a link or no file, or its name has one of # ? %, or no text"
                raise UserError(f"{what}: it would not arrive.", hint)
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
    except OSError as error:
        what = f"{error.filename} cannot be read: {error.strerror}."
        raise UserError(what, "ask its owner; none of its run's files was sent.") from error
    return files


def missing_files(files, listing, since=None):
    """Return those of `files` that the server has not, or not in this size.

    `listing(folder)` says what it has. What was written after `since`, in ms, is sent again.
    """
    there, folders = {}, [None]
    while folders:
        for entry in listing(folders.pop()):
            there[entry.path] = entry.file_size
            if entry.is_dir:
                folders.append(entry.path)

    def missing(name, state):
        changed = since is not None and state.st_mtime * 1000 > since
        return there.get(name) != state.st_size or (changed and name in there)

    return {name: path for name, path in files.items() if missing(name, path.stat())}


def send(files, upload):
    """Call `upload(path, folder there)` for each file, and return how many; a bar on a terminal."""
    size = sum(path.stat().st_size for path in files.values())
    with tqdm.tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name, path in files.items():
            upload(str(path), posixpath.dirname(name) or None)
            bar.update(path.stat().st_size)
    return len(files)


def linking(folder):
    """Return an `upload` that links files into `folder`: no byte of a large model is copied."""

    def link(path, parent):
        target = Path(folder, parent or "", Path(path).name)
        try:
            own = storage.claim(folder.as_uri())  # nobody else can plant links there
            there = own / target.relative_to(folder.parent)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            (shutil.copyfile if there.name == "MLmodel" else os.link)(path, there)
            storage.open_to_group(own)
        except OSError as error:
            what = f"{path} cannot be linked to {target}: {error.strerror}."
            raise UserError(
                what, "may you write there? Files of others cannot be linked."
            ) from error

    return link
