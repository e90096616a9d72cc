"""A model's weights as files: read safely, checked, mapped into memory, on a shared filesystem.

To use it in a project of your own, copy this folder, common/errors.py and an empty
common/__init__.py; call it after `from common import storage`. If you want only one of these
things, leave the other files out, together with their lines below:

    load_weights(network, path)                foreign weights, no code run: weights, damage, layout
    network = map_weights(Network, path)       at once, whatever their size: mapping, layout, too
    with storage.checked_copy(uri) as folder:  a colleague's model, looked at before it is loaded:
        mlflow.pytorch.load_model(folder)      inspection, program, layout, damage
    with staged(path) as folder:               a model in a shared folder, whole or not at all:
        mlflow.pytorch.save_model(...)         folders
    of_alias("NAME", "production").path        where a model's file is: files, folders, layout

`write_model` (writing, damage, too) saves a model in a `staged` folder as fast as the disk is.
`throughput` (files) prints how fast a step was. All raise `UserError`s.
"""

from .files import of_alias, of_model, recorded, sha256, throughput, verify
from .folders import (
    check_space,
    claim,
    open_to_group,
    path_of,
    place_experiment,
    prepare,
    remove_unfinished,
    staged,
)
from .inspection import check_model, checked_copy
from .layout import MODEL_FILE
from .mapping import map_weights
from .weights import check_numbers, load_weights
from .writing import write_model
