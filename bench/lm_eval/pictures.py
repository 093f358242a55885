"""Pictures of a document, for lm-eval: it imports this file by the name in the task file."""

import base64
import io
from typing import Any

from PIL import Image


def pictures(document: dict[str, Any]) -> list[Image.Image]:
    """Return the pictures of a document, in order."""
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in document["pictures"]]
