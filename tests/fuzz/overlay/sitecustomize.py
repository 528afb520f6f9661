"""Python finds this file through PYTHONPATH (conftest.py) and then loads the engine in the folder ENGINE_FOLDER.

The editable install would find the ordinary one first.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any


class _Other:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "attnkit._engine":
            return None
        (engine,) = Path(os.environ["ENGINE_FOLDER"]).glob("_engine.*.so")
        return spec_from_file_location(name, engine)


sys.meta_path.insert(0, _Other)
