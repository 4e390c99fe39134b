"""JSON that anybody may have written, from text to values."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """What `json.loads` gives. Raises ValueError: no JSON, or nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
