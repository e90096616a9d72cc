"""The layout of a `.pt2` archive, MLflow's format for PyTorch models: all its constants, once.

PyTorch does not document it; `torch.export.save` writes it since PyTorch 2.10. When that changes,
write_model falls back on PyTorch's own writer, and the new archives are neither mapped nor passed.
"""

import re

import torch

MODEL_FILE = "data/model.pt2"  # within the folder of a model that MLflow has saved

# The archive's records. All names start with one folder: ROOT, where MLflow has saved the archive.
ROOT = "model/"
VERSIONS = {"archive_format": b"pt2", "archive_version": b"0"}
WEIGHTS = "data/weights/"
WEIGHTS_CONFIG = WEIGHTS + "model_weights_config.json"
CONSTANTS_CONFIG = "data/constants/model_constants_config.json"
EXAMPLE = "data/sample_inputs/model.pt"  # a pickle
PROGRAM = "models/model.json"
PROGRAM_VERSION = 8  # of the schema that PROGRAM follows
RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|"
    r"models/model\.json|data/sample_inputs/model\.pt|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)"
)
TENSORS = (WEIGHTS + "weight_", "data/constants/tensor_")  # records that may be large
LARGEST = 2**28  # bytes of any other record

ENTRY = {"path_name", "is_param", "use_pickle", "tensor_meta"}  # of WEIGHTS_CONFIG
STRIDED = 7  # PyTorch's number for the layout of a dense tensor
ALIGNMENT = 64  # bytes, of each weight in the file

# A record of a zip file: a header, the name, extra fields, the content.
HEADER, HEADER_SIZE = "<4s22xHH", 30  # signature, lengths of the name and of the extra fields
SIGNATURE = b"PK\x03\x04"
ZIP64_SIZE = 20  # bytes of the extra field that says that the content may be larger than 4 GB

# PyTorch's numbers for the types of elements.
TYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
PT2_TYPES = {number: getattr(torch, name) for number, name in enumerate(TYPES, 1)}
PT2_TYPES |= {12: torch.bool, 13: torch.bfloat16}
