"""A model's weights as files: read safely, checked, mapped into memory, on a shared filesystem.

To use it in a project of your own, copy this folder, common/errors.py and an empty
common/__init__.py; call it after `from common import storage`. If you want only one of these
things, leave the other files out, together with their lines below and their names in `__all__`:

    load_weights(network, path)                foreign weights, no code run: weights, damage
    network = map_weights(Network, path)       at once, whatever their size: mapping, layout, too
    with checked_copy(model_uri) as folder:    a colleague's model, looked at before it is loaded:
        mlflow.pytorch.load_model(folder)      inspection, examples, program, layout, damage
    with staged(path) as folder:               a model in a shared folder, whole or not at all:
        mlflow.pytorch.save_model(...)         folders
    of_alias("NAME", "production").path        where a model's file is: files, folders, layout

`write_model` (writing, hashed, damage, too) saves a model in a `staged` folder as fast as the disk
is. `measured` (measuring) says how long a step took. All raise `UserError`s.
"""

from .files import ModelFile, of_alias, of_model, recorded, sha256, verify
from .folders import check_experiment, check_space, open_to_group, path_of, prepare, size_of, staged
from .inspection import check_archive, check_model, checked_copy
from .layout import MODEL_FILE
from .mapping import map_weights
from .measuring import measured
from .weights import load_weights, read_weights
from .writing import add_weights, without_weights, write_model

__all__ = ["MODEL_FILE", "ModelFile", "of_alias", "of_model", "recorded", "sha256", "verify"]
__all__ += ["check_experiment", "check_space", "open_to_group", "path_of", "prepare", "size_of"]
__all__ += ["staged", "check_archive", "check_model", "checked_copy", "load_weights", "map_weights"]
__all__ += ["read_weights", "measured", "add_weights", "without_weights", "write_model"]
