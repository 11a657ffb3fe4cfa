"""``python -m operators.model [NAME ...]`` makes models ready for use (and does nothing when they are)."""

import logging
import sys

from operators.core.errors import ModelError
from operators.model.loading import default_model
from operators.model.obtain import obtain

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        for name in sys.argv[1:] or [default_model()]:
            print(f"model {name}: {obtain(name)}")
    except ModelError as error:
        sys.exit(str(error))
