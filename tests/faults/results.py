"""What the programs that inject faults print."""

import json
from pathlib import Path
from typing import Any


def tell(result: dict[str, Any], file: Path | None) -> None:
    """Print a result as JSON, and write it where a file is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if file:
        file.write_text(text)
