"""Models and their registered versions, for publish.py. Files are copied; no model is loaded."""

import functools
import tempfile
from pathlib import Path

from mlflow import MlflowException
from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric

from common import storage
from common.errors import UserError

from . import publishing
from .local_store import all_pages

MODEL_TAG = "published.model_id"  # the id in the local store
VERSION_TAG = "published.version"  # the number in the local store
VERSIONS_TAG = "mlflow.modelVersions"  # MLflow's own list of the model's versions in a registry


def models_of(source, run):
    """Return the models that `run` has logged, all of them written to the end."""
    wanted = f"source_run_id = '{run.info.run_id}'"
    experiments = [run.info.experiment_id]
    search = functools.partial(source.search_logged_models, experiments, wanted)
    return [model for model in reversed(all_pages(search)) if model.status == "READY"]


def missing_inputs(server, run, there):
    """Return the models that `run` was given, as an evaluation is, and the server does not know of.

    Those that were published to the same experiment before.
    """
    known = {given.model_id for given in there.inputs.model_inputs}
    twins = [find_model(server, there, given.model_id) for given in run.inputs.model_inputs]
    return [
        LoggedModelInput(twin.model_id) for twin in twins if twin and twin.model_id not in known
    ]


def find_model(server, there, model_id):
    """Return the model that `model_id` was published as, or None. A second one is deleted.

    There is a second one if the answer to `create_logged_model` is lost, and MLflow asks again.
    """
    wanted = f"tags.`{MODEL_TAG}` = '{model_id}'"
    found = server.search_logged_models([there.info.experiment_id], wanted)
    found = sorted(found, key=lambda model: (model.status != "READY", model.model_id))
    for other in found[1:]:
        server.delete_logged_model(other.model_id)
    return next(iter(found), None)


def send_model(local, server, model, run, there):
    """Bring a model to the server, as far as it is not there; return 1 if it became READY now."""
    run_id, twin = there.info.run_id, find_model(server, there, model.model_id)
    if twin is None:
        # create_logged_model: a new id, and PENDING until all of its files are there.
        number, tags = there.info.experiment_id, {MODEL_TAG: model.model_id}
        new = server.create_logged_model(
            number, model.name, run_id, tags, model.params, model.model_type
        )
        twin = find_model(server, there, model.model_id) or new
    # log_model_params: those that there are more of than create_logged_model sends at once.
    if params := dict(model.params.items() - twin.params.items()):
        server.log_model_params(twin.model_id, params)
    # set_logged_model_tags: what the local store says of it; a path names its new place.
    tags = moved(model.tags, model, twin) | {MODEL_TAG: model.model_id}
    tags.pop(VERSIONS_TAG, None)
    if tags := dict(tags.items() - twin.tags.items()):
        server.set_logged_model_tags(twin.model_id, tags)
    pending = twin.status != "READY"
    if pending:
        send_model_files(local, server, model, twin, run, there)
        # finalize_logged_model: READY, from here on it can be loaded.
        server.finalize_logged_model(twin.model_id, "READY")
        print(f"model    {model.model_id} -> {twin.model_id}  {model.name}", flush=True)
    # log_outputs: the link from the run's page to the model's.
    steps = {output.model_id: output.step for output in run.outputs.model_outputs}
    linked = [output.model_id for output in there.outputs.model_outputs]
    if model.model_id in steps and twin.model_id not in linked:
        link(server, run_id, LoggedModelOutput(twin.model_id, steps[model.model_id]))
    # log_batch: the metrics on the model's page.
    server.log_batch(run_id, missing_points(model, twin, run, there))
    return int(pending)


def send_model_files(local, server, model, twin, run, there):
    """Send those files of a model that the server does not have."""
    folder = local.folder(model.artifact_location)
    if not folder.is_dir():
        what = f"there are no files of the model {model.model_id}: {folder} is not there."
        hint = "give --source where it was logged to, with its folder mlruns beside it."
        raise UserError(what, hint)
    # log_model_artifact: one file of the model.
    upload = functools.partial(server.log_model_artifact, twin.model_id)
    if publishing.own_location(local.experiments[run.info.experiment_id]):
        upload = publishing.linking(storage.path_of(twin.artifact_location))
    files = publishing.files_in(folder)
    # MLflow (up to 3.17) writes this file when it loads a model. It is about the local registry.
    files.pop("registered_model_meta", None)
    listing = functools.partial(server.list_logged_model_artifacts, twin.model_id)
    with tempfile.TemporaryDirectory() as parent:
        if "MLmodel" in files:  # which names the model, its run and its place
            text = files["MLmodel"].read_bytes()
            for old, new in (
                (model.artifact_location, twin.artifact_location),
                (model.model_id, twin.model_id),
                (run.info.run_id, there.info.run_id),
            ):
                text = text.replace(old.encode(), new.encode())
            files["MLmodel"] = Path(parent, "MLmodel")
            files["MLmodel"].write_bytes(text)
        publishing.send(publishing.missing_files(files, listing), upload)


def moved(tags, model, twin):
    """Return `tags`, with the model's new place in those that name the old one."""
    places = [str(storage.path_of(one.artifact_location)) for one in (model, twin)]
    return {name: value.replace(*places) for name, value in tags.items()}


def link(server, run_id, output):
    try:
        server.log_outputs(run_id, [output])
    except MlflowException:  # if the answer is lost, MLflow asks again, and is refused
        outputs = server.get_run(run_id).outputs.model_outputs
        if output.model_id not in [known.model_id for known in outputs]:
            raise


def missing_points(model, twin, run, there):
    """Return the points that `run` logged of `model`, and which its `twin` does not have."""
    known = {(m.key, publishing.point(m)) for m in twin.metrics or ()}
    return [
        Metric(
            *(m.key, m.value, m.timestamp, m.step),
            model_id=twin.model_id,
            dataset_name=m.dataset_name,
            dataset_digest=m.dataset_digest,
            run_id=there.info.run_id,
        )
        for m in model.metrics or ()
        if m.run_id == run.info.run_id and (m.key, publishing.point(m)) not in known
    ]


def register(local, server, run, there, alias):
    """Make the versions that point at models of `run`; return how many were not there before."""
    wanted, count = f"run_id = '{run.info.run_id}'", 0
    versions = all_pages(functools.partial(local.client.search_model_versions, wanted))
    for version in sorted(versions, key=lambda version: int(version.version)):
        model_id, name = version.source.removeprefix("models:/"), version.name
        if (twin := find_model(server, there, model_id)) is None:
            continue
        registered, source = local.client.get_registered_model(name), f"models:/{twin.model_id}"
        if not (number := find_version(server, name, source)):
            try:
                # create_registered_model: the entry under "Models".
                server.create_registered_model(name, registered.tags, registered.description)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            model = local.client.get_logged_model(model_id)
            # create_model_version: the next number there, which may be another one than here.
            tags = moved(version.tags, model, twin) | {VERSION_TAG: version.version}
            server.create_model_version(
                *(name, source, there.info.run_id, tags),
                description=version.description,
                await_creation_for=0,
                model_id=twin.model_id,
            )
            number, count = find_version(server, name, source), count + 1
            print(f"version  {name} {version.version} -> {number}  {source}", flush=True)
        if alias and str(registered.aliases.get(alias)) == str(version.version):
            if str(server.get_registered_model(name).aliases.get(alias)) == number:
                continue
            # set_registered_model_alias: models:/NAME@ALIAS now means this version, for everyone.
            server.set_registered_model_alias(name, alias, number)
            print(f"alias    models:/{name}@{alias} is version {number}", flush=True)
    return count


def find_version(server, name, source):
    """Return the number of the version of `name` that points at `source`, or None.

    If the answer to `create_model_version` was lost, there are two of this script: one is deleted.
    """
    search = functools.partial(server.search_model_versions, f"name = '{name}'")
    found = [version for version in all_pages(search) if version.source == source]
    found.sort(key=lambda version: int(version.version))
    for version in found[1:]:
        if VERSION_TAG in version.tags:
            server.delete_model_version(name, version.version)
    return str(found[0].version) if found else None
