"""What a file that is damaged, or made to do harm, raises when it is read, and how to say so."""

import pickle
import re
import struct
import zipfile

# All that was seen when such files were read. An error of the system (OSError) is not one.
DAMAGED = (AssertionError, AttributeError, EOFError, LookupError, MemoryError, OverflowError)
DAMAGED += (RuntimeError, SyntaxError, TypeError, ValueError, pickle.UnpicklingError)
DAMAGED += (struct.error, zipfile.BadZipFile)


def require(condition, problem):
    """Raise ValueError, which says what the problem is, unless the condition holds."""
    if not condition:
        raise ValueError(problem)


def reason(error):
    """Return the first words of an error's text, which may be long and hold anything."""
    # Not PyTorch's own words, whose advice is to switch protections off.
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it is a pickle that needs {found[1]}"
    if re.search("weights_only|TorchScript|PytorchStream|mmap can", str(error)):
        return "it is of another kind, or damaged"
    text = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    text = text.strip().split("\n")[0][:200].rstrip(". ")
    return text if text and text.isprintable() else type(error).__name__
